//! Session descriptions (RFC 8866, RFC 9429), as far as an SFU's client needs them.
//!
//! [`Answerer`] answers an SFU's offers *incrementally*. In a large room every new track brings an
//! offer that repeats all the others, 1.8 KB each. A section whose text did not change is
//! recognised by its hash and not read again. A new section is scanned once, line by line, without
//! building a tree. A general SDP library takes ten times as long, and its tree would be dropped at
//! once.
//!
//! [`Offerer`] does the same from the other end. It writes our own offers, for tracks that we send
//! and for sections that the server may send tracks in, and reads the answers. All input is
//! untrusted: sizes and counts are bounded, nothing panics, and no text reaches an answer unless it
//! was checked to be harmless there.

mod answer;
mod offer;
mod scan;
mod sections;
pub mod serve;
#[cfg(test)]
mod tests;
mod write;

use crate::transport::rtp::Ssrc;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

pub use crate::codec::RtcpFeedback;
use crate::codec::{Codec, PayloadTypes};
use crate::measure::Kind;
pub use answer::{AnsweredOffer, Answerer};
pub use offer::{LocalTrack, Negotiated, NegotiatedMedia, Offerer};
pub use scan::ice_ufrag;

/// Maximum size of a description. An offer of 3,000 tracks takes 5.5 MB.
pub const SDP_BYTES_MAX: usize = 16 << 20;
pub const SECTIONS_MAX: usize = 10_000;
/// Maximum size of a section. One usually takes 1-2 KB, and one with every codec of a browser 10
/// KB.
pub const SECTION_BYTES_MAX: usize = 64 << 10;
/// Maximum number of payload types in a section: there are no more of them.
const PAYLOAD_TYPES_MAX: usize = 128;
/// Maximum number of candidates that are read. A server has a few per interface.
const CANDIDATES_MAX: usize = 64;
/// Maximum length of a `mid`. It must fit a one-byte header extension (RFC 8843, section 15). Ours
/// and all known ones are far shorter.
const MID_BYTES_MAX: usize = 32;
/// Maximum length of identifiers (msid, ufrag, pwd) and format parameters. Longer ones are not
/// kept.
const TEXT_BYTES_MAX: usize = 256;

/// Error returned when a description is refused as a whole.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SdpError {
    #[error("the description has {bytes} bytes, more than the {SDP_BYTES_MAX} that are read")]
    TooLarge { bytes: usize },
    #[error("the description has more than {SECTIONS_MAX} media sections")]
    TooManySections,
    #[error("media section {index} has more than {SECTION_BYTES_MAX} bytes")]
    SectionTooLarge { index: usize },
    #[error("the description has no media section that can be used")]
    NoSections,
    #[error("media section {index} is broken: {what}")]
    Section { index: usize, what: &'static str },
    #[error("two media sections have the mid '{mid}'")]
    DuplicateMid { mid: String },
    #[error("the answer has {answered} media sections and the offer {offered}")]
    SectionCount { answered: usize, offered: usize },
    #[error("the description lacks {what}")]
    Missing { what: &'static str },
}

/// Side that opens the DTLS handshake (RFC 8842): `a=setup`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DtlsSetup {
    Active,
    Passive,
    /// Only in offers: the answerer chooses.
    ActPass,
}

impl DtlsSetup {
    fn parse(text: &str) -> Option<DtlsSetup> {
        [DtlsSetup::Active, DtlsSetup::Passive, DtlsSetup::ActPass]
            .into_iter()
            .find(|setup| setup.as_str() == text)
    }

    fn as_str(self) -> &'static str {
        match self {
            DtlsSetup::Active => "active",
            DtlsSetup::Passive => "passive",
            DtlsSetup::ActPass => "actpass",
        }
    }

    /// Returns our role in an answer. If the offer leaves it open, our own preference decides.
    pub fn answer(offered: DtlsSetup, preferred: DtlsSetup) -> DtlsSetup {
        match (offered, preferred) {
            (DtlsSetup::Active, _) | (DtlsSetup::ActPass, DtlsSetup::Passive) => DtlsSetup::Passive,
            (DtlsSetup::Passive | DtlsSetup::ActPass, _) => DtlsSetup::Active,
        }
    }
}

/// SHA-256 fingerprint of a DTLS certificate. No server or client that we meet uses other hashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint(pub [u8; 32]);

impl FromStr for Fingerprint {
    type Err = ();

    /// Reads `sha-256 AB:CD:..`.
    fn from_str(text: &str) -> Result<Fingerprint, ()> {
        let (hash, hex) = text.trim().split_once(' ').ok_or(())?;
        if !hash.eq_ignore_ascii_case("sha-256") {
            return Err(());
        }
        let (mut bytes, mut count) = ([0; 32], 0);
        for (slot, pair) in bytes.iter_mut().zip(hex.trim().split(':')) {
            *slot = u8::from_str_radix(pair, 16)
                .ok()
                .filter(|_| pair.len() == 2 && !pair.starts_with('+'))
                .ok_or(())?;
            count += 1;
        }
        if count == 32 && hex.split(':').count() == 32 {
            Ok(Fingerprint(bytes))
        } else {
            Err(())
        }
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha-256 ")?;
        for (index, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02X}", if index == 0 { "" } else { ":" })?;
        }
        Ok(())
    }
}

/// Transport of a candidate: `udp`, or `tcp` with its type (RFC 6544, section 4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CandidateTransport {
    Udp,
    /// The candidate opens connections.
    TcpActive,
    /// The candidate waits for connections.
    TcpPassive,
    /// Both sides open one connection at the same time.
    TcpSimultaneous,
}

impl CandidateTransport {
    /// Returns the value of `tcptype`; `None` for `udp`.
    fn tcp_type(self) -> Option<&'static str> {
        match self {
            CandidateTransport::Udp => None,
            CandidateTransport::TcpActive => Some("active"),
            CandidateTransport::TcpPassive => Some("passive"),
            CandidateTransport::TcpSimultaneous => Some("so"),
        }
    }

    /// Reads the pairs of name and value that follow a candidate's type.
    fn of_tcp<'a>(mut words: impl Iterator<Item = &'a str>) -> Option<CandidateTransport> {
        while let (Some(name), Some(value)) = (words.next(), words.next()) {
            if name == "tcptype" {
                let types = [
                    CandidateTransport::TcpActive,
                    CandidateTransport::TcpPassive,
                    CandidateTransport::TcpSimultaneous,
                ];
                return types
                    .into_iter()
                    .find(|known| known.tcp_type() == Some(value));
            }
        }
        None
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CandidateKind {
    Host,
    ServerReflexive,
    PeerReflexive,
    Relayed,
}

impl CandidateKind {
    const ALL: [CandidateKind; 4] = [
        CandidateKind::Host,
        CandidateKind::ServerReflexive,
        CandidateKind::PeerReflexive,
        CandidateKind::Relayed,
    ];

    fn as_str(self) -> &'static str {
        match self {
            CandidateKind::Host => "host",
            CandidateKind::ServerReflexive => "srflx",
            CandidateKind::PeerReflexive => "prflx",
            CandidateKind::Relayed => "relay",
        }
    }
}

/// Port of a candidate that does not listen: that of "discard".
const TCP_ACTIVE_PORT: u16 = 9;

/// ICE candidate of component 1 (RFC 8839, section 5.1), without the parts that are not used
/// (related address, extensions).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub foundation: String,
    pub transport: CandidateTransport,
    pub priority: u32,
    pub address: SocketAddr,
    pub kind: CandidateKind,
}

impl Candidate {
    /// Creates a UDP host candidate with the priority that RFC 8445, section 5.1.2.1 recommends for
    /// a single address.
    pub fn host(address: SocketAddr) -> Candidate {
        Candidate {
            foundation: "1".into(),
            transport: CandidateTransport::Udp,
            priority: 2_130_706_431,
            address,
            kind: CandidateKind::Host,
        }
    }

    /// Creates a host candidate that opens TCP connections. Its port has no meaning and is always 9
    /// (RFC 6544, section 4.5). The type preference is libwebrtc's.
    pub fn tcp_active(ip: IpAddr) -> Candidate {
        Candidate {
            foundation: "2".into(),
            transport: CandidateTransport::TcpActive,
            priority: 1_518_280_447,
            address: SocketAddr::new(ip, TCP_ACTIVE_PORT),
            kind: CandidateKind::Host,
        }
    }

    /// Creates a host candidate that accepts TCP connections, with the priority of
    /// [`Candidate::tcp_active`].
    pub fn tcp_passive(address: SocketAddr) -> Candidate {
        Candidate {
            transport: CandidateTransport::TcpPassive,
            address,
            ..Candidate::tcp_active(address.ip())
        }
    }

    /// Creates a candidate for our address at a relay. The real related address is not disclosed,
    /// but some peers require the attribute.
    pub fn relayed(address: SocketAddr) -> Candidate {
        Candidate {
            foundation: "3".into(),
            transport: CandidateTransport::Udp,
            priority: 41_885_439,
            address,
            kind: CandidateKind::Relayed,
        }
    }

    /// Returns the candidate as `RTCIceCandidateInit` JSON, for a trickle message.
    pub fn to_init(&self) -> String {
        // A candidate's text has no character that JSON escapes, because the foundation was checked
        // when it was read.
        format!(r#"{{"candidate":"{self}","sdpMid":"0","sdpMLineIndex":0}}"#)
    }
}

impl FromStr for Candidate {
    type Err = &'static str;

    /// Reads `candidate:..`, with or without `a=` before it. Host names instead of addresses (mDNS)
    /// and other components are refused.
    fn from_str(text: &str) -> Result<Candidate, &'static str> {
        let text = text.strip_prefix("a=").unwrap_or(text);
        let mut words = text
            .strip_prefix("candidate:")
            .ok_or("no candidate")?
            .split_ascii_whitespace();
        let mut word = || words.next().ok_or("the candidate ends early");
        let foundation = word()?;
        if foundation.len() > MID_BYTES_MAX
            || !foundation
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'+' || b == b'/' || b == b'-')
        {
            return Err("the foundation is none");
        }
        if word()? != "1" {
            return Err("not component 1");
        }
        let is_tcp = match word()? {
            udp if udp.eq_ignore_ascii_case("udp") => false,
            tcp if tcp.eq_ignore_ascii_case("tcp") => true,
            _ => return Err("neither udp nor tcp"),
        };
        let priority = word()?.parse().map_err(|_| "the priority is no number")?;
        let ip: IpAddr = word()?.parse().map_err(|_| "no IP address")?;
        let port: u16 = word()?.parse().map_err(|_| "no port")?;
        if word()? != "typ" {
            return Err("no type");
        }
        let kind = word()?;
        let kind = CandidateKind::ALL
            .into_iter()
            .find(|known| known.as_str() == kind)
            .ok_or("an unknown type")?;
        let transport = if is_tcp {
            CandidateTransport::of_tcp(words).ok_or("tcp without its type")?
        } else {
            CandidateTransport::Udp
        };
        Ok(Candidate {
            foundation: foundation.to_owned(),
            transport,
            priority,
            address: SocketAddr::new(ip, port),
            kind,
        })
    }
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tcp_type = self.transport.tcp_type();
        let transport = if tcp_type.is_some() { "tcp" } else { "udp" };
        let (ip, port) = (self.address.ip(), self.address.port());
        write!(
            f,
            "candidate:{} 1 {transport} {} {ip} {port} typ {}",
            self.foundation,
            self.priority,
            self.kind.as_str()
        )?;
        if self.kind == CandidateKind::Relayed {
            let any = if ip.is_ipv6() { "::" } else { "0.0.0.0" };
            write!(f, " raddr {any} rport 0")?;
        }
        match tcp_type {
            Some(tcp_type) => write!(f, " tcptype {tcp_type}"),
            None => Ok(()),
        }
    }
}

/// Trickled candidate: `RTCIceCandidateInit` as JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trickled {
    /// Candidate; `None` if no more candidates follow.
    pub candidate: Option<Candidate>,
    /// ICE generation that it belongs to, if the peer names it.
    pub ufrag: Option<String>,
}

/// Error returned when a text is no trickled candidate.
#[derive(Debug, thiserror::Error)]
pub enum MalformedTrickle {
    #[error("a candidate of {0} bytes")]
    TooLong(usize),
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    #[error("{0}")]
    Candidate(&'static str),
}

impl FromStr for Trickled {
    type Err = MalformedTrickle;

    fn from_str(json: &str) -> Result<Trickled, MalformedTrickle> {
        #[derive(serde::Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Init {
            candidate: String,
            username_fragment: Option<String>,
        }
        if json.len() > 4096 {
            return Err(MalformedTrickle::TooLong(json.len()));
        }
        let init: Init = serde_json::from_str(json)?;
        let candidate = match init.candidate.as_str() {
            "" => None,
            text => Some(text.parse().map_err(MalformedTrickle::Candidate)?),
        };
        Ok(Trickled {
            candidate,
            ufrag: init.username_fragment.filter(|ufrag| !ufrag.is_empty()),
        })
    }
}

/// RTP header extensions that this crate can read or write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extension {
    Mid,
    Rid,
    RepairedRid,
    AudioLevel,
    AbsSendTime,
    TransportCc,
    AbsCaptureTime,
    PlayoutDelay,
    DependencyDescriptor,
}

impl Extension {
    pub const ALL: [Extension; 9] = [
        Extension::Mid,
        Extension::Rid,
        Extension::RepairedRid,
        Extension::AudioLevel,
        Extension::AbsSendTime,
        Extension::TransportCc,
        Extension::AbsCaptureTime,
        Extension::PlayoutDelay,
        Extension::DependencyDescriptor,
    ];

    pub fn uri(self) -> &'static str {
        match self {
            Extension::Mid => "urn:ietf:params:rtp-hdrext:sdes:mid",
            Extension::Rid => "urn:ietf:params:rtp-hdrext:sdes:rtp-stream-id",
            Extension::RepairedRid => "urn:ietf:params:rtp-hdrext:sdes:repaired-rtp-stream-id",
            Extension::AudioLevel => "urn:ietf:params:rtp-hdrext:ssrc-audio-level",
            Extension::AbsSendTime => "http://www.webrtc.org/experiments/rtp-hdrext/abs-send-time",
            Extension::TransportCc => {
                "http://www.ietf.org/id/draft-holmer-rmcat-transport-wide-cc-extensions-01"
            }
            Extension::AbsCaptureTime => {
                "http://www.webrtc.org/experiments/rtp-hdrext/abs-capture-time"
            }
            Extension::PlayoutDelay => "http://www.webrtc.org/experiments/rtp-hdrext/playout-delay",
            Extension::DependencyDescriptor => {
                "https://aomediacodec.github.io/av1-rtp-spec/#dependency-descriptor-rtp-header-extension"
            }
        }
    }

    /// Returns the id in our own offers. It is the same in every section, as BUNDLE requires, and
    /// small enough for one-byte headers.
    pub fn offered_id(self) -> u8 {
        self as u8 + 1
    }

    fn from_uri(uri: &str) -> Option<Extension> {
        Extension::ALL
            .into_iter()
            .find(|extension| extension.uri() == uri)
    }
}

/// Ids that one media section gives to header extensions (RFC 8285): 1-14, or up to 255 with
/// two-byte headers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExtensionIds([u8; Extension::ALL.len()]);

impl ExtensionIds {
    pub fn id(&self, extension: Extension) -> Option<u8> {
        self.0
            .get(extension as usize)
            .copied()
            .filter(|id| *id != 0)
    }

    fn set(&mut self, extension: Extension, id: u8) {
        if let Some(slot) = self.0.get_mut(extension as usize) {
            *slot = id;
        }
    }
}

impl FromIterator<(Extension, u8)> for ExtensionIds {
    fn from_iter<I: IntoIterator<Item = (Extension, u8)>>(ids: I) -> ExtensionIds {
        let mut all = ExtensionIds::default();
        ids.into_iter()
            .for_each(|(extension, id)| all.set(extension, id));
        all
    }
}

/// Set of feedback messages: bit `1 << feedback as u8` for each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FeedbackSet(u8);

impl FeedbackSet {
    pub fn contains(self, feedback: RtcpFeedback) -> bool {
        self.0 & (1 << feedback as u8) != 0
    }

    /// Returns the messages in either set.
    pub fn union(self, other: FeedbackSet) -> FeedbackSet {
        FeedbackSet(self.0 | other.0)
    }
}

impl FromIterator<RtcpFeedback> for FeedbackSet {
    fn from_iter<I: IntoIterator<Item = RtcpFeedback>>(feedback: I) -> FeedbackSet {
        let bits = feedback.into_iter().map(|feedback| 1 << feedback as u8);
        FeedbackSet(bits.fold(0, |all, bit| all | bit))
    }
}

/// Codecs, extensions and feedback that a description may offer or accept.
#[derive(Clone, Copy, Debug)]
pub struct Capabilities {
    /// Codecs, the preferred ones first.
    pub codecs: &'static [Codec],
    /// Which codec of a section is chosen.
    pub preference: Preference,
    pub extensions: &'static [Extension],
    pub feedback: &'static [RtcpFeedback],
}

impl Capabilities {
    /// Capabilities for receiving from an SFU.
    pub const SUBSCRIBER: Capabilities = Capabilities {
        codecs: &[Codec::Red, Codec::Opus, Codec::Vp8],
        preference: Preference::Ours,
        extensions: &[
            Extension::Mid,
            Extension::AudioLevel,
            Extension::AbsSendTime,
            Extension::TransportCc,
        ],
        feedback: &[
            RtcpFeedback::Nack,
            RtcpFeedback::NackPli,
            RtcpFeedback::CcmFir,
            RtcpFeedback::GoogRemb,
            RtcpFeedback::TransportCc,
        ],
    };
    /// Capabilities for sending to an SFU. The rid extensions are offered with simulcast only.
    pub const PUBLISHER: Capabilities = Capabilities {
        extensions: &[
            Extension::Mid,
            Extension::Rid,
            Extension::RepairedRid,
            Extension::AudioLevel,
            Extension::TransportCc,
        ],
        // The first codec of the answer is the one to send.
        preference: Preference::Theirs,
        ..Capabilities::SUBSCRIBER
    };
}

/// Side whose order of codecs decides if a section has several that we know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preference {
    Ours,
    Theirs,
}

/// Local end of one peer connection.
#[derive(Clone, Debug)]
pub struct LocalTransport {
    pub ufrag: String,
    pub pwd: String,
    pub fingerprint: Fingerprint,
    /// DTLS role. Offers contain it unchanged; answers use it if the offer says `actpass`.
    pub setup: DtlsSetup,
    pub candidates: Vec<Candidate>,
    /// Session id in `o=`: any number below 2^63 (RFC 9429, section 5.2.1), the same in all
    /// descriptions of the connection.
    pub session_id: u64,
}

/// Remote end of a connection, as its description gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteTransport {
    pub ufrag: String,
    pub pwd: String,
    pub fingerprint: Fingerprint,
    pub setup: DtlsSetup,
    pub ice_lite: bool,
    /// UDP candidates, in the order of the description.
    pub candidates: Vec<Candidate>,
    pub tcp_candidates: Vec<Candidate>,
    /// Whether no more candidates will be trickled.
    pub end_of_candidates: bool,
}

/// Track that the other side sends, or sent before its section became inactive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteTrack {
    pub mid: Box<str>,
    pub ssrc: Ssrc,
    pub rtx_ssrc: Option<Ssrc>,
    pub payloads: PayloadTypes,
    pub rtx_payload_type: Option<u8>,
    /// First part of `a=msid`. LiveKit writes `PARTICIPANT_SID|TRACK_SID` or the publisher's
    /// stream.
    pub stream_id: Box<str>,
    /// Second part of `a=msid`: LiveKit's track sid.
    pub track_id: Box<str>,
    /// Whether it can send: our answer accepts the section, and the direction is `sendonly` or
    /// `sendrecv`.
    pub active: bool,
    /// Extensions that the answer accepts.
    pub extensions: ExtensionIds,
    /// Feedback that we may send about the track: what was offered for its codec, as far as the
    /// answer accepts it.
    pub feedback: FeedbackSet,
}

impl RemoteTrack {
    pub fn kind(&self) -> Kind {
        self.payloads.codec.kind()
    }

    fn is_same_source(&self, other: &RemoteTrack) -> bool {
        let source = |track: &RemoteTrack| (track.kind(), track.ssrc);
        source(self) == source(other)
            && self.mid == other.mid
            && self.stream_id == other.stream_id
            && self.track_id == other.track_id
    }
}
