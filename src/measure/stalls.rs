//! Stalls of the generator, seen by late ticks, and of the server, seen by a silence while we sent.
//!
//! Publishers live in the generator, so a stalled generator makes the server silent too. Therefore
//! a silence counts as the server's only if it follows a send and falls into time in which every
//! engine thread was awake.

use std::collections::VecDeque;
use std::time::Duration;

use super::presence::{ThreadPresence, step_of, step_start};
use crate::units::Time;

/// Lateness from which a tick counts as a stall: the slot of an audio frame has passed.
pub const STALL_MIN: Duration = Duration::from_millis(20);
/// Silence from which the server counts as stalled. A busy host causes shorter silences with a
/// healthy server.
pub const SILENCE_MIN: Duration = Duration::from_millis(40);
/// Factor over the usual wait from which a silence counts. The usual wait is the time until the
/// next datagram, at the 90th percentile of the last [`ANSWERS_MAX`] sends.
const SILENCE_FACTOR: u64 = 3;
const ANSWERS_MAX: usize = 256;
/// Number of answers below which no wait is usual yet. They take a second of sending, or less.
const ANSWERS_MIN: usize = 50;
/// Time after a stall of the generator in which silences are ignored: its first frames must first
/// go to the server and back.
const GRACE: Duration = Duration::from_millis(50);
/// Gaps with less than this between them are one stall, because a starved thread runs briefly now
/// and then.
const JOIN: Duration = Duration::from_millis(250);
/// Silence that brief lateness of the generator does not explain, however often.
const WHOLE_MIN: Duration = Duration::from_secs(1);

/// Span of time in which the generator or the server stood still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct StillSpan {
    pub from: Time,
    pub to: Time,
}

impl StillSpan {
    pub fn length(&self) -> Duration {
        self.to.since(self.from)
    }

    /// Returns how much of this span lies between two moments.
    pub fn within(&self, from: Time, to: Time) -> Duration {
        self.to.min(to).since(self.from.max(from))
    }
}

/// Merges the gaps of all threads into an ordered list without overlaps.
pub fn union(mut gaps: Vec<StillSpan>) -> Vec<StillSpan> {
    gaps.sort_unstable();
    let mut apart: Vec<StillSpan> = Vec::with_capacity(gaps.len());
    for gap in gaps {
        match apart.last_mut().filter(|last| gap.from <= last.to) {
            Some(last) => last.to = last.to.max(gap.to),
            None => apart.push(gap),
        }
    }
    apart
}

/// Groups gaps with less than `JOIN` between them into one stall each.
pub fn gathered(gaps: &[StillSpan]) -> Vec<&[StillSpan]> {
    gaps.chunk_by(|one, next| next.from.since(one.to) < JOIN)
        .collect()
}

/// Groups spans of silence between which nothing came into one stall each, however long the
/// generator itself stood still between them.
pub fn gathered_in_silence<'a>(
    gaps: &'a [StillSpan],
    arrivals: &ThreadPresence,
) -> Vec<&'a [StillSpan]> {
    gaps.chunk_by(|one, next| {
        next.from.since(one.to) < JOIN || came_between(one, next, arrivals).is_none()
    })
    .collect()
}

/// Returns the first step after one span and before the next in which something came.
fn came_between(one: &StillSpan, next: &StillSpan, arrivals: &ThreadPresence) -> Option<u64> {
    arrivals.next(step_of(one.to), step_of(next.from))
}

/// Returns the spans between `from` and `until` in which nothing came although we sent and were
/// awake.
///
/// `asleep` has the generator's own gaps, as [`union`] returns them.
pub fn silences(
    sends: &ThreadPresence,
    arrivals: &ThreadPresence,
    asleep: &[StillSpan],
    from: Time,
    until: Time,
) -> Vec<StillSpan> {
    let within = |asleep: &[StillSpan]| silences_beside(sends, arrivals, asleep, (from, until));
    // On a busy host the generator is late many times a second. That explains short silences, but
    // none of a second.
    let long: Vec<StillSpan> = asleep
        .iter()
        .filter(|gap| gap.length() >= JOIN)
        .copied()
        .collect();
    let whole = within(&long);
    let whole = whole.into_iter().filter(|gap| gap.length() >= WHOLE_MIN);
    union(within(asleep).into_iter().chain(whole).collect())
}

/// The same, without the time in which the generator stood still or had just done so.
fn silences_beside(
    sends: &ThreadPresence,
    arrivals: &ThreadPresence,
    asleep: &[StillSpan],
    (from, until): (Time, Time),
) -> Vec<StillSpan> {
    let end = step_of(until);
    let (mut usual, mut silences) = (VecDeque::with_capacity(ANSWERS_MAX), Vec::new());
    let mut asleep = asleep.iter().peekable();
    let mut step = step_of(from);
    while step < end {
        // A step belongs to a gap if they touch at all.
        while asleep
            .peek()
            .is_some_and(|gap| step_of(gap.to + GRACE) < step)
        {
            asleep.next();
        }
        let doze = asleep.peek().map_or(end, |gap| step_of(gap.from).min(end));
        if doze <= step || !sends.has(step) {
            step += 1;
            continue;
        }
        let answer = arrivals.next(step, doze);
        let waited = answer.unwrap_or(doze) - step;
        if is_silence(waited, &mut usual) {
            silences.push(StillSpan {
                from: step_start(step),
                to: step_start(step + waited),
            });
            step += waited;
            continue;
        }
        if answer.is_some() {
            if usual.len() == ANSWERS_MAX {
                usual.pop_front();
            }
            usual.push_back(waited);
        }
        step += 1;
    }
    silences
}

/// Returns whether waiting for so many steps is unusually long.
fn is_silence(waited: u64, usual: &mut VecDeque<u64>) -> bool {
    if usual.len() < ANSWERS_MIN || step_start(waited).since(Time::ZERO) < SILENCE_MIN {
        return false;
    }
    let mut sorted: Vec<u64> = usual.iter().copied().collect();
    sorted.sort_unstable();
    waited >= SILENCE_FACTOR * sorted[sorted.len() * 9 / 10]
}

/// One stall, as the report shows it.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Stall {
    pub side: Side,
    pub cause: Cause,
    /// Seconds since the start of the run.
    pub at: f64,
    pub until: f64,
    /// Time within this span that was stood still.
    pub seconds: f64,
    pub evidence: String,
}

/// Side on which the cause of a stall lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// This program had the CPU and was late.
    Generator,
    /// The host of this program did not let it run.
    Host,
    /// The server, or the network path to it.
    Server,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// All threads of the process stopped, without a wait for a CPU.
    Stopped,
    /// The process's control group had used up its CPU quota.
    Throttled,
    /// The hypervisor ran something else.
    Stolen,
    /// Other threads of this host had the CPU.
    RunQueue,
    /// The engine thread's own work, or a call that blocked it.
    Engine,
    /// Nothing came from the server.
    Silence,
}

impl Cause {
    pub const fn side(self) -> Side {
        match self {
            Cause::Stopped | Cause::Throttled | Cause::Stolen | Cause::RunQueue => Side::Host,
            Cause::Engine => Side::Generator,
            Cause::Silence => Side::Server,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::presence::Marks;

    const fn gap(from_ms: u64, to_ms: u64) -> StillSpan {
        StillSpan {
            from: Time::from_millis(from_ms),
            to: Time::from_millis(to_ms),
        }
    }

    /// Makes a mark every `interval_ms` from 0 to `end_ms`, except within `pauses`.
    fn every(interval_ms: u64, end_ms: u64, pauses: &[(u64, u64)]) -> ThreadPresence {
        let mut all = ThreadPresence::default();
        for ms in (0..end_ms).step_by(interval_ms as usize) {
            if pauses.iter().any(|(from, to)| (*from..*to).contains(&ms)) {
                continue;
            }
            let mut marks = Marks::default();
            marks.mark(Time::from_millis(ms));
            all.merge(&marks.take());
        }
        all
    }

    fn found(
        sends: &ThreadPresence,
        arrivals: &ThreadPresence,
        asleep: &[StillSpan],
    ) -> Vec<(u64, u64)> {
        silences(
            sends,
            arrivals,
            asleep,
            Time::ZERO,
            Time::from_millis(20_000),
        )
        .iter()
        .map(|gap| (gap.from.as_millis(), gap.to.as_millis()))
        .collect()
    }

    fn about(found: &[(u64, u64)], expected: &[(u64, u64)]) -> bool {
        found.len() == expected.len()
            && found
                .iter()
                .zip(expected)
                .all(|(a, b)| a.0.abs_diff(b.0) <= 12 && a.1.abs_diff(b.1) <= 12)
    }

    #[test]
    fn a_server_that_falls_silent_while_we_send_is_found_to_a_few_milliseconds() {
        let sends = every(3, 20_000, &[]);
        for pauses in [
            &[][..],
            &[(7_000, 7_060)],
            &[(7_000, 9_000), (9_500, 9_900)],
            &[(18_000, 20_000)],
        ] {
            let silent = found(&sends, &every(3, 20_000, pauses), &[]);
            assert!(about(&silent, pauses), "{pauses:?}: {silent:?}");
        }
    }

    #[test]
    fn a_silence_during_our_own_stall_or_right_after_it_is_not_the_servers() {
        let pause = [(7_000, 9_000)];
        let (sends, arrivals) = (
            every(3, 20_000, &pause),
            every(3, 20_000, &[(7_010, 9_030)]),
        );
        assert_eq!(found(&sends, &arrivals, &[gap(7_000, 9_000)]), []);
        // The server stalls at the same time, and for a second more.
        let arrivals = every(3, 20_000, &[(7_010, 10_000)]);
        assert!(about(
            &found(&sends, &arrivals, &[gap(7_000, 9_000)]),
            &[(9_050, 10_000)]
        ));
        // Our stall lies in the middle of the server's.
        let arrivals = every(3, 20_000, &[(6_000, 10_000)]);
        assert!(about(
            &found(&sends, &arrivals, &[gap(7_000, 9_000)]),
            &[(6_000, 7_000), (9_050, 10_000)]
        ));
    }

    #[test]
    fn who_sends_nothing_waits_for_nothing() {
        let pauses = [(5_000, 5_400), (8_000, 12_000)];
        let (sends, arrivals) = (every(3, 20_000, &pauses), every(3, 20_000, &pauses));
        assert_eq!(found(&sends, &arrivals, &[]), []);
    }

    #[test]
    fn what_is_usual_is_no_stall() {
        let sends = every(3, 20_000, &[]);
        // Publishers only: nothing comes except an occasional report.
        assert_eq!(found(&sends, &every(450, 20_000, &[]), &[]), []);
        assert!(about(
            &found(&sends, &every(100, 20_000, &[(9_000, 10_300)]), &[]),
            &[(8_903, 10_300)]
        ));
        // Nothing has ever come yet, so there is nothing to compare with.
        assert_eq!(found(&sends, &every(3, 20_000, &[(0, 4_000)]), &[]), []);
    }

    #[test]
    fn gaps_of_several_threads_become_one_stall() {
        let all = union(vec![
            gap(100, 200),
            gap(150, 300),
            gap(450, 500),
            gap(900, 950),
        ]);
        assert_eq!(all, [gap(100, 300), gap(450, 500), gap(900, 950)]);
        let stalls: Vec<usize> = gathered(&all).iter().map(|pieces| pieces.len()).collect();
        assert_eq!(stalls, [2, 1]);
        assert_eq!(
            gap(100, 300).within(Time::from_millis(250), Time::from_millis(900)),
            Duration::from_millis(50)
        );
        assert_eq!(
            gap(100, 300).within(Time::from_millis(400), Time::from_millis(900)),
            Duration::ZERO
        );
    }
}
