//! Completes a run's record when the run is over: how much was expected, and how each participant
//! fared.

use std::collections::{BTreeMap, BTreeSet};

use crate::engine::PeerOutcome;
use crate::engine::subscriber::StreamOutcome;
use crate::measure::{Kind, Media, Record, is_measured};
use crate::plan::ParticipantPlan;
use crate::report::MediaQuality;
use crate::signal::session::Ended;
use crate::units::Time;

use super::dues::{Dues, OwedTracks};

const KINDS: [Kind; 2] = [Kind::Audio, Kind::Video];

/// Sets how many tracks were expected, and how many went live. A track that came twice, on another
/// SSRC, does not stand for one that never came.
///
/// `admitted`: participants that were due at one time or another.
pub(super) fn state_tracks(
    record: &mut Record,
    dues: &Dues<'_>,
    admitted: &[ParticipantPlan],
    outcomes: &[PeerOutcome],
    ended: &BTreeMap<u32, Ended>,
) {
    for kind in KINDS {
        let mut live: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
        for peer in outcomes {
            let streams = peer.streams.iter();
            let streams = streams.filter(|stream| stream.kind == kind && stream.live);
            let publishers = streams.filter_map(|stream| Some(stream.origin?.publisher));
            live.entry(peer.participant).or_default().extend(publishers);
        }
        let (mut tracks_expected, mut tracks_live) = (0, 0);
        for participant in admitted {
            let owed = dues.of(participant, kind, Time::ZERO);
            let index = participant.index;
            tracks_expected += u64::from(expected_tracks(&owed, kind, ended.get(&index)));
            let live = live.get(&index).into_iter().flatten();
            tracks_live += live.filter(|publisher| owed.has(**publisher)).count() as u64;
        }
        let media = record.media(kind);
        (media.tracks_expected, media.tracks_live) = (tracks_expected, tracks_live);
    }
}

pub(super) fn by_participant(outcomes: &[PeerOutcome]) -> BTreeMap<u32, Vec<&PeerOutcome>> {
    let mut peers: BTreeMap<u32, Vec<&PeerOutcome>> = BTreeMap::new();
    outcomes
        .iter()
        .for_each(|peer| peers.entry(peer.participant).or_default().push(peer));
    peers
}

/// Counts tracks published by nobody of this run. Every subscriber in a room is expected to get as
/// many as any other there got.
pub(super) fn foreign_tracks<'a>(
    people: impl Iterator<Item = (u32, Vec<&'a PeerOutcome>)>,
) -> [ForeignTracks; 2] {
    let mut rooms: BTreeMap<u32, [(u64, u64, u64); 2]> = BTreeMap::new();
    for (room, peers) in people {
        let kinds = rooms.entry(room).or_default();
        for (kind, (people, most, sum)) in KINDS.into_iter().zip(kinds) {
            let streams = peers.iter().flat_map(|peer| &peer.streams);
            let is_foreign = |stream: &&StreamOutcome| stream.kind == kind && stream.foreign;
            let live = streams.filter(is_foreign).count() as u64;
            *people += 1;
            *most = live.max(*most);
            *sum += live;
        }
    }
    let mut all = [ForeignTracks::default(); 2];
    for kinds in rooms.values() {
        for (of_kind, (people, most, sum)) in all.iter_mut().zip(kinds) {
            of_kind.expected += people * most;
            of_kind.live += sum;
        }
    }
    all
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ForeignTracks {
    pub expected: u64,
    pub live: u64,
}

impl ForeignTracks {
    pub fn state(self, media: &mut Media) {
        media.foreign_tracks_expected = self.expected;
        media.foreign_tracks_live = self.live;
    }
}

/// Tracks that a participant should have received: those that it was owed, or more if its layout
/// had room for others later.
pub(super) fn expected_tracks(owed: &OwedTracks, kind: Kind, ended: Option<&Ended>) -> u32 {
    let shown = ended
        .filter(|_| kind == Kind::Video)
        .map_or(0, |ended| ended.video_shown);
    owed.count.max(shown)
}

/// Sets how many frames should have been timed and how many streams heard. Missing ones then count
/// as worse than everything.
pub(super) fn expect_frames(record: &mut Record) {
    for media in [&mut record.audio, &mut record.video] {
        // Frames from a host whose clock is unknown are left out, because they did arrive.
        media
            .one_way_latency
            .expect(media.frames_expected.saturating_sub(media.frames_untimed));
    }
    record.audio.mos.expect(record.audio.tracks_expected);
}

/// Number of joins that were wanted, and the tracks that they should bring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Joins {
    pub count: u32,
    /// Joins of participants that should receive a track.
    pub receivers: u32,
    /// Subscriptions of these participants, to audio and to video.
    pub tracks: [u64; 2],
}

impl Joins {
    /// Adds a participant that joins at this time, or is present.
    pub fn add(&mut self, dues: &Dues<'_>, participant: &ParticipantPlan, since: Time) {
        let tracks = KINDS.map(|kind| u64::from(dues.of(participant, kind, since).count));
        self.count += 1;
        self.receivers += u32::from(tracks != [0, 0]);
        (0..2).for_each(|kind| self.tracks[kind] += tracks[kind]);
    }
}

/// Sets how many values are expected in each histogram that gets one value for each join, or for
/// each subscription of a joining participant.
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

/// Copies the numbers of tracks and participants. They are states and not flows, so a step shows
/// how many there are, and not how many came during it.
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
    to.joins_by_turn_udp = from.joins_by_turn_udp;
    to.joins_by_turn_tcp = from.joins_by_turn_tcp;
    to.joins_by_turn_tls = from.joins_by_turn_tls;
    for (from, to) in [(&all.audio, &mut step.audio), (&all.video, &mut step.video)] {
        let Media {
            tracks_published,
            tracks_expected,
            tracks_live,
            foreign_tracks_expected,
            foreign_tracks_live,
            ..
        } = from;
        (to.tracks_published, to.tracks_expected, to.tracks_live) =
            (*tracks_published, *tracks_expected, *tracks_live);
        (to.foreign_tracks_expected, to.foreign_tracks_live) =
            (*foreign_tracks_expected, *foreign_tracks_live);
    }
}

/// Returns what a participant received of one kind of media, over all its connections. `is_owed`
/// takes a publisher's index: tracks of publishers that owe it none do not stand for others.
pub fn quality(
    peers: &[&PeerOutcome],
    kind: Kind,
    tracks_expected: u32,
    is_owed: impl Fn(u32) -> bool,
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
                .filter(|origin| stream.live && is_owed(origin.publisher)),
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
