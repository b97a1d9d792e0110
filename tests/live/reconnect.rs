//! Participants whose signalling breaks during a run, on a real LiveKit server and on the embedded
//! SFU. Media goes on, the participants come back, and the report says so.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::common::on_both_servers;
use crate::common::program::{
    PATIENCE, Report, Running, Scratch, against, alone, beside_one_other, throng,
};
use crate::common::server::Server;
use livekit_protocol as proto;
use rustix::process::{Pid, Signal, kill_process};
use throng::seeded::Seeded;
use throng::signal::rooms::RoomService;

on_both_servers!(
    a_session_whose_signalling_breaks_is_resumed_and_media_goes_on,
    a_session_that_the_server_has_forgotten_is_joined_anew,
    who_cannot_come_back_gives_up_after_a_while,
);

const ARGS: &str = "--publishers 2 --video-publishers 1 --video-resolution low --no-simulcast --subscribers 4 --max-loss 100";
const PARTICIPANTS: u64 = 6;

/// A relay between participants and the server's signalling. It passes everything on until it is
/// told to break.
struct Relay {
    url: String,
    open: Arc<Mutex<Vec<TcpStream>>>,
    refuses: Arc<AtomicBool>,
}

impl Relay {
    fn to(server: &Server) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let relay = Relay {
            url: format!("ws://{}", listener.local_addr().unwrap()),
            open: Arc::default(),
            refuses: Arc::default(),
        };
        let (open, refuses) = (relay.open.clone(), relay.refuses.clone());
        let upstream = server.url.strip_prefix("ws://").unwrap().to_owned();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                // A refused client sees its connection end before it could send anything.
                let Some(server) = (!refuses.load(Ordering::SeqCst))
                    .then(|| TcpStream::connect(&upstream).unwrap())
                else {
                    continue;
                };
                let ends = [client, server];
                open.lock()
                    .unwrap()
                    .extend(ends.iter().map(|end| end.try_clone().unwrap()));
                for (from, to) in [(0, 1), (1, 0)] {
                    let (mut from, mut to) = (
                        ends[from].try_clone().unwrap(),
                        ends[to].try_clone().unwrap(),
                    );
                    std::thread::spawn(move || {
                        // However the copying ends, the other side is closed.
                        let _ = std::io::copy(&mut from, &mut to);
                        let _ = to.shutdown(Shutdown::Both);
                    });
                }
            }
        });
        relay
    }

    /// Breaks all connections at once.
    fn cut(&self) {
        for end in self.open.lock().unwrap().drain(..) {
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    fn refuse(&self, refuses: bool) {
        self.refuses.store(refuses, Ordering::SeqCst);
    }
}

/// A run through a relay, and the server's own view of its room.
struct Broken {
    relay: Relay,
    running: Running,
    scratch: Scratch,
    rooms: RoomService,
    runtime: tokio::runtime::Runtime,
}

impl Broken {
    /// Starts a run, and waits until everybody is in and media has flowed for a second.
    fn start(server: &Server, connection: &str, duration: &str) -> Broken {
        let (relay, scratch) = (Relay::to(server), Scratch::new());
        let mut command = throng();
        against(server, &mut command)
            .env("LIVEKIT_URL", &relay.url)
            .args(ARGS.split(' '))
            .args([
                "--connection",
                connection,
                "--duration",
                duration,
                "--room",
                "broken",
                "--json",
            ])
            .arg(scratch.path("run.json"));
        let mut broken = Broken {
            relay,
            running: Running::start(&mut command, &server.secret),
            scratch,
            rooms: RoomService::new(server.endpoint(), server.api_key()),
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap(),
        };
        let deadline = Instant::now() + PATIENCE;
        while broken.active().len() < PARTICIPANTS as usize {
            assert!(Instant::now() < deadline && !broken.running.has_ended());
            std::thread::sleep(Duration::from_millis(50));
        }
        std::thread::sleep(Duration::from_secs(1));
        broken
    }

    fn active(&self) -> Vec<proto::ParticipantInfo> {
        let mut inside = self
            .runtime
            .block_on(self.rooms.list_participants("broken"))
            .unwrap_or_default();
        inside.retain(|participant| {
            participant.state == i32::from(proto::participant_info::State::Active)
        });
        inside
    }

    fn finish(self, server: &Server) -> Report {
        let finished = self.running.finish();
        let report = Report::read(&self.scratch.path("run.json"), &server.secret);
        assert!(
            matches!(finished.code, Some(0 | 98)),
            "{}\n{}{}",
            report.reasons(),
            finished.stdout,
            finished.stderr
        );
        report
    }
}

fn counts<const N: usize>(report: &Report, names: [&str; N]) -> [u64; N] {
    names.map(|name| report.counter("session", name))
}

/// Counters of joins, and of what became of lost sessions.
const FATE: [&str; 4] = [
    "joins_ok",
    "reconnects_ok",
    "reconnects_failed",
    "disconnects",
];

fn a_session_whose_signalling_breaks_is_resumed_and_media_goes_on(server: &Server) {
    let _turn = beside_one_other();
    for connection in ["single", "dual"] {
        let broken = Broken::start(server, connection, "6");
        let sids = |broken: &Broken| {
            let mut sids: Vec<String> = broken
                .active()
                .into_iter()
                .map(|participant| participant.sid)
                .collect();
            sids.sort();
            sids
        };
        let before = sids(&broken);
        broken.relay.cut();
        std::thread::sleep(Duration::from_secs(1));
        assert_eq!(sids(&broken), before, "{connection}: the same sessions");
        let report = broken.finish(server);
        assert_eq!(
            counts(&report, FATE),
            [PARTICIPANTS, PARTICIPANTS, 0, 0],
            "{connection}"
        );
        assert_eq!(
            report.micros("session", "reconnect", "count"),
            Some(PARTICIPANTS)
        );
        assert_eq!(
            counts(
                &report,
                ["participants_healthy", "frames_misrouted", "joins_retried"]
            ),
            [PARTICIPANTS, 0, 0]
        );
        for (kind, subscribed) in [("audio", 8), ("video", 4)] {
            let count = |name| report.counter(kind, name);
            assert_eq!(
                (count("tracks_live"), count("tracks_expected")),
                (subscribed, subscribed)
            );
            let lost = count("frames_expected") - count("frames_delivered");
            eprintln!(
                "{connection}: {lost} of {} frames of {kind} lost",
                count("frames_expected")
            );
            match connection {
                "single" => assert_eq!(lost, 0, "{kind}"),
                // The server drops its path when it offers the ICE restart. It sends again once a
                // check has succeeded.
                _ => assert!(
                    lost * 10 < count("frames_expected"),
                    "{lost} of {} {kind}",
                    count("frames_expected")
                ),
            }
        }
    }
}

fn a_session_that_the_server_has_forgotten_is_joined_anew(server: &Server) {
    let _turn = beside_one_other();
    for connection in ["single", "dual"] {
        let broken = Broken::start(server, connection, "8");
        let publishers = 2;
        let (removed, kept): (Vec<_>, Vec<_>) = broken
            .active()
            .into_iter()
            .partition(|participant| !participant.tracks.is_empty());
        assert_eq!(
            (removed.len(), kept.len()),
            (publishers, PARTICIPANTS as usize - publishers)
        );
        broken.relay.refuse(true);
        broken.relay.cut();
        removed
            .iter()
            .for_each(|participant| remove(server, &participant.identity));
        broken.relay.refuse(false);
        let deadline = Instant::now() + PATIENCE;
        while broken.active().len() < PARTICIPANTS as usize {
            assert!(Instant::now() < deadline, "{:#?}", broken.active());
            std::thread::sleep(Duration::from_millis(50));
        }
        let report = broken.finish(server);
        assert_eq!(
            counts(&report, FATE),
            [PARTICIPANTS, PARTICIPANTS, 0, publishers as u64],
            "{connection}"
        );
        assert_eq!(
            counts(&report, ["participants_healthy", "frames_misrouted"]),
            [PARTICIPANTS - publishers as u64, 0]
        );
        for (kind, published, subscribed) in [("audio", 2, 8), ("video", 1, 4)] {
            let count = |name| report.counter(kind, name);
            assert_eq!(
                (count("tracks_published"), count("tracks_live")),
                (published, subscribed),
                "{connection} {kind}"
            );
            assert_eq!(
                count("frames_duplicate"),
                0,
                "{connection} {kind}: frames are numbered on"
            );
        }
    }
}

/// Makes the server forget a participant. Our room service lacks this request, because no run ever
/// makes it.
fn remove(server: &Server, identity: &str) {
    let authority = server.url.strip_prefix("ws://").unwrap();
    let token = server.api_key().service_token(Some("broken")).unwrap();
    let body = format!(r#"{{"room":"broken","identity":"{identity}"}}"#);
    let mut stream = TcpStream::connect(authority).unwrap();
    write!(
        stream,
        "POST /twirp/livekit.RoomService/RemoveParticipant HTTP/1.0\r\nHost: {authority}\r\nAuthorization: Bearer {}\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        token.expose(),
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.contains(" 200 "), "{answer}");
}

fn who_cannot_come_back_gives_up_after_a_while(server: &Server) {
    let _turn = beside_one_other();
    let broken = Broken::start(server, "auto", "10m");
    broken.relay.refuse(true);
    broken.relay.cut();
    let finished = broken.running.finish();
    let report = Report::read(&broken.scratch.path("run.json"), &server.secret);
    assert_eq!(
        (report.result(), finished.code),
        ("FAIL", Some(99)),
        "{}",
        finished.stderr
    );
    assert!(
        report.reasons().contains("all participants were gone"),
        "{}",
        report.reasons()
    );
    assert_eq!(
        counts(&report, FATE),
        [PARTICIPANTS, 0, PARTICIPANTS, PARTICIPANTS]
    );
    assert_eq!(report.0["target"]["connection"], "single");
    assert_eq!(
        report.0["target"]["connection_reason"],
        "the server has /rtc/v1"
    );
}

/// Kills LiveKit with SIGKILL, `after` milliseconds after everybody was in. The run fails, and says
/// that the server was lost, and when.
fn a_killed_server_is_named(after: u64) {
    let Some(server) = Server::livekit() else {
        return;
    };
    let scratch = Scratch::new();
    let mut command = throng();
    against(&server, &mut command)
        .args(
            "--publishers 2 --video-publishers 1 --subscribers 5 --duration 14 --num-per-second 50"
                .split(' '),
        )
        .arg("--json")
        .arg(scratch.path("run.json"));
    let running = Running::start(&mut command, &server.secret);
    std::thread::sleep(Duration::from_millis(2_000 + after));
    let killed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    kill_process(Pid::from_raw(server.pid() as i32).unwrap(), Signal::KILL).unwrap();
    let finished = running.finish();
    let report = Report::read(&scratch.path("run.json"), &server.secret);
    let reasons = report.reasons();
    assert_ne!(report.result(), "PASS", "{reasons}");
    // This holds on every host: what the kernel says of a closed port is not our fault.
    assert!(!reasons.contains("the kernel refused"), "{reasons}");
    let started = report.0["started_at"].as_str().unwrap();
    let started = humantime::parse_rfc3339(started).unwrap();
    let second = killed.as_secs_f64() - started.duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    let told = reasons.split("the server was lost ").nth(1);
    let told = told.and_then(|rest| rest.split(" s ").next()?.parse::<f64>().ok());
    let told = told.unwrap_or_else(|| panic!("{reasons}\n{}", finished.stdout));
    assert!((told - second).abs() < 1.5, "{told} {second}: {reasons}");
    assert!(reasons.contains("7 of 7 participants lost it"), "{reasons}");
}

#[test]
fn a_server_that_is_killed_is_named_with_its_second() {
    let _turn = beside_one_other();
    a_killed_server_is_named(3_000);
}

/// The servers are killed at random moments.
#[test]
#[ignore = "eight minutes of runs"]
fn twenty_servers_that_are_killed_are_named_with_their_seconds() {
    let _alone = alone();
    let mut chance = Seeded::new(9);
    (0..20).for_each(|_| a_killed_server_is_named(chance.below(8_000)));
}

/// Stops LiveKit for good while it is under load, as a hung machine is, and returns the report and
/// the second of the run in which that was.
fn a_stopped_server(duration: &str) -> Option<(Report, f64, String)> {
    let server = Server::livekit()?;
    let scratch = Scratch::new();
    let mut command = throng();
    against(&server, &mut command)
        .args("--publishers 2 --video-publishers 0 --subscribers 3 --num-per-second 50".split(' '))
        .args(["--duration", duration, "--json"])
        .arg(scratch.path("run.json"));
    let running = Running::start(&mut command, &server.secret);
    std::thread::sleep(Duration::from_secs(5));
    let stopped = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let pid = Pid::from_raw(server.pid() as i32).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    let finished = running.finish();
    kill_process(pid, Signal::CONT).unwrap();
    let report = Report::read(&scratch.path("run.json"), &server.secret);
    let started = humantime::parse_rfc3339(report.0["started_at"].as_str().unwrap()).unwrap();
    let started = started.duration_since(UNIX_EPOCH).unwrap();
    let second = stopped.as_secs_f64() - started.as_secs_f64();
    Some((report, second, finished.stdout + &finished.stderr))
}

/// Returns the number after `before` in a text.
fn number_after(text: &str, before: &str) -> Option<f64> {
    let rest = text.split(before).nth(1)?;
    rest.split(' ').next()?.parse().ok()
}

#[test]
fn a_server_that_falls_silent_to_the_end_is_a_reason_with_its_second() {
    let _turn = beside_one_other();
    let Some((report, second, said)) = a_stopped_server("14") else {
        return;
    };
    let reasons = report.reasons();
    assert_ne!(report.result(), "PASS", "{reasons}");
    let told = number_after(&reasons, "the server fell silent ");
    let told = told.unwrap_or_else(|| panic!("{reasons}\n{said}"));
    assert!((told - second).abs() < 1.0, "{told} {second}: {reasons}");
    assert!(
        reasons.contains("and stayed so to the end, for "),
        "{reasons}"
    );
    assert!(said.contains("  nothing comes in  "), "{said}");
}

#[test]
fn a_silent_server_was_lost_when_the_last_packet_came_and_not_when_it_was_given_up() {
    let _turn = beside_one_other();
    let Some((report, second, said)) = a_stopped_server("32") else {
        return;
    };
    let reasons = report.reasons();
    let told = number_after(&reasons, "the server was lost ");
    let told = told.unwrap_or_else(|| panic!("{reasons}\n{said}"));
    assert!((told - second).abs() < 1.0, "{told} {second}: {reasons}");
    assert!(
        reasons.contains("nothing came from then on, and "),
        "{reasons}"
    );
}
