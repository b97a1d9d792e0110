//! Compares tiers, and finds the last one that passed before the first one that did not.

use std::fmt::Write as _;

use super::judge::{Judgement, LossShares, Verdict, judge_step};
use super::{Capacity, Outcome, Step, Unmeasured};
use crate::knee::{CONFIDENCE, KneeAnswer, KneeLimit};
use crate::measure::Histogram;
use crate::plan::Subscribers;
use crate::words::{count, maybe, micros, number, percent, wrapped};

/// Most reasons shown for one tier.
const REASONS_MAX: usize = 3;

/// Result of a ramp.
pub struct Knee<'a> {
    pub answer: TiersAnswer,
    /// The last tier that passed before the first one that did not. `None` if the first tier did
    /// not pass. If all passed, the largest.
    pub passed: Option<&'a Step>,
    /// The first tier that did not pass, as far as it was held.
    pub broke: Option<(&'a Step, Judgement)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TiersAnswer {
    /// Every tier passed, so the knee lies higher.
    AllPassed,
    Found,
    /// The first tier failed, so the knee lies lower.
    FirstFailed,
    /// Before any tier failed there was one without a result, because the generator was the limit
    /// or the run ended.
    NotMeasured,
}

impl TiersAnswer {
    /// Name in the JSON report.
    pub const fn name(self) -> &'static str {
        match self {
            TiersAnswer::AllPassed => "all_passed",
            TiersAnswer::Found => "found",
            TiersAnswer::FirstFailed => "first_failed",
            TiersAnswer::NotMeasured => "not_measured",
        }
    }
}

impl<'a> Knee<'a> {
    /// Returns `None` for a run without tiers.
    pub fn of(outcome: &'a Outcome) -> Option<Knee<'a>> {
        if outcome.plan.scenario.search.is_some() {
            None
        } else {
            Knee::among(tiers(outcome).collect(), &outcome.unmeasured)
        }
    }

    /// Finds the knee among tiers in the order in which they were held, each with its judgement.
    pub fn among(tiers: Vec<(&'a Step, Judgement)>, unmeasured: &[Unmeasured]) -> Option<Knee<'a>> {
        if tiers.is_empty() && unmeasured.is_empty() {
            return None;
        }
        let largest = tiers
            .iter()
            .map(|(step, _)| *step)
            .max_by_key(|step| step.participants);
        let mut passed = None;
        for (step, judgement) in tiers {
            if judgement.verdict == Verdict::Pass {
                passed = Some(step);
                continue;
            }
            let answer = match (judgement.verdict, passed) {
                (Verdict::Fail, Some(_)) => TiersAnswer::Found,
                (Verdict::Fail, None) => TiersAnswer::FirstFailed,
                _ => TiersAnswer::NotMeasured,
            };
            let broke = Some((step, judgement));
            return Some(Knee {
                answer,
                passed,
                broke,
            });
        }
        let (answer, passed) = if unmeasured.is_empty() {
            (TiersAnswer::AllPassed, largest)
        } else {
            (TiersAnswer::NotMeasured, passed)
        };
        Some(Knee {
            answer,
            passed,
            broke: None,
        })
    }

    /// The result in one sentence.
    pub(crate) fn sentence(&self, unmeasured: &[Unmeasured]) -> String {
        let passed = self.passed.map(size);
        let broke = self
            .broke
            .as_ref()
            .map(|(step, judgement)| (size(step), reason(judgement)));
        match (self.answer, passed, broke) {
            (TiersAnswer::AllPassed, Some(passed), _) => {
                format!("not reached: all tiers passed, up to {passed}")
            }
            (TiersAnswer::Found, Some(passed), Some((broke, why))) => {
                format!("{passed}; {broke} did not pass: {why}")
            }
            (TiersAnswer::FirstFailed, _, Some((broke, why))) => {
                format!("below the first tier: {broke} did not pass: {why}")
            }
            (_, passed, broke) => {
                let why = match (broke, unmeasured.first()) {
                    (Some((size, why)), _) => format!("{size}: {why}"),
                    (None, Some(next)) => format!("the run did not come to {}", next.name),
                    (None, None) => "no tier was held".to_owned(),
                };
                match passed {
                    Some(passed) => format!("at least {passed}; not measured beyond: {why}"),
                    None => format!("not measured: {why}"),
                }
            }
        }
    }
}

/// Steps that are tiers, each with its judgement.
pub fn tiers(outcome: &Outcome) -> impl Iterator<Item = (&Step, Judgement)> {
    let tiers = outcome.steps.iter().filter(|step| step.tier.is_some());
    tiers.map(|step| (step, judge_step(outcome, step)))
}

/// Formats one line per tier, the reasons of those that did not pass, and the overall result. Empty
/// for a run without tiers.
pub(super) fn table(
    outcome: &Outcome,
    paint: impl Fn(&str) -> String,
    paint_verdict: impl Fn(Verdict, &str) -> String,
) -> String {
    let (title, label, found) = match Knee::of(outcome) {
        Some(knee) => ("Tiers", "Knee", knee.sentence(&outcome.unmeasured)),
        None if outcome.plan.scenario.search.is_some() => {
            ("Points", "Capacity", capacity_sentence(outcome))
        }
        None => return String::new(),
    };
    let heads = [
        "subs/room",
        "healthy",
        "join p95",
        "loss",
        "audio p95",
        "video p95",
        "RTT p95",
    ];
    let mut text = format!(
        "{}{}\n",
        paint(&format!("{title:<8}")),
        row(heads.map(str::to_owned))
    );
    for (step, judgement) in tiers(outcome) {
        let verdict = paint_verdict(judgement.verdict, judgement.verdict.name());
        let _ = writeln!(text, "{:<8}{} {verdict}", step.name, row(cells(step)));
    }
    for tier in &outcome.unmeasured {
        let _ = writeln!(
            text,
            "{:<8}{:>10}  not measured",
            tier.name,
            per_room(tier.subscribers)
        );
    }
    // For the points of a search it is enough to say why the capacity is what it is.
    if outcome.plan.scenario.search.is_none() {
        text.push_str(&reasons(outcome));
    }
    let found = wrapped(&found, 11);
    let _ = writeln!(
        text,
        "{} {}",
        paint(&format!("{label:<10}")),
        found.trim_start()
    );
    text
}

fn reasons(outcome: &Outcome) -> String {
    let mut text = String::new();
    for (step, judgement) in
        tiers(outcome).filter(|(_, judgement)| judgement.verdict != Verdict::Pass)
    {
        for reason in judgement.reasons.iter().take(REASONS_MAX) {
            text.push_str(&wrapped(&format!("{}: {reason}", step.name), 2));
        }
        if judgement.reasons.len() > REASONS_MAX {
            let _ = writeln!(
                text,
                "  {}: and {} more",
                step.name,
                judgement.reasons.len() - REASONS_MAX
            );
        }
    }
    text
}

fn cells(step: &Step) -> [String; 7] {
    let (session, audio, video) = (&step.record.session, &step.record.audio, &step.record.video);
    [
        per_room(subscribers(step)),
        format!(
            "{}/{}",
            number(session.participants_healthy),
            number(session.participants_total)
        ),
        p95(&session.join),
        maybe(worst_loss(step), percent),
        p95(&audio.one_way_latency),
        p95(&video.one_way_latency),
        p95(&session.rtt_rtcp),
    ]
}

/// Result of a search, in a sentence or two.
fn capacity_sentence(outcome: &Outcome) -> String {
    let Some(capacity) = &outcome.capacity else {
        return "not found: the search did not come to its end".to_owned();
    };
    let size = |subscribers: u32| {
        let participants = outcome
            .plan
            .participants_with(Subscribers::PerRoom(subscribers));
        format!(
            "{} a room ({})",
            count(subscribers.into(), "subscriber"),
            count(participants.into(), "participant")
        )
    };
    let broke = broke_first(capacity);
    match &capacity.answer {
        KneeAnswer::Capacity {
            participants,
            low,
            high,
            settled,
        } => {
            let settled = if *settled {
                String::new()
            } else {
                let points = count(capacity.points.len() as u64, "point");
                format!(", and not settled after {points}")
            };
            format!(
                "{}: with so many every other run passes (with {:.0} % confidence it is {} to {}{settled}){broke}",
                size(*participants),
                CONFIDENCE * 1e2,
                number((*low).into()),
                number((*high).into())
            )
        }
        KneeAnswer::AtLeast {
            participants,
            limit: KneeLimit::Max,
        } => format!(
            "at least {}, the most that was to be tried",
            size(*participants)
        ),
        KneeAnswer::AtLeast {
            participants,
            limit: KneeLimit::Generator { at, reasons },
        } => format!(
            "at least {}: the generator was the limit at {}: {}",
            size(*participants),
            number((*at).into()),
            first_of(reasons)
        ),
        KneeAnswer::None => format!("below one subscriber a room{broke}"),
        KneeAnswer::NotMeasured { reasons } => format!(
            "not measured: the generator was the limit even with one subscriber a room: {}",
            first_of(reasons)
        ),
    }
}

/// Returns where it broke first and why, as a continuation of the answer.
fn broke_first(capacity: &Capacity) -> String {
    capacity
        .broke_first
        .as_ref()
        .map_or_else(String::new, |(at, reasons)| {
            let at = number((*at).into());
            format!(". What broke first, with {at}: {}", first_of(reasons))
        })
}

fn first_of(reasons: &[String]) -> &str {
    reasons.first().map_or("no reason is known", String::as_str)
}

/// Subscribers in each room. `None` if their number is a total.
pub fn subscribers(step: &Step) -> Option<u32> {
    step.tier.as_ref().and_then(|tier| tier.subscribers)
}

fn per_room(subscribers: Option<u32>) -> String {
    maybe(subscribers, |subscribers| number(subscribers.into()))
}

/// Formats a row. With the name before it and the verdict behind it, it takes 80 columns.
fn row([subscribers, healthy, join, loss, audio, video, rtt]: [String; 7]) -> String {
    format!("{subscribers:>10}{healthy:>10}{join:>9}{loss:>7}{audio:>10}{video:>10}{rtt:>8}")
}

fn p95(histogram: &Histogram) -> String {
    match histogram.quantile(0.95) {
        Some(us) => micros(us as f64),
        None if histogram.expected() == 0 => "n/a".to_owned(),
        None => "never".to_owned(),
    }
}

/// Loss over both kinds of media, if there are both. Unknown if one of them is.
fn worst_loss(step: &Step) -> Option<f64> {
    let kinds = [&step.record.audio, &step.record.video]
        .into_iter()
        .filter(|media| media.tracks_expected > 0);
    let losses: Option<Vec<f64>> = kinds.map(|media| LossShares::of(media).worse()).collect();
    losses?.into_iter().reduce(f64::max)
}

/// Formats the size of a step, for example `25 subscribers a room (27 participants)`.
fn size(step: &Step) -> String {
    let participants = count(step.participants.into(), "participant");
    match subscribers(step) {
        Some(subscribers) => format!(
            "{} a room ({participants})",
            count(subscribers.into(), "subscriber")
        ),
        None => participants,
    }
}

fn reason(judgement: &Judgement) -> &str {
    judgement
        .reasons
        .first()
        .map_or("no reason is known", String::as_str)
}
