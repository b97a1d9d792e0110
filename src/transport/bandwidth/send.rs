//! Sender-side estimate of the path's capacity, from transport-wide feedback: the lower of the
//! delay-based and the loss-based estimate, and probes for more.
//!
//! It simplifies libwebrtc's sender in two places. Loss counts by libwebrtc's first rule: grow
//! below 2 %, reduce by half of the lost share above 10 %. A sender that lacks a layer is treated
//! as application-limited, so it probes regularly.

use std::collections::VecDeque;
use std::time::Duration;

use super::delay::{DelayTrend, Usage};
use super::rate::{AimdRateControl, RateWindow};
use crate::units::{Bitrate, Time};

/// First estimate, as in libwebrtc.
pub const START: Bitrate = Bitrate::from_bps(300_000);
/// Window of the received rate, by the receiver's clock.
const RATE_WINDOW: Duration = Duration::from_millis(500);

/// Number of packets below which loss is not judged.
const LOSS_PACKETS_MIN: u32 = 20;
const LOSS_LOW: f64 = 0.02;
const LOSS_HIGH: f64 = 0.10;
/// Time between two reductions for loss, added to a round trip.
const LOSS_PAUSE: Duration = Duration::from_millis(300);
/// Growth factor per second without loss.
const LOSS_GROWTH: f64 = 1.08;
/// Time at the start in which the delay-based estimate takes effect at once.
const START_PHASE: Duration = Duration::from_secs(2);

/// First probes, as multiples of the first estimate.
const FIRST_PROBES: [u64; 2] = [3, 6];
/// A probe that measured this share of its own rate is followed by one of twice the measured rate.
const FOLLOW_SHARE: f64 = 0.7;
/// A sender that has less than it wants probes this often if no other probe is planned.
const PROBE_INTERVAL: Duration = Duration::from_secs(5);
/// Rate of such a probe, as a multiple of the estimate.
const PROBE_FACTOR: u64 = 2;
/// Minimum length of a probe, in packets and in time.
const PROBE_PACKETS_MIN: u32 = 5;
const PROBE_TIME_MIN: Duration = Duration::from_millis(15);
/// Packet size assumed when the packets of a probe are counted.
const PROBE_PACKET_BYTES: u64 = 1_100;
/// Share of a probe's packets that must be reported.
const PROBE_SHARE_MIN: f64 = 0.8;
/// Time to wait for feedback about a probe. After this it is not expected any more.
const PROBE_PATIENCE: Duration = Duration::from_secs(1);
/// Limit of the received rate, as a multiple of the sent rate. Above it the packets were held up
/// and arrived at once.
const PROBE_RATIO_MAX: f64 = 2.0;
/// A probe that arrived at less than this share of its sent rate has reached the limit. The
/// estimate is then set a little below the received rate.
const PROBE_SATURATED: f64 = 0.9;
const PROBE_SATURATED_USE: f64 = 0.95;

/// Plan of a probe: a number of packets at a rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbePlan {
    /// Cluster number. It is never 0, because 0 marks packets that belong to no probe.
    pub cluster: u8,
    pub bitrate: Bitrate,
    pub packets: u32,
}

/// Packet that a feedback message acknowledges.
#[derive(Clone, Copy, Debug)]
pub struct Acknowledged {
    pub sent_at: Time,
    /// Arrival time by the receiver's clock.
    pub arrival: Time,
    pub bytes: usize,
    /// Cluster number of its probe, or 0.
    pub cluster: u8,
}

/// Send estimate of one connection.
#[derive(Debug)]
pub struct SendEstimator {
    delay: DelayTrend,
    acknowledged: RateWindow,
    newest_arrival: Time,
    control: AimdRateControl,
    loss: RecentLoss,
    target: f64,
    /// Limit set by the receiver.
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

    /// Takes one packet that a feedback message reports as received, in the message's order.
    pub fn handle_acknowledged(&mut self, packet: &Acknowledged) {
        self.newest_arrival = self.newest_arrival.max(packet.arrival);
        self.acknowledged.add(packet.bytes, packet.arrival);
        self.delay.handle_packet(packet.sent_at, packet.arrival);
        self.prober.handle_acknowledged(packet);
    }

    /// Ends a feedback message about `packets` packets, of which `lost` did not arrive.
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

    /// Returns a probe to send now, for a sender that wants the rate `wants`.
    pub fn poll_probe(&mut self, wants: Bitrate, now: Time) -> Option<ProbePlan> {
        let usable = self.delay.usage() != Usage::Over && self.started_at.is_some();
        self.prober.poll(self.estimate(), wants, usable, now)
    }
}

/// Recent loss, and the estimate that follows from it.
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

/// Decides when to probe, and evaluates probes.
#[derive(Debug, Default)]
struct RateProber {
    /// Rates to try, one after the other.
    planned: VecDeque<Bitrate>,
    begun: bool,
    cluster: u8,
    current: Option<Cluster>,
    probed_at: Option<Time>,
    reduced_at: Option<Time>,
}

/// Probe in progress.
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
            // Too few of the probe's packets were reported in time.
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
        // Cluster 0 means no probe, so the counter skips it.
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

    /// Returns the rate that the probe measured, in bits per second, once enough of it has been
    /// reported.
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
        // The send interval does not include the last packet's own duration. The arrival interval
        // does not include that of the first packet.
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

    /// Sender with an estimator over a bottleneck with a queue of 300 ms and feedback every 100 ms.
    /// It sends at `rate(estimate)`, plus its probes.
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
        // The sender has layers of 150, 500 and 1,700 kbit/s.
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
