//! What each transport of media costs, beside UDP in the same minutes: the server, the relay and
//! this generator, a packet.

use std::net::Ipv4Addr;
use std::time::Duration;

use crate::common::coturn::{Coturn, PASSWORD, USER};
use crate::common::program::{Report, Running, Scratch, against, alone, throng};
use crate::common::server::{Options, Server};

/// Rounds over all transports. Each figure is the median, because the host is shared.
const ROUNDS: usize = 3;
/// From the start of a run until everybody is in.
const WARM: Duration = Duration::from_secs(4);
/// During which CPU time is counted.
const WINDOW: Duration = Duration::from_secs(10);

/// Name in the table, `--transport`, and whether the relay is the server's own.
const WAYS: [(&str, &str, bool); 6] = [
    ("UDP", "udp", false),
    ("TCP", "tcp", false),
    ("TURN by UDP", "turn-udp", false),
    ("TURN by TCP", "turn-tcp", false),
    ("TURN by TLS", "turn-tls", false),
    ("TURN by UDP, LiveKit's own relay", "turn-udp", true),
];

/// Returns the CPU time that a process has used.
fn cpu(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let (_, after_name) = stat.rsplit_once(") ").expect("proc(5)");
    let mut fields = after_name.split(' ').skip(11);
    let mut ticks = || -> u64 { fields.next().expect("a field").parse().expect("a count") };
    Duration::from_millis((ticks() + ticks()) * 10)
}

/// Microseconds of CPU for each packet that subscribers received, and round trips.
#[derive(Clone, Copy)]
struct Costs {
    server: f64,
    relay: f64,
    ours: f64,
    rtt_us: f64,
}

fn measure(server: &Server, relay: &Coturn, transport: &str, own_relay: bool) -> Costs {
    let (url, cert) = (relay.url_for(transport), relay.certificate());
    let scratch = Scratch::new();
    let json = scratch.path("run.json");
    let mut command = throng();
    against(server, &mut command)
        .args(["--video-publishers", "1", "--subscribers", "20"])
        .args(["--duration", "14", "--transport", transport, "--json"])
        .arg(&json);
    if transport.starts_with("turn") && !own_relay {
        command
            .args(["--turn", &url, "--turn-user", USER])
            .args(["--turn-password", PASSWORD, "--ca-cert"])
            .arg(cert);
    }
    let running = Running::start(&mut command, &server.secret);
    std::thread::sleep(WARM);
    let pids = [server.pid(), relay.pid(), running.pid()];
    let before = pids.map(cpu);
    std::thread::sleep(WINDOW);
    let after = pids.map(cpu);
    let finished = running.finish();
    let report = Report::read(&json, &server.secret);
    assert_eq!(
        report.counter("session", "joins_ok"),
        21,
        "{}",
        finished.stdout
    );
    let used = &report.0["transports"][0];
    assert_eq!(used["transport"], transport, "{}", finished.stdout);
    // Media has a constant rate, so a second of the window had as many packets as any other.
    let rates = report.0["series"].as_array().expect("a row a second");
    let rates = rates
        .iter()
        .map(|row| row["packets_received_per_second"].as_f64());
    let mut rates: Vec<f64> = rates.map(|rate| rate.expect("a rate")).collect();
    rates.sort_by(f64::total_cmp);
    let packets = rates[rates.len() / 2] * WINDOW.as_secs_f64();
    assert!(packets > 10_000.0, "{}", finished.stdout);
    let each = |process: usize| (after[process] - before[process]).as_secs_f64() * 1e6 / packets;
    Costs {
        server: each(0),
        relay: each(1),
        ours: each(2),
        rtt_us: used["rtt_us"]["p50"].as_u64().expect("a round trip") as f64,
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Prints the README's table. In a release build, on a host that does nothing else.
#[test]
#[ignore = "a measurement of six minutes, on a host with nothing else to do"]
fn what_each_transport_costs() {
    let with_relay = Options {
        turn: true,
        ..Options::default()
    };
    let (Some(server), Some(own), Some(relay)) = (
        Server::livekit(),
        Server::livekit_with(&with_relay),
        Coturn::start(Ipv4Addr::LOCALHOST, &["--allow-loopback-peers"]),
    ) else {
        return;
    };
    let _turn = alone();
    let mut rounds: Vec<Vec<Costs>> = Vec::new();
    for _ in 0..ROUNDS {
        let round = WAYS.map(|(_, transport, own_relay)| {
            let server = if own_relay { &own } else { &server };
            measure(server, &relay, transport, own_relay)
        });
        rounds.push(round.to_vec());
    }
    let figure = |way: usize, value: fn(Costs) -> f64| {
        median(rounds.iter().map(|round| value(round[way])).collect())
    };
    // Ratios are taken within a round, because the host drifts.
    let ratio = |way: usize, value: fn(Costs) -> f64| {
        let each = rounds
            .iter()
            .map(|round| value(round[way]) / value(round[0]));
        median(each.collect())
    };
    println!("| media over | server | relay | throng | RTT p50 |");
    println!("|---|---|---|---|---|");
    for (way, (name, ..)) in WAYS.iter().enumerate() {
        println!(
            "| {name} | {:.1} us, {:.2}x | {:.1} us | {:.1} us, {:.2}x | {:.0} us, {:.2}x |",
            figure(way, |costs| costs.server),
            ratio(way, |costs| costs.server),
            figure(way, |costs| costs.relay),
            figure(way, |costs| costs.ours),
            ratio(way, |costs| costs.ours),
            figure(way, |costs| costs.rtt_us),
            ratio(way, |costs| costs.rtt_us),
        );
    }
}
