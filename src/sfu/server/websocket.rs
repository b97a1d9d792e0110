//! One WebSocket: a participant's requests in, its messages out. Protobuf uses binary frames, JSON
//! uses text frames. A client gets the kind that it sent last.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::extract::{self, RawQuery};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::SinkExt;
use livekit_protocol as proto;
use prost::Message as _;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tracing::warn;

use super::super::lobby::{ConnectionId, Entrant};
use super::access::HttpRefusal;
use super::{Input, REQUESTS_BYTES_MAX, ServerState};

/// Largest number of messages that wait for a client. A client that does not read and exceeds it is
/// disconnected. A participant of a meeting of a thousand gets a few hundred at once.
const QUEUE_MAX: usize = 2048;
/// Largest size of these messages in bytes: twice a Join and an offer of a room of ten thousand.
const QUEUE_BYTES_MAX: usize = 64 << 20;
/// Longest time for a write. A client that takes longer is gone.
const SEND_TIMEOUT: Duration = Duration::from_secs(20);
/// LiveKit's own interval.
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// Largest message from a client: an answer to an offer of ten thousand tracks.
const MESSAGE_BYTES_MAX: usize = 8 << 20;
/// Largest request that is no description. Two bytes may be an empty list entry that takes hundreds
/// of bytes in memory. Three thousand subscriptions by their sids take 50 KB.
const LISTS_BYTES_MAX: usize = 64 << 10;
/// Largest request in JSON, which few clients use: an answer to an offer of a few hundred tracks.
const JSON_BYTES_MAX: usize = 256 << 10;
/// Numbers of `SignalRequest`'s fields that carry descriptions.
const REQUEST_OFFER: u64 = 1;
const REQUEST_ANSWER: u64 = 2;
/// Size of the WebSocket buffers, which fits most requests. With the library's default of 128 KiB
/// the buffers would be most of a participant's cost.
const BUFFER_BYTES: usize = 4 << 10;
/// Largest number of messages that are sent together.
const BATCH_MAX: usize = 64;
/// Longest time that a client may take to set the offer that it sent with its join.
const OFFER_IS_SET_WITHIN: Duration = Duration::from_secs(1);

pub(super) async fn health() -> &'static str {
    "throng's embedded SFU: a target for load tests and a test bed, not a product SFU\n"
}

pub(super) async fn dual(
    state: extract::State<ServerState>,
    headers: HeaderMap,
    query: RawQuery,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Response {
    join(state.0, &headers, query, upgrade, false)
}

pub(super) async fn single(
    state: extract::State<ServerState>,
    headers: HeaderMap,
    query: RawQuery,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Response {
    join(state.0, &headers, query, upgrade, true)
}

pub(super) async fn validate_dual(
    state: extract::State<ServerState>,
    headers: HeaderMap,
    query: RawQuery,
) -> Response {
    validate(&state, &headers, query, false)
}

pub(super) async fn validate_single(
    state: extract::State<ServerState>,
    headers: HeaderMap,
    query: RawQuery,
) -> Response {
    validate(&state, &headers, query, true)
}

/// Tells a browser why its WebSocket failed, because browsers do not see the status.
fn validate(
    state: &ServerState,
    headers: &HeaderMap,
    RawQuery(query): RawQuery,
    single: bool,
) -> Response {
    let entry = state
        .access
        .entry(headers, &query.unwrap_or_default(), single);
    let mut response = match entry {
        Ok(_) => "success".into_response(),
        Err(refusal) => refused(refusal),
    };
    let anyone = HeaderValue::from_static("*");
    response
        .headers_mut()
        .insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, anyone);
    response
}

fn join(
    state: ServerState,
    headers: &HeaderMap,
    RawQuery(query): RawQuery,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
    single: bool,
) -> Response {
    let entry = state
        .access
        .entry(headers, &query.unwrap_or_default(), single);
    let (entry, upgrade) = match (entry, upgrade) {
        (Err(refusal), _) => return refused(refusal),
        (_, Err(_)) => return StatusCode::NOT_FOUND.into_response(),
        (Ok(entry), Ok(upgrade)) => (entry, upgrade),
    };
    upgrade
        .max_message_size(MESSAGE_BYTES_MAX)
        .max_frame_size(MESSAGE_BYTES_MAX)
        .read_buffer_size(BUFFER_BYTES)
        .write_buffer_size(BUFFER_BYTES)
        .on_upgrade(move |socket| serve(socket, state, entry))
}

/// Logs and sends a refusal. Its text repeats no token.
pub(super) fn refused((status, text): HttpRefusal) -> Response {
    warn!(status = status.as_u16(), why = text, "refused a token");
    (status, text).into_response()
}

async fn serve(socket: WebSocket, state: ServerState, entry: Entrant) {
    let inputs = &state.inputs;
    let holds = sets_its_offer_later(&entry);
    let (messages, mut queue) = outbox();
    let (reply, connection) = oneshot::channel();
    let enter = Input::Enter {
        entry: Box::new(entry),
        messages,
        reply,
    };
    if inputs.send(enter).await.is_err() {
        return;
    }
    let Ok(connection) = connection.await else {
        return;
    };
    let mut client = WebSocketClient {
        socket,
        json: false,
        held_until: holds.then(|| Instant::now() + OFFER_IS_SET_WITHIN),
    };
    client.converse(connection, &mut queue, &state).await;
    let _ = inputs.send(Input::Disconnect { connection }).await;
}

/// Whether the client sets its offer only after the Join. The Go SDK sends its first offer with the
/// join, and sets it only when the Join has come. An earlier answer would match no offer and end
/// the connection. LiveKit's answer comes a few milliseconds after the Join. Here it waits for the
/// first candidate, which follows the setting of the offer.
fn sets_its_offer_later(entry: &Entrant) -> bool {
    let is_go = entry.client.sdk() == proto::client_info::Sdk::Go;
    is_go && entry.single && entry.publisher_offer.is_some()
}

/// Whether a request is an offer or an answer, by the key of its first field (protobuf encoding:
/// number << 3 | 2).
fn is_description(request: &[u8]) -> bool {
    let keys = [REQUEST_OFFER, REQUEST_ANSWER].map(|number| number << 3 | 2);
    request
        .first()
        .is_some_and(|key| keys.contains(&u64::from(*key)))
}

fn message_len(message: &Message) -> usize {
    match message {
        Message::Binary(bytes) => bytes.len(),
        Message::Text(text) => text.len(),
        Message::Ping(_) | Message::Pong(_) | Message::Close(_) => 0,
    }
}

/// The queue of messages for one client, bounded by messages and by bytes.
fn outbox() -> (ClientOutbox, Queue) {
    let (messages, queue) = mpsc::channel(QUEUE_MAX);
    let waiting = Arc::new(AtomicUsize::new(0));
    let outbox = ClientOutbox {
        messages,
        waiting: waiting.clone(),
    };
    (
        outbox,
        Queue {
            messages: queue,
            waiting,
        },
    )
}

/// The lobby's end of [`outbox`].
pub(super) struct ClientOutbox {
    messages: mpsc::Sender<Bytes>,
    waiting: Arc<AtomicUsize>,
}

/// Reason why a message was not sent.
pub(super) enum UnsentMessage {
    /// The client does not read.
    Full,
    /// The client's task is gone.
    Closed,
}

impl ClientOutbox {
    pub(super) fn send(&self, message: Bytes) -> Result<(), UnsentMessage> {
        let len = message.len();
        if self.waiting.load(Relaxed) + len > QUEUE_BYTES_MAX {
            return Err(UnsentMessage::Full);
        }
        self.messages
            .try_send(message)
            .map_err(|error| match error {
                mpsc::error::TrySendError::Full(_) => UnsentMessage::Full,
                mpsc::error::TrySendError::Closed(_) => UnsentMessage::Closed,
            })?;
        self.waiting.fetch_add(len, Relaxed);
        Ok(())
    }
}

/// The client's end of [`outbox`].
struct Queue {
    messages: mpsc::Receiver<Bytes>,
    waiting: Arc<AtomicUsize>,
}

impl Queue {
    async fn recv(&mut self) -> Option<Bytes> {
        self.messages
            .recv()
            .await
            .inspect(|message| self.taken(message))
    }

    fn try_recv(&mut self) -> Option<Bytes> {
        self.messages
            .try_recv()
            .ok()
            .inspect(|message| self.taken(message))
    }

    /// Both ends live on one thread, so nothing happens between queueing a message and counting it.
    fn taken(&self, message: &Bytes) {
        self.waiting.fetch_sub(message.len(), Relaxed);
    }
}

struct WebSocketClient {
    socket: WebSocket,
    json: bool,
    /// After the Join, nothing is sent before this time, or before the client's first candidate.
    held_until: Option<Instant>,
}

impl WebSocketClient {
    /// Serves the WebSocket until either side ends.
    async fn converse(&mut self, connection: ConnectionId, queue: &mut Queue, state: &ServerState) {
        let mut ping = tokio::time::interval_at(Instant::now() + PING_INTERVAL, PING_INTERVAL);
        ping.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        if self.held_until.is_some() {
            let Some(join) = queue.recv().await else {
                return self.close(close_code::NORMAL, "").await;
            };
            if !self.within_time(self.encoded(join)).await {
                return;
            }
        }
        loop {
            let held_until = self.held_until;
            tokio::select! {
                message = queue.recv(), if held_until.is_none() => {
                    let Some(message) = message else { return self.close(close_code::NORMAL, "").await };
                    if !self.write(message, queue).await {
                        return;
                    }
                }
                () = tokio::time::sleep_until(held_until.unwrap_or_else(Instant::now)), if held_until.is_some() => {
                    self.held_until = None;
                }
                received = self.socket.recv() => match received {
                    Some(Ok(message)) => match self.read(&message) {
                        Ok(Some(request)) => {
                            if matches!(request.message, Some(proto::signal_request::Message::Trickle(_))) {
                                self.held_until = None;
                            }
                            // Waits for room among the requests that wait for the lobby.
                            let bytes = message_len(&message).min(REQUESTS_BYTES_MAX) as u32;
                            let Ok(room) = state.requests.clone().acquire_many_owned(bytes).await else { return };
                            if state.inputs.send(Input::Request { connection, request, room }).await.is_err() {
                                return;
                            }
                        }
                        Ok(None) => {}
                        Err(()) => return self.close(close_code::INVALID, "cannot unmarshal the request").await,
                    },
                    Some(Err(_)) | None => return,
                },
                _ = ping.tick() => {
                    if !self.within_time(Message::Ping(Bytes::new())).await {
                        return;
                    }
                }
            }
        }
    }

    fn read(&mut self, message: &Message) -> Result<Option<Box<proto::SignalRequest>>, ()> {
        let request = match message {
            Message::Binary(bytes) => {
                self.json = false;
                if bytes.len() > LISTS_BYTES_MAX && !is_description(bytes) {
                    return Err(());
                }
                proto::SignalRequest::decode(bytes.as_ref()).map_err(drop)?
            }
            Message::Text(text) => {
                self.json = true;
                if text.len() > JSON_BYTES_MAX {
                    return Err(());
                }
                serde_json::from_str(text).map_err(drop)?
            }
            Message::Ping(_) | Message::Pong(_) | Message::Close(_) => return Ok(None),
        };
        Ok(Some(Box::new(request)))
    }

    /// Sends the queued messages together.
    async fn write(&mut self, first: Bytes, queue: &mut Queue) -> bool {
        let all = async {
            self.socket.feed(self.encoded(first)).await?;
            for _ in 1..BATCH_MAX {
                let Some(message) = queue.try_recv() else {
                    break;
                };
                self.socket.feed(self.encoded(message)).await?;
            }
            self.socket.flush().await
        };
        matches!(tokio::time::timeout(SEND_TIMEOUT, all).await, Ok(Ok(())))
    }

    /// Messages are made as protobuf. Few clients use JSON, and for them a message is decoded and
    /// encoded again.
    fn encoded(&self, message: Bytes) -> Message {
        let json =
            || serde_json::to_string(&proto::SignalResponse::decode(message.clone()).ok()?).ok();
        match self.json.then(json).flatten() {
            Some(json) => Message::Text(json.into()),
            None => Message::Binary(message),
        }
    }

    async fn close(&mut self, code: u16, reason: &'static str) {
        let frame = CloseFrame {
            code,
            reason: reason.into(),
        };
        self.within_time(Message::Close(Some(frame))).await;
    }

    async fn within_time(&mut self, message: Message) -> bool {
        matches!(
            tokio::time::timeout(SEND_TIMEOUT, self.socket.send(message)).await,
            Ok(Ok(()))
        )
    }
}
