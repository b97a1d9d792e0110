//! Fetches the pages: one task for each node, once a second, outside the engine's threads.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use http::header;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval_at, timeout_at};

use super::book::{Cost, NodeBook, NodeRow};
use super::page::{Counter, MetricsPage, PageError};
use super::{Account, NamedStretch, NodeReadings, PageUrl, ReadingGap, StretchCost, seconds_since};
use crate::signal::answer::{AnswerFault, AskedAt, AskedFor, HttpAnswer};
use crate::signal::fetch::{FetchFault, Fetcher};
use crate::signal::link::{LinkFault, LinkStage};

const INTERVAL: Duration = Duration::from_secs(1);
/// A page that takes longer counts as not read.
const TIMEOUT: Duration = Duration::from_secs(2);
/// LiveKit's page has about 100 KiB, and more with many countries in it.
const PAGE_BYTES_MAX: usize = 8 << 20;
/// Bound of the readings that wait for [`PageWatch::rows`]. When they are full, a node's task
/// waits.
const READINGS_WAITING: usize = 64;

/// Reads the pages of several nodes during a test.
pub struct PageWatch {
    nodes: Vec<WatchedPage>,
    heard: mpsc::Receiver<Heard>,
    tell: mpsc::Sender<Heard>,
    tasks: Vec<JoinHandle<()>>,
    interval: Duration,
}

struct WatchedPage {
    url: PageUrl,
    fetcher: Fetcher,
    book: NodeBook,
}

struct Heard {
    node: usize,
    at: Instant,
    page: Result<MetricsPage, UnreadPage>,
}

/// Reason why a page was not read.
#[derive(Debug, thiserror::Error)]
enum UnreadPage {
    #[error("no answer within {} s", TIMEOUT.as_secs())]
    Timeout,
    #[error(transparent)]
    FetchFault(FetchFault),
    /// Something other than the server answered.
    #[error(transparent)]
    Answer(AnswerFault),
    #[error("it answers {0}")]
    Status(http::StatusCode),
    /// The server itself may require a password, or a proxy in front of it.
    #[error("it answers {0}: where it wants a password, write http://USER:PASSWORD@HOST..")]
    Locked(http::StatusCode),
    #[error("it has more than {} MiB", PAGE_BYTES_MAX >> 20)]
    TooLong,
    #[error("it is no text")]
    NotText,
    #[error(transparent)]
    Malformed(#[from] PageError),
}

/// Reasons why the named pages cannot be watched, one on each line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UnwatchablePages(String);

impl PageWatch {
    /// Reads each page for the first time. What is counted from then on belongs to the test.
    ///
    /// # Errors
    /// If a page cannot be read, or two pages belong to the same node.
    pub async fn start(urls: &[PageUrl]) -> Result<PageWatch, UnwatchablePages> {
        let (tell, heard) = mpsc::channel(READINGS_WAITING);
        let mut watch = PageWatch {
            nodes: Vec::new(),
            heard,
            tell,
            tasks: Vec::new(),
            interval: INTERVAL,
        };
        let fetchers: Vec<Fetcher> = urls.iter().map(fetcher).collect();
        let pages = urls.iter().zip(&fetchers);
        let readings = join_all(pages.map(|(url, fetcher)| read(fetcher, url))).await;
        let mut refusals = Vec::new();
        for ((url, fetcher), (at, page)) in urls.iter().zip(fetchers).zip(readings) {
            let mut book = NodeBook::default();
            match page {
                Ok(page) => book.note(at, page),
                Err(why) => refusals.push(format!(
                    "--server-metrics {url} cannot be read ({why}): is the server's Prometheus port open (prometheus.port of LiveKit)? Or leave it out"
                )),
            }
            let twin = watch.nodes.iter().find(|node| {
                node.book.node_id().is_some() && node.book.node_id() == book.node_id()
            });
            if let Some(twin) = twin {
                refusals.push(format!(
                    "--server-metrics {} and {url} are the same node: name each once",
                    twin.url
                ));
            }
            watch.nodes.push(WatchedPage {
                url: url.clone(),
                fetcher,
                book,
            });
        }
        if refusals.is_empty() {
            Ok(watch)
        } else {
            Err(UnwatchablePages(refusals.join("\n")))
        }
    }

    /// Warnings about figures that the report would show but that are missing on the pages.
    pub fn warnings(&self) -> Vec<String> {
        let silent = self
            .nodes
            .iter()
            .filter(|node| node.book.whole_counters()[Counter::CpuSeconds].is_none());
        silent
            .map(|node| {
                format!(
                    "{} says nothing of CPU time (process_cpu_seconds_total): what a participant costs stays unknown",
                    node.url
                )
            })
            .collect()
    }

    /// Continues reading, at `first` and every second from then on. Must be called within a tokio
    /// runtime.
    pub fn go_on(&mut self, first: Instant) {
        for (node, watched) in self.nodes.iter().enumerate() {
            let (fetcher, url, tell, interval) = (
                watched.fetcher.clone(),
                watched.url.clone(),
                self.tell.clone(),
                self.interval,
            );
            self.tasks.push(tokio::spawn(async move {
                let mut beat = interval_at(first.into(), interval);
                beat.set_missed_tick_behavior(MissedTickBehavior::Skip);
                loop {
                    beat.tick().await;
                    let (at, page) = read(&fetcher, &url).await;
                    if tell.send(Heard { node, at, page }).await.is_err() {
                        return;
                    }
                }
            }));
        }
    }

    /// Returns one row of the series: each node's figures since the last row, in the order in which
    /// the nodes were named.
    pub fn rows(&mut self) -> Vec<Option<NodeRow>> {
        while let Ok(heard) = self.heard.try_recv() {
            self.note(heard);
        }
        self.nodes.iter_mut().map(|node| node.book.row()).collect()
    }

    /// Reads until the counters hold all that was forwarded, which they do once everybody has left.
    /// Ends at the latest after the longest lag of the counters and `TIMEOUT`.
    pub async fn finish(mut self, start: Instant, stretches: &[NamedStretch]) -> Account {
        let left = Instant::now();
        let lag = self
            .nodes
            .iter()
            .map(|node| node.book.lag())
            .max()
            .unwrap_or_default();
        let deadline = left + lag + TIMEOUT;
        while self.nodes.iter().any(|node| !node.book.is_complete(left)) {
            match timeout_at(deadline.into(), self.heard.recv()).await {
                Ok(Some(heard)) => self.note(heard),
                _ => break,
            }
        }
        account(&self.nodes, start, stretches)
    }

    fn note(&mut self, heard: Heard) {
        let book = &mut self.nodes[heard.node].book;
        match heard.page {
            Ok(page) => book.note(heard.at, page),
            Err(why) => book.note_failure(heard.at, why.to_string()),
        }
    }
}

impl Drop for PageWatch {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

fn fetcher(url: &PageUrl) -> Fetcher {
    Fetcher::new(&url.to_string(), url.0.as_str(), &[], TIMEOUT)
}

/// Returns the page and the moment it describes: halfway between request and response.
async fn read(fetcher: &Fetcher, url: &PageUrl) -> (Instant, Result<MetricsPage, UnreadPage>) {
    let asked = Instant::now();
    let text = text(fetcher, url).await;
    let at = asked + asked.elapsed() / 2;
    (at, text.and_then(|text| Ok(MetricsPage::read(&text)?)))
}

async fn text(fetcher: &Fetcher, url: &PageUrl) -> Result<String, UnreadPage> {
    let request = fetcher
        .request(reqwest::Method::GET, url.0.as_str())
        .header(header::ACCEPT, "text/plain; version=0.0.4");
    let fetched = fetcher.send(request, PAGE_BYTES_MAX).await;
    let fetched = fetched.map_err(|fault| match fault {
        FetchFault::TooLong { .. } => UnreadPage::TooLong,
        FetchFault::Link(LinkFault::Slow {
            stage: LinkStage::Answer,
            ..
        }) => UnreadPage::Timeout,
        other => UnreadPage::FetchFault(other),
    })?;
    if fetched.status == 200 {
        return String::from_utf8(fetched.body).map_err(|_| UnreadPage::NotText);
    }
    // Only the shown form of the address is passed on, because its other parts may hold a password.
    let fault = AnswerFault::of(
        &HttpAnswer {
            status: fetched.status,
            headers: &fetched.headers,
            body: &fetched.body,
        },
        &AskedAt {
            what: AskedFor::MetricsPage,
            url: &url.to_string(),
            path: "",
            secret: None,
        },
    );
    let status = |status| http::StatusCode::from_u16(status).unwrap_or_default();
    Err(match fault {
        AnswerFault::Gateway { status: 401, .. } => UnreadPage::Locked(status(401)),
        AnswerFault::Own { status: code, .. } | AnswerFault::WebPage { status: code, .. } => {
            UnreadPage::Status(status(code))
        }
        other => UnreadPage::Answer(other),
    })
}

fn account(nodes: &[WatchedPage], start: Instant, stretches: &[NamedStretch]) -> Account {
    let nodes: Vec<NodeReadings> = nodes
        .iter()
        .map(|node| told(node, start, stretches))
        .collect();
    let names = stretches
        .iter()
        .map(|stretch| stretch.name.as_str())
        .chain(["total"]);
    let together = names.enumerate().map(|(at, name)| StretchCost {
        name: name.to_owned(),
        cost: nodes
            .iter()
            .map(|node| node.stretches[at].cost.clone())
            .collect::<Option<Vec<_>>>()
            .and_then(Cost::of_all),
    });
    Account {
        stretches: together.collect(),
        nodes,
    }
}

fn told(node: &WatchedPage, start: Instant, stretches: &[NamedStretch]) -> NodeReadings {
    let book = &node.book;
    let between = stretches.iter().map(|stretch| StretchCost {
        name: stretch.name.clone(),
        cost: book.between(stretch.from, stretch.to),
    });
    let whole = StretchCost {
        name: "total".to_owned(),
        cost: book.whole(),
    };
    let gap = |gap: super::book::UnreadSpan| ReadingGap {
        from: seconds_since(start, gap.from),
        to: gap.to.map(|to| seconds_since(start, to)),
        why: gap.why,
    };
    NodeReadings {
        url: node.url.to_string(),
        node_id: book.node_id().map(str::to_owned),
        readings: book.readings(),
        failures: book.failures(),
        restarts: book.restarts(),
        gaps: book.gaps().into_iter().map(gap).collect(),
        stretches: between.chain([whole]).collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::Router;
    use axum::http::StatusCode;
    use axum::response::IntoResponse;
    use axum::routing::get;
    use tokio::net::TcpListener;

    use super::*;
    use crate::server_metrics::page::tests::LIVEKIT;

    /// Serves some pages until the runtime ends.
    async fn serve(pages: Router) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, pages).await });
        format!("http://{address}")
    }

    fn url(text: &str) -> PageUrl {
        text.parse().unwrap()
    }

    async fn refusal(urls: &[PageUrl]) -> String {
        match PageWatch::start(urls).await {
            Ok(_) => panic!("it starts"),
            Err(refusal) => refusal.to_string(),
        }
    }

    #[tokio::test]
    async fn a_page_that_cannot_be_read_is_refused_with_what_to_do() {
        let huge = || async { "# a comment\n".repeat(PAGE_BYTES_MAX / 10) };
        let pages = Router::new()
            .route("/metrics", get(|| async { LIVEKIT }))
            .route("/again", get(|| async { LIVEKIT }))
            .route("/other", get(|| async { "up 1\n" }))
            .route("/html", get(|| async { "<html>hello</html>" }))
            .route("/bytes", get(|| async { vec![0xFF, 0xFE] }))
            .route("/closed", get(|| async { StatusCode::UNAUTHORIZED }))
            .route(
                "/elsewhere",
                get(|| async { axum::response::Redirect::permanent("/metrics") }),
            )
            .route("/huge", get(huge));
        let server = serve(pages).await;
        let cases = [
            ("/other", "none of an SFU's figures is on it"),
            ("/html", "line 1 does not begin with a metric's name"),
            ("/bytes", "it is no text"),
            ("/closed", "it answers 401 Unauthorized"),
            ("/nothing", "it answers 404 Not Found"),
            ("/elsewhere", "/elsewhere is redirected (308) to "),
            ("/huge", "it has more than 8 MiB"),
        ];
        for (path, why) in cases {
            let refused = refusal(&[url(&format!("{server}{path}"))]).await;
            assert!(
                refused.contains(why) && refused.contains("is the server's Prometheus port open"),
                "{path}: {refused}"
            );
        }
        let twice = refusal(&[url(&server), url(&format!("{server}/again"))]).await;
        assert_eq!(
            twice,
            format!(
                "--server-metrics {server}/metrics and {server}/again are the same node: name each once"
            )
        );

        let free = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let refused = refusal(&[url(&server), url(&format!("http://me:secret@{free}"))]).await;
        assert!(
            refused.starts_with(&format!(
                "--server-metrics http://{free}/metrics cannot be read ("
            )) && !refused.contains("secret"),
            "{refused}"
        );
    }

    #[tokio::test]
    async fn a_password_in_the_address_opens_a_page_that_wants_one() {
        let guarded = |headers: axum::http::HeaderMap| async move {
            // me:secret
            if headers
                .get("authorization")
                .is_some_and(|value| value == "Basic bWU6c2VjcmV0")
            {
                LIVEKIT.into_response()
            } else {
                StatusCode::UNAUTHORIZED.into_response()
            }
        };
        let server = serve(Router::new().route("/metrics", get(guarded))).await;
        assert!(refusal(&[url(&server)]).await.contains("401"));
        let open = url(&server.replacen("http://", "http://me:secret@", 1));
        assert!(PageWatch::start(&[open]).await.is_ok());
    }

    #[tokio::test]
    async fn readings_become_rows_and_an_account() {
        let asked = Arc::new(AtomicUsize::new(0));
        let counting = asked.clone();
        let page = move || async move {
            // Half a second of CPU and 40 packets each time. The third request fails.
            match counting.fetch_add(1, Ordering::Relaxed) {
                2 => StatusCode::SERVICE_UNAVAILABLE.into_response(),
                n => format!(
                    "process_cpu_seconds_total {}\nthrong_sfu_socket_drops 0\nlivekit_participant_total 4\n\
                     livekit_packet_total{{direction=\"outgoing\",transmission=\"initial\"}} {}\n",
                    n as f64 / 2.0,
                    40 * n
                )
                .into_response(),
            }
        };
        let server = serve(Router::new().route("/metrics", get(page))).await;
        let mut watch = PageWatch::start(&[url(&server)]).await.unwrap();
        watch.interval = Duration::from_millis(20);
        assert!(watch.warnings().is_empty());
        assert_eq!(watch.rows(), [None], "one reading is no stretch");
        let start = Instant::now();
        watch.go_on(start);
        let mut rows = Vec::new();
        while rows.len() < 3 {
            rows.extend(watch.rows().remove(0));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(
            rows.iter().all(|row| row.participants == Some(4.0)
                && row.cpu_cores.is_some()
                && row.resident_bytes.is_none()),
            "{rows:?}"
        );
        let account = watch.finish(start, &[]).await;
        let asked = asked.load(Ordering::Relaxed);
        let node = &account.nodes[0];
        assert_eq!(
            (node.readings, node.failures, node.gaps.len()),
            (asked - 1, 1, 1)
        );
        assert_eq!(node.gaps[0].why, "it answers 503 Service Unavailable");
        let total = account.stretches[0].cost.as_ref().unwrap();
        let last = (asked - 1) as f64;
        assert_eq!(
            (total.cpu_seconds(), total.counted[Counter::PacketsSent]),
            (Some(last / 2.0), Some(40.0 * last))
        );
        assert_eq!(
            (account.stretches[0].name.as_str(), account.stretches.len()),
            ("total", 1)
        );
    }

    #[tokio::test]
    async fn a_page_that_says_nothing_of_cpu_is_watched_with_a_warning() {
        let server = serve(Router::new().route(
            "/metrics",
            get(|| async { "livekit_participant_total 0\n" }),
        ))
        .await;
        let watch = PageWatch::start(&[url(&server)]).await.unwrap();
        assert!(
            watch.warnings()[0].contains("says nothing of CPU time"),
            "{:?}",
            watch.warnings()
        );
    }
}
