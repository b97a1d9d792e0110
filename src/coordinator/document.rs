//! The merged result as one JSON document: `throng-report/1` with its vantages, and beside it the
//! fields of `voicegw`'s `GET /result`, under `voicegw`'s names.
//!
//! Two of these names have another meaning in a report: `knee` and `unmeasured_tiers`. In the
//! report they mean what they mean in every report. In the answer to `GET /result` they have
//! `voicegw`'s meaning: participants or `null`, and indices.

use std::time::Duration;

use serde::Serialize;

use super::clock::Offset;
use super::protocol::EngineShort;
use super::result::{Cell, Merged, Missing, Standing, TierResult, Times, VantageResult};
use super::seconds::SecondRow;
use super::state::RunState;
use crate::plan::Plan;
use crate::report::tiers::TiersAnswer;
use crate::report::{EngineHealth, Judgement, Judging, Outcome, TargetInfo, json};
use crate::server_metrics::Account;

/// Facts about its run that the coordinator knows itself.
pub struct About<'a> {
    /// Limits of one host, from the flags.
    pub plan: &'a Plan,
    pub judging: &'a Judging,
    pub target: &'a TargetInfo,
    /// Start of the run since 1970, by the coordinator's clock.
    pub started: Duration,
    /// End of the run, or the current time if it is not over.
    pub finished: Duration,
    /// Rows of all vantages together.
    pub series: &'a [SecondRow],
    /// Figures from the server's own pages, if they were read. Known when the run is over.
    pub server: Option<&'a Account>,
    pub notes: &'a [String],
}

/// Formats the report, indented, with a newline at its end.
pub fn report(merged: &Merged, state: &RunState, about: &About<'_>) -> String {
    json::print(&Document::new(merged, state, about).view())
}

/// Formats the answer to `GET /result`.
pub fn result(merged: &Merged, state: &RunState, about: &About<'_>) -> String {
    let mut document = serde_json::to_value(Document::new(merged, state, about).view())
        .expect("plain data serialises");
    let tiers = || merged.tiers.iter().enumerate();
    let unmeasured: Vec<usize> = tiers()
        .filter(|(_, tier)| !tier.is_known())
        .map(|(at, _)| at)
        .collect();
    document["unmeasured_tiers"] = unmeasured.into();
    document["knee"] = knee(merged).into();
    json::print(&document)
}

/// Returns the participants of the last tier that passed before the first that did not. `None` also
/// if all passed, or if the first did not.
fn knee(merged: &Merged) -> Option<u32> {
    let knee = merged.knee()?;
    let is_last = matches!(knee.answer, TiersAnswer::AllPassed);
    knee.passed
        .filter(|_| !is_last)
        .map(|step| step.participants)
}

/// Parts of the document.
struct Document<'a> {
    outcome: Outcome,
    judgement: Judgement,
    steps: Vec<Judgement>,
    series: &'a [SecondRow],
    hosts: Hosts<'a>,
}

impl<'a> Document<'a> {
    fn new(merged: &'a Merged, state: &RunState, about: &About<'a>) -> Document<'a> {
        Document {
            outcome: outcome(merged, state, about),
            judgement: merged.judgement.clone(),
            steps: merged.begun().map(|tier| tier.judgement.clone()).collect(),
            series: about.series,
            hosts: Hosts::new(merged, about.judging),
        }
    }

    fn view(&self) -> impl Serialize + '_ {
        json::of_many(
            &self.outcome,
            self.judgement.clone(),
            self.steps.clone(),
            self.series,
            &self.hosts,
        )
    }
}

/// Returns the outcome as if one host had made the run.
fn outcome(merged: &Merged, state: &RunState, about: &About<'_>) -> Outcome {
    let mut plan = about.plan.clone();
    if let Some(placed) = state.placed() {
        let run_tag = plan.run_tag;
        plan.follow(placed.scenario.clone(), run_tag);
    }
    let reports = || {
        merged
            .vantages
            .iter()
            .filter_map(|vantage| vantage.report.as_ref())
    };
    let mut failures: Vec<(String, u64)> = Vec::new();
    for (why, count) in reports().flat_map(|report| &report.failures) {
        match failures.iter_mut().find(|(known, _)| known == why) {
            Some((_, sum)) => *sum += count,
            None => failures.push((why.clone(), *count)),
        }
    }
    failures.sort_by(|(_, a), (_, b)| b.cmp(a));
    let named = merged
        .vantages
        .iter()
        .filter_map(|vantage| Some((vantage, vantage.report.as_ref()?)));
    let of_vantages = named.flat_map(|(vantage, report)| {
        report
            .notes
            .iter()
            .map(|note| format!("{}: {note}", vantage.label))
    });
    let notes = about.notes.iter().cloned().chain(of_vantages).collect();
    Outcome {
        started: about.started,
        finished: about.finished,
        plan,
        judging: about.judging.clone(),
        target: about.target.clone(),
        steps: merged.begun().map(|tier| tier.step.clone()).collect(),
        unmeasured: merged.unmeasured.clone(),
        totals: merged.totals.clone(),
        // The rows of many hosts take its place.
        series: Vec::new(),
        engine: engine(merged),
        nearness: None,
        sfu: None,
        complaints: Vec::new(),
        capacity: None,
        server: about.server.cloned(),
        partial: None,
        notes,
        failures,
        participants: Vec::new(),
    }
}

/// Sums the health of all generators. Figures that cannot be added are shown with each vantage.
fn engine(merged: &Merged) -> EngineHealth {
    let shorts: Vec<&EngineShort> = merged
        .vantages
        .iter()
        .filter_map(|vantage| Some(&vantage.report.as_ref()?.engine))
        .collect();
    let named = |vantage: &VantageResult| {
        vantage
            .invalid
            .iter()
            .map(|reason| format!("{}: {reason}", vantage.label))
            .collect::<Vec<_>>()
    };
    let reasons: Vec<String> = merged.vantages.iter().flat_map(named).collect();
    let all_known = !shorts.is_empty() && shorts.len() == merged.vantages.len();
    EngineHealth {
        threads: shorts.iter().map(|short| short.threads as usize).sum(),
        cpu_seconds: shorts
            .iter()
            .map(|short| short.cpu_seconds)
            .sum::<Option<f64>>()
            .filter(|_| all_known),
        valid: reasons.is_empty(),
        reasons,
        ..EngineHealth::default()
    }
}

#[derive(Serialize)]
struct Hosts<'a> {
    phase: &'static str,
    vantages: Vec<VantageResultView<'a>>,
    missing: &'a [Missing],
    combined: Vec<CombinedView<'a>>,
    target_rtt_ms: Option<f64>,
    max_loss: f64,
    dropped: Vec<&'a str>,
}

impl<'a> Hosts<'a> {
    fn new(merged: &'a Merged, judging: &Judging) -> Hosts<'a> {
        Hosts {
            phase: merged.phase.name(),
            vantages: (merged.vantages.iter().enumerate())
                .map(|(at, vantage)| VantageResultView::new(vantage, at, merged))
                .collect(),
            missing: &merged.missing,
            combined: (merged.tiers.iter().enumerate())
                .map(|(at, tier)| CombinedView::new(at, tier, &merged.vantages))
                .collect(),
            target_rtt_ms: judging.target_rtt.map(|target| target.as_secs_f64() * 1e3),
            max_loss: judging.max_loss_pct,
            dropped: merged
                .missing
                .iter()
                .filter_map(|missing| missing.vantage.as_deref())
                .collect(),
        }
    }
}

/// One tier over all vantages, with `voicegw`'s names. Times are in milliseconds, loss is in per
/// cent, and each is the worst of all vantages.
#[derive(Serialize)]
struct CombinedView<'a> {
    tier: usize,
    name: &'a str,
    /// Number of subscribers that were asked for.
    subscribers: u32,
    /// Number of participants of all vantages.
    clients: u32,
    /// Number of vantages that took part.
    vantages: usize,
    measured_vantages: usize,
    rtt_ms: Option<f64>,
    rtt_stat: &'static str,
    loss_pct: Option<f64>,
    quality: &'static str,
    result: Option<&'static str>,
    reasons: &'a [String],
    loss_by_host: Option<LossView<'a>>,
    worst_vantage: Option<WorstCellView<'a>>,
    start_skew_ms_max: Option<f64>,
}

#[derive(Serialize)]
struct LossView<'a> {
    average_pct: f64,
    maximum_pct: f64,
    maximum_at: &'a str,
    minimum_pct: f64,
    minimum_at: &'a str,
}

#[derive(Serialize)]
struct WorstCellView<'a> {
    vantage: &'a str,
    in_what: String,
}

impl<'a> CombinedView<'a> {
    fn new(at: usize, tier: &'a TierResult, vantages: &'a [VantageResult]) -> CombinedView<'a> {
        let took_part = tier
            .cells
            .iter()
            .filter(|cell| !matches!(cell.standing, Standing::Absent | Standing::Awaited));
        let rtt_us = tier.worst_rtt_us();
        let skews = tier.cells.iter().filter_map(|cell| cell.start_skew_us);
        CombinedView {
            tier: at,
            name: &tier.step.name,
            subscribers: tier.subscribers,
            clients: tier.step.participants,
            vantages: took_part.count(),
            measured_vantages: tier.measured().count(),
            rtt_ms: rtt_us.map(|us| us / 1e3),
            rtt_stat: if rtt_us.is_some() {
                "worst_of_n"
            } else {
                "not_measured"
            },
            loss_pct: tier.worst_loss().map(|loss| loss * 1e2),
            quality: tier.worst_quality().name(),
            result: tier.begun.then(|| tier.judgement.verdict.name()),
            reasons: &tier.judgement.reasons,
            loss_by_host: tier.loss_by_host(vantages).map(|loss| LossView {
                average_pct: loss.average * 1e2,
                maximum_pct: loss.maximum.0 * 1e2,
                maximum_at: loss.maximum.1,
                minimum_pct: loss.minimum.0 * 1e2,
                minimum_at: loss.minimum.1,
            }),
            worst_vantage: tier.worst_vantage().map(|(at, in_what)| WorstCellView {
                vantage: &vantages[at].label,
                in_what,
            }),
            start_skew_ms_max: skews
                .max_by_key(|skew_us| skew_us.unsigned_abs())
                .map(millis),
        }
    }
}

#[derive(Serialize)]
struct VantageResultView<'a> {
    vantage: &'a str,
    prober_id: &'a str,
    kind: &'static str,
    version: Option<&'a str>,
    role: &'a str,
    weight: u32,
    /// Verdict of this vantage; `null` if the prober has not reported.
    result: Option<&'static str>,
    reasons: &'a [String],
    /// Whether its generator kept up.
    valid: bool,
    invalid: &'a [String],
    last_heard_at: String,
    missing: bool,
    clock: Option<ClockResultView>,
    start_skew_ms: Option<f64>,
    baseline: Option<CellView<'a>>,
    /// One entry for each tier that it took part in.
    steps: Vec<CellView<'a>>,
    engine: Option<&'a EngineShort>,
}

/// The coordinator's clock minus the vantage's. The true difference lies within the uncertainty on
/// either side.
#[derive(Serialize)]
struct ClockResultView {
    offset_ms: f64,
    uncertainty_ms: f64,
    round_trip_ms: f64,
}

impl From<Offset> for ClockResultView {
    fn from(offset: Offset) -> ClockResultView {
        ClockResultView {
            offset_ms: millis(offset.offset_us),
            uncertainty_ms: offset.uncertainty_us as f64 / 1e3,
            round_trip_ms: offset.round_trip_us as f64 / 1e3,
        }
    }
}

impl<'a> VantageResultView<'a> {
    fn new(vantage: &'a VantageResult, at: usize, merged: &'a Merged) -> VantageResultView<'a> {
        let label = vantage.label.as_str();
        let report = vantage.report.as_ref();
        let part = |tier: &&TierResult| {
            !matches!(
                tier.cells[at].standing,
                Standing::Absent | Standing::Awaited
            )
        };
        VantageResultView {
            vantage: label,
            prober_id: &vantage.prober_id,
            kind: if vantage.is_legacy {
                "voicegw"
            } else {
                "throng"
            },
            version: vantage.version.as_deref(),
            role: vantage.role,
            weight: vantage.weight,
            result: report.map(|report| report.verdict.0.name()),
            reasons: report.map_or(&[], |report| &report.reasons),
            valid: vantage.invalid.is_empty(),
            invalid: &vantage.invalid,
            last_heard_at: json::rfc_3339(vantage.last_heard),
            missing: merged
                .missing
                .iter()
                .any(|missing| missing.vantage.as_deref() == Some(label)),
            clock: vantage.clock.map(ClockResultView::from),
            start_skew_ms: vantage.start_skew_us.map(millis),
            baseline: vantage
                .baseline
                .as_ref()
                .map(|cell| CellView::new("baseline", cell, vantage)),
            steps: (merged.tiers.iter().filter(part))
                .map(|tier| CellView::new(&tier.step.name, &tier.cells[at], vantage))
                .collect(),
            engine: report.map(|report| &report.engine),
        }
    }
}

/// One vantage in one tier. The fields with `voicegw`'s names come first.
#[derive(Serialize)]
struct CellView<'a> {
    clients: u32,
    rtt_ms: Option<f64>,
    loss_pct: Option<f64>,
    quality: &'static str,
    /// Number of round trips that `rtt_ms` is based on.
    samples: u64,
    rtt_stat: &'static str,
    name: &'a str,
    standing: Standing,
    seconds: f64,
    result: Option<&'static str>,
    reasons: &'a [String],
    packets_sent: u64,
    packets_received: u64,
    start_skew_ms: Option<f64>,
    /// Percentiles in microseconds; `null` if nothing was expected.
    join: Option<Times>,
    rtt: Option<Times>,
    audio_one_way_latency: Option<Times>,
    video_one_way_latency: Option<Times>,
}

impl<'a> CellView<'a> {
    fn new(name: &'a str, cell: &'a Cell, vantage: &VantageResult) -> CellView<'a> {
        let times = |times: Times| (times.expected > 0).then_some(times);
        let judged = matches!(cell.standing, Standing::Measured | Standing::Invalid);
        let rtt_stat = match (cell.rtt_us, vantage.is_legacy) {
            (None, _) => "not_measured",
            (Some(_), true) => "as_reported",
            (Some(_), false) => "p95",
        };
        CellView {
            clients: cell.participants,
            rtt_ms: cell.rtt_us.map(|us| us / 1e3),
            loss_pct: cell.loss.map(|loss| loss * 1e2),
            quality: cell.quality.name(),
            samples: cell.round_trips,
            rtt_stat,
            name,
            standing: cell.standing,
            seconds: cell.seconds,
            result: judged.then(|| cell.judgement.verdict.name()),
            reasons: if judged { &cell.judgement.reasons } else { &[] },
            packets_sent: cell.packets_sent,
            packets_received: cell.packets_received,
            start_skew_ms: cell.start_skew_us.map(millis),
            join: times(cell.join),
            rtt: times(cell.rtt),
            audio_one_way_latency: times(cell.audio_latency),
            video_one_way_latency: times(cell.video_latency),
        }
    }
}

fn millis(micros: i64) -> f64 {
    micros as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;
    use crate::coordinator::canned::{self, Canned, WELL};
    use crate::coordinator::protocol::LiveSecond;
    use crate::plan::{ConnectionMode, HostRole};
    use crate::report::TargetKind;

    fn with_about<R>(canned: &Canned, look: impl FnOnce(&Merged, &RunState, &About<'_>) -> R) -> R {
        let judging = canned::judging();
        let about = About {
            plan: &Plan {
                connection: ConnectionMode::Auto,
                ..crate::plan::tests::plan()
            },
            judging: &judging,
            target: &TargetInfo {
                kind: TargetKind::LiveKit,
                server_version: None,
                addresses: Vec::new(),
            },
            started: Duration::from_micros(canned::START_US),
            finished: Duration::from_micros(canned.now_us),
            series: &[],
            server: None,
            notes: &[],
        };
        look(&Merged::new(&canned.state, &judging), &canned.state, &about)
    }

    fn report_of(canned: &Canned) -> Value {
        serde_json::from_str(&with_about(canned, report)).unwrap()
    }

    fn result_of(canned: &Canned) -> Value {
        serde_json::from_str(&with_about(canned, result)).unwrap()
    }

    fn assert_valid(report: &Value) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fixtures/schema/throng-report-1.schema.json");
        let schema = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let validator = jsonschema::draft202012::new(&schema).unwrap();
        let errors: Vec<String> = validator
            .iter_errors(report)
            .map(|error| format!("{}: {error}", error.instance_path()))
            .collect();
        assert!(errors.is_empty(), "{errors:#?}");
    }

    #[test]
    fn the_report_of_many_hosts_obeys_the_schema_however_far_they_came() {
        assert_valid(&report_of(&canned::over()));
        assert_valid(&report_of(&Canned::gathering(&[10], 3)));
        let mut canned = Canned::armed(&[10, 25], &[("fra", Some(HostRole::Both)), ("vg", None)]);
        assert_valid(&report_of(&canned));
        canned.beat(
            0,
            vec![WELL.so_far(canned::TIER, false)],
            LiveSecond::default(),
        );
        canned.loses(0);
        assert_valid(&report_of(&canned));
        canned.is_over();
        let report = report_of(&canned);
        assert_valid(&report);
        assert_eq!(
            (&report["result"], &report["dropped"]),
            (&json!("PARTIAL"), &json!(["fra", "vg"]))
        );
    }

    #[test]
    fn voicegw_finds_its_fields_by_their_names_and_types() {
        let result = result_of(&canned::over());
        assert_eq!(
            result["knee"],
            json!(33),
            "participants of the last tier that passed"
        );
        assert_eq!(
            (&result["unmeasured_tiers"], &result["dropped"]),
            (&json!([]), &json!([]))
        );
        assert_eq!(
            (&result["max_loss"], &result["target_rtt_ms"]),
            (&json!(1.0), &json!(null))
        );
        let tier = &result["combined"][1];
        assert_eq!(
            (
                &tier["tier"],
                &tier["clients"],
                &tier["vantages"],
                &tier["measured_vantages"]
            ),
            (&json!(1), &json!(78), &json!(3), &json!(3))
        );
        assert_eq!(
            (&tier["rtt_stat"], &tier["quality"]),
            (&json!("worst_of_n"), &json!("Poor"))
        );
        assert_eq!(tier["loss_pct"], json!(3.1));
        assert!(tier["rtt_ms"].as_f64().unwrap() > 250.0);
        assert_eq!(tier["loss_by_host"]["maximum_at"], "sin");
        assert_eq!(tier["worst_vantage"]["vantage"], "sin");
        let step = &result["vantages"][2]["steps"][1];
        assert_eq!(
            (&step["clients"], &step["samples"], &step["quality"]),
            (&json!(25), &json!(100), &json!("Poor"))
        );
        assert_eq!(result["vantages"][2]["vantage"], "sin");
        assert_eq!(
            result["vantages"][0]["baseline"]["clients"],
            json!(4),
            "with its publishers"
        );
    }

    #[test]
    fn no_reader_takes_what_was_not_measured_for_a_fast_tier() {
        let mut canned = Canned::gathering(&[10, 25], 1);
        canned.is_over();
        let result = result_of(&canned);
        assert_eq!(
            (&result["knee"], &result["unmeasured_tiers"]),
            (&json!(null), &json!([0, 1]))
        );
        for tier in result["combined"].as_array().unwrap() {
            assert_eq!(
                (&tier["rtt_ms"], &tier["loss_pct"], &tier["rtt_stat"]),
                (&json!(null), &json!(null), &json!("not_measured"))
            );
            assert_eq!(
                (&tier["quality"], &tier["result"]),
                (&json!("Unknown"), &json!(null))
            );
        }
        assert_eq!(
            result["missing"],
            json!([{"vantage": null, "last_heard_at": null, "stage": null, "why": "an expected prober never came"}])
        );
    }

    #[test]
    fn a_report_has_the_knee_of_every_report_and_merged_histograms() {
        let report = report_of(&canned::over());
        assert_eq!(
            (&report["knee"]["answer"], &report["knee"]["participants"]),
            (&json!("found"), &json!(33))
        );
        assert_eq!(
            report["steps"][0]["session"]["rtt_rtcp"]["count"],
            json!(300)
        );
        assert_eq!(report["steps"][1]["result"], "FAIL");
        assert_eq!(
            (
                &report["engine"]["threads"],
                &report["engine"]["cpu_seconds"]
            ),
            (&json!(6), &json!(37.5))
        );
    }
}
