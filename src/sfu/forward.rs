//! One subscription: which packets of a published track go to one subscriber, and with which
//! numbers.
//!
//! A subscriber sees one stream without breaks: its sequence numbers, timestamps and picture ids
//! continue across layer switches, pauses and dropped packets. To do this, the subscription
//! remembers *segments*, not packets. From the first outgoing number of a segment on, packets of
//! one layer leave with the same offsets. A late packet, or one to retransmit, is found through its
//! segment and written again with the same bytes, because the cache keeps the received packet and
//! segments never change. So an outgoing number always means the same packet. SRTP requires this:
//! no two packets may be sealed under one index.

use crate::transport::rtp::Ssrc;
use std::collections::VecDeque;
use std::mem::offset_of;
use std::time::Duration;

use super::cache::{CacheEntry, PacketContent};
use super::ingest::{Format, Ingest};
use super::select;
use super::statistics::{RouterStatistics, SubscriptionStatistics};
use super::{ClientEnd, Outgoing, Selection, SendMode, SubscriptionId, SubscriptionParameters};
use crate::codec::vp8::{PictureId, Vp8Descriptor};
use crate::codec::{Codec, red};
use crate::measure::Kind;
use crate::net;
use crate::seeded::{mixed, scatter};
use crate::transport::reports::NACKED_MAX;
use crate::transport::rtcp::{ReportBlock, SenderInfo};
use crate::transport::rtp::{
    ExtensionSlot, HeaderTemplate, TemplateError, check_payload_type, set_payload_type,
    write_rtx_osn,
};
use crate::transport::sdp::Extension;
use crate::transport::sequence::Seq;
use crate::transport::srtp::Sealer;
use crate::units::Time;

/// Number of segments remembered. Each layer switch, pause and run of dropped packets uses one.
/// Packets before the oldest segment can no longer be retransmitted.
const SEGMENTS_MAX: usize = 8;
/// Largest number of retransmissions of a packet (LiveKit's limit).
const RESENDS_MAX: u8 = 3;
/// Least time between two transmissions of a packet (LiveKit's limit), unless two round trips are
/// shorter.
const RESEND_DEAF: Duration = Duration::from_millis(100);
/// Round trip time assumed until one has been measured (LiveKit's value).
const RTT_UNKNOWN: Duration = Duration::from_millis(70);
/// Number of retransmitted packets whose last time is remembered. Two packets whose numbers differ
/// by a multiple of this share an entry: the older one may then be retransmitted sooner, but not
/// more often.
const AUDIO_RESENDS: usize = 16;
const VIDEO_RESENDS: usize = 128;
/// Number of packets whose retransmissions are counted: all that the cache holds. An older packet
/// is not retransmitted.
const AUDIO_COUNTED: u64 = 128;
const VIDEO_COUNTED: u64 = 512;
/// A jump ahead of the publisher's numbers beyond this is a restart of its stream (RFC 3550, A.1),
/// and not a loss to show the subscriber.
const RESTART: u64 = 3_000;
/// Largest number of packets by which the first packet for a subscriber may lie behind the newest
/// one, if it arrives late. This is half of the video packets that are kept, so all packets that
/// the subscriber gets from then on can still be repaired.
const CATCH_UP_MAX: u64 = 256;
/// Largest age of that packet when it starts a picture, by the publisher's clock. A repair takes a
/// few round trips. A picture that was missing for longer is not worth a step back in time, and the
/// next key frame is on its way.
const CATCH_UP_TIME_MAX: Duration = Duration::from_millis(500);
/// Largest error of a clock. If two clocks disagree by more, the distance between two packets is
/// taken from their arrival times.
const CLOCK_ERROR_MAX: Duration = Duration::from_secs(5);
/// Bytes of padding in a packet that only fills a sequence number.
const FILLER_BYTES: usize = 4;
/// Largest number of packets of one encoding that are forwarded together.
pub const RUN_MAX: usize = net::SEGMENTS_MAX;
/// Length of the fixed header. The one extension that our packets may carry takes four bytes for
/// the extension header and four for an audio level.
const HEADER_LEN: usize = 12;
const LEVELED_HEADER_LEN: usize = HEADER_LEN + 8;

/// Context that is needed to send a packet.
pub struct ForwardWire<'a, I> {
    pub io: &'a mut I,
    pub to: ClientEnd,
    pub sealer: &'a Sealer,
    pub send: SendMode,
    pub now: Time,
    pub statistics: &'a mut RouterStatistics,
}

/// A packet and its payload from the cache.
type Found<'a> = (&'a CacheEntry, &'a [u8]);

/// Consecutively received packets of one encoding. They are looked up and checked once for all
/// subscribers of the track.
pub struct PacketRun<'a> {
    encodings: &'a [Ingest],
    layer: u8,
    format: &'a Format,
    exts: &'a [u64],
    /// The packets that the cache holds.
    packets: [Option<Found<'a>>; RUN_MAX],
    /// All packets are in the cache, and each has content to forward.
    is_whole: bool,
    starts_key_frame: bool,
    lowest: u64,
    highest: u64,
}

impl<'a> PacketRun<'a> {
    /// Makes a run of at most [`RUN_MAX`] packets, `exts`, that `layer` has accepted.
    pub fn new(
        encodings: &'a [Ingest],
        layer: u8,
        exts: &'a [u64],
        format: &'a Format,
    ) -> PacketRun<'a> {
        let mut run = PacketRun {
            encodings,
            layer,
            format,
            exts,
            packets: [None; RUN_MAX],
            is_whole: true,
            starts_key_frame: false,
            lowest: u64::MAX,
            highest: 0,
        };
        for (packet, ext) in run.packets.iter_mut().zip(exts) {
            *packet = encodings[usize::from(layer)].find(*ext);
            run.is_whole &= packet.is_some_and(|(entry, _)| entry.content != PacketContent::Empty);
            run.starts_key_frame |= packet.is_some_and(|(entry, _)| starts_key_frame(entry));
            run.lowest = run.lowest.min(*ext);
            run.highest = run.highest.max(*ext);
        }
        run
    }

    fn packets(&self) -> impl Iterator<Item = Option<Found<'a>>> {
        self.packets.iter().copied().take(self.exts.len())
    }
}

/// Maps packets `[start_in..]` of a layer to outgoing numbers `[start_out..]`, up to the start of
/// the next segment.
#[derive(Clone, Copy, Debug, Default)]
struct Segment {
    start_in: u64,
    start_out: u64,
    rtp_offset: u32,
    picture_offset: u16,
    tl0_offset: u8,
    key_idx_offset: u8,
    layer: u8,
}

impl Segment {
    fn out_of(&self, ext: u64) -> u64 {
        self.start_out + (ext - self.start_in)
    }
}

/// The latest segments, newest first, because most packets need the newest. Their ranges of
/// outgoing numbers do not overlap.
#[derive(Default)]
#[repr(C)]
struct Segments {
    len: u8,
    list: [Segment; SEGMENTS_MAX],
}

impl Segments {
    fn as_slice(&self) -> &[Segment] {
        &self.list[..usize::from(self.len)]
    }

    fn newest(&self) -> Option<&Segment> {
        self.as_slice().first()
    }

    /// Adds a segment. It replaces the newest one if nothing was sent in that one yet.
    fn push(&mut self, segment: Segment) {
        match self.newest() {
            Some(newest) if newest.start_out == segment.start_out => {}
            _ => {
                self.list.copy_within(..SEGMENTS_MAX - 1, 1);
                self.len = (self.len + 1).min(SEGMENTS_MAX as u8);
            }
        }
        self.list[0] = segment;
    }

    /// The segment and outgoing number of a published packet.
    fn of_incoming(&self, layer: u8, ext: u64) -> Option<(Segment, u64)> {
        let list = self.as_slice();
        let at = list
            .iter()
            .position(|segment| segment.layer == layer && segment.start_in <= ext)?;
        let out = list[at].out_of(ext);
        let ends_before = list[..at].last().is_some_and(|next| out >= next.start_out);
        (!ends_before).then_some((list[at], out))
    }

    /// The segment and published number of an outgoing packet.
    fn of_outgoing(&self, out: u64) -> Option<(Segment, u64)> {
        let segment = self
            .as_slice()
            .iter()
            .find(|segment| segment.start_out <= out)?;
        Some((*segment, segment.start_in + (out - segment.start_out)))
    }
}

/// The last packet sent, from which the next segment must continue.
#[derive(Clone, Copy)]
struct Last {
    rtp_time: u32,
    arrival: Time,
    layer: u8,
    rtp_offset: u32,
}

#[derive(Clone, Copy, Default)]
struct LastPicture {
    picture_id: u16,
    tl0_pic_idx: u8,
    key_idx: u8,
}

/// Counts recent retransmissions by packet number. The counts are exact, because a subscriber may
/// ask for anything as often as it likes.
struct Resends {
    recent: Box<[Resent]>,
    /// Two bits for each of the last numbers.
    counts: Box<[u8]>,
    /// First number that has no place in `counts` yet.
    counted_to: u64,
}

#[derive(Clone, Copy, Default)]
struct Resent {
    /// Time of the last retransmission in milliseconds, modulo 2^32.
    at: u32,
    seq: u16,
    known: bool,
}

enum ResendDecision {
    Allowed,
    TooSoon,
    Exhausted,
}

impl Resends {
    fn new(kind: Kind, next_out: u64) -> Resends {
        let (recent, counted) = match kind {
            Kind::Audio => (AUDIO_RESENDS, AUDIO_COUNTED),
            Kind::Video => (VIDEO_RESENDS, VIDEO_COUNTED),
        };
        Resends {
            recent: vec![Resent::default(); recent].into_boxed_slice(),
            counts: vec![0; counted as usize / 4].into_boxed_slice(),
            counted_to: next_out,
        }
    }

    /// Decides about a retransmission of the packet with number `out`, and counts it if it is
    /// allowed. `next_out` is the number after the last one sent. `sent_at` is when the packet was
    /// first sent.
    fn allow(
        &mut self,
        out: u64,
        next_out: u64,
        sent_at: Time,
        now: Time,
        rtt: Duration,
    ) -> ResendDecision {
        self.count_to(next_out);
        let room = self.recent.len();
        let seq = out as u16;
        let place = &mut self.recent[usize::from(seq) % room];
        let millis = now.as_millis() as u32;
        let since = if place.known && place.seq == seq {
            Duration::from_millis(u64::from(millis.wrapping_sub(place.at)))
        } else {
            now.since(sent_at)
        };
        if since < RESEND_DEAF.min(rtt * 2) {
            return ResendDecision::TooSoon;
        }
        *place = Resent {
            at: millis,
            seq,
            known: true,
        };
        let counted = self.counts.len() as u64 * 4;
        let (byte, shift) = self.place_of(out);
        let count = self.counts[byte] >> shift & 3;
        if next_out - out > counted || count >= RESENDS_MAX {
            return ResendDecision::Exhausted;
        }
        self.counts[byte] += 1 << shift;
        ResendDecision::Allowed
    }

    /// Extends the counts up to `next_out`. Each new number starts at zero.
    fn count_to(&mut self, next_out: u64) {
        let counted = self.counts.len() as u64 * 4;
        for out in self.counted_to.max(next_out.saturating_sub(counted))..next_out {
            let (byte, shift) = self.place_of(out);
            self.counts[byte] &= !(3 << shift);
        }
        self.counted_to = self.counted_to.max(next_out);
    }

    fn place_of(&self, out: u64) -> (usize, u64) {
        let place = out % (self.counts.len() as u64 * 4);
        ((place / 4) as usize, place % 4 * 2)
    }
}

/// The retransmission stream (RFC 4588).
struct Rtx {
    header: HeaderTemplate,
    /// ROC << 16 | sequence number of the next packet of this stream.
    index: u64,
}

impl Rtx {
    fn new(ssrc: Ssrc, payload_type: u8, index: u64) -> Result<Box<Rtx>, TemplateError> {
        Ok(Box::new(Rtx {
            header: HeaderTemplate::new(payload_type, ssrc)?,
            index,
        }))
    }
}

/// A header with room for an audio level, and the position of the level.
type LeveledHeader = (HeaderTemplate<LEVELED_HEADER_LEN>, ExtensionSlot);

/// Makes such a header if audio levels were agreed on.
fn leveled_header(
    kind: Kind,
    payload_type: u8,
    parameters: &SubscriptionParameters,
) -> Result<Option<LeveledHeader>, TemplateError> {
    let level_id = parameters
        .extensions
        .id(Extension::AudioLevel)
        .filter(|_| kind == Kind::Audio);
    level_id
        .map(|id| {
            let mut header = HeaderTemplate::with_room(payload_type, parameters.ssrc)?;
            let slot = header.push_extension(id, &[0])?;
            Ok((header, slot))
        })
        .transpose()
}

/// Position at which a stream ended. A stream that uses the SSRC again with the same keys must
/// continue from there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndedStream {
    pub ssrc: Ssrc,
    pub next_index: u64,
}

/// Streams of one connection that have ended, the latest last. The lobby never uses an SSRC again
/// ([`super::MediaCommand::Unsubscribe`]), so this only guards against one that comes again soon.
/// Older entries are forgotten.
#[derive(Default)]
pub struct EndedStreams(VecDeque<EndedStream>);

/// More streams than one exchange of descriptions ends and begins again.
pub const ENDED_STREAMS_MAX: usize = 64;

impl EndedStreams {
    pub fn push(&mut self, ended: EndedStream) {
        if self.0.len() == ENDED_STREAMS_MAX {
            self.0.pop_front();
        }
        self.0.push_back(ended);
    }

    pub fn next_index(&self, ssrc: Ssrc) -> Option<u64> {
        self.0
            .iter()
            .find(|ended| ended.ssrc == ssrc)
            .map(|ended| ended.next_index)
    }

    /// Forgets where a stream ended, because it continues.
    pub fn forget(&mut self, ssrc: Ssrc) {
        self.0.retain(|ended| ended.ssrc != ssrc);
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

/// The parts of a packet before it is written.
struct Parts<'a> {
    /// VP8 descriptor as the subscriber gets it. The next field holds its bytes.
    sent: Option<Vp8Descriptor>,
    descriptor: [u8; Vp8Descriptor::MAX_LEN],
    descriptor_len: usize,
    payload: &'a [u8],
    level: Option<u8>,
    /// Payload type to send with, if the payload is RED.
    red_payload_type: Option<u8>,
}

/// The fields that every packet needs come first, on as few cache lines as possible, because
/// thousands of subscriptions are processed in turn ([`ForwardedSubscription::prefetch`]).
#[repr(C, align(64))]
pub struct ForwardedSubscription {
    header: HeaderTemplate<HEADER_LEN>,
    leveled_header: Option<LeveledHeader>,
    codec: Codec,
    /// Payload type of RED, if the subscriber accepts RED.
    red_payload_type: Option<u8>,
    selection: Selection,
    /// The layer that is being sent.
    current: Option<u8>,
    /// The layer to send. It takes over at its next key frame.
    target: Option<u8>,
    /// Waits for a key frame: to begin, to switch, or because the subscriber asked for one.
    wants_key_frame: bool,
    last_picture: Option<LastPicture>,
    octets: u32,
    /// ROC << 16 | sequence number of the next packet to send.
    next_out: u64,
    packets: u64,
    bytes: u64,
    last: Option<Last>,
    segments: Segments,
    // The fields from here on are not read for a packet, except to begin with it.
    pub id: SubscriptionId,
    /// Slots of its connection and its track.
    pub transport: u32,
    pub track: u32,
    rtx_ssrc: Option<Ssrc>,
    rtx: Option<Box<Rtx>>,
    /// Seed of the first timestamp and picture id.
    origin: u64,
    resends: Resends,
    rtt: Option<Duration>,
    pub sender_report_at: Time,
    resent: u64,
    nacks: u64,
    plis: u64,
    switches: u64,
    reported_lost: i32,
}

/// Bytes from the start of a [`ForwardedSubscription`] to the end of its newest segment.
const HOT_BYTES: usize =
    offset_of!(ForwardedSubscription, segments) + offset_of!(Segments, list) + size_of::<Segment>();

impl ForwardedSubscription {
    /// Makes a subscription. `seed` determines the first numbers; `ended` holds the streams that
    /// this connection carried before. Returns an error if the negotiated payload types or
    /// extension ids are invalid.
    pub fn new(
        id: SubscriptionId,
        transport: u32,
        track: u32,
        codec: Codec,
        parameters: &SubscriptionParameters,
        seed: u64,
        ended: &EndedStreams,
    ) -> Result<ForwardedSubscription, TemplateError> {
        let kind = codec.kind();
        let payload_type = parameters.payloads.plain_payload_type();
        let header = HeaderTemplate::with_room(payload_type, parameters.ssrc)?;
        let leveled_header = leveled_header(kind, payload_type, parameters)?;
        let origin = scatter(seed ^ u64::from(parameters.ssrc.0));
        // Below 2^15, so that the SRTP index is guessed right even if the first packets are lost
        // (RFC 3711, section 3.3.1).
        let first_index = |ssrc: Ssrc| {
            let fresh = scatter(seed ^ u64::from(ssrc.0)) >> 49;
            ended.next_index(ssrc).unwrap_or(fresh)
        };
        let rtx = parameters.rtx_ssrc.zip(parameters.rtx_payload_type);
        let rtx = rtx
            .map(|(ssrc, payload_type)| Rtx::new(ssrc, payload_type, first_index(ssrc)))
            .transpose()?;
        let next_out = first_index(parameters.ssrc);
        Ok(ForwardedSubscription {
            id,
            transport,
            track,
            codec,
            red_payload_type: Some(parameters.payloads)
                .filter(|payloads| payloads.codec == Codec::Red)
                .map(|payloads| check_payload_type(payloads.payload_type))
                .transpose()?,
            header,
            leveled_header,
            rtx_ssrc: rtx.as_ref().map(|rtx| rtx.header.ssrc()),
            rtx,
            selection: parameters.selection,
            current: None,
            target: None,
            wants_key_frame: false,
            segments: Segments::default(),
            next_out,
            origin,
            last: None,
            last_picture: None,
            resends: Resends::new(kind, next_out),
            rtt: None,
            sender_report_at: Time::ZERO,
            packets: 0,
            bytes: 0,
            octets: 0,
            resent: 0,
            nacks: 0,
            plis: 0,
            switches: 0,
            reported_lost: 0,
        })
    }

    /// Prefetches what a packet needs into the CPU cache. It reads nothing, so it never waits.
    pub fn prefetch(&self) {
        net::prefetch(self, HOT_BYTES);
    }

    pub fn ssrc(&self) -> Ssrc {
        self.header.ssrc()
    }

    pub fn rtx_ssrc(&self) -> Option<Ssrc> {
        self.rtx_ssrc
    }

    /// Positions at which its streams stop when the subscription ends.
    pub fn ended_streams(&self) -> impl Iterator<Item = EndedStream> {
        let media = EndedStream {
            ssrc: self.ssrc(),
            next_index: self.next_out,
        };
        let rtx = self.rtx.as_ref().map(|rtx| EndedStream {
            ssrc: rtx.header.ssrc(),
            next_index: rtx.index,
        });
        [Some(media), rtx].into_iter().flatten()
    }

    pub fn set_selection(&mut self, selection: Selection) {
        self.selection = selection;
    }

    /// Chooses the layer again. Returns the layer whose key frame is needed now.
    pub fn choose_layer(&mut self, encodings: &[Ingest]) -> Option<u8> {
        let chosen = select::choose(self.selection, encodings.len(), |layer| {
            encodings[layer].activity.is_active()
        });
        if !self.selection.enabled {
            self.current = None;
            self.target = None;
            self.wants_key_frame = false;
            return None;
        }
        if chosen == self.target {
            return None;
        }
        // If no layer is being sent, the layer that was sent may still continue.
        self.target = chosen.or(self.current);
        self.wants_key_frame =
            !self.codec.begins_anywhere() && self.target.is_some() && self.target != self.current;
        self.key_frame_layer()
    }

    /// Handles a key frame request from the subscriber, or a subscriber that has just connected.
    /// Returns the layer whose key frame is needed.
    pub fn request_key_frame(&mut self) -> Option<u8> {
        self.wants_key_frame = !self.codec.begins_anywhere() && self.target.is_some();
        self.key_frame_layer()
    }

    pub fn count_key_frame_request(&mut self) {
        self.plis += 1;
    }

    /// The layer whose key frame the subscription waits for.
    pub fn key_frame_layer(&self) -> Option<u8> {
        self.target.filter(|_| self.wants_key_frame)
    }

    /// Sends the packets of a run that this subscriber is to get.
    pub fn forward<I: Outgoing>(&mut self, run: &PacketRun<'_>, wire: &mut ForwardWire<'_, I>) {
        let mut burst = Burst::default();
        match self.segment_of(run) {
            Some(segment) => {
                self.wants_key_frame &= !(run.starts_key_frame && self.target == Some(run.layer));
                for (entry, payload) in run.packets().flatten() {
                    self.send_as(
                        entry,
                        payload,
                        &segment,
                        segment.out_of(entry.ext),
                        &mut burst,
                        wire,
                    );
                }
            }
            None => self.forward_each(run, &mut burst, wire),
        }
        burst.finish(wire);
    }

    /// The newest segment, if the whole run belongs to it. Then the subscriber is in the middle of
    /// this layer, and no packet needs a decision of its own.
    fn segment_of(&self, run: &PacketRun<'_>) -> Option<Segment> {
        let goes_on = run.is_whole
            && self.selection.enabled
            && self.current == Some(run.layer)
            && !self.is_restart(run.layer, run.highest);
        let newest = self.segments.newest().filter(|_| goes_on)?;
        (newest.layer == run.layer && newest.start_in <= run.lowest).then_some(*newest)
    }

    /// Decides about each packet on its own.
    fn forward_each<I: Outgoing>(
        &mut self,
        run: &PacketRun<'_>,
        burst: &mut Burst,
        wire: &mut ForwardWire<'_, I>,
    ) {
        let (encoding, layer) = (&run.encodings[usize::from(run.layer)], run.layer);
        for (at, (ext, found)) in run.exts.iter().zip(run.packets()).enumerate() {
            let Some((entry, payload)) = found else {
                wire.statistics.withheld_late += 1;
                continue;
            };
            match self.admit(run, entry, wire.statistics) {
                Admission::Withheld => {}
                Admission::Placed => self.send(entry, payload, layer, burst, wire),
                Admission::Begins => {
                    // Later packets of the key frame may have arrived before its first one. They
                    // were of no use until now.
                    let newest = encoding.highest().unwrap_or(*ext);
                    for (entry, payload) in (*ext..=newest).filter_map(|ext| encoding.find(ext)) {
                        if entry.content != PacketContent::Empty
                            || self.skip(entry.ext, layer, wire.statistics) == Admission::Placed
                        {
                            wire.statistics.media_out_recalled +=
                                u64::from(!run.exts[at..].contains(&entry.ext));
                            self.send(entry, payload, layer, burst, wire);
                        }
                    }
                    let older = run.exts[at + 1..]
                        .iter()
                        .filter(|later| *later < ext)
                        .count();
                    wire.statistics.withheld_late += older as u64;
                    break;
                }
            }
        }
    }

    /// Decides about one packet, and starts a segment if needed.
    fn admit(
        &mut self,
        run: &PacketRun<'_>,
        entry: &CacheEntry,
        statistics: &mut RouterStatistics,
    ) -> Admission {
        let (encodings, layer, format) = (run.encodings, run.layer, run.format);
        if !self.selection.enabled {
            statistics.withheld_disabled += 1;
            return Admission::Withheld;
        }
        if self.current == Some(layer) && self.is_restart(layer, entry.ext) {
            self.current = None;
            self.wants_key_frame = !self.codec.begins_anywhere();
        }
        let starts_key_frame = starts_key_frame(entry);
        let is_recent = is_recent(&encodings[usize::from(layer)], entry, format);
        let may_begin = self.target == Some(layer)
            && is_recent
            && (starts_key_frame || self.codec.begins_anywhere())
            && entry.content != PacketContent::Empty;
        if self.current != Some(layer) && may_begin {
            self.begin(encodings, layer, entry, format);
            return Admission::Begins;
        }
        if self.current != Some(layer) {
            let counter = if self.current.is_none() && self.target == Some(layer) {
                &mut statistics.withheld_key_frame
            } else {
                &mut statistics.withheld_layer
            };
            *counter += 1;
            return Admission::Withheld;
        }
        if entry.content == PacketContent::Empty {
            return self.skip(entry.ext, layer, statistics);
        }
        if starts_key_frame {
            self.wants_key_frame &= self.target != Some(layer);
        }
        Admission::Placed
    }

    fn is_restart(&self, layer: u8, ext: u64) -> bool {
        let newest = self
            .segments
            .newest()
            .filter(|newest| newest.layer == layer && newest.start_in <= ext);
        newest.is_some_and(|newest| newest.out_of(ext) > self.next_out + RESTART)
    }

    /// Starts a segment: from this packet on the subscriber gets `layer`.
    fn begin(&mut self, encodings: &[Ingest], layer: u8, entry: &CacheEntry, format: &Format) {
        let rtp_offset = self.rtp_offset(encodings, layer, entry, format);
        let mut segment = Segment {
            start_in: entry.ext,
            start_out: self.next_out,
            rtp_offset,
            layer,
            ..Segment::default()
        };
        if let PacketContent::Vp8 { descriptor, .. } = entry.content {
            let next = match self.last_picture {
                Some(last) => LastPicture {
                    picture_id: last.picture_id.wrapping_add(1),
                    tl0_pic_idx: last.tl0_pic_idx.wrapping_add(1),
                    key_idx: last.key_idx.wrapping_add(1),
                },
                None => LastPicture {
                    picture_id: (self.origin >> 32) as u16,
                    tl0_pic_idx: (self.origin >> 48) as u8,
                    key_idx: (self.origin >> 56) as u8,
                },
            };
            segment.picture_offset = next
                .picture_id
                .wrapping_sub(descriptor.picture_id.map_or(0, PictureId::value));
            segment.tl0_offset = next
                .tl0_pic_idx
                .wrapping_sub(descriptor.tl0_pic_idx.unwrap_or(0));
            segment.key_idx_offset = next.key_idx.wrapping_sub(descriptor.key_idx.unwrap_or(0));
        }
        self.switches += u64::from(self.last.is_some_and(|last| last.layer != layer));
        self.segments.push(segment);
        self.current = Some(layer);
        self.wants_key_frame = false;
    }

    /// Offset to add to the packet's timestamp, so that the outgoing stream's clock continues in
    /// step with the publisher's.
    fn rtp_offset(
        &self,
        encodings: &[Ingest],
        layer: u8,
        entry: &CacheEntry,
        format: &Format,
    ) -> u32 {
        let Some(last) = self.last else {
            return (mixed(self.origin) as u32).wrapping_sub(entry.rtp_time);
        };
        let ticks = |time: Duration| {
            (time.as_nanos() * u128::from(format.clock_rate()) / 1_000_000_000) as u32
        };
        let by_arrival = last
            .rtp_time
            .wrapping_add(ticks(entry.arrival.since(last.arrival)));
        let offset = if last.layer == layer {
            Some(last.rtp_offset)
        } else {
            offset_between(encodings, last.layer, layer, format)
                .map(|between| last.rtp_offset.wrapping_add(between))
        };
        let believed = offset
            .map(|offset| entry.rtp_time.wrapping_add(offset))
            .filter(|rtp_time| {
                (rtp_time.wrapping_sub(by_arrival) as i32).unsigned_abs() <= ticks(CLOCK_ERROR_MAX)
            });
        let rtp_time = believed.unwrap_or(by_arrival);
        let ahead = rtp_time.wrapping_sub(last.rtp_time) as i32;
        let rtp_time = if ahead > 0 {
            rtp_time
        } else {
            last.rtp_time.wrapping_add(1)
        };
        rtp_time.wrapping_sub(entry.rtp_time)
    }

    /// Leaves a packet out without a gap in the numbers. If it comes too late for that, padding
    /// takes its number.
    fn skip(&mut self, ext: u64, layer: u8, statistics: &mut RouterStatistics) -> Admission {
        let Some((segment, out)) = self.segments.of_incoming(layer, ext) else {
            statistics.withheld_late += 1;
            return Admission::Withheld;
        };
        if out < self.next_out {
            return Admission::Placed;
        }
        self.segments.push(Segment {
            start_in: ext + 1,
            start_out: out,
            ..segment
        });
        self.next_out = out;
        statistics.withheld_empty += 1;
        Admission::Withheld
    }

    /// Sends one packet under its number, if it still has one.
    fn send<I: Outgoing>(
        &mut self,
        entry: &CacheEntry,
        payload: &[u8],
        layer: u8,
        burst: &mut Burst,
        wire: &mut ForwardWire<'_, I>,
    ) {
        match self.segments.of_incoming(layer, entry.ext) {
            Some((segment, out)) => self.send_as(entry, payload, &segment, out, burst, wire),
            None => wire.statistics.withheld_late += 1,
        }
    }

    /// Writes, seals and sends one packet with the sequence number `out`.
    fn send_as<I: Outgoing>(
        &mut self,
        entry: &CacheEntry,
        payload: &[u8],
        segment: &Segment,
        out: u64,
        burst: &mut Burst,
        wire: &mut ForwardWire<'_, I>,
    ) {
        let Some(parts) = self.parts(entry, payload, segment) else {
            return;
        };
        let len = self.media_len(&parts);
        let size = len + wire.sealer.profile().rtp_overhead();
        burst.make_room(size, wire);
        let Some(buffer) = wire.io.lend().get_mut(burst.len..burst.len + size) else {
            return;
        };
        let rtp_time = entry.rtp_time.wrapping_add(segment.rtp_offset);
        let Some(header_len) = self.write_media(&parts, entry.marker, out, rtp_time, buffer) else {
            return;
        };
        let Ok(sealed) = wire.sealer.seal_rtp(buffer, header_len, len, out) else {
            return;
        };
        burst.push(sealed, wire);
        wire.statistics.media_out += 1;
        wire.statistics.media_bytes_out += len as u64;
        self.packets += 1;
        self.bytes += len as u64;
        self.octets = self.octets.wrapping_add((len - header_len) as u32);
        self.note_sent(entry, segment, parts.sent, out, rtp_time);
    }

    fn note_sent(
        &mut self,
        entry: &CacheEntry,
        segment: &Segment,
        sent: Option<Vp8Descriptor>,
        out: u64,
        rtp_time: u32,
    ) {
        self.next_out = self.next_out.max(out + 1);
        let newer = self
            .last
            .is_none_or(|last| rtp_time.wrapping_sub(last.rtp_time) as i32 >= 0);
        if newer {
            self.last = Some(Last {
                rtp_time,
                arrival: entry.arrival,
                layer: segment.layer,
                rtp_offset: segment.rtp_offset,
            });
        }
        if let Some(sent) = sent {
            let last = self.last_picture.unwrap_or_default();
            let picture_id = sent.picture_id.map_or(last.picture_id, PictureId::value);
            let newer = self.last_picture.is_none()
                || picture_id.wrapping_sub(last.picture_id) & 0x7FFF < 0x4000;
            if newer {
                self.last_picture = Some(LastPicture {
                    picture_id,
                    tl0_pic_idx: sent.tl0_pic_idx.unwrap_or(last.tl0_pic_idx),
                    key_idx: sent.key_idx.unwrap_or(last.key_idx),
                });
            }
        }
    }

    /// Splits a packet into its parts. A subscriber without RED gets only the primary block of a
    /// RED packet, as with LiveKit.
    fn parts<'a>(
        &self,
        entry: &CacheEntry,
        payload: &'a [u8],
        segment: &Segment,
    ) -> Option<Parts<'a>> {
        let mut parts = Parts {
            sent: None,
            descriptor: [0; Vp8Descriptor::MAX_LEN],
            descriptor_len: 0,
            payload,
            level: None,
            red_payload_type: None,
        };
        match entry.content {
            PacketContent::Audio { level, primary_at } => {
                parts.level = level;
                parts.red_payload_type = self.red_payload_type.filter(|_| primary_at > 0);
                if parts.red_payload_type.is_none() {
                    parts.payload = payload.get(usize::from(primary_at)..)?;
                }
            }
            PacketContent::Vp8 {
                descriptor,
                descriptor_len,
                ..
            } => {
                let sent = rewritten(descriptor, segment);
                parts.descriptor_len = sent.write(&mut parts.descriptor)?;
                parts.sent = Some(sent);
                parts.payload = payload.get(usize::from(descriptor_len)..)?;
            }
            PacketContent::Empty => parts.payload = &[],
        }
        Some(parts)
    }

    /// Length of header and payload of a media packet, before it is sealed.
    fn media_len(&self, parts: &Parts<'_>) -> usize {
        let header_len = match (&self.leveled_header, parts.level) {
            (Some((header, _)), Some(_)) => header.len(),
            _ => self.header.len(),
        };
        header_len + parts.len()
    }

    /// Writes header and payload, and returns the length of the header.
    fn write_media(
        &self,
        parts: &Parts<'_>,
        marker: bool,
        out: u64,
        rtp_time: u32,
        buffer: &mut [u8],
    ) -> Option<usize> {
        let seq = Seq(out as u16);
        let header_len = match (&self.leveled_header, parts.level) {
            (Some((header, slot)), Some(level)) => {
                let header_len = header.write(buffer, marker, seq, rtp_time)?;
                slot.patch(buffer, &[level]);
                header_len
            }
            _ => self.header.write(buffer, marker, seq, rtp_time)?,
        };
        if parts.is_filler() {
            buffer[0] |= PADDING_FLAG;
        }
        let payload = buffer.get_mut(header_len..)?;
        parts.write(payload)?;
        if let Some(red) = parts.red_payload_type {
            // The publisher may use other payload types for the blocks.
            red::set_payload_types(payload, self.header.payload_type());
            set_payload_type(buffer, red);
        }
        Some(header_len)
    }

    /// Retransmits packets that the subscriber reports as missing.
    pub fn handle_nack<I: Outgoing>(
        &mut self,
        encodings: &[Ingest],
        seqs: impl Iterator<Item = Seq>,
        wire: &mut ForwardWire<'_, I>,
    ) {
        self.nacks += 1;
        wire.statistics.nacks_in += 1;
        for seq in seqs.take(NACKED_MAX) {
            wire.statistics.nacked_in += 1;
            self.resend(encodings, seq, wire);
        }
    }

    fn resend<I: Outgoing>(
        &mut self,
        encodings: &[Ingest],
        seq: Seq,
        wire: &mut ForwardWire<'_, I>,
    ) {
        let back = u64::from((self.next_out as u16).wrapping_sub(seq.0));
        let out = self
            .next_out
            .checked_sub(back)
            .filter(|_| (1..1 << 15).contains(&back));
        let found = out.and_then(|out| {
            let (segment, ext) = self.segments.of_outgoing(out)?;
            let (entry, payload) = encodings.get(usize::from(segment.layer))?.find(ext)?;
            Some((out, segment, entry, payload))
        });
        let Some((out, segment, entry, payload)) = found else {
            wire.statistics.resends_unknown += 1;
            return;
        };
        let rtt = self.rtt.unwrap_or(RTT_UNKNOWN);
        match self
            .resends
            .allow(out, self.next_out, entry.arrival, wire.now, rtt)
        {
            ResendDecision::TooSoon => wire.statistics.resends_too_soon += 1,
            ResendDecision::Exhausted => wire.statistics.resends_exhausted += 1,
            ResendDecision::Allowed => {
                let sent = self.send_again(entry, payload, &segment, out, wire);
                if let Some(bytes) = sent {
                    self.resent += 1;
                    wire.statistics.resends_out += 1;
                    wire.statistics.resend_bytes_out += bytes as u64;
                }
            }
        }
    }

    /// Retransmits over RTX if that was agreed. Otherwise it sends the same packet again, which
    /// SRTP seals to the same bytes.
    fn send_again<I: Outgoing>(
        &mut self,
        entry: &CacheEntry,
        payload: &[u8],
        segment: &Segment,
        out: u64,
        wire: &mut ForwardWire<'_, I>,
    ) -> Option<usize> {
        let parts = self.parts(entry, payload, segment)?;
        let rtp_time = entry.rtp_time.wrapping_add(segment.rtp_offset);
        let buffer = wire.io.lend();
        let (header_len, len, index) = match self.rtx.as_mut().filter(|_| !parts.is_filler()) {
            Some(rtx) => {
                let index = rtx.index;
                rtx.index += 1;
                let header_len =
                    rtx.header
                        .write(buffer, entry.marker, Seq(index as u16), rtp_time)?;
                let osn = write_rtx_osn(buffer.get_mut(header_len..)?, Seq(out as u16))?;
                let len = header_len + osn + parts.write(buffer.get_mut(header_len + osn..)?)?;
                (header_len, len, index)
            }
            None => {
                let header_len = self.write_media(&parts, entry.marker, out, rtp_time, buffer)?;
                (header_len, self.media_len(&parts), out)
            }
        };
        let sealed = wire.sealer.seal_rtp(buffer, header_len, len, index).ok()?;
        wire.transmit(sealed, sealed);
        Some(len)
    }

    pub fn handle_report_block(&mut self, block: &ReportBlock, rtt: Option<Duration>) {
        self.reported_lost = block.cumulative_lost;
        self.rtt = rtt.or(self.rtt);
    }

    /// Content of a sender report at this moment. `None` while nothing has been sent, or the
    /// publisher has not reported its clock.
    ///
    /// `publisher_ntp` is the publisher's wall clock at this moment, in nanoseconds since 1900;
    /// `ntp` is our wall clock.
    pub fn sender_info(
        &self,
        encodings: &[Ingest],
        format: &Format,
        publisher_ntp: i64,
        ntp: u64,
    ) -> Option<SenderInfo> {
        let segment = self.segments.newest().filter(|_| self.packets > 0)?;
        let clock = encodings.get(usize::from(segment.layer))?.clock()?;
        Some(SenderInfo {
            ssrc: self.ssrc(),
            ntp,
            rtp_time: clock
                .rtp_time_at(publisher_ntp, format.clock_rate())
                .wrapping_add(segment.rtp_offset),
            packets: self.packets as u32,
            octets: self.octets,
        })
    }

    pub fn statistics(&self) -> SubscriptionStatistics {
        SubscriptionStatistics {
            subscription: self.id,
            packets: self.packets,
            bytes: self.bytes,
            resends: self.resent,
            nacks: self.nacks,
            plis: self.plis,
            layer: self.current,
            layer_switches: self.switches,
            reported_lost: self.reported_lost,
            rtt: self.rtt,
        }
    }
}

/// Decision about a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Admission {
    Withheld,
    /// The packet has its place in a segment.
    Placed,
    /// The packet starts a new segment.
    Begins,
}

fn starts_key_frame(entry: &CacheEntry) -> bool {
    matches!(
        entry.content,
        PacketContent::Vp8 {
            starts_key_frame: true,
            ..
        }
    )
}

/// Whether a subscriber may begin with a packet, because it soon catches up with the newest one.
fn is_recent(encoding: &Ingest, entry: &CacheEntry, format: &Format) -> bool {
    let Some((newest, _)) = encoding.highest().and_then(|newest| encoding.find(newest)) else {
        return true;
    };
    let behind = newest.rtp_time.wrapping_sub(entry.rtp_time) as i32;
    let limit = CATCH_UP_TIME_MAX.as_millis() as i64 * i64::from(format.clock_rate()) / 1_000;
    newest.ext.saturating_sub(entry.ext) <= CATCH_UP_MAX
        && (format.payloads.codec.begins_anywhere() || i64::from(behind) <= limit)
}

/// Difference to add to timestamps of layer `to`, beyond the offset of layer `from`, so that both
/// are on one clock. It comes from the sender reports of both layers.
fn offset_between(encodings: &[Ingest], from: u8, to: u8, format: &Format) -> Option<u32> {
    let from = encodings.get(usize::from(from))?.clock()?;
    let to = encodings.get(usize::from(to))?.clock()?;
    Some(
        from.rtp_time_at(to.ntp_nanos, format.clock_rate())
            .wrapping_sub(to.rtp_time),
    )
}

fn rewritten(descriptor: Vp8Descriptor, segment: &Segment) -> Vp8Descriptor {
    Vp8Descriptor {
        picture_id: descriptor
            .picture_id
            .map(|id| PictureId::Long(id.value().wrapping_add(segment.picture_offset) & 0x7FFF)),
        tl0_pic_idx: descriptor
            .tl0_pic_idx
            .map(|idx| idx.wrapping_add(segment.tl0_offset)),
        key_idx: descriptor
            .key_idx
            .map(|idx| idx.wrapping_add(segment.key_idx_offset) & 0x1F),
        ..descriptor
    }
}

impl Parts<'_> {
    /// Whether there is nothing to forward, but the sequence number must not be missing.
    fn is_filler(&self) -> bool {
        self.descriptor_len == 0 && self.payload.is_empty()
    }

    fn len(&self) -> usize {
        if self.is_filler() {
            FILLER_BYTES
        } else {
            self.descriptor_len + self.payload.len()
        }
    }

    /// Writes what follows the header, and returns its length.
    fn write(&self, out: &mut [u8]) -> Option<usize> {
        let out = out.get_mut(..self.len())?;
        if self.is_filler() {
            out.fill(0);
            *out.last_mut()? = FILLER_BYTES as u8;
        } else {
            let (descriptor, payload) = out.split_at_mut(self.descriptor_len);
            descriptor.copy_from_slice(&self.descriptor[..self.descriptor_len]);
            payload.copy_from_slice(self.payload);
        }
        Some(out.len())
    }
}

const PADDING_FLAG: u8 = 0x20;

/// Packets that are sent with one call. All are as long as the first, except the last, which may be
/// shorter.
#[derive(Default)]
struct Burst {
    len: usize,
    segment: usize,
    count: usize,
    closed: bool,
}

impl Burst {
    /// Prepares for a packet of `size` bytes: sends the waiting packets first if it cannot join
    /// them.
    fn make_room<I: Outgoing>(&mut self, size: usize, wire: &mut ForwardWire<'_, I>) {
        let joins = !self.closed
            && size <= self.segment
            && self.count < net::SEGMENTS_MAX
            && self.len + size <= net::SEND_BYTES_MAX;
        if !joins {
            self.finish(wire);
        }
    }

    fn push<I: Outgoing>(&mut self, size: usize, wire: &mut ForwardWire<'_, I>) {
        if self.count == 0 {
            self.segment = size;
        }
        self.closed = size < self.segment;
        self.len += size;
        self.count += 1;
        if wire.send == SendMode::Plain {
            self.finish(wire);
        }
    }

    fn finish<I: Outgoing>(&mut self, wire: &mut ForwardWire<'_, I>) {
        if self.count > 0 {
            wire.transmit(self.len, self.segment);
            wire.statistics.media_sends_out += 1;
            *self = Burst::default();
        }
    }
}

impl<I: Outgoing> ForwardWire<'_, I> {
    fn transmit(&mut self, len: usize, segment: usize) {
        self.io.send(self.to, len, segment);
        self.statistics.datagrams_out += len.div_ceil(segment) as u64;
        self.statistics.bytes_out += len as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(layer: u8, start_in: u64, start_out: u64) -> Segment {
        Segment {
            layer,
            start_in,
            start_out,
            ..Segment::default()
        }
    }

    #[test]
    fn every_outgoing_number_belongs_to_one_published_packet() {
        let mut segments = Segments::default();
        assert!(segments.of_incoming(0, 5).is_none() && segments.of_outgoing(5).is_none());
        let pushed = [
            segment(0, 100, 10),
            segment(1, 500, 40),
            segment(0, 150, 60),
            segment(0, 170, 75),
        ];
        pushed
            .into_iter()
            .for_each(|segment| segments.push(segment));
        let incoming = |layer, ext| segments.of_incoming(layer, ext).map(|(_, out)| out);
        for (layer, ext, out) in [
            (0, 99, None),
            (0, 100, Some(10)),
            (0, 129, Some(39)),
            (0, 130, None),
            (1, 519, Some(59)),
            (1, 520, None),
            (0, 150, Some(60)),
            (0, 164, Some(74)),
            (0, 165, None),
            (0, 170, Some(75)),
            (0, 1_000, Some(905)),
        ] {
            assert_eq!(incoming(layer, ext), out, "{layer} {ext}");
            if let Some(out) = out {
                let (segment, back) = segments.of_outgoing(out).unwrap();
                assert_eq!((segment.layer, back), (layer, ext));
            }
        }
    }

    #[test]
    fn the_oldest_segments_are_forgotten_and_empty_ones_replaced() {
        let mut segments = Segments::default();
        for step in 0..20 {
            segments.push(segment(0, 1_000 + step, 7));
        }
        assert_eq!(segments.as_slice().len(), 1);
        for step in 0..20 {
            segments.push(segment(0, 2_000 + step * 10, 10 + step * 9));
        }
        assert_eq!(segments.as_slice().len(), SEGMENTS_MAX);
        assert!(segments.of_outgoing(10 + 11 * 9).is_none());
        assert_eq!(segments.of_outgoing(10 + 12 * 9).unwrap().1, 2_120);
    }

    #[test]
    fn no_packet_is_resent_more_than_three_times_however_it_is_asked_for() {
        let mut resends = Resends::new(Kind::Video, 1_000);
        let mut counts = std::collections::BTreeMap::new();
        let mut chance = crate::seeded::Seeded::new(3);
        let (mut next_out, mut exhausted) = (1_000u64, 0);
        for round in 0..200_000u64 {
            next_out += u64::from(round % 50 == 0) * (1 + chance.below(3));
            // The numbers requested in turn share entries. No minimum time holds the subscriber
            // back, because it claims a very short round trip.
            let out = next_out - 1 - (chance.below(12) * 64).min(next_out - 1_001).min(600);
            match resends.allow(
                out,
                next_out,
                Time::ZERO,
                Time::from_millis(round),
                Duration::ZERO,
            ) {
                ResendDecision::Allowed => *counts.entry(out).or_insert(0) += 1,
                ResendDecision::Exhausted => exhausted += 1,
                ResendDecision::TooSoon => panic!("there is no rest"),
            }
        }
        assert!(counts.values().all(|count| *count <= RESENDS_MAX) && exhausted > 0);
        assert!(
            counts
                .values()
                .filter(|count| **count == RESENDS_MAX)
                .count()
                > 1_000
        );
    }

    #[test]
    fn what_a_packet_needs_of_a_subscription_is_three_cache_lines() {
        assert!(
            HOT_BYTES <= 3 * 64 && align_of::<ForwardedSubscription>() == 64,
            "{HOT_BYTES}"
        );
    }

    #[test]
    fn a_subscription_to_audio_is_small() {
        let bytes = size_of::<ForwardedSubscription>()
            + AUDIO_RESENDS * size_of::<Resent>()
            + AUDIO_COUNTED as usize / 4;
        assert!(bytes < 1_024, "{bytes}");
    }
}
