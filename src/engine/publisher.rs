//! One published track: takes frames from shared media, gives them identity, cuts them into
//! packets, paces and seals these, and answers NACKs.
//!
//! The work per packet uses no allocation and no clock. A participant holds an index into the
//! media, never the media itself.
//!
//! A simulcast track is one [`SendTrack`] per layer. All layers begin at the same moment, as a
//! camera's one picture is coded in several sizes.

use crate::transport::rtp::Ssrc;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::uplink::{AskedPackets, FrameRequests};
use super::{Io, PeerKey, Roster, TICK};
use crate::codec::vp8::{PictureId, Vp8Descriptor};
use crate::codec::{Codec, red};
use crate::measure::{Kind, Media};
use crate::media::identity::{AUDIO_IDENTITY_LEN, FrameIdentity, VIDEO_TRAILER_LEN};
use crate::media::opus::AudioClip;
use crate::media::packetize::{PacketLayout, copy_range};
use crate::media::vp8::VideoClip;
use crate::net;
use crate::seeded::scatter;
use crate::transport::resend::{
    AUDIO_FRAMES, FrameRecord, Resend, ResendLimiter, ResendRing, VIDEO_FRAMES,
};
use crate::transport::rtp::{
    ExtensionSlot, HeaderTemplate, TemplateError, audio_level, check_payload_type,
    set_payload_type, write_rtx_osn,
};
use crate::transport::sent::{SentKind, SentLog, SentPacket};
use crate::transport::sequence::Seq;
use crate::transport::srtp::Sealer;
use crate::units::{Bitrate, Epoch, Time};

/// Minimum time between two key frame requests that are taken. libwebrtc takes at most one in this
/// time (`kMinKeyframeSendInterval`), whatever key frames it sent without a request.
const KEY_REQUEST_INTERVAL_MIN: Duration = Duration::from_millis(300);
/// Rate of the pacer, as a percentage of the target rate (libwebrtc's pacer).
const PACING_FACTOR_PERCENT: u64 = 250;
/// Length of the pacer's bursts (libwebrtc's pacer).
const PACING_BURST: Duration = Duration::from_millis(5);
/// Maximum number of frames that wait in the pacer: a second at 30 fps. Beyond it, frames are sent
/// at once, as with libwebrtc's queue-time limit.
const PACER_FRAMES_MAX: usize = 32;
/// Number of frames after the first key frame at which a simulcast layer sends another one. LiveKit
/// drops a layer's first key frame while it sets the layer up; the second one spares subscribers a
/// request.
const SIMULCAST_KEY_FRAME_AGAIN: u32 = 2;
/// Audio level of digital silence (RFC 6464).
const SILENCE_DBOV: u8 = 127;
/// Size of a burst of retransmissions. It lets a key frame that was lost completely be repaired at
/// once. Beyond it, retransmissions are limited to the track's own bitrate.
const RESEND_BURST_BYTES: u32 = 256 * 1024;
/// Number of bytes charged for one retransmission.
const RESEND_BYTES: usize = 1_200;
/// Number of the newest packets that a probe repeats in turn.
const PROBE_PACKETS: u32 = 8;
/// Maximum size of one of our packets. An Opus packet of 120 ms is the largest.
const PACKET_BYTES_MAX: usize = 4_096;
/// Maximum size of an audio packet with redundancy. libwebrtc repeats no more than what fits into
/// it.
const RED_BYTES_MAX: usize = 1_200;

/// The shared media that a track plays.
#[derive(Clone)]
pub enum MediaSource {
    Audio(Arc<AudioClip>),
    Video(Arc<VideoClip>),
}

impl MediaSource {
    /// Returns the codec of its frames. How they are wrapped in packets is not the source's
    /// concern.
    pub fn codec(&self) -> Codec {
        match self {
            MediaSource::Audio(_) => Codec::Opus,
            MediaSource::Video(_) => Codec::Vp8,
        }
    }

    pub fn kind(&self) -> Kind {
        self.codec().kind()
    }

    /// Returns when the next key frame is available, given that frame `position` is due.
    pub fn key_frame_at(&self, _position: u32) -> KeyFrameAnswer {
        match self {
            // Every Opus packet can be decoded on its own, and every VP8 picture has a key frame.
            MediaSource::Audio(_) | MediaSource::Video(_) => KeyFrameAnswer::Now,
        }
    }

    pub fn bitrate(&self) -> Bitrate {
        match self {
            MediaSource::Audio(clip) => clip.bitrate(),
            MediaSource::Video(clip) => clip.spec().bitrate,
        }
    }

    /// Returns how long a frame lasts, rounded down to nanoseconds.
    pub fn frame_interval(&self) -> Duration {
        FrameTiming::of(self).offset(1)
    }

    /// Returns the number of frames in the loop.
    pub fn len(&self) -> usize {
        match self {
            MediaSource::Audio(clip) => clip.len(),
            MediaSource::Video(clip) => clip.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A source's answer to a request for a key frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyFrameAnswer {
    /// The frame that is due can be a key frame.
    Now,
    /// The source's key frames have fixed positions. The next one comes after this many other
    /// frames. With 0, the frame that is due is a key frame, whether or not one was requested.
    InFrames(u32),
}

/// Redundancy of a track: each packet repeats earlier ones (RFC 2198).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Redundancy {
    /// Payload type of packets with redundancy. The blocks in them have the source's own payload
    /// type.
    pub payload_type: u8,
    /// Number of earlier packets that each packet repeats, if they fit: up to
    /// [`red::DISTANCE_MAX`].
    pub distance: u8,
}

pub use crate::plan::{Pacing, SpeakerTurns};

/// Parameters with which a negotiated track starts.
pub struct SendParameters {
    pub source: MediaSource,
    pub ssrc: Ssrc,
    pub rtx_ssrc: Option<Ssrc>,
    pub payload_type: u8,
    pub rtx_payload_type: Option<u8>,
    /// Set if audio is sent with redundancy.
    pub redundancy: Option<Redundancy>,
    /// Extension id of the transport-wide sequence number, if feedback about it was agreed on.
    pub transport_cc_extension: Option<u8>,
    /// Extension id of the audio level (RFC 6464), if negotiated.
    pub audio_level_extension: Option<u8>,
    /// Set for the layers of a simulcast track.
    pub simulcast: Option<SimulcastLayer>,
    /// Set if publishers take turns in speaking.
    pub talk: Option<Talk>,
    pub pacing: Pacing,
    /// Identity of all frames: run, origin, track, layer. The frame number and time are filled in
    /// for each frame.
    pub identity: FrameIdentity,
    /// Seed that chooses the first sequence number, timestamp and picture id, and the position in
    /// the loop at which to begin.
    pub seed: u64,
    /// Intended time of the first frame. The following frames are whole frame intervals later.
    pub first_frame_at: Time,
}

/// How the packets of one simulcast layer identify the layer, because no description names its
/// SSRC.
#[derive(Clone, Debug)]
pub struct SimulcastLayer {
    pub mid: Box<str>,
    pub rid: Box<str>,
    pub mid_extension: u8,
    pub rid_extension: u8,
    /// Extension id that names the layer on its retransmissions (RFC 8852, section 3.2).
    pub repaired_rid_extension: Option<u8>,
    /// Bitrate of all layers together, because libwebrtc has one pacer for all of them.
    pub track_bitrate: Bitrate,
}

/// A publisher that speaks when its turn comes and is silent otherwise.
#[derive(Clone)]
pub struct Talk {
    pub turns: SpeakerTurns,
    /// Index of this publisher among those that take turns.
    pub place: u32,
    /// Silence, as long as the track's own media.
    pub silence: Arc<AudioClip>,
}

/// Surroundings that a track needs for one call.
pub struct TrackWire<'a, I> {
    pub io: &'a mut I,
    pub key: PeerKey,
    pub to: SocketAddr,
    pub sealer: &'a Sealer,
    pub epoch: Epoch,
    pub roster: &'a Roster,
    pub media: &'a mut Media,
    pub wire_bytes_sent: &'a mut u64,
    pub packets_processed: &'a mut u64,
    pub now: Time,
    /// `sent`: set if the connection's packets have transport-wide sequence numbers. `track`: index
    /// of the track among the connection's tracks.
    pub sent: Option<&'a mut SentLog>,
    pub track: u8,
}

/// Result of one turn of the track.
#[derive(Default)]
pub struct Turn {
    pub slots_skipped: u64,
    /// How long after its slot the frame was sent.
    pub send_lag: Option<Duration>,
    /// Time at which the track is due again.
    pub next_at: Time,
}

/// One published track (one encoding of it). The pacer's queue comes last, because audio, and video
/// with small frames, leave it empty.
#[repr(C)]
pub struct SendTrack {
    parameters: SendParameters,
    timing: FrameTiming,
    header: HeaderTemplate,
    /// Header that replaces `header` after the other side has shown that it knows the SSRC.
    bare_header: Option<HeaderTemplate>,
    rtx_header: Option<HeaderTemplate>,
    /// Places of the transport-wide sequence number in the media header and in the header of
    /// retransmissions.
    transport_seq: [Option<ExtensionSlot>; 2],
    audio_level: Option<ExtensionSlot>,
    /// Number of slots since `first_frame_at`, skipped ones included.
    slot: u64,
    /// Time of `slot`.
    slot_at: Time,
    position: u32,
    frames: u32,
    picture_id: u16,
    rtp_offset: u32,
    /// ROC << 16 | sequence number of the next packet.
    index: u64,
    rtx_index: u64,
    ring: ResendRing,
    limiter: ResendLimiter,
    requests: FrameRequests,
    asked: AskedPackets,
    /// Set if the next frame begins something: a video track (also after a pause), or a talkspurt.
    fresh: bool,
    /// Number of the frame that is to repeat the first key frame.
    key_again_at: Option<u32>,
    key_requests: KeyRequests,
    packets: u32,
    octets: u32,
    /// Cumulative loss stated in the last receiver report.
    reported_lost: i32,
    stopped: bool,
    /// Set if the server has taken the track out of the room, or if its connection is gone.
    lost: bool,
    muted: bool,
    /// Set if nobody watches this layer.
    unwatched: bool,
    /// Set if the path has no bandwidth for this layer.
    held_back: bool,
    pacer: Pacer,
}

/// Exact times of a track's frames: rounding errors do not add up.
struct FrameTiming {
    clock_rate: u64,
    /// A frame lasts `numerator / denominator` seconds.
    numerator: u64,
    denominator: u64,
}

impl FrameTiming {
    fn of(source: &MediaSource) -> FrameTiming {
        match source {
            MediaSource::Audio(clip) => FrameTiming {
                clock_rate: source.codec().clock_rate().into(),
                numerator: u64::from(clip.rtp_ticks()),
                denominator: source.codec().clock_rate().into(),
            },
            MediaSource::Video(clip) => FrameTiming {
                clock_rate: source.codec().clock_rate().into(),
                numerator: 1,
                denominator: u64::from(clip.spec().fps),
            },
        }
    }

    fn offset(&self, slot: u64) -> Duration {
        Duration::from_nanos(self.scaled(slot, 1_000_000_000))
    }

    fn rtp_ticks(&self, slot: u64) -> u32 {
        self.scaled(slot, self.clock_rate) as u32
    }

    /// Converts `slot` frames to units of which a second has `rate`, rounded down. Whole seconds
    /// are calculated separately, so nothing overflows and nothing needs 128 bits.
    fn scaled(&self, slot: u64, rate: u64) -> u64 {
        let units = slot * self.numerator;
        units / self.denominator * rate + units % self.denominator * rate / self.denominator
    }

    /// Returns the latest slot that begins no later than `elapsed`.
    fn slot_at(&self, elapsed: Duration) -> u64 {
        let mut slot = (elapsed.as_nanos() * u128::from(self.denominator)
            / (u128::from(self.numerator) * 1_000_000_000)) as u64;
        while self.offset(slot + 1) <= elapsed {
            slot += 1;
        }
        slot
    }
}

/// The headers of a track's packets, and the places of the extensions that change with each packet.
struct TrackHeaders {
    media: HeaderTemplate,
    /// Header without mid and rid.
    bare: Option<HeaderTemplate>,
    rtx: Option<HeaderTemplate>,
    /// In media packets, and in retransmissions.
    transport_seq: [Option<ExtensionSlot>; 2],
    audio_level: Option<ExtensionSlot>,
}

impl TrackHeaders {
    fn new(parameters: &SendParameters) -> Result<TrackHeaders, TemplateError> {
        let mut media = HeaderTemplate::new(parameters.payload_type, parameters.ssrc)?;
        if let Some(redundancy) = &parameters.redundancy {
            check_payload_type(redundancy.payload_type)?;
        }
        // Pushed first, so that it lies in the same place with mid and rid and without.
        let transport_cc = |header: &mut HeaderTemplate| {
            parameters
                .transport_cc_extension
                .map(|id| header.push_extension(id, &[0; 2]))
                .transpose()
        };
        let transport_seq = transport_cc(&mut media)?;
        let audio_level = parameters
            .audio_level_extension
            .map(|id| media.push_extension(id, &[127]))
            .transpose()?;
        let rtx = parameters.rtx_ssrc.zip(parameters.rtx_payload_type);
        let mut rtx = rtx
            .map(|(ssrc, payload_type)| HeaderTemplate::new(payload_type, ssrc))
            .transpose()?;
        let rtx_transport_seq = rtx.as_mut().map(transport_cc).transpose()?.flatten();
        let mut bare = None;
        if let Some(layer) = &parameters.simulcast {
            bare = Some(media.clone());
            media.push_extension(layer.mid_extension, layer.mid.as_bytes())?;
            media.push_extension(layer.rid_extension, layer.rid.as_bytes())?;
            if let (Some(rtx), Some(id)) = (&mut rtx, layer.repaired_rid_extension) {
                rtx.push_extension(layer.mid_extension, layer.mid.as_bytes())?;
                rtx.push_extension(id, layer.rid.as_bytes())?;
            }
        }
        Ok(TrackHeaders {
            media,
            bare,
            rtx,
            transport_seq: [transport_seq, rtx_transport_seq],
            audio_level,
        })
    }
}

impl SendTrack {
    /// Makes a track. Returns an error if the negotiated payload types or extension ids are
    /// impossible: the other side's description is then wrong.
    pub fn new(parameters: SendParameters) -> Result<SendTrack, TemplateError> {
        let headers = TrackHeaders::new(&parameters)?;
        let timing = FrameTiming::of(&parameters.source);
        let kind = parameters.source.kind();
        let bits = scatter(parameters.seed);
        let length = parameters.source.len() as u64;
        let slot_at = slot_time(&parameters, &timing, 0);
        Ok(SendTrack {
            timing,
            header: headers.media,
            bare_header: headers.bare,
            rtx_header: headers.rtx,
            transport_seq: headers.transport_seq,
            audio_level: headers.audio_level,
            slot: 0,
            slot_at,
            position: (scatter(bits) % length) as u32,
            frames: 0,
            picture_id: (bits >> 48) as u16 & 0x7FFF,
            rtp_offset: bits as u32,
            // Below 2^15, so that the receiver cannot guess a wrong SRTP index if the first packets
            // are lost (RFC 3711, section 3.3.1).
            index: (bits >> 32) & 0x7FFF,
            rtx_index: (bits >> 17) & 0x7FFF,
            ring: ResendRing::new(if kind == Kind::Audio {
                AUDIO_FRAMES
            } else {
                VIDEO_FRAMES
            }),
            limiter: ResendLimiter::new(sent_bitrate(&parameters), RESEND_BURST_BYTES),
            requests: FrameRequests::default(),
            asked: AskedPackets::default(),
            pacer: Pacer::new(&parameters),
            // The first frame of a video track is a key frame, even without a request.
            fresh: true,
            key_again_at: None,
            key_requests: KeyRequests::default(),
            packets: 0,
            octets: 0,
            reported_lost: 0,
            stopped: false,
            lost: false,
            muted: false,
            unwatched: false,
            held_back: false,
            parameters,
        })
    }

    /// Prefetches what every turn needs.
    pub fn prefetch(&self) {
        net::prefetch(self, std::mem::offset_of!(SendTrack, pacer));
        net::prefetch(&self.pacer.next_at, usize::MAX);
        net::prefetch(&self.pacer.len, usize::MAX);
    }

    pub fn kind(&self) -> Kind {
        self.codec().kind()
    }

    fn codec(&self) -> Codec {
        self.parameters.source.codec()
    }

    /// Returns the bitrate of what it sends, redundancy included.
    pub fn bitrate(&self) -> Bitrate {
        sent_bitrate(&self.parameters)
    }

    pub fn ssrc(&self) -> Ssrc {
        self.parameters.ssrc
    }

    pub fn rtx_ssrc(&self) -> Option<Ssrc> {
        self.parameters.rtx_ssrc
    }

    pub fn frames(&self) -> u32 {
        self.frames
    }

    pub fn identity(&self) -> &FrameIdentity {
        &self.parameters.identity
    }

    /// Sets the number of the first frame. An earlier track in this one's place has sent that many
    /// frames.
    pub fn number_from(&mut self, frame: u32) {
        self.frames = frame;
    }

    /// Stops making frames. Packets in the pacer are still sent, and NACKs are still answered.
    pub fn stop(&mut self) {
        self.stopped = true;
    }

    /// Stops making frames, as [`SendTrack::stop`], although the plan means the track to go on:
    /// [`SendTrack::pass_unsent`] counts what it owes.
    pub fn lose(&mut self) {
        self.lost = true;
    }

    pub fn is_lost(&self) -> bool {
        self.lost
    }

    /// Passes the slots before `until` of a lost track. Returns how many frames they would have
    /// had; zero if the track was meant to pause.
    pub fn pass_unsent(&mut self, until: Time) -> u32 {
        let mut frames = 0;
        while self.is_meant_to_send() && self.slot_at < until {
            let media = self.media_at(self.slot_at);
            self.position = (self.position + 1) % self.parameters.source.len() as u32;
            frames += u32::from(self.has_identity(media));
            self.go_to_slot(self.slot + 1);
        }
        frames
    }

    /// Mutes or unmutes the track. A muted track sends nothing, as if its slots did not exist.
    pub fn set_muted(&mut self, muted: bool, now: Time) {
        let was_meant = self.is_meant_to_send();
        self.muted = muted;
        self.resume_after(was_meant, now);
    }

    /// Pauses a layer that nobody watches. A lost track is left as it is, because it still owes its
    /// frames although nobody can watch it any more.
    pub fn set_watched(&mut self, watched: bool, now: Time) {
        if !self.lost {
            let was_meant = self.is_meant_to_send();
            self.unwatched = !watched;
            self.resume_after(was_meant, now);
        }
    }

    /// Pauses a layer that the path has no bandwidth for. Returns whether that is a change.
    pub fn set_held_back(&mut self, held_back: bool, now: Time) -> bool {
        let was_meant = self.is_meant_to_send();
        let is_new = std::mem::replace(&mut self.held_back, held_back) != held_back;
        self.resume_after(was_meant, now);
        is_new
    }

    pub fn is_held_back(&self) -> bool {
        self.held_back
    }

    /// Whether the layer would be sent if the path had the bandwidth.
    pub fn is_wanted(&self) -> bool {
        !(self.stopped || self.lost || self.muted || self.unwatched)
    }

    pub fn is_simulcast(&self) -> bool {
        self.parameters.simulcast.is_some()
    }

    /// Whether its packets have transport-wide sequence numbers.
    pub fn has_transport_seq(&self) -> bool {
        self.transport_seq[0].is_some()
    }

    fn is_at_rest(&self) -> bool {
        self.lost || !self.is_meant_to_send()
    }

    fn is_meant_to_send(&self) -> bool {
        !(self.stopped || self.muted || self.unwatched || self.held_back)
    }

    /// Resumes in the plan's next slot. Slots that passed during the pause were not missed.
    fn resume_after(&mut self, was_meant: bool, now: Time) {
        if was_meant || !self.is_meant_to_send() {
            return;
        }
        self.fresh = true;
        if now >= self.parameters.first_frame_at {
            self.go_to_slot(
                self.slot.max(
                    self.timing
                        .slot_at(now.since(self.parameters.first_frame_at))
                        + 1,
                ),
            );
        }
    }

    /// Returns the time at which [`SendTrack::handle_timeout`] is next due.
    pub fn next_at(&self) -> Time {
        let frame = if self.is_at_rest() {
            Time::MAX
        } else {
            self.slot_at
        };
        frame.min(self.pacer.next_at())
    }

    /// Sends what is due: paced packets first, then the frame of this slot.
    pub fn handle_timeout<I: Io>(&mut self, now: Time, wire: &mut TrackWire<'_, I>) -> Turn {
        let mut turn = Turn::default();
        if self.pacer.next_at() <= now {
            self.send_paced(now, wire);
        }
        if !self.is_at_rest() && self.slot_at <= now {
            turn.slots_skipped = self.skip_missed_slots(now);
            turn.send_lag = Some(now.since(self.slot_at));
            self.emit_frame(self.slot_at, now, wire);
            self.go_to_slot(self.slot + 1);
        }
        turn.next_at = self.next_at();
        turn
    }

    /// Skips missed slots after a stall. The newest due slot is played and the older ones are
    /// skipped, because a stalled camera does not send a burst of old frames.
    fn skip_missed_slots(&mut self, now: Time) -> u64 {
        if self.parameters.first_frame_at + self.timing.offset(self.slot + 1) > now {
            return 0;
        }
        let newest = self
            .timing
            .slot_at(now.since(self.parameters.first_frame_at));
        let skipped = newest.saturating_sub(self.slot);
        self.go_to_slot(self.slot + skipped);
        skipped
    }

    fn go_to_slot(&mut self, slot: u64) {
        self.slot = slot;
        self.slot_at = slot_time(&self.parameters, &self.timing, slot);
    }

    /// Requests a key frame as soon as the source has one. Returns whether the request was taken.
    /// libwebrtc drops requests that come too soon.
    pub fn request_key_frame(&mut self, now: Time) -> bool {
        !self.codec().begins_anywhere() && self.key_requests.take(now)
    }

    /// Sends the frame of a slot. In a DTX slot nothing is sent.
    fn emit_frame<I: Io>(&mut self, intended: Time, now: Time, wire: &mut TrackWire<'_, I>) {
        let key = self.wants_key_frame(now, wire);
        let media = self.media_at(intended);
        self.position = (self.position + 1) % self.parameters.source.len() as u32;
        let Some(bytes) = self.media_bytes(media, key) else {
            self.fresh = true;
            return;
        };
        let layout = layout(self.kind(), bytes.len());
        let rtp_time = self
            .rtp_offset
            .wrapping_add(self.timing.rtp_ticks(self.slot));
        let record = FrameRecord {
            first_seq: self.index as u16,
            packets: layout.packets as u16,
            media,
            key: key || (self.fresh && self.kind() == Kind::Audio),
            rtp_time,
            redundant: self.repeatable(rtp_time, bytes.len()),
            frame: self.frames,
            picture_id: self.picture_id,
            intended,
        };
        self.ring.push(record);
        self.fresh = false;
        self.picture_id = (self.picture_id + 1) & 0x7FFF;
        // DTX comfort noise carries no identity, so nobody could miss it.
        if self.has_identity(media) {
            self.frames += 1;
            // Count the frame before it is sent, because a subscriber on another core must find it
            // counted when it arrives.
            wire.roster
                .set_frames(&self.parameters.identity, self.frames);
            wire.media.frames_sent += 1;
        }
        let first_index = self.index;
        self.index += layout.packets as u64;
        if self.pacer.enqueue(record, first_index, now) {
            if self.pacer.next_at() <= now {
                self.send_paced(now, wire);
            }
        } else {
            self.flush(now, wire);
            self.send_range(&record, first_index, 0..layout.packets, wire);
        }
    }

    fn wants_key_frame<I: Io>(&mut self, now: Time, wire: &mut TrackWire<'_, I>) -> bool {
        if self.codec().begins_anywhere() {
            return false;
        }
        let again = self.key_again_at == Some(self.frames);
        let answer = self.parameters.source.key_frame_at(self.position);
        let due = self.key_requests.meet(answer, self.fresh || again, now);
        if let Some(waited) = due.waited {
            wire.media.pli_received_to_key_sent.record(waited);
        }
        if due.key {
            wire.media.key_frames_sent += 1;
            if self.parameters.simulcast.is_some() {
                self.key_again_at
                    .get_or_insert(self.frames + SIMULCAST_KEY_FRAME_AGAIN);
            }
        }
        due.key
    }

    /// Returns what is played in the slot of `intended`: an index into the track's own media. An
    /// index beyond its end points into the silence that is played when it is not this publisher's
    /// turn.
    fn media_at(&self, intended: Time) -> u32 {
        match &self.parameters.talk {
            Some(talk) if talk.turns.speaker_at(intended) != Some(talk.place) => {
                self.position + self.parameters.source.len() as u32
            }
            _ => self.position,
        }
    }

    /// Returns the audio clip and the position in it that `media` stands for.
    fn audio_at<'a>(&'a self, clip: &'a AudioClip, media: u32) -> (&'a AudioClip, usize) {
        let media = media as usize;
        match &self.parameters.talk {
            Some(talk) if media >= clip.len() => (&talk.silence, media - clip.len()),
            _ => (clip, media),
        }
    }

    fn has_identity(&self, media: u32) -> bool {
        match &self.parameters.source {
            MediaSource::Audio(clip) => {
                let (clip, at) = self.audio_at(clip, media);
                clip.has_identity(at)
            }
            MediaSource::Video(_) => true,
        }
    }

    fn media_bytes(&self, media: u32, key: bool) -> Option<&[u8]> {
        match &self.parameters.source {
            MediaSource::Audio(clip) => {
                let (clip, at) = self.audio_at(clip, media);
                clip.packet(at)
            }
            MediaSource::Video(clip) if key => Some(clip.key_frame(media as usize)),
            MediaSource::Video(clip) => Some(clip.inter_frame(media as usize)),
        }
    }

    /// Returns a frame's bytes, and how they are cut into packets.
    fn laid_out(&self, record: &FrameRecord) -> Option<(&[u8], PacketLayout)> {
        let bytes = self.media_bytes(record.media, record.key)?;
        Some((bytes, layout(self.kind(), bytes.len())))
    }

    fn send_paced<I: Io>(&mut self, now: Time, wire: &mut TrackWire<'_, I>) {
        let mut budget = self.pacer.burst_bytes as i64;
        let mut sent_bytes = 0;
        while budget > 0 {
            let Some((record, first_index, range)) = self.pacer.take(budget as usize) else {
                break;
            };
            let bytes = self.send_range(&record, first_index, range, wire);
            budget -= bytes as i64;
            sent_bytes += bytes;
        }
        self.pacer.settle(now, sent_bytes);
    }

    /// Sends all waiting packets in order.
    fn flush<I: Io>(&mut self, now: Time, wire: &mut TrackWire<'_, I>) {
        while let Some((record, first_index, range)) = self.pacer.take(usize::MAX) {
            self.send_range(&record, first_index, range, wire);
        }
        self.pacer.settle(now, 0);
    }

    /// Sends packets `range` of a frame in as few calls as the kernel allows. Returns the number of
    /// bytes of UDP payload.
    fn send_range<I: Io>(
        &mut self,
        record: &FrameRecord,
        first_index: u64,
        range: std::ops::Range<usize>,
        wire: &mut TrackWire<'_, I>,
    ) -> usize {
        let Some(frame) = self.laid_out(record) else {
            return 0;
        };
        let mut sent = SentBytes::default();
        let mut at = range.start;
        while at < range.end {
            let (mut len, mut segment, mut count) = (0, 0, 0);
            while at < range.end && count < net::SEGMENTS_MAX {
                let buffer = &mut wire.io.lend()[len..];
                if buffer.len() < PACKET_BYTES_MAX {
                    break;
                }
                let Some(lengths) = self.write_packet(record, frame, at, None, wire.epoch, buffer)
                else {
                    break;
                };
                let seq = record.first_seq.wrapping_add(at as u16);
                let octets = lengths.0 + lengths.1;
                let packet = SentPacket::new(wire.now, wire.track, seq, octets, SentKind::Media);
                let log = wire.sent.as_deref_mut();
                number(log, self.transport_seq[0], buffer, packet);
                let Some(sealed) = seal(wire.sealer, buffer, lengths, first_index + at as u64)
                else {
                    break;
                };
                sent.add(lengths);
                segment = segment.max(sealed);
                len += sealed;
                count += 1;
                at += 1;
            }
            if count == 0 {
                break;
            }
            wire.io.send(wire.key, wire.to, len, segment);
            *wire.packets_processed += count as u64;
            *wire.wire_bytes_sent += len as u64;
            sent.on_wire += len;
        }
        self.packets = self.packets.wrapping_add(sent.packets);
        self.octets = self.octets.wrapping_add(sent.payloads);
        wire.media.packets_sent += u64::from(sent.packets);
        wire.media.bytes_sent += sent.bytes;
        sent.on_wire
    }

    /// Writes packet `index` of a frame, as media or, with a sequence number for `rtx`, as a
    /// retransmission (RFC 4588). Returns header and payload length.
    fn write_packet(
        &self,
        record: &FrameRecord,
        (bytes, layout): (&[u8], PacketLayout),
        index: usize,
        rtx: Option<Seq>,
        epoch: Epoch,
        out: &mut [u8],
    ) -> Option<(usize, usize)> {
        let seq = Seq(record.first_seq).wrapping_add(index as u16);
        let video = self.kind() == Kind::Video;
        // The marker begins a talkspurt on audio (RFC 3551, section 4.1), and ends a frame on video
        // (RFC 7741).
        let marker = if video {
            index + 1 == layout.packets
        } else {
            record.key
        };
        let header = match (rtx, &self.rtx_header) {
            (Some(rtx_seq), Some(template)) => {
                template.write(out, marker, rtx_seq, record.rtp_time)?
            }
            _ => self.header.write(out, marker, seq, record.rtp_time)?,
        };
        let mut at = header;
        if let Some(redundancy) = self.redundancy_of(bytes.len()) {
            set_payload_type(out, redundancy.payload_type);
            at += self.write_redundant(record, epoch, out.get_mut(at..)?)?;
        }
        if rtx.is_some() {
            at += write_rtx_osn(out.get_mut(at..)?, seq)?;
        } else if let (Some(slot), MediaSource::Audio(clip)) =
            (self.audio_level, &self.parameters.source)
        {
            let (clip, at) = self.audio_at(clip, record.media);
            let level = clip.level_dbov(at);
            slot.patch(out, &audio_level(level < SILENCE_DBOV, level)?);
        }
        if self.codec() == Codec::Vp8 {
            let descriptor = Vp8Descriptor {
                start_of_partition: index == 0,
                picture_id: Some(PictureId::Long(record.picture_id)),
                ..Vp8Descriptor::default()
            };
            at += descriptor.write(out.get_mut(at..)?)?;
        }
        at += self.write_payload(
            record,
            bytes,
            layout.range(index),
            epoch,
            out.get_mut(at..)?,
        );
        Some((header, at - header))
    }

    #[inline]
    fn write_payload(
        &self,
        record: &FrameRecord,
        bytes: &[u8],
        range: std::ops::Range<usize>,
        epoch: Epoch,
        out: &mut [u8],
    ) -> usize {
        let identity = FrameIdentity {
            frame: record.frame,
            intended_unix_us: epoch.unix_micros(record.intended),
            ..self.parameters.identity
        };
        match &self.parameters.source {
            MediaSource::Audio(_) => {
                out[..bytes.len()].copy_from_slice(bytes);
                let place = out[..bytes.len()].last_chunk_mut::<AUDIO_IDENTITY_LEN>();
                if let Some(place) = place.filter(|_| self.has_identity(record.media)) {
                    identity.write_audio(place);
                }
                bytes.len()
            }
            MediaSource::Video(_) if range.end > bytes.len() => {
                let mut trailer = [0; VIDEO_TRAILER_LEN];
                identity.write_video(&mut trailer);
                copy_range(bytes, &trailer, range, out)
            }
            MediaSource::Video(_) => copy_range(bytes, &[], range, out),
        }
    }

    /// Returns how a packet with `primary` bytes of Opus is sent with redundancy. `None` means
    /// without, as libwebrtc sends packets that no later packet could repeat.
    #[inline]
    fn redundancy_of(&self, primary: usize) -> Option<Redundancy> {
        self.parameters.redundancy.filter(|_| red::fits(0, primary))
    }

    /// Returns how many of the last packets the next one can repeat. Each must be recent and short
    /// enough for its RED header, and all of them together must fit into one packet.
    #[inline]
    fn repeatable(&self, rtp_time: u32, primary: usize) -> u8 {
        let redundancy = self.redundancy_of(primary);
        redundancy.map_or(0, |redundancy| {
            self.repeated_by(redundancy, rtp_time, primary)
        })
    }

    fn repeated_by(&self, redundancy: Redundancy, rtp_time: u32, primary: usize) -> u8 {
        let mut room = RED_BYTES_MAX.saturating_sub(red::headers_len(0) + primary);
        let fits = |distance: &u8| {
            let Some((earlier, bytes)) = self.earlier(self.index as u16, *distance) else {
                return false;
            };
            let len = red::headers_len(1) - red::headers_len(0) + bytes.len();
            let fits = red::fits(rtp_time.wrapping_sub(earlier.rtp_time), bytes.len());
            let left = room.checked_sub(len).filter(|_| fits);
            room = left.unwrap_or(room);
            left.is_some()
        };
        let distance = redundancy.distance.min(red::DISTANCE_MAX as u8);
        (1..=distance).take_while(fits).count() as u8
    }

    /// Returns the frame that was sent `distance` packets before sequence number `seq`, and its
    /// bytes.
    fn earlier(&self, seq: u16, distance: u8) -> Option<(&FrameRecord, &[u8])> {
        let (record, _) = self.ring.find(seq.wrapping_sub(distance.into()))?;
        Some((record, self.media_bytes(record.media, record.key)?))
    }

    /// Writes the RED headers and the repeated packets. Returns `None` if one of those is not known
    /// any more, because without it the packet would differ under the same sequence number.
    fn write_redundant(&self, record: &FrameRecord, epoch: Epoch, out: &mut [u8]) -> Option<usize> {
        let count = usize::from(record.redundant);
        let mut earlier = [None; red::DISTANCE_MAX];
        let earlier = earlier.get_mut(..count)?;
        for (slot, distance) in earlier.iter_mut().rev().zip(1..) {
            *slot = Some(self.earlier(record.first_seq, distance)?);
        }
        let earlier = || earlier.iter().flatten();
        let mut sizes = [(0, 0); red::DISTANCE_MAX];
        for (size, (earlier, bytes)) in sizes.iter_mut().zip(earlier()) {
            *size = (record.rtp_time.wrapping_sub(earlier.rtp_time), bytes.len());
        }
        let sizes = sizes.into_iter().take(count);
        let mut at = red::write_headers(out, self.parameters.payload_type, sizes)?;
        for (earlier, bytes) in earlier() {
            let out = out.get_mut(at..)?;
            at += self.write_payload(earlier, bytes, 0..bytes.len(), epoch, out);
        }
        Some(at)
    }

    /// Answers one sequence number of a NACK. Returns whether a packet was sent.
    pub fn resend<I: Io>(
        &mut self,
        seq: u16,
        now: Time,
        rtt: Duration,
        wire: &mut TrackWire<'_, I>,
    ) -> bool {
        let Some((record, _)) = self.ring.find(seq) else {
            return false;
        };
        let frame = record.frame;
        if self.pacer.holds(seq) {
            return false;
        }
        if self.asked.is_first(seq) {
            wire.media.uplink_packets_asked += 1;
            wire.roster.add_asked_packet(&self.parameters.identity);
        }
        let asked = self.requests.note(frame, now, rtt);
        wire.roster
            .set_asked(&self.parameters.identity, frame, asked);
        if self.limiter.allow(seq, RESEND_BYTES, now, rtt) != Resend::Allowed {
            return false;
        }
        let sent = self.send_again(seq, SentKind::Resend, wire).is_some();
        wire.media.rtx_sent += u64::from(sent);
        sent
    }

    /// Sends a packet of the newest frames once more over RTX, so that the path is busy:
    /// libwebrtc's preferred padding. `nth` tells the packets of a probe apart. Returns the size of
    /// the RTP packet in bytes, or `None` if there is no RTX or nothing was sent yet.
    pub fn send_probe<I: Io>(
        &mut self,
        nth: u32,
        cluster: u8,
        wire: &mut TrackWire<'_, I>,
    ) -> Option<usize> {
        self.rtx_header.as_ref()?;
        let newest = (self.index as u16).wrapping_sub(1);
        let seq = newest.wrapping_sub((nth % PROBE_PACKETS) as u16);
        let seq = if self.ring.find(seq).is_some() {
            seq
        } else {
            newest
        };
        if self.pacer.holds(seq) {
            return None;
        }
        self.send_again(seq, SentKind::Probe { cluster }, wire)
    }

    /// Sends a packet again. Returns the size of the RTP packet in bytes.
    fn send_again<I: Io>(
        &mut self,
        seq: u16,
        kind: SentKind,
        wire: &mut TrackWire<'_, I>,
    ) -> Option<usize> {
        let (record, packet) = self.ring.find(seq)?;
        let record = *record;
        let rtx = self
            .rtx_header
            .is_some()
            .then_some(Seq(self.rtx_index as u16));
        let index = if rtx.is_some() {
            self.rtx_index
        } else {
            extended(self.index, seq)
        };
        let buffer = wire.io.lend();
        let lengths = self.write_packet(
            &record,
            self.laid_out(&record)?,
            usize::from(packet),
            rtx,
            wire.epoch,
            buffer,
        )?;
        let slot = self.transport_seq[usize::from(rtx.is_some())];
        let packet = SentPacket::new(wire.now, wire.track, seq, lengths.0 + lengths.1, kind);
        number(wire.sent.as_deref_mut(), slot, buffer, packet);
        let sealed = seal(wire.sealer, buffer, lengths, index)?;
        if rtx.is_some() {
            self.rtx_index += 1;
        }
        wire.io.send(wire.key, wire.to, sealed, sealed);
        *wire.packets_processed += 1;
        *wire.wire_bytes_sent += sealed as u64;
        Some(lengths.0 + lengths.1)
    }

    /// Returns the contents of a sender report at `now`: the NTP time and the RTP time of the same
    /// moment, and the packets and octets sent so far.
    pub fn sender_report(&self, now: Time, epoch: Epoch) -> Option<(u64, u32, u32, u32)> {
        if self.packets == 0 {
            return None;
        }
        let elapsed = now.since(self.parameters.first_frame_at).as_nanos();
        let ticks = (elapsed * u128::from(self.timing.clock_rate) / 1_000_000_000) as u32;
        Some((
            epoch.ntp(now),
            self.rtp_offset.wrapping_add(ticks),
            self.packets,
            self.octets,
        ))
    }

    /// Takes a report block's cumulative loss. Returns by how much the known uplink loss changed.
    /// It shrinks if a late packet had been counted as lost. A negative loss (more copies than
    /// losses) counts as zero. The other side knows the SSRC that it reports on, so mid and rid are
    /// no longer sent.
    pub fn handle_reported_loss(&mut self, cumulative_lost: i32) -> i64 {
        if let Some(bare) = self.bare_header.take() {
            self.header = bare;
        }
        let lost = cumulative_lost.max(0);
        i64::from(lost) - i64::from(std::mem::replace(&mut self.reported_lost, lost))
    }
}

/// Returns the bitrate that a track sends: each packet once, and once more for each time it is
/// repeated.
fn sent_bitrate(parameters: &SendParameters) -> Bitrate {
    let copies = parameters
        .redundancy
        .map_or(1, |redundancy| 1 + u64::from(redundancy.distance));
    Bitrate::from_bps(parameters.source.bitrate().bps() * copies)
}

/// Key frame requests, from the request that is taken to the key frame that answers it.
#[derive(Default)]
struct KeyRequests {
    pending_since: Option<Time>,
    taken_at: Option<Time>,
}

/// Decision about the frame that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct KeyFrameDue {
    key: bool,
    /// How long the request waited for it.
    waited: Option<Duration>,
}

impl KeyRequests {
    /// Takes a request. Returns false if another one was taken too recently, or is still waiting.
    fn take(&mut self, now: Time) -> bool {
        let too_soon = self
            .taken_at
            .is_some_and(|at| now.since(at) < KEY_REQUEST_INTERVAL_MIN);
        if too_soon || self.pending_since.is_some() {
            return false;
        }
        (self.pending_since, self.taken_at) = (Some(now), Some(now));
        true
    }

    /// Decides about the frame that is due. With `begins`, a key frame is needed even without a
    /// request. A request waits until the source has a key frame.
    #[inline]
    fn meet(&mut self, answer: KeyFrameAnswer, begins: bool, now: Time) -> KeyFrameDue {
        let key = match answer {
            KeyFrameAnswer::Now => begins || self.pending_since.is_some(),
            KeyFrameAnswer::InFrames(frames) => frames == 0,
        };
        let met = if key { self.pending_since.take() } else { None };
        KeyFrameDue {
            key,
            waited: met.map(|since| now.since(since)),
        }
    }
}

/// Returns the time of a slot on the whole millisecond, where the engine's beat is. A camera's
/// frames are no more exact than that.
fn slot_time(parameters: &SendParameters, timing: &FrameTiming, slot: u64) -> Time {
    (parameters.first_frame_at + timing.offset(slot)).next_whole(TICK)
}

/// Packets and bytes that one call of `send_range` has sent.
#[derive(Default)]
struct SentBytes {
    packets: u32,
    /// Payload bytes, as a sender report counts them.
    payloads: u32,
    /// Header and payload bytes.
    bytes: u64,
    /// The same after sealing.
    on_wire: usize,
}

impl SentBytes {
    #[inline]
    fn add(&mut self, (header, payload): (usize, usize)) {
        self.packets += 1;
        self.payloads += payload as u32;
        self.bytes += (header + payload) as u64;
    }
}

/// Gives the packet in `buffer` the connection's next transport-wide sequence number, if the packet
/// has a slot for one, and remembers it.
fn number(
    sent: Option<&mut SentLog>,
    slot: Option<ExtensionSlot>,
    buffer: &mut [u8],
    packet: SentPacket,
) {
    if let (Some(sent), Some(slot)) = (sent, slot) {
        slot.patch(buffer, &sent.next().to_be_bytes());
        sent.push(packet);
    }
}

fn layout(kind: Kind, bytes: usize) -> PacketLayout {
    match kind {
        Kind::Audio => PacketLayout {
            total: bytes,
            chunk: bytes,
            packets: 1,
        },
        Kind::Video => PacketLayout::new(bytes + VIDEO_TRAILER_LEN, VIDEO_TRAILER_LEN),
    }
}

fn seal(
    sealer: &Sealer,
    buffer: &mut [u8],
    (header, payload): (usize, usize),
    index: u64,
) -> Option<usize> {
    sealer
        .seal_rtp(buffer, header, header + payload, index)
        .ok()
}

/// Returns the extended index of `seq`, which was sent no more than 2^15 packets before `next`.
fn extended(next: u64, seq: u16) -> u64 {
    next - u64::from((next as u16).wrapping_sub(seq))
}

/// Frames that wait to be sent in bursts. Disabled (`burst_bytes` = all) for audio and for
/// `--pacing burst`.
struct Pacer {
    queue: [(FrameRecord, u64); PACER_FRAMES_MAX],
    head: usize,
    len: usize,
    /// Number of packets of the head frame that have been sent.
    sent: usize,
    next_at: Time,
    bits_per_second: u64,
    burst_bytes: usize,
}

impl Pacer {
    fn new(parameters: &SendParameters) -> Pacer {
        let paced = parameters.pacing == Pacing::Paced && parameters.source.kind() == Kind::Video;
        let bitrate = parameters
            .simulcast
            .as_ref()
            .map_or_else(|| parameters.source.bitrate(), |layer| layer.track_bitrate);
        let bits_per_second = if paced {
            bitrate.bps() * PACING_FACTOR_PERCENT / 100
        } else {
            u64::MAX
        };
        let burst_bytes = if paced {
            (bits_per_second / 8 * PACING_BURST.as_millis() as u64 / 1_000) as usize
        } else {
            usize::MAX / 4
        };
        Pacer {
            queue: [(FrameRecord::default(), 0); PACER_FRAMES_MAX],
            head: 0,
            len: 0,
            sent: 0,
            next_at: Time::ZERO,
            bits_per_second,
            burst_bytes,
        }
    }

    fn next_at(&self) -> Time {
        if self.len == 0 {
            Time::MAX
        } else {
            self.next_at
        }
    }

    /// Adds a frame. Returns false if there is no room; the caller then flushes.
    fn enqueue(&mut self, record: FrameRecord, first_index: u64, now: Time) -> bool {
        if self.len == PACER_FRAMES_MAX {
            return false;
        }
        self.queue[(self.head + self.len) % PACER_FRAMES_MAX] = (record, first_index);
        self.len += 1;
        if self.len == 1 {
            self.next_at = self.next_at.max(now);
        }
        true
    }

    /// Takes the next packets to send: of one frame, at least one packet, and about `bytes`.
    fn take(&mut self, bytes: usize) -> Option<(FrameRecord, u64, std::ops::Range<usize>)> {
        if self.len == 0 {
            return None;
        }
        let (record, first_index) = self.queue[self.head];
        let packets = usize::from(record.packets);
        let count = bytes
            .div_ceil(crate::media::packetize::PAYLOAD_BYTES_MAX)
            .clamp(1, packets - self.sent);
        let range = self.sent..self.sent + count;
        self.sent += count;
        if self.sent == packets {
            (self.head, self.len, self.sent) =
                ((self.head + 1) % PACER_FRAMES_MAX, self.len - 1, 0);
        }
        Some((record, first_index, range))
    }

    fn settle(&mut self, now: Time, sent_bytes: usize) {
        let pause = Duration::from_nanos(
            (sent_bytes as u128 * 8 * 1_000_000_000 / u128::from(self.bits_per_second)) as u64,
        );
        self.next_at = self.next_at.max(now) + pause;
    }

    /// Whether the packet has a number but has not been sent yet. A NACK for it is then premature.
    fn holds(&self, seq: u16) -> bool {
        (0..self.len).any(|i| {
            let record = &self.queue[(self.head + i) % PACER_FRAMES_MAX].0;
            let offset = seq.wrapping_sub(record.first_seq);
            offset < record.packets && (i > 0 || usize::from(offset) >= self.sent)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A clip in which every tenth picture is a key frame, and which cannot make any other.
    struct RecordedClip {
        position: u32,
    }

    impl RecordedClip {
        const KEY_INTERVAL: u32 = 10;

        fn key_frame_at(&self) -> KeyFrameAnswer {
            let behind = self.position % RecordedClip::KEY_INTERVAL;
            KeyFrameAnswer::InFrames(
                (RecordedClip::KEY_INTERVAL - behind) % RecordedClip::KEY_INTERVAL,
            )
        }
    }

    const FRAME: Duration = Duration::from_millis(40);

    #[test]
    fn a_request_to_a_recorded_clip_waits_for_the_frames_until_its_next_key_frame() {
        for (asked_before, waits) in [(1, 9), (5, 5), (9, 1), (10, 0)] {
            let mut requests = KeyRequests::default();
            let mut keys = Vec::new();
            for position in 0..25 {
                let now = Time::ZERO + FRAME * position;
                let clip = RecordedClip { position };
                if position == asked_before {
                    assert!(requests.take(now));
                    assert!(!requests.take(now), "one waits already");
                }
                let due = requests.meet(clip.key_frame_at(), position == 0, now);
                if due.key {
                    keys.push((position, due.waited));
                }
            }
            let waited = |position| (position == asked_before + waits).then_some(FRAME * waits);
            assert_eq!(
                keys,
                [0, 10, 20].map(|position| (position, waited(position))),
                "asked before frame {asked_before}"
            );
        }
    }

    #[test]
    fn a_source_that_can_at_once_answers_with_the_next_frame() {
        let mut requests = KeyRequests::default();
        let now = Time::from_millis(1_000);
        let meet = |requests: &mut KeyRequests, begins, now| {
            requests.meet(KeyFrameAnswer::Now, begins, now)
        };
        let none = KeyFrameDue {
            key: false,
            waited: None,
        };
        assert_eq!(meet(&mut requests, false, now), none);
        assert!(meet(&mut requests, true, now).key);
        assert!(requests.take(now));
        let due = meet(&mut requests, false, now + FRAME);
        assert_eq!((due.key, due.waited), (true, Some(FRAME)));
        assert_eq!(meet(&mut requests, false, now + FRAME), none);
        let soon = now + KEY_REQUEST_INTERVAL_MIN - Duration::from_millis(1);
        assert!(!requests.take(soon) && requests.take(now + KEY_REQUEST_INTERVAL_MIN));
    }
}
