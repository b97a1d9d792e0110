//! LiveKit's room service: Twirp, which is `POST /twirp/livekit.RoomService/METHOD` with protobuf
//! bodies.

use std::time::Duration;

use livekit_protocol as proto;
use prost::Message;
use reqwest::header;

use super::client::error_text;
use super::token::TokenError;
use super::{ApiKey, Endpoint, Secret, tls_config};

/// A request that takes longer has failed: the server answers from memory or from Redis.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Largest answer that is read: some ten thousand rooms or participants.
const BODY_BYTES_MAX: usize = 4 << 20;

/// A server's room service. Cheap to clone; connections are pooled.
#[derive(Clone)]
pub struct RoomService {
    http: reqwest::Client,
    endpoint: Endpoint,
    api_key: ApiKey,
}

/// Why the room service did not do what was asked. Each message says what to do; none repeats a
/// token.
#[derive(Debug, thiserror::Error)]
pub enum RoomError {
    #[error(
        "{endpoint} cannot be reached ({cause}): is the server running, and are address and port right?"
    )]
    Unreachable { endpoint: String, cause: String },
    /// Something listens, and hangs up or talks of other things.
    #[error(
        "{endpoint} gave no HTTP answer ({cause}): is this a LiveKit server?{}",
        if *secure { "" } else { " One that speaks TLS wants wss:// or https://" }
    )]
    NoAnswer {
        endpoint: String,
        secure: bool,
        cause: String,
    },
    /// `https` to a plain port, or `http` to a TLS port.
    #[error("{endpoint} {}", if *server_speaks_tls { "speaks TLS: use wss:// or https://" } else { "does not speak TLS: use ws:// or http://" })]
    TlsMismatch {
        endpoint: String,
        server_speaks_tls: bool,
    },
    #[error("the server refused our API key ({text}): check API key and secret, and both clocks")]
    Unauthorized { text: String },
    /// A proxy, most likely: LiveKit itself says 401.
    #[error("{text} (403)")]
    Forbidden { text: String },
    #[error(
        "the room service answered {status} ({text}): is this a LiveKit server, and does the room exist?"
    )]
    Other { status: u16, text: String },
    #[error("the room service sent what cannot be read ({cause}): is this a LiveKit server?")]
    Malformed { cause: String },
    #[error(transparent)]
    Token(#[from] TokenError),
}

impl RoomError {
    /// The room is not there (any more).
    pub fn is_not_found(&self) -> bool {
        matches!(self, RoomError::Other { status: 404, .. })
    }

    /// Something in front of the server lets nobody to the room service, or there is none. Of a
    /// method, not of a room.
    pub fn is_hidden(&self) -> bool {
        matches!(
            self,
            RoomError::Forbidden { .. }
                | RoomError::Other {
                    status: 404 | 405 | 501,
                    ..
                }
        )
    }

    /// There is no server (any more), so that asking for other rooms would end the same way.
    pub fn is_without_server(&self) -> bool {
        matches!(
            self,
            RoomError::Unreachable { .. } | RoomError::NoAnswer { .. }
        )
    }
}

impl RoomService {
    pub fn new(endpoint: Endpoint, api_key: ApiKey) -> RoomService {
        RoomService {
            http: http_client(REQUEST_TIMEOUT),
            endpoint,
            api_key,
        }
    }

    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Makes the room, or finds it. It is closed when nobody was in it for `empty_timeout` (whole
    /// seconds; at least one).
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

    /// Closes the room: whoever is in it gets a Leave.
    pub async fn delete_room(&self, name: &str) -> Result<(), RoomError> {
        let request = proto::DeleteRoomRequest {
            room: name.to_owned(),
        };
        self.call::<proto::DeleteRoomResponse>("DeleteRoom", None, &request)
            .await
            .map(drop)
    }

    /// All rooms of the server.
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

    /// The room of this name, as far as the list knows it.
    pub async fn list_rooms_named(&self, name: &str) -> Result<Vec<proto::Room>, RoomError> {
        let request = proto::ListRoomsRequest {
            names: vec![name.to_owned()],
        };
        let response = self
            .call::<proto::ListRoomsResponse>("ListRooms", None, &request)
            .await?;
        Ok(response.rooms)
    }

    /// All rooms, and what time it was at the server (since 1970, in whole seconds) when it told.
    pub async fn list_rooms_at(&self) -> Result<(Vec<proto::Room>, Option<Duration>), RoomError> {
        let request = proto::ListRoomsRequest::default();
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

    /// The answer, and its `Date`.
    async fn call_at<R: Message + Default>(
        &self,
        method: &str,
        room: Option<&str>,
        request: &impl Message,
    ) -> Result<(R, Option<Duration>), RoomError> {
        let token = self.api_key.service_token(room)?;
        let url = self
            .endpoint
            .http_url(&format!("/twirp/livekit.RoomService/{method}"));
        let mut bearer = header::HeaderValue::from_str(&format!("Bearer {}", token.expose()))
            .expect("a JWT is base64url and dots");
        bearer.set_sensitive(true);
        let post = self
            .http
            .post(url)
            .header(header::AUTHORIZATION, bearer)
            .header(header::CONTENT_TYPE, "application/protobuf");
        let response = post
            .body(request.encode_to_vec())
            .send()
            .await
            .map_err(|error| self.transport_error(&error))?;
        let status = response.status().as_u16();
        let told_at = date(response.headers());
        let body = self.body(response).await?;
        match status {
            200 => R::decode(&*body)
                .map(|answer| (answer, told_at))
                .map_err(|error| RoomError::Malformed {
                    cause: error.to_string(),
                }),
            _ => Err(self.status_error(status, &body, &token)),
        }
    }

    /// The whole of it, unless it is more than any server has to say.
    async fn body(&self, mut response: reqwest::Response) -> Result<Vec<u8>, RoomError> {
        let mut body = Vec::new();
        while let Some(part) = response
            .chunk()
            .await
            .map_err(|error| self.transport_error(&error))?
        {
            if body.len() + part.len() > BODY_BYTES_MAX {
                return Err(RoomError::Malformed {
                    cause: format!("more than {BODY_BYTES_MAX} bytes"),
                });
            }
            body.extend_from_slice(&part);
        }
        Ok(body)
    }

    fn status_error(&self, status: u16, body: &[u8], token: &Secret) -> RoomError {
        let text = twirp_text(body, token);
        match status {
            400 if !self.endpoint.secure() && text.contains("HTTPS") => self.mismatch(true),
            401 => RoomError::Unauthorized { text },
            403 => RoomError::Forbidden { text },
            _ => RoomError::Other { status, text },
        }
    }

    fn transport_error(&self, error: &reqwest::Error) -> RoomError {
        if causes(error)
            .any(|cause| matches!(cause.downcast_ref(), Some(rustls::Error::InvalidMessage(_))))
        {
            return self.mismatch(false);
        }
        let cause = causes(error)
            .last()
            .map_or_else(|| error.to_string(), ToString::to_string);
        let (endpoint, secure) = (self.endpoint.to_string(), self.endpoint.secure());
        if error.is_connect() || error.is_timeout() {
            RoomError::Unreachable { endpoint, cause }
        } else {
            RoomError::NoAnswer {
                endpoint,
                secure,
                cause,
            }
        }
    }

    fn mismatch(&self, server_speaks_tls: bool) -> RoomError {
        RoomError::TlsMismatch {
            endpoint: self.endpoint.to_string(),
            server_speaks_tls,
        }
    }
}

/// When an answer was given, by the clock of who gave it.
fn date(headers: &header::HeaderMap) -> Option<Duration> {
    let text = headers.get(header::DATE)?.to_str().ok()?;
    let at = httpdate::parse_http_date(text).ok()?;
    at.duration_since(std::time::UNIX_EPOCH).ok()
}

/// An HTTP client with our TLS and no redirects; every request ends within `timeout`.
pub(crate) fn http_client(timeout: Duration) -> reqwest::Client {
    reqwest::Client::builder()
        .tls_backend_preconfigured((*tls_config()).clone())
        .timeout(timeout)
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .expect("a client with a given TLS configuration needs nothing from its host")
}

/// The chain of causes below `error`. An `io::Error` hides the error that it wraps from `source`,
/// so that one is looked into.
pub(crate) fn causes<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    std::iter::successors(error.source(), |cause| {
        match cause
            .downcast_ref::<std::io::Error>()
            .and_then(std::io::Error::get_ref)
        {
            Some(inner) => Some(inner),
            None => cause.source(),
        }
    })
}

/// Twirp's errors are JSON, `{"code": .., "msg": ..}`; the authentication in front of it answers in
/// plain text.
fn twirp_text(body: &[u8], token: &Secret) -> String {
    #[derive(serde::Deserialize)]
    struct TwirpErrorBody {
        code: String,
        #[serde(default)]
        msg: String,
    }
    match serde_json::from_slice::<TwirpErrorBody>(body) {
        Ok(error) => error_text(format!("{}: {}", error.code, error.msg).as_bytes(), token),
        Err(_) => error_text(body, token),
    }
}
