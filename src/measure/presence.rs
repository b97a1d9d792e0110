//! Presence of packets, in steps of 4 ms: in which moments of a run something arrived, and in which
//! something was sent.
//!
//! A mark is a comparison and a store, so every packet can make one. Silence is the time between
//! the marks.

use crate::units::Time;

/// A step is 2^22 ns (4.19 ms), so that a shift converts a time to its step.
const STEP_SHIFT: u32 = 22;
/// Number of words that wait to be taken. A word has 64 steps (268 ms), so together they cover 17
/// s, more than any stall that a run survives.
const WORDS: usize = 64;

/// Returns the step that a moment lies in.
pub const fn step_of(at: Time) -> u64 {
    at.as_nanos() >> STEP_SHIFT
}

/// Returns the start of a step.
pub const fn step_start(step: u64) -> Time {
    Time::from_nanos(step << STEP_SHIFT)
}

/// Marks of one thread since they were last taken. Its memory is allocated once.
pub struct Marks {
    /// Word number and its bits, one for each step, at the word number modulo [`WORDS`].
    words: [(u64, u64); WORDS],
}

impl Default for Marks {
    fn default() -> Marks {
        Marks {
            words: [(0, 0); WORDS],
        }
    }
}

impl Marks {
    /// Marks the step of `at`. An arrival may lie in the past, because the kernel stamps packets
    /// that wait.
    #[inline]
    pub fn mark(&mut self, at: Time) {
        let step = step_of(at);
        let number = step / 64;
        let word = &mut self.words[number as usize % WORDS];
        if word.0 != number {
            *word = (number, 0);
        }
        word.1 |= 1 << (step % 64);
    }

    /// Returns what was marked since the last call, as words with their numbers.
    pub fn take(&mut self) -> Vec<(u64, u64)> {
        let marked = self.words.iter_mut().filter(|word| word.1 != 0);
        marked
            .map(|word| (word.0, std::mem::take(&mut word.1)))
            .collect()
    }
}

/// Marks of all threads over a whole run. They take 30 bytes a second.
#[derive(Clone, Debug, Default)]
pub struct ThreadPresence {
    words: Vec<u64>,
}

/// Upper bound for word numbers, which a run of weeks stays below. A stamp beyond it is invalid.
const WORDS_MAX: u64 = 1 << 24;

impl ThreadPresence {
    pub fn merge(&mut self, marks: &[(u64, u64)]) {
        for (number, bits) in marks.iter().filter(|(number, _)| *number < WORDS_MAX) {
            let at = *number as usize;
            if self.words.len() <= at {
                self.words.resize(at + 1, 0);
            }
            self.words[at] |= bits;
        }
    }

    pub fn has(&self, step: u64) -> bool {
        let word = usize::try_from(step / 64)
            .ok()
            .and_then(|at| self.words.get(at));
        word.is_some_and(|word| word >> (step % 64) & 1 == 1)
    }

    /// Returns the first marked step from `step` on, below `end`.
    pub fn next(&self, step: u64, end: u64) -> Option<u64> {
        (step..end).find(|step| self.has(*step))
    }

    /// Returns the last marked step before `step`.
    pub fn last_before(&self, step: u64) -> Option<u64> {
        let end = step.min(self.words.len() as u64 * 64);
        (0..end).rev().find(|step| self.has(*step))
    }

    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_kept_by_their_moment_whenever_they_are_made() {
        let (mut marks, mut all) = (Marks::default(), ThreadPresence::default());
        for ms in [0, 4_000, 4_001, 1_000, 9_999] {
            marks.mark(Time::from_millis(ms));
        }
        all.merge(&marks.take());
        assert!(marks.take().is_empty(), "what was taken is not told again");
        let steps: Vec<u64> = (0..step_of(Time::from_millis(11_000)))
            .filter(|step| all.has(*step))
            .collect();
        let expected = [0, 1_000, 4_000, 9_999].map(|ms| step_of(Time::from_millis(ms)));
        assert_eq!(steps, expected);
        assert_eq!(all.next(1, 5_000), Some(expected[1]));
        assert_eq!(all.next(expected[3] + 1, 5_000), None);
        assert_eq!(all.last_before(expected[2]), Some(expected[1]));
        assert_eq!(all.last_before(u64::MAX), Some(expected[3]));
        assert_eq!(all.last_before(0), None);
    }

    #[test]
    fn a_mark_a_round_later_does_not_pass_for_an_older_one() {
        let mut marks = Marks::default();
        let (early, late) = (
            Time::from_millis(5),
            Time::from_nanos(5_000_000 + ((WORDS as u64 * 64) << STEP_SHIFT)),
        );
        marks.mark(early);
        marks.mark(late);
        let mut all = ThreadPresence::default();
        all.merge(&marks.take());
        assert!(!all.has(step_of(early)) && all.has(step_of(late)));
    }

    #[test]
    fn an_absurd_moment_takes_no_memory() {
        let mut all = ThreadPresence::default();
        all.merge(&[(u64::MAX / 64, 1)]);
        assert!(all.is_empty());
    }
}
