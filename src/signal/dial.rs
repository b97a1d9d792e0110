//! Connects to a server, from its name to the WebSocket: choice of address, proxy, TLS, and
//! upgrade. Each step has its own fault, and its own text for a timeout.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use http::{HeaderMap, HeaderValue, header};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::access::TokenOrigin;
use super::answer::{AnswerFault, AnsweredBy, AskedAt, AskedFor, HttpAnswer};
use super::client::{DroppedUpgrade, ProtocolFault, SignalError};
use super::head::{AnswerHead, NoHead};
use super::link::{LinkEnd, LinkFault, LinkStage, causes, plain};
use super::route::ProxyRoute;
use super::{Endpoint, Secret, probe, trust};

/// Time after which the next address is tried beside one that has not answered (RFC 8305, section
/// 5).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// Time limit for the check of a name's addresses. Possibly none of them answers.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);
/// Number of addresses of a name that are used.
const ADDRESSES_MAX: usize = 32;
/// Longest wait for the text of a refusal.
pub(super) const REFUSAL_TEXT_WAIT: Duration = Duration::from_secs(1);

/// Time limit of a connection: when it must be established, and how long that was from the start.
#[derive(Clone, Copy, Debug)]
pub struct DialDeadline {
    at: tokio::time::Instant,
    after: Duration,
}

impl DialDeadline {
    pub fn after(after: Duration) -> DialDeadline {
        DialDeadline {
            at: tokio::time::Instant::now() + after,
            after,
        }
    }

    async fn keep<T>(
        self,
        end: LinkEnd<'_>,
        stage: LinkStage,
        work: impl Future<Output = Result<T, SignalError>>,
    ) -> Result<T, SignalError> {
        self.or_else(work, || end.slow(stage, self.after).into())
            .await
    }

    /// Ends `work` at the deadline, with this fault.
    async fn or_else<T>(
        self,
        work: impl Future<Output = Result<T, SignalError>>,
        late: impl FnOnce() -> SignalError,
    ) -> Result<T, SignalError> {
        let done = tokio::time::timeout_at(self.at, work).await;
        done.unwrap_or_else(|_| Err(late()))
    }
}

/// The addresses of a name, and how each has done.
#[derive(Debug)]
pub struct Addresses {
    all: Vec<AddressBook>,
    /// Turn of the next connection. Connections take turns, so that they spread over the addresses.
    next: AtomicUsize,
}

#[derive(Debug)]
struct AddressBook {
    address: SocketAddr,
    opened: AtomicU32,
    /// Whether the last attempt to connect failed. Such addresses are tried last.
    is_away: AtomicBool,
    why: Mutex<Option<String>>,
}

/// One address of a server, and its result so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressUse {
    pub address: SocketAddr,
    pub connections: u32,
    /// Why the last attempt to connect failed.
    pub fault: Option<String>,
}

impl AddressBook {
    fn note(&self, opened: &io::Result<TcpStream>) {
        match opened {
            Ok(_) => {
                self.opened.fetch_add(1, Ordering::Relaxed);
                self.is_away.store(false, Ordering::Relaxed);
            }
            Err(error) => self.note_away(plain(error)),
        }
    }

    fn note_away(&self, why: String) {
        self.is_away.store(true, Ordering::Relaxed);
        *self.why.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
    }

    /// Notes that a later attempt to another address was faster.
    fn note_overtaken(&self) {
        if self.opened.load(Ordering::Relaxed) == 0 {
            self.note_away(format!("no answer within {} ms", ATTEMPT_DELAY.as_millis()));
        }
    }
}

impl Addresses {
    fn new(mut addresses: Vec<SocketAddr>) -> Addresses {
        let mut seen = Vec::new();
        addresses.retain(|address| {
            let is_new = !seen.contains(address);
            seen.push(*address);
            is_new
        });
        addresses.truncate(ADDRESSES_MAX);
        let book = |address| AddressBook {
            address,
            opened: AtomicU32::new(0),
            is_away: AtomicBool::new(false),
            why: Mutex::new(None),
        };
        Addresses {
            all: addresses.into_iter().map(book).collect(),
            next: AtomicUsize::new(0),
        }
    }

    /// Returns how each address has been used.
    pub fn uses(&self) -> Vec<AddressUse> {
        let used = |book: &AddressBook| AddressUse {
            address: book.address,
            connections: book.opened.load(Ordering::Relaxed),
            fault: book
                .is_away
                .load(Ordering::Relaxed)
                .then(|| {
                    book.why
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .clone()
                })
                .flatten(),
        };
        self.all.iter().map(used).collect()
    }

    /// Returns all addresses. Those whose last attempt failed come last.
    pub(super) fn there(&self) -> Vec<SocketAddr> {
        self.in_turn(0)
            .into_iter()
            .map(|book| book.address)
            .collect()
    }

    /// Returns all addresses in the order for the connection with this turn. Those whose last
    /// attempt failed come last.
    fn in_turn(&self, turn: usize) -> Vec<&AddressBook> {
        let (mut there, away): (Vec<_>, Vec<_>) = self
            .all
            .iter()
            .partition(|book| !book.is_away.load(Ordering::Relaxed));
        if !there.is_empty() {
            let turn = turn % there.len();
            there.rotate_left(turn);
        }
        there.extend(away);
        there
    }

    /// Opens a connection to the next address in turn. Shortly after, it tries the following ones
    /// as well.
    async fn open(&self) -> io::Result<TcpStream> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let mut waiting = self.in_turn(turn).into_iter();
        let mut trying = Vec::new();
        let mut attempts = FuturesUnordered::new();
        let mut failure = io::Error::other("the name has no address");
        loop {
            if let Some(book) = waiting.next() {
                trying.push(book);
                attempts.push(async move { (book, connect(book.address).await) });
            } else if attempts.is_empty() {
                return Err(failure);
            }
            let pause = tokio::time::sleep(ATTEMPT_DELAY);
            let has_more = waiting.len() > 0;
            tokio::pin!(pause);
            while !attempts.is_empty() {
                let (book, opened) = tokio::select! {
                    Some(done) = attempts.next() => done,
                    () = &mut pause, if has_more => break,
                };
                book.note(&opened);
                match opened {
                    Ok(stream) => {
                        let overtaken = trying
                            .iter()
                            .take_while(|before| before.address != book.address);
                        overtaken
                            .filter(|before| !before.is_away.load(Ordering::Relaxed))
                            .for_each(|before| before.note_overtaken());
                        return Ok(stream);
                    }
                    Err(error) => failure = error,
                }
                if has_more {
                    break;
                }
            }
        }
    }

    /// Checks which of several addresses answer, so that no join waits for one that does not.
    async fn look(&self) {
        if self.all.len() < 2 {
            return;
        }
        let mut looks: FuturesUnordered<_> = self
            .all
            .iter()
            .map(|book| async move { (book, connect(book.address).await) })
            .collect();
        let deadline = tokio::time::sleep(LOOK_TIMEOUT);
        tokio::pin!(deadline);
        let mut silent: Vec<SocketAddr> = self.all.iter().map(|book| book.address).collect();
        loop {
            let (book, opened) = tokio::select! {
                done = looks.next() => match done {
                    Some(done) => done,
                    None => return,
                },
                () = &mut deadline => break,
            };
            silent.retain(|address| *address != book.address);
            match opened {
                Ok(_) => deadline
                    .as_mut()
                    .reset(tokio::time::Instant::now() + ATTEMPT_DELAY),
                Err(error) => book.note_away(plain(&error)),
            }
        }
        let silent = self
            .all
            .iter()
            .filter(|book| silent.contains(&book.address));
        silent.for_each(AddressBook::note_overtaken);
    }
}

async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

impl Endpoint {
    /// Looks the name up once and keeps the addresses, so that no later connection asks (or times)
    /// a name server. If there are several, it checks which of them answer.
    ///
    /// # Errors
    /// Returns why the name, the proxy or the trusted certificates cannot be used.
    pub async fn resolve(mut self) -> Result<Endpoint, SignalError> {
        if self.secure() {
            trust::must_be_usable()?;
        }
        let addresses = Arc::new(self.look_up().await?);
        addresses.look().await;
        self.addresses = Some(addresses);
        Ok(self)
    }

    /// Returns the proxy on the way to the server.
    pub fn proxy(&self) -> Result<Option<ProxyRoute>, SignalError> {
        Ok(ProxyRoute::to(&self.http_url(""))?)
    }

    /// Looks up the server's addresses, or the proxy's.
    async fn look_up(&self) -> Result<Addresses, SignalError> {
        let proxy = self.proxy()?;
        let (host, port) = match &proxy {
            Some(proxy) => (proxy.host(), proxy.port()),
            None => (self.host(), self.url.port()),
        };
        let failed = |cause: String| match &proxy {
            Some(proxy) => SignalError::from(proxy.away(cause)),
            None => SignalError::Link(LinkFault::Resolve {
                host: host.to_owned(),
                cause,
            }),
        };
        let found = tokio::net::lookup_host((host, port)).await;
        let found: Vec<SocketAddr> = found.map_err(|error| failed(plain(&error)))?.collect();
        if found.is_empty() {
            Err(failed("the name has no address".into()))
        } else {
            Ok(Addresses::new(found))
        }
    }

    async fn open(&self) -> Result<TcpStream, SignalError> {
        let opened = match &self.addresses {
            Some(addresses) => addresses.open().await,
            None => Box::pin(self.look_up()).await?.open().await,
        };
        let Err(error) = opened else {
            return Ok(opened.expect("it is no error"));
        };
        Err(match self.proxy()? {
            Some(proxy) => proxy.away(plain(&error)).into(),
            None => self.end(&self.to_string()).unreachable(&error).into(),
        })
    }

    pub(super) fn end<'a>(&self, endpoint: &'a str) -> LinkEnd<'a> {
        LinkEnd {
            endpoint,
            secure: self.secure(),
        }
    }
}

/// A connection to the server on which nothing has been sent yet. Our own address is known by now,
/// so the media description in a join can name it.
pub struct Dialled<'a> {
    endpoint: &'a Endpoint,
    transport: TcpOrTls,
    deadline: DialDeadline,
    pub(super) tcp: Duration,
    pub(super) tls: Option<Duration>,
    /// The address by which this host reaches the server.
    pub local_ip: IpAddr,
}

impl<'d> Dialled<'d> {
    /// # Errors
    /// Returns an error if nothing answers, TLS fails or its certificate is not trusted, or
    /// `deadline` passes.
    pub async fn dial(
        endpoint: &'d Endpoint,
        deadline: DialDeadline,
    ) -> Result<Dialled<'d>, SignalError> {
        let name = endpoint.to_string();
        let end = endpoint.end(&name);
        let started = Instant::now();
        let proxy = endpoint.proxy()?;
        // Boxed, because thousands do this at once: code that few need must not enlarge every
        // waiting future.
        let stream = match &proxy {
            None => {
                let opening = Box::pin(endpoint.open());
                deadline.keep(end, LinkStage::Connect, opening).await?
            }
            Some(proxy) => Box::pin(dial_proxy(endpoint, proxy, deadline)).await?,
        };
        let tcp = started.elapsed();
        let local = stream.local_addr();
        let local = local.map_err(|error| end.unreachable(&error))?;
        let (transport, tls) = if endpoint.secure() {
            let started = Instant::now();
            let agreeing = Box::pin(connect_tls(endpoint, end, stream));
            let stream = deadline.keep(end, LinkStage::Tls, agreeing).await?;
            (TcpOrTls::Tls(Box::new(stream)), Some(started.elapsed()))
        } else {
            (TcpOrTls::Plain(stream), None)
        };
        Ok(Dialled {
            endpoint,
            transport,
            deadline,
            tcp,
            tls,
            local_ip: local.ip(),
        })
    }

    /// Opens a WebSocket at `path`, with the token where the gateway settings place it. Returns the
    /// connection, and the bytes that followed the answer.
    pub(super) async fn upgrade(
        mut self,
        path: &str,
        whose: (&Secret, TokenOrigin),
    ) -> Result<(TcpOrTls, Vec<u8>), SignalError> {
        let name = self.endpoint.to_string();
        let end = self.endpoint.end(&name);
        let deadline = self.deadline;
        let upgrading = Box::pin(async {
            let key = generate_key();
            let request = self.request(path, whose.0, &key)?;
            let sent = self.transport.write_all(&request).await;
            drop(request);
            let flushed = match sent {
                Ok(()) => self.transport.flush().await,
                Err(error) => Err(error),
            };
            // A server that refuses before it has read everything has already sent its answer.
            let head = AnswerHead::read(&mut self.transport).await;
            let head = head.map_err(|none| no_head(none, flushed.err(), end))?;
            Box::pin(self.judge(head, path, whose, &key)).await
        });
        deadline
            .keep(end, LinkStage::UpgradeAnswer, upgrading)
            .await
    }

    fn request(&self, path: &str, token: &Secret, key: &str) -> Result<Vec<u8>, SignalError> {
        let url: http::Uri = self.endpoint.http_url("").parse().map_err(|_| {
            let why = "the address cannot be written into a request";
            ProtocolFault::WebSocket(why.into())
        })?;
        let gateway = &self.endpoint.gateway;
        let prefix = url.path().trim_end_matches('/');
        let host = url.authority().map_or("", |authority| authority.as_str());
        let mut headers = HeaderMap::new();
        gateway.add_to(&mut headers, Some(token))?;
        let mut request = format!(
            "GET {prefix}{} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n",
            gateway.path(path, token)
        )
        .into_bytes();
        write_headers(&mut request, &headers);
        Ok(request)
    }

    async fn judge(
        mut self,
        mut head: AnswerHead,
        path: &str,
        whose: (&Secret, TokenOrigin),
        key: &str,
    ) -> Result<(TcpOrTls, Vec<u8>), SignalError> {
        if head.status == 101 {
            let accepted = head.headers.get(header::SEC_WEBSOCKET_ACCEPT);
            return if accepted.is_some_and(|accept| *accept == derive_accept_key(key.as_bytes())) {
                Ok((self.transport, head.rest))
            } else {
                let why = "its answer is to another request than ours";
                Err(ProtocolFault::WebSocket(why.into()).into())
            };
        }
        let body = head.body(&mut self.transport).await;
        let path = path.split('?').next().unwrap_or(path);
        let answer = HttpAnswer {
            status: head.status,
            headers: &head.headers,
            body: &body,
        };
        let fault = AnswerFault::of(
            &answer,
            &AskedAt {
                what: AskedFor::Signalling,
                url: &self.endpoint.http_url(path),
                path,
                secret: Some(whose.0),
            },
        );
        let is_silent = body.trim_ascii().is_empty();
        let error = SignalError::of_answer(fault, self.endpoint, path, whose);
        match error {
            SignalError::NotFound { path, text, .. } if is_silent => Err(SignalError::NotFound {
                dropped: self.dropped(&path, &head).await,
                path,
                text,
            }),
            other => Err(other),
        }
    }

    /// Returns what keeps WebSockets from a server that has the path. LiveKit answers a request
    /// that is none with 404 and no text, as it does where a proxy takes the Upgrade header away.
    async fn dropped(&self, path: &str, head: &AnswerHead) -> Option<DroppedUpgrade> {
        let endpoint = self.endpoint;
        let asked = endpoint.serves_signalling.get_or_init(|| async {
            let served = probe::has(endpoint, &format!("{path}/validate")).await;
            served == probe::ServedPath::There
        });
        asked.await.then(|| DroppedUpgrade {
            path: path.to_owned(),
            status: head.status,
            by: AnsweredBy::of(&head.headers).to_string(),
        })
    }
}

/// Connects to the server through the proxy.
async fn dial_proxy(
    endpoint: &Endpoint,
    proxy: &ProxyRoute,
    deadline: DialDeadline,
) -> Result<TcpStream, SignalError> {
    let after = deadline.after;
    let late = || proxy.away(format!("no answer within {} s", after.as_secs_f64()));
    let mut stream = deadline.or_else(endpoint.open(), || late().into()).await?;
    let asking = tunnel(&mut stream, proxy, endpoint);
    let silent = || proxy.silent(&target_of(endpoint), after);
    deadline.or_else(asking, || silent().into()).await?;
    Ok(stream)
}

/// Returns the server's host and port as `CONNECT` takes them.
fn target_of(endpoint: &Endpoint) -> String {
    let host = endpoint.host();
    if host.contains(':') {
        format!("[{host}]:{}", endpoint.url.port())
    } else {
        format!("{host}:{}", endpoint.url.port())
    }
}

fn write_headers(request: &mut Vec<u8>, headers: &HeaderMap) {
    for (name, value) in headers {
        request.extend_from_slice(name.as_str().as_bytes());
        request.extend_from_slice(b": ");
        request.extend_from_slice(value.as_bytes());
        request.extend_from_slice(b"\r\n");
    }
    request.extend_from_slice(b"\r\n");
}

fn no_head(none: NoHead, unsent: Option<io::Error>, end: LinkEnd<'_>) -> SignalError {
    let fault = match none {
        NoHead::NotHttp(bytes) => end.not_http(&bytes),
        NoHead::Ended => end.hung_up(
            unsent.map_or_else(|| "the connection ended".to_owned(), |error| plain(&error)),
        ),
        NoHead::Io(error) => tls_of(&error).map_or_else(
            || end.hung_up(plain(&error)),
            // With TLS 1.3, a server rejects our side of the handshake only in its first answer.
            |tls| end.tls(tls),
        ),
    };
    fault.into()
}

/// Returns the TLS error inside an I/O error of a TLS stream.
fn tls_of(error: &io::Error) -> Option<&rustls::Error> {
    let inner = error.get_ref()?;
    inner
        .downcast_ref()
        .or_else(|| causes(inner).find_map(|cause| cause.downcast_ref()))
}

/// Opens a tunnel to the server with `CONNECT` (RFC 9110, section 9.3.6).
async fn tunnel(
    stream: &mut TcpStream,
    proxy: &ProxyRoute,
    endpoint: &Endpoint,
) -> Result<(), SignalError> {
    let target = target_of(endpoint);
    let mut headers = HeaderMap::new();
    if let Some(authorization) = proxy.authorization() {
        headers.insert(header::PROXY_AUTHORIZATION, authorization.clone());
    }
    headers.insert(header::USER_AGENT, HeaderValue::from_static("throng"));
    let mut request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n").into_bytes();
    write_headers(&mut request, &headers);
    let sent = stream.write_all(&request).await;
    sent.map_err(|error| proxy.away(plain(&error)))?;
    let head = AnswerHead::read(stream).await.map_err(|none| match none {
        NoHead::NotHttp(_) => proxy.refused(&target, "its answer is no HTTP"),
        NoHead::Ended => proxy.refused(&target, "it hung up"),
        NoHead::Io(error) => proxy.refused(&target, plain(&error)),
    })?;
    match head.status {
        200..300 => Ok(()),
        407 => Err(proxy
            .refused(
                &target,
                "407: it wants a name and a password, as http://NAME:PASSWORD@HOST",
            )
            .into()),
        status => {
            let reason = http::StatusCode::from_u16(status).ok();
            let reason = reason.and_then(|status| status.canonical_reason());
            Err(proxy
                .refused(
                    &target,
                    format!("{status} {}", reason.unwrap_or_default()).trim_end(),
                )
                .into())
        }
    }
}

async fn connect_tls(
    endpoint: &Endpoint,
    end: LinkEnd<'_>,
    stream: TcpStream,
) -> Result<TlsStream<TcpStream>, SignalError> {
    let name = rustls::pki_types::ServerName::try_from(endpoint.host().to_owned());
    let name = name.map_err(|_| LinkFault::Resolve {
        host: endpoint.host().to_owned(),
        cause: "no certificate can have this name".into(),
    })?;
    let connector = tokio_rustls::TlsConnector::from(trust::tls_config()?);
    connector.connect(name, stream).await.map_err(|error| {
        let fault = match tls_of(&error) {
            Some(tls) => end.tls(tls),
            None => end.hung_up(plain(&error)),
        };
        fault.into()
    })
}

/// A TCP connection, plain or under TLS.
pub(super) enum TcpOrTls {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for TcpOrTls {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            TcpOrTls::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            TcpOrTls::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for TcpOrTls {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            TcpOrTls::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            TcpOrTls::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            TcpOrTls::Plain(stream) => Pin::new(stream).poll_flush(cx),
            TcpOrTls::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            TcpOrTls::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            TcpOrTls::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketType, bind, getsockname, listen, socket};

    fn run<T>(test: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(test)
    }

    /// Returns an address that neither accepts nor refuses connections while the second value
    /// lives: its queue is full, and the kernel drops further attempts.
    fn silent() -> (SocketAddr, impl Sized) {
        let listener = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        bind(&listener, &"127.0.0.1:0".parse::<SocketAddr>().unwrap()).unwrap();
        listen(&listener, 0).unwrap();
        let address = SocketAddr::try_from(getsockname(&listener).unwrap()).unwrap();
        let patience = Duration::from_millis(100);
        let mut queued = Vec::new();
        while let Ok(stream) = std::net::TcpStream::connect_timeout(&address, patience) {
            queued.push(stream);
        }
        (address, (listener, queued))
    }

    fn refusing(host: &str) -> SocketAddr {
        let held = std::net::TcpListener::bind((host, 0)).unwrap();
        held.local_addr().unwrap()
    }

    fn uses(addresses: &Addresses) -> Vec<(u32, bool)> {
        let uses = addresses.uses();
        uses.iter()
            .map(|used| (used.connections, used.fault.is_some()))
            .collect()
    }

    #[test]
    fn connections_are_spread_over_the_addresses_that_are_there() {
        let listeners: [std::net::TcpListener; 3] =
            std::array::from_fn(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let mut all: Vec<SocketAddr> = listeners
            .iter()
            .map(|listener| listener.local_addr().unwrap())
            .collect();
        all.push(refusing("127.0.0.2"));
        // Some name servers list every address twice.
        let addresses = Addresses::new([all.clone(), all].concat());
        run(async {
            for _ in 0..12 {
                addresses.open().await.unwrap();
            }
        });
        let uses = uses(&addresses);
        assert_eq!(uses.len(), 4);
        assert_eq!(uses[3], (0, true));
        assert_eq!(uses.iter().map(|used| used.0).sum::<u32>(), 12);
        assert!(
            uses[..3].iter().all(|used| (3..=5).contains(&used.0)),
            "{uses:?}"
        );
    }

    #[test]
    fn a_silent_address_costs_a_moment_once() {
        let (dead, _held) = silent();
        let there = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let both = vec![dead, there.local_addr().unwrap()];
        // The first connection finds out which address answers.
        let addresses = Addresses::new(both.clone());
        let started = Instant::now();
        run(addresses.open()).unwrap();
        assert!(started.elapsed() >= ATTEMPT_DELAY);
        assert_eq!(uses(&addresses), [(0, true), (1, false)]);
        assert_eq!(addresses.there(), [both[1], both[0]]);
        // The check finds it out before any connection.
        let addresses = Addresses::new(both.clone());
        run(addresses.look());
        assert_eq!(uses(&addresses), [(0, true), (0, false)]);
        assert_eq!(addresses.there()[0], both[1]);
    }

    #[test]
    fn each_step_that_meets_silence_has_a_fault_of_its_own() {
        let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = held.local_addr().unwrap().port();
        let deadline = || DialDeadline::after(Duration::from_millis(300));
        let endpoint = |scheme: &str| -> Endpoint {
            let url = format!("{scheme}://127.0.0.1:{port}");
            url.parse().unwrap()
        };
        let secure = endpoint("wss");
        let tls = run(async { Dialled::dial(&secure, deadline()).await.err() });
        let tls = tls.unwrap().to_string();
        assert!(tls.contains("did not answer the TLS handshake"), "{tls}");
        let proxy = ProxyRoute::named(&format!("http://127.0.0.1:{port}"));
        let plain = endpoint("ws");
        let tunnel = run(async { dial_proxy(&plain, &proxy, deadline()).await.err() });
        let tunnel = tunnel.unwrap().to_string();
        assert!(
            tunnel.contains(&format!(
                "the proxy http://127.0.0.1:{port} (HTTP_PROXY) took the"
            )) && tunnel.contains(&format!("its answer about 127.0.0.1:{port} did not come")),
            "{tunnel}"
        );
        let (dead, _held) = silent();
        let unreached: Endpoint = format!("ws://{dead}").parse().unwrap();
        let away = run(async { dial_proxy(&unreached, &proxy, deadline()).await.err() });
        let away = away.unwrap().to_string();
        assert!(
            away.contains("cannot be reached (no answer within 0.3 s)"),
            "{away}"
        );
    }

    #[test]
    fn where_no_address_is_there_the_last_fault_is_told() {
        let addresses = Addresses::new(vec![refusing("127.0.0.2"), refusing("127.0.0.3")]);
        let error = run(addresses.open()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        run(addresses.look());
        assert_eq!(uses(&addresses), [(0, true), (0, true)]);
    }
}
