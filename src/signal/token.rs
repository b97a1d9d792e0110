//! LiveKit access tokens: a JWT signed by HS256, with the grants in its `video` claim.
//!
//! A token or a secret is enough to act with it. So both travel as [`Secret`], which never prints
//! its content.

use std::time::Duration;

use livekit_token::{AccessToken, VideoGrants};

use crate::secrets::Secret;

/// Lifetime of a join token. It is longer than any run.
pub const TOKEN_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Lifetime of a token for the room service. Each request carries a new one.
const SERVICE_TOKEN_LIFETIME: Duration = Duration::from_secs(600);

/// A server's API key and the secret that signs tokens for it.
#[derive(Clone, Debug)]
pub struct ApiKey {
    pub key: String,
    pub secret: Secret,
}

/// Rights of a participant in its room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permissions {
    pub publish: bool,
    pub subscribe: bool,
    pub publish_data: bool,
    /// Whether the participant is invisible to the others.
    pub hidden: bool,
}

impl Permissions {
    pub const PUBLISHER: Permissions = Permissions {
        publish: true,
        subscribe: false,
        publish_data: false,
        hidden: false,
    };
    pub const SUBSCRIBER: Permissions = Permissions {
        publish: false,
        subscribe: true,
        publish_data: false,
        hidden: false,
    };
    pub const BOTH: Permissions = Permissions {
        publish: true,
        subscribe: true,
        publish_data: false,
        hidden: false,
    };
}

/// The library refuses to sign: the key, secret, room or identity is empty.
#[derive(Debug, thiserror::Error)]
#[error(
    "no token can be made ({0}): give an API key, its secret, a room and an identity, none of them empty"
)]
pub struct TokenError(String);

impl ApiKey {
    pub fn new(key: impl Into<String>, secret: impl Into<String>) -> ApiKey {
        ApiKey {
            key: key.into(),
            secret: Secret::new(secret),
        }
    }

    /// Makes a token to join `room` as `identity`, valid from now for `lifetime`. `name` is what
    /// others see.
    ///
    /// `lifetime` must cover the whole wait until the join: an open loop of many joins makes tokens
    /// early.
    pub fn join_token(
        &self,
        room: &str,
        identity: &str,
        name: &str,
        permissions: Permissions,
        lifetime: Duration,
    ) -> Result<Secret, TokenError> {
        if room.is_empty() || identity.is_empty() {
            return Err(TokenError("the room or the identity is empty".into()));
        }
        let grants = VideoGrants {
            room_join: true,
            room: room.to_owned(),
            can_publish: Some(permissions.publish),
            can_subscribe: Some(permissions.subscribe),
            can_publish_data: Some(permissions.publish_data),
            hidden: permissions.hidden,
            ..VideoGrants::default()
        };
        self.sign(
            self.token(grants, lifetime)
                .with_identity(identity)
                .with_name(name),
        )
    }

    /// Makes a token to create, list and delete rooms and, if `room` is given, to inspect that
    /// room.
    pub fn service_token(&self, room: Option<&str>) -> Result<Secret, TokenError> {
        let grants = VideoGrants {
            room_create: true,
            room_list: true,
            room_admin: room.is_some(),
            room: room.unwrap_or_default().to_owned(),
            ..VideoGrants::default()
        };
        self.sign(self.token(grants, SERVICE_TOKEN_LIFETIME))
    }

    fn token(&self, grants: VideoGrants, lifetime: Duration) -> AccessToken {
        AccessToken::with_api_key(&self.key, self.secret.expose())
            .with_ttl(lifetime)
            .with_grants(grants)
    }

    fn sign(&self, token: AccessToken) -> Result<Secret, TokenError> {
        token
            .to_jwt()
            .map(Secret::new)
            .map_err(|error| TokenError(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use livekit_token::TokenVerifier;

    fn key() -> ApiKey {
        ApiKey::new("devkey", "a-secret-of-thirty-two-characters")
    }

    #[test]
    fn a_join_token_carries_identity_room_and_grants() {
        let token = key()
            .join_token(
                "hall",
                "p-1",
                "Ann",
                Permissions::SUBSCRIBER,
                Duration::from_secs(60),
            )
            .unwrap();
        let claims = TokenVerifier::with_api_key("devkey", key().secret.expose())
            .verify(token.expose())
            .unwrap();
        assert_eq!(
            (
                claims.iss.as_str(),
                claims.sub.as_str(),
                claims.name.as_str()
            ),
            ("devkey", "p-1", "Ann")
        );
        assert!((59..=61).contains(&(claims.exp - claims.nbf)));
        assert!(claims.video.room_join && claims.video.room == "hall" && !claims.video.hidden);
        assert_eq!(
            (
                claims.video.can_publish,
                claims.video.can_subscribe,
                claims.video.can_publish_data
            ),
            (Some(false), Some(true), Some(false))
        );
    }

    #[test]
    fn a_service_token_administers_a_room_only_when_one_is_named() {
        for (room, admin) in [(None, false), (Some("hall"), true)] {
            let token = key().service_token(room).unwrap();
            let claims = TokenVerifier::with_api_key("devkey", key().secret.expose())
                .verify(token.expose())
                .unwrap();
            assert!(claims.video.room_create && claims.video.room_list && !claims.video.room_join);
            assert_eq!(
                (claims.video.room_admin, claims.video.room.as_str()),
                (admin, room.unwrap_or(""))
            );
        }
    }

    #[test]
    fn what_cannot_be_signed_is_refused_with_advice() {
        for (api_key, room, identity) in [
            (ApiKey::new("", "s"), "r", "i"),
            (ApiKey::new("k", ""), "r", "i"),
            (key(), "", "i"),
            (key(), "r", ""),
        ] {
            let error = api_key
                .join_token(
                    room,
                    identity,
                    "",
                    Permissions::BOTH,
                    Duration::from_secs(1),
                )
                .unwrap_err();
            assert!(error.to_string().contains("give an API key"), "{error}");
        }
    }

    #[test]
    fn secrets_never_print_themselves() {
        let token = key().service_token(None).unwrap();
        let printed = format!("{:?} {token} {token:?} {:#?}", key(), key());
        assert!(
            !printed.contains("thirty-two") && !printed.contains(token.expose()),
            "{printed}"
        );
        let echoed = format!("invalid token: {}, error: x", token.expose());
        assert_eq!(token.redact(&echoed), "invalid token: ***, error: x");
    }
}
