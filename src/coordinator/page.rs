//! The live page (`GET /`), its events (`GET /events`), and the page for Prometheus (`GET
//! /metrics`).
//!
//! The page is one file that contains its style and script, and it requests nothing but its events.
//! Texts that probers give about themselves reach it as JSON and are shown as text.

use std::sync::LazyLock;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::digest::{SHA256, digest};
use serde::Serialize;

use super::clock::Offset;
use super::protocol::LiveSecond;
use super::result::Merged;
use super::state::{ProberState, RunPhase, RunState};
use crate::measure::wire::RecordWire;
use crate::measure::{Histogram, Kind, Record, is_measured};
use crate::metrics_page::{FigureKind, FiguresPage, PageSummary};
use crate::report::Judging;

/// The page's content, as `text/html; charset=utf-8`.
pub const HTML: &str = include_str!("page/page.html");

/// The page's Content-Security-Policy. It allows the page's own style and script by their hashes,
/// its own events, and nothing else.
pub static POLICY: LazyLock<String> = LazyLock::new(|| {
    format!(
        "default-src 'none'; style-src '{}'; script-src '{}'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hash_of("style"),
        hash_of("script")
    )
});

/// Interval between events. The page reports silence after five seconds without one.
pub const INTERVAL: Duration = Duration::from_secs(1);
/// Time without a message after which a live prober is shown as silent.
const SILENT_US: u64 = 5_000_000;

/// Returns one event of a `text/event-stream` with the current state of the run. `merged` is given
/// once the run is over.
pub fn event(
    state: &RunState,
    judging: &Judging,
    target: &str,
    started_us: u64,
    now_us: u64,
    merged: Option<&Merged>,
) -> String {
    let view = StateView {
        phase: state.phase().name(),
        expected: state.setup().expect,
        target,
        started_seconds: started_us as f64 / 1e6,
        now_seconds: now_us as f64 / 1e6,
        max_loss_pct: judging.max_loss_pct,
        stages: state
            .stages()
            .iter()
            .map(|stage| stage.name.as_str())
            .collect(),
        stage: state.underway().map(|underway| underway.stage),
        stopped: state.stop_reason(),
        vantages: state
            .probers()
            .iter()
            .map(|prober| VantagePageView::new(prober, state, now_us))
            .collect(),
        result: merged.map(ResultView::new),
    };
    // JSON has no raw line breaks, so the event is a single line.
    let data = serde_json::to_string(&view).expect("plain data serialises");
    format!("data: {data}\n\n")
}

#[derive(Serialize)]
struct StateView<'a> {
    phase: &'static str,
    expected: u32,
    target: &'a str,
    started_seconds: f64,
    now_seconds: f64,
    max_loss_pct: f64,
    stages: Vec<&'a str>,
    stage: Option<u32>,
    stopped: Option<&'a str>,
    vantages: Vec<VantagePageView<'a>>,
    result: Option<ResultView<'a>>,
}

#[derive(Serialize)]
struct VantagePageView<'a> {
    prober_id: &'a str,
    label: &'a str,
    state: &'static str,
    heard_seconds_ago: u64,
    why: Option<&'a str>,
    stage: Option<&'a str>,
    /// Figures of this second; a host that is not live has none.
    live: Option<&'a LiveSecond>,
    clock: Option<ClockPageView>,
    start_skew_us: Option<i64>,
    invalid: &'a [String],
}

#[derive(Serialize)]
struct ClockPageView {
    offset_us: i64,
    uncertainty_us: u64,
}

impl From<Offset> for ClockPageView {
    fn from(offset: Offset) -> ClockPageView {
        ClockPageView {
            offset_us: offset.offset_us,
            uncertainty_us: offset.uncertainty_us,
        }
    }
}

impl<'a> VantagePageView<'a> {
    fn new(prober: &'a ProberState, state: &'a RunState, now_us: u64) -> VantagePageView<'a> {
        let silent_us = now_us.saturating_sub(prober.heard_us);
        let standing = match (&prober.gone, &prober.report) {
            (Some(_), _) => "missing",
            (None, Some(_)) => "reported",
            (None, None) if *state.phase() == RunPhase::Over => "missing",
            // A legacy prober sends nothing until it is done.
            (None, None) if prober.is_legacy() => "at work",
            (None, None) if silent_us > SILENT_US => "silent",
            (None, None) => "live",
        };
        let report = prober
            .report
            .as_ref()
            .and_then(|report| report.throng.as_ref());
        VantagePageView {
            prober_id: prober.id.as_str(),
            label: &prober.vantage,
            state: standing,
            heard_seconds_ago: silent_us / 1_000_000,
            why: prober.gone.as_ref().map(|gone| gone.why.as_str()),
            stage: prober
                .stage
                .and_then(|stage| state.stages().get(stage as usize))
                .map(|stage| stage.name.as_str()),
            live: (standing == "live").then_some(&prober.live),
            clock: prober.offset().map(ClockPageView::from),
            start_skew_us: prober
                .starts
                .values()
                .copied()
                .max_by_key(|skew_us| skew_us.unsigned_abs()),
            invalid: report.map_or(&prober.invalid, |report| &report.invalid),
        }
    }
}

#[derive(Serialize)]
struct ResultView<'a> {
    verdict: &'static str,
    reasons: &'a [String],
    knee: Option<String>,
    tiers: Vec<TierPageView<'a>>,
}

#[derive(Serialize)]
struct TierPageView<'a> {
    name: &'a str,
    /// Verdict of the tier; `null` if nobody came to it.
    verdict: Option<&'static str>,
    participants: u32,
    vantages: usize,
    measured: usize,
    loss: Option<f64>,
    rtt_us: Option<f64>,
    quality: &'static str,
    reasons: &'a [String],
}

impl<'a> ResultView<'a> {
    fn new(merged: &'a Merged) -> ResultView<'a> {
        ResultView {
            verdict: merged.judgement.verdict.name(),
            reasons: &merged.judgement.reasons,
            knee: merged.knee().map(|knee| knee.sentence(&merged.unmeasured)),
            tiers: (merged.tiers.iter())
                .map(|tier| TierPageView {
                    name: &tier.step.name,
                    verdict: tier.begun.then(|| tier.judgement.verdict.name()),
                    participants: tier.step.participants,
                    vantages: tier.cells.len(),
                    measured: tier.measured().count(),
                    loss: tier.worst_loss(),
                    rtt_us: tier.worst_rtt_us(),
                    quality: tier.worst_quality().name(),
                    reasons: if tier.begun {
                        &tier.judgement.reasons
                    } else {
                        &[]
                    },
                })
                .collect(),
        }
    }
}

/// Returns the page for Prometheus. It has the last second of each vantage as gauges, and the
/// counters and summaries of each one's latest baseline or tier.
///
/// An unknown figure has no sample.
pub fn metrics(state: &RunState, now_us: u64) -> String {
    let mut page = FiguresPage::default();
    add_run(&mut page, state);
    for (name, help, value) in PROBER_GAUGES {
        let known = state.probers().iter().filter_map(|prober| {
            let labels = [("vantage", prober.vantage.as_str())];
            Some((labels, value(prober, now_us)?))
        });
        page.add(FigureKind::Gauge, name, help, known);
    }
    add_stages(&mut page, state);
    page.into_text()
}

/// Name, help text and value of a gauge that every prober has.
type ProberGauge = (
    &'static str,
    &'static str,
    fn(&ProberState, u64) -> Option<f64>,
);

const PROBER_GAUGES: [ProberGauge; 13] = [
    (
        "throng_up",
        "1 while the prober has a part in what is to come.",
        |p, _| Some(f64::from(u8::from(p.is_live()))),
    ),
    (
        "throng_heard_seconds_ago",
        "Since the prober's last sign of life.",
        |p, now_us| Some(now_us.saturating_sub(p.heard_us) as f64 / 1e6),
    ),
    ("throng_valid", "1 while the generator keeps up.", |p, _| {
        Some(f64::from(u8::from(p.invalid.is_empty())))
    }),
    ("throng_participants", "In their rooms now.", |p, _| {
        live(p).map(|live| live.participants.into())
    }),
    (
        "throng_sent_packets_per_second",
        "RTP packets sent in the last second.",
        |p, _| live(p)?.packets_sent_per_second,
    ),
    (
        "throng_received_packets_per_second",
        "RTP packets received in the last second.",
        |p, _| live(p)?.packets_received_per_second,
    ),
    (
        "throng_sent_bits_per_second",
        "Sent in the last second.",
        |p, _| live(p)?.bits_sent_per_second,
    ),
    (
        "throng_received_bits_per_second",
        "Received in the last second.",
        |p, _| live(p)?.bits_received_per_second,
    ),
    (
        "throng_loss_ratio",
        "Loss of all media of the run so far, 0 to 1.",
        |p, _| live(p)?.loss,
    ),
    (
        "throng_rtt_seconds",
        "Median round trip of the last second.",
        |p, _| seconds(live(p)?.rtt_us),
    ),
    (
        "throng_one_way_latency_p99_seconds",
        "One-way latency of the last second, the 99th percentile.",
        |p, _| seconds(live(p)?.latency_us_p99),
    ),
    (
        "throng_tick_late_p99_seconds",
        "How late the engine's beat came in the last second, the 99th percentile.",
        |p, _| seconds(live(p)?.tick_late_us_p99),
    ),
    (
        "throng_clock_offset_seconds",
        "The coordinator's clock less the prober's.",
        |p, _| p.offset().map(|offset| offset.offset_us as f64 / 1e6),
    ),
];

fn add_run(page: &mut FiguresPage, state: &RunState) {
    let phases = [
        RunPhase::Gathering,
        RunPhase::Running,
        RunPhase::Stopping,
        RunPhase::Over,
    ];
    let phases = phases.map(|phase| {
        let value = f64::from(u8::from(phase == *state.phase()));
        ([("phase", phase.name())], value)
    });
    let help = "1 for the phase that the run is in.";
    page.add(FigureKind::Gauge, "throng_run_phase", help, phases);
    let mut gauge = |name: &str, help: &str, value: Option<f64>| {
        page.add(
            FigureKind::Gauge,
            name,
            help,
            value.map(|value| ([], value)),
        );
    };
    gauge(
        "throng_probers_expected",
        "Probers that the run waits for.",
        Some(state.setup().expect.into()),
    );
    gauge(
        "throng_probers",
        "Probers that came.",
        Some(state.probers().len() as f64),
    );
    gauge(
        "throng_stage",
        "Index of the stage under way.",
        state.underway().map(|underway| underway.stage.into()),
    );
}

fn live(prober: &ProberState) -> Option<&LiveSecond> {
    prober.is_live().then_some(&prober.live)
}

fn seconds(micros: Option<u64>) -> Option<f64> {
    micros.map(|us| us as f64 / 1e6)
}

/// Counters of one prober's latest baseline or tier.
struct Latest<'a> {
    vantage: &'a str,
    stage: &'a str,
    record: Record,
}

impl Latest<'_> {
    fn labels(&self) -> [(&str, &str); 2] {
        [("vantage", self.vantage), ("stage", self.stage)]
    }
}

/// Adds counters and summaries of each prober's latest tier. A summary's count is the number of
/// values that came. A quantile that falls among the missing values is infinite.
fn add_stages(page: &mut FiguresPage, state: &RunState) {
    let latest: Vec<Latest<'_>> = (state.probers().iter())
        .filter_map(|prober| {
            let (stage, so_far) = prober.tiers.last_key_value()?;
            let record: &RecordWire = &so_far.record;
            Some(Latest {
                vantage: &prober.vantage,
                stage: &state.stages().get(*stage as usize)?.name,
                record: Record::from(record),
            })
        })
        .collect();
    add_section(
        page,
        &latest,
        ("session", None),
        |record| record.session.counters().collect(),
        |record| record.session.histograms().collect(),
    );
    add_section(
        page,
        &latest,
        ("audio", Some(Kind::Audio)),
        |record| record.audio.counters().collect(),
        |record| record.audio.histograms().collect(),
    );
    add_section(
        page,
        &latest,
        ("video", Some(Kind::Video)),
        |record| record.video.counters().collect(),
        |record| record.video.histograms().collect(),
    );
}

fn add_section<'a>(
    page: &mut FiguresPage,
    latest: &'a [Latest<'a>],
    (section, kind): (&str, Option<Kind>),
    counters: impl Fn(&'a Record) -> Vec<(&'static str, u64)>,
    histograms: impl Fn(&'a Record) -> Vec<(&'static str, &'a Histogram)>,
) {
    let Some(first) = latest.first() else { return };
    let help =
        |name: &str| format!("{section}.{name} of the tier under way, as in the JSON report.");
    for (at, (name, _)) in counters(&first.record).iter().enumerate() {
        if is_measured(kind, name) {
            let samples = latest
                .iter()
                .map(|one| (one.labels(), counters(&one.record)[at].1 as f64));
            let family = format!("throng_{section}_{name}_total");
            page.add(FigureKind::Counter, &family, &help(name), samples);
        }
    }
    for (at, (name, _)) in histograms(&first.record).iter().enumerate() {
        let summaries = latest.iter().filter_map(|one| {
            let histogram = histograms(&one.record)[at].1;
            (histogram.expected() > 0).then(|| summary(one, histogram))
        });
        let family = format!("throng_{section}_{name}_seconds");
        page.add_summaries(&family, &help(name), summaries);
    }
}

fn summary<'a>(one: &'a Latest<'_>, histogram: &Histogram) -> PageSummary<'a, 2> {
    let quantile = |share| {
        let value = histogram.quantile(share);
        (share, value.map_or(f64::INFINITY, |us| us as f64 / 1e6))
    };
    PageSummary {
        labels: one.labels(),
        quantiles: [0.5, 0.95, 0.99].map(quantile),
        sum: histogram.mean().unwrap_or(0.0) * histogram.count() as f64 / 1e6,
        count: histogram.count(),
    }
}

/// Returns the hash of the text between a tag and its end tag.
fn hash_of(tag: &str) -> String {
    let (_, rest) = HTML
        .split_once(&format!("<{tag}>"))
        .expect("the page has it");
    let (inside, _) = rest
        .split_once(&format!("</{tag}>"))
        .expect("the page ends it");
    format!(
        "sha256-{}",
        STANDARD.encode(digest(&SHA256, inside.as_bytes()))
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::{Value, json};

    use super::*;
    use crate::coordinator::canned::{self, Canned, TIER, WELL};
    use crate::plan::HostRole;
    use crate::server_metrics::exposition;

    const HOSTILE: &str = "<img src=x onerror=alert(1)>\"\\";

    fn lively() -> LiveSecond {
        LiveSecond {
            participants: 13,
            packets_sent_per_second: Some(150.0),
            packets_received_per_second: Some(1_500.5),
            loss: Some(0.02),
            rtt_us: Some(20_000),
            latency_us_p99: None,
            tick_late_us_p99: Some(120),
            ..LiveSecond::default()
        }
    }

    /// Returns a run with three of four hosts under way. One host is missing, and one has a label
    /// that is markup.
    fn under_way() -> Canned {
        let mut canned = Canned::armed(
            &[10, 25],
            &[
                ("fra", Some(HostRole::Both)),
                (HOSTILE, Some(HostRole::Subscribe)),
                ("sin", Some(HostRole::Subscribe)),
                ("vg", None),
            ],
        );
        for who in 0..3 {
            canned.beat(who, vec![WELL.so_far(TIER, false)], lively());
        }
        canned.loses(2);
        canned
    }

    fn data(event: &str) -> Value {
        let data = event
            .strip_prefix("data: ")
            .and_then(|rest| rest.strip_suffix("\n\n"))
            .unwrap();
        assert!(!data.contains('\n'), "one line is one event");
        serde_json::from_str(data).unwrap()
    }

    fn event_of(canned: &Canned, merged: Option<&Merged>) -> String {
        event(
            &canned.state,
            &canned::judging(),
            "wss://sfu.example.com",
            canned::START_US,
            canned.now_us,
            merged,
        )
    }

    #[test]
    fn an_event_has_the_run_as_it_stands_and_figures_only_of_those_who_live() {
        let event = data(&event_of(&under_way(), None));
        assert_eq!(
            (&event["phase"], &event["expected"], &event["result"]),
            (&json!("running"), &json!(4), &json!(null))
        );
        let vantage = |at: usize| &event["vantages"][at];
        assert_eq!(
            (&vantage(0)["state"], &vantage(0)["stage"]),
            (&json!("live"), &json!("tier 1"))
        );
        assert_eq!(
            (
                &vantage(0)["live"]["participants"],
                &vantage(0)["live"]["latency_us_p99"]
            ),
            (&json!(13), &json!(null))
        );
        assert_eq!(vantage(1)["label"], json!(HOSTILE));
        assert_eq!(
            (&vantage(2)["state"], &vantage(2)["live"]),
            (&json!("missing"), &json!(null))
        );
        assert_eq!(
            (&vantage(2)["why"], &vantage(3)["state"]),
            (&json!("silent for 30 s"), &json!("at work"))
        );
    }

    #[test]
    fn a_run_that_is_over_comes_with_its_verdict_and_tiers() {
        let canned = canned::over();
        let merged = Merged::new(&canned.state, &canned::judging());
        let event = data(&event_of(&canned, Some(&merged)));
        assert_eq!(
            (&event["phase"], &event["result"]["verdict"]),
            (&json!("over"), &json!("FAIL"))
        );
        assert_eq!(event["result"]["tiers"][1]["participants"], json!(78));
        assert!(
            event["result"]["knee"]
                .as_str()
                .unwrap()
                .starts_with("33 participants")
        );
        assert!(
            event["vantages"]
                .as_array()
                .unwrap()
                .iter()
                .all(|vantage| vantage["state"] == "reported")
        );
    }

    #[test]
    fn the_page_is_whole_and_asks_nobody_else_for_anything() {
        for word in [
            "http://",
            "https://",
            "src=",
            "@import",
            "url(",
            "innerHTML",
            "insertAdjacent",
            "document.write",
            "eval(",
            " style=\"",
            " onclick",
        ] {
            let rest = HTML.replace("http://www.w3.org/2000/svg", "");
            assert!(!rest.contains(word), "{word}");
        }
        assert_eq!(
            (
                HTML.matches("<script>").count(),
                HTML.matches("<style>").count()
            ),
            (1, 1)
        );
        assert!(
            POLICY.starts_with("default-src 'none'; style-src 'sha256-")
                && !POLICY.contains("unsafe")
        );
    }

    /// Parses samples into family, name with labels, and value.
    fn parsed(page: &str) -> Vec<(String, String, f64)> {
        let mut family = String::new();
        let mut seen = BTreeSet::new();
        let mut samples = Vec::new();
        for line in page.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                family = rest.split(' ').next().unwrap().to_owned();
                assert!(seen.insert(family.clone()), "{family} is there twice");
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                assert!(rest.starts_with(&format!("{family} ")), "{line}");
            } else {
                let (name, value) = line.rsplit_once(' ').unwrap();
                assert!(name.starts_with(&family), "{line} in {family}");
                samples.push((family.clone(), name.to_owned(), value.parse().unwrap()));
            }
        }
        samples
    }

    #[test]
    fn prometheus_reads_every_line_and_finds_nothing_that_is_not_known() {
        let canned = under_way();
        let page = metrics(&canned.state, canned.now_us);
        let samples = parsed(&page);
        let value = |name: &str| {
            samples
                .iter()
                .find(|(_, sample, _)| sample == name)
                .map(|(.., value)| *value)
        };
        assert_eq!(value("throng_up{vantage=\"fra\"}"), Some(1.0));
        assert_eq!(value("throng_up{vantage=\"sin\"}"), Some(0.0));
        assert_eq!(value("throng_rtt_seconds{vantage=\"fra\"}"), Some(0.02));
        assert_eq!(
            value("throng_rtt_seconds{vantage=\"sin\"}"),
            None,
            "nobody knows what a missing one sees"
        );
        assert_eq!(
            value("throng_one_way_latency_p99_seconds{vantage=\"fra\"}"),
            None
        );
        assert_eq!(
            value("throng_up{vantage=\"<img src=x onerror=alert(1)>\\\"\\\\\"}"),
            Some(1.0)
        );
        assert_eq!(
            value("throng_audio_packets_received_total{vantage=\"fra\",stage=\"tier 1\"}"),
            Some(10_000.0)
        );
        assert_eq!(
            value("throng_session_rtt_rtcp_seconds_count{vantage=\"fra\",stage=\"tier 1\"}"),
            Some(100.0)
        );
        let median = WELL.record().session.rtt_rtcp.quantile(0.5).unwrap() as f64 / 1e6;
        assert_eq!(
            value(
                "throng_session_rtt_rtcp_seconds{vantage=\"fra\",stage=\"tier 1\",quantile=\"0.5\"}"
            ),
            Some(median)
        );
        assert!(
            !page.contains("throng_video_played_us_total"),
            "this version does not fill it"
        );
        assert_eq!(value("throng_run_phase{phase=\"running\"}"), Some(1.0));
    }

    /// Dashboards depend on these names.
    #[test]
    fn our_own_reader_finds_every_figure_under_its_name() {
        let canned = under_way();
        let page = metrics(&canned.state, canned.now_us);
        let samples = exposition::samples(&page).map(Result::unwrap);
        let found: BTreeSet<String> = samples.map(|sample| sample.name.to_owned()).collect();
        let mut expected: BTreeSet<String> = [
            "throng_run_phase",
            "throng_probers_expected",
            "throng_probers",
            "throng_up",
            "throng_heard_seconds_ago",
            "throng_valid",
            "throng_participants",
            "throng_sent_packets_per_second",
            "throng_received_packets_per_second",
            "throng_loss_ratio",
            "throng_rtt_seconds",
            "throng_tick_late_p99_seconds",
        ]
        .map(str::to_owned)
        .into();
        let record = WELL.record();
        let mut section =
            |section: &str,
             kind,
             counters: &mut dyn Iterator<Item = (&'static str, u64)>,
             histograms: &mut dyn Iterator<Item = (&'static str, &Histogram)>| {
                let measured = counters.filter(|(name, _)| is_measured(kind, name));
                expected.extend(measured.map(|(name, _)| format!("throng_{section}_{name}_total")));
                let known = histograms.filter(|(_, histogram)| histogram.expected() > 0);
                expected.extend(known.flat_map(|(name, _)| {
                    ["", "_sum", "_count"]
                        .map(|end| format!("throng_{section}_{name}_seconds{end}"))
                }));
            };
        let (session, audio, video) = (&record.session, &record.audio, &record.video);
        let mut own = (session.counters(), session.histograms());
        section("session", None, &mut own.0, &mut own.1);
        for (name, kind, media) in [("audio", Kind::Audio, audio), ("video", Kind::Video, video)] {
            let mut of_kind = (media.counters(), media.histograms());
            section(name, Some(kind), &mut of_kind.0, &mut of_kind.1);
        }
        assert_eq!(found, expected);
    }

    #[test]
    fn a_quantile_among_what_never_came_is_infinite() {
        let mut record = WELL.record();
        record.audio.one_way_latency.expect(1_000);
        let mut so_far = WELL.so_far(TIER, false);
        so_far.record = RecordWire::from(&record);
        let mut canned = Canned::armed(&[10], &[("fra", Some(HostRole::Both))]);
        canned.beat(0, vec![so_far], lively());
        let samples = parsed(&metrics(&canned.state, canned.now_us));
        let p95 = samples.iter().find(|(_, name, _)| {
            name.starts_with("throng_audio_one_way_latency_seconds{") && name.contains("0.95")
        });
        assert_eq!(p95.unwrap().2, f64::INFINITY);
    }
}
