//! Parameters of a coordinator.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::state::OnMissing;
use crate::run::RunSpec;
use crate::secrets::Secret;

/// A run that other hosts play.
#[derive(Debug)]
pub struct Coordinate {
    /// Load of each host, or of all hosts.
    pub run: RunSpec,
    pub expect: u32,
    pub bind: SocketAddr,
    /// Token that admits probers. `None`: one is made, unless `no_auth` is set.
    pub token: Option<Secret>,
    pub no_auth: bool,
    /// Names with a dot that lead here, for access without a token.
    pub names: Vec<String>,
    pub on_missing: OnMissing,
    /// Path of the journal. `None`: one in the working directory, which is removed when the result
    /// has been shown.
    pub journal: Option<PathBuf>,
    pub rooms_per_vantage: bool,
    pub total: bool,
    /// Certificate and key files.
    pub tls: Option<(PathBuf, PathBuf)>,
    pub missing_after: Duration,
    pub wait_for_probers: Duration,
}
