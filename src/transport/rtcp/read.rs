//! Iterator over an untrusted compound packet.

use crate::transport::rtp::Ssrc;
use std::slice;

use super::{
    BLOCK_DLRR, BLOCK_RRTR, DLRR_BLOCK_LEN, DlrrBlock, EXTENDED_REPORT, FMT_APPLICATION_LAYER,
    FMT_FIR, FMT_NACK, FMT_PLI, FMT_TRANSPORT_CC, GOODBYE, PAYLOAD_FEEDBACK, RECEIVER_REPORT,
    REMB_NAME, REPORT_BLOCK_LEN, ReportBlock, SDES_CNAME, SENDER_REPORT, SOURCE_DESCRIPTION,
    SenderInfo, TRANSPORT_FEEDBACK, VERSION,
};
use crate::transport::rtp::be32;
use crate::transport::sequence::Seq;
use crate::units::Bitrate;

/// One packet of a compound. Its lists borrow from the compound.
#[derive(Clone, Debug)]
pub enum RtcpPacket<'a> {
    SenderReport {
        sender: SenderInfo,
        reports: ReportBlocks<'a>,
    },
    ReceiverReport {
        ssrc: Ssrc,
        reports: ReportBlocks<'a>,
    },
    Sdes {
        chunks: SdesChunks<'a>,
    },
    Bye {
        sources: Ssrcs<'a>,
        reason: Option<&'a [u8]>,
    },
    Nack {
        sender_ssrc: Ssrc,
        media_ssrc: Ssrc,
        /// Up to 17 numbers for each four bytes, in the sender's order, with repetitions.
        seqs: NackSeqs<'a>,
    },
    /// Transport-wide feedback (draft-holmer-rmcat-transport-wide-cc-extensions-01). The body
    /// starts at its base sequence number.
    TransportCc {
        sender_ssrc: Ssrc,
        media_ssrc: Ssrc,
        body: &'a [u8],
    },
    Pli {
        sender_ssrc: Ssrc,
        media_ssrc: Ssrc,
    },
    Fir {
        sender_ssrc: Ssrc,
        /// Pairs of (media SSRC, command sequence number). A repeated number is a repeated request,
        /// not a new one.
        entries: FirEntries<'a>,
    },
    Remb {
        sender_ssrc: Ssrc,
        bitrate: Bitrate,
        sources: Ssrcs<'a>,
    },
    Xr {
        ssrc: Ssrc,
        /// NTP timestamp of the receiver.
        rrtr: Option<u64>,
        dlrr: DlrrBlocks<'a>,
    },
    /// APP, and every other packet that is not used.
    Unknown {
        payload_type: u8,
        /// Report count, subtype or feedback message type.
        count: u8,
        body: &'a [u8],
    },
}

/// Defect of a packet. The caller counts it; nothing of that packet was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MalformedRtcp {
    /// The version is not 2, or the length or padding runs past the end. The start of the next
    /// packet is unknown, so the iteration ends.
    Framing,
    /// The contents contradict the packet's own length. The iteration continues with the next
    /// packet.
    Contents,
}

/// Iterates over the packets of a compound (or of a reduced-size one, RFC 5506).
pub const fn packets(compound: &[u8]) -> Packets<'_> {
    Packets { rest: compound }
}

#[derive(Clone, Debug)]
pub struct Packets<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Packets<'a> {
    type Item = Result<RtcpPacket<'a>, MalformedRtcp>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let Some(frame) = RtcpFrame::split(self.rest) else {
            self.rest = &[];
            return Some(Err(MalformedRtcp::Framing));
        };
        self.rest = frame.rest;
        Some(frame.packet().ok_or(MalformedRtcp::Contents))
    }
}

struct RtcpFrame<'a> {
    payload_type: u8,
    count: u8,
    /// Contents after the four-byte header, without padding.
    body: &'a [u8],
    rest: &'a [u8],
}

impl<'a> RtcpFrame<'a> {
    fn split(compound: &'a [u8]) -> Option<RtcpFrame<'a>> {
        let (&[flags, payload_type, l0, l1], behind) = compound.split_first_chunk()?;
        if flags >> 6 != VERSION {
            return None;
        }
        let (padded, rest) =
            behind.split_at_checked(4 * usize::from(u16::from_be_bytes([l0, l1])))?;
        let body = if flags & 0x20 == 0 {
            padded
        } else {
            without_padding(padded)?
        };
        Some(RtcpFrame {
            payload_type,
            count: flags & 0x1F,
            body,
            rest,
        })
    }

    fn packet(&self) -> Option<RtcpPacket<'a>> {
        match (self.payload_type, self.count) {
            (SENDER_REPORT, _) => self.sender_report(),
            (RECEIVER_REPORT, _) => self.receiver_report(),
            (SOURCE_DESCRIPTION, _) => self.sdes(),
            (GOODBYE, _) => self.bye(),
            (TRANSPORT_FEEDBACK, FMT_NACK) => self.nack(),
            (TRANSPORT_FEEDBACK, FMT_TRANSPORT_CC) => self.transport_cc(),
            (PAYLOAD_FEEDBACK, FMT_PLI) => self.pli(),
            (PAYLOAD_FEEDBACK, FMT_FIR) => self.fir(),
            (PAYLOAD_FEEDBACK, FMT_APPLICATION_LAYER) => self.remb(),
            (EXTENDED_REPORT, _) => self.xr(),
            _ => Some(self.unknown()),
        }
    }

    fn sender_report(&self) -> Option<RtcpPacket<'a>> {
        let (own, blocks) = self.body.split_first_chunk::<24>()?;
        let sender = SenderInfo {
            ssrc: Ssrc(be32(own, 0)?),
            ntp: be64(own, 4)?,
            rtp_time: be32(own, 12)?,
            packets: be32(own, 16)?,
            octets: be32(own, 20)?,
        };
        Some(RtcpPacket::SenderReport {
            sender,
            reports: self.reports(blocks)?,
        })
    }

    fn receiver_report(&self) -> Option<RtcpPacket<'a>> {
        let (ssrc, blocks) = self.body.split_first_chunk()?;
        Some(RtcpPacket::ReceiverReport {
            ssrc: Ssrc::from_be_bytes(*ssrc),
            reports: self.reports(blocks)?,
        })
    }

    /// Returns the counted report blocks. What follows them is a profile's extension and is
    /// ignored.
    fn reports(&self, blocks: &'a [u8]) -> Option<ReportBlocks<'a>> {
        let (blocks, _) = blocks.as_chunks();
        Some(ReportBlocks {
            blocks: blocks.get(..usize::from(self.count))?.iter(),
        })
    }

    fn sdes(&self) -> Option<RtcpPacket<'a>> {
        let chunks = SdesChunks {
            rest: self.body,
            remaining: self.count,
        };
        (chunks.clone().count() == usize::from(self.count)).then_some(RtcpPacket::Sdes { chunks })
    }

    fn bye(&self) -> Option<RtcpPacket<'a>> {
        let (sources, text) = self.body.split_at_checked(4 * usize::from(self.count))?;
        let reason = match text.split_first() {
            None => None,
            Some((&len, text)) => Some(text.get(..usize::from(len))?),
        };
        Some(RtcpPacket::Bye {
            sources: Ssrcs::new(sources),
            reason,
        })
    }

    fn nack(&self) -> Option<RtcpPacket<'a>> {
        let (sender_ssrc, media_ssrc, body) = self.feedback()?;
        let (pairs, []) = body.as_chunks() else {
            return None;
        };
        Some(RtcpPacket::Nack {
            sender_ssrc,
            media_ssrc,
            seqs: NackSeqs {
                pairs: pairs.iter(),
                pid: 0,
                pending: 0,
            },
        })
    }

    fn transport_cc(&self) -> Option<RtcpPacket<'a>> {
        let (sender_ssrc, media_ssrc, body) = self.feedback()?;
        Some(RtcpPacket::TransportCc {
            sender_ssrc,
            media_ssrc,
            body,
        })
    }

    fn pli(&self) -> Option<RtcpPacket<'a>> {
        let (sender_ssrc, media_ssrc, _) = self.feedback()?;
        Some(RtcpPacket::Pli {
            sender_ssrc,
            media_ssrc,
        })
    }

    fn fir(&self) -> Option<RtcpPacket<'a>> {
        let (sender_ssrc, _, body) = self.feedback()?;
        let (entries, []) = body.as_chunks() else {
            return None;
        };
        Some(RtcpPacket::Fir {
            sender_ssrc,
            entries: FirEntries {
                entries: entries.iter(),
            },
        })
    }

    fn remb(&self) -> Option<RtcpPacket<'a>> {
        let (sender_ssrc, _, body) = self.feedback()?;
        let Some((&[r, e, m, b, count, head, middle, low], sources)) = body.split_first_chunk()
        else {
            return Some(self.unknown());
        };
        if [r, e, m, b] != REMB_NAME {
            return Some(self.unknown());
        }
        let sources = sources.get(..4 * usize::from(count))?;
        let mantissa = u64::from(u32::from_be_bytes([0, head & 0x03, middle, low]));
        let bps = mantissa.saturating_mul(1 << (head >> 2));
        Some(RtcpPacket::Remb {
            sender_ssrc,
            bitrate: Bitrate::from_bps(bps),
            sources: Ssrcs::new(sources),
        })
    }

    fn xr(&self) -> Option<RtcpPacket<'a>> {
        let (ssrc, blocks) = self.body.split_first_chunk()?;
        let mut blocks = XrBlocks { rest: blocks };
        let dlrr = DlrrBlocks {
            blocks: blocks.clone(),
            current: [].iter(),
        };
        let mut rrtr = None;
        for (kind, contents) in blocks.by_ref() {
            if kind == BLOCK_RRTR {
                rrtr = Some(be64(contents, 0)?);
            }
        }
        blocks.rest.is_empty().then_some(RtcpPacket::Xr {
            ssrc: Ssrc::from_be_bytes(*ssrc),
            rrtr,
            dlrr,
        })
    }

    fn unknown(&self) -> RtcpPacket<'a> {
        RtcpPacket::Unknown {
            payload_type: self.payload_type,
            count: self.count,
            body: self.body,
        }
    }

    /// Returns sender SSRC, media SSRC and feedback control information (RFC 4585, section 6.1).
    fn feedback(&self) -> Option<(Ssrc, Ssrc, &'a [u8])> {
        Some((
            Ssrc(be32(self.body, 0)?),
            Ssrc(be32(self.body, 4)?),
            self.body.get(8..)?,
        ))
    }
}

/// Removes the padding. RFC 3550 requires whole words of it. The webrtc-rs family writes fewer
/// bytes after a BYE, so any count that fits is accepted.
fn without_padding(padded: &[u8]) -> Option<&[u8]> {
    let count = usize::from(*padded.last()?);
    if count == 0 {
        return None;
    }
    padded.get(..padded.len().checked_sub(count)?)
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[derive(Clone, Debug)]
pub struct ReportBlocks<'a> {
    blocks: slice::Iter<'a, [u8; REPORT_BLOCK_LEN]>,
}

impl Iterator for ReportBlocks<'_> {
    type Item = ReportBlock;

    fn next(&mut self) -> Option<ReportBlock> {
        let block = self.blocks.next()?;
        let lost = be32(block, 4)?;
        Some(ReportBlock {
            ssrc: Ssrc(be32(block, 0)?),
            fraction_lost: (lost >> 24) as u8,
            // Shifting up and down extends the 24-bit sign.
            cumulative_lost: ((lost << 8) as i32) >> 8,
            extended_highest_seq: be32(block, 8)?,
            jitter: be32(block, 12)?,
            lsr: be32(block, 16)?,
            dlsr: be32(block, 20)?,
        })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.blocks.size_hint()
    }
}

impl ExactSizeIterator for ReportBlocks<'_> {}

#[derive(Clone, Debug)]
pub struct Ssrcs<'a> {
    words: slice::Iter<'a, [u8; 4]>,
}

impl<'a> Ssrcs<'a> {
    fn new(bytes: &'a [u8]) -> Ssrcs<'a> {
        Ssrcs {
            words: bytes.as_chunks().0.iter(),
        }
    }
}

impl Iterator for Ssrcs<'_> {
    type Item = Ssrc;

    fn next(&mut self) -> Option<Ssrc> {
        self.words.next().map(|word| Ssrc::from_be_bytes(*word))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.words.size_hint()
    }
}

impl ExactSizeIterator for Ssrcs<'_> {}

/// Sequence numbers of PID/BLP pairs (RFC 4585, section 6.2.1).
#[derive(Clone, Debug)]
pub struct NackSeqs<'a> {
    pairs: slice::Iter<'a, [u8; 4]>,
    pid: u16,
    /// Bit n is set while PID + n is still to be returned.
    pending: u32,
}

impl Iterator for NackSeqs<'_> {
    type Item = Seq;

    fn next(&mut self) -> Option<Seq> {
        if self.pending == 0 {
            let [p0, p1, b0, b1] = *self.pairs.next()?;
            self.pid = u16::from_be_bytes([p0, p1]);
            self.pending = u32::from(u16::from_be_bytes([b0, b1])) << 1 | 1;
        }
        let offset = self.pending.trailing_zeros() as u16;
        self.pending &= self.pending - 1;
        Some(Seq(self.pid).wrapping_add(offset))
    }
}

#[derive(Clone, Debug)]
pub struct FirEntries<'a> {
    entries: slice::Iter<'a, [u8; 8]>,
}

impl Iterator for FirEntries<'_> {
    type Item = (Ssrc, u8);

    fn next(&mut self) -> Option<(Ssrc, u8)> {
        let [a, b, c, d, command, ..] = *self.entries.next()?;
        Some((Ssrc(u32::from_be_bytes([a, b, c, d])), command))
    }
}

/// Items of a source description. Only the CNAME is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SdesChunk<'a> {
    pub ssrc: Ssrc,
    pub cname: Option<&'a [u8]>,
}

#[derive(Clone, Debug)]
pub struct SdesChunks<'a> {
    rest: &'a [u8],
    remaining: u8,
}

impl<'a> Iterator for SdesChunks<'a> {
    type Item = SdesChunk<'a>;

    fn next(&mut self) -> Option<SdesChunk<'a>> {
        self.remaining = self.remaining.checked_sub(1)?;
        let (ssrc, items) = self.rest.split_first_chunk()?;
        let mut chunk = SdesChunk {
            ssrc: Ssrc::from_be_bytes(*ssrc),
            cname: None,
        };
        let mut at = 0;
        loop {
            let kind = *items.get(at)?;
            if kind == 0 {
                break;
            }
            let text_at = at + 2;
            let text = items.get(text_at..text_at + usize::from(*items.get(at + 1)?))?;
            if kind == SDES_CNAME {
                chunk.cname = Some(text);
            }
            at = text_at + text.len();
        }
        // Skips the end mark and the zeros up to the next 32-bit boundary.
        self.rest = items.get((at + 1).next_multiple_of(4)..)?;
        Some(chunk)
    }
}

/// Report blocks of an XR packet, as (type, contents). The iteration stops before one that runs
/// past the end.
#[derive(Clone, Debug)]
struct XrBlocks<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for XrBlocks<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<(u8, &'a [u8])> {
        let (&[kind, _, l0, l1], behind) = self.rest.split_first_chunk()?;
        let (contents, rest) =
            behind.split_at_checked(4 * usize::from(u16::from_be_bytes([l0, l1])))?;
        self.rest = rest;
        Some((kind, contents))
    }
}

/// Sub-blocks of all DLRR blocks of an XR packet.
#[derive(Clone, Debug)]
pub struct DlrrBlocks<'a> {
    blocks: XrBlocks<'a>,
    current: slice::Iter<'a, [u8; DLRR_BLOCK_LEN]>,
}

impl Iterator for DlrrBlocks<'_> {
    type Item = DlrrBlock;

    fn next(&mut self) -> Option<DlrrBlock> {
        loop {
            if let Some(block) = self.current.next() {
                return Some(DlrrBlock {
                    ssrc: Ssrc(be32(block, 0)?),
                    last_rr: be32(block, 4)?,
                    delay_since_last_rr: be32(block, 8)?,
                });
            }
            let (_, contents) = self.blocks.find(|(kind, _)| *kind == BLOCK_DLRR)?;
            self.current = contents.as_chunks().0.iter();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_length_ends_the_walk_and_broken_contents_do_not() {
        let pli = [0x81, 206, 0, 2, 0, 0, 0, 1, 0, 0, 0, 2];
        let hollow_sr = [0x80, 200, 0, 1, 0, 0, 0, 1];
        let compound = [&hollow_sr[..], &pli, &[0x81, 206, 0, 3, 0, 0, 0, 1]].concat();
        let mut walk = packets(&compound);
        assert!(matches!(walk.next(), Some(Err(MalformedRtcp::Contents))));
        assert!(matches!(
            walk.next(),
            Some(Ok(RtcpPacket::Pli {
                sender_ssrc: Ssrc(1),
                media_ssrc: Ssrc(2)
            }))
        ));
        assert!(matches!(walk.next(), Some(Err(MalformedRtcp::Framing))));
        assert!(walk.next().is_none());
    }

    #[test]
    fn padding_is_cut_and_a_false_count_is_an_error() {
        for (padding, expected) in [
            (1, None),
            (3, None),
            (8, None),
            (9, Some(MalformedRtcp::Contents)),
            (12, Some(MalformedRtcp::Contents)),
            (13, Some(MalformedRtcp::Framing)),
            (0, Some(MalformedRtcp::Framing)),
        ] {
            let packet = [0xA0, 201, 0, 3, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, padding];
            let parsed = packets(&packet).next().unwrap();
            assert_eq!(parsed.as_ref().err(), expected.as_ref(), "{padding}");
            assert!(
                parsed.is_err()
                    || matches!(parsed, Ok(RtcpPacket::ReceiverReport { ssrc: Ssrc(7), .. }))
            );
        }
    }

    #[test]
    fn losses_are_signed_24_bit_numbers() {
        for (wire, expected) in [
            ([0, 0, 1], 1),
            ([0x7F, 0xFF, 0xFF], 8_388_607),
            ([0xFF, 0xFF, 0xFF], -1),
            ([0x80, 0, 0], -8_388_608),
        ] {
            let mut packet = [0; 32];
            packet[..8].copy_from_slice(&[0x81, 201, 0, 7, 0, 0, 0, 1]);
            packet[13..16].copy_from_slice(&wire);
            let Some(Ok(RtcpPacket::ReceiverReport { mut reports, .. })) = packets(&packet).next()
            else {
                panic!()
            };
            assert_eq!(reports.next().unwrap().cumulative_lost, expected);
        }
    }

    #[test]
    fn a_nack_unfolds_across_the_wrap() {
        let packet = [
            0x81, 205, 0, 4, 0, 0, 0, 1, 0, 0, 0, 2, 0xFF, 0xFE, 0x80, 0x05, 0, 100, 0, 0,
        ];
        let Some(Ok(RtcpPacket::Nack {
            sender_ssrc: Ssrc(1),
            media_ssrc: Ssrc(2),
            seqs,
        })) = packets(&packet).next()
        else {
            panic!()
        };
        assert_eq!(
            seqs.map(|seq| seq.0).collect::<Vec<_>>(),
            [65_534, 65_535, 1, 14, 100]
        );
    }

    #[test]
    fn an_absurd_remb_saturates() {
        let packet = [
            0x8F, 206, 0, 4, 0, 0, 0, 1, 0, 0, 0, 0, b'R', b'E', b'M', b'B', 0, 0xFF, 0xFF, 0xFF,
        ];
        let Some(Ok(RtcpPacket::Remb { bitrate, .. })) = packets(&packet).next() else {
            panic!()
        };
        assert_eq!(bitrate.bps(), u64::MAX);
    }

    #[test]
    fn application_feedback_that_is_no_remb_is_unknown() {
        let packet = [
            0x8F, 206, 0, 4, 0, 0, 0, 1, 0, 0, 0, 0, b'G', b'O', b'O', b'G', 0, 0xFF, 0xFF, 0xFF,
        ];
        assert!(matches!(
            packets(&packet).next(),
            Some(Ok(RtcpPacket::Unknown {
                payload_type: 206,
                count: 15,
                ..
            }))
        ));
    }
}
