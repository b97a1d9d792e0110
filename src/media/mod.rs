//! Media that is sent, and how it is recognised when it arrives: generated Opus and VP8, frame
//! identity, reassembly.

pub mod assemble;
pub mod identity;
pub mod opus;
pub mod packetize;
pub mod vp8;
