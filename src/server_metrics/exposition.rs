//! Reads Prometheus' text format, version 0.0.4: a page in, its samples out.
//!
//! The reader is strict: a line that is neither a sample, a comment nor empty makes the page
//! unreadable, because its other lines may be just as wrong. Only label values with escapes in them
//! are copied.

use std::borrow::Cow;

/// Error for a line that the format does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line} {what}")]
pub struct MalformedLine {
    /// Line number, counted from 1.
    pub line: usize,
    pub what: &'static str,
}

/// `name{label="value", ..} value [timestamp]`
#[derive(Clone, Copy, Debug)]
pub struct MetricSample<'a> {
    pub name: &'a str,
    pub labels: Labels<'a>,
    pub value: f64,
}

/// The text between the braces. It is checked at once, and parsed when a label is asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Labels<'a>(&'a str);

/// Returns the samples of a page in order, up to the first malformed line.
pub fn samples(page: &str) -> impl Iterator<Item = Result<MetricSample<'_>, MalformedLine>> {
    page.lines().enumerate().filter_map(|(at, line)| {
        let line = line.trim_matches(BLANK);
        if line.is_empty() || line.starts_with('#') {
            return None;
        }
        Some(sample(line).map_err(|what| MalformedLine { line: at + 1, what }))
    })
}

impl<'a> Labels<'a> {
    pub fn value(&self, name: &str) -> Option<Cow<'a, str>> {
        self.pairs()
            .find(|pair| pair.0 == name)
            .map(|pair| unescaped(pair.1))
    }

    /// Whether each of these labels is present with this value.
    pub fn have(&self, wanted: &[(&str, &str)]) -> bool {
        wanted
            .iter()
            .all(|(name, value)| self.value(name).is_some_and(|found| found == *value))
    }

    fn pairs(&self) -> impl Iterator<Item = (&'a str, &'a str)> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let (pair, after) = next_pair(rest).ok()?;
            rest = after;
            pair
        })
    }
}

const BLANK: [char; 2] = [' ', '\t'];

fn sample(line: &str) -> Result<MetricSample<'_>, &'static str> {
    let (name, rest) = leading(line, |c| is_name(c) || c == ':');
    if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
        return Err("does not begin with a metric's name");
    }
    let (labels, rest) = match rest.trim_start_matches(BLANK).strip_prefix('{') {
        Some(inside) => labels(inside)?,
        None if rest.is_empty() || rest.starts_with(BLANK) => (Labels::default(), rest),
        None => return Err("has no blank behind its name"),
    };
    let mut words = rest.split(BLANK).filter(|word| !word.is_empty());
    let value = words.next().ok_or("has no value")?;
    let value = value.parse().map_err(|_| "has a value that is no number")?;
    if words
        .next()
        .is_some_and(|timestamp| timestamp.parse::<i64>().is_err())
    {
        return Err("has a time stamp that is no whole number");
    }
    match words.next() {
        Some(_) => Err("goes on behind its time stamp"),
        None => Ok(MetricSample {
            name,
            labels,
            value,
        }),
    }
}

/// Splits the labels, with their closing brace, from what follows.
fn labels(inside: &str) -> Result<(Labels<'_>, &str), &'static str> {
    let mut rest = inside;
    loop {
        let (pair, after) = next_pair(rest)?;
        rest = after;
        if pair.is_none() {
            return Ok((Labels(&inside[..inside.len() - rest.len()]), rest));
        }
    }
}

type Pair<'a> = (&'a str, &'a str);

/// Splits the next `name="value"` from what follows it and its comma. At the closing brace it
/// returns no pair, and what follows the brace.
fn next_pair(text: &str) -> Result<(Option<Pair<'_>>, &str), &'static str> {
    let text = text.trim_start_matches(BLANK);
    if let Some(after) = text.strip_prefix('}') {
        return Ok((None, after));
    }
    let (name, rest) = leading(text, is_name);
    if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
        return Err("has a label without a name");
    }
    let rest = rest
        .trim_start_matches(BLANK)
        .strip_prefix('=')
        .ok_or("has a label without a value")?;
    let rest = rest
        .trim_start_matches(BLANK)
        .strip_prefix('"')
        .ok_or("has a label's value without quotes")?;
    let end = closing_quote(rest).ok_or("has a label's value without an end")?;
    let (value, rest) = (&rest[..end], rest[end + 1..].trim_start_matches(BLANK));
    match rest.strip_prefix(',') {
        Some(rest) => Ok((Some((name, value)), rest)),
        None if rest.starts_with('}') => Ok((Some((name, value)), rest)),
        None => Err("has labels without a comma between them"),
    }
}

/// Position of the first quote that is not escaped by a backslash.
fn closing_quote(text: &str) -> Option<usize> {
    let mut protected = false;
    text.bytes().position(|byte| {
        let closes = byte == b'"' && !protected;
        protected = byte == b'\\' && !protected;
        closes
    })
}

fn leading(text: &str, belongs: impl Fn(char) -> bool) -> (&str, &str) {
    text.split_at(text.find(|c| !belongs(c)).unwrap_or(text.len()))
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// Resolves `\\`, `\"` and `\n`. A backslash before any other character is kept.
fn unescaped(value: &str) -> Cow<'_, str> {
    if !value.contains('\\') {
        return Cow::Borrowed(value);
    }
    let mut plain = String::with_capacity(value.len());
    let mut rest = value.chars();
    while let Some(c) = rest.next() {
        if c != '\\' {
            plain.push(c);
            continue;
        }
        match rest.next() {
            Some('n') => plain.push('\n'),
            Some(c @ ('\\' | '"')) => plain.push(c),
            Some(other) => plain.extend(['\\', other]),
            None => plain.push('\\'),
        }
    }
    Cow::Owned(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(page: &str) -> Result<Vec<(String, f64)>, MalformedLine> {
        let samples: Result<Vec<_>, _> = samples(page).collect();
        Ok(samples?
            .iter()
            .map(|sample| (sample.name.to_owned(), sample.value))
            .collect())
    }

    #[test]
    fn a_page_as_servers_write_it_is_read() {
        let page = "# HELP process_cpu_seconds_total Total \"CPU\" time {in} seconds.\n\
                    # TYPE process_cpu_seconds_total counter\n\
                    process_cpu_seconds_total 12.34\n\n\
                    a:b_total{direction=\"incoming\",country=\"\"} 1.5e+06\n\
                    tabbed\t{ le = \"+Inf\" , }\t+Inf\t1395066363000\n  \
                    odd NaN -3\r\nminus -1";
        let names = [
            "process_cpu_seconds_total",
            "a:b_total",
            "tabbed",
            "odd",
            "minus",
        ];
        let read = read(page).unwrap();
        assert_eq!(
            read.iter()
                .map(|(name, _)| name.as_str())
                .collect::<Vec<_>>(),
            names
        );
        assert_eq!(
            [read[0].1, read[1].1, read[2].1, read[4].1],
            [12.34, 1_500_000.0, f64::INFINITY, -1.0]
        );
        assert!(read[3].1.is_nan());
    }

    #[test]
    fn labels_are_found_whatever_stands_in_their_values() {
        let page = r#"x{a="b\"}, c=\"d",path="C:\\new\n\q",empty="",last="ä"} 1"#;
        let sample = samples(page).next().unwrap().unwrap();
        let value = |name| sample.labels.value(name);
        assert_eq!(value("a").as_deref(), Some("b\"}, c=\"d"));
        assert_eq!(value("path").as_deref(), Some("C:\\new\n\\q"));
        assert_eq!(
            (
                value("empty").as_deref(),
                value("last").as_deref(),
                value("c")
            ),
            (Some(""), Some("ä"), None)
        );
        assert!(
            sample.labels.have(&[("empty", ""), ("last", "ä")])
                && !sample.labels.have(&[("empty", ""), ("last", "a")])
        );
        assert!(
            sample.labels.have(&[])
                && samples("x 1")
                    .next()
                    .unwrap()
                    .unwrap()
                    .labels
                    .value("a")
                    .is_none()
        );
    }

    #[test]
    fn what_the_format_does_not_allow_is_refused_by_line() {
        let cases = [
            ("<html>", "does not begin with a metric's name"),
            ("1up 1", "does not begin with a metric's name"),
            ("{a=\"b\"} 1", "does not begin with a metric's name"),
            ("up-1", "has no blank behind its name"),
            ("up", "has no value"),
            ("up{a=\"b\"}", "has no value"),
            ("up one", "has a value that is no number"),
            ("up 1 soon", "has a time stamp that is no whole number"),
            ("up 1 2 3", "goes on behind its time stamp"),
            ("up{", "has a label without a name"),
            ("up{1=\"b\"} 1", "has a label without a name"),
            ("up{a} 1", "has a label without a value"),
            ("up{a=b} 1", "has a label's value without quotes"),
            ("up{a=\"b} 1", "has a label's value without an end"),
            ("up{a=\"b\\\"} 1", "has a label's value without an end"),
            (
                "up{a=\"b\"c=\"d\"} 1",
                "has labels without a comma between them",
            ),
            ("up{a=\"b\" 1", "has labels without a comma between them"),
            ("up{a=\"b\",", "has a label without a name"),
        ];
        for (line, what) in cases {
            let malformed = read(&format!("fine 1\n{line}\n")).unwrap_err();
            assert_eq!(malformed, MalformedLine { line: 2, what }, "{line}");
        }
        assert_eq!(
            read("fine 1\nup{").unwrap_err().to_string(),
            "line 2 has a label without a name"
        );
    }
}
