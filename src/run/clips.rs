//! The media of a run, generated once and shared by all its publishers.

use std::sync::Arc;

use anyhow::{Context, Result};

use crate::engine::publisher::Source;
use crate::media::opus::{AudioClip, AudioContent, AudioSpec};
use crate::media::vp8::{VideoClip, VideoSpec};
use crate::plan::{self, Plan};

/// The shared media that the plan asks for.
pub struct Clips {
    pub(super) audio: Option<Source>,
    pub(super) video: Option<Source>,
}

impl Clips {
    /// Takes a second or so of every thread. Nothing is connected to, so a plan that no clip can fulfil is refused before any server hears of it.
    ///
    /// # Errors
    /// The flags that cannot be fulfilled, and what to ask instead.
    pub fn generate(plan: &Plan, threads: usize) -> Result<Clips> {
        let shape = &plan.shape;
        let audio = (shape.audio_publishers > 0)
            .then(|| AudioClip::generate(&audio_spec(plan)))
            .transpose()
            .context("--audio-bitrate, --audio-frame")?;
        let video = (shape.video_publishers > 0)
            .then(|| VideoClip::generate(&video_spec(plan), threads))
            .transpose()
            .context("--video-resolution, --video-bitrate, --video-fps")?;
        Ok(Clips {
            audio: audio.map(|clip| Source::Audio(Arc::new(clip))),
            video: video.map(|clip| Source::Video(Arc::new(clip))),
        })
    }
}

fn audio_spec(plan: &Plan) -> AudioSpec {
    AudioSpec {
        bitrate: plan.audio.bitrate,
        frame: plan.audio.frame,
        content: AudioContent::Speech,
        dtx: false,
        seed: plan.seed,
    }
}

fn video_spec(plan: &Plan) -> VideoSpec {
    let plan::VideoSpec {
        width,
        height,
        frames_per_second,
        bitrate,
    } = plan.video;
    VideoSpec {
        width: width.into(),
        height: height.into(),
        fps: frames_per_second,
        bitrate,
        seed: plan.seed,
    }
}
