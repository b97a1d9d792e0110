//! The figures of the server's own pages, for people and for scripts: the server's cost of a
//! participant, a gigabit and a million packets. A coordinator shows the same.

use std::fmt::Write as _;

use serde::ser::{Serialize, SerializeMap, Serializer};

use super::{Outcome, Style};
use crate::measure::Kind;
use crate::server_metrics::book::{Cost, Forwarding};
use crate::server_metrics::page::{Bracket, Counter, Counters};
use crate::server_metrics::{Account, NodeReadings, ReadingGap, StretchCost};
use crate::words::{count, maybe, micros, number, scaled, wrapped};

/// Fields of the JSON report's `server` that come from its pages. Both are `null` if none was read.
#[derive(serde::Serialize)]
pub struct AccountView<'a> {
    nodes: Option<Vec<NodeView<'a>>>,
    /// Costs of all nodes together.
    steps: Option<Vec<StepCostView<'a>>>,
}

impl<'a> AccountView<'a> {
    pub fn new(account: Option<&'a Account>) -> AccountView<'a> {
        AccountView {
            nodes: account.map(|account| account.nodes.iter().map(NodeView::new).collect()),
            steps: account.map(|account| account.stretches.iter().map(StepCostView).collect()),
        }
    }
}

#[derive(serde::Serialize)]
struct NodeView<'a> {
    url: &'a str,
    node_id: Option<&'a str>,
    readings: usize,
    readings_failed: u64,
    restarts: u32,
    gaps: &'a [ReadingGap],
    steps: Vec<StepCostView<'a>>,
}

impl<'a> NodeView<'a> {
    fn new(node: &'a NodeReadings) -> NodeView<'a> {
        NodeView {
            url: &node.url,
            node_id: node.node_id.as_deref(),
            readings: node.readings,
            readings_failed: node.failures,
            restarts: node.restarts,
            gaps: &node.gaps,
            steps: node.stretches.iter().map(StepCostView).collect(),
        }
    }
}

/// Cost of a step, by its name. Unknown values are `null`, and so are all values if the page could
/// not be read near the step's ends.
struct StepCostView<'a>(&'a StretchCost);

impl Serialize for StepCostView<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let cost = self.0.cost.as_ref();
        let whole = |value: Option<f64>| value.map(|value| value.round() as u64);
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("name", &self.0.name)?;
        map.serialize_entry("seconds", &cost.map(|cost| cost.seconds))?;
        map.serialize_entry("cpu_seconds", &cost.and_then(Cost::cpu_seconds))?;
        map.serialize_entry("cpu_cores", &cost.and_then(Cost::cpu_cores))?;
        map.serialize_entry("participants_mean", &cost.and_then(Cost::participants_mean))?;
        map.serialize_entry(
            "participants_peak",
            &cost.and_then(|cost| cost.participants_peak),
        )?;
        map.serialize_entry(
            "cpu_seconds_per_participant_second",
            &cost.and_then(Cost::cpu_seconds_per_participant_second),
        )?;
        map.serialize_entry(
            "cpu_seconds_per_gbit",
            &cost.and_then(Cost::cpu_seconds_per_gbit),
        )?;
        map.serialize_entry(
            "cpu_seconds_per_million_packets",
            &cost.and_then(Cost::cpu_seconds_per_million_packets),
        )?;
        map.serialize_entry(
            "forwarding_seconds",
            &cost.and_then(|cost| Some(cost.forwarding?.seconds)),
        )?;
        map.serialize_entry(
            "resident_bytes",
            &whole(cost.and_then(|cost| cost.gauges.resident_bytes)),
        )?;
        map.serialize_entry(
            "resident_bytes_peak",
            &whole(cost.and_then(|cost| cost.resident_bytes_peak)),
        )?;
        map.serialize_entry(
            "bytes_per_participant",
            &whole(cost.and_then(Cost::bytes_per_participant)),
        )?;
        map.serialize_entry("forward_latency", &cost.and_then(LatencyView::new))?;
        let counted = cost.map_or_else(Counters::default, |cost| cost.counted);
        for counter in Counter::ALL
            .into_iter()
            .filter(|counter| *counter != Counter::CpuSeconds)
        {
            map.serialize_entry(counter.name(), &whole(counted[counter]))?;
        }
        map.end()
    }
}

/// Time that packets spent in the server, as far as its buckets tell.
#[derive(serde::Serialize)]
struct LatencyView {
    count: u64,
    mean_us: Option<f64>,
    p50_us: Option<BracketView>,
    p99_us: Option<BracketView>,
}

#[derive(serde::Serialize)]
struct BracketView {
    over: f64,
    at_most: Option<f64>,
}

impl LatencyView {
    /// Returns `None` if the server measured no latencies.
    fn new(cost: &Cost) -> Option<LatencyView> {
        let came = cost.latency.as_ref().filter(|came| came.count() > 0.0)?;
        let bracket = |share| {
            cost.forward_latency_us(share)
                .map(|Bracket { over, at_most }| BracketView { over, at_most })
        };
        Some(LatencyView {
            count: came.count() as u64,
            mean_us: came.mean().map(|nanos| nanos / 1e3),
            p50_us: bracket(0.5),
            p99_us: bracket(0.99),
        })
    }
}

/// Text on the cost of the step with the most participants, or of the whole test if there was no
/// step. Packet counts are those of the whole test, because the server's counters of a part lag.
pub(super) fn text(outcome: &Outcome, style: Style) -> String {
    let Some(account) = &outcome.server else {
        return String::new();
    };
    let media = [Kind::Audio, Kind::Video].map(|kind| outcome.totals.media(kind));
    let drops = outcome
        .engine
        .host_drops
        .places()
        .iter()
        .filter_map(|(_, packets)| *packets)
        .sum();
    let ours = Ours {
        packets_received: media.iter().map(|media| media.packets_received).sum(),
        drops: format!("{} on this host", number(drops)),
    };
    block(account, &ours, style)
}

/// Our own figures, shown beside the server's.
pub(crate) struct Ours {
    pub packets_received: u64,
    /// Number of dropped datagrams, and where they were dropped.
    pub drops: String,
}

/// Formats the paragraph. Empty if no page was read.
pub(crate) fn block(account: &Account, ours: &Ours, style: Style) -> String {
    let Some(stretch) = busiest(account) else {
        return String::new();
    };
    let nodes = count(account.nodes.len() as u64, "page");
    let Some(cost) = &stretch.cost else {
        return format!(
            "{} {nodes}: no new figures in {} (a page moves every 5 s: run for longer)\n\n",
            style.bold("Server    "),
            stretch.name
        );
    };
    let mut text = format!(
        "{} {nodes}, {}: {} cores, {}, {} participants\n",
        style.bold("Server    "),
        stretch.name,
        maybe(cost.cpu_cores(), |cores| format!("{cores:.2}")),
        maybe(cost.gauges.resident_bytes, |bytes| scaled(bytes, "B")),
        maybe(cost.participants_mean(), whole),
    );
    let counted = counted_in_all(account);
    for (label, line) in [
        ("participant", participant_line(cost)),
        ("CPU", cpu_line(cost)),
        ("forwarding", latency_line(cost)),
        ("packets", packets_line(&counted, ours)),
        ("drops", format!("{}; {}", drops(&counted), ours.drops)),
    ] {
        let lines = wrapped(&line, 15);
        let _ = write!(text, "  {label:<13}{}", lines.trim_start());
    }
    text.push('\n');
    text
}

fn whole(value: f64) -> String {
    number(value.round() as u64)
}

fn participant_line(cost: &Cost) -> String {
    format!(
        "{} of CPU a second, {}",
        maybe(cost.cpu_seconds_per_participant_second(), |seconds| micros(
            seconds * 1e6
        )),
        maybe(cost.bytes_per_participant(), |bytes| scaled(bytes, "B"))
    )
}

fn cpu_line(cost: &Cost) -> String {
    let cpu = |seconds: Option<f64>| maybe(seconds, |seconds| format!("{seconds:.2} s"));
    forwarding_line(
        cost.forwarding.as_ref(),
        &cpu(cost.cpu_seconds_per_gbit()),
        &cpu(cost.cpu_seconds_per_million_packets()),
    )
}

fn packets_line(counted: &Counters, ours: &Ours) -> String {
    let packets = |counter: Counter| maybe(counted[counter], whole);
    format!(
        "{} received, {} sent, {} sent again in all; we received {}",
        packets(Counter::PacketsReceived),
        packets(Counter::PacketsSent),
        packets(Counter::PacketsResent),
        number(ours.packets_received)
    )
}

/// Counters over the whole test.
fn counted_in_all(account: &Account) -> Counters {
    let all = account
        .stretches
        .last()
        .and_then(|total| total.cost.as_ref());
    all.map_or_else(Counters::default, |all| all.counted)
}

/// The step with the most participants, or the whole test if there are no steps.
fn busiest(account: &Account) -> Option<&StretchCost> {
    let (total, steps) = account.stretches.split_last()?;
    let people = |stretch: &&StretchCost| {
        stretch
            .cost
            .as_ref()
            .and_then(Cost::participants_mean)
            .unwrap_or(-1.0)
    };
    steps
        .iter()
        .max_by(|a, b| people(a).total_cmp(&people(b)))
        .or(Some(total))
}

fn forwarding_line(forwarding: Option<&Forwarding>, per_gbit: &str, per_million: &str) -> String {
    match forwarding {
        Some(_) => format!("{per_gbit} a Gbit, {per_million} a million packets"),
        None => "n/a a Gbit: its counters lag, so hold for 10 s or longer".to_owned(),
    }
}

fn latency_line(cost: &Cost) -> String {
    match [0.5, 0.99].map(|share| cost.forward_latency_us(share)) {
        [Some(p50), Some(p99)] => format!("p50 {}, p99 {}", bracket(&p50), bracket(&p99)),
        _ => "n/a (LiveKit measures it where rtc.forward_stats is set)".to_owned(),
    }
}

/// Formats a bracket, for example `50 us to 100 us` or `over 20 ms`.
fn bracket(bracket: &Bracket) -> String {
    match bracket.at_most {
        Some(at_most) if bracket.over == 0.0 => format!("up to {}", micros(at_most)),
        Some(at_most) => format!("{} to {}", micros(bracket.over), micros(at_most)),
        None => format!("over {}", micros(bracket.over)),
    }
}

/// Drops reported by the server and its host.
fn drops(counted: &Counters) -> String {
    let places = [
        (Counter::HostPacketsDropped, "by its host"),
        (Counter::SocketDrops, "by its sockets"),
        (Counter::SendErrors, "not taken by its kernel"),
    ];
    let known = places.iter().filter_map(|(counter, place)| {
        Some(format!(
            "{} {place}",
            number(counted[*counter]?.round() as u64)
        ))
    });
    let known: Vec<String> = known.collect();
    if known.is_empty() {
        "n/a by the server".to_owned()
    } else {
        known.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::server_metrics::book::NodeBook;
    use crate::server_metrics::page::MetricsPage;

    /// A page of LiveKit's, after this number of seconds with half a core, four participants, and
    /// 5,000 packets a second.
    fn page(seconds: f64, measures_latency: bool) -> MetricsPage {
        let told = (seconds / 5.0).floor() * 25_000.0;
        let latency = |at_most: f64| {
            if measures_latency {
                at_most * seconds
            } else {
                0.0
            }
        };
        let text = format!(
            "process_cpu_seconds_total {}\nprocess_resident_memory_bytes {}\nlivekit_participant_total {}\n\
             livekit_packet_total{{direction=\"incoming\",transmission=\"initial\"}} {}\n\
             livekit_packet_total{{direction=\"outgoing\",transmission=\"initial\"}} {told}\n\
             livekit_packet_bytes{{direction=\"outgoing\",transmission=\"initial\"}} {}\n\
             livekit_node_packet_total{{type=\"dropped\"}} 3\n\
             livekit_forward_latency_ns_bucket{{le=\"50000\"}} {}\n\
             livekit_forward_latency_ns_bucket{{le=\"100000\"}} {}\n\
             livekit_forward_latency_ns_bucket{{le=\"+Inf\"}} {}\n",
            seconds / 2.0,
            if seconds > 0.0 { 9e7 } else { 8e7 },
            if seconds > 0.0 { 4.0 } else { 0.0 },
            told / 10.0,
            told * 1_000.0,
            latency(10.0),
            latency(95.0),
            latency(100.0)
        );
        MetricsPage::read(&text).unwrap()
    }

    fn account(hold: u64, measures_latency: bool) -> Account {
        let (start, mut book) = (Instant::now(), NodeBook::default());
        let at = |seconds| start + Duration::from_secs(seconds);
        (0..=hold + 2)
            .for_each(|second| book.note(at(second), page(second as f64, measures_latency)));
        let stretch = |name: &str, cost| StretchCost {
            name: name.into(),
            cost,
        };
        let stretches = vec![
            stretch("hold", book.between(at(1), at(hold + 1))),
            stretch("total", book.whole()),
        ];
        let node = NodeReadings {
            url: "http://sfu:6789/metrics".into(),
            node_id: None,
            readings: book.readings(),
            failures: 0,
            restarts: 0,
            gaps: Vec::new(),
            stretches: stretches.clone(),
        };
        Account {
            nodes: vec![node],
            stretches,
        }
    }

    fn ours() -> Ours {
        Ours {
            packets_received: 74_990,
            drops: "0 on this host".into(),
        }
    }

    #[test]
    fn people_see_what_a_participant_costs() {
        let text = block(&account(15, true), &ours(), Style::default());
        assert_eq!(
            text,
            "Server     1 page, hold: 0.50 cores, 90.0 MB, 4 participants
  participant  125 ms of CPU a second, 2.50 MB
  CPU          12.50 s a Gbit, 100.00 s a million packets
  forwarding   p50 50 us to 100 us, p99 over 100 us
  packets      7,500 received, 75,000 sent, 0 sent again in all; we received
               74,990
  drops        0 by its host; 0 on this host

"
        );
        assert!(text.lines().all(|line| line.chars().count() <= 80));
    }

    #[test]
    fn what_is_not_known_is_said_so() {
        let short = block(&account(6, false), &ours(), Style::default());
        assert!(
            short.contains("its counters lag, so hold for 10 s or longer"),
            "{short}"
        );
        assert!(
            short.contains("n/a (LiveKit measures it where rtc.forward_stats is set)"),
            "{short}"
        );
        assert!(
            short.lines().all(|line| line.chars().count() <= 80),
            "{short}"
        );
        let mut lost = account(15, true);
        lost.stretches[0].cost = None;
        assert_eq!(
            block(&lost, &ours(), Style::default()),
            "Server     1 page: no new figures in hold (a page moves every 5 s: run for longer)\n\n"
        );
    }

    #[test]
    fn scripts_see_every_figure_and_null_where_there_is_none() {
        let account = account(15, true);
        let json = serde_json::to_value(AccountView::new(Some(&account))).unwrap();
        let hold = &json["nodes"][0]["steps"][0];
        assert_eq!(
            (hold["name"].as_str(), hold["cpu_seconds"].as_f64()),
            (Some("hold"), Some(7.5))
        );
        assert_eq!(
            (hold["packets_sent"].as_u64(), hold["nacks_sent"].is_null()),
            (Some(75_000), true)
        );
        assert_eq!(hold["forward_latency"]["p99_us"]["over"], 100.0);
        assert!(hold["forward_latency"]["p99_us"]["at_most"].is_null());
        assert_eq!(json["steps"][1]["name"], "total");
        let none = serde_json::to_value(AccountView::new(None)).unwrap();
        assert!(none["nodes"].is_null() && none["steps"].is_null());
        let unknown = serde_json::to_value(StepCostView(&StretchCost {
            name: "hold".into(),
            cost: None,
        }))
        .unwrap();
        let fields = unknown.as_object().unwrap();
        assert_eq!(fields.len(), hold.as_object().unwrap().len());
        assert!(
            fields
                .iter()
                .all(|(name, value)| name == "name" || value.is_null())
        );
    }
}
