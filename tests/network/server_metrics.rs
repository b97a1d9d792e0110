//! The server's own metrics page beside a run: its counters against ours, its CPU time against the
//! kernel's account of its process.

use std::fs;
use std::net::TcpListener;

use crate::common::network::{Direction, Fate, Network, Packet};
use crate::common::on_both_servers;
use crate::common::path::{Conditions, Loss};
use crate::common::program::{Report, Running, Scratch, against, alone, run, throng};
use crate::common::server::{Options, Server};

use super::paths::{SITE, livekit_in};
use serde_json::Value;

on_both_servers!(what_the_page_says_is_what_the_server_did);

/// Returns the CPU time of a process, in seconds (proc_pid_stat(5): fields 14 and 15, in
/// hundredths).
fn cpu_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the server runs");
    // The process's name, in parentheses, may contain anything.
    let behind_name = stat.rsplit_once(')').expect("a name").1;
    let ticks = |field: usize| -> f64 {
        behind_name
            .split_whitespace()
            .nth(field - 3)
            .and_then(|text| text.parse().ok())
            .expect("a number")
    };
    (ticks(14) + ticks(15)) / 100.0
}

fn resident_bytes(pid: u32, key: &str) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the server runs");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(key))
        .expect("its memory");
    1_024.0
        * line
            .trim()
            .trim_end_matches(" kB")
            .parse::<f64>()
            .expect("a number")
}

fn figure(step: &Value, name: &str) -> f64 {
    step[name]
        .as_f64()
        .unwrap_or_else(|| panic!("{name} is not known: {step:#}"))
}

fn step<'a>(report: &'a Report, name: &str) -> &'a Value {
    let steps = report.0["server"]["nodes"][0]["steps"]
        .as_array()
        .expect("steps");
    steps
        .iter()
        .find(|step| step["name"] == name)
        .unwrap_or_else(|| panic!("no step {name}"))
}

fn what_the_page_says_is_what_the_server_did(server: &Server) {
    const PARTICIPANTS: f64 = 10.0;
    const SUBSCRIPTIONS: f64 = 24.0;
    let _alone = alone();
    let scratch = Scratch::new();
    let args = "--publishers 2 --video-publishers 1 --video-resolution low --subscribers 8 --duration 16 --threads 1 --server-metrics";
    let mut command = throng();
    against(server, &mut command)
        .args(args.split(' '))
        .arg(&server.prometheus_url);
    command.arg("--json").arg(scratch.path("run.json"));
    let before = cpu_seconds(server.pid());
    let finished = run(&mut command, &server.secret);
    let used = cpu_seconds(server.pid()) - before;
    assert!(
        matches!(finished.code, Some(0 | 98)),
        "{}{}",
        finished.stdout,
        finished.stderr
    );
    let report = Report::read(&scratch.path("run.json"), &server.secret);
    let (total, hold) = (step(&report, "total"), step(&report, "hold"));
    let ours = |name: &str| (report.counter("audio", name) + report.counter("video", name)) as f64;
    eprintln!(
        "{used} s of CPU; {:#}\n{}",
        report.0["server"], finished.stdout
    );

    // CPU: the kernel's account includes what the server did before the first reading and after the
    // last one, and counts in hundredths of a second.
    let told = figure(total, "cpu_seconds");
    assert!(
        told <= used + 0.03 && used - told <= 0.1 + 0.1 * used,
        "the page says {told} s, the kernel {used} s"
    );
    assert!(figure(hold, "cpu_seconds") < told && figure(hold, "cpu_cores") > 0.0);

    // Packets: LiveKit counts signalling messages, too, and both servers make some packets up (see
    // tests/live/rooms.rs). On a busy host LiveKit's last portion of a track may come after the
    // last reading.
    const COUNTED: f64 = 0.95;
    let (sent, received) = (ours("packets_sent"), ours("packets_received"));
    let (incoming, outgoing) = (
        figure(total, "packets_received"),
        figure(total, "packets_sent"),
    );
    assert!(
        (COUNTED * sent..=sent + 8.0 * PARTICIPANTS).contains(&incoming),
        "{incoming} packets came in and we sent {sent}"
    );
    let made_up = 45.0 * PARTICIPANTS + 16.0 * SUBSCRIPTIONS;
    assert!(
        (COUNTED * received..=received + made_up).contains(&outgoing),
        "{outgoing} packets went out and we received {received}"
    );
    let (bytes, of_ours) = (figure(total, "bytes_sent"), ours("bytes_received"));
    let signalling = 60_000.0 * PARTICIPANTS;
    assert!(
        (COUNTED * of_ours..=1.1 * of_ours + signalling).contains(&bytes),
        "{bytes} bytes went out and we received {of_ours}"
    );
    assert_eq!(figure(total, "packets_resent"), ours("rtx_received"));
    assert_eq!(
        figure(total, "plis_received"),
        report.counter("session", "plis_sent") as f64
    );

    // Participants and memory.
    assert_eq!(
        (
            figure(hold, "participants_peak"),
            figure(total, "participants_peak")
        ),
        (PARTICIPANTS, PARTICIPANTS)
    );
    assert!((figure(hold, "participants_mean") - PARTICIPANTS).abs() < 0.01);
    // The kernel adds up only now and then what threads use.
    let (peak, most) = (
        figure(total, "resident_bytes_peak"),
        resident_bytes(server.pid(), "VmHWM:"),
    );
    assert!(
        peak >= figure(total, "resident_bytes") && peak <= most + 1e6,
        "{peak} bytes at most, the kernel says {most}"
    );
    let resident = figure(total, "resident_bytes");
    assert!(
        (0.5..2.0).contains(&(resident / resident_bytes(server.pid(), "VmRSS:"))),
        "{resident} bytes"
    );

    // Figures by which clusters are sized, computed again from our own counters of the hold. The
    // server's counters may be off by a portion of 5 s at either end.
    let seconds = report.0["steps"][0]["seconds"].as_f64().expect("a length");
    let of_hold = |name: &str| {
        ["audio", "video"]
            .iter()
            .map(|kind| {
                report.0["steps"][0][*kind][name]
                    .as_f64()
                    .expect("a counter")
            })
            .sum::<f64>()
    };
    let cores = figure(hold, "cpu_cores");
    let close = |name: &str, expected: f64, within: f64| {
        let told = figure(hold, name);
        assert!(
            (told / expected - 1.0).abs() <= within,
            "{name} is {told}, by our own figures {expected}"
        );
    };
    close(
        "cpu_seconds_per_participant_second",
        cores / PARTICIPANTS,
        0.01,
    );
    close(
        "cpu_seconds_per_million_packets",
        cores * 1e6 * seconds / of_hold("packets_received"),
        0.5,
    );
    close(
        "cpu_seconds_per_gbit",
        cores * 1e9 * seconds / (8.0 * of_hold("bytes_received")),
        0.5,
    );

    // The figures must also be in the rows of our series, and in the text report.
    let rows = report.0["series"].as_array().expect("rows");
    let read: Vec<&Value> = rows
        .iter()
        .map(|row| &row["server"][0])
        .filter(|row| !row.is_null())
        .collect();
    assert!(
        read.len() >= 10
            && read
                .iter()
                .all(|row| row["cpu_cores"].is_number() && row["resident_bytes"].is_number())
    );
    assert!(
        report.0["server"]["nodes"][0]["gaps"]
            .as_array()
            .expect("a list")
            .is_empty(),
        "{}",
        report.notes()
    );
    assert!(
        finished.stdout.contains("\nServer     1 page, hold: "),
        "{}",
        finished.stdout
    );
    assert!(
        finished
            .stdout
            .lines()
            .all(|line| line.chars().count() <= 80),
        "{}",
        finished.stdout
    );
}

#[test]
fn livekit_times_what_it_forwards_where_it_is_told_to() {
    let options = Options {
        forward_stats: true,
        ..Options::default()
    };
    let Some(server) = Server::livekit_with(&options) else {
        return;
    };
    let _alone = alone();
    let scratch = Scratch::new();
    let args = "--publishers 2 --subscribers 4 --duration 5 --threads 1 --server-metrics";
    let mut command = throng();
    against(&server, &mut command)
        .args(args.split(' '))
        .arg(&server.prometheus_url);
    let finished = run(
        command.arg("--json").arg(scratch.path("run.json")),
        &server.secret,
    );
    assert!(
        matches!(finished.code, Some(0 | 98)),
        "{}{}",
        finished.stdout,
        finished.stderr
    );
    let report = Report::read(&scratch.path("run.json"), &server.secret);
    let latency = &step(&report, "total")["forward_latency"];
    eprintln!("{latency:#}\n{}", finished.stdout);
    // LiveKit measures one value for each packet that came in.
    let sent = report.counter("audio", "packets_sent") as f64;
    let count = latency["count"].as_f64().expect("it measures");
    assert!(
        (0.9 * sent..=sent).contains(&count),
        "{count} of {sent} packets"
    );
    let mean = latency["mean_us"].as_f64().expect("a mean");
    let ours = report.0["totals"]["audio"]["one_way_latency"]["mean"]
        .as_f64()
        .expect("a mean");
    assert!(
        mean > 0.0 && mean <= ours,
        "{mean} us in the server, {ours} us on the whole way"
    );
    let [p50, p99] =
        ["p50_us", "p99_us"].map(|name| latency[name]["over"].as_f64().expect("a bound"));
    assert!(
        p50 <= p99 && finished.stdout.contains("\n  forwarding   p50 "),
        "{latency}"
    );
}

mod over_a_bad_network {
    use super::*;

    #[test]
    fn livekits_page_says_what_was_lost_and_asked_for() {
        let name = "livekits_page_says_what_was_lost_and_asked_for";
        let Some(network) = Network::for_test(module_path!(), name, 5) else {
            return;
        };
        let Some(server) = livekit_in(&network.server) else {
            return;
        };
        let (page, _, log) = lossy_run(&network, &server);
        // The server subtracts repaired packets from its losses. A publisher's packet that stays
        // missing is missing for both subscribers.
        let lost = |direction| {
            log.iter()
                .filter(|packet| packet.direction == direction && packet.fate == Fate::Lost)
                .count() as f64
        };
        let (up, down) = (lost(Direction::Up), lost(Direction::Down));
        for (name, most) in [
            ("uplink_packets_lost", up),
            ("downlink_packets_lost", down + 2.0 * up),
        ] {
            assert!(
                (0.0..=most).contains(&figure(&page, name)),
                "{name}: {} of {most}",
                figure(&page, name)
            );
        }
        assert!(figure(&page, "downlink_packets_lost") > 0.0);
        assert_eq!(
            figure(&page, "host_packets_dropped"),
            network
                .server
                .run(|| network.server.device_counts())
                .tx_dropped as f64
        );
    }

    #[test]
    fn the_embedded_sfus_page_says_what_went_over_the_wire() {
        let name = "the_embedded_sfus_page_says_what_went_over_the_wire";
        let Some(network) = Network::for_test(module_path!(), name, 5) else {
            return;
        };
        let server = network.server.run(|| Server::embedded_at(SITE));
        let (page, report, log) = lossy_run(&network, &server);
        let of = |direction| {
            log.iter()
                .filter(move |packet| packet.direction == direction)
        };
        // Length of SRTP's authentication tag, which the page does not count.
        const TAG: usize = 16;
        let bytes = |packets: &mut dyn Iterator<Item = &Packet>| {
            packets
                .map(|packet| (packet.bytes - TAG) as f64)
                .sum::<f64>()
        };
        let both = |name: &str, again: &str| figure(&page, name) + figure(&page, again);
        assert_eq!(
            both("packets_sent", "packets_resent"),
            of(Direction::Down).count() as f64
        );
        assert_eq!(
            both("bytes_sent", "bytes_resent"),
            bytes(&mut of(Direction::Down))
        );
        // The page does not count duplicates.
        let came = || of(Direction::Up).filter(|packet| packet.fate != Fate::Lost);
        let (told, there) = (figure(&page, "packets_received"), came().count() as f64);
        assert!(
            told <= there && told >= 0.9 * there,
            "{told} of {there} packets"
        );
        let (told, there) = (figure(&page, "bytes_received"), bytes(&mut came()));
        assert!(
            told <= there && told >= 0.9 * there,
            "{told} of {there} bytes"
        );
        let ours = |name| report.counter("session", name) as f64;
        assert!((1.0..=ours("nacks_sent")).contains(&figure(&page, "nacks_received")));
        assert!(figure(&page, "nacks_sent") >= ours("nacks_received").max(1.0));
        assert!(figure(&page, "plis_sent") >= ours("plis_received"));
        assert_eq!(
            (figure(&page, "socket_drops"), figure(&page, "send_errors")),
            (0.0, 0.0)
        );
    }

    /// Runs with a loss of 8 % each way. Returns what the page said of the run, the report, and the
    /// log of its media.
    fn lossy_run(network: &Network, server: &Server) -> (Value, Report, Vec<Packet>) {
        let _alone = alone();
        let scratch = Scratch::new();
        network.set_both(Conditions {
            loss: Loss::Random(0.08),
            ..Conditions::default()
        });
        let args = "--publishers 1 --video-publishers 1 --video-resolution low --subscribers 2 --threads 1 --max-loss 100 --duration 12 --server-metrics";
        let mut command = throng();
        against(server, &mut command)
            .args(args.split(' '))
            .arg(&server.prometheus_url);
        command.arg("--json").arg(scratch.path("run.json"));
        let finished = network
            .clients
            .run(|| Running::start(&mut command, &server.secret))
            .finish();
        assert!(
            matches!(finished.code, Some(0 | 98)),
            "{}{}",
            finished.stdout,
            finished.stderr
        );
        let report = Report::read(&scratch.path("run.json"), &server.secret);
        let page = step(&report, "total").clone();
        eprintln!("{page:#}");
        // Only video is compared. An audio packet that was lost before it reached the server looks
        // like a retransmission.
        let (resent, came) = (
            figure(&page, "packets_resent"),
            report.counter("video", "rtx_received") as f64,
        );
        assert!(
            came > 0.0 && came <= resent,
            "{came} came of {resent} that were sent again"
        );
        for name in ["bytes_resent", "nacks_sent", "nacks_received"] {
            assert!(figure(&page, name) > 0.0, "{name}");
        }
        let log = network
            .log()
            .into_iter()
            .filter(|packet| packet.rtp().is_some())
            .collect();
        (page, report, log)
    }
}

#[test]
fn a_page_that_does_not_answer_is_refused_before_anybody_joins() {
    let server = Server::embedded();
    let free = TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a free port");
    let scratch = Scratch::new();
    let mut command = throng();
    against(&server, &mut command).args([
        "--publishers",
        "1",
        "--subscribers",
        "1",
        "--duration",
        "1",
        "--server-metrics",
        &server.prometheus_url,
    ]);
    command
        .arg("--server-metrics")
        .arg(format!("http://me:hidden-password@{free}/metrics"));
    command.arg("--json").arg(scratch.path("run.json"));
    let finished = run(&mut command, "hidden-password");
    assert_eq!(finished.code, Some(1), "{}", finished.stderr);
    let refusal = format!("throng: --server-metrics http://{free}/metrics cannot be read (");
    assert!(
        finished.stderr.contains(&refusal) && finished.stderr.contains("Or leave it out"),
        "{}",
        finished.stderr
    );
    assert_eq!(
        server.metrics()["livekit_participant_join_total"],
        0.0,
        "nobody has tried to join"
    );
}

#[test]
fn what_is_no_page_is_a_usage_error() {
    for (args, why) in [
        (
            &[
                "--server-metrics",
                "sfu:6789",
                "--url",
                "ws://127.0.0.1:1",
                "--api-key",
                "k",
                "--api-secret",
                "s",
            ][..],
            "takes the address of a Prometheus page",
        ),
        (
            &["--server-metrics", "http://127.0.0.1:6789"][..],
            "Leave it out, or name the server with --url",
        ),
        (
            &[
                "--server-metrics",
                "http://127.0.0.1:6789",
                "--report-to",
                "http://127.0.0.1:1",
            ][..],
            "--server-metrics is not a prober's to say: give it to the coordinator",
        ),
    ] {
        let finished = run(throng().args(args), "no secret");
        assert_eq!(finished.code, Some(2), "{}", finished.stderr);
        assert!(finished.stderr.contains(why), "{}", finished.stderr);
    }
}
