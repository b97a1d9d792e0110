//! What a run is asked to be: the plan, and what is done around it.

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
    /// `None` for the embedded SFU, which gets fresh ones, and in a dry run.
    pub credentials: Option<Credentials>,
    /// Where participants join with tokens that the user gave.
    pub tokens: Option<Seats>,
    /// What stands in front of the server wants to see this.
    pub gateway: Gateway,
    /// Whose certificates are trusted.
    pub trust: TrustSpec,
    /// The relays that media is to go through, where the user named some.
    pub turn: Vec<TurnServer>,
    pub judging: Judging,
    pub destinations: Destinations,
    /// The server's own Prometheus pages, one a node.
    pub server_metrics: Vec<PageUrl>,
    /// Engine threads; `None`: as many as the host bears.
    pub threads: Option<usize>,
    pub dry_run: bool,
    /// Nothing was asked for: what this run shows is what throng can do.
    pub is_tour: bool,
    /// No progress and no text beyond the report.
    pub quiet: bool,
    /// Progress as plain lines, never redrawn.
    pub no_live: bool,
    /// What the user should know about what was asked.
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
