//! Opus in Ogg (RFC 7845).
//!
//! A granule position counts only the samples of the packets before it, so a hole cannot be left
//! out. It is filled with packets of empty frames, two bytes each, which ask the decoder to conceal
//! what is missing (section 4.1). They hold no sound.

use ::ogg::{PacketWriteEndInfo, PacketWriter};
use opus::packet;

use crate::media::opus::CLOCK_RATE;

/// Samples per page. This is the most that a killed process has not written yet.
const PAGE_SAMPLES: u64 = CLOCK_RATE as u64 / 5;
/// Delay of libopus's encoder: the samples that a decoder outputs before the first encoded sample.
/// Section 4.2 wants more for recordings that start in the middle of a stream, so that the decoder
/// can settle. A subscriber who joins there has no more either, and the file shows what it
/// received.
const PRE_SKIP: u16 = 312;
/// Number of channels. Opus over RTP is always declared as stereo, and may change from packet to
/// packet (RFC 7587). A packet of one channel plays on both.
const CHANNELS: u8 = 2;
/// Maximum length of a packet: 120 ms (RFC 6716).
const PACKET_SAMPLES_MAX: u32 = CLOCK_RATE / 1000 * 120;

/// One Opus stream as Ogg pages. They are collected in memory until [`OpusFile::take_pages`].
pub struct OpusFile {
    writer: PacketWriter<'static, Vec<u8>>,
    serial: u32,
    /// Number of samples up to the end of the last packet.
    position: u64,
    page_started_at: u64,
    /// Newest packet, which waits for its successor, because the last page must be marked as the
    /// last.
    held: Option<Vec<u8>>,
}

/// Error returned for a packet that RFC 6716 does not allow.
#[derive(Debug, PartialEq, Eq)]
pub struct MalformedOpus;

impl OpusFile {
    /// Creates a file. `serial` is the serial number of the logical stream; any number will do.
    pub fn new(serial: u32) -> OpusFile {
        let mut file = OpusFile {
            writer: PacketWriter::new(Vec::new()),
            serial,
            position: 0,
            page_started_at: 0,
            held: None,
        };
        file.write(head(), PacketWriteEndInfo::EndPage);
        file.write(tags(), PacketWriteEndInfo::EndPage);
        file
    }

    /// Appends a packet that starts `at` samples (48,000 a second) after the first one. Before it,
    /// the hole since the last packet is filled with whole frames that mark it.
    pub fn push(&mut self, at: u64, packet: &[u8]) -> Result<(), MalformedOpus> {
        let samples = samples(packet).ok_or(MalformedOpus)?;
        if let Some(last) = self.held.as_ref() {
            let hole =
                OpusHole::after(last, at.saturating_sub(self.position)).ok_or(MalformedOpus)?;
            hole.packets()
                .for_each(|(empty, samples)| self.append(empty, samples));
        }
        self.append(packet.to_vec(), samples);
        Ok(())
    }

    /// Ends the stream.
    pub fn finish(&mut self) {
        if let Some(last) = self.held.take() {
            self.write(last, PacketWriteEndInfo::EndStream);
        }
    }

    /// Returns the complete pages.
    pub fn take_pages(&mut self) -> Vec<u8> {
        std::mem::take(self.writer.inner_mut())
    }

    fn append(&mut self, packet: Vec<u8>, samples: u32) {
        if let Some(before) = self.held.replace(packet) {
            let full = self.position - self.page_started_at >= PAGE_SAMPLES;
            if full {
                self.page_started_at = self.position;
            }
            self.write(
                before,
                if full {
                    PacketWriteEndInfo::EndPage
                } else {
                    PacketWriteEndInfo::NormalPacket
                },
            );
        }
        self.position += u64::from(samples);
    }

    fn write(&mut self, packet: Vec<u8>, end: PacketWriteEndInfo) {
        self.writer
            .write_packet(packet, self.serial, end, self.position)
            .expect("writing to memory does not fail");
    }
}

/// Hole of whole frames of the same kind as the packet before it, because decoders conceal these
/// best.
struct OpusHole {
    toc: u8,
    frame_samples: u32,
    frames: u64,
}

impl OpusHole {
    fn after(last: &[u8], samples: u64) -> Option<OpusHole> {
        /// Bits of the TOC byte that give the number of frames.
        const CODE: u8 = 3;
        let frame_samples = packet::get_samples_per_frame(last, CLOCK_RATE).ok()? as u32;
        Some(OpusHole {
            toc: last.first()? & !CODE,
            frame_samples,
            frames: samples / u64::from(frame_samples),
        })
    }

    /// Returns the packets that fill the hole, as few as possible, with the samples of each.
    fn packets(&self) -> impl Iterator<Item = (Vec<u8>, u32)> {
        /// Code for any number of frames of one size (RFC 6716, section 3.2.5). The number follows.
        const CODE_3: u8 = 3;
        let &OpusHole {
            toc,
            frame_samples,
            frames,
        } = self;
        let most = u64::from(PACKET_SAMPLES_MAX / frame_samples);
        let last = frames % most;
        let counts =
            std::iter::repeat_n(most, (frames / most) as usize).chain((last > 0).then_some(last));
        counts.map(move |count| {
            (
                vec![toc | CODE_3, count as u8],
                count as u32 * frame_samples,
            )
        })
    }
}

/// Returns the samples per channel; `None` if this is no Opus packet.
fn samples(packet: &[u8]) -> Option<u32> {
    let samples = packet::get_nb_samples(packet, CLOCK_RATE).ok()? as u32;
    (1..=PACKET_SAMPLES_MAX)
        .contains(&samples)
        .then_some(samples)
}

/// Returns the identification header (section 5.1).
fn head() -> Vec<u8> {
    let mut head = b"OpusHead\x01".to_vec();
    head.push(CHANNELS);
    head.extend_from_slice(&PRE_SKIP.to_le_bytes());
    head.extend_from_slice(&CLOCK_RATE.to_le_bytes());
    // The output gain is 0, and there is one stream (mapping family 0).
    head.extend_from_slice(&[0, 0, 0]);
    head
}

/// Returns the comment header (section 5.2): the vendor, and no comments.
fn tags() -> Vec<u8> {
    let vendor = concat!("throng ", env!("CARGO_PKG_VERSION"));
    let mut tags = b"OpusTags".to_vec();
    tags.extend_from_slice(&(vendor.len() as u32).to_le_bytes());
    tags.extend_from_slice(vendor.as_bytes());
    tags.extend_from_slice(&0u32.to_le_bytes());
    tags
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use ::ogg::PacketReader;

    use super::*;

    /// TOC byte for CELT, full band, one frame of 20 ms.
    const TOC_20_MS: u8 = 31 << 3;

    fn read(bytes: Vec<u8>) -> Vec<::ogg::Packet> {
        let mut reader = PacketReader::new(Cursor::new(bytes));
        std::iter::from_fn(|| reader.read_packet().unwrap()).collect()
    }

    #[test]
    fn packets_come_back_with_positions_and_the_stream_ends() {
        let mut file = OpusFile::new(77);
        for at in 0..25u8 {
            file.push(u64::from(at) * 960, &[TOC_20_MS, at]).unwrap();
        }
        file.finish();
        let packets = read(file.take_pages());
        assert!(packets.iter().all(|packet| packet.stream_serial() == 77));
        assert_eq!(
            &packets[0].data,
            b"OpusHead\x01\x02\x38\x01\x80\xBB\0\0\0\0\0"
        );
        assert!(
            packets[0].first_in_stream() && packets[0].last_in_page() && packets[1].last_in_page()
        );
        assert!(packets[1].data.starts_with(b"OpusTags"));
        let audio = &packets[2..];
        assert!(
            audio
                .iter()
                .map(|packet| &packet.data)
                .eq(&(0..25).map(|at| vec![TOC_20_MS, at]).collect::<Vec<_>>())
        );
        let page_ends: Vec<_> = audio
            .iter()
            .filter(|packet| packet.last_in_page())
            .collect();
        let positions: Vec<u64> = page_ends.iter().map(|packet| packet.absgp_page()).collect();
        assert_eq!(positions, [10 * 960, 20 * 960, 25 * 960]);
        assert!(audio[24].last_in_stream() && !audio[23].last_in_stream());
    }

    #[test]
    fn what_is_complete_is_out_before_the_stream_ends() {
        let mut file = OpusFile::new(1);
        for at in 0..100 {
            file.push(at * 960, &[TOC_20_MS]).unwrap();
        }
        let packets = read(file.take_pages());
        assert!(packets.len() > 2 + 85, "{} packets", packets.len());
        assert!(!packets.last().unwrap().last_in_stream());
    }

    #[test]
    fn a_hole_is_marked_with_empty_frames_and_later_packets_stay_at_their_time() {
        for (missing, marks) in [
            (1, vec![vec![TOC_20_MS | 3, 1]]),
            (6, vec![vec![TOC_20_MS | 3, 6]]),
            (
                15,
                vec![
                    vec![TOC_20_MS | 3, 6],
                    vec![TOC_20_MS | 3, 6],
                    vec![TOC_20_MS | 3, 3],
                ],
            ),
        ] {
            let mut file = OpusFile::new(1);
            file.push(0, &[TOC_20_MS, 1]).unwrap();
            file.push((1 + missing) * 960, &[TOC_20_MS, 2]).unwrap();
            file.finish();
            let packets = read(file.take_pages());
            let (first, rest) = packets[2..].split_first().unwrap();
            let (last, between) = rest.split_last().unwrap();
            assert_eq!((first.data[1], last.data[1]), (1, 2));
            assert!(between.iter().map(|packet| &packet.data).eq(&marks));
            assert_eq!(last.absgp_page(), (2 + missing) * 960);
            for mark in marks {
                assert!(
                    opus::packet::parse(&mark)
                        .unwrap()
                        .frames
                        .iter()
                        .all(|frame| frame.is_empty())
                );
            }
        }
    }

    #[test]
    fn less_than_a_frame_is_not_marked_and_not_forgotten() {
        let mut file = OpusFile::new(1);
        for at in [0, 960 + 480, 2 * 960 + 960] {
            file.push(at, &[TOC_20_MS]).unwrap();
        }
        // The packet is too early, because the sender's clock went back. Written samples cannot be
        // removed.
        file.push(3 * 960, &[TOC_20_MS]).unwrap();
        assert_eq!(file.position, 5 * 960);
    }

    #[test]
    fn what_is_no_opus_packet_is_refused() {
        let mut file = OpusFile::new(1);
        // Seven frames of 20 ms, and packets without any frame.
        for packet in [
            &[][..],
            &[TOC_20_MS | 3, 7],
            &[TOC_20_MS | 3, 0],
            &[TOC_20_MS | 3],
        ] {
            assert_eq!(file.push(0, packet), Err(MalformedOpus), "{packet:?}");
        }
        assert!(file.held.is_none());
    }
}
