//! Expected counts, computed from the log of a network between two kernels. Payloads are encrypted
//! there, so only headers are known: which packet of which stream, when, and what became of it.

use std::collections::BTreeMap;
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use crate::common::network::{Direction, Packet};

/// All packets of one SSRC that went one way.
#[derive(Clone, Debug, Default)]
pub struct Stream {
    pub ssrc: Ssrc,
    pub payload_type: u8,
    /// Sendings of each packet, by sequence number extended over all wraps.
    pub packets: BTreeMap<u64, Vec<Packet>>,
}

impl Stream {
    /// Number of different packets. [`Stream::sent_again`] counts retransmissions under the same
    /// sequence number. Copies that the network made count in neither.
    pub fn sent(&self) -> u64 {
        self.packets.len() as u64
    }

    pub fn sent_again(&self) -> u64 {
        self.sendings().count() as u64 - self.sent()
    }

    /// Bytes on the wire of the first sending of each packet.
    pub fn wire_bytes(&self) -> u64 {
        self.packets
            .values()
            .map(|sendings| sendings[0].bytes as u64)
            .sum()
    }

    pub fn timestamps(&self) -> u64 {
        let times: std::collections::BTreeSet<u32> = self
            .sendings()
            .filter_map(|packet| Some(packet.rtp()?.rtp_time))
            .collect();
        times.len() as u64
    }

    fn sendings(&self) -> impl Iterator<Item = &Packet> {
        self.packets
            .values()
            .flatten()
            .filter(|packet| !packet.duplicate)
    }

    /// Number of different packets that arrived, by any sending.
    pub fn came(&self) -> u64 {
        self.packets
            .values()
            .filter(|sendings| has_come(sendings))
            .count() as u64
    }

    /// Number of different packets of which the first sending, or the network's copy of it,
    /// arrived.
    pub fn came_at_first(&self) -> u64 {
        self.packets
            .values()
            .filter(|sendings| first_came(sendings))
            .count() as u64
    }

    /// Number of all arrivals, copies and retransmissions included.
    pub fn arrivals(&self) -> u64 {
        self.packets
            .values()
            .flatten()
            .filter(|packet| packet.delivered_at().is_some())
            .count() as u64
    }

    /// Number of packets, from the first that arrived to the last, of which the first sending did
    /// not arrive.
    pub fn lost_at_first(&self) -> u64 {
        self.span() - self.came_at_first()
    }

    /// Number of sequence numbers from the first packet that arrived to the last, both included.
    pub fn span(&self) -> u64 {
        let mut came = self
            .packets
            .iter()
            .filter(|(_, sendings)| has_come(sendings))
            .map(|(number, _)| *number);
        came.next()
            .map_or(0, |first| came.next_back().unwrap_or(first) - first + 1)
    }

    /// Returns the jitter of RFC 3550, section 6.4.1, after each timestamp. It goes by the times at
    /// which the other side got the first packet of each.
    pub fn jitter(&self, clock_rate: f64) -> Vec<Duration> {
        let mut came: Vec<(Duration, u32)> = self
            .sendings()
            .filter_map(|packet| Some((packet.delivered_at()?, packet.rtp()?.rtp_time)))
            .collect();
        came.sort_unstable();
        let (mut jitter, mut values) = (0.0, Vec::new());
        let mut last: Option<(Duration, u32)> = None;
        for (at, rtp_time) in came {
            if let Some((last_at, last_time)) = last {
                if rtp_time == last_time {
                    continue;
                }
                let apart = at.as_secs_f64()
                    - last_at.as_secs_f64()
                    - f64::from(rtp_time.wrapping_sub(last_time) as i32) / clock_rate;
                jitter += (apart.abs() - jitter) / 16.0;
                values.push(Duration::from_secs_f64(jitter));
            }
            last = Some((at, rtp_time));
        }
        values
    }
}

fn has_come(sendings: &[Packet]) -> bool {
    sendings
        .iter()
        .any(|packet| packet.delivered_at().is_some())
}

fn first_came(sendings: &[Packet]) -> bool {
    // The first sending, and the copies that the network made of it.
    let copies = 1 + sendings[1..]
        .iter()
        .take_while(|packet| packet.duplicate)
        .count();
    has_come(&sendings[..copies])
}

/// Returns the streams of one direction, in the order in which they began.
pub fn streams(log: &[Packet], direction: Direction) -> Vec<Stream> {
    let mut streams: Vec<(Stream, u64)> = Vec::new();
    for packet in log.iter().filter(|packet| packet.direction == direction) {
        let Some(rtp) = packet.rtp() else { continue };
        let at = streams
            .iter()
            .position(|(stream, _)| stream.ssrc == rtp.ssrc)
            .unwrap_or_else(|| {
                let stream = Stream {
                    ssrc: rtp.ssrc,
                    payload_type: rtp.payload_type,
                    ..Stream::default()
                };
                streams.push((stream, 0x10_0000 + u64::from(rtp.seq)));
                streams.len() - 1
            });
        let (stream, highest) = &mut streams[at];
        let number =
            highest.wrapping_add_signed(i64::from(rtp.seq.wrapping_sub(*highest as u16) as i16));
        *highest = number.max(*highest);
        stream.packets.entry(number).or_default().push(*packet);
    }
    streams.into_iter().map(|(stream, _)| stream).collect()
}
