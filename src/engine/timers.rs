//! Timers of a shard: a wheel of 1 ms buckets over a fixed set of timers. Setting, clearing and
//! firing allocate nothing.

use crate::net;
use crate::units::Time;

const BUCKETS: usize = 4096;
const NANOS_PER_BUCKET: u64 = 1_000_000;
const NONE: u32 = u32::MAX;

/// Timers `0..capacity`. A timer fires once, at the first [`Timers::pop_due`] whose bucket is not
/// before its due time: never early, at most 1 ms late.
pub struct Timers {
    nodes: Vec<TimerNode>,
    heads: Vec<u32>,
    /// Next bucket to open, as a count of milliseconds.
    cursor: u64,
    /// Timers of opened buckets that are not handed out yet.
    ready: u32,
}

#[derive(Clone, Copy)]
struct TimerNode {
    due: Time,
    next: u32,
    prev: u32,
    place: TimerPlace,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum TimerPlace {
    Idle,
    Ready,
    Bucket(u16),
}

impl Timers {
    pub fn new(capacity: usize, now: Time) -> Timers {
        let idle = TimerNode {
            due: Time::MAX,
            next: NONE,
            prev: NONE,
            place: TimerPlace::Idle,
        };
        Timers {
            nodes: vec![idle; capacity],
            heads: vec![NONE; BUCKETS],
            cursor: now.as_nanos() / NANOS_PER_BUCKET,
            ready: NONE,
        }
    }

    /// Sets the timer, whether or not it was set before. `Time::MAX` clears it.
    pub fn set(&mut self, timer: u32, due: Time) {
        self.unlink(timer);
        if due == Time::MAX {
            return;
        }
        self.nodes[timer as usize].due = due;
        let bucket = due.as_nanos().div_ceil(NANOS_PER_BUCKET).max(self.cursor);
        self.link(timer, TimerPlace::Bucket((bucket % BUCKETS as u64) as u16));
    }

    /// Returns the next timer that is due, or `None` when all timers due by `now` have been handed
    /// out.
    pub fn pop_due(&mut self, now: Time) -> Option<u32> {
        loop {
            if self.ready != NONE {
                let timer = self.ready;
                let due = self.nodes[timer as usize].due;
                self.unlink(timer);
                if due <= now {
                    return Some(timer);
                }
                // The timer is due in a later lap of the wheel.
                self.set(timer, due);
                continue;
            }
            if self.cursor > now.as_nanos() / NANOS_PER_BUCKET {
                return None;
            }
            self.open_bucket();
        }
    }

    /// Returns the timers that will probably come next, in this order, as far as is known without
    /// opening another bucket.
    pub fn upcoming(&self) -> [Option<u32>; 2] {
        let known = |timer: u32| (timer != NONE).then_some(timer);
        let Some(first) = known(self.ready) else {
            return [None; 2];
        };
        let second = known(self.nodes[first as usize].next);
        if let Some(third) = second.and_then(|second| known(self.nodes[second as usize].next)) {
            net::prefetch(&self.nodes[third as usize], usize::MAX);
        }
        [Some(first), second]
    }

    /// Whether any timer may be due by `time`, which is no more than a few milliseconds ahead.
    pub fn any_by(&self, time: Time) -> bool {
        let last = time.as_nanos() / NANOS_PER_BUCKET;
        self.ready != NONE
            || (self.cursor..=last)
                .any(|bucket| self.heads[(bucket % BUCKETS as u64) as usize] != NONE)
    }

    fn open_bucket(&mut self) {
        let head = (self.cursor % BUCKETS as u64) as usize;
        self.ready = std::mem::replace(&mut self.heads[head], NONE);
        let mut at = self.ready;
        while at != NONE {
            self.nodes[at as usize].place = TimerPlace::Ready;
            at = self.nodes[at as usize].next;
        }
        self.cursor += 1;
    }

    fn head(&mut self, place: TimerPlace) -> &mut u32 {
        match place {
            TimerPlace::Bucket(bucket) => &mut self.heads[usize::from(bucket)],
            TimerPlace::Ready | TimerPlace::Idle => &mut self.ready,
        }
    }

    fn link(&mut self, timer: u32, place: TimerPlace) {
        let head = std::mem::replace(self.head(place), timer);
        let node = &mut self.nodes[timer as usize];
        (node.place, node.prev, node.next) = (place, NONE, head);
        if head != NONE {
            self.nodes[head as usize].prev = timer;
        }
    }

    fn unlink(&mut self, timer: u32) {
        let TimerNode {
            next, prev, place, ..
        } = self.nodes[timer as usize];
        if place == TimerPlace::Idle {
            return;
        }
        if prev == NONE {
            *self.head(place) = next;
        } else {
            self.nodes[prev as usize].next = next;
        }
        if next != NONE {
            self.nodes[next as usize].prev = prev;
        }
        self.nodes[timer as usize].place = TimerPlace::Idle;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timer_fires_once_never_early_and_at_most_one_bucket_late() {
        let mut timers = Timers::new(4, Time::ZERO);
        timers.set(0, Time::from_micros(2_300));
        timers.set(1, Time::from_micros(2_000));
        timers.set(2, Time::from_millis(9_000));
        assert_eq!(timers.pop_due(Time::from_micros(1_999)), None);
        assert_eq!(timers.pop_due(Time::from_micros(2_100)), Some(1));
        assert_eq!(timers.pop_due(Time::from_micros(2_999)), None);
        assert_eq!(timers.pop_due(Time::from_micros(3_000)), Some(0));
        assert_eq!(timers.pop_due(Time::from_millis(8_999)), None);
        assert_eq!(timers.pop_due(Time::from_millis(9_000)), Some(2));
        assert_eq!(timers.pop_due(Time::from_millis(99_000)), None);
    }

    #[test]
    fn a_seeded_mix_of_sets_clears_and_jumps_agrees_with_a_plain_list() {
        const TIMERS: usize = 64;
        let mut random = 0x9E37_79B9_7F4A_7C15u64;
        let mut next = move |bound: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % bound
        };
        let (mut timers, mut plain) = (Timers::new(TIMERS, Time::ZERO), [Time::MAX; TIMERS]);
        let mut now = Time::ZERO;
        for _ in 0..20_000 {
            let timer = next(TIMERS as u64) as u32;
            let due = if next(8) == 0 {
                Time::MAX
            } else {
                now + std::time::Duration::from_micros(next(10_000_000))
            };
            timers.set(timer, due);
            plain[timer as usize] = due;
            now += std::time::Duration::from_micros(next(3_000));
            while let Some(fired) = timers.pop_due(now) {
                assert!(plain[fired as usize] <= now, "early or twice");
                plain[fired as usize] = Time::MAX;
            }
            let late = plain
                .iter()
                .filter(|due| {
                    **due != Time::MAX && **due + std::time::Duration::from_millis(1) <= now
                })
                .count();
            assert_eq!(late, 0, "missed");
        }
    }
}
