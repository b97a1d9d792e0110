//! Runs the real `throng` as users run it. All of its output is captured and searched for secrets.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::server::Server;

/// Longest wait for a run. No run here is planned to take half as long, so one that takes longer
/// hangs.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Number of runs that may go on at the same time, if none of them is tested for something that
/// another would change.
const PLACES: usize = 2;

/// State of the turns: the number of places that are taken, and the number of tests that wait for
/// all places.
static TURNS: (Mutex<(usize, usize)>, Condvar) = (Mutex::new((0, 0)), Condvar::new());

/// Held while a test's run goes on.
pub struct Turn {
    places: usize,
}

impl Turn {
    fn wait(places: usize) -> Turn {
        let (turns, changed) = &TURNS;
        let all = usize::from(places == PLACES);
        let mut state = turns.lock().unwrap_or_else(PoisonError::into_inner);
        state.1 += all;
        // Otherwise a test that needs all places could wait for ever while others enter one after
        // the other.
        while state.0 + places > PLACES || (all == 0 && state.1 > 0) {
            state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.0 += places;
        state.1 -= all;
        Turn { places }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let (turns, changed) = &TURNS;
        turns.lock().unwrap_or_else(PoisonError::into_inner).0 -= self.places;
        changed.notify_all();
    }
}

/// Waits until no other run goes on. Runs that move media take turns, because two of them on a
/// small host would measure each other.
pub fn alone() -> Turn {
    Turn::wait(PLACES)
}

/// Waits for a turn beside one other run. For tests of nothing that another run would change; most
/// of their time is waiting.
pub fn beside_one_other() -> Turn {
    Turn::wait(1)
}

/// Returns `throng` without a target, regardless of the tests' environment.
pub fn throng() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_throng"));
    clean(&mut command);
    command
}

/// Returns a shell that knows the program as `$THRONG`.
pub fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command
        .arg("-c")
        .arg(script)
        .env("THRONG", env!("CARGO_BIN_EXE_throng"));
    clean(&mut command);
    command
}

fn clean(command: &mut Command) {
    for name in [
        "LIVEKIT_URL",
        "LIVEKIT_API_KEY",
        "LIVEKIT_API_SECRET",
        "NO_COLOR",
        "RUST_LOG",
    ] {
        command.env_remove(name);
    }
}

/// Adds the server as the target, through the environment, because others on the host can see a
/// command line.
pub fn against<'a>(server: &Server, command: &'a mut Command) -> &'a mut Command {
    command
        .env("LIVEKIT_URL", &server.url)
        .env("LIVEKIT_API_KEY", &server.key)
        .env("LIVEKIT_API_SECRET", &server.secret)
}

/// A running program; dropping it ends it.
pub struct Running {
    child: Child,
    started: Instant,
    stdout: Option<JoinHandle<String>>,
    stderr: Option<JoinHandle<String>>,
    secret: String,
}

/// Result of a program that has ended.
#[derive(Debug)]
pub struct Finished {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Running {
    /// Starts `command`. `secret` must not occur in its output.
    pub fn start(command: &mut Command, secret: &str) -> Running {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program can be run");
        Running {
            stdout: child.stdout.take().map(read_all),
            stderr: child.stderr.take().map(read_all),
            child,
            started: Instant::now(),
            secret: secret.to_owned(),
        }
    }

    pub fn signal(&self, signal: Signal) {
        // A failure means that it has ended already, which is what the caller waits for.
        let _ = kill_process(Pid::from_child(&self.child), signal);
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("our own child").is_some()
    }

    /// Waits until it ends.
    pub fn finish(self) -> Finished {
        self.finish_within(PATIENCE)
    }

    /// The same with a longer time limit.
    pub fn finish_within(mut self, patience: Duration) -> Finished {
        let deadline = Instant::now() + patience;
        while !self.has_ended() {
            if Instant::now() > deadline {
                let _ = self.child.kill();
                let said = self.output();
                panic!("still running after {patience:?}: {said:#?}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let took = self.started.elapsed();
        let status = self.child.wait().expect("our own child");
        let [stdout, stderr] = self.output();
        for text in [&stdout, &stderr] {
            assert_no_secret(text, &self.secret);
        }
        assert_eq!(status.signal(), None, "ended by a signal: {stderr}");
        assert!(!stderr.contains("panicked"), "{stderr}");
        Finished {
            code: status.code(),
            stdout,
            stderr,
            took,
        }
    }

    fn output(&mut self) -> [String; 2] {
        [self.stdout.take(), self.stderr.take()].map(|reader| {
            reader.map_or_else(String::new, |reader| reader.join().unwrap_or_default())
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `command` until it ends.
pub fn run(command: &mut Command, secret: &str) -> Finished {
    Running::start(command, secret).finish()
}

fn read_all(mut from: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Asserts that the text has neither the API secret nor anything like a token: base64url of `{"..`,
/// and a dot. Histograms are base64 too, but have no dots.
pub fn assert_no_secret(text: &str, secret: &str) {
    assert!(!text.contains(secret), "the API secret is in: {text}");
    for (at, _) in text.match_indices("eyJ") {
        let after = text[at..]
            .trim_start_matches(|c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_');
        assert!(!after.starts_with('.'), "a token is in: {text}");
    }
}

/// A directory for one test, removed after it.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Scratch {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "throng-program-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let dir = std::env::temp_dir().join(name);
        fs::create_dir_all(&dir).expect("a temporary directory can be made");
        Scratch(dir)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A JSON report, checked against its schema.
pub struct Report(pub Value);

impl Report {
    pub fn read(path: &Path, secret: &str) -> Report {
        let text =
            fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_no_secret(&text, secret);
        Report::parse(&text)
    }

    pub fn parse(text: &str) -> Report {
        let report: Value =
            serde_json::from_str(text).unwrap_or_else(|error| panic!("no JSON ({error}): {text}"));
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fixtures/schema/throng-report-1.schema.json");
        let schema: Value = serde_json::from_str(&fs::read_to_string(path).expect("the schema"))
            .expect("the schema is JSON");
        let validator = jsonschema::draft202012::new(&schema).expect("a valid schema");
        let errors: Vec<String> = validator
            .iter_errors(&report)
            .map(|error| error.to_string())
            .collect();
        assert!(errors.is_empty(), "{errors:#?}");
        Report(report)
    }

    pub fn result(&self) -> &str {
        self.0["result"].as_str().expect("a result")
    }

    /// Returns all reasons, one a line.
    pub fn reasons(&self) -> String {
        lines(&self.0["reasons"])
    }

    /// Returns all notes, one a line.
    pub fn notes(&self) -> String {
        lines(&self.0["notes"])
    }

    /// Returns a counter of the totals. `scope` is `session`, `audio` or `video`.
    pub fn counter(&self, scope: &str, name: &str) -> u64 {
        self.0["totals"][scope][name]
            .as_u64()
            .unwrap_or_else(|| panic!("no counter {scope}.{name}"))
    }

    /// Returns a value of a histogram of the totals, in microseconds; `None` if it is null.
    pub fn micros(&self, scope: &str, histogram: &str, stat: &str) -> Option<u64> {
        self.0["totals"][scope][histogram][stat].as_u64()
    }
}

fn lines(list: &Value) -> String {
    let texts = list
        .as_array()
        .expect("a list")
        .iter()
        .map(|text| text.as_str().expect("a text"));
    texts.collect::<Vec<_>>().join("\n")
}

/// Starts `throng sfu` with these arguments, and waits until it serves. Returns the process, its
/// standard output, and what was read from it.
pub fn serving(command: &mut Command) -> (Child, BufReader<ChildStdout>, String) {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program");
    let mut stdout = BufReader::new(child.stdout.take().expect("a pipe"));
    let mut said = String::new();
    while !said.contains("Ctrl-C") {
        let len = stdout.read_line(&mut said).expect("text");
        assert!(len > 0, "it ended: {said}");
    }
    (child, stdout, said)
}
