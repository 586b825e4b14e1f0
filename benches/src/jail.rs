//! The jailer, from its start to the first reply of the monitor in the jail, against `namespaces`, a process that only
//! enters the same namespaces.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::report::{Better, Row, Subject};
use crate::server::{Server, Sockets, now};
use crate::{Result, in_turns, programs, progress};

const FIRST_REPLY: Subject = Subject {
    name: "start of the jailer to first API reply",
    unit: "ms",
    better: Better::Lower,
    goal: Some(4.0),
};

/// Whom the jailed monitor runs as.
const USER: &str = "61234";

/// Runs both `rounds` times in turns.
pub fn run(rounds: usize) -> Result<Vec<Row>> {
    if !rustix::process::geteuid().is_root() {
        return Err("the jailer is measured as root, who alone may enter these namespaces one by one".into());
    }
    progress(format_args!("{rounds} first replies from a jail and visits to namespaces, in turns"));
    let directory = tempfile::tempdir_in("/dev/shm")?;
    let root = directory.path().join("cofferdam-vmm/bench/root");
    // Prepared, so that the socket can be waited for.
    fs::create_dir_all(&root)?;
    let sockets = Sockets::new(&root)?;
    let (ours, theirs) = in_turns(rounds, || jailed_reply(directory.path(), &sockets), namespaces_entered)?;
    Ok(vec![FIRST_REPLY.row(&ours, &theirs, "namespaces")])
}

fn jailed_reply(jails: &Path, sockets: &Sockets) -> Result<f64> {
    let mut command = Command::new(programs::jailer());
    command.args(["--id", "bench", "--uid", USER, "--gid", USER]);
    command.arg("--chroot-base-dir").arg(jails).arg("--exec-file").arg(programs::monitor());
    command.args(["--", "--level", "error", "--api-sock", "/api.sock"]);
    let mut server = Server::start(&mut command, sockets, "api.sock")?;
    server.ask("GET /", "", 200)?;
    let time = server.age();
    server.ask("DELETE /vm", "", 204)?;
    server.finish()?;
    Ok(time)
}

fn namespaces_entered() -> Result<f64> {
    let mut command = Command::new(programs::reference("namespaces"));
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let start = now();
    let mut child = command.spawn()?;
    let mut stdout = child.stdout.take().ok_or("no stdout")?;
    let entered = stdout.read_exact(&mut [0]);
    let time = now() - start;
    let status = child.wait()?;
    entered.map_err(|error| format!("namespaces: {status}: {error}"))?;
    Ok(time)
}
