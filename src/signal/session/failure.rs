//! Why a session, or an attempt at one, came to an end before the run did, and what a participant
//! does about it.

use std::time::Duration;

use livekit_protocol::leave_request::Action;

use crate::seeded::scatter;
use crate::signal::access::NoToken;
use crate::signal::answer::AnswerFault;
use crate::signal::client::{Leave, SignalError};
use crate::signal::link::{LinkFault, LinkStage};

/// Between attempts: this times the square of their number, as `livekit-client` waits, ..
const RETRY_PAUSE: Duration = Duration::from_millis(300);
/// .. up to this, and up to a third more, so that not all come at once.
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(7);

#[derive(Debug)]
pub(super) struct SessionFailure {
    pub(super) reason: String,
    pub(super) cure: Cure,
    /// The server's own name for it, where the server ended the session.
    pub(super) server_reason: Option<&'static str>,
    /// It is not the server's doing, and no load's: an address, a proxy, a certificate, a token.
    pub(super) kept_out: bool,
    /// Who answered asks to be left alone, for so long where that is said.
    pub(super) limit: Option<Option<Duration>>,
}

/// What a participant that was in does about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cure {
    /// The server wants it gone, or nothing would be different the next time.
    None,
    /// Only signalling is lost, as far as is known: it goes on where it was. With `restart_ice` the
    /// server has lost sight of the media connections, too.
    Resume { restart_ice: bool },
    /// It joins anew under the same identity.
    Rejoin,
}

impl SessionFailure {
    pub(super) fn of(reason: impl Into<String>, cure: Cure) -> SessionFailure {
        SessionFailure {
            reason: reason.into(),
            cure,
            server_reason: None,
            kept_out: false,
            limit: None,
        }
    }

    /// It would be the same again.
    pub(super) fn lasting(reason: impl Into<String>) -> SessionFailure {
        SessionFailure::of(reason, Cure::None)
    }

    pub(super) fn lost(reason: impl Into<String>) -> SessionFailure {
        SessionFailure::of(reason, Cure::Resume { restart_ice: false })
    }
}

impl From<&Leave> for SessionFailure {
    fn from(leave: &Leave) -> SessionFailure {
        let cure = match leave.action {
            Action::Disconnect => Cure::None,
            Action::Resume => Cure::Resume { restart_ice: true },
            Action::Reconnect => Cure::Rejoin,
        };
        let name = leave.reason.as_str_name();
        let reason = format!("the server ended the session: {}", name.to_lowercase());
        SessionFailure {
            server_reason: Some(name),
            ..SessionFailure::of(reason, cure)
        }
    }
}

impl From<NoToken> for SessionFailure {
    fn from(error: NoToken) -> SessionFailure {
        match error {
            NoToken::Unsigned(_) | NoToken::NotGiven(_) => {
                SessionFailure::lasting(error.to_string())
            }
            NoToken::NotIssued(_) => SessionFailure::lost(error.to_string()),
        }
    }
}

impl From<SignalError> for SessionFailure {
    fn from(error: SignalError) -> SessionFailure {
        let (kept_out, limit) = (is_in_the_way(&error), error.limit());
        let failure = match error {
            SignalError::Unauthorized { .. }
            | SignalError::TokenUnseen { .. }
            | SignalError::NotFound { .. }
            | SignalError::Http { .. }
            | SignalError::Answer(
                AnswerFault::Redirected { .. }
                | AnswerFault::SpeaksTls { .. }
                | AnswerFault::ClientCertificate { .. }
                | AnswerFault::Gateway { .. }
                | AnswerFault::WebPage { .. },
            )
            | SignalError::Link(LinkFault::Tls { .. } | LinkFault::TlsMismatch { .. })
            | SignalError::Trust(_)
            | SignalError::TooLarge { .. }
            | SignalError::Protocol { .. } => SessionFailure::lasting(error.to_string()),
            SignalError::Link(_)
            | SignalError::Answer(_)
            | SignalError::Proxy(_)
            | SignalError::Server { .. }
            | SignalError::NoTokenInTime { .. }
            | SignalError::NotResumed { .. }
            | SignalError::Lost { .. }
            | SignalError::Closed => SessionFailure::lost(error.to_string()),
        };
        SessionFailure {
            kept_out,
            limit,
            ..failure
        }
    }
}

/// Whether something in the way to the server, or what we bring, is why nobody gets in.
fn is_in_the_way(error: &SignalError) -> bool {
    match error {
        SignalError::Link(fault) => !matches!(
            fault,
            LinkFault::HungUp { .. }
                | LinkFault::Slow {
                    stage: LinkStage::Answer | LinkStage::UpgradeAnswer,
                    ..
                }
        ),
        SignalError::Answer(fault) => {
            !matches!(fault, AnswerFault::Limited { .. } | AnswerFault::Own { .. })
        }
        SignalError::Proxy(_)
        | SignalError::Trust(_)
        | SignalError::Unauthorized { .. }
        | SignalError::TokenUnseen { .. }
        | SignalError::NotFound { .. }
        | SignalError::Http { .. } => true,
        _ => false,
    }
}

/// How long to wait before attempt number `tries`: number 0 comes at once.
pub(super) fn retry_pause(tries: u32, seed: u64) -> Duration {
    let pause = RETRY_PAUSE
        .saturating_mul(tries.saturating_mul(tries))
        .min(RETRY_PAUSE_MAX);
    let share = u128::from(scatter(seed ^ u64::from(tries)) >> 32);
    pause + Duration::from_nanos(((pause.as_nanos() / 3 * share) >> 32) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_come_at_once_then_ever_later_and_not_all_together() {
        let floor = [0, 300, 1_200, 2_700, 4_800, 7_000, 7_000];
        for (tries, floor) in floor.into_iter().enumerate() {
            let pauses: Vec<Duration> = (0..50)
                .map(|seed| retry_pause(tries as u32, seed))
                .collect();
            let (from, to) = (
                Duration::from_millis(floor),
                Duration::from_millis(floor * 4 / 3),
            );
            assert!(
                pauses.iter().all(|pause| (from..=to).contains(pause)),
                "{tries}: {pauses:?}"
            );
            assert_eq!(pauses.iter().all(|pause| *pause == pauses[0]), tries == 0);
        }
        assert!(retry_pause(u32::MAX, 7) >= RETRY_PAUSE_MAX);
    }
}
