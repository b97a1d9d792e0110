//! What must hold after a run, whatever the seed: the sums of all accounts, and what every receiver
//! could do with what it got.

use std::time::Duration;
use throng::transport::rtp::Ssrc;

use throng::codec::vp8::{PictureId, Vp8Descriptor};
use throng::engine::PeerOutcome;
use throng::measure::{Kind, Media, Record};
use throng::media::identity::{FrameIdentity, Origin, VIDEO_TRAILER_LEN};
use throng::sfu::statistics::RouterStatistics;

use throng::units::Time;

use crate::media::{Place, clips};
use crate::plan::{ACTIVE, Act};
use crate::simulation::{EngineArrivals, RUN, Receiver, Rule, Session, Stage, World};
use crate::witness::{Fates, Kept, Stream};

/// RTP ticks of video and audio in a millisecond.
const VIDEO_TICKS_PER_MS: i64 = 90;
const AUDIO_TICKS_PER_MS: i64 = 48;
/// Largest rounding of a slot. A frame's slot is rounded up to the engine's tick; its timestamp is
/// not.
const SLOT_ROUNDING_MS: i64 = 1;
/// Largest error of timestamps over a layer switch. The clocks of the two layers are related by
/// their sender reports, or by arrival times before there are any. A router may begin with a key
/// frame that is half a second old.
const SWITCH_ERROR_MS: i64 = 600;

/// Counters of a router that stay at 0 if everybody is honest and links only lose, repeat and
/// delay.
const HARM: [&str; 6] = [
    "refused_unauthentic",
    "refused_malformed",
    "refused_unknown_kind",
    "rtcp_malformed",
    "send_errors",
    "socket_drops",
];

/// Longest time from the moment that a stream could flow to its first frame, on a link that is not
/// dead.
///
/// A publisher drops requests for key frames that come within 300 ms of the last one, and a router
/// repeats them after 500 ms. So one loss may cost a second.
const PATIENCE: Duration = Duration::from_millis(2_000);

/// Longest time from a join to its connections. Checks and handshakes are repeated less and less
/// often, so a dead link costs up to three times the time that it is dead.
const CONNECT_PATIENCE: Duration = Duration::from_millis(2_500);

/// Result of a run, for the comparison of two runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Account {
    pub digest: u64,
    /// Every counter and histogram that does not depend on the lengths of set-up datagrams.
    pub numbers: Vec<(String, u64)>,
}

/// Checks a world whose links have been drained, before anybody has left.
pub fn check_drained(world: &mut World) -> Account {
    let mut record = Record::default();
    let mut outcomes = Vec::new();
    for shard in &mut world.shards {
        outcomes.extend(shard.finish());
        record.merge(&shard.swap_record(Box::default()));
    }
    check_engines(world, &record, &outcomes);
    check_histograms(world, &record);
    check_streams(world, &outcomes);
    check_sources(world, &outcomes);
    check_witnesses(world);
    check_presence(world);
    account(world, &record)
}

/// Checks a world that everybody has left.
pub fn check_empty(world: &mut World) {
    check_links(world);
    let routers: Vec<RouterStatistics> = world
        .routers
        .iter()
        .map(|router| router.statistics())
        .collect();
    let left: u64 = routers
        .iter()
        .map(|left| left.transports + left.transports_connected + left.tracks + left.subscriptions)
        .sum();
    world.check(Rule::AllIsForgotten, left == 0, || {
        format!("routers keep what is gone: {routers:?}")
    });
    let statistics = world.lobby.statistics();
    let left = statistics.rooms
        + statistics.participants
        + statistics.published_audio
        + statistics.published_video;
    let left = left + statistics.subscribed_audio + statistics.subscribed_video;
    world.check(Rule::AllIsForgotten, left == 0, || {
        format!("the lobby keeps what is gone: {statistics:?}")
    });
    let entered = world
        .sessions
        .iter()
        .filter(|session| session.stage != Stage::NotYet)
        .count() as u64;
    world.check(
        Rule::AllIsForgotten,
        statistics.since_start.joins == entered,
        || {
            format!(
                "{} joins, and {entered} entered",
                statistics.since_start.joins
            )
        },
    );
}

/// Checks the datagrams between the links and the routers: none is lost without a reason.
fn check_links(world: &mut World) {
    let (mut out_of_uplinks, mut into_downlinks, mut out_of_downlinks) = (0, 0, 0);
    for index in 0..world.sessions.len() {
        let session = &world.sessions[index];
        out_of_uplinks += session.up.log.delivered;
        into_downlinks += session.down.log.sent;
        out_of_downlinks += session.down.log.delivered;
        for (way, log, under_way) in [
            ("up", session.up.log, session.up.under_way()),
            ("down", session.down.log, session.down.under_way()),
        ] {
            let (came, went) = (log.sent + log.duplicated, log.lost + log.delivered);
            world.check(Rule::LinksConserve, came == went + under_way, || {
                format!("session {index} {way}: {log:?}, {under_way} under way")
            });
        }
    }
    let mut total = RouterStatistics::default();
    world
        .routers
        .iter()
        .for_each(|router| total.merge(&router.statistics()));
    let tally = world.tally;
    world.check(
        Rule::RoutersAccount,
        total.datagrams_in == out_of_uplinks,
        || {
            format!(
                "links delivered {out_of_uplinks} datagrams, routers took {}",
                total.datagrams_in
            )
        },
    );
    world.check(
        Rule::RoutersAccount,
        (total.datagrams_in, total.bytes_in) == (tally.at_routers, tally.at_routers_bytes),
        || {
            format!(
                "routers heard {} datagrams, {} bytes: {tally:?}",
                total.datagrams_in, total.bytes_in
            )
        },
    );
    let refused: u64 = total
        .counters()
        .filter(|(name, _)| name.starts_with("refused_"))
        .map(|(_, count)| count)
        .sum();
    let taken =
        total.setup_in + total.rtcp_in + total.media_in + total.repairs_in + total.probes_in;
    world.check(
        Rule::RoutersAccount,
        total.datagrams_in == taken + refused,
        || format!("not every datagram has one fate: {total:?}"),
    );
    let sent = total.setup_out + total.rtcp_out + total.media_out + total.resends_out;
    world.check(Rule::RoutersAccount, total.datagrams_out == sent, || {
        format!("{} sent, by kind {sent}: {total:?}", total.datagrams_out)
    });
    let taken = tally.to_closed + tally.to_engines + tally.to_witnesses;
    world.check(Rule::EnginesAccount, out_of_downlinks == taken, || {
        format!("links delivered {out_of_downlinks} datagrams to participants: {tally:?}")
    });
    // Datagrams that were sent after everybody had left are in the routers' account only.
    world.check(
        Rule::RoutersAccount,
        tally.by_routers == into_downlinks,
        || format!("{into_downlinks} datagrams entered downlinks: {tally:?}"),
    );
    let harmed: Vec<_> = total
        .counters()
        .filter(|(name, count)| HARM.contains(name) && *count > 0)
        .collect();
    world.check(Rule::NobodyForges, harmed.is_empty(), || {
        format!("nobody forges anything here: {harmed:?}")
    });
}

fn check_engines(world: &mut World, record: &Record, outcomes: &[PeerOutcome]) {
    let tally = world.tally;
    let (audio, video, session) = (&record.audio, &record.video, &record.session);
    let sum = |counter: fn(&Media) -> u64| counter(audio) + counter(video);
    let sent = sum(|media| media.packets_sent + media.rtx_sent);
    world.check(Rule::EnginesAccount, sent == tally.rtp_by_engines, || {
        format!("publishers sent {sent} packets: {tally:?}")
    });
    world.check(
        Rule::EnginesAccount,
        session.wire_bytes_sent == tally.by_engines_bytes,
        || {
            format!(
                "publishers sent {} bytes: {tally:?}",
                session.wire_bytes_sent
            )
        },
    );
    world.check(
        Rule::EnginesAccount,
        session.wire_bytes_received == tally.to_engines_bytes,
        || {
            format!(
                "subscribers took {} bytes: {tally:?}",
                session.wire_bytes_received
            )
        },
    );
    let processed = record.engine.packets_processed;
    world.check(
        Rule::EnginesAccount,
        processed == tally.rtp_to_engines + tally.rtp_by_engines,
        || format!("{processed} packets processed: {tally:?}"),
    );
    // The streams themselves have counted the repairs that were not needed. All other duplicates
    // are replays.
    let needless: u64 = outcomes
        .iter()
        .flat_map(|peer| &peer.streams)
        .map(|stream| stream.counts.duplicate)
        .sum();
    let replayed = sum(|media| media.packets_duplicate) - needless;
    let taken = sum(|media| media.packets_received + media.rtx_received) + replayed;
    let mut arrivals = EngineArrivals::default();
    for session in &world.sessions {
        arrivals.expected += session.arrivals.expected;
        arrivals.early += session.arrivals.early;
    }
    // A packet that comes before its announcement or before the keys may be kept until then. If it
    // is not kept, it is refused.
    let arrived = arrivals.expected + arrivals.early;
    let fits = (arrivals.expected..=arrived).contains(&taken)
        && arrived - taken <= session.packets_rejected;
    world.check(Rule::EnginesAccount, fits, || {
        format!(
            "{taken} packets were taken ({replayed} repeated), {} rejected: {arrivals:?}",
            session.packets_rejected
        )
    });
    world.check(Rule::RoomsAreApart, session.frames_misrouted == 0, || {
        format!(
            "{} frames in rooms that they do not belong to",
            session.frames_misrouted
        )
    });
    world.check(
        Rule::EnginesAccount,
        record.engine.send_slots_skipped == 0,
        || "a world has no stalls, and slots were skipped".into(),
    );
    for kind in [Kind::Audio, Kind::Video] {
        let (of_streams, counted) = streams_and_record(outcomes, record, kind);
        world.check(Rule::EnginesAccount, of_streams == counted, || {
            format!("{kind:?}: streams {of_streams:?}, record {counted:?}")
        });
        let media = if kind == Kind::Audio { audio } else { video };
        let (network, told) = (
            media.packets_lost_network,
            media.packets_repaired + media.packets_lost,
        );
        world.check(Rule::EnginesAccount, network == told, || {
            format!("{kind:?}: {network} lost on the network, {told} repaired or lost")
        });
        let (missing, places) = (
            media.frames_expected - media.frames_delivered,
            places_of_loss(media),
        );
        world.check(
            Rule::EnginesAccount,
            places.iter().sum::<u64>() == missing,
            || format!("{kind:?}: {missing} frames missing, lost {places:?}"),
        );
    }
}

/// Returns the lost frames by place: source, uplink, SFU, downlink, unattributed.
fn places_of_loss(media: &Media) -> [u64; 5] {
    [
        media.frames_lost_source,
        media.frames_lost_uplink,
        media.frames_lost_sfu,
        media.frames_lost_downlink,
        media.frames_lost_unattributed,
    ]
}

/// Returns the same sums over the streams and from the record: frames delivered, frames expected,
/// packets lost, packets repaired, live streams.
fn streams_and_record(
    outcomes: &[PeerOutcome],
    record: &Record,
    kind: Kind,
) -> ([u64; 5], [u64; 5]) {
    let streams = outcomes
        .iter()
        .flat_map(|peer| &peer.streams)
        .filter(|stream| stream.kind == kind);
    let mut sums = [0; 5];
    for stream in streams {
        let numbers = [
            stream.frames_delivered,
            stream.frames_expected,
            stream.counts.lost,
            stream.counts.repaired,
            u64::from(stream.live),
        ];
        sums.iter_mut()
            .zip(numbers)
            .for_each(|(sum, number)| *sum += number);
    }
    let media = if kind == Kind::Audio {
        &record.audio
    } else {
        &record.video
    };
    let counted = [
        media.frames_delivered,
        media.frames_expected,
        media.packets_lost,
        media.packets_repaired,
        media.tracks_live,
    ];
    (sums, counted)
}

/// Checks that everything that is timed has as many times as it was counted.
fn check_histograms(world: &mut World, record: &Record) {
    let (audio, video) = (&record.audio, &record.video);
    for (name, media) in [("audio", audio), ("video", video)] {
        for (what, histogram, counter) in [
            (
                "one-way latencies",
                media.one_way_latency.count(),
                media.frames_delivered,
            ),
            (
                "subscriptions",
                media.track_subscribe.count(),
                media.tracks_live,
            ),
            (
                "first packets",
                media.first_packet.count(),
                media.tracks_live,
            ),
            ("freezes", media.freeze.count(), media.freezes),
        ] {
            world.check(Rule::HistogramsCount, histogram == counter, || {
                format!("{name}: {histogram} {what} timed, {counter} counted")
            });
        }
        let late = media.frames_late;
        world.check(
            Rule::HistogramsCount,
            late <= media.frames_delivered,
            || format!("{name}: {late} frames late, more than came"),
        );
        let first = media.first_frame.count();
        world.check(Rule::HistogramsCount, first <= media.tracks_live, || {
            format!(
                "{name}: {first} first frames of {} tracks",
                media.tracks_live
            )
        });
        let answered = media.pli_received_to_key_sent.count();
        world.check(
            Rule::HistogramsCount,
            answered <= media.key_frames_sent,
            || {
                format!(
                    "{name}: {answered} requests answered by {} key frames",
                    media.key_frames_sent
                )
            },
        );
    }
    world.check(
        Rule::HistogramsCount,
        audio.first_frame.count() == audio.tracks_live,
        || "every live audio track has a first frame".into(),
    );
    let frames = audio.frames_sent + video.frames_sent;
    let lags = record.engine.send_lag.count();
    world.check(Rule::HistogramsCount, lags == frames, || {
        format!("{lags} send lags of {frames} frames")
    });
}

/// Checks that every frame has arrived where nothing was lost and nobody intervened.
fn check_streams(world: &mut World, outcomes: &[PeerOutcome]) {
    for peer in outcomes {
        let index = peer.participant as usize;
        for stream in &peer.streams {
            let (delivered, expected) = (stream.frames_delivered, stream.frames_expected);
            let receiver = &world.sessions[index];
            let Some(Origin { publisher, track }) = stream.origin else {
                let missing = is_awaited(world, receiver, stream.ssrc, stream.kind);
                world.check(Rule::StreamsFlow, !missing, || {
                    format!(
                        "session {index} never got anything of {:?} {:#x}",
                        stream.kind, stream.ssrc.0
                    )
                });
                continue;
            };
            let source = &world.sessions[publisher as usize];
            let [up, down] = [
                source.person.up.is_perfect(),
                receiver.person.down.is_perfect(),
            ];
            let all_must_come = up
                && down
                && is_undisturbed(receiver, stream.ssrc)
                && is_steady(source, stream.kind);
            let losses = stream.losses;
            let fits = (!up || losses.uplink == 0) && (!(up && down) || losses.downlink == 0);
            world.check(Rule::EnginesAccount, fits, || {
                format!("session {index} says {losses:?} of {publisher}; perfect uplink {up}, downlink {down}")
            });
            if all_must_come {
                world.check(Rule::PerfectLinksDeliver, delivered == expected && expected > 0, || {
                    format!("session {index} got {delivered} of {expected} frames of track {track} of session {publisher}")
                });
            }
        }
    }
}

/// Checks that for every subscription, the frames that came and those that were lost at each place
/// add up to what was expected. For a source that was thrown out, the frames that it made and those
/// that it owes must add up to what it would have made.
fn check_sources(world: &mut World, outcomes: &[PeerOutcome]) {
    for peer in outcomes {
        for stream in &peer.streams {
            let losses = stream.losses;
            let lost =
                losses.source + losses.uplink + losses.sfu + losses.downlink + losses.unattributed;
            let (delivered, expected) = (stream.frames_delivered, stream.frames_expected);
            world.check(Rule::EnginesAccount, delivered + lost == expected, || {
                format!("{}: {delivered} of {expected}, {losses:?}", stream.ssrc)
            });
            let Some(origin) = stream.origin else {
                continue;
            };
            let publisher = origin.publisher;
            let source = &world.sessions[publisher as usize];
            let is_thrown_out = source.is_thrown_out;
            let mutes = |act: &Act| matches!(act, Act::Mute { video: false, .. });
            let is_steady = !source.person.acts.iter().any(|(_, act)| mutes(act));
            let receiver = &world.sessions[peer.participant as usize];
            let stays = receiver.stage == Stage::In || receiver.is_thrown_out;
            let is_touched = receiver
                .announced
                .get(&stream.ssrc)
                .is_none_or(|announced| receiver.client.touched.contains(&announced.track_sid));
            world.check(
                Rule::SourcesOwe,
                is_thrown_out || losses.source == 0,
                || format!("session {publisher} was not thrown out, and owes {losses:?}"),
            );
            if stream.kind != Kind::Audio || !is_steady || !stays || is_touched || !is_thrown_out {
                continue;
            }
            let (roster, end) = (world.roster.clone(), Time::ZERO + ACTIVE);
            let began = roster.published_at(origin).unwrap();
            let interval = roster.frame_interval(origin, 0);
            let slots = (end.since(began).as_micros() / interval.as_micros()) as u64 + 1;
            let made = u64::from(roster.frames(origin, 0));
            world.check(Rule::SourcesOwe, made + losses.source == slots, || {
                format!("session {publisher} made {made} of {slots} frames, and owes {losses:?}")
            });
        }
    }
}

/// Returns whether something of a stream ought to have come by now: everything that it needs has
/// been there for longer than links can be dead.
fn is_awaited(world: &World, receiver: &Session, ssrc: Ssrc, kind: Kind) -> bool {
    let Some(announced) = receiver.announced.get(&ssrc) else {
        return false;
    };
    let Some(publisher) = world.publisher_of(receiver.person.index as usize, ssrc) else {
        return false;
    };
    let (Some(up), Some(sends)) = (
        receiver.connected[announced.half as usize],
        publisher.connected[0],
    ) else {
        return false;
    };
    let worse_for = publisher.person.up.worse_for() + receiver.person.down.worse_for();
    let ready = announced.at.max(up).max(sends) + worse_for + PATIENCE;
    ready <= Time::ZERO + ACTIVE && is_undisturbed(receiver, ssrc) && is_steady(publisher, kind)
}

/// Returns whether the session was there to the end and asked for nothing about this stream.
fn is_undisturbed(session: &Session, ssrc: Ssrc) -> bool {
    let touched = session
        .announced
        .get(&ssrc)
        .is_none_or(|announced| session.client.touched.contains(&announced.track_sid));
    !touched && session.stage == Stage::In
}

/// Returns whether the session was there to the end and muted nothing of this kind.
fn is_steady(session: &Session, kind: Kind) -> bool {
    let mutes =
        |act: &Act| matches!(act, Act::Mute { video, .. } if *video == (kind == Kind::Video));
    session.stage == Stage::In && !session.person.acts.iter().any(|(_, act)| mutes(act))
}

/// Checks that everybody who has joined is in, and that the routers have what the lobby asked for.
fn check_presence(world: &mut World) {
    let expected = world.expected_in_routers();
    let mut total = RouterStatistics::default();
    world
        .routers
        .iter()
        .for_each(|router| total.merge(&router.statistics()));
    let found = (total.transports, total.tracks, total.subscriptions);
    world.check(Rule::AllArePresent, found == expected, || {
        format!("connections, tracks and subscriptions: routers have {found:?}, the lobby asked for {expected:?}")
    });
    for index in 0..world.sessions.len() {
        let session = &world.sessions[index];
        if session.stage != Stage::In {
            continue;
        }
        let (single, publishes, subscribes) = (
            session.person.single,
            !session.client.tracks.is_empty(),
            session.person.subscribes,
        );
        let needed = [single || publishes, !single && subscribes];
        let up = needed
            .iter()
            .zip(&session.connected)
            .all(|(needed, at)| !needed || at.is_some());
        let worse_for = session.person.up.worse_for() + session.person.down.worse_for();
        let is_late = session.person.joins_at + CONNECT_PATIENCE + worse_for * 3 <= world.now;
        world.check(Rule::AllArePresent, up || !is_late, || {
            format!("session {index} is not connected")
        });
    }
}

fn check_witnesses(world: &mut World) {
    let mut fates = Fates::default();
    for index in 0..world.sessions.len() {
        let Receiver::Witness(witness) = &world.sessions[index].receiver else {
            continue;
        };
        let found = witness.fates();
        fates = Fates {
            taken: fates.taken + found.taken,
            repeated: fates.repeated + found.repeated,
            unread: fates.unread + found.unread,
            broken: fates.broken + found.broken,
        };
        let mut said = Vec::new();
        for stream in witness.streams() {
            let reader = Reader {
                world,
                session: &world.sessions[index],
                stream,
            };
            let complaint = match stream.kind {
                Kind::Audio => reader.check_audio(),
                Kind::Video => reader.check_video(),
            };
            said.extend(complaint.err().map(|complaint| {
                format!(
                    "witness {index}, {:?} {:#x}: {complaint}",
                    stream.kind, stream.ssrc.0
                )
            }));
        }
        for complaint in said {
            world.check(Rule::FramesDecode, false, || complaint);
        }
    }
    let came = world.tally.rtp_to_witnesses;
    let sum = fates.taken + fates.repeated + fates.unread + fates.broken;
    world.check(
        Rule::WitnessesAccount,
        came == sum && fates.broken == 0,
        || format!("{came} packets came to witnesses: {fates:?}"),
    );
}

/// Reads one stream of a witness as a decoder would.
struct Reader<'a> {
    world: &'a World,
    session: &'a Session,
    stream: &'a Stream,
}

/// Packets with the same timestamp.
struct Frame<'a> {
    first: u64,
    last: u64,
    packets: Vec<(Vp8Descriptor, &'a [u8], bool)>,
    rtp_time: u32,
}

/// A whole frame of known origin.
struct Known {
    place: Place,
    identity: FrameIdentity,
}

impl Reader<'_> {
    /// Checks that every packet is one frame of one publisher, and that time goes on as the
    /// publisher's did, over all pauses.
    fn check_audio(&self) -> Result<(), String> {
        self.check_numbers()?;
        let mut before: Option<(u64, u32, FrameIdentity)> = None;
        for (number, kept) in &self.stream.packets {
            if kept.payload.is_empty() {
                continue;
            }
            if !clips().has_audio(&kept.payload) {
                return Err(format!("packet {number} is none that anybody published"));
            }
            let identity =
                FrameIdentity::parse_audio(&kept.payload).ok_or("a packet without identity")?;
            self.check_origin(&identity)?;
            if let Some((last, rtp_time, last_identity)) = before {
                let frames = i64::from(identity.frame) - i64::from(last_identity.frame);
                if frames <= 0 || identity.origin != last_identity.origin {
                    return Err(format!(
                        "frame {} of {:?} follows {last_identity:?}",
                        identity.frame, identity.origin
                    ));
                }
                self.check_time(
                    kept.rtp_time.wrapping_sub(rtp_time),
                    &last_identity,
                    &identity,
                    AUDIO_TICKS_PER_MS,
                    SLOT_ROUNDING_MS,
                )?;
                // Without pauses, one number stands for one frame.
                let steady = self.is_steady(&identity);
                if steady && (number - last) as i64 != frames {
                    return Err(format!(
                        "packets {last} and {number} are {frames} frames apart"
                    ));
                }
            }
            before = Some((*number, kept.rtp_time, identity));
        }
        Ok(())
    }

    /// Checks that frames that follow each other without a hole can be decoded one after the other,
    /// and that picture ids and timestamps agree.
    fn check_video(&self) -> Result<(), String> {
        self.check_numbers()?;
        let (frames, fillers) = self.frames()?;
        let mut decoder: Option<Known> = None;
        let mut before: Option<&Frame<'_>> = None;
        for frame in &frames {
            let adjoins = before.is_some_and(|before| {
                (before.last + 1..frame.first).all(|number| fillers.contains(&number))
            });
            let picture = frame.picture_id().ok_or_else(|| {
                format!("packets of {}.. differ in their picture ids", frame.first)
            })?;
            if let Some(before) = before {
                let ahead = frame.rtp_time.wrapping_sub(before.rtp_time) as i32;
                let pictures = picture.wrapping_sub(before.picture_id().unwrap_or(0)) & 0x7FFF;
                if ahead <= 0 || (adjoins && pictures != 1) || !(1..0x4000).contains(&pictures) {
                    return Err(format!(
                        "at {} time goes on by {ahead} and pictures by {pictures}",
                        frame.first
                    ));
                }
            }
            let known = self.recognize(frame)?;
            let starts = frame.packets[0].0.starts_frame();
            if adjoins && !starts {
                return Err(format!(
                    "what follows at {} is no frame's begin",
                    frame.first
                ));
            }
            let key = starts
                && frame.packets[0]
                    .1
                    .first()
                    .is_some_and(|first| first & 1 == 0);
            if before.is_none() && !key && self.is_whole_link() {
                return Err("the first frame is no key frame".into());
            }
            let continues = adjoins && !key;
            if continues && before.is_some_and(|before| !before.ends()) {
                return Err(format!(
                    "the frame at {} follows one that was cut off, and is no key frame",
                    frame.first
                ));
            }
            if let (true, Some(known), Some(last)) = (continues, &known, &decoder) {
                let next = (last.place.position + 1) % clips().video_len(last.place.layer);
                if (known.place.layer, known.place.position) != (last.place.layer, next) {
                    return Err(format!(
                        "{:?} follows {:?} without a hole",
                        known.place, last.place
                    ));
                }
            }
            if let (Some(known), Some(last), Some(before)) = (&known, &decoder, before) {
                let error = if known.place.layer == last.place.layer {
                    SLOT_ROUNDING_MS
                } else {
                    SWITCH_ERROR_MS
                };
                self.check_time(
                    frame.rtp_time.wrapping_sub(before.rtp_time),
                    &last.identity,
                    &known.identity,
                    VIDEO_TICKS_PER_MS,
                    error,
                )?;
            }
            decoder = match known {
                Some(known) if key || (adjoins && decoder.is_some()) => Some(known),
                _ => None,
            };
            before = Some(frame);
        }
        Ok(())
    }

    /// Checks that no number stands for two packets and that, if neither this link nor the
    /// publisher's loses anything, no number is missing.
    fn check_numbers(&self) -> Result<(), String> {
        if self.stream.contradictions > 0 {
            return Err(format!(
                "{} numbers were given to two packets",
                self.stream.contradictions
            ));
        }
        let numbers = self.stream.packets.keys();
        let (Some(first), Some(last)) = (numbers.clone().next(), numbers.clone().last()) else {
            return self.check_silence();
        };
        let holes = last - first + 1 - self.stream.packets.len() as u64;
        let origin = self
            .stream
            .packets
            .values()
            .find_map(|kept| self.identity(kept));
        let publisher =
            origin.and_then(|identity| self.world.sessions.get(identity.origin.publisher as usize));
        let lossless = self.is_whole_link()
            && publisher.is_some_and(|publisher| publisher.person.up.is_perfect());
        if lossless && holes > 0 {
            return Err(format!(
                "{holes} of {} numbers are missing, and nothing was lost",
                last - first + 1
            ));
        }
        Ok(())
    }

    fn check_silence(&self) -> Result<(), String> {
        let expected = !self.stream.ended
            && is_awaited(self.world, self.session, self.stream.ssrc, self.stream.kind);
        if expected {
            Err("nothing ever came".into())
        } else {
            Ok(())
        }
    }

    fn is_whole_link(&self) -> bool {
        self.session.person.down.is_perfect()
    }

    fn identity(&self, kept: &Kept) -> Option<FrameIdentity> {
        match self.stream.kind {
            Kind::Audio => FrameIdentity::parse_audio(&kept.payload),
            Kind::Video => kept
                .marker
                .then(|| FrameIdentity::parse_video(&kept.payload))
                .flatten(),
        }
    }

    fn is_steady(&self, identity: &FrameIdentity) -> bool {
        let publisher = &self.world.sessions[identity.origin.publisher as usize];
        let mutes = publisher
            .person
            .acts
            .iter()
            .any(|(_, act)| matches!(act, Act::Mute { .. }));
        !mutes && !self.session.client.touched.contains(&self.stream.track_sid)
    }

    /// Checks that the frame is of this run, of this room, and of the publisher of the track that
    /// the description named.
    fn check_origin(&self, identity: &FrameIdentity) -> Result<(), String> {
        let origin = self
            .world
            .sessions
            .get(identity.origin.publisher as usize)
            .filter(|_| identity.run == RUN);
        let origin = origin.ok_or_else(|| format!("a frame of nobody: {identity:?}"))?;
        let of_track = origin
            .client
            .tracks
            .iter()
            .any(|track| track.sid.as_deref() == Some(&self.stream.track_sid));
        if origin.person.room == self.session.person.room && of_track {
            Ok(())
        } else {
            Err(format!("a frame of another track: {identity:?}"))
        }
    }

    /// Checks that timestamps advance between two frames as the moments do that the frames were
    /// intended for.
    fn check_time(
        &self,
        ticks: u32,
        from: &FrameIdentity,
        to: &FrameIdentity,
        ticks_per_ms: i64,
        error_ms: i64,
    ) -> Result<(), String> {
        let meant_us = to.intended_unix_us as i64 - from.intended_unix_us as i64;
        let error = i64::from(ticks as i32) * 1_000 - meant_us * ticks_per_ms;
        if error.abs() <= error_ms * ticks_per_ms * 1_000 + 1_000 {
            return Ok(());
        }
        Err(format!(
            "from frame {} of layer {} to frame {} of layer {}: {} ms by their timestamps, {} ms as they were meant",
            from.frame,
            from.layer,
            to.frame,
            to.layer,
            i64::from(ticks as i32) / ticks_per_ms,
            meant_us / 1_000
        ))
    }

    /// Returns the packets by timestamp, and the numbers of packets that hold nothing.
    fn frames(&self) -> Result<(Vec<Frame<'_>>, std::collections::BTreeSet<u64>), String> {
        let mut frames: Vec<Frame<'_>> = Vec::new();
        let mut fillers = std::collections::BTreeSet::new();
        for (number, kept) in &self.stream.packets {
            if kept.payload.is_empty() {
                fillers.insert(*number);
                continue;
            }
            let (descriptor, len) =
                Vp8Descriptor::parse(&kept.payload).ok_or("no VP8 descriptor")?;
            let packet = (descriptor, &kept.payload[len..], kept.marker);
            match frames.last_mut() {
                Some(frame) if frame.rtp_time == kept.rtp_time => {
                    frame.last = *number;
                    frame.packets.push(packet);
                }
                _ => frames.push(Frame {
                    first: *number,
                    last: *number,
                    packets: vec![packet],
                    rtp_time: kept.rtp_time,
                }),
            }
        }
        Ok((frames, fillers))
    }

    /// Returns the frame's place in its publisher's clip, which its bytes tell, or `None` if a part
    /// of the frame is missing.
    fn recognize(&self, frame: &Frame<'_>) -> Result<Option<Known>, String> {
        if !frame.is_whole() {
            return Ok(None);
        }
        let mut bytes: Vec<u8> = frame
            .packets
            .iter()
            .flat_map(|(_, payload, _)| payload.iter().copied())
            .collect();
        let identity = FrameIdentity::parse_video(&bytes)
            .ok_or_else(|| format!("the frame at {} has no identity", frame.first))?;
        self.check_origin(&identity)?;
        bytes.truncate(bytes.len() - VIDEO_TRAILER_LEN);
        let place = clips().find_video(&bytes).ok_or_else(|| {
            format!(
                "the frame at {} is none that anybody published",
                frame.first
            )
        })?;
        let simulcast = self.world.sessions[identity.origin.publisher as usize]
            .client
            .tracks
            .iter()
            .any(|track| track.ssrcs.len() > 1);
        let layer = if simulcast { identity.layer } else { 2 };
        if place.layer != layer {
            return Err(format!(
                "the frame at {} is of layer {}, and says {layer}",
                frame.first, place.layer
            ));
        }
        Ok(Some(Known { place, identity }))
    }
}

impl Frame<'_> {
    /// Returns whether the frame begins, ends, and has all numbers in between.
    fn is_whole(&self) -> bool {
        let complete = self.last - self.first + 1 == self.packets.len() as u64;
        complete && self.packets[0].0.starts_frame() && self.ends()
    }

    fn ends(&self) -> bool {
        self.packets.last().is_some_and(|(.., marker)| *marker)
    }

    /// Returns the picture id, if it is the same in all packets.
    fn picture_id(&self) -> Option<u16> {
        let id = |descriptor: &Vp8Descriptor| descriptor.picture_id.map(PictureId::value);
        let first = id(&self.packets[0].0)?;
        self.packets
            .iter()
            .all(|(descriptor, ..)| id(descriptor) == Some(first))
            .then_some(first)
    }
}

impl World {
    /// Returns the session that publishes the track of a stream that was announced to session
    /// `index`.
    pub fn publisher_of(&self, index: usize, ssrc: Ssrc) -> Option<&Session> {
        let sid = &self.sessions[index].announced.get(&ssrc)?.track_sid;
        let publishes = |session: &&Session| {
            session
                .client
                .tracks
                .iter()
                .any(|track| track.sid.as_ref() == Some(sid))
        };
        self.sessions.iter().find(publishes)
    }
}

fn account(world: &World, record: &Record) -> Account {
    let mut numbers = Vec::new();
    for (name, media) in [("audio", &record.audio), ("video", &record.video)] {
        numbers.extend(
            media
                .counters()
                .map(|(counter, count)| (format!("{name}.{counter}"), count)),
        );
        for (histogram, values) in media.histograms() {
            numbers.extend(digest_of(&format!("{name}.{histogram}"), values));
        }
    }
    // Keys make DTLS records a byte longer or shorter, so bytes on the wire are left out.
    let counters = record
        .session
        .counters()
        .filter(|(name, _)| !name.starts_with("wire_bytes"));
    numbers.extend(counters.map(|(counter, count)| (format!("session.{counter}"), count)));
    for (histogram, values) in record.session.histograms() {
        numbers.extend(digest_of(&format!("session.{histogram}"), values));
    }
    numbers.extend(
        record
            .engine
            .counters()
            .map(|(counter, count)| (format!("engine.{counter}"), count)),
    );
    for (what, count) in [
        ("sessions resumed", world.tally.sessions_resumed),
        ("sessions replaced", world.tally.sessions_replaced),
        ("thrown out", world.tally.thrown_out),
        ("ICE restarts", world.tally.ice_restarts),
        ("packets for subscribers", world.tally.fan_out),
    ] {
        numbers.push((format!("world.{what}"), count));
    }
    for (index, router) in world.routers.iter().enumerate() {
        let statistics = router.statistics();
        let counters = statistics
            .counters()
            .filter(|(name, _)| !matches!(*name, "bytes_in" | "bytes_out"));
        numbers
            .extend(counters.map(|(counter, count)| (format!("router {index}.{counter}"), count)));
    }
    Account {
        digest: world.digest,
        numbers,
    }
}

fn digest_of(name: &str, histogram: &throng::measure::Histogram) -> Vec<(String, u64)> {
    let values = [
        ("count", Some(histogram.count())),
        ("min", histogram.min()),
        ("median", histogram.quantile(0.5)),
        ("max", histogram.max()),
        (
            "mean in ns",
            histogram.mean().map(|mean| (mean * 1_000.0) as u64),
        ),
    ];
    let known = values
        .into_iter()
        .filter_map(|(what, value)| Some((what, value?)));
    known
        .map(|(what, value)| (format!("{name} {what}"), value))
        .collect()
}
