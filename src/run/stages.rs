//! A test's way through its stages, as its lead wants them, and all waiting on the way.

use std::time::Duration;

use tokio::sync::mpsc;

use super::account::of_tier;
use super::interrupts::Interrupts;
use super::lead::{Lead, Next, Observation, Stage, Tier, TierPlan, TierSeen};
use super::{BEAT, DRAIN, PROGRESS_INTERVAL, Test};
use crate::engine::Command;
use crate::measure::{Kind, Record};
use crate::net;
use crate::plan::Subscribers;
use crate::report::progress::Snapshot;
use crate::report::{Step, judge};
use crate::signal::session::{self, Sections};
use crate::units::Time;

/// Before the first join, so that its moment lies ahead.
const FIRST_JOIN_DELAY: Duration = Duration::from_millis(5);
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
    plan: TierPlan,
    began_at: Time,
    /// The run's record at its beginning.
    began: Record,
    hold: Option<Hold>,
}

/// From when on a tier is measured, and the run's record then.
pub(super) struct Hold {
    pub since: Time,
    pub before: Record,
}

/// Why a wait ended.
pub(super) enum Until {
    Done,
    Interrupted(&'static str),
    Abandoned,
}

impl Test<'_> {
    /// Publishers, tiers, stop, drain, goodbye.
    pub(super) async fn go<L: Lead, P: FnMut(&Snapshot)>(&mut self, around: &mut Around<'_, L, P>) {
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
    async fn publish<L: Lead, P: FnMut(&Snapshot)>(&mut self, around: &mut Around<'_, L, P>) -> bool {
        self.next_join_at = self.epoch.now() + FIRST_JOIN_DELAY;
        self.admit(Subscribers::Total(0), None, None);
        self.observe(around);
        if !around.lead.waits_for_publishers() {
            return true;
        }
        let settled = self.wait(around, |test| test.is_settled().then_some(Until::Done)).await;
        self.goes_on(settled, "while publishers were joining")
    }

    async fn hold_tiers<L: Lead, P: FnMut(&Snapshot)>(&mut self, around: &mut Around<'_, L, P>) {
        loop {
            let next = match self.ask(around, async |lead, test| lead.next(&test.tiers).await).await {
                Ok(next) => next,
                Err(until) => {
                    self.goes_on(until, "before the next tier");
                    return;
                }
            };
            let goes_on = match next {
                Next::Tier(plan) => self.hold_tier(plan, around).await,
                Next::Finish => false,
                Next::Abort(reason) => {
                    self.partial = Some(reason);
                    false
                }
            };
            if !goes_on {
                return;
            }
            self.enter(Stage::Between, around);
        }
    }

    /// Has a tier gather and settle, and holds it. False where nothing can follow.
    async fn hold_tier<L: Lead, P: FnMut(&Snapshot)>(&mut self, plan: TierPlan, around: &mut Around<'_, L, P>) -> bool {
        let (warmup, hold, is_whole) = (plan.warmup, plan.hold, plan.is_whole);
        self.admit(plan.subscribers, plan.start, self.plan.ramp_time.filter(|_| !is_whole));
        self.tier = Some(UnderWay {
            plan,
            began_at: self.epoch.now(),
            began: self.record.clone(),
            hold: None,
        });
        self.enter(Stage::Gather, around);
        let joined = self.wait(around, |test| test.is_settled().then_some(Until::Done)).await;
        // Where nobody got in there is nothing to hold: the joins have failed, and that is the result.
        if !self.goes_on(joined, "while participants were joining") || self.admitted > 0 && self.sessions.joined == 0 {
            return false;
        }
        if !warmup.is_zero() {
            self.enter(Stage::WarmUp, around);
            let end = self.epoch.now() + warmup;
            let settled = self.wait(around, |test| (test.epoch.now() >= end).then_some(Until::Done)).await;
            if !self.goes_on(settled, "while participants settled") {
                return false;
            }
        }
        self.begin_hold().await;
        self.enter(Stage::Hold, around);
        let end = self.epoch.now() + hold;
        let held = self.wait(around, |test| (test.epoch.now() >= end).then_some(Until::Done)).await;
        let goes_on = self.goes_on(held, "before the planned duration was over");
        if !is_whole {
            self.flush().await;
            self.close_tier();
        }
        goes_on
    }

    async fn begin_hold(&mut self) {
        self.flush().await;
        self.resident_hold = net::resident_bytes().map(|(now, _)| now);
        self.workers.iter_mut().for_each(|worker| worker.cpu_at_hold = worker.cpu);
        if let Some(tier) = &mut self.tier {
            tier.hold = Some(Hold {
                since: self.epoch.now(),
                before: self.record.clone(),
            });
        }
    }

    /// The tier under way is over: what it came to is a step of the report.
    fn close_tier(&mut self) {
        let now = self.epoch.now();
        let Some(UnderWay {
            plan,
            began_at,
            began,
            hold: Some(hold),
        }) = self.tier.take()
        else {
            return;
        };
        let step = Step {
            name: plan.name.clone(),
            participants: self.admitted,
            seconds: now.since(hold.since).as_secs_f64(),
            record: of_tier(&self.record, &began, &hold.before),
        };
        self.tiers.push(Tier {
            plan,
            began_at,
            held_from: hold.since,
            held_until: now,
            participants: self.admitted,
            present: self.present(),
            judgement: judge::judge_tier(&step, self.judging),
        });
        self.steps.push(step);
    }

    /// The hold of a tier that is the whole run: its account is closed with the run's.
    pub(super) fn take_whole_hold(&mut self) -> Option<Hold> {
        self.tier.take().and_then(|tier| tier.hold)
    }

    /// Has so many subscribers be in, and all publishers: each joins at its intended moment, whatever became of the earlier ones. The first one not before
    /// `start`, and all of them within `ramp_time`, or at the plan's pace.
    fn admit(&mut self, subscribers: Subscribers, start: Option<Time>, ramp_time: Option<Duration>) {
        let wanted = self.plan.participants_with(subscribers);
        let joining = self.admitted..wanted.max(self.admitted);
        let count = joining.len() as u32;
        self.admitted = wanted;
        self.joins_asked += count;
        let interval = match ramp_time {
            Some(ramp_time) => ramp_time.as_secs_f64() / f64::from(count.max(1)),
            None => 1.0 / self.plan.joins_per_second,
        };
        let first_at = self.next_join_at.max(start.unwrap_or(Time::ZERO));
        let intended = move |place: u32| first_at + Duration::from_secs_f64(f64::from(place) * interval);
        self.next_join_at = intended(count);
        let sessions: Vec<_> = (0..)
            .zip(joining)
            .map(|(place, index)| {
                let participant = self.plan.participant(index);
                let [audio, video] = [Kind::Audio, Kind::Video].map(|kind| self.plan.tracks_ahead(&participant, kind));
                let room = self.plan.room_name(participant.room);
                (room, participant, intended(place), Sections { audio, video })
            })
            .collect();
        let Some(context) = self.context.clone() else { return };
        let (places, mut leave) = (self.places.clone(), self.leave.subscribe());
        tokio::spawn(async move {
            for (room, participant, intended, tracks_ahead) in sessions {
                let at = tokio::time::Instant::from_std(context.epoch.instant(intended));
                tokio::select! {
                    () = tokio::time::sleep_until(at) => {}
                    () = session::leaving(&mut leave) => return,
                }
                let place = places[participant.index as usize];
                // Nobody asks anything of them after they have joined.
                let (_, requests) = mpsc::unbounded_channel();
                tokio::spawn(session::run(context.clone(), participant, room, place, intended, tracks_ahead, requests));
            }
        });
    }

    fn is_settled(&self) -> bool {
        self.sessions.joined + self.sessions.failed >= self.joins_asked
    }

    /// The last frames leave, then what is under way or lost gets time to arrive.
    async fn stop_media<L: Lead, P: FnMut(&Snapshot)>(&mut self, around: &mut Around<'_, L, P>) {
        if !self.was_interrupted && !self.is_abandoned() {
            let may_stop = self.ask(around, async |lead, _| lead.before_stop().await).await;
            if let Err(until) = may_stop {
                self.goes_on(until, "while others were measuring");
            }
        }
        self.command_all(|| Command::StopPublishing);
        let now = self.epoch.now();
        self.media_stopped_at = Some(now);
        self.flush().await;
        self.workers.iter_mut().for_each(|worker| worker.cpu_at_stop = worker.cpu);
        self.enter(Stage::Drain, around);
        let end = now + DRAIN;
        // Where nobody is left there is nothing to wait for.
        if let Until::Interrupted(signal) = self.wait(around, |test| (test.epoch.now() >= end).then_some(Until::Done)).await {
            self.note_interrupt(&format!("{signal} while the last packets were awaited"));
        }
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
        self.enter(Stage::Leave, around);
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
            Until::Interrupted(signal) => self.note_interrupt(&format!("{signal} after {seconds:.1} s, {when}")),
            Until::Abandoned => self.partial = Some(format!("all participants were gone after {seconds:.1} s, {when}")),
        }
        false
    }

    /// Takes reports and notices until `done` says so, a signal comes, or nobody is left.
    async fn wait<L: Lead, P: FnMut(&Snapshot)>(&mut self, around: &mut Around<'_, L, P>, done: impl Fn(&Test<'_>) -> Option<Until>) -> Until {
        let mut beat = beat();
        loop {
            if let Some(until) = done(self).or_else(|| self.is_abandoned().then_some(Until::Abandoned)) {
                return until;
            }
            tokio::select! {
                signal = around.interrupts.next() => return Until::Interrupted(signal),
                _ = beat.tick() => self.turn(around),
            }
        }
    }

    /// The same until the lead has an answer. It is asked anew at each beat, because it hears how things go meanwhile.
    async fn ask<L: Lead, P: FnMut(&Snapshot), T>(
        &mut self,
        around: &mut Around<'_, L, P>,
        question: impl AsyncFn(&mut L, &Test<'_>) -> T,
    ) -> Result<T, Until> {
        let mut beat = beat();
        loop {
            if self.media_stopped_at.is_none() && self.is_abandoned() {
                return Err(Until::Abandoned);
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

    /// Everybody who ought to be in has been, and has gone for good.
    fn is_abandoned(&self) -> bool {
        self.sessions.joined > 0 && self.admitted > 0 && self.sessions.ended.len() == self.admitted as usize
    }

    /// Takes what has come since the last beat, and shows it where that is due.
    fn turn<L: Lead, P: FnMut(&Snapshot)>(&mut self, around: &mut Around<'_, L, P>) {
        self.take_what_came();
        let now = self.epoch.now();
        if now >= self.second.due {
            self.close_second(now);
            self.observe(around);
        }
        if now.since(self.shown_at) >= PROGRESS_INTERVAL {
            self.shown_at = now;
            (around.progress)(&self.snapshot(now));
        }
    }

    fn enter<L: Lead, P>(&mut self, stage: Stage, around: &mut Around<'_, L, P>) {
        self.stage = stage;
        self.observe(around);
    }

    fn observe<L: Lead, P>(&self, around: &mut Around<'_, L, P>) {
        around.lead.observe(&Observation {
            now: self.epoch.now(),
            epoch: self.epoch,
            stage: self.stage,
            is_settled: self.is_settled(),
            participants: self.admitted,
            present: self.present(),
            record: &self.record,
            tier: self.tier.as_ref().map(|tier| TierSeen {
                plan: &tier.plan,
                began_at: tier.began_at,
                held_from: tier.hold.as_ref().map(|hold| hold.since),
                now: &self.record,
                began: &tier.began,
                held: tier.hold.as_ref().map(|hold| &hold.before),
            }),
            sample: &self.second.last,
            roster: &self.roster,
        });
    }
}

/// Reports and notices wait for the beat: woken by each of them, this thread and those that tell them would do little else while a thousand a second join.
fn beat() -> tokio::time::Interval {
    let mut beat = tokio::time::interval(BEAT);
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    beat
}
