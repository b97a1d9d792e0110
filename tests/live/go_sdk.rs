//! Participants on LiveKit's Go SDK (`tests/go`) in one room with throng's own, on a real LiveKit
//! server and on the embedded SFU. Each side must receive what the other publishes.
//!
//! The program that runs them, the witness, is `THRONG_GO_WITNESS`, or is built with `go`, which
//! gets its modules from the network the first time. Without Go a test says so and passes, except
//! under `CI`.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;
use throng::signal::Permissions;

use crate::common::program::{Report, Scratch, against, alone, run, throng};
use crate::common::recorded::has_ffmpeg;
use crate::common::server::Server;

crate::common::on_both_servers!(go_participants_and_ours_receive_each_other);

const ROOM: &str = "gophers";
/// Layers in the order that the SDK wants, from low to high.
const LAYERS: [(&str, &str); 3] = [
    ("q.ivf", "160x90"),
    ("h.ivf", "320x180"),
    ("f.ivf", "640x360"),
];

/// Ann joins before anybody publishes, so that all tracks reach a connection that is already up. A
/// client may take new tracks only after what it agreed on before, its data channels, is there.
fn go_participants_and_ours_receive_each_other(server: &Server) {
    let (Some(program), true) = (witness(), has_ffmpeg()) else {
        return;
    };
    let _alone = alone();
    let scratch = Scratch::new();
    let media = make_media(&scratch);
    let mut ann = Witness::start(program, server, "ann", &["-data"]);
    ann.must_be_ready();
    let mut arguments = vec!["-data"];
    arguments.extend(media.iter().map(String::as_str));
    let mut bob = Witness::start(program, server, "bob", &arguments);
    bob.must_be_ready();
    let report = ours(server, &scratch);
    let (of_ann, of_bob) = (ann.leave(), bob.leave());

    let publisher = tracks(&of_ann, |who| who != "bob");
    for (reporter, of_ours) in [("ann", &publisher), ("bob", &tracks(&of_bob, |_| true))] {
        assert_eq!(of_ours.len(), 2, "{reporter}: {of_ours:?}");
        for track in of_ours {
            let kind = track["kind"].as_str().unwrap();
            let sent = report.counter(kind, "packets_sent");
            must_have_come(track, 1..=sent + SILENCE_AT_END);
        }
    }
    let of_bobs = tracks(&of_ann, |who| who == "bob");
    assert_eq!(of_bobs.len(), 2, "{of_ann}");
    of_bobs
        .iter()
        .for_each(|track| must_have_come(track, 1..=u64::MAX));
    for (witness, other) in [(&of_ann, "bob"), (&of_bob, "ann")] {
        for topic in ["reliable", "lossy"] {
            let data = &witness["data"][format!("{other} {topic}")];
            assert!(data["packets"].as_u64().unwrap_or(0) > 0, "{witness}");
            if topic == "reliable" {
                assert_eq!(data["out_of_order"], 0, "{witness}");
            }
        }
    }
    // Our subscriber got Go's packets as well, and Go's pictures can be decoded.
    for kind in ["audio", "video"] {
        let (sent, received) = (
            report.counter(kind, "packets_sent"),
            report.counter(kind, "packets_received"),
        );
        assert!(received > sent, "{kind}: {received} of {sent} and Go's");
    }
    assert!(decodes_foreign_video(&scratch.path("recorded")));
}

/// Number of silent packets with which LiveKit ends an audio track.
const SILENCE_AT_END: u64 = 11;

fn must_have_come(track: &Value, packets: std::ops::RangeInclusive<u64>) {
    let count = |name: &str| track[name].as_u64().unwrap();
    assert!(packets.contains(&count("packets")), "{track}");
    assert!(count("frames") > 0, "{track}");
    // The network here loses no packets, but a repair at the very end may be missing.
    assert!(count("lost") * 10 <= count("packets"), "{track}");
    if track["kind"] == "video" {
        assert!(
            track["codec"] == "video/VP8" && count("key_frames") > 0,
            "{track}"
        );
    } else {
        assert_eq!(track["codec"], "audio/opus", "{track}");
    }
}

fn tracks(report: &Value, of: impl Fn(&str) -> bool) -> Vec<Value> {
    let tracks = report["tracks"].as_array().unwrap().iter();
    tracks
        .filter(|track| of(track["participant"].as_str().unwrap()))
        .cloned()
        .collect()
}

/// Runs a publisher and a subscriber of our own for some seconds.
fn ours(server: &Server, scratch: &Scratch) -> Report {
    let finished = run(
        against(server, &mut throng())
            .args(["--room", ROOM, "--publishers", "1", "--subscribers", "1"])
            .args(["--video-publishers", "1", "--video-resolution", "low"])
            .args(["--duration", "4s", "--max-loss", "100", "--record"])
            .arg(scratch.path("recorded"))
            .arg("--json")
            .arg(scratch.path("run.json")),
        &server.secret,
    );
    let report = Report::read(&scratch.path("run.json"), &server.secret);
    assert!(
        matches!(finished.code, Some(0 | 98)),
        "{}\n{}",
        report.reasons(),
        finished.stderr
    );
    report
}

/// Returns whether a recorded video of Go's can be decoded. Streams that throng did not make are
/// recorded under their SSRC.
fn decodes_foreign_video(recorded: &Path) -> bool {
    let room = recorded.join(ROOM);
    let files = std::fs::read_dir(&room).unwrap().flatten();
    files
        .filter(|file| {
            let name = file.file_name().into_string().unwrap();
            name.starts_with("ssrc-") && name.ends_with(".ivf")
        })
        .any(|file| {
            let decoded = Command::new("ffmpeg")
                .args(["-v", "error", "-i"])
                .arg(file.path())
                .args(["-f", "framemd5", "-"])
                .stdin(Stdio::null())
                .output()
                .expect("ffmpeg");
            let pictures = String::from_utf8_lossy(&decoded.stdout);
            let count = pictures.lines().filter(|line| line.starts_with("0,"));
            decoded.status.success() && count.count() > 1
        })
}

/// Makes three seconds of media that end where they begin, and returns the witness's arguments.
fn make_media(scratch: &Scratch) -> Vec<String> {
    let mut files = Vec::new();
    for (name, size) in LAYERS {
        let file = scratch.path(name);
        let source = format!("testsrc2=size={size}:rate=20");
        let arguments = ["-c:v", "libvpx", "-deadline", "realtime", "-g", "20"];
        ffmpeg(&source, &arguments, &file);
        files.push(file.display().to_string());
    }
    let audio = scratch.path("a.ogg");
    let arguments = ["-ac", "2", "-c:a", "libopus", "-page_duration", "20000"];
    ffmpeg("sine=frequency=440", &arguments, &audio);
    vec![
        "-video".to_owned(),
        files.join(","),
        "-audio".to_owned(),
        audio.display().to_string(),
    ]
}

fn ffmpeg(source: &str, arguments: &[&str], file: &Path) {
    let made = Command::new("ffmpeg")
        .args(["-v", "error", "-f", "lavfi", "-i", source, "-t", "3"])
        .args(arguments)
        .arg(file)
        .stdin(Stdio::null())
        .output()
        .expect("ffmpeg");
    let said = String::from_utf8_lossy(&made.stderr);
    assert!(made.status.success(), "{said}");
}

/// A participant on the Go SDK. Dropping it ends it.
struct Witness {
    name: &'static str,
    child: Child,
    stdout: BufReader<ChildStdout>,
    stderr: Option<JoinHandle<String>>,
}

impl Witness {
    fn start(program: &Path, server: &Server, name: &'static str, arguments: &[&str]) -> Witness {
        let permissions = Permissions {
            publish_data: true,
            ..Permissions::BOTH
        };
        let token = server
            .api_key()
            .join_token(ROOM, name, name, permissions, Duration::from_secs(600))
            .unwrap();
        let mut child = Command::new(program)
            .args(["-url", &server.url])
            .args(arguments)
            .env("LIVEKIT_TOKEN", token.expose())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the witness can be run");
        let mut stderr = child.stderr.take().unwrap();
        Witness {
            name,
            stdout: BufReader::new(child.stdout.take().unwrap()),
            stderr: Some(std::thread::spawn(move || {
                let mut said = Vec::new();
                let _ = stderr.read_to_end(&mut said);
                String::from_utf8_lossy(&said).into_owned()
            })),
            child,
        }
    }

    /// Waits until the witness is ready. It has its own time-outs for joining and publishing.
    fn must_be_ready(&mut self) {
        let mut line = String::new();
        let _ = self.stdout.read_line(&mut line);
        if line.trim() != "ready" {
            self.fail(&line);
        }
    }

    /// Ends the participant, and returns its report of what it saw.
    fn leave(mut self) -> Value {
        drop(self.child.stdin.take());
        let mut line = String::new();
        let _ = self.stdout.read_line(&mut line);
        let status = self.child.wait().unwrap();
        match serde_json::from_str(&line) {
            Ok(report) if status.success() => report,
            _ => self.fail(&line),
        }
    }

    fn fail(&mut self, line: &str) -> ! {
        let _ = self.child.kill();
        let said = self.stderr.take().map(JoinHandle::join);
        panic!("{}: {line}\n{said:?}", self.name);
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the program, built once for all tests, or `None` if there is no Go.
fn witness() -> Option<&'static Path> {
    static WITNESS: OnceLock<Option<PathBuf>> = OnceLock::new();
    WITNESS.get_or_init(find_or_build).as_deref()
}

fn find_or_build() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("THRONG_GO_WITNESS") {
        let path = PathBuf::from(path);
        assert!(
            path.is_file(),
            "THRONG_GO_WITNESS is {}, which is no file",
            path.display()
        );
        return Some(path);
    }
    let has_go = Command::new("go").arg("version").output();
    if !has_go.is_ok_and(|version| version.status.success()) {
        assert!(
            std::env::var_os("CI").is_none(),
            "no go under CI: install it or set THRONG_GO_WITNESS"
        );
        eprintln!("SKIPPED: no go (put it on the PATH, or set THRONG_GO_WITNESS)");
        return None;
    }
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("go-witness");
    let built = Command::new("go")
        .args(["build", "-mod=readonly", "-buildvcs=false", "-o"])
        .arg(&path)
        .arg(".")
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/go"))
        .output()
        .expect("go ran a moment ago");
    let said = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "tests/go: {said}");
    Some(path)
}
