//! Access control: a request is admitted if it has the token in `Authorization: Bearer ..`. The
//! token is compared in constant time.
//!
//! A coordinator without a token admits everybody except the pages of other sites in a browser,
//! because such a page could send whatever its user's host or network can send. A browser names the
//! page's site in `Origin`. It does not if the page has pointed its own name at this host (DNS
//! rebinding), but then `Host` is a name that is not ours.

use std::net::IpAddr;

use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, header};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ring::hmac;
use serde::{Deserialize, Serialize};

use crate::secrets::Secrets;
use crate::signal::Secret;

/// Shortest token that a user may give. Shorter ones can be guessed over the network.
pub const TOKEN_BYTES_MIN: usize = 16;
const TOKEN_BYTES_MAX: usize = 256;
/// Number of random bytes in a token that is made here.
const TOKEN_RANDOM_BYTES: usize = 24;
const SALT_BYTES: usize = 16;

/// Salted hash that recognises a token without revealing it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seal {
    salt: String,
    /// HMAC-SHA-256 of the token, with the salt as its key.
    tag: String,
}

impl std::fmt::Debug for Seal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Seal(..)")
    }
}

/// Reason why a request is not admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    NoToken,
    WrongToken,
    /// The page of another site made the request.
    ForeignPage,
    /// The `Host` is a name that is not ours.
    ForeignName,
}

impl Denied {
    pub const fn text(self) -> &'static str {
        match self {
            Denied::NoToken => {
                "this coordinator wants a token: set COORDINATOR_TOKEN or --coordinator-token to the one that it printed (or start it with --no-auth)"
            }
            Denied::WrongToken => {
                "the token is not this coordinator's: copy the one that it printed"
            }
            Denied::ForeignPage => {
                "a page of another site may not ask this coordinator, which lets everybody in (--no-auth)"
            }
            Denied::ForeignName => {
                "this coordinator lets everybody in (--no-auth), so it answers to its addresses, to localhost and to names without a dot: use its address, or start it with --coordinator-host NAME"
            }
        }
    }

    /// Returns whether the right token would get the request admitted.
    pub const fn wants_token(self) -> bool {
        matches!(self, Denied::NoToken | Denied::WrongToken)
    }
}

/// Admits requests with the token, or all requests.
pub struct CoordinatorAccess {
    key: Option<(hmac::Key, Vec<u8>)>,
    /// Our own names that anybody could point here (names with a dot). Used only without a key.
    names: Vec<String>,
}

impl CoordinatorAccess {
    pub const fn open(names: Vec<String>) -> CoordinatorAccess {
        CoordinatorAccess { key: None, names }
    }

    /// Returns `None` if the seal was not made by this program.
    pub fn sealed(seal: &Seal) -> Option<CoordinatorAccess> {
        let (salt, tag) = (
            STANDARD.decode(&seal.salt).ok()?,
            STANDARD.decode(&seal.tag).ok()?,
        );
        let key = hmac::Key::new(hmac::HMAC_SHA256, &salt);
        (salt.len() == SALT_BYTES).then_some(CoordinatorAccess {
            key: Some((key, tag)),
            names: Vec::new(),
        })
    }

    pub fn is_open(&self) -> bool {
        self.key.is_none()
    }

    pub fn admits(&self, headers: &HeaderMap) -> Result<(), Denied> {
        let Some((key, tag)) = &self.key else {
            return self.admits_no_page(headers);
        };
        let given = headers
            .get(header::AUTHORIZATION)
            .ok_or(Denied::NoToken)?
            .as_bytes();
        let (scheme, token) = given
            .split_at_checked("Bearer ".len())
            .ok_or(Denied::NoToken)?;
        if !scheme.eq_ignore_ascii_case(b"Bearer ") {
            return Err(Denied::NoToken);
        }
        hmac::verify(key, token, tag).map_err(|_| Denied::WrongToken)
    }

    /// Checks a request of an open coordinator. A client that is not a browser sends no `Origin`
    /// and normally uses an address as `Host`.
    fn admits_no_page(&self, headers: &HeaderMap) -> Result<(), Denied> {
        let text = |name: HeaderName| headers.get(name).map(|value| value.to_str());
        let host = match text(header::HOST) {
            None => None,
            Some(host) => Some(host.ok().and_then(authority).ok_or(Denied::ForeignName)?),
        };
        if host.as_ref().is_some_and(|host| !self.is_ours(host.host())) {
            return Err(Denied::ForeignName);
        }
        let Some(origin) = text(header::ORIGIN) else {
            return Ok(());
        };
        let origin = origin.ok().and_then(|origin| origin.split_once("://"));
        let origin = origin.and_then(|(_, rest)| authority(rest));
        let is_own = |origin: &Authority| {
            let is_named = self.names.iter().any(|name| is_name(origin.host(), name));
            is_named || host.as_ref().is_some_and(|host| host == origin)
        };
        (origin.as_ref().is_some_and(is_own))
            .then_some(())
            .ok_or(Denied::ForeignPage)
    }

    /// Returns whether `host` is an address or one of our names. Anybody can point a name with a
    /// dot here, so it must be listed in `names`. A name without a dot is resolved within a
    /// network, and `localhost` with its subdomains within the host (RFC 6761, section 6.3).
    fn is_ours(&self, host: &str) -> bool {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let host = host.strip_suffix('.').unwrap_or(host);
        let last = host.rsplit('.').next().unwrap_or_default();
        bare.parse::<IpAddr>().is_ok()
            || (!host.is_empty() && !host.contains('.'))
            || last.eq_ignore_ascii_case("localhost")
            || self.names.iter().any(|name| is_name(host, name))
    }

    /// Returns whether this is the token.
    pub fn knows(&self, token: &Secret) -> bool {
        let verified = |(key, tag): &(hmac::Key, Vec<u8>)| {
            hmac::verify(key, token.expose().as_bytes(), tag).is_ok()
        };
        self.key.as_ref().is_some_and(verified)
    }
}

/// Compares two names without regard to case and to a final dot.
fn is_name(host: &str, name: &str) -> bool {
    let bare = |name: &str| name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    bare(host) == bare(name)
}

fn authority(text: &str) -> Option<Authority> {
    let authority: Authority = text.parse().ok()?;
    // HTTP headers never have a user name in front of the host.
    (!text.contains('@')).then_some(authority)
}

/// Seals a token with a fresh salt.
pub fn seal(token: &Secret) -> Seal {
    let salt: [u8; SALT_BYTES] = Secrets::system().bytes();
    let tag = hmac::sign(
        &hmac::Key::new(hmac::HMAC_SHA256, &salt),
        token.expose().as_bytes(),
    );
    Seal {
        salt: STANDARD.encode(salt),
        tag: STANDARD.encode(tag),
    }
}

/// Makes a random token that nobody can guess.
pub fn fresh_token() -> Secret {
    Secret::new(URL_SAFE_NO_PAD.encode(Secrets::system().bytes::<TOKEN_RANDOM_BYTES>()))
}

/// Error returned for a text that cannot be a coordinator's token. The text is not repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a coordinator's token has {least} to {most} characters without spaces: leave it out, and one is made",
    least = TOKEN_BYTES_MIN,
    most = TOKEN_BYTES_MAX
)]
pub struct UnfitToken;

pub fn must_be_usable(token: &str) -> Result<(), UnfitToken> {
    let fits = (TOKEN_BYTES_MIN..=TOKEN_BYTES_MAX).contains(&token.len());
    if fits && token.bytes().all(|b| b.is_ascii_graphic()) {
        return Ok(());
    }
    Err(UnfitToken)
}

/// Random number for ids and lives. Nobody can guess it, and every JSON reader keeps it exactly.
pub fn random_number() -> u64 {
    u64::from_le_bytes(Secrets::system().bytes()) >> 11
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn bearer(text: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, HeaderValue::from_str(text).unwrap())])
    }

    #[test]
    fn only_the_token_is_let_in() {
        let token = fresh_token();
        let access = CoordinatorAccess::sealed(&seal(&token)).unwrap();
        assert_eq!(
            access.admits(&bearer(&format!("Bearer {}", token.expose()))),
            Ok(())
        );
        assert_eq!(
            access.admits(&bearer(&format!("bearer {}", token.expose()))),
            Ok(())
        );
        assert!(access.knows(&token) && !access.knows(&fresh_token()));
        assert_eq!(access.admits(&HeaderMap::new()), Err(Denied::NoToken));
        for (text, denied) in [
            (format!("Bearer {}x", token.expose()), Denied::WrongToken),
            (
                format!("Bearer {}", &token.expose()[1..]),
                Denied::WrongToken,
            ),
            ("Bearer ".to_owned(), Denied::WrongToken),
            (format!("Basic {}", token.expose()), Denied::NoToken),
            (token.expose().to_owned(), Denied::NoToken),
            ("B".to_owned(), Denied::NoToken),
        ] {
            assert_eq!(access.admits(&bearer(&text)), Err(denied), "{denied:?}");
        }
    }

    fn page(host: &str, origin: Option<&str>) -> HeaderMap {
        let origin = origin.map(|origin| (header::ORIGIN, origin));
        let headers = [(header::HOST, host)].into_iter().chain(origin);
        headers
            .map(|(name, value)| (name, HeaderValue::from_str(value).unwrap()))
            .collect()
    }

    #[test]
    fn where_everybody_is_let_in_the_page_of_another_site_is_not() {
        let access = CoordinatorAccess::open(vec!["load.example".to_owned()]);
        assert_eq!(access.admits(&HeaderMap::new()), Ok(()));
        for (host, origin) in [
            ("127.0.0.1:8787", None),
            ("[::1]:8787", None),
            ("[2001:db8::7]", None),
            ("192.0.2.7", None),
            ("localhost:8787", None),
            ("LOCALHOST.", None),
            ("throng.localhost", None),
            ("coordinator:8787", None),
            ("load.example:8787", None),
            ("Load.Example.", None),
            // The coordinator's own page.
            ("127.0.0.1:8787", Some("http://127.0.0.1:8787")),
            ("[::1]:8787", Some("http://[::1]:8787")),
            ("load.example", Some("https://load.example")),
            // Behind a proxy that sends its own name as `Host`.
            ("10.0.0.7:8787", Some("https://load.example")),
        ] {
            let admitted = access.admits(&page(host, origin));
            assert_eq!(admitted, Ok(()), "{host} {origin:?}");
        }
        for host in [
            "rebound.example",
            "rebound.example:8787",
            "127.0.0.1.rebound.example",
            "localhost.rebound.example",
            "load.example.rebound.example",
            "127.0.0.1@rebound.example",
            "rebound.example@127.0.0.1",
            "",
            ".",
        ] {
            let admitted = access.admits(&page(host, None));
            assert_eq!(admitted, Err(Denied::ForeignName), "{host}");
        }
        for origin in [
            "https://elsewhere.example",
            "http://127.0.0.1:3000",
            "http://127.0.0.1",
            "null",
            "",
            "http://127.0.0.1:8787@elsewhere.example",
            "http://127.0.0.1:8787.elsewhere.example",
        ] {
            let admitted = access.admits(&page("127.0.0.1:8787", Some(origin)));
            assert_eq!(admitted, Err(Denied::ForeignPage), "{origin}");
        }
    }

    #[test]
    fn a_seal_does_not_tell_its_token_and_no_two_are_alike() {
        let token = Secret::new("sixteen-letters-and-more");
        let (one, other) = (seal(&token), seal(&token));
        assert_ne!(one, other);
        let json = serde_json::to_string(&one).unwrap();
        assert!(!json.contains("sixteen") && !format!("{one:?}").contains(&one.salt));
        let read: Seal = serde_json::from_str(&json).unwrap();
        assert!(CoordinatorAccess::sealed(&read).unwrap().knows(&token));
    }

    #[test]
    fn tokens_that_can_be_guessed_are_refused() {
        assert!(
            must_be_usable("sixteen-letters-and-more").is_ok()
                && must_be_usable(fresh_token().expose()).is_ok()
        );
        for token in [
            "",
            "short",
            "sixteen letters and more",
            "fünfzehn-und-mehr-zeichen",
        ] {
            let why = must_be_usable(token).unwrap_err().to_string();
            assert!(token.is_empty() || !why.contains(token), "{why}");
        }
    }
}
