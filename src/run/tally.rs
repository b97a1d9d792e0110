//! The account of one tier: what counts for it, who fared well in it, and whether those who stayed
//! were left in peace.
//!
//! A tier's figures are differences of the run's, between its hold's beginning and its end. Frames
//! are told apart by when they were made, not by when they came: what was under way at the end has
//! until [`GRACE`] later to arrive, as it has at the end of a run, and what was under way at the
//! beginning belongs to what was before.

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

/// So long after a tier's end what was under way then may still arrive.
pub(super) const GRACE: Duration = super::DRAIN;

/// How everybody fared, from the beginning of the run to one moment.
#[derive(Default)]
pub(super) struct Survey {
    /// Everybody who was ever to be in, in joining order.
    fares: BTreeMap<u32, Fare>,
    /// Audio and video frames that were under way at the survey before, and have come since.
    overdue: [u64; 2],
    /// Tracks that nobody of this run sends, of those who are intended to be in.
    foreign: [ForeignTracks; 2],
}

/// How one participant fared.
#[derive(Clone, Default)]
struct Fare {
    audio: MediaQuality,
    video: MediaQuality,
    /// Like `frames_delivered`, of both.
    overdue: [u64; 2],
}

impl Survey {
    /// `book` says when each participant was last to join: what went live before that is not live.
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
                    // Where a layout has room for a part of them, others than at first may have
                    // come, too.
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

    /// Those who are `due`.
    fn of<'a>(&'a self, due: &'a BTreeSet<u32>) -> impl Iterator<Item = (&'a u32, &'a Fare)> {
        self.fares.iter().filter(|(index, _)| due.contains(index))
    }

    /// Freezes of audio and of video, of those who are `due`.
    fn freezes(&self, due: &BTreeSet<u32>) -> [u64; 2] {
        let add = |[audio, video]: [u64; 2], (_, fare): (&u32, &Fare)| {
            [audio + fare.audio.freezes, video + fare.video.freezes]
        };
        self.of(due).fold([0, 0], add)
    }
}

/// What a tier's account is made of.
pub(super) struct Tally<'a> {
    pub max_loss_pct: f64,
    /// Who ought to have been in at its end.
    pub due: &'a BTreeSet<u32>,
    pub present: &'a BTreeSet<u32>,
    /// Who lost its session since the tier began.
    pub lost: &'a BTreeSet<u32>,
    pub joins: Joins,
    /// The run's record when the tier began, when its hold did, and at its end.
    pub records: [&'a Record; 3],
    /// At the beginning of the hold, at its end, and when what was under way then had had its
    /// time.
    pub surveys: [&'a Survey; 3],
}

impl Tally<'_> {
    /// What happens once to a participant or to a subscription (joining, its first frame, its loss)
    /// counts from the tier's beginning, when the first one was to join or to leave; everything
    /// else from the hold on.
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

    /// What came of what was under way at the end, less what came of what was under way at the
    /// beginning.
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

/// The same without what only a complete tier can say: as far as it is.
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
    // Those that came may have been under way before: only what is missing is known to be of this
    // tier.
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

/// Those who stay while others leave.
pub(super) struct Stay {
    pub stayers: BTreeSet<u32>,
    pub since: Time,
    /// Their freezes until then.
    pub freezes: [u64; 2],
    /// Their freezes in the hold of the tier before, and how long that was.
    pub before: [u64; 2],
    pub before_seconds: f64,
}

impl Stay {
    /// `start` and `end` are of the tier before, `now` of the moment before the first one leaves.
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

    /// Why they were not left in peace. None of them may be lost; and none may freeze, where as
    /// many did in as much time before, that is no reason.
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

    /// How so many participants fared, each of whom was to get one track of each kind.
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

    /// A tier of two, each of whom expects 100 frames in it; at both ends some are under way.
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

    /// Ten stay of twenty, who froze `before` times each in the ten seconds before and `during`
    /// times in the twenty seconds in which the others left.
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
