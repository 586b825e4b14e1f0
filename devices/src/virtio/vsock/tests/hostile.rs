//! A driver that breaks the rules.

use std::io::Read;

use super::driver::{Driver, GUEST_CID, Socket};
use crate::virtio::VirtioDevice;
use crate::virtio::vsock::muxer::Limits;
use crate::virtio::vsock::packet::{Header, MAX_PAYLOAD, Op, PORT_ANY};

const BUFFER: u32 = 4096;

/// The operations of a guest's packets.
fn ops(packets: &[(Header, Vec<u8>)]) -> Vec<Op> {
    packets.iter().map(|(header, _)| Op::from_field(header.op).unwrap()).collect()
}

#[test]
fn packets_that_belong_to_nobody_are_reset_or_dropped() {
    let mut driver = Driver::new(BUFFER);
    let _listener = driver.listen(7);
    let socket = Socket::new(1000, 7);
    for op in Op::ALL {
        if !matches!(op, Op::Reset | Op::Request) {
            driver.send(&socket.header(op), b"");
            let (header, _) = driver.wait_one();
            assert_eq!((header.op, header.src_port, header.dst_port), (Op::Reset as u16, 7, 1000), "{op:?}");
        }
    }
    driver.send(&socket.header(Op::Reset), b"");
    let request = socket.header(Op::Request);
    for dropped in [
        Header { src_cid: 4, ..request },
        Header { src_cid: u64::from(GUEST_CID) | 1 << 32, ..request },
        Header { dst_cid: 1, ..request },
        Header { dst_cid: u64::MAX, ..request },
    ] {
        driver.send(&dropped, b"");
        assert!(driver.is_quiet(), "{dropped:?}");
    }
    for reset in [
        Header { kind: 2, ..request },
        Header { kind: 0, ..request },
        Header { op: 0, ..request },
        Header { op: 8, ..request },
        Header { len: 1, ..request },
        Header { len: u32::MAX, ..request },
        Header { src_port: PORT_ANY, ..request },
        Header { dst_port: PORT_ANY, ..request },
    ] {
        driver.send(&reset, b"");
        let (header, _) = driver.wait_one();
        assert_eq!((header.op, header.kind), (Op::Reset as u16, reset.kind), "{reset:?}");
    }
    assert_eq!(driver.device.muxer.counts(), (0, 0, 0, 0));
}

#[test]
fn impossible_lengths_cost_the_connection() {
    let mut driver = Driver::new(BUFFER);
    let listener = driver.listen(7);
    for (len, payload) in [(1, 0), (101, 100), (u32::MAX, 100), (MAX_PAYLOAD + 1, 100)] {
        let mut socket = Socket::new(1000, 7);
        assert!(socket.connect(&mut driver));
        let mut program = listener.accept().unwrap().0;
        driver.send(&Header { len, ..socket.header(Op::ReadWrite) }, &vec![1; payload]);
        assert_eq!(ops(&driver.wait()), [Op::Reset], "{len}");
        assert_eq!(program.read(&mut [0; 1]).unwrap(), 0, "{len}: nothing got through");
    }
    // Bytes after the payload are none of our business.
    let mut socket = Socket::new(1000, 7);
    assert!(socket.connect(&mut driver));
    let mut program = listener.accept().unwrap().0;
    driver.send(&Header { len: 2, ..socket.header(Op::ReadWrite) }, b"abc");
    driver.send(&Header { len: 1, ..socket.header(Op::ReadWrite) }, b"d");
    let mut data = [0; 3];
    program.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"abd");
}

#[test]
fn a_connection_that_exists_cannot_be_asked_for_again() {
    let mut driver = Driver::new(BUFFER);
    let listener = driver.listen(7);
    let mut socket = Socket::new(1000, 7);
    assert!(socket.connect(&mut driver));
    assert!(!socket.connect(&mut driver));
    assert_eq!(listener.accept().unwrap().0.read(&mut [0; 1]).unwrap(), 0);
    assert!(socket.connect(&mut driver), "after that the ports are free");
}

#[test]
fn chains_that_hold_no_packet_need_a_reset() {
    type Break = fn(&mut Driver);
    let breaks: [(&str, Break); 5] = [
        ("a transmitted chain shorter than a header", |driver| {
            driver.tx.offer_chain(0, &[(0x10_0000, 43, false)]);
            driver.device.notify(1);
        }),
        ("a transmitted chain that is to be written", |driver| {
            driver.tx.offer_chain(0, &[(0x10_0000, 100, true)]);
            driver.device.notify(1);
        }),
        ("a transmitted chain outside memory", |driver| {
            driver.tx.offer_chain(0, &[(u64::MAX - 50, 44, false)]);
            driver.device.notify(1);
        }),
        ("a receive buffer without room for a payload", |driver| {
            driver.rx.offer_chain(0, &[(0x10_0000, 44, true)]);
            driver.send(&Socket::new(1, 2).header(Op::CreditUpdate), b"");
        }),
        ("a receive buffer that is not to be written", |driver| {
            driver.rx.offer_chain(0, &[(0x10_0000, 4096, false)]);
            driver.send(&Socket::new(1, 2).header(Op::CreditUpdate), b"");
        }),
    ];
    for (what, break_it) in breaks {
        let mut driver = Driver::without_buffers(BUFFER);
        let listener = driver.listen(7);
        driver.send(&Socket::new(1000, 7).header(Op::Request), b"");
        let mut program = listener.accept().unwrap().0;
        assert!(!driver.interrupt.is_broken());
        if what.starts_with("a receive") {
            // The connection's RESPONSE would use the buffer up.
            driver.rx.set_index(0);
        }
        break_it(&mut driver);
        assert!(driver.interrupt.is_broken(), "{what}");
        let metrics = driver.device.metrics();
        let faults = (metrics.rx_queue_event_fails.total(), metrics.tx_queue_event_fails.total());
        assert_eq!(faults, if what.starts_with("a receive") { (1, 0) } else { (0, 1) }, "{what}");
        assert_eq!(program.read(&mut [0; 1]).unwrap(), 0, "{what}: connections end");
        assert_eq!(driver.device.muxer.counts(), (0, 0, 0, 0));
        // Nothing further is looked at until the driver resets the device.
        driver.device.notify(0);
        driver.device.notify(1);
        driver.device.host_ready().unwrap();
    }
}

#[test]
fn a_flood_without_receive_buffers_costs_a_bounded_number_of_answers() {
    let mut driver = Driver::without_buffers(BUFFER);
    let bound = Limits::default().refusals;
    for count in 0..10_000 {
        driver.send(&Socket::new(count, 9).header(Op::CreditUpdate), b"");
    }
    assert_eq!(driver.device.muxer.counts(), (0, 0, bound, 0));
    driver.offer_buffers(64);
    let mut answers = Vec::new();
    while answers.len() < bound {
        answers.extend(driver.wait());
    }
    let ports: Vec<u32> = answers.iter().map(|(header, _)| header.dst_port).collect();
    assert_eq!(ports, (0..bound as u32).collect::<Vec<_>>(), "the first have their answers, in order");
    driver.send(&Socket::new(1, 9).header(Op::CreditUpdate), b"");
    assert_eq!(ops(&driver.wait()), [Op::Reset]);
}
