//! Whole runs: `throng sfu` and `throng run` as two processes on this host, in the scenarios by
//! which the project measures itself. Each run prints its verdict. For the hold alone it also
//! prints the CPU time of both processes by thread, user and system apart; the SFU is never in the
//! generator's figures. After each stream the floor program runs with the same kind of packets.
//! Then follows the cost of a participant, as the difference of two runs that differ in one thing
//! only. In full, at the end, each goal is printed and whether it is met.
//!
//! `cargo bench --bench system` runs a middling size. `cargo bench --bench system -- --full` runs
//! in full, which needs a quarter of an hour and a quiet host. `cargo bench --bench system --
//! --full 'one publisher'` runs the scenarios whose names contain that.

mod common;
#[path = "../tests/common/link.rs"]
#[allow(dead_code)]
mod link;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::floor::{Floor, LOOPBACK, Notes, RECEIVE_BUFFER_BYTES, Sender, bare_end};
use common::origin::shard_config;
use common::process::{Process, Sample, load_average};
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_setaffinity};
use serde_json::Value;
use throng::net;
use throng::sfu::server::{DEV_KEY, DEV_SECRET};
use throng::transport::srtp::Profile;

/// Interval at which processes are sampled. It is how precisely their CPU time at the start of the
/// hold is known. Sampling takes a hundredth of a core.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// Time that a run may take beyond its plan.
const PATIENCE: Duration = Duration::from_secs(150);
/// Number of connections that one engine thread is expected to bear.
const FLOOR_CONNECTIONS_MAX: u32 = 1_000;

/// Size of all scenarios.
struct Size {
    /// Flags of the video. 720p takes seconds to make, which is too long for a test.
    video: &'static str,
    /// Number of participants in a small run. It is also the room size where rooms are small.
    few: u32,
    many: u32,
    /// Sizes to try where packets are sent one by one, in per cent of `many`, largest first.
    plain_shares: &'static [u32],
    joins_per_second: u32,
    meeting: u32,
    meeting_joins_per_second: u32,
    seconds: u32,
    /// Length of the hold for participants that have nothing to hear.
    idle_seconds: u32,
    goals: bool,
}

/// One picture a second, and one speaker.
const LEAST_MEDIA: &str = "--video-resolution 96x54 --video-bitrate 12k --video-fps 1 --no-simulcast --simulate-speakers --audio-dtx";

const TINY: Size = Size {
    video: "--video-resolution 96x54 --video-bitrate 60k --no-simulcast",
    few: 1,
    many: 2,
    plain_shares: &[50],
    joins_per_second: 50,
    meeting: 2,
    meeting_joins_per_second: 50,
    seconds: 1,
    idle_seconds: 1,
    goals: true,
};
const MIDDLING: Size = Size {
    video: "--video-resolution high",
    few: 100,
    many: 600,
    plain_shares: &[50],
    joins_per_second: 300,
    meeting: 20,
    meeting_joins_per_second: 20,
    seconds: 4,
    idle_seconds: 6,
    goals: false,
};
const FULL: Size = Size {
    // The rate that a subscriber of LiveKit's published livestream got: 187 packets a second.
    video: "--video-resolution high --video-bitrate 1650k",
    few: 100,
    many: 3_000,
    plain_shares: &[66, 50, 33, 20, 10],
    joins_per_second: 1_000,
    meeting: 150,
    meeting_joins_per_second: 5,
    seconds: 60,
    idle_seconds: 30,
    goals: true,
};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let size = match (
        arguments.iter().any(|argument| argument == "--full"),
        common::is_full(),
    ) {
        (true, _) => FULL,
        (false, true) => MIDDLING,
        (false, false) => TINY,
    };
    let filter = arguments
        .iter()
        .find(|argument| !argument.starts_with("--"))
        .cloned()
        .unwrap_or_default();
    println!("load average at the start: {}", load_average());
    let runs = Runs::of(&size, &filter);
    runs.print_costs(&size);
    if size.goals {
        runs.print_goals(&size);
    }
}

/// Runs of all scenarios, or of those whose names contain the filter.
struct Runs {
    stream_few: Option<Stream>,
    stream_many: Option<Stream>,
    /// First run that was whole, or the smallest if none was.
    stream_plain: Option<Stream>,
    audio: Option<Run>,
    meeting: Option<Run>,
    silent_few: Option<Run>,
    silent_many: Option<Run>,
}

/// Run with one publisher of video to everybody, and the floor program's cost for such packets.
struct Stream {
    run: Run,
    subscribers: u32,
    floor_micros: f64,
}

impl Runs {
    fn of(size: &Size, filter: &str) -> Runs {
        let run_at = |rate: u32,
                      name: String,
                      send: &str,
                      participants: u32,
                      seconds: u32,
                      shape: String| {
            let shape = format!("{shape} --num-per-second {rate} --duration {seconds}s");
            name.contains(filter)
                .then(|| Run::of(name, send, participants, seconds, &shape))
        };
        let run = |name, send: &str, participants, seconds, shape| {
            run_at(
                size.joins_per_second,
                name,
                send,
                participants,
                seconds,
                shape,
            )
        };
        let stream = |subscribers: u32, send: &str| {
            let name = format!("one publisher of video, {subscribers} subscribers, sent {send}");
            // The SFU forwards in one burst what arrives together. With a pacer a frame arrives in
            // several bursts.
            let pacing = if send == "gso" { "--pacing burst" } else { "" };
            let shape = format!(
                "--publishers 0 --video-publishers 1 --subscribers {subscribers} {} {pacing}",
                size.video
            );
            let run = run(name, send, subscribers + 1, size.seconds, shape)?;
            Some(Stream::beside_the_floor(run, subscribers, send))
        };
        let silent = |participants: u32| {
            let name = format!(
                "{participants} join rooms of {} and have nothing to hear",
                size.few
            );
            let shape = format!(
                "--room-count {} --subscribers {}",
                participants / size.few,
                size.few
            );
            run(name, "plain", participants, size.idle_seconds, shape)
        };
        let (many, meeting) = (size.many, size.meeting);
        Runs {
            stream_few: stream(size.few, "gso"),
            stream_many: stream(many, "gso"),
            stream_plain: {
                let mut last = None;
                for share in size.plain_shares {
                    last = stream((many * share / 100).max(1), "plain");
                    if last.as_ref().is_none_or(|stream| stream.run.is_whole()) {
                        break;
                    }
                }
                last
            },
            audio: run(
                format!("{many} publishers of audio"),
                "plain",
                many,
                size.seconds,
                format!(
                    "--room-count {} --publishers {}",
                    many.div_ceil(10),
                    many.min(10)
                ),
            ),
            // This measures the cost of the room, with as little media as possible. If each
            // participant got 149 whole videos, two cores could carry nothing else.
            meeting: run_at(
                size.meeting_joins_per_second,
                format!("a meeting of {meeting}, audio and video"),
                "gso",
                meeting,
                size.seconds,
                format!(
                    "--meeting --publishers {meeting} --video-publishers {meeting} {LEAST_MEDIA}"
                ),
            ),
            silent_few: silent(size.few),
            silent_many: silent(many),
        }
    }

    fn print_costs(&self, size: &Size) {
        println!("\nWhat one costs");
        if let Some(kib) = self.subscriber_kib(size) {
            row("resident memory of a subscriber", &format!("{kib:.1} KiB"));
        }
        if let (Some(few), Some(many)) = (&self.silent_few, &self.silent_many) {
            let more = f64::from(size.many - size.few);
            let kib = (resident_kib(many) - resident_kib(few)) / more;
            row(
                "resident memory of one who hears nothing",
                &format!("{kib:.1} KiB"),
            );
            for (who, prefix) in [("generator", ""), ("of that its engine threads", "engine-")] {
                let join = (many.generator_cpu(Part::Joining, prefix)
                    - few.generator_cpu(Part::Joining, prefix))
                    / more;
                let idle = (many.generator_cpu(Part::Hold, prefix)
                    - few.generator_cpu(Part::Hold, prefix))
                    / more
                    / many.hold_seconds();
                row(
                    &format!("CPU of a participant: {who}"),
                    &join_and_idle(join, idle),
                );
            }
            let join = (many.sfu_cpu(Part::Joining, "") - few.sfu_cpu(Part::Joining, "")) / more;
            let idle = (many.sfu_cpu(Part::Hold, "") - few.sfu_cpu(Part::Hold, ""))
                / more
                / many.hold_seconds();
            row("CPU of a participant: SFU", &join_and_idle(join, idle));
        }
        if let (Some(few), Some(many)) = (&self.stream_few, &self.stream_many) {
            let (of_few, of_many) = (few.run.engine_micros(), many.run.engine_micros());
            let figures = format!(
                "{of_few:.2} us of {}, {of_many:.2} us of {}: {:.2}x",
                size.few,
                size.many,
                of_many / of_few
            );
            row("CPU of the engine a packet", &figures);
        }
    }

    fn subscriber_kib(&self, size: &Size) -> Option<f64> {
        let (few, many) = (self.stream_few.as_ref()?, self.stream_many.as_ref()?);
        Some((resident_kib(&many.run) - resident_kib(&few.run)) / f64::from(size.many - size.few))
    }

    fn print_goals(&self, size: &Size) {
        println!(
            "\nGoals, of the scenarios that have run (load average now: {})",
            load_average()
        );
        let (more, many) = (f64::from(size.many - size.few), size.many);
        if let Some(stream) = &self.stream_plain {
            let times_floor = stream.run.engine_micros() / stream.floor_micros;
            at_most(
                "engine CPU a packet of the stream sent plain, times the floor program",
                times_floor,
                1.5,
                "x",
            );
            at_most(
                "embedded SFU a packet, plain",
                stream.run.sfu_micros(),
                3.0,
                " us",
            );
            let whole = format!(
                "{} subscribers of one 720p publisher, sent plain",
                stream.subscribers
            );
            state(
                &whole,
                &stream.run.wholeness(),
                "as many as fit",
                stream.run.is_whole(),
            );
        }
        if let Some(stream) = &self.stream_many {
            let whole = format!(
                "{} subscribers of one 720p publisher, sent gso",
                stream.subscribers
            );
            state(
                &whole,
                &stream.run.wholeness(),
                "whole",
                stream.run.is_whole(),
            );
            at_most(
                "embedded SFU a packet, gso",
                stream.run.sfu_micros(),
                1.5,
                " us",
            );
        }
        if let Some(kib) = self.subscriber_kib(size) {
            at_most("resident memory a subscriber", kib, 64.0, " KiB");
        }
        if let (Some(few), Some(many)) = (&self.stream_few, &self.stream_many) {
            let growth = many.run.engine_micros() / few.run.engine_micros();
            at_most(
                &format!("engine CPU a packet, {} to {}", size.few, size.many),
                growth,
                1.3,
                "x",
            );
        }
        if let Some(run) = &self.audio {
            let name = format!("{many} publishers of audio");
            let validity = if run.is_valid() { "VALID" } else { "INVALID" };
            state(&name, validity, "VALID", run.is_valid());
            if let Some(ratio) = run.send_lag_ratio() {
                at_most(
                    "send lag p99, times the bare timer thread's",
                    ratio,
                    2.0,
                    "x",
                );
            }
        }
        if let Some(run) = &self.meeting {
            let joined = format!("{} of {} joined", run.joined(), run.participants);
            state(
                &format!("a meeting of {}", size.meeting),
                &joined,
                "all join",
                run.joined() == f64::from(run.participants),
            );
        }
        if let (Some(few), Some(many)) = (&self.silent_few, &self.silent_many) {
            let join = (many.generator_cpu(Part::Joining, "")
                - few.generator_cpu(Part::Joining, ""))
                / more;
            let idle = (many.generator_cpu(Part::Hold, "") - few.generator_cpu(Part::Hold, ""))
                / more
                / many.hold_seconds();
            at_most(
                &format!("CPU of a join, rooms of {}", size.few),
                join,
                700.0,
                " us",
            );
            at_most("CPU of an idle participant a second", idle, 8.0, " us");
            let (rate, planned) = (many.joins_per_second(), f64::from(size.joins_per_second));
            // The last joins take as long as they take. So the rate counts as sustained if it is at
            // most a tenth below the plan's.
            state(
                "joins a second, sustained",
                &format!("{rate:.0}"),
                &format!(">= {planned:.0}, less 10 %"),
                rate >= 0.9 * planned,
            );
        }
        if let Some(Lateness { joining, after, .. }) = self
            .stream_many
            .as_ref()
            .and_then(|stream| stream.run.lateness())
        {
            at_most(
                "tick lateness p99 while others join, times after",
                joining / after.max(1.0),
                1.25,
                "x",
            );
        }
    }
}

fn row(what: &str, figures: &str) {
    println!("  {what:<44} {figures}");
}

fn join_and_idle(join: f64, idle: f64) -> String {
    format!("{join:>8.0} us a join {idle:>8.1} us a second idle")
}

fn at_most(what: &str, value: f64, limit: f64, unit: &str) {
    state(
        what,
        &format!("{value:.2}{unit}"),
        &format!("<= {limit}{unit}"),
        value <= limit,
    );
}

fn state(what: &str, value: &str, goal: &str, is_met: bool) {
    println!(
        "  {what}: goal {goal}: {value}, {}",
        if is_met { "met" } else { "MISSED" }
    );
}

fn resident_kib(run: &Run) -> f64 {
    run.generator.at(run.end).resident_bytes as f64 / 1_024.0
}

impl Stream {
    /// Runs the floor program with as many sockets as the run had subscribers, up to what one
    /// thread is expected to bear. It uses the trace of the floor bench, with packets of about the
    /// same size.
    fn beside_the_floor(run: Run, subscribers: u32, send: &str) -> Stream {
        let connections = subscribers.min(FLOOR_CONNECTIONS_MAX);
        let config = shard_config(connections as usize);
        let socket = net::open_media_socket(LOOPBACK, RECEIVE_BUFFER_BYTES).expect("a socket");
        let address = socket.local_addr().expect("bound");
        let bare = |index| bare_end(index as usize, address, Profile::AeadAes128Gcm, Notes::Kept);
        let (ends, targets): (Vec<_>, Vec<_>) = (0..connections).map(bare).unzip();
        let mut sender = Sender::new(socket, targets, &config, connections as usize);
        sender.segmented = send == "gso";
        let floor = Floor::start(ends, config.epoch);
        sender.run_for(Duration::from_secs_f64(run.hold_seconds().min(3.0)));
        let (_, taken) = floor.stop();
        let floor_micros = taken.nanos_a_packet() / 1e3;
        println!(
            "  floor program, {connections} connections, sent {send}: {floor_micros:.2} us a packet; the engine's {:.2} us are {:.2}x",
            run.engine_micros(),
            run.engine_micros() / floor_micros
        );
        Stream {
            run,
            subscribers,
            floor_micros,
        }
    }
}

#[derive(Clone, Copy)]
enum Part {
    /// From the first sample of the process until everybody is in. This includes making the media,
    /// once a run, because that comes before the first join.
    Joining,
    /// From when everybody is in until media stops.
    Hold,
}

/// Medians of the tick lateness p99 of single seconds, and the worst of these seconds, in
/// microseconds.
struct Lateness {
    joining: f64,
    after: f64,
    worst_joining: f64,
    worst_after: f64,
}

/// One scenario that has run.
struct Run {
    name: String,
    participants: u32,
    report: Value,
    generator: Process,
    sfu: Process,
    /// Times at which everybody was in, and at which media stopped, since 1970, by the report.
    hold: Duration,
    end: Duration,
}

impl Run {
    fn of(name: String, send: &str, participants: u32, seconds: u32, shape: &str) -> Run {
        let (mut sfu, url) = start_sfu(send);
        let report = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("system-{}.json", std::process::id()));
        let mut command = Command::new(env!("CARGO_BIN_EXE_throng"));
        command
            .args(["run", "--quiet", "--json"])
            .arg(&report)
            .args(shape.split_whitespace());
        command
            .env("LIVEKIT_URL", url)
            .env("LIVEKIT_API_KEY", DEV_KEY)
            .env("LIVEKIT_API_SECRET", DEV_SECRET);
        // Its output is in the report, so it is dropped. The reason why it could not run is only on
        // standard error, which is kept.
        let mut generator = Process::start(command.stdout(Stdio::null()));
        let deadline = Instant::now() + Duration::from_secs(seconds.into()) + PATIENCE;
        while !generator.has_ended() {
            assert!(Instant::now() < deadline, "{name}: does not end");
            generator.watch();
            sfu.watch();
            std::thread::sleep(LOOK_INTERVAL);
        }
        sfu.stop();
        let text = fs::read_to_string(&report)
            .unwrap_or_else(|error| panic!("{name}: no report ({error})"));
        // The report has been read, and nobody else looks for it.
        let _ = fs::remove_file(&report);
        let report: Value = serde_json::from_str(&text).expect("a report");
        let started = report["started_at"]
            .as_str()
            .and_then(|at| humantime::parse_rfc3339(at).ok());
        let started = started
            .and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok())
            .expect("when it started");
        let seconds = |step: &Value| {
            Duration::from_secs_f64(step["seconds"].as_f64().expect("how long it took"))
        };
        let end = started + seconds(&report["totals"]);
        let run = Run {
            name,
            participants,
            generator,
            sfu,
            hold: end - seconds(&report["steps"][0]),
            end,
            report,
        };
        run.print();
        run
    }

    fn print(&self) {
        println!("\n{}: {}", self.name, self.result());
        for reason in self.report["reasons"]
            .as_array()
            .into_iter()
            .flatten()
            .take(3)
        {
            println!("  {}", reason.as_str().unwrap_or("?"));
        }
        let (session, engine) = (&self.report["totals"]["session"], &self.report["engine"]);
        println!(
            "  {} of {} joined, {:.0}/s, p99 {}; {:.0} media packets in {:.1} s of hold, {:.0}/s; {}",
            self.joined(),
            self.participants,
            self.joins_per_second(),
            micros(&session["join"]["p99"]),
            self.packets(),
            self.hold_seconds(),
            self.packets() / self.hold_seconds(),
            self.wholeness()
        );
        println!(
            "  tick late p99 {}, bare thread {}; send lag p99 {}{}",
            micros(&engine["tick_late_us"]["p99"]),
            micros(&engine["floor_tick_late_us"]["p99"]),
            micros(&engine["send_lag_us"]["p99"]),
            self.send_lag_ratio().map_or(String::new(), |ratio| format!(
                ", {ratio:.2}x the bare thread's"
            ))
        );
        if let Some(lateness) = self.lateness() {
            println!(
                "  tick late p99 by the second: {:.0} us while joining (worst {:.0}), {:.0} us after (worst {:.0})",
                lateness.joining, lateness.worst_joining, lateness.after, lateness.worst_after
            );
        }
        print_threads(
            "generator",
            &self.generator,
            (self.hold, self.end),
            "engine-",
            self.engine_micros(),
        );
        print_threads(
            "SFU",
            &self.sfu,
            (self.hold, self.end),
            "sfu-",
            self.sfu_micros(),
        );
    }

    fn result(&self) -> &str {
        self.report["result"].as_str().unwrap_or("?")
    }

    /// Returns whether all expected frames were delivered and the generator can be believed.
    fn is_whole(&self) -> bool {
        let frames = |counter| self.media(&self.report["totals"], counter);
        self.is_valid() && frames("frames_delivered") >= frames("frames_expected")
    }

    /// Returns whether the generator was not the limit.
    fn is_valid(&self) -> bool {
        self.report["engine"]["valid"].as_bool() == Some(true)
    }

    fn wholeness(&self) -> String {
        let frames = |counter| self.media(&self.report["totals"], counter);
        let undelivered = frames("frames_expected") - frames("frames_delivered");
        format!(
            "{}, {undelivered:.0} of {:.0} frames undelivered",
            self.result(),
            frames("frames_expected")
        )
    }

    fn joined(&self) -> f64 {
        self.report["totals"]["session"]["joins_ok"]
            .as_f64()
            .unwrap_or(0.0)
    }

    /// Returns the number of joins over the time until the last participant was in.
    fn joins_per_second(&self) -> f64 {
        let total = self.report["totals"]["seconds"].as_f64().unwrap_or(0.0);
        self.joined() / (total - self.hold_seconds())
    }

    fn hold_seconds(&self) -> f64 {
        (self.end - self.hold).as_secs_f64()
    }

    /// Returns a counter of audio and video together.
    fn media(&self, step: &Value, counter: &str) -> f64 {
        let of = |kind: &str| step[kind][counter].as_f64().unwrap_or(0.0);
        of("audio") + of("video")
    }

    /// Returns the number of media packets that the generator sent or received in the hold.
    fn packets(&self) -> f64 {
        let hold = &self.report["steps"][0];
        self.media(hold, "packets_sent") + self.media(hold, "packets_received")
    }

    /// Returns the CPU time of the engine threads per packet, in the hold.
    fn engine_micros(&self) -> f64 {
        self.generator_cpu(Part::Hold, "engine-") / self.packets()
    }

    /// Returns the CPU time of the SFU's media threads per packet that it sent and that was
    /// received, in the hold.
    fn sfu_micros(&self) -> f64 {
        let media = self.sfu_cpu(Part::Hold, "sfu-") - self.sfu_cpu(Part::Hold, "sfu-signal");
        media / self.media(&self.report["steps"][0], "packets_received")
    }

    fn generator_cpu(&self, part: Part, prefix: &str) -> f64 {
        self.cpu_micros(&self.generator, part, prefix)
    }

    fn sfu_cpu(&self, part: Part, prefix: &str) -> f64 {
        self.cpu_micros(&self.sfu, part, prefix)
    }

    fn cpu_micros(&self, process: &Process, part: Part, prefix: &str) -> f64 {
        let (from, to) = match part {
            Part::Joining => (process.first(), process.at(self.hold)),
            Part::Hold => (process.at(self.hold), process.at(self.end)),
        };
        to.cpu_since(from, prefix).total().as_secs_f64() * 1e6
    }

    fn send_lag_ratio(&self) -> Option<f64> {
        let engine = &self.report["engine"];
        let bare = engine["floor_tick_late_us"]["p99"]
            .as_f64()
            .filter(|micros| *micros > 0.0)?;
        Some(engine["send_lag_us"]["p99"].as_f64()? / bare)
    }

    /// Returns `None` if joining, or the time after it, took less than a second.
    fn lateness(&self) -> Option<Lateness> {
        let total = self.report["totals"]["seconds"].as_f64()?;
        let hold_at = total - self.hold_seconds();
        let rows = || self.report["series"].as_array().into_iter().flatten();
        let of = |wanted: fn(f64, f64) -> bool| {
            let rows = rows().filter(|row| row["t"].as_f64().is_some_and(|t| wanted(t, hold_at)));
            let mut p99s: Vec<f64> = rows
                .filter_map(|row| row["tick_late_us_p99"].as_f64())
                .collect();
            p99s.sort_by(f64::total_cmp);
            Some((*p99s.get(p99s.len() / 2)?, *p99s.last()?))
        };
        let (joining, worst_joining) = of(|t, hold_at| t <= hold_at)?;
        // The second in which the last participant joined belongs to both, so it is left out.
        let (after, worst_after) = of(|t, hold_at| t > hold_at + 1.0)?;
        Some(Lateness {
            joining,
            after,
            worst_joining,
            worst_after,
        })
    }
}

fn print_threads(
    who: &str,
    process: &Process,
    (from, to): (Duration, Duration),
    media_threads: &str,
    micros_a_packet: f64,
) {
    let (before, after) = (process.at(from), process.at(to));
    let cpu = |sample: &Sample, since: &Sample| sample.cpu_since(since, "").total().as_secs_f64();
    let of_media = if micros_a_packet.is_finite() {
        format!("; {media_threads}*: {micros_a_packet:.2} us a packet")
    } else {
        String::new()
    };
    println!(
        "  {who}: {:.2} s of CPU before the hold, {:.2} s in it, {:.1} MiB resident at its end{of_media}",
        cpu(before, process.first()),
        cpu(after, before),
        after.resident_bytes as f64 / 1_048_576.0
    );
    for (name, (cpu, count)) in after.by_name_since(before) {
        if cpu.total() >= Duration::from_millis(1) {
            let (user, system) = (cpu.user.as_secs_f64(), cpu.system.as_secs_f64());
            println!("    {name:<16} {count:>2}   user {user:>8.3} s   system {system:>8.3} s");
        }
    }
}

fn micros(value: &Value) -> String {
    value.as_u64().map_or("-".into(), |micros| {
        format!("{:.2} ms", micros as f64 / 1e3)
    })
}

/// Starts the embedded SFU in its own process. Returns the process and the address at which it
/// listens.
fn start_sfu(send: &str) -> (Process, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_throng"));
    command.args(["sfu", "--listen", "127.0.0.1:0", "--send", send]);
    let mut process = Process::start(command.stdout(Stdio::piped()));
    // Without this, the kernel now and then puts its busy thread and one of the generator's on the
    // same processor for a second, while another processor is idle.
    if let [_, .., last] = net::allowed_cpus()[..] {
        let mut set = CpuSet::new();
        set.set(last);
        // If this is not permitted, the run is still valid.
        let _ = sched_setaffinity(Some(Pid::from_child(&process.child)), &set);
    }
    let stdout = process.child.stdout.take().expect("piped");
    let mut lines = BufReader::new(stdout).lines();
    let url = lines.by_ref().map_while(Result::ok).find_map(|line| {
        line.split_whitespace()
            .find(|word| word.starts_with("ws://"))
            .map(str::to_owned)
    });
    // Its output is read to the end, so that it never blocks when it writes.
    std::thread::spawn(move || lines.for_each(drop));
    (process, url.expect("the greeting"))
}
