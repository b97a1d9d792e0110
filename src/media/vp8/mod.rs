//! Video for publishers: a loop of coded VP8 frames, made once and shared by all.
//!
//! A publisher that plays the loop sends P_0, P_1, ... P_{N-1}, P_0 and so on
//! ([`VideoClip::inter_frame`]). At any index, K_i ([`VideoClip::key_frame`]) may be sent instead
//! of P_i. Both leave the same pixels and the same probabilities, so P_{i+1} fits either. A
//! publisher therefore needs only one number, and can start anywhere with a key frame.
//!
//! All frames are coded in advance, because coding one takes milliseconds and the sending path has
//! microseconds. Bytes may be appended to a frame, because decoders do not read them.

mod bool_coder;
mod frame;
mod glyphs;
mod layout;
mod rate;
mod scene;
pub mod tables;
mod texture;
mod tokens;

use std::fmt;
use std::ops::Range;

use crate::seeded::Seeded;
use crate::units::Bitrate;

use frame::{FrameCoder, FrameReference};
use layout::PictureLayout;
use rate::{Design, EncoderRateControl, mean};
use scene::Scene;
use texture::Quantizers;

/// Length of the loop.
pub const LOOP_SECONDS: u32 = 10;
/// Maximum number of pixels per side.
pub const MAX_SIDE: u32 = 4096;
/// Size of the smallest picture that holds the frame counter and some landscape.
pub const MIN_SIZE: (u32, u32) = (96, 48);
/// Frames a second. The limit is also set by the three digits of the counter.
pub const FPS_RANGE: std::ops::RangeInclusive<u32> = 1..=60;

/// Specification of a clip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vp8Spec {
    /// Width in pixels; odd sizes are allowed.
    pub width: u32,
    pub height: u32,
    pub fps: u32,
    /// Bitrate of the inter frames: VP8 bytes only, without packet headers or trailers.
    pub bitrate: Bitrate,
    /// Seed of the pictures. Different seeds give different pictures.
    pub seed: u64,
}

/// Error returned when a clip cannot be made, with values that can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vp8SpecError {
    TooSmall { width: u32, height: u32 },
    TooLarge { width: u32, height: u32 },
    Fps(u32),
    BitrateTooLow { spec: Vp8Spec, least: Bitrate },
    BitrateTooHigh { spec: Vp8Spec, most: Bitrate },
}

impl fmt::Display for Vp8SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let video = |spec: &Vp8Spec| {
            format!(
                "video of {}x{} at {} fps",
                spec.width, spec.height, spec.fps
            )
        };
        match self {
            Vp8SpecError::TooSmall { width, height } => {
                write!(
                    f,
                    "a picture of {width}x{height} has no room for the frame counter: ask for {}x{} or more",
                    MIN_SIZE.0, MIN_SIZE.1
                )
            }
            Vp8SpecError::TooLarge { width, height } => {
                write!(
                    f,
                    "a picture of {width}x{height} is too large: ask for at most {MAX_SIDE} pixels a side"
                )
            }
            Vp8SpecError::Fps(fps) => write!(
                f,
                "{fps} frames per second are not possible: ask for {} to {}",
                FPS_RANGE.start(),
                FPS_RANGE.end()
            ),
            Vp8SpecError::BitrateTooLow { spec, least } => {
                write!(
                    f,
                    "{} does not fit {}: ask for {least} or more, or for a smaller picture or fewer frames",
                    video(spec),
                    spec.bitrate
                )
            }
            Vp8SpecError::BitrateTooHigh { spec, most } => {
                write!(
                    f,
                    "{} cannot fill {}: ask for {most} or less, or for a larger picture or more frames",
                    video(spec),
                    spec.bitrate
                )
            }
        }
    }
}

impl std::error::Error for Vp8SpecError {}

/// Decoded picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct I420 {
    pub width: usize,
    pub height: usize,
    /// Luma, then u, then v, each without padding. Chroma planes are half as wide and high, rounded
    /// up.
    pub data: Vec<u8>,
}

/// Loop of `10 * fps` frames. It is immutable and shared by all publishers.
pub struct VideoClip {
    spec: Vp8Spec,
    scene: Scene,
    inter: Frames,
    key: Frames,
}

impl VideoClip {
    /// Makes the clip on `threads` threads (at least one). The result does not depend on their
    /// number.
    ///
    /// # Errors
    /// Fails if the specification cannot be met. The error says which values can.
    pub fn generate(spec: &Vp8Spec, threads: usize) -> Result<VideoClip, Vp8SpecError> {
        check(spec)?;
        let draft = ClipDraft::new(spec, threads)?;
        let (scene, inter) = draft.animate(threads)?;
        let key = code_loop(&scene, spec, FrameKind::Key, threads);
        Ok(VideoClip {
            spec: *spec,
            scene,
            inter,
            key,
        })
    }

    pub fn spec(&self) -> &Vp8Spec {
        &self.spec
    }

    /// Returns the number of frames in the loop.
    #[allow(clippy::len_without_is_empty, reason = "a clip is never empty")]
    pub fn len(&self) -> usize {
        self.scene.frames
    }

    /// Returns P_i, for a decoder that shows picture `i - 1` (the last picture if `i` is 0). Panics
    /// unless `i` is below [`VideoClip::len`].
    pub fn inter_frame(&self, i: usize) -> &[u8] {
        self.inter.frame(i)
    }

    /// Returns K_i, for any decoder. Panics unless `i` is below [`VideoClip::len`].
    pub fn key_frame(&self, i: usize) -> &[u8] {
        self.key.frame(i)
    }

    /// Returns the pixels that a decoder shows after P_i or K_i, by our own model. They are
    /// computed on demand.
    pub fn reconstruction(&self, i: usize) -> I420 {
        self.scene.pixels(i)
    }

    /// Reads `i` from a decoded picture's index row (ten squares, dark or light). Returns `None` if
    /// the picture has no such row (it is narrower than 160 pixels or lower than 80) or is damaged
    /// there.
    pub fn read_index(&self, frame: &I420) -> Option<usize> {
        self.scene.read_index(frame)
    }
}

fn check(spec: &Vp8Spec) -> Result<(), Vp8SpecError> {
    let Vp8Spec {
        width, height, fps, ..
    } = *spec;
    if width > MAX_SIDE || height > MAX_SIDE {
        return Err(Vp8SpecError::TooLarge { width, height });
    }
    if width < MIN_SIZE.0 || height < MIN_SIZE.1 {
        return Err(Vp8SpecError::TooSmall { width, height });
    }
    if !FPS_RANGE.contains(&fps) {
        return Err(Vp8SpecError::Fps(fps));
    }
    Ok(())
}

/// Clip with a chosen layout. The cost of its counter and bar alone is known.
struct ClipDraft<'a> {
    spec: &'a Vp8Spec,
    layout: PictureLayout,
    /// Bits of each frame without any texture.
    fixed_bits: Vec<f64>,
    /// Number of macroblocks that can be textured.
    landscape: usize,
}

impl<'a> ClipDraft<'a> {
    /// Share of the bitrate that a large counter may take. If it would take more, a smaller one is
    /// drawn.
    const COUNTER_SHARE: f64 = 0.35;
    /// Minimum bits per frame for textures, also as a share of the fixed bits. With less, the
    /// bitrate could not be controlled.
    const LEAST_SPARE: (f64, f64) = (300.0, 0.11);

    /// Chooses the largest counter that the bitrate allows.
    fn new(spec: &'a Vp8Spec, threads: usize) -> Result<ClipDraft<'a>, Vp8SpecError> {
        let mut smallest = None;
        for layout in PictureLayout::all(spec.width as usize, spec.height as usize) {
            let scene = still_scene(spec, &layout, Quantizers::COARSE);
            let fixed_bits = code_loop(&scene, spec, FrameKind::Inter, threads).bits();
            let share = mean(&fixed_bits) / mean_bits(spec);
            let draft = ClipDraft {
                spec,
                landscape: scene.landscape_size(),
                layout,
                fixed_bits,
            };
            if share <= Self::COUNTER_SHARE {
                return Ok(draft);
            }
            smallest = Some(draft);
        }
        let draft = smallest.ok_or(Vp8SpecError::TooSmall {
            width: spec.width,
            height: spec.height,
        })?;
        if draft.least_bits() > mean_bits(spec) {
            Err(draft.out_of_reach(1.0))
        } else {
            Ok(draft)
        }
    }

    /// Spends the rest of the bitrate on textures.
    fn animate(self, threads: usize) -> Result<(Scene, Frames), Vp8SpecError> {
        let mut best = self.attempt(rate::USUAL_OVERHEAD_BITS, threads)?;
        let mut overhead_bits = best.overhead_bits;
        for _ in 0..MAX_REDESIGNS {
            if best.error.abs() < CLOSE_ENOUGH {
                break;
            }
            let attempt = self.attempt(overhead_bits, threads)?;
            overhead_bits = attempt.overhead_bits;
            if attempt.error.abs() < best.error.abs() {
                best = attempt;
            }
        }
        if best.error.abs() < TOLERATED {
            Ok((best.scene, best.inter))
        } else {
            Err(self.out_of_reach(best.error))
        }
    }

    /// Textures the landscape for an assumed cost of `overhead_bits` per new texture besides its
    /// luma, and brings the loop as close to the bitrate as possible.
    fn attempt(&self, overhead_bits: f64, threads: usize) -> Result<Attempt, Vp8SpecError> {
        let spec = self.spec;
        let design = Design::new(
            mean_bits(spec) - mean(&self.fixed_bits),
            overhead_bits,
            self.landscape,
            self.fixed_bits.len(),
        )
        .ok_or_else(|| self.out_of_reach(-1.0))?;
        let mut scene = still_scene(spec, &self.layout, design.quantizers);
        let mut random = Seeded::new(spec.seed ^ 0x7465_7874_7572_6573);
        let classes = design.classes(&mut scene.palette, &mut random);
        scene.animate(design.count, design.period, classes.clone());
        let mut control = EncoderRateControl::new(
            mean_bits(spec),
            &self.fixed_bits,
            &classes,
            overhead_bits,
            &mut scene,
            &mut random,
        );
        let mut inter = code_loop(&scene, spec, FrameKind::Inter, threads);
        for _ in 0..MAX_CORRECTIONS {
            if control.error(&inter.bits()).abs() < CLOSE_ENOUGH {
                break;
            }
            control.correct(&inter.bits(), &mut scene);
            inter = code_loop(&scene, spec, FrameKind::Inter, threads);
        }
        let overhead_bits = control.overhead_bits(&inter.bits(), &self.fixed_bits, &scene);
        Ok(Attempt {
            error: control.error(&inter.bits()),
            overhead_bits,
            scene,
            inter,
        })
    }

    /// Returns the minimum bits per frame.
    fn least_bits(&self) -> f64 {
        let fixed = mean(&self.fixed_bits);
        fixed + Self::LEAST_SPARE.0.max(Self::LEAST_SPARE.1 * fixed)
    }

    fn out_of_reach(&self, error: f64) -> Vp8SpecError {
        let (spec, fps) = (*self.spec, f64::from(self.spec.fps));
        let fixed = mean(&self.fixed_bits);
        if error > 0.0 {
            Vp8SpecError::BitrateTooLow {
                spec,
                least: rounded_up(self.least_bits() * fps),
            }
        } else {
            Vp8SpecError::BitrateTooHigh {
                spec,
                most: rounded_down((Design::most_spare_bits(self.landscape) + fixed) * fps),
            }
        }
    }
}

struct Attempt {
    scene: Scene,
    inter: Frames,
    /// Share of the bitrate by which the loop is too large.
    error: f64,
    /// Measured cost of a new texture besides its luma.
    overhead_bits: f64,
}

/// Maximum number of corrections. Two are enough if the design can meet the bitrate at all.
const MAX_CORRECTIONS: usize = 3;
/// Maximum number of redesigns. Isolated new textures cost more besides their luma than clustered
/// ones; the first attempt measures the cost.
const MAX_REDESIGNS: usize = 3;
/// Error at which the search ends, as a share of the bitrate.
const CLOSE_ENOUGH: f64 = 0.001;
/// Largest error that is accepted in the result, as a share of the bitrate.
const TOLERATED: f64 = 0.01;

fn still_scene(spec: &Vp8Spec, layout: &PictureLayout, quantizers: Quantizers) -> Scene {
    let frames = (LOOP_SECONDS * spec.fps) as usize;
    Scene::still(
        spec.width as usize,
        spec.height as usize,
        frames,
        spec.seed,
        layout.clone(),
        quantizers,
    )
}

fn mean_bits(spec: &Vp8Spec) -> f64 {
    spec.bitrate.bps() as f64 / f64::from(spec.fps)
}

/// Step in which [`Bitrate`] is printed in full, so that a value in a message is accepted as it is.
fn printed_step(bps: f64) -> f64 {
    if bps < 1e6 { 1e3 } else { 1e4 }
}

fn rounded_up(bps: f64) -> Bitrate {
    Bitrate::from_bps(((bps / printed_step(bps)).ceil() * printed_step(bps)) as u64)
}

fn rounded_down(bps: f64) -> Bitrate {
    Bitrate::from_bps(((bps / printed_step(bps)).floor() * printed_step(bps)) as u64)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum FrameKind {
    Key,
    Inter,
}

/// Coded frames, concatenated in one buffer.
struct Frames {
    bytes: Vec<u8>,
    /// Positions where each frame starts, and where the last one ends.
    bounds: Vec<usize>,
}

impl Frames {
    fn frame(&self, index: usize) -> &[u8] {
        &self.bytes[self.bounds[index]..self.bounds[index + 1]]
    }

    fn bits(&self) -> Vec<f64> {
        self.bounds
            .windows(2)
            .map(|bounds| 8.0 * (bounds[1] - bounds[0]) as f64)
            .collect()
    }

    fn join(parts: Vec<Frames>) -> Frames {
        let mut joined = Frames {
            bytes: Vec::with_capacity(parts.iter().map(|part| part.bytes.len()).sum()),
            bounds: vec![0],
        };
        for part in parts {
            let start = joined.bytes.len();
            joined.bytes.extend_from_slice(&part.bytes);
            joined
                .bounds
                .extend(part.bounds[1..].iter().map(|bound| start + bound));
        }
        joined
    }
}

fn code_loop(scene: &Scene, spec: &Vp8Spec, kind: FrameKind, threads: usize) -> Frames {
    let threads = threads.clamp(1, scene.frames);
    let part =
        |thread: usize| scene.frames * thread / threads..scene.frames * (thread + 1) / threads;
    std::thread::scope(|scope| {
        let workers: Vec<_> = (1..threads)
            .map(|thread| scope.spawn(move || code_part(scene, spec, kind, part(thread))))
            .collect();
        let first = code_part(scene, spec, kind, part(0));
        let others = workers
            .into_iter()
            .map(|worker| worker.join().expect("coding does not panic"));
        Frames::join(std::iter::once(first).chain(others).collect())
    })
}

fn code_part(scene: &Scene, spec: &Vp8Spec, kind: FrameKind, indices: Range<usize>) -> Frames {
    let mut coder = FrameCoder::new(&scene.palette, spec.width as usize, spec.height as usize);
    let mut frames = Frames {
        bytes: Vec::new(),
        bounds: vec![0],
    };
    let (mut last, mut picture) = (Vec::new(), Vec::new());
    scene.picture((indices.start + scene.frames - 1) % scene.frames, &mut last);
    for index in indices {
        scene.picture(index, &mut picture);
        let reference = if kind == FrameKind::Key {
            FrameReference::None
        } else {
            FrameReference::Last(&last)
        };
        coder.code(&picture, reference, &mut frames.bytes);
        frames.bounds.push(frames.bytes.len());
        std::mem::swap(&mut last, &mut picture);
    }
    frames
}
