//! The readings of one node, and what was counted between two of them. No clock and no socket: each
//! reading comes in with its time.
//!
//! Counters are kept as the increase since the first reading. A counter that falls was reset (its
//! process was restarted), so its new value is the increase since the restart. The increase between
//! the last reading before the restart and the restart itself is lost: a second of it at most.

use std::time::{Duration, Instant};

use super::page::{Bracket, Buckets, Counter, Counters, Gauges, MetricsPage};

/// Largest distance between an end of a stretch and the reading within the stretch that stands for
/// that end.
const NEAR: Duration = Duration::from_secs(2);
/// Number of gaps that are listed. Bounded because a page may come and go any number of times.
const GAPS_MAX: usize = 100;
/// How far the start time of a process may move while it is still the same process. It is
/// calculated from clocks that may be adjusted meanwhile.
const START_STEADY_SECONDS: f64 = 1.5;

#[derive(Debug, Default)]
pub struct NodeBook {
    points: Vec<PageReading>,
    /// Latest known value of each figure. The next reading is compared with it.
    said: MetricsPage,
    /// The point up to which rows have been taken.
    row_from: usize,
    restarts: u32,
    failures: u64,
    gaps: Vec<UnreadSpan>,
    open: Option<(Instant, String)>,
}

#[derive(Clone, Debug)]
struct PageReading {
    at: Instant,
    counted: Counters,
    latency: Option<Buckets>,
    gauges: Gauges,
}

/// A time span without a reading.
#[derive(Clone, Debug, PartialEq)]
pub struct UnreadSpan {
    /// Time of the last reading before the span.
    pub from: Instant,
    /// Time of the first reading after the span; `None` if there was none.
    pub to: Option<Instant>,
    pub why: String,
}

/// Figures of one node for about a second, from the readings at its ends. `None` means unknown.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct NodeRow {
    pub cpu_cores: Option<f64>,
    pub resident_bytes: Option<u64>,
    pub participants: Option<f64>,
    pub packets_received_per_second: Option<f64>,
    pub packets_sent_per_second: Option<f64>,
    pub bytes_sent_per_second: Option<f64>,
    pub forward_latency_us_mean: Option<f64>,
}

/// Cost of a stretch of time for one node, or for several nodes together.
#[derive(Clone, Debug, PartialEq)]
pub struct Cost {
    pub seconds: f64,
    pub counted: Counters,
    pub latency: Option<Buckets>,
    /// Sum of the times that all participants spent on the node.
    pub participant_seconds: Option<f64>,
    pub participants_peak: Option<f64>,
    pub resident_bytes_peak: Option<f64>,
    /// Gauges at the end of the stretch.
    pub gauges: Gauges,
    /// Gauges of the node's first reading.
    pub before: Gauges,
    pub forwarding: Option<Forwarding>,
}

/// CPU time, and the traffic that was forwarded with it. LiveKit's counters lag, so this covers
/// only the part of the stretch for which the counters hold what was forwarded.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Forwarding {
    pub seconds: f64,
    pub cpu_seconds: f64,
    pub bits: f64,
    pub packets: f64,
}

impl NodeBook {
    pub fn note(&mut self, at: Instant, page: MetricsPage) {
        if let (Some(known), Some(node_id)) = (&self.said.node_id, &page.node_id)
            && known != node_id
        {
            let why = format!(
                "{node_id} answered instead of {known}: name each node's own page, not one that several share"
            );
            return self.note_failure(at, why);
        }
        let Some(last) = self.points.last() else {
            self.points.push(PageReading {
                at,
                counted: page.counters.map(|said| said.map(|_| 0.0)),
                latency: page
                    .forward_latency
                    .as_ref()
                    .and_then(|buckets| buckets.since(buckets)),
                gauges: page.gauges,
            });
            self.said = page;
            return;
        };
        let restarted = self.said.has_restarted(&page);
        let reading = PageReading {
            at,
            counted: last.counted_with(&self.said, &page, restarted),
            latency: last.latency_with(&self.said, &page, restarted),
            gauges: page.gauges,
        };
        if let Some((from, why)) = self.open.take() {
            self.keep_gap(UnreadSpan {
                from,
                to: Some(at),
                why,
            });
        }
        self.points.push(reading);
        self.restarts += u32::from(restarted);
        self.said = page.with_what_it_leaves_out(&self.said, restarted);
    }

    pub fn note_failure(&mut self, at: Instant, why: String) {
        self.failures += 1;
        let from = self.points.last().map_or(at, |point| point.at);
        self.open.get_or_insert((from, why));
    }

    /// Returns the figures since the last row; `None` if there was no reading since.
    pub fn row(&mut self) -> Option<NodeRow> {
        let to = self
            .points
            .len()
            .checked_sub(1)
            .filter(|to| *to > self.row_from)?;
        let cost = self.cost(self.row_from, to);
        self.row_from = to;
        let rate = |counter: Counter| cost.counted[counter].map(|count| count / cost.seconds);
        Some(NodeRow {
            cpu_cores: rate(Counter::CpuSeconds),
            resident_bytes: cost.gauges.resident_bytes.map(|bytes| bytes as u64),
            participants: cost.gauges.participants,
            packets_received_per_second: rate(Counter::PacketsReceived),
            packets_sent_per_second: rate(Counter::PacketsSent),
            bytes_sent_per_second: rate(Counter::BytesSent),
            forward_latency_us_mean: cost
                .latency
                .and_then(|came| came.mean())
                .map(|nanos| nanos / 1e3),
        })
    }

    /// Returns the cost of a stretch; `None` if the node was not read near its ends.
    pub fn between(&self, from: Instant, to: Instant) -> Option<Cost> {
        // Only readings within the stretch: one outside would include load from before or after it.
        let first = self.points.partition_point(|point| point.at < from);
        let last = self
            .points
            .partition_point(|point| point.at <= to)
            .checked_sub(1)?;
        let are_near =
            first < last && self.distance(first, from) <= NEAR && self.distance(last, to) <= NEAR;
        if !are_near {
            return None;
        }
        let mut cost = self.cost(first, last);
        cost.forwarding = self
            .settled(from, last)
            .and_then(|first| self.forwarding(first, last));
        Some(cost)
    }

    /// Returns the cost from the first reading to the last; `None` if the node could not be read at
    /// the end.
    pub fn whole(&self) -> Option<Cost> {
        let last = self
            .points
            .len()
            .checked_sub(1)
            .filter(|last| *last > 0 && self.open.is_none())?;
        let mut cost = self.cost(0, last);
        cost.forwarding = self.forwarding(0, last);
        Some(cost)
    }

    /// Whether the book holds all that was forwarded until `left`, the time when everybody had
    /// left. This is so when the node was read since then, or could not be read. If its counters
    /// lag, it must have been read twice since then, without a change of the media counters.
    pub fn is_complete(&self, left: Instant) -> bool {
        let since = self
            .points
            .iter()
            .rev()
            .take_while(|point| point.at > left)
            .count();
        if self.open.is_some() || self.lag().is_zero() {
            return since > 0 || self.open.is_some();
        }
        match &self.points[..] {
            [.., before, last] if since >= 2 => [
                Counter::PacketsReceived,
                Counter::PacketsSent,
                Counter::PacketsResent,
            ]
            .iter()
            .all(|counter| before.counted[*counter] == last.counted[*counter]),
            _ => false,
        }
    }

    /// Returns what was counted since the first reading. A counter that no reading contained is
    /// unknown.
    pub fn whole_counters(&self) -> Counters {
        self.points
            .last()
            .map(|point| point.counted)
            .unwrap_or_default()
    }

    /// How far the node's counters may lag.
    pub fn lag(&self) -> Duration {
        self.said.lag
    }

    pub fn node_id(&self) -> Option<&str> {
        self.said.node_id.as_deref()
    }

    pub fn readings(&self) -> usize {
        self.points.len()
    }

    pub fn failures(&self) -> u64 {
        self.failures
    }

    pub fn restarts(&self) -> u32 {
        self.restarts
    }

    /// Returns the first [`GAPS_MAX`] gaps, and the gap that is still open.
    pub fn gaps(&self) -> Vec<UnreadSpan> {
        let open = self.open.clone().map(|(from, why)| UnreadSpan {
            from,
            to: None,
            why,
        });
        self.gaps.iter().cloned().chain(open).collect()
    }

    fn keep_gap(&mut self, gap: UnreadSpan) {
        if self.gaps.len() < GAPS_MAX {
            self.gaps.push(gap);
        }
    }

    /// The reading nearest to `at`, if it is at most [`NEAR`] away.
    fn near(&self, at: Instant) -> Option<usize> {
        let behind = self.points.partition_point(|point| point.at < at);
        let around = [
            behind.checked_sub(1),
            Some(behind).filter(|index| *index < self.points.len()),
        ];
        let nearest = around
            .into_iter()
            .flatten()
            .min_by_key(|index| self.distance(*index, at));
        nearest.filter(|index| self.distance(*index, at) <= NEAR)
    }

    fn distance(&self, index: usize, at: Instant) -> Duration {
        let point = self.points[index].at;
        point.saturating_duration_since(at) + at.saturating_duration_since(point)
    }

    /// The reading at which to begin, so that what was counted from there until `last` was
    /// forwarded within the stretch. It lies after `from` by the lag of the counters, give or take
    /// a second. It lies a whole number of lags before `last`, because each counter moves once in
    /// that time.
    fn settled(&self, from: Instant, last: usize) -> Option<usize> {
        const GIVE_OR_TAKE: Duration = Duration::from_secs(1);
        let (lag, end) = (self.lag(), self.points[last].at);
        if lag.is_zero() {
            return Some(self.points.partition_point(|point| point.at < from));
        }
        let length = (end - from) + GIVE_OR_TAKE;
        let rounds = (length.as_nanos() / lag.as_nanos()) as u32;
        let begin = rounds.checked_sub(1).filter(|rounds| *rounds > 0)? * lag;
        self.near(end.checked_sub(begin)?)
            .filter(|begin| *begin < last)
    }

    fn forwarding(&self, first: usize, last: usize) -> Option<Forwarding> {
        let counted = self.counted(first, last);
        Some(Forwarding {
            seconds: (self.points[last].at - self.points[first].at).as_secs_f64(),
            cpu_seconds: counted[Counter::CpuSeconds]?,
            bits: 8.0 * (counted[Counter::BytesSent]? + counted[Counter::BytesResent]?),
            packets: counted[Counter::PacketsSent]? + counted[Counter::PacketsResent]?,
        })
    }

    fn cost(&self, first: usize, last: usize) -> Cost {
        let points = &self.points[first..=last];
        let (from, to) = (&points[0], &points[points.len() - 1]);
        let peak = |of: fn(&Gauges) -> Option<f64>| {
            points
                .iter()
                .filter_map(|point| of(&point.gauges))
                .reduce(f64::max)
        };
        let pairs = points.windows(2).map(|pair| {
            let seconds = (pair[1].at - pair[0].at).as_secs_f64();
            Some(seconds * (pair[0].gauges.participants? + pair[1].gauges.participants?) / 2.0)
        });
        Cost {
            seconds: (to.at - from.at).as_secs_f64(),
            counted: self.counted(first, last),
            latency: to
                .latency
                .as_ref()
                .zip(from.latency.as_ref())
                .and_then(|(to, from)| to.since(from)),
            participant_seconds: pairs.sum(),
            participants_peak: peak(|gauges| gauges.participants),
            resident_bytes_peak: peak(|gauges| gauges.resident_bytes),
            gauges: to.gauges,
            before: self.points[0].gauges,
            forwarding: None,
        }
    }

    /// Returns the counts between two points. A counter that first appeared in between started at
    /// 0.
    fn counted(&self, first: usize, last: usize) -> Counters {
        let (from, to) = (&self.points[first].counted, &self.points[last].counted);
        let mut counted = Counters::default();
        for counter in Counter::ALL {
            counted[counter] = to[counter].map(|count| count - from[counter].unwrap_or(0.0));
        }
        counted
    }
}

impl PageReading {
    /// Adds what `page` has counted since `said`. After a restart in between, adds all that `page`
    /// has counted.
    fn counted_with(&self, said: &MetricsPage, page: &MetricsPage, restarted: bool) -> Counters {
        let mut counted = self.counted;
        for counter in Counter::ALL {
            let Some(now) = page.counters[counter] else {
                continue;
            };
            let before = said.counters[counter]
                .filter(|before| !restarted && *before <= now)
                .unwrap_or(0.0);
            counted[counter] = Some(counted[counter].unwrap_or(0.0) + (now - before));
        }
        counted
    }

    /// Does the same for the latency histogram.
    fn latency_with(
        &self,
        said: &MetricsPage,
        page: &MetricsPage,
        restarted: bool,
    ) -> Option<Buckets> {
        match (&self.latency, &page.forward_latency, &said.forward_latency) {
            (Some(sum), Some(now), Some(before)) if !restarted => {
                now.since(before).and_then(|came| sum.plus(&came))
            }
            (Some(sum), Some(now), _) => sum.plus(now),
            (None, Some(now), None) => Some(now.clone()),
            (sum, _, _) => sum.clone(),
        }
    }
}

impl MetricsPage {
    fn has_restarted(&self, next: &MetricsPage) -> bool {
        match (self.process_start, next.process_start) {
            (Some(before), Some(now)) => (now - before).abs() > START_STEADY_SECONDS,
            _ => Counter::ALL.iter().any(|counter| {
                next.counters[*counter] < self.counters[*counter]
                    && next.counters[*counter].is_some()
            }),
        }
    }

    /// Fills in the figures that this page lacks from `before`, unless the process was restarted.
    fn with_what_it_leaves_out(mut self, before: &MetricsPage, restarted: bool) -> MetricsPage {
        self.node_id = self.node_id.or_else(|| before.node_id.clone());
        if !restarted {
            for counter in Counter::ALL {
                self.counters[counter] = self.counters[counter].or(before.counters[counter]);
            }
            self.forward_latency = self
                .forward_latency
                .or_else(|| before.forward_latency.clone());
        }
        self
    }
}

impl Cost {
    /// Adds up several nodes over the same stretch; `None` if there are none.
    pub fn of_all(costs: impl IntoIterator<Item = Cost>) -> Option<Cost> {
        costs.into_iter().reduce(|sum, cost| sum.beside(&cost))
    }

    fn beside(mut self, other: &Cost) -> Cost {
        let sum = |one: Option<f64>, other: Option<f64>| Some(one? + other?);
        for counter in Counter::ALL {
            self.counted[counter] = sum(self.counted[counter], other.counted[counter]);
        }
        self.latency = self
            .latency
            .zip(other.latency.as_ref())
            .and_then(|(one, other)| one.plus(other));
        self.participant_seconds = sum(self.participant_seconds, other.participant_seconds);
        // The nodes' peaks may have come at different times, so their sum would only be a bound.
        (self.participants_peak, self.resident_bytes_peak) = (None, None);
        self.gauges = self.gauges.beside(&other.gauges);
        self.before = self.before.beside(&other.before);
        self.forwarding = self
            .forwarding
            .zip(other.forwarding)
            .map(|(one, other)| Forwarding {
                seconds: one.seconds.max(other.seconds),
                cpu_seconds: one.cpu_seconds + other.cpu_seconds,
                bits: one.bits + other.bits,
                packets: one.packets + other.packets,
            });
        self.seconds = self.seconds.max(other.seconds);
        self
    }

    pub fn cpu_seconds(&self) -> Option<f64> {
        self.counted[Counter::CpuSeconds]
    }

    /// Mean number of busy cores.
    pub fn cpu_cores(&self) -> Option<f64> {
        ratio(self.cpu_seconds()?, self.seconds)
    }

    pub fn participants_mean(&self) -> Option<f64> {
        ratio(self.participant_seconds?, self.seconds)
    }

    pub fn cpu_seconds_per_participant_second(&self) -> Option<f64> {
        ratio(self.cpu_seconds()?, self.participant_seconds?)
    }

    pub fn cpu_seconds_per_gbit(&self) -> Option<f64> {
        let forwarding = self.forwarding?;
        ratio(forwarding.cpu_seconds * 1e9, forwarding.bits)
    }

    pub fn cpu_seconds_per_million_packets(&self) -> Option<f64> {
        let forwarding = self.forwarding?;
        ratio(forwarding.cpu_seconds * 1e6, forwarding.packets)
    }

    /// Memory growth since the first reading, divided by the growth in participants since then.
    pub fn bytes_per_participant(&self) -> Option<f64> {
        let grown = self.gauges.resident_bytes? - self.before.resident_bytes?;
        ratio(grown, self.gauges.participants? - self.before.participants?)
            .filter(|bytes| *bytes >= 0.0)
    }

    /// A quantile of the forwarding latency in microseconds; `None` if the server does not measure
    /// it.
    pub fn forward_latency_us(&self, share: f64) -> Option<Bracket> {
        let bracket = self.latency.as_ref()?.quantile(share)?;
        Some(Bracket {
            over: bracket.over / 1e3,
            at_most: bracket.at_most.map(|nanos| nanos / 1e3),
        })
    }
}

fn ratio(value: f64, of: f64) -> Option<f64> {
    (of > 0.0).then(|| value / of)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: f64 = 1_000.0;

    struct Clock(Instant);

    impl Clock {
        fn start() -> Clock {
            Clock(Instant::now())
        }

        fn at(&self, seconds: f64) -> Instant {
            self.0 + Duration::from_secs_f64(seconds)
        }
    }

    /// A page of a server with this CPU time, and this number of sent packets of 1,000 bytes each.
    fn page(cpu: f64, packets: f64, participants: f64) -> MetricsPage {
        let mut page = MetricsPage {
            process_start: Some(BASE),
            gauges: Gauges {
                participants: Some(participants),
                resident_bytes: Some(1e8 + 1e6 * participants),
                ..Gauges::default()
            },
            ..MetricsPage::default()
        };
        for (counter, value) in [
            (Counter::CpuSeconds, cpu),
            (Counter::PacketsSent, packets),
            (Counter::BytesSent, 1_000.0 * packets),
            (Counter::PacketsResent, 0.0),
            (Counter::BytesResent, 0.0),
        ] {
            page.counters[counter] = Some(value);
        }
        page
    }

    #[test]
    fn what_a_stretch_cost_is_what_lies_between_its_readings() {
        let (clock, mut book) = (Clock::start(), NodeBook::default());
        for second in 0..=20 {
            let load = f64::from(second.clamp(5, 15)) - 5.0;
            // Half a core and 1,000 packets a second while ten participants are there.
            book.note(
                clock.at(f64::from(second)),
                page(
                    7.0 + 0.5 * load,
                    1e6 + 1_000.0 * load,
                    if (6..=15).contains(&second) {
                        10.0
                    } else {
                        0.0
                    },
                ),
            );
        }
        let cost = book.between(clock.at(6.0), clock.at(15.0)).unwrap();
        assert_eq!(
            (cost.seconds, cost.cpu_seconds(), cost.cpu_cores()),
            (9.0, Some(4.5), Some(0.5))
        );
        assert_eq!(
            (
                cost.participants_mean(),
                cost.cpu_seconds_per_participant_second()
            ),
            (Some(10.0), Some(0.05))
        );
        // 9,000 packets are 72 Mbit.
        assert_eq!(cost.cpu_seconds_per_gbit(), Some(62.5));
        assert_eq!(cost.cpu_seconds_per_million_packets(), Some(500.0));
        assert_eq!(
            (cost.bytes_per_participant(), cost.participants_peak),
            (Some(1e6), Some(10.0))
        );
        assert_eq!(cost.forward_latency_us(0.5), None, "it says nothing of it");
        assert_eq!(book.whole().unwrap().cpu_seconds(), Some(5.0));
        assert_eq!(
            book.whole().unwrap().bytes_per_participant(),
            None,
            "nobody is left to share it"
        );
    }

    #[test]
    fn a_counter_that_begins_anew_goes_on_and_one_that_appears_began_at_0() {
        let (clock, mut book) = (Clock::start(), NodeBook::default());
        let mut first = page(100.0, 5_000.0, 1.0);
        first.counters[Counter::PacketsSent] = None;
        book.note(clock.at(0.0), first);
        book.note(clock.at(1.0), page(101.0, 300.0, 1.0));
        let mut anew = page(0.25, 40.0, 1.0);
        anew.process_start = Some(BASE + 60.0);
        book.note(clock.at(2.0), anew.clone());
        anew.counters[Counter::CpuSeconds] = Some(0.5);
        book.note(clock.at(3.0), anew);
        let whole = book.whole().unwrap();
        assert_eq!(
            (whole.cpu_seconds(), whole.counted[Counter::PacketsSent]),
            (Some(1.5), Some(340.0))
        );
        assert_eq!(
            (book.restarts(), whole.counted[Counter::NacksSent]),
            (1, None)
        );
    }

    #[test]
    fn without_a_start_time_a_counter_that_falls_tells_of_a_restart() {
        let (clock, mut book) = (Clock::start(), NodeBook::default());
        for (second, cpu) in [(0.0, 9.0), (1.0, 9.5), (2.0, 0.25)] {
            book.note(
                clock.at(second),
                MetricsPage {
                    process_start: None,
                    ..page(cpu, 10.0, 1.0)
                },
            );
        }
        assert_eq!(
            (book.restarts(), book.whole().unwrap().cpu_seconds()),
            (1, Some(0.75))
        );
    }

    #[test]
    fn a_page_that_is_lost_leaves_a_gap_and_what_is_behind_it_is_unknown() {
        let (clock, mut book) = (Clock::start(), NodeBook::default());
        for second in 0..5 {
            book.note(
                clock.at(f64::from(second)),
                page(f64::from(second), 0.0, 1.0),
            );
            assert_eq!(book.row().is_some(), second > 0);
        }
        for second in 5..9 {
            book.note_failure(clock.at(f64::from(second)), format!("refused {second}"));
            assert_eq!(book.row(), None);
        }
        assert!(
            book.between(clock.at(0.0), clock.at(6.0)).is_some(),
            "a reading is near"
        );
        assert_eq!(
            (book.between(clock.at(0.0), clock.at(8.0)), book.whole()),
            (None, None)
        );
        let lost = UnreadSpan {
            from: clock.at(4.0),
            to: None,
            why: "refused 5".into(),
        };
        assert_eq!((book.gaps(), book.failures()), (vec![lost.clone()], 4));
        // The page comes back: what was counted meanwhile is known again.
        book.note(clock.at(9.0), page(9.0, 0.0, 1.0));
        assert_eq!(
            book.gaps(),
            [UnreadSpan {
                to: Some(clock.at(9.0)),
                ..lost
            }]
        );
        assert_eq!(book.row().unwrap().cpu_cores, Some(1.0));
        assert_eq!(book.whole().unwrap().cpu_seconds(), Some(9.0));
        for _ in 0..3 * GAPS_MAX {
            book.note_failure(clock.at(10.0), "again".into());
            book.note(clock.at(10.0), page(9.0, 0.0, 1.0));
        }
        assert_eq!(book.gaps().len(), GAPS_MAX);
    }

    #[test]
    fn counters_that_lag_are_compared_with_the_cpu_of_their_own_time() {
        let (clock, mut book) = (Clock::start(), NodeBook::default());
        // Media begins at second 10 and costs half a core. 1,000 packets a second are reported
        // every 5 s, two seconds after each multiple of five.
        for second in 0..=30 {
            let told = f64::from((second - 12_i32).div_euclid(5).max(0)) * 5_000.0;
            let cpu = f64::from((second - 10).max(0)) * 0.5;
            book.note(
                clock.at(f64::from(second)),
                MetricsPage {
                    lag: Duration::from_secs(5),
                    ..page(cpu, told, 4.0)
                },
            );
        }
        let cost = book.between(clock.at(10.0), clock.at(28.0)).unwrap();
        let forwarding = cost.forwarding.unwrap();
        assert_eq!(
            (
                forwarding.seconds,
                forwarding.packets,
                forwarding.cpu_seconds
            ),
            (10.0, 10_000.0, 5.0)
        );
        assert_eq!(cost.cpu_seconds_per_million_packets(), Some(500.0));
        let short = book.between(clock.at(10.0), clock.at(18.0)).unwrap();
        assert_eq!(
            (short.forwarding, short.cpu_cores()),
            (None, Some(0.5)),
            "too short to compare"
        );
    }

    #[test]
    fn another_node_behind_the_same_address_is_no_reading() {
        let (clock, mut book) = (Clock::start(), NodeBook::default());
        let of = |node: &str, cpu| MetricsPage {
            node_id: Some(node.to_owned()),
            ..page(cpu, 0.0, 1.0)
        };
        book.note(clock.at(0.0), of("ND_a", 1.0));
        book.note(clock.at(1.0), of("ND_b", 900.0));
        book.note(clock.at(2.0), of("ND_a", 1.5));
        assert_eq!(book.whole().unwrap().cpu_seconds(), Some(0.5));
        assert!(
            book.gaps()[0].why.contains("ND_b answered instead of ND_a"),
            "{:?}",
            book.gaps()
        );
    }

    #[test]
    fn nodes_add_up_where_all_are_known() {
        let (clock, mut one, mut other) =
            (Clock::start(), NodeBook::default(), NodeBook::default());
        for second in 0..=10 {
            let passed = f64::from(second);
            one.note(clock.at(passed), page(passed, 1_000.0 * passed, 2.0));
            let mut mute = page(3.0 * passed, 1_000.0 * passed, 6.0);
            mute.counters[Counter::PlisSent] = Some(1.0);
            other.note(clock.at(passed), mute);
        }
        let both = Cost::of_all([one.whole().unwrap(), other.whole().unwrap()]).unwrap();
        assert_eq!(
            (both.seconds, both.cpu_cores(), both.participants_mean()),
            (10.0, Some(4.0), Some(8.0))
        );
        assert_eq!(
            (
                both.cpu_seconds_per_participant_second(),
                both.cpu_seconds_per_gbit()
            ),
            (Some(0.5), Some(250.0))
        );
        assert_eq!(
            (both.counted[Counter::PlisSent], Cost::of_all([])),
            (None, None)
        );
    }
}
