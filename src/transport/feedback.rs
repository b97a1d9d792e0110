//! Arrival times of a connection's packets, for transport-wide feedback
//! (draft-holmer-rmcat-transport-wide-cc-extensions-01). A browser's bandwidth estimate is made
//! from it and stays low without it.

use crate::transport::rtp::Ssrc;
use std::time::Duration;

use super::rtcp::{FEEDBACK_TICK, RtcpWriter, WriteError};
use super::sequence::Seq;
use crate::net;
use crate::units::Time;

/// Feedback interval of libwebrtc at a usual rate. Its estimator asks for 50 to 250 ms.
pub const FEEDBACK_INTERVAL: Duration = Duration::from_millis(100);
/// Number of packets remembered until they are reported: 100 ms at 100 Mb/s. Older ones are
/// reported as lost, or not at all.
const LOG_LEN: u64 = 1_024;
/// Maximum number of packets in one message, so that it stays below 1,200 bytes for any arrival
/// pattern.
const MESSAGE_PACKETS_MAX: usize = 400;

/// Arrivals that have not been reported. The fields that every packet needs come first.
#[repr(C)]
pub struct ArrivalLog {
    /// First unwrapped sequence number of the next message.
    next: u64,
    /// Unwrapped sequence number after the highest received; zero before the first packet.
    end: u64,
    messages: u8,
    /// Arrival times; [`Time::MAX`] for a packet that has not arrived.
    arrivals: [Time; LOG_LEN as usize],
}

impl Default for ArrivalLog {
    fn default() -> ArrivalLog {
        ArrivalLog {
            next: 0,
            end: 0,
            messages: 0,
            arrivals: [Time::MAX; LOG_LEN as usize],
        }
    }
}

impl ArrivalLog {
    /// Size of the fields at the start that every packet needs.
    pub const HEAD_BYTES: usize = std::mem::offset_of!(ArrivalLog, arrivals);

    /// Prefetches what the next packet needs beyond the head. The head must be in the cache by
    /// then.
    pub fn prefetch_next(&self) {
        net::prefetch(&self.arrivals[(self.end % LOG_LEN) as usize], usize::MAX);
    }

    /// Records a packet's arrival. A packet that was already reported as lost stays lost.
    pub fn record(&mut self, seq: u16, arrival: Time) {
        let ext = self.unwrapped(seq);
        if self.end == 0 {
            self.next = ext;
            self.end = ext;
        }
        if ext < self.next {
            return;
        }
        for new in self.end.max((ext + 1).saturating_sub(LOG_LEN))..=ext {
            self.arrivals[(new % LOG_LEN) as usize] = Time::MAX;
        }
        self.end = self.end.max(ext + 1);
        self.next = self.next.max(self.end.saturating_sub(LOG_LEN));
        let place = &mut self.arrivals[(ext % LOG_LEN) as usize];
        *place = (*place).min(arrival);
    }

    pub fn has_news(&self) -> bool {
        self.next < self.end
    }

    /// Appends one message about the oldest unreported packets and forgets them. More may be left.
    pub fn write(
        &mut self,
        writer: &mut RtcpWriter<'_>,
        sender_ssrc: Ssrc,
        media_ssrc: Ssrc,
    ) -> Result<(), WriteError> {
        // A message begins with a received packet, because its time is the reference.
        while self.has_news() && self.arrival(self.next).is_none() && self.end - self.next > 1 {
            self.next += 1;
        }
        let mut count = 0;
        let mut before = None;
        while count < MESSAGE_PACKETS_MAX && self.next + (count as u64) < self.end {
            let arrival = self.arrival(self.next + count as u64);
            if let (Some(before), Some(arrival)) = (before, arrival)
                && too_far_apart(before, arrival)
            {
                break;
            }
            before = arrival.or(before);
            count += 1;
        }
        let arrivals = (0..count).map(|place| self.arrival(self.next + place as u64));
        writer.transport_cc(
            sender_ssrc,
            media_ssrc,
            Seq(self.next as u16),
            self.messages,
            arrivals,
        )?;
        self.next += count as u64;
        self.messages = self.messages.wrapping_add(1);
        Ok(())
    }

    fn arrival(&self, ext: u64) -> Option<Time> {
        Some(self.arrivals[(ext % LOG_LEN) as usize]).filter(|arrival| *arrival != Time::MAX)
    }

    /// The first number starts one cycle above zero, so that a packet older than it does not fall
    /// below zero.
    fn unwrapped(&self, seq: u16) -> u64 {
        if self.end == 0 {
            return (1 << 16) + u64::from(seq);
        }
        let highest = self.end - 1;
        highest.wrapping_add_signed(i64::from(Seq(seq).diff(Seq(highest as u16))))
    }
}

/// Returns whether two arrivals are too far apart: a step between them has 16 bits, signed.
fn too_far_apart(before: Time, after: Time) -> bool {
    let apart = after.since(before).max(before.since(after));
    apart >= FEEDBACK_TICK * (i16::MAX as u32 - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seeded::Seeded;
    use crate::transport::rtcp::{RtcpPacket, packets};
    use rtc_rtcp::transport_feedbacks::transport_layer_cc::{
        PacketStatusChunk, SymbolTypeTcc, TransportLayerCc,
    };
    use rtc_shared::marshal::Unmarshal;

    /// Reads a message with an independent library. Returns the received sequence numbers with
    /// their times in units of 250 us, and the number after the last.
    fn read(message: &[u8]) -> (Vec<(u16, i64)>, u16) {
        let parsed = TransportLayerCc::unmarshal(&mut &message[..]).unwrap();
        let mut symbols = Vec::new();
        for chunk in &parsed.packet_chunks {
            match chunk {
                PacketStatusChunk::RunLengthChunk(run) => symbols.extend(std::iter::repeat_n(
                    run.packet_status_symbol,
                    usize::from(run.run_length),
                )),
                PacketStatusChunk::StatusVectorChunk(vector) => {
                    symbols.extend(vector.symbol_list.iter().copied())
                }
            }
        }
        symbols.truncate(usize::from(parsed.packet_status_count));
        let mut at = i64::from(parsed.reference_time) * 256;
        let mut deltas = parsed.recv_deltas.iter();
        let mut came = Vec::new();
        for (index, symbol) in symbols.iter().enumerate() {
            if *symbol != SymbolTypeTcc::PacketNotReceived {
                at += deltas.next().unwrap().delta / 250;
                came.push((parsed.base_sequence_number.wrapping_add(index as u16), at));
            }
        }
        assert!(deltas.next().is_none());
        (
            came,
            parsed
                .base_sequence_number
                .wrapping_add(parsed.packet_status_count),
        )
    }

    #[test]
    fn an_independent_reader_finds_every_arrival_at_its_time() {
        for seed in 0..50 {
            let (mut random, mut log) = (Seeded::new(seed), ArrivalLog::default());
            let (mut seq, mut now) = (
                random.draw() as u16,
                Time::from_millis(random.below(100_000)),
            );
            let mut expected = Vec::new();
            let mut told = Vec::new();
            for _ in 0..40 {
                for _ in 0..random.below(300) {
                    let longest = match random.below(40) {
                        0 => 9_000_000,
                        1..5 => 90_000,
                        5..15 => 3_000,
                        _ => 40,
                    };
                    now += Duration::from_micros(random.below(longest));
                    if !random.chance(10) {
                        log.record(seq, now);
                        expected.push((seq, (now.as_micros() / 250) as i64));
                    }
                    seq = seq.wrapping_add(1 + random.below(30) as u16 / 29 * 50);
                    // The log holds no more than this until it is read.
                    if expected.len() - told.len() > 100 {
                        break;
                    }
                }
                while log.has_news() {
                    let mut buffer = [0; 1_200];
                    let mut writer = RtcpWriter::new(&mut buffer);
                    log.write(&mut writer, Ssrc(1), Ssrc(2)).unwrap();
                    let len = writer.len();
                    assert!(matches!(
                        packets(&buffer[..len]).next(),
                        Some(Ok(RtcpPacket::TransportCc {
                            sender_ssrc: Ssrc(1),
                            media_ssrc: Ssrc(2),
                            ..
                        }))
                    ));
                    told.extend(read(&buffer[..len]).0);
                }
                assert!(
                    told.iter()
                        .map(|(seq, _)| seq)
                        .eq(expected.iter().map(|(seq, _)| seq)),
                    "seed {seed}"
                );
                assert!(
                    told.iter()
                        .zip(&expected)
                        .all(|((_, told), (_, at))| told.abs_diff(*at) <= 1),
                    "seed {seed}: times are rounded, and roundings do not add up"
                );
            }
        }
    }

    #[test]
    fn overtaken_packets_keep_their_times_and_what_was_reported_is_not_reported_again() {
        let mut log = ArrivalLog::default();
        for (seq, millis) in [(65_535, 10), (1, 11), (0, 12), (0, 13), (5, 14)] {
            log.record(seq, Time::from_millis(millis));
        }
        let mut buffer = [0; 200];
        let mut writer = RtcpWriter::new(&mut buffer);
        log.write(&mut writer, Ssrc(1), Ssrc(2)).unwrap();
        let len = writer.len();
        assert_eq!(
            read(&buffer[..len]),
            (vec![(65_535, 40), (0, 48), (1, 44), (5, 56)], 6)
        );
        log.record(3, Time::from_millis(20));
        assert!(!log.has_news());
        log.record(6, Time::from_millis(21));
        assert!(log.has_news());
    }

    #[test]
    fn wild_numbers_do_no_harm() {
        let (mut random, mut log) = (Seeded::new(9), ArrivalLog::default());
        for round in 0..20_000 {
            log.record(random.draw() as u16, Time::from_nanos(random.draw() >> 20));
            while round % 50 == 0 && log.has_news() {
                let mut buffer = [0; 1_200];
                log.write(&mut RtcpWriter::new(&mut buffer), Ssrc(1), Ssrc(2))
                    .unwrap();
            }
        }
    }
}
