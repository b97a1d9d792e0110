//! The rows of a run's time series, one a second, and the data of the progress line.

use std::time::Duration;

use super::observer::{cpu_between, generator_cpu};
use super::tally::GRACE;
use super::{DRAIN, Test};
use crate::measure::{self, Record};
use crate::report::RunSample;
use crate::report::progress::ProgressSnapshot;
use crate::server_metrics::PageWatch;
use crate::units::Time;

/// Time that a row waits for the engine threads, which report at whole seconds.
const REPORTS_TAKE: Duration = Duration::from_millis(50);

/// Values at the last row. The next row is the difference to them.
pub(super) struct SecondBook {
    at: Time,
    /// Time of the next row, just after a whole second of the run's clock. A row that a stall
    /// delays covers a longer time.
    pub due: Time,
    cpu: Option<Duration>,
    joined: u32,
    /// Sum of the reports since the last row.
    pub record: Record,
    pub last: RunSample,
    /// Whether nothing came in the last row, though something was owed.
    is_silent: bool,
}

impl SecondBook {
    pub fn begin(now: Time) -> SecondBook {
        SecondBook {
            at: now,
            due: now.next_second() + REPORTS_TAKE,
            cpu: generator_cpu(),
            joined: 0,
            record: Record::default(),
            last: RunSample::default(),
            is_silent: false,
        }
    }
}

impl Test<'_> {
    pub(super) fn close_second(&mut self, now: Time) {
        let cpu = generator_cpu();
        let seconds = now.since(self.books.second.at).as_secs_f64();
        let counted = &self.books.second.record;
        let per_second = |count: u64| count as f64 / seconds;
        let (audio, video) = (&counted.audio, &counted.video);
        let mut latency = audio.one_way_latency.clone();
        latency.merge(&video.one_way_latency);
        let sample = RunSample {
            t: now.as_micros() as f64 / 1e6,
            step: self.held_since(self.books.second.at).map(str::to_owned),
            participants: self.present(),
            joins_per_second: per_second(u64::from(
                self.books.sessions.joined - self.books.second.joined,
            )),
            packets_sent_per_second: per_second(audio.packets_sent + video.packets_sent),
            packets_received_per_second: per_second(
                audio.packets_received + video.packets_received,
            ),
            bytes_sent_per_second: per_second(audio.bytes_sent + video.bytes_sent),
            bytes_received_per_second: per_second(audio.bytes_received + video.bytes_received),
            packets_lost: lost_more(audio) + lost_more(video),
            rtt_us_p50: counted.session.rtt_rtcp.quantile(0.5),
            one_way_us_p50: latency.quantile(0.5),
            one_way_us_p99: latency.quantile(0.99),
            tick_late_us_p99: counted.engine.tick_late.quantile(0.99),
            cpu_cores: cpu_between(self.books.second.cpu, cpu)
                .map(|used| used.as_secs_f64() / seconds),
            uplink_estimate_bps: mean_bps(
                counted.bandwidth.uplink_estimate_kbps,
                counted.bandwidth.uplink_estimates,
            ),
            downlink_estimate_bps: mean_bps(
                counted.bandwidth.remb_sent_kbps,
                counted.bandwidth.remb_sent,
            ),
            generator: self
                .observer
                .close_second(self.books.second.at, now, counted),
            server: self.server.as_mut().map(PageWatch::rows),
        };
        let owed = more(audio.frames_expected) + more(video.frames_expected);
        let is_silent = owed > 0 && audio.packets_received + video.packets_received == 0;
        self.books.series.push(sample.clone());
        let second = &mut self.books.second;
        second.record.clear();
        (second.at, second.due) = (now, now.next_second() + REPORTS_TAKE);
        (second.cpu, second.joined, second.last) = (cpu, self.books.sessions.joined, sample);
        second.is_silent = is_silent;
    }

    pub(super) fn present(&self) -> u32 {
        self.books.sessions.present.len() as u32
    }

    pub(super) fn snapshot(&self, now: Time) -> ProgressSnapshot {
        let expected = [&self.books.record.audio, &self.books.record.video]
            .map(|media| media.packets_received + media.packets_repaired + media.packets_lost)
            .iter()
            .sum::<u64>();
        let lost = self.books.record.audio.packets_lost + self.books.record.video.packets_lost;
        ProgressSnapshot {
            elapsed: now.since(Time::ZERO),
            // The length of one host's part is decided by the coordinator.
            total: self
                .plan
                .length(GRACE)
                .filter(|_| self.plan.part.is_none())
                .map(|length| length + DRAIN),
            tier: self
                .stages
                .tier
                .as_ref()
                .filter(|tier| !tier.plan.is_whole)
                .map(|tier| tier.plan.name.clone()),
            joined: if self.plan.has_tiers() {
                self.present()
            } else {
                self.books.sessions.joined
            },
            planned: if self.plan.has_tiers() {
                self.books.presence.due_count()
            } else {
                self.plan.total_participants()
            },
            failed: self.books.sessions.failed,
            loss: (expected > 0).then(|| lost as f64 / expected as f64),
            is_silent: self.books.second.is_silent,
            sample: self.books.second.last.clone(),
        }
    }
}

/// Packets lost since the row before. Zero if more packets that were counted as lost have arrived
/// after all.
fn lost_more(counted: &measure::Media) -> u64 {
    more(counted.packets_lost)
}

/// Reads a sum of differences, which wraps where it is negative: see `Record::merge`.
fn more(sum: u64) -> u64 {
    u64::try_from(sum as i64).unwrap_or(0)
}

/// Mean of estimates in bit/s, from their sum in kbit/s and their number.
fn mean_bps(sum_kbps: u64, count: u64) -> Option<u64> {
    (sum_kbps * 1_000).checked_div(count)
}
