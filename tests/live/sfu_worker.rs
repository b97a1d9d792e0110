//! A router on its own thread, over real sockets on loopback.

use std::time::Duration;

use crate::common::loopback::Loopback;
use crate::common::program::alone;
use throng::measure::Kind;
use throng::sfu::bottleneck::BottleneckLimit;
use throng::sfu::{SendMode, SubscriptionId};

#[test]
fn media_crosses_a_worker_over_loopback_with_either_way_of_sending() {
    let _alone = alone();
    const SUBSCRIBERS: u32 = 3;
    const PACKETS: u16 = 500;
    for send in [SendMode::Plain, SendMode::Gso] {
        let mut loopback = Loopback::connected(SUBSCRIBERS, Kind::Audio, send);
        for seq in 0..PACKETS {
            let mut payload = [0; 88];
            payload[..2].copy_from_slice(&seq.to_be_bytes());
            loopback.publish(seq, &payload);
            if seq % 10 == 9 {
                loopback.turn();
            }
        }
        loopback.turn_until("all has come", |ends| {
            ends[1..]
                .iter()
                .all(|end| end.got.len() == usize::from(PACKETS))
        });
        for end in &loopback.ends[1..] {
            let sent = end
                .got
                .iter()
                .map(|(_, payload)| u16::from_be_bytes([payload[0], payload[1]]));
            assert!(sent.eq(0..PACKETS));
            assert!(
                end.got
                    .windows(2)
                    .all(|pair| pair[1].0 == pair[0].0.wrapping_add(1))
            );
        }
        let worker = &mut loopback.worker;
        let statistics = worker.statistics().unwrap();
        assert_eq!(statistics.media_in, u64::from(PACKETS));
        assert_eq!(
            statistics.media_out,
            u64::from(PACKETS) * u64::from(SUBSCRIBERS)
        );
        assert_eq!((statistics.send_errors, statistics.socket_drops), (0, 0));
        assert_eq!(statistics.transports_connected, u64::from(SUBSCRIBERS) + 1);
        assert!(worker.cpu().unwrap() > Duration::ZERO);
        let sent = worker.inspect(|router| {
            router
                .subscription_statistics(SubscriptionId(1))
                .unwrap()
                .packets
        });
        assert_eq!(sent, Some(u64::from(PACKETS)));
        worker.stop();
        assert!(worker.statistics().is_none(), "the thread is gone");
    }
}

#[test]
fn a_limited_worker_drops_what_is_above_its_limit_and_counts_it() {
    let _alone = alone();
    const PACKETS: u16 = 500;
    let limit = BottleneckLimit {
        packets_per_second: 10.0,
        wander: 0.0,
        seed: 1,
    };
    for send in [SendMode::Plain, SendMode::Gso] {
        let mut loopback = Loopback::limited(2, Kind::Audio, send, Some(limit));
        for seq in 0..PACKETS {
            loopback.publish(seq, &[0; 88]);
            if seq % 10 == 9 {
                loopback.turn();
            }
        }
        let statistics = loop {
            loopback.turn();
            let statistics = loopback.worker.statistics().unwrap();
            if statistics.media_in == u64::from(PACKETS) {
                break statistics;
            }
        };
        let sent = 2 * u64::from(PACKETS);
        let left = sent - statistics.limit_drops;
        assert!(
            statistics.limit_drops > 0 && left < sent / 2,
            "{left} of {sent} left"
        );
        loopback.turn_until("what left has come", |ends| {
            ends[1..]
                .iter()
                .map(|end| end.got.len() as u64)
                .sum::<u64>()
                == left
        });
    }
}
