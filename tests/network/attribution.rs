//! Where frames were lost, told by whole runs against a real LiveKit server and the embedded SFU
//! over a bad network: its log is the truth.

use std::collections::BTreeMap;
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use crate::common::coturn::{PASSWORD, USER};
use crate::common::network::{Direction, Network};
use crate::common::path::{Conditions, Loss};
use crate::common::program::{Report, Running, Scratch, against, alone, throng};
use crate::common::server::Server;

use super::paths::{SITE, livekit_in};
use super::turn::livekit_and_coturn_in;

const SUBSCRIBERS: u64 = 2;

const CALM: Conditions = Conditions {
    cut: false,
    loss: Loss::None,
    rate: None,
    delay: Duration::from_millis(10),
    jitter: Duration::ZERO,
    reorder: false,
    duplication: 0.0,
};

/// How much each direction loses: so much that some frames outlive no resend. LiveKit asks five
/// times and resends three times, our SFU and our own subscribers ten times each.
#[derive(Clone, Copy)]
struct Bad {
    up: f64,
    down: f64,
}

/// Audio frames by the log.
struct Truth {
    /// Never came to the server, times the subscribers.
    uplink: u64,
    /// Sent to a subscriber, and never came.
    downlink: u64,
    /// Packets that did not come when they were first sent: to the server, and to a subscriber.
    missed_up: u64,
    missed_down: u64,
}

/// A run of audio alone: there a packet is a frame, and a resend has its number. The network is bad
/// for five seconds, some seconds after everybody has joined.
fn run(network: &Network, server: &Server, bad: Bad, by: &[&str]) -> (Report, Truth) {
    let scratch = Scratch::new();
    let mut command = throng();
    against(server, &mut command)
        .args([
            "--publishers",
            "1",
            "--video-publishers",
            "0",
            "--subscribers",
            "2",
        ])
        .args([
            "--num-per-second",
            "50",
            "--duration",
            "12s",
            "--threads",
            "1",
            "--max-loss",
            "100",
        ])
        .args(by)
        .arg("--json")
        .arg(scratch.path("run.json"));
    network.set_both(CALM);
    let running = network
        .clients
        .run(|| Running::start(&mut command, &server.secret));
    std::thread::sleep(Duration::from_secs(4));
    for (direction, loss) in [(Direction::Up, bad.up), (Direction::Down, bad.down)] {
        let loss = Loss::Random(loss);
        network.set(direction, Conditions { loss, ..CALM });
    }
    std::thread::sleep(Duration::from_secs(5));
    network.set_both(CALM);
    let finished = running.finish();
    eprintln!("{}", finished.stdout);
    let report = Report::read(&scratch.path("run.json"), &server.secret);
    let mut arrived: BTreeMap<(Direction, Ssrc, u16), bool> = BTreeMap::new();
    let mut missed: BTreeMap<(Direction, Ssrc, u16), bool> = BTreeMap::new();
    for packet in network.log() {
        if let Some(rtp) = packet.rtp().filter(|rtp| !rtp.padded) {
            let (key, came) = (
                (packet.direction, rtp.ssrc, rtp.seq),
                packet.delivered_at().is_some(),
            );
            *arrived.entry(key).or_default() |= came;
            missed.entry(key).or_insert(!came);
        }
    }
    let missed = |wanted| {
        let missed = missed
            .iter()
            .filter(|((direction, ..), _)| *direction == wanted);
        missed.filter(|(_, missed)| **missed).count() as u64
    };
    let lost = |wanted| {
        let lost = |((direction, ..), arrived): (&(Direction, Ssrc, u16), &bool)| {
            *direction == wanted && !arrived
        };
        arrived.iter().filter(|entry| lost(*entry)).count() as u64
    };
    let truth = Truth {
        uplink: lost(Direction::Up) * SUBSCRIBERS,
        downlink: lost(Direction::Down),
        missed_up: missed(Direction::Up),
        missed_down: missed(Direction::Down),
    };
    (report, truth)
}

/// Who is on the other side of the bad network.
#[derive(Clone, Copy)]
enum Beyond {
    LiveKit,
    OurSfu,
    /// coturn, with LiveKit behind it.
    Relay,
}

/// Holds the attribution of one run to the log, to a share of all that was lost.
fn check(name: &str, beyond: Beyond, bad: Bad, error_max: f64) {
    let Some(network) = Network::for_test(module_path!(), name, 1) else {
        return;
    };
    let _alone = alone();
    let (server, relay) = match beyond {
        Beyond::LiveKit => (livekit_in(&network.server), None),
        Beyond::OurSfu => {
            let start = || Server::embedded_at(SITE);
            (Some(network.server.run(start)), None)
        }
        Beyond::Relay => livekit_and_coturn_in(&network).unzip(),
    };
    let Some(server) = server else { return };
    let url = relay.as_ref().map(|relay| relay.url_for("turn-udp"));
    let by = url.iter().flat_map(|url| {
        let relay = ["--transport", "turn-udp", "--turn", url];
        relay
            .into_iter()
            .chain(["--turn-user", USER, "--turn-password", PASSWORD])
    });
    let (report, truth) = run(&network, &server, bad, &by.collect::<Vec<_>>());
    let by_relay = if relay.is_some() { 1 + SUBSCRIBERS } else { 0 };
    assert_eq!(report.counter("session", "joins_by_turn_udp"), by_relay);
    let count = |counter: &str| report.counter("audio", counter);
    let missing = count("frames_expected") - count("frames_delivered");
    let found = ["uplink", "sfu", "downlink", "unattributed"]
        .map(|place| count(&format!("frames_lost_{place}")));
    eprintln!(
        "{name}: {missing} missing; by the log {} never came to the server, {} were lost behind it; told {found:?}",
        truth.uplink, truth.downlink
    );
    assert_eq!(found.iter().sum::<u64>(), missing);
    assert!(missing > 10, "{missing}");
    // What came to the server so late that it did not send it any more is the uplink's too.
    let never_sent = missing.saturating_sub(truth.downlink);
    let off = |told: u64, truth: u64| told.abs_diff(truth) as f64 / missing as f64;
    let errors = [off(found[0], never_sent), off(found[2], truth.downlink)];
    assert!(errors.iter().all(|error| *error <= error_max), "{errors:?}");
    check_packets(&report, &truth);
}

/// What the server missed at first, and what of the holes at subscribers was the server's own, is
/// the log's.
fn check_packets(report: &Report, truth: &Truth) {
    let count = |counter: &str| report.counter("audio", counter);
    let (asked, missing) = (count("uplink_packets_asked"), count("packets_lost_network"));
    let uplink = count("packets_missing_uplink");
    eprintln!(
        "by the log {} were missed by the server and {} behind it; it asked for {asked}; subscribers missed {missing}, {uplink} of them because of that",
        truth.missed_up, truth.missed_down
    );
    let near = |told: u64, truth: u64| told.abs_diff(truth) as f64 <= 0.05 * truth as f64 + 5.0;
    assert!(near(asked, truth.missed_up), "{asked} {}", truth.missed_up);
    // A packet that the server missed is a hole for every subscriber, whatever becomes of it later;
    // one that came late enough to be sent in its order is none.
    let holes = (truth.missed_up * SUBSCRIBERS).min(missing);
    assert!(near(uplink, holes), "{uplink} {holes}");
}

#[test]
fn what_the_way_to_livekit_loses() {
    check(
        "what_the_way_to_livekit_loses",
        Beyond::LiveKit,
        Bad {
            up: 0.65,
            down: 0.0,
        },
        0.05,
    );
}

#[test]
fn what_the_way_from_livekit_loses() {
    check(
        "what_the_way_from_livekit_loses",
        Beyond::LiveKit,
        Bad { up: 0.0, down: 0.6 },
        0.05,
    );
}

#[test]
fn what_both_ways_of_livekit_lose() {
    check(
        "what_both_ways_of_livekit_lose",
        Beyond::LiveKit,
        Bad {
            up: 0.65,
            down: 0.5,
        },
        0.2,
    );
}

/// The relay is beside the server, so what is lost on the way to it is lost before the server. One
/// direction at a time: the server's requests come by the other one.
#[test]
fn what_the_udp_leg_to_a_relay_loses() {
    check(
        "what_the_udp_leg_to_a_relay_loses",
        Beyond::Relay,
        Bad {
            up: 0.65,
            down: 0.0,
        },
        0.05,
    );
}

#[test]
fn what_the_udp_leg_from_a_relay_loses() {
    check(
        "what_the_udp_leg_from_a_relay_loses",
        Beyond::Relay,
        Bad { up: 0.0, down: 0.6 },
        0.05,
    );
}

#[test]
fn what_the_way_to_our_sfu_loses() {
    check(
        "what_the_way_to_our_sfu_loses",
        Beyond::OurSfu,
        Bad {
            up: 0.75,
            down: 0.0,
        },
        0.05,
    );
}

#[test]
fn what_the_way_from_our_sfu_loses() {
    check(
        "what_the_way_from_our_sfu_loses",
        Beyond::OurSfu,
        Bad {
            up: 0.0,
            down: 0.75,
        },
        0.05,
    );
}

#[test]
fn what_both_ways_of_our_sfu_lose() {
    check(
        "what_both_ways_of_our_sfu_lose",
        Beyond::OurSfu,
        Bad {
            up: 0.75,
            down: 0.7,
        },
        0.2,
    );
}
