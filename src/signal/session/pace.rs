//! Limits how fast a server may send to one participant. If it sends faster, its messages are read
//! more slowly, and wait.
//!
//! The work for one message is bounded, and so is the number of messages in a second. So a server
//! that sends nothing but offers, speakers or candidates takes a bounded share of this host, and
//! the queues of shards and of the run stay short.

use std::time::Duration;

use super::SignalEvent;
use crate::units::Time;

/// Sustained rate of messages of any kind. A meeting of a thousand gets some hundred a second at
/// its busiest.
const PER_SECOND: u32 = 1_024;
/// Number of messages at once: everybody of a large room at a join.
const BURST: u32 = 4_096;
/// Cost of a message that makes work for a shard, or is answered by a description: 64 a second, 256
/// at once. LiveKit keeps 150 ms between two offers.
const COSTLY: u32 = 16;

pub(super) struct SignalPace {
    /// When all messages so far would have been read at the sustained rate.
    even_at: Time,
}

impl SignalPace {
    pub(super) fn new(now: Time) -> SignalPace {
        SignalPace { even_at: now }
    }

    /// Counts a message that came at `now`, and returns how long to wait before handling it.
    pub(super) fn pause_before(&mut self, event: &SignalEvent, now: Time) -> Option<Duration> {
        let costly = matches!(
            event,
            SignalEvent::Join(_)
                | SignalEvent::Offer(_)
                | SignalEvent::Answer(_)
                | SignalEvent::Trickle(_)
                | SignalEvent::TrackPublished { .. }
                | SignalEvent::SubscribedQuality(_)
                | SignalEvent::MediaSections { .. }
                | SignalEvent::Mute { .. }
        );
        let cost = Duration::from_secs(1) / PER_SECOND * if costly { COSTLY } else { 1 };
        self.even_at = self.even_at.max(now) + cost;
        let ahead = self.even_at.since(now);
        let burst = Duration::from_secs(1) / PER_SECOND * BURST;
        ahead.checked_sub(burst).filter(|pause| !pause.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer() -> SignalEvent {
        SignalEvent::MediaSections { audio: 1, video: 0 }
    }

    fn other() -> SignalEvent {
        SignalEvent::Ignored { kind: 5, len: 100 }
    }

    /// Returns how many of these are handled in the first second, from a server that never stops
    /// sending.
    fn handled(event: &SignalEvent) -> u32 {
        let (mut now, mut pace, mut count) = (
            Time::from_millis(5),
            SignalPace::new(Time::from_millis(5)),
            0,
        );
        loop {
            now += pace.pause_before(event, now).unwrap_or_default();
            if now > Time::from_millis(1_005) {
                return count;
            }
            count += 1;
        }
    }

    #[test]
    fn a_flood_is_read_at_the_lasting_rate_after_its_burst() {
        assert_eq!(handled(&other()), BURST + PER_SECOND);
        assert_eq!(handled(&offer()), (BURST + PER_SECOND) / COSTLY);
    }

    #[test]
    fn who_was_silent_may_burst_again_and_no_more() {
        let mut pace = SignalPace::new(Time::ZERO);
        let late = Time::from_millis(60_000);
        let waits = (0..=BURST)
            .filter(|_| pace.pause_before(&other(), late).is_some())
            .count();
        assert_eq!(waits, 1);
    }
}
