//! A publisher on one host and its subscriber on another, whose clock is an hour off. Together they
//! must account for the same as one host that plays both.

use std::sync::Arc;
use std::time::Duration;

use crate::common::link::{Conditions, Link};
use crate::common::pair::{Pair, RUN, audio, video};
use throng::engine::publisher::Pacing;
use throng::engine::{CELLS_PER_PARTICIPANT, Roster, ShardCommand};
use throng::measure::{Histogram, Media, Record};
use throng::plan::Member;
use throng::units::{Epoch, Time};

const HOUR: Duration = Duration::from_secs(3600);
const UNIX: Duration = Duration::from_secs(1_790_000_000);
/// Frame intervals of [`audio`] and [`video`].
const INTERVALS: [Duration; CELLS_PER_PARTICIPANT] = [
    Duration::from_millis(20),
    Duration::from_nanos(1_000_000_000 / 15),
    Duration::ZERO,
    Duration::ZERO,
];

/// Returns a roster in which participant 0 publishes and participant 1 subscribes. `elsewhere` says
/// for each of them which other host plays it.
fn roster(elsewhere: [Option<usize>; 2]) -> Arc<Roster> {
    let member = |at: usize| Member {
        room: 0,
        group: 0,
        publishes_audio: at == 0,
        publishes_video: at == 0,
        elsewhere: elsewhere[at],
    };
    Arc::new(Roster::of_hosts(RUN, (0..2).map(member), &[INTERVALS]))
}

/// The hosts that play a run and account for it.
enum World {
    OneHost,
    TwoHosts(Arc<Roster>, Arc<Roster>),
}

impl World {
    fn two_hosts() -> World {
        World::TwoHosts(roster([None, Some(1)]), roster([Some(0), None]))
    }

    fn pair(&self) -> Pair {
        let ends = match self {
            World::OneHost => {
                let end = (roster([None, None]), Epoch::simulated(UNIX));
                [end.clone(), end]
            }
            World::TwoHosts(publishing, subscribing) => [
                (publishing.clone(), Epoch::simulated(UNIX)),
                (subscribing.clone(), Epoch::simulated(UNIX + HOUR)),
            ],
        };
        Pair::between(1, false, ends)
    }

    /// Hands the publisher's frame counts to the subscribing host.
    fn exchange_counts(&self) {
        if let World::TwoHosts(publishing, subscribing) = self {
            publishing
                .frame_counts()
                .for_each(|count| subscribing.set_frames_elsewhere(count));
        }
    }
}

/// Plays ten seconds of audio and video. Losses happen at fixed moments: a few milliseconds now and
/// then, once nearly everything for so long that repair gives up, and everything at the end.
fn play(world: &World, counts_come: bool) -> [Record; 2] {
    let mut pair = world.pair();
    pair.link = Link::new(Conditions::default(), 1);
    pair.now = Time::from_millis(1_000);
    pair.publish(&[audio(), video()], Pacing::Paced);
    for millis in 0..10_000 {
        let lost = millis > 1_000 && millis % 101 < 2
            || (4_000..7_000).contains(&millis) && millis % 97 >= 3
            || millis >= 9_200;
        pair.set_conditions(Conditions {
            loss: f64::from(u8::from(lost)),
            delay: Duration::from_millis(20),
            ..Conditions::default()
        });
        pair.run_for(Duration::from_millis(1));
        if counts_come && millis % 1_000 == 999 {
            world.exchange_counts();
        }
    }
    pair.command(ShardCommand::StopPublishing);
    pair.run_for(Duration::from_millis(2_500));
    if counts_come {
        world.exchange_counts();
    }
    pair.finish()
}

fn lost(media: &Media) -> u64 {
    media.frames_lost_source
        + media.frames_lost_uplink
        + media.frames_lost_sfu
        + media.frames_lost_downlink
        + media.frames_lost_unattributed
}

fn same_values(a: &Histogram, b: &Histogram) -> bool {
    a.hdr() == b.hdr()
}

/// Figures that a subscribing host cannot know. It does not know when a publisher on another host
/// began, nor which packets the server asked that publisher for.
const UNKNOWN_ELSEWHERE: [&str; 7] = [
    "track_subscribe",
    "first_packet",
    "first_frame",
    "frames_lost_uplink",
    "frames_lost_downlink",
    "frames_lost_unattributed",
    "packets_missing_uplink",
];

#[test]
fn two_hosts_account_for_what_one_host_does_that_plays_both() {
    let world = World::two_hosts();
    let World::TwoHosts(_, subscribing) = &world else {
        unreachable!()
    };
    subscribing.set_clock(0, Some(HOUR.as_micros() as i64));
    let (one, two) = (play(&World::OneHost, false), play(&world, true));
    for (one, two) in one.iter().zip(&two) {
        for (one, two) in [(&one.audio, &two.audio), (&one.video, &two.video)] {
            for ((name, one), (_, two)) in one.counters().zip(two.counters()) {
                assert!(
                    one == two || UNKNOWN_ELSEWHERE.contains(&name),
                    "{name}: {one} and {two}"
                );
            }
            for ((name, one), (_, two)) in one
                .histograms()
                .zip(two.histograms())
                .chain(one.scores().zip(two.scores()))
            {
                assert!(
                    same_values(one, two) || UNKNOWN_ELSEWHERE.contains(&name),
                    "{name}"
                );
            }
            assert_eq!(lost(one), lost(two));
        }
        for ((name, one), (_, two)) in one.session.counters().zip(two.session.counters()) {
            // Certificates and signatures are not always of the same length.
            assert!(
                one == two || name.starts_with("wire_bytes"),
                "{name}: {one} and {two}"
            );
        }
    }
    let [publishing, subscribing] = &two;
    for (sent, received) in [
        (&publishing.audio, &subscribing.audio),
        (&publishing.video, &subscribing.video),
    ] {
        // Every frame from the first one on is expected, also at the end, of which nothing arrived.
        assert_eq!(received.frames_expected, sent.frames_sent);
        assert!(
            lost(received) > 0
                && received.frames_delivered + lost(received) == received.frames_expected
        );
        assert_eq!(
            received.frames_lost_unattributed,
            lost(received),
            "no witness of the uplink is here"
        );
        // A packet is under way for 20 ms, and the packets of a picture leave one after the other.
        assert!(
            (20_000..40_000).contains(&received.one_way_latency.min().unwrap()),
            "{:?}",
            received.one_way_latency.min()
        );
        assert_eq!(
            (received.one_way_latency.count(), received.frames_untimed),
            (received.frames_delivered, 0)
        );
    }
}

#[test]
fn without_the_other_clock_nothing_is_said_of_latency() {
    let (known, unknown) = (World::two_hosts(), World::two_hosts());
    let World::TwoHosts(_, subscribing) = &known else {
        unreachable!()
    };
    subscribing.set_clock(0, Some(HOUR.as_micros() as i64));
    let [[_, known], [_, unknown]] = [play(&known, true), play(&unknown, true)];
    for (known, unknown) in [
        (&known.audio, &unknown.audio),
        (&known.video, &unknown.video),
    ] {
        assert_eq!(
            (unknown.frames_delivered, unknown.frames_expected),
            (known.frames_delivered, known.frames_expected)
        );
        assert_eq!(
            (unknown.frames_untimed, unknown.frames_late),
            (unknown.frames_delivered, 0)
        );
        assert!(
            unknown.one_way_latency.count() + unknown.playout_delay.count() + unknown.mos.count()
                == 0
        );
    }
}

#[test]
fn before_any_count_comes_no_frame_is_refused_and_what_came_was_sent() {
    let [_, received] = play(&World::two_hosts(), false);
    assert_eq!(received.session.frames_misrouted, 0);
    for media in [&received.audio, &received.video] {
        assert!(
            media.frames_delivered > 100 && lost(media) > 0,
            "{} and {}",
            media.frames_delivered,
            lost(media)
        );
    }
    // The frames of the last 800 ms are not known to have been sent, because nobody reported them.
    let [_, told] = play(&World::two_hosts(), true);
    assert_eq!(
        told.audio.frames_expected - received.audio.frames_expected,
        40
    );
    assert_eq!(
        told.video.frames_expected - received.video.frames_expected,
        12
    );
}
