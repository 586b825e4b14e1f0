use super::*;
use cofferdam_container_manifest::{Layer, RootHash, Salt, StartVariable, decode};

fn image() -> Image {
    Image {
        command: vec!["serve".to_owned()],
        entrypoint: vec!["/bin/app".to_owned()],
        env: vec!["A=1".to_owned()],
        group: "log:x:7:web\n".to_owned(),
        layers: vec![Layer { root_hash: RootHash([1; 32]), salt: Salt(vec![0; 32]), size: 4096 }],
        passwd: "root:x:0:0::/root:\nweb:x:33:34::/srv:\n".to_owned(),
        stop_signal: None,
        user: String::new(),
        version: 1,
        working_dir: String::new(),
    }
}

/// The manifest that `container build` writes.
fn stored() -> Manifest {
    image().manifest(&[], None).unwrap()
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

fn variable(name: &str, value: &str) -> (String, String) {
    (name.to_owned(), value.to_owned())
}

fn derived(changes: &Changes) -> Manifest {
    let bound = derive(stored(), Some(&image()), changes, false).unwrap();
    assert_eq!(decode(&bound.bytes).unwrap(), bound.manifest);
    assert_eq!(digest(&bound.bytes), bound.digest);
    bound.manifest
}

fn refused(base: Manifest, image: Option<&Image>, changes: &Changes, exact: bool) -> String {
    derive(base, image, changes, exact).unwrap_err().to_string()
}

/// Each option, the field that it changes, and the manifest that says what it says.
fn every_option() -> Vec<(Changes, &'static str, &'static str, Manifest)> {
    let with = |change: fn(&mut Manifest)| {
        let mut manifest = stored();
        change(&mut manifest);
        manifest
    };
    let none = Changes::default;
    vec![
        (
            Changes { command: words("stop now"), ..none() },
            "COMMAND",
            "process.args",
            with(|manifest| manifest.process.args = words("/bin/app stop now")),
        ),
        (
            Changes { env: vec![variable("A", "2"), variable("B", "x=y")], ..none() },
            "--env",
            "process.env",
            with(|manifest| {
                manifest.process.env[1] = "A=2".to_owned();
                manifest.process.env.push("B=x=y".to_owned());
            }),
        ),
        (
            Changes { user: Some("web".to_owned()), ..none() },
            "--user",
            "process.uid",
            with(|manifest| {
                (manifest.process.uid, manifest.process.gid) = (33, 34);
                manifest.process.groups = vec![7];
                *manifest.process.env.last_mut().unwrap() = "HOME=/srv".to_owned();
            }),
        ),
        (
            Changes { user: Some("0:9".to_owned()), ..none() },
            "--user",
            "process.gid",
            with(|manifest| manifest.process.gid = 9),
        ),
        (
            Changes { scratch: Some(1 << 20), ..none() },
            "--scratch",
            "scratch",
            with(|manifest| {
                manifest.scratch = Some(Scratch { protection: Protection::Authenticated, size: 1 << 20 });
            }),
        ),
        (
            Changes { read_only: true, ..none() },
            "--read-only",
            "process.read_only_root",
            with(|manifest| manifest.process.read_only_root = true),
        ),
        (
            Changes { terminal: true, ..none() },
            "--tty",
            "process.terminal",
            with(|manifest| {
                manifest.process.terminal = true;
                manifest.process.env.push("TERM=xterm".to_owned());
                manifest.host.stdin = true;
                manifest.host.signals = vec![Signal::Int, Signal::Term, Signal::Winch];
            }),
        ),
        (
            Changes { stdin: true, ..none() },
            "--interactive",
            "host.stdin",
            with(|manifest| manifest.host.stdin = true),
        ),
        (
            Changes { exec: vec![words("ls /"), words("ls /")], ..none() },
            "--allow-exec",
            "host.exec",
            with(|manifest| manifest.host.exec = vec![words("ls /")]),
        ),
        (
            Changes { signals: vec![Signal::Usr1, Signal::Hup, Signal::Term], ..none() },
            "--allow-signal",
            "host.signals",
            with(|manifest| {
                manifest.host.signals = vec![Signal::Hup, Signal::Int, Signal::Term, Signal::Usr1];
            }),
        ),
    ]
}

#[test]
fn without_changes_the_manifest_is_the_stored_one() {
    assert_eq!(derived(&Changes::default()), stored());
}

#[test]
fn each_option_changes_what_it_says_and_nothing_else() {
    for (changes, option, _, expected) in every_option() {
        assert_eq!(derived(&changes), expected, "{option}");
    }
}

#[test]
fn an_exact_manifest_is_contradicted_by_name_or_agreed_with() {
    for (changes, option, field, expected) in every_option() {
        let message =
            format!("{option}: the manifest says otherwise ({field}), and --manifest uses it as it is");
        assert_eq!(refused(stored(), Some(&image()), &changes, true), message);
        let agreed = derive(expected.clone(), Some(&image()), &changes, true).unwrap();
        assert_eq!(agreed.manifest, expected, "{option}");
    }
    let mut terminal = stored();
    terminal.process.terminal = true;
    let tty = Changes { terminal: true, ..Changes::default() };
    assert_eq!(
        derive(terminal.clone(), None, &tty, true).unwrap().manifest,
        terminal,
        "and nothing is added"
    );
}

#[test]
fn a_scratch_device_keeps_its_protection() {
    let mut base = stored();
    base.scratch = Some(Scratch { protection: Protection::Encrypted, size: 4096 });
    let changes = Changes { scratch: Some(8192), ..Changes::default() };
    let scratch = derive(base, None, &changes, false).unwrap().manifest.scratch;
    assert_eq!(scratch, Some(Scratch { protection: Protection::Encrypted, size: 8192 }));
}

#[test]
fn variables_of_a_start_are_no_change() {
    let mut base = stored();
    base.process.start_env = vec![StartVariable { name: "ID".to_owned(), pattern: "[0-9]+".to_owned() }];
    let given = |value: &str| Changes { env: vec![variable("ID", value)], ..Changes::default() };
    for exact in [false, true] {
        let bound = derive(base.clone(), None, &given("12"), exact).unwrap();
        assert_eq!((&bound.manifest, bound.start), (&base, vec![variable("ID", "12")]));
        let message = refused(base.clone(), None, &given("x"), exact);
        assert_eq!(message, "--env: the value of \"ID\" does not match \"[0-9]+\" (process.start_env)");
        let twice = Changes { env: vec![variable("ID", "1"), variable("ID", "2")], ..Changes::default() };
        assert_eq!(refused(base.clone(), None, &twice, exact), "--env: two values for the variable \"ID\"");
    }
    let other = Changes { env: vec![variable("OTHER", "1")], ..Changes::default() };
    assert!(refused(base, None, &other, true).starts_with("--env: the manifest says otherwise"));
}

#[test]
fn the_last_value_of_a_variable_counts() {
    let env = vec![variable("B", "1"), variable("B", "2")];
    let env = derived(&Changes { env, ..Changes::default() }).process.env;
    assert_eq!(env.last().unwrap(), "B=2");
    assert_eq!(env.iter().filter(|entry| entry.starts_with("B=")).count(), 1);
}

#[test]
fn an_option_or_the_image_says_more_of_home_than_the_users_entry() {
    let home = |image: &Image, env: &[(String, String)]| {
        let changes = Changes { env: env.to_vec(), user: Some("web".to_owned()), ..Changes::default() };
        let env = derive(image.manifest(&[], None).unwrap(), Some(image), &changes, false)
            .unwrap()
            .manifest
            .process
            .env;
        let found: Vec<String> = env.into_iter().filter(|entry| entry.starts_with("HOME=")).collect();
        found
    };
    assert_eq!(home(&image(), &[]), ["HOME=/srv"]);
    assert_eq!(home(&image(), &[variable("HOME", "/tmp")]), ["HOME=/tmp"]);
    let own = Image { env: vec!["HOME=/app".to_owned()], ..image() };
    assert_eq!(home(&own, &[]), ["HOME=/app"]);
    // Without an image nobody knows.
    let changes = Changes { user: Some("33".to_owned()), ..Changes::default() };
    let bound = derive(stored(), None, &changes, false).unwrap();
    assert!(bound.manifest.process.env.contains(&"HOME=/root".to_owned()));
}

#[test]
fn what_only_the_image_knows_needs_it() {
    let user = |user: &str| Changes { user: Some(user.to_owned()), ..Changes::default() };
    for changes in [user("web"), user("33:log"), Changes { command: words("a"), ..Changes::default() }] {
        assert!(refused(stored(), None, &changes, false).contains("has no image.json"));
    }
    let process = derive(stored(), None, &user("33:7"), false).unwrap().manifest.process;
    assert_eq!((process.uid, process.gid, process.groups), (33, 7, vec![]));
    let process = derive(stored(), None, &user("33"), false).unwrap().manifest.process;
    assert_eq!((process.uid, process.gid), (33, 0));
    assert_eq!(
        refused(stored(), Some(&image()), &user("nobody"), false),
        "--user: the image has no user \"nobody\" in /etc/passwd"
    );
}

#[test]
fn what_no_manifest_can_say_names_the_option() {
    let none = Changes::default;
    for (changes, message) in [
        (Changes { scratch: Some(4097), ..none() }, "--scratch: scratch.size: 4097 is not a size"),
        (
            Changes { command: vec!["a\0".to_owned()], ..none() },
            "COMMAND: process.args[1]: it has a zero byte",
        ),
        (Changes { env: vec![variable("A", "\0")], ..none() }, "--env: process.env[1]: it has a zero byte"),
        (
            Changes { user: Some("4294967295".to_owned()), ..none() },
            "--user: process.uid: 4294967295 is no user",
        ),
        (Changes { exec: vec![words("a\0")], ..none() }, "--allow-exec: host.exec[0][0]: it has a zero byte"),
    ] {
        let found = refused(stored(), Some(&image()), &changes, false);
        assert!(found.starts_with(message), "{found}");
    }
}
