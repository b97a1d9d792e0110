//! Account of one subscription: what it ought to have received of a track, whichever layers it was
//! given, and what of it arrived.
//!
//! The publisher is the reference. Frame numbers and intended moments are read from the frames, and
//! the number of frames made comes from the [`Roster`]. A subscription is a sequence of
//! *stretches*, each on one layer. Within a stretch every frame from its first to its last is
//! expected. Between two stretches, the frames of the earlier layer that were due before the later
//! stretch began are expected.
//!
//! A source that is gone although the plan means it to send goes on owing frames that it never
//! makes. The roster counts them, and each subscription is owed those of the layer that it was
//! given last ([`Ledger::unsent`]).

use std::time::Duration;

use super::{LAYERS_MAX, Owed, Roster};
use crate::media::assemble::{DeliveredWindow, Delivery};
use crate::media::identity::{FrameIdentity, Origin};
use crate::net;

/// Maximum error from rounding. Intended moments are rounded up to whole milliseconds, so two of
/// them lie up to this much closer together or further apart than their slots.
const SLOT_ROUNDING_US: u64 = 1_000;

#[derive(Default)]
pub struct Ledger {
    current: FrameStretch,
    /// The stretch before the current one. Late repairs may still belong to it.
    previous: FrameStretch,
    /// Frames expected in all stretches before those two.
    settled_expected: u64,
    settled_delivered: u64,
    /// No layer is requested. Frames that arrive still belong to the current stretch, and frames
    /// that do not arrive are not missed.
    paused: bool,
    /// A layer is requested again. The next new frame begins a stretch.
    resumed: bool,
    /// Counts of each layer at the end of the subscription.
    ended_at: Option<[Owed; LAYERS_MAX]>,
    /// How often the source had begun when its first frame came. What it sends after beginning
    /// again is for other subscriptions.
    publications: u32,
    /// Set when the server has withdrawn the subscription: how many frames the current layer had
    /// made then.
    withdrawn: Option<u32>,
    /// `settled_unsent`: frames of earlier stretches that the source owed and never made.
    /// `unsent_before`: unsent frames of the current layer when this stretch began.
    settled_unsent: u64,
    unsent_before: u32,
    /// The same two numbers for packets that the server itself missed.
    settled_asked: u64,
    asked_before: u32,
    /// `mark`: how many frames each layer had made at the last mark. `overdue`: how many frames
    /// from before the mark have arrived since.
    mark: [u32; LAYERS_MAX],
    overdue: u32,
}

/// Frames of one layer, without a break.
#[derive(Default)]
struct FrameStretch {
    layer: u8,
    /// Frames between the stretch before and this one are not missed, because nobody had requested
    /// them.
    after_pause: bool,
    /// Number of frames that the layer had sent when the next stretch began.
    sent: u32,
    /// Intended moments of its first frame and of its last frame, in microseconds of Unix time.
    first_at: u64,
    last_at: u64,
    window: DeliveredWindow,
}

impl FrameStretch {
    fn deliver(&mut self, identity: &FrameIdentity) -> Delivery {
        let delivery = self.window.deliver(identity.frame);
        if self
            .window
            .range()
            .is_some_and(|(first, _)| first == identity.frame)
        {
            self.first_at = identity.intended_unix_us;
        }
        if self
            .window
            .range()
            .is_some_and(|(_, last)| last == identity.frame)
        {
            self.last_at = identity.intended_unix_us;
        }
        delivery
    }

    fn first(&self) -> Option<u32> {
        self.window.range().map(|(first, _)| first)
    }

    fn last(&self) -> Option<u32> {
        self.window.range().map(|(_, last)| last)
    }

    /// Number of frames from the first to the last.
    fn len(&self) -> u64 {
        self.window
            .range()
            .map_or(0, |(first, last)| u64::from(last - first) + 1)
    }

    /// Returns the number of frames of this layer that were due, and sent, before `next` began.
    fn missed_before(&self, next: &FrameStretch, interval: Duration) -> u64 {
        let (Some(last), false, interval_us) =
            (self.last(), next.after_pause, interval.as_micros() as u64)
        else {
            return 0;
        };
        let apart = next
            .first_at
            .saturating_sub(self.last_at)
            .saturating_sub(SLOT_ROUNDING_US);
        let slots = apart.div_ceil(interval_us.max(1)).saturating_sub(1);
        // A layer that was paused had fewer frames than slots.
        slots.min(u64::from(self.sent.saturating_sub(last + 1)))
    }
}

impl Ledger {
    /// Prefetches what the next frame will need.
    pub fn prefetch(&self) {
        net::prefetch(&self.current, usize::MAX);
        net::prefetch(&self.paused, usize::MAX);
        net::prefetch(&self.mark, usize::MAX);
    }

    /// Takes a complete frame of the track. Only the first delivery of an expected frame is
    /// [`Delivery::First`].
    pub fn deliver(&mut self, identity: &FrameIdentity, roster: &Roster) -> Delivery {
        let delivery = self.take(identity, roster);
        let marked = self
            .mark
            .get(usize::from(identity.layer))
            .copied()
            .unwrap_or(0);
        self.overdue += u32::from(delivery == Delivery::First && identity.frame < marked);
        delivery
    }

    fn take(&mut self, identity: &FrameIdentity, roster: &Roster) -> Delivery {
        let Some(last) = self.current.last() else {
            self.current.layer = identity.layer;
            self.publications = roster.publications(identity.origin, identity.layer);
            let owed = roster.owed(identity.origin, identity.layer);
            (self.unsent_before, self.asked_before) = (owed.unsent, owed.asked);
            return self.current.deliver(identity);
        };
        if identity.layer == self.current.layer {
            if self.resumed && identity.frame > last {
                self.begin_stretch(identity, roster);
            }
            return if self.is_of_an_older_stretch(identity) {
                self.deliver_late(identity)
            } else {
                self.current.deliver(identity)
            };
        }
        if self.is_late(identity) {
            return self.deliver_late(identity);
        }
        self.begin_stretch(identity, roster);
        self.current.deliver(identity)
    }

    /// Whether the frame is of the current layer, but from before the last switch to it.
    fn is_of_an_older_stretch(&self, identity: &FrameIdentity) -> bool {
        self.previous.last().is_some()
            && self
                .current
                .first()
                .is_some_and(|first| identity.frame < first)
            && identity.intended_unix_us <= self.previous.last_at
    }

    /// Whether the frame is of another layer than the current one and was due before the switch.
    fn is_late(&self, identity: &FrameIdentity) -> bool {
        let of_previous = self.is_of_previous(identity);
        let known = of_previous
            && self
                .previous
                .last()
                .is_some_and(|last| identity.frame <= last);
        let due_before = if of_previous {
            // Frames of both layers may arrive for the same moment. The earlier layer's frame ends
            // its stretch.
            identity.intended_unix_us <= self.current.first_at
        } else {
            identity.intended_unix_us < self.current.first_at
        };
        known || due_before
    }

    fn is_of_previous(&self, identity: &FrameIdentity) -> bool {
        self.previous.last().is_some() && identity.layer == self.previous.layer
    }

    /// Delivers a frame of the previous stretch. A frame older than that stretch is too old,
    /// because it cannot be told from frames already counted.
    fn deliver_late(&mut self, identity: &FrameIdentity) -> Delivery {
        let in_previous = self.is_of_previous(identity)
            && self
                .previous
                .first()
                .is_some_and(|first| identity.frame >= first);
        if in_previous {
            self.previous.deliver(identity)
        } else {
            Delivery::TooOld
        }
    }

    fn begin_stretch(&mut self, identity: &FrameIdentity, roster: &Roster) {
        let origin = identity.origin;
        let interval = roster.frame_interval(origin, self.previous.layer);
        self.settled_expected +=
            self.previous.len() + self.previous.missed_before(&self.current, interval);
        self.settled_delivered += self.previous.window.delivered();
        self.current.sent = self.owed(origin, self.current.layer, roster).frames;
        self.settle_unsent(origin, roster);
        let owed = roster.owed(origin, identity.layer);
        (self.unsent_before, self.asked_before) = (owed.unsent, owed.asked);
        let next = FrameStretch {
            layer: identity.layer,
            after_pause: self.resumed,
            ..FrameStretch::default()
        };
        self.resumed = false;
        self.previous = std::mem::replace(&mut self.current, next);
    }

    /// Whether this frame is missing between two frames of the current stretch that arrived.
    pub fn is_missing(&self, identity: &FrameIdentity) -> bool {
        identity.layer == self.current.layer && self.current.window.is_missing(identity.frame)
    }

    /// Pauses the subscription: the subscriber wants nothing for now.
    pub fn pause(&mut self, origin: Option<Origin>, roster: &Roster) {
        if let Some(origin) = origin {
            self.settle_unsent(origin, roster);
        }
        self.paused = true;
    }

    /// Returns the number of frames that the source owed to this subscription and never made.
    pub fn unsent(&self, origin: Option<Origin>, roster: &Roster) -> u64 {
        let of_current = match origin {
            Some(origin) if !self.owes_nothing() => {
                let unsent = self.owed(origin, self.current.layer, roster).unsent;
                unsent.saturating_sub(self.unsent_before).into()
            }
            _ => 0,
        };
        self.settled_unsent + of_current
    }

    fn settle_unsent(&mut self, origin: Origin, roster: &Roster) {
        let owed = self.owed(origin, self.current.layer, roster);
        self.settled_unsent = self.unsent(Some(origin), roster);
        self.settled_asked = self.asked(Some(origin), roster);
        (self.unsent_before, self.asked_before) = (owed.unsent, owed.asked);
    }

    /// Returns the number of packets that the server itself missed, of the layers that this
    /// subscription was given.
    pub fn asked(&self, origin: Option<Origin>, roster: &Roster) -> u64 {
        let of_current = match origin {
            Some(origin) if !self.owes_nothing() => {
                let asked = self.owed(origin, self.current.layer, roster).asked;
                asked.saturating_sub(self.asked_before).into()
            }
            _ => 0,
        };
        self.settled_asked + of_current
    }

    /// Whether nothing is owed now: no frame has arrived yet, or no layer is requested, or no frame
    /// has arrived since the last pause.
    fn owes_nothing(&self) -> bool {
        self.is_empty() || self.paused || self.resumed
    }

    pub fn resume(&mut self) {
        self.resumed = self.resumed || self.paused && !self.is_empty();
        self.paused = false;
    }

    /// Whether the next new frame begins a stretch before which nothing is missing.
    pub fn is_resuming(&self) -> bool {
        self.resumed
    }

    /// Returns the number of frames of the previous stretch that were due before the current one
    /// began and did not arrive.
    pub fn withheld(&self, origin: Origin, roster: &Roster) -> u64 {
        self.previous.missed_before(
            &self.current,
            roster.frame_interval(origin, self.previous.layer),
        )
    }

    /// Returns the number of frames that ought to have arrived after the last one that did.
    pub fn missing_at_the_end(&self, origin: Origin, roster: &Roster) -> u64 {
        let sent = self.owed(origin, self.current.layer, roster).frames;
        match (self.current.last(), self.paused || self.resumed) {
            (Some(last), false) => {
                u64::from(sent.saturating_sub(last + 1)) + self.unsent(Some(origin), roster)
            }
            _ => 0,
        }
    }

    /// Notes that the server withdrew the subscription. What its source makes or owes until it
    /// begins again is still owed.
    pub fn withdraw(&mut self, origin: Option<Origin>, roster: &Roster) {
        let made = origin.map(|origin| self.owed(origin, self.current.layer, roster).frames);
        self.withdrawn = made;
    }

    /// Returns the number of frames that are expected although they were made after the server had
    /// withdrawn the subscription. The server cannot have sent them.
    pub fn made_since_withdrawal(&self, origin: Origin, roster: &Roster) -> u64 {
        match self.withdrawn {
            Some(before) if !self.owes_nothing() => {
                let made = self.owed(origin, self.current.layer, roster).frames;
                made.saturating_sub(before).into()
            }
            _ => 0,
        }
    }

    /// Ends the subscription. Only what was sent or owed until now is expected.
    pub fn end(&mut self, origin: Option<Origin>, roster: &Roster) {
        if self.ended_at.is_some() {
            return;
        }
        let ended_at = std::array::from_fn(|layer| {
            origin.map_or(Owed::default(), |origin| {
                self.owed(origin, layer as u8, roster)
            })
        });
        self.ended_at = Some(ended_at);
    }

    /// Ends the subscription because another has taken its place, from the successor's first frame
    /// on.
    pub fn end_before(&mut self, successor: &Ledger, origin: Origin, roster: &Roster) {
        self.end(Some(origin), roster);
        let (layer, first) = (successor.current.layer, successor.first_frame());
        if let (Some(ended_at), Some(first)) = (&mut self.ended_at, first)
            && let Some(end) = ended_at.get_mut(usize::from(layer))
        {
            end.frames = end.frames.min(first);
        }
    }

    /// Returns the first frame of the current stretch.
    fn first_frame(&self) -> Option<u32> {
        self.current.first()
    }

    /// Whether the subscription has ended and this frame was made after that.
    pub fn is_beyond_the_end(&self, identity: &FrameIdentity) -> bool {
        let ended_at = self
            .ended_at
            .and_then(|ended_at| ended_at.get(usize::from(identity.layer)).copied());
        ended_at.is_some_and(|end| identity.frame >= end.frames)
    }

    /// Sets a mark. Frames that were made until now and arrive later are counted separately.
    pub fn mark(&mut self, origin: Option<Origin>, roster: &Roster) {
        (self.mark, self.overdue) = (all_sent(origin, roster), 0);
    }

    /// Returns the number of frames that were under way at the last mark and have arrived since.
    pub fn overdue(&self) -> u64 {
        self.overdue.into()
    }

    /// Returns what a layer owes, as far as it concerns this subscription.
    fn owed(&self, origin: Origin, layer: u8, roster: &Roster) -> Owed {
        let ended_at = self
            .ended_at
            .and_then(|ended_at| ended_at.get(usize::from(layer)).copied());
        let before_return = || {
            roster
                .owed_before_return(origin, layer, self.publications)
                .filter(|_| self.withdrawn.is_some())
        };
        ended_at
            .or_else(before_return)
            .unwrap_or_else(|| roster.owed(origin, layer))
    }

    /// Whether no frame has arrived yet.
    pub fn is_empty(&self) -> bool {
        self.current.last().is_none()
    }

    pub fn delivered(&self) -> u64 {
        self.settled_delivered + self.previous.window.delivered() + self.current.window.delivered()
    }

    /// Returns the number of frames that ought to have arrived by now.
    pub fn expected(&self, origin: Option<Origin>, roster: &Roster) -> u64 {
        let (Some(origin), Some(first)) = (origin, self.current.first()) else {
            return 0;
        };
        let interval = roster.frame_interval(origin, self.previous.layer);
        let sent = self.owed(origin, self.current.layer, roster).frames;
        let of_current = if self.paused || self.resumed {
            self.current.len()
        } else {
            u64::from(sent.saturating_sub(first))
        };
        self.settled_expected
            + self.previous.len()
            + self.previous.missed_before(&self.current, interval)
            + of_current
    }
}

/// Returns how many frames of each layer have been made.
fn all_sent(origin: Option<Origin>, roster: &Roster) -> [u32; LAYERS_MAX] {
    std::array::from_fn(|layer| origin.map_or(0, |origin| roster.frames(origin, layer as u8)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Time;

    const MS: u64 = 1_000;
    const ORIGIN: Origin = Origin {
        publisher: 0,
        track: 1,
    };
    /// Frames per second of each layer.
    const RATES: [u64; 3] = [15, 20, 30];

    /// A publisher with three layers from time 0 on, each with its own frame rate, and the ledger
    /// of a subscriber.
    struct LedgerWorld {
        roster: Roster,
        ledger: Ledger,
    }

    fn frame(layer: u8, number: u32) -> FrameIdentity {
        let slot = u64::from(number) * 1_000_000 / RATES[usize::from(layer)];
        FrameIdentity {
            intended_unix_us: slot.div_ceil(MS) * MS,
            origin: ORIGIN,
            layer,
            frame: number,
            ..FrameIdentity::default()
        }
    }

    impl LedgerWorld {
        /// All layers have sent what was due until `until`, in microseconds.
        fn new(until: u64) -> LedgerWorld {
            let roster = Roster::new(0, [0].into_iter());
            for layer in 0..3 {
                let rate = RATES[usize::from(layer)];
                roster.set_published(
                    &frame(layer, 0),
                    Time::from_millis(1),
                    Duration::from_micros(1_000_000 / rate),
                );
                roster.set_frames(&frame(layer, 0), (until * rate / 1_000_000) as u32 + 1);
            }
            LedgerWorld {
                roster,
                ledger: Ledger::default(),
            }
        }

        fn deliver(&mut self, layer: u8, frames: impl IntoIterator<Item = u32>) -> Vec<Delivery> {
            frames
                .into_iter()
                .map(|number| self.ledger.deliver(&frame(layer, number), &self.roster))
                .collect()
        }

        fn expected(&self) -> u64 {
            self.ledger.expected(Some(ORIGIN), &self.roster)
        }

        fn unsent(&self) -> u64 {
            self.ledger.unsent(Some(ORIGIN), &self.roster)
        }

        fn pause(&mut self) {
            self.ledger.pause(Some(ORIGIN), &self.roster);
        }
    }

    #[test]
    fn on_one_layer_all_frames_from_the_first_that_came_are_expected() {
        let mut world = LedgerWorld::new(1_000 * MS);
        world.deliver(2, [5, 6, 8, 9]);
        assert_eq!((world.ledger.delivered(), world.expected()), (4, 31 - 5));
        world.ledger.end(Some(ORIGIN), &world.roster);
        world.roster.set_frames(&frame(2, 0), 1_000);
        assert_eq!(world.expected(), 31 - 5);
    }

    #[test]
    fn a_switch_that_loses_nothing_expects_nothing_more_whatever_the_phases() {
        for from in 0..3u8 {
            for to in (0..3u8).filter(|to| *to != from) {
                // With and without the earlier layer's picture of the moment of the switch. It is
                // the same picture.
                for (first, both) in (7..40).flat_map(|first| [(first, true), (first, false)]) {
                    let mut world = LedgerWorld::new(10_000 * MS);
                    let switch_at = frame(to, first).intended_unix_us;
                    let due = |number: &u32| {
                        frame(from, *number).intended_unix_us < switch_at + u64::from(both)
                    };
                    world.deliver(from, (3..).take_while(due));
                    world.deliver(to, first..first + 10);
                    world.roster.set_frames(&frame(to, 0), first + 10);
                    assert_eq!(
                        world.expected(),
                        world.ledger.delivered(),
                        "from {from} to {to} at {first}"
                    );
                }
            }
        }
    }

    #[test]
    fn what_the_earlier_layer_sent_before_the_later_one_began_is_missed() {
        let mut world = LedgerWorld::new(2_000 * MS);
        world.deliver(0, 0..=3);
        // The lowest layer's last frame was due at 200 ms, the highest layer's first at 500 ms. The
        // frames of 267, 334, 400 and 467 ms are missing.
        world.deliver(2, 15..=60);
        assert_eq!(world.expected(), 4 + 4 + 46);
        // One of them is repaired late. The number of expected frames does not change.
        assert_eq!(world.deliver(0, [5]), [Delivery::First]);
        assert_eq!((world.expected(), world.ledger.delivered()), (54, 51));
        assert_eq!(
            world.deliver(0, [5, 3]),
            [Delivery::Duplicate, Delivery::Duplicate]
        );
        // The layer switches back at once: 61 frames of the highest layer were sent, the last due
        // at 2.0 s.
        world.roster.set_frames(&frame(0, 0), 32);
        world.deliver(0, [31]);
        assert_eq!((world.expected(), world.ledger.delivered()), (55, 52));
    }

    #[test]
    fn a_layer_that_rested_is_not_missed() {
        let mut world = LedgerWorld::new(2_000 * MS);
        world.roster.set_frames(&frame(2, 0), 10);
        world.deliver(2, 0..10);
        world.deliver(0, 15..=30);
        assert_eq!((world.expected(), world.ledger.delivered()), (10 + 16, 26));
    }

    #[test]
    fn frames_from_before_the_previous_stretch_count_neither_way() {
        let mut world = LedgerWorld::new(3_000 * MS);
        world.deliver(0, [0, 1, 3]);
        world.deliver(1, 5..=20);
        world.deliver(0, 15..=45);
        let (expected, delivered) = (world.expected(), world.ledger.delivered());
        assert_eq!(expected, 4 + 16 + 31);
        assert_eq!(world.deliver(0, [2]), [Delivery::TooOld]);
        assert_eq!(
            (world.expected(), world.ledger.delivered()),
            (expected, delivered)
        );
        assert_eq!(
            world.deliver(1, [20, 4]),
            [Delivery::Duplicate, Delivery::TooOld]
        );
        assert_eq!(world.deliver(0, [14]), [Delivery::TooOld]);
    }

    #[test]
    fn layers_of_one_moment_count_once_each() {
        let mut world = LedgerWorld::new(2_000 * MS);
        world.deliver(0, [6]);
        world.deliver(1, [8]);
        world.deliver(2, 12..=60);
        assert_eq!(
            (world.expected(), world.ledger.delivered()),
            (1 + 1 + 49, 51)
        );
        assert_eq!(world.deliver(1, [8]), [Delivery::Duplicate]);
    }

    #[test]
    fn who_leaves_gets_what_was_made_before_and_owes_nothing_after() {
        let mut world = LedgerWorld::new(1_000 * MS);
        world.deliver(2, 0..=20);
        // Thirty-one frames of this layer were made, and half as many of the lowest layer.
        world.ledger.end(Some(ORIGIN), &world.roster);
        for layer in 0..3 {
            world.roster.set_frames(&frame(layer, 0), 900);
        }
        assert!((21..=30).all(|number| !world.ledger.is_beyond_the_end(&frame(2, number))));
        assert!(
            world.ledger.is_beyond_the_end(&frame(2, 31))
                && world.ledger.is_beyond_the_end(&frame(0, 16))
        );
        world.deliver(2, [22, 21]);
        assert_eq!((world.expected(), world.ledger.delivered()), (31, 23));
        // Frames under way on another layer: that layer ends where it was, too.
        world.deliver(0, [14, 15]);
        assert_eq!(
            (world.expected(), world.ledger.delivered()),
            (world.expected(), 25)
        );
        assert!(world.expected() <= 31 + 2, "{}", world.expected());
    }

    #[test]
    fn frames_from_before_a_mark_that_come_after_it_are_counted_apart() {
        let mut world = LedgerWorld::new(1_000 * MS);
        world.deliver(2, 0..=25);
        world.ledger.mark(Some(ORIGIN), &world.roster);
        assert_eq!(world.ledger.overdue(), 0);
        world.roster.set_frames(&frame(2, 0), 61);
        // 31 frames were made by then and five were under way. The fifth is lost, one arrives
        // twice, and later ones do not count.
        world.deliver(2, [26, 28, 27, 28, 29]);
        world.deliver(2, 31..=60);
        assert_eq!(world.ledger.overdue(), 4);
        world.ledger.mark(Some(ORIGIN), &world.roster);
        world.deliver(2, [30]);
        assert_eq!(world.ledger.overdue(), 1);
    }

    #[test]
    fn a_source_that_is_gone_goes_on_owing_to_who_was_given_its_layer() {
        let mut world = LedgerWorld::new(1_000 * MS);
        world.deliver(2, 0..=30);
        world.roster.add_unsent(&frame(2, 0), 90);
        world.roster.add_unsent(&frame(0, 0), 45);
        assert_eq!((world.expected(), world.unsent()), (31, 90));
        // A subscriber that pauses is owed nothing. One that resumes is owed nothing before a frame
        // has arrived.
        world.pause();
        world.roster.add_unsent(&frame(2, 0), 30);
        world.ledger.resume();
        assert_eq!(world.unsent(), 90);
        world.roster.set_frames(&frame(2, 0), 100);
        world.deliver(2, [99]);
        world.roster.add_unsent(&frame(2, 0), 3);
        assert_eq!(world.unsent(), 93);
        world.ledger.end(Some(ORIGIN), &world.roster);
        world.roster.add_unsent(&frame(2, 0), 1_000);
        assert_eq!((world.expected(), world.unsent()), (32, 93));
    }

    #[test]
    fn a_subscription_that_the_server_withdrew_is_owed_frames_until_its_source_begins_anew() {
        let mut world = LedgerWorld::new(1_000 * MS);
        world.deliver(2, 0..=20);
        world.ledger.withdraw(Some(ORIGIN), &world.roster);
        world.roster.set_frames(&frame(2, 0), 61);
        world.roster.add_unsent(&frame(2, 0), 15);
        assert_eq!((world.expected(), world.unsent()), (61, 15));
        let since = |world: &LedgerWorld| world.ledger.made_since_withdrawal(ORIGIN, &world.roster);
        assert_eq!(since(&world), 30);
        let begins = frame(2, 61);
        world
            .roster
            .set_published(&begins, Time::from_millis(9), Duration::from_millis(33));
        world.roster.set_frames(&frame(2, 0), 600);
        world.roster.add_unsent(&frame(2, 0), 60);
        assert_eq!((world.expected(), world.unsent()), (61, 15));
        assert_eq!(since(&world), 30);
        // A subscription that the server never withdrew goes on.
        world.ledger.withdrawn = None;
        assert_eq!((world.expected(), world.unsent()), (600, 75));
    }

    #[test]
    fn a_subscription_ends_where_another_one_takes_its_place() {
        let mut world = LedgerWorld::new(1_000 * MS);
        world.deliver(2, 0..=20);
        world.ledger.withdraw(Some(ORIGIN), &world.roster);
        world.roster.set_frames(&frame(2, 0), 61);
        let mut successor = Ledger::default();
        successor.deliver(&frame(2, 40), &world.roster);
        world.ledger.end_before(&successor, ORIGIN, &world.roster);
        world.roster.set_frames(&frame(2, 0), 100);
        let both = world.expected() + successor.expected(Some(ORIGIN), &world.roster);
        assert_eq!((world.expected(), both), (40, 100));
    }

    #[test]
    fn what_nobody_asked_for_is_not_expected() {
        let mut world = LedgerWorld::new(3_000 * MS);
        world.deliver(2, 0..=20);
        world.pause();
        assert_eq!(world.expected(), 21);
        // Under way when the server heard of the pause.
        world.deliver(2, [22]);
        assert_eq!(world.expected(), 23);
        world.ledger.resume();
        assert_eq!(world.expected(), 23, "not before the first frame comes");
        world.deliver(2, 70..=90);
        assert_eq!(
            (world.expected(), world.ledger.delivered()),
            (23 + 21, 22 + 21)
        );
        world.pause();
        world.ledger.resume();
        world.deliver(0, 44..=45);
        assert_eq!(
            (world.expected(), world.ledger.delivered()),
            (44 + 2, 43 + 2)
        );
    }
}
