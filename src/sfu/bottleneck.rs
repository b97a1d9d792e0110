//! A limit that a test sets on the SFU, to see whether a search finds it: beyond a number of media
//! packets a second the outlet drops packets, as an overloaded server does.
//!
//! The limit is a token bucket. Packets above its rate are dropped, retransmissions included. The
//! rate varies from second to second, as that of a server on a shared host does: near the limit one
//! run passes and the next one fails.

use std::time::Duration;

use crate::seeded::{Seeded, scatter};
use crate::transport::rtp;
use crate::units::Time;

/// Burst allowed after silence, as a share of a second's packets: frames come in bursts.
const BURST: Duration = Duration::from_millis(250);

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BottleneckLimit {
    /// RTP packets a second that one router may send, retransmissions included.
    pub packets_per_second: f64,
    /// Largest relative deviation of a second's rate, up or down.
    pub wander: f64,
    pub seed: u64,
}

/// The limit of one router, with its current state.
pub struct Bottleneck {
    limit: BottleneckLimit,
    /// Number of packets that may leave now.
    allowance: f64,
    refilled_at: Time,
    dropped: u64,
}

impl Bottleneck {
    pub fn new(limit: BottleneckLimit, now: Time) -> Bottleneck {
        Bottleneck {
            limit,
            allowance: limit.packets_per_second * BURST.as_secs_f64(),
            refilled_at: now,
            dropped: 0,
        }
    }

    /// Adds the allowance for the time since the last call.
    pub fn refill(&mut self, now: Time) {
        let rate = self.rate(now);
        let more = rate * now.since(self.refilled_at).as_secs_f64();
        self.allowance = (self.allowance + more).min(rate * BURST.as_secs_f64());
        self.refilled_at = now;
    }

    /// Whether a burst of `packets` may leave; `first` is its first packet. Anything that is not
    /// media may always leave.
    pub fn admits(&mut self, first: &[u8], packets: usize) -> bool {
        if !matches!(rtp::classify(first), rtp::Datagram::Rtp) {
            return true;
        }
        let packets = packets as f64;
        let admits = packets <= self.allowance;
        if admits {
            self.allowance -= packets;
        } else {
            self.dropped += packets as u64;
        }
        admits
    }

    /// Returns the number of packets dropped since the last call.
    pub fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }

    fn rate(&self, now: Time) -> f64 {
        let second = now.as_millis() / 1_000;
        let wander = Seeded::new(scatter(self.limit.seed ^ second)).signed();
        self.limit.packets_per_second * (1.0 + self.limit.wander * wander)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: BottleneckLimit = BottleneckLimit {
        packets_per_second: 1_000.0,
        wander: 0.0,
        seed: 7,
    };
    /// RTP, version 2, payload type 111.
    const MEDIA: [u8; 12] = [0x80, 111, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1];
    /// A receiver report.
    const REPORT: [u8; 8] = [0x80, 201, 0, 1, 0, 0, 0, 1];

    /// Number of packets admitted in each of ten seconds, with `offered` packets a second.
    fn admitted(limit: BottleneckLimit, offered: u64) -> Vec<u64> {
        let mut bottleneck = Bottleneck::new(limit, Time::ZERO);
        let mut each = vec![0; 10];
        for packet in 0..10 * offered {
            let now = Time::from_micros(packet * 1_000_000 / offered);
            bottleneck.refill(now);
            each[(packet / offered) as usize] += u64::from(bottleneck.admits(&MEDIA, 1));
        }
        let admitted: u64 = each.iter().sum();
        assert_eq!(bottleneck.take_dropped(), 10 * offered - admitted);
        assert_eq!(bottleneck.take_dropped(), 0);
        each
    }

    #[test]
    fn all_leaves_below_the_limit_and_no_more_than_it_above() {
        assert_eq!(admitted(LIMIT, 990), [990; 10]);
        for (second, admitted) in admitted(LIMIT, 2_000).into_iter().enumerate() {
            let burst = if second == 0 { 250 } else { 0 };
            assert!(
                admitted.abs_diff(1_000 + burst) <= 1,
                "{admitted} in second {second}"
            );
        }
    }

    #[test]
    fn the_edge_wanders_around_the_limit_and_a_seed_repeats_it() {
        let limit = BottleneckLimit {
            wander: 0.05,
            ..LIMIT
        };
        let each = admitted(limit, 2_000);
        assert_eq!(each, admitted(limit, 2_000));
        assert_ne!(each, admitted(BottleneckLimit { seed: 8, ..limit }, 2_000));
        assert!(
            each[1..]
                .iter()
                .all(|admitted| (949..=1_051).contains(admitted)),
            "{each:?}"
        );
        assert!(
            each[1..].iter().any(|admitted| *admitted < 990)
                && each[1..].iter().any(|admitted| *admitted > 1_010),
            "{each:?}"
        );
    }

    #[test]
    fn what_is_not_media_leaves_always_and_a_burst_leaves_whole_or_not_at_all() {
        let mut bottleneck = Bottleneck::new(LIMIT, Time::ZERO);
        assert!(bottleneck.admits(&MEDIA, 200));
        assert!(!bottleneck.admits(&MEDIA, 64));
        assert!(bottleneck.admits(&MEDIA, 50));
        assert!(!bottleneck.admits(&MEDIA, 1));
        assert!((0..100).all(|_| bottleneck.admits(&REPORT, 1)));
        assert_eq!(bottleneck.take_dropped(), 65);
    }
}
