//! Why there is no HTTP answer: the connection failed, TLS failed, or the answer was no HTTP.

use std::error::Error;
use std::fmt;
use std::io;
use std::time::Duration;

use super::answer::stranger_text;
use super::trust::TlsFault;

/// How far a connection had come when it timed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkStage {
    /// TCP, or TCP and TLS where one step makes both.
    Connect,
    Tls,
    /// An HTTP answer other than that to a WebSocket upgrade.
    Answer,
    UpgradeAnswer,
}

impl LinkStage {
    /// Returns what the server did, as a sentence that begins with its address.
    const fn story(self) -> &'static str {
        match self {
            LinkStage::Connect => "did not take a connection",
            LinkStage::Tls => {
                "took the connection (TCP was open), and did not answer the TLS handshake"
            }
            LinkStage::Answer => "took the connection, and its answer did not come",
            LinkStage::UpgradeAnswer => {
                "took the connection (TCP was open), and the WebSocket's answer did not come"
            }
        }
    }

    const fn advice(self) -> &'static str {
        match self {
            LinkStage::Connect => "check the address, the route and the firewall",
            LinkStage::Tls => {
                "does it speak TLS at this port, or is it, or what stands in front of it, stuck?"
            }
            LinkStage::Answer | LinkStage::UpgradeAnswer => {
                "is it, or what stands in front of it, stuck or overloaded?"
            }
        }
    }
}

/// Why a connection gave no HTTP answer. Each message says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkFault {
    #[error(
        "{} refused the connection: is the server running, and is this its port?",
        with_port(endpoint)
    )]
    Refused { endpoint: String },
    #[error(
        "{} cannot be reached ({cause}): check the address, the route and the firewall",
        with_port(endpoint)
    )]
    Unreachable { endpoint: String, cause: String },
    #[error(
        "the host name '{host}' cannot be resolved ({cause}): check its spelling and this host's DNS"
    )]
    Resolve { host: String, cause: String },
    #[error("{} {} within {}: {}", with_port(endpoint), stage.story(), seconds(*after), stage.advice())]
    Slow {
        endpoint: String,
        stage: LinkStage,
        after: Duration,
    },
    /// `https` to a plain port, or `http` to a TLS port.
    #[error("{endpoint} {}", if *server_speaks_tls { "speaks TLS: use wss:// or https://" } else { "does not speak TLS: use ws:// or http://" })]
    TlsMismatch {
        endpoint: String,
        server_speaks_tls: bool,
    },
    #[error("TLS with {endpoint} failed: {fault}")]
    Tls { endpoint: String, fault: TlsFault },
    #[error("{endpoint} answers with what is no HTTP ({began}): is this a LiveKit server, and its port?{}", hint(*.secure))]
    NotHttp {
        endpoint: String,
        secure: bool,
        began: String,
    },
    #[error("{endpoint} hung up without an answer ({cause}): is this a LiveKit server?{}", hint(*.secure))]
    HungUp {
        endpoint: String,
        secure: bool,
        cause: String,
    },
}

/// Returns the address, with the port that was tried where it names none.
fn with_port(endpoint: &str) -> String {
    let uri: Option<http::Uri> = endpoint.parse().ok();
    let tried = uri.filter(|uri| uri.port().is_none()).and_then(|uri| {
        let port = match uri.scheme_str()? {
            "ws" | "http" => 80,
            "wss" | "https" => 443,
            _ => return None,
        };
        Some(format!("{endpoint} (port {port}, because it names none)"))
    });
    tried.unwrap_or_else(|| endpoint.to_owned())
}

fn hint(secure: bool) -> &'static str {
    if secure {
        ""
    } else {
        " One that speaks TLS wants wss:// or https://"
    }
}

fn seconds(time: Duration) -> impl fmt::Display {
    format!("{} s", time.as_secs_f64())
}

/// Time limits of a request, and of its connection alone.
#[derive(Clone, Copy, Debug)]
pub struct RequestTimes {
    pub connect: Duration,
    pub whole: Duration,
}

/// The server at the other end of a connection.
#[derive(Clone, Copy, Debug)]
pub struct LinkEnd<'a> {
    /// Address as the user would write it.
    pub endpoint: &'a str,
    pub secure: bool,
}

impl LinkEnd<'_> {
    /// Returns the fault if no address accepted a connection.
    pub fn unreachable(self, error: &io::Error) -> LinkFault {
        let endpoint = self.endpoint.to_owned();
        if error.kind() == io::ErrorKind::ConnectionRefused {
            LinkFault::Refused { endpoint }
        } else {
            LinkFault::Unreachable {
                endpoint,
                cause: plain(error),
            }
        }
    }

    pub fn tls(self, error: &rustls::Error) -> LinkFault {
        let endpoint = self.endpoint.to_owned();
        match error {
            // The first bytes are no TLS record: an HTTP server has answered in plain text.
            rustls::Error::InvalidMessage(_) => LinkFault::TlsMismatch {
                endpoint,
                server_speaks_tls: false,
            },
            other => LinkFault::Tls {
                endpoint,
                fault: TlsFault::of(other),
            },
        }
    }

    pub fn slow(self, stage: LinkStage, after: Duration) -> LinkFault {
        LinkFault::Slow {
            endpoint: self.endpoint.to_owned(),
            stage,
            after,
        }
    }

    /// Returns the fault for bytes that came in place of an HTTP answer.
    pub fn not_http(self, bytes: &[u8]) -> LinkFault {
        const SHOWN_MAX: usize = 24;
        let endpoint = self.endpoint.to_owned();
        // A TLS alert: type 21, version 3.x (RFC 8446, section 5.1).
        if !self.secure && bytes.starts_with(&[21, 3]) {
            return LinkFault::TlsMismatch {
                endpoint,
                server_speaks_tls: true,
            };
        }
        let shown = bytes.get(..bytes.len().min(SHOWN_MAX)).unwrap_or_default();
        LinkFault::NotHttp {
            endpoint,
            secure: self.secure,
            began: format!(
                "it begins with '{}'",
                stranger_text(&String::from_utf8_lossy(shown), None)
            ),
        }
    }

    pub fn hung_up(self, cause: impl Into<String>) -> LinkFault {
        LinkFault::HungUp {
            endpoint: self.endpoint.to_owned(),
            secure: self.secure,
            cause: cause.into(),
        }
    }

    /// Returns the fault for an error of the HTTP client that had these time limits.
    pub fn request(self, error: &reqwest::Error, timeout: RequestTimes) -> LinkFault {
        let endpoint = self.endpoint.to_owned();
        if let Some(tls) = causes(error).find_map(|cause| cause.downcast_ref::<rustls::Error>()) {
            return self.tls(tls);
        }
        // The client's type for this error is private.
        if let Some(cause) = causes(error).find(|cause| cause.to_string() == "dns error") {
            let cause = cause
                .source()
                .map_or_else(|| cause.to_string(), ToString::to_string);
            return LinkFault::Resolve {
                host: host_of(self.endpoint),
                cause,
            };
        }
        if error.is_timeout() {
            return if error.is_connect() {
                self.slow(LinkStage::Connect, timeout.connect)
            } else {
                self.slow(LinkStage::Answer, timeout.whole)
            };
        }
        let io = causes(error).find_map(|cause| cause.downcast_ref::<io::Error>());
        if error.is_connect() {
            return match io {
                Some(io) => self.unreachable(io),
                None => LinkFault::Unreachable {
                    endpoint,
                    cause: last_cause(error),
                },
            };
        }
        let hyper = causes(error).find_map(|cause| cause.downcast_ref::<hyper::Error>());
        if hyper.is_some_and(hyper::Error::is_parse) {
            return LinkFault::NotHttp {
                endpoint,
                secure: self.secure,
                began: last_cause(error),
            };
        }
        self.hung_up(io.map_or_else(|| last_cause(error), plain))
    }
}

fn host_of(endpoint: &str) -> String {
    let url = url::Url::parse(endpoint).ok();
    let host = url.and_then(|url| url.host_str().map(str::to_owned));
    host.unwrap_or_else(|| endpoint.to_owned())
}

fn last_cause(error: &reqwest::Error) -> String {
    let cause = causes(error).last().map(ToString::to_string);
    cause.unwrap_or_else(|| "the request failed".to_owned())
}

/// Returns an I/O error without its number: `No route to host`.
pub(crate) fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error ") {
        Some((words, _)) => words.to_owned(),
        None => text,
    }
}

/// Returns the chain of causes below `error`. An `io::Error` hides its inner error from `source`,
/// so the chain looks into it.
pub(crate) fn causes<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(error.source(), |cause| {
        let cause: &'a (dyn Error + 'static) = *cause;
        match cause
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref)
        {
            Some(inner) => Some(inner),
            None => cause.source(),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_that_was_tried_is_told_where_none_was_named() {
        for (endpoint, begins) in [
            (
                "ws://sfu",
                "ws://sfu (port 80, because it names none) refused",
            ),
            ("wss://sfu/live", "wss://sfu/live (port 443, because"),
            ("ws://sfu:80", "ws://sfu:80 refused"),
            ("ws://[::1]:7880", "ws://[::1]:7880 refused"),
        ] {
            let endpoint = endpoint.to_owned();
            let said = LinkFault::Refused { endpoint }.to_string();
            assert!(said.starts_with(begins), "{said}");
        }
    }
}
