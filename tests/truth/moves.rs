//! Each figure moves when its cause moves, and stands still when another one does. Each run in
//! virtual time differs from a calm one in one thing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::common::pair::{audio, video};
use crate::common::path::{Conditions, Loss};
use crate::common::relay::Relay;
use crate::common::tapped::{Direction, Tapped};
use throng::engine::publisher::{MediaSource, Pacing};
use throng::engine::{PeerKey, ShardCommand};
use throng::measure::{Histogram, Record};
use throng::sfu::SendMode;

const CALM: Conditions = Conditions {
    cut: false,
    loss: Loss::None,
    rate: None,
    delay: Duration::from_millis(20),
    jitter: Duration::ZERO,
    reorder: false,
    duplication: 0.0,
};

/// What is different from a calm run, and the figures that it moves. A figure is written `who
/// scope.figure`, where `media` stands for audio and for video. Figures that are not named stay as
/// they are.
struct Cause {
    name: &'static str,
    bring: fn(&mut Relay<Tapped>),
    must_move: &'static [&'static str],
    /// Figures that may move as a consequence, by chance or by the playout model.
    may_move: &'static [&'static str],
}

impl Cause {
    fn names(&self, list: &[&str], figure: &str) -> bool {
        let general = figure
            .replacen(" audio.", " media.", 1)
            .replacen(" video.", " media.", 1);
        list.contains(&figure) || list.contains(&general.as_str())
    }
}

/// Returns the figures of a publisher of audio and video, and of a subscriber behind the server.
/// The run is calm, then has its cause for five seconds, then is calm again.
fn figures(sources: &[MediaSource; 2], bring: fn(&mut Relay<Tapped>)) -> BTreeMap<String, u64> {
    let mut relay = Relay::over(Tapped::new(4), 2, SendMode::Plain, false, 4);
    set(&mut relay, CALM, CALM);
    for source in sources {
        let track = relay.publish(0, source, Pacing::Paced);
        relay.subscribe(1, track, source.kind());
    }
    relay.run_for(Duration::from_secs(3));
    let end = relay.now + Duration::from_secs(5);
    bring(&mut relay);
    while relay.now < end {
        relay.tick();
    }
    set(&mut relay, CALM, CALM);
    relay.run_for(Duration::from_secs(1));
    let records = relay.finish();
    let mut figures = BTreeMap::new();
    for (record, who) in records.iter().zip(["publisher", "subscriber"]) {
        note(record, who, &mut figures);
    }
    figures
}

/// Sets the conditions of the publisher's leg and of the subscriber's, in both directions.
fn set(relay: &mut Relay<Tapped>, publisher: Conditions, subscriber: Conditions) {
    for direction in [Direction::Up, Direction::Down] {
        relay.link.set(0, direction, publisher);
        relay.link.set(1, direction, subscriber);
    }
}

fn note(record: &Record, who: &str, figures: &mut BTreeMap<String, u64>) {
    let mut counter = |scope: &str, name: &str, value| {
        figures.insert(format!("{who} {scope}.{name}"), value);
    };
    record
        .session
        .counters()
        .for_each(|(name, value)| counter("session", name, value));
    record
        .audio
        .counters()
        .for_each(|(name, value)| counter("audio", name, value));
    record
        .video
        .counters()
        .for_each(|(name, value)| counter("video", name, value));
    let mut median = |scope: &str, name: &str, histogram: &Histogram| {
        // Jitter is a running mean, and is low again soon after its cause. Its maximum shows the
        // cause.
        let (stat, value) = if name == "jitter" {
            ("max", histogram.max())
        } else {
            ("p50", histogram.quantile(0.5))
        };
        if let Some(value) = value {
            figures.insert(format!("{who} {scope}.{name} {stat}"), value);
        }
    };
    record
        .session
        .histograms()
        .for_each(|(name, histogram)| median("session", name, histogram));
    record
        .audio
        .histograms()
        .for_each(|(name, histogram)| median("audio", name, histogram));
    record
        .video
        .histograms()
        .for_each(|(name, histogram)| median("video", name, histogram));
}

/// Returns whether a figure has moved. Counts may not differ at all, times by up to a millisecond,
/// and bytes on the wire by the few by which the signatures of two handshakes differ.
fn has_moved(figure: &str, calm: Option<&u64>, now: Option<&u64>) -> bool {
    let slack = match figure {
        _ if figure.ends_with(" p50") || figure.ends_with(" max") => 1_000,
        _ if figure.contains("wire_bytes") => 16,
        _ => 0,
    };
    match (calm, now) {
        (Some(calm), Some(now)) => calm.abs_diff(*now) > slack,
        _ => true,
    }
}

/// Figures that the playout model may change when anything comes later than before.
macro_rules! with_playout {
    ($($more:literal),* $(,)?) => {
        &[
            "subscriber media.frames_late_for_playout", "subscriber media.concealed_us", "subscriber media.played_us", "subscriber media.playout_delay p50",
            "subscriber media.one_way_latency p50", "subscriber media.jitter max", "subscriber video.frame_interval p50", $($more),*
        ]
    };
}

const CAUSES: &[Cause] = &[
    Cause {
        name: "nothing",
        bring: |_| {},
        must_move: &[],
        may_move: &[],
    },
    Cause {
        name: "loss on the way down",
        bring: |relay| {
            let loss = Loss::Random(0.05);
            relay
                .link
                .set(1, Direction::Down, Conditions { loss, ..CALM });
        },
        must_move: &[
            "subscriber session.nacks_sent",
            "subscriber session.wire_bytes_sent",
            "subscriber session.wire_bytes_received",
            "subscriber media.packets_received",
            "subscriber media.bytes_received",
            "subscriber media.rtx_received",
            "subscriber media.packets_lost_network",
            "subscriber media.packets_repaired",
            "subscriber media.loss_to_repair p50",
        ],
        may_move: with_playout!["subscriber media.frames_late"],
    },
    Cause {
        name: "loss on the way up",
        bring: |relay| {
            let loss = Loss::Random(0.05);
            relay
                .link
                .set(0, Direction::Up, Conditions { loss, ..CALM });
        },
        must_move: &[
            "publisher session.nacks_received",
            "publisher session.wire_bytes_sent",
            "publisher session.wire_bytes_received",
            "publisher media.rtx_sent",
            "publisher media.uplink_packets_lost",
            "publisher media.uplink_packets_asked",
            // The server keeps a place for a packet that it waits for. The subscriber asks for the
            // packet, and gets it late.
            "subscriber session.nacks_sent",
            "subscriber session.wire_bytes_sent",
            "subscriber video.packets_reordered",
            "subscriber audio.packets_received",
            "subscriber audio.bytes_received",
            "subscriber audio.rtx_received",
            "subscriber audio.packets_lost_network",
            "subscriber audio.packets_missing_uplink",
            "subscriber audio.packets_repaired",
            "subscriber audio.loss_to_repair p50",
        ],
        may_move: with_playout![
            "subscriber session.wire_bytes_received",
            "subscriber audio.packets_reordered",
            "subscriber media.frames_late",
            "subscriber video.rtx_received",
            "subscriber video.packets_duplicate"
        ],
    },
    Cause {
        name: "more delay on the way up and back",
        bring: |relay| {
            let delay = Duration::from_millis(80);
            set(relay, Conditions { delay, ..CALM }, CALM);
        },
        must_move: &[
            "publisher session.rtt_rtcp p50",
            "subscriber media.one_way_latency p50",
            "subscriber media.playout_delay p50",
        ],
        may_move: with_playout!["publisher session.rtt_stun p50"],
    },
    Cause {
        name: "jitter on the way down",
        bring: |relay| {
            let jitter = Duration::from_millis(50);
            relay
                .link
                .set(1, Direction::Down, Conditions { jitter, ..CALM });
        },
        must_move: &[
            "subscriber media.one_way_latency p50",
            "subscriber media.jitter max",
        ],
        may_move: with_playout![
            "subscriber session.rtt_rtcp p50",
            "subscriber session.rtt_stun p50"
        ],
    },
    Cause {
        name: "copies on the way down",
        bring: |relay| {
            let duplication = 0.1;
            relay.link.set(
                1,
                Direction::Down,
                Conditions {
                    duplication,
                    ..CALM
                },
            );
        },
        must_move: &[
            "subscriber session.wire_bytes_received",
            "subscriber media.packets_duplicate",
        ],
        // Duplicates of control packets are replays.
        may_move: &["subscriber session.packets_rejected"],
    },
    Cause {
        name: "an outage of the way down",
        bring: |relay| {
            relay
                .link
                .set(1, Direction::Down, Conditions { cut: true, ..CALM });
            // After 600 ms of outage, the rest of the five seconds is calm and brings what is asked
            // for.
            relay.run_for(Duration::from_millis(600));
            set(relay, CALM, CALM);
        },
        must_move: &[
            "subscriber session.nacks_sent",
            "subscriber media.packets_lost_network",
            "subscriber media.packets_repaired",
            "subscriber media.rtx_received",
            "subscriber media.loss_to_repair p50",
            "subscriber media.frames_late",
            "subscriber video.freezes",
            "subscriber video.freeze p50",
            "subscriber audio.concealed_us",
        ],
        may_move: with_playout![
            "subscriber media.packets_received",
            "subscriber media.bytes_received",
            "subscriber session.wire_bytes_sent",
            "subscriber session.wire_bytes_received",
            "subscriber audio.freezes",
            "subscriber audio.freeze p50"
        ],
    },
    Cause {
        name: "a picture that is muted",
        bring: |relay| {
            let (now, publisher) = (relay.now, &mut relay.clients[0]);
            let mute = ShardCommand::SetMuted {
                key: PeerKey(0),
                track: 1,
                muted: true,
            };
            publisher
                .shard
                .handle_command(mute, now, &mut publisher.outlet);
        },
        must_move: &[
            "publisher session.wire_bytes_sent",
            "publisher video.packets_sent",
            "publisher video.bytes_sent",
            "publisher video.frames_sent",
            "subscriber session.wire_bytes_received",
            "subscriber video.packets_received",
            "subscriber video.bytes_received",
            "subscriber video.frames_expected",
            "subscriber video.frames_delivered",
        ],
        may_move: &[
            "subscriber video.jitter max",
            "subscriber video.one_way_latency p50",
            "subscriber video.playout_delay p50",
        ],
    },
];

#[test]
fn each_cause_moves_its_figures_and_no_others() {
    let sources = [audio(), video()];
    let calm = figures(&sources, |_| {});
    let mut wrong = Vec::new();
    for cause in CAUSES {
        let now = figures(&sources, cause.bring);
        let names: BTreeSet<&String> = calm.keys().chain(now.keys()).collect();
        let moved: BTreeSet<&str> = names
            .into_iter()
            .map(String::as_str)
            .filter(|name| has_moved(name, calm.get(*name), now.get(*name)))
            .collect();
        for figure in cause.must_move {
            let kinds = [
                figure.replacen(" media.", " audio.", 1),
                figure.replacen(" media.", " video.", 1),
            ];
            let still = kinds.iter().filter(|kind| !moved.contains(kind.as_str()));
            wrong.extend(still.map(|kind| format!("{}: {kind} stands still", cause.name)));
        }
        for figure in moved {
            if !cause.names(cause.must_move, figure) && !cause.names(cause.may_move, figure) {
                wrong.push(format!(
                    "{}: {figure} moves, from {:?} to {:?}",
                    cause.name,
                    calm.get(figure),
                    now.get(figure)
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
