//! LiveKit's control plane, seen from the client: tokens, the room service, and one WebSocket per participant.
//!
//! Runs on tokio, beside the media threads. Nothing in here touches a media packet; clocks are read here, for the phases of a join.

pub mod client;
pub mod rooms;
pub mod session;
pub mod token;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::{Arc, OnceLock};

pub use client::{ConnectTimes, Event, JoinOptions, SignalError, SignalReceiver, SignalSender, connect};
pub use rooms::{RoomError, RoomService};
pub use token::{ApiKey, Permissions, Secret};

/// Where a LiveKit server listens: scheme, host, port and an optional path prefix. Written `ws://`, `wss://`, `http://` or `https://`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    secure: bool,
    host: url::Host<String>,
    port: u16,
    prefix: String,
    addresses: Option<Arc<[SocketAddr]>>,
}

impl Endpoint {
    /// Whether TLS is spoken: `wss` and `https`.
    pub fn secure(&self) -> bool {
        self.secure
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// The host as a name or an address, IPv6 in brackets.
    pub fn host(&self) -> String {
        self.host.to_string()
    }

    /// Whether every address that is known without asking a name server is a loopback address.
    pub fn is_loopback(&self) -> bool {
        match (&self.addresses, self.ip()) {
            (_, Some(ip)) => ip.is_loopback(),
            (Some(addresses), None) => !addresses.is_empty() && addresses.iter().all(|address| address.ip().is_loopback()),
            (None, None) => self.host() == "localhost",
        }
    }

    /// `ws://host:port/prefix` + `path`.
    pub fn websocket_url(&self, path: &str) -> String {
        format!("{}://{}{path}", if self.secure { "wss" } else { "ws" }, self.authority())
    }

    /// `http://host:port/prefix` + `path`.
    pub fn http_url(&self, path: &str) -> String {
        format!("{}://{}{path}", if self.secure { "https" } else { "http" }, self.authority())
    }

    /// Looks the name up once and keeps the addresses, so that no later connect asks (or times) a name server.
    pub async fn resolve(mut self) -> Result<Endpoint, SignalError> {
        self.addresses = Some(self.lookup().await?);
        Ok(self)
    }

    /// The addresses to try, in order: those kept by [`Endpoint::resolve`], the literal address, or what the name server says now.
    pub(crate) async fn lookup(&self) -> Result<Arc<[SocketAddr]>, SignalError> {
        if let Some(addresses) = &self.addresses {
            return Ok(addresses.clone());
        }
        if let Some(ip) = self.ip() {
            return Ok(Arc::new([SocketAddr::new(ip, self.port)]));
        }
        let host = self.host();
        let found = tokio::net::lookup_host((host.as_str(), self.port)).await;
        let addresses: Arc<[SocketAddr]> = found
            .map_err(|error| SignalError::Resolve {
                host: host.clone(),
                cause: error.to_string(),
            })?
            .collect();
        match addresses.is_empty() {
            true => Err(SignalError::Resolve {
                host,
                cause: "the name has no address".into(),
            }),
            false => Ok(addresses),
        }
    }

    fn ip(&self) -> Option<IpAddr> {
        match &self.host {
            url::Host::Domain(_) => None,
            url::Host::Ipv4(ip) => Some((*ip).into()),
            url::Host::Ipv6(ip) => Some((*ip).into()),
        }
    }

    fn authority(&self) -> String {
        format!("{}:{}{}", self.host, self.port, self.prefix)
    }
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Endpoint, String> {
        let wrong = |why: &str| {
            format!(
                "'{}' is no LiveKit address ({why}): write ws://HOST:PORT or https://HOST",
                without_userinfo(text)
            )
        };
        let url = url::Url::parse(text).map_err(|error| wrong(&error.to_string()))?;
        let secure = match url.scheme() {
            "ws" | "http" => false,
            "wss" | "https" => true,
            _ => return Err(wrong("the scheme is not ws, wss, http or https")),
        };
        if !url.username().is_empty() || url.password().is_some() {
            return Err(wrong("user and password do not belong here, use the API key and secret"));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(wrong("it has a query or a fragment"));
        }
        let host = url.host().ok_or_else(|| wrong("there is no host"))?.to_owned();
        let port = url.port_or_known_default().ok_or_else(|| wrong("there is no port"))?;
        let prefix = url.path().trim_end_matches('/').trim_end_matches("/rtc").to_owned();
        Ok(Endpoint {
            secure,
            host,
            port,
            prefix,
            addresses: None,
        })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.websocket_url(""))
    }
}

/// What stands before an `@` may be a password: it is not repeated in a message.
fn without_userinfo(text: &str) -> String {
    match text.rsplit_once('@') {
        Some((_, rest)) => format!("***@{rest}"),
        None => text.to_owned(),
    }
}

/// One TLS configuration for the process: this system's roots (`SSL_CERT_FILE` is honoured) and Mozilla's, so that slim containers work.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_in_four_schemes_and_written_in_the_one_that_is_asked_for() {
        for (text, websocket, http) in [
            ("ws://127.0.0.1:7880", "ws://127.0.0.1:7880/rtc", "http://127.0.0.1:7880/rtc"),
            ("http://localhost:7880/", "ws://localhost:7880/rtc", "http://localhost:7880/rtc"),
            (
                "wss://x.livekit.cloud",
                "wss://x.livekit.cloud:443/rtc",
                "https://x.livekit.cloud:443/rtc",
            ),
            (
                "https://[::1]:8443/behind/rtc",
                "wss://[::1]:8443/behind/rtc",
                "https://[::1]:8443/behind/rtc",
            ),
        ] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!(endpoint.websocket_url("/rtc"), websocket);
            assert_eq!(endpoint.http_url("/rtc"), http);
        }
    }

    #[test]
    fn what_is_no_address_is_refused_without_repeating_a_password() {
        for text in ["", "localhost:7880", "ftp://x", "ws://", "ws://x?y=1", "ws://user:hunter2@x"] {
            let error = text.parse::<Endpoint>().unwrap_err();
            assert!(error.contains("write ws://HOST:PORT"), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn loopback_is_known_without_a_name_server() {
        for (text, loopback) in [
            ("ws://127.0.0.2:1", true),
            ("ws://[::1]:1", true),
            ("ws://localhost:1", true),
            ("ws://10.0.0.1:1", false),
            ("ws://x.y", false),
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap().is_loopback(), loopback, "{text}");
        }
    }
}
