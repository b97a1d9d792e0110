//! The engine and what it speaks, in memory and in virtual time: no sockets, no clocks, nothing
//! that a busy machine could change.

#[path = "../common/mod.rs"]
mod common;

mod attribution;
mod bandwidth;
mod clocks;
mod data;
mod handshake;
mod layers;
mod media;
mod playout;
mod presence;
mod recording;
mod red;
mod rtc_peer;
mod sfu_router;
mod wire;
mod worst;
mod wrap;
