//! Tiers and the search for a capacity, as whole runs. What each tier reports must be true, and a
//! participant that has left owes nothing afterwards.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::common::on_both_servers;
use crate::common::program::{
    Finished, PATIENCE, Report, Running, Scratch, against, alone, throng,
};
use crate::common::server::Server;
use rustix::process::Signal;
use serde_json::Value;
use throng::sfu::bottleneck::BottleneckLimit;
use throng::sfu::server::{DEV_KEY, DEV_SECRET, ServerConfig};

on_both_servers!(
    tiers_grow_and_shrink_and_who_left_owes_nothing,
    who_left_can_come_again_under_the_same_name,
);

const NO_SECRET: &str = "no secret in this run";

/// Time for a search, which takes as many points as it needs.
const SEARCH_PATIENCE: Duration = Duration::from_secs(900);

fn run(command: &mut Command, args: &str, secret: &str) -> (Finished, Report) {
    let scratch = Scratch::new();
    let report = scratch.path("run.json");
    command
        .args(args.split(' ').map(|arg| arg.replace('@', " ")))
        .arg("--json")
        .arg(&report);
    let finished = Running::start(command, secret).finish_within(SEARCH_PATIENCE);
    let report = Report::read(&report, secret);
    (finished, report)
}

/// Runs throng, and asserts that the run passes, or is INVALID because the host was too slow. What
/// arrived must be the same either way.
fn passes(server: &Server, args: &str) -> Report {
    let (finished, report) = run(against(server, &mut throng()), args, &server.secret);
    let expected = if report.result() == "INVALID" { 98 } else { 0 };
    assert_eq!(
        finished.code,
        Some(expected),
        "{}\n{}{}",
        report.reasons(),
        finished.stdout,
        finished.stderr
    );
    assert!(
        finished
            .stdout
            .lines()
            .all(|line| line.chars().count() <= 80),
        "{}",
        finished.stdout
    );
    report
}

fn tiers(report: &Report) -> &[Value] {
    report.0["steps"].as_array().expect("steps")
}

fn count(of: &Value, scope: &str, counter: &str) -> u64 {
    of[scope][counter]
        .as_u64()
        .unwrap_or_else(|| panic!("no {scope}.{counter}"))
}

/// Returns for a tier: participants expected and healthy, joins planned and timed, audio
/// subscriptions expected and live, video subscriptions expected and live.
fn account(tier: &Value) -> [u64; 8] {
    let timed = |stat| tier["session"]["join"][stat].as_u64().unwrap_or(0);
    [
        tier["participants"].as_u64().unwrap(),
        count(tier, "session", "participants_healthy"),
        count(tier, "session", "joins_planned"),
        timed("expected").min(timed("count")),
        count(tier, "audio", "tracks_expected"),
        count(tier, "audio", "tracks_live"),
        count(tier, "video", "tracks_expected"),
        count(tier, "video", "tracks_live"),
    ]
}

/// Asserts that every subscriber got each frame that was made for it while it was in the room: in
/// each tier, and over the whole run with the time between its tiers.
fn every_frame_came(report: &Report) {
    for of in tiers(report).iter().chain([&report.0["totals"]]) {
        for kind in ["audio", "video"] {
            let [expected, delivered] =
                ["frames_expected", "frames_delivered"].map(|counter| count(of, kind, counter));
            assert_eq!(delivered, expected, "{kind} of {}", of["name"]);
            assert!(expected > 0, "{kind} of {}", of["name"]);
        }
        assert_eq!(count(of, "session", "disconnects"), 0);
    }
}

fn tiers_grow_and_shrink_and_who_left_owes_nothing(server: &Server) {
    let _alone = alone();
    // No frame is 10 s late. The threshold breaks only if a window takes frames for lost that are
    // still to be counted.
    let threshold = "--threshold audio.one_way_latency.p90<10s@for@2s";
    let args = format!(
        "--ramp 2,5,3 --duration 4 --warmup 1 --publishers 2 --video-publishers 1 --video-resolution low {threshold}"
    );
    let report = passes(server, &args);
    let accounts: Vec<_> = tiers(&report).iter().map(account).collect();
    assert_eq!(
        accounts,
        [
            [4, 4, 4, 4, 4, 4, 2, 2],
            [7, 7, 3, 3, 10, 10, 5, 5],
            [5, 5, 0, 0, 6, 6, 3, 3]
        ]
    );
    every_frame_came(&report);
    let names: Vec<_> = tiers(&report)
        .iter()
        .map(|tier| (&tier["name"], &tier["subscribers"]))
        .collect();
    assert_eq!(
        format!("{names:?}"),
        r#"[(String("tier 1"), Number(2)), (String("tier 2"), Number(5)), (String("tier 3"), Number(3))]"#
    );
    assert_eq!(
        (
            report.counter("session", "joins_ok"),
            report.counter("session", "participants_total")
        ),
        (7, 7)
    );
    assert_eq!(report.0["unmeasured_tiers"], Value::Array(vec![]));
    if report.result() == "PASS" {
        let knee = &report.0["knee"];
        assert_eq!(
            (&knee["answer"], &knee["subscribers"]),
            (&"all_passed".into(), &5.into())
        );
    }
}

fn who_left_can_come_again_under_the_same_name(server: &Server) {
    let _alone = alone();
    let report = passes(
        server,
        "--ramp 3,1,3 --duration 3 --warmup 1 --publishers 1 --video-publishers 1 --video-resolution low",
    );
    let accounts: Vec<_> = tiers(&report).iter().map(account).collect();
    assert_eq!(
        accounts,
        [
            [4, 4, 4, 4, 3, 3, 3, 3],
            [2, 2, 0, 0, 1, 1, 1, 1],
            [4, 4, 2, 2, 3, 3, 3, 3]
        ]
    );
    every_frame_came(&report);
    let joins = |stat| report.micros("session", "join", stat);
    assert_eq!(
        (
            report.counter("session", "joins_ok"),
            joins("expected"),
            joins("count")
        ),
        (6, Some(6), Some(6))
    );
    assert_eq!(
        (
            report.counter("session", "participants_total"),
            report.counter("audio", "tracks_live")
        ),
        (4, 3)
    );
}

#[test]
fn the_knee_is_the_last_tier_that_held_and_all_tiers_are_tried() {
    let _alone = alone();
    // Each subscriber gets 50 packets a second: 200, 400 and 800 packets in the holds, and some
    // more on a host that is late.
    let args = "--publishers 1 --ramp 1,2,4 --duration 4 --warmup 0 --threshold audio.packets_received<300";
    let (finished, report) = run(&mut throng(), args, NO_SECRET);
    if tiers(&report)
        .iter()
        .any(|tier| tier["result"] == "INVALID")
    {
        return eprintln!("the host was too slow for a verdict: {}", report.reasons());
    }
    assert_eq!(finished.code, Some(99), "{}", finished.stdout);
    let knee = &report.0["knee"];
    assert_eq!(
        (
            &knee["answer"],
            &knee["subscribers"],
            &knee["broke"]["subscribers"]
        ),
        (&"found".into(), &1.into(), &2.into())
    );
    assert_eq!(tiers(&report).len(), 3);
    assert!(
        report
            .reasons()
            .contains("tier 2: audio.packets_received<300"),
        "{}",
        report.reasons()
    );
    assert!(
        finished
            .stdout
            .contains("Knee       1 subscriber a room (2 participants); 2 subscribers a room"),
        "{}",
        finished.stdout
    );
}

#[test]
fn a_threshold_that_aborts_ends_the_run_and_names_what_was_not_measured() {
    let _alone = alone();
    let args = "--publishers 1 --ramp 1,2,4 --duration 60 --warmup 0 --threshold audio.packets_received<100:abort";
    let (finished, report) = run(&mut throng(), args, NO_SECRET);
    assert!(
        finished.took < Duration::from_secs(50),
        "{:?}",
        finished.took
    );
    if report.result() == "INVALID" {
        return eprintln!("the host was too slow for a verdict: {}", report.reasons());
    }
    assert_eq!(
        (finished.code, report.result()),
        (Some(99), "FAIL"),
        "{}",
        finished.stdout
    );
    assert_eq!(
        (tiers(&report).len(), &report.0["knee"]["answer"]),
        (1, &"first_failed".into())
    );
    assert!(
        report
            .reasons()
            .contains("audio.packets_received<100:abort does not hold")
            && report.reasons().contains("ended the run"),
        "{}",
        report.reasons()
    );
    let unmeasured: Vec<_> = report.0["unmeasured_tiers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|tier| &tier["tier"])
        .collect();
    assert_eq!(unmeasured, ["tier 2", "tier 3"]);
}

#[test]
fn a_run_that_is_one_hold_is_ended_by_its_threshold_too() {
    let _alone = alone();
    let args = "--publishers 1 --subscribers 2 --duration 60 --threshold audio.packets_received<150@for@2s:abort";
    let scratch = Scratch::new();
    let report = scratch.path("run.json");
    let mut command = throng();
    command
        .args(args.split(' ').map(|arg| arg.replace('@', " ")))
        .arg("--json")
        .arg(&report);
    let finished = Running::start(&mut command, NO_SECRET).finish();
    let report = Report::read(&report, NO_SECRET);
    assert!(
        finished.took < Duration::from_secs(50),
        "{:?}",
        finished.took
    );
    assert_ne!(report.result(), "PASS");
    assert!(
        report
            .reasons()
            .contains("audio.packets_received<150 for 2s:abort does not hold"),
        "{}",
        report.reasons()
    );
    assert_eq!(
        (
            tiers(&report).len(),
            &tiers(&report)[0]["name"],
            &report.0["knee"]
        ),
        (1, &"hold".into(), &Value::Null)
    );
}

#[test]
fn a_signal_ends_a_ramp_and_each_tier_is_either_reported_or_named() {
    let _alone = alone();
    let scratch = Scratch::new();
    let path = scratch.path("run.json");
    let mut command = throng();
    // The second tier takes ten minutes to gather.
    let args =
        "--publishers 1 --ramp 1,100,200 --ramp-time 10m --duration 1 --warmup 0 --no-live --json";
    command.args(args.split(' ')).arg(&path);
    let mut running = Running::start(&mut command, NO_SECRET);
    wait_for_engine(&mut running);
    std::thread::sleep(Duration::from_secs(6));
    running.signal(Signal::INT);
    let finished = running.finish();
    let report = Report::read(&path, NO_SECRET);
    assert_eq!(
        (finished.code, report.result()),
        (Some(1), "PARTIAL"),
        "{}",
        finished.stderr
    );
    let (held, unmeasured) = (
        tiers(&report),
        report.0["unmeasured_tiers"].as_array().unwrap(),
    );
    let names: Vec<_> = held
        .iter()
        .map(|tier| &tier["name"])
        .chain(unmeasured.iter().map(|tier| &tier["tier"]))
        .collect();
    let is_held = held[0]["name"] == "tier 1";
    assert_eq!(
        names[usize::from(!is_held)..],
        ["tier 1", "tier 2", "tier 3"]
    );
    // The first tier ends within the six seconds, unless the host is very slow.
    if is_held && held[0]["result"] == "PASS" {
        let knee = &report.0["knee"];
        assert_eq!(
            (&knee["answer"], &knee["subscribers"]),
            (&"not_measured".into(), &1.into())
        );
        assert!(
            finished
                .stdout
                .contains("Knee       at least 1 subscriber a room"),
            "{}",
            finished.stdout
        );
    }
}

/// Waits until media may flow. From then on the run handles signals.
fn wait_for_engine(running: &mut Running) {
    let tasks = format!("/proc/{}/task", running.pid());
    let names = || {
        std::fs::read_dir(&tasks)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok())
    };
    let deadline = Instant::now() + PATIENCE;
    while !names().any(|name| name.starts_with("engine-")) {
        assert!(
            !running.has_ended() && Instant::now() < deadline,
            "no engine thread"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Searches for the capacity of an SFU whose outlet lets through the packets of `hidden`
/// subscribers.
fn search(seed: u64, hidden: f64, most: u32) -> (Finished, Report) {
    const PACKETS_PER_SUBSCRIBER: f64 = 50.0;
    let server = throng::sfu::server::SfuServer::start(ServerConfig {
        limit: Some(BottleneckLimit {
            packets_per_second: hidden * PACKETS_PER_SUBSCRIBER,
            wander: 0.03,
            seed,
        }),
        ..ServerConfig::loopback(seed)
    })
    .expect("a server on loopback");
    let mut command = throng();
    command
        .env("LIVEKIT_URL", server.url())
        .env("LIVEKIT_API_KEY", DEV_KEY)
        .env("LIVEKIT_API_SECRET", DEV_SECRET);
    let args = format!(
        "--publishers 1 --find-knee --max {most} --duration 2 --warmup 1 --num-per-second 200 --seed {seed} --quiet"
    );
    let found = run(&mut command, &args, NO_SECRET);
    server.stop();
    found
}

fn finds(seed: u64, hidden: f64) {
    let (finished, report) = search(seed, hidden, 120);
    let capacity = &report.0["capacity"];
    eprintln!(
        "seed {seed}: {hidden} hidden, found {}",
        capacity["subscribers"]
    );
    assert_eq!(capacity["answer"], "capacity", "{}", finished.stdout);
    // One packet in a hundred may be lost, so the true capacity is above `hidden`.
    let truth = hidden / 0.99;
    let found = capacity["subscribers"].as_f64().unwrap();
    assert!(
        (found / truth - 1.0).abs() <= 0.05,
        "{found}, and {truth:.1} is true\n{}",
        finished.stdout
    );
    let broke = capacity["broke_first"]["reasons"][0]
        .as_str()
        .unwrap_or_default();
    assert!(
        broke.contains("audio loss") || broke.contains("tracks never went live"),
        "{broke}"
    );
    assert!(
        finished.stdout.contains("Capacity   ")
            && finished
                .stdout
                .lines()
                .all(|line| line.chars().count() <= 80),
        "{}",
        finished.stdout
    );
}

#[test]
#[ignore = "three minutes: cargo test --test live ramp:: -- --ignored a_hidden_limit_is_found"]
fn a_hidden_limit_is_found() {
    let _alone = alone();
    finds(1, 44.0);
}

/// Run with `cargo test --test live ramp:: -- --ignored --nocapture twenty_hidden_limits`. It takes
/// an hour on a quiet host. `THRONG_SEEDS=18..21` repeats some of the seeds.
#[test]
#[ignore = "takes an hour of a quiet host"]
fn twenty_hidden_limits_are_found_within_five_per_cent() {
    let _alone = alone();
    let seeds = std::env::var("THRONG_SEEDS").unwrap_or_else(|_| "1..21".to_owned());
    let (first, end) = seeds.split_once("..").expect("THRONG_SEEDS=1..21");
    for seed in first.parse::<u64>().expect("a number")..end.parse().expect("a number") {
        finds(seed, 20.0 + 4.3 * seed as f64);
    }
}

#[test]
fn a_search_that_meets_no_limit_says_at_least() {
    let _alone = alone();
    let args = "--publishers 1 --find-knee --max 2 --duration 1 --warmup 0";
    let (finished, report) = run(&mut throng(), args, NO_SECRET);
    let capacity = &report.0["capacity"];
    if capacity["limit"] == "generator" || capacity["answer"] != "at_least" {
        return eprintln!("the host was too slow for a verdict: {}", finished.stdout);
    }
    assert_eq!(
        (finished.code, report.result()),
        (Some(0), "PASS"),
        "{}",
        finished.stdout
    );
    assert_eq!(
        (
            &capacity["subscribers"],
            &capacity["participants"],
            &capacity["limit"]
        ),
        (&2.into(), &3.into(), &"max".into())
    );
    assert_eq!(
        capacity["points"].as_array().unwrap().len(),
        tiers(&report).len()
    );
    assert!(
        finished
            .stdout
            .contains("Capacity   at least 2 subscribers a room (3 participants), the most"),
        "{}",
        finished.stdout
    );
}
