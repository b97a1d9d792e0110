//! Figures by the transport of media: who used which, how long the joins took, round trips and
//! packets. Computed from the participants, so only the host that ran them can tell.

use std::fmt::Write;

use super::style::Style;
use super::{Outcome, ParticipantOutcome};
use crate::measure::JoinTimeline;
use crate::plan::MediaTransport;
use crate::units::Time;
use crate::words::{micros, number, percent};

/// Figures of the participants whose media used one transport.
#[derive(serde::Serialize)]
pub(super) struct TransportFigures {
    transport: &'static str,
    participants: usize,
    join_us: Option<Spread>,
    ice_us: Option<Spread>,
    dtls_us: Option<Spread>,
    first_media_us: Option<Spread>,
    /// Last round trip of each participant, by RTCP.
    rtt_us: Option<Spread>,
    packets_received: u64,
    packets_lost_network: u64,
    packets_lost: u64,
}

/// Distribution of one value of each participant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
struct Spread {
    count: usize,
    p50: u64,
    p90: u64,
    p99: u64,
    max: u64,
}

impl Spread {
    /// By nearest rank; `None` without a value.
    fn of(values: impl Iterator<Item = u64>) -> Option<Spread> {
        let mut values: Vec<u64> = values.collect();
        values.sort_unstable();
        let max = *values.last()?;
        let rank = |percent: usize| values[(values.len() * percent).div_ceil(100).max(1) - 1];
        Some(Spread {
            count: values.len(),
            p50: rank(50),
            p90: rank(90),
            p99: rank(99),
            max,
        })
    }
}

/// Returns the figures of each transport in use, in the order in which clients try them. `None` if
/// the participants are not known here.
pub(super) fn by_transport(outcome: &Outcome) -> Option<Vec<TransportFigures>> {
    if outcome.participants.is_empty() {
        return None;
    }
    let figures = MediaTransport::ALL.into_iter().filter_map(|transport| {
        let uses = |participant: &&ParticipantOutcome| participant.transport == Some(transport);
        let users: Vec<_> = outcome.participants.iter().filter(uses).collect();
        (!users.is_empty()).then(|| figures_of(transport, &users))
    });
    Some(figures.collect())
}

fn figures_of(transport: MediaTransport, users: &[&ParticipantOutcome]) -> TransportFigures {
    let since_intended = |reached: fn(&JoinTimeline) -> Option<Time>| {
        Spread::of(users.iter().filter_map(|user| {
            let at = reached(&user.timeline)?;
            Some(at.micros_since(user.timeline.intended))
        }))
    };
    let sum = |count: fn(&super::MediaQuality) -> u64| {
        users
            .iter()
            .map(|user| count(&user.audio) + count(&user.video))
            .sum()
    };
    TransportFigures {
        transport: transport.name(),
        participants: users.len(),
        join_us: since_intended(|timeline| timeline.joined),
        ice_us: since_intended(|timeline| timeline.ice_connected),
        dtls_us: since_intended(|timeline| timeline.dtls_connected),
        first_media_us: since_intended(|timeline| timeline.first_media),
        rtt_us: Spread::of(users.iter().filter_map(|user| user.rtt_us)),
        packets_received: sum(|media| media.packets_received),
        packets_lost_network: sum(|media| media.packets_lost_network),
        packets_lost: sum(|media| media.packets_lost),
    }
}

/// A table of the transports, or nothing if all media went over UDP.
pub(super) fn text(outcome: &Outcome, style: Style) -> String {
    let figures = by_transport(outcome).unwrap_or_default();
    let is_udp = |figures: &TransportFigures| figures.transport == MediaTransport::Udp.name();
    if figures.iter().all(is_udp) {
        return String::new();
    }
    let mut text = format!(
        "{}\n",
        style.bold(&format!(
            "{:<14}{:>7}{:>21}{:>21}{:>9}{:>7}",
            "Media over", "people", "join p50/p99", "RTT p50/p99", "missing", "lost"
        ))
    );
    for row in &figures {
        let _ = writeln!(
            text,
            "  {:<12}{:>7}{:>21}{:>21}{:>9}{:>7}",
            row.transport,
            number(row.participants as u64),
            pair(row.join_us),
            pair(row.rtt_us),
            row.share(row.packets_lost_network),
            row.share(row.packets_lost)
        );
    }
    text.push('\n');
    text
}

fn pair(spread: Option<Spread>) -> String {
    spread.map_or("n/a".to_owned(), |spread| {
        format!(
            "{} / {}",
            micros(spread.p50 as f64),
            micros(spread.p99 as f64)
        )
    })
}

impl TransportFigures {
    /// Share of the packets that were sent to these participants, as far as they know.
    fn share(&self, count: u64) -> String {
        match self.packets_received + self.packets_lost {
            0 => "n/a".to_owned(),
            all => percent(count as f64 / all as f64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads_are_by_nearest_rank() {
        assert_eq!(Spread::of(std::iter::empty()), None);
        let one = Spread::of(std::iter::once(7)).unwrap();
        assert_eq!([one.p50, one.p90, one.p99, one.max], [7; 4]);
        let many = Spread::of((1..=200).rev()).unwrap();
        assert_eq!(
            (many.count, many.p50, many.p90, many.p99, many.max),
            (200, 100, 180, 198, 200)
        );
    }
}
