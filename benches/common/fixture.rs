//! Connections of one stack, each to a [`Remote`] of ours, in memory and in virtual time, and the
//! two loops that are timed.

use std::time::Duration;

use throng::engine::ShardConfig;
use throng::measure::Kind;
use throng::transport::rtp::{Datagram, classify};
use throng::units::Time;

use super::origin::{Origin, shard_config};
use super::remote::{Remote, Side, address};
use super::{TRANSPORT_CC, cpu_clock};
use crate::link::{UNDER_TEST, under_test};

const TICK: Duration = Duration::from_millis(1);
/// Number of packets between two readings of the thread's CPU clock, each packet of another
/// connection. With so many, two costs are a small part of each packet's: the reading (a system
/// call, a third of a microsecond), and the first packets, for which nothing was prefetched. More
/// packets would not stay in the first-level cache, while data that the kernel has just copied
/// does.
pub const BATCH: usize = 16;
/// Limit for connecting, in virtual time. It is far beyond what any stack here needs.
const PATIENCE: Time = Time::from_millis(20_000);

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Receives,
    Sends,
}

/// Control work that is timed besides the packets themselves.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Control {
    Nothing,
    /// Timers that become due as the publisher's time passes: reports, consent.
    Timers,
    /// Timers and negotiated transport-wide feedback: packets carry its sequence numbers, and
    /// feedback messages report them.
    TransportCc,
}

/// Purpose of a bench's connections: one track, one way.
#[derive(Clone, Copy)]
pub struct Setting {
    pub role: Role,
    pub kind: Kind,
    pub control: Control,
}

impl Setting {
    pub const fn media_only(role: Role, kind: Kind) -> Setting {
        Setting {
            role,
            kind,
            control: Control::Nothing,
        }
    }

    /// Returns the id of the header extension that packets carry.
    pub fn transport_cc_extension(self) -> Option<u8> {
        (self.control == Control::TransportCc).then_some(TRANSPORT_CC)
    }
}

/// A sealed packet that has arrived for connection `key`.
#[derive(Default)]
pub struct Sealed {
    pub key: usize,
    pub bytes: Vec<u8>,
}

/// A WebRTC stack under test: many connections on one thread, as in a load generator. The stack is
/// ICE-controlling and the DTLS client.
pub trait Stack {
    const NAME: &'static str;

    fn new(connections: usize, setting: Setting, config: &ShardConfig) -> Self;

    /// Makes connection `key` to `remote`. Returns what the remote end must know of this one.
    fn add(&mut self, key: usize, remote: &Side, now: Time) -> Side;

    /// Handles a STUN or DTLS datagram.
    fn handle_setup(&mut self, key: usize, datagram: &[u8], from: &Side, now: Time);

    /// Handles the timers that are due.
    fn turn(&mut self, now: Time);

    fn is_connected(&self, key: usize) -> bool;

    /// Returns the set-up datagrams that the stack has sent since the last call.
    fn take_sent(&mut self) -> Vec<(usize, Vec<u8>)>;

    /// Handles media packets up to the point where an application would get them.
    fn receive(&mut self, batch: &mut [Sealed], now: Time);

    /// Returns the number of media packets that the stack has accepted so far.
    fn received(&self) -> u64;

    /// Returns the number of RTCP datagrams that the stack has sent so far.
    fn rtcp_sent(&self) -> u64;

    /// Starts sending, for stacks that send by a timer.
    fn start_sending(&mut self, now: Time);

    /// Sends at least one packet, and returns the CPU time that it took. Stacks without media of
    /// their own take the payload from `origin`.
    fn send(&mut self, origin: &mut Origin) -> Duration;

    /// Returns the number of media packets that the stack has handed to the network so far.
    fn sent(&self) -> u64;
}

/// CPU time that connecting took in the stack under test. The other end's time is not included.
#[derive(Clone, Copy, Default)]
pub struct SetupCost {
    pub spent: Duration,
}

pub struct Fixture<S> {
    pub stack: S,
    pub setup: SetupCost,
    pub remotes: Vec<Remote>,
    pub origin: Origin,
    setting: Setting,
    now: Time,
    batch: Vec<Sealed>,
    next: usize,
    plain: Option<super::origin::Plain>,
}

impl<S: Stack> Fixture<S> {
    pub fn connected(connections: usize, setting: Setting) -> Fixture<S> {
        let config = shard_config(connections);
        let mut now = Time::ZERO;
        let mut setup = SetupCost::default();
        let mut stack = S::new(connections, setting, &config);
        let mut remotes: Vec<Remote> = Vec::new();
        for key in 0..connections {
            let side = Remote::side(key, &config);
            let theirs = metered(&mut setup, || stack.add(key, &side, now));
            remotes.push(Remote::new(side, &theirs, &config, now));
        }
        while !(0..connections).all(|key| stack.is_connected(key) && remotes[key].connected) {
            assert!(now < PATIENCE, "{} does not connect", S::NAME);
            now += TICK;
            step(&mut stack, &mut remotes, &mut setup, now);
        }
        step(&mut stack, &mut remotes, &mut setup, now);
        if setting.role == Role::Sends {
            metered(&mut setup, || stack.start_sending(now));
        }
        Fixture {
            stack,
            setup,
            remotes,
            origin: Origin::publishing(
                setting.kind,
                setting.transport_cc_extension(),
                connections,
                &config,
                now,
            ),
            setting,
            now,
            batch: (0..BATCH).map(|_| Sealed::default()).collect(),
            next: 0,
            plain: None,
        }
    }

    /// Returns the time that all connections together take for so many milliseconds without media:
    /// consent, reports, timers.
    pub fn idle(&mut self, milliseconds: u64) -> Duration {
        let before = self.setup.spent;
        for _ in 0..milliseconds {
            self.now += TICK;
            step(
                &mut self.stack,
                &mut self.remotes,
                &mut self.setup,
                self.now,
            );
        }
        assert!(
            (0..self.remotes.len()).all(|key| self.stack.is_connected(key)),
            "{} has hung up",
            S::NAME
        );
        self.setup.spent - before
    }

    fn idle_until(&mut self, at: Time) -> Duration {
        let milliseconds = at.since(self.now).as_nanos() / TICK.as_nanos();
        self.idle(milliseconds as u64)
    }

    /// Returns the time to receive so many packets. The connections take turns, one packet each.
    pub fn receive(&mut self, packets: u64) -> Duration {
        let (mut left, mut spent, before) = (packets, Duration::ZERO, self.stack.received());
        while left > 0 {
            let count = left.min(BATCH as u64) as usize;
            let at = (0..count)
                .map(|place| self.seal_next(place))
                .last()
                .unwrap_or(self.origin.now);
            if self.setting.control != Control::Nothing {
                spent += self.idle_until(at);
            }
            let started = cpu_clock();
            measured_receive(&mut self.stack, &mut self.batch[..count], at);
            spent += cpu_clock() - started;
            left -= count as u64;
        }
        assert_eq!(
            self.stack.received() - before,
            packets,
            "{} has refused some",
            S::NAME
        );
        spent
    }

    fn seal_next(&mut self, place: usize) -> Time {
        if self.next == 0 {
            self.plain = None;
        }
        let plain = self.plain.get_or_insert_with(|| self.origin.next());
        self.batch[place].key = self.next;
        self.remotes[self.next].seal(plain, &mut self.batch[place].bytes);
        self.next = (self.next + 1) % self.remotes.len();
        plain.at
    }

    /// Returns the time to send so many packets.
    pub fn send(&mut self, packets: u64) -> Duration {
        let (before, mut spent) = (self.stack.sent(), Duration::ZERO);
        let sent = loop {
            spent += measured_send(&mut self.stack, &mut self.origin);
            let sent = self.stack.sent() - before;
            if sent >= packets {
                break sent;
            }
        };
        spent.mul_f64(packets as f64 / sent as f64)
    }
}

/// Separate function, because callgrind starts and stops counting by its name.
#[inline(never)]
fn measured_receive<S: Stack>(stack: &mut S, batch: &mut [Sealed], at: Time) {
    let before = UNDER_TEST.replace(true);
    stack.receive(batch, at);
    UNDER_TEST.set(before);
}

/// As [`measured_receive`]. For a stack without media of its own, the count includes taking the
/// next payload from the origin.
#[inline(never)]
fn measured_send<S: Stack>(stack: &mut S, origin: &mut Origin) -> Duration {
    stack.send(origin)
}

/// Runs the stack's own work. The work is timed and its allocations are counted.
fn metered<R>(setup: &mut SetupCost, work: impl FnOnce() -> R) -> R {
    let started = cpu_clock();
    let result = under_test(true, work);
    setup.spent += cpu_clock() - started;
    result
}

/// Runs one step of virtual time: carries the set-up datagrams both ways and handles timers.
fn step<S: Stack>(stack: &mut S, remotes: &mut [Remote], setup: &mut SetupCost, now: Time) {
    for (key, datagram) in stack.take_sent() {
        assert!(matches!(
            classify(&datagram),
            Datagram::Stun | Datagram::Dtls | Datagram::Rtcp
        ));
        remotes[key].handle_setup(&datagram, address(1, key), now);
    }
    for (key, remote) in remotes.iter_mut().enumerate() {
        let mut back = Vec::new();
        remote.turn(now, |datagram| back.push(datagram.to_vec()));
        for datagram in back {
            metered(setup, || {
                stack.handle_setup(key, &datagram, &remote.side, now)
            });
        }
    }
    metered(setup, || stack.turn(now));
}
