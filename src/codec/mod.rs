//! Everything that is specific to a codec, in one place: its names, its numbers, and how its
//! payloads are read.
//!
//! Plan, descriptions, engine, embedded SFU, recorder and report ask a [`Codec`]. Whether something
//! is audio or video is a matter of [`Kind`]: counters by kind, tracks of a kind. A codec is added
//! here: as a variant of [`Codec`], and by what the compiler then asks for.
//!
//! Nothing here allocates. [`Codec::depacketize`] is a `match`, so the packet path calls the
//! codec's reader directly.

pub mod red;
pub mod vp8;

use crate::measure::Kind;
use red::RedPayload;
use vp8::Vp8Descriptor;

/// A codec, as RTP carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Codec {
    Opus,
    /// Opus with redundancy (RFC 2198): each packet repeats earlier ones. It is always offered
    /// together with plain Opus.
    Red,
    Vp8,
}

/// RTCP feedback messages (RFC 4585, RFC 5104, and two drafts).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RtcpFeedback {
    Nack,
    NackPli,
    CcmFir,
    GoogRemb,
    TransportCc,
}

/// Facts about its frame that one packet's payload gives, whatever the codec.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PayloadInfo {
    /// The packet holds the frame's first bytes.
    pub start: bool,
    /// The packet holds the frame's last bytes.
    pub end: bool,
    /// The packet starts a frame that depends on no other. Always true for audio.
    pub key: bool,
    /// No other frame depends on this one.
    pub discardable: bool,
    /// 0 if the codec has no such layers, or does not say.
    pub spatial_layer: u8,
    pub temporal_layer: u8,
    /// Offset of the codec's own bytes, which follow the payload descriptor. For RED: offset of the
    /// primary block.
    pub body_at: u16,
}

/// File format in which a track is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    Ogg,
    Ivf,
}

impl Container {
    /// Returns the extension of its files.
    pub const fn extension(self) -> &'static str {
        match self {
            Container::Ogg => "ogg",
            Container::Ivf => "ivf",
        }
    }
}

impl Codec {
    pub const ALL: [Codec; 3] = [Codec::Opus, Codec::Red, Codec::Vp8];

    /// Returns the codec that is sent of a kind if no other is chosen.
    pub const fn default_of(kind: Kind) -> Codec {
        match kind {
            Kind::Audio => Codec::Opus,
            Kind::Video => Codec::Vp8,
        }
    }

    pub const fn kind(self) -> Kind {
        match self {
            Codec::Opus | Codec::Red => Kind::Audio,
            Codec::Vp8 => Kind::Video,
        }
    }

    /// Returns the name used in flags and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Codec::Opus => "opus",
            Codec::Red => "red",
            Codec::Vp8 => "vp8",
        }
    }

    /// Returns LiveKit's name: `TrackInfo.mime_type`, and the list of enabled codecs.
    pub const fn mime(self) -> &'static str {
        match self {
            Codec::Opus => "audio/opus",
            Codec::Red => "audio/red",
            Codec::Vp8 => "video/VP8",
        }
    }

    /// Returns its `a=rtpmap` text in our offers.
    pub const fn rtpmap(self) -> &'static str {
        match self {
            Codec::Opus => "opus/48000/2",
            Codec::Red => "red/48000/2",
            Codec::Vp8 => "VP8/90000",
        }
    }

    /// Returns its `a=fmtp` text in our offers; empty for none.
    pub const fn fmtp(self) -> &'static str {
        match self {
            Codec::Opus => "minptime=10;useinbandfec=1",
            // The payload types of the primary block and of a redundant one.
            Codec::Red => "111/111",
            Codec::Vp8 => "",
        }
    }

    /// Returns the codec with this name in `a=rtpmap`, in any letter case, and this clock rate.
    pub fn from_rtpmap(name: &str, clock_rate: u32) -> Option<Codec> {
        Codec::ALL.into_iter().find(|codec| {
            let known = codec.rtpmap().split('/').next().unwrap_or_default();
            known.eq_ignore_ascii_case(name) && codec.clock_rate() == clock_rate
        })
    }

    /// Returns the clock rate of its RTP time.
    pub const fn clock_rate(self) -> u32 {
        match self {
            Codec::Opus | Codec::Red => 48_000,
            Codec::Vp8 => 90_000,
        }
    }

    /// Returns its payload type in our own offers. Browsers use the same for audio.
    pub const fn payload_type(self) -> u8 {
        match self {
            Codec::Opus => 111,
            Codec::Red => 63,
            Codec::Vp8 => 96,
        }
    }

    /// Returns the payload type of its retransmissions in our own offers; `None` if the original
    /// packets are repeated.
    pub const fn rtx_payload_type(self) -> Option<u8> {
        match self {
            Codec::Opus | Codec::Red => None,
            Codec::Vp8 => Some(97),
        }
    }

    pub const fn has_rtx(self) -> bool {
        self.rtx_payload_type().is_some()
    }

    /// Returns the feedback messages that apply to it.
    pub const fn feedback(self) -> &'static [RtcpFeedback] {
        match self {
            Codec::Opus | Codec::Red => &[RtcpFeedback::Nack, RtcpFeedback::TransportCc],
            Codec::Vp8 => &RtcpFeedback::ALL,
        }
    }

    /// Returns the codec that it wraps, which its section offers as well.
    pub const fn wrapped(self) -> Option<Codec> {
        match self {
            Codec::Opus | Codec::Vp8 => None,
            Codec::Red => Some(Codec::Opus),
        }
    }

    /// Whether a receiver can begin with any packet, and needs no key frame.
    pub const fn begins_anywhere(self) -> bool {
        match self {
            Codec::Opus | Codec::Red => true,
            Codec::Vp8 => false,
        }
    }

    /// Returns the file format in which it is recorded.
    pub const fn container(self) -> Container {
        match self {
            Codec::Opus | Codec::Red => Container::Ogg,
            Codec::Vp8 => Container::Ivf,
        }
    }

    /// Reads what a payload says about its frame. `marker` is the RTP header's marker bit. Returns
    /// `None` for a payload without any of the codec's bytes (padding), or one that is not of this
    /// codec.
    #[inline]
    pub fn depacketize(self, payload: &[u8], marker: bool) -> Option<PayloadInfo> {
        match self {
            Codec::Opus => (!payload.is_empty()).then_some(PayloadInfo::whole_frame(0)),
            Codec::Red => {
                let red = RedPayload::parse(payload)?;
                Some(PayloadInfo::whole_frame(red.primary_at() as u16))
            }
            Codec::Vp8 => {
                let (descriptor, len) = Vp8Descriptor::parse(payload)?;
                Some(PayloadInfo {
                    start: descriptor.starts_frame(),
                    end: marker,
                    key: descriptor.starts_key_frame(payload.get(len..).unwrap_or_default()),
                    discardable: descriptor.non_reference,
                    spatial_layer: 0,
                    temporal_layer: descriptor.tid.unwrap_or(0),
                    body_at: len as u16,
                })
            }
        }
    }
}

impl PayloadInfo {
    /// Describes a packet that is a whole frame, as in audio.
    const fn whole_frame(body_at: u16) -> PayloadInfo {
        PayloadInfo {
            start: true,
            end: true,
            key: true,
            discardable: true,
            spatial_layer: 0,
            temporal_layer: 0,
            body_at,
        }
    }
}

impl RtcpFeedback {
    pub const ALL: [RtcpFeedback; 5] = [
        RtcpFeedback::Nack,
        RtcpFeedback::NackPli,
        RtcpFeedback::CcmFir,
        RtcpFeedback::GoogRemb,
        RtcpFeedback::TransportCc,
    ];

    /// Returns the text used in `a=rtcp-fb`.
    pub const fn as_str(self) -> &'static str {
        match self {
            RtcpFeedback::Nack => "nack",
            RtcpFeedback::NackPli => "nack pli",
            RtcpFeedback::CcmFir => "ccm fir",
            RtcpFeedback::GoogRemb => "goog-remb",
            RtcpFeedback::TransportCc => "transport-cc",
        }
    }

    pub fn from_text(text: &str) -> Option<RtcpFeedback> {
        RtcpFeedback::ALL
            .into_iter()
            .find(|feedback| feedback.as_str() == text.trim())
    }
}

/// Payload types of a stream, and the codec of each. A stream may mix them: the sender of RED sends
/// plain Opus if a packet is too long to be repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PayloadTypes {
    /// The codec that the section prefers (`codec`), and its payload type.
    pub codec: Codec,
    pub payload_type: u8,
    /// Payload type of the codec that it wraps, which may be sent by itself.
    pub wrapped: Option<u8>,
}

impl PayloadTypes {
    pub const fn of(codec: Codec, payload_type: u8) -> PayloadTypes {
        PayloadTypes {
            codec,
            payload_type,
            wrapped: None,
        }
    }

    /// Whether a payload type is one of these.
    #[inline]
    pub fn names(&self, payload_type: u8) -> bool {
        self.payload_type == payload_type || self.wrapped == Some(payload_type)
    }

    /// Returns the payload type that carries the codec without its wrapping.
    pub const fn plain_payload_type(&self) -> u8 {
        match self.wrapped {
            Some(wrapped) => wrapped,
            None => self.payload_type,
        }
    }

    /// Returns the same section without the codec that wraps another.
    pub fn plain(&self) -> PayloadTypes {
        PayloadTypes::of(
            self.codec.wrapped().unwrap_or(self.codec),
            self.plain_payload_type(),
        )
    }

    /// Returns the codec of a packet. An unknown payload type counts as that of the preferred
    /// codec.
    #[inline]
    pub fn codec_of(&self, payload_type: u8) -> Codec {
        if self.wrapped == Some(payload_type) {
            self.codec.wrapped().unwrap_or(self.codec)
        } else {
            self.codec
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_distinct_and_read_back() {
        let mut payload_types: Vec<u8> = Vec::new();
        for codec in Codec::ALL {
            let (name, _) = codec.rtpmap().split_once('/').unwrap();
            let rate = codec.clock_rate();
            assert_eq!(Codec::from_rtpmap(&name.to_uppercase(), rate), Some(codec));
            assert_eq!(Codec::from_rtpmap(name, rate + 1), None);
            assert!(codec.rtpmap().contains(&format!("/{rate}")));
            let kind = codec.mime().split('/').next();
            assert_eq!(kind == Some("audio"), codec.kind() == Kind::Audio);
            payload_types.push(codec.payload_type());
            payload_types.extend(codec.rtx_payload_type());
        }
        let count = payload_types.len();
        payload_types.sort_unstable();
        payload_types.dedup();
        assert_eq!(payload_types.len(), count);
        let opus = Codec::Opus.payload_type();
        assert_eq!(Codec::Red.fmtp(), format!("{opus}/{opus}"));
    }

    #[test]
    fn each_codec_says_where_a_frame_begins_and_ends() {
        let opus = Codec::Opus.depacketize(&[0x78, 1], false).unwrap();
        assert!(opus.start && opus.end && opus.key && opus.body_at == 0);
        let red = [0xEF, 0x0F, 0x00, 0x02, 0x6F, 1, 2, 3, 4];
        assert_eq!(Codec::Red.depacketize(&red, false).unwrap().body_at, 7);
        // S and PID 0, with a picture id of 15 bits and temporal layer 2. Then the first byte of a
        // key frame.
        let vp8 = [0xB0, 0xA0, 0x81, 0x00, 0x80, 0x10];
        let info = Codec::Vp8.depacketize(&vp8, true).unwrap();
        assert_eq!(
            info,
            PayloadInfo {
                start: true,
                end: true,
                key: true,
                discardable: true,
                spatial_layer: 0,
                temporal_layer: 2,
                body_at: 5,
            }
        );
        for codec in Codec::ALL {
            assert_eq!(codec.depacketize(&[], true), None);
        }
    }

    #[test]
    fn a_stream_of_red_may_carry_plain_opus() {
        let types = PayloadTypes {
            wrapped: Some(111),
            ..PayloadTypes::of(Codec::Red, 63)
        };
        let codecs = [63, 111, 13].map(|payload_type| types.codec_of(payload_type));
        assert_eq!(codecs, [Codec::Red, Codec::Opus, Codec::Red]);
        assert_eq!(PayloadTypes::of(Codec::Vp8, 96).codec_of(111), Codec::Vp8);
    }
}
