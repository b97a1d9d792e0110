//! Writes compound packets into a lent buffer.

use crate::transport::rtp::Ssrc;
use std::fmt;

use super::{
    BLOCK_DLRR, BLOCK_RRTR, DLRR_BLOCK_LEN, DlrrBlock, EXTENDED_REPORT, FEEDBACK_TICK,
    FMT_APPLICATION_LAYER, FMT_FIR, FMT_NACK, FMT_PLI, FMT_TRANSPORT_CC, GOODBYE, PAYLOAD_FEEDBACK,
    RECEIVER_REPORT, REMB_NAME, ReportBlock, SDES_CNAME, SENDER_REPORT, SOURCE_DESCRIPTION,
    SenderInfo, TRANSPORT_FEEDBACK, VERSION,
};
use crate::transport::sequence::Seq;
use crate::units::{Bitrate, Time};

/// Appends packets to a compound. A packet that does not fit leaves no trace: send the compound,
/// start a new one, and write the packet again.
///
/// The caller chooses the order. A compound starts with a report (RFC 3550, section 6.1), unless
/// the peer accepts reduced-size RTCP.
#[derive(Debug)]
pub struct RtcpWriter<'a> {
    out: &'a mut [u8],
    len: usize,
}

/// Error returned when a packet was not appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteError {
    /// The buffer has no room.
    Full,
    /// A list or text is longer than its length field allows.
    TooLong,
}

impl fmt::Display for WriteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            WriteError::Full => "no room for this RTCP packet",
            WriteError::TooLong => "more than one RTCP packet can hold",
        })
    }
}

impl std::error::Error for WriteError {}

impl<'a> RtcpWriter<'a> {
    pub const fn new(out: &'a mut [u8]) -> RtcpWriter<'a> {
        RtcpWriter { out, len: 0 }
    }

    /// Returns the number of bytes written.
    pub const fn len(&self) -> usize {
        self.len
    }

    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends an SR. If there are more than 31 reports, receiver reports follow it (RFC 3550,
    /// section 6.1).
    pub fn sender_report(
        &mut self,
        sender: &SenderInfo,
        reports: impl IntoIterator<Item = ReportBlock>,
    ) -> Result<(), WriteError> {
        let mut reports = reports.into_iter().peekable();
        self.all_or_nothing(|writer| {
            writer.packet(SENDER_REPORT, |packet| {
                packet.put(&sender.ssrc.to_be_bytes())?;
                packet.put(&sender.ntp.to_be_bytes())?;
                packet.put(&sender.rtp_time.to_be_bytes())?;
                packet.put(&sender.packets.to_be_bytes())?;
                packet.put(&sender.octets.to_be_bytes())?;
                packet.report_blocks(&mut reports)
            })?;
            while reports.peek().is_some() {
                writer.receiver_report_part(sender.ssrc, &mut reports)?;
            }
            Ok(())
        })
    }

    /// Appends an RR, even without reports. If there are more than 31 reports, further packets
    /// follow it.
    pub fn receiver_report(
        &mut self,
        ssrc: Ssrc,
        reports: impl IntoIterator<Item = ReportBlock>,
    ) -> Result<(), WriteError> {
        let mut reports = reports.into_iter().peekable();
        self.all_or_nothing(|writer| {
            writer.receiver_report_part(ssrc, &mut reports)?;
            while reports.peek().is_some() {
                writer.receiver_report_part(ssrc, &mut reports)?;
            }
            Ok(())
        })
    }

    /// Appends an SDES with one chunk that holds the CNAME, at most 255 bytes.
    pub fn sdes_cname(&mut self, ssrc: Ssrc, cname: &str) -> Result<(), WriteError> {
        let len = u8::try_from(cname.len()).map_err(|_| WriteError::TooLong)?;
        self.packet(SOURCE_DESCRIPTION, |packet| {
            packet.put(&ssrc.to_be_bytes())?;
            packet.put(&[SDES_CNAME, len])?;
            packet.put(cname.as_bytes())?;
            // At least one zero ends the chunk; more zeros align it.
            let behind_ssrc = 2 + cname.len();
            packet.put(&[0; 4][..4 - behind_ssrc % 4])?;
            Ok(1)
        })
    }

    /// Appends a BYE for at most 31 sources.
    pub fn bye(&mut self, sources: &[Ssrc]) -> Result<(), WriteError> {
        if sources.len() > MAX_COUNT {
            return Err(WriteError::TooLong);
        }
        self.packet(GOODBYE, |packet| {
            packet.put_sources(sources)?;
            Ok(sources.len() as u8)
        })
    }

    /// Appends a generic NACK. Numbers in sending order pack best: up to 17 in four bytes. Nothing
    /// is written if `lost` is empty.
    pub fn nack(
        &mut self,
        sender_ssrc: Ssrc,
        media_ssrc: Ssrc,
        lost: impl IntoIterator<Item = Seq>,
    ) -> Result<(), WriteError> {
        let mut lost = lost.into_iter();
        let Some(first) = lost.next() else {
            return Ok(());
        };
        self.packet(TRANSPORT_FEEDBACK, |packet| {
            packet.put_all(&[sender_ssrc.0, media_ssrc.0])?;
            let (mut pid, mut blp) = (first, 0u16);
            for seq in lost {
                match seq.diff(pid) {
                    0 => {}
                    offset @ 1..=16 => blp |= 1 << (offset - 1),
                    _ => {
                        packet.nack_pair(pid, blp)?;
                        (pid, blp) = (seq, 0);
                    }
                }
            }
            packet.nack_pair(pid, blp)?;
            Ok(FMT_NACK)
        })
    }

    /// Appends transport-wide feedback: for each packet from `base` on, whether and when it
    /// arrived. `message` counts messages, so that lost ones are noticed.
    ///
    /// Times are rounded to [`FEEDBACK_TICK`]. Neighbours must be less than 8 s apart, because the
    /// message cannot express more.
    pub fn transport_cc(
        &mut self,
        sender_ssrc: Ssrc,
        media_ssrc: Ssrc,
        base: Seq,
        message: u8,
        arrivals: impl ExactSizeIterator<Item = Option<Time>> + Clone,
    ) -> Result<(), WriteError> {
        let count = u16::try_from(arrivals.len()).map_err(|_| WriteError::TooLong)?;
        let first = arrivals.clone().flatten().next().map_or(0, ticks);
        let reference = first / TICKS_PER_REFERENCE;
        self.packet(TRANSPORT_FEEDBACK, |packet| {
            packet.put_all(&[sender_ssrc.0, media_ssrc.0])?;
            packet.put(&base.0.to_be_bytes())?;
            packet.put(&count.to_be_bytes())?;
            // The reference time has 24 bits and wraps.
            packet.put_all(&[(reference as u32) << 8 | u32::from(message)])?;
            let start = reference * TICKS_PER_REFERENCE;
            packet.statuses(arrivals.clone(), start)?;
            packet.steps(arrivals, start)?;
            let whole_words = packet.len.next_multiple_of(4) - packet.len;
            packet.put(&[0; 4][..whole_words])?;
            Ok(FMT_TRANSPORT_CC)
        })
    }

    pub fn pli(&mut self, sender_ssrc: Ssrc, media_ssrc: Ssrc) -> Result<(), WriteError> {
        self.packet(PAYLOAD_FEEDBACK, |packet| {
            packet.put_all(&[sender_ssrc.0, media_ssrc.0])?;
            Ok(FMT_PLI)
        })
    }

    /// Appends a FIR with pairs of (media SSRC, command sequence number). The number increases by
    /// one with each new request (RFC 5104, section 4.3.1).
    pub fn fir(&mut self, sender_ssrc: Ssrc, entries: &[(Ssrc, u8)]) -> Result<(), WriteError> {
        self.packet(PAYLOAD_FEEDBACK, |packet| {
            packet.put_all(&[sender_ssrc.0, 0])?;
            for &(media_ssrc, command) in entries {
                packet.put_all(&[media_ssrc.0, u32::from(command) << 24])?;
            }
            Ok(FMT_FIR)
        })
    }

    /// Appends a REMB for at most 255 sources. The wire format keeps 18 significant bits. The rest
    /// is cut off, so the peer never reads more than `bitrate`.
    pub fn remb(
        &mut self,
        sender_ssrc: Ssrc,
        bitrate: Bitrate,
        sources: &[Ssrc],
    ) -> Result<(), WriteError> {
        let count = u8::try_from(sources.len()).map_err(|_| WriteError::TooLong)?;
        let exponent = (64 - bitrate.bps().leading_zeros()).saturating_sub(18);
        let mantissa = (bitrate.bps() >> exponent) as u32;
        self.packet(PAYLOAD_FEEDBACK, |packet| {
            packet.put_all(&[sender_ssrc.0, 0])?;
            packet.put(&REMB_NAME)?;
            packet.put_all(&[u32::from(count) << 24 | exponent << 18 | mantissa])?;
            for source in sources {
                packet.put_all(&[source.0])?;
            }
            Ok(FMT_APPLICATION_LAYER)
        })
    }

    /// Appends an XR with our clock (RRTR, an NTP timestamp) and our answers to the clocks of
    /// others (DLRR). Either may be absent. Nothing is written if both are.
    pub fn xr(
        &mut self,
        ssrc: Ssrc,
        rrtr: Option<u64>,
        dlrr: impl IntoIterator<Item = DlrrBlock>,
    ) -> Result<(), WriteError> {
        let mut dlrr = dlrr.into_iter().peekable();
        if rrtr.is_none() && dlrr.peek().is_none() {
            return Ok(());
        }
        self.packet(EXTENDED_REPORT, |packet| {
            packet.put(&ssrc.to_be_bytes())?;
            if let Some(ntp) = rrtr {
                packet.put(&[BLOCK_RRTR, 0, 0, 2])?;
                packet.put(&ntp.to_be_bytes())?;
            }
            if dlrr.peek().is_some() {
                packet.dlrr(&mut dlrr)?;
            }
            Ok(0)
        })
    }

    fn receiver_report_part(
        &mut self,
        ssrc: Ssrc,
        reports: &mut impl Iterator<Item = ReportBlock>,
    ) -> Result<(), WriteError> {
        self.packet(RECEIVER_REPORT, |packet| {
            packet.put(&ssrc.to_be_bytes())?;
            packet.report_blocks(reports)
        })
    }

    fn all_or_nothing(
        &mut self,
        write: impl FnOnce(&mut Self) -> Result<(), WriteError>,
    ) -> Result<(), WriteError> {
        let before = self.len;
        let result = write(self);
        if result.is_err() {
            self.len = before;
        }
        result
    }

    /// Appends one packet. `fill` writes whole words after the header and returns the header's
    /// five-bit count.
    fn packet(
        &mut self,
        payload_type: u8,
        fill: impl FnOnce(&mut Body<'_>) -> Result<u8, WriteError>,
    ) -> Result<(), WriteError> {
        let free = self.out.get_mut(self.len..).ok_or(WriteError::Full)?;
        let (header, behind) = free.split_first_chunk_mut().ok_or(WriteError::Full)?;
        let mut body = Body {
            out: behind,
            len: 0,
        };
        let count = fill(&mut body)?;
        debug_assert!(body.len.is_multiple_of(4) && usize::from(count) <= MAX_COUNT);
        let [l0, l1] = words(body.len)?;
        *header = [VERSION << 6 | count, payload_type, l0, l1];
        self.len += header.len() + body.len;
        Ok(())
    }
}

/// Number of ticks in a unit of the reference time, which is 64 ms.
const TICKS_PER_REFERENCE: i64 = 256;

fn ticks(time: Time) -> i64 {
    (time.as_nanos() / FEEDBACK_TICK.as_nanos() as u64) as i64
}

/// Status of a packet (section 3.1.1 of the draft): the number of bytes of its time step.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Status {
    Missing = 0,
    SmallStep = 1,
    LargeStep = 2,
}

/// Iterates over arrivals as (status, step from the one before).
fn steps_of(
    arrivals: impl Iterator<Item = Option<Time>>,
    start: i64,
) -> impl Iterator<Item = (Status, i64)> {
    let mut before = start;
    arrivals.map(move |arrival| {
        let Some(arrival) = arrival else {
            return (Status::Missing, 0);
        };
        let at = ticks(arrival);
        let step = at - std::mem::replace(&mut before, at);
        let small = (0..=i64::from(u8::MAX)).contains(&step);
        (
            if small {
                Status::SmallStep
            } else {
                Status::LargeStep
            },
            step,
        )
    })
}

/// Number of statuses in a vector chunk, two bits each.
const VECTOR_LEN: usize = 7;
/// Maximum run length, which has 13 bits.
const RUN_MAX: usize = (1 << 13) - 1;

/// Largest count that a header can hold.
const MAX_COUNT: usize = 31;

fn words(len: usize) -> Result<[u8; 2], WriteError> {
    u16::try_from(len / 4)
        .map(u16::to_be_bytes)
        .map_err(|_| WriteError::TooLong)
}

/// Contents after a packet's header.
struct Body<'a> {
    out: &'a mut [u8],
    len: usize,
}

impl Body<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        let room = self
            .out
            .get_mut(self.len..)
            .and_then(|free| free.get_mut(..bytes.len()))
            .ok_or(WriteError::Full)?;
        room.copy_from_slice(bytes);
        self.len += bytes.len();
        Ok(())
    }

    fn put_sources(&mut self, sources: &[Ssrc]) -> Result<(), WriteError> {
        sources
            .iter()
            .try_for_each(|source| self.put_all(&[source.0]))
    }

    fn put_all(&mut self, words: &[u32]) -> Result<(), WriteError> {
        words
            .iter()
            .try_for_each(|word| self.put(&word.to_be_bytes()))
    }

    /// Writes as many report blocks as one packet holds; returns their number.
    fn report_blocks(
        &mut self,
        reports: &mut impl Iterator<Item = ReportBlock>,
    ) -> Result<u8, WriteError> {
        let mut count = 0;
        for block in reports.by_ref().take(MAX_COUNT) {
            let lost = block.cumulative_lost.clamp(-0x80_0000, 0x7F_FFFF) as u32 & 0xFF_FFFF;
            let fraction_and_lost = u32::from(block.fraction_lost) << 24 | lost;
            self.put_all(&[
                block.ssrc.0,
                fraction_and_lost,
                block.extended_highest_seq,
                block.jitter,
                block.lsr,
                block.dlsr,
            ])?;
            count += 1;
        }
        Ok(count)
    }

    /// Writes status chunks: a run of equal ones if that covers more than a vector of seven.
    fn statuses(
        &mut self,
        arrivals: impl Iterator<Item = Option<Time>>,
        start: i64,
    ) -> Result<(), WriteError> {
        let mut statuses = steps_of(arrivals, start)
            .map(|(status, _)| status)
            .peekable();
        let mut vector = [Status::Missing; VECTOR_LEN];
        let mut waiting = 0;
        while let Some(status) = statuses.next() {
            vector[waiting] = status;
            waiting += 1;
            let is_run = waiting == VECTOR_LEN && vector.iter().all(|other| *other == status);
            if is_run {
                let mut run = VECTOR_LEN;
                while run < RUN_MAX && statuses.next_if_eq(&status).is_some() {
                    run += 1;
                }
                self.put(&((status as u16) << 13 | run as u16).to_be_bytes())?;
                waiting = 0;
            } else if waiting == VECTOR_LEN {
                self.vector(&vector)?;
                waiting = 0;
            }
        }
        if waiting > 0 {
            vector[waiting..].fill(Status::Missing);
            self.vector(&vector)?;
        }
        Ok(())
    }

    fn vector(&mut self, vector: &[Status; VECTOR_LEN]) -> Result<(), WriteError> {
        const TWO_BITS_EACH: u16 = 0b11 << 14;
        let chunk = vector
            .iter()
            .fold(0, |chunk, status| chunk << 2 | *status as u16);
        self.put(&(TWO_BITS_EACH | chunk).to_be_bytes())
    }

    fn steps(
        &mut self,
        arrivals: impl Iterator<Item = Option<Time>>,
        start: i64,
    ) -> Result<(), WriteError> {
        for (status, step) in steps_of(arrivals, start) {
            match status {
                Status::Missing => {}
                Status::SmallStep => self.put(&[step as u8])?,
                Status::LargeStep => self.put(
                    &i16::try_from(step)
                        .map_err(|_| WriteError::TooLong)?
                        .to_be_bytes(),
                )?,
            }
        }
        Ok(())
    }

    fn nack_pair(&mut self, pid: Seq, blp: u16) -> Result<(), WriteError> {
        self.put(&pid.0.to_be_bytes())?;
        self.put(&blp.to_be_bytes())
    }

    fn dlrr(&mut self, blocks: &mut impl Iterator<Item = DlrrBlock>) -> Result<(), WriteError> {
        let length_at = self.len + 2;
        self.put(&[BLOCK_DLRR, 0, 0, 0])?;
        let mut len = 0;
        for block in blocks {
            self.put_all(&[block.ssrc.0, block.last_rr, block.delay_since_last_rr])?;
            len += DLRR_BLOCK_LEN;
        }
        self.out[length_at..length_at + 2].copy_from_slice(&words(len)?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::rtcp::{RtcpPacket, packets};

    fn nack_of(seqs: &[u16]) -> Vec<u8> {
        let mut out = [0; 1_500];
        let mut writer = RtcpWriter::new(&mut out);
        writer
            .nack(Ssrc(1), Ssrc(2), seqs.iter().map(|seq| Seq(*seq)))
            .unwrap();
        let len = writer.len();
        out[..len].to_vec()
    }

    #[test]
    fn lost_numbers_are_packed_seventeen_to_a_pair() {
        for (seqs, pairs) in [
            (&[5][..], 1),
            (&[5, 21], 1),
            (&[5, 22], 2),
            (&[65_530, 65_535, 0, 10], 1),
            (&[65_530, 11], 2),
            (&[7, 7, 8], 1),
            (&[9, 8], 2),
        ] {
            let packet = nack_of(seqs);
            assert_eq!(packet.len(), 12 + 4 * pairs, "{seqs:?}");
            let Some(Ok(RtcpPacket::Nack { seqs: read, .. })) = packets(&packet).next() else {
                panic!()
            };
            let mut expected = seqs.to_vec();
            expected.dedup();
            assert_eq!(read.map(|seq| seq.0).collect::<Vec<_>>(), expected);
        }
        assert!(nack_of(&[]).is_empty());
    }

    #[test]
    fn more_than_31_reports_flow_into_further_packets() {
        for (reports, expected) in [
            (0, &[0][..]),
            (31, &[31]),
            (32, &[31, 1]),
            (75, &[31, 31, 13]),
        ] {
            let mut out = [0; 4_000];
            let mut writer = RtcpWriter::new(&mut out);
            writer
                .sender_report(
                    &SenderInfo {
                        ssrc: Ssrc(9),
                        ..SenderInfo::default()
                    },
                    vec![ReportBlock::default(); reports],
                )
                .unwrap();
            writer
                .receiver_report(Ssrc(9), vec![ReportBlock::default(); reports])
                .unwrap();
            let len = writer.len();
            let counts: Vec<usize> = packets(&out[..len])
                .map(|packet| match packet.unwrap() {
                    RtcpPacket::SenderReport {
                        sender: SenderInfo { ssrc: Ssrc(9), .. },
                        reports,
                    }
                    | RtcpPacket::ReceiverReport {
                        ssrc: Ssrc(9),
                        reports,
                    } => reports.count(),
                    other => panic!("{other:?}"),
                })
                .collect();
            assert_eq!(counts, [expected, expected].concat());
        }
    }

    #[test]
    fn what_does_not_fit_leaves_no_trace() {
        let block = ReportBlock::default();
        let dlrr = [DlrrBlock::default(); 3];
        type Write<'w> = &'w dyn Fn(&mut RtcpWriter<'_>) -> Result<(), WriteError>;
        let writes: [Write<'_>; 9] = [
            &|writer| writer.sender_report(&SenderInfo::default(), [block; 40]),
            &|writer| writer.receiver_report(Ssrc(1), [block; 40]),
            &|writer| writer.sdes_cname(Ssrc(1), "name"),
            &|writer| writer.bye(&[Ssrc(1), Ssrc(2)]),
            &|writer| writer.nack(Ssrc(1), Ssrc(2), [Seq(1), Seq(100)]),
            &|writer| writer.pli(Ssrc(1), Ssrc(2)),
            &|writer| writer.fir(Ssrc(1), &[(Ssrc(2), 3)]),
            &|writer| writer.remb(Ssrc(1), Bitrate::from_bps(1), &[Ssrc(2)]),
            &|writer| writer.xr(Ssrc(1), Some(2), dlrr),
        ];
        for (which, write) in writes.iter().enumerate() {
            let mut out = [0; 1_200];
            let mut writer = RtcpWriter::new(&mut out);
            write(&mut writer).unwrap();
            let needed = writer.len();
            for room in 0..needed {
                let mut out = vec![0; 12 + room];
                let mut writer = RtcpWriter::new(&mut out);
                writer.pli(Ssrc(7), Ssrc(8)).unwrap();
                assert_eq!(
                    (write(&mut writer), writer.len()),
                    (Err(WriteError::Full), 12),
                    "write {which} with {room} bytes left"
                );
            }
        }
    }

    #[test]
    fn lists_longer_than_their_count_are_refused() {
        let mut out = [0; 4_000];
        let mut writer = RtcpWriter::new(&mut out);
        assert_eq!(writer.bye(&[Ssrc(0); 32]), Err(WriteError::TooLong));
        assert_eq!(
            writer.sdes_cname(Ssrc(1), &"x".repeat(256)),
            Err(WriteError::TooLong)
        );
        assert_eq!(
            writer.remb(Ssrc(1), Bitrate::from_bps(1), &[Ssrc(0); 256]),
            Err(WriteError::TooLong)
        );
        assert!(writer.is_empty());
    }

    #[test]
    fn losses_beyond_24_bits_stop_at_the_end() {
        for (lost, expected) in [(i32::MAX, 8_388_607), (i32::MIN, -8_388_608), (-3, -3)] {
            let mut out = [0; 32];
            RtcpWriter::new(&mut out)
                .receiver_report(
                    Ssrc(1),
                    [ReportBlock {
                        cumulative_lost: lost,
                        ..ReportBlock::default()
                    }],
                )
                .unwrap();
            let Some(Ok(RtcpPacket::ReceiverReport { mut reports, .. })) = packets(&out).next()
            else {
                panic!()
            };
            assert_eq!(reports.next().unwrap().cumulative_lost, expected);
        }
    }
}
