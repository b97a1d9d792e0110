//! The media of a run, generated once and shared by all its publishers.

use std::sync::Arc;

use anyhow::{Context, Result};

use crate::engine::publisher::MediaSource;
use crate::measure::Kind;
use crate::media::opus::{AudioClip, AudioContent, OpusSpec};
use crate::media::vp8::{VideoClip, Vp8Spec};
use crate::plan::scenario::MediaSpec;
use crate::plan::{AudioSpec, Plan, VideoSpec};

/// Media that the plan asks for. A clone shares it.
#[derive(Clone, Default)]
pub struct Clips {
    audio: Vec<AudioClips>,
    video: Vec<(VideoSpec, MediaSource)>,
}

/// Clips of one kind of audio.
#[derive(Clone)]
struct AudioClips {
    spec: AudioSpec,
    speech: MediaSource,
    /// Audio of publishers whose turn to speak it is not, where they take turns.
    silence: Option<Arc<AudioClip>>,
}

impl Clips {
    /// Generates the media. This takes about a second of every thread for each layer that differs
    /// from the others. `progress` is called with what is being made. No connection is opened yet,
    /// so a plan that no clip can fulfil is refused before any server hears of it.
    ///
    /// # Errors
    /// Names the flags that cannot be fulfilled, and says what to ask instead.
    pub fn generate(plan: &Plan, threads: usize, mut progress: impl FnMut(&str)) -> Result<Clips> {
        let mut clips = Clips::default();
        let groups = &plan.scenario.groups;
        if plan.total_published_tracks(Kind::Audio) > 0 {
            for group in groups.iter().filter(|group| group.publishes_audio) {
                clips.add_audio(plan, &plan.scenario.media_of(group).audio, &mut progress)?;
            }
        }
        if plan.total_published_tracks(Kind::Video) > 0 {
            for group in groups.iter().filter(|group| group.publishes_video) {
                let layers = plan.scenario.media_of(group).video_layers();
                for layer in &layers {
                    clips
                        .add_video(plan, layer, threads, &mut progress)
                        .context(video_flags(layers.len()))?;
                }
            }
        }
        Ok(clips)
    }

    fn add_audio(
        &mut self,
        plan: &Plan,
        spec: &AudioSpec,
        progress: &mut impl FnMut(&str),
    ) -> Result<()> {
        if self.find_audio(spec).is_some() {
            return Ok(());
        }
        progress("speech");
        let speech = audio_clip(plan, spec, AudioContent::Speech)?;
        let turns = plan.scenario.rooms.simulate_speakers;
        let silence = turns
            .then(|| audio_clip(plan, spec, AudioContent::Silence))
            .transpose()?;
        self.audio.push(AudioClips {
            spec: without_redundancy(spec),
            speech: MediaSource::Audio(Arc::new(speech)),
            silence: silence.map(Arc::new),
        });
        Ok(())
    }

    fn add_video(
        &mut self,
        plan: &Plan,
        layer: &VideoSpec,
        threads: usize,
        progress: &mut impl FnMut(&str),
    ) -> Result<()> {
        if self.find_video(layer).is_some() {
            return Ok(());
        }
        progress(&format!(
            "video of {}x{} at {} fps",
            layer.width, layer.height, layer.frames_per_second
        ));
        let clip = VideoClip::generate(&video_spec(plan, layer), threads)?;
        self.video
            .push((*layer, MediaSource::Video(Arc::new(clip))));
        Ok(())
    }

    fn find_audio(&self, spec: &AudioSpec) -> Option<&AudioClips> {
        let spec = without_redundancy(spec);
        self.audio.iter().find(|clips| clips.spec == spec)
    }

    fn find_video(&self, layer: &VideoSpec) -> Option<&MediaSource> {
        let mut all = self.video.iter();
        all.find(|(spec, _)| spec == layer).map(|(_, clip)| clip)
    }

    /// Returns the speech of this kind. `None` if nobody on this host sends it.
    pub(super) fn speech(&self, spec: &AudioSpec) -> Option<MediaSource> {
        self.find_audio(spec).map(|clips| clips.speech.clone())
    }

    /// Returns what is sent between the turns to speak.
    pub(super) fn silence(&self, spec: &AudioSpec) -> Option<Arc<AudioClip>> {
        self.find_audio(spec)?.silence.clone()
    }

    /// Returns the layers of a video track, the lowest first. Empty if nobody on this host sends
    /// it.
    pub(super) fn video(&self, media: &MediaSpec) -> Vec<MediaSource> {
        let layers = media.video_layers();
        let clips = layers.iter().map(|layer| self.find_video(layer).cloned());
        clips.collect::<Option<_>>().unwrap_or_default()
    }
}

/// Redundancy is added to the packets of a clip, and is not in it.
fn without_redundancy(spec: &AudioSpec) -> AudioSpec {
    AudioSpec {
        redundancy: 0,
        ..*spec
    }
}

fn audio_clip(plan: &Plan, audio: &AudioSpec, content: AudioContent) -> Result<AudioClip> {
    let spec = OpusSpec {
        bitrate: audio.bitrate,
        frame: audio.frame,
        content,
        dtx: audio.dtx,
        seed: plan.scenario.seed,
    };
    AudioClip::generate(&spec).context("--audio-bitrate, --audio-frame")
}

fn video_spec(plan: &Plan, layer: &VideoSpec) -> Vp8Spec {
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
