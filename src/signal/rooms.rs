//! LiveKit's room service over Twirp: `POST /twirp/livekit.RoomService/METHOD` with protobuf
//! bodies.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use http::{HeaderMap, header};
use livekit_protocol as proto;
use prost::Message;

use super::answer::{self, AnswerFault, AskedAt, AskedFor, HttpAnswer};
use super::client::says_nothing_was_seen;
use super::fetch::{FetchFault, Fetched, Fetcher};
use super::gateway::UnsendableToken;
use super::link::{LinkFault, LinkStage};
use super::refused;
use super::route::ProxyFault;
use super::token::TokenError;
use super::{ApiKey, Endpoint};

/// Time limit of a request. The server answers from memory or from Redis.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Largest answer that is read: some ten thousand rooms or participants.
const BODY_BYTES_MAX: usize = 4 << 20;
/// Longest total pause that rate limits may impose on one request; beyond it the request fails.
const LIMIT_PATIENCE: Duration = Duration::from_secs(60);
/// Shortest pause at a rate limit, and the pause where it names none.
const LIMIT_PAUSE: Duration = Duration::from_secs(1);

/// Client of a server's room service. Cheap to clone; connections are pooled.
#[derive(Clone)]
pub struct RoomService {
    fetcher: Fetcher,
    endpoint: Endpoint,
    api_key: ApiKey,
    /// Number of pauses at rate limits.
    held_back: Arc<AtomicU32>,
}

/// Why the room service did not do what was asked. Each message says what to do; none repeats a
/// token.
#[derive(Debug, thiserror::Error)]
pub enum RoomError {
    /// There is no answer.
    #[error(transparent)]
    FetchFault(#[from] FetchFault),
    /// Something other than the server answered.
    #[error(transparent)]
    Answer(AnswerFault),
    #[error(
        "the server refused our API key ({text}): {}",
        refused::advice_on_key(text)
    )]
    Unauthorized { text: String },
    /// Our tokens carry the grant, so the server has not seen the token, or the key lacks the
    /// right.
    #[error(
        "the server does not let us use {method} ({text}): its key has no grant for that, or something in front of it takes the Authorization header away (--token-in query)"
    )]
    NotGranted { method: String, text: String },
    #[error("the room service answered {method} with {status} ({text}): {}", advice_on(text, *.is_known))]
    Other {
        method: String,
        status: u16,
        text: String,
        /// Whether these are the words of a room service.
        is_known: bool,
    },
    #[error("the room service sent what cannot be read ({cause}): is this a LiveKit server?")]
    Malformed { cause: String },
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error(transparent)]
    UnsendableToken(#[from] UnsendableToken),
}

fn advice_on(text: &str, is_known: bool) -> &'static str {
    let otherwise = if is_known {
        "see the server's log"
    } else {
        "is this a LiveKit server, and does the address lead to its room service (/twirp)?"
    };
    answer::advice_on(text).unwrap_or(otherwise)
}

impl RoomError {
    /// Whether the room does not exist (any more).
    pub fn is_not_found(&self) -> bool {
        matches!(self, RoomError::Other { status: 404, .. })
    }

    /// Whether participants may still be able to join: something other than the server answered,
    /// whatever it said, the service did not answer in time, or we may not use it. This concerns a
    /// method, not a room.
    pub fn is_of_service_alone(&self) -> bool {
        match self {
            RoomError::Answer(fault) => !matches!(fault, AnswerFault::SpeaksTls { .. }),
            RoomError::NotGranted { .. } | RoomError::Malformed { .. } => true,
            // A join would only repeat the server's own failure, or its refusal of a name.
            RoomError::Other {
                status, is_known, ..
            } => !is_known || *status < 500 && *status != 400,
            RoomError::FetchFault(FetchFault::Link(fault)) => {
                matches!(
                    fault,
                    LinkFault::Slow {
                        stage: LinkStage::Answer,
                        ..
                    } | LinkFault::HungUp { .. }
                        | LinkFault::NotHttp { .. }
                )
            }
            RoomError::FetchFault(
                FetchFault::TooLong { .. } | FetchFault::Proxy(ProxyFault::Silent { .. }),
            ) => true,
            _ => false,
        }
    }

    /// Whether there was no answer in time.
    pub fn is_slow(&self) -> bool {
        matches!(
            self,
            RoomError::FetchFault(
                FetchFault::Link(LinkFault::Slow { .. }) | FetchFault::TooLong { .. }
            )
        )
    }

    /// Whether the request was refused, so that nothing was done. A request that failed half-way
    /// does not count.
    pub fn is_refusal(&self) -> bool {
        match self {
            RoomError::Answer(fault) => !matches!(fault, AnswerFault::BackendAway { .. }),
            RoomError::NotGranted { .. } | RoomError::Unauthorized { .. } => true,
            RoomError::Other { status, .. } => *status < 500,
            _ => false,
        }
    }

    /// Whether the answer is longer than what is read.
    pub fn is_too_long(&self) -> bool {
        matches!(self, RoomError::FetchFault(FetchFault::TooLong { .. }))
    }

    /// Whether there is no server (any more), so that requests for other rooms would fail in the
    /// same way.
    pub fn is_without_server(&self) -> bool {
        matches!(
            self,
            RoomError::FetchFault(_) | RoomError::Answer(AnswerFault::BackendAway { .. })
        )
    }
}

impl RoomService {
    pub fn new(endpoint: Endpoint, api_key: ApiKey) -> RoomService {
        RoomService {
            fetcher: endpoint.fetcher(REQUEST_TIMEOUT),
            endpoint,
            api_key,
            held_back: Arc::default(),
        }
    }

    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    pub fn api_key(&self) -> &ApiKey {
        &self.api_key
    }

    /// Returns the number of pauses at rate limits.
    pub fn held_back(&self) -> u32 {
        self.held_back.load(Ordering::Relaxed)
    }

    /// Creates the room, or finds an existing one. The server closes it after it was empty for
    /// `empty_timeout` (in whole seconds; at least one).
    pub async fn create_room(
        &self,
        name: &str,
        empty_timeout: Duration,
    ) -> Result<proto::Room, RoomError> {
        let empty_timeout = u32::try_from(empty_timeout.as_secs().max(1)).unwrap_or(u32::MAX);
        self.call(
            "CreateRoom",
            None,
            &proto::CreateRoomRequest {
                name: name.to_owned(),
                empty_timeout,
                ..Default::default()
            },
        )
        .await
    }

    /// Closes the room. Everybody in it gets a Leave.
    pub async fn delete_room(&self, name: &str) -> Result<(), RoomError> {
        let request = proto::DeleteRoomRequest {
            room: name.to_owned(),
        };
        self.call::<proto::DeleteRoomResponse>("DeleteRoom", None, &request)
            .await
            .map(drop)
    }

    /// Returns all rooms of the server.
    pub async fn list_rooms(&self) -> Result<Vec<proto::Room>, RoomError> {
        let response = self
            .call::<proto::ListRoomsResponse>(
                "ListRooms",
                None,
                &proto::ListRoomsRequest::default(),
            )
            .await?;
        Ok(response.rooms)
    }

    /// Returns the rooms of this name that the list contains.
    pub async fn list_rooms_named(&self, name: &str) -> Result<Vec<proto::Room>, RoomError> {
        let (rooms, _) = self.list_rooms_at(&[name.to_owned()]).await?;
        Ok(rooms)
    }

    /// Returns the rooms of these names, or all if there are none, and the server's time of the
    /// answer (since 1970, in whole seconds).
    pub async fn list_rooms_at(
        &self,
        names: &[String],
    ) -> Result<(Vec<proto::Room>, Option<Duration>), RoomError> {
        let request = proto::ListRoomsRequest {
            names: names.to_vec(),
        };
        let (response, told_at) = self
            .call_at::<proto::ListRoomsResponse>("ListRooms", None, &request)
            .await?;
        Ok((response.rooms, told_at))
    }

    pub async fn list_participants(
        &self,
        room: &str,
    ) -> Result<Vec<proto::ParticipantInfo>, RoomError> {
        let request = proto::ListParticipantsRequest {
            room: room.to_owned(),
        };
        let response = self
            .call::<proto::ListParticipantsResponse>("ListParticipants", Some(room), &request)
            .await?;
        Ok(response.participants)
    }

    async fn call<R: Message + Default>(
        &self,
        method: &str,
        room: Option<&str>,
        request: &impl Message,
    ) -> Result<R, RoomError> {
        let (answer, _) = self.call_at(method, room, request).await?;
        Ok(answer)
    }

    /// Returns the answer and its `Date`. At a rate limit it waits and tries again.
    async fn call_at<R: Message + Default>(
        &self,
        method: &str,
        room: Option<&str>,
        request: &impl Message,
    ) -> Result<(R, Option<Duration>), RoomError> {
        let mut patience = LIMIT_PATIENCE;
        loop {
            let error = match self.call_once(method, room, request).await {
                Err(RoomError::Answer(fault)) => fault,
                done => return done,
            };
            let Some(asked) = error.limit() else {
                return Err(RoomError::Answer(error));
            };
            let pause = asked.unwrap_or(LIMIT_PAUSE).max(LIMIT_PAUSE);
            if pause > patience {
                return Err(RoomError::Answer(error));
            }
            patience -= pause;
            self.held_back.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(pause).await;
        }
    }

    async fn call_once<R: Message + Default>(
        &self,
        method: &str,
        room: Option<&str>,
        request: &impl Message,
    ) -> Result<(R, Option<Duration>), RoomError> {
        let token = self.api_key.service_token(room)?;
        let path = format!("/twirp/livekit.RoomService/{method}");
        let gateway = &self.endpoint.gateway;
        let url = self.endpoint.http_url(&gateway.path(&path, &token));
        let mut headers = HeaderMap::new();
        gateway.add_to(&mut headers, Some(&token))?;
        let protobuf = header::HeaderValue::from_static("application/protobuf");
        headers.insert(header::CONTENT_TYPE, protobuf);
        let post = self.fetcher.request(reqwest::Method::POST, &url);
        let post = post.headers(headers).body(request.encode_to_vec());
        let Fetched {
            status,
            headers,
            body,
        } = self.fetcher.send(post, BODY_BYTES_MAX).await?;
        if status == 200 && !is_foreign(&headers) {
            let answer = R::decode(&*body).map_err(|error| RoomError::Malformed {
                cause: error.to_string(),
            });
            return Ok((answer?, date(&headers)));
        }
        let fault = AnswerFault::of(
            &HttpAnswer {
                status,
                headers: &headers,
                body: &body,
            },
            &AskedAt {
                what: AskedFor::RoomService,
                url: &url,
                path: &path,
                secret: Some(&token),
            },
        );
        Err(self.refusal(fault, method))
    }

    fn refusal(&self, fault: AnswerFault, method: &str) -> RoomError {
        let AnswerFault::Own {
            status,
            text,
            is_known,
        } = fault
        else {
            return match fault {
                AnswerFault::SpeaksTls { .. } => {
                    RoomError::FetchFault(FetchFault::Link(LinkFault::TlsMismatch {
                        endpoint: self.endpoint.to_string(),
                        server_speaks_tls: true,
                    }))
                }
                other => RoomError::Answer(other),
            };
        };
        let method = method.to_owned();
        match status {
            403 if is_known => RoomError::NotGranted { method, text },
            401 if says_nothing_was_seen(&text) => RoomError::NotGranted { method, text },
            401 if is_known => RoomError::Unauthorized { text },
            _ => RoomError::Other {
                method,
                status,
                text,
                is_known,
            },
        }
    }
}

impl Endpoint {
    /// Makes a client for requests to this endpoint. It uses the known addresses.
    pub(super) fn fetcher(&self, timeout: Duration) -> Fetcher {
        let addresses = self.addresses.as_ref().map(|known| known.there());
        Fetcher::new(
            &self.to_string(),
            &self.http_url(""),
            &addresses.unwrap_or_default(),
            timeout,
        )
    }
}

/// Whether the answer is something else than a message: a web page, or text.
fn is_foreign(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE);
    kind.is_some_and(|kind| !kind.as_bytes().starts_with(b"application/protobuf"))
}

/// Returns when an answer was given, by the clock of the answering host.
fn date(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(header::DATE)?.to_str().ok()?;
    let at = httpdate::parse_http_date(text).ok()?;
    at.duration_since(std::time::UNIX_EPOCH).ok()
}
