//! A prober: one host of a run that a coordinator leads, from registering to the last report.
//!
//! It plays its part of the plan as any run does, led by [`lead`]; [`link`] keeps in touch with the
//! coordinator meanwhile, on a thread of its own. A coordinator that is lost ends the load after a
//! stated time, and takes nothing with it: what this host measured is reported here, and kept in a
//! file.
//!
//! `voicegw`'s own coordinator is served, too: it knows nothing of media, beats or barriers, and
//! gets its steps.

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

/// How a prober finds its coordinator, and what it is there.
#[derive(Debug)]
pub struct Membership {
    pub coordinator: ServerUrl,
    /// What lets it in; `None` where the coordinator asks for none.
    pub token: Option<Secret>,
    /// Where this host stands, as the result names it.
    pub vantage: String,
    pub role: HostRole,
    pub weight: u32,
}

/// A prober that is in, and has its job.
pub struct Prober {
    config: Membership,
    client: CoordinatorClient,
    enlisted: Enlisted,
    shared: Arc<LinkShared>,
    /// Beats are stamped by it, and the run's clock is the same from another zero.
    clock: Epoch,
    beats: Option<JoinHandle<()>>,
    /// From the first moment on: whoever ends this process wants the others to know.
    interrupts: Interrupts,
    /// One thread, for the coordinator alone.
    runtime: Runtime,
}

impl Prober {
    /// Registers with the coordinator, and waits until everybody is in. `told` hears what there is
    /// to wait for. `credentials`: without an API key of its own a prober wants its room tokens
    /// from the coordinator.
    ///
    /// # Errors
    /// Why this host takes no part; says what to do.
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

    /// From a coordinator of ours.
    fn job(&self) -> Option<&Job> {
        self.enlisted.job.throng.as_ref()
    }

    /// How long a coordinator may be silent, during the load and after it.
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

    /// What is to be run: `own` is what this host was given itself, and whether it was given whom
    /// to play, too.
    ///
    /// # Errors
    /// Why it cannot be.
    pub fn run(&self, own: RunSpec, shape_given: bool) -> Result<RunSpec> {
        let run = match self.job() {
            Some(job) => job::of_ours(job, own, shape_given),
            None => job::of_voicegw(&self.enlisted.job, own),
        };
        Ok(run?)
    }

    /// `vantage 'fra', 2 of 3, led by http://10.0.0.1:8787`
    pub fn describe(&self) -> String {
        format!(
            "{}, led by {}",
            job::whose(&self.config, self.job()),
            self.config.coordinator.http()
        )
    }

    /// Plays its part, from when the coordinator says so.
    ///
    /// # Errors
    /// What kept the run from starting.
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

    /// Who went missing meanwhile, for the reader of this host's own report.
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

    /// Tells the coordinator what this host found, or why it found nothing. Returns a line for
    /// people that says where that is. `told` hears what there is to wait for.
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
        // From here on the report is the sign of life.
        self.beats.take().iter().for_each(JoinHandle::abort);
        // Before anybody is waited for: a second signal, or a kill, may come at any time.
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
                // One that stays is litter, and nothing worse.
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

/// Names this process to the coordinator: who registers again with it is the same prober.
fn instance() -> String {
    use std::hash::{BuildHasher, Hasher, RandomState};
    let word = || RandomState::new().build_hasher().finish();
    format!(
        "{:016x}{:016x}",
        word(),
        word() ^ u64::from(std::process::id())
    )
}

/// `voicegw`'s coordinator names the wall clock's time, which both hosts are to agree on. A time
/// that has passed is now.
async fn wait_for_wall_clock(unix_seconds: Option<f64>) {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let wait = Duration::try_from_secs_f64(unix_seconds.unwrap_or(0.0))
        .unwrap_or_default()
        .saturating_sub(now);
    tokio::time::sleep(wait).await;
}
