//! The command line as users type it, up to the resulting plan. These tests connect to nothing.

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use throng::cli::{CliCommand, RunSpec, UsageError, parse, parse_with};
use throng::measure::Kind;
use throng::plan::scenario::{Scenario, ScenarioError};
use throng::plan::{
    ClientKind, ConnectionMode, HostRole, Pacing, TargetOrigin, TransportMix, ViewLayout,
};
use throng::sfu::SendMode;
use throng::signal::TokenPlace;

const CPUS: usize = 2;
const FRESH: u64 = 0xC0FF_EE01_0000_0007;
const TARGET: &[&str] = &[
    "--url",
    "ws://127.0.0.1:7880",
    "--api-key",
    "devkey",
    "--api-secret",
    "hunter2",
];

fn command(args: &[&str], env: &[(&str, &str)]) -> Result<CliCommand, UsageError> {
    let lookup = |name: &str| {
        env.iter()
            .find(|(n, _)| *n == name)
            .map(|(_, value)| (*value).to_owned())
    };
    parse_with(
        std::iter::once("throng")
            .chain(args.iter().copied())
            .map(OsString::from),
        &lookup,
        CPUS,
        FRESH,
    )
}

fn run(args: &[&str], env: &[(&str, &str)]) -> RunSpec {
    match command(args, env) {
        Ok(CliCommand::Run(run)) => *run,
        other => panic!("{args:?}: {other:?}"),
    }
}

/// Parses the arguments of a run, with a target on loopback.
fn local(args: &[&str]) -> RunSpec {
    run(&[TARGET, args].concat(), &[])
}

fn refusal(args: &[&str], env: &[(&str, &str)]) -> String {
    command(args, env)
        .expect_err(&format!("{args:?} should be refused"))
        .to_string()
}

fn local_refusal(args: &[&str]) -> String {
    refusal(&[TARGET, args].concat(), &[])
}

const REMOTE: &[(&str, &str)] = &[
    ("LIVEKIT_URL", "wss://sfu.example.com"),
    ("LIVEKIT_API_KEY", "devkey"),
    ("LIVEKIT_API_SECRET", "hunter2"),
];

#[test]
fn what_a_gateway_wants_and_whom_to_trust_is_said_by_flags() {
    let asked = local(&[
        "--header",
        "X-Door: 7",
        "--header",
        "Authorization: Basic bWU6c2VjcmV0",
        "--token-in",
        "query",
        "--ca-cert",
        "a.pem",
        "--ca-cert",
        "b.pem",
    ]);
    assert_eq!(
        (asked.gateway.headers.len(), asked.gateway.token_in),
        (2, TokenPlace::Query)
    );
    assert_eq!(asked.trust.ca_files.len(), 2);
    assert!(!asked.trust.insecure && local(&["--insecure"]).trust.insecure);
    assert!(!format!("{asked:?}").contains("bWU6"));
    for (args, why) in [
        (
            &["--header", "Authorization: Basic bWU6c2VjcmV0"][..],
            "add --token-in query",
        ),
        (&["--header", "secret"], "--header takes NAME:VALUE"),
        (&["--header", "Host: x"], "leave it out"),
        (&["--ca-cert", "a.pem", "--insecure"], "cannot be used with"),
    ] {
        let refused = local_refusal(args);
        assert!(
            refused.contains(why) && !refused.contains("bWU6") && !refused.contains("secret'"),
            "{args:?}: {refused}"
        );
    }
    for flag in [
        "--insecure",
        "--ca-cert=x",
        "--header=a:b",
        "--token-in=query",
    ] {
        let refused = refusal(&[flag], &[]);
        assert!(
            refused.contains("is for a server, and none is named"),
            "{refused}"
        );
    }
}

#[test]
fn a_relay_is_named_as_media_is_to_reach_it() {
    let who = ["--turn-user", "me", "--turn-password", "hunter2"];
    for (transport, url, as_read) in [
        ("turn-udp", "turn:relay", "turn:relay:3478?transport=udp"),
        ("turn-tcp", "turn:relay:99", "turn:relay:99?transport=tcp"),
        ("turn-tls", "turns:relay", "turns:relay:5349?transport=tcp"),
    ] {
        let asked = local(&[&["--transport", transport, "--turn", url], &who[..]].concat());
        let [turn] = &asked.turn[..] else {
            panic!("one relay: {asked:?}");
        };
        // `turn:` without a transport fits both UDP and TCP.
        let choice = transport.parse::<TransportMix>().unwrap().only().unwrap();
        assert_eq!(turn.url.clone().over(choice).unwrap().to_string(), as_read);
        assert_eq!(
            (turn.user.as_str(), turn.password.expose()),
            ("me", "hunter2")
        );
        assert!(!format!("{asked:?}").contains("hunter2"));
    }
    let udp = ["--transport", "turn-udp", "--turn"];
    for (args, why) in [
        (
            &["--turn-user", "me"][..],
            "--turn-user belongs to --turn URL",
        ),
        (
            &["--turn", "turn:relay", "--transport", "udp"],
            "--turn needs --transport auto, turn-udp, turn-tcp or turn-tls, or --turn-share",
        ),
        (
            &[&udp[..], &["turn:relay"]].concat(),
            "--turn needs --turn-user",
        ),
        (&[&udp[..], &["relay:3478"]].concat(), "turn:HOST:PORT"),
        (
            &[&udp[..], &["turns:relay"], &who].concat(),
            "does not go with --transport turn-udp, which wants turn:HOST:PORT?transport=udp",
        ),
    ] {
        let refused = local_refusal(args);
        assert!(
            refused.contains(why) && !refused.contains("hunter2"),
            "{args:?}: {refused}"
        );
    }
    let refused = refusal(&["--transport", "turn-tls"], &[]);
    assert!(
        refused.contains("the embedded SFU names no TURN server"),
        "{refused}"
    );
}

#[test]
fn media_is_shared_out_over_transports_by_one_syntax() {
    let mix = |args: &[&str]| {
        let plan = local(args).plan;
        let groups = plan.scenario.groups.iter();
        let mut mixes: Vec<String> = groups.map(|group| group.transport.to_string()).collect();
        mixes.dedup();
        mixes.join(" ")
    };
    let who = ["--turn-user", "me", "--turn-password", "hunter2"];
    assert_eq!(mix(&[]), "auto");
    assert_eq!(
        mix(&["--transport", "udp:75,turn-tls:25"]),
        "udp:75,turn-tls:25"
    );
    assert_eq!(mix(&["--turn-share", "25%"]), "auto:75,turn-udp:25");
    let by_tls = ["--turn-share", "100%", "--turn", "turns:relay"];
    assert_eq!(mix(&[&by_tls[..], &who].concat()), "turn-tls");
    for (args, why) in [
        (&["--transport", "sctp"][..], "is none of auto, udp, tcp"),
        (&["--transport", "udp:75,tcp:20"], "95 % together"),
        (&["--transport", "udp,tcp"], "has no share"),
        (&["--turn-share", "25"], "write a whole percentage"),
        (&["--turn-share", "0%"], "write a whole percentage"),
        (
            &["--turn-share", "25%", "--transport", "turn-udp"],
            "--turn-share is of what goes without a TURN server",
        ),
        (
            &["--turn-share", "25%", "--transport", "udp:50,tcp:50"],
            "put the share into the mix",
        ),
        (
            &[
                &["--transport", "turn-udp", "--turn", "turn:a"][..],
                &["--turn", "turns:b"],
                &who,
            ]
            .concat(),
            "--turn turns:b:5349?transport=tcp: nothing of --transport turn-udp goes there",
        ),
    ] {
        let refused = local_refusal(args);
        assert!(refused.contains(why), "{args:?}: {refused}");
    }
}

#[test]
fn a_secret_is_read_without_the_newline_at_its_end() {
    let folder = std::env::temp_dir().join(format!("throng-secrets-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (good, empty) = (write("good", "hunter2\r\n"), write("empty", "\n"));
    let (words, missing) = (write("words", "two words\n"), write("missing", ""));
    std::fs::remove_file(&missing).unwrap();
    let server = ["--url", "ws://127.0.0.1:1", "--api-key", "devkey"];
    let secret = |run: RunSpec| run.credentials.expect("a key").api_secret;
    let by_file = run(&[&server[..], &["--api-secret-file", &good]].concat(), &[]);
    assert_eq!(secret(by_file), "hunter2");
    let by_variable = run(&server, &[("LIVEKIT_API_SECRET", "hunter2\n")]);
    assert_eq!(secret(by_variable), "hunter2");
    for (path, why) in [
        (&empty, "is empty"),
        (&words, "holds more than one word"),
        (&missing, "cannot be read"),
    ] {
        let refused = refusal(&[&server[..], &["--api-secret-file", path]].concat(), &[]);
        assert!(
            refused.contains(why) && refused.contains(path.as_str()),
            "{refused}"
        );
        let prober = [
            "--report-to",
            "http://c:1",
            "--coordinator-token-file",
            path,
        ];
        let refused = refusal(&prober, &[]);
        assert!(refused.contains(why), "{refused}");
    }
    let prober = [
        "--report-to",
        "http://c:1",
        "--coordinator-token-file",
        &good,
    ];
    match command(&prober, &[]) {
        Ok(CliCommand::Probe(probe)) => assert_eq!(probe.config.token.unwrap().expose(), "hunter2"),
        other => panic!("{other:?}"),
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_named_target_and_nothing_else_gives_a_small_run() {
    for args in [TARGET.to_vec(), [&["run"], TARGET].concat()] {
        let run = run(&args, &[]);
        let plan = &run.plan;
        assert_eq!(
            (
                plan.total_participants(),
                plan.total_published_tracks(Kind::Audio),
                plan.total_published_tracks(Kind::Video)
            ),
            (11, 1, 1)
        );
        assert_eq!(
            (
                plan.scenario.joins_per_second,
                plan.scenario.times().hold,
                plan.scenario.media.pacing
            ),
            (50.0, Duration::from_secs(15), Pacing::Paced)
        );
        assert_eq!(
            (
                plan.connection,
                plan.target.origin,
                plan.scenario.seed,
                plan.run_tag
            ),
            (ConnectionMode::Auto, TargetOrigin::Flag, 7, 0xC0FF_EE01)
        );
        assert_eq!(
            (
                plan.scenario.media.video.width,
                plan.scenario.media.video.height,
                plan.scenario.media.video.frames_per_second,
                plan.scenario.media.video.bitrate.bps()
            ),
            (1280, 720, 30, 2_000_000)
        );
        assert_eq!(
            (
                plan.scenario.media.audio.bitrate.bps(),
                plan.scenario.media.audio.frame
            ),
            (24_000, Duration::from_millis(20))
        );
        assert_eq!(
            (
                run.judging.max_loss_pct,
                run.judging.target_rtt,
                run.judging.thresholds.len()
            ),
            (1.0, None, 0)
        );
        assert_eq!(run.credentials.unwrap().api_secret, "hunter2");
        assert!(
            !run.dry_run
                && !run.quiet
                && !run.no_live
                && run.threads.is_none()
                && run.warnings.is_empty()
        );
    }
}

#[test]
fn shape_flags_mean_what_they_mean_in_lk() {
    for publishers in ["--publishers", "--audio-publishers"] {
        let plan = local(&[
            publishers,
            "10",
            "--video-publishers",
            "5",
            "--subscribers",
            "90",
            "--room",
            "hall",
            "--identity-prefix",
            "load",
        ])
        .plan;
        assert_eq!(plan.total_participants(), 100);
        assert_eq!(
            plan.participants()
                .filter(|p| p.publishes_audio && p.publishes_video)
                .count(),
            5
        );
        assert_eq!(
            (plan.room_name(0), plan.participant(3).identity),
            ("hall".into(), "load-c0ffee01-3".into())
        );
    }
    let plan = local(&["--room-count", "3", "--publishers", "4", "--meeting"]).plan;
    assert_eq!(
        (
            plan.total_participants(),
            plan.total_planned_tracks(Kind::Audio),
            plan.total_sockets()
        ),
        (12, 36, 24)
    );
}

#[test]
fn every_value_reaches_the_plan() {
    let run = local(&[
        "--publishers=1",
        "--subscribers=1",
        "--video-publishers=1",
        "--video-resolution=855x481",
        "--video-bitrate=1.5M",
        "--video-fps=25",
        "--video-codec=vp8",
        "--audio-bitrate=48000",
        "--audio-frame=40ms",
        "--pacing=burst",
        "--num-per-second=0.5",
        "--duration=30m",
        "--max-loss=2.5",
        "--target-rtt-ms=50",
        "--threads=3",
        "--connection=dual",
        "--seed=99",
        "--quiet",
        "--no-live",
        "--json=-",
        "--participants=p.ndjson",
        "--hgrm=out",
        "--record=recordings",
        "--dry-run",
        "--threshold",
        "audio.one_way_latency.p95<150ms",
        "--threshold",
        "session.disconnects<1",
    ]);
    let plan = &run.plan;
    assert_eq!(
        (
            plan.scenario.media.video.width,
            plan.scenario.media.video.height,
            plan.scenario.media.video.frames_per_second,
            plan.scenario.media.video.bitrate.bps()
        ),
        (855, 481, 25, 1_500_000)
    );
    assert_eq!(
        (
            plan.scenario.media.audio.bitrate.bps(),
            plan.scenario.media.audio.frame
        ),
        (48_000, Duration::from_millis(40))
    );
    assert_eq!(
        (
            plan.scenario.media.pacing,
            plan.scenario.joins_per_second,
            plan.scenario.times().hold,
            plan.scenario.seed
        ),
        (Pacing::Burst, 0.5, Duration::from_secs(1_800), 99)
    );
    assert_eq!(
        (run.judging.max_loss_pct, run.judging.target_rtt),
        (2.5, Some(Duration::from_millis(50)))
    );
    assert_eq!(
        run.judging
            .thresholds
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>(),
        ["audio.one_way_latency.p95<150ms", "session.disconnects<1"]
    );
    assert_eq!(
        (
            run.threads,
            run.dry_run,
            run.quiet,
            run.no_live,
            run.destinations.json_on_stdout()
        ),
        (Some(3), true, true, true, true)
    );
    assert_eq!(
        run.destinations.record.as_deref(),
        Some(Path::new("recordings"))
    );
}

#[test]
fn durations_are_read_with_and_without_a_unit() {
    for (text, seconds) in [
        ("20", 20),
        ("20s", 20),
        ("30m", 1_800),
        ("1h", 3_600),
        ("1h30m", 5_400),
    ] {
        assert_eq!(
            local(&["--duration", text]).plan.scenario.times().hold,
            Duration::from_secs(seconds),
            "{text}"
        );
    }
    for text in ["0", "0s", "", "x", "1e3", "1w2", "31d", "-5"] {
        local_refusal(&[&format!("--duration={text}")]);
    }
}

#[test]
fn resolutions_carry_their_frame_rate_and_bitrate() {
    for (size, expected) in [
        ("medium", (640, 360, 20, 600_000)),
        ("low", (320, 180, 15, 150_000)),
        ("1920x1080", (1920, 1080, 30, 4_500_000)),
    ] {
        let video = local(&["--video-publishers=1", "--video-resolution", size])
            .plan
            .scenario
            .media
            .video;
        assert_eq!(
            (
                video.width,
                video.height,
                video.frames_per_second,
                video.bitrate.bps()
            ),
            expected
        );
    }
    assert_eq!(
        local(&["--video-publishers=1", "--video-fps=15"])
            .plan
            .scenario
            .media
            .video
            .bitrate
            .bps(),
        1_000_000
    );
}

#[test]
fn a_bare_throng_tests_the_embedded_sfu_with_as_many_as_the_host_bears() {
    for (args, env) in [(&[][..], &[][..]), (&["run"], &[("LIVEKIT_URL", "")])] {
        let run = run(args, env);
        let plan = &run.plan;
        assert_eq!(plan.target.origin, TargetOrigin::Embedded(SendMode::Plain));
        assert_eq!(plan.target.to_string(), "embedded SFU");
        assert!(run.credentials.is_none());
        assert_eq!(
            (
                plan.scenario.publishers(),
                plan.scenario.publishers_of(Kind::Video),
                plan.scenario.subscribers()
            ),
            (3, 1, 200)
        );
        assert_eq!(plan.scenario.times().hold, Duration::from_secs(10));
        assert!(plan.joining() <= Duration::from_secs(3));
    }
    let with_cpus = |cpus| match parse_with([OsString::from("throng")], &|_| None, cpus, FRESH) {
        Ok(CliCommand::Run(run)) => run.plan.scenario.subscribers(),
        other => panic!("{other:?}"),
    };
    assert_eq!([with_cpus(1), with_cpus(4), with_cpus(64)], [100, 400, 600]);
}

#[test]
fn a_shape_without_a_target_is_a_test_of_the_embedded_sfu_with_the_usual_pace() {
    let plan = run(
        &[
            "--publishers",
            "1",
            "--subscribers",
            "7",
            "--sfu-send",
            "gso",
        ],
        &[],
    )
    .plan;
    assert_eq!(plan.target.origin, TargetOrigin::Embedded(SendMode::Gso));
    assert_eq!(
        (
            plan.scenario.subscribers(),
            plan.scenario.joins_per_second,
            plan.scenario.times().hold
        ),
        (7, 50.0, Duration::from_secs(15))
    );
}

#[test]
fn what_belongs_to_a_server_is_refused_without_one_and_the_other_way_round() {
    assert!(refusal(&["--api-key", "k"], &[]).contains("add --url"));
    assert!(refusal(&["--api-secret", "hunter2"], &[]).contains("add --url"));
    let both = [TARGET, &["--sfu-send", "plain"]].concat();
    assert!(refusal(&both, &[]).contains("--url names another server"));
    // Credentials in the environment do not choose a target.
    assert!(
        run(
            &[],
            &[("LIVEKIT_API_KEY", "k"), ("LIVEKIT_API_SECRET", "s")]
        )
        .plan
        .target
        .is_embedded()
    );
}

#[test]
fn a_remote_target_from_the_environment_gets_only_load_that_was_asked_for() {
    for args in [
        &[][..],
        &["--room", "x"],
        &["--duration", "1h"],
        &["--identity-prefix", "x"],
        &["--dry-run"],
    ] {
        let text = refusal(args, REMOTE);
        assert!(
            text.contains("wss://sfu.example.com")
                && text.contains("--publishers 1 --video-publishers 1 --subscribers 10"),
            "{text}"
        );
    }
    assert_eq!(
        run(&["--subscribers", "3"], REMOTE).plan.target.origin,
        TargetOrigin::Environment
    );
    assert_eq!(
        run(&["--url", "wss://sfu.example.com"], REMOTE)
            .plan
            .total_participants(),
        11
    );
    let at_home = [
        ("LIVEKIT_URL", "http://localhost:7880"),
        REMOTE[1],
        REMOTE[2],
    ];
    assert_eq!(
        run(&[], &at_home).plan.target.url.to_string(),
        "ws://localhost:7880"
    );
}

#[test]
fn flags_come_before_the_environment() {
    let run = run(
        &["--url", "http://127.0.0.1:1", "--api-key", "mine"],
        REMOTE,
    );
    let credentials = run.credentials.unwrap();
    assert_eq!(
        (
            run.plan.target.url.to_string(),
            credentials.api_key,
            credentials.api_secret
        ),
        ("ws://127.0.0.1:1".into(), "mine".into(), "hunter2".into())
    );
}

#[test]
fn credentials_are_asked_for_except_by_a_dry_run() {
    assert!(refusal(&["--url", "ws://h"], &[]).contains("--api-key or set LIVEKIT_API_KEY"));
    assert!(
        refusal(
            &["--url", "ws://h", "--api-key", "k", "--api-secret", ""],
            &[]
        )
        .contains("--api-secret or set LIVEKIT_API_SECRET")
    );
    assert!(
        run(&["--url", "ws://h", "--dry-run"], &[])
            .credentials
            .is_none()
    );
}

#[test]
fn nonsense_is_refused_with_what_to_write_instead() {
    for (args, expected) in [
        (&["--publishers", "0"][..], "nobody would join"),
        (
            &["--room-count", "0", "--subscribers", "1"],
            "--room-count 0",
        ),
        (&["--room-count", "2"], "who is in them"),
        (
            &["--meeting", "--subscribers", "2"],
            "--meeting is for publishers",
        ),
        (
            &["--subscribers", "4000000000", "--publishers", "4000000000"],
            "more than 1000000 participants",
        ),
        (
            &["--subscribers", "1000", "--room-count", "4000000"],
            "more than 1000000 participants",
        ),
        (&["--subscribers", "-1"], "unexpected argument"),
        (&["--subscribers", "ten"], "write a whole number"),
        (&["--connection", "triple"], "auto, single, dual"),
        (&["--video-codec", "h264"], "possible values: vp8"),
        (&["--pacing", "smooth"], "paced, burst"),
        (
            &["--video-resolution", "8x8"],
            "high, medium, low or WIDTHxHEIGHT",
        ),
        (&["--video-fps", "0"], "write 1 to 60 frames a second"),
        (&["--video-fps", "61"], "write 1 to 60 frames a second"),
        (&["--video-bitrate", "1"], "out of range"),
        (&["--audio-bitrate", "1M"], "6k to 510k"),
        (&["--audio-frame", "15ms"], "10ms, 20ms, 40ms"),
        (&["--num-per-second", "0"], "write a rate"),
        (&["--num-per-second", "nan"], "write a rate"),
        (&["--max-loss", "101"], "0 to 100"),
        (&["--max-loss", "NaN"], "0 to 100"),
        (&["--target-rtt-ms", "0"], "write milliseconds"),
        (
            &["--threshold", "audio.one_way_latncy.p95<1ms"],
            "did you mean one_way_latency",
        ),
        (&["--threads", "0"], "1..=1024"),
        (&["--seed", "9007199254740992"], "9007199254740992"),
        (
            &["--identity-prefix", "a\u{1b}b"],
            "--identity-prefix holds the character U+001B",
        ),
        (&["--room", ""], "--room is empty"),
        (&["--json", "a", "--participants", "a"], "the same file"),
        (&["--participants", "-"], "only --json"),
        (&["--subscribers", "1", "--record", "-"], "only --json"),
        (
            &["--publishers", "2", "--record", "out"],
            "nobody subscribes: add --subscribers 1",
        ),
    ] {
        let text = local_refusal(args);
        assert!(text.contains(expected), "{args:?}: {text}");
        assert!(
            text.starts_with("error: ") && !text.ends_with('\n'),
            "{text:?}"
        );
    }
}

#[test]
fn flags_that_are_not_built_yet_or_never_will_be_are_unknown() {
    let flag = "--html=f";
    assert!(
        local_refusal(&[flag]).contains("unexpected argument"),
        "{flag}"
    );
    assert!(local_refusal(&["--subscriber", "3"]).contains("'--subscribers'"));
    assert!(refusal(&["compare"], &[]).starts_with("error: "));
}

#[test]
fn tiers_are_as_asked_and_the_largest_counts() {
    let run = local(&[
        "--ramp",
        "2, 10,25,5",
        "--duration",
        "20",
        "--publishers",
        "1",
        "--room-count",
        "3",
    ]);
    let plan = &run.plan;
    assert_eq!(
        (
            &plan.scenario.ramp_tiers()[..],
            plan.scenario.subscribers(),
            plan.total_participants()
        ),
        (&[2, 10, 25, 5][..], 25, 78)
    );
    assert_eq!(
        (
            plan.scenario.times().warmup,
            plan.scenario.times().spread,
            plan.scenario.joins_per_second
        ),
        (Duration::from_secs(2), None, 50.0)
    );
    // 9 + 24 + 45 joins and 60 leaves at 50 per second, and four times 22 s and the pauses between.
    assert_eq!(
        plan.length(Duration::from_secs(1)),
        Some(Duration::from_millis(2_760) + Duration::from_secs(4 * 23))
    );
    let spread = local(&["--ramp", "2,4", "--ramp-time", "1m", "--warmup", "0"]);
    assert_eq!(
        (
            spread.plan.scenario.times().spread,
            spread.plan.scenario.times().warmup
        ),
        (Some(Duration::from_secs(60)), Duration::ZERO)
    );
    assert_eq!(
        (
            spread.plan.scenario.publishers_of(Kind::Audio),
            spread.plan.scenario.publishers_of(Kind::Video)
        ),
        (1, 1),
        "there is something to receive"
    );
}

#[test]
fn a_search_has_short_points_and_the_most_counts() {
    let plan = local(&[
        "--find-knee",
        "--max",
        "400",
        "--publishers",
        "2",
        "--video-publishers",
        "1",
    ])
    .plan;
    assert!(
        plan.scenario.search.is_some() && plan.scenario.ramp_tiers().is_empty() && plan.has_tiers()
    );
    assert_eq!(
        (plan.scenario.subscribers(), plan.total_participants()),
        (400, 402)
    );
    assert_eq!(
        (plan.scenario.times().hold, plan.scenario.times().warmup),
        (Duration::from_secs(5), Duration::from_secs(2))
    );
    assert_eq!(
        plan.length(Duration::ZERO),
        None,
        "nobody knows how long it takes"
    );
}

#[test]
fn without_tiers_the_time_to_ramp_is_that_of_all_joins() {
    let plan = local(&[
        "--publishers",
        "10",
        "--subscribers",
        "50",
        "--ramp-time",
        "30s",
        "--warmup",
        "5s",
    ])
    .plan;
    assert_eq!(
        (
            plan.scenario.joins_per_second,
            plan.scenario.times().spread,
            plan.scenario.times().warmup
        ),
        (2.0, None, Duration::from_secs(5))
    );
    assert!(plan.joining() < Duration::from_secs(30) && plan.joining() > Duration::from_secs(29));
}

/// A coordinator's job and a journal refuse the same scenario with the same sentence: see the tests
/// beside them.
#[test]
fn flags_are_refused_with_the_sentence_of_the_scenario() {
    /// Arguments, the flag that the refusal names, and the same mistake in a scenario.
    type Bound = (&'static [&'static str], &'static str, fn(&mut Scenario));
    let bounds: [Bound; 8] = [
        (&["--video-fps", "61"], "--video-fps", |of| {
            of.media.video.frames_per_second = 61;
        }),
        (&["--video-bitrate", "1k"], "--video-bitrate", |of| {
            of.media.video.bitrate = "1k".parse().unwrap();
        }),
        (&["--audio-bitrate", "1M"], "--audio-bitrate", |of| {
            of.media.audio.bitrate = "1M".parse().unwrap();
        }),
        (&["--audio-frame", "15ms"], "--audio-frame", |of| {
            of.media.audio.frame = Duration::from_millis(15);
        }),
        (&["--num-per-second", "0"], "--num-per-second", |of| {
            of.joins_per_second = 0.0;
        }),
        (&["--duration", "31d"], "--duration", |of| {
            of.phases[0].hold = Duration::from_secs(31 * 24 * 3600);
        }),
        (&["--warmup", "31d"], "--warmup", |of| {
            of.phases[0].warmup = Duration::from_secs(31 * 24 * 3600);
        }),
        (&["--room", "a\nb"], "--room", |of| {
            of.rooms.name = Some("a\nb".to_owned());
        }),
    ];
    for (args, flag, break_it) in bounds {
        let mut scenario = local(&[]).plan.scenario;
        break_it(&mut scenario);
        let ScenarioError { field, fault } = scenario.validate().unwrap_err();
        assert_eq!(local_refusal(args), format!("error: {flag} {fault}"));
        let text = serde_json::to_string(&scenario).unwrap();
        let read: Scenario = serde_json::from_str(&text).unwrap();
        let why = read.validate().unwrap_err().to_string();
        assert_eq!(why, format!("{field} {fault}"));
    }
}

#[test]
fn tiers_that_make_no_sense_are_refused() {
    for (args, expected) in [
        (&["--ramp", "0"][..], "a tier without subscribers"),
        (&["--ramp", "2,0,5"], "a tier without subscribers"),
        (&["--ramp", "5,"], "as in 2,10,25,50"),
        (&["--ramp", ""], "as in 2,10,25,50"),
        (&["--ramp", "5;6"], "as in 2,10,25,50"),
        (&["--ramp", "+5"], "as in 2,10,25,50"),
        (&["--ramp=-5"], "as in 2,10,25,50"),
        (&["--ramp", "2.5"], "as in 2,10,25,50"),
        (&["--ramp", "99999999999"], "as in 2,10,25,50"),
        (&["--ramp", "1000001"], "more than 1000000 participants"),
        (&["--ramp", "4294967295"], "more than 1000000 participants"),
        (
            &["--ramp", "5", "--subscribers", "5"],
            "leave out --subscribers",
        ),
        (
            &["--ramp", "5", "--ramp-time", "5s", "--num-per-second", "5"],
            "give one of them",
        ),
        (&["--ramp", "5", "--ramp-time", "0"], "write 1s to 30d"),
        (&["--ramp", "5", "--ramp-time", "31d"], "write 1s to 30d"),
        (
            &["--ramp", "5", "--ramp-time", "soon"],
            "write 20, 20s, 30m or 1h",
        ),
        (&["--ramp", "5", "--warmup", "-1"], "unexpected argument"),
        (
            &["--ramp", "5", "--warmup", "99999999999999999999"],
            "write 20, 20s, 30m or 1h",
        ),
        (&["--ramp", "5", "--warmup", "40d"], "write 0 to 30d"),
        (&["--find-knee"], "add --max N"),
        (&["--max", "5"], "--max is for --find-knee"),
        (&["--find-knee", "--max", "0"], "write 1 or more"),
        (&["--find-knee", "--max", "many"], "write a whole number"),
        (
            &["--find-knee", "--max", "1000000"],
            "more than 1000000 participants",
        ),
        (
            &["--find-knee", "--max", "5", "--ramp", "2"],
            "leave out --ramp",
        ),
        (
            &["--find-knee", "--max", "5", "--subscribers", "2"],
            "leave out --subscribers",
        ),
        (
            &[
                "--find-knee",
                "--max",
                "5",
                "--threshold",
                "session.disconnects<1:abort",
            ],
            "leave out :abort",
        ),
        (
            &[
                "--duration",
                "30",
                "--threshold",
                "audio.jitter.p95<5ms for 1m",
            ],
            "raise --duration",
        ),
    ] {
        let refusal = local_refusal(args);
        assert!(refusal.contains(expected), "{args:?}: {refusal}");
    }
    let many = ["1"; 201].join(",");
    assert!(local_refusal(&["--ramp", &many]).contains("at most 200 tiers"));
}

#[test]
fn a_coordinator_s_address_makes_a_prober_by_flag_or_by_the_environment_alone() {
    let probe =
        |args: &[&str], env: &'static [(&'static str, &'static str)]| match command(args, env) {
            Ok(CliCommand::Probe(probe)) => *probe,
            other => panic!("a prober: {other:?}"),
        };
    const ALONE: &[(&str, &str)] = &[
        ("COORDINATOR_URL", "http://10.0.0.1:8787"),
        ("COORDINATOR_TOKEN", "hunter2"),
        ("FLY_REGION", "fra"),
    ];
    let alone = probe(&[], ALONE);
    assert_eq!(
        (
            alone.config.coordinator.http().as_str(),
            alone.config.vantage.as_str()
        ),
        ("http://10.0.0.1:8787", "fra")
    );
    assert_eq!(
        (
            alone.config.role,
            alone.config.weight,
            alone.config.token.as_ref().map(|token| token.expose())
        ),
        (HostRole::Both, 1, Some("hunter2"))
    );
    assert!(
        alone.run.plan.target.is_embedded()
            && alone.run.credentials.is_none()
            && !alone.shape_given
    );
    assert!(!format!("{alone:?}").contains("hunter2"));
    let flags = [
        "--report-to=http://h:1",
        "--vantage=iad",
        "--role=publish",
        "--weight=3",
        "--coordinator-token=t",
        "--url=ws://s:7880",
    ];
    let flags = probe(
        &flags,
        &[
            ("COORDINATOR_URL", "http://other"),
            ("FLY_REGION", "fra"),
            ("LIVEKIT_API_KEY", "k"),
            ("LIVEKIT_API_SECRET", "s"),
        ],
    );
    assert_eq!(
        (
            flags.config.coordinator.http().as_str(),
            flags.config.vantage.as_str()
        ),
        ("http://h:1", "iad")
    );
    assert_eq!(
        (
            flags.config.role,
            flags.config.weight,
            flags.run.plan.target.url.to_string().as_str()
        ),
        (HostRole::Publish, 3, "ws://s:7880")
    );
    assert!(flags.run.credentials.is_some());
    assert_eq!(
        probe(
            &["--report-to=http://h"],
            &[("VOICEGW_REGION", "ams"), ("FLY_REGION", "fra")]
        )
        .config
        .vantage,
        "ams"
    );
    for (args, says) in [
        (&["--vantage=fra"][..], "add --report-to"),
        (
            &["--report-to=http://h", "--ramp=2,10"],
            "--ramp is not a prober's to say",
        ),
        (
            &["--report-to=http://h", "--subscribers=2"],
            "--subscribers is not a prober's to say",
        ),
        (
            &["--report-to=http://h", "--dry-run"],
            "--dry-run is not a prober's to say",
        ),
        (
            &["--report-to=http://h", "--role=listen"],
            "publish, subscribe or both",
        ),
        (&["--report-to=http://h", "--weight=0"], "1..=100"),
        (&["--report-to=http://h", "--vantage=a b"], "without spaces"),
        (&["--report-to=h"], "--report-to needs a scheme"),
        (
            &["--report-to=http://h", "--api-key=k"],
            "LIVEKIT_API_SECRET",
        ),
    ] {
        let text = refusal(args, &[]);
        assert!(text.contains(says), "{args:?}: {text}");
    }
}

#[test]
fn layers_layouts_and_speakers_are_as_asked() {
    assert!(
        local(&["--video-publishers=1", "--obey-bwe"])
            .plan
            .scenario
            .media
            .obey_bandwidth
            && !local(&[]).plan.scenario.media.obey_bandwidth
    );
    let plan = local(&["--publishers=2", "--video-publishers=2"]).plan;
    assert_eq!(
        (
            plan.media_of(Kind::Video).video_layers().len(),
            plan.scenario.media.layout,
            plan.scenario.rooms.simulate_speakers,
            plan.scenario.media.audio.dtx
        ),
        (3, None, false, false)
    );
    let all = [
        "--publishers=2",
        "--video-publishers=2",
        "--no-simulcast",
        "--simulate-speakers",
        "--audio-dtx",
    ];
    for layout in ViewLayout::ALL {
        let plan = local(&[&all[..], &["--layout", layout.name()]].concat()).plan;
        assert_eq!(
            (
                plan.media_of(Kind::Video).video_layers().len(),
                plan.scenario.media.layout,
                plan.scenario.rooms.simulate_speakers,
                plan.scenario.media.audio.dtx
            ),
            (1, Some(layout), true, true)
        );
    }
    assert!(local_refusal(&["--layout=2x2"]).contains("write speaker, 3x3, 4x4 or 5x5"));
    assert_eq!(
        local(&["--subscribers=2", "--layout=3x3", "--audio-dtx"]).warnings,
        [
            "--layout has no effect: nobody publishes video (--video-publishers)",
            "--audio-dtx has no effect: nobody publishes audio (--publishers)"
        ]
    );
}

#[test]
fn a_client_replaces_defaults_and_a_flag_wins() {
    let people = ["--publishers=1", "--video-publishers=1"];
    let with = |more: &[&str]| local(&[&people[..], more].concat()).plan.scenario;
    let usual = with(&[]);
    assert_eq!(with(&["--client=lk"]), usual);
    assert!(usual.media.client.is_lk() && usual.media.dynacast && !usual.media.adaptive_stream);
    for client in ClientKind::ALL.into_iter().filter(|client| !client.is_lk()) {
        let flag = format!("--client={}", client.name());
        let (of, defaults) = (with(&[&flag]), client.defaults());
        assert_eq!(
            (of.media.client, of.connection),
            (client, defaults.connection)
        );
        let media = &of.media;
        assert_eq!((media.audio, media.dynacast), (defaults.audio, false));
        let top = defaults.top_layer(1280, 720).unwrap();
        assert_eq!(
            (media.video, &media.lower_layers),
            (top, &defaults.lower_layers(top))
        );
        // Every part by its own flag.
        let flags = [
            "--audio-bitrate=24k",
            "--audio-frame=40ms",
            "--no-audio-dtx",
            "--no-audio-red",
            "--video-bitrate=1M",
            "--video-fps=10",
            "--dynacast=on",
            "--layout=3x3",
            "--adaptive-stream",
        ];
        for connection in ["auto", "single", "dual"] {
            let connection = format!("--connection={connection}");
            let of = with(&[&[&flag, &connection as &str], &flags[..]].concat());
            assert_eq!(of.connection.name(), connection.split_once('=').unwrap().1);
            let (audio, video) = (of.media.audio, of.media.video);
            assert_eq!(
                (audio.bitrate.bps(), audio.dtx, audio.redundancy),
                (24_000, false, 0)
            );
            assert_eq!(audio.frame, Duration::from_millis(40));
            assert_eq!(
                (video.bitrate.bps(), video.frames_per_second),
                (1_000_000, 10)
            );
            assert!(of.media.dynacast && of.media.adaptive_stream);
            let lower = of.media.lower_layers.unwrap();
            assert!(lower.iter().all(|layer| layer.frames_per_second == 10));
        }
        let plan = local(&[&people[..], &[&flag as &str, "--no-simulcast"]].concat()).plan;
        assert_eq!(plan.scenario.media.video_layers(), [top]);
    }
    assert!(
        local_refusal(&["--client=go"]).contains("write js, rust, swift, android, agent or lk")
    );
    assert!(
        local_refusal(&["--adaptive-stream", "--client=js"])
            .contains("--adaptive-stream needs a layout")
    );
    for (one, other) in [
        ("--audio-dtx", "--no-audio-dtx"),
        ("--audio-red", "--no-audio-red"),
    ] {
        assert!(local_refusal(&[one, other]).contains("cannot be used with"));
    }
}

#[test]
fn an_agent_publishes_no_video_that_nobody_asked_for() {
    let people = |args: &[&str]| local(args).plan.scenario.people();
    assert_eq!(people(&["--client=agent"]).video_publishers, 0);
    assert_eq!(people(&["--client=js"]).video_publishers, 1);
    assert_eq!(
        people(&["--client=agent", "--video-publishers=2"]).video_publishers,
        2
    );
    let tour = run(&["--client=agent"], &[]).plan;
    assert!(tour.target.is_embedded());
    assert_eq!(tour.total_published_tracks(Kind::Video), 0);
    assert!(tour.total_published_tracks(Kind::Audio) > 0);
}

#[test]
fn the_first_line_and_the_notes_name_the_client() {
    let plan = local(&["--client=swift", "--publishers=1"]).plan;
    let line = throng::report::text::first_line(&plan);
    assert!(
        line.contains("dual connection, as swift (client-sdk-swift 2.16.0); "),
        "{line}"
    );
    assert_eq!(
        plan.client_notes(),
        ["as swift, but no data channels: docs/clients.md"]
    );
    let plan = local(&["--client=swift"]).plan;
    let note = plan.client_notes().join("; ");
    assert!(
        note.contains("VP8 where the device would choose H264"),
        "{note}"
    );
    let plan = local(&[]).plan;
    assert!(!throng::report::text::first_line(&plan).contains(", as "));
    assert!(plan.client_notes().is_empty());
}

#[test]
fn useless_flags_are_named_and_the_run_goes_on() {
    assert_eq!(
        local(&["--publishers", "1", "--video-bitrate", "1M"]).warnings,
        ["--video-bitrate has no effect: nobody publishes video (--video-publishers)"]
    );
    assert!(local(&["--video-bitrate", "1M"]).warnings.is_empty());
}

#[test]
fn secrets_never_reach_any_output() {
    let secret = "hunter2";
    let leaks = [
        refusal(
            &[
                "--url",
                "wss://user:hunter2@host",
                "--api-key",
                "k",
                "--api-secret",
                secret,
            ],
            &[],
        ),
        refusal(&["--url", "wss://host?access_token=hunter2"], &[]),
        refusal(&["--url", "hunter2"], &[]),
        refusal(&[], &[("LIVEKIT_URL", "ws://user:hunter2@h")]),
        refusal(&["--api-secret", secret, "--api-secret", secret], &[]),
        refusal(&["--api-secrte=hunter2"], &[]),
        local_refusal(&["--duration", "0"]),
        format!("{:?}", local(&[])),
    ];
    for text in leaks {
        assert!(!text.contains(secret), "{text}");
    }
}

#[test]
fn help_and_version_go_to_standard_output() {
    for (args, expected) in [
        (&["--help"][..], "--subscribers <N>"),
        (&["run", "-h"], "LIVEKIT_URL"),
        (&["--version"], env!("CARGO_PKG_VERSION")),
    ] {
        match command(args, &[]) {
            Ok(CliCommand::Show(text)) => assert!(text.contains(expected), "{text}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_calibration_takes_little_and_is_refused_what_it_does_not_know() {
    let Ok(CliCommand::Calibrate(calibrate)) = command(
        &["calibrate", "--threads", "3", "--json", "-", "--quiet"],
        &[],
    ) else {
        panic!("no calibration");
    };
    assert_eq!((calibrate.threads, calibrate.quiet), (Some(3), true));
    assert!(calibrate.destinations().json_on_stdout());
    // A calibration ignores the server that the environment names.
    assert!(command(&["calibrate"], &[("LIVEKIT_URL", "wss://example.com")]).is_ok());
    assert!(command(&["calibrate", "--threads", "0"], &[]).is_err());
    assert!(command(&["calibrate", "--url", "ws://127.0.0.1:7880"], &[]).is_err());
}

#[test]
fn the_log_is_asked_for_before_a_subcommand_or_behind_it() {
    let log = |line: &str, variable: Option<&str>| {
        let args = line.split(' ').map(OsString::from);
        let env = |name: &str| variable.filter(|_| name == "RUST_LOG").map(str::to_owned);
        parse(args, &env, CPUS).map(|invocation| invocation.log)
    };
    let silent = log("throng sfu", None).unwrap();
    assert_eq!(log("throng", None).unwrap(), silent);
    assert_eq!(log("throng sfu", Some("")).unwrap(), silent);
    let verbose = log("throng -v", None).unwrap();
    assert_ne!(verbose, silent);
    for line in [
        "throng -v sfu",
        "throng sfu -v",
        "throng --verbose calibrate",
        "throng run --verbose --subscribers 1",
        "throng --subscribers 1 -v",
    ] {
        assert_eq!(log(line, Some("off")).unwrap(), verbose, "{line}");
    }
    assert_eq!(log("throng", Some("debug")).unwrap(), verbose);
    let all = log("throng -vv sfu", None).unwrap();
    assert_ne!(all, verbose);
    for line in ["throng sfu -vv", "throng -v -v", "throng run -v --verbose"] {
        assert_eq!(log(line, None).unwrap(), all, "{line}");
    }
    for line in ["throng", "throng -v"] {
        let refusal = log(line, Some("throng:debug")).unwrap_err().to_string();
        assert!(
            refusal.starts_with("error: RUST_LOG: 'throng:debug' names no level"),
            "{refusal}"
        );
    }
    // Commands that only print something need no log.
    assert!(log("throng --help", Some("loud")).is_ok());
    assert!(refusal(&["-v", "nonsense"], &[]).contains("nonsense"));
}

#[test]
fn two_runs_are_told_apart() {
    let draw = || match parse(
        std::iter::once("throng")
            .chain(TARGET.iter().copied())
            .map(OsString::from),
        &|_| None,
        CPUS,
    )
    .map(|invocation| invocation.command)
    {
        Ok(CliCommand::Run(run)) => (run.plan.run_tag, run.plan.scenario.seed),
        other => panic!("{other:?}"),
    };
    assert_ne!(draw(), draw());
}
