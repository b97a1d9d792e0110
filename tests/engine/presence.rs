//! Exact frame accounts of a source that ends otherwise than planned, and of a subscription that
//! the server withdraws.

use std::time::Duration;
use throng::transport::rtp::Ssrc;

use crate::common::link::Conditions;
use crate::common::pair::{AUDIO_SSRC, Pair, VIDEO_SSRC, audio, video};
use throng::engine::publisher::Pacing;
use throng::engine::{PeerKey, ShardCommand};
use throng::measure::{Media, Record};

/// Frames a second.
const AUDIO_RATE: u64 = 50;
const VIDEO_RATE: u64 = 15;
/// End of the plan, and the moment at which something else happens, in whole seconds after the
/// first frame.
const END: u64 = 15;
const MIDDLE: u64 = 6;

/// Returns the losses by cause: source, uplink, SFU, downlink, unattributed.
fn causes(media: &Media) -> [u64; 5] {
    [
        media.frames_lost_source,
        media.frames_lost_uplink,
        media.frames_lost_sfu,
        media.frames_lost_downlink,
        media.frames_lost_unattributed,
    ]
}

/// Returns the record of a subscriber of audio and video after a run in which `happens` is called
/// in the middle.
fn after(happens: impl FnOnce(&mut Pair)) -> Record {
    let mut pair = Pair::connected(3);
    pair.set_conditions(Conditions {
        delay: Duration::from_millis(20),
        ..Conditions::default()
    });
    pair.publish(&[audio(), video()], Pacing::Paced);
    // The first slot is in the next tick. All slots before the middle are sent, and the slot at the
    // middle is not.
    pair.run_for(Duration::from_secs(MIDDLE));
    happens(&mut pair);
    pair.run_for(Duration::from_secs(END - MIDDLE));
    let [_, subscriber] = pair.finish();
    subscriber
}

fn check(record: &Record, expected_seconds: u64, causes_in_seconds: [u64; 5]) {
    for (media, rate) in [(&record.audio, AUDIO_RATE), (&record.video, VIDEO_RATE)] {
        let lost = causes(media);
        assert_eq!(media.frames_expected, expected_seconds * rate, "{lost:?}");
        assert_eq!(lost, causes_in_seconds.map(|seconds| seconds * rate));
        assert_eq!(
            media.frames_expected - media.frames_delivered,
            lost.iter().sum::<u64>()
        );
    }
}

#[test]
fn a_publisher_that_is_removed_owes_every_slot_until_the_plan_ends_it() {
    let record = after(|pair| pair.shards[0].remove_peer(PeerKey(0)));
    check(&record, END, [END - MIDDLE, 0, 0, 0, 0]);
    // The stream is withdrawn, as a server does when its publisher is gone. This changes nothing.
    let record = after(|pair| {
        pair.shards[0].remove_peer(PeerKey(0));
        pair.run_for(Duration::from_millis(100));
        withdraw(pair);
    });
    let more = AUDIO_RATE / 10;
    assert_eq!(record.audio.frames_expected, END * AUDIO_RATE + more);
    let owed = (END - MIDDLE) * AUDIO_RATE + more;
    assert_eq!(causes(&record.audio), [owed, 0, 0, 0, 0]);
}

fn withdraw(pair: &mut Pair) {
    let ssrcs = vec![Ssrc(AUDIO_SSRC), Ssrc(VIDEO_SSRC)];
    let command = ShardCommand::Unsubscribe {
        key: PeerKey(0),
        ssrcs,
    };
    pair.shards[1].handle_command(command, pair.now, &mut pair.outlets[1]);
}

#[test]
fn a_track_that_the_server_takes_stops_and_stays_owed() {
    let record = after(|pair| {
        for track in [0, 1] {
            pair.command(ShardCommand::LoseTrack {
                key: PeerKey(0),
                track,
            });
        }
        // The frames are owed even if nobody can watch the track any more.
        pair.command(ShardCommand::SetLayers {
            key: PeerKey(0),
            track: 1,
            layers: 0,
        });
    });
    check(&record, END, [END - MIDDLE, 0, 0, 0, 0]);
}

#[test]
fn whom_the_plan_has_leave_or_rest_owes_nothing() {
    let record = after(|pair| {
        pair.command(ShardCommand::Leave { key: PeerKey(0) });
        pair.shards[0].remove_peer(PeerKey(0));
    });
    check(&record, MIDDLE, [0; 5]);
    let record = after(|pair| {
        for track in [0, 1] {
            pair.command(ShardCommand::SetMuted {
                key: PeerKey(0),
                track,
                muted: true,
            });
        }
        pair.shards[0].remove_peer(PeerKey(0));
    });
    check(&record, MIDDLE, [0; 5]);
    // The publisher is gone first, and leaves by plan three seconds later.
    let record = after(|pair| {
        pair.shards[0].remove_peer(PeerKey(0));
        pair.run_for(Duration::from_secs(3));
        pair.command(ShardCommand::Leave { key: PeerKey(0) });
    });
    check(&record, MIDDLE + 3, [3, 0, 0, 0, 0]);
}

#[test]
fn a_subscription_that_the_server_withdraws_is_owed_what_its_source_makes() {
    let record = after(withdraw);
    for (media, rate) in [(&record.audio, AUDIO_RATE), (&record.video, VIDEO_RATE)] {
        let [source, uplink, sfu, downlink, rest] = causes(media);
        assert_eq!(media.frames_expected, END * rate);
        // At most two frames were under way.
        assert_eq!((source, uplink, downlink), (0, 0, 0));
        assert_eq!(sfu, (END - MIDDLE) * rate);
        assert!(rest <= 2, "{rest}");
    }
}

#[test]
fn a_subscriber_that_is_thrown_out_stays_owed_and_one_that_leaves_does_not() {
    let record = after(|pair| {
        pair.shards[1].remove_peer(PeerKey(0));
        // The subscriber's socket is closed.
        pair.set_conditions(Conditions {
            loss: 1.0,
            ..Conditions::default()
        });
    });
    for (media, rate) in [(&record.audio, AUDIO_RATE), (&record.video, VIDEO_RATE)] {
        assert_eq!(media.frames_expected, END * rate);
        let missing = media.frames_expected - media.frames_delivered;
        assert_eq!(causes(media).iter().sum::<u64>(), missing);
        assert!(missing >= (END - MIDDLE) * rate);
    }
    let record = after(|pair| {
        let command = ShardCommand::Leave { key: PeerKey(0) };
        pair.shards[1].handle_command(command, pair.now, &mut pair.outlets[1]);
        pair.run_for(Duration::from_millis(100));
        pair.shards[1].remove_peer(PeerKey(0));
    });
    check(&record, MIDDLE, [0; 5]);
}
