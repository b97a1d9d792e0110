//! HTTP client for a coordinator: throng's own, or `voicegw`'s.

use std::fmt;
use std::time::Duration;

use http::header;
use reqwest::Method;
use serde::Serialize;

use crate::coordinator::access::Denied;
use crate::coordinator::protocol::{self, ProtocolMessage, TOKEN_VARIABLE};
use crate::plan::ServerUrl;
use crate::signal::Secret;
use crate::signal::answer::{self, AnswerFault, AskedAt, AskedFor, HttpAnswer};
use crate::signal::fetch::{FetchFault, Fetched, Fetcher};
use crate::signal::link::{LinkFault, LinkStage};
use crate::signal::route::ProxyFault;
use crate::words;

/// Longest wait for an answer. A coordinator answers from memory, after a write to its disk, so a
/// slower answer counts as none.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Largest answer that is read. The frame counts of all other hosts are the largest.
const ANSWER_BYTES_MAX: usize = 8 << 20;
/// Number of characters of a refusal that are shown.
const REFUSAL_CHARS_MAX: usize = 400;

/// Client of one coordinator. Cheap to clone; connections are pooled.
#[derive(Clone)]
pub struct CoordinatorClient {
    fetcher: Fetcher,
    url: ServerUrl,
    token: Option<Secret>,
}

/// Why there is no usable answer. The variants differ in what the caller can do about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoAnswer {
    /// The coordinator cannot be reached, does not answer in time, or sends something unreadable.
    /// Another attempt may succeed.
    #[error("{0}")]
    Away(String),
    /// The coordinator does not know this prober (404): it forgot it, or never registered it.
    #[error("{0}")]
    Unknown(String),
    /// The coordinator refuses, and would refuse again.
    #[error("{0}")]
    Refused(String),
}

impl CoordinatorClient {
    /// `token` authenticates this prober; `None` for a coordinator that asks for no token.
    pub fn new(url: ServerUrl, token: Option<Secret>) -> CoordinatorClient {
        CoordinatorClient {
            fetcher: Fetcher::new(&url.http(), &url.http(), &[], REQUEST_TIMEOUT),
            url,
            token,
        }
    }

    pub async fn get<A: ProtocolMessage>(&self, path: &str) -> Result<A, NoAnswer> {
        self.ask(Method::GET, path, None).await
    }

    pub async fn post<A: ProtocolMessage>(
        &self,
        path: &str,
        message: &impl Serialize,
    ) -> Result<A, NoAnswer> {
        let body =
            serde_json::to_vec(message).expect("our messages have string keys and finite numbers");
        self.ask(Method::POST, path, Some(body)).await
    }

    async fn ask<A: ProtocolMessage>(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<A, NoAnswer> {
        let url = format!("{}{path}", self.url.http());
        let mut request = self.fetcher.request(method, &url);
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, bearer(token)?);
        }
        if let Some(body) = body {
            request = request
                .header(header::CONTENT_TYPE, "application/json")
                .body(body);
        }
        let fetched = self.fetcher.send(request, ANSWER_BYTES_MAX).await;
        let fetched = fetched.map_err(|fault| self.away(fault))?;
        match fetched.status {
            200..300 => protocol::read(&fetched.body).map_err(|error| self.not_understood(&error)),
            _ => Err(self.refusal(&fetched, &url, path)),
        }
    }

    fn away(&self, fault: FetchFault) -> NoAnswer {
        let url = self.url.http();
        let text = match &fault {
            FetchFault::TooLong { bytes_max, .. } => {
                format!("{url} answers with more than {bytes_max} bytes: is it a coordinator?")
            }
            FetchFault::Link(LinkFault::Slow {
                stage: LinkStage::Answer,
                ..
            }) => format!(
                "the coordinator at {url} did not answer within {} s",
                REQUEST_TIMEOUT.as_secs()
            ),
            // A client that expects HTTP sees a TLS alert in this form.
            FetchFault::Link(LinkFault::NotHttp {
                began,
                secure: false,
                ..
            }) => format!(
                "the coordinator at {url} cannot be reached ({began}): where it speaks TLS, write https://"
            ),
            FetchFault::Link(LinkFault::TlsMismatch { .. }) => format!(
                "the coordinator at {url} cannot be reached: where it does not speak TLS, write http://"
            ),
            other => format!("the coordinator at {url} cannot be reached: {other}"),
        };
        match fault {
            // Another attempt would fail in the same way.
            FetchFault::Trust(_)
            | FetchFault::Proxy(ProxyFault::Unspoken { .. } | ProxyFault::Unreadable { .. }) => {
                NoAnswer::Refused(text)
            }
            _ => NoAnswer::Away(text),
        }
    }

    fn not_understood(&self, error: &protocol::MalformedMessage) -> NoAnswer {
        NoAnswer::Away(format!(
            "the coordinator at {} said what cannot be understood ({}): is it a coordinator?",
            self.url.http(),
            short(&error.to_string())
        ))
    }

    fn refusal(&self, fetched: &Fetched, url: &str, path: &str) -> NoAnswer {
        let (status, body) = (fetched.status, fetched.body.as_slice());
        if answer::is_livekits(body) {
            return NoAnswer::Refused(format!(
                "{} is a LiveKit server's address, and no coordinator's: give the coordinator's (--report-to)",
                self.url.http()
            ));
        }
        let fault = AnswerFault::of(
            &HttpAnswer {
                status,
                headers: &fetched.headers,
                body,
            },
            &AskedAt {
                what: AskedFor::Coordinator,
                url,
                path,
                secret: self.token.as_ref(),
            },
        );
        match fault {
            AnswerFault::Own { .. } => {}
            // Its words are a page's, and not a coordinator's.
            AnswerFault::WebPage { .. } => return page(status, fault.to_string()),
            AnswerFault::Limited { .. }
            | AnswerFault::BackendAway { .. }
            | AnswerFault::Unavailable { .. } => {
                return NoAnswer::Away(format!("the coordinator cannot answer now: {fault}"));
            }
            other => return NoAnswer::Refused(other.to_string()),
        }
        self.own_refusal(status, body)
    }

    /// Returns what a coordinator's own refusal means.
    fn own_refusal(&self, status: u16, body: &[u8]) -> NoAnswer {
        let refusal = protocol::read::<protocol::RefusalMessage>(body);
        let is_coordinator = refusal.is_ok();
        let said = match refusal {
            Ok(refusal) => short(&refusal.error),
            Err(_) => format!("status {status}: {}", short(&String::from_utf8_lossy(body))),
        };
        let said = self
            .token
            .as_ref()
            .map_or(said.clone(), |token| token.redact(&said));
        if status == 401 && self.token.is_some() && said == Denied::NoToken.text() {
            return NoAnswer::Refused(format!(
                "the coordinator at {} saw no token, and this prober sent one: something in front of it takes the Authorization header away; have it passed on, or use an address behind it",
                self.url.http()
            ));
        }
        match status {
            404 if !is_coordinator => NoAnswer::Unknown(format!(
                "{} does not answer as a coordinator does ({said}): check the address",
                self.url.http()
            )),
            401 | 403 => {
                let hint = if said.contains(TOKEN_VARIABLE) {
                    String::new()
                } else {
                    format!(" (--coordinator-token or {TOKEN_VARIABLE} says which is used)")
                };
                NoAnswer::Refused(format!(
                    "the coordinator at {} does not let us in: {said}{hint}",
                    self.url.http()
                ))
            }
            404 => NoAnswer::Unknown(format!(
                "the coordinator at {} does not know this prober ({said})",
                self.url.http()
            )),
            408 | 425 | 429 | 500.. => NoAnswer::Away(format!(
                "the coordinator at {} cannot answer now ({said})",
                self.url.http()
            )),
            _ => NoAnswer::Refused(format!("the coordinator says no: {said}")),
        }
    }
}

impl fmt::Debug for CoordinatorClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Client({})", self.url.http())
    }
}

fn bearer(token: &Secret) -> Result<header::HeaderValue, NoAnswer> {
    let mut value =
        header::HeaderValue::from_str(&format!("Bearer {}", token.expose())).map_err(|_| {
            NoAnswer::Refused(
                "the coordinator's token has characters that no token has: copy it again"
                    .to_owned(),
            )
        })?;
    value.set_sensitive(true);
    Ok(value)
}

/// Returns what a web page in a coordinator's place means.
fn page(status: u16, said: String) -> NoAnswer {
    match status {
        404 => NoAnswer::Unknown(said),
        500.. => NoAnswer::Away(said),
        _ => NoAnswer::Refused(said),
    }
}

/// Shortens text from the network to one readable line.
fn short(text: &str) -> String {
    let line: String = words::one_line(text)
        .chars()
        .take(REFUSAL_CHARS_MAX)
        .collect();
    line.trim().to_owned()
}
