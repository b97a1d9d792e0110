//! The view of one participant: which of its video tracks have a place on its screen, how large,
//! and what the server must be asked for.
//!
//! It uses no clock and no I/O. Tracks and speakers come in; changes of settings go out.

use crate::transport::rtp::Ssrc;
use livekit_protocol as proto;

use crate::plan::{VideoSpec, ViewLayout, layer_for};
use crate::transport::sdp::RemoteTrack;

/// Width and height in pixels.
pub type Size = (u32, u32);

pub(super) struct Viewer {
    layout: Option<ViewLayout>,
    /// Size of all tracks, whatever the layout.
    size_of_all: Option<Option<Size>>,
    /// Layers that this run's publishers send.
    layers: Vec<VideoSpec>,
    /// Tiles, the last speaker first. If speakers do not matter, they are in the order of arrival.
    tiles: Vec<Tile>,
    shown_ever: Vec<Box<str>>,
}

struct Tile {
    participant_sid: Box<str>,
    track_sid: Box<str>,
    ssrc: Ssrc,
    speaks: bool,
    /// The size that the server was told; `None`: nothing yet, so it sends everything.
    told: Option<Option<Size>>,
}

/// A change of settings to tell the server and the shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ViewChange {
    track_sid: Box<str>,
    pub(super) ssrc: Ssrc,
    size: Option<Size>,
    /// Layer that fits this size; `None`: the track is not wanted.
    pub(super) layer: Option<u8>,
}

impl ViewChange {
    pub(super) fn settings(&self) -> proto::UpdateTrackSettings {
        let (width, height) = self.size.unwrap_or_default();
        proto::UpdateTrackSettings {
            track_sids: vec![self.track_sid.to_string()],
            disabled: self.size.is_none(),
            // Width and height decide. The quality is for servers that do not know them.
            quality: self.layer.unwrap_or_default().into(),
            width,
            height,
            ..Default::default()
        }
    }
}

impl Viewer {
    pub(super) fn new(layout: Option<ViewLayout>, layers: Vec<VideoSpec>) -> Viewer {
        Viewer {
            layout,
            size_of_all: None,
            layers,
            tiles: Vec::new(),
            shown_ever: Vec::new(),
        }
    }

    /// Adds a video track that the server sends, or updates its details.
    pub(super) fn add(&mut self, track: &RemoteTrack) {
        let known = self
            .tiles
            .iter_mut()
            .find(|tile| tile.track_sid == track.track_id);
        match known {
            Some(tile) if tile.ssrc == track.ssrc => {}
            // A new stream of the same track starts without settings.
            Some(tile) => (tile.ssrc, tile.told) = (track.ssrc, None),
            None => self.tiles.push(Tile {
                // LiveKit's stream id is the participant's sid, then a bar and the track's or the
                // stream's name.
                participant_sid: track.stream_id.split('|').next().unwrap_or_default().into(),
                track_sid: track.track_id.clone(),
                ssrc: track.ssrc,
                speaks: false,
                told: None,
            }),
        }
    }

    /// Clears all tracks, and with them what the server was told, because the session is gone.
    pub(super) fn start_over(&mut self) {
        self.tiles.clear();
    }

    pub(super) fn remove(&mut self, ssrc: Ssrc) {
        self.tiles.retain(|tile| tile.ssrc != ssrc);
    }

    /// Updates the speakers. The loudest new one moves to the front, unless the first one still
    /// speaks.
    pub(super) fn handle_speakers(&mut self, speakers: &[proto::SpeakerInfo]) {
        for speaker in speakers {
            let tiles = self
                .tiles
                .iter_mut()
                .filter(|tile| *tile.participant_sid == *speaker.sid);
            tiles.for_each(|tile| tile.speaks = speaker.active);
        }
        if self.layout != Some(ViewLayout::Speaker)
            || self.tiles.first().is_none_or(|first| first.speaks)
        {
            return;
        }
        let loudest = speakers
            .iter()
            .filter(|speaker| speaker.active)
            .filter_map(|speaker| {
                Some((
                    speaker.level,
                    self.tiles
                        .iter()
                        .position(|tile| *tile.participant_sid == *speaker.sid)?,
                ))
            })
            .max_by(|(one, _), (other, _)| one.total_cmp(other));
        if let Some((_, at)) = loudest {
            self.tiles[..=at].rotate_right(1);
        }
    }

    /// From now on, wants every track in this size, or none.
    pub(super) fn show_all(&mut self, size: Option<Size>) {
        self.size_of_all = Some(size);
    }

    /// Returns the changes to send, so that the server sends what is watched.
    pub(super) fn poll_changes(&mut self) -> Vec<ViewChange> {
        let mut changes = Vec::new();
        for at in 0..self.tiles.len() {
            let Some(wanted) = self.wanted(at) else {
                continue;
            };
            let layer = wanted.map(|size| layer_for(&self.layers, size) as u8);
            let tile = &mut self.tiles[at];
            if tile.told.replace(wanted) == Some(wanted) {
                continue;
            }
            if wanted.is_some() && !self.shown_ever.contains(&tile.track_sid) {
                self.shown_ever.push(tile.track_sid.clone());
            }
            changes.push(ViewChange {
                track_sid: tile.track_sid.clone(),
                ssrc: tile.ssrc,
                size: wanted,
                layer,
            });
        }
        changes
    }

    /// Returns the wanted size of a tile; `None`: the server need not be told anything.
    fn wanted(&self, at: usize) -> Option<Option<Size>> {
        let in_layout =
            |layout: ViewLayout| (at < layout.tiles() as usize).then(|| layout.tile_size(at == 0));
        self.size_of_all.or_else(|| self.layout.map(in_layout))
    }

    /// Returns the stream of a track, by the track's sid.
    pub(super) fn ssrc(&self, track_sid: &str) -> Option<Ssrc> {
        self.tiles
            .iter()
            .find(|tile| *tile.track_sid == *track_sid)
            .map(|tile| tile.ssrc)
    }

    /// Returns the number of tracks that have ever been shown.
    pub(super) fn shown_ever(&self) -> u32 {
        self.shown_ever.len() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{Codec, PayloadTypes};
    use crate::units::Bitrate;

    const LARGE: Option<Size> = Some((1280, 720));
    const MEDIUM: Option<Size> = Some((640, 360));
    const SMALL: Option<Size> = Some((320, 180));

    fn track(number: u32) -> RemoteTrack {
        RemoteTrack {
            mid: number.to_string().into(),
            ssrc: Ssrc(1_000 + number),
            rtx_ssrc: None,
            payloads: PayloadTypes::of(Codec::Vp8, 96),
            rtx_payload_type: None,
            stream_id: format!("PA_{number}|TR_{number}").into(),
            track_id: format!("TR_{number}").into(),
            active: true,
            extensions: Default::default(),
            feedback: Default::default(),
        }
    }

    fn viewer(layout: Option<ViewLayout>, tracks: u32) -> Viewer {
        let top = VideoSpec {
            width: 1280,
            height: 720,
            frames_per_second: 30,
            bitrate: Bitrate::from_bps(2_000_000),
        };
        let mut viewer = Viewer::new(layout, top.layers(true));
        (0..tracks).for_each(|number| viewer.add(&track(number)));
        viewer
    }

    fn speaker(number: u32, level: f32) -> proto::SpeakerInfo {
        proto::SpeakerInfo {
            sid: format!("PA_{number}"),
            level,
            active: level > 0.0,
        }
    }

    /// Returns each change's track number, size and layer.
    fn changes(viewer: &mut Viewer) -> Vec<(u32, Option<Size>, Option<u8>)> {
        let changes = viewer.poll_changes().into_iter();
        changes
            .map(|change| (change.ssrc.0 - 1_000, change.size, change.layer))
            .collect()
    }

    #[test]
    fn without_a_layout_the_server_is_told_nothing() {
        let mut viewer = viewer(None, 3);
        viewer.handle_speakers(&[speaker(1, 0.5)]);
        assert_eq!((changes(&mut viewer), viewer.shown_ever()), (vec![], 0));
        viewer.show_all(MEDIUM);
        assert_eq!(
            changes(&mut viewer),
            [
                (0, MEDIUM, Some(1)),
                (1, MEDIUM, Some(1)),
                (2, MEDIUM, Some(1))
            ]
        );
        viewer.show_all(None);
        let off = viewer.poll_changes();
        assert!(
            off.iter()
                .all(|change| change.settings().disabled && change.layer.is_none())
        );
        assert_eq!(off[2].settings().track_sids, ["TR_2"]);
    }

    #[test]
    fn a_grid_shows_those_who_came_first_and_switches_the_others_off() {
        let mut viewer = viewer(Some(ViewLayout::Grid3x3), 11);
        let all = changes(&mut viewer);
        assert!(
            all[..9]
                .iter()
                .all(|(_, size, layer)| (*size, *layer) == (MEDIUM, Some(1)))
        );
        assert_eq!(all[9..], [(9, None, None), (10, None, None)]);
        viewer.handle_speakers(&[speaker(10, 0.9)]);
        assert_eq!(changes(&mut viewer), []);
        // When a track goes, the next one moves up.
        viewer.remove(Ssrc(1_003));
        assert_eq!(changes(&mut viewer), [(9, MEDIUM, Some(1))]);
        assert_eq!(viewer.shown_ever(), 10);
        for (layout, size) in [(ViewLayout::Grid4x4, 16), (ViewLayout::Grid5x5, 25)] {
            let shown = changes(&mut self::viewer(Some(layout), 30));
            assert_eq!(
                shown
                    .iter()
                    .filter(|(_, shown, layer)| (*shown, *layer) == (SMALL, Some(0)))
                    .count(),
                size
            );
        }
    }

    #[test]
    fn the_large_picture_goes_to_the_one_who_speaks_and_stays_while_he_does() {
        let mut viewer = viewer(Some(ViewLayout::Speaker), 8);
        let all = changes(&mut viewer);
        assert_eq!(all[0], (0, LARGE, Some(2)));
        assert_eq!(all.iter().filter(|(_, size, _)| *size == SMALL).count(), 5);
        assert_eq!(all[6..], [(6, None, None), (7, None, None)]);
        viewer.handle_speakers(&[speaker(2, 0.3), speaker(3, 0.6), speaker(99, 0.9)]);
        assert_eq!(
            changes(&mut viewer),
            [(3, LARGE, Some(2)), (0, SMALL, Some(0))]
        );
        // Another participant may be louder for a moment.
        viewer.handle_speakers(&[speaker(2, 0.9)]);
        assert_eq!(changes(&mut viewer), []);
        // A participant without a tile speaks; the last of the small tiles makes room.
        viewer.handle_speakers(&[speaker(3, 0.0), speaker(7, 0.5), speaker(2, 0.1)]);
        assert_eq!(
            changes(&mut viewer),
            [(7, LARGE, Some(2)), (3, SMALL, Some(0)), (5, None, None)]
        );
        assert_eq!(viewer.shown_ever(), 7);
    }

    #[test]
    fn another_stream_of_a_track_is_told_anew() {
        let mut viewer = viewer(Some(ViewLayout::Grid3x3), 1);
        assert_eq!(changes(&mut viewer).len(), 1);
        viewer.add(&track(0));
        assert_eq!(changes(&mut viewer), []);
        viewer.add(&RemoteTrack {
            ssrc: Ssrc(1_005),
            ..track(0)
        });
        assert_eq!(changes(&mut viewer), [(5, MEDIUM, Some(1))]);
        assert_eq!(viewer.shown_ever(), 1);
    }
}
