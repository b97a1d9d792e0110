//! Reports of a made-up run: checked against the schema, read back by HdrHistogram, and compared as
//! text.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use throng::knee::{KneeAnswer, KneeLimit};
use throng::measure::{Bandwidth, Engine, Histogram, Media, Record, Session, serial};
use throng::plan::scenario::{PhaseTimes, RoomPeople, Scenario};
use throng::plan::{ConnectionMode, Plan, Resources, Target, TargetOrigin, ViewLayout};
use throng::report::Style;
use throng::report::text::{dry_run, first_line, render};
use throng::report::{
    Capacity, CapacityPoint, Cause, Destinations, EngineHealth, HostDrops, JoinTimeline, Judging,
    MediaQuality, Nearness, Outcome, ParticipantOutcome, RunSample, Second, Side, Sinks, Stall,
    Step, TargetInfo, TargetKind, ThreadTime, TierFacts, Unmeasured, Verdict, json, judge,
    participants,
};
use throng::units::Time;

fn plan() -> Plan {
    let people = RoomPeople {
        audio_publishers: 5,
        video_publishers: 5,
        subscribers: 45,
        meeting: false,
    };
    let mut scenario = Scenario {
        seed: 7,
        connection: ConnectionMode::Dual,
        ..Scenario::of_people(people)
    };
    scenario.rooms.count = 2;
    scenario.media.simulcast = false;
    let scenario = scenario.single(PhaseTimes {
        hold: Duration::from_secs(30),
        ..PhaseTimes::default()
    });
    let target = Target {
        url: "wss://sfu.example.com".parse().unwrap(),
        origin: TargetOrigin::Environment,
    };
    Plan::new(scenario, target, 0xC0FF_EE01)
}

/// Sets the number of subscribers, and keeps the other properties of the rooms.
fn set_subscribers(plan: &mut Plan, subscribers: u32) {
    let people = RoomPeople {
        subscribers,
        ..plan.scenario.people()
    };
    plan.scenario.set_people(people);
}

fn resources() -> Resources {
    Resources {
        threads: 2,
        sfu_routers: 0,
        cpus: 4,
        sockets: 100,
        files: 272,
    }
}

/// Returns `count` values around `middle_us`, with a tail.
fn spread(count: u64, middle_us: u64) -> Histogram {
    let mut histogram = Histogram::default();
    for n in 0..count {
        let tail = if n % 50 == 49 { 3 } else { 1 };
        histogram.record_micros((middle_us / 2 + middle_us * n / count) * tail);
    }
    histogram
}

fn session() -> Session {
    Session {
        joins_planned: 100,
        joins_ok: 100,
        participants_healthy: 100,
        participants_total: 100,
        nacks_sent: 210,
        plis_sent: 450,
        plis_received: 12,
        wire_bytes_sent: 83_000_000,
        wire_bytes_received: 3_600_000_000,
        join: spread(100, 240_000),
        signal_connect: spread(100, 4_100),
        signal_join: spread(100, 6_300),
        ice: spread(100, 205_000),
        dtls: spread(100, 211_000),
        first_media: spread(90, 410_000),
        rtt_stun: spread(400, 380),
        rtt_rtcp: spread(900, 420),
        ..Session::default()
    }
}

fn media(packets: u64, bytes: u64, frames: u64, latency_us: u64) -> Media {
    Media {
        tracks_published: 10,
        tracks_expected: 450,
        tracks_live: 450,
        packets_sent: packets / 45,
        packets_received: packets,
        bytes_sent: bytes / 45,
        bytes_received: bytes,
        rtx_sent: 3,
        rtx_received: packets / 800,
        packets_lost_network: packets / 700,
        packets_repaired: packets / 800,
        packets_lost: packets / 700 - packets / 800,
        frames_sent: frames / 45,
        frames_expected: frames,
        frames_delivered: frames - frames / 6_000,
        frames_lost_downlink: frames / 6_000,
        track_subscribe: spread(450, 41_000),
        first_packet: spread(450, 300_000),
        first_frame: spread(450, 420_000),
        one_way_latency: spread(5_000, latency_us),
        jitter: spread(5_000, 900),
        frame_interval: spread(5_000, 33_000),
        ..Media::default()
    }
}

/// Returns one score for each of 450 streams, the highest of them `best`.
fn scores(best: u64) -> Histogram {
    let mut histogram = Histogram::default();
    (0..450).for_each(|n| histogram.record_micros(best - n / 5));
    histogram.expect(450);
    histogram
}

fn outcome() -> Outcome {
    let record = Record {
        session: session(),
        audio: Media {
            played_us: 13_497_760_000,
            concealed_us: 2_240_000,
            playout_delay: spread(5_000, 21_000),
            mos: scores(4_409),
            ..media(675_000, 40_500_000, 675_000, 1_900)
        },
        video: Media {
            loss_to_repair: spread(300, 64_000),
            key_frames_sent: 24,
            freezes: 3,
            ..media(3_240_000, 3_375_000_000, 405_000, 2_600)
        },
        bandwidth: Bandwidth::default(),
        engine: Engine {
            packets_processed: 4_100_000,
            tick_late: spread(30_000, 60),
            send_lag: spread(80_000, 210),
            ..Engine::default()
        },
    };
    let totals = Step {
        name: "all".into(),
        participants: 100,
        seconds: 30.0,
        record,
        tier: None,
    };
    Outcome {
        started: Duration::from_millis(1_790_000_000_000),
        finished: Duration::from_millis(1_790_000_032_500),
        plan: plan(),
        judging: Judging {
            thresholds: vec!["audio.one_way_latency.p95<150ms".parse().unwrap()],
            ..Judging::default()
        },
        target: TargetInfo {
            kind: TargetKind::LiveKit,
            server_version: Some("1.13.5".into()),
            addresses: vec![],
        },
        steps: vec![totals.clone()],
        unmeasured: vec![],
        capacity: None,
        totals,
        series: vec![RunSample {
            t: 1.0,
            participants: 50,
            joins_per_second: 50.0,
            rtt_us_p50: Some(410),
            generator: Second {
                tick_late_us_max: Some(900),
                ..Second::default()
            },
            ..RunSample::default()
        }],
        engine: EngineHealth {
            threads: 2,
            cpu_seconds: Some(13.4),
            us_per_packet: Some(2.31),
            bytes_per_participant: Some(61_000),
            rss_peak_bytes: Some(104_000_000),
            floor_tick_late: Some(spread(30_000, 52)),
            host_drops: HostDrops {
                sockets: Some(0),
                ..HostDrops::default()
            },
            thread_times: vec![ThreadTime {
                name: "engine-0".into(),
                cpu_seconds: 6.1,
                run_queue_seconds: 0.05,
            }],
            valid: true,
            ..EngineHealth::default()
        },
        nearness: None,
        sfu: None,
        complaints: vec![],
        server: None,
        partial: None,
        notes: vec![],
        failures: vec![],
        participants: vec![listener()],
    }
}

fn listener() -> ParticipantOutcome {
    ParticipantOutcome {
        index: 17,
        room: "throng-c0ffee01-2".into(),
        identity: "throng-c0ffee01-17".into(),
        subscribes: true,
        timeline: JoinTimeline {
            intended: Time::from_millis(340),
            started: Some(Time::from_millis(341)),
            joined: Some(Time::from_millis(580)),
            ..JoinTimeline::default()
        },
        audio: MediaQuality {
            tracks_expected: 5,
            tracks_live: 5,
            frames_expected: 7_500,
            frames_delivered: 7_500,
            played_us: Some(150_000_000),
            concealed_us: Some(0),
            one_way_us_mean: Some(1_900),
            mos: Some(4.41),
            ..MediaQuality::default()
        },
        ..ParticipantOutcome::default()
    }
}

/// Returns a participant that was not admitted.
fn refused() -> ParticipantOutcome {
    ParticipantOutcome {
        timeline: JoinTimeline {
            joined: None,
            ..listener().timeline
        },
        failure: Some("signalling: 401 Unauthorized".into()),
        audio: MediaQuality {
            tracks_expected: 5,
            ..MediaQuality::default()
        },
        ..listener()
    }
}

/// Returns a participant whose link lost nearly a third.
fn ruined() -> ParticipantOutcome {
    let heard = listener().audio;
    ParticipantOutcome {
        identity: "throng-c0ffee01-31".into(),
        index: 31,
        audio: MediaQuality {
            frames_delivered: 5_300,
            frames_lost_downlink: 2_180,
            frames_lost_uplink: 20,
            played_us: Some(104_000_000),
            concealed_us: Some(46_000_000),
            mos: Some(1.2),
            ..heard
        },
        ..listener()
    }
}

#[test]
fn a_run_says_how_near_it_came_to_what_the_host_was_calibrated_for() {
    let mut outcome = outcome();
    assert!(!render(&outcome, Style::default()).contains("calibrated"));
    outcome.nearness = Some(Nearness {
        calibrated_at: Duration::from_secs(1_790_000_000),
        packets_per_second_peak: 57_400.0,
        packets_per_second_ceiling: 574_000.0,
    });
    let text = render(&outcome, Style::default());
    assert!(text.contains("57,400 of 574,000 packets/s: 10"), "{text}");
    let report: Value = serde_json::from_str(&json::render(&outcome)).unwrap();
    assert_eq!(report["engine"]["calibration"]["share"], Value::from(0.1));
    assert!(
        jsonschema::draft202012::new(&schema())
            .unwrap()
            .is_valid(&report)
    );
}

#[test]
fn layers_layouts_and_speakers_are_shown_where_there_are_any() {
    let mut outcome = outcome();
    let words = [
        "3 layers, ",
        "speaker layout",
        "one speaks at a time",
        "DTX",
        "Speaker updates",
        "layer switch",
    ];
    let plain = render(&outcome, Style::default());
    assert!(words.iter().all(|word| !plain.contains(word)), "{plain}");
    let plan = &mut outcome.plan;
    (
        plan.scenario.media.simulcast,
        plan.scenario.media.layout,
        plan.scenario.rooms.simulate_speakers,
        plan.scenario.media.audio.dtx,
    ) = (true, Some(ViewLayout::Speaker), true, true);
    outcome.totals.record.session.speaker_updates = 1_234;
    outcome.totals.record.video.layer_switch = spread(40, 130_000);
    outcome.totals.record.video.layer_switch.expect(41);
    let text = render(&outcome, Style::default());
    assert!(words.iter().all(|word| text.contains(word)), "{text}");
    assert!(
        text.contains("1,234") && text.lines().all(|line| line.chars().count() <= 80),
        "{text}"
    );
    let report: Value = serde_json::from_str(&json::render(&outcome)).unwrap();
    let validator = jsonschema::draft202012::new(&schema()).unwrap();
    assert!(
        validator.is_valid(&report),
        "{:?}",
        validator
            .iter_errors(&report)
            .map(|error| error.to_string())
            .collect::<Vec<_>>()
    );
    let layers = report["plan"]["video"]["layers"].as_array().unwrap();
    assert_eq!(
        (layers.len(), &layers[0]["height"], &layers[2]["bitrate"]),
        (3, &Value::from(180), &Value::from(2_000_000))
    );
    assert_eq!(report["plan"]["layout"], "speaker");
    assert_eq!(report["totals"]["session"]["speaker_updates"], 1_234);
    let switch = &report["totals"]["video"]["layer_switch"];
    assert!(switch["p50"].is_u64() && switch["max"].is_null() && switch["expected"] == 41);
    assert!(report["totals"]["audio"]["layer_switch"].is_null());
    let planned = dry_run(&outcome.plan, &outcome.judging, &resources());
    assert!(
        planned.contains("320x180 15 fps 150 kbps") && planned.contains("Habits"),
        "{planned}"
    );
    assert!(
        planned
            .lines()
            .skip(1)
            .all(|line| line.chars().count() <= 80),
        "{planned}"
    );
}

/// Returns a tier with this many subscribers per room, and its result.
fn tier(number: usize, subscribers: u32, verdict: Verdict) -> Step {
    let mut facts = TierFacts {
        subscribers: Some(subscribers),
        ..TierFacts::default()
    };
    match verdict {
        Verdict::Pass => {}
        Verdict::Fail => {
            facts.complaints = vec!["audio loss 3.00% (packets lost), more than 1 %".into()]
        }
        Verdict::Invalid => {
            facts.invalid = vec![
                "an engine thread was busy 97 % of the time (limit 90 %): use more cores or hosts"
                    .into(),
            ]
        }
        Verdict::Partial => {
            facts.cut_short =
                Some("SIGINT after 12.0 s, before the planned duration was over".into())
        }
    }
    Step {
        name: format!("tier {number}"),
        participants: 10 + 2 * subscribers,
        tier: Some(facts),
        ..outcome().totals
    }
}

/// Returns a ramp with one measured tier for each verdict, and `unmeasured` more that were not
/// reached.
fn ramp(verdicts: &[Verdict], unmeasured: usize) -> Outcome {
    let mut outcome = outcome();
    let tiers: Vec<u32> = (1..=verdicts.len() + unmeasured)
        .map(|number| 15 * number as u32)
        .collect();
    set_subscribers(&mut outcome.plan, *tiers.iter().max().unwrap());
    let times = outcome.plan.scenario.times();
    outcome.plan.scenario = outcome.plan.scenario.ramp(&tiers, times);
    let numbered = || (1..).zip(tiers.clone());
    outcome.steps = numbered()
        .zip(verdicts)
        .map(|((number, subscribers), verdict)| tier(number, subscribers, *verdict))
        .collect();
    outcome.unmeasured = numbered()
        .skip(verdicts.len())
        .map(|(number, subscribers)| Unmeasured {
            name: format!("tier {number}"),
            subscribers: Some(subscribers),
        })
        .collect();
    outcome
}

/// Returns the report as text and as JSON. Asserts that the text fits a terminal and the JSON its
/// schema.
fn shown(outcome: &Outcome) -> (String, Value) {
    let text = render(outcome, Style::default());
    assert!(
        text.lines().all(|line| line.chars().count() <= 80),
        "{text}"
    );
    let report: Value = serde_json::from_str(&json::render(outcome)).unwrap();
    let validator = jsonschema::draft202012::new(&schema()).unwrap();
    let errors: Vec<_> = validator
        .iter_errors(&report)
        .map(|error| error.to_string())
        .collect();
    assert!(errors.is_empty(), "{errors:#?}");
    (text, report)
}

#[test]
fn all_healthy_first_failed_and_not_measured_are_three_answers() {
    use Verdict::{Fail, Invalid, Partial, Pass};
    for (verdicts, unmeasured, answer, subscribers, sentence, verdict) in [
        (
            &[Pass, Pass, Pass][..],
            0,
            "all_passed",
            Some(45),
            "not reached: all tiers passed, up to 45 subscribers",
            Pass,
        ),
        (
            &[Pass, Pass, Fail, Pass],
            0,
            "found",
            Some(30),
            "30 subscribers a room (70 participants); 45 subscribers",
            Fail,
        ),
        (
            &[Fail, Pass],
            0,
            "first_failed",
            None,
            "below the first tier: 15 subscribers",
            Fail,
        ),
        (
            &[Invalid, Pass],
            0,
            "not_measured",
            None,
            "not measured: 15 subscribers",
            Invalid,
        ),
        (
            &[Pass, Invalid, Fail],
            0,
            "not_measured",
            Some(15),
            "at least 15 subscribers",
            Fail,
        ),
        (
            &[Pass, Invalid],
            0,
            "not_measured",
            Some(15),
            "at least 15 subscribers",
            Invalid,
        ),
        (
            &[Pass, Fail],
            1,
            "found",
            Some(15),
            "15 subscribers a room",
            Fail,
        ),
        (
            &[Pass, Partial],
            1,
            "not_measured",
            Some(15),
            "at least 15 subscribers",
            Partial,
        ),
        (
            &[Pass],
            2,
            "not_measured",
            Some(15),
            "not measured beyond: the run did not come to tier 2",
            Partial,
        ),
        (
            &[],
            2,
            "not_measured",
            None,
            "the run did not come to tier 1",
            Partial,
        ),
    ] {
        let mut outcome = ramp(verdicts, unmeasured);
        if verdict == Partial {
            outcome.partial = Some("SIGINT after 12.0 s".into());
        }
        if outcome.steps.is_empty() {
            outcome.steps.push(outcome.totals.clone());
        }
        let (text, report) = shown(&outcome);
        let flat = text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(
            flat.contains(&format!("Knee {sentence}")) || flat.contains(sentence),
            "{sentence}: {text}"
        );
        assert_eq!(
            (&report["knee"]["answer"], &report["knee"]["subscribers"]),
            (&answer.into(), &serde_json::json!(subscribers))
        );
        assert_eq!(
            (report["result"].as_str(), judge(&outcome).verdict),
            (Some(verdict.name()), verdict),
            "{verdicts:?}"
        );
        assert_eq!(
            report["unmeasured_tiers"].as_array().unwrap().len(),
            unmeasured
        );
        assert_eq!(
            text.lines()
                .filter(|line| line.starts_with("tier ") && line.ends_with("  not measured"))
                .count(),
            unmeasured
        );
    }
    let (text, report) = shown(&outcome());
    assert!(
        !text.contains("Knee")
            && report["knee"].is_null()
            && report["unmeasured_tiers"].is_null()
            && report["capacity"].is_null()
    );
}

#[test]
fn a_tier_whose_generator_gave_out_spoils_no_other_and_says_so_itself() {
    let mut outcome = ramp(&[Verdict::Pass, Verdict::Invalid], 0);
    // An overload in one tier also shows in the run as a whole.
    (outcome.engine.valid, outcome.engine.reasons) =
        (false, vec!["an engine thread was busy".into()]);
    let (text, report) = shown(&outcome);
    assert_eq!(
        (&report["steps"][0]["result"], &report["steps"][1]["result"]),
        (&"PASS".into(), &"INVALID".into())
    );
    assert!(
        text.contains("tier 2: an engine thread was busy 97 %"),
        "{text}"
    );
}

#[test]
fn scores_are_judged_over_all_of_a_ramp() {
    let mut outcome = ramp(&[Verdict::Pass], 0);
    outcome.judging.thresholds = vec!["audio.mos.p1>4.5".parse().unwrap()];
    let (_, report) = shown(&outcome);
    assert_eq!(
        (&report["result"], &report["steps"][0]["result"]),
        (&"FAIL".into(), &"PASS".into())
    );
}

#[test]
fn a_search_says_how_sure_it_is_and_what_broke_first() {
    let point = |subscribers, verdict| CapacityPoint {
        subscribers,
        phase: "growing",
        verdict,
    };
    let reasons = vec!["the generator stood still".to_owned()];
    for (answer, verdict, sentences) in [
        (
            KneeAnswer::Capacity {
                participants: 43,
                low: 42,
                high: 44,
                settled: true,
            },
            Verdict::Pass,
            &[
                "43 subscribers a room (96 participants)",
                "95 % confidence it is 42 to 44)",
                "What broke first, with 45: audio loss",
            ][..],
        ),
        (
            KneeAnswer::Capacity {
                participants: 43,
                low: 30,
                high: 60,
                settled: false,
            },
            Verdict::Pass,
            &["not settled after 2 points"],
        ),
        (
            KneeAnswer::AtLeast {
                participants: 60,
                limit: KneeLimit::Max,
            },
            Verdict::Pass,
            &["at least 60 subscribers", "the most that was to be tried"],
        ),
        (
            KneeAnswer::AtLeast {
                participants: 60,
                limit: KneeLimit::Generator {
                    at: 64,
                    reasons: reasons.clone(),
                },
            },
            Verdict::Invalid,
            &[
                "at least 60 subscribers",
                "the generator was the limit at 64: the generator stood still",
            ],
        ),
        (
            KneeAnswer::None,
            Verdict::Fail,
            &["below one subscriber a room"],
        ),
        (
            KneeAnswer::NotMeasured { reasons },
            Verdict::Invalid,
            &["even with one subscriber a room: the generator stood still"],
        ),
    ] {
        let mut outcome = ramp(&[Verdict::Pass, Verdict::Fail], 0);
        set_subscribers(&mut outcome.plan, 100);
        let times = outcome.plan.scenario.times();
        outcome.plan.scenario = outcome.plan.scenario.capacity_search(times);
        outcome.capacity = Some(Capacity {
            answer,
            broke_first: Some((45, vec!["audio loss 1.30%".into()])),
            points: vec![point(15, "PASS"), point(30, "UNSETTLED")],
        });
        let (text, report) = shown(&outcome);
        let flat = text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(
            sentences.iter().all(|sentence| flat.contains(sentence)),
            "{text}"
        );
        assert_eq!(
            (&report["result"], &report["knee"]),
            (&verdict.name().into(), &Value::Null)
        );
        assert_eq!(report["capacity"]["points"][1]["verdict"], "UNSETTLED");
    }
}

fn stall(side: Side, cause: Cause, at: f64, seconds: f64) -> Stall {
    Stall {
        side,
        cause,
        at,
        until: at + seconds,
        seconds,
        evidence: "made up".into(),
    }
}

/// Returns a run in which nearly everything that can go wrong did.
fn troubled() -> Outcome {
    let mut outcome = outcome();
    outcome.judging.target_rtt = Some(Duration::from_micros(500));
    let record = &mut outcome.totals.record;
    record.session.joins_ok = 97;
    record.session.joins_failed = 3;
    record.session.disconnects = 2;
    record.session.join.expect(103);
    record.session.host_drops = 12;
    record.audio.one_way_latency = Histogram::default();
    record.video.tracks_live = 440;
    record.video.track_subscribe.expect(460);
    record.video.frames_delivered -= 16_000;
    (
        record.video.frames_lost_sfu,
        record.video.frames_lost_unattributed,
    ) = (15_000, 1_000);
    record.session.participants_healthy = 96;
    (record.audio.frames_late_for_playout, record.audio.freezes) = (120, 14);
    record.audio.concealed_us = 400_000_000;
    record.audio.mos = scores(4_190);
    record.audio.mos.record_micros(1_200);
    record.audio.mos.expect(10);
    outcome.participants = [vec![listener(); 148], vec![ruined(), refused()]].concat();
    outcome.failures = vec![
        ("signalling: 401 Unauthorized".into(), 2),
        ("ICE: no candidate pair answered within 10 s".into(), 1),
    ];
    outcome.notes =
        vec!["2 participants lost their connection during the run; that alone is not judged: add --threshold 'session.disconnects<1'".into()];
    outcome.engine.host_drops = HostDrops {
        sockets: Some(12),
        udp_receive_buffer: Some(1_215),
        interfaces_receive: Some(0),
        ..HostDrops::default()
    };
    outcome.engine.stolen_seconds = Some(0.31);
    outcome.engine.thread_times[0].run_queue_seconds = 1.5;
    outcome.engine.stalls = vec![
        stall(Side::Host, Cause::Stopped, 3.2, 0.064),
        stall(Side::Server, Cause::Silence, 7.1, 1.2),
        stall(Side::Server, Cause::Silence, 9.4, 0.08),
    ];
    outcome
}

fn schema() -> Value {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/schema/throng-report-1.schema.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn scratch(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("throng-report-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

#[test]
fn what_congestion_control_did_is_shown_where_it_did_anything() {
    let mut outcome = outcome();
    assert!(!render(&outcome, Style::default()).contains("Bandwidth"));
    outcome.totals.record.bandwidth = Bandwidth {
        transport_cc_sent: 27_000,
        remb_sent: 200,
        remb_sent_kbps: 200_000,
        tracks_paused: 3,
        tracks_resumed: 2,
        track_pause: spread(2, 4_000_000),
        layers_stepped_down: 5,
        layers_stepped_up: 4,
        uplink_estimates: 30,
        uplink_estimate_kbps: 30_000,
        probes_sent: 6,
        layers_dropped: 1,
        layer_limited_ms: 12_340,
        ..Bandwidth::default()
    };
    let text = render(&outcome, Style::default());
    for words in [
        "27,000 transport-cc sent, 0 received",
        "200 REMB sent (mean 1 Mbps), 0 received",
        "3 tracks paused by the server, 2 resumed, for ",
        "5 layer steps down by the server, 4 up",
        "publishers obeyed their estimate (mean 1 Mbps), 6 probes",
        "1 layer dropped, 0 returned, limited for 12.3 s",
    ] {
        assert!(text.contains(words), "{text}");
    }
    assert!(
        text.lines().all(|line| line.chars().count() <= 80),
        "{text}"
    );
}

#[test]
fn every_report_obeys_the_schema() {
    let validator = jsonschema::draft202012::new(&schema()).unwrap();
    let empty = Outcome {
        totals: Step::default(),
        steps: vec![Step::default()],
        series: vec![],
        engine: EngineHealth::default(),
        ..outcome()
    };
    let partial = Outcome {
        partial: Some("interrupted".into()),
        ..outcome()
    };
    for outcome in [outcome(), troubled(), empty, partial] {
        let report: Value = serde_json::from_str(&json::render(&outcome)).unwrap();
        let errors: Vec<String> = validator
            .iter_errors(&report)
            .map(|error| format!("{}: {error}", error.instance_path()))
            .collect();
        assert!(errors.is_empty(), "{errors:#?}");
    }
}

#[test]
fn the_schema_is_strict_enough_to_notice_what_is_missing() {
    let validator = jsonschema::draft202012::new(&schema()).unwrap();
    let good: Value = serde_json::from_str(&json::render(&outcome())).unwrap();
    for pointer in [
        "/totals/session",
        "/totals/audio",
        "/engine",
        "/plan",
        "/totals/video/jitter",
        "/totals/bandwidth",
        "/series/0",
        "/series/0/drops",
        "/engine/thread_times/0",
    ] {
        for key in good.pointer(pointer).unwrap().as_object().unwrap().keys() {
            // The scenario is new in this version. Reports of earlier versions have none.
            if pointer == "/plan" && key == "scenario" {
                continue;
            }
            if pointer == "/engine"
                && ![
                    "threads",
                    "valid",
                    "tick_late_us",
                    "stalls",
                    "host_drops",
                    "stolen_seconds",
                ]
                .contains(&key.as_str())
            {
                continue;
            }
            let mut report = good.clone();
            report
                .pointer_mut(pointer)
                .unwrap()
                .as_object_mut()
                .unwrap()
                .remove(key);
            assert!(!validator.is_valid(&report), "{pointer}/{key}");
        }
    }
}

#[test]
fn the_schema_describes_every_counter_and_histogram_and_no_other() {
    let schema = schema();
    for (scope, counters, histograms, scores) in [
        (
            "session",
            Session::COUNTERS,
            Session::HISTOGRAMS,
            Session::SCORES,
        ),
        ("media", Media::COUNTERS, Media::HISTOGRAMS, Media::SCORES),
        (
            "bandwidth",
            Bandwidth::COUNTERS,
            Bandwidth::HISTOGRAMS,
            Bandwidth::SCORES,
        ),
    ] {
        let properties = schema["$defs"][scope]["properties"].as_object().unwrap();
        let mut described: Vec<&str> = properties.keys().map(String::as_str).collect();
        let mut declared: Vec<&str> = counters
            .iter()
            .chain(histograms)
            .chain(scores)
            .copied()
            .collect();
        described.sort_unstable();
        declared.sort_unstable();
        assert_eq!(described, declared, "{scope}");
        for name in counters.iter().chain(histograms).chain(scores) {
            let sentence = properties[*name]["description"].as_str().unwrap();
            assert!(
                sentence.ends_with('.') && sentence.len() > 15,
                "{name}: {sentence}"
            );
        }
        for name in histograms {
            let sentence = properties[*name]["description"].as_str().unwrap();
            assert!(
                sentence.contains("clock"),
                "{scope}.{name} does not say on whose clock: {sentence}"
            );
        }
    }
    for name in Engine::COUNTERS {
        assert!(
            schema["$defs"]["engine"]["properties"][name]["description"].is_string(),
            "engine.{name}"
        );
    }
}

#[test]
fn histograms_survive_the_report() {
    let outcome = troubled();
    let report: Value = serde_json::from_str(&json::render(&outcome)).unwrap();
    let join = &report["totals"]["session"]["join"];
    assert_eq!(
        &serial::from_base64(join["hdr"].as_str().unwrap()).unwrap(),
        outcome.totals.record.session.join.hdr()
    );
    assert_eq!(
        (join["expected"].as_u64(), join["count"].as_u64()),
        (Some(103), Some(100))
    );
    assert!(
        join["p95"].is_u64()
            && join["p99"].is_null()
            && join["max"].is_null()
            && join["min"].is_u64()
    );
    assert!(
        report["totals"]["audio"]["one_way_latency"].is_null(),
        "what does not apply is null"
    );
    assert!(report["totals"]["session"]["reconnect"].is_null());
}

#[test]
fn scores_count_from_the_worst_and_the_worst_participants_are_named() {
    let report: Value = serde_json::from_str(&json::render(&troubled())).unwrap();
    let mos = &report["totals"]["audio"]["mos"];
    assert_eq!(
        (&mos["expected"], &mos["count"]),
        (&Value::from(460), &Value::from(451))
    );
    assert!(
        mos["p1"].is_null() && mos["min"].is_null(),
        "nine streams were never heard"
    );
    assert!(
        (mos["p50"].as_f64().unwrap() - 4.15).abs() < 0.02
            && mos["p5"].as_f64().unwrap() < mos["p10"].as_f64().unwrap()
    );
    assert!(
        report["totals"]["video"]["mos"].is_null()
            && report["totals"]["video"]["concealed_us"].is_null()
    );
    let worst = report["worst"].as_array().unwrap();
    assert_eq!(worst.len(), 2, "1 % of 150, rounded up");
    assert_eq!(
        (&worst[0]["joined"], &worst[0]["tracks_missing"]),
        (&Value::from(false), &Value::from(5))
    );
    assert_eq!(worst[1]["identity"], "throng-c0ffee01-31");
    assert_eq!(
        (&worst[1]["healthy"], &worst[1]["audio"]["mos"]),
        (&Value::from(false), &Value::from(1.2))
    );
    assert!(worst[1]["video"]["undelivered"].is_null());
}

#[test]
fn the_report_names_the_run_in_the_order_readers_want() {
    let text = json::render(&outcome());
    let report: Value = serde_json::from_str(&text).unwrap();
    let keys = [
        "schema",
        "version",
        "started_at",
        "finished_at",
        "seed",
        "result",
        "reasons",
        "plan",
        "target",
        "steps",
        "totals",
        "series",
        "engine",
        "server",
        "vantages",
        "missing",
    ];
    let places: Vec<usize> = keys
        .iter()
        .map(|key| {
            text.find(&format!("\n  \"{key}\": "))
                .unwrap_or_else(|| panic!("{key}"))
        })
        .collect();
    assert!(places.is_sorted());
    assert_eq!(report["started_at"], "2026-09-21T14:13:20.000Z");
    assert_eq!(
        (&report["result"], &report["steps"][0]["result"]),
        (&Value::from("PASS"), &Value::from("PASS"))
    );
    assert_eq!(report["plan"]["run_tag"], "c0ffee01");
    assert_eq!(report["target"]["url"], "wss://sfu.example.com");
}

#[test]
fn the_verdict_follows_from_what_was_measured() {
    let verdict = |change: &dyn Fn(&mut Outcome)| {
        let mut outcome = outcome();
        change(&mut outcome);
        let judgement = judge(&outcome);
        assert_eq!(
            judgement.verdict == Verdict::Pass,
            judgement.reasons.is_empty()
        );
        (
            judgement.verdict,
            judgement.verdict.exit_code(),
            judgement.reasons.first().cloned().unwrap_or_default(),
        )
    };
    assert_eq!(verdict(&|_| {}), (Verdict::Pass, 0, String::new()));
    for (change, reason) in [
        (
            &(|o: &mut Outcome| o.totals.record.session.joins_ok = 99) as &dyn Fn(&mut Outcome),
            "1 of 100 joins did not succeed",
        ),
        (
            &|o| o.totals.record.session.joins_planned = 60,
            "40 of 100 joins were never attempted",
        ),
        (
            &|o| o.totals.record.session = Session::default(),
            "100 of 100 joins were never attempted",
        ),
        (
            &|o| o.totals.record.video.tracks_live = 449,
            "1 of 450 video tracks never went live",
        ),
        (
            &|o| o.totals.record.video.tracks_expected = 400,
            "only 400 of 450 video subscriptions were tried",
        ),
        (
            &|o| o.totals.record.audio.packets_lost = 7_000,
            "audio loss 1.04% (packets lost), more than 1 %",
        ),
        (
            &|o| o.totals.record.audio.frames_delivered = 600_000,
            "audio loss 11.11% (frames undelivered), more than 1 %",
        ),
        (
            &|o| o.totals.record.audio.frames_expected = 0,
            "audio loss was not measured",
        ),
        (
            &|o| o.totals.record.audio.one_way_latency.expect(10_000),
            "audio.one_way_latency.p95<150ms does not hold: it is never (too many values are missing)",
        ),
        (
            &|o| o.judging.target_rtt = Some(Duration::from_micros(300)),
            "session.rtt_rtcp.p95 is 616 us, more than 300 us",
        ),
    ] {
        assert_eq!(verdict(change), (Verdict::Fail, 99, reason.to_owned()));
    }
    let invalid = |o: &mut Outcome| {
        o.engine.valid = false;
        o.engine.reasons = vec!["ticks were late".into()];
        o.totals.record.session.joins_ok = 0;
    };
    assert_eq!(
        verdict(&invalid),
        (Verdict::Invalid, 98, "ticks were late".into())
    );
    assert_eq!(
        verdict(&|o| o.engine.valid = false).0,
        Verdict::Invalid,
        "a health that gives no reason is invalid all the same"
    );
    let partial = |o: &mut Outcome| {
        invalid(o);
        o.partial = Some("interrupted after 12 s".into());
    };
    assert_eq!(
        verdict(&partial),
        (
            Verdict::Partial,
            1,
            "ended early: interrupted after 12 s".into()
        )
    );
}

#[test]
fn a_run_without_media_is_judged_by_its_joins_where_that_is_allowed() {
    let mut outcome = outcome();
    outcome.plan.scenario.set_people(RoomPeople {
        subscribers: 50,
        ..RoomPeople::default()
    });
    outcome.totals.record = Record {
        session: session(),
        ..Record::default()
    };
    outcome.judging = Judging::default();
    let judgement = judge(&outcome);
    assert_eq!(judgement.verdict, Verdict::Fail);
    assert!(judgement.reasons[0].starts_with("nothing was judged: "));
    outcome.judging.allow_unjudged = true;
    assert_eq!(judge(&outcome).verdict, Verdict::Pass);
    outcome.totals.record.session.joins_failed = 50;
    outcome.totals.record.session.joins_ok = 0;
    assert_eq!(judge(&outcome).verdict, Verdict::Fail, "joins still count");
}

#[test]
fn a_participant_is_one_line_of_json() {
    let outcome = Outcome {
        participants: vec![refused()],
        ..outcome()
    };
    let text = participants::render(&outcome);
    assert_eq!(text.lines().count(), 1);
    let line: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (line["intended_us"].as_u64(), line["started_us"].as_u64()),
        (Some(340_000), Some(341_000))
    );
    assert!(line["first_media_us"].is_null());
    assert_eq!(
        (&line["failure"], &line["audio"]["tracks_expected"]),
        (
            &Value::from("signalling: 401 Unauthorized"),
            &Value::from(5)
        )
    );
}

#[test]
fn files_are_opened_before_the_run_and_replaced_after_it() {
    let dir = scratch("files");
    let destinations = Destinations {
        json: Some(dir.join("run.json")),
        participants: Some(dir.join("who.ndjson")),
        hgrm: Some(dir.join("deep/hgrm")),
        record: Some(dir.join("deep/recordings")),
    };
    std::fs::write(dir.join("run.json"), "x".repeat(1 << 20)).unwrap();
    let sinks = Sinks::open(&destinations).unwrap();
    assert_eq!(
        std::fs::metadata(dir.join("run.json")).unwrap().len(),
        1 << 20,
        "an older report stays until there is a new one"
    );
    assert!(dir.join("deep/recordings").is_dir());
    sinks.write(&outcome()).unwrap();
    assert_eq!(
        std::fs::read_to_string(dir.join("run.json")).unwrap(),
        json::render(&outcome())
    );
    let curve = std::fs::read_to_string(dir.join("deep/hgrm/audio.one_way_latency.hgrm")).unwrap();
    assert!(
        curve.starts_with("       Value     Percentile TotalCount 1/(1-Percentile)"),
        "{curve}"
    );
    assert!(
        !dir.join("deep/hgrm/session.reconnect.hgrm").exists(),
        "what does not apply has no curve"
    );
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_run_that_comes_to_nothing_leaves_no_empty_report_and_no_older_one_is_touched() {
    let dir = scratch("nothing");
    let destinations = Destinations {
        json: Some(dir.join("new.json")),
        participants: Some(dir.join("old.ndjson")),
        hgrm: None,
        record: None,
    };
    std::fs::write(dir.join("old.ndjson"), "older").unwrap();
    let sinks = Sinks::open(&destinations).unwrap();
    assert!(dir.join("new.json").exists());
    drop(sinks);
    assert!(!dir.join("new.json").exists());
    assert_eq!(
        std::fs::read_to_string(dir.join("old.ndjson")).unwrap(),
        "older"
    );
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_destination_that_cannot_be_written_is_refused_with_the_fix() {
    let dir = scratch("refused");
    let file = dir.join("file");
    std::fs::write(&file, "").unwrap();
    let destinations = Destinations {
        json: Some(dir.join("none/run.json")),
        participants: Some(dir.clone()),
        hgrm: Some(file.clone()),
        record: Some(file.join("below")),
    };
    let refusals = Sinks::open(&destinations).unwrap_err();
    assert_eq!(refusals.len(), 4, "{refusals:?}");
    let first = refusals[0].to_string();
    assert!(
        first.contains("mkdir -p") && first.contains("none"),
        "{first}"
    );
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn the_first_line_says_where_the_load_goes() {
    let expected = format!(
        "throng {}: wss://sfu.example.com (from LIVEKIT_URL), dual connection; \
         2 rooms x (5 publishers + 45 subscribers) = 100 participants, 50 joins/s, then 30s, seed 7\n",
        env!("CARGO_PKG_VERSION")
    );
    assert_eq!(first_line(&plan()), expected);
}

#[test]
fn a_dry_run_shows_what_would_happen() {
    let text = dry_run(&plan(), &Judging::default(), &resources());
    assert_eq!(
        text.split_once('\n').unwrap().1,
        include_str!("../golden/dry_run.txt")
    );
}

#[test]
fn a_good_run_reads_well_on_one_screen() {
    same_screen(&render(&outcome(), Style::default()), "pass.txt", 51);
}

#[test]
fn a_bad_run_tells_what_went_wrong_and_prints_no_unknown_as_zero() {
    same_screen(&render(&troubled(), Style::default()), "fail.txt", 80);
}

/// Compares with the text in `tests/golden`. With THRONG_BLESS set, it replaces that text with this
/// one instead: read it before you commit it.
fn same_screen(text: &str, golden: &str, lines_max: usize) {
    let wide: Vec<&str> = text
        .lines()
        .filter(|line| line.chars().count() > 80)
        .collect();
    assert!(wide.is_empty(), "wider than 80 columns: {wide:#?}");
    assert!(
        text.lines().count() <= lines_max,
        "{} lines",
        text.lines().count()
    );
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(golden);
    if std::env::var_os("THRONG_BLESS").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    assert_eq!(text, std::fs::read_to_string(&path).unwrap(), "\n{text}");
}

#[test]
fn users_find_the_words_they_know() {
    let text = render(&outcome(), Style::default());
    for words in [
        "Bytes Published",
        "Bytes Received",
        "Packet Loss",
        "Packet Retransmission",
        "Track Subscribe Time 50/90/99 %",
        "RESULT: PASS",
    ] {
        assert!(text.contains(words), "{words}");
    }
}

#[test]
fn colour_adds_nothing_but_colour() {
    let text = render(&troubled(), Style { colour: true });
    assert!(text.contains("\x1b[1;31mRESULT: FAIL\x1b[0m"));
    let mut plain = String::new();
    let mut rest = text.as_str();
    while let Some((before, after)) = rest.split_once('\x1b') {
        plain.push_str(before);
        rest = after.split_once('m').unwrap().1;
    }
    plain.push_str(rest);
    assert_eq!(plain, render(&troubled(), Style::default()));
}
