//! Room tokens of participants: signed here with an API key, given by the user, or made by an
//! issuer elsewhere.

use std::error::Error;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::given::Seats;
use super::token::{ApiKey, Permissions, TOKEN_LIFETIME};
use crate::plan::ParticipantPlan;
use crate::secrets::Secret;

/// Source of the tokens that let a run's participants in.
#[derive(Clone)]
pub enum JoinAccess {
    Key(ApiKey),
    /// Tokens that the user gave, one for each participant.
    Given(Arc<Seats>),
    Issued(TokenIssuer),
}

/// Who made a participant's token. What to do about a refused one depends on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TokenOrigin {
    /// This run, with the API key that the user gave.
    #[default]
    Signed,
    /// Whoever gave it with `--token`.
    Given,
    /// The coordinator of the run.
    Issued,
}

/// Issuer of tokens elsewhere. It makes one for each join and each return of a participant, because
/// its tokens are short-lived.
#[derive(Clone)]
pub struct TokenIssuer(mpsc::UnboundedSender<TokenRequest>);

/// Request for one participant's token.
#[derive(Debug)]
pub struct TokenRequest {
    /// [`ParticipantPlan::position`].
    pub position: u32,
    /// Channel for the token, or for the reason why there is none, as text for people.
    pub answer: oneshot::Sender<Result<Secret, NotIssued>>,
}

/// Why the issuer made no token.
#[derive(Debug, thiserror::Error)]
pub enum NotIssued {
    #[error("whoever issues them is gone")]
    IssuerGone,
    /// The issuer refused, in its own words.
    #[error("{0}")]
    Refused(Box<dyn Error + Send + Sync>),
}

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum NoToken {
    /// Another attempt would fail in the same way.
    #[error("{0}")]
    Unsigned(#[from] super::token::TokenError),
    #[error("no room token: {0}")]
    NotIssued(NotIssued),
    #[error("there is no token for participant {0}")]
    NotGiven(u32),
}

impl TokenIssuer {
    /// Makes an issuer and the receiver of its requests, which may be answered in any order.
    pub fn new() -> (TokenIssuer, mpsc::UnboundedReceiver<TokenRequest>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (TokenIssuer(sender), receiver)
    }

    async fn token(&self, position: u32) -> Result<Secret, NotIssued> {
        let (answer, answered) = oneshot::channel();
        self.0
            .send(TokenRequest { position, answer })
            .map_err(|_| NotIssued::IssuerGone)?;
        answered.await.unwrap_or(Err(NotIssued::IssuerGone))
    }
}

impl JoinAccess {
    /// Returns a token with which `participant` joins `room`. An issuer elsewhere grants the
    /// permissions that the plan asks for.
    ///
    /// # Errors
    /// Returns why there is no token.
    pub async fn join_token(
        &self,
        participant: &ParticipantPlan,
        room: &str,
        permissions: Permissions,
    ) -> Result<Secret, NoToken> {
        let identity = &participant.identity;
        match self {
            JoinAccess::Key(key) => {
                Ok(key.join_token(room, identity, identity, permissions, TOKEN_LIFETIME)?)
            }
            JoinAccess::Given(seats) => seats
                .of(participant.position)
                .map(|token| token.secret.clone())
                .ok_or(NoToken::NotGiven(participant.position)),
            JoinAccess::Issued(issuer) => issuer
                .token(participant.position)
                .await
                .map_err(NoToken::NotIssued),
        }
    }

    pub fn origin(&self) -> TokenOrigin {
        match self {
            JoinAccess::Key(_) => TokenOrigin::Signed,
            JoinAccess::Given(_) => TokenOrigin::Given,
            JoinAccess::Issued(_) => TokenOrigin::Issued,
        }
    }

    pub fn key(&self) -> Option<&ApiKey> {
        match self {
            JoinAccess::Key(key) => Some(key),
            JoinAccess::Given(_) | JoinAccess::Issued(_) => None,
        }
    }

    /// Returns the participant's identity and its room, where its token names them.
    pub fn seat(&self, position: u32) -> Option<(&str, &str)> {
        match self {
            JoinAccess::Given(seats) => seats
                .of(position)
                .map(|token| (token.identity.as_str(), token.room.as_str())),
            JoinAccess::Key(_) | JoinAccess::Issued(_) => None,
        }
    }
}

impl From<ApiKey> for JoinAccess {
    fn from(key: ApiKey) -> JoinAccess {
        JoinAccess::Key(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::plan;

    #[tokio::test]
    async fn tokens_come_from_whoever_issues_them_or_not_at_all() {
        let (issuer, mut requests) = TokenIssuer::new();
        let access = JoinAccess::Issued(issuer);
        let participant = plan().participant(5);
        let ask = || access.join_token(&participant, "hall", Permissions::SUBSCRIBER);
        let issue = async {
            for answer in [
                Ok(Secret::new("ey")),
                Err(NotIssued::Refused("the coordinator has no key".into())),
            ] {
                let request = requests.recv().await.unwrap();
                assert_eq!(request.position, 5);
                request.answer.send(answer).unwrap();
            }
            drop(requests.recv().await);
            drop(requests);
        };
        let asking = async {
            assert_eq!(ask().await.unwrap().expose(), "ey");
            assert_eq!(
                ask().await.unwrap_err().to_string(),
                "no room token: the coordinator has no key"
            );
            for _ in 0..2 {
                assert!(ask().await.unwrap_err().to_string().contains("is gone"));
            }
        };
        tokio::join!(issue, asking);
    }
}
