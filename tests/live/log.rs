//! The log of `throng sfu` and of a run: what it must say, and what it must not.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command};
use std::time::Duration;

use crate::common::program::{alone, assert_no_secret, run, serving, throng};
use rustix::process::{Pid, Signal, kill_process};
use throng::cli::UsageError;
use throng::sfu::server::{DEV_KEY, DEV_SECRET, ServerConfig, SfuServer};
use throng::signal::client::{JoinOptions, SignalEvent, connect};
use throng::signal::{ApiKey, Endpoint, Permissions};

const SECRET: &str = "a-secret-of-one's-own-with-32-letters";
/// Identity that clears the screen and pretends to be a log line of its own.
const IDENTITY: &str = "eve\x1b[2J\r\n\u{9b}2J left";

/// A running `throng sfu`.
struct Sfu {
    child: Child,
    url: String,
}

impl Sfu {
    fn start(args: &[&str], env: &[(&str, &str)]) -> Sfu {
        let mut command = throng();
        command.args(args).args(["--listen", "127.0.0.1:0"]);
        command.args(["--api-key", "mine", "--api-secret", SECRET]);
        command.envs(env.iter().copied());
        let (mut child, stdout, said) = serving(&mut command);
        // Nobody reads the rest of it, which is short.
        child.stdout = Some(stdout.into_inner());
        let url = said
            .split_whitespace()
            .find(|word| word.starts_with("ws://"));
        Sfu {
            url: url.unwrap().to_owned(),
            child,
        }
    }

    /// Stops the SFU, and returns all that it wrote to standard error.
    fn end(mut self) -> String {
        kill_process(Pid::from_child(&self.child), Signal::INT).unwrap();
        let mut said = String::new();
        let mut stderr = self.child.stderr.take().unwrap();
        stderr.read_to_string(&mut said).unwrap();
        assert_eq!(self.child.wait().unwrap().code(), Some(0), "{said}");
        said
    }

    /// Lets one participant join and leave, and sends a request that is refused, because the token
    /// in its query was signed with another secret. Returns that token.
    fn visit(&self) -> String {
        let lifetime = Duration::from_secs(60);
        let token = |secret: &str| {
            ApiKey::new("mine", secret)
                .join_token("den", IDENTITY, "", Permissions::BOTH, lifetime)
                .unwrap()
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let endpoint: Endpoint = self.url.parse().unwrap();
            let (own, options) = (token(SECRET), JoinOptions::default());
            let joined = connect(&endpoint, &own, &options).await;
            let (mut sender, mut receiver, _) = joined.unwrap();
            let first = receiver.next().await.unwrap();
            assert!(matches!(first, SignalEvent::Join(_)), "{first:?}");
            sender.leave().await.unwrap();
            while !matches!(
                receiver.next().await,
                Ok(SignalEvent::Closed { .. }) | Err(_)
            ) {}
        });
        let stolen = token("another-secret-that-is-of-no-use-here");
        let mut stream = TcpStream::connect(self.url.trim_start_matches("ws://")).unwrap();
        let target = format!("/rtc/validate?access_token={}", stolen.expose());
        let request = format!("GET {target} HTTP/1.1\r\nhost: sfu\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
        stolen.expose().to_owned()
    }
}

impl Drop for Sfu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the only line of a log that contains `what`.
fn line<'a>(log: &'a str, what: &str) -> &'a str {
    let mut found = log.lines().filter(|line| line.contains(what));
    match (found.next(), found.next()) {
        (Some(line), None) => line,
        (line, other) => panic!("{what}: {line:?}, {other:?} in\n{log}"),
    }
}

/// Asserts that each line is one event with its time, and has no control characters that a terminal
/// would obey.
fn assert_plain(log: &str) {
    for line in log.lines() {
        assert!(line.starts_with("20") && line.contains("Z "), "{line:?}");
        assert!(!line.chars().any(char::is_control), "{line:?}");
    }
}

#[test]
fn an_sfu_says_who_came_and_went_and_who_was_turned_away() {
    let sfu = Sfu::start(&["sfu", "-v"], &[]);
    let stolen = sfu.visit();
    let log = sfu.end();
    assert_plain(&log);
    let who = r#"room="den" identity="eve\u{1b}[2J\r\n\u{9b}2J left""#;
    for (what, level) in [
        (" joined", "INFO"),
        (" reason=", "INFO"),
        ("refused", "WARN"),
    ] {
        assert!(line(&log, what).contains(level), "{log}");
    }
    assert!(line(&log, ": joined").contains(who), "{log}");
    let left = line(&log, ": left");
    assert!(
        left.contains(who) && left.contains(r#"reason="CLIENT_INITIATED""#),
        "{log}"
    );
    assert!(line(&log, "refused").contains("status=401"), "{log}");
    line(&log, r#"opened a room room="den""#);
    line(&log, "the embedded SFU stops");
    for secret in [SECRET, &stolen, stolen.split('.').next_back().unwrap()] {
        assert_no_secret(&log, secret);
    }
}

#[test]
fn nobody_is_told_anything_who_did_not_ask() {
    for (args, env, lines) in [
        (&["sfu"][..], &[][..], 0),
        // These filters are for libraries only.
        (&["sfu"], &[("RUST_LOG", "hyper=trace,is=trace")], 0),
        (&["sfu"], &[("RUST_LOG", "warn")], 1),
        (&["-v", "sfu"], &[("RUST_LOG", "off")], 6),
    ] {
        let sfu = Sfu::start(args, env);
        sfu.visit();
        let log = sfu.end();
        assert_eq!(log.lines().count(), lines, "{args:?}, {env:?}: {log}");
    }
}

#[test]
fn a_variable_that_makes_no_sense_is_refused_before_anything_begins() {
    for args in [&["sfu"][..], &["run"], &["calibrate"]] {
        let mut command = throng();
        command.args(args).env("RUST_LOG", "throng=loud");
        let finished = run(&mut command, SECRET);
        let code = Some(i32::from(UsageError::EXIT_CODE));
        assert_eq!((finished.code, finished.stdout.as_str()), (code, ""));
        assert!(
            finished
                .stderr
                .starts_with("error: RUST_LOG: 'throng=loud' names no level: write "),
            "{}",
            finished.stderr
        );
        assert_eq!(finished.stderr.lines().count(), 1);
    }
}

#[test]
fn a_run_says_how_each_participant_came_in() {
    let _alone = alone();
    let server = SfuServer::start(ServerConfig::loopback(11)).unwrap();
    let mut command: Command = throng();
    command
        .env("LIVEKIT_URL", server.url())
        .env("LIVEKIT_API_KEY", DEV_KEY)
        .env("LIVEKIT_API_SECRET", DEV_SECRET)
        .args(["-v", "--quiet", "--room", "den", "--duration", "1s"])
        .args(["--publishers", "1", "--subscribers", "1"]);
    let finished = run(&mut command, DEV_SECRET);
    let log: Vec<&str> = (finished.stderr.lines())
        .filter(|line| line.contains("participant{room=\"den\" identity=\"throng-"))
        .collect();
    for what in [
        "signalling is connected",
        "ICE and DTLS are done",
        ": joined",
        ": left",
    ] {
        let said = log.iter().filter(|line| line.contains(what)).count();
        assert_eq!(said, 2, "{what}: {}", finished.stderr);
    }
    assert_plain(&log.join("\n"));
}
