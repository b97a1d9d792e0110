//! What every host is to do, and what that comes to once it is known who the hosts are.
//!
//! A pure function: the same hosts in the same order give the same placement, so a coordinator that is started again finds what it had given out.

use serde::{Deserialize, Serialize};

use super::protocol::{Stage, StageKind, WirePlan};
use crate::plan::{Part, Placement, Vantage};

/// What is asked of the hosts. Counts are per room.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// A room as the flags have it, whatever number of hosts shares it. Its `subscribers` follow from the tiers.
    pub plan: WirePlan,
    /// Subscribers tier by tier: those of one host of weight 1, or, where it is a `total`, of all hosts together.
    pub tiers: Vec<u32>,
    /// Each host has rooms of its own: so many as the plan says, or, where it is a `total`, its share of them.
    pub rooms_apart: bool,
    pub total: bool,
    /// From the end of joining to the hold.
    pub warmup_us: u64,
}

/// The hosts and their load.
#[derive(Clone, Debug)]
pub struct Placed {
    /// Of all hosts together.
    pub plan: WirePlan,
    pub placement: Placement,
    /// Whose everybody is.
    pub part: Part,
    /// The stages as each host plays them.
    pub stages: Vec<Vec<Stage>>,
}

impl Load {
    /// Who plays what.
    ///
    /// # Errors
    /// These hosts cannot play it; says what to do.
    pub fn place(&self, vantages: Vec<Vantage>) -> Result<Placed, String> {
        let placement = Placement {
            vantages,
            rooms_apart: self.rooms_apart,
        };
        let weights = placement
            .vantages
            .iter()
            .fold(0u32, |sum, vantage| sum.saturating_add(vantage.weight));
        let rooms = match self.rooms_apart && !self.total {
            true => self.plan.room_count.saturating_mul(weights),
            false => self.plan.room_count,
        };
        let largest = self.tiers.iter().copied().max().unwrap_or(0);
        if largest > 0
            && !placement
                .vantages
                .iter()
                .any(|vantage| vantage.role.subscribes())
        {
            return Err("no host subscribes: start one without --role publish".to_owned());
        }
        let plan = WirePlan {
            room_count: rooms,
            subscribers: self.of_room(&placement, largest),
            ..self.plan.clone()
        };
        let part = Part::new(placement.clone(), 0, &plan.shape())?;
        let stages = self.stages(&plan, &placement, &part);
        Ok(Placed {
            plan,
            placement,
            part,
            stages,
        })
    }

    /// Subscribers that a room has in a tier of all hosts.
    fn of_room(&self, placement: &Placement, tier: u32) -> u32 {
        match self.total {
            true => tier,
            false => placement.subscribers_of_room(tier),
        }
    }

    /// Whoever has fewer joins, or leaves, before a hold than another waits for the others' by a longer warm-up.
    fn stages(&self, plan: &WirePlan, placement: &Placement, part: &Part) -> Vec<Vec<Stage>> {
        let in_room: Vec<u32> = self
            .tiers
            .iter()
            .map(|tier| self.of_room(placement, *tier))
            .collect();
        let of_hosts = subscribers_of_hosts(plan, placement.vantages.len(), part, &in_room);
        // The baseline is one of each host that subscribes at all.
        let alone = |tiers: &[u32]| tiers.iter().copied().max().unwrap_or(0).min(1);
        let held: Vec<Vec<u32>> = of_hosts
            .iter()
            .map(|tiers| {
                std::iter::once(alone(tiers))
                    .chain(tiers.iter().copied())
                    .collect()
            })
            .collect();
        // Whoever leaves does so at the same pace.
        let moving_us = |host: usize, stage: usize| {
            let before = if stage == 0 { 0 } else { held[host][stage - 1] };
            match (held[host][stage].abs_diff(before), plan.ramp_time_us) {
                (0, _) => 0,
                (_, Some(ramp_time_us)) => ramp_time_us,
                (moves, None) => (f64::from(moves) * 1e6 / plan.joins_per_second) as u64,
            }
        };
        let stage = |host: usize, stage: usize| {
            let longest = (0..held.len())
                .map(|other| moving_us(other, stage))
                .max()
                .unwrap_or(0);
            Stage {
                kind: if stage == 0 {
                    StageKind::Baseline
                } else {
                    StageKind::Tier
                },
                name: if stage == 0 {
                    "baseline".to_owned()
                } else {
                    format!("tier {stage}")
                },
                subscribers: held[host][stage],
                warmup_us: self.warmup_us + (longest - moving_us(host, stage)),
                hold_us: plan.duration_us,
            }
        };
        let bare = |kind, name: &str| Stage {
            kind,
            name: name.to_owned(),
            subscribers: 0,
            warmup_us: 0,
            hold_us: 0,
        };
        (0..held.len())
            .map(|host| {
                let held = (0..=self.tiers.len()).map(|index| stage(host, index));
                let ends = [
                    bare(StageKind::Stop, "stop"),
                    bare(StageKind::Leave, "leave"),
                ];
                std::iter::once(bare(StageKind::Publish, "publish"))
                    .chain(held)
                    .chain(ends)
                    .collect()
            })
            .collect()
    }
}

/// For each host, how many of its subscribers are among the first so many of each room.
fn subscribers_of_hosts(
    plan: &WirePlan,
    hosts: usize,
    part: &Part,
    in_room: &[u32],
) -> Vec<Vec<u32>> {
    let mut bounds = in_room.to_vec();
    bounds.sort_unstable();
    bounds.dedup();
    // Between each bound and the one before it.
    let mut between = vec![vec![0u32; bounds.len()]; hosts];
    let publishers = plan.audio_publishers.max(plan.video_publishers);
    let participants = (publishers + plan.subscribers) * plan.room_count;
    for index in publishers * plan.room_count..participants {
        let place = index / plan.room_count - publishers;
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
    use super::*;
    use crate::plan::Role;
    use crate::plan::tests::plan;

    pub(crate) fn load(tiers: &[u32]) -> Load {
        let mut plan = WirePlan::of(&plan());
        (
            plan.room_count,
            plan.audio_publishers,
            plan.video_publishers,
        ) = (2, 3, 2);
        (plan.joins_per_second, plan.duration_us) = (10.0, 5_000_000);
        Load {
            plan,
            tiers: tiers.to_vec(),
            rooms_apart: false,
            total: false,
            warmup_us: 1_000_000,
        }
    }

    fn hosts(of: &[(Role, u32)]) -> Vec<Vantage> {
        of.iter()
            .map(|(role, weight)| Vantage {
                role: *role,
                weight: *weight,
            })
            .collect()
    }

    fn held(placed: &Placed) -> Vec<Vec<u32>> {
        let of = |stages: &Vec<Stage>| {
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
                (Role::Both, 1),
                (Role::Subscribe, 2),
                (Role::Publish, 1),
            ]))
            .unwrap();
        assert_eq!(placed.plan.subscribers, 30);
        assert_eq!(
            (placed.plan.audio_publishers, placed.plan.room_count),
            (3, 2)
        );
        assert_eq!(held(&placed), [[4, 20, 8], [8, 40, 16], [0, 0, 0]]);
    }

    #[test]
    fn a_total_is_split_to_the_last_participant() {
        let mut load = load(&[7, 25, 11]);
        load.total = true;
        for group in [
            &[(Role::Both, 1); 3][..],
            &[
                (Role::Both, 1),
                (Role::Subscribe, 3),
                (Role::Publish, 1),
                (Role::Both, 2),
            ],
        ] {
            let placed = load.place(hosts(group)).unwrap();
            assert_eq!(placed.plan.subscribers, 25);
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
            .place(hosts(&[(Role::Both, 1), (Role::Both, 2)]))
            .unwrap();
        assert_eq!(
            (placed.plan.room_count, held(&placed)),
            (6, vec![vec![8], vec![16]])
        );
        (load.total, load.plan.room_count) = (true, 5);
        let placed = load.place(hosts(&[(Role::Both, 1); 2])).unwrap();
        assert_eq!(
            (placed.plan.room_count, held(&placed)),
            (5, vec![vec![12], vec![8]])
        );
        load.plan.room_count = 1;
        assert!(
            load.place(hosts(&[(Role::Both, 1); 2]))
                .unwrap_err()
                .contains("nothing to do")
        );
        assert!(
            load.place(hosts(&[(Role::Both, 1), (Role::Publish, 1)]))
                .is_err()
        );
    }

    #[test]
    fn all_hold_at_the_same_time() {
        let placed = load(&[2, 10, 4])
            .place(hosts(&[
                (Role::Both, 1),
                (Role::Subscribe, 2),
                (Role::Publish, 1),
            ]))
            .unwrap();
        for stage in 1..=4 {
            let mut before = [0; 3];
            if stage > 1 {
                before = [0, 1, 2].map(|host: usize| placed.stages[host][stage - 1].subscribers);
            }
            // At ten joins a second.
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
        for group in [&[(Role::Subscribe, 1); 2][..], &[(Role::Publish, 1); 2]] {
            let why = load(&[4]).place(hosts(group)).unwrap_err();
            assert!(
                why.contains("no host") && why.contains("start one"),
                "{why}"
            );
        }
    }
}
