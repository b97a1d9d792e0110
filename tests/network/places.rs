//! A coordinator and four probers. Each is a process at a place with a path of its own to the
//! server. The merged result must equal one histogram of everything, and each vantage must show the
//! delay and the loss that were set for its path.

use std::time::Duration;

use crate::common::led::{Account, Coordinator, TOKEN};
use crate::common::network::{Direction, Places};
use crate::common::path::{Conditions, Loss};
use crate::common::program::{Report, Running, Scratch, against, beside_one_other, throng};
use crate::common::server::Server;

use super::paths::{SITE, livekit_in};
use serde_json::Value;

/// Path of a vantage: milliseconds to the server and back, and the share of packets that is lost on
/// the way back. Loss is on the way back only, so that a lost packet is missing at this vantage
/// alone.
struct Way {
    vantage: &'static str,
    up: u64,
    down: u64,
    lost: f64,
}

const fn way(vantage: &'static str, up: u64, down: u64, lost: f64) -> Way {
    Way {
        vantage,
        up,
        down,
        lost,
    }
}

/// Paths from the best to the worst.
const WAYS: [Way; 4] = [
    way("ams", 2, 2, 0.0),
    way("fra", 10, 10, 0.0),
    // A path that is longer in one direction cannot be told from a clock's offset.
    way("iad", 10, 40, 0.0),
    way("sin", 60, 60, 0.06),
];

/// Time that a busy host may add to a median round trip. The round trips of two vantages differ by
/// less than this only if both are near.
const ROOM: Duration = Duration::from_millis(40);

#[test]
fn four_places_around_livekit() {
    around("four_places_around_livekit", |network| {
        livekit_in(&network.server)
    });
}

#[test]
fn four_places_around_the_embedded_sfu() {
    around("four_places_around_the_embedded_sfu", |network| {
        Some(network.server.run(|| Server::embedded_at(SITE)))
    });
}

fn around(name: &str, start: impl FnOnce(&Places) -> Option<Server>) {
    let _turn = beside_one_other();
    let Some(network) = Places::for_test(module_path!(), name, WAYS.len(), 11) else {
        return;
    };
    let Some(server) = start(&network) else {
        return;
    };
    let scratch = Scratch::new();
    for (at, way) in WAYS.iter().enumerate() {
        for (direction, millis, lost) in [
            (Direction::Up, way.up, 0.0),
            (Direction::Down, way.down, way.lost),
        ] {
            let conditions = Conditions {
                delay: Duration::from_millis(millis),
                loss: if lost > 0.0 {
                    Loss::Random(lost)
                } else {
                    Loss::None
                },
                ..Conditions::default()
            };
            network.wires.set(at, direction, conditions);
        }
        // Clocks are compared over the same paths, so the conditions apply to TCP, too.
        network.wires.touch_tcp(at, true);
    }
    let mut coordinator = network.server.run(|| {
        let mut command = throng();
        against(&server, &mut command).current_dir(scratch.path(""));
        let flags = "--coordinator-bind=10.77.0.2 --expect=4 --journal=journal --json=run.json \
                     --publishers=4 --ramp=2 --duration=3s --num-per-second=20 --max-loss=100 --missing-after=20s";
        Coordinator::start(&mut command, &flags.split_whitespace().collect::<Vec<_>>())
    });
    let url = coordinator.url().expect("it listens");
    let probers: Vec<Running> = WAYS
        .iter()
        .zip(&network.places)
        .map(|(way, place)| {
            let mut command = throng();
            command
                .env("COORDINATOR_URL", &url)
                .env("COORDINATOR_TOKEN", TOKEN)
                .args(["--threads", "1", "--vantage", way.vantage, "--json"])
                .arg(scratch.path(way.vantage))
                .current_dir(scratch.path(""));
            place.run(|| Running::start(&mut command, TOKEN))
        })
        .collect();
    for finished in probers.into_iter().map(Running::finish) {
        assert!(
            matches!(finished.code, Some(0 | 98)),
            "{}\n{}",
            finished.stdout,
            finished.stderr
        );
    }
    let (code, said) = coordinator.finish();
    // On a busy host the run may be INVALID. Counts and clocks must be right all the same.
    assert!(matches!(code, Some(0 | 98)), "{said}");
    let merged = Report::read(&scratch.path("run.json"), &server.secret).0;
    let own: Vec<Value> = WAYS
        .iter()
        .map(|way| Report::read(&scratch.path(way.vantage), &server.secret).0)
        .collect();
    adds_up(&merged, &own);
    for (way, own) in WAYS.iter().zip(&own) {
        has_what_was_planted(way, own, &merged);
    }
    names_the_worst(&merged, &said);
}

/// Asserts that the merged figures are those of one record of everything that happened anywhere.
fn adds_up(merged: &Value, own: &[Value]) {
    let mut sum = Account::default();
    own.iter()
        .for_each(|own| sum.add(&Account::read(&own["totals"])));
    let told = Account::read(&merged["totals"]);
    assert_eq!(told, sum, "{:#?}", told.differences(&sum));
    let mut looked_at = 0;
    for (name, values) in &sum.histograms {
        let (section, name) = name.split_once('.').expect("a section");
        let told = &merged["totals"][section][name];
        for (percentile, share) in [("p50", 0.5), ("p95", 0.95), ("p99", 0.99)]
            .into_iter()
            .filter(|(name, _)| told.get(name).is_some())
        {
            // Scores are skipped: lower is worse for them, so their percentiles count from the
            // other end.
            if !name.contains("mos") {
                assert_eq!(
                    told[percentile].as_u64(),
                    values.percentile(share),
                    "{section}.{name} {percentile}"
                );
                looked_at += 1;
            }
        }
    }
    assert!(looked_at >= 30, "{looked_at} percentiles");
    // All are in one room. Each host has one publisher, and two subscribers that hear all four
    // publishers.
    let session = |name: &str| sum.counter(&format!("session.{name}"));
    assert_eq!(
        (
            session("joins_planned"),
            session("joins_ok"),
            session("frames_misrouted")
        ),
        (12, 12, 0)
    );
    let audio = |name: &str| sum.counter(&format!("audio.{name}"));
    assert_eq!(
        (
            audio("tracks_expected"),
            audio("tracks_live"),
            audio("frames_untimed")
        ),
        (32, 32, 0)
    );
    assert_eq!(
        sum.histograms["audio.one_way_latency"].total(),
        audio("frames_delivered")
    );
}

fn vantage<'a>(merged: &'a Value, label: &str) -> &'a Value {
    let vantages = merged["vantages"].as_array().expect("a list");
    vantages
        .iter()
        .find(|vantage| vantage["vantage"] == label)
        .expect("it took part")
}

fn number(of: &Value) -> f64 {
    of.as_f64().unwrap_or_else(|| panic!("{of} is no number"))
}

fn has_what_was_planted(way: &Way, own: &Value, merged: &Value) {
    let (label, account) = (way.vantage, Account::read(&own["totals"]));
    let (there, here) = ((way.up + way.down) as f64, vantage(merged, label));

    // Round trips.
    let millis = |name: &str, share: f64| {
        account.histograms[name]
            .percentile(share)
            .expect("they came back") as f64
            / 1e3
    };
    let room = ROOM.as_secs_f64() * 1e3;
    assert!(millis("session.rtt_stun", 0.0) >= there - 0.5, "{label}");
    let median = millis("session.rtt_stun", 0.5);
    assert!(
        (there - 0.5..there + room).contains(&median),
        "{label}: {median} ms of {there}"
    );
    let told = number(&here["steps"][0]["rtt"]["p50"]) / 1e3;
    assert!(
        (there - 1.0..there + room).contains(&told),
        "{label}: {told} ms of {there}"
    );

    // Loss.
    let audio = |name: &str| account.counter(&format!("audio.{name}"));
    let (lost, expected) = (audio("packets_lost_network"), audio("frames_expected"));
    let sent = lost + audio("packets_received");
    assert!(expected > 8 * 50 * 3, "{label}: {expected}");
    if way.lost == 0.0 {
        assert_eq!((lost, audio("frames_delivered")), (0, expected), "{label}");
    } else {
        let (mean, chance) = (
            way.lost * sent as f64,
            4.0 * (sent as f64 * way.lost * (1.0 - way.lost)).sqrt(),
        );
        assert!(
            (lost as f64 - mean).abs() <= chance,
            "{label}: {lost} of {sent} lost, not about {mean}"
        );
        assert!(audio("frames_delivered") <= expected);
    }

    // All probers share one host's clock, so the offset is within its uncertainty whatever the
    // paths are like.
    let clock = &here["clock"];
    let (offset, uncertainty) = (
        number(&clock["offset_ms"]),
        number(&clock["uncertainty_ms"]),
    );
    assert!(offset.abs() <= uncertainty, "{label}: {clock}");
    assert!(
        uncertainty >= there / 2.0 && number(&clock["round_trip_ms"]) >= there,
        "{label}: {clock}"
    );

    // The two seconds before each stage belong to the barrier.
    let skew = number(&here["start_skew_ms"]);
    assert!(skew.abs() < 1_000.0, "{label}: {skew} ms late");
    assert!(
        here["steps"][0]["start_skew_ms"].is_number()
            && here["baseline"]["start_skew_ms"].is_number()
    );
    assert_eq!(
        (&here["missing"], &here["baseline"]["clients"]),
        (&Value::from(false), &Value::from(2))
    );
}

fn names_the_worst(merged: &Value, said: &str) {
    let tier = &merged["combined"][0];
    let measured = |way: &&Way| vantage(merged, way.vantage)["steps"][0]["standing"] == "measured";
    let worst = WAYS.iter().rfind(measured);
    assert_eq!(
        tier["worst_vantage"]["vantage"].as_str(),
        worst.map(|way| way.vantage),
        "{tier}"
    );
    if let Some(worst) = worst {
        assert!(
            said.contains(&format!("\n  worst vantage: {}: ", worst.vantage)),
            "{said}"
        );
    }
    assert!(
        said.contains(" lat. p99    start\n") && said.contains("clock off by\n"),
        "{said}"
    );
    assert_eq!(
        tier["measured_vantages"],
        WAYS.iter().filter(measured).count()
    );
    let skews = WAYS
        .iter()
        .map(|way| number(&vantage(merged, way.vantage)["steps"][0]["start_skew_ms"]));
    let most = skews.max_by(|a, b| a.abs().total_cmp(&b.abs()));
    assert_eq!(
        tier["start_skew_ms_max"].as_f64().map(f64::abs),
        most.map(f64::abs)
    );
    assert_eq!(
        (&merged["missing"], &merged["dropped"]),
        (&serde_json::json!([]), &serde_json::json!([]))
    );
}
