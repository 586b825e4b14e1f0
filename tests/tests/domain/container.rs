//! Containers, each in a domain of its own.

use cofferdam_container_manifest::digest;
use cofferdam_tests::container::Container;

#[test]
fn a_container_runs_from_three_layers() {
    let mut container = Container::new("cat /which; echo $0 $X; sha256sum < /large; echo error >&2; exit 7");
    container.manifest.process.env.push("X=1 2".to_owned());
    let ended = container.finish();
    assert_eq!(ended.done.code(), 7, "{ended}");
    let text = ended.text();
    assert!(text.starts_with("highest\nsh 1 2\n"), "{ended}");
    assert!(
        String::from_utf8_lossy(&ended.stderr).ends_with("No such file or directory\nerror\n"),
        "{ended}"
    );
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
