//! Requests to a container that nobody waits for: signals and sizes of its terminal, in their order, by a thread of
//! their own. A monitor or guest that does not answer holds nothing up; that a request was refused, or not answered in
//! time, can be waited for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use cofferdam_api::client::Client;
use cofferdam_container_manifest::Signal;
use rustix::pipe::{PipeFlags, pipe_with};

/// How long a signal may take before it counts as not taken.
const ANSWER: Duration = Duration::from_secs(5);

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// A signal to the process.
    Kill(Signal),
    /// A size of its terminal, in characters.
    Resize {
        /// Width.
        columns: u16,
        /// Height.
        rows: u16,
    },
}

/// The requests to one process in a container.
pub struct Requests {
    api: PathBuf,
    /// Which process: that of an exec, or the container's own.
    id: Option<String>,
    asked: Option<Sender<Request>>,
    refused: Receiver<(Signal, String)>,
    refuse: Sender<(Signal, String)>,
    /// A byte for each signal that was refused.
    read_end: OwnedFd,
    write_end: OwnedFd,
}

impl Requests {
    /// To the process `id`, or the container's own, by the API at `api`.
    pub fn new(api: PathBuf, id: Option<String>) -> io::Result<Self> {
        let (refuse, refused) = channel();
        let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        Ok(Self { api, id, asked: None, refused, refuse, read_end, write_end })
    }

    /// Asks.
    pub fn ask(&mut self, request: Request) {
        let asked = match &self.asked {
            Some(asked) => asked,
            None => match self.start() {
                Ok(sender) => self.asked.insert(sender),
                Err(error) => return self.tell(request, error.to_string()),
            },
        };
        // Its thread waits for requests as long as there is a sender.
        let _ = asked.send(request);
    }

    /// Readable when a signal was refused.
    pub fn answers(&self) -> BorrowedFd<'_> {
        self.read_end.as_fd()
    }

    /// The signals that were refused, each with the reason.
    pub fn refused(&mut self) -> Vec<(Signal, String)> {
        let _ = rustix::io::read(&self.read_end, &mut [0; 64]);
        self.refused.try_iter().collect()
    }

    fn start(&self) -> io::Result<Sender<Request>> {
        let (sender, receiver) = channel();
        let client = Client::new(&self.api, ANSWER);
        let (id, refuse, wake) = (self.id.clone(), self.refuse.clone(), self.write_end.try_clone()?);
        thread::Builder::new().name("requests".to_owned()).spawn(move || {
            for request in receiver {
                let result = match request {
                    Request::Kill(signal) => client.container_kill(&signal.to_string(), id.as_deref()),
                    Request::Resize { columns, rows } => {
                        client.container_resize(columns, rows, id.as_deref())
                    }
                };
                if let (Err(error), Request::Kill(signal)) = (result, request) {
                    let _ = refuse.send((signal, error.to_string()));
                    // A full pipe is readable already.
                    let _ = rustix::io::write(&wake, &[1]);
                }
            }
        })?;
        Ok(sender)
    }

    /// As if it had been refused.
    fn tell(&self, request: Request, reason: String) {
        if let Request::Kill(signal) = request {
            let _ = self.refuse.send((signal, reason));
            let _ = rustix::io::write(&self.write_end, &[1]);
        }
    }
}
