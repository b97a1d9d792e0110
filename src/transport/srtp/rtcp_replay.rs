//! SRTCP replay state. The index is counted per sender SSRC (RFC 3711, section 3.2.3), and an SFU
//! reports from one SSRC for each track. A single window for a connection would refuse most of its
//! reports.

use crate::transport::rtp::Ssrc;

/// Maximum number of senders remembered, more than any room shows one subscriber. Beyond it, the
/// sender that was silent longest is forgotten. Memory grows only as authentic senders appear, 24
/// bytes each.
const MAX_SOURCES: usize = 1024;
const WIDTH: u32 = 64;

#[derive(Default)]
pub(super) struct RtcpReplay {
    /// Senders, sorted by SSRC.
    sources: Vec<ReplaySource>,
    accepted: u32,
}

struct ReplaySource {
    ssrc: Ssrc,
    highest: u32,
    /// Bit n is set if `highest - n` was received.
    seen: u64,
    last_accepted: u32,
}

impl RtcpReplay {
    pub(super) fn check(&self, ssrc: Ssrc, index: u32) -> bool {
        match self
            .sources
            .binary_search_by_key(&ssrc, |source| source.ssrc)
        {
            Ok(at) => self.sources[at].check(index),
            Err(_) => true,
        }
    }

    pub(super) fn commit(&mut self, ssrc: Ssrc, index: u32) {
        self.accepted = self.accepted.wrapping_add(1);
        match self
            .sources
            .binary_search_by_key(&ssrc, |source| source.ssrc)
        {
            Ok(at) => self.sources[at].commit(index, self.accepted),
            Err(_) => self.insert(ReplaySource {
                ssrc,
                highest: index,
                seen: 1,
                last_accepted: self.accepted,
            }),
        }
    }

    fn insert(&mut self, source: ReplaySource) {
        if self.sources.len() >= MAX_SOURCES {
            let silence = |source: &ReplaySource| self.accepted.wrapping_sub(source.last_accepted);
            if let Some((longest, _)) = self
                .sources
                .iter()
                .enumerate()
                .max_by_key(|(_, source)| silence(source))
            {
                self.sources.remove(longest);
            }
        }
        let at = self
            .sources
            .partition_point(|other| other.ssrc < source.ssrc);
        self.sources.insert(at, source);
    }
}

impl ReplaySource {
    fn check(&self, index: u32) -> bool {
        match self.highest.checked_sub(index) {
            None => true,
            Some(behind) => behind < WIDTH && self.seen >> behind & 1 == 0,
        }
    }

    fn commit(&mut self, index: u32, accepted: u32) {
        self.last_accepted = accepted;
        if index > self.highest {
            self.seen = self.seen.checked_shl(index - self.highest).unwrap_or(0) | 1;
            self.highest = index;
        } else if self.highest - index < WIDTH {
            self.seen |= 1 << (self.highest - index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sender_has_its_own_window() {
        let mut replay = RtcpReplay::default();
        for ssrc in [7, 3, 5] {
            assert!(replay.check(Ssrc(ssrc), 100));
            replay.commit(Ssrc(ssrc), 100);
            assert!(!replay.check(Ssrc(ssrc), 100));
        }
        assert!(
            replay.check(Ssrc(3), 99) && replay.check(Ssrc(3), 37) && !replay.check(Ssrc(3), 36)
        );
        replay.commit(Ssrc(3), 99);
        assert!(!replay.check(Ssrc(3), 99) && replay.check(Ssrc(5), 99));
        replay.commit(Ssrc(3), 1_000);
        assert!(
            !replay.check(Ssrc(3), 1_000)
                && replay.check(Ssrc(3), 999)
                && !replay.check(Ssrc(3), 100)
        );
    }

    #[test]
    fn the_longest_silent_sender_makes_room() {
        let mut replay = RtcpReplay::default();
        for ssrc in 0..MAX_SOURCES as u32 {
            replay.commit(Ssrc(ssrc), 1);
        }
        replay.commit(Ssrc(0), 2);
        replay.commit(Ssrc(9_999), 1);
        assert_eq!(replay.sources.len(), MAX_SOURCES);
        assert!(!replay.check(Ssrc(0), 2) && !replay.check(Ssrc(9_999), 1));
        assert!(
            replay.check(Ssrc(1), 1),
            "the sender that was silent longest is forgotten"
        );
        assert!(replay.sources.is_sorted_by_key(|source| source.ssrc));
    }
}
