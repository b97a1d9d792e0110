//! Estimates how much a path carries, from the send and arrival times of packets: Google Congestion
//! Control (draft-ietf-rmcat-gcc-02) with the filter and the constants of today's libwebrtc.
//!
//! Both ends use the same parts. [`delay`] watches the queue of the bottleneck. It puts packets
//! that were sent within 5 ms into one group, and fits a line through the delay of each group
//! against the one before. A line that rises for too long means that the queue grows. [`rate`]
//! turns this into a bitrate: down to 0.85 of the received rate when the queue grows, otherwise up
//! by 8 % a second, or slowly near the rate at which the queue grew last.
//! [`remb::ReceiveEstimator`] is the receiver's estimate, from packets with abs-send-time.
//! [`send::SendEstimator`] is the sender's estimate, from transport-wide feedback, with loss and
//! probes.
//!
//! The code is our own, because the libraries that have an estimator do not fit. str0m's estimator
//! is private. The one in webrtc-rs' `rtc-interceptor` uses the Kalman filter of the first draft,
//! which libwebrtc gave up, and allocates for each report; thousands of subscribers need one each.
//!
//! Nothing here allocates after construction, reads a clock or knows a socket.

pub mod delay;
pub mod rate;
pub mod remb;
pub mod send;
