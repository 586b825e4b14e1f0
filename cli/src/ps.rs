//! `cofferdam ps`: the domains that run.

use std::thread;
use std::time::Duration;

use cofferdam_api::client::{Client, ClientError};
use cofferdam_api::config::MachineConfig;
use cofferdam_api::status::{ContainerStatus, VmStatus};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};

use crate::args::PsArgs;
use crate::control::{Failure, state_name};
use crate::run_dir::{Entry, Facts, RunDir};
use crate::say::{platform_name, print, protection};
use crate::table::table;

/// How long one monitor may take.
const ANSWER: Duration = Duration::from_secs(2);
/// Monitors that are asked at a time.
const AT_ONCE: usize = 16;

/// A domain, as it is listed.
struct Row {
    id: String,
    facts: Option<Facts>,
    /// What its monitor says; nothing if it does not answer.
    answer: Option<(VmStatus, MachineConfig)>,
}

/// Lists the domains.
pub fn ps(args: &PsArgs) -> u8 {
    match rows(args) {
        Ok(rows) if args.json => print(&format!("{}\n", json_form(&rows))),
        Ok(rows) => print(&text_form(&rows)),
        Err(failure) => return failure.report(),
    }
    0
}

fn rows(args: &PsArgs) -> Result<Vec<Row>, Failure> {
    let Some(run_dir) = RunDir::open(&args.place.path())? else { return Ok(Vec::new()) };
    // Each domain takes a descriptor.
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    let mut rows = Vec::new();
    for entries in run_dir.live()?.chunks(AT_ONCE) {
        rows.extend(thread::scope(|scope| {
            let asked: Vec<_> = entries.iter().map(|entry| scope.spawn(|| row(entry))).collect();
            // A thread that panicked has said so.
            asked.into_iter().filter_map(|thread| thread.join().ok().flatten()).collect::<Vec<Row>>()
        }));
    }
    Ok(rows)
}

/// What is to be said of a domain; nothing if it has just ended.
fn row(entry: &Entry) -> Option<Row> {
    let client = Client::new(&entry.socket(), ANSWER);
    let answer = match ask(&client) {
        Ok(answer) => Some(answer),
        Err(error) if error.is_gone() => return None,
        Err(_) => None,
    };
    Some(Row { id: entry.id.clone(), facts: entry.facts(), answer })
}

fn ask(client: &Client) -> Result<(VmStatus, MachineConfig), ClientError> {
    Ok((client.status()?, client.machine()?))
}

fn json_form(rows: &[Row]) -> Value {
    let object = |row: &Row| {
        let status = row.answer.as_ref().map(|(status, _)| status);
        let machine = row.answer.as_ref().map(|(_, machine)| machine);
        json!({
            "id": row.id,
            "state": status.map(|status| status.state),
            "platform": status.and_then(|status| status.platform),
            "protected": status.is_some_and(|status| status.protected),
            "pid": row.facts.map(|facts| facts.pid),
            "uptime_ms": row.facts.map(|facts| facts.uptime_us() / 1000),
            "vcpu_count": machine.map(|machine| machine.vcpu_count),
            "mem_size_mib": machine.map(|machine| machine.mem_size_mib),
            "container": status.and_then(|status| status.container.as_ref()),
        })
    };
    rows.iter().map(object).collect()
}

const COLUMNS: usize = 9;
const HEAD: [&str; COLUMNS] =
    ["ID", "STATE", "PLATFORM", "PROTECTION", "PID", "UPTIME", "VCPUS", "MEMORY", "CONTAINER"];
/// The columns of numbers stand at the right.
const RIGHT: [bool; COLUMNS] = [false, false, false, false, true, true, true, true, false];
/// So many digits of a manifest's digest tell containers apart.
const DIGEST: usize = 12;

fn text_form(rows: &[Row]) -> String {
    table(HEAD, RIGHT, rows.iter().map(cells))
}

fn cells(row: &Row) -> [String; COLUMNS] {
    let unknown = || "-".to_owned();
    let pid = row.facts.map_or_else(unknown, |facts| facts.pid.to_string());
    let uptime = row.facts.map_or_else(unknown, |facts| duration(facts.uptime_us() / 1_000_000));
    let Some((status, machine)) = &row.answer else {
        let [state, protection] = ["no answer", protection(false)].map(str::to_owned);
        return [row.id.clone(), state, unknown(), protection, pid, uptime, unknown(), unknown(), unknown()];
    };
    [
        row.id.clone(),
        state_name(status.state).to_owned(),
        status.platform.map_or_else(unknown, |platform| platform_name(platform).to_owned()),
        protection(status.protected).to_owned(),
        pid,
        uptime,
        machine.vcpu_count.to_string(),
        memory(machine.mem_size_mib),
        status.container.as_ref().map_or_else(unknown, |container| container_cell(container)),
    ]
}

/// The step that a container is in, and the first digits of its manifest's digest.
fn container_cell(status: &ContainerStatus) -> String {
    let digits: String = status.manifest_digest.chars().take(DIGEST).collect();
    format!("{} {digits}", status.step.as_deref().unwrap_or("starting"))
}

/// Seconds as people read them: the two largest units.
fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m{:02}s", seconds % 60),
        3600..86_400 => format!("{hours}h{:02}m", minutes % 60),
        _ => format!("{days}d{:02}h", hours % 24),
    }
}

fn memory(mib: u64) -> String {
    if mib.is_multiple_of(1024) { format!("{} GiB", mib / 1024) } else { format!("{mib} MiB") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cofferdam_api::status::{Phases, Platform, VmState};

    fn row(id: &str, state: Option<VmState>) -> Row {
        let status = |state| VmStatus {
            id: id.to_owned(),
            state,
            platform: Some(Platform::Plain),
            protected: false,
            identity: Default::default(),
            container: None,
            exit_reason: None,
            exit_code: None,
            message: None,
            phases: Phases::new(),
        };
        let answer = state.map(|state| (status(state), MachineConfig { vcpu_count: 32, mem_size_mib: 2048 }));
        Row { id: id.to_owned(), facts: None, answer }
    }

    #[test]
    fn the_table_is_aligned() {
        let mut rows =
            [row("a", Some(VmState::Running)), row("a-longer-name", None), row("b", Some(VmState::Paused))];
        rows[0].answer.as_mut().unwrap().0.container = Some(Box::new(ContainerStatus {
            manifest_digest: "0123456789abcdef".to_owned(),
            asserted_by_host: true,
            step: Some("running".to_owned()),
            failure: None,
        }));
        let lines = [
            "ID             STATE      PLATFORM  PROTECTION     PID  UPTIME  VCPUS  MEMORY  CONTAINER",
            "a              running    plain     not protected    -       -     32   2 GiB  running 0123456789ab",
            "a-longer-name  no answer  -         not protected    -       -      -       -  -",
            "b              paused     plain     not protected    -       -     32   2 GiB  -",
        ];
        assert_eq!(text_form(&rows), format!("{}\n", lines.join("\n")));
        assert_eq!(text_form(&[]).lines().count(), 1);
    }

    #[test]
    fn json_has_every_field_for_every_domain() {
        let json = json_form(&[row("a", Some(VmState::Paused)), row("b", None)]);
        assert_eq!((&json[0]["state"], &json[0]["mem_size_mib"]), (&json!("Paused"), &json!(2048)));
        assert_eq!((&json[1]["state"], &json[1]["protected"]), (&Value::Null, &json!(false)));
        for object in json.as_array().unwrap() {
            assert_eq!(object.as_object().unwrap().len(), 9);
        }
    }

    #[test]
    fn durations_and_sizes() {
        for (seconds, text) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m00s"),
            (3599, "59m59s"),
            (3600, "1h00m"),
            (86_399, "23h59m"),
            (86_400, "1d00h"),
            (90_000_000, "1041d16h"),
        ] {
            assert_eq!(duration(seconds), text);
        }
        assert_eq!((memory(512), memory(65_536)), ("512 MiB".to_owned(), "64 GiB".to_owned()));
    }
}
