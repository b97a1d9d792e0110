//! Viewers of a stream that is not their run's own, on a real LiveKit server and on the embedded
//! SFU. The stream is judged by what its packets and pictures tell. If nothing arrives, the run
//! does not pass.

use crate::common::on_both_servers;
use crate::common::program::{
    Finished, Report, Running, Scratch, against, beside_one_other, throng,
};
use crate::common::server::Server;

on_both_servers!(
    viewers_of_somebody_elses_stream_judge_it,
    where_nothing_came_nothing_passes,
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
