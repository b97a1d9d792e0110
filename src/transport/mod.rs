//! One peer connection, without sockets or clocks. ICE and DTLS set it up; then SRTP, RTP and RTCP
//! carry media in place.

pub mod bandwidth;
pub mod data;
mod dtls_crypto;
pub mod feedback;
pub mod peer;
pub mod receive;
pub mod reports;
pub mod resend;
pub mod rtcp;
pub mod rtp;
pub mod sdp;
pub mod sent;
pub mod sequence;
pub mod srtp;
