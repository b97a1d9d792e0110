//! Decides whether the load generator was the limit: the host's own timer floor, what the engine
//! saw of itself, and the limits beyond which a run is INVALID.
//!
//! Limits over the whole run are relative to the floor where the host may be noisy. Limits over
//! each second are absolute, because a stall of the whole process stops the floor thread too, and a
//! percentile over a long run hides it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::worker::TickGrid;
use crate::measure::second::Second;
use crate::measure::stalls::{Cause, STALL_MIN, Stall, StillSpan, union};
use crate::measure::{Histogram, Record};
use crate::units::{Epoch, Time};

/// Limit of tick lateness at the 99th percentile. Later ticks, if they are well above the host's
/// floor, show in every latency that we report.
const TICK_LATE_P99_MAX: Duration = Duration::from_millis(10);
/// Factor by which ticks must exceed the host's floor to count against us. A host whose bare timer
/// is late itself is noisy, not overloaded by us.
const FLOOR_FACTOR: u64 = 3;
/// Limit of send lag at the 99th percentile. Media that left later was not the load that the plan
/// describes.
const SEND_LAG_P99_MAX: Duration = Duration::from_millis(20);
/// Maximum share of frames that were never sent because their slot had passed. The load was that
/// much less than planned. One hiccup of 50 ms in ten seconds is below this limit.
const SLOTS_SKIPPED_SHARE_MAX: f64 = 0.005;
/// Minimum number of skipped slots. Fewer are a hiccup, not a lack of load, however little there
/// was to send.
const SLOTS_SKIPPED_MIN: u64 = 5;
/// Maximum share of packets that arrived at this host and were dropped by it.
const HOST_DROPS_SHARE_MAX: f64 = 0.0005;
/// Maximum busy share of a worker. A busier worker has no room for a burst.
pub const WORKER_BUSY_MAX: f64 = 0.9;
/// Maximum time that an engine thread may stand still in any second of the run, in stalls of
/// [`STALL_MIN`] and more. It is a tenth: one frame in ten of that second then left late because of
/// us. Healthy virtual machines are stopped for some ten ms now and then; such stalls are reported,
/// but are no reason for INVALID.
const STILL_MAX: Duration = Duration::from_millis(100);

/// The floor thread wakes once in this many ticks. A wake-up costs some 30 us; a hundred a second
/// give enough data at no cost worth mentioning.
const FLOOR_TICKS: u32 = 10;

/// A bare thread that only wakes up, to measure how late this host wakes any thread.
pub struct FloorThread {
    stop: Arc<AtomicBool>,
    since: Arc<Mutex<FloorSince>>,
    late: Arc<Mutex<Histogram>>,
    thread: Option<JoinHandle<()>>,
}

/// Observations of the floor thread since the last call of [`FloorThread::take`].
#[derive(Default)]
pub struct FloorSince {
    /// `None` if it has not woken.
    pub late_max: Option<Duration>,
    /// Wake-ups that were late by [`STALL_MIN`] or more.
    pub gaps: Vec<StillSpan>,
}

impl FloorThread {
    pub fn start(epoch: Epoch) -> io::Result<FloorThread> {
        let (stop, since) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(Mutex::new(FloorSince::default())),
        );
        let all_late = Arc::new(Mutex::new(Histogram::default()));
        let (stopped, seen, floor) = (stop.clone(), since.clone(), all_late.clone());
        let thread = std::thread::Builder::new()
            .name("floor".into())
            .spawn(move || {
                let mut beat = TickGrid::start(epoch);
                while !stopped.load(Ordering::Relaxed) {
                    let (now, late, _) = beat.wait(FLOOR_TICKS);
                    floor
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .record(late);
                    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                    seen.late_max = seen.late_max.max(Some(late));
                    if late >= STALL_MIN {
                        seen.gaps.push(StillSpan {
                            from: now - late,
                            to: now,
                        });
                    }
                }
            })?;
        Ok(FloorThread {
            stop,
            since,
            late: all_late,
            thread: Some(thread),
        })
    }

    /// Returns a floor thread that measures nothing.
    pub fn idle() -> FloorThread {
        FloorThread {
            stop: Arc::default(),
            since: Arc::default(),
            late: Arc::default(),
            thread: None,
        }
    }

    pub fn take(&self) -> FloorSince {
        std::mem::take(&mut self.since.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns how late the thread woke, since its start.
    pub fn so_far(&self) -> Histogram {
        self.late
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub fn finish(mut self) -> Histogram {
        self.stop.store(true, Ordering::Relaxed);
        // If the thread panicked, what it measured until then is still used.
        let _ = self.thread.take().map(JoinHandle::join);
        self.so_far()
    }
}

/// Data from which the generator is judged.
pub struct Evidence<'a> {
    pub record: &'a Record,
    pub floor: &'a Histogram,
    /// Datagrams that our own sockets dropped.
    pub host_drops: u64,
    /// The busiest worker's share of its core while media flowed.
    pub busiest_worker: f64,
    /// The server under test runs on this host as well.
    pub server_is_here: bool,
    /// One row a second. If empty, only the run as a whole is judged.
    pub seconds: &'a [Second],
    /// Late beats of all engine threads.
    pub gaps: &'a [StillSpan],
    /// The result of [`super::blame::stalls`].
    pub stalls: &'a [Stall],
}

/// Returns the reasons why the generator was the limit, each with what to do; empty if it was not.
pub fn reasons(evidence: &Evidence<'_>) -> Vec<String> {
    let engine = &evidence.record.engine;
    let frames = evidence.record.audio.frames_sent + evidence.record.video.frames_sent;
    let packets = evidence.record.audio.packets_received + evidence.record.video.packets_received;
    let mut reasons = still_seconds(evidence);
    let overall = [
        late_ticks(evidence),
        late_sends(evidence),
        above(engine.send_slots_skipped, frames + engine.send_slots_skipped, SLOTS_SKIPPED_SHARE_MAX)
            .filter(|_| engine.send_slots_skipped >= SLOTS_SKIPPED_MIN)
            .map(|share| {
                format!(
                    "{} frames ({share:.2} %) were never sent: their slot had passed (limit {:.1} %{}); fewer participants a host, or more cores",
                    engine.send_slots_skipped,
                    SLOTS_SKIPPED_SHARE_MAX * 1e2,
                    rows_where(evidence.seconds, |second| second.frames_skipped > 0)
                )
            }),
        above(engine.send_errors, engine.packets_processed, HOST_DROPS_SHARE_MAX).map(|share| {
            format!(
                "this host had no room to send {} of our datagrams ({share:.2} %, limit {:.2} %): raise net.core.wmem_default, or use more hosts",
                engine.send_errors,
                HOST_DROPS_SHARE_MAX * 1e2
            )
        }),
        above(evidence.host_drops, packets + evidence.host_drops, HOST_DROPS_SHARE_MAX).map(|share| {
            format!(
                "this host dropped {} datagrams ({share:.2} %) that had arrived{}: raise net.core.rmem_max or use more hosts",
                evidence.host_drops,
                rows_where(evidence.seconds, |second| second.drops.sockets > Some(0))
            )
        }),
        (evidence.busiest_worker > WORKER_BUSY_MAX).then(|| {
            format!(
                "an engine thread was busy {:.0} % of the time (limit {:.0} %): use more cores or hosts",
                evidence.busiest_worker * 1e2,
                WORKER_BUSY_MAX * 1e2
            )
        }),
    ];
    reasons.extend(overall.into_iter().flatten());
    reasons
}

/// Returns one reason per cause for the seconds in which the engine stood still for too long. The
/// floor excuses nothing here.
fn still_seconds(evidence: &Evidence<'_>) -> Vec<String> {
    let mut by_cause: Vec<(Cause, Vec<u64>, Duration)> = Vec::new();
    for (second, still) in stillness(evidence.gaps) {
        if still < STILL_MAX {
            continue;
        }
        let (from, to) = (second as f64, (second + 1) as f64);
        let overlap = |stall: &Stall| stall.until.min(to) - stall.at.max(from);
        let ours = evidence
            .stalls
            .iter()
            .filter(|stall| stall.cause != Cause::Silence && overlap(stall) > 0.0);
        let cause = ours
            .max_by(|a, b| overlap(a).total_cmp(&overlap(b)))
            .map_or(Cause::Engine, |stall| stall.cause);
        match by_cause.iter_mut().find(|(known, ..)| *known == cause) {
            Some((_, seconds, worst)) => {
                seconds.push(second);
                *worst = (*worst).max(still);
            }
            None => by_cause.push((cause, vec![second], still)),
        }
    }
    // A server in the same process is mentioned if it kept a good part of a core busy.
    let busy_sfu = |second: &Second| second.embedded_sfu_cores > Some(0.3);
    by_cause
        .iter()
        .map(|(cause, seconds, worst)| {
            let touched = |row: &&Second| seconds.iter().any(|second| row.covers(*second));
            let beside = if evidence.seconds.iter().filter(touched).any(busy_sfu) {
                Neighbour::EmbeddedSfu
            } else if evidence.server_is_here {
                Neighbour::Server
            } else {
                Neighbour::Unknown
            };
            let (why, what_to_do) = explanation(*cause, beside);
            format!(
                "{}: the generator stood still for {}{:.2} s of a second (limit {:.2} s): {why}; {what_to_do}",
                names(seconds),
                if seconds.len() > 1 { "up to " } else { "" },
                worst.as_secs_f64(),
                STILL_MAX.as_secs_f64()
            )
        })
        .collect()
}

/// Returns how long any engine thread stood still in each second of the run. Seconds without
/// standstill are left out.
fn stillness(gaps: &[StillSpan]) -> Vec<(u64, Duration)> {
    const SECOND: Duration = Duration::from_secs(1);
    let mut seconds: Vec<(u64, Duration)> = Vec::new();
    for gap in union(gaps.to_vec()) {
        for second in gap.from.as_millis() / 1_000..=gap.to.as_millis() / 1_000 {
            let start = Time::from_millis(second * 1_000);
            let still = gap.within(start, start + SECOND);
            match seconds.last_mut().filter(|(last, _)| *last == second) {
                Some((_, sum)) => *sum += still,
                None => seconds.push((second, still)),
            }
        }
    }
    seconds
}

/// Process that runs beside the generator.
#[derive(Clone, Copy)]
enum Neighbour {
    /// The embedded SFU, which was busy at that time.
    EmbeddedSfu,
    /// The server under test.
    Server,
    Unknown,
}

/// Returns why the engine stood still, and what to do.
const fn explanation(cause: Cause, beside: Neighbour) -> (&'static str, &'static str) {
    match (cause, beside) {
        (Cause::Stopped, _) => (
            "the process, or the machine under it, was stopped",
            "run it again where nothing suspends it",
        ),
        (Cause::Throttled, _) => (
            "its control group had used up its CPU quota",
            "raise the container's CPU limit (cpu.max), or use more hosts",
        ),
        (Cause::Stolen, _) => (
            "the hypervisor gave the CPU to others",
            "use a machine with CPUs of its own",
        ),
        (Cause::RunQueue, Neighbour::EmbeddedSfu) => (
            "other threads had the CPU, the embedded SFU's among them",
            "take other load off this host, or fewer subscribers, or a server elsewhere",
        ),
        (Cause::RunQueue, Neighbour::Server) => (
            "other work of this host had the CPU, and the server under test runs on this host",
            "give server and generator hosts of their own, or ask for fewer participants",
        ),
        (Cause::RunQueue, Neighbour::Unknown) => (
            "other work of this host had the CPU",
            "take it off this host, or give the generator cores of its own",
        ),
        (Cause::Engine | Cause::Silence, _) => (
            "the engine had more to do than time",
            "fewer participants a host, or more cores",
        ),
    }
}

fn late_ticks(evidence: &Evidence<'_>) -> Option<String> {
    let p99 = evidence.record.engine.tick_late.quantile(0.99)?;
    let floor = evidence.floor.quantile(0.99);
    let limit = (TICK_LATE_P99_MAX.as_micros() as u64).max(floor.unwrap_or(0) * FLOOR_FACTOR);
    (p99 > limit).then(|| {
        format!(
            "the engine's tick was late: p99 {:.1} ms (a bare timer here: {}; limit {:.1} ms{}); fewer participants a host, or more cores",
            p99 as f64 / 1e3,
            floor.map_or_else(|| "not known".to_owned(), |floor| format!("{:.1} ms", floor as f64 / 1e3)),
            limit as f64 / 1e3,
            rows_where(evidence.seconds, |second| second.tick_late_us_max > Some(limit))
        )
    })
}

fn late_sends(evidence: &Evidence<'_>) -> Option<String> {
    let p99 = evidence.record.engine.send_lag.quantile(0.99)?;
    let limit = SEND_LAG_P99_MAX.as_micros() as u64;
    (p99 > limit).then(|| {
        format!(
            "media left late: p99 {:.1} ms behind its slot (limit {} ms{}); fewer publishers a host, or more cores",
            p99 as f64 / 1e3,
            SEND_LAG_P99_MAX.as_millis(),
            rows_where(evidence.seconds, |second| second.send_lag_us_max > Some(limit))
        )
    })
}

/// Formats the seconds of the rows for which `is_so` holds: `, seconds 3-5 and 9`.
fn rows_where(seconds: &[Second], is_so: impl Fn(&Second) -> bool) -> String {
    let rows = seconds.iter().filter(|second| is_so(second));
    let mut found: Vec<u64> = rows.flat_map(Second::whole_seconds).collect();
    found.dedup();
    if found.is_empty() {
        String::new()
    } else {
        format!(", {}", names(&found))
    }
}

/// Maximum number of ranges that are named. The others are counted.
const RANGES_MAX: usize = 4;

/// Formats ascending seconds, counted from 0 at the start of the run: `second 7`, `seconds 3-5, 9
/// and 12`.
fn names(seconds: &[u64]) -> String {
    let ranges: Vec<&[u64]> = seconds.chunk_by(|one, next| one + 1 == *next).collect();
    let mut names: Vec<String> = ranges
        .iter()
        .take(RANGES_MAX)
        .map(|range| match range {
            [first, .., last] => format!("{first}-{last}"),
            _ => range[0].to_string(),
        })
        .collect();
    let unnamed: usize = ranges
        .iter()
        .skip(RANGES_MAX)
        .map(|range| range.len())
        .sum();
    if unnamed > 0 {
        names.push(format!("{unnamed} more"));
    }
    let last = names.pop().unwrap_or_default();
    let list = if names.is_empty() {
        last
    } else {
        format!("{} and {last}", names.join(", "))
    };
    format!("second{} {list}", if seconds.len() == 1 { "" } else { "s" })
}

/// Returns the share in percent if it exceeds `limit`.
fn above(count: u64, of: u64, limit: f64) -> Option<f64> {
    let share = count as f64 / of.max(1) as f64;
    (share > limit).then_some(share * 1e2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged_with(
        change: impl Fn(&mut Record),
        host_drops: u64,
        busiest_worker: f64,
        seconds: &[Second],
        gaps: &[StillSpan],
        stalls: &[Stall],
    ) -> Vec<String> {
        let mut record = Record::default();
        record.audio.packets_received = 100_000;
        record.audio.frames_sent = 100_000;
        (0..1_000).for_each(|_| record.engine.tick_late.record_micros(80));
        (0..1_000).for_each(|_| record.engine.send_lag.record_micros(400));
        change(&mut record);
        let mut floor = Histogram::default();
        (0..1_000).for_each(|_| floor.record_micros(70));
        reasons(&Evidence {
            record: &record,
            floor: &floor,
            host_drops,
            busiest_worker,
            server_is_here: false,
            seconds,
            gaps,
            stalls,
        })
    }

    #[test]
    fn a_server_on_this_host_is_named_beside_other_work() {
        let why = |beside| explanation(Cause::RunQueue, beside).0;
        assert!(why(Neighbour::Server).ends_with("the server under test runs on this host"));
        assert!(!why(Neighbour::Unknown).contains("server"));
        assert!(why(Neighbour::EmbeddedSfu).contains("the embedded SFU's"));
    }

    fn judged(change: impl Fn(&mut Record), host_drops: u64, busiest_worker: f64) -> Vec<String> {
        judged_with(change, host_drops, busiest_worker, &[], &[], &[])
    }

    const fn gap(from_ms: u64, to_ms: u64) -> StillSpan {
        StillSpan {
            from: Time::from_millis(from_ms),
            to: Time::from_millis(to_ms),
        }
    }

    fn stall(cause: Cause, at: f64, until: f64) -> Stall {
        Stall {
            side: cause.side(),
            cause,
            at,
            until,
            seconds: until - at,
            evidence: String::new(),
        }
    }

    #[test]
    fn a_calm_generator_is_valid_and_each_cause_is_named() {
        assert_eq!(judged(|_| {}, 0, 0.5), Vec::<String>::new());
        assert!(
            judged(
                |r| (0..50).for_each(|_| r.engine.tick_late.record_micros(30_000)),
                0,
                0.5
            )[0]
            .contains("tick was late")
        );
        assert!(
            judged(
                |r| (0..50).for_each(|_| r.engine.send_lag.record_micros(30_000)),
                0,
                0.5
            )[0]
            .contains("left late")
        );
        assert!(judged(|r| r.engine.send_slots_skipped = 600, 0, 0.5)[0].contains("never sent"));
        let few = |skipped| {
            judged(
                |r| {
                    (r.audio.frames_sent, r.video.frames_sent) = (100, 0);
                    r.engine.send_slots_skipped = skipped;
                },
                0,
                0.5,
            )
        };
        assert_eq!((few(4).len(), few(5).len()), (0, 1));
        assert!(judged(|_| {}, 200, 0.5)[0].contains("dropped 200"));
        assert!(judged(|_| {}, 0, 0.95)[0].contains("busy 95 %"));
    }

    #[test]
    fn a_stall_that_no_percentile_shows_makes_its_seconds_invalid() {
        let gaps = [
            gap(3_000, 3_060),
            gap(12_300, 14_100),
            gap(20_950, 21_120),
            gap(30_000, 30_030),
        ];
        let stalls = [
            stall(Cause::Stopped, 12.3, 14.1),
            stall(Cause::RunQueue, 20.95, 21.12),
        ];
        let reasons = judged_with(|_| {}, 0, 0.1, &[], &gaps, &stalls);
        assert_eq!(
            reasons,
            [
                "seconds 12-14: the generator stood still for up to 1.00 s of a second (limit 0.10 s): the process, or the machine under it, was stopped; run it \
                 again where nothing suspends it",
                "second 21: the generator stood still for 0.12 s of a second (limit 0.10 s): other work of this host had the CPU; take it off this host, or give the \
                 generator cores of its own",
            ]
        );
        // The same standstill in short pieces is as bad. The server's silence does not count as
        // ours.
        let pieces: Vec<StillSpan> = (0..5)
            .map(|n| gap(5_000 + n * 100, 5_021 + n * 100))
            .collect();
        let reasons = judged_with(
            |_| {},
            0,
            0.1,
            &[],
            &pieces,
            &[
                stall(Cause::Throttled, 5.0, 5.5),
                stall(Cause::Silence, 5.0, 6.0),
            ],
        );
        assert!(
            matches!(&reasons[..], [one] if one.starts_with("second 5: ") && one.contains("cpu.max")),
            "{reasons:?}"
        );
        assert!(judged_with(|_| {}, 0, 0.1, &[], &pieces[..4], &[]).is_empty());
    }

    #[test]
    fn limits_of_the_whole_run_name_the_seconds_that_broke_them() {
        let row = |second: u64, skipped| Second {
            from: Time::from_millis(second * 1_000 + 50),
            to: Time::from_millis(second * 1_000 + 1_052),
            frames_skipped: skipped,
            ..Second::default()
        };
        let seconds: Vec<Second> = (0..20)
            .map(|n| row(n, u64::from([4, 5, 9].contains(&n)) * 300))
            .collect();
        let reasons = judged_with(
            |r| r.engine.send_slots_skipped = 900,
            0,
            0.1,
            &seconds,
            &[],
            &[],
        );
        assert!(
            reasons[0].contains("900 frames") && reasons[0].contains(", seconds 4-5 and 9)"),
            "{reasons:?}"
        );
    }

    #[test]
    fn seconds_are_named_as_people_name_them() {
        for (seconds, expected) in [
            (&[7][..], "second 7"),
            (&[3, 4, 5, 9], "seconds 3-5 and 9"),
            (&[1, 3, 5, 7, 9, 10], "seconds 1, 3, 5, 7 and 2 more"),
        ] {
            assert_eq!(names(seconds), expected);
        }
    }
}
