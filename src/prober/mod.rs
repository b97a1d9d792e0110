//! A prober: one host of a run that a coordinator leads, from registering to the last report.
//!
//! It plays its part of the plan like any other run, led by [`lead`]. Meanwhile [`link`] keeps in
//! touch with the coordinator, on a thread of its own. If the coordinator is lost, the load ends
//! after a stated time. The measurements survive: this host reports them itself, and keeps them in
//! a file.
//!
//! `voicegw`'s own coordinator works, too. It knows nothing of media, beats or barriers; its report
//! has one step for each tier.

mod client;
mod job;
mod lead;
mod link;
mod outbox;
mod pulse;
mod report;
#[cfg(test)]
#[path = "../../tests/common/scripted.rs"]
mod scripted;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use crate::coordinator::protocol::{self, Job, Register};
use crate::plan::{HostRole, Resources, ServerUrl};
use crate::report::Outcome;
use crate::report::progress::ProgressSnapshot;
use crate::run::lead::Alone;
use crate::run::{Clips, Credentials, Interrupts, RunSpec, run_as_guest};
use crate::secrets::Secret;
use crate::signal::{ApiKey, JoinAccess, TokenIssuer};
use crate::units::Epoch;
use client::CoordinatorClient;
use lead::Led;
use link::{Beats, Enlisted, LinkShared, Tokens};

/// How a prober reaches its coordinator, and what it is in the run.
#[derive(Debug)]
pub struct Membership {
    pub coordinator: ServerUrl,
    /// Token for the coordinator; `None` where it asks for none.
    pub token: Option<Secret>,
    /// Location of this host, as the result names it.
    pub vantage: String,
    pub role: HostRole,
    pub weight: u32,
}

/// A prober that is registered and has its job.
pub struct Prober {
    config: Membership,
    client: CoordinatorClient,
    enlisted: Enlisted,
    shared: Arc<LinkShared>,
    /// Clock that stamps beats. The run's clock is the same clock with another zero.
    clock: Epoch,
    beats: Option<JoinHandle<()>>,
    /// Listens from the start, because an interrupted prober still has to tell the others.
    interrupts: Interrupts,
    /// Runtime with one thread, for the coordinator alone.
    runtime: Runtime,
}

impl Prober {
    /// Registers with the coordinator, and waits until all probers are registered. `told` is called
    /// with each line about what it waits for. Without `credentials`, that is without an API key of
    /// its own, a prober asks the coordinator for its room tokens.
    ///
    /// # Errors
    /// Returns why this host takes no part, and what to do.
    pub fn enlist(
        config: Membership,
        credentials: Option<&Credentials>,
        mut told: impl FnMut(String),
    ) -> Result<Prober> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("prober")
            .enable_all()
            .build()
            .context("no thread for the coordinator")?;
        let client = CoordinatorClient::new(config.coordinator.clone(), config.token.clone());
        let register = Register {
            vantage: Some(config.vantage.clone()),
            protocol: Some(protocol::VERSION),
            version: Some(crate::report::VERSION.to_owned()),
            instance: Some(instance()),
            role: config.role,
            weight: config.weight,
            wants_tokens: credentials.is_none(),
        };
        let mut interrupts = runtime.block_on(async { Interrupts::listen() });
        let enlisted =
            runtime.block_on(link::enlist(&client, &register, &mut interrupts, &mut told))?;
        let mut prober = Prober {
            config,
            client,
            enlisted,
            shared: LinkShared::new(),
            clock: Epoch::read(),
            beats: None,
            interrupts,
            runtime,
        };
        prober.beats = prober
            .job()
            .is_some()
            .then(|| prober.runtime.spawn(prober.beats().run()));
        Ok(prober)
    }

    /// Returns the job, where throng's own coordinator gave it.
    fn job(&self) -> Option<&Job> {
        self.enlisted.job.throng.as_ref()
    }

    /// Returns how long the coordinator may be silent, during the load and after it.
    fn patience(&self) -> Duration {
        self.job().map_or(link::REPORT_PATIENCE, |job| {
            Duration::from_micros(job.patience_us)
        })
    }

    fn beats(&self) -> Beats {
        Beats {
            client: self.client.clone(),
            id: self.enlisted.id.clone(),
            shared: self.shared.clone(),
            epoch: self.clock,
            patience: self.patience(),
        }
    }

    /// Returns the run to play. `own` is this host's own configuration; `shape_given` is whether
    /// that says who publishes.
    ///
    /// # Errors
    /// Returns why the job cannot be played.
    pub fn run(&self, own: RunSpec, shape_given: bool) -> Result<RunSpec> {
        let run = match self.job() {
            Some(job) => job::of_ours(job, own, shape_given),
            None => job::of_voicegw(&self.enlisted.job, own),
        };
        Ok(run?)
    }

    /// Describes the prober, for example `vantage 'fra', 2 of 3, led by http://10.0.0.1:8787`.
    pub fn describe(&self) -> String {
        format!(
            "{}, led by {}",
            job::whose(&self.config, self.job()),
            self.config.coordinator.http()
        )
    }

    /// Plays its part, starting when the coordinator says so.
    ///
    /// # Errors
    /// Returns what kept the run from starting.
    pub async fn measure(
        &mut self,
        run: &RunSpec,
        resources: &Resources,
        clips: Clips,
        progress: impl FnMut(&ProgressSnapshot),
    ) -> Result<Outcome> {
        let access = self.access(run)?;
        let stages = self.job().map(|job| job.stages.clone());
        let missing_after = self.patience() / protocol::PATIENCE_SILENCES;
        let (start_at, interrupts) = (self.enlisted.job.start_at, &mut self.interrupts);
        let ended = |signal| anyhow!("{signal} before the run began");
        let Some(stages) = stages else {
            tokio::select! {
                () = wait_for_wall_clock(start_at) => {}
                signal = interrupts.next() => return Err(ended(signal)),
            }
            return run_as_guest(
                run,
                access,
                resources,
                clips,
                &mut Alone::new(&run.plan),
                interrupts,
                progress,
            )
            .await;
        };
        let mut led = Led::new(self.shared.clone(), stages, self.clock, missing_after);
        tokio::select! {
            started = led.wait_for_start() => started?,
            signal = interrupts.next() => return Err(ended(signal)),
        }
        let mut outcome = run_as_guest(
            run, access, resources, clips, &mut led, interrupts, progress,
        )
        .await?;
        outcome.notes.extend(self.missed());
        Ok(outcome)
    }

    /// Names the hosts that went missing during the run, for this host's own report.
    fn missed(&self) -> Option<String> {
        let missing = self.shared.inbox().missing.clone();
        let vantages = &self.job()?.vantages;
        let names: Vec<String> = missing
            .iter()
            .filter_map(|host| vantages.get(*host as usize))
            .map(|name| format!("'{name}'"))
            .collect();
        (!names.is_empty()).then(|| {
            format!(
                "{} went missing: tracks from there were not expected any more",
                names.join(", ")
            )
        })
    }

    fn access(&self, run: &RunSpec) -> Result<JoinAccess> {
        if let Some(own) = &run.credentials {
            return Ok(ApiKey::new(&own.api_key, &own.api_secret).into());
        }
        if !self.job().is_some_and(|job| job.tokens) {
            return Err(anyhow!(
                "the server wants credentials: give --api-key and --api-secret, or set LIVEKIT_API_KEY and LIVEKIT_API_SECRET, here or where the coordinator runs"
            ));
        }
        let (issuer, requests) = TokenIssuer::new();
        let tokens = Tokens::new(
            self.client.clone(),
            self.enlisted.id.clone(),
            run.plan.total_participants(),
        );
        self.runtime.spawn(tokens.run(requests));
        Ok(JoinAccess::Issued(issuer))
    }

    /// Tells the coordinator what this host measured, or why it measured nothing. Returns a line
    /// for people that says where the report is. `told` is called with each line about what it
    /// waits for.
    pub fn report(
        mut self,
        found: Result<&Outcome, &anyhow::Error>,
        mut told: impl FnMut(String),
    ) -> String {
        let vantage = &self.config.vantage;
        let report = match (found, self.job()) {
            (Ok(outcome), Some(job)) => report::of_stages(vantage, outcome, &job.stages),
            (Ok(outcome), None) => report::of_tiers(vantage, outcome),
            (Err(error), _) => report::of_nothing(vantage, &format!("{error:#}")),
        };
        // From here on the report shows that this host is alive.
        self.beats.take().iter().for_each(JoinHandle::abort);
        // Keep a file before waiting for anybody, because a second signal or a kill may come at any
        // time.
        let kept = report::keep(
            &report,
            Path::new("."),
            vantage,
            &job::run_name(&self.enlisted.job),
        );
        let (patience, interrupts) = (self.patience(), &mut self.interrupts);
        let (client, id) = (&self.client, &self.enlisted.id);
        let delivered = self.runtime.block_on(async {
            tokio::select! {
                delivered = link::deliver(client, id, &report, patience, &mut told) => delivered.map_err(Undelivered::NoReply),
                signal = interrupts.next() => Err(Undelivered::Interrupted(signal)),
            }
        });
        match (delivered, kept) {
            (Ok(_), kept) => {
                // A file that cannot be removed does no harm.
                kept.iter()
                    .for_each(|path| drop(std::fs::remove_file(path)));
                "The coordinator has this report, and tells the whole result when all have reported.".to_owned()
            }
            (Err(why), Ok(path)) => format!(
                "The coordinator did not take this report ({why}). It is kept in {}",
                path.display()
            ),
            (Err(why), Err(error)) => format!(
                "The coordinator did not take this report ({why}), and it could not be kept: {error}"
            ),
        }
    }
}

/// Why the coordinator did not take the report.
#[derive(Debug, thiserror::Error)]
enum Undelivered {
    #[error(transparent)]
    NoReply(link::NoReply),
    #[error("{0}")]
    Interrupted(&'static str),
}

/// Returns a name of this process for the coordinator. A second registration under it is the same
/// prober.
fn instance() -> String {
    use std::hash::{BuildHasher, Hasher, RandomState};
    let word = || RandomState::new().build_hasher().finish();
    format!(
        "{:016x}{:016x}",
        word(),
        word() ^ u64::from(std::process::id())
    )
}

/// Waits for a wall-clock time, as `voicegw`'s coordinator gives it; both hosts' clocks must agree.
/// Returns at once if it has passed.
async fn wait_for_wall_clock(unix_seconds: Option<f64>) {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let wait = Duration::try_from_secs_f64(unix_seconds.unwrap_or(0.0))
        .unwrap_or_default()
        .saturating_sub(now);
    tokio::time::sleep(wait).await;
}
