//! A thousand connections.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::driver::{Driver, LONGEST, Socket, op};
use crate::virtio::VirtioDevice;
use crate::virtio::vsock::packet::{Op, SHUTDOWN_BOTH};

/// A buffer like those of Linux.
const BUFFER: u32 = 4096;

/// Each connection has two descriptors here: ours and the program's.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    assert!(limit.maximum.is_none_or(|maximum| maximum >= 4096), "needs 4,096 descriptors");
}

#[test]
fn a_thousand_programs_connect_at_once() {
    raise_descriptor_limit();
    let mut driver = Driver::new(BUFFER);
    let mut programs: Vec<UnixStream> = (0..1000)
        .map(|number| {
            let mut program = driver.connect();
            write!(program, "CONNECT {number}\nhello {number}").unwrap();
            program
        })
        .collect();
    let (mut answered, mut greeted) = (0, 0);
    while greeted < 1000 {
        for (header, payload) in driver.wait() {
            let mut socket = Socket::new(header.dst_port, header.src_port);
            match op(&header) {
                Op::Request => {
                    driver.send(&socket.header(Op::Response), b"");
                    answered += 1;
                }
                Op::ReadWrite => {
                    assert_eq!(payload, format!("hello {}", header.dst_port).as_bytes());
                    socket.send(&mut driver, &payload);
                    greeted += 1;
                }
                other => panic!("{other:?}"),
            }
        }
    }
    assert_eq!((answered, driver.device.muxer.counts().0), (1000, 1000));
    assert!(driver.device.muxer.reserved() <= (16 << 20) + 1000 * 8192);
    for (number, program) in programs.iter_mut().enumerate() {
        let expected = format!("\nhello {number}");
        let mut data = vec![0; 13 + expected.len()];
        program.read_exact(&mut data).unwrap();
        assert_eq!(&data[13..], expected.as_bytes());
    }
    drop(programs);
    let mut ended = 0;
    while ended < 1000 {
        for (header, _) in driver.wait() {
            assert_eq!((op(&header), header.flags), (Op::Shutdown, SHUTDOWN_BOTH));
            driver.send(&Socket::new(header.dst_port, header.src_port).header(Op::Reset), b"");
            ended += 1;
        }
    }
    assert_eq!((driver.device.muxer.counts(), driver.device.muxer.reserved()), ((0, 0, 0, 0), 0));
}

#[test]
fn the_guest_connects_a_thousand_times_one_after_another_and_at_once() {
    raise_descriptor_limit();
    let mut driver = Driver::new(BUFFER);
    let listener = driver.listen(7);
    let server = thread::spawn(move || {
        let echo = |mut stream: UnixStream| {
            let mut data = [0; 4];
            stream.read_exact(&mut data).unwrap();
            stream.write_all(&data).unwrap();
            stream
        };
        for _ in 0..1000 {
            echo(listener.accept().unwrap().0);
        }
        let streams: Vec<_> = (0..1000).map(|_| listener.accept().unwrap().0).collect();
        streams.into_iter().map(echo).count()
    });
    for number in 0..1000_u32 {
        let mut socket = Socket::new(number, 7);
        assert!(socket.connect(&mut driver), "{number}");
        socket.send(&mut driver, &number.to_le_bytes());
        let (header, payload) = driver.wait().remove(0);
        assert_eq!((op(&header), &payload[..]), (Op::ReadWrite, &number.to_le_bytes()[..]));
        socket.shut_down(&mut driver, SHUTDOWN_BOTH);
        driver.wait_for(Op::Reset);
    }
    let mut sockets: Vec<_> = (0..1000_u32).map(|number| Socket::new(number, 7)).collect();
    let mut opened = 0;
    for chunk in sockets.chunks_mut(50) {
        for socket in chunk.iter() {
            assert!(driver.queue(&socket.header(Op::Request), b""));
        }
        driver.device.notify(1);
        opened += driver.received().iter().filter(|(header, _)| op(header) == Op::Response).count();
    }
    assert_eq!(opened, 1000);
    for (number, socket) in (0_u32..).zip(&mut sockets) {
        socket.send(&mut driver, &number.to_le_bytes());
    }
    let mut back = 0;
    while back < 1000 {
        for (header, payload) in driver.wait() {
            if op(&header) == Op::ReadWrite {
                assert_eq!(payload, header.dst_port.to_le_bytes());
                back += 1;
            }
        }
    }
    assert_eq!(server.join().unwrap(), 1000);
}

/// Packets that Linux receives while that many of its answers wait to be sent: no further one.
const MOST_REPLIES: usize = 256;

/// Both sides refuse hundreds of connections of each other at once. Neither may wait for the other to take what
/// it has to say before it takes what the other says.
#[test]
fn refusals_of_both_sides_do_not_block_each_other() {
    raise_descriptor_limit();
    let mut driver = Driver::new(BUFFER);
    let mut programs: Vec<UnixStream> = (0..700)
        .map(|number| {
            let mut program = driver.connect();
            writeln!(program, "CONNECT {number}").unwrap();
            program
        })
        .collect();
    // What the guest has to send, and whether it is an answer.
    let mut to_send: VecDeque<_> =
        (0..1500).map(|port| (Socket::new(port, 9).header(Op::Request), false)).collect();
    let (mut refused, mut refuses, mut replies) = (0, 0, 0);
    while refused < 1500 || refuses < 700 {
        let before = (refused, refuses, to_send.len());
        driver.turn(Duration::ZERO);
        while let Some((header, reply)) = to_send.front()
            && driver.queue(header, b"")
        {
            replies -= usize::from(*reply);
            to_send.pop_front();
        }
        driver.device.notify(1);
        for (header, _) in driver.received_up_to(MOST_REPLIES - replies) {
            match (op(&header), header.src_port) {
                (Op::Reset, 9) => refused += 1,
                (Op::Request, _) => {
                    let answer = Socket::new(header.dst_port, header.src_port).header(Op::Reset);
                    to_send.push_back((answer, true));
                    (refuses, replies) = (refuses + 1, replies + 1);
                }
                other => panic!("{other:?}"),
            }
        }
        let after = (refused, refuses, to_send.len());
        assert!(after != before || driver.turn(LONGEST), "standstill: {after:?}");
    }
    while !to_send.is_empty() {
        while let Some((header, _)) = to_send.front()
            && driver.queue(header, b"")
        {
            to_send.pop_front();
        }
        driver.device.notify(1);
    }
    for program in &mut programs {
        assert_eq!(program.read(&mut [0; 1]).unwrap(), 0);
    }
    assert_eq!(driver.device.muxer.counts(), (0, 0, 0, 0));
}
