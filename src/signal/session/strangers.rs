//! Publishers that are not of this run, as the server tells of them: who came and went, which
//! tracks they publish, and which of these are muted.
//!
//! Only a run in which nobody publishes needs this, because it judges what others send. In each
//! room one participant of the run is the witness, whose messages count. If it goes, the next one
//! whose message comes takes its place.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use livekit_protocol::{self as proto, participant_info::State};
use prost::Message;

use crate::measure::Kind;
use crate::transport::rtp::Ssrc;
use crate::units::Time;
use crate::words;

/// Numbers of publishers, of changes and of streams that are kept for each room. Further ones are
/// not noted.
const PEOPLE_MAX: usize = 1_000;
const CHANGES_MAX: usize = 200;
const STREAMS_MAX: usize = 100_000;

/// The strangers in each room of a run. Without rooms nothing is noted.
#[derive(Default)]
pub struct Strangers {
    rooms: Vec<Mutex<RoomStrangers>>,
}

#[derive(Default)]
struct RoomStrangers {
    witness: Option<u32>,
    /// Whether a witness has told who was there before.
    is_known: bool,
    /// By the server's sid.
    people: BTreeMap<String, Stranger>,
    changes: Vec<StrangerChange>,
    /// Sid of the track by participant of this run and stream.
    streams: BTreeMap<(u32, Ssrc), Box<str>>,
}

struct Stranger {
    /// By the server's sid.
    tracks: BTreeMap<String, StrangerTrack>,
}

/// A track of a stranger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StrangerTrack {
    pub identity: String,
    pub kind: Kind,
    pub muted: bool,
}

/// What a stranger did, and when it became known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StrangerChange {
    pub identity: String,
    pub deed: StrangerDeed,
    pub at: Time,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StrangerDeed {
    Began(Kind),
    Muted(Kind),
    Unmuted(Kind),
    Ended(Kind),
    Left,
}

impl Strangers {
    pub fn in_rooms(count: u32) -> Strangers {
        let rooms = (0..count).map(|_| Mutex::default());
        Strangers {
            rooms: rooms.collect(),
        }
    }

    fn room(&self, room: u32) -> Option<MutexGuard<'_, RoomStrangers>> {
        let room = self.rooms.get(room as usize)?;
        Some(room.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether anything is noted.
    pub fn is_wanted(&self) -> bool {
        !self.rooms.is_empty()
    }

    /// Takes who was there when a participant of this run joined.
    pub(super) fn take_join(
        &self,
        (room, index): (u32, u32),
        others: impl Iterator<Item = proto::ParticipantInfo>,
        at: Time,
    ) {
        let Some(mut room) = self.room(room).filter(|room| room.is_witness(index)) else {
            return;
        };
        room.witness = Some(index);
        others.for_each(|info| room.take(info, at));
        room.is_known = true;
    }

    /// Takes an update of the server, undecoded.
    pub(super) fn take_update(&self, (room, index): (u32, u32), update: &[u8], at: Time) {
        let Some(mut room) = self.room(room).filter(|room| room.is_witness(index)) else {
            return;
        };
        room.witness = Some(index);
        if let Ok(update) = proto::ParticipantUpdate::decode(update) {
            let participants = update.participants.into_iter();
            participants.for_each(|info| room.take(info, at));
        }
    }

    /// Notes that a participant of this run is gone.
    pub(super) fn release(&self, (room, index): (u32, u32)) {
        if let Some(mut room) = self.room(room).filter(|room| room.is_witness(index)) {
            room.witness = None;
        }
    }

    /// Notes which track a stream carries.
    pub(super) fn note_stream(&self, (room, index): (u32, u32), ssrc: Ssrc, track_sid: &str) {
        if let Some(mut room) = self.room(room)
            && room.streams.len() < STREAMS_MAX
        {
            room.streams.insert((index, ssrc), track_sid.into());
        }
    }

    /// Returns the track that a stream carries, if it is still published.
    pub fn track_of(&self, (room, index): (u32, u32), ssrc: Ssrc) -> Option<StrangerTrack> {
        let room = self.room(room)?;
        let sid = room.streams.get(&(index, ssrc))?;
        let mut people = room.people.values();
        people.find_map(|one| one.tracks.get(&**sid)).cloned()
    }

    /// Returns all changes, in order.
    pub fn changes(&self) -> Vec<StrangerChange> {
        let rooms = 0..self.rooms.len() as u32;
        let rooms = rooms.filter_map(|room| self.room(room));
        let mut changes: Vec<StrangerChange> =
            rooms.flat_map(|room| room.changes.clone()).collect();
        changes.sort_by_key(|change| change.at);
        changes
    }
}

impl RoomStrangers {
    fn is_witness(&self, index: u32) -> bool {
        self.witness.is_none_or(|witness| witness == index)
    }

    fn take(&mut self, info: proto::ParticipantInfo, at: Time) {
        let identity = words::one_line(&info.identity);
        if info.state() == State::Disconnected {
            if self.people.remove(&info.sid).is_some() {
                self.note(&identity, StrangerDeed::Left, at);
            }
            return;
        }
        // Nobody of this run publishes, so whoever has tracks is a stranger.
        let is_new = !self.people.contains_key(&info.sid);
        if is_new && (info.tracks.is_empty() || self.people.len() >= PEOPLE_MAX) {
            return;
        }
        let tracks: BTreeMap<String, StrangerTrack> = info
            .tracks
            .iter()
            .filter_map(|track| {
                let kind = match track.r#type() {
                    proto::TrackType::Audio => Kind::Audio,
                    proto::TrackType::Video => Kind::Video,
                    proto::TrackType::Data => return None,
                };
                let of_one = StrangerTrack {
                    identity: identity.clone(),
                    kind,
                    muted: track.muted,
                };
                Some((track.sid.clone(), of_one))
            })
            .collect();
        let of_one = Stranger {
            tracks: tracks.clone(),
        };
        let known = self.people.insert(info.sid, of_one);
        let known = known.map_or_else(BTreeMap::new, |known| known.tracks);
        for deed in deeds(&known, &tracks) {
            self.note(&identity, deed, at);
        }
    }

    fn note(&mut self, identity: &str, deed: StrangerDeed, at: Time) {
        // What was there before the first of this run came is no change.
        if self.is_known && self.changes.len() < CHANGES_MAX {
            self.changes.push(StrangerChange {
                identity: identity.to_owned(),
                deed,
                at,
            });
        }
    }
}

/// Returns what has changed between two states of a stranger's tracks.
fn deeds(
    known: &BTreeMap<String, StrangerTrack>,
    now: &BTreeMap<String, StrangerTrack>,
) -> Vec<StrangerDeed> {
    let ended = known.iter().filter(|(sid, _)| !now.contains_key(*sid));
    let mut deeds: Vec<StrangerDeed> = ended
        .map(|(_, track)| StrangerDeed::Ended(track.kind))
        .collect();
    for (sid, track) in now {
        match (known.get(sid).map(|known| known.muted), track.muted) {
            (None, _) => deeds.push(StrangerDeed::Began(track.kind)),
            (Some(false), true) => deeds.push(StrangerDeed::Muted(track.kind)),
            (Some(true), false) => deeds.push(StrangerDeed::Unmuted(track.kind)),
            (Some(true), true) | (Some(false), false) => {}
        }
    }
    deeds
}

impl StrangerChange {
    /// Remark for the report.
    pub fn note(&self) -> String {
        let (verb, consequence) = match self.deed {
            StrangerDeed::Began(kind) => (
                format!("began to publish {}", kind.name()),
                "nothing of it was there to be judged before",
            ),
            StrangerDeed::Muted(kind) => (
                format!("was muted ({})", kind.name()),
                "nothing of it was there to be judged from then on",
            ),
            StrangerDeed::Unmuted(kind) => (
                format!("was unmuted ({})", kind.name()),
                "it is judged again",
            ),
            StrangerDeed::Ended(kind) => (
                format!("ended its {} track", kind.name()),
                "nothing of it was there to be judged from then on",
            ),
            StrangerDeed::Left => (
                "left the room".to_owned(),
                "nothing of it was there to be judged from then on",
            ),
        };
        format!(
            "of others: {} {verb} {:.1} s into the run: {consequence}",
            self.identity,
            self.at.since(Time::ZERO).as_secs_f64()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(sid: &str, tracks: &[(&str, bool)]) -> proto::ParticipantInfo {
        let track = |(sid, muted): &(&str, bool)| proto::TrackInfo {
            sid: (*sid).into(),
            r#type: proto::TrackType::Audio.into(),
            muted: *muted,
            ..Default::default()
        };
        proto::ParticipantInfo {
            sid: sid.into(),
            identity: format!("{sid}\u{1b}[1m"),
            state: State::Active.into(),
            tracks: tracks.iter().map(track).collect(),
            ..Default::default()
        }
    }

    fn update(infos: Vec<proto::ParticipantInfo>) -> Vec<u8> {
        let update = proto::ParticipantUpdate {
            participants: infos,
        };
        update.encode_to_vec()
    }

    fn at(seconds: u64) -> Time {
        Time::from_millis(seconds * 1_000)
    }

    #[test]
    fn what_strangers_do_is_told_once_and_what_was_there_before_is_not() {
        let strangers = Strangers::in_rooms(1);
        strangers.take_join((0, 3), [info("ann", &[("TR_1", false)])].into_iter(), at(0));
        for witness in [3, 4] {
            let muted = update(vec![info("ann", &[("TR_1", true)]), info("listener", &[])]);
            strangers.take_update((0, witness), &muted, at(4));
        }
        strangers.release((0, 3));
        let mut gone = info("ann", &[]);
        gone.state = State::Disconnected.into();
        let more = update(vec![gone, info("bob", &[("TR_2", false)])]);
        strangers.take_update((0, 4), &more, at(6));
        strangers.take_update((0, 4), b"\xff\xff\xff", at(7));
        strangers.take_update((7, 4), &more, at(7));
        let notes: Vec<String> = strangers
            .changes()
            .iter()
            .map(StrangerChange::note)
            .collect();
        assert_eq!(notes.len(), 3, "{notes:?}");
        assert!(
            notes[0].contains(" was muted (audio) 4.0 s into the run: "),
            "{notes:?}"
        );
        assert!(
            notes[1].contains(" left the room 6.0 s into the run: "),
            "{notes:?}"
        );
        assert!(
            notes[2].contains(" began to publish audio 6.0 s into the run: "),
            "{notes:?}"
        );
        assert!(
            notes.iter().all(|note| !note.contains('\u{1b}')),
            "{notes:?}"
        );
    }

    #[test]
    fn a_stream_leads_to_its_track_as_long_as_that_is_published() {
        let strangers = Strangers::in_rooms(1);
        strangers.note_stream((0, 1), Ssrc(7), "TR_1");
        assert_eq!(strangers.track_of((0, 1), Ssrc(7)), None);
        strangers.take_join((0, 1), [info("ann", &[("TR_1", false)])].into_iter(), at(0));
        let track = strangers.track_of((0, 1), Ssrc(7)).unwrap();
        assert_eq!((track.kind, track.muted), (Kind::Audio, false));
        strangers.take_update((0, 1), &update(vec![info("ann", &[])]), at(2));
        assert_eq!(strangers.track_of((0, 1), Ssrc(7)), None);
        assert!(!Strangers::default().is_wanted());
    }
}
