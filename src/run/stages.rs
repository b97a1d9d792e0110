//! Takes a test through its stages as its lead decides, with all the waiting between them.

use std::collections::BTreeSet;
use std::time::Duration;

use super::account::Joins;
use super::dues::Dues;
use super::interrupts::Interrupts;
use super::lead::{FinishedTier, Lead, LeadStep, Observation, RunStage, TierPlan, TierSeen};
use super::tally::{GRACE, Stay, Survey, Tally, so_far};
use super::{BEAT, DRAIN, PROGRESS_INTERVAL, Test};
use crate::engine::ShardCommand;
use crate::measure::{Histogram, Record};
use crate::plan::{Span, Subscribers};
use crate::report::progress::ProgressSnapshot;
use crate::report::watch::ThresholdWatch;
use crate::report::{Step, TierFacts, judge};
use crate::units::Time;

/// Delay of the first join, so that its intended moment lies in the future.
const FIRST_JOIN_DELAY: Duration = Duration::from_millis(5);
/// Interval at which the lead is asked whether a hold may end, once its planned time is over.
const SETTLE_INTERVAL: Duration = Duration::from_secs(1);
/// Time that a lead may take after a signal to settle the accounts with other hosts.
const ACCOUNT_TIMEOUT: Duration = Duration::from_secs(5);

/// Parties outside a running test: its lead, the signals that can end it, and the progress display.
pub(super) struct Around<'r, L, P> {
    pub lead: &'r mut L,
    pub interrupts: &'r mut Interrupts,
    pub progress: P,
}

/// The current tier.
pub(super) struct UnderWay {
    pub plan: TierPlan,
    began_at: Time,
    /// The run's record at its start, and below it, how late the host's bare timer had been.
    began: Record,
    floor: Histogram,
    joins: Joins,
    /// Audio and video subscriptions of all participants that are due.
    subscriptions: [u64; 2],
    /// Participants that have lost their session since its start.
    pub lost: BTreeSet<u32>,
    /// Set if others leave in this tier.
    stay: Option<Stay>,
    hold: Option<TierHold>,
}

impl UnderWay {
    pub fn began_at(&self) -> Time {
        self.began_at
    }
}

/// The hold of a tier: its start, and the run's record and survey at that moment.
pub(super) struct TierHold {
    pub since: Time,
    pub before: Record,
    survey: Survey,
    pub watch: ThresholdWatch,
    /// Its planned length.
    pub planned: Duration,
}

/// The tier that was held most recently.
pub(super) struct LastHold {
    seconds: f64,
    /// At the start of its hold, at its end, and when its account was closed.
    surveys: [Survey; 3],
}

/// The current stage of the run, and what has ended it.
pub(super) struct Stages {
    pub now: RunStage,
    /// Earliest moment at which the first subscribers may be intended to join: after the
    /// publishers.
    pub next_join_at: Time,
    pub tier: Option<UnderWay>,
    held: Option<LastHold>,
    /// The busiest engine thread's share of its core, the largest of all tiers.
    pub busiest: f64,
    pub media_stopped_at: Option<Time>,
    pub partial: Option<String>,
    /// Set if no participant was left, and neither the user nor this host had ended the run.
    pub abandoned: Option<String>,
    /// The threshold that ended the run.
    pub broken: Option<String>,
    was_interrupted: bool,
    shown_at: Time,
}

impl Stages {
    pub fn begin(now: Time) -> Stages {
        Stages {
            now: RunStage::Publish,
            next_join_at: now,
            tier: None,
            held: None,
            busiest: 0.0,
            media_stopped_at: None,
            partial: None,
            abandoned: None,
            broken: None,
            was_interrupted: false,
            shown_at: Time::ZERO,
        }
    }
}

/// State at the end of a hold.
struct HoldEnd {
    at: Time,
    record: Record,
    /// CPU time that the busiest engine thread had used since the start of the hold.
    busiest: Duration,
    /// Surveys at that moment, and after the time for packets that were on the way.
    surveys: [Survey; 2],
}

/// Reason for which a wait ended.
pub(super) enum Until {
    Done,
    Interrupted(&'static str),
    Abandoned,
    /// Ended by the lead.
    Aborted(String),
    /// Ended by a threshold.
    Broken,
}

impl Test<'_> {
    /// Runs the stages: publishers, tiers, stop, drain, goodbye.
    pub(super) async fn go<L: Lead, P: FnMut(&ProgressSnapshot)>(
        &mut self,
        around: &mut Around<'_, L, P>,
    ) {
        if self.publish(around).await {
            self.hold_tiers(around).await;
        }
        self.stop_media(around).await;
        self.stop_threads().await;
        self.finish_recording();
        self.say_goodbye().await;
    }

    /// Makes publishers join. The lead decides whether the others wait for them.
    async fn publish<L: Lead, P: FnMut(&ProgressSnapshot)>(
        &mut self,
        around: &mut Around<'_, L, P>,
    ) -> bool {
        let first_join_at = self.epoch.now() + FIRST_JOIN_DELAY;
        self.stages.next_join_at = first_join_at;
        let presence = &mut self.books.presence;
        presence.expect_elsewhere(self.plan, first_join_at);
        self.admit(Subscribers::Total(0), None, None);
        self.observe(around);
        if !around.lead.waits_for_publishers() {
            return true;
        }
        let settled = self
            .wait(around, |test| test.is_settled().then_some(Until::Done))
            .await;
        // The publishers joined before any tier.
        self.books.joins_new = Joins::default();
        self.goes_on(settled, "while publishers were joining")
    }

    async fn hold_tiers<L: Lead, P: FnMut(&ProgressSnapshot)>(
        &mut self,
        around: &mut Around<'_, L, P>,
    ) {
        loop {
            let next = match self
                .ask(around, async |lead, test| {
                    lead.next(&test.books.tiers).await
                })
                .await
            {
                Ok(next) => next,
                Err(until) => {
                    self.goes_on(until, "before the next tier");
                    return;
                }
            };
            let LeadStep::Tier(plan) = next else { return };
            if !self.hold_tier(plan, around).await {
                return;
            }
        }
    }

    /// Lets a tier gather and settle, and holds it. Returns false if no tier can follow.
    async fn hold_tier<L: Lead, P: FnMut(&ProgressSnapshot)>(
        &mut self,
        plan: TierPlan,
        around: &mut Around<'_, L, P>,
    ) -> bool {
        let (start, warmup, hold, is_whole) = (
            plan.start.unwrap_or(Time::ZERO),
            plan.warmup,
            plan.hold,
            plan.is_whole,
        );
        self.begin_tier(plan);
        self.enter(RunStage::Gather, around);
        // A host where nobody joins or leaves waits for the start, too.
        let is_gathered = |test: &Test<'_>| test.epoch.now() >= start && test.is_settled();
        let joined = self
            .wait(around, |test| is_gathered(test).then_some(Until::Done))
            .await;
        // If nobody joined there is nothing to hold: the failed joins are the result.
        if !self.goes_on(joined, "while participants were joining")
            || self.books.presence.due_count() > 0 && self.books.sessions.joined == 0
        {
            return false;
        }
        if !warmup.is_zero() {
            self.enter(RunStage::WarmUp, around);
            let end = self.epoch.now() + warmup;
            let settled = self
                .wait(around, |test| {
                    (test.epoch.now() >= end).then_some(Until::Done)
                })
                .await;
            if !self.goes_on(settled, "while participants settled") {
                return false;
            }
        }
        self.begin_hold(is_whole).await;
        self.enter(RunStage::Hold, around);
        let mut end = self.epoch.now() + hold;
        let held = loop {
            let held = self
                .wait(around, |test| {
                    (test.epoch.now() >= end).then_some(Until::Done)
                })
                .await;
            if !matches!(held, Until::Done) || around.lead.is_settled(&self.observation()) {
                break held;
            }
            end += SETTLE_INTERVAL;
        };
        let goes_on = self.goes_on(held, "before the planned duration was over");
        if is_whole {
            self.watch(self.epoch.now());
            return goes_on;
        }
        self.close_tier(around).await && goes_on
    }

    fn begin_tier(&mut self, plan: TierPlan) {
        let now = self.epoch.now();
        let began_at = plan.start.map_or(now, |start| start.max(now));
        let stayers = self.plan.participants_with(plan.subscribers);
        let leaves = plan.watches_stayers && stayers < self.books.presence.due_count();
        let stay = self.stages.held.as_ref().filter(|_| leaves).map(|held| {
            let [start, end, now] = &held.surveys;
            let stayers = self.plan.participants().take(stayers as usize);
            let stayers = stayers.map(|participant| participant.index).collect();
            Stay::begin(stayers, began_at, [start, end, now], held.seconds)
        });
        self.admit(plan.subscribers, plan.start, plan.spread);
        if self.plan.scenario.search.is_some() {
            self.replace_gone(plan.spread);
        }
        self.stages.tier = Some(UnderWay {
            plan,
            began_at,
            began: self.books.record.clone(),
            floor: self.observer.floor_so_far(),
            joins: std::mem::take(&mut self.books.joins_new),
            subscriptions: self.subscriptions(),
            lost: BTreeSet::new(),
            stay,
            hold: None,
        });
    }

    /// Expected subscriptions to audio and to video.
    fn subscriptions(&self) -> [u64; 2] {
        let mut all = Joins::default();
        let presence = &self.books.presence;
        let now = self.epoch.now();
        let dues = Dues::within(self.plan, &presence.book, Span::since(now));
        self.plan
            .participants()
            .filter(|participant| presence.due().contains(&participant.index))
            .for_each(|participant| all.add(&dues, &participant, now));
        all.tracks
    }

    async fn begin_hold(&mut self, is_whole: bool) {
        let survey = if is_whole {
            self.flush().await;
            Survey::default()
        } else {
            self.survey().await
        };
        self.observer.mark_hold();
        self.threads.mark_hold();
        if let Some(tier) = &mut self.stages.tier {
            let watched: &[_] = if tier.plan.watches_thresholds {
                &self.judging.thresholds
            } else {
                &[]
            };
            tier.hold = Some(TierHold {
                since: self.epoch.now(),
                before: self.books.record.clone(),
                survey,
                planned: tier.plan.hold,
                watch: ThresholdWatch::begin(watched, &self.books.record, self.epoch.now()),
            });
        }
    }

    /// Closes the current tier. After the time for packets on the way, its result becomes a step of
    /// the report. Returns false if that wait was cut short.
    async fn close_tier<L: Lead, P: FnMut(&ProgressSnapshot)>(
        &mut self,
        around: &mut Around<'_, L, P>,
    ) -> bool {
        // Check the thresholds before the survey. The survey updates the expected counts, and
        // compared with a check made before it, the last second would look lost.
        self.watch(self.epoch.now());
        let end = self.survey().await;
        let at = self.epoch.now();
        let record = self.books.record.clone();
        self.enter(RunStage::Between, around);
        let busiest = self.threads.busiest_since_hold();
        let mut goes_on = self.stages.partial.is_none();
        if goes_on {
            let over = at + GRACE;
            let is_over = |test: &Test<'_>| (test.epoch.now() >= over).then_some(Until::Done);
            let waited = self.wait(around, is_over).await;
            goes_on = self.goes_on(waited, "while the last packets of a tier were awaited");
        }
        let after = self.survey().await;
        if let Some(tier) = self.stages.tier.take() {
            let end = HoldEnd {
                at,
                record,
                busiest,
                surveys: [end, after],
            };
            self.enter_tier(tier, end);
        }
        goes_on
    }

    /// Enters a finished tier in the books. A tier that was never held gives no result.
    fn enter_tier(&mut self, mut tier: UnderWay, end: HoldEnd) {
        let Some(hold) = tier.hold.take() else { return };
        let seconds = end.at.since(hold.since).as_secs_f64();
        // A participant that is gone is not healthy, whichever tier it was lost in.
        let gone = self.books.presence.gone_people(end.at);
        tier.lost.extend(gone);
        let busiest = end.busiest.as_secs_f64() / seconds.max(0.001);
        self.stages.busiest = self.stages.busiest.max(busiest);
        let facts = self.tier_facts(&tier, &hold, &end, busiest);
        let tally = Tally {
            max_loss_pct: self.judging.max_loss_pct,
            due: self.books.presence.due(),
            present: &self.books.sessions.present,
            lost: &tier.lost,
            joins: tier.joins,
            records: [&tier.began, &hold.before, &end.record],
            surveys: [&hold.survey, &end.surveys[0], &end.surveys[1]],
        };
        let step = Step {
            name: tier.plan.name.clone(),
            participants: self.books.presence.due_count(),
            seconds,
            record: tally.record(),
            tier: Some(facts),
        };
        self.books.tiers.push(FinishedTier {
            plan: tier.plan,
            began_at: tier.began_at,
            held_from: hold.since,
            held_until: end.at,
            present: self.present(),
            judgement: judge::judge_tier(&step, self.judging),
            step,
        });
        let [at_end, after] = end.surveys;
        self.stages.held = Some(LastHold {
            seconds,
            surveys: [hold.survey, at_end, after],
        });
    }

    /// Reasons that make a tier invalid, and reasons beside its figures for which it fails.
    fn tier_facts(
        &mut self,
        tier: &UnderWay,
        hold: &TierHold,
        end: &HoldEnd,
        busiest: f64,
    ) -> TierFacts {
        let stay = tier.stay.as_ref();
        TierFacts {
            subscribers: tier.plan.per_room(),
            invalid: self.observer.reasons_between(
                tier.began_at,
                end.at,
                &end.record.since(&tier.began),
                &tier.floor,
                busiest,
            ),
            complaints: [
                self.stages.abandoned.iter().cloned().collect(),
                self.gone_people(end.at, end.at, "the tier"),
                stay.map_or_else(Vec::new, |stay| {
                    stay.complaints(&tier.lost, &end.surveys[0], end.at)
                }),
                self.stages.broken.iter().cloned().collect(),
                hold.watch.complaints(),
            ]
            .concat(),
            cut_short: self.stages.partial.clone(),
        }
    }

    /// Name of the tier that is being held, if it was already held at that time.
    pub(super) fn held_since(&self, at: Time) -> Option<&str> {
        let held = self
            .stages
            .tier
            .as_ref()
            .filter(|_| self.stages.now == RunStage::Hold);
        let held = held.filter(|tier| tier.hold.as_ref().is_some_and(|hold| hold.since <= at));
        held.map(|tier| tier.plan.name.as_str())
    }

    /// Takes the hold of a tier that is the whole run. Its account is closed with the run's.
    pub(super) fn take_whole_hold(&mut self) -> Option<TierHold> {
        self.stages
            .tier
            .take()
            .filter(|tier| tier.plan.is_whole)?
            .hold
    }

    /// All holds as tier name, start and end, including one that is the whole run.
    pub(super) fn holds(&self) -> Vec<(String, Time, Time)> {
        let over = self
            .books
            .tiers
            .iter()
            .map(|tier| (tier.plan.name.clone(), tier.held_from, tier.held_until));
        let whole = self
            .stages
            .tier
            .as_ref()
            .filter(|tier| tier.plan.is_whole)
            .zip(self.stages.media_stopped_at);
        let whole = whole.and_then(|(tier, stopped)| {
            Some((tier.plan.name.clone(), tier.hold.as_ref()?.since, stopped))
        });
        over.chain(whole).collect()
    }

    /// Returns whether all participants that were to join have joined or failed, and all that were
    /// to leave are gone.
    fn is_settled(&self) -> bool {
        self.books.sessions.joined + self.books.sessions.failed >= self.books.joins_all.count
            && self.books.sessions.leaving.is_empty()
    }

    /// Stops publishers, then gives packets that are on the way or lost the time to arrive.
    async fn stop_media<L: Lead, P: FnMut(&ProgressSnapshot)>(
        &mut self,
        around: &mut Around<'_, L, P>,
    ) {
        if self.stages.partial.is_none() {
            let may_stop = self
                .ask(around, async |lead, _| lead.before_stop().await)
                .await;
            if let Err(until) = may_stop {
                self.goes_on(until, "while others were measuring");
            }
        }
        self.threads.command_all(|| ShardCommand::StopPublishing);
        let now = self.epoch.now();
        self.stages.media_stopped_at = Some(now);
        self.flush().await;
        self.threads.mark_stop();
        self.enter(RunStage::Drain, around);
        let end = now + DRAIN;
        // If nobody is left there is nothing to wait for.
        if let Until::Interrupted(signal) = self
            .wait(around, |test| {
                (test.epoch.now() >= end).then_some(Until::Done)
            })
            .await
        {
            self.note_interrupt(&format!("{signal} while the last packets were awaited"));
        }
        self.settle_accounts(around).await;
        self.enter(RunStage::Leave, around);
    }

    async fn settle_accounts<L: Lead, P: FnMut(&ProgressSnapshot)>(
        &mut self,
        around: &mut Around<'_, L, P>,
    ) {
        let limit = if self.stages.was_interrupted {
            self.epoch.now() + ACCOUNT_TIMEOUT
        } else {
            Time::MAX
        };
        let settled = self
            .ask(around, async |lead, test| {
                let patience = limit.since(test.epoch.now());
                // Hosts that have not answered by then will not answer.
                let _ = tokio::time::timeout(patience, lead.before_account(&test.roster)).await;
            })
            .await;
        if let Err(Until::Interrupted(signal)) = settled {
            self.note_interrupt(&format!("{signal} while the accounts were settled"));
        }
    }

    fn note_interrupt(&mut self, why: &str) {
        self.stages.was_interrupted = true;
        self.stages.partial.get_or_insert_with(|| why.to_owned());
    }

    /// Notes why a wait ended early. Returns true if it did not.
    fn goes_on(&mut self, until: Until, when: &str) -> bool {
        let seconds = self.epoch.now().as_micros() as f64 / 1e6;
        match until {
            Until::Done => return true,
            Until::Interrupted(signal) => {
                self.note_interrupt(&format!("{signal} after {seconds:.1} s, {when}"))
            }
            Until::Aborted(reason) => self.stages.partial = Some(reason),
            // The tier says why it failed.
            Until::Broken => {}
            Until::Abandoned => {
                let why = self.books.sessions.why_gone();
                self.stages.abandoned.get_or_insert_with(|| {
                    format!("all participants were gone after {seconds:.1} s, {when}{why}")
                });
            }
        }
        false
    }

    /// Takes reports and notices until `done` returns a reason, a signal comes, the lead or a
    /// threshold ends the run, or no participant is left.
    async fn wait<L: Lead, P: FnMut(&ProgressSnapshot)>(
        &mut self,
        around: &mut Around<'_, L, P>,
        done: impl Fn(&Test<'_>) -> Option<Until>,
    ) -> Until {
        let mut beat = beat();
        loop {
            if let Some(until) = done(self).or_else(|| self.end_of_waiting(around.lead)) {
                return until;
            }
            tokio::select! {
                signal = around.interrupts.next() => return Until::Interrupted(signal),
                _ = beat.tick() => self.turn(around),
            }
        }
    }

    /// Like [`Test::wait`], until the lead has an answer. The lead is asked again at each beat,
    /// because it learns meanwhile how the run goes.
    async fn ask<L: Lead, P: FnMut(&ProgressSnapshot), T>(
        &mut self,
        around: &mut Around<'_, L, P>,
        question: impl AsyncFn(&mut L, &Test<'_>) -> T,
    ) -> Result<T, Until> {
        let mut beat = beat();
        loop {
            if let Some(until) = self
                .end_of_waiting(around.lead)
                .filter(|_| self.stages.media_stopped_at.is_none())
            {
                return Err(until);
            }
            tokio::select! {
                biased;
                signal = around.interrupts.next() => return Err(Until::Interrupted(signal)),
                answer = question(around.lead, self) => return Ok(answer),
                _ = beat.tick() => {}
            }
            self.turn(around);
        }
    }

    fn end_of_waiting(&self, lead: &mut impl Lead) -> Option<Until> {
        // Nothing can be ended once publishers have stopped.
        let may_abort = self.stages.partial.is_none() && self.stages.media_stopped_at.is_none();
        let aborted = lead.abort().filter(|_| may_abort).map(Until::Aborted);
        let broken = self
            .stages
            .broken
            .as_ref()
            .filter(|_| self.stages.now == RunStage::Hold)
            .map(|_| Until::Broken);
        aborted
            .or(broken)
            .or_else(|| self.is_abandoned().then_some(Until::Abandoned))
    }

    /// Returns whether every participant that is due has ended for good, after at least one had
    /// joined.
    fn is_abandoned(&self) -> bool {
        let (ended, due) = (&self.books.sessions.ended, self.books.presence.due());
        let all = self.books.sessions.joined > 0 && !due.is_empty() && ended.len() >= due.len();
        all && due.iter().all(|index| ended.contains_key(index))
    }

    /// Checks the thresholds that apply during a hold.
    fn watch(&mut self, now: Time) {
        let Some(UnderWay {
            began,
            joins,
            subscriptions,
            hold: Some(hold),
            ..
        }) = self
            .stages
            .tier
            .as_mut()
            .filter(|_| self.stages.now == RunStage::Hold)
        else {
            return;
        };
        let so_far = hold.watch.wants_hold().then(|| {
            so_far(
                began,
                &hold.before,
                &self.books.record,
                joins,
                *subscriptions,
            )
        });
        let broken = hold.watch.take(&self.books.record, so_far.as_ref(), now);
        let when = |why| {
            format!(
                "{why}, {:.0} s into the hold, and ended the run",
                now.since(hold.since).as_secs_f64()
            )
        };
        self.stages.broken = self.stages.broken.take().or(broken.map(when));
    }

    /// Takes what has arrived since the last beat, and shows progress if it is due.
    fn turn<L: Lead, P: FnMut(&ProgressSnapshot)>(&mut self, around: &mut Around<'_, L, P>) {
        self.take_what_came();
        let now = self.epoch.now();
        if now >= self.books.second.due {
            self.close_second(now);
            let missing = around.lead.missing();
            if missing != self.missing {
                let silent_since = now - around.lead.missing_after();
                let presence = &mut self.books.presence;
                presence.note_missing(self.plan, [&self.missing, &missing], silent_since, now);
                self.missing = missing;
            }
            self.watch(now);
            self.observe(around);
        }
        if now.since(self.stages.shown_at) >= PROGRESS_INTERVAL {
            self.stages.shown_at = now;
            (around.progress)(&self.snapshot(now));
        }
    }

    fn enter<L: Lead, P>(&mut self, stage: RunStage, around: &mut Around<'_, L, P>) {
        self.stages.now = stage;
        self.observe(around);
    }

    fn observe<L: Lead, P>(&self, around: &mut Around<'_, L, P>) {
        around.lead.observe(&self.observation());
    }

    fn observation(&self) -> Observation<'_> {
        Observation {
            now: self.epoch.now(),
            epoch: self.epoch,
            stage: self.stages.now,
            is_settled: self.is_settled(),
            participants: self.books.presence.due_count(),
            present: self.present(),
            broken: self.stages.broken.as_deref(),
            record: &self.books.record,
            tier: self
                .stages
                .tier
                .as_ref()
                .filter(|_| self.stages.now != RunStage::Between)
                .map(|tier| TierSeen {
                    plan: &tier.plan,
                    began_at: tier.began_at,
                    held_from: tier.hold.as_ref().map(|hold| hold.since),
                    now: &self.books.record,
                    began: &tier.began,
                    joins: &tier.joins,
                    subscriptions: tier.subscriptions,
                    held: tier.hold.as_ref().map(|hold| &hold.before),
                }),
            sample: &self.books.second.last,
            roster: &self.roster,
        }
    }
}

/// Timer at which reports and notices are read. If each of them woke this thread, it and the
/// senders would do little else while a thousand participants a second join.
fn beat() -> tokio::time::Interval {
    let mut beat = tokio::time::interval(BEAT);
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    beat
}
