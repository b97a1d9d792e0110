//! Answers offers incrementally: only sections that changed are read again.

use super::scan::*;
use super::sections::*;
use super::write::*;
use super::*;

/// Result of one offer.
#[derive(Clone, Debug)]
pub struct AnsweredOffer {
    pub sdp: String,
    pub remote: RemoteTransport,
    /// Our DTLS role.
    pub setup: DtlsSetup,
    /// Tracks that became active with this offer. If a track took over a section, it is here and
    /// the previous one in `removed`.
    pub added: Vec<RemoteTrack>,
    /// Tracks of the last offer that are now inactive, gone or replaced, as they were.
    pub removed: Vec<RemoteTrack>,
    /// Tracks that continue with the same mid, SSRC and names, but with other payload types,
    /// extension ids or RTX. This happens because a server first offers all it has, and after the
    /// answer only what we accepted.
    pub updated: Vec<RemoteTrack>,
    /// Number of sections that would send but have no codec in common with us, no `a=ssrc`, or no
    /// place in the bundle. All but the second kind are rejected.
    pub unusable: usize,
    /// Number of sections that were read; the others were unchanged.
    pub sections_read: usize,
}

/// Answers the offers of one peer connection in sequence.
pub struct Answerer {
    capabilities: Capabilities,
    sections: RemoteSections,
    pub(super) version: u64,
}

impl Answerer {
    pub fn new(capabilities: Capabilities) -> Answerer {
        Answerer {
            capabilities,
            sections: RemoteSections::default(),
            version: 0,
        }
    }

    /// Answers `offer` for our end `local`. After an error the state is the same as before the
    /// offer.
    pub fn answer(
        &mut self,
        offer: &str,
        local: &LocalTransport,
    ) -> Result<AnsweredOffer, SdpError> {
        let split = SplitDescription::new(offer)?;
        let change = self.sections.compare(&split, |_| &self.capabilities)?;
        let (tagged, sections_read) = (change.tagged, change.sections_read());
        let remote = split.remote_transport(tagged)?;

        let Diff {
            added,
            removed,
            updated,
        } = self.sections.apply(change);
        let sections = self.sections.as_slice();
        let unusable = sections
            .iter()
            .filter(|section| section.sends() && section.active_track().is_none())
            .count();
        self.version += 1;
        let setup = DtlsSetup::answer(remote.setup, local.setup);
        let sdp = AnswerWriter {
            local,
            setup,
            tagged,
        }
        .write(sections, self.version);
        Ok(AnsweredOffer {
            sdp,
            remote,
            setup,
            added,
            removed,
            updated,
            unusable,
            sections_read,
        })
    }

    /// Returns the tracks that are active after the last offer, in the order of its sections.
    pub fn tracks(&self) -> impl Iterator<Item = &RemoteTrack> {
        self.sections
            .as_slice()
            .iter()
            .filter_map(MediaSection::active_track)
    }
}

/// Writes an answer from sections that have been read.
struct AnswerWriter<'a> {
    local: &'a LocalTransport,
    setup: DtlsSetup,
    tagged: usize,
}

impl AnswerWriter<'_> {
    fn write(&self, sections: &[MediaSection], version: u64) -> String {
        let mut sdp = String::with_capacity(512 + sections.len() * 480);
        write_session(
            &mut sdp,
            self.local,
            version,
            sections
                .iter()
                .filter(|section| section.accepted)
                .map(|section| &*section.mid),
        );
        for (index, section) in sections.iter().enumerate() {
            if section.accepted {
                self.write_accepted(&mut sdp, section, index == self.tagged)
            } else {
                write_rejected(&mut sdp, section)
            }
        }
        sdp
    }

    fn write_accepted(&self, sdp: &mut String, section: &MediaSection, tagged: bool) {
        match (&section.content, &section.codec) {
            (SectionContent::Rtp(_), Some(codec)) => {
                push_media_line(sdp, codec);
                push_transport(sdp, self.local, self.setup, &section.mid, tagged);
                push_extensions(sdp, &section.extensions);
                push(
                    sdp,
                    format_args!(
                        "a={}\r\n",
                        if section.sends() {
                            "recvonly"
                        } else {
                            "inactive"
                        }
                    ),
                );
                push(
                    sdp,
                    format_args!(
                        "a=rtcp-mux\r\n{}",
                        if section.reduced_size {
                            "a=rtcp-rsize\r\n"
                        } else {
                            ""
                        }
                    ),
                );
                push_codec(sdp, codec);
            }
            (SectionContent::Application(port), _) => {
                push_application(sdp, self.local, self.setup, &section.mid, tagged, *port)
            }
            _ => write_rejected(sdp, section),
        }
    }
}

fn write_rejected(sdp: &mut String, section: &MediaSection) {
    match &section.content {
        SectionContent::Rtp(kind) => push(
            sdp,
            format_args!(
                "m={} 0 UDP/TLS/RTP/SAVPF {}\r\n",
                kind_name(*kind),
                section.first_format
            ),
        ),
        SectionContent::Application(_) => push(
            sdp,
            format_args!("m=application 0 UDP/DTLS/SCTP webrtc-datachannel\r\n"),
        ),
        SectionContent::Other(name) => push(
            sdp,
            format_args!("m={name} 0 UDP/TLS/RTP/SAVPF {}\r\n", section.first_format),
        ),
    }
    push(sdp, format_args!("c=IN IP4 0.0.0.0\r\na=inactive\r\n"));
    if !section.mid.is_empty() {
        push(sdp, format_args!("a=mid:{}\r\n", section.mid));
    }
}
