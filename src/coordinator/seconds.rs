//! Records about a run over several hosts, second by second, that its state does not contain: rows
//! of the series, and when each tier was held by the coordinator's clock.
//!
//! They are not journaled. A restarted coordinator has no rows of the time before.

use std::collections::BTreeMap;

use super::protocol::{LiveSecond, ProverId, StageKind};
use super::state::{ProberState, RunPhase, RunState};
use crate::server_metrics::book;

/// Largest number of rows: two hours with a row each second. Beyond it every second row is removed,
/// and from then on half as many are kept.
const ROWS_MAX: usize = 7_200;
/// Age at which a host's last message belongs to another second.
const STALE_US: u64 = 3_000_000;

/// One second of all hosts that are present, by what each said last. `None` means that a figure is
/// not known of all of them.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct SecondRow {
    /// Seconds since publishers began to join.
    pub t: f64,
    /// The stage under way: `publish`, `baseline`, `tier 1`, .., `stop`, `leave`.
    pub stage: Option<String>,
    /// Number of hosts that were neither lost nor done.
    pub hosts: usize,
    pub participants: Option<u64>,
    pub packets_sent_per_second: Option<f64>,
    pub packets_received_per_second: Option<f64>,
    pub bytes_sent_per_second: Option<f64>,
    pub bytes_received_per_second: Option<f64>,
    /// Share of all media lost so far, 0 to 1, at the host that lost most. A host that receives
    /// nothing has no loss.
    pub loss_worst: Option<f64>,
    /// Rows of the server's nodes, as in the series of one host.
    pub server: Option<Vec<Option<book::NodeRow>>>,
}

/// Bounded number of rows of a run.
#[derive(Debug)]
pub struct Series {
    rows: Vec<SecondRow>,
    most: usize,
    /// Only every `stride`-th row is kept.
    stride: usize,
    offered: usize,
}

impl Default for Series {
    fn default() -> Series {
        Series::of_at_most(ROWS_MAX)
    }
}

impl Series {
    fn of_at_most(most: usize) -> Series {
        Series {
            rows: Vec::new(),
            most,
            stride: 1,
            offered: 0,
        }
    }

    pub fn offer(&mut self, row: SecondRow) {
        let is_wanted = self.offered.is_multiple_of(self.stride);
        self.offered += 1;
        if !is_wanted {
            return;
        }
        self.rows.push(row);
        if self.rows.len() > self.most {
            let mut index = 0;
            self.rows.retain(|_| {
                index += 1;
                index % 2 == 1
            });
            self.stride *= 2;
        }
    }

    pub fn into_rows(self) -> Vec<SecondRow> {
        self.rows
    }
}

/// When one tier was held, in microseconds since 1970 by the coordinator's clock; `None` if no host
/// said so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldTier {
    pub name: String,
    pub between_us: Option<(u64, u64)>,
}

/// Collects rows and holds from a state that it is shown several times a second.
#[derive(Default)]
pub struct Seconds {
    /// Last second of the run that has a row.
    second: u64,
    /// Holds by stage and host.
    holds: BTreeMap<u32, BTreeMap<ProverId, HeldSpan>>,
}

#[derive(Clone, Copy)]
struct HeldSpan {
    from_us: u64,
    held_us: u64,
}

impl Seconds {
    /// Returns a row if a new second has begun.
    pub fn look(&mut self, state: &RunState, now_us: u64) -> Option<SecondRow> {
        self.note_holds(state);
        let began_us = began_us(state)?;
        let since_us = now_us.checked_sub(began_us)?;
        let second = since_us / 1_000_000;
        let live: Vec<&ProberState> = state
            .probers()
            .iter()
            .filter(|prober| prober.is_live())
            .collect();
        if second <= self.second || live.is_empty() || *state.phase() == RunPhase::Over {
            return None;
        }
        self.second = second;
        // A host that has not told its stage has not been heard by this process.
        let is_known = |prober: &&ProberState| {
            prober.stage.is_some() && now_us.saturating_sub(prober.heard_us) <= STALE_US
        };
        let all_known = live.iter().all(is_known);
        let sum = |of: fn(&LiveSecond) -> Option<f64>| {
            live.iter()
                .map(|prober| of(&prober.live))
                .sum::<Option<f64>>()
                .filter(|_| all_known)
        };
        let losses = live.iter().filter_map(|prober| prober.live.loss);
        Some(SecondRow {
            t: since_us as f64 / 1e6,
            stage: state.stage_underway().map(|stage| stage.name.clone()),
            hosts: live.len(),
            participants: all_known.then(|| {
                live.iter()
                    .map(|prober| u64::from(prober.live.participants))
                    .sum()
            }),
            packets_sent_per_second: sum(|live| live.packets_sent_per_second),
            packets_received_per_second: sum(|live| live.packets_received_per_second),
            bytes_sent_per_second: sum(|live| live.bits_sent_per_second).map(|bits| bits / 8.0),
            bytes_received_per_second: sum(|live| live.bits_received_per_second)
                .map(|bits| bits / 8.0),
            loss_worst: losses.reduce(f64::max).filter(|_| all_known),
            server: None,
        })
    }

    /// Notes when each host's hold began. A host says for how long it has held, some time after it
    /// looked, so each message gives a begin that is too late. The earliest one is the most
    /// accurate.
    fn note_holds(&mut self, state: &RunState) {
        let under_way = state.underway().map(|underway| underway.stage);
        for prober in state.probers() {
            for (stage, tier) in &prober.tiers {
                let held_us = (tier.seconds * 1e6) as u64;
                let holds = self.holds.entry(*stage).or_default();
                let from_us = prober.heard_us.saturating_sub(held_us);
                if let Some(hold) = holds.get_mut(&prober.id) {
                    hold.from_us = hold.from_us.min(from_us);
                    hold.held_us = held_us;
                } else if under_way == Some(*stage) {
                    holds.insert(prober.id.clone(), HeldSpan { from_us, held_us });
                }
            }
        }
    }

    /// Returns when all hosts held each of the tiers that began, to about a second.
    pub fn held(&self, state: &RunState) -> Vec<HeldTier> {
        let begun = state
            .orders()
            .iter()
            .filter_map(|order| Some((order.stage, state.stages().get(order.stage as usize)?)));
        let tiers = begun.filter(|(_, stage)| stage.kind == StageKind::Tier);
        let held = tiers.map(|(index, stage)| {
            let holds = || {
                self.holds
                    .get(&index)
                    .into_iter()
                    .flat_map(BTreeMap::values)
            };
            let from_us = holds().map(|hold| hold.from_us).max();
            let to_us = holds().map(|hold| hold.from_us + hold.held_us).min();
            HeldTier {
                name: stage.name.clone(),
                between_us: from_us
                    .zip(to_us)
                    .filter(|(from_us, to_us)| from_us < to_us),
            }
        });
        held.collect()
    }
}

/// Returns when publishers began to join, in microseconds since 1970.
pub fn began_us(state: &RunState) -> Option<u64> {
    state.orders().first().map(|order| order.start_us)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coordinator::canned::{Canned, START_US, TIER, WELL};
    use crate::coordinator::protocol::TierSoFar;
    use crate::coordinator::state::JournalEntry;
    use crate::plan::HostRole;

    fn live(participants: u32) -> LiveSecond {
        LiveSecond {
            participants,
            packets_sent_per_second: Some(50.0),
            packets_received_per_second: Some(500.0),
            bits_sent_per_second: Some(8_000.0),
            bits_received_per_second: Some(80_000.0),
            loss: Some(f64::from(participants) / 100.0),
            ..LiveSecond::default()
        }
    }

    fn ordered(canned: &mut Canned, stage: u32) {
        let at_us = canned.now_us;
        canned.apply(JournalEntry::Ordered {
            at_us,
            stage,
            start_us: at_us,
        });
    }

    /// Returns a run with two hosts in which publishers join.
    fn two() -> Canned {
        let mut canned = Canned::armed(
            &[10],
            &[("fra", Some(HostRole::Both)), ("ams", Some(HostRole::Both))],
        );
        ordered(&mut canned, 0);
        canned
    }

    fn tier(seconds: f64, complete: bool) -> Vec<TierSoFar> {
        let so_far = WELL.so_far(TIER, complete);
        vec![TierSoFar { seconds, ..so_far }]
    }

    #[test]
    fn a_row_is_of_all_hosts_or_says_that_it_is_not_known() {
        let (mut canned, mut seconds) = (two(), Seconds::default());
        assert_eq!(
            seconds.look(&canned.state, START_US),
            None,
            "no second has gone by"
        );
        canned.beat(0, tier(1.0, false), live(3));
        let row = seconds.look(&canned.state, canned.now_us).unwrap();
        assert_eq!((row.t, row.hosts), (1.0, 2));
        assert!(
            row.participants.is_none()
                && row.packets_received_per_second.is_none()
                && row.loss_worst.is_none(),
            "{row:?}"
        );
        assert_eq!(
            seconds.look(&canned.state, canned.now_us + 400_000),
            None,
            "it has its row"
        );
        canned.beat(1, tier(1.0, false), live(4));
        let row = seconds.look(&canned.state, canned.now_us).unwrap();
        assert_eq!(
            (
                row.participants,
                row.packets_sent_per_second,
                row.bytes_received_per_second
            ),
            (Some(7), Some(100.0), Some(20_000.0))
        );
        assert_eq!(row.loss_worst, Some(0.04));
        // One host falls silent. Then it is lost, and only the other one is left.
        let later = canned.now_us + STALE_US + 1;
        assert_eq!(
            seconds.look(&canned.state, later).unwrap().participants,
            None
        );
        canned.now_us = later;
        canned.beat(1, tier(4.0, false), live(5));
        canned.loses(0);
        let row = seconds.look(&canned.state, canned.now_us).unwrap();
        assert_eq!((row.hosts, row.participants), (1, Some(5)));
        canned.is_over();
        assert_eq!(seconds.look(&canned.state, canned.now_us + 2_000_000), None);
    }

    #[test]
    fn a_host_that_tells_nothing_of_media_makes_the_sum_unknown() {
        let mut canned = Canned::armed(&[10], &[("fra", Some(HostRole::Both)), ("vg", None)]);
        ordered(&mut canned, 0);
        canned.beat(0, tier(1.0, false), live(3));
        let row = Seconds::default()
            .look(&canned.state, canned.now_us)
            .unwrap();
        assert_eq!((row.hosts, row.participants), (2, None));
    }

    #[test]
    fn a_tier_is_held_while_all_hold_it() {
        let (mut canned, mut seconds) = (two(), Seconds::default());
        ordered(&mut canned, TIER);
        let mut hear = |canned: &mut Canned, who, held: f64, complete| {
            canned.beat(who, tier(held, complete), live(3));
            seconds.look(&canned.state, canned.now_us);
        };
        hear(&mut canned, 0, 0.5, false);
        hear(&mut canned, 1, 0.2, false);
        // The host looked a tenth of a second before it sent the beat, and later took time for its
        // account.
        hear(&mut canned, 0, 2.6, false);
        hear(&mut canned, 0, 3.0, true);
        hear(&mut canned, 1, 3.0, true);
        assert_eq!(
            seconds.held(&canned.state),
            [HeldTier {
                name: "tier 1".into(),
                between_us: Some((START_US + 1_800_000, START_US + 3_400_000)),
            }]
        );
        // A process that has seen nothing of the tier.
        assert_eq!(Seconds::default().held(&canned.state)[0].between_us, None);
    }

    #[test]
    fn a_long_run_has_fewer_rows_and_each_is_still_of_its_second() {
        let mut series = Series::of_at_most(4);
        for second in 1..=20 {
            series.offer(SecondRow {
                t: f64::from(second),
                ..SecondRow::default()
            });
        }
        let rows: Vec<f64> = series.into_rows().iter().map(|row| row.t).collect();
        assert_eq!(rows, [1.0, 9.0, 17.0]);
    }
}
