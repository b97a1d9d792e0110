//! One reading of a server's page, with the names that LiveKit and the embedded SFU give to the
//! figures that we read.
//!
//! A figure that is not on the page is `None`. A counter with an impossible value (negative, not a
//! number) makes the page unreadable.

use std::time::Duration;

use super::exposition::{self, Labels, MalformedLine, MetricSample};
use crate::words;

/// LiveKit updates a track's counts of packets, bytes and requests every 5 s, and when the track
/// ends.
const LIVEKIT_LAG: Duration = Duration::from_secs(5);
/// Largest number of buckets accepted. LiveKit's histograms have eleven.
const BUCKETS_MAX: usize = 64;

/// Largest count that a float holds exactly. Nothing that we read reaches it in the lifetime of a
/// server.
const COUNT_MAX: f64 = (1u64 << 53) as f64;

/// All figures of one page at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MetricsPage {
    /// LiveKit's own id of the node.
    pub node_id: Option<String>,
    /// Start time of the process in seconds since 1970. If it differs, the process is another one,
    /// whose counters started at 0.
    pub process_start: Option<f64>,
    pub counters: Counters,
    pub gauges: Gauges,
    pub forward_latency: Option<Buckets>,
    /// How far the media counters may lag.
    pub lag: Duration,
}

/// Reason why a page cannot be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PageError {
    #[error("its {0}: is this a Prometheus page?")]
    Malformed(#[from] MalformedLine),
    #[error("its {name} is {value}, which no counter can be")]
    NoCounter { name: String, value: f64 },
    #[error("its {0} is no histogram")]
    NoHistogram(&'static str),
    #[error("none of an SFU's figures is on it: is this the SFU's own page?")]
    Foreign,
}

/// Values that hold at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Gauges {
    pub rooms: Option<f64>,
    pub participants: Option<f64>,
    pub subscriptions: Option<f64>,
    pub resident_bytes: Option<f64>,
}

/// Declares the counters, each with the metric and labels that it is read from.
macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident, $text:literal: $family:literal [$($label:ident = $value:literal),*];)*) => {
        /// Counters of a server, from the server's point of view.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Counter {
            $($(#[$doc])* $name,)*
        }

        impl Counter {
            pub const ALL: [Counter; [$(Counter::$name),*].len()] = [$(Counter::$name),*];

            /// Name in reports.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Counter::$name => $text,)*
                }
            }

            /// Name of the metric on a page, and the labels that a sample must have to be counted.
            const fn source(self) -> (&'static str, &'static [(&'static str, &'static str)]) {
                match self {
                    $(Counter::$name => ($family, &[$((stringify!($label), $value)),*]),)*
                }
            }
        }
    };
}

counters! {
    CpuSeconds, "cpu_seconds": "process_cpu_seconds_total" [];
    /// Includes retransmissions: LiveKit does not distinguish them here.
    PacketsReceived, "packets_received": "livekit_packet_total" [direction = "incoming"];
    BytesReceived, "bytes_received": "livekit_packet_bytes" [direction = "incoming"];
    PacketsSent, "packets_sent": "livekit_packet_total" [direction = "outgoing", transmission = "initial"];
    BytesSent, "bytes_sent": "livekit_packet_bytes" [direction = "outgoing", transmission = "initial"];
    PacketsResent, "packets_resent": "livekit_packet_total" [direction = "outgoing", transmission = "retransmit"];
    BytesResent, "bytes_resent": "livekit_packet_bytes" [direction = "outgoing", transmission = "retransmit"];
    // The direction is that of the media: requests sent to publishers concern incoming media.
    NacksSent, "nacks_sent": "livekit_nack_total" [direction = "incoming"];
    NacksReceived, "nacks_received": "livekit_nack_total" [direction = "outgoing"];
    PlisSent, "plis_sent": "livekit_pli_total" [direction = "incoming"];
    PlisReceived, "plis_received": "livekit_pli_total" [direction = "outgoing"];
    /// Packets lost from publishers, as the server sees it.
    UplinkPacketsLost, "uplink_packets_lost": "livekit_packet_loss_total" [direction = "incoming"];
    /// Packets lost to subscribers, as they report it.
    DownlinkPacketsLost, "downlink_packets_lost": "livekit_packet_loss_total" [direction = "outgoing"];
    /// Packets dropped by the queueing disciplines of the server's host, whoever sent them.
    HostPacketsDropped, "host_packets_dropped": "livekit_node_packet_total" [type = "dropped"];
    SocketDrops, "socket_drops": "throng_sfu_socket_drops" [];
    SendErrors, "send_errors": "throng_sfu_send_errors" [];
}

/// One optional value for each [`Counter`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counters([Option<f64>; Counter::ALL.len()]);

impl Counters {
    pub fn map(self, of: impl Fn(Option<f64>) -> Option<f64>) -> Counters {
        Counters(self.0.map(of))
    }
}

impl std::ops::Index<Counter> for Counters {
    type Output = Option<f64>;

    fn index(&self, counter: Counter) -> &Option<f64> {
        &self.0[counter as usize]
    }
}

impl std::ops::IndexMut<Counter> for Counters {
    fn index_mut(&mut self, counter: Counter) -> &mut Option<f64> {
        &mut self.0[counter as usize]
    }
}

/// A Prometheus histogram: for each bound, the number of values at or below it. The last bound is
/// infinite.
#[derive(Clone, Debug, PartialEq)]
pub struct Buckets {
    /// Pairs of a bound and its count, sorted by bound.
    at_most: Vec<(f64, f64)>,
    sum: f64,
}

/// The bounds between which a quantile lies. There is no upper bound if it lies above the last
/// finite one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bracket {
    pub over: f64,
    pub at_most: Option<f64>,
}

impl MetricsPage {
    /// Reads a page.
    ///
    /// # Errors
    /// If the text is not a readable page of an SFU.
    pub fn read(text: &str) -> Result<MetricsPage, PageError> {
        const LATENCY: &str = "livekit_forward_latency_ns";
        let mut page = MetricsPage::default();
        let (mut buckets, mut sum, mut is_embedded) = (Vec::new(), 0.0, false);
        for sample in exposition::samples(text) {
            let sample = sample?;
            page.take_counters(&sample)?;
            page.gauges.take(&sample);
            if sample.name.starts_with("livekit_") && page.node_id.is_none() {
                // The id is shown to users.
                page.node_id = sample
                    .labels
                    .value("node_id")
                    .map(|id| words::one_line(&id));
            }
            is_embedded |= sample.name.starts_with("throng_sfu_");
            match sample.name.strip_prefix(LATENCY) {
                Some("_bucket") if buckets.len() < BUCKETS_MAX => {
                    buckets.push((bound(&sample.labels), sample.value))
                }
                Some("_bucket") => return Err(PageError::NoHistogram(LATENCY)),
                Some("_sum") => sum = sample.value,
                _ => {}
            }
            if sample.name == "process_start_time_seconds" {
                page.process_start = Some(sample.value).filter(|start| start.is_finite());
            }
        }
        if page.counters[Counter::PacketsSent].is_none() && page.gauges.participants.is_none() {
            return Err(PageError::Foreign);
        }
        if !buckets.is_empty() {
            page.forward_latency =
                Some(Buckets::new(buckets, sum).ok_or(PageError::NoHistogram(LATENCY))?);
        }
        page.gauges = page.gauges.possible();
        page.lag = if is_embedded {
            Duration::ZERO
        } else {
            LIVEKIT_LAG
        };
        Ok(page)
    }

    fn take_counters(&mut self, sample: &MetricSample<'_>) -> Result<(), PageError> {
        for counter in Counter::ALL {
            let (family, labels) = counter.source();
            if sample.name != family {
                continue;
            }
            // A page lists a metric only with the label values that have been counted. If it has
            // others and not these, this counter is 0.
            let counted = self.counters[counter].get_or_insert(0.0);
            if sample.labels.have(labels) {
                *counted += sample.value;
            }
            if !(0.0..=COUNT_MAX).contains(&sample.value) || *counted > COUNT_MAX {
                return Err(PageError::NoCounter {
                    name: family.to_owned(),
                    value: sample.value,
                });
            }
        }
        Ok(())
    }
}

impl Gauges {
    fn take(&mut self, sample: &MetricSample<'_>) {
        let gauge = match sample.name {
            "livekit_room_total" => &mut self.rooms,
            "livekit_participant_total" => &mut self.participants,
            "livekit_track_subscribed_total" => &mut self.subscriptions,
            "process_resident_memory_bytes" => &mut self.resident_bytes,
            _ => return,
        };
        *gauge = Some(gauge.unwrap_or(0.0) + sample.value);
    }

    /// Adds up the gauges of two nodes.
    pub(super) fn beside(&self, other: &Gauges) -> Gauges {
        let sum = |one: Option<f64>, other: Option<f64>| Some(one? + other?);
        Gauges {
            rooms: sum(self.rooms, other.rooms),
            participants: sum(self.participants, other.participants),
            subscriptions: sum(self.subscriptions, other.subscriptions),
            resident_bytes: sum(self.resident_bytes, other.resident_bytes),
        }
    }

    /// Drops impossible values: no gauge can be negative, so such a value is unknown.
    fn possible(self) -> Gauges {
        let possible = |gauge: Option<f64>| gauge.filter(|sum| (0.0..=COUNT_MAX).contains(sum));
        Gauges {
            rooms: possible(self.rooms),
            participants: possible(self.participants),
            subscriptions: possible(self.subscriptions),
            resident_bytes: possible(self.resident_bytes),
        }
    }
}

/// NaN if there is no bound, so that the histogram is refused.
fn bound(labels: &Labels<'_>) -> f64 {
    labels
        .value("le")
        .and_then(|bound| bound.parse().ok())
        .unwrap_or(f64::NAN)
}

impl Buckets {
    /// Returns `None` if counts fall from one bound to the next, a bound occurs twice, the infinite
    /// bound is missing, or a count or the sum is out of range.
    fn new(mut at_most: Vec<(f64, f64)>, sum: f64) -> Option<Buckets> {
        at_most.sort_by(|a, b| a.0.total_cmp(&b.0));
        let rise = at_most
            .windows(2)
            .all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1);
        let count = at_most
            .iter()
            .all(|(_, count)| (0.0..=COUNT_MAX).contains(count));
        let ends = at_most
            .last()
            .is_some_and(|(bound, _)| *bound == f64::INFINITY);
        // The sum is in nanoseconds: at most 1 s for each value.
        let sums = (0.0..=1e9 * COUNT_MAX).contains(&sum);
        (rise && count && ends && sums).then_some(Buckets { at_most, sum })
    }

    pub fn count(&self) -> f64 {
        self.at_most.last().map_or(0.0, |(_, count)| *count)
    }

    pub fn mean(&self) -> Option<f64> {
        (self.count() > 0.0).then(|| self.sum / self.count())
    }

    /// The difference to an `earlier` reading; `None` if its bounds differ or its counts are
    /// higher.
    pub fn since(&self, earlier: &Buckets) -> Option<Buckets> {
        self.combine(earlier, |now, before| now - before)
    }

    /// Adds up two histograms; `None` if their bounds differ.
    pub fn plus(&self, other: &Buckets) -> Option<Buckets> {
        self.combine(other, |one, other| one + other)
    }

    fn combine(&self, other: &Buckets, of: impl Fn(f64, f64) -> f64) -> Option<Buckets> {
        let same = self.at_most.len() == other.at_most.len()
            && self
                .at_most
                .iter()
                .zip(&other.at_most)
                .all(|(a, b)| a.0 == b.0);
        let pairs = self.at_most.iter().zip(&other.at_most);
        let combined = pairs
            .map(|(one, other)| (one.0, of(one.1, other.1)))
            .collect();
        same.then(|| Buckets::new(combined, of(self.sum, other.sum)))
            .flatten()
    }

    /// The bucket that holds the value which `share` of all values do not exceed. `None` if there
    /// are no values.
    pub fn quantile(&self, share: f64) -> Option<Bracket> {
        let rank = (share * self.count()).ceil().max(1.0);
        let at = self.at_most.iter().position(|(_, count)| *count >= rank)?;
        Some(Bracket {
            over: at.checked_sub(1).map_or(0.0, |below| self.at_most[below].0),
            at_most: Some(self.at_most[at].0).filter(|bound| bound.is_finite()),
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A page of LiveKit 1.13, without the metrics that we do not read.
    pub const LIVEKIT: &str = r#"
# TYPE livekit_forward_latency_ns histogram
livekit_forward_latency_ns_bucket{node_id="ND_a",node_type="SERVER",le="50000"} 10
livekit_forward_latency_ns_bucket{node_id="ND_a",node_type="SERVER",le="100000"} 90
livekit_forward_latency_ns_bucket{node_id="ND_a",node_type="SERVER",le="250000"} 98
livekit_forward_latency_ns_bucket{node_id="ND_a",node_type="SERVER",le="+Inf"} 100
livekit_forward_latency_ns_sum{node_id="ND_a",node_type="SERVER"} 8e+06
livekit_forward_latency_ns_count{node_id="ND_a",node_type="SERVER"} 100
livekit_node_packet_total{node_id="ND_a",node_type="SERVER",type="dropped"} 4
livekit_node_packet_total{node_id="ND_a",node_type="SERVER",type="out"} 10543
livekit_packet_bytes{country="",direction="incoming",node_id="ND_a",node_type="SERVER",transmission="initial"} 5000
livekit_packet_bytes{country="",direction="outgoing",node_id="ND_a",node_type="SERVER",transmission="initial"} 50000
livekit_packet_total{country="",direction="incoming",node_id="ND_a",node_type="SERVER",transmission="initial"} 50
livekit_packet_total{country="",direction="outgoing",node_id="ND_a",node_type="SERVER",transmission="initial"} 500
livekit_packet_total{country="DE",direction="outgoing",node_id="ND_a",node_type="SERVER",transmission="initial"} 7
livekit_participant_total{node_id="ND_a",node_type="SERVER"} 12
livekit_pli_total{country="",direction="incoming",node_id="ND_a",node_type="SERVER"} 3
livekit_room_total{node_id="ND_a",node_type="SERVER"} 2
livekit_track_subscribed_total{kind="AUDIO",node_id="ND_a",node_type="SERVER"} 10
livekit_track_subscribed_total{kind="VIDEO",node_id="ND_a",node_type="SERVER"} 8
process_cpu_seconds_total 1.25
process_resident_memory_bytes 6.4e+07
process_start_time_seconds 1.7e+09
"#;

    #[test]
    fn livekits_page_is_summed_over_the_labels_that_do_not_matter() {
        let page = MetricsPage::read(LIVEKIT).unwrap();
        let counter = |counter: Counter| page.counters[counter];
        assert_eq!(counter(Counter::CpuSeconds), Some(1.25));
        assert_eq!(
            (
                counter(Counter::PacketsReceived),
                counter(Counter::PacketsSent)
            ),
            (Some(50.0), Some(507.0))
        );
        assert_eq!(counter(Counter::HostPacketsDropped), Some(4.0));
        assert_eq!(
            (page.gauges.participants, page.gauges.rooms),
            (Some(12.0), Some(2.0))
        );
        assert_eq!(
            (page.gauges.subscriptions, page.gauges.resident_bytes),
            (Some(18.0), Some(6.4e7))
        );
        assert_eq!(
            (page.node_id.as_deref(), page.process_start, page.lag),
            (Some("ND_a"), Some(1.7e9), LIVEKIT_LAG)
        );
    }

    #[test]
    fn figures_that_no_server_has_are_not_known() {
        for odd in ["NaN", "+Inf", "-Inf", "-1", "1e300", "1e400"] {
            let gauges = ["livekit_room_total", "process_resident_memory_bytes"];
            let lines = gauges.map(|name| format!("{name} {odd}\n"));
            let page = MetricsPage::read(&format!("{LIVEKIT}{}", lines.concat()));
            if let Ok(page) = page {
                let known = [page.gauges.rooms, page.gauges.resident_bytes];
                for value in known.into_iter().flatten() {
                    assert!((0.0..=COUNT_MAX).contains(&value), "{odd}: {value}");
                }
            }
            let start = LIVEKIT.replace(
                "process_start_time_seconds 1.7e+09",
                &format!("process_start_time_seconds {odd}"),
            );
            assert_ne!(start, LIVEKIT);
            if let Ok(page) = MetricsPage::read(&start) {
                assert!(page.process_start.is_none_or(f64::is_finite), "{odd}");
            }
        }
    }

    #[test]
    fn what_was_not_counted_yet_is_0_where_its_metric_is_there_and_unknown_where_it_is_not() {
        let page = MetricsPage::read(LIVEKIT).unwrap();
        assert_eq!(page.counters[Counter::PacketsResent], Some(0.0));
        assert_eq!(
            (
                page.counters[Counter::PlisSent],
                page.counters[Counter::PlisReceived]
            ),
            (Some(3.0), Some(0.0))
        );
        assert_eq!(
            (
                page.counters[Counter::NacksSent],
                page.counters[Counter::SocketDrops]
            ),
            (None, None)
        );
    }

    #[test]
    fn a_quantile_of_buckets_is_known_by_its_bounds() {
        let buckets = MetricsPage::read(LIVEKIT).unwrap().forward_latency.unwrap();
        let quantile = |share| {
            buckets
                .quantile(share)
                .map(|bracket| (bracket.over, bracket.at_most))
        };
        assert_eq!((buckets.count(), buckets.mean()), (100.0, Some(80_000.0)));
        assert_eq!(quantile(0.1), Some((0.0, Some(50_000.0))));
        assert_eq!(quantile(0.5), Some((50_000.0, Some(100_000.0))));
        assert_eq!(quantile(0.95), Some((100_000.0, Some(250_000.0))));
        assert_eq!(quantile(0.99), Some((250_000.0, None)));
        let twice = buckets.plus(&buckets).unwrap();
        assert_eq!(
            (twice.count(), twice.since(&buckets)),
            (200.0, Some(buckets.clone()))
        );
        let none = buckets.since(&buckets).unwrap();
        assert_eq!(
            (none.count(), none.mean(), none.quantile(0.5)),
            (0.0, None, None)
        );
        assert_eq!(buckets.since(&twice), None, "a histogram does not shrink");
    }

    #[test]
    fn what_cannot_be_true_is_refused() {
        let with = |line: &str| MetricsPage::read(&format!("{LIVEKIT}{line}\n"));
        for value in ["NaN", "-1", "+Inf", "1e16"] {
            let error = with(&format!("process_cpu_seconds_total {value}")).unwrap_err();
            assert!(matches!(error, PageError::NoCounter { .. }), "{error}");
        }
        for line in [
            "livekit_forward_latency_ns_bucket{le=\"many\"} 5",
            "livekit_forward_latency_ns_bucket{le=\"50000\"} 10",
            "livekit_forward_latency_ns_bucket{le=\"60000\"} 9",
        ] {
            assert_eq!(
                with(line).unwrap_err(),
                PageError::NoHistogram("livekit_forward_latency_ns"),
                "{line}"
            );
        }
        assert!(matches!(
            with("<html>").unwrap_err(),
            PageError::Malformed(_)
        ));
        assert_eq!(
            MetricsPage::read("up 1\nprocess_cpu_seconds_total 1\n").unwrap_err(),
            PageError::Foreign
        );
        assert_eq!(MetricsPage::read("").unwrap_err(), PageError::Foreign);
        assert_eq!(
            with("livekit_participant_total -20")
                .unwrap()
                .gauges
                .participants,
            None
        );
    }
}
