//! The log: events of daemons and of joins while they run, one line each on standard error.
//!
//! Nothing is logged unless `-v` or RUST_LOG asks for it. Only throng's own events are logged,
//! because events of libraries hold secrets, such as ICE passwords. No event lies where every
//! packet passes. Even if an event repeats a stranger's text, a line of the log stays one line and
//! moves no terminal's cursor.

use std::io::{self, IsTerminal, Write, stderr};

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;

use super::set;
use crate::report::emit;
use crate::words;

/// Name that the targets of throng's events begin with: the crate's.
const OWN: &str = "throng";
const VARIABLE: &str = "RUST_LOG";
const HOW: &str = "write a level (off, error, warn, info, debug, trace), or parts of throng with levels of their own, as in throng=info,throng::sfu=debug";

/// Error returned when a part of RUST_LOG makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{VARIABLE}: '{directive}' {why}: {HOW}")]
pub(super) struct RefusedDirective {
    directive: String,
    why: &'static str,
}

/// Events that are logged. None by default.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogFilter(Option<Targets>);

impl LogFilter {
    /// Makes the filter from the number of times that `-v` was given, or else from RUST_LOG.
    ///
    /// # Errors
    /// If RUST_LOG makes no sense, whether it is needed or not.
    pub(super) fn of(
        verbosity: u8,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<LogFilter, RefusedDirective> {
        let asked = set(env, VARIABLE).map(|text| own_targets(&text));
        let asked = asked.transpose()?;
        Ok(LogFilter(match verbosity {
            0 => asked,
            1 => Some(Targets::new().with_target(OWN, LevelFilter::DEBUG)),
            _ => Some(Targets::new().with_target(OWN, LevelFilter::TRACE)),
        }))
    }

    /// Logs from now on until the end of the process. To be called once.
    pub fn start(self) {
        let Some(targets) = self.0 else { return };
        let lines = tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .log_internal_errors(false)
            .with_writer(|| LogLine {
                wipes: stderr().is_terminal(),
            });
        let log = tracing_subscriber::registry().with(targets).with(lines);
        // If another subscriber was set before, it stays.
        let _ = tracing::subscriber::set_global_default(log);
    }
}

/// Returns what RUST_LOG says about throng. What it says about other programs is left to them.
fn own_targets(text: &str) -> Result<Targets, RefusedDirective> {
    let mut targets = Targets::new();
    for directive in text.split(',').map(str::trim) {
        let refused = |why| RefusedDirective {
            directive: words::one_line(directive),
            why,
        };
        let (target, level) = match directive.split_once('=') {
            Some((target, level)) => (target, read_level(level)),
            None if is_own(directive) => (directive, Some(LevelFilter::TRACE)),
            None => (OWN, read_level(directive)),
        };
        if !is_path(target) {
            return Err(refused("names no part of a program"));
        }
        let level = level.ok_or_else(|| refused("names no level"))?;
        if is_own(target) {
            targets = targets.with_target(target, level);
        }
    }
    Ok(targets)
}

fn read_level(text: &str) -> Option<LevelFilter> {
    text.parse().ok().filter(|_| !text.is_empty())
}

fn is_own(target: &str) -> bool {
    let rest = target.strip_prefix(OWN);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

fn is_path(target: &str) -> bool {
    let belongs = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | ':');
    !target.is_empty() && target.chars().all(belongs)
}

/// Writer of one event, which arrives in one piece.
struct LogLine {
    /// Whether standard error is a terminal. A line of progress may stand there, to be redrawn, so
    /// it is wiped first.
    wipes: bool,
}

impl LogLine {
    fn text(&self, event: &[u8]) -> String {
        let line = words::one_line(&String::from_utf8_lossy(event));
        let wipe = if self.wipes { "\r\x1b[K" } else { "" };
        format!("{wipe}{line}\n")
    }
}

impl Write for LogLine {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        // If nobody can read the line, that is no reason to stop.
        let _ = emit(&mut stderr(), &self.text(event));
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(verbosity: u8, variable: &str) -> Result<LogFilter, RefusedDirective> {
        LogFilter::of(verbosity, &|name| {
            (name == VARIABLE).then(|| variable.to_owned())
        })
    }

    fn targets(of: &[(&str, LevelFilter)]) -> LogFilter {
        LogFilter(Some(of.iter().copied().collect()))
    }

    #[test]
    fn the_flag_goes_before_the_variable_and_neither_means_silence() {
        assert_eq!(filter(0, ""), Ok(LogFilter::default()));
        let all = [
            (0, "warn", LevelFilter::WARN),
            (1, "warn", LevelFilter::DEBUG),
            (2, "", LevelFilter::TRACE),
        ];
        for (verbosity, variable, level) in all {
            assert_eq!(filter(verbosity, variable), Ok(targets(&[(OWN, level)])));
        }
    }

    #[test]
    fn the_variable_speaks_of_throng_alone() {
        assert_eq!(
            filter(0, "throng=info, throng::sfu,hyper=trace,is=debug"),
            Ok(targets(&[
                (OWN, LevelFilter::INFO),
                ("throng::sfu", LevelFilter::TRACE)
            ]))
        );
        assert_eq!(filter(0, "hyper=trace"), Ok(targets(&[])));
    }

    #[test]
    fn a_line_of_progress_is_wiped_and_an_event_stays_one_line() {
        let event = b"INFO throng: joined identity=\x1b[2J\neve\n";
        let text = |wipes| LogLine { wipes }.text(event);
        let line = "INFO throng: joined identity= [2J eve\n";
        assert_eq!(text(false), line);
        assert_eq!(text(true), format!("\r\x1b[K{line}"));
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_what_to_write() {
        for (variable, verbosity) in [
            ("loud", 0),
            ("throng=loud", 0),
            ("throng=loud", 1),
            ("throng=", 0),
            ("=debug", 0),
            ("throng=info=debug", 0),
            ("throng[span]=debug", 0),
            ("throng=info,,", 0),
            ("a\x1b[2Jb", 0),
        ] {
            let refusal = filter(verbosity, variable).expect_err(variable).to_string();
            assert!(
                refusal.starts_with("RUST_LOG: '") && refusal.ends_with(HOW),
                "{refusal}"
            );
            assert!(!refusal.contains('\x1b'), "{refusal:?}");
        }
    }
}
