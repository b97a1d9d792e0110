//! A coordinator and three probers, each a process, in the same rooms. They enter each stage
//! together, and their counts add up.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::common::program::{Running, against, assert_no_secret, beside_one_other, throng};
use crate::common::server::Server;
use livekit_protocol as proto;
use rustix::process::Signal;
use serde_json::Value;
use throng::coordinator::journal::Journal;
use throng::coordinator::protocol::StageKind;
use throng::coordinator::state::{ProberState, RunPhase, RunState};
use throng::measure::{Kind, Record};
use throng::report::Verdict;
use throng::signal::rooms::RoomService;

const TOKEN: &str = "sesame-sesame-sesame-sesame";

/// A coordinator of three probers, with a journal that the test can read.
struct Leading {
    child: Child,
    stderr: BufReader<std::process::ChildStderr>,
    url: String,
    dir: PathBuf,
    secret: String,
}

impl Drop for Leading {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Result of a run.
struct Led {
    code: Option<i32>,
    stdout: String,
    stderr: String,
    report: Value,
    state: RunState,
}

impl Leading {
    /// Starts a coordinator with the load that these flags request. It knows the server and has its
    /// key; probers need neither.
    fn start(name: &str, server: &Server, flags: &str) -> Leading {
        let dir = std::env::temp_dir().join(format!("throng-hosts-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let mut command = throng();
        against(server, &mut command)
            .args([
                "--coordinator",
                "--expect=3",
                "--coordinator-bind=127.0.0.1",
                "--coordinator-port=0",
                "--coordinator-token",
                TOKEN,
            ])
            .args([
                "--journal=journal",
                "--json=report.json",
                "--missing-after=5s",
                "--duration=3s",
                "--num-per-second=20",
            ])
            .args(flags.split(' '))
            .current_dir(&dir);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut said = String::new();
        let url = loop {
            assert!(stderr.read_line(&mut said).unwrap() > 0, "it ended: {said}");
            if let Some((_, rest)) = said.split_once("Coordinator at ") {
                break rest.split(": ").next().unwrap().to_owned();
            }
        };
        Leading {
            child,
            stderr,
            url,
            dir,
            secret: server.secret.clone(),
        }
    }

    /// Starts a prober that knows only the coordinator.
    fn prober(&self, vantage: &str, flags: &[&str]) -> Running {
        let mut command: Command = throng();
        command
            .env("COORDINATOR_URL", &self.url)
            .env("COORDINATOR_TOKEN", TOKEN)
            .env("FLY_REGION", vantage);
        Running::start(
            command
                .args(["--threads", "1"])
                .args(flags)
                .current_dir(&self.dir),
            TOKEN,
        )
    }

    /// Reads its output until this text occurs.
    fn wait_for(&mut self, line: &str) {
        let mut said = String::new();
        while !said.contains(line) {
            assert!(
                self.stderr.read_line(&mut said).unwrap() > 0,
                "it ended without '{line}': {said}"
            );
        }
    }

    fn finish(mut self) -> Led {
        let mut stderr = String::new();
        self.stderr.read_to_string(&mut stderr).unwrap();
        let mut stdout = String::new();
        self.child
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut stdout)
            .unwrap();
        let code = self.child.wait().unwrap().code();
        assert_no_secret(&stderr, &self.secret);
        assert_no_secret(&stderr, TOKEN);
        let state = std::cell::RefCell::new(None);
        let read = Journal::open(
            &self.dir.join("journal"),
            |head| *state.borrow_mut() = Some(RunState::new(head.setup.clone(), 0, 0)),
            |entry| state.borrow_mut().as_mut().unwrap().apply(entry),
        );
        assert!(read.is_ok());
        Led {
            code,
            stdout,
            stderr,
            report: serde_json::from_slice(&std::fs::read(self.dir.join("report.json")).unwrap())
                .unwrap(),
            state: state.into_inner().unwrap(),
        }
    }
}

impl Led {
    /// Returns the probers in the order of their labels.
    fn probers(&self) -> Vec<ProberState> {
        let mut probers = self.state.probers().to_vec();
        probers.sort_by(|a, b| a.vantage.cmp(&b.vantage));
        probers
    }
}

/// Merges the reports of all probers on the whole run.
fn merged(probers: &[ProberState]) -> Record {
    let mut merged = Record::default();
    for prober in probers {
        let whole = prober
            .report
            .as_ref()
            .expect("a report")
            .throng
            .as_ref()
            .expect("ours");
        // A host with other work may be the limit. That does not affect the counts.
        assert!(
            matches!(whole.verdict.0, Verdict::Pass | Verdict::Invalid),
            "{}: {:?}",
            prober.vantage,
            whole.reasons
        );
        whole.totals.record.merge_into(&mut merged);
    }
    merged
}

fn finish(running: Vec<Running>) {
    for finished in running.into_iter().map(Running::finish) {
        assert!(
            matches!(finished.code, Some(0 | 98)),
            "{}\n{}",
            finished.stdout,
            finished.stderr
        );
        assert!(
            finished.stderr.contains("The coordinator has this report"),
            "{}",
            finished.stderr
        );
    }
}

/// Uses LiveKit, whose pages come in portions. `hosts_places` has both servers.
#[test]
fn what_three_hosts_account_for_adds_up_and_they_keep_step() {
    let (_turn, server) = (
        beside_one_other(),
        Server::livekit().unwrap_or_else(Server::embedded),
    );
    let server = &server;
    let flags = format!(
        "--publishers 3 --room-count 2 --ramp 1,2 --server-metrics {}",
        server.prometheus_url
    );
    let leading = Leading::start("sum", server, &flags);
    finish(
        ["ams", "fra", "iad"]
            .map(|vantage| leading.prober(vantage, &[]))
            .into(),
    );
    let led = leading.finish();
    assert!(matches!(led.code, Some(0 | 98)), "{}", led.stderr);
    let probers = led.probers();
    let merged = merged(&probers);
    // Two rooms. Each has three publishers, one on each host, and six subscribers that receive all
    // three.
    assert_eq!(
        (merged.session.joins_planned, merged.session.joins_ok),
        (18, 18)
    );
    assert_eq!(
        (
            merged.audio.tracks_published,
            merged.audio.tracks_expected,
            merged.audio.tracks_live
        ),
        (6, 36, 36)
    );
    assert!(
        merged.audio.frames_sent > 6 * 50 * 6,
        "{}",
        merged.audio.frames_sent
    );
    assert_eq!(merged.audio.frames_expected, merged.audio.frames_delivered);
    assert_eq!(
        (
            merged.session.frames_misrouted,
            merged.audio.frames_untimed,
            merged.audio.frames_duplicate
        ),
        (0, 0, 0)
    );
    assert_eq!(
        merged.audio.one_way_latency.count(),
        merged.audio.frames_delivered
    );
    let stages = led.state.stages();
    for prober in &probers {
        assert!(
            prober.starts.keys().copied().eq(0..stages.len() as u32),
            "{:?}",
            prober.starts
        );
        let report = prober.report.as_ref().unwrap();
        // The beats had the same records as the report at the end.
        for tier in &report.throng.as_ref().unwrap().tiers {
            let told = &prober.tiers[&tier.measured.stage];
            assert!(told.complete && told.record == tier.measured.record);
            let record = Record::from(&told.record);
            assert_eq!(
                record.audio.frames_expected, record.audio.frames_delivered,
                "{} {}",
                prober.vantage, told.stage
            );
            assert!(record.audio.frames_delivered > 0);
        }
        let clients: Vec<u32> = report.steps.iter().map(|step| step.clients).collect();
        assert_eq!(clients, [4, 6], "two who speak, and two or four who hear");
    }
    assert!(stages.iter().any(|stage| stage.kind == StageKind::Baseline));
    let totals = &led.report["totals"]["audio"];
    assert_eq!(totals["frames_delivered"], merged.audio.frames_delivered);
    assert_eq!(
        totals["one_way_latency"]["p99"],
        Value::from(merged.audio.one_way_latency.quantile(0.99))
    );
    the_servers_pages_and_the_series_are_of_all_hosts(&led, merged.audio.packets_received);
}

/// Checks that the coordinator reads the server's pages, and adds up the hosts' figures of each
/// second.
fn the_servers_pages_and_the_series_are_of_all_hosts(led: &Led, packets_received: u64) {
    let server = &led.report["server"];
    let steps = server["steps"].as_array().unwrap();
    let names: Vec<&str> = steps
        .iter()
        .map(|step| step["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["tier 1", "tier 2", "total"], "{server}");
    let total = &steps[2];
    assert_eq!(total["participants_peak"], 18.0, "{server}");
    assert!(
        total["packets_sent"].as_u64().unwrap() >= packets_received,
        "{packets_received}: {server}"
    );
    assert!(
        server["nodes"][0]["readings"].as_u64().unwrap() > 10,
        "{server}"
    );
    assert!(
        led.stdout.contains("\nServer     1 page, "),
        "{}",
        led.stdout
    );
    assert!(
        led.stdout.lines().all(|line| line.chars().count() <= 80),
        "{}",
        led.stdout
    );
    let series = led.report["series"].as_array().unwrap();
    let most = series
        .iter()
        .filter_map(|row| row["participants"].as_u64())
        .max();
    assert_eq!(most, Some(18), "{series:?}");
    assert!(
        series
            .iter()
            .any(|row| row["hosts"] == 3 && row["packets_received_per_second"].as_f64() > Some(0.0))
    );
    assert!(
        series
            .iter()
            .any(|row| row["server"][0]["participants"] == 18.0),
        "{series:?}"
    );
}

#[test]
fn those_who_publish_here_are_judged_by_those_who_subscribe_there() {
    let (_turn, server) = (beside_one_other(), Server::embedded());
    let video = "--publishers 1 --video-publishers 1 --video-resolution low --subscribers 3";
    let leading = Leading::start("roles", &server, video);
    finish(vec![
        leading.prober("talks", &["--role=publish"]),
        leading.prober("hears", &["--role=subscribe"]),
        leading.prober("hears-more", &["--role=subscribe", "--weight=2"]),
    ]);
    let led = leading.finish();
    let probers = led.probers();
    let merged = merged(&probers);
    let of = |at: usize| {
        Record::from(
            &probers[at]
                .report
                .as_ref()
                .unwrap()
                .throng
                .as_ref()
                .unwrap()
                .totals
                .record,
        )
    };
    let (hears, hears_more, talks) = (of(0), of(1), of(2));
    assert_eq!(
        [
            hears.session.joins_ok,
            hears_more.session.joins_ok,
            talks.session.joins_ok
        ],
        [3, 6, 1]
    );
    for kind in [Kind::Audio, Kind::Video] {
        let media = |record: &Record| std::mem::take(record.clone().media(kind));
        let (hears, talks, all) = (media(&hears), media(&talks), media(&merged));
        assert_eq!(
            (
                hears.frames_sent,
                talks.frames_expected,
                talks.tracks_expected
            ),
            (0, 0, 0)
        );
        assert_eq!((all.tracks_expected, all.tracks_live), (9, 9));
        assert!(all.frames_expected > 0 && all.frames_expected <= 9 * talks.frames_sent);
        assert_eq!(all.frames_delivered, all.frames_expected, "{kind:?}");
    }
}

#[test]
fn a_host_that_dies_leaves_what_it_said_and_the_others_go_on() {
    let (_turn, server) = (beside_one_other(), Server::embedded());
    let mut leading = Leading::start("dies", &server, "--publishers 3 --ramp 2,2,3");
    let [ams, fra, iad] = ["ams", "fra", "iad"].map(|vantage| leading.prober(vantage, &[]));
    // All subscribers so far have received media.
    leading.wait_for("tier 2");
    fra.signal(Signal::KILL);
    for finished in [ams, iad].map(Running::finish) {
        // The remaining probers must not wait for the one that is gone.
        assert!(
            finished.stderr.contains("The coordinator has this report"),
            "{}",
            finished.stderr
        );
    }
    let led = leading.finish();
    assert!(*led.state.phase() == RunPhase::Over);
    let probers = led.probers();
    assert!(probers[1].gone.is_some() && probers[1].report.is_none());
    assert!(
        !probers[1].tiers.is_empty() && !probers[1].frames.is_empty(),
        "what it said is kept"
    );
    for prober in [&probers[0], &probers[2]] {
        let whole = prober.report.as_ref().unwrap().throng.as_ref().unwrap();
        let record = Record::from(&whole.totals.record);
        assert_eq!(whole.tiers.len(), 4, "{:?}", whole.partial);
        // The lost publisher counts for the first two subscribers of this host, which were there
        // together with it. The third subscriber joins later, when that publisher is no longer
        // expected.
        assert_eq!(
            (record.audio.tracks_expected, record.audio.tracks_live),
            (8, 8)
        );
        let last = &whole.tiers[3];
        let of_last = Record::from(&last.measured.record);
        assert_eq!(
            (of_last.audio.tracks_expected, of_last.audio.tracks_live),
            (6, 6)
        );
        assert!(
            matches!(last.verdict.0, Verdict::Pass | Verdict::Invalid),
            "{:?}",
            last.reasons
        );
        assert!(
            whole
                .notes
                .iter()
                .any(|note| note.starts_with("'fra' went missing")),
            "{:?}",
            whole.notes
        );
        assert!(
            record.audio.frames_expected - record.audio.frames_delivered <= 20,
            "{:?}",
            whole.reasons
        );
    }
}

/// Each host runs one publisher and two subscribers. What the removed publisher should have sent is
/// counted as owed to all six, on every host.
#[test]
fn a_publisher_that_the_server_removes_stays_owed_on_every_host() {
    let (_turn, server) = (beside_one_other(), Server::embedded());
    let mut leading = Leading::start("removed", &server, "--publishers 3 --ramp 2,2");
    let probers = ["ams", "fra", "iad"].map(|vantage| leading.prober(vantage, &[]));
    leading.wait_for("tier 1");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let service = RoomService::new(server.endpoint(), server.api_key());
    let (room, victim) = runtime.block_on(async {
        let room = service.list_rooms().await.unwrap().remove(0).name;
        let people = service.list_participants(&room).await.unwrap();
        let publishes = |one: &proto::ParticipantInfo| !one.tracks.is_empty();
        let victim = people.into_iter().find(publishes).unwrap().identity;
        (room, victim)
    });
    server.ask(
        &room,
        "RemoveParticipant",
        serde_json::json!({ "identity": victim }),
    );
    probers.into_iter().map(Running::finish).for_each(drop);
    let led = leading.finish();
    assert_ne!(led.report["result"], "PASS", "{}", led.stdout);
    // The text shows the first reasons only, and a removal may show in the second tier alone.
    let reasons = led.report["reasons"].to_string();
    assert!(
        reasons.contains(&victim) && reasons.contains("PARTICIPANT_REMOVED"),
        "{reasons}\n{}",
        led.stdout
    );
    for prober in led.probers() {
        let whole = prober.report.as_ref().unwrap().throng.as_ref().unwrap();
        let audio = Record::from(&whole.totals.record).audio;
        // Its frames of two tiers, for two subscribers.
        assert!(
            audio.frames_lost_source > 2 * 3 * 50 && audio.frames_lost_source < 2 * 15 * 50,
            "{}: {}",
            prober.vantage,
            audio.frames_lost_source
        );
    }
}

#[test]
fn a_threshold_that_ends_the_run_does_so_for_all_and_fails_it() {
    let (_turn, server) = (beside_one_other(), Server::embedded());
    let flags = "--publishers 3 --ramp 1,2 --threshold audio.one_way_latency.p50<1us:abort";
    let leading = Leading::start("broken", &server, flags);
    let probers = ["ams", "fra", "iad"].map(|vantage| leading.prober(vantage, &[]));
    for finished in probers.map(Running::finish) {
        assert!(
            finished.stderr.contains("The coordinator has this report"),
            "{}",
            finished.stderr
        );
    }
    let led = leading.finish();
    let (who, why) = led.state.broken().expect("a threshold did not hold");
    assert!(
        why.starts_with("audio.one_way_latency.p50<1us:abort does not hold")
            && why.ends_with("and ended the run"),
        "{why}"
    );
    assert!(
        led.stderr.contains(&format!("Stopping: '{who}': {why}")),
        "{}",
        led.stderr
    );
    let names = |list: &str| -> Vec<String> {
        let list = led.report[list].as_array().unwrap().iter();
        list.map(|step| step["name"].as_str().unwrap_or_default().to_owned())
            .collect()
    };
    // The threshold did not hold in the baseline either, but it does not apply there.
    assert_eq!(names("steps"), ["tier 1"]);
    assert!(
        led.report["vantages"]
            .as_array()
            .unwrap()
            .iter()
            .all(|vantage| vantage["baseline"]["clients"] != 0)
    );
    let invalid = led.report["vantages"]
        .as_array()
        .unwrap()
        .iter()
        .any(|vantage| vantage["valid"] == false);
    if !invalid {
        assert_eq!(
            (led.code, &led.report["result"]),
            (Some(99), &"FAIL".into()),
            "{}",
            led.stdout
        );
        let first = led.report["reasons"][0].as_str().unwrap();
        assert!(
            first.starts_with(&format!("tier 1: {who}: audio.one_way_latency")),
            "{first}"
        );
    }
    assert_eq!(
        led.report["missing"],
        serde_json::json!([]),
        "{}",
        led.stdout
    );
}

#[test]
fn a_prober_that_is_ended_while_it_waits_leaves_its_place_at_once() {
    let (_turn, server) = (beside_one_other(), Server::embedded());
    let mut leading = Leading::start("leaves", &server, "--subscribers 1 --publishers 1");
    let first = leading.prober("ams", &[]);
    leading.wait_for("ams is in");
    first.signal(Signal::INT);
    leading.wait_for("its place is free again");
    let finished = first.finish();
    assert_eq!(finished.code, Some(1));
    assert!(
        finished
            .stderr
            .contains("SIGINT while the run was waited for"),
        "{}",
        finished.stderr
    );
    let second = leading.prober("ams", &[]);
    leading.wait_for("ams is in");
    drop(second);
}
