//! Observes this process and its host for the run. Reads once a second, outside the engine's
//! threads.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::engine::blame::{self, Observed};
use crate::engine::health::{self, FloorThread};
use crate::engine::worker::WorkerActivity;
use crate::host::{HostSnapshot, Thread};
use crate::measure::presence::{ThreadPresence, step_of, step_start};
use crate::measure::second::{HostDrops, Second};
use crate::measure::stalls::{Stall, StillSpan};
use crate::measure::{Histogram, Record};
use crate::net;
use crate::plan::{Span, Spans};
use crate::report::ThreadTime;
use crate::sfu;
use crate::units::{Epoch, Time};

const ENGINE_PREFIX: &str = "engine-";
/// Prefix of the names that tokio gives its threads.
const SIGNALLING_PREFIX: &str = "tokio-";

pub(super) struct Observer {
    server_is_here: bool,
    /// The bare timer thread of this run.
    floor: FloorThread,
    start: HostSnapshot,
    cpu_before: Option<Duration>,
    resident_before: Option<u64>,
    resident_at_hold: Option<u64>,
    last: HostSnapshot,
    /// Last reading of every thread that was ever seen. A thread that has ended can no longer be
    /// read.
    threads: BTreeMap<u32, Thread>,
    sends: ThreadPresence,
    arrivals: ThreadPresence,
    engine_gaps: Vec<StillSpan>,
    floor_gaps: Vec<StillSpan>,
    /// Greatest delay of the timer thread in the open row so far, if it was read already.
    floor_late_max: Option<Duration>,
    seconds: Vec<Second>,
}

/// All observations, at the end of the run.
pub(super) struct Observations {
    pub floor: Histogram,
    pub seconds: Vec<Second>,
    pub gaps: Vec<StillSpan>,
    pub stalls: Vec<Stall>,
    /// Without `sockets`, which the engine counts.
    pub drops: HostDrops,
    pub softnet_squeezed: Option<u64>,
    pub stolen: Option<Duration>,
    pub throttled: Option<(u64, Duration)>,
    pub threads: Vec<ThreadTime>,
    /// CPU time of this process, without the embedded SFU's threads.
    pub cpu: Option<Duration>,
    /// Bytes by which the process had grown when the last hold began.
    pub grown: Option<u64>,
}

impl Observer {
    /// Starts observing. Call this before the engine starts, so that the memory held then is not
    /// attributed to participants. `server_is_here`: the server under test runs on this host.
    pub fn start(epoch: Epoch, server_is_here: bool) -> Result<Observer> {
        let resident_before = net::resident_bytes().map(|(now, _)| now);
        let start = HostSnapshot::read();
        Ok(Observer {
            server_is_here,
            floor: FloorThread::start(epoch).context("no thread for the timer floor")?,
            cpu_before: generator_cpu(),
            resident_before,
            resident_at_hold: None,
            last: start.clone(),
            threads: start.threads.clone(),
            start,
            sends: ThreadPresence::default(),
            arrivals: ThreadPresence::default(),
            engine_gaps: Vec::new(),
            floor_gaps: Vec::new(),
            floor_late_max: None,
            seconds: Vec::new(),
        })
    }

    pub fn mark_hold(&mut self) {
        self.resident_at_hold = net::resident_bytes().map(|(now, _)| now);
    }

    pub fn take_activity(&mut self, activity: WorkerActivity) {
        self.sends.merge(&activity.sends);
        self.arrivals.merge(&activity.arrivals);
        self.engine_gaps.extend(activity.gaps);
    }

    /// Closes a row of the series. `counted` is what the engine counted in it.
    pub fn close_second(&mut self, from: Time, to: Time, counted: &Record) -> Second {
        let now = HostSnapshot::read();
        let floor = self.floor.take();
        self.floor_gaps.extend(floor.gaps);
        self.threads.extend(now.threads.clone());
        let threads = now.threads_since(&self.last);
        let named = |prefix: &'static str| {
            threads
                .iter()
                .filter(move |thread| thread.name.starts_with(prefix))
        };
        let seconds = to.since(from).as_secs_f64();
        let sfu_cpu = named(sfu::THREAD_PREFIX)
            .map(|thread| thread.cpu)
            .reduce(|sum, cpu| sum + cpu);
        let micros = |time: Duration| time.as_micros() as u64;
        let second = Second {
            from,
            to,
            media_packets: counted.audio.packets_received + counted.video.packets_received,
            tick_late_us_max: counted.engine.tick_late.max(),
            send_lag_us_max: counted.engine.send_lag.max(),
            floor_late_us_max: floor.late_max.max(self.floor_late_max.take()).map(micros),
            frames_skipped: counted.engine.send_slots_skipped,
            engine_busy: named(ENGINE_PREFIX)
                .map(|thread| thread.cpu)
                .max()
                .map(|cpu| cpu.as_secs_f64() / seconds),
            run_queue_us_max: named(ENGINE_PREFIX)
                .map(|thread| micros(thread.run_queue))
                .max(),
            embedded_sfu_cores: sfu_cpu.map(|cpu| cpu.as_secs_f64() / seconds),
            steal_us: now.stolen_since(&self.last).map(micros),
            throttled_us: now
                .throttled_since(&self.last)
                .map(|throttling| micros(throttling.time)),
            drops: HostDrops {
                sockets: Some(counted.session.host_drops),
                ..now.drops.since(&self.last.drops)
            },
            softnet_squeezed: grown(now.softnet_squeezed, self.last.softnet_squeezed),
        };
        self.last = now;
        self.seconds.push(second.clone());
        second
    }

    /// How late the bare timer thread has been since its start.
    pub fn floor_so_far(&self) -> Histogram {
        self.floor.so_far()
    }

    /// Returns why the generator was the limit in a part of the run that ends now. `counted` is the
    /// engine's record of that part, `floor_before` is from its start, and `busiest_worker` is a
    /// share of a core.
    pub fn reasons_between(
        &mut self,
        from: Time,
        until: Time,
        counted: &Record,
        floor_before: &Histogram,
        busiest_worker: f64,
    ) -> Vec<String> {
        let floor = self.floor.take();
        self.floor_gaps.extend(floor.gaps);
        self.floor_late_max = self.floor_late_max.max(floor.late_max);
        let within = |gap: &StillSpan| StillSpan {
            from: gap.from.max(from),
            to: gap.to.min(until),
        };
        let gaps: Vec<StillSpan> = self
            .engine_gaps
            .iter()
            .map(within)
            .filter(|gap| gap.from < gap.to)
            .collect();
        let seconds: Vec<Second> = self
            .seconds
            .iter()
            .filter(|row| row.from < until && row.to > from)
            .cloned()
            .collect();
        health::reasons(&health::Evidence {
            record: counted,
            floor: &self.floor.so_far().since(floor_before),
            host_drops: counted.session.host_drops,
            busiest_worker,
            server_is_here: self.server_is_here,
            seconds: &seconds,
            gaps: &gaps,
            stalls: &self.stalls(until, &Spans::of([Span::since(Time::ZERO)])),
        })
    }

    /// Returns the last moment before `at` at which anything arrived.
    pub fn last_arrival(&self, at: Time) -> Option<Time> {
        self.arrivals.last_before(step_of(at)).map(step_start)
    }

    /// `owed`: when anything was to come from the server.
    fn stalls(&self, until: Time, owed: &Spans) -> Vec<Stall> {
        blame::stalls(&Observed {
            owed,
            sends: &self.sends,
            arrivals: &self.arrivals,
            engine_gaps: &self.engine_gaps,
            floor_gaps: &self.floor_gaps,
            seconds: &self.seconds,
            until,
        })
    }

    /// Reads the threads once more, before some of them end.
    pub fn look_at_threads(&mut self) {
        self.threads.extend(HostSnapshot::read().threads);
    }

    /// Ends observing. Silence after `media_stopped_at`, or while nothing is `owed`, is not a
    /// stall.
    pub fn finish(&mut self, media_stopped_at: Time, owed: &Spans) -> Observations {
        let end = HostSnapshot::read();
        self.floor_gaps.extend(self.floor.take().gaps);
        let floor = std::mem::replace(&mut self.floor, FloorThread::idle()).finish();
        let stalls = self.stalls(media_stopped_at, owed);
        Observations {
            floor,
            seconds: std::mem::take(&mut self.seconds),
            gaps: std::mem::take(&mut self.engine_gaps),
            stalls,
            drops: end.drops.since(&self.start.drops),
            softnet_squeezed: grown(end.softnet_squeezed, self.start.softnet_squeezed),
            stolen: end.stolen_since(&self.start),
            throttled: end
                .throttled_since(&self.start)
                .map(|throttling| (throttling.times, throttling.time)),
            threads: thread_times(&self.threads, &self.start.threads),
            cpu: cpu_between(self.cpu_before, generator_cpu()),
            grown: self
                .resident_at_hold
                .zip(self.resident_before)
                .map(|(hold, before)| hold.saturating_sub(before)),
        }
    }
}

/// CPU time of this process without the embedded SFU's threads. The floor thread and `main` are
/// part of what a run costs.
pub(super) fn generator_cpu() -> Option<Duration> {
    let sfu = net::threads_cpu(sfu::THREAD_PREFIX)?;
    Some(net::process_cpu().saturating_sub(sfu))
}

pub(super) fn cpu_between(before: Option<Duration>, after: Option<Duration>) -> Option<Duration> {
    Some(after?.saturating_sub(before?))
}

fn grown(now: Option<u64>, before: Option<u64>) -> Option<u64> {
    now?.checked_sub(before?)
}

/// CPU times: each engine thread on its own, the other threads by their task.
fn thread_times(threads: &BTreeMap<u32, Thread>, start: &BTreeMap<u32, Thread>) -> Vec<ThreadTime> {
    let mut times: BTreeMap<String, ThreadTime> = BTreeMap::new();
    for (id, thread) in threads {
        let before = start.get(id).cloned().unwrap_or_default();
        let name = match &thread.name {
            name if name.starts_with(sfu::THREAD_PREFIX) => "embedded SFU".to_owned(),
            name if name.starts_with(SIGNALLING_PREFIX) => "signalling".to_owned(),
            name if name.starts_with(ENGINE_PREFIX) || name == "floor" || name == "recorder" => {
                name.clone()
            }
            _ => "main".to_owned(),
        };
        let time = times.entry(name.clone()).or_insert(ThreadTime {
            name,
            cpu_seconds: 0.0,
            run_queue_seconds: 0.0,
        });
        time.cpu_seconds += thread.cpu.saturating_sub(before.cpu).as_secs_f64();
        time.run_queue_seconds += thread
            .run_queue
            .saturating_sub(before.run_queue)
            .as_secs_f64();
    }
    times.into_values().collect()
}
