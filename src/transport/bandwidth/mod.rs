//! How much a path carries, from when packets were sent and when they came: Google Congestion
//! Control (draft-ietf-rmcat-gcc-02) with the filter and the constants that libwebrtc has today.
//!
//! Both ends use the same three parts. [`delay`] watches the queue of the bottleneck: packets are
//! put together in groups that were sent within 5 ms, a line is laid through how much later than
//! the group before each one came, and a line that rises too long says that the queue grows.
//! [`rate`] turns that into a bitrate: down to 0.85 of what arrives when the queue grows, up by 8 %
//! a second, or slowly near the rate at which it grew last. Beyond that, [`remb::ReceiveEstimator`]
//! is what a receiver tells of packets with abs-send-time, and [`send::SendEstimator`] is a
//! sender's own, from transport-wide feedback, with loss and probes.
//!
//! Own code, because the libraries that have it do not fit: str0m keeps its estimator to itself,
//! and the one of webrtc-rs' `rtc-interceptor` has the Kalman filter of the first draft, which
//! libwebrtc gave up, and allocates for each report; thousands of subscribers need one each.
//!
//! Nothing here allocates after it was made, reads a clock or knows a socket.

pub mod delay;
pub mod rate;
pub mod remb;
pub mod send;
