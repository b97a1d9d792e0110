//! Our own offers, and the answers to them.

use super::scan::*;
use super::write::*;
use super::*;

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
