//! Instructions and allocations per packet of our own code, counted by callgrind and by the
//! allocator. Unlike times, counts do not drift with what else the host does, so a change of a few
//! per cent shows.
//!
//! The committed counts are those of the profile that `cargo test` builds, because CI builds it
//! anyway:
//!
//! `cargo test --bench instructions -- --count` fails if a count differs from
//! `benches/instructions.txt` by more than the tolerance. `cargo test --bench instructions --
//! --save` writes that file anew, for example after a change of compiler. `cargo bench --bench
//! instructions` counts in the other profile, to compare a change with what was before it. It
//! judges nothing, because its counts depend on how the release is linked.
//!
//! It needs `valgrind`. Without valgrind it says so, and fails only under `CI`. The processor that
//! valgrind shows has AES and AVX2 if the host has them, and nothing newer. So counts are the same
//! on all hosts that have them.

mod common;
#[path = "../tests/common/counting.rs"]
mod counting;
#[path = "../tests/common/link.rs"]
#[allow(dead_code)]
mod link;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;

use common::fixture::{Fixture, Role, Setting};
use common::throng::Throng;
use counting::ALLOCATIONS;
use throng::measure::Kind;

#[global_allocator]
static ALLOCATOR: counting::Counting = counting::Counting;

const PROGRAMS: [(&str, Setting); 4] = [
    (
        "receive-video",
        Setting::media_only(Role::Receives, Kind::Video),
    ),
    (
        "receive-audio",
        Setting::media_only(Role::Receives, Kind::Audio),
    ),
    ("send-video", Setting::media_only(Role::Sends, Kind::Video)),
    ("send-audio", Setting::media_only(Role::Sends, Kind::Audio)),
];
const CONNECTIONS: usize = 16;
const PACKETS: u64 = 2_000;
/// Tolerance in per cent. Keys and addresses differ from run to run, and with them the steps of a
/// few searches.
const TOLERANCE: f64 = 3.0;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |name: &str| arguments.iter().any(|argument| argument == name);
    if let Some(at) = arguments
        .iter()
        .position(|argument| argument == "--program")
    {
        common::UNTIMED.store(true, Ordering::Relaxed);
        return run(&arguments[at + 1]);
    }
    if !(common::is_full() || has("--count") || has("--save")) {
        return PROGRAMS.iter().for_each(|(name, _)| run(name));
    }
    if Command::new("valgrind").arg("--version").output().is_err() {
        assert!(std::env::var_os("CI").is_none(), "no valgrind under CI");
        return println!("SKIPPED: no valgrind");
    }
    // The programs run side by side, as far as the host has cores. The counts do not depend on it.
    let started = PROGRAMS.map(|(name, _)| (name, Counting::start(name)));
    let counts = started.map(|(name, counting)| (name, counting.finish()));
    if has("--save") {
        let lines: String = counts
            .iter()
            .map(|(name, counts)| {
                format!("{name} {} {}\n", counts.instructions, counts.allocations)
            })
            .collect();
        return std::fs::write(figures(), lines).expect("the benches' directory");
    }
    if common::is_full() {
        print(&counts)
    } else {
        compare(&counts)
    }
}

/// Runs the program that callgrind counts: a fixed number of packets, including the first of each
/// connection.
fn run(name: &str) {
    let (_, setting) = PROGRAMS
        .iter()
        .find(|(known, _)| *known == name)
        .expect("one of the programs");
    let mut fixture = Fixture::<Throng>::connected(CONNECTIONS, *setting);
    ALLOCATIONS.set(0);
    match setting.role {
        Role::Receives => fixture.receive(PACKETS),
        Role::Sends => fixture.send(PACKETS),
    };
    println!("{ALLOCATED}{}", ALLOCATIONS.get());
}

const ALLOCATED: &str = "allocations: ";

#[derive(Clone, Copy)]
struct Counts {
    /// Per packet.
    instructions: u64,
    /// For all packets together.
    allocations: u64,
}

/// A program that runs under callgrind.
struct Counting {
    child: Child,
    profile: PathBuf,
}

impl Counting {
    fn start(name: &str) -> Counting {
        let profile = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("callgrind-{name}"));
        let mut command = Command::new("valgrind");
        command.args([
            "--quiet",
            "--tool=callgrind",
            "--collect-atstart=no",
            "--toggle-collect=*measured_*",
        ]);
        command.arg(format!("--callgrind-out-file={}", profile.display()));
        command
            .arg(std::env::current_exe().expect("this program"))
            .args(["--program", name]);
        let child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        Counting {
            child: child.expect("valgrind"),
            profile,
        }
    }

    fn finish(self) -> Counts {
        let output = self.child.wait_with_output().expect("our own child");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let said = String::from_utf8_lossy(&output.stdout);
        let allocations = said
            .lines()
            .find_map(|line| line.strip_prefix(ALLOCATED)?.parse().ok());
        let text = std::fs::read_to_string(&self.profile).expect("callgrind's output");
        let summary = text.lines().find_map(|line| {
            line.strip_prefix("summary: ")
                .or(line.strip_prefix("totals: "))
        });
        let total: u64 = summary
            .and_then(|total| total.trim().parse().ok())
            .expect("a total");
        assert!(
            total > PACKETS,
            "nothing was counted: is `measured_receive` still called so?"
        );
        Counts {
            instructions: total / PACKETS,
            allocations: allocations.expect("what the program has allocated"),
        }
    }
}

fn print(counts: &[(&str, Counts)]) {
    println!("\nInstructions a packet, by callgrind; allocations of {PACKETS} packets");
    for (name, counts) in counts {
        println!(
            "  {name:<16} {:>7} {:>4}",
            counts.instructions, counts.allocations
        );
    }
}

fn compare(counts: &[(&str, Counts)]) {
    let text = std::fs::read_to_string(figures()).unwrap_or_default();
    let mut worse = Vec::new();
    println!(
        "\nInstructions a packet, by callgrind: now, and as committed; allocations of {PACKETS} packets, the same"
    );
    for (name, now) in counts {
        let line = text.lines().find_map(|line| {
            let mut numbers = line
                .strip_prefix(name)?
                .split_whitespace()
                .map(str::parse::<u64>);
            Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
        });
        let Some((instructions, allocations)) = line else {
            worse.push(format!("{name} is not in benches/instructions.txt"));
            continue;
        };
        let change = (now.instructions as f64 / instructions as f64 - 1.0) * 100.0;
        println!(
            "  {name:<16} {:>7} {instructions:>7} {change:>+6.1} % {:>4} {allocations:>4}",
            now.instructions, now.allocations
        );
        if change.abs() > TOLERANCE {
            worse.push(format!("{name}: {change:+.1} % instructions"));
        }
        if now.allocations > allocations {
            worse.push(format!(
                "{name}: {} allocations, not {allocations}",
                now.allocations
            ));
        }
    }
    assert!(
        worse.is_empty(),
        "not as committed, within {TOLERANCE} %: {worse:?}. If that is meant: cargo test --bench instructions -- --save"
    );
}

fn figures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/instructions.txt")
}
