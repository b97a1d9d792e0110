//! When each participant is intended to be present, and when it is intended to send.
//!
//! A [`Schedule`] is a row of intended moments. [`Spans`] follow from it: stretches of time, with
//! plain interval arithmetic. A subscription is owed what its publisher was intended to send while
//! its subscriber was intended to be present: [`Spans::overlap`] of the two. What really happened
//! is not part of this. A participant that is thrown out keeps its schedule, and so keeps what it
//! owes and what it is owed.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::measure::Kind;
use crate::units::Time;

/// A participant's intended action at one moment. Coming back is joining again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    Join,
    Leave,
    Publish(Kind),
    Unpublish(Kind),
    Mute(Kind),
    Unmute(Kind),
}

impl Intent {
    /// Number of the aspect. Intents of the same aspect replace each other, others do not.
    fn aspect(self) -> (u8, Option<Kind>) {
        match self {
            Intent::Join | Intent::Leave => (0, None),
            Intent::Publish(kind) | Intent::Unpublish(kind) => (1, Some(kind)),
            Intent::Mute(kind) | Intent::Unmute(kind) => (2, Some(kind)),
        }
    }

    /// Whether it begins a span of its aspect. Otherwise it ends one.
    fn begins(self) -> bool {
        matches!(self, Intent::Join | Intent::Publish(_) | Intent::Mute(_))
    }
}

/// One participant's intended moments, in order of time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schedule {
    moments: Vec<(Time, Intent)>,
}

impl Schedule {
    /// Adds an intended moment. Later or simultaneous moments of the same aspect are dropped,
    /// because the plan has changed.
    pub fn intend(&mut self, at: Time, intent: Intent) {
        self.moments
            .retain(|(planned, other)| *planned < at || other.aspect() != intent.aspect());
        let place = self.moments.partition_point(|(planned, _)| *planned <= at);
        self.moments.insert(place, (at, intent));
    }

    pub fn moments(&self) -> &[(Time, Intent)] {
        &self.moments
    }

    /// When it is intended to be present.
    pub fn presence(&self) -> Spans {
        self.spans(Intent::Join)
    }

    /// When it is intended to send this kind of media: it is present, publishes, and is not muted.
    pub fn sending(&self, kind: Kind) -> Spans {
        let published = self.presence().overlap(&self.spans(Intent::Publish(kind)));
        published.without(&self.spans(Intent::Mute(kind)))
    }

    /// When it was last intended to join.
    pub fn last_join(&self) -> Option<Time> {
        let mut joins = self.moments.iter().rev();
        joins
            .find(|(_, intent)| *intent == Intent::Join)
            .map(|(at, _)| *at)
    }

    /// Spans that intents of one aspect begin and end.
    fn spans(&self, aspect: Intent) -> Spans {
        let mut spans: Vec<Span> = Vec::new();
        let of_aspect = self
            .moments
            .iter()
            .filter(|(_, intent)| intent.aspect() == aspect.aspect());
        for (at, intent) in of_aspect {
            let open = spans.last_mut().filter(|span| span.to == Time::MAX);
            match (open, intent.begins()) {
                (None, true) => spans.push(Span {
                    from: *at,
                    to: Time::MAX,
                }),
                (Some(open), false) => open.to = *at,
                (Some(_), true) | (None, false) => {}
            }
        }
        spans.retain(|span| span.from < span.to);
        Spans(spans)
    }
}

/// A stretch of time from one moment up to another. [`Time::MAX`] stands for the end of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub from: Time,
    pub to: Time,
}

impl Span {
    /// The span from a moment up to the end of the run.
    pub const fn since(from: Time) -> Span {
        Span {
            from,
            to: Time::MAX,
        }
    }
}

/// Stretches of time that neither overlap nor touch, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spans(Vec<Span>);

impl Spans {
    /// Makes spans from stretches in any order. Stretches that overlap or touch become one.
    pub fn of(spans: impl IntoIterator<Item = Span>) -> Spans {
        let mut spans: Vec<Span> = spans
            .into_iter()
            .filter(|span| span.from < span.to)
            .collect();
        spans.sort_by_key(|span| span.from);
        let mut joined: Vec<Span> = Vec::new();
        for span in spans {
            match joined.last_mut().filter(|last| span.from <= last.to) {
                Some(last) => last.to = last.to.max(span.to),
                None => joined.push(span),
            }
        }
        Spans(joined)
    }

    pub fn iter(&self) -> impl Iterator<Item = Span> + '_ {
        self.0.iter().copied()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a moment lies in one of the spans. The end of a span does not belong to it.
    pub fn contains(&self, at: Time) -> bool {
        self.iter().any(|span| span.from <= at && at < span.to)
    }

    /// Whether the last span ends only with the run.
    pub fn is_open(&self) -> bool {
        self.0.last().is_some_and(|span| span.to == Time::MAX)
    }

    /// End of the last span, or of the run.
    pub fn end(&self) -> Option<Time> {
        self.0.last().map(|span| span.to)
    }

    /// The times that lie in both, in order.
    pub fn common<'a>(&'a self, other: &'a Spans) -> impl Iterator<Item = Span> + 'a {
        let pairs = self
            .iter()
            .flat_map(|mine| other.iter().map(move |theirs| (mine, theirs)));
        let common = pairs.map(|(a, b)| Span {
            from: a.from.max(b.from),
            to: a.to.min(b.to),
        });
        common.filter(|span| span.from < span.to)
    }

    #[must_use]
    pub fn overlap(&self, other: &Spans) -> Spans {
        Spans(self.common(other).collect())
    }

    /// The times that lie in these spans and not in the others.
    #[must_use]
    pub fn without(&self, other: &Spans) -> Spans {
        self.overlap(&other.complement())
    }

    /// All time of the run outside the spans.
    fn complement(&self) -> Spans {
        let mut outside = Vec::new();
        let mut from = Time::ZERO;
        for span in self.iter() {
            outside.push(Span {
                from,
                to: span.from,
            });
            from = span.to;
        }
        outside.push(Span {
            from,
            to: Time::MAX,
        });
        Spans::of(outside)
    }

    /// Total time of the spans up to `end`.
    pub fn length(&self, end: Time) -> Duration {
        self.iter()
            .map(|span| span.to.min(end).since(span.from))
            .sum()
    }
}

/// The schedules of all participants of this host, by global index, and of the publishers of other
/// hosts. The stages of a run write it as they decide, and the account reads it.
#[derive(Clone, Debug, Default)]
pub struct ScheduleBook {
    people: BTreeMap<u32, Schedule>,
    elsewhere: BTreeMap<u32, Schedule>,
}

impl ScheduleBook {
    pub fn intend(&mut self, index: u32, at: Time, intent: Intent) {
        self.people.entry(index).or_default().intend(at, intent);
    }

    /// Adds an intended moment of a participant of another host.
    pub fn intend_elsewhere(&mut self, index: u32, at: Time, intent: Intent) {
        let schedule = self.elsewhere.entry(index).or_default();
        schedule.intend(at, intent);
    }

    /// Schedule of a participant of this host.
    pub fn schedule(&self, index: u32) -> Option<&Schedule> {
        self.people.get(&index)
    }

    /// Schedule of a participant of this or another host.
    pub fn of_anybody(&self, index: u32) -> Option<&Schedule> {
        self.schedule(index).or_else(|| self.elsewhere.get(&index))
    }

    /// Participants of this host that are intended to be present at one time or another, in joining
    /// order.
    pub fn everybody(&self) -> impl Iterator<Item = u32> + '_ {
        self.people.keys().copied()
    }

    /// Whether a participant is intended to stay, as far as is decided.
    pub fn stays(&self, index: u32) -> bool {
        self.schedule(index)
            .is_some_and(|schedule| schedule.presence().is_open())
    }

    /// Whether a participant is intended to be present at that moment.
    pub fn is_due(&self, index: u32, at: Time) -> bool {
        self.schedule(index)
            .is_some_and(|schedule| schedule.presence().contains(at))
    }

    /// When a participant was last intended to join.
    pub fn last_join(&self, index: u32) -> Option<Time> {
        self.schedule(index)?.last_join()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seeded::Seeded;

    fn at(ms: u64) -> Time {
        Time::from_millis(ms)
    }

    fn spans(of: &[(u64, u64)]) -> Spans {
        Spans::of(of.iter().map(|(from, to)| Span {
            from: at(*from),
            to: at(*to),
        }))
    }

    fn drawn(chance: &mut Seeded) -> Spans {
        let count = chance.below(6);
        Spans::of((0..count).map(|_| {
            let from = chance.below(40);
            let to = from + chance.below(15);
            Span {
                from: at(from),
                to: if chance.chance(10) { Time::MAX } else { at(to) },
            }
        }))
    }

    /// The content of the spans, millisecond by millisecond.
    fn row(spans: &Spans) -> Vec<bool> {
        (0..70).map(|ms| spans.contains(at(ms))).collect()
    }

    fn is_well_formed(spans: &Spans) -> bool {
        spans.iter().all(|span| span.from < span.to)
            && spans.0.windows(2).all(|pair| pair[0].to < pair[1].from)
    }

    #[test]
    fn overlap_and_difference_are_those_of_every_single_moment() {
        let mut chance = Seeded::new(14);
        for _ in 0..2_000 {
            let [a, b] = [drawn(&mut chance), drawn(&mut chance)];
            let (both, rest) = (a.overlap(&b), a.without(&b));
            let (row_a, row_b) = (row(&a), row(&b));
            for ms in 0..70 {
                assert_eq!(row(&both)[ms], row_a[ms] && row_b[ms], "{a:?} {b:?} {ms}");
                assert_eq!(row(&rest)[ms], row_a[ms] && !row_b[ms], "{a:?} {b:?} {ms}");
            }
            assert_eq!(both, b.overlap(&a));
            assert!([&a, &both, &rest].into_iter().all(is_well_formed));
            let end = at(chance.below(70));
            assert_eq!(a.length(end), both.length(end) + rest.length(end));
        }
    }

    #[test]
    fn a_schedule_says_of_every_moment_what_was_intended_last() {
        let mut chance = Seeded::new(15);
        for _ in 0..2_000 {
            let mut schedule = Schedule::default();
            let (mut there, mut published, mut muted) = ([false; 60], [false; 60], [false; 60]);
            for _ in 0..chance.below(10) {
                let from = chance.below(60);
                let (intent, aspect, begins) = match chance.below(6) {
                    0 => (Intent::Join, &mut there, true),
                    1 => (Intent::Leave, &mut there, false),
                    2 => (Intent::Publish(Kind::Audio), &mut published, true),
                    3 => (Intent::Unpublish(Kind::Audio), &mut published, false),
                    4 => (Intent::Mute(Kind::Audio), &mut muted, true),
                    _ => (Intent::Unmute(Kind::Audio), &mut muted, false),
                };
                schedule.intend(at(from), intent);
                aspect[from as usize..].fill(begins);
            }
            let (presence, sending) = (schedule.presence(), schedule.sending(Kind::Audio));
            for ms in 0..60 {
                let moment = at(ms as u64);
                assert_eq!(presence.contains(moment), there[ms], "{schedule:?} {ms}");
                let sends = there[ms] && published[ms] && !muted[ms];
                assert_eq!(sending.contains(moment), sends, "{schedule:?} {ms}");
            }
            assert!(schedule.sending(Kind::Video).is_empty());
            let sorted = |pair: &[(Time, Intent)]| pair[0].0 <= pair[1].0;
            assert!(schedule.moments().windows(2).all(sorted));
        }
    }

    #[test]
    fn who_leaves_and_comes_back_is_owed_both_visits() {
        let mut book = ScheduleBook::default();
        book.intend(0, at(0), Intent::Join);
        book.intend(0, at(0), Intent::Publish(Kind::Audio));
        book.intend(7, at(100), Intent::Join);
        book.intend(7, at(300), Intent::Leave);
        assert!(!book.stays(7));
        book.intend(7, at(500), Intent::Join);
        book.intend(0, at(200), Intent::Mute(Kind::Audio));
        book.intend(0, at(250), Intent::Unmute(Kind::Audio));
        let owed = |kind| {
            let sending = book.of_anybody(0).unwrap().sending(kind);
            book.schedule(7).unwrap().presence().overlap(&sending)
        };
        assert_eq!(
            owed(Kind::Audio),
            Spans::of(
                [
                    spans(&[(100, 200), (250, 300)]).0,
                    vec![Span {
                        from: at(500),
                        to: Time::MAX
                    }]
                ]
                .concat()
            )
        );
        assert!(owed(Kind::Video).is_empty());
        assert!(book.of_anybody(9).is_none(), "nobody knows 9");
        assert_eq!(book.last_join(7), Some(at(500)));
        assert!(book.stays(0) && book.stays(7) && !book.stays(9));
        assert_eq!(
            (book.is_due(7, at(299)), book.is_due(7, at(300))),
            (true, false)
        );
    }

    #[test]
    fn a_plan_that_changes_keeps_its_past() {
        let mut schedule = Schedule::default();
        schedule.intend(at(10), Intent::Join);
        schedule.intend(at(90), Intent::Leave);
        // It was to leave, and is now wanted for longer.
        schedule.intend(at(50), Intent::Join);
        assert!(schedule.presence().is_open());
        schedule.intend(at(70), Intent::Leave);
        assert_eq!(schedule.presence(), spans(&[(10, 70)]));
        assert_eq!(schedule.presence().end(), Some(at(70)));
    }
}
