//! What a hostile host sends to the init of a container's domain, in frames and in pieces of any size.
//!
//! Holds: nothing comes to the container but what its manifest grants; every request is answered; what is no frame ends it.
#![no_main]

use std::sync::Mutex;
use std::time::Duration;

use arbitrary::Arbitrary;
use cofferdam_container_manifest::{Manifest, Signal, decode};
use cofferdam_container_protocol::frame::{Decoder, Frame, Kind};
use cofferdam_container_protocol::message::{ExecRequest, Message, Method, ProcessState, Request};
use cofferdam_guest::control::{Container, Refusal, Service, Usage};
use libfuzzer_sys::fuzz_target;

const MANIFEST: &str = concat!(
    r#"{"host":{"exec":[["/a"]],"signals":["INT"],"stderr":false,"stdin":false,"stdout":true,"stop":null},"#,
    r#""hostname":"a","layers":[{"root_hash":"abababababababababababababababababababababababababababababababab","#,
    r#""salt":"","size":8192}],"mounts":[],"on_verity_failure":"kill","process":{"args":["/a"],"capabilities":[],"#,
    r#""cwd":"/","env":[],"gid":0,"groups":[],"no_new_privs":false,"read_only_root":false,"rlimits":[],"#,
    r#""start_env":[],"terminal":false,"uid":0},"scratch":null,"version":1}"#,
);

/// Says no to what it must never be asked.
#[derive(Default)]
struct Checked(Mutex<u32>);

impl Container for Checked {
    fn state(&self, id: &str) -> Result<(ProcessState, Option<u8>), Refusal> {
        if id.is_empty() { Ok((ProcessState::Running, None)) } else { Err(Refusal::NotFound) }
    }

    fn wait(&self, id: &str, _: Duration) -> Result<Option<u8>, Refusal> {
        self.state(id).map(|(_, status)| status)
    }

    fn signal(&self, _: &str, signal: Signal) -> Result<(), Refusal> {
        assert_eq!(signal, Signal::Int);
        Ok(())
    }

    fn exec(&self, request: &ExecRequest) -> Result<(), Refusal> {
        assert_eq!(request.args, ["/a"]);
        assert_eq!(request.stdin_port, 0);
        assert!(request.terminal || request.stderr_port == 0);
        Ok(())
    }

    fn resize(&self, id: &str, _: u16, _: u16) -> Result<(), Refusal> {
        assert!(!id.is_empty());
        Err(Refusal::NotFound)
    }

    fn usage(&self) -> Usage {
        Usage::default()
    }

    fn stop(&self) {
        *self.0.lock().unwrap() += 1;
    }
}

#[derive(Arbitrary, Debug)]
enum Sent<'a> {
    Raw(&'a [u8]),
    /// A frame with a request of any method.
    Asked(u8, &'a [u8]),
    /// One for a process, with the words and ports that the host chooses.
    Exec(Vec<&'a str>, bool, [u32; 3]),
}

fuzz_target!(|sent: (Vec<Sent>, u8)| {
    let (sent, piece) = sent;
    let manifest: Manifest = decode(MANIFEST.as_bytes()).unwrap();
    let service = Service::new(manifest, Checked::default());
    let frame = |request: Request| {
        Frame { stream: 1, kind: Kind::Request, payload: request.encode_to_vec() }
            .encode()
            .unwrap_or_default()
    };
    let bytes: Vec<u8> = sent
        .into_iter()
        .flat_map(|sent| match sent {
            Sent::Raw(bytes) => bytes.to_vec(),
            Sent::Asked(method, payload) => {
                let method = Method::ALL[usize::from(method) % Method::ALL.len()];
                let empty = Request::new(method, &ExecRequest::default());
                frame(Request { payload: payload.to_vec(), ..empty })
            }
            Sent::Exec(args, terminal, [stdin_port, stdout_port, stderr_port]) => {
                let args = args.into_iter().map(str::to_owned).collect();
                let id = "x".to_owned();
                let exec = ExecRequest {
                    id,
                    args,
                    terminal,
                    stdin_port,
                    stdout_port,
                    stderr_port,
                    ..ExecRequest::default()
                };
                frame(Request::new(Method::Exec, &exec))
            }
        })
        .collect();
    let mut decoder = Decoder::default();
    for bytes in bytes.chunks(usize::from(piece).max(1)) {
        decoder.push(bytes);
        loop {
            match decoder.next() {
                Ok(Some(frame)) => {
                    let answer = service.answer(&frame.payload, &|| true).encode_to_vec();
                    assert!(Frame { stream: 1, kind: Kind::Response, payload: answer }.encode().is_ok());
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
});
