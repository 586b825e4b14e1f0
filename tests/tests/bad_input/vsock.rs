//! The vsock device's socket.

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use cofferdam_tests::{Run, place};
use rustix::process::Signal;

use crate::table::{Table, hello};

const FIELD: &str = "vsock.uds_path: socket ";

#[test]
fn paths_where_no_socket_can_be() {
    let mut table = Table::new();
    let taken = "a file that is no socket is there";
    for (path, reason) in [
        (table.file("file", b"content"), taken),
        (table.directory("directory"), taken),
        (table.path("missing/v.sock"), "cannot be made: No such file or directory"),
        (table.path("file/v.sock"), "cannot be made: Not a directory"),
    ] {
        let named = format!("{FIELD}{}: {reason}", path.display());
        table.refuses(&named, hello().with("vsock", &path), &[&named]);
    }
    assert_eq!(fs::read(table.path("file")).unwrap(), b"content");
    let long = "v".repeat(97);
    table.refuses(
        "97 bytes",
        hello().with("vsock", &long),
        &["--vsock: 97 bytes long; at most 96 are possible"],
    );
    for cid in ["0", "2", "4294967295"] {
        let run = hello().with("vsock", table.path("v.sock")).with("guest-cid", cid);
        let message = format!("--guest-cid: {cid} is not between 3 and 4294967294");
        table.refuses(&message, run, &[&message]);
    }
    table.refuses("a cid alone", hello().with("guest-cid", "4"), &["--vsock"]);
    table.end();
}

#[test]
fn a_socket_that_somebody_listens_on() {
    let mut table = Table::new();
    let path = table.path("v.sock");
    let named = format!("{FIELD}{}: another domain or program listens on it", path.display());
    let first = Run::new(place::payload("spin")).with("vsock", &path).with("stop-timeout", "0s").start();
    first.wait_for_message("not protected");
    table.refuses("another domain", hello().with("vsock", &path), &[&named]);
    UnixStream::connect(&path).expect("the first domain still has its socket");
    first.signal(Signal::TERM);
    assert_eq!(first.finish().code(), 143);

    let listener = UnixListener::bind(&path).unwrap();
    table.refuses("another program", hello().with("vsock", &path), &[&named]);
    drop(listener);
    // A child that another test is just starting may have it for a moment, until it becomes its program.
    let end = Instant::now() + Duration::from_secs(240);
    while UnixStream::connect(&path).is_ok() {
        assert!(Instant::now() < end, "somebody listens");
        thread::sleep(Duration::from_millis(1));
    }
    table.accepts("left behind by one that was killed", hello().with("vsock", &path), 42);
    assert!(!path.exists());
    table.end();
}
