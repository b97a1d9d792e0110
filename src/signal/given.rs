//! Tokens that the user gives, one for each participant, in place of an API key.

use std::collections::HashSet;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::refused::{unix_now, whole_seconds};
use crate::plan::{ParticipantPlan, Plan};
use crate::secrets::Secret;
use crate::words;

/// Longest token that is accepted: longer than any that a server takes in a request line.
const TOKEN_BYTES_MAX: usize = 8 << 10;

/// Difference of two clocks that servers overlook when they check a token's time.
const CLOCKS_APART_MAX: Duration = Duration::from_secs(60);

/// What a token says about its own time, since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Validity {
    pub expires: Option<Duration>,
    pub not_before: Option<Duration>,
}

impl Validity {
    /// Reads it from a token. What is no token says nothing.
    pub(super) fn of(token: &Secret) -> Validity {
        let claims = claims_of(token.expose());
        claims.map_or_else(|_| Validity::default(), |claims| claims.validity())
    }

    /// # Errors
    /// Returns why no server takes the token now, whatever its clock says within reason.
    fn must_hold(self, now: Duration) -> Result<(), UnusableToken> {
        let ago = |expires| now.checked_sub(expires);
        if let Some(ago) = self.expires.and_then(ago)
            && ago > CLOCKS_APART_MAX
        {
            return Err(UnusableToken::Expired { ago });
        }
        let left = |from: Duration| from.checked_sub(now);
        match self.not_before.and_then(left) {
            Some(left) if left > CLOCKS_APART_MAX => Err(UnusableToken::Early { left }),
            _ => Ok(()),
        }
    }
}

#[derive(serde::Deserialize)]
struct GivenClaims {
    #[serde(default)]
    sub: String,
    #[serde(default)]
    video: GivenGrants,
    #[serde(default)]
    exp: Option<f64>,
    #[serde(default)]
    nbf: Option<f64>,
}

#[derive(Default, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct GivenGrants {
    room_join: bool,
    room: String,
    can_publish: Option<bool>,
    can_subscribe: Option<bool>,
}

impl GivenClaims {
    fn validity(&self) -> Validity {
        // A time that is none (negative, or beyond all clocks) says nothing.
        let time = |seconds: f64| Duration::try_from_secs_f64(seconds).ok();
        Validity {
            expires: self.exp.and_then(time),
            not_before: self.nbf.and_then(time),
        }
    }
}

fn claims_of(text: &str) -> Result<GivenClaims, UnusableToken> {
    let parts: Vec<&str> = text.split('.').collect();
    let [_, claims, _] = parts[..] else {
        return Err(UnusableToken::NoJwt);
    };
    if text.len() > TOKEN_BYTES_MAX {
        return Err(UnusableToken::NoJwt);
    }
    let claims = URL_SAFE_NO_PAD
        .decode(claims.trim_end_matches('='))
        .map_err(|_| UnusableToken::NoJwt)?;
    // Parse into a map first, because a struct could also be read from an array.
    serde_json::from_slice::<serde_json::Map<_, _>>(&claims)
        .and_then(|claims| serde_json::from_value(claims.into()))
        .map_err(|_| UnusableToken::Unreadable)
}

/// A token, and what it says about its participant.
#[derive(Clone, Debug)]
pub struct GivenToken {
    pub secret: Secret,
    pub identity: String,
    pub room: String,
    pub can_publish: bool,
    pub can_subscribe: bool,
}

/// Why a text cannot be used as a token. No message repeats the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnusableToken {
    #[error("is no LiveKit token: those are three parts with points between them")]
    NoJwt,
    #[error("says nothing that can be read")]
    Unreadable,
    #[error("names no identity (sub): such a token is for the server API, not for joining")]
    WithoutIdentity,
    #[error("names no room to join (video.roomJoin and video.room)")]
    WithoutRoom,
    #[error("expired {} ago (exp): have a new one made, or set this host's clock", words::duration(whole_seconds(*.ago)))]
    Expired { ago: Duration },
    #[error("is valid in {} only (nbf): wait, have another one made, or set this host's clock", words::duration(whole_seconds(*.left)))]
    Early { left: Duration },
}

impl GivenToken {
    /// Reads a token's claims. Only the server can check its signature.
    ///
    /// # Errors
    /// Returns why no participant can join with the token.
    pub fn read(text: &str) -> Result<GivenToken, UnusableToken> {
        GivenToken::read_at(text, unix_now())
    }

    fn read_at(text: &str, now: Duration) -> Result<GivenToken, UnusableToken> {
        let claims = claims_of(text)?;
        let validity = claims.validity();
        let GivenClaims { sub, video, .. } = claims;
        if sub.is_empty() {
            return Err(UnusableToken::WithoutIdentity);
        }
        if !video.room_join || video.room.is_empty() {
            return Err(UnusableToken::WithoutRoom);
        }
        validity.must_hold(now)?;
        Ok(GivenToken {
            secret: Secret::new(text),
            identity: sub,
            room: video.room,
            // LiveKit allows what a token does not mention.
            can_publish: video.can_publish.unwrap_or(true),
            can_subscribe: video.can_subscribe.unwrap_or(true),
        })
    }
}

/// The tokens of a run's participants, by position.
#[derive(Clone, Debug)]
pub struct Seats(Vec<GivenToken>);

/// Why the tokens do not fit a plan, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SeatsMisfit {
    #[error(
        "the run has {participants} participants, and {tokens} of them have a token: give --token once for each (or @FILE with one a line), or ask for fewer with --publishers, --video-publishers and --subscribers"
    )]
    TooFew { tokens: usize, participants: usize },
    #[error(
        "the tokens are for {tokens} rooms, and the run is for {plan}: each room takes tokens of its own, so make --room-count their number"
    )]
    Rooms { tokens: usize, plan: usize },
    #[error(
        "room '{room}' lacks a token that may {what}: each publisher wants one with canPublish, and each subscriber one with canSubscribe"
    )]
    Grant { room: String, what: &'static str },
    #[error(
        "two tokens are for '{identity}' in room '{room}': a server keeps only one of them in, so each participant wants an identity of its own"
    )]
    Twice { identity: String, room: String },
}

impl Seats {
    /// Gives each participant of the plan a token with the grants it needs. The rooms of the plan
    /// become those of the tokens, in their order.
    ///
    /// # Errors
    /// Returns an error if there are too few tokens, or none with the grants that a participant
    /// needs.
    pub fn assign(given: Vec<GivenToken>, plan: &Plan) -> Result<Seats, SeatsMisfit> {
        let participants = plan.total_participants() as usize;
        if given.len() < participants {
            return Err(SeatsMisfit::TooFew {
                tokens: given.len(),
                participants,
            });
        }
        let mut rooms: Vec<String> = Vec::new();
        let mut known = HashSet::new();
        for token in &given {
            if !known.insert((token.room.clone(), token.identity.clone())) {
                return Err(SeatsMisfit::Twice {
                    identity: token.identity.clone(),
                    room: token.room.clone(),
                });
            }
            if !rooms.contains(&token.room) {
                rooms.push(token.room.clone());
            }
        }
        if rooms.len() != plan.scenario.rooms.count as usize {
            return Err(SeatsMisfit::Rooms {
                tokens: rooms.len(),
                plan: plan.scenario.rooms.count as usize,
            });
        }
        let mut left: Vec<Option<GivenToken>> = given.into_iter().map(Some).collect();
        let mut seats: Vec<Option<GivenToken>> = vec![None; participants];
        // Publishers choose first, because subscribers can do with fewer grants.
        let mut people: Vec<ParticipantPlan> = (0..participants as u32)
            .map(|position| plan.participant(position))
            .collect();
        people.sort_by_key(|who| !publishes(who));
        for who in people {
            let room = &rooms[who.room as usize];
            let seat = take(&mut left, room, &who).ok_or_else(|| SeatsMisfit::Grant {
                room: room.clone(),
                what: if publishes(&who) {
                    "publish"
                } else {
                    "subscribe"
                },
            })?;
            seats[who.position as usize] = Some(seat);
        }
        Ok(Seats(seats.into_iter().flatten().collect()))
    }

    pub fn of(&self, position: u32) -> Option<&GivenToken> {
        self.0.get(position as usize)
    }

    /// Returns the room of the participant who joins first; with a single room, that room.
    pub fn first_room(&self) -> Option<&str> {
        self.0.first().map(|token| token.room.as_str())
    }
}

const fn publishes(who: &ParticipantPlan) -> bool {
    who.publishes_audio || who.publishes_video
}

/// Takes the first sufficient token, and among those one with the fewest unneeded grants.
fn take(left: &mut [Option<GivenToken>], room: &str, who: &ParticipantPlan) -> Option<GivenToken> {
    let fits = |token: &&mut Option<GivenToken>| {
        token.as_ref().is_some_and(|token| {
            token.room == room
                && (token.can_publish || !publishes(who))
                && (token.can_subscribe || !who.subscribes)
        })
    };
    let excess = |token: &&mut Option<GivenToken>| {
        token.as_ref().map_or(0, |token| {
            u8::from(token.can_publish && !publishes(who))
                + u8::from(token.can_subscribe && !who.subscribes)
        })
    };
    left.iter_mut().filter(fits).min_by_key(excess)?.take()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::scenario::RoomPeople;
    use crate::plan::tests::{plan, set_people};
    use crate::signal::{ApiKey, Permissions};
    use std::time::Duration;

    fn token(room: &str, identity: &str, permissions: Permissions) -> GivenToken {
        let key = ApiKey::new("devkey", "a-secret-of-thirty-two-characters");
        let secret = key
            .join_token(
                room,
                identity,
                identity,
                permissions,
                Duration::from_secs(60),
            )
            .unwrap();
        GivenToken::read(secret.expose()).unwrap()
    }

    fn small() -> Plan {
        let mut plan = plan();
        let people = RoomPeople {
            audio_publishers: 1,
            video_publishers: 0,
            subscribers: 2,
            meeting: false,
        };
        set_people(&mut plan, 1, people);
        plan
    }

    #[test]
    fn a_token_says_who_and_where_and_what_is_none_is_told_without_repeating_it() {
        let read = token("hall", "ann", Permissions::SUBSCRIBER);
        assert_eq!(
            (read.identity.as_str(), read.room.as_str()),
            ("ann", "hall")
        );
        assert!(!read.can_publish && read.can_subscribe);
        let service = ApiKey::new("devkey", "a-secret-of-thirty-two-characters")
            .service_token(Some("hall"))
            .unwrap();
        for (text, why) in [
            ("devkey", UnusableToken::NoJwt),
            ("a.b!.c", UnusableToken::NoJwt),
            ("a.e30.c", UnusableToken::WithoutIdentity),
            ("a.W10.c", UnusableToken::Unreadable),
            (service.expose(), UnusableToken::WithoutIdentity),
        ] {
            assert_eq!(GivenToken::read(text).unwrap_err(), why, "{text}");
        }
    }

    #[test]
    fn a_token_whose_time_has_passed_or_not_come_is_told_before_it_is_used() {
        let token = token("hall", "ann", Permissions::BOTH).secret;
        let at = |now| GivenToken::read_at(token.expose(), now).map(drop);
        let (now, minute) = (unix_now(), Duration::from_secs(60));
        assert_eq!(at(now), Ok(()));
        // It is valid for a minute, and servers overlook another one.
        assert_eq!(at(now + minute * 2 - Duration::from_secs(5)), Ok(()));
        assert!(matches!(
            at(now + minute * 61),
            Err(UnusableToken::Expired { .. })
        ));
        let early = at(now - minute * 5).unwrap_err().to_string();
        assert!(early.starts_with("is valid in "), "{early}");
        let far = Validity {
            expires: Some(now - minute * 60),
            not_before: None,
        };
        let expired = far.must_hold(now).unwrap_err().to_string();
        assert!(expired.contains("expired 1h ago"), "{expired}");
    }

    #[test]
    fn everybody_gets_a_token_that_is_enough_and_what_does_not_fit_is_named() {
        let subscribers = ["b", "c"].map(|who| token("hall", who, Permissions::SUBSCRIBER));
        let publisher = token("hall", "a", Permissions::BOTH);
        let given = [subscribers.to_vec(), vec![publisher.clone()]].concat();
        let seats = Seats::assign(given.clone(), &small()).unwrap();
        let names: Vec<&str> = (0..3)
            .map(|position| seats.of(position).unwrap().identity.as_str())
            .collect();
        assert_eq!(names, ["a", "b", "c"]);
        let misfit = |given: Vec<GivenToken>| Seats::assign(given, &small()).unwrap_err();
        assert_eq!(
            misfit(subscribers.to_vec()),
            SeatsMisfit::TooFew {
                tokens: 2,
                participants: 3
            }
        );
        let elsewhere = token("cellar", "d", Permissions::BOTH);
        assert!(matches!(
            misfit([given.clone(), vec![elsewhere]].concat()),
            SeatsMisfit::Rooms { tokens: 2, plan: 1 }
        ));
        let third = token("hall", "d", Permissions::SUBSCRIBER);
        assert!(matches!(
            misfit([subscribers.to_vec(), vec![third]].concat()),
            SeatsMisfit::Grant {
                what: "publish",
                ..
            }
        ));
        assert!(matches!(
            misfit([given, vec![publisher]].concat()),
            SeatsMisfit::Twice { .. }
        ));
    }
}
