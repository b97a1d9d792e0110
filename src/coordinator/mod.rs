//! Many hosts, one test: a coordinator that gives out the parts, keeps the hosts in step and merges what they measured.

pub mod access;
pub mod clock;
pub mod desk;
pub mod journal;
pub mod place;
pub mod protocol;
pub mod server;
pub mod state;
