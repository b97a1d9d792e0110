//! An allocation that a relay gives for less than ten minutes, as coturn does where its
//! `max-allocate-lifetime` is that short.
//!
//! RFC 8656, section 7.2 knows no shorter one, and the library does not take the answer when it
//! renews. So these are renewed here, and the library is told that it has its allocation for good.

use std::time::Duration;

use turn_client_proto::stun::types::attribute::{ErrorCode, Nonce, Realm, Username};
use turn_client_proto::stun::types::message::{
    IntegrityAlgorithm, Message, MessageClass, MessageIntegrityCredentials, MessageWriteVec,
    TransactionId,
};
use turn_client_proto::stun::types::prelude::*;
use turn_client_proto::types::TurnCredentials;
use turn_client_proto::types::attribute::{Lifetime, XorRelayedAddress};
use turn_client_proto::types::message::{ALLOCATE, REFRESH};

use crate::secrets::Secret;
use crate::units::Time;

/// The shortest that the library renews.
const LIBRARY_LIFETIME_MIN: u32 = 600;
/// Longer than any run.
const FOR_GOOD_S: u32 = 10 * 365 * 86_400;
/// What is asked for: the relay gives what it gives.
const WISH_S: u32 = 1_800;
/// A request without an answer is repeated after this.
const REPEAT: Duration = Duration::from_secs(1);
/// So often in a row a relay may call its own nonce stale at once.
const STALE_MAX: u32 = 8;

/// What a relay wants to be answered with, as it said last.
pub(super) struct Challenge {
    realm: String,
    nonce: String,
}

impl Challenge {
    pub(super) fn of(message: &Message<'_>) -> Option<Challenge> {
        if !message.has_class(MessageClass::Error) {
            return None;
        }
        Some(Challenge {
            realm: message.attribute::<Realm>().ok()?.realm().to_owned(),
            nonce: message.attribute::<Nonce>().ok()?.nonce().to_owned(),
        })
    }
}

/// Who has the allocation.
pub(super) struct Lessee {
    pub(super) user: String,
    pub(super) password: Secret,
}

impl Lessee {
    fn key(&self, challenge: &Challenge) -> MessageIntegrityCredentials {
        TurnCredentials::new(&self.user, self.password.expose())
            .into_long_term_credentials(&challenge.realm)
            .into()
    }
}

pub(super) struct ShortLease {
    granted: Duration,
    until: Time,
    due_at: Time,
    /// The request that waits for its answer.
    asked: Option<TransactionId>,
    stale: u32,
}

impl ShortLease {
    /// Where `answer` gives an allocation that is so short: its lease, and the answer as the
    /// library is to have it.
    pub(super) fn begin(
        answer: &Message<'_>,
        lessee: &Lessee,
        challenge: &Challenge,
        now: Time,
    ) -> Option<(ShortLease, Vec<u8>)> {
        if answer.method() != ALLOCATE || !answer.has_class(MessageClass::Success) {
            return None;
        }
        let lifetime = answer.attribute::<Lifetime>().ok()?.seconds();
        if lifetime >= LIBRARY_LIFETIME_MIN {
            return None;
        }
        let key = lessee.key(challenge);
        answer.validate_integrity(&key).ok()?;
        let id = answer.transaction_id();
        let relayed = answer.attribute::<XorRelayedAddress>().ok()?.addr(id);
        let mut told = Message::builder(answer.get_type(), id, MessageWriteVec::new());
        told.add_attribute(&XorRelayedAddress::new(relayed, id))
            .ok()?;
        told.add_attribute(&Lifetime::new(FOR_GOOD_S)).ok()?;
        told.add_message_integrity(&key, IntegrityAlgorithm::Sha1)
            .ok()?;
        let mut lease = ShortLease {
            granted: Duration::ZERO,
            until: now,
            due_at: now,
            asked: None,
            stale: 0,
        };
        lease.grant(lifetime, now);
        Some((lease, told.finish()))
    }

    fn grant(&mut self, lifetime: u32, now: Time) {
        self.granted = Duration::from_secs(lifetime.max(1).into());
        (self.until, self.due_at) = (now + self.granted, now + self.granted / 2);
        (self.asked, self.stale) = (None, 0);
    }

    /// When to look at it again.
    pub(super) fn wake_at(&self) -> Time {
        self.due_at.min(self.until)
    }

    pub(super) fn is_over(&self, now: Time) -> bool {
        now >= self.until
    }

    /// The request to renew it, when it is time for one.
    pub(super) fn ask(
        &mut self,
        lessee: &Lessee,
        challenge: &Challenge,
        now: Time,
    ) -> Option<Vec<u8>> {
        if now < self.due_at {
            return None;
        }
        self.due_at = now + REPEAT.min(self.granted / 4);
        let mut request = Message::builder_request(REFRESH, MessageWriteVec::new());
        self.asked = Some(request.transaction_id());
        request.add_attribute(&Lifetime::new(WISH_S)).ok()?;
        request
            .add_attribute(&Username::new(&lessee.user).ok()?)
            .ok()?;
        request
            .add_attribute(&Realm::new(&challenge.realm).ok()?)
            .ok()?;
        request
            .add_attribute(&Nonce::new(&challenge.nonce).ok()?)
            .ok()?;
        request
            .add_message_integrity(&lessee.key(challenge), IntegrityAlgorithm::Sha1)
            .ok()?;
        Some(request.finish())
    }

    /// Whether `answer` is to its request.
    pub(super) fn hear(
        &mut self,
        answer: &Message<'_>,
        lessee: &Lessee,
        challenge: &Challenge,
        now: Time,
    ) -> bool {
        if self.asked != Some(answer.transaction_id()) {
            return false;
        }
        let code = answer.attribute::<ErrorCode>().map(|code| code.code());
        if code == Ok(ErrorCode::STALE_NONCE) && self.stale < STALE_MAX {
            self.stale += 1;
            self.due_at = now;
        }
        if answer.has_class(MessageClass::Success)
            && let Ok(lifetime) = answer.attribute::<Lifetime>()
            && answer.validate_integrity(&lessee.key(challenge)).is_ok()
        {
            self.grant(lifetime.seconds(), now);
        }
        true
    }
}
