//! Was the generator the limit? The host's own floor, what the engine saw of itself, and the limits past which a run is INVALID.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::worker::Beat;
use crate::measure::{Histogram, Record};
use crate::units::Epoch;

/// Ticks this late at the 99th percentile, and well above the host's floor, show in every latency that we report.
const TICK_LATE_P99_MAX: Duration = Duration::from_millis(10);
/// A host whose bare timer is late itself is noisy, not overloaded by us: only what exceeds its floor by this factor is ours.
const FLOOR_FACTOR: u64 = 3;
/// Media that left this late was not the load that the plan describes.
const SEND_LAG_P99_MAX: Duration = Duration::from_millis(20);
/// Frames that were never sent because their slot had passed.
const SLOTS_SKIPPED_SHARE_MAX: f64 = 0.001;
/// Packets that arrived at this host and were dropped by it.
const HOST_DROPS_SHARE_MAX: f64 = 0.0005;
/// A worker this busy has no room for a burst.
pub const WORKER_BUSY_MAX: f64 = 0.9;

/// A wake-up costs some 30 us: a hundred a second tell enough and take nothing worth mention.
const FLOOR_TICKS: u32 = 10;

/// A bare thread that does nothing but wake up: how late this host wakes anyone.
pub struct FloorThread {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Histogram>>,
}

impl FloorThread {
    pub fn start(epoch: Epoch) -> io::Result<FloorThread> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::Builder::new().name("floor".into()).spawn(move || {
            let (mut beat, mut floor) = (Beat::start(epoch), Histogram::default());
            while !stopped.load(Ordering::Relaxed) {
                let (_, late, _) = beat.wait(FLOOR_TICKS);
                floor.record(late);
            }
            floor
        })?;
        Ok(FloorThread { stop, thread: Some(thread) })
    }

    /// One that measures nothing.
    pub fn idle() -> FloorThread {
        FloorThread {
            stop: Arc::default(),
            thread: None,
        }
    }

    pub fn finish(self) -> Histogram {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.and_then(|thread| thread.join().ok()).unwrap_or_default()
    }
}

/// What the judgement of the generator stands on.
pub struct Evidence<'a> {
    pub record: &'a Record,
    pub floor: &'a Histogram,
    /// Datagrams that this host dropped, wherever it did.
    pub host_drops: u64,
    /// The busiest worker's share of its core while media flowed.
    pub busiest_worker: f64,
}

/// Why the generator was the limit; empty where it was not.
pub fn reasons(evidence: &Evidence<'_>) -> Vec<String> {
    let engine = &evidence.record.engine;
    let frames = evidence.record.audio.frames_sent + evidence.record.video.frames_sent;
    let packets = evidence.record.audio.packets_received + evidence.record.video.packets_received;
    let checks = [
        late_ticks(engine.tick_late.quantile(0.99), evidence.floor.quantile(0.99)),
        engine
            .send_lag
            .quantile(0.99)
            .filter(|us| *us > SEND_LAG_P99_MAX.as_micros() as u64)
            .map(|us| {
                format!(
                    "media left late: p99 {:.1} ms behind its slot (limit {} ms)",
                    us as f64 / 1e3,
                    SEND_LAG_P99_MAX.as_millis()
                )
            }),
        above(engine.send_slots_skipped, frames + engine.send_slots_skipped, SLOTS_SKIPPED_SHARE_MAX).map(|share| {
            format!(
                "{} frames ({share:.2} %) were never sent: their slot had passed",
                engine.send_slots_skipped
            )
        }),
        above(engine.send_errors, engine.packets_processed, HOST_DROPS_SHARE_MAX)
            .map(|share| format!("the kernel refused {} of our datagrams ({share:.2} %)", engine.send_errors)),
        above(evidence.host_drops, packets + evidence.host_drops, HOST_DROPS_SHARE_MAX).map(|share| {
            format!(
                "this host dropped {} datagrams ({share:.2} %) that had arrived: raise net.core.rmem_max or use more hosts",
                evidence.host_drops
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
    checks.into_iter().flatten().collect()
}

fn late_ticks(p99: Option<u64>, floor_p99: Option<u64>) -> Option<String> {
    let p99 = p99?;
    let floor = floor_p99.unwrap_or(0);
    let limit = (TICK_LATE_P99_MAX.as_micros() as u64).max(floor * FLOOR_FACTOR);
    (p99 > limit).then(|| {
        format!(
            "the engine's tick was late: p99 {:.1} ms (a bare timer here: {:.1} ms; limit {:.1} ms)",
            p99 as f64 / 1e3,
            floor as f64 / 1e3,
            limit as f64 / 1e3
        )
    })
}

/// The share in percent, where it exceeds `limit`.
fn above(count: u64, of: u64, limit: f64) -> Option<f64> {
    let share = count as f64 / of.max(1) as f64;
    (share > limit).then_some(share * 1e2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(change: impl Fn(&mut Record), host_drops: u64, busiest_worker: f64) -> Vec<String> {
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
        })
    }

    #[test]
    fn a_calm_generator_is_valid_and_each_cause_is_named() {
        assert_eq!(judged(|_| {}, 0, 0.5), Vec::<String>::new());
        assert!(judged(|r| (0..50).for_each(|_| r.engine.tick_late.record_micros(30_000)), 0, 0.5)[0].contains("tick was late"));
        assert!(judged(|r| (0..50).for_each(|_| r.engine.send_lag.record_micros(30_000)), 0, 0.5)[0].contains("left late"));
        assert!(judged(|r| r.engine.send_slots_skipped = 500, 0, 0.5)[0].contains("never sent"));
        assert!(judged(|_| {}, 200, 0.5)[0].contains("dropped 200"));
        assert!(judged(|_| {}, 0, 0.95)[0].contains("busy 95 %"));
    }
}
