//! `cofferdam stats`: what a container uses, as its domain's init says.

use cofferdam_api::client::Client;
use serde_json::Value;

use crate::args::StatsArgs;
use crate::control::{Domain, Failure, done};
use crate::say::print;
use crate::table::table;

/// Prints what a container uses.
pub fn stats(args: &StatsArgs) -> u8 {
    done(Domain::find(&args.target).and_then(|domain| print_all(args, &domain)))
}

fn print_all(args: &StatsArgs, domain: &Domain) -> Result<(), Failure> {
    let stats = domain.ask(Client::container_stats)?;
    print(&if args.json { format!("{stats}\n") } else { text_form(&domain.entry.id, &stats) });
    Ok(())
}

fn text_form(id: &str, stats: &Value) -> String {
    let number = |field: &str| stats.get(field).and_then(Value::as_u64);
    let shown = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    let cpu = number("cpu_us").map(|us| format!("{}.{:03}s", us / 1_000_000, us / 1000 % 1000));
    let refused = stats.get("refused").and_then(Value::as_object).map(|refused| {
        let counts: Vec<String> = refused.iter().map(|(name, count)| format!("{count} {name}")).collect();
        counts.join(", ")
    });
    let row = [
        id.to_owned(),
        shown(cpu),
        shown(number("memory_bytes").map(mib)),
        shown(number("memory_total_bytes").map(mib)),
        shown(number("processes").map(|count| count.to_string())),
        shown(refused.filter(|text| !text.is_empty())),
    ];
    let head = ["ID", "CPU TIME", "MEMORY", "OF", "PROCESSES", "REFUSED"];
    table(head, [false, true, true, true, true, false], [row].into_iter())
}

fn mib(bytes: u64) -> String {
    format!("{}.{} MiB", bytes >> 20, ((bytes & 0xF_FFFF) * 10) >> 20)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_table_of_what_is_known() {
        let stats = json!({
            "cpu_us": 1_234_567, "memory_bytes": (20 << 20) + (1 << 19), "memory_total_bytes": 112 << 20, "processes": 3,
            "refused": {"Exec": 1, "Signal": 2},
        });
        let lines = [
            "ID  CPU TIME    MEMORY         OF  PROCESSES  REFUSED",
            "d     1.234s  20.5 MiB  112.0 MiB          3  1 Exec, 2 Signal",
        ];
        assert_eq!(text_form("d", &stats), format!("{}\n", lines.join("\n")));
        assert!(text_form("d", &json!({})).ends_with("-\n"));
    }
}
