//! The coordinator's live page in a real browser: a coordinator as a process, two probers whose
//! beats this test sends, and Chromium.
//!
//! Chromium is `THRONG_CHROMIUM`, or `chromium`, `chromium-browser` or `google-chrome` on the PATH.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::program::alone;
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use throng::coordinator::protocol::VERSION;
use throng::measure::Record;
use throng::measure::wire::RecordWire;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

const TOKEN: &str = "sixteen-letters-or-more";
const HOSTILE: &str = "<img src=x onerror=alert(1)>";
/// Limit for every wait, longer than anything here takes. A test that reaches it has failed.
const PATIENCE: Duration = Duration::from_secs(120);

/// A directory of the test's own, removed when the test ends.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("throng-page-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A process that is killed when the test ends.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a program, and reads its standard error until `find` finds something.
fn start<R>(command: &mut Command, find: impl Fn(&str) -> Option<R>) -> (Process, R) {
    let mut process = Process(
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let mut stderr = BufReader::new(process.0.stderr.take().unwrap());
    let mut said = String::new();
    let found = loop {
        let mut line = String::new();
        assert!(stderr.read_line(&mut line).unwrap() > 0, "it ended: {said}");
        said.push_str(&line);
        if let Some(found) = find(&line) {
            break found;
        }
    };
    // Nobody needs the rest, but a full pipe would stop the process.
    std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
    (process, found)
}

fn coordinator(scratch: &Scratch, port: u16) -> (Process, u16) {
    let port = port.to_string();
    let args = [
        "--coordinator",
        "--coordinator-bind",
        "127.0.0.1",
        "--coordinator-port",
        &port,
        "--coordinator-token",
        TOKEN,
    ];
    let run = [
        "--expect",
        "2",
        "--ramp",
        "2,5",
        "--duration",
        "30s",
        "--journal",
        "run.journal",
        "--no-live",
    ];
    let mut command = Command::new(env!("CARGO_BIN_EXE_throng"));
    command
        .args(args)
        .args(run)
        .current_dir(&scratch.0)
        .env_clear();
    start(&mut command, |line| {
        let (_, rest) = line.split_once("http://127.0.0.1:")?;
        rest.split(|c: char| !c.is_ascii_digit())
            .next()?
            .parse()
            .ok()
    })
}

/// Sends one request, and returns the answer's body as text.
fn call(port: u16, method: &str, path: &str, body: &Value) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let body = if body.is_null() {
        String::new()
    } else {
        body.to_string()
    };
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: coordinator\r\nauthorization: Bearer {TOKEN}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).ok()?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply).ok()?;
    reply
        .split_once("\r\n\r\n")
        .map(|(_, body)| body.to_owned())
}

fn register(port: u16, vantage: &str) -> String {
    let prober = json!({ "vantage": vantage, "protocol": VERSION, "instance": format!("process of {vantage}"), "version": "test" });
    let answer: Value =
        serde_json::from_str(&call(port, "POST", "/register", &prober).unwrap()).unwrap();
    answer["prover_id"]
        .as_str()
        .unwrap_or_else(|| panic!("{answer}"))
        .to_owned()
}

fn beat(port: u16, id: &str, seq: u64, loss: f64) {
    let live = json!({ "participants": 3, "packets_received_per_second": 1_500.0, "loss": loss, "rtt_us": 20_000, "tick_late_us_p99": 90 });
    let beat = json!({ "seq": seq, "sent_at_us": 1_700_000_000_000_000u64, "stage": null, "ready_for": null, "tiers": [], "live": live });
    call(port, "POST", &format!("/beat/{id}"), &beat);
}

fn report(port: u16, id: &str) {
    let totals = json!({ "stage": 0, "participants": 3, "seconds": 1.0, "record": RecordWire::from(&Record::default()) });
    let report = json!({ "vantage": null, "steps": [], "throng": {
        "verdict": "PARTIAL", "reasons": [], "partial": "stopped", "valid": true, "invalid": [],
        "tiers": [], "totals": totals, "engine": {}, "notes": [], "failures": [] } });
    call(port, "POST", &format!("/report/{id}"), &report);
}

fn chromium() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("THRONG_CHROMIUM") {
        return Some(path.into());
    }
    let path = std::env::var_os("PATH")?;
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let found = std::env::split_paths(&path)
        .flat_map(|dir| names.map(|name| dir.join(name)))
        .find(|path| path.is_file());
    assert!(
        found.is_some() || std::env::var_os("CI").is_none(),
        "no Chromium under CI: install it or set THRONG_CHROMIUM"
    );
    if found.is_none() {
        eprintln!("SKIPPED: no Chromium (set THRONG_CHROMIUM, or put it on the PATH)");
    }
    found
}

/// A browser, driven by the DevTools protocol.
struct Browser {
    _process: Process,
    socket: WebSocketStream<tokio::net::TcpStream>,
    calls: u64,
    session: Option<String>,
    /// Exceptions and dialogs of the page, and what its security policy forbade.
    complaints: Vec<String>,
}

impl Browser {
    async fn start(program: PathBuf, scratch: &Scratch) -> Browser {
        let mut command = Command::new(program);
        command.args([
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-port=0",
            "about:blank",
        ]);
        command.arg(format!(
            "--user-data-dir={}",
            scratch.0.join("browser").display()
        ));
        let (process, url) = start(&mut command, |line| {
            Some(
                line.trim()
                    .strip_prefix("DevTools listening on ")?
                    .to_owned(),
            )
        });
        let address = url
            .strip_prefix("ws://")
            .and_then(|rest| rest.split('/').next())
            .unwrap();
        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let (socket, _) = tokio_tungstenite::client_async(&url, stream).await.unwrap();
        let mut browser = Browser {
            _process: process,
            socket,
            calls: 0,
            session: None,
            complaints: Vec::new(),
        };
        let target = browser
            .call("Target.createTarget", json!({ "url": "about:blank" }))
            .await;
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        browser.session = browser.call("Target.attachToTarget", attach).await["sessionId"]
            .as_str()
            .map(str::to_owned);
        for domain in ["Page", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), json!({})).await;
        }
        browser
    }

    async fn call(&mut self, method: &str, params: Value) -> Value {
        let answer = self.ask(method, params).await;
        answer.unwrap_or_else(|error| panic!("{method}: {error}"))
    }

    async fn ask(&mut self, method: &str, params: Value) -> Result<Value, Value> {
        self.calls += 1;
        let mut call = json!({ "id": self.calls, "method": method, "params": params });
        if let Some(session) = &self.session {
            call["sessionId"] = json!(session);
        }
        self.socket
            .send(Message::text(call.to_string()))
            .await
            .unwrap();
        loop {
            let message = tokio::time::timeout(PATIENCE, self.socket.next())
                .await
                .unwrap()
                .unwrap()
                .unwrap();
            let Message::Text(text) = message else {
                continue;
            };
            let message: Value = serde_json::from_str(&text).unwrap();
            if message["id"] == json!(self.calls) {
                return match message.get("error") {
                    Some(error) => Err(error.clone()),
                    None => Ok(message["result"].clone()),
                };
            }
            let entry = &message["params"]["entry"];
            match message["method"].as_str() {
                Some("Runtime.exceptionThrown" | "Page.javascriptDialogOpening") => {
                    self.complaints.push(message.to_string())
                }
                // Network entries are allowed: a request fails while the coordinator is gone.
                Some("Log.entryAdded") if entry["source"] != "network" => {
                    self.complaints.push(message.to_string())
                }
                _ => {}
            }
        }
    }

    async fn go(&mut self, url: &str) {
        self.call("Page.navigate", json!({ "url": url })).await;
    }

    async fn evaluate(&mut self, expression: &str) -> Value {
        let result = self
            .call(
                "Runtime.evaluate",
                json!({ "expression": expression, "returnByValue": true }),
            )
            .await;
        assert!(result["exceptionDetails"].is_null(), "{result}");
        result["result"]["value"].clone()
    }

    /// Returns whether the expression is true. It is false on a page that is being left or loaded,
    /// which lacks what the expression asks for.
    async fn is_true(&mut self, expression: &str) -> bool {
        let params = json!({ "expression": expression, "returnByValue": true });
        let answer = self.ask("Runtime.evaluate", params).await;
        answer.is_ok_and(|answer| answer["result"]["value"] == json!(true))
    }

    /// Waits until the expression is true, and calls `meanwhile` again and again.
    async fn until(&mut self, expression: &str, mut meanwhile: impl FnMut()) {
        let began = Instant::now();
        while !self.is_true(expression).await {
            meanwhile();
            if began.elapsed() >= PATIENCE {
                let shown = self.evaluate("document.body.innerText").await;
                panic!("{expression}: {shown}");
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn resize(&mut self, width: u32) {
        let metrics =
            json!({ "width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600 });
        self.call("Emulation.setDeviceMetricsOverride", metrics)
            .await;
    }
}

/// Returns an expression that is true while the element is shown.
fn shown(id: &str) -> String {
    format!("!document.getElementById('{id}').classList.contains('hidden')")
}

#[tokio::test]
async fn the_page_shows_a_run_from_its_first_prober_to_its_verdict_through_a_coordinator_that_dies_in_between()
 {
    let _alone = alone();
    let Some(program) = chromium() else { return };
    let scratch = Scratch::new("run");
    let (first_life, port) = coordinator(&scratch, 0);
    let mut browser = Browser::start(program, &scratch).await;
    browser.resize(1_280).await;

    browser.go(&format!("http://127.0.0.1:{port}/")).await;
    browser.until(&shown("ask"), || {}).await;
    let typed = format!(
        "document.getElementById('token').value = '{TOKEN}'; document.getElementById('form').requestSubmit()"
    );
    browser.evaluate(&typed).await;
    browser
        .until(
            "document.getElementById('verdict').textContent.includes('0 of 2 probers are in')",
            || {},
        )
        .await;

    let ids = ["fra", HOSTILE].map(|vantage| register(port, vantage));
    let mut seq = 0;
    let mut beats = |port: u16| {
        seq += 1;
        beat(port, &ids[0], seq, 0.001);
        beat(port, &ids[1], seq, 0.031);
    };
    browser
        .until(
            "document.getElementById('phase').textContent === 'running'",
            || beats(port),
        )
        .await;
    browser
        .until(
            "document.querySelectorAll('#rows .chip.good').length === 2",
            || beats(port),
        )
        .await;
    let names = browser
        .evaluate("[...document.querySelectorAll('#rows .name')].map(name => name.textContent)")
        .await;
    assert_eq!(names, json!(["fra", HOSTILE]), "a label is text");
    assert_eq!(
        browser
            .evaluate("document.querySelectorAll('img').length")
            .await,
        json!(0)
    );
    browser
        .until(
            "document.querySelectorAll('#rows .alarm').length === 1",
            || beats(port),
        )
        .await;
    assert_eq!(
        browser
            .evaluate("document.querySelector('#rows .alarm').textContent")
            .await,
        json!("3.10%")
    );
    let unknown = "[...document.querySelectorAll('#rows tr:first-child td')].find(cell => cell.dataset.label === 'Latency p99').textContent";
    assert_eq!(browser.evaluate(unknown).await, json!("n/a"));
    browser
        .until(
            "[...document.querySelectorAll('#plots path')].some(path => path.getAttribute('d').includes('L'))",
            || beats(port),
        )
        .await;
    let others = "performance.getEntriesByType('resource').filter(entry => !entry.name.startsWith(location.origin)).length";
    assert_eq!(browser.evaluate(others).await, json!(0));
    browser.resize(390).await;
    browser
        .until("document.documentElement.scrollWidth <= 390", || {
            beats(port)
        })
        .await;
    let metrics = call(port, "GET", "/metrics", &Value::Null).unwrap();
    assert!(
        metrics.contains("throng_received_packets_per_second{vantage=\"fra\"} 1500\n"),
        "{metrics}"
    );

    drop(first_life);
    browser.until(&shown("link"), || {}).await;
    let word = browser
        .evaluate("document.getElementById('link').textContent")
        .await;
    assert!(
        word.as_str()
            .unwrap()
            .starts_with("No word from the coordinator"),
        "{word}"
    );
    let (second_life, again) = coordinator(&scratch, port);
    assert_eq!(again, port);
    browser
        .until(&format!("!({})", shown("link")), || beats(port))
        .await;
    assert_eq!(
        browser
            .evaluate("document.querySelectorAll('#rows tr').length")
            .await,
        json!(2),
        "its journal had them"
    );

    call(port, "POST", "/cancel", &Value::Null);
    browser
        .until(
            "document.getElementById('phase').textContent === 'stopping'",
            || beats(port),
        )
        .await;
    ids.iter().for_each(|id| report(port, id));
    browser
        .until(
            "document.getElementById('phase').textContent === 'over'",
            || {},
        )
        .await;
    let verdict = browser
        .evaluate("document.querySelector('#verdict strong').textContent")
        .await;
    assert_eq!(verdict, json!("PARTIAL"));
    browser
        .until(
            "document.getElementById('link').textContent.startsWith('The run is over')",
            || {},
        )
        .await;
    drop(second_life);
    assert_eq!(browser.complaints, Vec::<String>::new());
}
