//! Viewers of a stream that is not their run's own, on a real LiveKit server and on the embedded
//! SFU. The stream is judged by what its packets and pictures tell. If nothing arrives, the run
//! does not pass.

use crate::common::on_both_servers;
use crate::common::program::{
    Finished, Report, Running, Scratch, against, beside_one_other, throng,
};
use crate::common::server::Server;
use throng::signal::rooms::RoomService;

on_both_servers!(
    viewers_of_somebody_elses_stream_judge_it,
    where_nothing_came_nothing_passes,
    a_presenter_that_leaves_is_told_with_its_moment,
    a_presenter_that_comes_late_is_told_with_its_moment,
);

fn start(server: &Server, scratch: &Scratch, name: &str, args: &str) -> Running {
    let mut command = throng();
    against(server, &mut command)
        .args(args.split(' '))
        .arg("--json")
        .arg(scratch.path(name));
    Running::start(&mut command, &server.secret)
}

fn finish(server: &Server, scratch: &Scratch, name: &str, run: Running) -> (Finished, Report) {
    let finished = run.finish();
    let report = Report::read(&scratch.path(name), &server.secret);
    (finished, report)
}

fn viewers_of_somebody_elses_stream_judge_it(server: &Server) {
    let _turn = beside_one_other();
    let scratch = Scratch::new();
    let presenter = start(
        server,
        &scratch,
        "presenter.json",
        "--room live --publishers 1 --video-publishers 1 --subscribers 1 --duration 12",
    );
    std::thread::sleep(std::time::Duration::from_secs(2));
    let viewers = start(
        server,
        &scratch,
        "viewers.json",
        "--room live --publishers 0 --subscribers 3 --duration 5 --num-per-second 50",
    );
    let (finished, viewers) = finish(server, &scratch, "viewers.json", viewers);
    let (_, presenter) = finish(server, &scratch, "presenter.json", presenter);
    let expected = if viewers.result() == "INVALID" { 98 } else { 0 };
    let about = format!("{}\n{}", viewers.reasons(), finished.stdout);
    assert_eq!(finished.code, Some(expected), "{about}");
    for (kind, frames_a_second) in [("audio", 50), ("video", 30)] {
        let count = |name| viewers.counter(kind, name);
        assert_eq!(count("foreign_tracks_live"), 3, "{about}");
        assert_eq!(count("foreign_tracks_expected"), 3, "{about}");
        // Nothing of the stream counts as the run's own.
        assert_eq!((count("tracks_expected"), count("tracks_live")), (0, 0));
        assert_eq!(count("frames_expected"), 0);
        assert_eq!(
            count("foreign_packets_received"),
            count("packets_received"),
            "{about}"
        );
        let first = &viewers.0["totals"][kind]["foreign_first_frame"]["count"];
        assert_eq!(*first, 3, "{about}");
        // The presenter's frames tell when they were sent; both runs use the clock of this host.
        let latency = viewers.micros(kind, "foreign_one_way_latency", "p50");
        let own = presenter.micros(kind, "one_way_latency", "p50");
        let (latency, own) = latency.zip(own).expect("both were measured");
        assert!(latency.abs_diff(own) < 50_000, "{kind} {latency} {own}");
        // Frames come as often as the presenter sends them. The presenter's own subscriber is in
        // the presenter's account only.
        let frames = count("foreign_frames");
        assert!(
            frames > 3 * 4 * frames_a_second && frames < 3 * 9 * frames_a_second,
            "{kind} {frames}"
        );
        assert_eq!(presenter.counter(kind, "foreign_tracks_live"), 0);
        assert_eq!(presenter.counter(kind, "foreign_frames"), 0);
    }
    assert!(
        finished.stdout.contains("Of others: tracks live"),
        "{}",
        finished.stdout
    );
}

fn where_nothing_came_nothing_passes(server: &Server) {
    let _turn = beside_one_other();
    let scratch = Scratch::new();
    for (flag, code) in [("", 99), (" --allow-unjudged", 0)] {
        let args = format!(
            "--room nobody-there --publishers 0 --subscribers 2 --duration 2 --num-per-second 50{flag}"
        );
        let run = start(server, &scratch, "empty.json", &args);
        let (finished, report) = finish(server, &scratch, "empty.json", run);
        let expected = if report.result() == "INVALID" {
            98
        } else {
            code
        };
        assert_eq!(finished.code, Some(expected), "{}", finished.stdout);
        assert_eq!(
            report.reasons().contains("nothing was judged"),
            code == 99,
            "{}",
            report.reasons()
        );
    }
}

const PRESENTER: &str =
    "--publishers 1 --video-publishers 1 --video-resolution low --no-simulcast --subscribers 0";
const VIEWERS: &str = "--publishers 0 --subscribers 3 --num-per-second 50";

/// Asserts that the viewers' run ended with this code, or is INVALID because this host was too busy.
fn ends_with(code: i32, finished: &Finished, report: &Report) {
    let expected = if report.result() == "INVALID" {
        98
    } else {
        code
    };
    let about = format!("{}\n{}", report.reasons(), finished.stdout);
    assert_eq!(finished.code, Some(expected), "{about}");
}

fn a_presenter_that_leaves_is_told_with_its_moment(server: &Server) {
    let _turn = beside_one_other();
    let scratch = Scratch::new();
    let presenter = format!("--room left {PRESENTER} --duration 5");
    let presenter = start(server, &scratch, "presenter.json", &presenter);
    std::thread::sleep(std::time::Duration::from_secs(2));
    let viewers = format!("--room left {VIEWERS} --duration 10");
    let viewers = start(server, &scratch, "viewers.json", &viewers);
    let (finished, report) = finish(server, &scratch, "viewers.json", viewers);
    presenter.finish();
    ends_with(0, &finished, &report);
    let notes = report.notes();
    assert!(notes.contains("of others: "), "{notes}");
    assert!(notes.contains(" left the room "), "{notes}");
    // Neither the header nor a note says that nothing is judged.
    assert!(!finished.stdout.contains("no media"), "{}", finished.stdout);
    assert!(!notes.contains("not judged"), "{notes}");
    assert!(
        report.counter("audio", "foreign_tracks_live") == 3,
        "{}",
        finished.stdout
    );
}

fn a_presenter_that_comes_late_is_told_with_its_moment(server: &Server) {
    let _turn = beside_one_other();
    let scratch = Scratch::new();
    let viewers = format!("--room late {VIEWERS} --duration 9");
    let viewers = start(server, &scratch, "viewers.json", &viewers);
    std::thread::sleep(std::time::Duration::from_secs(4));
    let presenter = format!("--room late {PRESENTER} --duration 10");
    let presenter = start(server, &scratch, "presenter.json", &presenter);
    let (finished, report) = finish(server, &scratch, "viewers.json", viewers);
    presenter.finish();
    ends_with(0, &finished, &report);
    let notes = report.notes();
    assert!(notes.contains(" began to publish audio "), "{notes}");
}

/// Only for LiveKit, which keeps a participant that fell silent for some 20 s.
#[test]
fn a_presenter_that_dies_fails_its_viewers() {
    let Some(server) = &Server::livekit() else {
        return;
    };
    let _turn = beside_one_other();
    let scratch = Scratch::new();
    let presenter = format!("--room dies {PRESENTER} --duration 40");
    let mut presenter = start(server, &scratch, "presenter.json", &presenter);
    std::thread::sleep(std::time::Duration::from_secs(2));
    let viewers = format!("--room dies {VIEWERS} --duration 10");
    let viewers = start(server, &scratch, "viewers.json", &viewers);
    std::thread::sleep(std::time::Duration::from_secs(4));
    presenter.signal(rustix::process::Signal::KILL);
    let (finished, report) = finish(server, &scratch, "viewers.json", viewers);
    assert!(presenter.has_ended());
    ends_with(99, &finished, &report);
    let reasons = report.reasons();
    for kind in ["audio", "video"] {
        let told = reasons
            .lines()
            .find(|reason| reason.starts_with(&format!("{kind} of ")));
        let told = told.unwrap_or_else(|| panic!("{reasons}\n{}", finished.stdout));
        assert!(told.contains("who is not of this run, stopped "), "{told}");
        assert!(told.contains("3 subscribers waited for it"), "{told}");
    }
}

/// Only for LiveKit, because the embedded SFU's room service mutes nobody.
#[test]
fn a_presenter_that_is_muted_is_told_and_owes_nothing() {
    let Some(server) = &Server::livekit() else {
        return;
    };
    let _turn = beside_one_other();
    let scratch = Scratch::new();
    let presenter =
        "--room hushed --publishers 1 --video-publishers 0 --subscribers 0 --duration 16";
    let presenter = start(server, &scratch, "presenter.json", presenter);
    std::thread::sleep(std::time::Duration::from_secs(2));
    let viewers = format!("--room hushed {VIEWERS} --duration 10");
    let viewers = start(server, &scratch, "viewers.json", &viewers);
    std::thread::sleep(std::time::Duration::from_secs(4));
    let rooms = RoomService::new(server.endpoint(), server.api_key());
    let inside = tokio::runtime::Runtime::new()
        .unwrap()
        .block_on(rooms.list_participants("hushed"))
        .unwrap();
    let speaker = inside.iter().find(|one| !one.tracks.is_empty()).unwrap();
    let (identity, sid) = (&speaker.identity, &speaker.tracks[0].sid);
    server.ask(
        "hushed",
        "MutePublishedTrack",
        serde_json::json!({ "identity": identity, "trackSid": sid, "muted": true }),
    );
    let (finished, report) = finish(server, &scratch, "viewers.json", viewers);
    presenter.finish();
    ends_with(0, &finished, &report);
    let note = format!("of others: {identity} was muted (audio) ");
    assert!(report.notes().contains(&note), "{}", report.notes());
}
