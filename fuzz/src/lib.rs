//! Entry point of the fuzzers. The targets are shared with `tests/alloc/fuzz.rs`, which replays
//! their corpora on stable Rust. So both include the targets, and the harnesses in `tests/common`
//! that they use, by path.

mod common;
#[allow(dead_code)]
mod targets;

/// Runs one input of a target.
pub fn run(target: &str, input: &[u8]) {
    (targets::named(target).run)(input);
}
