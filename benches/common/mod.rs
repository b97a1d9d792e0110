//! What several benches share: a publisher whose packets they all get, the other end of every
//! connection, and the stacks that are compared.
#![allow(dead_code)]

pub mod fixture;
pub mod floor;
pub mod origin;
pub mod process;
pub mod remote;
pub mod rtc;
pub mod str0m;
pub mod table;
pub mod throng;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ::throng::measure::Kind;
use ::throng::net;

/// Whether the whole size is asked for: `cargo bench` says so. Among the tests everything runs
/// once, in small, so that it does not rot.
pub fn is_full() -> bool {
    std::env::args().any(|argument| argument == "--bench")
}

/// Set where nothing is to be timed: under callgrind, where the clock's library does not find what
/// it looks for, and counts are what is wanted.
pub static UNTIMED: AtomicBool = AtomicBool::new(false);

/// CPU time of this thread so far: what others on the host do is not in it.
pub fn cpu_clock() -> Duration {
    if UNTIMED.load(Ordering::Relaxed) {
        Duration::ZERO
    } else {
        net::thread_cpu()
    }
}

/// The SSRC of the one track of a connection.
pub const SSRC: u32 = 0x1000_0001;

/// The id of the header extension for transport-wide sequence numbers, where a bench has agreed on
/// it: the one that `rtc` offers, for the others follow.
pub const TRANSPORT_CC: u8 = 4;

pub const fn payload_type(kind: Kind) -> u8 {
    match kind {
        Kind::Audio => 111,
        Kind::Video => 96,
    }
}

/// How rows are called.
pub const fn media(kind: Kind) -> &'static str {
    match kind {
        Kind::Audio => "audio",
        Kind::Video => "video",
    }
}
