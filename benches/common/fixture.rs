//! Connections of one stack, each to a [`Remote`] of ours, in memory and in virtual time; and the
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
/// Packets between two readings of the thread's CPU clock, each of another connection: what a
/// reading costs (a system call, a third of a microsecond), and the first packets for which nothing
/// was fetched ahead, is then little of each. More would not stay in the first-level cache, as what
/// the kernel has just copied does.
pub const BATCH: usize = 16;
/// Far beyond what any stack here takes to connect, in virtual time.
const PATIENCE: Time = Time::from_millis(20_000);

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Receives,
    Sends,
}

/// What is timed beside the packets themselves.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Control {
    Nothing,
    /// What is due as the publisher's time goes by: reports, consent.
    Timers,
    /// And transport-wide feedback, agreed on: packets carry its numbers, and messages tell of
    /// them.
    TransportCc,
}

/// What a connection of a bench is for: one track, one way.
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

    /// The header extension that packets carry.
    pub fn transport_cc_extension(self) -> Option<u8> {
        (self.control == Control::TransportCc).then_some(TRANSPORT_CC)
    }
}

/// A sealed packet that has come for connection `key`.
#[derive(Default)]
pub struct Sealed {
    pub key: usize,
    pub bytes: Vec<u8>,
}

/// A WebRTC stack under test: many connections on one thread, as a load generator has them. It is
/// ICE-controlling and the DTLS client.
pub trait Stack {
    const NAME: &'static str;

    fn new(connections: usize, setting: Setting, config: &ShardConfig) -> Self;

    /// Makes connection `key` to `remote`; says what that one has to know.
    fn add(&mut self, key: usize, remote: &Side, now: Time) -> Side;

    /// A STUN or DTLS datagram.
    fn handle_setup(&mut self, key: usize, datagram: &[u8], from: &Side, now: Time);

    /// Does what is due.
    fn turn(&mut self, now: Time);

    fn is_connected(&self, key: usize) -> bool;

    /// Set-up datagrams that have been sent since the last call.
    fn take_sent(&mut self) -> Vec<(usize, Vec<u8>)>;

    /// Handles media up to where an application would have it.
    fn receive(&mut self, batch: &mut [Sealed], now: Time);

    /// Media packets that the stack has accepted so far.
    fn received(&self) -> u64;

    /// RTCP datagrams that it has sent so far.
    fn rtcp_sent(&self) -> u64;

    /// Begins to send, where sending goes by a timer.
    fn start_sending(&mut self, now: Time);

    /// Sends one packet or more; `payload` is what stacks without media of their own send.
    fn send(&mut self, origin: &mut Origin) -> Duration;

    /// Media packets that have been handed to the network so far.
    fn sent(&self) -> u64;
}

/// What connecting took of the stack under test: of the other end nothing is in it.
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

    /// Time that so many milliseconds without media take of all connections together: consent,
    /// reports, timers.
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

    /// Time to receive so many packets, each of the next connection.
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

    /// Time to send so many packets.
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

/// A function of its own, by whose name callgrind knows when to count.
#[inline(never)]
fn measured_receive<S: Stack>(stack: &mut S, batch: &mut [Sealed], at: Time) {
    let before = UNDER_TEST.replace(true);
    stack.receive(batch, at);
    UNDER_TEST.set(before);
}

/// As [`measured_receive`]; what it counts includes taking the next payload from the origin, where
/// a stack has no media of its own.
#[inline(never)]
fn measured_send<S: Stack>(stack: &mut S, origin: &mut Origin) -> Duration {
    stack.send(origin)
}

/// Runs the stack's own work, timed and with its allocations counted.
fn metered<R>(setup: &mut SetupCost, work: impl FnOnce() -> R) -> R {
    let started = cpu_clock();
    let result = under_test(true, work);
    setup.spent += cpu_clock() - started;
    result
}

/// A millisecond passes.
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
