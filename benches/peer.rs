//! Cost of the same load on the same real server for `lk load-test` and for us: a room with one
//! publisher of 720p video and so many subscribers, one program after the other. It measures two
//! things. One is the CPU time of the process that has the subscribers, by `/proc`, over the
//! packets that the server says it sent, less those dropped at its sockets. The other is the
//! process's resident memory per participant.
//!
//! `cargo bench --bench peer -- --lk PATH --livekit PATH [--subscribers 200] [--seconds 30] [--port
//! 23100]`
//!
//! It needs `lk` of livekit-cli and `livekit-server`, some minutes and a quiet host. Without both
//! programs it says so and measures nothing. The publisher for lk's subscribers is a process of
//! ours, and not in lk's figures; our own publisher is in ours. So lk's figures leave out the cost
//! of publishing, to its advantage.

#[allow(dead_code)]
#[path = "common/process.rs"]
mod process;

use std::collections::HashSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use process::{Process, Sample, load_average};
use serde_json::Value;

const KEY: &str = "devkey";
const SECRET: &str = "throng-loopback-secret-for-no-real-server";
/// Join rate of lk. It joins no faster, whatever it is told.
const LK_JOINS_PER_SECOND: u64 = 10;
/// Time after the last join in which tracks are subscribed and the first key frame arrives.
const SETTLE: Duration = Duration::from_secs(6);
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// Limit for the server's start. A server that is not up by then has failed.
const START_WAIT: Duration = Duration::from_secs(20);
/// Limit for making media, for joining, and for leaving.
const PATIENCE: Duration = Duration::from_secs(90);
/// Interval at which the server updates its counters.
const FLUSH: Duration = Duration::from_secs(5);

struct Options {
    lk: PathBuf,
    livekit: PathBuf,
    subscribers: u64,
    seconds: u64,
    port: u16,
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let Some(options) = Options::of(&arguments) else {
        return println!("SKIPPED: peer wants --lk PATH and --livekit PATH");
    };
    println!("load average at the start: {}", load_average());
    let mut server = Server::start(&options);
    let lk = against_lk(&options, &mut server);
    let throng = against_throng(&options, &mut server);
    drop(server);
    print(&options, &lk, &throng);
}

impl Options {
    fn of(arguments: &[String]) -> Option<Options> {
        let value = |name: &str| {
            let at = arguments.iter().position(|argument| argument == name)?;
            Some(
                arguments
                    .get(at + 1)
                    .unwrap_or_else(|| panic!("{name} wants a value"))
                    .as_str(),
            )
        };
        let number = |name: &str, default: u64| {
            value(name).map_or(default, |text| {
                text.parse()
                    .unwrap_or_else(|_| panic!("{name} {text}: no number"))
            })
        };
        Some(Options {
            lk: value("--lk")?.into(),
            livekit: value("--livekit")?.into(),
            subscribers: number("--subscribers", 200),
            seconds: number("--seconds", 30),
            port: number("--port", 23_100).try_into().expect("a port"),
        })
    }
}

/// Cost of one of the two programs, over the same time of the same load.
struct Taken {
    name: &'static str,
    seconds: f64,
    cpu: Duration,
    /// Part of `cpu` that our engine's threads took.
    engine_cpu: Duration,
    packets: f64,
    /// Packets that the kernel dropped at the process's sockets: sent, and never received.
    dropped: f64,
    /// Part of `packets` that are retransmissions. If they are more than a little, somebody had no
    /// time to receive, and the figures are those of an overload.
    resent: f64,
    server_cpu: Duration,
    resident: u64,
    /// State when the first participants were in. Memory that a process has for all participants
    /// together is in both values.
    early: Early,
}

#[derive(Clone, Copy)]
struct Early {
    participants: f64,
    resident: u64,
}

impl Taken {
    fn micros_a_packet(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / (self.packets - self.dropped)
    }

    fn kib_a_participant(&self, participants: u64) -> f64 {
        (self.resident as f64 - self.early.resident as f64)
            / (participants as f64 + 1.0 - self.early.participants)
            / 1_024.0
    }
}

fn against_lk(options: &Options, server: &mut Server) -> Taken {
    let room = "peer-lk";
    let whole =
        options.subscribers / LK_JOINS_PER_SECOND + options.seconds + 2 * PATIENCE.as_secs();
    let mut publisher = throng(server);
    publisher.args([
        "--room",
        room,
        "--publishers",
        "0",
        "--video-publishers",
        "1",
        "--subscribers",
        "0",
        "--no-simulcast",
    ]);
    publisher.args(["--quiet", "--duration", &format!("{whole}s")]);
    let mut publisher = Process::start(publisher.stdout(Stdio::null()));
    server.wait_for_participants(&mut publisher, 1);
    let mut command = Command::new(&options.lk);
    command.args([
        "load-test",
        "--room",
        room,
        "--subscribers",
        &options.subscribers.to_string(),
    ]);
    command.args([
        "--num-per-second",
        &LK_JOINS_PER_SECOND.to_string(),
        "--duration",
        &format!("{whole}s"),
    ]);
    command.args([
        "--url",
        &server.url,
        "--api-key",
        KEY,
        "--api-secret",
        SECRET,
    ]);
    command.env("HOME", env!("CARGO_TARGET_TMPDIR"));
    let mut subscribers = Process::start(command.stdout(Stdio::null()).stderr(Stdio::null()));
    let taken = measure("lk load-test", &mut subscribers, options, server);
    // lk's own output is not needed.
    subscribers.stop();
    publisher.stop();
    server.wait_for_participants(&mut subscribers, 0);
    taken
}

fn against_throng(options: &Options, server: &mut Server) -> Taken {
    let report =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("peer-{}.json", std::process::id()));
    let whole = Duration::from_secs(options.seconds) + SETTLE + 3 * FLUSH;
    let mut command = throng(server);
    command.args([
        "--room",
        "peer-throng",
        "--publishers",
        "0",
        "--video-publishers",
        "1",
        "--no-simulcast",
    ]);
    command.args([
        "--subscribers",
        &options.subscribers.to_string(),
        "--num-per-second",
        &LK_JOINS_PER_SECOND.to_string(),
    ]);
    command
        .args([
            "--quiet",
            "--duration",
            &format!("{}s", whole.as_secs()),
            "--json",
        ])
        .arg(&report);
    let mut process = Process::start(command.stdout(Stdio::null()));
    let taken = measure("throng", &mut process, options, server);
    let patience = Instant::now() + PATIENCE;
    while !process.has_ended() {
        assert!(Instant::now() < patience, "throng does not end");
        std::thread::sleep(LOOK_INTERVAL);
    }
    let text = fs::read_to_string(&report).expect("a report");
    // The report has been read, and nobody else looks for it.
    let _ = fs::remove_file(&report);
    let report: Value = serde_json::from_str(&text).expect("a report");
    let hold = &report["steps"][0];
    let received = hold["video"]["packets_received"].as_f64().expect("a count")
        / hold["seconds"].as_f64().expect("seconds");
    println!(
        "throng's own account: {}, {received:.0} packets/s received, {} of {} frames, {} bytes a participant, {:.0} % of its CPU in the engine; the server's: {:.0} packets/s sent",
        report["result"],
        hold["video"]["frames_delivered"],
        hold["video"]["frames_expected"],
        report["engine"]["bytes_per_participant"],
        100.0 * taken.engine_cpu.as_secs_f64() / taken.cpu.as_secs_f64(),
        taken.packets / taken.seconds
    );
    taken
}

/// Lets `process` join, then samples it and the server from one flush of the server's counters to a
/// later one.
fn measure(
    name: &'static str,
    process: &mut Process,
    options: &Options,
    server: &mut Server,
) -> Taken {
    let early = server.wait_for_participants(process, options.subscribers + 1);
    std::thread::sleep(SETTLE);
    let (started, packets_before) = server.next_flush();
    let (resent_before, dropped_before) =
        (server.packets_resent(), socket_drops(process.child.id()));
    let server_before = server.cpu();
    process.watch();
    let before = process.last().clone();
    let mut server_after = server_before;
    let end = Instant::now() + Duration::from_secs(options.seconds);
    let mut flush = (started, packets_before);
    while Instant::now() < end {
        flush = server.next_flush();
        process.watch();
        server_after = server.cpu();
        assert!(!process.has_ended(), "{name} ended before it was measured");
    }
    let after = process.last().clone();
    Taken {
        name,
        seconds: (flush.0 - started).as_secs_f64(),
        cpu: after.cpu_since(&before, "").total(),
        engine_cpu: after.cpu_since(&before, "engine-").total(),
        packets: flush.1 - packets_before,
        dropped: socket_drops(process.child.id()) - dropped_before,
        resent: server.packets_resent() - resent_before,
        server_cpu: server_after - server_before,
        resident: after.resident_bytes,
        early,
    }
}

fn print(options: &Options, lk: &Taken, throng: &Taken) {
    println!(
        "\n1 publisher of 720p, {} subscribers, on one real server (load average at the end: {})",
        options.subscribers,
        load_average()
    );
    for taken in [lk, throng] {
        println!(
            "  {:<14} {:>6.2} us of CPU a received packet ({:.1} s of CPU for {:.0} packets/s in {:.1} s); resident {:.1} MiB, {:.0} KiB a further participant; the server {:.2} us a packet sent, {:.1} % of them again, {:.1} % dropped at the receiver's sockets",
            taken.name,
            taken.micros_a_packet(),
            taken.cpu.as_secs_f64(),
            taken.packets / taken.seconds,
            taken.seconds,
            taken.resident as f64 / 1_048_576.0,
            taken.kib_a_participant(options.subscribers),
            taken.server_cpu.as_secs_f64() * 1e6 / taken.packets,
            100.0 * taken.resent / taken.packets,
            100.0 * taken.dropped / taken.packets
        );
    }
    let cpu = lk.micros_a_packet() / throng.micros_a_packet();
    println!(
        "  CPU a received packet, lk / throng: goal >= 8x: {cpu:.1}x, {}",
        if cpu >= 8.0 { "met" } else { "MISSED" }
    );
    println!(
        "  resident memory a further participant, lk / throng: {:.1}x",
        lk.kib_a_participant(options.subscribers) / throng.kib_a_participant(options.subscribers)
    );
}

/// Returns the number of datagrams for which the UDP sockets of a process had no room. It sums the
/// lines of `/proc/net/udp` (proc(5)) whose inodes are among the process's files.
fn socket_drops(pid: u32) -> f64 {
    let files = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .flatten();
    let own: HashSet<String> = files
        .filter_map(|file| {
            Some(
                fs::read_link(file.path())
                    .ok()?
                    .to_str()?
                    .strip_prefix("socket:[")?
                    .strip_suffix(']')?
                    .to_owned(),
            )
        })
        .collect();
    let sockets = ["udp", "udp6"]
        .map(|table| fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default());
    let drops = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        own.contains(*fields.get(9)?)
            .then(|| fields.last()?.parse::<f64>().ok())
            .flatten()
    };
    sockets
        .iter()
        .flat_map(|table| table.lines())
        .filter_map(drops)
        .sum()
}

fn throng(server: &Server) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_throng"));
    command.arg("run");
    command
        .env("LIVEKIT_URL", &server.url)
        .env("LIVEKIT_API_KEY", KEY)
        .env("LIVEKIT_API_SECRET", SECRET);
    command
}

/// A real LiveKit server on loopback.
struct Server {
    process: Process,
    url: String,
    metrics_port: u16,
}

impl Server {
    fn start(options: &Options) -> Server {
        let port = options.port;
        // Its counters have a port of their own. So does ICE over TCP, which neither of the two
        // programs uses.
        let (metrics_port, tcp_port) = (port + 1, port + 2);
        let config = format!(
            "port: {port}\nbind_addresses: [\"127.0.0.1\"]\nkeys: {{{KEY}: {SECRET}}}\nrtc:\n  node_ip: 127.0.0.1\n  enable_loopback_candidate: true\n  \
             interfaces: {{includes: [lo]}}\n  tcp_port: {tcp_port}\n  port_range_start: 10000\n  port_range_end: 22999\nprometheus: {{port: {metrics_port}}}\n\
             logging: {{level: warn, pion_level: error}}\n"
        );
        let mut command = Command::new(&options.livekit);
        command
            .args(["--config-body", &config])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let server = Server {
            process: Process::start(&mut command),
            url: format!("ws://127.0.0.1:{port}"),
            metrics_port,
        };
        let deadline = Instant::now() + START_WAIT;
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err()
            || server.packets_sent().is_none()
        {
            assert!(
                Instant::now() < deadline,
                "{} does not listen on {port}",
                options.livekit.display()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
        server
    }

    /// Returns the server's CPU time since it started.
    fn cpu(&mut self) -> Duration {
        self.process.watch();
        self.process
            .last()
            .cpu_since(&Sample::default(), "")
            .total()
    }

    /// Returns the number of media packets that the server has sent, by its own count. It updates
    /// the count every [`FLUSH`].
    fn packets_sent(&self) -> Option<f64> {
        self.metric("livekit_packet_total", "direction=\"outgoing\"")
    }

    fn packets_resent(&self) -> f64 {
        self.metric("livekit_packet_total", "transmission=\"retransmit\"")
            .unwrap_or(0.0)
    }

    /// Samples `process` until `count` participants are in the server's rooms. Returns the state
    /// when a tenth of them were.
    fn wait_for_participants(&self, process: &mut Process, count: u64) -> Early {
        let (patience, mut early) = (Instant::now() + PATIENCE, None);
        loop {
            process.watch();
            let participants = self.metric("livekit_participant_total", "").unwrap_or(0.0);
            if early.is_none() && participants >= count as f64 / 10.0 {
                let resident = process.last().resident_bytes;
                early = Some(Early {
                    participants,
                    resident,
                });
            }
            if let (true, Some(early)) = (participants == count as f64, early) {
                return early;
            }
            assert!(
                Instant::now() < patience,
                "{participants} participants, not {count}"
            );
            std::thread::sleep(LOOK_INTERVAL);
        }
    }

    /// Returns the sum of a metric's values with such a label, or zero if there is none. `None` if
    /// the page cannot be read.
    fn metric(&self, name: &str, label: &str) -> Option<f64> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.metrics_port)).ok()?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        let lines = text
            .lines()
            .filter(|line| line.starts_with(name) && line.contains(label));
        Some(
            lines
                .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
                .sum(),
        )
    }

    /// Waits until the count of sent packets changes. Returns the time of the change since 1970,
    /// and the count.
    fn next_flush(&self) -> (Duration, f64) {
        let before = self.packets_sent();
        loop {
            std::thread::sleep(Duration::from_millis(20));
            let now = self.packets_sent();
            if let (Some(count), true) = (now, now != before) {
                return (
                    SystemTime::now()
                        .duration_since(UNIX_EPOCH)
                        .expect("a clock that is set"),
                    count,
                );
            }
        }
    }
}
