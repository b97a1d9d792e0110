//! The seeded world: participants and the embedded SFU over emulated links in virtual time, in one
//! process.
//!
//! A seed determines rooms, participants, what each of them does, and the conditions on every link
//! (`world/plan.rs`). `world/simulation.rs` runs the world, and `world/verdict.rs` checks what must
//! hold afterwards. One seed is one run. A failing seed is printed, kept under `target/`, and worth
//! a line in [`PAST_FAILURES`].
//!
//! `WORLD_SEEDS=1000..20000 cargo test --test world hold` tries many more seeds. `WORLD_SEEDS=17`
//! runs one.

#[path = "../common/mod.rs"]
mod common;

mod client;
mod media;
mod plan;
mod simulation;
mod verdict;
mod witness;

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

use plan::Plan;
use simulation::{Defect, Rule, World};
use verdict::Account;
use witness::Tampering;

/// Seeds that have found a defect: a first frame that was timed for a stream that nobody had asked
/// for (42), and switches to a picture of more than a second ago.
const PAST_FAILURES: &[u64] = &[42, 51, 547];
/// Seeds that every test run tries.
const SEEDS: Range<u64> = 1..301;

struct Outcome {
    account: Account,
    violations: BTreeMap<Rule, String>,
    defects_done: u64,
}

fn live(seed: u64, defect: Option<Defect>) -> Outcome {
    let mut world = World::new(Plan::draw(seed), defect);
    world.run();
    world.tamper();
    let account = verdict::check_drained(&mut world);
    world.empty();
    verdict::check_empty(&mut world);
    Outcome {
        account,
        violations: world.violations,
        defects_done: world.defects_done,
    }
}

/// Returns what is wrong with a seed's world, if anything is.
fn verdict_on(seed: u64) -> Option<String> {
    match catch_unwind(AssertUnwindSafe(|| live(seed, None))) {
        Ok(outcome) if outcome.violations.is_empty() => None,
        Ok(outcome) => Some(told(&outcome.violations)),
        Err(panic) => {
            let said = panic.downcast_ref::<String>().cloned();
            Some(
                said.or_else(|| panic.downcast_ref::<&str>().map(|said| (*said).to_owned()))
                    .unwrap_or_default(),
            )
        }
    }
}

fn told(violations: &BTreeMap<Rule, String>) -> String {
    let lines: Vec<String> = violations
        .iter()
        .map(|(rule, what)| format!("{rule:?}: {what}"))
        .collect();
    lines.join("\n  ")
}

/// Runs worlds on as many threads as there are cores. Each world runs on one thread.
fn run_all(seeds: Vec<u64>) {
    let (next, failures) = (AtomicU64::new(0), std::sync::Mutex::new(Vec::new()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    if let Some(wrong) = verdict_on(*seed) {
                        keep(*seed, &wrong);
                        failures.lock().unwrap().push((*seed, wrong));
                    }
                }
            });
        }
    });
    let mut failures = failures.into_inner().unwrap();
    failures.sort();
    let told: Vec<String> = failures
        .iter()
        .map(|(seed, wrong)| format!("seed {seed}:\n  {wrong}"))
        .collect();
    assert!(
        failures.is_empty(),
        "{} of {} worlds failed; WORLD_SEEDS=<seed> runs one again\n{}",
        failures.len(),
        seeds.len(),
        told.join("\n")
    );
}

/// Keeps a failing seed in a file, where the developer finds it.
fn keep(seed: u64, wrong: &str) {
    let directory = concat!(env!("CARGO_TARGET_TMPDIR"), "/failing-worlds");
    // Errors are ignored, because the seed is printed, too.
    let _ = std::fs::create_dir_all(directory);
    let _ = std::fs::write(format!("{directory}/{seed}.txt"), wrong);
}

fn asked_for() -> Option<Range<u64>> {
    let text = std::env::var("WORLD_SEEDS").ok()?;
    let number = |text: &str| {
        text.parse()
            .unwrap_or_else(|_| panic!("WORLD_SEEDS is a seed or from..to, not '{text}'"))
    };
    match text.split_once("..") {
        Some((from, to)) => Some(number(from)..number(to)),
        None => Some(number(&text)..number(&text) + 1),
    }
}

#[test]
fn three_hundred_seeds_hold() {
    run_all(asked_for().unwrap_or(SEEDS).collect());
}

#[test]
fn seeds_that_failed_once_hold() {
    run_all(PAST_FAILURES.to_vec());
}

#[test]
fn two_runs_of_a_seed_are_identical_and_two_seeds_are_not() {
    let mut digests = std::collections::BTreeSet::new();
    for seed in [1, 2, 3, 4, 5, 6] {
        let [first, second] = [live(seed, None).account, live(seed, None).account];
        let differ = first
            .numbers
            .iter()
            .zip(&second.numbers)
            .find(|(first, second)| first != second);
        assert_eq!(differ, None, "seed {seed}");
        assert_eq!(first, second, "seed {seed}");
        digests.insert(first.digest);
    }
    assert_eq!(digests.len(), 6);
}

#[test]
fn what_is_wrong_on_purpose_is_noticed() {
    // At least two rooms share a router, so that everything can go wrong.
    let seed = (1..)
        .find(|seed| Plan::draw(*seed).rooms > Plan::draw(*seed).routers)
        .unwrap();
    for (defect, rules) in [
        (
            Defect::LinkSwallows,
            &[Rule::RoutersAccount, Rule::EnginesAccount][..],
        ),
        (
            Defect::LinkCorrupts,
            &[
                Rule::RoutersAccount,
                Rule::NobodyForges,
                Rule::WitnessesAccount,
            ],
        ),
        (
            Defect::RemovalForgotten,
            &[Rule::RoutersForwardAll, Rule::AllArePresent],
        ),
        (
            Defect::SubscribeForgotten,
            &[
                Rule::RoutersForwardAll,
                Rule::AllArePresent,
                Rule::StreamsFlow,
            ],
        ),
        (
            Defect::RoomsMixed,
            &[Rule::RoomsAreApart, Rule::FramesDecode],
        ),
        (Defect::TimerForgotten, &[Rule::NothingIsOverdue]),
        (Defect::Media(Tampering::Byte), &[Rule::FramesDecode]),
        (Defect::Media(Tampering::Frame), &[Rule::FramesDecode]),
        (Defect::Media(Tampering::Time), &[Rule::FramesDecode]),
        (Defect::Media(Tampering::Picture), &[Rule::FramesDecode]),
    ] {
        let outcome = live(seed, Some(defect));
        assert!(outcome.defects_done > 0, "{defect:?}");
        for rule in rules {
            assert!(
                outcome.violations.contains_key(rule),
                "{defect:?}, {rule:?}: {}",
                told(&outcome.violations)
            );
        }
    }
}

/// Counters that must be above 0 in at least one world, because worlds exist to make these things
/// happen.
const EXPECTED: &[&str] = &[
    "world.sessions resumed",
    "world.sessions replaced",
    "world.thrown out",
    "audio.frames_lost_source",
    "video.frames_lost_source",
    "world.ICE restarts",
    "audio.packets_repaired",
    "audio.packets_lost",
    "video.packets_repaired",
    "video.packets_lost",
    "video.packets_reordered",
    "video.frames_late",
    "video.freezes",
    "video.layer_switch count",
    "video.pli_received_to_key_sent count",
    "session.plis_sent",
    "router 0.repairs_in",
    "router 0.resends_out",
    "router 0.resends_exhausted",
    "router 0.plis_out",
    "router 0.media_out_recalled",
    "router 0.refused_replayed",
    "router 0.refused_duplicate",
    "router 0.refused_unknown_address",
    "router 0.refused_unknown_ufrag",
    "router 0.withheld_disabled",
    "router 0.withheld_unconnected",
    "router 0.withheld_layer",
    "router 0.withheld_key_frame",
    "router 0.withheld_late",
    "router 1.media_out",
];

#[test]
fn worlds_see_everything_that_they_are_for() {
    let mut sums = BTreeMap::new();
    for seed in 1..61 {
        for (name, number) in live(seed, None).account.numbers {
            *sums.entry(name).or_insert(0) += number;
        }
    }
    let missing: Vec<_> = EXPECTED
        .iter()
        .filter(|name| sums.get(**name).is_none_or(|sum| *sum == 0))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}
