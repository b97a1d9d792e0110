//! Layers, mutes and speakers, on a real LiveKit server and on the embedded SFU.

use crate::common::program;
use std::time::Duration;

use crate::common::on_both_servers;
use crate::common::people::People;
use crate::common::program::{Report, Scratch, against, alone, throng};
use crate::common::server::Server;
use throng::engine::AUDIO_TRACK;
use throng::measure::Kind;
use throng::media::identity::Origin;
use throng::signal::session::Request;

on_both_servers!(
    subscribers_get_the_layer_that_they_ask_for_within_a_second,
    layers_that_nobody_watches_rest_until_somebody_does,
    without_dynacast_layers_that_nobody_watches_are_sent_all_the_same,
    a_muted_track_is_silent_and_comes_back_with_a_key_frame,
    the_large_picture_follows_the_speakers,
);

/// Picture size that asks for each layer of `pair::layers`.
const SIZES: [Option<(u32, u32)>; 3] = [Some((96, 54)), Some((160, 90)), Some((320, 180))];

fn every_expected_frame_came(record: &throng::measure::Record, but: u64) {
    for media in [&record.audio, &record.video] {
        let missing = media.frames_expected - media.frames_delivered;
        assert!(
            missing <= but,
            "{missing} of {} frames missing",
            media.frames_expected
        );
        assert_eq!((media.frames_duplicate, media.packets_lost), (0, 0));
    }
    assert_eq!(
        (
            record.session.frames_misrouted,
            record.session.packets_rejected
        ),
        (0, 0)
    );
}

fn subscribers_get_the_layer_that_they_ask_for_within_a_second(server: &Server) {
    let _alone = alone();
    for single_connection in [false, true] {
        let mut people = People::join(server, 3, single_connection);
        // Everybody starts on the highest layer. One subscriber always stays on it, so that all
        // layers are sent all the time.
        for (round, layers) in [[2, 0, 1], [2, 1, 0], [2, 0, 2]].into_iter().enumerate() {
            // The server passes on a request for a key frame of the highest layer once a second. A
            // switch after that time does not wait for it.
            std::thread::sleep(Duration::from_millis(1_500));
            for (subscriber, layer) in (1..).zip(layers) {
                people.ask(subscriber, Request::Show(SIZES[layer]));
            }
            people.wait_until("the switches of a round", |record| {
                record.video.layer_switch.count() >= 2 * (round as u64 + 1)
            });
        }
        let (record, outcomes) = people.finish();
        let switch = &record.video.layer_switch;
        assert_eq!((switch.count(), switch.expected()), (6, 6));
        // Lateness of the test's host is not the server's fault.
        let late = record.engine.tick_late.max().unwrap();
        assert!(
            switch.max().unwrap() <= 1_000_000 + late,
            "{:?} us",
            switch.max()
        );
        let in_the_end = |participant| {
            let streams = outcomes
                .iter()
                .filter(|peer| peer.participant == participant)
                .flat_map(|peer| &peer.streams);
            streams
                .filter(|stream| stream.kind == Kind::Video)
                .find_map(|stream| stream.layer)
        };
        assert_eq!([1, 2, 3].map(in_the_end), [Some(2), Some(0), Some(2)]);
        // A switch may cut off the last frame of the earlier layer.
        every_expected_frame_came(&record, 6);
    }
}

fn layers_that_nobody_watches_rest_until_somebody_does(server: &Server) {
    let _alone = alone();
    let mut people = People::join(server, 2, true);
    (1..=2).for_each(|subscriber| people.ask(subscriber, Request::Show(SIZES[0])));
    // The server reports unwatched layers five seconds after both subscribers have switched down.
    // From then on only the lowest layer is sent.
    let mut before = people.frames();
    people.wait_for_frames("the higher layers rest", |_| true);
    loop {
        let start = people.frames();
        people.wait_for_frames("half a second of the lowest layer", |frames| {
            frames[0] >= start[0] + 8
        });
        let now = people.frames();
        if now[1] == start[1] && now[2] == start[2] {
            break;
        }
        assert!(
            now[0] < before[0] + 15 * 20,
            "after 20 s all layers are still sent"
        );
    }
    before = people.frames();
    // A slightly larger picture brings the middle layer back, but not the highest, without
    // disabling the track first.
    people.ask(1, Request::Show(SIZES[1]));
    people.wait_for_frames("the middle layer starts again", |frames| {
        frames[1] >= before[1] + 10
    });
    assert_eq!(people.frames()[2], before[2]);
    people.ask(1, Request::Show(None));
    people.ask(2, Request::Show(None));
    let (record, _) = people.finish();
    // Both higher layers rest for at least half a second. A slow host skips far fewer slots than
    // that.
    assert!(
        record.engine.send_slots_skipped < 25,
        "a layer at rest misses no slots"
    );
    every_expected_frame_came(&record, 4);
}

fn without_dynacast_layers_that_nobody_watches_are_sent_all_the_same(server: &Server) {
    let _alone = alone();
    let mut people = People::join_as(server, 1, true, false);
    people.ask(1, Request::Show(SIZES[0]));
    // The server reports unwatched layers five seconds after the subscriber has switched down. The
    // lowest layer has 15 frames a second.
    let start = people.frames();
    people.wait_for_frames("eight seconds", |frames| frames[0] >= start[0] + 8 * 15);
    let later = people.frames();
    people.wait_for_frames("another second", |frames| frames[0] >= later[0] + 15);
    let now = people.frames();
    assert!(
        now[1] > later[1] && now[2] > later[2],
        "{later:?}, then {now:?}"
    );
    people.finish();
}

fn a_muted_track_is_silent_and_comes_back_with_a_key_frame(server: &Server) {
    let _alone = alone();
    let mut people = People::join(server, 2, false);
    let mute = |kind, muted| Request::SetMuted { kind, muted };
    people.ask(0, mute(Kind::Audio, true));
    people.ask(0, mute(Kind::Video, true));
    let audio = Origin {
        publisher: 0,
        track: AUDIO_TRACK,
    };
    let frames = |people: &People| (people.roster.frames(audio, 0), people.frames());
    // By then the server and the shard know of the mute. The pause is long enough to count as a
    // freeze if it were one.
    std::thread::sleep(Duration::from_millis(500));
    let at_rest = frames(&people);
    std::thread::sleep(Duration::from_millis(1_500));
    assert_eq!(frames(&people), at_rest);
    let keys = people.record().video.key_frames_sent;
    people.ask(0, mute(Kind::Audio, false));
    people.ask(0, mute(Kind::Video, false));
    people.wait_for_frames("video again", |frames| {
        (0..3).all(|layer| frames[layer] >= at_rest.1[layer] + 20)
    });
    let (record, _) = people.finish();
    assert!(record.video.key_frames_sent >= keys + 3);
    // Slots for 50 packets and 65 frames a second passed for two seconds. A slow host skips far
    // fewer.
    assert!(
        record.engine.send_slots_skipped < 200,
        "a muted track misses no slots"
    );
    assert_eq!(
        (
            record.video.freezes,
            record.video.tracks_live,
            record.audio.tracks_live
        ),
        (0, 2, 2)
    );
    // The moment at which the server learns of a mute is not ours. It may drop a frame around each
    // change, at each of two subscribers.
    every_expected_frame_came(&record, 8);
}

fn the_large_picture_follows_the_speakers(server: &Server) {
    let _alone = alone();
    let scratch = Scratch::new();
    let args = "--publishers 3 --video-publishers 3 --subscribers 2 --layout speaker --simulate-speakers --audio-dtx --duration 9 --threads 1";
    let args = format!("{args} --video-resolution medium --seed 3");
    let mut command = throng();
    against(server, &mut command)
        .args(args.split(' '))
        .arg("--json")
        .arg(scratch.path("run.json"));
    let finished = program::Running::start(&mut command, &server.secret).finish();
    let report = Report::read(&scratch.path("run.json"), &server.secret);
    assert!(
        matches!(finished.code, Some(0 | 98)),
        "{}\n{}{}",
        report.reasons(),
        finished.stdout,
        finished.stderr
    );
    // There are three or four turns. Each is told to five participants: when it begins, by levels,
    // and when it ends.
    let updates = report.counter("session", "speaker_updates");
    assert!(updates >= 5 * 6, "{updates}");
    let switch = |stat| report.micros("video", "layer_switch", stat);
    // There are two subscribers. A new speaker becomes large and the old one small.
    assert!(switch("count") >= Some(4), "{:?}", switch("count"));
    assert!(
        finished.stdout.contains("layer switch")
            && finished.stdout.contains("Speaker updates received"),
        "{}",
        finished.stdout
    );
    // The first line names the server, so it may be longer.
    let too_long: Vec<&str> = finished
        .stdout
        .lines()
        .skip(1)
        .filter(|line| line.chars().count() > 80)
        .collect();
    assert_eq!(too_long, [""; 0]);
    assert_eq!(
        (
            report.counter("video", "tracks_expected"),
            report.counter("video", "tracks_live")
        ),
        (6, 6)
    );
}
