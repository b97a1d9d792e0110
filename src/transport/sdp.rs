//! Session descriptions (RFC 8866, RFC 9429), as far as an SFU's client needs them.
//!
//! [`Answerer`] answers an SFU's offers *incrementally*. In a large room every new track brings an offer that repeats all the others, 1.8 KB each: a section
//! whose text is that of the last offer is recognised by its hash and not read again. A section that is new is scanned once, line by line, without building
//! a tree; a general SDP library takes ten times as long for it, and its tree is dropped at once.
//!
//! [`publisher_offer`] writes our own offer, [`RemoteAnswer`] reads the answer to it. All input is hostile until read: sizes and counts are bounded, nothing
//! panics, and no text reaches an answer that was not checked to be harmless there.

use std::fmt::{self, Write as _};
use std::hash::{DefaultHasher, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use crate::measure::Kind;

/// An offer of 3,000 tracks takes 5.5 MB.
pub const SDP_BYTES_MAX: usize = 16 << 20;
pub const SECTIONS_MAX: usize = 10_000;
/// A section takes 1-2 KB, one with every codec of a browser 10 KB.
pub const SECTION_BYTES_MAX: usize = 64 << 10;
/// A section names at most as many as there are payload types.
const PAYLOAD_TYPES_MAX: usize = 128;
/// Candidates beyond these are not read: a server has a few per interface.
const CANDIDATES_MAX: usize = 64;
/// A `mid` must fit a one-byte header extension (RFC 8843, section 15); ours and all known ones are far shorter.
const MID_BYTES_MAX: usize = 32;
/// Identifiers (msid, ufrag, pwd) and format parameters that are longer are not kept.
const TEXT_BYTES_MAX: usize = 256;

/// Payload types of our own offers.
pub const OPUS_PAYLOAD_TYPE: u8 = 111;
pub const VP8_PAYLOAD_TYPE: u8 = 96;
pub const VP8_RTX_PAYLOAD_TYPE: u8 = 97;

/// Why a description is refused as a whole.
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
    #[error("the description lacks {what}")]
    Missing { what: &'static str },
}

/// Which side opens the DTLS handshake (RFC 8842): `a=setup`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setup {
    Active,
    Passive,
    /// Only in offers: the answerer chooses.
    ActPass,
}

impl Setup {
    fn parse(text: &str) -> Option<Setup> {
        [Setup::Active, Setup::Passive, Setup::ActPass]
            .into_iter()
            .find(|setup| setup.as_str() == text)
    }

    fn as_str(self) -> &'static str {
        match self {
            Setup::Active => "active",
            Setup::Passive => "passive",
            Setup::ActPass => "actpass",
        }
    }

    /// Our role in an answer: what the offer leaves open goes by our own preference.
    fn answer(offered: Setup, preferred: Setup) -> Setup {
        match (offered, preferred) {
            (Setup::Active, _) | (Setup::ActPass, Setup::Passive) => Setup::Passive,
            (Setup::Passive | Setup::ActPass, _) => Setup::Active,
        }
    }
}

/// SHA-256 of a DTLS certificate. Other hashes are not spoken by anything that we meet.
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

/// A candidate's transport: `udp`, or `tcp` with what RFC 6544 calls its type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CandidateTransport {
    Udp,
    Tcp,
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

/// One ICE candidate of component 1 (RFC 8839, section 5.1), without what nobody reads (related address, extensions).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub foundation: String,
    pub transport: CandidateTransport,
    pub priority: u32,
    pub address: SocketAddr,
    pub kind: CandidateKind,
}

impl Candidate {
    /// A UDP host candidate with the priority that RFC 8445, section 5.1.2.1 recommends for an only address.
    pub fn host(address: SocketAddr) -> Candidate {
        Candidate {
            foundation: "1".into(),
            transport: CandidateTransport::Udp,
            priority: 2_130_706_431,
            address,
            kind: CandidateKind::Host,
        }
    }

    /// As `RTCIceCandidateInit` JSON, for a trickle message.
    pub fn to_init(&self) -> String {
        // A candidate's text holds no character that JSON escapes: the foundation was checked when it was read.
        format!(r#"{{"candidate":"{self}","sdpMid":"0","sdpMLineIndex":0}}"#)
    }
}

impl FromStr for Candidate {
    type Err = &'static str;

    /// Reads `candidate:..`, with or without `a=` before it. Names instead of addresses (mDNS) and other components are refused.
    fn from_str(text: &str) -> Result<Candidate, &'static str> {
        let text = text.strip_prefix("a=").unwrap_or(text);
        let mut words = text.strip_prefix("candidate:").ok_or("no candidate")?.split_ascii_whitespace();
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
        let transport = match word()? {
            udp if udp.eq_ignore_ascii_case("udp") => CandidateTransport::Udp,
            tcp if tcp.eq_ignore_ascii_case("tcp") => CandidateTransport::Tcp,
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
        let transport = if self.transport == CandidateTransport::Udp { "udp" } else { "tcp" };
        let (ip, port) = (self.address.ip(), self.address.port());
        write!(
            f,
            "candidate:{} 1 {transport} {} {ip} {port} typ {}",
            self.foundation,
            self.priority,
            self.kind.as_str()
        )
    }
}

/// A trickled candidate: `RTCIceCandidateInit` as JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trickled {
    /// `None`: no more candidates follow.
    pub candidate: Option<Candidate>,
    /// The generation that it belongs to, where the peer says so.
    pub ufrag: Option<String>,
}

impl FromStr for Trickled {
    type Err = String;

    fn from_str(json: &str) -> Result<Trickled, String> {
        #[derive(serde::Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Init {
            candidate: String,
            username_fragment: Option<String>,
        }
        if json.len() > 4096 {
            return Err(format!("a candidate of {} bytes", json.len()));
        }
        let init: Init = serde_json::from_str(json).map_err(|error| error.to_string())?;
        let candidate = match init.candidate.as_str() {
            "" => None,
            text => Some(text.parse::<Candidate>().map_err(str::to_owned)?),
        };
        Ok(Trickled {
            candidate,
            ufrag: init.username_fragment.filter(|ufrag| !ufrag.is_empty()),
        })
    }
}

/// RTP header extensions that somebody in this crate can read or write.
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
            Extension::TransportCc => "http://www.ietf.org/id/draft-holmer-rmcat-transport-wide-cc-extensions-01",
            Extension::AbsCaptureTime => "http://www.webrtc.org/experiments/rtp-hdrext/abs-capture-time",
            Extension::PlayoutDelay => "http://www.webrtc.org/experiments/rtp-hdrext/playout-delay",
            Extension::DependencyDescriptor => "https://aomediacodec.github.io/av1-rtp-spec/#dependency-descriptor-rtp-header-extension",
        }
    }

    /// Its id in our own offers: the same in every section, as BUNDLE demands, and small enough for one-byte headers.
    pub fn offered_id(self) -> u8 {
        self as u8 + 1
    }

    fn from_uri(uri: &str) -> Option<Extension> {
        Extension::ALL.into_iter().find(|extension| extension.uri() == uri)
    }
}

/// The ids that one media section gives to header extensions (RFC 8285): 1-14, or up to 255 with two-byte headers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExtensionIds([u8; Extension::ALL.len()]);

impl ExtensionIds {
    pub fn id(&self, extension: Extension) -> Option<u8> {
        self.0.get(extension as usize).copied().filter(|id| *id != 0)
    }

    fn set(&mut self, extension: Extension, id: u8) {
        if let Some(slot) = self.0.get_mut(extension as usize) {
            *slot = id;
        }
    }
}

/// RTCP feedback messages (RFC 4585, RFC 5104, and two drafts).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feedback {
    Nack,
    NackPli,
    CcmFir,
    GoogRemb,
    TransportCc,
}

impl Feedback {
    pub const ALL: [Feedback; 5] = [
        Feedback::Nack,
        Feedback::NackPli,
        Feedback::CcmFir,
        Feedback::GoogRemb,
        Feedback::TransportCc,
    ];

    fn as_str(self) -> &'static str {
        match self {
            Feedback::Nack => "nack",
            Feedback::NackPli => "nack pli",
            Feedback::CcmFir => "ccm fir",
            Feedback::GoogRemb => "goog-remb",
            Feedback::TransportCc => "transport-cc",
        }
    }

    /// Bit `1 << self as u8` of a [`FeedbackSet`].
    fn from_text(text: &str) -> Option<Feedback> {
        Feedback::ALL.into_iter().find(|feedback| feedback.as_str() == text.trim())
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FeedbackSet(u8);

impl FeedbackSet {
    pub fn contains(self, feedback: Feedback) -> bool {
        self.0 & (1 << feedback as u8) != 0
    }

    fn insert(&mut self, feedback: Feedback) {
        self.0 |= 1 << feedback as u8;
    }
}

/// What a description may promise, because we do it. Names are those of `a=rtpmap`, in any case.
#[derive(Clone, Copy, Debug)]
pub struct Capabilities {
    pub audio_codecs: &'static [&'static str],
    pub video_codecs: &'static [&'static str],
    pub extensions: &'static [Extension],
    pub feedback: &'static [Feedback],
}

impl Capabilities {
    /// Receiving from an SFU.
    pub const SUBSCRIBER: Capabilities = Capabilities {
        audio_codecs: &["opus"],
        video_codecs: &["VP8"],
        extensions: &[Extension::Mid, Extension::AudioLevel, Extension::AbsSendTime],
        feedback: &[Feedback::Nack, Feedback::NackPli, Feedback::CcmFir],
    };
    /// Sending to an SFU. The rid extensions are offered with simulcast only.
    pub const PUBLISHER: Capabilities = Capabilities {
        extensions: &[Extension::Mid, Extension::Rid, Extension::RepairedRid, Extension::AudioLevel],
        ..Capabilities::SUBSCRIBER
    };

    fn codecs(&self, kind: Kind) -> &'static [&'static str] {
        match kind {
            Kind::Audio => self.audio_codecs,
            Kind::Video => self.video_codecs,
        }
    }
}

/// Our end of one peer connection.
#[derive(Clone, Debug)]
pub struct LocalTransport {
    pub ufrag: String,
    pub pwd: String,
    pub fingerprint: Fingerprint,
    /// In offers as it is; in answers our choice where the offer says `actpass`.
    pub setup: Setup,
    pub candidates: Vec<Candidate>,
    /// `o=`'s session id: any number below 2^63 (RFC 9429, section 5.2.1), the same for all descriptions of the connection.
    pub session_id: u64,
}

/// The other end, as its description gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteTransport {
    pub ufrag: String,
    pub pwd: String,
    pub fingerprint: Fingerprint,
    pub setup: Setup,
    pub ice_lite: bool,
    /// UDP candidates, in the order of the description.
    pub candidates: Vec<Candidate>,
    pub tcp_candidates: Vec<Candidate>,
    /// No more candidates will be trickled.
    pub end_of_candidates: bool,
}

/// A track that the other side sends, or sent before its section went inactive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteTrack {
    pub mid: Box<str>,
    pub kind: Kind,
    pub ssrc: u32,
    pub rtx_ssrc: Option<u32>,
    pub payload_type: u8,
    pub rtx_payload_type: Option<u8>,
    pub clock_rate: u32,
    /// The first part of `a=msid`; LiveKit writes `PARTICIPANT_SID|TRACK_SID` or the publisher's stream.
    pub stream_id: Box<str>,
    /// The second part of `a=msid`: LiveKit's track sid.
    pub track_id: Box<str>,
    /// Whether it can send: our answer takes the section, and the direction is `sendonly` or `sendrecv`.
    pub active: bool,
    /// Only those that the answer accepts.
    pub extensions: ExtensionIds,
}

impl RemoteTrack {
    fn is_same_source(&self, other: &RemoteTrack) -> bool {
        let source = |track: &RemoteTrack| (track.kind, track.ssrc);
        source(self) == source(other) && self.mid == other.mid && self.stream_id == other.stream_id && self.track_id == other.track_id
    }
}

/// What came of one offer.
#[derive(Clone, Debug)]
pub struct Answered {
    pub sdp: String,
    pub remote: RemoteTransport,
    /// Our DTLS role.
    pub setup: Setup,
    /// Tracks that became active with this offer. One that took a section over from another is here, the other in `removed`.
    pub added: Vec<RemoteTrack>,
    /// Tracks of the last offer that are inactive, gone or replaced now, as they were.
    pub removed: Vec<RemoteTrack>,
    /// Tracks that go on with the same mid, SSRC and names, but other payload types, extension ids or RTX: a server offers all that it has at first, and
    /// what we took of it from then on.
    pub updated: Vec<RemoteTrack>,
    /// Sections that would send but have no codec in common with us, no `a=ssrc`, or no place in the bundle. All but the second kind are rejected.
    pub unusable: usize,
    /// Sections that were read, the others being unchanged.
    pub sections_read: usize,
}

/// Answers the offers of one peer connection, one after the other.
pub struct Answerer {
    capabilities: Capabilities,
    sections: Vec<Section>,
    version: u64,
}

impl Answerer {
    pub fn new(capabilities: Capabilities) -> Answerer {
        Answerer {
            capabilities,
            sections: Vec::new(),
            version: 0,
        }
    }

    /// Answers `offer` for our end `local`. After an error the state is that before the offer.
    pub fn answer(&mut self, offer: &str, local: &LocalTransport) -> Result<Answered, SdpError> {
        let split = SplitDescription::new(offer)?;
        let changed = self.read_changed(&split.sections)?;
        let session = SessionPart::parse(split.session);
        let plan = AnswerPlan::new(&self.sections, &changed, split.sections.len(), &session)?;
        let remote = split.remote_transport(plan.tagged)?;

        let sections_read = changed.len();
        let diff = self.replace(changed, &plan.accepted);
        let unusable = self
            .sections
            .iter()
            .filter(|section| section.sends() && section.active_track().is_none())
            .count();
        self.version += 1;
        let setup = Setup::answer(remote.setup, local.setup);
        let sdp = AnswerWriter {
            local,
            setup,
            tagged: plan.tagged,
        }
        .write(&self.sections, self.version);
        Ok(Answered {
            sdp,
            remote,
            setup,
            added: diff.added,
            removed: diff.removed,
            updated: diff.updated,
            unusable,
            sections_read,
        })
    }

    /// The tracks that are active after the last offer, in the order of its sections.
    pub fn tracks(&self) -> impl Iterator<Item = &RemoteTrack> {
        self.sections.iter().filter_map(Section::active_track)
    }

    /// The sections that differ from the last offer's, read, with their index, in order.
    fn read_changed(&self, texts: &[&str]) -> Result<Vec<(usize, Section)>, SdpError> {
        let mut changed = Vec::new();
        for (index, text) in texts.iter().enumerate() {
            let stamp = Stamp::of(text);
            if self.sections.get(index).is_none_or(|known| known.stamp != stamp) {
                changed.push((
                    index,
                    Section::parse(text, stamp, &self.capabilities).map_err(|what| SdpError::Section { index, what })?,
                ));
            }
        }
        Ok(changed)
    }

    /// Takes the changed sections over and says which tracks came and went.
    fn replace(&mut self, changed: Vec<(usize, Section)>, accepted: &[bool]) -> Diff {
        let mut diff = Diff::default();
        // Offers never lose sections (RFC 9429, section 5.2.2); if one does, their tracks are gone.
        let lost = self.sections.split_off(accepted.len().min(self.sections.len()));
        lost.into_iter().for_each(|section| diff.note(section.into_active_track(), None));
        let mut changed = changed.into_iter().peekable();
        for (index, accepted) in accepted.iter().enumerate() {
            let fresh = changed.next_if(|(at, _)| *at == index).map(|(_, section)| section.accept(*accepted));
            match (self.sections.get_mut(index), fresh) {
                (Some(slot), None) if slot.accepted == *accepted => {}
                (Some(slot), fresh) => {
                    let new = fresh.unwrap_or_else(|| slot.clone().accept(*accepted));
                    let new_track = new.active_track().cloned();
                    diff.note(std::mem::replace(slot, new).into_active_track(), new_track);
                }
                (None, fresh) => {
                    diff.note(None, fresh.as_ref().and_then(Section::active_track).cloned());
                    self.sections.extend(fresh);
                }
            }
        }
        diff
    }
}

/// What one offer did to the active tracks.
#[derive(Default)]
struct Diff {
    added: Vec<RemoteTrack>,
    removed: Vec<RemoteTrack>,
    updated: Vec<RemoteTrack>,
}

impl Diff {
    /// A section's track before and after the offer.
    fn note(&mut self, old: Option<RemoteTrack>, new: Option<RemoteTrack>) {
        match (old, new) {
            (old, new) if old == new => {}
            (Some(old), Some(new)) if old.is_same_source(&new) => self.updated.push(new),
            (old, new) => {
                self.removed.extend(old);
                self.added.extend(new);
            }
        }
    }
}

/// What stands for a section's text until the next offer: 64 bits of SipHash and the length. A server that makes them collide only hides its own track.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    hash: u64,
    len: u32,
}

impl Stamp {
    fn of(text: &str) -> Stamp {
        let mut hasher = DefaultHasher::new();
        hasher.write(text.as_bytes());
        Stamp {
            hash: hasher.finish(),
            len: u32::try_from(text.len()).unwrap_or(u32::MAX),
        }
    }
}

/// A description, cut at its m-lines.
struct SplitDescription<'a> {
    session: &'a str,
    sections: Vec<&'a str>,
}

impl<'a> SplitDescription<'a> {
    fn new(text: &'a str) -> Result<SplitDescription<'a>, SdpError> {
        if text.len() > SDP_BYTES_MAX {
            return Err(SdpError::TooLarge { bytes: text.len() });
        }
        let (session, mut rest) = split_at_media(text);
        let mut sections = Vec::new();
        while !rest.is_empty() {
            if sections.len() == SECTIONS_MAX {
                return Err(SdpError::TooManySections);
            }
            let (section, next) = split_at_media_after_first(rest);
            if section.len() > SECTION_BYTES_MAX {
                return Err(SdpError::SectionTooLarge { index: sections.len() });
            }
            sections.push(section);
            rest = next;
        }
        Ok(SplitDescription { session, sections })
    }

    /// ICE and DTLS parameters: those of the section that carries the bundle, the session's where it has none.
    fn remote_transport(&self, tagged: usize) -> Result<RemoteTransport, SdpError> {
        let mut scan = TransportScan::default();
        for text in [Some(&self.session), self.sections.get(tagged)].into_iter().flatten() {
            attributes(text).for_each(|(name, value)| scan.attribute(name, value));
        }
        scan.finish()
    }
}

/// What precedes the first m-line, and the rest.
fn split_at_media(text: &str) -> (&str, &str) {
    match text.starts_with("m=") {
        true => ("", text),
        false => split_at_media_after_first(text),
    }
}

/// The text up to the next line but the first that begins with `m=`, and the rest.
fn split_at_media_after_first(text: &str) -> (&str, &str) {
    let end = text.find("\nm=").map_or(text.len(), |newline| newline + 1);
    text.split_at_checked(end).unwrap_or((text, ""))
}

fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.split('\n').map(|line| line.strip_suffix('\r').unwrap_or(line))
}

/// The `a=` lines as name and value; the value is empty for a flag.
fn attributes(text: &str) -> impl Iterator<Item = (&str, &str)> {
    lines(text)
        .filter_map(|line| line.strip_prefix("a="))
        .map(|attribute| attribute.split_once(':').unwrap_or((attribute, "")))
}

/// Collects ICE and DTLS attributes; later ones win, so the media section is scanned after the session.
#[derive(Default)]
struct TransportScan {
    ufrag: Option<String>,
    pwd: Option<String>,
    fingerprint: Option<Fingerprint>,
    setup: Option<Setup>,
    ice_lite: bool,
    candidates: Vec<Candidate>,
    tcp_candidates: Vec<Candidate>,
    end_of_candidates: bool,
}

impl TransportScan {
    fn attribute(&mut self, name: &str, value: &str) {
        match name {
            "ice-ufrag" => self.ufrag = ice_text(value).or(self.ufrag.take()),
            "ice-pwd" => self.pwd = ice_text(value).or(self.pwd.take()),
            "fingerprint" => self.fingerprint = value.parse().ok().or(self.fingerprint),
            "setup" => self.setup = Setup::parse(value).or(self.setup),
            "ice-lite" => self.ice_lite = true,
            "end-of-candidates" => self.end_of_candidates = true,
            "candidate" => self.candidate(value),
            _ => {}
        }
    }

    fn candidate(&mut self, value: &str) {
        if self.candidates.len() + self.tcp_candidates.len() >= CANDIDATES_MAX {
            return;
        }
        if let Ok(candidate) = format!("candidate:{value}").parse::<Candidate>() {
            match candidate.transport {
                CandidateTransport::Udp => self.candidates.push(candidate),
                CandidateTransport::Tcp => self.tcp_candidates.push(candidate),
            }
        }
    }

    fn finish(self) -> Result<RemoteTransport, SdpError> {
        Ok(RemoteTransport {
            ufrag: self.ufrag.ok_or(SdpError::Missing { what: "an ice-ufrag" })?,
            pwd: self.pwd.ok_or(SdpError::Missing { what: "an ice-pwd" })?,
            fingerprint: self.fingerprint.ok_or(SdpError::Missing {
                what: "a sha-256 fingerprint",
            })?,
            setup: self.setup.ok_or(SdpError::Missing { what: "a DTLS setup role" })?,
            ice_lite: self.ice_lite,
            candidates: self.candidates,
            tcp_candidates: self.tcp_candidates,
            end_of_candidates: self.end_of_candidates,
        })
    }
}

/// `ice-char`s only (RFC 8839, section 5.4), at most 256.
fn ice_text(value: &str) -> Option<String> {
    let fine = !value.is_empty() && value.len() <= TEXT_BYTES_MAX && value.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'+' || b == b'/');
    fine.then(|| value.to_owned())
}

/// The part of an offer before its first m-line, as far as an answer depends on it.
struct SessionPart<'a> {
    /// The mids of the BUNDLE group, sorted.
    bundle: Vec<&'a str>,
}

impl<'a> SessionPart<'a> {
    fn parse(text: &'a str) -> SessionPart<'a> {
        let group = attributes(text).find_map(|(name, value)| value.strip_prefix("BUNDLE").filter(|_| name == "group"));
        let mut bundle: Vec<&str> = group.unwrap_or_default().split_ascii_whitespace().collect();
        bundle.sort_unstable();
        SessionPart { bundle }
    }
}

/// Which sections the answer accepts, decided before any state changes.
struct AnswerPlan {
    accepted: Vec<bool>,
    /// The first accepted section: it carries the bundle's transport.
    tagged: usize,
}

impl AnswerPlan {
    fn new(known: &[Section], changed: &[(usize, Section)], count: usize, session: &SessionPart<'_>) -> Result<AnswerPlan, SdpError> {
        let mut fresh = changed.iter().peekable();
        let (mut accepted, mut mids) = (Vec::with_capacity(count), Vec::with_capacity(count));
        for index in 0..count {
            let section = match fresh.next_if(|(at, _)| *at == index) {
                Some((_, section)) => section,
                None => known.get(index).ok_or(SdpError::NoSections)?,
            };
            accepted.push(section.acceptable() && session.bundle.binary_search(&&*section.mid).is_ok());
            mids.push(&*section.mid);
        }
        refuse_duplicates(mids)?;
        let tagged = accepted.iter().position(|accepted| *accepted).ok_or(SdpError::NoSections)?;
        Ok(AnswerPlan { accepted, tagged })
    }
}

/// Rejected sections may go without a mid, all others have different ones.
fn refuse_duplicates(mut mids: Vec<&str>) -> Result<(), SdpError> {
    mids.sort_unstable();
    match mids.windows(2).find(|pair| matches!(pair, [a, b] if a == b && !a.is_empty())) {
        Some(pair) => Err(SdpError::DuplicateMid {
            mid: pair.first().copied().unwrap_or_default().to_owned(),
        }),
        None => Ok(()),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    SendRecv,
    SendOnly,
    RecvOnly,
    Inactive,
}

/// What a media section carries.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Content {
    Rtp(Kind),
    /// Data channels, on this SCTP port.
    Application(u16),
    /// Anything else is rejected under its own name.
    Other(Box<str>),
}

/// The codec that the answer takes from a section.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Codec {
    payload_type: u8,
    rtx_payload_type: Option<u8>,
    /// What `a=rtpmap` says of it, `opus/48000/2`.
    map: Box<str>,
    clock_rate: u32,
    /// Its `a=fmtp` parameters, empty if there are none.
    parameters: Box<str>,
    feedback: FeedbackSet,
}

/// A media section, read: about 300 bytes with its texts, where the text itself takes 1.8 KB.
#[derive(Clone, Debug)]
struct Section {
    stamp: Stamp,
    content: Content,
    mid: Box<str>,
    /// The port is 0.
    rejected: bool,
    /// Whether our answer takes it.
    accepted: bool,
    direction: Direction,
    reduced_size: bool,
    codec: Option<Codec>,
    /// A payload type to name when the section is rejected.
    first_format: Box<str>,
    extensions: ExtensionIds,
    track: Option<Box<RemoteTrack>>,
}

impl Section {
    fn parse(text: &str, stamp: Stamp, capabilities: &Capabilities) -> Result<Section, &'static str> {
        let media = lines(text).next().and_then(MediaLine::parse).ok_or("its m-line cannot be read")?;
        let mut scan = SectionScan::default();
        attributes(text).for_each(|(name, value)| scan.attribute(name, value));

        let mid = match scan.mid {
            Some(mid) if is_token(mid) && mid.len() <= MID_BYTES_MAX => mid,
            None if media.port == 0 => "",
            _ => return Err("it has no usable mid"),
        };
        let content = media.content(scan.sctp_port);
        let codec = match content {
            Content::Rtp(kind) => scan.choose_codec(&media, capabilities.codecs(kind), capabilities.feedback),
            _ => None,
        };
        let direction = scan.direction.unwrap_or(Direction::SendRecv);
        let mut section = Section {
            stamp,
            content,
            mid: mid.into(),
            rejected: media.port == 0,
            accepted: false,
            direction,
            reduced_size: scan.reduced_size,
            codec,
            first_format: media.formats().next().filter(|format| is_token(format)).unwrap_or("0").into(),
            extensions: scan.accepted_extensions(capabilities),
            track: None,
        };
        section.track = section.read_track(&scan).map(Box::new);
        Ok(section)
    }

    fn read_track(&self, scan: &SectionScan<'_>) -> Option<RemoteTrack> {
        let (Content::Rtp(kind), Some(codec)) = (&self.content, &self.codec) else {
            return None;
        };
        let (ssrc, rtx_ssrc) = match scan.fid {
            Some((ssrc, rtx)) => (ssrc, Some(rtx)),
            None => (scan.ssrc?, None),
        };
        let (stream_id, track_id) = scan.msid.or(scan.ssrc_msid).map(split_msid).unwrap_or_default();
        Some(RemoteTrack {
            mid: self.mid.clone(),
            kind: *kind,
            ssrc,
            rtx_ssrc: rtx_ssrc.filter(|_| codec.rtx_payload_type.is_some()),
            payload_type: codec.payload_type,
            rtx_payload_type: codec.rtx_payload_type,
            clock_rate: codec.clock_rate,
            stream_id: stream_id.into(),
            track_id: track_id.into(),
            active: false,
            extensions: self.extensions,
        })
    }

    fn sends(&self) -> bool {
        !self.rejected && matches!(self.content, Content::Rtp(_)) && matches!(self.direction, Direction::SendOnly | Direction::SendRecv)
    }

    /// Whether our answer takes the section, provided that it is bundled.
    fn acceptable(&self) -> bool {
        let understood = match &self.content {
            Content::Rtp(_) => self.codec.is_some(),
            Content::Application(_) => true,
            Content::Other(_) => false,
        };
        understood && !self.rejected && !self.mid.is_empty()
    }

    fn accept(mut self, accepted: bool) -> Section {
        self.accepted = accepted;
        let active = accepted && self.sends();
        self.track.iter_mut().for_each(|track| track.active = active);
        self
    }

    fn active_track(&self) -> Option<&RemoteTrack> {
        self.track.as_deref().filter(|track| track.active)
    }

    fn into_active_track(self) -> Option<RemoteTrack> {
        self.track.map(|track| *track).filter(|track| track.active)
    }
}

/// `m=KIND PORT PROTOCOL FORMAT..`
struct MediaLine<'a> {
    kind: &'a str,
    port: u16,
    protocol: &'a str,
    formats: &'a str,
}

impl<'a> MediaLine<'a> {
    fn parse(line: &'a str) -> Option<MediaLine<'a>> {
        let mut words = line.strip_prefix("m=")?.splitn(4, ' ');
        let (kind, port, protocol) = (words.next()?, words.next()?, words.next()?);
        let kind = Some(kind).filter(|kind| is_token(kind) && kind.len() <= MID_BYTES_MAX)?;
        Some(MediaLine {
            kind,
            port: port.parse().ok()?,
            protocol,
            formats: words.next().unwrap_or_default(),
        })
    }

    fn formats(&self) -> impl Iterator<Item = &'a str> {
        self.formats.split_ascii_whitespace().take(PAYLOAD_TYPES_MAX)
    }

    fn content(&self, sctp_port: Option<u16>) -> Content {
        match (self.kind, self.protocol, sctp_port) {
            ("audio", "UDP/TLS/RTP/SAVPF", _) => Content::Rtp(Kind::Audio),
            ("video", "UDP/TLS/RTP/SAVPF", _) => Content::Rtp(Kind::Video),
            ("application", "UDP/DTLS/SCTP", Some(port)) => Content::Application(port),
            (other, ..) => Content::Other(other.into()),
        }
    }
}

/// What one pass over a section's attributes collects, by reference.
#[derive(Default)]
struct SectionScan<'a> {
    mid: Option<&'a str>,
    direction: Option<Direction>,
    sctp_port: Option<u16>,
    reduced_size: bool,
    /// Payload type and `NAME/CLOCK[/CHANNELS]`.
    maps: Vec<(u8, &'a str)>,
    parameters: Vec<(u8, &'a str)>,
    /// `None` stands for `*`.
    feedback: Vec<(Option<u8>, Feedback)>,
    extensions: ExtensionIds,
    ssrc: Option<u32>,
    fid: Option<(u32, u32)>,
    msid: Option<&'a str>,
    ssrc_msid: Option<&'a str>,
}

impl<'a> SectionScan<'a> {
    fn attribute(&mut self, name: &'a str, value: &'a str) {
        match name {
            "mid" => self.mid = Some(value),
            "sendrecv" => self.direction = Some(Direction::SendRecv),
            "sendonly" => self.direction = Some(Direction::SendOnly),
            "recvonly" => self.direction = Some(Direction::RecvOnly),
            "inactive" => self.direction = Some(Direction::Inactive),
            "sctp-port" => self.sctp_port = value.parse().ok(),
            "rtcp-rsize" => self.reduced_size = true,
            "rtpmap" if self.maps.len() < PAYLOAD_TYPES_MAX => self.maps.extend(payload_type_and_text(value)),
            "fmtp" if self.parameters.len() < PAYLOAD_TYPES_MAX => self.parameters.extend(payload_type_and_text(value)),
            "rtcp-fb" if self.feedback.len() < PAYLOAD_TYPES_MAX * Feedback::ALL.len() => self.feedback.extend(payload_type_and_feedback(value)),
            "extmap" => self.extension(value),
            "ssrc" => self.source(value),
            "ssrc-group" => self.fid = self.fid.or_else(|| fid(value)),
            "msid" => self.msid = Some(value),
            _ => {}
        }
    }

    /// `ID[/DIRECTION] URI [..]`
    fn extension(&mut self, value: &str) {
        let mut words = value.split_ascii_whitespace();
        let (Some(id), Some(extension)) = (words.next(), words.next().and_then(Extension::from_uri)) else {
            return;
        };
        let id = id.split('/').next().and_then(|id| id.parse::<u8>().ok());
        // 15 means "stop reading" in a one-byte header (RFC 8285, section 4.2).
        if let Some(id) = id.filter(|id| !matches!(id, 0 | 15)) {
            self.extensions.set(extension, id);
        }
    }

    /// `SSRC ATTRIBUTE[:VALUE]`
    fn source(&mut self, value: &'a str) {
        let (ssrc, attribute) = value.split_once(' ').unwrap_or((value, ""));
        self.ssrc = self.ssrc.or_else(|| ssrc.parse().ok());
        self.ssrc_msid = self.ssrc_msid.or_else(|| attribute.strip_prefix("msid:"));
    }

    /// The first payload type of the m-line whose codec is in `names`.
    fn choose_codec(&self, media: &MediaLine<'_>, names: &[&str], supported: &[Feedback]) -> Option<Codec> {
        let mut offered = media
            .formats()
            .filter_map(|format| format.parse::<u8>().ok())
            .filter(|payload_type| *payload_type < 128);
        let (payload_type, map) = offered.find_map(|payload_type| {
            let map = self.map(payload_type)?;
            names
                .iter()
                .any(|name| codec_name(map).eq_ignore_ascii_case(name))
                .then_some((payload_type, map))
        })?;
        let clock_rate = map.split('/').nth(1)?.parse().ok()?;
        let parameters = text_of(&self.parameters, payload_type)
            .filter(|text| is_harmless(text))
            .unwrap_or_default();
        let rtx = self.parameters.iter().find(|(rtx, parameters)| {
            apt(parameters) == Some(payload_type) && self.map(*rtx).is_some_and(|map| codec_name(map).eq_ignore_ascii_case("rtx"))
        });
        let mut feedback = FeedbackSet::default();
        for (_, found) in self
            .feedback
            .iter()
            .filter(|(target, found)| target.is_none_or(|target| target == payload_type) && supported.contains(found))
        {
            feedback.insert(*found);
        }
        let rtx_payload_type = rtx.map(|(rtx, _)| *rtx);
        Some(Codec {
            payload_type,
            rtx_payload_type,
            map: map.into(),
            clock_rate,
            parameters: parameters.into(),
            feedback,
        })
    }

    fn map(&self, payload_type: u8) -> Option<&'a str> {
        text_of(&self.maps, payload_type).filter(|map| is_harmless(map))
    }

    fn accepted_extensions(&self, capabilities: &Capabilities) -> ExtensionIds {
        let mut accepted = ExtensionIds::default();
        for extension in capabilities.extensions {
            if let Some(id) = self.extensions.id(*extension) {
                accepted.set(*extension, id);
            }
        }
        accepted
    }
}

fn text_of<'a>(entries: &[(u8, &'a str)], payload_type: u8) -> Option<&'a str> {
    entries.iter().find(|(of, _)| *of == payload_type).map(|(_, text)| *text)
}

/// `PT TEXT`; payload types have 7 bits.
fn payload_type_and_text(value: &str) -> Option<(u8, &str)> {
    let (payload_type, text) = value.split_once(' ')?;
    Some((payload_type.parse().ok().filter(|payload_type| *payload_type < 128)?, text))
}

fn payload_type_and_feedback(value: &str) -> Option<(Option<u8>, Feedback)> {
    let (target, text) = value.split_once(' ')?;
    let target = if target == "*" { None } else { Some(target.parse().ok()?) };
    Some((target, Feedback::from_text(text)?))
}

fn codec_name(map: &str) -> &str {
    map.split('/').next().unwrap_or_default()
}

/// The payload type that an RTX payload type repairs (RFC 4588, section 8.6).
fn apt(parameters: &str) -> Option<u8> {
    parameters
        .split(';')
        .find_map(|parameter| parameter.trim().strip_prefix("apt="))
        .and_then(|apt| apt.parse().ok())
}

/// `FID MEDIA RTX` (RFC 5576, section 4.2).
fn fid(value: &str) -> Option<(u32, u32)> {
    let mut words = value.strip_prefix("FID ")?.split_ascii_whitespace();
    Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}

fn split_msid(msid: &str) -> (&str, &str) {
    let (stream, track) = msid.split_once(' ').unwrap_or((msid, ""));
    let short = |text: &str| text.len() <= TEXT_BYTES_MAX;
    if short(stream) && short(track) {
        (stream, track.trim())
    } else {
        ("", "")
    }
}

/// RFC 8866's `token`.
fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic() && !br#""(),/:;<=>?@[\]"#.contains(&b))
}

/// May be repeated in an answer: printable, on one line, short.
fn is_harmless(text: &str) -> bool {
    text.len() <= TEXT_BYTES_MAX && text.bytes().all(|b| b == b' ' || b.is_ascii_graphic())
}

/// Writes an answer from sections that were read.
struct AnswerWriter<'a> {
    local: &'a LocalTransport,
    setup: Setup,
    tagged: usize,
}

impl AnswerWriter<'_> {
    fn write(&self, sections: &[Section], version: u64) -> String {
        let mut sdp = String::with_capacity(512 + sections.len() * 480);
        write_session(
            &mut sdp,
            self.local,
            version,
            sections.iter().filter(|section| section.accepted).map(|section| &*section.mid),
        );
        for (index, section) in sections.iter().enumerate() {
            match section.accepted {
                true => self.write_accepted(&mut sdp, section, index == self.tagged),
                false => write_rejected(&mut sdp, section),
            }
        }
        sdp
    }

    fn write_accepted(&self, sdp: &mut String, section: &Section, tagged: bool) {
        match (&section.content, &section.codec) {
            (Content::Rtp(kind), Some(codec)) => {
                push_media_line(sdp, *kind, &[Some(codec.payload_type), codec.rtx_payload_type]);
                push_transport(sdp, self.local, self.setup, &section.mid, tagged);
                push_extensions(sdp, &section.extensions);
                push(sdp, format_args!("a={}\r\n", if section.sends() { "recvonly" } else { "inactive" }));
                push(
                    sdp,
                    format_args!("a=rtcp-mux\r\n{}", if section.reduced_size { "a=rtcp-rsize\r\n" } else { "" }),
                );
                push_codec(sdp, codec);
            }
            (Content::Application(port), _) => push_application(sdp, self.local, self.setup, &section.mid, tagged, *port),
            _ => write_rejected(sdp, section),
        }
    }
}

fn write_rejected(sdp: &mut String, section: &Section) {
    match &section.content {
        Content::Rtp(kind) => push(
            sdp,
            format_args!("m={} 0 UDP/TLS/RTP/SAVPF {}\r\n", kind_name(*kind), section.first_format),
        ),
        Content::Application(_) => push(sdp, format_args!("m=application 0 UDP/DTLS/SCTP webrtc-datachannel\r\n")),
        Content::Other(name) => push(sdp, format_args!("m={name} 0 UDP/TLS/RTP/SAVPF {}\r\n", section.first_format)),
    }
    push(sdp, format_args!("c=IN IP4 0.0.0.0\r\na=inactive\r\n"));
    if !section.mid.is_empty() {
        push(sdp, format_args!("a=mid:{}\r\n", section.mid));
    }
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Audio => "audio",
        Kind::Video => "video",
    }
}

/// Writing to a `String` cannot fail.
fn push(sdp: &mut String, text: fmt::Arguments<'_>) {
    let _ = sdp.write_fmt(text);
}

fn write_session<'a>(sdp: &mut String, local: &LocalTransport, version: u64, bundle: impl Iterator<Item = &'a str>) {
    push(
        sdp,
        format_args!(
            "v=0\r\no=- {} {version} IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\na=group:BUNDLE",
            local.session_id
        ),
    );
    for mid in bundle {
        push(sdp, format_args!(" {mid}"));
    }
    push(sdp, format_args!("\r\na=msid-semantic: WMS *\r\na=fingerprint:{}\r\n", local.fingerprint));
}

fn push_media_line(sdp: &mut String, kind: Kind, payload_types: &[Option<u8>]) {
    push(sdp, format_args!("m={} 9 UDP/TLS/RTP/SAVPF", kind_name(kind)));
    for payload_type in payload_types.iter().flatten() {
        push(sdp, format_args!(" {payload_type}"));
    }
    sdp.push_str("\r\n");
}

fn push_transport(sdp: &mut String, local: &LocalTransport, setup: Setup, mid: &str, tagged: bool) {
    push(sdp, format_args!("c=IN IP4 0.0.0.0\r\na=mid:{mid}\r\na=setup:{}\r\n", setup.as_str()));
    push(sdp, format_args!("a=ice-ufrag:{}\r\na=ice-pwd:{}\r\n", local.ufrag, local.pwd));
    for candidate in local.candidates.iter().filter(|_| tagged) {
        push(sdp, format_args!("a={candidate}\r\n"));
    }
}

fn push_application(sdp: &mut String, local: &LocalTransport, setup: Setup, mid: &str, tagged: bool, sctp_port: u16) {
    push(sdp, format_args!("m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\n"));
    push_transport(sdp, local, setup, mid, tagged);
    push(sdp, format_args!("a=sctp-port:{sctp_port}\r\n"));
}

fn push_extensions(sdp: &mut String, extensions: &ExtensionIds) {
    for extension in Extension::ALL {
        if let Some(id) = extensions.id(extension) {
            push(sdp, format_args!("a=extmap:{id} {}\r\n", extension.uri()));
        }
    }
}

fn push_codec(sdp: &mut String, codec: &Codec) {
    let payload_type = codec.payload_type;
    push(sdp, format_args!("a=rtpmap:{payload_type} {}\r\n", codec.map));
    if !codec.parameters.is_empty() {
        push(sdp, format_args!("a=fmtp:{payload_type} {}\r\n", codec.parameters));
    }
    for feedback in Feedback::ALL.into_iter().filter(|feedback| codec.feedback.contains(*feedback)) {
        push(sdp, format_args!("a=rtcp-fb:{payload_type} {}\r\n", feedback.as_str()));
    }
    if let Some(rtx) = codec.rtx_payload_type {
        push(
            sdp,
            format_args!("a=rtpmap:{rtx} rtx/{}\r\na=fmtp:{rtx} apt={payload_type}\r\n", codec.clock_rate),
        );
    }
}

/// A track of ours, for [`publisher_offer`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalTrack {
    pub kind: Kind,
    /// The `cid` of its AddTrack: LiveKit finds the track by it.
    pub cid: String,
    pub stream_id: String,
    pub ssrc: u32,
    /// Retransmissions go out on this SSRC (RFC 4588); without it they repeat the original packets.
    pub rtx_ssrc: Option<u32>,
    /// Simulcast layers from low to high, `q h f`. With any, the section names no SSRC and packets carry mid and rid instead.
    pub rids: Vec<String>,
}

/// Our offer for `tracks`, one section each in their order, `mid` counting from 0, after the section for data channels if `application` is set.
///
/// `version` grows by one with every offer of a connection. A later offer repeats the tracks of the earlier one in the same order, new ones after them.
pub fn publisher_offer(local: &LocalTransport, tracks: &[LocalTrack], application: bool, version: u64, capabilities: &Capabilities) -> String {
    let mids: Vec<String> = (0..tracks.len() + usize::from(application)).map(|mid| mid.to_string()).collect();
    let mut sdp = String::with_capacity(512 + mids.len() * 1024);
    write_session(&mut sdp, local, version, mids.iter().map(String::as_str));
    let (for_application, for_tracks) = mids.split_at(usize::from(application));
    for mid in for_application {
        push_application(&mut sdp, local, local.setup, mid, true, 5000);
    }
    for (index, (track, mid)) in tracks.iter().zip(for_tracks).enumerate() {
        push_local_track(&mut sdp, local, track, mid, index == 0 && !application, capabilities);
    }
    sdp
}

fn push_local_track(sdp: &mut String, local: &LocalTransport, track: &LocalTrack, mid: &str, tagged: bool, capabilities: &Capabilities) {
    let codec = offered_codec(track, capabilities);
    push_media_line(sdp, track.kind, &[Some(codec.payload_type), codec.rtx_payload_type]);
    push_transport(sdp, local, local.setup, mid, tagged);
    push_extensions(sdp, &offered_extensions(track, capabilities));
    push(
        sdp,
        format_args!("a=sendonly\r\na=msid:{} {}\r\na=rtcp-mux\r\na=rtcp-rsize\r\n", track.stream_id, track.cid),
    );
    push_codec(sdp, &codec);
    match track.rids.is_empty() {
        true => push_sources(sdp, track),
        false => push_rids(sdp, &track.rids),
    }
}

fn offered_codec(track: &LocalTrack, capabilities: &Capabilities) -> Codec {
    let mut feedback = FeedbackSet::default();
    let of_kind = |feedback: &Feedback| track.kind == Kind::Video || matches!(feedback, Feedback::Nack | Feedback::TransportCc);
    capabilities
        .feedback
        .iter()
        .filter(|feedback| of_kind(feedback))
        .for_each(|found| feedback.insert(*found));
    match track.kind {
        Kind::Audio => Codec {
            payload_type: OPUS_PAYLOAD_TYPE,
            rtx_payload_type: None,
            map: "opus/48000/2".into(),
            clock_rate: 48_000,
            parameters: "minptime=10;useinbandfec=1".into(),
            feedback,
        },
        Kind::Video => Codec {
            payload_type: VP8_PAYLOAD_TYPE,
            rtx_payload_type: Some(VP8_RTX_PAYLOAD_TYPE).filter(|_| track.rtx_ssrc.is_some() || !track.rids.is_empty()),
            map: "VP8/90000".into(),
            clock_rate: 90_000,
            parameters: "".into(),
            feedback,
        },
    }
}

fn offered_extensions(track: &LocalTrack, capabilities: &Capabilities) -> ExtensionIds {
    let mut offered = ExtensionIds::default();
    for extension in capabilities.extensions {
        let fits = match extension {
            Extension::Rid | Extension::RepairedRid => !track.rids.is_empty(),
            Extension::AudioLevel => track.kind == Kind::Audio,
            _ => true,
        };
        if fits {
            offered.set(*extension, extension.offered_id());
        }
    }
    offered
}

fn push_sources(sdp: &mut String, track: &LocalTrack) {
    let rtx = track.rtx_ssrc.filter(|_| track.kind == Kind::Video);
    if let Some(rtx) = rtx {
        push(sdp, format_args!("a=ssrc-group:FID {} {rtx}\r\n", track.ssrc));
    }
    for ssrc in [Some(track.ssrc), rtx].into_iter().flatten() {
        push(
            sdp,
            format_args!(
                "a=ssrc:{ssrc} cname:{}\r\na=ssrc:{ssrc} msid:{} {}\r\n",
                track.stream_id, track.stream_id, track.cid
            ),
        );
    }
}

fn push_rids(sdp: &mut String, rids: &[String]) {
    for rid in rids {
        push(sdp, format_args!("a=rid:{rid} send\r\n"));
    }
    push(sdp, format_args!("a=simulcast:send {}\r\n", rids.join(";")));
}

/// The server's answer to our offer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteAnswer {
    pub remote: RemoteTransport,
    /// One per section of our offer, in its order; data channels are left out.
    pub media: Vec<NegotiatedMedia>,
}

/// What the server took of one of our tracks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NegotiatedMedia {
    pub mid: Box<str>,
    pub kind: Kind,
    /// `false`: the server rejected it, or does not receive it now. Nothing may be sent.
    pub accepted: bool,
    pub payload_type: u8,
    pub rtx_payload_type: Option<u8>,
    pub extensions: ExtensionIds,
    pub feedback: FeedbackSet,
}

impl RemoteAnswer {
    pub fn parse(answer: &str, capabilities: &Capabilities) -> Result<RemoteAnswer, SdpError> {
        let split = SplitDescription::new(answer)?;
        let mut sections = Vec::with_capacity(split.sections.len());
        for (index, text) in split.sections.iter().enumerate() {
            let section = Section::parse(text, Stamp { hash: 0, len: 0 }, capabilities);
            sections.push(section.map_err(|what| SdpError::Section { index, what })?);
        }
        let tagged = sections.iter().position(Section::acceptable).ok_or(SdpError::NoSections)?;
        let remote = split.remote_transport(tagged)?;
        Ok(RemoteAnswer {
            remote,
            media: sections.into_iter().filter_map(NegotiatedMedia::of).collect(),
        })
    }
}

impl NegotiatedMedia {
    fn of(section: Section) -> Option<NegotiatedMedia> {
        let Content::Rtp(kind) = section.content else { return None };
        let receives = matches!(section.direction, Direction::RecvOnly | Direction::SendRecv);
        let accepted = section.acceptable() && receives;
        let (payload_type, rtx_payload_type, feedback) = section.codec.map_or((0, None, FeedbackSet::default()), |codec| {
            (codec.payload_type, codec.rtx_payload_type, codec.feedback)
        });
        Some(NegotiatedMedia {
            mid: section.mid,
            kind,
            accepted,
            payload_type,
            rtx_payload_type,
            extensions: section.extensions,
            feedback,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    /// One subscriber connection's offers, recorded from LiveKit 1.13.5: data channels only; the first audio and video; three talkers; the second of them
    /// gone; his audio section taken over by a fourth.
    const OFFERS: [&str; 5] = [
        include_str!("../../fixtures/sdp/offer-1-application.sdp"),
        include_str!("../../fixtures/sdp/offer-2-first-video.sdp"),
        include_str!("../../fixtures/sdp/offer-3-six-tracks.sdp"),
        include_str!("../../fixtures/sdp/offer-4-two-gone.sdp"),
        include_str!("../../fixtures/sdp/offer-5-section-reused.sdp"),
    ];
    const ANSWERS: [&str; 5] = [
        include_str!("../../fixtures/sdp/answer-1.sdp"),
        include_str!("../../fixtures/sdp/answer-2.sdp"),
        include_str!("../../fixtures/sdp/answer-3.sdp"),
        include_str!("../../fixtures/sdp/answer-4.sdp"),
        include_str!("../../fixtures/sdp/answer-5.sdp"),
    ];

    fn local() -> LocalTransport {
        LocalTransport {
            ufrag: "ours".into(),
            pwd: "ourpasswordof22charsmin".into(),
            fingerprint: Fingerprint([0xA5; 32]),
            setup: Setup::Active,
            candidates: vec![Candidate::host("127.0.0.1:40000".parse().unwrap())],
            session_id: 42,
        }
    }

    fn answerer() -> Answerer {
        Answerer::new(Capabilities::SUBSCRIBER)
    }

    fn mids(tracks: &[RemoteTrack]) -> Vec<&str> {
        tracks.iter().map(|track| &*track.mid).collect()
    }

    #[test]
    fn recorded_offers_get_the_recorded_answers() {
        let mut answerer = answerer();
        for (index, (offer, golden)) in OFFERS.iter().zip(ANSWERS).enumerate() {
            let answer = answerer.answer(offer, &local()).unwrap().sdp;
            if std::env::var_os("THRONG_BLESS").is_some() {
                std::fs::write(format!("fixtures/sdp/answer-{}.sdp", index + 1), &answer).unwrap();
                continue;
            }
            assert_eq!(answer, golden, "answer {} (THRONG_BLESS=1 writes the new one)", index + 1);
        }
    }

    #[test]
    fn a_room_fills_and_empties_and_only_what_changed_is_read() {
        let mut answerer = answerer();
        // The first section changes often: the server lists its candidates there, in any order.
        for (offer, read, added, removed, updated) in [
            (OFFERS[0], 1, vec![], vec![], vec![]),
            (OFFERS[1], 3, vec!["1", "2"], vec![], vec![]),
            // The client of the recording took no RTX, so the server does not offer it again.
            (OFFERS[2], 5, vec!["3", "4", "5", "6"], vec![], vec!["2"]),
            (OFFERS[3], 3, vec![], vec!["3", "4"], vec![]),
            (OFFERS[4], 1, vec!["3"], vec![], vec![]),
        ] {
            let answered = answerer.answer(offer, &local()).unwrap();
            assert_eq!(
                (mids(&answered.added), mids(&answered.removed), mids(&answered.updated)),
                (added, removed, updated)
            );
            assert_eq!(answered.unusable, 0);
            assert_eq!(answered.sections_read, read);
        }
        assert_eq!(answerer.tracks().map(|track| &*track.mid).collect::<Vec<_>>(), ["1", "2", "3", "5", "6"]);
    }

    #[test]
    fn a_recorded_offer_names_transport_and_tracks() {
        let answered = answerer().answer(OFFERS[1], &local()).unwrap();
        let remote = &answered.remote;
        assert_eq!(
            (remote.ufrag.as_str(), remote.pwd.as_str()),
            ("qbDCvLwFbZDqebWM", "XfcIfwRYkzocWBecseuadOwNGsCKgfIj")
        );
        assert_eq!(
            (remote.setup, answered.setup, remote.ice_lite, remote.end_of_candidates),
            (Setup::ActPass, Setup::Active, false, true)
        );
        assert!(remote.fingerprint.to_string().starts_with("sha-256 44:35:6F:5A:"));
        assert_eq!(remote.candidates.len(), 1, "component 2 is left out");
        assert_eq!(
            (remote.candidates[0].address, remote.candidates[0].priority),
            ("127.0.0.1:33170".parse().unwrap(), 2_130_706_431)
        );
        assert_eq!(remote.tcp_candidates[0].address.port(), 17_881);

        let [audio, video] = answered.added.as_slice() else {
            panic!("{:?}", answered.added)
        };
        assert_eq!(
            (audio.kind, audio.payload_type, audio.rtx_payload_type, audio.rtx_ssrc),
            (Kind::Audio, 111, None, None)
        );
        assert_eq!(
            (audio.ssrc, audio.clock_rate, &*audio.track_id),
            (359_536_568, 48_000, "TR_AteYg99Z6BqU3")
        );
        assert_eq!((video.kind, video.payload_type, video.rtx_payload_type), (Kind::Video, 96, Some(97)));
        assert_eq!((video.ssrc, video.rtx_ssrc, video.clock_rate), (631_379_334, Some(2_598_880_657), 90_000));
        assert_eq!(
            (&*video.stream_id, &*video.track_id),
            ("PA_gqKSsAd8SZ6Q|TR_V54ByyhYHjTUB", "TR_V54ByyhYHjTUB")
        );
        assert_eq!(
            (
                video.extensions.id(Extension::AbsSendTime),
                video.extensions.id(Extension::AbsCaptureTime)
            ),
            (Some(3), None)
        );
    }

    /// What the library that is the oracle reads: `m=` and attributes of each section.
    fn oracle(sdp: &str) -> rtc_sdp::description::session::SessionDescription {
        rtc_sdp::description::session::SessionDescription::unmarshal(&mut std::io::Cursor::new(sdp)).unwrap_or_else(|error| panic!("{error}: {sdp}"))
    }

    fn values(media: &rtc_sdp::description::media::MediaDescription, key: &str) -> Vec<String> {
        media
            .attributes
            .iter()
            .filter(|attribute| attribute.key == key)
            .filter_map(|attribute| attribute.value.clone())
            .collect()
    }

    #[test]
    fn an_independent_parser_reads_our_answers_as_they_are_meant() {
        let mut answerer = answerer();
        for offer in OFFERS {
            let answer = oracle(&answerer.answer(offer, &local()).unwrap().sdp);
            let offer = oracle(offer);
            assert_eq!(answer.media_descriptions.len(), offer.media_descriptions.len());
            assert_eq!(answer.attribute("group").unwrap(), offer.attribute("group").unwrap());
            assert!(answer.attribute("fingerprint").unwrap().starts_with("sha-256 A5:A5"));
            for (ours, theirs) in answer.media_descriptions.iter().zip(&offer.media_descriptions) {
                assert_eq!(ours.media_name.media, theirs.media_name.media);
                assert_eq!(ours.attribute("mid"), theirs.attribute("mid"));
                assert_eq!(
                    (ours.attribute("setup"), ours.attribute("ice-ufrag")),
                    (Some(Some("active")), Some(Some("ours")))
                );
                assert!(values(ours, "rtpmap").iter().all(|map| values(theirs, "rtpmap").contains(map)));
                let sends = theirs.has_attribute("sendrecv") && theirs.media_name.media != "application";
                assert_eq!(ours.has_attribute("recvonly"), sends);
            }
            assert!(answer.media_descriptions[0].has_attribute("candidate"));
        }
    }

    #[test]
    fn an_independent_parser_reads_our_offers_as_they_are_meant() {
        let audio = LocalTrack {
            kind: Kind::Audio,
            cid: "mic".into(),
            stream_id: "s".into(),
            ssrc: 1,
            rtx_ssrc: None,
            rids: Vec::new(),
        };
        let video = LocalTrack {
            kind: Kind::Video,
            cid: "cam".into(),
            stream_id: "s".into(),
            ssrc: 2,
            rtx_ssrc: Some(3),
            rids: Vec::new(),
        };
        let simulcast = LocalTrack {
            rids: ["q", "h", "f"].map(str::to_owned).into(),
            ..video.clone()
        };
        let offer = publisher_offer(&local(), &[audio, video, simulcast], true, 7, &Capabilities::PUBLISHER);
        let parsed = oracle(&offer);
        assert_eq!(
            (parsed.origin.session_version, parsed.attribute("group").unwrap().as_str()),
            (7, "BUNDLE 0 1 2 3")
        );
        let [application, audio, video, simulcast] = parsed.media_descriptions.as_slice() else {
            panic!("{offer}")
        };
        assert_eq!(application.attribute("sctp-port"), Some(Some("5000")));
        assert_eq!(values(audio, "rtpmap"), ["111 opus/48000/2"]);
        assert_eq!(values(audio, "rtcp-fb"), ["111 nack"]);
        assert_eq!(values(audio, "ssrc"), ["1 cname:s", "1 msid:s mic"]);
        assert_eq!(values(video, "rtcp-fb"), ["96 nack", "96 nack pli", "96 ccm fir"]);
        assert_eq!(values(video, "ssrc-group"), ["FID 2 3"]);
        assert_eq!(values(video, "extmap"), ["1 urn:ietf:params:rtp-hdrext:sdes:mid"]);
        assert_eq!(
            (values(simulcast, "rid"), values(simulcast, "ssrc").len()),
            (vec!["q send".into(), "h send".into(), "f send".into()], 0)
        );
        assert_eq!(
            (values(simulcast, "simulcast"), values(simulcast, "extmap").len()),
            (vec!["send q;h;f".to_owned()], 3)
        );
        assert_eq!(values(video, "msid"), ["s cam"]);
    }

    #[test]
    fn recorded_answers_to_our_offers_are_read() {
        for (answer, rid) in [
            (include_str!("../../fixtures/sdp/publisher-answer-plain.sdp"), None),
            (include_str!("../../fixtures/sdp/publisher-answer-simulcast.sdp"), Some(2)),
        ] {
            let parsed = RemoteAnswer::parse(answer, &Capabilities::PUBLISHER).unwrap();
            assert_eq!(parsed.remote.setup, Setup::Passive);
            let [audio, video] = parsed.media.as_slice() else { panic!("{parsed:?}") };
            assert!(audio.accepted && video.accepted);
            assert_eq!((audio.payload_type, video.payload_type, video.rtx_payload_type), (111, 96, Some(97)));
            assert_eq!((video.extensions.id(Extension::Mid), video.extensions.id(Extension::Rid)), (Some(1), rid));
            assert!(audio.feedback.contains(Feedback::Nack) && video.feedback.contains(Feedback::CcmFir));
            assert!(!video.feedback.contains(Feedback::GoogRemb));
        }
    }

    /// A session part and sections for a made-up offer; `{}` in a section stands for its mid.
    fn offer_of(sections: &[&str]) -> String {
        let mids: Vec<String> = (0..sections.len()).map(|mid| mid.to_string()).collect();
        let fingerprint = Fingerprint([1; 32]);
        let mut sdp = format!(
            "v=0\r\no=- 1 1 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\na=fingerprint:{fingerprint}\r\na=ice-ufrag:u\r\na=ice-pwd:p\r\na=setup:passive\r\na=group:BUNDLE {}\r\n",
            mids.join(" ")
        );
        for (mid, section) in mids.iter().zip(sections) {
            sdp.push_str(&section.replace("{}", mid).replace('\n', "\r\n"));
        }
        sdp
    }

    const APPLICATION: &str = "m=application 9 UDP/DTLS/SCTP webrtc-datachannel\na=mid:{}\na=sctp-port:5000\n";
    const VP8: &str = "m=video 9 UDP/TLS/RTP/SAVPF 100\na=mid:{}\na=rtpmap:100 VP8/90000\na=ssrc:7 cname:x\na=msid:s t\na=sendonly\n";

    #[test]
    fn what_cannot_be_used_is_answered_in_its_place() {
        let sections = [
            APPLICATION,
            VP8,
            "m=video 0 UDP/TLS/RTP/SAVPF 100\na=inactive\n",
            "m=video 9 UDP/TLS/RTP/SAVPF 98\na=mid:{}\na=rtpmap:98 H264/90000\na=ssrc:9 cname:x\na=sendonly\n",
            "m=text 9 UDP/TLS/RTP/SAVPF 98\na=mid:{}\n",
            "m=audio 9 UDP/TLS/RTP/SAVPF 0\na=mid:{}\na=sendonly\n",
            "m=video 9 UDP/TLS/RTP/SAVPF 100\na=mid:{}\na=rtpmap:100 vp8/90000\na=inactive\n",
            "m=video 9 UDP/TLS/RTP/SAVPF 100\na=mid:stray\na=rtpmap:100 VP8/90000\na=ssrc:8 cname:x\na=sendonly\n",
        ];
        let answered = answerer().answer(&offer_of(&sections), &local()).unwrap();
        assert_eq!((answered.remote.setup, answered.setup), (Setup::Passive, Setup::Active));
        let answer = oracle(&answered.sdp);
        let seen: Vec<(String, isize, bool)> = answer
            .media_descriptions
            .iter()
            .map(|media| {
                (
                    media.media_name.media.clone(),
                    media.media_name.port.value,
                    media.has_attribute("inactive"),
                )
            })
            .collect();
        let expected = [
            ("application", 9, false),
            ("video", 9, false),
            ("video", 0, true),
            ("video", 0, true),
            ("text", 0, true),
            ("audio", 0, true),
            ("video", 9, true),
            ("video", 0, true),
        ];
        assert_eq!(seen, expected.map(|(media, port, inactive)| (media.to_owned(), port, inactive)));
        assert_eq!(answer.attribute("group").unwrap(), "BUNDLE 0 1 6");
        assert_eq!((mids(&answered.added), answered.unusable), (vec!["1"], 3));
    }

    #[test]
    fn a_changed_ssrc_or_msid_is_a_removed_and_an_added_track() {
        let mut answerer = answerer();
        answerer.answer(&offer_of(&[APPLICATION, VP8]), &local()).unwrap();
        for changed in [VP8.replace("ssrc:7", "ssrc:8"), VP8.replace("msid:s t", "msid:s u")] {
            let answered = answerer.answer(&offer_of(&[APPLICATION, &changed]), &local()).unwrap();
            assert_eq!((mids(&answered.added), mids(&answered.removed)), (vec!["1"], vec!["1"]));
        }
        let answered = answerer.answer(&offer_of(&[APPLICATION]), &local()).unwrap();
        assert_eq!((mids(&answered.removed), answerer.tracks().count()), (vec!["1"], 0));
    }

    #[test]
    fn an_ice_restart_changes_the_transport_and_no_track() {
        let mut answerer = answerer();
        answerer.answer(OFFERS[2], &local()).unwrap();
        let restarted = OFFERS[2].replace("qbDCvLwFbZDqebWM", "newufrag");
        let answered = answerer.answer(&restarted, &local()).unwrap();
        assert_eq!(
            (answered.remote.ufrag.as_str(), answered.added.len(), answered.removed.len()),
            ("newufrag", 0, 0)
        );
    }

    #[test]
    fn broken_offers_are_refused_and_leave_the_state_as_it_was() {
        let mut answerer = answerer();
        answerer.answer(OFFERS[2], &local()).unwrap();
        let twice = offer_of(&[APPLICATION, VP8, &VP8.replace("{}", "1")]);
        for (offer, error) in [
            ("", SdpError::NoSections),
            ("v=0\r\n", SdpError::NoSections),
            (twice.as_str(), SdpError::DuplicateMid { mid: "1".into() }),
            (
                &offer_of(&["m=\n"]),
                SdpError::Section {
                    index: 0,
                    what: "its m-line cannot be read",
                },
            ),
            (
                &offer_of(&["m=audio 9 UDP/TLS/RTP/SAVPF 0\na=mid:a b\n"]),
                SdpError::Section {
                    index: 0,
                    what: "it has no usable mid",
                },
            ),
            (
                &offer_of(&[APPLICATION]).replace("a=ice-pwd:p\r\n", ""),
                SdpError::Missing { what: "an ice-pwd" },
            ),
            (
                &offer_of(&[APPLICATION]).replace("sha-256", "sha-1"),
                SdpError::Missing {
                    what: "a sha-256 fingerprint",
                },
            ),
            (
                &offer_of(&[&format!("m=video 9 x\n{}", "a=x\n".repeat(SECTION_BYTES_MAX / 4))]),
                SdpError::SectionTooLarge { index: 0 },
            ),
            (&"m=a 0 b\n".repeat(SECTIONS_MAX + 1), SdpError::TooManySections),
            (&" ".repeat(SDP_BYTES_MAX + 1), SdpError::TooLarge { bytes: SDP_BYTES_MAX + 1 }),
        ] {
            assert_eq!(answerer.answer(offer, &local()).unwrap_err(), error);
        }
        assert_eq!(answerer.tracks().count(), 6);
        assert_eq!(answerer.answer(OFFERS[2], &local()).unwrap().sections_read, 0);
    }

    /// A small generator for tests (xorshift64*): the seed is the run.
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: usize) -> usize {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % bound
        }
    }

    #[test]
    fn mutated_offers_and_answers_never_panic_and_answers_keep_their_form() {
        let mut random = Random(0x5eed);
        let answers = [ANSWERS[2], include_str!("../../fixtures/sdp/publisher-answer-simulcast.sdp")];
        let mut accepted = 0;
        for _ in 0..3_000 {
            let text = mutated(OFFERS[random.below(OFFERS.len())], &mut random);
            let mut answerer = answerer();
            let _ = answerer.answer(OFFERS[1], &local());
            if let Ok(answered) = answerer.answer(&text, &local()) {
                accepted += 1;
                let sections = |sdp: &str| sdp.lines().filter(|line| line.starts_with("m=")).count();
                assert_eq!(sections(&answered.sdp), SplitDescription::new(&text).unwrap().sections.len());
                assert!(
                    answered
                        .sdp
                        .split("\r\n")
                        .all(|line| line.is_empty() || line.as_bytes().get(1) == Some(&b'=')),
                    "{}",
                    answered.sdp
                );
                assert!(
                    answered
                        .sdp
                        .bytes()
                        .all(|b| b == b'\r' || b == b'\n' || b == b' ' || b.is_ascii_graphic()),
                    "{}",
                    answered.sdp
                );
            }
            let _ = RemoteAnswer::parse(&mutated(answers[random.below(2)], &mut random), &Capabilities::PUBLISHER);
            let _ = mutated(r#"{"candidate":"candidate:1 1 udp 5 1.2.3.4 5 typ host","sdpMid":"0"}"#, &mut random).parse::<Trickled>();
            let _ = mutated("sha-256 44:35:6F:5A:5A:9B:96:26:AC:E4:81:D0:0C:7D:EC:56", &mut random).parse::<Fingerprint>();
        }
        assert!(accepted > 300, "{accepted}: the mutations are too crude to test anything");
    }

    /// A few bytes changed, a line dropped or doubled, or the end cut off.
    fn mutated(text: &str, random: &mut Random) -> String {
        let mut lines: Vec<Vec<u8>> = text.split_inclusive('\n').map(|line| line.as_bytes().to_vec()).collect();
        for _ in 0..=random.below(4) {
            let at = random.below(lines.len());
            match random.below(6) {
                0 => lines.insert(at, lines[at].clone()),
                1 if lines.len() > 1 => drop(lines.remove(at)),
                2 if random.below(8) == 0 => lines.truncate(at.max(1)),
                _ => {
                    let byte = random.below(lines[at].len());
                    lines[at][byte] = b"\r\n\0:=/ 0919amv\xff\xc3"[random.below(16)];
                }
            }
        }
        String::from_utf8_lossy(&lines.concat()).into_owned()
    }

    /// Sections of a room as a server would offer them, cut from recorded ones.
    struct Room {
        session: String,
        application: String,
        templates: [String; 2],
        sections: Vec<String>,
    }

    impl Room {
        fn new() -> Room {
            let split = SplitDescription::new(OFFERS[1]).unwrap();
            let [application, audio, video] = split.sections.as_slice() else {
                panic!("three sections")
            };
            let template = |text: &str, ssrc: &str| {
                text.replace("a=mid:1\r", "a=mid:{mid}\r")
                    .replace("a=mid:2\r", "a=mid:{mid}\r")
                    .replace(ssrc, "{ssrc}")
            };
            Room {
                session: split.session.replace("BUNDLE 0 1 2", "BUNDLE {mids}"),
                application: (*application).to_owned(),
                templates: [template(audio, "359536568"), template(video, "631379334")],
                sections: Vec::new(),
            }
        }

        fn section(&self, mid: usize, template: usize, ssrc: usize) -> String {
            self.templates[template]
                .replace("{mid}", &mid.to_string())
                .replace("{ssrc}", &ssrc.to_string())
        }

        fn push(&mut self, template: usize, ssrc: usize) {
            self.sections.push(self.section(self.sections.len() + 1, template, ssrc));
        }

        fn offer(&self) -> String {
            let mids: Vec<String> = (0..=self.sections.len()).map(|mid| mid.to_string()).collect();
            format!(
                "{}{}{}",
                self.session.replace("{mids}", &mids.join(" ")),
                self.application,
                self.sections.concat()
            )
        }

        /// A track comes, goes, is replaced, or the whole connection restarts.
        fn change(&mut self, random: &mut Random) {
            let ssrc = 1_000 + random.below(1_000_000);
            let at = random.below(self.sections.len().max(1));
            match random.below(8) {
                0..=3 => self.push(random.below(2), ssrc),
                4 if at < self.sections.len() => self.sections[at] = self.section(at + 1, random.below(2), ssrc),
                5 | 6 if at < self.sections.len() => self.sections[at] = self.sections[at].replace("a=sendrecv", "a=inactive"),
                7 => self.application = self.application.replace("a=ice-ufrag:", "a=ice-ufrag:x"),
                _ => {}
            }
        }
    }

    #[test]
    fn answering_by_increments_is_answering_in_full() {
        for seed in 1..=20 {
            let (mut random, mut room, mut incremental) = (Random(seed), Room::new(), answerer());
            let mut alive: Vec<RemoteTrack> = Vec::new();
            for version in 1..=40 {
                (0..random.below(4)).for_each(|_| room.change(&mut random));
                let offer = room.offer();
                let mut full = Answerer {
                    version: version - 1,
                    ..answerer()
                };
                let (step, whole) = (incremental.answer(&offer, &local()).unwrap(), full.answer(&offer, &local()).unwrap());
                assert_eq!(
                    (&step.sdp, &step.remote, step.unusable),
                    (&whole.sdp, &whole.remote, whole.unusable),
                    "seed {seed}"
                );
                assert!(step.sections_read <= whole.sections_read);
                assert!(step.removed.iter().all(|track| alive.contains(track)), "seed {seed}");
                alive.retain(|track| !step.removed.contains(track) && !step.updated.iter().any(|new| new.mid == track.mid));
                alive.extend(step.updated);
                alive.extend(step.added);
                alive.sort_by_key(|track| track.mid.parse::<u32>().unwrap());
                assert_eq!(alive.iter().collect::<Vec<_>>(), full.tracks().collect::<Vec<_>>(), "seed {seed}");
            }
        }
    }

    #[test]
    fn a_hundred_tracks_cost_little_and_the_next_one_less() {
        let mut room = Room::new();
        (0..100).for_each(|index| room.push(index % 2, 1_000 + index));
        let (first, mut answerer) = (room.offer(), answerer());
        let started = Instant::now();
        assert_eq!(answerer.answer(&first, &local()).unwrap().sections_read, 101);
        let full = started.elapsed();
        room.push(0, 5_000);
        let second = room.offer();
        let started = Instant::now();
        let answered = answerer.answer(&second, &local()).unwrap();
        let step = started.elapsed();
        assert_eq!((answered.sections_read, answered.added.len()), (1, 1));
        eprintln!(
            "101 sections, {} bytes: {full:?} in full, {step:?} for one more; answer {} bytes",
            first.len(),
            answered.sdp.len()
        );
        let started = Instant::now();
        oracle(&second);
        eprintln!("a general library parses it in {:?}", started.elapsed());
        assert!(full.as_millis() < 100 && step < full * 2, "{full:?} {step:?}");
    }

    #[test]
    fn ten_thousand_sections_are_answered_in_bounded_time() {
        let mut room = Room::new();
        (0..SECTIONS_MAX - 1).for_each(|index| room.push(0, 1_000 + index));
        let offer = room.offer();
        let started = Instant::now();
        let answered = answerer().answer(&offer, &local()).unwrap();
        assert_eq!(answered.added.len(), SECTIONS_MAX - 1);
        eprintln!("{SECTIONS_MAX} sections, {} bytes: {:?}", offer.len(), started.elapsed());
        assert!(started.elapsed().as_secs() < 5);
    }

    #[test]
    fn candidates_are_read_written_and_refused() {
        let udp: Candidate = "candidate:2878742611 1 udp 2130706431 127.0.0.1 33170 typ host ufrag qbDCvLwFbZDqebWM"
            .parse()
            .unwrap();
        assert_eq!(
            (udp.transport, udp.kind, udp.address),
            (CandidateTransport::Udp, CandidateKind::Host, "127.0.0.1:33170".parse().unwrap())
        );
        assert_eq!(udp.to_string().parse::<Candidate>().unwrap(), udp);
        assert_eq!(
            udp.to_init().parse::<Trickled>().unwrap(),
            Trickled {
                candidate: Some(udp),
                ufrag: None
            }
        );
        let six: Candidate = "a=candidate:1 1 UDP 5 ::1 9 typ relay raddr 0.0.0.0 rport 9".parse().unwrap();
        assert_eq!((six.address.to_string().as_str(), six.kind), ("[::1]:9", CandidateKind::Relayed));
        for text in [
            "",
            "candidate:",
            "candidate:1 2 udp 5 1.2.3.4 5 typ host",
            "candidate:1 1 sctp 5 1.2.3.4 5 typ host",
            "candidate:1 1 udp 4294967296 1.2.3.4 5 typ host",
            "candidate:1 1 udp 5 4ad5c5c1.local 5 typ host",
            "candidate:1 1 udp 5 1.2.3.4 65536 typ host",
            "candidate:1 1 udp 5 1.2.3.4 5 typ guest",
            "candidate:\" 1 udp 5 1.2.3.4 5 typ host",
        ] {
            assert!(text.parse::<Candidate>().is_err(), "{text}");
        }
    }

    #[test]
    fn trickled_json_is_read_and_refused() {
        let trickled: Trickled = r#"{"candidate":"candidate:1 1 udp 5 1.2.3.4 5 typ host","sdpMid":"","sdpMLineIndex":0,"usernameFragment":"abc"}"#
            .parse()
            .unwrap();
        assert_eq!((trickled.candidate.unwrap().address.port(), trickled.ufrag.as_deref()), (5, Some("abc")));
        assert_eq!(
            r#"{"candidate":"","usernameFragment":null}"#.parse::<Trickled>().unwrap(),
            Trickled {
                candidate: None,
                ufrag: None
            }
        );
        for json in [
            "",
            "[]",
            "{}",
            r#"{"candidate":"x"}"#,
            &format!(r#"{{"candidate":"{}"}}"#, " ".repeat(5000)),
        ] {
            assert!(json.parse::<Trickled>().is_err(), "{json}");
        }
    }

    #[test]
    fn fingerprints_are_read_written_and_refused() {
        let text = Fingerprint(std::array::from_fn(|index| index as u8 * 7)).to_string();
        assert_eq!(text.parse::<Fingerprint>().unwrap().to_string(), text);
        assert_eq!(text.to_lowercase().parse::<Fingerprint>().unwrap().to_string(), text);
        let short = text.rsplit_once(':').unwrap().0;
        for text in [
            "",
            "sha-256",
            "sha-1 00:11",
            short,
            &format!("{text}:00"),
            &text.replace("07", "+7"),
            &text.replace("07", "007"),
        ] {
            assert!(text.parse::<Fingerprint>().is_err(), "{text}");
        }
    }
}
