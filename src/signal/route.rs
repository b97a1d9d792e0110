//! Finds the proxy for requests and WebSockets from HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and
//! NO_PROXY, as curl reads them. Both use the same one.
//!
//! This host itself, and so the embedded SFU, is never reached through a proxy. Media never is.

use std::fmt;
use std::sync::OnceLock;

use http::{HeaderValue, Uri};
use hyper_util::client::proxy::matcher::Matcher;

use crate::plan::is_loopback_host;

/// A proxy on the way to a server.
#[derive(Clone, Debug)]
pub struct ProxyRoute {
    /// `http://proxy:3128`, without credentials.
    uri: Uri,
    authorization: Option<HeaderValue>,
    /// Environment variable that names the proxy.
    variable: &'static str,
}

/// Why a proxy cannot be used. Each message says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProxyFault {
    #[error(
        "{variable} names {proxy}, and throng speaks plain HTTP with a proxy only: write http://HOST:PORT, or put the server into NO_PROXY"
    )]
    Unspoken {
        variable: &'static str,
        proxy: String,
    },
    #[error(
        "the proxy {proxy} ({variable}) cannot be reached ({cause}): correct {variable}, or put the server into NO_PROXY"
    )]
    Away {
        variable: &'static str,
        proxy: String,
        cause: String,
    },
    #[error(
        "the proxy {proxy} ({variable}) does not connect us to {target} ({answer}): have it allowed, or put the server into NO_PROXY"
    )]
    Refused {
        variable: &'static str,
        proxy: String,
        target: String,
        answer: String,
    },
}

impl ProxyRoute {
    /// Returns the proxy for this address; `None` for a direct connection.
    ///
    /// # Errors
    /// Returns an error if the named proxy cannot be used.
    pub fn to(http_url: &str) -> Result<Option<ProxyRoute>, ProxyFault> {
        static MATCHER: OnceLock<Matcher> = OnceLock::new();
        let Ok(uri) = http_url.parse::<Uri>() else {
            return Ok(None);
        };
        if uri.host().is_none_or(is_loopback_host) {
            return Ok(None);
        }
        let Some(found) = MATCHER.get_or_init(Matcher::from_env).intercept(&uri) else {
            return Ok(None);
        };
        let own = if uri.scheme_str() == Some("https") {
            ["HTTPS_PROXY", "https_proxy"]
        } else {
            ["HTTP_PROXY", "http_proxy"]
        };
        let is_set = |name: &&str| std::env::var(name).is_ok_and(|value| !value.is_empty());
        let route = ProxyRoute {
            uri: found.uri().clone(),
            authorization: found.basic_auth().cloned(),
            variable: if own.iter().any(is_set) {
                own[0]
            } else {
                "ALL_PROXY"
            },
        };
        if route.uri.scheme_str() == Some("http") {
            Ok(Some(route))
        } else {
            Err(ProxyFault::Unspoken {
                variable: route.variable,
                proxy: route.name(),
            })
        }
    }

    pub(super) fn host(&self) -> &str {
        let host = self.uri.host().unwrap_or_default();
        host.trim_start_matches('[').trim_end_matches(']')
    }

    pub(super) fn port(&self) -> u16 {
        self.uri.port_u16().unwrap_or(80)
    }

    pub(super) fn authorization(&self) -> Option<&HeaderValue> {
        self.authorization.as_ref()
    }

    fn name(&self) -> String {
        self.uri.to_string().trim_end_matches('/').to_owned()
    }

    pub(super) fn away(&self, cause: impl Into<String>) -> ProxyFault {
        ProxyFault::Away {
            variable: self.variable,
            proxy: self.name(),
            cause: cause.into(),
        }
    }

    pub(super) fn refused(&self, target: &str, answer: impl Into<String>) -> ProxyFault {
        ProxyFault::Refused {
            variable: self.variable,
            proxy: self.name(),
            target: target.to_owned(),
            answer: answer.into(),
        }
    }

    /// Returns the proxy in the form that the HTTP client of requests takes.
    pub(super) fn for_requests(&self) -> Option<reqwest::Proxy> {
        let proxy = reqwest::Proxy::all(self.name()).ok()?;
        Some(match &self.authorization {
            Some(value) => proxy.custom_http_auth(value.clone()),
            None => proxy,
        })
    }
}

impl fmt::Display for ProxyRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name(), self.variable)
    }
}
