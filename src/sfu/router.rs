//! One router: the connections, tracks and subscriptions of its rooms. Datagrams, commands and time
//! go in; datagrams, events and counts come out. It has no socket, clock, lock or source of
//! randomness.
//!
//! The address of a packet identifies the connection, and its SSRC the encoding, where it is
//! decrypted and kept ([`super::ingest`]). Packets of one encoding that came together form a *run*.
//! When the run ends, each subscriber of the track in turn gets its packets of the run
//! ([`super::forward`]). So the state of a subscriber is loaded into the CPU cache once for each
//! run, and its packets may leave with one call.

use crate::transport::rtp::Ssrc;
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::time::Duration;

use super::cache::PacketContent;
use super::data::RelayedPacket;
use super::due::DueQueue;
use super::forward::{self, EndedStreams, ForwardWire, ForwardedSubscription, RUN_MAX};
use super::ingest::{self, Format, Ingest, Taken, ntp_nanos};
use super::select;
use super::statistics::{EncodingStatistics, RouterStatistics, SubscriptionStatistics};
use super::{
    ClientEnd, DataParameters, Encodings, MediaCommand, MediaEvent, Outgoing, RouterAddress,
    SendMode, SubscriptionId, SubscriptionParameters, TrackId, TrackParameters, TransportId,
    TransportParameters,
};
use crate::path::{FarEnd, Via};
use crate::seeded::{mixed, scatter};
use crate::transport::data::{DataMessage, DataRole};
use crate::transport::feedback::{ArrivalLog, FEEDBACK_INTERVAL};
use crate::transport::peer::{
    IceCredentials, Identity, NearEnd, Peer, PeerEvent, PeerParameters, local_ufrag_of_check,
};
use crate::transport::receive::{MISSING_MAX, NACK_SEQS_MAX, RoundTrip};
use crate::transport::reports::{REPORT_BLOCKS_MAX, seal_compound};
use crate::transport::rtcp::{
    self, DlrrBlock, ReportBlock, RtcpPacket, RtcpWriter, SenderInfo, WriteError, dlsr_units,
    rtt_from_report,
};
use crate::transport::rtp::{Datagram, Header, classify};
use crate::transport::sdp::{Extension, ExtensionIds};
use crate::transport::sequence::Seq;
use crate::transport::srtp::Rejected;
use crate::units::{Epoch, Time, ntp_middle};

/// Interval of reports to publishers (LiveKit's value).
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// Interval of sender reports to subscribers (LiveKit's value).
const SENDER_REPORT_INTERVAL: Duration = Duration::from_secs(3);
/// Interval of level reports to the lobby.
const LEVEL_INTERVAL: Duration = Duration::from_millis(500);
/// Least loudness of an active packet, in -dBov (LiveKit's value).
const LEVEL_ACTIVE: u8 = 35;
/// Least share of active packets in an interval for a track to count as speaking (LiveKit's value).
const LEVEL_ACTIVE_PERCENT: u32 = 40;
/// Round trip time to a publisher assumed until one has been measured.
const RTT_UNKNOWN: Duration = Duration::from_millis(70);
/// Largest number of sender reports in one compound. Each has a source description: 28 and up to 36
/// bytes.
const SENDER_REPORTS_MAX: usize = 18;
/// Limits of the checks kept for connections that are not added yet: their number, their size and
/// their age. Both ends learn of a description at about the same time, and a lost check delays the
/// joining participant by its repeat interval.
const EARLY_CHECKS_MAX: usize = 64;
const EARLY_CHECK_BYTES_MAX: usize = 512;
const EARLY_CHECK_AGE_MAX: Duration = Duration::from_secs(1);
/// Largest number of addresses of one connection: candidates of a few interfaces. A new one
/// replaces the oldest that is not in use.
const ENDS_MAX: usize = 8;

/// Configuration of a router.
#[derive(Clone)]
pub struct RouterConfig {
    pub identity: Identity,
    pub epoch: Epoch,
    pub local: RouterAddress,
    pub send: SendMode,
    /// Seed of the first sequence numbers, timestamps and picture ids.
    pub seed: u64,
}

/// One connection.
struct RouterTransport {
    id: TransportId,
    peer: Peer,
    ufrag: String,
    /// Addresses that authentic checks came from, the latest last.
    ends: Vec<ClientEnd>,
    /// Its published streams: `(ssrc, track, encoding, is_rtx)`, sorted by SSRC.
    incoming: Vec<Incoming>,
    /// Streams sent to it, retransmissions included: `(ssrc, subscription)`, sorted by SSRC.
    outgoing: Vec<(Ssrc, u32)>,
    tracks: Vec<u32>,
    /// Streams that were sent to it and have ended.
    ended: EndedStreams,
    transport_cc: Option<(u8, Box<ArrivalLog>)>,
    rtt: Option<Duration>,
    /// The publisher's wall clock in nanoseconds since 1900, at [`Time::ZERO`]. The estimate lags
    /// by the travel time of the fastest packet.
    clock: Option<PeerClock>,
    report_at: Time,
    repair_at: Time,
    feedback_at: Time,
    connected: bool,
    data: Option<Box<DataParameters>>,
}

#[derive(Clone, Copy)]
struct Incoming {
    ssrc: Ssrc,
    track: u32,
    encoding: u8,
    is_rtx: bool,
}

/// Relation of a publisher's wall clock to ours.
#[derive(Clone, Copy)]
struct PeerClock {
    /// The publisher's nanoseconds since 1900, minus our nanoseconds since the epoch, minus the
    /// shortest travel time of a packet.
    ahead: i64,
    at: Time,
}

impl PeerClock {
    /// Updates the estimate with a sender report. The report that travelled fastest is the most
    /// precise. Clocks may drift apart by 100 us a second.
    fn update(clock: Option<PeerClock>, ntp_nanos: i64, arrival: Time) -> PeerClock {
        let sample = ntp_nanos.saturating_sub(arrival.as_nanos() as i64);
        let ahead = clock.map_or(sample, |clock| {
            let drift = arrival.since(clock.at).as_nanos() as i64 / 10_000;
            sample.max(clock.ahead.saturating_sub(drift))
        });
        PeerClock { ahead, at: arrival }
    }

    /// The publisher's wall clock when ours is at `now`.
    fn ntp_nanos_at(&self, now: Time) -> i64 {
        self.ahead.saturating_add(now.as_nanos() as i64)
    }
}

impl RouterTransport {
    fn next_at(&self) -> Time {
        self.peer
            .next_timeout()
            .min(self.report_at)
            .min(self.repair_at)
            .min(self.feedback_at)
    }

    fn find_incoming(&self, ssrc: Ssrc) -> Option<Incoming> {
        let at = self.incoming.partition_point(|known| known.ssrc < ssrc);
        self.incoming
            .get(at)
            .copied()
            .filter(|known| known.ssrc == ssrc)
    }

    /// Starts transport-wide feedback, with the first track that agrees on it.
    fn give_feedback(&mut self, extension_id: u8, now: Time) {
        if self.transport_cc.is_some() {
            return;
        }
        self.transport_cc = Some((extension_id, Box::default()));
        if self.connected {
            self.feedback_at = now + FEEDBACK_INTERVAL;
        }
    }

    /// Binds the SSRCs that the track's description names.
    fn bind_described(&mut self, track: u32, encodings: &Encodings) {
        let Encodings::Ssrc { ssrc, rtx_ssrc } = encodings else {
            return;
        };
        for (ssrc, is_rtx) in [(Some(*ssrc), false), (*rtx_ssrc, true)] {
            let Some(ssrc) = ssrc else { continue };
            self.bind(Incoming {
                ssrc,
                track,
                encoding: 0,
                is_rtx,
            });
        }
    }

    /// Assigns an SSRC to an encoding of a track from now on.
    fn bind(&mut self, incoming: Incoming) {
        self.incoming.retain(|known| {
            known.ssrc != incoming.ssrc
                && (known.track, known.encoding, known.is_rtx)
                    != (incoming.track, incoming.encoding, incoming.is_rtx)
        });
        let at = self
            .incoming
            .partition_point(|known| known.ssrc < incoming.ssrc);
        self.incoming.insert(at, incoming);
    }

    fn find_outgoing(&self, ssrc: Ssrc) -> Option<u32> {
        let at = self.outgoing.partition_point(|(known, _)| *known < ssrc);
        self.outgoing
            .get(at)
            .filter(|(known, _)| *known == ssrc)
            .map(|(_, subscription)| *subscription)
    }
}

/// One published track.
struct RouterTrack {
    id: TrackId,
    transport: u32,
    format: Format,
    mid: Box<str>,
    /// The same for all tracks of a connection: subscribers synchronise streams with one name (RFC
    /// 3550, section 6.5.1).
    cname: Box<str>,
    encodings_by: Encodings,
    extensions: ExtensionIds,
    nack: bool,
    /// Encodings from low to high.
    encodings: Vec<Ingest>,
    subscribers: Vec<Subscriber>,
    started: bool,
    window_at: Time,
    level: LevelSum,
}

/// Slots of the two parts of a subscriber's state. Both are known without reading either part, so
/// they can be prefetched.
#[derive(Clone, Copy)]
struct Subscriber {
    subscription: u32,
    transport: u32,
}

/// Audio levels since the last report.
#[derive(Clone, Copy, Default)]
struct LevelSum {
    packets: u32,
    active: u32,
    /// Sum of the levels of active packets, in -dBov.
    sum: u32,
}

impl LevelSum {
    fn add(&mut self, level: u8) {
        // The first bit says whether there is voice. The other seven are the level.
        let level = level & 0x7F;
        self.packets += 1;
        if level <= LEVEL_ACTIVE {
            self.active += 1;
            self.sum += u32::from(level);
        }
    }

    fn spoke(&self) -> Option<u8> {
        let active = self.active > 0 && self.active * 100 >= self.packets * LEVEL_ACTIVE_PERCENT;
        active.then(|| ((self.sum + self.active / 2) / self.active) as u8)
    }
}

impl RouterTrack {
    /// When NACKs, key frame requests and layers are to be checked.
    fn next_at(&self) -> Time {
        let encodings = self
            .encodings
            .iter()
            .map(|encoding| encoding.next_nack_at().min(encoding.key_frame_request_at()));
        encodings.fold(self.window_at, Time::min)
    }
}

/// Entries of one type. Each has a number that belongs to it until it is removed.
struct Slab<T> {
    entries: Vec<Option<Box<T>>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    fn new() -> Slab<T> {
        Slab {
            entries: Vec::new(),
            free: Vec::new(),
        }
    }

    fn insert(&mut self, entry: T) -> u32 {
        let at = self.free.pop().unwrap_or(self.entries.len() as u32);
        if at as usize == self.entries.len() {
            self.entries.push(None);
        }
        self.entries[at as usize] = Some(Box::new(entry));
        at
    }

    fn remove(&mut self, at: u32) -> Option<Box<T>> {
        let entry = self.entries.get_mut(at as usize)?.take()?;
        self.free.push(at);
        Some(entry)
    }

    fn get(&self, at: u32) -> Option<&T> {
        self.entries.get(at as usize)?.as_deref()
    }

    fn get_mut(&mut self, at: u32) -> Option<&mut T> {
        self.entries.get_mut(at as usize)?.as_deref_mut()
    }

    fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    fn iter(&self) -> impl Iterator<Item = &T> {
        self.entries.iter().flatten().map(|entry| &**entry)
    }
}

/// A hash for addresses of peers that have been authenticated. Nobody else gets into the map, so
/// the hash need not withstand attacks.
#[derive(Default)]
struct EndHasher(u64);

impl Hasher for EndHasher {
    fn finish(&self) -> u64 {
        mixed(self.0)
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_ne_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(23) ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(word.into());
    }

    fn write_u16(&mut self, word: u16) {
        self.write_u64(word.into());
    }

    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }
}

/// A check that came before its connection was added.
struct EarlyCheck {
    from: ClientEnd,
    arrival: Time,
    bytes: Vec<u8>,
}

/// Consecutive packets of one encoding, to be forwarded together.
struct PendingRun {
    track: u32,
    encoding: u8,
    packets: Vec<u64>,
}

/// One router; see the module documentation.
pub struct Router {
    config: RouterConfig,
    transports: Slab<RouterTransport>,
    tracks: Slab<RouterTrack>,
    subscriptions: Slab<ForwardedSubscription>,
    transport_slots: HashMap<TransportId, u32>,
    track_slots: HashMap<TrackId, u32>,
    subscription_slots: HashMap<SubscriptionId, u32>,
    ends: HashMap<ClientEnd, u32, BuildHasherDefault<EndHasher>>,
    ufrags: HashMap<String, u32>,
    /// Sender and connection of the previous datagram, because datagrams come in bursts.
    last_from: Option<(ClientEnd, u32)>,
    /// The connections of each room that have data channels. Looked up, never iterated.
    data_rooms: HashMap<u32, Vec<u32>>,
    early_checks: VecDeque<EarlyCheck>,
    run: PendingRun,
    events: VecDeque<MediaEvent>,
    statistics: RouterStatistics,
    /// Due time of each transport, by its slot.
    due: DueQueue,
    /// The slots that are due, while they are being handled.
    due_now: Vec<u32>,
    levels_at: Time,
    somebody_spoke: bool,
    /// Our SSRC in reports about published media.
    rtcp_ssrc: Ssrc,
    cname: String,
}

impl Router {
    pub fn new(config: RouterConfig, now: Time) -> Router {
        let bits = scatter(config.seed);
        Router {
            transports: Slab::new(),
            tracks: Slab::new(),
            subscriptions: Slab::new(),
            transport_slots: HashMap::new(),
            track_slots: HashMap::new(),
            subscription_slots: HashMap::new(),
            ends: HashMap::default(),
            ufrags: HashMap::new(),
            last_from: None,
            data_rooms: HashMap::new(),
            early_checks: VecDeque::new(),
            run: PendingRun {
                track: 0,
                encoding: 0,
                packets: Vec::with_capacity(RUN_MAX),
            },
            events: VecDeque::new(),
            statistics: RouterStatistics::default(),
            due: DueQueue::default(),
            due_now: Vec::new(),
            levels_at: now + LEVEL_INTERVAL,
            somebody_spoke: false,
            rtcp_ssrc: Ssrc(bits as u32 | 1),
            cname: format!("router-{:08x}", bits >> 32),
            config,
        }
    }

    pub fn poll_event(&mut self) -> Option<MediaEvent> {
        self.events.pop_front()
    }

    /// When [`Router::handle_timeout`] is due.
    pub fn next_timeout(&self) -> Time {
        self.due.next_at().min(self.levels_at)
    }

    pub fn statistics(&self) -> RouterStatistics {
        RouterStatistics {
            transports: self.transports.len() as u64,
            transports_connected: self
                .transports
                .iter()
                .filter(|transport| transport.connected)
                .count() as u64,
            tracks: self.tracks.len() as u64,
            subscriptions: self.subscriptions.len() as u64,
            ..self.statistics
        }
    }

    /// Statistics of each encoding of a track, from low to high; `None` if there is no such track.
    pub fn track_statistics(&self, track: TrackId) -> Option<Vec<EncodingStatistics>> {
        let track = self.tracks.get(*self.track_slots.get(&track)?)?;
        Some(track.encodings.iter().map(Ingest::statistics).collect())
    }

    pub fn subscription_statistics(
        &self,
        subscription: SubscriptionId,
    ) -> Option<SubscriptionStatistics> {
        let subscription = self
            .subscriptions
            .get(*self.subscription_slots.get(&subscription)?)?;
        Some(subscription.statistics())
    }

    /// Adds the outlet's counts to the statistics.
    pub fn count_outlet(&mut self, send_errors: u64, socket_drops: u64, limit_drops: u64) {
        self.statistics.send_errors += send_errors;
        self.statistics.socket_drops += socket_drops;
        self.statistics.limit_drops += limit_drops;
    }

    /// Counts datagrams that found no TCP connection, or no room in it.
    pub fn count_stream_drops(&mut self, dropped: u64) {
        self.statistics.stream_drops += dropped;
    }

    /// Counts errors that the socket returned in place of datagrams.
    pub fn count_receive_errors(&mut self, errors: u64) {
        self.statistics.receive_errors += errors;
    }

    // Commands.

    pub fn handle_command(&mut self, command: MediaCommand, now: Time, io: &mut impl Outgoing) {
        self.forward_run(now, io);
        let done = match command {
            MediaCommand::AddTransport {
                transport,
                parameters,
            } => self.add_transport(transport, &parameters, now, io),
            MediaCommand::ServeData {
                transport,
                parameters,
            } => self.serve_data(transport, parameters),
            MediaCommand::RestartIce {
                transport,
                local,
                remote,
            } => self.restart_ice(transport, local, &remote, now, io),
            MediaCommand::RemoveTransport { transport } => self
                .transport_slots
                .get(&transport)
                .copied()
                .map(|slot| self.remove_transport(slot)),
            MediaCommand::AddTrack {
                transport,
                track,
                parameters,
            } => self.add_track(transport, track, *parameters, now),
            MediaCommand::RemoveTrack { track } => self
                .track_slots
                .get(&track)
                .copied()
                .map(|slot| self.remove_track(slot)),
            MediaCommand::Subscribe {
                subscription,
                transport,
                track,
                parameters,
            } => self.subscribe(subscription, transport, track, &parameters, now),
            MediaCommand::SetSelection {
                subscription,
                selection,
            } => self.set_selection(subscription, selection, now),
            MediaCommand::Unsubscribe { subscription } => self
                .subscription_slots
                .get(&subscription)
                .copied()
                .map(|slot| self.remove_subscription(slot)),
        };
        self.statistics.commands_refused += u64::from(done.is_none());
    }

    fn add_transport(
        &mut self,
        id: TransportId,
        parameters: &TransportParameters,
        now: Time,
        io: &mut impl Outgoing,
    ) -> Option<()> {
        if self.transport_slots.contains_key(&id)
            || self.ufrags.contains_key(&parameters.local.ufrag)
        {
            return None;
        }
        let mut peer = Peer::lite(
            &self.config.identity,
            &PeerParameters {
                local_address: self.config.local.udp,
                local: parameters.local.clone(),
                remote: parameters.remote.clone(),
                remote_fingerprint: parameters.remote_fingerprint,
                remote_candidates: Vec::new(),
                ice_controlling: false,
                dtls_active: parameters.dtls_active,
            },
            self.config.epoch,
            now,
        );
        if let Some(tcp) = self.config.local.tcp {
            peer.add_near_end(NearEnd::TcpListener(tcp), now);
        }
        let slot = self.transports.insert(RouterTransport {
            id,
            peer,
            ufrag: parameters.local.ufrag.clone(),
            ends: Vec::new(),
            incoming: Vec::new(),
            outgoing: Vec::new(),
            tracks: Vec::new(),
            ended: EndedStreams::default(),
            transport_cc: None,
            rtt: None,
            clock: None,
            report_at: Time::MAX,
            repair_at: Time::MAX,
            feedback_at: Time::MAX,
            connected: false,
            data: None,
        });
        self.transport_slots.insert(id, slot);
        self.ufrags.insert(parameters.local.ufrag.clone(), slot);
        self.advance_setup(slot, now, io);
        self.take_early_checks(&parameters.local.ufrag, now, io);
        Some(())
    }

    fn serve_data(&mut self, id: TransportId, parameters: Box<DataParameters>) -> Option<()> {
        let slot = *self.transport_slots.get(&id)?;
        let transport = self.transports.get_mut(slot)?;
        if transport.data.is_some() {
            return None;
        }
        transport.peer.serve_data(if parameters.opens {
            DataRole::Opens
        } else {
            DataRole::Accepts
        });
        let room = self.data_rooms.entry(parameters.room).or_default();
        room.push(slot);
        transport.data = Some(parameters);
        Some(())
    }

    fn restart_ice(
        &mut self,
        id: TransportId,
        local: IceCredentials,
        remote: &IceCredentials,
        now: Time,
        io: &mut impl Outgoing,
    ) -> Option<()> {
        let slot = *self.transport_slots.get(&id)?;
        if self
            .ufrags
            .get(&local.ufrag)
            .is_some_and(|other| *other != slot)
        {
            return None;
        }
        let transport = self.transports.get_mut(slot)?;
        transport.peer.restart_ice(&local, remote, now);
        let old = std::mem::replace(&mut transport.ufrag, local.ufrag.clone());
        self.ufrags.remove(&old);
        self.ufrags.insert(local.ufrag.clone(), slot);
        self.advance_setup(slot, now, io);
        self.take_early_checks(&local.ufrag, now, io);
        Some(())
    }

    fn remove_transport(&mut self, slot: u32) {
        let tracks = self
            .transports
            .get_mut(slot)
            .map(|transport| std::mem::take(&mut transport.tracks));
        tracks
            .into_iter()
            .flatten()
            .for_each(|track| self.remove_track(track));
        let carried = self
            .transports
            .get(slot)
            .map(|transport| transport.outgoing.clone());
        for (_, subscription) in carried.into_iter().flatten() {
            self.remove_subscription(subscription);
        }
        let Some(transport) = self.transports.remove(slot) else {
            return;
        };
        self.transport_slots.remove(&transport.id);
        self.ufrags.remove(&transport.ufrag);
        for end in &transport.ends {
            self.ends.remove(end);
        }
        if let Some(data) = &transport.data
            && let Some(room) = self.data_rooms.get_mut(&data.room)
        {
            room.retain(|other| *other != slot);
            if room.is_empty() {
                self.data_rooms.remove(&data.room);
            }
        }
        self.last_from = None;
        self.due.set(slot, Time::MAX);
    }

    fn add_track(
        &mut self,
        transport: TransportId,
        id: TrackId,
        parameters: TrackParameters,
        now: Time,
    ) -> Option<()> {
        let slot = *self.transport_slots.get(&transport)?;
        let layers = parameters.encodings.count();
        if self.track_slots.contains_key(&id) || !(1..=usize::from(u8::MAX)).contains(&layers) {
            return None;
        }
        let owner = self.transports.get_mut(slot)?;
        let format = Format::of(&parameters);
        let has_rtx = parameters.has_rtx();
        if parameters.transport_cc
            && let Some(id) = parameters.extensions.id(Extension::TransportCc)
        {
            owner.give_feedback(id, now);
        }
        let track = self.tracks.insert(RouterTrack {
            id,
            transport: slot,
            format,
            mid: parameters.mid,
            cname: format!("publisher-{}", transport.0).into(),
            extensions: parameters.extensions,
            nack: parameters.nack,
            encodings: (0..layers)
                .map(|layer| Ingest::new(&format, layer, has_rtx))
                .collect(),
            encodings_by: parameters.encodings,
            subscribers: Vec::new(),
            started: false,
            window_at: select::first_window(layers, now),
            level: LevelSum::default(),
        });
        owner.bind_described(track, &self.tracks.get(track)?.encodings_by);
        owner.tracks.push(track);
        self.track_slots.insert(id, track);
        self.look_after(slot, track);
        self.schedule(slot);
        Some(())
    }

    fn remove_track(&mut self, slot: u32) {
        let subscribers = self
            .tracks
            .get_mut(slot)
            .map(|track| std::mem::take(&mut track.subscribers));
        for subscriber in subscribers.into_iter().flatten() {
            self.remove_subscription(subscriber.subscription);
        }
        let Some(track) = self.tracks.remove(slot) else {
            return;
        };
        self.track_slots.remove(&track.id);
        if let Some(transport) = self.transports.get_mut(track.transport) {
            transport.tracks.retain(|other| *other != slot);
            transport.incoming.retain(|known| known.track != slot);
        }
    }

    fn subscribe(
        &mut self,
        id: SubscriptionId,
        transport: TransportId,
        track: TrackId,
        parameters: &SubscriptionParameters,
        now: Time,
    ) -> Option<()> {
        let (transport_slot, track_slot) = (
            *self.transport_slots.get(&transport)?,
            *self.track_slots.get(&track)?,
        );
        let (transport, track) = (
            self.transports.get_mut(transport_slot)?,
            self.tracks.get_mut(track_slot)?,
        );
        let ssrcs = [Some(parameters.ssrc), parameters.rtx_ssrc];
        // One SSRC for two streams would seal two packets under one index.
        let taken = ssrcs
            .iter()
            .flatten()
            .any(|ssrc| transport.find_outgoing(*ssrc).is_some())
            || ssrcs[0] == ssrcs[1];
        if taken || self.subscription_slots.contains_key(&id) {
            return None;
        }
        let seed = self.config.seed ^ (u64::from(id.0) << 32);
        let mut subscription = ForwardedSubscription::new(
            id,
            transport_slot,
            track_slot,
            track.format.payloads.codec,
            parameters,
            seed,
            &transport.ended,
        )
        .ok()?;
        for ssrc in ssrcs.into_iter().flatten() {
            transport.ended.forget(ssrc);
        }
        let needs_key_frame = subscription
            .choose_layer(&track.encodings)
            .filter(|_| transport.connected);
        let streams: Vec<Ssrc> = [Some(subscription.ssrc()), subscription.rtx_ssrc()]
            .into_iter()
            .flatten()
            .collect();
        let slot = self.subscriptions.insert(subscription);
        transport
            .outgoing
            .extend(streams.into_iter().map(|ssrc| (ssrc, slot)));
        transport.outgoing.sort_unstable();
        track.subscribers.push(Subscriber {
            subscription: slot,
            transport: transport_slot,
        });
        self.subscription_slots.insert(id, slot);
        self.want_key_frame(track_slot, needs_key_frame, now);
        Some(())
    }

    fn set_selection(
        &mut self,
        id: SubscriptionId,
        selection: super::Selection,
        now: Time,
    ) -> Option<()> {
        let subscription = self
            .subscriptions
            .get_mut(*self.subscription_slots.get(&id)?)?;
        let track = subscription.track;
        subscription.set_selection(selection);
        let needs_key_frame = subscription.choose_layer(&self.tracks.get(track)?.encodings);
        self.want_key_frame(track, needs_key_frame, now);
        Some(())
    }

    fn remove_subscription(&mut self, slot: u32) {
        let Some(subscription) = self.subscriptions.remove(slot) else {
            return;
        };
        self.subscription_slots.remove(&subscription.id);
        if let Some(track) = self.tracks.get_mut(subscription.track) {
            track.subscribers.retain(|other| other.subscription != slot);
        }
        if let Some(transport) = self.transports.get_mut(subscription.transport) {
            transport.outgoing.retain(|(_, other)| *other != slot);
            for ended in subscription.ended_streams() {
                transport.ended.push(ended);
            }
        }
    }

    /// Notes that a subscriber needs a key frame of one of a track's layers.
    fn want_key_frame(&mut self, track: u32, layer: Option<u8>, now: Time) {
        let Some(layer) = layer else { return };
        let Some(found) = self.tracks.get_mut(track) else {
            return;
        };
        let Some(encoding) = found.encodings.get_mut(usize::from(layer)) else {
            return;
        };
        encoding.want_key_frame();
        let (transport, at) = (found.transport, encoding.key_frame_request_at().max(now));
        self.repair_by(transport, at);
    }

    /// Makes a transport's repair timer cover one of its tracks.
    fn look_after(&mut self, transport: u32, track: u32) {
        let Some(at) = self.tracks.get(track).map(RouterTrack::next_at) else {
            return;
        };
        self.repair_by(transport, at);
    }

    fn repair_by(&mut self, slot: u32, at: Time) {
        if let Some(transport) = self
            .transports
            .get_mut(slot)
            .filter(|transport| at < transport.repair_at)
        {
            transport.repair_at = at;
            self.schedule(slot);
        }
    }

    fn schedule(&mut self, slot: u32) {
        let Some(transport) = self.transports.get(slot) else {
            return;
        };
        self.due.set(slot, transport.next_at());
    }

    // Datagrams.

    /// Handles one datagram, which is decrypted in place. Media may be held back until the packets
    /// that belong to it have come: [`Router::end_batch`] must follow the last available datagram.
    pub fn handle_datagram(
        &mut self,
        datagram: &mut [u8],
        from: impl Into<ClientEnd>,
        arrival: Time,
        now: Time,
        io: &mut impl Outgoing,
    ) {
        let from = from.into();
        self.statistics.datagrams_in += 1;
        self.statistics.bytes_in += datagram.len() as u64;
        match classify(datagram) {
            Datagram::Rtp => self.handle_rtp(datagram, from, arrival, now, io),
            Datagram::Rtcp => self.handle_rtcp(datagram, from, arrival, now, io),
            Datagram::Stun => self.handle_stun(datagram, from, arrival, now, io),
            Datagram::Dtls => self.handle_dtls(datagram, from, arrival, now, io),
            Datagram::Unknown => self.statistics.refused_unknown_kind += 1,
        }
    }

    /// Forwards the media that [`Router::handle_datagram`] held back.
    pub fn end_batch(&mut self, now: Time, io: &mut impl Outgoing) {
        self.forward_run(now, io);
    }

    /// Whether the media held back ends within a picture. Then the rest is on its way, unless the
    /// publisher spreads its packets over time.
    pub fn is_mid_frame(&self) -> bool {
        let encodings = self
            .tracks
            .get(self.run.track)
            .map(|track| &track.encodings);
        let encoding =
            encodings.and_then(|encodings| encodings.get(usize::from(self.run.encoding)));
        let last = encoding
            .zip(self.run.packets.last())
            .and_then(|(encoding, ext)| encoding.find(*ext));
        last.is_some_and(|(entry, _)| {
            !entry.marker && matches!(entry.content, PacketContent::Vp8 { .. })
        })
    }

    /// Counts a datagram that the edge could not receive whole.
    pub fn refuse(&mut self) {
        self.statistics.datagrams_in += 1;
        self.statistics.refused_malformed += 1;
    }

    /// Whether an authentic check came from there, for a connection that still is.
    pub fn knows(&self, end: ClientEnd) -> bool {
        self.ends.contains_key(&end)
    }

    /// The TCP connection is gone. Its client may open another one before its silence ends the
    /// peer connection.
    pub fn handle_stream_end(&mut self, end: ClientEnd) {
        self.last_from = None;
        if let Some(slot) = self.ends.remove(&end)
            && let Some(transport) = self.transports.get_mut(slot)
        {
            transport.ends.retain(|known| *known != end);
        }
    }

    fn transport_of(&mut self, from: ClientEnd) -> Option<u32> {
        if let Some((_, slot)) = self.last_from.filter(|(last, _)| *last == from) {
            return Some(slot);
        }
        let slot = *self.ends.get(&from)?;
        self.last_from = Some((from, slot));
        Some(slot)
    }

    fn handle_stun(
        &mut self,
        datagram: &[u8],
        from: ClientEnd,
        arrival: Time,
        now: Time,
        io: &mut impl Outgoing,
    ) {
        let ufrag = local_ufrag_of_check(datagram);
        let Some(slot) = ufrag.and_then(|ufrag| self.ufrags.get(ufrag).copied()) else {
            self.statistics.refused_unknown_ufrag += 1;
            if ufrag.is_some() && datagram.len() <= EARLY_CHECK_BYTES_MAX {
                if self.early_checks.len() == EARLY_CHECKS_MAX {
                    self.early_checks.pop_front();
                }
                let bytes = datagram.to_vec();
                self.early_checks.push_back(EarlyCheck {
                    from,
                    arrival,
                    bytes,
                });
            }
            return;
        };
        if self.take_check(slot, datagram, from, arrival, now, io) {
            self.statistics.setup_in += 1;
        } else {
            self.statistics.refused_setup += 1;
        }
    }

    fn take_check(
        &mut self,
        slot: u32,
        datagram: &[u8],
        from: ClientEnd,
        arrival: Time,
        now: Time,
        io: &mut impl Outgoing,
    ) -> bool {
        let far_end = self.far_end(from);
        let Some(transport) = self.transports.get_mut(slot) else {
            return false;
        };
        if !transport
            .peer
            .handle_setup_datagram(datagram, far_end, arrival)
        {
            return false;
        }
        self.learn_end(slot, from);
        self.advance_setup(slot, now, io);
        true
    }

    /// Handles checks that came just before this user name was known. They have been counted as
    /// refused, and stay counted.
    fn take_early_checks(&mut self, ufrag: &str, now: Time, io: &mut impl Outgoing) {
        let Some(slot) = self.ufrags.get(ufrag).copied() else {
            return;
        };
        let checks = std::mem::take(&mut self.early_checks);
        for check in checks {
            if local_ufrag_of_check(&check.bytes) != Some(ufrag) {
                self.early_checks.push_back(check);
            } else if now.since(check.arrival) <= EARLY_CHECK_AGE_MAX {
                self.take_check(slot, &check.bytes, check.from, now, now, io);
            }
        }
    }

    /// Learns an address from an authentic check. Other packets may come from it, too.
    fn learn_end(&mut self, slot: u32, from: ClientEnd) {
        if self.ends.get(&from) == Some(&slot) {
            return;
        }
        self.last_from = None;
        if let Some(other) = self.ends.insert(from, slot)
            && let Some(other) = self.transports.get_mut(other)
        {
            other.ends.retain(|end| *end != from);
        }
        let Some(transport) = self.transports.get_mut(slot) else {
            return;
        };
        if transport.ends.len() == ENDS_MAX {
            let in_use = client_end(&transport.peer);
            let oldest = transport
                .ends
                .iter()
                .position(|end| Some(*end) != in_use)
                .unwrap_or(0);
            let forgotten = transport.ends.remove(oldest);
            self.ends.remove(&forgotten);
        }
        transport.ends.push(from);
    }

    /// An end as the peer knows it.
    fn far_end(&self, end: ClientEnd) -> FarEnd {
        let tcp = self.config.local.tcp.filter(|_| end.is_stream);
        FarEnd {
            via: tcp.map_or(Via::Udp, Via::Tcp),
            address: end.address,
        }
    }

    fn handle_dtls(
        &mut self,
        datagram: &[u8],
        from: ClientEnd,
        arrival: Time,
        now: Time,
        io: &mut impl Outgoing,
    ) {
        let Some(slot) = self.transport_of(from) else {
            self.statistics.refused_unknown_address += 1;
            return;
        };
        let far_end = self.far_end(from);
        let taken = self.transports.get_mut(slot).is_some_and(|transport| {
            transport
                .peer
                .handle_setup_datagram(datagram, far_end, arrival)
        });
        if taken {
            self.statistics.setup_in += 1;
        } else {
            self.statistics.refused_setup += 1;
        }
        self.advance_setup(slot, now, io);
    }

    /// Drives ICE, DTLS and data channels as far as possible, and relays received data messages.
    fn advance_setup(&mut self, slot: u32, now: Time, io: &mut impl Outgoing) {
        self.advance_peer(slot, now, io);
        while let Some(transport) = self.transports.get_mut(slot)
            && let Some(message) = transport.peer.poll_data()
        {
            self.relay_data(slot, &message, now, io);
        }
    }

    /// Sends a participant's message to the others of its room.
    fn relay_data(&mut self, from: u32, message: &DataMessage, now: Time, io: &mut impl Outgoing) {
        self.statistics.data_in += 1;
        let sender = self.transports.get(from);
        let Some(sender) = sender.and_then(|transport| transport.data.clone()) else {
            return;
        };
        let packet = RelayedPacket::of(&sender, &message.payload);
        let Some(packet) = packet.filter(|_| sender.may_publish) else {
            self.statistics.data_refused += 1;
            return;
        };
        let room = self.data_rooms.get(&sender.room).cloned();
        for slot in room.into_iter().flatten() {
            let Some(receiver) = self.transports.get_mut(slot).filter(|receiver| {
                let data = receiver.data.as_ref();
                receiver.connected && data.is_some_and(|data| packet.is_for(data, &sender))
            }) else {
                continue;
            };
            if receiver.peer.send_data(message.channel, &packet.bytes) {
                self.statistics.data_out += 1;
                self.advance_peer(slot, now, io);
            } else {
                self.statistics.data_dropped += 1;
            }
        }
    }

    /// Drives ICE, DTLS and data channels as far as possible, and sets their next timer.
    fn advance_peer(&mut self, slot: u32, now: Time, io: &mut impl Outgoing) {
        let Some(transport) = self.transports.get_mut(slot) else {
            return;
        };
        transport.peer.handle_timeout(now);
        let statistics = &mut self.statistics;
        let (mut connected, mut failed) = (false, None);
        transport.peer.poll_by(
            now,
            |datagram, to| {
                statistics.setup_out += 1;
                statistics.datagrams_out += 1;
                statistics.bytes_out += datagram.len() as u64;
                io.lend()[..datagram.len()].copy_from_slice(datagram);
                io.send(to.into(), datagram.len(), datagram.len());
            },
            |event| match event {
                PeerEvent::Nominated(_) => {}
                PeerEvent::Connected => connected = true,
                PeerEvent::Failed(failure) => failed = Some(failure),
            },
        );
        let id = transport.id;
        if let Some(failure) = failed {
            self.remove_transport(slot);
            self.events.push_back(MediaEvent::Failed {
                transport: id,
                failure,
            });
            return;
        }
        if connected {
            transport.connected = true;
            // Reports are spread over the interval, so that a wave of joins does not cause a
            // lasting wave of reports.
            transport.report_at = now + Duration::from_millis(u64::from(id.0) * 37 % 200 + 100);
            if transport.transport_cc.is_some() {
                transport.feedback_at = now + FEEDBACK_INTERVAL;
            }
            self.events.push_back(MediaEvent::Connected {
                transport: id,
                at: now,
            });
            self.begin_subscriptions(slot, now);
        }
        self.schedule(slot);
    }

    /// Requests key frames for the subscriptions of a connection that has come up.
    fn begin_subscriptions(&mut self, slot: u32, now: Time) {
        let Some(transport) = self.transports.get(slot) else {
            return;
        };
        for (_, subscription) in transport.outgoing.clone() {
            let Some(subscription) = self.subscriptions.get_mut(subscription) else {
                continue;
            };
            let (track, layer) = (subscription.track, subscription.request_key_frame());
            self.want_key_frame(track, layer, now);
        }
    }

    fn handle_rtp(
        &mut self,
        datagram: &mut [u8],
        from: ClientEnd,
        arrival: Time,
        now: Time,
        io: &mut impl Outgoing,
    ) {
        let Some(slot) = self.transport_of(from) else {
            self.statistics.refused_unknown_address += 1;
            return;
        };
        let Some(header) = Header::parse(datagram) else {
            self.statistics.refused_malformed += 1;
            return;
        };
        let Some(transport) = self.transports.get_mut(slot) else {
            return;
        };
        let known = transport.find_incoming(header.ssrc);
        let Some(incoming) = known.or_else(|| learn(transport, &self.tracks, &header, datagram))
        else {
            self.statistics.refused_unknown_ssrc += 1;
            return;
        };
        let Some(opener) = transport.peer.opener() else {
            self.statistics.refused_unkeyed += 1;
            return;
        };
        let Some(track) = self.tracks.get_mut(incoming.track) else {
            return;
        };
        let (format, layer) = (track.format, usize::from(incoming.encoding));
        let mut around = ingest::IngestContext {
            format: &format,
            opener,
            arrival,
            statistics: &mut self.statistics,
        };
        let taken =
            track.encodings[layer].handle_rtp(datagram, &header, incoming.is_rtx, &mut around);
        match taken {
            Ok(taken) => {
                if known.is_none() {
                    transport.bind(incoming);
                }
                note_arrival(transport, &header, datagram, arrival);
                match taken {
                    Taken::Media { ext } => self.take_media(slot, incoming, ext, arrival, now, io),
                    Taken::Probe => self.statistics.probes_in += 1,
                }
            }
            Err(refused) => {
                if refused.is_authentic() {
                    note_arrival(transport, &header, datagram, arrival);
                }
                *refused.counter(&mut self.statistics) += 1;
            }
        }
    }

    /// Adds a kept packet to the run, or begins the next run with it.
    fn take_media(
        &mut self,
        slot: u32,
        incoming: Incoming,
        ext: u64,
        arrival: Time,
        now: Time,
        io: &mut impl Outgoing,
    ) {
        let Some(track) = self.tracks.get_mut(incoming.track) else {
            return;
        };
        let layer = usize::from(incoming.encoding);
        let encoding = &mut track.encodings[layer];
        if let Some(level) = encoding.take_level() {
            track.level.add(level);
        }
        let became_active = encoding.activity.handle_packet(layer) && track.encodings.len() > 1;
        if !track.started {
            track.started = true;
            self.events.push_back(MediaEvent::TrackStarted {
                track: track.id,
                at: arrival,
            });
        }
        let due = track.encodings[layer].next_nack_at();
        if became_active {
            self.choose_layers(incoming.track, now);
        }
        self.repair_by(slot, due);
        let joins = (self.run.track, self.run.encoding) == (incoming.track, incoming.encoding)
            && self.run.packets.len() < RUN_MAX;
        if !joins {
            self.forward_run(now, io);
            (self.run.track, self.run.encoding) = (incoming.track, incoming.encoding);
        }
        self.run.packets.push(ext);
    }

    /// Chooses layers again, after a layer of a track has started or stopped.
    fn choose_layers(&mut self, slot: u32, now: Time) {
        let Some(track) = self.tracks.get_mut(slot) else {
            return;
        };
        let mut at = Time::MAX;
        for subscriber in &track.subscribers {
            let Some(subscription) = self.subscriptions.get_mut(subscriber.subscription) else {
                continue;
            };
            if let Some(layer) = subscription.choose_layer(&track.encodings) {
                let encoding = &mut track.encodings[usize::from(layer)];
                encoding.want_key_frame();
                at = at.min(encoding.key_frame_request_at().max(now));
            }
        }
        let transport = track.transport;
        self.repair_by(transport, at);
    }

    /// Sends the run to each of its track's subscribers.
    fn forward_run(&mut self, now: Time, io: &mut impl Outgoing) {
        if self.run.packets.is_empty() {
            return;
        }
        if let Some(track) = self.tracks.get(self.run.track) {
            let run = forward::PacketRun::new(
                &track.encodings,
                self.run.encoding,
                &self.run.packets,
                &track.format,
            );
            for (at, subscriber) in track.subscribers.iter().enumerate() {
                // The state of the next subscriber is not in the CPU cache. It is prefetched now,
                // so it is there at its turn.
                if let Some(next) = track.subscribers.get(at + 1) {
                    prefetch(&self.subscriptions, &self.transports, *next);
                }
                let Some(subscription) = self.subscriptions.get_mut(subscriber.subscription) else {
                    continue;
                };
                let transport = self.transports.get(subscriber.transport);
                let way = transport.and_then(|transport| {
                    Some((client_end(&transport.peer)?, transport.peer.sealer()?))
                });
                let Some((to, sealer)) = way else {
                    self.statistics.withheld_unconnected += self.run.packets.len() as u64;
                    continue;
                };
                let mut wire = ForwardWire {
                    io,
                    to,
                    sealer,
                    send: self.config.send,
                    now,
                    statistics: &mut self.statistics,
                };
                subscription.forward(&run, &mut wire);
            }
        }
        self.run.packets.clear();
    }

    fn handle_rtcp(
        &mut self,
        datagram: &mut [u8],
        from: ClientEnd,
        arrival: Time,
        now: Time,
        io: &mut impl Outgoing,
    ) {
        // The packets that a report or a NACK refers to may still be in the run.
        self.forward_run(now, io);
        let Some(slot) = self.transport_of(from) else {
            self.statistics.refused_unknown_address += 1;
            return;
        };
        let Some(opener) = self
            .transports
            .get_mut(slot)
            .and_then(|transport| transport.peer.opener())
        else {
            self.statistics.refused_unkeyed += 1;
            return;
        };
        let len = match opener.open_rtcp(datagram) {
            Ok(len) => len,
            Err(Rejected::Replay) => {
                self.statistics.refused_replayed += 1;
                return;
            }
            Err(_) => {
                self.statistics.refused_unauthentic += 1;
                return;
            }
        };
        self.statistics.rtcp_in += 1;
        for packet in rtcp::packets(&datagram[..len]) {
            match packet {
                Ok(packet) => self.handle_rtcp_packet(slot, &packet, arrival, now, io),
                Err(_) => self.statistics.rtcp_malformed += 1,
            }
        }
    }

    fn handle_rtcp_packet(
        &mut self,
        slot: u32,
        packet: &RtcpPacket<'_>,
        arrival: Time,
        now: Time,
        io: &mut impl Outgoing,
    ) {
        match packet {
            RtcpPacket::SenderReport { sender, reports } => {
                self.handle_sender_report(slot, sender.ssrc, sender.ntp, sender.rtp_time, arrival);
                reports
                    .clone()
                    .for_each(|block| self.handle_report_block(slot, &block, arrival));
            }
            RtcpPacket::ReceiverReport { reports, .. } => reports
                .clone()
                .for_each(|block| self.handle_report_block(slot, &block, arrival)),
            RtcpPacket::Nack {
                media_ssrc, seqs, ..
            } => self.handle_nack(slot, *media_ssrc, seqs.clone(), now, io),
            RtcpPacket::Pli { media_ssrc, .. } => {
                self.statistics.plis_in += 1;
                self.handle_key_frame_request(slot, *media_ssrc, now);
            }
            RtcpPacket::Fir { entries, .. } => {
                self.statistics.firs_in += 1;
                entries
                    .clone()
                    .for_each(|(ssrc, _)| self.handle_key_frame_request(slot, ssrc, now));
            }
            RtcpPacket::Xr { ssrc, rrtr, dlrr } => {
                if let Some(ntp) = rrtr {
                    self.answer_reference_time(slot, (*ssrc, *ntp), arrival, now, io);
                }
                let now_ntp = ntp_middle(self.config.epoch.ntp(arrival));
                let rtts = dlrr.clone().filter(|block| block.ssrc == self.rtcp_ssrc);
                let rtt = rtts
                    .filter_map(|block| {
                        rtt_from_report(now_ntp, block.last_rr, block.delay_since_last_rr)
                    })
                    .last();
                if let Some(transport) = self.transports.get_mut(slot) {
                    transport.rtt = rtt.or(transport.rtt);
                }
            }
            RtcpPacket::Sdes { .. }
            | RtcpPacket::Bye { .. }
            | RtcpPacket::TransportCc { .. }
            | RtcpPacket::Remb { .. }
            | RtcpPacket::Unknown { .. } => {}
        }
    }

    fn handle_sender_report(
        &mut self,
        slot: u32,
        ssrc: Ssrc,
        ntp: u64,
        rtp_time: u32,
        arrival: Time,
    ) {
        let Some(transport) = self.transports.get_mut(slot) else {
            return;
        };
        let Some(incoming) = transport
            .find_incoming(ssrc)
            .filter(|incoming| !incoming.is_rtx)
        else {
            return;
        };
        transport.clock = Some(PeerClock::update(transport.clock, ntp_nanos(ntp), arrival));
        if let Some(track) = self.tracks.get_mut(incoming.track) {
            track.encodings[usize::from(incoming.encoding)]
                .handle_sender_report(ntp, rtp_time, arrival);
        }
    }

    fn handle_report_block(&mut self, slot: u32, block: &ReportBlock, arrival: Time) {
        let Some(transport) = self.transports.get_mut(slot) else {
            return;
        };
        let Some(subscription) = transport.find_outgoing(block.ssrc) else {
            return;
        };
        let rtt = rtt_from_report(
            ntp_middle(self.config.epoch.ntp(arrival)),
            block.lsr,
            block.dlsr,
        );
        transport.rtt = rtt.or(transport.rtt);
        // Reports on retransmissions say nothing about the loss of media.
        if let Some(subscription) = self
            .subscriptions
            .get_mut(subscription)
            .filter(|found| found.ssrc() == block.ssrc)
        {
            subscription.handle_report_block(block, rtt);
        }
    }

    fn handle_nack(
        &mut self,
        slot: u32,
        media_ssrc: Ssrc,
        seqs: impl Iterator<Item = Seq>,
        now: Time,
        io: &mut impl Outgoing,
    ) {
        let Some(transport) = self.transports.get(slot) else {
            return;
        };
        let (Some(to), Some(sealer)) = (client_end(&transport.peer), transport.peer.sealer())
        else {
            return;
        };
        let Some(subscription) = transport
            .find_outgoing(media_ssrc)
            .and_then(|found| self.subscriptions.get_mut(found))
        else {
            return;
        };
        let Some(track) = self.tracks.get(subscription.track) else {
            return;
        };
        let mut wire = ForwardWire {
            io,
            to,
            sealer,
            send: self.config.send,
            now,
            statistics: &mut self.statistics,
        };
        subscription.handle_nack(&track.encodings, seqs, &mut wire);
    }

    fn handle_key_frame_request(&mut self, slot: u32, media_ssrc: Ssrc, now: Time) {
        let found = self
            .transports
            .get(slot)
            .and_then(|transport| transport.find_outgoing(media_ssrc));
        let Some(subscription) = found.and_then(|found| self.subscriptions.get_mut(found)) else {
            return;
        };
        subscription.count_key_frame_request();
        let (track, layer) = (subscription.track, subscription.request_key_frame());
        self.want_key_frame(track, layer, now);
    }

    /// Answers a reference time report, from which a receiver without media measures its round trip
    /// (RFC 3611). The answer is sent at once, and states how long the request had waited.
    fn answer_reference_time(
        &mut self,
        slot: u32,
        (ssrc, ntp): (Ssrc, u64),
        arrival: Time,
        now: Time,
        io: &mut impl Outgoing,
    ) {
        let answer = DlrrBlock {
            ssrc,
            last_rr: ntp_middle(ntp),
            delay_since_last_rr: dlsr_units(now.since(arrival)),
        };
        let ours = self.rtcp_ssrc;
        if let Some(transport) = self.transports.get_mut(slot) {
            send_compound(transport, &mut self.statistics, io, |writer| {
                writer.xr(ours, None, [answer])
            });
        }
    }

    // Time.

    /// Sends what is due: NACKs, key frame requests, reports, feedback, set-up.
    pub fn handle_timeout(&mut self, now: Time, io: &mut impl Outgoing) {
        self.forward_run(now, io);
        // A slot that is due again at once waits for the next call, so each call ends.
        let mut due_now = std::mem::take(&mut self.due_now);
        while let Some(slot) = self.due.pop_due(now) {
            due_now.push(slot);
        }
        for slot in due_now.drain(..) {
            self.advance(slot, now, io);
        }
        self.due_now = due_now;
        if now >= self.levels_at {
            self.tell_levels();
            self.levels_at = now + LEVEL_INTERVAL;
        }
    }

    fn advance(&mut self, slot: u32, now: Time, io: &mut impl Outgoing) {
        let due = |at: Option<Time>| at.is_some_and(|at| at <= now);
        if due(self
            .transports
            .get(slot)
            .map(|transport| transport.peer.next_timeout()))
        {
            self.advance_setup(slot, now, io);
        }
        if due(self
            .transports
            .get(slot)
            .map(|transport| transport.repair_at))
        {
            self.repair(slot, now, io);
        }
        if due(self
            .transports
            .get(slot)
            .map(|transport| transport.feedback_at))
        {
            self.send_feedback(slot, now, io);
        }
        if due(self
            .transports
            .get(slot)
            .map(|transport| transport.report_at))
        {
            self.send_reports(slot, now, io);
        }
        self.schedule(slot);
    }

    /// Requests missing packets and needed key frames from a publisher, and checks which of its
    /// layers are active.
    fn repair(&mut self, slot: u32, now: Time, io: &mut impl Outgoing) {
        let Some(transport) = self.transports.get_mut(slot) else {
            return;
        };
        let tracks = std::mem::take(&mut transport.tracks);
        let mut next_at = Time::MAX;
        for track in &tracks {
            self.judge_layers(*track, now);
            self.repair_track(slot, *track, now, io);
            next_at = next_at.min(
                self.tracks
                    .get(*track)
                    .map_or(Time::MAX, RouterTrack::next_at),
            );
        }
        if let Some(transport) = self.transports.get_mut(slot) {
            transport.tracks = tracks;
            transport.repair_at = next_at;
        }
    }

    fn judge_layers(&mut self, slot: u32, now: Time) {
        let Some(track) = self
            .tracks
            .get_mut(slot)
            .filter(|track| track.window_at <= now)
        else {
            return;
        };
        track.window_at = now + select::ACTIVITY_WINDOW;
        let mut stopped = false;
        for (layer, encoding) in track.encodings.iter_mut().enumerate() {
            stopped |= encoding.activity.close_window(layer);
        }
        if stopped {
            self.choose_layers(slot, now);
        }
    }

    fn repair_track(&mut self, slot: u32, track: u32, now: Time, io: &mut impl Outgoing) {
        let (Some(transport), Some(track)) =
            (self.transports.get_mut(slot), self.tracks.get_mut(track))
        else {
            return;
        };
        let rtt = RoundTrip {
            last: transport.rtt.unwrap_or(RTT_UNKNOWN),
            least: None,
        };
        for (layer, encoding) in track.encodings.iter_mut().enumerate() {
            let Some(media_ssrc) = encoding.ssrc() else {
                continue;
            };
            if encoding.next_nack_at() <= now {
                let mut missing = [0; MISSING_MAX];
                let count = encoding.poll_nack(now, rtt, &mut missing);
                for missing in missing[..count]
                    .chunks(NACK_SEQS_MAX)
                    .filter(|_| track.nack)
                {
                    let seqs = missing.iter().map(|seq| Seq(*seq));
                    send_compound(transport, &mut self.statistics, io, |writer| {
                        writer.nack(self.rtcp_ssrc, media_ssrc, seqs)
                    });
                    encoding.count_nack();
                    self.statistics.nacks_out += 1;
                    self.statistics.nacked_out += missing.len() as u64;
                }
            }
            if encoding.key_frame_request_at() <= now {
                let layer_awaited = |subscriber: &Subscriber| {
                    self.subscriptions
                        .get(subscriber.subscription)
                        .and_then(ForwardedSubscription::key_frame_layer)
                };
                let waits =
                    |subscriber: &Subscriber| layer_awaited(subscriber) == Some(layer as u8);
                let still_wanted = track.subscribers.iter().any(waits);
                if encoding.poll_key_frame_request(now, still_wanted) {
                    // Both SSRC fields name the media stream, as in LiveKit, because some
                    // publishers answer nothing else.
                    send_compound(transport, &mut self.statistics, io, |writer| {
                        writer.pli(media_ssrc, media_ssrc)
                    });
                    self.statistics.plis_out += 1;
                }
            }
        }
    }

    fn send_feedback(&mut self, slot: u32, now: Time, io: &mut impl Outgoing) {
        let Some(transport) = self.transports.get_mut(slot) else {
            return;
        };
        transport.feedback_at = now + FEEDBACK_INTERVAL;
        let media_ssrc = transport
            .incoming
            .first()
            .map_or(Ssrc::default(), |incoming| incoming.ssrc);
        let Some((id, mut log)) = transport.transport_cc.take() else {
            return;
        };
        while log.has_news() {
            let ours = self.rtcp_ssrc;
            if !send_compound(transport, &mut self.statistics, io, |writer| {
                log.write(writer, ours, media_ssrc)
            }) {
                break;
            }
            self.statistics.transport_feedbacks_out += 1;
        }
        transport.transport_cc = Some((id, log));
    }

    fn send_reports(&mut self, slot: u32, now: Time, io: &mut impl Outgoing) {
        if let Some(transport) = self.transports.get_mut(slot) {
            transport.report_at = now + REPORT_INTERVAL;
        }
        self.send_receiver_reports(slot, now, io);
        self.send_sender_reports(slot, now, io);
    }

    /// Sends an RR for every published encoding, with our clock, so that the answer shows the round
    /// trip (RFC 3611).
    fn send_receiver_reports(&mut self, slot: u32, now: Time, io: &mut impl Outgoing) {
        let Some(transport) = self.transports.get_mut(slot) else {
            return;
        };
        let (ours, ntp, cname) = (self.rtcp_ssrc, self.config.epoch.ntp(now), &self.cname);
        let published = std::mem::take(&mut transport.incoming);
        let tracks = &mut self.tracks;
        let mut blocks = published
            .iter()
            .filter(|incoming| !incoming.is_rtx)
            .filter_map(|incoming| {
                let track = tracks.get_mut(incoming.track)?;
                let numbers = track.encodings[usize::from(incoming.encoding)].report_block(now)?;
                Some(numbers.block(incoming.ssrc))
            });
        let mut reference_time = Some(ntp);
        loop {
            let mut batch = [ReportBlock::default(); REPORT_BLOCKS_MAX];
            let mut count = 0;
            while let Some(block) = if count < REPORT_BLOCKS_MAX {
                blocks.next()
            } else {
                None
            } {
                batch[count] = block;
                count += 1;
            }
            if count == 0 {
                break;
            }
            send_compound(transport, &mut self.statistics, io, |writer| {
                writer.receiver_report(ours, batch[..count].iter().copied())?;
                writer.sdes_cname(ours, cname)?;
                writer.xr(ours, reference_time.take(), [])
            });
            self.statistics.receiver_reports_out += 1;
        }
        drop(blocks);
        transport.incoming = published;
    }

    /// Sends an SR, in our own clock, for each stream that this connection gets.
    fn send_sender_reports(&mut self, slot: u32, now: Time, io: &mut impl Outgoing) {
        let Some(transport) = self.transports.get_mut(slot) else {
            return;
        };
        let carried = std::mem::take(&mut transport.outgoing);
        for some in carried.chunks(SENDER_REPORTS_MAX) {
            self.send_some_sender_reports(slot, some, now, io);
        }
        if let Some(transport) = self.transports.get_mut(slot) {
            transport.outgoing = carried;
        }
    }

    fn send_some_sender_reports(
        &mut self,
        slot: u32,
        carried: &[(Ssrc, u32)],
        now: Time,
        io: &mut impl Outgoing,
    ) {
        let ntp = self.config.epoch.ntp(now);
        let mut reports = [(SenderInfo::default(), 0); SENDER_REPORTS_MAX];
        let mut count = 0;
        for (ssrc, subscription) in carried {
            let Some(found) = self.subscriptions.get_mut(*subscription) else {
                continue;
            };
            if found.ssrc() != *ssrc || found.sender_report_at > now {
                continue;
            }
            let Some(track) = self.tracks.get(found.track) else {
                continue;
            };
            let Some(clock) = self
                .transports
                .get(track.transport)
                .and_then(|publisher| publisher.clock)
            else {
                continue;
            };
            if let Some(info) = found.sender_info(
                &track.encodings,
                &track.format,
                clock.ntp_nanos_at(now),
                ntp,
            ) {
                found.sender_report_at = now + SENDER_REPORT_INTERVAL;
                reports[count] = (info, found.track);
                count += 1;
            }
        }
        let (Some(transport), tracks) = (self.transports.get_mut(slot), &self.tracks) else {
            return;
        };
        if count == 0 {
            return;
        }
        let sent = send_compound(transport, &mut self.statistics, io, |writer| {
            for (info, track) in &reports[..count] {
                writer.sender_report(info, [])?;
                let cname = tracks.get(*track).map_or("", |track| &track.cname);
                writer.sdes_cname(info.ssrc, cname)?;
            }
            Ok(())
        });
        self.statistics.sender_reports_out += if sent { count as u64 } else { 0 };
    }

    fn tell_levels(&mut self) {
        let mut levels = Vec::new();
        for track in self.tracks.entries.iter_mut().flatten() {
            let sum = std::mem::take(&mut track.level);
            levels.extend(sum.spoke().map(|level| (track.id, level)));
        }
        // Silence is reported once.
        if self.somebody_spoke || !levels.is_empty() {
            self.somebody_spoke = !levels.is_empty();
            self.events.push_back(MediaEvent::AudioLevels { levels });
        }
    }
}

/// Finds the track and encoding of a packet with an unknown SSRC, by the mid, rid and repaired rid
/// in its header (RFC 8843, RFC 8852). The result counts only once the packet proves authentic.
fn learn(
    transport: &RouterTransport,
    tracks: &Slab<RouterTrack>,
    header: &Header,
    datagram: &[u8],
) -> Option<Incoming> {
    transport.tracks.iter().find_map(|slot| {
        let track = tracks.get(*slot)?;
        let text = |extension| header.extension(datagram, track.extensions.id(extension)?);
        let named = text(Extension::Mid)? == track.mid.as_bytes();
        let (encoding, is_rtx) = match &track.encodings_by {
            _ if !named => return None,
            Encodings::Ssrc { .. } => return None,
            Encodings::Mid => (
                0,
                Some(header.payload_type) == track.format.rtx_payload_type,
            ),
            Encodings::Rids(rids) => {
                let layer = |rid: &[u8]| rids.iter().position(|known| known.as_bytes() == rid);
                match (
                    text(Extension::RepairedRid).and_then(layer),
                    text(Extension::Rid).and_then(layer),
                ) {
                    (Some(layer), _) => (layer, true),
                    (None, Some(layer)) => (layer, false),
                    (None, None) => return None,
                }
            }
        };
        Some(Incoming {
            ssrc: header.ssrc,
            track: *slot,
            encoding: encoding as u8,
            is_rtx,
        })
    })
}

/// Records an arrival for transport-wide feedback, if that was agreed on.
fn note_arrival(transport: &mut RouterTransport, header: &Header, datagram: &[u8], arrival: Time) {
    let Some((id, log)) = &mut transport.transport_cc else {
        return;
    };
    if let Some(&[high, low]) = header.extension(datagram, *id) {
        log.record(u16::from_be_bytes([high, low]), arrival);
    }
}

fn prefetch(
    subscriptions: &Slab<ForwardedSubscription>,
    transports: &Slab<RouterTransport>,
    subscriber: Subscriber,
) {
    if let Some(subscription) = subscriptions.get(subscriber.subscription) {
        subscription.prefetch();
    }
    if let Some(transport) = transports.get(subscriber.transport) {
        transport.peer.prefetch_sending();
    }
}

/// Returns where datagrams for this peer go, once ICE has nominated a path.
fn client_end(peer: &Peer) -> Option<ClientEnd> {
    let is_stream = peer.is_stream();
    let end = |address| ClientEnd { address, is_stream };
    peer.remote().map(end)
}

/// Writes one compound into the lent buffer, seals it and sends it. Returns false if that is not
/// possible.
fn send_compound(
    transport: &mut RouterTransport,
    statistics: &mut RouterStatistics,
    io: &mut impl Outgoing,
    write: impl FnOnce(&mut RtcpWriter<'_>) -> Result<(), WriteError>,
) -> bool {
    let Some((address, sealed)) = seal_compound(&mut transport.peer, io.lend(), write) else {
        return false;
    };
    let to = ClientEnd {
        address,
        is_stream: transport.peer.is_stream(),
    };
    io.send(to, sealed, sealed);
    statistics.rtcp_out += 1;
    statistics.datagrams_out += 1;
    statistics.bytes_out += sealed as u64;
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{Codec, PayloadTypes};
    use crate::sfu::Selection;
    use crate::transport::sdp::Fingerprint;

    /// Discards all datagrams.
    struct Nowhere(Vec<u8>);

    impl Outgoing for Nowhere {
        fn lend(&mut self) -> &mut [u8] {
            &mut self.0
        }

        fn send(&mut self, _: ClientEnd, _: usize, _: usize) {}
    }

    fn credentials(name: &str) -> IceCredentials {
        IceCredentials {
            ufrag: name.to_owned(),
            password: "0123456789abcdef0123456789abcdef".to_owned(),
        }
    }

    fn router_with_a_track(io: &mut Nowhere) -> Router {
        let config = RouterConfig {
            identity: Identity::generate().unwrap(),
            epoch: Epoch::read(),
            local: std::net::SocketAddr::from(([127, 0, 0, 1], 9)).into(),
            send: SendMode::Plain,
            seed: 1,
        };
        let mut router = Router::new(config, Time::ZERO);
        for id in [1, 2] {
            let parameters = TransportParameters {
                local: credentials(&format!("router{id}")),
                remote: credentials(&format!("client{id}")),
                remote_fingerprint: Fingerprint([0; 32]),
                dtls_active: false,
            };
            router.handle_command(
                MediaCommand::AddTransport {
                    transport: TransportId(id),
                    parameters: Box::new(parameters),
                },
                Time::ZERO,
                io,
            );
        }
        let parameters = TrackParameters {
            payloads: PayloadTypes::of(Codec::Opus, 111),
            mid: "0".into(),
            rtx_payload_type: None,
            extensions: ExtensionIds::default(),
            nack: true,
            transport_cc: false,
            encodings: Encodings::Mid,
        };
        router.handle_command(
            MediaCommand::AddTrack {
                transport: TransportId(1),
                track: TrackId(1),
                parameters: Box::new(parameters),
            },
            Time::ZERO,
            io,
        );
        router
    }

    #[test]
    fn ten_thousand_subscriptions_that_ended_leave_a_bounded_trace() {
        let mut io = Nowhere(vec![0; crate::net::SEND_BYTES_MAX]);
        let mut router = router_with_a_track(&mut io);
        for id in 0..10_000 {
            let parameters = SubscriptionParameters {
                ssrc: Ssrc(2 * id + 1),
                rtx_ssrc: Some(Ssrc(2 * id + 2)),
                payloads: PayloadTypes::of(Codec::Opus, 111),
                rtx_payload_type: Some(112),
                extensions: ExtensionIds::default(),
                selection: Selection {
                    enabled: true,
                    layer: 0,
                },
            };
            router.handle_command(
                MediaCommand::Subscribe {
                    subscription: SubscriptionId(id),
                    transport: TransportId(2),
                    track: TrackId(1),
                    parameters: Box::new(parameters),
                },
                Time::ZERO,
                &mut io,
            );
            router.handle_command(
                MediaCommand::Unsubscribe {
                    subscription: SubscriptionId(id),
                },
                Time::ZERO,
                &mut io,
            );
        }
        assert_eq!(router.statistics.commands_refused, 0);
        let slot = router.transport_slots[&TransportId(2)];
        let transport = router.transports.get(slot).unwrap();
        assert_eq!(transport.ended.len(), forward::ENDED_STREAMS_MAX);
        assert!(transport.outgoing.is_empty() && router.subscription_slots.is_empty());
        assert_eq!(
            router.subscriptions.entries.len(),
            1,
            "one slot, used again and again"
        );
    }
}
