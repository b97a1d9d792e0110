//! Writes our own offers and reads the answers to them.

use super::scan::*;
use super::sections::*;
use super::write::*;
use super::*;
use crate::transport::rtp::Ssrc;

/// Local track, for [`Offerer::send`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalTrack {
    pub codec: Codec,
    /// The `cid` of its AddTrack, by which LiveKit finds the track.
    pub cid: String,
    pub stream_id: String,
    pub ssrc: Ssrc,
    /// SSRC of retransmissions (RFC 4588). Without it retransmissions repeat the original packets.
    pub rtx_ssrc: Option<Ssrc>,
    /// Simulcast layers from low to high, `q h f`. If there are any, the section names no SSRC and
    /// packets carry mid and rid instead.
    pub rids: Vec<String>,
}

/// Makes the offers of one peer connection in sequence, and reads the answers to them.
///
/// Sections are numbered in the order in which they are requested, and the number is their `mid`.
/// Sections are never removed.
#[derive(Default)]
pub struct Offerer {
    ours: Vec<Offered>,
    theirs: RemoteSections,
    version: u64,
}

/// Purpose of a section in our offer.
enum Offered {
    /// Data channels.
    Application,
    /// Track that the server may send.
    Receive(Kind),
    Send(LocalTrack),
}

/// Result of one answer.
#[derive(Clone, Debug)]
pub struct Negotiated {
    pub remote: RemoteTransport,
    /// Results for our tracks, in their order.
    pub media: Vec<NegotiatedMedia>,
    /// Tracks of the server that became active with this answer. If a track took over a section, it
    /// is here and the previous one in `removed`.
    pub added: Vec<RemoteTrack>,
    /// Tracks of the last answer that are now inactive or replaced, as they were.
    pub removed: Vec<RemoteTrack>,
    /// Tracks that continue with the same mid, SSRC and names, but other details.
    pub updated: Vec<RemoteTrack>,
    /// Number of sections that were read; the others were unchanged.
    pub sections_read: usize,
}

impl Offerer {
    /// Adds a section for data channels. LiveKit does not require one if no data is to flow.
    pub fn open_data(&mut self) {
        self.ours.push(Offered::Application);
    }

    /// Adds `count` sections in which the server may send a track of this kind.
    pub fn receive(&mut self, kind: Kind, count: usize) -> Result<(), SdpError> {
        if self.ours.len().saturating_add(count) > SECTIONS_MAX {
            return Err(SdpError::TooManySections);
        }
        self.ours.extend((0..count).map(|_| Offered::Receive(kind)));
        Ok(())
    }

    /// Adds a section for a local track.
    pub fn send(&mut self, track: LocalTrack) {
        self.ours.push(Offered::Send(track));
    }

    /// Returns whether there is no section yet, and so nothing to offer.
    pub fn is_empty(&self) -> bool {
        self.ours.is_empty()
    }

    /// Returns the next offer, with all sections so far.
    pub fn offer(&mut self, local: &LocalTransport) -> String {
        self.version += 1;
        let mids: Vec<String> = (0..self.ours.len()).map(|mid| mid.to_string()).collect();
        let mut sdp = String::with_capacity(512 + mids.len() * 640);
        write_session(
            &mut sdp,
            local,
            self.version,
            mids.iter().map(String::as_str),
        );
        let receivers = [Kind::Audio, Kind::Video].map(|kind| Receiver::of(kind, local));
        for (index, (section, mid)) in self.ours.iter().zip(&mids).enumerate() {
            let tagged = index == 0;
            match section {
                Offered::Receive(kind) if !tagged => receivers
                    .iter()
                    .filter(|receiver| receiver.kind == *kind)
                    .for_each(|receiver| receiver.push(&mut sdp, mid)),
                Offered::Application => {
                    push_application(&mut sdp, local, local.setup, mid, tagged, 5000)
                }
                Offered::Receive(kind) => push_receiver(&mut sdp, local, *kind, mid, tagged),
                Offered::Send(track) => push_local_track(&mut sdp, local, track, mid, tagged),
            }
        }
        sdp
    }

    /// Reads the answer to the last offer. After an error the state is the same as before.
    pub fn handle_answer(&mut self, answer: &str) -> Result<Negotiated, SdpError> {
        let split = SplitDescription::new(answer)?;
        if split.sections.len() != self.ours.len() {
            return Err(SdpError::SectionCount {
                answered: split.sections.len(),
                offered: self.ours.len(),
            });
        }
        let change = self
            .theirs
            .compare(&split, |index| match self.ours.get(index) {
                Some(Offered::Send(_)) => &Capabilities::PUBLISHER,
                _ => &Capabilities::SUBSCRIBER,
            })?;
        let sections_read = change.sections_read();
        let remote = split.remote_transport(change.tagged)?;
        let Diff {
            added,
            removed,
            updated,
        } = self.theirs.apply(change);
        let answered = self.ours.iter().zip(self.theirs.as_slice());
        Ok(Negotiated {
            remote,
            media: answered
                .filter(|(ours, _)| matches!(ours, Offered::Send(_)))
                .filter_map(|(_, theirs)| NegotiatedMedia::of(theirs))
                .collect(),
            added,
            removed,
            updated,
            sections_read,
        })
    }
}

#[cfg(test)]
impl Offerer {
    /// Returns the server's tracks that are active after the last answer.
    pub(super) fn tracks(&self) -> impl Iterator<Item = &RemoteTrack> {
        self.theirs
            .as_slice()
            .iter()
            .filter_map(MediaSection::active_track)
    }
}

/// Text of a receiving section without its mid. Such sections of one kind differ only in the mid,
/// and a large room's offer has hundreds of them.
struct Receiver {
    kind: Kind,
    before_mid: String,
    behind_mid: String,
}

impl Receiver {
    fn of(kind: Kind, local: &LocalTransport) -> Receiver {
        const MID: &str = "a=mid:";
        let mut before_mid = String::new();
        push_receiver(&mut before_mid, local, kind, "", false);
        let at = before_mid.find(MID).map_or(0, |at| at + MID.len());
        Receiver {
            kind,
            behind_mid: before_mid.split_off(at),
            before_mid,
        }
    }

    fn push(&self, sdp: &mut String, mid: &str) {
        [self.before_mid.as_str(), mid, &self.behind_mid]
            .into_iter()
            .for_each(|part| sdp.push_str(part));
    }
}

fn push_receiver(sdp: &mut String, local: &LocalTransport, kind: Kind, mid: &str, tagged: bool) {
    let liked = liked_codec(kind, &Capabilities::SUBSCRIBER);
    let codec = offered_codec(liked, true, &Capabilities::SUBSCRIBER);
    push_media_line(sdp, &codec);
    push_transport(sdp, local, local.setup, mid, tagged);
    push_extensions(
        sdp,
        &offered_extensions(kind, false, &Capabilities::SUBSCRIBER),
    );
    push(
        sdp,
        format_args!("a=recvonly\r\na=rtcp-mux\r\na=rtcp-rsize\r\n"),
    );
    push_codec(sdp, &codec);
}

fn push_local_track(
    sdp: &mut String,
    local: &LocalTransport,
    track: &LocalTrack,
    mid: &str,
    tagged: bool,
) {
    let has_rids = !track.rids.is_empty();
    let codec = offered_codec(
        track.codec,
        track.rtx_ssrc.is_some() || has_rids,
        &Capabilities::PUBLISHER,
    );
    push_media_line(sdp, &codec);
    push_transport(sdp, local, local.setup, mid, tagged);
    push_extensions(
        sdp,
        &offered_extensions(track.codec.kind(), has_rids, &Capabilities::PUBLISHER),
    );
    push(
        sdp,
        format_args!(
            "a=sendonly\r\na=msid:{} {}\r\na=rtcp-mux\r\na=rtcp-rsize\r\n",
            track.stream_id, track.cid
        ),
    );
    push_codec(sdp, &codec);
    if has_rids {
        push_rids(sdp, &track.rids)
    } else {
        push_sources(sdp, track)
    }
}

/// Returns a codec as it is offered. With `rtx`, retransmissions have an SSRC of their own.
fn offered_codec(codec: Codec, rtx: bool, capabilities: &Capabilities) -> SectionCodec {
    let offered = SectionCodec::offered(codec, capabilities.feedback);
    SectionCodec {
        rtx_payload_type: offered.rtx_payload_type.filter(|_| rtx),
        ..offered
    }
}

/// Returns the preferred codec of a kind.
fn liked_codec(kind: Kind, capabilities: &Capabilities) -> Codec {
    let mut liked = capabilities.codecs.iter().copied();
    liked
        .find(|codec| codec.kind() == kind)
        .expect("a capability has a codec of each kind")
}

fn offered_extensions(kind: Kind, has_rids: bool, capabilities: &Capabilities) -> ExtensionIds {
    let mut offered = ExtensionIds::default();
    for extension in capabilities.extensions {
        let fits = match extension {
            Extension::Rid | Extension::RepairedRid => has_rids,
            Extension::AudioLevel => kind == Kind::Audio,
            _ => true,
        };
        if fits {
            offered.set(*extension, extension.offered_id());
        }
    }
    offered
}

fn push_sources(sdp: &mut String, track: &LocalTrack) {
    let rtx = track.rtx_ssrc.filter(|_| track.codec.has_rtx());
    if let Some(rtx) = rtx {
        push(
            sdp,
            format_args!("a=ssrc-group:FID {} {rtx}\r\n", track.ssrc),
        );
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

/// Result of the negotiation for one of our tracks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NegotiatedMedia {
    pub mid: Box<str>,
    pub kind: Kind,
    /// `false` if the server rejected it, or does not receive it now. Nothing may be sent then.
    pub accepted: bool,
    /// Payload types; `None` only if the track was rejected.
    pub payloads: Option<PayloadTypes>,
    pub rtx_payload_type: Option<u8>,
    pub extensions: ExtensionIds,
    pub feedback: FeedbackSet,
}

impl NegotiatedMedia {
    fn of(section: &MediaSection) -> Option<NegotiatedMedia> {
        let SectionContent::Rtp(kind) = section.content else {
            return None;
        };
        let receives = matches!(section.direction, Direction::RecvOnly | Direction::SendRecv);
        let codec = section.codec.as_ref();
        Some(NegotiatedMedia {
            mid: section.mid.clone(),
            kind,
            accepted: section.accepted && receives,
            payloads: codec.map(SectionCodec::payloads),
            rtx_payload_type: codec.and_then(|codec| codec.rtx_payload_type),
            extensions: section.extensions,
            feedback: codec.map_or(FeedbackSet::default(), SectionCodec::all_feedback),
        })
    }
}
