//! What a server can do, asked once before a run.

use std::time::Duration;

use super::answer::{AnswerFault, AskedAt, AskedFor, HttpAnswer};
use super::client::{JoinMode, JoinOptions, SignalError, SignalEvent};
use super::dial::{DialDeadline, Dialled};
use super::token::Permissions;
use super::{ApiKey, Endpoint, Secret};

/// An answer that takes longer is none.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Nothing that a probe asks for has more to say.
const BODY_BYTES_MAX: usize = 1 << 20;
const TOKEN_LIFETIME: Duration = Duration::from_secs(60);
/// The first LiveKit whose single connection holds up when tracks come and go.
const SINGLE_CONNECTION_SINCE: [u32; 3] = [1, 13, 2];
const FIRST_LIVEKIT: [u32; 3] = [1, 0, 0];

/// What a server's answer tells of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServedPath {
    There,
    /// The server has never heard of it.
    Missing,
    /// It is not the server that answered, or nobody did: why, for people.
    Unknown(String),
}

/// Whether the server has `/rtc/v1`, one connection for everything.
///
/// Without a token: a server that has it refuses, one that does not has never heard of it.
pub async fn has_single_connection(endpoint: &Endpoint) -> ServedPath {
    has(endpoint, "/rtc/v1/validate").await
}

/// Whether participants can join at the server at all. Asked without a token, as above.
pub async fn has_signalling(endpoint: &Endpoint) -> ServedPath {
    has(endpoint, "/rtc/validate").await
}

async fn has(endpoint: &Endpoint, path: &str) -> ServedPath {
    let fetcher = endpoint.fetcher(TIMEOUT);
    let url = endpoint.http_url(path);
    let mut headers = http::HeaderMap::new();
    // Without a token there is nothing that cannot be written.
    let _ = endpoint.gateway.add_to(&mut headers, None);
    let request = fetcher.request(reqwest::Method::GET, &url).headers(headers);
    let answer = match fetcher.send(request, BODY_BYTES_MAX).await {
        Ok(answer) => answer,
        Err(fault) => return ServedPath::Unknown(fault.to_string()),
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
        other => ServedPath::Unknown(other.to_string()),
    }
}

/// A token to join `room` for as long as [`server_version`] takes, which nobody there sees.
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

/// The server's version, from a join with this token that is left at once; `None` where it does not
/// tell.
pub async fn server_version(endpoint: &Endpoint, token: &Secret) -> Option<String> {
    let options = JoinOptions {
        auto_subscribe: false,
        connection: JoinMode::SINGLE,
        timeout: TIMEOUT,
        ..JoinOptions::default()
    };
    let asking = async {
        let dialled = Dialled::dial(endpoint, DialDeadline::after(TIMEOUT)).await?;
        let (mut sender, mut receiver, _) = dialled.join(token, &options).await?;
        let version = match receiver.next().await? {
            SignalEvent::Join(join) => {
                Some(join.server_version).filter(|version| !version.is_empty())
            }
            _ => None,
        };
        // Should it not get through: the server sees the connection end.
        let _ = sender.leave().await;
        Ok::<_, SignalError>(version)
    };
    tokio::time::timeout(TIMEOUT, asking).await.ok()?.ok()?
}

/// Whether a LiveKit of this version has a single connection, but not a solid one. Other servers
/// number their versions as they like.
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
            // Not LiveKit's: the embedded SFU has throng's own.
            ("0.1.0", false),
            ("unknown", false),
            ("", false),
        ] {
            assert_eq!(is_unsolid(version), unsolid, "{version}");
        }
    }
}
