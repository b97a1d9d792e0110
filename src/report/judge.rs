//! The verdict, PASS, FAIL, INVALID or PARTIAL, and its reasons.
//!
//! An unknown is never a pass: a figure that a judgement needs and that the run did not measure is
//! a reason to fail. Reasons name the measured value and the limit.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::{Outcome, Step, TierFacts};
use crate::knee::{KneeAnswer, KneeLimit};
use crate::measure::{Histogram, Kind, Media, Record, Session, is_measured};
use crate::words;

/// The limits by which a run is judged.
#[derive(Clone, Debug)]
pub struct Judging {
    /// In per cent, for audio and for video. See [`LossShares::worse`].
    pub max_loss_pct: f64,
    /// Limit for the 95th percentile of `session.rtt_rtcp`. `None`: not judged.
    pub target_rtt: Option<Duration>,
    pub thresholds: Vec<Threshold>,
    /// Whether a run may pass in which nothing arrived that could be judged.
    pub allow_unjudged: bool,
}

impl Default for Judging {
    fn default() -> Judging {
        Judging {
            max_loss_pct: 1.0,
            target_rtt: None,
            thresholds: Vec::new(),
            allow_unjudged: false,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Pass,
    /// The server, or the path to it, did not do what was asked.
    Fail,
    /// The generator was the limit, so nothing is known about the server.
    Invalid,
    /// Ended early.
    Partial,
}

impl Verdict {
    pub const fn exit_code(self) -> u8 {
        match self {
            Verdict::Pass => 0,
            Verdict::Partial => 1,
            Verdict::Invalid => 98,
            Verdict::Fail => 99,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Verdict::Pass => "PASS",
            Verdict::Fail => "FAIL",
            Verdict::Invalid => "INVALID",
            Verdict::Partial => "PARTIAL",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judgement {
    pub verdict: Verdict,
    /// Empty for a PASS. The deciding reasons come first.
    pub reasons: Vec<String>,
}

impl Judgement {
    /// Makes a judgement. PARTIAL comes before INVALID, and INVALID before FAIL: each one makes the
    /// next unknowable, but the reasons of all are listed.
    fn of(partial: Option<&String>, invalid: Vec<String>, failed: Vec<String>) -> Judgement {
        let verdict = match (partial, invalid.is_empty(), failed.is_empty()) {
            (Some(_), ..) => Verdict::Partial,
            (None, false, _) => Verdict::Invalid,
            (None, true, false) => Verdict::Fail,
            (None, true, true) => Verdict::Pass,
        };
        let early = partial.map(|why| format!("ended early: {why}"));
        Judgement {
            verdict,
            reasons: early.into_iter().chain(invalid).chain(failed).collect(),
        }
    }
}

/// Judges a whole run. A run with tiers is judged by its tiers.
pub fn judge(outcome: &Outcome) -> Judgement {
    if outcome.plan.scenario.search.is_some() {
        return judge_search(outcome);
    }
    if outcome.steps.iter().any(|step| step.tier.is_some()) {
        return judge_by_tiers(outcome);
    }
    Judgement::of(
        outcome.partial.as_ref(),
        invalidity(outcome),
        failures(outcome),
    )
}

/// Judges a search. It passes if it found a capacity, or passed at the greatest number allowed,
/// whatever the verdicts of its points. It fails on complaints that no point has told.
fn judge_search(outcome: &Outcome) -> Judgement {
    let (invalid, failed) = match outcome.capacity.as_ref().map(|capacity| &capacity.answer) {
        Some(
            KneeAnswer::Capacity { .. }
            | KneeAnswer::AtLeast {
                limit: KneeLimit::Max,
                ..
            },
        ) => (Vec::new(), Vec::new()),
        Some(KneeAnswer::AtLeast {
            limit: KneeLimit::Generator { reasons, .. },
            ..
        }) => (reasons.clone(), Vec::new()),
        Some(KneeAnswer::NotMeasured { reasons }) => (reasons.clone(), Vec::new()),
        Some(KneeAnswer::None) => (
            Vec::new(),
            vec!["not even one subscriber a room passes".to_owned()],
        ),
        None => (
            Vec::new(),
            vec!["nothing was found: the search did not come to its end".to_owned()],
        ),
    };
    let has_points = outcome.steps.iter().any(|step| step.tier.is_some());
    let why_not = if has_points {
        Vec::new()
    } else {
        step_failures(&outcome.totals, &outcome.complaints, &outcome.judging)
    };
    let untold: Vec<String> = outcome
        .complaints
        .iter()
        .filter(|complaint| has_points && !is_told(complaint, &outcome.steps))
        .cloned()
        .collect();
    Judgement::of(
        outcome.partial.as_ref(),
        invalid,
        [failed, why_not, untold].concat(),
    )
}

/// Whether a tier has this complaint, too.
fn is_told(complaint: &String, steps: &[Step]) -> bool {
    let mut tiers = steps.iter().filter_map(|step| step.tier.as_ref());
    tiers.any(|tier| tier.complaints.contains(complaint))
}

/// Judges a run by its tiers. If one tier failed while the generator kept up, the verdict is FAIL,
/// whatever became of the others. A tier in which the generator did not keep up leaves only that
/// tier open.
fn judge_by_tiers(outcome: &Outcome) -> Judgement {
    let mut reasons: Vec<String> = outcome
        .partial
        .iter()
        .map(|why| format!("ended early: {why}"))
        .collect();
    let mut verdict = Verdict::Pass;
    for step in &outcome.steps {
        let judged = judge_step(outcome, step);
        verdict = match (verdict, judged.verdict) {
            (Verdict::Fail, _) | (_, Verdict::Fail) => Verdict::Fail,
            (Verdict::Invalid, _) | (_, Verdict::Invalid) => Verdict::Invalid,
            (verdict, Verdict::Pass | Verdict::Partial) => verdict,
        };
        // The early end has been reported already.
        let ended_early = usize::from(judged.verdict == Verdict::Partial);
        reasons.extend(
            judged
                .reasons
                .iter()
                .skip(ended_early)
                .map(|reason| format!("{}: {reason}", step.name)),
        );
    }
    let untold = outcome.complaints.iter();
    let untold = untold.filter(|complaint| !is_told(complaint, &outcome.steps));
    let at_the_end = outcome
        .judging
        .thresholds
        .iter()
        .filter(|threshold| threshold.is_known_at_the_end());
    let failed: Vec<String> = untold
        .cloned()
        .chain(at_the_end.filter_map(|threshold| threshold.violation(&outcome.totals.record)))
        .collect();
    if verdict == Verdict::Pass && !failed.is_empty() {
        verdict = Verdict::Fail;
    }
    reasons.extend(failed);
    Judgement {
        verdict: if outcome.partial.is_some() {
            Verdict::Partial
        } else {
            verdict
        },
        reasons,
    }
}

/// Judges one step. If it is the only one, whether the generator kept up is known for the whole
/// run, and decides here too.
pub fn judge_step(outcome: &Outcome, step: &Step) -> Judgement {
    match &step.tier {
        Some(_) => judge_tier(step, &outcome.judging),
        None => {
            let failed = step_failures(step, &outcome.complaints, &outcome.judging);
            Judgement::of(None, invalidity(outcome), failed)
        }
    }
}

/// Judges one of several tiers by its own facts alone.
pub fn judge_tier(step: &Step, judging: &Judging) -> Judgement {
    let TierFacts {
        invalid,
        complaints,
        cut_short,
        ..
    } = step.tier.clone().unwrap_or_default();
    let failed = step_failures(step, &complaints, judging);
    Judgement::of(cut_short.as_ref(), invalid, failed)
}

/// Loss of one kind of media, as shares (0..=1). `None` if it is unknown.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossShares {
    /// Packets missing on arrival.
    pub network: Option<f64>,
    /// Packets missing on arrival and repaired.
    pub repaired: Option<f64>,
    /// Packets missing on arrival, and recovered from the redundancy of another packet.
    pub recovered: Option<f64>,
    /// Packets missing on arrival, and neither repaired nor recovered.
    pub residual: Option<f64>,
    /// Frames that publishers sent and that a live subscription never received whole.
    pub undelivered: Option<f64>,
}

impl LossShares {
    pub fn of(media: &Media) -> LossShares {
        LossShares::counted([media])
    }

    /// Shares over several kinds of media together.
    pub fn counted<'a>(media: impl IntoIterator<Item = &'a Media> + Clone) -> LossShares {
        let sum = |counter: fn(&Media) -> u64| media.clone().into_iter().map(counter).sum::<u64>();
        // Leave out the packets of foreign tracks.
        let own = |all: fn(&Media) -> u64, foreign: fn(&Media) -> u64| {
            sum(all).saturating_sub(sum(foreign))
        };
        let lost_network = own(
            |m| m.packets_lost_network,
            |m| m.foreign_packets_lost_network,
        );
        let received = own(|m| m.packets_received, |m| m.foreign_packets_received);
        let lost = own(|m| m.packets_lost, |m| m.foreign_packets_lost);
        let packets = received + lost_network;
        let frames = sum(|m| m.frames_expected);
        LossShares {
            network: share(lost_network, packets),
            repaired: share(sum(|m| m.packets_repaired), packets),
            recovered: share(sum(|m| m.packets_recovered_red), packets),
            residual: share(
                lost.saturating_sub(sum(|m| m.packets_recovered_red)),
                packets,
            ),
            undelivered: share(frames.saturating_sub(sum(|m| m.frames_delivered)), frames),
        }
    }

    /// The loss that `--max-loss` judges: the worse of residual RTP loss and undelivered frames. A
    /// server can hide dropped packets from RTP, but not from the publishers' log. `None` if either
    /// is unknown.
    pub fn worse(&self) -> Option<f64> {
        Some(self.residual?.max(self.undelivered?))
    }
}

fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

fn invalidity(outcome: &Outcome) -> Vec<String> {
    match (outcome.engine.valid, outcome.engine.reasons.is_empty()) {
        (true, _) => Vec::new(),
        (false, true) => vec!["the generator was the limit".to_owned()],
        (false, false) => outcome.engine.reasons.clone(),
    }
}

fn failures(outcome: &Outcome) -> Vec<String> {
    let (plan, session) = (&outcome.plan, &outcome.totals.record.session);
    let mut reasons = Vec::new();
    let unplanned = u64::from(plan.total_participants()).saturating_sub(session.joins_planned);
    if unplanned > 0 {
        reasons.push(format!(
            "{} of {} joins were never attempted",
            words::number(unplanned),
            words::number(plan.total_participants().into())
        ));
    }
    for kind in [Kind::Audio, Kind::Video] {
        let (planned, expected) = (
            plan.total_planned_tracks(kind),
            outcome.totals.media(kind).tracks_expected,
        );
        if expected < planned {
            reasons.push(format!(
                "only {} of {} {} subscriptions were tried",
                words::number(expected),
                words::number(planned),
                name(kind)
            ));
        }
    }
    reasons.extend(step_failures(
        &outcome.totals,
        &outcome.complaints,
        &outcome.judging,
    ));
    reasons
}

/// `complaints` are already known reasons, which are not repeated.
fn step_failures(step: &Step, complaints: &[String], judging: &Judging) -> Vec<String> {
    let mut reasons = complaints.to_vec();
    let is_quiet = step.tier.is_some() && step.record.session.joins_planned == 0;
    reasons.extend(joins_failed(&step.record.session).filter(|_| !is_quiet));
    for kind in [Kind::Audio, Kind::Video] {
        reasons.extend(tracks_dead(kind, step.media(kind)));
        reasons.extend(loss_exceeded(kind, step.media(kind), judging.max_loss_pct));
    }
    reasons.extend(others_failed(step, judging));
    reasons.extend(rtt_exceeded(&step.record, judging));
    // Some figures are never known for one of several tiers.
    let judged = judging
        .thresholds
        .iter()
        .filter(|threshold| step.tier.is_none() || !threshold.is_known_at_the_end());
    let is_told = |threshold: &Threshold| {
        complaints
            .iter()
            .any(|told| told.starts_with(&threshold.to_string()))
    };
    let untold = judged.filter(|threshold| !is_told(threshold));
    reasons.extend(untold.filter_map(|threshold| threshold.violation(&step.record)));
    reasons
}

/// Returns why a part of a hold does not pass, as far as a part can tell.
pub fn media_failures(record: &Record, judging: &Judging) -> Vec<String> {
    let media = [(Kind::Audio, &record.audio), (Kind::Video, &record.video)];
    let loss = media
        .into_iter()
        .filter_map(|(kind, media)| loss_exceeded(kind, media, judging.max_loss_pct));
    let known = judging
        .thresholds
        .iter()
        .filter(|threshold| !threshold.is_known_at_the_end());
    let limits = known.filter_map(|threshold| threshold.violation(record));
    loss.chain(rtt_exceeded(record, judging))
        .chain(limits)
        .collect()
}

fn joins_failed(session: &Session) -> Option<String> {
    if session.joins_planned == 0 {
        return Some("no join was attempted".to_owned());
    }
    let missing = session.joins_planned.saturating_sub(session.joins_ok);
    (missing > 0).then(|| {
        format!(
            "{} of {} joins did not succeed",
            words::number(missing),
            words::number(session.joins_planned)
        )
    })
}

fn tracks_dead(kind: Kind, media: &Media) -> Option<String> {
    let missing = media.tracks_expected.saturating_sub(media.tracks_live);
    (missing > 0).then(|| {
        format!(
            "{} of {} {} tracks never went live",
            words::number(missing),
            words::number(media.tracks_expected),
            name(kind)
        )
    })
}

fn loss_exceeded(kind: Kind, media: &Media, max_loss_pct: f64) -> Option<String> {
    if media.tracks_expected == 0 {
        return None;
    }
    let loss = LossShares::of(media);
    let Some(worse) = loss.worse() else {
        return Some(format!("{} loss was not measured", name(kind)));
    };
    let what = if loss.undelivered == Some(worse) {
        "frames undelivered"
    } else {
        "packets lost"
    };
    (worse * 100.0 > max_loss_pct).then(|| {
        format!(
            "{} loss {} ({what}), more than {max_loss_pct} %",
            name(kind),
            words::percent(worse)
        )
    })
}

/// Judges foreign tracks by their packets, if no track of this run was expected.
fn others_failed(step: &Step, judging: &Judging) -> Vec<String> {
    let kinds = [Kind::Audio, Kind::Video].map(|kind| (kind, step.media(kind)));
    if kinds.iter().any(|(_, media)| media.tracks_expected > 0) {
        return Vec::new();
    }
    let mut reasons = Vec::new();
    for (kind, media) in kinds {
        let missing = media
            .foreign_tracks_expected
            .saturating_sub(media.foreign_tracks_live);
        if missing > 0 {
            reasons.push(format!(
                "{} of {} {} tracks of others never came",
                words::number(missing),
                words::number(media.foreign_tracks_expected),
                name(kind)
            ));
        }
        let packets = media.foreign_packets_received + media.foreign_packets_lost_network;
        let loss = share(media.foreign_packets_lost, packets);
        if let Some(loss) = loss.filter(|loss| loss * 100.0 > judging.max_loss_pct) {
            reasons.push(format!(
                "{} loss {} (packets of others lost), more than {} %",
                name(kind),
                words::percent(loss),
                judging.max_loss_pct
            ));
        }
    }
    let live = |media: &Media| media.foreign_tracks_live;
    let nothing_came = kinds.iter().all(|(_, media)| live(media) == 0);
    if nothing_came && is_audience(step) && !judging.allow_unjudged {
        reasons.push(
            "nothing was judged: nobody of this run is to be heard, and nothing of others came (is somebody publishing in this room? --allow-unjudged lets such a run pass)"
                .into(),
        );
    }
    reasons
}

/// Whether participants joined, and none of them published.
fn is_audience(step: &Step) -> bool {
    let published = |kind| step.media(kind).tracks_published;
    step.record.session.participants_total > 0
        && published(Kind::Audio) == 0
        && published(Kind::Video) == 0
}

fn rtt_exceeded(record: &Record, judging: &Judging) -> Option<String> {
    let (rtt, target) = (&record.session.rtt_rtcp, judging.target_rtt?);
    let limit = target.as_micros() as u64;
    match rtt.quantile(0.95) {
        Some(p95) if p95 <= limit => None,
        Some(p95) => Some(format!(
            "session.rtt_rtcp.p95 is {}, more than {}",
            words::micros(p95 as f64),
            words::micros(limit as f64)
        )),
        None => Some(format!(
            "session.rtt_rtcp.p95 {}, so it is not within {}",
            absence(rtt),
            words::micros(limit as f64)
        )),
    }
}

fn absence(histogram: &Histogram) -> &'static str {
    if histogram.expected() == 0 {
        "was not measured"
    } else {
        "is never (too many values are missing)"
    }
}

pub(super) const fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Audio => "audio",
        Kind::Video => "video",
    }
}

/// A limit on one figure of the report, for example `audio.one_way_latency.p95<150ms` or
/// `session.disconnects<1`.
///
/// Histograms are judged in microseconds and need a unit. Counters have none.
#[derive(Clone, Debug, PartialEq)]
pub struct Threshold {
    /// Text of the threshold, without the conditions after the limit.
    text: String,
    scope: Scope,
    figure: Figure,
    comparison: Comparison,
    /// In microseconds, or a count, or a score.
    limit: f64,
    /// The limit must hold over every stretch of a hold of this length. `None`: over the whole
    /// hold.
    pub window: Option<Duration>,
    /// Whether the run ends as soon as it does not hold.
    pub aborts: bool,
}

/// Value of a threshold's figure: cumulative, or a difference of cumulative values.
pub(super) enum Value {
    Counter(i64),
    /// Values that came, and the number of missing ones.
    Histogram(Histogram, i64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    Session,
    Audio,
    Video,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Figure {
    Counter(&'static str),
    Histogram(&'static str, Stat),
    Score(&'static str, ScoreStat),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stat {
    Quantile(u16),
    Min,
    Mean,
    Max,
}

/// A statistic of scores. Quantiles count from the worst, and a missing score is worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ScoreStat {
    Quantile(u16),
    Mean,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Comparison {
    Below,
    AtMost,
    Above,
    AtLeast,
}

impl Scope {
    const fn kind(self) -> Option<Kind> {
        match self {
            Scope::Session => None,
            Scope::Audio => Some(Kind::Audio),
            Scope::Video => Some(Kind::Video),
        }
    }
}

const SCOPES: &[(&str, Scope)] = &[
    ("session", Scope::Session),
    ("audio", Scope::Audio),
    ("video", Scope::Video),
];
/// Statistics of histograms. Quantiles are in thousandths.
const STATS: &[(&str, Stat)] = &[
    ("p50", Stat::Quantile(500)),
    ("p90", Stat::Quantile(900)),
    ("p95", Stat::Quantile(950)),
    ("p99", Stat::Quantile(990)),
    ("p999", Stat::Quantile(999)),
    ("min", Stat::Min),
    ("mean", Stat::Mean),
    ("max", Stat::Max),
];
/// Statistics of scores. Quantiles are in thousandths. The lowest score is at the first of all.
const SCORE_STATS: &[(&str, ScoreStat)] = &[
    ("p1", ScoreStat::Quantile(10)),
    ("p5", ScoreStat::Quantile(50)),
    ("p10", ScoreStat::Quantile(100)),
    ("p50", ScoreStat::Quantile(500)),
    ("min", ScoreStat::Quantile(0)),
    ("mean", ScoreStat::Mean),
];
/// Comparisons, longer ones first, so that `<=` is not read as `<`.
const COMPARISONS: &[(&str, Comparison)] = &[
    ("<=", Comparison::AtMost),
    (">=", Comparison::AtLeast),
    ("<", Comparison::Below),
    (">", Comparison::Above),
];
const UNITS: &[(&str, f64)] = &[("us", 1.0), ("ms", 1e3), ("s", 1e6)];

impl Threshold {
    /// Returns why `record` does not meet the threshold, or `None` if it does. A record alone
    /// cannot tell this for a threshold over windows.
    fn violation(&self, record: &Record) -> Option<String> {
        match self.figure {
            _ if self.window.is_some() => None,
            Figure::Counter(name) if !is_measured(self.scope.kind(), name) => {
                Some(format!("{self} does not hold: it is not measured"))
            }
            Figure::Score(name, stat) => {
                let scores = self.scores(record, name)?;
                match stat.of(scores) {
                    Some(value) if self.comparison.holds(value, self.limit) => None,
                    Some(value) => Some(format!("{self} does not hold: it is {value:.2}")),
                    None => Some(format!("{self} does not hold: it {}", absence(scores))),
                }
            }
            Figure::Counter(name) => {
                self.violation_of(&Value::Counter(self.counter(record, name)? as i64))
            }
            Figure::Histogram(name, _) => {
                let histogram = self.histogram(record, name)?.clone();
                let missing = histogram.expected() - histogram.count();
                self.violation_of(&Value::Histogram(histogram, missing as i64))
            }
        }
    }

    /// Returns why `value` does not meet the threshold, or `None` if it does.
    pub(super) fn violation_of(&self, value: &Value) -> Option<String> {
        match (self.figure, value) {
            (Figure::Histogram(_, stat), Value::Histogram(values, missing)) => {
                // More values may have come than were known to be expected.
                let values =
                    values.expecting(values.count() + u64::try_from(*missing).unwrap_or(0));
                match stat.of(&values) {
                    Some(value) if self.comparison.holds(value, self.limit) => None,
                    Some(value) => Some(format!(
                        "{self} does not hold: it is {}",
                        words::micros(value)
                    )),
                    None => Some(format!("{self} does not hold: it {}", absence(&values))),
                }
            }
            (_, Value::Counter(value)) => {
                // A packet that was counted as lost before may have arrived.
                let value = u64::try_from(*value).unwrap_or(0);
                (!self.comparison.holds(value as f64, self.limit))
                    .then(|| format!("{self} does not hold: it is {}", words::number(value)))
            }
            (Figure::Counter(_) | Figure::Score(..), Value::Histogram(..)) => None,
        }
    }

    /// Like [`Threshold::violation_of`], but a figure without any values yet violates nothing.
    pub(super) fn known_violation(&self, value: &Value) -> Option<String> {
        match value {
            Value::Histogram(values, missing) if values.count() == 0 && *missing <= 0 => None,
            value => self.violation_of(value),
        }
    }

    /// Value of its figure in `record`. Scores have no value before the end.
    pub(super) fn value(&self, record: &Record) -> Value {
        match self.figure {
            Figure::Counter(name) => Value::Counter(self.counter(record, name).unwrap_or(0) as i64),
            Figure::Score(..) => Value::Counter(0),
            Figure::Histogram(name, _) => {
                let histogram = self.histogram(record, name).cloned().unwrap_or_default();
                // For frames the number of missing ones is known. For other figures a tier's record
                // says how many values were expected.
                let late = match (self.scope, name) {
                    (Scope::Audio, "one_way_latency") => Some(&record.audio),
                    (Scope::Video, "one_way_latency") => Some(&record.video),
                    _ => None,
                };
                let missing = late.map_or_else(
                    || (histogram.expected() - histogram.count()) as i64,
                    |media| media.frames_expected as i64 - media.frames_delivered as i64,
                );
                Value::Histogram(histogram, missing)
            }
        }
    }

    /// Whether its figure is a score. Scores are computed when a stream has ended, so a tier has
    /// none while others follow.
    fn is_known_at_the_end(&self) -> bool {
        matches!(self.figure, Figure::Score(..))
    }

    /// Value of a counter. Names were checked when the threshold was read, so there is one.
    fn counter(&self, record: &Record, name: &str) -> Option<u64> {
        let found = match self.scope {
            Scope::Session => record.session.counters().find(|(n, _)| *n == name),
            Scope::Audio => record.audio.counters().find(|(n, _)| *n == name),
            Scope::Video => record.video.counters().find(|(n, _)| *n == name),
        };
        found.map(|(_, value)| value)
    }

    fn histogram<'a>(&self, record: &'a Record, name: &str) -> Option<&'a Histogram> {
        let found = match self.scope {
            Scope::Session => record.session.histograms().find(|(n, _)| *n == name),
            Scope::Audio => record.audio.histograms().find(|(n, _)| *n == name),
            Scope::Video => record.video.histograms().find(|(n, _)| *n == name),
        };
        found.map(|(_, histogram)| histogram)
    }

    fn scores<'a>(&self, record: &'a Record, name: &str) -> Option<&'a Histogram> {
        let found = match self.scope {
            Scope::Session => record.session.scores().find(|(n, _)| *n == name),
            Scope::Audio => record.audio.scores().find(|(n, _)| *n == name),
            Scope::Video => record.video.scores().find(|(n, _)| *n == name),
        };
        found.map(|(_, scores)| scores)
    }
}

impl ScoreStat {
    /// Computes the statistic. Missing scores leave no mean.
    fn of(self, scores: &Histogram) -> Option<f64> {
        match self {
            ScoreStat::Quantile(thousandths) => scores
                .low_quantile(f64::from(thousandths) / 1e3)
                .map(|score| score as f64 / 1e3),
            ScoreStat::Mean => scores
                .mean()
                .filter(|_| scores.count() == scores.expected())
                .map(|mean| mean / 1e3),
        }
    }
}

impl Stat {
    /// Computes the statistic in microseconds. An expected value that never came counts as later
    /// than everything, so it leaves no mean and no maximum.
    fn of(self, histogram: &Histogram) -> Option<f64> {
        match self {
            Stat::Quantile(thousandths) => histogram
                .quantile(f64::from(thousandths) / 1e3)
                .map(|us| us as f64),
            Stat::Min => histogram.min().map(|us| us as f64),
            Stat::Mean => histogram
                .mean()
                .filter(|_| histogram.count() == histogram.expected()),
            Stat::Max => histogram.max().map(|us| us as f64),
        }
    }
}

impl Comparison {
    fn holds(self, value: f64, limit: f64) -> bool {
        match self {
            Comparison::Below => value < limit,
            Comparison::AtMost => value <= limit,
            Comparison::Above => value > limit,
            Comparison::AtLeast => value >= limit,
        }
    }
}

impl fmt::Display for Threshold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)?;
        if let Some(window) = self.window {
            write!(f, " for {}", words::duration(window))?;
        }
        f.write_str(if self.aborts { ":abort" } else { "" })
    }
}

/// Why a text is not a threshold, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RefusedThreshold {
    #[error(
        "write SCOPE.METRIC.STAT<VALUE, as in audio.one_way_latency.p95<150ms, or SCOPE.COUNTER<VALUE"
    )]
    Shape,
    /// The text includes the known names.
    #[error("{0}")]
    UnknownName(String),
    #[error("{0} is a counter and takes no statistic: write {0}<VALUE")]
    StatisticOfCounter(&'static str),
    #[error("{metric} needs a statistic, as in {metric}.{example} (one of {known})")]
    NoStatistic {
        metric: String,
        example: &'static str,
        known: String,
    },
    #[error("'{0}' is no count: a counter is compared with a bare number")]
    Count(String),
    #[error("'{0}' is no score: write it bare, as in audio.mos.p1>3.5")]
    Score(String),
    #[error("'{0}' is no time: a unit is required, as in 150ms (us, ms or s)")]
    Time(String),
    #[error("'for {0}' is no window: write whole seconds, 1s to 1h, as in 'for 2m'")]
    Window(String),
    #[error("a limit holds over windows of one length: write 'for TIME' once")]
    SeveralWindows,
    #[error(
        "':{0}' means nothing here: write :abort, once, behind the limit, as in audio.jitter.p95<5ms:abort"
    )]
    Suffix(String),
    #[error("{0} is known when a stream has ended: leave out :abort and 'for TIME'")]
    KnownAtTheEnd(&'static str),
    #[error(
        "{0} begins at 0 and grows, so it would end every run at once: leave out :abort, or say over what time, as in 'for 10s:abort'"
    )]
    AbortsAtOnce(&'static str),
}

impl FromStr for Threshold {
    type Err = RefusedThreshold;

    fn from_str(text: &str) -> Result<Threshold, RefusedThreshold> {
        let (text, window, aborts) = conditions(text)?;
        let compact: String = text.chars().filter(|c| !c.is_whitespace()).collect();
        let at = compact.find(['<', '>']).ok_or(RefusedThreshold::Shape)?;
        let (path, rest) = compact.split_at(at);
        let (sign, comparison) = *COMPARISONS
            .iter()
            .find(|(sign, _)| rest.starts_with(sign))
            .ok_or(RefusedThreshold::Shape)?;
        let value = rest.strip_prefix(sign).unwrap_or_default();
        let mut parts = path.splitn(3, '.');
        let scope_name = parts.next().unwrap_or_default();
        let scope = find(SCOPES, scope_name)
            .ok_or_else(|| unknown("scope", scope_name, SCOPES.iter().map(|(name, _)| *name)))?;
        let metric = parts.next().ok_or(RefusedThreshold::Shape)?;
        let figure = figure(scope, metric, parts.next())?;
        let limit = match figure {
            Figure::Counter(_) => count(value)?,
            Figure::Histogram(..) => micros(value)?,
            Figure::Score(..) => score(value)?,
        };
        match figure {
            Figure::Score(name, _) if aborts || window.is_some() => {
                return Err(RefusedThreshold::KnownAtTheEnd(name));
            }
            Figure::Counter(name)
                if aborts
                    && window.is_none()
                    && matches!(comparison, Comparison::Above | Comparison::AtLeast) =>
            {
                return Err(RefusedThreshold::AbortsAtOnce(name));
            }
            _ => {}
        }
        Ok(Threshold {
            window,
            aborts,
            text: compact,
            scope,
            figure,
            comparison,
            limit,
        })
    }
}

/// Parses the conditions behind a limit, in either order: ` for TIME` and `:abort`. Returns the
/// text without them, the window, and whether to abort.
fn conditions(text: &str) -> Result<(&str, Option<Duration>, bool), RefusedThreshold> {
    const WORD: &str = " for ";
    let (mut text, mut window, mut aborts) = (text.trim(), None, false);
    loop {
        let (colon, word) = (text.rfind(':'), text.rfind(WORD));
        match (colon, word) {
            (Some(at), word) if word < Some(at) => {
                let what = text[at + 1..].trim();
                if what != "abort" || std::mem::replace(&mut aborts, true) {
                    return Err(RefusedThreshold::Suffix(what.to_owned()));
                }
                text = text[..at].trim_end();
            }
            (_, Some(at)) => {
                let length = window_length(text[at + WORD.len()..].trim())?;
                if window.replace(length).is_some() {
                    return Err(RefusedThreshold::SeveralWindows);
                }
                text = text[..at].trim_end();
            }
            _ => return Ok((text, window, aborts)),
        }
    }
}

/// Longest window. It is bounded because the values of each of its seconds are kept.
const WINDOW_MAX: Duration = Duration::from_secs(3_600);

fn window_length(text: &str) -> Result<Duration, RefusedThreshold> {
    let seconds = text.parse().ok().map(Duration::from_secs);
    seconds
        .or_else(|| humantime::parse_duration(text).ok())
        .filter(|length| {
            (Duration::from_secs(1)..=WINDOW_MAX).contains(length) && length.subsec_nanos() == 0
        })
        .ok_or_else(|| RefusedThreshold::Window(text.to_owned()))
}

fn find<T: Copy>(table: &[(&str, T)], name: &str) -> Option<T> {
    table
        .iter()
        .find(|(n, _)| *n == name)
        .map(|(_, value)| *value)
}

fn figure(scope: Scope, metric: &str, stat: Option<&str>) -> Result<Figure, RefusedThreshold> {
    let (counters, histograms, scores) = match scope {
        Scope::Session => (Session::COUNTERS, Session::HISTOGRAMS, Session::SCORES),
        Scope::Audio | Scope::Video => (Media::COUNTERS, Media::HISTOGRAMS, Media::SCORES),
    };
    if let Some(name) = scores.iter().find(|name| **name == metric) {
        return statistic(metric, stat, SCORE_STATS).map(|stat| Figure::Score(name, stat));
    }
    if let Some(name) = counters.iter().find(|name| **name == metric) {
        return match stat {
            None => Ok(Figure::Counter(name)),
            Some(_) => Err(RefusedThreshold::StatisticOfCounter(name)),
        };
    }
    let Some(name) = histograms.iter().find(|name| **name == metric) else {
        return Err(unknown(
            "metric",
            metric,
            counters.iter().chain(histograms).chain(scores).copied(),
        ));
    };
    statistic(metric, stat, STATS).map(|stat| Figure::Histogram(name, stat))
}

fn statistic<T: Copy>(
    metric: &str,
    stat: Option<&str>,
    known: &[(&str, T)],
) -> Result<T, RefusedThreshold> {
    let names = || known.iter().map(|(name, _)| *name);
    let example = if names().any(|name| name == "p95") {
        "p95"
    } else {
        "p1"
    };
    let stat = stat.ok_or_else(|| RefusedThreshold::NoStatistic {
        metric: metric.to_owned(),
        example,
        known: names().collect::<Vec<_>>().join(", "),
    })?;
    find(known, stat).ok_or_else(|| unknown("statistic", stat, names()))
}

fn number(digits: &str) -> Option<f64> {
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    digits.parse().ok().filter(|_| plain)
}

fn count(value: &str) -> Result<f64, RefusedThreshold> {
    number(value).ok_or_else(|| RefusedThreshold::Count(value.to_owned()))
}

fn score(value: &str) -> Result<f64, RefusedThreshold> {
    number(value).ok_or_else(|| RefusedThreshold::Score(value.to_owned()))
}

fn micros(value: &str) -> Result<f64, RefusedThreshold> {
    let wrong = || RefusedThreshold::Time(value.to_owned());
    let (digits, scale) = UNITS
        .iter()
        .find_map(|(unit, scale)| Some((value.strip_suffix(unit)?, *scale)))
        .ok_or_else(wrong)?;
    Ok(number(digits).ok_or_else(wrong)? * scale)
}

/// Lists at most three names that are close, the closest first. If none is close, lists all.
fn unknown<'a>(what: &str, name: &str, known: impl Iterator<Item = &'a str>) -> RefusedThreshold {
    let known: Vec<&str> = known.collect();
    let mut near: Vec<(f64, &str)> = known
        .iter()
        .map(|k| (strsim::jaro_winkler(name, k), *k))
        .filter(|(score, _)| *score > 0.75)
        .collect();
    near.sort_by(|a, b| b.0.total_cmp(&a.0));
    near.truncate(3);
    RefusedThreshold::UnknownName(if near.is_empty() {
        format!(
            "there is no {what} '{name}'; there are {}",
            known.join(", ")
        )
    } else {
        format!(
            "there is no {what} '{name}'; did you mean {}?",
            near.iter().map(|(_, k)| *k).collect::<Vec<_>>().join(", ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn violation(text: &str, record: &Record) -> Option<String> {
        text.parse::<Threshold>().unwrap().violation(record)
    }

    #[test]
    fn thresholds_hold_or_say_what_they_met() {
        let mut record = Record::default();
        (1..=100).for_each(|ms| record.audio.one_way_latency.record_micros(ms * 1_000));
        record.audio.packets_lost = 9;
        for held in [
            "audio.one_way_latency.p95<150ms",
            "audio.one_way_latency.p50 <= 0.051s",
            "audio.packets_lost<10",
            "audio.packets_lost>=9",
            "audio.one_way_latency.mean>50000us",
        ] {
            assert_eq!(violation(held, &record), None, "{held}");
        }
        assert_eq!(
            violation("audio.packets_lost<9", &record).unwrap(),
            "audio.packets_lost<9 does not hold: it is 9"
        );
        assert_eq!(
            violation("audio.one_way_latency.p99<90ms", &record).unwrap(),
            "audio.one_way_latency.p99<90ms does not hold: it is 99.0 ms"
        );
    }

    #[test]
    fn of_scores_the_worst_are_judged() {
        let mut record = Record::default();
        assert!(
            violation("audio.mos.p1>1", &record)
                .unwrap()
                .contains("was not measured")
        );
        (0..100).for_each(|n| record.audio.mos.record_micros(4_400 - n));
        assert_eq!(violation("audio.mos.p1>=4.29", &record), None);
        assert_eq!(
            violation("audio.mos.min > 4.35", &record).unwrap(),
            "audio.mos.min>4.35 does not hold: it is 4.30"
        );
        assert_eq!(violation("audio.mos.p50>4.3", &record), None);
        record.audio.mos.expect(110);
        for stat in ["p1", "p5", "min", "mean"] {
            assert!(
                violation(&format!("audio.mos.{stat}>1"), &record)
                    .unwrap()
                    .contains("never"),
                "{stat}"
            );
        }
        assert_eq!(violation("audio.mos.p10>4.29", &record), None);
    }

    #[test]
    fn an_unknown_never_holds() {
        let mut record = Record::default();
        for stat in STATS {
            assert!(
                violation(&format!("video.jitter.{}<60s", stat.0), &record)
                    .unwrap()
                    .contains("was not measured")
            );
            assert!(
                violation(&format!("video.jitter.{}>0us", stat.0), &record)
                    .unwrap()
                    .contains("was not measured")
            );
        }
        record.video.jitter.expect(10);
        record.video.jitter.record_micros(5);
        for stat in ["p50", "p99", "mean", "max"] {
            assert!(
                violation(&format!("video.jitter.{stat}<60s"), &record)
                    .unwrap()
                    .contains("never"),
                "{stat}"
            );
        }
    }

    #[test]
    fn what_stands_behind_a_limit_is_read_in_either_order() {
        for (text, shown) in [
            ("audio.jitter.p95 < 1ms", "audio.jitter.p95<1ms"),
            ("audio.jitter.p95<1ms : abort", "audio.jitter.p95<1ms:abort"),
            (
                "audio.jitter.p95<1ms for 120",
                "audio.jitter.p95<1ms for 2m",
            ),
            (
                "audio.jitter.p95<1ms for 2m:abort",
                "audio.jitter.p95<1ms for 2m:abort",
            ),
            (
                "audio.jitter.p95<1ms:abort for 2m",
                "audio.jitter.p95<1ms for 2m:abort",
            ),
            (
                "audio.packets_received>100 for 1s:abort",
                "audio.packets_received>100 for 1s:abort",
            ),
        ] {
            let threshold: Threshold = text.parse().unwrap();
            assert_eq!(threshold.to_string(), shown);
            assert_eq!(
                threshold.to_string().parse::<Threshold>().unwrap(),
                threshold
            );
        }
    }

    #[test]
    fn mistakes_in_thresholds_are_told_with_the_nearest_name() {
        for (text, expected) in [
            (
                "audio.one_way_latncy.p95<150ms",
                "did you mean one_way_latency",
            ),
            ("audo.jitter.p95<1ms", "did you mean audio"),
            ("audio.jitter.p96<1ms", "did you mean p9"),
            ("audio.jitter.p95<150", "a unit is required"),
            ("audio.jitter.p95<-1ms", "a unit is required"),
            ("audio.jitter.p95<nanms", "a unit is required"),
            ("audio.jitter<1ms", "needs a statistic"),
            ("audio.packets_lost.p50<1", "takes no statistic"),
            ("audio.packets_lost<1ms", "bare number"),
            ("session.zzzz<1", "there are joins_planned"),
            ("audio.mos>4", "needs a statistic, as in mos.p1"),
            ("audio.mos.p99>4", "statistic"),
            ("audio.mos.p1>4ms", "no score"),
            ("session.mos.p1>4", "there are joins_planned"),
            ("audio.jitter.p95=1ms", "write SCOPE.METRIC.STAT"),
            ("audio<1", "write SCOPE.METRIC.STAT"),
            ("", "write SCOPE.METRIC.STAT"),
            ("audio.jitter.p95<1ms:stop", "write :abort"),
            ("audio.jitter.p95<1ms:", "write :abort"),
            ("audio.jitter.p95<1ms:abort:abort", "write :abort, once"),
            ("audio.jitter.p95<1ms for ever", "as in 'for 2m'"),
            ("audio.jitter.p95<1ms for 0s", "1s to 1h"),
            ("audio.jitter.p95<1ms for 2h", "1s to 1h"),
            ("audio.jitter.p95<1ms for 1500ms", "whole seconds"),
            ("audio.jitter.p95<1ms for 2m for 3m", "once"),
            ("audio.jitter.p95<1ms for", "a unit is required"),
            ("for 2m:abort", "write SCOPE.METRIC.STAT"),
            (":abort", "write SCOPE.METRIC.STAT"),
            ("audio.mos.p1>4:abort", "when a stream has ended"),
            ("audio.mos.p1>4 for 2m", "when a stream has ended"),
            (
                "audio.packets_received>=9:abort",
                "would end every run at once",
            ),
        ] {
            let message = text.parse::<Threshold>().unwrap_err().to_string();
            assert!(message.contains(expected), "{text}: {message}");
        }
    }

    #[test]
    fn loss_is_the_worse_of_packets_and_frames() {
        let media = Media {
            packets_received: 980,
            packets_lost_network: 20,
            packets_repaired: 15,
            packets_lost: 5,
            frames_expected: 100,
            frames_delivered: 97,
            ..Media::default()
        };
        let loss = LossShares::of(&media);
        assert_eq!(
            (loss.network, loss.repaired, loss.residual),
            (Some(0.02), Some(0.015), Some(0.005))
        );
        assert_eq!(loss.worse(), Some(0.03));
        assert_eq!(
            LossShares::of(&Media {
                frames_expected: 0,
                ..media
            })
            .worse(),
            None
        );
    }
}
