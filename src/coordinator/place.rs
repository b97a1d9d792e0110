//! Load of the hosts, and the placement that follows from it once the hosts are known.
//!
//! The placement is a pure function: the same hosts in the same order give the same placement. A
//! restarted coordinator therefore finds the one that it had handed out.

use serde::{Deserialize, Serialize};

use super::protocol::{SharedStage, StageKind};
use crate::plan::scenario::{PhaseTimes, Scenario};
use crate::plan::{Part, Placement, UndealtPlan, VantagePlan};

/// Load that the hosts are to make. Counts are per room.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostsLoad {
    /// The run as the flags describe it, for any number of hosts. Its phases have the subscribers
    /// of one host of weight 1, or, if `total` is set, of all hosts together. The sizes of the
    /// groups follow from that.
    pub scenario: Scenario,
    /// Whether each host has rooms of its own: as many as the plan says, or, if `total` is set, its
    /// share of them.
    pub rooms_apart: bool,
    pub total: bool,
}

/// The hosts and their load.
#[derive(Clone, Debug)]
pub struct PlacedHosts {
    /// Scenario of all hosts together.
    pub scenario: Scenario,
    pub placement: Placement,
    /// Which host plays each participant.
    pub part: Part,
    /// Stages of each host.
    pub stages: Vec<Vec<SharedStage>>,
}

impl HostsLoad {
    /// Returns the subscribers per room, tier by tier.
    pub fn tiers(&self) -> Vec<u32> {
        let scenario = &self.scenario;
        let phases = scenario.phases.iter();
        phases
            .map(|phase| phase.subscribers.unwrap_or(scenario.subscribers()))
            .collect()
    }

    /// Distributes the load over the hosts.
    ///
    /// # Errors
    /// These hosts cannot play the load. The error says what to do.
    pub fn place(&self, vantages: Vec<VantagePlan>) -> Result<PlacedHosts, UndealtPlan> {
        let placement = Placement {
            vantages,
            rooms_apart: self.rooms_apart,
        };
        let weights = placement
            .vantages
            .iter()
            .fold(0u32, |sum, vantage| sum.saturating_add(vantage.weight));
        let rooms = if self.rooms_apart && !self.total {
            self.scenario.rooms.count.saturating_mul(weights)
        } else {
            self.scenario.rooms.count
        };
        let largest = self.tiers().into_iter().max().unwrap_or(0);
        if largest > 0
            && !placement
                .vantages
                .iter()
                .any(|vantage| vantage.role.subscribes())
        {
            return Err(UndealtPlan::NobodySubscribes);
        }
        let scenario = self
            .scenario
            .over_hosts(rooms, self.of_room(&placement, largest));
        let part = Part::new(placement.clone(), 0, &scenario)?;
        let stages = self.stages(&scenario, &placement, &part);
        Ok(PlacedHosts {
            scenario,
            placement,
            part,
            stages,
        })
    }

    /// Returns the number of subscribers that a room has in a tier, over all hosts.
    fn of_room(&self, placement: &Placement, tier: u32) -> u32 {
        if self.total {
            tier
        } else {
            placement.subscribers_of_room(tier)
        }
    }

    /// Returns the stages of each host. A host with fewer joins or leaves before a hold gets a
    /// longer warm-up, and so waits for the others.
    fn stages(
        &self,
        scenario: &Scenario,
        placement: &Placement,
        part: &Part,
    ) -> Vec<Vec<SharedStage>> {
        let held = self.held(scenario, placement, part);
        let moving_us = |host: usize, stage: usize| moving_us(scenario, &held[host], stage);
        let stage = |host: usize, stage: usize| {
            let longest = (0..held.len())
                .map(|other| moving_us(other, stage))
                .max()
                .unwrap_or(0);
            held_stage(
                stage,
                held[host][stage],
                times_of(scenario, stage),
                longest - moving_us(host, stage),
            )
        };
        (0..held.len())
            .map(|host| {
                let held = (0..=scenario.phases.len()).map(|index| stage(host, index));
                let ends = [
                    bare_stage(StageKind::Stop, "stop"),
                    bare_stage(StageKind::Leave, "leave"),
                ];
                std::iter::once(bare_stage(StageKind::Publish, "publish"))
                    .chain(held)
                    .chain(ends)
                    .collect()
            })
            .collect()
    }

    /// Returns for each host its subscribers in the baseline, and then in each tier.
    fn held(&self, scenario: &Scenario, placement: &Placement, part: &Part) -> Vec<Vec<u32>> {
        let in_room: Vec<u32> = self
            .tiers()
            .into_iter()
            .map(|tier| self.of_room(placement, tier))
            .collect();
        let of_hosts = subscribers_of_hosts(scenario, placement.vantages.len(), part, &in_room);
        // The baseline has one subscriber of each host that subscribes at all.
        let alone = |tiers: &[u32]| tiers.iter().copied().max().unwrap_or(0).min(1);
        of_hosts
            .iter()
            .map(|tiers| {
                std::iter::once(alone(tiers))
                    .chain(tiers.iter().copied())
                    .collect()
            })
            .collect()
    }
}

/// Returns the times of a stage. The baseline has those of the first phase.
fn times_of(scenario: &Scenario, stage: usize) -> PhaseTimes {
    let phase = scenario.phases.get(stage.saturating_sub(1));
    phase.map_or(PhaseTimes::default(), |phase| PhaseTimes {
        spread: phase.spread,
        warmup: phase.warmup,
        hold: phase.hold,
    })
}

/// Returns how long the participants of a host take to join or to leave before a stage. Leaving has
/// the same pace as joining.
fn moving_us(scenario: &Scenario, held: &[u32], stage: usize) -> u64 {
    let before = if stage == 0 { 0 } else { held[stage - 1] };
    match (
        held[stage].abs_diff(before),
        times_of(scenario, stage).spread,
    ) {
        (0, _) => 0,
        (_, Some(spread)) => spread.as_micros() as u64,
        (moves, None) => (f64::from(moves) * 1e6 / scenario.joins_per_second) as u64,
    }
}

/// Returns the baseline or a tier. `waiting_us` is how much longer other hosts join or leave before
/// it.
fn held_stage(stage: usize, subscribers: u32, times: PhaseTimes, waiting_us: u64) -> SharedStage {
    let (kind, name) = if stage == 0 {
        (StageKind::Baseline, "baseline".to_owned())
    } else {
        (StageKind::Tier, format!("tier {stage}"))
    };
    SharedStage {
        kind,
        name,
        subscribers,
        warmup_us: times.warmup.as_micros() as u64 + waiting_us,
        hold_us: times.hold.as_micros() as u64,
        spread_us: times.spread.map(|spread| spread.as_micros() as u64),
    }
}

/// Returns a stage without subscribers and without length.
fn bare_stage(kind: StageKind, name: &str) -> SharedStage {
    SharedStage {
        kind,
        name: name.to_owned(),
        subscribers: 0,
        warmup_us: 0,
        hold_us: 0,
        spread_us: None,
    }
}

/// Returns for each host and each value of `in_room` how many of its subscribers are among that
/// many first subscribers of each room.
fn subscribers_of_hosts(
    scenario: &Scenario,
    hosts: usize,
    part: &Part,
    in_room: &[u32],
) -> Vec<Vec<u32>> {
    let mut bounds = in_room.to_vec();
    bounds.sort_unstable();
    bounds.dedup();
    // Number of subscribers of each host between a bound and the one before it.
    let mut between = vec![vec![0u32; bounds.len()]; hosts];
    let (publishers, rooms) = (scenario.publishers(), scenario.rooms.count);
    let participants = (publishers + scenario.subscribers()) * rooms;
    for index in publishers * rooms..participants {
        let place = index / rooms - publishers;
        let bound = bounds.partition_point(|bound| *bound <= place);
        if let (Some(owner), true) = (part.owner(index), bound < bounds.len()) {
            between[owner][bound] += 1;
        }
    }
    let up_to = |host: &Vec<u32>, tier: u32| {
        host.iter()
            .zip(&bounds)
            .take_while(|(_, bound)| **bound <= tier)
            .map(|(count, _)| count)
            .sum()
    };
    between
        .iter()
        .map(|host| in_room.iter().map(|tier| up_to(host, *tier)).collect())
        .collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::measure::Kind;
    use crate::plan::HostRole;
    use crate::plan::scenario::RoomPeople;
    use crate::plan::tests::plan;

    pub(crate) fn load(tiers: &[u32]) -> HostsLoad {
        let people = RoomPeople {
            subscribers: tiers.iter().copied().max().unwrap_or(0),
            ..plan().scenario.people()
        };
        let scenario = Scenario {
            joins_per_second: 10.0,
            groups: Scenario::of_people(people).groups,
            ..plan().scenario
        };
        let times = PhaseTimes {
            spread: None,
            warmup: Duration::from_secs(1),
            hold: Duration::from_secs(5),
        };
        HostsLoad {
            scenario: scenario.ramp(tiers, times),
            rooms_apart: false,
            total: false,
        }
    }

    fn hosts(of: &[(HostRole, u32)]) -> Vec<VantagePlan> {
        of.iter()
            .map(|(role, weight)| VantagePlan {
                role: *role,
                weight: *weight,
            })
            .collect()
    }

    fn held(placed: &PlacedHosts) -> Vec<Vec<u32>> {
        let of = |stages: &Vec<SharedStage>| {
            stages
                .iter()
                .filter(|stage| stage.kind == StageKind::Tier)
                .map(|stage| stage.subscribers)
                .collect()
        };
        placed.stages.iter().map(of).collect()
    }

    #[test]
    fn tiers_are_per_host_and_sum() {
        let placed = load(&[2, 10, 4])
            .place(hosts(&[
                (HostRole::Both, 1),
                (HostRole::Subscribe, 2),
                (HostRole::Publish, 1),
            ]))
            .unwrap();
        assert_eq!(placed.scenario.subscribers(), 30);
        assert_eq!(
            (
                placed.scenario.publishers_of(Kind::Audio),
                placed.scenario.rooms.count
            ),
            (3, 2)
        );
        assert_eq!(held(&placed), [[4, 20, 8], [8, 40, 16], [0, 0, 0]]);
    }

    #[test]
    fn a_total_is_split_to_the_last_participant() {
        let mut load = load(&[7, 25, 11]);
        load.total = true;
        for group in [
            &[(HostRole::Both, 1); 3][..],
            &[
                (HostRole::Both, 1),
                (HostRole::Subscribe, 3),
                (HostRole::Publish, 1),
                (HostRole::Both, 2),
            ],
        ] {
            let placed = load.place(hosts(group)).unwrap();
            assert_eq!(placed.scenario.subscribers(), 25);
            let held = held(&placed);
            for (tier, count) in [7, 25, 11].into_iter().enumerate() {
                assert_eq!(held.iter().map(|host| host[tier]).sum::<u32>(), count * 2);
            }
        }
    }

    #[test]
    fn rooms_apart_are_per_host_or_split() {
        let mut load = load(&[4]);
        load.rooms_apart = true;
        let placed = load
            .place(hosts(&[(HostRole::Both, 1), (HostRole::Both, 2)]))
            .unwrap();
        assert_eq!(
            (placed.scenario.rooms.count, held(&placed)),
            (6, vec![vec![8], vec![16]])
        );
        (load.total, load.scenario.rooms.count) = (true, 5);
        let placed = load.place(hosts(&[(HostRole::Both, 1); 2])).unwrap();
        assert_eq!(
            (placed.scenario.rooms.count, held(&placed)),
            (5, vec![vec![12], vec![8]])
        );
        load.scenario.rooms.count = 1;
        assert!(
            load.place(hosts(&[(HostRole::Both, 1); 2]))
                .unwrap_err()
                .to_string()
                .contains("nothing to do")
        );
        assert!(
            load.place(hosts(&[(HostRole::Both, 1), (HostRole::Publish, 1)]))
                .is_err()
        );
    }

    #[test]
    fn all_hold_at_the_same_time() {
        let placed = load(&[2, 10, 4])
            .place(hosts(&[
                (HostRole::Both, 1),
                (HostRole::Subscribe, 2),
                (HostRole::Publish, 1),
            ]))
            .unwrap();
        for stage in 1..=4 {
            let mut before = [0; 3];
            if stage > 1 {
                before = [0, 1, 2].map(|host: usize| placed.stages[host][stage - 1].subscribers);
            }
            // The rate is ten joins a second.
            let settled: Vec<u64> = placed
                .stages
                .iter()
                .zip(before)
                .map(|(stages, before)| {
                    u64::from(stages[stage].subscribers.abs_diff(before)) * 100_000
                        + stages[stage].warmup_us
                })
                .collect();
            assert!(
                settled.windows(2).all(|pair| pair[0] == pair[1]),
                "{stage}: {settled:?}"
            );
            assert!(
                placed
                    .stages
                    .iter()
                    .any(|stages| stages[stage].warmup_us == 1_000_000)
            );
        }
        let baseline: Vec<u32> = placed
            .stages
            .iter()
            .map(|stages| stages[1].subscribers)
            .collect();
        assert_eq!(baseline, [1, 1, 0]);
    }

    #[test]
    fn hosts_that_cannot_play_it_are_told_why() {
        for group in [
            &[(HostRole::Subscribe, 1); 2][..],
            &[(HostRole::Publish, 1); 2],
        ] {
            let why = load(&[4]).place(hosts(group)).unwrap_err().to_string();
            assert!(
                why.contains("no host") && why.contains("start one"),
                "{why}"
            );
        }
    }
}
