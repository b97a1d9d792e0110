//! The progress line of a run: redrawn in place on a terminal, printed at intervals elsewhere.

use std::io::{self, Write};
use std::time::Duration;

use super::{RunSample, emit};
use crate::words;

/// Time of the first line. Before that the engine's threads have not reported a complete second,
/// and rates would print as zero.
const FIRST_AFTER: Duration = Duration::from_secs(2);
/// Interval at which a line is printed if it cannot be redrawn.
const PLAIN_INTERVAL: Duration = Duration::from_secs(5);
/// Width of a redrawn line. It must not wrap on a terminal of 80 columns, or `\r` no longer returns
/// to its start.
const WIDTH: usize = 79;

/// The run so far.
#[derive(Clone, Debug, Default)]
pub struct ProgressSnapshot {
    /// Time since the start of the run.
    pub elapsed: Duration,
    /// Planned time for joining and measuring together. `None` if it is unknown.
    pub total: Option<Duration>,
    /// The current tier, if there are several.
    pub tier: Option<String>,
    pub joined: u32,
    pub planned: u32,
    pub failed: u32,
    /// Residual loss (0..=1) over both kinds of media. `None` means unknown.
    pub loss: Option<f64>,
    /// Whether nothing came in the last second, though something was owed.
    pub is_silent: bool,
    /// The last second.
    pub sample: RunSample,
}

/// Draws snapshots. Knows whether it may redraw, and when it last drew.
#[derive(Debug)]
pub struct Progress {
    redraw: bool,
    drawn_width: usize,
    printed_at: Option<Duration>,
}

impl Progress {
    /// `redraw`: the output is a terminal, and redrawing is not switched off.
    pub const fn new(redraw: bool) -> Progress {
        Progress {
            redraw,
            drawn_width: 0,
            printed_at: None,
        }
    }

    /// Draws `snapshot` if it is due. May be called at any rate.
    pub fn update(&mut self, snapshot: &ProgressSnapshot, out: &mut dyn Write) -> io::Result<()> {
        if snapshot.elapsed < FIRST_AFTER {
            return Ok(());
        }
        if self.redraw {
            return self.draw_over(&line(snapshot), out);
        }
        let due = self
            .printed_at
            .is_none_or(|at| snapshot.elapsed.saturating_sub(at) >= PLAIN_INTERVAL);
        if !due {
            return Ok(());
        }
        self.printed_at = Some(snapshot.elapsed);
        emit(out, &format!("{}\n", line(snapshot)))
    }

    /// Clears a redrawn line, so that the report starts on an empty one.
    pub fn finish(&mut self, out: &mut dyn Write) -> io::Result<()> {
        if self.drawn_width == 0 {
            return Ok(());
        }
        self.draw_over("", out)?;
        emit(out, "\r")
    }

    fn draw_over(&mut self, line: &str, out: &mut dyn Write) -> io::Result<()> {
        let line: String = line.chars().take(WIDTH).collect();
        let width = line.chars().count();
        let padding = self.drawn_width.saturating_sub(width);
        self.drawn_width = width;
        emit(out, &format!("\r{line}{:padding$}", ""))
    }
}

/// `12s/45s  98/100 joined  out 1,200/s  in 9,800/s  loss 0.01%  latency 0.62 ms`
pub fn line(snapshot: &ProgressSnapshot) -> String {
    let sample = &snapshot.sample;
    let failed = if snapshot.failed > 0 {
        format!(", {} failed", words::number(snapshot.failed.into()))
    } else {
        String::new()
    };
    let total = snapshot
        .total
        .map(|total| format!("/{}", words::duration(Duration::from_secs(total.as_secs()))));
    let total = total.unwrap_or_default();
    let tier = snapshot
        .tier
        .as_ref()
        .map(|tier| format!("{tier}  "))
        .unwrap_or_default();
    // A packet that never comes is not known to be lost, so the loss says nothing here.
    let loss = match snapshot.loss {
        _ if snapshot.is_silent => "nothing comes in".to_owned(),
        loss => format!("loss {}", words::maybe(loss, words::percent)),
    };
    format!(
        "{}{total}  {tier}{}/{} joined{failed}  out {}/s  in {}/s  {loss}  latency {}",
        words::duration(Duration::from_secs(snapshot.elapsed.as_secs())),
        words::number(snapshot.joined.into()),
        words::number(snapshot.planned.into()),
        words::number(sample.packets_sent_per_second.round() as u64),
        words::number(sample.packets_received_per_second.round() as u64),
        words::maybe(sample.one_way_us_p50, |us| words::micros(us as f64)),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> ProgressSnapshot {
        ProgressSnapshot {
            elapsed: Duration::from_millis(seconds * 1_000 + 7),
            total: Some(Duration::from_secs(45)),
            tier: None,
            joined: 98,
            planned: 1_100,
            failed: 0,
            loss: Some(0.0001),
            is_silent: false,
            sample: RunSample {
                packets_sent_per_second: 1_200.4,
                packets_received_per_second: 9_800.0,
                ..RunSample::default()
            },
        }
    }

    #[test]
    fn the_line_says_how_it_goes_and_marks_what_is_unknown() {
        let expected = "12s/45s  98/1,100 joined  out 1,200/s  in 9,800/s  loss 0.01%  latency n/a";
        assert!(expected.len() <= WIDTH, "it fits a terminal of 80 columns");
        assert_eq!(line(&at(12)), expected);
    }

    #[test]
    fn an_outage_is_no_loss_of_zero() {
        let snapshot = ProgressSnapshot {
            loss: Some(0.0),
            is_silent: true,
            ..at(12)
        };
        let line = line(&snapshot);
        assert!(line.contains("  nothing comes in  latency "), "{line}");
        assert!(!line.contains("loss"), "{line}");
    }

    #[test]
    fn off_a_terminal_a_line_comes_every_five_seconds() {
        let (mut progress, mut out) = (Progress::new(false), Vec::new());
        (0..=11).for_each(|second| progress.update(&at(second), &mut out).unwrap());
        progress.finish(&mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(
            text.lines()
                .map(|line| line.split('/').next().unwrap())
                .collect::<Vec<_>>(),
            ["2s", "7s"]
        );
    }

    #[test]
    fn on_a_terminal_a_shorter_line_wipes_the_longer_one() {
        let (mut progress, mut out) = (Progress::new(true), Vec::new());
        progress.update(&at(10), &mut out).unwrap();
        let longer = out.len();
        out.clear();
        progress.update(&at(9), &mut out).unwrap();
        assert_eq!(out.len(), longer);
        out.clear();
        progress.finish(&mut out).unwrap();
        assert!(out.iter().all(|b| matches!(b, b'\r' | b' ')));
    }
}
