//! Emphasis on a terminal.

use std::io::IsTerminal;

use super::Verdict;

/// Whether to use colour.
#[derive(Clone, Copy, Debug, Default)]
pub struct Style {
    pub colour: bool,
}

impl Style {
    /// Uses colour only on a terminal, and only if NO_COLOR is unset or empty (no-color.org).
    pub fn of(stream: &impl IsTerminal, no_color: Option<&str>) -> Style {
        Style {
            colour: stream.is_terminal() && no_color.is_none_or(str::is_empty),
        }
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    pub(crate) fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }

    pub(crate) fn verdict(self, verdict: Verdict, text: &str) -> String {
        let code = match verdict {
            Verdict::Pass => "1;32",
            Verdict::Fail => "1;31",
            Verdict::Invalid | Verdict::Partial => "1;33",
        };
        self.paint(code, text)
    }
}
