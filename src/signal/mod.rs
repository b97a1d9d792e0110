//! LiveKit's control plane, seen from the client: tokens, the room service, and one WebSocket per
//! participant.
//!
//! Runs on tokio, beside the media threads. Nothing in here touches a media packet; clocks are read
//! here, for the phases of a join.

pub mod access;
pub mod answer;
pub mod client;
pub mod dial;
pub mod fetch;
pub mod gateway;
pub mod given;
mod head;
pub mod link;
pub mod probe;
pub mod rooms;
pub mod route;
pub mod session;
pub mod token;
pub mod trust;
pub mod turn;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::plan::{ServerUrl, UnusableUrl};
use dial::Addresses;

pub use crate::secrets::Secret;
pub use access::{JoinAccess, NotIssued, TokenIssuer, TokenRequest};
pub use client::{
    ConnectTimes, JoinOptions, SignalError, SignalEvent, SignalReceiver, SignalSender, connect,
};
pub use dial::{AddressUse, Dialled};
pub use gateway::{Gateway, GivenHeader, TokenPlace};
pub use given::{GivenToken, Seats};
pub use rooms::{RoomError, RoomService};
pub use token::{ApiKey, Permissions};

/// Where a LiveKit server listens, what stands in front of it, and its addresses once they are
/// looked up.
#[derive(Clone, Debug)]
pub struct Endpoint {
    url: ServerUrl,
    gateway: Arc<Gateway>,
    addresses: Option<Arc<Addresses>>,
}

impl Endpoint {
    /// Whether TLS is spoken: `wss` and `https`.
    pub fn secure(&self) -> bool {
        self.url.is_secure()
    }

    pub fn host(&self) -> &str {
        self.url.host()
    }

    /// `ws://host:port/prefix` + `path`.
    pub fn websocket_url(&self, path: &str) -> String {
        format!("{}{path}", self.url.websocket())
    }

    /// `http://host:port/prefix` + `path`.
    pub fn http_url(&self, path: &str) -> String {
        format!("{}{path}", self.url.http())
    }

    /// What each of its addresses has done; empty before they are looked up.
    pub fn address_uses(&self) -> Vec<AddressUse> {
        self.addresses
            .as_ref()
            .map_or_else(Vec::new, |addresses| addresses.uses())
    }

    /// The same, with what a gateway in front of it wants to see.
    pub fn through(self, gateway: &Gateway) -> Endpoint {
        Endpoint {
            gateway: Arc::new(gateway.clone()),
            ..self
        }
    }
}

impl From<ServerUrl> for Endpoint {
    fn from(url: ServerUrl) -> Endpoint {
        Endpoint {
            url,
            gateway: Arc::default(),
            addresses: None,
        }
    }
}

impl FromStr for Endpoint {
    type Err = UnusableUrl;

    fn from_str(text: &str) -> Result<Endpoint, UnusableUrl> {
        text.parse::<ServerUrl>().map(Endpoint::from)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.url.fmt(f)
    }
}
