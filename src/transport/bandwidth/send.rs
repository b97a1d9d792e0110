//! A sender's estimate of what its path carries, from transport-wide feedback: the lower of what
//! delay and what loss allow, and probes that look for more.
//!
//! Where libwebrtc's sender is simplified, it says so here: loss counts by its first rule (below 2
//! % grow, above 10 % halve by the share that was lost), and a sender that lacks a layer is taken
//! for one that is limited by what it has to send, so that it probes regularly.

use std::collections::VecDeque;
use std::time::Duration;

use super::delay::{DelayTrend, Usage};
use super::rate::{AimdRateControl, RateWindow};
use crate::units::{Bitrate, Time};

/// libwebrtc's first guess.
pub const START: Bitrate = Bitrate::from_bps(300_000);
/// What arrives, by the receiver's clock, is that of this time.
const RATE_WINDOW: Duration = Duration::from_millis(500);

/// Feedback of fewer packets says nothing of loss.
const LOSS_PACKETS_MIN: u32 = 20;
const LOSS_LOW: f64 = 0.02;
const LOSS_HIGH: f64 = 0.10;
/// Between two steps down for loss, beside a round trip.
const LOSS_PAUSE: Duration = Duration::from_millis(300);
/// Growth within a second without loss.
const LOSS_GROWTH: f64 = 1.08;
/// So long in the beginning, what delay allows holds at once.
const START_PHASE: Duration = Duration::from_secs(2);

/// The first probes, as multiples of the first guess.
const FIRST_PROBES: [u64; 2] = [3, 6];
/// One that saw this share of its own rate is followed by one of twice what it saw.
const FOLLOW_SHARE: f64 = 0.7;
/// Without one of those, a sender that has less than it wants probes this often ..
const PROBE_INTERVAL: Duration = Duration::from_secs(5);
/// .. for this multiple of what it has.
const PROBE_FACTOR: u64 = 2;
/// A probe's length: at least so many packets, and so much time.
const PROBE_PACKETS_MIN: u32 = 5;
const PROBE_TIME_MIN: Duration = Duration::from_millis(15);
/// What a packet of a probe is taken for when they are counted.
const PROBE_PACKET_BYTES: u64 = 1_100;
/// Packets of a probe that have to be reported.
const PROBE_SHARE_MIN: f64 = 0.8;
/// Feedback about a probe that has not come by then never will.
const PROBE_PATIENCE: Duration = Duration::from_secs(1);
/// Above this multiple of what was sent, arrivals were held up and came at once.
const PROBE_RATIO_MAX: f64 = 2.0;
/// A probe that arrived slower than this share of its rate has met the limit, which is a little
/// below.
const PROBE_SATURATED: f64 = 0.9;
const PROBE_SATURATED_USE: f64 = 0.95;

/// What a probe is to be: so many packets, at this rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbePlan {
    /// Never 0: packets that belong to no probe have that.
    pub cluster: u8,
    pub bitrate: Bitrate,
    pub packets: u32,
}

/// A packet that feedback is about.
#[derive(Clone, Copy, Debug)]
pub struct Acknowledged {
    pub sent_at: Time,
    /// By the receiver's clock.
    pub arrival: Time,
    pub bytes: usize,
    /// The probe that it was part of, or 0.
    pub cluster: u8,
}

/// The estimate of one connection.
#[derive(Debug)]
pub struct SendEstimator {
    delay: DelayTrend,
    acknowledged: RateWindow,
    newest_arrival: Time,
    control: AimdRateControl,
    loss: RecentLoss,
    target: f64,
    /// What the receiver allows.
    remb: Option<Bitrate>,
    started_at: Option<Time>,
    prober: RateProber,
    rtt: Duration,
}

impl Default for SendEstimator {
    fn default() -> SendEstimator {
        SendEstimator {
            delay: DelayTrend::default(),
            acknowledged: RateWindow::new(RATE_WINDOW),
            newest_arrival: Time::ZERO,
            control: AimdRateControl::new(Some(START)),
            loss: RecentLoss::default(),
            target: START.bps() as f64,
            remb: None,
            started_at: None,
            prober: RateProber::default(),
            rtt: Duration::from_millis(200),
        }
    }
}

impl SendEstimator {
    pub fn estimate(&self) -> Bitrate {
        Bitrate::from_bps(self.target as u64)
    }

    pub fn set_rtt(&mut self, rtt: Duration) {
        self.rtt = rtt;
        self.control.set_rtt(rtt);
    }

    pub fn handle_remb(&mut self, bitrate: Bitrate) {
        self.remb = Some(bitrate);
        self.target = self.target.min(bitrate.bps() as f64);
    }

    /// One packet that a message of feedback says arrived, in the message's order.
    pub fn handle_acknowledged(&mut self, packet: &Acknowledged) {
        self.newest_arrival = self.newest_arrival.max(packet.arrival);
        self.acknowledged.add(packet.bytes, packet.arrival);
        self.delay.handle_packet(packet.sent_at, packet.arrival);
        self.prober.handle_acknowledged(packet);
    }

    /// The end of a message of feedback about `packets`, of which `lost` did not arrive.
    pub fn handle_feedback(&mut self, packets: u32, lost: u32, now: Time) {
        let started_at = *self.started_at.get_or_insert(now);
        let throughput = self.acknowledged.rate(self.newest_arrival);
        let usage = self.delay.usage();
        let probed = self.prober.take_result();
        if usage == Usage::Over {
            if throughput.is_some_and(|throughput| self.control.may_reduce(throughput, now)) {
                self.control.update(usage, throughput, now);
                self.prober.reduced_at = Some(now);
            }
        } else if let Some(probed) = probed.filter(|probed| *probed > self.target) {
            self.control
                .set_estimate(Bitrate::from_bps(probed as u64), now);
            self.target = probed;
        } else {
            self.control.update(usage, throughput, now);
        }
        let starting = now.since(started_at) < START_PHASE;
        self.target = self
            .loss
            .update(self.target, packets, lost, starting, self.rtt, now);
        let by_delay = self
            .control
            .estimate()
            .map_or(f64::INFINITY, |estimate| estimate.bps() as f64);
        if starting && !self.loss.was_high {
            self.target = self.target.max(by_delay);
        }
        let allowed = self.remb.map_or(f64::INFINITY, |remb| remb.bps() as f64);
        self.target = self.target.min(by_delay).min(allowed);
    }

    /// A probe to send now, for one that `wants` so much.
    pub fn poll_probe(&mut self, wants: Bitrate, now: Time) -> Option<ProbePlan> {
        let usable = self.delay.usage() != Usage::Over && self.started_at.is_some();
        self.prober.poll(self.estimate(), wants, usable, now)
    }
}

/// The loss of late, and what follows from it.
#[derive(Debug, Default)]
struct RecentLoss {
    packets: u32,
    lost: u32,
    was_high: bool,
    grown_at: Option<Time>,
    reduced_at: Option<Time>,
}

impl RecentLoss {
    fn update(
        &mut self,
        target: f64,
        packets: u32,
        lost: u32,
        starting: bool,
        rtt: Duration,
        now: Time,
    ) -> f64 {
        self.packets += packets;
        self.lost += lost;
        if self.packets < LOSS_PACKETS_MIN {
            return target;
        }
        let share = f64::from(self.lost) / f64::from(self.packets);
        (self.packets, self.lost) = (0, 0);
        let elapsed = self
            .grown_at
            .replace(now)
            .map_or(Duration::ZERO, |at| now.since(at));
        self.was_high = share > LOSS_HIGH;
        if share <= LOSS_LOW && !starting {
            return target * LOSS_GROWTH.powf(elapsed.as_secs_f64().min(1.0));
        }
        let waited = self
            .reduced_at
            .is_none_or(|at| now.since(at) >= LOSS_PAUSE + rtt);
        if self.was_high && waited {
            self.reduced_at = Some(now);
            return target * (1.0 - 0.5 * share);
        }
        target
    }
}

/// When to probe, and what came of it.
#[derive(Debug, Default)]
struct RateProber {
    /// Rates to try one after the other.
    planned: VecDeque<Bitrate>,
    begun: bool,
    cluster: u8,
    current: Option<Cluster>,
    probed_at: Option<Time>,
    reduced_at: Option<Time>,
}

/// A probe that is under way.
#[derive(Clone, Copy, Debug)]
struct Cluster {
    plan: ProbePlan,
    begun_at: Time,
    arrived: u32,
    bytes: usize,
    first_sent: (Time, usize),
    last_sent: (Time, usize),
    first_arrival: (Time, usize),
    last_arrival: Time,
}

impl RateProber {
    fn poll(
        &mut self,
        estimate: Bitrate,
        wants: Bitrate,
        usable: bool,
        now: Time,
    ) -> Option<ProbePlan> {
        if let Some(cluster) = self.current {
            if now.since(cluster.begun_at) < PROBE_PATIENCE {
                return None;
            }
            // Too little of it was seen.
            self.current = None;
            self.planned.clear();
        }
        if !usable || estimate >= wants {
            self.planned.clear();
            return None;
        }
        if !std::mem::replace(&mut self.begun, true) {
            self.planned
                .extend(FIRST_PROBES.map(|multiple| Bitrate::from_bps(START.bps() * multiple)));
        }
        let quiet = |at: Option<Time>| at.is_none_or(|at| now.since(at) >= PROBE_INTERVAL);
        if self.planned.is_empty() && quiet(self.probed_at) && quiet(self.reduced_at) {
            self.planned
                .push_back(Bitrate::from_bps(estimate.bps() * PROBE_FACTOR));
        }
        let bitrate = self.planned.pop_front()?.min(wants);
        let bytes = bitrate.bps() as f64 / 8.0 * PROBE_TIME_MIN.as_secs_f64();
        // A cluster of 0 is none.
        self.cluster = self.cluster % u8::MAX + 1;
        let plan = ProbePlan {
            cluster: self.cluster,
            bitrate,
            packets: ((bytes / PROBE_PACKET_BYTES as f64).ceil() as u32 + 1).max(PROBE_PACKETS_MIN),
        };
        self.probed_at = Some(now);
        self.current = Some(Cluster {
            plan,
            begun_at: now,
            arrived: 0,
            bytes: 0,
            first_sent: (Time::MAX, 0),
            last_sent: (Time::ZERO, 0),
            first_arrival: (Time::MAX, 0),
            last_arrival: Time::ZERO,
        });
        Some(plan)
    }

    fn handle_acknowledged(&mut self, packet: &Acknowledged) {
        let Some(cluster) = self
            .current
            .as_mut()
            .filter(|cluster| cluster.plan.cluster == packet.cluster)
        else {
            return;
        };
        cluster.arrived += 1;
        cluster.bytes += packet.bytes;
        if packet.sent_at < cluster.first_sent.0 {
            cluster.first_sent = (packet.sent_at, packet.bytes);
        }
        if packet.sent_at >= cluster.last_sent.0 {
            cluster.last_sent = (packet.sent_at, packet.bytes);
        }
        if packet.arrival < cluster.first_arrival.0 {
            cluster.first_arrival = (packet.arrival, packet.bytes);
        }
        cluster.last_arrival = cluster.last_arrival.max(packet.arrival);
    }

    /// What the probe saw, in bits per second, when enough of it has been reported.
    fn take_result(&mut self) -> Option<f64> {
        let cluster = self.current?;
        if f64::from(cluster.arrived) < f64::from(cluster.plan.packets) * PROBE_SHARE_MIN {
            return None;
        }
        self.current = None;
        let seen = cluster.seen();
        let planned = cluster.plan.bitrate;
        if let Some(seen) = seen.filter(|seen| *seen >= planned.bps() as f64 * FOLLOW_SHARE) {
            if self.planned.is_empty() {
                self.planned
                    .push_back(Bitrate::from_bps(seen as u64 * PROBE_FACTOR));
            }
        } else {
            self.planned.clear();
        }
        seen
    }
}

impl Cluster {
    fn seen(&self) -> Option<f64> {
        let rate = |bytes: usize, from: Time, to: Time| {
            let seconds = to.since(from).as_secs_f64();
            (seconds > 0.0).then(|| bytes as f64 * 8.0 / seconds)
        };
        // The interval of what was sent leaves out the last packet's own time; that of what
        // arrived, the first one's.
        let sent = rate(
            self.bytes - self.last_sent.1,
            self.first_sent.0,
            self.last_sent.0,
        )?;
        let arrived = rate(
            self.bytes - self.first_arrival.1,
            self.first_arrival.0,
            self.last_arrival,
        )?;
        if arrived / sent > PROBE_RATIO_MAX {
            return None;
        }
        let saturated = arrived < sent * PROBE_SATURATED;
        Some(if saturated {
            arrived * PROBE_SATURATED_USE
        } else {
            arrived.min(sent)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sender with an estimator over a bottleneck with a queue of 300 ms, feedback each 100 ms:
    /// it sends `rate(estimate)` and its probes.
    struct BottleneckLink {
        estimator: SendEstimator,
        now_ms: u64,
        free_at_us: u64,
        credit: f64,
        under_way: VecDeque<(Time, Option<Acknowledged>)>,
        probe: Option<(ProbePlan, u32, f64)>,
        probes: Vec<(u64, u64)>,
        loss_percent: u64,
        random: crate::seeded::Seeded,
    }

    impl BottleneckLink {
        fn new() -> BottleneckLink {
            BottleneckLink {
                estimator: SendEstimator::default(),
                now_ms: 0,
                free_at_us: 0,
                credit: 0.0,
                under_way: VecDeque::new(),
                probe: None,
                probes: Vec::new(),
                loss_percent: 0,
                random: crate::seeded::Seeded::new(1),
            }
        }

        fn send(&mut self, capacity_kbps: u64, bytes: usize, cluster: u8) {
            let start = self.free_at_us.max(self.now_ms * 1_000);
            let full = start - self.now_ms * 1_000 > 300_000;
            let sent_at = Time::from_millis(self.now_ms);
            if full || self.random.chance(self.loss_percent) {
                self.under_way
                    .push_back((sent_at + Duration::from_millis(50), None));
                return;
            }
            self.free_at_us = start + bytes as u64 * 8_000 / capacity_kbps;
            let arrival = Time::from_micros(self.free_at_us + 10_000);
            let packet = Acknowledged {
                sent_at,
                arrival: Time::from_micros((arrival.as_micros() / 250) * 250 + 3_600_000_000),
                bytes,
                cluster,
            };
            self.under_way
                .push_back((arrival + Duration::from_millis(10), Some(packet)));
        }

        fn run(
            &mut self,
            seconds: u64,
            capacity_kbps: u64,
            wants_kbps: u64,
            rate_kbps: impl Fn(u64) -> u64,
        ) {
            for _ in 0..seconds * 1_000 {
                self.credit += rate_kbps(self.estimator.estimate().bps() / 1_000) as f64;
                while self.credit >= 8_000.0 {
                    self.credit -= 8_000.0;
                    self.send(capacity_kbps, 1_000, 0);
                }
                let now = Time::from_millis(self.now_ms);
                if self.probe.is_none() {
                    let plan = self
                        .estimator
                        .poll_probe(Bitrate::from_bps(wants_kbps * 1_000), now);
                    self.probes
                        .extend(plan.map(|plan| (self.now_ms, plan.bitrate.bps() / 1_000)));
                    self.probe = plan.map(|plan| (plan, 0, 8_800.0));
                }
                if let Some((plan, mut sent, mut credit)) = self.probe.take() {
                    while credit >= 8_800.0 && sent < plan.packets {
                        credit -= 8_800.0;
                        sent += 1;
                        self.send(capacity_kbps, 1_100, plan.cluster);
                    }
                    let more = (plan, sent, credit + plan.bitrate.bps() as f64 / 1_000.0);
                    self.probe = Some(more).filter(|_| sent < plan.packets);
                }
                if self.now_ms.is_multiple_of(100) {
                    self.report(now);
                }
                self.now_ms += 1;
            }
        }

        fn report(&mut self, now: Time) {
            let (mut packets, mut lost) = (0, 0);
            while let Some((_, packet)) = self.under_way.pop_front_if(|(at, _)| *at <= now) {
                packets += 1;
                match packet {
                    Some(packet) => self.estimator.handle_acknowledged(&packet),
                    None => lost += 1,
                }
            }
            if packets > 0 {
                self.estimator.handle_feedback(packets, lost, now);
            }
        }

        fn kbps(&self) -> u64 {
            self.estimator.estimate().bps() / 1_000
        }
    }

    #[test]
    fn a_free_path_is_found_by_probes_within_two_seconds() {
        let mut link = BottleneckLink::new();
        link.run(2, 20_000, 3_000, |estimate| estimate.min(2_500));
        assert!(link.kbps() >= 2_500, "{} {:?}", link.kbps(), link.probes);
        assert_eq!(link.probes[0].1, 900, "three times the first guess");
        let count = link.probes.len();
        link.run(20, 20_000, 2_500, |_| 2_400);
        assert_eq!(
            link.probes.len(),
            count,
            "one that has what it wants probes no more"
        );
    }

    #[test]
    fn a_bottleneck_halts_the_estimate_below_it_and_its_queue_empties() {
        let mut link = BottleneckLink::new();
        link.run(10, 1_000, 3_000, |estimate| estimate.min(2_500));
        for _ in 0..20 {
            link.run(1, 1_000, 3_000, |estimate| estimate.min(2_500));
            assert!((400..1_300).contains(&link.kbps()), "{}", link.kbps());
        }
    }

    #[test]
    fn capacity_that_goes_is_noticed_within_two_seconds_and_one_that_comes_back_within_ten() {
        let mut link = BottleneckLink::new();
        // Layers of 150, 500 and 1,700 kbit/s.
        let layers = |estimate: u64| {
            if estimate >= 2_350 {
                2_350
            } else if estimate >= 650 {
                650
            } else {
                150
            }
        };
        link.run(10, 20_000, 2_820, layers);
        assert!(link.kbps() > 2_350, "{}", link.kbps());
        link.run(2, 1_000, 2_820, layers);
        assert!(link.kbps() < 1_200, "{}", link.kbps());
        link.run(15, 1_000, 2_820, layers);
        assert!(
            link.kbps() < 1_200,
            "probes show no more than there is: {} {:?}",
            link.kbps(),
            link.probes
        );
        link.run(10, 20_000, 2_820, layers);
        assert!(link.kbps() > 2_350, "{} {:?}", link.kbps(), link.probes);
    }

    #[test]
    fn loss_without_delay_halves_by_its_share_and_a_little_of_it_does_nothing() {
        for (percent, range) in [(1, 2_400..4_000), (30, 5..900)] {
            let mut link = BottleneckLink::new();
            link.run(5, 20_000, 2_500, |estimate| estimate.min(2_500));
            link.loss_percent = percent;
            link.run(10, 20_000, 100, |estimate| estimate.min(2_500));
            assert!(range.contains(&link.kbps()), "{percent} %: {}", link.kbps());
        }
    }

    #[test]
    fn what_the_receiver_allows_is_a_bound() {
        let mut link = BottleneckLink::new();
        link.run(5, 20_000, 2_500, |estimate| estimate.min(2_500));
        link.estimator.handle_remb(Bitrate::from_bps(500_000));
        link.run(5, 20_000, 2_500, |estimate| estimate.min(2_500));
        assert_eq!(link.kbps(), 500);
    }
}
