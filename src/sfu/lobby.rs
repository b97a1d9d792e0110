//! The signalling half: rooms, participants and their descriptions. It is sans-IO: client requests,
//! router events and the time go in, messages and media commands come out. It has no clock and no
//! ambient randomness: the same seed gives the same run every time.
//!
//! `handle_*` takes input, [`Lobby::poll_output`] gives output, [`Lobby::next_timeout`] says when
//! [`Lobby::handle_timeout`] is due. All input from a client is treated as hostile: it is bounded
//! and checked, and never causes a panic. The output to a participant is bounded by the edge, which
//! closes slow readers.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use livekit_protocol as proto;
use tracing::info;

use super::room::SfuRoom;
pub use super::shared::{
    ConnectionId, Entrant, LobbyOutput, LobbyStatistics, LobbyTotals, PROTOCOL, SessionId,
};
use super::shared::{Ids, RoomId, SfuShared, Timer};
use super::{MediaEvent, RouterAddress, TrackId, TransportId};
use crate::secrets::Secrets;
use crate::transport::sdp::Fingerprint;
use crate::units::{Epoch, Time};

pub struct LobbyConfig {
    /// Seed of the ids that everybody may see: sids and the session ids of descriptions.
    pub seed: u64,
    /// Source of the ICE credentials.
    pub secrets: Secrets,
    pub epoch: Epoch,
    /// Fingerprint of the certificate that all routers share.
    pub fingerprint: Fingerprint,
    /// Address on which each router receives. A room goes to the router with the fewest
    /// participants.
    pub routers: Vec<RouterAddress>,
}

pub struct Lobby {
    shared: SfuShared,
    rooms: BTreeMap<RoomId, SfuRoom>,
    /// Looked up, never iterated.
    names: HashMap<String, RoomId>,
}

impl Lobby {
    pub fn new(config: LobbyConfig) -> Lobby {
        Lobby {
            shared: SfuShared {
                ids: Ids::new(config.seed),
                secrets: config.secrets,
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

    /// Handles a new WebSocket. Its first message follows from [`Lobby::poll_output`].
    pub fn handle_entry(&mut self, entry: Entrant, now: Time) -> ConnectionId {
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
                let room = self
                    .names
                    .get(&entry.room)
                    .and_then(|room| self.rooms.get_mut(room));
                let resumed = room.is_some_and(|room| {
                    room.handle_resume(&mut self.shared, connection, &entry.identity, sid, now)
                });
                if !resumed {
                    self.shared.send_leave(
                        connection,
                        proto::DisconnectReason::StateMismatch,
                        proto::leave_request::Action::Reconnect,
                    );
                    self.shared
                        .outputs
                        .push_back(LobbyOutput::Close { connection });
                }
            }
        }
        connection
    }

    pub fn handle_request(
        &mut self,
        connection: ConnectionId,
        request: proto::SignalRequest,
        now: Time,
    ) {
        if let (Some((room, session)), Some(message)) = (
            self.shared.connections.get(&connection).copied(),
            request.message,
        ) && let Some(room) = self.rooms.get_mut(&room)
        {
            room.handle_request(&mut self.shared, session, message, now);
        }
    }

    /// Handles a closed WebSocket. The participant may come back.
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
                self.with_transport(transport, |room, shared, session| {
                    room.handle_connected(shared, session, transport, now)
                });
            }
            MediaEvent::Failed { transport, failure } => {
                self.with_transport(transport, |room, shared, session| {
                    room.handle_failed(shared, session, failure, now)
                });
            }
            // A track counts as published when it is agreed on, not when its first packet comes.
            MediaEvent::TrackStarted { .. } => {}
            MediaEvent::AudioLevels { levels } => self.handle_levels(router, &levels, now),
        }
    }

    pub fn handle_timeout(&mut self, now: Time) {
        while let Some((at, timer)) = self
            .shared
            .timers
            .first()
            .copied()
            .filter(|(at, _)| *at <= now)
        {
            self.shared.timers.remove(&(at, timer));
            match timer {
                Timer::Participant(room, session) => {
                    if let Some(room) = self.rooms.get_mut(&room) {
                        room.handle_participant_timeout(&mut self.shared, session, now);
                    }
                }
                Timer::Room(id) => {
                    let Some(room) = self.rooms.get_mut(&id) else {
                        continue;
                    };
                    room.handle_timeout(&mut self.shared, now);
                    if room.is_expired(now) {
                        self.close_room(id, now);
                    }
                }
                Timer::Track(track) => {
                    let room = self
                        .shared
                        .tracks
                        .get(&track)
                        .and_then(|room| self.rooms.get_mut(room));
                    room.into_iter()
                        .for_each(|room| room.poll_dynacast(&mut self.shared, track, now));
                }
            }
        }
    }

    /// When the next timeout is due; `Time::MAX` if none is.
    pub fn next_timeout(&self) -> Time {
        self.shared.timers.first().map_or(Time::MAX, |(at, _)| *at)
    }

    pub fn poll_output(&mut self) -> Option<LobbyOutput> {
        self.shared.outputs.pop_front()
    }

    /// Creates the room, or finds it. The request's settings apply only to a new room.
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

    /// Removes everybody from the room and deletes it. Returns `false` if there is no such room.
    pub fn delete_room(&mut self, name: &str, now: Time) -> bool {
        match self.names.get(name).copied() {
            Some(id) => {
                self.close_room(id, now);
                true
            }
            None => false,
        }
    }

    /// Returns all rooms in the order of their creation, or only those with the given names.
    pub fn list_rooms(&self, names: &[String]) -> Vec<proto::Room> {
        let wanted = self
            .rooms
            .values()
            .filter(|room| names.is_empty() || names.iter().any(|name| *name == room.name()));
        wanted.map(SfuRoom::describe).collect()
    }

    /// Returns the visible participants in the order of their joins; none if there is no such room.
    pub fn list_participants(&self, room: &str) -> Vec<proto::ParticipantInfo> {
        let room = self.names.get(room).and_then(|room| self.rooms.get(room));
        room.map_or(Vec::new(), SfuRoom::list_participants)
    }

    /// Removes a participant. Returns `false` if there is no such participant.
    pub fn remove_participant(&mut self, room: &str, identity: &str, now: Time) -> bool {
        let room = self
            .names
            .get(room)
            .and_then(|room| self.rooms.get_mut(room));
        room.is_some_and(|room| room.remove_identity(&mut self.shared, identity, now))
    }

    pub fn statistics(&self) -> LobbyStatistics {
        let mut statistics = LobbyStatistics {
            rooms: self.rooms.len(),
            since_start: self.shared.totals,
            ..LobbyStatistics::default()
        };
        self.rooms
            .values()
            .for_each(|room| room.count(&mut statistics));
        statistics
    }

    fn find_or_open(&mut self, name: &str, now: Time) -> RoomId {
        if let Some(room) = self.names.get(name) {
            return *room;
        }
        let id = self.shared.ids.room();
        let router = self.shared.least_loaded();
        self.rooms
            .insert(id, SfuRoom::new(&mut self.shared, id, name, router, now));
        self.names.insert(name.to_owned(), id);
        info!(room = name, router, "opened a room");
        id
    }

    fn close_room(&mut self, id: RoomId, now: Time) {
        if let Some(mut room) = self.rooms.remove(&id) {
            self.names.remove(room.name());
            room.close(&mut self.shared, now);
            info!(room = room.name(), "closed a room");
        }
    }

    fn with_transport(
        &mut self,
        transport: TransportId,
        act: impl FnOnce(&mut SfuRoom, &mut SfuShared, SessionId),
    ) {
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
        for (id, room) in self
            .rooms
            .iter_mut()
            .filter(|(_, room)| room.router() == router)
        {
            let levels = by_room.remove(id).unwrap_or_default();
            room.handle_levels(&mut self.shared, &levels, now);
        }
    }
}
