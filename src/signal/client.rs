//! One participant's signalling connection: `SignalRequest` and `SignalResponse`
//! (livekit_rtc.proto), one per binary WebSocket message.
//!
//! Responses are decoded lazily. The field number is read by hand, and only what a participant acts
//! on goes through prost. Lists of participants grow with the square of a room, and a load engine
//! would otherwise only decode them.
//!
//! Memory per connection: a read buffer of [`READ_BUFFER_BYTES`], a write buffer that holds at most
//! one fragment of [`FRAGMENT_BYTES`], and what the kernel and TLS take. The WebSocket library
//! would keep the memory of its largest message for good, which is megabytes in a large room. Two
//! things prevent that: [`FrameReads`] hands the library one frame at a time, and the receiver
//! holds a large message for as long as the library could reuse its memory.

use std::future::poll_fn;
use std::io::{self, Write as _};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use base64::Engine as _;
use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use livekit_protocol::{self as proto, signal_request::Message as Request};
use prost::Message as _;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::{CapacityError, ProtocolError};
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error as WsError, Message};

use super::access::TokenOrigin;
use super::answer::{self, AnswerFault};
use super::dial::{DialDeadline, Dialled, TcpOrTls};
use super::gateway::UnsendableToken;
use super::given::Validity;
use super::link::{LinkFault, plain};
use super::refused::{RefusedToken, TokenRefusal, unix_now};
use super::route::ProxyFault;
use super::trust::UnusableTrust;
use super::{Endpoint, Secret};
use crate::plan::ClientIdentity;
use crate::transport::sdp::SECTIONS_MAX;
use crate::words;

/// Largest response that is read. A Join lists every participant at up to ~1.5 KB and an offer
/// takes ~1.8 KB a track, so 3,000 participants stay below 6 MB.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Largest response whose lists are decoded. An empty entry of two bytes may take a hundred in
/// memory. Of what a participant acts on, only descriptions and a Join's list of the others grow
/// with the room; a thousand speakers take 30 KB.
pub const LISTS_BYTES_MAX: usize = 256 << 10;
/// Longest wait for a server to take a request; after it the connection is lost.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// Size of the read buffer. Responses are smaller, except for offers and candidates.
pub const READ_BUFFER_BYTES: usize = 4 << 10;
/// Largest request that goes out as one frame. The library's write buffer never shrinks, so one
/// answer of 101 sections would stay in memory for good.
pub const FRAGMENT_BYTES: usize = 8 << 10;
/// Longest join request that is not compressed. It is part of the request line: proxies take 8 KiB,
/// and an offer of 150 sections has 65 KiB.
const PLAIN_JOIN_REQUEST_BYTES_MAX: usize = 3 << 10;

/// How a join went, phase by phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectTimes {
    /// Time of the TCP handshake, and of the name's look-up unless [`Endpoint::resolve`] did it
    /// before.
    pub tcp: Duration,
    pub tls: Option<Duration>,
    /// Time from the HTTP request to status 101. A LiveKit server starts the session in this time,
    /// before it upgrades.
    pub websocket: Duration,
}

impl ConnectTimes {
    pub fn total(&self) -> Duration {
        self.tcp + self.tls.unwrap_or_default() + self.websocket
    }
}

/// How a participant connects: two peer connections (`/rtc`) or one (`/rtc/v1`).
#[derive(Clone, Debug, Default)]
pub enum JoinMode {
    #[default]
    Dual,
    /// One connection. The join itself can carry tracks to add, and an offer `(sdp, id)` for them.
    Single {
        add_tracks: Vec<proto::AddTrackRequest>,
        publisher_offer: Option<(String, u32)>,
    },
}

impl JoinMode {
    /// One connection, whose join carries neither tracks nor an offer.
    pub const SINGLE: JoinMode = JoinMode::Single {
        add_tracks: Vec::new(),
        publisher_offer: None,
    };
}

/// Properties that a participant states when it joins.
#[derive(Clone, Debug)]
pub struct JoinOptions {
    pub auto_subscribe: bool,
    pub adaptive_stream: bool,
    /// Version of LiveKit's client protocol; 13 to 17 keep in-band data channels.
    pub protocol: i32,
    /// SDK that the client claims to be: `rust`, because with `go` the server holds a video track
    /// back until its first packet, and pads muted tracks.
    pub sdk: proto::client_info::Sdk,
    pub version: String,
    /// Operating system and browser of the client; empty where it tells none.
    pub os: String,
    pub browser: String,
    /// Without this the server strips the packet trailer (`LKTS`) from tracks that declare one.
    pub packet_trailer: bool,
    /// The participant's sid, to resume its session instead of joining.
    pub resume: Option<String>,
    /// Who made the token, for what is said where it is refused.
    pub token_from: TokenOrigin,
    pub connection: JoinMode,
    /// Time limit of name look-up, TCP, TLS and WebSocket together. A server may take several
    /// seconds to start a session under load.
    pub timeout: Duration,
}

impl Default for JoinOptions {
    fn default() -> JoinOptions {
        JoinOptions {
            auto_subscribe: true,
            adaptive_stream: false,
            protocol: 16,
            sdk: proto::client_info::Sdk::Rust,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            os: String::new(),
            browser: String::new(),
            packet_trailer: true,
            resume: None,
            token_from: TokenOrigin::Signed,
            connection: JoinMode::Dual,
            timeout: Duration::from_secs(20),
        }
    }
}

impl JoinOptions {
    /// Returns options with what a client tells of itself.
    pub fn of_client(client: &ClientIdentity) -> JoinOptions {
        let standard = JoinOptions::default();
        JoinOptions {
            protocol: client.protocol,
            sdk: proto::client_info::Sdk::from_str_name(client.sdk).unwrap_or(standard.sdk),
            version: client.version.map_or(standard.version, str::to_owned),
            os: client.os.to_owned(),
            browser: client.browser.to_owned(),
            ..standard
        }
    }

    /// Returns the path and query of the join, without the token, which travels in a header.
    pub fn path(&self) -> String {
        match &self.connection {
            JoinMode::Dual => format!("/rtc?{}", self.dual_query()),
            JoinMode::Single {
                add_tracks,
                publisher_offer,
            } => {
                let wrapped = wrapped(&self.join_request(add_tracks, publisher_offer.as_ref()));
                format!(
                    "/rtc/v1?join_request={}",
                    base64::engine::general_purpose::URL_SAFE
                        .encode(wrapped.encode_to_vec())
                        .replace('=', "%3D")
                )
            }
        }
    }

    fn dual_query(&self) -> String {
        let flag = |on: bool| if on { "1" } else { "0" };
        let mut query = url::form_urlencoded::Serializer::new(String::new());
        query.append_pair("protocol", &self.protocol.to_string());
        query.append_pair("sdk", &self.sdk.as_str_name().to_ascii_lowercase());
        query.append_pair("version", &self.version);
        for (name, value) in [("os", &self.os), ("browser", &self.browser)] {
            if !value.is_empty() {
                query.append_pair(name, value);
            }
        }
        query.append_pair("auto_subscribe", flag(self.auto_subscribe));
        query.append_pair("adaptive_stream", flag(self.adaptive_stream));
        if self.packet_trailer {
            query.append_pair(
                "capabilities",
                proto::client_info::Capability::CapPacketTrailer.as_str_name(),
            );
        }
        if let Some(sid) = &self.resume {
            query.append_pair("reconnect", "1").append_pair("sid", sid);
        }
        query.finish()
    }

    fn join_request(
        &self,
        add_tracks: &[proto::AddTrackRequest],
        offer: Option<&(String, u32)>,
    ) -> proto::JoinRequest {
        let capabilities = if self.packet_trailer {
            vec![proto::client_info::Capability::CapPacketTrailer.into()]
        } else {
            Vec::new()
        };
        let client_info = proto::ClientInfo {
            sdk: self.sdk.into(),
            version: self.version.clone(),
            protocol: self.protocol,
            os: self.os.clone(),
            browser: self.browser.clone(),
            capabilities,
            ..Default::default()
        };
        // Here `auto_subscribe` is false unless it is set, unlike in the query for two connections.
        let settings = proto::ConnectionSettings {
            auto_subscribe: self.auto_subscribe,
            adaptive_stream: self.adaptive_stream,
            ..Default::default()
        };
        proto::JoinRequest {
            client_info: Some(client_info),
            connection_settings: Some(settings),
            add_track_requests: add_tracks.to_vec(),
            publisher_offer: offer.map(|(sdp, id)| description("offer", sdp.clone(), *id)),
            reconnect: self.resume.is_some(),
            participant_sid: self.resume.clone().unwrap_or_default(),
            ..Default::default()
        }
    }
}

/// Returns a join request in the form that a URL carries. A long one is zipped, because the
/// sections of an offer are much alike.
fn wrapped(request: &proto::JoinRequest) -> proto::WrappedJoinRequest {
    let plain = request.encode_to_vec();
    let is_long = plain.len() > PLAIN_JOIN_REQUEST_BYTES_MAX;
    // Writing to memory does not fail.
    let zipped = is_long.then(|| zipped(&plain).ok()).flatten();
    let (compression, join_request) = match zipped {
        Some(zipped) => (proto::wrapped_join_request::Compression::Gzip, zipped),
        None => (proto::wrapped_join_request::Compression::None, plain),
    };
    proto::WrappedJoinRequest {
        compression: compression.into(),
        join_request,
    }
}

fn zipped(bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes)?;
    encoder.finish()
}

/// Returns what it means that a path of the server does not exist, and what to do.
fn not_found(path: &str, text: &str, dropped: Option<&DroppedUpgrade>) -> String {
    if let Some(dropped) = dropped {
        return dropped.to_string();
    }
    if let Some(advice) = answer::advice_on(text) {
        return format!("the server refused the join (404: {text}): {advice}");
    }
    let advice = match text {
        "404 page not found" | "Not Found" if path.ends_with("/rtc/v1") => {
            "an old LiveKit server has no single connections, so --connection auto or dual is needed; otherwise check that this is a LiveKit server, and its address"
        }
        "404 page not found" | "Not Found" => "is this a LiveKit server, and its address?",
        _ => "check the address, and that it is a LiveKit server's; its log may say more",
    };
    format!("{path} is not there (404: {text}): {advice}")
}

/// Returns what it means that the server opens no WebSocket, and what to do.
fn not_opened(status: u16, text: &str) -> String {
    match answer::advice_on(text) {
        Some(advice) => format!("the server refused the join ({status}: {text}): {advice}"),
        None => format!(
            "the server answered {status} ({text}) instead of opening a WebSocket: check the address; if it is a LiveKit server's, its log says why"
        ),
    }
}

fn failed(status: u16, text: &str) -> String {
    let advice = answer::advice_on(text).unwrap_or("see its log");
    format!("the server failed ({status}: {text}): {advice}")
}

/// Something in front of the server passes requests on, but no WebSockets.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the server has {path}, and got no WebSocket request for it ({status}), because {by} in front of it passes the Upgrade header not on: where that is nginx, its location needs these three lines: proxy_http_version 1.1; proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection \"upgrade\";"
)]
pub struct DroppedUpgrade {
    pub path: String,
    pub status: u16,
    pub by: String,
}

/// Why what a server sends on its WebSocket is not what a LiveKit server sends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolFault {
    #[error("the server does not keep to the WebSocket protocol ({0})")]
    WebSocket(String),
    #[error(
        "what answers there is no LiveKit server: its first message is {0}, and LiveKit's is a Join (protobuf, in a binary message): check the address, and what it leads to"
    )]
    NotLiveKit(String),
}

/// Why there is no signalling connection, or no longer one. Each message says what to do; none
/// repeats a token.
#[derive(Debug, thiserror::Error)]
pub enum SignalError {
    /// There is no HTTP answer.
    #[error(transparent)]
    Link(#[from] LinkFault),
    /// Something other than the server answered.
    #[error(transparent)]
    Answer(AnswerFault),
    #[error(transparent)]
    Proxy(#[from] ProxyFault),
    #[error(transparent)]
    Trust(#[from] UnusableTrust),
    #[error(transparent)]
    Unauthorized(RefusedToken),
    /// The token carries the grant, so the server has not seen the token.
    #[error(
        "the server saw no token that lets us join ({status}: {text}): where something in front of it takes the Authorization header away, add --token-in query; a token that was given needs the grant roomJoin for its room"
    )]
    TokenUnseen { status: u16, text: String },
    #[error("{}", not_found(path, text, dropped.as_ref()))]
    NotFound {
        path: String,
        text: String,
        /// Set where the path is there for requests that are no WebSocket's.
        dropped: Option<DroppedUpgrade>,
    },
    #[error("{}", failed(*.status, text))]
    Server { status: u16, text: String },
    #[error("{}", not_opened(*.status, text))]
    Http { status: u16, text: String },
    #[error("nothing gave a room token within {} s", after.as_secs())]
    NoTokenInTime { after: Duration },
    #[error("the server did not answer a resume within {} s", after.as_secs())]
    NotResumed { after: Duration },
    /// The connection ended without a `Leave` and without a close frame.
    #[error("the signalling connection was lost ({cause})")]
    Lost { cause: String },
    #[error("the signalling connection is closed")]
    Closed,
    #[error(
        "the server sent a message of {bytes} bytes, more than the {MESSAGE_BYTES_MAX} that are read: is the room too large?"
    )]
    TooLarge { bytes: usize },
    #[error(transparent)]
    Protocol(#[from] ProtocolFault),
}

impl SignalError {
    /// Returns what an answer other than status 101 means for a join with this token.
    pub(super) fn of_answer(
        fault: AnswerFault,
        endpoint: &Endpoint,
        path: &str,
        (token, token_from): (&Secret, TokenOrigin),
    ) -> SignalError {
        let AnswerFault::Own { status, text, .. } = fault else {
            return match fault {
                AnswerFault::SpeaksTls { .. } => LinkFault::TlsMismatch {
                    endpoint: endpoint.to_string(),
                    server_speaks_tls: true,
                }
                .into(),
                other => SignalError::Answer(other),
            };
        };
        match status {
            401 | 403 if says_nothing_was_seen(&text) => SignalError::TokenUnseen { status, text },
            401 | 403 => SignalError::Unauthorized(RefusedToken::ByServer(TokenRefusal {
                status,
                text,
                origin: token_from,
                validity: Validity::of(token),
                now: unix_now(),
            })),
            404 => SignalError::NotFound {
                path: path.to_owned(),
                text,
                dropped: None,
            },
            500.. => SignalError::Server { status, text },
            _ => SignalError::Http { status, text },
        }
    }

    /// Returns the pause that a rate limit asks for: `None` if this is no rate limit, `Some(None)`
    /// if the limit names no pause.
    pub fn limit(&self) -> Option<Option<Duration>> {
        match self {
            SignalError::Answer(fault) => fault.limit(),
            _ => None,
        }
    }
}

/// Whether the text is LiveKit's answer to a request without a token, or with something else in its
/// place.
pub(super) fn says_nothing_was_seen(text: &str) -> bool {
    [
        "permissions denied",
        "no permissions to access the room",
        "Must start with Bearer",
    ]
    .iter()
    .any(|words| text.contains(words))
}

impl From<UnsendableToken> for SignalError {
    fn from(error: UnsendableToken) -> SignalError {
        SignalError::Unauthorized(error.into())
    }
}

/// Opens a participant's signalling connection. The server's first message is `SignalEvent::Join`
/// (or `SignalEvent::Reconnect` after a resume).
///
/// The token appears in no error, whatever the server answers.
pub async fn connect(
    endpoint: &Endpoint,
    token: &Secret,
    options: &JoinOptions,
) -> Result<(SignalSender, SignalReceiver, ConnectTimes), SignalError> {
    let deadline = DialDeadline::after(options.timeout);
    // Boxed, so that the state for dialling is not kept for as long as the connection lasts.
    let dialled = Box::pin(Dialled::dial(endpoint, deadline)).await?;
    dialled.join(token, options).await
}

impl Dialled<'_> {
    /// Continues as [`connect`] does, within the time limit that was set when dialling.
    pub async fn join(
        self,
        token: &Secret,
        options: &JoinOptions,
    ) -> Result<(SignalSender, SignalReceiver, ConnectTimes), SignalError> {
        let started = Instant::now();
        let (tcp, tls) = (self.tcp, self.tls);
        let whose = (token, options.token_from);
        let (transport, leftover) = Box::pin(self.upgrade(&options.path(), whose)).await?;
        let websocket = WebSocketStream::from_raw_socket(
            FrameReads::new(transport, leftover),
            Role::Client,
            Some(websocket_config()),
        )
        .await;
        let (sink, stream) = websocket.split();
        let times = ConnectTimes {
            tcp,
            tls,
            websocket: started.elapsed(),
        };
        Ok((
            SignalSender { sink },
            SignalReceiver {
                stream,
                held: None,
                bytes_received: 0,
                has_spoken: false,
                closed: false,
            },
            times,
        ))
    }
}

fn websocket_config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER_BYTES)
        .write_buffer_size(0)
        .max_message_size(Some(MESSAGE_BYTES_MAX))
        .max_frame_size(Some(MESSAGE_BYTES_MAX))
}

fn lost(error: WsError) -> SignalError {
    match error {
        WsError::ConnectionClosed | WsError::AlreadyClosed => SignalError::Closed,
        WsError::Capacity(CapacityError::MessageTooLong { size, .. }) => {
            SignalError::TooLarge { bytes: size }
        }
        WsError::Io(error) => SignalError::Lost {
            cause: plain(&error),
        },
        WsError::Protocol(
            ProtocolError::ResetWithoutClosingHandshake | ProtocolError::HandshakeIncomplete,
        ) => SignalError::Lost {
            cause: "the server hung up".into(),
        },
        other => ProtocolFault::WebSocket(other.to_string()).into(),
    }
}

/// Returns what is wrong with a server's first message, if no LiveKit server sends it. From then on
/// a message that cannot be read is skipped.
fn foreign(message: &[u8], event: &SignalEvent) -> Option<String> {
    /// Number above those of all messages that a server has.
    const KINDS_MAX: u32 = 64;
    let is_foreign = match event {
        // Where its kind can be told, it says more than this does.
        SignalEvent::Malformed { kind, .. } => essential_name(*kind).is_none(),
        SignalEvent::Ignored { kind, .. } => *kind > KINDS_MAX || !holds_a_message(message),
        _ => false,
    };
    is_foreign.then(|| match message.len() {
        0 => "empty".to_owned(),
        len => format!("{len} bytes that cannot be read"),
    })
}

/// Whether the first field is length-delimited, as all messages are that a server begins with.
fn holds_a_message(message: &[u8]) -> bool {
    split_field(message).is_some_and(|(_, bytes, _)| bytes.is_some())
}

/// The sending half. Await each send in full: a send that is cancelled half-way leaves the
/// connection unusable.
pub struct SignalSender {
    sink: SplitSink<WebSocketStream<FrameReads>, Message>,
}

impl SignalSender {
    /// Sends our offer for the publisher connection.
    pub async fn offer(&mut self, sdp: String, id: u32) -> Result<(), SignalError> {
        self.send(Request::Offer(description("offer", sdp, id)))
            .await
    }

    /// Sends our answer to the subscriber offer with the same `id`.
    pub async fn answer(&mut self, sdp: String, id: u32) -> Result<(), SignalError> {
        self.send(Request::Answer(description("answer", sdp, id)))
            .await
    }

    /// Sends one of our candidates, as `RTCIceCandidateInit` JSON, for the connection `target`.
    pub async fn trickle(
        &mut self,
        target: proto::SignalTarget,
        candidate_init: String,
    ) -> Result<(), SignalError> {
        self.send(Request::Trickle(proto::TrickleRequest {
            candidate_init,
            target: target.into(),
            r#final: false,
        }))
        .await
    }

    /// Announces a track. `SignalEvent::TrackPublished` with the same `cid` follows; only then may
    /// an offer contain the track.
    pub async fn add_track(&mut self, request: proto::AddTrackRequest) -> Result<(), SignalError> {
        self.send(Request::AddTrack(request)).await
    }

    /// Asks for a `SignalEvent::Pong` that returns `timestamp_us`, so that its reader knows the
    /// signalling round trip. `rtt` is the last one known.
    pub async fn ping(&mut self, timestamp_us: i64, rtt: Duration) -> Result<(), SignalError> {
        self.send(Request::PingReq(proto::Ping {
            timestamp: timestamp_us,
            rtt: i64::try_from(rtt.as_millis()).unwrap_or(i64::MAX),
        }))
        .await
    }

    /// Sends our view of the session after a resume.
    pub async fn sync_state(&mut self, state: proto::SyncState) -> Result<(), SignalError> {
        self.send(Request::SyncState(state)).await
    }

    /// Ends the session at once for everybody. A connection that is only dropped leaves a ghost in
    /// the room for some 20 seconds.
    pub async fn leave(&mut self) -> Result<(), SignalError> {
        let reason = proto::DisconnectReason::ClientInitiated.into();
        self.send(Request::Leave(proto::LeaveRequest {
            reason,
            ..Default::default()
        }))
        .await
    }

    /// Sends any other request. The connection is lost if the server takes nothing for
    /// [`SEND_TIMEOUT`].
    pub async fn send(&mut self, message: Request) -> Result<(), SignalError> {
        tokio::time::timeout(SEND_TIMEOUT, self.send_whole(message))
            .await
            .map_err(|_| SignalError::Lost {
                cause: format!("the server read nothing for {SEND_TIMEOUT:?}"),
            })?
    }

    async fn send_whole(&mut self, message: Request) -> Result<(), SignalError> {
        let bytes = Bytes::from(
            proto::SignalRequest {
                message: Some(message),
            }
            .encode_to_vec(),
        );
        if bytes.len() <= FRAGMENT_BYTES {
            return self.sink.send(Message::Binary(bytes)).await.map_err(lost);
        }
        let fragments = bytes.len().div_ceil(FRAGMENT_BYTES);
        for index in 0..fragments {
            let start = index * FRAGMENT_BYTES;
            let fragment = bytes.slice(start..bytes.len().min(start + FRAGMENT_BYTES));
            let opcode = OpCode::Data(if index == 0 {
                Data::Binary
            } else {
                Data::Continue
            });
            self.sink
                .send(Message::Frame(Frame::message(
                    fragment,
                    opcode,
                    index + 1 == fragments,
                )))
                .await
                .map_err(lost)?;
        }
        Ok(())
    }
}

fn description(kind: &str, sdp: String, id: u32) -> proto::SessionDescription {
    proto::SessionDescription {
        r#type: kind.to_owned(),
        sdp,
        id,
        ..Default::default()
    }
}

/// The receiving half. Poll it at least every few seconds, because it answers the server's pings.
pub struct SignalReceiver {
    stream: SplitStream<WebSocketStream<FrameReads>>,
    /// The last large message, kept until the library has read on. While it lives, the library must
    /// allocate new memory for its read buffer.
    held: Option<Bytes>,
    bytes_received: u64,
    /// Whether a message has arrived.
    has_spoken: bool,
    closed: bool,
}

impl SignalReceiver {
    /// Returns the server's next message. Cancel-safe.
    pub async fn next(&mut self) -> Result<SignalEvent, SignalError> {
        while !self.closed {
            let Some(message) = poll_fn(|cx| self.poll_message(cx)).await else {
                break;
            };
            match message.map_err(lost)? {
                Message::Binary(bytes) => return self.receive(bytes),
                Message::Text(text) => return self.receive_text(&text),
                Message::Close(frame) => {
                    self.closed = true;
                    let (code, reason) = frame.map_or((None, String::new()), |frame| {
                        (Some(u16::from(frame.code)), words::one_line(&frame.reason))
                    });
                    return Ok(SignalEvent::Closed { code, reason });
                }
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
            }
        }
        Err(SignalError::Closed)
    }

    fn poll_message(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Message, WsError>>> {
        let polled = self.stream.poll_next_unpin(cx);
        self.held = None;
        polled
    }

    /// Returns the number of bytes in all messages so far.
    pub fn bytes_received(&self) -> u64 {
        self.bytes_received
    }

    fn receive(&mut self, bytes: Bytes) -> Result<SignalEvent, SignalError> {
        self.bytes_received += bytes.len() as u64;
        self.held = (bytes.len() > READ_BUFFER_BYTES).then(|| bytes.clone());
        let event = SignalEvent::decode(&bytes);
        let is_first = !std::mem::replace(&mut self.has_spoken, true);
        match is_first.then(|| foreign(&bytes, &event)).flatten() {
            Some(what) => Err(ProtocolFault::NotLiveKit(what).into()),
            None => Ok(event),
        }
    }

    /// LiveKit sends text only to who has sent it text, and we send none.
    fn receive_text(&mut self, text: &str) -> Result<SignalEvent, SignalError> {
        const SHOWN_MAX: usize = 60;
        if std::mem::replace(&mut self.has_spoken, true) {
            return Ok(SignalEvent::Malformed {
                kind: 0,
                len: text.len(),
            });
        }
        let shown: String = text.chars().take(SHOWN_MAX).collect();
        let shown = answer::stranger_text(&shown, None);
        Err(ProtocolFault::NotLiveKit(format!("the text '{shown}'")).into())
    }
}

/// A message of the server, decoded as far as a participant acts on it.
#[derive(Clone, Debug, PartialEq)]
pub enum SignalEvent {
    Join(Box<Join>),
    /// Offer for the subscriber connection (of two). The answer has the same `id` and is due within
    /// 15 s.
    Offer(Description),
    /// Answer to our offer with the same `id`.
    Answer(Description),
    Trickle(Trickle),
    TrackPublished {
        cid: String,
        track: Box<proto::TrackInfo>,
    },
    TrackUnpublished {
        track_sid: String,
    },
    /// Token with a later expiry, for a resume.
    RefreshToken(Secret),
    Leave(Leave),
    Pong {
        /// Timestamp that [`SignalSender::ping`] sent.
        timestamp_us: i64,
    },
    /// The server accepted a resume.
    Reconnect {
        ice_servers: Vec<IceServer>,
        /// Whether media must go through one of them.
        force_relay: bool,
    },
    /// Tracks that the server pauses for want of bandwidth, or resumes.
    StreamStates(Vec<proto::StreamStateInfo>),
    /// The watched layers of one of our tracks.
    SubscribedQuality(Box<proto::SubscribedQualityUpdate>),
    /// With one connection: numbers of receiving sections that are missing.
    MediaSections {
        audio: u32,
        video: u32,
    },
    /// Speakers that began to speak, became louder or stopped.
    SpeakersChanged(Vec<proto::SpeakerInfo>),
    /// The server mutes or unmutes one of our tracks.
    Mute {
        track_sid: String,
        muted: bool,
    },
    /// Participants that changed, undecoded. [`permission_of`] looks for one of them.
    ParticipantUpdate(Bytes),
    /// Result of a request of ours that was not simply granted.
    RequestResponse(Box<proto::RequestResponse>),
    /// The server cannot send us a track that we are to receive.
    SubscriptionResponse {
        track_sid: String,
        error: proto::SubscriptionError,
    },
    RoomMoved(RoomMoved),
    /// Message of a kind that a participant does not act on, undecoded: `SignalResponse`'s field
    /// number, and the length in bytes.
    Ignored {
        kind: u32,
        len: usize,
    },
    /// Message that cannot be decoded.
    Malformed {
        kind: u32,
        len: usize,
    },
    /// The server closed the WebSocket. Nothing follows.
    Closed {
        code: Option<u16>,
        reason: String,
    },
}

/// The server moved us to another room, where the session has another sid.
#[derive(Clone, Debug, PartialEq)]
pub struct RoomMoved {
    pub room: String,
    /// Token for a resume in the new room.
    pub token: Secret,
    pub participant_sid: String,
}

/// A session description, and its number.
#[derive(Clone, Debug, PartialEq)]
pub struct Description {
    pub sdp: String,
    pub id: u32,
}

/// One of the server's candidates, as JSON (see `transport::sdp::Trickled`).
#[derive(Clone, Debug, PartialEq)]
pub struct Trickle {
    pub target: proto::SignalTarget,
    pub candidate_init: String,
    /// Whether no more candidates follow for this target.
    pub last: bool,
}

/// The server's message that ends the session.
#[derive(Clone, Debug, PartialEq)]
pub struct Leave {
    pub action: proto::leave_request::Action,
    pub reason: proto::DisconnectReason,
    /// Addresses of other regions to try, nearest first.
    pub region_urls: Vec<String>,
}

/// A STUN or TURN server with its credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IceServer {
    pub urls: Vec<String>,
    pub username: String,
    pub credential: Secret,
}

/// The session as the server has opened it.
#[derive(Clone, Debug, PartialEq)]
pub struct Join {
    pub room_sid: String,
    pub room_name: String,
    pub participant_sid: String,
    pub identity: String,
    pub server_version: String,
    /// Whether the server is throng's embedded SFU. Its version is then throng's.
    pub embedded_sfu: bool,
    pub server_protocol: i32,
    pub server_region: String,
    /// Whether the subscriber connection must be up for the session to count as connected.
    pub subscriber_primary: bool,
    pub fast_publish: bool,
    /// Address at which to join instead. All other fields are empty then.
    pub alternative_url: String,
    pub ping_interval: Duration,
    pub ping_timeout: Duration,
    pub ice_servers: Vec<IceServer>,
    /// Whether media must go through one of them.
    pub force_relay: bool,
    pub others: OtherParticipants,
}

/// The participants that were there before us, undecoded. They keep the whole Join in memory, so
/// drop them soon.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct OtherParticipants {
    join: Bytes,
    count: usize,
}

impl OtherParticipants {
    pub fn len(&self) -> usize {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Returns them decoded. What cannot be decoded is left out.
    pub fn decoded(&self) -> impl Iterator<Item = proto::ParticipantInfo> + '_ {
        let others = Fields(&self.join)
            .map_while(Result::ok)
            .filter(|field| field.number == JOIN_OTHER_PARTICIPANTS);
        others.filter_map(|field| proto::ParticipantInfo::decode(field.bytes?).ok())
    }

    /// Returns their identities, in the server's order. Identities that are not UTF-8 are left out.
    pub fn identities(&self) -> impl Iterator<Item = &str> {
        let others = Fields(&self.join)
            .map_while(Result::ok)
            .filter(|field| field.number == JOIN_OTHER_PARTICIPANTS);
        others.filter_map(|field| {
            let identity = Fields(field.bytes?)
                .map_while(Result::ok)
                .find(|field| field.number == PARTICIPANT_IDENTITY)?;
            std::str::from_utf8(identity.bytes?).ok()
        })
    }
}

impl std::fmt::Debug for OtherParticipants {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "OtherParticipants({})", self.count)
    }
}

/// Field number of `JoinResponse.other_participants`.
const JOIN_OTHER_PARTICIPANTS: u32 = 3;
/// Field numbers of `SessionDescription.sdp` and `.mid_to_track_id`.
const DESCRIPTION_SDP: u32 = 2;
const DESCRIPTION_MID_TO_TRACK_ID: u32 = 4;
/// Field number of `ParticipantInfo.identity`.
const PARTICIPANT_IDENTITY: u32 = 2;

/// Field numbers of `SignalResponse` that are decoded.
mod response {
    pub const JOIN: u32 = 1;
    pub const ANSWER: u32 = 2;
    pub const OFFER: u32 = 3;
    pub const TRICKLE: u32 = 4;
    pub const TRACK_PUBLISHED: u32 = 6;
    pub const UPDATE: u32 = 5;
    pub const LEAVE: u32 = 8;
    pub const MUTE: u32 = 9;
    pub const SPEAKERS_CHANGED: u32 = 10;
    pub const STREAM_STATE_UPDATE: u32 = 13;
    pub const SUBSCRIBED_QUALITY_UPDATE: u32 = 14;
    pub const REFRESH_TOKEN: u32 = 16;
    pub const TRACK_UNPUBLISHED: u32 = 17;
    pub const RECONNECT: u32 = 19;
    pub const PONG_RESP: u32 = 20;
    pub const SUBSCRIPTION_RESPONSE: u32 = 21;
    pub const REQUEST_RESPONSE: u32 = 22;
    pub const ROOM_MOVED: u32 = 24;
    pub const MEDIA_SECTIONS_REQUIREMENT: u32 = 25;

    /// Whether this kind is decoded whole and may hold lists of messages.
    pub const fn has_lists(kind: u32) -> bool {
        matches!(
            kind,
            TRACK_PUBLISHED
                | LEAVE
                | SPEAKERS_CHANGED
                | SUBSCRIBED_QUALITY_UPDATE
                | RECONNECT
                | REQUEST_RESPONSE
        )
    }
}

/// Returns the name of a [`SignalEvent::Malformed`] kind without which a session cannot go on.
pub fn essential_name(kind: u32) -> Option<&'static str> {
    match kind {
        response::JOIN => Some("Join"),
        response::ANSWER => Some("Answer"),
        response::OFFER => Some("Offer"),
        _ => None,
    }
}

impl SignalEvent {
    /// Decodes one `SignalResponse`. It never fails: a broken message becomes
    /// [`SignalEvent::Malformed`].
    pub fn decode(message: &Bytes) -> SignalEvent {
        let Some(Ok(field)) = Fields(message).next() else {
            // The key of a truncated message may still tell its kind.
            let key = split_varint(message).map_or(0, |(key, _)| key >> 3);
            return SignalEvent::Malformed {
                kind: u32::try_from(key).unwrap_or(0),
                len: message.len(),
            };
        };
        let kind = field.number;
        let Some(body) = field.bytes else {
            return SignalEvent::Ignored {
                kind,
                len: message.len(),
            };
        };
        if body.len() > LISTS_BYTES_MAX && response::has_lists(kind) {
            return SignalEvent::Malformed {
                kind,
                len: message.len(),
            };
        }
        SignalEvent::decode_kind(kind, body, message).unwrap_or(SignalEvent::Malformed {
            kind,
            len: message.len(),
        })
    }

    fn decode_kind(kind: u32, body: &[u8], message: &Bytes) -> Option<SignalEvent> {
        Some(match kind {
            response::JOIN => SignalEvent::Join(Box::new(Join::decode(message.slice_ref(body))?)),
            response::ANSWER => SignalEvent::Answer(Description::decode(body)?),
            response::OFFER => SignalEvent::Offer(Description::decode(body)?),
            response::TRICKLE => SignalEvent::Trickle(Trickle::decode(body)?),
            response::TRACK_PUBLISHED => {
                let published = proto::TrackPublishedResponse::decode(body).ok()?;
                SignalEvent::TrackPublished {
                    cid: published.cid,
                    track: Box::new(published.track?),
                }
            }
            response::LEAVE => SignalEvent::Leave(Leave::decode(body)?),
            response::SPEAKERS_CHANGED => {
                SignalEvent::SpeakersChanged(proto::SpeakersChanged::decode(body).ok()?.speakers)
            }
            response::STREAM_STATE_UPDATE => SignalEvent::StreamStates(
                proto::StreamStateUpdate::decode(body).ok()?.stream_states,
            ),
            response::SUBSCRIBED_QUALITY_UPDATE => SignalEvent::SubscribedQuality(Box::new(
                proto::SubscribedQualityUpdate::decode(body).ok()?,
            )),
            response::REFRESH_TOKEN => {
                SignalEvent::RefreshToken(Secret::new(std::str::from_utf8(body).ok()?))
            }
            response::RECONNECT => {
                let again = proto::ReconnectResponse::decode(body).ok()?;
                SignalEvent::Reconnect {
                    force_relay: forces_relay(again.client_configuration.as_ref()),
                    ice_servers: again.ice_servers.into_iter().map(IceServer::from).collect(),
                }
            }
            response::PONG_RESP => SignalEvent::Pong {
                timestamp_us: proto::Pong::decode(body).ok()?.last_ping_timestamp,
            },
            response::MEDIA_SECTIONS_REQUIREMENT => {
                let sections = proto::MediaSectionsRequirement::decode(body).ok()?;
                SignalEvent::MediaSections {
                    audio: sections.num_audios,
                    video: sections.num_videos,
                }
            }
            _ => return SignalEvent::decode_moderation(kind, body, message),
        })
    }

    /// Decodes what the server does to a participant that is in the room.
    fn decode_moderation(kind: u32, body: &[u8], message: &Bytes) -> Option<SignalEvent> {
        Some(match kind {
            response::TRACK_UNPUBLISHED => SignalEvent::TrackUnpublished {
                track_sid: proto::TrackUnpublishedResponse::decode(body)
                    .ok()?
                    .track_sid,
            },
            response::MUTE => {
                let mute = proto::MuteTrackRequest::decode(body).ok()?;
                SignalEvent::Mute {
                    track_sid: mute.sid,
                    muted: mute.muted,
                }
            }
            response::UPDATE => SignalEvent::ParticipantUpdate(message.slice_ref(body)),
            response::REQUEST_RESPONSE => {
                SignalEvent::RequestResponse(Box::new(proto::RequestResponse::decode(body).ok()?))
            }
            response::SUBSCRIPTION_RESPONSE => {
                let response = proto::SubscriptionResponse::decode(body).ok()?;
                SignalEvent::SubscriptionResponse {
                    error: response.err(),
                    track_sid: response.track_sid,
                }
            }
            response::ROOM_MOVED => SignalEvent::RoomMoved(RoomMoved::decode(body)?),
            _ => SignalEvent::Ignored {
                kind,
                len: message.len(),
            },
        })
    }
}

impl Description {
    /// The map from mids to tracks grows with the room. Only its number of entries is checked,
    /// against the limit for descriptions; the SDP contains the same.
    fn decode(body: &[u8]) -> Option<Description> {
        let (mut sdp, mut mids, mut rest) = ("", 0, Vec::new());
        for field in Fields(body) {
            let field = field.ok()?;
            match (field.number, field.bytes) {
                (DESCRIPTION_SDP, Some(text)) => sdp = std::str::from_utf8(text).ok()?,
                (DESCRIPTION_MID_TO_TRACK_ID, _) if mids == SECTIONS_MAX => return None,
                (DESCRIPTION_MID_TO_TRACK_ID, _) => mids += 1,
                _ => rest.extend_from_slice(field.raw),
            }
        }
        let rest = proto::SessionDescription::decode(rest.as_slice()).ok()?;
        Some(Description {
            sdp: sdp.to_owned(),
            id: rest.id,
        })
    }
}

/// Returns one participant's permissions from an update of the server; `None` where it does not
/// contain them.
pub fn permission_of(
    participant_sid: &str,
    update: &[u8],
) -> Option<Box<proto::ParticipantPermission>> {
    const PARTICIPANTS: u32 = 1;
    const SID: u32 = 1;
    const PERMISSION: u32 = 11;
    let participants = Fields(update).map_while(Result::ok);
    let mut participants = participants
        .filter(|field| field.number == PARTICIPANTS)
        .filter_map(|field| field.bytes);
    let own = participants.find(|info| first(info, SID) == Some(participant_sid.as_bytes()))?;
    let permission = proto::ParticipantPermission::decode(first(own, PERMISSION)?).ok()?;
    Some(Box::new(permission))
}

/// Returns the content of the first field with that number.
fn first(message: &[u8], number: u32) -> Option<&[u8]> {
    let mut fields = Fields(message).map_while(Result::ok);
    fields.find(|field| field.number == number)?.bytes
}

impl RoomMoved {
    /// The other participants are not decoded, because there are as many as the room has.
    fn decode(body: &[u8]) -> Option<RoomMoved> {
        const ROOM: u32 = 1;
        const ROOM_NAME: u32 = 2;
        const TOKEN: u32 = 2;
        const PARTICIPANT: u32 = 3;
        const PARTICIPANT_SID: u32 = 1;
        let text = |bytes: &[u8]| std::str::from_utf8(bytes).ok().map(str::to_owned);
        Some(RoomMoved {
            room: text(first(first(body, ROOM)?, ROOM_NAME)?)?,
            token: Secret::new(&text(first(body, TOKEN)?)?),
            participant_sid: text(first(first(body, PARTICIPANT)?, PARTICIPANT_SID)?)?,
        })
    }
}

impl Trickle {
    fn decode(body: &[u8]) -> Option<Trickle> {
        let trickle = proto::TrickleRequest::decode(body).ok()?;
        Some(Trickle {
            target: trickle.target(),
            last: trickle.r#final,
            candidate_init: trickle.candidate_init,
        })
    }
}

impl Leave {
    fn decode(body: &[u8]) -> Option<Leave> {
        let leave = proto::LeaveRequest::decode(body).ok()?;
        let (action, reason) = (leave.action(), leave.reason());
        let region_urls = leave.regions.map_or(Vec::new(), |settings| {
            settings
                .regions
                .into_iter()
                .map(|region| region.url)
                .collect()
        });
        Some(Leave {
            action,
            reason,
            region_urls,
        })
    }
}

impl From<proto::IceServer> for IceServer {
    fn from(server: proto::IceServer) -> IceServer {
        IceServer {
            urls: server.urls,
            username: server.username,
            credential: Secret::new(server.credential),
        }
    }
}

fn forces_relay(configuration: Option<&proto::ClientConfiguration>) -> bool {
    configuration.is_some_and(|wanted| wanted.force_relay() == proto::ClientConfigSetting::Enabled)
}

impl Join {
    fn decode(body: Bytes) -> Option<Join> {
        let (rest, count) =
            without_other_participants(&body).filter(|(rest, _)| rest.len() <= LISTS_BYTES_MAX)?;
        let join = proto::JoinResponse::decode(rest.as_slice()).ok()?;
        let (room, me, server) = (
            join.room.unwrap_or_default(),
            join.participant.unwrap_or_default(),
            join.server_info.unwrap_or_default(),
        );
        let seconds = |count: i32| Duration::from_secs(u64::try_from(count).unwrap_or(0));
        Some(Join {
            room_sid: room.sid,
            room_name: room.name,
            participant_sid: me.sid,
            identity: me.identity,
            // Shown to people, so put on one line.
            server_version: words::one_line(if server.version.is_empty() {
                &join.server_version
            } else {
                &server.version
            }),
            embedded_sfu: server.node_id == crate::plan::EMBEDDED_NODE_ID,
            server_protocol: server.protocol,
            server_region: words::one_line(&server.region),
            subscriber_primary: join.subscriber_primary,
            fast_publish: join.fast_publish,
            alternative_url: join.alternative_url,
            ping_interval: seconds(join.ping_interval),
            ping_timeout: seconds(join.ping_timeout),
            ice_servers: join.ice_servers.into_iter().map(IceServer::from).collect(),
            force_relay: forces_relay(join.client_configuration.as_ref()),
            others: OtherParticipants {
                join: if count == 0 { Bytes::new() } else { body },
                count,
            },
        })
    }
}

/// Returns a `JoinResponse` without the list that grows with the room, and that list's length.
fn without_other_participants(join: &[u8]) -> Option<(Vec<u8>, usize)> {
    let (mut rest, mut count) = (Vec::new(), 0);
    for field in Fields(join) {
        let field = field.ok()?;
        match field.number {
            JOIN_OTHER_PARTICIPANTS => count += 1,
            _ => rest.extend_from_slice(field.raw),
        }
    }
    Some((rest, count))
}

/// Walks a protobuf message's fields without decoding them (protobuf encoding: key = number << 3 |
/// wire type).
struct Fields<'a>(&'a [u8]);

struct Field<'a> {
    number: u32,
    /// The field, including its key.
    raw: &'a [u8],
    /// Content, if the field is length-delimited.
    bytes: Option<&'a [u8]>,
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<Field<'a>, ()>;

    fn next(&mut self) -> Option<Self::Item> {
        let start = self.0;
        if start.is_empty() {
            return None;
        }
        let Some((number, bytes, rest)) = split_field(start) else {
            self.0 = &[];
            return Some(Err(()));
        };
        self.0 = rest;
        Some(Ok(Field {
            number,
            raw: start.get(..start.len() - rest.len())?,
            bytes,
        }))
    }
}

type SplitField<'a> = (u32, Option<&'a [u8]>, &'a [u8]);

/// Returns the field's number, its content if length-delimited, and the bytes after the field.
fn split_field(bytes: &[u8]) -> Option<SplitField<'_>> {
    let (key, rest) = split_varint(bytes)?;
    let number = u32::try_from(key >> 3).ok().filter(|number| *number != 0)?;
    match key & 7 {
        0 => Some((number, None, split_varint(rest)?.1)),
        1 => Some((number, None, rest.get(8..)?)),
        2 => {
            let (len, rest) = split_varint(rest)?;
            let (content, rest) = rest.split_at_checked(usize::try_from(len).ok()?)?;
            Some((number, Some(content), rest))
        }
        5 => Some((number, None, rest.get(4..)?)),
        _ => None,
    }
}

fn split_varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0u64;
    for (index, byte) in bytes.iter().take(10).enumerate() {
        value |= u64::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return Some((value, bytes.get(index + 1..)?));
        }
    }
    None
}

/// A transport whose reads end where a WebSocket frame's header or payload ends (RFC 6455, section
/// 5.2).
///
/// So the library never reads the next frame's first bytes into the memory of a large frame, where
/// they would keep all of it alive. This costs two or three short reads a message, and a
/// participant gets a few messages a second.
struct FrameReads {
    transport: TcpOrTls,
    phase: FramePhase,
    /// Bytes that came with the HTTP response and belong to frames.
    leftover: Vec<u8>,
}

enum FramePhase {
    Header {
        bytes: [u8; HEADER_BYTES_MAX],
        have: usize,
    },
    Payload {
        remaining: u64,
    },
}

/// Longest header of a frame without a mask; servers do not mask.
const HEADER_BYTES_MAX: usize = 10;

impl FrameReads {
    /// `leftover` are the bytes that followed the HTTP answer.
    fn new(transport: TcpOrTls, leftover: Vec<u8>) -> FrameReads {
        FrameReads {
            transport,
            phase: FramePhase::header(),
            leftover,
        }
    }

    fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
        limit: usize,
    ) -> Poll<io::Result<()>> {
        let space = buf.initialize_unfilled_to(limit.min(buf.remaining()));
        let count = if self.leftover.is_empty() {
            let mut part = ReadBuf::new(space);
            ready!(Pin::new(&mut self.transport).poll_read(cx, &mut part))?;
            part.filled().len()
        } else {
            self.take_leftover(space)
        };
        self.phase.advance(buf.initialize_unfilled_to(count));
        buf.advance(count);
        Poll::Ready(Ok(()))
    }

    fn take_leftover(&mut self, space: &mut [u8]) -> usize {
        let count = space.len().min(self.leftover.len());
        space
            .iter_mut()
            .zip(self.leftover.drain(..count))
            .for_each(|(slot, byte)| *slot = byte);
        if self.leftover.is_empty() {
            self.leftover = Vec::new();
        }
        count
    }
}

impl FramePhase {
    fn header() -> FramePhase {
        FramePhase::Header {
            bytes: [0; HEADER_BYTES_MAX],
            have: 0,
        }
    }

    /// Returns the largest number of bytes that the next read may take.
    fn limit(&self) -> usize {
        match self {
            FramePhase::Header { bytes, have } => header_len(bytes, *have) - have,
            FramePhase::Payload { remaining } => usize::try_from(*remaining).unwrap_or(usize::MAX),
        }
    }

    /// Accounts for bytes that were read, at most [`FramePhase::limit`].
    fn advance(&mut self, read: &[u8]) {
        match self {
            FramePhase::Header { bytes, have } => {
                bytes
                    .iter_mut()
                    .skip(*have)
                    .zip(read)
                    .for_each(|(slot, byte)| *slot = *byte);
                *have += read.len();
                if *have == header_len(bytes, *have) {
                    *self = FramePhase::payload(payload_len(bytes));
                }
            }
            FramePhase::Payload { remaining } => {
                *self = FramePhase::payload(remaining.saturating_sub(read.len() as u64))
            }
        }
    }

    fn payload(remaining: u64) -> FramePhase {
        if remaining == 0 {
            FramePhase::header()
        } else {
            FramePhase::Payload { remaining }
        }
    }
}

/// Returns the length of a frame's header of which `have` bytes are known: two, until the form of
/// the length is known.
fn header_len(bytes: &[u8; HEADER_BYTES_MAX], have: usize) -> usize {
    match bytes[1] & 0x7f {
        126 if have >= 2 => 4,
        127 if have >= 2 => 10,
        _ => 2,
    }
}

fn payload_len(header: &[u8; HEADER_BYTES_MAX]) -> u64 {
    let [_, short, a, b, c, d, e, f, g, h] = *header;
    match short & 0x7f {
        126 => u64::from(u16::from_be_bytes([a, b])),
        127 => u64::from_be_bytes([a, b, c, d, e, f, g, h]),
        short => u64::from(short),
    }
}

impl AsyncRead for FrameReads {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let limit = this.phase.limit();
        this.poll_frame(cx, buf, limit)
    }
}

impl AsyncWrite for FrameReads {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().transport).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().transport).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().transport).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::ClientKind;
    use tokio::net::TcpStream;

    type ServerSide = WebSocketStream<TcpStream>;

    fn run<T>(test: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(test)
    }

    fn response(message: proto::signal_response::Message) -> Bytes {
        proto::SignalResponse {
            message: Some(message),
        }
        .encode_to_vec()
        .into()
    }

    /// Returns a client, and the server's end of its connection.
    async fn connected() -> (SignalSender, SignalReceiver, ServerSide) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint: Endpoint = format!("ws://{}", listener.local_addr().unwrap())
            .parse()
            .unwrap();
        let accepting = async {
            let config = WebSocketConfig::default()
                .max_message_size(None)
                .max_frame_size(None)
                .write_buffer_size(0);
            tokio_tungstenite::accept_async_with_config(
                listener.accept().await.unwrap().0,
                Some(config),
            )
            .await
            .unwrap()
        };
        let (token, options) = (Secret::new("token"), JoinOptions::default());
        let (connected, server) = tokio::join!(connect(&endpoint, &token, &options), accepting);
        let (sender, receiver, times) = connected.unwrap();
        assert!(times.tls.is_none() && times.total() >= times.tcp);
        (sender, receiver, server)
    }

    /// Makes a Join to a room where `others` participants publish audio and video.
    fn join_to(others: usize) -> proto::JoinResponse {
        let track = |sid: String| proto::TrackInfo {
            sid,
            name: "n".repeat(100),
            mime_type: "video/VP8".into(),
            mid: "m".repeat(400),
            ..Default::default()
        };
        let other = |index: usize| proto::ParticipantInfo {
            sid: format!("PA_{index}"),
            identity: format!("p-{index}"),
            tracks: vec![track(format!("TR_a{index}")), track(format!("TR_v{index}"))],
            ..Default::default()
        };
        proto::JoinResponse {
            room: Some(proto::Room {
                sid: "RM_1".into(),
                name: "hall".into(),
                ..Default::default()
            }),
            participant: Some(proto::ParticipantInfo {
                sid: "PA_me".into(),
                identity: "me".into(),
                ..Default::default()
            }),
            other_participants: (0..others).map(other).collect(),
            subscriber_primary: true,
            ping_interval: 5,
            ping_timeout: 15,
            ice_servers: vec![proto::IceServer {
                urls: vec!["turn:x".into()],
                username: "u".into(),
                credential: "hunter2".into(),
            }],
            server_info: Some(proto::ServerInfo {
                version: "1.13.5".into(),
                protocol: 17,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn the_servers_wish_for_a_relay_is_read_at_the_join_and_after_a_resume() {
        use proto::signal_response::Message as Response;
        for (wanted, is_forced) in [
            (proto::ClientConfigSetting::Enabled, true),
            (proto::ClientConfigSetting::Disabled, false),
            (proto::ClientConfigSetting::Unset, false),
        ] {
            let client_configuration = Some(proto::ClientConfiguration {
                force_relay: wanted.into(),
                ..Default::default()
            });
            let join = proto::JoinResponse {
                client_configuration: client_configuration.clone(),
                ..join_to(0)
            };
            let SignalEvent::Join(join) = SignalEvent::decode(&response(Response::Join(join)))
            else {
                panic!("a Join is a Join");
            };
            assert_eq!(join.force_relay, is_forced);
            let again = Response::Reconnect(proto::ReconnectResponse {
                client_configuration,
                ..Default::default()
            });
            let heard = SignalEvent::decode(&response(again));
            let told = matches!(heard, SignalEvent::Reconnect { force_relay, .. } if force_relay == is_forced);
            assert!(told, "{heard:?}");
        }
    }

    #[test]
    fn what_a_server_calls_itself_moves_no_cursor() {
        let join = proto::JoinResponse {
            server_info: Some(proto::ServerInfo {
                version: "1.0\x1b[2J\nRESULT: PASS".into(),
                region: "\u{202e}moon".into(),
                ..Default::default()
            }),
            ..join_to(0)
        };
        let message = response(proto::signal_response::Message::Join(join));
        let SignalEvent::Join(join) = SignalEvent::decode(&message) else {
            panic!("a Join is a Join");
        };
        assert_eq!(
            (join.server_version.as_str(), join.server_region.as_str()),
            ("1.0 [2J RESULT: PASS", " moon")
        );
    }

    #[test]
    fn a_join_to_a_room_of_three_thousand_is_read_without_its_list() {
        let message = response(proto::signal_response::Message::Join(join_to(3_000)));
        assert!(
            message.len() > 3_000_000 && message.len() < MESSAGE_BYTES_MAX / 2,
            "{}",
            message.len()
        );
        let started = Instant::now();
        let SignalEvent::Join(join) = SignalEvent::decode(&message) else {
            panic!("no join")
        };
        eprintln!(
            "a Join of {} bytes is read in {:?}",
            message.len(),
            started.elapsed()
        );
        assert_eq!(
            (
                join.participant_sid.as_str(),
                join.identity.as_str(),
                join.room_name.as_str()
            ),
            ("PA_me", "me", "hall")
        );
        assert_eq!(
            (
                join.server_version.as_str(),
                join.server_protocol,
                join.subscriber_primary
            ),
            ("1.13.5", 17, true)
        );
        assert_eq!(
            (join.ping_interval, join.ping_timeout),
            (Duration::from_secs(5), Duration::from_secs(15))
        );
        assert_eq!(
            (
                join.others.len(),
                join.others.identities().count(),
                join.others.identities().nth(2_999)
            ),
            (3_000, 3_000, Some("p-2999"))
        );
        assert!(!format!("{join:?}").contains("hunter2"));
    }

    #[test]
    fn what_a_participant_acts_on_is_read_and_the_rest_is_not() {
        use proto::signal_response::Message as Response;
        let update = proto::ParticipantUpdate {
            participants: join_to(3).other_participants,
        };
        let leave = proto::LeaveRequest {
            reason: 5,
            action: 2,
            ..Default::default()
        };
        let speakers = proto::SpeakersChanged {
            speakers: vec![proto::SpeakerInfo::default(), proto::SpeakerInfo::default()],
        };
        let states = proto::StreamStateUpdate {
            stream_states: vec![proto::StreamStateInfo {
                track_sid: "TR_1".into(),
                state: proto::StreamState::Paused.into(),
                ..Default::default()
            }],
        };
        for (message, expected) in [
            (
                Response::RefreshToken("t".into()),
                SignalEvent::RefreshToken(Secret::new("t")),
            ),
            (
                Response::PongResp(proto::Pong {
                    last_ping_timestamp: 7,
                    timestamp: 8,
                }),
                SignalEvent::Pong { timestamp_us: 7 },
            ),
            (
                Response::SpeakersChanged(speakers.clone()),
                SignalEvent::SpeakersChanged(speakers.speakers),
            ),
            (
                Response::StreamStateUpdate(states.clone()),
                SignalEvent::StreamStates(states.stream_states),
            ),
            (
                Response::MediaSectionsRequirement(proto::MediaSectionsRequirement {
                    num_audios: 1,
                    num_videos: 2,
                }),
                SignalEvent::MediaSections { audio: 1, video: 2 },
            ),
            (
                Response::Leave(leave),
                SignalEvent::Leave(Leave {
                    action: proto::leave_request::Action::Reconnect,
                    reason: proto::DisconnectReason::RoomDeleted,
                    region_urls: Vec::new(),
                }),
            ),
            (Response::Pong(3), SignalEvent::Ignored { kind: 18, len: 3 }),
        ] {
            assert_eq!(SignalEvent::decode(&response(message)), expected);
        }
        // Participants that are not looked for are not decoded.
        let message = response(Response::Update(update));
        let SignalEvent::ParticipantUpdate(body) = SignalEvent::decode(&message) else {
            panic!("no update")
        };
        assert_eq!(permission_of("PA_1", &body), None);
    }

    #[test]
    fn what_a_server_does_to_a_participant_is_read() {
        use proto::signal_response::Message as Response;
        let of = |sid: &str, can_subscribe| proto::ParticipantInfo {
            sid: sid.into(),
            permission: Some(proto::ParticipantPermission {
                can_subscribe,
                ..Default::default()
            }),
            ..Default::default()
        };
        let refused = proto::RequestResponse {
            reason: proto::request_response::Reason::NotAllowed.into(),
            message: "no".into(),
            ..Default::default()
        };
        let moved = proto::RoomMovedResponse {
            room: Some(proto::Room {
                sid: "RM_2".into(),
                name: "annex".into(),
                ..Default::default()
            }),
            token: "t2".into(),
            participant: Some(of("PA_2", true)),
            other_participants: vec![of("PA_9", true); 3],
        };
        for (message, expected) in [
            (
                Response::Mute(proto::MuteTrackRequest {
                    sid: "TR_1".into(),
                    muted: true,
                }),
                SignalEvent::Mute {
                    track_sid: "TR_1".into(),
                    muted: true,
                },
            ),
            (
                Response::RequestResponse(refused.clone()),
                SignalEvent::RequestResponse(Box::new(refused)),
            ),
            (
                Response::SubscriptionResponse(proto::SubscriptionResponse {
                    track_sid: "TR_1".into(),
                    err: proto::SubscriptionError::SeCodecUnsupported.into(),
                }),
                SignalEvent::SubscriptionResponse {
                    track_sid: "TR_1".into(),
                    error: proto::SubscriptionError::SeCodecUnsupported,
                },
            ),
            (
                Response::RoomMoved(moved),
                SignalEvent::RoomMoved(RoomMoved {
                    room: "annex".into(),
                    token: Secret::new("t2"),
                    participant_sid: "PA_2".into(),
                }),
            ),
        ] {
            assert_eq!(SignalEvent::decode(&response(message)), expected);
        }
        let update = proto::ParticipantUpdate {
            participants: vec![of("PA_1", true), of("PA_2", false)],
        };
        let update = update.encode_to_vec();
        let may_subscribe = |sid| permission_of(sid, &update).map(|of| of.can_subscribe);
        assert_eq!(
            ["PA_1", "PA_2", "PA_3"].map(may_subscribe),
            [Some(true), Some(false), None]
        );
        (0..update.len()).for_each(|len| drop(permission_of("PA_2", &update[..len])));
    }

    #[test]
    fn broken_messages_are_said_to_be_broken_and_never_panic() {
        for bytes in [
            &b""[..],
            b"\x0a",
            b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
            b"\x0a\x02\x1a\x7f",
            b"\x00\x00",
            b"\x0b",
            b"\x82\x01\x01\xff",
        ] {
            assert!(
                matches!(
                    SignalEvent::decode(&Bytes::from_static(bytes)),
                    SignalEvent::Malformed { .. }
                ),
                "{bytes:?}"
            );
        }
        let whole = response(proto::signal_response::Message::Join(join_to(2)));
        let mut state = 0x5eed_u64;
        for _ in 0..20_000 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let (at, value) = ((state >> 33) as usize % whole.len(), (state >> 25) as u8);
            let mut bytes = whole.to_vec();
            bytes[at] = value;
            bytes.truncate(bytes.len() - (state >> 60) as usize);
            if let SignalEvent::Join(join) = SignalEvent::decode(&bytes.into()) {
                let _ = join.others.identities().count();
            }
        }
    }

    #[test]
    fn queries_and_join_requests_say_what_the_options_say() {
        let options = JoinOptions {
            auto_subscribe: false,
            resume: Some("PA_1&x".into()),
            version: "1 2".into(),
            ..Default::default()
        };
        let expected = "/rtc?protocol=16&sdk=rust&version=1+2&auto_subscribe=0&adaptive_stream=0&capabilities=CAP_PACKET_TRAILER&reconnect=1&sid=PA_1%26x";
        assert_eq!(options.path(), expected);
        let options = JoinOptions {
            adaptive_stream: true,
            ..JoinOptions::of_client(&ClientKind::Js.defaults().identity)
        };
        let expected = "/rtc?protocol=17&sdk=js&version=2.21.0&os=Linux&browser=Chrome&auto_subscribe=1&adaptive_stream=1&capabilities=CAP_PACKET_TRAILER";
        assert_eq!(options.path(), expected);
        for client in ClientKind::ALL {
            let identity = &client.defaults().identity;
            let options = JoinOptions::of_client(identity);
            let info = options.join_request(&[], None).client_info.unwrap();
            assert_eq!(info.sdk().as_str_name(), identity.sdk);
            let told = (info.protocol, info.os.as_str(), info.browser.as_str());
            assert_eq!(told, (identity.protocol, identity.os, identity.browser));
            let own = env!("CARGO_PKG_VERSION");
            assert_eq!(info.version, identity.version.unwrap_or(own));
        }

        let publisher_offer = Some(("v=0".to_owned(), 1));
        let path = joining_with(publisher_offer).path();
        let parameter = path
            .strip_prefix("/rtc/v1?join_request=")
            .unwrap()
            .replace("%3D", "=");
        let wrapped = base64::engine::general_purpose::URL_SAFE
            .decode(parameter)
            .unwrap();
        let request = proto::JoinRequest::decode(
            proto::WrappedJoinRequest::decode(&*wrapped)
                .unwrap()
                .join_request
                .as_slice(),
        )
        .unwrap();
        assert!(request.connection_settings.unwrap().auto_subscribe && !request.reconnect);
        assert_eq!(request.publisher_offer.unwrap().sdp, "v=0");
    }

    fn joining_with(publisher_offer: Option<(String, u32)>) -> JoinOptions {
        JoinOptions {
            connection: JoinMode::Single {
                add_tracks: Vec::new(),
                publisher_offer,
            },
            ..Default::default()
        }
    }

    #[test]
    fn a_long_join_request_is_zipped_so_that_it_fits_a_request_line() {
        use std::io::Read as _;
        let sections: String = (0..150)
            .map(|mid| {
                format!(
                    "m=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:{mid}\r\n{}",
                    "a=rtcp-rsize\r\n".repeat(30)
                )
            })
            .collect();
        let path = joining_with(Some((sections.clone(), 1))).path();
        assert!(path.len() < 8 << 10, "{}", path.len());
        let parameter = path
            .strip_prefix("/rtc/v1?join_request=")
            .unwrap()
            .replace("%3D", "=");
        let wrapped = base64::engine::general_purpose::URL_SAFE
            .decode(parameter)
            .unwrap();
        let wrapped = proto::WrappedJoinRequest::decode(&*wrapped).unwrap();
        assert_eq!(
            wrapped.compression(),
            proto::wrapped_join_request::Compression::Gzip
        );
        let mut plain = Vec::new();
        flate2::read::GzDecoder::new(&*wrapped.join_request)
            .read_to_end(&mut plain)
            .unwrap();
        assert_eq!(
            proto::JoinRequest::decode(&*plain)
                .unwrap()
                .publisher_offer
                .unwrap()
                .sdp,
            sections
        );
    }

    #[test]
    fn a_servers_ping_is_answered_by_reading() {
        run(async {
            let (_sender, mut receiver, mut server) = connected().await;
            server
                .send(Message::Ping(Bytes::from_static(b"beat")))
                .await
                .unwrap();
            let reading = tokio::spawn(async move { receiver.next().await });
            assert_eq!(
                server.next().await.unwrap().unwrap(),
                Message::Pong(Bytes::from_static(b"beat"))
            );
            reading.abort();
        });
    }

    #[test]
    fn messages_of_every_length_form_arrive_however_they_are_cut() {
        use tokio::io::AsyncWriteExt;
        run(async {
            let (_sender, mut receiver, server) = connected().await;
            let mut socket = server.into_inner();
            let lengths = [0usize, 1, 125, 126, 127, 4_096, 65_535, 65_536, 100_000, 3];
            // Without a first message of LiveKit's, the connection would end at the next.
            let first = response(proto::signal_response::Message::RefreshToken("t".into()));
            let mut wire = vec![0x82, first.len() as u8];
            wire.extend_from_slice(&first);
            for len in lengths {
                let mut message = vec![0x82];
                match len {
                    0..126 => message.push(len as u8),
                    126..65_536 => {
                        message.extend([&[126][..], &(len as u16).to_be_bytes()].concat())
                    }
                    _ => message.extend([&[127][..], &(len as u64).to_be_bytes()].concat()),
                }
                wire.extend(message);
                wire.extend(std::iter::repeat_n(0x80, len));
            }
            let writing = tokio::spawn(async move {
                for (index, chunk) in wire.chunks(997).enumerate() {
                    socket.write_all(chunk).await.unwrap();
                    if index % 7 == 0 {
                        tokio::task::yield_now().await;
                    }
                }
                socket
            });
            assert!(matches!(
                receiver.next().await,
                Ok(SignalEvent::RefreshToken(_))
            ));
            for len in lengths {
                assert_eq!(
                    receiver.next().await.unwrap(),
                    SignalEvent::Malformed { kind: 0, len }
                );
            }
            drop(writing);
        });
    }

    #[test]
    fn what_no_livekit_server_begins_with_ends_the_attempt_and_later_is_skipped() {
        let binary = |bytes: &'static [u8]| Message::Binary(Bytes::from_static(bytes));
        run(async {
            for (message, says) in [
                (
                    Message::Text("{\"hello\":1}".into()),
                    "the text '{\"hello\":1}'",
                ),
                (binary(b""), "is empty"),
                (binary(b"hello"), "5 bytes that cannot be read"),
                (binary(b"\xff\xff"), "2 bytes that cannot be read"),
            ] {
                let (_sender, mut receiver, mut server) = connected().await;
                server.send(message.clone()).await.unwrap();
                let error = receiver.next().await.unwrap_err().to_string();
                assert!(
                    error.contains(says) && error.contains("no LiveKit server"),
                    "{error}"
                );
                let (_sender, mut receiver, mut server) = connected().await;
                let first = response(proto::signal_response::Message::Join(join_to(0)));
                server.send(Message::Binary(first)).await.unwrap();
                server.send(message).await.unwrap();
                assert!(matches!(receiver.next().await, Ok(SignalEvent::Join(_))));
                assert!(receiver.next().await.is_ok());
            }
            // A Join that cannot be read has a sentence of its own.
            let (_sender, mut receiver, mut server) = connected().await;
            server.send(binary(b"\x0a\x02\x1a\x7f")).await.unwrap();
            assert!(matches!(
                receiver.next().await,
                Ok(SignalEvent::Malformed { kind: 1, .. })
            ));
        });
    }

    #[test]
    fn livekits_own_words_get_the_advice_that_fits_them() {
        let of = |status, text: &str| match status {
            404 => SignalError::NotFound {
                path: "/rtc/v1".into(),
                text: text.into(),
                dropped: None,
            },
            500 => SignalError::Server {
                status,
                text: text.into(),
            },
            _ => SignalError::Http {
                status,
                text: text.into(),
            },
        };
        for (status, text, says) in [
            (404, "requested room does not exist", "room.auto_create"),
            (
                400,
                "participant identity length exceeds limits: max length 8",
                "shorter --identity-prefix",
            ),
            (
                400,
                "room name length exceeds limits: max length 8",
                "shorter --room",
            ),
            (500, "connection closed by media", "room.max_participants"),
            (400, "something that nobody knows", "its log says why"),
            (404, "something that nobody knows", "its log may say more"),
            (500, "something that nobody knows", "see its log"),
        ] {
            let said = of(status, text).to_string();
            assert!(said.contains(says) && said.contains(text), "{said}");
            assert!(!said.contains("is this a LiveKit server"), "{said}");
        }
        let plain = of(404, "404 page not found").to_string();
        assert!(plain.contains("an old LiveKit server"), "{plain}");
    }

    #[test]
    fn a_long_request_arrives_whole() {
        run(async {
            let (mut sender, _receiver, mut server) = connected().await;
            for len in [
                0,
                FRAGMENT_BYTES - 20,
                FRAGMENT_BYTES,
                10 * FRAGMENT_BYTES + 1,
            ] {
                let sdp = "x".repeat(len);
                let (sent, received) = tokio::join!(sender.answer(sdp.clone(), 9), server.next());
                sent.unwrap();
                let request =
                    proto::SignalRequest::decode(received.unwrap().unwrap().into_data()).unwrap();
                assert_eq!(
                    request.message,
                    Some(Request::Answer(description("answer", sdp, 9)))
                );
            }
        });
    }

    #[test]
    fn a_message_of_absurd_size_is_refused() {
        run(async {
            let (_sender, mut receiver, mut server) = connected().await;
            let sending = tokio::spawn(async move {
                server
                    .send(Message::Binary(vec![0; MESSAGE_BYTES_MAX + 1].into()))
                    .await
            });
            let error = receiver.next().await.unwrap_err();
            assert!(
                matches!(error, SignalError::TooLarge { bytes } if bytes == MESSAGE_BYTES_MAX + 1),
                "{error:?}"
            );
            sending.abort();
        });
    }

    #[test]
    fn a_close_is_an_event_and_a_hang_up_is_an_error() {
        run(async {
            let (_sender, mut receiver, mut server) = connected().await;
            server.close(None).await.unwrap();
            assert_eq!(
                receiver.next().await.unwrap(),
                SignalEvent::Closed {
                    code: None,
                    reason: String::new()
                }
            );
            assert!(matches!(receiver.next().await, Err(SignalError::Closed)));

            let (_sender, mut receiver, server) = connected().await;
            drop(server);
            assert!(matches!(
                receiver.next().await,
                Err(SignalError::Lost { .. })
            ));
        });
    }

    #[test]
    fn large_messages_do_not_stay_in_memory() {
        const LARGE: usize = 2 << 20;
        run(async {
            let mut open = Vec::new();
            let before = resident_bytes();
            for _ in 0..120 {
                let (mut sender, mut receiver, mut server) = connected().await;
                let large = response(proto::signal_response::Message::RefreshToken(
                    "x".repeat(LARGE),
                ));
                let (sent, received) =
                    tokio::join!(server.send(Message::Binary(large)), receiver.next());
                sent.unwrap();
                assert!(matches!(received.unwrap(), SignalEvent::RefreshToken(_)));
                let (sent, received) =
                    tokio::join!(sender.answer("x".repeat(LARGE), 1), server.next());
                sent.unwrap();
                received.unwrap().unwrap();
                // Waiting for the next message frees this one.
                assert!(
                    tokio::time::timeout(Duration::ZERO, receiver.next())
                        .await
                        .is_err()
                );
                // The server's end would keep buffers of its own, and only ours are measured. So it
                // is reduced to its socket.
                open.push((sender, receiver, server.into_inner()));
            }
            let each = resident_bytes().saturating_sub(before) / open.len() as u64;
            eprintln!("{each} bytes resident per connection after 2 MiB each way");
            // If the messages were kept, it would be twice LARGE. Other tests of this process
            // allocate some tens of MB meanwhile; a hundred connections stand out from that.
            assert!(each < LARGE as u64 / 2, "{each} bytes");
        });
    }

    fn resident_bytes() -> u64 {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
    }
}
