//! One room: its participants, what they publish, what they subscribe to, and what they are told.

// LiveKit calls some fields of a track deprecated, but still fills and reads them, as clients do.
#![allow(deprecated)]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use bytes::Bytes;
use livekit_protocol as proto;
use livekit_protocol::leave_request::Action;
use livekit_protocol::participant_info::State;
use livekit_protocol::signal_request::Message as Request;
use livekit_protocol::signal_response::Message as Response;
use prost::Message as _;
use tracing::{debug, info, warn};

use super::participant::{
    AnsweringPeer, LiveSelection, OfferingPeer, Participant, ParticipantSubscription, PendingTrack,
    dtls_active_beside,
};
use super::shared::{
    ConnectionId, Entrant, LobbyStatistics, RoomId, SessionId, SfuShared, Timer, join_response,
    server_info,
};
use super::track::{Dynacast, Loudness, PublishedTrack, Settings, quality_update};
use super::{Encodings, MediaCommand, TrackId, TrackParameters, TransportId, wire};
use crate::codec::{Codec, PayloadTypes};
use crate::measure::Kind;
use crate::transport::peer::PeerFailure;
use crate::transport::sdp::serve::{
    AgreedMedia, ClientSection, SectionUse, SentTrack, write_answer,
};
use crate::transport::sdp::{DtlsSetup, Extension, RtcpFeedback, SdpError};
use crate::units::Time;

/// Interval at which changes of participants without published tracks are sent together (LiveKit's
/// `subscriberUpdateInterval`).
const UPDATE_INTERVAL: Duration = Duration::from_secs(3);
/// Delay that puts all tracks of a publisher into one offer, because they come together.
const GATHER: Duration = Duration::from_millis(10);
/// Least time between two offers to one participant. LiveKit waits 150 ms before each offer. Here
/// only the second of two offers waits, and a room that fills up still costs each participant at
/// most ten descriptions a second.
const NEGOTIATION_SPACING: Duration = Duration::from_millis(100);
/// LiveKit's limits for an answer and for a participant's first connection.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);
/// Time after which a participant without a WebSocket is removed. Media alone keeps nobody in the
/// room.
const SIGNAL_TIMEOUT: Duration = Duration::from_secs(20);
/// Time after which speakers count as silent without a report. Routers report levels more often
/// than this while somebody speaks.
const SPEAKERS_STALE_AFTER: Duration = Duration::from_millis(800);
/// Defaults of the room service (LiveKit's values).
const EMPTY_TIMEOUT: Duration = Duration::from_secs(300);
const DEPARTURE_TIMEOUT: Duration = Duration::from_secs(20);
/// Limits of a participant's announced tracks that wait for their offer, and of its published
/// tracks: far more than any client has.
const PENDING_TRACKS_MAX: usize = 64;
const PUBLISHED_TRACKS_MAX: usize = 256;
/// Largest size of a client's texts that are repeated to everybody.
const TEXT_BYTES_MAX: usize = 4096;
/// Largest size of all attributes of a participant, those of its token included (LiveKit's limit):
/// everybody gets all of them on each change.
const ATTRIBUTES_BYTES_MAX: usize = 64 << 10;
/// Largest number of layers in an announcement. Genuine clients describe three.
const DESCRIBED_LAYERS_MAX: usize = 8;

pub(super) struct SfuRoom {
    id: RoomId,
    /// Includes the counts of visible participants, which are updated as they come and go, because
    /// everybody who joins gets them.
    info: proto::Room,
    router: usize,
    participants: BTreeMap<SessionId, Participant>,
    /// Looked up, never iterated.
    identities: HashMap<String, SessionId>,
    tracks: BTreeMap<TrackId, PublishedTrack>,
    track_sids: HashMap<String, TrackId>,
    /// Participants whose changes wait for the next common update.
    waiting_updates: BTreeMap<SessionId, Bytes>,
    update_at: Option<Time>,
    expires_at: Option<Time>,
    /// The speakers last reported, with their loudness.
    speakers: BTreeMap<SessionId, f32>,
    /// Tracks whose loudness has not decayed to nothing.
    heard: BTreeSet<TrackId>,
    speakers_stale_at: Option<Time>,
}

/// Reason why a participant's session ends, and what the participant is told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct End {
    reason: proto::DisconnectReason,
    /// `None`: it already knows.
    action: Option<Action>,
}

impl End {
    const LEFT: End = End {
        reason: proto::DisconnectReason::ClientInitiated,
        action: None,
    };
    const REPLACED: End = End::disconnect(proto::DisconnectReason::DuplicateIdentity);
    const REMOVED: End = End::disconnect(proto::DisconnectReason::ParticipantRemoved);
    const ROOM_DELETED: End = End::disconnect(proto::DisconnectReason::RoomDeleted);
    const ROOM_FULL: End = End::disconnect(proto::DisconnectReason::JoinFailure);
    const NEVER_CONNECTED: End = End::reconnect(proto::DisconnectReason::JoinFailure);
    const SILENT: End = End::reconnect(proto::DisconnectReason::ConnectionTimeout);
    /// Its descriptions cannot be used.
    const MISMATCH: End = End::reconnect(proto::DisconnectReason::StateMismatch);

    const fn disconnect(reason: proto::DisconnectReason) -> End {
        End {
            reason,
            action: Some(Action::Disconnect),
        }
    }

    const fn reconnect(reason: proto::DisconnectReason) -> End {
        End {
            reason,
            action: Some(Action::Reconnect),
        }
    }
}

impl SfuRoom {
    pub fn new(
        shared: &mut SfuShared,
        id: RoomId,
        name: &str,
        router: usize,
        now: Time,
    ) -> SfuRoom {
        let millis = shared.unix_millis(now);
        let mut room = SfuRoom {
            id,
            info: proto::Room {
                sid: shared.ids.sid("RM"),
                name: name.to_owned(),
                empty_timeout: EMPTY_TIMEOUT.as_secs() as u32,
                departure_timeout: DEPARTURE_TIMEOUT.as_secs() as u32,
                creation_time: millis / 1_000,
                creation_time_ms: millis,
                ..Default::default()
            },
            router,
            participants: BTreeMap::new(),
            identities: HashMap::new(),
            tracks: BTreeMap::new(),
            track_sids: HashMap::new(),
            waiting_updates: BTreeMap::new(),
            update_at: None,
            expires_at: None,
            speakers: BTreeMap::new(),
            heard: BTreeSet::new(),
            speakers_stale_at: None,
        };
        room.expire_after(shared, EMPTY_TIMEOUT, now);
        room
    }

    pub fn configure(
        &mut self,
        shared: &mut SfuShared,
        request: &proto::CreateRoomRequest,
        now: Time,
    ) {
        let or = |asked: u32, default: Duration| {
            if asked == 0 {
                default.as_secs() as u32
            } else {
                asked
            }
        };
        self.info.empty_timeout = or(request.empty_timeout, EMPTY_TIMEOUT);
        self.info.departure_timeout = or(request.departure_timeout, DEPARTURE_TIMEOUT);
        self.info.max_participants = request.max_participants;
        self.info.metadata = request.metadata.clone();
        self.expire_after(
            shared,
            Duration::from_secs(self.info.empty_timeout.into()),
            now,
        );
    }

    pub fn name(&self) -> &str {
        &self.info.name
    }

    pub fn router(&self) -> usize {
        self.router
    }

    pub fn describe(&self) -> proto::Room {
        self.info.clone()
    }

    pub fn list_participants(&self) -> Vec<proto::ParticipantInfo> {
        let visible = self
            .participants
            .values()
            .filter(|participant| !participant.is_hidden());
        visible
            .map(|participant| participant.info.clone())
            .collect()
    }

    pub fn count(&self, statistics: &mut LobbyStatistics) {
        statistics.participants += self.participants.len();
        for track in self.tracks.values() {
            let (published, subscribed) = match track.kind() {
                Kind::Audio => (
                    &mut statistics.published_audio,
                    &mut statistics.subscribed_audio,
                ),
                Kind::Video => (
                    &mut statistics.published_video,
                    &mut statistics.subscribed_video,
                ),
            };
            *published += 1;
            *subscribed += track.subscribers.len();
        }
    }

    pub fn is_expired(&self, now: Time) -> bool {
        self.expires_at.is_some_and(|at| at <= now)
    }

    /// Closes the room and tells everybody.
    pub fn close(&mut self, shared: &mut SfuShared, now: Time) {
        while let Some(session) = self
            .participants
            .first_key_value()
            .map(|(session, _)| *session)
        {
            self.end(shared, session, End::ROOM_DELETED, now);
        }
    }

    // Joining and leaving.

    pub fn handle_join(
        &mut self,
        shared: &mut SfuShared,
        connection: ConnectionId,
        entry: Entrant,
        now: Time,
    ) {
        if let Some(older) = self.identities.get(&entry.identity).copied() {
            self.end(shared, older, End::REPLACED, now);
        }
        if self.is_full() {
            return self.refuse(shared, connection, &entry.identity);
        }
        let (add_tracks, publisher_offer) =
            (entry.add_tracks.clone(), entry.publisher_offer.clone());
        let participant = self.new_participant(shared, connection, entry, now);
        let session = participant.id;
        let others = self
            .participants
            .values()
            .filter(|other| !other.is_hidden())
            .map(|other| &other.encoded);
        let join = join_response(
            self.describe(),
            participant.info.clone(),
            participant.offering.is_some(),
        );
        shared.send(Some(connection), wire::join(&join, others));
        shared.connections.insert(connection, (self.id, session));
        for (transport, _) in participant.transports() {
            shared.transports.insert(transport, (self.id, session));
        }
        if let Some(load) = shared.load(self.router) {
            *load += 1;
        }
        shared.set_timer(now + CONNECT_TIMEOUT, Timer::Participant(self.id, session));
        self.identities
            .insert(participant.info.identity.clone(), session);
        self.info.num_participants += u32::from(!participant.is_hidden());
        info!(
            room = self.name(),
            identity = participant.info.identity,
            connections = 2 - u32::from(participant.single),
            "joined"
        );
        self.participants.insert(session, participant);
        self.expires_at = None;
        self.change_state(shared, session, State::Joined, now);
        self.subscribe_to_existing(shared, session, now);
        for request in add_tracks {
            self.handle_add_track(shared, session, request);
        }
        if let Some(offer) = publisher_offer {
            self.handle_offer(shared, session, &offer, now);
        }
        // The subscriber connection is set up at once, with or without tracks.
        self.offer(shared, session, now);
    }

    fn refuse(&self, shared: &mut SfuShared, connection: ConnectionId, identity: &str) {
        let room = self.name();
        warn!(room, identity, "refused a participant: the room is full");
        shared.send_leave(connection, End::ROOM_FULL.reason, Action::Disconnect);
        shared.close(connection);
    }

    fn is_full(&self) -> bool {
        let most = self.info.max_participants as usize;
        most > 0 && self.participants.len() >= most
    }

    fn new_participant(
        &mut self,
        shared: &mut SfuShared,
        connection: ConnectionId,
        entry: Entrant,
        now: Time,
    ) -> Participant {
        let millis = shared.unix_millis(now);
        let info = proto::ParticipantInfo {
            sid: shared.ids.sid("PA"),
            identity: entry.identity,
            name: entry.name,
            metadata: entry.metadata,
            attributes: entry.attributes,
            state: State::Joining.into(),
            joined_at: millis / 1_000,
            joined_at_ms: millis,
            permission: Some(entry.permission.clone()),
            client_protocol: entry.client.client_protocol,
            capabilities: entry.client.capabilities,
            ..Default::default()
        };
        let offers = !entry.single && entry.permission.can_subscribe;
        let answering =
            AnsweringPeer::new(shared.ids.transport(), shared.local_transport(self.router));
        let offering = offers.then(|| {
            OfferingPeer::new(shared.ids.transport(), shared.local_transport(self.router))
        });
        Participant {
            id: shared.ids.session(),
            encoded: info.encode_to_vec().into(),
            info,
            auto_subscribe: entry.auto_subscribe && entry.permission.can_subscribe,
            permission: entry.permission,
            adaptive_stream: entry.adaptive_stream,
            connection: Some(connection),
            lost_at: None,
            joined_at: now,
            answering,
            offering,
            single: entry.single,
            pending: Vec::new(),
            published: BTreeSet::new(),
            subscriptions: BTreeMap::new(),
            negotiate_at: None,
            negotiated_at: None,
        }
    }

    /// Resumes a participant's session with a new WebSocket; its connections have stayed. Returns
    /// `false` if the participant is not in the room.
    pub fn handle_resume(
        &mut self,
        shared: &mut SfuShared,
        connection: ConnectionId,
        identity: &str,
        sid: &str,
        now: Time,
    ) -> bool {
        let Some(session) = self.identities.get(identity).copied() else {
            return false;
        };
        let everybody = wire::update(self.visible().map(|participant| &participant.encoded));
        let room = self.describe();
        let Some(participant) = self
            .participants
            .get_mut(&session)
            .filter(|participant| sid.is_empty() || participant.info.sid == sid)
        else {
            return false;
        };
        if let Some(older) = participant.connection.replace(connection) {
            shared.close(older);
        }
        shared.connections.insert(connection, (self.id, session));
        participant.lost_at = None;
        info!(room = room.name, identity, "resumed its session");
        let reconnect = proto::ReconnectResponse {
            server_info: Some(server_info()),
            ..Default::default()
        };
        shared.respond(Some(connection), Response::Reconnect(reconnect));
        shared.send(Some(connection), everybody);
        shared.respond(
            Some(connection),
            Response::RoomUpdate(proto::RoomUpdate { room: Some(room) }),
        );
        if let Some(peer) = &mut participant.offering {
            // The network path may have changed, and an earlier offer may be lost: this offer
            // replaces it.
            peer.restart(shared);
            self.offer(shared, session, now);
        } else if participant.single {
            // Our request for sections may be lost, too.
            participant.answering.requested = (0, 0);
            self.schedule_negotiation(shared, session, now);
        }
        true
    }

    pub fn handle_disconnect(&mut self, shared: &mut SfuShared, session: SessionId, now: Time) {
        let Some(participant) = self.participants.get_mut(&session) else {
            return;
        };
        participant.connection = None;
        participant.lost_at = Some(now);
        info!(
            room = self.info.name,
            identity = participant.info.identity,
            "lost its signalling connection, and may resume"
        );
        shared.set_timer(now + SIGNAL_TIMEOUT, Timer::Participant(self.id, session));
    }

    pub fn remove_identity(&mut self, shared: &mut SfuShared, identity: &str, now: Time) -> bool {
        let session = self.identities.get(identity).copied();
        session
            .into_iter()
            .for_each(|session| self.end(shared, session, End::REMOVED, now));
        session.is_some()
    }

    /// Handles a connection of a participant that has come up.
    pub fn handle_connected(
        &mut self,
        shared: &mut SfuShared,
        session: SessionId,
        transport: TransportId,
        now: Time,
    ) {
        let participant = self.participants.get(&session);
        if let Some(participant) = participant {
            debug!(
                room = self.name(),
                identity = participant.info.identity,
                is_primary = participant.primary() == transport,
                "ICE and DTLS are done"
            );
        }
        let primary = participant.filter(|participant| participant.primary() == transport);
        if primary.is_some_and(|participant| !participant.is_active()) {
            shared.totals.active += 1;
            self.change_state(shared, session, State::Active, now);
        }
    }

    /// Ends a session after one of its connections failed: only a new session helps.
    pub fn handle_failed(
        &mut self,
        shared: &mut SfuShared,
        session: SessionId,
        failure: PeerFailure,
        now: Time,
    ) {
        if let Some(participant) = self.participants.get(&session) {
            let (room, identity) = (self.name(), participant.info.identity.as_str());
            // A client that leaves may end DTLS before it says that it leaves.
            if failure == PeerFailure::ClosedByRemote {
                debug!(room, identity, ?failure, "a media connection ended");
            } else {
                warn!(room, identity, ?failure, "a media connection ended");
            }
        }
        self.end(shared, session, End::SILENT, now);
    }

    fn end(&mut self, shared: &mut SfuShared, session: SessionId, end: End, now: Time) {
        let Some(participant) = self.participants.get(&session) else {
            return;
        };
        for track in participant.published.clone() {
            self.unpublish(shared, track, now);
        }
        let Some(mut participant) = self.participants.remove(&session) else {
            return;
        };
        for (track, subscription) in &participant.subscriptions {
            self.forget_subscriber(shared, session, *track, subscription, now);
        }
        for (transport, added) in participant.transports() {
            shared.transports.remove(&transport);
            if added {
                shared.command(self.router, MediaCommand::RemoveTransport { transport });
            }
        }
        if let Some(connection) = participant.connection {
            if let Some(action) = end.action {
                shared.send_leave(connection, end.reason, action);
            }
            shared.close(connection);
        }
        if self.identities.get(&participant.info.identity) == Some(&session) {
            self.identities.remove(&participant.info.identity);
        }
        shared
            .load(self.router)
            .into_iter()
            .for_each(|load| *load = load.saturating_sub(1));
        self.speakers.remove(&session);
        if !participant.is_hidden() {
            self.info.num_participants -= 1;
            self.info.num_publishers -= u32::from(participant.info.is_publisher);
        }
        participant.info.set_state(State::Disconnected);
        participant.info.set_disconnect_reason(end.reason);
        info!(
            room = self.name(),
            identity = participant.info.identity,
            reason = end.reason.as_str_name(),
            "left"
        );
        participant.encode();
        // A participant that takes over an identity must not be confused with the one that left, so
        // the end of the old one is sent first.
        self.tell(shared, &participant, end == End::REPLACED, now);
        if self.participants.is_empty() {
            self.expire_after(
                shared,
                Duration::from_secs(self.info.departure_timeout.into()),
                now,
            );
        }
    }

    fn expire_after(&mut self, shared: &mut SfuShared, timeout: Duration, now: Time) {
        self.expires_at = Some(now + timeout);
        shared.set_timer(now + timeout, Timer::Room(self.id));
    }

    // Updates to everybody.

    fn visible(&self) -> impl Iterator<Item = &Participant> + Clone {
        self.participants
            .values()
            .filter(|participant| !participant.is_hidden())
    }

    fn change_state(
        &mut self,
        shared: &mut SfuShared,
        session: SessionId,
        state: State,
        now: Time,
    ) {
        if let Some(participant) = self.participants.get_mut(&session) {
            participant.info.set_state(state);
            self.announce(shared, session, false, now);
        }
    }

    /// Sends a participant's changed information.
    fn announce(&mut self, shared: &mut SfuShared, session: SessionId, at_once: bool, now: Time) {
        let Some(participant) = self.participants.get_mut(&session) else {
            return;
        };
        participant.encode();
        let Some(participant) = self.participants.get(&session) else {
            return;
        };
        let (connection, encoded) = (participant.connection, participant.encoded.clone());
        if participant.is_hidden() {
            return shared.send(connection, wire::update(std::iter::once(&encoded)));
        }
        let urgent = at_once || participant.info.is_publisher;
        self.queue_update(shared, session, encoded, urgent, now);
    }

    /// Does the same as [`SfuRoom::announce`], for a participant that has left.
    fn tell(&mut self, shared: &mut SfuShared, gone: &Participant, at_once: bool, now: Time) {
        if !gone.is_hidden() {
            let urgent = at_once || gone.info.is_publisher;
            self.queue_update(shared, gone.id, gone.encoded.clone(), urgent, now);
        }
    }

    /// Sends an update. Changes of publishers are sent at once. Those of other participants are
    /// sent together, as in LiveKit, because each of them goes to everybody.
    fn queue_update(
        &mut self,
        shared: &mut SfuShared,
        session: SessionId,
        encoded: Bytes,
        urgent: bool,
        now: Time,
    ) {
        if urgent {
            self.waiting_updates.remove(&session);
            return self.broadcast(shared, &wire::update(std::iter::once(&encoded)));
        }
        self.waiting_updates.insert(session, encoded);
        if self.update_at.is_none() {
            let at = now.next_whole(UPDATE_INTERVAL);
            self.update_at = Some(at);
            shared.set_timer(at, Timer::Room(self.id));
        }
    }

    fn broadcast(&self, shared: &mut SfuShared, message: &Bytes) {
        for participant in self.participants.values() {
            shared.send(participant.connection, message.clone());
        }
    }

    pub fn handle_timeout(&mut self, shared: &mut SfuShared, now: Time) {
        if self.update_at.is_some_and(|at| at <= now) {
            self.update_at = None;
            let updates = std::mem::take(&mut self.waiting_updates);
            self.broadcast(shared, &wire::update(updates.values()));
        }
        if self.speakers_stale_at.is_some_and(|at| at <= now) {
            self.handle_levels(shared, &[], now);
        }
    }

    /// Takes the loudness of tracks in the last interval. Tracks that are missing were silent.
    pub fn handle_levels(&mut self, shared: &mut SfuShared, levels: &[(TrackId, u8)], now: Time) {
        let levels: BTreeMap<TrackId, u8> = levels.iter().copied().collect();
        let concerned: BTreeSet<TrackId> =
            self.heard.iter().chain(levels.keys()).copied().collect();
        if concerned.is_empty() && self.speakers.is_empty() {
            return;
        }
        self.heard.clear();
        let mut speakers: BTreeMap<SessionId, f32> = BTreeMap::new();
        for id in concerned {
            let Some(track) = self.tracks.get_mut(&id) else {
                continue;
            };
            if let Some(level) = track.loudness.handle_level(levels.get(&id).copied()) {
                self.heard.insert(id);
                let loudest = speakers.entry(track.publisher).or_default();
                *loudest = loudest.max(level);
            }
        }
        self.speakers_stale_at = (!speakers.is_empty()).then(|| now + SPEAKERS_STALE_AFTER);
        if let Some(at) = self.speakers_stale_at {
            shared.set_timer(at, Timer::Room(self.id));
        }
        let before = std::mem::replace(&mut self.speakers, speakers);
        let ended = before
            .keys()
            .filter(|session| !self.speakers.contains_key(session))
            .map(|session| (session, 0.0));
        let changed = self
            .speakers
            .iter()
            .filter(|(session, level)| before.get(session) != Some(level));
        let changed = changed
            .map(|(session, level)| (session, *level))
            .chain(ended);
        let info = |(session, level): (&SessionId, f32)| {
            self.participants
                .get(session)
                .map(|participant| proto::SpeakerInfo {
                    sid: participant.info.sid.clone(),
                    level,
                    active: level > 0.0,
                })
        };
        let speakers: Vec<proto::SpeakerInfo> = changed.filter_map(info).collect();
        if !speakers.is_empty() {
            self.broadcast(
                shared,
                &wire::response(Response::SpeakersChanged(proto::SpeakersChanged {
                    speakers,
                })),
            );
        }
    }

    // Requests from participants.

    pub fn handle_request(
        &mut self,
        shared: &mut SfuShared,
        session: SessionId,
        request: Request,
        now: Time,
    ) {
        match request {
            Request::Offer(offer) => self.handle_offer(shared, session, &offer, now),
            Request::Answer(answer) => self.handle_answer(shared, session, &answer, now),
            Request::AddTrack(request) => self.handle_add_track(shared, session, request),
            Request::Mute(mute) => self.handle_mute(shared, session, &mute, now),
            Request::Subscription(update) => {
                self.handle_subscription(shared, session, &update, now)
            }
            Request::TrackSetting(settings) => {
                self.handle_settings(shared, session, &settings, now)
            }
            Request::SyncState(state) => self.handle_sync_state(shared, session, &state, now),
            Request::UpdateMetadata(update) => self.handle_metadata(shared, session, &update, now),
            Request::Leave(_) => self.end(shared, session, End::LEFT, now),
            Request::Ping(_) => {
                let pong = Response::Pong(shared.unix_millis(now));
                self.respond(shared, session, pong);
            }
            Request::PingReq(ping) => {
                let pong = proto::Pong {
                    last_ping_timestamp: ping.timestamp,
                    timestamp: shared.unix_millis(now),
                };
                self.respond(shared, session, Response::PongResp(pong));
            }
            // We send no checks, so a client's candidates are of no use: its own checks show its
            // address. Data tracks and blobs, and what only a product needs, are not served.
            Request::Trickle(_)
            | Request::UpdateLayers(_)
            | Request::SubscriptionPermission(_)
            | Request::Simulate(_)
            | Request::UpdateAudioTrack(_)
            | Request::UpdateVideoTrack(_)
            | Request::PublishDataTrackRequest(_)
            | Request::UnpublishDataTrackRequest(_)
            | Request::UpdateDataSubscription(_)
            | Request::StoreDataBlobRequest(_)
            | Request::GetDataBlobRequest(_) => {}
        }
    }

    fn respond(&self, shared: &mut SfuShared, session: SessionId, response: Response) {
        let connection = self
            .participants
            .get(&session)
            .and_then(|participant| participant.connection);
        shared.respond(connection, response);
    }

    fn handle_metadata(
        &mut self,
        shared: &mut SfuShared,
        session: SessionId,
        update: &proto::UpdateParticipantMetadata,
        now: Time,
    ) {
        let Some(participant) = self.participants.get_mut(&session) else {
            return;
        };
        let attributes: usize = update
            .attributes
            .iter()
            .map(|(key, value)| key.len() + value.len())
            .sum();
        let kept = participant
            .info
            .attributes
            .iter()
            .filter(|(key, _)| !update.attributes.contains_key(*key));
        let kept: usize = kept.map(|(key, value)| key.len() + value.len()).sum();
        let reason = if !participant.permission.can_update_metadata {
            proto::request_response::Reason::NotAllowed
        } else if update.name.len() + update.metadata.len() + attributes > TEXT_BYTES_MAX
            || kept + attributes > ATTRIBUTES_BYTES_MAX
        {
            proto::request_response::Reason::LimitExceeded
        } else {
            let info = &mut participant.info;
            if !update.name.is_empty() {
                info.name.clone_from(&update.name);
            }
            if !update.metadata.is_empty() {
                info.metadata.clone_from(&update.metadata);
            }
            let attributes = update
                .attributes
                .iter()
                .map(|(key, value)| (key.clone(), value.clone()));
            info.attributes.extend(attributes);
            // An empty value removes an attribute.
            info.attributes.retain(|_, value| !value.is_empty());
            proto::request_response::Reason::Ok
        };
        let response = proto::RequestResponse {
            request_id: update.request_id,
            reason: reason.into(),
            ..Default::default()
        };
        self.respond(shared, session, Response::RequestResponse(response));
        if reason == proto::request_response::Reason::Ok {
            self.announce(shared, session, true, now);
        }
    }

    // Publishing.

    fn handle_add_track(
        &mut self,
        shared: &mut SfuShared,
        session: SessionId,
        request: proto::AddTrackRequest,
    ) {
        let Some(participant) = self.participants.get_mut(&session) else {
            return;
        };
        let permission = &participant.permission;
        let may_publish = permission.can_publish
            && (permission.can_publish_sources.is_empty()
                || permission.can_publish_sources.contains(&request.source));
        let texts = request.cid.len() + request.name.len() + request.stream.len();
        let reason = if !may_publish {
            Some(proto::request_response::Reason::NotAllowed)
        } else if kind_of(request.r#type()).is_none() {
            Some(proto::request_response::Reason::UnsupportedType)
        } else if texts > TEXT_BYTES_MAX
            || participant.pending.len() >= PENDING_TRACKS_MAX
            || participant.published.len() >= PUBLISHED_TRACKS_MAX
        {
            Some(proto::request_response::Reason::LimitExceeded)
        } else {
            None
        };
        if let Some(reason) = reason {
            // The refused request is repeated, unless it is long, so that the client knows which
            // request this answers.
            let repeated = (request.encoded_len() <= TEXT_BYTES_MAX)
                .then_some(proto::request_response::Request::AddTrack(request));
            let response = proto::RequestResponse {
                reason: reason.into(),
                request: repeated,
                ..Default::default()
            };
            return self.respond(shared, session, Response::RequestResponse(response));
        }
        let cid = request.cid.clone();
        let info = match participant
            .pending
            .iter()
            .find(|pending| pending.cid == cid)
        {
            Some(known) => known.info.clone(),
            None => {
                let info = track_info(shared.ids.sid("TR"), request);
                participant.pending.push(PendingTrack {
                    cid: cid.clone(),
                    info: info.clone(),
                });
                info
            }
        };
        let published = proto::TrackPublishedResponse {
            cid,
            track: Some(info),
        };
        self.respond(shared, session, Response::TrackPublished(published));
    }

    /// Handles a publisher's offer, or any offer of a single connection.
    fn handle_offer(
        &mut self,
        shared: &mut SfuShared,
        session: SessionId,
        offer: &proto::SessionDescription,
        now: Time,
    ) {
        match self.answer(shared, session, offer, now) {
            Ok(published) => {
                if !published.is_empty() {
                    self.announce(shared, session, true, now);
                }
                for track in published {
                    self.subscribe_everybody(shared, track, now);
                }
            }
            Err(_) => self.end(shared, session, End::MISMATCH, now),
        }
    }

    /// Answers an offer. Returns the tracks that it publishes.
    fn answer(
        &mut self,
        shared: &mut SfuShared,
        session: SessionId,
        offer: &proto::SessionDescription,
        now: Time,
    ) -> Result<Vec<TrackId>, SdpError> {
        let router = self.router;
        let Some(participant) = self.participants.get_mut(&session) else {
            return Ok(Vec::new());
        };
        let peer = &mut participant.answering;
        let update = peer.descriptions.read(&offer.sdp)?;
        if peer.link.is_replaced_by(&update.remote) {
            return Err(SdpError::Missing {
                what: "the certificate of the session that it goes on with",
            });
        }
        if peer.link.is_restarted_by(&update.remote) {
            peer.link.restart(shared);
        }
        if !peer.link.is_added() {
            peer.link.local.setup = DtlsSetup::answer(update.remote.setup, DtlsSetup::Active);
        }
        let dtls_active = peer.link.local.setup == DtlsSetup::Active;
        let transport = peer.transport;
        let command = peer
            .link
            .handle_remote(transport, &update.remote, dtls_active);
        let data = participant.data_service(self.id, transport);
        shared.connect(router, command, data);
        let mut published = Vec::new();
        for section in update.changed {
            published.extend(self.handle_section(shared, session, section, now));
        }
        let sent = self.assign_sections(session);
        self.send_answer(shared, session, offer.id);
        for (section, track) in sent {
            let section = self
                .participants
                .get(&session)
                .and_then(|participant| participant.answering.descriptions.section(section));
            if let Some(media) = section.and_then(AgreedMedia::of) {
                self.go_live(shared, session, track, media, now);
            }
        }
        self.after_answer(shared, session, now);
        Ok(published)
    }

    /// Handles a section of a client's offer that is new or has changed. Returns the track that it
    /// starts to publish.
    fn handle_section(
        &mut self,
        shared: &mut SfuShared,
        session: SessionId,
        index: usize,
        now: Time,
    ) -> Option<TrackId> {
        let participant = self.participants.get_mut(&session)?;
        let section = participant.answering.descriptions.section(index)?;
        let sends = section.is_usable() && section.sends && section.kind.is_some();
        let lost = !(section.is_usable() && section.receives && !section.sends);
        let (received, sent) = (
            participant.answering.received.get(&index).copied(),
            participant.answering.sent.get(&index).copied(),
        );
        let same = received
            .and_then(|track| self.tracks.get(&track))
            .is_some_and(|track| is_cid_of(&track.info, &section.track_id));
        if let Some(track) = received.filter(|_| !sends || !same) {
            self.unpublish(shared, track, now);
        }
        if let Some(track) = sent.filter(|_| lost) {
            self.take_section(shared, session, track, now);
        }
        if sends && !(same && received.is_some()) {
            self.publish(shared, session, index, now)
        } else {
            None
        }
    }

    fn publish(
        &mut self,
        shared: &mut SfuShared,
        session: SessionId,
        index: usize,
        now: Time,
    ) -> Option<TrackId> {
        let participant = self.participants.get_mut(&session)?;
        let section = participant.answering.descriptions.section(index)?;
        let payloads = section.payloads?;
        let kind = payloads.codec.kind();
        let mut info = take_pending(&mut participant.pending, kind, &section.track_id)?;
        let payloads = if info.disable_red {
            payloads.plain()
        } else {
            payloads
        };
        let codec = payloads.codec;
        describe_sent(&mut info, codec, section);
        let id = shared.ids.track();
        shared.totals.published += 1;
        let command = MediaCommand::AddTrack {
            transport: participant.answering.transport,
            track: id,
            parameters: Box::new(track_parameters(payloads, section)),
        };
        shared.command(self.router, command);
        shared.tracks.insert(id, self.id);
        let layers = section.rids.len().max(1) as u8;
        participant.answering.received.insert(index, id);
        participant.published.insert(id);
        let first = !std::mem::replace(&mut participant.info.is_publisher, true);
        self.info.num_publishers += u32::from(first && !participant.is_hidden());
        participant.info.tracks.push(info.clone());
        self.track_sids.insert(info.sid.clone(), id);
        debug!(
            room = self.info.name,
            identity = participant.info.identity,
            codec = info.mime_type,
            layers,
            "published a track"
        );
        let track = PublishedTrack {
            id,
            publisher: session,
            codec,
            info,
            layers,
            subscribers: BTreeSet::new(),
            was_subscribed: false,
            dynacast: Dynacast::new(now),
            loudness: Loudness::default(),
        };
        self.tracks.insert(id, track);
        self.poll_dynacast(shared, id, now);
        Some(id)
    }

    /// Ends a track for everybody.
    fn unpublish(&mut self, shared: &mut SfuShared, id: TrackId, now: Time) {
        let Some(track) = self.tracks.remove(&id) else {
            return;
        };
        shared.tracks.remove(&id);
        self.track_sids.remove(&track.info.sid);
        self.heard.remove(&id);
        for subscriber in track.subscribers {
            self.drop_subscription(shared, subscriber, id, now);
        }
        shared.command(self.router, MediaCommand::RemoveTrack { track: id });
        if let Some(publisher) = self.participants.get_mut(&track.publisher) {
            publisher.published.remove(&id);
            publisher.answering.received.retain(|_, track| *track != id);
            publisher
                .info
                .tracks
                .retain(|info| info.sid != track.info.sid);
            self.announce(shared, track.publisher, true, now);
        }
    }

    fn handle_mute(
        &mut self,
        shared: &mut SfuShared,
        session: SessionId,
        mute: &proto::MuteTrackRequest,
        now: Time,
    ) {
        let Some(participant) = self.participants.get_mut(&session) else {
            return;
        };
        if let Some(pending) = participant
            .pending
            .iter_mut()
            .find(|pending| pending.info.sid == mute.sid)
        {
            pending.info.muted = mute.muted;
            return;
        }
        let id = self
            .track_sids
            .get(&mute.sid)
            .copied()
            .filter(|id| participant.published.contains(id));
        let Some(track) = id
            .and_then(|id| self.tracks.get_mut(&id))
            .filter(|track| track.info.muted != mute.muted)
        else {
            return;
        };
        track.info.muted = mute.muted;
        let (id, subscribers) = (track.id, track.subscribers.clone());
        let told = participant
            .info
            .tracks
            .iter_mut()
            .filter(|info| info.sid == mute.sid);
        told.for_each(|info| info.muted = mute.muted);
        for subscriber in subscribers {
            self.apply_settings(shared, subscriber, id, now);
        }
        self.announce(shared, session, true, now);
    }

    /// Tells the publisher which layers of a video track have viewers, when that changes.
    pub fn poll_dynacast(&mut self, shared: &mut SfuShared, id: TrackId, now: Time) {
        let Some(track) = self
            .tracks
            .get_mut(&id)
            .filter(|track| track.kind() == Kind::Video)
        else {
            return;
        };
        let news = track.dynacast.poll(now);
        if let Some(at) = track.dynacast.next_timeout() {
            shared.set_timer(at.max(now), Timer::Track(id));
        }
        if let Some(highest) = news {
            let (publisher, update) = (track.publisher, quality_update(track, highest));
            self.respond(shared, publisher, Response::SubscribedQualityUpdate(update));
        }
    }

    // Subscribing.

    fn subscribe_to_existing(&mut self, shared: &mut SfuShared, session: SessionId, now: Time) {
        if self
            .participants
            .get(&session)
            .is_some_and(|participant| participant.auto_subscribe)
        {
            let tracks: Vec<TrackId> = self.tracks.keys().copied().collect();
            tracks
                .into_iter()
                .for_each(|track| self.subscribe(shared, session, track, now));
        }
    }

    fn subscribe_everybody(&mut self, shared: &mut SfuShared, track: TrackId, now: Time) {
        let willing = self
            .participants
            .values()
            .filter(|participant| participant.auto_subscribe);
        let willing: Vec<SessionId> = willing.map(|participant| participant.id).collect();
        willing
            .into_iter()
            .for_each(|session| self.subscribe(shared, session, track, now));
    }

    fn subscribe(&mut self, shared: &mut SfuShared, session: SessionId, id: TrackId, now: Time) {
        let Some(track) = self
            .tracks
            .get(&id)
            .filter(|track| track.publisher != session)
        else {
            return;
        };
        let publisher = self
            .participants
            .get(&track.publisher)
            .map(|publisher| publisher.info.sid.clone())
            .unwrap_or_default();
        let Some(participant) = self
            .participants
            .get_mut(&session)
            .filter(|participant| !participant.subscriptions.contains_key(&id))
        else {
            return;
        };
        let subscription = shared.ids.subscription();
        let (ssrc, rtx_ssrc) = subscription.ssrcs();
        let sent = SentTrack {
            stream_id: format!("{publisher}|{}", track.info.sid),
            track_id: track.info.sid.clone(),
            ssrc,
            rtx_ssrc: track.codec.has_rtx().then_some(rtx_ssrc),
            codec: track.codec,
        };
        let section = participant
            .offering
            .as_mut()
            .map(|peer| peer.add(id, sent.clone()));
        participant.subscriptions.insert(
            id,
            ParticipantSubscription {
                id: subscription,
                sent,
                settings: Settings::initial(participant.adaptive_stream),
                section,
                live: None,
            },
        );
        self.tracks.get_mut(&id).into_iter().for_each(|track| {
            track.subscribers.insert(session);
        });
        self.schedule_negotiation(shared, session, now);
    }

    /// Ends a subscription, because the subscriber asked for it or the track ended.
    fn drop_subscription(
        &mut self,
        shared: &mut SfuShared,
        session: SessionId,
        track: TrackId,
        now: Time,
    ) {
        let Some(participant) = self.participants.get_mut(&session) else {
            return;
        };
        let Some(subscription) = participant.subscriptions.remove(&track) else {
            return;
        };
        if let Some(section) = subscription.section {
            match &mut participant.offering {
                Some(peer) => peer.remove(section),
                None => {
                    participant.answering.sent.remove(&section);
                }
            }
        }
        if subscription.live.is_some() {
            shared.command(
                self.router,
                MediaCommand::Unsubscribe {
                    subscription: subscription.id,
                },
            );
        }
        self.forget_subscriber(shared, session, track, &subscription, now);
        self.schedule_negotiation(shared, session, now);
    }

    fn forget_subscriber(
        &mut self,
        shared: &mut SfuShared,
        session: SessionId,
        id: TrackId,
        subscription: &ParticipantSubscription,
        now: Time,
    ) {
        if let Some(track) = self.tracks.get_mut(&id) {
            track.subscribers.remove(&session);
            track
                .dynacast
                .handle_wish(subscription.live.map_or(0, |live| live.wish), 0);
            self.poll_dynacast(shared, id, now);
        }
    }

    /// Handles a section of the client's offer that can no longer carry our track.
    fn take_section(&mut self, shared: &mut SfuShared, session: SessionId, id: TrackId, now: Time) {
        let Some(participant) = self.participants.get_mut(&session) else {
            return;
        };
        let Some(subscription) = participant.subscriptions.get_mut(&id) else {
            return;
        };
        if let Some(section) = subscription.section.take() {
            participant.answering.sent.remove(&section);
        }
        if let Some(live) = subscription.live.take() {
            let ended = subscription.id;
            subscription.renew(shared.ids.subscription());
            shared.command(
                self.router,
                MediaCommand::Unsubscribe {
                    subscription: ended,
                },
            );
            if let Some(track) = self.tracks.get_mut(&id) {
                track.dynacast.handle_wish(live.wish, 0);
                self.poll_dynacast(shared, id, now);
            }
        }
    }

    /// Starts a subscription at the router, after the descriptions have been agreed on.
    fn go_live(
        &mut self,
        shared: &mut SfuShared,
        session: SessionId,
        id: TrackId,
        media: AgreedMedia,
        now: Time,
    ) {
        let (Some(participant), Some(track)) = (
            self.participants.get_mut(&session),
            self.tracks.get_mut(&id),
        ) else {
            return;
        };
        let Some(transport) = participant.downlink() else {
            return;
        };
        let Some(subscription) = participant
            .subscriptions
            .get_mut(&id)
            .filter(|subscription| subscription.live.is_none())
        else {
            return;
        };
        let (selection, wish) = (
            track.selection(&subscription.settings),
            track.wish(&subscription.settings),
        );
        subscription.live = Some(LiveSelection { selection, wish });
        shared.totals.subscribed += 1;
        shared.command(
            self.router,
            MediaCommand::Subscribe {
                subscription: subscription.id,
                transport,
                track: id,
                parameters: Box::new(subscription.parameters(media, selection)),
            },
        );
        track.dynacast.handle_wish(0, wish);
        let first = !std::mem::replace(&mut track.was_subscribed, true);
        let (publisher, track_sid) = (track.publisher, track.info.sid.clone());
        if first {
            self.respond(
                shared,
                publisher,
                Response::TrackSubscribed(proto::TrackSubscribed { track_sid }),
            );
        }
        self.poll_dynacast(shared, id, now);
    }

    fn handle_subscription(
        &mut self,
        shared: &mut SfuShared,
        session: SessionId,
        update: &proto::UpdateSubscription,
        now: Time,
    ) {
        let may_subscribe = self
            .participants
            .get(&session)
            .is_some_and(|participant| participant.permission.can_subscribe);
        let by_participant = update
            .participant_tracks
            .iter()
            .flat_map(|tracks| &tracks.track_sids);
        for sid in update.track_sids.iter().chain(by_participant) {
            match self.track_sids.get(sid).copied() {
                Some(track) if !update.subscribe => {
                    self.drop_subscription(shared, session, track, now)
                }
                Some(track) if may_subscribe => self.subscribe(shared, session, track, now),
                None if !update.subscribe => {}
                known => {
                    let error = match known {
                        Some(_) => proto::SubscriptionError::SeUnknown,
                        None => proto::SubscriptionError::SeTrackNotfound,
                    };
                    let response = proto::SubscriptionResponse {
                        track_sid: sid.clone(),
                        err: error.into(),
                    };
                    self.respond(shared, session, Response::SubscriptionResponse(response));
                }
            }
        }
    }

    fn handle_settings(
        &mut self,
        shared: &mut SfuShared,
        session: SessionId,
        settings: &proto::UpdateTrackSettings,
        now: Time,
    ) {
        for sid in &settings.track_sids {
            let Some(track) = self.track_sids.get(sid).copied() else {
                continue;
            };
            let participant = self.participants.get_mut(&session);
            if let Some(subscription) =
                participant.and_then(|participant| participant.subscriptions.get_mut(&track))
            {
                subscription.settings = Settings::from(settings);
                self.apply_settings(shared, session, track, now);
            }
        }
    }

    /// Handles a client's state after a resume. Only the tracks that it had disabled can be news.
    fn handle_sync_state(
        &mut self,
        shared: &mut SfuShared,
        session: SessionId,
        state: &proto::SyncState,
        now: Time,
    ) {
        for sid in &state.track_sids_disabled {
            let Some(track) = self.track_sids.get(sid).copied() else {
                continue;
            };
            let participant = self.participants.get_mut(&session);
            if let Some(subscription) =
                participant.and_then(|participant| participant.subscriptions.get_mut(&track))
            {
                subscription.settings = subscription.settings.disabled();
                self.apply_settings(shared, session, track, now);
            }
        }
    }

    /// Applies a subscriber's changed settings, or its publisher's changed mute state.
    fn apply_settings(
        &mut self,
        shared: &mut SfuShared,
        session: SessionId,
        id: TrackId,
        now: Time,
    ) {
        let participant = self.participants.get_mut(&session);
        let (Some(subscription), Some(track)) = (
            participant.and_then(|participant| participant.subscriptions.get_mut(&id)),
            self.tracks.get_mut(&id),
        ) else {
            return;
        };
        let Some(live) = &mut subscription.live else {
            return;
        };
        let (selection, wish) = (
            track.selection(&subscription.settings),
            track.wish(&subscription.settings),
        );
        if selection != live.selection {
            live.selection = selection;
            shared.command(
                self.router,
                MediaCommand::SetSelection {
                    subscription: subscription.id,
                    selection,
                },
            );
        }
        if wish != live.wish {
            let before = std::mem::replace(&mut live.wish, wish);
            track.dynacast.handle_wish(before, wish);
            self.poll_dynacast(shared, id, now);
        }
    }

    // Descriptions that we initiate.

    /// Schedules a negotiation after a change that a subscriber's descriptions must include.
    fn schedule_negotiation(&mut self, shared: &mut SfuShared, session: SessionId, now: Time) {
        let Some(participant) = self.participants.get_mut(&session) else {
            return;
        };
        if participant.negotiate_at.is_some() || participant.downlink().is_none() {
            return;
        }
        let earliest = participant
            .negotiated_at
            .map_or(Time::ZERO, |at| at + NEGOTIATION_SPACING);
        let at = earliest.max(now + GATHER);
        participant.negotiate_at = Some(at);
        shared.set_timer(at, Timer::Participant(self.id, session));
    }

    pub fn handle_participant_timeout(
        &mut self,
        shared: &mut SfuShared,
        session: SessionId,
        now: Time,
    ) {
        let Some(participant) = self.participants.get(&session) else {
            return;
        };
        if participant
            .lost_at
            .is_some_and(|at| at + SIGNAL_TIMEOUT <= now)
        {
            return self.end(shared, session, End::SILENT, now);
        }
        if !participant.is_active() && participant.joined_at + CONNECT_TIMEOUT <= now {
            return self.end(shared, session, End::NEVER_CONNECTED, now);
        }
        let unanswered = |peer: &OfferingPeer| {
            peer.offer.is_waiting_for_answer() && peer.offered_at + ANSWER_TIMEOUT <= now
        };
        if participant.lost_at.is_none() && participant.offering.as_ref().is_some_and(unanswered) {
            return self.end(shared, session, End::MISMATCH, now);
        }
        if participant.negotiate_at.is_some_and(|at| at <= now) {
            self.negotiate(shared, session, now);
        }
    }

    fn negotiate(&mut self, shared: &mut SfuShared, session: SessionId, now: Time) {
        let Some(participant) = self.participants.get_mut(&session) else {
            return;
        };
        match &participant.offering {
            // The missing answer will schedule the negotiation again.
            Some(peer) if peer.offer.is_waiting_for_answer() => {}
            Some(_) => self.offer(shared, session, now),
            None if participant.single => self.require_sections(shared, session, now),
            None => participant.negotiate_at = None,
        }
    }

    /// Sends the subscriber connection's next offer.
    fn offer(&mut self, shared: &mut SfuShared, session: SessionId, now: Time) {
        let Some(participant) = self.participants.get_mut(&session) else {
            return;
        };
        let Some(peer) = &mut participant.offering else {
            return;
        };
        (participant.negotiate_at, participant.negotiated_at) = (None, Some(now));
        peer.offer_id += 1;
        peer.offered_at = now;
        let sdp = peer.offer.offer(&peer.link.local);
        let tracks = peer.offer.tracks();
        let track_of_mid: Vec<_> = tracks
            .map(|(section, track)| (section.to_string(), track.track_id.as_str()))
            .collect();
        shared.send(
            participant.connection,
            wire::offer(&sdp, peer.offer_id, &track_of_mid),
        );
        shared.set_timer(now + ANSWER_TIMEOUT, Timer::Participant(self.id, session));
    }

    /// Asks the client of a single connection for an offer, with more sections if it has too few.
    fn require_sections(&mut self, shared: &mut SfuShared, session: SessionId, now: Time) {
        let Some(participant) = self.participants.get_mut(&session) else {
            return;
        };
        (participant.negotiate_at, participant.negotiated_at) = (None, Some(now));
        let (audio, video) = participant.missing_sections();
        let requested = &mut participant.answering.requested;
        let requirement = proto::MediaSectionsRequirement {
            num_audios: audio.saturating_sub(requested.0),
            num_videos: video.saturating_sub(requested.1),
        };
        *requested = (requested.0.max(audio), requested.1.max(video));
        shared.respond(
            participant.connection,
            Response::MediaSectionsRequirement(requirement),
        );
    }

    fn handle_answer(
        &mut self,
        shared: &mut SfuShared,
        session: SessionId,
        answer: &proto::SessionDescription,
        now: Time,
    ) {
        let Some(participant) = self.participants.get_mut(&session) else {
            return;
        };
        let Some(peer) = &mut participant.offering else {
            return;
        };
        // Ignores an answer to an offer that has been replaced. Old clients send no offer ids.
        if !peer.offer.is_waiting_for_answer() || (answer.id != 0 && answer.id != peer.offer_id) {
            return;
        }
        let Ok((remote, agreed)) = peer.offer.answered(&answer.sdp) else {
            return self.end(shared, session, End::MISMATCH, now);
        };
        if peer.link.is_replaced_by(&remote) {
            return self.end(shared, session, End::MISMATCH, now);
        }
        let transport = peer.transport;
        let command = peer
            .link
            .handle_remote(transport, &remote, dtls_active_beside(&remote));
        let data = participant.data_service(self.id, transport);
        shared.connect(self.router, command, data);
        let Some(peer) = &participant.offering else {
            return;
        };
        let agreed: Vec<(TrackId, AgreedMedia)> = agreed
            .into_iter()
            .filter_map(|section| Some((*peer.tracks.get(&section.section)?, section.media?)))
            .collect();
        if let Some(at) = participant.negotiate_at {
            shared.set_timer(at.max(now), Timer::Participant(self.id, session));
        }
        for (track, media) in agreed {
            self.go_live(shared, session, track, media, now);
        }
    }

    // Answers to a client's offers.

    /// Assigns free sections of the client's offer to waiting subscriptions, and returns those that
    /// were assigned.
    fn assign_sections(&mut self, session: SessionId) -> Vec<(usize, TrackId)> {
        let mut assigned = Vec::new();
        let Some(participant) = self
            .participants
            .get_mut(&session)
            .filter(|participant| participant.single)
        else {
            return assigned;
        };
        let peer = &mut participant.answering;
        let mut audio: Vec<usize> = peer.free_sections(Kind::Audio).collect();
        let mut video: Vec<usize> = peer.free_sections(Kind::Video).collect();
        audio.reverse();
        video.reverse();
        for (track, subscription) in participant
            .subscriptions
            .iter_mut()
            .filter(|(_, subscription)| subscription.section.is_none())
        {
            let free = match subscription.kind() {
                Kind::Audio => audio.pop(),
                Kind::Video => video.pop(),
            };
            if let Some(section) = free {
                subscription.section = Some(section);
                peer.sent.insert(section, *track);
                assigned.push((section, *track));
            }
        }
        assigned
    }

    fn send_answer(&mut self, shared: &mut SfuShared, session: SessionId, id: u32) {
        let Some(participant) = self.participants.get_mut(&session) else {
            return;
        };
        let Participant {
            answering: peer,
            subscriptions,
            connection,
            ..
        } = participant;
        peer.version += 1;
        let tracks = &self.tracks;
        let section_use = |index: usize, _: &ClientSection| {
            let received = peer
                .received
                .get(&index)
                .and_then(|track| tracks.get(track));
            let sent = peer
                .sent
                .get(&index)
                .and_then(|track| subscriptions.get(track));
            match (received, sent) {
                (Some(track), _) => SectionUse::Receive {
                    dtx: !track.info.disable_dtx,
                    red: track.codec == Codec::Red,
                },
                (None, Some(subscription)) => SectionUse::Send(&subscription.sent),
                (None, None) => SectionUse::Idle,
            }
        };
        let sdp = write_answer(
            &mut peer.descriptions,
            &peer.link.local,
            peer.version,
            section_use,
        );
        let mid = |section: usize| {
            peer.descriptions
                .section(section)
                .map(|section| &*section.mid)
        };
        let sent = peer.sent.iter().filter_map(|(section, track)| {
            Some((
                mid(*section)?,
                subscriptions.get(track)?.sent.track_id.as_str(),
            ))
        });
        shared.send(
            *connection,
            wire::answer(&sdp, id, &sent.collect::<Vec<_>>()),
        );
        peer.last_sent = peer.sent.keys().copied().collect();
        peer.requested = (0, 0);
    }

    /// Asks again for the sections that the offer did not have.
    fn after_answer(&mut self, shared: &mut SfuShared, session: SessionId, now: Time) {
        let Some(participant) = self
            .participants
            .get_mut(&session)
            .filter(|participant| participant.single)
        else {
            return;
        };
        participant.negotiated_at = Some(now);
        let satisfied = participant
            .subscriptions
            .values()
            .all(|subscription| subscription.section.is_some());
        if satisfied {
            participant.negotiate_at = None
        } else {
            self.schedule_negotiation(shared, session, now)
        }
    }
}

fn kind_of(track_type: proto::TrackType) -> Option<Kind> {
    match track_type {
        proto::TrackType::Audio => Some(Kind::Audio),
        proto::TrackType::Video => Some(Kind::Video),
        proto::TrackType::Data => None,
    }
}

/// Information about an announced track for other participants.
fn track_info(sid: String, request: proto::AddTrackRequest) -> proto::TrackInfo {
    // The default codec holds until the track's description says more.
    let kind = kind_of(request.r#type()).unwrap_or(Kind::Audio);
    let mime_type = Codec::default_of(kind).mime();
    let layers: Vec<proto::VideoLayer> = request
        .layers
        .into_iter()
        .take(DESCRIBED_LAYERS_MAX)
        .collect();
    let codec = proto::SimulcastCodecInfo {
        mime_type: mime_type.to_owned(),
        cid: request.cid,
        layers: layers.clone(),
        ..Default::default()
    };
    proto::TrackInfo {
        sid,
        r#type: request.r#type,
        name: request.name,
        muted: request.muted,
        width: request.width,
        height: request.height,
        disable_dtx: request.disable_dtx,
        source: request.source,
        layers,
        mime_type: mime_type.to_owned(),
        codecs: vec![codec],
        stereo: request.stereo,
        disable_red: request.disable_red,
        encryption: request.encryption,
        stream: request.stream,
        audio_features: request.audio_features,
        backup_codec_policy: request.backup_codec_policy,
        packet_trailer_features: request.packet_trailer_features,
        ..Default::default()
    }
}

fn is_cid_of(info: &proto::TrackInfo, track_id: &str) -> bool {
    info.codecs
        .iter()
        .any(|codec| codec.cid == track_id || codec.sdp_cid == track_id)
}

/// Adds the content of the offer to an announced track.
fn describe_sent(info: &mut proto::TrackInfo, codec: Codec, section: &ClientSection) {
    info.mime_type = codec.mime().to_owned();
    info.mid = section.mid.to_string();
    info.simulcast = section.rids.len() > 1;
    for sent in &mut info.codecs {
        sent.mime_type.clone_from(&info.mime_type);
        sent.mid.clone_from(&info.mid);
        if sent.cid != *section.track_id {
            sent.sdp_cid = section.track_id.to_string();
        }
    }
}

/// The announced track that belongs to a section of an offer: by its cid, otherwise the first of
/// its kind, because browsers may rename a track when it is added.
fn take_pending(
    pending: &mut Vec<PendingTrack>,
    kind: Kind,
    track_id: &str,
) -> Option<proto::TrackInfo> {
    let by_cid = pending.iter().position(|pending| pending.cid == track_id);
    let by_kind = || {
        pending
            .iter()
            .position(|pending| kind_of(pending.info.r#type()) == Some(kind))
    };
    let index = by_cid.or_else(by_kind)?;
    Some(pending.remove(index).info)
}

fn track_parameters(payloads: PayloadTypes, section: &ClientSection) -> TrackParameters {
    let encodings = match (section.rids.as_slice(), section.ssrc) {
        ([], Some(ssrc)) => Encodings::Ssrc {
            ssrc,
            rtx_ssrc: section.rtx_ssrc,
        },
        ([], None) => Encodings::Mid,
        (rids, _) => Encodings::Rids(rids.to_vec()),
    };
    TrackParameters {
        payloads,
        mid: section.mid.clone(),
        rtx_payload_type: section.rtx_payload_type,
        extensions: section.extensions,
        nack: section.feedback.contains(RtcpFeedback::Nack),
        transport_cc: section.feedback.contains(RtcpFeedback::TransportCc)
            && section.extensions.id(Extension::TransportCc).is_some(),
        encodings,
    }
}
