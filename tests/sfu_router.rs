//! The embedded SFU's router between our own shards: what it forwards, repairs and counts, by the link's log and the subscribers' own accounts.

#[path = "common/link.rs"]
#[allow(dead_code)]
mod link;
#[path = "common/pair.rs"]
#[allow(dead_code)]
mod pair;
#[path = "common/relay.rs"]
#[allow(dead_code)]
mod relay;

use std::time::Duration;

use link::Conditions;
use pair::{audio, video};
use relay::Relay;
use throng::engine::publisher::Pacing;
use throng::measure::Kind;
use throng::sfu::statistics::RouterStatistics;
use throng::sfu::{MediaEvent, SendMode};

const PERFECT: Conditions = Conditions {
    loss: 0.0,
    duplication: 0.0,
    delay: Duration::from_millis(5),
    jitter: Duration::ZERO,
};

/// Every datagram that came is counted once by what became of it.
fn assert_all_accounted_for(statistics: &RouterStatistics) {
    let refused: u64 = statistics
        .counters()
        .filter(|(name, _)| name.starts_with("refused_"))
        .map(|(_, count)| count)
        .sum();
    let taken = statistics.setup_in + statistics.rtcp_in + statistics.media_in + statistics.repairs_in + statistics.probes_in;
    assert_eq!(statistics.datagrams_in, taken + refused, "{statistics:?}");
}

#[test]
fn every_frame_reaches_every_subscriber_once_with_either_dtls_role_and_either_way_of_sending() {
    for (send, active) in [(SendMode::Plain, false), (SendMode::Gso, true)] {
        let mut relay = Relay::connected(3, send, active, 1);
        relay.link.conditions = PERFECT;
        let audio_track = relay.publish(0, &audio(), Pacing::Paced);
        let video_track = relay.publish(0, &video(), Pacing::Burst);
        for client in [1, 2] {
            relay.subscribe(client, audio_track, Kind::Audio);
            relay.subscribe(client, video_track, Kind::Video);
        }
        relay.run_for(Duration::from_secs(5));
        let records = relay.finish();
        for subscriber in &records[1..] {
            for (sent, received) in [(&records[0].audio, &subscriber.audio), (&records[0].video, &subscriber.video)] {
                assert!(received.tracks_live == 1 && sent.frames_sent > 70);
                assert_eq!(received.frames_delivered, sent.frames_sent);
                assert_eq!(received.packets_received, sent.packets_sent);
                assert_eq!((received.packets_lost_network, received.frames_duplicate), (0, 0));
                // Twice 5 ms, and up to a millisecond of the clients' tick each.
                let latency = received.one_way_latency.quantile(0.5).unwrap();
                assert!(send == SendMode::Gso || latency < 30_000, "{latency}");
            }
            assert!(subscriber.session.rtt_rtcp.count() > 0, "reports make a round trip");
        }
        assert!(records[0].session.rtt_rtcp.count() > 0);
        let statistics = relay.router.statistics();
        assert_all_accounted_for(&statistics);
        assert_eq!(statistics.media_in, records[0].audio.packets_sent + records[0].video.packets_sent);
        assert_eq!(statistics.media_out, 2 * statistics.media_in);
        assert_eq!(statistics.refused_unknown_ufrag, 0);
        assert_eq!((statistics.datagrams_in, statistics.datagrams_out), (relay.router_in, relay.router_out));
        let started = relay
            .events
            .iter()
            .filter(|event| matches!(event, MediaEvent::TrackStarted { .. }))
            .count();
        assert_eq!(started, 2);
    }
}
