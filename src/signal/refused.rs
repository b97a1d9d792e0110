//! Why a server does not take a token, and what whoever has it can do.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::access::TokenOrigin;
use super::gateway::UnsendableToken;
use super::given::Validity;
use crate::words;

/// A token that does not let a participant in. No message repeats it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RefusedToken {
    /// The server's own refusal.
    ByServer(TokenRefusal),
    Unsendable(UnsendableToken),
}

/// A server's refusal of a token, in its words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRefusal {
    pub status: u16,
    pub text: String,
    pub origin: TokenOrigin,
    /// What the token says about its own time.
    pub validity: Validity,
    /// This host's time of the refusal.
    pub now: Duration,
}

impl fmt::Display for RefusedToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RefusedToken::ByServer(refusal) => write!(
                f,
                "the server refused the token ({}: {}): {}",
                refusal.status,
                refusal.text,
                refusal.advice()
            ),
            RefusedToken::Unsendable(why) => write!(f, "{why}"),
        }
    }
}

impl std::error::Error for RefusedToken {}

impl From<UnsendableToken> for RefusedToken {
    fn from(why: UnsendableToken) -> RefusedToken {
        RefusedToken::Unsendable(why)
    }
}

impl TokenRefusal {
    fn advice(&self) -> String {
        match Objection::of(&self.text) {
            Objection::Expired => self.expired(),
            Objection::Early => self.early(),
            objection => advice_on_token(objection, self.origin).to_owned(),
        }
    }

    fn expired(&self) -> String {
        let Some(expires) = self.validity.expires else {
            return advice_on_token(Objection::Expired, self.origin).to_owned();
        };
        match self.now.checked_sub(expires) {
            Some(ago) => format!(
                "it expired {} ago, so {}",
                words::duration(whole_seconds(ago)),
                match self.origin {
                    TokenOrigin::Signed | TokenOrigin::Issued => "the run has outlived its tokens",
                    TokenOrigin::Given => "have a new one made, which outlives the run",
                }
            ),
            None => "by this host's clock it has not expired: set both clocks".to_owned(),
        }
    }

    fn early(&self) -> String {
        let from = self.validity.not_before.unwrap_or_default();
        match from.checked_sub(self.now) {
            Some(left) if !left.is_zero() => format!(
                "it is valid in {} only, by this host's clock: wait, or have another one made",
                words::duration(whole_seconds(left))
            ),
            _ => "by this host's clock it is valid already: set both clocks".to_owned(),
        }
    }
}

pub(super) fn whole_seconds(time: Duration) -> Duration {
    Duration::from_secs(time.as_secs().max(1))
}

/// Returns the time since 1970 by this host's clock.
pub(super) fn unix_now() -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default()
}

/// What a server finds wrong with a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Objection {
    Expired,
    Early,
    UnknownKey,
    Signature,
    Other,
}

impl Objection {
    fn of(text: &str) -> Objection {
        const WORDS: [(&str, Objection); 6] = [
            ("expired", Objection::Expired),
            ("not valid yet", Objection::Early),
            ("immature", Objection::Early),
            ("nbf", Objection::Early),
            ("invalid api key", Objection::UnknownKey),
            ("signature", Objection::Signature),
        ];
        let text = text.to_lowercase();
        let found = WORDS.iter().find(|(words, _)| text.contains(words));
        found.map_or(Objection::Other, |(_, objection)| *objection)
    }
}

fn advice_on_token(objection: Objection, origin: TokenOrigin) -> &'static str {
    match (objection, origin) {
        (Objection::Expired | Objection::Early, _) => "set both clocks",
        (Objection::UnknownKey, TokenOrigin::Signed) => {
            "the server has no such key: check the API key, and that this is its server"
        }
        (Objection::Signature, TokenOrigin::Signed) => {
            "the secret is not that of this key: check API key and secret"
        }
        (Objection::Other, TokenOrigin::Signed) => "check API key and secret, and both clocks",
        (Objection::UnknownKey, TokenOrigin::Given) => {
            "it was made with a key that this server does not have: have one made with a key of this server, or check --url"
        }
        (Objection::Signature, TokenOrigin::Given) => {
            "it was signed with another secret than this server's: have one made with the secret of this server, or check --url"
        }
        (Objection::Other, TokenOrigin::Given) => {
            "have one made for this server, and copy it whole"
        }
        (_, TokenOrigin::Issued) => {
            "the coordinator made it: check API key and secret, and the clock, where it runs"
        }
    }
}

/// Returns what to do about a refusal of a token that was just signed with the user's API key.
pub(super) fn advice_on_key(text: &str) -> &'static str {
    advice_on_token(Objection::of(text), TokenOrigin::Signed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_is_for_who_has_the_token_and_for_what_is_wrong_with_it() {
        let now = Duration::from_secs(1_700_000_000);
        let hour = Duration::from_secs(3_600);
        let expired = "invalid token: ***, error: token has invalid claims: token is expired";
        let early = "invalid token: ***, error: token has invalid claims: token is not valid yet";
        let forged = "invalid token: ***, error: token signature is invalid";
        let foreign = "invalid API key: APIother";
        let until = |expires| Validity {
            expires: Some(expires),
            not_before: None,
        };
        let from = |not_before| Validity {
            expires: None,
            not_before: Some(not_before),
        };
        let given = TokenOrigin::Given;
        let signed = TokenOrigin::Signed;
        for (text, origin, validity, says) in [
            (
                expired,
                given,
                until(now - hour),
                "it expired 1h ago, so have a new one made",
            ),
            (expired, signed, until(now - hour), "outlived its tokens"),
            (expired, given, until(now + hour), "set both clocks"),
            (expired, given, Validity::default(), "set both clocks"),
            (early, given, from(now + hour), "it is valid in 1h only"),
            (early, signed, from(now - hour), "set both clocks"),
            (
                foreign,
                given,
                until(now + hour),
                "a key that this server does not have",
            ),
            (foreign, signed, until(now + hour), "check the API key"),
            (forged, given, until(now + hour), "with another secret"),
            (
                forged,
                signed,
                until(now + hour),
                "check API key and secret",
            ),
            (
                "new words",
                given,
                until(now + hour),
                "have one made for this server",
            ),
        ] {
            let refusal = RefusedToken::ByServer(TokenRefusal {
                status: 401,
                text: text.to_owned(),
                origin,
                validity,
                now,
            });
            let said = refusal.to_string();
            assert!(said.contains(says), "{text} {origin:?}: {said}");
            assert!(said.contains(&format!("(401: {text})")), "{said}");
            let blames_key = said.contains("API key and secret");
            assert!(!(blames_key && origin == given), "{said}");
        }
    }
}
