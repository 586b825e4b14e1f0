use serde_json::{Value, json};

use super::*;
use crate::observe::LogLevel;
use crate::openapi::DOCUMENT;

const CONFIG: &str = r#"{"boot-source": {"kernel_image_path": "k"}}"#;

fn ask(request: &str, body: &str) -> Result<Call, RouteError> {
    let (method, target) = request.split_once(' ').unwrap();
    let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
    route(method, path, query, body.as_bytes())
}

fn action(request: &str, body: &str) -> VmmAction {
    match ask(request, body) {
        Ok(Call::Act(action)) => action,
        other => panic!("{request} {body}: {other:?}"),
    }
}

fn refusal(request: &str, body: &str) -> String {
    ask(request, body).unwrap_err().to_string()
}

#[test]
fn requests_are_actions() {
    let config = Box::new(DomainConfig::from_json(CONFIG.as_bytes()).unwrap());
    let table = [
        ("GET /", "", VmmAction::GetInstance),
        ("GET /version", "", VmmAction::GetVersion),
        ("GET /vm", "", VmmAction::GetStatus),
        ("GET /vm/config", "", VmmAction::GetConfig),
        ("GET /machine-config", "", VmmAction::GetMachine),
        ("GET /host", "", VmmAction::GetHost),
        ("PUT /actions", r#"{"action_type": "InstanceStart"}"#, VmmAction::Start),
        ("PUT /actions", r#"{"action_type": "SendCtrlAltDel"}"#, VmmAction::PressPowerButton),
        ("PUT /actions", r#"{"action_type": "FlushMetrics"}"#, VmmAction::FlushMetrics),
        ("GET /metrics", "", VmmAction::GetMetrics),
        (
            "PUT /metrics",
            r#"{"metrics_path": "m"}"#,
            VmmAction::PutMetrics(MetricsConfig { metrics_path: "m".into() }),
        ),
        (
            "PUT /logger",
            r#"{"level": "DEBUG", "show_level": true}"#,
            VmmAction::PutLogger(LoggerConfig {
                level: Some(LogLevel::Debug),
                show_level: Some(true),
                ..LoggerConfig::default()
            }),
        ),
        ("PATCH /vm", r#"{"state": "Paused"}"#, VmmAction::Pause),
        ("PATCH /vm", r#"{"state": "Resumed"}"#, VmmAction::Resume),
        ("PUT /vm", CONFIG, VmmAction::PutConfig(config.clone())),
        ("PUT /vm?start=false", CONFIG, VmmAction::PutConfig(config.clone())),
        ("PUT /vm?start=true", CONFIG, VmmAction::StartWith(config)),
        ("DELETE /vm", "", VmmAction::Stop(None)),
        ("DELETE /vm?timeout_ms=0", "", VmmAction::Stop(Some(Duration::ZERO))),
        (
            "PUT /machine-config",
            r#"{"vcpu_count": 2, "mem_size_mib": 64, "smt": false, "track_dirty_pages": false}"#,
            VmmAction::PutMachine(MachineConfig { vcpu_count: 2, mem_size_mib: 64 }),
        ),
        (
            "PATCH /machine-config",
            r#"{"vcpu_count": 2}"#,
            VmmAction::PatchMachine(MachinePatch { vcpu_count: Some(2), mem_size_mib: None }),
        ),
        (
            "PUT /vsock",
            r#"{"guest_cid": 3, "uds_path": "v"}"#,
            VmmAction::PutVsock(Vsock { guest_cid: 3, uds_path: "v".into() }),
        ),
    ];
    for (request, body, expected) in table {
        assert_eq!(action(request, body), expected, "{request}");
    }
    assert_eq!(ask("GET /openapi.json", ""), Ok(Call::Document));
    let container = |call| Ok(Call::Container(call));
    assert_eq!(ask("GET /container/stats", ""), container(ContainerCall::Stats));
    let kill = Kill { id: None, signal: "TERM".to_owned() };
    assert_eq!(ask("POST /container/kill", r#"{"signal": "TERM"}"#), container(ContainerCall::Kill(kill)));
    let resize = Resize { id: Some("x".to_owned()), columns: 1, rows: 2 };
    assert_eq!(
        ask("POST /container/resize", r#"{"id": "x", "columns": 1, "rows": 2}"#),
        container(ContainerCall::Resize(resize))
    );
    let exec = Exec {
        id: None,
        args: vec!["a".to_owned()],
        terminal: false,
        columns: 0,
        rows: 0,
        stdin_port: 0,
        stdout_port: 1,
        stderr_port: 0,
    };
    assert_eq!(
        ask("POST /container/exec?timeout_ms=5", r#"{"args": ["a"], "stdout_port": 1}"#),
        container(ContainerCall::Exec(exec, Some(Duration::from_millis(5))))
    );
    let wait = |time| container(ContainerCall::Wait("x-1".to_owned(), time));
    assert_eq!(ask("GET /container/exec/x-1", ""), wait(None));
    assert_eq!(ask("GET /container/exec/x-1?timeout_ms=0", ""), wait(Some(Duration::ZERO)));
    assert!(ask("GET /container/exec/x.1", "").is_err());
    assert_eq!(ask("GET /vm/wait", ""), Ok(Call::Wait(None)));
    assert_eq!(ask("GET /vm/wait?timeout_ms=20", ""), Ok(Call::Wait(Some(Duration::from_millis(20)))));
}

#[test]
fn drives_are_named_twice_and_alike() {
    let drive = r#"{"drive_id": "root", "path_on_host": "d", "is_root_device": true, "is_read_only": false}"#;
    assert!(matches!(action("PUT /drives/root", drive), VmmAction::PutDrive(drive) if drive.is_root_device));
    assert!(matches!(action("PATCH /drives/root", r#"{"drive_id": "root"}"#), VmmAction::PatchDrive(_)));
    assert_eq!(
        refusal("PUT /drives/other", drive),
        "The id from the path [other] does not match the id from the body [root]!"
    );
    for path in ["PUT /drives", "PUT /drives/", "PUT /drives/a/b"] {
        assert!(refusal(path, drive).starts_with("Invalid request method and/or path"), "{path}");
    }
}

#[test]
fn what_there_is_not_is_refused_with_a_message() {
    assert_eq!(refusal("GET /nothing", ""), "Invalid request method and/or path: GET /nothing.");
    assert_eq!(refusal("POST /vm", CONFIG), "Invalid request method and/or path: POST /vm.");
    assert_eq!(refusal("GET vm", ""), "Invalid request method and/or path: GET vm.");
    for request in [
        "PUT /network-interfaces/eth0",
        "PUT /balloon",
        "GET /balloon/statistics",
        "PUT /mmds/config",
        "PUT /snapshot/create",
        "PUT /pmem/p0",
        "PUT /hotplug/memory",
        "PUT /cpu-config",
        "PUT /entropy",
    ] {
        let message = refusal(request, "{}");
        assert!(message.contains("not supported by this monitor; "), "{request}: {message}");
    }
}

#[test]
fn bad_bodies_name_what_is_wrong() {
    assert_eq!(refusal("PUT /machine-config", ""), "Empty PUT request.");
    assert_eq!(refusal("PATCH /vm", ""), "Empty PATCH request.");
    assert_eq!(refusal("GET /vm", "{}"), "GET request cannot have a body.");
    for body in ["{", "[]", "\u{0}", "nul", "{\"state\": 1}", "{\"state\": \"Stopped\"}"] {
        let message = refusal("PATCH /vm", body);
        assert!(message.starts_with("An error occurred when deserializing the json body"), "{message}");
    }
    let message = refusal("PUT /machine-config", r#"{"vcpu_count": 300, "mem_size_mib": 64}"#);
    assert!(message.contains("machine-config.vcpu_count: 300 is not between 1 and 32"), "{message}");
    let message = refusal("PUT /machine-config", r#"{"vcpu_count": 2, "mem_size_mib": 64, "smt": true}"#);
    assert!(message.contains("machine-config.smt: not supported"), "{message}");
}

#[test]
fn queries_are_those_of_the_path() {
    for request in ["PUT /vm?start=yes", "PUT /vm?begin=true", "PUT /vm?start=true&x=1", "PUT /vm?"] {
        assert!(refusal(request, CONFIG).starts_with("Invalid query: "), "{request}");
    }
    for request in ["GET /vm?a=b", "GET /vm/wait?timeout_ms=-1", "GET /vm/wait?timeout_ms=86400001"] {
        assert!(refusal(request, "").starts_with("Invalid query: "), "{request}");
    }
}

#[test]
fn no_two_routes_are_alike() {
    for (index, route) in ROUTES.iter().enumerate() {
        assert!(
            !ROUTES[..index].iter().any(|other| (other.method, other.path) == (route.method, route.path))
        );
        assert!(!LACKING.iter().any(|(name, _)| route.path[1..].split('/').next() == Some(name)));
    }
}

/// The document, for the walk along it.
fn document() -> Value {
    serde_json::from_str(DOCUMENT).unwrap()
}

#[test]
fn every_path_of_the_document_has_a_route_and_every_route_is_in_it() {
    let document = document();
    let mut documented = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            documented += 1;
            let request =
                format!("{} {}", method.to_uppercase(), path.replace("{drive_id}", "d").replace("{id}", "x"));
            // A body that no route reads: what is there says so, and does not say that it is not there.
            let body = if operation["requestBody"].is_null() { "" } else { r#"{"nonsense": 1}"# };
            match ask(&request, body) {
                Ok(_) => assert_eq!(body, "", "{request} takes anything"),
                Err(RouteError::Json(message)) => {
                    // The body that it reads has the fields of the schema that is documented.
                    let schema = &operation["requestBody"]["content"]["application/json"]["schema"]["$ref"];
                    let name = schema.as_str().unwrap().rsplit('/').next().unwrap();
                    let schema = &document["components"]["schemas"][name];
                    assert_eq!(schema["additionalProperties"], json!(false), "{name}");
                    for field in schema["properties"].as_object().unwrap().keys() {
                        assert!(message.contains(&format!("`{field}`")), "{request}: {field}: {message}");
                    }
                }
                Err(error) => panic!("{request}: {error}"),
            }
        }
    }
    assert_eq!(documented, ROUTES.len());
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]

    #[test]
    fn no_request_is_too_strange_to_be_refused(
        method in "[A-Z]{0,7}|GET|PUT|PATCH|DELETE",
        path in "(/[a-z{}%.]{0,8}){0,3}|/drives/[^/]{0,70}|/vm|/machine-config|.{0,20}",
        query in proptest::option::of("start=.{0,5}|timeout_ms=[0-9]{0,25}|.{0,10}"),
        body in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200),
    ) {
        if let Err(error) = route(&method, &path, query.as_deref(), &body) {
            proptest::prop_assert!(!error.to_string().is_empty());
        }
    }
}
