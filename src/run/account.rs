//! What a run's record says once it is over: how much there ought to have been, and how each
//! participant fared.

use std::collections::{BTreeMap, BTreeSet};

use crate::engine::PeerOutcome;
use crate::engine::subscriber::StreamOutcome;
use crate::measure::{Kind, Media, Record, is_measured};
use crate::plan::{LostPublishers, ParticipantPlan, Plan};
use crate::report::MediaQuality;
use crate::signal::session::Ended;

const KINDS: [Kind; 2] = [Kind::Audio, Kind::Video];

/// How many tracks there ought to be, and how many went live: a track that came twice, on another
/// SSRC, does not stand for one that never came.
///
/// `admitted`: so many participants ought to have been in, at one time or another.
pub(super) fn state_tracks(
    record: &mut Record,
    plan: &Plan,
    lost: &LostPublishers,
    admitted: u32,
    outcomes: &[PeerOutcome],
    ended: &BTreeMap<u32, Ended>,
) {
    for kind in [Kind::Audio, Kind::Video] {
        let streams = outcomes.iter().flat_map(|peer| {
            peer.streams
                .iter()
                .map(move |stream| (peer.participant, stream))
        });
        let is_there = |stream: &StreamOutcome| {
            !stream
                .origin
                .is_some_and(|origin| lost.has(plan, origin.publisher))
        };
        let live =
            streams.filter(|(_, stream)| stream.kind == kind && stream.live && is_there(stream));
        let distinct: BTreeSet<_> = live
            .map(|(participant, stream)| (participant, stream.origin))
            .collect();
        let media = record.media(kind);
        let participants = (0..admitted).map(|position| plan.participant(position));
        let expected = participants.map(|participant| {
            expected_tracks(
                plan,
                lost,
                &participant,
                kind,
                ended.get(&participant.index),
            )
        });
        media.tracks_expected = expected.map(u64::from).sum();
        media.tracks_live = distinct.len() as u64;
    }
}

/// Tracks that a participant ought to have received: those of the plan, and more where its layout
/// had room for others later.
pub(super) fn expected_tracks(
    plan: &Plan,
    lost: &LostPublishers,
    participant: &ParticipantPlan,
    kind: Kind,
    ended: Option<&Ended>,
) -> u32 {
    let shown = ended
        .filter(|_| kind == Kind::Video)
        .map_or(0, |ended| ended.video_shown);
    plan.expected_tracks(participant, kind, lost).max(shown)
}

/// States how many frames ought to have been timed and how many streams heard, so that those that
/// never came count as worse than everything.
pub(super) fn expect_frames(record: &mut Record) {
    for media in [&mut record.audio, &mut record.video] {
        // Frames from a host of unknown clock are left out: they did come.
        media
            .one_way_latency
            .expect(media.frames_expected.saturating_sub(media.frames_untimed));
    }
    record.audio.mos.expect(record.audio.tracks_expected);
}

/// Joins that were wanted, and what each of them was to bring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Joins {
    pub count: u32,
    /// Joins of participants that should receive a track.
    pub receivers: u32,
    /// Subscriptions of those.
    pub tracks: [u64; 2],
}

impl Joins {
    pub fn add(&mut self, plan: &Plan, lost: &LostPublishers, participant: &ParticipantPlan) {
        let tracks = KINDS.map(|kind| u64::from(plan.expected_tracks(participant, kind, lost)));
        self.count += 1;
        self.receivers += u32::from(tracks != [0, 0]);
        (0..2).for_each(|kind| self.tracks[kind] += tracks[kind]);
    }
}

/// States how often what happens once for each join, or for each subscription of one who joined,
/// ought to have happened.
pub(super) fn expect_joins(record: &mut Record, joins: &Joins) {
    let (receivers, [audio_tracks, video_tracks]) = (joins.receivers.into(), joins.tracks);
    let session = &mut record.session;
    for histogram in [
        &mut session.join,
        &mut session.signal_connect,
        &mut session.signal_join,
        &mut session.ice,
        &mut session.dtls,
    ] {
        histogram.expect(joins.count.into());
    }
    session.first_media.expect(receivers);
    for (media, tracks) in [
        (&mut record.audio, audio_tracks),
        (&mut record.video, video_tracks),
    ] {
        for histogram in [
            &mut media.track_subscribe,
            &mut media.first_packet,
            &mut media.first_frame,
        ] {
            histogram.expect(tracks);
        }
    }
}

/// Tracks and participants are a state, not a flow: a step shows how many there are, not how many
/// came during it.
pub(super) fn state_of_all(step: &mut Record, all: &Record) {
    let (from, to) = (&all.session, &mut step.session);
    (
        to.participants_total,
        to.participants_healthy,
        to.joins_planned,
    ) = (
        from.participants_total,
        from.participants_healthy,
        from.joins_planned,
    );
    (to.joins_ok, to.joins_failed) = (from.joins_ok, from.joins_failed);
    (to.joins_by_udp, to.joins_by_tcp) = (from.joins_by_udp, from.joins_by_tcp);
    for (from, to) in [(&all.audio, &mut step.audio), (&all.video, &mut step.video)] {
        let Media {
            tracks_published,
            tracks_expected,
            tracks_live,
            ..
        } = from;
        (to.tracks_published, to.tracks_expected, to.tracks_live) =
            (*tracks_published, *tracks_expected, *tracks_live);
    }
}

/// What a participant received of one kind of media, over all its connections. Tracks of those who
/// are lost, by index, do not stand for others.
pub fn quality(
    peers: &[&PeerOutcome],
    kind: Kind,
    tracks_expected: u32,
    is_lost: impl Fn(u32) -> bool,
) -> MediaQuality {
    let mut quality = MediaQuality {
        tracks_expected: tracks_expected.into(),
        played_us: is_measured(Some(kind), "played_us").then_some(0),
        concealed_us: is_measured(Some(kind), "concealed_us").then_some(0),
        ..MediaQuality::default()
    };
    let streams = peers
        .iter()
        .flat_map(|peer| &peer.streams)
        .filter(|stream| stream.kind == kind && stream.origin.is_some());
    let mut live = BTreeSet::new();
    for stream in streams {
        live.extend(
            stream
                .origin
                .filter(|origin| stream.live && !is_lost(origin.publisher)),
        );
        quality.packets_received += stream.counts.received;
        quality.packets_lost_network += stream.counts.lost_network;
        quality.packets_repaired += stream.counts.repaired;
        quality.packets_lost += stream.counts.lost;
        quality.frames_expected += stream.frames_expected;
        quality.frames_delivered += stream.frames_delivered;
        quality.frames_lost_source += stream.losses.source;
        quality.frames_lost_uplink += stream.losses.uplink;
        quality.frames_lost_sfu += stream.losses.sfu;
        quality.frames_lost_downlink += stream.losses.downlink;
        quality.frames_lost_unattributed += stream.losses.unattributed;
        quality.frames_late += stream.frames_late;
        quality.freezes += stream.freezes;
        quality.frames_late_for_playout += stream.frames_late_for_playout;
        quality.played_us = quality.played_us.map(|us| us + stream.played_us);
        quality.concealed_us = quality.concealed_us.map(|us| us + stream.concealed_us);
        quality.mos = [
            quality.mos,
            stream.mos_thousandths.map(|mos| mos as f64 / 1e3),
        ]
        .into_iter()
        .flatten()
        .reduce(f64::min);
        quality.one_way_us_mean = quality.one_way_us_mean.max(stream.latency_us_mean);
        quality.one_way_us_max = quality.one_way_us_max.max(stream.latency_us_max);
        quality.jitter_us = quality
            .jitter_us
            .max(Some(stream.jitter.as_micros() as u64));
    }
    quality.tracks_live = live.len() as u64;
    quality
}
