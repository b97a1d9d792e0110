//! Fuzz targets on stable Rust. Each test replays a target's seeds and corpus (`fixtures/fuzz`),
//! and a fixed number of mutations of them, which are the same every time. The corpora include what
//! the fuzzers of `fuzz/` once found. `FUZZ_MUTATIONS=1000` in the environment multiplies the
//! number of mutations by 1,000. `FUZZ_SEEDS=folder` writes the seeds to that folder, for a fuzzer
//! to begin with.

use std::path::{Path, PathBuf};

use crate::common::counting::{HELD, HELD_MAX};
use crate::targets::{self, Target};
use throng::seeded::Seeded;

/// Maximum length of a mutated input.
const INPUT_BYTES_MAX: usize = 16 << 10;
/// Maximum size of all corpora together.
const CORPORA_BYTES_MAX: u64 = 300 << 10;

macro_rules! replayed {
    ($($test:ident: $target:literal),+ $(,)?) => {
        $(#[test]
        fn $test() {
            replay(targets::named($target));
        })+

        #[test]
        fn every_target_is_replayed() {
            let replayed = [$($target),+];
            assert_eq!(targets::ALL.iter().map(|target| target.name).collect::<Vec<_>>(), replayed);
        }
    };
}

replayed! {
    stun_of_anybody: "stun",
    damaged_dtls_handshakes: "dtls",
    any_rtp_packet: "rtp",
    any_rtcp_compound: "rtcp",
    forged_and_truncated_srtp: "srtp",
    offers_of_a_server: "sdp_answer",
    answers_of_a_server: "sdp_offer",
    descriptions_of_a_client: "sdp_serve",
    what_a_server_may_say: "signal",
    tokens_and_join_requests_of_strangers: "access",
    frame_identities: "identity",
    redundant_audio: "red",
    vp8_descriptors: "vp8",
    vp8_packets_in_any_order: "assembler",
    received_streams: "receive",
    an_engine_shard_and_a_lying_server: "shard",
    a_router_and_lying_clients: "router",
    a_lobby_and_lying_clients: "lobby",
    pages_of_a_server: "server_page",
    what_a_relay_may_say: "relay",
}

fn replay(target: &'static Target) {
    let mut inputs = (target.seeds)();
    if let Some(folder) = std::env::var_os("FUZZ_SEEDS") {
        let folder = Path::new(&folder).join(target.name);
        std::fs::create_dir_all(&folder).unwrap();
        for (number, seed) in inputs.iter().enumerate() {
            std::fs::write(folder.join(format!("seed-{number:02}")), seed).unwrap();
        }
    }
    for file in corpus(target) {
        inputs.push(std::fs::read(&file).unwrap());
    }
    inputs.push(Vec::new());
    for input in &inputs {
        run(target, input);
    }
    let factor: usize = std::env::var("FUZZ_MUTATIONS").map_or(1, |factor| {
        factor.parse().expect("FUZZ_MUTATIONS is a number")
    });
    let mut chance = Seeded::new(1);
    for _ in 0..target.mutations * factor {
        let input = mutated(&inputs, &mut chance);
        run(target, &input);
    }
}

fn corpus(target: &Target) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures/fuzz")
        .join(target.name);
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .map(|file| file.unwrap().path())
        .collect();
    files.sort();
    files
}

/// Runs a target on an input. If the target fails, the input is written to a file that the fuzzer
/// takes.
fn run(target: &Target, input: &[u8]) {
    struct Reproducer<'a>(&'a Target, &'a [u8]);
    impl Drop for Reproducer<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                let path =
                    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("hostile-{}", self.0.name));
                let written = std::fs::write(&path, self.1);
                eprintln!(
                    "target '{}', input in {} ({written:?})",
                    self.0.name,
                    path.display()
                );
            }
        }
    }
    let _reproducer = Reproducer(target, input);
    HELD.set(0);
    HELD_MAX.set(0);
    (target.run)(input);
    if let Some((base, factor)) = target.memory {
        let (held, limit) = (HELD_MAX.get(), base + factor * input.len());
        assert!(
            held <= limit as i64,
            "{held} bytes held for an input of {}, where {limit} are allowed",
            input.len()
        );
    }
}

/// Returns one of the inputs, changed in a few places: changed bits and bytes, numbers at their
/// limits, and pieces that are removed, repeated, or taken from another input.
fn mutated(inputs: &[Vec<u8>], chance: &mut Seeded) -> Vec<u8> {
    let pick = |chance: &mut Seeded| &inputs[chance.below(inputs.len() as u64) as usize];
    let mut input = pick(chance).clone();
    for _ in 0..=chance.below(4) {
        let at = chance.below(input.len() as u64 + 1) as usize;
        let len = (chance.below(16) as usize).min(input.len() - at);
        match chance.below(7) {
            0 if at < input.len() => input[at] ^= 1 << chance.below(8),
            1 if at < input.len() => input[at] = chance.draw() as u8,
            2 if at + 2 <= input.len() => {
                let limit = [0u16, 1, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF]
                    [chance.below(9) as usize];
                input[at..at + 2].copy_from_slice(&limit.to_be_bytes());
            }
            3 => drop(input.drain(at..at + len)),
            4 => {
                let piece = input[at..at + len].to_vec();
                for _ in 0..=chance.below(8) {
                    input.splice(at..at, piece.iter().copied());
                }
            }
            5 => {
                let other = pick(chance);
                let from = chance.below(other.len() as u64 + 1) as usize;
                let piece = &other[from..(from + 64).min(other.len())];
                input.splice(at..at, piece.iter().copied());
            }
            _ => input.truncate(at),
        }
    }
    input.truncate(INPUT_BYTES_MAX);
    input
}

/// Two bytes encode an empty entry of a list. In memory, the entry takes up to a few hundred bytes,
/// so a message of 16 MB would take a gigabyte.
#[test]
fn lists_of_nothing_are_not_decoded_however_long_they_are() {
    // Field numbers of the lists: ICE servers of Join and Reconnect, codecs of TrackPublished,
    // regions of Leave, speakers, qualities, and the mids of an offer.
    for path in [
        &[1u32, 5][..],
        &[19, 1],
        &[6, 2, 16],
        &[8, 4, 1],
        &[10, 1],
        &[14, 3],
        &[3, 4],
    ] {
        let (list, wraps) = path.split_last().expect("a list");
        let mut message = field(*list, &[]).repeat(5 << 20);
        for number in wraps.iter().rev() {
            message = field(*number, &message);
        }
        let message = bytes::Bytes::from(message);
        HELD.set(0);
        HELD_MAX.set(0);
        let event = targets::ours(|| throng::signal::client::SignalEvent::decode(&message));
        assert!(
            matches!(event, throng::signal::client::SignalEvent::Malformed { .. }),
            "{path:?}"
        );
        // At most one copy is held, in a vector that grew.
        assert!(
            HELD_MAX.get() < 3 * message.len() as i64,
            "{path:?}: {} bytes",
            HELD_MAX.get()
        );
    }
}

/// A length-delimited field of a protobuf message.
fn field(number: u32, body: &[u8]) -> Vec<u8> {
    let mut field = Vec::new();
    prost::encoding::encode_varint(u64::from(number << 3 | 2), &mut field);
    prost::encoding::encode_varint(body.len() as u64, &mut field);
    field.extend_from_slice(body);
    field
}

#[test]
fn corpora_stay_small() {
    let files = targets::ALL.iter().flat_map(corpus);
    let bytes: u64 = files.map(|file| file.metadata().unwrap().len()).sum();
    assert!(bytes <= CORPORA_BYTES_MAX, "{bytes} bytes");
}
