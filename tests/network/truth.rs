//! Checks the figures of real runs, against a real LiveKit server and against the embedded SFU,
//! over a network that loses and delays packets. The truth is that network's own log, the server's
//! counters, and what the kernel shows to a packet socket.
//!
//! Counts are exact whatever the host does. Times must be right within 1 ms or 1 %, plus the
//! lateness of a bare timer thread in the same run. On a busy host this allows much, but never
//! fails a test. `cargo test --test network truth:: -- --ignored --nocapture` tries many more
//! networks and prints the table in docs/truth.md.

mod capture;
mod headers;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use crate::common::network::{Content, Direction, Fate, Network, Packet};
use crate::common::path::{Conditions, Loss};
use crate::common::program::{Report, Running, Scratch, against, alone, throng};
use crate::common::server::Server;

use super::paths::{SITE, livekit_in};
use capture::Capture;
use headers::{Stream, streams};

const AUDIO: u8 = 111;
const VIDEO: u8 = 96;
const VIDEO_RTX: u8 = 97;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    LiveKit,
    Embedded,
}

/// The conditions of one run.
#[derive(Clone, Copy, Debug)]
struct Trial {
    target: Target,
    up: Conditions,
    down: Conditions,
    /// Whether packets are lost from the start, or only after media flows.
    from_the_start: bool,
    seconds: u64,
    /// Whether to check the server's counters. With LiveKit this waits until it has flushed them.
    counters: bool,
}

/// One run, and all that is known of it.
struct Run {
    trial: Trial,
    report: Report,
    /// Packets that the account can have: without those sent down after the run closed it, and with
    /// later arrivals as under way.
    log: Vec<Packet>,
    up: Vec<Stream>,
    down: Vec<Stream>,
    captured: Vec<Packet>,
    whole_log: Vec<Packet>,
    metrics: HashMap<String, f64>,
}

/// Time from the end of publishing to a moment before the account is closed, 1.5 s after publishers
/// stop. Packets that the server makes up when participants leave come later.
const ACCOUNT_CLOSES: Duration = Duration::from_millis(1_490);
/// Time to wait for LiveKit's counters, which it flushes every 5 s.
const FLUSH: Duration = Duration::from_millis(5_500);

fn start(network: &Network, target: Target) -> Option<Server> {
    match target {
        Target::LiveKit => livekit_in(&network.server),
        Target::Embedded => Some(network.server.run(|| Server::embedded_at(SITE))),
    }
}

/// Runs a publisher of audio and video, and a subscriber.
fn live(network: &Network, trial: Trial) -> Option<Run> {
    let server = start(network, trial.target)?;
    let (capture, before) = (Capture::start(&network.clients), network.log().len());
    let worsen = || {
        network.set(Direction::Up, trial.up);
        network.set(Direction::Down, trial.down);
    };
    if trial.from_the_start {
        worsen()
    } else {
        let gentle = |conditions| Conditions {
            loss: Loss::None,
            ..conditions
        };
        network.set(Direction::Up, gentle(trial.up));
        network.set(Direction::Down, gentle(trial.down));
    }
    let scratch = Scratch::new();
    let mut command = throng();
    let args = "--publishers 1 --video-publishers 1 --video-resolution low --subscribers 1 --threads 1 --max-loss 100 --duration";
    against(&server, &mut command)
        .args(args.split(' '))
        .arg(trial.seconds.to_string());
    command.arg("--json").arg(scratch.path("run.json"));
    let mut running = network
        .clients
        .run(|| Running::start(&mut command, &server.secret));
    if !trial.from_the_start {
        let flows = || {
            streams(&network.log()[before..], Direction::Down)
                .iter()
                .filter(|stream| stream.sent() > 20)
                .count()
                == 2
        };
        while !flows() && !running.has_ended() {
            std::thread::sleep(Duration::from_millis(20));
        }
        worsen();
    }
    let finished = running.finish();
    network.set_both(Conditions::default());
    assert!(
        matches!(finished.code, Some(0 | 98)),
        "{}{}",
        finished.stdout,
        finished.stderr
    );
    let report = Report::read(&scratch.path("run.json"), &server.secret);
    if trial.counters && trial.target == Target::LiveKit {
        std::thread::sleep(FLUSH);
    }
    let metrics = network.server.run(|| server.metrics());
    network.server.run(|| drop(server));
    while network.under_way() > 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let captured = capture.finish();
    let whole_log = network.log()[before..].to_vec();
    let up = streams(&whole_log, Direction::Up);
    let sent = up
        .iter()
        .filter(|stream| stream.payload_type != VIDEO_RTX)
        .flat_map(|stream| stream.packets.values());
    let end = sent
        .map(|sendings| sendings[0].at)
        .max()
        .expect("media was sent")
        + ACCOUNT_CLOSES;
    let known = |packet: &&Packet| packet.direction == Direction::Up || packet.at < end;
    let log: Vec<Packet> = whole_log
        .iter()
        .filter(known)
        .map(|packet| until(end, *packet))
        .collect();
    Some(Run {
        trial,
        report,
        down: streams(&log, Direction::Down),
        up,
        log,
        captured,
        whole_log,
        metrics,
    })
}

/// Returns the packet as it was known at `end`: one that arrives later on the way down is still
/// under way.
fn until(end: Duration, packet: Packet) -> Packet {
    let is_late =
        packet.direction == Direction::Down && packet.delivered_at().is_some_and(|at| at >= end);
    Packet {
        fate: if is_late { Fate::UnderWay } else { packet.fate },
        ..packet
    }
}

/// Time that may pass in a server between the clock that its sender report states and the socket,
/// or between the socket and the clock that its receiver report counts from. No log shows it. On
/// idle virtual machines, whose CPUs wake late, 1 to 4 ms were seen. A path that is left out of the
/// figure costs 20 ms or more.
const SERVERS_TURN_US: f64 = 8_000.0;

/// One figure as it was reported, and the value that it ought to have.
struct Check {
    metric: String,
    said: f64,
    truth: f64,
    allowed: f64,
}

impl Check {
    fn holds(&self) -> bool {
        (self.said - self.truth).abs() <= self.allowed
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} is {} and ought to be {} (within {})",
            self.metric, self.said, self.truth, self.allowed
        )
    }
}

impl Run {
    fn stream(&self, direction: Direction, payload_type: u8) -> Stream {
        let streams = if direction == Direction::Up {
            &self.up
        } else {
            &self.down
        };
        let mut of_type = streams
            .iter()
            .filter(|stream| stream.payload_type == payload_type);
        let found = of_type.next().cloned().unwrap_or_default();
        assert!(
            of_type.next().is_none(),
            "one stream of type {payload_type}"
        );
        found
    }

    fn checks(&self) -> Vec<Check> {
        let mut checks = Vec::new();
        let mut exact = |metric: String, said: u64, truth: u64| {
            checks.push(Check {
                metric,
                said: said as f64,
                truth: truth as f64,
                allowed: 0.0,
            });
        };
        self.check_sent(&mut exact);
        self.check_audio(&mut exact);
        self.check_video(&mut exact);
        self.check_all(&mut exact);
        self.check_capture(&mut exact);
        if self.trial.counters {
            match self.trial.target {
                Target::LiveKit => self.check_livekit(&mut exact),
                Target::Embedded => self.check_embedded(&mut exact),
            }
        }
        checks.extend(self.check_times());
        checks
    }

    fn check_sent(&self, exact: &mut impl FnMut(String, u64, u64)) {
        const TAG: u64 = 16;
        for (kind, payload_type) in [("audio", AUDIO), ("video", VIDEO)] {
            let (sent, said) = (self.stream(Direction::Up, payload_type), |name: &str| {
                self.report.counter(kind, name)
            });
            exact(
                format!("{kind}.packets_sent"),
                said("packets_sent"),
                sent.sent(),
            );
            exact(
                format!("{kind}.bytes_sent"),
                said("bytes_sent"),
                sent.wire_bytes() - TAG * sent.sent(),
            );
            exact(
                format!("{kind}.frames_sent"),
                said("frames_sent"),
                sent.timestamps(),
            );
        }
        let (audio, rtx) = (
            self.stream(Direction::Up, AUDIO),
            self.stream(Direction::Up, VIDEO_RTX),
        );
        exact(
            "audio.rtx_sent".into(),
            self.report.counter("audio", "rtx_sent"),
            audio.sent_again(),
        );
        exact(
            "video.rtx_sent".into(),
            self.report.counter("video", "rtx_sent"),
            rtx.sent(),
        );
    }

    /// Checks audio. A retransmission has the same SSRC and sequence number as its original, so the
    /// headers tell everything.
    fn check_audio(&self, exact: &mut impl FnMut(String, u64, u64)) {
        let (came, said) = (self.stream(Direction::Down, AUDIO), |name: &str| {
            self.report.counter("audio", name)
        });
        let mut exact = |name: &str, said, truth| exact(format!("audio.{name}"), said, truth);
        exact(
            "packets_received + packets_repaired",
            said("packets_received") + said("packets_repaired"),
            came.came(),
        );
        exact(
            "packets_lost",
            said("packets_lost"),
            came.span() - came.came(),
        );
        exact(
            "packets_duplicate",
            said("packets_duplicate"),
            came.arrivals() - came.came(),
        );
        exact("frames_delivered", said("frames_delivered"), came.came());
        exact(
            "rtx_received",
            said("rtx_received"),
            said("packets_repaired"),
        );
        // If the server lacks a packet at first, a subscriber may ask for it before it comes. Then
        // nobody can tell a late original from a retransmission.
        if self.trial.up.loss == Loss::None {
            exact(
                "packets_received",
                said("packets_received"),
                came.came_at_first(),
            );
            exact(
                "packets_lost_network",
                said("packets_lost_network"),
                came.lost_at_first(),
            );
            exact("packets_reordered", said("packets_reordered"), 0);
        }
    }

    /// Checks video. Which packet a retransmission repeats is encrypted, but the number of
    /// retransmissions is not.
    fn check_video(&self, exact: &mut impl FnMut(String, u64, u64)) {
        let (came, rtx) = (
            self.stream(Direction::Down, VIDEO),
            self.stream(Direction::Down, VIDEO_RTX),
        );
        let said = |name: &str| self.report.counter("video", name);
        let mut exact = |name: &str, said, truth| exact(format!("video.{name}"), said, truth);
        exact("packets_received", said("packets_received"), came.came());
        exact("rtx_received", said("rtx_received"), rtx.came());
        exact(
            "packets_repaired + packets_lost",
            said("packets_repaired") + said("packets_lost"),
            said("packets_lost_network"),
        );
        let superfluous = came.arrivals() + rtx.arrivals() - came.came() - said("packets_repaired");
        exact("packets_duplicate", said("packets_duplicate"), superfluous);
        // This is off if the very last packet arrives only as a retransmission: the stream is then
        // longer than its originals.
        exact(
            "packets_lost_network",
            said("packets_lost_network"),
            came.span() - came.came(),
        );
        if self.trial.up.loss == Loss::None {
            exact("packets_reordered", said("packets_reordered"), 0);
        }
    }

    fn check_all(&self, exact: &mut impl FnMut(String, u64, u64)) {
        let said = |name: &str| self.report.counter("session", name);
        let udp = |direction| {
            self.log
                .iter()
                .filter(move |packet| packet.direction == direction && packet.is_udp())
        };
        let sent: usize = udp(Direction::Up)
            .filter(|packet| !packet.duplicate)
            .map(|packet| packet.bytes)
            .sum();
        exact(
            "session.wire_bytes_sent".into(),
            said("wire_bytes_sent"),
            sent as u64,
        );
        let came: usize = udp(Direction::Down)
            .filter(|packet| packet.delivered_at().is_some())
            .map(|packet| packet.bytes)
            .sum();
        // Reports and checks go on until everybody has left. Those that arrive while the account is
        // being closed may be counted or not.
        let late = self.whole_log.len() - self.log.len();
        let received = said("wire_bytes_received");
        let in_time = received >= came as u64 && (late > 0 || received == came as u64);
        exact(
            "session.wire_bytes_received is the log's".into(),
            u64::from(in_time),
            1,
        );
        for name in ["packets_rejected", "host_drops", "frames_misrouted"] {
            exact(format!("session.{name}"), said(name), 0);
        }
        if self.trial.target == Target::Embedded {
            // The last report comes within a second of the last packet.
            for (kind, payload_type) in [("audio", AUDIO), ("video", VIDEO)] {
                let lost = self.stream(Direction::Up, payload_type).lost_at_first();
                let reported = self.report.counter(kind, "uplink_packets_lost");
                if self.trial.down.loss == Loss::None {
                    exact(format!("{kind}.uplink_packets_lost"), reported, lost);
                }
            }
        }
    }

    /// Checks that the capture, the other witness, got the same packets from the kernel.
    fn check_capture(&self, exact: &mut impl FnMut(String, u64, u64)) {
        let by_stream = |packets: &[Packet]| {
            let mut counts: BTreeMap<(Direction, Ssrc), u64> = BTreeMap::new();
            for packet in packets {
                let seen = packet.direction == Direction::Up && !packet.duplicate
                    || packet.direction == Direction::Down && packet.fate != Fate::Lost;
                if let (Some(rtp), true) = (packet.rtp(), seen) {
                    *counts.entry((packet.direction, rtp.ssrc)).or_default() += 1;
                }
            }
            counts
        };
        let (captured, logged) = (by_stream(&self.captured), by_stream(&self.whole_log));
        for (stream, count) in &logged {
            exact(
                format!("captured of {stream:?}"),
                captured.get(stream).copied().unwrap_or(0),
                *count,
            );
        }
    }

    fn metric(&self, name: &str, labels: &[&str]) -> u64 {
        let start = format!("{name}{{");
        let matching = self.metrics.iter().filter(|(sample, _)| {
            sample.starts_with(&start) && labels.iter().all(|label| sample.contains(label))
        });
        matching.map(|(_, value)| *value as u64).sum()
    }

    /// Checks LiveKit's counters: packets that it retransmitted; packets lost on the way down,
    /// which it knows from our reports; and packets that came late on the way up, which are the
    /// retransmissions.
    fn check_livekit(&self, exact: &mut impl FnMut(String, u64, u64)) {
        let (audio, rtx) = (
            self.stream(Direction::Down, AUDIO),
            self.stream(Direction::Down, VIDEO_RTX),
        );
        let retransmitted = self.metric("livekit_packet_total", &["outgoing", "retransmit"]);
        exact(
            "livekit_packet_total, outgoing, retransmit".into(),
            retransmitted,
            audio.sent_again() + rtx.sent(),
        );
        let lost = |kind| self.metric("livekit_packet_loss_total", &["outgoing", kind]);
        if self.trial.up.loss == Loss::None {
            exact(
                "livekit_packet_loss_total, outgoing, AUDIO".into(),
                lost("AUDIO"),
                self.report.counter("audio", "packets_lost_network"),
            );
            exact(
                "livekit_packet_loss_total, outgoing, VIDEO".into(),
                lost("VIDEO"),
                self.report.counter("video", "packets_lost_network"),
            );
        }
        let late = |kind| self.metric("livekit_packet_out_of_order_total", &["incoming", kind]);
        let (audio, rtx) = (
            self.stream(Direction::Up, AUDIO),
            self.stream(Direction::Up, VIDEO_RTX),
        );
        exact(
            "livekit_packet_out_of_order_total, incoming, AUDIO".into(),
            late("AUDIO"),
            audio.arrivals() - audio.came_at_first(),
        );
        exact(
            "livekit_packet_out_of_order_total, incoming, VIDEO".into(),
            late("VIDEO"),
            rtx.came(),
        );
    }

    /// Checks the packet counters of the embedded SFU's page.
    fn check_embedded(&self, exact: &mut impl FnMut(String, u64, u64)) {
        let packets = |labels: &[&str]| self.metric("livekit_packet_total", labels);
        let (audio, video, rtx) = (
            self.stream(Direction::Up, AUDIO),
            self.stream(Direction::Up, VIDEO),
            self.stream(Direction::Up, VIDEO_RTX),
        );
        exact(
            "embedded, incoming, initial".into(),
            packets(&["incoming", "initial"]),
            audio.came() + video.came(),
        );
        exact(
            "embedded, incoming, retransmit".into(),
            packets(&["incoming", "retransmit"]),
            rtx.came(),
        );
        let (audio, video, rtx) = (
            self.stream(Direction::Down, AUDIO),
            self.stream(Direction::Down, VIDEO),
            self.stream(Direction::Down, VIDEO_RTX),
        );
        exact(
            "embedded, outgoing, initial".into(),
            packets(&["outgoing", "initial"]),
            audio.sent() + video.sent(),
        );
        exact(
            "embedded, outgoing, retransmit".into(),
            packets(&["outgoing", "retransmit"]),
            audio.sent_again() + rtx.sent(),
        );
    }

    /// Returns how late the host woke a thread that did nothing else, as the 99th percentile.
    fn floor_us(&self) -> f64 {
        self.report.0["engine"]["floor_tick_late_us"]["p99"]
            .as_f64()
            .expect("a floor")
    }

    fn check_times(&self) -> Vec<Check> {
        let mut checks = Vec::new();
        let mut time = |metric: &str, said: Option<u64>, truth: Option<Duration>, more: f64| {
            if let (Some(said), Some(truth)) = (said, truth) {
                let truth = truth.as_nanos() as f64 / 1e3;
                checks.push(Check {
                    metric: metric.to_owned(),
                    said: said as f64,
                    truth,
                    allowed: f64::max(1_000.0, 0.01 * truth) + self.floor_us() + more,
                });
            }
        };
        time(
            "session.rtt_stun.p50",
            self.report.micros("session", "rtt_stun", "p50"),
            median(self.stun_round_trips()),
            0.0,
        );
        let way = |direction| {
            let control = |packet: &&Packet| {
                packet.direction == direction && matches!(packet.content, Content::Rtcp { .. })
            };
            median(
                self.log
                    .iter()
                    .filter(control)
                    .filter_map(Packet::delay)
                    .collect(),
            )
        };
        let both = way(Direction::Up)
            .zip(way(Direction::Down))
            .map(|(up, down)| up + down);
        time(
            "session.rtt_rtcp.p50",
            self.report.micros("session", "rtt_rtcp", "p50"),
            both,
            SERVERS_TURN_US,
        );
        let audio = self.stream(Direction::Down, AUDIO);
        if self.trial.up.loss == Loss::None && self.trial.down.loss == Loss::None {
            let lag = self.report.0["engine"]["send_lag_us"]["p50"]
                .as_u64()
                .map_or(Duration::ZERO, Duration::from_micros);
            let transit = median(self.transits()).map(|transit| transit + lag);
            time(
                "audio.one_way_latency.p50",
                self.report.micros("audio", "one_way_latency", "p50"),
                transit,
                0.0,
            );
            time(
                "audio.jitter.p50",
                self.report.micros("audio", "jitter", "p50"),
                median(audio.jitter(48_000.0)),
                0.0,
            );
        }
        checks
    }

    /// Returns the time from the latest sending of each STUN check to its answer.
    fn stun_round_trips(&self) -> Vec<Duration> {
        let mut asked = HashMap::new();
        let mut round_trips = Vec::new();
        for packet in &self.log {
            match packet.content {
                Content::Stun {
                    answers: false,
                    transaction,
                } if packet.direction == Direction::Up => {
                    asked.insert(transaction, packet.at);
                }
                Content::Stun {
                    answers: true,
                    transaction,
                } if packet.direction == Direction::Down => {
                    round_trips.extend(
                        packet
                            .delivered_at()
                            .zip(asked.get(&transaction))
                            .map(|(at, asked)| at - *asked),
                    );
                }
                _ => {}
            }
        }
        round_trips
    }

    /// Returns the time of each audio packet from the publisher's kernel to the subscriber's.
    /// Nothing is lost, so the same packet is found on both legs by its distance from the last one.
    fn transits(&self) -> Vec<Duration> {
        let (up, down) = (
            self.stream(Direction::Up, AUDIO),
            self.stream(Direction::Down, AUDIO),
        );
        let pairs = up.packets.values().rev().zip(down.packets.values().rev());
        pairs
            .filter_map(|(sent, came)| Some(came[0].delivered_at()? - sent[0].at))
            .collect()
    }

    fn row(&self, checks: &[Check]) -> String {
        let loss = |conditions: &Conditions| match conditions.loss {
            Loss::None => "0".to_owned(),
            Loss::Random(share) => format!("{:.0} %", share * 100.0),
            Loss::Bursts { share, mean } => format!("{:.0} % in {mean}s", share * 100.0),
        };
        let (up, down) = (self.trial.up, self.trial.down);
        let both = |direction: Direction, of: fn(&Stream) -> u64| {
            format!(
                "{} / {}",
                of(&self.stream(direction, AUDIO)),
                of(&self.stream(direction, VIDEO))
            )
        };
        let said = |name| {
            format!(
                "{} / {}",
                self.report.counter("audio", name),
                self.report.counter("video", name)
            )
        };
        let error = |metric: &str| {
            let check = checks.iter().find(|check| check.metric == metric);
            check.map_or_else(
                || "-".to_owned(),
                |check| format!("{:.0} ({:+.0})", check.truth, check.said - check.truth),
            )
        };
        format!(
            "| {:?} | {} / {} | {} / {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} of {} |",
            self.trial.target,
            loss(&up),
            loss(&down),
            up.delay.as_millis(),
            down.delay.as_millis(),
            up.jitter.as_millis(),
            both(Direction::Up, Stream::sent),
            both(Direction::Up, Stream::lost_at_first),
            said("uplink_packets_lost"),
            both(Direction::Down, Stream::lost_at_first),
            said("packets_lost"),
            error("audio.one_way_latency.p50"),
            error("session.rtt_stun.p50"),
            error("session.rtt_rtcp.p50"),
            self.floor_us(),
            checks.iter().filter(|check| check.holds()).count(),
            checks.len(),
        )
    }
}

fn median(mut values: Vec<Duration>) -> Option<Duration> {
    values.sort_unstable();
    values.get(values.len() / 2).copied()
}

fn millis(delay: u64) -> Conditions {
    Conditions {
        delay: Duration::from_millis(delay),
        ..Conditions::default()
    }
}

fn lossy(loss: Loss, delay: u64) -> Conditions {
    Conditions {
        loss,
        ..millis(delay)
    }
}

/// One participant's join as the network saw it.
struct Joining {
    /// Time of the first packet of its WebSocket's connection.
    opened: Duration,
    /// Time of the server's first bytes there, after which it speaks WebSocket.
    answered: Duration,
    /// Times at which the last flight of the server's DTLS and the first media arrived.
    keyed: Duration,
    first_media: Option<Duration>,
}

/// Returns the joins in their order. A participant's WebSocket is the connection opened last before
/// its first check, because joins are two seconds apart.
fn joinings(log: &[Packet]) -> Vec<Joining> {
    let up = || {
        log.iter()
            .filter(|packet| packet.direction == Direction::Up)
    };
    let mut checking: Vec<&Packet> = Vec::new();
    for packet in up().filter(|packet| matches!(packet.content, Content::Stun { .. })) {
        if !checking.iter().any(|known| known.from == packet.from) {
            checking.push(packet);
        }
    }
    let of = |check: &&Packet| {
        let opening = |packet: &&Packet| matches!(packet.content, Content::Tcp { syn: true, .. });
        let opened = up()
            .take_while(|packet| packet.at < check.at)
            .filter(opening)
            .last()
            .expect("a WebSocket");
        let came = || {
            log.iter()
                .filter(|packet| packet.to == check.from || packet.to == opened.from)
        };
        let words = |packet: &&Packet| matches!(packet.content, Content::Tcp { payload: 1.., .. });
        Joining {
            opened: opened.at,
            answered: came()
                .filter(words)
                .find_map(Packet::delivered_at)
                .expect("an answer"),
            keyed: came()
                .filter(|packet| packet.content == Content::Dtls { keyed: true })
                .find_map(Packet::delivered_at)
                .expect("a handshake"),
            first_media: came()
                .filter(|packet| packet.rtp().is_some())
                .find_map(Packet::delivered_at),
        }
    };
    checking.iter().map(of).collect()
}

/// Delay of each way. A step that is forgotten or counted twice is off by at least this much. Half
/// of it is allowed for busy hosts.
const ONE_WAY: Duration = Duration::from_millis(100);

#[test]
fn joins_take_as_long_as_the_network_says() {
    let name = "joins_take_as_long_as_the_network_says";
    let _alone = alone();
    let Some(network) = Network::for_test(module_path!(), name, 12) else {
        return;
    };
    network.set_both(Conditions {
        delay: ONE_WAY,
        ..Conditions::default()
    });
    network.touch_tcp(true);
    for target in [Target::LiveKit, Target::Embedded] {
        let Some(server) = start(&network, target) else {
            return;
        };
        let (before, scratch) = (network.log().len(), Scratch::new());
        let mut command = throng();
        let args = "--publishers 1 --subscribers 1 --threads 1 --num-per-second 0.5 --duration 1";
        against(&server, &mut command).args(args.split(' '));
        command
            .arg("--json")
            .arg(scratch.path("run.json"))
            .arg("--participants")
            .arg(scratch.path("who.ndjson"));
        let running = network
            .clients
            .run(|| Running::start(&mut command, &server.secret));
        let finished = running.finish();
        assert!(
            matches!(finished.code, Some(0 | 98)),
            "{}{}",
            finished.stdout,
            finished.stderr
        );
        let report = Report::read(&scratch.path("run.json"), &server.secret);
        network.server.run(|| drop(server));
        let lines = std::fs::read_to_string(scratch.path("who.ndjson")).expect("a line for each");
        let lines: Vec<serde_json::Value> = lines
            .lines()
            .map(|line| serde_json::from_str(line).expect("JSON"))
            .collect();
        let log = network.log()[before..].to_vec();
        let floor = Duration::from_micros(
            report.0["engine"]["floor_tick_late_us"]["p99"]
                .as_u64()
                .expect("a floor"),
        );
        let joinings = joinings(&log);
        assert_eq!((lines.len(), joinings.len()), (2, 2));
        for (line, joining) in lines.iter().zip(joinings) {
            let moment = |name: &str| line[name].as_u64().map(Duration::from_micros);
            let since_start = |name: &str| {
                moment(name)
                    .zip(moment("started_us"))
                    .map(|(at, started)| at - started)
            };
            let compare = |name: &str, seen: Option<Duration>| {
                let (said, seen) = (since_start(name), seen.map(|at| at - joining.opened));
                println!("{target:?} {name}: said {said:?}, seen {seen:?}");
                let is_near =
                    |(said, seen): (Duration, Duration)| said.abs_diff(seen) <= ONE_WAY / 2 + floor;
                assert!(
                    said.zip(seen).is_none_or(is_near),
                    "{target:?} {name}: {said:?} and not {seen:?}"
                );
                assert_eq!(said.is_some(), seen.is_some(), "{name}");
            };
            compare("signal_connected_us", Some(joining.answered));
            compare("dtls_connected_us", Some(joining.keyed));
            compare("first_media_us", joining.first_media);
        }
        histograms_are_the_participants(&report, &lines);
    }
}

/// Asserts that each histogram of joining holds the participants' times, counted from when they
/// were intended to join.
fn histograms_are_the_participants(report: &Report, lines: &[serde_json::Value]) {
    let moments = [
        ("signal_connect", "signal_connected_us"),
        ("signal_join", "signal_joined_us"),
        ("ice", "ice_connected_us"),
        ("dtls", "dtls_connected_us"),
        ("join", "joined_us"),
        ("first_media", "first_media_us"),
    ];
    for (histogram, moment) in moments {
        let took =
            |line: &serde_json::Value| Some(line[moment].as_u64()? - line["intended_us"].as_u64()?);
        let took: Vec<u64> = lines.iter().filter_map(took).collect();
        for (stat, truth) in [("min", took.iter().min()), ("max", took.iter().max())] {
            let (said, truth) = (
                report.micros("session", histogram, stat).expect("measured"),
                *truth.expect("happened"),
            );
            // Histograms keep three significant digits.
            assert!(
                said.abs_diff(truth) <= truth / 500 + 1,
                "{histogram}.{stat} is {said} and ought to be {truth}"
            );
        }
    }
}

/// Tries the conditions one after the other over one network. Returns `None` if there is no network
/// or no server.
fn try_all(test: &str, trials: &[Trial]) -> Option<Vec<String>> {
    let _alone = alone();
    let network = Network::for_test(module_path!(), test, 11)?;
    let before = [
        network.clients.device_counts(),
        network.server.device_counts(),
    ];
    let (mut rows, mut wrong) = (Vec::new(), Vec::new());
    for trial in trials {
        let run = live(&network, *trial)?;
        let checks = run.checks();
        rows.push(run.row(&checks));
        wrong.extend(
            checks
                .iter()
                .filter(|check| !check.holds())
                .map(|check| format!("{trial:?}: {check}")),
        );
    }
    let after = [
        network.clients.device_counts(),
        network.server.device_counts(),
    ];
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(
            (before.rx_dropped, before.tx_dropped),
            (after.rx_dropped, after.tx_dropped),
            "the kernel dropped packets of its own"
        );
    }
    let table = rows.join("\n");
    println!("{HEAD}\n{table}");
    assert!(
        wrong.is_empty(),
        "{} figures are wrong: {wrong:#?}\n{table}",
        wrong.len()
    );
    Some(rows)
}

const HEAD: &str = "| server | loss up / down | delay up / down, ms | jitter, ms | sent, audio / video | lost up | said of it | lost at first, down | residual, as said \
    | one-way p50, us (error) | rtt_stun p50 (error) | rtt_rtcp p50 (error) | floor p99, us | figures right |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|---|";

#[test]
fn real_runs_say_what_the_network_and_the_server_say() {
    let base = |target, up, down| Trial {
        target,
        up,
        down,
        from_the_start: false,
        seconds: 4,
        counters: true,
    };
    let delayed = Conditions {
        jitter: Duration::from_millis(10),
        ..millis(100)
    };
    let quick = Trial {
        counters: false,
        ..base(Target::LiveKit, delayed, delayed)
    };
    let bursts = lossy(
        Loss::Bursts {
            share: 0.1,
            mean: 3.0,
        },
        20,
    );
    let trials = [
        quick,
        base(Target::LiveKit, millis(0), bursts),
        base(Target::LiveKit, lossy(Loss::Random(0.1), 20), millis(20)),
        base(Target::Embedded, bursts, millis(50)),
    ];
    try_all("real_runs_say_what_the_network_and_the_server_say", &trials);
}

#[test]
#[ignore = "ten minutes of runs"]
fn many_real_runs_say_what_the_network_and_the_server_say() {
    let losses = [
        Loss::None,
        Loss::Random(0.05),
        Loss::Bursts {
            share: 0.2,
            mean: 4.0,
        },
    ];
    let mut trials = Vec::new();
    for target in [Target::LiveKit, Target::Embedded] {
        for delay in [0, 100, 300] {
            let mut add = |up, down, from_the_start| {
                trials.push(Trial {
                    target,
                    up,
                    down,
                    from_the_start,
                    seconds: 8,
                    counters: true,
                });
            };
            for loss in losses {
                add(lossy(loss, delay), millis(delay), false);
                if loss != Loss::None {
                    add(millis(delay), lossy(loss, delay), false);
                    add(lossy(loss, delay), lossy(loss, delay), false);
                }
            }
            add(lossy(losses[1], delay), lossy(losses[1], delay), true);
        }
    }
    try_all(
        "many_real_runs_say_what_the_network_and_the_server_say",
        &trials,
    );
}
