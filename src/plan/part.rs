//! Divides one plan among several hosts: which participants each host runs.
//!
//! The plan enumerates the participants of all hosts, and every host enumerates them in the same
//! way. A participant has a *global* index, from which its identity and its frames are derived. On
//! the host that runs it, it also has a dense *position* in that host's joining order. The host of
//! each participant is a pure function of the scenario and of the list of hosts, so only that list
//! has to be sent.

use std::sync::Arc;

use super::scenario::Scenario;
use super::{PARTICIPANTS_MAX, greatest_common_divisor};

/// Most hosts in a run. More than anybody gathers by hand, and few enough for a list that every
/// host gets.
pub const VANTAGES_MAX: usize = 256;

/// Greatest weight of a host. The heaviest host counts as this many of the lightest.
pub const WEIGHT_MAX: u32 = 100;

/// Which kinds of participants a host takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HostRole {
    Publish,
    Subscribe,
    #[default]
    Both,
}

impl HostRole {
    pub const ALL: [HostRole; 3] = [HostRole::Publish, HostRole::Subscribe, HostRole::Both];

    pub const fn name(self) -> &'static str {
        match self {
            HostRole::Publish => "publish",
            HostRole::Subscribe => "subscribe",
            HostRole::Both => "both",
        }
    }

    pub const fn publishes(self) -> bool {
        matches!(self, HostRole::Publish | HostRole::Both)
    }

    pub const fn subscribes(self) -> bool {
        matches!(self, HostRole::Subscribe | HostRole::Both)
    }
}

/// One host in the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct VantagePlan {
    pub role: HostRole,
    /// Its share of publishers, and of subscribers, is this weight over the sum for all hosts that
    /// take any.
    pub weight: u32,
}

impl Default for VantagePlan {
    fn default() -> VantagePlan {
        VantagePlan {
            role: HostRole::Both,
            weight: 1,
        }
    }
}

/// Why a plan cannot be divided among hosts. The text says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UndealtPlan {
    #[error("{0} hosts cannot share a run: it takes 1 to {most}", most = VANTAGES_MAX)]
    HostCount(usize),
    #[error("a weight of {0} is out of range: write 1 to {most}", most = WEIGHT_MAX)]
    Weight(u32),
    #[error("a run has 1 to {most} participants, over all hosts", most = PARTICIPANTS_MAX)]
    ParticipantCount,
    /// Each host has rooms of its own, and one does not both publish and subscribe.
    #[error(
        "hosts with rooms of their own publish and subscribe there: leave out --role, or --rooms-per-vantage"
    )]
    HalfRooms,
    #[error("no host publishes: start one without --role subscribe")]
    NobodyPublishes,
    #[error("no host subscribes: start one without --role publish")]
    NobodySubscribes,
    #[error("there is no host {number} among {hosts}")]
    NoSuchHost { number: usize, hosts: usize },
    #[error(
        "{count} {what} for {hosts} hosts leave host {number} nothing to do: ask for more {what}, or start fewer hosts"
    )]
    IdleHost {
        number: usize,
        hosts: usize,
        count: u64,
        what: &'static str,
    },
}

/// The hosts that run a plan together, in an order that is the same on all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Placement {
    pub vantages: Vec<VantagePlan>,
    /// Whether each host has rooms of its own. Otherwise all hosts are in all rooms.
    pub rooms_apart: bool,
}

impl Placement {
    /// Number of subscribers that a room needs so that every subscribing host has `each` of them
    /// there for each unit of its weight.
    pub fn subscribers_of_room(&self, each: u32) -> u32 {
        if self.rooms_apart {
            return each;
        }
        let subscribing = self
            .vantages
            .iter()
            .filter(|vantage| vantage.role.subscribes());
        subscribing.fold(0, |sum: u32, vantage| {
            sum.saturating_add(vantage.weight.saturating_mul(each))
        })
    }

    /// Number of these subscribers that host `me` has in each of its rooms.
    pub fn subscribers_of_host(&self, me: usize, each: u32) -> u32 {
        match self.vantages[me] {
            VantagePlan { role, .. } if !role.subscribes() => 0,
            _ if self.rooms_apart => each,
            VantagePlan { weight, .. } => weight.saturating_mul(each),
        }
    }

    /// The host that runs each participant, by global index.
    fn owners(&self, scenario: &Scenario) -> Vec<u16> {
        let those_who = |do_so: fn(HostRole) -> bool| {
            self.vantages
                .iter()
                .map(move |vantage| vantage.weight * u32::from(do_so(vantage.role)))
        };
        let (publishing, subscribing) = (
            round(those_who(HostRole::publishes)),
            round(those_who(HostRole::subscribes)),
        );
        let dealt = |round: &[u16], at: u32| round[at as usize % round.len()];
        let owner = |index: u32| {
            let (room, place) = (index % scenario.rooms.count, index / scenario.rooms.count);
            match (self.rooms_apart, place.checked_sub(scenario.publishers())) {
                (true, _) => dealt(&publishing, room),
                // A room begins where the one before it had its second, so that a few publishers in
                // many rooms are dealt evenly, too.
                (false, None) => dealt(&publishing, place + room),
                (false, Some(place)) => dealt(&subscribing, place + room),
            }
        };
        (0..scenario.total() as u32).map(owner).collect()
    }

    fn must_make_sense(&self, scenario: &Scenario) -> Result<(), UndealtPlan> {
        let hosts = self.vantages.len();
        if !(1..=VANTAGES_MAX).contains(&hosts) {
            return Err(UndealtPlan::HostCount(hosts));
        }
        let mut weights = self.vantages.iter().map(|vantage| vantage.weight);
        if let Some(weight) = weights.find(|weight| !(1..=WEIGHT_MAX).contains(weight)) {
            return Err(UndealtPlan::Weight(weight));
        }
        if !(1..=PARTICIPANTS_MAX).contains(&scenario.total()) {
            return Err(UndealtPlan::ParticipantCount);
        }
        if self.rooms_apart
            && self
                .vantages
                .iter()
                .any(|vantage| vantage.role != HostRole::Both)
        {
            return Err(UndealtPlan::HalfRooms);
        }
        let nobody = |does_so: fn(HostRole) -> bool| {
            !self.vantages.iter().any(|vantage| does_so(vantage.role))
        };
        if scenario.publishers() > 0 && nobody(HostRole::publishes) {
            return Err(UndealtPlan::NobodyPublishes);
        }
        if scenario.subscribers() > 0 && nobody(HostRole::subscribes) {
            return Err(UndealtPlan::NobodySubscribes);
        }
        Ok(())
    }
}

/// One round of dealing by weight, as evenly as possible: the host for each turn. After it the
/// round begins again. Empty if all weights are 0.
fn round(weights: impl Iterator<Item = u32>) -> Vec<u16> {
    let weights: Vec<u32> = weights.collect();
    let divisor = weights
        .iter()
        .fold(0, |divisor, weight| {
            greatest_common_divisor(divisor, *weight)
        })
        .max(1);
    let turns: u32 = weights.iter().sum::<u32>() / divisor;
    let mut credit = vec![0i64; weights.len()];
    let mut next = || {
        for (credit, weight) in credit.iter_mut().zip(&weights) {
            *credit += i64::from(weight / divisor);
        }
        let most = (0..credit.len())
            .rev()
            .max_by_key(|at| credit[*at])
            .unwrap_or(0);
        credit[most] -= i64::from(turns);
        most as u16
    };
    (0..turns).map(|_| next()).collect()
}

/// One host's part of a plan. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Part {
    placement: Placement,
    me: u16,
    /// Host of each participant, by global index.
    owners: Arc<[u16]>,
    /// This host's participants, by position.
    own: Arc<[Own]>,
    /// This host's participants of each group of the scenario, over all rooms.
    pub(super) headcount: Arc<[u64]>,
}

/// A participant of this host.
#[derive(Clone, Copy, Debug)]
struct Own {
    index: u32,
    /// Number of this host's participants that come before it in its room.
    rank: u32,
}

impl Part {
    /// Returns the part of host `me` (an index into the placement's vantages) in this scenario.
    ///
    /// # Errors
    /// Says what cannot be divided, or that a host would have nothing to do.
    pub fn new(placement: Placement, me: usize, scenario: &Scenario) -> Result<Part, UndealtPlan> {
        placement.must_make_sense(scenario)?;
        let hosts = placement.vantages.len();
        if me >= hosts {
            return Err(UndealtPlan::NoSuchHost {
                number: me + 1,
                hosts,
            });
        }
        let owners = placement.owners(scenario);
        let mut is_busy = vec![false; hosts];
        owners
            .iter()
            .for_each(|owner| is_busy[usize::from(*owner)] = true);
        if let Some(idle) = is_busy.iter().position(|busy| !busy) {
            let (count, what) = if placement.rooms_apart {
                (u64::from(scenario.rooms.count), "rooms")
            } else {
                (scenario.total(), "participants")
            };
            return Err(UndealtPlan::IdleHost {
                number: idle + 1,
                hosts,
                count,
                what,
            });
        }
        let own = own(&owners, me as u16, scenario);
        Ok(Part {
            headcount: headcount(&own, scenario).into(),
            me: me as u16,
            owners: owners.into(),
            own: own.into(),
            placement,
        })
    }

    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Index of this host among the placement's vantages.
    pub fn me(&self) -> usize {
        self.me.into()
    }

    /// The host that runs the participant with this global index. `None` if the plan has no such
    /// participant.
    pub fn owner(&self, index: u32) -> Option<usize> {
        self.owners
            .get(index as usize)
            .map(|owner| usize::from(*owner))
    }

    /// The global index of the participant at `position` of this host.
    pub(super) fn index(&self, position: u32) -> u32 {
        self.own[position as usize].index
    }

    /// Number of this host's participants that come before it in its room.
    pub(super) fn rank(&self, position: u32) -> u32 {
        self.own[position as usize].rank
    }

    /// Number of this host's participants with a lower index.
    pub(super) fn before(&self, index: u64) -> u32 {
        self.own.partition_point(|own| u64::from(own.index) < index) as u32
    }
}

/// Participants of host `me` in its joining order, which is the order of their indices. So
/// publishers come first, and for any number of subscribers in each room, the present ones are the
/// first ones of every host.
fn own(owners: &[u16], me: u16, scenario: &Scenario) -> Vec<Own> {
    let mut ranks = vec![0; scenario.rooms.count as usize];
    let mut own = |index: u32| {
        let rank = &mut ranks[(index % scenario.rooms.count) as usize];
        *rank += 1;
        Own {
            index,
            rank: *rank - 1,
        }
    };
    let mine = (0..owners.len() as u32).filter(|index| owners[*index as usize] == me);
    mine.map(&mut own).collect()
}

fn headcount(own: &[Own], scenario: &Scenario) -> Vec<u64> {
    let mut headcount = vec![0; scenario.groups.len()];
    for place in own.iter().map(|own| own.index / scenario.rooms.count) {
        let mut end = 0;
        let group = scenario.groups.iter().position(|group| {
            end += group.count;
            place < end
        });
        if let Some(group) = group {
            headcount[group] += 1;
        }
    }
    headcount
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use super::super::scenario::RoomPeople;
    use super::super::tests::{plan, set_people};
    use super::super::{Kind, ParticipantPlan, Plan, Subscribers};
    use super::HostRole::{Both, Publish, Subscribe};
    use super::*;

    fn placement(of: &[(HostRole, u32)], rooms_apart: bool) -> Placement {
        Placement {
            vantages: of
                .iter()
                .map(|(role, weight)| VantagePlan {
                    role: *role,
                    weight: *weight,
                })
                .collect(),
            rooms_apart,
        }
    }

    /// The same plan from each host's point of view.
    fn hosts(plan: &Plan, placement: &Placement) -> Vec<Plan> {
        (0..placement.vantages.len())
            .map(|me| Plan {
                part: Some(Part::new(placement.clone(), me, &plan.scenario).unwrap()),
                ..plan.clone()
            })
            .collect()
    }

    fn of_shape(
        room_count: u32,
        audio_publishers: u32,
        video_publishers: u32,
        subscribers: u32,
        meeting: bool,
    ) -> Plan {
        let mut plan = plan();
        let people = RoomPeople {
            audio_publishers,
            video_publishers,
            subscribers,
            meeting,
        };
        set_people(&mut plan, room_count, people);
        let mix = "udp:60,tcp:15,turn-tls:25".parse().unwrap();
        plan.scenario = plan.scenario.over(&mix);
        plan
    }

    fn is_subscriber(participant: &ParticipantPlan) -> bool {
        !participant.publishes_audio && !participant.publishes_video
    }

    /// Shapes and placements of all kinds.
    fn worlds() -> Vec<(Plan, Placement)> {
        let groups: [&[(HostRole, u32)]; 6] = [
            &[(Both, 1)],
            &[(Both, 1), (Both, 1), (Both, 1)],
            &[(Both, 1), (Both, 2)],
            &[(Publish, 1), (Subscribe, 1), (Subscribe, 1)],
            &[(Publish, 1), (Both, 3), (Subscribe, 2), (Both, 7)],
            &[(Both, 100), (Both, 99)],
        ];
        let mut worlds = Vec::new();
        for group in groups {
            for (rooms, audio, video, subscribers) in [
                (1, 18, 4, 24),
                (3, 8, 3, 12),
                (7, 3, 5, 26),
                (13, 13, 1, 26),
            ] {
                for (meeting, rooms_apart) in [(false, false), (true, false), (false, true)] {
                    let plan = of_shape(rooms, audio, video, subscribers, meeting);
                    let placement = placement(group, rooms_apart);
                    if Part::new(placement.clone(), 0, &plan.scenario).is_ok() {
                        worlds.push((plan, placement));
                    }
                }
            }
        }
        assert!(worlds.len() > 45, "{}", worlds.len());
        worlds
    }

    #[test]
    fn together_the_hosts_play_everybody_and_nobody_twice() {
        for (plan, placement) in worlds() {
            let hosts = hosts(&plan, &placement);
            let alone: Vec<ParticipantPlan> = plan.participants().collect();
            let mut played: Vec<ParticipantPlan> =
                hosts.iter().flat_map(Plan::participants).collect();
            played.sort_by_key(|participant| participant.index);
            assert_eq!(played.len(), alone.len());
            for (played, alone) in played.iter().zip(&alone) {
                let (position, join_offset) = (played.position, played.join_offset);
                let alone = ParticipantPlan {
                    position,
                    join_offset,
                    ..alone.clone()
                };
                assert_eq!(*played, alone);
            }
            let identities: BTreeSet<&str> = played
                .iter()
                .map(|participant| participant.identity.as_str())
                .collect();
            assert_eq!(identities.len(), played.len());
        }
    }

    #[test]
    fn every_host_has_its_role_and_knows_whose_everybody_is() {
        for (plan, placement) in worlds() {
            let hosts = hosts(&plan, &placement);
            for (me, host) in hosts.iter().enumerate() {
                let role = placement.vantages[me].role;
                for participant in host.participants() {
                    assert!(if is_subscriber(&participant) {
                        role.subscribes()
                    } else {
                        role.publishes()
                    });
                    let owners = hosts.iter().map(|host| {
                        host.part
                            .as_ref()
                            .and_then(|part| part.owner(participant.index))
                    });
                    assert!(owners.eq(hosts.iter().map(|_| Some(me))));
                }
                assert_eq!(
                    host.part.as_ref().unwrap().owner(plan.total_participants()),
                    None
                );
            }
        }
    }

    #[test]
    fn totals_of_a_host_are_of_its_own_and_the_publishers_of_others_are_expected_too() {
        for (plan, placement) in worlds() {
            let hosts = hosts(&plan, &placement);
            for host in &hosts {
                let own: Vec<_> = host.participants().collect();
                assert_eq!(host.total_participants() as usize, own.len());
                assert_eq!(host.everybody().count() as u32, plan.total_participants());
                for kind in [Kind::Audio, Kind::Video] {
                    let expected = own
                        .iter()
                        .map(|participant| u64::from(host.planned_tracks(participant, kind)));
                    assert_eq!(host.total_planned_tracks(kind), expected.sum::<u64>());
                    let published = own
                        .iter()
                        .filter(|participant| participant.publishes(kind))
                        .count();
                    assert_eq!(host.total_published_tracks(kind), published as u64);
                }
                let sockets: u64 = own
                    .iter()
                    .map(|participant| participant.sockets(host.connection))
                    .sum();
                assert_eq!(host.total_sockets(), sockets);
                let last = Duration::from_secs_f64(
                    (own.len() - 1) as f64 / host.scenario.joins_per_second,
                );
                assert_eq!(
                    (host.joining(), own.last().unwrap().join_offset),
                    (last, last)
                );
            }
            for kind in [Kind::Audio, Kind::Video] {
                let sum = |of: fn(&Plan, Kind) -> u64| {
                    hosts.iter().map(|host| of(host, kind)).sum::<u64>()
                };
                assert_eq!(
                    sum(Plan::total_planned_tracks),
                    plan.total_planned_tracks(kind)
                );
                assert_eq!(
                    sum(Plan::total_published_tracks),
                    plan.total_published_tracks(kind)
                );
            }
            let received: f64 = hosts
                .iter()
                .map(|host| host.load().packets_received_per_second)
                .sum();
            assert!(
                (received - plan.load().packets_received_per_second).abs()
                    < 1e-6 * received.max(1.0)
            );
        }
    }

    #[test]
    fn however_many_subscribers_a_room_has_they_are_the_first_of_every_host() {
        for (plan, placement) in worlds() {
            for host in hosts(&plan, &placement).iter().chain([&plan]) {
                let own: Vec<_> = host.participants().collect();
                assert!(
                    own.iter()
                        .zip(0..)
                        .all(|(participant, at)| participant.position == at)
                );
                assert!(own.is_sorted_by_key(|participant| participant.index));
                for each in 0..=plan.scenario.subscribers() + 1 {
                    let inside = host.participants_with(Subscribers::PerRoom(each)) as usize;
                    let is_in = |participant: &ParticipantPlan| {
                        participant.place < plan.scenario.publishers() + each
                    };
                    assert!(own[..inside].iter().all(is_in) && !own[inside..].iter().any(is_in));
                    let subscribers = own[..inside]
                        .iter()
                        .filter(|participant| is_subscriber(participant))
                        .count() as u32;
                    assert_eq!(
                        host.participants_with(Subscribers::Total(subscribers)),
                        inside as u32
                    );
                }
            }
        }
    }

    #[test]
    fn with_so_many_for_each_unit_of_weight_every_room_has_the_same_of_every_host() {
        for (mut plan, placement) in worlds() {
            let people = RoomPeople {
                subscribers: placement.subscribers_of_room(5),
                ..plan.scenario.people()
            };
            plan.scenario.set_people(people);
            for (me, host) in hosts(&plan, &placement).iter().enumerate() {
                let rooms: BTreeSet<u32> = host
                    .participants()
                    .map(|participant| participant.room)
                    .collect();
                for room in rooms {
                    let subscribers = host
                        .participants()
                        .filter(|p| p.room == room && is_subscriber(p))
                        .count() as u32;
                    assert_eq!(
                        subscribers,
                        placement.subscribers_of_host(me, 5),
                        "{placement:?} {:?}",
                        plan.scenario.groups
                    );
                }
            }
        }
    }

    #[test]
    fn everything_is_dealt_by_weight() {
        let of = |plan: &Plan, weights: &[(HostRole, u32)], rooms_apart| -> Vec<(u64, u64)> {
            hosts(plan, &placement(weights, rooms_apart))
                .iter()
                .map(|host| {
                    (
                        host.total_published_tracks(Kind::Audio),
                        host.total_planned_tracks(Kind::Audio),
                    )
                })
                .collect()
        };
        // One publisher in each of six rooms, and 12 subscribers there that each get a track.
        let few = of_shape(6, 1, 0, 12, false);
        assert_eq!(
            of(&few, &[(Both, 1), (Both, 1), (Both, 1)], false),
            [(2, 24); 3]
        );
        assert_eq!(of(&few, &[(Both, 2), (Both, 1)], false), [(4, 48), (2, 24)]);
        assert_eq!(of(&few, &[(Both, 2), (Both, 1)], true), [(4, 48), (2, 24)]);
        assert_eq!(
            of(&few, &[(Publish, 1), (Subscribe, 3), (Subscribe, 1)], false),
            [(6, 0), (0, 54), (0, 18)]
        );
        // As many rooms as hosts: no room's publishers are all on one host.
        let many = of_shape(3, 3, 0, 0, false);
        for host in hosts(&many, &placement(&[(Both, 1); 3], false)) {
            assert_eq!(
                host.participants()
                    .map(|participant| participant.room)
                    .collect::<BTreeSet<_>>()
                    .len(),
                3
            );
        }
    }

    #[test]
    fn one_host_that_plays_all_plays_it_as_without_a_part() {
        let plan = of_shape(3, 2, 1, 5, true);
        let host = &hosts(&plan, &placement(&[(Both, 7)], false))[0];
        assert!(host.participants().eq(plan.participants()));
        assert_eq!(plan.split(3), host.split(3));
        assert_eq!(
            (plan.load(), plan.estimate()),
            (host.load(), host.estimate())
        );
        assert!(
            (0..7).all(|each| plan.participants_with(Subscribers::PerRoom(each))
                == host.participants_with(Subscribers::PerRoom(each)))
        );
    }

    #[test]
    fn the_shards_of_a_host_share_its_part_of_every_room_evenly() {
        let plan = of_shape(4, 6, 6, 24, false);
        for host in hosts(&plan, &placement(&[(Both, 1); 3], false)) {
            let own: Vec<_> = host.participants().collect();
            let shards = host.split(2);
            for shard in &shards {
                let publishers = shard
                    .iter()
                    .filter(|position| own[**position as usize].publishes_video)
                    .count();
                assert_eq!((shard.len(), publishers), (20, 4));
            }
            let all: BTreeSet<u32> = shards.concat().into_iter().collect();
            assert!(all.into_iter().eq(0..40), "dense");
        }
    }

    #[test]
    fn what_cannot_be_dealt_is_refused_with_what_to_do() {
        let refused = |plan: &Plan, of: &[(HostRole, u32)], rooms_apart, says: &str| {
            let why = Part::new(placement(of, rooms_apart), 0, &plan.scenario)
                .unwrap_err()
                .to_string();
            assert!(why.contains(says), "{why}");
        };
        let plan = of_shape(2, 1, 1, 3, false);
        refused(&plan, &[], false, "1 to 256");
        refused(&plan, &[(Both, 0)], false, "1 to 100");
        refused(&plan, &[(Both, 101)], false, "1 to 100");
        refused(&plan, &[(Subscribe, 1)], false, "no host publishes");
        refused(&plan, &[(Publish, 1)], false, "no host subscribes");
        refused(&plan, &[(Publish, 1), (Subscribe, 1)], true, "--role");
        refused(
            &plan,
            &[(Both, 1); 3],
            true,
            "2 rooms for 3 hosts leave host 3 nothing to do",
        );
        refused(
            &of_shape(1, 1, 0, 1, false),
            &[(Both, 1); 3],
            false,
            "nothing to do",
        );
        refused(
            &of_shape(1, 0, 0, 0, false),
            &[(Both, 1)],
            false,
            "1 to 1000000",
        );
        assert!(
            Part::new(placement(&[(Both, 1)], false), 1, &plan.scenario)
                .unwrap_err()
                .to_string()
                .contains("no host 2 among 1")
        );
    }
}
