//! Turns measurements into what people and scripts read: verdict, terminal text, JSON, one line per
//! participant, percentile files.
//!
//! The input is an [`Outcome`], complete and plain. Nothing here measures or reads a clock. Writers
//! share [`emit`], so a reader that stops early (`| head`) ends the output and nothing else.

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
mod transports;
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

/// Version that is shown in reports.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// All results of one run.
pub struct Outcome {
    /// Time since 1970, by this host's clock.
    pub started: Duration,
    /// Time since 1970, by this host's clock.
    pub finished: Duration,
    pub plan: Plan,
    pub judging: Judging,
    pub target: TargetInfo,
    /// One step per tier, or a single one if there is no ramp.
    pub steps: Vec<Step>,
    /// Tiers that the run did not reach.
    pub unmeasured: Vec<Unmeasured>,
    /// Result of a search. `None` without a search, or if it did not finish.
    pub capacity: Option<Capacity>,
    /// The whole run.
    pub totals: Step,
    /// One row a second.
    pub series: Vec<RunSample>,
    pub engine: EngineHealth,
    /// How near the run came to this host's calibrated ceiling. `None` if it was not calibrated.
    pub nearness: Option<Nearness>,
    /// Figures that the embedded SFU reports about itself. `None` for another target.
    pub sfu: Option<EmbeddedSfu>,
    /// Further reasons to fail: those of a run that is a single hold, and for any run, why it ended
    /// early if the server ended it.
    pub complaints: Vec<String>,
    /// Contents of the server's own pages. `None` if none was asked for.
    pub server: Option<Account>,
    /// Why the run ended early. `None` if it did not.
    pub partial: Option<String>,
    /// Facts that the reader should know and the verdict does not tell.
    pub notes: Vec<String>,
    /// Why joins failed, with counts.
    pub failures: Vec<(String, u64)>,
    pub participants: Vec<ParticipantOutcome>,
}

/// The server under test, as it was found. Its address and mode are in the plan.
#[derive(Clone, Debug)]
pub struct TargetInfo {
    pub kind: TargetKind,
    /// Version from the server's Join response.
    pub server_version: Option<String>,
    /// Addresses to which signalling connected: those of the server's name, or those of the proxy
    /// in front of it.
    pub addresses: Vec<AddressUse>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetKind {
    LiveKit,
    Embedded,
}

impl TargetKind {
    /// Name in the JSON report.
    pub const fn name(self) -> &'static str {
        match self {
            TargetKind::LiveKit => "livekit",
            TargetKind::Embedded => "embedded",
        }
    }
}

/// One tier of a run, or the whole run.
#[derive(Clone, Default)]
pub struct Step {
    pub name: String,
    pub participants: u32,
    /// Divisor of rates: the time during which the record's media was counted.
    pub seconds: f64,
    pub record: Record,
    /// The tier's own facts, if it is one of several.
    pub tier: Option<TierFacts>,
}

/// Facts by which a tier is judged, besides its record.
#[derive(Clone, Debug, Default)]
pub struct TierFacts {
    /// Subscribers in each room. `None` if their number is a total.
    pub subscribers: Option<u32>,
    /// Why the generator was the limit during the tier. Empty if it was not.
    pub invalid: Vec<String>,
    /// Further reasons to fail.
    pub complaints: Vec<String>,
    /// Why the tier ended early. `None` if it did not.
    pub cut_short: Option<String>,
}

/// Result of a search for the most subscribers per room.
#[derive(Clone, Debug, PartialEq)]
pub struct Capacity {
    pub answer: KneeAnswer,
    /// The number of subscribers at which it first failed, and the reasons.
    pub broke_first: Option<(u32, Vec<String>)>,
    pub points: Vec<CapacityPoint>,
}

/// One point of a search.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct CapacityPoint {
    /// Subscribers per room.
    pub subscribers: u32,
    pub phase: &'static str,
    pub verdict: &'static str,
}

/// A tier that was asked for and never held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unmeasured {
    pub name: String,
    pub subscribers: Option<u32>,
}

/// One second of the run. `None` means unknown, which is not zero.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct RunSample {
    /// Seconds since the start of the run.
    pub t: f64,
    /// The step ([`Step::name`]) whose hold covers all of this second. `None` while participants
    /// join, settle or leave.
    pub step: Option<String>,
    pub participants: u32,
    pub joins_per_second: f64,
    pub packets_sent_per_second: f64,
    pub packets_received_per_second: f64,
    pub bytes_sent_per_second: f64,
    pub bytes_received_per_second: f64,
    /// Packets of this second that were lost after repair (residual RTP loss).
    pub packets_lost: u64,
    pub rtt_us_p50: Option<u64>,
    pub one_way_us_p50: Option<u64>,
    pub one_way_us_p99: Option<u64>,
    pub tick_late_us_p99: Option<u64>,
    /// Number of cores that the process kept busy.
    pub cpu_cores: Option<f64>,
    /// Mean of the estimates that receivers sent to the server by REMB. `None` if none did.
    pub downlink_estimate_bps: Option<u64>,
    /// Mean of the estimates that publishers made of their paths, for publishers that obey them.
    /// `None` if none did.
    pub uplink_estimate_bps: Option<u64>,
    #[serde(flatten)]
    pub generator: Second,
    /// Row of each of the server's pages, in the order in which they were named. `None` for a page
    /// that was not read in this second, and for all if none was asked for.
    pub server: Option<Vec<Option<NodeRow>>>,
}

/// The embedded SFU's own account of the run.
#[derive(Clone, Debug)]
pub struct EmbeddedSfu {
    pub send: SendMode,
    pub routers: usize,
    /// CPU time of all its threads, signalling included. `None` if the kernel does not tell.
    pub cpu_seconds: Option<f64>,
    pub statistics: ServerStatistics,
}

impl EmbeddedSfu {
    /// CPU time for each media packet that it sent, resends included.
    pub fn us_per_packet_sent(&self) -> Option<f64> {
        let media = &self.statistics.media;
        let sent = media.media_out + media.resends_out;
        self.cpu_seconds
            .filter(|_| sent > 0)
            .map(|seconds| seconds * 1e6 / sent as f64)
    }
}

/// How well the generator kept up. `tick_late` and `send_lag` are in the totals' record.
#[derive(Clone, Default)]
pub struct EngineHealth {
    pub threads: usize,
    /// User and system time of the process since its media was made, without the embedded SFU's
    /// threads. `None` if the kernel does not tell them apart.
    pub cpu_seconds: Option<f64>,
    pub us_per_packet: Option<f64>,
    pub bytes_per_participant: Option<u64>,
    pub rss_peak_bytes: Option<u64>,
    /// Lateness of a bare timer thread in the same run, which is the host's own floor.
    pub floor_tick_late: Option<Histogram>,
    /// Datagrams dropped on this host, by place.
    pub host_drops: HostDrops,
    /// Number of times that a CPU left received packets for later.
    pub softnet_squeezed: Option<u64>,
    /// CPU time taken by the hypervisor, over all CPUs.
    pub stolen_seconds: Option<f64>,
    /// Number of times that this process's control group was throttled, and below it, for how long.
    pub throttled_times: Option<u64>,
    pub throttled_seconds: Option<f64>,
    /// CPU time of every thread, and its waits for a CPU. Empty if the kernel does not tell.
    pub thread_times: Vec<ThreadTime>,
    /// Stalls of the generator, the host and the server, with their times.
    pub stalls: Vec<Stall>,
    pub valid: bool,
    /// Why the generator was the limit. Empty if `valid`.
    pub reasons: Vec<String>,
}

/// A run compared with this host's calibration.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Nearness {
    /// Time since 1970, by this host's clock.
    pub calibrated_at: Duration,
    /// RTP packets sent and received, in the busiest second.
    pub packets_per_second_peak: f64,
    /// Packets that the run's engine threads can handle, given the CPU time of a packet in the
    /// calibration.
    pub packets_per_second_ceiling: f64,
}

impl Nearness {
    pub fn share(&self) -> f64 {
        self.packets_per_second_peak / self.packets_per_second_ceiling
    }
}

/// Times of all threads with one name, over the whole run. A thread that ended within a second is
/// not included.
#[derive(Clone, Debug, serde::Serialize)]
pub struct ThreadTime {
    pub name: String,
    pub cpu_seconds: f64,
    /// Time spent ready to run, waiting for a CPU.
    pub run_queue_seconds: f64,
}

/// Results of one participant.
#[derive(Clone, Debug, Default)]
pub struct ParticipantOutcome {
    pub index: u32,
    pub room: String,
    pub identity: String,
    pub publishes_audio: bool,
    pub publishes_video: bool,
    pub subscribes: bool,
    pub timeline: JoinTimeline,
    /// Why the join failed or the session ended, or what happened to a source that is gone.
    pub failure: Option<String>,
    /// Transport of its media when it was last connected. `None`: it never was.
    pub transport: Option<MediaTransport>,
    pub disconnects: u32,
    pub rtt_us: Option<u64>,
    pub audio: MediaQuality,
    pub video: MediaQuality,
}

/// Media of one kind that one participant received.
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
    /// Frames that were delivered too late for a conversation.
    pub frames_late: u64,
    /// Audio only, according to the playout model.
    pub freezes: u64,
    /// According to the playout model.
    pub frames_late_for_playout: u64,
    /// According to the playout model. `None` for video, where nothing is concealed.
    pub played_us: Option<u64>,
    pub concealed_us: Option<u64>,
    /// According to the E-model, for the audio track that fared worst. `None` if nothing was heard.
    pub mos: Option<f64>,
    /// Mean and maximum of the worst track, because a histogram for every subscription would not
    /// fit in memory.
    pub one_way_us_mean: Option<u64>,
    pub one_way_us_max: Option<u64>,
    /// Jitter of the worst track, at the end.
    pub jitter_us: Option<u64>,
}

impl MediaQuality {
    /// Returns the counts since `earlier`, an older value of the same participant. Tracks are a
    /// state. Values that are not counts are left out.
    #[must_use]
    pub fn since(&self, earlier: &MediaQuality) -> MediaQuality {
        let grown =
            |now: Option<u64>, before: Option<u64>| Some(now?.saturating_sub(before.unwrap_or(0)));
        // A packet counted as lost may arrive, and a loss may be attributed anew. So differences of
        // these counts stop at zero.
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

/// Writes all of `text` and flushes. It is not an error if the reader has gone.
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
