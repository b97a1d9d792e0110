//! Access control: tokens, and the query of a join. The texts of refusals are LiveKit's, except
//! that no token is repeated.

use std::collections::HashMap;
use std::error::Error;
use std::io::Read;

use axum::http::{HeaderMap, StatusCode, header};
use base64::Engine;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use livekit_protocol as proto;
use livekit_token::{Claims, TokenVerifier};
use prost::Message;

use super::super::shared::Entrant;

/// Largest join request. It equals the limit of Go's servers for the head of a request.
const JOIN_REQUEST_BYTES_MAX: usize = 1 << 20;
/// LiveKit's limit for names, and its limit for metadata and attributes.
const NAME_BYTES_MAX: usize = 256;
const METADATA_BYTES_MAX: usize = 64 << 10;
/// Decoder for base64 with or without padding, because clients send both.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::URL_SAFE,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Status and text of a refusal.
pub type HttpRefusal = (StatusCode, String);

/// Checks tokens of the one key pair.
pub struct SfuAccess {
    api_key: String,
    verifier: TokenVerifier,
}

impl SfuAccess {
    pub fn new(api_key: &str, api_secret: &str) -> SfuAccess {
        SfuAccess {
            api_key: api_key.to_owned(),
            verifier: TokenVerifier::with_api_key(api_key, api_secret),
        }
    }

    /// Returns the claims of a request's token, after its signature, `exp` and `nbf` have been
    /// checked.
    pub fn claims(&self, headers: &HeaderMap, query: &str) -> Result<Claims, HttpRefusal> {
        let unauthorized = |text: &str| (StatusCode::UNAUTHORIZED, text.to_owned());
        let token = match headers.get(header::AUTHORIZATION) {
            Some(value) => {
                let bearer = value
                    .to_str()
                    .ok()
                    .and_then(|value| value.strip_prefix("Bearer "));
                let missing =
                    || unauthorized("invalid authorization header. Must start with Bearer ");
                bearer.ok_or_else(missing)?.to_owned()
            }
            None => parameter(query, "access_token")
                .ok_or_else(|| unauthorized("permissions denied"))?,
        };
        self.verifier.verify(&token).map_err(|error| {
            // A token of another key is recognised by its issuer, as in LiveKit.
            let Ok(unverified) = Claims::from_unverified(&token) else {
                return unauthorized("invalid authorization token");
            };
            if unverified.iss != self.api_key {
                return (
                    StatusCode::UNAUTHORIZED,
                    format!("invalid API key: {}", short(&unverified.iss)),
                );
            }
            // The error's own text is about making tokens. Its source says what is wrong.
            let cause = error
                .source()
                .map_or_else(|| error.to_string(), ToString::to_string);
            (
                StatusCode::UNAUTHORIZED,
                format!("invalid token, error: {cause}"),
            )
        })
    }

    /// Reads a join request, and restricts it to what its token allows.
    pub fn entry(
        &self,
        headers: &HeaderMap,
        query: &str,
        single: bool,
    ) -> Result<Entrant, HttpRefusal> {
        let claims = self.claims(headers, query)?;
        let mut entry = admitted(claims)?;
        match parameter(query, "join_request").filter(|request| !request.is_empty()) {
            Some(request) => read_join_request(&mut entry, &request)?,
            None if single => return Err(bad_request("join_request is required")),
            None => read_query(&mut entry, query),
        }
        Ok(entry)
    }
}

fn bad_request(text: impl Into<String>) -> HttpRefusal {
    (StatusCode::BAD_REQUEST, text.into())
}

/// Room, identity and permissions from the token.
fn admitted(claims: Claims) -> Result<Entrant, HttpRefusal> {
    if !claims.video.room_join {
        return Err((StatusCode::UNAUTHORIZED, "permissions denied".to_owned()));
    }
    let too_long = |what: &str| {
        bad_request(format!(
            "{what} length exceeds limits: max length {NAME_BYTES_MAX}"
        ))
    };
    match (claims.sub.len(), claims.video.room.len()) {
        (0, _) => return Err(bad_request("identity cannot be empty")),
        (_, 0) => return Err(bad_request("no room name")),
        (identity, _) if identity > NAME_BYTES_MAX => return Err(too_long("participant identity")),
        (_, room) if room > NAME_BYTES_MAX => return Err(too_long("room name")),
        _ => {}
    }
    let attributes: usize = claims
        .attributes
        .iter()
        .map(|(key, value)| key.len() + value.len())
        .sum();
    if claims.name.len() + claims.metadata.len() + attributes > METADATA_BYTES_MAX {
        return Err(bad_request("metadata size exceeds limits"));
    }
    Ok(Entrant {
        permission: permission(&claims),
        room: claims.video.room,
        identity: claims.sub,
        name: claims.name,
        metadata: claims.metadata,
        attributes: claims.attributes,
        ..Entrant::default()
    })
}

fn permission(claims: &Claims) -> proto::ParticipantPermission {
    let video = &claims.video;
    let source = |name: &String| {
        proto::TrackSource::from_str_name(&name.to_ascii_uppercase()).map(i32::from)
    };
    proto::ParticipantPermission {
        can_subscribe: video.can_subscribe(),
        can_publish: video.can_publish(),
        can_publish_data: video.can_publish_data(),
        can_publish_sources: video
            .can_publish_sources
            .iter()
            .filter_map(source)
            .collect(),
        hidden: video.hidden,
        can_update_metadata: video.can_update_own_metadata(),
        ..Default::default()
    }
}

/// Reads the query of `/rtc`.
fn read_query(entry: &mut Entrant, query: &str) {
    let text = |name| parameter(query, name).unwrap_or_default();
    let flag = |name| matches!(text(name).as_str(), "1" | "true");
    let capability =
        |name: &str| proto::client_info::Capability::from_str_name(name.trim()).map(i32::from);
    entry.client = proto::ClientInfo {
        protocol: text("protocol").parse().unwrap_or_default(),
        client_protocol: text("client_protocol").parse().unwrap_or_default(),
        capabilities: text("capabilities")
            .split(',')
            .filter_map(capability)
            .collect(),
        ..Default::default()
    };
    entry.auto_subscribe = parameter(query, "auto_subscribe")
        .filter(|value| !value.is_empty())
        .is_none()
        || flag("auto_subscribe");
    entry.adaptive_stream = flag("adaptive_stream");
    entry.resume = flag("reconnect").then(|| text("sid"));
}

/// Reads the join request of a client with a single connection.
fn read_join_request(entry: &mut Entrant, encoded: &str) -> Result<(), HttpRefusal> {
    let bytes = BASE64
        .decode(encoded)
        .map_err(|_| bad_request("cannot base64 decode wrapped join request"))?;
    let wrapped = proto::WrappedJoinRequest::decode(bytes.as_slice())
        .map_err(|_| bad_request("cannot unmarshal wrapped join request"))?;
    let request = match wrapped.compression() {
        proto::wrapped_join_request::Compression::None => wrapped.join_request,
        proto::wrapped_join_request::Compression::Gzip => unzipped(&wrapped.join_request)?,
    };
    if request.len() > JOIN_REQUEST_BYTES_MAX {
        return Err(bad_request("join request too large"));
    }
    let request = proto::JoinRequest::decode(request.as_slice())
        .map_err(|_| bad_request("cannot unmarshal join request"))?;
    let settings = request.connection_settings.unwrap_or_default();
    merge_own_words(entry, request.metadata, request.participant_attributes)?;
    entry.single = true;
    entry.client = request.client_info.unwrap_or_default();
    entry.auto_subscribe = settings.auto_subscribe;
    entry.adaptive_stream = settings.adaptive_stream;
    entry.resume = request.reconnect.then_some(request.participant_sid);
    entry.add_tracks = request.add_track_requests;
    entry.publisher_offer = request.publisher_offer;
    Ok(())
}

/// Adds what a participant says about itself beyond its token. This needs a grant.
fn merge_own_words(
    entry: &mut Entrant,
    metadata: String,
    attributes: HashMap<String, String>,
) -> Result<(), HttpRefusal> {
    if metadata.is_empty() && attributes.is_empty() {
        return Ok(());
    }
    if !entry.permission.can_update_metadata {
        return Err((StatusCode::UNAUTHORIZED, "permissions denied".to_owned()));
    }
    let bytes: usize = attributes
        .iter()
        .map(|(key, value)| key.len() + value.len())
        .sum();
    if metadata.len() + bytes > METADATA_BYTES_MAX {
        return Err(bad_request("metadata size exceeds limits"));
    }
    if !metadata.is_empty() {
        entry.metadata = metadata;
    }
    let said = attributes
        .into_iter()
        .filter(|(_, value)| !value.is_empty());
    entry.attributes.extend(said);
    Ok(())
}

/// Decompresses a request. It never unpacks more than is allowed, whatever the archive holds.
fn unzipped(bytes: &[u8]) -> Result<Vec<u8>, HttpRefusal> {
    let mut unzipped = Vec::new();
    let limit = JOIN_REQUEST_BYTES_MAX as u64 + 1;
    let read = flate2::read::GzDecoder::new(bytes)
        .take(limit)
        .read_to_end(&mut unzipped);
    read.map_err(|_| bad_request("cannot read decompressed join request"))?;
    Ok(unzipped)
}

/// The first value of a query parameter.
fn parameter(query: &str, name: &str) -> Option<String> {
    let mut pairs = url::form_urlencoded::parse(query.as_bytes());
    pairs
        .find(|(key, _)| key == name)
        .map(|(_, value)| value.into_owned())
}

/// Shortens a stranger's text that is repeated in a refusal.
fn short(text: &str) -> String {
    text.chars().take(64).collect()
}
