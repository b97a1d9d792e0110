//! How participants come by their room tokens: signed here with an API key, or by somebody
//! elsewhere who has one.

use std::error::Error;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::given::Seats;
use super::token::{ApiKey, Permissions, TOKEN_LIFETIME};
use crate::plan::ParticipantPlan;
use crate::secrets::Secret;

/// What lets the participants of a run in.
#[derive(Clone)]
pub enum JoinAccess {
    Key(ApiKey),
    /// Tokens that the user gave, one for each participant.
    Given(Arc<Seats>),
    Issued(TokenIssuer),
}

/// Somebody elsewhere who makes tokens, one for each time that a participant joins or comes back:
/// they are short-lived.
#[derive(Clone)]
pub struct TokenIssuer(mpsc::UnboundedSender<TokenRequest>);

/// A participant wants in.
#[derive(Debug)]
pub struct TokenRequest {
    /// [`ParticipantPlan::position`].
    pub position: u32,
    /// Why there is none, for people.
    pub answer: oneshot::Sender<Result<Secret, NotIssued>>,
}

/// Why somebody elsewhere made no token.
#[derive(Debug, thiserror::Error)]
pub enum NotIssued {
    #[error("whoever issues them is gone")]
    IssuerGone,
    /// In the issuer's words.
    #[error("{0}")]
    Refused(Box<dyn Error + Send + Sync>),
}

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum NoToken {
    /// It would be the same again.
    #[error("{0}")]
    Unsigned(#[from] super::token::TokenError),
    #[error("no room token: {0}")]
    NotIssued(NotIssued),
    #[error("there is no token for participant {0}")]
    NotGiven(u32),
}

impl TokenIssuer {
    /// Whoever holds the other end answers requests, in any order.
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
    /// A token with which `participant` joins `room`. Whoever issues it elsewhere gives it the
    /// permissions that the plan asks for.
    ///
    /// # Errors
    /// Why there is none.
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

    pub fn key(&self) -> Option<&ApiKey> {
        match self {
            JoinAccess::Key(key) => Some(key),
            JoinAccess::Given(_) | JoinAccess::Issued(_) => None,
        }
    }

    /// Who a participant is and which room it joins, where its token says so.
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
