//! A run that a coordinator leads. Stages begin when the coordinator orders it, and the roster is
//! given the frame counts of publishers on other hosts.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tracing::info;

use super::link::{LinkShared, Word};
use super::outbox;
use crate::coordinator::protocol::{LiveSecond, SharedStage, StageKind};
use crate::engine::Roster;
use crate::plan::Subscribers;
use crate::report::{RunSample, judge::LossShares};
use crate::run::lead::{FinishedTier, Lead, LeadStep, Observation, TierPlan};
use crate::units::{Epoch, Time};

/// Leads the run by a coordinator's orders.
pub(super) struct Led {
    shared: Arc<LinkShared>,
    words: watch::Receiver<Word>,
    stages: Vec<SharedStage>,
    /// Index of the current stage; `None` before the first.
    stage: Option<usize>,
    /// Clock that stamps beats. The run's clock, `epoch`, is the same clock with another zero.
    clock: Epoch,
    epoch: Epoch,
    /// Number of tiers whose final measurements are in the outbox.
    tiers_told: usize,
    /// Whether this host ends the run and has told the coordinator so.
    is_broken: bool,
    missing_after: Duration,
}

/// The run ends early. The text comes from whoever ends it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct CalledOff(String);

impl Led {
    /// `missing_after`: how long another host must be silent to count as missing.
    pub fn new(
        shared: Arc<LinkShared>,
        stages: Vec<SharedStage>,
        clock: Epoch,
        missing_after: Duration,
    ) -> Led {
        Led {
            words: shared.words(),
            shared,
            stages,
            stage: None,
            epoch: clock,
            clock,
            tiers_told: 0,
            is_broken: false,
            missing_after,
        }
    }

    /// Waits until all hosts are to begin publishing. Everything that can be prepared is prepared
    /// before.
    ///
    /// # Errors
    /// Returns why the run does not begin.
    pub async fn wait_for_start(&mut self) -> Result<(), CalledOff> {
        let at = self.order_for(0).await?;
        self.begin(0, at, self.epoch.now());
        // Use the zero that all hosts share, so that everything derived from the run's time is in
        // step, for example who speaks when.
        self.epoch = self.clock.counted_from(at);
        Ok(())
    }

    /// Waits until a stage is to begin, and returns its start time. The call may be cancelled and
    /// repeated.
    async fn order_for(&mut self, stage: usize) -> Result<Time, CalledOff> {
        let (under_way, ready_for) = (self.stage.map(|stage| stage as u32), stage as u32);
        if self.shared.outbox().set_stage(under_way, Some(ready_for)) {
            self.shared.hurry();
        }
        loop {
            let word = self.words.borrow_and_update().clone();
            let wait_until = match word {
                Word::Stop { reason } => return Err(CalledOff(reason)),
                Word::Start { stage, at_us } if stage >= ready_for => {
                    // A time before the run's zero has passed.
                    let at = self.epoch.time_of_unix_micros(at_us).unwrap_or(Time::ZERO);
                    if at <= self.epoch.now() {
                        return Ok(at);
                    }
                    Some(tokio::time::Instant::from_std(self.epoch.instant(at)))
                }
                Word::Wait | Word::Start { .. } => None,
            };
            let word = self.words.changed();
            match wait_until {
                // The sender lives as long as the process.
                None => drop(word.await),
                Some(at) => drop(tokio::time::timeout_at(at, word).await),
            }
        }
    }

    /// Records that a stage began at `at`; it was ordered for `ordered`.
    fn begin(&mut self, stage: usize, ordered: Time, at: Time) {
        self.stage = Some(stage);
        let skew = at.as_micros().cast_signed() - ordered.as_micros().cast_signed();
        let ended = stage.checked_sub(1);
        info!(
            stage = self.name(Some(stage)),
            late_us = skew,
            ended = self.name(ended),
            "began a stage"
        );
        let mut outbox = self.shared.outbox();
        outbox.set_start(stage as u32, skew);
        outbox.set_stage(Some(stage as u32), Some(stage as u32));
        drop(outbox);
        self.shared.hurry();
    }

    fn name(&self, stage: Option<usize>) -> Option<&str> {
        let stage = self.stages.get(stage?);
        stage.map(|stage| stage.name.as_str())
    }

    fn next_stage(&self) -> usize {
        self.stage.map_or(0, |stage| stage + 1)
    }

    /// Returns the index of the stage that a tier of this plan belongs to.
    fn stage_of(&self, tier: &TierPlan) -> Option<u32> {
        let index = self
            .stages
            .iter()
            .position(|stage| stage.name == tier.name && is_held(stage));
        index.map(|index| index as u32)
    }
}

fn is_held(stage: &SharedStage) -> bool {
    matches!(stage.kind, StageKind::Baseline | StageKind::Tier)
}

impl Lead for Led {
    fn epoch(&self) -> Epoch {
        self.epoch
    }

    async fn next(&mut self, tiers: &[FinishedTier]) -> LeadStep {
        for tier in &tiers[self.tiers_told.min(tiers.len())..] {
            if let Some(stage) = self.stage_of(&tier.plan) {
                let told = outbox::MeasuredTier {
                    participants: tier.step.participants,
                    seconds: tier.step.seconds,
                    complete: true,
                    record: Arc::new(tier.step.record.clone()),
                };
                self.shared.outbox().set_tier(stage, told);
            }
        }
        if self.tiers_told < tiers.len() {
            self.tiers_told = tiers.len();
            self.shared.outbox().set_invalid(invalid(tiers));
        }
        let index = self.next_stage();
        let Some(stage) = self.stages.get(index).cloned() else {
            return LeadStep::Finish;
        };
        let Ok(start) = self.order_for(index).await else {
            // The run ends; `abort` reports it.
            return std::future::pending().await;
        };
        self.begin(index, start, self.epoch.now());
        if is_held(&stage) {
            LeadStep::Tier(TierPlan {
                name: stage.name,
                subscribers: Subscribers::Total(stage.subscribers),
                start: Some(start),
                spread: stage.spread_us.map(Duration::from_micros),
                warmup: Duration::from_micros(stage.warmup_us),
                hold: Duration::from_micros(stage.hold_us),
                watches_stayers: true,
                watches_thresholds: stage.kind == StageKind::Tier,
                is_whole: false,
            })
        } else {
            LeadStep::Finish
        }
    }

    fn abort(&mut self) -> Option<String> {
        match &*self.words.borrow() {
            // The coordinator repeats a stop that this host caused. It must not cut short the tier
            // that caused it.
            Word::Stop { .. } if self.is_broken => None,
            Word::Stop { reason } => Some(reason.clone()),
            Word::Wait | Word::Start { .. } => None,
        }
    }

    fn missing(&self) -> Vec<u32> {
        self.shared.inbox().missing.clone()
    }

    fn missing_after(&self) -> Duration {
        self.missing_after
    }

    /// Sends the final counts of this host's publishers, and takes those of the others. They arrive
    /// with the order to leave.
    async fn before_account(&mut self, roster: &Roster) {
        self.shared.outbox().set_frames(roster.frame_counts());
        let leave = self
            .stages
            .iter()
            .position(|stage| stage.kind == StageKind::Leave);
        if let Some(leave) = leave
            && self.stage.is_none_or(|stage| stage < leave)
            && let Ok(at) = self.order_for(leave).await
        {
            self.begin(leave, at, self.epoch.now());
        }
        self.shared.inbox().tell(roster);
    }

    fn observe(&mut self, seen: &Observation<'_>) {
        self.shared.inbox().tell(seen.roster);
        let tier = seen.tier.and_then(|tier| {
            let (held_from, stage) = (tier.held_from?, self.stage_of(tier.plan)?);
            let told = outbox::MeasuredTier {
                participants: seen.participants,
                seconds: seen.now.since(held_from).as_secs_f64(),
                complete: false,
                record: Arc::new(tier.record()?),
            };
            Some((stage, told))
        });
        let mut outbox = self.shared.outbox();
        outbox.set_frames(seen.roster.frame_counts());
        outbox.set_live(live(
            seen.present,
            seen.sample,
            LossShares::counted([&seen.record.audio, &seen.record.video]).residual,
        ));
        if let Some((stage, told)) = tier {
            outbox.set_tier(stage, told);
        }
        let is_news = seen.broken.is_some_and(|broken| outbox.set_broken(broken));
        drop(outbox);
        if is_news {
            self.is_broken = true;
            self.shared.hurry();
        }
    }
}

/// Returns why the generator was the limit in the tiers so far, each reason once.
fn invalid(tiers: &[FinishedTier]) -> Vec<String> {
    let mut reasons: Vec<String> = Vec::new();
    for facts in tiers.iter().filter_map(|tier| tier.step.tier.as_ref()) {
        let news: Vec<_> = facts
            .invalid
            .iter()
            .filter(|reason| !reasons.contains(reason))
            .cloned()
            .collect();
        reasons.extend(news);
    }
    reasons
}

fn live(present: u32, sample: &RunSample, loss: Option<f64>) -> LiveSecond {
    // Before the first row of the series there are no rates.
    let known = |rate: f64| (sample.t > 0.0).then_some(rate);
    LiveSecond {
        participants: present,
        packets_sent_per_second: known(sample.packets_sent_per_second),
        packets_received_per_second: known(sample.packets_received_per_second),
        bits_sent_per_second: known(sample.bytes_sent_per_second * 8.0),
        bits_received_per_second: known(sample.bytes_received_per_second * 8.0),
        loss,
        rtt_us: sample.rtt_us_p50,
        latency_us_p99: sample.one_way_us_p99,
        tick_late_us_p99: sample.tick_late_us_p99,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::CELLS_PER_PARTICIPANT;
    use crate::media::identity::Origin;
    use crate::plan::Member;

    /// Stages: publish, baseline, one tier, stop, leave.
    fn stages() -> Vec<SharedStage> {
        let stage = |kind, name: &str, subscribers: u32| SharedStage {
            kind,
            name: name.into(),
            subscribers,
            warmup_us: 1_000,
            hold_us: 2_000_000,
            spread_us: None,
        };
        vec![
            stage(StageKind::Publish, "publish", 0),
            stage(StageKind::Baseline, "baseline", 1),
            stage(StageKind::Tier, "tier 1", 7),
            stage(StageKind::Stop, "stop", 0),
            stage(StageKind::Leave, "leave", 0),
        ]
    }

    fn led() -> (Led, Arc<LinkShared>, Epoch) {
        let (shared, clock) = (LinkShared::new(), Epoch::read());
        (
            Led::new(shared.clone(), stages(), clock, Duration::from_secs(5)),
            shared,
            clock,
        )
    }

    /// Returns the content of the next beat: the current stage, the stage it is ready for, and the
    /// stages that began.
    fn said(shared: &LinkShared) -> (Option<u32>, Option<u32>, Vec<u32>) {
        let beat = shared.outbox().draft().beat(0, None);
        (
            beat.stage,
            beat.ready_for,
            beat.starts.iter().map(|start| start.stage).collect(),
        )
    }

    fn start(shared: &LinkShared, clock: &Epoch, stage: u32) {
        let at_us = clock.unix_micros(clock.now());
        shared.say(Word::Start { stage, at_us });
    }

    #[tokio::test]
    async fn stages_begin_one_after_the_other_each_when_it_was_ordered() {
        let (mut led, shared, clock) = led();
        let at_us = clock.unix_micros(clock.now());
        shared.say(Word::Start { stage: 0, at_us });
        tokio::time::sleep(Duration::from_millis(3)).await;
        led.wait_for_start().await.unwrap();
        assert_eq!(
            led.epoch().unix_micros(Time::ZERO),
            at_us,
            "the run's zero is that of all hosts, however late this one is"
        );
        assert_eq!(said(&shared), (Some(0), Some(0), vec![0]));
        for (index, subscribers) in [(1, 1), (2, 7)] {
            start(&shared, &clock, index);
            let LeadStep::Tier(tier) = led.next(&[]).await else {
                panic!("a tier")
            };
            assert_eq!(
                (tier.subscribers, tier.hold),
                (Subscribers::Total(subscribers), Duration::from_secs(2))
            );
            assert!(tier.start.unwrap() <= led.epoch().now());
            assert_eq!(
                said(&shared),
                (Some(index), Some(index), (0..=index).collect())
            );
        }
        start(&shared, &clock, 3);
        assert_eq!(led.next(&[]).await, LeadStep::Finish);
        assert_eq!(said(&shared).0, Some(3));
    }

    #[tokio::test]
    async fn a_stage_that_lies_ahead_is_waited_for_and_a_word_of_another_is_not_heeded() {
        let (mut led, shared, clock) = led();
        start(&shared, &clock, 0);
        led.wait_for_start().await.unwrap();
        // The coordinator repeats the previous order until the next beat reports that it was
        // carried out.
        start(&shared, &clock, 0);
        let wait = Duration::from_millis(50);
        assert!(tokio::time::timeout(wait, led.next(&[])).await.is_err());
        assert_eq!(said(&shared).1, Some(1), "ready");
        let at_us = clock.unix_micros(clock.now() + 2 * wait);
        shared.say(Word::Start { stage: 1, at_us });
        // A run cancels and repeats the call in the same way.
        let tier = loop {
            if let Ok(LeadStep::Tier(tier)) =
                tokio::time::timeout(Duration::from_millis(7), led.next(&[])).await
            {
                break tier;
            }
        };
        assert!(clock.unix_micros(clock.now()) >= at_us);
        assert_eq!(led.epoch().unix_micros(tier.start.unwrap()), at_us);
    }

    #[tokio::test]
    async fn a_stop_ends_whatever_goes_on() {
        let (mut led, shared, clock) = led();
        assert_eq!(led.abort(), None);
        shared.say(Word::Stop {
            reason: "cancelled".into(),
        });
        assert_eq!(
            led.wait_for_start().await.unwrap_err().to_string(),
            "cancelled"
        );
        assert_eq!(led.abort().as_deref(), Some("cancelled"));
        start(&shared, &clock, 0);
        assert_eq!(led.abort().as_deref(), Some("cancelled"));
        // No other host is waited for.
        led.before_account(&Roster::new(1, [0].into_iter())).await;
    }

    #[tokio::test]
    async fn accounts_are_closed_when_the_final_counts_of_all_are_known() {
        let (mut led, shared, clock) = led();
        let members = [None, Some(1)].map(|elsewhere| Member {
            room: 0,
            group: 0,
            publishes_audio: true,
            publishes_video: false,
            elsewhere,
        });
        let roster = Roster::of_hosts(
            1,
            members.into_iter(),
            &[[Duration::from_millis(20); CELLS_PER_PARTICIPANT]],
        );
        led.stage = Some(3);
        let wait = Duration::from_millis(20);
        assert!(
            tokio::time::timeout(wait, led.before_account(&roster))
                .await
                .is_err()
        );
        assert_eq!(said(&shared).1, Some(4));
        let audio = Origin {
            publisher: 1,
            track: 0,
        };
        shared.inbox().frames.insert((1, 0, 0), (500, 7));
        start(&shared, &clock, 4);
        led.before_account(&roster).await;
        assert_eq!(roster.frames(audio, 0), 500);
        assert_eq!(said(&shared).0, Some(4));
    }
}
