//! Instructions that a packet takes, counted by callgrind: they do not drift with what else the host does, so a change of a few per cent shows.
//!
//! `cargo bench --bench instructions` counts, and fails where a count is further than the tolerance from `benches/instructions.txt`;
//! `cargo bench --bench instructions -- --save` writes that file anew. It wants `valgrind`; where there is none it says so, and fails only under `CI`.
//! Counts depend on the compiler and on the profile: the file is of `cargo bench`, and a new compiler is a reason to write it anew.

mod common;
#[path = "../tests/common/link.rs"]
#[allow(dead_code)]
mod link;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::fixture::{Fixture, Role, Setting};
use common::throng::Throng;
use throng::measure::Kind;

const PROGRAMS: [(&str, Setting); 4] = [
    ("receive-video", Setting::media_only(Role::Receives, Kind::Video)),
    ("receive-audio", Setting::media_only(Role::Receives, Kind::Audio)),
    ("send-video", Setting::media_only(Role::Sends, Kind::Video)),
    ("send-audio", Setting::media_only(Role::Sends, Kind::Audio)),
];
const CONNECTIONS: usize = 16;
const PACKETS: u64 = 2_000;
/// Per cent. Keys and addresses differ from run to run, and with them the steps of a few searches.
const TOLERANCE: f64 = 3.0;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "--program") {
        return run(&arguments[at + 1]);
    }
    if !common::is_full() {
        return PROGRAMS.iter().for_each(|(name, _)| run(name));
    }
    if Command::new("valgrind").arg("--version").output().is_err() {
        assert!(std::env::var_os("CI").is_none(), "no valgrind under CI");
        return println!("SKIPPED: no valgrind");
    }
    let counts = PROGRAMS.map(|(name, _)| (name, count(name)));
    if arguments.iter().any(|argument| argument == "--save") {
        let lines: String = counts.iter().map(|(name, count)| format!("{name} {count}\n")).collect();
        return std::fs::write(figures(), lines).expect("the benches' directory");
    }
    compare(&counts);
}

/// What callgrind looks at: a fixed number of packets, the first of each connection among them.
fn run(name: &str) {
    let (_, setting) = PROGRAMS.iter().find(|(known, _)| *known == name).expect("one of the programs");
    let mut fixture = Fixture::<Throng>::connected(CONNECTIONS, *setting);
    match setting.role {
        Role::Receives => fixture.receive(PACKETS),
        Role::Sends => fixture.send(PACKETS),
    };
}

/// Instructions a packet of one program.
fn count(name: &str) -> u64 {
    let profile = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("callgrind-{name}"));
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--collect-atstart=no", "--toggle-collect=*measured_*"]);
    command.arg(format!("--callgrind-out-file={}", profile.display()));
    command.arg(std::env::current_exe().expect("this program")).args(["--program", name]);
    let output = command.output().expect("valgrind");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = std::fs::read_to_string(&profile).expect("callgrind's output");
    let summary = text
        .lines()
        .find_map(|line| line.strip_prefix("summary: ").or(line.strip_prefix("totals: ")));
    let total: u64 = summary.and_then(|total| total.trim().parse().ok()).expect("a total");
    assert!(total > PACKETS, "nothing was counted: is `measured_receive` still called so?");
    total / PACKETS
}

fn compare(counts: &[(&str, u64)]) {
    let text = std::fs::read_to_string(figures()).unwrap_or_default();
    let mut worse = Vec::new();
    println!("\nInstructions a packet, by callgrind: now, and as committed");
    for (name, count) in counts {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
        let Some(committed) = line else {
            worse.push(format!("{name} is not in benches/instructions.txt"));
            continue;
        };
        let change = (*count as f64 / committed - 1.0) * 100.0;
        println!("  {name:<16} {count:>7} {committed:>7} {change:>+6.1} %");
        if change.abs() > TOLERANCE {
            worse.push(format!("{name}: {change:+.1} %"));
        }
    }
    assert!(
        worse.is_empty(),
        "further than {TOLERANCE} % from what is committed: {worse:?}. If that is meant: cargo bench --bench instructions -- --save"
    );
}

fn figures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/instructions.txt")
}
