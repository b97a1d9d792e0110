//! Transports of a participant's media between this host and the server.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The transport that media used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MediaTransport {
    /// UDP, directly to the server.
    Udp,
    /// ICE over TCP, to a passive candidate of the server (RFC 6544).
    Tcp,
    /// Through a TURN server, reached over UDP.
    TurnUdp,
    /// Through a TURN server, reached over TCP.
    TurnTcp,
    /// Through a TURN server, reached over TLS.
    TurnTls,
}

impl MediaTransport {
    /// In the order in which clients try them.
    pub const ALL: [MediaTransport; 5] = [
        MediaTransport::Udp,
        MediaTransport::Tcp,
        MediaTransport::TurnUdp,
        MediaTransport::TurnTcp,
        MediaTransport::TurnTls,
    ];

    pub const fn is_relay(self) -> bool {
        matches!(
            self,
            MediaTransport::TurnUdp | MediaTransport::TurnTcp | MediaTransport::TurnTls
        )
    }

    /// Name in flags and reports, for example `tcp`.
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

/// The transports that media may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TransportChoice {
    /// UDP, and the fallbacks that clients use if UDP does not come up.
    #[default]
    Auto,
    Udp,
    Tcp,
    TurnUdp,
    TurnTcp,
    TurnTls,
}

impl TransportChoice {
    pub const ALL: [TransportChoice; 6] = [
        TransportChoice::Auto,
        TransportChoice::Udp,
        TransportChoice::Tcp,
        TransportChoice::TurnUdp,
        TransportChoice::TurnTcp,
        TransportChoice::TurnTls,
    ];

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

    /// Whether UDP directly to the server is allowed.
    pub const fn allows_udp(self) -> bool {
        matches!(self, TransportChoice::Auto | TransportChoice::Udp)
    }

    /// Whether only a relay is allowed.
    pub const fn is_relay(self) -> bool {
        matches!(
            self,
            TransportChoice::TurnUdp | TransportChoice::TurnTcp | TransportChoice::TurnTls
        )
    }

    /// Whether a relay is allowed.
    pub const fn allows_relay(self) -> bool {
        self.is_auto() || self.is_relay()
    }

    /// Whether TCP directly to the server is allowed.
    pub const fn allows_tcp(self) -> bool {
        matches!(self, TransportChoice::Auto | TransportChoice::Tcp)
    }
}

/// Transports of several participants' media: a single one, or shares in percent.
///
/// Written as `tcp` or `udp:75,turn-tls:25`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TransportMix(Vec<TransportShare>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct TransportShare {
    choice: TransportChoice,
    percent: u8,
}

/// Why a text is not a mix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoTransportMix {
    #[error(
        "'{0}' is none of auto, udp, tcp, turn-udp, turn-tcp, turn-tls (a mix: udp:75,turn-tls:25)"
    )]
    Unknown(String),
    #[error("'{0}' has no share: write a percentage behind each, udp:75,turn-tls:25")]
    Percentage(String),
    #[error("{0} is there twice: add its shares up")]
    Twice(&'static str),
    #[error("the shares are {0} % together: make them 100")]
    Sum(u32),
}

impl TransportMix {
    /// A mix of `choice`, with `percent` of `other`.
    #[must_use]
    pub fn with_share(
        choice: TransportChoice,
        other: TransportChoice,
        percent: u8,
    ) -> TransportMix {
        let percent = percent.min(100);
        let share = |choice, percent| TransportShare { choice, percent };
        let mut shares = vec![share(choice, 100 - percent), share(other, percent)];
        shares.retain(|share| share.percent > 0);
        TransportMix(shares)
    }

    /// Each choice once.
    pub fn choices(&self) -> impl Iterator<Item = TransportChoice> + '_ {
        self.0.iter().map(|share| share.choice)
    }

    /// The choice that all participants have, if it is the same for all.
    pub fn only(&self) -> Option<TransportChoice> {
        match &self.0[..] {
            [share] => Some(share.choice),
            _ => None,
        }
    }

    pub fn is_auto(&self) -> bool {
        self.only().is_some_and(|choice| choice.is_auto())
    }

    /// Transport of the `nth` participant's media. Among the first ones, for any number of them,
    /// each share is as large as it can be in whole participants.
    pub fn at(&self, nth: u64) -> TransportChoice {
        if let Some(choice) = self.only() {
            return choice;
        }
        // The order repeats after a hundred.
        let mut taken = vec![0; self.0.len()];
        let mut last = 0;
        for count in 1..=(nth % 100) as i64 + 1 {
            let owed =
                |index: &usize| i64::from(self.0[*index].percent) * count - 100 * taken[*index];
            // Take the first of several that are owed the same.
            last = (0..taken.len()).rev().max_by_key(owed).unwrap_or(0);
            taken[last] += 1;
        }
        self.0[last].choice
    }
}

impl Default for TransportMix {
    fn default() -> TransportMix {
        TransportChoice::default().into()
    }
}

impl From<TransportChoice> for TransportMix {
    fn from(choice: TransportChoice) -> TransportMix {
        TransportMix::with_share(choice, choice, 0)
    }
}

impl FromStr for TransportMix {
    type Err = NoTransportMix;

    fn from_str(text: &str) -> Result<TransportMix, NoTransportMix> {
        let choice = |name: &str| {
            let mut all = TransportChoice::ALL.into_iter();
            let known = all.find(|choice| choice.name() == name);
            known.ok_or_else(|| NoTransportMix::Unknown(crate::words::one_line(name)))
        };
        if !text.contains([':', ',']) {
            return Ok(choice(text)?.into());
        }
        let mut shares: Vec<TransportShare> = Vec::new();
        for part in text.split(',') {
            let (name, percent) = part.split_once(':').unwrap_or((part, ""));
            let choice = choice(name)?;
            let percent = percent
                .parse()
                .ok()
                .filter(|percent| (1..=100).contains(percent));
            let percent =
                percent.ok_or_else(|| NoTransportMix::Percentage(crate::words::one_line(part)))?;
            if shares.iter().any(|share| share.choice == choice) {
                return Err(NoTransportMix::Twice(choice.name()));
            }
            shares.push(TransportShare { choice, percent });
        }
        match shares.iter().map(|share| u32::from(share.percent)).sum() {
            100 => Ok(TransportMix(shares)),
            sum => Err(NoTransportMix::Sum(sum)),
        }
    }
}

impl fmt::Display for TransportMix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(choice) = self.only() {
            return f.write_str(choice.name());
        }
        for (index, TransportShare { choice, percent }) in self.0.iter().enumerate() {
            let comma = if index > 0 { "," } else { "" };
            write!(f, "{comma}{}:{percent}", choice.name())?;
        }
        Ok(())
    }
}

impl TryFrom<String> for TransportMix {
    type Error = NoTransportMix;

    fn try_from(text: String) -> Result<TransportMix, NoTransportMix> {
        text.parse()
    }
}

impl From<TransportMix> for String {
    fn from(mix: TransportMix) -> String {
        mix.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_a_mix_hold_among_the_first_ones_however_many() {
        let mix: TransportMix = "udp:70,tcp:5,turn-tls:25".parse().unwrap();
        let mut counts = [0u64; 3];
        for nth in 0..1_000 {
            let at = mix.at(nth);
            let index = mix.choices().position(|choice| choice == at).unwrap();
            counts[index] += 1;
            for (count, percent) in counts.iter().zip([70, 5, 25]) {
                let whole = percent * (nth + 1) / 100;
                assert!(
                    (whole.saturating_sub(1)..=whole + 1).contains(count),
                    "{counts:?} of {nth}"
                );
            }
        }
        assert_eq!(counts, [700, 50, 250]);
    }

    #[test]
    fn mixes_are_written_as_they_are_read_and_nonsense_is_refused() {
        for text in ["auto", "turn-tcp", "udp:75,turn-tls:25", "udp:1,tcp:99"] {
            let mix: TransportMix = text.parse().unwrap();
            let json = serde_json::to_string(&mix).unwrap();
            assert_eq!(json, format!("\"{text}\""));
            assert_eq!(serde_json::from_str::<TransportMix>(&json).unwrap(), mix);
        }
        for (text, why) in [
            ("sctp", NoTransportMix::Unknown("sctp".into())),
            ("", NoTransportMix::Unknown(String::new())),
            ("udp:75,", NoTransportMix::Unknown(String::new())),
            ("udp,tcp:25", NoTransportMix::Percentage("udp".into())),
            ("udp:x,tcp:25", NoTransportMix::Percentage("udp:x".into())),
            ("udp:0,tcp:100", NoTransportMix::Percentage("udp:0".into())),
            ("udp:75,tcp:20", NoTransportMix::Sum(95)),
            ("udp:50,udp:50", NoTransportMix::Twice("udp")),
        ] {
            assert_eq!(text.parse::<TransportMix>(), Err(why), "{text}");
        }
    }
}
