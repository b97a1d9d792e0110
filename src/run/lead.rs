//! The lead of a run: it decides what comes next, and is told how the run goes.
//!
//! A run is a row of stages. Publishers join and publish. Then come *tiers*: in each, subscribers
//! join (or leave) until their number is reached, settle, and are held. Then publishers stop,
//! packets on the way arrive, accounts are closed and everybody leaves. The run does all this. The
//! lead decides which tier comes when, and what to wait for before publishers stop. The lead of a
//! run on one host, without a search, is [`Alone`].

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
/// Every method that waits is dropped and called again, many times a second, until it is ready.
/// Media flows meanwhile, rows of the series are closed, and a signal ends the wait. So the lead
/// must keep what it has learnt in `self`, and lose nothing if it is dropped between two awaits.
pub trait Lead: Send {
    /// Returns whether [`Lead::next`] is asked for the first tier only after every publisher of
    /// this host has joined or failed. Otherwise all participants join in one row.
    fn waits_for_publishers(&self) -> bool {
        true
    }

    /// Returns what comes next, given the finished tiers. While it waits, the participants stay as
    /// they are.
    fn next(&mut self, tiers: &[FinishedTier]) -> impl Future<Output = LeadStep>;

    /// Ready when the publishers of this host may stop, because other hosts may still be measuring
    /// their media. Not asked if the run ends early.
    fn before_stop(&mut self) -> impl Future<Output = ()> {
        ready(())
    }

    /// Called after publishers have stopped, when packets on the way have arrived or are lost.
    /// Ready when the accounts may be closed. `roster` has the final number of frames that each
    /// publisher of this host sent. After a signal the wait is limited.
    fn before_account(&mut self, _roster: &Roster) -> impl Future<Output = ()> {
        ready(())
    }

    /// Returns whether the current tier, which has been held for the planned time, may end. Asked
    /// again a second later.
    fn is_settled(&mut self, _seen: &Observation<'_>) -> bool {
        true
    }

    /// Returns why the run must end at once, whatever it is doing. It is then PARTIAL, and what was
    /// measured is reported. Checked many times a second.
    fn abort(&mut self) -> Option<String> {
        None
    }

    /// Hosts with a part in the plan that went missing. Nobody is owed what their publishers no
    /// longer send.
    fn missing(&self) -> Vec<u32> {
        Vec::new()
    }

    /// Length of silence after which a host counts as missing. What it has sent since the silence
    /// began is unknown.
    fn missing_after(&self) -> Duration {
        Duration::ZERO
    }

    /// The clock of the run.
    fn epoch(&self) -> Epoch {
        Epoch::read()
    }

    /// Tells the lead how the run goes: once a second, at each change of stage, and for the last
    /// time when the accounts are closed.
    fn observe(&mut self, _seen: &Observation<'_>) {}
}

/// A lead's next step.
#[derive(Clone, Debug, PartialEq)]
pub enum LeadStep {
    Tier(TierPlan),
    /// All tiers are over.
    Finish,
}

/// Plan of a tier.
#[derive(Clone, Debug, PartialEq)]
pub struct TierPlan {
    /// Name in the report.
    pub name: String,
    /// Number of subscribers, counted in joining order. If it is lower than before, the last ones
    /// leave, in the reverse order.
    pub subscribers: Subscribers,
    /// When the first of them joins or leaves. `None`: now, or when the joins in progress are done.
    pub start: Option<Time>,
    /// Time over which its joins or leaves are spread. `None`: they follow the plan's rate.
    pub spread: Option<Duration>,
    /// Time between the moment when all have joined or failed, and the start of the hold.
    pub warmup: Duration,
    /// Length of the measurement.
    pub hold: Duration,
    /// Whether participants that stay while others leave are watched: none of them may be lost, or
    /// freeze more than before.
    pub watches_stayers: bool,
    /// Whether thresholds are checked during the hold: those that end the run, and those over
    /// windows.
    pub watches_thresholds: bool,
    /// Whether the run is this tier and nothing else. Then its account is closed with the run's,
    /// and includes what arrives after publishers have stopped.
    pub is_whole: bool,
}

impl TierPlan {
    /// Subscribers in each room, or `None` if the number is a total.
    pub(super) fn per_room(&self) -> Option<u32> {
        match self.subscribers {
            Subscribers::PerRoom(count) => Some(count),
            Subscribers::Total(_) => None,
        }
    }
}

/// A finished tier.
#[derive(Clone)]
pub struct FinishedTier {
    pub plan: TierPlan,
    /// When its first join or leave began. Later than [`TierPlan::start`] by this host's delay.
    pub began_at: Time,
    pub held_from: Time,
    pub held_until: Time,
    /// Number of participants due at its end that were present.
    pub present: u32,
    pub step: Step,
    /// Judgement of the step alone.
    pub judgement: Judgement,
}

/// Stage of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunStage {
    /// Publishers join and publish.
    Publish,
    /// Subscribers join or leave.
    Gather,
    /// All participants are present, and settle.
    WarmUp,
    Hold,
    /// A tier is over. Packets on the way arrive, and after that the next tier is not known yet.
    Between,
    /// Publishers have stopped, and packets on the way arrive.
    Drain,
    /// Accounts are closed; everybody leaves.
    Leave,
}

/// A view of a run in progress. All counts are of this host.
pub struct Observation<'a> {
    pub now: Time,
    pub epoch: Epoch,
    pub stage: RunStage,
    /// Whether every participant that is due by now has joined or failed, and nobody is leaving.
    pub is_settled: bool,
    /// Number of participants that are due, and below it, that are present.
    pub participants: u32,
    pub present: u32,
    /// The broken threshold that ends the run now, as failed.
    pub broken: Option<&'a str>,
    /// Record of the whole run so far. It is current at changes of stage, and otherwise at most a
    /// second old.
    pub record: &'a Record,
    /// The current tier, until it is over.
    pub tier: Option<TierSeen<'a>>,
    /// The last row of the series.
    pub sample: &'a RunSample,
    pub roster: &'a Roster,
}

/// The current tier so far.
#[derive(Clone, Copy)]
pub struct TierSeen<'a> {
    pub plan: &'a TierPlan,
    pub began_at: Time,
    /// `None` before its hold.
    pub held_from: Option<Time>,
    pub(super) now: &'a Record,
    pub(super) began: &'a Record,
    pub(super) joins: &'a Joins,
    /// Expected subscriptions to audio and to video.
    pub(super) subscriptions: [u64; 2],
    pub(super) held: Option<&'a Record>,
}

impl TierSeen<'_> {
    /// Makes the tier's record so far. This takes differences of all histograms, so it is not free.
    /// Tracks and participants are only in the step. `None` before its hold.
    pub fn record(&self) -> Option<Record> {
        self.between(self.held?, self.now)
    }

    /// Like [`TierSeen::record`], for the part of the hold until `middle`, the run's record at some
    /// moment of it.
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

/// Lead of a run on one host: the plan's own tiers, one after the other.
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

/// Returns the tiers of a plan, one for each phase. The tiers of a search are not known in advance.
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
