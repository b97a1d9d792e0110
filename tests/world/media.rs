//! The clips that the publishers of every world play, and the lookup of a frame's place in them by
//! its bytes.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use throng::engine::publisher::MediaSource;
use throng::measure::Kind;
use throng::media::identity::AUDIO_IDENTITY_LEN;
use throng::media::opus::{AudioClip, AudioContent, OpusSpec};
use throng::media::vp8::{VideoClip, Vp8Spec};
use throng::units::Bitrate;

/// Width, height and bitrate of the simulcast layers, from low to high. A video without simulcast
/// is like the highest.
const LAYERS: [(u32, u32, u64); 3] = [(96, 54, 40_000), (160, 90, 80_000), (320, 180, 150_000)];
const FPS: u32 = 15;

/// Place of a frame in the clips.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub layer: u8,
    pub position: usize,
    pub key: bool,
}

pub struct Clips {
    audio: Arc<AudioClip>,
    videos: Vec<Arc<VideoClip>>,
    frames: HashMap<Vec<u8>, Place>,
    /// Audio packets without the bytes that hold an identity.
    audio_bodies: HashSet<Vec<u8>>,
}

/// Returns the clips. They are made once a process, because that takes longer than a world.
pub fn clips() -> &'static Clips {
    static CLIPS: OnceLock<Clips> = OnceLock::new();
    CLIPS.get_or_init(Clips::generate)
}

/// Returns the sizes of a track's layers, from low to high.
pub fn sizes(simulcast: bool) -> Vec<(u32, u32)> {
    let layers = if simulcast { &LAYERS[..] } else { &LAYERS[2..] };
    layers
        .iter()
        .map(|(width, height, _)| (*width, *height))
        .collect()
}

impl Clips {
    fn generate() -> Clips {
        let audio = OpusSpec {
            bitrate: Bitrate::from_bps(24_000),
            frame: Duration::from_millis(20),
            content: AudioContent::Speech,
            dtx: false,
            seed: 1,
        };
        let video = |(width, height, bps)| Vp8Spec {
            width,
            height,
            fps: FPS,
            bitrate: Bitrate::from_bps(bps),
            seed: 1,
        };
        let videos: Vec<_> = LAYERS
            .into_iter()
            .map(|layer| Arc::new(VideoClip::generate(&video(layer), 2).unwrap()))
            .collect();
        let mut frames = HashMap::new();
        for (layer, clip) in videos.iter().enumerate() {
            for position in 0..clip.len() {
                for (bytes, key) in [
                    (clip.inter_frame(position), false),
                    (clip.key_frame(position), true),
                ] {
                    let place = Place {
                        layer: layer as u8,
                        position,
                        key,
                    };
                    let twin = frames.insert(bytes.to_vec(), place);
                    assert!(
                        twin.is_none(),
                        "two frames with the same bytes: {twin:?} {place:?}"
                    );
                }
            }
        }
        let audio = Arc::new(AudioClip::generate(&audio).unwrap());
        let packets = (0..audio.len()).filter_map(|index| audio.packet(index));
        Clips {
            audio_bodies: packets.map(|packet| body(packet).to_vec()).collect(),
            audio,
            videos,
            frames,
        }
    }

    /// Returns what a track's layer plays.
    pub fn source(&self, kind: Kind, simulcast: bool, layer: usize) -> MediaSource {
        match kind {
            Kind::Audio => MediaSource::Audio(self.audio.clone()),
            Kind::Video if simulcast => MediaSource::Video(self.videos[layer].clone()),
            Kind::Video => MediaSource::Video(self.videos[LAYERS.len() - 1].clone()),
        }
    }

    /// Returns the place of the frame with exactly these bytes.
    pub fn find_video(&self, bytes: &[u8]) -> Option<Place> {
        self.frames.get(bytes).copied()
    }

    /// Returns the number of frames after which a loop of video begins again.
    pub fn video_len(&self, layer: u8) -> usize {
        self.videos[usize::from(layer)].len()
    }

    /// Returns whether the audio clip holds this packet, whatever identity it carries.
    pub fn has_audio(&self, packet: &[u8]) -> bool {
        self.audio_bodies.contains(body(packet))
    }
}

fn body(packet: &[u8]) -> &[u8] {
    &packet[..packet.len().saturating_sub(AUDIO_IDENTITY_LEN)]
}
