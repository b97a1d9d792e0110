//! Reader of a transport-wide feedback message (draft-holmer-rmcat-transport-wide-cc-extensions-01,
//! section 3.1): which packets arrived, and when.

use super::FEEDBACK_TICK;
use crate::transport::rtp::{be16, be24};
use crate::transport::sequence::Seq;

/// Maximum number of packets in a message. No sender has more in flight, so a message about more is
/// invalid.
const PACKETS_MAX: u16 = 8_192;
/// Bits of a run length in a chunk.
const RUN_BITS: u16 = 0x1FFF;

/// Iterates over the packets of one message in the order of their sequence numbers.
#[derive(Clone, Debug)]
pub struct Arrivals<'a> {
    chunks: &'a [u8],
    chunk: Chunk,
    steps: &'a [u8],
    seq: u16,
    left: u16,
    at: i64,
    reference: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Chunk {
    /// Symbols of the chunk. For a run only the first one is used.
    symbols: [u8; 14],
    is_run: bool,
    next: u16,
    len: u16,
}

impl Chunk {
    fn of(word: u16) -> Chunk {
        let mut symbols = [0; 14];
        let (is_run, len) = match word >> 14 {
            0 | 1 => {
                symbols[0] = (word >> 13 & 3) as u8;
                (true, word & RUN_BITS)
            }
            2 => {
                (0..14).for_each(|at| symbols[at] = (word >> (13 - at) & 1) as u8);
                (false, 14)
            }
            _ => {
                (0..7).for_each(|at| symbols[at] = (word >> (12 - 2 * at) & 3) as u8);
                (false, 7)
            }
        };
        Chunk {
            symbols,
            is_run,
            next: 0,
            len,
        }
    }

    fn next(&mut self) -> Option<u8> {
        let at = self.next;
        if at == self.len {
            return None;
        }
        self.next += 1;
        Some(if self.is_run {
            self.symbols[0]
        } else {
            self.symbols[usize::from(at)]
        })
    }
}

impl<'a> Arrivals<'a> {
    /// Reads a message; `body` begins with the base sequence number. Returns `None` if it
    /// contradicts itself.
    pub fn new(body: &'a [u8]) -> Option<Arrivals<'a>> {
        let (seq, count, reference) = (be16(body, 0)?, be16(body, 2)?, be24(body, 4)?);
        if count > PACKETS_MAX {
            return None;
        }
        let chunks = body.get(8..)?;
        // The time steps follow the chunks.
        let (mut told, mut chunks_len, mut steps_len) = (0, 0, 0);
        while told < count {
            let mut chunk = Chunk::of(be16(chunks, chunks_len)?);
            chunks_len += 2;
            if chunk.len == 0 {
                return None;
            }
            while told < count
                && let Some(symbol) = chunk.next()
            {
                told += 1;
                steps_len += step_len(symbol)?;
            }
        }
        let (chunks, steps) = chunks.split_at_checked(chunks_len)?;
        Some(Arrivals {
            chunks,
            chunk: Chunk::default(),
            steps: steps.get(..steps_len)?,
            seq,
            left: count,
            at: 0,
            reference,
        })
    }

    /// Returns the reference of all times: 24 bits that wrap, in units of 64 ms.
    pub fn reference(&self) -> u32 {
        self.reference
    }
}

/// Returns the length of a time step, in bytes.
fn step_len(symbol: u8) -> Option<usize> {
    match symbol {
        0 => Some(0),
        1 => Some(1),
        2 => Some(2),
        _ => None,
    }
}

/// Yields a sequence number and its arrival time in microseconds after the reference time, less
/// than a day to either side. `None` if the packet did not arrive.
impl Iterator for Arrivals<'_> {
    type Item = (Seq, Option<i64>);

    fn next(&mut self) -> Option<(Seq, Option<i64>)> {
        self.left = self.left.checked_sub(1)?;
        let symbol = match self.chunk.next() {
            Some(symbol) => symbol,
            None => {
                let (word, rest) = self.chunks.split_first_chunk()?;
                self.chunks = rest;
                self.chunk = Chunk::of(u16::from_be_bytes(*word));
                self.chunk.next()?
            }
        };
        let (step, rest) = self.steps.split_at_checked(step_len(symbol)?)?;
        self.steps = rest;
        let seq = Seq(self.seq);
        self.seq = self.seq.wrapping_add(1);
        let step = match *step {
            [] => return Some((seq, None)),
            [small] => i64::from(small),
            [high, low, ..] => i64::from(i16::from_be_bytes([high, low])),
        };
        self.at += step;
        Some((seq, Some(self.at * FEEDBACK_TICK.as_micros() as i64)))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::seeded::Seeded;
    use crate::transport::rtcp::{RtcpPacket, RtcpWriter, packets};
    use crate::transport::rtp::Ssrc;
    use crate::units::Time;

    fn body(message: &[u8]) -> Vec<u8> {
        let Some(Ok(RtcpPacket::TransportCc { body, .. })) = packets(message).next() else {
            panic!("{message:?}")
        };
        body.to_vec()
    }

    #[test]
    fn what_was_written_is_read_again() {
        for seed in 0..300 {
            let mut random = Seeded::new(seed);
            let (base, mut now) = (
                Seq(random.draw() as u16),
                Time::from_millis(random.below(1 << 30)),
            );
            let arrivals: Vec<Option<Time>> = (0..random.below(300))
                .map(|_| {
                    let longest = [200, 4_000, 400_000][random.below(3) as usize];
                    now += Duration::from_micros(random.below(longest));
                    (!random.chance(20 * (seed % 5))).then_some(now)
                })
                .collect();
            let mut buffer = [0; 1_500];
            let mut writer = RtcpWriter::new(&mut buffer);
            writer
                .transport_cc(Ssrc(1), Ssrc(2), base, 3, arrivals.iter().copied())
                .unwrap();
            let len = writer.len();
            let body = body(&buffer[..len]);
            let arrivals_read = Arrivals::new(&body).unwrap();
            let reference = i64::from(arrivals_read.reference()) * 64_000;
            let read: Vec<_> = arrivals_read.collect();
            assert_eq!(read.len(), arrivals.len(), "seed {seed}");
            for (at, (arrival, (seq, told))) in arrivals.iter().zip(read).enumerate() {
                assert_eq!(
                    (seq, told.is_some()),
                    (base.wrapping_add(at as u16), arrival.is_some())
                );
                if let (Some(arrival), Some(told)) = (arrival, told) {
                    assert_eq!(
                        (arrival.as_micros() / 250 * 250) as i64,
                        reference + told,
                        "seed {seed}"
                    );
                }
            }
        }
    }

    #[test]
    fn wild_bytes_are_refused_or_read_to_their_end() {
        let mut random = Seeded::new(7);
        for _ in 0..20_000 {
            let body: Vec<u8> = (0..random.below(60)).map(|_| random.draw() as u8).collect();
            if let Some(arrivals) = Arrivals::new(&body) {
                assert_eq!(arrivals.clone().count(), usize::from(arrivals.left));
            }
        }
    }

    #[test]
    fn a_message_about_more_packets_than_anybody_sends_and_an_endless_one_are_refused() {
        assert!(
            Arrivals::new(&[0, 0, 0x20, 1, 0, 0, 0, 0, 0x20, 1]).is_none(),
            "8,193 packets"
        );
        assert!(
            Arrivals::new(&[0, 0, 0, 5, 0, 0, 0, 0, 0, 0]).is_none(),
            "a run of nothing"
        );
        assert!(
            Arrivals::new(&[0, 0, 0, 1, 0, 0, 0, 0, 0x20, 1]).is_none(),
            "a step that is not there"
        );
        assert!(
            Arrivals::new(&[0, 0, 0, 1, 0, 0, 0, 0, 0x60, 1, 0, 0]).is_none(),
            "a reserved symbol"
        );
    }
}
