//! The REST API's place in the monitor.
//!
//! The server has a thread of its own ([`cofferdam_api::server`]); it puts what clients ask for into the
//! [`Inbox`] and makes that readable. Everything is decided on the monitor's main thread, by one type before
//! the start of the domain, [`PreBoot`], and by another one after it, [`RunTime`]: an action that is not legal
//! now has no code there that could do it.

mod pre_boot;
mod run_time;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::mpsc::{self, Receiver, SendError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cofferdam_api::actions::{ActionError, ActionResult, VmmAction, VmmData};
use cofferdam_api::metrics::ApiMetrics;
use cofferdam_api::server::{Envelope, Reply, Server};
use cofferdam_api::source::Source;
use cofferdam_api::status::{InstanceInfo, Outcome, VmState, VmStatus};
use cofferdam_confidential::host::survey::Survey;
use cofferdam_devices::virtio::vsock::{self, BindError, SocketFile};
use rustix::event::{EventfdFlags, eventfd};
use thiserror::Error;

pub use pre_boot::{PreBoot, Started};
pub use run_time::RunTime;

use crate::activation::ActivationError;
use crate::descriptor::{DescriptorError, take_listener};
use crate::seccomp::{Policies, Thread};
use crate::start::StartError;

/// Why there is no API.
#[derive(Debug, Error)]
pub enum ApiError {
    /// The socket cannot be made.
    #[error("--api-sock: {0}")]
    Bind(#[from] BindError),
    /// The descriptor cannot be taken over.
    #[error("{given}: {error}")]
    Descriptor {
        /// What names it.
        given: &'static str,
        /// What is wrong with it.
        #[source]
        error: DescriptorError,
    },
    /// A service manager passes sockets, and none that can be told to be the API's.
    #[error(transparent)]
    Activation(#[from] ActivationError),
    /// The server does not start.
    #[error("the API's server: {0}")]
    Server(#[source] io::Error),
}

/// The API's socket. Dropping it removes the socket's file, unless it was inherited.
pub struct Socket {
    listener: UnixListener,
    file: Option<SocketFile>,
}

impl Socket {
    /// Makes the socket, or takes the one that is inherited.
    pub fn new(source: &Source) -> Result<Self, ApiError> {
        match source {
            Source::Path(path) => {
                let (listener, file) = vsock::bind(path)?;
                Ok(Self { listener, file: Some(file) })
            }
            Source::Descriptor(fd) => Self::inherited("--api-sock", *fd),
        }
    }

    /// Takes the socket that is inherited as `fd`, which `given` names.
    pub fn inherited(given: &'static str, fd: RawFd) -> Result<Self, ApiError> {
        match take_listener(fd) {
            Ok(listener) => Ok(Self { listener, file: None }),
            Err(error) => Err(ApiError::Descriptor { given, error }),
        }
    }
}

/// The API, from the first request to the answer of those who waited for the end.
pub struct Api {
    id: String,
    waiters: Waiters,
    /// Its end comes before that of the file, so that no other monitor takes the path before that.
    _server: Server,
    _file: Option<SocketFile>,
}

impl Api {
    /// Serves the clients of `socket`, who ask for domain `id`, and counts in `metrics`. To be called when signals are blocked, which
    /// are the main thread's.
    pub fn start(
        socket: Socket,
        id: &str,
        max_payload: usize,
        metrics: Arc<ApiMetrics>,
        policies: &Arc<Policies>,
    ) -> Result<(Self, Inbox), StartError> {
        let (sender, envelopes) = mpsc::channel();
        let ready = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(|error| ApiError::Server(error.into()))?;
        let ready = Arc::new(ready);
        let waiters = Waiters::default();
        let (bell, late) = (ready.clone(), waiters.clone());
        let deliver = move |envelope| {
            if let Err(SendError(envelope)) = sender.send(envelope) {
                return late.too_late(envelope);
            }
            ring(&bell);
        };
        let policies = policies.clone();
        let confine = move || policies.install(Thread::Api);
        let server = Server::start(socket.listener, max_payload, metrics, Arc::new(deliver), confine)
            .map_err(ApiError::Server)??;
        let inbox = Inbox { id: id.to_owned(), envelopes, ready, waiters: waiters.clone() };
        Ok((Self { id: id.to_owned(), waiters, _server: server, _file: socket.file }, inbox))
    }

    /// Tells those who wait how it ended, and ends the API.
    pub fn finish(self, outcome: Outcome) {
        self.waiters.tell(VmStatus::stopped(&self.id, outcome));
    }
}

/// What clients ask for. It ends with the domain.
pub struct Inbox {
    /// Name of the domain that they ask for.
    pub id: String,
    envelopes: Receiver<Envelope>,
    ready: Arc<OwnedFd>,
    waiters: Waiters,
}

impl Inbox {
    /// Takes the next envelope, if there is one.
    fn take(&self) -> Option<Envelope> {
        self.envelopes.try_recv().ok()
    }

    /// Makes it readable, though nothing has come.
    fn ring(&self) {
        ring(&self.ready);
    }

    /// Forgets that there was something; to be called before it is all taken.
    fn clear(&self) {
        let _ = rustix::io::read(&self.ready, &mut [0; 8]);
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        while let Some(envelope) = self.take() {
            self.waiters.too_late(envelope);
        }
    }
}

/// Readable when there is an envelope.
impl AsFd for Inbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }
}

impl AsRawFd for Inbox {
    fn as_raw_fd(&self) -> RawFd {
        self.ready.as_raw_fd()
    }
}

fn ring(bell: &OwnedFd) {
    // It fails only when the counter is full, and then the main thread is awake.
    let _ = rustix::io::write(bell, &1_u64.to_ne_bytes());
}

fn instance(id: &str, state: VmState) -> VmmData {
    VmmData::Instance(InstanceInfo {
        app_name: "Cofferdam".to_owned(),
        id: id.to_owned(),
        state,
        vmm_version: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

/// What the host can do; before a domain runs, with what the secure processor says.
fn survey(before_start: bool) -> ActionResult {
    let survey = serde_json::to_value(Survey::of_this_host(before_start));
    survey.map(VmmData::Host).map_err(|error| ActionError::Failed(format!("the host: {error}")))
}

/// Those who wait for the end.
#[derive(Clone, Default)]
struct Waiters(Arc<Mutex<Waiting>>);

#[derive(Default)]
struct Waiting {
    /// At most as many as there are connections, as those who have gone are forgotten when another one comes.
    replies: Vec<Reply>,
    /// How it ended, once that is known.
    status: Option<VmStatus>,
}

impl Waiters {
    fn add(&self, reply: Reply) {
        let mut waiting = self.lock();
        if let Some(status) = &waiting.status {
            return reply.send(Ok(VmmData::Status(Box::new(status.clone()))));
        }
        waiting.replies.retain(Reply::is_wanted);
        waiting.replies.push(reply);
    }

    /// Tells them, and whoever still asks.
    fn tell(&self, status: VmStatus) {
        let mut waiting = self.lock();
        for reply in waiting.replies.drain(..) {
            reply.send(Ok(VmmData::Status(Box::new(status.clone()))));
        }
        waiting.status = Some(status);
    }

    /// Answers what is asked when the domain has stopped.
    fn too_late(&self, envelope: Envelope) {
        match envelope.action {
            VmmAction::Wait => self.add(envelope.reply),
            VmmAction::Stop(_) => envelope.reply.send(Ok(VmmData::Empty)),
            // Without an answer the client hears that the domain has stopped.
            _ => drop(envelope),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
