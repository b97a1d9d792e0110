//! Tests of what the code under test allocates. They have a binary of their own, because the
//! counter is the allocator of the process. It counts each thread separately.

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
