//! In the steady state nothing is allocated: neither for a packet that is sent or received, nor for
//! its repair.
//!
//! ICE keep-alives come from a library and allocate, once every few seconds. They are counted
//! separately, and bounded.

use crate::common::link;
use crate::common::pair;
use std::time::Duration;

use crate::common::counting::ALLOCATIONS;
use crate::common::link::Conditions;
use crate::common::pair::{Pair, audio, layers, video};
use crate::common::switcher::{Downlink, World};
use throng::cli;
use throng::engine::publisher::{Pacing, Redundancy, SendParameters};
use throng::engine::{PeerKey, ShardCommand, VIDEO_TRACK};
use throng::recording::Recording;

/// Counts the allocations of ten seconds of audio and video, after two seconds to settle.
/// Milliseconds with ICE traffic are counted separately.
fn allocations(conditions: Conditions) -> (u64, u64, [throng::measure::Record; 2]) {
    allocations_of(Pair::connected(6), conditions, || {})
}

/// Does the same for a given pair, with other work after each millisecond.
fn allocations_of(
    mut pair: Pair,
    conditions: Conditions,
    mut after_tick: impl FnMut(),
) -> (u64, u64, [throng::measure::Record; 2]) {
    pair.set_conditions(conditions);
    pair.publish(&[audio(), video()], Pacing::Paced);
    pair.run_for(Duration::from_secs(2));
    let (mut of_media, mut of_ice) = (0, 0);
    for _ in 0..10_000 {
        ALLOCATIONS.set(0);
        let ice_before = pair.ice_datagrams;
        pair.tick();
        let count = if pair.ice_datagrams > ice_before {
            &mut of_ice
        } else {
            &mut of_media
        };
        *count += ALLOCATIONS.get();
        after_tick();
    }
    (of_media, of_ice, pair.finish())
}

#[test]
fn the_counter_counts() {
    ALLOCATIONS.set(0);
    let boxed = link::under_test(true, || Box::new(1));
    assert_eq!((*boxed, ALLOCATIONS.get()), (1, 1));
}

#[test]
fn steady_media_allocates_nothing() {
    let (of_media, of_ice, [sender, receiver]) = allocations(Conditions {
        delay: Duration::from_millis(20),
        ..Conditions::default()
    });
    assert!(sender.audio.frames_sent > 500 && receiver.video.frames_delivered > 150);
    assert_eq!(of_media, 0);
    assert!(of_ice < 500, "{of_ice}");
}

#[test]
fn audio_with_redundancy_allocates_nothing_sent_recovered_or_repaired() {
    let mut pair = Pair::connected(6);
    pair.set_conditions(Conditions {
        loss: 0.1,
        delay: Duration::from_millis(20),
        jitter: Duration::from_millis(25),
        ..Conditions::default()
    });
    pair.publish_tracks(vec![SendParameters {
        redundancy: Some(Redundancy {
            payload_type: 63,
            distance: 2,
        }),
        ..pair.track(&audio(), 0, Pacing::Paced)
    }]);
    pair.run_for(Duration::from_secs(2));
    let mut of_media = 0;
    for _ in 0..10_000 {
        ALLOCATIONS.set(0);
        let ice_before = pair.ice_datagrams;
        pair.tick();
        if pair.ice_datagrams == ice_before {
            of_media += ALLOCATIONS.get();
        }
    }
    let [sender, receiver] = pair.finish();
    assert!(receiver.audio.packets_received_red > 500 && sender.audio.rtx_sent > 10);
    assert_eq!(of_media, 0);
}

#[test]
fn media_under_5_percent_loss_with_nack_rtx_and_pli_allocates_nothing() {
    let conditions = Conditions {
        loss: 0.05,
        delay: Duration::from_millis(20),
        jitter: Duration::from_millis(5),
        duplication: 0.01,
    };
    let (of_media, of_ice, [sender, receiver]) = allocations(conditions);
    assert!(
        sender.session.nacks_received > 10
            && sender.video.rtx_sent > 10
            && receiver.video.packets_repaired > 10
    );
    assert_eq!(of_media, 0);
    assert!(of_ice < 500, "{of_ice}");
}

#[test]
fn media_under_60_percent_loss_where_repair_gives_up_allocates_nothing() {
    let (of_media, _, [sender, receiver]) = allocations(Conditions {
        loss: 0.6,
        delay: Duration::from_millis(20),
        ..Conditions::default()
    });
    assert!(receiver.session.plis_sent > 3 && sender.video.key_frames_sent > 3);
    assert_eq!(of_media, 0);
}

#[test]
fn a_recorded_subscriber_allocates_no_more_than_others() {
    let line = "throng --url ws://127.0.0.1:1 --api-key k --api-secret s --publishers 1 --video-publishers 1 --subscribers 1";
    let Ok(cli::CliCommand::Run(run)) = cli::parse_with(
        line.split(' ').map(Into::into),
        &|_| None,
        1,
        u64::from(pair::RUN) << 32,
    ) else {
        panic!("a good command line")
    };
    let dir = std::env::temp_dir().join(format!("throng-alloc-{}", std::process::id()));
    let (mut recording, mut taps) = Recording::new(dir.clone(), &run.plan);
    let mut pair = Pair::connected(6);
    pair.record(taps.remove(0).1);
    let conditions = Conditions {
        loss: 0.05,
        delay: Duration::from_millis(20),
        ..Conditions::default()
    };
    // The recorder may allocate, because it runs on a thread of its own. Here it runs between two
    // ticks.
    let (of_media, _, [_, receiver]) =
        allocations_of(pair, conditions, || assert!(recording.drain()));
    let notes = recording.finish();
    std::fs::remove_dir_all(dir).unwrap();
    assert!(
        receiver.video.frames_delivered > 100 && notes[0].contains("in 2 files"),
        "{notes:?}"
    );
    assert_eq!(of_media, 0);
}

#[test]
fn layers_that_rest_and_start_again_allocate_nothing() {
    let mut pair = Pair::connected(7);
    pair.set_conditions(Conditions {
        loss: 0.05,
        delay: Duration::from_millis(20),
        ..Conditions::default()
    });
    pair.publish_layers(&layers(), Pacing::Paced);
    pair.run_for(Duration::from_secs(2));
    let mut of_media = 0;
    for watched in [0b001, 0b111, 0b011, 0b000, 0b111] {
        ALLOCATIONS.set(0);
        link::under_test(true, || {
            pair.command(ShardCommand::SetLayers {
                key: PeerKey(0),
                track: VIDEO_TRACK,
                layers: watched,
            });
        });
        of_media += ALLOCATIONS.get();
        for _ in 0..700 {
            ALLOCATIONS.set(0);
            let ice_before = pair.ice_datagrams;
            pair.tick();
            of_media += if pair.ice_datagrams > ice_before {
                0
            } else {
                ALLOCATIONS.get()
            };
        }
    }
    let [sender, receiver] = pair.finish();
    assert!(sender.video.rtx_sent > 0 && receiver.video.frames_delivered > 200);
    assert_eq!(of_media, 0);
}

#[test]
fn a_subscriber_who_is_switched_between_layers_allocates_nothing() {
    let mut world = World::new(
        1,
        Downlink {
            loss: 0.02,
            ..Downlink::default()
        },
    );
    world.run_for(Duration::from_secs(1));
    ALLOCATIONS.set(0);
    for layer in [2, 0, 1, 2, 1, 0] {
        world.ask(layer);
        world.run_for(Duration::from_millis(800));
    }
    let allocations = ALLOCATIONS.get();
    let (log, record) = world.finish();
    assert!(log.switches >= 5 && record.video.frames_delivered > 80);
    assert_eq!(allocations, 0);
}
