//! Parts that several benches share: a publisher whose packets all stacks get, the other end of
//! every connection, and the stacks that are compared.
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

/// Returns whether the full size is requested, as `cargo bench` does. Among the tests everything
/// runs once in a small size, so that it does not rot.
pub fn is_full() -> bool {
    std::env::args().any(|argument| argument == "--bench")
}

/// Set if nothing is to be timed. This is the case under callgrind: the clock's library does not
/// find what it looks for there, and only counts are wanted.
pub static UNTIMED: AtomicBool = AtomicBool::new(false);

/// Returns the CPU time of this thread so far, which excludes what others on the host do. Zero if
/// [`UNTIMED`] is set.
pub fn cpu_clock() -> Duration {
    if UNTIMED.load(Ordering::Relaxed) {
        Duration::ZERO
    } else {
        net::thread_cpu()
    }
}

/// SSRC of the only track of a connection.
pub const SSRC: u32 = 0x1000_0001;

/// Id of the header extension for transport-wide sequence numbers, in benches that negotiate it. It
/// is the id that `rtc` offers, because the other stacks follow.
pub const TRANSPORT_CC: u8 = 4;

pub const fn payload_type(kind: Kind) -> u8 {
    match kind {
        Kind::Audio => 111,
        Kind::Video => 96,
    }
}

/// Returns the name of the media in the names of rows.
pub const fn media(kind: Kind) -> &'static str {
    match kind {
        Kind::Audio => "audio",
        Kind::Video => "video",
    }
}
