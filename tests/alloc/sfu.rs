//! In its steady state a router allocates nothing: neither for a packet that is forwarded, nor for
//! its repair, nor for reports and feedback.
//!
//! ICE keep-alives come from a library and allocate, once every few seconds. Events allocate, too.
//! Milliseconds with either are counted separately, and bounded.

use crate::common::link;
use std::time::Duration;

use crate::common::counting::ALLOCATIONS;
use crate::common::link::Conditions;
use crate::common::pair::{audio, video};
use crate::common::relay::Relay;
use throng::engine::publisher::Pacing;
use throng::measure::Kind;
use throng::sfu::SendMode;
use throng::sfu::statistics::RouterStatistics;

/// Counts the allocations of ten seconds of audio and video to two subscribers, after two seconds
/// to settle. Milliseconds with ICE or events are counted separately.
fn allocations(conditions: Conditions, send: SendMode) -> (u64, u64, RouterStatistics) {
    let mut relay = Relay::connected(3, send, false, 6);
    relay.link.conditions = conditions;
    let tracks = [
        (relay.publish(0, &audio(), Pacing::Paced), Kind::Audio),
        (relay.publish(0, &video(), Pacing::Burst), Kind::Video),
    ];
    for (track, kind) in tracks {
        for client in 1..3 {
            relay.subscribe(client, track, kind);
        }
    }
    relay.run_for(Duration::from_secs(2));
    let (mut of_media, mut of_others) = (0, 0);
    for _ in 0..10_000 {
        ALLOCATIONS.set(0);
        let (setup, events) = (relay.setup_datagrams, relay.events.len());
        relay.tick();
        let apart = relay.setup_datagrams > setup || relay.events.len() > events;
        *(if apart { &mut of_others } else { &mut of_media }) += ALLOCATIONS.get();
    }
    (of_media, of_others, relay.router.statistics())
}

#[test]
fn the_counter_counts() {
    ALLOCATIONS.set(0);
    let boxed = link::under_test(true, || std::hint::black_box(Box::new(1)));
    assert_eq!((*boxed, ALLOCATIONS.get()), (1, 1));
}

#[test]
fn forwarding_allocates_nothing() {
    for send in [SendMode::Plain, SendMode::Gso] {
        let conditions = Conditions {
            delay: Duration::from_millis(10),
            ..Conditions::default()
        };
        let (of_media, of_others, statistics) = allocations(conditions, send);
        assert!(statistics.media_out > 2_000 && statistics.sender_reports_out > 10);
        assert_eq!(of_media, 0);
        assert!(of_others < 2_000, "{of_others}");
    }
}

#[test]
fn repair_under_5_percent_loss_allocates_nothing() {
    let conditions = Conditions {
        loss: 0.05,
        delay: Duration::from_millis(10),
        jitter: Duration::from_millis(3),
        duplication: 0.01,
    };
    let (of_media, _, statistics) = allocations(conditions, SendMode::Gso);
    assert!(statistics.repairs_in > 10 && statistics.resends_out > 50 && statistics.nacks_out > 10);
    assert_eq!(of_media, 0);
}
