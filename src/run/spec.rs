//! Everything that a run is asked to do: the plan, and the settings around it.

use std::fmt;

use crate::plan::Plan;
use crate::report::{Destinations, Judging};
use crate::server_metrics::PageUrl;
use crate::signal::trust::TrustSpec;
use crate::signal::turn::TurnServer;
use crate::signal::{Gateway, Seats};

/// A load test.
#[derive(Debug)]
pub struct RunSpec {
    pub plan: Plan,
    /// API key and secret. `None` for the embedded SFU, which gets fresh ones, and in a dry run.
    pub credentials: Option<Credentials>,
    /// Tokens given by the user, for participants to join with.
    pub tokens: Option<Seats>,
    /// Headers and token place of every request to the server, for whatever stands in front of it.
    pub gateway: Gateway,
    /// Certificates that are trusted.
    pub trust: TrustSpec,
    /// Relays named by the user, for media to go through.
    pub turn: Vec<TurnServer>,
    pub judging: Judging,
    pub destinations: Destinations,
    /// The server's own Prometheus pages, one a node.
    pub server_metrics: Vec<PageUrl>,
    /// Number of engine threads. `None`: as many as the host can take.
    pub threads: Option<usize>,
    pub dry_run: bool,
    /// Set if the user asked for nothing. The run then shows what throng can do.
    pub is_tour: bool,
    /// Shows no progress, and no text beyond the report.
    pub quiet: bool,
    /// Shows progress as plain lines, never redrawn.
    pub no_live: bool,
    /// Remarks for the user about the options given.
    pub warnings: Vec<String>,
}

/// The API key and secret of the server under test.
#[derive(Clone)]
pub struct Credentials {
    pub api_key: String,
    pub api_secret: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(..)")
    }
}
