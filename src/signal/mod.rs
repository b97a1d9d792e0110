//! LiveKit's control plane, seen from the client: tokens, the room service, and one WebSocket per
//! participant.
//!
//! Runs on tokio, beside the media threads. Nothing in here touches a media packet; clocks are read
//! here, for the phases of a join.

pub mod access;
pub mod client;
pub mod given;
pub mod probe;
pub mod rooms;
pub mod session;
pub mod token;

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::{Arc, OnceLock};

use crate::plan::{ServerUrl, UnusableUrl};

pub use crate::secrets::Secret;
pub use access::{JoinAccess, NotIssued, TokenIssuer, TokenRequest};
pub use client::{
    ConnectTimes, JoinOptions, SignalError, SignalEvent, SignalReceiver, SignalSender, connect,
};
pub use given::{GivenToken, Seats};
pub use rooms::{RoomError, RoomService};
pub(crate) use rooms::{causes, http_client};
pub use token::{ApiKey, Permissions};

/// Where a LiveKit server listens, and its addresses once they are looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    url: ServerUrl,
    addresses: Option<Arc<[SocketAddr]>>,
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

    /// Looks the name up once and keeps the addresses, so that no later connect asks (or times) a
    /// name server.
    pub async fn resolve(mut self) -> Result<Endpoint, SignalError> {
        self.addresses = Some(self.lookup().await?);
        Ok(self)
    }

    /// The addresses to try, in order: those kept by [`Endpoint::resolve`], or what the name server
    /// says now.
    pub(crate) async fn lookup(&self) -> Result<Arc<[SocketAddr]>, SignalError> {
        if let Some(addresses) = &self.addresses {
            return Ok(addresses.clone());
        }
        let host = self.host();
        let failed = |cause: String| SignalError::Resolve {
            host: host.to_owned(),
            cause,
        };
        let found = tokio::net::lookup_host((host, self.url.port())).await;
        let addresses: Arc<[SocketAddr]> =
            found.map_err(|error| failed(error.to_string()))?.collect();
        if addresses.is_empty() {
            Err(failed("the name has no address".into()))
        } else {
            Ok(addresses)
        }
    }
}

impl From<ServerUrl> for Endpoint {
    fn from(url: ServerUrl) -> Endpoint {
        Endpoint {
            url,
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

/// One TLS configuration for the process: this system's roots (`SSL_CERT_FILE` is honoured) and
/// Mozilla's, so that slim containers work.
pub(crate) fn tls_config() -> Arc<rustls::ClientConfig> {
    static CONFIG: OnceLock<Arc<rustls::ClientConfig>> = OnceLock::new();
    CONFIG.get_or_init(|| Arc::new(build_tls_config())).clone()
}

fn build_tls_config() -> rustls::ClientConfig {
    let mut roots = rustls::RootCertStore {
        roots: webpki_roots::TLS_SERVER_ROOTS.to_vec(),
    };
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring supports TLS 1.2 and 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth()
}
