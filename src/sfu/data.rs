//! Rewriting of a data packet on its way from one participant to the others of its room.

use livekit_protocol as proto;
use livekit_protocol::data_packet::Value;
use prost::Message as _;

use super::DataParameters;

/// A packet as the other participants receive it.
pub(super) struct RelayedPacket {
    pub bytes: Vec<u8>,
    /// Identities of the receivers; empty means everybody.
    destinations: Vec<String>,
}

impl RelayedPacket {
    /// Reads a packet from `sender` and writes the sender's real identity into it, because a
    /// client's claim is not trusted. Returns `None` if the packet cannot be read, has content that
    /// only a server may send, or has no content that we know.
    #[allow(deprecated)]
    pub fn of(sender: &DataParameters, payload: &[u8]) -> Option<RelayedPacket> {
        let mut packet = proto::DataPacket::decode(payload).ok()?;
        let (sid, identity) = if sender.hidden {
            ("", "")
        } else {
            (&*sender.sid, &*sender.identity)
        };
        packet.participant_sid = sid.to_owned();
        packet.participant_identity = identity.to_owned();
        let mut destinations = std::mem::take(&mut packet.destination_identities);
        match packet.value.as_mut()? {
            Value::Speaker(_) => return None,
            Value::User(user) => {
                user.participant_sid = sid.to_owned();
                user.participant_identity = identity.to_owned();
                // Older clients name the receivers here.
                let older = std::mem::take(&mut user.destination_identities);
                if destinations.is_empty() {
                    destinations = older;
                }
            }
            _ => {}
        }
        Some(RelayedPacket {
            bytes: packet.encode_to_vec(),
            destinations,
        })
    }

    /// Whether `receiver` gets the packet. Nobody gets what it sent itself.
    pub fn is_for(&self, receiver: &DataParameters, sender: &DataParameters) -> bool {
        let named = |identity: &String| **identity == *receiver.identity;
        receiver.receives
            && receiver.sid != sender.sid
            && (self.destinations.is_empty() || self.destinations.iter().any(named))
    }
}
