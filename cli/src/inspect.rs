//! `cofferdam inspect`: all that is known of a domain.

use std::path::absolute;

use cofferdam_api::client::Client;
use serde_json::json;

use crate::args::Target;
use crate::control::{Domain, Failure, done};
use crate::say::print;

/// Prints status and configuration of a domain.
pub fn inspect(target: &Target) -> u8 {
    done(Domain::find(target).and_then(|domain| print_all(&domain)))
}

fn print_all(domain: &Domain) -> Result<(), Failure> {
    let status = domain.ask(Client::status)?;
    let config = domain.ask(Client::config)?;
    let facts = domain.entry.facts();
    let socket = domain.run_dir.path().join(&domain.entry.id).join("api.sock");
    let all = json!({
        "id": domain.entry.id,
        "pid": facts.map(|facts| facts.pid),
        "uptime_ms": facts.map(|facts| facts.uptime_us() / 1000),
        "api_socket": absolute(&socket).unwrap_or(socket),
        "status": status,
        "config": config,
    });
    print(&format!("{all:#}\n"));
    Ok(())
}
