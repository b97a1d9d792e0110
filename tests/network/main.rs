//! Whole runs over a bad network between namespaces. Tests that measure take turns
//! (`common::program::alone`).

#[path = "../common/mod.rs"]
mod common;

mod attribution;
mod bad_network;
mod bandwidth;
mod costs;
mod paths;
mod places;
mod server_metrics;
mod transports;
mod truth;
mod turn;
mod wishes;
