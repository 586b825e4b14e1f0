//! `small-server SOCKET`: the smallest HTTP server that hyper makes. It listens on a Unix socket, has one thread, and
//! answers whatever it is asked with the same few bytes of JSON; no limits, time-outs, routes or checks.

use std::convert::Infallible;
use std::error::Error;
use std::process::ExitCode;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Response, body::Incoming};
use hyper_util::rt::TokioIo;
use tokio::net::UnixListener;

/// About as long as the monitor's answer to `GET /`.
const ANSWER: &str =
    r#"{"app_name":"small-server","id":"anonymous-instance","state":"Not started","vmm_version":"0.1.0"}"#;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("small-server: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let socket = std::env::args_os().nth(1).ok_or("usage: small-server SOCKET")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async {
        let listener = UnixListener::bind(socket)?;
        loop {
            let (stream, _) = listener.accept().await?;
            let answer = service_fn(|_: hyper::Request<Incoming>| async {
                Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(ANSWER.as_bytes()))))
            });
            tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), answer));
        }
    })
}
