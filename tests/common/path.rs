//! Effects of one direction of a bad network on packets, as plain arithmetic: sizes and times go
//! in, fates come out. The same seed gives the same fates.

use std::time::Duration;

/// The SplitMix64 generator: small, and the same on every platform.
pub struct Chance(u64);

impl Chance {
    pub fn new(seed: u64) -> Chance {
        Chance(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn happens(&mut self, share: f64) -> bool {
        ((self.next() >> 11) as f64 / (1u64 << 53) as f64) < share
    }

    fn up_to(&mut self, bound: Duration) -> Duration {
        Duration::from_nanos(self.next() % (bound.as_nanos() as u64 + 1))
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Loss {
    #[default]
    None,
    /// Loses each packet with this probability, independently of the others.
    Random(f64),
    /// Gilbert-Elliott model whose bad state loses everything. It loses `share` of all packets, in
    /// bursts of `mean` packets on average.
    Bursts { share: f64, mean: f64 },
}

/// A token bucket with a queue behind it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    pub bits_per_second: u64,
    /// Number of bytes that may pass at once after a silence.
    pub burst_bytes: usize,
    /// Limit of the queue. A packet that would exceed it is dropped.
    pub queue_bytes: usize,
}

impl Rate {
    fn time_of(&self, bytes: usize) -> Duration {
        Duration::from_nanos(bytes as u64 * 8 * 1_000_000_000 / self.bits_per_second)
    }
}

/// Effects on the packets of one direction, applied in this order. The default is a perfect
/// network.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Conditions {
    /// If set, nothing passes.
    pub cut: bool,
    pub loss: Loss,
    pub rate: Option<Rate>,
    pub delay: Duration,
    /// Longest random delay that is added to each packet, evenly distributed from zero.
    pub jitter: Duration,
    /// Whether jitter may let packets overtake one another.
    pub reorder: bool,
    /// Share of packets that come twice. The copy has a jitter of its own.
    pub duplication: f64,
}

/// Fate of one copy of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It leaves at this time.
    Leaves(Duration),
    Lost,
    /// The queue before the bottleneck was full.
    Overflowed,
    Cut,
}

/// One direction of a network.
pub struct Path {
    pub conditions: Conditions,
    chance: Chance,
    in_burst: bool,
    /// Time at which the bottleneck will have sent everything that it was given: the theoretical
    /// arrival time of GCRA.
    idle_from: Duration,
    last_leaves: Duration,
}

impl Path {
    pub fn new(conditions: Conditions, seed: u64) -> Path {
        Path {
            conditions,
            chance: Chance::new(seed),
            in_burst: false,
            idle_from: Duration::ZERO,
            last_leaves: Duration::ZERO,
        }
    }

    /// Returns the fate of a packet that comes now, and that of its duplicate if it has one.
    pub fn take(&mut self, bytes: usize, now: Duration) -> (Fate, Option<Fate>) {
        if self.conditions.cut {
            return (Fate::Cut, None);
        }
        if self.loses() {
            return (Fate::Lost, None);
        }
        let Some(sent) = self.through_the_bottleneck(bytes, now) else {
            return (Fate::Overflowed, None);
        };
        let first = self.after_the_wire(sent);
        let twice =
            self.conditions.duplication > 0.0 && self.chance.happens(self.conditions.duplication);
        (first, twice.then(|| self.after_the_wire(sent)))
    }

    fn loses(&mut self) -> bool {
        match self.conditions.loss {
            Loss::None => false,
            Loss::Random(share) => self.chance.happens(share),
            Loss::Bursts { share, mean } => {
                // A burst ends at each packet with probability 1 / `mean`. Bursts begin so often
                // that `share` of all packets fall in them.
                let change = if self.in_burst {
                    1.0 / mean
                } else {
                    share / (mean * (1.0 - share))
                };
                self.in_burst ^= self.chance.happens(change);
                self.in_burst
            }
        }
    }

    /// Returns the time at which a packet has passed the bottleneck; `None` if the queue is full.
    fn through_the_bottleneck(&mut self, bytes: usize, now: Duration) -> Option<Duration> {
        let Some(rate) = self.conditions.rate else {
            return Some(now);
        };
        let idle_from = self.idle_from.max(now);
        let sent = now.max(idle_from.saturating_sub(rate.time_of(rate.burst_bytes)));
        if sent - now + rate.time_of(bytes) > rate.time_of(rate.queue_bytes) {
            return None;
        }
        self.idle_from = idle_from + rate.time_of(bytes);
        Some(sent)
    }

    fn after_the_wire(&mut self, sent: Duration) -> Fate {
        let jitter = match self.conditions.jitter {
            Duration::ZERO => Duration::ZERO,
            bound => self.chance.up_to(bound),
        };
        let mut leaves = sent + self.conditions.delay + jitter;
        if !self.conditions.reorder {
            leaves = leaves.max(self.last_leaves);
        }
        self.last_leaves = self.last_leaves.max(leaves);
        Fate::Leaves(leaves)
    }
}
