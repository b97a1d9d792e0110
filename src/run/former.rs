//! Outcomes of connections that their participants have replaced by others. They are folded
//! together as they come, so a participant that reconnects ten thousand times costs no more than
//! one that reconnects twice.

use std::collections::BTreeMap;

use crate::engine::PeerOutcome;
use crate::units::Time;

/// Folded outcomes by participant.
#[derive(Default)]
pub(super) struct Former(BTreeMap<u32, FormerOfOne>);

/// One participant's outcomes. Those of the current visit are separate, because only they say what
/// is live.
struct FormerOfOne {
    visit: Time,
    earlier: Option<PeerOutcome>,
    current: Option<PeerOutcome>,
}

impl Former {
    /// Adds an outcome. `visit` is when the participant was last due to join.
    pub fn add(&mut self, outcome: PeerOutcome, visit: Time) {
        let of_one = self.0.entry(outcome.participant).or_insert(FormerOfOne {
            visit,
            earlier: None,
            current: None,
        });
        if visit > of_one.visit {
            of_one.visit = visit;
            if let Some(ended) = of_one.current.take() {
                fold(&mut of_one.earlier, ended);
            }
        }
        if outcome.intended_at >= visit {
            fold(&mut of_one.current, outcome);
        } else {
            fold(&mut of_one.earlier, outcome);
        }
    }

    pub fn outcomes(&self) -> impl Iterator<Item = &PeerOutcome> {
        let of_all = self.0.values();
        of_all.flat_map(|of_one| of_one.earlier.iter().chain(&of_one.current))
    }
}

fn fold(all: &mut Option<PeerOutcome>, later: PeerOutcome) {
    *all = Some(all.take().unwrap_or_default().plus(later));
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::engine::subscriber::StreamOutcome;
    use crate::measure::Kind;
    use crate::media::identity::Origin;
    use crate::run::account::quality;
    use crate::transport::receive::ReceiveCounts;
    use crate::transport::rtp::Ssrc;

    fn outcome(participant: u32, at: u64) -> PeerOutcome {
        let stream = |number: u64| StreamOutcome {
            kind: Kind::Audio,
            foreign: false,
            last_frame_at: None,
            layer: None,
            counts: ReceiveCounts::default(),
            losses: Default::default(),
            frames_late: 1,
            freezes: 2,
            frames_late_for_playout: 3,
            played_us: at,
            concealed_us: number,
            jitter: Duration::from_micros(at),
            latency_us_max: None,
            ssrc: Ssrc((at * 10 + number) as u32),
            origin: Some(Origin {
                publisher: number as u32,
                track: 0,
            }),
            live: !(at + number).is_multiple_of(3),
            frames_expected: at + number,
            frames_delivered: at,
            frames_overdue: number,
            latency_us_mean: Some(at * number),
            mos_thousandths: (number != 1).then_some(20_000 - at),
        };
        PeerOutcome {
            participant,
            intended_at: Time::from_millis(at),
            rtt_rtcp: None,
            streams: (0..3).map(stream).collect(),
        }
    }

    /// Asserts that the folded outcomes say the same as all of them.
    fn assert_same(former: &Former, all: &[PeerOutcome], visit: Time) {
        let kept: Vec<&PeerOutcome> = former.outcomes().collect();
        let all: Vec<&PeerOutcome> = all.iter().collect();
        let quality =
            |peers: &[&PeerOutcome]| format!("{:?}", quality(peers, Kind::Audio, 3, |_| true));
        assert_eq!(quality(&kept), quality(&all));
        let here = |peers: &[&PeerOutcome]| {
            let here = peers
                .iter()
                .copied()
                .filter(|peer| peer.intended_at >= visit);
            quality(&here.collect::<Vec<_>>())
        };
        assert_eq!(here(&kept), here(&all), "of the visit under way");
        let overdue = |peers: &[&PeerOutcome]| {
            let streams = peers.iter().flat_map(|peer| &peer.streams);
            streams.map(|stream| stream.frames_overdue).sum::<u64>()
        };
        assert_eq!(overdue(&kept), overdue(&all));
    }

    #[test]
    fn ten_thousand_reconnects_are_two_outcomes_and_say_what_all_of_them_said() {
        let (mut former, mut all) = (Former::default(), Vec::new());
        for at in 1..=10_000u64 {
            // Now and then it leaves and joins again. In between it only loses its connection.
            let visit = Time::from_millis(at - at % 7);
            former.add(outcome(4, at), visit);
            all.push(outcome(4, at));
            if at % 500 < 8 {
                assert_same(&former, &all, visit);
            }
        }
        let kept: Vec<_> = former.outcomes().collect();
        assert!(kept.len() <= 2);
        assert!(kept.iter().all(|peer| peer.streams.len() == 3));
    }
}
