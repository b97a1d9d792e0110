//! Which publishers' tracks each participant is owed, from the overlap of two planned presences.
//!
//! A track is owed while its publisher is planned to send and the subscriber is planned to be
//! present. What really happened does not matter: a publisher that was thrown out still owes its
//! tracks. A lost host does not: from its loss on, its participants are planned to be away.

use std::time::Duration;

use crate::measure::Kind;
use crate::plan::{ParticipantPlan, Plan, ScheduleBook, Span, Spans};
use crate::units::Time;

/// An overlap that the plan ends sooner than this owes no live track, because joining, subscribing
/// and the first frame take time.
const SHORTEST_OVERLAP: Duration = Duration::from_secs(2);

/// Owed tracks within one stretch of a run.
pub(super) struct Dues<'a> {
    plan: &'a Plan,
    book: &'a ScheduleBook,
    window: Span,
    /// By room: publishers of audio, and publishers of video.
    sources: Vec<[Vec<Source>; 2]>,
}

struct Source {
    index: u32,
    sending: Spans,
}

/// The tracks of one kind that one participant is owed.
pub(super) struct OwedTracks {
    /// Indices of their publishers, in order.
    publishers: Vec<u32>,
    /// Number of tracks that its layout has room for.
    pub count: u32,
}

impl OwedTracks {
    pub fn has(&self, publisher: u32) -> bool {
        self.publishers.binary_search(&publisher).is_ok()
    }
}

impl<'a> Dues<'a> {
    pub fn within(plan: &'a Plan, book: &'a ScheduleBook, window: Span) -> Dues<'a> {
        let rooms = plan.scenario.rooms.count as usize;
        let mut sources: Vec<[Vec<Source>; 2]> = Vec::new();
        sources.resize_with(rooms, Default::default);
        for (index, member) in (0..).zip(plan.everybody()) {
            let Some(schedule) = book.of_anybody(index) else {
                continue;
            };
            let [audio, video] = &mut sources[member.room as usize];
            for (publishes, kind, list) in [
                (member.publishes_audio, Kind::Audio, audio),
                (member.publishes_video, Kind::Video, video),
            ] {
                if publishes {
                    let sending = schedule.sending(kind);
                    list.push(Source { index, sending });
                }
            }
        }
        Dues {
            plan,
            book,
            window,
            sources,
        }
    }

    /// Dues from the start of the run up to `end`.
    pub fn until(plan: &'a Plan, book: &'a ScheduleBook, end: Time) -> Dues<'a> {
        let window = Span {
            from: Time::ZERO,
            to: end,
        };
        Dues::within(plan, book, window)
    }

    /// Returns when anybody was to receive something. `kept_away` has the times in which the server
    /// kept a participant from its part.
    pub fn times(&self, kept_away: impl Fn(u32) -> Spans) -> Spans {
        let rooms: Vec<Vec<(u32, Spans)>> = self
            .sources
            .iter()
            .map(|room| {
                let sources = room.iter().flatten();
                sources
                    .map(|source| {
                        (
                            source.index,
                            source.sending.without(&kept_away(source.index)),
                        )
                    })
                    .collect()
            })
            .collect();
        let whole: Vec<Spans> = rooms
            .iter()
            .map(|sources| Spans::of(sources.iter().flat_map(|(_, sending)| sending.iter())))
            .collect();
        let receivers = self.plan.participants().filter(|one| one.subscribes);
        let owed = receivers.flat_map(|one| {
            let room = one.room as usize;
            let hears_others = rooms[room].iter().any(|(source, _)| *source != one.index);
            let schedule = self.book.schedule(one.index).filter(|_| hears_others);
            let presence = schedule.map_or_else(Spans::default, |schedule| {
                schedule.presence().without(&kept_away(one.index))
            });
            presence.common(&whole[room]).collect::<Vec<Span>>()
        });
        Spans::of(owed)
    }

    /// Returns the tracks of one kind that `subscriber` is owed from `since` on.
    pub fn of(&self, subscriber: &ParticipantPlan, kind: Kind, since: Time) -> OwedTracks {
        let presence = match self.book.schedule(subscriber.index) {
            Some(schedule) if subscriber.subscribes => schedule.presence(),
            _ => Spans::default(),
        };
        let window = Span {
            from: self.window.from.max(since),
            to: self.window.to,
        };
        let [audio, video] = &self.sources[subscriber.room as usize];
        let sources = match kind {
            Kind::Audio => audio,
            Kind::Video => video,
        };
        let others = sources
            .iter()
            .filter(|source| source.index != subscriber.index);
        let owed = others.filter(|source| is_owed(&presence, &source.sending, window));
        let publishers: Vec<u32> = owed.map(|source| source.index).collect();
        OwedTracks {
            count: self
                .plan
                .seen(subscriber.group, kind, publishers.len() as u32),
            publishers,
        }
    }
}

/// Returns whether both overlap in the window, long enough for a track to be live.
fn is_owed(presence: &Spans, sending: &Spans, window: Span) -> bool {
    presence.common(sending).any(|both| {
        let is_within = both.from.max(window.from) < both.to.min(window.to);
        is_within && (both.to == Time::MAX || both.to.since(both.from) >= SHORTEST_OVERLAP)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::scenario::RoomPeople;
    use crate::plan::tests::{plan, set_people};
    use crate::plan::{Intent, Part, Placement, VantagePlan};

    fn at(ms: u64) -> Time {
        Time::from_millis(ms)
    }

    fn plan_of_people(rooms: u32, [audio, video, subscribers]: [u32; 3], meeting: bool) -> Plan {
        let mut plan = plan();
        let people = RoomPeople {
            audio_publishers: audio,
            video_publishers: video,
            subscribers,
            meeting,
        };
        set_people(&mut plan, rooms, people);
        plan
    }

    /// The same plan from each host's point of view.
    fn dealt_to_hosts(plan: &Plan, hosts: usize) -> Vec<Plan> {
        let placement = Placement {
            vantages: vec![VantagePlan::default(); hosts],
            rooms_apart: false,
        };
        let part = |me| Part::new(placement.clone(), me, &plan.scenario).unwrap();
        (0..hosts)
            .map(|me| Plan {
                part: Some(part(me)),
                ..plan.clone()
            })
            .collect()
    }

    /// Schedules of all participants on all hosts: publishers from the start, the others from
    /// `subscribers_at` on.
    fn book(plan: &Plan, subscribers_at: Time) -> ScheduleBook {
        let mut book = ScheduleBook::default();
        for (index, member) in (0..).zip(plan.everybody()) {
            let publishes = member.publishes_audio || member.publishes_video;
            let from = if publishes { at(5) } else { subscribers_at };
            let mut intend = |intent| {
                if member.elsewhere.is_some() {
                    book.intend_elsewhere(index, from, intent);
                } else {
                    book.intend(index, from, intent);
                }
            };
            intend(Intent::Join);
            if member.publishes_audio {
                intend(Intent::Publish(Kind::Audio));
            }
            if member.publishes_video {
                intend(Intent::Publish(Kind::Video));
            }
        }
        book
    }

    #[test]
    fn where_all_stay_to_the_end_what_is_owed_is_what_is_planned() {
        for (rooms, audio, video, subscribers, meeting) in [
            (1, 3, 2, 4, false),
            (3, 5, 1, 6, true),
            (2, 1, 4, 3, false),
            (4, 2, 2, 0, true),
        ] {
            let plan = plan_of_people(rooms, [audio, video, subscribers], meeting);
            let book = book(&plan, at(1_000));
            let dues = Dues::until(&plan, &book, at(9_000));
            for kind in [Kind::Audio, Kind::Video] {
                let owed = |of: ParticipantPlan| u64::from(dues.of(&of, kind, Time::ZERO).count);
                assert_eq!(
                    plan.participants().map(owed).sum::<u64>(),
                    plan.total_planned_tracks(kind)
                );
            }
        }
    }

    /// Audio publishers, out of 0 and 1, that owe the first subscriber a track.
    fn owed(book: &ScheduleBook, window: [u64; 2], since: u64) -> Vec<u32> {
        let plan = plan_of_people(1, [2, 0, 1], false);
        let [from, to] = window.map(at);
        let dues = Dues::within(&plan, book, Span { from, to });
        dues.of(&plan.participant(2), Kind::Audio, at(since))
            .publishers
    }

    #[test]
    fn something_is_owed_as_long_as_one_who_listens_and_one_who_speaks_are_there() {
        let plan = plan_of_people(1, [1, 0, 2], false);
        let book = book(&plan, at(10_000));
        let dues = Dues::until(&plan, &book, at(20_000));
        let away = |who: &'static [(u32, u64)]| {
            let times = dues.times(move |index| {
                let gone = who.iter().filter(|(gone, _)| *gone == index);
                Spans::of(gone.map(|(_, since)| Span::since(at(*since))))
            });
            [9_000, 11_000, 13_000, 15_000].map(|ms| times.contains(at(ms)))
        };
        assert_eq!(away(&[]), [false, true, true, true]);
        assert_eq!(away(&[(1, 12_000)]), [false, true, true, true]);
        assert_eq!(
            away(&[(1, 12_000), (2, 14_000)]),
            [false, true, true, false]
        );
        assert_eq!(away(&[(0, 12_000)]), [false, true, false, false]);
    }

    #[test]
    fn nothing_is_owed_of_whom_one_never_met() {
        let plan = plan_of_people(1, [2, 0, 1], false);
        let mut book = book(&plan, at(10_000));
        assert_eq!(owed(&book, [0, 20_000], 0), [0, 1]);
        // A participant that was to join after the end was not tried.
        assert_eq!(owed(&book, [0, 10_000], 0), [0; 0]);
        book.intend(0, at(10_000), Intent::Leave);
        assert_eq!(owed(&book, [0, 20_000], 0), [1]);
        book.intend(0, at(30_000), Intent::Join);
        assert_eq!(owed(&book, [0, 20_000], 0), [1]);
        assert_eq!(owed(&book, [0, 40_000], 0), [0, 1]);
        assert_eq!(owed(&book, [0, 25_000], 0), [1]);
        // From a visit on, or from the start of a tier, only tracks that exist then are owed.
        book.intend(1, at(15_000), Intent::Leave);
        assert_eq!(owed(&book, [0, 20_000], 14_000), [1]);
        assert_eq!(owed(&book, [0, 20_000], 15_000), [0; 0]);
        assert_eq!(owed(&book, [15_000, 20_000], 0), [0; 0]);
    }

    #[test]
    fn a_track_that_ends_by_plan_before_it_can_be_live_is_not_owed() {
        let plan = plan_of_people(1, [2, 0, 1], false);
        let mut book = book(&plan, at(10_000));
        book.intend(0, at(11_999), Intent::Mute(Kind::Audio));
        assert_eq!(owed(&book, [0, 20_000], 0), [1]);
        book.intend(0, at(12_000), Intent::Mute(Kind::Audio));
        book.intend(0, at(11_000), Intent::Unmute(Kind::Audio));
        let mut longer = self::book(&plan, at(10_000));
        longer.intend(0, at(12_000), Intent::Mute(Kind::Audio));
        assert_eq!(owed(&longer, [0, 20_000], 0), [0, 1]);
        // The end of the run is not an end by plan: a track that is late for it is missing.
        assert_eq!(owed(&longer, [0, 10_001], 0), [0, 1]);
    }

    #[test]
    fn nobody_is_owed_what_a_lost_host_does_not_send_any_more() {
        let whole = plan_of_people(2, [4, 3, 6], false);
        for plan in dealt_to_hosts(&whole, 3) {
            let mut book = book(&plan, at(10_000));
            let others: Vec<u32> = (0..)
                .zip(plan.everybody())
                .filter(|(_, member)| member.elsewhere == Some(0))
                .map(|(index, _)| index)
                .collect();
            let owed = |book: &ScheduleBook, from: u64| -> u64 {
                let window = Span {
                    from: at(from),
                    to: at(60_000),
                };
                let dues = Dues::within(&plan, book, window);
                let owed = plan.participants().flat_map(|of| {
                    [Kind::Audio, Kind::Video].map(|kind| dues.of(&of, kind, Time::ZERO).count)
                });
                owed.map(u64::from).sum()
            };
            let all = owed(&book, 0);
            others
                .iter()
                .for_each(|index| book.intend_elsewhere(*index, at(20_000), Intent::Leave));
            assert_eq!(owed(&book, 0), all, "they were there when it was lost");
            let gone: u64 = plan
                .participants()
                .filter(|of| of.subscribes)
                .map(|of| {
                    let lost = (0..)
                        .zip(plan.everybody())
                        .filter(|(index, member)| others.contains(index) && member.room == of.room);
                    lost.map(|(_, member)| {
                        u64::from(member.publishes_audio) + u64::from(member.publishes_video)
                    })
                    .sum::<u64>()
                })
                .sum();
            assert_eq!(owed(&book, 20_000), all - gone);
            assert_eq!(book.everybody().count(), plan.participants().count());
        }
    }
}
