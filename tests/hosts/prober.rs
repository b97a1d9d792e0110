//! A prober as a process, with a scripted coordinator, and an SFU that takes its media.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::common::program::{Finished, against, alone, run, throng};
use crate::common::scripted::{Asked, Scripted};
use crate::common::server::Server;
use serde_json::{Value, json};
use throng::cli;
use throng::coordinator::protocol::{
    Job, ProberReport, SharedStage, StageKind, VERSION, WireJudging,
};
use throng::plan::scenario::Scenario;
use throng::plan::{Placement, VantagePlan};
use throng::report::Judging;

fn unix_us() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_micros() as u64
}

/// A prober that has ended, and its directory, in which it may keep its report.
struct Probing {
    dir: PathBuf,
    finished: Finished,
    asked: Vec<Asked>,
}

impl Drop for Probing {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn probe(
    name: &str,
    server: &Server,
    args: &[&str],
    script: impl FnMut(&Asked) -> (u16, Value) + Send + 'static,
) -> Probing {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let (scripted, url) = runtime.block_on(Scripted::start(script));
    let dir = std::env::temp_dir().join(format!("throng-prober-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let mut command = throng();
    command
        .args(["--report-to", &url, "--vantage", "fra", "--threads", "1"])
        .args(args)
        .current_dir(&dir);
    let finished = run(against(server, &mut command), &server.secret);
    Probing {
        dir,
        finished,
        asked: scripted.asked(),
    }
}

impl Probing {
    /// Asserts that the run passed, or was invalid because the host had other work.
    fn passed_unless_the_host_was_busy(&self) {
        let finished = &self.finished;
        assert!(
            matches!(finished.code, Some(0 | 98)),
            "{}\n{}",
            finished.stdout,
            finished.stderr
        );
    }

    fn report(&self) -> ProberReport {
        let posted = self
            .asked
            .iter()
            .rfind(|asked| asked.what.starts_with("POST /report/"))
            .expect("a report");
        serde_json::from_value(posted.body.clone()).unwrap()
    }

    fn kept(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&self.dir).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    fn of(&self, what: &str) -> Vec<&Asked> {
        self.asked
            .iter()
            .filter(|asked| asked.what == what)
            .collect()
    }
}

#[test]
fn voicegw_s_own_coordinator_gets_a_step_for_each_tier() {
    let (_alone, server) = (alone(), Server::embedded());
    let start_at = unix_us() as f64 / 1e6 + 2.0;
    let probing = probe(
        "voicegw",
        &server,
        &["--num-per-second=20"],
        move |asked| match (asked.what.as_str(), asked.before) {
            ("POST /register", _) => (200, json!({"prover_id": 0, "expected": 1})),
            ("GET /job/0", polls) => (
                200,
                json!({
                    "room": "voicegw-sfu", "ramp": [1, 3], "duration": 2, "target_rtt_ms": 500, "max_loss": 2.0,
                    "start_at": if polls > 0 { json!(start_at) } else { Value::Null }, "ready": polls > 0,
                }),
            ),
            ("POST /report/0", _) => (200, json!({"ok": true, "all_reported": true})),
            _ => (404, json!({"detail": "Not Found"})),
        },
    );
    probing.passed_unless_the_host_was_busy();
    assert!(
        probing
            .finished
            .stderr
            .contains("The coordinator has this report"),
        "{}",
        probing.finished.stderr
    );
    assert_eq!(probing.of("POST /register")[0].body["vantage"], "fra");
    let report = probing.report();
    assert!(report.throng.is_none() && report.vantage.as_deref() == Some("fra"));
    assert_eq!(
        report
            .steps
            .iter()
            .map(|step| step.clients)
            .collect::<Vec<_>>(),
        [1, 3]
    );
    let last = &report.steps[1];
    // One publisher and two subscribers that receive it.
    assert_eq!(
        (
            last.loss_pct,
            last.quality.as_deref(),
            last.rtt_stat.as_deref()
        ),
        (Some(0.0), Some("Excellent"), Some("p95"))
    );
    assert!(
        last.rtt_ms.is_some_and(|rtt| rtt < 500.0) && last.samples > Some(0),
        "{last:?}"
    );
    assert!(
        probing.of("POST /beat/0").is_empty(),
        "it would not know what that is"
    );
    assert!(probing.kept().is_empty());
}

/// Returns a job with one publisher of audio and at most two subscribers, all of one prober.
fn job(patience: Duration, hold: Duration) -> Value {
    let line = "throng --url ws://127.0.0.1:1 --api-key k --api-secret s --publishers 1 --subscribers 2 --num-per-second 20 --connection dual";
    let Ok(cli::CliCommand::Run(run)) =
        cli::parse_with(line.split(' ').map(Into::into), &|_| None, 1, 7)
    else {
        panic!("a good command line")
    };
    let stage = |kind, name: &str, subscribers: u32| SharedStage {
        kind,
        name: name.into(),
        subscribers,
        warmup_us: 0,
        hold_us: hold.as_micros() as u64,
        spread_us: None,
    };
    let job = Job {
        protocol: VERSION,
        run_tag: 0xC0FF_EE02,
        vantages: vec!["fra".into()],
        me: 0,
        scenario: Scenario {
            seed: 5,
            ..run.plan.scenario.clone()
        },
        placement: Placement {
            vantages: vec![VantagePlan::default()],
            rooms_apart: false,
        },
        stages: vec![
            stage(StageKind::Publish, "publish", 0),
            stage(StageKind::Baseline, "baseline", 1),
            stage(StageKind::Tier, "tier 1", 2),
            stage(StageKind::Stop, "stop", 0),
            stage(StageKind::Leave, "leave", 0),
        ],
        judging: WireJudging::of(&Judging::default()),
        url: None,
        tokens: false,
        rooms_made: false,
        patience_us: patience.as_micros() as u64,
    };
    json!({
        "room": "r", "ramp": [2], "duration": hold.as_secs_f64(), "target_rtt_ms": 50, "max_loss": 1.0, "start_at": null, "ready": true,
        "throng": job,
    })
}

/// Scripts a coordinator with one prober. Each stage begins when the prober is ready for it.
fn lead(job: Value) -> impl FnMut(&Asked) -> (u16, Value) + Send + 'static {
    move |asked| match asked.what.as_str() {
        "POST /register" => (
            200,
            json!({"prover_id": "p1", "expected": 1, "protocol": VERSION}),
        ),
        "GET /job/p1" => (200, job.clone()),
        "POST /beat/p1" => (200, beaten(asked, None)),
        "POST /report/p1" => (200, json!({"ok": true, "all_reported": true})),
        other => panic!("{other}"),
    }
}

/// Returns the answer to a beat. `stop` is the reason for ending the run.
fn beaten(asked: &Asked, stop: Option<&str>) -> Value {
    let (now, of) = (unix_us(), |field: &str| {
        asked.body[field].as_i64().unwrap_or(-1)
    });
    let order = match stop {
        Some(reason) => json!({"do": "stop", "reason": reason}),
        None if of("ready_for") > of("stage") => {
            json!({"do": "start", "stage": of("ready_for"), "at_us": now})
        }
        None => json!({"do": "wait"}),
    };
    json!({"seq": of("seq"), "life": 3, "received_at_us": now, "replied_at_us": unix_us(), "order": order})
}

#[test]
fn a_coordinator_of_ours_hears_all_that_a_run_counts_and_what_it_says_at_the_end_agrees() {
    let (_alone, server) = (alone(), Server::embedded());
    let probing = probe(
        "ours",
        &server,
        &[],
        lead(job(Duration::from_secs(60), Duration::from_secs(3))),
    );
    probing.passed_unless_the_host_was_busy();
    assert!(
        probing.finished.stderr.contains("vantage 'fra', 1 of 1"),
        "{}",
        probing.finished.stderr
    );
    let report = probing.report();
    let whole = report.throng.unwrap();
    assert_eq!(
        (report.baseline.unwrap().clients, report.steps[0].clients),
        (2, 3)
    );
    assert_eq!(
        whole
            .tiers
            .iter()
            .map(|tier| tier.measured.stage)
            .collect::<Vec<_>>(),
        [1, 2]
    );
    let beats = probing.of("POST /beat/p1");
    let seqs: Vec<u64> = beats
        .iter()
        .map(|beat| beat.body["seq"].as_u64().unwrap())
        .collect();
    assert!(seqs.is_sorted_by(|a, b| a < b));
    // The report has the same record of a tier as the last beat about it.
    for tier in &whole.tiers {
        let stage = u64::from(tier.measured.stage);
        let mut told = beats
            .iter()
            .flat_map(|beat| beat.body["tiers"].as_array().unwrap());
        let last = told.rfind(|told| told["stage"] == stage).expect("told of");
        assert_eq!(last["complete"], true);
        assert_eq!(
            last["record"],
            serde_json::to_value(&tier.measured.record).unwrap()
        );
    }
    let starts: Vec<&Value> = beats
        .iter()
        .flat_map(|beat| beat.body["starts"].as_array().unwrap())
        .collect();
    // The start of the last stage may be missing, because the report can arrive before it. Nothing
    // is measured in that stage.
    for stage in 0..4 {
        assert!(
            starts.iter().any(|start| start["stage"] == stage),
            "{stage}"
        );
    }
    let totals = throng::measure::Record::from(&whole.totals.record);
    let frames = beats
        .iter()
        .flat_map(|beat| beat.body["frames"].as_array().unwrap())
        .next_back()
        .unwrap();
    assert_eq!(*frames, json!([0, 0, 0, totals.audio.frames_sent, 0]));
    assert_eq!(totals.audio.frames_delivered, totals.audio.frames_expected);
    assert!(probing.kept().is_empty());
}

#[test]
fn a_run_that_is_cancelled_ends_and_says_what_it_saw() {
    let (_alone, server) = (alone(), Server::embedded());
    let mut as_led = lead(job(Duration::from_secs(60), Duration::from_secs(600)));
    let mut holding = 0;
    let probing = probe("cancelled", &server, &[], move |asked| {
        holding += usize::from(
            asked.body["tiers"]
                .as_array()
                .is_some_and(|tiers| !tiers.is_empty()),
        );
        match asked.what.as_str() {
            "POST /beat/p1" if holding > 1 => (200, beaten(asked, Some("somebody pressed Ctrl-C"))),
            _ => as_led(asked),
        }
    });
    assert_eq!(
        probing.finished.code,
        Some(1),
        "{}",
        probing.finished.stderr
    );
    assert!(
        probing.finished.stdout.contains("somebody pressed Ctrl-C"),
        "{}",
        probing.finished.stdout
    );
    let whole = probing.report().throng.unwrap();
    assert!(whole.partial.unwrap().contains("somebody pressed Ctrl-C"));
    assert!(
        throng::measure::Record::from(&whole.totals.record)
            .audio
            .frames_delivered
            > 0
    );
}

#[test]
fn a_coordinator_that_is_lost_ends_the_load_and_the_report_is_kept() {
    let (_alone, server) = (alone(), Server::embedded());
    let mut as_led = lead(job(Duration::from_secs(3), Duration::from_secs(600)));
    let mut holding = false;
    let probing = probe("lost", &server, &[], move |asked| {
        holding |= asked.body["tiers"]
            .as_array()
            .is_some_and(|tiers| !tiers.is_empty());
        if holding {
            (503, json!({"error": "the disk is full"}))
        } else {
            as_led(asked)
        }
    });
    assert_eq!(
        probing.finished.code,
        Some(1),
        "{}",
        probing.finished.stderr
    );
    assert!(
        probing
            .finished
            .stdout
            .contains("the coordinator has not answered for"),
        "{}",
        probing.finished.stdout
    );
    let [kept] = &probing.kept()[..] else {
        panic!("{:?}", probing.kept())
    };
    assert_eq!(
        kept.file_name(),
        Path::new("throng-prober-fra-c0ffee02.json").file_name()
    );
    assert!(
        probing
            .finished
            .stderr
            .contains("throng-prober-fra-c0ffee02.json"),
        "{}",
        probing.finished.stderr
    );
    assert!(
        probing.finished.stderr.contains("the disk is full"),
        "{}",
        probing.finished.stderr
    );
    let report: ProberReport = serde_json::from_slice(&std::fs::read(kept).unwrap()).unwrap();
    assert!(
        report
            .throng
            .unwrap()
            .partial
            .unwrap()
            .contains("has not answered")
    );
    assert!(probing.of("POST /report/p1").len() > 1, "it was tried");
}

#[test]
fn what_cannot_be_played_is_told_to_both() {
    let (_alone, server) = (alone(), Server::embedded());
    let mut job = job(Duration::from_secs(60), Duration::from_secs(1));
    job["throng"]["placement"]["vantages"][0]["role"] = json!("publish");
    let probing = probe("impossible", &server, &[], lead(job));
    assert_eq!(probing.finished.code, Some(1));
    assert!(
        probing.finished.stderr.contains("no host subscribes"),
        "{}",
        probing.finished.stderr
    );
    assert!(
        probing
            .report()
            .throng
            .unwrap()
            .partial
            .unwrap()
            .contains("no host subscribes")
    );
}
