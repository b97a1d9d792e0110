//! What one who leads is asked for.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::state::OnMissing;
use crate::run::RunSpec;
use crate::secrets::Secret;

/// A run that other hosts play.
#[derive(Debug)]
pub struct Coordinate {
    /// The load of each host, or of all.
    pub run: RunSpec,
    pub expect: u32,
    pub bind: SocketAddr,
    /// `None`: one is made, unless `no_auth`.
    pub token: Option<Secret>,
    pub no_auth: bool,
    /// Names with a dot that lead here, for who is let in without a token.
    pub names: Vec<String>,
    pub on_missing: OnMissing,
    /// `None`: one in the working directory, which goes when the result has been told.
    pub journal: Option<PathBuf>,
    pub rooms_per_vantage: bool,
    pub total: bool,
    /// Certificate and key.
    pub tls: Option<(PathBuf, PathBuf)>,
    pub missing_after: Duration,
    pub wait_for_probers: Duration,
}
