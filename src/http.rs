//! The HTTP port of every server that this program runs: how many connections may be open, how long
//! a request may take to arrive, and which connection is closed when there is no room for one more.
//!
//! A connection is a *stranger's* until one of its requests was answered with something other than
//! a refusal. Strangers have no claim to a place: if all places are taken, the connection that has
//! been a stranger for longest is closed, and one address has only a part of the places for its
//! strangers. So sockets that send nothing, or send a head byte by byte, keep out nobody who sends
//! a request at once.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::process::{Resource, getrlimit};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep, timeout};
use tokio_rustls::TlsAcceptor;

/// Number of files that are not for connections: media sockets, logs, and what a runtime needs for
/// itself. Without a spare one, a connection could not even be refused.
const FILES_KEPT: u64 = 64;
/// Time that a head may take ([`Limits::head_timeout`]), unless a test sets less.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(20);
const TLS_TIMEOUT: Duration = Duration::from_secs(10);
/// Time after which a connection is closed on which nothing moves although something should.
const STANDSTILL_MAX: Duration = Duration::from_secs(60);
/// Time for answers that are under way when the server stops.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Time that a stranger's task takes to hear that it is to end.
const EVICTION_TIMEOUT: Duration = Duration::from_secs(1);
/// Strangers from one address may hold one in this many of all places.
const STRANGERS_SHARE: usize = 4;

/// Limits of a server.
pub struct Limits {
    /// Maximum number of open connections. It is lower if this process may open fewer files.
    pub connections: usize,
    /// Time for a request's head, from when the connection is ready for it.
    pub head_timeout: Duration,
    /// Whether bytes that we send also show that the connection is alive. Otherwise only the
    /// client's bytes do.
    pub sending_is_life: bool,
    /// Number of connections that were closed for lack of a place, strangers' connections included.
    pub refused: Arc<AtomicU64>,
}

/// Serves until `stop` changes or its sender is gone. Then it ends what is under way.
pub async fn serve(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    routes: Router,
    limits: Limits,
    mut stop: watch::Receiver<bool>,
) {
    let hall = Arc::new(Hall::new(&limits));
    let mut connections = JoinSet::new();
    loop {
        let (stream, address) = tokio::select! {
            accepted = accept(&listener) => accepted,
            _ = stop.changed() => break,
            Some(_) = connections.join_next() => continue,
        };
        let Some(guest) = hall.admit(address).await else {
            continue;
        };
        let (routes, tls, stop) = (routes.clone(), tls.clone(), stop.clone());
        let (sending_is_life, head_timeout) = (limits.sending_is_life, limits.head_timeout);
        connections.spawn(async move {
            let leave = guest.leave.clone();
            let stream = WatchedStream::new(stream, sending_is_life, guest.place.clone());
            tokio::select! {
                () = connection(stream, tls, routes, (guest, head_timeout), stop) => {}
                () = leave.notified() => {}
            }
        });
    }
    let _ = timeout(CLOSE_TIMEOUT, async {
        while connections.join_next().await.is_some() {}
    })
    .await;
}

async fn accept(listener: &TcpListener) -> (TcpStream, IpAddr) {
    loop {
        match listener.accept().await {
            // An IPv4 address that arrives over IPv6 is the same address.
            Ok((stream, address)) => return (stream, address.ip().to_canonical()),
            // The process has no files left for a moment.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn connection(
    stream: WatchedStream,
    tls: Option<TlsAcceptor>,
    routes: Router,
    (guest, head_timeout): (Guest, Duration),
    mut stop: watch::Receiver<bool>,
) {
    let stream: Box<dyn ByteStream> = match tls {
        None => Box::new(stream),
        Some(tls) => match timeout(TLS_TIMEOUT, tls.accept(stream)).await {
            Ok(Ok(stream)) => Box::new(stream),
            Ok(Err(_)) | Err(_) => return,
        },
    };
    let routes = TowerToHyperService::new(routes);
    let service = service_fn(|request| {
        guest.set_stranger(false);
        let answer = routes.call(request);
        async {
            let answer = answer.await;
            if answer
                .as_ref()
                .is_ok_and(|answer| answer.status().is_client_error())
            {
                guest.set_stranger(true);
            }
            answer
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head_timeout)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(connection);
    tokio::select! {
        // A client's error is its own affair.
        _ = connection.as_mut() => return,
        _ = stop.changed() => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = connection.await;
}

/// The places, and the strangers that hold some of them without a claim.
struct Hall {
    places: Arc<Semaphore>,
    strangers_of_one_max: usize,
    strangers: Mutex<Unclaimed>,
    refused: Arc<AtomicU64>,
}

/// Connections of strangers, in the order of their arrival.
#[derive(Default)]
struct Unclaimed {
    came: u64,
    all: BTreeMap<u64, (IpAddr, Arc<Notify>)>,
    by_address: HashMap<IpAddr, BTreeSet<u64>>,
}

impl Unclaimed {
    fn insert(&mut self, number: u64, address: IpAddr, leave: Arc<Notify>) {
        self.all.insert(number, (address, leave));
        self.by_address.entry(address).or_default().insert(number);
    }

    fn remove(&mut self, number: u64) -> Option<Arc<Notify>> {
        let (address, leave) = self.all.remove(&number)?;
        if let Some(of_one) = self.by_address.get_mut(&address) {
            of_one.remove(&number);
            if of_one.is_empty() {
                self.by_address.remove(&address);
            }
        }
        Some(leave)
    }

    fn evict(&mut self, number: Option<u64>) -> bool {
        let leave = number.and_then(|number| self.remove(number));
        leave.inspect(|leave| leave.notify_one()).is_some()
    }
}

impl Hall {
    fn new(limits: &Limits) -> Hall {
        let files = getrlimit(Resource::Nofile)
            .current
            .unwrap_or(u64::MAX)
            .saturating_sub(FILES_KEPT);
        let most = usize::try_from(files)
            .map_or(limits.connections, |files| limits.connections.min(files));
        Hall {
            places: Arc::new(Semaphore::new(most)),
            strangers_of_one_max: most.div_ceil(STRANGERS_SHARE),
            strangers: Mutex::default(),
            refused: limits.refused.clone(),
        }
    }

    /// Admits a connection from this address. Returns `None` if no place is free and no stranger
    /// can be evicted.
    async fn admit(self: &Arc<Hall>, address: IpAddr) -> Option<Guest> {
        let has_left = {
            let mut strangers = self.strangers();
            let of_one = strangers.by_address.get(&address);
            let too_many = of_one.filter(|of_one| of_one.len() >= self.strangers_of_one_max);
            let mut number = too_many.and_then(|of_one| of_one.first().copied());
            if number.is_none() && self.places.available_permits() == 0 {
                number = strangers.all.keys().next().copied();
            }
            strangers.evict(number)
        };
        // Either a stranger's connection is closed, or this one.
        if has_left {
            self.refused.fetch_add(1, Relaxed);
        }
        let place = match self.places.clone().try_acquire_owned() {
            Ok(place) => place,
            Err(_) if has_left => timeout(EVICTION_TIMEOUT, self.places.clone().acquire_owned())
                .await
                .ok()?
                .ok()?,
            Err(_) => {
                self.refused.fetch_add(1, Relaxed);
                return None;
            }
        };
        let number = {
            let mut strangers = self.strangers();
            strangers.came += 1;
            strangers.came
        };
        let guest = Guest {
            hall: self.clone(),
            number,
            address,
            leave: Arc::new(Notify::new()),
            place: Arc::new(place),
        };
        guest.set_stranger(true);
        Some(guest)
    }

    fn strangers(&self) -> std::sync::MutexGuard<'_, Unclaimed> {
        // The data behind the lock is consistent after each line.
        self.strangers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection's place.
struct Guest {
    hall: Arc<Hall>,
    number: u64,
    address: IpAddr,
    leave: Arc<Notify>,
    /// Also held by the socket, which outlives its connection if it becomes a WebSocket.
    place: Arc<OwnedSemaphorePermit>,
}

impl Guest {
    fn set_stranger(&self, is_stranger: bool) {
        let mut strangers = self.hall.strangers();
        if is_stranger {
            strangers.insert(self.number, self.address, self.leave.clone());
        } else {
            strangers.remove(self.number);
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.set_stranger(false);
    }
}

trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for S {}

/// A client's connection, which ends when nothing has moved for too long.
struct WatchedStream {
    stream: TcpStream,
    until: Pin<Box<Sleep>>,
    sending_is_life: bool,
    _place: Arc<OwnedSemaphorePermit>,
}

impl WatchedStream {
    fn new(
        stream: TcpStream,
        sending_is_life: bool,
        place: Arc<OwnedSemaphorePermit>,
    ) -> WatchedStream {
        // If the kernel cannot switch off Nagle's algorithm, the connection is slower, not wrong.
        let _ = stream.set_nodelay(true);
        WatchedStream {
            stream,
            until: Box::pin(tokio::time::sleep(STANDSTILL_MAX)),
            sending_is_life,
            _place: place,
        }
    }

    fn moved(&mut self) {
        self.until.as_mut().reset(Instant::now() + STANDSTILL_MAX);
    }

    fn stood_still<T>(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        ready!(self.until.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    fn written(
        &mut self,
        written: Poll<io::Result<usize>>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        match (written, self.sending_is_life) {
            (Poll::Ready(written), sending_is_life) => {
                if sending_is_life {
                    self.moved();
                }
                Poll::Ready(written)
            }
            (Poll::Pending, _) => self.stood_still(cx),
        }
    }
}

impl AsyncRead for WatchedStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        match Pin::new(&mut this.stream).poll_read(cx, buf) {
            Poll::Ready(read) => {
                this.moved();
                Poll::Ready(read)
            }
            Poll::Pending => this.stood_still(cx),
        }
    }
}

impl AsyncWrite for WatchedStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write(cx, buf);
        this.written(written, cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write_vectored(cx, bufs);
        this.written(written, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const PLACES: usize = 16;

    async fn server() -> (std::net::SocketAddr, Arc<AtomicU64>, watch::Sender<bool>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let refused = Arc::new(AtomicU64::new(0));
        let routes = Router::new()
            .route("/", get(|| async { "hello" }))
            .route("/secret", get(|| async { StatusCode::UNAUTHORIZED }));
        let limits = Limits {
            connections: PLACES,
            head_timeout: Duration::from_secs(1),
            sending_is_life: true,
            refused: refused.clone(),
        };
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(serve(listener, None, routes, limits, stopped));
        (address, refused, stop)
    }

    async fn ask(address: std::net::SocketAddr, path: &str) -> (TcpStream, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!("GET {path} HTTP/1.1\r\nHost: here\r\n\r\n");
        let mut answer = vec![0; 4_096];
        // A socket that the server has closed shows as an answer that does not arrive.
        let _ = stream.write_all(head.as_bytes()).await;
        let len = stream.read(&mut answer).await.unwrap_or(0);
        answer.truncate(len);
        (stream, String::from_utf8(answer).unwrap())
    }

    #[tokio::test]
    async fn sockets_that_send_no_whole_head_keep_nobody_out() {
        let (address, refused, _stop) = server().await;
        let mut slow = Vec::new();
        for at in 0..20 * PLACES {
            let mut stream = TcpStream::connect(address).await.unwrap();
            // Some send nothing, some send a part of a head.
            let _ = stream.write_all(&b"GET / HTTP/1.1\r\nX-"[..at % 18]).await;
            slow.push(stream);
            if at % 16 == 0 {
                assert!(ask(address, "/").await.1.contains("200 OK"), "after {at}");
            }
        }
        assert!(ask(address, "/").await.1.contains("200 OK"));
        // One address has a quarter of the places for its strangers.
        let left = slow.len() - PLACES / 4;
        assert!(
            refused.load(Relaxed) >= left as u64,
            "strangers went instead"
        );
    }

    #[tokio::test]
    async fn who_was_only_refused_is_a_stranger_still_and_who_was_served_keeps_its_place() {
        let (address, refused, _stop) = server().await;
        let mut turned_away = Vec::new();
        for _ in 0..2 * PLACES {
            let (stream, answer) = ask(address, "/secret").await;
            assert!(answer.contains("401"));
            turned_away.push(stream);
        }
        let mut served = Vec::new();
        for _ in 0..PLACES {
            let (stream, answer) = ask(address, "/").await;
            assert!(answer.contains("200 OK"));
            served.push(stream);
        }
        // All places now belong to connections that are no strangers.
        let before = refused.load(Relaxed);
        assert_eq!(ask(address, "/").await.1, "");
        assert_eq!(refused.load(Relaxed), before + 1);
        // These connections keep their places.
        for stream in &mut served {
            let head = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n";
            stream.write_all(head).await.unwrap();
            assert!(stream.read(&mut [0; 1_000]).await.unwrap() > 0);
        }
        drop(served.pop());
        for _ in 0..100 {
            if ask(address, "/").await.1.contains("200 OK") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("a place that was given back is not given on");
    }

    #[tokio::test]
    async fn a_head_that_is_dripped_has_its_time_and_no_more() {
        let (address, _, _stop) = server().await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        let began = Instant::now();
        let mut dripped = 0;
        while stream.write_all(b"x").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
            dripped += 1;
            assert!(dripped < 400, "a head without end is read on");
        }
        assert!(began.elapsed() >= Duration::from_millis(900));
    }
}
