//! Why a session, or an attempt at one, ended before the run, and what the participant does about
//! it.

use std::time::Duration;

use livekit_protocol::leave_request::Action;

use crate::seeded::scatter;
use crate::signal::access::NoToken;
use crate::signal::answer::AnswerFault;
use crate::signal::client::{Leave, ProtocolFault, SignalError};
use crate::signal::link::{LinkFault, LinkStage};

/// Pause between attempts: this times the square of their number, as in `livekit-client`, but at
/// most `RETRY_PAUSE_MAX`.
const RETRY_PAUSE: Duration = Duration::from_millis(300);
/// Longest pause between attempts. Up to a third is added, so that not all come at once.
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(7);

#[derive(Debug)]
pub(super) struct SessionFailure {
    pub(super) reason: String,
    pub(super) cure: Cure,
    /// The server's own name for the reason, where the server ended the session.
    pub(super) server_reason: Option<&'static str>,
    /// Whether neither the server nor the load is the cause, but an address, a proxy, a certificate
    /// or a token.
    pub(super) kept_out: bool,
    /// Set for a rate limit; the inner value is the pause that it names, if any.
    pub(super) limit: Option<Option<Duration>>,
}

/// Reaction of a participant that was in the room to a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cure {
    /// Nothing: the server wants it gone, or another attempt would fail in the same way.
    None,
    /// Resume the session, because as far as is known only signalling is lost. With `restart_ice`
    /// the server has also lost track of the media connections.
    Resume { restart_ice: bool },
    /// Join anew under the same identity.
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

    /// Makes a failure that another attempt would meet again.
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

/// Whether the way to the server, or what we send, is why nobody gets in.
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
        | SignalError::Http { .. }
        | SignalError::Protocol(ProtocolFault::NotLiveKit(_)) => true,
        _ => false,
    }
}

/// Returns the pause before attempt number `tries`. Attempt 0 has none.
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
