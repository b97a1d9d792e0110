//! throng: a load engine for WebRTC SFUs. `docs/architecture.md` follows a packet through these
//! modules.

pub mod calibrate;
pub mod cli;
pub mod codec;
pub mod coordinator;
pub mod engine;
pub mod host;
pub mod http;
pub mod knee;
pub mod measure;
pub mod media;
pub mod metrics_page;
pub mod net;
pub mod path;
pub mod plan;
pub mod preflight;
pub mod prober;
pub mod recording;
pub mod report;
pub mod run;
pub mod secrets;
pub mod seeded;
pub mod server_metrics;
pub mod sfu;
pub mod signal;
pub mod transport;
pub mod units;
pub mod words;
