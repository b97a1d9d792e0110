//! Tests of what the playout model and the E-model say about links with known conditions. Each
//! figure moves with its cause, and stands still without it.

use std::time::Duration;

use crate::common::link::Conditions;
use crate::common::pair::{Pair, audio, video};
use throng::engine::publisher::Pacing;
use throng::measure::Record;

const CALM: Conditions = Conditions {
    loss: 0.0,
    duplication: 0.0,
    delay: Duration::from_millis(20),
    jitter: Duration::ZERO,
};

/// Runs audio and video for one calm second and then for ten seconds under `conditions`. Returns
/// the receiver's record.
fn heard(conditions: Conditions, seed: u64) -> Record {
    let mut pair = Pair::connected(seed);
    pair.set_conditions(CALM);
    pair.publish(&[audio(), video()], Pacing::Burst);
    pair.run_for(Duration::from_secs(1));
    pair.set_conditions(conditions);
    pair.run_for(Duration::from_secs(10));
    pair.set_conditions(CALM);
    let [_, receiver] = pair.finish();
    receiver
}

fn concealed_share(record: &Record) -> f64 {
    let (played, concealed) = (record.audio.played_us, record.audio.concealed_us);
    concealed as f64 / (played + concealed) as f64
}

fn mos(record: &Record) -> f64 {
    assert_eq!(record.audio.mos.count(), 1);
    record.audio.mos.low_quantile(0.01).unwrap() as f64 / 1e3
}

#[test]
fn on_a_calm_link_everything_is_played_and_little_is_held_back() {
    let record = heard(CALM, 1);
    assert_eq!(
        record.audio.played_us,
        record.audio.frames_expected * 20_000
    );
    assert_eq!((record.audio.concealed_us, record.audio.freezes), (0, 0));
    assert_eq!(
        record.audio.frames_late_for_playout + record.video.frames_late_for_playout,
        0
    );
    assert_eq!(
        record.audio.playout_delay.count(),
        record.audio.frames_delivered
    );
    assert_eq!(
        record.video.playout_delay.count(),
        record.video.frames_delivered
    );
    assert!(
        record.audio.playout_delay.quantile(0.5).unwrap() <= 20_100,
        "one class"
    );
    assert!(mos(&record) > 4.4, "{}", mos(&record));
    assert_eq!((record.video.played_us, record.video.mos.count()), (0, 0));
}

#[test]
fn delay_alone_lowers_the_score_and_nothing_else() {
    let at = |millis| {
        let conditions = Conditions {
            delay: Duration::from_millis(millis),
            ..CALM
        };
        let mut pair = Pair::connected(2);
        pair.set_conditions(conditions);
        pair.publish(&[audio()], Pacing::Burst);
        pair.run_for(Duration::from_secs(6));
        let [_, receiver] = pair.finish();
        assert_eq!(
            (receiver.audio.concealed_us, receiver.audio.freezes),
            (0, 0),
            "{millis} ms"
        );
        mos(&receiver)
    };
    let [near, far, moon] = [20, 200, 500].map(at);
    assert!(
        near > 4.4 && (3.9..4.3).contains(&far) && moon < 3.2,
        "{near} {far} {moon}"
    );
}

#[test]
fn jitter_is_waited_for_and_an_outage_is_one_interruption() {
    let record = heard(
        Conditions {
            jitter: Duration::from_millis(90),
            ..CALM
        },
        3,
    );
    let held_back = record.audio.playout_delay.quantile(0.5).unwrap();
    assert!((30_000..=100_000).contains(&held_back), "{held_back}");
    assert!(
        concealed_share(&record) < 0.05,
        "{}",
        concealed_share(&record)
    );
    assert_eq!(record.audio.frames_delivered, record.audio.frames_expected);
    let mut pair = Pair::connected(3);
    pair.set_conditions(CALM);
    pair.publish(&[audio()], Pacing::Burst);
    pair.run_for(Duration::from_secs(3));
    pair.set_conditions(Conditions { loss: 1.0, ..CALM });
    pair.run_for(Duration::from_millis(500));
    // Packets that are retransmitted now come too late.
    pair.set_conditions(CALM);
    pair.run_for(Duration::from_secs(3));
    let [_, receiver] = pair.finish();
    let audio = &receiver.audio;
    assert_eq!((audio.freezes, audio.freeze.count()), (1, 1));
    let length = audio.freeze.max().unwrap();
    assert!((400_000..=520_000).contains(&length), "{length}");
    assert!(
        audio.concealed_us.abs_diff(length) < 40_000,
        "{} {length}",
        audio.concealed_us
    );
}

#[test]
fn what_is_repaired_too_late_is_delivered_and_concealed_all_the_same() {
    // With a round trip of 600 ms, retransmissions arrive far later than the delay that NetEq would
    // hold for 2 % of loss.
    let record = heard(
        Conditions {
            loss: 0.02,
            delay: Duration::from_millis(300),
            ..CALM
        },
        4,
    );
    let audio = &record.audio;
    let missing = audio.frames_expected - audio.frames_delivered;
    assert!(
        audio.frames_late_for_playout > 3,
        "{}",
        audio.frames_late_for_playout
    );
    assert_eq!(
        audio.played_us + audio.frames_late_for_playout * 20_000 + missing * 20_000,
        audio.frames_expected * 20_000
    );
    assert!(audio.concealed_us >= (audio.frames_late_for_playout + missing) * 20_000);
    assert!(record.video.frames_late_for_playout > 0);
}

#[test]
fn the_score_falls_with_what_is_concealed() {
    let at = |loss| {
        let record = heard(
            Conditions {
                loss,
                delay: Duration::from_millis(150),
                ..CALM
            },
            5,
        );
        (concealed_share(&record), mos(&record))
    };
    let scores: Vec<(f64, f64)> = [0.0, 0.05, 0.3].into_iter().map(at).collect();
    assert!(
        scores.is_sorted_by(|a, b| a.0 < b.0 && a.1 > b.1),
        "{scores:?}"
    );
    assert!(scores[2].1 < 3.0, "{scores:?}");
}
