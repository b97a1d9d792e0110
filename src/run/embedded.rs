//! The SFU that a run starts for itself if no server was named.

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::{Credentials, RunSpec};
use crate::net;
use crate::plan::{Resources, TargetOrigin};
use crate::report::EmbeddedSfu;
use crate::secrets::Secrets;
use crate::sfu::server::{DEV_KEY, ServerConfig, SfuServer};
use crate::sfu::{self, SendMode};
use crate::signal::Secret;

/// A running embedded SFU. Dropping it ends it.
pub struct Embedded {
    server: SfuServer,
    send: SendMode,
    routers: usize,
}

impl Embedded {
    /// Starts the SFU if `run` is to test it. Puts its address, and a key pair that nobody else
    /// knows, into `run`.
    ///
    /// # Errors
    /// Returned if the server cannot be started on this host.
    pub fn start_for(run: &mut RunSpec, resources: &Resources) -> Result<Option<Embedded>> {
        let TargetOrigin::Embedded(send) = run.plan.target.origin else {
            return Ok(None);
        };
        let secret = fresh_secret();
        let server = SfuServer::start(ServerConfig {
            send,
            routers: resources.sfu_routers,
            api_secret: Secret::new(secret.clone()),
            ..ServerConfig::loopback(run.plan.scenario.seed)
        })
        .context("the embedded SFU does not start")?;
        run.plan.target.url = server.url().parse().map_err(anyhow::Error::msg)?;
        run.credentials = Some(Credentials {
            api_key: DEV_KEY.to_owned(),
            api_secret: secret,
        });
        Ok(Some(Embedded {
            server,
            send,
            routers: resources.sfu_routers,
        }))
    }

    /// Ends the SFU, and returns its statistics.
    pub fn stop(self) -> EmbeddedSfu {
        let cpu = net::threads_cpu(sfu::THREAD_PREFIX);
        EmbeddedSfu {
            send: self.send,
            routers: self.routers,
            cpu_seconds: cpu.map(|cpu| cpu.as_secs_f64()),
            statistics: self.server.stop(),
        }
    }
}

fn fresh_secret() -> String {
    URL_SAFE_NO_PAD.encode(Secrets::system().bytes::<32>())
}
