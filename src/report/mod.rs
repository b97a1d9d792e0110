//! From what was measured to what people and scripts read: verdict, terminal text, JSON, one line a
//! participant, percentile files.
//!
//! An [`Outcome`] goes in, complete and plain; nothing here measures or reads a clock. Writers
//! share [`emit`], so a reader that leaves early (`| head`) ends the output and nothing else.

pub mod hgrm;
pub mod json;
pub mod judge;
pub mod participants;
pub mod progress;
pub mod server;
pub mod server_cost;
mod sinks;
mod style;
pub mod text;
pub mod tiers;
pub mod watch;
pub mod worst;

use std::io::{self, ErrorKind, Write};
use std::time::Duration;

pub use judge::{Judgement, Judging, Threshold, Verdict, judge};
pub use sinks::{Destinations, Sinks};
pub use style::Style;

use crate::knee::KneeAnswer;
pub use crate::measure::JoinTimeline;
pub use crate::measure::second::{HostDrops, Second};
pub use crate::measure::stalls::{Cause, Side, Stall};
use crate::measure::{Histogram, Kind, Media, Record};
use crate::plan::{MediaTransport, Plan};
use crate::server_metrics::{Account, NodeRow};
use crate::sfu::SendMode;
use crate::sfu::server::ServerStatistics;
use crate::signal::AddressUse;

/// The version that reports carry.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Everything that one run found out.
pub struct Outcome {
    /// Since 1970, by this host's clock.
    pub started: Duration,
    /// Since 1970, by this host's clock.
    pub finished: Duration,
    pub plan: Plan,
    pub judging: Judging,
    pub target: TargetInfo,
    /// One per tier; one where there is no ramp.
    pub steps: Vec<Step>,
    /// Tiers that it did not come to.
    pub unmeasured: Vec<Unmeasured>,
    /// What a search has found; `None` without one, and where it did not come to its end.
    pub capacity: Option<Capacity>,
    /// The whole run.
    pub totals: Step,
    /// One row a second.
    pub series: Vec<RunSample>,
    pub engine: EngineHealth,
    /// How near it came to what this host was calibrated for; `None` where it was not.
    pub nearness: Option<Nearness>,
    /// What the embedded SFU says of itself; `None` where the target was another.
    pub sfu: Option<EmbeddedSfu>,
    /// What else is a reason to fail: of a run that is one hold; and why any run came to its end
    /// before its time, where the server ended it.
    pub complaints: Vec<String>,
    /// What the server's own pages said; `None` where none was asked for.
    pub server: Option<Account>,
    /// Why the run ended before its time; `None` if it did not.
    pub partial: Option<String>,
    /// What the reader should know and the verdict does not say.
    pub notes: Vec<String>,
    /// Why joins failed, with counts.
    pub failures: Vec<(String, u64)>,
    pub participants: Vec<ParticipantOutcome>,
}

/// The server under test, as it turned out to be. Address and mode are the plan's.
#[derive(Clone, Debug)]
pub struct TargetInfo {
    pub kind: TargetKind,
    /// As the server said in its Join response.
    pub server_version: Option<String>,
    /// Where signalling was connected to: the addresses of the server's name, or those of the
    /// proxy before it.
    pub addresses: Vec<AddressUse>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetKind {
    LiveKit,
    Embedded,
}

impl TargetKind {
    /// As the JSON report names it.
    pub const fn name(self) -> &'static str {
        match self {
            TargetKind::LiveKit => "livekit",
            TargetKind::Embedded => "embedded",
        }
    }
}

/// One tier of a run, or all of it.
#[derive(Clone, Default)]
pub struct Step {
    pub name: String,
    pub participants: u32,
    /// What rates are divided by: the time during which the record's media was counted.
    pub seconds: f64,
    pub record: Record,
    /// Where it is one of several: what is known of it alone.
    pub tier: Option<TierFacts>,
}

/// What a tier is judged by, besides its record.
#[derive(Clone, Debug, Default)]
pub struct TierFacts {
    /// In each room; `None` where the number is of no room.
    pub subscribers: Option<u32>,
    /// Why the generator was the limit while it lasted; empty where it was not.
    pub invalid: Vec<String>,
    /// What else is a reason to fail.
    pub complaints: Vec<String>,
    /// Why it ended before its time; `None` if it did not.
    pub cut_short: Option<String>,
}

/// What a search for the most subscribers per room has found.
#[derive(Clone, Debug, PartialEq)]
pub struct Capacity {
    pub answer: KneeAnswer,
    /// The number at which it broke first, and why.
    pub broke_first: Option<(u32, Vec<String>)>,
    pub points: Vec<CapacityPoint>,
}

/// One point of a search.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct CapacityPoint {
    /// Per room.
    pub subscribers: u32,
    pub phase: &'static str,
    pub verdict: &'static str,
}

/// A tier that was asked for, and never held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unmeasured {
    pub name: String,
    pub subscribers: Option<u32>,
}

/// One second of the run. `None` is unknown, which is not zero.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct RunSample {
    /// Seconds since the start of the run.
    pub t: f64,
    /// The step ([`Step::name`]) in whose hold all of this second lies; `None` while people join,
    /// settle or leave.
    pub step: Option<String>,
    pub participants: u32,
    pub joins_per_second: f64,
    pub packets_sent_per_second: f64,
    pub packets_received_per_second: f64,
    pub bytes_sent_per_second: f64,
    pub bytes_received_per_second: f64,
    /// Residual RTP loss of this second: packets.
    pub packets_lost: u64,
    pub rtt_us_p50: Option<u64>,
    pub one_way_us_p50: Option<u64>,
    pub one_way_us_p99: Option<u64>,
    pub tick_late_us_p99: Option<u64>,
    /// Cores that the process kept busy.
    pub cpu_cores: Option<f64>,
    /// The mean of what receivers told the server by REMB; `None` where none did.
    pub downlink_estimate_bps: Option<u64>,
    /// The mean of what publishers that obey their estimate made of their paths; `None` where none
    /// did.
    pub uplink_estimate_bps: Option<u64>,
    #[serde(flatten)]
    pub generator: Second,
    /// What each of the server's pages said, in the order in which they were named: `None` for one
    /// that was not read in this second, and for all where none was asked for.
    pub server: Option<Vec<Option<NodeRow>>>,
}

/// The embedded SFU's own account of the run.
#[derive(Clone, Debug)]
pub struct EmbeddedSfu {
    pub send: SendMode,
    pub routers: usize,
    /// CPU time of all its threads, signalling included; `None` where the kernel does not say.
    pub cpu_seconds: Option<f64>,
    pub statistics: ServerStatistics,
}

impl EmbeddedSfu {
    /// CPU for each media packet that it sent.
    pub fn us_per_packet_sent(&self) -> Option<f64> {
        let media = &self.statistics.media;
        let sent = media.media_out + media.resends_out;
        self.cpu_seconds
            .filter(|_| sent > 0)
            .map(|seconds| seconds * 1e6 / sent as f64)
    }
}

/// How well the generator did. `tick_late` and `send_lag` are in the totals' record.
#[derive(Clone, Default)]
pub struct EngineHealth {
    pub threads: usize,
    /// User and system time of the process since its media was made, without the embedded SFU's
    /// threads; `None` where the kernel does not tell them apart.
    pub cpu_seconds: Option<f64>,
    pub us_per_packet: Option<f64>,
    pub bytes_per_participant: Option<u64>,
    pub rss_peak_bytes: Option<u64>,
    /// Lateness of a bare timer thread in the same run: the host's own floor.
    pub floor_tick_late: Option<Histogram>,
    /// Datagrams dropped on this host, by place.
    pub host_drops: HostDrops,
    /// How often a CPU left received packets for later.
    pub softnet_squeezed: Option<u64>,
    /// Taken by the hypervisor, over all CPUs.
    pub stolen_seconds: Option<f64>,
    /// How often and how long this process's control group was kept from running.
    pub throttled_times: Option<u64>,
    pub throttled_seconds: Option<f64>,
    /// What every thread used, and how long it waited for a CPU; empty where the kernel does not
    /// say.
    pub thread_times: Vec<ThreadTime>,
    /// Who stood still, and when.
    pub stalls: Vec<Stall>,
    pub valid: bool,
    /// Why the generator was the limit; empty where `valid`.
    pub reasons: Vec<String>,
}

/// A run beside this host's calibration.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Nearness {
    /// Since 1970, by this host's clock.
    pub calibrated_at: Duration,
    /// RTP packets sent and received, of the busiest second.
    pub packets_per_second_peak: f64,
    /// What the run's engine threads bear, by the CPU time that a packet took in the calibration.
    pub packets_per_second_ceiling: f64,
}

impl Nearness {
    pub fn share(&self) -> f64 {
        self.packets_per_second_peak / self.packets_per_second_ceiling
    }
}

/// The threads of one name, over the whole run. One that ended within a second is not in it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct ThreadTime {
    pub name: String,
    pub cpu_seconds: f64,
    /// Ready to run, and waiting for a CPU.
    pub run_queue_seconds: f64,
}

/// What became of one participant.
#[derive(Clone, Debug, Default)]
pub struct ParticipantOutcome {
    pub index: u32,
    pub room: String,
    pub identity: String,
    pub publishes_audio: bool,
    pub publishes_video: bool,
    pub subscribes: bool,
    pub timeline: JoinTimeline,
    /// Why the join failed.
    pub failure: Option<String>,
    /// What carried its media when it was in last; `None`: it never was.
    pub transport: Option<MediaTransport>,
    pub disconnects: u32,
    pub rtt_us: Option<u64>,
    pub audio: MediaQuality,
    pub video: MediaQuality,
}

/// What one participant received of one kind of media.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct MediaQuality {
    pub tracks_expected: u64,
    pub tracks_live: u64,
    pub packets_received: u64,
    pub packets_lost_network: u64,
    pub packets_repaired: u64,
    pub packets_lost: u64,
    pub frames_expected: u64,
    pub frames_delivered: u64,
    pub frames_lost_source: u64,
    pub frames_lost_uplink: u64,
    pub frames_lost_sfu: u64,
    pub frames_lost_downlink: u64,
    pub frames_lost_unattributed: u64,
    /// Delivered, and too late for a conversation.
    pub frames_late: u64,
    /// Audio only, by the playout model.
    pub freezes: u64,
    /// By the playout model.
    pub frames_late_for_playout: u64,
    /// By the playout model; `None` for video, where nothing is concealed.
    pub played_us: Option<u64>,
    pub concealed_us: Option<u64>,
    /// By the E-model, of the audio track that fared worst; `None` where nothing was heard.
    pub mos: Option<f64>,
    /// From the worst track: a histogram for every subscription would not fit in memory.
    pub one_way_us_mean: Option<u64>,
    pub one_way_us_max: Option<u64>,
    /// From the worst track, at the end.
    pub jitter_us: Option<u64>,
}

impl MediaQuality {
    /// What was counted since `earlier`, an older value of the same. Tracks are a state; what is no
    /// count is left out.
    #[must_use]
    pub fn since(&self, earlier: &MediaQuality) -> MediaQuality {
        let grown =
            |now: Option<u64>, before: Option<u64>| Some(now?.saturating_sub(before.unwrap_or(0)));
        // A packet thought lost may arrive, and a loss be attributed anew: differences of those
        // stop at zero.
        MediaQuality {
            tracks_expected: self.tracks_expected,
            tracks_live: self.tracks_live,
            packets_received: self
                .packets_received
                .saturating_sub(earlier.packets_received),
            packets_lost_network: self
                .packets_lost_network
                .saturating_sub(earlier.packets_lost_network),
            packets_repaired: self
                .packets_repaired
                .saturating_sub(earlier.packets_repaired),
            packets_lost: self.packets_lost.saturating_sub(earlier.packets_lost),
            frames_expected: self.frames_expected.saturating_sub(earlier.frames_expected),
            frames_delivered: self
                .frames_delivered
                .saturating_sub(earlier.frames_delivered),
            frames_lost_source: self
                .frames_lost_source
                .saturating_sub(earlier.frames_lost_source),
            frames_lost_uplink: self
                .frames_lost_uplink
                .saturating_sub(earlier.frames_lost_uplink),
            frames_lost_sfu: self.frames_lost_sfu.saturating_sub(earlier.frames_lost_sfu),
            frames_lost_downlink: self
                .frames_lost_downlink
                .saturating_sub(earlier.frames_lost_downlink),
            frames_lost_unattributed: self
                .frames_lost_unattributed
                .saturating_sub(earlier.frames_lost_unattributed),
            frames_late: self.frames_late.saturating_sub(earlier.frames_late),
            freezes: self.freezes.saturating_sub(earlier.freezes),
            frames_late_for_playout: self
                .frames_late_for_playout
                .saturating_sub(earlier.frames_late_for_playout),
            played_us: grown(self.played_us, earlier.played_us),
            concealed_us: grown(self.concealed_us, earlier.concealed_us),
            ..MediaQuality::default()
        }
    }
}

impl Step {
    pub fn media(&self, kind: Kind) -> &Media {
        match kind {
            Kind::Audio => &self.record.audio,
            Kind::Video => &self.record.video,
        }
    }
}

/// Writes all of `text` and flushes. That the reader has gone is no error.
pub fn emit(out: &mut dyn Write, text: &str) -> io::Result<()> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Closed(ErrorKind);

    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_left_is_no_error_but_a_full_disk_is() {
        assert!(emit(&mut Closed(ErrorKind::BrokenPipe), "report").is_ok());
        assert!(emit(&mut Closed(ErrorKind::StorageFull), "report").is_err());
    }
}
