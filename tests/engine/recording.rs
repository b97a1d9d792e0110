//! Compares what one end of a link recorded with what it counted and with the identity in every
//! frame.

use crate::common::pair;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use crate::common::link::Conditions;
use crate::common::pair::{Pair, audio, video};
use crate::common::recorded::{Picture, has_ffmpeg, only_file, play, read_ivf, read_opus};
use throng::cli::{CliCommand, parse_with};
use throng::codec::Codec;
use throng::engine::publisher::Pacing;
use throng::measure::Record;
use throng::plan::Plan;
use throng::recording::{Recording, TappedPacket};
use throng::units::Time;

/// Returns a plan with one publisher of audio and video and one subscriber, like the ends of the
/// pair.
fn plan() -> Plan {
    let line = "throng --url ws://127.0.0.1:1 --api-key k --api-secret s --room a/room --publishers 1 --video-publishers 1 --subscribers 1";
    let args = line.split(' ').map(Into::into);
    match parse_with(args, &|_| None, 1, u64::from(pair::RUN) << 32) {
        Ok(CliCommand::Run(run)) => run.plan,
        other => panic!("{other:?}"),
    }
}

struct Recorded {
    dir: PathBuf,
    notes: Vec<String>,
    received: Record,
}

impl Drop for Recorded {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Recorded {
    fn file(&self, ending: &str) -> PathBuf {
        only_file(&self.dir.join("a_room"), ending)
    }

    /// Returns the number in the note that says how many `what` were dropped.
    fn dropped(&self, what: &str) -> u64 {
        let counts = self.notes.iter().filter_map(|note| {
            let (count, rest) = note.strip_prefix("recording dropped ")?.split_once(' ')?;
            rest.starts_with(what)
                .then(|| count.parse::<u64>().unwrap())
        });
        counts.sum()
    }
}

/// Records ten seconds of audio and video at the far end of a link.
fn record(name: &str, seed: u64, conditions: Conditions) -> Recorded {
    let dir = std::env::temp_dir().join(format!("throng-recording-{}-{name}", std::process::id()));
    let (mut recording, mut taps) = Recording::new(dir.clone(), &plan());
    let mut pair = Pair::connected(seed);
    let (participant, tap) = taps.remove(0);
    assert_eq!(participant.index, 1, "the one who only subscribes");
    pair.record(tap);
    pair.set_conditions(conditions);
    pair.publish(&[audio(), video()], Pacing::Paced);
    for _ in 0..100 {
        pair.run_for(Duration::from_millis(100));
        assert!(recording.drain());
    }
    let [_, received] = pair.finish();
    assert!(!recording.drain(), "the tap ends with its shard");
    let notes = recording.finish();
    Recorded {
        dir,
        notes,
        received,
    }
}

/// Asserts that each frame is a key frame or directly follows the frame before it, and that its
/// timestamp fits its frame number.
fn assert_decodable(pictures: &[Picture]) {
    let first = pictures[0].identity().frame;
    assert!(pictures[0].is_key());
    for pair in pictures.windows(2) {
        let [before, after] = [0, 1].map(|at| pair[at].identity().frame);
        assert!(
            after == before + 1 || (after > before && pair[1].is_key()),
            "{after} after {before}"
        );
    }
    for picture in pictures {
        // 15 frames a second.
        assert_eq!(
            picture.timestamp,
            u64::from(picture.identity().frame - first) * 6_000
        );
    }
}

fn assert_in_time(path: &Path) -> u64 {
    let (sounds, samples, granule) = read_opus(path);
    let frame = |at: usize| u64::from(sounds[at].identity.expect("our own packet").frame);
    for (at, sound) in sounds.iter().enumerate() {
        assert_eq!(sound.position, (frame(at) - frame(0)) * 960);
    }
    let spanned = (frame(sounds.len() - 1) - frame(0) + 1) * 960;
    assert_eq!((samples, granule), (spanned, spanned));
    sounds.len() as u64
}

#[test]
fn without_loss_every_frame_is_in_its_file() {
    let recorded = record("clean", 1, Conditions::default());
    let video = recorded.file("throng-0000004d-0-video.ivf");
    let (stated, pictures) = read_ivf(&video);
    assert_decodable(&pictures);
    assert_eq!(
        (stated as u64, pictures.len() as u64),
        (
            recorded.received.video.frames_delivered,
            recorded.received.video.frames_delivered
        )
    );
    let audio = recorded.file("throng-0000004d-0-audio.ogg");
    assert_eq!(
        assert_in_time(&audio),
        recorded.received.audio.frames_delivered
    );
    let notes = format!(
        "recorded {} frames of video and {} packets of audio in 2 files below {}",
        pictures.len(),
        recorded.received.audio.frames_delivered,
        recorded.dir.display()
    );
    assert_eq!(recorded.notes, [notes]);
}

#[test]
fn what_was_lost_is_a_hole_and_nothing_undecodable_is_kept() {
    for (seed, loss, jitter) in [(2, 0.05, 5), (3, 0.3, 40), (4, 0.45, 5)] {
        let recorded = record(
            &format!("lossy-{seed}"),
            seed,
            Conditions {
                loss,
                duplication: 0.01,
                delay: Duration::from_millis(20),
                jitter: Duration::from_millis(jitter),
            },
        );
        let (video, audio) = (recorded.file(".ivf"), recorded.file(".ogg"));
        let (stated, pictures) = read_ivf(&video);
        assert_eq!(stated, pictures.len());
        assert_decodable(&pictures);
        let left_out = recorded.dropped("whole frames of video");
        assert_eq!(
            pictures.len() as u64 + left_out,
            recorded.received.video.frames_delivered,
            "seed {seed}"
        );
        assert!(
            loss < 0.4 || left_out > 0,
            "at such a loss some frames are whole and useless"
        );
        let sounds = assert_in_time(&audio);
        let late = recorded.dropped("packets of audio");
        assert_eq!(
            sounds + late,
            recorded.received.audio.frames_delivered,
            "seed {seed}"
        );
        if has_ffmpeg() {
            let picture = 320 * 180 * 3 / 2;
            assert_eq!(play(&video), [pictures.len() * picture; 2], "seed {seed}");
            let (_, samples, _) = read_opus(&audio);
            // Two channels of 16 bits, without the delay of the codec itself.
            assert_eq!(
                play(&audio),
                [(samples as usize - 312) * 4; 2],
                "seed {seed}"
            );
        }
    }
}

#[test]
fn a_participant_who_comes_back_on_another_connection_gets_files_of_its_own() {
    let dir = std::env::temp_dir().join(format!("throng-recording-{}-again", std::process::id()));
    let (mut recording, mut taps) = Recording::new(dir.clone(), &plan());
    let (_, mut tap) = taps.remove(0);
    let opus = [31 << 3, 1, 2, 3];
    for connection in 0..2u32 {
        tap.begin_connection();
        // Both connections have the same stream number and the same sequence numbers.
        for at in 0..10 + connection {
            let packet = TappedPacket {
                stream: 0,
                ssrc: Ssrc(5 + connection),
                codec: Codec::Opus,
                ext_seq: 70_000 + u64::from(at),
                rtp_time: at * 960,
                marker: false,
                arrival: Time::from_millis(u64::from(at) * 20),
            };
            tap.take(&packet, &opus);
        }
    }
    drop(tap);
    assert!(!recording.drain());
    recording.finish();
    for (name, packets) in [("ssrc-5-audio.ogg", 10), ("ssrc-6-audio.ogg", 11)] {
        assert_eq!(
            read_opus(&dir.join("a_room").join(name)).0.len(),
            packets,
            "{name}"
        );
    }
    fs::remove_dir_all(dir).unwrap();
}
