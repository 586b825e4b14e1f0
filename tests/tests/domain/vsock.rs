//! vsock: streams in both directions, begun by either side.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use cofferdam_api::status::ExitReason;
use cofferdam_test_guest as stream;
use cofferdam_tests::Guest;
use cofferdam_tests::host::raise_descriptor_limit;

const MIB: u64 = 1 << 20;

/// Connects to `port` of the guest as a program of the host does, once the guest listens.
fn connect(socket: &Path, port: u32) -> UnixStream {
    let end = Instant::now() + Duration::from_secs(240);
    loop {
        let mut connection = UnixStream::connect(socket).unwrap();
        writeln!(connection, "CONNECT {port}").unwrap();
        let mut answer = String::new();
        // Byte by byte: what follows the line is the stream.
        let mut reader = BufReader::with_capacity(1, &connection);
        if reader.read_line(&mut answer).is_ok_and(|length| length > 0) {
            assert!(answer.starts_with("OK "), "{answer:?}");
            return connection;
        }
        assert!(Instant::now() < end, "the guest does not listen on {port}");
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn streams_pass_uncorrupted_in_both_directions() {
    streams(256 * MIB);
}

#[test]
#[ignore = "long: make test-all"]
fn a_gib_passes_uncorrupted_in_each_direction() {
    streams(1024 * MIB);
}

#[test]
#[ignore = "long: make test-all"]
fn a_thousand_connections_at_once_and_one_after_another() {
    raise_descriptor_limit();
    let guest = Guest::new();
    let listener = UnixListener::bind(guest.file("v_5000")).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
        }
    });
    let done = guest.run_with("storm", 1000).with("vsock", guest.file("v")).finish();
    assert_eq!(done.code(), 0, "{done}");
    assert!(done.console().contains("1000 connections at once and 1000 one after another"), "{done}");
}

/// `bytes` to the guest, as many from it, and some MiB there and back.
fn streams(bytes: u64) {
    let guest = Guest::new();
    let socket = guest.file("v");
    let listener = UnixListener::bind(guest.file("v_5000")).unwrap();
    let running = guest.run_with("vsock", bytes).with("vsock", &socket).start();

    let to_guest = listener.accept().unwrap().0;
    stream::write(&to_guest, bytes, 11).unwrap();
    to_guest.shutdown(Shutdown::Write).unwrap();
    assert_eq!((&to_guest).read(&mut [0]).unwrap(), 0, "the guest closes when it has checked all");

    let from_guest = listener.accept().unwrap().0;
    stream::check(&from_guest, bytes, 12).unwrap();
    drop(from_guest);

    running.wait_for("listening on 5001");
    let echo = connect(&socket, 5001);
    let sender = thread::spawn({
        let echo = echo.try_clone().unwrap();
        move || {
            stream::write(&echo, 4 * MIB, 13).unwrap();
            echo.shutdown(Shutdown::Write).unwrap();
        }
    });
    stream::check(&echo, 4 * MIB, 13).unwrap();
    sender.join().unwrap();
    drop(echo);

    let done = running.finish();
    assert_eq!(done.outcome().exit_reason, ExitReason::PowerOff, "{done}");
    assert_eq!(done.code(), 0, "{done}");
    assert_eq!(guest.files(), ["v_5000"], "only the test's own socket is left");
}
