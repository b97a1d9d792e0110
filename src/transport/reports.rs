//! RTCP that both the engine and the embedded SFU write, and the limits of what they write and
//! read.

use crate::transport::rtp::Ssrc;
use std::net::SocketAddr;

use super::peer::Peer;
use super::receive::ReportNumbers;
use super::rtcp::{ReportBlock, RtcpWriter, WriteError};

/// Maximum size of a compound packet, so that it still fits an Ethernet packet with SRTCP's
/// trailer.
const COMPOUND_BYTES_MAX: usize = 1_200;
/// Maximum number of report blocks: the count has five bits (RFC 3550, section 6.4.1).
pub const REPORT_BLOCKS_MAX: usize = 31;
/// Maximum number of sequence numbers that are read from one NACK. libwebrtc's receiver never
/// misses more at a time.
pub const NACKED_MAX: usize = 1_000;

/// Writes one compound packet to the start of `buffer` and seals it there. Returns its destination
/// and its length.
///
/// Returns `None` if the connection is not up, nothing was written, or the packet does not fit.
/// Callers write compound packets that fit.
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
    /// Returns the numbers as the block of a receiver report.
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
