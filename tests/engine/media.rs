//! Tests of media between two of our own shards. The log of the link is the ground truth for every
//! count.

use crate::common::link;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use crate::common::link::Conditions;
use crate::common::pair::{
    AUDIO_SSRC, Pair, VIDEO_RTX_SSRC, VIDEO_SSRC, audio, ssrc_and_seq, video,
};
use throng::engine::publisher::Pacing;
use throng::measure::Media;

/// The link's log of one SSRC: the sequence numbers that were sent, and how often each one arrived.
#[derive(Default)]
struct Truth {
    sent: Vec<u16>,
    arrived: BTreeMap<u16, u32>,
}

type Truths = Rc<RefCell<BTreeMap<u32, Truth>>>;

fn observe(pair: &mut Pair) -> Truths {
    let truths = Truths::default();
    let sent = truths.clone();
    pair.on_sent = Box::new(move |datagram| {
        let (ssrc, seq) = ssrc_and_seq(&datagram.bytes).unwrap();
        sent.borrow_mut().entry(ssrc).or_default().sent.push(seq);
    });
    let arrived = truths.clone();
    pair.on_arrived = Box::new(move |datagram| {
        let (ssrc, seq) = ssrc_and_seq(&datagram.bytes).unwrap();
        *arrived
            .borrow_mut()
            .entry(ssrc)
            .or_default()
            .arrived
            .entry(seq)
            .or_default() += 1;
    });
    truths
}

const LOSSY: Conditions = Conditions {
    loss: 0.05,
    duplication: 0.01,
    delay: Duration::from_millis(20),
    jitter: Duration::from_millis(5),
};

#[test]
fn without_loss_every_frame_arrives_once_and_nothing_is_asked_for() {
    let mut pair = Pair::connected(1);
    pair.set_conditions(Conditions {
        delay: Duration::from_millis(20),
        ..Conditions::default()
    });
    pair.publish(&[audio(), video()], Pacing::Paced);
    pair.run_for(Duration::from_secs(10));
    let [sender, receiver] = pair.finish();
    for (sent, received, frames) in [
        (&sender.audio, &receiver.audio, 500),
        (&sender.video, &receiver.video, 150),
    ] {
        assert!(
            sent.frames_sent.abs_diff(frames) <= 1,
            "{}",
            sent.frames_sent
        );
        assert_eq!(received.frames_expected, sent.frames_sent);
        assert_eq!(received.frames_delivered, sent.frames_sent);
        assert_eq!(
            (received.packets_received, received.bytes_received),
            (sent.packets_sent, sent.bytes_sent)
        );
        assert_eq!(
            received.packets_lost_network
                + received.packets_lost
                + received.frames_duplicate
                + received.frames_late
                + received.freezes,
            0
        );
        assert_eq!((received.tracks_live, received.first_frame.count()), (1, 1));
        assert_eq!(sent.rtx_sent, 0);
    }
    assert_eq!(receiver.session.nacks_sent, 0);
    assert_eq!(
        receiver.session.frames_misrouted + receiver.session.packets_rejected,
        0
    );
    // A frame is sent at the tick of its slot, so at most 1 ms after the intended moment. It is
    // under way for 20 ms.
    let latency = &receiver.audio.one_way_latency;
    assert!(
        latency.min().unwrap() >= 20_000 && latency.max().unwrap() <= 21_050,
        "{:?} {:?}",
        latency.min(),
        latency.max()
    );
}

#[test]
fn at_5_percent_loss_each_count_equals_the_links_log_and_all_is_repaired() {
    for seed in 1..=5 {
        let mut pair = Pair::connected(seed);
        pair.set_conditions(LOSSY);
        let truths = observe(&mut pair);
        pair.publish(&[audio(), video()], Pacing::Paced);
        pair.run_for(Duration::from_secs(20));
        let [sender, receiver] = pair.finish();
        let truths = truths.borrow();
        compare_video(
            &truths[&VIDEO_SSRC],
            truths.get(&VIDEO_RTX_SSRC),
            &sender.video,
            &receiver.video,
            seed,
        );
        compare_audio(&truths[&AUDIO_SSRC], &sender.audio, &receiver.audio, seed);
        assert!(receiver.session.nacks_sent > 0 && sender.session.nacks_received > 0);
        assert!(
            receiver.video.loss_to_repair.count() > 0 && receiver.audio.loss_to_repair.count() > 0
        );
        // One way takes 20 to 25 ms, so neither a round trip nor a repair can take less than 40 ms.
        let rtt = &sender.session.rtt_rtcp;
        assert!(
            (40_000..=51_000).contains(&rtt.quantile(0.5).unwrap()),
            "{:?}",
            rtt.quantile(0.5)
        );
        assert!(
            receiver.session.rtt_rtcp.count() > 0,
            "a pure receiver learns its round trip from XR"
        );
        assert!((40_000..=51_000).contains(&receiver.session.rtt_rtcp.quantile(0.5).unwrap()));
    }
}

fn compare_video(media: &Truth, rtx: Option<&Truth>, sent: &Media, received: &Media, seed: u64) {
    let originals: BTreeSet<u16> = media.arrived.keys().copied().collect();
    let highest = media
        .sent
        .iter()
        .rposition(|seq| originals.contains(seq))
        .unwrap();
    let lowest = media
        .sent
        .iter()
        .position(|seq| originals.contains(seq))
        .unwrap();
    let lost = media.sent[lowest..=highest]
        .iter()
        .filter(|seq| !originals.contains(seq))
        .count() as u64;
    assert_eq!(sent.packets_sent, media.sent.len() as u64, "seed {seed}");
    assert_eq!(
        received.packets_received,
        originals.len() as u64,
        "seed {seed}"
    );
    assert_eq!(received.packets_lost_network, lost, "seed {seed}");
    assert_eq!(
        received.packets_repaired + received.packets_lost,
        lost,
        "seed {seed}"
    );
    assert_eq!(
        sent.rtx_sent,
        rtx.map_or(0, |rtx| rtx.sent.len() as u64),
        "seed {seed}"
    );
    assert_eq!(
        received.rtx_received,
        rtx.map_or(0, |rtx| rtx.arrived.len() as u64),
        "seed {seed}"
    );
    assert_eq!(
        received.packets_lost, 0,
        "seed {seed}: repair has ten tries"
    );
    assert_eq!(
        received.frames_delivered, received.frames_expected,
        "seed {seed}"
    );
    assert_eq!(received.frames_duplicate, 0, "seed {seed}");
}

/// Compares audio with the log. Audio has no RTX stream, so a retransmission has the same SSRC and
/// number again.
fn compare_audio(media: &Truth, sent: &Media, received: &Media, seed: u64) {
    let first_sendings: BTreeSet<u16> = media.sent.iter().copied().collect();
    assert_eq!(
        sent.packets_sent,
        first_sendings.len() as u64,
        "seed {seed}"
    );
    assert_eq!(
        sent.rtx_sent,
        (media.sent.len() - first_sendings.len()) as u64,
        "seed {seed}"
    );
    assert_eq!(
        received.packets_received + received.packets_repaired,
        media.arrived.len() as u64,
        "seed {seed}"
    );
    assert_eq!(
        received.frames_delivered,
        media.arrived.len() as u64,
        "seed {seed}"
    );
    assert!(
        received.packets_repaired > 0 && received.packets_lost == 0,
        "seed {seed}"
    );
}

#[test]
fn a_pli_brings_a_key_frame_at_the_next_frame() {
    let mut pair = Pair::connected(3);
    pair.publish(&[video()], Pacing::Burst);
    // So much is lost that repair sometimes gives up, and the receiver has to ask for key frames.
    pair.run_for(Duration::from_secs(2));
    pair.set_conditions(Conditions {
        loss: 0.6,
        delay: Duration::from_millis(5),
        ..Conditions::default()
    });
    pair.run_for(Duration::from_secs(5));
    pair.set_conditions(Conditions {
        delay: Duration::from_millis(5),
        ..Conditions::default()
    });
    pair.run_for(Duration::from_secs(5));
    let [sender, receiver] = pair.finish();
    assert!(receiver.session.plis_sent > 0 && sender.session.plis_received > 0);
    let answered = &sender.video.pli_received_to_key_sent;
    assert!(answered.count() > 0 && answered.count() < sender.video.key_frames_sent);
    // 15 frames a second: the next frame is at most 66.7 ms away, and leaves in its tick.
    assert!(answered.max().unwrap() <= 67_700, "{:?}", answered.max());
    assert!(receiver.video.pli_sent_to_key_received.count() > 0);
    assert!(
        receiver.video.freezes > 0,
        "a picture that waits for a key frame is frozen"
    );
}

#[test]
fn paced_frames_are_spread_and_burst_frames_are_not() {
    let spread = |pacing| {
        let mut pair = Pair::connected(4);
        pair.publish(&[video()], pacing);
        pair.run_for(Duration::from_secs(5));
        let [sender, receiver] = pair.finish();
        assert_eq!(receiver.video.frames_delivered, sender.video.frames_sent);
        receiver.video.one_way_latency.quantile(0.5).unwrap()
    };
    // 400 kb/s at 15 fps is 3.3 KB a frame. At 2.5 times that rate, the last packet of a frame
    // leaves 15 to 25 ms after the first.
    let (paced, burst) = (spread(Pacing::Paced), spread(Pacing::Burst));
    assert!(burst <= 1_100, "{burst}");
    assert!((8_000..=30_000).contains(&paced), "{paced}");
}

#[test]
fn two_runs_of_one_seed_are_identical_and_two_seeds_are_not() {
    let run = |seed| {
        let mut pair = Pair::connected(seed);
        // Set-up has random keys. With a new link, the random choices from here on depend on the
        // media alone.
        pair.link = link::Link::new(LOSSY, seed);
        pair.now = throng::units::Time::from_millis(pair.now.as_millis().next_multiple_of(1_000));
        pair.publish(&[audio(), video()], Pacing::Paced);
        pair.run_for(Duration::from_secs(3));
        let [sender, receiver] = pair.finish();
        (
            sender.video.packets_sent,
            receiver.audio.packets_received,
            receiver.video.packets_lost_network,
        )
    };
    assert_eq!(run(11), run(11));
    assert_ne!(run(11), run(12));
}
