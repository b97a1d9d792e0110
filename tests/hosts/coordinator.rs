//! The coordinator as a process, called over HTTP on loopback by strangers, by `voicegw`'s probers,
//! by ours, and by nobody. It is also killed, and runs out of disk.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit, setrlimit};
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};
use throng::coordinator::protocol::{BEAT_BYTES_MAX, REPORT_BYTES_MAX, VERSION};
use throng::measure::Record;
use throng::measure::wire::RecordWire;

const TOKEN: &str = "sixteen-letters-or-more";
/// Longest wait, longer than anything here takes. A test that reaches it has failed.
const PATIENCE: Duration = Duration::from_secs(120);

/// A directory for one test, removed when the test ends.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path =
            std::env::temp_dir().join(format!("throng-coordinator-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A running coordinator.
struct Coordinator {
    process: Child,
    stderr: BufReader<ChildStderr>,
    port: u16,
    /// Its output before it listened.
    greeting: String,
}

impl Coordinator {
    fn command(program: &str, scratch: &Scratch, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .args(args)
            .current_dir(&scratch.0)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Starts a coordinator on any free port. It makes its own token unless `args` say otherwise.
    fn start(scratch: &Scratch, args: &[&str]) -> Coordinator {
        let mut all = vec![
            "--coordinator",
            "--coordinator-port",
            "0",
            "--coordinator-bind",
            "127.0.0.1",
        ];
        all.extend(args);
        Coordinator::spawned(Coordinator::command(
            env!("CARGO_BIN_EXE_throng"),
            scratch,
            &all,
        ))
    }

    fn with_token(scratch: &Scratch, args: &[&str]) -> Coordinator {
        Coordinator::start(scratch, &[&["--coordinator-token", TOKEN], args].concat())
    }

    fn spawned(mut command: Command) -> Coordinator {
        let mut process = command.spawn().unwrap();
        let mut stderr = BufReader::new(process.stderr.take().unwrap());
        let mut greeting = String::new();
        let port = loop {
            let mut line = String::new();
            let read = stderr.read_line(&mut line).unwrap();
            greeting.push_str(&line);
            assert!(read > 0, "it ended: {greeting}");
            if let Some((_, rest)) = line
                .split_once("--report-to ")
                .and_then(|(_, url)| url.split_once("://127.0.0.1:"))
            {
                break rest
                    .split(|c: char| !c.is_ascii_digit())
                    .next()
                    .unwrap()
                    .parse()
                    .unwrap();
            }
        };
        Coordinator {
            process,
            stderr,
            port,
            greeting,
        }
    }

    fn request(&self, head: &str, body: &[u8]) -> (u16, Value) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let head = format!(
            "{head}host: coordinator\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        // The coordinator may refuse a request by its head and close before the body is sent.
        let _ = stream.write_all(body);
        answer(&mut stream)
    }

    fn call(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        self.request(
            &format!("{method} {path} HTTP/1.1\r\nauthorization: Bearer {TOKEN}\r\n"),
            body.as_bytes(),
        )
    }

    fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        self.call("POST", path, body)
    }

    fn get(&self, path: &str) -> (u16, Value) {
        self.call("GET", path, &Value::Null)
    }

    /// Reads its output until this text occurs, and returns what was read.
    fn hear(&mut self, text: &str) -> String {
        let mut said = String::new();
        while !said.contains(text) {
            assert!(
                self.stderr.read_line(&mut said).unwrap() > 0,
                "it ended: {said}"
            );
        }
        said
    }

    /// Waits until it has ended. Returns the rest of its output, the result included, and its exit
    /// code.
    fn end(mut self) -> (String, i32) {
        let mut said = String::new();
        self.stderr.read_to_string(&mut said).unwrap();
        self.process
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        let code = self.process.wait().unwrap().code().unwrap();
        (said, code)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
    }

    /// Kills the process with SIGKILL (`kill -9`).
    fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn answer(stream: &mut TcpStream) -> (u16, Value) {
    let mut reply = Vec::new();
    // A server that refuses a long body closes the connection while the body is still coming.
    let _ = stream.read_to_end(&mut reply);
    let text = String::from_utf8_lossy(&reply);
    let status = text
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .unwrap_or(0);
    let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    (status, serde_json::from_str(body).unwrap_or(Value::Null))
}

fn error(answer: &(u16, Value)) -> &str {
    answer.1["error"].as_str().unwrap_or_default()
}

fn prober(vantage: &str) -> Value {
    json!({ "vantage": vantage, "protocol": VERSION, "instance": format!("process of {vantage}"), "version": "test" })
}

fn id(answer: &(u16, Value)) -> String {
    assert_eq!(answer.0, 200, "{answer:?}");
    answer.1["prover_id"].as_str().unwrap().to_owned()
}

fn beat(seq: u64, ready_for: Option<u32>, tiers: &Value) -> Value {
    json!({ "seq": seq, "sent_at_us": 1_700_000_000_000_000u64, "stage": null, "ready_for": ready_for, "tiers": tiers, "live": { "participants": 3 } })
}

/// Returns what a host measured of a tier: this many joins.
fn tier(stage: u32, joins: u64) -> Value {
    let mut record = Record::default();
    record.session.joins_planned = joins;
    record.session.joins_ok = joins;
    (0..joins).for_each(|join| record.session.rtt_rtcp.record_micros(1_000 + join));
    json!({ "stage": stage, "participants": joins, "seconds": 5.0, "complete": true, "record": RecordWire::from(&record) })
}

fn final_report(vantage: &str) -> Value {
    let totals = tier(0, 4);
    json!({ "vantage": vantage, "steps": [], "throng": {
        "verdict": "PASS", "reasons": [], "partial": null, "valid": true, "invalid": [],
        "tiers": [], "totals": totals, "engine": {}, "notes": [], "failures": [] } })
}

#[test]
fn nobody_is_let_in_without_the_token_and_everybody_may_ask_whether_it_is_well() {
    let scratch = Scratch::new("token");
    let coordinator = Coordinator::with_token(&scratch, &["--expect", "2", "--subscribers", "4"]);
    for path in ["/register", "/beat/x", "/report/x", "/tokens/x", "/cancel"] {
        let none = coordinator.request(&format!("POST {path} HTTP/1.1\r\n"), b"{}");
        assert!(
            none.0 == 401 && error(&none).contains("COORDINATOR_TOKEN"),
            "{path}: {none:?}"
        );
        for wrong in [
            "sixteen-letters-or-mora",
            "",
            "sixteen-letters-or-more-and-more",
        ] {
            let denied = coordinator.request(
                &format!("POST {path} HTTP/1.1\r\nauthorization: Bearer {wrong}\r\n"),
                b"{}",
            );
            assert!(
                denied.0 == 401 && !error(&denied).contains(TOKEN),
                "{path}: {denied:?}"
            );
        }
    }
    for path in ["/job/x", "/result"] {
        assert_eq!(
            coordinator
                .request(&format!("GET {path} HTTP/1.1\r\n"), b"")
                .0,
            401,
            "{path}"
        );
    }
    for path in ["/events", "/metrics"] {
        assert_eq!(
            coordinator
                .request(&format!("GET {path} HTTP/1.1\r\n"), b"")
                .0,
            401,
            "{path}"
        );
    }
    assert_eq!(coordinator.request("GET / HTTP/1.1\r\n", b"").0, 200);
    assert_eq!(coordinator.get("/metrics").0, 200);
    let health = coordinator.request("GET /health HTTP/1.1\r\n", b"");
    assert_eq!(
        (health.0, &health.1["ok"], &health.1["phase"]),
        (200, &json!(true), &json!("gathering"))
    );
    assert_eq!(coordinator.post("/register", &prober("ams")).0, 200);
    // Whoever gave the token already has it, so it is printed nowhere.
    assert!(
        !coordinator.greeting.contains(TOKEN),
        "{}",
        coordinator.greeting
    );
    let journal = std::fs::read_dir(&scratch.0)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    assert!(!std::fs::read_to_string(journal).unwrap().contains(TOKEN));
}

#[test]
fn its_log_names_hosts_stages_and_refusals_and_no_token() {
    let scratch = Scratch::new("log");
    let journal = scratch.file("run.journal");
    let args = ["-v", "--expect", "1", "--ramp", "4", "--journal", &journal];
    let mut coordinator = Coordinator::with_token(&scratch, &args);
    let wrong = "this-is-not-the-token";
    let head = format!("POST /register HTTP/1.1\r\nauthorization: Bearer {wrong}\r\n");
    assert_eq!(coordinator.request(&head, b"{}").0, 401);
    let prober_id = id(&coordinator.post("/register", &prober("ams")));
    let job = coordinator.get(&format!("/job/{prober_id}"));
    assert_eq!(job.1["ready"], json!(true), "{job:?}");
    let ready = beat(1, Some(0), &json!([tier(2, 3)]));
    assert_eq!(
        coordinator.post(&format!("/beat/{prober_id}"), &ready).0,
        200
    );
    let log = coordinator.greeting.clone() + &coordinator.hear("ordered a stage");
    for what in [
        "INFO throng::coordinator::lead: the coordinator listens",
        "WARN throng::coordinator::server: refused a request status=401",
        "INFO throng::coordinator::log: registered vantage=\"ams\"",
        "came=1 expected=1",
        "INFO throng::coordinator::log: all probers are in",
        "INFO throng::coordinator::server: handed out a job vantage=\"ams\"",
        "measured a stage vantage=\"ams\" stage=\"tier 1\" participants=3",
        "ordered a stage stage=\"publish\"",
    ] {
        assert!(log.contains(what), "{what}: {log}");
    }
    assert!(!log.contains(TOKEN) && !log.contains(wrong), "{log}");
    assert!(!log.contains(&prober_id), "{log}");
    coordinator.kill();
    let again = Coordinator::with_token(&scratch, &args);
    let replayed = "replayed the journal journal=";
    assert!(again.greeting.contains(replayed), "{}", again.greeting);
    assert!(
        again.greeting.contains("phase=\"running\" probers=1"),
        "{}",
        again.greeting
    );
}

#[test]
fn a_token_is_made_and_printed_where_none_is_given() {
    let scratch = Scratch::new("made");
    let coordinator = Coordinator::start(&scratch, &["--expect", "1", "--subscribers", "1"]);
    let (_, rest) = coordinator
        .greeting
        .split_once("COORDINATOR_TOKEN=")
        .unwrap();
    let token = rest.split_whitespace().next().unwrap();
    assert!(token.len() >= 32, "{token}");
    let body = prober("ams").to_string();
    let register = |token: &str| {
        coordinator
            .request(
                &format!("POST /register HTTP/1.1\r\nauthorization: Bearer {token}\r\n"),
                body.as_bytes(),
            )
            .0
    };
    assert_eq!((register(TOKEN), register(token)), (401, 200));
    assert!(
        coordinator
            .greeting
            .lines()
            .all(|line| line.chars().count() <= 80),
        "{}",
        coordinator.greeting
    );
}

#[test]
fn over_tls_a_prober_comes_in_that_trusts_the_certificate_and_no_other() {
    let scratch = Scratch::new("tls");
    let (certificate, key) = (scratch.file("certificate.pem"), scratch.file("key.pem"));
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    std::fs::write(&certificate, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let args = [
        "--expect",
        "2",
        "--subscribers",
        "1",
        "--tls-cert",
        &certificate,
        "--tls-key",
        &key,
    ];
    let mut coordinator = Coordinator::with_token(&scratch, &args);
    assert!(
        coordinator
            .greeting
            .contains("COORDINATOR_URL=https://127.0.0.1:"),
        "{}",
        coordinator.greeting
    );
    let prober = |scheme: &str, vantage: &str, trusted: Option<&str>| {
        let url = format!("{scheme}://127.0.0.1:{}", coordinator.port);
        let args = [
            "--report-to",
            &url,
            "--coordinator-token",
            TOKEN,
            "--vantage",
            vantage,
        ];
        let mut command = Coordinator::command(env!("CARGO_BIN_EXE_throng"), &scratch, &args);
        Prober(
            command
                .envs(trusted.map(|file| ("SSL_CERT_FILE", file)))
                .spawn()
                .unwrap(),
        )
    };
    let mut doubts = prober("https", "ams", None);
    assert!(
        doubts
            .says()
            .contains("point SSL_CERT_FILE at its authority")
    );
    let mut plain = prober("http", "fra", None);
    assert!(plain.says().contains("write https://"));
    let mut trusts = prober("https", "iad", Some(&certificate));
    assert!(trusts.says().starts_with("in; "));
    coordinator.hear("iad is in: 1 of 2");
}

/// A prober that waits for others.
struct Prober(Child);

impl Prober {
    /// Returns the first line of its output.
    fn says(&mut self) -> String {
        let mut line = String::new();
        BufReader::new(self.0.stderr.as_mut().unwrap())
            .read_line(&mut line)
            .unwrap();
        line
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn what_makes_no_sense_is_refused_and_named() {
    let scratch = Scratch::new("nonsense");
    let coordinator = Coordinator::with_token(&scratch, &["--expect", "1", "--ramp", "2,4"]);
    for (register, says) in [
        (r#"{"vantage": ""}"#, "vantage"),
        (r#"{"vantage": "a\nb"}"#, "vantage"),
        (r#"{"vantage": "ams", "protocol": 1}"#, "instance"),
        (
            r#"{"vantage": "ams", "protocol": 1, "instance": "i", "weight": 0}"#,
            "weight",
        ),
        (
            r#"{"vantage": "ams", "protocol": 1, "instance": "i", "weight": -1}"#,
            "-1",
        ),
        (
            r#"{"vantage": "ams", "protocol": 1, "instance": "i", "role": "king"}"#,
            "king",
        ),
        ("NaN", "expected"),
        ("", "EOF"),
    ] {
        let refused = coordinator.request(
            &format!("POST /register HTTP/1.1\r\nauthorization: Bearer {TOKEN}\r\n"),
            register.as_bytes(),
        );
        assert!(
            refused.0 == 400 && error(&refused).contains(says),
            "{register}: {refused:?}"
        );
    }
    let other = coordinator.post(
        "/register",
        &json!({ "vantage": "ams", "protocol": VERSION + 1, "instance": "i" }),
    );
    assert_eq!(other.0, 409);
    let (theirs, ours) = (
        format!("version {} ", VERSION + 1),
        format!("version {VERSION}:"),
    );
    assert!(
        error(&other).contains(&theirs) && error(&other).contains(&ours),
        "{other:?}"
    );
    let id = id(&coordinator.post("/register", &prober("ams")));
    let head =
        |path: &str| format!("POST {path}/{id} HTTP/1.1\r\nauthorization: Bearer {TOKEN}\r\n");
    let live = r#""sent_at_us": 1, "stage": null, "ready_for": null"#;
    for (nonsense, says) in [
        (
            format!(r#"{{"seq": 1, {live}, "live": {{"loss": NaN}}}}"#),
            "expected",
        ),
        (
            format!(r#"{{"seq": 1, {live}, "live": {{"loss": -0.5}}}}"#),
            "live.loss",
        ),
        (
            format!(r#"{{"seq": 1, {live}, "live": {{"loss": 1e999}}}}"#),
            "out of range",
        ),
        (format!(r#"{{"seq": -1, {live}, "live": {{}}}}"#), "-1"),
        (
            format!(r#"{{"seq": 1, {live}, "live": {{}}, "frames": [[4000000, 0, 0, 1]]}}"#),
            "frames",
        ),
        (
            format!(r#"{{"seq": 1, {live}, "live": {{}}, "ready_for": 9}}"#),
            "duplicate",
        ),
        (
            format!(
                r#"{{"seq": 1, {live}, "live": {{}}, "starts": [{{"stage": 70, "skew_us": 0}}]}}"#
            ),
            "stage",
        ),
        (
            format!(
                r#"{{"seq": 1, {live}, "live": {{}}, "tiers": [{{"stage": 2, "participants": 1, "seconds": -4, "record": {{}}}}]}}"#
            ),
            "",
        ),
    ] {
        let refused = coordinator.request(&head("/beat"), nonsense.as_bytes());
        assert!(
            refused.0 == 400 && error(&refused).contains(says),
            "{nonsense}: {refused:?}"
        );
    }
    for (nonsense, says) in [
        (
            r#"{"steps": [{"clients": -2, "rtt_ms": 1, "loss_pct": 0}]}"#,
            "-2",
        ),
        (
            r#"{"steps": [{"clients": 2, "rtt_ms": -1, "loss_pct": 0}]}"#,
            "steps.rtt_ms",
        ),
        (
            r#"{"steps": [{"clients": 2, "rtt_ms": 1, "loss_pct": 101}]}"#,
            "steps.loss_pct",
        ),
        (
            r#"{"steps": [{"clients": 2, "rtt_ms": NaN, "loss_pct": 0}]}"#,
            "expected",
        ),
    ] {
        let refused = coordinator.request(&head("/report"), nonsense.as_bytes());
        assert!(
            refused.0 == 400 && error(&refused).contains(says),
            "{nonsense}: {refused:?}"
        );
    }
    for path in ["/beat", "/report", "/tokens"] {
        let body = if path == "/beat" {
            beat(1, None, &json!([]))
        } else {
            json!({ "steps": [], "from": 0, "count": 1 })
        };
        let unknown = coordinator.post(&format!("{path}/nobody"), &body);
        assert!(
            unknown.0 == 404 && error(&unknown).contains("register first"),
            "{path}: {unknown:?}"
        );
    }
    assert_eq!(coordinator.get("/job/nobody").0, 404);
    // All these requests have done it no harm.
    assert_eq!(
        coordinator
            .post(&format!("/beat/{id}"), &beat(1, Some(0), &json!([])))
            .0,
        200
    );
}

#[test]
fn a_report_of_a_gigabyte_is_refused_before_it_is_there() {
    let scratch = Scratch::new("gigabyte");
    let coordinator = Coordinator::with_token(&scratch, &["--expect", "1", "--subscribers", "1"]);
    let id = id(&coordinator.post("/register", &prober("ams")));
    let head = format!(
        "POST /report/{id} HTTP/1.1\r\nhost: c\r\nconnection: close\r\nauthorization: Bearer {TOKEN}\r\n"
    );
    // This request states its length.
    let mut stream = TcpStream::connect(("127.0.0.1", coordinator.port)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
        .write_all(format!("{head}content-length: 1000000000\r\n\r\n").as_bytes())
        .unwrap();
    let refused = answer(&mut stream);
    assert!(
        refused.0 == 413 && error(&refused).contains(&REPORT_BYTES_MAX.to_string()),
        "{refused:?}"
    );
    // These requests do not state their length, and go on for as long as the coordinator reads.
    for (path, most) in [("report", REPORT_BYTES_MAX), ("beat", BEAT_BYTES_MAX)] {
        let mut stream = TcpStream::connect(("127.0.0.1", coordinator.port)).unwrap();
        let head = head.replace("/report/", &format!("/{path}/"));
        stream
            .write_all(format!("{head}transfer-encoding: chunked\r\n\r\n").as_bytes())
            .unwrap();
        let part = [b"10000\r\n".as_slice(), &[b' '; 0x10000], b"\r\n"].concat();
        let parts = (0..1_000_000_000 / 0x10000)
            .take_while(|_| stream.write_all(&part).is_ok())
            .count();
        // Up to the refusal, plus what was on its way in two socket buffers.
        assert!(
            parts * 0x10000 < most + (32 << 20),
            "{path}: {parts} parts of 64 KiB were taken"
        );
    }
    let status =
        std::fs::read_to_string(format!("/proc/{}/status", coordinator.process.id())).unwrap();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    let peak_kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak_kib < 300 << 10, "{peak_kib} KiB");
    assert_eq!(coordinator.get("/health").0, 200);
}

#[test]
fn clients_that_say_nothing_keep_nobody_out() {
    /// Number of silent clients: more than the coordinator has places, and more than the files that
    /// many systems give a process.
    const SILENT: usize = 1_040;
    let mine = getrlimit(Resource::Nofile);
    let enough = Rlimit {
        current: mine.maximum,
        maximum: mine.maximum,
    };
    setrlimit(Resource::Nofile, enough).unwrap();
    // From one address, and from eight, so that each stays below its share.
    for addresses in [1, 8] {
        let scratch = Scratch::new(&format!("silent-{addresses}"));
        let coordinator =
            Coordinator::with_token(&scratch, &["--expect", "1", "--subscribers", "1"]);
        let silent: Vec<TcpStream> = (0..SILENT)
            .map(|index| connect_from((index % addresses) as u8 + 1, coordinator.port))
            .collect();
        for (index, mut stream) in silent.iter().enumerate() {
            // A write may fail, because the coordinator may have closed this connection to make
            // room for another.
            let _ = stream.write_all(
                &b"POST /register HTTP/1.1\r\ncontent-length: 40\r\n\r\n{"[..index % 48],
            );
        }
        assert_eq!(coordinator.post("/register", &prober("ams")).0, 200);
        drop(silent);
    }
}

/// Connects from an address of this host's loopback network.
fn connect_from(last: u8, port: u16) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let from = SocketAddr::from((Ipv4Addr::new(127, 0, 0, last), 0));
    socket.bind(&from.into()).unwrap();
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    socket.connect(&to.into()).unwrap();
    socket.into()
}

#[test]
fn registering_again_is_no_other_prober_and_labels_are_not_shared() {
    let scratch = Scratch::new("again");
    let coordinator = Coordinator::with_token(&scratch, &["--expect", "2", "--subscribers", "4"]);
    let ams = id(&coordinator.post("/register", &prober("ams")));
    assert_eq!(id(&coordinator.post("/register", &prober("ams"))), ams);
    let namesake = coordinator.post(
        "/register",
        &json!({ "vantage": "ams", "protocol": VERSION, "instance": "another" }),
    );
    assert!(
        namesake.0 == 409 && error(&namesake).contains("'ams'"),
        "{namesake:?}"
    );
    assert_eq!(
        coordinator.get(&format!("/job/{ams}")).1["ready"],
        json!(false)
    );
    id(&coordinator.post("/register", &prober("fra")));
    let full = coordinator.post("/register", &prober("sin"));
    assert!(
        full.0 == 409 && error(&full).contains("--expect"),
        "{full:?}"
    );
    let job = coordinator.get(&format!("/job/{ams}")).1;
    assert_eq!(
        (&job["ready"], &job["throng"]["vantages"]),
        (&json!(true), &json!(["ams", "fra"]))
    );
}

#[test]
fn a_page_of_another_site_leads_no_run_where_everybody_is_let_in() {
    let scratch = Scratch::new("pages");
    let coordinator = Coordinator::start(
        &scratch,
        &[
            "--no-auth",
            "--expect",
            "2",
            "--publishers",
            "1",
            "--coordinator-host",
            "load.example",
        ],
    );
    let ask = |request: &str, headers: &str| {
        let mut stream = TcpStream::connect(("127.0.0.1", coordinator.port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let head = format!("{request} HTTP/1.1\r\n{headers}connection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        answer(&mut stream)
    };
    let port = coordinator.port;
    let own = format!("host: 127.0.0.1:{port}\r\n");
    // A page in a browser on this host states its own origin.
    for origin in ["https://elsewhere.example", "http://127.0.0.1:1", "null"] {
        let refused = ask("POST /cancel", &format!("{own}origin: {origin}\r\n"));
        assert_eq!(refused.0, 403, "{origin}");
        assert!(error(&refused).contains("another site"), "{refused:?}");
    }
    // DNS rebinding: a page whose own host name resolves to this host sends that name as host and
    // origin.
    for request in ["GET /result", "POST /cancel", "GET /events", "GET /metrics"] {
        let name = format!("rebound.example:{port}");
        for origin in [String::new(), format!("origin: http://{name}\r\n")] {
            let refused = ask(request, &format!("host: {name}\r\n{origin}"));
            assert_eq!(refused.0, 403, "{request}");
            assert!(
                error(&refused).contains("--coordinator-host"),
                "{refused:?}"
            );
        }
    }
    // The coordinator's own page, and hosts that use a name that it was given.
    for headers in [
        own.clone(),
        format!("{own}origin: http://127.0.0.1:{port}\r\n"),
        format!("host: load.example:{port}\r\n"),
        format!("host: localhost:{port}\r\n"),
    ] {
        assert_eq!(ask("GET /result", &headers).0, 200, "{headers}");
    }
    let cancelled = ask(
        "POST /cancel",
        &format!("{own}origin: http://127.0.0.1:{port}\r\n"),
    );
    assert_eq!(cancelled.0, 200, "{cancelled:?}");
    coordinator.end();
}

#[test]
fn voicegw_s_probers_take_part_where_everybody_is_let_in() {
    let scratch = Scratch::new("voicegw");
    let args = [
        "--no-auth",
        "--expect",
        "2",
        "--ramp",
        "2,5",
        "--duration",
        "1",
        "--room",
        "hall",
    ];
    let coordinator = Coordinator::start(
        &scratch,
        &[&args[..], &["--target-rtt-ms", "50", "--max-loss", "2"]].concat(),
    );
    let call = |method: &str, path: &str, body: &str| {
        coordinator.request(&format!("{method} {path} HTTP/1.1\r\n"), body.as_bytes())
    };
    let first = call("POST", "/register", r#"{"vantage": "ams"}"#);
    assert_eq!((first.0, &first.1["expected"]), (200, &json!(2)));
    let first = id(&first);
    let waiting = call("GET", &format!("/job/{first}"), "").1;
    assert_eq!(
        (&waiting["ready"], &waiting["start_at"]),
        (&json!(false), &json!(null))
    );
    let second = id(&call("POST", "/register", r#"{"vantage": "fra"}"#));
    // The coordinator arms the run at its next check.
    let asked = Instant::now();
    let job = loop {
        let job = call("GET", &format!("/job/{second}"), "").1;
        if job["ready"] == json!(true) {
            break job;
        }
        assert!(asked.elapsed() < PATIENCE, "{job}");
    };
    assert!(job["start_at"].as_f64().unwrap() > 1.7e9);
    let (room, ramp, duration) = (&job["room"], &job["ramp"], job["duration"].as_f64());
    assert_eq!(
        (room, ramp, duration),
        (&json!("hall"), &json!([2, 5]), Some(1.0))
    );
    assert_eq!(
        (job["target_rtt_ms"].as_f64(), job["max_loss"].as_f64()),
        (Some(50.0), Some(2.0))
    );
    let steps = |rtt: f64| {
        let step = |clients: u32, rtt: f64| json!({ "clients": clients, "rtt_ms": rtt, "loss_pct": 0.0, "quality": "Good", "samples": 9, "rtt_stat": "mean_of_n" });
        json!({ "vantage": "x", "steps": [step(2, rtt), step(5, rtt * 2.0)] }).to_string()
    };
    let one = call("POST", &format!("/report/{first}"), &steps(12.0));
    assert_eq!(
        (one.0, &one.1),
        (200, &json!({ "ok": true, "all_reported": false }))
    );
    let result = call("GET", "/result", "").1;
    for name in [
        "vantages",
        "combined",
        "knee",
        "unmeasured_tiers",
        "target_rtt_ms",
        "max_loss",
        "dropped",
    ] {
        assert!(result.get(name).is_some(), "{name}: {result}");
    }
    let both = call("POST", &format!("/report/{second}"), &steps(30.0));
    assert_eq!(both.1, json!({ "ok": true, "all_reported": true }));
    let (said, _) = coordinator.end();
    assert!(said.contains("fra has reported"), "{said}");
}

#[test]
fn killed_and_started_again_on_its_journal_it_goes_on_with_all_that_it_had_taken() {
    let scratch = Scratch::new("killed");
    let (journal, json_file) = (scratch.file("run.journal"), scratch.file("run.json"));
    let args = [
        "--expect",
        "2",
        "--ramp",
        "4,8",
        "--duration",
        "5",
        "--journal",
        &journal,
        "--json",
        &json_file,
    ];
    let coordinator = Coordinator::with_token(&scratch, &args);
    let ids = ["ams", "fra"].map(|vantage| id(&coordinator.post("/register", &prober(vantage))));
    let job = coordinator.get(&format!("/job/{}", ids[0])).1;
    for (index, id) in ids.iter().enumerate() {
        for seq in 1..=10u64 {
            let taken = coordinator.post(
                &format!("/beat/{id}"),
                &beat(seq, Some(0), &json!([tier(2, seq + index as u64 * 10)])),
            );
            assert_eq!((taken.0, &taken.1["seq"]), (200, &json!(seq)));
        }
    }
    coordinator.kill();
    let other = Command::new(env!("CARGO_BIN_EXE_throng"))
        .args([
            "--coordinator",
            "--coordinator-bind",
            "127.0.0.1",
            "--coordinator-port",
            "0",
        ])
        .args([
            "--expect",
            "3",
            "--ramp",
            "4,8",
            "--duration",
            "5",
            "--journal",
            &journal,
        ])
        .output()
        .unwrap();
    let why = String::from_utf8_lossy(&other.stderr).into_owned();
    assert!(
        other.status.code() == Some(1) && why.contains("other flags"),
        "{why}"
    );

    // An incomplete entry, as a crash leaves it at the end of a file.
    let mut file = std::fs::OpenOptions::new()
        .append(true)
        .open(&journal)
        .unwrap();
    file.write_all(b"0badc0de {\"entry\":\"beat\",\"at_us\":17")
        .unwrap();
    drop(file);
    let coordinator = Coordinator::with_token(&scratch, &args);
    assert!(
        coordinator.greeting.contains("goes on"),
        "{}",
        coordinator.greeting
    );
    assert_eq!(
        coordinator.get(&format!("/job/{}", ids[0])).1,
        job,
        "the same run"
    );
    // The same process registers again. Then a late beat comes, and a new one.
    assert_eq!(id(&coordinator.post("/register", &prober("ams"))), ids[0]);
    assert_eq!(
        coordinator
            .post(
                &format!("/beat/{}", ids[0]),
                &beat(3, Some(0), &json!([tier(2, 3)]))
            )
            .0,
        200
    );
    let order = coordinator
        .post(&format!("/beat/{}", ids[0]), &beat(11, Some(0), &json!([])))
        .1;
    assert_eq!(order["order"]["do"], json!("start"), "{order}");
    for (vantage, id) in ["ams", "fra"].iter().zip(&ids) {
        assert_eq!(
            coordinator
                .post(&format!("/report/{id}"), &final_report(vantage))
                .0,
            200
        );
    }
    let (said, _) = coordinator.end();
    assert!(said.contains("cut short"), "{said}");
    let result: Value =
        serde_json::from_str(&std::fs::read_to_string(&json_file).unwrap()).unwrap();
    let first = &result["steps"][0]["session"];
    assert_eq!(
        first["joins_ok"],
        json!(10 + 20),
        "what both had acknowledged: {}",
        result["steps"][0]
    );
    assert!(
        std::fs::metadata(&journal).is_ok(),
        "it was asked for by name, and stays"
    );
    // A further start on the same journal has the same result, and waits for nobody.
    let again = Command::new(env!("CARGO_BIN_EXE_throng"))
        .args([
            "--coordinator",
            "--coordinator-bind",
            "127.0.0.1",
            "--coordinator-port",
            "0",
            "--coordinator-token",
            TOKEN,
        ])
        .args(args)
        .output()
        .unwrap();
    assert!(
        String::from_utf8_lossy(&again.stderr).contains("is over"),
        "{again:?}"
    );
}

#[test]
fn a_full_disk_acknowledges_nothing_and_the_run_goes_on_when_there_is_room() {
    let scratch = Scratch::new("full");
    // A file size limit stands for the full disk. Its signal is ignored, so that a write fails as
    // it does on a full disk.
    let limited = "trap '' XFSZ; ulimit -S -f 48; exec \"$0\" \"$@\"";
    let args = [
        "--coordinator",
        "--coordinator-port",
        "0",
        "--coordinator-bind",
        "127.0.0.1",
        "--coordinator-token",
        TOKEN,
    ];
    let mut command = Coordinator::command(
        "bash",
        &scratch,
        &["-c", limited, env!("CARGO_BIN_EXE_throng")],
    );
    command
        .args(args)
        .args(["--expect", "1", "--ramp", "4", "--duration", "5"]);
    let mut coordinator = Coordinator::spawned(command);
    let id = id(&coordinator.post("/register", &prober("ams")));
    let path = format!("/beat/{id}");
    let answers: Vec<(u16, Value)> = (1..=30)
        .map(|seq| coordinator.post(&path, &beat(seq, Some(0), &json!([tier(2, seq)]))))
        .collect();
    let taken = answers.iter().filter(|answer| answer.0 == 200).count() as u64;
    assert!(
        taken >= 2
            && answers[taken as usize..]
                .iter()
                .all(|answer| answer.0 == 503),
        "{taken} were taken"
    );
    let refused = answers.last().unwrap();
    assert!(
        error(refused).contains("takes nothing") && error(refused).contains("try again"),
        "{refused:?}"
    );
    let health = coordinator.get("/health");
    assert!(
        health.0 == 503 && health.1["problem"].as_str().unwrap().contains("journal"),
        "{health:?}"
    );
    // The coordinator has exactly what it acknowledged.
    let joins = |coordinator: &Coordinator| {
        let result = coordinator.get("/result").1;
        result["steps"][0]["session"]["joins_ok"]
            .as_u64()
            .unwrap_or_else(|| panic!("{result}"))
    };
    assert_eq!(joins(&coordinator), taken);
    coordinator.hear("takes nothing");
    let room = Rlimit {
        current: None,
        maximum: None,
    };
    prlimit(
        Pid::from_raw(coordinator.process.id() as i32),
        Resource::Fsize,
        room,
    )
    .unwrap();
    assert_eq!(
        coordinator
            .post(&path, &beat(31, Some(0), &json!([tier(2, 31)])))
            .0,
        200
    );
    coordinator.hear("takes entries again");
    assert_eq!(coordinator.get("/health").0, 200);
    assert_eq!(
        coordinator
            .post(&format!("/report/{id}"), &final_report("ams"))
            .0,
        200
    );
    assert_eq!(coordinator.end().1, 1, "its prober had not finished");
}

#[test]
fn whoever_is_told_to_stop_reports_and_that_ends_it() {
    let scratch = Scratch::new("cancel");
    let coordinator = Coordinator::with_token(
        &scratch,
        &["--expect", "1", "--ramp", "4", "--duration", "1h"],
    );
    let id = id(&coordinator.post("/register", &prober("ams")));
    assert_eq!(
        coordinator.post("/cancel", &Value::Null).1,
        json!({ "stopping": 1 })
    );
    let told = coordinator
        .post(&format!("/beat/{id}"), &beat(1, None, &json!([])))
        .1;
    assert_eq!(told["order"]["do"], json!("stop"), "{told}");
    assert_eq!(
        coordinator
            .post(&format!("/report/{id}"), &final_report("ams"))
            .0,
        200
    );
    let (said, code) = coordinator.end();
    assert!(code == 1 && said.contains("cancelled"), "{code}: {said}");
}

#[test]
fn a_coordinator_that_stood_still_says_so_and_the_result_does() {
    let scratch = Scratch::new("standstill");
    let mut coordinator = Coordinator::with_token(
        &scratch,
        &["--expect", "1", "--ramp", "4", "--duration", "1h"],
    );
    let id = id(&coordinator.post("/register", &prober("ams")));
    coordinator.hear("All are in.");
    coordinator.signal(Signal::STOP);
    std::thread::sleep(Duration::from_secs(3));
    coordinator.signal(Signal::CONT);
    coordinator.hear("warning: the coordinator stood still for");
    coordinator.post("/cancel", &Value::Null);
    assert_eq!(
        coordinator
            .post(&format!("/report/{id}"), &final_report("ams"))
            .0,
        200
    );
    let (said, _) = coordinator.end();
    let (_, notes) = said
        .split_once("Notes\n")
        .unwrap_or_else(|| panic!("{said}"));
    assert!(
        notes.starts_with("  the coordinator stood still for ")
            && notes.contains("its host was busy"),
        "{said}"
    );
}

#[test]
fn what_cannot_begin_says_why_and_what_to_do() {
    let scratch = Scratch::new("begin");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let missing = scratch.file("missing.pem");
    // Nothing answers at this address.
    let nowhere = format!("http://{}", taken.local_addr().unwrap());
    let tls = [
        "--expect",
        "1",
        "--subscribers",
        "1",
        "--tls-cert",
        &missing,
        "--tls-key",
        &missing,
    ];
    for (args, code, says) in [
        (
            &["--expect", "0", "--subscribers", "1"][..],
            2,
            "--expect 0 waits for nobody",
        ),
        (&["--subscribers", "1"], 2, "add --expect"),
        (&["--expect", "300", "--subscribers", "1"], 2, "at most 256"),
        (&["--expect", "2"], 2, "add --ramp"),
        (
            &["--expect", "2", "--find-knee", "--max", "20"],
            2,
            "with --ramp",
        ),
        (
            &[
                "--expect",
                "2",
                "--subscribers",
                "1",
                "--coordinator-token",
                "short",
            ],
            2,
            "16 to 256",
        ),
        (
            &[
                "--expect",
                "2",
                "--subscribers",
                "1",
                "--report-to",
                "http://h:1",
            ],
            2,
            "leave one of them out",
        ),
        (
            &["--expect", "2", "--subscribers", "600000"],
            2,
            "more than 1000000",
        ),
        (
            &["--expect", "2", "--subscribers", "1", "--vantage", "ams"],
            2,
            "for a prober",
        ),
        (
            &[
                "--expect",
                "1",
                "--subscribers",
                "1",
                "--coordinator-port",
                &port,
            ],
            1,
            "is in use",
        ),
        (
            &[
                "--expect",
                "1",
                "--subscribers",
                "1",
                "--wait-for-probers",
                "1",
            ],
            1,
            "nobody was in",
        ),
        (
            &[
                "--expect",
                "1",
                "--subscribers",
                "1",
                "--journal",
                "/proc/no/such.journal",
            ],
            1,
            "cannot write the journal",
        ),
        (&tls, 1, "--tls-cert"),
        (
            &[
                "--expect",
                "1",
                "--subscribers",
                "1",
                "--url",
                &nowhere,
                "--server-metrics",
                &nowhere,
            ],
            1,
            "cannot be read",
        ),
    ] {
        let first: &[&str] = if args.contains(&"--coordinator-port") {
            &[]
        } else {
            &["--coordinator-port", "0"]
        };
        let all = [
            &["--coordinator", "--coordinator-bind", "127.0.0.1"],
            first,
            args,
        ]
        .concat();
        let output = Coordinator::command(env!("CARGO_BIN_EXE_throng"), &scratch, &all)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.code() == Some(code) && said.contains(says),
            "{args:?}: {:?}: {said}",
            output.status
        );
    }
    assert_eq!(
        std::fs::read_dir(&scratch.0).unwrap().count(),
        0,
        "nothing is left behind"
    );
}

#[test]
fn a_rehearsal_shows_the_stages_and_begins_nothing() {
    let scratch = Scratch::new("rehearsal");
    let rehearse = |args: &str| {
        let args: Vec<&str> = "--coordinator --dry-run"
            .split(' ')
            .chain(args.split(' '))
            .collect();
        let output = Coordinator::command(env!("CARGO_BIN_EXE_throng"), &scratch, &args)
            .output()
            .unwrap();
        let [said, told] =
            [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
        (output.status.code(), said, told)
    };
    for (hosts, rows) in [
        (
            "3",
            [
                "3             1      15s",
                "6             2      15s",
                "30            10      15s",
            ],
        ),
        (
            "256",
            [
                "256             1      15s",
                "512             2      15s",
                "2,560            10      15s",
            ],
        ),
    ] {
        let (code, said, told) = rehearse(&format!("--expect {hosts} --ramp 2,10 --publishers 2"));
        assert_eq!(code, Some(0), "{told}");
        let (stages, first) = said
            .split_once("The first of them:\n")
            .expect("one host's part");
        assert!(
            stages.lines().all(|line| line.chars().count() <= 80),
            "{stages}"
        );
        for row in rows {
            assert!(stages.contains(row), "{row}: {stages}");
        }
        assert!(
            first.contains("the hosts' own server") && first.contains("nothing was connected to"),
            "{first}"
        );
    }
    let (_, said, _) = rehearse("--expect 3 --total --subscribers 8 --publishers 1 --room-count 2");
    assert!(said.contains("16           5-6      15s"), "{said}");
    let (code, said, told) = rehearse("--expect 3 --total --subscribers 1 --publishers 1");
    assert!(
        code == Some(2) && said.is_empty() && told.contains("nothing to do"),
        "{code:?} {said} {told}"
    );
    assert_eq!(
        std::fs::read_dir(&scratch.0).unwrap().count(),
        0,
        "nothing is left behind"
    );
}
