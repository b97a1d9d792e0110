//! Signalling: what a server may say to a participant, and what a stranger may ask of the embedded
//! SFU before being let in.

use base64::Engine;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header};
use livekit_protocol as proto;
use livekit_protocol::signal_response::Message as Response;
use livekit_token::{AccessToken, VideoGrants};
use prost::Message;
use throng::sfu::server::access::SfuAccess;
use throng::signal::client::{JoinMode, JoinOptions, SignalEvent};
use throng::transport::sdp::Trickled;

use super::{Target, ours};

pub const RESPONSE: Target = Target {
    name: "signal",
    run: response,
    seeds: response_seeds,
    mutations: 3_000,
    // Two bytes may be an empty message in a list, and an empty participant, track or region takes
    // some hundred bytes. Where this is possible, messages are short.
    memory: Some((64 << 10, 160)),
};

pub const ACCESS: Target = Target {
    name: "access",
    run: access,
    seeds: access_seeds,
    mutations: 600,
    // The state of unzipping is some 50 KB. A join request may be a thousand times as long as its
    // zip.
    memory: Some((128 << 10, 2_200)),
};

const KEY: &str = "devkey";
const SECRET: &str = "devsecretdevsecretdevsecretdevsecret";

fn response(input: &[u8]) {
    let message = Bytes::copy_from_slice(input);
    let event = ours(|| SignalEvent::decode(&message));
    match &event {
        SignalEvent::Join(join) => {
            let identities = ours(|| join.others.identities().map(str::len).sum::<usize>());
            assert!(join.others.len() <= input.len() / 2 && identities <= input.len());
        }
        SignalEvent::Offer(description) | SignalEvent::Answer(description) => {
            assert!(description.sdp.len() <= input.len())
        }
        SignalEvent::Trickle(trickle) => {
            let read = ours(|| trickle.candidate_init.parse::<Trickled>());
            if let Ok(Some(candidate)) = read.map(|trickled| trickled.candidate) {
                assert_eq!(
                    candidate
                        .to_init()
                        .parse::<Trickled>()
                        .map(|again| again.candidate)
                        .ok(),
                    Some(Some(candidate))
                );
            }
        }
        SignalEvent::Ignored { len, .. } | SignalEvent::Malformed { len, .. } => {
            assert_eq!(*len, input.len())
        }
        _ => {}
    }
    if let (Ok(theirs), SignalEvent::Offer(ours)) =
        (proto::SignalResponse::decode(&*message), &event)
        && let Some(Response::Offer(theirs)) = theirs.message
        && theirs.encoded_len() + 8 >= input.len()
    {
        assert_eq!(
            (&theirs.sdp, theirs.id),
            (&ours.sdp, ours.id),
            "a message of one field has one meaning"
        );
    }
    if let Ok(text) = std::str::from_utf8(input) {
        let _ = ours(|| text.parse::<Trickled>());
    }
}

fn response_seeds() -> Vec<Vec<u8>> {
    let person = |identity: &str| proto::ParticipantInfo {
        sid: "PA_x".into(),
        identity: identity.into(),
        ..Default::default()
    };
    let description = proto::SessionDescription {
        r#type: "offer".into(),
        sdp: "v=0\r\n".into(),
        id: 3,
        mid_to_track_id: [("0".to_owned(), "TR_1".to_owned())].into(),
    };
    let candidate =
        "{\"candidate\":\"candidate:1 1 udp 1 192.0.2.1 9 typ host\",\"usernameFragment\":\"u\"}";
    let messages = [
        Response::Join(proto::JoinResponse {
            room: Some(proto::Room::default()),
            participant: Some(person("me")),
            other_participants: vec![person("you"), person("they")],
            ice_servers: vec![proto::IceServer::default()],
            ping_interval: 5,
            ..Default::default()
        }),
        Response::Offer(description.clone()),
        Response::Answer(description),
        Response::Trickle(proto::TrickleRequest {
            candidate_init: candidate.into(),
            ..Default::default()
        }),
        Response::TrackPublished(proto::TrackPublishedResponse {
            cid: "cid".into(),
            track: Some(proto::TrackInfo {
                codecs: vec![proto::SimulcastCodecInfo::default(); 3],
                ..Default::default()
            }),
        }),
        Response::Leave(proto::LeaveRequest {
            regions: Some(proto::RegionSettings {
                regions: vec![proto::RegionInfo::default()],
            }),
            ..Default::default()
        }),
        Response::SpeakersChanged(proto::SpeakersChanged {
            speakers: vec![proto::SpeakerInfo::default(); 4],
        }),
        Response::SubscribedQualityUpdate(proto::SubscribedQualityUpdate {
            subscribed_codecs: vec![proto::SubscribedCodec::default(); 2],
            ..Default::default()
        }),
        Response::Reconnect(proto::ReconnectResponse {
            ice_servers: vec![proto::IceServer::default(); 2],
            ..Default::default()
        }),
        Response::MediaSectionsRequirement(proto::MediaSectionsRequirement {
            num_audios: 1,
            num_videos: 2,
        }),
        Response::RefreshToken("token".into()),
    ];
    let encoded = messages.map(|message| {
        proto::SignalResponse {
            message: Some(message),
        }
        .encode_to_vec()
    });
    encoded
        .into_iter()
        .chain([candidate.as_bytes().to_vec()])
        .collect()
}

/// Ways in which the bytes after the first reach the server.
const HEADER: u8 = 0;
const QUERY: u8 = 1;
/// With a good token, as a wrapped join request: as it is, zipped, or as the inner message.
const WRAPPED: u8 = 2;
const ZIPPED: u8 = 3;
const INNER: u8 = 4;

fn access(input: &[u8]) {
    let Some((kind, bytes)) = input.split_first() else {
        return;
    };
    let access = SfuAccess::new(KEY, SECRET);
    let single = kind & 0x10 != 0;
    let base64 = |message: &proto::WrappedJoinRequest| {
        base64::engine::general_purpose::URL_SAFE.encode(message.encode_to_vec())
    };
    let wrapped = |zipped: bool| proto::WrappedJoinRequest {
        compression: i32::from(zipped),
        join_request: bytes.to_vec(),
    };
    let (header, query) = match kind % 5 {
        HEADER => (bytes.to_vec(), String::new()),
        QUERY => (Vec::new(), String::from_utf8_lossy(bytes).into_owned()),
        WRAPPED => (
            good(),
            format!(
                "join_request={}",
                base64::engine::general_purpose::URL_SAFE.encode(bytes)
            ),
        ),
        ZIPPED => (good(), format!("join_request={}", base64(&wrapped(true)))),
        INNER => (good(), format!("join_request={}", base64(&wrapped(false)))),
        kind => unreachable!("{kind}"),
    };
    let mut headers = HeaderMap::new();
    if let Ok(value) = HeaderValue::from_bytes(&header)
        && !header.is_empty()
    {
        headers.insert(header::AUTHORIZATION, value);
    }
    match ours(|| access.entry(&headers, &query, single)) {
        Ok(entry) => assert_eq!(
            (&*entry.room, &*entry.identity),
            ("hall", "somebody"),
            "only our token lets anybody in"
        ),
        Err((status, text)) => {
            assert!(
                status.is_client_error() && text.len() <= 1_024,
                "{status}: {text}"
            );
            assert!(!text.contains(SECRET));
        }
    }
}

/// Returns a header with a valid token.
fn good() -> Vec<u8> {
    static GOOD: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    GOOD.get_or_init(|| format!("Bearer {}", token()).into_bytes())
        .clone()
}

fn token() -> String {
    let grants = VideoGrants {
        room_join: true,
        room: "hall".into(),
        ..Default::default()
    };
    AccessToken::with_api_key(KEY, SECRET)
        .with_identity("somebody")
        .with_grants(grants)
        .to_jwt()
        .expect("a token")
}

fn access_seeds() -> Vec<Vec<u8>> {
    let token = token();
    let path = JoinOptions {
        connection: JoinMode::SINGLE,
        ..JoinOptions::default()
    }
    .path();
    let (_, encoded) = path.split_once("join_request=").expect("a join request");
    let wrapped = base64::engine::general_purpose::URL_SAFE
        .decode(encoded.replace("%3D", "="))
        .expect("our own encoding");
    let inner = proto::WrappedJoinRequest::decode(&*wrapped)
        .expect("our own encoding")
        .join_request;
    let mut zip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut zip, &inner).expect("memory");
    let zipped = zip.finish().expect("memory");
    let dual = JoinOptions::default().path();
    let (_, query) = dual.split_once('?').expect("a query");
    [
        (HEADER, format!("Bearer {token}").into_bytes()),
        (HEADER, b"Basic abc".to_vec()),
        (QUERY, format!("access_token={token}&{query}").into_bytes()),
        (QUERY, b"access_token=e30.e30.e30".to_vec()),
        (WRAPPED | 0x10, wrapped),
        (ZIPPED, zipped),
        (INNER, inner),
    ]
    .into_iter()
    .map(|(kind, bytes)| [&[kind][..], &bytes].concat())
    .collect()
}
