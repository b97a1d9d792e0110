//! The account of one tier: its figures, how each participant fared in it, and whether participants
//! that stayed were affected by others that left.
//!
//! A tier's figures are differences of the run's figures between the start of its hold and its end.
//! Frames belong to the tier in which they were made, not to the one in which they arrived. Frames
//! on the way at the end have [`GRACE`] to arrive, as at the end of a run. Frames on the way at the
//! start belong to the time before.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::account::{ForeignTracks, Joins, by_participant, expect_joins, foreign_tracks, quality};
use super::dues::Dues;
use crate::engine::PeerOutcome;
use crate::measure::{JoinTimeline, Kind, Media, Record};
use crate::plan::{Plan, ScheduleBook};
use crate::report::worst::is_healthy;
use crate::report::{MediaQuality, ParticipantOutcome};
use crate::units::Time;
use crate::words;

/// Time after a tier's end in which packets that were on the way then may still arrive.
pub(super) const GRACE: Duration = super::DRAIN;

/// How all participants fared, from the start of the run to one moment.
#[derive(Default)]
pub(super) struct Survey {
    /// All participants that were ever due, in joining order.
    fares: BTreeMap<u32, Fare>,
    /// Audio and video frames that were on the way at the previous survey and have arrived since.
    overdue: [u64; 2],
    /// Tracks published by nobody of this run, for participants that are due.
    foreign: [ForeignTracks; 2],
}

/// How one participant fared.
#[derive(Clone, Default)]
struct Fare {
    audio: MediaQuality,
    video: MediaQuality,
    /// The same as [`Survey::overdue`], for this participant.
    overdue: [u64; 2],
}

impl Survey {
    /// `book` says when each participant was last due to join. Streams of earlier visits do not
    /// count as live.
    pub fn new(
        plan: &Plan,
        dues: &Dues<'_>,
        outcomes: &[PeerOutcome],
        book: &ScheduleBook,
    ) -> Survey {
        let mut peers = by_participant(outcomes);
        let mut survey = Survey::default();
        let mut people: Vec<(u32, Vec<&PeerOutcome>)> = Vec::new();
        for participant in plan.participants() {
            let Some(visit) = book.last_join(participant.index) else {
                continue;
            };
            let all = peers.remove(&participant.index).unwrap_or_default();
            let here: Vec<&PeerOutcome> = all
                .iter()
                .copied()
                .filter(|peer| peer.intended_at >= visit)
                .collect();
            if participant.subscribes && book.stays(participant.index) {
                people.push((participant.room, here.clone()));
            }
            let fares = |kind| {
                let owed = dues.of(&participant, kind, visit);
                let expected = owed.count;
                let is_owed = |publisher| owed.has(publisher);
                MediaQuality {
                    // A layout may have room for only some of the tracks, and the tracks it shows
                    // may have changed since. So more of them may have been live.
                    tracks_live: quality(&here, kind, expected, is_owed)
                        .tracks_live
                        .min(expected.into()),
                    ..quality(&all, kind, expected, is_owed)
                }
            };
            let overdue = [Kind::Audio, Kind::Video].map(|kind| {
                let streams = all
                    .iter()
                    .flat_map(|peer| &peer.streams)
                    .filter(|stream| stream.kind == kind);
                streams.map(|stream| stream.frames_overdue).sum()
            });
            (0..2).for_each(|kind| survey.overdue[kind] += overdue[kind]);
            let (audio, video) = (fares(Kind::Audio), fares(Kind::Video));
            survey.fares.insert(
                participant.index,
                Fare {
                    audio,
                    video,
                    overdue,
                },
            );
        }
        survey.foreign = foreign_tracks(people.into_iter());
        survey
    }

    fn fare(&self, index: u32) -> Fare {
        self.fares.get(&index).cloned().unwrap_or_default()
    }

    /// Participants that are `due`.
    fn of<'a>(&'a self, due: &'a BTreeSet<u32>) -> impl Iterator<Item = (&'a u32, &'a Fare)> {
        self.fares.iter().filter(|(index, _)| due.contains(index))
    }

    /// Freezes of audio and of video, for participants that are `due`.
    fn freezes(&self, due: &BTreeSet<u32>) -> [u64; 2] {
        let add = |[audio, video]: [u64; 2], (_, fare): (&u32, &Fare)| {
            [audio + fare.audio.freezes, video + fare.video.freezes]
        };
        self.of(due).fold([0, 0], add)
    }
}

/// Inputs of a tier's account.
pub(super) struct Tally<'a> {
    pub max_loss_pct: f64,
    /// Participants that were due at its end.
    pub due: &'a BTreeSet<u32>,
    pub present: &'a BTreeSet<u32>,
    /// Participants that lost their session since the tier began.
    pub lost: &'a BTreeSet<u32>,
    pub joins: Joins,
    /// The run's record at the start of the tier, at the start of its hold, and at its end.
    pub records: [&'a Record; 3],
    /// Surveys at the start of the hold, at its end, and after the time for packets that were on
    /// the way then.
    pub surveys: [&'a Survey; 3],
}

impl Tally<'_> {
    /// Makes the tier's record. Events that happen once to a participant or to a subscription
    /// (joining, first frame, loss) count from the start of the tier, when the first participant
    /// was to join or to leave. Everything else counts from the start of the hold.
    pub fn record(&self) -> Record {
        let [began, held, end] = self.records;
        let mut tier = differences(began, held, end);
        tier.session.joins_planned = self.joins.count.into();
        tier.session.participants_total = self.due.len() as u64;
        tier.session.participants_healthy = self.healthy();
        let overdue = self.overdue();
        for (kind, overdue) in [Kind::Audio, Kind::Video].into_iter().zip(overdue) {
            let fares = || {
                self.surveys[2]
                    .of(self.due)
                    .map(move |(_, fare)| fare.of(kind))
            };
            let published = match kind {
                Kind::Audio => end.audio.tracks_published,
                Kind::Video => end.video.tracks_published,
            };
            let media = tier.media(kind);
            media.tracks_published = published;
            media.tracks_expected = fares().map(|quality| quality.tracks_expected).sum();
            media.tracks_live = fares().map(|quality| quality.tracks_live).sum();
            media.frames_delivered = media.frames_delivered.saturating_add_signed(overdue);
            let [audio, video] = self.surveys[2].foreign;
            match kind {
                Kind::Audio => audio.state(media),
                Kind::Video => video.state(media),
            }
            expect_frames_of(media);
        }
        expect_joins(&mut tier, &self.joins);
        tier
    }

    /// Frames on the way at the end that arrived, less frames on the way at the start that arrived.
    fn overdue(&self) -> [i64; 2] {
        let [_, end, after] = self.surveys;
        [0, 1].map(|kind| after.overdue[kind] as i64 - end.overdue[kind] as i64)
    }

    fn healthy(&self) -> u64 {
        let fares = self.surveys[2].of(self.due);
        fares
            .filter(|(index, _)| is_healthy(&self.outcome(**index), self.max_loss_pct))
            .count() as u64
    }

    /// How one participant fared in this tier.
    fn outcome(&self, index: u32) -> ParticipantOutcome {
        let [start, end, after] = self.surveys.map(|survey| survey.fare(index));
        let quality = |kind: Kind, at: usize| {
            let mut quality = end.of(kind).since(start.of(kind));
            let overdue = after.overdue[at] as i64 - end.overdue[at] as i64;
            quality.frames_delivered = quality.frames_delivered.saturating_add_signed(overdue);
            quality.tracks_live = after.of(kind).tracks_live;
            quality
        };
        ParticipantOutcome {
            index,
            timeline: JoinTimeline {
                joined: self.present.contains(&index).then_some(Time::ZERO),
                ..JoinTimeline::default()
            },
            disconnects: self.lost.contains(&index).into(),
            audio: quality(Kind::Audio, 0),
            video: quality(Kind::Video, 1),
            ..ParticipantOutcome::default()
        }
    }
}

impl Fare {
    fn of(&self, kind: Kind) -> &MediaQuality {
        match kind {
            Kind::Audio => &self.audio,
            Kind::Video => &self.video,
        }
    }
}

/// Like [`Tally::record`], for a tier in progress and without the figures that only a complete tier
/// has.
pub(super) fn so_far(
    began: &Record,
    held: &Record,
    now: &Record,
    joins: &Joins,
    subscriptions: [u64; 2],
) -> Record {
    let mut tier = differences(began, held, now);
    [tier.audio.tracks_expected, tier.video.tracks_expected] = subscriptions;
    tier.session.joins_planned = joins.count.into();
    [&mut tier.audio, &mut tier.video]
        .into_iter()
        .for_each(expect_frames_of);
    expect_joins(&mut tier, joins);
    tier
}

fn expect_frames_of(media: &mut Media) {
    // Frames that arrived may have been on the way before the tier. Only the missing ones are known
    // to belong to it.
    let missing = media.frames_expected.saturating_sub(media.frames_delivered);
    media
        .one_way_latency
        .expect(media.one_way_latency.count() + missing);
}

fn differences(began: &Record, held: &Record, end: &Record) -> Record {
    let mut tier = end.since(held);
    let (once, session) = (end.session.since(&began.session), &mut tier.session);
    session.joins_ok = once.joins_ok;
    session.joins_by_udp = once.joins_by_udp;
    session.joins_by_tcp = once.joins_by_tcp;
    session.joins_by_turn_udp = once.joins_by_turn_udp;
    session.joins_by_turn_tcp = once.joins_by_turn_tcp;
    session.joins_by_turn_tls = once.joins_by_turn_tls;
    session.joins_failed = once.joins_failed;
    session.joins_retried = once.joins_retried;
    session.disconnects = once.disconnects;
    session.reconnects_ok = once.reconnects_ok;
    session.reconnects_failed = once.reconnects_failed;
    session.join = once.join;
    session.signal_connect = once.signal_connect;
    session.signal_join = once.signal_join;
    session.ice = once.ice;
    session.dtls = once.dtls;
    session.first_media = once.first_media;
    session.reconnect = once.reconnect;
    for (media, began, end) in [
        (&mut tier.audio, &began.audio, &end.audio),
        (&mut tier.video, &began.video, &end.video),
    ] {
        media.track_subscribe = end.track_subscribe.since(&began.track_subscribe);
        media.first_packet = end.first_packet.since(&began.first_packet);
        media.first_frame = end.first_frame.since(&began.first_frame);
    }
    tier
}

/// Participants that stay while others leave.
pub(super) struct Stay {
    pub stayers: BTreeSet<u32>,
    pub since: Time,
    /// Their freezes up to `since`.
    pub freezes: [u64; 2],
    /// Their freezes in the hold of the tier before, and below it, the length of that hold.
    pub before: [u64; 2],
    pub before_seconds: f64,
}

impl Stay {
    /// `start` and `end` are surveys of the tier before. `now` is from just before the first one
    /// leaves.
    pub fn begin(
        stayers: BTreeSet<u32>,
        since: Time,
        [start, end, now]: [&Survey; 3],
        before_seconds: f64,
    ) -> Stay {
        let [start, end] = [start, end].map(|survey| survey.freezes(&stayers));
        Stay {
            since,
            freezes: now.freezes(&stayers),
            stayers,
            before: [0, 1].map(|kind| end[kind] - start[kind]),
            before_seconds,
        }
    }

    /// Returns how they were affected. None of them may lose its session. They may freeze only as
    /// often as they did in the same time before.
    pub fn complaints(&self, lost: &BTreeSet<u32>, end: &Survey, until: Time) -> Vec<String> {
        let mut complaints = Vec::new();
        let lost = end
            .of(&self.stayers)
            .filter(|(index, _)| lost.contains(index))
            .count();
        if lost > 0 {
            complaints.push(format!(
                "{} of {} who stayed lost their session when others left",
                words::number(lost as u64),
                words::number(self.stayers.len() as u64)
            ));
        }
        let seconds = until.since(self.since).as_secs_f64();
        let freezes = end.freezes(&self.stayers);
        for (at, name) in ["audio", "video"].into_iter().enumerate() {
            let (now, before) = (freezes[at] - self.freezes[at], self.before[at]);
            let allowed = before as f64 * seconds / self.before_seconds.max(0.001);
            if now as f64 > allowed.ceil() {
                complaints.push(format!(
                    "{name} of those who stayed froze {} in {seconds:.1} s when others left, and {} in the {:.1} s before",
                    words::count(now, "time"),
                    words::count(before, "time"),
                    self.before_seconds
                ));
            }
        }
        complaints
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A survey of participants that should each receive one track of each kind.
    fn survey(
        participants: u32,
        freezes: u64,
        expected: u64,
        delivered: u64,
        overdue: u64,
    ) -> Survey {
        let quality = MediaQuality {
            tracks_expected: 1,
            tracks_live: 1,
            frames_expected: expected,
            frames_delivered: delivered,
            freezes,
            ..MediaQuality::default()
        };
        let fare = Fare {
            audio: quality,
            video: quality,
            overdue: [overdue; 2],
        };
        let count = u64::from(participants);
        Survey {
            fares: (0..participants)
                .map(|index| (index, fare.clone()))
                .collect(),
            overdue: [overdue * count; 2],
            foreign: Default::default(),
        }
    }

    fn media(expected: u64, delivered: u64) -> Media {
        let mut media = Media {
            frames_expected: expected,
            frames_delivered: delivered,
            ..Media::default()
        };
        (0..delivered).for_each(|_| media.one_way_latency.record_micros(1_000));
        media
    }

    fn record(expected: u64, delivered: u64) -> Record {
        Record {
            audio: media(expected, delivered),
            video: media(expected, delivered),
            ..Record::default()
        }
    }

    /// A tier of two participants that each expect 100 frames in it. At both ends some are on the
    /// way.
    fn tally(late_at_the_beginning: u64, late_at_the_end: u64, lost: u64) -> (Record, u64) {
        let (before, after) = (50 - late_at_the_beginning, 150 - late_at_the_end - lost);
        let records = [
            Record::default(),
            record(100, 2 * before),
            record(300, 2 * after),
        ];
        let surveys = [
            survey(2, 0, 50, before, 0),
            survey(2, 0, 150, after, late_at_the_beginning),
            survey(2, 0, 190, 180, late_at_the_end),
        ];
        let tally = Tally {
            max_loss_pct: 1.0,
            due: &BTreeSet::from([0, 1]),
            present: &BTreeSet::from([0, 1]),
            lost: &BTreeSet::new(),
            joins: Joins::default(),
            records: [&records[0], &records[1], &records[2]],
            surveys: [&surveys[0], &surveys[1], &surveys[2]],
        };
        let record = tally.record();
        let latency = &record.audio.one_way_latency;
        assert_eq!(
            latency.expected() - latency.count(),
            2 * lost,
            "what is under way is not missing"
        );
        (record.clone(), record.session.participants_healthy)
    }

    #[test]
    fn frames_belong_to_the_tier_in_which_they_were_made() {
        for (beginning, end) in [(0, 0), (7, 0), (0, 7), (3, 9)] {
            let (record, healthy) = tally(beginning, end, 0);
            assert_eq!(
                (record.audio.frames_expected, record.audio.frames_delivered),
                (200, 200),
                "{beginning} {end}"
            );
            assert_eq!(
                (
                    record.video.tracks_expected,
                    record.video.tracks_live,
                    healthy
                ),
                (2, 2, 2)
            );
        }
        let (record, healthy) = tally(3, 9, 5);
        assert_eq!((record.audio.frames_delivered, healthy), (190, 0));
    }

    #[test]
    fn one_who_was_lost_or_is_not_in_is_not_well() {
        let (records, surveys) = (
            [record(0, 0), record(0, 0), record(30, 30)],
            [0, 10, 10].map(|n| survey(3, 0, n, n, 0)),
        );
        let tally = Tally {
            max_loss_pct: 1.0,
            due: &BTreeSet::from([0, 1, 2]),
            present: &BTreeSet::from([0, 1]),
            lost: &BTreeSet::from([1]),
            joins: Joins::default(),
            records: [&records[0], &records[1], &records[2]],
            surveys: [&surveys[0], &surveys[1], &surveys[2]],
        };
        assert_eq!(tally.record().session.participants_healthy, 1);
    }

    /// Ten of twenty participants stay. Each froze `before` times in the ten seconds before, and
    /// `during` times in the twenty seconds in which the others left.
    fn complaints(before: u64, during: u64, lost: &[u32]) -> Vec<String> {
        let (start, end) = (survey(20, 1, 0, 0, 0), survey(20, 1 + before, 0, 0, 0));
        let stay = Stay::begin(
            (0..10).collect(),
            Time::from_millis(30_000),
            [&start, &end, &end],
            10.0,
        );
        let after = survey(20, 1 + before + during, 0, 0, 0);
        stay.complaints(
            &lost.iter().copied().collect(),
            &after,
            Time::from_millis(50_000),
        )
    }

    #[test]
    fn those_who_stay_must_not_be_lost_nor_freeze_more_than_before() {
        assert_eq!(
            complaints(0, 0, &[10, 19]),
            Vec::<String>::new(),
            "those who left are none of these"
        );
        assert_eq!(complaints(1, 2, &[]), Vec::<String>::new());
        assert_eq!(
            complaints(0, 0, &[3, 9, 10]),
            ["2 of 10 who stayed lost their session when others left"]
        );
        let worse = complaints(1, 3, &[]);
        assert_eq!(worse.len(), 2);
        assert_eq!(
            worse[1],
            "video of those who stayed froze 30 times in 20.0 s when others left, and 10 times in the 10.0 s before"
        );
        assert_eq!(complaints(0, 1, &[]).len(), 2);
    }
}
