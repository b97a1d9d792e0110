//! The media of a run, generated once and shared by all its publishers.

use std::sync::Arc;

use anyhow::{Context, Result};

use crate::engine::publisher::MediaSource;
use crate::measure::Kind;
use crate::media::opus::{AudioClip, AudioContent, OpusSpec};
use crate::media::vp8::{VideoClip, Vp8Spec};
use crate::plan::{self, Plan};

/// Media that the plan asks for. A clone shares it.
#[derive(Clone)]
pub struct Clips {
    pub(super) audio: Option<MediaSource>,
    /// Audio of publishers whose turn to speak it is not.
    pub(super) silence: Option<Arc<AudioClip>>,
    /// Layers of a video track, the lowest first.
    pub(super) video: Vec<MediaSource>,
}

impl Clips {
    /// Generates the media. This takes about a second of every thread for each layer. `progress` is
    /// called with what is being made. No connection is opened yet, so a plan that no clip can
    /// fulfil is refused before any server hears of it.
    ///
    /// # Errors
    /// Names the flags that cannot be fulfilled, and says what to ask instead.
    pub fn generate(plan: &Plan, threads: usize, mut progress: impl FnMut(&str)) -> Result<Clips> {
        let mut clips = Clips {
            audio: None,
            silence: None,
            video: Vec::new(),
        };
        if plan.total_published_tracks(Kind::Audio) > 0 {
            progress("speech");
            let speech = audio_clip(plan, AudioContent::Speech)?;
            clips.audio = Some(MediaSource::Audio(Arc::new(speech)));
            clips.silence = plan
                .scenario
                .media
                .simulate_speakers
                .then(|| audio_clip(plan, AudioContent::Silence))
                .transpose()?
                .map(Arc::new);
        }
        if plan.total_published_tracks(Kind::Video) > 0 {
            let layers = plan.video_layers();
            for layer in &layers {
                progress(&format!(
                    "video of {}x{} at {} fps",
                    layer.width, layer.height, layer.frames_per_second
                ));
                let clip = VideoClip::generate(&video_spec(plan, layer), threads)
                    .context(video_flags(layers.len()))?;
                clips.video.push(MediaSource::Video(Arc::new(clip)));
            }
        }
        Ok(clips)
    }
}

fn audio_clip(plan: &Plan, content: AudioContent) -> Result<AudioClip> {
    let spec = OpusSpec {
        bitrate: plan.scenario.media.audio.bitrate,
        frame: plan.scenario.media.audio.frame,
        content,
        dtx: plan.scenario.media.audio.dtx,
        seed: plan.scenario.seed,
    };
    AudioClip::generate(&spec).context("--audio-bitrate, --audio-frame")
}

fn video_spec(plan: &Plan, layer: &plan::VideoSpec) -> Vp8Spec {
    Vp8Spec {
        width: layer.width.into(),
        height: layer.height.into(),
        fps: layer.frames_per_second,
        bitrate: layer.bitrate,
        seed: plan.scenario.seed,
    }
}

/// Flags to change if a layer cannot be made.
fn video_flags(layers: usize) -> &'static str {
    match layers {
        1 => "--video-resolution, --video-bitrate, --video-fps",
        _ => "--video-resolution, --video-bitrate, --video-fps, or --no-simulcast",
    }
}
