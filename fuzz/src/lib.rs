//! What the fuzzers run. The targets are shared with `tests/alloc/fuzz.rs`, which replays their
//! corpora on stable, so they and the harnesses that they stand on (`tests/common`) are included by
//! path in both.

mod common;
#[allow(dead_code)]
mod targets;

/// Runs one input of a target.
pub fn run(target: &str, input: &[u8]) {
    (targets::named(target).run)(input);
}
