//! Reads descriptions: splits them into sections, and parses one section.

use crate::transport::rtp::Ssrc;
use std::hash::{DefaultHasher, Hasher};

use memchr::memmem;

use super::*;

/// Stamp of a section's text, kept until the next description: its length and two hashes of 64
/// bits. A server that makes them collide only hides its own track.
///
/// `any_order` ignores the order of header extensions and of candidates, because LiveKit writes
/// both in another order each time. `exact` costs a twentieth of it. It is compared first, and
/// suffices if a section has not changed at all, which is the case for nearly every section of a
/// large room.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stamp {
    pub(super) any_order: u64,
    exact: u64,
    len: u32,
}

impl Stamp {
    pub(super) fn of(text: &str) -> Stamp {
        Stamp {
            any_order: hash_in_any_order(text),
            exact: hash_exactly(text),
            len: stamped_len(text),
        }
    }

    /// Returns whether the stamp is that of `text`.
    pub(super) fn is_of(&self, text: &str) -> bool {
        self.len == stamped_len(text)
            && (self.exact == hash_exactly(text) || self.any_order == hash_in_any_order(text))
    }
}

fn stamped_len(text: &str) -> u32 {
    u32::try_from(text.len()).unwrap_or(u32::MAX)
}

fn hash_in_any_order(text: &str) -> u64 {
    let (mut in_order, mut in_any_order) = (DefaultHasher::new(), 0u64);
    let (mut written, mut at) = (0, 0);
    for line in text.split_inclusive('\n') {
        let next = at + line.len();
        if line.starts_with("a=extmap:") || line.starts_with("a=candidate:") {
            in_order.write(text.as_bytes().get(written..at).unwrap_or_default());
            let mut hasher = DefaultHasher::new();
            hasher.write(line.as_bytes());
            in_any_order = in_any_order.wrapping_add(hasher.finish());
            written = next;
        }
        at = next;
    }
    in_order.write(text.as_bytes().get(written..).unwrap_or_default());
    in_order.write_u64(in_any_order);
    in_order.finish()
}

/// Hashes eight bytes at a time: a product of 128 bits, folded.
fn hash_exactly(text: &str) -> u64 {
    const ODD: u64 = 0x9E37_79B9_7F4A_7C15;
    let mixed = |hash: u64, word: u64| {
        let product = u128::from(hash ^ word) * u128::from(ODD);
        (product as u64) ^ (product >> 64) as u64
    };
    let (words, rest) = text.as_bytes().as_chunks::<8>();
    let mut last = [0; 8];
    last.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
    // `ODD` is added after each word, so that the hash does not stay at zero after two words that
    // cancel each other out.
    let add = |hash: u64, word: &[u8; 8]| mixed(hash, u64::from_le_bytes(*word)).wrapping_add(ODD);
    add(words.iter().fold(0, add), &last)
}

/// Description, split at its m-lines.
pub(super) struct SplitDescription<'a> {
    pub(super) session: &'a str,
    pub(super) sections: Vec<&'a str>,
}

impl<'a> SplitDescription<'a> {
    pub(super) fn new(text: &'a str) -> Result<SplitDescription<'a>, SdpError> {
        if text.len() > SDP_BYTES_MAX {
            return Err(SdpError::TooLarge { bytes: text.len() });
        }
        let mut starts = media_starts(text).peekable();
        let session = text
            .get(..starts.peek().copied().unwrap_or(text.len()))
            .unwrap_or_default();
        let mut sections = Vec::new();
        while let Some(start) = starts.next() {
            if sections.len() == SECTIONS_MAX {
                return Err(SdpError::TooManySections);
            }
            let section = text
                .get(start..starts.peek().copied().unwrap_or(text.len()))
                .unwrap_or_default();
            if section.len() > SECTION_BYTES_MAX {
                return Err(SdpError::SectionTooLarge {
                    index: sections.len(),
                });
            }
            sections.push(section);
        }
        Ok(SplitDescription { session, sections })
    }

    /// Returns the ICE and DTLS parameters: those of the section that carries the bundle, or the
    /// session's where the section has none.
    pub(super) fn remote_transport(&self, tagged: usize) -> Result<RemoteTransport, SdpError> {
        let mut scan = TransportScan::default();
        for text in [Some(&self.session), self.sections.get(tagged)]
            .into_iter()
            .flatten()
        {
            attributes(text).for_each(|(name, value)| scan.attribute(name, value));
        }
        scan.finish()
    }
}

/// Returns the positions of the m-lines. The search covers every byte of every description, though
/// most of it repeats the last one.
fn media_starts(text: &str) -> impl Iterator<Item = usize> {
    let first = text.starts_with("m=").then_some(0);
    first
        .into_iter()
        .chain(memmem::find_iter(text.as_bytes(), "\nm=").map(|newline| newline + 1))
}

pub(super) fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.split('\n')
        .map(|line| line.strip_suffix('\r').unwrap_or(line))
}

/// Returns the `a=` lines as name and value; the value is empty for a flag.
pub(super) fn attributes(text: &str) -> impl Iterator<Item = (&str, &str)> {
    lines(text)
        .filter_map(|line| line.strip_prefix("a="))
        .map(|attribute| attribute.split_once(':').unwrap_or((attribute, "")))
}

/// Returns the user name fragment of a description. If it differs from the last description's, ICE
/// restarts (RFC 8839, section 4.4.1.1.1).
pub fn ice_ufrag(description: &str) -> Option<&str> {
    attributes(description).find_map(|(name, value)| (name == "ice-ufrag").then_some(value))
}

/// Collects ICE and DTLS attributes. Later ones win, so the media section is scanned after the
/// session.
#[derive(Default)]
pub(super) struct TransportScan {
    pub(super) ufrag: Option<String>,
    pub(super) pwd: Option<String>,
    pub(super) fingerprint: Option<Fingerprint>,
    pub(super) setup: Option<DtlsSetup>,
    pub(super) ice_lite: bool,
    pub(super) candidates: Vec<Candidate>,
    pub(super) tcp_candidates: Vec<Candidate>,
    pub(super) end_of_candidates: bool,
}

impl TransportScan {
    pub(super) fn attribute(&mut self, name: &str, value: &str) {
        match name {
            "ice-ufrag" => self.ufrag = ice_text(value).or(self.ufrag.take()),
            "ice-pwd" => self.pwd = ice_text(value).or(self.pwd.take()),
            "fingerprint" => self.fingerprint = value.parse().ok().or(self.fingerprint),
            "setup" => self.setup = DtlsSetup::parse(value).or(self.setup),
            "ice-lite" => self.ice_lite = true,
            "end-of-candidates" => self.end_of_candidates = true,
            "candidate" => self.candidate(value),
            _ => {}
        }
    }

    pub(super) fn candidate(&mut self, value: &str) {
        if self.candidates.len() + self.tcp_candidates.len() >= CANDIDATES_MAX {
            return;
        }
        if let Ok(candidate) = format!("candidate:{value}").parse::<Candidate>() {
            match candidate.transport {
                CandidateTransport::Udp => self.candidates.push(candidate),
                _ => self.tcp_candidates.push(candidate),
            }
        }
    }

    pub(super) fn finish(self) -> Result<RemoteTransport, SdpError> {
        Ok(RemoteTransport {
            ufrag: self.ufrag.ok_or(SdpError::Missing {
                what: "an ice-ufrag",
            })?,
            pwd: self.pwd.ok_or(SdpError::Missing { what: "an ice-pwd" })?,
            fingerprint: self.fingerprint.ok_or(SdpError::Missing {
                what: "a sha-256 fingerprint",
            })?,
            setup: self.setup.ok_or(SdpError::Missing {
                what: "a DTLS setup role",
            })?,
            ice_lite: self.ice_lite,
            candidates: self.candidates,
            tcp_candidates: self.tcp_candidates,
            end_of_candidates: self.end_of_candidates,
        })
    }
}

/// Returns the text if it has only `ice-char`s (RFC 8839, section 5.4), at most 256.
pub(super) fn ice_text(value: &str) -> Option<String> {
    let fine = !value.is_empty()
        && value.len() <= TEXT_BYTES_MAX
        && value
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'+' || b == b'/');
    fine.then(|| value.to_owned())
}

/// Part of an offer before its first m-line, as far as an answer depends on it.
pub(super) struct SessionPart<'a> {
    /// Mids of the BUNDLE group, sorted.
    pub(super) bundle: Vec<&'a str>,
}

impl<'a> SessionPart<'a> {
    pub(super) fn parse(text: &'a str) -> SessionPart<'a> {
        let group = attributes(text)
            .find_map(|(name, value)| value.strip_prefix("BUNDLE").filter(|_| name == "group"));
        let mut bundle: Vec<&str> = group.unwrap_or_default().split_ascii_whitespace().collect();
        bundle.sort_unstable();
        SessionPart { bundle }
    }
}

/// Refuses sections with the same mid. Only rejected sections may have no mid.
pub(super) fn refuse_duplicates(mut mids: Vec<&str>) -> Result<(), SdpError> {
    mids.sort_unstable();
    match mids
        .windows(2)
        .find(|pair| matches!(pair, [a, b] if a == b && !a.is_empty()))
    {
        Some(pair) => Err(SdpError::DuplicateMid {
            mid: pair.first().copied().unwrap_or_default().to_owned(),
        }),
        None => Ok(()),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    SendRecv,
    SendOnly,
    RecvOnly,
    Inactive,
}

/// Content of a media section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum SectionContent {
    Rtp(Kind),
    /// Data channels, with the SCTP port.
    Application(u16),
    /// Any other content. It is rejected under its own name.
    Other(Box<str>),
}

/// Codec that the answer takes from a section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SectionCodec {
    pub(super) codec: Codec,
    pub(super) payload_type: u8,
    pub(super) rtx_payload_type: Option<u8>,
    /// Value of its `a=rtpmap`, for example `opus/48000/2`.
    pub(super) map: Box<str>,
    /// Value of its `a=fmtp`, empty if there is none.
    pub(super) parameters: Box<str>,
    pub(super) feedback: FeedbackSet,
    /// Codec inside this one; the section names both.
    pub(super) wrapped: Option<Box<SectionCodec>>,
}

impl SectionCodec {
    /// Returns the codec as our own offers have it. `feedback` is the feedback that we support.
    pub(super) fn offered(codec: Codec, feedback: &[RtcpFeedback]) -> SectionCodec {
        SectionCodec {
            codec,
            payload_type: codec.payload_type(),
            rtx_payload_type: codec.rtx_payload_type(),
            map: codec.rtpmap().into(),
            parameters: codec.fmtp().into(),
            feedback: codec
                .feedback()
                .iter()
                .copied()
                .filter(|wanted| feedback.contains(wanted))
                .collect(),
            wrapped: codec
                .wrapped()
                .map(|wrapped| Box::new(SectionCodec::offered(wrapped, feedback))),
        }
    }

    pub(super) fn payloads(&self) -> PayloadTypes {
        PayloadTypes {
            wrapped: self.wrapped.as_ref().map(|wrapped| wrapped.payload_type),
            ..PayloadTypes::of(self.codec, self.payload_type)
        }
    }

    /// Returns the feedback that the section allows, for both codecs together.
    pub(super) fn all_feedback(&self) -> FeedbackSet {
        self.formats().fold(FeedbackSet::default(), |all, format| {
            all.union(format.feedback)
        })
    }

    /// Returns the inner codec, or this one if it wraps none.
    pub(super) fn plain(&self) -> &SectionCodec {
        self.wrapped.as_deref().unwrap_or(self)
    }

    /// Iterates over this codec and the one that it wraps.
    pub(super) fn formats(&self) -> impl Iterator<Item = &SectionCodec> {
        std::iter::once(self).chain(self.wrapped.as_deref())
    }

    /// Returns the payload types for the m-line.
    pub(super) fn payload_types(&self) -> impl Iterator<Item = u8> {
        self.formats().flat_map(|format| {
            [Some(format.payload_type), format.rtx_payload_type]
                .into_iter()
                .flatten()
        })
    }
}

/// Parsed media section: about 300 bytes with its strings, while the text takes 1.8 KB.
#[derive(Clone, Debug)]
pub(super) struct MediaSection {
    pub(super) stamp: Stamp,
    pub(super) content: SectionContent,
    pub(super) mid: Box<str>,
    /// Whether the port is 0.
    pub(super) rejected: bool,
    /// Whether our answer accepts it.
    pub(super) accepted: bool,
    pub(super) direction: Direction,
    pub(super) reduced_size: bool,
    pub(super) codec: Option<SectionCodec>,
    /// Payload type to name if the section is rejected.
    pub(super) first_format: Box<str>,
    pub(super) extensions: ExtensionIds,
    pub(super) track: Option<Box<RemoteTrack>>,
}

impl MediaSection {
    pub(super) fn parse(
        text: &str,
        stamp: Stamp,
        capabilities: &Capabilities,
    ) -> Result<MediaSection, &'static str> {
        let media = lines(text)
            .next()
            .and_then(MediaLine::parse)
            .ok_or("its m-line cannot be read")?;
        let mut scan = SectionScan::default();
        attributes(text).for_each(|(name, value)| scan.attribute(name, value));

        let mid = scan.usable_mid(&media)?;
        let content = media.content(scan.sctp_port);
        let codec = match content {
            SectionContent::Rtp(kind) => {
                scan.choose_codec(&media, kind, capabilities, capabilities.feedback)
            }
            _ => None,
        };
        let direction = scan.direction.unwrap_or(Direction::SendRecv);
        let mut section = MediaSection {
            stamp,
            content,
            mid: mid.into(),
            rejected: media.port == 0,
            accepted: false,
            direction,
            reduced_size: scan.reduced_size,
            codec,
            first_format: media.first_format().into(),
            extensions: scan.accepted_extensions(capabilities),
            track: None,
        };
        section.track = section.read_track(&scan).map(Box::new);
        Ok(section)
    }

    pub(super) fn read_track(&self, scan: &SectionScan<'_>) -> Option<RemoteTrack> {
        let codec = self.codec.as_ref()?;
        let (ssrc, rtx_ssrc) = match scan.fid {
            Some((ssrc, rtx)) => (ssrc, Some(rtx)),
            None => (scan.ssrc?, None),
        };
        let (stream_id, track_id) = scan
            .msid
            .or(scan.ssrc_msid)
            .map(split_msid)
            .unwrap_or_default();
        Some(RemoteTrack {
            mid: self.mid.clone(),
            ssrc,
            rtx_ssrc: rtx_ssrc.filter(|_| codec.rtx_payload_type.is_some()),
            payloads: codec.payloads(),
            rtx_payload_type: codec.rtx_payload_type,
            stream_id: stream_id.into(),
            track_id: track_id.into(),
            active: false,
            extensions: self.extensions,
            feedback: codec.all_feedback(),
        })
    }

    pub(super) fn sends(&self) -> bool {
        !self.rejected
            && matches!(self.content, SectionContent::Rtp(_))
            && matches!(self.direction, Direction::SendOnly | Direction::SendRecv)
    }

    /// Returns whether our answer accepts the section, provided that it is bundled.
    pub(super) fn acceptable(&self) -> bool {
        let understood = match &self.content {
            SectionContent::Rtp(_) => self.codec.is_some(),
            SectionContent::Application(_) => true,
            SectionContent::Other(_) => false,
        };
        understood && !self.rejected && !self.mid.is_empty()
    }

    pub(super) fn accept(mut self, accepted: bool) -> MediaSection {
        self.accepted = accepted;
        let active = accepted && self.sends();
        self.track
            .iter_mut()
            .for_each(|track| track.active = active);
        self
    }

    pub(super) fn active_track(&self) -> Option<&RemoteTrack> {
        self.track.as_deref().filter(|track| track.active)
    }

    pub(super) fn into_active_track(self) -> Option<RemoteTrack> {
        self.track.map(|track| *track).filter(|track| track.active)
    }
}

/// Parsed m-line: `m=KIND PORT PROTOCOL FORMAT..`
pub(super) struct MediaLine<'a> {
    pub(super) kind: &'a str,
    pub(super) port: u16,
    pub(super) protocol: &'a str,
    pub(super) formats: &'a str,
}

impl<'a> MediaLine<'a> {
    pub(super) fn parse(line: &'a str) -> Option<MediaLine<'a>> {
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

    pub(super) fn formats(&self) -> impl Iterator<Item = &'a str> {
        self.formats
            .split_ascii_whitespace()
            .take(PAYLOAD_TYPES_MAX)
    }

    /// Returns the format that an answer names if it rejects the section.
    pub(super) fn first_format(&self) -> &'a str {
        self.formats()
            .next()
            .filter(|format| is_token(format))
            .unwrap_or("0")
    }

    pub(super) fn content(&self, sctp_port: Option<u16>) -> SectionContent {
        match (self.kind, self.protocol, sctp_port) {
            ("audio", "UDP/TLS/RTP/SAVPF", _) => SectionContent::Rtp(Kind::Audio),
            ("video", "UDP/TLS/RTP/SAVPF", _) => SectionContent::Rtp(Kind::Video),
            ("application", "UDP/DTLS/SCTP", Some(port)) => SectionContent::Application(port),
            (other, ..) => SectionContent::Other(other.into()),
        }
    }
}

/// Attributes collected in one pass over a section, by reference.
#[derive(Default)]
pub(super) struct SectionScan<'a> {
    pub(super) mid: Option<&'a str>,
    pub(super) direction: Option<Direction>,
    pub(super) sctp_port: Option<u16>,
    pub(super) reduced_size: bool,
    /// Payload type and `NAME/CLOCK[/CHANNELS]`.
    pub(super) maps: Vec<(u8, &'a str)>,
    pub(super) parameters: Vec<(u8, &'a str)>,
    /// Payload type and feedback message; `None` stands for `*`.
    pub(super) feedback: Vec<(Option<u8>, RtcpFeedback)>,
    pub(super) extensions: ExtensionIds,
    pub(super) ssrc: Option<Ssrc>,
    pub(super) fid: Option<(Ssrc, Ssrc)>,
    pub(super) msid: Option<&'a str>,
    pub(super) ssrc_msid: Option<&'a str>,
}

impl<'a> SectionScan<'a> {
    /// Returns the mid. It is empty for a rejected section without one.
    pub(super) fn usable_mid(&self, media: &MediaLine<'_>) -> Result<&'a str, &'static str> {
        match self.mid {
            Some(mid) if is_token(mid) && mid.len() <= MID_BYTES_MAX => Ok(mid),
            None if media.port == 0 => Ok(""),
            _ => Err("it has no usable mid"),
        }
    }

    pub(super) fn attribute(&mut self, name: &'a str, value: &'a str) {
        match name {
            "mid" => self.mid = Some(value),
            "sendrecv" => self.direction = Some(Direction::SendRecv),
            "sendonly" => self.direction = Some(Direction::SendOnly),
            "recvonly" => self.direction = Some(Direction::RecvOnly),
            "inactive" => self.direction = Some(Direction::Inactive),
            "sctp-port" => self.sctp_port = value.parse().ok(),
            "rtcp-rsize" => self.reduced_size = true,
            "rtpmap" if self.maps.len() < PAYLOAD_TYPES_MAX => {
                self.maps.extend(payload_type_and_text(value))
            }
            "fmtp" if self.parameters.len() < PAYLOAD_TYPES_MAX => {
                self.parameters.extend(payload_type_and_text(value))
            }
            "rtcp-fb" if self.feedback.len() < PAYLOAD_TYPES_MAX * RtcpFeedback::ALL.len() => {
                self.feedback.extend(payload_type_and_feedback(value))
            }
            "extmap" => self.extension(value),
            "ssrc" => self.source(value),
            "ssrc-group" => self.fid = self.fid.or_else(|| fid(value)),
            "msid" => self.msid = Some(value),
            _ => {}
        }
    }

    /// Reads `ID[/DIRECTION] URI [..]`.
    pub(super) fn extension(&mut self, value: &str) {
        let mut words = value.split_ascii_whitespace();
        let (Some(id), Some(extension)) =
            (words.next(), words.next().and_then(Extension::from_uri))
        else {
            return;
        };
        let id = id.split('/').next().and_then(|id| id.parse::<u8>().ok());
        // Id 15 means "stop reading" in a one-byte header (RFC 8285, section 4.2).
        if let Some(id) = id.filter(|id| !matches!(id, 0 | 15)) {
            self.extensions.set(extension, id);
        }
    }

    /// Reads `SSRC ATTRIBUTE[:VALUE]`.
    pub(super) fn source(&mut self, value: &'a str) {
        let (ssrc, attribute) = value.split_once(' ').unwrap_or((value, ""));
        self.ssrc = self.ssrc.or_else(|| ssrc.parse().ok());
        self.ssrc_msid = self.ssrc_msid.or_else(|| attribute.strip_prefix("msid:"));
    }

    /// Returns the preferred codec of this kind among those that we know.
    pub(super) fn choose_codec(
        &self,
        media: &MediaLine<'_>,
        kind: Kind,
        capabilities: &Capabilities,
        feedback: &[RtcpFeedback],
    ) -> Option<SectionCodec> {
        let known = |codec: &Codec| codec.kind() == kind && capabilities.codecs.contains(codec);
        let mut formats = media
            .formats()
            .filter_map(|format| format.parse::<u8>().ok())
            .filter(|payload_type| *payload_type < 128)
            .filter_map(|payload_type| Some((payload_type, self.codec_of(payload_type)?)))
            .filter(|(_, codec)| known(codec));
        match capabilities.preference {
            Preference::Theirs => formats.find_map(|(payload_type, codec)| {
                self.section_codec(payload_type, codec, feedback)
            }),
            Preference::Ours => {
                let formats: Vec<(u8, Codec)> = formats.collect();
                capabilities.codecs.iter().find_map(|liked| {
                    let mut same = formats.iter().filter(|(_, codec)| codec == liked);
                    same.find_map(|(payload_type, codec)| {
                        self.section_codec(*payload_type, *codec, feedback)
                    })
                })
            }
        }
    }

    fn codec_of(&self, payload_type: u8) -> Option<Codec> {
        let mut map = self.map(payload_type)?.split('/');
        Codec::from_rtpmap(map.next()?.trim(), map.next()?.parse().ok()?)
    }

    /// Returns the codec with its attributes; `None` if it wraps a codec that is not in the
    /// section.
    fn section_codec(
        &self,
        payload_type: u8,
        codec: Codec,
        supported: &[RtcpFeedback],
    ) -> Option<SectionCodec> {
        let parameters = text_of(&self.parameters, payload_type)
            .filter(|text| is_harmless(text))
            .unwrap_or_default();
        let wrapped = match codec.wrapped() {
            Some(wrapped) => Some(Box::new(
                self.wrapped_codec(parameters, wrapped, supported)?,
            )),
            None => None,
        };
        let rtx = self.parameters.iter().find(|(rtx, parameters)| {
            apt(parameters) == Some(payload_type)
                && self
                    .map(*rtx)
                    .is_some_and(|map| codec_name(map).eq_ignore_ascii_case("rtx"))
        });
        let feedback = self
            .feedback
            .iter()
            .filter(|(target, found)| {
                target.is_none_or(|target| target == payload_type) && supported.contains(found)
            })
            .map(|(_, found)| *found);
        Some(SectionCodec {
            codec,
            payload_type,
            rtx_payload_type: rtx.map(|(rtx, _)| *rtx),
            map: self.map(payload_type)?.into(),
            parameters: parameters.into(),
            feedback: feedback.collect(),
            wrapped,
        })
    }

    /// Returns the codec inside, by the first payload type of `a=fmtp:63 111/111` (RFC 2198,
    /// section 5).
    fn wrapped_codec(
        &self,
        parameters: &str,
        wrapped: Codec,
        supported: &[RtcpFeedback],
    ) -> Option<SectionCodec> {
        let payload_type = parameters.split('/').next()?.trim().parse().ok()?;
        let found = self.codec_of(payload_type)? == wrapped;
        found.then(|| self.section_codec(payload_type, wrapped, supported))?
    }

    pub(super) fn map(&self, payload_type: u8) -> Option<&'a str> {
        text_of(&self.maps, payload_type).filter(|map| is_harmless(map))
    }

    pub(super) fn accepted_extensions(&self, capabilities: &Capabilities) -> ExtensionIds {
        let mut accepted = ExtensionIds::default();
        for extension in capabilities.extensions {
            if let Some(id) = self.extensions.id(*extension) {
                accepted.set(*extension, id);
            }
        }
        accepted
    }
}

pub(super) fn text_of<'a>(entries: &[(u8, &'a str)], payload_type: u8) -> Option<&'a str> {
    entries
        .iter()
        .find(|(of, _)| *of == payload_type)
        .map(|(_, text)| *text)
}

/// Reads `PT TEXT`; payload types have 7 bits.
pub(super) fn payload_type_and_text(value: &str) -> Option<(u8, &str)> {
    let (payload_type, text) = value.split_once(' ')?;
    Some((
        payload_type
            .parse()
            .ok()
            .filter(|payload_type| *payload_type < 128)?,
        text,
    ))
}

pub(super) fn payload_type_and_feedback(value: &str) -> Option<(Option<u8>, RtcpFeedback)> {
    let (target, text) = value.split_once(' ')?;
    let target = if target == "*" {
        None
    } else {
        Some(target.parse().ok()?)
    };
    Some((target, RtcpFeedback::from_text(text)?))
}

pub(super) fn codec_name(map: &str) -> &str {
    map.split('/').next().unwrap_or_default()
}

/// Returns the payload type that an RTX payload type repairs (RFC 4588, section 8.6).
pub(super) fn apt(parameters: &str) -> Option<u8> {
    parameters
        .split(';')
        .find_map(|parameter| parameter.trim().strip_prefix("apt="))
        .and_then(|apt| apt.parse().ok())
}

/// Reads `FID MEDIA RTX` (RFC 5576, section 4.2).
pub(super) fn fid(value: &str) -> Option<(Ssrc, Ssrc)> {
    let mut words = value.strip_prefix("FID ")?.split_ascii_whitespace();
    Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}

pub(super) fn split_msid(msid: &str) -> (&str, &str) {
    let (stream, track) = msid.split_once(' ').unwrap_or((msid, ""));
    let short = |text: &str| text.len() <= TEXT_BYTES_MAX;
    if short(stream) && short(track) {
        (stream, track.trim())
    } else {
        ("", "")
    }
}

/// Returns whether the text is a `token` of RFC 8866.
pub(super) fn is_token(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|b| b.is_ascii_graphic() && !br#""(),/:;<=>?@[\]"#.contains(&b))
}

/// Returns whether the text may be repeated in an answer: printable, on one line, short.
pub(super) fn is_harmless(text: &str) -> bool {
    text.len() <= TEXT_BYTES_MAX && text.bytes().all(|b| b == b' ' || b.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_is_of_one_text_and_of_its_lines_that_may_stand_in_any_order() {
        let text = "m=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:0\r\na=extmap:1 urn:a\r\na=extmap:2 urn:b\r\na=sendrecv\r\n";
        let stamp = Stamp::of(text);
        assert!(stamp.is_of(text));
        assert!(
            stamp
                .is_of(&text.replace("1 urn:a\r\na=extmap:2 urn:b", "2 urn:b\r\na=extmap:1 urn:a"))
        );
        let swapped = text
            .replace("a=mid:0", "a=other")
            .replace("a=sendrecv", "a=mid:0");
        assert!(!stamp.is_of(&swapped.replace("a=other", "a=sendrecv")));
        for at in 0..text.len() {
            let mut other = text.as_bytes().to_vec();
            other[at] ^= 1;
            assert!(
                !stamp.is_of(std::str::from_utf8(&other).unwrap()),
                "byte {at}"
            );
            assert!(!stamp.is_of(&text[..at]), "the first {at} bytes");
        }
    }

    #[test]
    fn exact_hashes_of_texts_that_differ_in_their_last_bytes_differ() {
        let text = |number: u32| format!("a=ssrc:{number}\r\n");
        let hashes: std::collections::BTreeSet<u64> = (0..10_000)
            .map(|number| hash_exactly(&text(number)))
            .collect();
        assert_eq!(hashes.len(), 10_000);
    }
}
