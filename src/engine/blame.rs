//! Finds the stalls of a run, who caused each, and what the kernel says about the cause.

use std::time::Duration;

use crate::measure::presence::ThreadPresence;
use crate::measure::second::Second;
use crate::measure::stalls::{
    Cause, SILENCE_MIN, Stall, StillSpan, gathered, gathered_in_silence, silences, union,
};
use crate::plan::Spans;
use crate::units::Time;

/// Share of a stall that one cause must account for.
const SHARE_MIN: f64 = 0.5;

/// A silence is the server's only if it is longer than this many times the greatest lateness of
/// this host's own threads in that second, and than [`SILENCE_TOLD_MIN`]. A server on the same host
/// is as late as they are.
const LATENESS_FACTOR: u32 = 3;
const SILENCE_TOLD_MIN: Duration = Duration::from_millis(100);

/// Observations of the run about itself and about the server.
pub struct Observed<'a> {
    /// Times at which media was sent (`sends`) and at which anything arrived (`arrivals`).
    pub sends: &'a ThreadPresence,
    pub arrivals: &'a ThreadPresence,
    /// Late beats of all engine threads (`engine_gaps`) and of the bare timer thread
    /// (`floor_gaps`).
    pub engine_gaps: &'a [StillSpan],
    pub floor_gaps: &'a [StillSpan],
    pub seconds: &'a [Second],
    /// When anything was to come from the server.
    pub owed: &'a Spans,
    /// Time at which publishers stopped. Nothing is owed after it.
    pub until: Time,
}

/// Returns all stalls in order of time.
pub fn stalls(observed: &Observed<'_>) -> Vec<Stall> {
    let asleep = union(observed.engine_gaps.to_vec());
    let ours = gathered(&asleep).into_iter().map(|pieces| {
        let cause = cause(pieces, observed);
        told(cause, pieces, evidence(cause, pieces, observed))
    });
    let silent = silences(
        observed.sends,
        observed.arrivals,
        &asleep,
        Time::ZERO,
        observed.until,
    );
    let silent = while_owed(&silent, observed.owed);
    let silences = gathered_in_silence(&silent, observed.arrivals);
    // If no media came before the gap, none was owed: the silence is then a matter of joins.
    let silences = silences.into_iter().filter(|pieces| {
        media_came_before(&pieces[0], observed.seconds) && !is_explained(pieces, observed.seconds)
    });
    let theirs = silences.map(|pieces| {
        told(
            Cause::Silence,
            pieces,
            evidence(Cause::Silence, pieces, observed),
        )
    });
    let mut stalls: Vec<Stall> = ours.chain(theirs).collect();
    stalls.sort_by(|a, b| a.at.total_cmp(&b.at));
    stalls
}

/// The parts of the silences in which something was owed.
fn while_owed(silent: &[StillSpan], owed: &Spans) -> Vec<StillSpan> {
    let parts = silent.iter().flat_map(|gap| {
        owed.iter().map(|span| StillSpan {
            from: gap.from.max(span.from),
            to: gap.to.min(span.to),
        })
    });
    parts
        .filter(|part| part.from < part.to && part.length() >= SILENCE_MIN)
        .collect()
}

/// Whether a silence is so short that this host's own lateness explains it.
fn is_explained(pieces: &[StillSpan], seconds: &[Second]) -> bool {
    let late =
        touched(pieces, seconds).flat_map(|row| [row.tick_late_us_max, row.floor_late_us_max]);
    let late = Duration::from_micros(late.flatten().max().unwrap_or(0));
    length(pieces) < SILENCE_TOLD_MIN.max(late * LATENESS_FACTOR)
}

/// Whether media arrived in the row in which the gap began, or in the row before.
fn media_came_before(gap: &StillSpan, seconds: &[Second]) -> bool {
    let began = seconds.partition_point(|second| second.from <= gap.from);
    let rows = seconds[..began].iter().rev().take(2);
    rows.into_iter().any(|second| second.media_packets > 0)
}

fn told(cause: Cause, pieces: &[StillSpan], evidence: String) -> Stall {
    let seconds = |time: Option<Time>| time.map_or(0.0, |time| time.as_micros() as f64 / 1e6);
    Stall {
        side: cause.side(),
        cause,
        at: seconds(pieces.first().map(|gap| gap.from)),
        until: seconds(pieces.last().map(|gap| gap.to)),
        seconds: length(pieces).as_secs_f64(),
        evidence,
    }
}

fn length(pieces: &[StillSpan]) -> Duration {
    pieces.iter().map(StillSpan::length).sum()
}

/// Returns the cause of a stall. Throttled and stolen time are reported by the kernel. So is a wait
/// in the run queue, but some of it occurs in every busy second. A stopped process leaves only one
/// trace: the bare timer thread, which has nothing to do, was late as well.
fn cause(pieces: &[StillSpan], observed: &Observed<'_>) -> Cause {
    let enough = |time: Option<Duration>| {
        time.is_some_and(|time| time.as_secs_f64() >= length(pieces).as_secs_f64() * SHARE_MIN)
    };
    let kernel =
        |figure: fn(&Second) -> Option<u64>| enough(around(pieces, observed.seconds, figure));
    if kernel(|second| second.throttled_us) {
        Cause::Throttled
    } else if kernel(|second| second.steal_us) {
        Cause::Stolen
    } else if kernel(|second| second.run_queue_us_max) {
        Cause::RunQueue
    } else if enough(Some(floor_asleep(pieces, observed.floor_gaps))) {
        Cause::Stopped
    } else {
        Cause::Engine
    }
}

/// Returns the sum of a figure over the rows that a stall touches, or `None` if no row has it.
fn around(
    pieces: &[StillSpan],
    seconds: &[Second],
    figure: fn(&Second) -> Option<u64>,
) -> Option<Duration> {
    let micros = touched(pieces, seconds).filter_map(figure);
    micros
        .reduce(|sum, micros| sum + micros)
        .map(Duration::from_micros)
}

fn touched<'a>(pieces: &[StillSpan], seconds: &'a [Second]) -> impl Iterator<Item = &'a Second> {
    let span = pieces
        .first()
        .zip(pieces.last())
        .map(|(first, last)| (first.from, last.to));
    seconds
        .iter()
        .filter(move |second| span.is_some_and(|(from, to)| second.from < to && second.to > from))
}

/// Returns how much of the stall the bare timer thread was late as well.
fn floor_asleep(pieces: &[StillSpan], floor_gaps: &[StillSpan]) -> Duration {
    let within = |gap: &StillSpan| {
        floor_gaps
            .iter()
            .map(|floor| floor.within(gap.from, gap.to))
            .sum::<Duration>()
    };
    pieces.iter().map(within).sum()
}

fn evidence(cause: Cause, pieces: &[StillSpan], observed: &Observed<'_>) -> String {
    let time = |figure: fn(&Second) -> Option<u64>| {
        around(pieces, observed.seconds, figure).map_or(0.0, |time| time.as_secs_f64())
    };
    let most = |figure: fn(&Second) -> Option<f64>| {
        touched(pieces, observed.seconds)
            .filter_map(figure)
            .fold(0.0, f64::max)
    };
    let sfu = most(|second| second.embedded_sfu_cores);
    match cause {
        Cause::Stopped => "no thread of this process ran, and none waited for a CPU: the process or its machine was stopped".to_owned(),
        Cause::Throttled => format!(
            "the process's control group was throttled for {:.2} s",
            time(|second| second.throttled_us)
        ),
        Cause::Stolen => format!("the hypervisor took {:.2} s of CPU time", time(|second| second.steal_us)),
        Cause::RunQueue if sfu >= 0.3 => format!(
            "an engine thread waited {:.2} s for a CPU, while the embedded SFU kept {sfu:.2} cores busy",
            time(|second| second.run_queue_us_max)
        ),
        Cause::RunQueue => format!("an engine thread waited {:.2} s for a CPU", time(|second| second.run_queue_us_max)),
        Cause::Engine => format!(
            "a bare timer thread was on time; an engine thread was busy {:.0} % of the second",
            most(|second| second.engine_busy) * 1e2
        ),
        Cause::Silence => {
            let stolen = time(|second| second.steal_us);
            let stolen = if stolen >= length(pieces).as_secs_f64() * SHARE_MIN {
                format!("; this host lost {stolen:.2} s to its hypervisor meanwhile")
            } else {
                String::new()
            };
            format!("nothing came, by the kernel's stamps, while every engine thread was awake and media was sent{stolen}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::presence::Marks;
    use crate::measure::stalls::Side;
    use crate::plan::Span;

    const fn gap(from_ms: u64, to_ms: u64) -> StillSpan {
        StillSpan {
            from: Time::from_millis(from_ms),
            to: Time::from_millis(to_ms),
        }
    }

    /// Rows of 20 s, with one of them changed.
    fn rows(at: u64, change: impl Fn(&mut Second)) -> Vec<Second> {
        let row = |second: u64| Second {
            from: Time::from_millis(second * 1_000),
            to: Time::from_millis(second * 1_000 + 1_000),
            engine_busy: Some(0.2),
            run_queue_us_max: Some(4_000),
            steal_us: Some(0),
            media_packets: 100,
            ..Second::default()
        };
        let mut rows: Vec<Second> = (0..20).map(row).collect();
        change(&mut rows[at as usize]);
        rows
    }

    fn every(interval_ms: u64, pause: (u64, u64)) -> ThreadPresence {
        let mut all = ThreadPresence::default();
        for ms in (0..20_000)
            .step_by(interval_ms as usize)
            .filter(|ms| !(pause.0..pause.1).contains(ms))
        {
            let mut marks = Marks::default();
            marks.mark(Time::from_millis(ms));
            all.merge(&marks.take());
        }
        all
    }

    fn found(
        pause: (u64, u64),
        server_pause: (u64, u64),
        engine: &[StillSpan],
        floor: &[StillSpan],
        seconds: &[Second],
    ) -> Vec<(Side, Cause, u64)> {
        stalls(&Observed {
            sends: &every(3, pause),
            arrivals: &every(3, server_pause),
            engine_gaps: engine,
            floor_gaps: floor,
            seconds,
            owed: &Spans::of([Span::since(Time::ZERO)]),
            until: Time::from_millis(20_000),
        })
        .iter()
        .map(|stall| {
            (
                stall.side,
                stall.cause,
                (stall.seconds * 1e3).round() as u64,
            )
        })
        .collect()
    }

    #[test]
    fn each_cause_is_told_by_what_the_kernel_counted_while_it_lasted() {
        let pause = (7_100, 7_500);
        let (engine, floor) = ([gap(7_100, 7_500)], [gap(7_103, 7_500)]);
        let calm = rows(7, |_| {});
        for (expected, floor, seconds) in [
            (Cause::Stopped, &floor[..], calm.clone()),
            (Cause::Engine, &[], calm),
            (
                Cause::Throttled,
                &floor,
                rows(7, |row| row.throttled_us = Some(390_000)),
            ),
            (
                Cause::Stolen,
                &floor,
                rows(7, |row| row.steal_us = Some(300_000)),
            ),
            (
                Cause::RunQueue,
                &[],
                rows(7, |row| row.run_queue_us_max = Some(380_000)),
            ),
            // An event in another second explains nothing.
            (
                Cause::Stopped,
                &floor,
                rows(9, |row| row.run_queue_us_max = Some(900_000)),
            ),
        ] {
            assert_eq!(
                found(pause, pause, &engine, floor, &seconds),
                [(expected.side(), expected, 400)]
            );
        }
    }

    #[test]
    fn an_embedded_sfu_that_took_the_cpu_is_named_and_an_idle_one_is_not() {
        for (cores, named) in [(0.93, true), (0.01, false)] {
            let seconds = rows(7, |row| {
                row.run_queue_us_max = Some(380_000);
                row.embedded_sfu_cores = Some(cores);
            });
            let stalls = stalls(&Observed {
                sends: &every(3, (7_100, 7_500)),
                arrivals: &every(3, (7_100, 7_500)),
                engine_gaps: &[gap(7_100, 7_500)],
                floor_gaps: &[],
                seconds: &seconds,
                owed: &Spans::of([Span::since(Time::ZERO)]),
                until: Time::from_millis(20_000),
            });
            assert_eq!(
                stalls[0]
                    .evidence
                    .contains("embedded SFU kept 0.93 cores busy"),
                named,
                "{stalls:?}"
            );
        }
    }

    #[test]
    fn a_silent_server_is_blamed_and_a_generator_that_stood_still_is_not_covered_by_it() {
        let seconds = rows(7, |_| {});
        let silent = found((0, 0), (7_000, 8_200), &[], &[], &seconds);
        assert!(
            matches!(silent[..], [(Side::Server, Cause::Silence, length)] if length.abs_diff(1_200) < 15),
            "{silent:?}"
        );
        // Everything stands still, as when the whole machine is stopped: that is this host's.
        let both = found(
            (7_000, 8_200),
            (7_000, 8_205),
            &[gap(7_000, 8_200)],
            &[gap(7_001, 8_200)],
            &seconds,
        );
        assert_eq!(both, [(Side::Host, Cause::Stopped, 1_200)]);
        // Nobody had subscribed to anything: a server may be silent for as long as it likes.
        let mut nothing_owed = seconds;
        nothing_owed
            .iter_mut()
            .for_each(|row| row.media_packets = 0);
        assert_eq!(found((0, 0), (7_000, 8_200), &[], &[], &nothing_owed), []);
    }

    fn silences_of(
        pauses: (u64, u64),
        engine: &[StillSpan],
        seconds: &[Second],
        owed: &Spans,
    ) -> Vec<(u64, u64)> {
        let stalls = stalls(&Observed {
            sends: &every(3, (0, 0)),
            arrivals: &every(3, pauses),
            engine_gaps: engine,
            floor_gaps: &[],
            seconds,
            owed,
            until: Time::from_millis(20_000),
        });
        let silences = stalls.iter().filter(|stall| stall.side == Side::Server);
        let ms = |seconds: f64| (seconds * 1e3).round() as u64;
        silences
            .map(|stall| (ms(stall.at), ms(stall.seconds)))
            .collect()
    }

    #[test]
    fn a_silence_is_counted_whole_on_a_busy_host_too() {
        // No media comes in the rows of the silence, and the engine is late twelve times a second.
        let mut seconds = rows(0, |_| {});
        seconds[5..13]
            .iter_mut()
            .for_each(|row| row.media_packets = 0);
        let busy: Vec<StillSpan> = (0..240)
            .map(|number| gap(number * 80, number * 80 + 30))
            .collect();
        let always = Spans::of([Span::since(Time::ZERO)]);
        let whole = silences_of((4_000, 13_000), &busy, &seconds, &always);
        assert!(
            matches!(whole[..], [(at, length)] if at.abs_diff(4_000) < 150 && length.abs_diff(9_000) < 200),
            "{whole:?}"
        );
        // Two stalls of this host that are long lie in it. It is one silence all the same.
        let two = [gap(6_000, 7_000), gap(9_000, 9_500)];
        let whole = silences_of((4_000, 13_000), &two, &seconds, &always);
        assert!(
            matches!(whole[..], [(at, length)] if at.abs_diff(4_000) < 15 && length.abs_diff(7_400) < 50),
            "{whole:?}"
        );
    }

    #[test]
    fn a_silence_is_the_servers_only_while_something_was_owed() {
        let seconds = rows(0, |_| {});
        let until = |ms| {
            Spans::of([Span {
                from: Time::ZERO,
                to: Time::from_millis(ms),
            }])
        };
        let of = |owed| silences_of((4_000, 13_000), &[], &seconds, &owed);
        assert!(matches!(of(until(20_000))[..], [(_, length)] if length.abs_diff(9_000) < 15));
        assert!(matches!(of(until(6_000))[..], [(_, length)] if length.abs_diff(2_000) < 15));
        // The only one who was to hear something was sent away then.
        assert_eq!(of(until(4_020)), []);
    }

    #[test]
    fn a_short_silence_that_this_hosts_lateness_explains_is_not_the_servers() {
        let always = Spans::of([Span::since(Time::ZERO)]);
        let late = |us| {
            rows(7, move |row| {
                row.tick_late_us_max = Some(us);
            })
        };
        assert_eq!(silences_of((7_000, 7_090), &[], &late(0), &always), []);
        assert_eq!(silences_of((7_000, 7_300), &[], &late(0), &always).len(), 1);
        assert_eq!(
            silences_of((7_000, 7_300), &[], &late(110_000), &always),
            []
        );
        assert_eq!(
            silences_of((7_000, 8_000), &[], &late(110_000), &always).len(),
            1
        );
    }
}
