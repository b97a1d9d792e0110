//! The server's own figures: its Prometheus pages are read once a second beside our series, to show
//! what the load cost the server.
//!
//! [`exposition`] reads the text, [`page`] knows the metric names, [`book`] keeps the readings of
//! one node and calculates what was counted between two moments. None of them has a socket or a
//! clock; [`PageWatch`] has both. The pages are read by the process that leads a test: a run reads
//! them for itself, a coordinator for all its probers, which read none.

pub mod book;
pub mod exposition;
pub mod page;
mod watch;

use std::fmt;
use std::str::FromStr;
use std::time::Instant;

use url::Url;

pub use book::{Cost, NodeRow};
pub use watch::{PageWatch, UnwatchablePages};

/// Address of a node's page. Its user name, password and query are sent to the server only and
/// never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct PageUrl(Url);

impl FromStr for PageUrl {
    type Err = &'static str;

    /// Parses an address. Without a path it gets `/metrics`, Prometheus' default.
    fn from_str(text: &str) -> Result<PageUrl, Self::Err> {
        const WANTED: &str =
            "takes the address of a Prometheus page: http://HOST:PORT/metrics, or https://..";
        let mut url: Url = text.trim().parse().map_err(|_| WANTED)?;
        if !matches!(url.scheme(), "http" | "https") || url.fragment().is_some() {
            return Err(WANTED);
        }
        if url.path() == "/" {
            url.set_path("/metrics");
        }
        Ok(PageUrl(url))
    }
}

impl fmt::Display for PageUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}://{}",
            self.0.scheme(),
            self.0.host_str().unwrap_or_default()
        )?;
        if let Some(port) = self.0.port() {
            write!(f, ":{port}")?;
        }
        f.write_str(self.0.path())
    }
}

impl fmt::Debug for PageUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageUrl({self})")
    }
}

/// A named part of a test: `hold`, or a tier by its name.
#[derive(Clone, Debug)]
pub struct NamedStretch {
    pub name: String,
    pub from: Instant,
    pub to: Instant,
}

/// All that the servers reported during a test.
#[derive(Clone, Debug, Default)]
pub struct Account {
    pub nodes: Vec<NodeReadings>,
    /// Cost of all nodes together, one entry for each stretch, and `total` at the end.
    pub stretches: Vec<StretchCost>,
}

/// All that one node reported.
#[derive(Clone, Debug)]
pub struct NodeReadings {
    /// Address without its secret parts.
    pub url: String,
    pub node_id: Option<String>,
    pub readings: usize,
    pub failures: u64,
    pub restarts: u32,
    pub gaps: Vec<ReadingGap>,
    pub stretches: Vec<StretchCost>,
}

/// A time span without a reading, in seconds since the start of the test; negative before it.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct ReadingGap {
    pub from: f64,
    /// `None` if the node was not read again.
    pub to: Option<f64>,
    pub why: String,
}

/// Cost of one stretch. `None` if a node could not be read near the ends of the stretch.
#[derive(Clone, Debug, PartialEq)]
pub struct StretchCost {
    pub name: String,
    pub cost: Option<Cost>,
}

impl Account {
    /// Notes for the reader of the report: pages that could not be read, processes that were
    /// restarted.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        for node in &self.nodes {
            if let Some(gap) = node
                .gaps
                .iter()
                .max_by(|a, b| a.length().total_cmp(&b.length()))
            {
                let times = if node.gaps.len() == 1 {
                    String::new()
                } else {
                    format!(" (the longest of {} times)", node.gaps.len())
                };
                let until = gap
                    .to
                    .map_or("to the end".to_owned(), |to| format!("to {to:.0}"));
                notes.push(format!(
                    "{} was not read from second {:.0} {until}{times}: {}",
                    node.url, gap.from, gap.why
                ));
            }
            if node.restarts > 0 {
                notes.push(format!(
                    "the server of {} was started again {} times during the test: up to a second of its figures is missing each time",
                    node.url, node.restarts
                ));
            }
        }
        notes
    }
}

impl ReadingGap {
    fn length(&self) -> f64 {
        self.to.map_or(f64::INFINITY, |to| to - self.from)
    }
}

/// Seconds from `start` to `at`; negative if `at` is earlier.
fn seconds_since(start: Instant, at: Instant) -> f64 {
    at.saturating_duration_since(start).as_secs_f64()
        - start.saturating_duration_since(at).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_and_what_it_keeps_secret_is_not_shown() {
        let shown = |text: &str| {
            text.parse::<PageUrl>()
                .map(|url| (url.to_string(), url.0.to_string()))
        };
        assert_eq!(
            shown("http://10.0.0.1:6789"),
            Ok((
                "http://10.0.0.1:6789/metrics".into(),
                "http://10.0.0.1:6789/metrics".into()
            ))
        );
        let (public, whole) =
            shown("https://me:secret@sfu.example/some/page?token=hidden").unwrap();
        assert_eq!(public, "https://sfu.example/some/page");
        assert!(whole.contains("me:secret@") && whole.ends_with("?token=hidden"));
        let url: PageUrl = "http://me:secret@[::1]:80/".parse().unwrap();
        assert_eq!(format!("{url:?}"), "PageUrl(http://[::1]/metrics)");
        for wrong in [
            "",
            "10.0.0.1:6789",
            "sfu:6789/metrics",
            "ws://sfu:7880",
            "http://",
            "http://sfu/metrics#cpu",
            "/metrics",
        ] {
            assert!(
                shown(wrong).is_err_and(|why| why.contains("http://HOST:PORT/metrics")),
                "{wrong}"
            );
        }
    }

    #[test]
    fn notes_name_what_was_away_and_who_began_anew() {
        let gap = |from: f64, to| ReadingGap {
            from,
            to,
            why: "connection refused".into(),
        };
        let node = |gaps: &[ReadingGap], restarts| NodeReadings {
            url: "http://sfu:6789/metrics".into(),
            node_id: None,
            readings: 9,
            failures: 3,
            restarts,
            gaps: gaps.to_vec(),
            stretches: Vec::new(),
        };
        let notes = |node| {
            Account {
                nodes: vec![node],
                ..Account::default()
            }
            .notes()
        };
        assert!(notes(node(&[], 0)).is_empty());
        assert_eq!(
            notes(node(&[gap(3.0, Some(4.2)), gap(7.0, Some(12.0))], 2)),
            [
                "http://sfu:6789/metrics was not read from second 7 to 12 (the longest of 2 times): connection refused",
                "the server of http://sfu:6789/metrics was started again 2 times during the test: up to a second of its figures is missing each time",
            ]
        );
        assert!(
            notes(node(&[gap(5.0, None)], 0))[0]
                .contains("from second 5 to the end: connection refused")
        );
    }
}
