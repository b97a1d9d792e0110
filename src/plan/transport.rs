//! What carries a participant's media between this host and the server.

use serde::{Deserialize, Serialize};

/// What carried it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MediaTransport {
    /// Straight to the server.
    Udp,
    /// ICE over TCP, to a passive candidate of the server (RFC 6544).
    Tcp,
    /// Through a TURN server that is reached over UDP.
    TurnUdp,
    /// Through one that is reached over TCP.
    TurnTcp,
    /// Through one that is reached over TLS.
    TurnTls,
}

impl MediaTransport {
    /// `tcp`, as flags and reports name it.
    pub const fn name(self) -> &'static str {
        match self {
            MediaTransport::Udp => "udp",
            MediaTransport::Tcp => "tcp",
            MediaTransport::TurnUdp => "turn-udp",
            MediaTransport::TurnTcp => "turn-tcp",
            MediaTransport::TurnTls => "turn-tls",
        }
    }
}

/// What it is to be carried by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TransportChoice {
    /// UDP, and what clients fall back to where it does not come up.
    #[default]
    Auto,
    Udp,
    Tcp,
    TurnUdp,
    TurnTcp,
    TurnTls,
}

impl TransportChoice {
    pub const fn name(self) -> &'static str {
        match self {
            TransportChoice::Auto => "auto",
            TransportChoice::Udp => "udp",
            TransportChoice::Tcp => "tcp",
            TransportChoice::TurnUdp => "turn-udp",
            TransportChoice::TurnTcp => "turn-tcp",
            TransportChoice::TurnTls => "turn-tls",
        }
    }

    pub const fn is_auto(&self) -> bool {
        matches!(self, TransportChoice::Auto)
    }

    /// Whether it may be UDP straight to the server.
    pub const fn allows_udp(self) -> bool {
        matches!(self, TransportChoice::Auto | TransportChoice::Udp)
    }

    /// Whether it is a relay, whatever else there is.
    pub const fn is_relay(self) -> bool {
        matches!(
            self,
            TransportChoice::TurnUdp | TransportChoice::TurnTcp | TransportChoice::TurnTls
        )
    }

    /// Whether it may be TCP straight to the server.
    pub const fn allows_tcp(self) -> bool {
        matches!(self, TransportChoice::Auto | TransportChoice::Tcp)
    }
}
