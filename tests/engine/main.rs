//! Tests of the engine and of the protocols that it speaks, in memory and in virtual time. They use
//! no sockets and do not depend on real time, so a busy machine cannot change a result.

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
