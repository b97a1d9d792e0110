//! Flags of the coordinator, which leads a run over several hosts.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::{Coordinate, Credentials, RefusedFlag, RunArgs, RunSpec, set, whole_number};
use crate::coordinator::access::must_be_usable;
use crate::coordinator::protocol::{PROBERS_MAX, TIERS_MAX, TOKEN_VARIABLE};
use crate::coordinator::state::OnMissing;
use crate::plan::{PARTICIPANTS_MAX, Target};
use crate::secrets::cleaned;
use crate::signal::Secret;

const DEFAULT_PORT: u16 = 8787;
const DEFAULT_MISSING_AFTER: Duration = Duration::from_secs(30);
const DEFAULT_WAIT: Duration = Duration::from_secs(600);

#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Many hosts")]
pub(super) struct CoordinateArgs {
    /// Lead a run that other hosts play: wait for them, keep them in step, merge what they
    /// measured
    #[arg(long)]
    pub(super) coordinator: bool,
    /// Hosts that the run waits for
    #[arg(long, value_name = "N", value_parser = whole_number)]
    expect: Option<u32>,
    /// Where they find the coordinator [default: 8787]
    #[arg(long, value_name = "PORT")]
    coordinator_port: Option<u16>,
    /// The address that it listens on [default: 0.0.0.0, all of this host]
    #[arg(long, value_name = "ADDR")]
    coordinator_bind: Option<IpAddr>,
    /// Let everybody in, without a token; pages of other sites in a browser are not
    #[arg(long)]
    no_auth: bool,
    /// With --no-auth: a name with a dot that hosts reach the coordinator by (repeatable)
    #[arg(long, value_name = "NAME", value_parser = host_name)]
    coordinator_host: Vec<String>,
    /// What becomes of the run when a host is lost [default: continue]
    #[arg(long, value_name = "HOW")]
    on_missing: Option<OnMissingArg>,
    /// What the run is written down in, to go on after a crash [default: throng-TAG.journal]
    #[arg(long, value_name = "FILE")]
    journal: Option<PathBuf>,
    /// Every host has rooms of its own, instead of all hosts being in the same
    #[arg(long)]
    rooms_per_vantage: bool,
    /// Tiers (with --rooms-per-vantage: rooms) are of all hosts together, split by weight
    #[arg(long)]
    total: bool,
    /// Speak TLS with this certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Its private key (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// A host that says nothing for so long is lost [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = missing_after)]
    missing_after: Option<Duration>,
    /// How long the next host is waited for before the run begins [default: 10m]
    #[arg(long, value_name = "TIME", value_parser = wait_for_probers)]
    wait_for_probers: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OnMissingArg {
    Continue,
    Stop,
}

impl From<OnMissingArg> for OnMissing {
    fn from(how: OnMissingArg) -> OnMissing {
        match how {
            OnMissingArg::Continue => OnMissing::Continue,
            OnMissingArg::Stop => OnMissing::Stop,
        }
    }
}

impl CoordinateArgs {
    /// Refuses flags of a coordinator if there is none.
    pub(super) fn must_have_a_coordinator(&self) -> Result<(), RefusedFlag> {
        let given = [
            ("--expect", self.expect.is_some()),
            ("--coordinator-port", self.coordinator_port.is_some()),
            ("--coordinator-bind", self.coordinator_bind.is_some()),
            ("--no-auth", self.no_auth),
            ("--coordinator-host", !self.coordinator_host.is_empty()),
            ("--on-missing", self.on_missing.is_some()),
            ("--journal", self.journal.is_some()),
            ("--rooms-per-vantage", self.rooms_per_vantage),
            ("--total", self.total),
            ("--tls-cert", self.tls_cert.is_some()),
            ("--missing-after", self.missing_after.is_some()),
            ("--wait-for-probers", self.wait_for_probers.is_some()),
        ];
        match given.into_iter().find(|(_, given)| *given) {
            Some((flag, _)) => Err(format!(
                "{flag} is for the one who leads a run over several hosts: add --coordinator"
            )
            .into()),
            None => Ok(()),
        }
    }

    fn expect(&self) -> Result<u32, RefusedFlag> {
        let expect = self
            .expect
            .ok_or("--coordinator waits for hosts: add --expect with their number")?;
        match expect as usize {
            0 => Err("--expect 0 waits for nobody: write how many hosts take part".into()),
            1..=PROBERS_MAX => Ok(expect),
            _ => Err(format!(
                "--expect {expect} is more than one coordinator leads: at most {PROBERS_MAX}"
            )
            .into()),
        }
    }
}

impl RunArgs {
    pub(super) fn into_coordinate(
        mut self,
        env: &dyn Fn(&str) -> Option<String>,
        cpus: usize,
        fresh: u64,
    ) -> Result<Coordinate, RefusedFlag> {
        if self.hosts.report_to.is_some() {
            return Err("--coordinator leads a run, and --report-to takes part in one: leave one of them out".into());
        }
        let expect = self.coordinate.expect()?;
        let token = self.coordinator_token(env)?;
        self.hosts.must_have_a_coordinator()?;
        self.must_be_a_coordinators()?;
        let target = self.target.server(env)?;
        let credentials = self.server_credentials(target.is_some(), env)?;
        let asked = std::mem::take(&mut self.coordinate);
        let run = self.into_run_against(target.unwrap_or_else(Target::of_hosts), cpus, fresh)?;
        must_be_possible(&run, expect, asked.total)?;
        Ok(Coordinate {
            run: RunSpec {
                credentials,
                tokens: None,
                is_tour: false,
                ..run
            },
            expect,
            bind: SocketAddr::new(
                asked
                    .coordinator_bind
                    .unwrap_or(Ipv4Addr::UNSPECIFIED.into()),
                asked.coordinator_port.unwrap_or(DEFAULT_PORT),
            ),
            token,
            no_auth: asked.no_auth,
            names: asked.coordinator_host,
            on_missing: asked.on_missing.unwrap_or(OnMissingArg::Continue).into(),
            journal: asked.journal,
            rooms_per_vantage: asked.rooms_per_vantage,
            total: asked.total,
            tls: asked.tls_cert.zip(asked.tls_key),
            missing_after: asked.missing_after.unwrap_or(DEFAULT_MISSING_AFTER),
            wait_for_probers: asked.wait_for_probers.unwrap_or(DEFAULT_WAIT),
        })
    }

    fn coordinator_token(
        &mut self,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Option<Secret>, RefusedFlag> {
        let flag = self.hosts.token()?;
        let flag = flag.map(|token| (token, "--coordinator-token"));
        // Without a coordinator these are flags of a prober, so they are removed before those are
        // refused.
        self.hosts.coordinator_token = None;
        self.hosts.coordinator_token_file = None;
        if !self.coordinate.no_auth && !self.coordinate.coordinator_host.is_empty() {
            return Err(
                "--coordinator-host is for --no-auth: who has the token may use any name".into(),
            );
        }
        if self.coordinate.no_auth {
            return match flag {
                Some(_) => Err("--no-auth lets everybody in, and --coordinator-token does not: leave one of them out".into()),
                None => Ok(None),
            };
        }
        let given = flag.or_else(|| set(env, TOKEN_VARIABLE).map(|token| (token, TOKEN_VARIABLE)));
        let Some((token, name)) = given else {
            return Ok(None);
        };
        let token = cleaned(&token);
        must_be_usable(token).map_err(|why| format!("{name}: {why}"))?;
        Ok(Some(Secret::new(token)))
    }

    /// Returns the server's credentials, if they are given. Without them probers need their own,
    /// and the server alone decides when rooms come and go.
    fn server_credentials(
        &self,
        server_is_named: bool,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Option<Credentials>, RefusedFlag> {
        let given = self.target.names_credentials();
        match (server_is_named, self.target.credentials(env)) {
            (true, Ok(credentials)) => Ok(Some(credentials)),
            (true, Err(why)) if given => Err(why),
            (false, _) if given => Err(
                "--api-key and --api-secret are for a server, and none is named: add --url".into(),
            ),
            _ => Ok(None),
        }
    }

    /// Refuses flags that would have no effect, because the user would rely on them.
    fn must_be_a_coordinators(&self) -> Result<(), RefusedFlag> {
        if !self.shape.is_given() && self.pace.most_subscribers().is_none() {
            return Err(
                "nothing says how much load there should be: add --ramp 2,10,25 (subscribers per room of each host), or --subscribers".into(),
            );
        }
        let output = &self.output;
        let of_one_host = [
            ("--participants", output.participants.is_some()),
            ("--hgrm", output.hgrm.is_some()),
            ("--record", output.record.is_some()),
            ("--threads", self.engine.threads.is_some()),
        ];
        if let Some((flag, _)) = of_one_host.into_iter().find(|(_, given)| *given) {
            return Err(format!("{flag} is about one host: give it to a prober").into());
        }
        if self.pace.find_knee {
            return Err(
                "--find-knee searches on one host, and --coordinator has its tiers from the start: write them down with --ramp 2,10,25".into(),
            );
        }
        match self.target.sfu_send {
            Some(_) => {
                Err("--sfu-send does not go with --coordinator: leave one of them out".into())
            }
            None => Ok(()),
        }
    }
}

/// Refuses what is known to be impossible before any host has come.
fn must_be_possible(run: &RunSpec, expect: u32, total: bool) -> Result<(), RefusedFlag> {
    let plan = &run.plan;
    let tiers = plan.scenario.phases.len();
    if tiers > TIERS_MAX {
        return Err(
            format!("--ramp has {tiers} tiers: at most {TIERS_MAX} go over several hosts").into(),
        );
    }
    let hosts = if total { 1 } else { u64::from(expect) };
    let subscribers = u64::from(plan.scenario.subscribers()) * u64::from(plan.scenario.rooms.count);
    match subscribers.checked_mul(hosts) {
        Some(all) if all <= PARTICIPANTS_MAX => Ok(()),
        _ => Err(format!(
            "{expect} hosts would have more than {PARTICIPANTS_MAX} subscribers together: ask for less on each, or for a --total"
        ).into()),
    }
}

fn missing_after(text: &str) -> Result<Duration, RefusedFlag> {
    between(text, Duration::from_secs(3), Duration::from_secs(3_600))
        .ok_or_else(|| "write 3s to 1h".into())
}

fn wait_for_probers(text: &str) -> Result<Duration, RefusedFlag> {
    between(
        text,
        Duration::from_secs(1),
        Duration::from_secs(7 * 24 * 3_600),
    )
    .ok_or_else(|| "write 1s to 7d".into())
}

fn between(text: &str, least: Duration, most: Duration) -> Option<Duration> {
    let seconds = text.parse::<u64>().ok().map(Duration::from_secs);
    let duration = seconds.or_else(|| humantime::parse_duration(text).ok())?;
    (least..=most).contains(&duration).then_some(duration)
}

/// Reads a name as it stands in `Host`, without a port.
fn host_name(text: &str) -> Result<String, RefusedFlag> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if !text.is_empty() && text.chars().all(fits) {
        return Ok(text.to_owned());
    }
    Err("a name alone, without scheme and port: load.example.org".into())
}
