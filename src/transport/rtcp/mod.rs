//! RTCP without allocation: [`RtcpWriter`] writes compound packets into a lent buffer, and
//! [`packets`] iterates over received ones.
//!
//! RFC 3550 (SR, RR, SDES, BYE), RFC 4585 (NACK, PLI), RFC 5104 (FIR), RFC 3611 (XR),
//! draft-alvestrand-rmcat-remb, draft-holmer-rmcat-transport-wide-cc-extensions-01.

mod arrivals;
mod read;
mod write;

use crate::transport::rtp::Ssrc;
use std::time::Duration;

pub use arrivals::Arrivals;
pub use read::{
    DlrrBlocks, FirEntries, MalformedRtcp, NackSeqs, Packets, ReportBlocks, RtcpPacket, SdesChunk,
    SdesChunks, Ssrcs, packets,
};
pub use write::{RtcpWriter, WriteError};

/// Sender information of a sender report (RFC 3550, section 6.4.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SenderInfo {
    pub ssrc: Ssrc,
    /// NTP timestamp: 32.32 fixed-point seconds since 1900.
    pub ntp: u64,
    /// The same moment in units of the media's clock rate.
    pub rtp_time: u32,
    /// Number of packets sent since the start; wraps.
    pub packets: u32,
    /// Number of payload bytes sent since the start, without headers and padding; wraps.
    pub octets: u32,
}

/// Reception report about one source (RFC 3550, section 6.4.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReportBlock {
    pub ssrc: Ssrc,
    /// Share of packets lost since the previous report, in 1/256.
    pub fraction_lost: u8,
    /// Number of packets lost, negative if duplicates outnumber losses. It has 24 bits on the wire.
    /// Written values are clamped to that range (RFC 3550, appendix A.3).
    pub cumulative_lost: i32,
    /// Highest sequence number, with the rollover count in the upper half.
    pub extended_highest_seq: u32,
    /// Jitter in units of the media's clock rate.
    pub jitter: u32,
    /// Middle 32 bits of the last sender report's NTP timestamp; zero if there was none.
    pub lsr: u32,
    /// Delay from that report's arrival to this one's sending, in 1/65,536 s.
    pub dlsr: u32,
}

/// Sub-block of a DLRR report (RFC 3611, section 4.5). A receiver that sends no media learns its
/// RTT from it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DlrrBlock {
    /// SSRC of the receiver whose RRTR is answered.
    pub ssrc: Ssrc,
    /// Middle 32 bits of the RRTR's NTP timestamp; zero if there was none.
    pub last_rr: u32,
    /// Delay from the RRTR's arrival to this report's sending, in 1/65,536 s.
    pub delay_since_last_rr: u32,
}

/// Returns the round-trip time that a report block (or a DLRR sub-block) shows (RFC 3550, section
/// 6.4.1).
///
/// `now_ntp_middle` is the middle of our NTP time at the report's arrival
/// ([`crate::units::ntp_middle`]). Returns `None` if the peer had no report to refer to (`lsr` =
/// 0), or if its delay exceeds the time that has passed.
pub fn rtt_from_report(now_ntp_middle: u32, lsr: u32, dlsr: u32) -> Option<Duration> {
    if lsr == 0 {
        return None;
    }
    // The timestamps wrap every 18 hours. A distance of half of that or more is a lie of the peer.
    let since_sr = i64::from(now_ntp_middle.wrapping_sub(lsr) as i32);
    let rtt = u64::try_from(since_sr - i64::from(dlsr)).ok()?;
    Some(Duration::from_nanos((rtt * 1_000_000_000) >> 16))
}

/// Converts a delay to the units of DLSR, 1/65,536 s. A delay of more than 18 hours saturates.
pub fn dlsr_units(delay: Duration) -> u32 {
    u32::try_from((delay.as_nanos() << 16) / 1_000_000_000).unwrap_or(u32::MAX)
}

/// Unit of arrival times in transport-wide feedback.
pub const FEEDBACK_TICK: Duration = Duration::from_micros(250);

const VERSION: u8 = 2;
const SENDER_REPORT: u8 = 200;
const RECEIVER_REPORT: u8 = 201;
const SOURCE_DESCRIPTION: u8 = 202;
const GOODBYE: u8 = 203;
const TRANSPORT_FEEDBACK: u8 = 205;
const PAYLOAD_FEEDBACK: u8 = 206;
const EXTENDED_REPORT: u8 = 207;

const SDES_CNAME: u8 = 1;
const FMT_NACK: u8 = 1;
const FMT_TRANSPORT_CC: u8 = 15;
const FMT_PLI: u8 = 1;
const FMT_FIR: u8 = 4;
const FMT_APPLICATION_LAYER: u8 = 15;
const REMB_NAME: [u8; 4] = *b"REMB";
const BLOCK_RRTR: u8 = 4;
const BLOCK_DLRR: u8 = 5;
const REPORT_BLOCK_LEN: usize = 24;
const DLRR_BLOCK_LEN: usize = 12;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_round_trip_time_survives_a_wrapping_clock_and_refuses_nonsense() {
        const SECOND: u32 = 1 << 16;
        for (now, lsr, dlsr, expected) in [
            (
                10 * SECOND,
                5 * SECOND,
                2 * SECOND,
                Some(Duration::from_secs(3)),
            ),
            (
                SECOND,
                0u32.wrapping_sub(SECOND),
                SECOND / 2,
                Some(Duration::from_millis(1_500)),
            ),
            (10 * SECOND, 10 * SECOND, 0, Some(Duration::ZERO)),
            (10 * SECOND, 0, 0, None),
            (10 * SECOND, 9 * SECOND, SECOND + 1, None),
            (10 * SECOND, 11 * SECOND, 0, None),
            (10 * SECOND, 9 * SECOND, u32::MAX, None),
            (
                0x8000_0000,
                1,
                0,
                Some(Duration::from_nanos(
                    (((1u64 << 31) - 1) * 1_000_000_000) >> 16,
                )),
            ),
        ] {
            assert_eq!(
                rtt_from_report(now, lsr, dlsr),
                expected,
                "{now} {lsr} {dlsr}"
            );
        }
    }

    #[test]
    fn the_example_of_rfc_3550_gives_its_own_answer() {
        let rtt = rtt_from_report(0xb710_8000, 0xb705_2000, 0x0005_4000).unwrap();
        assert_eq!(rtt, Duration::from_millis(6_125));
    }
}
