//! A run that looks for the largest number of subscribers with which it passes. The search chooses
//! the next point, and each point is held until its verdict is settled.

use std::time::Duration;

use super::lead::{FinishedTier, Lead, LeadStep, Observation, RunStage, TierPlan};
use crate::knee::{self, KneeAnswer, PointVerdict, SearchPhase, Tried};
use crate::measure::Record;
use crate::plan::{Plan, Subscribers};
use crate::report::{Capacity, CapacityPoint, Judging, Verdict, judge};

/// A point is held once, twice or four times as long as asked for. If the two halves of the longest
/// hold still contradict each other, the point is unsettled.
const DOUBLINGS_MAX: u32 = 2;

pub struct RunSearch {
    knee: knee::KneeSearch,
    judging: Judging,
    spread: Option<Duration>,
    warmup: Duration,
    duration: Duration,
    /// Phase of the search for each point so far.
    phases: Vec<SearchPhase>,
    point: RunningPoint,
}

/// The point being measured.
#[derive(Default)]
struct RunningPoint {
    /// Number of times that its hold was doubled.
    doublings: u32,
    /// The run's record in the middle of its hold.
    middle: Option<Record>,
    is_unsettled: bool,
}

impl RunSearch {
    pub fn new(plan: &Plan, judging: &Judging) -> RunSearch {
        RunSearch {
            knee: knee::KneeSearch::new(plan.scenario.subscribers()),
            judging: judging.clone(),
            spread: plan.scenario.times().spread,
            warmup: plan.scenario.times().warmup,
            duration: plan.scenario.times().hold,
            phases: Vec::new(),
            point: RunningPoint::default(),
        }
    }

    /// Returns what was found, or `None` if the run ended before that.
    pub fn capacity(&self) -> Option<Capacity> {
        let knee::SearchStep::Done(answer) = self.knee.next() else {
            return None;
        };
        let broke_first = match answer {
            KneeAnswer::Capacity { .. } | KneeAnswer::None => self
                .knee
                .broke_first()
                .map(|tried| (tried.participants, tried.reasons.clone())),
            KneeAnswer::AtLeast { .. } | KneeAnswer::NotMeasured { .. } => None,
        };
        let point = |(tried, phase): (&Tried, &SearchPhase)| CapacityPoint {
            subscribers: tried.participants,
            phase: phase.name(),
            verdict: name(tried.verdict),
        };
        Some(Capacity {
            answer,
            broke_first,
            points: self
                .knee
                .tried()
                .iter()
                .zip(&self.phases)
                .map(point)
                .collect(),
        })
    }

    fn take(&mut self, tier: &FinishedTier) {
        let Subscribers::PerRoom(subscribers) = tier.plan.subscribers else {
            return;
        };
        let verdict = match tier.judgement.verdict {
            Verdict::Invalid => PointVerdict::Invalid,
            _ if self.point.is_unsettled => PointVerdict::Unsettled,
            Verdict::Pass => PointVerdict::Pass,
            Verdict::Fail | Verdict::Partial => PointVerdict::Fail,
        };
        self.knee
            .take(subscribers, verdict, tier.judgement.reasons.clone());
        self.point = RunningPoint::default();
    }

    fn passes(&self, record: &Record) -> bool {
        judge::media_failures(record, &self.judging).is_empty()
    }
}

/// Name of a verdict in the report.
const fn name(verdict: PointVerdict) -> &'static str {
    match verdict {
        PointVerdict::Pass => "PASS",
        PointVerdict::Fail => "FAIL",
        PointVerdict::Invalid => "INVALID",
        PointVerdict::Unsettled => "UNSETTLED",
    }
}

impl Lead for RunSearch {
    fn waits_for_publishers(&self) -> bool {
        false
    }

    async fn next(&mut self, tiers: &[FinishedTier]) -> LeadStep {
        if let Some(tier) = tiers.get(self.knee.tried().len()) {
            self.take(tier);
        }
        let knee::SearchStep::Try(point) = self.knee.next() else {
            return LeadStep::Finish;
        };
        self.phases.push(point.phase);
        LeadStep::Tier(TierPlan {
            name: format!("point {}", self.phases.len()),
            subscribers: Subscribers::PerRoom(point.participants),
            start: None,
            spread: self.spread,
            warmup: self.warmup,
            hold: self.duration,
            is_whole: false,
            // The search itself makes participants come and go.
            watches_stayers: false,
            watches_thresholds: true,
        })
    }

    /// The verdict is settled if both halves of the hold have the same result as the whole.
    fn is_settled(&mut self, seen: &Observation<'_>) -> bool {
        let Some((tier, held_from)) = seen
            .tier
            .as_ref()
            .and_then(|tier| Some((tier, tier.held_from?)))
        else {
            return true;
        };
        let length = self.duration * 2u32.pow(self.point.doublings);
        if seen.now.since(held_from) < length {
            return false;
        }
        let (Some(whole), Some(middle)) = (tier.record(), &self.point.middle) else {
            return true;
        };
        let halves = [tier.record_until(middle), tier.record_since(middle)];
        let passes = self.passes(&whole);
        if halves
            .iter()
            .flatten()
            .all(|half| self.passes(half) == passes)
        {
            return true;
        }
        if self.point.doublings == DOUBLINGS_MAX {
            self.point.is_unsettled = true;
            return true;
        }
        // The hold so far becomes the first half of the longer one.
        self.point.doublings += 1;
        self.point.middle = Some(seen.record.clone());
        false
    }

    fn observe(&mut self, seen: &Observation<'_>) {
        let held_from = seen.tier.as_ref().and_then(|tier| tier.held_from);
        if let Some(held_from) =
            held_from.filter(|_| seen.stage == RunStage::Hold && self.point.middle.is_none())
            && seen.now.since(held_from) >= self.duration / 2
        {
            self.point.middle = Some(seen.record.clone());
        }
    }
}
