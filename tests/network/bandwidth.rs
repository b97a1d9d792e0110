//! A narrow path to and from a real LiveKit server. The server allocates bandwidth by our feedback,
//! and publishers that obey the server's feedback drop layers. The truth is the server's own log
//! and the network's.

use std::time::Duration;

use crate::common::network::{Direction, Network};
use crate::common::path::{Conditions, Loss, Rate};
use crate::common::program::{Report, Running, Scratch, against, beside_one_other, throng};
use crate::common::server::{Congestion, Options, Server};

use super::paths::SITE;

/// Conditions with less bandwidth than the highest layers take.
const NARROW: Conditions = Conditions {
    cut: false,
    loss: Loss::None,
    rate: Some(Rate {
        bits_per_second: 1_000_000,
        burst_bytes: 4_000,
        // One second of queue, because an estimate by delay detects a queue that grows, not one
        // that is full.
        queue_bytes: 125_000,
    }),
    delay: Duration::from_millis(10),
    jitter: Duration::ZERO,
    reorder: false,
    duplication: 0.0,
};

/// One run over a network that is narrow in one direction for a while. Times are in seconds since
/// the first media.
struct Trial {
    congestion: Congestion,
    direction: Direction,
    narrow: (u64, u64),
    seconds: u64,
    args: &'static str,
}

impl Trial {
    /// Runs the trial. Returns the report, and what the server logged.
    fn run(&self, name: &str) -> Option<(Report, String)> {
        let _turn = beside_one_other();
        let network = Network::for_test(module_path!(), name, 1)?;
        let options = Options {
            site: SITE,
            log_level: "info",
            congestion: Some(self.congestion),
            ..Options::default()
        };
        let server = network.server.run(|| Server::livekit_with(&options))?;
        let scratch = Scratch::new();
        let mut command = throng();
        against(&server, &mut command)
            .args(self.args.split(' '))
            .arg(self.seconds.to_string());
        command.arg("--json").arg(scratch.path("run.json"));
        let mut running = network
            .clients
            .run(|| Running::start(&mut command, &server.secret));
        let (from, to) = self.narrow;
        // Media must be made before anything is sent, and that takes time.
        let flows = || {
            network
                .log()
                .iter()
                .any(|packet| packet.direction == self.direction && packet.rtp().is_some())
        };
        while !flows() && !running.has_ended() {
            std::thread::sleep(Duration::from_millis(50));
        }
        std::thread::sleep(Duration::from_secs(from));
        network.set(self.direction, NARROW);
        std::thread::sleep(Duration::from_secs(to - from));
        network.set_both(Conditions::default());
        let finished = running.finish();
        assert!(
            matches!(finished.code, Some(0 | 98 | 99)),
            "{}{}",
            finished.stdout,
            finished.stderr
        );
        eprintln!("{}", finished.stdout);
        let report = Report::read(&scratch.path("run.json"), &server.secret);
        let log = server.log();
        network.server.run(|| drop(server));
        Some((report, log))
    }
}

fn bandwidth(report: &Report, name: &str) -> u64 {
    report.0["totals"]["bandwidth"][name]
        .as_u64()
        .unwrap_or_else(|| panic!("{name}"))
}

/// Returns a figure of the series, for the seconds in which it is known.
fn series(report: &Report, name: &str) -> Vec<u64> {
    report.0["series"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|row| row[name].as_u64())
        .collect()
}

/// Runs a subscriber of three layered tracks behind 1 Mbit/s. The server must notice by our
/// feedback, and step layers down or pause tracks.
fn server_reacts(name: &str, congestion: Congestion) -> Option<Report> {
    let trial = Trial {
        congestion,
        direction: Direction::Down,
        narrow: (10, 40),
        seconds: 38,
        args: "--video-publishers 3 --video-resolution medium --video-bitrate 1M --subscribers 1 --threads 1 --max-loss 100 --duration",
    };
    let (report, log) = trial.run(name)?;
    assert!(
        log.contains("congest"),
        "the server noticed: {:?} {log}",
        series(&report, "downlink_estimate_bps")
    );
    let (paused, down) = (
        bandwidth(&report, "tracks_paused"),
        bandwidth(&report, "layers_stepped_down"),
    );
    assert!(
        paused + down > 0,
        "and did something about it: {}",
        report.0["totals"]["bandwidth"]
    );
    Some(report)
}

#[test]
fn a_server_with_send_side_estimation_reacts_to_our_transport_wide_feedback() {
    let name = "a_server_with_send_side_estimation_reacts_to_our_transport_wide_feedback";
    let Some(report) = server_reacts(name, Congestion::SendSide) else {
        return;
    };
    assert!(
        bandwidth(&report, "transport_cc_sent") > 100,
        "{}",
        report.0["totals"]["bandwidth"]
    );
    assert_eq!(bandwidth(&report, "remb_sent"), 0);
}

#[test]
fn a_server_with_remote_estimation_reacts_to_our_remb() {
    let Some(report) = server_reacts(
        "a_server_with_remote_estimation_reacts_to_our_remb",
        Congestion::Remote,
    ) else {
        return;
    };
    assert!(
        bandwidth(&report, "remb_sent") > 20,
        "{}",
        report.0["totals"]["bandwidth"]
    );
    assert_eq!(bandwidth(&report, "transport_cc_sent"), 0);
    let estimates = series(&report, "downlink_estimate_bps");
    assert!(
        estimates.iter().any(|bps| *bps < 1_100_000),
        "{estimates:?}"
    );
}

#[test]
fn a_publisher_that_obeys_drops_layers_on_a_narrow_uplink_and_sends_them_again_when_it_is_wide() {
    let trial = Trial {
        congestion: Congestion::Remote,
        direction: Direction::Up,
        narrow: (10, 25),
        seconds: 45,
        args: "--video-publishers 1 --video-resolution medium --video-bitrate 1.5M --subscribers 1 --threads 1 --max-loss 100 --obey-bwe --duration",
    };
    let name = "a_publisher_that_obeys_drops_layers_on_a_narrow_uplink_and_sends_them_again_when_it_is_wide";
    let Some((report, _)) = trial.run(name) else {
        return;
    };
    let said = report.0["totals"]["bandwidth"].to_string();
    assert!(bandwidth(&report, "transport_cc_received") > 100, "{said}");
    assert!(
        bandwidth(&report, "layers_dropped") > 0 && bandwidth(&report, "layers_returned") > 0,
        "{said}"
    );
    assert!(
        (5_000..40_000).contains(&bandwidth(&report, "layer_limited_ms")),
        "{said}"
    );
    let estimates = series(&report, "uplink_estimate_bps");
    assert!(
        estimates.iter().any(|bps| *bps < 1_200_000),
        "{estimates:?}"
    );
    assert!(
        estimates.iter().any(|bps| *bps > 1_500_000),
        "{estimates:?}"
    );
}
