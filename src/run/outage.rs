//! Detects that many participants lost the server at once, which says something about the server
//! and not about each participant.

use std::time::Duration;

use crate::units::Time;
use crate::words;

/// Losses within this time count as one outage. They are spread because each participant notices a
/// silent server by its own time-outs.
const TOGETHER: Duration = Duration::from_secs(5);
/// Silence before the first loss from which the server counts as lost when the silence began. A
/// participant gives a silent server up only many seconds later.
const SILENT_BEFORE: Duration = Duration::from_secs(1);
/// Most losses that are kept. Further ones are not noted.
const LOSSES_MAX: usize = 400_000;

/// Connections that were lost though nobody had asked the participant to leave.
#[derive(Default)]
pub(super) struct Outages {
    losses: Vec<Loss>,
}

struct Loss {
    at: Time,
    why: String,
    /// Number of participants that were known to be present then, this one included.
    present: u32,
    /// Index in the order in which losses became known.
    number: u32,
}

impl Outages {
    pub fn note(&mut self, at: Time, why: &str, present: u32) {
        if self.losses.len() < LOSSES_MAX {
            self.losses.push(Loss {
                at,
                why: why.to_owned(),
                present,
                number: self.losses.len() as u32,
            });
        }
    }

    /// Returns why the run fails if more than half of the participants present lost the server at
    /// once. `end` is the time until which media was owed, and `last_before` gives the last moment
    /// before another one at which anything arrived.
    pub fn complaint(
        &mut self,
        end: Time,
        last_before: impl Fn(Time) -> Option<Time>,
    ) -> Option<String> {
        self.losses.sort_by_key(|loss| loss.at);
        let before_end = self.losses.partition_point(|loss| loss.at < end);
        let losses = &self.losses[..before_end];
        let together = |first: usize| {
            let from = losses[first].at;
            let count = losses[first..].partition_point(|loss| loss.at < from + TOGETHER);
            &losses[first..first + count]
        };
        let worst = (0..losses.len())
            .map(together)
            .max_by_key(|losses| losses.len())?;
        let (present, count) = (present_before(worst)?, worst.len() as u32);
        if count * 2 <= present {
            return None;
        }
        let (first, last) = (worst.first()?, worst.last()?);
        let who = format!(
            "{} of {}",
            words::number(count.into()),
            words::count(present.into(), "participant")
        );
        let silent_since = last_before(first.at);
        let silent_since = silent_since.filter(|at| first.at.since(*at) >= SILENT_BEFORE);
        let (at, fate) = match silent_since {
            Some(at) => (
                at,
                format!(
                    "nothing came from then on, and {who} gave it up, the first one {:.1} s later, the last one {:.1} s later",
                    first.at.since(at).as_secs_f64(),
                    last.at.since(at).as_secs_f64()
                ),
            ),
            None => (
                first.at,
                format!(
                    "{who} lost it, the last one {:.1} s later",
                    last.at.since(first.at).as_secs_f64()
                ),
            ),
        };
        Some(format!(
            "the server was lost {:.1} s into the run: {fate} ({})",
            at.since(Time::ZERO).as_secs_f64(),
            commonest(worst)
        ))
    }
}

/// Number of participants present before the first of these losses. Each loss lowered the count
/// when it became known.
fn present_before(losses: &[Loss]) -> Option<u32> {
    let mut known: Vec<&Loss> = losses.iter().collect();
    known.sort_by_key(|loss| loss.number);
    let counted = (0..).zip(known).map(|(before, loss)| loss.present + before);
    counted.max()
}

fn commonest(losses: &[Loss]) -> &str {
    let count = |why: &str| losses.iter().filter(|loss| loss.why == why).count();
    let mut reasons: Vec<&str> = losses.iter().map(|loss| loss.why.as_str()).collect();
    reasons.sort_unstable();
    reasons.dedup();
    let most = reasons.into_iter().max_by_key(|why| count(why));
    most.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(losses: &[(u64, &str)], present: u32) -> Option<String> {
        let mut outages = Outages::default();
        for ((ms, why), here) in losses.iter().zip((0..=present).rev()) {
            outages.note(Time::from_millis(*ms), why, here);
        }
        outages.complaint(Time::from_millis(30_000), |before| {
            Some(before - SILENT_BEFORE / 2)
        })
    }

    #[test]
    fn a_server_that_fell_silent_was_lost_when_the_last_packet_came() {
        let mut outages = Outages::default();
        outages.note(Time::from_millis(41_800), "ICE: no answer", 2);
        outages.note(Time::from_millis(41_900), "ICE: no answer", 1);
        let last = |_| Some(Time::from_millis(3_200));
        assert_eq!(
            outages
                .complaint(Time::from_millis(70_000), last)
                .as_deref(),
            Some(
                "the server was lost 3.2 s into the run: nothing came from then on, and 2 of 2 participants gave it up, the first one 38.6 s later, the last one 38.7 s later (ICE: no answer)"
            )
        );
    }

    #[test]
    fn a_server_that_most_lost_at_once_is_named_with_its_moment() {
        let losses = [(4_100, "closed"), (4_300, "closed"), (4_200, "silent")];
        assert_eq!(
            told(&losses, 4).as_deref(),
            Some(
                "the server was lost 4.1 s into the run: 3 of 4 participants lost it, the last one 0.2 s later (closed)"
            )
        );
        assert_eq!(told(&losses, 7), None, "fewer than half of them");
        assert_eq!(told(&[(1_000, "closed"), (9_000, "closed")], 3), None);
        assert_eq!(told(&[(31_000, "closed")], 1), None, "after the end");
        assert_eq!(told(&[], 3), None);
        assert!(told(&[(2_000, "closed")], 1).is_some());
    }
}
