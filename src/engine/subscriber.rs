//! One received stream: its packets are opened, put in order, counted, and recognised by the
//! identity that their frames carry.
//!
//! The SFU's statements about a stream are not trusted. The frame itself tells which publisher it
//! is from, whether it came once, and how long it took.

use crate::transport::rtp::Ssrc;
use std::time::Duration;

use super::attribution::{Attribution, FrameOrigin, Losses, PlacedFrame};
use super::emodel::opus_mos_thousandths;
use super::ledger::Ledger;
use super::playout::{AudioPlayout, Played, VideoPlayout};
use super::{Roster, StreamParameters, is_muted};
use crate::codec::Codec;
use crate::codec::red::RedPayload;
use crate::measure::{Kind, Media, Record};
use crate::media::assemble::{Assembler, DecodedFrame, Delivery, FrameEvent, PacketInfo};
use crate::media::identity::{FrameIdentity, Origin, parse_foreign};
use crate::net;
use crate::recording::{Tap, TappedPacket};
use crate::transport::receive::{
    Arrival, NackPoll, NackRule, ReceiveCounts, ReceiveStream, ReportNumbers, RoundTrip,
};
use crate::transport::rtp::{Header, split_rtx};
use crate::transport::sequence::{ReplayWindow, SeqExtender};
use crate::transport::srtp::Opener;
use crate::units::{Epoch, Time};

/// One-way delay above which a frame counts as late. Beyond it a conversation is unacceptable for
/// most people (ITU-T G.114). Late frames still count as delivered.
pub const LATE_AFTER: Duration = Duration::from_millis(400);

/// Time that a requested layer has to arrive. A layer that was requested less than this time before
/// the publishers stopped may be missing only because it had no time.
const SWITCH_PATIENCE: Duration = Duration::from_secs(2);

/// Surroundings that a stream needs for one packet.
pub struct StreamContext<'a> {
    pub roster: &'a Roster,
    pub epoch: Epoch,
    pub record: &'a mut Record,
    /// The subscriber's room (`room`), and when it ought to have joined (`intended_at`).
    pub room: u32,
    pub intended_at: Time,
    /// Tap that packets are copied to, and the stream's number there.
    pub tap: Option<(&'a mut Tap, u32)>,
    /// Buffer for the events of one packet, reused so that no packet has to allocate:
    /// [`EVENTS_MAX`].
    pub events: &'a mut Vec<FrameEvent>,
}

/// Reason why a packet was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusedPacket {
    /// Seen before, or too old to tell.
    Replayed,
    /// Failed authentication, or its header or padding is broken.
    Broken,
}

/// Outcome of one stream.
#[derive(Clone, Debug)]
pub struct StreamOutcome {
    pub kind: Kind,
    pub ssrc: Ssrc,
    /// Set after a frame has told it.
    pub origin: Option<Origin>,
    pub live: bool,
    /// The stream carries media that nobody of this run sends.
    pub foreign: bool,
    /// When the last frame of a foreign stream came that is still subscribed to and wanted.
    pub last_frame_at: Option<Time>,
    /// The simulcast layer that was decoded last.
    pub layer: Option<u8>,
    pub counts: ReceiveCounts,
    pub frames_expected: u64,
    pub frames_delivered: u64,
    /// Number of delivered frames that were made before the last mark and delivered after it.
    pub frames_overdue: u64,
    /// Missing frames by the place where they were lost; complete after [`RecvStream::finish`].
    pub losses: Losses,
    pub frames_late: u64,
    /// Audio only, measured by the playout model.
    pub freezes: u64,
    pub frames_late_for_playout: u64,
    pub played_us: u64,
    pub concealed_us: u64,
    /// Score of the E-model, in thousandths; complete after [`RecvStream::finish`].
    pub mos_thousandths: Option<u64>,
    pub jitter: Duration,
    pub latency_us_mean: Option<u64>,
    pub latency_us_max: Option<u64>,
}

impl StreamOutcome {
    /// Adds a later stream that carried the same track to the same participant. Counts add up. Of
    /// states the worst is kept, as in the participant's own figures.
    pub fn add(&mut self, later: &StreamOutcome) {
        let StreamOutcome {
            kind: _,
            ssrc,
            origin: _,
            live,
            foreign,
            last_frame_at,
            layer,
            counts,
            frames_expected,
            frames_delivered,
            frames_overdue,
            losses,
            frames_late,
            freezes,
            frames_late_for_playout,
            played_us,
            concealed_us,
            mos_thousandths,
            jitter,
            latency_us_mean,
            latency_us_max,
        } = later;
        self.last_frame_at = *last_frame_at;
        self.ssrc = *ssrc;
        self.live |= live;
        self.foreign |= foreign;
        self.layer = layer.or(self.layer);
        self.counts.add(counts);
        self.losses.add(losses);
        for (sum, count) in [
            (&mut self.frames_expected, frames_expected),
            (&mut self.frames_delivered, frames_delivered),
            (&mut self.frames_overdue, frames_overdue),
            (&mut self.frames_late, frames_late),
            (&mut self.freezes, freezes),
            (&mut self.frames_late_for_playout, frames_late_for_playout),
            (&mut self.played_us, played_us),
            (&mut self.concealed_us, concealed_us),
        ] {
            *sum += count;
        }
        let worst = [self.mos_thousandths, *mos_thousandths];
        self.mos_thousandths = worst.into_iter().flatten().min();
        self.jitter = self.jitter.max(*jitter);
        self.latency_us_mean = self.latency_us_mean.max(*latency_us_mean);
        self.latency_us_max = self.latency_us_max.max(*latency_us_max);
    }
}

/// One received stream. What every packet needs comes first, in whole cache lines: with thousands
/// of streams none of it is in the cache when a packet arrives. [`RecvStream::prefetch`] fetches
/// what is needed and no more.
#[repr(C, align(64))]
pub struct RecvStream {
    parameters: StreamParameters,
    extender: SeqExtender,
    video: Option<Box<VideoState>>,
    /// Present for audio only.
    playout: Option<Box<AudioPlayout>>,
    /// Present if redundancy was agreed on.
    redundancy: Option<Box<ReceivedRedundancy>>,
    first_packet_at: Option<Time>,
    origin: Option<Origin>,
    live: bool,
    ended: bool,
    /// The server withdrew the stream. What its source makes or owes is still owed to this
    /// subscription.
    withdrawn: bool,
    /// The participant is leaving. What was sent before may still arrive.
    leaving: bool,
    finished: bool,
    /// The server was asked to send nothing for now.
    unwatched: bool,
    /// One bit for each layer that ever arrived.
    heard_layers: u8,
    receive: ReceiveStream,
    replay: ReplayWindow,

    latency: LatencySum,
    ledger: Ledger,
    attribution: Attribution,
    losses: Losses,
    /// Time since which the server pauses the stream for lack of bandwidth.
    paused_at: Option<Time>,
    freezes: u64,
    /// Whether the freeze in progress when the publishers stopped has been counted.
    freeze_settled: bool,
    accounted: Accounted,
    frames_late_for_playout: u32,
    mos_thousandths: Option<u16>,
    foreign: ForeignFrames,
}

/// Complete frames without an identity of this run.
#[derive(Clone, Copy, Default)]
struct ForeignFrames {
    count: u64,
    first_at: Time,
    last_at: Time,
}

/// Longest latency that a foreign frame's own time stamp is believed for.
const FOREIGN_LATENCY_MAX: Duration = Duration::from_secs(60);
/// Minimum number of foreign frames for a foreign stream. A server makes a few frames itself when a
/// track is muted or closed, but fewer than this.
const FOREIGN_FRAMES_MIN: u64 = 10;

/// State that only video needs: reassembly, and the retransmission stream beside the media.
struct VideoState {
    assembler: Assembler,
    playout: VideoPlayout,
    rtx_extender: SeqExtender,
    rtx_replay: ReplayWindow,
    pli_sent_at: Option<Time>,
    first_decoded: bool,
    /// Layer of the last decoded frame.
    layer: Option<u8>,
    switch: Option<Switch>,
    /// The roster's value when the stream last resumed.
    mute_changes: u32,
}

/// Packets and frames that redundancy has recovered. They are kept for as long as the original may
/// still arrive and take their place.
#[derive(Default)]
struct ReceivedRedundancy {
    /// By sequence number.
    packets: RecoveredWindow,
    /// By the publisher's frame number.
    frames: RecoveredWindow,
}

/// The latest numbers that were recovered.
#[derive(Default)]
struct RecoveredWindow {
    newest: u64,
    /// One bit per number, the newest in the lowest bit.
    bits: u128,
}

impl RecoveredWindow {
    /// Adds a number. Returns whether it is new.
    fn insert(&mut self, number: u64) -> bool {
        if number > self.newest {
            let ahead = u32::try_from(number - self.newest).unwrap_or(u32::MAX);
            self.bits = self.bits.checked_shl(ahead).unwrap_or(0);
            self.newest = number;
        }
        let Some(bit) = self.bit(number) else {
            return false;
        };
        let is_new = self.bits & bit == 0;
        self.bits |= bit;
        is_new
    }

    /// Removes a number because the original arrived. Returns whether it had been recovered.
    fn remove(&mut self, number: u64) -> bool {
        let bit = self.bit(number).unwrap_or(0);
        let was_recovered = self.bits & bit != 0;
        self.bits &= !bit;
        was_recovered
    }

    fn bit(&self, number: u64) -> Option<u128> {
        let back = self.newest.checked_sub(number)?;
        1u128.checked_shl(u32::try_from(back).ok()?)
    }
}

/// A layer that was requested and has not arrived yet.
#[derive(Clone, Copy)]
struct Switch {
    layer: u8,
    asked_at: Time,
}

/// Mean, maximum and number of late frames, in 24 bytes. A histogram for each subscription would be
/// 140 KiB.
#[derive(Clone, Copy, Default)]
struct LatencySum {
    sum_us: u64,
    max_us: u32,
    count: u32,
    late: u32,
}

/// Part of this stream's counts that is already in the shard's record.
#[derive(Default)]
struct Accounted {
    counts: ReceiveCounts,
    frames_expected: u64,
    losses: Losses,
    played_us: u64,
    concealed_us: u64,
    /// Packets missing on arrival because the server had missed them.
    missing_uplink: u64,
    /// Counts of a stream that nobody of this run sends.
    foreign: ReceiveCounts,
    foreign_frames: u64,
}

impl Accounted {
    fn add_since(&self, told: &Accounted, media: &mut Media) {
        let counts = &self.counts;
        for (sum, now, then) in [
            (
                &mut media.packets_lost_network,
                counts.lost_network,
                told.counts.lost_network,
            ),
            (
                &mut media.packets_missing_uplink,
                self.missing_uplink,
                told.missing_uplink,
            ),
            (
                &mut media.packets_repaired,
                counts.repaired,
                told.counts.repaired,
            ),
            (&mut media.packets_lost, counts.lost, told.counts.lost),
            (
                &mut media.packets_duplicate,
                counts.duplicate,
                told.counts.duplicate,
            ),
            (
                &mut media.packets_reordered,
                counts.reordered,
                told.counts.reordered,
            ),
            (
                &mut media.frames_expected,
                self.frames_expected,
                told.frames_expected,
            ),
            (&mut media.played_us, self.played_us, told.played_us),
            (
                &mut media.concealed_us,
                self.concealed_us,
                told.concealed_us,
            ),
        ] {
            add_difference(sum, now, then);
        }
    }

    fn add_losses_since(&self, told: &Accounted, media: &mut Media) {
        for (sum, now, then) in [
            (
                &mut media.frames_lost_source,
                self.losses.source,
                told.losses.source,
            ),
            (
                &mut media.frames_lost_uplink,
                self.losses.uplink,
                told.losses.uplink,
            ),
            (&mut media.frames_lost_sfu, self.losses.sfu, told.losses.sfu),
            (
                &mut media.frames_lost_downlink,
                self.losses.downlink,
                told.losses.downlink,
            ),
            (
                &mut media.frames_lost_unattributed,
                self.losses.unattributed,
                told.losses.unattributed,
            ),
        ] {
            add_difference(sum, now, then);
        }
    }

    fn add_foreign_since(&self, told: &Accounted, media: &mut Media) {
        for (sum, now, then) in [
            (
                &mut media.foreign_packets_received,
                self.foreign.received,
                told.foreign.received,
            ),
            (
                &mut media.foreign_packets_lost_network,
                self.foreign.lost_network,
                told.foreign.lost_network,
            ),
            (
                &mut media.foreign_packets_lost,
                self.foreign.lost,
                told.foreign.lost,
            ),
            (
                &mut media.foreign_frames,
                self.foreign_frames,
                told.foreign_frames,
            ),
        ] {
            add_difference(sum, now, then);
        }
    }
}

impl RecvStream {
    pub fn new(parameters: StreamParameters) -> RecvStream {
        let codec = parameters.payloads.codec;
        let mut receive = ReceiveStream::new(codec.clock_rate());
        receive.set_rtx(parameters.rtx_ssrc.is_some());
        receive.set_nack(nack_rule(codec.kind(), parameters.nack));
        let video = (codec.kind() == Kind::Video).then(|| {
            Box::new(VideoState {
                assembler: Assembler::new(),
                playout: VideoPlayout::default(),
                rtx_extender: SeqExtender::default(),
                rtx_replay: ReplayWindow::default(),
                pli_sent_at: None,
                first_decoded: false,
                layer: None,
                switch: None,
                mute_changes: 0,
            })
        });
        RecvStream {
            extender: SeqExtender::default(),
            replay: ReplayWindow::default(),
            receive,
            ledger: Ledger::default(),
            attribution: Attribution::default(),
            losses: Losses::default(),
            origin: None,
            first_packet_at: None,
            live: false,
            heard_layers: 0,
            ended: false,
            withdrawn: false,
            leaving: false,
            finished: false,
            unwatched: false,
            paused_at: None,
            freezes: 0,
            freeze_settled: false,
            latency: LatencySum::default(),
            accounted: Accounted::default(),
            frames_late_for_playout: 0,
            mos_thousandths: None,
            foreign: ForeignFrames::default(),
            video,
            playout: (codec.kind() == Kind::Audio).then(Box::default),
            redundancy: (codec == Codec::Red).then(Box::default),
            parameters,
        }
    }

    /// Prefetches what every packet needs. [`RecvStream::prefetch_next`] prefetches the rest, after
    /// this data has arrived.
    pub fn prefetch(&self) {
        net::prefetch(
            self,
            std::mem::offset_of!(RecvStream, receive) + ReceiveStream::HEAD_BYTES,
        );
    }

    /// Prefetches what the next packet will need, judged by the packet before.
    pub fn prefetch_next(&self) {
        self.receive.prefetch_next();
        self.replay
            .prefetch(self.extender.highest().map_or(0, |highest| highest + 1));
        if let Some(video) = self.video.as_deref() {
            video.assembler.prefetch();
            net::prefetch(&video.playout, usize::MAX);
            net::prefetch(&video.switch, usize::MAX);
        }
        if let Some(playout) = self.playout.as_deref() {
            net::prefetch(playout, usize::MAX);
        }
        // Most turns bring a complete frame.
        net::prefetch(&self.latency, usize::MAX);
        self.ledger.prefetch();
        self.attribution.prefetch();
    }

    pub fn ssrc(&self) -> Ssrc {
        self.parameters.ssrc
    }

    pub fn kind(&self) -> Kind {
        self.parameters.payloads.codec.kind()
    }

    pub fn next_nack_at(&self) -> Time {
        if self.has_ended() {
            Time::MAX
        } else {
            self.receive.next_nack_at()
        }
    }

    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Notes that at `at` the server was asked for this layer from now on, or for none.
    pub fn watch(&mut self, layer: Option<u8>, at: Time, roster: &Roster) {
        let was_watched = !std::mem::replace(&mut self.unwatched, layer.is_none());
        match layer {
            None => self.ledger.pause(self.origin, roster),
            Some(_) => self.ledger.resume(),
        }
        let Some(video) = self.video.as_mut() else {
            return;
        };
        if !was_watched {
            video.assembler.handle_pause();
        }
        // A layer that comes after none, or as the first one, is not a switch.
        video.switch = layer
            .filter(|layer| was_watched && video.layer.is_some_and(|current| current != *layer))
            .map(|layer| Switch {
                layer,
                asked_at: at,
            });
    }

    /// Notes that the server pauses the stream for lack of bandwidth, or sends it again. What it
    /// withholds was requested, and stays expected.
    pub fn set_paused(&mut self, paused: bool, at: Time, record: &mut Record) {
        let counted = &mut record.bandwidth;
        match (paused, self.paused_at) {
            (true, None) => {
                counted.tracks_paused += 1;
                counted.track_pause.expect(1);
                self.paused_at = Some(at);
            }
            (false, Some(since)) => {
                counted.tracks_resumed += 1;
                counted.track_pause.record(at.since(since));
                self.paused_at = None;
            }
            _ => {}
        }
    }

    /// Opens one datagram in place and takes its contents.
    pub fn handle_rtp(
        &mut self,
        datagram: &mut [u8],
        header: &Header,
        is_rtx: bool,
        opener: &Opener,
        arrival: Time,
        context: &mut StreamContext<'_>,
    ) -> Result<(), RefusedPacket> {
        let len = self.open(datagram, header, is_rtx, opener)?;
        let payload = header
            .payload(&datagram[..len])
            .ok_or(RefusedPacket::Broken)?;
        let media = context.record.media(self.kind());
        if is_rtx {
            media.rtx_received += 1;
            // The original sequence number precedes the payload (RFC 4588). A packet without
            // payload is a probe.
            let Some((original, payload)) = split_rtx(payload) else {
                return Ok(());
            };
            self.handle_media(original.0, header, payload, true, arrival, context);
        } else {
            media.packets_received += 1;
            media.bytes_received += (header.header_len + payload.len()) as u64;
            self.first_packet_at.get_or_insert(arrival);
            self.handle_media(header.seq.0, header, payload, false, arrival, context);
        }
        Ok(())
    }

    fn open(
        &mut self,
        datagram: &mut [u8],
        header: &Header,
        is_rtx: bool,
        opener: &Opener,
    ) -> Result<usize, RefusedPacket> {
        let (extender, replay) = match (&mut self.video, is_rtx) {
            (Some(video), true) => (&mut video.rtx_extender, &mut video.rtx_replay),
            (None, true) => return Err(RefusedPacket::Broken),
            (_, false) => (&mut self.extender, &mut self.replay),
        };
        let index = extender.guess(header.seq.0);
        if !replay.check(index) {
            return Err(RefusedPacket::Replayed);
        }
        let Ok(len) = opener.open_rtp(datagram, header.header_len, index) else {
            if !is_rtx && self.first_packet_at.is_none() {
                // The first packets were lost, and the wrap of the sequence number with them: try
                // the next rollover count, and then the first again.
                *extender = if extender.highest().is_none() {
                    SeqExtender::at_roc(1)
                } else {
                    SeqExtender::default()
                };
            }
            return Err(RefusedPacket::Broken);
        };
        extender.commit(index);
        replay.commit(index);
        Ok(len)
    }

    fn handle_media(
        &mut self,
        seq: u16,
        header: &Header,
        payload: &[u8],
        is_rtx: bool,
        arrival: Time,
        context: &mut StreamContext<'_>,
    ) {
        let came = self
            .receive
            .handle_packet(seq, header.rtp_time, arrival, is_rtx);
        match came {
            Arrival::New { .. } | Arrival::Reordered => {}
            Arrival::Repaired { loss_to_repair } => {
                if let Some(took) = loss_to_repair {
                    context
                        .record
                        .media(self.kind())
                        .loss_to_repair
                        .record(took);
                }
                if !is_rtx {
                    // A retransmission on the media's own SSRC was counted as media when it
                    // arrived.
                    let media = context.record.media(self.kind());
                    media.rtx_received += 1;
                    media.packets_received = media.packets_received.wrapping_sub(1);
                    media.bytes_received = media
                        .bytes_received
                        .wrapping_sub((header.header_len + payload.len()) as u64);
                }
            }
            Arrival::Duplicate | Arrival::TooOld => return,
        }
        if let Some((tap, stream)) = &mut context.tap {
            let packet = TappedPacket {
                stream: *stream,
                ssrc: self.parameters.ssrc,
                codec: self.parameters.payloads.codec_of(header.payload_type),
                ext_seq: self.receive.ext_seq(),
                rtp_time: header.rtp_time,
                marker: header.marker,
                arrival,
            };
            tap.take(&packet, payload);
        }
        match self.parameters.payloads.codec_of(header.payload_type) {
            Codec::Opus => self.handle_opus(payload, arrival, context),
            Codec::Red => {
                let is_resend = matches!(came, Arrival::Repaired { .. });
                self.handle_red(payload, is_resend, arrival, context);
            }
            codec => self.handle_video(codec, header, payload, arrival, context),
        }
    }

    fn handle_opus(&mut self, payload: &[u8], arrival: Time, context: &mut StreamContext<'_>) {
        let seq = self.receive.ext_seq();
        if let Some(redundancy) = self.redundancy.as_deref_mut()
            && redundancy.packets.remove(seq)
        {
            let recovered = &mut context.record.audio.packets_recovered_red;
            *recovered = recovered.wrapping_sub(1);
        }
        match FrameIdentity::parse_audio(payload) {
            Some(identity) => self.deliver(&identity, (seq, seq), arrival, true, context),
            None => self.note_foreign_audio(payload, arrival, context),
        }
    }

    #[cold]
    fn note_foreign_audio(&mut self, payload: &[u8], at: Time, context: &mut StreamContext<'_>) {
        // Frames that a server makes itself while a track is muted: silence with padding.
        let made_by_server = payload
            .strip_prefix(&[0xF8, 0xFF, 0xFE])
            .is_some_and(|rest| rest.iter().all(|byte| *byte == 0));
        if !made_by_server && !payload.is_empty() {
            self.note_foreign(at, context);
        }
    }

    /// Counts a complete frame that nobody of this run has sent.
    #[cold]
    fn note_foreign(&mut self, at: Time, context: &mut StreamContext<'_>) {
        if self.foreign.count == 0 {
            self.foreign.first_at = at;
        }
        self.foreign.count += 1;
        self.foreign.last_at = at;
        if self.foreign.count == FOREIGN_FRAMES_MIN && self.origin.is_none() {
            let since = self.foreign.first_at.since(context.intended_at);
            let media = context.record.media(self.kind());
            media.foreign_first_frame.record(since);
        }
    }

    /// Records the latency of a foreign frame by the time that its publisher wrote into it. Values
    /// that cannot be such a time are skipped, because an application may write anything there.
    #[cold]
    fn note_foreign_stamp(&mut self, unix_us: u64, at: Time, context: &mut StreamContext<'_>) {
        let sent = context.epoch.time_of_unix_micros(unix_us);
        let latency = sent
            .filter(|sent| *sent <= at && self.is_foreign())
            .map(|sent| at.since(sent));
        if let Some(latency) = latency.filter(|latency| *latency <= FOREIGN_LATENCY_MAX) {
            let media = context.record.media(self.kind());
            media.foreign_one_way_latency.record(latency);
        }
    }

    /// Whether the stream carries media that nobody of this run sends.
    fn is_foreign(&self) -> bool {
        self.origin.is_none() && self.foreign.count >= FOREIGN_FRAMES_MIN
    }

    /// Handles a RED packet. The primary block goes first, because it shows what is missing before
    /// it.
    fn handle_red(
        &mut self,
        payload: &[u8],
        is_resend: bool,
        arrival: Time,
        context: &mut StreamContext<'_>,
    ) {
        let Some(red) = RedPayload::parse(payload) else {
            // A packet without payload only holds its place in the sequence.
            context.record.session.packets_rejected += u64::from(!payload.is_empty());
            return;
        };
        // Counted like `packets_received`: without retransmissions.
        context.record.audio.packets_received_red += u64::from(!is_resend);
        self.handle_opus(red.primary, arrival, context);
        let seq = self.receive.ext_seq();
        for block in red.redundant() {
            let seq = seq.saturating_sub(u64::from(block.distance));
            let is_missing = self.receive.is_missing(seq);
            if let Some(redundancy) = self.redundancy.as_deref_mut()
                && is_missing
                && redundancy.packets.insert(seq)
            {
                context.record.audio.packets_recovered_red += 1;
            }
            if let Some(identity) = FrameIdentity::parse_audio(block.payload) {
                self.recover(&identity, seq, arrival, context);
            }
        }
    }

    /// Takes a frame that a later packet has repeated. `seq` is the sequence number that its own
    /// packet had, or would have had. Only a frame that is missing between frames that arrived is
    /// of use.
    fn recover(
        &mut self,
        identity: &FrameIdentity,
        seq: u64,
        arrival: Time,
        context: &mut StreamContext<'_>,
    ) {
        if identity.run != context.roster.run
            || self.origin != Some(identity.origin)
            || !self.ledger.is_missing(identity)
            || self.is_unwanted()
            || self.leaving && self.ledger.is_beyond_the_end(identity)
            || self.ledger.deliver(identity, context.roster) != Delivery::First
        {
            return;
        }
        let media = context.record.media(self.kind());
        media.frames_delivered += 1;
        media.frames_recovered += 1;
        if let Some(redundancy) = self.redundancy.as_deref_mut() {
            redundancy.frames.insert(identity.frame.into());
        }
        context.roster.set_received(identity);
        let whose = FrameOrigin {
            roster: context.roster,
            origin: identity.origin,
        };
        self.attribution
            .recover(identity, seq, &self.receive, whose);
        let Some(latency) = self.note_latency(identity, arrival, context) else {
            return;
        };
        if let Some(playout) = self.playout.as_mut() {
            let played = playout.handle_recovered(identity.frame, latency);
            self.frames_late_for_playout += note_playout(&mut context.record.audio, played);
        }
    }

    fn handle_video(
        &mut self,
        codec: Codec,
        header: &Header,
        payload: &[u8],
        arrival: Time,
        context: &mut StreamContext<'_>,
    ) {
        let Some(video) = self.video.as_mut() else {
            return;
        };
        if let Some(origin) = self.origin {
            video.handle_mute_changes(context.roster.mute_changes(origin));
        }
        let ext_seq = self.receive.ext_seq();
        context.events.clear();
        let mut note = |event| {
            if context.events.len() < EVENTS_MAX {
                context.events.push(event);
            }
        };
        let mut foreign_stamp = None;
        match codec.depacketize(payload, header.marker) {
            Some(info) => {
                let packet = PacketInfo {
                    ext_seq,
                    rtp_time: header.rtp_time,
                    start: info.start,
                    end: info.end,
                    key: info.key,
                    identity: if info.end {
                        FrameIdentity::parse_video(payload)
                    } else {
                        None
                    },
                };
                if info.end && packet.identity.is_none() {
                    foreign_stamp = parse_foreign(payload).and_then(|facts| facts.user_timestamp);
                }
                video.assembler.handle_packet(&packet, arrival, &mut note);
            }
            // Only padding, or an invalid descriptor: the packet only holds its place in the
            // sequence.
            None => video.assembler.handle_padding(ext_seq, arrival, &mut note),
        }
        for at in 0..context.events.len() {
            self.handle_frame_event(context.events[at], context);
        }
        if let Some(stamp) = foreign_stamp {
            self.note_foreign_stamp(stamp, arrival, context);
        }
    }

    fn handle_frame_event(&mut self, event: FrameEvent, context: &mut StreamContext<'_>) {
        match event {
            FrameEvent::Complete(frame) if frame.identity.is_none() => {
                if frame.decodable {
                    self.note_foreign(frame.completed_at, context);
                }
            }
            FrameEvent::Complete(frame) => {
                if let Some(identity) = frame.identity {
                    let first_seq = frame.last_seq + 1 - u64::from(frame.packets);
                    self.deliver(
                        &identity,
                        (first_seq, frame.last_seq),
                        frame.completed_at,
                        frame.decodable,
                        context,
                    );
                }
            }
            FrameEvent::Decoded(frame) => self.handle_decoded(&frame, context),
        }
    }

    fn handle_decoded(&mut self, frame: &DecodedFrame, context: &mut StreamContext<'_>) {
        let Some(video) = self.video.as_mut() else {
            return;
        };
        let media = context.record.media(Kind::Video);
        if let (true, Some(sent_at)) = (frame.key, video.pli_sent_at) {
            video.pli_sent_at = None;
            media
                .pli_sent_to_key_received
                .record(frame.decoded_at.since(sent_at));
        }
        // A requested layer is a switch. Any other change comes from the server or the publisher.
        if let (Some(before), Some(layer)) = (video.layer, frame.layer)
            && video.switch.is_none_or(|switch| switch.layer != layer)
        {
            context.record.bandwidth.layers_stepped_down += u64::from(layer < before);
            context.record.bandwidth.layers_stepped_up += u64::from(layer > before);
        }
        let media = context.record.media(Kind::Video);
        video.layer = frame.layer.or(video.layer);
        if let Some(switch) = video
            .switch
            .take_if(|switch| Some(switch.layer) == frame.layer)
        {
            media.layer_switch.expect(1);
            media
                .layer_switch
                .record(frame.decoded_at.since(switch.asked_at));
        }
        let intended = frame.intended_unix_us.zip(self.origin);
        let intended = intended.and_then(|(at, origin)| {
            context
                .epoch
                .time_of_unix_micros(context.roster.unix_us_here(origin, at)?)
        });
        if let Some(intended) = intended {
            let played = video
                .playout
                .handle_frame(frame.decoded_at.since(intended), frame.decoded_at);
            self.frames_late_for_playout += note_playout(media, played);
        }
        if let Some(interval) = frame.interval {
            media.frame_interval.record(interval);
        }
        if let Some(freeze) = frame.freeze.filter(|_| !self.freeze_settled) {
            media.freeze.record(freeze);
            media.freezes += 1;
            self.freezes += 1;
        }
        if !video.first_decoded && self.origin.is_some() && !self.is_unwanted() {
            self.take_first_frame(frame.decoded_at, context);
        }
    }

    /// Takes a complete frame that carries our identity, in packets `first_seq..=last_seq`. The
    /// identity tells whose frame it is, whether it comes for the first time, and how long it took.
    fn deliver(
        &mut self,
        identity: &FrameIdentity,
        (first_seq, last_seq): (u64, u64),
        at: Time,
        decodable: bool,
        context: &mut StreamContext<'_>,
    ) {
        if identity.run != context.roster.run {
            if self.kind() == Kind::Audio || decodable {
                self.note_foreign(at, context);
                self.note_foreign_stamp(identity.intended_unix_us, at, context);
            }
            return;
        }
        let origin = identity.origin;
        let here = context.roster.room(origin) == Some(context.room);
        if !here
            || !context.roster.is_made(identity)
            || *self.origin.get_or_insert(origin) != origin
        {
            context.record.session.frames_misrouted += 1;
            return;
        }
        if self.is_unwanted() || self.leaving && self.ledger.is_beyond_the_end(identity) {
            return;
        }
        if !self.live && (self.kind() == Kind::Audio || decodable) {
            self.go_live(at, context);
        }
        let was_resuming = self.ledger.is_resuming();
        if !self.is_first(identity, context) {
            return;
        }
        context.roster.set_received(identity);
        if self.heard_layers >> identity.layer & 1 == 0 {
            self.heard_layers |= 1 << identity.layer;
            context.roster.add_listener(identity);
        }
        let resumes = was_resuming && !self.ledger.is_resuming();
        let frame = PlacedFrame {
            layer: identity.layer,
            frame: identity.frame,
            first_seq,
            last_seq,
        };
        self.place(frame, resumes, origin, at, context.roster);
        if let Some(latency) = self.note_latency(identity, at, context) {
            self.play_audio(identity, latency, resumes, at, context);
        }
    }

    /// Counts a frame. Returns whether it comes for the first time.
    #[inline]
    fn is_first(&mut self, identity: &FrameIdentity, context: &mut StreamContext<'_>) -> bool {
        let media = context.record.media(self.kind());
        let delivery = self.ledger.deliver(identity, context.roster);
        let recovered = |red: &mut ReceivedRedundancy| red.frames.remove(identity.frame.into());
        match delivery {
            Delivery::First => media.frames_delivered += 1,
            // Redundancy was faster than the packet itself, which was late and not lost.
            Delivery::Duplicate if self.redundancy.as_deref_mut().is_some_and(recovered) => {
                media.frames_recovered = media.frames_recovered.wrapping_sub(1);
            }
            Delivery::Duplicate | Delivery::TooOld => media.frames_duplicate += 1,
        }
        delivery == Delivery::First
    }

    /// Notes how long a frame took that has just arrived. Returns `None` if that cannot be told.
    fn note_latency(
        &mut self,
        identity: &FrameIdentity,
        at: Time,
        context: &mut StreamContext<'_>,
    ) -> Option<Duration> {
        let media = context.record.media(self.kind());
        let Some(intended_unix_us) = context
            .roster
            .unix_us_here(identity.origin, identity.intended_unix_us)
        else {
            media.frames_untimed += 1;
            return None;
        };
        let intended = context.epoch.time_of_unix_micros(intended_unix_us)?;
        let latency_us = at.micros_since(intended);
        media.one_way_latency.record_micros(latency_us);
        let is_late = latency_us > LATE_AFTER.as_micros() as u64;
        media.frames_late += u64::from(is_late);
        self.latency.add(latency_us, is_late);
        Some(Duration::from_micros(latency_us))
    }

    /// Hands a frame that took `transit` to the model of the listener's jitter buffer.
    fn play_audio(
        &mut self,
        identity: &FrameIdentity,
        transit: Duration,
        resumes: bool,
        now: Time,
        context: &mut StreamContext<'_>,
    ) {
        let Some(playout) = self.playout.as_mut() else {
            return;
        };
        let media = &mut context.record.audio;
        let length = context
            .roster
            .frame_interval(identity.origin, identity.layer);
        let mut interrupted = |for_so_long| {
            media.freeze.record(for_so_long);
            media.freezes += 1;
            self.freezes += 1;
        };
        if resumes {
            playout.resume(length, &mut interrupted);
        }
        let played = playout.handle_frame(identity.frame, transit, length, now, &mut interrupted);
        self.frames_late_for_playout += note_playout(media, played);
    }

    /// Records the frame's place. Whatever is missing between this frame and the others was lost
    /// somewhere.
    fn place(
        &mut self,
        frame: PlacedFrame,
        resumes: bool,
        origin: Origin,
        now: Time,
        roster: &Roster,
    ) {
        let whose = FrameOrigin { roster, origin };
        if resumes {
            self.attribution
                .resume_with(frame, &self.receive, whose, now);
        } else {
            let withheld = || self.ledger.withheld(origin, roster);
            self.attribution
                .deliver(frame, withheld, &self.receive, whose, now);
        }
    }

    /// Whether nothing is to come now: the stream has ended, or is not wanted, or is paused.
    fn is_at_rest(&self) -> bool {
        self.ended || self.leaving || self.unwatched || self.paused_at.is_some()
    }

    /// Whether what arrives was under way before the server heard that it is not wanted. Such a
    /// frame makes no track live.
    fn is_unwanted(&self) -> bool {
        self.unwatched && self.ledger.is_empty()
    }

    fn go_live(&mut self, at: Time, context: &mut StreamContext<'_>) {
        self.live = true;
        let since = self.subscription_start(context);
        let media = context.record.media(self.kind());
        media.tracks_live += 1;
        media
            .track_subscribe
            .record(self.parameters.announced_at.since(since));
        if let Some(first_packet_at) = self.first_packet_at {
            media.first_packet.record(first_packet_at.since(since));
        }
        if self.kind() == Kind::Audio {
            media.first_frame.record(at.since(since));
        }
    }

    /// Takes the first picture that a decoder has made of this stream.
    fn take_first_frame(&mut self, at: Time, context: &mut StreamContext<'_>) {
        if !self.live {
            self.go_live(at, context);
        }
        if let Some(video) = &mut self.video {
            video.first_decoded = true;
        }
        let since = self.subscription_start(context);
        context.record.video.first_frame.record(at.since(since));
    }

    /// Returns the time from which a subscriber may expect the track: when it ought to have joined,
    /// or when the publisher began, whichever is later. It is not known here when a publisher on
    /// another host began. If hosts first wait for each other's publishers, it was before any
    /// subscriber was to join.
    fn subscription_start(&self, context: &StreamContext<'_>) -> Time {
        let published = self
            .origin
            .and_then(|origin| context.roster.published_at(origin));
        published.map_or(context.intended_at, |at| at.max(context.intended_at))
    }

    /// Settles the stream when the publishers stop: counts a freeze in progress, and a layer that
    /// was requested and never arrived.
    pub fn settle(&mut self, roster: &Roster, record: &mut Record, now: Time) {
        if let Some(since) = self.paused_at.take() {
            record.bandwidth.track_pause.record(now.since(since));
        }
        let muted = self.is_muted(roster);
        let at_rest = self.ended || self.leaving || self.unwatched || muted;
        let Some(video) = self.video.as_mut().filter(|_| !at_rest) else {
            return;
        };
        let waited = |switch: &Switch| now.since(switch.asked_at) >= SWITCH_PATIENCE;
        record
            .video
            .layer_switch
            .expect(u64::from(video.switch.take().as_ref().is_some_and(waited)));
        if let Some(freeze) = video.assembler.open_freeze(now) {
            record.video.freeze.record(freeze);
            record.video.freezes += 1;
            self.freezes += 1;
            self.freeze_settled = true;
        }
    }

    fn is_muted(&self, roster: &Roster) -> bool {
        self.origin
            .is_some_and(|origin| is_muted(roster.mute_changes(origin)))
    }

    pub fn handle_sender_report(&mut self, ntp: u64, arrival: Time) {
        self.receive.handle_sender_report(ntp, arrival);
    }

    /// Returns the numbers of a report block; `None` before the first packet.
    pub fn report_block(&mut self, now: Time) -> Option<ReportNumbers> {
        if self.has_ended() {
            None
        } else {
            self.receive.report_block(now)
        }
    }

    /// Writes the sequence numbers to request now to `out`. Returns how many were written.
    pub fn poll_nack(&mut self, now: Time, rtt: RoundTrip, out: &mut [u16]) -> usize {
        let NackPoll { count, gave_up } = self.receive.poll_nack(now, rtt, out);
        if let (Some(video), true) = (self.video.as_mut(), gave_up > 0) {
            video.assembler.handle_gave_up();
        }
        count
    }

    /// Whether to request a key frame now. The request is noted.
    pub fn poll_pli(&mut self, now: Time) -> bool {
        let at_rest = self.ended || self.unwatched;
        let Some(video) = self.video.as_mut() else {
            return false;
        };
        let due = !at_rest && video.assembler.poll_pli(now);
        if due {
            video.pli_sent_at.get_or_insert(now);
        }
        due
    }

    /// Whether the stream waits for a key frame, so that [`RecvStream::poll_pli`] should be called
    /// again soon.
    pub fn waits_for_key_frame(&self) -> bool {
        !self.ended
            && !self.unwatched
            && self
                .video
                .as_ref()
                .is_some_and(|video| video.assembler.needs_key_frame())
    }

    /// Ends the stream: the subscriber is gone by plan, or has returned on another connection. What
    /// is sent later is not expected here.
    pub fn end(&mut self, roster: &Roster, record: &mut Record) {
        if !self.ended || self.withdrawn {
            self.account(roster, record);
            self.ledger.end(self.origin, roster);
            (self.ended, self.withdrawn) = (true, false);
        }
    }

    /// Notes that the server withdrew the stream. Nothing of it is taken any more. It stays owed to
    /// a subscriber that is meant to be there.
    pub fn withdraw(&mut self, roster: &Roster, record: &mut Record) {
        if !self.ended {
            self.account(roster, record);
            self.ledger.withdraw(self.origin, roster);
            (self.ended, self.withdrawn) = (true, true);
        }
    }

    pub fn is_withdrawn(&self) -> bool {
        self.withdrawn
    }

    pub fn is_live(&self) -> bool {
        self.live
    }

    /// Whether this is the same track, announced again.
    pub fn takes_place_of(&self, withdrawn: &RecvStream) -> bool {
        self.live && self.origin.is_some() && self.origin == withdrawn.origin
    }

    /// Ends the stream because another stream of the same track has taken its place.
    pub fn end_before(&mut self, successor: &RecvStream, roster: &Roster, record: &mut Record) {
        if let Some(origin) = self.origin {
            self.ledger.end_before(&successor.ledger, origin, roster);
            self.end(roster, record);
        }
    }

    /// Notes that the participant leaves now. What was sent until now is expected, and repaired if
    /// possible. What is sent from now on is neither expected nor counted.
    pub fn leave(&mut self, roster: &Roster, record: &mut Record, now: Time) {
        if self.withdrawn {
            self.end(roster, record);
        }
        if self.ended || self.leaving {
            return;
        }
        self.settle(roster, record, now);
        self.account(roster, record);
        self.ledger.end(self.origin, roster);
        self.leaving = true;
    }

    /// Ends the stream if its participant has left: what was under way has had its time.
    pub fn end_if_leaving(&mut self, roster: &Roster, record: &mut Record) {
        if self.leaving {
            self.end(roster, record);
        }
    }

    /// Sets a mark. What was made until now and arrives later is counted separately.
    pub fn mark(&mut self, roster: &Roster) {
        self.ledger.mark(self.origin, roster);
    }

    /// Updates the shard's record with what this stream has counted.
    pub fn account(&mut self, roster: &Roster, record: &mut Record) {
        let counts = self.receive.counts();
        let frames_expected = self.frames_expected(roster);
        if !self.finished {
            self.losses = self.attribution.losses();
        }
        self.losses.source = self.ledger.unsent(self.origin, roster);
        let media = record.media(self.kind());
        let (played_us, concealed_us) = self
            .playout
            .as_ref()
            .map_or((0, 0), |playout| playout.times_us());
        // Packets that the server received late and then sent did arrive.
        let asked = self.ledger.asked(self.origin, roster);
        let missing_uplink = asked
            .saturating_sub(counts.reordered)
            .min(counts.lost_network);
        let now = Accounted {
            counts,
            frames_expected,
            losses: self.losses,
            played_us,
            concealed_us,
            missing_uplink,
            foreign: if self.is_foreign() {
                counts
            } else {
                ReceiveCounts::default()
            },
            foreign_frames: if self.is_foreign() {
                self.foreign.count
            } else {
                0
            },
        };
        now.add_since(&self.accounted, media);
        now.add_losses_since(&self.accounted, media);
        now.add_foreign_since(&self.accounted, media);
        self.accounted = now;
        if counts.received > 0 && !self.ended {
            media.jitter.record(self.receive.jitter());
        }
    }

    /// Returns the number of frames that its source has made, plus those that it owed while it was
    /// gone.
    fn frames_expected(&self, roster: &Roster) -> u64 {
        self.ledger.expected(self.origin, roster) + self.ledger.unsent(self.origin, roster)
    }

    /// Closes the account: nothing arrives any more, and what is missing is lost.
    pub fn finish(&mut self, roster: &Roster, record: &mut Record) {
        if let Some(origin) = self.origin.filter(|_| !self.finished) {
            let missing = self
                .ledger
                .expected(self.origin, roster)
                .saturating_sub(self.ledger.delivered());
            let whose = FrameOrigin { roster, origin };
            self.losses = self.attribution.finish(missing, &self.receive, whose);
            let withheld = self
                .ledger
                .made_since_withdrawal(origin, roster)
                .min(self.losses.unattributed);
            self.losses.unattributed -= withheld;
            self.losses.sfu += withheld;
            self.finished = true;
            self.finish_playout(origin, roster, record);
        }
        self.account(roster, record);
    }

    /// Ends the playout model. What was expected after the last frame that arrived was never heard.
    /// Then the listener's score is calculated.
    fn finish_playout(&mut self, origin: Origin, roster: &Roster, record: &mut Record) {
        let Some(playout) = self.playout.as_mut() else {
            return;
        };
        let length = roster.frame_interval(origin, 0);
        let missing = self.ledger.missing_at_the_end(origin, roster);
        let media = &mut record.audio;
        playout.finish(missing, length, |for_so_long| {
            media.freeze.record(for_so_long);
            media.freezes += 1;
            self.freezes += 1;
        });
        let (played_us, concealed_us) = playout.times_us();
        if let Some(delay) = playout.mouth_to_ear() {
            let concealed = concealed_us as f64 / (played_us + concealed_us).max(1) as f64;
            let mos = opus_mos_thousandths(delay, length, concealed);
            media.mos.record_micros(mos);
            self.mos_thousandths = Some(mos as u16);
        }
    }

    pub fn outcome(&self, roster: &Roster) -> StreamOutcome {
        let (played_us, concealed_us) = self
            .playout
            .as_ref()
            .map_or((0, 0), |playout| playout.times_us());
        StreamOutcome {
            kind: self.kind(),
            ssrc: self.parameters.ssrc,
            origin: self.origin,
            live: self.live,
            foreign: self.is_foreign(),
            last_frame_at: (self.is_foreign() && !self.is_at_rest())
                .then_some(self.foreign.last_at),
            layer: self.video.as_ref().and_then(|video| video.layer),
            counts: self.receive.counts(),
            frames_expected: self.frames_expected(roster),
            frames_delivered: self.ledger.delivered(),
            frames_overdue: self.ledger.overdue(),
            losses: self.losses,
            frames_late: self.latency.late.into(),
            freezes: self.freezes,
            frames_late_for_playout: self.frames_late_for_playout.into(),
            played_us,
            concealed_us,
            mos_thousandths: self.mos_thousandths.map(u64::from),
            jitter: self.receive.jitter(),
            latency_us_mean: self.latency.mean_us(),
            latency_us_max: (self.latency.count > 0).then(|| self.latency.max_us.into()),
        }
    }
}

impl VideoState {
    /// A muted track's pause is not a freeze.
    fn handle_mute_changes(&mut self, mute_changes: u32) {
        if mute_changes != self.mute_changes && !is_muted(mute_changes) {
            self.mute_changes = mute_changes;
            self.assembler.handle_pause();
        }
    }
}

fn nack_rule(kind: Kind, agreed_on: bool) -> NackRule {
    match (agreed_on, kind) {
        (false, _) => NackRule::Never,
        (true, Kind::Audio) => NackRule::Audio,
        (true, Kind::Video) => NackRule::Video,
    }
}

/// Maximum number of events of one packet. A packet completes at most one frame, and makes at most
/// the assembler's waiting frames decodable.
pub const EVENTS_MAX: usize = 20;

impl LatencySum {
    fn add(&mut self, us: u64, is_late: bool) {
        self.late += u32::from(is_late);
        self.sum_us += us;
        self.max_us = self.max_us.max(u32::try_from(us).unwrap_or(u32::MAX));
        self.count += 1;
    }

    fn mean_us(&self) -> Option<u64> {
        self.sum_us.checked_div(self.count.into())
    }
}

/// Counts a frame that the playout model took. Returns 1 if it was too late, else 0.
fn note_playout(media: &mut Media, played: Played) -> u32 {
    match played {
        Played::After(wait) => media.playout_delay.record(wait),
        Played::TooLate => media.frames_late_for_playout += 1,
    }
    u32::from(played == Played::TooLate)
}

/// Adds `now - told`. The difference may be negative (a packet counted as lost arrives after all),
/// but sums over a run are not.
fn add_difference(counter: &mut u64, now: u64, told: u64) {
    *counter = counter.wrapping_add(now.wrapping_sub(told));
}
