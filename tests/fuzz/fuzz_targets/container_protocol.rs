//! What a host and the init of a container's domain say to each other, as each reads the other.
//!
//! Holds: frames are the same however they are cut, and what was read as a message, a drive or a report is written as
//! what is read as the same again; a decoder holds no more than a frame and what it was just given.
#![no_main]

use std::collections::BTreeMap;

use arbitrary::Arbitrary;
use cofferdam_container_protocol::drive;
use cofferdam_container_protocol::frame::{Decoder, Frame, Kind};
use cofferdam_container_protocol::message::*;
use cofferdam_container_protocol::step::Report;
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Input<'a> {
    /// What comes on a connection, and where it is cut.
    Stream(Vec<Piece<'a>>, u8),
    Drive(Vec<(&'a [u8], u8)>),
    Report(u32),
}

#[derive(Arbitrary, Debug)]
enum Piece<'a> {
    Raw(&'a [u8]),
    Frame(u32, bool, &'a [u8]),
    Request(&'a str, &'a [u8]),
    Exec(&'a str, Vec<&'a str>),
}

fn bytes(piece: &Piece<'_>) -> Vec<u8> {
    let request = |request: Request| {
        let payload = request.encode_to_vec();
        Frame { stream: 1, kind: Kind::Request, payload }.encode().unwrap_or_default()
    };
    match piece {
        Piece::Raw(bytes) => bytes.to_vec(),
        Piece::Frame(stream, response, payload) => {
            let kind = if *response { Kind::Response } else { Kind::Request };
            Frame { stream: *stream, kind, payload: payload.to_vec() }.encode().unwrap_or_default()
        }
        Piece::Request(method, payload) => request(Request {
            service: SERVICE.to_owned(),
            method: (*method).to_owned(),
            payload: payload.to_vec(),
            timeout_nano: 0,
        }),
        Piece::Exec(id, args) => {
            let args = args.iter().map(|arg| (*arg).to_owned()).collect();
            let exec = ExecRequest { id: (*id).to_owned(), args, ..ExecRequest::default() };
            request(Request::new(Method::Exec, &exec))
        }
    }
}

fn frames(bytes: &[u8], piece: usize) -> (Vec<Frame>, bool) {
    let (mut decoder, mut frames) = (Decoder::default(), Vec::new());
    for piece in bytes.chunks(piece) {
        decoder.push(piece);
        loop {
            match decoder.next() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(_) => return (frames, false),
            }
        }
    }
    (frames, true)
}

fn same<M: Message + Default + PartialEq>(bytes: &[u8]) -> Option<M> {
    let message = M::decode(bytes).ok()?;
    assert!(M::decode(&*message.encode_to_vec()).unwrap() == message);
    Some(message)
}

fn request(request: &Request) {
    let payload = &*request.payload;
    match Method::from_name(&request.method) {
        Some(Method::State) => drop(same::<StateRequest>(payload)),
        Some(Method::Wait) => drop(same::<WaitRequest>(payload)),
        Some(Method::Signal) => drop(same::<SignalRequest>(payload)),
        Some(Method::Exec) => drop(same::<ExecRequest>(payload).map(|exec| is_exec_id(&exec.id))),
        Some(Method::Resize) => drop(same::<ResizeRequest>(payload)),
        Some(Method::Stats) => drop(same::<StatsRequest>(payload)),
        Some(Method::Stop) => drop(same::<StopRequest>(payload)),
        None => {}
    }
}

fn response(response: &Response) {
    let payload = &*response.payload;
    drop((same::<StateResponse>(payload), same::<WaitResponse>(payload), same::<StatsResponse>(payload)));
}

fuzz_target!(|input: Input<'_>| {
    match input {
        Input::Stream(pieces, cut) => {
            let bytes: Vec<u8> = pieces.iter().flat_map(bytes).collect();
            let whole = frames(&bytes, usize::MAX);
            assert_eq!(whole, frames(&bytes, usize::from(cut) + 1));
            for frame in &whole.0 {
                match frame.kind {
                    Kind::Request => drop(same::<Request>(&frame.payload).as_ref().map(request)),
                    Kind::Response => drop(same::<Response>(&frame.payload).as_ref().map(response)),
                }
            }
        }
        Input::Drive(parts) => {
            let mut bytes = Vec::new();
            for (part, blocks) in parts {
                bytes.extend(part);
                bytes.resize(
                    bytes.len().next_multiple_of(drive::BLOCK) + usize::from(blocks % 4) * drive::BLOCK,
                    0,
                );
            }
            if let Ok(content) = drive::read(&bytes) {
                let env: BTreeMap<_, _> = content.env.iter().cloned().collect();
                let written = drive::write(content.manifest, &env).unwrap();
                let again = drive::read(&written).unwrap();
                assert_eq!(again.manifest, content.manifest);
                assert!(again.env.into_iter().eq(env));
            }
        }
        Input::Report(number) => {
            let report = Report::from_number(number);
            assert_eq!(Report::from_number(report.number()), report);
            assert!(!report.to_string().is_empty());
        }
    }
});
