//! Participants that the server takes out of a run before the plan ends them, on a real LiveKit
//! server and on the embedded SFU. The run fails, and says who, when and why.

use std::time::{Duration, Instant};

use crate::common::on_both_servers;
use crate::common::program::{
    Finished, PATIENCE, Report, Running, Scratch, against, beside_one_other, throng,
};
use crate::common::server::{Options, Server};
use livekit_protocol as proto;
use serde_json::{Value, json};
use throng::signal::rooms::RoomService;
use throng::signal::token::Permissions;

on_both_servers!(
    a_publisher_that_is_removed_fails_the_run_and_is_named,
    a_subscriber_that_is_removed_fails_the_run_whatever_the_loss,
    a_viewer_of_somebody_elses_stream_that_is_removed_fails_the_run,
    publishers_that_are_removed_in_a_tier_fail_that_tier,
    a_room_that_somebody_deletes_fails_the_run,
);

/// A run in a room of its own, with the room service beside it.
struct Disturbed<'a> {
    server: &'a Server,
    room: &'static str,
    running: Running,
    scratch: Scratch,
    rooms: RoomService,
    runtime: tokio::runtime::Runtime,
}

impl<'a> Disturbed<'a> {
    /// Starts a run, and waits until the room has `publishers` publishers and `participants`
    /// participants.
    fn start(
        server: &'a Server,
        room: &'static str,
        args: &str,
        publishers: usize,
        participants: usize,
    ) -> Disturbed<'a> {
        let mut command = throng();
        against(server, &mut command)
            .args(args.split(' '))
            .args(["--room", room]);
        Disturbed::begin(server, room, command, [publishers, participants])
    }

    /// The same with a command of one's own.
    fn begin(
        server: &'a Server,
        room: &'static str,
        mut command: std::process::Command,
        [publishers, participants]: [usize; 2],
    ) -> Disturbed<'a> {
        let scratch = Scratch::new();
        command.arg("--json").arg(scratch.path("run.json"));
        let run = Disturbed {
            server,
            room,
            running: Running::start(&mut command, &server.secret),
            scratch,
            rooms: RoomService::new(server.endpoint(), server.api_key()),
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap(),
        };
        let deadline = Instant::now() + PATIENCE;
        while run.active().len() < participants || run.publishers().len() < publishers {
            assert!(Instant::now() < deadline, "{:?}", run.active());
            std::thread::sleep(Duration::from_millis(50));
        }
        run
    }

    fn active(&self) -> Vec<proto::ParticipantInfo> {
        let inside = self
            .runtime
            .block_on(self.rooms.list_participants(self.room));
        let is_active = |one: &proto::ParticipantInfo| {
            one.state == i32::from(proto::participant_info::State::Active)
        };
        inside
            .unwrap_or_default()
            .into_iter()
            .filter(is_active)
            .collect()
    }

    fn publishers(&self) -> Vec<String> {
        let publish = |one: &proto::ParticipantInfo| !one.tracks.is_empty();
        let publishers = self.active().into_iter().filter(publish);
        publishers.map(|one| one.identity).collect()
    }

    /// Returns a participant that publishes nothing.
    fn listener(&self) -> String {
        let listens = |one: &proto::ParticipantInfo| one.tracks.is_empty();
        self.active().into_iter().find(listens).unwrap().identity
    }

    fn ask(&self, method: &str, request: Value) {
        self.server.ask(self.room, method, request);
    }

    fn remove(&self, identity: &str) {
        self.ask("RemoveParticipant", json!({ "identity": identity }));
    }

    /// Asserts that the run fails. A busy host may make it INVALID instead, with the same reasons.
    fn fails(self) -> (Finished, Report) {
        self.ends_with(99)
    }

    /// Asserts that the run passes, or is INVALID because this host was too busy.
    fn passes(self) -> (Finished, Report) {
        self.ends_with(0)
    }

    fn ends_with(self, code: i32) -> (Finished, Report) {
        let finished = self.running.finish();
        let report = Report::read(&self.scratch.path("run.json"), &self.server.secret);
        let expected = if report.result() == "INVALID" {
            98
        } else {
            code
        };
        assert_eq!(
            finished.code,
            Some(expected),
            "{}\n{}",
            report.reasons(),
            finished.stdout
        );
        (finished, report)
    }
}

const PLACES: [&str; 5] = [
    "frames_lost_source",
    "frames_lost_uplink",
    "frames_lost_sfu",
    "frames_lost_downlink",
    "frames_lost_unattributed",
];

fn account(report: &Report, kind: &str) -> (u64, u64, u64) {
    let count = |name| report.counter(kind, name);
    let lost: u64 = PLACES.iter().map(|place| count(place)).sum();
    assert_eq!(count("frames_expected") - count("frames_delivered"), lost);
    (count("frames_expected"), lost, count("frames_lost_source"))
}

fn a_publisher_that_is_removed_fails_the_run_and_is_named(server: &Server) {
    let _turn = beside_one_other();
    let args =
        "--publishers 2 --video-publishers 0 --subscribers 3 --duration 15 --num-per-second 50";
    let run = Disturbed::start(server, "removes", args, 2, 5);
    std::thread::sleep(Duration::from_secs(5));
    let victim = run.publishers().remove(0);
    run.remove(&victim);
    let (finished, report) = run.fails();
    let reasons = report.reasons();
    let named = format!("publisher {victim} was removed by the server (PARTICIPANT_REMOVED) ");
    assert!(reasons.contains(&named), "{reasons}");
    assert!(reasons.contains("into the run, ") && reasons.contains("before the plan ended it"));
    // The removed publisher misses nine or ten of its fifteen seconds, for three subscribers. That
    // is a third of what two publishers owe.
    let (expected, lost, source) = account(&report, "audio");
    assert!(expected > 2 * 3 * 14 * 50, "{expected}");
    assert!(source > 3 * 7 * 50 && source <= 3 * 11 * 50, "{source}");
    assert!(lost - source < 3 * 50, "{lost} {source}");
    let healthy = report.counter("session", "participants_healthy");
    assert_eq!(healthy, 1, "the other publisher");
    assert!(
        finished.stdout.contains("source gone"),
        "{}",
        finished.stdout
    );
}

fn a_subscriber_that_is_removed_fails_the_run_whatever_the_loss(server: &Server) {
    let _turn = beside_one_other();
    for (room, pace) in [
        ("listener", "--subscribers 9 --duration 6"),
        ("listener-in-tiers", "--ramp 3,6 --duration 4"),
    ] {
        let args = format!(
            "--publishers 1 --video-publishers 0 {pace} --num-per-second 50 --max-loss 100"
        );
        let run = Disturbed::start(server, room, &args, 1, 4);
        std::thread::sleep(Duration::from_secs(2));
        let victim = run.listener();
        run.remove(&victim);
        let (_, report) = run.fails();
        let reasons = report.reasons();
        let named = format!("subscriber {victim} was removed by the server (PARTICIPANT_REMOVED) ");
        assert!(reasons.contains(&named), "{reasons}");
        assert!(!reasons.contains("loss "), "{reasons}");
    }
}

fn a_viewer_of_somebody_elses_stream_that_is_removed_fails_the_run(server: &Server) {
    let _turn = beside_one_other();
    let mut presenter = throng();
    against(server, &mut presenter).args(
        "--room viewed --publishers 1 --video-publishers 0 --subscribers 0 --duration 14"
            .split(' '),
    );
    let presenter = Running::start(&mut presenter, &server.secret);
    let args = "--publishers 0 --subscribers 3 --duration 7 --num-per-second 50";
    let run = Disturbed::start(server, "viewed", args, 1, 4);
    std::thread::sleep(Duration::from_secs(3));
    let victim = run.listener();
    run.remove(&victim);
    let (finished, report) = run.fails();
    let reasons = report.reasons();
    let named = format!("subscriber {victim} was removed by the server (PARTICIPANT_REMOVED) ");
    assert!(reasons.contains(&named), "{reasons}\n{}", finished.stdout);
    presenter.finish();
}

/// Only for LiveKit, whose tokens decide identities as everywhere.
#[test]
fn who_is_removed_is_named_as_its_own_token_says() {
    let Some(server) = &Server::livekit() else {
        return;
    };
    let _turn = beside_one_other();
    let mut command = throng();
    command.env("LIVEKIT_URL", &server.url).args(
        "--publishers 1 --video-publishers 0 --subscribers 1 --duration 6 --max-loss 100"
            .split(' '),
    );
    for (who, permissions) in [
        ("ann", Permissions::PUBLISHER),
        ("ben", Permissions::SUBSCRIBER),
    ] {
        let token = server
            .api_key()
            .join_token("seats", who, who, permissions, Duration::from_secs(300))
            .unwrap();
        command.args(["--token", token.expose()]);
    }
    let run = Disturbed::begin(server, "seats", command, [1, 2]);
    std::thread::sleep(Duration::from_secs(2));
    run.remove("ben");
    let (_, report) = run.fails();
    let reasons = report.reasons();
    assert!(
        reasons.contains("subscriber ben was removed by the server"),
        "{reasons}"
    );
}

/// Only for LiveKit, because the embedded SFU's room service takes no rights away.
#[test]
fn a_right_that_is_taken_and_given_back_is_a_note_with_both_moments() {
    let Some(server) = &Server::livekit() else {
        return;
    };
    let _turn = beside_one_other();
    let args = "--publishers 1 --video-publishers 0 --subscribers 2 --duration 9 --num-per-second 50 --max-loss 100";
    let run = Disturbed::start(server, "lent", args, 1, 3);
    std::thread::sleep(Duration::from_secs(2));
    let victim = run.listener();
    for can_subscribe in [false, true] {
        let permission =
            json!({ "canSubscribe": can_subscribe, "canPublish": true, "canPublishData": false });
        run.ask(
            "UpdateParticipant",
            json!({ "identity": victim, "permission": permission }),
        );
        std::thread::sleep(Duration::from_secs(2));
    }
    let (_, report) = run.passes();
    let notes = report.notes();
    let told = format!("subscriber {victim} lost its right to subscribe: the server took it away ");
    assert!(notes.contains(&told), "{notes}");
    assert!(notes.contains(" into the run, and had it back "), "{notes}");
}

#[test]
fn a_search_replaces_a_subscriber_that_is_removed() {
    let Some(server) = &Server::livekit() else {
        return;
    };
    let _turn = beside_one_other();
    let args =
        "--publishers 1 --video-publishers 0 --find-knee --max 2 --duration 3 --max-loss 100";
    let run = Disturbed::start(server, "searched", args, 1, 2);
    std::thread::sleep(Duration::from_secs(3));
    let victim = run.listener();
    run.remove(&victim);
    let finished = run.running.finish();
    let report = Report::read(&run.scratch.path("run.json"), &server.secret);
    let steps = report.0["steps"].as_array().unwrap();
    let named = format!("subscriber {victim} was removed by the server");
    let has_it = |step: &&Value| step["reasons"].to_string().contains(&named);
    assert_eq!(
        steps.iter().filter(has_it).count(),
        1,
        "{}",
        finished.stdout
    );
    assert!(has_it(&&steps[0]), "{}", finished.stdout);
    // All that are counted on later are there.
    for step in &steps[1..] {
        let count = |name: &str| step["session"][name].as_u64().unwrap();
        assert_eq!(
            count("participants_total"),
            count("participants_healthy"),
            "{}",
            finished.stdout
        );
    }
    assert!(steps.len() > 1, "{}", finished.stdout);
}

fn publishers_that_are_removed_in_a_tier_fail_that_tier(server: &Server) {
    let _turn = beside_one_other();
    let args = "--publishers 2 --video-publishers 0 --ramp 3,6 --duration 6 --num-per-second 50";
    let run = Disturbed::start(server, "tiers", args, 2, 5);
    std::thread::sleep(Duration::from_secs(3));
    run.publishers().iter().for_each(|one| run.remove(one));
    let (_, report) = run.fails();
    let reasons = report.reasons();
    assert!(reasons.contains("tier 1: publisher "), "{reasons}");
    assert!(reasons.contains("(PARTICIPANT_REMOVED)"), "{reasons}");
    let steps = report.0["steps"].as_array().unwrap();
    assert_eq!(steps[0]["result"], "FAIL", "{reasons}");
    assert!(steps[0]["audio"]["frames_lost_source"].as_u64() > Some(3 * 50));
    account(&report, "audio");
}

/// Only for LiveKit, because the embedded SFU's room service takes no rights away.
#[test]
fn whose_right_to_publish_is_taken_is_named() {
    let Some(server) = &Server::livekit() else {
        return;
    };
    let _turn = beside_one_other();
    let args =
        "--publishers 2 --video-publishers 0 --subscribers 2 --duration 10 --num-per-second 50";
    let run = Disturbed::start(server, "rights", args, 2, 4);
    std::thread::sleep(Duration::from_secs(3));
    let victim = run.publishers().remove(0);
    let permission = json!({ "canSubscribe": true, "canPublish": false, "canPublishData": false });
    run.ask(
        "UpdateParticipant",
        json!({ "identity": victim, "permission": permission }),
    );
    let (_, report) = run.fails();
    let reasons = report.reasons();
    let named = format!("publisher {victim} lost its audio track: the server unpublished it ");
    assert!(reasons.contains(&named), "{reasons}");
    let (_, _, source) = account(&report, "audio");
    assert!(source > 2 * 4 * 50, "{source}");
}

fn a_room_that_somebody_deletes_fails_the_run(server: &Server) {
    let _turn = beside_one_other();
    let args =
        "--publishers 1 --video-publishers 0 --subscribers 2 --duration 30 --num-per-second 50";
    let run = Disturbed::start(server, "deleted", args, 1, 3);
    std::thread::sleep(Duration::from_secs(2));
    run.runtime
        .block_on(run.rooms.delete_room(run.room))
        .unwrap();
    let (_, report) = run.fails();
    let reasons = report.reasons();
    assert!(reasons.contains("all participants were gone"), "{reasons}");
    assert!(reasons.contains("room 'deleted' was deleted "), "{reasons}");
    assert!(
        reasons.contains("the server sent 3 participants of it away (ROOM_DELETED)"),
        "{reasons}"
    );
    assert!(
        reasons.contains("room_deleted (3 participants)"),
        "{reasons}"
    );
    account(&report, "audio");
}

impl Disturbed<'_> {
    /// Returns the sid of a participant's only track.
    fn track_of(&self, identity: &str) -> String {
        let all = self.active();
        let one = all.iter().find(|one| one.identity == identity).unwrap();
        one.tracks[0].sid.clone()
    }
}

/// Only for LiveKit, because the embedded SFU's room service mutes nobody.
#[test]
fn a_track_that_is_muted_from_outside_owes_nothing_from_then_on_and_is_named() {
    let Some(server) = &Server::livekit() else {
        return;
    };
    let _turn = beside_one_other();
    let args =
        "--publishers 2 --video-publishers 0 --subscribers 2 --duration 10 --num-per-second 50";
    let run = Disturbed::start(server, "muted", args, 2, 4);
    std::thread::sleep(Duration::from_secs(3));
    let victim = run.publishers().remove(0);
    let track = run.track_of(&victim);
    run.ask(
        "MutePublishedTrack",
        json!({ "identity": victim, "trackSid": track, "muted": true }),
    );
    let (finished, report) = run.passes();
    let note = format!("the server muted the audio track of {victim} ");
    assert!(finished.stdout.contains(&note), "{}", finished.stdout);
    // Two subscribers are owed ten seconds of the other publisher, and three of the muted one.
    let (expected, lost, _) = account(&report, "audio");
    assert!(
        expected > 2 * 12 * 50 && expected < 2 * 17 * 50,
        "{expected}"
    );
    // Only frames that were under way when the server muted the track may be lost.
    assert!(lost <= 2 * 5, "{lost}");
}

#[test]
fn whose_right_to_subscribe_is_taken_is_named() {
    let Some(server) = &Server::livekit() else {
        return;
    };
    let _turn = beside_one_other();
    let args =
        "--publishers 1 --video-publishers 0 --subscribers 2 --duration 10 --num-per-second 50";
    let run = Disturbed::start(server, "listens", args, 1, 3);
    std::thread::sleep(Duration::from_secs(3));
    let listens = |one: &proto::ParticipantInfo| one.tracks.is_empty();
    let victim = run.active().into_iter().find(listens).unwrap().identity;
    let permission = json!({ "canSubscribe": false, "canPublish": true, "canPublishData": false });
    run.ask(
        "UpdateParticipant",
        json!({ "identity": victim, "permission": permission }),
    );
    let (_, report) = run.fails();
    let reasons = report.reasons();
    let named =
        format!("subscriber {victim} lost its right to subscribe: the server took it away ");
    assert!(reasons.contains(&named), "{reasons}");
    let (expected, lost, _) = account(&report, "audio");
    assert!(expected > 2 * 8 * 50, "{expected}: what it was owed stays");
    assert!(lost > 3 * 50, "{lost}");
}

#[test]
fn a_codec_that_the_room_lacks_does_not_take_the_other_track_with_it() {
    let options = Options {
        codecs: &["audio/opus", "video/h264"],
        ..Options::default()
    };
    let Some(server) = &Server::livekit_with(&options) else {
        return;
    };
    let _turn = beside_one_other();
    let args =
        "--publishers 1 --video-publishers 1 --subscribers 2 --duration 6 --num-per-second 50";
    let run = Disturbed::start(server, "h264-only", args, 1, 3);
    let (finished, report) = run.fails();
    let stdout = finished.stdout.replace("\n  ", " ");
    assert!(
        stdout.contains("the server's rooms do not take video/VP8"),
        "{stdout}"
    );
    let reasons = report.reasons();
    assert!(
        reasons.contains("could not publish its video track: the server refused it: "),
        "{reasons}"
    );
    let (expected, lost, _) = account(&report, "audio");
    assert!(expected > 2 * 4 * 50, "{expected}");
    assert!(lost <= expected / 50, "{lost} of {expected}");
    assert_eq!(report.counter("audio", "tracks_live"), 2);
    assert_eq!(report.counter("video", "tracks_expected"), 2);
    assert_eq!(report.counter("video", "tracks_live"), 0);
}
