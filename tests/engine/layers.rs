//! Tests of a publisher's layers, and of a subscriber whose SFU switches between layers. The logs
//! of the link and of the SFU are the ground truth.

use crate::common::pair;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use crate::common::link::Conditions;
use crate::common::pair::{
    AUDIO_LEVEL_EXTENSION, AUDIO_SSRC, MID_EXTENSION, Pair, REPAIRED_RID_EXTENSION, RID_EXTENSION,
    RIDS, audio, layer_ssrc, layers,
};
use crate::common::switcher::{Downlink, World};
use throng::engine::publisher::{Pacing, SendParameters, SpeakerTurns, Talk};
use throng::engine::{AUDIO_TRACK, PeerKey, ShardCommand, VIDEO_TRACK};
use throng::media::identity::Origin;
use throng::media::opus::{AudioClip, AudioContent, OpusSpec};
use throng::transport::rtp::Header;
use throng::units::{Bitrate, Time};

/// Layers that are requested in turn. Repeated, the sequence has every switch from one layer to
/// another.
const TURNS: [usize; 6] = [0, 2, 1, 2, 0, 1];

/// A packet that left, with its time, its SSRC and its header extensions. Header extensions are not
/// encrypted.
#[derive(Clone)]
struct Sent {
    at: Time,
    ssrc: Ssrc,
    mid: Option<String>,
    rid: Option<String>,
    repaired_rid: Option<String>,
    level: Option<u8>,
    marker: bool,
}

/// Runs the pair for `time` and returns the packets that left during that time.
fn sent_during(pair: &mut Pair, time: Duration) -> Vec<Sent> {
    let log: Rc<RefCell<Vec<Sent>>> = Rc::default();
    let clock = Rc::new(RefCell::new(pair.now));
    let (writer, reader) = (log.clone(), clock.clone());
    pair.on_sent = Box::new(move |datagram| {
        let header = Header::parse(&datagram.bytes).unwrap();
        let text = |id| {
            header
                .extension(&datagram.bytes, id)
                .map(|value| String::from_utf8_lossy(value).into_owned())
        };
        writer.borrow_mut().push(Sent {
            at: *reader.borrow(),
            ssrc: header.ssrc,
            mid: text(MID_EXTENSION),
            rid: text(RID_EXTENSION),
            repaired_rid: text(REPAIRED_RID_EXTENSION),
            level: header
                .extension(&datagram.bytes, AUDIO_LEVEL_EXTENSION)
                .and_then(|value| value.first().copied()),
            marker: header.marker,
        });
    });
    let end = pair.now + time;
    while pair.now < end {
        *clock.borrow_mut() = pair.now + Duration::from_millis(1);
        pair.tick();
    }
    pair.on_sent = Box::new(|_| {});
    log.borrow().clone()
}

#[test]
fn packets_name_their_layer_until_the_first_receiver_report_and_retransmissions_always_do() {
    let mut pair = Pair::connected(1);
    pair.publish_layers(&layers(), Pacing::Burst);
    // The other end sends reports once a second, and the first one after 0.1 to 0.3 s.
    let early = sent_during(&mut pair, Duration::from_millis(90));
    for (layer, rid) in (0..3).zip(RIDS) {
        let of_layer: Vec<_> = early
            .iter()
            .filter(|sent| sent.ssrc == layer_ssrc(layer))
            .collect();
        assert!(of_layer.len() >= 2);
        assert!(
            of_layer
                .iter()
                .all(|sent| sent.mid.as_deref() == Some("1") && sent.rid.as_deref() == Some(rid))
        );
    }
    pair.run_for(Duration::from_millis(1_500));
    pair.set_conditions(Conditions {
        loss: 0.1,
        delay: Duration::from_millis(10),
        ..Conditions::default()
    });
    let later = sent_during(&mut pair, Duration::from_secs(5));
    let mut retransmissions = BTreeSet::new();
    for sent in later {
        match RIDS
            .iter()
            .zip(0..)
            .find(|(_, layer)| sent.ssrc == Ssrc(layer_ssrc(*layer).0 + 1))
        {
            None => assert_eq!((sent.mid, sent.rid, sent.repaired_rid), (None, None, None)),
            Some((rid, layer)) => {
                assert_eq!(
                    (sent.mid.as_deref(), sent.rid, sent.repaired_rid.as_deref()),
                    (Some("1"), None, Some(*rid))
                );
                retransmissions.insert(layer);
            }
        }
    }
    assert_eq!(retransmissions, BTreeSet::from([0, 1, 2]));
    let [sender, receiver] = pair.finish();
    assert_eq!(
        (
            sender.video.tracks_published,
            receiver.session.packets_rejected
        ),
        (1, 0)
    );
    assert_eq!(
        receiver.video.frames_delivered,
        receiver.video.frames_expected
    );
    assert_eq!(receiver.video.packets_lost, 0);
}

#[test]
fn each_layer_has_its_own_rate_and_its_first_key_frame_comes_twice() {
    let mut pair = Pair::connected(2);
    pair.publish_layers(&layers(), Pacing::Paced);
    pair.run_for(Duration::from_secs(4));
    let roster = pair.roster.clone();
    let [sender, receiver] = pair.finish();
    let origin = Origin {
        publisher: 0,
        track: VIDEO_TRACK,
    };
    let frames: Vec<u32> = (0..3).map(|layer| roster.frames(origin, layer)).collect();
    for (frames, fps) in frames.iter().zip([15, 20, 30]) {
        assert!(frames.abs_diff(4 * fps) <= 1, "{frames} at {fps} fps");
    }
    assert_eq!(
        sender.video.frames_sent,
        frames.iter().map(|frames| u64::from(*frames)).sum::<u64>()
    );
    assert_eq!(
        (sender.video.key_frames_sent, sender.session.plis_received),
        (6, 0)
    );
    assert_eq!(receiver.video.frames_delivered, sender.video.frames_sent);
    assert_eq!(receiver.video.frames_expected, sender.video.frames_sent);
    // Every layer sends sender reports. Three report blocks a second measure their round trips.
    assert!(
        sender.session.rtt_rtcp.count() >= 9,
        "{}",
        sender.session.rtt_rtcp.count()
    );
}

#[test]
fn a_layer_that_nobody_watches_rests_and_starts_again_with_a_key_frame_in_its_old_slots() {
    let mut pair = Pair::connected(3);
    pair.publish_layers(&layers(), Pacing::Burst);
    let start = pair.now + Duration::from_millis(1);
    pair.run_for(Duration::from_secs(2));
    let set = |layers| ShardCommand::SetLayers {
        key: PeerKey(0),
        track: VIDEO_TRACK,
        layers,
    };
    pair.command(set(0b011));
    let resting = sent_during(&mut pair, Duration::from_secs(2));
    let count = |sent: &[Sent], layer| {
        sent.iter()
            .filter(|sent| sent.ssrc == layer_ssrc(layer) && sent.marker)
            .count()
    };
    assert_eq!(
        (count(&resting, 0), count(&resting, 1), count(&resting, 2)),
        (30, 40, 0)
    );
    let keys_before = pair.shards[0]
        .swap_record(Box::default())
        .video
        .key_frames_sent;
    assert_eq!(keys_before, 6);
    pair.command(set(0b111));
    let awake = sent_during(&mut pair, Duration::from_secs(2));
    assert_eq!(
        (count(&awake, 0), count(&awake, 1), count(&awake, 2)),
        (30, 40, 60)
    );
    for sent in awake.iter().filter(|sent| sent.ssrc == layer_ssrc(2)) {
        // The layer has 30 slots a second since the track began, each on a whole millisecond.
        let slot = (sent.at.since(start).as_secs_f64() * 30.0).round();
        let off = sent.at.since(start).as_secs_f64() - slot / 30.0;
        assert!((-0.000_001..0.002).contains(&off), "{off}");
    }
    // The same request a second time changes nothing.
    pair.command(set(0b111));
    let [sender, receiver] = pair.finish();
    assert_eq!(
        (
            sender.video.key_frames_sent,
            sender.engine.send_slots_skipped
        ),
        (1, 0)
    );
    assert_eq!(
        receiver.video.frames_delivered,
        receiver.video.frames_expected
    );
    assert_eq!(receiver.session.plis_sent, 0, "nobody had to ask");
}

#[test]
fn a_muted_track_sends_nothing_and_is_neither_lost_nor_frozen() {
    let mut pair = Pair::connected(4);
    let mut tracks: Vec<SendParameters> = vec![pair.track(&audio(), 0, Pacing::Paced)];
    tracks.push(pair.track(&pair::video(), 0, Pacing::Paced));
    pair.publish_tracks(tracks);
    pair.run_for(Duration::from_secs(3));
    let mute = |track, muted| ShardCommand::SetMuted {
        key: PeerKey(0),
        track,
        muted,
    };
    pair.command(mute(AUDIO_TRACK, true));
    pair.command(mute(VIDEO_TRACK, true));
    // Packets that wait in the pacer still leave.
    pair.run_for(Duration::from_millis(100));
    assert_eq!(sent_during(&mut pair, Duration::from_secs(3)).len(), 0);
    pair.command(mute(AUDIO_TRACK, false));
    let speaks = sent_during(&mut pair, Duration::from_secs(1));
    assert!(
        speaks.len().abs_diff(50) <= 1 && speaks.iter().all(|sent| sent.ssrc == Ssrc(AUDIO_SSRC))
    );
    assert!(speaks[0].marker && !speaks[1].marker, "a talkspurt begins");
    pair.command(mute(VIDEO_TRACK, false));
    pair.run_for(Duration::from_secs(2));
    // A track that is muted to the end causes no freeze either.
    pair.command(mute(VIDEO_TRACK, true));
    pair.run_for(Duration::from_secs(2));
    let [sender, receiver] = pair.finish();
    assert_eq!(
        (
            sender.video.key_frames_sent,
            sender.engine.send_slots_skipped
        ),
        (2, 0)
    );
    for (sent, received) in [
        (&sender.audio, &receiver.audio),
        (&sender.video, &receiver.video),
    ] {
        assert_eq!(
            (received.frames_delivered, received.frames_expected),
            (sent.frames_sent, sent.frames_sent)
        );
        assert_eq!((received.packets_lost_network, received.freezes), (0, 0));
    }
    assert!(
        receiver.video.frame_interval.max().unwrap() < 1_000_000,
        "the pause is no interval"
    );
    assert!(
        sender.audio.frames_sent.abs_diff(8 * 50) <= 10
            && sender.video.frames_sent.abs_diff(5 * 15) <= 3
    );
}

/// Returns a clip like that of `audio()`, with this content and this use of DTX.
fn clip(content: AudioContent, dtx: bool) -> AudioClip {
    let spec = OpusSpec {
        bitrate: Bitrate::from_bps(24_000),
        frame: Duration::from_millis(20),
        content,
        dtx,
        seed: 1,
    };
    AudioClip::generate(&spec).unwrap()
}

#[test]
fn one_who_is_not_to_speak_is_silent_and_says_so() {
    for dtx in [false, true] {
        let mut pair = Pair::connected(5);
        let turns = SpeakerTurns::new(1, 0, 2);
        let talk = Talk {
            turns,
            place: 0,
            silence: Arc::new(clip(AudioContent::Silence, dtx)),
        };
        let track = SendParameters {
            talk: Some(talk),
            ..pair.track(&audio(), 0, Pacing::Paced)
        };
        pair.publish_tracks(vec![track]);
        let log = sent_during(&mut pair, 6 * SpeakerTurns::TURN);
        let mut levels: BTreeMap<bool, Vec<u8>> = BTreeMap::new();
        for sent in log {
            levels
                .entry(turns.speaker_at(sent.at) == Some(0))
                .or_default()
                .push(sent.level.unwrap());
        }
        // Three of the six turns are this participant's, with 125 packets of speech each. The rest
        // is silence. With DTX, hardly any of it is sent.
        assert!(
            levels[&true].len().abs_diff(3 * 125) <= 4,
            "{}",
            levels[&true].len()
        );
        let silent = 900 - levels[&true].len();
        if dtx {
            assert!(
                (10..silent / 10).contains(&levels[&false].len()),
                "{}",
                levels[&false].len()
            )
        } else {
            assert_eq!(levels[&false].len(), silent)
        }
        assert!(
            levels[&false].iter().all(|level| *level == 127),
            "digital silence, and no voice"
        );
        // LiveKit calls a participant active that is louder than -35 dBov for 40 % of the time.
        let loud = levels[&true]
            .iter()
            .filter(|level| **level & 0x80 != 0 && **level & 0x7F <= 35)
            .count();
        assert!(
            loud * 10 >= levels[&true].len() * 4,
            "{loud} of {}",
            levels[&true].len()
        );
        let [sender, receiver] = pair.finish();
        assert_eq!(receiver.audio.packets_received, sender.audio.packets_sent);
        assert_eq!(receiver.audio.frames_delivered, sender.audio.frames_sent);
        assert_eq!(receiver.audio.frames_expected, sender.audio.frames_sent);
        // Packets of comfort noise have no room for an identity. They count as packets, but not as
        // frames.
        assert_eq!(sender.audio.frames_sent < sender.audio.packets_sent, dtx);
    }
}

#[test]
fn over_switches_that_lose_nothing_every_frame_that_was_forwarded_is_expected_and_delivered() {
    for seed in 1..=5u64 {
        let mut world = World::new(seed, Downlink::default());
        for turn in 0..20 {
            world.ask(TURNS[(turn + seed as usize) % TURNS.len()]);
            world.run_for(Duration::from_millis(700));
        }
        let (log, record) = world.finish();
        assert!(log.switches >= 10);
        assert_eq!(record.video.frames_delivered, log.forwarded, "seed {seed}");
        assert_eq!(record.video.frames_expected, log.forwarded, "seed {seed}");
        assert_eq!(
            (
                record.video.frames_duplicate,
                record.session.frames_misrouted
            ),
            (0, 0)
        );
        let switch = &record.video.layer_switch;
        assert_eq!(
            (switch.count(), switch.expected()),
            (log.switches, log.switches),
            "seed {seed}"
        );
        // A key frame leaves with the layer's next frame, at most 66.7 ms away.
        assert!(switch.max().unwrap() <= 68_000, "{:?}", switch.max());
        assert_eq!((record.video.freezes, record.video.tracks_live), (0, 1));
    }
}

#[test]
fn frames_that_an_sfu_withholds_while_it_switches_are_expected_and_missing() {
    for seed in 1..=5 {
        let mut world = World::new(
            seed,
            Downlink {
                dark: Duration::from_millis(150 + 40 * seed),
                ..Downlink::default()
            },
        );
        for turn in 0..12 {
            world.ask(TURNS[(turn + seed as usize) % TURNS.len()]);
            world.run_for(Duration::from_millis(1_500));
        }
        let (log, record) = world.finish();
        assert!(log.switches >= 6 && log.withheld > 20);
        assert_eq!(record.video.frames_delivered, log.forwarded, "seed {seed}");
        assert_eq!(
            record.video.frames_expected - record.video.frames_delivered,
            log.withheld,
            "seed {seed}"
        );
        assert_eq!(
            record.video.frames_lost_sfu, log.withheld,
            "seed {seed}: no number is missing, so it never sent them"
        );
        assert_eq!(record.video.layer_switch.count(), log.switches);
    }
}

#[test]
fn a_layer_that_never_comes_is_a_switch_that_never_happens() {
    let mut world = World::new(
        1,
        Downlink {
            stuck: true,
            ..Downlink::default()
        },
    );
    world.run_for(Duration::from_secs(1));
    world.ask(2);
    world.run_for(Duration::from_secs(3));
    let (_, record) = world.finish();
    let switch = &record.video.layer_switch;
    assert_eq!(
        (switch.count(), switch.expected(), switch.quantile(0.5)),
        (0, 1, None)
    );
    // A switch that is requested just before the end is not counted as expected.
    let mut world = World::new(
        1,
        Downlink {
            stuck: true,
            ..Downlink::default()
        },
    );
    world.run_for(Duration::from_secs(1));
    world.ask(2);
    world.run_for(Duration::from_millis(500));
    let (_, record) = world.finish();
    assert_eq!(record.video.layer_switch.expected(), 0);
}

#[test]
fn a_picture_that_nobody_asks_for_is_not_expected() {
    let mut world = World::new(3, Downlink::default());
    world.ask(1);
    world.run_for(Duration::from_secs(2));
    world.ask_for_nothing();
    world.run_for(Duration::from_secs(3));
    world.ask(1);
    world.run_for(Duration::from_secs(2));
    world.ask_for_nothing();
    world.run_for(Duration::from_secs(1));
    let (log, record) = world.finish();
    assert!((70..=90).contains(&log.forwarded), "{}", log.forwarded);
    assert_eq!(record.video.frames_delivered, log.forwarded);
    assert_eq!(record.video.frames_expected, log.forwarded);
    assert_eq!((record.video.freezes, log.plis), (0, 0));
}

#[test]
fn under_loss_no_more_frames_are_delivered_than_expected() {
    for seed in 1..=5 {
        let mut world = World::new(
            seed,
            Downlink {
                loss: 0.05,
                ..Downlink::default()
            },
        );
        for turn in 0..20 {
            world.ask(TURNS[(turn + seed as usize) % TURNS.len()]);
            world.run_for(Duration::from_millis(700));
        }
        let (log, record) = world.finish();
        let (expected, delivered) = (record.video.frames_expected, record.video.frames_delivered);
        assert_eq!(delivered, log.arrived, "seed {seed}");
        assert!(
            delivered < expected,
            "seed {seed}: {delivered} of {expected}"
        );
        // If the last frame before a switch or the first one after it is lost, the number of
        // missing frames is estimated from the earlier layer's rate. The estimate is off by one at
        // most.
        assert!(
            expected.abs_diff(log.forwarded) <= log.switches,
            "seed {seed}: {expected} expected, {log:?}"
        );
    }
}
