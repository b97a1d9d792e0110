//! Merged result of all vantages: merged tier by tier, judged, and compared side by side.
//!
//! **What counts.** The figures of a tier contain the records of the *measured* vantages: those
//! that held the tier to its end with a generator that kept up. Two kinds of records are shown
//! beside them under their own name, and are included in the totals of the run: what a vantage sent
//! before it went missing, and what a vantage measured whose generator was the limit.
//!
//! **The verdict of a tier.** The first case that applies decides, from the one that leaves most
//! unknown to the one that leaves least:
//! 1. PARTIAL: a vantage with a part in the tier did not hold it to its end. If a threshold ended
//!    the tier, it is FAIL instead.
//! 2. FAIL: the measurements, merged or of one vantage alone, exceed a limit. There is one
//!    exception. If a generator that was the limit sent media into the same rooms, it may have
//!    caused the failures of the others, so they prove nothing. Then the verdict is INVALID.
//! 3. INVALID: a vantage's generator was the limit.
//! 4. PASS: every vantage measured the tier, and all limits hold.
//!
//! **The verdict of the run**: FAIL if a tier failed; else PARTIAL if something was not held that
//! should have been; else INVALID, else PASS.

use std::time::Duration;

use serde::Serialize;

use super::clock::Offset;
use super::protocol::{ClientStep, FinalReport, StageKind, TierReport, TierSoFar};
use super::state::{ProberState, RunPhase, RunState};
use crate::measure::{Histogram, Media, Record};
use crate::report::judge::{LossShares, judge_tier};
use crate::report::tiers::Knee;
use crate::report::{Judgement, Judging, Step, TierFacts, Unmeasured, Verdict};

/// Result of a run over many hosts, as far as it has come.
pub struct Merged {
    pub phase: RunPhase,
    pub judgement: Judgement,
    /// All planned tiers, in order.
    pub tiers: Vec<TierResult>,
    /// Tiers that nobody came to.
    pub unmeasured: Vec<Unmeasured>,
    /// Vantages in the order of their registration.
    pub vantages: Vec<VantageResult>,
    pub missing: Vec<Missing>,
    /// Sum of everything that was acknowledged, even if it does not count.
    pub totals: Step,
}

/// One tier over all vantages.
pub struct TierResult {
    /// Number of subscribers that were asked for ([`super::place::HostsLoad::tiers`]).
    pub subscribers: u32,
    /// Whether anybody came to the tier.
    pub begun: bool,
    /// Figures merged over the measured vantages. `participants` counts all that took part.
    pub step: Step,
    pub judgement: Judgement,
    /// One cell for each vantage.
    pub cells: Vec<Cell>,
}

/// Figures of one vantage in one tier, or in the baseline.
#[derive(Clone, Debug)]
pub struct Cell {
    pub standing: Standing,
    pub participants: u32,
    pub seconds: f64,
    /// Judgement of this vantage alone.
    pub judgement: Judgement,
    /// 95th percentile of round trips by RTCP; for a `voicegw` prober the value that it reported.
    pub rtt_us: Option<f64>,
    pub round_trips: u64,
    /// Loss, 0 to 1: the worse of residual packet loss and undelivered frames, of the worse kind of
    /// media. `None` if it is not known, or if nothing is received.
    pub loss: Option<f64>,
    pub quality: QualityRank,
    pub join: Times,
    pub rtt: Times,
    pub audio_latency: Times,
    pub video_latency: Times,
    pub packets_sent: u64,
    pub packets_received: u64,
    /// How late this vantage began the stage, by its own clock; negative: early.
    pub start_skew_us: Option<i64>,
}

/// How much of a tier a vantage measured, and whether it counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// The vantage held the tier to its end, and its generator kept up.
    Measured,
    /// The generator of this vantage was the limit.
    Invalid,
    /// The tier was broken off.
    Incomplete,
    /// Nothing came from the vantage.
    Absent,
    /// The tier is not over yet, or still to come.
    Awaited,
}

/// Ranks from best to worst, as `voicegw` ranks what LiveKit's clients say about their connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum QualityRank {
    /// Loss is at most a tenth of the limit, and round trips are at most half of it.
    Excellent,
    /// All figures are within the limits.
    Good,
    Unknown,
    /// Loss or round trips exceed the limit.
    Poor,
    /// Nobody got in, or nothing was received.
    Lost,
}

/// Percentiles of one histogram, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Times {
    pub expected: u64,
    pub count: u64,
    pub p50: Option<u64>,
    pub p95: Option<u64>,
    pub p99: Option<u64>,
}

/// Result of one host.
pub struct VantageResult {
    pub label: String,
    pub prober_id: String,
    /// Whether it is `voicegw`'s own prober, which reports round trips and plays no media.
    pub is_legacy: bool,
    pub version: Option<String>,
    pub role: &'static str,
    pub weight: u32,
    /// One subscriber alone, before the first tier.
    pub baseline: Option<Cell>,
    pub clock: Option<Offset>,
    /// The start skew furthest from zero, over all stages.
    pub start_skew_us: Option<i64>,
    pub last_heard: Duration,
    /// Reasons why its generator was the limit; empty if it was not.
    pub invalid: Vec<String>,
    pub report: Option<FinalReport>,
}

/// An expected host that did not stay to the end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Missing {
    /// Label of the host; `null` for one or several hosts that never came, so that their names are
    /// unknown.
    pub vantage: Option<String>,
    /// Time since 1970, by the coordinator's clock.
    #[serde(rename = "last_heard_at", serialize_with = "moment")]
    pub last_heard: Option<Duration>,
    /// Stage that the host was in.
    pub stage: Option<String>,
    pub why: String,
}

/// Loss, compared between hosts.
#[derive(Clone, Debug, PartialEq)]
pub struct LossByHost<'a> {
    /// Average over hosts, each with the same weight.
    pub average: f64,
    pub maximum: (f64, &'a str),
    pub minimum: (f64, &'a str),
}

impl Merged {
    pub fn new(state: &RunState, judging: &Judging) -> Merged {
        let stages = state.stages();
        let stage_of = |kind: StageKind, nth: usize| {
            let found = stages
                .iter()
                .enumerate()
                .filter(|(_, stage)| stage.kind == kind)
                .nth(nth);
            found.map(|(stage, _)| stage as u32)
        };
        let vantages: Vec<VantageResult> = state
            .probers()
            .iter()
            .map(|prober| {
                VantageResult::new(prober, stage_of(StageKind::Baseline, 0), state, judging)
            })
            .collect();
        let tiers: Vec<TierResult> = (state.setup().load.tiers().into_iter().enumerate())
            .map(|(index, subscribers)| {
                let stage = stage_of(StageKind::Tier, index);
                let cells = state
                    .probers()
                    .iter()
                    .map(|prober| SeenCell::tier(prober, index, stage, state, judging))
                    .collect();
                let ended_by = broken_in(state, stage);
                TierResult::new(
                    format!("tier {}", index + 1),
                    subscribers,
                    cells,
                    ended_by,
                    state,
                    judging,
                )
            })
            .collect();
        let missing = missing(state);
        let judgement = overall(state, &tiers, &vantages, &missing);
        Merged {
            phase: state.phase().clone(),
            judgement,
            totals: totals(state),
            unmeasured: tiers
                .iter()
                .filter(|tier| !tier.begun)
                .map(TierResult::as_unmeasured)
                .collect(),
            tiers,
            vantages,
            missing,
        }
    }

    /// Returns the tiers that somebody came to.
    pub fn begun(&self) -> impl Iterator<Item = &TierResult> {
        self.tiers.iter().filter(|tier| tier.begun)
    }

    /// Returns the knee: the last tier that passed before the first one that did not; `None` for a
    /// run without tiers.
    pub fn knee(&self) -> Option<Knee<'_>> {
        let tiers = self
            .begun()
            .map(|tier| (&tier.step, tier.judgement.clone()));
        Knee::among(tiers.collect(), &self.unmeasured)
    }
}

/// A cell with its vantage's label and its record.
struct SeenCell {
    label: String,
    cell: Cell,
    record: Option<Record>,
}

impl SeenCell {
    fn tier(
        prober: &ProberState,
        index: usize,
        stage: Option<u32>,
        state: &RunState,
        judging: &Judging,
    ) -> SeenCell {
        if prober.is_legacy() {
            let step = prober.report.as_ref().map(|report| report.steps.get(index));
            return SeenCell::legacy(prober, step, state, judging);
        }
        SeenCell::held(prober, stage, state, judging)
    }

    /// Returns the cell of one of our probers in a baseline or a tier.
    fn held(
        prober: &ProberState,
        stage: Option<u32>,
        state: &RunState,
        judging: &Judging,
    ) -> SeenCell {
        let full = prober
            .report
            .as_ref()
            .and_then(|report| report.throng.as_ref());
        let judged = full.and_then(|full| {
            full.tiers
                .iter()
                .find(|tier| Some(tier.measured.stage) == stage)
        });
        let so_far = judged
            .map(|tier| &tier.measured)
            .or_else(|| prober.tiers.get(&stage?));
        let is_coming = prober.is_live() && *state.phase() != RunPhase::Over;
        let start_skew_us = stage.and_then(|stage| prober.starts.get(&stage).copied());
        let Some(so_far) = so_far else {
            let standing = if is_coming {
                Standing::Awaited
            } else {
                Standing::Absent
            };
            return SeenCell::without_record(prober, standing, start_skew_us);
        };
        let invalid = invalid(prober, judged);
        let standing = match (so_far.complete, invalid.is_empty()) {
            (false, _) if is_coming => Standing::Awaited,
            (false, _) => Standing::Incomplete,
            (true, false) => Standing::Invalid,
            (true, true) => Standing::Measured,
        };
        let step = step_of(so_far);
        let mut judgement = judge_tier(&step, judging);
        judged
            .into_iter()
            .for_each(|judged| add_own_failure(&mut judgement, judged));
        if standing == Standing::Invalid {
            judgement.verdict = Verdict::Invalid;
            judgement.reasons.splice(0..0, invalid);
        }
        SeenCell {
            label: prober.vantage.clone(),
            cell: Cell {
                start_skew_us,
                ..Cell::new(standing, &step, judgement, judging)
            },
            record: Some(step.record),
        }
    }

    /// Returns the cell of a `voicegw` prober in a tier. A `step` of `Some(None)` means that its
    /// report exists and does not contain the tier.
    fn legacy(
        prober: &ProberState,
        step: Option<Option<&ClientStep>>,
        state: &RunState,
        judging: &Judging,
    ) -> SeenCell {
        let is_coming = prober.is_live() && *state.phase() != RunPhase::Over;
        let Some(Some(step)) = step else {
            let standing = if is_coming {
                Standing::Awaited
            } else {
                Standing::Absent
            };
            return SeenCell::without_record(prober, standing, None);
        };
        // `voicegw` writes 0 if no round trip came back.
        let rtt_ms = step
            .rtt_ms
            .filter(|rtt_ms| *rtt_ms > 0.0 && step.samples != Some(0));
        let limit_ms = judging.target_rtt.map(|target| target.as_secs_f64() * 1e3);
        let quality = QualityRank::of_name(step.quality.as_deref());
        let mut reasons = Vec::new();
        if let (Some(rtt), Some(limit)) = (
            rtt_ms,
            limit_ms.filter(|limit| rtt_ms.is_some_and(|rtt| rtt > *limit)),
        ) {
            reasons.push(format!("round trips take {rtt} ms, more than {limit} ms"));
        }
        if quality >= QualityRank::Poor {
            reasons.push(format!(
                "its clients call their connection {}",
                quality.name()
            ));
        }
        let standing = match rtt_ms {
            Some(_) => Standing::Measured,
            None => Standing::Incomplete,
        };
        SeenCell {
            label: prober.vantage.clone(),
            cell: Cell {
                participants: step.clients,
                judgement: judgement(reasons),
                rtt_us: rtt_ms.map(|ms| ms * 1e3),
                round_trips: step.samples.unwrap_or(0),
                quality,
                ..Cell::empty(standing)
            },
            record: None,
        }
    }

    fn without_record(
        prober: &ProberState,
        standing: Standing,
        start_skew_us: Option<i64>,
    ) -> SeenCell {
        SeenCell {
            label: prober.vantage.clone(),
            cell: Cell {
                start_skew_us,
                ..Cell::empty(standing)
            },
            record: None,
        }
    }

    /// Returns whether this generator may have spoilt the others' figures. The media of an invalid
    /// generator comes late or not at all, and the others count it as missing.
    fn may_spoil_others(&self) -> bool {
        let sent = |record: &Record| record.audio.packets_sent + record.video.packets_sent > 0;
        self.cell.standing == Standing::Invalid && self.record.as_ref().is_some_and(sent)
    }
}

impl Cell {
    fn empty(standing: Standing) -> Cell {
        Cell {
            standing,
            participants: 0,
            seconds: 0.0,
            judgement: judgement(Vec::new()),
            rtt_us: None,
            round_trips: 0,
            loss: None,
            quality: QualityRank::Unknown,
            join: Times::default(),
            rtt: Times::default(),
            audio_latency: Times::default(),
            video_latency: Times::default(),
            packets_sent: 0,
            packets_received: 0,
            start_skew_us: None,
        }
    }

    fn new(standing: Standing, step: &Step, judgement: Judgement, judging: &Judging) -> Cell {
        let Record {
            session,
            audio,
            video,
            ..
        } = &step.record;
        let loss = worse_loss([audio, video]);
        let rtt_us = session.rtt_rtcp.quantile(0.95);
        Cell {
            standing,
            participants: step.participants,
            seconds: step.seconds,
            judgement,
            rtt_us: rtt_us.map(|us| us as f64),
            round_trips: session.rtt_rtcp.count(),
            loss,
            quality: QualityRank::of_record(&step.record, loss, judging),
            join: Times::of(&session.join),
            rtt: Times::of(&session.rtt_rtcp),
            audio_latency: Times::of(&audio.one_way_latency),
            video_latency: Times::of(&video.one_way_latency),
            packets_sent: audio.packets_sent + video.packets_sent,
            packets_received: audio.packets_received + video.packets_received,
            start_skew_us: None,
        }
    }

    /// Returns the latency of the kind of media with the higher one.
    pub fn latency(&self) -> Times {
        if self.audio_latency.p99.unwrap_or(0) >= self.video_latency.p99.unwrap_or(0)
            && self.audio_latency.expected > 0
        {
            self.audio_latency
        } else {
            self.video_latency
        }
    }
}

impl Times {
    fn of(histogram: &Histogram) -> Times {
        Times {
            expected: histogram.expected(),
            count: histogram.count(),
            p50: histogram.quantile(0.5),
            p95: histogram.quantile(0.95),
            p99: histogram.quantile(0.99),
        }
    }
}

impl QualityRank {
    pub const fn name(self) -> &'static str {
        match self {
            QualityRank::Excellent => "Excellent",
            QualityRank::Good => "Good",
            QualityRank::Unknown => "Unknown",
            QualityRank::Poor => "Poor",
            QualityRank::Lost => "Lost",
        }
    }

    /// Parses `voicegw`'s name of a rank. An unknown name is `Unknown`.
    fn of_name(name: Option<&str>) -> QualityRank {
        let all = [
            QualityRank::Excellent,
            QualityRank::Good,
            QualityRank::Poor,
            QualityRank::Lost,
        ];
        all.into_iter()
            .find(|quality| Some(quality.name()) == name)
            .unwrap_or(QualityRank::Unknown)
    }

    /// Ranks the counts of a tier.
    pub fn of_record(record: &Record, loss: Option<f64>, judging: &Judging) -> QualityRank {
        let Record {
            session,
            audio,
            video,
            ..
        } = record;
        let (expected, live) = (
            audio.tracks_expected + video.tracks_expected,
            audio.tracks_live + video.tracks_live,
        );
        if (session.joins_planned > 0 && session.joins_ok == 0) || (expected > 0 && live == 0) {
            return QualityRank::Lost;
        }
        let rtt = session.rtt_rtcp.quantile(0.95).map(|us| us as f64);
        let target = judging.target_rtt.map(|target| target.as_secs_f64() * 1e6);
        // If a judged figure is unknown, the quality is unknown.
        let of_limit = |value: Option<f64>, limit: Option<f64>, applies: bool| match (value, limit)
        {
            (_, None) => Some(0.0),
            (None, Some(_)) => (!applies).then_some(0.0),
            (Some(value), Some(limit)) if value <= limit => {
                Some(value / limit.max(f64::MIN_POSITIVE))
            }
            _ => Some(f64::INFINITY),
        };
        let loss = of_limit(loss, Some(judging.max_loss_pct / 100.0), expected > 0);
        let rtt = of_limit(rtt, target, true);
        match (loss, rtt) {
            (Some(f64::INFINITY), _) | (_, Some(f64::INFINITY)) => QualityRank::Poor,
            (None, _) | (_, None) => QualityRank::Unknown,
            _ if expected == 0 && target.is_none() => QualityRank::Unknown,
            (Some(loss), Some(rtt)) if loss <= 0.1 && rtt <= 0.5 => QualityRank::Excellent,
            _ => QualityRank::Good,
        }
    }
}

impl VantageResult {
    fn new(
        prober: &ProberState,
        baseline: Option<u32>,
        state: &RunState,
        judging: &Judging,
    ) -> VantageResult {
        let report = prober.report.as_ref();
        let baseline = if prober.is_legacy() {
            report
                .and_then(|report| report.baseline.as_ref())
                .map(|step| SeenCell::legacy(prober, Some(Some(step)), state, judging))
        } else {
            baseline.map(|stage| SeenCell::held(prober, Some(stage), state, judging))
        };
        VantageResult {
            label: prober.vantage.clone(),
            prober_id: prober.id.to_string(),
            is_legacy: prober.is_legacy(),
            version: prober.register.version.clone(),
            role: prober.register.role.name(),
            weight: prober.register.weight,
            baseline: baseline.map(|seen| seen.cell),
            clock: prober.offset(),
            start_skew_us: prober
                .starts
                .values()
                .copied()
                .max_by_key(|skew_us| skew_us.unsigned_abs()),
            last_heard: Duration::from_micros(prober.heard_us),
            invalid: invalid(prober, None),
            report: report.and_then(|report| report.throng.clone()),
        }
    }
}

impl TierResult {
    /// `ended_by` has the vantage that ended the run in this tier, and the threshold that failed
    /// there.
    fn new(
        name: String,
        subscribers: u32,
        seen: Vec<SeenCell>,
        ended_by: Option<(&str, &str)>,
        state: &RunState,
        judging: &Judging,
    ) -> TierResult {
        let mut step = Step {
            name,
            tier: Some(TierFacts::default()),
            ..Step::default()
        };
        for SeenCell { cell, record, .. } in &seen {
            step.participants = step.participants.saturating_add(cell.participants);
            if let (Standing::Measured, Some(record)) = (cell.standing, record) {
                step.record.merge(record);
                step.seconds = step.seconds.max(cell.seconds);
            }
        }
        let begun = seen
            .iter()
            .any(|seen| seen.cell.participants > 0 || seen.record.is_some());
        let judgement = if begun {
            judge_merged(&seen, &step, ended_by, state, judging)
        } else {
            Judgement {
                verdict: Verdict::Partial,
                reasons: vec!["it was not held".to_owned()],
            }
        };
        TierResult {
            subscribers,
            begun,
            judgement,
            cells: seen.into_iter().map(|seen| seen.cell).collect(),
            step,
        }
    }

    /// Returns whether the tier says anything about the server.
    pub fn is_known(&self) -> bool {
        matches!(self.judgement.verdict, Verdict::Pass | Verdict::Fail)
    }

    fn as_unmeasured(&self) -> Unmeasured {
        Unmeasured {
            name: self.step.name.clone(),
            subscribers: None,
        }
    }

    pub fn measured(&self) -> impl Iterator<Item = (usize, &Cell)> {
        self.cells
            .iter()
            .enumerate()
            .filter(|(_, cell)| cell.standing == Standing::Measured)
    }

    /// Returns the slowest round trips of any vantage; `None` if none was measured.
    pub fn worst_rtt_us(&self) -> Option<f64> {
        self.measured()
            .filter_map(|(_, cell)| cell.rtt_us)
            .reduce(f64::max)
    }

    pub fn worst_loss(&self) -> Option<f64> {
        self.measured()
            .filter_map(|(_, cell)| cell.loss)
            .reduce(f64::max)
    }

    pub fn worst_quality(&self) -> QualityRank {
        self.measured()
            .map(|(_, cell)| cell.quality)
            .max()
            .unwrap_or(QualityRank::Unknown)
    }

    /// Returns the loss over the measured vantages whose loss is known; `None` if there are none.
    pub fn loss_by_host<'a>(&self, vantages: &'a [VantageResult]) -> Option<LossByHost<'a>> {
        let known: Vec<(f64, &str)> = self
            .measured()
            .filter_map(|(at, cell)| Some((cell.loss?, vantages[at].label.as_str())))
            .collect();
        let by_loss = |a: &&(f64, &str), b: &&(f64, &str)| a.0.total_cmp(&b.0);
        Some(LossByHost {
            average: known.iter().map(|(loss, _)| loss).sum::<f64>() / known.len() as f64,
            maximum: *known.iter().max_by(by_loss)?,
            minimum: *known.iter().min_by(by_loss)?,
        })
    }

    /// Returns the vantage with the worst result, and what was worst: a vantage that fails, else
    /// the one that loses most, else the one with the slowest round trips.
    pub fn worst_vantage(&self) -> Option<(usize, String)> {
        let fails = |cell: &Cell| cell.judgement.verdict == Verdict::Fail;
        let (loss, rtt_us) = (
            |cell: &Cell| cell.loss.unwrap_or(0.0),
            |cell: &Cell| cell.rtt_us.unwrap_or(0.0),
        );
        let (at, cell) = self.measured().max_by(|(_, a), (_, b)| {
            fails(a)
                .cmp(&fails(b))
                .then(loss(a).total_cmp(&loss(b)))
                .then(rtt_us(a).total_cmp(&rtt_us(b)))
        })?;
        let in_what = match (
            cell.judgement.reasons.first(),
            cell.loss.filter(|loss| *loss > 0.0),
            cell.rtt_us,
        ) {
            (Some(reason), ..) => reason.clone(),
            (None, Some(loss), _) => format!("loss {}", crate::words::percent(loss)),
            (None, None, Some(rtt)) => format!("round trips {}", crate::words::micros(rtt)),
            (None, None, None) => return None,
        };
        Some((at, in_what))
    }
}

/// Adds a failure that only the host itself can judge, because the record does not show it: who
/// stayed and who dropped out.
fn add_own_failure(judgement: &mut Judgement, judged: &TierReport) {
    if judged.verdict.0 != Verdict::Fail {
        return;
    }
    judgement.verdict = Verdict::Fail;
    let unknown: Vec<String> = judged
        .reasons
        .iter()
        .filter(|reason| !judgement.reasons.contains(reason))
        .cloned()
        .collect();
    judgement.reasons.extend(unknown);
}

/// Grounds against a tier, grouped by the verdict that they lead to.
#[derive(Default)]
struct VerdictGrounds {
    broken_off: Vec<String>,
    failed: Vec<String>,
    invalid: Vec<String>,
}

impl VerdictGrounds {
    /// Collects the grounds of each vantage. Vantages that were `expected` and did not come have
    /// none of their own.
    fn of_cells(seen: &[SeenCell], expected: usize) -> VerdictGrounds {
        let mut grounds = VerdictGrounds::default();
        let VerdictGrounds {
            broken_off,
            failed,
            invalid,
        } = &mut grounds;
        for SeenCell { label, cell, .. } in seen {
            let named = |reason: &String| format!("{label}: {reason}");
            match cell.standing {
                Standing::Measured => failed.extend(cell.judgement.reasons.iter().map(named)),
                Standing::Invalid => invalid.extend(cell.judgement.reasons.first().map(named)),
                Standing::Incomplete if cell.seconds > 0.0 => {
                    broken_off.push(format!("{label} broke off after {:.0} s", cell.seconds))
                }
                Standing::Incomplete => {
                    broken_off.push(format!("{label}: no round trip was measured"))
                }
                Standing::Absent => broken_off.push(format!("{label} did not take part")),
                Standing::Awaited => broken_off.push(format!("{label} is not through yet")),
            }
        }
        let never_came = expected.saturating_sub(seen.len());
        if never_came > 0 {
            broken_off.push(format!("{never_came} of {expected} probers did not come"));
        }
        grounds
    }
}

/// Returns the limits that are broken by the merged figures. Empty for a single vantage, because it
/// would repeat its own.
fn failures_together(seen: &[SeenCell], merged: &Step, judging: &Judging) -> Vec<String> {
    let recorded = seen
        .iter()
        .filter(|seen| seen.cell.standing == Standing::Measured && seen.record.is_some())
        .count();
    if recorded <= 1 {
        return Vec::new();
    }
    judge_tier(merged, judging)
        .reasons
        .into_iter()
        .map(|reason| format!("together: {reason}"))
        .collect()
}

fn judge_merged(
    seen: &[SeenCell],
    merged: &Step,
    ended_by: Option<(&str, &str)>,
    state: &RunState,
    judging: &Judging,
) -> Judgement {
    let VerdictGrounds {
        broken_off,
        mut failed,
        invalid,
    } = VerdictGrounds::of_cells(seen, state.setup().expect as usize);
    failed.splice(0..0, failures_together(seen, merged, judging));
    let spoilt = !state.setup().load.rooms_apart && seen.iter().any(SeenCell::may_spoil_others);
    // If the ending vantage's generator was the limit, the end proves nothing either.
    let is_valid = |vantage: &str| {
        seen.iter()
            .any(|seen| seen.label == vantage && seen.cell.standing != Standing::Invalid)
    };
    let ended_by = ended_by.filter(|(vantage, _)| is_valid(vantage));
    if let Some((vantage, threshold)) = ended_by {
        let why = format!("{vantage}: {threshold}");
        failed.retain(|known| *known != why);
        failed.insert(0, why);
    }
    let verdict = match (
        broken_off.is_empty() || ended_by.is_some(),
        failed.is_empty(),
        invalid.is_empty(),
    ) {
        (false, ..) => Verdict::Partial,
        (true, false, _) if !spoilt => Verdict::Fail,
        (true, _, false) => Verdict::Invalid,
        (true, _, true) => Verdict::Pass,
    };
    let reasons = match verdict {
        Verdict::Fail => failed
            .into_iter()
            .chain(broken_off)
            .chain(invalid)
            .collect(),
        _ => broken_off
            .into_iter()
            .chain(invalid)
            .chain(failed)
            .collect(),
    };
    Judgement { verdict, reasons }
}

/// Returns the vantage and the threshold that ended the run, if that was in this stage. No stage is
/// ordered after it.
fn broken_in(state: &RunState, stage: Option<u32>) -> Option<(&str, &str)> {
    state
        .broken()
        .filter(|_| stage.is_some() && state.underway().map(|underway| underway.stage) == stage)
}

fn overall(
    state: &RunState,
    tiers: &[TierResult],
    vantages: &[VantageResult],
    missing: &[Missing],
) -> Judgement {
    let of_tiers = |verdict: Verdict| reasons_of_tiers(tiers, verdict);
    let mut invalid = of_tiers(Verdict::Invalid);
    for VantageResult {
        label,
        invalid: limits,
        ..
    } in vantages
    {
        if invalid.is_empty() {
            invalid.extend(limits.iter().map(|reason| format!("{label}: {reason}")));
        }
    }
    // Two failures show in no tier: the generator was the limit while participants joined, or the
    // run failed as a whole.
    let spoilt = !state.setup().load.rooms_apart
        && vantages.iter().any(|vantage| !vantage.invalid.is_empty());
    let (failed, failed_as_a_whole) = (of_tiers(Verdict::Fail), failures_as_a_whole(vantages));
    let has_failed = !failed.is_empty() || (!failed_as_a_whole.is_empty() && !spoilt);
    let failed = if failed.is_empty() {
        failed_as_a_whole
    } else {
        failed
    };
    let mut early = early_ends(state, vantages, missing);
    early.extend(of_tiers(Verdict::Partial));
    if tiers.is_empty() && early.is_empty() {
        return Judgement {
            verdict: Verdict::Partial,
            reasons: vec!["nothing was measured".to_owned()],
        };
    }
    let (verdict, reasons) = match (has_failed, early.is_empty(), invalid.is_empty()) {
        (true, ..) => (Verdict::Fail, [failed, early, invalid].concat()),
        (false, false, _) => (Verdict::Partial, [early, invalid, failed].concat()),
        (false, true, false) => (Verdict::Invalid, [invalid, failed].concat()),
        (false, true, true) => (Verdict::Pass, Vec::new()),
    };
    Judgement { verdict, reasons }
}

/// Returns the reasons why the run, or a host's part in it, ended early.
fn early_ends(state: &RunState, vantages: &[VantageResult], missing: &[Missing]) -> Vec<String> {
    let stopped = state.stop_reason().filter(|_| state.broken().is_none());
    let mut early: Vec<String> = stopped
        .map(|why| format!("ended early: {why}"))
        .into_iter()
        .collect();
    for missing in missing {
        early.push(match (&missing.vantage, &missing.stage) {
            (Some(vantage), Some(stage)) => {
                format!("{vantage} is missing since {stage}: {}", missing.why)
            }
            (Some(vantage), None) => format!("{vantage} is missing: {}", missing.why),
            (None, _) => missing.why.clone(),
        });
    }
    for VantageResult { label, report, .. } in vantages {
        early.extend(
            report
                .iter()
                .filter_map(|report| report.partial.as_ref())
                // The reason that all hosts were told is already in the list.
                .filter(|why| Some(why.as_str()) != state.stop_reason())
                .map(|why| format!("{label} ended early: {why}")),
        );
    }
    if *state.phase() != RunPhase::Over {
        early.push("the run is not over".to_owned());
    }
    early
}

fn reasons_of_tiers(tiers: &[TierResult], verdict: Verdict) -> Vec<String> {
    let such = tiers
        .iter()
        .filter(|tier| tier.judgement.verdict == verdict);
    such.flat_map(|tier| {
        tier.judgement
            .reasons
            .iter()
            .map(|reason| format!("{}: {reason}", tier.step.name))
    })
    .collect()
}

/// Returns the failures in the hosts' own reports of the whole run.
fn failures_as_a_whole(vantages: &[VantageResult]) -> Vec<String> {
    let mut failures = Vec::new();
    for VantageResult { label, report, .. } in vantages {
        let failed = report
            .iter()
            .filter(|report| report.verdict.0 == Verdict::Fail);
        failures.extend(
            failed
                .flat_map(|report| &report.reasons)
                .map(|reason| format!("{label}: {reason}")),
        );
    }
    failures
}

/// Returns the reasons why the generator was the limit, in the tier that was `judged`, or in the
/// run.
fn invalid(prober: &ProberState, judged: Option<&TierReport>) -> Vec<String> {
    let full = prober
        .report
        .as_ref()
        .and_then(|report| report.throng.as_ref());
    let reasons = match (judged, full) {
        (Some(judged), _) if judged.verdict.0 == Verdict::Invalid => &judged.reasons,
        (Some(_), _) => return Vec::new(),
        (None, Some(full)) if full.valid => return Vec::new(),
        (None, Some(full)) => &full.invalid,
        (None, None) if prober.invalid.is_empty() => return Vec::new(),
        (None, None) => &prober.invalid,
    };
    if reasons.is_empty() {
        vec!["the generator was the limit".to_owned()]
    } else {
        reasons.clone()
    }
}

fn missing(state: &RunState) -> Vec<Missing> {
    let gone = state.probers().iter().filter_map(|prober| {
        let stage = prober
            .stage
            .and_then(|stage| state.stages().get(stage as usize));
        let (last_heard_us, why) = match &prober.gone {
            Some(gone) => (gone.last_heard_us, gone.why.clone()),
            None if prober.left_early => (
                prober.heard_us,
                "it reported before the others had finished".to_owned(),
            ),
            None if *state.phase() == RunPhase::Over && prober.report.is_none() => {
                (prober.heard_us, "it never reported".to_owned())
            }
            None => return None,
        };
        Some(Missing {
            vantage: Some(prober.vantage.clone()),
            last_heard: Some(Duration::from_micros(last_heard_us)),
            stage: stage.map(|stage| stage.name.clone()),
            why,
        })
    });
    let never_came = match state.phase() {
        RunPhase::Over => (state.setup().expect as usize).saturating_sub(state.probers().len()),
        _ => 0,
    };
    let unnamed = (never_came > 0).then(|| Missing {
        vantage: None,
        last_heard: None,
        stage: None,
        why: match never_came {
            1 => "an expected prober never came".to_owned(),
            many => format!("{many} expected probers never came"),
        },
    });
    gone.chain(unnamed).collect()
}

/// Sums the whole run of the vantages that reported. For the others it adds the baseline and the
/// tiers that they had sent.
fn totals(state: &RunState) -> Step {
    let mut totals = Step {
        name: "totals".to_owned(),
        ..Step::default()
    };
    for prober in state.probers() {
        let full = prober
            .report
            .as_ref()
            .and_then(|report| report.throng.as_ref());
        let parts: Vec<&TierSoFar> = match full {
            Some(full) => vec![&full.totals],
            None => prober.tiers.values().collect(),
        };
        let seconds: f64 = parts.iter().map(|part| part.seconds).sum();
        let participants = parts
            .iter()
            .map(|part| part.participants)
            .max()
            .unwrap_or(0);
        parts
            .iter()
            .for_each(|part| part.record.merge_into(&mut totals.record));
        totals.seconds = totals.seconds.max(seconds);
        totals.participants = totals.participants.saturating_add(participants);
    }
    totals
}

fn step_of(so_far: &TierSoFar) -> Step {
    Step {
        participants: so_far.participants,
        seconds: so_far.seconds,
        record: Record::from(&so_far.record),
        // A tier that shrinks has no joins.
        tier: Some(TierFacts::default()),
        ..Step::default()
    }
}

fn judgement(reasons: Vec<String>) -> Judgement {
    Judgement {
        verdict: if reasons.is_empty() {
            Verdict::Pass
        } else {
            Verdict::Fail
        },
        reasons,
    }
}

/// Returns the loss of the worse kind of media that somebody subscribes to. `None` if nobody
/// subscribes, or if one is unknown.
fn worse_loss(media: [&Media; 2]) -> Option<f64> {
    let subscribed = media.into_iter().filter(|media| media.tracks_expected > 0);
    let losses: Option<Vec<f64>> = subscribed
        .map(|media| LossShares::of(media).worse())
        .collect();
    losses?.into_iter().reduce(f64::max)
}

fn moment<S: serde::Serializer>(at: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    match at {
        Some(at) => serializer.serialize_str(&crate::report::json::rfc_3339(*at)),
        None => serializer.serialize_none(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coordinator::canned::{self, Canned, Saw, TIER, WELL};
    use crate::coordinator::protocol::LiveSecond;
    use crate::coordinator::state::JournalEntry;
    use crate::plan::HostRole;
    use crate::report::tiers::TiersAnswer;

    const QUIET: Saw = Saw {
        publishes: false,
        ..WELL
    };

    fn merged(canned: &Canned) -> Merged {
        Merged::new(&canned.state, &canned::judging())
    }

    /// Returns the result of two vantages with these figures per tier. The second one's generator
    /// was the limit in the `invalid` tiers.
    fn of_two(first: &[Saw], second: &[Saw], invalid: &[usize]) -> Merged {
        let tiers: Vec<u32> = first.iter().map(|_| 10).collect();
        let mut canned = Canned::armed(
            &tiers,
            &[("fra", Some(HostRole::Both)), ("sin", Some(HostRole::Both))],
        );
        canned.ends();
        canned.reports(0, first, &[]);
        canned.reports(1, second, invalid);
        canned.is_over();
        merged(&canned)
    }

    fn verdicts(merged: &Merged) -> Vec<Verdict> {
        merged
            .tiers
            .iter()
            .map(|tier| tier.judgement.verdict)
            .collect()
    }

    fn lossy(lost: u64) -> Saw {
        Saw { lost, ..WELL }
    }

    #[test]
    fn figures_of_a_tier_are_those_of_one_histogram_and_the_worst_of_any_vantage() {
        let far = Saw {
            rtt_us: 180_000,
            lost: 6,
            ..WELL
        };
        let merged = of_two(&[WELL], &[far], &[]);
        let mut both = WELL.record();
        both.merge(&far.record());
        let tier = &merged.tiers[0];
        for share in [0.5, 0.95, 0.99] {
            assert_eq!(
                tier.step.record.session.rtt_rtcp.quantile(share),
                both.session.rtt_rtcp.quantile(share)
            );
            assert_eq!(
                tier.step.record.audio.one_way_latency.quantile(share),
                both.audio.one_way_latency.quantile(share)
            );
        }
        assert_eq!(tier.step.participants, 26);
        assert_eq!(
            tier.worst_rtt_us(),
            far.record()
                .session
                .rtt_rtcp
                .quantile(0.95)
                .map(|us| us as f64)
        );
        assert_eq!(tier.worst_loss(), Some(0.006));
        assert_eq!(tier.worst_quality(), QualityRank::Good);
        let loss = tier.loss_by_host(&merged.vantages).unwrap();
        assert_eq!(
            (loss.average, loss.maximum, loss.minimum),
            (0.003, (0.006, "sin"), (0.0, "fra"))
        );
        assert_eq!(tier.worst_vantage(), Some((1, "loss 0.60%".to_owned())));
        assert_eq!(
            (merged.judgement.verdict, &merged.judgement.reasons),
            (Verdict::Pass, &Vec::new())
        );
    }

    #[test]
    fn all_healthy_first_failed_and_not_measured_are_three_answers() {
        let answer = |merged: &Merged| {
            merged
                .knee()
                .map(|knee| (knee.answer, knee.passed.map(|step| step.name.clone())))
        };
        let healthy = of_two(&[WELL, WELL], &[WELL, WELL], &[]);
        assert_eq!(
            answer(&healthy),
            Some((TiersAnswer::AllPassed, Some("tier 2".to_owned())))
        );
        let first = of_two(&[WELL, WELL], &[lossy(50), WELL], &[]);
        assert_eq!(answer(&first), Some((TiersAnswer::FirstFailed, None)));
        let second = of_two(&[WELL, WELL], &[WELL, lossy(50)], &[]);
        assert_eq!(
            answer(&second),
            Some((TiersAnswer::Found, Some("tier 1".to_owned())))
        );
        let unknown = of_two(&[WELL, WELL], &[WELL, WELL], &[0]);
        assert_eq!(answer(&unknown), Some((TiersAnswer::NotMeasured, None)));
        let mut nobody = Canned::gathering(&[10, 25], 2);
        nobody.is_over();
        let nobody = merged(&nobody);
        assert_eq!(answer(&nobody), Some((TiersAnswer::NotMeasured, None)));
        assert_eq!(nobody.judgement.verdict, Verdict::Partial);
        assert_eq!(
            (nobody.missing.len(), &nobody.missing[0].vantage),
            (1, &None)
        );
        assert_eq!(nobody.missing[0].why, "2 expected probers never came");
    }

    #[test]
    fn one_vantage_that_fails_fails_the_tier_even_if_the_others_make_up_for_it() {
        let merged = of_two(&[WELL], &[lossy(15)], &[]);
        assert_eq!(verdicts(&merged), [Verdict::Fail]);
        assert_eq!(
            merged.tiers[0].judgement.reasons,
            ["sin: audio loss 1.50% (frames undelivered), more than 1 %"]
        );
        assert_eq!(merged.judgement.verdict, Verdict::Fail);
        assert_eq!(
            merged.judgement.reasons,
            ["tier 1: sin: audio loss 1.50% (frames undelivered), more than 1 %"]
        );
    }

    #[test]
    fn a_generator_that_was_the_limit_measures_nothing_and_leaves_no_pass() {
        let merged = of_two(&[WELL, WELL], &[lossy(500), WELL], &[0]);
        assert_eq!(verdicts(&merged), [Verdict::Invalid, Verdict::Pass]);
        let tier = &merged.tiers[0];
        assert_eq!(tier.cells[1].standing, Standing::Invalid);
        assert_eq!(tier.worst_loss(), Some(0.0), "it is in none of the figures");
        assert_eq!(
            tier.step.record.audio.packets_received,
            WELL.record().audio.packets_received
        );
        assert_eq!(tier.step.participants, 26, "but its load was there");
        assert_eq!(tier.judgement.reasons, ["sin: ticks were 40 ms late"]);
        assert_eq!(merged.judgement.verdict, Verdict::Invalid);
    }

    #[test]
    fn what_a_valid_vantage_saw_fail_stands_unless_the_invalid_one_sent_media_to_it() {
        let spoilt = of_two(&[lossy(50)], &[WELL], &[0]);
        assert_eq!(verdicts(&spoilt), [Verdict::Invalid]);
        assert_eq!(
            spoilt.tiers[0].judgement.reasons.len(),
            2,
            "the failure is told all the same"
        );
        assert_eq!(spoilt.judgement.verdict, Verdict::Invalid);
        let stands = of_two(&[lossy(50)], &[QUIET], &[0]);
        assert_eq!(verdicts(&stands), [Verdict::Fail]);
        assert!(
            stands.tiers[0].judgement.reasons[0].starts_with("fra: audio loss"),
            "what decided comes first"
        );
        assert_eq!(stands.judgement.verdict, Verdict::Fail);
    }

    #[test]
    fn a_vantage_that_goes_missing_is_named_and_leaves_what_it_sent() {
        let mut canned = Canned::armed(
            &[10, 10],
            &[("fra", Some(HostRole::Both)), ("sin", Some(HostRole::Both))],
        );
        for who in 0..2 {
            canned.beat(who, vec![WELL.so_far(TIER, true)], LiveSecond::default());
        }
        canned.beat(
            1,
            vec![lossy(100).so_far(TIER + 1, false)],
            LiveSecond::default(),
        );
        canned.loses(1);
        canned.ends();
        canned.reports(0, &[WELL, WELL], &[]);
        canned.is_over();
        let merged = merged(&canned);
        assert_eq!(verdicts(&merged), [Verdict::Pass, Verdict::Partial]);
        let cell = &merged.tiers[1].cells[1];
        assert_eq!(
            (cell.standing, cell.seconds, cell.loss),
            (Standing::Incomplete, 7.0, Some(0.1))
        );
        assert_eq!(
            merged.tiers[1].step.record.audio.packets_lost, 0,
            "not among what was held to the end"
        );
        assert_eq!(
            merged.totals.record.audio.packets_lost, 1_000,
            "but acknowledged, and in the totals"
        );
        assert_eq!(merged.judgement.verdict, Verdict::Partial);
        assert_eq!(
            merged.judgement.reasons[0],
            "sin is missing since tier 2: silent for 30 s"
        );
        assert_eq!(
            merged.judgement.reasons[1],
            "tier 2: sin broke off after 7 s"
        );
        assert_eq!(merged.missing[0].vantage.as_deref(), Some("sin"));
        let knee = merged.knee().unwrap();
        assert_eq!(
            (knee.answer, knee.passed.map(|step| step.participants)),
            (TiersAnswer::NotMeasured, Some(26))
        );
    }

    #[test]
    fn a_tier_that_failed_before_somebody_went_missing_has_failed() {
        let mut canned = Canned::armed(
            &[10, 10],
            &[("fra", Some(HostRole::Both)), ("sin", Some(HostRole::Both))],
        );
        canned.beat(1, vec![WELL.so_far(TIER, true)], LiveSecond::default());
        canned.loses(1);
        canned.ends();
        canned.reports(0, &[lossy(50), WELL], &[]);
        canned.is_over();
        let merged = merged(&canned);
        assert_eq!(verdicts(&merged), [Verdict::Fail, Verdict::Partial]);
        assert_eq!(merged.judgement.verdict, Verdict::Fail);
    }

    #[test]
    fn a_threshold_that_ends_the_run_fails_its_tier_although_the_others_broke_off() {
        let broken = "audio.jitter.p95<1ms:abort does not hold: it is 4 ms, 3 s into the hold, and ended the run";
        let ended = |invalid: &[usize]| {
            let mut canned = Canned::armed(
                &[10, 10],
                &[
                    ("fra", Some(HostRole::Both)),
                    ("sin", Some(HostRole::Subscribe)),
                ],
            );
            canned.apply(JournalEntry::Ordered {
                at_us: canned.now_us,
                stage: TIER,
                start_us: canned.now_us,
            });
            canned.beat(0, vec![WELL.so_far(TIER, false)], LiveSecond::default());
            canned.breaks(1, TIER, broken);
            let Some(JournalEntry::Stopping { at_us, reason }) = canned.state.due(canned.now_us)
            else {
                panic!("it ends for all")
            };
            assert_eq!(reason, format!("'sin': {broken}"));
            canned.apply(JournalEntry::Stopping { at_us, reason });
            // Another host found the same failure, too late to end anything.
            canned.breaks(0, TIER, "the same");
            canned.reports(1, &[QUIET], invalid);
            canned.reports(0, &[], &[]);
            canned.is_over();
            merged(&canned)
        };
        let failed = ended(&[]);
        assert_eq!(verdicts(&failed), [Verdict::Fail, Verdict::Partial]);
        assert_eq!(
            failed.tiers[0].judgement.reasons,
            [
                format!("sin: {broken}"),
                "fra broke off after 7 s".to_owned()
            ]
        );
        assert_eq!(
            (failed.judgement.verdict, &failed.judgement.reasons[0]),
            (Verdict::Fail, &format!("tier 1: sin: {broken}"))
        );
        assert!(
            !failed
                .judgement
                .reasons
                .iter()
                .any(|reason| reason.starts_with("ended early"))
        );
        assert_eq!(failed.knee().unwrap().answer, TiersAnswer::FirstFailed);
        // If the generator was the limit, the failure says nothing about the server.
        assert_eq!(verdicts(&ended(&[0]))[0], Verdict::Partial);
    }

    #[test]
    fn a_figure_that_is_no_number_stops_no_report() {
        let mut canned = Canned::armed(&[4], &[("a", None), ("b", None), ("c", None)]);
        canned.ends();
        for who in 0..3 {
            let step = ClientStep {
                clients: 4,
                rtt_ms: Some(20.0 + who as f64),
                loss_pct: Some(0.0),
                quality: Some("Good".to_owned()),
                samples: Some(9),
                rtt_stat: Some("p95".to_owned()),
            };
            canned.reports_steps(who, vec![step]);
        }
        canned.is_over();
        let mut merged = merged(&canned);
        let tier = &mut merged.tiers[0];
        assert_eq!(tier.measured().count(), 3);
        for odd in [f64::NAN, f64::INFINITY, -1.0, 1e300] {
            tier.cells[1].loss = Some(odd);
            tier.cells[2].rtt_us = Some(odd);
            assert!(tier.worst_vantage().is_some(), "{odd}");
            let mut cells: Vec<&Cell> = tier.cells.iter().collect();
            cells.sort_by(|a, b| super::super::text::by_badness(b, a));
        }
    }

    #[test]
    fn a_run_under_way_is_no_pass() {
        let mut canned = Canned::armed(&[10], &[("fra", Some(HostRole::Both))]);
        canned.beat(0, vec![WELL.so_far(TIER, false)], LiveSecond::default());
        let merged = merged(&canned);
        assert_eq!(merged.tiers[0].cells[0].standing, Standing::Awaited);
        assert_eq!(verdicts(&merged), [Verdict::Partial]);
        assert_eq!(merged.judgement.verdict, Verdict::Partial);
        assert_eq!(merged.judgement.reasons[0], "the run is not over");
    }

    #[test]
    fn voicegw_s_probers_are_judged_by_their_round_trips_and_an_unmeasured_one_is_no_fast_one() {
        let step = |rtt_ms, samples, quality: &str| ClientStep {
            clients: 4,
            rtt_ms: Some(rtt_ms),
            loss_pct: Some(0.0),
            quality: Some(quality.to_owned()),
            samples: Some(samples),
            rtt_stat: Some("p95".to_owned()),
        };
        let mut canned = Canned::armed(&[4, 8, 16], &[("vg", None)]);
        canned.ends();
        canned.reports_steps(
            0,
            vec![
                step(20.0, 9, "Excellent"),
                step(0.0, 0, "Excellent"),
                step(30.0, 9, "Poor"),
            ],
        );
        canned.is_over();
        let merged = merged(&canned);
        assert_eq!(
            verdicts(&merged),
            [Verdict::Pass, Verdict::Partial, Verdict::Fail]
        );
        assert_eq!(merged.tiers[0].worst_rtt_us(), Some(20_000.0));
        assert_eq!(merged.tiers[1].worst_rtt_us(), None);
        assert_eq!(merged.tiers[0].worst_loss(), None, "it measures none");
        let judging = Judging {
            target_rtt: Some(Duration::from_millis(15)),
            ..canned::judging()
        };
        let strict = Merged::new(&canned.state, &judging);
        assert_eq!(verdicts(&strict)[0], Verdict::Fail);
    }

    #[test]
    fn quality_follows_from_the_limits_and_is_unknown_where_they_cannot_be_looked_at() {
        let judging = Judging {
            target_rtt: Some(Duration::from_millis(50)),
            ..canned::judging()
        };
        let quality = |saw: Saw, change: fn(&mut Record)| {
            let mut record = saw.record();
            change(&mut record);
            let loss = worse_loss([&record.audio, &record.video]);
            QualityRank::of_record(&record, loss, &judging)
        };
        let fast = Saw {
            rtt_us: 10_000,
            ..WELL
        };
        assert_eq!(quality(fast, |_| {}), QualityRank::Excellent);
        assert_eq!(
            quality(WELL, |_| {}),
            QualityRank::Good,
            "round trips of more than half of what is allowed"
        );
        assert_eq!(quality(Saw { lost: 5, ..fast }, |_| {}), QualityRank::Good);
        assert_eq!(quality(Saw { lost: 11, ..fast }, |_| {}), QualityRank::Poor);
        assert_eq!(
            quality(fast, |record| record.session.rtt_rtcp.clear()),
            QualityRank::Unknown
        );
        assert_eq!(
            quality(fast, |record| record.audio.frames_expected = 0),
            QualityRank::Unknown
        );
        assert_eq!(
            quality(fast, |record| record.audio.tracks_live = 0),
            QualityRank::Lost
        );
        assert_eq!(
            quality(fast, |record| record.session.joins_ok = 0),
            QualityRank::Lost
        );
    }
}
