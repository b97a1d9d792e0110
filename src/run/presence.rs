//! Which participants are due, and which of them are gone. The account of a run reads this beside
//! its counts.
//!
//! The stages of a run write their decisions into the book of schedules. Other events change no
//! schedule: a participant that was thrown out keeps what it owes and what it is owed. A source
//! that is gone before its schedule ends it is a reason to fail, and is named. So is anybody whom
//! the server has sent away, whatever the loss.

use std::collections::{BTreeMap, BTreeSet};

use crate::measure::Kind;
use crate::plan::{Intent, Member, ParticipantPlan, Plan, Schedule, ScheduleBook, Span, Spans};
use crate::units::Time;
use crate::words;

/// Number of sources or changes that are named. The others are only counted.
const NAMED_MAX: usize = 3;
const KINDS: [Kind; 2] = [Kind::Audio, Kind::Video];

#[derive(Default)]
pub(super) struct Presence {
    pub book: ScheduleBook,
    /// Participants that should be present once all decided moves are done.
    due: BTreeSet<u32>,
    gone: Vec<GoneParticipant>,
    muted: Vec<MutedByServer>,
}

struct MutedByServer {
    index: u32,
    kind: Kind,
    muted: bool,
    at: Time,
}

/// A participant that ended, or was changed, in another way than its schedule says.
struct GoneParticipant {
    index: u32,
    at: Time,
    back_at: Option<Time>,
    how: Departure,
    /// Event that happened to it, and why, for example `was removed by the server
    /// (PARTICIPANT_REMOVED)`.
    story: String,
}

/// Kind of event that made a participant differ from its schedule.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Departure {
    /// The connection was lost.
    Lost,
    /// The server ended the session, or took a track out of the room.
    SentAway,
    /// Somebody deleted the room.
    RoomDeleted,
    /// The server took a right or a subscription away. It may give it back.
    Deprived,
}

/// A participant by the names that the server knows.
pub(super) struct NamedParticipant {
    pub identity: String,
    pub room: String,
}

impl Presence {
    /// Schedules a participant to join, or to come back, and to send its planned tracks from then
    /// on.
    pub fn invite(&mut self, participant: &ParticipantPlan, at: Time) {
        let index = participant.index;
        self.due.insert(index);
        // Whatever became of an earlier visit, this is another one.
        self.note_back(index, at);
        self.book.intend(index, at, Intent::Join);
        for kind in KINDS
            .into_iter()
            .filter(|kind| participant.publishes(*kind))
        {
            self.book.intend(index, at, Intent::Publish(kind));
        }
    }

    /// Schedules the publishers of other hosts to join.
    pub fn expect_elsewhere(&mut self, plan: &Plan, at: Time) {
        for (index, member, _) in sources_elsewhere(plan) {
            self.book.intend_elsewhere(index, at, Intent::Join);
            for (publishes, kind) in [
                (member.publishes_audio, Kind::Audio),
                (member.publishes_video, Kind::Video),
            ] {
                if publishes {
                    let publish = Intent::Publish(kind);
                    self.book.intend_elsewhere(index, at, publish);
                }
            }
        }
    }

    /// Notes that other hosts went missing or came back, given the hosts missing before and now.
    /// Hosts that went missing have been silent since `silent_since`.
    pub fn note_missing(
        &mut self,
        plan: &Plan,
        [before, missing]: [&[u32]; 2],
        silent_since: Time,
        now: Time,
    ) {
        let is_among = |hosts: &[u32], host: usize| hosts.contains(&(host as u32));
        for (index, _, host) in sources_elsewhere(plan) {
            match (is_among(before, host), is_among(missing, host)) {
                (false, true) => self
                    .book
                    .intend_elsewhere(index, silent_since, Intent::Leave),
                (true, false) => self.book.intend_elsewhere(index, now, Intent::Join),
                (true, true) | (false, false) => {}
            }
        }
    }

    pub fn dismiss(&mut self, index: u32, at: Time) {
        self.due.remove(&index);
        self.book.intend(index, at, Intent::Leave);
    }

    /// Participants that should be present once all decided moves are done.
    pub fn due(&self) -> &BTreeSet<u32> {
        &self.due
    }

    pub fn due_count(&self) -> u32 {
        self.due.len() as u32
    }

    /// Number of participants that were due at one time or another.
    pub fn ever_count(&self) -> u32 {
        self.book.everybody().count() as u32
    }

    /// Notes that a session has ended or was lost. `server_reason` is the server's own word if the
    /// server ended it.
    pub fn note_lost(&mut self, index: u32, at: Time, reason: &str, server_reason: Option<&str>) {
        let story = match server_reason {
            Some("PARTICIPANT_REMOVED") => "was removed by the server (PARTICIPANT_REMOVED)".into(),
            Some(name) => format!("was sent away by the server ({name})"),
            None => format!("was lost ({reason})"),
        };
        let how = match server_reason {
            Some("ROOM_DELETED") => Departure::RoomDeleted,
            Some(_) => Departure::SentAway,
            None => Departure::Lost,
        };
        let is_source = KINDS.iter().any(|kind| self.sends(index, *kind, at));
        // A participant that only receives and has lost its connection shows in what it missed.
        let is_sent_away = how != Departure::Lost && self.book.is_due(index, at);
        if is_source || is_sent_away {
            self.add(index, at, how, story);
        }
    }

    /// Notes that the server has taken a track out of the room, or never let it in.
    pub fn note_track_lost(&mut self, index: u32, kind: Kind, at: Time, story: String) {
        if self.sends(index, kind, at) {
            self.add(index, at, Departure::SentAway, story);
        }
    }

    /// Notes that the server has muted or unmuted a track. While muted, it should send nothing.
    pub fn note_muted(&mut self, index: u32, kind: Kind, muted: bool, at: Time) {
        let intent = if muted {
            Intent::Mute(kind)
        } else {
            Intent::Unmute(kind)
        };
        self.book.intend(index, at, intent);
        self.muted.push(MutedByServer {
            index,
            kind,
            muted,
            at,
        });
    }

    /// Notes that the server has changed a participant against the plan.
    pub fn note_harmed(&mut self, index: u32, at: Time, story: String) {
        if self.book.is_due(index, at) {
            self.add(index, at, Departure::Deprived, story);
        }
    }

    /// Notes that the server has given back what it had taken: the change with this story.
    pub fn note_restored(&mut self, index: u32, at: Time, story: &str) {
        let mut gone = self.gone.iter_mut().rev();
        let taken = gone.find(|gone| gone.index == index && gone.story == story);
        if let Some(taken) = taken {
            taken.back_at.get_or_insert(at);
        }
    }

    /// Notes about what the server took and gave back.
    pub fn restored_notes(&self, named: impl Fn(u32) -> NamedParticipant) -> Vec<String> {
        let restored = self.gone.iter().filter_map(|gone| {
            let back_at = gone.back_at.filter(|_| gone.how == Departure::Deprived)?;
            Some((gone, back_at))
        });
        let mut notes: Vec<String> = restored
            .map(|(gone, back_at)| {
                format!(
                    "{} {} {} {} into the run, and had it back {} later",
                    self.role(gone.index),
                    named(gone.index).identity,
                    gone.story,
                    seconds(gone.at.since(Time::ZERO)),
                    seconds(back_at.since(gone.at)),
                )
            })
            .collect();
        let others = notes.len().saturating_sub(NAMED_MAX);
        if others > 0 {
            notes.truncate(NAMED_MAX);
            notes.push(format!(
                "the server took something away and gave it back {} more",
                words::count(others as u64, "time")
            ));
        }
        notes
    }

    /// Times in which a participant was kept from its part by the server.
    pub fn kept_away(&self, index: u32) -> Spans {
        let by_server =
            |gone: &&GoneParticipant| gone.index == index && gone.how != Departure::Lost;
        Spans::of(self.gone.iter().filter(by_server).map(|gone| Span {
            from: gone.at,
            to: gone.back_at.unwrap_or(Time::MAX),
        }))
    }

    /// Participants that were kept from their part by the server at one time or another.
    pub fn ever_kept_away(&self) -> BTreeSet<u32> {
        let by_server = |gone: &&GoneParticipant| gone.how != Departure::Lost;
        let gone = self.gone.iter().filter(by_server);
        gone.map(|gone| gone.index).collect()
    }

    /// Notes about tracks that the server muted and unmuted.
    pub fn mute_notes(&self, named: impl Fn(u32) -> NamedParticipant) -> Vec<String> {
        let mut notes: Vec<String> = Vec::new();
        for change in self.muted.iter().take(NAMED_MAX) {
            let what = if change.muted { "muted" } else { "unmuted" };
            notes.push(format!(
                "the server {what} the {} track of {} {:.1} s into the run: {}",
                change.kind.name(),
                named(change.index).identity,
                change.at.since(Time::ZERO).as_secs_f64(),
                if change.muted {
                    "somebody asked it to; it sent nothing from then on, and nothing was owed"
                } else {
                    "it sends again"
                },
            ));
        }
        let others = self.muted.len().saturating_sub(NAMED_MAX);
        if others > 0 {
            notes.push(format!(
                "the server muted or unmuted tracks {} more",
                words::count(others as u64, "time")
            ));
        }
        notes
    }

    fn add(&mut self, index: u32, at: Time, how: Departure, story: String) {
        self.gone.push(GoneParticipant {
            index,
            at,
            back_at: None,
            how,
            story,
        });
    }

    /// Notes that a participant has joined again and publishes again.
    pub fn note_back(&mut self, index: u32, at: Time) {
        let gone = self.gone.iter_mut().filter(|gone| gone.index == index);
        gone.for_each(|gone| {
            gone.back_at.get_or_insert(at);
        });
    }

    fn role(&self, index: u32) -> &'static str {
        let publishes = |schedule: &Schedule| {
            let mut moments = schedule.moments().iter();
            moments.any(|(_, intent)| matches!(intent, Intent::Publish(_)))
        };
        let schedule = self.book.schedule(index);
        if schedule.is_some_and(publishes) {
            "publisher"
        } else {
            "subscriber"
        }
    }

    fn sends(&self, index: u32, kind: Kind, at: Time) -> bool {
        let schedule = self.book.schedule(index);
        schedule.is_some_and(|schedule| schedule.sending(kind).contains(at))
    }

    /// Participants that were gone at that time, though they were due.
    fn gone_at(&self, at: Time) -> impl Iterator<Item = &GoneParticipant> {
        let is_gone = move |gone: &&GoneParticipant| {
            gone.at < at
                && gone.back_at.is_none_or(|back| back > at)
                && self.book.is_due(gone.index, at)
        };
        self.gone.iter().filter(is_gone)
    }

    /// Indices of the participants that were gone at that time.
    pub fn gone_people(&self, at: Time) -> BTreeSet<u32> {
        self.gone_at(at).map(|gone| gone.index).collect()
    }

    /// Returns what happened to a participant that was gone at that time.
    pub fn story(&self, index: u32, at: Time) -> Option<&str> {
        let mut gone = self.gone_at(at).filter(|gone| gone.index == index);
        gone.next().map(|gone| gone.story.as_str())
    }

    /// Returns why a stretch of the run fails that was planned to last until `end`: participants
    /// that were gone when it ended, at `until`. `what` names what would have ended it by plan:
    /// `the plan` or `the tier`.
    pub fn complaints(
        &self,
        until: Time,
        end: Time,
        what: &str,
        named: impl Fn(u32) -> NamedParticipant,
    ) -> Vec<String> {
        let when = |at: Time| {
            format!(
                "{} into the run, {} before {what} ended it",
                seconds(at.since(Time::ZERO)),
                seconds(end.since(at))
            )
        };
        let (of_rooms, others): (Vec<_>, Vec<_>) = self
            .gone_at(until)
            .partition(|gone| gone.how == Departure::RoomDeleted);
        let mut rooms: BTreeMap<String, (u64, Time)> = BTreeMap::new();
        for gone in of_rooms {
            let room = named(gone.index).room;
            let (count, at) = rooms.entry(room).or_insert((0, gone.at));
            (*count, *at) = (*count + 1, gone.at.min(*at));
        }
        let mut complaints: Vec<String> = rooms
            .into_iter()
            .map(|(room, (count, at))| {
                format!(
                    "room '{room}' was deleted {}: the server sent {} of it away (ROOM_DELETED)",
                    when(at),
                    words::count(count, "participant")
                )
            })
            .collect();
        shorten(&mut complaints, "room", "deleted");
        let mut people: Vec<String> = others
            .iter()
            .map(|gone| {
                let identity = named(gone.index).identity;
                let (role, story) = (self.role(gone.index), &gone.story);
                format!("{role} {identity} {story} {}", when(gone.at))
            })
            .collect();
        shorten(&mut people, "participant", "gone");
        complaints.extend(people);
        complaints
    }
}

fn seconds(span: std::time::Duration) -> String {
    format!("{:.1} s", span.as_secs_f64())
}

/// Keeps the first few, and says how many more there were.
fn shorten(complaints: &mut Vec<String>, noun: &str, fate: &str) {
    let others = complaints.len().saturating_sub(NAMED_MAX);
    if others > 0 {
        complaints.truncate(NAMED_MAX);
        let others = words::count(others as u64, noun);
        complaints.push(format!("{others} more were {fate}, too"));
    }
}

/// Publishers of other hosts: their index, and the host that runs them.
fn sources_elsewhere(plan: &Plan) -> impl Iterator<Item = (u32, Member, usize)> + '_ {
    let everybody = (0..).zip(plan.everybody());
    let sources = everybody.filter(|(_, of)| of.publishes_audio || of.publishes_video);
    sources.filter_map(|(index, of)| Some((index, of, of.elsewhere?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Time {
        Time::from_millis(seconds * 1_000)
    }

    fn publisher(index: u32) -> ParticipantPlan {
        ParticipantPlan {
            group: 0,
            publishes_audio: true,
            index,
            position: index,
            room: 0,
            place: index,
            identity: format!("p-{index}"),
            publishes_video: false,
            subscribes: false,
            transport: crate::plan::TransportChoice::Auto,
            join_offset: std::time::Duration::ZERO,
            seed: 0,
        }
    }

    fn told(presence: &Presence, until: u64) -> Vec<String> {
        presence.complaints(at(until), at(until), "the plan", named)
    }

    /// A participant in one of two rooms.
    fn named(index: u32) -> NamedParticipant {
        NamedParticipant {
            identity: format!("p-{index}"),
            room: format!("room-{}", index % 2),
        }
    }

    fn subscriber(index: u32) -> ParticipantPlan {
        ParticipantPlan {
            publishes_audio: false,
            subscribes: true,
            ..publisher(index)
        }
    }

    fn unpublished(kind: &str) -> String {
        format!("lost its {kind} track: the server unpublished it")
    }

    #[test]
    fn who_is_muted_by_the_server_owes_nothing_meanwhile_and_is_named() {
        let mut presence = Presence::default();
        presence.invite(&publisher(0), at(0));
        presence.note_muted(0, Kind::Audio, true, at(6));
        presence.note_muted(0, Kind::Audio, false, at(9));
        let sending = presence.book.schedule(0).unwrap().sending(Kind::Audio);
        assert_eq!(
            [5, 6, 8, 9].map(|second| sending.contains(at(second))),
            [true, false, false, true]
        );
        assert_eq!(told(&presence, 15), Vec::<String>::new());
        assert_eq!(
            presence.mute_notes(named),
            [
                "the server muted the audio track of p-0 6.0 s into the run: somebody asked it to; it sent nothing from then on, and nothing was owed",
                "the server unmuted the audio track of p-0 9.0 s into the run: it sends again"
            ]
        );
    }

    #[test]
    fn a_source_that_is_gone_is_named_with_its_moment_and_the_servers_words() {
        let mut presence = Presence::default();
        (0..2).for_each(|index| presence.invite(&publisher(index), at(0)));
        presence.note_lost(0, at(6), "", Some("PARTICIPANT_REMOVED"));
        presence.note_track_lost(1, Kind::Video, at(7), unpublished("video"));
        assert_eq!(
            told(&presence, 15),
            [
                "publisher p-0 was removed by the server (PARTICIPANT_REMOVED) 6.0 s into the run, 9.0 s before the plan ended it"
            ],
            "the other one publishes no video"
        );
        presence.note_track_lost(1, Kind::Audio, at(7), unpublished("audio"));
        assert!(told(&presence, 15)[1].starts_with(
            "publisher p-1 lost its audio track: the server unpublished it 7.0 s into the run"
        ));
        assert_eq!(told(&presence, 6), Vec::<String>::new(), "not yet");
        assert_eq!(presence.gone_people(at(15)), BTreeSet::from([0, 1]));
    }

    #[test]
    fn who_comes_back_or_was_to_leave_anyhow_is_not_gone() {
        let mut presence = Presence::default();
        (0..3).for_each(|index| presence.invite(&publisher(index), at(0)));
        presence.note_lost(0, at(6), "ICE: no answer", None);
        assert!(told(&presence, 7)[0].contains("p-0 was lost (ICE: no answer) 6.0 s"));
        presence.note_back(0, at(8));
        assert_eq!(told(&presence, 15), Vec::<String>::new());
        // The plan ends it, and the server does so later.
        presence.dismiss(1, at(9));
        presence.note_lost(1, at(10), "", Some("ROOM_DELETED"));
        // The server ends it, and the plan would have done so later.
        presence.note_lost(2, at(10), "", Some("ROOM_DELETED"));
        presence.dismiss(2, at(12));
        assert_eq!(told(&presence, 11).len(), 1);
        assert_eq!(told(&presence, 13), Vec::<String>::new());
        assert_eq!(presence.due(), &BTreeSet::from([0]));
        assert_eq!(presence.ever_count(), 3);
    }

    #[test]
    fn a_subscriber_that_the_server_sends_away_is_named_and_one_that_loses_it_is_not() {
        let mut presence = Presence::default();
        (0..4).for_each(|index| presence.invite(&subscriber(index), at(0)));
        presence.note_lost(0, at(6), "ICE: no answer", None);
        presence.note_lost(1, at(7), "", Some("PARTICIPANT_REMOVED"));
        presence.note_lost(2, at(8), "", Some("DUPLICATE_IDENTITY"));
        assert_eq!(
            told(&presence, 15),
            [
                "subscriber p-1 was removed by the server (PARTICIPANT_REMOVED) 7.0 s into the run, 8.0 s before the plan ended it",
                "subscriber p-2 was sent away by the server (DUPLICATE_IDENTITY) 8.0 s into the run, 7.0 s before the plan ended it",
            ]
        );
        assert_eq!(presence.gone_people(at(15)), BTreeSet::from([1, 2]));
        // Who was sent away and has joined anew is there.
        presence.note_lost(3, at(9), "", Some("SERVER_SHUTDOWN"));
        presence.note_back(3, at(11));
        assert_eq!(told(&presence, 15).len(), 2);
        let away = presence.kept_away(3);
        assert_eq!(
            [8, 9, 10, 11].map(|second| away.contains(at(second))),
            [false, true, true, false]
        );
        assert!(presence.kept_away(0).is_empty());
    }

    #[test]
    fn a_room_that_is_deleted_is_named_once() {
        let mut presence = Presence::default();
        (0..4).for_each(|index| presence.invite(&subscriber(index), at(0)));
        for index in [1, 3] {
            presence.note_lost(index, at(3 + u64::from(index)), "", Some("ROOM_DELETED"));
        }
        assert_eq!(
            told(&presence, 15),
            [
                "room 'room-1' was deleted 4.0 s into the run, 11.0 s before the plan ended it: the server sent 2 participants of it away (ROOM_DELETED)"
            ]
        );
    }

    #[test]
    fn what_the_server_takes_and_gives_back_is_a_note_with_both_moments() {
        let mut presence = Presence::default();
        presence.invite(&subscriber(0), at(0));
        let story = "lost its right to subscribe: the server took it away";
        presence.note_harmed(0, at(3), story.to_owned());
        assert_eq!(told(&presence, 15).len(), 1);
        presence.note_restored(0, at(5), story);
        assert_eq!(told(&presence, 15), Vec::<String>::new());
        assert_eq!(
            presence.restored_notes(named),
            [
                "subscriber p-0 lost its right to subscribe: the server took it away 3.0 s into the run, and had it back 2.0 s later"
            ]
        );
    }

    #[test]
    fn of_many_sources_a_few_are_named() {
        let mut presence = Presence::default();
        for index in 0..10 {
            presence.invite(&publisher(index), at(0));
            presence.note_lost(index, at(1), "", Some("SERVER_SHUTDOWN"));
        }
        let told = told(&presence, 2);
        assert_eq!(told.len(), 1 + NAMED_MAX);
        assert_eq!(told[NAMED_MAX], "7 participants more were gone, too");
    }
}
