//! How numbers and sentences are written for people, in all outputs.

use std::fmt::Write as _;
use std::time::Duration;

/// Width of a terminal window that has not been resized, in columns.
pub const WIDTH: usize = 80;

/// Wraps `text` into lines of at most [`WIDTH`] columns, each indented by `indent` spaces. Words
/// are never broken.
pub fn wrapped(text: &str, indent: usize) -> String {
    let mut lines = String::new();
    let mut line = String::new();
    for word in text.split_whitespace() {
        if !line.is_empty() && indent + line.chars().count() + 1 + word.chars().count() > WIDTH {
            let _ = writeln!(lines, "{:indent$}{line}", "");
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    let _ = writeln!(lines, "{:indent$}{line}", "");
    lines
}

/// Returns text from others on one line. Characters that move a terminal's cursor, or change the
/// direction of the text around them, become blanks.
pub fn one_line(text: &str) -> String {
    let mut line: String = text
        .chars()
        .map(|c| if is_shown(c) { c } else { ' ' })
        .collect();
    line.truncate(line.trim_end().len());
    line
}

/// Whether a terminal shows this character. Others move its cursor, or change the direction of the
/// text around them.
pub fn is_shown(c: char) -> bool {
    let turns =
        matches!(c, '\u{200E}' | '\u{200F}' | '\u{2028}'..='\u{202E}' | '\u{2066}'..='\u{2069}');
    !c.is_control() && !turns
}

/// Formats a value, or `n/a` if it is unknown.
pub fn maybe<T>(value: Option<T>, print: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| "n/a".to_owned(), print)
}

/// Formats a number: `12,345`.
pub fn number(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Formats a count: `1 room`, `2 rooms`.
pub fn count(value: u64, what: &str) -> String {
    format!(
        "{} {what}{}",
        number(value),
        if value == 1 { "" } else { "s" }
    )
}

/// Formats a share (0..=1) as `0.12%`. A share above zero never prints as zero.
pub fn percent(share: f64) -> String {
    match share * 100.0 {
        0.0 => "0%".to_owned(),
        small if small < 0.005 => "<0.01%".to_owned(),
        value => format!("{value:.2}%"),
    }
}

/// Formats microseconds as `412 us`, `2.41 ms`, `1.24 s`.
pub fn micros(us: f64) -> String {
    match us {
        us if us < 999.5 => format!("{us:.0} us"),
        us if us < 9_995.0 => format!("{:.2} ms", us / 1e3),
        us if us < 99_950.0 => format!("{:.1} ms", us / 1e3),
        us if us < 999_500.0 => format!("{:.0} ms", us / 1e3),
        us if us < 9_995_000.0 => format!("{:.2} s", us / 1e6),
        us => format!("{:.1} s", us / 1e6),
    }
}

/// Formats a duration: `1h 30m`, `20ms`, `260ms`. Anything below a millisecond is left out.
pub fn duration(duration: Duration) -> String {
    let millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    humantime::format_duration(Duration::from_millis(millis)).to_string()
}

/// Formats a value with three significant digits and a decimal prefix: `1.23 MB`, `512 kbps`.
pub fn scaled(value: f64, unit: &str) -> String {
    let mut value = value;
    let mut prefixes = ["", "k", "M", "G", "T"].into_iter().peekable();
    while value >= 999.5 {
        let Some(_) = prefixes.next_if(|prefix| *prefix != "T") else {
            break;
        };
        value /= 1e3;
    }
    match (prefixes.next().unwrap_or("T"), value) {
        ("", value) => format!("{value:.0} {unit}"),
        (prefix, value) if value < 9.995 => format!("{value:.2} {prefix}{unit}"),
        (prefix, value) if value < 99.95 => format!("{value:.1} {prefix}{unit}"),
        (prefix, value) => format!("{value:.0} {prefix}{unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_read_as_people_write_them() {
        assert_eq!(
            [0, 999, 1_000, 12_345, 1_234_567].map(number),
            ["0", "999", "1,000", "12,345", "1,234,567"]
        );
        assert_eq!(
            [0.0, 12.0, 999.0, 1_000.0, 24_000.0, 1_234_567.0, 5e15].map(|v| scaled(v, "B")),
            [
                "0 B", "12 B", "999 B", "1.00 kB", "24.0 kB", "1.23 MB", "5000 TB"
            ]
        );
        assert_eq!(
            [
                412.0,
                999.7,
                2_410.0,
                24_100.0,
                241_000.0,
                1_240_000.0,
                60_000_000.0
            ]
            .map(micros),
            [
                "412 us", "1.00 ms", "2.41 ms", "24.1 ms", "241 ms", "1.24 s", "60.0 s"
            ]
        );
        assert_eq!(
            [0.0, 0.000_001, 0.001_2, 1.0].map(percent),
            ["0%", "<0.01%", "0.12%", "100.00%"]
        );
        assert_eq!(duration(Duration::from_secs(5_400)), "1h 30m");
    }

    #[test]
    fn what_others_wrote_moves_no_cursor() {
        assert_eq!(
            one_line("a\x1b[2Jb\r\nc\u{9b}31m\u{202e}d\n"),
            "a [2Jb  c 31m d"
        );
    }

    #[test]
    fn long_reasons_wrap_between_words() {
        let text = wrapped(&"word ".repeat(40), 4);
        assert!(
            text.lines()
                .all(|line| line.len() <= WIDTH && line.starts_with("    word"))
        );
        assert_eq!(text.matches("word").count(), 40);
    }
}
