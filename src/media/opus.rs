//! Generated Opus (RFC 6716), made once at start by libopus and shared by all publishers.
//!
//! A clip is a loop of about ten seconds. Each packet is shaped so that its last
//! [`AUDIO_IDENTITY_LEN`] bytes are free for the frame's identity: it is a packet of code 3 whose
//! padding ends in one extension. A decoder gives the same sound with and without it.
//!
//! Over ten seconds libopus meets a bitrate only roughly. So it is asked for a little less, and
//! idle padding fills up the rest, as in constant bitrate.

use std::error::Error;
use std::f64::consts::TAU;
use std::fmt;
use std::time::Duration;

use opus::{Application, Channels, Encoder, packet};

use crate::media::identity::{AUDIO_EXTENSION, AUDIO_IDENTITY_LEN};
use crate::units::Bitrate;

/// The RTP clock of Opus is 48 kHz for any bandwidth (RFC 7587, section 4.1).
pub const CLOCK_RATE: u32 = 48_000;

/// Approximate length of a loop.
const LOOP: Duration = Duration::from_secs(10);

/// Length of the loop's end that is coded first, so that the encoder starts the loop in the state
/// in which it ends it.
const WARM_UP: Duration = Duration::from_secs(2);

/// Packet lengths that libopus can code, in microseconds.
const FRAMES_MICROS: [u64; 9] = [
    2_500, 5_000, 10_000, 20_000, 40_000, 60_000, 80_000, 100_000, 120_000,
];

/// Bytes that the identity costs: frame count, padding length, extension header and the identity
/// itself.
const OVERHEAD_BYTES: u64 = 3 + AUDIO_IDENTITY_LEN as u64;

/// Opus's limits in bits a second (RFC 6716, section 2.1.1), and the minimum size that a short
/// frame can be coded in.
const CODEC_BPS_MIN: u64 = 6_000;
const BPS_MAX: u64 = 510_000;
const CODEC_BYTES_MIN: u64 = 10;

/// Maximum RTP payload, which fits any path.
const PACKET_BYTES_MAX: usize = 1_200;

/// Maximum size of a packet without sound (libopus's DTX).
const DTX_BYTES_MAX: usize = 2;

/// Complexity, as in libwebrtc on small devices. It takes half of the default's time.
const COMPLEXITY: i32 = 5;

/// Maximum shares of padding and of excess. Calibration ends between them.
const FILLER_SHARE_GOOD: f64 = 0.03;
const EXCESS_SHARE_MAX: f64 = 0.005;
const CALIBRATION_ROUNDS: usize = 4;

/// Sound of a clip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AudioContent {
    /// Speech-like sound: formants, syllables, a moving pitch, pauses between phrases.
    Speech,
    /// A pure tone near 440 Hz. It has no pauses, so DTX makes no difference (a voice detector may
    /// take a tone for noise and drop it).
    Tone,
    /// Digital silence. Its packets are short and not filled up, so they do not reach the bitrate.
    Silence,
}

/// Specification of a clip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpusSpec {
    /// Bitrate of the RTP payload over the whole loop: codec, packet header and the identity's 27
    /// bytes per packet. With DTX, it is the rate without DTX.
    pub bitrate: Bitrate,
    /// Length of one packet: 2.5, 5, 10, 20, 40, 60, 80, 100 or 120 ms.
    pub frame: Duration,
    pub content: AudioContent,
    /// Discontinuous transmission: pauses are not sent, except for a refresh every 400 ms.
    pub dtx: bool,
    pub seed: u64,
}

/// Error returned when a specification cannot be met, with the nearest values that can.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OpusSpecError {
    Frame(Duration),
    TooLow {
        asked: Bitrate,
        least: Bitrate,
        frame: Duration,
    },
    TooHigh {
        asked: Bitrate,
        most: Bitrate,
        frame: Duration,
    },
    /// libopus failed.
    Codec(String),
}

impl fmt::Display for OpusSpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OpusSpecError::Frame(frame) => write!(
                f,
                "Opus has no frames of {frame:?}: ask for 2.5, 5, 10, 20, 40, 60, 80, 100 or 120 ms"
            ),
            OpusSpecError::TooLow {
                asked,
                least,
                frame,
            } => {
                write!(
                    f,
                    "{asked} is too low for audio frames of {frame:?} that carry their identity: ask for {} bps or more",
                    least.bps()
                )?;
                if frame.as_micros() < 60_000 {
                    write!(f, ", or for longer frames")
                } else {
                    Ok(())
                }
            }
            OpusSpecError::TooHigh { asked, most, frame } => {
                write!(
                    f,
                    "{asked} is too high for audio frames of {frame:?}: ask for {} bps or less",
                    most.bps()
                )?;
                if frame.as_micros() > 20_000 {
                    write!(f, ", or for shorter frames")
                } else {
                    Ok(())
                }
            }
            OpusSpecError::Codec(what) => write!(f, "Opus: {what}"),
        }
    }
}

impl Error for OpusSpecError {}

impl From<opus::Error> for OpusSpecError {
    fn from(error: opus::Error) -> OpusSpecError {
        OpusSpecError::Codec(error.to_string())
    }
}

/// Loop of packets.
pub struct AudioClip {
    bytes: Box<[u8]>,
    packets: Box<[PacketPlace]>,
    rtp_ticks: u32,
}

#[derive(Clone, Copy)]
struct PacketPlace {
    start: u32,
    /// Length in bytes; zero if nothing is sent.
    len: u16,
    level_dbov: u8,
    identity: bool,
}

impl AudioClip {
    /// Generates a clip, which takes about half a second of CPU. The same specification gives the
    /// same clip on the same host.
    pub fn generate(spec: &OpusSpec) -> Result<AudioClip, OpusSpecError> {
        check(spec)?;
        let samples_per_packet = samples(spec.frame);
        let packets = (LOOP.as_secs_f64() / spec.frame.as_secs_f64()).round() as usize;
        let pcm = synthesize(spec.content, spec.seed, packets * samples_per_packet);
        let levels: Vec<u8> = pcm
            .chunks_exact(samples_per_packet)
            .map(level_dbov)
            .collect();
        let Calibrated {
            codec_bps,
            coded,
            filler,
        } = match spec.content {
            AudioContent::Silence => uncalibrated(spec, &pcm)?,
            AudioContent::Speech | AudioContent::Tone => calibrate(spec, &pcm)?,
        };
        let coded = if spec.dtx && spec.content != AudioContent::Tone {
            encode(&pcm, samples_per_packet, codec_bps, true)?
        } else {
            coded
        };
        AudioClip::pack(&coded, &levels, filler, samples_per_packet as u32)
    }

    /// Returns the number of packets in the loop, including those that DTX leaves out.
    #[expect(clippy::len_without_is_empty, reason = "a loop is never empty")]
    pub fn len(&self) -> usize {
        self.packets.len()
    }

    /// Returns the payload of packet `index`; `None` if DTX sends nothing. If
    /// [`AudioClip::has_identity`] is true, its last [`AUDIO_IDENTITY_LEN`] bytes are free.
    pub fn packet(&self, index: usize) -> Option<&[u8]> {
        let place = self.packets[index];
        let start = place.start as usize;
        (place.len > 0).then(|| &self.bytes[start..start + usize::from(place.len)])
    }

    /// Returns whether the packet has room for an identity. It is false for DTX packets, which are
    /// left unchanged.
    pub fn has_identity(&self, index: usize) -> bool {
        self.packets[index].identity
    }

    /// Returns the sound level as defined in RFC 6464: 0 (loudest) to 127 (silence), in -dBov.
    pub fn level_dbov(&self, index: usize) -> u8 {
        self.packets[index].level_dbov
    }

    /// Returns the RTP time from one packet to the next, at [`CLOCK_RATE`].
    pub fn rtp_ticks(&self) -> u32 {
        self.rtp_ticks
    }

    pub fn packet_duration(&self) -> Duration {
        Duration::from_nanos(u64::from(self.rtp_ticks) * 1_000_000_000 / u64::from(CLOCK_RATE))
    }

    /// Returns the payload bitrate over the whole loop.
    pub fn bitrate(&self) -> Bitrate {
        let ticks = self.packets.len() as u64 * u64::from(self.rtp_ticks);
        Bitrate::from_bps(self.bytes.len() as u64 * 8 * u64::from(CLOCK_RATE) / ticks)
    }

    /// Shapes the packets and concatenates them, with `filler` bytes of padding spread over all of
    /// them.
    ///
    /// In a row of DTX packets only the first is sent, as in libwebrtc.
    fn pack(
        coded: &[Vec<u8>],
        levels: &[u8],
        filler: usize,
        rtp_ticks: u32,
    ) -> Result<AudioClip, OpusSpecError> {
        let mut bytes = Vec::new();
        let mut packets = Vec::new();
        let mut in_dtx = coded
            .last()
            .is_some_and(|packet| packet.len() <= DTX_BYTES_MAX);
        let mut owed = 0;
        for (index, (packet, level_dbov)) in coded.iter().zip(levels).enumerate() {
            let start = bytes.len();
            owed += (index + 1) * filler / coded.len() - index * filler / coded.len();
            let dtx = packet.len() <= DTX_BYTES_MAX;
            match (dtx, in_dtx) {
                (false, _) => owed -= shape(packet, owed, &mut bytes)?,
                // Padding that falls into a pause is not sent later.
                (true, false) => {
                    owed = 0;
                    bytes.extend_from_slice(packet);
                }
                (true, true) => owed = 0,
            }
            in_dtx = dtx;
            packets.push(PacketPlace {
                start: start as u32,
                len: (bytes.len() - start) as u16,
                level_dbov: *level_dbov,
                identity: !dtx,
            });
        }
        Ok(AudioClip {
            bytes: bytes.into_boxed_slice(),
            packets: packets.into_boxed_slice(),
            rtp_ticks,
        })
    }
}

fn samples(frame: Duration) -> usize {
    (frame.as_micros() as u64 * u64::from(CLOCK_RATE) / 1_000_000) as usize
}

/// Returns the bits a second of `bytes` bytes in every packet.
fn rate_of(bytes: u64, frame: Duration) -> u64 {
    (bytes * 8 * 1_000_000).div_ceil(frame.as_micros() as u64)
}

fn check(spec: &OpusSpec) -> Result<(), OpusSpecError> {
    let OpusSpec {
        bitrate: asked,
        frame,
        ..
    } = *spec;
    if !FRAMES_MICROS
        .iter()
        .any(|micros| Duration::from_micros(*micros) == frame)
    {
        return Err(OpusSpecError::Frame(frame));
    }
    let overhead = rate_of(OVERHEAD_BYTES, frame);
    let least = Bitrate::from_bps(overhead + CODEC_BPS_MIN.max(rate_of(CODEC_BYTES_MIN, frame)));
    if asked < least {
        return Err(OpusSpecError::TooLow {
            asked,
            least,
            frame,
        });
    }
    let most = Bitrate::from_bps(
        BPS_MAX.min(PACKET_BYTES_MAX as u64 * 8 * 1_000_000 / frame.as_micros() as u64),
    );
    if asked > most {
        return Err(OpusSpecError::TooHigh { asked, most, frame });
    }
    Ok(())
}

/// Loop at the right rate, except for the padding that has to fill it up.
struct Calibrated {
    codec_bps: u64,
    coded: Vec<Vec<u8>>,
    filler: usize,
}

fn uncalibrated(spec: &OpusSpec, pcm: &[f32]) -> Result<Calibrated, OpusSpecError> {
    let codec_bps = spec.bitrate.bps() - rate_of(OVERHEAD_BYTES, spec.frame);
    Ok(Calibrated {
        codec_bps,
        coded: encode(pcm, samples(spec.frame), codec_bps, false)?,
        filler: 0,
    })
}

/// Finds the rate to request from libopus, so that the shaped loop approaches the specified rate
/// from below.
fn calibrate(spec: &OpusSpec, pcm: &[f32]) -> Result<Calibrated, OpusSpecError> {
    let seconds = pcm.len() as f64 / f64::from(CLOCK_RATE);
    let target = (spec.bitrate.bps() as f64 * seconds / 8.0).floor();
    let mut asked = spec.bitrate.bps() - rate_of(OVERHEAD_BYTES, spec.frame);
    let (mut best, mut least) = (None, f64::INFINITY);
    for round in 0..CALIBRATION_ROUNDS {
        let coded = encode(pcm, samples(spec.frame), asked, false)?;
        let bytes = shaped_len(&coded)? as f64;
        least = least.min(bytes);
        let fits = bytes <= target * (1.0 + EXCESS_SHARE_MAX);
        if fits && best.as_ref().is_none_or(|(most, _)| bytes > *most) {
            let filler = (target - bytes).max(0.0) as usize;
            best = Some((
                bytes,
                Calibrated {
                    codec_bps: asked,
                    coded,
                    filler,
                },
            ));
        }
        if fits && bytes >= target * (1.0 - FILLER_SHARE_GOOD) {
            break;
        }
        // If nothing fitted, the last attempt is the lowest rate of the codec.
        let last_word = round + 2 == CALIBRATION_ROUNDS && best.is_none();
        let next = if last_word {
            CODEC_BPS_MIN
        } else {
            next_rate(spec, asked, bytes / target)
        };
        if next == asked {
            break;
        }
        asked = next;
    }
    let too_low = OpusSpecError::TooLow {
        asked: spec.bitrate,
        least: Bitrate::from_bps((least * 8.0 / seconds).ceil() as u64),
        frame: spec.frame,
    };
    best.map(|(_, calibrated)| calibrated).ok_or(too_low)
}

/// Scales the rate requested from the codec. The loop, with the identity, became `ratio` times as
/// large as it should be.
fn next_rate(spec: &OpusSpec, asked: u64, ratio: f64) -> u64 {
    let (whole, overhead) = (
        spec.bitrate.bps() as f64,
        rate_of(OVERHEAD_BYTES, spec.frame) as f64,
    );
    let aim = whole * (1.0 - FILLER_SHARE_GOOD / 2.0) - overhead;
    let got = whole * ratio - overhead;
    ((asked as f64 * aim / got.max(1.0)) as u64).clamp(CODEC_BPS_MIN, BPS_MAX)
}

/// Returns the packets of one pass of the loop, as libopus makes them.
fn encode(
    pcm: &[f32],
    samples_per_packet: usize,
    bps: u64,
    dtx: bool,
) -> Result<Vec<Vec<u8>>, OpusSpecError> {
    let mut encoder = Encoder::new(CLOCK_RATE, Channels::Mono, Application::Voip)?;
    encoder.set_bitrate(opus::Bitrate::Bits(bps as i32))?;
    encoder.set_complexity(COMPLEXITY)?;
    encoder.set_dtx(dtx)?;
    let room = PACKET_BYTES_MAX - OVERHEAD_BYTES as usize;
    let warm_up = samples(WARM_UP).min(pcm.len()) / samples_per_packet * samples_per_packet;
    for frame in pcm[pcm.len() - warm_up..].chunks_exact(samples_per_packet) {
        encoder.encode_vec_float(frame, room)?;
    }
    pcm.chunks_exact(samples_per_packet)
        .map(|frame| Ok(encoder.encode_vec_float(frame, room)?))
        .collect()
}

/// Returns the bytes of the whole loop, shaped, without filler.
fn shaped_len(coded: &[Vec<u8>]) -> Result<usize, OpusSpecError> {
    let mut out = Vec::new();
    for packet in coded {
        match packet.len() {
            0..=DTX_BYTES_MAX => out.extend_from_slice(packet),
            _ => drop(shape(packet, 0, &mut out)?),
        }
    }
    Ok(out.len())
}

/// Appends `coded` as a packet of code 3 (RFC 6716, section 3.2.5) with idle bytes and the identity
/// extension as padding. Padding that it had before is dropped. The packet grows by up to `filler`
/// bytes more than the identity needs; returns by how many.
fn shape(coded: &[u8], filler: usize, out: &mut Vec<u8>) -> Result<usize, OpusSpecError> {
    const VARIABLE: u8 = 0x80;
    const PADDED: u8 = 0x40;
    let start = out.len();
    let packet::Packet { toc, frames, .. } = packet::parse(coded)?;
    let variable = frames.iter().any(|frame| frame.len() != frames[0].len());
    let lens = if variable {
        &frames[..frames.len() - 1]
    } else {
        &[]
    };
    let sound = lens
        .iter()
        .map(|frame| frame_len_len(frame.len()))
        .sum::<usize>()
        + frames.iter().map(|frame| frame.len()).sum::<usize>();
    let room = PACKET_BYTES_MAX
        .saturating_sub(2 + sound)
        .min(PADDING_BYTES_MIN + filler)
        .max(PADDING_BYTES_MIN);
    let padding = padding_in(room);

    out.push(toc | 3);
    out.push(frames.len() as u8 | PADDED | if variable { VARIABLE } else { 0 });
    push_padding_len(padding, out);
    lens.iter()
        .for_each(|frame| push_frame_len(frame.len(), out));
    frames.iter().for_each(|frame| out.extend_from_slice(frame));
    out.resize(out.len() + padding - AUDIO_IDENTITY_LEN - 1, IDLE);
    out.push(AUDIO_EXTENSION);
    out.resize(out.len() + AUDIO_IDENTITY_LEN, 0);
    Ok(out.len() - start - (2 + sound + PADDING_BYTES_MIN))
}

/// Minimum padding: the identity, its extension header, and the padding's length.
const PADDING_BYTES_MIN: usize = AUDIO_IDENTITY_LEN + 2;

/// Extension of id 0 and length 0, which decoders skip.
const IDLE: u8 = 0;

/// Returns the maximum padding that fits into `room` bytes along with its own length (254 per
/// length byte, because 255 means 254 and another byte).
fn padding_in(room: usize) -> usize {
    (0..room)
        .rev()
        .find(|padding| padding + padding.div_ceil(254).max(1) <= room)
        .unwrap_or(0)
}

fn push_padding_len(padding: usize, out: &mut Vec<u8>) {
    let mut rest = padding;
    while rest > 254 {
        out.push(255);
        rest -= 254;
    }
    out.push(rest as u8);
}

fn frame_len_len(len: usize) -> usize {
    if len < 252 { 1 } else { 2 }
}

/// Appends a frame length (RFC 6716, section 3.2.1).
fn push_frame_len(len: usize, out: &mut Vec<u8>) {
    if len < 252 {
        out.push(len as u8);
    } else {
        let first = 252 + (len & 3);
        out.extend_from_slice(&[first as u8, ((len - first) >> 2) as u8]);
    }
}

/// Returns the level of RFC 6464: the RMS against that of a full-scale square wave.
fn level_dbov(pcm: &[f32]) -> u8 {
    let power = pcm
        .iter()
        .map(|sample| f64::from(*sample).powi(2))
        .sum::<f64>()
        / pcm.len() as f64;
    let level = -10.0 * power.max(1e-20).log10();
    level.round().clamp(0.0, 127.0) as u8
}

/// Returns `len` samples at 48 kHz, full scale 1.0, that can be looped without a break.
fn synthesize(content: AudioContent, seed: u64, len: usize) -> Vec<f32> {
    match content {
        AudioContent::Speech => speech::synthesize(seed, len),
        AudioContent::Tone => {
            let cycles = (440.0 * len as f64 / f64::from(CLOCK_RATE)).round();
            (0..len)
                .map(|at| (0.25 * (TAU * cycles * at as f64 / len as f64).sin()) as f32)
                .collect()
        }
        AudioContent::Silence => vec![0.0; len],
    }
}

/// Synthesised voice: glottal pulses and noise, through resonators that move from vowel to vowel.
/// It has no words, but a codec and a voice detector take it for speech.
mod speech {
    use std::f64::consts::TAU;

    use crate::seeded::Seeded;

    const RATE: f64 = super::CLOCK_RATE as f64;

    /// First three formants of vowels, in Hz (averages over male speakers; Peterson and Barney,
    /// 1952).
    const VOWELS: [[f64; 3]; 8] = [
        [730.0, 1090.0, 2440.0],
        [270.0, 2290.0, 3010.0],
        [300.0, 870.0, 2240.0],
        [530.0, 1840.0, 2480.0],
        [660.0, 1720.0, 2410.0],
        [570.0, 840.0, 2410.0],
        [440.0, 1020.0, 2240.0],
        [490.0, 1350.0, 1690.0],
    ];
    const BANDWIDTHS_HZ: [f64; 3] = [70.0, 100.0, 160.0];
    const PEAK: f64 = 0.3;

    /// Silence at the loop's beginning and end, so that it can be looped without a break.
    const LEAD_IN_SECONDS: f64 = 0.1;
    const LEAD_OUT_SECONDS: f64 = 0.4;

    pub fn synthesize(seed: u64, len: usize) -> Vec<f32> {
        let mut random = Seeded::new(seed);
        let mut pcm = vec![0.0; len];
        let end = len as f64 / RATE - LEAD_OUT_SECONDS;
        let voice_hz = 95.0 + 110.0 * random.unit();
        let mut at = LEAD_IN_SECONDS;
        while at < end {
            at = phrase(&mut random, voice_hz, at, end, &mut pcm);
            at += 0.25 + 0.55 * random.unit();
        }
        let peak = pcm
            .iter()
            .fold(1e-9, |peak: f64, sample: &f64| peak.max(sample.abs()));
        // Some compression, like that of a microphone's gain control, because soft syllables are
        // speech too.
        pcm.into_iter()
            .map(|sample| (PEAK * (3.0 * sample / peak).tanh()) as f32)
            .collect()
    }

    /// Adds a phrase of four to nine syllables with a falling pitch; returns its end.
    fn phrase(random: &mut Seeded, voice_hz: f64, start: f64, end: f64, pcm: &mut [f64]) -> f64 {
        let syllables = 4 + random.draw() % 6;
        let mut throat = Throat::default();
        let mut at = start;
        for syllable in 0..syllables {
            let (consonant, vowel) = (0.03 + 0.05 * random.unit(), 0.09 + 0.12 * random.unit());
            if at + consonant + vowel > end {
                break;
            }
            let decline = 1.15 - 0.3 * syllable as f64 / syllables as f64;
            if !random.draw().is_multiple_of(3) {
                let loudness = 0.05 + 0.1 * random.unit();
                throat.hiss(random, loudness, window(at, consonant, pcm));
            }
            let stress = 0.6 + 0.4 * random.unit();
            let formants = VOWELS[(random.draw() % VOWELS.len() as u64) as usize];
            let pitch_hz = voice_hz * decline * (0.95 + 0.1 * random.unit());
            throat.sing(
                random,
                formants,
                pitch_hz,
                stress,
                window(at + consonant, vowel, pcm),
            );
            at += consonant + vowel;
        }
        at
    }

    fn window(start: f64, seconds: f64, pcm: &mut [f64]) -> &mut [f64] {
        let from = (start * RATE) as usize;
        let to = (((start + seconds) * RATE) as usize).min(pcm.len());
        &mut pcm[from.min(to)..to]
    }

    #[derive(Default)]
    struct Throat {
        phase: f64,
        formants: [f64; 3],
        resonators: [Resonator; 3],
        hiss: Resonator,
    }

    impl Throat {
        fn hiss(&mut self, random: &mut Seeded, loudness: f64, out: &mut [f64]) {
            let place_hz = 2_500.0 + 4_500.0 * random.unit();
            let total = out.len() as f64;
            for (at, sample) in out.iter_mut().enumerate() {
                let noise = 2.0 * random.unit() - 1.0;
                *sample += loudness
                    * swell(at as f64 / total)
                    * self.hiss.filter(noise, place_hz, 1_500.0);
            }
        }

        fn sing(
            &mut self,
            random: &mut Seeded,
            target: [f64; 3],
            pitch_hz: f64,
            loudness: f64,
            out: &mut [f64],
        ) {
            let total = out.len() as f64;
            for (at, sample) in out.iter_mut().enumerate() {
                let progress = at as f64 / total;
                let vibrato = 1.0 + 0.02 * (TAU * 5.0 * at as f64 / RATE).sin();
                self.phase = (self.phase + pitch_hz * vibrato / RATE).fract();
                let breath = 0.03 * (2.0 * random.unit() - 1.0);
                let mut sound = loudness * swell(progress) * (glottis(self.phase) + breath);
                for ((formant, resonator), (target, bandwidth)) in self
                    .formants
                    .iter_mut()
                    .zip(&mut self.resonators)
                    .zip(target.iter().zip(BANDWIDTHS_HZ))
                {
                    // A formant moves within about 20 ms; the first syllable starts at its target.
                    *formant = if *formant == 0.0 {
                        *target
                    } else {
                        *formant + (target - *formant) * 0.001
                    };
                    sound = resonator.filter(sound, *formant, bandwidth);
                }
                *sample += sound;
            }
        }
    }

    /// Envelope: rises, holds, and falls to nothing.
    fn swell(progress: f64) -> f64 {
        let edge = (progress / 0.2).min((1.0 - progress) / 0.3).clamp(0.0, 1.0);
        edge * edge * (3.0 - 2.0 * edge)
    }

    /// Derivative of the flow through the glottis, which is open for 60 % of the period and closes
    /// sharply.
    fn glottis(phase: f64) -> f64 {
        let open = phase / 0.6;
        if open < 1.0 {
            open * (2.0 - 3.0 * open)
        } else {
            0.0
        }
    }

    /// Resonator with two poles and unity gain at 0 Hz (Klatt, 1980).
    #[derive(Default)]
    struct Resonator {
        before: f64,
        before_that: f64,
    }

    impl Resonator {
        fn filter(&mut self, input: f64, hz: f64, bandwidth_hz: f64) -> f64 {
            let radius = (-std::f64::consts::PI * bandwidth_hz / RATE).exp();
            let (b, c) = (2.0 * radius * (TAU * hz / RATE).cos(), -radius * radius);
            let output = (1.0 - b - c) * input + b * self.before + c * self.before_that;
            self.before_that = self.before;
            self.before = output;
            output
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::identity::{FrameIdentity, Origin};

    fn spec(kbps: u64, millis: f64, content: AudioContent, dtx: bool) -> OpusSpec {
        OpusSpec {
            bitrate: Bitrate::from_bps(kbps * 1_000),
            frame: Duration::from_secs_f64(millis / 1e3),
            content,
            dtx,
            seed: 7,
        }
    }

    /// Decodes packets. Returns the sound and the final range (the state of the range coder, which
    /// differs if it read anything else).
    fn decoded<'a>(
        packets: impl Iterator<Item = &'a [u8]>,
        channels: Channels,
    ) -> Vec<(Vec<i16>, u32)> {
        let mut decoder = opus::Decoder::new(CLOCK_RATE, channels).unwrap();
        let mut pcm = [0; 5_760 * 2];
        packets
            .map(|packet| {
                let len = decoder.decode(packet, &mut pcm, false).unwrap() * channels as usize;
                (pcm[..len].to_vec(), decoder.get_final_range().unwrap())
            })
            .collect()
    }

    #[test]
    fn a_decoder_hears_the_same_with_and_without_identity_in_every_mode() {
        let voice = synthesize(AudioContent::Speech, 3, CLOCK_RATE as usize * 3);
        for channels in [Channels::Mono, Channels::Stereo] {
            for (application, vbr, dtx, fec) in [
                (Application::Voip, true, false, false),
                (Application::Voip, false, false, true),
                (Application::Voip, true, true, false),
                (Application::Audio, true, false, true),
                (Application::Audio, false, true, false),
                (Application::LowDelay, true, false, false),
            ] {
                for (millis, bps) in [
                    (2.5, 64_000),
                    (5.0, 48_000),
                    (10.0, 24_000),
                    (20.0, 12_000),
                    (20.0, 128_000),
                    (60.0, 16_000),
                    (120.0, 32_000),
                ] {
                    let mut encoder = Encoder::new(CLOCK_RATE, channels, application).unwrap();
                    encoder.set_bitrate(opus::Bitrate::Bits(bps)).unwrap();
                    encoder.set_vbr(vbr).unwrap();
                    encoder.set_dtx(dtx).unwrap();
                    encoder.set_inband_fec(fec).unwrap();
                    encoder
                        .set_packet_loss_perc(if fec { 20 } else { 0 })
                        .unwrap();
                    let interleaved: Vec<f32> = voice
                        .iter()
                        .flat_map(|sample| {
                            [*sample, sample * 0.5].into_iter().take(channels as usize)
                        })
                        .collect();
                    let samples =
                        (millis * f64::from(CLOCK_RATE) / 1e3) as usize * channels as usize;
                    let plain: Vec<Vec<u8>> = interleaved
                        .chunks_exact(samples)
                        .map(|frame| encoder.encode_vec_float(frame, 1_170).unwrap())
                        .collect();
                    for filler in [0, 1, 227, 228, 229, 600] {
                        let shaped: Vec<Vec<u8>> = plain
                            .iter()
                            .map(|packet| with_identity(packet, filler))
                            .collect();
                        let same = decoded(plain.iter().map(Vec::as_slice), channels)
                            == decoded(shaped.iter().map(Vec::as_slice), channels);
                        assert!(
                            same,
                            "{channels:?} {application:?} vbr {vbr} dtx {dtx} fec {fec} {millis} ms, filler {filler}"
                        );
                    }
                }
            }
        }
    }

    /// Returns the packet shaped, with an identity in its slot. Short packets are unchanged.
    fn with_identity(packet: &[u8], filler: usize) -> Vec<u8> {
        let mut out = Vec::new();
        if packet.len() <= DTX_BYTES_MAX {
            return packet.to_vec();
        }
        let grown = shape(packet, filler, &mut out).unwrap();
        assert!(grown <= filler && out.len() <= PACKET_BYTES_MAX);
        let identity = FrameIdentity {
            intended_unix_us: 0xF0F1_F2F3_F4F5_F6F7,
            run: u32::MAX,
            origin: Origin {
                publisher: 5,
                track: 0xF0,
            },
            frame: 0xF0F0_F0F0,
            layer: 0xFF,
        };
        identity.write_audio(out.last_chunk_mut().unwrap());
        assert_eq!(FrameIdentity::parse_audio(&out), Some(identity));
        assert_eq!(FrameIdentity::parse_audio(packet), None);
        out
    }

    #[test]
    fn a_loop_of_speech_has_the_bitrate_asked_for() {
        for (kbps, millis) in [
            (119, 2.5),
            (64, 5.0),
            (32, 10.0),
            (17, 20.0),
            (24, 20.0),
            (48, 20.0),
            (300, 20.0),
            (470, 20.0),
            (16, 60.0),
            (24, 120.0),
        ] {
            let clip =
                AudioClip::generate(&spec(kbps, millis, AudioContent::Speech, false)).unwrap();
            let bytes: usize = (0..clip.len())
                .map(|at| clip.packet(at).unwrap().len())
                .sum();
            let seconds = clip.len() as f64 * clip.packet_duration().as_secs_f64();
            let off = bytes as f64 * 8.0 / seconds / (kbps * 1_000) as f64 - 1.0;
            assert!(
                off.abs() < 0.01,
                "{kbps} kbps in {millis} ms is {off:+.3} off"
            );
            assert!((9.9..10.1).contains(&seconds));
            assert!(
                (0..clip.len()).all(|at| clip.has_identity(at)
                    && clip.packet(at).unwrap().len() <= PACKET_BYTES_MAX)
            );
            assert_eq!(f64::from(clip.rtp_ticks()), millis * 48.0);
        }
    }

    #[test]
    fn most_of_a_loop_at_an_ordinary_rate_is_sound_not_filler() {
        for kbps in [20, 24, 32, 48, 64] {
            let pcm = synthesize(AudioContent::Speech, 7, CLOCK_RATE as usize * 10);
            let calibrated =
                calibrate(&spec(kbps, 20.0, AudioContent::Speech, false), &pcm).unwrap();
            assert!(
                calibrated.filler as u64 <= kbps * 10_000 / 8 * 6 / 100,
                "{kbps} kbps: {} bytes",
                calibrated.filler
            );
        }
    }

    #[test]
    fn what_opus_cannot_do_is_refused_with_what_it_can() {
        let refusal = |kbps, millis| {
            AudioClip::generate(&spec(kbps, millis, AudioContent::Speech, false))
                .err()
                .map(|error| error.to_string())
        };
        assert!(
            refusal(24, 30.0)
                .unwrap()
                .contains("ask for 2.5, 5, 10, 20, 40, 60, 80, 100 or 120 ms")
        );
        assert!(
            refusal(16, 20.0)
                .unwrap()
                .contains("ask for 16800 bps or more, or for longer frames")
        );
        assert!(
            refusal(100, 2.5)
                .unwrap()
                .contains("ask for 118400 bps or more")
        );
        assert!(
            refusal(511, 10.0)
                .unwrap()
                .contains("ask for 510000 bps or less")
        );
        assert!(
            refusal(100, 120.0)
                .unwrap()
                .contains("ask for 80000 bps or less, or for shorter frames")
        );
        let least = OpusSpec {
            bitrate: Bitrate::from_bps(16_800),
            ..spec(0, 20.0, AudioContent::Speech, false)
        };
        assert!(AudioClip::generate(&least).is_ok());
    }

    #[test]
    fn dtx_sends_pauses_as_one_short_packet_and_a_refresh_now_and_then() {
        let clip = AudioClip::generate(&spec(24, 20.0, AudioContent::Speech, true)).unwrap();
        let lens: Vec<usize> = (0..clip.len())
            .map(|at| clip.packet(at).map_or(0, <[u8]>::len))
            .collect();
        let silent = lens.iter().filter(|len| **len == 0).count();
        assert!((40..250).contains(&silent), "{silent}");
        for at in 0..clip.len() {
            assert_eq!(clip.has_identity(at), lens[at] > DTX_BYTES_MAX);
            if (1..=DTX_BYTES_MAX).contains(&lens[at]) {
                assert!(
                    lens[(at + clip.len() - 1) % clip.len()] > DTX_BYTES_MAX,
                    "only the first of a pause is sent"
                );
            }
        }
        let silence = AudioClip::generate(&spec(24, 20.0, AudioContent::Silence, true)).unwrap();
        let sent = (0..silence.len())
            .filter(|at| silence.has_identity(*at))
            .count();
        assert!((20..30).contains(&sent), "a refresh every 400 ms: {sent}");
        let tone = AudioClip::generate(&spec(24, 20.0, AudioContent::Tone, true)).unwrap();
        assert!((0..tone.len()).all(|at| tone.has_identity(at)));
    }

    #[test]
    fn levels_tell_speech_from_pauses_and_silence() {
        let levels = |content| {
            let clip = AudioClip::generate(&spec(24, 20.0, content, false)).unwrap();
            (0..clip.len())
                .map(|at| clip.level_dbov(at))
                .collect::<Vec<_>>()
        };
        assert!(
            levels(AudioContent::Silence)
                .iter()
                .all(|level| *level == 127)
        );
        assert!(
            levels(AudioContent::Tone).iter().all(|level| *level == 15),
            "a sine of amplitude 1/4"
        );
        let speech = levels(AudioContent::Speech);
        let (loud, quiet) = (
            speech.iter().filter(|level| **level < 35).count(),
            speech.iter().filter(|level| **level == 127).count(),
        );
        assert!(
            loud > speech.len() / 2 && quiet > speech.len() / 20,
            "{loud} loud, {quiet} quiet of {}",
            speech.len()
        );
    }

    #[test]
    fn the_seam_of_the_loop_is_not_heard() {
        for content in [AudioContent::Speech, AudioContent::Tone] {
            let clip = AudioClip::generate(&spec(32, 20.0, content, false)).unwrap();
            let turns = (0..clip.len() * 2).map(|at| clip.packet(at % clip.len()).unwrap());
            let pcm: Vec<i16> = decoded(turns, Channels::Mono)
                .into_iter()
                .flat_map(|(pcm, _)| pcm)
                .collect();
            let step = |range: &[i16]| {
                range
                    .windows(2)
                    .map(|pair| (i32::from(pair[1]) - i32::from(pair[0])).abs())
                    .max()
                    .unwrap()
            };
            let seam = pcm.len() / 2;
            let (around, elsewhere) = (
                step(&pcm[seam - 960..seam + 4_800]),
                step(&pcm[seam / 4..seam - 960]),
            );
            assert!(
                around <= elsewhere + elsewhere / 10,
                "{content:?}: {around} {elsewhere}"
            );
        }
    }

    #[test]
    fn the_same_spec_gives_the_same_clip_and_another_seed_another() {
        let spec = spec(24, 20.0, AudioContent::Speech, false);
        let [first, second] = [&spec, &spec].map(|spec| AudioClip::generate(spec).unwrap().bytes);
        assert_eq!(first, second);
        assert_ne!(
            first,
            AudioClip::generate(&OpusSpec { seed: 8, ..spec })
                .unwrap()
                .bytes
        );
    }
}
