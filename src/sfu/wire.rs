//! LiveKit's messages as the lobby sends them: encoded once, and shared by all receivers.
//!
//! Lists that grow with a room are joined from entries that were encoded before: an entry is
//! encoded when it changes, not when it is sent.

use bytes::Bytes;
use livekit_protocol as proto;
use livekit_protocol::signal_response::Message;
use prost::Message as _;

/// Field numbers of `SignalResponse` and its parts, for messages that are put together by hand.
const RESPONSE_JOIN: u32 = 1;
const RESPONSE_ANSWER: u32 = 2;
const RESPONSE_OFFER: u32 = 3;
const RESPONSE_UPDATE: u32 = 5;
const JOIN_OTHER_PARTICIPANTS: u32 = 3;
const UPDATE_PARTICIPANTS: u32 = 1;
const DESCRIPTION_SDP: u32 = 2;
const DESCRIPTION_MID_TO_TRACK_ID: u32 = 4;
const MAP_KEY: u32 = 1;
const MAP_VALUE: u32 = 2;

/// An encoded `SignalResponse`.
pub(super) fn response(message: Message) -> Bytes {
    proto::SignalResponse {
        message: Some(message),
    }
    .encode_to_vec()
    .into()
}

/// A Join with the participants that were there before, each already encoded.
pub(super) fn join<'a>(
    join: &proto::JoinResponse,
    others: impl Iterator<Item = &'a Bytes> + Clone,
) -> Bytes {
    let own = join.encode_to_vec();
    let len = own.len()
        + others
            .clone()
            .map(|other| field_len(JOIN_OTHER_PARTICIPANTS, other.len()))
            .sum::<usize>();
    let mut message = begin(RESPONSE_JOIN, len);
    message.extend_from_slice(&own);
    others.for_each(|other| push_field(&mut message, JOIN_OTHER_PARTICIPANTS, other));
    message.into()
}

/// A ParticipantUpdate of encoded participants.
pub(super) fn update<'a>(participants: impl Iterator<Item = &'a Bytes> + Clone) -> Bytes {
    let entries = participants
        .clone()
        .map(|participant| field_len(UPDATE_PARTICIPANTS, participant.len()));
    let mut message = begin(RESPONSE_UPDATE, entries.sum());
    participants.for_each(|participant| push_field(&mut message, UPDATE_PARTICIPANTS, participant));
    message.into()
}

/// Our offer to a subscriber connection.
pub(super) fn offer(sdp: &str, id: u32, track_of_mid: &[(impl AsRef<str>, &str)]) -> Bytes {
    description(RESPONSE_OFFER, "offer", sdp, id, track_of_mid)
}

/// Our answer to a client's offer.
pub(super) fn answer(sdp: &str, id: u32, track_of_mid: &[(impl AsRef<str>, &str)]) -> Bytes {
    description(RESPONSE_ANSWER, "answer", sdp, id, track_of_mid)
}

/// A response with a description. Its text is copied only once, whatever its length.
fn description(
    field: u32,
    kind: &str,
    sdp: &str,
    id: u32,
    track_of_mid: &[(impl AsRef<str>, &str)],
) -> Bytes {
    let rest = proto::SessionDescription {
        r#type: kind.to_owned(),
        id,
        ..Default::default()
    };
    let rest = rest.encode_to_vec();
    let entry_len = |(mid, track): &(_, &str)| {
        field_len(MAP_KEY, AsRef::<str>::as_ref(mid).len()) + field_len(MAP_VALUE, track.len())
    };
    let entries = track_of_mid
        .iter()
        .map(|entry| field_len(DESCRIPTION_MID_TO_TRACK_ID, entry_len(entry)));
    let len = rest.len() + field_len(DESCRIPTION_SDP, sdp.len()) + entries.sum::<usize>();
    let mut message = begin(field, len);
    message.extend_from_slice(&rest);
    push_field(&mut message, DESCRIPTION_SDP, sdp.as_bytes());
    for entry in track_of_mid {
        push_key(&mut message, DESCRIPTION_MID_TO_TRACK_ID, entry_len(entry));
        push_field(&mut message, MAP_KEY, entry.0.as_ref().as_bytes());
        push_field(&mut message, MAP_VALUE, entry.1.as_bytes());
    }
    message.into()
}

/// Begins a response with one field, whose content of `len` bytes must follow.
fn begin(field: u32, len: usize) -> Vec<u8> {
    let mut message = Vec::with_capacity(field_len(field, len));
    push_key(&mut message, field, len);
    message
}

/// Appends a length-delimited field (protobuf encoding: key = number << 3 | 2).
fn push_field(message: &mut Vec<u8>, number: u32, content: &[u8]) {
    push_key(message, number, content.len());
    message.extend_from_slice(content);
}

/// Appends the key and length that precede a field's content.
fn push_key(message: &mut Vec<u8>, number: u32, len: usize) {
    push_varint(message, u64::from(number) << 3 | 2);
    push_varint(message, len as u64);
}

/// Length of a field with `len` bytes of content.
fn field_len(number: u32, len: usize) -> usize {
    varint_len(u64::from(number) << 3 | 2) + varint_len(len as u64) + len
}

fn varint_len(value: u64) -> usize {
    (u64::BITS - (value | 1).leading_zeros()).div_ceil(7) as usize
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
        let decoded = |bytes: Bytes| {
            proto::SignalResponse::decode(bytes)
                .unwrap()
                .message
                .unwrap()
        };
        assert_eq!(
            decoded(join(&start, [&encoded, &encoded].into_iter())),
            Message::Join(whole)
        );

        let expected = proto::ParticipantUpdate {
            participants: vec![ann],
        };
        assert_eq!(
            decoded(update(std::iter::once(&encoded))),
            Message::Update(expected)
        );
        for value in [0, 1, 127, 128, 16_383, 16_384, u64::MAX] {
            let mut bytes = Vec::new();
            push_varint(&mut bytes, value);
            assert_eq!(bytes.len(), varint_len(value));
        }

        let mids = [("1", "TR_a"), ("2", "TR_b")];
        let sdp = "v=0".repeat(100);
        let sdp = sdp.as_str();
        let expected = proto::SessionDescription {
            r#type: "offer".into(),
            sdp: sdp.into(),
            id: 7,
            mid_to_track_id: mids
                .map(|(mid, track)| (mid.to_owned(), track.to_owned()))
                .into(),
        };
        assert_eq!(decoded(offer(sdp, 7, &mids)), Message::Offer(expected));
    }
}
