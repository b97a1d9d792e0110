//! Tests of where frames are said to be lost: on the way to the SFU, inside it, or behind it. The
//! relay's log of dropped packets on each leg is the ground truth.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use crate::common::link::{Conditions, Random};
use crate::common::pair::{audio, video};
use crate::common::relay::{ALL, Leg, Relay};
use throng::engine::publisher::Pacing;
use throng::measure::{Kind, Media, Record};
use throng::sfu::{MediaCommand, Selection, SendMode, SubscriptionId};

const AUDIO_UP: u32 = 0x1000_0000;
const VIDEO_UP: u32 = 0x1000_0010;
const RTX_UP: u32 = VIDEO_UP + 1;

const CALM: Conditions = Conditions {
    loss: 0.0,
    duplication: 0.0,
    delay: Duration::from_millis(10),
    jitter: Duration::ZERO,
};

/// Returns the losses by cause: uplink, SFU, downlink, unattributed. No source is ever gone here.
fn causes(media: &Media) -> [u64; 4] {
    assert_eq!(media.frames_lost_source, 0);
    [
        media.frames_lost_uplink,
        media.frames_lost_sfu,
        media.frames_lost_downlink,
        media.frames_lost_unattributed,
    ]
}

fn missing(media: &Media) -> u64 {
    media.frames_expected - media.frames_delivered
}

/// A room with one publisher of audio and video and some subscribers of both. `downstream` has the
/// SSRCs on which each subscriber gets them: audio, video, RTX.
struct Room {
    relay: Relay,
    subscriptions: Vec<[SubscriptionId; 2]>,
    downstream: Vec<[Ssrc; 3]>,
}

impl Room {
    fn new(subscribers: usize, seed: u64) -> Room {
        let mut relay = Relay::connected(1 + subscribers, SendMode::Plain, false, seed);
        relay.link.conditions = CALM;
        let (audio_track, video_track) = (
            relay.publish(0, &audio(), Pacing::Paced),
            relay.publish(0, &video(), Pacing::Paced),
        );
        let (mut subscriptions, mut downstream) = (Vec::new(), Vec::new());
        for client in 1..=subscribers {
            let (of_audio, audio_ssrc, _) = relay.subscribe(client, audio_track, Kind::Audio);
            let (of_video, video_ssrc, rtx_ssrc) =
                relay.subscribe(client, video_track, Kind::Video);
            subscriptions.push([of_audio, of_video]);
            downstream.push([audio_ssrc, video_ssrc, rtx_ssrc.unwrap()]);
        }
        // The first reports give the round trips that the timing of repair depends on.
        relay.run_for(Duration::from_secs(2));
        Room {
            relay,
            subscriptions,
            downstream,
        }
    }

    fn select(&mut self, selection: Selection) {
        for subscription in self.subscriptions.iter().flatten() {
            self.relay.command(MediaCommand::SetSelection {
                subscription: *subscription,
                selection,
            });
        }
    }

    /// Runs on for some seconds without loss, so that no loss hides behind the end, and returns the
    /// records.
    fn finish(mut self) -> Vec<Record> {
        self.relay.loss = Box::new(|_, _, _| false);
        self.relay.run_for(Duration::from_secs(3));
        self.relay.finish()
    }
}

#[test]
fn what_the_uplink_loses_for_good_is_the_uplinks() {
    let mut room = Room::new(2, 1);
    // These packets never arrive, however often they are retransmitted.
    room.relay.loss = Box::new(|leg, ssrc, seq| match (leg, ssrc) {
        (Leg::Up(0), AUDIO_UP) => seq % 17 < 2,
        (Leg::Up(0), VIDEO_UP) => seq % 41 == 0,
        (Leg::Up(0), RTX_UP) => true,
        _ => false,
    });
    room.relay.run_for(Duration::from_secs(10));
    let records = room.finish();
    for record in &records[1..] {
        for media in [&record.audio, &record.video] {
            assert!(missing(media) > 15, "{}", missing(media));
            assert_eq!(causes(media), [missing(media), 0, 0, 0]);
        }
        assert!(
            record.audio.packets_lost > 0,
            "our SFU lets the uplink's holes show"
        );
    }
}

#[test]
fn what_the_downlink_loses_for_good_is_the_downlinks() {
    let mut room = Room::new(2, 2);
    let [audio_ssrc, video_ssrc, rtx_ssrc] = room.downstream[0];
    room.relay.loss = Box::new(move |leg, ssrc, seq| match leg {
        Leg::Down(1) if Ssrc(ssrc) == audio_ssrc => seq % 17 < 2,
        Leg::Down(1) if Ssrc(ssrc) == video_ssrc => seq % 41 == 0,
        Leg::Down(1) => Ssrc(ssrc) == rtx_ssrc,
        _ => false,
    });
    room.relay.run_for(Duration::from_secs(10));
    let records = room.finish();
    for media in [&records[1].audio, &records[1].video] {
        assert!(missing(media) > 15, "{}", missing(media));
        assert_eq!(causes(media), [0, 0, missing(media), 0]);
    }
    for media in [&records[2].audio, &records[2].video] {
        assert_eq!((missing(media), causes(media)), (0, [0; 4]));
    }
}

#[test]
fn what_the_sfu_drops_behind_rewritten_numbers_is_the_sfus() {
    let mut room = Room::new(2, 3);
    for pause in [40, 200, 700, 60, 1_500] {
        // The subscribers did not ask for this pause and do not know of it.
        room.select(Selection {
            enabled: false,
            ..ALL
        });
        room.relay.run_for(Duration::from_millis(pause));
        room.select(ALL);
        room.relay.run_for(Duration::from_millis(1_000));
    }
    let records = room.finish();
    for record in &records[1..] {
        for media in [&record.audio, &record.video] {
            assert!(missing(media) > 15, "{}", missing(media));
            assert_eq!(causes(media), [0, missing(media), 0, 0]);
            assert_eq!(media.packets_lost_network, 0, "no number is missing");
        }
    }
}

#[test]
fn without_loss_nothing_is_attributed_and_a_subscriber_that_is_cut_off_is_not_explained() {
    let mut room = Room::new(2, 4);
    room.relay.run_for(Duration::from_secs(2));
    // From here on nothing reaches the first subscriber, and nothing says why.
    room.relay.loss = Box::new(|leg, _, _| leg == Leg::Down(1));
    room.relay.run_for(Duration::from_secs(3));
    let records = room.relay.finish();
    let cut = &records[1].audio;
    assert!(missing(cut).abs_diff(150) <= 2, "{}", missing(cut));
    assert_eq!(causes(cut), [0, 0, 0, missing(cut)]);
    assert_eq!(
        (missing(&records[2].audio), causes(&records[2].audio)),
        (0, [0; 4])
    );
}

/// Audio packets that were sent and that arrived on each leg. A packet is a frame, and a
/// retransmission has the same number.
#[derive(Default)]
struct Truth {
    sent_up: BTreeSet<u16>,
    arrived_up: BTreeSet<u16>,
    sent_down: BTreeMap<usize, BTreeSet<u16>>,
    arrived_down: BTreeMap<usize, BTreeSet<u16>>,
}

#[test]
fn of_a_mixture_each_part_is_told_and_the_error_is_bounded() {
    let (mut worst, mut all) = (0, 0);
    for (seed, subscribers) in [(11, 1), (12, 1), (13, 3), (14, 3)] {
        let mut room = Room::new(subscribers, seed);
        let truth: Rc<RefCell<Truth>> = Rc::default();
        let (log, downstream) = (truth.clone(), room.downstream.clone());
        let mut random = Random(seed);
        // The uplink and the downlink lose more than a third each, retransmissions included.
        room.relay.loss = Box::new(move |leg, ssrc, seq| {
            let lost = random.chance(0.35);
            let mut log = log.borrow_mut();
            match leg {
                Leg::Up(0) if ssrc == AUDIO_UP => {
                    log.sent_up.insert(seq);
                    if !lost {
                        log.arrived_up.insert(seq);
                    }
                }
                Leg::Down(client) if Ssrc(ssrc) == downstream[client - 1][0] => {
                    log.sent_down.entry(client).or_default().insert(seq);
                    if !lost {
                        log.arrived_down.entry(client).or_default().insert(seq);
                    }
                }
                _ => return false,
            }
            lost
        });
        for _ in 0..20 {
            room.relay.run_for(Duration::from_secs(1));
            room.select(Selection {
                enabled: false,
                ..ALL
            });
            room.relay.run_for(Duration::from_millis(100));
            room.select(ALL);
        }
        let records = room.finish();
        let truth = truth.borrow();
        let uplink = (truth.sent_up.len() - truth.arrived_up.len()) as u64;
        for (client, record) in records.iter().enumerate().skip(1) {
            let downlink =
                (truth.sent_down[&client].len() - truth.arrived_down[&client].len()) as u64;
            let sfu = missing(&record.audio).saturating_sub(uplink + downlink);
            let found = causes(&record.audio);
            assert_eq!(
                found.iter().sum::<u64>(),
                missing(&record.audio),
                "every loss has one cause"
            );
            println!(
                "seed {seed}, client {client}: up {uplink} sfu {sfu} down {downlink}, found {found:?}"
            );
            assert!(
                uplink > 100 && sfu > 50 && downlink > 0,
                "{uplink} {sfu} {downlink}"
            );
            // A frame may be lost twice on its way up and then arrive just when the SFU forwards
            // nothing. Nobody has received it, so it counts as lost on the uplink.
            let error = [uplink, sfu, downlink]
                .iter()
                .zip(found)
                .map(|(truth, found)| truth.abs_diff(found))
                .sum::<u64>()
                / 2
                + found[3];
            worst = worst.max(error * 1_000 / missing(&record.audio));
            all += missing(&record.audio);
        }
    }
    println!(
        "at worst {worst} of 1,000 losses of one subscriber are told wrong; {all} losses in all"
    );
    assert!(worst <= 60, "{worst}");
}
