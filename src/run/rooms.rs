//! The rooms of a run. Missing rooms are made before the run, and rooms that are ours alone are
//! deleted after it.
//!
//! A room is ours if the answer to our own CreateRoom says that it was made then. The list of rooms
//! cannot tell, because it can be seconds behind and names are not unique. In doubt a room stays,
//! and closes by itself when it is empty.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Result, anyhow};
use livekit_protocol as proto;
use tracing::warn;

use super::interrupts::Interrupts;
use crate::codec::Codec;
use crate::measure::Kind;
use crate::plan::{ConnectionMode, Plan};
use crate::signal::probe::{self, ServedPath};
use crate::signal::rooms::{RoomError, RoomService};
use crate::signal::{ApiKey, Endpoint};
use crate::words;

/// If throng dies before deleting a room that nobody joined, the server closes it after this time.
const ROOM_EMPTY_TIMEOUT: Duration = Duration::from_secs(300);

/// The rooms of this run, and which of them it made.
pub(crate) struct Rooms {
    service: RoomService,
    made: Vec<MadeRoom>,
    pub(super) notes: Vec<String>,
}

/// A room that this run made, or may have made.
struct MadeRoom {
    name: String,
    /// The server's id of the room. `None` if the server has not answered, or if another host of
    /// this run made it.
    sid: Option<String>,
}

/// Error returned when some rooms were made and the next one was not.
#[derive(Debug, thiserror::Error)]
#[error("{made} of {wanted} rooms were made, and the next one was not: {why}. {}", fate(*.made, .left_behind))]
pub(crate) struct RoomsNotMade {
    made: usize,
    wanted: u32,
    why: RoomError,
    left_behind: Vec<String>,
}

fn fate(made: usize, left_behind: &[String]) -> String {
    if left_behind.is_empty() {
        format!("The {made} were deleted again")
    } else {
        left_behind.join("; ")
    }
}

/// How the rooms of a run are made. A run that cannot use the service still starts.
enum Making {
    Done,
    /// The service is hidden, for example behind a proxy that lets only signalling through.
    WithoutService(RoomError),
}

impl Rooms {
    /// Makes the rooms that do not exist yet: all of them or, on an error or a signal, none. If the
    /// service is hidden, it makes none, and joining makes them.
    pub(crate) async fn create(
        plan: &Plan,
        endpoint: &Endpoint,
        api_key: &ApiKey,
        interrupts: &mut Interrupts,
    ) -> Result<Rooms> {
        let service = RoomService::new(endpoint.clone(), api_key.clone());
        let mut rooms = Rooms {
            service,
            made: Vec::new(),
            notes: Vec::new(),
        };
        let done = tokio::select! {
            done = rooms.make(plan) => done,
            signal = interrupts.next() => Err(anyhow!("{signal} before the first join")),
        };
        match done {
            Ok(Making::Done) => {}
            Ok(Making::WithoutService(why)) => rooms.notes.push(format!(
                "the room service cannot be used ({why}): rooms are made by joining, and close by themselves when they are empty"
            )),
            Err(error) => {
                let made = rooms.made.iter().filter(|room| room.sid.is_some()).count();
                let left_behind = rooms.delete(plan).await;
                return Err(match error.downcast::<RoomError>() {
                    Ok(why) if made > 0 => RoomsNotMade {
                        made,
                        wanted: plan.scenario.rooms.count,
                        why,
                        left_behind,
                    }
                    .into(),
                    // A failed deletion adds nothing to the first error.
                    Ok(why) => why.into(),
                    Err(error) => error,
                });
            }
        }
        let held_back = rooms.service.held_back();
        if held_back > 0 {
            rooms.notes.push(format!(
                "the room service was asked again {} because of a limit of the server's (429)",
                if held_back == 1 {
                    "once".to_owned()
                } else {
                    format!("{held_back} times")
                }
            ));
        }
        Ok(rooms)
    }

    /// Rooms that another host of this run made, for deletion here.
    pub(crate) fn left_by(endpoint: Endpoint, api_key: ApiKey, made: Vec<String>) -> Rooms {
        let made = made.into_iter().map(|name| MadeRoom { name, sid: None });
        Rooms {
            service: RoomService::new(endpoint, api_key),
            made: made.collect(),
            notes: Vec::new(),
        }
    }

    /// Names of the rooms to delete.
    pub(crate) fn made(&self) -> Vec<String> {
        self.made.iter().map(|room| room.name.clone()).collect()
    }

    pub(crate) fn notes(&self) -> &[String] {
        &self.notes
    }

    async fn make(&mut self, plan: &Plan) -> Result<Making> {
        let wanted: Vec<String> = (0..plan.scenario.rooms.count)
            .map(|room| plan.room_name(room))
            .collect();
        let asked_at = unix_now();
        let (existing, told_at) = match self.list(&wanted).await {
            Ok(told) => told,
            Err(why) => return self.without_service(plan, why).await,
        };
        let (ours, others): (Vec<_>, Vec<_>) = existing
            .iter()
            .partition(|room| wanted.contains(&room.name));
        if !others.is_empty() {
            self.notes.push(format!(
                "the server carries {} that {} not ours: its figures are not of this load alone",
                plural(others.len(), "room"),
                are(others.len())
            ));
        }
        for room in ours {
            // The number of participants in it is not known here, because the server's list of
            // rooms is some seconds behind.
            self.note_foreign(plan, &room.name);
        }
        // Use the server's clock if it tells the time.
        let before = told_at.unwrap_or(asked_at);
        for name in wanted
            .into_iter()
            .filter(|name| existing.iter().all(|room| room.name != *name))
        {
            if let Err(why) = self.make_one(plan, name, before).await {
                return self.without_service(plan, why).await;
            }
        }
        Ok(Making::Done)
    }

    /// Returns the rooms of the server, or only ours if it has too many to list. Without a list,
    /// CreateRoom's answers alone say which rooms are ours.
    async fn list(
        &mut self,
        wanted: &[String],
    ) -> Result<(Vec<proto::Room>, Option<Duration>), RoomError> {
        let why = match self.service.list_rooms_at(&[]).await {
            Err(why) if why.is_too_long() => {
                self.notes.push(format!(
                    "the server carries so many rooms that their list is not read ({why}): its figures are not of this load alone"
                ));
                match self.service.list_rooms_at(wanted).await {
                    Ok(told) => return Ok(told),
                    Err(why) => why,
                }
            }
            Err(why @ (RoomError::NotGranted { .. } | RoomError::Other { status: 500.., .. })) => {
                why
            }
            done => return done,
        };
        self.notes.push(format!(
            "the server's rooms cannot be listed ({why}): whether it carries others is not known"
        ));
        Ok((Vec::new(), None))
    }

    /// Decides whether the run goes on without the service, because joining makes rooms, too.
    async fn without_service(&mut self, plan: &Plan, why: RoomError) -> Result<Making> {
        if !why.is_of_service_alone() {
            return Err(why.into());
        }
        match probe::has_signalling(self.service.endpoint()).await {
            ServedPath::There => Ok(Making::WithoutService(why)),
            // The server may be slow in everything.
            ServedPath::Unknown(_) | ServedPath::Unasked(_) if why.is_slow() => {
                Ok(Making::WithoutService(why))
            }
            // What lets only the WebSocket itself through hides this path as well.
            _ if self.lets_in(plan).await => Ok(Making::WithoutService(why)),
            // If there is no signalling either, this is not a server that hides its room service.
            _ => Err(why.into()),
        }
    }

    /// Whether a participant can join the first room.
    async fn lets_in(&self, plan: &Plan) -> bool {
        let (room, identity) = (plan.room_name(0), plan.identity("probe"));
        let token = probe::visitor_token(self.service.api_key(), &room, &identity);
        let Some(token) = token else { return false };
        let single = plan.connection == ConnectionMode::Single;
        probe::lets_in(self.service.endpoint(), &token, single).await
    }

    async fn make_one(
        &mut self,
        plan: &Plan,
        name: String,
        before: Duration,
    ) -> Result<(), RoomError> {
        // Note the room before the call, because an abandoned call may have made it. A room with a
        // name that the user chose may belong to somebody else, though.
        let is_unique = plan.scenario.rooms.name.is_none();
        if is_unique {
            self.made.push(MadeRoom {
                name: name.clone(),
                sid: None,
            });
        }
        let room = match self.service.create_room(&name, ROOM_EMPTY_TIMEOUT).await {
            Ok(room) => room,
            Err(why) => {
                if why.is_refusal() {
                    self.made.retain(|made| made.name != name);
                }
                return Err(why);
            }
        };
        self.note_codecs(plan, &room);
        self.note_seats(plan, &room);
        if is_unique {
            if let Some(made) = self.made.last_mut() {
                made.sid = Some(room.sid).filter(|sid| !sid.is_empty());
            }
        } else if is_just_made(&room, before) {
            self.made.push(MadeRoom {
                name,
                sid: Some(room.sid).filter(|sid| !sid.is_empty()),
            });
        } else {
            self.note_foreign(plan, &name);
        }
        Ok(())
    }

    /// Notes that the room takes fewer participants than the plan has for it.
    fn note_seats(&mut self, plan: &Plan, room: &proto::Room) {
        let planned = plan.scenario.participants();
        if room.max_participants == 0 || planned <= room.max_participants.into() {
            return;
        }
        let note = format!(
            "the server's rooms take {} each, and this run has {planned} for a room: the others will be refused (room.max_participants in the server's configuration)",
            plural(room.max_participants as usize, "participant")
        );
        // All rooms of a server have the same number of places.
        if !self.notes.contains(&note) {
            warn!("{note}");
            self.notes.push(note);
        }
    }

    /// Notes codecs that the plan sends and the room does not accept: their tracks will be refused.
    fn note_codecs(&mut self, plan: &Plan, room: &proto::Room) {
        if room.enabled_codecs.is_empty() {
            return;
        }
        let takes = |codec: Codec| {
            let mut enabled = room.enabled_codecs.iter();
            enabled.any(|enabled| enabled.mime.eq_ignore_ascii_case(codec.mime()))
        };
        let refused: Vec<&str> = [(Kind::Audio, Codec::Opus), (Kind::Video, Codec::Vp8)]
            .into_iter()
            .filter(|(kind, codec)| plan.total_published_tracks(*kind) > 0 && !takes(*codec))
            .map(|(_, codec)| codec.mime())
            .collect();
        if refused.is_empty() {
            return;
        }
        let enabled = room.enabled_codecs.iter();
        let enabled: Vec<String> = enabled.map(|codec| words::one_line(&codec.mime)).collect();
        let note = format!(
            "the server's rooms do not take {}, which this run sends: they take {} (room.enabled_codecs in the server's configuration)",
            refused.join(" nor "),
            enabled.join(", ")
        );
        // All rooms of a server accept the same codecs.
        if !self.notes.contains(&note) {
            warn!("{note}");
            self.notes.push(note);
        }
    }

    fn note_foreign(&mut self, plan: &Plan, name: &str) {
        let others = if plan.is_audience() {
            "what others send in it is judged"
        } else {
            "whoever else is in it is not ours and not judged"
        };
        self.notes
            .push(format!("room '{name}' existed already and stays: {others}"));
    }

    /// Deletes the rooms that we made, and returns a note for each that stays. A room that is gone
    /// already is not noted.
    pub(crate) async fn delete(&self, plan: &Plan) -> Vec<String> {
        let mut notes = Vec::new();
        for (done, room) in self.made.iter().enumerate() {
            let name = &room.name;
            match self.delete_one(plan, room).await {
                Ok(RoomFate::Deleted) => {}
                Ok(RoomFate::InUse(others)) => notes.push(format!(
                    "room '{name}' stays: {} who {is} not ours {is} in it",
                    plural(others, "participant"),
                    is = are(others)
                )),
                Ok(RoomFate::Another) => notes.push(format!(
                    "room '{name}' stays: it is not the one that this run made, somebody has made it anew"
                )),
                Err(error) if error.is_not_found() => {}
                Err(error) if error.is_without_server() => {
                    // Each further room would wait for the same fault.
                    let left = plural(self.made.len() - done, "room");
                    notes.push(format!("{left} of ours may be left behind: {error}"));
                    break;
                }
                Err(error) => {
                    notes.push(format!("room '{name}' of ours may be left behind: {error}"))
                }
            }
        }
        notes
    }

    async fn delete_one(&self, plan: &Plan, room: &MadeRoom) -> Result<RoomFate, RoomError> {
        let inside = self.service.list_participants(&room.name).await?;
        let others = inside
            .iter()
            .filter(|participant| !plan.is_ours(&participant.identity))
            .count();
        if others > 0 {
            return Ok(RoomFate::InUse(others));
        }
        if let Some(sid) = &room.sid {
            // A room that the list does not contain yet, or any more, is not another room.
            let listed = self.service.list_rooms_named(&room.name).await?;
            let is_other = |listed: &proto::Room| listed.name == room.name && listed.sid != *sid;
            if listed.iter().any(is_other) {
                return Ok(RoomFate::Another);
            }
        }
        self.service.delete_room(&room.name).await?;
        Ok(RoomFate::Deleted)
    }
}

enum RoomFate {
    Deleted,
    /// Number of other participants in it.
    InUse(usize),
    /// A room of this name that is not ours.
    Another,
}

/// Returns whether CreateRoom made this room. A room that is older than `before`, a moment before
/// it was asked for, or that has participants, existed already. Both times have whole seconds. A
/// room without a creation time counts as made now.
fn is_just_made(room: &proto::Room, before: Duration) -> bool {
    let made_at = u64::try_from(room.creation_time).unwrap_or(0);
    room.num_participants == 0 && (made_at == 0 || made_at >= before.as_secs())
}

fn unix_now() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

const fn are(count: usize) -> &'static str {
    if count == 1 { "is" } else { "are" }
}

fn plural(count: usize, noun: &str) -> String {
    if count == 1 {
        format!("1 {noun}")
    } else {
        format!("{count} {noun}s")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_room_that_is_older_than_our_request_or_has_people_in_it_is_not_ours() {
        let room = |creation_time, num_participants| proto::Room {
            creation_time,
            num_participants,
            ..Default::default()
        };
        let before = Duration::from_millis(1_000_900);
        for (room, ours) in [
            (room(1_000, 0), true),
            (room(1_004, 0), true),
            (room(0, 0), true),
            (room(997, 0), false),
            (room(1_001, 2), false),
        ] {
            assert_eq!(is_just_made(&room, before), ours, "{room:?}");
        }
    }
}
