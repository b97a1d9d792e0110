//! A published track in the lobby: what its publisher declared, its subscribers, the layers that
//! they want, and its loudness.

// See `room` for the reason.
#![allow(deprecated)]

use std::collections::BTreeSet;
use std::time::Duration;

use livekit_protocol as proto;

use super::shared::SessionId;
use super::{Selection, TrackId};
use crate::codec::Codec;
use crate::measure::Kind;
use crate::units::Time;

/// Delay before a layer without viewers is reported as unused (LiveKit's `dynacast_pause_delay`),
/// because users switch back and forth.
const LOWER_AFTER: Duration = Duration::from_secs(5);
/// Longer delay for a track that has had no subscriber yet.
const FIRST_LOWER_AFTER: Duration = Duration::from_secs(10);
/// Smallest size of a sufficient layer, relative to the size asked for.
const DIMENSION_TOLERANCE: f32 = 0.9;
/// Heights that LiveKit assumes for the lower layers of a track that declares none.
const DEFAULT_HEIGHTS: [u32; 2] = [180, 360];
/// Least loudness of speech, in dBov below full scale.
const ACTIVE_LEVEL: u8 = 35;
/// Factor of an exponential average with a centre of mass of two intervals.
const SMOOTHING: f64 = 2.0 / 3.0;
/// Number of steps in which levels are reported, so that small changes cause no message.
const LEVEL_STEPS: f64 = 8.0;

pub(super) struct PublishedTrack {
    pub id: TrackId,
    pub publisher: SessionId,
    pub codec: Codec,
    /// Information about it that other participants get.
    pub info: proto::TrackInfo,
    /// Number of encodings of different size; 1 without simulcast.
    pub layers: u8,
    pub subscribers: BTreeSet<SessionId>,
    /// Its publisher has been told that somebody subscribes to it.
    pub was_subscribed: bool,
    pub dynacast: Dynacast,
    pub loudness: Loudness,
}

impl PublishedTrack {
    pub fn kind(&self) -> Kind {
        self.codec.kind()
    }

    /// The selection for a subscriber with these settings.
    pub fn selection(&self, settings: &Settings) -> Selection {
        Selection {
            enabled: !settings.disabled && !self.info.muted,
            layer: match self.kind() {
                Kind::Audio => 0,
                Kind::Video => self.layer(self.quality(settings)),
            },
        }
    }

    /// The highest quality that the publisher must keep sending for these settings, counted from 1;
    /// 0 means none. The publisher's own muting does not stop its layers.
    pub fn wish(&self, settings: &Settings) -> u8 {
        match self.kind() {
            Kind::Video if !settings.disabled && self.layers > 1 => self.quality(settings) + 1,
            Kind::Video if !settings.disabled => Dynacast::HIGHEST,
            _ => 0,
        }
    }

    /// The quality wanted, 0 to 2. Dimensions take precedence over a named quality.
    fn quality(&self, settings: &Settings) -> u8 {
        if settings.width == 0 {
            return settings.quality;
        }
        // Pairs of a height and its quality.
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
        // If several layers have the same size, the highest is taken: it is as good, and is what
        // others watch.
        let same_size = sizes.iter().filter(|(height, _)| height == sufficient);
        same_size
            .map(|(_, quality)| *quality)
            .max()
            .unwrap_or(settings.quality)
    }

    /// The layer that carries a quality. A publisher may declare the qualities of its layers.
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

/// A subscriber's settings for one track (`UpdateTrackSettings`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Settings {
    disabled: bool,
    /// 0 low, 1 medium, 2 high.
    quality: u8,
    width: u32,
    height: u32,
}

impl Settings {
    /// Settings before the subscriber's first request. A subscriber with adaptive streams will send
    /// one, and starts with the low quality.
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

/// The qualities of a video track that have viewers. An increase is reported at once, a decrease
/// after a delay.
pub(super) struct Dynacast {
    /// Number of subscribers for each wish.
    wishes: [u32; Dynacast::HIGHEST as usize + 1],
    /// The quality last reported to the publisher.
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

    /// Changes a subscriber's wish; 0 also stands for no subscriber.
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

    /// Returns the highest quality to report to the publisher now, if it has changed.
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

/// The message to a publisher that qualities up to `highest` (counted from 1) are watched.
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
        // For old clients that do not distinguish codecs.
        subscribed_qualities: qualities.clone(),
        subscribed_codecs: vec![proto::SubscribedCodec {
            codec: track.codec.name().into(),
            qualities,
        }],
    }
}

/// A track's loudness as reported to its room.
#[derive(Default)]
pub(super) struct Loudness {
    smoothed: f64,
}

impl Loudness {
    /// Takes the average level of the last interval, in dBov below full scale; `None` means
    /// silence. Returns the level of an active speaker, in (0, 1].
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
            // Layers without a description are assumed to be 180, 360 and the track's own height.
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
        // The wish returns within the delay: nothing is reported.
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
