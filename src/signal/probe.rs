//! Asks once before a run what a server can do.

use std::time::Duration;

use super::answer::{AnswerFault, AskedAt, AskedFor, HttpAnswer};
use super::client::{Join, JoinMode, JoinOptions, SignalError, SignalEvent};
use super::dial::{DialDeadline, Dialled};
use super::token::Permissions;
use super::{ApiKey, Endpoint, Secret};

/// Longest wait for an answer.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Largest answer that is read. No answer to a probe is longer.
const BODY_BYTES_MAX: usize = 1 << 20;
const TOKEN_LIFETIME: Duration = Duration::from_secs(60);
/// First LiveKit version whose single connection is reliable when tracks come and go.
const SINGLE_CONNECTION_SINCE: [u32; 3] = [1, 13, 2];
const FIRST_LIVEKIT: [u32; 3] = [1, 0, 0];

/// Result of asking a server for a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServedPath {
    There,
    /// The server does not know the path.
    Missing,
    /// The answer does not tell. The text is what it said, for people.
    Unknown(String),
    /// There was no answer, or something else gave it. What follows will meet the same, and say so.
    Unasked(&'static str),
}

/// Returns whether the server has `/rtc/v1`, one connection for everything.
///
/// It asks without a token: a server that has the path refuses, and one that does not answers 404.
pub async fn has_single_connection(endpoint: &Endpoint) -> ServedPath {
    has(endpoint, "/rtc/v1/validate").await
}

/// Returns whether participants can join at the server at all. It also asks without a token.
pub async fn has_signalling(endpoint: &Endpoint) -> ServedPath {
    has(endpoint, "/rtc/validate").await
}

pub(super) async fn has(endpoint: &Endpoint, path: &str) -> ServedPath {
    let fetcher = endpoint.fetcher(TIMEOUT);
    let url = endpoint.http_url(path);
    let mut headers = http::HeaderMap::new();
    // Only a token can fail to be written, and there is none.
    let _ = endpoint.gateway.add_to(&mut headers, None);
    let request = fetcher.request(reqwest::Method::GET, &url).headers(headers);
    let answer = match fetcher.send(request, BODY_BYTES_MAX).await {
        Ok(answer) => answer,
        Err(_) => return ServedPath::Unasked("it did not answer"),
    };
    let asked = AskedAt {
        what: AskedFor::Signalling,
        url: &url,
        path,
        secret: None,
    };
    let fault = AnswerFault::of(
        &HttpAnswer {
            status: answer.status,
            headers: &answer.headers,
            body: &answer.body,
        },
        &asked,
    );
    match fault {
        AnswerFault::Own { status: 404, .. } | AnswerFault::WebPage { status: 404, .. } => {
            ServedPath::Missing
        }
        AnswerFault::Own {
            status: 200..300 | 400 | 401 | 403,
            ..
        } => ServedPath::There,
        AnswerFault::Own { .. } | AnswerFault::WebPage { .. } => {
            ServedPath::Unknown(fault.to_string())
        }
        _ => ServedPath::Unasked("something in front of it answered"),
    }
}

/// Whether a participant with this token can join. It joins, and leaves at once.
pub async fn lets_in(endpoint: &Endpoint, token: &Secret, single: bool) -> bool {
    let connection = if single {
        JoinMode::SINGLE
    } else {
        JoinMode::Dual
    };
    visit(endpoint, token, connection).await.is_some()
}

/// Makes a token to join `room` for the time that [`server_version`] takes, hidden from the others
/// in the room.
pub fn visitor_token(api_key: &ApiKey, room: &str, identity: &str) -> Option<Secret> {
    let permissions = Permissions {
        publish: false,
        subscribe: false,
        publish_data: false,
        hidden: true,
    };
    api_key
        .join_token(room, identity, identity, permissions, TOKEN_LIFETIME)
        .ok()
}

/// Joins with this token, leaves at once, and returns the server's version; `None` where the server
/// does not tell.
pub async fn server_version(endpoint: &Endpoint, token: &Secret) -> Option<String> {
    let join = visit(endpoint, token, JoinMode::SINGLE).await?;
    Some(join.server_version).filter(|version| !version.is_empty())
}

/// Joins with this token, leaves at once, and returns what the server said.
async fn visit(endpoint: &Endpoint, token: &Secret, connection: JoinMode) -> Option<Box<Join>> {
    let options = JoinOptions {
        auto_subscribe: false,
        connection,
        timeout: TIMEOUT,
        ..JoinOptions::default()
    };
    let asking = async {
        let dialled = Dialled::dial(endpoint, DialDeadline::after(TIMEOUT)).await?;
        let (mut sender, mut receiver, _) = dialled.join(token, &options).await?;
        let join = match receiver.next().await? {
            SignalEvent::Join(join) => Some(join),
            _ => None,
        };
        // If the Leave does not get through, the server still sees the connection end.
        let _ = sender.leave().await;
        Ok::<_, SignalError>(join)
    };
    tokio::time::timeout(TIMEOUT, asking).await.ok()?.ok()?
}

/// Whether a LiveKit of this version has a single connection that is not reliable. Versions of
/// other servers say nothing about that.
pub fn is_unsolid(version: &str) -> bool {
    let mut numbers = version
        .trim_start_matches('v')
        .split(['.', '-', '+'])
        .map_while(|part| part.parse::<u32>().ok());
    let version = [numbers.next(), numbers.next(), numbers.next()].map(Option::unwrap_or_default);
    (FIRST_LIVEKIT..SINGLE_CONNECTION_SINCE).contains(&version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_before_1_13_2_are_not_trusted_with_a_single_connection() {
        for (version, unsolid) in [
            ("1.13.5", false),
            ("1.13.2", false),
            ("v1.13.2-rc1", false),
            ("1.13.1", true),
            ("1.13", true),
            ("1.9.12", true),
            ("2.0.0", false),
            // Not LiveKit's version: the embedded SFU has throng's own.
            ("0.1.0", false),
            ("unknown", false),
            ("", false),
        ] {
            assert_eq!(is_unsolid(version), unsolid, "{version}");
        }
    }
}
