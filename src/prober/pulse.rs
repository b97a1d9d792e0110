//! Decides when the next beat is due: each second, more often while the run waits for an order, and
//! at growing intervals while the coordinator does not answer.

use std::time::Duration;

use crate::units::Time;

/// Interval between two beats.
const BEAT: Duration = Duration::from_secs(1);
/// Interval while the run waits for an order. A stage that was ordered to begin at once begins at
/// most this much later here than on other hosts.
const BEAT_WAITING: Duration = Duration::from_millis(200);
/// Pause after the first unanswered beat. It doubles with each further one, up to `PAUSE_MAX`.
const PAUSE_MIN: Duration = Duration::from_millis(250);
/// Longest pause, unless a tenth of the run's patience is less. So a coordinator that comes back is
/// found before it counts this prober as missing.
const PAUSE_MAX: Duration = Duration::from_secs(5);

pub(super) struct Pulse {
    next_at: Time,
    pause: Duration,
    pause_max: Duration,
    answered_at: Time,
}

impl Pulse {
    /// The first beat is due at once. Silence is measured from `now`; `patience` is how much of it
    /// the run tolerates.
    pub fn new(now: Time, patience: Duration) -> Pulse {
        Pulse {
            next_at: now,
            pause: PAUSE_MIN,
            pause_max: (patience / 10).clamp(PAUSE_MIN, PAUSE_MAX),
            answered_at: now,
        }
    }

    pub fn next_at(&self) -> Time {
        self.next_at
    }

    /// Makes the next beat due at once, unless the last one was not answered.
    pub fn hurry(&mut self, now: Time) {
        if self.pause == PAUSE_MIN {
            self.next_at = self.next_at.min(now);
        }
    }

    pub fn handle_answer(&mut self, sent_at: Time, now: Time, waits: bool) {
        (self.answered_at, self.pause) = (now, PAUSE_MIN);
        // Count from the send time, so that slow answers do not make beats rarer, but always leave
        // a pause.
        let interval = if waits { BEAT_WAITING } else { BEAT };
        self.next_at = (sent_at + interval).max(now + BEAT_WAITING / 4);
    }

    pub fn handle_silence(&mut self, now: Time) {
        self.next_at = now + self.pause;
        self.pause = (self.pause * 2).min(self.pause_max);
    }

    /// Whether the last beat was not answered.
    pub fn is_unanswered(&self) -> bool {
        self.pause > PAUSE_MIN
    }

    /// Time since the last answer.
    pub fn silence(&self, now: Time) -> Duration {
        now.since(self.answered_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Time = Time::from_millis(5_000);
    const PATIENCE: Duration = Duration::from_secs(60);

    fn millis(pulse: &Pulse) -> u64 {
        pulse.next_at().since(START).as_millis() as u64
    }

    #[test]
    fn it_beats_each_second_and_five_times_a_second_at_a_barrier() {
        let mut pulse = Pulse::new(START, PATIENCE);
        assert_eq!(millis(&pulse), 0);
        pulse.handle_answer(START, START + Duration::from_millis(30), false);
        assert_eq!(millis(&pulse), 1_000);
        pulse.handle_answer(START, START + Duration::from_millis(30), true);
        assert_eq!(millis(&pulse), 200);
        pulse.handle_answer(START, START + Duration::from_millis(3_000), true);
        assert_eq!(
            millis(&pulse),
            3_050,
            "a slow coordinator is not asked without a pause"
        );
        pulse.hurry(START + Duration::from_millis(3_010));
        assert_eq!(millis(&pulse), 3_010);
    }

    #[test]
    fn nobody_who_does_not_answer_is_pressed() {
        let mut pulse = Pulse::new(START, PATIENCE);
        let mut now = START;
        let mut pauses = Vec::new();
        for _ in 0..8 {
            pulse.handle_silence(now);
            pulse.hurry(now);
            pauses.push(pulse.next_at().since(now).as_millis());
            now = pulse.next_at();
        }
        assert_eq!(pauses, [250, 500, 1_000, 2_000, 4_000, 5_000, 5_000, 5_000]);
        assert_eq!(pulse.silence(now), now.since(START));
        let mut short = Pulse::new(START, Duration::from_secs(12));
        (0..8).for_each(|_| short.handle_silence(START));
        assert_eq!(millis(&short), 1_200, "where silence is borne for 12 s");
        pulse.handle_answer(now, now, false);
        assert_eq!(pulse.silence(now), Duration::ZERO);
        assert_eq!(pulse.next_at().since(now), BEAT);
    }
}
