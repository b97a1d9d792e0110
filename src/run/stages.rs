//! A test's way through its stages, as its lead wants them, and all waiting on the way.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::sync::mpsc;

use super::account::Joins;
use super::interrupts::Interrupts;
use super::lead::{FinishedTier, Lead, LeadStep, Observation, RunStage, TierPlan, TierSeen};
use super::tally::{GRACE, Stay, Survey, Tally, so_far};
use super::{BEAT, DRAIN, PEERS_PER_PARTICIPANT, PROGRESS_INTERVAL, Test};
use crate::engine::ShardCommand;
use crate::measure::{Histogram, Kind, Record};
use crate::net;
use crate::plan::{LostPublishers, Subscribers};
use crate::report::progress::ProgressSnapshot;
use crate::report::watch::ThresholdWatch;
use crate::report::{Step, TierFacts, judge};
use crate::signal::session::{self, Request, Sections, ShardPlace};
use crate::units::Time;

/// Before the first join, so that its moment lies ahead.
const FIRST_JOIN_DELAY: Duration = Duration::from_millis(5);
/// How often it is asked whether a hold may end that was to be over.
const SETTLE_INTERVAL: Duration = Duration::from_secs(1);
/// After a signal a lead may take so long to settle the accounts with others.
const ACCOUNT_TIMEOUT: Duration = Duration::from_secs(5);

/// Who is around a test under way: who leads it, who may end it, who watches.
pub(super) struct Around<'r, L, P> {
    pub lead: &'r mut L,
    pub interrupts: &'r mut Interrupts,
    pub progress: P,
}

/// The tier under way.
pub(super) struct UnderWay {
    pub plan: TierPlan,
    began_at: Time,
    /// The run's record at its beginning, and how late the host's bare timer had been.
    began: Record,
    floor: Histogram,
    joins: Joins,
    /// Of audio and of video, of all who ought to be in.
    subscriptions: [u64; 2],
    /// Who lost its session since.
    pub lost: BTreeSet<u32>,
    /// Where others leave.
    stay: Option<Stay>,
    hold: Option<TierHold>,
}

/// From when on a tier is measured, and the run's record and survey then.
pub(super) struct TierHold {
    pub since: Time,
    pub before: Record,
    survey: Survey,
    pub watch: ThresholdWatch,
    /// How long it is to be.
    pub planned: Duration,
}

/// The tier that was held last.
pub(super) struct LastHold {
    seconds: f64,
    /// At the beginning of its hold, at its end, and when its account was closed.
    surveys: [Survey; 3],
}

/// When each of a row of participants is to join, or to leave.
#[derive(Clone, Copy)]
struct JoinPace {
    first_at: Time,
    /// Seconds.
    interval: f64,
}

impl JoinPace {
    fn moment(self, place: u32) -> Time {
        self.first_at + Duration::from_secs_f64(f64::from(place) * self.interval)
    }
}

/// Where a participant's connections live.
struct Home {
    commands: std::sync::mpsc::Sender<ShardCommand>,
    key: usize,
}

impl Home {
    /// The plan has a participant leave that is gone already.
    fn leave(self) {
        for key in self.key..self.key + PEERS_PER_PARTICIPANT {
            // A worker that is gone is missed when its account is.
            let _ = self.commands.send(ShardCommand::Leave { key });
            let _ = self.commands.send(ShardCommand::RemovePeer { key });
        }
    }
}

/// Why a wait ended.
pub(super) enum Until {
    Done,
    Interrupted(&'static str),
    Abandoned,
    /// By the lead.
    Aborted(String),
    /// By a threshold.
    Broken,
}

impl Test<'_> {
    /// Publishers, tiers, stop, drain, goodbye.
    pub(super) async fn go<L: Lead, P: FnMut(&ProgressSnapshot)>(
        &mut self,
        around: &mut Around<'_, L, P>,
    ) {
        if self.publish(around).await {
            self.hold_tiers(around).await;
        }
        self.stop_media(around).await;
        self.stop_workers().await;
        self.join_workers();
        self.finish_recording();
        self.say_goodbye().await;
    }

    /// Has publishers join. The lead says whether the others wait for them.
    async fn publish<L: Lead, P: FnMut(&ProgressSnapshot)>(
        &mut self,
        around: &mut Around<'_, L, P>,
    ) -> bool {
        self.next_join_at = self.epoch.now() + FIRST_JOIN_DELAY;
        self.admit(Subscribers::Total(0), None, None);
        self.observe(around);
        if !around.lead.waits_for_publishers() {
            return true;
        }
        let settled = self
            .wait(around, |test| test.is_settled().then_some(Until::Done))
            .await;
        // They have joined before any tier.
        self.joins_new = Joins::default();
        self.goes_on(settled, "while publishers were joining")
    }

    async fn hold_tiers<L: Lead, P: FnMut(&ProgressSnapshot)>(
        &mut self,
        around: &mut Around<'_, L, P>,
    ) {
        loop {
            let next = match self
                .ask(around, async |lead, test| lead.next(&test.tiers).await)
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

    /// Has a tier gather and settle, and holds it. False where nothing can follow.
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
        // A host where nobody comes or goes keeps to the time, too.
        let is_gathered = |test: &Test<'_>| test.epoch.now() >= start && test.is_settled();
        let joined = self
            .wait(around, |test| is_gathered(test).then_some(Until::Done))
            .await;
        // Where nobody got in there is nothing to hold: the joins have failed, and that is the result.
        if !self.goes_on(joined, "while participants were joining")
            || self.presence.due_count() > 0 && self.sessions.joined == 0
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
        let leaves = plan.watches_stayers && stayers < self.presence.due_count();
        let stay = self.held.as_ref().filter(|_| leaves).map(|held| {
            let [start, end, now] = &held.surveys;
            let stayers = self.plan.participants().take(stayers as usize);
            let stayers = stayers.map(|participant| participant.index).collect();
            Stay::begin(stayers, began_at, [start, end, now], held.seconds)
        });
        self.admit(plan.subscribers, plan.start, plan.spread);
        self.tier = Some(UnderWay {
            plan,
            began_at,
            began: self.record.clone(),
            floor: self.observer.floor_so_far(),
            joins: std::mem::take(&mut self.joins_new),
            subscriptions: self.subscriptions(),
            lost: BTreeSet::new(),
            stay,
            hold: None,
        });
    }

    /// That there ought to be, to audio and to video.
    fn subscriptions(&self) -> [u64; 2] {
        let mut all = Joins::default();
        let due = self.presence.due();
        self.plan
            .participants()
            .filter(|participant| due.contains(&participant.index))
            .for_each(|participant| all.add(self.plan, &self.lost, &participant));
        all.tracks
    }

    async fn begin_hold(&mut self, is_whole: bool) {
        let survey = if is_whole {
            self.flush().await;
            Survey::default()
        } else {
            self.survey().await
        };
        self.resident_hold = net::resident_bytes().map(|(now, _)| now);
        self.workers
            .iter_mut()
            .for_each(|worker| worker.cpu_at_hold = worker.cpu);
        if let Some(tier) = &mut self.tier {
            let watched: &[_] = if tier.plan.watches_thresholds {
                &self.judging.thresholds
            } else {
                &[]
            };
            tier.hold = Some(TierHold {
                since: self.epoch.now(),
                before: self.record.clone(),
                survey,
                planned: tier.plan.hold,
                watch: ThresholdWatch::begin(watched, &self.record, self.epoch.now()),
            });
        }
    }

    /// The tier under way is over: what it came to, once what was under way has had its time, is a step of the report. False where that wait was cut short.
    async fn close_tier<L: Lead, P: FnMut(&ProgressSnapshot)>(
        &mut self,
        around: &mut Around<'_, L, P>,
    ) -> bool {
        // Before the survey, which brings what is expected up to date: beside a look of before it, the last second would seem lost.
        self.watch(self.epoch.now());
        let end = self.survey().await;
        let until = self.epoch.now();
        let record = self.record.clone();
        self.enter(RunStage::Between, around);
        let worker_seconds = self
            .workers
            .iter()
            .map(|worker| worker.cpu.saturating_sub(worker.cpu_at_hold).as_secs_f64());
        let busiest_seconds = worker_seconds.fold(0.0, f64::max);
        let mut goes_on = self.partial.is_none();
        if goes_on {
            let over = until + GRACE;
            let waited = self
                .wait(around, |test| {
                    (test.epoch.now() >= over).then_some(Until::Done)
                })
                .await;
            goes_on = self.goes_on(waited, "while the last packets of a tier were awaited");
        }
        let after = self.survey().await;
        let Some(UnderWay {
            plan,
            began_at,
            began,
            floor,
            joins,
            mut lost,
            stay,
            hold: Some(hold),
            ..
        }) = self.tier.take()
        else {
            return goes_on;
        };
        let seconds = until.since(hold.since).as_secs_f64();
        // Who is gone is not well, in whichever tier it went.
        lost.extend(self.presence.gone_sources(until));
        let tally = Tally {
            max_loss_pct: self.judging.max_loss_pct,
            due: self.presence.due(),
            present: &self.sessions.present,
            lost: &lost,
            joins,
            records: [&began, &hold.before, &record],
            surveys: [&hold.survey, &end, &after],
        };
        let since_beginning = record.since(&began);
        let busiest = busiest_seconds / seconds.max(0.001);
        let step = Step {
            name: plan.name.clone(),
            participants: self.presence.due_count(),
            seconds,
            record: tally.record(),
            tier: Some(TierFacts {
                subscribers: plan.per_room(),
                invalid: self.observer.reasons_between(
                    began_at,
                    until,
                    &since_beginning,
                    &floor,
                    busiest,
                ),
                complaints: [
                    self.abandoned.iter().cloned().collect(),
                    self.gone_sources(until, until, "the tier"),
                    stay.map_or_else(Vec::new, |stay| stay.complaints(&lost, &end, until)),
                    self.broken.iter().cloned().collect(),
                    hold.watch.complaints(),
                ]
                .concat(),
                cut_short: self.partial.clone(),
            }),
        };
        self.busiest = self.busiest.max(busiest);
        self.tiers.push(FinishedTier {
            plan,
            began_at,
            held_from: hold.since,
            held_until: until,
            present: self.present(),
            judgement: judge::judge_tier(&step, self.judging),
            step,
        });
        self.held = Some(LastHold {
            seconds,
            surveys: [hold.survey, end, after],
        });
        goes_on
    }

    /// The tier that is being held, and was at that time.
    pub(super) fn held_since(&self, at: Time) -> Option<&str> {
        let held = self.tier.as_ref().filter(|_| self.stage == RunStage::Hold);
        let held = held.filter(|tier| tier.hold.as_ref().is_some_and(|hold| hold.since <= at));
        held.map(|tier| tier.plan.name.as_str())
    }

    /// The hold of a tier that is the whole run: its account is closed with the run's.
    pub(super) fn take_whole_hold(&mut self) -> Option<TierHold> {
        self.tier.take().filter(|tier| tier.plan.is_whole)?.hold
    }

    /// The holds by their tiers' names, from when to when, the one that is the whole run included.
    pub(super) fn holds(&self) -> Vec<(String, Time, Time)> {
        let over = self
            .tiers
            .iter()
            .map(|tier| (tier.plan.name.clone(), tier.held_from, tier.held_until));
        let whole = self
            .tier
            .as_ref()
            .filter(|tier| tier.plan.is_whole)
            .zip(self.media_stopped_at);
        let whole = whole.and_then(|(tier, stopped)| {
            Some((tier.plan.name.clone(), tier.hold.as_ref()?.since, stopped))
        });
        over.chain(whole).collect()
    }

    /// Has so many subscribers be in, and all publishers. Who joins does so at its intended moment, whatever became of the earlier ones; who leaves does so in the
    /// reverse order. The first one not before `start`, and all of them within `spread`, or at the plan's pace.
    fn admit(&mut self, subscribers: Subscribers, start: Option<Time>, spread: Option<Duration>) {
        let before = self.presence.due_count();
        let wanted = self.plan.participants_with(subscribers);
        let moves = wanted.abs_diff(before);
        let interval = match spread {
            Some(spread) => spread.as_secs_f64() / f64::from(moves.max(1)),
            None => 1.0 / self.plan.scenario.joins_per_second,
        };
        // Only the first ones join in a row with the publishers.
        let after = if self.tiers.is_empty() {
            self.next_join_at
        } else {
            Time::ZERO
        };
        let first_at = start.unwrap_or_else(|| self.epoch.now()).max(after);
        let pace = JoinPace { first_at, interval };
        self.next_join_at = pace.moment(moves);
        if wanted < before {
            self.dismiss(wanted, pace);
        } else {
            self.invite(before..wanted, pace);
        }
    }

    /// Starts the sessions of those who join, each at its moment.
    fn invite(&mut self, joining: std::ops::Range<u32>, pace: JoinPace) {
        let Some(context) = self.context.clone() else {
            return;
        };
        let mut sessions = Vec::new();
        for (place, position) in (0..).zip(joining) {
            let participant = self.plan.participant(position);
            let (index, intended) = (participant.index, pace.moment(place));
            self.joins_new.add(self.plan, &self.lost, &participant);
            self.joins_all.add(self.plan, &self.lost, &participant);
            self.sessions.come(index);
            self.presence.invite(&participant, intended);
            let (sender, requests) = mpsc::unbounded_channel();
            self.requests.insert(index, sender);
            let [audio, video] =
                [Kind::Audio, Kind::Video].map(|kind| self.plan.tracks_ahead(&participant, kind));
            let (room, place) = (
                self.plan.room_name(participant.room),
                self.places[position as usize],
            );
            sessions.push((
                intended,
                participant,
                room,
                place,
                Sections { audio, video },
                requests,
            ));
        }
        let mut leave = self.leave.subscribe();
        tokio::spawn(async move {
            for (intended, participant, room, place, tracks_ahead, requests) in sessions {
                let at = tokio::time::Instant::from_std(context.epoch.instant(intended));
                tokio::select! {
                    () = tokio::time::sleep_until(at) => {}
                    () = session::leaving(&mut leave) => return,
                }
                tokio::spawn(session::run(
                    context.clone(),
                    participant,
                    room,
                    place,
                    intended,
                    tracks_ahead,
                    requests,
                ));
            }
        });
    }

    /// Has all but the first so many leave, each at its moment, the last one first.
    fn dismiss(&mut self, stayers: u32, pace: JoinPace) {
        let first = self.plan.participant(stayers).index;
        let leaving = self.requests.split_off(&first);
        // Who has gone by itself is not waited for.
        let here = leaving
            .keys()
            .filter(|index| !self.sessions.ended.contains_key(index));
        self.sessions.leaving.extend(here);
        let positions = (stayers..stayers + leaving.len() as u32).rev();
        let leavers = leaving.into_iter().rev().zip(positions);
        let mut moves = Vec::new();
        for (place, ((index, requests), position)) in (0..).zip(leavers) {
            let at = pace.moment(place);
            self.presence.dismiss(index, at);
            moves.push((at, requests, self.home(position)));
        }
        let (epoch, mut leave) = (self.epoch, self.leave.subscribe());
        tokio::spawn(async move {
            for (at, requests, home) in moves {
                tokio::select! {
                    () = tokio::time::sleep_until(tokio::time::Instant::from_std(epoch.instant(at))) => {}
                    () = session::leaving(&mut leave) => return,
                }
                // Nobody listens where the session has ended already: then its shard has to hear that from now on nothing is owed.
                if requests.send(Request::Leave).is_err() {
                    home.leave();
                }
            }
        });
    }

    /// Where the connections of a participant live, by its position.
    fn home(&self, position: u32) -> Home {
        let ShardPlace { shard, key } = self.places[position as usize];
        Home {
            commands: self.workers[shard].commands.clone(),
            key,
        }
    }

    /// Whoever was to join is in, or has failed; whoever was to leave is gone.
    fn is_settled(&self) -> bool {
        self.sessions.joined + self.sessions.failed >= self.joins_all.count
            && self.sessions.leaving.is_empty()
    }

    /// The last frames leave, then what is under way or lost gets time to arrive.
    async fn stop_media<L: Lead, P: FnMut(&ProgressSnapshot)>(
        &mut self,
        around: &mut Around<'_, L, P>,
    ) {
        if self.partial.is_none() {
            let may_stop = self
                .ask(around, async |lead, _| lead.before_stop().await)
                .await;
            if let Err(until) = may_stop {
                self.goes_on(until, "while others were measuring");
            }
        }
        self.command_all(|| ShardCommand::StopPublishing);
        let now = self.epoch.now();
        self.media_stopped_at = Some(now);
        self.flush().await;
        self.workers
            .iter_mut()
            .for_each(|worker| worker.cpu_at_stop = worker.cpu);
        self.enter(RunStage::Drain, around);
        let end = now + DRAIN;
        // Where nobody is left there is nothing to wait for.
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
        let limit = if self.was_interrupted {
            self.epoch.now() + ACCOUNT_TIMEOUT
        } else {
            Time::MAX
        };
        let settled = self
            .ask(around, async |lead, test| {
                let patience = limit.since(test.epoch.now());
                // Who has not answered by then will not.
                let _ = tokio::time::timeout(patience, lead.before_account(&test.roster)).await;
            })
            .await;
        if let Err(Until::Interrupted(signal)) = settled {
            self.note_interrupt(&format!("{signal} while the accounts were settled"));
        }
    }

    fn note_interrupt(&mut self, why: &str) {
        self.was_interrupted = true;
        self.partial.get_or_insert_with(|| why.to_owned());
    }

    /// Notes why a wait ended before its time, and says whether it did not.
    fn goes_on(&mut self, until: Until, when: &str) -> bool {
        let seconds = self.epoch.now().as_micros() as f64 / 1e6;
        match until {
            Until::Done => return true,
            Until::Interrupted(signal) => {
                self.note_interrupt(&format!("{signal} after {seconds:.1} s, {when}"))
            }
            Until::Aborted(reason) => self.partial = Some(reason),
            // The tier says why it failed.
            Until::Broken => {}
            Until::Abandoned => {
                let why = self.sessions.why_gone();
                self.abandoned.get_or_insert_with(|| {
                    format!("all participants were gone after {seconds:.1} s, {when}{why}")
                });
            }
        }
        false
    }

    /// Takes reports and notices until `done` says so, a signal comes, or nobody is left.
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

    /// The same until the lead has an answer. It is asked anew at each beat, because it hears how things go meanwhile.
    async fn ask<L: Lead, P: FnMut(&ProgressSnapshot), T>(
        &mut self,
        around: &mut Around<'_, L, P>,
        question: impl AsyncFn(&mut L, &Test<'_>) -> T,
    ) -> Result<T, Until> {
        let mut beat = beat();
        loop {
            if let Some(until) = self
                .end_of_waiting(around.lead)
                .filter(|_| self.media_stopped_at.is_none())
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
        // Once publishers have stopped the end has come already.
        let may_abort = self.partial.is_none() && self.media_stopped_at.is_none();
        let aborted = lead.abort().filter(|_| may_abort).map(Until::Aborted);
        let broken = self
            .broken
            .as_ref()
            .filter(|_| self.stage == RunStage::Hold)
            .map(|_| Until::Broken);
        aborted
            .or(broken)
            .or_else(|| self.is_abandoned().then_some(Until::Abandoned))
    }

    /// Everybody who ought to be in has been, and has gone for good.
    fn is_abandoned(&self) -> bool {
        let (ended, due) = (&self.sessions.ended, self.presence.due());
        let all = self.sessions.joined > 0 && !due.is_empty() && ended.len() >= due.len();
        all && due.iter().all(|index| ended.contains_key(index))
    }

    /// Looks at the thresholds that are looked at while a tier is held.
    fn watch(&mut self, now: Time) {
        let Some(UnderWay {
            began,
            joins,
            subscriptions,
            hold: Some(hold),
            ..
        }) = self.tier.as_mut().filter(|_| self.stage == RunStage::Hold)
        else {
            return;
        };
        let so_far = hold
            .watch
            .wants_hold()
            .then(|| so_far(began, &hold.before, &self.record, joins, *subscriptions));
        let broken = hold.watch.take(&self.record, so_far.as_ref(), now);
        let when = |why| {
            format!(
                "{why}, {:.0} s into the hold, and ended the run",
                now.since(hold.since).as_secs_f64()
            )
        };
        self.broken = self.broken.take().or(broken.map(when));
    }

    /// Takes what has come since the last beat, and shows it where that is due.
    fn turn<L: Lead, P: FnMut(&ProgressSnapshot)>(&mut self, around: &mut Around<'_, L, P>) {
        self.take_what_came();
        let now = self.epoch.now();
        if now >= self.second.due {
            self.close_second(now);
            let missing = around.lead.missing();
            if missing != self.lost.hosts() {
                self.lost = LostPublishers::new(self.plan, missing);
            }
            self.watch(now);
            self.observe(around);
        }
        if now.since(self.shown_at) >= PROGRESS_INTERVAL {
            self.shown_at = now;
            (around.progress)(&self.snapshot(now));
        }
    }

    fn enter<L: Lead, P>(&mut self, stage: RunStage, around: &mut Around<'_, L, P>) {
        self.stage = stage;
        self.observe(around);
    }

    fn observe<L: Lead, P>(&self, around: &mut Around<'_, L, P>) {
        around.lead.observe(&self.observation());
    }

    fn observation(&self) -> Observation<'_> {
        Observation {
            now: self.epoch.now(),
            epoch: self.epoch,
            stage: self.stage,
            is_settled: self.is_settled(),
            participants: self.presence.due_count(),
            present: self.present(),
            broken: self.broken.as_deref(),
            record: &self.record,
            tier: self
                .tier
                .as_ref()
                .filter(|_| self.stage != RunStage::Between)
                .map(|tier| TierSeen {
                    plan: &tier.plan,
                    began_at: tier.began_at,
                    held_from: tier.hold.as_ref().map(|hold| hold.since),
                    now: &self.record,
                    began: &tier.began,
                    joins: &tier.joins,
                    subscriptions: tier.subscriptions,
                    held: tier.hold.as_ref().map(|hold| &hold.before),
                }),
            sample: &self.second.last,
            roster: &self.roster,
        }
    }
}

/// Reports and notices wait for the beat: woken by each of them, this thread and those that tell them would do little else while a thousand a second join.
fn beat() -> tokio::time::Interval {
    let mut beat = tokio::time::interval(BEAT);
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    beat
}
