//! Media over what is not UDP: whole runs against a real LiveKit server.

use std::time::Duration;

use crate::common::network::{Network, SERVER};
use crate::common::path::Conditions;
use crate::common::program::{Report, Running, Scratch, against, alone, beside_one_other, throng};
use crate::common::server::{Options, Server};
use rustix::process::{Pid, Signal, kill_process};

use super::paths::{SITE, joins_and_flows, livekit_in, run_through, unwrapped};

/// Media over TCP alone, which LiveKit calls `force_tcp`.
fn server_over_tcp() -> Option<Server> {
    Server::livekit_with(&Options {
        force_tcp: true,
        ..Options::default()
    })
}

/// Nothing is lost on the way over TCP, and nothing of it was dropped here.
fn flows_whole(what: &str, report: &Report) {
    for kind in ["audio", "video"] {
        let counter = |name| report.counter(kind, name);
        assert_eq!(counter("packets_lost_network"), 0, "{what}: {kind}");
        assert_eq!(
            counter("frames_delivered"),
            counter("frames_expected"),
            "{what}: {kind}"
        );
    }
    assert_eq!(report.counter("session", "sends_backlogged"), 0, "{what}");
    assert_eq!(report.counter("session", "packets_rejected"), 0, "{what}");
}

#[test]
fn media_over_tcp_is_judged_as_over_udp() {
    let Some(server) = server_over_tcp() else {
        return;
    };
    let _turn = alone();
    for connection in ["single", "dual"] {
        for transport in ["tcp", "auto"] {
            let what = format!("{connection}, {transport}");
            let more = ["--video-publishers", "1", "--transport", transport];
            let (finished, report) = run_through(&server.url, &server, connection, &more);
            joins_and_flows(&what, &finished, &report);
            flows_whole(&what, &report);
            assert_eq!(report.counter("session", "joins_by_tcp"), 3, "{what}");
            assert_eq!(report.counter("session", "joins_by_udp"), 0, "{what}");
            let said = unwrapped(&finished);
            assert!(said.contains("media: 3 over TCP"), "{what}: {said}");
            let why = "3 participants sent media over TCP: the server offers no UDP candidate";
            assert_eq!(said.contains(why), transport == "auto", "{what}: {said}");
        }
    }
}

#[test]
fn our_own_sfu_takes_media_over_tcp_too() {
    let server = Server::embedded();
    let _turn = alone();
    for connection in ["single", "dual"] {
        let more = ["--video-publishers", "1", "--transport", "tcp"];
        let (finished, report) = run_through(&server.url, &server, connection, &more);
        joins_and_flows(connection, &finished, &report);
        flows_whole(connection, &report);
        assert_eq!(report.counter("session", "joins_by_tcp"), 3, "{connection}");
    }
    let metrics = server.metrics();
    assert_eq!(metrics["throng_sfu_stream_drops"], 0.0);
    // Left to itself, it goes over UDP.
    let (finished, report) = run_through(&server.url, &server, "single", &[]);
    joins_and_flows("auto", &finished, &report);
    assert_eq!(report.counter("session", "joins_by_udp"), 3);
    assert!(
        !finished.stdout.contains("Media over"),
        "{}",
        finished.stdout
    );
}

#[test]
fn a_mix_is_reported_by_transport() {
    let server = Server::embedded();
    let _turn = alone();
    let mix = ["--transport", "udp:60,tcp:40"];
    let (finished, report) = run_through(&server.url, &server, "single", &mix);
    assert!(matches!(finished.code, Some(0 | 98)), "{}", finished.stdout);
    let transports = report.0["transports"].as_array().expect("a list");
    let sum = |name: &str| -> u64 {
        let each = transports.iter().map(|row| row[name].as_u64().unwrap());
        each.sum()
    };
    let names: Vec<_> = transports.iter().map(|row| &row["transport"]).collect();
    assert_eq!(names, ["udp", "tcp"], "{}", finished.stdout);
    for row in transports {
        let joins = format!("joins_by_{}", row["transport"].as_str().unwrap());
        assert_eq!(row["participants"], report.counter("session", &joins));
        for times in ["join_us", "ice_us", "dtls_us", "rtt_us"] {
            let spread = &row[times];
            assert!(spread["p50"].as_u64() <= spread["max"].as_u64(), "{row}");
            assert!(spread["count"].as_u64() >= Some(1), "{times}: {row}");
        }
    }
    assert_eq!(sum("participants"), 3);
    let counter = |name| report.counter("audio", name);
    assert_eq!(sum("packets_received"), counter("packets_received"));
    assert_eq!(sum("packets_lost_network"), counter("packets_lost_network"));
    assert!(
        finished.stdout.contains("Media over"),
        "{}",
        finished.stdout
    );
}

#[test]
fn what_the_server_does_not_offer_is_named_at_once() {
    let Some(over_tcp) = server_over_tcp() else {
        return;
    };
    let _turn = beside_one_other();
    let (finished, report) =
        run_through(&over_tcp.url, &over_tcp, "single", &["--transport", "udp"]);
    assert_eq!(report.counter("session", "joins_failed"), 3);
    for said in [
        "only TCP candidates (127.0.0.1:",
        "--transport udp was asked for",
        "ours: 127.0.0.1",
    ] {
        assert!(unwrapped(&finished).contains(said), "{}", finished.stdout);
    }
    assert!(
        finished.took < Duration::from_secs(8),
        "{:?}",
        finished.took
    );
}

#[test]
fn where_udp_does_not_come_up_it_falls_back_to_tcp_and_says_so() {
    let name = "where_udp_does_not_come_up_it_falls_back_to_tcp_and_says_so";
    let Some(network) = Network::for_test(module_path!(), name, 1) else {
        return;
    };
    let embedded = network.server.run(|| Server::embedded_at(SITE));
    let servers = [Some(embedded), livekit_in(&network.server)];
    let _turn = alone();
    for server in servers.into_iter().flatten() {
        falls_back_to_tcp(&network, &server);
    }
}

fn falls_back_to_tcp(network: &Network, server: &Server) {
    network.set_both(Conditions::default());
    network.clients.run(|| {
        let (finished, report) = run_through(&server.url, server, "single", &[]);
        joins_and_flows("UDP passes", &finished, &report);
        assert_eq!(report.counter("session", "joins_by_udp"), 3);
        // A firewall that drops UDP and lets TCP through.
        network.set_both(Conditions {
            cut: true,
            ..Conditions::default()
        });
        for connection in ["single", "dual"] {
            let (finished, report) = run_through(&server.url, server, connection, &[]);
            joins_and_flows(connection, &finished, &report);
            assert_eq!(report.counter("session", "joins_by_tcp"), 3, "{connection}");
            let said = unwrapped(&finished);
            let why = format!("to {SERVER} did not come up within 1 s");
            assert!(said.contains(&why), "{connection}: {said}");
        }
        let only_udp = ["--transport", "udp"];
        let (finished, report) = run_through(&server.url, server, "single", &only_udp);
        assert_eq!(report.counter("session", "joins_ok"), 0);
        let said = unwrapped(&finished);
        assert!(
            said.contains(" over UDP from ")
                && said.contains("is the server's UDP port reachable?"),
            "{said}"
        );
    });
}

/// A run whose UDP is cut after five seconds.
fn run_with_udp_cut(name: &str, transport: &str) -> Option<(String, Report)> {
    let network = Network::for_test(module_path!(), name, 1)?;
    let server = livekit_in(&network.server)?;
    let _turn = beside_one_other();
    let scratch = Scratch::new();
    let json = scratch.path("run.json");
    let mut command = throng();
    against(&server, &mut command)
        .args(["--publishers", "1", "--subscribers", "2"])
        .args(["--transport", transport, "--duration", "26", "--json"])
        .arg(&json);
    let running = network
        .clients
        .run(|| Running::start(&mut command, &server.secret));
    std::thread::sleep(Duration::from_secs(5));
    network.set_both(Conditions {
        cut: true,
        ..Conditions::default()
    });
    let finished = running.finish();
    Some((unwrapped(&finished), Report::read(&json, &server.secret)))
}

/// LiveKit restarts ICE with its TCP candidates alone.
#[test]
fn where_udp_is_cut_in_a_run_media_comes_back_over_tcp() {
    let name = "where_udp_is_cut_in_a_run_media_comes_back_over_tcp";
    let Some((said, report)) = run_with_udp_cut(name, "auto") else {
        return;
    };
    let transports = report.0["transports"].as_array().expect("a list");
    let names: Vec<_> = transports.iter().map(|row| &row["transport"]).collect();
    assert_eq!(names, ["tcp"], "{said}");
    assert_eq!(report.counter("session", "reconnects_ok"), 3, "{said}");
    assert!(said.contains("sent media over TCP in the end"), "{said}");
    let rows = report.0["series"].as_array().expect("a row a second");
    let last = &rows[rows.len() - 3]["packets_received_per_second"];
    assert!(last.as_f64() > Some(80.0), "{last}: {said}");
}

#[test]
fn a_resume_that_brings_no_media_back_is_none() {
    let name = "a_resume_that_brings_no_media_back_is_none";
    let Some((said, report)) = run_with_udp_cut(name, "udp") else {
        return;
    };
    assert_eq!(report.counter("session", "reconnects_ok"), 0, "{said}");
    assert!(!said.contains("then resumed the session"), "{said}");
    assert_eq!(report.result(), "FAIL", "{said}");
}

#[test]
fn a_server_that_is_killed_ends_its_connections_and_is_not_the_generators_fault() {
    let Some(server) = server_over_tcp() else {
        return;
    };
    let _turn = beside_one_other();
    let scratch = Scratch::new();
    let json = scratch.path("run.json");
    let mut command = throng();
    against(&server, &mut command)
        .args(["--publishers", "2", "--subscribers", "2", "--duration", "6"])
        .arg("--json")
        .arg(&json);
    let running = Running::start(&mut command, &server.secret);
    std::thread::sleep(Duration::from_secs(4));
    kill_process(Pid::from_raw(server.pid() as i32).unwrap(), Signal::KILL).unwrap();
    let finished = running.finish();
    let report = Report::read(&json, &server.secret);
    assert_eq!(report.0["engine"]["send_errors"], 0, "{}", finished.stdout);
    assert_eq!(report.counter("session", "joins_by_tcp"), 4);
    assert_ne!(finished.code, Some(0), "{}", finished.stdout);
}
