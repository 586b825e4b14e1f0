//! Linux domains that are driven with nothing but curl, by `tests/curl/domain.sh`.

use std::process::Command;

use cofferdam_api::config::DEFAULT_COMMAND_LINE;
use cofferdam_tests::{Guest, place};

fn drive(mode: &str) {
    let guest = Guest::new();
    let output = Command::new(place::root().join("tests/curl/domain.sh"))
        .arg(mode)
        .arg(place::monitor().parent().unwrap())
        .arg(&guest.assets().guest_kernel)
        .arg(guest.file("initrd"))
        .arg(format!("{DEFAULT_COMMAND_LINE} quiet test=button"))
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{}\n{stdout}\n{stderr}", output.status);
    assert!(
        stdout.ends_with(&format!("two domains ({mode}) were driven to their ends\n")),
        "{stdout}\n{stderr}"
    );
}

#[test]
fn curl_drives_plain_domains() {
    drive("plain");
}

#[test]
fn curl_drives_jailed_domains() {
    drive("jailed");
}
