//! Failures around a run: wrong flags, hosts and servers that fail, outputs that cannot be written.
//! Each ends with a message that says what to do and with the right exit code. What was measured is
//! never lost.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::common::on_both_servers;
use crate::common::program::{
    Finished, PATIENCE, Report, Running, Scratch, against, beside_one_other, run, shell, throng,
};
use crate::common::recorded::{only_file, read_ivf, read_opus};
use crate::common::server::Server;
use livekit_protocol as proto;
use rustix::process::Signal;
use throng::signal::rooms::RoomService;

on_both_servers!(
    a_wrong_secret_and_a_wrong_scheme_are_told_by_the_server,
    a_server_that_dies_ends_the_run_and_what_was_measured_is_reported,
    a_room_that_is_deleted_ends_the_run_with_the_servers_reason,
    a_signal_ends_the_run_early_and_everything_is_written_and_cleaned_up,
    two_runs_in_one_room_at_once_both_finish_and_judge_only_their_own,
);

const SECRET: &str = "not-a-secret-that-anybody-may-ever-see";
/// Arguments of a run far longer than any test lets it last.
const ENDLESS: &[&str] = &[
    "--publishers",
    "2",
    "--subscribers",
    "4",
    "--duration",
    "10m",
];
const ENDLESS_PARTICIPANTS: usize = 6;

fn with_credentials(url: &str) -> Command {
    let mut command = throng();
    command
        .env("LIVEKIT_URL", url)
        .env("LIVEKIT_API_KEY", "devkey")
        .env("LIVEKIT_API_SECRET", SECRET);
    command
}

/// The server's own view, read as an administrator.
struct Admin {
    rooms: RoomService,
    runtime: tokio::runtime::Runtime,
}

impl Admin {
    fn of(server: &Server) -> Admin {
        Admin {
            rooms: RoomService::new(server.endpoint(), server.api_key()),
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap(),
        }
    }

    fn room_names(&self) -> Vec<String> {
        let rooms = self.runtime.block_on(self.rooms.list_rooms()).unwrap();
        rooms.into_iter().map(|room| room.name).collect()
    }

    /// Returns the number of connected participants of the room, 0 if there is no room.
    fn active(&self, room: &str) -> usize {
        let inside = self
            .runtime
            .block_on(self.rooms.list_participants(room))
            .unwrap_or_default();
        inside
            .iter()
            .filter(|participant| {
                participant.state == i32::from(proto::participant_info::State::Active)
            })
            .count()
    }

    fn wait_for(&self, room: &str, participants: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.active(room) < participants {
            assert!(
                Instant::now() < deadline,
                "{} of {participants} in {room}",
                self.active(room)
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn delete(&self, room: &str) {
        self.runtime.block_on(self.rooms.delete_room(room)).unwrap();
    }
}

/// An endless run whose participants have all joined and have had a second to send.
struct Endless {
    running: Running,
    admin: Admin,
    scratch: Scratch,
}

impl Endless {
    fn in_room(server: &Server, room: &str) -> Endless {
        let scratch = Scratch::new();
        let mut command = throng();
        let json = scratch.path("run.json");
        against(server, &mut command)
            .args(ENDLESS)
            .args(["--room", room, "--json"])
            .arg(&json)
            .arg("--participants")
            .arg(scratch.path("who.ndjson"))
            .arg("--hgrm")
            .arg(scratch.path("hgrm"));
        let running = Running::start(&mut command, &server.secret);
        let admin = Admin::of(server);
        admin.wait_for(room, ENDLESS_PARTICIPANTS);
        std::thread::sleep(Duration::from_secs(1));
        Endless {
            running,
            admin,
            scratch,
        }
    }

    /// Waits for the end of the run, and returns its results with the time that this took.
    fn finish(self, server: &Server) -> (Finished, Report, Scratch, Duration) {
        let since = Instant::now();
        let finished = self.running.finish();
        let report = Report::read(&self.scratch.path("run.json"), &server.secret);
        (finished, report, self.scratch, since.elapsed())
    }
}

/// Asserts that the run ended early, that the reports hold what was measured until then, and that
/// they agree with the exit code.
fn nothing_is_lost(finished: &Finished, report: &Report, scratch: &Scratch) {
    assert_eq!(
        (report.result(), finished.code),
        ("PARTIAL", Some(1)),
        "{}",
        finished.stderr
    );
    assert!(
        report.reasons().contains("ended early: "),
        "{}",
        report.reasons()
    );
    what_was_measured_is_there(finished, report, scratch);
}

/// Asserts that the reports hold what was measured, whatever the verdict is.
fn what_was_measured_is_there(finished: &Finished, report: &Report, scratch: &Scratch) {
    let result = format!("RESULT: {}", report.result());
    assert!(finished.stdout.contains(&result), "{}", finished.stdout);
    assert_eq!(
        report.counter("session", "joins_ok"),
        ENDLESS_PARTICIPANTS as u64
    );
    assert_eq!(report.counter("audio", "tracks_live"), 8);
    let (sent, received) = (
        report.counter("audio", "packets_sent"),
        report.counter("audio", "packets_received"),
    );
    assert!(
        sent > 25 && received > 50,
        "{sent} packets sent, {received} received"
    );
    assert!(!report.0["series"].as_array().unwrap().is_empty());
    let people = std::fs::read_to_string(scratch.path("who.ndjson")).unwrap();
    assert_eq!(people.lines().count(), ENDLESS_PARTICIPANTS, "{people}");
    assert!(scratch.path("hgrm/audio.one_way_latency.hgrm").is_file());
}

#[test]
fn what_the_flags_cannot_have_is_refused_before_anything_is_connected_to() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let url = format!("ws://{}", listener.local_addr().unwrap());
    let scratch = Scratch::new();
    let json = scratch.path("run.json");
    for (args, expected) in [
        (&["--subscriber", "3"][..], "'--subscribers'"),
        (&["--publishers", "0"], "nobody would join"),
        (
            &[
                "--video-publishers",
                "1",
                "--video-resolution",
                "low",
                "--video-bitrate",
                "100M",
            ],
            "cannot fill 100 Mbps: ask for",
        ),
        (
            &[
                "--video-publishers",
                "1",
                "--no-simulcast",
                "--video-bitrate",
                "10k",
            ],
            "does not fit 10 kbps: ask for",
        ),
        (
            &[
                "--publishers",
                "1",
                "--audio-frame",
                "60ms",
                "--audio-bitrate",
                "500k",
            ],
            "500 kbps is too high for audio frames of 60ms: ask for",
        ),
        (
            &["--publishers", "1", "--audio-bitrate", "7k"],
            "7 kbps is too low",
        ),
        (&["--threshold", "audio.one_way_latency.p95<150"], "unit"),
    ] {
        let finished = run(
            with_credentials(&url).args(args).arg("--json").arg(&json),
            SECRET,
        );
        assert_eq!(finished.code, Some(2), "{args:?}: {}", finished.stderr);
        assert!(
            finished.stderr.contains(expected) && finished.stderr.contains("error: "),
            "{args:?}: {}",
            finished.stderr
        );
        assert_eq!(finished.stdout, "", "{args:?}");
        assert!(!json.exists(), "{args:?} left an empty report");
    }
    assert_eq!(
        listener.accept().unwrap_err().kind(),
        ErrorKind::WouldBlock,
        "something was connected to"
    );
}

#[test]
fn a_server_without_credentials_is_a_usage_error_that_says_what_to_add() {
    let finished = run(throng().args(["--url", "ws://127.0.0.1:9"]), SECRET);
    assert_eq!(finished.code, Some(2));
    assert!(
        finished.stderr.contains("--api-key or set LIVEKIT_API_KEY"),
        "{}",
        finished.stderr
    );
}

#[test]
fn a_server_that_is_not_there_is_named() {
    let address = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let scratch = Scratch::new();
    let json = scratch.path("run.json");
    let finished = run(
        with_credentials(&format!("ws://{address}"))
            .args(ENDLESS)
            .arg("--json")
            .arg(&json),
        SECRET,
    );
    assert_eq!(finished.code, Some(1));
    assert!(
        finished.stderr.contains(&format!("ws://{address}"))
            && finished.stderr.contains("refused")
            && finished.stderr.contains("is the server running"),
        "{}",
        finished.stderr
    );
    assert!(!json.exists(), "a run that never was leaves no report");
}

/// Starts a server that answers the first bytes of every connection, and returns its URL.
fn answering(answer: impl Fn(&[u8]) -> &'static [u8] + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut asked = [0; 4096];
            // Errors are ignored, because a client that hung up has got its answer.
            let _ = stream
                .read(&mut asked)
                .and_then(|len| stream.write_all(answer(&asked[..len])));
        }
    });
    format!("ws://{address}")
}

#[test]
fn a_server_that_is_no_livekit_server_is_told_by_its_answer() {
    for (what, answer, expected) in [
        (
            "Go's TLS servers, asked in the clear",
            &b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"[..],
            "speaks TLS: use wss:// or https://",
        ),
        (
            "other TLS servers: an alert, unexpected_message",
            &[21, 3, 1, 0, 2, 2, 10],
            "One that speaks TLS wants wss:// or https://",
        ),
        (
            "a web server",
            b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\nNot Found",
            "is this a LiveKit server",
        ),
        (
            "no web server",
            b"220 mail.example.com ESMTP\r\n",
            "is this a LiveKit server",
        ),
        ("one that hangs up", b"", "is this a LiveKit server"),
    ] {
        let finished = run(
            with_credentials(&answering(move |_| answer)).args(ENDLESS),
            SECRET,
        );
        assert_eq!(finished.code, Some(1), "{what}: {}", finished.stderr);
        assert!(
            finished.stderr.contains(expected),
            "{what}: {}",
            finished.stderr
        );
    }
}

#[test]
fn a_run_that_nobody_can_join_fails_without_holding_an_empty_room() {
    let no_joins = |asked: &[u8]| {
        if asked.starts_with(b"POST") {
            // An empty protobuf message is an empty list of rooms.
            &b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"[..]
        } else {
            b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\
              Connection: close\r\n\r\nfull"
        }
    };
    let scratch = Scratch::new();
    let json = scratch.path("run.json");
    let finished = run(
        with_credentials(&answering(no_joins))
            .args(ENDLESS)
            .arg("--json")
            .arg(&json),
        SECRET,
    );
    let report = Report::read(&json, SECRET);
    assert_eq!(
        (report.result(), finished.code),
        ("FAIL", Some(99)),
        "{}",
        finished.stderr
    );
    assert!(
        report.reasons().contains("6 of 6 joins did not succeed"),
        "{}",
        report.reasons()
    );
    assert!(
        finished
            .stdout
            .contains("6 x join: the server failed (503: full)"),
        "{}",
        finished.stdout
    );
}

fn a_wrong_secret_and_a_wrong_scheme_are_told_by_the_server(server: &Server) {
    let finished = run(with_credentials(&server.url).args(ENDLESS), SECRET);
    assert_eq!(finished.code, Some(1));
    assert!(
        finished.stderr.contains("check API key and secret"),
        "{}",
        finished.stderr
    );

    let finished = run(
        with_credentials(&server.url.replace("ws://", "wss://")).args(ENDLESS),
        SECRET,
    );
    assert_eq!(finished.code, Some(1));
    assert!(
        finished
            .stderr
            .contains("does not speak TLS: use ws:// or http://"),
        "{}",
        finished.stderr
    );
    assert!(Admin::of(server).room_names().is_empty());
}

#[test]
fn too_few_files_are_refused_before_the_start_with_the_fix() {
    let script =
        "ulimit -n 256; exec \"$THRONG\" --url ws://127.0.0.1:9 --api-key k --subscribers 200";
    let finished = run(shell(script).env("LIVEKIT_API_SECRET", SECRET), SECRET);
    assert_eq!(finished.code, Some(1));
    assert!(
        finished
            .stderr
            .contains("open files and the limit is 256: ")
            && finished.stderr.contains("ulimit -n "),
        "{}",
        finished.stderr
    );
}

#[test]
fn a_report_that_cannot_be_written_is_refused_before_the_run() {
    let scratch = Scratch::new();
    for (path, expected) in [
        (scratch.path("none/run.json"), "mkdir -p "),
        (scratch.path(""), "Is a directory"),
        (
            "/proc/run.json".into(),
            "cannot write /proc/run.json: No such file or directory (os error 2)\n",
        ),
    ] {
        let finished = run(
            with_credentials("ws://127.0.0.1:9")
                .args(ENDLESS)
                .arg("--json")
                .arg(&path),
            SECRET,
        );
        assert_eq!(finished.code, Some(1), "{}", path.display());
        assert!(
            finished.stderr.contains(expected)
                && !finished.stderr.contains("ws://127.0.0.1:9 cannot"),
            "{}",
            finished.stderr
        );
    }
}

#[test]
fn a_disk_that_is_full_after_the_run_is_told_and_the_other_reports_are_written() {
    let server = Server::embedded();
    let _turn = beside_one_other();
    let scratch = Scratch::new();
    let mut command = throng();
    against(&server, &mut command)
        .args([
            "--publishers",
            "1",
            "--subscribers",
            "1",
            "--duration",
            "1",
            "--json",
            "/dev/full",
            "--participants",
        ])
        .arg(scratch.path("who.ndjson"));
    let finished = run(&mut command, &server.secret);
    assert_eq!(finished.code, Some(1));
    assert!(
        finished
            .stderr
            .contains("cannot write /dev/full: No space left on device"),
        "{}",
        finished.stderr
    );
    assert!(finished.stdout.contains("RESULT: "), "{}", finished.stdout);
    assert_eq!(
        std::fs::read_to_string(scratch.path("who.ndjson"))
            .unwrap()
            .lines()
            .count(),
        2
    );
}

/// Arguments of a run with a recording. A recording that ends early must hold whole frames and
/// pages.
const RECORDED: &str = "--room rec --publishers 1 --video-publishers 1 --video-resolution low --subscribers 1 --record";

#[test]
fn a_disk_that_fills_up_ends_recordings_and_not_the_run() {
    let server = Server::embedded();
    let _turn = beside_one_other();
    let scratch = Scratch::new();
    // 20 KiB a file: enough for four seconds of audio, and for half a second of video.
    let script = format!(
        "trap '' XFSZ; ulimit -f 40; exec \"$THRONG\" --duration 4 {RECORDED} {}",
        scratch.path("out").display()
    );
    let finished = run(against(&server, &mut shell(&script)), &server.secret);
    assert!(
        matches!(finished.code, Some(0 | 98)),
        "{}{}",
        finished.stdout,
        finished.stderr
    );
    let video = only_file(&scratch.path("out/rec"), "-video.ivf");
    let note = format!(
        "recording of {} ended early: File too large",
        video.display()
    );
    // The text report wraps its lines.
    let said = finished
        .stdout
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    assert!(
        said.contains(&note) && said.matches(" ended early: ").count() == 1,
        "{said}"
    );
    let (stated, pictures) = read_ivf(&video);
    assert!(
        stated == pictures.len() && stated > 5,
        "{stated} of {}",
        pictures.len()
    );
    let (sounds, ..) = read_opus(&only_file(&scratch.path("out/rec"), "-audio.ogg"));
    assert!(sounds.len() > 20, "{}", sounds.len());
}

#[test]
fn a_process_that_is_killed_leaves_recordings_that_can_be_read() {
    let server = Server::embedded();
    let _turn = beside_one_other();
    let scratch = Scratch::new();
    let mut command = throng();
    against(&server, &mut command)
        .args(RECORDED.split(' '))
        .arg(scratch.path("out"))
        .args(["--duration", "10m"]);
    let running = Running::start(&mut command, &server.secret);
    let room = scratch.path("out/rec");
    let deadline = Instant::now() + PATIENCE;
    let size = |ending: &str| {
        let files = std::fs::read_dir(&room).into_iter().flatten().flatten();
        let named = files.filter(|file| file.file_name().to_string_lossy().ends_with(ending));
        named
            .map(|file| file.metadata().map_or(0, |metadata| metadata.len()))
            .sum::<u64>()
    };
    while size("-video.ivf") < 40_000 || size("-audio.ogg") < 4_000 {
        assert!(Instant::now() < deadline, "nothing is recorded");
        std::thread::sleep(Duration::from_millis(50));
    }
    // Dropping sends SIGKILL.
    drop(running);
    let (stated, pictures) = read_ivf(&only_file(&room, "-video.ivf"));
    assert!(
        stated == 0 && pictures.len() > 10,
        "{stated}, {}",
        pictures.len()
    );
    let (sounds, samples, granule) = read_opus(&only_file(&room, "-audio.ogg"));
    assert!(sounds.len() > 30 && samples == granule, "{}", sounds.len());
}

#[test]
fn recordings_that_could_not_be_written_are_refused_before_anybody_joins() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("file"), "").unwrap();
    let mut command = with_credentials("ws://127.0.0.1:9");
    command.args(RECORDED.split(' ')).arg(scratch.path("file"));
    let finished = run(&mut command, SECRET);
    assert_eq!(finished.code, Some(1));
    let refusal = format!("cannot write {}: ", scratch.path("file").display());
    assert!(finished.stderr.contains(&refusal), "{}", finished.stderr);
}

fn a_server_that_dies_ends_the_run_and_what_was_measured_is_reported(server: &Server) {
    let _turn = beside_one_other();
    let endless = Endless::in_room(server, "dies");
    kill(server.pid());
    let (finished, report, scratch, took) = endless.finish(server);
    eprintln!("ended {took:?} after the server");
    // Neither the user nor this host ended the run, so it fails. A host that is too slow may make
    // it INVALID.
    assert!(
        matches!(
            (report.result(), finished.code),
            ("FAIL", Some(99)) | ("INVALID", Some(98))
        ),
        "{}",
        report.reasons()
    );
    what_was_measured_is_there(&finished, &report, &scratch);
    assert!(
        report.reasons().contains("all participants were gone"),
        "{}",
        report.reasons()
    );
    assert_eq!(
        report.counter("session", "disconnects"),
        ENDLESS_PARTICIPANTS as u64
    );
    assert!(
        report.notes().contains("may be left behind"),
        "{}",
        report.notes()
    );
}

/// Sends SIGKILL to a process that is not a child of this one.
fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, Signal::KILL).unwrap();
}

fn a_room_that_is_deleted_ends_the_run_with_the_servers_reason(server: &Server) {
    let _turn = beside_one_other();
    let endless = Endless::in_room(server, "deleted");
    endless.admin.delete("deleted");
    let (finished, report, scratch, took) = endless.finish(server);
    eprintln!("ended {took:?} after the room");
    // Neither the user nor this host ended the run, so it fails.
    assert_eq!(
        (report.result(), finished.code),
        ("FAIL", Some(99)),
        "{}",
        finished.stderr
    );
    what_was_measured_is_there(&finished, &report, &scratch);
    let failures = report.0["join_failures"].to_string();
    assert!(failures.contains("room_deleted"), "{failures}");
}

fn a_signal_ends_the_run_early_and_everything_is_written_and_cleaned_up(server: &Server) {
    let _turn = beside_one_other();
    // A lost terminal is a SIGHUP.
    for (signal, name) in [
        (Signal::INT, "SIGINT"),
        (Signal::TERM, "SIGTERM"),
        (Signal::HUP, "SIGHUP"),
    ] {
        let endless = Endless::in_room(server, name);
        endless.running.signal(signal);
        let (finished, report, scratch, took) = endless.finish(server);
        eprintln!("ended {took:?} after {name}");
        nothing_is_lost(&finished, &report, &scratch);
        assert!(report.reasons().contains(name), "{}", report.reasons());
        assert_eq!(report.counter("session", "disconnects"), 0);
        let (expected, delivered) = (
            report.counter("audio", "frames_expected"),
            report.counter("audio", "frames_delivered"),
        );
        assert_eq!(expected, delivered, "the last frames were awaited");
        assert!(Admin::of(server).room_names().is_empty());
    }
}

#[test]
fn a_signal_while_participants_join_takes_those_out_who_are_in_and_those_who_are_about_to_be() {
    let server = Server::embedded();
    let _turn = beside_one_other();
    let admin = Admin::of(&server);
    // The run did not make this room and does not delete it, so no participant is removed that way.
    let room = "stays";
    admin
        .runtime
        .block_on(admin.rooms.create_room(room, Duration::from_secs(300)))
        .unwrap();
    let scratch = Scratch::new();
    let mut command = throng();
    against(&server, &mut command)
        .args([
            "--room",
            room,
            "--subscribers",
            "2000",
            "--num-per-second",
            "20",
            "--json",
        ])
        .arg(scratch.path("run.json"));
    let running = Running::start(&mut command, &server.secret);
    admin.wait_for(room, 10);
    running.signal(Signal::INT);
    let finished = running.finish();
    assert_eq!(finished.code, Some(1), "{}", finished.stderr);
    let report = Report::read(&scratch.path("run.json"), &server.secret);
    assert!(
        report.reasons().contains("SIGINT")
            && report.reasons().contains("while participants were joining"),
        "{}",
        report.reasons()
    );
    assert!(report.counter("session", "joins_ok") >= 10);
    assert_eq!(admin.room_names(), [room]);
    let inside = admin
        .runtime
        .block_on(admin.rooms.list_participants(room))
        .unwrap();
    assert!(inside.is_empty(), "{} were left behind", inside.len());
}

#[test]
fn a_second_signal_ends_the_program_at_once() {
    let server = Server::embedded();
    let _turn = beside_one_other();
    let mut endless = Endless::in_room(&server, "twice");
    // Signals that arrive together count as one, so a busy host may need a third.
    while !endless.running.has_ended() {
        endless.running.signal(Signal::INT);
        std::thread::sleep(Duration::from_millis(100));
    }
    let finished = endless.running.finish();
    assert_eq!(finished.code, Some(1));
    assert_eq!(
        finished.stdout, "",
        "the report waits for packets that are under way: this was not waited for"
    );
    let last_words = "again: ended at once, without a report; room 'twice' stays behind";
    assert!(finished.stderr.contains(last_words), "{}", finished.stderr);
}

#[test]
fn a_signal_before_the_first_join_leaves_no_room_behind() {
    let server = Server::embedded();
    let _turn = beside_one_other();
    let mut command = throng();
    against(&server, &mut command).args(["--room-count", "2000", "--subscribers", "1"]);
    let mut running = Running::start(&mut command, &server.secret);
    let admin = Admin::of(&server);
    while admin.room_names().is_empty() {
        assert!(!running.has_ended());
    }
    running.signal(Signal::INT);
    let finished = running.finish();
    assert_eq!(finished.code, Some(1));
    // On a busy host the first participants may have joined by then.
    assert!(
        finished.stderr.contains("SIGINT") || finished.stdout.contains("SIGINT"),
        "{finished:?}"
    );
    assert!(admin.room_names().is_empty());
}

fn two_runs_in_one_room_at_once_both_finish_and_judge_only_their_own(server: &Server) {
    let _turn = beside_one_other();
    let scratch = Scratch::new();
    let start = |name: &str, seconds: &str| {
        let mut command = throng();
        against(server, &mut command)
            .args([
                "--room",
                "shared",
                "--publishers",
                "1",
                "--subscribers",
                "2",
                "--duration",
                seconds,
                "--max-loss",
                "100",
                "--json",
            ])
            .arg(scratch.path(name));
        Running::start(&mut command, &server.secret)
    };
    let admin = Admin::of(server);
    let first = start("first.json", "6");
    admin.wait_for("shared", 3);
    // The second run is still in the room when the first one ends.
    let second = start("second.json", "8");
    let ended = [first.finish(), second.finish()];
    for (finished, name) in ended.iter().zip(["first.json", "second.json"]) {
        let report = Report::read(&scratch.path(name), &server.secret);
        // If the host is too slow for a verdict, that is not the other run's fault.
        let verdict = (finished.code, report.result());
        assert!(
            [(Some(0), "PASS"), (Some(98), "INVALID")].contains(&verdict),
            "{name}: {verdict:?} {}",
            report.reasons()
        );
        assert_eq!(
            (
                report.counter("audio", "tracks_expected"),
                report.counter("audio", "tracks_live"),
                report.counter("session", "frames_misrouted")
            ),
            (2, 2, 0),
            "{name}"
        );
        assert_eq!(
            report.counter("audio", "frames_expected"),
            report.counter("audio", "frames_delivered"),
            "{name}"
        );
        // Two subscribers can receive no more than twice what their own publisher sent.
        assert!(
            report.counter("audio", "frames_delivered")
                <= 2 * report.counter("audio", "frames_sent"),
            "{name}"
        );
        let expected = if name == "first.json" {
            "room 'shared' stays: 3 participants who are not ours are in it"
        } else {
            "room 'shared' existed already and stays: whoever else is in it is not ours and not judged"
        };
        assert!(
            report.notes().contains(expected),
            "{name}: {}",
            report.notes()
        );
    }
    assert_eq!(admin.room_names(), ["shared"]);
}

#[test]
fn outputs_that_nobody_reads_stop_nothing() {
    let server = Server::embedded();
    let _turn = beside_one_other();
    for redirection in [
        "| head -1",
        ">&-",
        "2>&-",
        ">&- 2>&-",
        "2>/dev/full",
        "2>&1 | head -1",
    ] {
        let scratch = Scratch::new();
        let json = scratch.path("run.json");
        // The warning about the useless flag goes to standard error, too.
        let script = format!(
            "{{ \"$THRONG\" --publishers 1 --subscribers 1 --duration 1 --video-fps 10 --json \"$JSON\"; echo $? > \"$JSON.code\"; }} {redirection}"
        );
        let mut command = shell(&script);
        against(&server, &mut command).env("JSON", &json);
        let finished = run(&mut command, &server.secret);
        let report = Report::read(&json, &server.secret);
        let code = std::fs::read_to_string(scratch.path("run.json.code")).unwrap();
        assert!(
            ["PASS", "INVALID"].contains(&report.result()),
            "{redirection}: {}",
            report.reasons()
        );
        let expected = if report.result() == "PASS" { "0" } else { "98" };
        assert_eq!(code.trim(), expected, "{redirection}: {finished:?}");
        assert!(finished.stdout.lines().count() <= 60);
    }
}

#[test]
fn a_standard_output_that_is_full_is_an_error() {
    let server = Server::embedded();
    let _turn = beside_one_other();
    let mut command =
        shell("exec \"$THRONG\" --publishers 1 --subscribers 1 --duration 1 >/dev/full");
    let finished = run(against(&server, &mut command), &server.secret);
    assert_eq!(finished.code, Some(1));
    assert!(
        finished
            .stderr
            .contains("cannot write standard output: No space left"),
        "{}",
        finished.stderr
    );
}

#[test]
fn json_on_standard_output_has_it_for_itself() {
    let server = Server::embedded();
    let _turn = beside_one_other();
    let mut command = throng();
    against(&server, &mut command).args([
        "--publishers",
        "1",
        "--subscribers",
        "1",
        "--duration",
        "1",
        "--json",
        "-",
    ]);
    let finished = run(&mut command, &server.secret);
    let report = Report::parse(&finished.stdout);
    assert!(
        finished
            .stderr
            .contains(&format!("RESULT: {}", report.result()))
            && finished.stderr.contains("single connection (auto: "),
        "{}",
        finished.stderr
    );
}
