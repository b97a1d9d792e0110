//! Harnesses from `tests/common` that the targets use.
#![allow(dead_code)]

#[path = "../../tests/common/hand.rs"]
pub mod hand;
#[path = "../../tests/common/link.rs"]
pub mod link;
#[path = "../../tests/common/pair.rs"]
pub mod pair;
#[path = "../../tests/common/relay.rs"]
pub mod relay;
