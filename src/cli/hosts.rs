//! Flags of a run that several hosts share.

use std::path::PathBuf;

use clap::Args;

use super::{Membership, Probe, RefusedFlag, RunArgs, secret_given, set};
use crate::coordinator::protocol::{TOKEN_VARIABLE, URL_VARIABLE};
use crate::host;
use crate::plan::scenario::must_be_a_name;
use crate::plan::{HostRole, ServerUrl, Target, WEIGHT_MAX};
use crate::secrets::cleaned;
use crate::sfu::SendMode;
use crate::signal::Secret;

/// Variables that give a prober's label if no flag does: first the one of `voicegw`, then Fly's.
const VANTAGE_VARIABLES: [&str; 2] = ["VOICEGW_REGION", "FLY_REGION"];

#[derive(Debug, Args)]
#[command(next_help_heading = "Many hosts")]
pub(super) struct HostsArgs {
    /// Take part in the run of the coordinator at this address [env: COORDINATOR_URL]
    #[arg(long, value_name = "URL")]
    pub(super) report_to: Option<String>,
    /// What the result calls this host [default: VOICEGW_REGION, FLY_REGION or the host's name]
    #[arg(long, value_name = "LABEL")]
    pub(super) vantage: Option<String>,
    /// Whom this host plays: publish, subscribe or both [default: both]
    #[arg(long, value_name = "ROLE", value_parser = role)]
    pub(super) role: Option<HostRole>,
    /// This host counts as so many of weight 1 [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=WEIGHT_MAX as i64))]
    pub(super) weight: Option<u32>,
    /// What lets probers in. Others on this host see what stands on a command line: rather
    /// --coordinator-token-file [env: COORDINATOR_TOKEN]
    #[arg(long, value_name = "TOKEN", conflicts_with = "coordinator_token_file")]
    pub(super) coordinator_token: Option<String>,
    /// A file with nothing but that token in it
    #[arg(long, value_name = "FILE")]
    pub(super) coordinator_token_file: Option<PathBuf>,
}

fn role(text: &str) -> Result<HostRole, RefusedFlag> {
    let known = HostRole::ALL.into_iter().find(|role| role.name() == text);
    known.ok_or_else(|| "write publish, subscribe or both".into())
}

impl HostsArgs {
    /// Returns the coordinator whose run this host is to take part in, and the flag or variable
    /// that names it.
    pub(super) fn coordinator(
        &self,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Option<(String, &'static str)> {
        let flag = self.report_to.clone().map(|url| (url, "--report-to"));
        flag.or_else(|| set(env, URL_VARIABLE).map(|url| (url, URL_VARIABLE)))
    }

    /// Refuses flags of probers if there is no coordinator to report to.
    pub(super) fn must_have_a_coordinator(&self) -> Result<(), RefusedFlag> {
        let given = [
            ("--vantage", self.vantage.is_some()),
            ("--role", self.role.is_some()),
            ("--weight", self.weight.is_some()),
            ("--coordinator-token", self.coordinator_token.is_some()),
            (
                "--coordinator-token-file",
                self.coordinator_token_file.is_some(),
            ),
        ];
        match given.into_iter().find(|(_, given)| *given) {
            Some((flag, _)) => Err(format!(
                "{flag} is for a prober: add --report-to with the coordinator's address"
            )
            .into()),
            None => Ok(()),
        }
    }

    /// Returns the token that lets probers in, as the flags give it.
    pub(super) fn token(&self) -> Result<Option<String>, RefusedFlag> {
        secret_given(
            &self.coordinator_token,
            self.coordinator_token_file.as_deref(),
            "--coordinator-token-file",
        )
    }

    fn config(
        &self,
        (url, name): (String, &str),
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Membership, RefusedFlag> {
        let url = url.trim();
        // `ServerUrl` also accepts LiveKit's schemes.
        let scheme = url.split_once("://").map_or("", |(scheme, _)| scheme);
        if !["http", "https"].contains(&scheme.to_ascii_lowercase().as_str()) {
            return Err(format!("{name} needs a scheme: http:// or https://").into());
        }
        let coordinator: ServerUrl = url.parse().map_err(|why| format!("{name} {why}"))?;
        let vantage = self.vantage.clone().map(|vantage| (vantage, "--vantage"));
        let vantage = vantage.or_else(|| {
            VANTAGE_VARIABLES
                .iter()
                .find_map(|name| Some((set(env, name)?, *name)))
        });
        if let Some((vantage, name)) = &vantage {
            must_be_a_name(vantage).map_err(|fault| format!("{name} {fault}"))?;
        }
        let token = self.token()?.or_else(|| set(env, TOKEN_VARIABLE));
        Ok(Membership {
            coordinator,
            token: token.map(|token| Secret::new(cleaned(&token))),
            vantage: vantage.map_or_else(host::name, |(vantage, _)| vantage),
            role: self.role.unwrap_or_default(),
            weight: self.weight.unwrap_or(1),
        })
    }
}

impl RunArgs {
    /// Returns one host of a run that the coordinator at this address leads. The coordinator
    /// decides what this host plays. These flags decide how it is connected, and where its own
    /// report goes.
    pub(super) fn into_probe(
        mut self,
        coordinator: (String, &'static str),
        env: &dyn Fn(&str) -> Option<String>,
        cpus: usize,
        fresh: u64,
    ) -> Result<Probe, RefusedFlag> {
        let config = self.hosts.config(coordinator, env)?;
        self.must_be_the_coordinators()?;
        // If no server is named here, the coordinator names one.
        let target = self
            .target
            .server(env)?
            .unwrap_or(Target::embedded(SendMode::Plain));
        let has_flags = self.target.names_credentials();
        let credentials = match self.target.credentials(env) {
            Err(why) if has_flags => return Err(why),
            given => given.ok(),
        };
        let shape_given = self.shape.is_given();
        // voicegw's coordinator leaves this to its probers: one participant speaks, and all hear
        // everybody.
        if !shape_given {
            self.shape.publishers = Some(1);
        }
        self.shape.meeting = true;
        let mut run = self.into_run_against(target, cpus, fresh)?;
        run.credentials = credentials;
        run.is_tour = false;
        Ok(Probe {
            config,
            run,
            shape_given,
        })
    }

    /// Refuses flags that a prober cannot follow, because the user would rely on them.
    fn must_be_the_coordinators(&self) -> Result<(), RefusedFlag> {
        let (shape, pace, judging) = (&self.shape, &self.pace, &self.judging);
        let given = [
            ("--room", shape.room.is_some()),
            ("--room-count", shape.room_count.is_some()),
            ("--subscribers", shape.subscribers.is_some()),
            ("--meeting", shape.meeting),
            ("--duration", pace.duration.is_some()),
            ("--ramp", pace.ramp.is_some()),
            ("--ramp-time", pace.ramp_time.is_some()),
            ("--warmup", pace.warmup.is_some()),
            ("--target-rtt-ms", judging.target_rtt_ms.is_some()),
            ("--allow-unjudged", judging.allow_unjudged),
            ("--seed", self.engine.seed.is_some()),
            ("--dry-run", self.engine.dry_run),
            ("--server-metrics", !self.output.server_metrics.is_empty()),
            ("--sfu-send", self.target.sfu_send.is_some()),
        ];
        match given.into_iter().find(|(_, given)| *given) {
            Some((flag, _)) => Err(format!(
                "{flag} is not a prober's to say: give it to the coordinator, or leave it out"
            )
            .into()),
            None => Ok(()),
        }
    }
}
