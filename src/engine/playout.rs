//! Models the jitter buffer of a listener and of a viewer: how long it holds frames back, which
//! frames come too late, and what must be concealed.
//!
//! It is a model, not a player: nothing is decoded, and no sample is stretched. Its rules are those
//! of libwebrtc's NetEq, made simple and explicit; docs/metrics.md states them with their
//! parameters. Everything is calculated in *transit*: the time from a frame's intended moment to
//! its arrival. The state is flat, nothing here allocates, and a frame costs no more than a few
//! additions. A target is calculated twice a second.

use std::time::Duration;

use crate::units::Time;

/// Width and number of the delay classes. A longer delay counts in the last class.
const CLASS: Duration = Duration::from_millis(20);
const CLASSES: usize = 32;

/// Window in which the fastest frame stands for a network without queues. NetEq's packet history is
/// as long.
const FASTEST_OVER: Duration = Duration::from_secs(2);

/// Period of one sample, which is the worst value in it: NetEq's `resample_interval_ms`.
const SAMPLE_OVER: Duration = Duration::from_millis(500);

/// Percentage of the samples that the target covers: NetEq's default quantile.
const QUANTILE_PERCENT: u32 = 95;

/// Number of samples at which all counts are halved. The last 20 s of samples then have half of the
/// weight, as with NetEq's forget factor of 0.983.
const SAMPLES_MAX: u8 = 80;

/// The same for the counts of frames out of order (NetEq: 0.9993 a packet).
const FRAMES_MAX: u16 = 2048;

/// Delay that one per cent of lost frames may cost, if waiting for retransmissions would save them
/// (NetEq's `ms_per_loss_percent`).
const DELAY_PER_LOSS_PERCENT: Duration = Duration::from_millis(20);

/// Target before the first sample (NetEq's `kStartDelayMs`).
const START_DELAY: Duration = Duration::from_millis(80);

/// Percentage of the elapsed time by which stretching or compressing speech can move the delay.
const STRETCH_PERCENT: u32 = 10;

/// Minimum length of a break that a listener notices (libwebrtc's `kInterruptionLenMs`).
pub const INTERRUPTION_MIN: Duration = Duration::from_millis(150);

/// Target for how long frames are held back, beyond the fastest frame.
struct DelayTarget {
    /// Shortest transit of the current half window, and of the half window before it.
    fastest_us: [u32; 2],
    fastest_since_ms: u32,
    sample_since_ms: u32,
    sample_us: u32,
    target_us: u32,
    frames: u16,
    samples: u8,
    started: bool,
    samples_in: [u8; CLASSES],
    /// Number of frames out of order, by their delay. All other frames are in the first class.
    frames_in: [u16; CLASSES],
}

impl DelayTarget {
    fn new() -> DelayTarget {
        DelayTarget {
            fastest_us: [u32::MAX; 2],
            fastest_since_ms: 0,
            sample_since_ms: 0,
            sample_us: 0,
            target_us: micros(START_DELAY),
            frames: 0,
            samples: 0,
            started: false,
            samples_in: [0; CLASSES],
            frames_in: [0; CLASSES],
        }
    }

    /// Takes a frame. Returns by how much it was slower than the fastest.
    fn add(&mut self, transit_us: u32, in_order: bool, now: Time) -> u32 {
        let now_ms = now.as_millis() as u32;
        if !self.started {
            (self.started, self.fastest_since_ms, self.sample_since_ms) = (true, now_ms, now_ms);
        }
        if elapsed(self.fastest_since_ms, now_ms) >= FASTEST_OVER / 2 {
            self.fastest_us = [u32::MAX, self.fastest_us[0]];
            self.fastest_since_ms = now_ms;
        }
        self.fastest_us[0] = self.fastest_us[0].min(transit_us);
        let slower_us = transit_us - self.fastest_us();
        let class = if in_order { 0 } else { class_of(slower_us) };
        self.frames_in[class] += 1;
        self.frames += 1;
        if in_order {
            self.sample_us = self.sample_us.max(slower_us);
        }
        if elapsed(self.sample_since_ms, now_ms) >= SAMPLE_OVER {
            self.take_sample();
            self.sample_since_ms = now_ms;
        }
        if self.frames == FRAMES_MAX {
            self.frames_in.iter_mut().for_each(|count| *count /= 2);
            self.frames = self.frames_in.iter().sum();
        }
        slower_us
    }

    fn fastest_us(&self) -> u32 {
        self.fastest_us[0].min(self.fastest_us[1])
    }

    fn take_sample(&mut self) {
        self.samples_in[class_of(std::mem::take(&mut self.sample_us))] += 1;
        self.samples += 1;
        if self.samples == SAMPLES_MAX {
            self.samples_in.iter_mut().for_each(|count| *count /= 2);
            self.samples = self.samples_in.iter().sum();
        }
        self.target_us = self.against_underrun().max(self.for_resends());
    }

    /// Returns the upper bound of the class that holds the quantile.
    fn against_underrun(&self) -> u32 {
        let wanted = (u32::from(self.samples) * QUANTILE_PERCENT).div_ceil(100);
        let mut covered = 0;
        let class = self.samples_in.iter().position(|count| {
            covered += u32::from(*count);
            covered >= wanted
        });
        (class.unwrap_or(CLASSES - 1) as u32 + 1) * micros(CLASS)
    }

    /// Returns the delay beyond which waiting longer for retransmissions would cost more than the
    /// loss that it saves.
    fn for_resends(&self) -> u32 {
        let (frames, mut later) = (u64::from(self.frames), u64::from(self.frames));
        let costs = self.frames_in.iter().zip(1u32..).map(|(count, class)| {
            later -= u64::from(*count);
            let delay_us = class * micros(CLASS);
            // Both terms are multiplied by the number of frames, which avoids a division.
            let lost = u64::from(micros(DELAY_PER_LOSS_PERCENT)) * 100 * later;
            (u64::from(delay_us) * frames + lost, delay_us)
        });
        costs.min().map_or(0, |(_, delay_us)| delay_us)
    }
}

fn class_of(us: u32) -> usize {
    ((us / micros(CLASS)) as usize).min(CLASSES - 1)
}

const fn micros(duration: Duration) -> u32 {
    duration.as_micros() as u32
}

fn elapsed(since_ms: u32, now_ms: u32) -> Duration {
    Duration::from_millis(now_ms.wrapping_sub(since_ms).into())
}

/// Outcome of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Played {
    /// Played this long after its arrival.
    After(Duration),
    /// Too late: its time had passed.
    TooLate,
}

/// One stream of audio as a listener hears it.
pub struct AudioPlayout {
    target: DelayTarget,
    /// How long frames are held back at present, beyond the fastest.
    delay_us: u32,
    /// Time of the last frame in order, in milliseconds of the run.
    last_ms: u32,
    /// `newest`: number of the newest frame. `in_time`: which of the `pending` frames up to it
    /// arrived in time, one bit each, the newest in the lowest bit.
    newest: u32,
    pending: u8,
    in_time: u64,
    /// Length of the concealment in progress where the pending frames begin.
    concealing_us: u32,
    frames_played: u32,
    played_us: u64,
    concealed_us: u64,
    /// Sum of the times from intended moment to playout, over the frames played.
    mouth_to_ear_us: u64,
}

impl Default for AudioPlayout {
    fn default() -> AudioPlayout {
        AudioPlayout {
            target: DelayTarget::new(),
            delay_us: micros(START_DELAY),
            last_ms: 0,
            newest: 0,
            pending: 0,
            in_time: 0,
            concealing_us: 0,
            frames_played: 0,
            played_us: 0,
            concealed_us: 0,
            mouth_to_ear_us: 0,
        }
    }
}

impl AudioPlayout {
    /// Takes frame number `frame`, which arrives for the first time. It lasts `length` and was
    /// under way for `transit`. `on_interruption` is called with the length of each interruption.
    pub fn handle_frame(
        &mut self,
        frame: u32,
        transit: Duration,
        length: Duration,
        now: Time,
        mut on_interruption: impl FnMut(Duration),
    ) -> Played {
        let transit_us = u32::try_from(transit.as_micros()).unwrap_or(u32::MAX);
        let length_us = micros(length);
        if self.pending > 0 && frame <= self.newest {
            return self.handle_late(frame, transit_us, now);
        }
        let skipped = if self.pending == 0 {
            0
        } else {
            frame - self.newest - 1
        };
        self.stretch(now);
        let slower_us = self.target.add(transit_us, true, now);
        if slower_us > self.delay_us && self.pending > 0 {
            // The buffer ran empty. Frames missing before this one stay missing, and the time until
            // it arrived was filled with silence. The delay grows by that much.
            let waited_us = slower_us - self.delay_us;
            self.settle(self.pending, length_us, &mut on_interruption);
            self.conceal(u64::from(skipped) * u64::from(length_us));
            self.conceal(waited_us.into());
            (self.pending, self.in_time) = (0, 0);
        } else {
            self.advance(skipped, length_us, &mut on_interruption);
        }
        self.delay_us = self.delay_us.max(slower_us);
        self.newest = frame;
        self.in_time = self.in_time << 1 | 1;
        self.pending += 1;
        self.play(slower_us)
    }

    /// Continues after a pause that was requested. What was not sent during the pause is not
    /// concealed.
    pub fn resume(&mut self, length: Duration, mut on_interruption: impl FnMut(Duration)) {
        self.settle(self.pending, micros(length), &mut on_interruption);
        self.end_concealment(&mut on_interruption);
        (self.pending, self.in_time) = (0, 0);
    }

    /// Ends the stream: nothing arrives any more, and the last `missing` frames never arrived.
    pub fn finish(
        &mut self,
        missing: u64,
        length: Duration,
        mut on_interruption: impl FnMut(Duration),
    ) {
        self.settle(self.pending, micros(length), &mut on_interruption);
        self.conceal(missing * length.as_micros() as u64);
        self.end_concealment(&mut on_interruption);
        (self.pending, self.in_time) = (0, 0);
    }

    /// Returns the time played from frames that arrived in time, and the time concealed, in
    /// microseconds.
    pub fn times_us(&self) -> (u64, u64) {
        (self.played_us, self.concealed_us)
    }

    /// Returns the mean time from a frame's intended moment to its playout, or `None` if nothing
    /// was played.
    pub fn mouth_to_ear(&self) -> Option<Duration> {
        let mean = self
            .mouth_to_ear_us
            .checked_div(self.frames_played.into())?;
        Some(Duration::from_micros(mean))
    }

    /// Takes a frame that redundancy recovered. It is played if the buffer still waits for it. Its
    /// lateness says nothing about the network, so it does not change the target, as in NetEq.
    pub fn handle_recovered(&mut self, frame: u32, transit: Duration) -> Played {
        let transit_us = u32::try_from(transit.as_micros()).unwrap_or(u32::MAX);
        let slower_us = transit_us.saturating_sub(self.target.fastest_us());
        if self.pending == 0 || frame > self.newest {
            return Played::TooLate;
        }
        self.play_late(frame, slower_us)
    }

    fn handle_late(&mut self, frame: u32, transit_us: u32, now: Time) -> Played {
        let slower_us = self.target.add(transit_us, false, now);
        self.play_late(frame, slower_us)
    }

    fn play_late(&mut self, frame: u32, slower_us: u32) -> Played {
        let behind = self.newest - frame;
        if behind >= self.pending.into() || slower_us > self.delay_us {
            return Played::TooLate;
        }
        self.in_time |= 1 << behind;
        self.play(slower_us)
    }

    fn play(&mut self, slower_us: u32) -> Played {
        self.frames_played += 1;
        self.mouth_to_ear_us += u64::from(self.target.fastest_us()) + u64::from(self.delay_us);
        Played::After(Duration::from_micros((self.delay_us - slower_us).into()))
    }

    /// Moves the delay towards its target, by as much as stretching allows since the last frame in
    /// order.
    fn stretch(&mut self, now: Time) {
        let now_ms = now.as_millis() as u32;
        let step = elapsed(self.last_ms, now_ms) * STRETCH_PERCENT / 100;
        let step_us = u32::try_from(step.as_micros()).unwrap_or(u32::MAX);
        self.last_ms = now_ms;
        let target_us = self.target.target_us;
        self.delay_us = if self.pending == 0 {
            target_us
        } else {
            target_us.clamp(
                self.delay_us.saturating_sub(step_us),
                self.delay_us.saturating_add(step_us),
            )
        };
    }

    /// Makes room for one frame, and for `skipped` frames before it that have not arrived.
    fn advance(
        &mut self,
        skipped: u32,
        length_us: u32,
        on_interruption: &mut impl FnMut(Duration),
    ) {
        let room = 63;
        let beyond = (u32::from(self.pending) + skipped).saturating_sub(room);
        let settled = beyond.min(self.pending.into()) as u8;
        self.settle(settled, length_us, on_interruption);
        // More frames than the window holds. None of them can arrive in time.
        let lost = beyond - u32::from(settled);
        self.conceal(u64::from(lost) * u64::from(length_us));
        let kept = skipped - lost;
        self.in_time = self.in_time.checked_shl(kept).unwrap_or(0);
        self.pending += kept as u8;
    }

    /// Settles the oldest `count` pending frames: each was played or is concealed.
    fn settle(&mut self, count: u8, length_us: u32, on_interruption: &mut impl FnMut(Duration)) {
        for _ in 0..count {
            self.pending -= 1;
            if self.in_time >> self.pending & 1 == 1 {
                self.end_concealment(on_interruption);
                self.played_us += u64::from(length_us);
            } else {
                self.conceal(length_us.into());
            }
        }
        self.in_time &= (1 << self.pending) - 1;
    }

    fn conceal(&mut self, us: u64) {
        self.concealed_us += us;
        self.concealing_us = self
            .concealing_us
            .saturating_add(u32::try_from(us).unwrap_or(u32::MAX));
    }

    fn end_concealment(&mut self, on_interruption: &mut impl FnMut(Duration)) {
        let length = Duration::from_micros(std::mem::take(&mut self.concealing_us).into());
        if length >= INTERRUPTION_MIN {
            on_interruption(length);
        }
    }
}

/// One stream of video as a viewer sees it: when a picture that can be decoded is due.
pub struct VideoPlayout(DelayTarget);

impl Default for VideoPlayout {
    fn default() -> VideoPlayout {
        VideoPlayout(DelayTarget::new())
    }
}

impl VideoPlayout {
    /// Takes a frame when it can be decoded, in decoding order, `transit` after its intended
    /// moment. A late frame is shown all the same.
    pub fn handle_frame(&mut self, transit: Duration, now: Time) -> Played {
        let held_back_us = self.0.target_us;
        let slower_us = self.0.add(
            u32::try_from(transit.as_micros()).unwrap_or(u32::MAX),
            true,
            now,
        );
        match held_back_us.checked_sub(slower_us) {
            Some(wait_us) => Played::After(Duration::from_micros(wait_us.into())),
            None => Played::TooLate,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seeded::Seeded;

    const FRAME: Duration = Duration::from_millis(20);

    /// A listener at 50 frames per second, and what was heard.
    #[derive(Default)]
    struct Listener {
        playout: AudioPlayout,
        interruptions: Vec<Duration>,
        late: u32,
        waits: Vec<Duration>,
    }

    impl Listener {
        /// Frames by number and transit in milliseconds, taken in order of arrival.
        fn hear(&mut self, frames: impl IntoIterator<Item = (u32, u64)>) {
            let mut arriving: Vec<_> = frames
                .into_iter()
                .map(|(frame, transit)| (u64::from(frame) * 20 + transit, frame, transit))
                .collect();
            arriving.sort_unstable();
            for (at, frame, transit) in arriving {
                let interruptions = &mut self.interruptions;
                let (transit, now) = (
                    Duration::from_millis(transit),
                    Time::from_millis(1_000 + at),
                );
                match self
                    .playout
                    .handle_frame(frame, transit, FRAME, now, |length| {
                        interruptions.push(length)
                    }) {
                    Played::After(wait) => self.waits.push(wait),
                    Played::TooLate => self.late += 1,
                }
            }
        }

        fn finish(&mut self, missing: u64) -> (u64, u64) {
            let interruptions = &mut self.interruptions;
            self.playout
                .finish(missing, FRAME, |length| interruptions.push(length));
            let (played, concealed) = self.playout.times_us();
            (played / 1_000, concealed / 1_000)
        }
    }

    #[test]
    fn a_steady_stream_is_played_whole_and_held_back_by_one_class() {
        let mut listener = Listener::default();
        listener.hear((0..1_000).map(|frame| (frame, 30)));
        assert_eq!(listener.finish(0), (20_000, 0));
        assert_eq!((listener.late, listener.interruptions.len()), (0, 0));
        assert_eq!(listener.waits[0], START_DELAY);
        assert_eq!(listener.waits[999], CLASS);
        let mouth_to_ear = listener.playout.mouth_to_ear().unwrap();
        assert!(
            (50..=55).contains(&mouth_to_ear.as_millis()),
            "{mouth_to_ear:?}"
        );
    }

    #[test]
    fn jitter_is_held_back_against_and_no_more_than_needed() {
        let mut random = Seeded::new(1);
        let mut listener = Listener::default();
        listener.hear((0..3_000).map(|frame| (frame, 20 + random.below(19))));
        assert_eq!(listener.late, 0);
        assert!(*listener.waits.last().unwrap() <= CLASS);
        let mut listener = Listener::default();
        listener.hear((0..3_000).map(|frame| (frame, 20 + random.below(100))));
        let (played, concealed) = listener.finish(0);
        assert!(concealed * 100 < played, "{concealed} ms of {played}");
        let held_back = listener.playout.delay_us / 1_000;
        assert!(
            (80..=120).contains(&held_back),
            "{held_back} ms against 100 ms of jitter"
        );
    }

    #[test]
    fn what_never_comes_is_concealed_and_rows_of_it_are_interruptions() {
        let mut listener = Listener::default();
        let lost = |frame: u32| {
            frame % 50 == 10 || (200..207).contains(&frame) || (300..308).contains(&frame)
        };
        listener.hear(
            (0..1_000)
                .filter(|frame| !lost(*frame))
                .map(|frame| (frame, 30)),
        );
        let missing = (0..1_000).filter(|frame| lost(*frame)).count() as u64;
        assert_eq!(listener.finish(0), (20_000 - missing * 20, missing * 20));
        // Seven frames last 140 ms, eight last 160 ms.
        assert_eq!(listener.interruptions, [Duration::from_millis(160)]);
    }

    #[test]
    fn a_resend_in_time_conceals_nothing_and_one_too_late_is_concealed_and_late() {
        let mut listener = Listener::default();
        listener.hear((0..100).map(|frame| (frame, if frame == 50 { 90 } else { 30 })));
        assert_eq!(
            (listener.finish(0), listener.late),
            ((2_000 - 20, 20), 1),
            "held back by 20 ms, it came 60 ms late"
        );
        let mut listener = Listener::default();
        // If one frame in twenty is retransmitted, waiting for it costs less than its loss.
        listener.hear((0..2_000).map(|frame| (frame, if frame % 20 == 9 { 90 } else { 30 })));
        let (_, concealed) = listener.finish(0);
        assert!(
            listener.late < 5 && concealed == u64::from(listener.late) * 20,
            "{} late",
            listener.late
        );
        assert!(listener.playout.delay_us >= 60_000);
    }

    #[test]
    fn a_stall_is_heard_in_full_and_the_delay_comes_back_slowly() {
        let mut listener = Listener::default();
        // Nothing arrives for a second, then everything at once.
        let stalled = |frame: u32| {
            if (100..150).contains(&frame) {
                u64::from(150 - frame) * 20 + 30
            } else {
                30
            }
        };
        listener.hear((0..400).map(|frame| (frame, stalled(frame))));
        let (played, concealed) = listener.finish(0);
        assert_eq!(played, 8_000, "every frame is played in the end");
        assert!((900..=1_000).contains(&concealed), "{concealed}");
        assert_eq!(listener.interruptions.len(), 1);
        assert!(listener.late == 0 && listener.playout.delay_us > 300_000);
    }

    #[test]
    fn an_end_before_the_end_is_concealed_and_one_interruption() {
        let mut listener = Listener::default();
        listener.hear((0..100).map(|frame| (frame, 30)));
        assert_eq!(listener.finish(50), (2_000, 1_000));
        assert_eq!(listener.interruptions, [Duration::from_secs(1)]);
    }

    #[test]
    fn whatever_comes_all_time_is_either_played_or_concealed() {
        for seed in 0..200 {
            let mut random = Seeded::new(seed);
            let (loss, spread) = (random.below(60), 1 + random.below(400));
            let mut listener = Listener::default();
            let came: Vec<(u32, u64)> = (0..2_000)
                .filter(|frame| *frame == 0 || !random.chance(loss))
                .map(|frame| (frame, 10))
                .collect();
            let came = came.into_iter().map(|(frame, transit)| {
                (
                    frame,
                    if frame == 0 {
                        0
                    } else {
                        transit + random.below(spread)
                    },
                )
            });
            listener.hear(came);
            let newest = listener.playout.newest;
            let (played, concealed) = listener.finish(u64::from(1_999 - newest));
            assert_eq!(
                played,
                u64::from(listener.playout.frames_played) * 20,
                "seed {seed}"
            );
            assert!(
                played + concealed >= 40_000,
                "seed {seed}: {played} + {concealed}"
            );
        }
    }

    #[test]
    fn a_picture_is_late_where_it_comes_after_the_delay_that_was_held_for_it() {
        let mut playout = VideoPlayout::default();
        let mut play = |frame: u64, transit: u64| {
            let (transit, now) = (
                Duration::from_millis(transit),
                Time::from_millis(1_000 + frame * 33 + transit),
            );
            playout.handle_frame(transit, now)
        };
        assert!((0..300).all(|frame| play(frame, 20) != Played::TooLate));
        assert_eq!(play(300, 20), Played::After(CLASS));
        assert_eq!(play(301, 45), Played::TooLate);
        for frame in 302..600 {
            play(frame, 20 + frame % 5 * 15);
        }
        assert_ne!(play(600, 75), Played::TooLate, "it has learnt to wait");
    }

    #[test]
    fn a_stream_costs_no_more_memory_than_stated() {
        assert!(
            size_of::<AudioPlayout>() <= 200,
            "{}",
            size_of::<AudioPlayout>()
        );
        assert!(
            size_of::<VideoPlayout>() <= 128,
            "{}",
            size_of::<VideoPlayout>()
        );
    }
}
