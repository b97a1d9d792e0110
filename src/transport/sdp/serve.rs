//! Descriptions as a server writes them, for many clients.
//!
//! [`SubscriberOffer`] keeps the sections of a subscriber connection as text. An offer to a large
//! room joins these texts, and only changed sections are written anew. [`ClientDescriptions`] reads
//! a client's descriptions the same way: a section with an unchanged text is not read again.
//! [`write_answer`] answers a client's offer, either a publisher's or that of a single connection,
//! which asks for our tracks as well.
//!
//! The server is `ice-lite` and has one UDP candidate. From the offers of browsers it accepts Opus
//! and VP8 with its retransmissions.

use super::scan::*;
use super::write::*;
use super::*;
use crate::transport::rtp::Ssrc;

/// SCTP port of the section for data channels: the usual one.
const SCTP_PORT: u16 = 5000;
/// Maximum number of simulcast layers of a track: LiveKit's q, h and f.
pub const LAYERS_MAX: usize = 3;
/// Maximum length of a rid. It must fit a one-byte header extension (RFC 8852, section 3.1 lists
/// the allowed characters).
const RID_BYTES_MAX: usize = 16;
/// Extensions that the server writes into packets to subscribers.
const SENT_EXTENSIONS: [Extension; 1] = [Extension::AudioLevel];
/// Extensions that the server accepts in sections in which a single connection's client only
/// receives. libwebrtc never again offers an extension that an answer left out, not even in other
/// sections, and a simulcast section must have mid and rid.
const AGREED_EXTENSIONS: [Extension; 4] = [
    Extension::AudioLevel,
    Extension::Mid,
    Extension::Rid,
    Extension::RepairedRid,
];
/// Clients' names for their layers, from low to high.
const KNOWN_RIDS: [&str; LAYERS_MAX] = ["q", "h", "f"];

impl Capabilities {
    /// Capabilities for media that the server receives from publishers.
    pub const SERVER_RECEIVES: Capabilities = Capabilities {
        codecs: &[Codec::Red, Codec::Opus, Codec::Vp8],
        preference: Preference::Ours,
        extensions: &[
            Extension::Mid,
            Extension::Rid,
            Extension::RepairedRid,
            Extension::AudioLevel,
            Extension::TransportCc,
        ],
        feedback: &[
            RtcpFeedback::Nack,
            RtcpFeedback::NackPli,
            RtcpFeedback::CcmFir,
            RtcpFeedback::TransportCc,
        ],
    };
    /// Capabilities for media that the server sends to subscribers, and the feedback from them that
    /// it handles.
    pub const SERVER_SENDS: Capabilities = Capabilities {
        extensions: &SENT_EXTENSIONS,
        feedback: &[
            RtcpFeedback::Nack,
            RtcpFeedback::NackPli,
            RtcpFeedback::CcmFir,
        ],
        ..Capabilities::SERVER_RECEIVES
    };

    /// Returns the capabilities for a section. If the client `sends`, they are those for receiving;
    /// in a section that it only receives in, those for sending.
    fn for_client(sends: bool) -> Capabilities {
        if sends {
            Capabilities::SERVER_RECEIVES
        } else {
            Capabilities {
                extensions: &AGREED_EXTENSIONS,
                ..Capabilities::SERVER_SENDS
            }
        }
    }
}

impl<'a> SectionScan<'a> {
    /// Returns the SSRC of the media and that of its retransmissions.
    fn ssrcs(&self) -> (Option<Ssrc>, Option<Ssrc>) {
        self.fid
            .map_or((self.ssrc, None), |(ssrc, rtx)| (Some(ssrc), Some(rtx)))
    }

    fn stream_and_track(&self) -> (&'a str, &'a str) {
        self.msid
            .or(self.ssrc_msid)
            .map(split_msid)
            .unwrap_or_default()
    }
}

/// Media section of a client's description, as far as a server uses it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientSection {
    pub mid: Box<str>,
    /// Kind; `None` for data channels, or a kind that we do not know.
    pub kind: Option<Kind>,
    /// Whether the client sends in it.
    pub sends: bool,
    /// Whether the client receives our packets in it.
    pub receives: bool,
    /// Payload types; `None` if there is no codec in common.
    pub payloads: Option<PayloadTypes>,
    pub rtx_payload_type: Option<u8>,
    /// Extensions that both sides know, whichever of them sends.
    pub extensions: ExtensionIds,
    pub feedback: FeedbackSet,
    /// Stream and track of `a=msid`. LiveKit's track is the `cid` of its AddTrack.
    pub stream_id: Box<str>,
    pub track_id: Box<str>,
    pub ssrc: Option<Ssrc>,
    pub rtx_ssrc: Option<Ssrc>,
    /// Simulcast layers from low to high; empty without simulcast.
    pub rids: Vec<Box<str>>,
    content: SectionContent,
    codec: Option<SectionCodec>,
    usable: bool,
    first_format: Box<str>,
}

impl ClientSection {
    /// Returns whether both sides can use the section: it is in the bundle, not rejected, and has a
    /// codec in common.
    pub fn is_usable(&self) -> bool {
        self.usable
    }

    fn parse(text: &str) -> Result<ClientSection, &'static str> {
        let media = lines(text)
            .next()
            .and_then(MediaLine::parse)
            .ok_or("its m-line cannot be read")?;
        let mut scan = SectionScan::default();
        let mut layers = LayerScan::default();
        for (name, value) in attributes(text) {
            scan.attribute(name, value);
            layers.attribute(name, value);
        }
        let mid = scan.usable_mid(&media)?;
        let content = media.content(scan.sctp_port);
        let kind = match content {
            SectionContent::Rtp(kind) => Some(kind),
            _ => None,
        };
        let direction = scan.direction.unwrap_or(Direction::SendRecv);
        let sends = matches!(direction, Direction::SendOnly | Direction::SendRecv);
        let capabilities = Capabilities::for_client(sends);
        let extensions = fitting_extensions(scan.accepted_extensions(&capabilities), kind);
        let feedback: Vec<RtcpFeedback> = capabilities
            .feedback
            .iter()
            .copied()
            .filter(|feedback| fits(*feedback, kind, &extensions))
            .collect();
        let codec = kind.and_then(|kind| scan.choose_codec(&media, kind, &capabilities, &feedback));
        let understood = codec.is_some() || matches!(content, SectionContent::Application(_));
        let (ssrc, rtx_ssrc) = scan.ssrcs();
        let (stream_id, track_id) = scan.stream_and_track();
        let rtx_payload_type = codec.as_ref().and_then(|codec| codec.rtx_payload_type);
        Ok(ClientSection {
            mid: mid.into(),
            kind,
            sends,
            receives: matches!(direction, Direction::RecvOnly | Direction::SendRecv),
            payloads: codec.as_ref().map(SectionCodec::payloads),
            rtx_payload_type,
            extensions,
            feedback: codec
                .as_ref()
                .map_or(FeedbackSet::default(), SectionCodec::all_feedback),
            stream_id: stream_id.into(),
            track_id: track_id.into(),
            ssrc,
            rtx_ssrc: rtx_ssrc.filter(|_| rtx_payload_type.is_some()),
            rids: if sends && kind == Some(Kind::Video) {
                layers.finish()
            } else {
                Vec::new()
            },
            usable: understood && media.port != 0 && !mid.is_empty(),
            first_format: media.first_format().into(),
            content,
            codec,
        })
    }
}

/// Returns whether a feedback message makes sense for a section. Transport-wide feedback needs
/// packets that carry their transport-wide number. As in LiveKit it is for video only: SDKs offer
/// it for audio, but their audio packets carry no number, and libwebrtc's estimate then stays at
/// its minimum.
fn fits(feedback: RtcpFeedback, kind: Option<Kind>, extensions: &ExtensionIds) -> bool {
    match feedback {
        RtcpFeedback::Nack => true,
        RtcpFeedback::TransportCc => {
            kind == Some(Kind::Video) && extensions.id(Extension::TransportCc).is_some()
        }
        RtcpFeedback::NackPli | RtcpFeedback::CcmFir | RtcpFeedback::GoogRemb => {
            kind == Some(Kind::Video)
        }
    }
}

/// Keeps the extensions that fit the kind: loudness is for audio, layers and transport-wide
/// feedback for video. A client that offers more does not get it.
fn fitting_extensions(offered: ExtensionIds, kind: Option<Kind>) -> ExtensionIds {
    let mut fitting = ExtensionIds::default();
    for extension in Extension::ALL {
        let fits = match extension {
            Extension::AudioLevel => kind == Some(Kind::Audio),
            Extension::Rid | Extension::RepairedRid | Extension::TransportCc => {
                kind == Some(Kind::Video)
            }
            _ => kind.is_some(),
        };
        if let (true, Some(id)) = (fits, offered.id(extension)) {
            fitting.set(extension, id);
        }
    }
    fitting
}

/// Scans `a=simulcast:send q;h;f` (RFC 8853).
#[derive(Default)]
struct LayerScan<'a> {
    send: Option<&'a str>,
}

impl<'a> LayerScan<'a> {
    fn attribute(&mut self, name: &str, value: &'a str) {
        if name == "simulcast" {
            let mut words = value
                .split_ascii_whitespace()
                .skip_while(|word| *word != "send")
                .skip(1);
            self.send = self.send.or(words.next());
        }
    }

    /// Returns the rids. If all names are known, they are sorted from low to high. Otherwise their
    /// order is kept, because senders list low layers first.
    fn finish(&self) -> Vec<Box<str>> {
        let names = self.send.unwrap_or_default().split(';');
        let first_alternative = |stream: &'a str| {
            stream
                .split(',')
                .next()
                .unwrap_or_default()
                .trim_start_matches('~')
        };
        let fine = |rid: &&str| {
            !rid.is_empty()
                && rid.len() <= RID_BYTES_MAX
                && rid
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        let mut rids: Vec<&str> = Vec::new();
        for rid in names.map(first_alternative).filter(fine) {
            if rids.len() < LAYERS_MAX && !rids.contains(&rid) {
                rids.push(rid);
            }
        }
        let rank = |rid: &str| KNOWN_RIDS.iter().position(|known| *known == rid);
        if rids.iter().all(|rid| rank(rid).is_some()) {
            rids.sort_by_key(|rid| rank(rid));
        }
        rids.into_iter().map(Into::into).collect()
    }
}

/// Descriptions of one client for one connection: its offers, or its answers to ours.
#[derive(Default)]
pub struct ClientDescriptions {
    sections: Vec<KnownSection>,
    /// Our user name fragment and role in the `answered` texts.
    answered_as: Option<(String, DtlsSetup)>,
}

struct KnownSection {
    stamp: Stamp,
    section: ClientSection,
    /// The section in our last answer. In a large room nearly all of the next answer is the same.
    answered: Option<AnsweredSection>,
}

/// Section of our answer, with everything that it depends on besides the client's own section and
/// our end of the connection.
struct AnsweredSection {
    purpose: Purpose,
    text: Box<str>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Purpose {
    /// Receives: with DTX or without, with RED or without.
    received: Option<(bool, bool)>,
    /// SSRC of the track that is sent. It is unique.
    ssrc: Option<Ssrc>,
    tagged: bool,
}

/// Result of reading one description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientUpdate {
    pub remote: RemoteTransport,
    /// Indices of the sections that differ from the last description's, in order.
    pub changed: Vec<usize>,
}

impl ClientDescriptions {
    /// Reads the next description. After an error the state is the same as before.
    pub fn read(&mut self, text: &str) -> Result<ClientUpdate, SdpError> {
        let split = SplitDescription::new(text)?;
        let session = SessionPart::parse(split.session);
        if split.sections.len() < self.sections.len() {
            // Sections stay, used or not (RFC 9429, section 5.2.2).
            return Err(SdpError::Missing {
                what: "sections that the last one had",
            });
        }
        let mut fresh = Vec::new();
        for (index, text) in split.sections.iter().enumerate() {
            let known = self
                .sections
                .get(index)
                .filter(|known| known.stamp.is_of(text));
            let bundled =
                |section: &ClientSection| session.bundle.binary_search(&&*section.mid).is_ok();
            match known {
                Some(KnownSection { section, .. })
                    if section.usable == (section.usable && bundled(section)) => {}
                _ => {
                    let mut section = ClientSection::parse(text)
                        .map_err(|what| SdpError::Section { index, what })?;
                    section.usable = section.usable && bundled(&section);
                    fresh.push((index, Stamp::of(text), section));
                }
            }
        }
        let tagged = self
            .first_usable(&fresh, split.sections.len())
            .ok_or(SdpError::NoSections)?;
        self.refuse_duplicate_mids(&fresh)?;
        let remote = split.remote_transport(tagged)?;
        let changed = fresh.iter().map(|(index, ..)| *index).collect();
        for (index, stamp, section) in fresh {
            let section = KnownSection {
                stamp,
                section,
                answered: None,
            };
            match self.sections.get_mut(index) {
                Some(slot) => *slot = section,
                None => self.sections.push(section),
            }
        }
        Ok(ClientUpdate { remote, changed })
    }

    pub fn sections(&self) -> impl ExactSizeIterator<Item = &ClientSection> {
        self.sections.iter().map(|known| &known.section)
    }

    pub fn section(&self, index: usize) -> Option<&ClientSection> {
        self.sections.get(index).map(|known| &known.section)
    }

    /// Returns the section whose transport applies to all (RFC 9143): the first usable one.
    fn first_usable(&self, fresh: &[(usize, Stamp, ClientSection)], count: usize) -> Option<usize> {
        let mut fresh = fresh.iter().peekable();
        (0..count).find(|index| match fresh.next_if(|(at, ..)| at == index) {
            Some((_, _, section)) => section.usable,
            None => self.section(*index).is_some_and(|section| section.usable),
        })
    }

    fn refuse_duplicate_mids(
        &self,
        fresh: &[(usize, Stamp, ClientSection)],
    ) -> Result<(), SdpError> {
        if fresh.is_empty() {
            return Ok(());
        }
        let mut replaced = fresh.iter().map(|(index, ..)| *index).peekable();
        let kept = self.sections.iter().enumerate();
        let kept = kept.filter_map(|(index, known)| {
            replaced
                .next_if_eq(&index)
                .is_none()
                .then_some(&*known.section.mid)
        });
        refuse_duplicates(
            kept.chain(fresh.iter().map(|(_, _, section)| &*section.mid))
                .collect(),
        )
    }
}

/// Track on its way to one client, as our descriptions name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SentTrack {
    /// Stream id. LiveKit's is `PARTICIPANT_SID|TRACK_SID`.
    pub stream_id: String,
    /// Track id. LiveKit's is the track's sid.
    pub track_id: String,
    pub ssrc: Ssrc,
    /// SSRC of retransmissions, for video.
    pub rtx_ssrc: Option<Ssrc>,
    pub codec: Codec,
}

/// Purpose of a section of the client's offer in our answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SectionUse<'a> {
    /// We receive the client's track. `dtx`: it may go silent between words. `red`: it is to send
    /// audio with RED, if it can.
    Receive { dtx: bool, red: bool },
    /// We send this track.
    Send(&'a SentTrack),
    /// Nothing flows now.
    Idle,
}

/// Writes our answer to the client's last offer. `section_use` is called for each usable media
/// section, with its index; data channels are always accepted. Sections that did not change since
/// the last answer are copied from it.
///
/// `local.setup` is our role, `Active` or `Passive`.
pub fn write_answer<'a>(
    offer: &mut ClientDescriptions,
    local: &LocalTransport,
    version: u64,
    mut section_use: impl FnMut(usize, &ClientSection) -> SectionUse<'a>,
) -> String {
    offer.answer_as(local);
    let mut sdp = String::with_capacity(512 + offer.sections.len() * 640);
    let usable = offer.sections().filter(|section| section.usable);
    write_lite_session(
        &mut sdp,
        local,
        version,
        usable.map(|section| &*section.mid),
    );
    let mut tagged = true;
    for (index, known) in offer.sections.iter_mut().enumerate() {
        let section_use = if known.section.usable && known.section.kind.is_some() {
            section_use(index, &known.section)
        } else {
            SectionUse::Idle
        };
        sdp.push_str(known.answer(local, section_use, tagged));
        tagged &= !known.section.usable;
    }
    sdp
}

impl ClientDescriptions {
    /// Forgets the answers that were written with another user name fragment or role.
    fn answer_as(&mut self, local: &LocalTransport) {
        let known = self.answered_as.as_ref();
        if known.is_none_or(|(ufrag, setup)| *ufrag != local.ufrag || *setup != local.setup) {
            self.answered_as = Some((local.ufrag.clone(), local.setup));
            self.sections
                .iter_mut()
                .for_each(|known| known.answered = None);
        }
    }
}

impl KnownSection {
    fn answer(
        &mut self,
        local: &LocalTransport,
        section_use: SectionUse<'_>,
        tagged: bool,
    ) -> &str {
        let purpose = Purpose {
            received: match section_use {
                SectionUse::Receive { dtx, red } => Some((dtx, red)),
                _ => None,
            },
            ssrc: match section_use {
                SectionUse::Send(track) => Some(track.ssrc),
                _ => None,
            },
            tagged,
        };
        let section = &self.section;
        let answered = self
            .answered
            .take()
            .filter(|answered| answered.purpose == purpose);
        let answered = answered.unwrap_or_else(|| {
            let mut text = String::new();
            match (&section.content, &section.codec) {
                (SectionContent::Application(_), _) if section.usable => {
                    push_application(
                        &mut text,
                        local,
                        local.setup,
                        &section.mid,
                        tagged,
                        SCTP_PORT,
                    );
                }
                (SectionContent::Rtp(_), Some(codec)) if section.usable => {
                    push_answered(&mut text, local, section, codec, section_use, tagged)
                }
                _ => push_rejected(&mut text, section),
            }
            AnsweredSection {
                purpose,
                text: text.into(),
            }
        });
        &self.answered.insert(answered).text
    }
}

fn push_answered(
    sdp: &mut String,
    local: &LocalTransport,
    section: &ClientSection,
    codec: &SectionCodec,
    section_use: SectionUse<'_>,
    tagged: bool,
) {
    let codec = match section_use {
        SectionUse::Receive { red: false, .. } => codec.plain(),
        SectionUse::Send(track) if track.codec != codec.codec => codec.plain(),
        _ => codec,
    };
    push_media_line(sdp, codec);
    push_transport(sdp, local, local.setup, &section.mid, tagged);
    push_extensions(sdp, &section.extensions);
    let direction = match section_use {
        SectionUse::Receive { .. } => "recvonly",
        SectionUse::Send(_) => "sendonly",
        SectionUse::Idle => "inactive",
    };
    push(
        sdp,
        format_args!("a={direction}\r\na=rtcp-mux\r\na=rtcp-rsize\r\n"),
    );
    match section_use {
        SectionUse::Receive { dtx: true, .. } => codec
            .formats()
            .for_each(|format| push_format(sdp, format, &with_dtx(format))),
        _ => push_codec(sdp, codec),
    }
    match section_use {
        SectionUse::Receive { .. } if !section.rids.is_empty() => {
            push_received_rids(sdp, &section.rids)
        }
        SectionUse::Send(track) => push_sent_track(sdp, track, section.rtx_payload_type.is_some()),
        _ => {}
    }
}

/// Returns the parameters with DTX. Opus senders go silent only if the answer asks for it (RFC
/// 7587, section 6.1), as LiveKit's answer does.
fn with_dtx(codec: &SectionCodec) -> String {
    let parameters = &codec.parameters;
    match codec.codec {
        Codec::Opus if parameters.is_empty() => "usedtx=1".into(),
        Codec::Opus => format!("{parameters};usedtx=1"),
        Codec::Red | Codec::Vp8 => parameters.to_string(),
    }
}

fn push_received_rids(sdp: &mut String, rids: &[Box<str>]) {
    for rid in rids {
        push(sdp, format_args!("a=rid:{rid} recv\r\n"));
    }
    push(sdp, format_args!("a=simulcast:recv {}\r\n", rids.join(";")));
}

fn push_sent_track(sdp: &mut String, track: &SentTrack, rtx: bool) {
    let SentTrack {
        stream_id,
        track_id,
        ssrc,
        ..
    } = track;
    let rtx_ssrc = track.rtx_ssrc.filter(|_| rtx);
    push(sdp, format_args!("a=msid:{stream_id} {track_id}\r\n"));
    if let Some(rtx_ssrc) = rtx_ssrc {
        push(sdp, format_args!("a=ssrc-group:FID {ssrc} {rtx_ssrc}\r\n"));
    }
    for ssrc in [Some(*ssrc), rtx_ssrc].into_iter().flatten() {
        push(
            sdp,
            format_args!(
                "a=ssrc:{ssrc} cname:{stream_id}\r\na=ssrc:{ssrc} msid:{stream_id} {track_id}\r\n"
            ),
        );
    }
}

fn push_rejected(sdp: &mut String, section: &ClientSection) {
    let first_format = &section.first_format;
    match &section.content {
        SectionContent::Rtp(kind) => push(
            sdp,
            format_args!(
                "m={} 0 UDP/TLS/RTP/SAVPF {first_format}\r\n",
                kind_name(*kind)
            ),
        ),
        SectionContent::Application(_) => push(
            sdp,
            format_args!("m=application 0 UDP/DTLS/SCTP webrtc-datachannel\r\n"),
        ),
        SectionContent::Other(name) => push(
            sdp,
            format_args!("m={name} 0 UDP/TLS/RTP/SAVPF {first_format}\r\n"),
        ),
    }
    push(sdp, format_args!("c=IN IP4 0.0.0.0\r\na=inactive\r\n"));
    if !section.mid.is_empty() {
        push(sdp, format_args!("a=mid:{}\r\n", section.mid));
    }
}

fn write_lite_session<'a>(
    sdp: &mut String,
    local: &LocalTransport,
    version: u64,
    bundle: impl Iterator<Item = &'a str>,
) {
    write_session(sdp, local, version, bundle);
    sdp.push_str("a=ice-lite\r\n");
}

/// Offers of one subscriber connection (dual mode): first the section for data channels, then one
/// section per track.
///
/// A section's `mid` is its index. Sections are never removed. A section whose track is gone
/// becomes inactive. Once the client has answered that, it takes another track of its kind.
#[derive(Default)]
pub struct SubscriberOffer {
    tracks: Vec<OfferedSection>,
    answers: ClientDescriptions,
    version: u64,
    /// Number of track sections in the offer that waits for its answer; `None` if none does.
    offered: Option<usize>,
}

struct OfferedSection {
    codec: Codec,
    track: Option<SentTrack>,
    /// The section in the offer; empty if it must be written.
    text: String,
    /// Whether the client has answered an offer in which it was inactive.
    free: bool,
    /// Whether the track is in the client's last answer.
    agreed: bool,
}

/// Section of a client's answer: what the client agreed to receive in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AgreedSection {
    /// Index that [`SubscriberOffer::add`] returned.
    pub section: usize,
    /// Agreed format; `None` if the client rejected the section.
    pub media: Option<AgreedMedia>,
}

/// Format of the packets of a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AgreedMedia {
    pub payloads: PayloadTypes,
    pub rtx_payload_type: Option<u8>,
    pub extensions: ExtensionIds,
}

impl AgreedMedia {
    /// Returns what a section of a client's description allows us to send in it.
    pub fn of(section: &ClientSection) -> Option<AgreedMedia> {
        let payloads = section
            .payloads
            .filter(|_| section.usable && section.receives)?;
        Some(AgreedMedia {
            payloads,
            rtx_payload_type: section.rtx_payload_type,
            extensions: SENT_EXTENSIONS
                .into_iter()
                .filter_map(|extension| Some((extension, section.extensions.id(extension)?)))
                .collect(),
        })
    }
}

impl SubscriberOffer {
    /// Adds a track to the next offer; returns its section.
    pub fn add(&mut self, track: SentTrack) -> usize {
        let codec = track.codec;
        let fresh = OfferedSection {
            codec,
            track: Some(track),
            text: String::new(),
            free: false,
            agreed: false,
        };
        match self
            .tracks
            .iter()
            .position(|section| section.free && section.codec.kind() == codec.kind())
        {
            Some(index) => {
                if let Some(slot) = self.tracks.get_mut(index) {
                    *slot = fresh;
                }
                index + 1
            }
            None => {
                self.tracks.push(fresh);
                self.tracks.len()
            }
        }
    }

    /// Removes the track of a section from the next offer.
    pub fn remove(&mut self, section: usize) {
        if let Some(section) = section
            .checked_sub(1)
            .and_then(|index| self.tracks.get_mut(index))
        {
            section.track = None;
            section.agreed = false;
            section.text.clear();
        }
    }

    /// Returns the sections that carry a track, as their index (the mid) and the track, in order.
    pub fn tracks(&self) -> impl Iterator<Item = (usize, &SentTrack)> {
        let sections = self.tracks.iter().enumerate();
        sections.filter_map(|(index, section)| Some((index + 1, section.track.as_ref()?)))
    }

    /// Marks all sections to be written anew, because each contains the credentials that changed.
    pub fn rewrite(&mut self) {
        self.tracks
            .iter_mut()
            .for_each(|section| section.text.clear());
    }

    pub fn is_waiting_for_answer(&self) -> bool {
        self.offered.is_some()
    }

    /// Returns the next offer. There must be no other until it is answered.
    pub fn offer(&mut self, local: &LocalTransport) -> String {
        self.version += 1;
        self.offered = Some(self.tracks.len());
        for (index, section) in self
            .tracks
            .iter_mut()
            .enumerate()
            .filter(|(_, section)| section.text.is_empty())
        {
            section.write(index + 1, local);
        }
        let bytes: usize = self
            .tracks
            .iter()
            .map(|section| section.text.len() + 6)
            .sum();
        let mut sdp = String::with_capacity(bytes + 1024);
        let mids: Vec<String> = (0..=self.tracks.len()).map(|mid| mid.to_string()).collect();
        write_lite_session(
            &mut sdp,
            local,
            self.version,
            mids.iter().map(String::as_str),
        );
        push_application(&mut sdp, local, DtlsSetup::ActPass, "0", true, SCTP_PORT);
        self.tracks
            .iter()
            .for_each(|section| sdp.push_str(&section.text));
        sdp
    }

    /// Takes the client's answer to the last offer. Returns the remote end, and what was agreed for
    /// sections that were not agreed before.
    pub fn answered(
        &mut self,
        answer: &str,
    ) -> Result<(RemoteTransport, Vec<AgreedSection>), SdpError> {
        let Some(count) = self.offered else {
            return Err(SdpError::Missing {
                what: "an offer to answer",
            });
        };
        let update = self.answers.read(answer)?;
        if self.answers.sections().len() != count + 1 {
            return Err(SdpError::Missing {
                what: "as many sections as the offer",
            });
        }
        self.offered = None;
        let mut agreed = Vec::new();
        let answered = self.answers.sections().skip(1).enumerate();
        for ((index, answer), section) in answered.zip(&mut self.tracks) {
            // A section that changed after the offer was made waits for the next one.
            let current = !section.text.is_empty();
            section.free |= current && section.track.is_none();
            if current && section.track.is_some() && !section.agreed {
                section.agreed = true;
                agreed.push(AgreedSection {
                    section: index + 1,
                    media: AgreedMedia::of(answer)
                        .filter(|media| media.payloads.codec.kind() == section.codec.kind()),
                });
            }
        }
        Ok((update.remote, agreed))
    }
}

impl OfferedSection {
    fn write(&mut self, index: usize, local: &LocalTransport) {
        let codec = SectionCodec::offered(self.codec, Capabilities::SERVER_SENDS.feedback);
        let sdp = &mut self.text;
        push_media_line(sdp, &codec);
        push_transport(sdp, local, DtlsSetup::ActPass, &index.to_string(), false);
        push_extensions(sdp, &sent_extensions(self.codec.kind()));
        let direction = if self.track.is_some() {
            "sendonly"
        } else {
            "inactive"
        };
        push(
            sdp,
            format_args!("a={direction}\r\na=rtcp-mux\r\na=rtcp-rsize\r\n"),
        );
        push_codec(sdp, &codec);
        if let Some(track) = &self.track {
            push_sent_track(sdp, track, codec.rtx_payload_type.is_some());
        }
    }
}

fn sent_extensions(kind: Kind) -> ExtensionIds {
    let mut offered = ExtensionIds::default();
    let supported = Capabilities::SERVER_SENDS.extensions.iter();
    supported.for_each(|extension| offered.set(*extension, extension.offered_id()));
    fitting_extensions(offered, Some(kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BROWSER: [&str; 3] = [
        include_str!("../../../fixtures/sdp/browser-single-1-join.sdp"),
        include_str!("../../../fixtures/sdp/browser-single-2-audio.sdp"),
        include_str!("../../../fixtures/sdp/browser-single-3-simulcast.sdp"),
    ];

    fn local() -> LocalTransport {
        LocalTransport {
            ufrag: "theserver".into(),
            pwd: "0123456789abcdefghijklmn".into(),
            fingerprint: Fingerprint([7; 32]),
            setup: DtlsSetup::Active,
            candidates: vec![Candidate::host("127.0.0.1:7882".parse().unwrap())],
            session_id: 1,
        }
    }

    fn track(number: u32) -> SentTrack {
        SentTrack {
            codec: Codec::Opus,
            stream_id: format!("PA_{number}|TR_{number}"),
            track_id: format!("TR_{number}"),
            ssrc: Ssrc(number * 2 + 1),
            rtx_ssrc: Some(Ssrc(number * 2)),
        }
    }

    fn oracle(sdp: &str) -> rtc_sdp::description::session::SessionDescription {
        rtc_sdp::description::session::SessionDescription::unmarshal(&mut std::io::Cursor::new(sdp))
            .unwrap_or_else(|error| panic!("{error}: {sdp}"))
    }

    fn sections(sdp: &str) -> Vec<&str> {
        SplitDescription::new(sdp).unwrap().sections
    }

    #[test]
    fn a_new_track_changes_no_section_but_its_own_and_only_that_is_read() {
        let (mut offers, mut answerer) = (
            SubscriberOffer::default(),
            Answerer::new(Capabilities::SUBSCRIBER),
        );
        let mut before: Vec<String> = Vec::new();
        for number in 1..=150 {
            let kind = if number % 3 == 0 {
                Kind::Video
            } else {
                Kind::Audio
            };
            assert_eq!(
                offers.add(SentTrack {
                    codec: Codec::default_of(kind),
                    ..track(number)
                }),
                number as usize
            );
            let offer = offers.offer(&local());
            let now = sections(&offer);
            assert_eq!(now.len(), number as usize + 1);
            assert!(before.iter().zip(&now).all(|(before, now)| before == now));
            before = now.into_iter().map(str::to_owned).collect();
            let answered = answerer.answer(&offer, &local()).unwrap();
            assert_eq!(answered.sections_read, if number == 1 { 2 } else { 1 });
            let (_, agreed) = offers.answered(&answered.sdp).unwrap();
            let media = agreed[0].media.unwrap();
            assert_eq!((agreed.len(), agreed[0].section), (1, number as usize));
            assert_eq!(media.rtx_payload_type.is_some(), kind == Kind::Video);
        }
        let whole = oracle(&offers.offer(&local()));
        assert_eq!(whole.media_descriptions.len(), 151);
        assert!(
            whole
                .attributes
                .iter()
                .any(|attribute| attribute.key == "ice-lite")
        );
    }

    #[test]
    fn new_credentials_are_in_every_section() {
        let mut offers = SubscriberOffer::default();
        offers.add(track(1));
        offers.offer(&local());
        offers.rewrite();
        let restarted = LocalTransport {
            ufrag: "afresh".into(),
            ..local()
        };
        let offer = offers.offer(&restarted);
        assert_eq!(
            (
                offer.matches("ufrag:afresh").count(),
                offer.contains("theserver")
            ),
            (2, false)
        );
    }

    #[test]
    fn an_answer_must_fit_its_offer() {
        let mut offers = SubscriberOffer::default();
        offers.add(track(1));
        let (first, mut answerer) = (
            offers.offer(&local()),
            Answerer::new(Capabilities::SUBSCRIBER),
        );
        let answer = answerer.answer(&first, &local()).unwrap().sdp;
        let shorter = answer.split("m=audio").next().unwrap();
        assert!(offers.answered(shorter).is_err() && offers.is_waiting_for_answer());
        // An answer from before does not agree on a track that was removed meanwhile.
        offers.remove(1);
        assert_eq!(offers.answered(&answer).unwrap().1, []);
        assert!(offers.answered(&answer).is_err(), "nothing to answer");
        // The client rejects a codec that it does not have.
        offers.add(track(2));
        let offer = offers.offer(&local());
        let answer = answerer.answer(&offer, &local()).unwrap().sdp;
        let (before, after) = answer.rsplit_once("m=audio 9 ").unwrap();
        let (_, agreed) = offers
            .answered(&format!("{before}m=audio 0 {after}"))
            .unwrap();
        assert_eq!(
            agreed.iter().map(|agreed| agreed.media).collect::<Vec<_>>(),
            [None]
        );
    }

    #[test]
    fn a_browsers_offers_are_read_as_far_as_they_changed_and_answered_as_they_are_meant() {
        let mut offers = ClientDescriptions::default();
        let mut read = Vec::new();
        for offer in BROWSER {
            read.push(offers.read(offer).unwrap().changed.len());
        }
        assert_eq!(offers.read(BROWSER[2]).unwrap().changed, [0; 0]);
        let kinds: Vec<Option<Kind>> = offers.sections().map(|section| section.kind).collect();
        assert_eq!(
            kinds
                .iter()
                .filter(|kind| **kind == Some(Kind::Video))
                .count(),
            4
        );
        // All sections of the first offer are read. Of the later ones only those are read whose
        // addresses or tracks changed.
        assert_eq!(read, [7, 7, 5]);
        let publishes = |section: &ClientSection| section.sends && section.kind.is_some();
        let (sent, unused) = (track(1), track(2));
        let answer = write_answer(&mut offers, &local(), 1, |index, section| {
            if publishes(section) {
                SectionUse::Receive {
                    dtx: true,
                    red: false,
                }
            } else if index == 0 {
                SectionUse::Send(&sent)
            } else {
                SectionUse::Idle
            }
        });
        let oracle = oracle(&answer);
        assert_eq!(oracle.media_descriptions.len(), kinds.len());
        for (index, (section, media)) in offers
            .sections()
            .zip(&oracle.media_descriptions)
            .enumerate()
        {
            let has = |key: &str| {
                media
                    .attributes
                    .iter()
                    .any(|attribute| attribute.key == key)
            };
            assert_eq!(has("recvonly"), publishes(section), "section {index}");
            assert_eq!(has("simulcast"), section.rids.len() == 3, "section {index}");
            assert_eq!(has("candidate"), index == 0);
            let codecs = media
                .attributes
                .iter()
                .filter(|attribute| attribute.key == "rtpmap")
                .count();
            assert_eq!(
                codecs,
                match section.kind {
                    None => 0,
                    // RED is not wanted for the published track, and the sent track has none.
                    Some(Kind::Audio) if publishes(section) || index == 0 => 1,
                    Some(_) => 2,
                }
            );
        }
        assert!(answer.contains("a=msid:PA_1|TR_1 TR_1\r\n") && !answer.contains(&unused.track_id));
    }

    #[test]
    fn layers_are_ordered_from_low_to_high_whatever_their_order_in_the_offer() {
        for (offered, expected) in [
            ("send q;h;f", &["q", "h", "f"][..]),
            ("send f;h;q", &["q", "h", "f"]),
            ("recv x send ~h,l;q", &["q", "h"]),
            ("send 1;2;3;4", &["1", "2", "3"]),
            ("send q;q;q", &["q"]),
            ("send ;;a b", &["a"]),
            (
                "send q\u{1};thisridislongerthananyheaderextensionmaybe",
                &[],
            ),
            ("recv q;h", &[]),
        ] {
            let mut scan = LayerScan::default();
            scan.attribute("simulcast", offered);
            let layers = scan.finish();
            assert_eq!(
                layers.iter().map(|rid| &**rid).collect::<Vec<_>>(),
                expected,
                "{offered}"
            );
        }
    }

    #[test]
    fn an_answer_that_is_copied_in_part_reads_as_one_that_is_written_anew() {
        let (first, second) = (track(1), track(2));
        let publishes = |section: &ClientSection| section.sends && section.kind.is_some();
        let mut kept = ClientDescriptions::default();
        let mut restarted = local();
        restarted.ufrag = "thenextone".into();
        let ends = [local(), local(), local(), restarted];
        for (round, end) in ends.iter().enumerate() {
            // Tracks come, change sections and go. DTX is allowed in some rounds and not in others.
            let section_use = |index: usize, section: &ClientSection| match (
                publishes(section),
                (index + round) % 3,
            ) {
                (true, _) => SectionUse::Receive {
                    dtx: round == 1,
                    red: round == 2,
                },
                (false, 0) => SectionUse::Send(&first),
                (false, 1) => SectionUse::Send(&second),
                (false, _) => SectionUse::Idle,
            };
            let offer = BROWSER[round.min(2)];
            let mut anew = ClientDescriptions::default();
            kept.read(offer).unwrap();
            anew.read(offer).unwrap();
            let version = round as u64;
            let answer = write_answer(&mut kept, end, version, section_use);
            assert_eq!(
                answer,
                write_answer(&mut anew, end, version, section_use),
                "round {round}"
            );
            assert_eq!(
                answer,
                write_answer(&mut kept, end, version, section_use),
                "round {round}, again"
            );
        }
    }
}
