//! Addresses of TURN servers.

use std::fmt;
use std::str::FromStr;

use crate::plan::TransportChoice;

/// Default ports (RFC 8656, section 18).
const PORT: u16 = 3_478;
const PORT_TLS: u16 = 5_349;

/// Transport of the TURN protocol itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TurnLink {
    Udp,
    Tcp,
    Tls,
}

impl TurnLink {
    /// Returns the link of a choice that uses a relay; `None` for other choices.
    pub const fn of(choice: TransportChoice) -> Option<TurnLink> {
        match choice {
            TransportChoice::TurnUdp => Some(TurnLink::Udp),
            TransportChoice::TurnTcp => Some(TurnLink::Tcp),
            TransportChoice::TurnTls => Some(TurnLink::Tls),
            TransportChoice::Auto | TransportChoice::Udp | TransportChoice::Tcp => None,
        }
    }
}

/// A relay's address: `turn:HOST:PORT?transport=udp` (RFC 7065).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TurnUrl {
    pub(super) host: String,
    pub(super) port: u16,
    pub link: TurnLink,
    /// Whether the address itself names its link.
    is_explicit: bool,
}

/// Why a text is no address of a TURN server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoTurnUrl {
    #[error("write turn:HOST, turn:HOST:PORT or turns:HOST:PORT")]
    Scheme,
    #[error("it names no host")]
    Host,
    #[error("its port is no number from 1 to 65535")]
    Port,
    #[error("only ?transport=udp and ?transport=tcp are known")]
    Transport,
}

impl FromStr for TurnUrl {
    type Err = NoTurnUrl;

    fn from_str(text: &str) -> Result<TurnUrl, NoTurnUrl> {
        let (is_tls, rest) = match (text.strip_prefix("turn:"), text.strip_prefix("turns:")) {
            (Some(rest), _) => (false, rest),
            (None, Some(rest)) => (true, rest),
            (None, None) => return Err(NoTurnUrl::Scheme),
        };
        let (authority, query) = rest.split_once('?').unwrap_or((rest, ""));
        let link = match (is_tls, query) {
            (false, "" | "transport=udp") => TurnLink::Udp,
            (false, "transport=tcp") => TurnLink::Tcp,
            (true, "" | "transport=tcp") => TurnLink::Tls,
            _ => return Err(NoTurnUrl::Transport),
        };
        let (host, port) = match authority.strip_prefix('[') {
            Some(rest) => {
                let (host, rest) = rest.split_once(']').ok_or(NoTurnUrl::Host)?;
                (host, rest.strip_prefix(':').unwrap_or(""))
            }
            None => authority.split_once(':').unwrap_or((authority, "")),
        };
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:".contains(&byte);
        if host.is_empty() || !host.bytes().all(is_name) {
            return Err(NoTurnUrl::Host);
        }
        let port = match port {
            "" if is_tls => PORT_TLS,
            "" => PORT,
            port => port
                .parse()
                .ok()
                .filter(|port| *port > 0)
                .ok_or(NoTurnUrl::Port)?,
        };
        Ok(TurnUrl {
            host: host.to_owned(),
            port,
            link,
            is_explicit: is_tls || !query.is_empty(),
        })
    }
}

impl TurnUrl {
    /// Returns the choice of transport that this relay offers.
    pub fn as_choice(&self) -> TransportChoice {
        match self.link {
            TurnLink::Udp => TransportChoice::TurnUdp,
            TurnLink::Tcp => TransportChoice::TurnTcp,
            TurnLink::Tls => TransportChoice::TurnTls,
        }
    }

    /// Returns the same server with the link that `choice` asks for.
    ///
    /// # Errors
    /// Returns an error if the address itself names another link.
    pub fn over(self, choice: TransportChoice) -> Result<TurnUrl, OtherTurnLink> {
        let wanted = TurnLink::of(choice).unwrap_or(self.link);
        let is_tcp_for_nothing_said = wanted == TurnLink::Tcp && !self.is_explicit;
        if wanted == self.link || is_tcp_for_nothing_said {
            let link = wanted;
            return Ok(TurnUrl { link, ..self });
        }
        let scheme = if wanted == TurnLink::Tls {
            "turns"
        } else {
            "turn"
        };
        let transport = if wanted == TurnLink::Udp {
            "udp"
        } else {
            "tcp"
        };
        Err(OtherTurnLink {
            given: self,
            choice: choice.name(),
            expected: format!("{scheme}:HOST:PORT?transport={transport}"),
        })
    }
}

/// An address and `--transport` contradict each other.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("--turn {given} does not go with --transport {choice}, which wants {expected}")]
pub struct OtherTurnLink {
    given: TurnUrl,
    choice: &'static str,
    expected: String,
}

impl fmt::Display for TurnUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, transport) = match self.link {
            TurnLink::Udp => ("turn", "udp"),
            TurnLink::Tcp => ("turn", "tcp"),
            TurnLink::Tls => ("turns", "tcp"),
        };
        let (open, close) = if self.host.contains(':') {
            ("[", "]")
        } else {
            ("", "")
        };
        let (host, port) = (&self.host, self.port);
        write!(
            f,
            "{scheme}:{open}{host}{close}:{port}?transport={transport}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_relays_are_read_and_refused() {
        let read = |text: &str| text.parse::<TurnUrl>().map(|url| url.to_string());
        for (text, as_read) in [
            (
                "turn:relay.example",
                "turn:relay.example:3478?transport=udp",
            ),
            (
                "turn:10.0.0.1:99?transport=udp",
                "turn:10.0.0.1:99?transport=udp",
            ),
            (
                "turn:10.0.0.1?transport=tcp",
                "turn:10.0.0.1:3478?transport=tcp",
            ),
            (
                "turns:relay.example",
                "turns:relay.example:5349?transport=tcp",
            ),
            ("turn:[::1]:99", "turn:[::1]:99?transport=udp"),
        ] {
            assert_eq!(read(text).as_deref(), Ok(as_read), "{text}");
        }
        for (text, why) in [
            ("stun:relay.example", NoTurnUrl::Scheme),
            ("https://relay.example", NoTurnUrl::Scheme),
            ("turn:", NoTurnUrl::Host),
            ("turn:\u{1b}[2J", NoTurnUrl::Host),
            ("turn:host:0", NoTurnUrl::Port),
            ("turn:host:66000", NoTurnUrl::Port),
            ("turn:host?transport=sctp", NoTurnUrl::Transport),
            ("turns:host?transport=udp", NoTurnUrl::Transport),
        ] {
            assert_eq!(read(text), Err(why), "{text}");
        }
    }
}
