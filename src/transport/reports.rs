//! RTCP that both ends of a connection write alike, and the limits of what they write and heed.

use crate::transport::rtp::Ssrc;
use std::net::SocketAddr;

use super::peer::Peer;
use super::receive::ReportNumbers;
use super::rtcp::{ReportBlock, RtcpWriter, WriteError};

/// Compounds stay below this, so that SRTCP's trailer still fits an Ethernet packet.
const COMPOUND_BYTES_MAX: usize = 1_200;
/// RFC 3550, section 6.4.1: the count of report blocks is five bits.
pub const REPORT_BLOCKS_MAX: usize = 31;
/// Numbers of one NACK that are looked at: libwebrtc's receiver never misses more at a time.
pub const NACKED_MAX: usize = 1_000;

/// Writes one compound to the start of `buffer` and seals it there. Returns where it goes and its
/// length.
///
/// `None` where the connection is not up, nothing was written, or it does not fit: compounds are
/// made to fit.
pub fn seal_compound(
    peer: &mut Peer,
    buffer: &mut [u8],
    write: impl FnOnce(&mut RtcpWriter<'_>) -> Result<(), WriteError>,
) -> Option<(SocketAddr, usize)> {
    let to = peer.remote()?;
    let sealer = peer.sealer_mut()?;
    let mut writer = RtcpWriter::new(&mut buffer[..COMPOUND_BYTES_MAX]);
    if write(&mut writer).is_err() || writer.is_empty() {
        return None;
    }
    let len = writer.len();
    let sealed = sealer.seal_rtcp(buffer, len).ok()?;
    Some((to, sealed))
}

impl ReportNumbers {
    /// As a receiver report has it.
    pub fn block(self, ssrc: Ssrc) -> ReportBlock {
        ReportBlock {
            ssrc,
            fraction_lost: self.fraction_lost,
            cumulative_lost: self.cumulative_lost,
            extended_highest_seq: self.extended_highest_seq,
            jitter: self.jitter,
            lsr: self.lsr,
            dlsr: self.dlsr,
        }
    }
}
