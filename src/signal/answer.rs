//! Reads HTTP answers other than the one asked for: who gave it, and what it wants. Signalling, the
//! room service, the probe before a run, metrics pages and coordinators share this one reading.
//!
//! Proxies, gateways and catch-all pages stand between us and a server, and answer in its place. A
//! status alone does not show that. `Location`, `Retry-After`, `WWW-Authenticate`, `Server`, the
//! body's type and its words do. What the server itself said is [`AnswerFault::Own`]; each caller
//! words that itself.

use std::fmt;
use std::time::{Duration, SystemTime};

use http::{HeaderMap, StatusCode, header};
use url::Url;

use super::Secret;
use crate::words;

/// Number of characters of a stranger's text that an error keeps.
const TEXT_CHARS_MAX: usize = 300;
/// Number of characters of a server's name, or of what a gateway says that it wants.
const NAME_CHARS_MAX: usize = 60;

/// Service that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AskedFor {
    /// A participant's WebSocket, and the requests before it.
    Signalling,
    RoomService,
    MetricsPage,
    Coordinator,
}

impl AskedFor {
    /// Returns the flag with which the user gives its address.
    const fn flag(self) -> &'static str {
        match self {
            AskedFor::Signalling | AskedFor::RoomService => "--url",
            AskedFor::MetricsPage => "--server-metrics",
            AskedFor::Coordinator => "--report-to",
        }
    }

    const fn service(self) -> &'static str {
        match self {
            AskedFor::Signalling | AskedFor::RoomService => "a LiveKit server",
            AskedFor::MetricsPage => "a Prometheus page",
            AskedFor::Coordinator => "a coordinator",
        }
    }

    /// Returns how to get past a login in front of it.
    const fn way_past(self) -> &'static str {
        match self {
            AskedFor::Signalling | AskedFor::RoomService => {
                "give it what it wants with --header NAME:VALUE (and --token-in query where that is Authorization), or use an address behind it"
            }
            AskedFor::MetricsPage => {
                "write http://USER:PASSWORD@HOST.., or use an address behind it"
            }
            AskedFor::Coordinator => "use an address behind it",
        }
    }
}

/// An HTTP answer other than the one that was asked for.
pub struct HttpAnswer<'a> {
    pub status: u16,
    pub headers: &'a HeaderMap,
    pub body: &'a [u8],
}

/// Service that was asked for, and its address.
pub struct AskedAt<'a> {
    pub what: AskedFor,
    /// The whole URL.
    pub url: &'a str,
    /// The end of the URL. Everything before it is what the user writes.
    pub path: &'a str,
    /// Secret that no message may repeat.
    pub secret: Option<&'a Secret>,
}

/// Meaning of an unexpected HTTP answer, and who gave it. Each message says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnswerFault {
    #[error("{at} is redirected ({status}) to {to}: {advice}")]
    Redirected {
        at: String,
        status: u16,
        to: String,
        advice: String,
    },
    #[error("{at} speaks TLS: use wss:// or https://")]
    SpeaksTls { at: String },
    #[error(
        "{at} wants a client certificate ({status}), and throng has none to give: use an address that asks for none"
    )]
    ClientCertificate { at: String, status: u16 },
    /// Rate limit of the server, or of something in front of it.
    #[error("{who} at {at} says that there are too many requests ({status}: {text}){}", come_back(*.retry_after))]
    Limited {
        at: String,
        who: AnsweredBy,
        status: u16,
        text: String,
        retry_after: Option<Duration>,
    },
    #[error(
        "{who} in front of {at} lets nobody through ({status}: {text}); this is not the server's answer: {advice}"
    )]
    Gateway {
        at: String,
        who: AnsweredBy,
        status: u16,
        text: String,
        advice: &'static str,
    },
    #[error(
        "{who} at {at} is a proxy, and what it stands for does not answer it ({status}: {text}): is the server behind it running, and does the proxy have its address?"
    )]
    BackendAway {
        at: String,
        who: AnsweredBy,
        status: u16,
        text: String,
    },
    /// Something in front of the server takes no requests for now: a limit of its own, or
    /// maintenance.
    #[error("{who} at {at} takes no such request for now ({status}: {text}){}", for_now(who, *.retry_after))]
    Unavailable {
        at: String,
        who: AnsweredBy,
        status: u16,
        text: String,
        retry_after: Option<Duration>,
    },
    #[error(
        "{who} at {at} answers {path} with a web page ({status}: {text}), which {} does not: does the proxy pass {path} on, and is this the address?", what.service()
    )]
    WebPage {
        at: String,
        who: AnsweredBy,
        path: String,
        status: u16,
        text: String,
        what: AskedFor,
    },
    /// The server itself gave this answer, as far as can be told.
    #[error("{status}: {text}")]
    Own {
        status: u16,
        text: String,
        /// Whether the words are known to be those of the service that was asked for.
        is_known: bool,
    },
}

/// Name that the answering software gives itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnsweredBy(Option<String>);

impl AnsweredBy {
    pub(super) fn of(headers: &HeaderMap) -> AnsweredBy {
        let name = text_of(headers, header::SERVER).filter(|name| !name.is_empty());
        AnsweredBy(name.map(|name| shortened(&name, NAME_CHARS_MAX)))
    }

    /// Whether the name begins with one of these, in lower case.
    fn is_one_of(&self, names: &[&str]) -> bool {
        let name = self.0.as_deref().unwrap_or_default().to_lowercase();
        names.iter().any(|begins| name.starts_with(begins))
    }

    /// Whether it answers as nginx does: 503 for a limit or maintenance, 502 and 504 for a backend
    /// that is away.
    fn is_nginx(&self) -> bool {
        self.is_one_of(&["nginx", "openresty", "tengine", "angie"])
    }
}

impl fmt::Display for AnsweredBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_deref().unwrap_or("something"))
    }
}

fn come_back(after: Option<Duration>) -> String {
    after.map_or_else(
        || ": its limit, not ours; join more slowly, or have it raised".to_owned(),
        |after| {
            format!(
                ", and to come back in {} s: its limit, not ours; join more slowly, or have it raised",
                after.as_secs()
            )
        },
    )
}

/// Returns what a 503 of something in front of the server means, and what to do.
fn for_now(who: &AnsweredBy, after: Option<Duration>) -> String {
    match after {
        Some(after) => format!(
            ", and says to come back in {} s: it, or what it stands for, is under maintenance or over a limit; wait, or ask whoever runs it",
            after.as_secs()
        ),
        None if who.is_nginx() => ": that is a limit of its own (limit_conn, limit_req) or maintenance, because it answers 502 or 504 for a server that is away; join more slowly, or look at its settings".to_owned(),
        None => ": a limit of its own, maintenance, or nothing behind it; look at its settings and its log".to_owned(),
    }
}

impl AnswerFault {
    /// Reads an answer other than the one that was asked for.
    pub fn of(answer: &HttpAnswer<'_>, asked: &AskedAt<'_>) -> AnswerFault {
        let seen = Seen {
            answer,
            asked,
            who: AnsweredBy::of(answer.headers),
            text: said(answer, asked.secret),
            is_page: is_page(answer),
            is_own: is_own_words(asked.what, answer.body),
        };
        seen.fault()
    }

    /// Returns the pause that a rate limit asks for: `None` if this is no rate limit, `Some(None)`
    /// if the limit names no pause. What names a time after which to come back counts as a limit.
    pub fn limit(&self) -> Option<Option<Duration>> {
        match self {
            AnswerFault::Limited { retry_after, .. } => Some(*retry_after),
            AnswerFault::Unavailable { retry_after, .. } => retry_after.map(Some),
            _ => None,
        }
    }
}

/// An answer, with what was derived from it.
struct Seen<'a> {
    answer: &'a HttpAnswer<'a>,
    asked: &'a AskedAt<'a>,
    who: AnsweredBy,
    text: String,
    is_page: bool,
    is_own: bool,
}

impl Seen<'_> {
    fn fault(self) -> AnswerFault {
        let status = self.answer.status;
        let (at, who, text) = (self.at(), self.who.clone(), self.text.clone());
        let retry_after = retry_after(self.answer.headers);
        if let Some(redirected) = self.redirected() {
            return redirected;
        }
        match status {
            400 if self.asked.url.starts_with("http://") && self.body().contains("HTTPS") => {
                AnswerFault::SpeaksTls { at }
            }
            400 | 495 | 496 if self.body().contains("SSL certificate") => {
                AnswerFault::ClientCertificate { at, status }
            }
            429 => AnswerFault::Limited {
                at,
                who,
                status,
                text,
                retry_after,
            },
            503 if self.is_unavailable(retry_after) => AnswerFault::Unavailable {
                at,
                who,
                status,
                text,
                retry_after,
            },
            401 | 403 | 407 | 511 if self.is_gateways() => AnswerFault::Gateway {
                at,
                who,
                status,
                text: self.wanted(),
                advice: self.asked.what.way_past(),
            },
            502..=504 | 520..=530 if self.is_proxys() => AnswerFault::BackendAway {
                at,
                who,
                status,
                text,
            },
            _ if self.is_page => AnswerFault::WebPage {
                at,
                who,
                path: self.asked.path.to_owned(),
                status,
                text,
                what: self.asked.what,
            },
            _ => AnswerFault::Own {
                status,
                text,
                is_known: self.is_own,
            },
        }
    }

    /// Returns the address as the user would write it.
    fn at(&self) -> String {
        let base = base_of(self.asked.url, self.asked.path);
        base.unwrap_or(self.asked.url).to_owned()
    }

    fn body(&self) -> String {
        String::from_utf8_lossy(self.answer.body).into_owned()
    }

    fn redirected(&self) -> Option<AnswerFault> {
        if !matches!(self.answer.status, 300..=303 | 307 | 308) {
            return None;
        }
        let location = text_of(self.answer.headers, header::LOCATION)?;
        let mut to = Url::parse(self.asked.url).ok()?.join(&location).ok()?;
        // A query may hold the token that we sent.
        to.set_query(None);
        to.set_fragment(None);
        let _ = to.set_username("");
        let _ = to.set_password(None);
        let to = shortened(to.as_str(), TEXT_CHARS_MAX);
        let to = self
            .asked
            .secret
            .map_or(to.clone(), |secret| secret.redact(&to));
        let flag = self.asked.what.flag();
        let advice = match base_of(&to, self.asked.path) {
            Some(base) if base == self.at() => {
                "that is the same address: what stands in front of the server is set up wrong"
                    .into()
            }
            Some(base) => format!("write {flag} {}", self.as_written(base)),
            None => format!(
                "that is no address of {}: {}",
                self.asked.what.service(),
                self.asked.what.way_past()
            ),
        };
        Some(AnswerFault::Redirected {
            at: self.at(),
            status: self.answer.status,
            to,
            advice,
        })
    }

    /// Returns the address as the flag takes it: servers are written `ws://` and `wss://`.
    fn as_written(&self, base: &str) -> String {
        match self.asked.what {
            AskedFor::Signalling | AskedFor::RoomService => base.replacen("http", "ws", 1),
            AskedFor::MetricsPage | AskedFor::Coordinator => base.to_owned(),
        }
    }

    /// Whether a gateway gave this answer. A server's own refusal has its own words and asks for no
    /// password.
    fn is_gateways(&self) -> bool {
        let wants = text_of(self.answer.headers, header::WWW_AUTHENTICATE);
        let wants_other = wants.is_some_and(|wants| !wants.to_lowercase().starts_with("bearer"));
        if self.is_own && !wants_other {
            return false;
        }
        // LiveKit refuses with its own words alone, and never in JSON other than Twirp's.
        let is_of_livekit = matches!(
            self.asked.what,
            AskedFor::Signalling | AskedFor::RoomService
        );
        wants_other
            || self.is_page
            || self.answer.body.is_empty()
            || self.who.0.is_some()
            || matches!(self.answer.status, 407 | 511)
            || self.answer.status == 403 && self.asked.what != AskedFor::Coordinator
            || is_of_livekit && is_json(self.answer.body)
    }

    /// Returns what a gateway wants, in its own words.
    fn wanted(&self) -> String {
        let header = if self.answer.status == 407 {
            header::PROXY_AUTHENTICATE
        } else {
            header::WWW_AUTHENTICATE
        };
        match text_of(self.answer.headers, header) {
            Some(wants) => format!("it wants {}", shortened(&wants, NAME_CHARS_MAX)),
            None => self.text.clone(),
        }
    }

    /// Whether a proxy gave this answer for a server that does not answer. Servers never answer 502
    /// or 504 themselves; they may answer 503.
    fn is_proxys(&self) -> bool {
        if self.is_own {
            return false;
        }
        let is_bare = self.is_page || self.answer.body.is_empty();
        self.answer.status != 503
            || self.names_a_backend()
            // These answer 503 where nginx answers 502.
            || is_bare && self.who.is_one_of(&["apache", "awselb", "caddy"])
    }

    /// Whether something in front of the server answers 503 for a reason of its own.
    fn is_unavailable(&self, retry_after: Option<Duration>) -> bool {
        if self.is_own || retry_after.is_none() && self.is_proxys() {
            return false;
        }
        let is_bare = self.is_page || self.answer.body.is_empty() && self.who.0.is_some();
        retry_after.is_some() || is_bare
    }

    /// Whether the text is one with which proxies say that they have nothing behind them.
    fn names_a_backend(&self) -> bool {
        let text = self.body().to_lowercase();
        let words = [
            "upstream",
            "no available server",
            "backend",
            "no server is available",
            "no healthy",
        ];
        words.iter().any(|word| text.contains(word))
    }
}

/// Returns `http://host/prefix` for `http://host/prefix/rtc`, where `path` is `/rtc`.
fn base_of<'u>(url: &'u str, path: &str) -> Option<&'u str> {
    let url = url.split(['?', '#']).next().unwrap_or(url);
    url.trim_end_matches('/')
        .strip_suffix(path.trim_end_matches('/'))
}

/// Reads `Retry-After`: a number of seconds, or a date.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = text_of(headers, header::RETRY_AFTER)?;
    if let Ok(seconds) = text.trim().parse() {
        return Some(Duration::from_secs(seconds));
    }
    let at = httpdate::parse_http_date(text.trim()).ok()?;
    Some(at.duration_since(SystemTime::now()).unwrap_or_default())
}

/// Returns a header as text, on one line.
fn text_of(headers: &HeaderMap, name: header::HeaderName) -> Option<String> {
    let value = headers.get(name)?;
    Some(words::one_line(&String::from_utf8_lossy(value.as_bytes())))
}

/// Whether the answer is a web page for people.
fn is_page(answer: &HttpAnswer<'_>) -> bool {
    let kind = text_of(answer.headers, header::CONTENT_TYPE).unwrap_or_default();
    let start = answer
        .body
        .iter()
        .copied()
        .skip_while(u8::is_ascii_whitespace);
    let start: Vec<u8> = start
        .take(9)
        .map(|byte| byte.to_ascii_lowercase())
        .collect();
    kind.to_lowercase().starts_with("text/html")
        || start.starts_with(b"<html")
        || start.starts_with(b"<!doctype")
}

/// Whether these are words of the service that was asked for. The embedded SFU answers in LiveKit's
/// words.
fn is_own_words(what: AskedFor, body: &[u8]) -> bool {
    #[derive(serde::Deserialize)]
    struct CoordinatorBody {
        #[serde(rename = "error")]
        _error: String,
    }
    match what {
        AskedFor::Signalling | AskedFor::RoomService => is_livekits(body),
        AskedFor::Coordinator => serde_json::from_slice::<CoordinatorBody>(body).is_ok(),
        AskedFor::MetricsPage => false,
    }
}

/// Whether the body begins as LiveKit begins its refusals, on the way to a session and in its room
/// service (Twirp).
pub fn is_livekits(body: &[u8]) -> bool {
    /// Texts of `pkg/service` and `pkg/rtc` that reach a client.
    const BEGINNINGS: [&str; 24] = [
        "invalid token",
        "invalid API key",
        "invalid authorization",
        "permissions denied",
        "no permissions to access the room",
        "requested room",
        "participant does not exist",
        "identity cannot be empty",
        "participant sid cannot be empty",
        "participant identity length exceeds",
        "room name length exceeds",
        "name length exceeds",
        "metadata size exceeds",
        "attribute size exceeds",
        "no room name",
        "join_request is required",
        "join request too large",
        "cannot base64 decode",
        "cannot unmarshal",
        "cannot decode attributes",
        "cannot read decompressed",
        "connection closed by media",
        "node has exceeded its configured limit",
        "could not start session",
    ];
    let body = body.trim_ascii_start();
    BEGINNINGS
        .iter()
        .any(|words| body.starts_with(words.as_bytes()))
        || twirp(body).is_some()
}

/// A refusal of a Twirp service.
#[derive(serde::Deserialize)]
struct TwirpErrorBody {
    code: String,
    msg: String,
}

/// Reads a refusal of a Twirp service. Its codes are those of the protocol's specification.
fn twirp(body: &[u8]) -> Option<TwirpErrorBody> {
    const CODES: [&str; 18] = [
        "canceled",
        "unknown",
        "invalid_argument",
        "malformed",
        "deadline_exceeded",
        "not_found",
        "bad_route",
        "already_exists",
        "permission_denied",
        "unauthenticated",
        "resource_exhausted",
        "failed_precondition",
        "aborted",
        "out_of_range",
        "unimplemented",
        "internal",
        "unavailable",
        "dataloss",
    ];
    let error: TwirpErrorBody = serde_json::from_slice(body).ok()?;
    CODES.contains(&error.code.as_str()).then_some(error)
}

fn is_json(body: &[u8]) -> bool {
    matches!(body.trim_ascii_start().first(), Some(b'{' | b'['))
}

/// Returns what to do about a refusal in LiveKit's words that are about neither token nor key;
/// `None` for other words.
pub(super) fn advice_on(text: &str) -> Option<&'static str> {
    const KNOWN: [(&str, &str); 9] = [
        (
            "requested room does not exist",
            "the server makes no room by itself (room.auto_create): create the room before, or give an API key, with which throng creates it",
        ),
        (
            "participant identity length exceeds limits",
            "write a shorter --identity-prefix (or have tokens for shorter identities), or raise limit.max_participant_identity_length at the server",
        ),
        (
            "room name length exceeds limits",
            "write a shorter --room, or raise limit.max_room_name_length at the server",
        ),
        (
            "connection closed by media",
            "the server let it in and ended it at once, as it does where room.max_participants is reached: its log says why",
        ),
        (
            "node has exceeded its configured limit",
            "its limit, not ours (limit.* in the server's configuration)",
        ),
        (
            "no room name",
            "the token names no room: have one made that does",
        ),
        (
            "identity cannot be empty",
            "the token names no identity (sub): have one made that does",
        ),
        (
            "join request",
            "does something in front of the server change or cut the request?",
        ),
        (
            "join_request",
            "does something in front of the server take the query (?join_request=) away?",
        ),
    ];
    let known = KNOWN.iter().find(|(words, _)| text.contains(words));
    known.map(|(_, advice)| *advice)
}

/// Returns the answer's text for people: a page's title, Twirp's code and message, or the body.
fn said(answer: &HttpAnswer<'_>, secret: Option<&Secret>) -> String {
    let text = match twirp(answer.body) {
        Some(error) => format!("{}: {}", error.code, error.msg),
        None => {
            let body = String::from_utf8_lossy(answer.body).into_owned();
            title(&body).unwrap_or(body)
        }
    };
    let text = stranger_text(&text, secret);
    let reason = StatusCode::from_u16(answer.status)
        .ok()
        .and_then(|status| status.canonical_reason());
    match reason {
        _ if !text.is_empty() => text,
        Some(reason) => reason.to_owned(),
        None => "no text".to_owned(),
    }
}

fn title(page: &str) -> Option<String> {
    let lower = page.to_ascii_lowercase();
    let from = lower.find("<title>")? + "<title>".len();
    let len = lower.get(from..)?.find("</title>")?;
    page.get(from..from + len).map(str::to_owned)
}

/// Prepares a stranger's text for a message: short, on one line, and without the secret.
pub(crate) fn stranger_text(text: &str, secret: Option<&Secret>) -> String {
    let whole = secret.map_or_else(|| text.to_owned(), |secret| secret.redact(text));
    shortened(&whole, TEXT_CHARS_MAX)
}

fn shortened(text: &str, chars: usize) -> String {
    let line = words::one_line(text);
    let line = line.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(chars) {
        Some((end, _)) => format!("{}...", line.get(..end).unwrap_or_default()),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(
        what: AskedFor,
        status: u16,
        headers: &[(&'static str, &'static str)],
        body: &str,
    ) -> AnswerFault {
        let headers: HeaderMap = headers
            .iter()
            .map(|(name, value)| {
                (
                    header::HeaderName::from_static(name),
                    header::HeaderValue::from_static(value),
                )
            })
            .collect();
        let answer = HttpAnswer {
            status,
            headers: &headers,
            body: body.as_bytes(),
        };
        let secret = Secret::new("eyToken");
        AnswerFault::of(
            &answer,
            &AskedAt {
                what,
                url: "http://sfu.example.com/live/rtc?access_token=eyToken",
                path: "/rtc",
                secret: Some(&secret),
            },
        )
    }

    fn text(status: u16, headers: &[(&'static str, &'static str)], body: &str) -> String {
        fault(AskedFor::Signalling, status, headers, body).to_string()
    }

    const PAGE: &str = "<html><head><title>Sign in</title></head></html>";

    #[test]
    fn redirects_name_what_to_write() {
        for status in [301, 302, 303, 307, 308] {
            let to = "https://sfu.example.com/live/rtc?access_token=eyToken";
            let said = text(status, &[("location", to)], PAGE);
            assert!(
                said.contains(&status.to_string())
                    && said.contains("to https://sfu.example.com/live/rtc:")
                    && said.ends_with("write --url wss://sfu.example.com/live")
                    && !said.contains("eyToken"),
                "{said}"
            );
        }
        let said = text(302, &[("location", "/login?next=/rtc")], "");
        assert!(
            said.contains(
                "to http://sfu.example.com/login: that is no address of a LiveKit server"
            ) && said.contains("--header"),
            "{said}"
        );
        let said = text(301, &[("location", "/live/rtc/")], "");
        assert!(said.contains("the same address"), "{said}");
        assert!(matches!(
            fault(AskedFor::Signalling, 301, &[], ""),
            AnswerFault::Own { status: 301, .. }
        ));
    }

    #[test]
    fn limits_are_told_with_their_time() {
        let limited = fault(
            AskedFor::Signalling,
            429,
            &[("retry-after", "2")],
            "slow down",
        );
        assert_eq!(limited.limit(), Some(Some(Duration::from_secs(2))));
        assert!(
            limited.to_string().contains("come back in 2 s"),
            "{limited}"
        );
        assert_eq!(
            fault(AskedFor::RoomService, 429, &[], "").limit(),
            Some(None)
        );
        let date = [("retry-after", "Sun, 06 Nov 1994 08:49:37 GMT")];
        assert_eq!(
            fault(AskedFor::RoomService, 503, &date, "").limit(),
            Some(Some(Duration::ZERO))
        );
        // A time to come back without a rate limit is maintenance.
        let closed = text(503, &[("retry-after", "100")], PAGE);
        assert!(
            closed.contains("come back in 100 s")
                && closed.contains("maintenance")
                && !closed.contains("join more slowly"),
            "{closed}"
        );
        assert_eq!(fault(AskedFor::Signalling, 503, &[], "full").limit(), None);
    }

    #[test]
    fn a_gateways_refusal_is_not_the_servers() {
        let basic = [("www-authenticate", "Basic realm=\"staff\"")];
        for (status, headers, body) in [
            (401, &basic[..], "401 Unauthorized\n"),
            (401, &[("content-type", "text/html")][..], PAGE),
            (401, &[][..], ""),
            (403, &[("server", "nginx/1.22.1")][..], "Forbidden"),
            (403, &[][..], "Forbidden"),
            (407, &[][..], "Proxy Authentication Required"),
        ] {
            let fault = fault(AskedFor::Signalling, status, headers, body);
            assert!(
                matches!(fault, AnswerFault::Gateway { .. }),
                "{status} {headers:?} {body}: {fault:?}"
            );
            assert!(fault.to_string().contains("--header NAME:VALUE"), "{fault}");
        }
        assert!(text(401, &basic, "").contains("it wants Basic realm"));
        // LiveKit behind nginx, which puts its name on everything.
        let nginx = [("server", "nginx/1.22.1")];
        for (status, body) in [
            (401, "invalid token: eyToken, error: expired"),
            (401, "permissions denied"),
            (401, "no permissions to access the room"),
            (401, "invalid API key: devkey"),
            (401, "invalid authorization header. Must start with Bearer "),
            (
                401,
                "{\"code\":\"unauthenticated\",\"msg\":\"permissions denied\"}",
            ),
            (403, "{\"code\":\"permission_denied\",\"msg\":\"no\"}"),
        ] {
            let fault = fault(AskedFor::RoomService, status, &nginx, body);
            assert!(matches!(fault, AnswerFault::Own { .. }), "{fault:?}");
            assert!(!fault.to_string().contains("eyToken"), "{fault}");
        }
    }

    #[test]
    fn words_belong_to_who_says_them_and_to_what_was_asked() {
        let json = "{\"error\":\"ip not allowed\"}";
        for what in [AskedFor::Signalling, AskedFor::RoomService] {
            for status in [401, 403] {
                let fault = fault(what, status, &[], json);
                assert!(matches!(fault, AnswerFault::Gateway { .. }), "{fault:?}");
                assert!(
                    fault.to_string().contains(&format!("({status}: {json})")),
                    "{fault}"
                );
            }
            // A gateway's code is none of Twirp's.
            let fault = fault(what, 401, &[], "{\"code\":\"forbidden\",\"msg\":\"no\"}");
            assert!(matches!(fault, AnswerFault::Gateway { .. }), "{fault:?}");
        }
        for (what, body, is_known) in [
            (AskedFor::Coordinator, json, true),
            (AskedFor::Coordinator, "invalid authorization token", false),
            (AskedFor::RoomService, "invalid authorization token", true),
            (AskedFor::Signalling, "something new", false),
        ] {
            let found = fault(what, 401, &[], body);
            assert_eq!(
                matches!(found, AnswerFault::Own { is_known, .. } if is_known),
                is_known,
                "{what:?} {body}: {found:?}"
            );
        }
    }

    #[test]
    fn a_proxys_limit_is_no_backend_that_is_away() {
        let page = "<html><head><title>503 Service Temporarily Unavailable</title></head></html>";
        for (server, body) in [
            ("nginx/1.22.1", page),
            ("openresty", page),
            ("nginx", ""),
            ("cloudflare", page),
        ] {
            let fault = fault(AskedFor::Signalling, 503, &[("server", server)], body);
            assert!(
                matches!(fault, AnswerFault::Unavailable { .. }) && fault.limit().is_none(),
                "{server}: {fault:?}"
            );
            assert!(
                fault.to_string().contains("limit") && !fault.to_string().contains("is the server"),
                "{fault}"
            );
        }
        for server in ["Apache/2.4.62 (Debian)", "awselb/2.0"] {
            let fault = fault(AskedFor::Signalling, 503, &[("server", server)], page);
            assert!(
                matches!(fault, AnswerFault::BackendAway { .. }),
                "{fault:?}"
            );
        }
    }

    #[test]
    fn a_proxy_without_its_backend_says_so_and_the_servers_own_failure_stays_its_own() {
        for (status, headers, body) in [
            (
                502,
                &[("server", "nginx")][..],
                "<html><title>502 Bad Gateway</title></html>",
            ),
            (502, &[][..], "Bad Gateway"),
            (504, &[][..], ""),
            (503, &[("server", "Caddy")][..], ""),
            (503, &[("server", "envoy")][..], "no healthy upstream"),
            (503, &[][..], "no available server"),
            (521, &[("server", "cloudflare")][..], PAGE),
        ] {
            let fault = fault(AskedFor::Signalling, status, headers, body);
            assert!(
                matches!(fault, AnswerFault::BackendAway { .. }),
                "{status} {headers:?} {body}: {fault:?}"
            );
        }
        for (status, body) in [
            (503, "could not start session"),
            (500, "internal error"),
            (
                503,
                "{\"code\":\"unavailable\",\"msg\":\"no response from servers\"}",
            ),
        ] {
            let fault = fault(AskedFor::Signalling, status, &[("server", "nginx")], body);
            assert!(
                matches!(fault, AnswerFault::Own { .. }),
                "{body}: {fault:?}"
            );
        }
    }

    #[test]
    fn a_page_is_nobodys() {
        for status in [200, 404, 405, 500] {
            let said = text(status, &[("server", "nginx")], &format!("\n  {PAGE}"));
            assert!(
                said.contains("nginx at http://sfu.example.com/live answers /rtc with a web page")
                    && said.contains("Sign in"),
                "{said}"
            );
        }
        assert_eq!(
            text(404, &[], "404 page not found\n"),
            "404: 404 page not found"
        );
    }

    #[test]
    fn tls_and_client_certificates_are_told_by_their_page() {
        let plain = "<html><title>400 The plain HTTP request was sent to HTTPS port</title></html>";
        assert!(text(400, &[("server", "nginx")], plain).ends_with("use wss:// or https://"));
        let client = "<html><title>400 No required SSL certificate was sent</title></html>";
        assert!(text(400, &[("server", "nginx")], client).contains("wants a client certificate"));
    }

    #[test]
    fn words_of_strangers_stay_on_their_line() {
        let said = text(500, &[], "\x1b[2J\r\nRESULT: PASS\n\x1b[1m");
        assert_eq!(said, "500: [2J RESULT: PASS [1m");
        let long = text(500, &[], &"x".repeat(2_000));
        assert!(long.len() < 400, "{long}");
    }
}
