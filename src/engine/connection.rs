//! One peer connection: its tracks, its streams, and the RTCP between them and the server.

use crate::transport::rtp::Ssrc;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use super::feedback::{Feedback, Sent};
use super::publisher::{SendTrack, TrackWire};
use super::sending::{LayerState, Sending, layers_to_hold_back, wanted_bps};
use super::subscriber::{RecvStream, RefusedPacket, StreamContext};
use super::{Io, LAYERS_MAX, NewPeer, PeerKey, PeerOutcome, Roster, ShardConfig, StreamParameters};
use crate::measure::{Kind, Record};
use crate::media::assemble::FrameEvent;
use crate::net;
use crate::recording::Tap;
use crate::transport::peer::Peer;
use crate::transport::receive::{MISSING_MAX, NACK_SEQS_MAX, RoundTrip};
use crate::transport::reports::{NACKED_MAX, REPORT_BLOCKS_MAX, seal_compound};
use crate::transport::rtcp::{
    DlrrBlock, ReportBlock, RtcpPacket, RtcpWriter, SenderInfo, WriteError, dlsr_units,
    rtt_from_report,
};
use crate::transport::rtp::Header;
use crate::transport::sequence::Seq;
use crate::transport::srtp::Sealer;
use crate::units::{Bitrate, Time, ntp_middle};

/// Interval at which a stream that waits for a key frame is checked again.
pub const KEY_FRAME_CHECK: Duration = Duration::from_millis(100);
/// Round-trip time assumed until one has been measured.
const RTT_UNKNOWN: Duration = Duration::from_millis(100);

/// Number of streams to prefetch for a connection whose turn comes.
const PREFETCHED_STREAMS: usize = 2;

/// Maximum number of packets kept for streams that are not announced yet: a few ms of media of all
/// streams of a large room.
const EARLY_PACKETS_MAX: usize = 128;
/// Maximum age of a kept packet. An answer arrives no more than a few ms after the media. A packet
/// that waits longer belongs to no stream.
const EARLY_AGE_MAX: Duration = Duration::from_secs(1);

/// Surroundings that a connection needs for one call.
pub struct ConnectionContext<'a, I> {
    pub config: &'a ShardConfig,
    pub record: &'a mut Record,
    pub io: &'a mut I,
    pub now: Time,
}

/// One peer connection of one participant.
pub struct PeerConnection {
    pub transport: Peer,
    pub tracks: Vec<SendTrack>,
    /// Time at which the repair timer is due.
    pub repair_at: Time,
    pub saw_media: bool,
    pub failed: bool,
    /// When ICE nominated the present path.
    pub nominated_at: Time,
    /// Whether signalling has been told that ICE has found a path.
    pub ice_told: bool,
    rtt_stun: Option<Duration>,
    /// The shortest round-trip time measured by any means.
    rtt_least: Option<Duration>,
    /// Set if this connection's media is recorded.
    pub tap: Option<Box<Tap>>,
    streams: Vec<RecvStream>,
    /// `(ssrc, stream, is_rtx)`, sorted by SSRC.
    ssrcs: Vec<(Ssrc, u32, bool)>,
    key: PeerKey,
    pub participant: u32,
    room: u32,
    rtcp_ssrc: Ssrc,
    cname: String,
    intended_at: Time,
    rtt_rtcp: Option<Duration>,
    /// The server's reference time, to be answered with a DLRR (RFC 3611, section 4.5).
    reference_time: Option<ReferenceTime>,
    closed: bool,
    /// The plan has the participant leave.
    leaves: bool,
    /// Number of live streams at the last check for streams that replace others.
    streams_live: usize,
    early: VecDeque<EarlyPacket>,
    /// Present if a kind of feedback was agreed on.
    feedback: Option<Box<Feedback>>,
    /// Present if our packets carry transport-wide sequence numbers.
    sending: Option<Box<Sending>>,
    obeys_bandwidth: bool,
    /// Set when the times at which tracks are due may have changed.
    tracks_changed: bool,
}

/// A packet whose SSRC no description has named yet, or whose keys are not known yet. If the offers
/// are ours, the server sends media as soon as it has written its answer and finished its side of
/// the DTLS handshake.
pub struct EarlyPacket {
    pub arrival: Time,
    pub datagram: Box<[u8]>,
}

/// Times at which the RTCP caused by a packet should be sent.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    pub nack_at: Time,
    pub feedback_at: Time,
}

impl Wanted {
    const NOTHING: Wanted = Wanted {
        nack_at: Time::MAX,
        feedback_at: Time::MAX,
    };
}

#[derive(Clone, Copy)]
struct ReferenceTime {
    ssrc: Ssrc,
    ntp_middle: u32,
    arrival: Time,
}

impl PeerConnection {
    pub fn new(key: PeerKey, new: NewPeer, config: &ShardConfig, now: Time) -> PeerConnection {
        let mut transport = Peer::new(&config.identity, &new.parameters, config.epoch, now);
        if let Some(role) = new.data {
            transport.serve_data(role);
        }
        PeerConnection {
            transport,
            tracks: Vec::new(),
            repair_at: Time::MAX,
            saw_media: false,
            failed: false,
            nominated_at: now,
            ice_told: false,
            rtt_stun: None,
            rtt_least: None,
            tap: None,
            streams: Vec::new(),
            ssrcs: Vec::new(),
            key,
            participant: new.participant,
            room: new.room,
            rtcp_ssrc: new.rtcp_ssrc,
            cname: new.cname,
            intended_at: new.intended_at,
            rtt_rtcp: None,
            reference_time: None,
            closed: false,
            leaves: false,
            streams_live: 0,
            early: VecDeque::new(),
            feedback: None,
            sending: None,
            obeys_bandwidth: new.obeys_bandwidth,
            tracks_changed: false,
        }
    }

    /// Adds an expected stream. A stream that is already expected keeps its state; only a
    /// retransmission SSRC that it did not have is added.
    pub fn add_stream(&mut self, parameters: StreamParameters) {
        let known = self.find_stream(parameters.ssrc).map(|(at, _)| at);
        let at = known.unwrap_or(self.streams.len());
        let new_rtx = parameters
            .rtx_ssrc
            .filter(|rtx| self.find_stream(*rtx).is_none());
        self.ssrcs.extend(new_rtx.map(|rtx| (rtx, at as u32, true)));
        Feedback::add_stream(&mut self.feedback, &parameters);
        if known.is_none() {
            self.ssrcs.push((parameters.ssrc, at as u32, false));
            self.streams.push(RecvStream::new(parameters));
        }
        self.ssrcs.sort_unstable();
        self.note_send_rate();
    }

    /// Adds a track to send.
    pub fn add_track(&mut self, track: SendTrack, now: Time, record: &mut Record) {
        if track.has_transport_seq() && self.sending.is_none() {
            self.sending = Some(Box::new(Sending::new(self.obeys_bandwidth, now)));
        }
        self.tracks.push(track);
        self.note_send_rate();
        self.allocate(now, record);
    }

    fn note_send_rate(&mut self) {
        if let Some(feedback) = &mut self.feedback {
            feedback.set_send_rate(self.tracks.iter().map(|track| track.bitrate().bps()).sum());
        }
    }

    /// Marks these streams as withdrawn by the server.
    pub fn withdraw_streams(&mut self, ssrcs: &[Ssrc], roster: &Roster, record: &mut Record) {
        for stream in self
            .streams
            .iter_mut()
            .filter(|stream| ssrcs.contains(&stream.ssrc()))
        {
            stream.withdraw(roster, record);
        }
        self.ssrcs
            .retain(|(_, at, _)| !self.streams[*at as usize].has_ended());
    }

    /// Notes that the plan has the participant leave. From now on nothing more is owed to its
    /// streams. Packets under way may still arrive.
    pub fn leave(&mut self, roster: &Roster, record: &mut Record, now: Time) {
        self.leaves = true;
        self.streams
            .iter_mut()
            .for_each(|stream| stream.leave(roster, record, now));
    }

    pub fn end_streams_of_leaver(&mut self, roster: &Roster, record: &mut Record) {
        self.streams
            .iter_mut()
            .for_each(|stream| stream.end_if_leaving(roster, record));
    }

    pub fn mark(&mut self, roster: &Roster) {
        self.streams
            .iter_mut()
            .for_each(|stream| stream.mark(roster));
    }

    pub fn end_all_streams(&mut self, roster: &Roster, record: &mut Record) {
        self.streams
            .iter_mut()
            .for_each(|stream| stream.end(roster, record));
    }

    /// Whether the connection is neither up, nor failed, nor closed.
    pub fn is_in_setup(&self) -> bool {
        self.transport.connected_at().is_none() && !self.failed && !self.closed
    }

    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Prefetches what every packet needs. [`PeerConnection::prefetch_streams`] and then
    /// [`PeerConnection::prefetch_next`] prefetch what that memory points to. Call each one after
    /// the data of the one before has arrived.
    pub fn prefetch(&self) {
        self.transport.prefetch_opener();
        net::prefetch(&self.streams, usize::MAX);
        net::prefetch(&self.ssrcs, usize::MAX);
        net::prefetch(&self.feedback, usize::MAX);
        net::prefetch(&self.repair_at, usize::MAX);
        net::prefetch(&self.intended_at, usize::MAX);
    }

    /// Prefetches the first streams. Most subscribers have only one or two; with many streams it is
    /// not known which one comes next.
    pub fn prefetch_streams(&self) {
        if let Some(ssrc) = self.ssrcs.first() {
            net::prefetch(ssrc, usize::MAX);
        }
        if let Some(feedback) = self.feedback.as_deref() {
            feedback.prefetch();
        }
        self.streams
            .iter()
            .take(PREFETCHED_STREAMS)
            .for_each(RecvStream::prefetch);
    }

    pub fn prefetch_next(&self) {
        if let Some(feedback) = self.feedback.as_deref() {
            feedback.prefetch_next();
        }
        self.streams
            .iter()
            .take(PREFETCHED_STREAMS)
            .for_each(RecvStream::prefetch_next);
    }

    /// Prefetches what every turn of a track needs. [`PeerConnection::prefetch_track`] prefetches
    /// what that memory points to.
    pub fn prefetch_for_sending(&self) {
        self.transport.prefetch_sending();
        net::prefetch(&self.tracks, usize::MAX);
        net::prefetch(&self.sending, usize::MAX);
        net::prefetch(&self.key, usize::MAX);
    }

    pub fn prefetch_track(&self, track: usize) {
        if let Some(track) = self.tracks.get(track) {
            track.prefetch();
        }
    }

    /// Closes the connection. Nothing is sent or received any more. Its streams keep expecting what
    /// they ought to have received, because the participant is missing it.
    pub fn close(&mut self) {
        self.closed = true;
    }

    /// Takes the tracks of a connection that is gone. If the plan had the participant leave, its
    /// tracks owe nothing and none is returned.
    pub fn take_tracks(&mut self) -> Vec<SendTrack> {
        let mut tracks = std::mem::take(&mut self.tracks);
        tracks.iter_mut().for_each(SendTrack::lose);
        tracks.retain(|_| !self.leaves);
        tracks
    }

    /// Settles the streams when the publishers stop. A picture that stands still at this moment is
    /// a freeze, although no frame will end it.
    pub fn settle(&mut self, roster: &Roster, record: &mut Record, now: Time) {
        self.streams
            .iter_mut()
            .for_each(|stream| stream.settle(roster, record, now));
    }

    /// Notes that at `at` the server was asked for another layer of a stream, or for none.
    pub fn watch(&mut self, ssrc: Ssrc, layer: Option<u8>, at: Time, roster: &Roster) {
        if let Some((stream, false)) = self.find_stream(ssrc) {
            self.streams[stream].watch(layer, at, roster);
        }
    }

    /// Notes that since `at` the server pauses a stream, or sends it again.
    pub fn set_paused(&mut self, ssrc: Ssrc, paused: bool, at: Time, record: &mut Record) {
        if let Some((stream, false)) = self.find_stream(ssrc) {
            self.streams[stream].set_paused(paused, at, record);
        }
    }

    /// Returns the stream of an SSRC, and whether the SSRC is the stream's retransmission SSRC.
    fn find_stream(&self, ssrc: Ssrc) -> Option<(usize, bool)> {
        let at = self.ssrcs.partition_point(|(known, ..)| *known < ssrc);
        let (known, stream, is_rtx) = *self.ssrcs.get(at)?;
        (known == ssrc).then_some((stream as usize, is_rtx))
    }

    /// Handles one RTP datagram. Returns `None` if it could not be parsed.
    pub fn handle_rtp(
        &mut self,
        datagram: &mut [u8],
        arrival: Time,
        config: &ShardConfig,
        record: &mut Record,
        events: &mut Vec<FrameEvent>,
    ) -> Option<Wanted> {
        let header = Header::parse(datagram)?;
        let stream = self.find_stream(header.ssrc);
        let (Some((at, is_rtx)), Some(opener)) = (stream, self.transport.opener()) else {
            if let Some(feedback) = &mut self.feedback {
                feedback.handle_early_packet(&header, datagram, arrival);
            }
            return self
                .keep_early(datagram, arrival, record)
                .then_some(Wanted::NOTHING);
        };
        let mut context = StreamContext {
            roster: &config.roster,
            epoch: config.epoch,
            record,
            room: self.room,
            intended_at: self.intended_at,
            tap: self.tap.as_deref_mut().map(|tap| (tap, at as u32)),
            events,
        };
        let stream = &mut self.streams[at];
        match stream.handle_rtp(datagram, &header, is_rtx, opener, arrival, &mut context) {
            Ok(()) => {
                let feedback = self.feedback.as_mut();
                Some(Wanted {
                    nack_at: stream.next_nack_at(),
                    feedback_at: feedback.map_or(Time::MAX, |feedback| {
                        feedback.handle_packet(&header, datagram, stream.ssrc(), arrival)
                    }),
                })
            }
            Err(RefusedPacket::Replayed) => {
                record.media(stream.kind()).packets_duplicate += 1;
                Some(Wanted {
                    nack_at: stream.next_nack_at(),
                    ..Wanted::NOTHING
                })
            }
            Err(RefusedPacket::Broken) => None,
        }
    }

    /// Keeps a packet until it can be read. Returns false if too many packets wait.
    fn keep_early(&mut self, datagram: &[u8], arrival: Time, record: &mut Record) -> bool {
        while self
            .early
            .front()
            .is_some_and(|packet| arrival.since(packet.arrival) > EARLY_AGE_MAX)
        {
            self.early.pop_front();
            record.session.packets_rejected += 1;
        }
        if self.early.len() == EARLY_PACKETS_MAX {
            return false;
        }
        self.early.push_back(EarlyPacket {
            arrival,
            datagram: datagram.into(),
        });
        true
    }

    /// Takes the packets that could not be read when they arrived. The caller handles them again
    /// when that may have changed, or gives them up.
    pub fn take_early(&mut self) -> VecDeque<EarlyPacket> {
        std::mem::take(&mut self.early)
    }

    /// Sends what is due on one track. Returns the time at which it is due again.
    pub fn send_due<I: Io>(&mut self, track: usize, around: &mut ConnectionContext<'_, I>) -> Time {
        let now = around.now;
        let (Some(to), Some(sealer)) = (self.transport.remote(), self.transport.sealer()) else {
            return Time::MAX;
        };
        let (place, sending) = (track, self.sending.as_deref_mut());
        let Some(track) = self.tracks.get_mut(track) else {
            return Time::MAX;
        };
        let turn = track.handle_timeout(
            now,
            &mut wire(self.key, to, sealer, (track.kind(), place), sending, around),
        );
        let record = &mut *around.record;
        record.engine.send_slots_skipped += turn.slots_skipped;
        if let Some(lag) = turn.send_lag {
            record.engine.send_lag.record(lag);
        }
        turn.next_at
    }

    pub fn handle_rtcp_packet<I: Io>(
        &mut self,
        packet: &RtcpPacket<'_>,
        arrival: Time,
        around: &mut ConnectionContext<'_, I>,
    ) {
        match packet {
            RtcpPacket::SenderReport { sender, reports } => {
                if let Some((at, false)) = self.find_stream(sender.ssrc) {
                    self.streams[at].handle_sender_report(sender.ntp, arrival);
                }
                reports
                    .clone()
                    .for_each(|block| self.handle_report_block(&block, arrival, around));
            }
            RtcpPacket::ReceiverReport { reports, .. } => reports
                .clone()
                .for_each(|block| self.handle_report_block(&block, arrival, around)),
            RtcpPacket::Nack {
                media_ssrc, seqs, ..
            } => self.handle_nack(*media_ssrc, seqs.clone(), around),
            RtcpPacket::Pli { media_ssrc, .. } => {
                self.handle_key_frame_request(*media_ssrc, around)
            }
            RtcpPacket::Fir { entries, .. } => entries
                .clone()
                .for_each(|(ssrc, _)| self.handle_key_frame_request(ssrc, around)),
            RtcpPacket::Xr { ssrc, rrtr, dlrr } => {
                if let Some(ntp) = rrtr {
                    self.reference_time = Some(ReferenceTime {
                        ssrc: *ssrc,
                        ntp_middle: ntp_middle(*ntp),
                        arrival,
                    });
                }
                let ours = self.rtcp_ssrc;
                for block in dlrr.clone().filter(|block| block.ssrc == ours) {
                    self.handle_rtt(block.last_rr, block.delay_since_last_rr, arrival, around);
                }
            }
            RtcpPacket::TransportCc { body, .. } => self.handle_transport_cc(body, around),
            RtcpPacket::Remb { bitrate, .. } => {
                around.record.bandwidth.remb_received += 1;
                if let Some(sending) = &mut self.sending {
                    sending.handle_remb(*bitrate);
                    self.allocate(around.now, around.record);
                }
            }
            RtcpPacket::Sdes { .. } | RtcpPacket::Bye { .. } | RtcpPacket::Unknown { .. } => {}
        }
    }

    fn handle_transport_cc<I: Io>(&mut self, body: &[u8], around: &mut ConnectionContext<'_, I>) {
        let counted = &mut around.record.bandwidth;
        counted.transport_cc_received += 1;
        let rtt = self.rtt_rtcp.or(self.rtt_stun);
        let Some(sending) = &mut self.sending else {
            return;
        };
        if !sending.handle_feedback(body, rtt, around.now, counted) {
            around.record.session.packets_rejected += 1;
        }
        self.allocate(around.now, around.record);
    }

    /// Holds back the layers that do not fit the estimated bandwidth, and probes for more if some
    /// are held back. Does nothing if the connection does not obey the estimate.
    fn allocate(&mut self, now: Time, record: &mut Record) {
        let Some(sending) = &mut self.sending else {
            return;
        };
        let Some(estimate) = sending.estimate() else {
            return;
        };
        let mut layers = [LayerState {
            bps: 0,
            wanted: false,
            held_back: false,
        }; LAYERS_MAX];
        let (mut others, mut count) = (0, 0);
        for track in &self.tracks {
            let bps = track.bitrate().bps();
            match layers.get_mut(count).filter(|_| track.is_simulcast()) {
                Some(layer) => {
                    count += 1;
                    *layer = LayerState {
                        bps,
                        wanted: track.is_wanted(),
                        held_back: track.is_held_back(),
                    };
                }
                // Packets without transport-wide sequence numbers are not in the feedback, and so
                // not in the estimate.
                None if track.is_wanted() && track.has_transport_seq() => others += bps,
                None => {}
            }
        }
        let layers = &layers[..count];
        let hold_back = layers_to_hold_back(layers, estimate.bps().saturating_sub(others));
        let counted = &mut record.bandwidth;
        let mut sent = others;
        for (track, hold_back) in self
            .tracks
            .iter_mut()
            .filter(|track| track.is_simulcast())
            .zip(hold_back)
        {
            let began = track.frames() > 0 && track.is_wanted();
            if track.set_held_back(hold_back, now) {
                self.tracks_changed = true;
                counted.layers_dropped += u64::from(began && hold_back);
                counted.layers_returned += u64::from(began && !hold_back);
            }
            sent += if track.is_wanted() && !hold_back {
                track.bitrate().bps()
            } else {
                0
            };
        }
        let lacks = layers
            .iter()
            .zip(hold_back)
            .any(|(layer, hold_back)| layer.wanted && hold_back);
        sending.count_limited(lacks || sent > estimate.bps(), now, counted);
        sending.plan_probe(Bitrate::from_bps(wanted_bps(others, layers)), now, counted);
    }

    /// Whether tracks may be due at other times, since the last call.
    pub fn take_tracks_changed(&mut self) -> bool {
        std::mem::take(&mut self.tracks_changed)
    }

    /// Returns the time at which the next probe packet is due.
    pub fn probe_at(&self) -> Time {
        self.sending
            .as_ref()
            .map_or(Time::MAX, |sending| sending.probe_at())
    }

    /// Sends the probe packets that are due, from the highest layer that is being sent. Returns the
    /// time at which the next one is due.
    pub fn send_probe<I: Io>(&mut self, around: &mut ConnectionContext<'_, I>) -> Time {
        let now = around.now;
        let PeerConnection {
            transport,
            tracks,
            sending,
            key,
            closed,
            ..
        } = self;
        let (Some(to), Some(sealer), Some(sending), false) = (
            transport.remote(),
            transport.sealer(),
            sending.as_deref_mut(),
            *closed,
        ) else {
            return Time::MAX;
        };
        let sends = |track: &SendTrack| {
            track.kind() == Kind::Video
                && track.is_wanted()
                && !track.is_held_back()
                && track.frames() > 0
        };
        let place = tracks.iter().rposition(sends);
        let mut nth = 0;
        while let Some(cluster) = sending.due_probe(now) {
            let bytes = place.and_then(|place| {
                let mut wire = wire(
                    *key,
                    to,
                    sealer,
                    (Kind::Video, place),
                    Some(&mut *sending),
                    around,
                );
                tracks[place].send_probe(nth, cluster, &mut wire)
            });
            around.record.bandwidth.probe_packets_sent += u64::from(bytes.is_some());
            sending.handle_probe_sent(bytes);
            nth += 1;
        }
        sending.probe_at()
    }

    fn handle_report_block<I: Io>(
        &mut self,
        block: &ReportBlock,
        arrival: Time,
        around: &mut ConnectionContext<'_, I>,
    ) {
        let Some(track) = self
            .tracks
            .iter_mut()
            .find(|track| track.ssrc() == block.ssrc)
        else {
            return;
        };
        let lost = &mut around.record.media(track.kind()).uplink_packets_lost;
        *lost = lost.wrapping_add_signed(track.handle_reported_loss(block.cumulative_lost));
        self.handle_rtt(block.lsr, block.dlsr, arrival, around);
    }

    fn handle_rtt<I: Io>(
        &mut self,
        last_report: u32,
        delay: u32,
        arrival: Time,
        around: &mut ConnectionContext<'_, I>,
    ) {
        if let Some(rtt) = rtt_from_report(
            ntp_middle(around.config.epoch.ntp(arrival)),
            last_report,
            delay,
        ) {
            self.rtt_rtcp = Some(rtt);
            self.note_rtt(rtt);
            around.record.session.rtt_rtcp.record(rtt);
        }
    }

    /// Takes the round-trip time of an answered STUN check.
    pub fn handle_stun_rtt(&mut self, rtt: Duration) {
        self.rtt_stun = Some(rtt);
        self.note_rtt(rtt);
    }

    fn note_rtt(&mut self, rtt: Duration) {
        self.rtt_least = Some(self.rtt_least.map_or(rtt, |least| least.min(rtt)));
    }

    fn handle_nack<I: Io>(
        &mut self,
        media_ssrc: Ssrc,
        seqs: impl Iterator<Item = Seq>,
        around: &mut ConnectionContext<'_, I>,
    ) {
        let rtt = self.rtt();
        let (Some(to), Some(sealer)) = (self.transport.remote(), self.transport.sealer()) else {
            return;
        };
        let Some((place, track)) = self
            .tracks
            .iter_mut()
            .enumerate()
            .find(|(_, track)| track.ssrc() == media_ssrc)
        else {
            return;
        };
        around.record.session.nacks_received += 1;
        let now = around.now;
        let sending = self.sending.as_deref_mut();
        let mut wire = wire(self.key, to, sealer, (track.kind(), place), sending, around);
        for seq in seqs.take(NACKED_MAX) {
            track.resend(seq.0, now, rtt, &mut wire);
        }
    }

    fn handle_key_frame_request<I: Io>(
        &mut self,
        media_ssrc: Ssrc,
        around: &mut ConnectionContext<'_, I>,
    ) {
        if let Some(track) = self
            .tracks
            .iter_mut()
            .find(|track| track.ssrc() == media_ssrc)
        {
            around.record.session.plis_received += 1;
            track.request_key_frame(around.now);
        }
    }

    /// Counts the bandwidth estimate, if the connection obeys one. Called once a second.
    pub fn count_estimate(&mut self, now: Time, record: &mut Record) {
        let Some(sending) = self.sending.as_mut().filter(|_| !self.closed) else {
            return;
        };
        if let Some(estimate) = sending.estimate() {
            let limited = sending.is_limited();
            let counted = &mut record.bandwidth;
            counted.uplink_estimates += 1;
            counted.uplink_estimate_kbps += estimate.bps() / 1_000;
            sending.count_limited(limited, now, counted);
        }
    }

    /// Sends one round of reports: an SR for every track, an RR for every stream, and the XR
    /// reference times.
    pub fn send_reports<I: Io>(&mut self, around: &mut ConnectionContext<'_, I>) {
        self.send_sender_reports(around);
        self.send_receiver_reports(around);
    }

    fn send_sender_reports<I: Io>(&mut self, around: &mut ConnectionContext<'_, I>) {
        let (now, epoch) = (around.now, around.config.epoch);
        if self.tracks.is_empty() || self.closed {
            return;
        }
        let PeerConnection {
            transport,
            tracks,
            cname,
            rtcp_ssrc,
            reference_time,
            key,
            ..
        } = self;
        send_compound(transport, *key, around, |writer| {
            for track in tracks.iter() {
                let Some((ntp, rtp_time, packets, octets)) = track.sender_report(now, epoch) else {
                    continue;
                };
                writer.sender_report(
                    &SenderInfo {
                        ssrc: track.ssrc(),
                        ntp,
                        rtp_time,
                        packets,
                        octets,
                    },
                    [],
                )?;
                writer.sdes_cname(track.ssrc(), cname)?;
            }
            if writer.is_empty() {
                return Ok(());
            }
            let dlrr = reference_time.map(|reference| DlrrBlock {
                ssrc: reference.ssrc,
                last_rr: reference.ntp_middle,
                delay_since_last_rr: dlsr_units(now.since(reference.arrival)),
            });
            if let Some(dlrr) = dlrr {
                writer.xr(*rtcp_ssrc, None, [dlrr])?;
            }
            Ok(())
        });
    }

    fn send_receiver_reports<I: Io>(&mut self, around: &mut ConnectionContext<'_, I>) {
        if self.streams.is_empty() || self.closed {
            return;
        }
        let (now, ntp) = (around.now, around.config.epoch.ntp(around.now));
        let PeerConnection {
            transport,
            streams,
            cname,
            rtcp_ssrc,
            key,
            ..
        } = self;
        let mut blocks = streams.iter_mut().filter_map(|stream| {
            stream
                .report_block(now)
                .map(|numbers| numbers.block(stream.ssrc()))
        });
        // A receiver without a sender report to answer measures its round-trip time with XR (RFC
        // 3611). The first compound packet carries the reference time.
        let mut reference = Some(ntp);
        loop {
            let mut written = 0;
            send_compound(transport, *key, around, |writer| {
                writer.receiver_report(
                    *rtcp_ssrc,
                    blocks
                        .by_ref()
                        .take(REPORT_BLOCKS_MAX)
                        .inspect(|_| written += 1),
                )?;
                writer.sdes_cname(*rtcp_ssrc, cname)?;
                if let Some(ntp) = reference.take() {
                    writer.xr(*rtcp_ssrc, Some(ntp), [])?;
                }
                Ok(())
            });
            if written < REPORT_BLOCKS_MAX {
                return;
            }
        }
    }

    /// Sends the NACKs and PLIs that are due. Returns the time of the next check.
    pub fn repair<I: Io>(&mut self, around: &mut ConnectionContext<'_, I>) -> Time {
        let (now, rtt) = (around.now, self.round_trip());
        let PeerConnection {
            transport,
            streams,
            rtcp_ssrc,
            key,
            ..
        } = self;
        let mut next_at = Time::MAX;
        let mut missing = [0; MISSING_MAX];
        for stream in streams {
            let count = if stream.next_nack_at() <= now {
                stream.poll_nack(now, rtt, &mut missing)
            } else {
                0
            };
            for missing in missing[..count].chunks(NACK_SEQS_MAX) {
                let seqs = missing.iter().map(|seq| Seq(*seq));
                send_compound(transport, *key, around, |writer| {
                    writer.nack(*rtcp_ssrc, stream.ssrc(), seqs)
                });
                around.record.session.nacks_sent += 1;
            }
            if stream.poll_pli(now) {
                send_compound(transport, *key, around, |writer| {
                    writer.pli(*rtcp_ssrc, stream.ssrc())
                });
                around.record.session.plis_sent += 1;
            }
            next_at = next_at.min(stream.next_nack_at());
            if stream.waits_for_key_frame() {
                next_at = next_at.min(now + KEY_FRAME_CHECK);
            }
        }
        next_at
    }

    /// Returns the time at which the feedback timer is due, or [`Time::MAX`] if no feedback was
    /// agreed on.
    pub fn feedback_timer_at(&self) -> Time {
        self.feedback
            .as_ref()
            .map_or(Time::MAX, |feedback| feedback.timer_at)
    }

    pub fn set_feedback_timer(&mut self, at: Time) {
        if let Some(feedback) = &mut self.feedback {
            feedback.timer_at = at;
        }
    }

    /// Sends the feedback that is due to the server. Returns the time of the next check.
    pub fn send_feedback<I: Io>(&mut self, around: &mut ConnectionContext<'_, I>) -> Time {
        let (now, rtt) = (around.now, self.rtt());
        let PeerConnection {
            transport,
            feedback,
            rtcp_ssrc,
            key,
            closed,
            ..
        } = self;
        let Some(feedback) = feedback.as_mut().filter(|_| !*closed) else {
            return Time::MAX;
        };
        loop {
            let mut sent = None;
            send_compound(transport, *key, around, |writer| {
                sent = feedback.write(writer, *rtcp_ssrc, now, rtt)?;
                Ok(())
            });
            let counted = &mut around.record.bandwidth;
            match sent {
                Some(Sent::TransportCc) => counted.transport_cc_sent += 1,
                Some(Sent::Remb(bitrate)) => {
                    counted.remb_sent += 1;
                    counted.remb_sent_kbps += bitrate.bps() / 1_000;
                }
                None => return feedback.settle(now),
            }
        }
    }

    fn round_trip(&self) -> RoundTrip {
        RoundTrip {
            last: self.rtt(),
            least: self.rtt_least,
        }
    }

    fn rtt(&self) -> Duration {
        self.rtt_rtcp.or(self.rtt_stun).unwrap_or(RTT_UNKNOWN)
    }

    /// Closes the account of every stream.
    pub fn finish(&mut self, roster: &Roster, record: &mut Record) {
        self.end_replaced_streams(roster, record);
        self.streams
            .iter_mut()
            .for_each(|stream| stream.finish(roster, record));
    }

    /// Updates the record with what the streams counted.
    pub fn account(&mut self, roster: &Roster, record: &mut Record) {
        self.end_replaced_streams(roster, record);
        self.streams
            .iter_mut()
            .for_each(|stream| stream.account(roster, record));
    }

    /// Ends streams that the server withdrew and announced again under another SSRC. Nothing more
    /// is owed to them from the new stream's first frame on.
    fn end_replaced_streams(&mut self, roster: &Roster, record: &mut Record) {
        let live = self
            .streams
            .iter()
            .filter(|stream| stream.is_live())
            .count();
        if std::mem::replace(&mut self.streams_live, live) == live {
            return;
        }
        for at in 0..self.streams.len() {
            if self.streams[at].is_withdrawn() {
                let (before, after) = self.streams.split_at_mut(at + 1);
                let successor = after.iter().find(|next| next.takes_place_of(&before[at]));
                if let Some(successor) = successor {
                    before[at].end_before(successor, roster, record);
                }
            }
        }
    }

    pub fn outcome(&self, roster: &Roster) -> PeerOutcome {
        PeerOutcome {
            participant: self.participant,
            intended_at: self.intended_at,
            rtt_rtcp: self.rtt_rtcp,
            streams: self
                .streams
                .iter()
                .map(|stream| stream.outcome(roster))
                .collect(),
        }
    }
}

/// Builds the way out of connection `key` for one track, given by its kind and its index among the
/// tracks.
fn wire<'a, I: Io>(
    key: PeerKey,
    to: SocketAddr,
    sealer: &'a Sealer,
    (kind, track): (Kind, usize),
    sending: Option<&'a mut Sending>,
    around: &'a mut ConnectionContext<'_, I>,
) -> TrackWire<'a, I> {
    let Record {
        session,
        audio,
        video,
        engine,
        ..
    } = &mut *around.record;
    TrackWire {
        io: around.io,
        key,
        to,
        sealer,
        epoch: around.config.epoch,
        roster: &around.config.roster,
        media: match kind {
            Kind::Audio => audio,
            Kind::Video => video,
        },
        wire_bytes_sent: &mut session.wire_bytes_sent,
        packets_processed: &mut engine.packets_processed,
        now: around.now,
        sent: sending.map(|sending| &mut sending.log),
        track: track as u8,
    }
}

/// Writes one compound packet into the lent buffer, seals it and sends it.
fn send_compound<I: Io>(
    transport: &mut Peer,
    key: PeerKey,
    around: &mut ConnectionContext<'_, I>,
    write: impl FnOnce(&mut RtcpWriter<'_>) -> Result<(), WriteError>,
) {
    let Some((to, sealed)) = seal_compound(transport, around.io.lend(), write) else {
        return;
    };
    around.io.send(key, to, sealed, sealed);
    around.record.session.wire_bytes_sent += sealed as u64;
}
