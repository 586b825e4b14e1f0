//! Programs of the host and a driver that keeps the rules.

use std::hash::{DefaultHasher, Hasher};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use cofferdam_metrics::Counter;

use super::driver::{Driver, GUEST_CID, LONGEST, Socket, op};
use crate::virtio::VirtioDevice;
use crate::virtio::vsock::connection::PATIENCE;
use crate::virtio::vsock::device::{Vsock, VsockError};
use crate::virtio::vsock::host::{BindError, Host, UnixHost, bind};
use crate::virtio::vsock::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// A buffer like those of Linux.
const BUFFER: u32 = 4096;

/// A connection that the guest opened to a listening program, and the program's end of it.
fn connected(driver: &mut Driver, guest: u32) -> (Socket, UnixStream) {
    let listener = driver.listen(guest + 10_000);
    let mut socket = Socket::new(guest, guest + 10_000);
    assert!(socket.connect(driver));
    let stream = listener.accept().unwrap().0;
    stream.set_read_timeout(Some(LONGEST)).unwrap();
    (socket, stream)
}

#[test]
fn the_guest_connects_to_a_program() {
    let mut driver = Driver::new(BUFFER);
    let (mut socket, mut program) = connected(&mut driver, 1000);
    socket.send(&mut driver, b"ping");
    let mut data = [0; 4];
    program.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"ping");
    program.write_all(b"pong").unwrap();
    let (header, payload) = driver.wait_one();
    assert_eq!((op(&header), &payload[..]), (Op::ReadWrite, &b"pong"[..]));
    socket.shut_down(&mut driver, SHUTDOWN_BOTH);
    assert_eq!(op(&driver.wait_one().0), Op::Reset);
    assert_eq!(program.read(&mut data).unwrap(), 0);
    assert_eq!(driver.device.muxer.counts(), (0, 0, 0, 0));
    assert_eq!(driver.device.muxer.reserved(), 0);
}

#[test]
fn packets_bytes_and_connections_are_counted() {
    let mut driver = Driver::new(BUFFER);
    let metrics = driver.device.metrics();
    let (mut socket, mut program) = connected(&mut driver, 1000);
    socket.send(&mut driver, b"ping");
    program.write_all(b"pongs").unwrap();
    assert_eq!(driver.wait_one().1, b"pongs");
    let of = |counter: &Counter| counter.total();
    assert_eq!((of(&metrics.tx_bytes_count), of(&metrics.rx_bytes_count)), (4, 5));
    // Request and data; response and data.
    assert_eq!((of(&metrics.tx_packets_count), of(&metrics.rx_packets_count)), (2, 2));
    assert_eq!((of(&metrics.conns_added), of(&metrics.conns_removed)), (1, 0));
    assert!(!Socket::new(1001, 80).connect(&mut driver), "no such socket");
    assert_eq!((of(&metrics.connect_fails), of(&metrics.refused_packets_count)), (1, 1));
    socket.shut_down(&mut driver, SHUTDOWN_BOTH);
    assert_eq!(op(&driver.wait_one().0), Op::Reset);
    assert_eq!((of(&metrics.conns_added), of(&metrics.conns_removed)), (1, 1));
    let _connected = connected(&mut driver, 1002);
    driver.device.reset();
    assert_eq!((of(&metrics.conns_added), of(&metrics.conns_removed)), (2, 2));
    assert_eq!((of(&metrics.tx_queue_event_fails), of(&metrics.rx_queue_event_fails)), (0, 0));
}

#[test]
fn the_guest_is_refused_where_nobody_listens() {
    let mut driver = Driver::new(BUFFER);
    assert!(!Socket::new(1000, 80).connect(&mut driver), "no such socket");
    drop(driver.listen(80));
    assert!(!Socket::new(1000, 80).connect(&mut driver), "left behind");
    let _listener = driver.listen(81);
    assert!(Socket::new(1000, 81).connect(&mut driver));
}

#[test]
fn a_program_connects_to_the_guest() {
    let mut driver = Driver::new(BUFFER);
    let mut program = driver.connect();
    program.write_all(b"CONNECT 52\nearly").unwrap();
    let (header, _) = driver.wait_one();
    assert_eq!((op(&header), header.src_port, header.dst_port), (Op::Request, 1 << 30, 52));
    assert!(header.buf_alloc >= 8192);
    let mut socket = Socket::new(52, 1 << 30);
    driver.send(&socket.header(Op::Response), b"");
    let (header, payload) = driver.wait_one();
    assert_eq!((op(&header), &payload[..]), (Op::ReadWrite, &b"early"[..]));
    socket.take(&header);
    socket.send(&mut driver, b"late");
    let mut data = [0; 18];
    program.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"OK 1073741824\nlate");
    drop(program);
    let (header, _) = driver.wait_one();
    assert_eq!((op(&header), header.flags), (Op::Shutdown, SHUTDOWN_BOTH));
    driver.send(&socket.header(Op::Reset), b"");
    assert_eq!(driver.device.muxer.counts(), (0, 0, 0, 0));
    // The next one has a port of its own.
    let mut program = driver.connect();
    program.write_all(b"CONNECT 52\n").unwrap();
    assert_eq!(driver.wait_one().0.src_port, (1 << 30) + 1);
}

#[test]
fn a_program_is_refused_by_the_guest() {
    let mut driver = Driver::new(BUFFER);
    let mut program = driver.connect();
    program.write_all(b"CONNECT 52\n").unwrap();
    assert_eq!(op(&driver.wait_one().0), Op::Request);
    driver.send(&Socket::new(52, 1 << 30).header(Op::Reset), b"");
    assert_eq!(program.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn the_line_may_come_in_pieces_and_must_be_one() {
    let mut driver = Driver::new(BUFFER);
    let mut program = driver.connect();
    for piece in ["CON", "NECT", " 5", "2"] {
        program.write_all(piece.as_bytes()).unwrap();
        assert!(driver.is_quiet(), "{piece}");
    }
    program.write_all(b"\n").unwrap();
    assert_eq!(driver.wait_one().0.dst_port, 52);
    for bad in [&b"CONNECT x\n"[..], &[b'C'; 100]] {
        let mut program = driver.connect();
        program.write_all(bad).unwrap();
        assert!(driver.is_quiet());
        let end = program.read(&mut [0; 1]);
        assert!(matches!(&end, Ok(0)) || end.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset));
    }
    assert_eq!(driver.device.muxer.counts(), (1, 0, 0, 0));
}

/// Bytes that do not repeat soon.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

/// Moves `total` bytes in each direction at once: the program returns what it receives.
fn transfer(buffer_len: u32, buf_alloc: u32, packet: usize, total: usize) {
    let mut driver = Driver::new(buffer_len);
    let (mut socket, program) = connected(&mut driver, 1000);
    socket.buf_alloc = buf_alloc;
    driver.send(&socket.header(Op::CreditUpdate), b"");
    let (mut reader, mut writer) = (program.try_clone().unwrap(), program);
    let echo = thread::spawn(move || std::io::copy(&mut reader, &mut writer).unwrap());
    let data = noise(total);
    let (mut sent, mut back, mut told) = (0, Vec::with_capacity(total), 0);
    while back.len() < total {
        let count = packet.min(total - sent).min(socket.credit() as usize);
        if count > 0 {
            socket.send(&mut driver, &data[sent..sent + count]);
            sent += count;
        }
        driver.turn(Duration::from_millis(if count > 0 { 0 } else { 50 }));
        for (header, payload) in driver.received() {
            socket.take(&header);
            back.extend(payload);
            assert!(
                matches!(op(&header), Op::ReadWrite | Op::CreditUpdate | Op::CreditRequest),
                "{header:?}"
            );
        }
        assert!(socket.fwd_cnt - told <= buf_alloc, "beyond the guest's credit");
        if socket.fwd_cnt != told {
            told = socket.fwd_cnt;
            driver.send(&socket.header(Op::CreditUpdate), b"");
        }
    }
    assert_eq!(hash(&back), hash(&data));
    socket.shut_down(&mut driver, SHUTDOWN_BOTH);
    assert_eq!(echo.join().unwrap(), total as u64);
}

#[test]
fn megabytes_pass_both_ways_with_large_buffers() {
    transfer(0x1_0000 + 44, 1 << 18, 0x1_0000, 16 << 20);
}

#[test]
fn megabytes_pass_both_ways_with_buffers_of_linux() {
    transfer(BUFFER, 1 << 18, 0x1_0000, 8 << 20);
}

#[test]
fn megabytes_pass_both_ways_with_a_small_window() {
    transfer(BUFFER, 5000, 3000, 4 << 20);
}

#[test]
fn the_guest_ends_its_direction_and_hears_the_answer() {
    let mut driver = Driver::new(BUFFER);
    let (mut socket, mut program) = connected(&mut driver, 1000);
    socket.send(&mut driver, b"question");
    socket.shut_down(&mut driver, SHUTDOWN_SEND);
    let mut question = String::new();
    program.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    program.write_all(b"answer").unwrap();
    assert_eq!(driver.wait_one().1, b"answer");
    drop(program);
    let (header, _) = driver.wait().pop().unwrap();
    assert_eq!((op(&header), header.flags), (Op::Shutdown, SHUTDOWN_BOTH));
    driver.send(&socket.header(Op::Reset), b"");
    assert_eq!(driver.device.muxer.counts().0, 0);
}

#[test]
fn a_program_ends_its_direction_and_hears_the_answer() {
    let mut driver = Driver::new(BUFFER);
    let (mut socket, mut program) = connected(&mut driver, 1000);
    program.write_all(b"question").unwrap();
    program.shutdown(Shutdown::Write).unwrap();
    let packets = driver.wait_for(Op::Shutdown);
    assert_eq!((packets.len(), &packets[0].1[..]), (2, &b"question"[..]));
    assert_eq!(packets[1].0.flags, SHUTDOWN_SEND);
    socket.send(&mut driver, b"answer");
    socket.shut_down(&mut driver, SHUTDOWN_BOTH);
    let mut answer = String::new();
    program.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
    assert_eq!(op(&driver.wait_one().0), Op::Reset);
}

#[test]
fn a_program_that_stops_receiving_is_told_to_the_guest() {
    let mut driver = Driver::new(BUFFER);
    let (mut socket, program) = connected(&mut driver, 1000);
    program.shutdown(Shutdown::Read).unwrap();
    socket.send(&mut driver, b"x");
    let (header, _) = driver.wait_one();
    assert_eq!((op(&header), header.flags), (Op::Shutdown, SHUTDOWN_RECEIVE));
}

#[test]
fn a_program_that_does_not_read_holds_the_guest_and_nobody_else() {
    let mut driver = Driver::new(BUFFER);
    let (mut socket, mut program) = connected(&mut driver, 1000);
    let data = noise(8 << 20);
    let mut sent = 0;
    loop {
        let count = socket.credit().min(0x1_0000) as usize;
        if count == 0 {
            break;
        }
        socket.send(&mut driver, &data[sent..sent + count]);
        sent += count;
        driver.received().iter().for_each(|(header, _)| socket.take(header));
    }
    assert!(sent < 2 << 20, "bounded by our buffer and the socket's");
    assert!(driver.is_quiet());
    let (mut other, mut reader) = connected(&mut driver, 1001);
    other.send(&mut driver, b"other");
    reader.read_exact(&mut [0; 5]).unwrap();
    let reading = thread::spawn(move || {
        let mut all = Vec::new();
        program.read_to_end(&mut all).unwrap();
        all
    });
    while sent < data.len() {
        let count = (socket.credit().min(0x1_0000) as usize).min(data.len() - sent);
        if count > 0 {
            socket.send(&mut driver, &data[sent..sent + count]);
            sent += count;
        }
        driver.turn(Duration::from_millis(if count == 0 { 50 } else { 0 }));
        driver.received().iter().for_each(|(header, _)| socket.take(header));
    }
    // The end waits for the data before it.
    socket.shut_down(&mut driver, SHUTDOWN_BOTH);
    driver.wait_for(Op::Reset);
    assert!(reading.join().unwrap() == data);
}

#[test]
fn a_guest_that_does_not_receive_holds_the_program() {
    let mut driver = Driver::without_buffers(BUFFER);
    driver.refill = false;
    let listener = driver.listen(7);
    let socket = Socket::new(1000, 7);
    driver.send(&socket.header(Op::Request), b"");
    let program = listener.accept().unwrap().0;
    program.set_nonblocking(true).unwrap();
    let data = noise(1 << 22);
    let mut written = 0;
    loop {
        match (&program).write(&data[written..]) {
            Ok(count) => written += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
        assert!(written < data.len(), "somebody buffers without bound");
        assert!(driver.is_quiet());
    }
    assert_eq!(driver.device.muxer.counts(), (1, 0, 0, 1));
    driver.refill = true;
    driver.offer_buffers(8);
    let mut back = Vec::new();
    while back.len() < written {
        for (header, payload) in driver.wait() {
            if op(&header) != Op::Response {
                back.extend(payload);
            }
        }
        let socket = Socket { fwd_cnt: back.len() as u32, ..socket };
        driver.send(&socket.header(Op::CreditUpdate), b"");
    }
    assert!(back == data[..written]);
}

#[test]
fn a_program_that_vanishes_is_told_to_the_guest() {
    let mut driver = Driver::new(BUFFER);
    // With the guest's data unread: broken off. Without: closed.
    let (mut socket, program) = connected(&mut driver, 1000);
    socket.send(&mut driver, b"never read");
    drop(program);
    assert_eq!(op(&driver.wait_one().0), Op::Reset);
    let (socket, program) = connected(&mut driver, 1001);
    drop(program);
    let (header, _) = driver.wait_one();
    assert_eq!((op(&header), header.flags), (Op::Shutdown, SHUTDOWN_BOTH));
    // The guest does not answer.
    for _ in 0..PATIENCE {
        driver.device.muxer.force_tick();
    }
    driver.device.notify(0);
    let (header, _) = driver.wait_one();
    assert_eq!((op(&header), header.dst_port), (Op::Reset, socket.ports.guest));
    assert_eq!(driver.device.muxer.counts(), (0, 0, 0, 0));
}

#[test]
fn a_guest_that_resets_closes_the_program() {
    let mut driver = Driver::new(BUFFER);
    let (socket, mut program) = connected(&mut driver, 1000);
    driver.send(&socket.header(Op::Reset), b"");
    assert_eq!(program.read(&mut [0; 1]).unwrap(), 0);
    assert!(driver.is_quiet());
}

#[test]
fn time_passes_by_itself() {
    let mut driver = Driver::new(BUFFER);
    let mut program = driver.connect();
    program.write_all(b"CONNECT 52\n").unwrap();
    assert_eq!(op(&driver.wait_one().0), Op::Request);
    assert_eq!(op(&driver.wait_one().0), Op::Reset);
    assert_eq!(program.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn a_reset_drops_everything_and_the_device_works_again() {
    let mut driver = Driver::new(BUFFER);
    let (_, mut program) = connected(&mut driver, 1000);
    let mut half = driver.connect();
    half.write_all(b"CONN").unwrap();
    assert!(driver.is_quiet());
    driver.device.reset();
    assert_eq!(driver.device.muxer.counts(), (0, 0, 0, 0));
    assert_eq!((program.read(&mut [0; 1]).unwrap(), driver.device.muxer.reserved()), (0, 0));
    let _ = half.read(&mut [0; 1]);
    // A program may wait for the driver; meanwhile nothing spins.
    let mut program = driver.connect();
    program.write_all(b"CONNECT 52\n").unwrap();
    driver.device.host_ready().unwrap();
    driver.device.notify(0);
    assert_eq!(driver.device.muxer.counts(), (0, 0, 0, 0));
    driver.activate();
    driver.offer_buffers(16);
    assert_eq!(driver.wait_one().0.dst_port, 52);
    let (mut socket, mut program) = connected(&mut driver, 1001);
    socket.send(&mut driver, b"again");
    program.read_exact(&mut [0; 5]).unwrap();
}

#[test]
fn a_batch_raises_one_interrupt_per_queue() {
    let mut driver = Driver::new(BUFFER);
    let (mut socket, _program) = connected(&mut driver, 1000);
    // A driver that wants to hear at its next look, not of each packet: used_event stays behind.
    let before = driver.line.edges();
    for _ in 0..100 {
        let header = Header { len: 3, ..socket.header(Op::ReadWrite) };
        assert!(driver.queue(&header, b"abc"));
        assert!(driver.queue(&socket.header(Op::CreditRequest), b""));
        socket.sent += 3;
        if socket.sent % 150 == 0 {
            driver.device.notify(1);
        }
    }
    assert!(driver.line.edges() - before <= 4, "{}", driver.line.edges() - before);
}

#[test]
fn the_configuration_space_is_the_guests_identifier() {
    let driver = Driver::without_buffers(BUFFER);
    let space = [GUEST_CID as u8, 0, 0, 0, 0, 0, 0, 0];
    for (offset, length, expected) in [
        (0, 8, &space[..]),
        (0, 4, &space[..4]),
        (4, 4, &space[4..]),
        (7, 2, &[0, 0xEE]),
        (8, 1, &[0xEE]),
        (u64::MAX, 1, &[0xEE]),
    ] {
        let mut data = vec![0xEE; length];
        driver.device.read_config(offset, &mut data);
        assert_eq!(data, expected, "{offset}");
    }
    assert_eq!((driver.device.device_type(), driver.device.features()), (19, 0));
    assert_eq!(driver.device.queue_sizes(), [256; 3]);
}

#[test]
fn identifiers_that_no_guest_can_have_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    for (cid, good) in
        [(0, false), (1, false), (2, false), (3, true), (u32::MAX - 1, true), (u32::MAX, false)]
    {
        let (listener, _file) = bind(&directory.path().join("s")).unwrap();
        let device = Vsock::new(cid, Some(listener), None);
        assert_eq!(device.is_ok(), good, "{cid}");
        assert!(good || matches!(device, Err(VsockError::GuestCid(refused)) if refused == cid));
    }
}

#[test]
fn without_a_path_the_guest_reaches_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, _file) = bind(&directory.path().join("s")).unwrap();
    let _program = UnixListener::bind(directory.path().join("_80")).unwrap();
    let error = UnixHost::new(Some(listener), None).unwrap().connect(80).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn a_socket_is_made_only_where_nothing_is_and_removed_at_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let in_use = |path: &Path| {
        let error = bind(path).unwrap_err();
        assert!(
            matches!(error, BindError::InUse { .. }) && error.to_string().contains(path.to_str().unwrap()),
            "{error}"
        );
    };
    let (listener, file) = bind(&path).unwrap();
    in_use(&path);
    drop(file);
    assert!(!path.exists());
    drop(listener);
    // Left behind by a process that was killed.
    drop(UnixListener::bind(&path).unwrap());
    let (_listener, file) = bind(&path).unwrap();
    UnixStream::connect(&path).unwrap();
    // Replaced by somebody else: not ours to remove.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, b"file").unwrap();
    drop(file);
    in_use(&path);
    assert_eq!(std::fs::read(&path).unwrap(), b"file");
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/nonexistent", &path).unwrap();
    in_use(&path);
    let error = bind(&directory.path().join("missing/s")).unwrap_err();
    assert!(matches!(error, BindError::Socket { .. }), "{error}");
    let error = bind(&directory.path().join("s".repeat(200))).unwrap_err();
    assert!(matches!(error, BindError::Socket { .. }), "{error}");
}
