//! One published encoding (one SSRC, and that of its retransmissions). Its packets are decrypted,
//! ordered, kept for its subscribers, and reported on to its publisher.

use crate::transport::rtp::Ssrc;
use std::time::Duration;

use super::TrackParameters;
use super::cache::{Cache, CacheEntry, CachedPacket, PacketContent};
use super::select::LayerActivity;
use super::statistics::{EncodingStatistics, RouterStatistics};
use crate::codec::red::RedPayload;
use crate::codec::vp8::{PictureId, Vp8Descriptor};
use crate::codec::{Codec, PayloadTypes};
use crate::measure::Kind;
use crate::transport::receive::{Arrival, NackPoll, ReceiveStream, ReportNumbers, RoundTrip};
use crate::transport::rtp::{Header, split_rtx};
use crate::transport::sdp::Extension;
use crate::transport::sequence::{ReplayWindow, SeqExtender};
use crate::transport::srtp::Opener;
use crate::units::Time;

/// Number of packets kept, within the limit of bytes below: 2.5 s of audio at 20 ms.
const AUDIO_PACKETS: usize = 128;
const VIDEO_PACKETS: usize = 512;
/// Number of bytes kept: 2 s of audio at 64 kb/s, and 2 s of video at 1 Mb/s, or half a second at 4
/// Mb/s.
const AUDIO_BYTES: usize = 16 * 1024;
const VIDEO_BYTES: usize = 256 * 1024;

/// Least time between two key frame requests for a track's only or lowest layer (LiveKit's value).
const KEY_FRAME_INTERVAL: Duration = Duration::from_millis(500);
/// Least time between two key frame requests for a higher layer (LiveKit's value).
const KEY_FRAME_INTERVAL_HIGH: Duration = Duration::from_secs(1);

/// Format that the description gives all encodings of a track.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    pub payloads: PayloadTypes,
    pub rtx_payload_type: Option<u8>,
    /// Id of the RFC 6464 extension, if agreed.
    pub audio_level_id: Option<u8>,
}

/// Context that an encoding needs to handle one packet.
pub struct IngestContext<'a> {
    pub format: &'a Format,
    pub opener: &'a Opener,
    pub arrival: Time,
    pub statistics: &'a mut RouterStatistics,
}

/// Reason why a packet was refused. Each has its own counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusedIngest {
    Malformed,
    Unauthentic,
    Replayed,
    Duplicate,
    TooOld,
}

impl RefusedIngest {
    /// Whether the packet came from the publisher.
    #[inline]
    pub fn is_authentic(self) -> bool {
        match self {
            RefusedIngest::Unauthentic | RefusedIngest::Replayed => false,
            RefusedIngest::Malformed | RefusedIngest::Duplicate | RefusedIngest::TooOld => true,
        }
    }

    #[inline]
    pub fn counter(self, statistics: &mut RouterStatistics) -> &mut u64 {
        match self {
            RefusedIngest::Malformed => &mut statistics.refused_malformed,
            RefusedIngest::Unauthentic => &mut statistics.refused_unauthentic,
            RefusedIngest::Replayed => &mut statistics.refused_replayed,
            RefusedIngest::Duplicate => &mut statistics.refused_duplicate,
            RefusedIngest::TooOld => &mut statistics.refused_too_old,
        }
    }
}

/// Kind of an accepted packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// Media for the subscribers, kept under this unwrapped number.
    Media { ext: u64 },
    /// A retransmission without payload.
    Probe,
}

/// A moment on the sender's clock, from its sender report.
#[derive(Clone, Copy, Debug)]
pub struct SenderClock {
    /// The sender's wall clock, in nanoseconds since 1900.
    pub ntp_nanos: i64,
    pub rtp_time: u32,
}

impl SenderClock {
    /// Returns the RTP time at `ntp_nanos` on the same clock.
    pub fn rtp_time_at(&self, ntp_nanos: i64, clock_rate: u32) -> u32 {
        let elapsed = i128::from(ntp_nanos) - i128::from(self.ntp_nanos);
        let ticks = elapsed * i128::from(clock_rate) / 1_000_000_000;
        self.rtp_time.wrapping_add(ticks as u32)
    }
}

/// Converts an NTP timestamp to nanoseconds since 1900.
pub fn ntp_nanos(ntp: u64) -> i64 {
    ((u128::from(ntp) * 1_000_000_000) >> 32) as i64
}

/// The current SSRC of an encoding, and the SRTP state for it.
#[derive(Default)]
struct IngestSource {
    ssrc: Option<Ssrc>,
    extender: SeqExtender,
    replay: ReplayWindow,
}

impl IngestSource {
    /// Decrypts one datagram in place and returns the length of the plain packet.
    fn open(
        &mut self,
        datagram: &mut [u8],
        header: &Header,
        opener: &Opener,
    ) -> Result<usize, RefusedIngest> {
        let index = self.extender.guess(header.seq.0);
        if !self.replay.check(index) {
            return Err(RefusedIngest::Replayed);
        }
        let Ok(len) = opener.open_rtp(datagram, header.header_len, index) else {
            if self.extender.highest().is_none() {
                // The first packets were lost, and the sequence number wrapped among them: the next
                // packet is tried with the next rollover count.
                self.extender = SeqExtender::at_roc(1);
            } else if self.ssrc.is_none() {
                self.extender = SeqExtender::default();
            }
            return Err(RefusedIngest::Unauthentic);
        };
        self.extender.commit(index);
        self.replay.commit(index);
        self.ssrc = Some(header.ssrc);
        Ok(len)
    }
}

/// One published encoding.
pub struct Ingest {
    pub activity: LayerActivity,
    media: IngestSource,
    rtx: IngestSource,
    receive: ReceiveStream,
    /// Retransmissions have an SSRC of their own.
    has_rtx: bool,
    /// Added to the numbers of `receive`, so that no number of an encoding occurs twice, whatever
    /// SSRC it uses.
    ext_base: u64,
    highest: Option<u64>,
    cache: Cache,
    clock: Option<SenderClock>,
    last_picture_id: Option<u16>,
    last_level: Option<u8>,
    /// A subscriber needs a key frame, as far as is known.
    key_frame_wanted: bool,
    key_frame_asked_at: Option<Time>,
    key_frame_interval: Duration,
    bytes: u64,
    key_frames: u64,
    nacks_sent: u64,
    plis_sent: u64,
}

impl Format {
    pub fn of(parameters: &TrackParameters) -> Format {
        let payloads = parameters.payloads;
        let audio_level_id = parameters.extensions.id(Extension::AudioLevel);
        Format {
            payloads,
            rtx_payload_type: parameters.rtx_payload_type,
            audio_level_id: audio_level_id.filter(|_| payloads.codec.kind() == Kind::Audio),
        }
    }

    pub fn clock_rate(&self) -> u32 {
        self.payloads.codec.clock_rate()
    }
}

impl Ingest {
    /// Makes an encoding. `layer` counts from the lowest; `has_rtx` says that retransmissions have
    /// an SSRC of their own.
    pub fn new(format: &Format, layer: usize, has_rtx: bool) -> Ingest {
        let (packets, bytes) = match format.payloads.codec.kind() {
            Kind::Audio => (AUDIO_PACKETS, AUDIO_BYTES),
            Kind::Video => (VIDEO_PACKETS, VIDEO_BYTES),
        };
        let mut receive = ReceiveStream::new(format.clock_rate());
        receive.set_rtx(has_rtx);
        Ingest {
            activity: LayerActivity::default(),
            media: IngestSource::default(),
            rtx: IngestSource::default(),
            receive,
            has_rtx,
            ext_base: 0,
            highest: None,
            cache: Cache::new(packets, bytes),
            clock: None,
            last_picture_id: None,
            last_level: None,
            key_frame_wanted: false,
            key_frame_asked_at: None,
            key_frame_interval: if layer == 0 {
                KEY_FRAME_INTERVAL
            } else {
                KEY_FRAME_INTERVAL_HIGH
            },
            bytes: 0,
            key_frames: 0,
            nacks_sent: 0,
            plis_sent: 0,
        }
    }

    /// The SSRC of its media; `None` until the first authentic packet.
    pub fn ssrc(&self) -> Option<Ssrc> {
        self.media.ssrc
    }

    pub fn find(&self, ext: u64) -> Option<(&CacheEntry, &[u8])> {
        self.cache.find(ext)
    }

    /// The newest packet's unwrapped number.
    pub fn highest(&self) -> Option<u64> {
        self.highest
    }

    pub fn clock(&self) -> Option<SenderClock> {
        self.clock
    }

    /// Returns the audio level of the last accepted packet, once.
    pub fn take_level(&mut self) -> Option<u8> {
        self.last_level.take()
    }

    /// Decrypts one datagram in place, and keeps its content if it is new.
    pub fn handle_rtp(
        &mut self,
        datagram: &mut [u8],
        header: &Header,
        is_rtx: bool,
        around: &mut IngestContext<'_>,
    ) -> Result<Taken, RefusedIngest> {
        let opener = around.opener;
        let moved = !is_rtx && self.media.ssrc.is_some_and(|ssrc| ssrc != header.ssrc);
        let len = if moved {
            let mut next = IngestSource::default();
            let len = next.open(datagram, header, opener)?;
            self.follow(next, around.format);
            len
        } else {
            let source = if is_rtx {
                &mut self.rtx
            } else {
                &mut self.media
            };
            if is_rtx && source.ssrc.is_some_and(|ssrc| ssrc != header.ssrc) {
                *source = IngestSource::default();
            }
            source.open(datagram, header, opener)?
        };
        let packet = &datagram[..len];
        let payload = header.payload(packet).ok_or(RefusedIngest::Malformed)?;
        if is_rtx {
            let Some((original, payload)) = split_rtx(payload) else {
                return Ok(Taken::Probe);
            };
            self.keep(original.0, header, packet, payload, true, around)
        } else {
            self.keep(header.seq.0, header, packet, payload, false, around)
        }
    }

    /// Switches to another SSRC that the publisher uses for this encoding.
    fn follow(&mut self, source: IngestSource, format: &Format) {
        self.media = source;
        self.receive = ReceiveStream::new(format.clock_rate());
        self.receive.set_rtx(self.has_rtx);
        // Only whole cycles are added. A receive stream leaves its first cycle free, so the new
        // numbers begin above the earlier ones.
        self.ext_base = self.highest.map_or(0, |highest| highest >> 16 << 16);
        self.clock = None;
        self.last_picture_id = None;
    }

    fn keep(
        &mut self,
        seq: u16,
        header: &Header,
        packet: &[u8],
        payload: &[u8],
        repaired: bool,
        around: &mut IngestContext<'_>,
    ) -> Result<Taken, RefusedIngest> {
        let (format, arrival) = (around.format, around.arrival);
        match self
            .receive
            .handle_packet(seq, header.rtp_time, arrival, repaired)
        {
            Arrival::New { .. } | Arrival::Reordered | Arrival::Repaired { .. } => {}
            Arrival::Duplicate => return Err(RefusedIngest::Duplicate),
            Arrival::TooOld => return Err(RefusedIngest::TooOld),
        }
        let agreed = repaired || format.payloads.names(header.payload_type);
        let content = match format.payloads.codec_of(header.payload_type) {
            _ if payload.is_empty() || !agreed => PacketContent::Empty,
            Codec::Vp8 => self.vp8(payload),
            Codec::Opus => self.audio(header, packet, 0, format),
            Codec::Red => match RedPayload::parse(payload) {
                Some(red) => self.audio(header, packet, red.primary_at() as u16, format),
                None => PacketContent::Empty,
            },
        };
        let bytes = (header.header_len + payload.len()) as u64;
        self.bytes += bytes;
        if repaired {
            around.statistics.repairs_in += 1;
            around.statistics.repair_bytes_in += bytes;
        } else {
            around.statistics.media_in += 1;
            around.statistics.media_bytes_in += bytes;
            around.statistics.media_in_empty += u64::from(content == PacketContent::Empty);
        }
        let ext = self.ext_base + self.receive.ext_seq();
        self.highest = self.highest.max(Some(ext));
        self.cache.insert(&CachedPacket {
            ext,
            arrival,
            rtp_time: header.rtp_time,
            marker: header.marker,
            content,
            payload,
        });
        Ok(Taken::Media { ext })
    }

    fn audio(
        &mut self,
        header: &Header,
        packet: &[u8],
        primary_at: u16,
        format: &Format,
    ) -> PacketContent {
        let level = format
            .audio_level_id
            .and_then(|id| header.extension(packet, id)?.first().copied());
        self.last_level = level;
        PacketContent::Audio { level, primary_at }
    }

    /// Classifies a VP8 payload. An invalid one cannot be forwarded, because no receiver could read
    /// it.
    fn vp8(&mut self, payload: &[u8]) -> PacketContent {
        let Some((mut descriptor, len)) = Vp8Descriptor::parse(payload) else {
            return PacketContent::Empty;
        };
        let starts_key_frame = payload
            .get(len..)
            .is_some_and(|vp8| !vp8.is_empty() && descriptor.starts_key_frame(vp8));
        descriptor.picture_id = descriptor
            .picture_id
            .map(|id| PictureId::Long(self.unwrapped(id)));
        if starts_key_frame {
            self.key_frames += 1;
        }
        PacketContent::Vp8 {
            descriptor,
            descriptor_len: len as u8,
            starts_key_frame,
        }
    }

    /// Unwraps a picture id to 15 bits: a 7-bit id continues after its wrap at 128.
    fn unwrapped(&mut self, id: PictureId) -> u16 {
        let id = match id {
            PictureId::Long(id) => id,
            PictureId::Short(id) => {
                let last = self.last_picture_id.unwrap_or(id.into());
                let ahead = (u16::from(id).wrapping_sub(last) & 0x7F) as i16;
                let step = if ahead < 64 { ahead } else { ahead - 128 };
                last.wrapping_add_signed(step) & 0x7FFF
            }
        };
        let newer = self
            .last_picture_id
            .is_none_or(|last| id.wrapping_sub(last) & 0x7FFF < 0x4000);
        if newer {
            self.last_picture_id = Some(id);
        }
        id
    }

    pub fn handle_sender_report(&mut self, ntp: u64, rtp_time: u32, arrival: Time) {
        self.receive.handle_sender_report(ntp, arrival);
        self.clock = Some(SenderClock {
            ntp_nanos: ntp_nanos(ntp),
            rtp_time,
        });
    }

    /// When [`Ingest::poll_nack`] is due.
    pub fn next_nack_at(&self) -> Time {
        self.receive.next_nack_at()
    }

    /// Writes the sequence numbers to request from the publisher now; see
    /// [`ReceiveStream::poll_nack`].
    pub fn poll_nack(&mut self, now: Time, rtt: RoundTrip, out: &mut [u16]) -> usize {
        let NackPoll { count, .. } = self.receive.poll_nack(now, rtt, out);
        count
    }

    pub fn count_nack(&mut self) {
        self.nacks_sent += 1;
    }

    /// Notes that a subscriber cannot continue without a key frame.
    pub fn want_key_frame(&mut self) {
        self.key_frame_wanted = true;
    }

    /// When the publisher may be asked for a key frame; [`Time::MAX`] while none is wanted.
    pub fn key_frame_request_at(&self) -> Time {
        match (
            self.key_frame_wanted,
            self.media.ssrc,
            self.key_frame_asked_at,
        ) {
            (false, ..) | (_, None, _) => Time::MAX,
            (true, Some(_), None) => Time::ZERO,
            (true, Some(_), Some(asked_at)) => asked_at + self.key_frame_interval,
        }
    }

    /// Whether to request a key frame now. `still_wanted` says that a subscriber is still waiting.
    /// The request is noted, and repeated until a key frame comes.
    pub fn poll_key_frame_request(&mut self, now: Time, still_wanted: bool) -> bool {
        if self.key_frame_request_at() > now {
            return false;
        }
        self.key_frame_wanted = still_wanted;
        if still_wanted {
            self.key_frame_asked_at = Some(now);
            self.plis_sent += 1;
        }
        still_wanted
    }

    /// Returns the numbers of a report block; `None` before the first packet.
    pub fn report_block(&mut self, now: Time) -> Option<ReportNumbers> {
        self.receive.report_block(now)
    }

    pub fn statistics(&self) -> EncodingStatistics {
        EncodingStatistics {
            ssrc: self.media.ssrc,
            counts: self.receive.counts(),
            jitter: self.receive.jitter(),
            bytes: self.bytes,
            active: self.activity.is_active(),
            key_frames: self.key_frames,
            nacks_sent: self.nacks_sent,
            plis_sent: self.plis_sent,
        }
    }
}
