//! Turns a coordinator's job into the run that this host plays.

use std::time::Duration;

use super::Membership;
use crate::coordinator::protocol::{Job, JobReply, MalformedMessage};
use crate::plan::scenario::{PhaseTimes, RoomPeople};
use crate::plan::{Part, Target, TargetOrigin, UndealtPlan, UnusableUrl};
use crate::run::RunSpec;

/// Why a job cannot be played, as text for people.
#[derive(Debug, thiserror::Error)]
pub(super) enum UnplayableJob {
    #[error("no server to test: give --url, or LIVEKIT_URL, here or to the coordinator")]
    NoServer,
    #[error("voicegw's coordinator does not say which server to test: give --url, or LIVEKIT_URL")]
    NoServerOfVoicegw,
    #[error(transparent)]
    Url(#[from] UnusableUrl),
    #[error(transparent)]
    Undealt(#[from] UndealtPlan),
    #[error(transparent)]
    Judging(#[from] MalformedMessage),
    #[error(
        "a tier of {clients} has no room for the {publishers} who publish: give fewer --publishers"
    )]
    FullTier { clients: u32, publishers: u32 },
    #[error("voicegw's coordinator names no tier to play")]
    NoTier,
}

/// Makes the run of a job from throng's own coordinator. Everything that defines the run comes from
/// the job. The prober itself decides the server, where it names one, and what this host does with
/// the result.
///
/// # Errors
/// Returns why the job cannot be played, as text for people.
pub(super) fn of_ours(
    job: &Job,
    own: RunSpec,
    shape_given: bool,
) -> Result<RunSpec, UnplayableJob> {
    let mut plan = own.plan;
    // The stages define what is held, and for how long.
    let times = PhaseTimes {
        warmup: Duration::ZERO,
        ..job.scenario.times()
    };
    plan.follow(job.scenario.clone().single(times), job.run_tag);
    plan.part = Some(Part::new(
        job.placement.clone(),
        job.me as usize,
        &plan.scenario,
    )?);
    if plan.target.is_embedded() {
        let url = job.url.as_deref().ok_or(UnplayableJob::NoServer)?;
        plan.target = Target {
            url: url.parse()?,
            origin: TargetOrigin::Coordinator,
        };
    }
    let mut warnings = own.warnings;
    if shape_given {
        warnings.push("--publishers and --video-publishers have no effect: the coordinator says who publishes".to_owned());
    }
    Ok(RunSpec {
        plan,
        warnings,
        judging: job.judging.to_judging()?,
        ..own
    })
}

/// Makes the run of a job from `voicegw`'s coordinator. The job names the room, the number of
/// participants, the durations and the limits. The prober decides what the participants send: by
/// default one of them speaks, and all hear everybody.
///
/// # Errors
/// Returns why the job cannot be played, as text for people.
pub(super) fn of_voicegw(job: &JobReply, own: RunSpec) -> Result<RunSpec, UnplayableJob> {
    let mut plan = own.plan;
    let target = &plan.target;
    if target.is_embedded() {
        return Err(UnplayableJob::NoServerOfVoicegw);
    }
    let publishers = plan.scenario.publishers();
    // The first clients publish.
    let subscribers = |clients: &u32| {
        let subscribers = clients.checked_sub(publishers);
        subscribers.ok_or(UnplayableJob::FullTier {
            clients: *clients,
            publishers,
        })
    };
    let tiers = job
        .ramp
        .iter()
        .map(subscribers)
        .collect::<Result<Vec<u32>, UnplayableJob>>()?;
    let most = tiers.iter().copied().max().ok_or(UnplayableJob::NoTier)?;
    let mut scenario = plan.scenario;
    scenario.rooms.name = Some(job.room.clone());
    scenario.rooms.count = 1;
    let people = RoomPeople {
        subscribers: most,
        meeting: true,
        ..scenario.people()
    };
    scenario.set_people(people);
    let times = PhaseTimes {
        hold: Duration::from_secs_f64(job.duration),
        ..scenario.times()
    };
    plan.scenario = scenario.ramp(&tiers, times);
    let mut judging = own.judging;
    judging.max_loss_pct = job.max_loss;
    judging.target_rtt = Some(Duration::from_secs_f64(job.target_rtt_ms / 1e3));
    Ok(RunSpec {
        plan,
        judging,
        ..own
    })
}

/// Returns the part of a file name that names this run: the run's tag, as in the identities, or
/// `voicegw`'s room.
pub(super) fn run_name(job: &JobReply) -> String {
    job.throng
        .as_ref()
        .map_or_else(|| job.room.clone(), |job| format!("{:08x}", job.run_tag))
}

/// Names this host, for example `vantage 'fra', 2 of 3`.
pub(super) fn whose(config: &Membership, job: Option<&Job>) -> String {
    match job {
        Some(job) => format!(
            "vantage '{}', {} of {}",
            config.vantage,
            job.me + 1,
            job.vantages.len()
        ),
        None => format!("vantage '{}'", config.vantage),
    }
}
