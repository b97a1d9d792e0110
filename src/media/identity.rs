//! Frame identity: who made a frame, which one it is, and when it was meant to be sent.
//!
//! It is at the END of a frame's payload, because an SFU rewrites headers and the VP8 descriptor
//! but no byte after them. Video carries it in LiveKit's own frame-metadata envelope (`LKTS`), so
//! that LiveKit's SDKs and throng can measure each other. Opus carries it in the padding of RFC
//! 6716, section 3.2.5.
//!
//! `LKTS` consists of TLVs, the trailer's length (1 byte), then the four letters. Tag, length and
//! value bytes, big endian, and the length byte are XORed with 0xFF. Tag 1 is a user timestamp (8
//! bytes, microseconds), 2 a frame id (4 bytes), 3 user data. Source: livekit/rust-sdks,
//! `webrtc-sys` packet trailer.

/// Track that a frame belongs to.
///
/// The type is packed, because a [`FrameIdentity`] then has 24 bytes instead of 32, and each
/// received video stream holds 16 of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(Rust, packed)]
pub struct Origin {
    /// Index of the publishing participant over the whole run.
    pub publisher: u32,
    /// Number of its track.
    pub track: u8,
}

/// Identifies one frame of one run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameIdentity {
    /// Planned send time of the frame, in microseconds since 1970 by the sender's clock.
    pub intended_unix_us: u64,
    /// Tag of the run; distinguishes it from other runs.
    pub run: u32,
    pub origin: Origin,
    pub frame: u32,
    /// Simulcast layer, 0 the smallest.
    pub layer: u8,
}

/// Values in a trailer that any LiveKit SDK understands. Both are optional there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ForeignTrailer {
    /// Microseconds since 1970 by convention; an application may put anything here.
    pub user_timestamp: Option<u64>,
    pub frame_id: Option<u32>,
}

/// Number of bytes added to a video frame's last packet.
pub const VIDEO_TRAILER_LEN: usize = 10 + 6 + (2 + USER_DATA_LEN) + ENVELOPE_LEN;

/// Number of bytes of identity at the end of an Opus packet.
pub const AUDIO_IDENTITY_LEN: usize = 24;

/// Header of the padding extension that holds the audio identity
/// (draft-ietf-mlcodec-opus-extension): id 120, with a length up to the end of the padding.
pub const AUDIO_EXTENSION: u8 = 120 << 1;

const MAGIC: &[u8; 4] = b"LKTS";
const ENVELOPE_LEN: usize = 1 + MAGIC.len();
const XOR: u8 = 0xFF;
const TAG_USER_TIMESTAMP: u8 = 1;
const TAG_FRAME_ID: u8 = 2;
const TAG_USER_DATA: u8 = 3;

/// Marks user data as throng's own.
const USER_DATA_MAGIC: [u8; 2] = *b"th";
const USER_DATA_LEN: usize = 2 + 4 + 4 + 1 + 1 + 2;

impl FrameIdentity {
    /// Writes the whole trailer, which follows the last payload byte.
    pub fn write_video(&self, out: &mut [u8; VIDEO_TRAILER_LEN]) {
        let mut writer = TrailerWriter { out, at: 0 };
        writer.put(&[TAG_USER_TIMESTAMP, 8]);
        writer.put(&self.intended_unix_us.to_be_bytes());
        writer.put(&[TAG_FRAME_ID, 4]);
        writer.put(&self.frame.to_be_bytes());
        writer.put(&[TAG_USER_DATA, USER_DATA_LEN as u8]);
        writer.put(&USER_DATA_MAGIC);
        writer.put(&self.run.to_be_bytes());
        writer.put(&self.origin.publisher.to_be_bytes());
        writer.put(&[self.origin.track, self.layer]);
        writer.put(&self.checksum().to_be_bytes());
        writer.put(&[VIDEO_TRAILER_LEN as u8]);
        out.iter_mut().for_each(|byte| *byte ^= XOR);
        out[VIDEO_TRAILER_LEN - MAGIC.len()..].copy_from_slice(MAGIC);
    }

    /// Reads the identity from the payload of a video frame's last packet; `None` for anything that
    /// throng did not write.
    pub fn parse_video(payload: &[u8]) -> Option<FrameIdentity> {
        let mut facts = ForeignTrailer::default();
        let mut ours = None;
        for (tag, value) in (Tlvs {
            rest: tlv_region(payload)?,
        }) {
            facts.take(tag, value);
            if tag == TAG_USER_DATA {
                ours = plain::<USER_DATA_LEN>(value).or(ours);
            }
        }
        let [m0, m1, r0, r1, r2, r3, o0, o1, o2, o3, track, layer, c0, c1] = ours?;
        let identity = FrameIdentity {
            intended_unix_us: facts.user_timestamp?,
            run: u32::from_be_bytes([r0, r1, r2, r3]),
            origin: Origin {
                publisher: u32::from_be_bytes([o0, o1, o2, o3]),
                track,
            },
            frame: facts.frame_id?,
            layer,
        };
        ([m0, m1] == USER_DATA_MAGIC && u16::from_be_bytes([c0, c1]) == identity.checksum())
            .then_some(identity)
    }

    /// Writes the identity into the last bytes of an Opus packet that was prepared for it.
    pub fn write_audio(&self, out: &mut [u8; AUDIO_IDENTITY_LEN]) {
        out[0..4].copy_from_slice(&self.run.to_be_bytes());
        out[4..8].copy_from_slice(&self.origin.publisher.to_be_bytes());
        out[8..12].copy_from_slice(&self.frame.to_be_bytes());
        out[12..20].copy_from_slice(&self.intended_unix_us.to_be_bytes());
        out[20..22].copy_from_slice(&[self.origin.track, self.layer]);
        out[22..24].copy_from_slice(&self.checksum().to_be_bytes());
    }

    /// Reads the identity from a whole Opus packet; `None` for anything that throng did not write.
    pub fn parse_audio(packet: &[u8]) -> Option<FrameIdentity> {
        if !has_identity_padding(packet) {
            return None;
        }
        let bytes: &[u8; AUDIO_IDENTITY_LEN] = packet.last_chunk()?;
        let [
            r0,
            r1,
            r2,
            r3,
            o0,
            o1,
            o2,
            o3,
            f0,
            f1,
            f2,
            f3,
            t0,
            t1,
            t2,
            t3,
            t4,
            t5,
            t6,
            t7,
            track,
            layer,
            c0,
            c1,
        ] = *bytes;
        let identity = FrameIdentity {
            intended_unix_us: u64::from_be_bytes([t0, t1, t2, t3, t4, t5, t6, t7]),
            run: u32::from_be_bytes([r0, r1, r2, r3]),
            origin: Origin {
                publisher: u32::from_be_bytes([o0, o1, o2, o3]),
                track,
            },
            frame: u32::from_be_bytes([f0, f1, f2, f3]),
            layer,
        };
        (u16::from_be_bytes([c0, c1]) == identity.checksum()).then_some(identity)
    }

    /// Checksum against damage and chance matches. It does not protect against intent.
    fn checksum(&self) -> u16 {
        const ODD: u64 = 0x9E37_79B9_7F4A_7C15;
        let places =
            u64::from(self.frame) << 16 | u64::from(self.origin.track) << 8 | u64::from(self.layer);
        let source = u64::from(self.run) << 32 | u64::from(self.origin.publisher);
        let sum = [source, places, self.intended_unix_us]
            .iter()
            .fold(ODD, |sum, word| {
                (sum.rotate_left(29) ^ word).wrapping_mul(ODD)
            });
        (sum >> 48) as u16
    }
}

/// Reads what any LiveKit SDK would read from the payload of a video frame's last packet; `None`
/// without a well-formed trailer.
pub fn parse_foreign(payload: &[u8]) -> Option<ForeignTrailer> {
    let mut facts = ForeignTrailer::default();
    for (tag, value) in (Tlvs {
        rest: tlv_region(payload)?,
    }) {
        facts.take(tag, value);
    }
    Some(facts)
}

/// Returns the length of the trailer at the end of a video frame's last packet, so that it can be
/// stripped; `None` if there is none.
pub fn video_trailer_len(payload: &[u8]) -> Option<usize> {
    let (before, magic) = payload.split_last_chunk()?;
    let len = usize::from(before.last()? ^ XOR);
    (magic == MAGIC && (ENVELOPE_LEN..=payload.len()).contains(&len)).then_some(len)
}

/// Returns whether this is an Opus packet of code 3 whose padding ends in the identity extension
/// (RFC 6716, section 3.2.5).
fn has_identity_padding(packet: &[u8]) -> bool {
    const PADDING_FLAG: u8 = 0x40;
    let &[toc, frame_count, ref rest @ ..] = packet else {
        return false;
    };
    if toc & 3 != 3 || frame_count & PADDING_FLAG == 0 {
        return false;
    }
    let full = rest.iter().take_while(|byte| **byte == 255).count();
    let padding = rest
        .get(full)
        .map_or(0, |last| full * 254 + usize::from(*last));
    let fits = padding > AUDIO_IDENTITY_LEN && padding + full < rest.len();
    fits && packet
        .len()
        .checked_sub(AUDIO_IDENTITY_LEN + 1)
        .and_then(|at| packet.get(at))
        == Some(&AUDIO_EXTENSION)
}

impl ForeignTrailer {
    fn take(&mut self, tag: u8, value: &[u8]) {
        match tag {
            TAG_USER_TIMESTAMP => {
                self.user_timestamp = plain(value).map(u64::from_be_bytes).or(self.user_timestamp)
            }
            TAG_FRAME_ID => self.frame_id = plain(value).map(u32::from_be_bytes).or(self.frame_id),
            _ => {}
        }
    }
}

/// Returns the bytes between a frame's own payload and the envelope.
fn tlv_region(payload: &[u8]) -> Option<&[u8]> {
    let start = payload.len() - video_trailer_len(payload)?;
    payload.get(start..payload.len() - ENVELOPE_LEN)
}

/// Decodes a value; `None` if it does not have the length of its tag.
fn plain<const N: usize>(value: &[u8]) -> Option<[u8; N]> {
    let bytes: [u8; N] = value.try_into().ok()?;
    Some(bytes.map(|byte| byte ^ XOR))
}

/// Iterates over tags (decoded) and values (not yet decoded). It ends at the first one that does
/// not fit.
struct Tlvs<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Tlvs<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (&[tag, len], rest) = self.rest.split_first_chunk()?;
        let (value, rest) = rest.split_at_checked(usize::from(len ^ XOR))?;
        self.rest = rest;
        Some((tag ^ XOR, value))
    }
}

struct TrailerWriter<'a> {
    out: &'a mut [u8; VIDEO_TRAILER_LEN],
    at: usize,
}

impl TrailerWriter<'_> {
    fn put(&mut self, bytes: &[u8]) {
        self.out[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: FrameIdentity = FrameIdentity {
        intended_unix_us: 1_790_000_000_123_456,
        run: 0xDEAD_BEEF,
        origin: Origin {
            publisher: 70_000,
            track: 3,
        },
        frame: 0x0102_0304,
        layer: 2,
    };

    fn samples() -> impl Iterator<Item = FrameIdentity> {
        let mut state = 1u64;
        let mut next = move || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            state >> 16
        };
        let random = (0..500).map(move |_| FrameIdentity {
            intended_unix_us: next() << 20 ^ next(),
            run: next() as u32,
            origin: Origin {
                publisher: next() as u32,
                track: next() as u8,
            },
            frame: next() as u32,
            layer: next() as u8,
        });
        [FrameIdentity::default(), SAMPLE].into_iter().chain(random)
    }

    fn video_payload(identity: &FrameIdentity) -> Vec<u8> {
        let mut trailer = [0; VIDEO_TRAILER_LEN];
        identity.write_video(&mut trailer);
        [&[0x90, 0x80, 1, 2, 3], &trailer[..]].concat()
    }

    fn audio_packet(identity: &FrameIdentity, idle: usize) -> Vec<u8> {
        let mut slot = [0; AUDIO_IDENTITY_LEN];
        identity.write_audio(&mut slot);
        let padding = idle + 1 + AUDIO_IDENTITY_LEN;
        let lens = [
            vec![255; (padding - 1) / 254],
            vec![((padding - 1) % 254 + 1) as u8],
        ]
        .concat();
        [
            &[0x7B, 0x41],
            &lens[..],
            &[9, 9, 9, 9],
            &vec![0; idle],
            &[AUDIO_EXTENSION],
            &slot,
        ]
        .concat()
    }

    #[test]
    fn what_is_written_is_read_back() {
        for identity in samples() {
            assert_eq!(
                FrameIdentity::parse_video(&video_payload(&identity)),
                Some(identity)
            );
            for idle in [0, 1, 100, 228, 229, 230, 483, 484, 900] {
                assert_eq!(
                    FrameIdentity::parse_audio(&audio_packet(&identity, idle)),
                    Some(identity),
                    "idle {idle}"
                );
            }
        }
    }

    #[test]
    fn the_video_trailer_is_livekit_s_envelope_byte_for_byte() {
        let payload = video_payload(&SAMPLE);
        let plain: Vec<u8> = payload[5..].iter().map(|byte| byte ^ 0xFF).collect();
        assert_eq!(
            plain[..10],
            [&[1, 8], &1_790_000_000_123_456u64.to_be_bytes()[..]].concat()
        );
        assert_eq!(plain[10..16], [2, 4, 1, 2, 3, 4]);
        assert_eq!(plain[16..18], [3, USER_DATA_LEN as u8]);
        assert_eq!(usize::from(plain[32]), VIDEO_TRAILER_LEN);
        assert_eq!(payload[payload.len() - 4..], *b"LKTS");
        assert_eq!(video_trailer_len(&payload), Some(VIDEO_TRAILER_LEN));
        let facts = ForeignTrailer {
            user_timestamp: Some(SAMPLE.intended_unix_us),
            frame_id: Some(SAMPLE.frame),
        };
        assert_eq!(parse_foreign(&payload), Some(facts));
    }

    fn foreign(tlvs: &[u8]) -> Vec<u8> {
        let len = (tlvs.len() + ENVELOPE_LEN) as u8;
        let body: Vec<u8> = tlvs.iter().chain([&len]).map(|byte| byte ^ 0xFF).collect();
        [&[0x10, 0, 0][..], &body, b"LKTS"].concat()
    }

    #[test]
    fn a_foreign_trailer_gives_its_own_facts_and_no_identity() {
        let only_frame = foreign(&[2, 4, 0, 0, 0, 9]);
        assert_eq!(
            parse_foreign(&only_frame),
            Some(ForeignTrailer {
                user_timestamp: None,
                frame_id: Some(9)
            })
        );
        let unknown_first = foreign(&[200, 2, 1, 1, 1, 8, 0, 0, 0, 0, 0, 0, 0, 5, 3, 3, 7, 7, 7]);
        assert_eq!(
            parse_foreign(&unknown_first),
            Some(ForeignTrailer {
                user_timestamp: Some(5),
                frame_id: None
            })
        );
        let wrong_len = foreign(&[2, 3, 0, 0, 9]);
        assert_eq!(parse_foreign(&wrong_len), Some(ForeignTrailer::default()));
        for payload in [
            only_frame,
            unknown_first,
            wrong_len,
            foreign(&[]),
            foreign(&[1, 255]),
        ] {
            assert_eq!(FrameIdentity::parse_video(&payload), None);
        }
        assert_eq!(parse_foreign(b"no trailer at all"), None);
    }

    #[test]
    fn damage_anywhere_is_noticed() {
        let (video, audio) = (video_payload(&SAMPLE), audio_packet(&SAMPLE, 0));
        for bit in 0..8 {
            for at in 5..video.len() {
                let mut damaged = video.clone();
                damaged[at] ^= 1 << bit;
                assert_eq!(FrameIdentity::parse_video(&damaged), None, "byte {at}");
            }
            for at in audio.len() - AUDIO_IDENTITY_LEN - 1..audio.len() {
                let mut damaged = audio.clone();
                damaged[at] ^= 1 << bit;
                assert_eq!(FrameIdentity::parse_audio(&damaged), None, "byte {at}");
            }
        }
    }

    #[test]
    fn hostile_bytes_never_panic_and_seldom_mean_anything() {
        let mut state = 7u64;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32
        };
        let mut understood = 0;
        for round in 0..200_000 {
            let len = next() as usize % 80;
            let mut bytes: Vec<u8> = (0..len).map(|_| next() as u8).collect();
            if round % 2 == 0 && len > 5 {
                bytes[len - 4..].copy_from_slice(MAGIC);
                bytes[len - 5] = !(next() as u8 % 80);
            } else if len > 30 {
                bytes[..3].copy_from_slice(&[3, 0x41, 25]);
                bytes[len - 25] = AUDIO_EXTENSION;
            }
            understood += u32::from(FrameIdentity::parse_video(&bytes).is_some())
                + u32::from(FrameIdentity::parse_audio(&bytes).is_some());
            parse_foreign(&bytes);
            assert!(video_trailer_len(&bytes).is_none_or(|trailer| trailer <= bytes.len()));
        }
        assert!(understood <= 10, "{understood}");
        for payload in [&video_payload(&SAMPLE), &audio_packet(&SAMPLE, 300)] {
            for cut in 0..payload.len() {
                assert_eq!(FrameIdentity::parse_video(&payload[..cut]), None);
                assert_eq!(FrameIdentity::parse_audio(&payload[..cut]), None);
            }
        }
    }
}
