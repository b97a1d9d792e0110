//! Every figure against the log of a bad wire, over a grid of conditions, in virtual time. Counts
//! must agree packet for packet, and times within 1 ms or 1 %.
//!
//! `cargo test --test truth` runs a part of the grid. `cargo test --test truth -- --ignored
//! --nocapture` runs all of it, and prints the table in docs/truth.md.

mod account;

use crate::common::relay;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{OnceLock, mpsc};
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use crate::common::pair::{audio, video};
use crate::common::path::{Conditions, Loss};
use crate::common::relay::Relay;
use crate::common::tapped::{Direction, Tapped};
use account::{Delivered, Feedback, Received, Sent, Stream};
use throng::engine::publisher::{MediaSource, Pacing};
use throng::measure::{Histogram, Media, Record};
use throng::sfu::SendMode;
use throng::transport::receive::ReceiveCounts;
use throng::units::Time;

/// Side of the server on which the network is bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    /// Between the publisher and the server.
    Up,
    /// Between the server and the subscriber.
    Down,
    Both,
}

impl Side {
    const ALL: [Side; 3] = [Side::Up, Side::Down, Side::Both];
}

/// One point of the grid: the conditions of the bad side. They hold for media, and for the control
/// packets that go the other way.
#[derive(Clone, Copy, Debug)]
struct Point {
    side: Side,
    conditions: Conditions,
}

/// One figure: the value that was reported, and the value by the log.
struct Check {
    metric: String,
    said: f64,
    truth: f64,
    /// Largest difference that is allowed between them. It is 0 for counts.
    allowed: f64,
}

impl Check {
    fn count(metric: impl fmt::Display, said: u64, truth: u64) -> Check {
        Check {
            metric: metric.to_string(),
            said: said as f64,
            truth: truth as f64,
            allowed: 0.0,
        }
    }

    /// Returns the check of a time in microseconds. It may be wrong by 1 ms, or by 1 % if that is
    /// more.
    fn time(metric: impl fmt::Display, said: f64, truth: f64) -> Check {
        Check {
            metric: metric.to_string(),
            said,
            truth,
            allowed: f64::max(1_000.0, 0.01 * truth),
        }
    }

    fn error(&self) -> f64 {
        (self.said - self.truth).abs()
    }

    fn holds(&self) -> bool {
        self.error() <= self.allowed
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} is {} and ought to be {}",
            self.metric, self.said, self.truth
        )
    }
}

/// Everything that a point showed. Pairs are audio and video.
struct Outcome {
    records: Vec<Record>,
    sent: [Sent; 2],
    /// What the server got, what the publisher was told of its losses, and what the subscriber got.
    uplink: [Received; 2],
    reported_lost: [u64; 2],
    received: [Received; 2],
    delivered: [Delivered; 2],
    /// The server's own account of what it got.
    server: [ReceiveCounts; 2],
    /// Feedback of the publisher and of the subscriber.
    feedback: [Feedback; 2],
    intended: [Vec<Time>; 2],
}

/// Time before the conditions get bad. The first reports give the round trips that the timing of
/// repair depends on.
const WARM_UP: Duration = Duration::from_millis(2_500);

/// Runs a publisher of audio and video, the server, and a subscriber.
fn live(point: Point, time: Duration, seed: u64) -> Outcome {
    static SOURCES: OnceLock<[MediaSource; 2]> = OnceLock::new();
    let mut relay = Relay::over(Tapped::new(seed), 2, SendMode::Plain, false, seed);
    let began = relay.now + relay::TICK;
    let (mut up, mut down, mut tracks) = (Vec::new(), Vec::new(), Vec::new());
    for (source, (clock_rate, rtx)) in SOURCES
        .get_or_init(|| [audio(), video()])
        .iter()
        .zip([(48_000, false), (90_000, true)])
    {
        let track = relay.publish(0, source, Pacing::Paced);
        let ssrc = 0x1000_0000 + track.0 * 16;
        let stream = Stream {
            client: 0,
            direction: Direction::Up,
            ssrc: Ssrc(ssrc),
            rtx_ssrc: rtx.then_some(Ssrc(ssrc + 1)),
            clock_rate,
        };
        up.push(stream);
        let (_, ssrc, rtx_ssrc) = relay.subscribe(1, track, source.kind());
        down.push(Stream {
            client: 1,
            direction: Direction::Down,
            ssrc,
            rtx_ssrc,
            ..stream
        });
        tracks.push(track);
    }
    let gentle = Conditions {
        loss: Loss::None,
        duplication: 0.0,
        ..point.conditions
    };
    set(&mut relay, point.side, gentle);
    relay.run_for(WARM_UP);
    set(&mut relay, point.side, point.conditions);
    relay.run_for(time);
    let records = relay.finish();
    let log = &relay.link.log;
    let sent = [0, 1].map(|kind| account::sent(log, up[kind]));
    let received = [0, 1].map(|kind| account::received(log, down[kind]));
    let intended = |kind: usize, interval: Duration| {
        let frames = 0..sent[kind].frames.len() as u32;
        frames
            .map(|frame| (began + interval * frame).next_whole(Duration::from_millis(1)))
            .collect()
    };
    Outcome {
        uplink: [0, 1].map(|kind| account::received(log, up[kind])),
        reported_lost: [0, 1].map(|kind| account::reported_lost(log, up[kind])),
        delivered: [0, 1]
            .map(|kind| account::delivered(log, down[kind], &sent[kind], &received[kind])),
        server: [0, 1].map(|kind| {
            relay
                .router
                .track_statistics(tracks[kind])
                .expect("a track")[0]
                .counts
        }),
        feedback: [0, 1].map(|client| account::feedback(log, client)),
        intended: [
            intended(0, Duration::from_millis(20)),
            intended(1, Duration::from_nanos(1_000_000_000 / 15)),
        ],
        records,
        sent,
        received,
    }
}

fn set(relay: &mut Relay<Tapped>, bad: Side, conditions: Conditions) {
    for (client, side) in [(0, Side::Up), (1, Side::Down)] {
        for direction in [Direction::Up, Direction::Down] {
            if bad == side || bad == Side::Both {
                relay.link.set(client, direction, conditions);
            }
        }
    }
}

fn checks(outcome: &Outcome) -> Vec<Check> {
    let mut checks = Vec::new();
    let [publisher, subscriber] = &outcome.records[..] else {
        unreachable!("two clients")
    };
    for (kind, name) in ["audio", "video"].into_iter().enumerate() {
        let media = |record: &Record| {
            if kind == 0 {
                record.audio.clone()
            } else {
                record.video.clone()
            }
        };
        checks.extend(sent_checks(
            name,
            &media(publisher),
            &outcome.sent[kind],
            outcome.reported_lost[kind],
        ));
        checks.extend(received_checks(
            name,
            &media(subscriber),
            &outcome.received[kind],
        ));
        checks.extend(frame_checks(
            name,
            &media(subscriber),
            &outcome.delivered[kind],
            &outcome.intended[kind],
        ));
        checks.extend(server_checks(
            name,
            &outcome.server[kind],
            &outcome.uplink[kind],
        ));
    }
    for (record, feedback, who) in [
        (publisher, &outcome.feedback[0], "publisher"),
        (subscriber, &outcome.feedback[1], "subscriber"),
    ] {
        let session = &record.session;
        let mut count = |metric: &str, said, truth| {
            checks.push(Check::count(
                format_args!("session.{metric} ({who})"),
                said,
                truth,
            ))
        };
        count("nacks_sent", session.nacks_sent, feedback.nacks_sent);
        count(
            "nacks_received",
            session.nacks_received,
            feedback.nacks_received,
        );
        count("plis_sent", session.plis_sent, feedback.plis_sent);
        count(
            "plis_received",
            session.plis_received,
            feedback.plis_received,
        );
        count(
            "packets_rejected",
            session.packets_rejected,
            feedback.replayed,
        );
        count(
            "wire_bytes_sent",
            session.wire_bytes_sent,
            feedback.wire_bytes_sent,
        );
        count(
            "wire_bytes_received",
            session.wire_bytes_received,
            feedback.wire_bytes_received,
        );
        count(
            "rtt_rtcp.count",
            session.rtt_rtcp.count(),
            feedback.round_trips.len() as u64,
        );
        count(
            "rtt_stun.count",
            session.rtt_stun.count(),
            feedback.checks.len() as u64,
        );
        checks.extend(times(
            &format!("session.rtt_rtcp ({who})"),
            &session.rtt_rtcp,
            &feedback.round_trips,
        ));
        checks.extend(times(
            &format!("session.rtt_stun ({who})"),
            &session.rtt_stun,
            &feedback.checks,
        ));
    }
    checks
}

fn sent_checks(kind: &str, said: &Media, sent: &Sent, reported_lost: u64) -> Vec<Check> {
    let count =
        |metric: &str, said, truth| Check::count(format_args!("{kind}.{metric}"), said, truth);
    vec![
        count("packets_sent", said.packets_sent, sent.packets),
        count("bytes_sent", said.bytes_sent, sent.bytes),
        count("rtx_sent", said.rtx_sent, sent.resent),
        count("frames_sent", said.frames_sent, sent.frames.len() as u64),
        count(
            "key_frames_sent",
            said.key_frames_sent,
            sent.frames.iter().filter(|frame| frame.key).count() as u64,
        ),
        count(
            "uplink_packets_lost",
            said.uplink_packets_lost,
            reported_lost,
        ),
    ]
}

fn received_checks(kind: &str, said: &Media, truth: &Received) -> Vec<Check> {
    let count =
        |metric: &str, said, truth| Check::count(format_args!("{kind}.{metric}"), said, truth);
    let mut checks = vec![
        count("packets_received", said.packets_received, truth.packets),
        count("bytes_received", said.bytes_received, truth.bytes),
        count("rtx_received", said.rtx_received, truth.rtx),
        count(
            "packets_lost_network",
            said.packets_lost_network,
            truth.lost_network,
        ),
        count("packets_repaired", said.packets_repaired, truth.repaired),
        count("packets_lost", said.packets_lost, truth.lost),
        count("packets_duplicate", said.packets_duplicate, truth.duplicate),
        count("packets_reordered", said.packets_reordered, truth.reordered),
        count(
            "jitter.count",
            said.jitter.count(),
            truth.jitter.len() as u64,
        ),
    ];
    // In heavy loss, groups of gaps share a time and their requests. So the last gap of a group may
    // be given up one request too early or too late.
    let repairs = Check::count(
        format_args!("{kind}.loss_to_repair.count"),
        said.loss_to_repair.count(),
        truth.loss_to_repair.len() as u64,
    );
    checks.push(Check {
        allowed: f64::max(2.0, 0.01 * repairs.truth),
        ..repairs
    });
    let shared = times(
        &format!("{kind}.loss_to_repair"),
        &said.loss_to_repair,
        &truth.loss_to_repair,
    );
    checks.extend(
        shared
            .into_iter()
            .filter(|check| !check.metric.ends_with(".max"))
            .map(|check| Check {
                allowed: f64::max(check.allowed, 20_000.0),
                ..check
            }),
    );
    checks.extend(times(
        &format!("{kind}.jitter"),
        &said.jitter,
        &truth.jitter,
    ));
    checks
}

fn frame_checks(kind: &str, said: &Media, truth: &Delivered, intended: &[Time]) -> Vec<Check> {
    let count =
        |metric: &str, said, truth| Check::count(format_args!("{kind}.{metric}"), said, truth);
    let latencies: Vec<Duration> = truth
        .frames
        .iter()
        .map(|(frame, at)| at.since(intended[*frame]))
        .collect();
    let late = latencies
        .iter()
        .filter(|latency| **latency > Duration::from_millis(400))
        .count() as u64;
    let mut checks = vec![
        count("frames_expected", said.frames_expected, truth.expected),
        count(
            "frames_delivered",
            said.frames_delivered,
            truth.frames.len() as u64,
        ),
        count("frames_late", said.frames_late, late),
        count("frames_duplicate", said.frames_duplicate, 0),
        count("tracks_live", said.tracks_live, 1),
        count(
            "one_way_latency.count",
            said.one_way_latency.count(),
            latencies.len() as u64,
        ),
    ];
    checks.extend(times(
        &format!("{kind}.one_way_latency"),
        &said.one_way_latency,
        &latencies,
    ));
    checks
}

/// Checks what the embedded SFU counts of what it got.
fn server_checks(kind: &str, said: &ReceiveCounts, truth: &Received) -> Vec<Check> {
    let count = |metric: &str, said, truth| {
        Check::count(format_args!("server.{metric} ({kind})"), said, truth)
    };
    vec![
        count("received", said.received, truth.packets),
        count("lost_network", said.lost_network, truth.lost_network),
        count("repaired", said.repaired, truth.repaired),
        count("lost", said.lost, truth.lost),
        count("reordered", said.reordered, truth.reordered),
    ]
}

/// Checks minimum, median, mean and maximum.
fn times(metric: &str, said: &Histogram, truth: &[Duration]) -> Vec<Check> {
    let mut micros: Vec<f64> = truth
        .iter()
        .map(|time| time.as_nanos() as f64 / 1e3)
        .collect();
    micros.sort_by(f64::total_cmp);
    let (Some(least), Some(most), Some(said_least)) = (micros.first(), micros.last(), said.min())
    else {
        return Vec::new();
    };
    let of = |what: &str, said: f64, truth: f64| {
        Check::time(format_args!("{metric}.{what}"), said, truth)
    };
    vec![
        of("min", said_least as f64, *least),
        of(
            "p50",
            said.quantile(0.5).unwrap_or(0) as f64,
            micros[(micros.len() - 1) / 2],
        ),
        of(
            "mean",
            said.mean().unwrap_or(0.0),
            micros.iter().sum::<f64>() / micros.len() as f64,
        ),
        of("max", said.max().unwrap_or(0) as f64, *most),
    ]
}

/// Returns the grid: for each side and each loss, each delay, each jitter, and duplication.
fn grid() -> Vec<Point> {
    const MILLIS: fn(u64) -> Duration = Duration::from_millis;
    let shares = [0.001, 0.01, 0.05, 0.1, 0.2, 0.3];
    let random = shares.map(Loss::Random);
    let bursts = shares.map(|share| Loss::Bursts { share, mean: 4.0 });
    let losses = [Loss::None].into_iter().chain(random).chain(bursts);
    let mut grid = Vec::new();
    for side in Side::ALL {
        for loss in losses.clone() {
            let mut add = |conditions| grid.push(Point { side, conditions });
            for delay in [0, 20, 100, 300].map(MILLIS) {
                add(Conditions {
                    loss,
                    delay,
                    ..Conditions::default()
                });
            }
            for (jitter, reorder, duplication) in [
                (10, false, 0.0),
                (10, true, 0.0),
                (50, false, 0.0),
                (50, true, 0.0),
                (0, false, 0.05),
                (50, true, 0.05),
            ] {
                add(Conditions {
                    loss,
                    delay: MILLIS(20),
                    jitter: MILLIS(jitter),
                    reorder,
                    duplication,
                    ..Conditions::default()
                });
            }
        }
    }
    grid
}

/// Returns a row of the table in docs/truth.md.
fn row(point: &Point, outcome: &Outcome, checks: &[Check]) -> String {
    let Conditions {
        loss,
        delay,
        jitter,
        reorder,
        duplication,
        ..
    } = point.conditions;
    let loss = match loss {
        Loss::None => "0".to_owned(),
        Loss::Random(share) => format!("{} %", share * 100.0),
        Loss::Bursts { share, mean } => format!("{} % in {mean}s", share * 100.0),
    };
    let both = |of: &dyn Fn(usize) -> u64| format!("{} / {}", of(0), of(1));
    let worst = checks
        .iter()
        .filter(|check| check.allowed > 0.0)
        .max_by(|a, b| a.error().total_cmp(&b.error()));
    format!(
        "| {} | {loss} | {} | {}{} | {} | {} | {} | {} | {} | {} | {} | {} |",
        format!("{:?}", point.side).to_lowercase(),
        delay.as_millis(),
        jitter.as_millis(),
        if reorder { " reordering" } else { "" },
        duplication * 100.0,
        both(&|kind| outcome.sent[kind].packets),
        both(&|kind| outcome.uplink[kind].lost_network),
        both(&|kind| outcome.received[kind].lost_network),
        both(&|kind| outcome.received[kind].repaired),
        both(&|kind| outcome.received[kind].lost),
        format_args!(
            "{} of {}",
            checks.iter().filter(|check| check.holds()).count(),
            checks.len()
        ),
        worst.map_or_else(
            || "-".to_owned(),
            |worst| format!("{:.0} us of {:.0}", worst.error(), worst.truth)
        ),
    )
}

/// Tries points, two at a time, and returns what did not hold.
fn try_all(
    points: &[Point],
    time: Duration,
    mut each: impl FnMut(usize, &Outcome, &[Check]),
) -> Vec<String> {
    let next = AtomicUsize::new(0);
    let (done, outcomes) = mpsc::channel();
    let mut wrong = Vec::new();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let (done, next) = (done.clone(), &next);
            scope.spawn(move || {
                while let Some((at, point)) = Some(next.fetch_add(1, Ordering::Relaxed))
                    .and_then(|at| Some((at, points.get(at)?)))
                {
                    let outcome = live(*point, time, 1 + at as u64);
                    let checks = checks(&outcome);
                    done.send((at, outcome, checks)).expect("somebody listens");
                }
            });
        }
        drop(done);
        for (at, outcome, checks) in outcomes {
            let failed = checks.iter().filter(|check| !check.holds());
            wrong.extend(failed.map(|check| format!("{:?}, seed {}: {check}", points[at], at + 1)));
            each(at, &outcome, &checks);
        }
    });
    wrong
}

#[test]
fn over_bad_networks_each_figure_is_the_logs() {
    let points = [
        (Side::Both, Loss::None, 0, 0, 0.0),
        (Side::Both, Loss::Random(0.05), 20, 0, 0.0),
        (Side::Up, Loss::Random(0.1), 100, 10, 0.0),
        (
            Side::Down,
            Loss::Bursts {
                share: 0.1,
                mean: 4.0,
            },
            20,
            50,
            0.02,
        ),
        (
            Side::Both,
            Loss::Bursts {
                share: 0.3,
                mean: 4.0,
            },
            20,
            10,
            0.05,
        ),
        (Side::Both, Loss::None, 300, 50, 0.0),
    ];
    let points = points.map(|(side, loss, delay, jitter, duplication)| Point {
        side,
        conditions: Conditions {
            loss,
            delay: Duration::from_millis(delay),
            jitter: Duration::from_millis(jitter),
            reorder: true,
            duplication,
            ..Conditions::default()
        },
    });
    let mut figures = 0;
    let wrong = try_all(&points, Duration::from_secs(4), |_, _, checks| {
        figures += checks.len()
    });
    assert!(
        wrong.is_empty(),
        "{} of {figures} figures are wrong: {wrong:#?}",
        wrong.len()
    );
    assert!(figures > 100 * points.len(), "{figures}");
}

#[test]
#[ignore = "the whole grid takes minutes"]
fn over_the_whole_grid_each_figure_is_the_logs() {
    let points = grid();
    let mut rows = vec![String::new(); points.len()];
    let wrong = try_all(&points, Duration::from_secs(15), |at, outcome, checks| {
        rows[at] = row(&points[at], outcome, checks)
    });
    println!(
        "| bad side | loss | delay, ms | jitter, ms | copies, % | sent, audio / video | lost up | missing on arrival | repaired | residual | figures right | largest error of a time |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    rows.iter().for_each(|row| println!("{row}"));
    assert!(
        wrong.is_empty(),
        "{} figures are wrong: {wrong:#?}",
        wrong.len()
    );
}
