//! A seeded network in memory and in virtual time, with loss, duplication, reordering and delay,
//! and a log of what it did.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use throng::engine::{Io, PeerKey};
use throng::units::Time;

thread_local! {
    /// Whether the code under test is running. An allocation counter reads this.
    pub static UNDER_TEST: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Runs `work` with [`UNDER_TEST`] set to `on`.
pub fn under_test<R>(on: bool, work: impl FnOnce() -> R) -> R {
    let before = UNDER_TEST.replace(on);
    let result = work();
    UNDER_TEST.set(before);
    result
}

/// The SplitMix64 generator: small, and the same on every platform.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn chance(&mut self, share: f64) -> bool {
        ((self.next() >> 11) as f64 / (1u64 << 53) as f64) < share
    }

    pub fn up_to(&mut self, bound: Duration) -> Duration {
        Duration::from_nanos(self.next() % (bound.as_nanos() as u64 + 1))
    }
}

/// Effects of a link on datagrams.
#[derive(Clone, Copy, Debug, Default)]
pub struct Conditions {
    pub loss: f64,
    pub duplication: f64,
    pub delay: Duration,
    /// Random delay that is added to each datagram. A value above the spacing of datagrams reorders
    /// them.
    pub jitter: Duration,
}

/// Longest queue of a bottleneck. A datagram that meets a longer one is lost.
const QUEUE: Duration = Duration::from_millis(300);

/// A datagram on its way.
#[derive(Clone, Debug)]
pub struct Datagram {
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub bytes: Vec<u8>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkLog {
    pub sent: u64,
    pub lost: u64,
    pub duplicated: u64,
    pub delivered: u64,
}

/// One link between all addresses, in both directions.
pub struct Link {
    pub conditions: Conditions,
    /// Bits per second that pass to each address, with a queue of [`QUEUE`] before the bottleneck.
    /// Zero means no limit.
    pub rate: u64,
    pub log: LinkLog,
    random: Random,
    under_way: BTreeMap<(Time, u64), Datagram>,
    count: u64,
    /// Time at which the bottleneck before each address will have passed everything that waits
    /// there.
    free_at: BTreeMap<SocketAddr, Time>,
}

impl Link {
    pub fn new(conditions: Conditions, seed: u64) -> Link {
        Link {
            conditions,
            rate: 0,
            log: LinkLog::default(),
            random: Random(seed),
            under_way: BTreeMap::new(),
            count: 0,
            free_at: BTreeMap::new(),
        }
    }

    pub fn send(&mut self, datagram: Datagram, now: Time) {
        self.log.sent += 1;
        if self.random.chance(self.conditions.loss) {
            self.log.lost += 1;
            return;
        }
        if self.random.chance(self.conditions.duplication) {
            self.log.duplicated += 1;
            self.enqueue(datagram.clone(), now);
        }
        self.enqueue(datagram, now);
    }

    fn enqueue(&mut self, datagram: Datagram, now: Time) {
        let Some(now) = self.pass_bottleneck(&datagram, now) else {
            self.log.lost += 1;
            return;
        };
        let at = now + self.conditions.delay + self.random.up_to(self.conditions.jitter);
        self.count += 1;
        self.under_way.insert((at, self.count), datagram);
    }

    /// Returns the time at which the datagram has passed; `None` if the queue is full.
    fn pass_bottleneck(&mut self, datagram: &Datagram, now: Time) -> Option<Time> {
        let Some(nanos) = (datagram.bytes.len() as u64 * 8_000_000_000).checked_div(self.rate)
        else {
            return Some(now);
        };
        let free_at = self.free_at.entry(datagram.to).or_insert(now);
        let begin = now.max(*free_at);
        if begin.since(now) > QUEUE {
            return None;
        }
        *free_at = begin + Duration::from_nanos(nanos);
        Some(*free_at)
    }

    /// Returns the next datagram that has arrived by `now`.
    pub fn poll(&mut self, now: Time) -> Option<(Time, Datagram)> {
        let entry = self
            .under_way
            .first_entry()
            .filter(|entry| entry.key().0 <= now)?;
        self.log.delivered += 1;
        let ((at, _), datagram) = entry.remove_entry();
        Some((at, datagram))
    }

    /// Number of datagrams that have neither arrived nor been lost yet.
    pub fn under_way(&self) -> u64 {
        self.under_way.len() as u64
    }

    pub fn next_at(&self) -> Time {
        self.under_way
            .first_key_value()
            .map_or(Time::MAX, |((at, _), _)| *at)
    }
}

/// A shard's outlet. It collects the datagrams that the shard sends. The key that sends one
/// determines its source address.
pub struct Outlet {
    pub addresses: Vec<SocketAddr>,
    pub sent: Vec<Datagram>,
    buffer: Vec<u8>,
}

impl Outlet {
    pub fn new(addresses: Vec<SocketAddr>) -> Outlet {
        Outlet {
            addresses,
            sent: Vec::new(),
            buffer: vec![0; throng::net::SEND_BYTES_MAX],
        }
    }
}

impl Io for Outlet {
    fn lend(&mut self) -> &mut [u8] {
        &mut self.buffer
    }

    fn send(&mut self, key: PeerKey, to: SocketAddr, len: usize, segment: usize) {
        under_test(false, || {
            for bytes in self.buffer[..len].chunks(segment) {
                self.sent.push(Datagram {
                    from: self.addresses[key.0],
                    to,
                    bytes: bytes.to_vec(),
                });
            }
        });
    }

    fn nominate(&mut self, _key: PeerKey, _to: throng::path::FarEnd) {}
}
