//! One WebSocket: a participant's requests in, its messages out. Protobuf in binary frames, or JSON in text frames: a client gets what it sent last.

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

use super::super::lobby::{ConnectionId, Entry};
use super::{Input, State};

/// Messages for a client that does not read: it is disconnected beyond. A participant of a meeting of a thousand gets some hundred at once.
const QUEUE_MAX: usize = 2048;
/// A write that takes longer is to a client that is gone.
const SEND_TIMEOUT: Duration = Duration::from_secs(20);
/// LiveKit's own interval.
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// An answer to an offer of ten thousand tracks.
const MESSAGE_BYTES_MAX: usize = 8 << 20;
/// Most requests fit; the library's own 128 KiB would be most of what a participant costs.
const BUFFER_BYTES: usize = 4 << 10;
/// Messages that leave together.
const BATCH_MAX: usize = 64;

pub(super) async fn health() -> &'static str {
    "throng's embedded SFU: a target for load tests and a test bed, not a product SFU\n"
}

pub(super) async fn dual(
    state: extract::State<State>,
    headers: HeaderMap,
    query: RawQuery,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Response {
    join(state.0, &headers, query, upgrade, false)
}

pub(super) async fn single(
    state: extract::State<State>,
    headers: HeaderMap,
    query: RawQuery,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Response {
    join(state.0, &headers, query, upgrade, true)
}

pub(super) async fn validate_dual(state: extract::State<State>, headers: HeaderMap, query: RawQuery) -> Response {
    validate(&state, &headers, query, false)
}

pub(super) async fn validate_single(state: extract::State<State>, headers: HeaderMap, query: RawQuery) -> Response {
    validate(&state, &headers, query, true)
}

/// Browsers see no status of a WebSocket that fails: they ask here why.
fn validate(state: &State, headers: &HeaderMap, RawQuery(query): RawQuery, single: bool) -> Response {
    let entry = state.access.entry(headers, &query.unwrap_or_default(), single);
    let mut response = match entry {
        Ok(_) => "success".into_response(),
        Err(refusal) => refusal.into_response(),
    };
    let anyone = HeaderValue::from_static("*");
    response.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, anyone);
    response
}

fn join(
    state: State,
    headers: &HeaderMap,
    RawQuery(query): RawQuery,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
    single: bool,
) -> Response {
    let entry = state.access.entry(headers, &query.unwrap_or_default(), single);
    let (entry, upgrade) = match (entry, upgrade) {
        (Err(refusal), _) => return refusal.into_response(),
        (_, Err(_)) => return StatusCode::NOT_FOUND.into_response(),
        (Ok(entry), Ok(upgrade)) => (entry, upgrade),
    };
    upgrade
        .max_message_size(MESSAGE_BYTES_MAX)
        .max_frame_size(MESSAGE_BYTES_MAX)
        .read_buffer_size(BUFFER_BYTES)
        .write_buffer_size(BUFFER_BYTES)
        .on_upgrade(move |socket| serve(socket, state.inputs, entry))
}

async fn serve(socket: WebSocket, inputs: mpsc::Sender<Input>, entry: Entry) {
    let (messages, mut queue) = mpsc::channel(QUEUE_MAX);
    let (reply, connection) = oneshot::channel();
    let enter = Input::Enter {
        entry: Box::new(entry),
        messages,
        reply,
    };
    if inputs.send(enter).await.is_err() {
        return;
    }
    let Ok(connection) = connection.await else { return };
    let mut client = Client { socket, json: false };
    client.converse(connection, &mut queue, &inputs).await;
    let _ = inputs.send(Input::Disconnect { connection }).await;
}

struct Client {
    socket: WebSocket,
    json: bool,
}

impl Client {
    /// Ends when either side does.
    async fn converse(&mut self, connection: ConnectionId, queue: &mut mpsc::Receiver<Bytes>, inputs: &mpsc::Sender<Input>) {
        let mut ping = tokio::time::interval_at(tokio::time::Instant::now() + PING_INTERVAL, PING_INTERVAL);
        ping.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                message = queue.recv() => {
                    let Some(message) = message else { return self.close(close_code::NORMAL, "").await };
                    if !self.write(message, queue).await {
                        return;
                    }
                }
                received = self.socket.recv() => match received {
                    Some(Ok(message)) => match self.read(&message) {
                        Ok(Some(request)) => {
                            if inputs.send(Input::Request { connection, request }).await.is_err() {
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
                proto::SignalRequest::decode(bytes.as_ref()).map_err(drop)?
            }
            Message::Text(text) => {
                self.json = true;
                serde_json::from_str(text).map_err(drop)?
            }
            Message::Ping(_) | Message::Pong(_) | Message::Close(_) => return Ok(None),
        };
        Ok(Some(Box::new(request)))
    }

    /// What is queued goes out in one go.
    async fn write(&mut self, first: Bytes, queue: &mut mpsc::Receiver<Bytes>) -> bool {
        let all = async {
            self.socket.feed(self.encoded(first)).await?;
            for _ in 1..BATCH_MAX {
                let Ok(message) = queue.try_recv() else { break };
                self.socket.feed(self.encoded(message)).await?;
            }
            self.socket.flush().await
        };
        matches!(tokio::time::timeout(SEND_TIMEOUT, all).await, Ok(Ok(())))
    }

    /// Messages are made as protobuf. Hardly anyone wants JSON, and who does pays for both.
    fn encoded(&self, message: Bytes) -> Message {
        let json = || serde_json::to_string(&proto::SignalResponse::decode(message.clone()).ok()?).ok();
        match self.json.then(json).flatten() {
            Some(json) => Message::Text(json.into()),
            None => Message::Binary(message),
        }
    }

    async fn close(&mut self, code: u16, reason: &'static str) {
        let frame = CloseFrame { code, reason: reason.into() };
        self.within_time(Message::Close(Some(frame))).await;
    }

    async fn within_time(&mut self, message: Message) -> bool {
        matches!(tokio::time::timeout(SEND_TIMEOUT, self.socket.send(message)).await, Ok(Ok(())))
    }
}
