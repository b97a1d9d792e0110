//! Who leads a run: says what comes next, and hears how it goes.
//!
//! A run is a row of stages. Publishers join and publish; then come *tiers*, each of which
//! subscribers join (or leave) until their number is reached, settle, and are held; then publishers
//! stop, what is under way arrives, accounts are closed and everybody leaves. The run does all
//! this; which tier comes when, and what has to be waited for before publishers stop, is the lead's
//! to say: of one run by itself that is [`Alone`].

use std::future::{Future, ready};
use std::time::Duration;

use super::account::Joins;
use crate::engine::Roster;
use crate::measure::Record;
use crate::plan::scenario::ScenarioPhase;
use crate::plan::{Plan, Subscribers};
use crate::report::{Judgement, RunSample, Step};
use crate::units::{Epoch, Time};

/// Leads a run.
///
/// Every method that waits is dropped and called again, many times a second, until it is ready:
/// media flows meanwhile, rows of the series are closed, and a signal ends the wait. So what it has
/// learnt must be kept in `self`, and nothing may be lost where it is dropped between two awaits.
pub trait Lead: Send {
    /// Whether [`Lead::next`] is asked for the first tier only when every publisher of this host is
    /// in, or has failed. Otherwise all join in one row.
    fn waits_for_publishers(&self) -> bool {
        true
    }

    /// What comes next, given the tiers that are over. It may take its time: then those who are in
    /// stay as they are.
    fn next(&mut self, tiers: &[FinishedTier]) -> impl Future<Output = LeadStep>;

    /// Ready when the publishers of this host may stop: others may still be measuring what they
    /// send. Not asked where the run ends before its time.
    fn before_stop(&mut self) -> impl Future<Output = ()> {
        ready(())
    }

    /// Publishers have stopped, and what was under way has arrived or is lost. Ready when the
    /// accounts may be closed. `roster` has how many frames each publisher of this host has
    /// sent, for good. After a signal the run waits only so long.
    fn before_account(&mut self, _roster: &Roster) -> impl Future<Output = ()> {
        ready(())
    }

    /// Whether the tier under way, which has been held for as long as was planned, may end. Asked
    /// again a second later.
    fn is_settled(&mut self, _seen: &Observation<'_>) -> bool {
        true
    }

    /// Why the run is to end at once, in the middle of whatever it does; it is then PARTIAL, and
    /// what was measured is reported. Looked at many times a second.
    fn abort(&mut self) -> Option<String> {
        None
    }

    /// Hosts that play a part in the plan and went missing: nobody is owed what their publishers do
    /// not send any more.
    fn missing(&self) -> Vec<u32> {
        Vec::new()
    }

    /// How long a host is silent before it is missing: since then nobody knows what it sends.
    fn missing_after(&self) -> Duration {
        Duration::ZERO
    }

    /// The clock of the run.
    fn epoch(&self) -> Epoch {
        Epoch::read()
    }

    /// How it goes: once a second, at each change of stage, and for the last time when the accounts
    /// are closed.
    fn observe(&mut self, _seen: &Observation<'_>) {}
}

/// What a lead wants next.
#[derive(Clone, Debug, PartialEq)]
pub enum LeadStep {
    Tier(TierPlan),
    /// All tiers are over.
    Finish,
}

/// A tier to come.
#[derive(Clone, Debug, PartialEq)]
pub struct TierPlan {
    /// As the report names it.
    pub name: String,
    /// How many are in: those who join first. Fewer than before: the others leave, in the reverse
    /// order.
    pub subscribers: Subscribers,
    /// When the first of them is to join, or to leave; `None`: now, or when the joins under way
    /// are through.
    pub start: Option<Time>,
    /// Its joins, or leaves, are spread over this; `None`: they go at the plan's rate.
    pub spread: Option<Duration>,
    /// From when all are in, or have failed, to when the hold begins.
    pub warmup: Duration,
    /// How long it is measured.
    pub hold: Duration,
    /// Whether those who stay while others leave are to be left in peace: none of them may be
    /// lost, or freeze more than before.
    pub watches_stayers: bool,
    /// Whether thresholds are looked at while it is held: those that end the run, and those of
    /// windows.
    pub watches_thresholds: bool,
    /// The run is this tier and nothing else. Then its account is closed with the run's, and what
    /// arrives after publishers have stopped is in it.
    pub is_whole: bool,
}

impl TierPlan {
    /// In each room; `None` where the number is of no room.
    pub(super) fn per_room(&self) -> Option<u32> {
        match self.subscribers {
            Subscribers::PerRoom(count) => Some(count),
            Subscribers::Total(_) => None,
        }
    }
}

/// A tier that is over.
#[derive(Clone)]
pub struct FinishedTier {
    pub plan: TierPlan,
    /// When its first join, or leave, was begun; behind [`TierPlan::start`] by what this host was
    /// late.
    pub began_at: Time,
    pub held_from: Time,
    pub held_until: Time,
    /// Who was in at its end, of those who ought to have been.
    pub present: u32,
    pub step: Step,
    /// What the step comes to by itself.
    pub judgement: Judgement,
}

/// Where a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunStage {
    /// Publishers join and publish.
    Publish,
    /// Subscribers join or leave.
    Gather,
    /// All are in, and settle.
    WarmUp,
    Hold,
    /// A tier is over: what was under way arrives, and then the next one is not known yet.
    Between,
    /// Publishers have stopped, and what is under way arrives.
    Drain,
    /// Accounts are closed; everybody leaves.
    Leave,
}

/// A look at a run under way. Everything counted is of this host.
pub struct Observation<'a> {
    pub now: Time,
    pub epoch: Epoch,
    pub stage: RunStage,
    /// Whether everybody who ought to be in by now is, or has failed, and nobody is on the way
    /// out.
    pub is_settled: bool,
    /// Who ought to be in, and who is.
    pub participants: u32,
    pub present: u32,
    /// The threshold that ends the run now, as failed.
    pub broken: Option<&'a str>,
    /// All of the run so far, brought up to date at changes of stage, and at most a second old
    /// else.
    pub record: &'a Record,
    /// The tier under way, until it is over.
    pub tier: Option<TierSeen<'a>>,
    /// The last row of the series.
    pub sample: &'a RunSample,
    pub roster: &'a Roster,
}

/// The tier under way, as far as it is.
#[derive(Clone, Copy)]
pub struct TierSeen<'a> {
    pub plan: &'a TierPlan,
    pub began_at: Time,
    /// `None` before its hold.
    pub held_from: Option<Time>,
    pub(super) now: &'a Record,
    pub(super) began: &'a Record,
    pub(super) joins: &'a Joins,
    /// Subscriptions that there ought to be, to audio and to video.
    pub(super) subscriptions: [u64; 2],
    pub(super) held: Option<&'a Record>,
}

impl TierSeen<'_> {
    /// What counts for this tier so far, as far as it is: differences of all histograms, so not for
    /// free. Tracks and participants are only in the step. `None` before its hold.
    pub fn record(&self) -> Option<Record> {
        self.between(self.held?, self.now)
    }

    /// The same of the hold's part until `middle`, the run's record at some moment of it.
    pub(super) fn record_until(&self, middle: &Record) -> Option<Record> {
        self.between(self.held?, middle)
    }

    pub(super) fn record_since(&self, middle: &Record) -> Option<Record> {
        self.between(middle, self.now)
    }

    fn between(&self, from: &Record, to: &Record) -> Option<Record> {
        Some(super::tally::so_far(
            self.began,
            from,
            to,
            self.joins,
            self.subscriptions,
        ))
    }
}

/// The lead of a run by itself: the plan's own tiers, one after the other.
pub struct Alone {
    tiers: std::vec::IntoIter<TierPlan>,
}

impl Alone {
    pub fn new(plan: &Plan) -> Alone {
        Alone {
            tiers: tiers(plan).into_iter(),
        }
    }
}

impl Lead for Alone {
    fn waits_for_publishers(&self) -> bool {
        false
    }

    async fn next(&mut self, _: &[FinishedTier]) -> LeadStep {
        self.tiers.next().map_or(LeadStep::Finish, LeadStep::Tier)
    }
}

/// The tiers of a plan: its phases. Those of a search are not known before.
pub fn tiers(plan: &Plan) -> Vec<TierPlan> {
    let scenario = &plan.scenario;
    let tier = |phase: &ScenarioPhase| TierPlan {
        name: phase.name.clone(),
        subscribers: Subscribers::PerRoom(phase.subscribers.unwrap_or(scenario.subscribers())),
        start: None,
        spread: phase.spread,
        warmup: phase.warmup,
        hold: phase.hold,
        watches_stayers: true,
        watches_thresholds: true,
        is_whole: scenario.is_whole(),
    };
    scenario.phases.iter().map(tier).collect()
}
