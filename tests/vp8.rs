//! The video source, decoded by two independent decoders (ffmpeg's own and libvpx, both through the
//! `ffmpeg` command). The tests compare pixels, and do not only check that a decoder reports no
//! error.
//!
//! Without `ffmpeg` the decoder tests print that they were skipped. If the environment variable
//! `CI` is set they fail instead. Ten minutes of the default layers: `cargo test --release --test
//! vp8 -- --ignored --nocapture`.

use std::io::{BufWriter, Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use throng::media::vp8::{I420, VideoClip, Vp8Spec, Vp8SpecError, tables};

fn spec(width: u32, height: u32, fps: u32, bitrate: &str) -> Vp8Spec {
    Vp8Spec {
        width,
        height,
        fps,
        bitrate: bitrate.parse().unwrap(),
        seed: 1,
    }
}

fn generated(spec: Vp8Spec) -> VideoClip {
    VideoClip::generate(&spec, 2).unwrap_or_else(|error| panic!("{spec:?}: {error}"))
}

/// Returns a clip of the smallest default layer, which most tests use.
fn small_clip() -> &'static VideoClip {
    static CLIP: OnceLock<VideoClip> = OnceLock::new();
    CLIP.get_or_init(|| generated(spec(320, 180, 15, "150k")))
}

/// Returns a clip of odd width and height, so that the last macroblocks are cut.
fn odd_clip() -> &'static VideoClip {
    static CLIP: OnceLock<VideoClip> = OnceLock::new();
    CLIP.get_or_init(|| generated(spec(855, 481, 12, "500k")))
}

/// One frame of a stream under test, and the index of the picture that the decoder must then show.
struct Sent {
    bytes: Vec<u8>,
    shows: usize,
}

fn inter(clip: &VideoClip, index: usize) -> Sent {
    Sent {
        bytes: clip.inter_frame(index).to_vec(),
        shows: index,
    }
}

fn key(clip: &VideoClip, index: usize) -> Sent {
    Sent {
        bytes: clip.key_frame(index).to_vec(),
        shows: index,
    }
}

/// Returns `count` frames from `start`, as after a join there. Where `asks_key(turn)` is true, a
/// key frame is sent.
fn play(
    clip: &VideoClip,
    start: usize,
    count: usize,
    mut asks_key: impl FnMut(usize) -> bool,
) -> Vec<Sent> {
    let frame = |turn: usize| {
        let index = (start + turn) % clip.len();
        if turn == 0 || asks_key(turn) {
            key(clip, index)
        } else {
            inter(clip, index)
        }
    };
    (0..count).map(frame).collect()
}

/// A seeded random generator, so that every run is the same.
struct Lcg(u64);

impl Lcg {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }
}

// Decoders

#[derive(Clone, Copy, Debug, PartialEq)]
enum Decoder {
    /// ffmpeg's own decoder.
    Native,
    Libvpx,
}

const DECODERS: [Decoder; 2] = [Decoder::Native, Decoder::Libvpx];

impl Decoder {
    fn command(self, input: &str) -> Command {
        let mut command = Command::new("ffmpeg");
        let name = if self == Decoder::Native {
            "vp8"
        } else {
            "libvpx"
        };
        command.args([
            "-nostdin", "-v", "warning", "-f", "ivf", "-c:v", name, "-i", input,
        ]);
        command
    }
}

/// Whether the decoder tests can run. Prints a line if not, and panics under `CI`.
fn has_ffmpeg() -> bool {
    let found = Command::new("ffmpeg")
        .arg("-version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok();
    assert!(
        found || std::env::var_os("CI").is_none(),
        "the video tests need a decoder: install ffmpeg"
    );
    if !found {
        println!("skipped: install ffmpeg to check the video against its decoders");
    }
    found
}

/// Result of decoding a stream.
#[derive(Debug, PartialEq)]
struct Outcome {
    /// Number of decoded pictures.
    frames: usize,
    /// Index of the first picture that differs from the model.
    first_wrong: Option<usize>,
    stderr: String,
}

/// Asserts that both decoders decode the stream pixel for pixel and print nothing.
fn assert_exact(clip: &VideoClip, sent: &[Sent], what: &str) {
    for decoder in DECODERS {
        let outcome = decode(decoder, clip, sent);
        assert_eq!(
            outcome,
            Outcome {
                frames: sent.len(),
                first_wrong: None,
                stderr: String::new()
            },
            "{what}, {decoder:?}"
        );
    }
}

fn decode(decoder: Decoder, clip: &VideoClip, sent: &[Sent]) -> Outcome {
    let file = TempFile::new();
    let mut ivf = BufWriter::new(std::fs::File::create(&file.0).unwrap());
    write_ivf(
        &mut ivf,
        clip.spec(),
        sent.iter().map(|sent| sent.bytes.as_slice()),
    )
    .unwrap();
    ivf.into_inner().unwrap();
    let mut command = decoder.command(file.0.to_str().unwrap());
    command.args(["-f", "rawvideo", "-pix_fmt", "yuv420p", "pipe:1"]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (pixels, mut errors) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let mut stderr = String::new();
    let (frames, first_wrong) = std::thread::scope(|scope| {
        scope.spawn(|| errors.read_to_string(&mut stderr).unwrap());
        compare(pixels, clip, sent)
    });
    child.wait().unwrap();
    Outcome {
        frames,
        first_wrong,
        stderr,
    }
}

/// Compares pictures as they are decoded. Returns their number, and the index of the first wrong
/// one.
fn compare(mut pixels: impl Read, clip: &VideoClip, sent: &[Sent]) -> (usize, Option<usize>) {
    let mut picture = vec![0; clip.reconstruction(0).data.len()];
    let (mut frames, mut first_wrong) = (0, None);
    while pixels.read_exact(&mut picture).is_ok() {
        let right = sent
            .get(frames)
            .is_some_and(|sent| clip.reconstruction(sent.shows).data == picture);
        if !right && first_wrong.is_none() {
            first_wrong = Some(frames);
        }
        frames += 1;
    }
    (frames, first_wrong)
}

struct TempFile(PathBuf);

impl TempFile {
    fn new() -> TempFile {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        TempFile(
            std::env::temp_dir().join(format!("throng-vp8-{}-{count}.ivf", std::process::id())),
        )
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn write_ivf<'a>(
    out: &mut impl Write,
    spec: &Vp8Spec,
    frames: impl Iterator<Item = &'a [u8]>,
) -> std::io::Result<()> {
    out.write_all(b"DKIF\0\0\x20\0VP80")?;
    out.write_all(&(spec.width as u16).to_le_bytes())?;
    out.write_all(&(spec.height as u16).to_le_bytes())?;
    for field in [spec.fps, 1, 0, 0] {
        out.write_all(&field.to_le_bytes())?;
    }
    for (at, frame) in frames.enumerate() {
        out.write_all(&(frame.len() as u32).to_le_bytes())?;
        out.write_all(&(at as u64).to_le_bytes())?;
        out.write_all(frame)?;
    }
    out.flush()
}

// Decoded pictures

#[test]
fn the_loop_plays_twice_round_pixel_for_pixel() {
    if !has_ffmpeg() {
        return;
    }
    let coarse_to_finest = [
        spec(160, 90, 10, "60k"),
        spec(320, 180, 15, "1M"),
        spec(240, 426, 4, "700k"),
        spec(97, 49, 1, "10k"),
    ];
    let others = coarse_to_finest.map(generated);
    for clip in others.iter().chain([small_clip(), odd_clip()]) {
        assert_exact(
            clip,
            &play(clip, 0, 2 * clip.len() + 1, |_| false),
            &format!("{:?}", clip.spec()),
        );
    }
}

#[test]
fn a_high_definition_layer_plays_pixel_for_pixel() {
    if !has_ffmpeg() {
        return;
    }
    let clip = generated(spec(1280, 720, 30, "2M"));
    assert_exact(
        &clip,
        &play(&clip, 250, 100, |turn| turn == 70),
        "720p over the seam",
    );
}

#[test]
fn key_frames_asked_at_random_and_joins_anywhere_change_no_pixel() {
    if !has_ffmpeg() {
        return;
    }
    for seed in 0..6 {
        let mut random = Lcg(seed);
        let clip = if seed % 2 == 0 {
            small_clip()
        } else {
            odd_clip()
        };
        let start = random.below(clip.len());
        let sent = play(clip, start, 200, |_| random.below(12) == 0);
        assert_exact(clip, &sent, &format!("seed {seed}, joined at {start}"));
    }
}

#[test]
fn every_key_frame_stands_alone_and_every_inter_frame_follows_it() {
    if !has_ffmpeg() {
        return;
    }
    // Backwards, so that no key frame can depend on the picture before it.
    for clip in [small_clip(), odd_clip()] {
        let pair = |index: usize| [key(clip, index), inter(clip, (index + 1) % clip.len())];
        let sent: Vec<Sent> = (0..clip.len()).rev().flat_map(pair).collect();
        assert_exact(clip, &sent, "a key frame and its successor, at every index");
    }
}

#[test]
fn bytes_after_a_frame_change_nothing() {
    if !has_ffmpeg() {
        return;
    }
    let clip = small_clip();
    let mut random = Lcg(4);
    for kind in ["random", "0xff", "0x00"] {
        let mut sent = play(clip, 100, 160, |turn| turn % 37 == 0);
        for sent in &mut sent {
            for _ in 0..1 + random.below(60) {
                sent.bytes.push(if kind == "random" {
                    random.below(256) as u8
                } else {
                    u8::from(kind == "0xff") * 0xFF
                });
            }
        }
        assert_exact(clip, &sent, &format!("a trailer of {kind} bytes"));
    }
}

#[test]
fn a_lost_inter_frame_or_a_wrong_key_frame_is_seen() {
    if !has_ffmpeg() {
        return;
    }
    let clip = small_clip();
    for decoder in DECODERS {
        let mut lossy = play(clip, 0, 80, |_| false);
        lossy.remove(40);
        assert_eq!(
            decode(decoder, clip, &lossy).first_wrong,
            Some(40),
            "{decoder:?}: a lost frame went unnoticed"
        );
        let mut wrong = play(clip, 0, 80, |_| false);
        wrong[40].bytes = clip.key_frame(60).to_vec();
        assert_eq!(
            decode(decoder, clip, &wrong).first_wrong,
            Some(40),
            "{decoder:?}: a wrong key frame went unnoticed"
        );
        // The damage of the wrong key frame must last. Otherwise the index would not matter.
        wrong[40].shows = 60;
        let late: Vec<Sent> = wrong.into_iter().skip(40).collect();
        assert!(
            matches!(decode(decoder, clip, &late).first_wrong, Some(1..)),
            "{decoder:?}: the frame after a wrong key frame was right"
        );
    }
}

#[test]
fn the_index_row_tells_the_frame() {
    for clip in [small_clip(), odd_clip()] {
        assert!(
            (0..clip.len())
                .all(|index| clip.read_index(&clip.reconstruction(index)) == Some(index))
        );
        let blank = I420 {
            data: vec![128; clip.reconstruction(0).data.len()],
            ..clip.reconstruction(0)
        };
        assert_eq!(clip.read_index(&blank), None);
        assert_eq!(
            clip.read_index(&I420 {
                data: Vec::new(),
                ..blank
            }),
            None
        );
    }
}

// Bitstream

#[test]
fn nearly_all_bytes_are_read_by_the_entropy_decoder() {
    for clip in [small_clip(), odd_clip()] {
        let mut least_share: f64 = 1.0;
        for index in 0..clip.len() {
            for (frame, is_key) in [
                (clip.inter_frame(index), false),
                (clip.key_frame(index), true),
            ] {
                let usage = Usage::of(frame, clip.spec());
                assert!(usage.is_key == is_key && usage.read <= frame.len());
                least_share = least_share.min(usage.read as f64 / frame.len() as f64);
            }
        }
        println!(
            "{:?}: at least {:.2} % of a frame's bytes are read",
            clip.spec(),
            100.0 * least_share
        );
        assert!(least_share >= 0.95);
    }
    // The parser must also be able to detect unused bytes.
    let padded = [small_clip().inter_frame(3), &[0x55; 200]].concat();
    assert!(100 * Usage::of(&padded, small_clip().spec()).read < 95 * padded.len());
}

#[test]
fn most_bits_are_coefficients() {
    for clip in [small_clip(), odd_clip()] {
        let usages = (0..clip.len()).map(|index| Usage::of(clip.inter_frame(index), clip.spec()));
        let (coefficients, all) = usages.fold((0, 0), |(tokens, all), usage| {
            (tokens + usage.token_bytes, all + usage.read)
        });
        assert!(10 * coefficients > 8 * all, "{coefficients} of {all} bytes");
    }
}

/// Figures of one frame's bitstream, read by the RFC's syntax and tables as far as this project
/// uses them.
#[derive(Debug)]
struct Usage {
    is_key: bool,
    /// Number of bytes that the frame's uncompressed part and its two partitions need.
    read: usize,
    token_bytes: usize,
}

impl Usage {
    fn of(frame: &[u8], spec: &Vp8Spec) -> Usage {
        let tag = u32::from_le_bytes([frame[0], frame[1], frame[2], 0]);
        let (is_key, first_size) = (tag & 1 == 0, (tag >> 5) as usize);
        assert_eq!(tag >> 1 & 0b1111, 0b1000, "version 0, shown");
        let start = if is_key { 10 } else { 3 };
        if is_key {
            assert_eq!(frame[3..6], [0x9D, 0x01, 0x2A]);
            assert_eq!(
                frame[6..10],
                [spec.width as u16, spec.height as u16]
                    .map(u16::to_le_bytes)
                    .concat()
            );
        }
        let mut modes = Reader::new(&frame[start..start + first_size]);
        let mut tokens = Reader::new(&frame[start + first_size..]);
        let probs = read_header(&mut modes, is_key);
        let columns = spec.width.div_ceil(16) as usize;
        let skips = read_modes(
            &mut modes,
            is_key,
            probs,
            columns,
            spec.height.div_ceil(16) as usize,
        );
        read_tokens(&mut tokens, &skips, columns);
        Usage {
            is_key,
            read: start + modes.bytes_read() + tokens.bytes_read(),
            token_bytes: tokens.bytes_read(),
        }
    }
}

/// The boolean decoder of RFC 6386, section 7.3.
struct Reader<'a> {
    input: &'a [u8],
    at: usize,
    value: u32,
    range: u32,
    shifts: usize,
}

impl<'a> Reader<'a> {
    fn new(input: &'a [u8]) -> Reader<'a> {
        Reader {
            input,
            at: 2,
            value: u32::from(input[0]) << 8 | u32::from(input[1]),
            range: 255,
            shifts: 0,
        }
    }

    fn bool(&mut self, prob: u8) -> bool {
        let split = 1 + (((self.range - 1) * u32::from(prob)) >> 8);
        let bit = self.value >= split << 8;
        if bit {
            self.range -= split;
            self.value -= split << 8;
        } else {
            self.range = split;
        }
        while self.range < 128 {
            (self.value, self.range, self.shifts) =
                (self.value << 1, self.range << 1, self.shifts + 1);
            if self.shifts.is_multiple_of(8) {
                self.value |= u32::from(self.input[self.at]);
                self.at += 1;
            }
        }
        bit
    }

    fn literal(&mut self, bits: u32) -> u32 {
        (0..bits).fold(0, |value, _| value << 1 | u32::from(self.bool(128)))
    }

    /// Number of bytes that the decisions so far depend on: the bits that were shifted in, and the
    /// eight bits of the last comparison.
    fn bytes_read(&self) -> usize {
        (self.shifts + 8).div_ceil(8)
    }
}

struct Probs {
    skip_false: u8,
    intra: u8,
    last: u8,
}

/// Reads the header (section 19.2), and asserts the properties that make key frames and inter
/// frames interchangeable.
fn read_header(modes: &mut Reader, is_key: bool) -> Probs {
    if is_key {
        modes.literal(2);
    }
    assert_eq!(modes.literal(1), 0, "no segments");
    modes.literal(1);
    assert_eq!(modes.literal(6), 0, "no loop filter");
    modes.literal(3);
    assert_eq!(
        modes.literal(1 + 2),
        0,
        "no filter adjustments, one partition"
    );
    modes.literal(7);
    for _ in 0..5 {
        if modes.bool(128) {
            modes.literal(5);
        }
    }
    if !is_key {
        assert_eq!(modes.literal(8), 0, "golden and altref are left alone");
    }
    assert_eq!(modes.literal(1), 0, "probabilities last for one frame");
    assert!(is_key || modes.bool(128), "the last frame is refreshed");
    for &prob in tables::COEFF_UPDATE_PROBS
        .as_flattened()
        .as_flattened()
        .as_flattened()
    {
        assert!(!modes.bool(prob), "no token probability changes");
    }
    assert!(modes.bool(128), "macroblocks may skip coefficients");
    let skip_false = modes.literal(8) as u8;
    if is_key {
        return Probs {
            skip_false,
            intra: 0,
            last: 0,
        };
    }
    let (intra, last) = (modes.literal(8) as u8, modes.literal(8) as u8);
    modes.literal(8);
    assert_eq!(modes.literal(2), 0, "no mode probability changes");
    for &prob in tables::MV_UPDATE_PROBS.as_flattened() {
        assert!(!modes.bool(prob), "no motion vector probability changes");
    }
    Probs {
        skip_false,
        intra,
        last,
    }
}

/// Returns for each macroblock whether it has no coefficients.
fn read_modes(
    modes: &mut Reader,
    is_key: bool,
    probs: Probs,
    columns: usize,
    rows: usize,
) -> Vec<bool> {
    let mut is_inter: Vec<bool> = Vec::with_capacity(columns * rows);
    let mut skips = Vec::with_capacity(columns * rows);
    for at in 0..columns * rows {
        skips.push(modes.bool(probs.skip_false));
        is_inter.push(!is_key && modes.bool(probs.intra));
        if is_key {
            let path = tables::KEY_Y_DC_PRED
                .iter()
                .chain([&tables::KEY_UV_DC_PRED]);
            path.for_each(|&(bit, prob)| assert_eq!(modes.bool(prob), bit));
        } else if is_inter[at] {
            let weigh = |there: Option<usize>, weight: usize| {
                there.filter(|&there| is_inter[there]).map_or(0, |_| weight)
            };
            let (above, left) = (
                at.checked_sub(columns),
                at.checked_sub(1).filter(|_| at % columns > 0),
            );
            let weight =
                weigh(above, 2) + weigh(left, 2) + weigh(left.and(at.checked_sub(columns + 1)), 1);
            assert!(
                !modes.bool(probs.last) && !modes.bool(tables::ZERO_MV_PROBS[weight]),
                "a copy of the last frame"
            );
            assert!(skips[at]);
        } else {
            assert!(
                !modes.bool(tables::INTER_Y_DC_PRED.1) && !modes.bool(tables::INTER_UV_DC_PRED.1),
                "DC_PRED"
            );
        }
    }
    skips
}

/// The nine flags of an edge: one of Y2, four of luma, two of each chroma plane.
type Edge = [u8; 9];

fn read_tokens(tokens: &mut Reader, skips: &[bool], columns: usize) {
    let mut above = vec![Edge::default(); columns];
    for row in skips.chunks(columns) {
        let mut left = Edge::default();
        for (&skip, above) in row.iter().zip(&mut above) {
            if skip {
                (*above, left) = (Edge::default(), Edge::default());
                continue;
            }
            for (block_type, first, side) in [(1, 0, 1), (0, 1, 4), (2, 5, 2), (2, 7, 2)] {
                for block in 0..side * side {
                    let (across, down) = (first + block % side, first + block / side);
                    let coded =
                        read_block(tokens, block_type, usize::from(above[across] + left[down]));
                    (above[across], left[down]) = (coded, coded);
                }
            }
        }
    }
}

/// Reads the tokens of one block. Returns 1 if it holds a coefficient, else 0.
fn read_block(tokens: &mut Reader, block_type: usize, mut context: usize) -> u8 {
    let first = usize::from(block_type == 0);
    let (mut at, mut after_zero) = (first, false);
    while at < 16 {
        let probs = &tables::DEFAULT_COEFF_PROBS[block_type][tables::COEFF_BANDS[at]][context];
        if !after_zero && !tokens.bool(probs[0]) {
            break;
        }
        context = read_level(tokens, probs).min(2) as usize;
        after_zero = context == 0;
        at += 1;
    }
    assert!(!after_zero, "a block does not end with a zero");
    u8::from(at > first)
}

fn read_level(tokens: &mut Reader, probs: &[u8; 11]) -> u32 {
    if !tokens.bool(probs[1]) {
        return 0;
    }
    let size = if !tokens.bool(probs[2]) {
        1
    } else if !tokens.bool(probs[3]) {
        2 + if tokens.bool(probs[4]) {
            1 + u32::from(tokens.bool(probs[5]))
        } else {
            0
        }
    } else {
        let category = if !tokens.bool(probs[6]) {
            usize::from(tokens.bool(probs[7]))
        } else if tokens.bool(probs[8]) {
            4 + usize::from(tokens.bool(probs[10]))
        } else {
            2 + usize::from(tokens.bool(probs[9]))
        };
        let (base, extra) = tables::CATEGORIES[category];
        u32::from(base)
            + extra
                .iter()
                .fold(0, |value, &prob| value << 1 | u32::from(tokens.bool(prob)))
    };
    tokens.bool(128);
    size
}

// Sizes

#[test]
fn bitrates_hold_over_every_window() {
    let specs = [
        spec(320, 180, 15, "150k"),
        spec(320, 180, 15, "40k"),
        spec(320, 180, 1, "20k"),
        spec(320, 180, 60, "500k"),
        spec(640, 360, 20, "600k"),
        spec(855, 481, 25, "900k"),
        spec(1280, 720, 30, "1.5M"),
        spec(1280, 720, 30, "1.7M"),
        spec(1280, 720, 30, "2M"),
        spec(1280, 720, 30, "3M"),
        spec(1920, 1080, 30, "4M"),
    ];
    for spec in specs {
        let clip = generated(spec);
        let inter: Vec<usize> = (0..clip.len())
            .map(|index| clip.inter_frame(index).len())
            .collect();
        let key: Vec<usize> = (0..clip.len())
            .map(|index| clip.key_frame(index).len())
            .collect();
        let mean_bytes = spec.bitrate.bps() as f64 / 8.0 / f64::from(spec.fps);
        // Over the whole loop, which is ten seconds from any start. Shorter windows may deviate
        // more.
        for (seconds, tolerated) in [(10, 0.01), (3, 0.12), (1, 0.35)] {
            let worst = worst_window(&inter, (seconds * spec.fps) as usize, mean_bytes);
            assert!(
                worst < tolerated,
                "{spec:?}: {seconds} s windows stray by {:.2} %",
                100.0 * worst
            );
        }
        let (key_mean, key_most) = (
            key.iter().sum::<usize>() as f64 / key.len() as f64,
            *key.iter().max().unwrap(),
        );
        assert!(
            (3.0..9.0).contains(&(key_mean / mean_bytes)),
            "{spec:?}: key frames of {key_mean:.0} bytes, inter frames of {mean_bytes:.0}"
        );
        assert!((key_most as f64) < 1.25 * key_mean);
        println!(
            "{}x{}@{} {}: 10 s within {:.3} %, P {mean_bytes:.0} B, K {key_mean:.0} B",
            spec.width,
            spec.height,
            spec.fps,
            spec.bitrate,
            100.0 * worst_window(&inter, inter.len(), mean_bytes)
        );
    }
}

/// Returns the relative deviation from the mean of the worst window of `length` frames. Windows may
/// wrap around the loop.
fn worst_window(sizes: &[usize], length: usize, mean_bytes: f64) -> f64 {
    let window = |start: usize| {
        (start..start + length)
            .map(|at| sizes[at % sizes.len()])
            .sum::<usize>() as f64
    };
    (0..sizes.len())
        .map(|start| (window(start) / (length as f64 * mean_bytes) - 1.0).abs())
        .fold(0.0, f64::max)
}

#[test]
fn what_cannot_be_is_refused_with_what_can() {
    let refused = |spec: Vp8Spec| {
        VideoClip::generate(&spec, 1)
            .err()
            .unwrap_or_else(|| panic!("{spec:?} was accepted"))
    };
    let large = Vp8SpecError::TooLarge {
        width: 4097,
        height: 720,
    };
    assert_eq!(refused(spec(4097, 720, 30, "2M")), large);
    assert!(large.to_string().contains("at most 4096"));
    for (width, height) in [(0, 0), (0, 180), (320, 0), (95, 180), (320, 47)] {
        let error = refused(spec(width, height, 15, "150k"));
        assert_eq!(error, Vp8SpecError::TooSmall { width, height });
        assert!(error.to_string().contains("ask for 96x48 or more"));
    }
    for fps in [0, 61, u32::MAX] {
        assert_eq!(refused(spec(320, 180, fps, "150k")), Vp8SpecError::Fps(fps));
    }
    for spec in [
        spec(320, 180, 15, "1"),
        spec(320, 180, 15, "20k"),
        spec(640, 360, 20, "40k"),
        spec(160, 90, 60, "10k"),
    ] {
        let Vp8SpecError::BitrateTooLow { least, .. } = refused(spec) else {
            panic!("{spec:?} is not too low")
        };
        assert!(
            refused(spec)
                .to_string()
                .contains(&format!("ask for {least} or more"))
        );
        assert!(
            VideoClip::generate(
                &Vp8Spec {
                    bitrate: least,
                    ..spec
                },
                2
            )
            .is_ok(),
            "{least} was said to be enough"
        );
    }
    for spec in [
        spec(320, 180, 15, "9M"),
        spec(160, 90, 5, "1M"),
        spec(96, 48, 30, "1G"),
    ] {
        let Vp8SpecError::BitrateTooHigh { most, .. } = refused(spec) else {
            panic!("{spec:?} is not too high")
        };
        assert!(
            refused(spec)
                .to_string()
                .contains(&format!("ask for {most} or less"))
        );
        assert!(
            VideoClip::generate(
                &Vp8Spec {
                    bitrate: most,
                    ..spec
                },
                2
            )
            .is_ok(),
            "{most} was said to be possible"
        );
    }
}

#[test]
fn a_spec_is_the_same_bytes_on_any_number_of_threads_and_a_seed_is_other_content() {
    let asked = spec(320, 180, 8, "150k");
    let frames = |seed: u64, threads: usize| {
        let clip = VideoClip::generate(&Vp8Spec { seed, ..asked }, threads).unwrap();
        (0..clip.len())
            .map(|index| [clip.inter_frame(index), clip.key_frame(index)].map(<[u8]>::to_vec))
            .collect::<Vec<_>>()
    };
    let reference = frames(1, 1);
    for threads in [0, 2, 3, 200] {
        assert!(frames(1, threads) == reference, "{threads} threads");
    }
    let other = frames(2, 2);
    assert!(
        reference
            .iter()
            .zip(&other)
            .all(|(one, two)| one[0] != two[0] && one[1] != two[1])
    );
}

// The long run

#[test]
#[ignore = "ten minutes of video in three layers and two decoders: about a minute in a release build"]
fn ten_minutes_of_the_default_layers_decode_without_a_word() {
    assert!(
        has_ffmpeg(),
        "this test is asked for by name: install ffmpeg"
    );
    let started = Instant::now();
    for spec in [
        spec(320, 180, 15, "150k"),
        spec(640, 360, 20, "600k"),
        spec(1280, 720, 30, "2M"),
    ] {
        let clip = generated(spec);
        for decoder in DECODERS {
            let layer_started = Instant::now();
            let frames = 600 * spec.fps as usize;
            let (shown, stderr) = decode_stream(decoder, &clip, frames);
            assert_eq!(
                (shown, stderr.as_str()),
                (frames, ""),
                "{spec:?}, {decoder:?}"
            );
            println!(
                "{}x{}, {decoder:?}: {frames} frames in {:.1} s",
                spec.width,
                spec.height,
                layer_started.elapsed().as_secs_f64()
            );
        }
    }
    println!("all: {:.1} s", started.elapsed().as_secs_f64());
}

/// Streams `count` frames, with a key frame now and then. Returns the number of frames that the
/// decoder showed, and its output.
fn decode_stream(decoder: Decoder, clip: &VideoClip, count: usize) -> (usize, String) {
    let mut command = decoder.command("pipe:0");
    command.args(["-progress", "pipe:1", "-nostats", "-f", "null", "-"]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut random = Lcg(9);
    let frame = |turn: usize| {
        let index = turn % clip.len();
        if turn == 0 || random.below(200) == 0 {
            clip.key_frame(index)
        } else {
            clip.inter_frame(index)
        }
    };
    let (mut input, mut progress, mut errors) = (
        child.stdin.take().unwrap(),
        child.stdout.take().unwrap(),
        child.stderr.take().unwrap(),
    );
    let (mut report, mut stderr) = (String::new(), String::new());
    std::thread::scope(|scope| {
        scope.spawn(|| progress.read_to_string(&mut report).unwrap());
        scope.spawn(|| errors.read_to_string(&mut stderr).unwrap());
        write_ivf(
            &mut BufWriter::new(&mut input),
            clip.spec(),
            (0..count).map(frame),
        )
        .unwrap();
        drop(input);
    });
    child.wait().unwrap();
    let shown = report
        .lines()
        .rev()
        .find_map(|line| line.strip_prefix("frame="))
        .map_or(0, |frames| frames.trim().parse().unwrap());
    (shown, stderr)
}
