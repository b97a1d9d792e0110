//! Whole runs against the embedded SFU, and the SFU as a program of its own.

use std::io::{Read, Write};
use std::net::TcpStream;

use crate::common::program::{Report, Scratch, alone, assert_no_secret, run, serving, throng};
use rustix::process::{Pid, Signal, kill_process};
use throng::sfu::server::{DEV_KEY, DEV_SECRET, ServerConfig, SfuServer};

const OWN_SECRET: &str = "a-secret-of-one's-own-with-32-letters";

/// Runs throng against the server, and asserts that it passes, or is INVALID because the host of
/// the tests was too slow. What arrived must be the same either way.
fn against(server: &SfuServer, args: &[&str]) -> Report {
    let scratch = Scratch::new();
    let mut command = throng();
    command
        .env("LIVEKIT_URL", server.url())
        .env("LIVEKIT_API_KEY", DEV_KEY)
        .env("LIVEKIT_API_SECRET", DEV_SECRET);
    let finished = run(
        command
            .args(args)
            .arg("--json")
            .arg(scratch.path("run.json")),
        DEV_SECRET,
    );
    let report = Report::read(&scratch.path("run.json"), DEV_SECRET);
    let expected = if report.result() == "INVALID" { 98 } else { 0 };
    assert_eq!(
        finished.code,
        Some(expected),
        "{}\n{}{}",
        report.reasons(),
        finished.stdout,
        finished.stderr
    );
    report
}

#[test]
fn what_a_run_sends_and_gets_is_what_the_sfu_says_of_it() {
    let _alone = alone();
    let server = SfuServer::start(ServerConfig::loopback(11)).unwrap();
    let shape = [
        "--publishers",
        "2",
        "--video-publishers",
        "1",
        "--video-resolution",
        "low",
        "--subscribers",
        "4",
    ];
    let report = against(
        &server,
        &[
            &shape[..],
            &["--meeting", "--duration", "2s", "--seed", "5"],
        ]
        .concat(),
    );
    assert_eq!(
        (
            report.counter("session", "joins_ok"),
            report.counter("session", "joins_failed")
        ),
        (6, 0)
    );
    // The two members hear each other and one sees the other. The four subscribers get everything.
    for (kind, tracks) in [("audio", 2 + 8), ("video", 1 + 4)] {
        assert_eq!(
            (
                report.counter(kind, "tracks_live"),
                report.counter(kind, "tracks_expected")
            ),
            (tracks, tracks),
            "{kind}"
        );
        assert!(report.counter(kind, "frames_delivered") > 0, "{kind}");
    }
    let both = |name| report.counter("audio", name) + report.counter("video", name);
    let end = server.stop();
    assert_eq!(
        (
            end.lobby.since_start.active,
            end.lobby.participants,
            end.lobby.rooms,
            end.slow_readers
        ),
        (6, 0, 0, 0)
    );
    assert_eq!(end.media.media_in, both("packets_sent"));
    assert!(
        end.media.media_out >= both("packets_received"),
        "{} packets went out",
        end.media.media_out
    );
    assert_eq!(
        (
            end.media.transports,
            end.media.tracks,
            end.media.subscriptions
        ),
        (0, 0, 0),
        "nothing is left over"
    );
}

#[test]
fn the_program_says_where_it_is_and_ends_with_what_it_did() {
    let (mut child, mut stdout, mut said) = serving(throng().args([
        "sfu",
        "--listen",
        "127.0.0.1:0",
        "--api-key",
        "mine",
        "--api-secret",
        OWN_SECRET,
    ]));
    let address = said
        .split("ws://")
        .nth(1)
        .and_then(|rest| rest.split_whitespace().next())
        .unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    stream
        .write_all(b"GET / HTTP/1.1\r\nhost: sfu\r\nconnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.contains("throng's embedded SFU"),
        "{answer}"
    );

    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    stdout.read_to_string(&mut said).unwrap();
    let mut complaints = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut complaints)
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0), "{complaints}");
    assert!(said.contains("Served 0 participants"), "{said}");
    assert_no_secret(&said, OWN_SECRET);
    assert_no_secret(&complaints, OWN_SECRET);
}

#[test]
fn a_taken_port_is_told_and_nothing_is_served() {
    let server = SfuServer::start(ServerConfig::loopback(1)).unwrap();
    let finished = run(
        throng().args(["sfu", "--listen", &server.address().to_string()]),
        OWN_SECRET,
    );
    assert_eq!((finished.code, finished.stdout.as_str()), (Some(1), ""));
    assert!(
        finished.stderr.contains("is in use") && finished.stderr.contains("--listen"),
        "{}",
        finished.stderr
    );
}
