//! `throng calibrate`: measures what this host can generate, against the embedded SFU with plain
//! sends, in under two minutes.
//!
//! Three numbers are raised until something breaks: packets received, joins a second, participants.
//! Every point is an ordinary run with an ordinary verdict, and its command line is part of the
//! result. Generator and SFU share the host, so the largest point that held is a lower bound of
//! what the generator bears with the SFU elsewhere. The figure for an SFU elsewhere is derived from
//! the generator's CPU time, and labelled so.

pub mod cache;
mod search;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use crate::engine::health::WORKER_BUSY_MAX;
use crate::preflight::{self, Host};
use crate::report::{Nearness, Outcome, VERSION, Verdict, judge};
use crate::run::{self, Clips, Embedded, RunSpec};
use crate::words::{number, wrapped};
use cache::HostId;
use search::{CalibrationSearch, PointHeld};

pub const SCHEMA: &str = "throng-calibration/1";

pub const GREETING: &str = "throng calibrate: this host against its own embedded SFU, one call a packet;\nunder two minutes, and the truer the less else runs here";

/// Result of a calibration: what this host bears.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Calibration {
    pub schema: String,
    pub version: String,
    /// Seconds since 1970, by this host's clock.
    pub calibrated_at_unix: u64,
    pub host: HostId,
    pub engine_threads: usize,
    pub sfu_routers: usize,
    /// CPU time of an engine thread per packet, for all its work, at the largest point of `packets`
    /// that held.
    pub us_per_packet: Option<f64>,
    /// Packets that one engine thread would bear by that figure, when it is as busy as a valid run
    /// allows. This is not measured, because the SFU shares the host.
    pub packets_per_second_per_thread: Option<f64>,
    /// RTP packets received a second, over all engine threads.
    pub packets: Ceiling,
    pub joins: Ceiling,
    /// Participants in the rooms at the same time, each receiving one audio track.
    pub participants: Ceiling,
}

/// Largest value of one number, and why it went no further.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Ceiling {
    /// Largest value that held; `None` if none did.
    pub held: Option<f64>,
    /// Command line of that point.
    pub command: Option<String>,
    pub limit: CalibrationLimit,
    /// Reasons why it did not go further.
    pub reasons: Vec<String>,
}

/// Part that broke first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CalibrationLimit {
    /// The generator: the run was INVALID.
    Generator,
    /// The embedded SFU, on the CPUs that the generator left to it: the run was VALID and failed.
    Sfu,
    /// A limit of the host that is known before a run: files, ports, memory.
    Host,
    /// Nothing broke: the time was over.
    #[default]
    Time,
}

/// A number that is raised point by point.
struct Question {
    name: &'static str,
    unit: &'static str,
    start: u32,
    /// Its share of the total time.
    share: f64,
    /// Joins a second and participants of a point. They give its length in advance.
    size: fn(u32) -> (f64, f64),
    hold: Duration,
    arguments: fn(u32, u32) -> Vec<String>,
    figure: fn(u32, &Outcome) -> f64,
}

/// Longest duration of a calibration. A point that would exceed it is not begun.
pub const PATIENCE: Duration = Duration::from_secs(112);

/// Fastest rate at which a small host admits participants without being disturbed. The figures of a
/// point are measured after all have joined.
const JOINS_PER_SECOND: f64 = 400.0;
/// Time of a run apart from joining and holding: draining, leaving, starting the SFU.
const AROUND: Duration = Duration::from_millis(2_300);
/// Seconds of joining at a point of [`JOINS`]. After that the joined participants must hold.
const JOINING_SECONDS: u32 = 2;

const PACKETS: Question = Question {
    name: "packets",
    unit: "packets/s",
    start: 100,
    share: 0.4,
    size: |subscribers| (JOINS_PER_SECOND, f64::from(subscribers)),
    hold: Duration::from_secs(2),
    arguments: |subscribers, rooms| {
        arguments(&[
            ("--room-count", &rooms.to_string()),
            ("--publishers", "0"),
            ("--video-publishers", "1"),
            ("--subscribers", &subscribers.to_string()),
            (
                "--num-per-second",
                &(JOINS_PER_SECOND * f64::from(rooms)).to_string(),
            ),
            ("--duration", "2s"),
        ])
        .into_iter()
        .chain(["--no-simulcast".to_owned()])
        .collect()
    },
    figure: |_, outcome| {
        let step = outcome.steps.first().unwrap_or(&outcome.totals);
        let packets = step.record.audio.packets_received + step.record.video.packets_received;
        (packets as f64 / step.seconds.max(0.001)).round()
    },
};

const JOINS: Question = Question {
    name: "joins",
    unit: "joins/s",
    start: 100,
    share: 0.27,
    size: |rate| (f64::from(rate), f64::from(rate * JOINING_SECONDS)),
    hold: Duration::from_secs(1),
    arguments: |rate, rooms| {
        arguments(&[
            ("--room-count", &rooms.to_string()),
            ("--publishers", "1"),
            (
                "--subscribers",
                &(rate * JOINING_SECONDS / rooms).max(1).to_string(),
            ),
            ("--num-per-second", &rate.to_string()),
            ("--duration", "1s"),
            // A larger p99 means that joins pile up.
            ("--threshold", "session.join.p99<1s"),
        ])
    },
    figure: |rate, _| f64::from(rate),
};

const PARTICIPANTS: Question = Question {
    name: "participants",
    unit: "participants",
    start: 500,
    share: 0.33,
    size: |subscribers| (JOINS_PER_SECOND, f64::from(subscribers)),
    hold: Duration::from_secs(2),
    arguments: |subscribers, rooms| {
        arguments(&[
            ("--room-count", &rooms.to_string()),
            ("--publishers", "1"),
            ("--subscribers", &subscribers.to_string()),
            (
                "--num-per-second",
                &(JOINS_PER_SECOND * f64::from(rooms)).to_string(),
            ),
            ("--duration", "2s"),
        ])
    },
    figure: |_, outcome| f64::from(outcome.totals.participants),
};

fn arguments(flags: &[(&str, &str)]) -> Vec<String> {
    flags
        .iter()
        .filter(|flag| **flag != ("--room-count", "1"))
        .flat_map(|(flag, value)| [(*flag).to_owned(), (*value).to_owned()])
        .collect()
}

/// Formats the arguments for a shell.
fn command_line(arguments: &[String]) -> String {
    let quoted = arguments.iter().map(|argument| {
        if argument.contains('<') {
            format!("'{argument}'")
        } else {
            argument.clone()
        }
    });
    format!("throng {}", quoted.collect::<Vec<_>>().join(" "))
}

/// Measures what this host bears, within `patience`. `progress` gets one line for each point.
///
/// # Errors
/// A run does not start or is interrupted. Half a calibration is not kept.
pub fn calibrate(
    host: &Host,
    threads: Option<usize>,
    patience: Duration,
    parse: ParseRun,
    mut progress: impl FnMut(&str),
) -> Result<Calibration> {
    let mut bench = Bench {
        host,
        threads,
        patience,
        parse,
        // A room lives on one router, so there are as many rooms as there may be routers.
        rooms: (host.usable_cpus() / 4).max(1) as u32,
        progress: &mut progress,
    };
    let (joins, _) = bench.ask(&JOINS)?;
    let (packets, largest) = bench.ask(&PACKETS)?;
    let (participants, _) = bench.ask(&PARTICIPANTS)?;
    let us_per_packet = largest
        .as_ref()
        .and_then(|outcome| outcome.engine.us_per_packet);
    Ok(Calibration {
        schema: SCHEMA.to_owned(),
        version: VERSION.to_owned(),
        calibrated_at_unix: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs(),
        host: HostId::read(host.usable_cpus()),
        engine_threads: largest.as_ref().map_or(0, |outcome| outcome.engine.threads),
        sfu_routers: largest
            .as_ref()
            .and_then(|outcome| outcome.sfu.as_ref())
            .map_or(0, |sfu| sfu.routers),
        us_per_packet,
        packets_per_second_per_thread: us_per_packet.map(|us| (WORKER_BUSY_MAX * 1e6 / us).round()),
        packets,
        joins,
        participants,
    })
}

/// Parses a command line into a run. The result shows the same command line.
pub type ParseRun<'p> = &'p dyn Fn(Vec<String>) -> Result<Box<RunSpec>>;

struct Bench<'a> {
    host: &'a Host,
    threads: Option<usize>,
    patience: Duration,
    parse: ParseRun<'a>,
    rooms: u32,
    progress: &'a mut dyn FnMut(&str),
}

/// Result of one point.
enum PointOutcome {
    Ran(Box<Outcome>),
    /// The host is too small for it, which is known before it starts.
    Refused(Vec<String>),
}

impl Bench<'_> {
    fn ask(&mut self, question: &Question) -> Result<(Ceiling, Option<Box<Outcome>>)> {
        let started = Instant::now();
        let (mut ceiling, mut largest, mut clips) = (Ceiling::default(), None, None);
        let mut search = CalibrationSearch::from(question.start);
        while let Some(point) = search.next() {
            if started.elapsed() + question.length(point) > self.patience.mul_f64(question.share) {
                break;
            }
            let arguments = (question.arguments)(point, self.rooms);
            let command = command_line(&arguments);
            let outcome = match self.run(arguments, &mut clips)? {
                PointOutcome::Ran(outcome) => outcome,
                PointOutcome::Refused(reasons) => {
                    (ceiling.limit, ceiling.reasons) = (CalibrationLimit::Host, reasons);
                    break;
                }
            };
            let (judgement, figure) = (judge(&outcome), (question.figure)(point, &outcome));
            let (held, limit) = match judgement.verdict {
                Verdict::Pass => (PointHeld::Yes, ceiling.limit),
                Verdict::Invalid => (PointHeld::No, CalibrationLimit::Generator),
                Verdict::Fail => (PointHeld::No, CalibrationLimit::Sfu),
                Verdict::Partial => bail!("interrupted: nothing is kept of this calibration"),
            };
            let word = if held == PointHeld::Yes {
                "held"
            } else {
                judgement.verdict.name()
            };
            (self.progress)(&format!(
                "  {:<13}{:>9} {:<13}{word}",
                question.name,
                number(figure as u64),
                question.unit
            ));
            search.take(point, held);
            match held {
                PointHeld::Yes => {
                    (ceiling.held, ceiling.command) = (Some(figure), Some(command));
                    largest = Some(outcome);
                    // The failure suspected before did not occur again.
                    if !search.has_broken() {
                        (ceiling.limit, ceiling.reasons) = (CalibrationLimit::Time, Vec::new());
                    }
                }
                PointHeld::No => (ceiling.limit, ceiling.reasons) = (limit, judgement.reasons),
            }
        }
        Ok((ceiling, largest))
    }

    fn run(&self, arguments: Vec<String>, clips: &mut Option<Clips>) -> Result<PointOutcome> {
        let mut run = (self.parse)(arguments)?;
        let resources = preflight::resources(&run.plan, self.host, self.threads);
        let findings = preflight::check(&run.plan, self.host, &resources);
        if !findings.refusals.is_empty() {
            return Ok(PointOutcome::Refused(findings.refusals));
        }
        // All points of a question use the same media.
        let clips = match clips {
            Some(clips) => clips.clone(),
            None => clips
                .insert(Clips::generate(&run.plan, resources.threads, |_| {})?)
                .clone(),
        };
        let embedded = Embedded::start_for(&mut run, &resources)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(resources.signalling_threads())
            .enable_all()
            .build()?;
        let outcome = runtime.block_on(async {
            run::settle_connection(&mut run.plan, &run.gateway).await;
            run::run(&run, &resources, clips, |_| {}).await
        });
        let sfu = embedded.map(Embedded::stop);
        let mut outcome = outcome?;
        outcome.sfu = sfu;
        Ok(PointOutcome::Ran(Box::new(outcome)))
    }
}

impl Question {
    fn length(&self, point: u32) -> Duration {
        let (rate, participants) = (self.size)(point);
        Duration::from_secs_f64(participants / rate) + self.hold + AROUND
    }
}

impl Calibration {
    /// Returns how near a run on this host came to the ceiling, by the packets of its busiest
    /// second. `None` if packets were not calibrated or not measured.
    pub fn nearness(&self, outcome: &Outcome) -> Option<Nearness> {
        let ceiling = self.packets_per_second_per_thread? * outcome.engine.threads as f64;
        let per_second = outcome
            .series
            .iter()
            .map(|second| second.packets_sent_per_second + second.packets_received_per_second);
        let peak = per_second.fold(None, |peak: Option<f64>, rate| {
            Some(peak.map_or(rate, |peak| peak.max(rate)))
        })?;
        Some(Nearness {
            calibrated_at: Duration::from_secs(self.calibrated_at_unix),
            packets_per_second_peak: peak,
            packets_per_second_ceiling: ceiling,
        })
    }
}

/// Formats the calibration as JSON, indented, with a newline at its end.
pub fn json(calibration: &Calibration) -> String {
    let mut text = serde_json::to_string_pretty(calibration).expect("plain data serialises");
    text.push('\n');
    text
}

/// Formats the calibration as text of 80 columns.
pub fn text(calibration: &Calibration) -> String {
    let (packets, joins, participants) = (
        &calibration.packets,
        &calibration.joins,
        &calibration.participants,
    );
    let mut text = host_rows(calibration);
    text.push_str(&ceiling_rows("Packets", " packets/s received", packets));
    text.push_str(&by_cpu(calibration));
    text.push_str(&ceiling_rows("Joins", " joins/s", joins));
    text.push_str(&ceiling_rows(
        "Participants",
        " at once, one audio track each",
        participants,
    ));
    text.push_str("Again, the largest that held:\n");
    for ceiling in [packets, joins, participants] {
        ceiling
            .command
            .iter()
            .for_each(|command| text.push_str(&pasteable(command)));
    }
    text
}

fn row(label: &str, value: &str) -> String {
    format!("{label:<13}{value}\n")
}

fn host_rows(calibration: &Calibration) -> String {
    let host = &calibration.host;
    let processor = if host.processor.is_empty() {
        "unknown processor"
    } else {
        &host.processor
    };
    let threads = format!(
        "engine threads: {}, embedded SFU's routers: {}",
        calibration.engine_threads, calibration.sfu_routers
    );
    let host = format!("{processor}, {} CPUs, Linux {}", host.cpus, host.kernel);
    row("Host", &host) + &row("", &threads)
}

fn ceiling_rows(label: &str, unit: &str, ceiling: &Ceiling) -> String {
    let held = ceiling.held.map_or_else(
        || "nothing held".to_owned(),
        |held| format!("{}{unit}", number(held as u64)),
    );
    row(label, &held) + &wrapped(&ceiling.what_broke(), 13)
}

/// Returns what an engine thread's CPU time says about packets; empty if it is not known.
fn by_cpu(calibration: &Calibration) -> String {
    let known = calibration
        .us_per_packet
        .zip(calibration.packets_per_second_per_thread);
    known.map_or_else(String::new, |(us, bears)| {
        let line = format!(
            "by its CPU time an engine thread bears {} packets/s where the SFU is elsewhere ({us:.2} us each, {:.0} % busy)",
            number(bears as u64),
            WORKER_BUSY_MAX * 1e2
        );
        wrapped(&line, 13)
    })
}

/// Breaks a command into lines of at most 80 columns that a shell reads as one.
fn pasteable(command: &str) -> String {
    const DEEPER: &str = "  ";
    let lines = wrapped(command, 2 + DEEPER.len());
    let lines: Vec<&str> = lines
        .lines()
        .map(|line| line.strip_prefix(DEEPER).unwrap_or(line))
        .collect();
    format!("{}\n", lines.join(" \\\n"))
}

impl Ceiling {
    fn what_broke(&self) -> String {
        let reason = self
            .reasons
            .first()
            .map(|reason| format!(": {reason}"))
            .unwrap_or_default();
        match self.limit {
            CalibrationLimit::Generator => format!("then the generator was the limit{reason}"),
            CalibrationLimit::Sfu => format!("then the embedded SFU was the limit{reason}"),
            CalibrationLimit::Host => format!("then this host has no room{reason}"),
            CalibrationLimit::Time => "more was not tried, for want of time".to_owned(),
        }
    }
}

/// Stores the calibration for later runs, and returns the path to show.
///
/// # Errors
/// There is no place to store it, or it cannot be written.
pub fn keep(calibration: &Calibration, env: &dyn Fn(&str) -> Option<String>) -> Result<String> {
    let path = cache::path(env)
        .ok_or_else(|| anyhow!("no place to keep the calibration: set HOME or XDG_CACHE_HOME"))?;
    cache::write(&path, calibration)
        .map_err(|error| anyhow!("cannot keep the calibration in {}: {error}", path.display()))?;
    Ok(path.display().to_string())
}
