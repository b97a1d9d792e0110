//! Whole runs: `throng sfu` and `throng run` as two processes on this host, by the scenarios that the project measures itself by. Each prints its verdict and
//! the CPU time of both processes by thread, user and system apart; the SFU is never in the generator's figures. At the end what a participant costs, as
//! differences of two runs that differ in one thing only, and the floor program beside.
//!
//! `cargo bench --bench system` in a middling size, `cargo bench --bench system -- --full` in full: that wants ten minutes and a quiet host.

mod common;
#[path = "../tests/common/link.rs"]
#[allow(dead_code)]
mod link;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::floor::{Floor, LOOPBACK, Notes, RECEIVE_BUFFER_BYTES, Sender, bare_end};
use common::origin::shard_config;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use throng::net;
use throng::sfu::server::{DEV_KEY, DEV_SECRET};
use throng::transport::srtp::Profile;

/// `USER_HZ`: what `/proc` counts CPU time in, on every Linux that there is.
const TICKS_PER_SECOND: u64 = 100;
const SAMPLE: Duration = Duration::from_millis(50);

/// How large all of it is.
struct Size {
    /// 720p takes seconds to make: too long for a test.
    video: &'static str,
    /// Also how many are in a room where rooms are small.
    few: u32,
    many: u32,
    joins_per_second: u32,
    meeting: u32,
    seconds: u32,
    /// What the idle are watched for beyond that.
    idle_seconds: u32,
}

const TINY: Size = Size {
    video: "--video-resolution 96x54 --video-bitrate 60k --no-simulcast",
    few: 1,
    many: 2,
    joins_per_second: 50,
    meeting: 2,
    seconds: 1,
    idle_seconds: 1,
};
const MIDDLING: Size = Size {
    video: "--video-resolution high",
    few: 100,
    many: 600,
    joins_per_second: 300,
    meeting: 20,
    seconds: 4,
    idle_seconds: 6,
};
const FULL: Size = Size {
    video: "--video-resolution high",
    few: 100,
    many: 3_000,
    joins_per_second: 1_000,
    meeting: 150,
    seconds: 60,
    idle_seconds: 30,
};

fn main() {
    let size = match (std::env::args().any(|argument| argument == "--full"), common::is_full()) {
        (true, _) => FULL,
        (false, true) => MIDDLING,
        (false, false) => TINY,
    };
    let runs = Runs::of(&size);
    println!("\nWhat one costs, from two runs");
    runs.print_costs(&size);
    print_floor(size.many.min(1_000), Duration::from_secs(size.seconds.min(3).into()));
}

/// Something that a run has used.
type Figure = fn(&Run) -> f64;

struct Runs {
    stream_few: Run,
    stream_many: Run,
    joins_few: Run,
    joins_many: Run,
    idle: Run,
}

impl Runs {
    fn of(size: &Size) -> Runs {
        let (rate, video) = (size.joins_per_second, size.video);
        let run = |name: &str, send: &str, participants: u32, seconds: u32, shape: &str| {
            let shape = format!("{shape} --num-per-second {rate} --duration {seconds}s");
            Run::of(name, send, participants, seconds, &shape)
        };
        let stream = |subscribers: u32, send: &str| {
            let shape = format!("--publishers 0 --video-publishers 1 --subscribers {subscribers} {video}");
            let name = format!("one publisher of video, {subscribers} subscribers, sent {send}");
            run(&name, send, subscribers + 1, size.seconds, &shape)
        };
        let silent = |participants: u32, seconds: u32| {
            let (each, rooms) = (size.few, participants / size.few);
            let name = format!("{participants} join rooms of {each} and have nothing to hear, {seconds} s");
            let shape = format!("--room-count {rooms} --subscribers {each}");
            run(&name, "plain", participants, seconds, &shape)
        };
        let stream_few = stream(size.few, "gso");
        let stream_many = stream(size.many, "gso");
        stream(size.few, "plain");
        let name = format!("{} publishers of audio", size.many);
        run(&name, "plain", size.many, size.seconds, &format!("--publishers {}", size.many));
        let meeting = size.meeting;
        let name = format!("a meeting of {meeting}, audio and video");
        let shape = format!("--meeting --publishers {meeting} --video-publishers {meeting} {video}");
        run(&name, "gso", meeting, size.seconds, &shape);
        Runs {
            stream_few,
            stream_many,
            joins_few: silent(size.few, size.seconds),
            joins_many: silent(size.many, size.seconds),
            idle: silent(size.many, size.seconds + size.idle_seconds),
        }
    }

    fn print_costs(&self, size: &Size) {
        let more = f64::from(size.many - size.few);
        let per = |of: Figure, many: &Run, few: &Run, by: f64| (of(many) - of(few)) / by;
        let resident = |run: &Run| run.generator.resident_peak as f64 / 1_024.0;
        println!(
            "  {:<44} {:>8.1} KiB (subscriber) {:>8.1} KiB (silent)",
            "resident memory of the generator",
            per(resident, &self.stream_many, &self.stream_few, more),
            per(resident, &self.joins_many, &self.joins_few, more)
        );
        let micros = |run: &Run| run.generator.seconds("") * 1e6;
        let engine = |run: &Run| run.generator.seconds("engine-") * 1e6;
        let of_sfu = |run: &Run| run.sfu.seconds("") * 1e6;
        let rows: [(&str, Figure); 3] = [("generator", micros), ("of that its engine threads", engine), ("SFU", of_sfu)];
        for (who, of) in rows {
            println!(
                "  {:<44} {:>8.0} us a join {:>8.1} us a second idle",
                format!("CPU of a participant: {who}"),
                per(of, &self.joins_many, &self.joins_few, more),
                per(of, &self.idle, &self.joins_many, f64::from(size.many) * f64::from(size.idle_seconds))
            );
        }
        let packet = |run: &Run| run.generator.seconds("engine-") * 1e6 / run.packets();
        println!(
            "  {:<44} {:>8.2} us of {} {:>8.2} us of {} {:>8.2}x",
            "CPU of the engine a packet",
            packet(&self.stream_few),
            size.few,
            packet(&self.stream_many),
            size.many,
            packet(&self.stream_many) / packet(&self.stream_few)
        );
    }
}

/// The floor program with so many sockets, by the trace of the floor bench: about the packets of a subscriber, and what no generator could save.
fn print_floor(connections: u32, time: Duration) {
    let config = shard_config(connections as usize);
    let socket = net::open_media_socket(LOOPBACK, RECEIVE_BUFFER_BYTES).expect("a socket");
    let address = socket.local_addr().expect("bound");
    let bare = |index| bare_end(index as usize, address, Profile::AeadAes128Gcm, Notes::Kept);
    let (ends, targets): (Vec<_>, Vec<_>) = (0..connections).map(bare).unzip();
    let mut sender = Sender::new(socket, targets, &config, connections as usize);
    let floor = Floor::start(ends, config.epoch);
    sender.run_for(time);
    let (_, taken) = floor.stop();
    println!(
        "  {:<44} {:>8.2} us, {connections} connections, sent plain",
        "CPU of the floor program a packet",
        taken.nanos_a_packet() / 1e3
    );
}

/// One scenario that has run.
struct Run {
    report: Value,
    generator: Usage,
    sfu: Usage,
}

impl Run {
    fn of(name: &str, send: &str, participants: u32, seconds: u32, shape: &str) -> Run {
        let mut server = Server::start(send);
        let report = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("system-{}.json", std::process::id()));
        let mut command = Command::new(env!("CARGO_BIN_EXE_throng"));
        command.args(["run", "--quiet", "--json"]).arg(&report).args(shape.split_whitespace());
        command
            .env("LIVEKIT_URL", &server.url)
            .env("LIVEKIT_API_KEY", DEV_KEY)
            .env("LIVEKIT_API_SECRET", DEV_SECRET);
        // What it says is in the report; why it could not run is not.
        let mut process = Process(command.stdout(Stdio::null()).spawn().expect("throng"));
        let mut usage = Usage::default();
        let deadline = Instant::now() + Duration::from_secs(u64::from(seconds) + 120);
        while process.0.try_wait().expect("our own child").is_none() {
            assert!(Instant::now() < deadline, "{name}: does not end");
            usage.sample(process.0.id());
            server.usage.sample(server.process.0.id());
            std::thread::sleep(SAMPLE);
        }
        let text = fs::read_to_string(&report).unwrap_or_else(|error| panic!("{name}: no report ({error})"));
        // It is read, and nobody else looks for it.
        let _ = fs::remove_file(&report);
        let run = Run {
            report: serde_json::from_str(&text).expect("a report"),
            generator: usage,
            sfu: server.stop(),
        };
        run.print(name, participants);
        run
    }

    fn print(&self, name: &str, participants: u32) {
        println!("\n{name}: {}", self.report["result"].as_str().unwrap_or("?"));
        for reason in self.report["reasons"].as_array().into_iter().flatten().take(3) {
            println!("  {}", reason.as_str().unwrap_or("?"));
        }
        let (session, engine) = (&self.report["totals"]["session"], &self.report["engine"]);
        let fastest = self.rows("joins_per_second").fold(0.0, f64::max);
        let busiest = self.rows("packets_received_per_second").fold(0.0, f64::max);
        println!(
            "  {} of {participants} joined, {fastest:.0}/s in the fastest second, p99 {}; {} packets, {busiest:.0}/s received in the busiest second",
            session["joins_ok"],
            micros(&session["join"]["p99"]),
            self.packets()
        );
        println!(
            "  frames delivered {} of {}; tick late p99 {} (bare thread {}), send lag p99 {}",
            self.media("frames_delivered"),
            self.media("frames_expected"),
            micros(&engine["tick_late_us"]["p99"]),
            micros(&engine["floor_tick_late_us"]["p99"]),
            micros(&engine["send_lag_us"]["p99"])
        );
        let forwarded = self.media("packets_received");
        self.generator.print("generator", "engine-", self.packets());
        self.sfu.print("SFU", "sfu-", forwarded);
    }

    fn rows(&self, name: &str) -> impl Iterator<Item = f64> {
        let rows = self.report["series"].as_array().into_iter().flatten();
        rows.filter_map(move |row| row[name].as_f64())
    }

    /// Of audio and video together.
    fn media(&self, counter: &str) -> f64 {
        let of = |kind: &str| self.report["totals"][kind][counter].as_f64().unwrap_or(0.0);
        of("audio") + of("video")
    }

    /// Media packets that the generator has sent or received.
    fn packets(&self) -> f64 {
        self.media("packets_sent") + self.media("packets_received")
    }
}

fn micros(value: &Value) -> String {
    value.as_u64().map_or("-".into(), |micros| format!("{:.2} ms", micros as f64 / 1e3))
}

/// The embedded SFU in a process of its own.
struct Server {
    process: Process,
    url: String,
    usage: Usage,
}

impl Server {
    fn start(send: &str) -> Server {
        let mut command = Command::new(env!("CARGO_BIN_EXE_throng"));
        command.args(["sfu", "--listen", "127.0.0.1:0", "--send", send]);
        let mut process = Process(command.stdout(Stdio::piped()).spawn().expect("throng"));
        let stdout = process.0.stdout.take().expect("piped");
        let mut lines = BufReader::new(stdout).lines();
        let url = lines
            .by_ref()
            .map_while(Result::ok)
            .find_map(|line| line.split_whitespace().find(|word| word.starts_with("ws://")).map(str::to_owned));
        // It must not wait for somebody to read what it says at its end.
        std::thread::spawn(move || lines.for_each(drop));
        Server {
            process,
            url: url.expect("the greeting"),
            usage: Usage::default(),
        }
    }

    fn stop(mut self) -> Usage {
        self.usage.sample(self.process.0.id());
        // It may have ended by itself, as the run's figures then show.
        let _ = kill_process(Pid::from_child(&self.process.0), Signal::TERM);
        let _ = self.process.0.wait();
        std::mem::take(&mut self.usage)
    }
}

/// A child that does not outlive the bench.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a process has used, as last seen before it ended.
#[derive(Default)]
struct Usage {
    /// Name, user and system ticks, by thread.
    threads: BTreeMap<u32, (String, u64, u64)>,
    resident_peak: u64,
}

impl Usage {
    fn sample(&mut self, pid: u32) {
        let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return };
        for task in tasks.flatten() {
            // A thread may end meanwhile: then what was seen of it last stays.
            let Ok(text) = fs::read_to_string(task.path().join("stat")) else {
                continue;
            };
            if let Some((tid, seen)) = read_stat(&text) {
                self.threads.insert(tid, seen);
            }
        }
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let peak = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse::<u64>().ok());
        self.resident_peak = peak.map_or(self.resident_peak, |kilobytes| kilobytes * 1_024);
    }

    /// CPU time of the threads whose names begin so.
    fn seconds(&self, prefix: &str) -> f64 {
        let threads = self.threads.values().filter(|(name, ..)| name.starts_with(prefix));
        threads.map(|(_, user, system)| user + system).sum::<u64>() as f64 / TICKS_PER_SECOND as f64
    }

    fn print(&self, who: &str, media_threads: &str, packets: f64) {
        let mut by_name: BTreeMap<&str, (u64, u64, u32)> = BTreeMap::new();
        for (name, user, system) in self.threads.values() {
            let sums = by_name.entry(name).or_default();
            *sums = (sums.0 + user, sums.1 + system, sums.2 + 1);
        }
        let seconds = |ticks: u64| ticks as f64 / TICKS_PER_SECOND as f64;
        let of_media = match packets > 0.0 {
            true => format!("; {media_threads}*: {:.2} us a packet", self.seconds(media_threads) * 1e6 / packets),
            false => String::new(),
        };
        println!(
            "  {who}: {:.2} s of CPU, {:.1} MiB resident at most{of_media}",
            self.seconds(""),
            self.resident_peak as f64 / 1_048_576.0
        );
        for (name, (user, system, count)) in by_name.into_iter().filter(|(_, sums)| sums.0 + sums.1 > 0) {
            println!(
                "    {name:<16} {count:>2}   user {:>7.2} s   system {:>7.2} s",
                seconds(user),
                seconds(system)
            );
        }
    }
}

/// Of a line of `/proc/PID/task/TID/stat`: the thread, its name, and its ticks in user and system mode (proc(5)). The name may hold spaces and brackets.
fn read_stat(text: &str) -> Option<(u32, (String, u64, u64))> {
    let (tid, rest) = text.split_once(" (")?;
    let (name, fields) = rest.rsplit_once(") ")?;
    let mut fields = fields.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    Some((tid.parse().ok()?, (name.to_owned(), ticks()?, ticks()?)))
}
