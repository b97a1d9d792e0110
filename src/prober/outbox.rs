//! Everything that a prober has to tell the coordinator. The run fills it and the beats carry it;
//! each keeps its own pace, and neither waits for the other.
//!
//! All of it is cumulative. A beat carries what has changed since the last answered beat, so the
//! next beat repeats whatever was lost.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::coordinator::protocol::{
    BeatMessage, Exchange, FrameCountEntry, LiveSecond, Start, TierSoFar,
};
use crate::engine;
use crate::measure::Record;
use crate::media::identity::Origin;

/// Measurements and state of the run so far.
#[derive(Default)]
pub(super) struct BeatOutbox {
    /// Version number; grows with every change.
    version: u64,
    /// The coordinator has everything up to this version.
    answered: u64,
    stage: Option<u32>,
    ready_for: Option<u32>,
    tiers: BTreeMap<u32, Changed<MeasuredTier>>,
    /// Frames sent, and frames owed and never sent, by track and layer.
    frames: BTreeMap<(Origin, u8), Changed<(u32, u32)>>,
    starts: BTreeMap<u32, Changed<i64>>,
    live: LiveSecond,
    invalid: Vec<String>,
    broken: Option<String>,
    seq: u64,
}

struct Changed<T> {
    value: T,
    in_version: u64,
}

/// Measurements of this host for a baseline or a tier so far.
#[derive(Clone)]
pub(super) struct MeasuredTier {
    pub participants: u32,
    pub seconds: f64,
    pub complete: bool,
    /// Shared, not copied. The beats' task turns it into text.
    pub record: Arc<Record>,
}

/// Content of the next beat. Once that is answered, the coordinator has all of it.
pub(super) struct BeatDraft {
    version: u64,
    stage: Option<u32>,
    ready_for: Option<u32>,
    tiers: Vec<(u32, MeasuredTier)>,
    frames: Vec<FrameCountEntry>,
    starts: Vec<Start>,
    live: LiveSecond,
    invalid: Vec<String>,
    broken: Option<String>,
    seq: u64,
}

impl MeasuredTier {
    /// Turns histograms into text, which takes some milliseconds.
    pub fn so_far(&self, stage: u32) -> TierSoFar {
        TierSoFar {
            stage,
            participants: self.participants,
            seconds: self.seconds,
            complete: self.complete,
            record: (&*self.record).into(),
        }
    }
}

impl BeatOutbox {
    /// Sets the current stage, and the stage that the run waits for. Returns whether either has
    /// changed; a beat is then due at once.
    pub fn set_stage(&mut self, stage: Option<u32>, ready_for: Option<u32>) -> bool {
        let before = (self.stage, self.ready_for);
        (self.stage, self.ready_for) = (stage, ready_for);
        before != (stage, ready_for)
    }

    /// Whether the run waits for an order.
    pub fn waits(&self) -> bool {
        self.ready_for > self.stage
    }

    pub fn set_tier(&mut self, stage: u32, tier: MeasuredTier) {
        self.version += 1;
        put(&mut self.tiers, stage, tier, self.version);
    }

    /// Sets the frame counts. An unchanged count is not sent again.
    pub fn set_frames(&mut self, counts: impl Iterator<Item = engine::FrameCount>) {
        self.version += 1;
        for engine::FrameCount {
            origin,
            layer,
            frames,
            unsent,
        } in counts
        {
            let (key, value) = ((origin, layer), (frames, unsent));
            if self
                .frames
                .get(&key)
                .is_none_or(|known| known.value != value)
            {
                put(&mut self.frames, key, value, self.version);
            }
        }
    }

    pub fn set_start(&mut self, stage: u32, skew_us: i64) {
        self.version += 1;
        put(&mut self.starts, stage, skew_us, self.version);
    }

    pub fn set_live(&mut self, live: LiveSecond) {
        self.live = live;
    }

    pub fn set_invalid(&mut self, invalid: Vec<String>) {
        self.invalid = invalid;
    }

    /// Sets the threshold that ends the run. Returns whether none was set before.
    pub fn set_broken(&mut self, broken: &str) -> bool {
        let is_news = self.broken.is_none();
        self.broken.get_or_insert_with(|| broken.to_owned());
        is_news
    }

    /// Returns the next beat.
    pub fn draft(&mut self) -> BeatDraft {
        self.seq += 1;
        let answered = self.answered;
        BeatDraft {
            version: self.version,
            stage: self.stage,
            ready_for: self.ready_for,
            tiers: news(&self.tiers, answered)
                .map(|(stage, tier)| (*stage, tier.clone()))
                .collect(),
            frames: news(&self.frames, answered)
                .map(|((origin, layer), (frames, unsent))| {
                    let (frames, unsent) = (u64::from(*frames), u64::from(*unsent));
                    FrameCountEntry(origin.publisher, origin.track, *layer, frames, unsent)
                })
                .collect(),
            starts: news(&self.starts, answered)
                .map(|(stage, skew_us)| Start {
                    stage: *stage,
                    skew_us: *skew_us,
                })
                .collect(),
            live: self.live.clone(),
            invalid: self.invalid.clone(),
            broken: self.broken.clone(),
            seq: self.seq,
        }
    }

    /// Records that the coordinator has this beat. A complete tier that it has is dropped.
    pub fn settle(&mut self, draft: &BeatDraft) {
        self.answered = self.answered.max(draft.version);
        let answered = self.answered;
        self.tiers
            .retain(|_, tier| !tier.value.complete || tier.in_version > answered);
    }
}

impl BeatDraft {
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// Turns records into text, which takes time, so call it without holding the outbox.
    pub fn beat(&self, sent_at_us: u64, exchange: Option<Exchange>) -> BeatMessage {
        BeatMessage {
            seq: self.seq,
            sent_at_us,
            exchange,
            stage: self.stage,
            ready_for: self.ready_for,
            tiers: self
                .tiers
                .iter()
                .map(|(stage, tier)| tier.so_far(*stage))
                .collect(),
            live: self.live.clone(),
            frames: self.frames.clone(),
            starts: self.starts.clone(),
            invalid: self.invalid.clone(),
            broken: self.broken.clone(),
        }
    }
}

fn put<K: Ord, T>(to: &mut BTreeMap<K, Changed<T>>, key: K, value: T, in_version: u64) {
    to.insert(key, Changed { value, in_version });
}

fn news<K, T>(of: &BTreeMap<K, Changed<T>>, answered: u64) -> impl Iterator<Item = (&K, &T)> {
    of.iter()
        .filter(move |(_, changed)| changed.in_version > answered)
        .map(|(key, changed)| (key, &changed.value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tier(joins_ok: u64, complete: bool) -> MeasuredTier {
        let mut record = Record::default();
        record.session.joins_ok = joins_ok;
        MeasuredTier {
            participants: 3,
            seconds: 1.0,
            complete,
            record: Arc::new(record),
        }
    }

    fn count(frames: u32) -> engine::FrameCount {
        engine::FrameCount {
            origin: Origin {
                publisher: 7,
                track: 1,
            },
            layer: 2,
            frames,
            unsent: 0,
        }
    }

    /// Returns the tiers' stages, the frame counts and the starts' stages that the next beat
    /// carries.
    fn carried(draft: &BeatDraft) -> (Vec<u32>, Vec<u64>, Vec<u32>) {
        let beat = draft.beat(1, None);
        (
            beat.tiers.iter().map(|tier| tier.stage).collect(),
            beat.frames.iter().map(|count| count.3).collect(),
            beat.starts.iter().map(|start| start.stage).collect(),
        )
    }

    #[test]
    fn what_was_not_answered_goes_again_and_what_was_does_not() {
        let mut outbox = BeatOutbox::default();
        outbox.set_tier(2, tier(1, false));
        outbox.set_frames([count(10)].into_iter());
        outbox.set_start(2, -5);
        let (lost, sent) = (outbox.draft(), outbox.draft());
        assert_eq!((lost.seq(), sent.seq()), (1, 2));
        assert_eq!(carried(&lost), (vec![2], vec![10], vec![2]));
        assert_eq!(carried(&sent), carried(&lost));
        // While that beat was on its way, one count grew.
        outbox.set_frames([count(20)].into_iter());
        outbox.settle(&sent);
        assert_eq!(carried(&outbox.draft()), (vec![], vec![20], vec![]));
        outbox.settle(&lost);
        assert_eq!(
            carried(&outbox.draft()),
            (vec![], vec![20], vec![]),
            "a late answer to an older beat"
        );
        let draft = outbox.draft();
        outbox.settle(&draft);
        outbox.set_frames([count(20)].into_iter());
        assert_eq!(
            carried(&outbox.draft()),
            (vec![], vec![], vec![]),
            "nothing has changed"
        );
    }

    #[test]
    fn a_tier_that_is_over_goes_until_it_is_answered_and_is_forgotten_then() {
        let mut outbox = BeatOutbox::default();
        outbox.set_tier(1, tier(1, true));
        outbox.set_tier(2, tier(2, false));
        let draft = outbox.draft();
        let beat = draft.beat(1, None);
        assert_eq!(Record::from(&beat.tiers[0].record).session.joins_ok, 1);
        assert!(beat.tiers[0].complete && !beat.tiers[1].complete);
        assert_eq!(outbox.tiers.len(), 2);
        outbox.settle(&draft);
        assert_eq!(outbox.tiers.keys().collect::<Vec<_>>(), [&2]);
    }

    #[test]
    fn it_waits_for_an_order_while_it_is_ready_for_more_than_it_does() {
        let mut outbox = BeatOutbox::default();
        assert!(!outbox.waits());
        assert!(outbox.set_stage(None, Some(0)) && outbox.waits());
        assert!(!outbox.set_stage(None, Some(0)), "no news");
        assert!(outbox.set_stage(Some(0), Some(0)) && !outbox.waits());
    }
}
