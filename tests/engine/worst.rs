//! One participant of two hundred has a ruined connection. Percentiles do not show it, and the
//! report does.

use std::time::Duration;

use crate::common::link::{Conditions, Random};
use crate::common::pair::audio;
use crate::common::relay::{Leg, Relay};
use throng::engine::publisher::Pacing;
use throng::measure::{JoinTimeline, Kind, Record};
use throng::report::ParticipantOutcome;
use throng::report::worst::{is_healthy, worst};
use throng::run::account::quality;
use throng::sfu::SendMode;
use throng::units::Time;

const SUBSCRIBERS: usize = 200;
const RUINED: usize = 123;

#[test]
fn one_ruined_among_two_hundred_is_named_first() {
    let mut relay = Relay::connected(1 + SUBSCRIBERS, SendMode::Plain, false, 1);
    relay.link.conditions = Conditions {
        delay: Duration::from_millis(20),
        ..Conditions::default()
    };
    let track = relay.publish(0, &audio(), Pacing::Paced);
    for client in 1..=SUBSCRIBERS {
        relay.subscribe(client, track, Kind::Audio);
    }
    let mut random = Random(7);
    relay.loss = Box::new(move |leg, _, _| matches!(leg, Leg::Down(RUINED)) && random.chance(0.3));
    relay.run_for(Duration::from_secs(6));
    let mut all = Record::default();
    relay.finish().iter().for_each(|record| all.merge(record));
    let participants: Vec<ParticipantOutcome> = relay
        .outcomes
        .iter()
        .skip(1)
        .map(|peer| ParticipantOutcome {
            index: peer.participant,
            identity: format!("listener-{}", peer.participant),
            subscribes: true,
            timeline: JoinTimeline {
                joined: Some(Time::from_millis(1)),
                ..JoinTimeline::default()
            },
            audio: quality(&[peer], Kind::Audio, 1, |_| true),
            ..ParticipantOutcome::default()
        })
        .collect();
    // The figures of all participants together show nothing.
    let audio = &all.audio;
    assert!(audio.one_way_latency.quantile(0.99).unwrap() < 60_000);
    assert!(
        audio.mos.low_quantile(0.01).unwrap() > 4_390,
        "the worst 1 % are two, and the better one of them is well"
    );
    assert!(audio.concealed_us * 500 < audio.played_us);
    let ranked = worst(&participants, 1.0);
    assert_eq!(ranked.len(), 2);
    assert_eq!(ranked[0].participant.identity, format!("listener-{RUINED}"));
    assert!(
        ranked[0]
            .wrong
            .iter()
            .any(|wrong| wrong.contains("concealed (model)")),
        "{:?}",
        ranked[0].wrong
    );
    assert!(ranked[0].participant.audio.mos.unwrap() < 4.0);
    assert!(
        ranked[1].wrong.is_empty() && ranked[1].healthy,
        "{:?}",
        ranked[1].wrong
    );
    // Frames that are missing or arrive after 400 ms make the participant unhealthy. A repair that
    // is too late only for playout does not, because that is an estimate of the model.
    let healthy = participants
        .iter()
        .filter(|participant| is_healthy(participant, 1.0))
        .count();
    let ruined = &participants[RUINED - 1].audio;
    let bad = ruined.frames_expected - ruined.frames_delivered + ruined.frames_late;
    assert_eq!(
        healthy,
        SUBSCRIBERS - usize::from(bad * 100 > ruined.frames_expected)
    );
}
