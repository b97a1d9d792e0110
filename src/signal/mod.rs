//! LiveKit's control plane as a client uses it: tokens, the room service, and one WebSocket per
//! participant.
//!
//! It runs on tokio, beside the media threads, and never touches a media packet. It reads clocks,
//! to time the phases of a join.

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
pub mod refused;
pub mod rooms;
pub mod route;
pub mod session;
pub mod token;
pub mod trust;
pub mod turn;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use tokio::sync::OnceCell;

use crate::plan::{ServerUrl, UnusableUrl};
use dial::Addresses;

pub use crate::secrets::Secret;
pub use access::{JoinAccess, NotIssued, TokenIssuer, TokenOrigin, TokenRequest};
pub use client::{
    ConnectTimes, JoinOptions, SignalError, SignalEvent, SignalReceiver, SignalSender, connect,
};
pub use dial::{AddressUse, Dialled};
pub use gateway::{Gateway, GivenHeader, TokenPlace};
pub use given::{GivenToken, Seats};
pub use rooms::{RoomError, RoomService};
pub use token::{ApiKey, Permissions};

/// Address of a LiveKit server, what a gateway in front of it needs, and the server's IP addresses
/// once they are looked up.
#[derive(Clone, Debug)]
pub struct Endpoint {
    url: ServerUrl,
    gateway: Arc<Gateway>,
    addresses: Option<Arc<Addresses>>,
    /// Whether signalling is there for requests other than a WebSocket's. It is asked once, where
    /// no WebSocket opens.
    serves_signalling: Arc<OnceCell<bool>>,
}

impl Endpoint {
    /// Whether the URL asks for TLS: `wss` and `https`.
    pub fn secure(&self) -> bool {
        self.url.is_secure()
    }

    pub fn host(&self) -> &str {
        self.url.host()
    }

    /// Returns `ws://host:port/prefix` + `path`.
    pub fn websocket_url(&self, path: &str) -> String {
        format!("{}{path}", self.url.websocket())
    }

    /// Returns `http://host:port/prefix` + `path`.
    pub fn http_url(&self, path: &str) -> String {
        format!("{}{path}", self.url.http())
    }

    /// Returns how each address has been used; empty before the name is looked up.
    pub fn address_uses(&self) -> Vec<AddressUse> {
        self.addresses
            .as_ref()
            .map_or_else(Vec::new, |addresses| addresses.uses())
    }

    /// Returns this endpoint with what a gateway in front of it needs.
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
            serves_signalling: Arc::default(),
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
