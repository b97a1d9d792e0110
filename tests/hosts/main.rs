//! Runs over several hosts: the coordinator, its probers, and the faults between them.

#[path = "../common/mod.rs"]
mod common;

mod coordinator;
mod faults;
mod prober;
mod runs;
