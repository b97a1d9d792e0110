//! What the code under test allocates. A binary of its own, because the counter is the process's
//! allocator; it counts on each thread for itself.

#[path = "../common/mod.rs"]
mod common;

mod engine;
mod fuzz;
mod sfu;
// Shared with the fuzzers, which use all of it.
#[path = "../../fuzz/src/targets/mod.rs"]
#[allow(dead_code)]
mod targets;
mod wire;

#[global_allocator]
static ALLOCATOR: common::counting::Counting = common::counting::Counting;
