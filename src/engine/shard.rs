//! The participants of one core: takes datagrams, time and commands, and gives datagrams, events
//! and counts. It has no sockets, no clock and no lock.

use crate::transport::rtp::Ssrc;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use super::connection::{ConnectionContext, KEY_FRAME_CHECK, PeerConnection};
use super::peer_key::PeerSlots;
use super::publisher::{SendParameters, SendTrack};
use super::subscriber::EVENTS_MAX;
use super::timers::Timers;
use super::{
    Io, IoCounts, NewPeer, PeerKey, PeerOutcome, ShardCommand, ShardConfig, ShardEvent,
    StreamParameters,
};
use crate::measure::Record;
use crate::media::assemble::FrameEvent;
use crate::media::identity::{FrameIdentity, Origin};
use crate::path::{FarEnd, Via};
use crate::recording::Tap;
use crate::transport::peer::{IceCredentials, NearEnd, PeerEvent};
use crate::transport::rtcp;
use crate::units::Time;

/// Interval of sender and receiver reports. LiveKit itself sends receiver reports at this interval;
/// it is libwebrtc's interval for video too.
const RTCP_INTERVAL: Duration = Duration::from_secs(1);
/// How long a nominated path must stay the same until the peer is restricted to it: by then both
/// sides have checked all pairs, and use the same one.
const PATH_SETTLES_AFTER: Duration = Duration::from_secs(1);
/// Maximum number of tracks (or encodings of one track) that a peer may send. Each has its own
/// timer.
const TRACKS_MAX: u32 = 4;

pub struct Shard {
    config: ShardConfig,
    peers: PeerSlots<Box<PeerConnection>>,
    media_timers: Timers,
    control_timers: Timers,
    events: VecDeque<(PeerKey, ShardEvent)>,
    record: Box<Record>,
    /// Outcomes of connections whose participants have returned on other connections, until they
    /// are taken: those of one second at most.
    former: Vec<PeerOutcome>,
    /// Tracks of connections that are gone although the plan means them to send.
    gone: Vec<SendTrack>,
    /// Peers that are still present and have lost a track.
    losers: Vec<PeerKey>,
    /// Taps of recorded participants without a live subscription.
    taps: Vec<(u32, Box<Tap>)>,
    /// Number of connections that are neither up nor given up.
    in_setup: usize,
    /// Events of the packet that is being handled.
    frame_events: Vec<FrameEvent>,
    /// Events of the set-up step that is being handled.
    peer_events: Vec<PeerEvent>,
}

/// The control timers of one peer.
#[derive(Clone, Copy)]
enum ControlTimer {
    Setup,
    Rtcp,
    Repair,
    Feedback,
    Probe,
}

const CONTROLS: u32 = 5;

fn control(key: PeerKey, kind: ControlTimer) -> u32 {
    key.0 as u32 * CONTROLS + kind as u32
}

fn media_timer(key: PeerKey, track: u32) -> u32 {
    key.0 as u32 * TRACKS_MAX + track
}

/// Returns the peer of a media timer, and the index of the track among the peer's tracks.
#[inline]
fn timed_track(timer: u32) -> (PeerKey, usize) {
    (
        PeerKey((timer / TRACKS_MAX) as usize),
        (timer % TRACKS_MAX) as usize,
    )
}

impl Shard {
    /// Makes a shard for at most `capacity` peers.
    pub fn new(config: ShardConfig, capacity: usize, now: Time) -> Shard {
        Shard {
            config,
            peers: PeerSlots::new(capacity),
            media_timers: Timers::new(capacity * TRACKS_MAX as usize, now),
            control_timers: Timers::new(capacity * CONTROLS as usize, now),
            events: VecDeque::new(),
            record: Box::default(),
            former: Vec::new(),
            gone: Vec::new(),
            losers: Vec::new(),
            taps: Vec::new(),
            in_setup: 0,
            frame_events: Vec::with_capacity(EVENTS_MAX),
            peer_events: Vec::new(),
        }
    }

    pub fn record_tick(&mut self, late: Duration, beats_missed: u64) {
        self.record.engine.tick_late.record(late);
        self.record.engine.ticks_missed += beats_missed;
    }

    pub fn take_io_counts(&mut self, counts: &mut IoCounts) {
        let IoCounts {
            socket_drops,
            unsent,
            receive_errors,
            setup_dropped,
        } = std::mem::take(counts);
        let session = &mut self.record.session;
        session.host_drops += socket_drops;
        session.sends_refused += unsent.refused;
        session.sends_unreachable += unsent.unreachable;
        session.sends_blocked += unsent.blocked;
        session.sends_too_long += unsent.too_long;
        session.sends_mismatched += unsent.mismatched;
        session.sends_backlogged += unsent.backlogged;
        self.record.engine.send_errors += unsent.no_room;
        self.record.engine.receive_errors += receive_errors;
        self.record.engine.setup_datagrams_dropped += setup_dropped;
    }

    /// Returns what was counted since the last swap.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Hands out what was counted since the last swap, and continues with `fresh`.
    pub fn swap_record(&mut self, fresh: Box<Record>) -> Box<Record> {
        std::mem::replace(&mut self.record, fresh)
    }

    pub fn poll_event(&mut self) -> Option<(PeerKey, ShardEvent)> {
        self.events.pop_front()
    }

    pub fn add_peer(&mut self, key: PeerKey, new: NewPeer, now: Time, io: &mut impl Io) {
        if let Some(mut former) = self.peers[key].take() {
            self.gone.extend(former.take_tracks());
            former.end_all_streams(&self.config.roster, &mut self.record);
            former.finish(&self.config.roster, &mut self.record);
            self.former.push(former.outcome(&self.config.roster));
        }
        self.peers[key] = Some(Box::new(PeerConnection::new(key, new, &self.config, now)));
        self.in_setup += 1;
        self.advance_setup(key, now, io);
    }

    /// Closes a peer for good. Its account stays open until [`Shard::finish`].
    pub fn remove_peer(&mut self, key: PeerKey) {
        for track in 0..TRACKS_MAX {
            self.media_timers.set(media_timer(key, track), Time::MAX);
        }
        for kind in [
            ControlTimer::Setup,
            ControlTimer::Rtcp,
            ControlTimer::Repair,
            ControlTimer::Feedback,
            ControlTimer::Probe,
        ] {
            self.control_timers.set(control(key, kind), Time::MAX);
        }
        self.losers.retain(|loser| *loser != key);
        if let Some(peer) = self.peers[key].as_mut() {
            self.in_setup -= usize::from(peer.is_in_setup());
            peer.end_streams_of_leaver(&self.config.roster, &mut self.record);
            self.gone.extend(peer.take_tracks());
            peer.close();
            self.taps
                .extend(peer.tap.take().map(|tap| (peer.participant, tap)));
        }
    }

    /// Adds another socket or connection of the peer. `end` is our end of it.
    pub fn add_near_end(&mut self, key: PeerKey, end: NearEnd, now: Time, io: &mut impl Io) {
        if let Some(peer) = self.peers[key].as_mut() {
            peer.transport.add_near_end(end, now);
            self.advance_setup(key, now, io);
        }
    }

    /// Handles the end of a connection that carried, or might have carried, the peer's datagrams.
    /// With `is_last` no other is left.
    pub fn handle_path_end(
        &mut self,
        key: PeerKey,
        via: Via,
        is_last: bool,
        now: Time,
        io: &mut impl Io,
    ) {
        if let Some(peer) = self.peers[key].as_mut() {
            peer.transport.handle_path_end(via, is_last, now);
            self.advance_setup(key, now, io);
        }
    }

    pub fn handle_command(&mut self, command: ShardCommand, now: Time, io: &mut impl Io) {
        match command {
            ShardCommand::AddRemoteCandidate { key, address } => {
                self.add_remote_candidate(key, address, now, io)
            }
            ShardCommand::RestartIce {
                key,
                local,
                remote,
                remote_candidates,
                by_relays,
            } => {
                self.restart_ice(key, (&local, &remote), by_relays, now);
                self.begin_checks_again(key, remote_candidates, now, io);
            }
            ShardCommand::StopPublishing => self.stop_publishing(now),
            ShardCommand::Record { participant, tap } => self.taps.push((participant, tap)),
            ShardCommand::AddPeer { .. }
            | ShardCommand::AddPath { .. }
            | ShardCommand::BindChannel { .. }
            | ShardCommand::TellRelay { .. }
            | ShardCommand::RemovePeer { .. }
            | ShardCommand::Report
            | ShardCommand::Survey
            | ShardCommand::Stop => {
                unreachable!("the worker handles these")
            }
            ShardCommand::Publish { key, tracks } => self.publish(key, tracks, now),
            ShardCommand::Subscribe { key, streams } => self.subscribe(key, streams, now),
            ShardCommand::Unsubscribe { key, ssrcs } => self.unsubscribe(key, &ssrcs),
            ShardCommand::SetLayers { key, track, layers } => {
                self.set_layers(key, track, layers, now)
            }
            ShardCommand::SetMuted { key, track, muted } => self.set_muted(key, track, muted, now),
            ShardCommand::Watch {
                key,
                ssrc,
                layer,
                at,
            } => {
                if let Some(peer) = self.peers[key].as_mut() {
                    peer.watch(ssrc, layer, at, &self.config.roster);
                }
            }
            ShardCommand::SetPaused {
                key,
                ssrc,
                paused,
                at,
            } => {
                if let Some(peer) = self.peers[key].as_mut() {
                    peer.set_paused(ssrc, paused, at, &mut self.record);
                }
            }
            ShardCommand::Leave { key } => self.leave(key, now),
            ShardCommand::LoseTrack { key, track } => self.lose_track(key, track),
        }
    }

    fn add_remote_candidate(
        &mut self,
        key: PeerKey,
        address: SocketAddr,
        now: Time,
        io: &mut impl Io,
    ) {
        if let Some(peer) = self.peers[key].as_mut() {
            peer.transport.add_remote_candidate(address, now);
            self.advance_setup(key, now, io);
        }
    }

    fn set_layers(&mut self, key: PeerKey, track: u8, layers: u8, now: Time) {
        self.change_tracks(key, track, |layer| {
            layer.set_watched(layers >> layer.identity().layer & 1 == 1, now)
        });
    }

    fn restart_ice(
        &mut self,
        key: PeerKey,
        (local, remote): (&IceCredentials, &IceCredentials),
        by_relays: bool,
        now: Time,
    ) {
        if let Some(peer) = self.peers[key].as_mut() {
            peer.transport.restart_ice(local, remote, now);
            if by_relays {
                peer.transport.keep_to_relays();
            }
        }
    }

    fn begin_checks_again(
        &mut self,
        key: PeerKey,
        remote_candidates: Vec<SocketAddr>,
        now: Time,
        io: &mut impl Io,
    ) {
        let Some(peer) = self.peers[key].as_mut() else {
            return;
        };
        for address in remote_candidates {
            peer.transport.add_remote_candidate(address, now);
        }
        io.disconnect(key);
        let restarted = ShardEvent::IceRestarted { key };
        self.events.push_back((key, restarted));
        self.advance_setup(key, now, io);
    }

    fn set_muted(&mut self, key: PeerKey, track: u8, muted: bool, now: Time) {
        if let Some(peer) = &self.peers[key] {
            let publisher = peer.participant;
            let roster = &self.config.roster;
            roster.set_muted(Origin { publisher, track }, muted);
        }
        self.change_tracks(key, track, |layer| layer.set_muted(muted, now));
    }

    fn leave(&mut self, key: PeerKey, now: Time) {
        self.pass_unsent(now);
        if let Some(peer) = self.peers[key].as_mut() {
            peer.leave(&self.config.roster, &mut self.record, now);
            let leaver = peer.participant;
            self.gone
                .retain(|track| track.identity().origin.publisher != leaver);
        }
    }

    fn publish(&mut self, key: PeerKey, tracks: Vec<SendParameters>, now: Time) {
        for parameters in &tracks {
            self.end_gone(&parameters.identity, parameters.first_frame_at);
        }
        let Some(peer) = self.peers[key].as_mut() else {
            return;
        };
        for parameters in tracks.into_iter().take(TRACKS_MAX as usize) {
            let timer = media_timer(key, peer.tracks.len() as u32);
            let (kind, interval) = (parameters.source.kind(), parameters.source.frame_interval());
            let first_frame_at = parameters.first_frame_at;
            // With an impossible payload type or extension id the track stays silent, and is
            // missed.
            let FrameIdentity { origin, layer, .. } = parameters.identity;
            let sent_before = self.config.roster.frames(origin, layer);
            let Ok(mut track) = SendTrack::new(parameters) else {
                self.record.session.packets_rejected += 1;
                continue;
            };
            // A track that came back continues the frame numbers, so that a subscriber of the
            // earlier track finds none twice and none missing.
            track.number_from(sent_before);
            self.media_timers.set(timer, track.next_at());
            self.config
                .roster
                .set_published(track.identity(), first_frame_at, interval);
            // A track is counted once, however many layers it has.
            self.record.media(kind).tracks_published +=
                u64::from(sent_before == 0 && track.identity().layer == 0);
            peer.add_track(track, now, &mut self.record);
        }
        self.follow_allocation(key);
    }

    /// Changes every layer of one track of a peer, and updates when each is due.
    fn change_tracks(&mut self, key: PeerKey, number: u8, change: impl Fn(&mut SendTrack)) {
        let Some(peer) = self.peers[key].as_mut().filter(|peer| !peer.is_closed()) else {
            return;
        };
        for (timer, track) in (media_timer(key, 0)..).zip(&mut peer.tracks) {
            if track.identity().origin.track == number {
                change(track);
                self.media_timers.set(timer, track.next_at());
            }
        }
    }

    fn subscribe(&mut self, key: PeerKey, streams: Vec<StreamParameters>, now: Time) {
        let Some(peer) = self.peers[key].as_mut() else {
            return;
        };
        streams
            .into_iter()
            .for_each(|parameters| peer.add_stream(parameters));
        if let Some(at) = self
            .taps
            .iter()
            .position(|(participant, _)| *participant == peer.participant)
        {
            let (_, mut tap) = self.taps.swap_remove(at);
            tap.begin_connection();
            peer.tap = Some(tap);
        }
        peer.repair_at = now + KEY_FRAME_CHECK;
        self.control_timers
            .set(control(key, ControlTimer::Repair), peer.repair_at);
        self.take_early(key);
    }

    /// Handles the media again that could not be read when it arrived.
    fn take_early(&mut self, key: PeerKey) {
        let Some(peer) = self.peers[key].as_mut() else {
            return;
        };
        for mut early in peer.take_early() {
            self.take_rtp(key, &mut early.datagram, early.arrival);
        }
    }

    fn lose_track(&mut self, key: PeerKey, track: u8) {
        self.change_tracks(key, track, SendTrack::lose);
        self.losers.push(key);
    }

    fn stop_publishing(&mut self, now: Time) {
        self.pass_unsent(now);
        self.gone.clear();
        for peer in self.peers.iter_mut() {
            peer.tracks.iter_mut().for_each(SendTrack::stop);
            peer.settle(&self.config.roster, &mut self.record, now);
        }
    }

    fn unsubscribe(&mut self, key: PeerKey, ssrcs: &[Ssrc]) {
        if let Some(peer) = self.peers[key].as_mut() {
            peer.withdraw_streams(ssrcs, &self.config.roster, &mut self.record);
        }
    }

    /// Passes the due slots of sources that are gone although the plan means them to send.
    #[inline]
    fn pass_unsent(&mut self, now: Time) {
        if !(self.gone.is_empty() && self.losers.is_empty()) {
            self.pass_slots_of_gone(now);
        }
    }

    fn pass_slots_of_gone(&mut self, now: Time) {
        let now = now + Duration::from_nanos(1);
        let roster = &self.config.roster;
        for track in &mut self.gone {
            let unsent = track.pass_unsent(now);
            roster.add_unsent(track.identity(), unsent);
        }
        for key in &self.losers {
            let tracks = self.peers[*key]
                .iter_mut()
                .flat_map(|peer| &mut peer.tracks);
            for track in tracks.filter(|track| track.is_lost()) {
                let unsent = track.pass_unsent(now);
                roster.add_unsent(track.identity(), unsent);
            }
        }
    }

    /// Handles a source that sends again from `from` on: counts the frames that it left unsent
    /// until then, and removes it from the sources that are gone.
    fn end_gone(&mut self, identity: &FrameIdentity, from: Time) {
        let is_same = |track: &SendTrack| {
            let other = track.identity();
            (other.origin, other.layer) == (identity.origin, identity.layer)
        };
        for track in self.gone.iter_mut().filter(|track| is_same(track)) {
            let unsent = track.pass_unsent(from);
            self.config.roster.add_unsent(identity, unsent);
        }
        self.gone.retain(|track| !is_same(track));
    }

    /// Counts a packet that no parser took.
    pub fn reject(&mut self) {
        self.record.session.packets_rejected += 1;
    }

    /// Handles a STUN or DTLS datagram. `arrival` is the time at which it arrived, and `now` the
    /// time at which it is handled, because set-up work may have waited.
    pub fn handle_setup_datagram(
        &mut self,
        key: PeerKey,
        datagram: &[u8],
        from: impl Into<FarEnd>,
        arrival: Time,
        now: Time,
        io: &mut impl Io,
    ) {
        let Some(peer) = self.peers[key].as_mut() else {
            return;
        };
        self.record.session.wire_bytes_received += datagram.len() as u64;
        if !peer
            .transport
            .handle_setup_datagram(datagram, from, arrival)
        {
            self.record.session.packets_rejected += 1;
        }
        if let Some(rtt) = peer.transport.poll_stun_rtt() {
            peer.handle_stun_rtt(rtt);
            self.record.session.rtt_stun.record(rtt);
        }
        self.advance_setup(key, now, io);
    }

    /// Drives ICE and DTLS as far as possible, and sets their next timer.
    fn advance_setup(&mut self, key: PeerKey, now: Time, io: &mut impl Io) {
        let Some(peer) = self.peers[key].as_mut().filter(|peer| !peer.is_closed()) else {
            return;
        };
        peer.transport.handle_timeout(now);
        let mut bytes_sent = 0;
        let mut happened = std::mem::take(&mut self.peer_events);
        peer.transport.poll_by(
            now,
            |datagram, to| {
                bytes_sent += datagram.len() as u64;
                io.lend()[..datagram.len()].copy_from_slice(datagram);
                io.send_setup(key, to, datagram.len());
            },
            |event| happened.push(event),
        );
        while peer.transport.poll_data().is_some() {}
        self.record.session.wire_bytes_sent += bytes_sent;
        self.control_timers.set(
            control(key, ControlTimer::Setup),
            peer.transport.next_timeout(),
        );
        for event in happened.drain(..) {
            self.handle_peer_event(key, event, now, io);
        }
        self.peer_events = happened;
    }

    fn handle_peer_event(&mut self, key: PeerKey, event: PeerEvent, now: Time, io: &mut impl Io) {
        let Some(peer) = self.peers[key].as_mut() else {
            return;
        };
        match event {
            PeerEvent::Nominated(end) => {
                peer.nominated_at = now;
                io.nominate(key, end);
                if peer.transport.connected_at().is_some() {
                    let via = end.via;
                    self.events.push_back((key, ShardEvent::Moved { key, via }));
                }
            }
            PeerEvent::Connected => {
                self.in_setup -= 1;
                // Spread over the interval, so that a wave of joins does not cause a wave of
                // reports in every interval that follows.
                let phase = Duration::from_millis(u64::from(peer.participant) * 37 % 200 + 100);
                self.control_timers
                    .set(control(key, ControlTimer::Rtcp), now + phase);
                let (ice_at, via) = (peer.transport.nominated_at(), peer.transport.via());
                let at = now;
                self.events.push_back((
                    key,
                    ShardEvent::Connected {
                        key,
                        ice_at,
                        at,
                        via,
                    },
                ));
                self.take_early(key);
            }
            PeerEvent::Failed(failure) => {
                self.tell_lone_ice(key);
                let Some(peer) = self.peers[key].as_mut() else {
                    return;
                };
                self.in_setup -= usize::from(peer.is_in_setup());
                peer.failed = true;
                self.control_timers
                    .set(control(key, ControlTimer::Setup), Time::MAX);
                self.events
                    .push_back((key, ShardEvent::Failed { key, failure }));
            }
        }
    }

    /// Reports an ICE path on which DTLS is late. If both come together, one event reports both.
    fn tell_lone_ice(&mut self, key: PeerKey) {
        let waiting = self.peers[key]
            .as_mut()
            .filter(|peer| peer.is_in_setup() && !peer.ice_told);
        if let Some((peer, at)) =
            waiting.and_then(|peer| peer.transport.nominated_at().map(|at| (peer, at)))
        {
            peer.ice_told = true;
            self.events
                .push_back((key, ShardEvent::IceConnected { key, at }));
        }
    }

    /// Handles one RTP datagram, which is opened in place.
    pub fn handle_rtp(&mut self, key: PeerKey, datagram: &mut [u8], arrival: Time) {
        if self.peers[key].is_none() {
            return;
        }
        self.record.session.wire_bytes_received += datagram.len() as u64;
        self.record.engine.packets_processed += 1;
        self.take_rtp(key, datagram, arrival);
    }

    fn take_rtp(&mut self, key: PeerKey, datagram: &mut [u8], arrival: Time) {
        let Some(peer) = self.peers[key].as_mut() else {
            return;
        };
        let Some(wanted) = peer.handle_rtp(
            datagram,
            arrival,
            &self.config,
            &mut self.record,
            &mut self.frame_events,
        ) else {
            self.record.session.packets_rejected += 1;
            return;
        };
        if !peer.saw_media {
            peer.saw_media = true;
            self.events
                .push_back((key, ShardEvent::FirstMedia { key, at: arrival }));
        }
        if wanted.nack_at < peer.repair_at {
            peer.repair_at = wanted.nack_at;
            self.control_timers
                .set(control(key, ControlTimer::Repair), wanted.nack_at);
        }
        if wanted.feedback_at < peer.feedback_timer_at() {
            peer.set_feedback_timer(wanted.feedback_at);
            self.control_timers
                .set(control(key, ControlTimer::Feedback), wanted.feedback_at);
        }
    }

    /// Handles one RTCP datagram: a compound packet, which is opened in place.
    pub fn handle_rtcp(
        &mut self,
        key: PeerKey,
        datagram: &mut [u8],
        arrival: Time,
        now: Time,
        io: &mut impl Io,
    ) {
        let Some(peer) = self.peers[key].as_mut() else {
            return;
        };
        self.record.session.wire_bytes_received += datagram.len() as u64;
        let opened = peer
            .transport
            .opener()
            .and_then(|opener| opener.open_rtcp(datagram).ok());
        let Some(len) = opened else {
            self.record.session.packets_rejected += 1;
            return;
        };
        for packet in rtcp::packets(&datagram[..len]) {
            match packet {
                Ok(packet) => {
                    let mut around = ConnectionContext {
                        config: &self.config,
                        record: &mut self.record,
                        io,
                        now,
                    };
                    peer.handle_rtcp_packet(&packet, arrival, &mut around);
                }
                Err(_) => self.record.session.packets_rejected += 1,
            }
        }
        self.follow_allocation(key);
    }

    /// Updates the times at which tracks and probes are due, after a connection has learnt
    /// something about its path.
    fn follow_allocation(&mut self, key: PeerKey) {
        let Some(peer) = self.peers[key].as_mut().filter(|peer| !peer.is_closed()) else {
            return;
        };
        if peer.take_tracks_changed() {
            for (timer, track) in (media_timer(key, 0)..).zip(&peer.tracks) {
                self.media_timers.set(timer, track.next_at());
            }
        }
        let probe_at = peer.probe_at();
        if probe_at != Time::MAX {
            self.control_timers
                .set(control(key, ControlTimer::Probe), probe_at);
        }
    }

    fn send_probe(&mut self, key: PeerKey, now: Time, io: &mut impl Io) {
        let Some(peer) = self.peers[key].as_mut() else {
            return;
        };
        let next_at = peer.send_probe(&mut ConnectionContext {
            config: &self.config,
            record: &mut self.record,
            io,
            now,
        });
        self.control_timers
            .set(control(key, ControlTimer::Probe), next_at);
    }

    /// Whether media may be due by `time`, a few milliseconds ahead, or a connection is being set
    /// up. Every step of the set-up should be prompt.
    pub fn is_waited_for_by(&self, time: Time) -> bool {
        self.in_setup > 0 || self.media_timers.any_by(time)
    }

    /// Prefetches what every datagram of a peer needs.
    pub fn prefetch(&self, key: PeerKey) {
        if let Some(peer) = &self.peers[key] {
            peer.prefetch();
        }
    }

    /// Prefetches what the data of [`Shard::prefetch`] points to. Call it after that data has
    /// arrived.
    pub fn prefetch_streams(&self, key: PeerKey) {
        if let Some(peer) = &self.peers[key] {
            peer.prefetch_streams();
        }
    }

    /// Prefetches what the data of [`Shard::prefetch_streams`] points to. Call it after that data
    /// has arrived.
    pub fn prefetch_next(&self, key: PeerKey) {
        if let Some(peer) = &self.peers[key] {
            peer.prefetch_next();
        }
    }

    /// Prefetches what every turn of a peer's tracks needs.
    fn prefetch_sender(&self, timer: u32) {
        let (key, _) = timed_track(timer);
        if let Some(peer) = &self.peers[key] {
            peer.prefetch_for_sending();
        }
    }

    /// Prefetches what the data of [`Shard::prefetch_sender`] points to. Call it after that data
    /// has arrived.
    fn prefetch_track(&self, timer: u32) {
        let (key, track) = timed_track(timer);
        if let Some(peer) = &self.peers[key] {
            peer.prefetch_track(track);
        }
    }

    /// Sends the media that is due.
    pub fn handle_media_timers(&mut self, now: Time, io: &mut impl Io) {
        self.pass_unsent(now);
        while let Some(timer) = self.media_timers.pop_due(now) {
            let [next, after] = self.media_timers.upcoming();
            next.into_iter()
                .for_each(|timer| self.prefetch_track(timer));
            after
                .into_iter()
                .for_each(|timer| self.prefetch_sender(timer));
            let (key, track) = timed_track(timer);
            let Some(peer) = self.peers[key].as_mut() else {
                continue;
            };
            let next_at = peer.send_due(
                track,
                &mut ConnectionContext {
                    config: &self.config,
                    record: &mut self.record,
                    io,
                    now,
                },
            );
            self.media_timers.set(timer, next_at);
        }
    }

    /// Sends the reports, NACKs, PLIs and keep-alives that are due.
    pub fn handle_control_timers(&mut self, now: Time, io: &mut impl Io) {
        while let Some(timer) = self.control_timers.pop_due(now) {
            let key = PeerKey((timer / CONTROLS) as usize);
            match timer % CONTROLS {
                kind if kind == ControlTimer::Setup as u32 => {
                    self.advance_setup(key, now, io);
                    self.tell_lone_ice(key);
                }
                kind if kind == ControlTimer::Rtcp as u32 => self.send_reports(key, now, io),
                kind if kind == ControlTimer::Feedback as u32 => self.send_feedback(key, now, io),
                kind if kind == ControlTimer::Probe as u32 => self.send_probe(key, now, io),
                _ => self.repair(key, now, io),
            }
        }
    }

    fn send_reports(&mut self, key: PeerKey, now: Time, io: &mut impl Io) {
        let Some(peer) = self.peers[key].as_mut() else {
            return;
        };
        peer.account(&self.config.roster, &mut self.record);
        peer.count_estimate(now, &mut self.record);
        if now.since(peer.nominated_at) >= PATH_SETTLES_AFTER {
            io.settle(key);
        }
        peer.send_reports(&mut ConnectionContext {
            config: &self.config,
            record: &mut self.record,
            io,
            now,
        });
        self.control_timers
            .set(control(key, ControlTimer::Rtcp), now + RTCP_INTERVAL);
    }

    fn send_feedback(&mut self, key: PeerKey, now: Time, io: &mut impl Io) {
        let Some(peer) = self.peers[key].as_mut() else {
            return;
        };
        let next_at = peer.send_feedback(&mut ConnectionContext {
            config: &self.config,
            record: &mut self.record,
            io,
            now,
        });
        self.control_timers
            .set(control(key, ControlTimer::Feedback), next_at);
    }

    fn repair(&mut self, key: PeerKey, now: Time, io: &mut impl Io) {
        let Some(peer) = self.peers[key].as_mut() else {
            return;
        };
        peer.repair_at = peer.repair(&mut ConnectionContext {
            config: &self.config,
            record: &mut self.record,
            io,
            now,
        });
        self.control_timers
            .set(control(key, ControlTimer::Repair), peer.repair_at);
    }

    /// Updates the record with what every stream has counted. Each stream does so by itself once a
    /// second.
    pub fn account(&mut self) {
        for peer in self.peers.iter_mut() {
            peer.account(&self.config.roster, &mut self.record);
        }
    }

    /// Returns the outcomes of connections whose participants have returned on other connections,
    /// since the last call.
    pub fn take_former(&mut self) -> Vec<PeerOutcome> {
        std::mem::take(&mut self.former)
    }

    /// Returns the outcome of every present peer, and updates the record with it. Then every stream
    /// is marked.
    pub fn survey(&mut self) -> Vec<PeerOutcome> {
        let roster = &self.config.roster;
        let mut outcomes = Vec::new();
        for peer in self.peers.iter_mut() {
            peer.account(roster, &mut self.record);
            outcomes.push(peer.outcome(roster));
            peer.mark(roster);
        }
        outcomes
    }

    /// Settles all accounts at the end of the run.
    pub fn finish(&mut self) -> Vec<PeerOutcome> {
        let never_announced: usize = self
            .peers
            .iter_mut()
            .map(|peer| peer.take_early().len())
            .sum();
        self.record.session.packets_rejected += never_announced as u64;
        for peer in self.peers.iter_mut() {
            peer.finish(&self.config.roster, &mut self.record);
        }
        let mut outcomes = std::mem::take(&mut self.former);
        outcomes.extend(
            self.peers
                .iter()
                .map(|peer| peer.outcome(&self.config.roster)),
        );
        outcomes
    }
}
