//! The engine's threads: how a run starts, queries and ends them.

use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::PEERS_PER_PARTICIPANT;
use crate::engine::worker::{self, Occasion, ShardWorkerConfig, WorkerReport};
use crate::engine::{PeerKey, ShardCommand, ShardConfig};
use crate::measure::Record;
use crate::net;
use crate::signal::session::ShardPlace;

pub(super) struct EngineThreads {
    all: Vec<EngineThread>,
    /// Thread and key of each participant's connections, by its position.
    places: Vec<ShardPlace>,
    reports: mpsc::UnboundedReceiver<WorkerReport>,
}

struct EngineThread {
    commands: Sender<ShardCommand>,
    spare_records: Sender<Box<Record>>,
    handle: Option<JoinHandle<std::io::Result<()>>>,
    cpu: Duration,
    cpu_at_hold: Duration,
    /// CPU time when publishers stopped. Threads are not judged by what they do in the drain.
    cpu_at_stop: Duration,
    /// Number of reports that answered a question.
    answers: u64,
    ended: bool,
}

/// For each thread, the number of its answers once it has answered a question.
pub(super) struct AskedThreads(Vec<u64>);

/// Thread and key of a participant's connections.
pub(super) struct Home {
    commands: Sender<ShardCommand>,
    key: PeerKey,
}

impl Home {
    /// Makes a participant leave, as planned, whose session has ended already.
    pub fn leave(self) {
        for place in 0..PEERS_PER_PARTICIPANT {
            let key = PeerKey(self.key.0 + place);
            // A thread that has ended is noticed when its last report is missing.
            let _ = self.commands.send(ShardCommand::Leave { key });
            let _ = self.commands.send(ShardCommand::RemovePeer { key });
        }
    }
}

impl EngineThreads {
    /// Starts a thread for each of `parts`, which are positions of participants.
    pub fn start(parts: &[Vec<u32>], shard: &ShardConfig) -> Result<EngineThreads> {
        let cpus = net::allowed_cpus();
        let (report_sender, reports) = mpsc::unbounded_channel();
        let mut all = Vec::new();
        for (index, part) in parts.iter().enumerate() {
            let (commands, command_receiver) = channel();
            let (spare_records, spare_receiver) = channel();
            let config = ShardWorkerConfig {
                index,
                // Pin threads only if there are cores to spare. With a server on the same few cores
                // the scheduler decides better.
                cpu: (cpus.len() > 2 * parts.len()).then(|| cpus[index % cpus.len()]),
                capacity: part.len() * PEERS_PER_PARTICIPANT,
                shard: shard.clone(),
                commands: command_receiver,
                reports: report_sender.clone(),
                spare_records: spare_receiver,
            };
            let handle = std::thread::Builder::new()
                .name(format!("engine-{index}"))
                .spawn(move || worker::run(config))
                .context("no engine thread")?;
            all.push(EngineThread {
                commands,
                spare_records,
                handle: Some(handle),
                cpu: Duration::ZERO,
                cpu_at_hold: Duration::ZERO,
                cpu_at_stop: Duration::ZERO,
                answers: 0,
                ended: false,
            });
        }
        Ok(EngineThreads {
            all,
            places: places(parts),
            reports,
        })
    }

    pub fn count(&self) -> usize {
        self.all.len()
    }

    pub fn senders(&self) -> Vec<Sender<ShardCommand>> {
        let commands = self.all.iter().map(|thread| thread.commands.clone());
        commands.collect()
    }

    pub fn place(&self, position: u32) -> ShardPlace {
        self.places[position as usize]
    }

    pub fn home(&self, position: u32) -> Home {
        let ShardPlace { shard, key } = self.place(position);
        Home {
            commands: self.all[shard].commands.clone(),
            key,
        }
    }

    /// Sends a command to the thread that runs this participant.
    pub fn command_of(&self, position: u32, command: ShardCommand) {
        // A thread that has ended is noticed when its last report is missing.
        let _ = self.all[self.place(position).shard].commands.send(command);
    }

    pub fn command_all(&self, command: impl Fn() -> ShardCommand) {
        for thread in &self.all {
            // A thread that has ended is noticed when its last report is missing.
            let _ = thread.commands.send(command());
        }
    }

    /// Sends a command that each thread answers with a report.
    pub fn ask(&self, command: impl Fn() -> ShardCommand) -> AskedThreads {
        let wanted = self.all.iter().map(|thread| thread.answers + 1);
        let asked = AskedThreads(wanted.collect());
        self.command_all(command);
        asked
    }

    pub fn owe_answers(&self, AskedThreads(wanted): &AskedThreads) -> bool {
        let mut threads = self.all.iter().zip(wanted);
        threads.any(|(thread, wanted)| thread.answers < *wanted && !thread.ended)
    }

    pub fn have_ended(&self) -> bool {
        self.all.iter().all(|thread| thread.ended)
    }

    /// Returns a report that has arrived.
    pub fn poll_report(&mut self) -> Option<WorkerReport> {
        let report = self.reports.try_recv().ok()?;
        self.note(&report);
        Some(report)
    }

    /// Returns the next report, or `None` if there is none before the deadline.
    pub async fn next_report(&mut self, deadline: Instant) -> Option<WorkerReport> {
        let report = timeout_at(deadline, self.reports.recv()).await.ok()??;
        self.note(&report);
        Some(report)
    }

    fn note(&mut self, report: &WorkerReport) {
        let thread = &mut self.all[report.worker];
        thread.cpu = report.cpu;
        thread.answers += u64::from(report.occasion == Occasion::Asked);
        thread.ended |= report.occasion == Occasion::Last;
    }

    /// Gives a record back to its thread, which fills it again.
    pub fn give_back(&self, worker: usize, mut record: Box<Record>) {
        record.clear();
        // A thread that has ended needs no record.
        let _ = self.all[worker].spare_records.send(record);
    }

    /// Joins the threads that have sent their last report, and returns their faults. A thread that
    /// has not is left behind.
    pub fn join(&mut self) -> Vec<String> {
        let ended = self.all.iter_mut().enumerate();
        let ended = ended.filter(|(_, thread)| thread.ended);
        let fault = |(index, thread): (usize, &mut EngineThread)| match thread
            .handle
            .take()
            .map(JoinHandle::join)
        {
            Some(Ok(Err(error))) => Some(format!(
                "engine thread {index} ended with an error: {error}"
            )),
            Some(Err(_)) => Some(format!("engine thread {index} panicked")),
            Some(Ok(Ok(()))) | None => None,
        };
        ended.filter_map(fault).collect()
    }

    pub fn mark_hold(&mut self) {
        let threads = self.all.iter_mut();
        threads.for_each(|thread| thread.cpu_at_hold = thread.cpu);
    }

    pub fn mark_stop(&mut self) {
        let threads = self.all.iter_mut();
        threads.for_each(|thread| thread.cpu_at_stop = thread.cpu);
    }

    /// CPU time that the busiest thread has used since the hold began.
    pub fn busiest_since_hold(&self) -> Duration {
        let used = |thread: &EngineThread| thread.cpu.saturating_sub(thread.cpu_at_hold);
        self.all.iter().map(used).max().unwrap_or_default()
    }

    /// CPU time that the busiest thread used from the start of the hold until publishers stopped.
    pub fn busiest_of_hold(&self) -> Duration {
        let used = |thread: &EngineThread| thread.cpu_at_stop.saturating_sub(thread.cpu_at_hold);
        self.all.iter().map(used).max().unwrap_or_default()
    }

    pub fn cpu(&self) -> Duration {
        self.all.iter().map(|thread| thread.cpu).sum()
    }
}

/// Shard and first key of each participant, by its position.
fn places(parts: &[Vec<u32>]) -> Vec<ShardPlace> {
    let nowhere = ShardPlace {
        shard: 0,
        key: PeerKey(0),
    };
    let mut places = vec![nowhere; parts.iter().map(Vec::len).sum()];
    for (shard, part) in parts.iter().enumerate() {
        for (at, position) in part.iter().enumerate() {
            places[*position as usize] = ShardPlace {
                shard,
                key: PeerKey(at * PEERS_PER_PARTICIPANT),
            };
        }
    }
    places
}
