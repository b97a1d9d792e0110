//! State that the lobby and its rooms share: ids, owners of connections and tracks, outputs,
//! timers.

use crate::transport::rtp::Ssrc;
use std::collections::{BTreeSet, HashMap, VecDeque};

use bytes::Bytes;
use livekit_protocol as proto;
use livekit_protocol::signal_response::Message;

use super::{
    DataParameters, MediaCommand, RouterAddress, SubscriptionId, TrackId, TransportId, wire,
};
use crate::codec::Codec;
use crate::secrets::Secrets;
use crate::seeded::Seeded;
use crate::transport::peer::IceCredentials;
use crate::transport::sdp::{Candidate, DtlsSetup, Fingerprint, LocalTransport};
use crate::units::{Epoch, Time};

/// The version of LiveKit's client protocol that we speak: the last one without data tracks.
pub const PROTOCOL: i32 = 16;
const PING_INTERVAL_SECONDS: i32 = 5;
const PING_TIMEOUT_SECONDS: i32 = 15;

/// One WebSocket. The lobby assigns the id, and never twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub u32);

/// One participant from its join to its end, over several WebSockets if it resumes. The id is never
/// assigned twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u32);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct RoomId(pub u32);

/// A participant with a valid token that asks to join.
#[derive(Clone, Debug, Default)]
pub struct Entrant {
    pub room: String,
    pub identity: String,
    pub name: String,
    pub metadata: String,
    pub attributes: HashMap<String, String>,
    pub permission: proto::ParticipantPermission,
    pub client: proto::ClientInfo,
    pub auto_subscribe: bool,
    pub adaptive_stream: bool,
    /// One peer connection, whose offers come from the client.
    pub single: bool,
    /// Sid of the session to resume with a new WebSocket. Empty means any session of this identity.
    pub resume: Option<String>,
    pub add_tracks: Vec<proto::AddTrackRequest>,
    pub publisher_offer: Option<proto::SessionDescription>,
}

#[derive(Debug)]
pub enum LobbyOutput {
    /// An encoded `SignalResponse`. All receivers of a message share one buffer.
    Send {
        connection: ConnectionId,
        message: Bytes,
    },
    /// Nothing more is sent to this WebSocket.
    Close { connection: ConnectionId },
    Media {
        router: usize,
        command: MediaCommand,
    },
}

/// Current counts of the lobby.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LobbyStatistics {
    pub rooms: usize,
    pub participants: usize,
    pub published_audio: usize,
    pub published_video: usize,
    pub subscribed_audio: usize,
    pub subscribed_video: usize,
    pub since_start: LobbyTotals,
}

/// Totals since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LobbyTotals {
    /// Number of joins. A participant that joins again counts again; a resumed session does not.
    pub joins: u64,
    /// Joins whose media connection came up.
    pub active: u64,
    pub published: u64,
    pub subscribed: u64,
}

/// A timer. Its owner knows what exactly is due; a timer that comes too early does nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    Room(RoomId),
    Participant(RoomId, SessionId),
    Track(TrackId),
}

/// State that all rooms share.
pub(super) struct SfuShared {
    pub ids: Ids,
    pub secrets: Secrets,
    pub epoch: Epoch,
    pub fingerprint: Fingerprint,
    pub routers: Vec<RouterAddress>,
    /// Number of participants on each router.
    pub loads: Vec<usize>,
    pub totals: LobbyTotals,
    pub outputs: VecDeque<LobbyOutput>,
    pub timers: BTreeSet<(Time, Timer)>,
    // Looked up, never iterated.
    pub connections: HashMap<ConnectionId, (RoomId, SessionId)>,
    pub transports: HashMap<TransportId, (RoomId, SessionId)>,
    pub tracks: HashMap<TrackId, RoomId>,
}

impl SfuShared {
    pub fn send(&mut self, connection: Option<ConnectionId>, message: Bytes) {
        if let Some(connection) = connection {
            self.outputs.push_back(LobbyOutput::Send {
                connection,
                message,
            });
        }
    }

    pub fn respond(&mut self, connection: Option<ConnectionId>, message: Message) {
        if connection.is_some() {
            self.send(connection, wire::response(message));
        }
    }

    /// Sends the reason why a session ends, in both forms that clients know.
    pub fn send_leave(
        &mut self,
        connection: ConnectionId,
        reason: proto::DisconnectReason,
        action: proto::leave_request::Action,
    ) {
        let leave = proto::LeaveRequest {
            can_reconnect: action == proto::leave_request::Action::Reconnect,
            reason: reason.into(),
            action: action.into(),
            regions: None,
        };
        self.respond(Some(connection), Message::Leave(leave));
    }

    /// Closes a WebSocket: nothing more is read from it or sent to it.
    pub fn close(&mut self, connection: ConnectionId) {
        self.connections.remove(&connection);
        self.outputs.push_back(LobbyOutput::Close { connection });
    }

    pub fn command(&mut self, router: usize, command: MediaCommand) {
        self.outputs
            .push_back(LobbyOutput::Media { router, command });
    }

    /// Sends a connection's command to the router. A connection that is new to the router also
    /// serves data channels.
    pub fn connect(&mut self, router: usize, news: Option<MediaCommand>, data: DataParameters) {
        let Some(command) = news else { return };
        let added = match &command {
            MediaCommand::AddTransport { transport, .. } => Some(*transport),
            _ => None,
        };
        self.command(router, command);
        if let Some(transport) = added {
            let parameters = Box::new(data);
            self.command(
                router,
                MediaCommand::ServeData {
                    transport,
                    parameters,
                },
            );
        }
    }

    pub fn set_timer(&mut self, at: Time, timer: Timer) {
        self.timers.insert((at, timer));
    }

    /// Makes our end of a new connection on `router`.
    pub fn local_transport(&mut self, router: usize) -> LocalTransport {
        let IceCredentials { ufrag, password } = IceCredentials::draw(&mut self.secrets);
        LocalTransport {
            ufrag,
            pwd: password,
            fingerprint: self.fingerprint,
            // LiveKit's role when the client leaves it open.
            setup: DtlsSetup::Active,
            candidates: self
                .routers
                .get(router)
                .into_iter()
                .flat_map(|address| {
                    let tcp = address.tcp.map(Candidate::tcp_passive);
                    [Some(Candidate::host(address.udp)), tcp]
                })
                .flatten()
                .collect(),
            session_id: self.ids.session_id(),
        }
    }

    pub fn load(&mut self, router: usize) -> Option<&mut usize> {
        self.loads.get_mut(router)
    }

    pub fn least_loaded(&self) -> usize {
        let routers = self.loads.iter().enumerate();
        routers
            .min_by_key(|(_, load)| **load)
            .map_or(0, |(router, _)| router)
    }

    pub fn unix_millis(&self, now: Time) -> i64 {
        i64::try_from(self.epoch.unix_micros(now) / 1_000).unwrap_or(i64::MAX)
    }
}

/// Generator of all ids that everybody may know. Secrets are not drawn here.
pub(super) struct Ids {
    chance: Seeded,
    next: u32,
}

impl Ids {
    pub fn new(seed: u64) -> Ids {
        Ids {
            chance: Seeded::new(seed),
            next: 0,
        }
    }

    /// Draws the session id of a description: 63 bits (RFC 8829, section 5.2.1).
    pub fn session_id(&mut self) -> u64 {
        self.chance.draw() >> 1
    }

    /// One counter for all kinds, so that in a log an id of one kind is never confused with
    /// another.
    fn count(&mut self) -> u32 {
        self.next += 1;
        self.next
    }

    pub fn connection(&mut self) -> ConnectionId {
        ConnectionId(self.count())
    }

    pub fn session(&mut self) -> SessionId {
        SessionId(self.count())
    }

    pub fn room(&mut self) -> RoomId {
        RoomId(self.count())
    }

    pub fn transport(&mut self) -> TransportId {
        TransportId(self.count())
    }

    pub fn track(&mut self) -> TrackId {
        TrackId(self.count())
    }

    pub fn subscription(&mut self) -> SubscriptionId {
        SubscriptionId(self.count())
    }

    /// Draws a sid in LiveKit's format: two letters for the kind, then twelve of 57.
    pub fn sid(&mut self, kind: &str) -> String {
        const LETTERS: &[u8] = b"23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";
        let letter = |_| char::from(LETTERS[self.chance.below(LETTERS.len() as u64) as usize]);
        let text: String = (0..12).map(letter).collect();
        format!("{kind}_{text}")
    }
}

impl SubscriptionId {
    /// The SSRCs of its packets and of their retransmissions. Multiplying by an odd number maps 31
    /// bits onto themselves, so no two subscriptions share an SSRC. None is 0, which some readers
    /// take for a missing SSRC.
    pub(super) fn ssrcs(self) -> (Ssrc, Ssrc) {
        let scattered = self.0.wrapping_mul(0x9E37_79B1) << 1;
        (Ssrc(scattered | 1), Ssrc(scattered))
    }
}

pub(super) fn server_info() -> proto::ServerInfo {
    proto::ServerInfo {
        edition: proto::server_info::Edition::Standard.into(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        protocol: PROTOCOL,
        node_id: crate::plan::EMBEDDED_NODE_ID.to_owned(),
        debug_info: "throng's embedded SFU, not a product SFU".to_owned(),
        ..Default::default()
    }
}

/// The Join without the other participants.
pub(super) fn join_response(
    room: proto::Room,
    participant: proto::ParticipantInfo,
    subscriber_primary: bool,
) -> proto::JoinResponse {
    let codec = |mime: &str| proto::Codec {
        mime: mime.to_owned(),
        ..Default::default()
    };
    let codecs = Codec::ALL.map(Codec::mime);
    let codecs = codecs.iter().chain(&["video/rtx"]);
    let fast_publish = participant
        .permission
        .as_ref()
        .is_some_and(|permission| permission.can_publish);
    let server_info = server_info();
    proto::JoinResponse {
        room: Some(room),
        participant: Some(participant),
        server_version: server_info.version.clone(),
        server_info: Some(server_info),
        subscriber_primary,
        ping_interval: PING_INTERVAL_SECONDS,
        ping_timeout: PING_TIMEOUT_SECONDS,
        enabled_publish_codecs: codecs.map(|mime| codec(mime)).collect(),
        fast_publish,
        ..Default::default()
    }
}
