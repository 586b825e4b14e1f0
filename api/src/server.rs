//! HTTP/1.1 on a Unix socket, on a thread of its own.
//!
//! ```text
//! client ──request──▶ server thread ──Envelope──▶ the monitor's thread
//!        ◀─response──               ◀──Reply────
//! ```
//!
//! The thread reads requests, asks the [`router`](crate::router) what they want, and hands that to the monitor
//! in an [`Envelope`]; the monitor answers whenever it likes, so a request that waits for the end of the domain
//! holds up no other one.
//!
//! Everything that a client can make larger or longer has a limit: head, body, the time to send each, the number of
//! requests that wait for the monitor, and that of connections. A connection too many takes the place of the oldest one that does not wait for the
//! monitor; if all do, it is told 503. So clients that are idle, slow or broken keep nobody else out.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::os::unix::net::UnixListener;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use cofferdam_metrics::prometheus;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue, SERVER};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use tokio::net::UnixStream;
use tokio::sync::oneshot::error::TryRecvError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};

use crate::actions::{ActionError, ActionResult, GuestEnd, VmmAction, VmmData};
use crate::guest::{self, Guest, GuestError};
use crate::metrics::ApiMetrics;
use crate::openapi::DOCUMENT;
use crate::router::{self, Call, ContainerCall};

/// Largest body that is read when nothing else is said, bytes. It is Firecracker's.
pub const DEFAULT_MAX_PAYLOAD: usize = 51_200;
/// Largest head of a request, bytes, and most headers in it.
const MAX_HEAD: usize = 16 << 10;
const MAX_HEADERS: usize = 64;
/// How long a connection may take to send the head of its next request, and then the body.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// Most connections at a time.
const MAX_CONNECTIONS: usize = 128;
/// Most requests that the monitor has yet to answer: those of all connections, and as many whose clients have gone.
const MAX_REQUESTS: usize = 2 * MAX_CONNECTIONS;
/// Most requests to the container's init at a time. Guests may answer late or never, so they must not take up all
/// connections.
const MAX_CONTAINER_CALLS: usize = MAX_CONNECTIONS / 2;
/// How long answers under way may take when the server ends.
const FAREWELL: Duration = Duration::from_secs(1);
/// Pause after a connection could not be accepted, mostly for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
const BUSY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";

/// An action, and where its answer goes.
pub struct Envelope {
    /// What is asked for.
    pub action: VmmAction,
    /// Where the answer goes.
    pub reply: Reply,
}

/// Where an answer goes. Dropped without one, the client hears that the domain has stopped.
pub struct Reply {
    sender: oneshot::Sender<ActionResult>,
    /// Its place among [`MAX_REQUESTS`].
    _place: Option<OwnedSemaphorePermit>,
}

impl Reply {
    /// A way to answer, and where the answer comes.
    pub fn pair() -> (Self, Answer) {
        Self::with_place(None)
    }

    fn with_place(place: Option<OwnedSemaphorePermit>) -> (Self, Answer) {
        let (sender, receiver) = oneshot::channel();
        (Self { sender, _place: place }, Answer(receiver))
    }

    /// Answers. A client that has gone misses it.
    pub fn send(self, result: ActionResult) {
        let _ = self.sender.send(result);
    }

    /// Whether the client still waits.
    pub fn is_wanted(&self) -> bool {
        !self.sender.is_closed()
    }
}

/// Where an answer comes.
pub struct Answer(oneshot::Receiver<ActionResult>);

impl Answer {
    /// The answer.
    async fn wait(self) -> ActionResult {
        self.0.await.unwrap_or(Err(ActionError::Stopped))
    }

    /// The answer, if it is there.
    pub fn now(&mut self) -> Option<ActionResult> {
        match self.0.try_recv() {
            Ok(result) => Some(result),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Closed) => Some(Err(ActionError::Stopped)),
        }
    }
}

/// Hands envelopes to the monitor.
pub type Deliver = Arc<dyn Fn(Envelope) + Send + Sync>;

/// The server. Dropping it ends it: answers under way are sent, then the thread ends.
pub struct Server {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves the clients of `listener`, with bodies of up to `max_payload` bytes, and counts in `metrics`. The thread
    /// first does `confine`, whose error is the inner one; there is no server then.
    pub fn start<E: Send + 'static>(
        listener: UnixListener,
        max_payload: usize,
        metrics: Arc<ApiMetrics>,
        deliver: Deliver,
        confine: impl FnOnce() -> Result<(), E> + Send + 'static,
    ) -> io::Result<Result<Self, E>> {
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
        let listener = {
            let _guard = runtime.enter();
            tokio::net::UnixListener::from_std(listener)?
        };
        let (stop, stopped) = watch::channel(false);
        let (tell, confined) = mpsc::sync_channel(1);
        let thread = thread::Builder::new().name("api".to_owned()).spawn(move || {
            let result = confine();
            let go_on = result.is_ok();
            let _ = tell.send(result);
            if go_on {
                let places = Arc::new(Semaphore::new(MAX_REQUESTS));
                let container_places = Arc::new(Semaphore::new(MAX_CONTAINER_CALLS));
                let service = Service {
                    max_payload,
                    metrics,
                    deliver,
                    places,
                    container_places,
                    next_exec: Arc::default(),
                };
                runtime.block_on(serve(listener, service, stopped));
            }
        })?;
        let server = Self { stop, thread: Some(thread) };
        Ok(confined.recv().map_err(io::Error::other)?.map(|()| server))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.stop.send(true);
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by itself.
            let _ = thread.join();
        }
    }
}

/// A connection as the accepting loop sees it.
struct Connection {
    task: AbortHandle,
    /// It waits for the monitor.
    waits: Arc<AtomicBool>,
}

async fn serve(listener: tokio::net::UnixListener, service: Service, mut stopped: watch::Receiver<bool>) {
    let mut tasks = JoinSet::new();
    let mut connections: VecDeque<Connection> = VecDeque::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stopped.wait_for(|stopped| *stopped) => break,
        };
        let Ok((stream, _)) = accepted else {
            sleep(ACCEPT_PAUSE).await;
            continue;
        };
        while tasks.try_join_next().is_some() {}
        connections.retain(|connection| !connection.task.is_finished());
        if connections.len() >= MAX_CONNECTIONS {
            let idle = connections.iter().position(|connection| !connection.waits.load(Ordering::Relaxed));
            match idle.and_then(|index| connections.remove(index)) {
                Some(connection) => connection.task.abort(),
                None => {
                    let _ = stream.try_write(BUSY);
                    continue;
                }
            }
        }
        let waits = Arc::new(AtomicBool::new(false));
        let task = tasks.spawn(serve_connection(stream, service.clone(), waits.clone(), stopped.clone()));
        connections.push_back(Connection { task, waits });
    }
    // Who has connected by now is still heard.
    for _ in 0..MAX_CONNECTIONS {
        tokio::select! {
            biased;
            Ok((stream, _)) = listener.accept() => {
                tasks.spawn(serve_connection(stream, service.clone(), Arc::default(), stopped.clone()));
            }
            () = end(&mut stopped) => break,
        }
    }
    drop(listener);
    // The rest is aborted with `tasks`.
    let _ = timeout(FAREWELL, async { while tasks.join_next().await.is_some() {} }).await;
}

async fn serve_connection(
    stream: UnixStream,
    service: Service,
    waits: Arc<AtomicBool>,
    mut stopped: watch::Receiver<bool>,
) {
    let answer = service_fn(|request| {
        let (service, waits) = (service.clone(), waits.clone());
        async move { Ok::<_, Infallible>(service.answer(request, &waits).await) }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_buf_size(MAX_HEAD)
            .max_headers(MAX_HEADERS)
            .serve_connection(TokioIo::new(stream), answer)
    );
    // A connection that breaks is its client's affair.
    tokio::select! {
        biased;
        _ = connection.as_mut() => return,
        () = end(&mut stopped) => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}

/// The end, once everything that had come before it has been looked at.
async fn end(stopped: &mut watch::Receiver<bool>) {
    // The sender lives as long as what is served.
    let _ = stopped.wait_for(|stopped| *stopped).await;
    for _ in 0..2 {
        tokio::task::yield_now().await;
    }
}

/// What answers requests.
#[derive(Clone)]
struct Service {
    max_payload: usize,
    metrics: Arc<ApiMetrics>,
    deliver: Deliver,
    /// As many as there can be more requests.
    places: Arc<Semaphore>,
    /// As many as there can be more requests to the container's init.
    container_places: Arc<Semaphore>,
    /// Number of the next process whose client has no name for it.
    next_exec: Arc<AtomicU64>,
}

impl Service {
    async fn answer(&self, request: Request<Incoming>, waits: &AtomicBool) -> Response<Full<Bytes>> {
        let (head, body) = request.into_parts();
        let route = router::position(head.method.as_str(), head.uri.path());
        let body = match self.read(body).await {
            Ok(body) => body,
            Err(message) => {
                self.metrics.asked(None);
                return fault(&message);
            }
        };
        self.metrics.asked(route);
        let start = Instant::now();
        let call = router::route(head.method.as_str(), head.uri.path(), head.uri.query(), &body);
        let is_wait = matches!(call, Ok(Call::Wait(_) | Call::Container(ContainerCall::Exec(..))));
        let response = match call {
            Ok(call) => self.call(call, waits).await,
            Err(error) => fault(&error.to_string()),
        };
        if response.status() == StatusCode::BAD_REQUEST {
            self.metrics.refused(route);
        }
        if !is_wait {
            self.metrics.server.requests_agg.record(start.elapsed());
        }
        response
    }

    async fn call(&self, call: Call, waits: &AtomicBool) -> Response<Full<Bytes>> {
        waits.store(true, Ordering::Relaxed);
        let result = match call {
            Call::Act(action) => self.act(action).await,
            Call::Wait(time) => self.wait(time).await,
            Call::Container(call) => self.container(call).await,
            Call::Document => {
                waits.store(false, Ordering::Relaxed);
                return json_response(StatusCode::OK, DOCUMENT);
            }
        };
        waits.store(false, Ordering::Relaxed);
        match result {
            Ok(VmmData::Empty) => response(StatusCode::NO_CONTENT, Bytes::new()),
            Ok(VmmData::Metrics(text)) => typed(StatusCode::OK, prometheus::CONTENT_TYPE, text),
            Ok(data) => match serde_json::to_vec(&data) {
                Ok(text) => json_response(StatusCode::OK, text),
                Err(error) => fault(&format!("the answer is no JSON: {error}")),
            },
            Err(error) => fault(&error.to_string()),
        }
    }

    /// Waits for the end of the domain; when `time` is over, tells its status.
    async fn wait(&self, time: Option<Duration>) -> ActionResult {
        let Some(time) = time else { return self.act(VmmAction::Wait).await };
        match timeout(time, self.act(VmmAction::Wait)).await {
            Ok(result) => result,
            Err(_) => self.act(VmmAction::GetStatus).await,
        }
    }

    async fn container(&self, call: ContainerCall) -> ActionResult {
        let _place = self.container_places.try_acquire().map_err(|_| ActionError::Busy)?;
        let (ours, theirs) = UnixStream::pair().map_err(GuestError::from)?;
        let theirs = GuestEnd(Arc::new(theirs.into_std().map_err(GuestError::from)?.into()));
        self.act(VmmAction::ConnectGuest(theirs)).await?;
        let mut guest = Guest::connect(ours).await?;
        Ok(match call {
            ContainerCall::Exec(exec, time) => {
                let number = || self.next_exec.fetch_add(1, Ordering::Relaxed);
                let id = exec.id.clone().unwrap_or_else(|| format!("exec-{}", number()));
                VmmData::Executed(guest::execute(&mut guest, id, exec, time).await?)
            }
            ContainerCall::Wait(id, time) => VmmData::Executed(guest::end(&mut guest, id, time).await?),
            ContainerCall::Kill(kill) => {
                guest::kill(&mut guest, kill).await?;
                VmmData::Empty
            }
            ContainerCall::Resize(resize) => {
                guest::resize(&mut guest, resize).await?;
                VmmData::Empty
            }
            ContainerCall::Stats => VmmData::Stats(guest::stats(&mut guest).await?),
        })
    }

    async fn read(&self, body: Incoming) -> Result<Bytes, String> {
        let limit = self.max_payload;
        let size = body.size_hint().lower();
        if size > limit as u64 {
            return Err(format!(
                "Request payload with size {size} is larger than the limit of {limit} allowed by server."
            ));
        }
        match timeout(BODY_TIMEOUT, Limited::new(body, limit).collect()).await {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(error)) => Err(format!("Request payload of at most {limit} bytes: {error}.")),
            Err(_) => Err(format!("Request payload did not come within {} s.", BODY_TIMEOUT.as_secs())),
        }
    }

    async fn act(&self, action: VmmAction) -> ActionResult {
        let place = self.places.clone().try_acquire_owned().map_err(|_| ActionError::Busy)?;
        let (reply, answer) = Reply::with_place(Some(place));
        (self.deliver)(Envelope { action, reply });
        answer.wait().await
    }
}

impl From<GuestError> for ActionError {
    fn from(error: GuestError) -> Self {
        Self::Failed(error.to_string())
    }
}

fn fault(message: &str) -> Response<Full<Bytes>> {
    json_response(StatusCode::BAD_REQUEST, json!({ "fault_message": message }).to_string())
}

fn json_response(status: StatusCode, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    typed(status, "application/json", text)
}

fn typed(status: StatusCode, kind: &'static str, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = response(status, text.into());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

fn response(status: StatusCode, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(SERVER, HeaderValue::from_static("Cofferdam API"));
    response
}

#[cfg(test)]
mod tests;
