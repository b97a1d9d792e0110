//! The edge around the lobby and the routers: one port for WebSockets, room service and metrics,
//! one thread for signalling (`sfu-signal`), and one for each router (`sfu-0`, ..).
//!
//! [`SfuServer::start`] and the other functions may be called from anywhere, even within another
//! runtime: the server has its own.

pub mod access;
mod metrics;
mod rooms;
mod websocket;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};
use bytes::Bytes;
use livekit_protocol as proto;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tracing::{info, warn};

use super::bottleneck::BottleneckLimit;
use super::lobby::{ConnectionId, Entrant, Lobby, LobbyConfig, LobbyOutput, LobbyStatistics};
use super::statistics::RouterStatistics;
use super::worker::{RouterWorker, RouterWorkerConfig};
use super::{MediaEvent, SendMode, THREAD_PREFIX};
use crate::http::{self, Limits};
use crate::secrets::{Secret, Secrets};
use crate::seeded::scatter;
use crate::transport::peer::{Identity, NoIdentity};
use crate::units::{Epoch, Time};
use access::SfuAccess;
use websocket::{ClientOutbox, UnsentMessage};

/// Key of `lk` and of LiveKit's own `--dev`, with a secret that is long enough for every JWT
/// library.
pub const DEV_KEY: &str = "devkey";
pub const DEV_SECRET: &str = "devsecretdevsecretdevsecretdevsecret";
/// Large, because a thousand joins a second come in bursts.
const LISTEN_BACKLOG: i32 = 4096;
/// More participants than one signalling thread can serve.
pub const CONNECTIONS_MAX: usize = 32_768;
/// Largest number of requests that wait for the lobby. Beyond it, sockets are not read.
const INPUTS_MAX: usize = 4096;
/// Largest size of these requests in bytes.
const REQUESTS_BYTES_MAX: usize = 32 << 20;
/// Requests to the room service consist of names and a few numbers.
const BODY_BYTES_MAX: usize = 64 << 10;
/// Timeout of an answer from the signalling thread, which is never busy for more than milliseconds.
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);
const ROUTERS_MAX: usize = 256;

pub struct ServerConfig {
    /// Address of signalling, room service and metrics. Port 0 means any free port.
    pub listen: SocketAddr,
    /// Address for media. `None` means the address of `listen`, or, if that is unspecified, the
    /// address that this host uses towards others.
    pub media_ip: Option<IpAddr>,
    pub send: SendMode,
    /// Number of media threads. A room lives on one.
    pub routers: usize,
    /// Largest number of open connections. Beyond it, the connection that has waited longest
    /// without being served is closed, or else the new one. A lower limit of open files of this
    /// process takes precedence.
    pub connections: usize,
    pub api_key: String,
    pub api_secret: Secret,
    /// Seed of all that is not secret: sids, first sequence numbers and timestamps.
    pub seed: u64,
    /// Limit of each router, for tests that search for it.
    pub limit: Option<BottleneckLimit>,
}

impl ServerConfig {
    /// A server on loopback, at any free port, with the well-known key pair.
    pub fn loopback(seed: u64) -> ServerConfig {
        ServerConfig {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            media_ip: None,
            send: SendMode::Plain,
            routers: 1,
            connections: CONNECTIONS_MAX,
            api_key: DEV_KEY.to_owned(),
            api_secret: Secret::new(DEV_SECRET),
            seed,
            limit: None,
        }
    }
}

/// Reason why the server did not start. Each message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(
        "{address} is in use: stop what listens there, or choose another port with --listen (port 0 takes any)"
    )]
    InUse { address: SocketAddr },
    #[error(
        "{address} is not allowed: ports below 1024 need root, or choose another with --listen"
    )]
    Forbidden { address: SocketAddr },
    #[error(
        "{address} is no address of this host: listen on 127.0.0.1, on one that `ip address` shows, or on 0.0.0.0"
    )]
    NotOurs { address: SocketAddr },
    #[error("cannot listen on {address}: {cause}")]
    Listen {
        address: SocketAddr,
        cause: io::Error,
    },
    #[error(
        "no media socket on {ip}: {cause}; raise the limit of open files, or give another address"
    )]
    Media { ip: IpAddr, cause: io::Error },
    #[error(
        "this host has no route to others, so media would have no address: listen on one address instead of {listen}"
    )]
    NoRoute { listen: IpAddr },
    #[error("the DTLS certificate cannot be made: {0}")]
    Identity(NoIdentity),
    #[error("the API key and its secret must not be empty")]
    NoKey,
    #[error("{0} routers: use 1 to {ROUTERS_MAX}, at most as many as this host has CPUs")]
    Routers(usize),
    #[error("no thread for signalling: {0}")]
    Thread(io::Error),
}

/// Counts of what the server has done and what is in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServerStatistics {
    pub lobby: LobbyStatistics,
    /// Sum over all routers.
    pub media: RouterStatistics,
    /// WebSockets that were closed because their client did not read.
    pub slow_readers: u64,
    /// TCP connections that were closed because too many were open.
    pub refused_connections: u64,
}

/// A running SFU. Dropping it stops it.
pub struct SfuServer {
    address: SocketAddr,
    inputs: mpsc::Sender<Input>,
    thread: Option<JoinHandle<()>>,
    workers: Arc<Vec<RouterWorker>>,
    shutdown: Option<oneshot::Sender<()>>,
}

impl SfuServer {
    pub fn start(config: ServerConfig) -> Result<SfuServer, StartError> {
        if config.api_key.is_empty() || config.api_secret.expose().is_empty() {
            return Err(StartError::NoKey);
        }
        if !(1..=ROUTERS_MAX).contains(&config.routers) {
            return Err(StartError::Routers(config.routers));
        }
        let listener = listen(config.listen)?;
        let address = listener.local_addr().map_err(|cause| StartError::Listen {
            address: config.listen,
            cause,
        })?;
        let identity = Identity::generate().map_err(StartError::Identity)?;
        let epoch = Epoch::read();
        let (workers, media) = start_workers(&config, &identity, epoch)?;
        let lobby = Lobby::new(LobbyConfig {
            seed: config.seed,
            secrets: Secrets::system(),
            epoch,
            fingerprint: identity.fingerprint(),
            routers: workers.iter().map(RouterWorker::address).collect(),
        });
        let (inputs, requests) = mpsc::channel(INPUTS_MAX);
        let workers = Arc::new(workers);
        let refused = Arc::new(AtomicU64::new(0));
        let desk = LobbyDesk {
            lobby,
            epoch,
            workers: workers.clone(),
            clients: HashMap::new(),
            slow_readers: 0,
            refused_connections: refused.clone(),
        };
        let state = ServerState {
            access: Arc::new(SfuAccess::new(&config.api_key, config.api_secret.expose())),
            inputs: inputs.clone(),
            requests: Arc::new(Semaphore::new(REQUESTS_BYTES_MAX)),
        };
        let (shutdown, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name(format!("{THREAD_PREFIX}signal"))
            .spawn(move || {
                signalling(
                    (listener, config.connections, refused),
                    state,
                    desk,
                    (requests, media),
                    stopped,
                )
            })
            .map_err(StartError::Thread)?;
        info!(%address, routers = workers.len(), "the embedded SFU listens");
        Ok(SfuServer {
            address,
            inputs,
            thread: Some(thread),
            workers,
            shutdown: Some(shutdown),
        })
    }

    /// URL for clients on this host, also when the server listens on every address.
    pub fn url(&self) -> String {
        let ip = match self.address.ip() {
            ip if !ip.is_unspecified() => ip,
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
        };
        format!("ws://{}", SocketAddr::new(ip, self.address.port()))
    }

    /// Address of signalling.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits for the signalling thread's answer. This takes a moment and blocks the calling thread,
    /// even if the caller is asynchronous.
    pub fn statistics(&self) -> ServerStatistics {
        let (reply, answer) = std::sync::mpsc::sync_channel(1);
        let call = Input::Call(Box::new(move |desk, _| {
            let _ = reply.try_send(desk.statistics());
        }));
        let asked = self.inputs.try_send(call).is_ok();
        let answered = asked
            .then(|| answer.recv_timeout(REPLY_TIMEOUT).ok())
            .flatten();
        answered.unwrap_or_else(|| ServerStatistics {
            media: media_statistics(&self.workers),
            ..ServerStatistics::default()
        })
    }

    /// Disconnects everybody and stops. Returns the final statistics.
    pub fn stop(mut self) -> ServerStatistics {
        let statistics = self.statistics();
        self.halt();
        ServerStatistics {
            media: media_statistics(&self.workers),
            ..statistics
        }
    }

    /// Ends signalling. The routers end with their last handle, which is ours.
    fn halt(&mut self) {
        if self.shutdown.take().is_some() {
            info!(address = %self.address, "the embedded SFU stops");
        }
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has already been printed.
            let _ = thread.join();
        }
    }
}

impl Drop for SfuServer {
    fn drop(&mut self) {
        self.halt();
    }
}

fn listen(address: SocketAddr) -> Result<std::net::TcpListener, StartError> {
    let bind = || {
        let socket = Socket::new(
            Domain::for_address(address),
            Type::STREAM,
            Some(Protocol::TCP),
        )?;
        // Allows a port whose last connections are still closing.
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(LISTEN_BACKLOG)?;
        Ok(socket.into())
    };
    bind().map_err(|cause: io::Error| match cause.kind() {
        io::ErrorKind::AddrInUse => StartError::InUse { address },
        io::ErrorKind::PermissionDenied => StartError::Forbidden { address },
        io::ErrorKind::AddrNotAvailable => StartError::NotOurs { address },
        _ => StartError::Listen { address, cause },
    })
}

type MediaEvents = Vec<mpsc::UnboundedReceiver<MediaEvent>>;

fn start_workers(
    config: &ServerConfig,
    identity: &Identity,
    epoch: Epoch,
) -> Result<(Vec<RouterWorker>, MediaEvents), StartError> {
    let listen = config.listen.ip();
    let ip = match config.media_ip {
        Some(ip) => ip,
        None if listen.is_unspecified() => {
            outward_address(listen).ok_or(StartError::NoRoute { listen })?
        }
        None => listen,
    };
    let mut events = Vec::new();
    let mut workers = Vec::new();
    for index in 0..config.routers {
        let (told, heard) = mpsc::unbounded_channel();
        let worker = RouterWorkerConfig {
            ip,
            identity: identity.clone(),
            epoch,
            send: config.send,
            seed: scatter(config.seed ^ index as u64),
            limit: config.limit,
            name: format!("{THREAD_PREFIX}{index}"),
        };
        workers.push(
            RouterWorker::start(worker, told).map_err(|cause| StartError::Media { ip, cause })?,
        );
        events.push(heard);
    }
    Ok((workers, events))
}

/// The address that this host uses towards others. Connecting a UDP socket sends nothing; the
/// remote addresses are reserved for documentation (RFC 5737, RFC 3849).
fn outward_address(any: IpAddr) -> Option<IpAddr> {
    let far: SocketAddr = match any {
        IpAddr::V4(_) => (Ipv4Addr::new(192, 0, 2, 1), 9).into(),
        IpAddr::V6(_) => (Ipv6Addr::new(0x2001, 0xDB8, 0, 0, 0, 0, 0, 1), 9).into(),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(far).ok()?;
    socket.local_addr().ok().map(|address| address.ip())
}

fn media_statistics(workers: &[RouterWorker]) -> RouterStatistics {
    let mut sum = RouterStatistics::default();
    let known = workers.iter().filter_map(RouterWorker::statistics);
    known.for_each(|statistics| sum.merge(&statistics));
    sum
}

/// State shared by the request handlers.
#[derive(Clone)]
struct ServerState {
    access: Arc<SfuAccess>,
    inputs: mpsc::Sender<Input>,
    /// One permit for each byte of the requests that may wait for the lobby.
    requests: Arc<Semaphore>,
}

impl ServerState {
    /// Runs a call in the lobby's task. Returns `None` if the server is stopping.
    async fn call<R: Send + 'static>(
        &self,
        act: impl FnOnce(&mut LobbyDesk, Time) -> R + Send + 'static,
    ) -> Option<R> {
        let (reply, answer) = oneshot::channel();
        let call = Input::Call(Box::new(move |desk, now| {
            let _ = reply.send(act(desk, now));
        }));
        self.inputs.send(call).await.ok()?;
        answer.await.ok()
    }
}

/// Input of the lobby from sockets and callers.
enum Input {
    Enter {
        entry: Box<Entrant>,
        messages: ClientOutbox,
        reply: oneshot::Sender<ConnectionId>,
    },
    Request {
        connection: ConnectionId,
        request: Box<proto::SignalRequest>,
        /// Permits for the request's bytes, returned when it has been handled.
        room: OwnedSemaphorePermit,
    },
    Disconnect {
        connection: ConnectionId,
    },
    Call(LobbyCall),
}

/// A query of the lobby, or a change to it.
type LobbyCall = Box<dyn FnOnce(&mut LobbyDesk, Time) + Send>;

/// The signalling thread. One thread serves a few thousand WebSockets.
fn signalling(
    (listener, connections, refused): (std::net::TcpListener, usize, Arc<AtomicU64>),
    state: ServerState,
    desk: LobbyDesk,
    (requests, media): (mpsc::Receiver<Input>, MediaEvents),
    stopped: oneshot::Receiver<()>,
) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    else {
        return;
    };
    runtime.block_on(async move {
        let Ok(listener) = tokio::net::TcpListener::from_std(listener) else {
            return;
        };
        let (events, heard) = mpsc::unbounded_channel();
        for (router, mut of_router) in media.into_iter().enumerate() {
            let events = events.clone();
            tokio::spawn(async move {
                while let Some(event) = of_router.recv().await {
                    let _ = events.send((router, event));
                }
            });
        }
        let limits = Limits {
            connections,
            head_timeout: http::HEAD_TIMEOUT,
            // A client answers our ping every ten seconds. So a client that sends nothing for the
            // idle timeout is gone, even if its kernel still accepts our data.
            sending_is_life: false,
            refused,
        };
        // The sender is never used: the server ends with its thread.
        let (_running, never) = watch::channel(false);
        let http = tokio::spawn(http::serve(listener, None, routes(state), limits, never));
        tokio::spawn(desk.run(requests, heard));
        // The sender is only dropped, never used: in both cases the server must stop.
        let _ = stopped.await;
        http.abort();
    });
}

fn routes(state: ServerState) -> Router {
    Router::new()
        .route("/", get(websocket::health))
        .route("/rtc", get(websocket::dual))
        .route("/rtc/validate", get(websocket::validate_dual))
        .route("/rtc/v1", get(websocket::single))
        .route("/rtc/v1/validate", get(websocket::validate_single))
        .route("/twirp/livekit.RoomService/{method}", post(rooms::serve))
        .route("/metrics", get(metrics::serve))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(state)
}

/// The lobby, its clients' queues and the routers.
struct LobbyDesk {
    lobby: Lobby,
    epoch: Epoch,
    workers: Arc<Vec<RouterWorker>>,
    /// Looked up, never iterated.
    clients: HashMap<ConnectionId, ClientOutbox>,
    slow_readers: u64,
    refused_connections: Arc<AtomicU64>,
}

impl LobbyDesk {
    async fn run(
        mut self,
        mut requests: mpsc::Receiver<Input>,
        mut media: mpsc::UnboundedReceiver<(usize, MediaEvent)>,
    ) {
        loop {
            let deadline = self.lobby.next_timeout();
            let timer = tokio::time::sleep_until(tokio::time::Instant::from_std(
                self.epoch.instant(deadline.min(self.far())),
            ));
            tokio::select! {
                biased;
                Some((router, event)) = media.recv() => self.lobby.handle_media(router, event, self.epoch.now()),
                input = requests.recv() => match input {
                    Some(input) => self.handle_input(input),
                    None => return,
                },
                () = timer => {}
            }
            let now = self.epoch.now();
            if self.lobby.next_timeout() <= now {
                self.lobby.handle_timeout(now);
            }
            self.drain(now);
        }
    }

    /// A bound for the timer, which cannot be set to the end of time.
    fn far(&self) -> Time {
        self.epoch.now() + Duration::from_secs(3600)
    }

    fn handle_input(&mut self, input: Input) {
        let now = self.epoch.now();
        match input {
            Input::Enter {
                entry,
                messages,
                reply,
            } => {
                let connection = self.lobby.handle_entry(*entry, now);
                self.clients.insert(connection, messages);
                let _ = reply.send(connection);
            }
            Input::Request {
                connection,
                request,
                room,
            } => {
                self.lobby.handle_request(connection, *request, now);
                drop(room);
            }
            Input::Disconnect { connection } => {
                self.clients.remove(&connection);
                self.lobby.handle_disconnect(connection, now);
            }
            Input::Call(call) => call(self, now),
        }
    }

    fn drain(&mut self, now: Time) {
        while let Some(output) = self.lobby.poll_output() {
            match output {
                LobbyOutput::Send {
                    connection,
                    message,
                } => self.send(connection, message, now),
                LobbyOutput::Close { connection } => {
                    // The client's task writes what is queued, and then closes.
                    self.clients.remove(&connection);
                }
                LobbyOutput::Media { router, command } => {
                    if let Some(worker) = self.workers.get(router) {
                        worker.command(command);
                    }
                }
            }
        }
    }

    fn send(&mut self, connection: ConnectionId, message: Bytes, now: Time) {
        let Some(client) = self.clients.get(&connection) else {
            return;
        };
        match client.send(message) {
            Ok(()) => {}
            Err(UnsentMessage::Full) => {
                warn!("a client does not read what it is sent: its signalling is closed");
                self.slow_readers += 1;
                self.clients.remove(&connection);
                self.lobby.handle_disconnect(connection, now);
            }
            // The client's task is gone and reports that itself.
            Err(UnsentMessage::Closed) => {}
        }
    }

    fn statistics(&self) -> ServerStatistics {
        ServerStatistics {
            lobby: self.lobby.statistics(),
            media: media_statistics(&self.workers),
            slow_readers: self.slow_readers,
            refused_connections: self.refused_connections.load(Relaxed),
        }
    }
}
