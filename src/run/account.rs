//! What a run's record says once it is over: how much there ought to have been, and how each participant fared.

use std::collections::{BTreeMap, BTreeSet};

use crate::engine::PeerOutcome;
use crate::measure::{Kind, Media, Record, is_measured};
use crate::plan::{ParticipantPlan, Plan};
use crate::report::Quality;
use crate::signal::session::Ended;

/// How many tracks there ought to be, and how many went live: a track that came twice, on another SSRC, does not stand for one that never came.
pub(super) fn state_tracks(record: &mut Record, plan: &Plan, outcomes: &[PeerOutcome], ended: &BTreeMap<u32, Ended>) {
    for kind in [Kind::Audio, Kind::Video] {
        let streams = outcomes
            .iter()
            .flat_map(|peer| peer.streams.iter().map(move |stream| (peer.participant, stream)));
        let live = streams.filter(|(_, stream)| stream.kind == kind && stream.live);
        let distinct: BTreeSet<_> = live.map(|(participant, stream)| (participant, stream.origin)).collect();
        let media = record.media(kind);
        let expected = plan
            .participants()
            .map(|participant| expected_tracks(plan, &participant, kind, ended.get(&participant.index)));
        media.tracks_expected = expected.map(u64::from).sum();
        media.tracks_live = distinct.len() as u64;
    }
}

/// Tracks that a participant ought to have received: those of the plan, and more where its layout had room for others later.
pub(super) fn expected_tracks(plan: &Plan, participant: &ParticipantPlan, kind: Kind, ended: Option<&Ended>) -> u32 {
    let shown = ended.filter(|_| kind == Kind::Video).map_or(0, |ended| ended.video_shown);
    plan.expected_tracks(participant, kind).max(shown)
}

/// States how many frames ought to have been timed and how many streams heard, so that those that never came count as worse than everything.
pub(super) fn expect_frames(record: &mut Record) {
    for media in [&mut record.audio, &mut record.video] {
        media.one_way_latency.expect(media.frames_expected);
    }
    record.audio.mos.expect(record.audio.tracks_expected);
}

/// The same for what happens once for each participant and each subscription: joining belongs to the whole run, not to a step.
pub(super) fn expect_joins(record: &mut Record, plan: &Plan) {
    let joins = u64::from(plan.total_participants());
    let receivers = plan
        .participants()
        .filter(|participant| [Kind::Audio, Kind::Video].iter().any(|kind| plan.expected_tracks(participant, *kind) > 0))
        .count() as u64;
    let session = &mut record.session;
    for histogram in [
        &mut session.join,
        &mut session.signal_connect,
        &mut session.signal_join,
        &mut session.ice,
        &mut session.dtls,
    ] {
        histogram.expect(joins);
    }
    session.first_media.expect(receivers);
    for media in [&mut record.audio, &mut record.video] {
        for histogram in [&mut media.track_subscribe, &mut media.first_packet, &mut media.first_frame] {
            histogram.expect(media.tracks_expected);
        }
    }
}

/// Tracks and participants are a state, not a flow: a step shows how many there are, not how many came during it.
pub(super) fn state_of_all(step: &mut Record, all: &Record) {
    let (from, to) = (&all.session, &mut step.session);
    (to.participants_total, to.participants_healthy, to.joins_planned) = (from.participants_total, from.participants_healthy, from.joins_planned);
    (to.joins_ok, to.joins_failed) = (from.joins_ok, from.joins_failed);
    for (from, to) in [(&all.audio, &mut step.audio), (&all.video, &mut step.video)] {
        let Media {
            tracks_published,
            tracks_expected,
            tracks_live,
            ..
        } = from;
        (to.tracks_published, to.tracks_expected, to.tracks_live) = (*tracks_published, *tracks_expected, *tracks_live);
    }
}

/// What counts for a tier, of the run's record `now`, as it was when the tier `began`, and when it was first `held`.
///
/// What happens once to a participant or a subscription (joining, the first frame, being lost) counts from the beginning, when the first one was to join or to
/// leave; everything else from the hold on.
pub(super) fn of_tier(now: &Record, began: &Record, held: &Record) -> Record {
    let mut tier = now.since(held);
    let (from, to, once) = (&now.session, &mut tier.session, &began.session);
    to.joins_ok = from.joins_ok - once.joins_ok;
    to.joins_failed = from.joins_failed - once.joins_failed;
    to.joins_retried = from.joins_retried - once.joins_retried;
    to.joins_planned = to.joins_ok + to.joins_failed;
    to.disconnects = from.disconnects - once.disconnects;
    to.reconnects_ok = from.reconnects_ok - once.reconnects_ok;
    to.reconnects_failed = from.reconnects_failed - once.reconnects_failed;
    to.join = from.join.since(&once.join);
    to.signal_connect = from.signal_connect.since(&once.signal_connect);
    to.signal_join = from.signal_join.since(&once.signal_join);
    to.ice = from.ice.since(&once.ice);
    to.dtls = from.dtls.since(&once.dtls);
    to.first_media = from.first_media.since(&once.first_media);
    to.reconnect = from.reconnect.since(&once.reconnect);
    for (from, to, once) in [(&now.audio, &mut tier.audio, &began.audio), (&now.video, &mut tier.video, &began.video)] {
        to.track_subscribe = from.track_subscribe.since(&once.track_subscribe);
        to.first_packet = from.first_packet.since(&once.first_packet);
        to.first_frame = from.first_frame.since(&once.first_frame);
    }
    expect_frames(&mut tier);
    tier
}

/// What a participant received of one kind of media, over all its connections.
pub fn quality(peers: &[&PeerOutcome], kind: Kind, tracks_expected: u32) -> Quality {
    let mut quality = Quality {
        tracks_expected: tracks_expected.into(),
        played_us: is_measured(Some(kind), "played_us").then_some(0),
        concealed_us: is_measured(Some(kind), "concealed_us").then_some(0),
        ..Quality::default()
    };
    let streams = peers
        .iter()
        .flat_map(|peer| &peer.streams)
        .filter(|stream| stream.kind == kind && stream.origin.is_some());
    let mut live = BTreeSet::new();
    for stream in streams {
        live.extend(stream.origin.filter(|_| stream.live));
        quality.packets_received += stream.counts.received;
        quality.packets_lost_network += stream.counts.lost_network;
        quality.packets_repaired += stream.counts.repaired;
        quality.packets_lost += stream.counts.lost;
        quality.frames_expected += stream.frames_expected;
        quality.frames_delivered += stream.frames_delivered;
        quality.frames_lost_uplink += stream.losses.uplink;
        quality.frames_lost_sfu += stream.losses.sfu;
        quality.frames_lost_downlink += stream.losses.downlink;
        quality.frames_lost_unattributed += stream.losses.unattributed;
        quality.frames_late += stream.frames_late;
        quality.freezes += stream.freezes;
        quality.frames_late_for_playout += stream.frames_late_for_playout;
        quality.played_us = quality.played_us.map(|us| us + stream.played_us);
        quality.concealed_us = quality.concealed_us.map(|us| us + stream.concealed_us);
        quality.mos = [quality.mos, stream.mos_thousandths.map(|mos| mos as f64 / 1e3)]
            .into_iter()
            .flatten()
            .reduce(f64::min);
        quality.one_way_us_mean = quality.one_way_us_mean.max(stream.latency_us_mean);
        quality.one_way_us_max = quality.one_way_us_max.max(stream.latency_us_max);
        quality.jitter_us = quality.jitter_us.max(Some(stream.jitter.as_micros() as u64));
    }
    quality.tracks_live = live.len() as u64;
    quality
}
