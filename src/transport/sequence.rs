//! RTP sequence numbers: wrapping comparison, extension to the SRTP packet index, replay
//! protection.
//!
//! All state is per SSRC and lives with the stream that it belongs to.

use crate::net;

/// A 16-bit RTP sequence number. It wraps, so it has no total order: compare with [`Seq::diff`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Seq(pub u16);

impl Seq {
    /// Returns how far `self` is ahead of `other`, the shorter way round; negative if it is behind.
    pub const fn diff(self, other: Seq) -> i16 {
        self.0.wrapping_sub(other.0) as i16
    }

    pub const fn is_newer_than(self, other: Seq) -> bool {
        self.diff(other) > 0
    }

    #[must_use]
    pub const fn wrapping_add(self, packets: u16) -> Seq {
        Seq(self.0.wrapping_add(packets))
    }

    #[must_use]
    pub const fn next(self) -> Seq {
        self.wrapping_add(1)
    }
}

/// Extends received sequence numbers to the packet index, ROC << 16 | SEQ (RFC 3711, section 3.3.1
/// and appendix A).
///
/// Guessing and committing are two steps. An index may be committed only once the packet has proved
/// authentic; otherwise a forged packet could move the rollover counter.
#[derive(Clone, Copy, Debug, Default)]
pub struct SeqExtender {
    highest: Option<u64>,
}

impl SeqExtender {
    /// Creates an extender for a stream whose rollover counter is known to be `roc` while nothing
    /// has been received yet.
    pub const fn at_roc(roc: u32) -> SeqExtender {
        SeqExtender {
            highest: if roc == 0 {
                None
            } else {
                Some((roc as u64) << 16 | HALF as u64)
            },
        }
    }

    /// Returns the highest index committed so far.
    pub const fn highest(&self) -> Option<u64> {
        self.highest
    }

    /// Returns the most likely index of `seq`. The first packet of a stream has ROC 0, whatever its
    /// sequence number.
    pub const fn guess(&self, seq: u16) -> u64 {
        let Some(highest) = self.highest else {
            return seq as u64;
        };
        let roc = highest >> 16;
        let last = highest as u16;
        let roc = if last < HALF && seq.wrapping_sub(last) > HALF && seq > last {
            // The packet is from before the first rollover that we saw. There is no counter below
            // zero for it.
            roc.saturating_sub(1)
        } else if last >= HALF && last - HALF > seq {
            roc + 1
        } else {
            roc
        };
        roc << 16 | seq as u64
    }

    /// Records that the packet with `index` was authentic.
    pub const fn commit(&mut self, index: u64) {
        match self.highest {
            Some(highest) if highest >= index => {}
            _ => self.highest = Some(index),
        }
    }
}

const HALF: u16 = 1 << 15;

const WINDOW_WORDS: usize = ReplayWindow::WIDTH as usize / 64;

/// Remembers which of the latest [`ReplayWindow::WIDTH`] packet indices have been received (RFC
/// 3711, section 3.3.2).
///
/// It is a ring of bits. Bit `index % WIDTH` belongs to the highest index so far or to one less
/// than `WIDTH` behind it.
#[derive(Clone, Debug, Default)]
pub struct ReplayWindow {
    seen: [u64; WINDOW_WORDS],
    /// Index after the highest committed one; zero until the first.
    end: u64,
}

impl ReplayWindow {
    /// Width in packets. It is large enough for a retransmission at a few thousand packets a
    /// second; the RFC requires at least 64.
    pub const WIDTH: u64 = 1024;

    /// Prefetches what a packet with `index` will need.
    pub fn prefetch(&self, index: u64) {
        net::prefetch(&self.seen[place(index).0], usize::MAX);
        net::prefetch(&self.end, usize::MAX);
    }

    /// Returns whether `index` is neither a repetition nor older than the window. Changes nothing.
    pub fn check(&self, index: u64) -> bool {
        if index >= self.end {
            return true;
        }
        let (word, bit) = place(index);
        self.end - index <= ReplayWindow::WIDTH && self.seen[word] & bit == 0
    }

    /// Records that the packet with `index` was authentic. An index older than the window leaves no
    /// trace.
    pub fn commit(&mut self, index: u64) {
        if index >= self.end {
            self.advance(index);
        } else if self.end - index > ReplayWindow::WIDTH {
            return;
        }
        let (word, bit) = place(index);
        self.seen[word] |= bit;
    }

    fn advance(&mut self, index: u64) {
        if index - self.end >= ReplayWindow::WIDTH {
            self.seen = [0; WINDOW_WORDS];
        } else {
            for skipped in self.end..=index {
                let (word, bit) = place(skipped);
                self.seen[word] &= !bit;
            }
        }
        self.end = index.saturating_add(1);
    }
}

const fn place(index: u64) -> (usize, u64) {
    let bit = index % ReplayWindow::WIDTH;
    ((bit / 64) as usize, 1 << (bit % 64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn the_difference_goes_the_short_way_round() {
        for (a, b, diff) in [
            (1, 0, 1),
            (0, 1, -1),
            (0, 65_535, 1),
            (65_535, 0, -1),
            (32_767, 0, 32_767),
            (32_768, 0, -32_768),
        ] {
            assert_eq!(Seq(a).diff(Seq(b)), diff, "{a} - {b}");
        }
        assert!(Seq(3).is_newer_than(Seq(65_530)) && !Seq(3).is_newer_than(Seq(3)));
        assert_eq!(Seq(65_535).next(), Seq(0));
    }

    #[test]
    fn the_guess_follows_rfc_3711_appendix_a() {
        let table = [
            (None, 65_535, 65_535),
            (None, 0, 0),
            (Some(10), 11, 11),
            (Some(10), 32_778, 32_778),
            (Some(10), 65_535, 65_535),
            (Some(65_535), 0, 0x1_0000),
            (Some(0x1_0000), 65_535, 65_535),
            (Some(0x1_0000), 32_768, 0x1_8000),
            (Some(0x1_0000), 32_769, 0x0_8001),
            (Some(0x1_8000), 0, 0x1_0000),
            (Some(0x1_8001), 0, 0x2_0000),
            (Some(0x5_FFF0), 3, 0x6_0003),
        ];
        for (highest, seq, index) in table {
            assert_eq!(
                SeqExtender { highest }.guess(seq),
                index,
                "{highest:?} then {seq}"
            );
        }
    }

    #[test]
    fn a_long_stream_with_gaps_and_reordering_keeps_its_index() {
        let mut extender = SeqExtender::default();
        for step in 0..50_000u64 {
            let index = 65_000 + step * 37;
            let late = index.saturating_sub(step % 300).max(65_000);
            assert_eq!(extender.guess(index as u16), index);
            extender.commit(index);
            assert_eq!(extender.guess(late as u16), late);
            extender.commit(late);
            assert_eq!(extender.highest(), Some(index));
        }
    }

    #[test]
    fn a_known_rollover_counter_applies_to_every_first_packet() {
        for seq in [0, 1, 32_767, 32_768, 65_535] {
            assert_eq!(SeqExtender::at_roc(3).guess(seq), 3 << 16 | u64::from(seq));
            assert_eq!(SeqExtender::at_roc(0).guess(seq), u64::from(seq));
        }
    }

    #[test]
    fn a_packet_is_accepted_once_inside_the_window_and_never_behind_it() {
        let mut window = ReplayWindow::default();
        assert!(window.check(65_000));
        window.commit(65_000);
        assert!(!window.check(65_000));
        assert!(window.check(65_000 - 1_023) && !window.check(65_000 - 1_024));
        window.commit(65_000 - 1_023);
        assert!(!window.check(65_000 - 1_023));
        window.commit(65_000 + 5_000);
        assert!(window.check(65_000 + 4_999) && !window.check(65_000));
        window.commit(3);
        assert!(
            window.check(65_000 + 4_099),
            "an index behind the window must not mark a place inside it"
        );
    }

    #[test]
    fn the_window_agrees_with_a_set_on_a_jumping_stream() {
        let mut window = ReplayWindow::default();
        let mut accepted = HashSet::new();
        let (mut top, mut state) = (0u64, 0x9E37_79B9_7F4A_7C15u64);
        for _ in 0..200_000 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let index = if state.is_multiple_of(1_000) {
                top + state % 3_000
            } else {
                (top + 3).saturating_sub(state % 1_200)
            };
            let expected = index > top
                || accepted.is_empty()
                || (top - index < ReplayWindow::WIDTH && !accepted.contains(&index));
            assert_eq!(
                window.check(index),
                expected,
                "{index} with {top} the highest"
            );
            if expected {
                window.commit(index);
                accepted.insert(index);
                top = top.max(index);
            }
        }
    }
}
