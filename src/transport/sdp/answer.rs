//! Answers to offers, incrementally: only sections that changed are read again.

use super::scan::*;
use super::write::*;
use super::*;

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
    pub(super) capabilities: Capabilities,
    pub(super) sections: Vec<Section>,
    pub(super) version: u64,
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
