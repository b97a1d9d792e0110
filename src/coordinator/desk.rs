//! The thread that owns a run's state and its journal. Other threads send it calls; between calls
//! it does what has become due.

use std::fmt;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tracing::{info, warn};

use super::journal::{Head, Journal};
use super::log::log_entry;
use super::protocol::{
    self, BeatMessage, BeatReply, Cancelled, Departed, Health, JobReply, ProberReport, ProverId,
    Register, Registered, Reported,
};
use super::state::{JournalEntry, RefusedRequest, RunPhase, RunState};
use crate::secrets::Secrets;
use crate::units::Epoch;

/// Bound of the queue of calls. Each prober has one call under way, so only strangers can fill it.
const CALLS_MAX: usize = 1_024;
/// Interval at which the desk looks for what is due.
const LOOK: Duration = Duration::from_millis(100);
/// Interval at which the journal is synced and rewritten if necessary.
const KEEP: Duration = Duration::from_secs(1);

/// Reason why a call was not carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeskFailure {
    Refused(RefusedRequest),
    /// The entry could not be written to the journal, so it was not applied.
    NotJournaled(String),
    /// The coordinator is shutting down.
    Closing,
}

impl From<RefusedRequest> for DeskFailure {
    fn from(refused: RefusedRequest) -> DeskFailure {
        DeskFailure::Refused(refused)
    }
}

/// A time in which the desk did no work for anybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standstill {
    pub whole: Duration,
    /// Part of it that was spent waiting for the journal's disk.
    pub on_disk: Duration,
}

impl fmt::Display for Standstill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |of: Duration| of.as_secs_f64().round();
        write!(
            f,
            "the coordinator stood still for {} s and answered nobody",
            seconds(self.whole)
        )?;
        if self.on_disk * 2 > self.whole {
            write!(
                f,
                ": its journal waited {} s for the disk",
                seconds(self.on_disk)
            )
        } else {
            f.write_str(": its host was busy, or it was stopped")
        }
    }
}

/// State and journal of a run.
pub struct Desk {
    pub state: RunState,
    journal: Journal,
    head: Head,
    epoch: Epoch,
    /// Why the journal cannot be written; `None` while it can.
    problem: Option<String>,
    /// The longest standstill so far, if there was one.
    standstill: Option<Standstill>,
    /// Time spent on the disk since the desk last looked for what is due.
    on_disk: Duration,
    phase: watch::Sender<RunPhase>,
}

type DeskCall = Box<dyn FnOnce(&mut Desk) + Send>;

/// Handle to a desk. Cheap to clone.
#[derive(Clone)]
pub struct DeskHandle {
    calls: mpsc::Sender<DeskCall>,
    phase: watch::Receiver<RunPhase>,
    epoch: Epoch,
}

/// Thread of a desk. It ends when the last handle is dropped, and returns the state and the
/// journal.
pub struct DeskThread(JoinHandle<(RunState, Journal)>);

impl DeskThread {
    /// Waits for the thread. All handles must have been dropped.
    pub fn join(self) -> std::thread::Result<(RunState, Journal)> {
        self.0.join()
    }
}

impl Desk {
    pub fn start(
        state: RunState,
        journal: Journal,
        head: Head,
        epoch: Epoch,
    ) -> std::io::Result<(DeskHandle, DeskThread)> {
        let (calls, waiting) = mpsc::channel(CALLS_MAX);
        let (phase, heard) = watch::channel(state.phase().clone());
        let desk = Desk {
            state,
            journal,
            head,
            epoch,
            problem: None,
            standstill: None,
            on_disk: Duration::ZERO,
            phase,
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()?;
        let thread = std::thread::Builder::new()
            .name("coordinator".to_owned())
            .spawn(move || runtime.block_on(desk.run(waiting)))?;
        let handle = DeskHandle {
            calls,
            phase: heard,
            epoch,
        };
        Ok((handle, DeskThread(thread)))
    }

    async fn run(mut self, mut calls: mpsc::Receiver<DeskCall>) -> (RunState, Journal) {
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut kept_at = Instant::now();
        loop {
            tokio::select! {
                call = calls.recv() => match call {
                    Some(call) => call(&mut self),
                    None => return (self.state, self.journal),
                },
                _ = look.tick() => self.settle(),
            }
            if kept_at.elapsed() >= KEEP {
                kept_at = Instant::now();
                let kept = self.journal.keep(&self.state, &self.head, self.now_us());
                self.on_disk += kept_at.elapsed();
                if let Err(error) = kept {
                    // The next entry that is written, or fails to be written, says more.
                    let _ = self.note(Err(error));
                }
            }
        }
    }

    pub fn now_us(&self) -> u64 {
        self.epoch.unix_micros(self.epoch.now())
    }

    /// Returns why the journal cannot be written.
    pub fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// Returns the longest time so far in which nobody was answered, if it was long.
    pub fn standstill(&self) -> Option<Standstill> {
        self.standstill
    }

    /// Does what is due, as far as it can be journaled. The rest stays due.
    fn settle(&mut self) {
        let now_us = self.now_us();
        let on_disk = std::mem::take(&mut self.on_disk);
        if let Some(whole) = self.state.look(now_us).map(Duration::from_micros)
            && self.standstill.is_none_or(|longest| longest.whole < whole)
        {
            let standstill = Standstill { whole, on_disk };
            warn!("{standstill}");
            self.standstill = Some(standstill);
        }
        while let Some(entry) = self.state.due(now_us) {
            if self.remember(entry).is_err() {
                break;
            }
        }
        self.phase.send_if_modified(|phase| {
            let is_new = phase != self.state.phase();
            phase.clone_from(self.state.phase());
            is_new
        });
    }

    /// Writes an entry to the journal, then applies it.
    pub fn remember(&mut self, entry: JournalEntry) -> Result<(), DeskFailure> {
        let since = Instant::now();
        let written = self.journal.append(&entry, self.now_us());
        self.on_disk += since.elapsed();
        self.note(written)?;
        log_entry(&entry, &self.state);
        self.state.apply(entry);
        Ok(())
    }

    fn note(&mut self, written: std::io::Result<()>) -> Result<(), DeskFailure> {
        let problem = written.err().map(|error| {
            format!(
                "the journal {} takes nothing: {error}",
                self.journal.path().display()
            )
        });
        let before = std::mem::replace(&mut self.problem, problem);
        if self.problem != before {
            match &self.problem {
                Some(problem) => warn!("{problem}"),
                None => info!("the journal takes entries again"),
            }
        }
        match &self.problem {
            None => Ok(()),
            Some(problem) => Err(DeskFailure::NotJournaled(problem.clone())),
        }
    }

    pub fn register(&mut self, register: &Register) -> Result<Registered, DeskFailure> {
        let fresh = ProverId::new(format!(
            "{:032x}",
            u128::from_le_bytes(Secrets::system().bytes())
        ))
        .expect("hexadecimal digits are letters and digits");
        let (answer, entries) = self.state.register(self.now_us(), register, fresh)?;
        entries
            .into_iter()
            .try_for_each(|entry| self.remember(entry))?;
        let who = self.state.find(answer.prover_id.as_str())?;
        self.state.hear_of(self.now_us(), who);
        self.settle();
        Ok(answer)
    }

    pub fn job(&mut self, id: &str) -> Result<JobReply, DeskFailure> {
        let who = self.state.find(id)?;
        self.state.hear_of(self.now_us(), who);
        Ok(self.state.job(who))
    }

    pub fn beat(
        &mut self,
        id: &str,
        beat: &BeatMessage,
        received_at_us: u64,
    ) -> Result<BeatReply, DeskFailure> {
        let who = self.state.find(id)?;
        let entry = self.state.beat(self.now_us(), who, beat)?;
        if let Some(Err(failure)) = entry.map(|entry| self.remember(entry)) {
            // The beat is a sign of life even if its content is lost.
            self.state.hear_of(self.now_us(), who);
            return Err(failure);
        }
        let offset = |desk: &Desk| {
            let prober = desk.state.probers().get(who);
            prober.and_then(|prober| Some((prober.vantage.clone(), prober.offset()?)))
        };
        let knew = offset(self).is_some();
        self.state.hear(self.now_us(), who, beat);
        if !knew && let Some((vantage, offset)) = offset(self) {
            let (offset_us, uncertainty_us) = (offset.offset_us, offset.uncertainty_us);
            info!(vantage, offset_us, uncertainty_us, "its clock is known");
        }
        self.settle();
        Ok(self
            .state
            .reply(who, beat.seq, received_at_us, self.now_us()))
    }

    pub fn report(&mut self, id: &str, report: &ProberReport) -> Result<Reported, DeskFailure> {
        let who = self.state.find(id)?;
        self.state.hear_of(self.now_us(), who);
        if let Some(entry) = self.state.report(self.now_us(), who, report)? {
            self.remember(entry)?;
        }
        self.settle();
        Ok(self.state.reported())
    }

    pub fn leave(&mut self, id: &str) -> Result<Departed, DeskFailure> {
        let who = self.state.find(id)?;
        if let Some(entry) = self.state.leave(self.now_us(), who) {
            self.remember(entry)?;
        }
        self.settle();
        Ok(Departed { ok: true })
    }

    pub fn cancel(&mut self, reason: &str) -> Result<Cancelled, DeskFailure> {
        if let Some(entry) = self.state.cancel(self.now_us(), reason) {
            self.remember(entry)?;
        }
        self.settle();
        Ok(Cancelled {
            stopping: self
                .state
                .probers()
                .iter()
                .filter(|prober| prober.is_live())
                .count() as u32,
        })
    }

    pub fn health(&self) -> Health {
        Health {
            ok: self.problem.is_none(),
            version: crate::report::VERSION.to_owned(),
            protocol: protocol::VERSION,
            phase: self.state.phase().name().to_owned(),
            registered: self.state.probers().len() as u32,
            expected: self.state.setup().expect,
            problem: self.problem.clone(),
        }
    }
}

impl DeskHandle {
    /// Runs `act` on the desk's thread.
    ///
    /// # Errors
    /// The desk is gone.
    pub async fn call<R: Send + 'static>(
        &self,
        act: impl FnOnce(&mut Desk) -> R + Send + 'static,
    ) -> Result<R, DeskFailure> {
        let (reply, answer) = oneshot::channel();
        let call: DeskCall = Box::new(move |desk| {
            // The caller may be gone.
            let _ = reply.send(act(desk));
        });
        self.calls
            .send(call)
            .await
            .map_err(|_| DeskFailure::Closing)?;
        answer.await.map_err(|_| DeskFailure::Closing)
    }

    /// Returns the time by the coordinator's clock.
    pub fn now_us(&self) -> u64 {
        self.epoch.unix_micros(self.epoch.now())
    }

    /// Waits until the run is over.
    pub async fn over(&mut self) {
        // A desk that is gone counts as over, too.
        let _ = self.phase.wait_for(|phase| *phase == RunPhase::Over).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_standstill_says_what_it_was_for() {
        let standstill = |whole, on_disk| {
            let (whole, on_disk) = (Duration::from_millis(whole), Duration::from_millis(on_disk));
            Standstill { whole, on_disk }.to_string()
        };
        assert_eq!(
            standstill(21_100, 20_900),
            "the coordinator stood still for 21 s and answered nobody: its journal waited 21 s for the disk"
        );
        assert_eq!(
            standstill(30_100, 1_030),
            "the coordinator stood still for 30 s and answered nobody: its host was busy, or it was stopped"
        );
    }
}
