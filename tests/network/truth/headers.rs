//! What counts ought to be, computed from the log of a network between two kernels. Payloads are
//! sealed there, so this knows what headers say: which packet of which stream, when, and what
//! became of it.

use std::collections::BTreeMap;
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use crate::common::network::{Direction, Packet};

/// All packets of one SSRC that went one way.
#[derive(Clone, Debug, Default)]
pub struct Stream {
    pub ssrc: Ssrc,
    pub payload_type: u8,
    /// By number over all wraps.
    pub packets: BTreeMap<u64, Vec<Packet>>,
}

impl Stream {
    /// Different packets, and those that were sent again under the same number. Copies that the
    /// network made are neither.
    pub fn sent(&self) -> u64 {
        self.packets.len() as u64
    }

    pub fn sent_again(&self) -> u64 {
        self.sendings().count() as u64 - self.sent()
    }

    /// On the wire, the first sending of each packet.
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

    /// Different packets that came, by any sending.
    pub fn came(&self) -> u64 {
        self.packets
            .values()
            .filter(|sendings| has_come(sendings))
            .count() as u64
    }

    /// Different packets of which the first sending came, or its copy.
    pub fn came_at_first(&self) -> u64 {
        self.packets
            .values()
            .filter(|sendings| first_came(sendings))
            .count() as u64
    }

    /// All that came, copies and repetitions too.
    pub fn arrivals(&self) -> u64 {
        self.packets
            .values()
            .flatten()
            .filter(|packet| packet.delivered_at().is_some())
            .count() as u64
    }

    /// From the first packet that came to the last, those of which no first sending did.
    pub fn lost_at_first(&self) -> u64 {
        self.span() - self.came_at_first()
    }

    /// How many numbers lie between the first packet that came and the last, with both.
    pub fn span(&self) -> u64 {
        let mut came = self
            .packets
            .iter()
            .filter(|(_, sendings)| has_come(sendings))
            .map(|(number, _)| *number);
        came.next()
            .map_or(0, |first| came.next_back().unwrap_or(first) - first + 1)
    }

    /// RFC 3550, section 6.4.1, by the times at which the other side got the first packet of each
    /// timestamp; as it stood after each.
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
    // The first sending, and the copy that the network made of it.
    let copies = 1 + sendings[1..]
        .iter()
        .take_while(|packet| packet.duplicate)
        .count();
    has_come(&sendings[..copies])
}

/// The streams of one direction, in the order in which they began.
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
