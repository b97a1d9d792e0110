//! The engine without sockets and without a clock. One shard sends, one receives, and a simulated
//! link loses packets between them. Ten seconds of media take a moment, and the same seed gives the
//! same figures every time.
//!
//! `cargo run --example two_shards`
//!
//! The loop that moves time and datagrams is `Pair::tick` in `tests/common/pair.rs`.

use std::time::Duration;

use throng::plan::Pacing;

use common::link::Conditions;
use common::pair::{Pair, audio, video};

#[path = "../tests/common"]
#[allow(dead_code)]
mod common {
    pub mod link;
    pub mod pair;
}

fn main() {
    let mut pair = Pair::connected(1);
    pair.set_conditions(Conditions {
        loss: 0.02,
        delay: Duration::from_millis(20),
        jitter: Duration::from_millis(5),
        ..Conditions::default()
    });
    pair.publish(&[audio(), video()], Pacing::Paced);
    pair.run_for(Duration::from_secs(10));
    let [sender, receiver] = pair.finish();

    for (name, sent, received) in [
        ("audio", &sender.audio, &receiver.audio),
        ("video", &sender.video, &receiver.video),
    ] {
        let latency_ms = received.one_way_latency.quantile(0.99).unwrap_or(0) as f64 / 1e3;
        println!(
            "{name}: {} frames sent, {} delivered; {} packets lost by the link, {} lost for good; p99 one way {latency_ms:.1} ms",
            sent.frames_sent,
            received.frames_delivered,
            received.packets_lost_network,
            received.packets_lost,
        );
        assert!(received.frames_delivered > 0);
    }
}
