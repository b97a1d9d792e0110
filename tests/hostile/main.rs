//! Servers and clients that lie.

#[path = "../common/mod.rs"]
mod common;

mod client;
mod server;
