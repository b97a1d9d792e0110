//! Tests of audio with redundancy (RED), over links whose log is the ground truth, and through the
//! embedded SFU.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use throng::codec::{Codec, PayloadTypes};
use throng::engine::publisher::{Pacing, Redundancy, SendParameters};
use throng::measure::Kind;
use throng::sfu::SendMode;

use crate::common::link::Conditions;
use crate::common::pair::{AUDIO_SSRC, Pair, audio, ssrc_and_seq};
use crate::common::relay::Relay;

const RED: u8 = 63;

const fn repeating(distance: u8) -> Option<Redundancy> {
    Some(Redundancy {
        payload_type: RED,
        distance,
    })
}

fn publish(pair: &mut Pair, distance: u8) {
    pair.publish_tracks(vec![SendParameters {
        redundancy: repeating(distance),
        ..pair.track(&audio(), 0, Pacing::Paced)
    }]);
}

/// The link's log of the audio: the sequence numbers that were sent, and those that arrived.
#[derive(Default)]
struct Log {
    sent: Vec<u16>,
    arrived: BTreeSet<u16>,
}

fn observe(pair: &mut Pair) -> Rc<RefCell<Log>> {
    let log = Rc::<RefCell<Log>>::default();
    let (sent, arrived) = (log.clone(), log.clone());
    let of_audio = |bytes: &[u8]| {
        ssrc_and_seq(bytes)
            .filter(|(ssrc, _)| *ssrc == AUDIO_SSRC)
            .map(|(_, seq)| seq)
    };
    pair.on_sent = Box::new(move |datagram| {
        sent.borrow_mut().sent.extend(of_audio(&datagram.bytes));
    });
    pair.on_arrived = Box::new(move |datagram| {
        arrived
            .borrow_mut()
            .arrived
            .extend(of_audio(&datagram.bytes));
    });
    log
}

#[test]
fn loss_before_and_after_redundancy_is_that_of_the_links_log() {
    for (distance, loss, seed) in [(1, 0.05, 1), (1, 0.3, 2), (2, 0.1, 3), (2, 0.3, 4)] {
        let mut pair = Pair::connected(seed);
        pair.nacks = false;
        pair.set_conditions(Conditions {
            loss,
            delay: Duration::from_millis(20),
            ..Conditions::default()
        });
        let log = observe(&mut pair);
        publish(&mut pair, distance);
        pair.run_for(Duration::from_secs(20));
        let [sender, receiver] = pair.finish();
        let Log { sent, arrived } = &*log.borrow();
        let first = sent.iter().position(|seq| arrived.contains(seq)).unwrap();
        let last = sent.iter().rposition(|seq| arrived.contains(seq)).unwrap();
        let expected = &sent[first..];
        let came = |at: usize| arrived.contains(&sent[at]);
        let lost = (first..=last).filter(|at| !came(*at)).count() as u64;
        // The next packets repeat a lost packet, unless they are lost, too.
        let recoverable = |at: &usize| {
            !came(*at)
                && (1..=usize::from(distance)).any(|ahead| at + ahead <= last && came(at + ahead))
        };
        let recovered = (first..=last).filter(recoverable).count() as u64;
        assert!(
            lost > 20 && recovered > 20 && recovered < lost,
            "{lost} {recovered}"
        );
        let audio = &receiver.audio;
        assert_eq!(sender.audio.frames_sent, sent.len() as u64);
        assert_eq!(audio.packets_received, arrived.len() as u64);
        assert_eq!(audio.packets_received_red, audio.packets_received);
        assert_eq!(
            (audio.packets_lost_network, audio.packets_lost),
            (lost, lost)
        );
        assert_eq!((audio.packets_repaired, audio.rtx_received), (0, 0));
        assert_eq!(
            (audio.packets_recovered_red, audio.frames_recovered),
            (recovered, recovered),
            "distance {distance}, loss {loss}"
        );
        assert_eq!(audio.frames_expected, expected.len() as u64);
        assert_eq!(audio.frames_delivered, arrived.len() as u64 + recovered);
        assert_eq!((audio.frames_duplicate, audio.packets_duplicate), (0, 0));
        let undelivered = audio.frames_expected - audio.frames_delivered;
        let by_place = audio.frames_lost_uplink
            + audio.frames_lost_sfu
            + audio.frames_lost_downlink
            + audio.frames_lost_unattributed;
        assert_eq!(by_place, undelivered);
        assert_eq!(audio.frames_lost_downlink, lost - recovered);
        assert_eq!(receiver.session.packets_rejected, 0);
    }
}

#[test]
fn what_comes_after_all_takes_the_place_of_what_redundancy_brought() {
    let mut pair = Pair::connected(5);
    pair.set_conditions(Conditions {
        loss: 0.05,
        duplication: 0.02,
        delay: Duration::from_millis(20),
        jitter: Duration::from_millis(30),
    });
    publish(&mut pair, 2);
    pair.run_for(Duration::from_secs(20));
    let [sender, receiver] = pair.finish();
    let audio = &receiver.audio;
    assert!(audio.packets_reordered > 20 && audio.packets_repaired > 20);
    assert_eq!(audio.frames_expected, sender.audio.frames_sent);
    assert_eq!(audio.frames_delivered, audio.frames_expected);
    assert_eq!(audio.frames_duplicate, 0);
    assert_eq!(audio.packets_recovered_red, audio.packets_lost);
    assert_eq!(audio.frames_recovered, audio.packets_recovered_red);
}

#[test]
fn the_sfu_forwards_redundancy_to_those_who_take_it_and_the_primary_to_others() {
    let conditions = Conditions {
        delay: Duration::from_millis(10),
        ..Conditions::default()
    };
    let mut relay = Relay::connected(4, SendMode::Plain, false, 7);
    relay.link.conditions = conditions;
    let with_red = relay.publish_with(0, &audio(), Pacing::Paced, repeating(1));
    let plain = relay.publish(1, &audio(), Pacing::Paced);
    let takes_red = PayloadTypes {
        wrapped: Some(110),
        ..PayloadTypes::of(Codec::Red, 35)
    };
    for track in [with_red, plain] {
        relay.subscribe_with(2, track, takes_red);
        relay.subscribe(3, track, Kind::Audio);
    }
    relay.run_for(Duration::from_secs(2));
    relay.link.conditions.loss = 0.05;
    relay.run_for(Duration::from_secs(20));
    relay.link.conditions.loss = 0.0;
    let records = relay.finish();
    let (taker, other) = (&records[2].audio, &records[3].audio);
    for publisher in &records[..2] {
        assert!(publisher.audio.frames_sent.abs_diff(1_100) <= 5);
    }
    for record in &records {
        assert_eq!(record.session.packets_rejected, 0);
        assert_eq!(record.session.frames_misrouted, 0);
        assert_eq!(record.audio.frames_duplicate, 0);
    }
    assert_eq!((taker.tracks_live, other.tracks_live), (2, 2));
    // Half of the packets that the taker gets are RED, because the other track is plain.
    let share = taker.packets_received_red as f64 / taker.packets_received as f64;
    assert!((0.45..0.55).contains(&share), "{share}");
    assert_eq!((other.packets_received_red, other.frames_recovered), (0, 0));
    assert!(taker.bytes_received > other.bytes_received * 5 / 4);
    for audio in [taker, other] {
        assert!(audio.frames_delivered * 1_000 >= audio.frames_expected * 995);
        assert!(audio.frames_late * 100 <= audio.frames_delivered);
    }
}
