//! The kind of server that a run is made against: how rooms are prepared, how participants join,
//! and how rooms are deleted.
//!
//! A run asks a driver only for what every kind of server has: a way in for participants. Whether
//! there is a key, or a service that makes rooms, is private to the driver. Whatever could not be
//! done becomes a note. Another kind of server is another variant of [`Driver`]. Its sessions send
//! [`crate::signal::session::Notice`] and take [`crate::signal::session::Request`].

use anyhow::{Context, Result};

use super::RunSpec;
use super::interrupts::Interrupts;
use super::rooms::Rooms;
use crate::plan::Plan;
use crate::report::Outcome;
use crate::signal::{AddressUse, ApiKey, Endpoint, JoinAccess};
use crate::words;

/// The kind of server of a run.
pub(super) enum Driver {
    LiveKit(LiveKit),
}

/// LiveKit, or the embedded SFU, which speaks the same protocol.
pub(super) struct LiveKit {
    endpoint: Endpoint,
    access: JoinAccess,
    rooms: Option<Rooms>,
    notes: Vec<String>,
}

/// Adds how the server was reached to the outcome: which of its addresses answered, through which
/// proxy, and whether certificates were checked.
pub(super) fn tell_way(endpoint: &Endpoint, run: &RunSpec, outcome: &mut Outcome) {
    let addresses = endpoint.address_uses();
    let notes = &mut outcome.notes;
    if let Ok(Some(proxy)) = endpoint.proxy() {
        notes.push(format!(
            "signalling and the room service went through the proxy {proxy}; media never does"
        ));
    }
    if run.trust.insecure && endpoint.secure() {
        notes.push(
            "certificates were not checked (--insecure): whoever answered in the server's place got the tokens"
                .into(),
        );
    }
    if addresses.len() > 1 {
        let used: Vec<String> = addresses.iter().map(of_address).collect();
        notes.push(format!(
            "{} has {} addresses: {}",
            endpoint.host(),
            addresses.len(),
            used.join(", ")
        ));
    }
    outcome.target.addresses = addresses;
}

fn of_address(used: &AddressUse) -> String {
    let connections = words::count(used.connections.into(), "connection");
    match &used.fault {
        Some(why) => format!("{} was not there ({why}; {connections})", used.address),
        None => format!("{} took {connections}", used.address),
    }
}

impl Driver {
    /// # Errors
    /// Returned if the server's name has no address, or if there are neither tokens nor a key.
    pub(super) async fn open(run: &RunSpec) -> Result<Driver> {
        let key = run
            .credentials
            .as_ref()
            .map(|own| ApiKey::new(&own.api_key, &own.api_secret));
        let access = match &run.tokens {
            Some(tokens) => JoinAccess::Given(tokens.clone().into()),
            None => key
                .context("nothing lets participants in: give --api-key and --api-secret, or LIVEKIT_API_KEY and LIVEKIT_API_SECRET, or a --token for each participant")?
                .into(),
        };
        let endpoint = Endpoint::from(run.plan.target.url.clone())
            .through(&run.gateway)
            .resolve()
            .await?;
        Ok(Driver::LiveKit(LiveKit {
            endpoint,
            access,
            rooms: None,
            notes: Vec::new(),
        }))
    }

    /// Makes the rooms of the plan, if the server has a room service and there is an API key for
    /// it. Otherwise rooms are made by joining.
    ///
    /// # Errors
    /// Returned if the service refuses, or if a signal arrives first.
    pub(super) async fn prepare(&mut self, plan: &Plan, interrupts: &mut Interrupts) -> Result<()> {
        let Driver::LiveKit(livekit) = self;
        let Some(api_key) = livekit.access.key() else {
            livekit.notes.push(
                "without an API key rooms are made by joining: none was made before, and none is deleted afterwards"
                    .into(),
            );
            return Ok(());
        };
        let rooms = Rooms::create(plan, &livekit.endpoint, api_key, interrupts).await?;
        interrupts.set_left_behind(rooms.made());
        livekit.rooms = Some(rooms);
        Ok(())
    }

    /// Returns the endpoint that participants join, and their access to it.
    pub(super) fn way_in(&self) -> (Endpoint, JoinAccess) {
        let Driver::LiveKit(livekit) = self;
        (livekit.endpoint.clone(), livekit.access.clone())
    }

    /// Deletes the rooms that this run made. Returns the earlier notes, and those of the deletion.
    pub(super) async fn tidy_up(self, plan: &Plan) -> (Vec<String>, Vec<String>) {
        let Driver::LiveKit(LiveKit {
            rooms, mut notes, ..
        }) = self;
        let Some(rooms) = rooms else {
            return (notes, Vec::new());
        };
        let left_behind = rooms.delete(plan).await;
        notes.extend(rooms.notes);
        (notes, left_behind)
    }
}
