//! Tracks the other side's media sections from one description to the next. Only sections whose
//! text changed are read again.

use super::scan::*;
use super::*;

/// Sections of the last accepted description, in its order.
#[derive(Default)]
pub(super) struct RemoteSections(Vec<MediaSection>);

/// Changes of a new description against the known sections. They take effect with
/// [`RemoteSections::apply`].
pub(super) struct SectionsChange {
    /// Sections that were read, with their index, in order.
    fresh: Vec<(usize, MediaSection)>,
    accepted: Vec<bool>,
    /// Index of the first accepted section, which carries the bundle's transport.
    pub(super) tagged: usize,
}

impl SectionsChange {
    pub(super) fn sections_read(&self) -> usize {
        self.fresh.len()
    }
}

/// Changes of the active tracks by one description.
#[derive(Default)]
pub(super) struct Diff {
    pub(super) added: Vec<RemoteTrack>,
    pub(super) removed: Vec<RemoteTrack>,
    pub(super) updated: Vec<RemoteTrack>,
}

impl RemoteSections {
    pub(super) fn as_slice(&self) -> &[MediaSection] {
        &self.0
    }

    /// Reads the sections that differ from the last description. `capabilities` returns our
    /// capabilities in the section of an index.
    pub(super) fn compare<'a>(
        &self,
        split: &SplitDescription<'_>,
        capabilities: impl Fn(usize) -> &'a Capabilities,
    ) -> Result<SectionsChange, SdpError> {
        let mut fresh = Vec::new();
        for (index, text) in split.sections.iter().enumerate() {
            if !self
                .0
                .get(index)
                .is_some_and(|known| known.stamp.is_of(text))
            {
                let section = MediaSection::parse(text, Stamp::of(text), capabilities(index));
                fresh.push((
                    index,
                    section.map_err(|what| SdpError::Section { index, what })?,
                ));
            }
        }
        let (accepted, tagged) = self.choose(
            &fresh,
            split.sections.len(),
            &SessionPart::parse(split.session),
        )?;
        Ok(SectionsChange {
            fresh,
            accepted,
            tagged,
        })
    }

    /// Returns which sections are accepted, and the first of them. This is decided before any state
    /// changes.
    fn choose(
        &self,
        fresh: &[(usize, MediaSection)],
        count: usize,
        session: &SessionPart<'_>,
    ) -> Result<(Vec<bool>, usize), SdpError> {
        let mut fresh = fresh.iter().peekable();
        let (mut accepted, mut mids) = (Vec::with_capacity(count), Vec::with_capacity(count));
        for index in 0..count {
            let section = match fresh.next_if(|(at, _)| *at == index) {
                Some((_, section)) => section,
                None => self.0.get(index).ok_or(SdpError::NoSections)?,
            };
            accepted
                .push(section.acceptable() && session.bundle.binary_search(&&*section.mid).is_ok());
            mids.push(&*section.mid);
        }
        refuse_duplicates(mids)?;
        let tagged = accepted
            .iter()
            .position(|accepted| *accepted)
            .ok_or(SdpError::NoSections)?;
        Ok((accepted, tagged))
    }

    /// Applies the changed sections and returns which tracks were added, removed and updated.
    pub(super) fn apply(&mut self, change: SectionsChange) -> Diff {
        let SectionsChange {
            fresh, accepted, ..
        } = change;
        let mut diff = Diff::default();
        // Descriptions never lose sections (RFC 9429, section 5.2.2). If one does, the tracks of
        // the lost sections are gone.
        let lost = self.0.split_off(accepted.len().min(self.0.len()));
        lost.into_iter()
            .for_each(|section| diff.note(section.into_active_track(), None));
        let mut fresh = fresh.into_iter().peekable();
        for (index, accepted) in accepted.iter().enumerate() {
            let fresh = fresh
                .next_if(|(at, _)| *at == index)
                .map(|(_, section)| section.accept(*accepted));
            match (self.0.get_mut(index), fresh) {
                (Some(slot), None) if slot.accepted == *accepted => {}
                (Some(slot), fresh) => {
                    let new = fresh.unwrap_or_else(|| slot.clone().accept(*accepted));
                    let new_track = new.active_track().cloned();
                    diff.note(std::mem::replace(slot, new).into_active_track(), new_track);
                }
                (None, fresh) => {
                    diff.note(
                        None,
                        fresh.as_ref().and_then(MediaSection::active_track).cloned(),
                    );
                    self.0.extend(fresh);
                }
            }
        }
        diff
    }
}

impl Diff {
    /// Records a section's track before and after the description.
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
