//! The rooms of a run: made before it where they are missing, deleted after it where they are ours alone.

use std::time::Duration;

use anyhow::{Result, anyhow};

use super::interrupts::Interrupts;
use crate::plan::Plan;
use crate::signal::rooms::{RoomError, RoomService};
use crate::signal::{ApiKey, Endpoint};

/// A room that nobody joined goes away by itself, should we die before deleting it.
const ROOM_EMPTY_TIMEOUT: Duration = Duration::from_secs(300);

/// The rooms of this run, and which of them it made.
pub(crate) struct Rooms {
    service: RoomService,
    made: Vec<String>,
    pub(super) notes: Vec<String>,
}

impl Rooms {
    /// Makes those that are not there yet; all of them or, on an error or a signal, none.
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
        if let Err(error) = done {
            // That failing as well adds nothing to the first error.
            rooms.delete(plan).await;
            return Err(error);
        }
        Ok(rooms)
    }

    /// Those that somebody else of this run made, to be deleted.
    pub(crate) fn left_by(endpoint: Endpoint, api_key: ApiKey, made: Vec<String>) -> Rooms {
        Rooms {
            service: RoomService::new(endpoint, api_key),
            made,
            notes: Vec::new(),
        }
    }

    pub(crate) fn made(&self) -> &[String] {
        &self.made
    }

    pub(crate) fn notes(&self) -> &[String] {
        &self.notes
    }

    async fn make(&mut self, plan: &Plan) -> Result<()> {
        let wanted: Vec<String> = (0..plan.scenario.rooms.count)
            .map(|room| plan.room_name(room))
            .collect();
        let existing = self.service.list_rooms().await?;
        let (ours, others): (Vec<_>, Vec<_>) = existing
            .iter()
            .partition(|room| wanted.contains(&room.name));
        if !others.is_empty() {
            self.notes.push(format!(
                "the server carries {} that are not ours: its figures are not of this load alone",
                plural(others.len(), "room")
            ));
        }
        for room in ours {
            // How many are in it is not known here: the server's list of rooms is some seconds behind.
            self.notes.push(format!(
                "room '{}' existed already and stays: whoever else is in it is not ours and not judged",
                room.name
            ));
        }
        for name in wanted
            .into_iter()
            .filter(|name| existing.iter().all(|room| room.name != *name))
        {
            // Before the call: one that is given up half-way may have made the room.
            self.made.push(name.clone());
            self.service.create_room(&name, ROOM_EMPTY_TIMEOUT).await?;
        }
        Ok(())
    }

    /// Deletes what we made, and says what stays behind. A room that is gone already is nothing to tell.
    pub(crate) async fn delete(&self, plan: &Plan) -> Vec<String> {
        let mut notes = Vec::new();
        for (done, name) in self.made.iter().enumerate() {
            match self.delete_one(plan, name).await {
                Ok(0) => {}
                Ok(others) => notes.push(format!(
                    "room '{name}' stays: {} who are not ours are in it",
                    plural(others, "participant")
                )),
                Err(error) if error.is_not_found() => {}
                Err(error) if error.is_without_server() => {
                    // The others would each wait for the same.
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

    /// Returns how many others kept the room from being deleted.
    async fn delete_one(&self, plan: &Plan, name: &str) -> Result<usize, RoomError> {
        let inside = self.service.list_participants(name).await?;
        let others = inside
            .iter()
            .filter(|participant| !plan.is_ours(&participant.identity))
            .count();
        if others == 0 {
            self.service.delete_room(name).await?;
        }
        Ok(others)
    }
}

fn plural(count: usize, noun: &str) -> String {
    if count == 1 {
        format!("1 {noun}")
    } else {
        format!("{count} {noun}s")
    }
}
