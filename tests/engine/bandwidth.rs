//! Tests of bandwidth estimation over a bottleneck, in virtual time: what a receiver's feedback
//! tells its sender, and how a sender that obeys it reacts.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use crate::common::link::Conditions;
use crate::common::pair::{Pair, audio, layer_ssrc, layers};
use throng::engine::publisher::Pacing;
use throng::measure::Record;
use throng::transport::rtp::Header;

const TRANSPORT_CC: u8 = 9;
/// Bitrate of all three layers together. They have 60, 150 and 400 kbit/s.
const ALL_LAYERS_BPS: u64 = 610_000;
const RTT: Duration = Duration::from_millis(40);

fn set_path(pair: &mut Pair, rate: u64) {
    pair.link.rate = rate;
    pair.set_conditions(Conditions {
        delay: RTT / 2,
        ..Conditions::default()
    });
}

/// Number of packets sent on each SSRC. Retransmissions have SSRCs of their own.
#[derive(Clone, Default)]
struct Sent(Rc<RefCell<BTreeMap<Ssrc, u64>>>);

impl Sent {
    fn listen(pair: &mut Pair) -> Sent {
        let sent = Sent::default();
        let log = sent.clone();
        pair.on_sent = Box::new(move |datagram| {
            let header = Header::parse(&datagram.bytes).unwrap();
            *log.0.borrow_mut().entry(header.ssrc).or_default() += 1;
        });
        sent
    }

    /// Returns whether each layer was sent since the last call.
    fn layers(&self) -> [bool; 3] {
        let sent = std::mem::take(&mut *self.0.borrow_mut());
        [0, 1, 2].map(|layer| sent.contains_key(&layer_ssrc(layer)))
    }
}

/// Returns a publisher of three layers over a path of this rate.
fn publisher(obeys: bool, rate: u64) -> (Pair, Sent) {
    let mut pair = Pair::connected_where(1, obeys);
    pair.transport_cc_extension = Some(TRANSPORT_CC);
    set_path(&mut pair, rate);
    let sent = Sent::listen(&mut pair);
    pair.publish_layers(&layers(), Pacing::Paced);
    (pair, sent)
}

fn run_seconds(pair: &mut Pair, sent: &Sent, seconds: u64) -> [bool; 3] {
    pair.run_for(Duration::from_secs(seconds));
    sent.layers()
}

#[test]
fn every_packet_of_all_streams_has_the_next_number_and_is_reported_ten_times_a_second() {
    let mut pair = Pair::connected(3);
    pair.transport_cc_extension = Some(TRANSPORT_CC);
    pair.set_conditions(Conditions {
        loss: 0.05,
        delay: RTT / 2,
        ..Conditions::default()
    });
    let numbers: Rc<RefCell<Vec<u16>>> = Rc::default();
    let log = numbers.clone();
    pair.on_sent = Box::new(move |datagram| {
        let header = Header::parse(&datagram.bytes).unwrap();
        let number = header
            .extension(&datagram.bytes, TRANSPORT_CC)
            .expect("a number");
        log.borrow_mut()
            .push(u16::from_be_bytes([number[0], number[1]]));
    });
    let [low, _, high] = layers();
    pair.publish(&[audio()], Pacing::Paced);
    pair.publish_layers(&[low, high], Pacing::Paced);
    pair.run_for(Duration::from_secs(10));
    let [ours, theirs] = pair.finish();
    let numbers = numbers.borrow();
    assert!(
        numbers.iter().copied().eq((1..).take(numbers.len())),
        "resends included: one counter for all"
    );
    assert!(ours.video.rtx_sent > 10, "{}", ours.video.rtx_sent);
    assert!(
        (95..130).contains(&theirs.bandwidth.transport_cc_sent),
        "{}",
        theirs.bandwidth.transport_cc_sent
    );
    assert!(ours.bandwidth.transport_cc_received > 80);
    // The packets that the receiver lacks are those that its feedback reports as missing, except
    // those behind the last packet of a feedback message that was lost.
    let lacking = theirs.audio.packets_lost_network + theirs.video.packets_lost_network;
    let missing = ours.bandwidth.uplink_packets_missing;
    assert!(
        missing <= lacking && missing * 100 >= lacking * 85,
        "{missing} of {lacking}"
    );
}

#[test]
fn a_publisher_that_does_not_obey_sends_what_was_planned() {
    let (mut pair, sent) = publisher(false, 200_000);
    assert_eq!(run_seconds(&mut pair, &sent, 5), [true; 3]);
    assert_eq!(run_seconds(&mut pair, &sent, 5), [true; 3]);
    let bandwidth = pair.finish()[0].bandwidth.clone();
    assert!(bandwidth.transport_cc_received > 20 && bandwidth.uplink_packets_missing > 100);
    assert_eq!(
        (
            bandwidth.uplink_estimates,
            bandwidth.layers_dropped,
            bandwidth.probes_sent
        ),
        (0, 0, 0)
    );
}

#[test]
fn layers_go_when_the_path_narrows_and_return_with_a_key_frame_when_it_widens() {
    let (mut pair, sent) = publisher(true, 0);
    pair.run_for(Duration::from_secs(3));
    sent.layers();
    assert_eq!(
        run_seconds(&mut pair, &sent, 2),
        [true; 3],
        "probes have found the whole path"
    );
    // The path has room for the two lower layers, then for the lowest alone, then for less than
    // that.
    for (rate, expected) in [
        (300_000, [true, true, false]),
        (120_000, [true, false, false]),
        (40_000, [true, false, false]),
    ] {
        set_path(&mut pair, rate);
        pair.run_for(Duration::from_secs(6));
        sent.layers();
        assert_eq!(run_seconds(&mut pair, &sent, 4), expected, "at {rate}");
    }
    set_path(&mut pair, 0);
    pair.run_for(Duration::from_secs(20));
    sent.layers();
    assert_eq!(
        run_seconds(&mut pair, &sent, 2),
        [true; 3],
        "probes have found it again"
    );
    let [ours, theirs] = pair.finish();
    let bandwidth = &ours.bandwidth;
    assert!(
        bandwidth.layers_dropped >= 2 && bandwidth.layers_returned == bandwidth.layers_dropped,
        "{}",
        describe(&ours)
    );
    assert!(
        bandwidth.probes_sent >= 2 && bandwidth.probe_packets_sent >= 10,
        "{}",
        describe(&ours)
    );
    assert!(
        (20_000..60_000).contains(&bandwidth.layer_limited_ms),
        "{}",
        describe(&ours)
    );
    // Three key frames when the layers began, three because each layer repeats its first one, and
    // one for each return. There are more if the receiver asked for them.
    assert!(
        ours.video.key_frames_sent >= 6 + bandwidth.layers_returned,
        "{}",
        ours.video.key_frames_sent
    );
    let undelivered = theirs.video.frames_expected - theirs.video.frames_delivered;
    assert!(
        undelivered * 10 < theirs.video.frames_expected,
        "layers that rest are not expected: {undelivered} of {}",
        theirs.video.frames_expected
    );
}

#[test]
fn the_estimate_stays_within_the_path_and_the_receiver_loses_little_there() {
    // The paths have room for three times all layers, for the lower two, and for the lowest.
    for (rate, layers, within) in [
        (3 * ALL_LAYERS_BPS, [true; 3], 500..2_000),
        (400_000, [true, true, false], 150..500),
        (130_000, [true, false, false], 40..200),
    ] {
        let (mut pair, sent) = publisher(true, rate);
        pair.run_for(Duration::from_secs(8));
        let before = pair
            .shards
            .each_mut()
            .map(|shard| *shard.swap_record(Box::default()));
        drop(before);
        sent.layers();
        assert_eq!(run_seconds(&mut pair, &sent, 10), layers, "at {rate}");
        let [ours, theirs] = pair.finish();
        let estimate = ours.bandwidth.uplink_estimate_kbps / ours.bandwidth.uplink_estimates;
        assert!(within.contains(&estimate), "at {rate}: {}", describe(&ours));
        let (lost, received) = (
            theirs.video.packets_lost_network,
            theirs.video.packets_received,
        );
        assert!(
            lost * 20 <= received,
            "at {rate}: {lost} lost, {received} received"
        );
    }
}

fn describe(record: &Record) -> String {
    record
        .bandwidth
        .counters()
        .map(|(name, value)| format!("{name} {value}  "))
        .collect()
}
