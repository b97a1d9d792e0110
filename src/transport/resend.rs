//! State that a sender keeps to answer NACKs: the frame that each sequence number belonged to, and
//! the limit of retransmissions.
//!
//! Media is shared and immutable, so a frame is remembered as a few numbers from which its packets
//! are made again.

use std::time::Duration;

use crate::units::{Bitrate, Time};

/// Number of frames kept for audio: 2.5 s at 20 ms.
pub const AUDIO_FRAMES: usize = 128;

/// Number of frames kept for video: 2.1 s at 30 frames a second.
pub const VIDEO_FRAMES: usize = 64;

/// Maximum span of the ring in sequence numbers: half of their space, so that old and new ones are
/// never confused.
const SPAN_MAX: u32 = 1 << 15;

/// One sent frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameRecord {
    pub intended: Time,
    /// Index into the shared media.
    pub media: u32,
    pub rtp_time: u32,
    /// The participant's own frame number, as in the frame's identity.
    pub frame: u32,
    pub first_seq: u16,
    /// Number of packets, at least 1.
    pub packets: u16,
    pub picture_id: u16,
    /// On video: this is the key frame of `media`, not its inter frame. On audio: it begins a
    /// talkspurt.
    pub key: bool,
    /// Number of earlier packets that it repeats (RED). It never changes, because a retransmitted
    /// packet must be the same to the last byte.
    pub redundant: u8,
}

/// The last sent frames, in sending order. There may be sequence numbers between frames (padding);
/// they belong to no frame.
pub struct ResendRing {
    records: Box<[FrameRecord]>,
    /// Index of the next record.
    head: usize,
    len: usize,
    /// Number of sequence numbers from the oldest record's first to the newest's last.
    span: u32,
}

impl ResendRing {
    /// Creates a ring for `frames` frames, above zero. Allocates once.
    pub fn new(frames: usize) -> ResendRing {
        assert!(frames > 0, "a ring holds something");
        ResendRing {
            records: vec![FrameRecord::default(); frames].into_boxed_slice(),
            head: 0,
            len: 0,
            span: 0,
        }
    }

    /// Remembers a frame. Forgets the oldest ones if room or sequence space runs out.
    pub fn push(&mut self, record: FrameRecord) {
        assert!(
            record.packets > 0 && u32::from(record.packets) <= SPAN_MAX,
            "a frame has packets, and not half the sequence space of them"
        );
        let hole = self.newest().map_or(0, |newest| {
            u32::from(record.first_seq.wrapping_sub(end_of(newest)))
        });
        if hole >= SPAN_MAX {
            self.clear();
        } else {
            self.span += hole;
        }
        self.span += u32::from(record.packets);
        while self.len == self.records.len() || (self.len > 0 && self.span > SPAN_MAX) {
            self.forget_oldest(record.first_seq);
        }
        if self.len == 0 {
            self.span = u32::from(record.packets);
        }
        self.records[self.head] = record;
        self.head = (self.head + 1) % self.records.len();
        self.len += 1;
    }

    /// Returns the frame that `seq` was part of, and the index of the packet in it.
    pub fn find(&self, seq: u16) -> Option<(&FrameRecord, u16)> {
        let back = u32::from(end_of(self.newest()?).wrapping_sub(seq));
        if back == 0 || back > self.span {
            return None;
        }
        let start = end_of(self.newest()?);
        let (mut low, mut high) = (0, self.len);
        // Binary search for the last record, in sending order, that starts at or before `seq`.
        while low < high {
            let middle = (low + high) / 2;
            if u32::from(start.wrapping_sub(self.record(middle).first_seq)) >= back {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let record = self.record(low.checked_sub(1)?);
        let packet = seq.wrapping_sub(record.first_seq);
        (packet < record.packets).then_some((record, packet))
    }

    pub fn clear(&mut self) {
        self.len = 0;
        self.span = 0;
    }

    /// Returns the record of an age; 0 is the oldest.
    fn record(&self, age: usize) -> &FrameRecord {
        let room = self.records.len();
        &self.records[(self.head + room - self.len + age) % room]
    }

    fn newest(&self) -> Option<&FrameRecord> {
        self.len.checked_sub(1).map(|age| self.record(age))
    }

    /// Forgets the oldest record. `next_seq` is the first sequence number of the frame about to be
    /// pushed; it is used if the oldest is also the newest.
    fn forget_oldest(&mut self, next_seq: u16) {
        let first = self.record(0).first_seq;
        let second = if self.len > 1 {
            self.record(1).first_seq
        } else {
            next_seq
        };
        self.span -= u32::from(second.wrapping_sub(first));
        self.len -= 1;
    }
}

fn end_of(record: &FrameRecord) -> u16 {
    record.first_seq.wrapping_add(record.packets)
}

/// Result of [`ResendLimiter::allow`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resend {
    Allowed,
    /// The same packet was retransmitted less than an RTT plus a margin ago, and that one may still
    /// be on its way.
    TooSoon,
    /// Retransmissions have used up their share of the rate.
    OverBudget,
}

/// Margin beyond the round trip, as in libwebrtc. A server whose reports show a very short round
/// trip must not get the same packet again and again at once.
const REPEAT_MARGIN: Duration = Duration::from_millis(5);

/// Number of recent retransmissions remembered. Two packets this far apart share a slot. Then one
/// retransmission more may pass, within the budget.
const RECENT: usize = 64;

/// Token bucket over the bytes of retransmissions, and a guard against retransmitting the same
/// packet within an RTT (as in libwebrtc).
///
/// So whatever a server requests, it gets one burst and then no more than the rate: together with
/// the media itself, twice the track's bitrate.
pub struct ResendLimiter {
    rate: Bitrate,
    /// Fill level in bits times 10^9, so that a refill of any length is exact.
    level: u64,
    capacity: u64,
    refilled_at: Time,
    recent: [Recent; RECENT],
}

#[derive(Clone, Copy, Default)]
struct Recent {
    /// Time in units of 100 us, modulo 2^32 (5 days), plus one; zero if there is none.
    at: u32,
    seq: u16,
}

const BITS: u64 = 1_000_000_000;

impl ResendLimiter {
    /// Creates a limiter. Retransmissions may take `rate` in the long run and `burst_bytes` at once
    /// (at most 1 GiB). The bucket starts full.
    pub fn new(rate: Bitrate, burst_bytes: u32) -> ResendLimiter {
        assert!(burst_bytes <= 1 << 30, "a burst is at most 1 GiB");
        let capacity = u64::from(burst_bytes) * 8 * BITS;
        ResendLimiter {
            rate,
            level: capacity,
            capacity,
            refilled_at: Time::ZERO,
            recent: [Recent::default(); RECENT],
        }
    }

    /// Returns whether the packet `seq` of `bytes` bytes may be retransmitted now. An allowed
    /// packet is counted as retransmitted.
    pub fn allow(&mut self, seq: u16, bytes: usize, now: Time, rtt: Duration) -> Resend {
        self.refill(now);
        let stamp = ((now.as_micros() / 100) as u32).wrapping_add(1).max(1);
        let recent = &mut self.recent[usize::from(seq) % RECENT];
        let since = Duration::from_micros(u64::from(stamp.wrapping_sub(recent.at)) * 100);
        if recent.at != 0 && recent.seq == seq && since < rtt + REPEAT_MARGIN {
            return Resend::TooSoon;
        }
        let cost = (bytes as u64).saturating_mul(8 * BITS);
        if cost > self.level {
            return Resend::OverBudget;
        }
        self.level -= cost;
        *recent = Recent { at: stamp, seq };
        Resend::Allowed
    }

    fn refill(&mut self, now: Time) {
        let elapsed = now.since(self.refilled_at).as_nanos() as u64;
        self.refilled_at = self.refilled_at.max(now);
        self.level = self
            .level
            .saturating_add(elapsed.saturating_mul(self.rate.bps()))
            .min(self.capacity);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the expected (record, packet), by a linear search from the newest frame on.
    fn naive(sent: &[FrameRecord], room: usize, seq: u16) -> Option<(FrameRecord, u16)> {
        let kept = sent.iter().rev().take(room);
        kept.map(|record| (*record, seq.wrapping_sub(record.first_seq)))
            .find(|(record, packet)| *packet < record.packets)
    }

    #[test]
    fn every_packet_of_the_last_frames_is_found_and_no_other_over_many_wraps() {
        let mut ring = ResendRing::new(VIDEO_FRAMES);
        let mut sent: Vec<FrameRecord> = Vec::new();
        let mut next_seq = 65_000u16;
        for frame in 0..3_000u32 {
            let hole = if frame % 7 == 0 {
                (frame % 5) as u16
            } else {
                0
            };
            let packets = 1 + (frame.wrapping_mul(2_654_435_761) >> 27) as u16;
            let record = FrameRecord {
                frame,
                first_seq: next_seq.wrapping_add(hole),
                packets,
                ..FrameRecord::default()
            };
            next_seq = record.first_seq.wrapping_add(packets);
            ring.push(record);
            sent.push(record);
            let found = |seq| ring.find(seq).map(|(record, packet)| (*record, packet));
            for back in 0..400 {
                let seq = next_seq.wrapping_sub(back * 3);
                assert_eq!(
                    found(seq),
                    naive(&sent, VIDEO_FRAMES, seq),
                    "frame {frame}, seq {seq}"
                );
            }
            assert_eq!(found(next_seq), None);
        }
    }

    #[test]
    fn frames_too_large_for_the_sequence_space_push_older_ones_out() {
        let mut ring = ResendRing::new(8);
        for frame in 0..8u32 {
            ring.push(FrameRecord {
                frame,
                first_seq: (frame * 10_000) as u16,
                packets: 10_000,
                ..FrameRecord::default()
            });
        }
        assert_eq!(
            ring.find((70_000u32) as u16)
                .map(|(record, packet)| (record.frame, packet)),
            Some((7, 0))
        );
        assert_eq!(
            ring.find((59_999u32) as u16)
                .map(|(record, packet)| (record.frame, packet)),
            Some((5, 9_999))
        );
        assert_eq!(ring.find(49_999), None);
        ring.push(FrameRecord {
            frame: 9,
            first_seq: 1,
            packets: 32_768,
            ..FrameRecord::default()
        });
        assert_eq!(ring.find(1).map(|(record, _)| record.frame), Some(9));
        assert_eq!(ring.find(0), None);
    }

    #[test]
    fn an_empty_ring_knows_nothing_and_a_jump_forgets_all() {
        let mut ring = ResendRing::new(4);
        assert!(ring.find(0).is_none());
        ring.push(FrameRecord {
            first_seq: 100,
            packets: 3,
            ..FrameRecord::default()
        });
        ring.push(FrameRecord {
            first_seq: 50,
            packets: 3,
            ..FrameRecord::default()
        });
        assert!(ring.find(101).is_none());
        assert!(ring.find(52).is_some());
    }

    #[test]
    fn the_same_packet_is_not_resent_within_a_round_trip() {
        let mut limiter = ResendLimiter::new(Bitrate::from_bps(1_000_000), 100_000);
        let (start, rtt) = (Time::from_millis(5), Duration::from_millis(40));
        assert_eq!(limiter.allow(7, 1_000, start, rtt), Resend::Allowed);
        assert_eq!(
            limiter.allow(7, 1_000, start + rtt / 2, rtt),
            Resend::TooSoon
        );
        assert_eq!(
            limiter.allow(8, 1_000, start + rtt / 2, rtt),
            Resend::Allowed
        );
        assert_eq!(limiter.allow(7, 1_000, start + rtt, rtt), Resend::TooSoon);
        assert_eq!(
            limiter.allow(7, 1_000, start + rtt + REPEAT_MARGIN, rtt),
            Resend::Allowed
        );
        assert_eq!(
            limiter.allow(
                7,
                1_000,
                start + rtt + REPEAT_MARGIN * 3 / 2,
                Duration::ZERO
            ),
            Resend::TooSoon
        );
        assert_eq!(
            limiter.allow(0, 1_000, Time::ZERO, rtt),
            Resend::Allowed,
            "nothing was sent at time zero"
        );
    }

    #[test]
    fn resends_keep_to_their_rate_in_the_long_run_and_their_burst_at_once() {
        let mut limiter = ResendLimiter::new(Bitrate::from_bps(800_000), 10_000);
        let mut bytes = 0;
        for millis in 0..10_000u64 {
            for again in 0..4u64 {
                if limiter.allow(
                    (millis * 4 + again) as u16,
                    1_000,
                    Time::from_millis(millis),
                    Duration::ZERO,
                ) == Resend::Allowed
                {
                    bytes += 1_000;
                }
            }
            if millis == 0 {
                assert_eq!(bytes, 4_000);
            }
        }
        assert!(
            (1_000_000 + 8_000..=1_000_000 + 10_000).contains(&bytes),
            "{bytes}"
        );
    }
}
