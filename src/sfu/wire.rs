//! LiveKit's messages as the lobby sends them: encoded once, shared by all who get them.
//!
//! Lists that grow with a room are joined from parts that were encoded before: an entry is encoded when it changes, not when it is sent.

use std::collections::BTreeMap;

use bytes::Bytes;
use livekit_protocol as proto;
use livekit_protocol::signal_response::Message;
use prost::Message as _;

/// `SignalResponse`'s and its parts' field numbers, where messages are put together by hand.
const RESPONSE_JOIN: u32 = 1;
const RESPONSE_ANSWER: u32 = 2;
const RESPONSE_OFFER: u32 = 3;
const RESPONSE_UPDATE: u32 = 5;
const JOIN_OTHER_PARTICIPANTS: u32 = 3;
const UPDATE_PARTICIPANTS: u32 = 1;
const DESCRIPTION_MID_TO_TRACK_ID: u32 = 4;
const MAP_KEY: u32 = 1;
const MAP_VALUE: u32 = 2;

/// An encoded `SignalResponse`.
pub(super) fn response(message: Message) -> Bytes {
    proto::SignalResponse { message: Some(message) }.encode_to_vec().into()
}

/// A Join with the participants who were there before, each encoded.
pub(super) fn join<'a>(join: &proto::JoinResponse, others: impl Iterator<Item = &'a Bytes>) -> Bytes {
    let mut body = join.encode_to_vec();
    others.for_each(|other| push_field(&mut body, JOIN_OTHER_PARTICIPANTS, other));
    wrapped(RESPONSE_JOIN, &body)
}

/// A ParticipantUpdate of encoded participants.
pub(super) fn update<'a>(participants: impl Iterator<Item = &'a Bytes>) -> Bytes {
    let mut body = Vec::new();
    participants.for_each(|participant| push_field(&mut body, UPDATE_PARTICIPANTS, participant));
    wrapped(RESPONSE_UPDATE, &body)
}

/// Our offer to a subscriber connection.
pub(super) fn offer(sdp: String, id: u32, track_of_mid: &BTreeMap<String, String>) -> Bytes {
    wrapped(RESPONSE_OFFER, &description("offer", sdp, id, track_of_mid))
}

/// Our answer to a client's offer.
pub(super) fn answer(sdp: String, id: u32, track_of_mid: &BTreeMap<String, String>) -> Bytes {
    wrapped(RESPONSE_ANSWER, &description("answer", sdp, id, track_of_mid))
}

/// The map is written in its order, so that a seed gives the same bytes every time.
fn description(kind: &str, sdp: String, id: u32, track_of_mid: &BTreeMap<String, String>) -> Vec<u8> {
    let description = proto::SessionDescription {
        r#type: kind.to_owned(),
        sdp,
        id,
        ..Default::default()
    };
    let mut body = description.encode_to_vec();
    for (mid, track) in track_of_mid {
        let mut entry = Vec::with_capacity(mid.len() + track.len() + 4);
        push_field(&mut entry, MAP_KEY, mid.as_bytes());
        push_field(&mut entry, MAP_VALUE, track.as_bytes());
        push_field(&mut body, DESCRIPTION_MID_TO_TRACK_ID, &entry);
    }
    body
}

fn wrapped(field: u32, body: &[u8]) -> Bytes {
    let mut message = Vec::with_capacity(body.len() + 8);
    push_field(&mut message, field, body);
    message.into()
}

/// A length-delimited field (protobuf encoding: key = number << 3 | 2).
fn push_field(message: &mut Vec<u8>, number: u32, content: &[u8]) {
    push_varint(message, u64::from(number) << 3 | 2);
    push_varint(message, content.len() as u64);
    message.extend_from_slice(content);
}

fn push_varint(message: &mut Vec<u8>, mut value: u64) {
    while value > 0x7F {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_put_together_by_hand_are_those_that_the_library_writes() {
        let ann = proto::ParticipantInfo {
            sid: "PA_1".into(),
            identity: "ann".repeat(60),
            ..Default::default()
        };
        let encoded = Bytes::from(ann.encode_to_vec());
        let whole = proto::JoinResponse {
            ping_interval: 5,
            other_participants: vec![ann.clone(), ann.clone()],
            ..Default::default()
        };
        let start = proto::JoinResponse {
            ping_interval: 5,
            ..Default::default()
        };
        let decoded = |bytes: Bytes| proto::SignalResponse::decode(bytes).unwrap().message.unwrap();
        assert_eq!(decoded(join(&start, [&encoded, &encoded].into_iter())), Message::Join(whole));

        let expected = proto::ParticipantUpdate { participants: vec![ann] };
        assert_eq!(decoded(update(std::iter::once(&encoded))), Message::Update(expected));

        let mids = BTreeMap::from([("1".to_owned(), "TR_a".to_owned()), ("2".to_owned(), "TR_b".to_owned())]);
        let expected = proto::SessionDescription {
            r#type: "offer".into(),
            sdp: "v=0".into(),
            id: 7,
            mid_to_track_id: mids.clone().into_iter().collect(),
        };
        assert_eq!(decoded(offer("v=0".into(), 7, &mids)), Message::Offer(expected));
    }
}
