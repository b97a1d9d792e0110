//! A seed makes a schedule of faults for a coordinator and three probers, each a process. The tests
//! check that the result contains everything that was acknowledged, that the run ends, and that its
//! exit code and its list of missing probers are right.
//!
//! The faults: `kill -9` of a prober, and of the coordinator, which is started again on its
//! journal; a prober that is stopped for a while (SIGSTOP); a path that lets nothing through for a
//! while; a journal that cannot be written for a while; and on every path lost answers, and beats
//! that come twice, late and out of order. Steps of a clock are not among them, because all
//! processes of a host share its wall clock. The seeds of `coordinator::state` and
//! `coordinator::clock` have them, in virtual time.
//!
//! Between each prober and the coordinator is a relay. It makes the faults of the path, and logs
//! what was sent and what was acknowledged.

use std::cell::RefCell;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::common::led::{Account, Coordinator, TOKEN};
use crate::common::program::{Report, Running, Scratch, against, beside_one_other, throng};
use crate::common::server::Server;
use axum::body::Bytes;
use axum::extract::State as Shared;
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use serde_json::{Value, json};
use throng::coordinator::journal::Journal;
use throng::coordinator::state::{RunPhase, RunState};
use throng::seeded::Seeded;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;

const VANTAGES: [&str; 3] = ["ams", "fra", "iad"];
/// Last stage at which a fault begins: the one in which publishers stop, with reports on their way
/// soon.
const LAST_STAGE: u64 = 3;
/// Limit on outages of the coordinator in one schedule.
const OUTAGES_MAX: usize = 2;

/// Lengths of the faults, and the silence after which the coordinator goes on without a prober.
#[derive(Clone, Copy)]
struct Scale {
    stopped: Duration,
    cut: Duration,
    /// Time until the coordinator is started again, or until its journal can be written again.
    away: Duration,
    missing_after: Duration,
    /// Whether the answer to a last report may get lost, too. Its prober then tries for four times
    /// `missing_after` to send it to a coordinator that has ended.
    last_answer_too: bool,
}

/// Faults so short that only killed probers are lost.
const SHORT: Scale = Scale {
    stopped: Duration::from_secs(2),
    cut: Duration::from_secs(2),
    away: Duration::from_secs(1),
    // Probers that lose several beats in a row pause for up to 5 s.
    missing_after: Duration::from_secs(10),
    last_answer_too: false,
};

/// Faults so long that a stopped or cut-off prober is lost, and comes back when others have gone
/// on.
const LONG: Scale = Scale {
    stopped: Duration::from_secs(10),
    cut: Duration::from_secs(15),
    away: Duration::from_secs(10),
    missing_after: Duration::from_secs(7),
    last_answer_too: true,
};

#[test]
fn three_schedules_of_faults_lose_nothing_that_was_acknowledged() {
    let _turn = beside_one_other();
    let server = Server::embedded();
    std::thread::scope(|scope| {
        for seed in [1, 2, 3] {
            let server = &server;
            scope.spawn(move || go_through(seed, SHORT, server));
        }
    });
}

/// `THRONG_SEEDS=0..100 cargo test --test hosts faults:: -- --ignored --nocapture` takes 75
/// minutes. Any range of seeds repeats its schedules. Every other seed has long faults.
#[test]
#[ignore = "takes 75 minutes"]
fn a_hundred_schedules_of_faults_lose_nothing_that_was_acknowledged() {
    let seeds = std::env::var("THRONG_SEEDS").unwrap_or_else(|_| "0..100".to_owned());
    let (first, end) = seeds.split_once("..").expect("THRONG_SEEDS=0..100");
    let server = Server::embedded();
    for seed in first.parse().expect("a number")..end.parse().expect("a number") {
        go_through(seed, if seed % 2 == 0 { LONG } else { SHORT }, &server);
    }
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    ProberKilled(usize),
    CoordinatorKilled,
    ProberStopped(usize),
    Cut(usize),
    JournalFull,
}

/// The faults of a run.
#[derive(Debug)]
struct Schedule {
    /// Faults in order of time: the stage at which each begins, the time after the start of that
    /// stage, and the fault.
    faults: Vec<(u64, Duration, Fault)>,
    on_missing: &'static str,
    /// Percentage of requests that lose their answer. `twice` is the percentage that is sent twice,
    /// and `late` the percentage that comes after the next request.
    unanswered: u64,
    twice: u64,
    late: u64,
}

impl Schedule {
    fn of(seed: u64) -> Schedule {
        let mut chance = Seeded::new(seed);
        let mut faults: Vec<(u64, Duration, Fault)> = (0..=1 + chance.below(2))
            .map(|_| {
                let who = chance.below(VANTAGES.len() as u64) as usize;
                let fault = match chance.below(5) {
                    0 => Fault::ProberKilled(who),
                    1 => Fault::CoordinatorKilled,
                    2 => Fault::ProberStopped(who),
                    3 => Fault::Cut(who),
                    _ => Fault::JournalFull,
                };
                (
                    chance.below(LAST_STAGE + 1),
                    Duration::from_millis(chance.below(2_500)),
                    fault,
                )
            })
            .collect();
        faults.sort_by_key(|(stage, into, _)| (*stage, *into));
        // A load is not guaranteed to go on for longer than four times `missing_after` without a
        // coordinator, and three long outages in a row exceed that.
        let mut outages = 0;
        faults.retain(|(_, _, fault)| {
            outages += usize::from(matches!(
                fault,
                Fault::CoordinatorKilled | Fault::JournalFull
            ));
            outages <= OUTAGES_MAX
                || !matches!(fault, Fault::CoordinatorKilled | Fault::JournalFull)
        });
        Schedule {
            faults,
            on_missing: if chance.chance(70) {
                "continue"
            } else {
                "stop"
            },
            unanswered: chance.below(15),
            twice: chance.below(30),
            late: chance.below(15),
        }
    }
}

/// The path between a prober and the coordinator.
struct Way {
    state: Mutex<Passing>,
    cut: watch::Sender<bool>,
}

struct Passing {
    /// URL of the coordinator.
    to: String,
    chance: Seeded,
    unanswered: u64,
    twice: u64,
    late: u64,
    last_answer_too: bool,
    /// Beats that were held back, to be passed on after a later request.
    held: Vec<Request>,
    /// Requests that were passed on to the coordinator, in this order.
    log: Vec<Passed>,
}

#[derive(Clone)]
struct Request {
    method: Method,
    path: String,
    token: String,
    body: Bytes,
}

struct Passed {
    path: String,
    body: Value,
    /// Whether the prober was told that it had been accepted.
    acknowledged: bool,
}

impl Way {
    fn new(seed: u64, schedule: &Schedule, scale: Scale) -> Arc<Way> {
        Arc::new(Way {
            state: Mutex::new(Passing {
                to: String::new(),
                chance: Seeded::new(seed),
                unanswered: schedule.unanswered,
                twice: schedule.twice,
                late: schedule.late,
                last_answer_too: scale.last_answer_too,
                held: Vec::new(),
                log: Vec::new(),
            }),
            cut: watch::Sender::new(false),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Passing> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn open(self: Arc<Way>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("a bound socket"));
        let app = axum::Router::new()
            .fallback(pass)
            .layer(axum::extract::DefaultBodyLimit::disable())
            .with_state(self);
        tokio::spawn(async move {
            axum::serve(listener, app)
                .await
                .expect("it serves for ever")
        });
        url
    }

    /// Waits until the path is no longer cut. As with TCP, what is sent meanwhile gets through
    /// afterwards, if its sender still waits.
    async fn is_open(&self) {
        let _ = self.cut.subscribe().wait_for(|cut| !cut).await;
    }

    /// Passes a request on. Returns the coordinator's answer, if there is one, with the request's
    /// place in the log.
    async fn forward(&self, request: &Request) -> Option<(u16, Vec<u8>, usize)> {
        let (to, index) = {
            let mut state = self.lock();
            state.log.push(Passed {
                path: request.path.clone(),
                body: serde_json::from_slice(&request.body).unwrap_or(Value::Null),
                acknowledged: false,
            });
            (state.to.clone(), state.log.len() - 1)
        };
        let mut stream = TcpStream::connect(to.trim_start_matches("http://"))
            .await
            .ok()?;
        let Request {
            method,
            path,
            token,
            body,
        } = request;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: coordinator\r\nauthorization: {token}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream
            .write_all(&[head.as_bytes(), body].concat())
            .await
            .ok()?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.ok()?;
        let text = String::from_utf8_lossy(&answer);
        let (head, body) = text.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        // An answer that was cut short by the end of the coordinator counts as none.
        serde_json::from_str::<Value>(body).ok()?;
        Some((status, body.as_bytes().to_vec(), index))
    }
}

async fn pass(
    Shared(way): Shared<Arc<Way>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> (StatusCode, Vec<u8>) {
    let nobody = || (StatusCode::BAD_GATEWAY, b"{}".to_vec());
    let request = Request {
        method,
        path: uri.path().to_owned(),
        token: headers
            .get(header::AUTHORIZATION)
            .and_then(|token| token.to_str().ok())
            .unwrap_or_default()
            .to_owned(),
        body,
    };
    let [unanswered, twice, late] = {
        let mut state = way.lock();
        let may_be_lost = state.last_answer_too || !request.path.starts_with("/report/");
        let percents = [
            if may_be_lost { state.unanswered } else { 0 },
            state.twice,
            state.late,
        ];
        percents.map(|percent| state.chance.chance(percent))
    };
    way.is_open().await;
    if late && request.path.starts_with("/beat/") {
        way.lock().held.push(request);
        return nobody();
    }
    let answer = way.forward(&request).await;
    let mut again = std::mem::take(&mut way.lock().held);
    again.extend(twice.then(|| request.clone()));
    for request in again {
        way.forward(&request).await;
    }
    way.is_open().await;
    match answer {
        Some((status, body, index)) if !unanswered => {
            way.lock().log[index].acknowledged = status == 200;
            (StatusCode::from_u16(status).expect("a status"), body)
        }
        _ => nobody(),
    }
}

/// A run in progress.
struct Run<'a> {
    seed: u64,
    scale: Scale,
    server: &'a Server,
    scratch: Scratch,
    schedule: Schedule,
    coordinator: Coordinator,
    ways: Vec<Arc<Way>>,
    /// Running probers; `None` if killed.
    probers: Vec<Option<Running>>,
    fates: Vec<Fate>,
}

/// Expected fate of a prober.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Stays,
    /// Either, because its report was on its way.
    StaysOrIsLost,
    IsLost,
}

fn coordinator(
    server: &Server,
    directory: &Path,
    schedule: &Schedule,
    scale: Scale,
) -> Coordinator {
    // A file size limit will stand for a full disk. Its signal is ignored, so that a write fails as
    // it does on a full disk.
    let mut command = Command::new("bash");
    against(server, &mut command)
        .args([
            "-c",
            "trap '' XFSZ; exec \"$0\" \"$@\"",
            env!("CARGO_BIN_EXE_throng"),
        ])
        .current_dir(directory);
    let (on_missing, missing_after) = (
        schedule.on_missing,
        format!("{}s", scale.missing_after.as_secs()),
    );
    let flags = "--coordinator-bind=127.0.0.1 --expect=3 --journal=journal --json=run.json --publishers=3 --ramp=2 --duration=3s \
                 --num-per-second=20 --max-loss=100 --on-missing";
    let mut flags: Vec<&str> = flags.split_whitespace().collect();
    flags.extend([on_missing, "--missing-after", &missing_after]);
    Coordinator::start(&mut command, &flags)
}

fn go_through(seed: u64, scale: Scale, server: &Server) {
    let (began, schedule) = (Instant::now(), Schedule::of(seed));
    eprintln!("seed {seed}: {schedule:?}");
    let runtime = Runtime::new().expect("threads");
    let scratch = Scratch::new();
    let mut coordinator = coordinator(server, &scratch.path(""), &schedule, scale);
    let to = coordinator.url().expect("it listens");
    let ways: Vec<Arc<Way>> = (0..VANTAGES.len() as u64)
        .map(|at| Way::new(seed * 10 + at, &schedule, scale))
        .collect();
    let probers = ways.iter().zip(VANTAGES).map(|(way, vantage)| {
        way.lock().to.clone_from(&to);
        let mut command = throng();
        command
            .env("COORDINATOR_URL", runtime.block_on(way.clone().open()))
            .env("COORDINATOR_TOKEN", TOKEN)
            .args(["--threads", "1", "--vantage", vantage])
            .current_dir(scratch.path(""));
        Some(Running::start(&mut command, TOKEN))
    });
    let probers = probers.collect();
    let mut run = Run {
        seed,
        scale,
        server,
        schedule,
        coordinator,
        ways,
        probers,
        fates: vec![Fate::Stays; VANTAGES.len()],
        scratch,
    };
    for (stage, into, fault) in run.schedule.faults.clone() {
        run.wait_for_stage(stage);
        std::thread::sleep(into);
        // Only if the run still goes on.
        if !run.coordinator.has_ended() && !run.all_have_reported() {
            run.suffer(fault);
        }
    }
    run.finish();
    eprintln!(
        "seed {seed}: well, after {:.0} s",
        began.elapsed().as_secs_f64()
    );
}

impl Run<'_> {
    fn log<R>(&self, who: usize, look: impl FnOnce(&[Passed]) -> R) -> R {
        look(&self.ways[who].lock().log)
    }

    fn wait_for_stage(&mut self, stage: u64) {
        let is_there = |passed: &Passed| {
            passed.body["stage"]
                .as_u64()
                .is_some_and(|reached| reached >= stage)
        };
        while !(0..VANTAGES.len()).any(|who| self.log(who, |log| log.iter().any(is_there))) {
            if self.coordinator.has_ended() || self.all_have_reported() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn has_reported(&self, who: usize) -> bool {
        self.log(who, |log| {
            log.iter().any(|passed| passed.path.starts_with("/report/"))
        })
    }

    fn all_have_reported(&self) -> bool {
        (0..VANTAGES.len()).all(|who| self.has_reported(who) || self.fates[who] == Fate::IsLost)
    }

    /// Notes the expected fate of a prober that falls silent, for this long or for good (`None`).
    fn is_silent(&mut self, who: usize, silence: Option<Duration>) {
        let is_short = silence.is_some_and(|silence| silence < self.scale.missing_after);
        self.fates[who] = match (is_short, self.has_reported(who), self.fates[who]) {
            (true, _, fate) => fate,
            (false, _, Fate::IsLost) | (false, false, _) => Fate::IsLost,
            (false, true, _) => Fate::StaysOrIsLost,
        };
    }

    fn suffer(&mut self, fault: Fault) {
        match fault {
            Fault::ProberKilled(who) => {
                self.is_silent(who, None);
                // Dropping it sends SIGKILL (`kill -9`).
                self.probers[who] = None;
            }
            Fault::ProberStopped(who) => {
                let stopped = self.scale.stopped;
                let Some(prober) = &self.probers[who] else {
                    return;
                };
                prober.signal(Signal::STOP);
                self.is_silent(who, Some(stopped));
                std::thread::sleep(stopped);
                self.probers[who]
                    .iter()
                    .for_each(|prober| prober.signal(Signal::CONT));
            }
            Fault::Cut(who) => {
                self.ways[who].cut.send_replace(true);
                self.is_silent(who, Some(self.scale.cut));
                std::thread::sleep(self.scale.cut);
                self.ways[who].cut.send_replace(false);
            }
            Fault::CoordinatorKilled => {
                self.coordinator.kill();
                std::thread::sleep(self.scale.away);
                self.coordinator = coordinator(
                    self.server,
                    &self.scratch.path(""),
                    &self.schedule,
                    self.scale,
                );
                if let Some(to) = self.coordinator.url() {
                    self.ways
                        .iter()
                        .for_each(|way| way.lock().to.clone_from(&to));
                }
            }
            Fault::JournalFull => {
                let pid = Pid::from_raw(self.coordinator.pid());
                let limit = |current| {
                    // Fails if the coordinator has ended, and it then needs no limit.
                    let _ = prlimit(
                        pid,
                        Resource::Fsize,
                        Rlimit {
                            current,
                            maximum: None,
                        },
                    );
                };
                limit(Some(
                    std::fs::metadata(self.scratch.path("journal"))
                        .expect("a journal")
                        .len(),
                ));
                std::thread::sleep(self.scale.away);
                limit(None);
            }
        }
    }

    fn finish(self) {
        let Run {
            seed,
            schedule,
            coordinator,
            ways,
            probers,
            fates,
            scratch,
            server,
            ..
        } = self;
        let about = format!("seed {seed}, {schedule:?}, {fates:?}");
        let (code, said) = coordinator.finish();
        for prober in probers.into_iter().flatten() {
            let finished = prober.finish_within(Duration::from_secs(150));
            assert!(
                matches!(finished.code, Some(0 | 1 | 98 | 99)),
                "{about}: {}",
                finished.stderr
            );
        }
        let state = replayed(&scratch.path("journal"));
        let report = Report::read(&scratch.path("run.json"), &server.secret).0;
        let about = format!("{about}\n{said}");
        assert!(*state.phase() == RunPhase::Over, "{about}");
        let mut sum = Account::default();
        for (way, vantage) in ways.iter().zip(VANTAGES) {
            let kept = state
                .probers()
                .iter()
                .find(|prober| prober.vantage == vantage);
            let kept = kept.unwrap_or_else(|| panic!("{vantage} is not in the journal: {about}"));
            witness(&way.lock().log, kept, &format!("{vantage}: {about}"));
            let record = |record| Account::read(&serde_json::to_value(record).expect("plain data"));
            match kept
                .report
                .as_ref()
                .and_then(|report| report.throng.as_ref())
            {
                Some(whole) => sum.add(&record(&whole.totals.record)),
                None => kept
                    .tiers
                    .values()
                    .for_each(|tier| sum.add(&record(&tier.record))),
            }
        }
        sum.settle();
        let told = Account::read(&report["totals"]);
        let differences: Vec<String> = told
            .differences(&sum)
            .into_iter()
            .filter(|line| !line.starts_with("engine."))
            .collect();
        assert!(differences.is_empty(), "{differences:#?} {about}");

        // The missing probers, and the result of the run with them.
        let names = |list: &Value, name: fn(&Value) -> &Value| -> Vec<String> {
            let entries = list.as_array().expect("a list").iter();
            entries
                .map(|entry| name(entry).as_str().expect("a label").to_owned())
                .collect()
        };
        let missing = names(&report["missing"], |missing| &missing["vantage"]);
        assert_eq!(names(&report["dropped"], |label| label), missing, "{about}");
        for (vantage, fate) in VANTAGES.iter().zip(&fates) {
            let is_missing = missing.iter().any(|label| label == vantage);
            match fate {
                Fate::Stays => assert!(!is_missing, "{vantage}: {} {about}", report["missing"]),
                Fate::StaysOrIsLost => {}
                Fate::IsLost => assert!(is_missing, "{vantage}: {about}"),
            }
        }
        let result = report["result"].as_str().expect("a result");
        let expected = match result {
            "PASS" => 0,
            "PARTIAL" => 1,
            "INVALID" => 98,
            _ => 99,
        };
        assert_eq!(code, Some(expected), "{result}: {about}");
        let is_whole = matches!(result, "PASS" | "INVALID");
        assert_eq!(
            is_whole,
            missing.is_empty(),
            "{result}: {} {about}",
            report["reasons"]
        );
    }
}

fn replayed(journal: &Path) -> RunState {
    let state = RefCell::new(None);
    let read = Journal::open(
        journal,
        |head| *state.borrow_mut() = Some(RunState::new(head.setup.clone(), 0, 0)),
        |entry| {
            state
                .borrow_mut()
                .as_mut()
                .expect("a head comes first")
                .apply(entry)
        },
    );
    assert!(read.is_ok(), "the journal can be read");
    state.into_inner().expect("a head")
}

/// Asserts that the coordinator has kept everything that was acknowledged, or something newer that
/// was sent.
fn witness(log: &[Passed], kept: &throng::coordinator::state::ProberState, about: &str) {
    let seq = |passed: &Passed| passed.body["seq"].as_u64().expect("a number");
    let beats = || {
        log.iter()
            .filter(|passed| passed.path.starts_with("/beat/"))
    };
    let acknowledged = beats().filter(|passed| passed.acknowledged);
    let of_stage = |passed: &Passed, stage: u64| {
        let tiers = passed.body["tiers"].as_array().cloned().unwrap_or_default();
        tiers.into_iter().find(|tier| tier["stage"] == stage)
    };
    for stage in 0..=LAST_STAGE + 1 {
        let taken = acknowledged
            .clone()
            .filter(|passed| of_stage(passed, stage).is_some())
            .map(seq)
            .max();
        let Some(taken) = taken else { continue };
        let tier = kept.tiers.get(&(stage as u32));
        let tier = tier.unwrap_or_else(|| panic!("nothing of stage {stage} is kept: {about}"));
        let record = serde_json::to_value(&tier.record).expect("plain data");
        let said = beats()
            .filter(|passed| seq(passed) >= taken)
            .filter_map(|passed| of_stage(passed, stage));
        assert!(
            said.into_iter().any(|said| said["record"] == record),
            "stage {stage}: {about}"
        );
    }
    let report = log
        .iter()
        .rfind(|passed| passed.path.starts_with("/report/") && passed.acknowledged);
    if let Some(report) = report {
        let whole = kept
            .report
            .as_ref()
            .and_then(|report| report.throng.as_ref());
        let whole = whole.unwrap_or_else(|| panic!("no report: {about}"));
        let record = serde_json::to_value(&whole.totals.record).expect("plain data");
        assert_eq!(report.body["throng"]["totals"]["record"], record, "{about}");
        assert_ne!(record, json!({}));
    }
}
