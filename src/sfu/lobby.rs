//! The signalling half: rooms, participants and their descriptions. Sans-IO: what clients ask for, what routers tell and the time go in, messages and media
//! commands come out. No clock, no ambient randomness: a seed gives the same run every time.
//!
//! `handle_*` takes input, [`Lobby::poll_output`] gives output, [`Lobby::next_timeout`] says when [`Lobby::handle_timeout`] is due. Everything that comes from
//! a client is hostile: bounded, checked, never a reason to panic. What a participant gets is bounded by the edge, which closes slow readers.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::SocketAddr;

use bytes::Bytes;
use livekit_protocol as proto;
use livekit_protocol::signal_response::Message;

use super::room::Room;
use super::{MediaCommand, MediaEvent, SubscriptionId, TrackId, TransportId, wire};
use crate::seeded::Seeded;
use crate::transport::peer::IceCredentials;
use crate::transport::sdp::{Candidate, Fingerprint, LocalTransport, Setup};
use crate::units::{Epoch, Time};

/// LiveKit's client protocol that we speak: the last one without data tracks.
pub const PROTOCOL: i32 = 16;
const PING_INTERVAL_SECONDS: i32 = 5;
const PING_TIMEOUT_SECONDS: i32 = 15;

/// One WebSocket. Given out by the lobby, never twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub u32);

/// One participant from its join to its end, over several WebSockets if it resumes. Never given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u32);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct RoomId(pub u32);

pub struct LobbyConfig {
    /// All names, credentials and SSRCs come from it. It must not be guessable where strangers can reach the server.
    pub seed: u64,
    pub epoch: Epoch,
    /// Of the one certificate that all routers have.
    pub fingerprint: Fingerprint,
    /// Where each router receives. A room goes to the one with the fewest participants.
    pub routers: Vec<SocketAddr>,
}

/// Somebody with a good token wants in.
#[derive(Clone, Debug, Default)]
pub struct Entry {
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
    /// A sid: the participant is back with a new WebSocket. Empty: whatever session has this identity.
    pub resume: Option<String>,
    pub add_tracks: Vec<proto::AddTrackRequest>,
    pub publisher_offer: Option<proto::SessionDescription>,
}

#[derive(Debug)]
pub enum Output {
    /// An encoded `SignalResponse`. What goes to many is one buffer.
    Send {
        connection: ConnectionId,
        message: Bytes,
    },
    /// Nothing follows for this WebSocket.
    Close {
        connection: ConnectionId,
    },
    Media {
        router: usize,
        command: MediaCommand,
    },
}

/// How many there are now.
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

/// What there has been since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LobbyTotals {
    /// Participants whose WebSocket opened; one who comes back counts again.
    pub joins: u64,
    /// Of those, the ones whose media connection came up.
    pub active: u64,
    pub published: u64,
    pub subscribed: u64,
}

pub struct Lobby {
    shared: Shared,
    rooms: BTreeMap<RoomId, Room>,
    /// Looked up, never iterated.
    names: HashMap<String, RoomId>,
}

impl Lobby {
    pub fn new(config: LobbyConfig) -> Lobby {
        Lobby {
            shared: Shared {
                ids: Ids::new(config.seed),
                epoch: config.epoch,
                fingerprint: config.fingerprint,
                loads: vec![0; config.routers.len()],
                routers: config.routers,
                totals: LobbyTotals::default(),
                outputs: VecDeque::new(),
                timers: BTreeSet::new(),
                connections: HashMap::new(),
                transports: HashMap::new(),
                tracks: HashMap::new(),
            },
            rooms: BTreeMap::new(),
            names: HashMap::new(),
        }
    }

    /// A WebSocket is open. Its first message follows from [`Lobby::poll_output`].
    pub fn handle_entry(&mut self, entry: Entry, now: Time) -> ConnectionId {
        let connection = self.shared.ids.connection();
        match &entry.resume {
            None => {
                self.shared.totals.joins += 1;
                let room = self.find_or_open(&entry.room, now);
                if let Some(room) = self.rooms.get_mut(&room) {
                    room.handle_join(&mut self.shared, connection, entry, now);
                }
            }
            Some(sid) => {
                let room = self.names.get(&entry.room).and_then(|room| self.rooms.get_mut(room));
                let resumed = room.is_some_and(|room| room.handle_resume(&mut self.shared, connection, &entry.identity, sid, now));
                if !resumed {
                    self.shared.send_leave(
                        connection,
                        proto::DisconnectReason::StateMismatch,
                        proto::leave_request::Action::Reconnect,
                    );
                    self.shared.outputs.push_back(Output::Close { connection });
                }
            }
        }
        connection
    }

    pub fn handle_request(&mut self, connection: ConnectionId, request: proto::SignalRequest, now: Time) {
        if let (Some((room, session)), Some(message)) = (self.shared.connections.get(&connection).copied(), request.message)
            && let Some(room) = self.rooms.get_mut(&room)
        {
            room.handle_request(&mut self.shared, session, message, now);
        }
    }

    /// The WebSocket is gone. The participant may come back.
    pub fn handle_disconnect(&mut self, connection: ConnectionId, now: Time) {
        if let Some((room, session)) = self.shared.connections.remove(&connection)
            && let Some(room) = self.rooms.get_mut(&room)
        {
            room.handle_disconnect(&mut self.shared, session, now);
        }
    }

    pub fn handle_media(&mut self, router: usize, event: MediaEvent, now: Time) {
        match event {
            MediaEvent::Connected { transport, .. } => {
                self.with_transport(transport, |room, shared, session| room.handle_connected(shared, session, transport, now));
            }
            MediaEvent::Failed { transport, .. } => {
                self.with_transport(transport, |room, shared, session| room.handle_failed(shared, session, now));
            }
            // A track counts as published when it is agreed, not when it is heard.
            MediaEvent::TrackStarted { .. } => {}
            MediaEvent::AudioLevels { levels } => self.handle_levels(router, &levels, now),
        }
    }

    pub fn handle_timeout(&mut self, now: Time) {
        while let Some((at, timer)) = self.shared.timers.first().copied().filter(|(at, _)| *at <= now) {
            self.shared.timers.remove(&(at, timer));
            match timer {
                Timer::Participant(room, session) => {
                    if let Some(room) = self.rooms.get_mut(&room) {
                        room.handle_participant_timeout(&mut self.shared, session, now);
                    }
                }
                Timer::Room(id) => {
                    let Some(room) = self.rooms.get_mut(&id) else { continue };
                    room.handle_timeout(&mut self.shared, now);
                    if room.is_expired(now) {
                        self.close_room(id, now);
                    }
                }
                Timer::Track(track) => {
                    let room = self.shared.tracks.get(&track).and_then(|room| self.rooms.get_mut(room));
                    room.into_iter().for_each(|room| room.poll_dynacast(&mut self.shared, track, now));
                }
            }
        }
    }

    /// `Time::MAX` where nothing is due.
    pub fn next_timeout(&self) -> Time {
        self.shared.timers.first().map_or(Time::MAX, |(at, _)| *at)
    }

    pub fn poll_output(&mut self) -> Option<Output> {
        self.shared.outputs.pop_front()
    }

    /// Makes the room, or finds it; what the request says holds only for a new one.
    pub fn create_room(&mut self, request: &proto::CreateRoomRequest, now: Time) -> proto::Room {
        let existed = self.names.contains_key(&request.name);
        let id = self.find_or_open(&request.name, now);
        let Some(room) = self.rooms.get_mut(&id) else {
            return proto::Room::default();
        };
        if !existed {
            room.configure(&mut self.shared, request, now);
        }
        room.describe()
    }

    /// Everybody in it is sent away. `false`: there is no such room.
    pub fn delete_room(&mut self, name: &str, now: Time) -> bool {
        match self.names.get(name).copied() {
            Some(id) => {
                self.close_room(id, now);
                true
            }
            None => false,
        }
    }

    /// All rooms in the order of their making, or those of these names.
    pub fn list_rooms(&self, names: &[String]) -> Vec<proto::Room> {
        let wanted = self
            .rooms
            .values()
            .filter(|room| names.is_empty() || names.iter().any(|name| *name == room.name()));
        wanted.map(Room::describe).collect()
    }

    /// In the order of their joins; nobody where there is no such room.
    pub fn list_participants(&self, room: &str) -> Vec<proto::ParticipantInfo> {
        let room = self.names.get(room).and_then(|room| self.rooms.get(room));
        room.map_or(Vec::new(), Room::list_participants)
    }

    /// `false`: no such participant.
    pub fn remove_participant(&mut self, room: &str, identity: &str, now: Time) -> bool {
        let room = self.names.get(room).and_then(|room| self.rooms.get_mut(room));
        room.is_some_and(|room| room.remove_identity(&mut self.shared, identity, now))
    }

    pub fn statistics(&self) -> LobbyStatistics {
        let mut statistics = LobbyStatistics {
            rooms: self.rooms.len(),
            since_start: self.shared.totals,
            ..LobbyStatistics::default()
        };
        self.rooms.values().for_each(|room| room.count(&mut statistics));
        statistics
    }

    fn find_or_open(&mut self, name: &str, now: Time) -> RoomId {
        if let Some(room) = self.names.get(name) {
            return *room;
        }
        let id = self.shared.ids.room();
        let router = self.shared.least_loaded();
        self.rooms.insert(id, Room::new(&mut self.shared, id, name, router, now));
        self.names.insert(name.to_owned(), id);
        id
    }

    fn close_room(&mut self, id: RoomId, now: Time) {
        if let Some(mut room) = self.rooms.remove(&id) {
            self.names.remove(room.name());
            room.close(&mut self.shared, now);
        }
    }

    fn with_transport(&mut self, transport: TransportId, act: impl FnOnce(&mut Room, &mut Shared, SessionId)) {
        if let Some((room, session)) = self.shared.transports.get(&transport).copied()
            && let Some(room) = self.rooms.get_mut(&room)
        {
            act(room, &mut self.shared, session);
        }
    }

    fn handle_levels(&mut self, router: usize, levels: &[(TrackId, u8)], now: Time) {
        let mut by_room: BTreeMap<RoomId, Vec<(TrackId, u8)>> = BTreeMap::new();
        for (track, level) in levels {
            if let Some(room) = self.shared.tracks.get(track) {
                by_room.entry(*room).or_default().push((*track, *level));
            }
        }
        for (id, room) in self.rooms.iter_mut().filter(|(_, room)| room.router() == router) {
            let levels = by_room.remove(id).unwrap_or_default();
            room.handle_levels(&mut self.shared, &levels, now);
        }
    }
}

/// What is due at a moment. The owner knows what exactly; a timer that comes too early does nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    Room(RoomId),
    Participant(RoomId, SessionId),
    Track(TrackId),
}

/// What all rooms share.
pub(super) struct Shared {
    pub ids: Ids,
    pub epoch: Epoch,
    fingerprint: Fingerprint,
    routers: Vec<SocketAddr>,
    /// Participants on each router.
    loads: Vec<usize>,
    pub totals: LobbyTotals,
    outputs: VecDeque<Output>,
    timers: BTreeSet<(Time, Timer)>,
    // Looked up, never iterated.
    pub connections: HashMap<ConnectionId, (RoomId, SessionId)>,
    pub transports: HashMap<TransportId, (RoomId, SessionId)>,
    pub tracks: HashMap<TrackId, RoomId>,
}

impl Shared {
    pub fn send(&mut self, connection: Option<ConnectionId>, message: Bytes) {
        if let Some(connection) = connection {
            self.outputs.push_back(Output::Send { connection, message });
        }
    }

    pub fn respond(&mut self, connection: Option<ConnectionId>, message: Message) {
        if connection.is_some() {
            self.send(connection, wire::response(message));
        }
    }

    /// Says why, in both of the ways that clients know.
    pub fn send_leave(&mut self, connection: ConnectionId, reason: proto::DisconnectReason, action: proto::leave_request::Action) {
        let leave = proto::LeaveRequest {
            can_reconnect: action == proto::leave_request::Action::Reconnect,
            reason: reason.into(),
            action: action.into(),
            regions: None,
        };
        self.respond(Some(connection), Message::Leave(leave));
    }

    /// The WebSocket has nothing more to say or to hear.
    pub fn close(&mut self, connection: ConnectionId) {
        self.connections.remove(&connection);
        self.outputs.push_back(Output::Close { connection });
    }

    pub fn command(&mut self, router: usize, command: MediaCommand) {
        self.outputs.push_back(Output::Media { router, command });
    }

    pub fn set_timer(&mut self, at: Time, timer: Timer) {
        self.timers.insert((at, timer));
    }

    /// Our end of a new connection on `router`.
    pub fn local_transport(&mut self, router: usize) -> LocalTransport {
        let IceCredentials { ufrag, password } = self.ids.ice_credentials();
        LocalTransport {
            ufrag,
            pwd: password,
            fingerprint: self.fingerprint,
            // LiveKit's role where the client leaves it open.
            setup: Setup::Active,
            candidates: self.routers.get(router).copied().map(Candidate::host).into_iter().collect(),
            session_id: self.ids.draw() >> 1,
        }
    }

    pub fn load(&mut self, router: usize) -> Option<&mut usize> {
        self.loads.get_mut(router)
    }

    fn least_loaded(&self) -> usize {
        let routers = self.loads.iter().enumerate();
        routers.min_by_key(|(_, load)| **load).map_or(0, |(router, _)| router)
    }

    pub fn unix_millis(&self, now: Time) -> i64 {
        i64::try_from(self.epoch.unix_micros(now) / 1_000).unwrap_or(i64::MAX)
    }
}

/// Everything that is drawn or counted.
pub(super) struct Ids {
    chance: Seeded,
    next: u32,
}

impl Ids {
    fn new(seed: u64) -> Ids {
        Ids {
            chance: Seeded::new(seed),
            next: 0,
        }
    }

    pub fn draw(&mut self) -> u64 {
        self.chance.draw()
    }

    /// One counter for all kinds: an id of one kind is never taken for one of another in a log.
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

    fn room(&mut self) -> RoomId {
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

    /// As LiveKit's: two letters for the kind, then twelve of 57.
    pub fn sid(&mut self, kind: &str) -> String {
        const LETTERS: &[u8] = b"23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";
        format!("{kind}_{}", self.text(LETTERS, 12))
    }

    pub fn ice_credentials(&mut self) -> IceCredentials {
        const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
        IceCredentials {
            ufrag: self.text(LETTERS, 16),
            password: self.text(LETTERS, 32),
        }
    }

    fn text(&mut self, letters: &[u8], count: usize) -> String {
        let letter = |_| letters.get(self.chance.below(letters.len() as u64) as usize).copied().unwrap_or(b'a');
        (0..count).map(letter).map(char::from).collect()
    }
}

impl SubscriptionId {
    /// The SSRCs of its packets and of their retransmissions. Multiplying by an odd number maps 31 bits onto themselves, so that no two subscriptions share one,
    /// and none is 0, which some readers take for none.
    pub(super) fn ssrcs(self) -> (u32, u32) {
        let scattered = self.0.wrapping_mul(0x9E37_79B1) << 1;
        (scattered | 1, scattered)
    }
}

pub(super) fn server_info() -> proto::ServerInfo {
    proto::ServerInfo {
        edition: proto::server_info::Edition::Standard.into(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        protocol: PROTOCOL,
        node_id: super::NODE_ID.to_owned(),
        debug_info: "throng's embedded SFU, not a product SFU".to_owned(),
        ..Default::default()
    }
}

/// The Join without the other participants.
pub(super) fn join_response(room: proto::Room, participant: proto::ParticipantInfo, subscriber_primary: bool) -> proto::JoinResponse {
    let codec = |mime: &str| proto::Codec {
        mime: mime.to_owned(),
        ..Default::default()
    };
    let fast_publish = participant.permission.as_ref().is_some_and(|permission| permission.can_publish);
    let server_info = server_info();
    proto::JoinResponse {
        room: Some(room),
        participant: Some(participant),
        server_version: server_info.version.clone(),
        server_info: Some(server_info),
        subscriber_primary,
        ping_interval: PING_INTERVAL_SECONDS,
        ping_timeout: PING_TIMEOUT_SECONDS,
        enabled_publish_codecs: vec![codec("audio/opus"), codec("video/VP8"), codec("video/rtx")],
        fast_publish,
        ..Default::default()
    }
}
