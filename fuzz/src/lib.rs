//! What the fuzzers run. The targets are shared with `tests/hostile_fuzz.rs`, which replays their corpora on stable, so they and the harnesses that they stand
//! on (`tests/common`) are included by path in both.

#[path = "../../tests/common/hand.rs"]
#[allow(dead_code)]
mod hand;
#[path = "../../tests/common/link.rs"]
#[allow(dead_code)]
mod link;
#[path = "../../tests/common/pair.rs"]
#[allow(dead_code)]
mod pair;
#[path = "../../tests/common/relay.rs"]
#[allow(dead_code)]
mod relay;
#[allow(dead_code)]
mod targets;

/// Runs one input of a target.
pub fn run(target: &str, input: &[u8]) {
    (targets::named(target).run)(input);
}
