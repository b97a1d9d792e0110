//! A published track as the lobby sees it: what its publisher said of it, who gets it, which layers
//! they want, and how loud it is.

// See `room`.
#![allow(deprecated)]

use std::collections::BTreeSet;
use std::time::Duration;

use livekit_protocol as proto;

use super::shared::SessionId;
use super::{Selection, TrackId};
use crate::codec::Codec;
use crate::measure::Kind;
use crate::units::Time;

/// Layers that nobody watches are announced after this (LiveKit's `dynacast_pause_delay`): people
/// switch back and forth.
const LOWER_AFTER: Duration = Duration::from_secs(5);
/// A track without any subscriber yet is given more time.
const FIRST_LOWER_AFTER: Duration = Duration::from_secs(10);
/// A layer may be this much smaller than what was asked for.
const DIMENSION_TOLERANCE: f32 = 0.9;
/// What LiveKit takes for the lower layers of a track that declares none.
const DEFAULT_HEIGHTS: [u32; 2] = [180, 360];
/// Louder than this counts as speech, in dBov below full scale.
const ACTIVE_LEVEL: u8 = 35;
/// An exponential average with the centre of mass of two intervals.
const SMOOTHING: f64 = 2.0 / 3.0;
/// Levels are told in steps, so that small changes cause no message.
const LEVEL_STEPS: f64 = 8.0;

pub(super) struct PublishedTrack {
    pub id: TrackId,
    pub publisher: SessionId,
    pub codec: Codec,
    /// What others are told of it.
    pub info: proto::TrackInfo,
    /// Encodings of different size; 1 without simulcast.
    pub layers: u8,
    pub subscribers: BTreeSet<SessionId>,
    /// Its publisher has been told that somebody gets it.
    pub was_subscribed: bool,
    pub dynacast: Dynacast,
    pub loudness: Loudness,
}

impl PublishedTrack {
    pub fn kind(&self) -> Kind {
        self.codec.kind()
    }

    /// What a subscriber with these settings gets.
    pub fn selection(&self, settings: &Settings) -> Selection {
        Selection {
            enabled: !settings.disabled && !self.info.muted,
            layer: match self.kind() {
                Kind::Audio => 0,
                Kind::Video => self.layer(self.quality(settings)),
            },
        }
    }

    /// The quality that these settings keep alive at the publisher, counted from 1; 0: none. The
    /// publisher's own muting is no reason to stop its layers.
    pub fn wish(&self, settings: &Settings) -> u8 {
        match self.kind() {
            Kind::Video if !settings.disabled && self.layers > 1 => self.quality(settings) + 1,
            Kind::Video if !settings.disabled => Dynacast::HIGHEST,
            _ => 0,
        }
    }

    /// Layer 0 to 2. Dimensions beat a named quality.
    fn quality(&self, settings: &Settings) -> u8 {
        if settings.width == 0 {
            return settings.quality;
        }
        // By height and the quality that it stands for.
        let declared = self.info.layers.iter().filter(|layer| layer.height > 0);
        let mut sizes: Vec<(u32, u8)> = declared
            .map(|layer| (layer.height, layer.quality.clamp(0, 2) as u8))
            .collect();
        let mut asked = settings.height;
        if sizes.is_empty() {
            let portrait = self.info.width < self.info.height;
            let own = if portrait {
                self.info.width
            } else {
                self.info.height
            };
            let [low, medium] = DEFAULT_HEIGHTS;
            sizes.extend([(low, 0), (medium, 1), (own, 2)]);
            asked = if portrait {
                settings.width
            } else {
                settings.height
            };
        }
        sizes.sort_unstable();
        let asked = asked as f32 * DIMENSION_TOLERANCE;
        let Some((sufficient, _)) = sizes
            .iter()
            .find(|(height, _)| *height as f32 >= asked)
            .or(sizes.last())
        else {
            return settings.quality;
        };
        // The highest of several layers of one size: it is as good, and is what others watch.
        let same_size = sizes.iter().filter(|(height, _)| height == sufficient);
        same_size
            .map(|(_, quality)| *quality)
            .max()
            .unwrap_or(settings.quality)
    }

    /// The layer that carries a quality: a publisher may declare which qualities its layers have.
    fn layer(&self, quality: u8) -> u8 {
        let highest = self.layers.saturating_sub(1);
        if usize::from(self.layers) != self.info.layers.len() {
            return quality.min(highest);
        }
        let mut declared: Vec<i32> = self.info.layers.iter().map(|layer| layer.quality).collect();
        declared.sort_unstable();
        let index = declared
            .iter()
            .rposition(|of_layer| *of_layer <= i32::from(quality));
        index.unwrap_or(0).min(usize::from(highest)) as u8
    }
}

/// What a subscriber asked of one track (`UpdateTrackSettings`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Settings {
    disabled: bool,
    /// 0 low, 1 medium, 2 high.
    quality: u8,
    width: u32,
    height: u32,
}

impl Settings {
    /// Before the subscriber has said anything. One with adaptive streams will, and starts low.
    pub fn initial(adaptive_stream: bool) -> Settings {
        Settings {
            disabled: false,
            quality: if adaptive_stream { 0 } else { 2 },
            width: 0,
            height: 0,
        }
    }

    pub fn disabled(self) -> Settings {
        Settings {
            disabled: true,
            ..self
        }
    }
}

impl From<&proto::UpdateTrackSettings> for Settings {
    fn from(settings: &proto::UpdateTrackSettings) -> Settings {
        Settings {
            disabled: settings.disabled || settings.quality == i32::from(proto::VideoQuality::Off),
            quality: settings.quality.clamp(0, 2) as u8,
            width: settings.width,
            height: settings.height,
        }
    }
}

/// Which qualities of a video track anybody watches: up at once, down with a delay.
pub(super) struct Dynacast {
    /// Subscribers by what they wish.
    wishes: [u32; Dynacast::HIGHEST as usize + 1],
    /// What the publisher was told.
    committed: Option<u8>,
    lower_at: Option<Time>,
}

impl Dynacast {
    pub const HIGHEST: u8 = 3;

    pub fn new(now: Time) -> Dynacast {
        Dynacast {
            wishes: [0; Dynacast::HIGHEST as usize + 1],
            committed: None,
            lower_at: Some(now + FIRST_LOWER_AFTER),
        }
    }

    /// A subscriber's wish changes; 0 stands for no subscriber as well.
    pub fn handle_wish(&mut self, before: u8, after: u8) {
        if let Some(count) = self
            .wishes
            .get_mut(usize::from(before))
            .filter(|_| before > 0)
        {
            *count -= 1;
        }
        if let Some(count) = self
            .wishes
            .get_mut(usize::from(after))
            .filter(|_| after > 0)
        {
            *count += 1;
        }
    }

    /// The highest quality that the publisher is to be told now, if that is news.
    pub fn poll(&mut self, now: Time) -> Option<u8> {
        let wanted = self
            .wishes
            .iter()
            .rposition(|count| *count > 0)
            .unwrap_or(0) as u8;
        match self.committed {
            Some(committed) if wanted == committed => self.lower_at = None,
            Some(committed) if wanted < committed => {
                let at = *self.lower_at.get_or_insert(now + LOWER_AFTER);
                return (now >= at).then(|| self.commit(wanted));
            }
            None if wanted == 0 && self.lower_at.is_some_and(|at| now < at) => {}
            _ => return Some(self.commit(wanted)),
        }
        None
    }

    pub fn next_timeout(&self) -> Option<Time> {
        self.lower_at
    }

    fn commit(&mut self, wanted: u8) -> u8 {
        self.committed = Some(wanted);
        self.lower_at = None;
        wanted
    }
}

/// For the publisher: qualities up to `highest` (counted from 1) are watched.
pub(super) fn quality_update(
    track: &PublishedTrack,
    highest: u8,
) -> proto::SubscribedQualityUpdate {
    let qualities = [
        proto::VideoQuality::Low,
        proto::VideoQuality::Medium,
        proto::VideoQuality::High,
    ];
    let qualities: Vec<proto::SubscribedQuality> = qualities
        .into_iter()
        .map(|quality| proto::SubscribedQuality {
            quality: quality.into(),
            enabled: i32::from(quality) < i32::from(highest),
        })
        .collect();
    proto::SubscribedQualityUpdate {
        track_sid: track.info.sid.clone(),
        // For clients from before codecs were told apart.
        subscribed_qualities: qualities.clone(),
        subscribed_codecs: vec![proto::SubscribedCodec {
            codec: track.codec.name().into(),
            qualities,
        }],
    }
}

/// A track's loudness as its room is told.
#[derive(Default)]
pub(super) struct Loudness {
    smoothed: f64,
}

impl Loudness {
    /// The average of the last interval, in dBov below full scale; `None`: silence. Returns the
    /// level of an active speaker, in (0, 1].
    pub fn handle_level(&mut self, level: Option<u8>) -> Option<f32> {
        let level = level.filter(|level| *level <= ACTIVE_LEVEL);
        self.smoothed = level.map_or(0.0, |level| {
            self.smoothed + (linear(level) - self.smoothed) * SMOOTHING
        });
        let active = self.smoothed >= linear(ACTIVE_LEVEL);
        active.then(|| ((self.smoothed * LEVEL_STEPS).ceil() / LEVEL_STEPS) as f32)
    }
}

fn linear(level: u8) -> f64 {
    10f64.powf(-f64::from(level) / 20.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn track(layers: u8, declared: &[(proto::VideoQuality, u32)]) -> PublishedTrack {
        PublishedTrack {
            id: TrackId(1),
            publisher: SessionId(1),
            codec: Codec::Vp8,
            info: proto::TrackInfo {
                width: 1280,
                height: 720,
                layers: declared
                    .iter()
                    .map(|(quality, height)| proto::VideoLayer {
                        quality: (*quality).into(),
                        height: *height,
                        ..Default::default()
                    })
                    .collect(),
                ..Default::default()
            },
            layers,
            subscribers: BTreeSet::new(),
            was_subscribed: false,
            dynacast: Dynacast::new(Time::ZERO),
            loudness: Loudness::default(),
        }
    }

    fn settings(quality: proto::VideoQuality, width: u32, height: u32) -> Settings {
        Settings::from(&proto::UpdateTrackSettings {
            quality: quality.into(),
            width,
            height,
            ..Default::default()
        })
    }

    #[test]
    fn dimensions_and_qualities_choose_the_smallest_layer_that_suffices() {
        use proto::VideoQuality::{High, Low, Medium, Off};
        let three = [(Low, 180), (Medium, 360), (High, 720)];
        for (layers, declared, settings, expected) in [
            (3, &three[..], settings(High, 0, 0), (true, 2)),
            (3, &three, settings(Low, 0, 0), (true, 0)),
            (3, &three, settings(Off, 0, 0), (false, 2)),
            (3, &three, settings(Low, 640, 360), (true, 1)),
            (3, &three, settings(High, 320, 198), (true, 0)),
            (3, &three, settings(Low, 1920, 1080), (true, 2)),
            // Layers that nobody described are taken for 180, 360 and the track's own height.
            (3, &[], settings(Low, 500, 300), (true, 1)),
            (1, &three[2..], settings(Low, 0, 0), (true, 0)),
            (2, &three[1..], settings(Low, 0, 0), (true, 0)),
            (2, &three[1..], settings(Medium, 0, 0), (true, 0)),
            (2, &three[1..], settings(High, 0, 0), (true, 1)),
            (2, &three[1..], settings(Low, 1280, 720), (true, 1)),
        ] {
            let Selection { enabled, layer } = track(layers, declared).selection(&settings);
            assert_eq!(
                (enabled, layer),
                expected,
                "{layers} layers, {declared:?}, {settings:?}"
            );
        }
    }

    #[test]
    fn a_muted_track_is_selected_by_nobody_and_keeps_its_layers() {
        let mut track = track(3, &[]);
        track.info.muted = true;
        let settings = Settings::initial(false);
        assert!(!track.selection(&settings).enabled);
        assert_eq!(
            (track.wish(&settings), track.wish(&settings.disabled())),
            (3, 0)
        );
    }

    #[test]
    fn layers_start_at_once_and_stop_after_five_seconds() {
        let second = Duration::from_secs(1);
        let mut dynacast = Dynacast::new(Time::ZERO);
        assert_eq!(dynacast.poll(Time::ZERO), None);
        dynacast.handle_wish(0, 1);
        assert_eq!(dynacast.poll(Time::ZERO + second), Some(1));
        dynacast.handle_wish(0, 3);
        assert_eq!(dynacast.poll(Time::ZERO + second), Some(3));
        dynacast.handle_wish(3, 2);
        assert_eq!(
            (
                dynacast.poll(Time::ZERO + 2 * second),
                dynacast.poll(Time::ZERO + 6 * second)
            ),
            (None, None)
        );
        assert_eq!(dynacast.next_timeout(), Some(Time::ZERO + 7 * second));
        assert_eq!(dynacast.poll(Time::ZERO + 7 * second), Some(2));
        // Back within the delay: nothing is said.
        dynacast.handle_wish(2, 0);
        assert_eq!(dynacast.poll(Time::ZERO + 8 * second), None);
        dynacast.handle_wish(0, 2);
        assert_eq!(
            (
                dynacast.poll(Time::ZERO + 9 * second),
                dynacast.poll(Time::ZERO + 20 * second)
            ),
            (None, None)
        );
    }

    #[test]
    fn a_track_that_nobody_ever_watched_is_told_so_after_ten_seconds() {
        let mut dynacast = Dynacast::new(Time::ZERO);
        assert_eq!(dynacast.poll(Time::from_millis(9_999)), None);
        assert_eq!(dynacast.poll(Time::from_millis(10_000)), Some(0));
        assert_eq!(
            (
                dynacast.poll(Time::from_millis(30_000)),
                dynacast.next_timeout()
            ),
            (None, None)
        );
    }

    #[test]
    fn speech_is_smoothed_told_in_steps_and_ends_in_silence() {
        let mut loudness = Loudness::default();
        assert_eq!(loudness.handle_level(Some(36)), None);
        assert_eq!(loudness.handle_level(Some(0)), Some(0.75));
        assert_eq!(loudness.handle_level(Some(0)), Some(1.0));
        assert_eq!(loudness.handle_level(Some(30)), Some(0.375));
        assert_eq!(loudness.handle_level(None), None);
        assert_eq!(loudness.handle_level(Some(30)), Some(0.125));
    }
}
