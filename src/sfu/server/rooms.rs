//! LiveKit's room service over Twirp, as far as load tests need it: `POST
//! /twirp/livekit.RoomService/METHOD`, protobuf or JSON.

use axum::body::Bytes;
use axum::extract::{self, Path, RawQuery};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use livekit_protocol as proto;
use livekit_token::Claims;
use prost::Message;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tracing::warn;

use super::ServerState;
use super::access::HttpRefusal;
use super::websocket::refused;

/// A Twirp error: status, code and text.
struct TwirpRefusal {
    status: StatusCode,
    code: &'static str,
    text: &'static str,
}

impl TwirpRefusal {
    const DENIED: TwirpRefusal = TwirpRefusal {
        status: StatusCode::UNAUTHORIZED,
        code: "unauthenticated",
        text: "permissions denied",
    };
    const NO_ROOM: TwirpRefusal = TwirpRefusal {
        status: StatusCode::NOT_FOUND,
        code: "not_found",
        text: "requested room does not exist",
    };
    const NO_PARTICIPANT: TwirpRefusal = TwirpRefusal {
        status: StatusCode::NOT_FOUND,
        code: "not_found",
        text: "participant does not exist",
    };
    const NO_NAME: TwirpRefusal = TwirpRefusal {
        status: StatusCode::BAD_REQUEST,
        code: "invalid_argument",
        text: "a room name has 1 to 256 bytes",
    };
    const NO_METHOD: TwirpRefusal = TwirpRefusal {
        status: StatusCode::NOT_FOUND,
        code: "bad_route",
        text: "throng's embedded SFU serves CreateRoom, DeleteRoom, ListRooms, ListParticipants and RemoveParticipant",
    };
    const CONTENT_TYPE: TwirpRefusal = TwirpRefusal {
        status: StatusCode::NOT_FOUND,
        code: "bad_route",
        text: "unexpected Content-Type: use application/protobuf or application/json",
    };
    const MALFORMED: TwirpRefusal = TwirpRefusal {
        status: StatusCode::BAD_REQUEST,
        code: "malformed",
        text: "the request could not be decoded",
    };
    const STOPPING: TwirpRefusal = TwirpRefusal {
        status: StatusCode::SERVICE_UNAVAILABLE,
        code: "unavailable",
        text: "the server is stopping",
    };
}

impl IntoResponse for TwirpRefusal {
    fn into_response(self) -> Response {
        warn!(
            status = self.status.as_u16(),
            why = self.text,
            "refused a request to the room service"
        );
        let body = serde_json::json!({ "code": self.code, "msg": self.text });
        (
            self.status,
            [(header::CONTENT_TYPE, "application/json")],
            body.to_string(),
        )
            .into_response()
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Protobuf,
    Json,
}

impl Encoding {
    fn of(headers: &HeaderMap) -> Option<Encoding> {
        let text = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
        match text.split(';').next()?.trim() {
            "application/protobuf" => Some(Encoding::Protobuf),
            "application/json" => Some(Encoding::Json),
            _ => None,
        }
    }

    fn decode<M: Message + Default + DeserializeOwned>(
        self,
        body: &Bytes,
    ) -> Result<M, TwirpRefusal> {
        match self {
            Encoding::Protobuf => M::decode(body.as_ref()).map_err(|_| TwirpRefusal::MALFORMED),
            Encoding::Json => serde_json::from_slice(body).map_err(|_| TwirpRefusal::MALFORMED),
        }
    }

    fn encode<M: Message + Serialize>(self, message: &M) -> Response {
        match (self, serde_json::to_string(message)) {
            (Encoding::Json, Ok(json)) => {
                ([(header::CONTENT_TYPE, "application/json")], json).into_response()
            }
            _ => (
                [(header::CONTENT_TYPE, "application/protobuf")],
                message.encode_to_vec(),
            )
                .into_response(),
        }
    }
}

pub(super) async fn serve(
    extract::State(state): extract::State<ServerState>,
    Path(method): Path<String>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let claims = match claims(&state, &headers, &query.unwrap_or_default()) {
        Ok(claims) => claims,
        Err(refusal) => return refused(refusal),
    };
    let Some(encoding) = Encoding::of(&headers) else {
        return TwirpRefusal::CONTENT_TYPE.into_response();
    };
    let answered = match method.as_str() {
        "CreateRoom" => create_room(&state, &claims, encoding, &body).await,
        "DeleteRoom" => delete_room(&state, &claims, encoding, &body).await,
        "ListRooms" => list_rooms(&state, &claims, encoding, &body).await,
        "ListParticipants" => list_participants(&state, &claims, encoding, &body).await,
        "RemoveParticipant" => remove_participant(&state, &claims, encoding, &body).await,
        _ => Err(TwirpRefusal::NO_METHOD),
    };
    answered.unwrap_or_else(IntoResponse::into_response)
}

/// The claims of a request. Without a token it has no grants, so its method will refuse it.
fn claims(state: &ServerState, headers: &HeaderMap, query: &str) -> Result<Claims, HttpRefusal> {
    if headers.contains_key(header::AUTHORIZATION) {
        state.access.claims(headers, query)
    } else {
        Ok(Claims::default())
    }
}

async fn create_room(
    state: &ServerState,
    claims: &Claims,
    encoding: Encoding,
    body: &Bytes,
) -> Result<Response, TwirpRefusal> {
    allowed(claims.video.room_create)?;
    let request: proto::CreateRoomRequest = encoding.decode(body)?;
    if request.name.is_empty() || request.name.len() > 256 {
        return Err(TwirpRefusal::NO_NAME);
    }
    let created = state
        .call(move |desk, now| desk.lobby.create_room(&request, now))
        .await;
    Ok(encoding.encode(&created.ok_or(TwirpRefusal::STOPPING)?))
}

async fn delete_room(
    state: &ServerState,
    claims: &Claims,
    encoding: Encoding,
    body: &Bytes,
) -> Result<Response, TwirpRefusal> {
    allowed(claims.video.room_create)?;
    let request: proto::DeleteRoomRequest = encoding.decode(body)?;
    let deleted = state
        .call(move |desk, now| desk.lobby.delete_room(&request.room, now))
        .await;
    if deleted.ok_or(TwirpRefusal::STOPPING)? {
        Ok(encoding.encode(&proto::DeleteRoomResponse {}))
    } else {
        Err(TwirpRefusal::NO_ROOM)
    }
}

async fn list_rooms(
    state: &ServerState,
    claims: &Claims,
    encoding: Encoding,
    body: &Bytes,
) -> Result<Response, TwirpRefusal> {
    allowed(claims.video.room_list)?;
    let request: proto::ListRoomsRequest = encoding.decode(body)?;
    let rooms = state
        .call(move |desk, _| desk.lobby.list_rooms(&request.names))
        .await;
    let rooms = rooms.ok_or(TwirpRefusal::STOPPING)?;
    Ok(encoding.encode(&proto::ListRoomsResponse { rooms }))
}

async fn list_participants(
    state: &ServerState,
    claims: &Claims,
    encoding: Encoding,
    body: &Bytes,
) -> Result<Response, TwirpRefusal> {
    let request: proto::ListParticipantsRequest = encoding.decode(body)?;
    allowed(administers(claims, &request.room))?;
    let participants = state
        .call(move |desk, _| desk.lobby.list_participants(&request.room))
        .await;
    let participants = participants.ok_or(TwirpRefusal::STOPPING)?;
    Ok(encoding.encode(&proto::ListParticipantsResponse { participants }))
}

async fn remove_participant(
    state: &ServerState,
    claims: &Claims,
    encoding: Encoding,
    body: &Bytes,
) -> Result<Response, TwirpRefusal> {
    let request: proto::RoomParticipantIdentity = encoding.decode(body)?;
    allowed(administers(claims, &request.room))?;
    let removed = state
        .call(move |desk, now| {
            desk.lobby
                .remove_participant(&request.room, &request.identity, now)
        })
        .await;
    if removed.ok_or(TwirpRefusal::STOPPING)? {
        Ok(encoding.encode(&proto::RemoveParticipantResponse {}))
    } else {
        Err(TwirpRefusal::NO_PARTICIPANT)
    }
}

fn allowed(granted: bool) -> Result<(), TwirpRefusal> {
    if granted {
        Ok(())
    } else {
        Err(TwirpRefusal::DENIED)
    }
}

fn administers(claims: &Claims, room: &str) -> bool {
    claims.video.room_admin && claims.video.room == room
}
