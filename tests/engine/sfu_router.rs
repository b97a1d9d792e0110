//! Tests of the embedded SFU's router between our own shards. What it forwards, repairs and counts
//! is compared with the link's log and the subscribers' own accounts.

use crate::common::relay;
use std::collections::BTreeSet;
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use crate::common::hand::{
    Got, Hands, MID_ID, Out, REPAIRED_RID_ID, RID_ID, Said, TRANSPORT_CC_ID,
};
use crate::common::link::{Conditions, Random};
use crate::common::pair::{audio, video};
use crate::common::relay::{AUDIO_LEVEL_ID, Relay};
use throng::codec::vp8::{PictureId, Vp8Descriptor};
use throng::codec::{Codec, PayloadTypes};
use throng::engine::publisher::Pacing;
use throng::measure::Kind;
use throng::sfu::statistics::RouterStatistics;
use throng::sfu::{
    Encodings, MediaCommand, MediaEvent, Selection, SendMode, SubscriptionId,
    SubscriptionParameters, TrackId, TrackParameters, TransportId, TransportParameters,
};
use throng::transport::peer::{IceCredentials, Peer, PeerFailure, PeerParameters};
use throng::transport::rtcp::{DlrrBlock, ReportBlock, SenderInfo};
use throng::transport::sdp::{Extension, ExtensionIds};
use throng::transport::sequence::Seq;
use throng::units::{Time, ntp_middle};

const PERFECT: Conditions = Conditions {
    loss: 0.0,
    duplication: 0.0,
    delay: Duration::from_millis(5),
    jitter: Duration::ZERO,
};

/// Asserts that every datagram that arrived is counted once, by what became of it.
fn assert_all_accounted_for(statistics: &RouterStatistics) {
    let refused: u64 = statistics
        .counters()
        .filter(|(name, _)| name.starts_with("refused_"))
        .map(|(_, count)| count)
        .sum();
    let taken = statistics.setup_in
        + statistics.rtcp_in
        + statistics.media_in
        + statistics.repairs_in
        + statistics.probes_in;
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
            for (sent, received) in [
                (&records[0].audio, &subscriber.audio),
                (&records[0].video, &subscriber.video),
            ] {
                assert!(received.tracks_live == 1 && sent.frames_sent > 70);
                assert_eq!(received.frames_delivered, sent.frames_sent);
                assert_eq!(received.packets_received, sent.packets_sent);
                assert_eq!(
                    (received.packets_lost_network, received.frames_duplicate),
                    (0, 0)
                );
                // Two legs of 5 ms, and up to a millisecond for the tick of each client.
                let latency = received.one_way_latency.quantile(0.5).unwrap();
                assert!(send == SendMode::Gso || latency < 30_000, "{latency}");
            }
            assert!(
                subscriber.session.rtt_rtcp.count() > 0,
                "reports make a round trip"
            );
        }
        assert!(records[0].session.rtt_rtcp.count() > 0);
        let statistics = relay.router.statistics();
        assert_all_accounted_for(&statistics);
        assert_eq!(
            statistics.media_in,
            records[0].audio.packets_sent + records[0].video.packets_sent
        );
        assert_eq!(statistics.media_out, 2 * statistics.media_in);
        let frames = records[0].audio.frames_sent + records[0].video.frames_sent;
        match send {
            SendMode::Plain => assert_eq!(statistics.media_sends_out, statistics.media_out),
            SendMode::Gso => assert_eq!(
                statistics.media_sends_out,
                2 * frames,
                "a send a frame and subscriber"
            ),
        }
        assert_eq!(statistics.refused_unknown_ufrag, 0);
        assert_eq!(
            (statistics.datagrams_in, statistics.datagrams_out),
            (relay.router_in, relay.router_out)
        );
        let started = relay
            .events
            .iter()
            .filter(|event| matches!(event, MediaEvent::TrackStarted { .. }))
            .count();
        assert_eq!(started, 2);
    }
}

#[test]
fn loss_on_both_legs_is_repaired_and_every_count_is_the_links() {
    for seed in 0..4 {
        let mut relay = Relay::connected(
            3,
            if seed % 2 == 0 {
                SendMode::Plain
            } else {
                SendMode::Gso
            },
            false,
            seed,
        );
        let audio_track = relay.publish(0, &audio(), Pacing::Paced);
        let video_track = relay.publish(0, &video(), Pacing::Paced);
        let mut streams = Vec::new();
        for client in [1, 2] {
            let (subscription, ssrc, _) = relay.subscribe(client, audio_track, Kind::Audio);
            streams.push((client, Kind::Audio, subscription, ssrc, None));
            let (subscription, ssrc, rtx_ssrc) = relay.subscribe(client, video_track, Kind::Video);
            streams.push((client, Kind::Video, subscription, ssrc, rtx_ssrc));
        }
        // The first reports give the round trips that the timing of repair depends on.
        relay.link.conditions = PERFECT;
        relay.run_for(Duration::from_secs(2));
        relay.link.conditions = Conditions {
            loss: 0.05,
            duplication: 0.01,
            delay: Duration::from_millis(10),
            jitter: Duration::from_millis(3),
        };
        relay.run_for(Duration::from_secs(8));
        // Nobody would notice the loss of the last packets, so none of them is lost.
        relay.link.conditions = PERFECT;
        relay.run_for(Duration::from_millis(500));
        let records = relay.finish();
        let statistics = relay.router.statistics();
        assert_all_accounted_for(&statistics);
        assert_eq!(
            (statistics.datagrams_in, statistics.datagrams_out),
            (relay.router_in, relay.router_out),
            "seed {seed}"
        );
        for (track, kind, ssrc, sent) in [
            (audio_track, Kind::Audio, 0x1000_0000, &records[0].audio),
            (video_track, Kind::Video, 0x1000_0010, &records[0].video),
        ] {
            let encoding = relay.router.track_statistics(track).unwrap()[0];
            let leg = relay.leg(0, true, Ssrc(ssrc));
            // Audio is retransmitted on its own SSRC.
            let resent = if kind == Kind::Audio {
                sent.rtx_sent
            } else {
                0
            };
            assert_eq!(leg.sent, sent.packets_sent + resent);
            assert_eq!(encoding.counts.expected, sent.packets_sent, "seed {seed}");
            assert_eq!(encoding.counts.lost, 0, "seed {seed}: repaired");
            assert!(
                encoding.counts.repaired > 5 && encoding.nacks_sent > 5,
                "seed {seed}"
            );
        }
        for (client, kind, subscription, ssrc, rtx_ssrc) in streams {
            let (received, sent) = match kind {
                Kind::Audio => (&records[client].audio, &records[0].audio),
                Kind::Video => (&records[client].video, &records[0].video),
            };
            assert_eq!(
                received.frames_delivered, sent.frames_sent,
                "seed {seed} {kind:?}"
            );
            assert_eq!(
                (received.packets_lost, received.frames_duplicate),
                (0, 0),
                "seed {seed} {kind:?}"
            );
            assert!(received.packets_repaired > 5, "seed {seed} {kind:?}");
            let counted = relay.router.subscription_statistics(subscription).unwrap();
            let (media, rtx) = (
                relay.leg(client, false, ssrc),
                rtx_ssrc.map(|ssrc| relay.leg(client, false, ssrc).sent),
            );
            assert_eq!(
                counted.packets + counted.resends,
                media.sent + rtx.unwrap_or(0),
                "seed {seed} {kind:?}"
            );
            assert!(
                rtx.is_none_or(|rtx| rtx == counted.resends && rtx > 5),
                "seed {seed} {kind:?}"
            );
            assert_eq!(
                counted.packets, sent.packets_sent,
                "seed {seed} {kind:?}: each number once"
            );
            assert!(
                counted
                    .rtt
                    .is_some_and(|rtt| (10..=40).contains(&rtt.as_millis())),
                "{:?}",
                counted.rtt
            );
        }
    }
}

#[test]
fn a_subscriber_who_comes_late_asks_for_a_key_frame_and_gets_nothing_before_it() {
    let mut relay = Relay::connected(2, SendMode::Plain, false, 5);
    relay.link.conditions = PERFECT;
    let track = relay.publish(0, &video(), Pacing::Paced);
    relay.run_for(Duration::from_secs(2));
    relay.keep = true;
    let subscribed_at = relay.now;
    let (subscription, ..) = relay.subscribe(1, track, Kind::Video);
    relay.run_for(Duration::from_secs(2));
    let records = relay.finish();
    let video = &records[1].video;
    // The delay is one way for the request, a frame interval of 66.7 ms, two ways for the key
    // frame, and the time over which the key frame is paced.
    let first = video.first_frame.max().unwrap();
    assert!(
        relay.kept[0].0.since(subscribed_at) < Duration::from_millis(90),
        "{first}"
    );
    assert_eq!(
        video.freezes, 0,
        "what came was decodable from its first frame on"
    );
    let counted = relay.router.subscription_statistics(subscription).unwrap();
    assert_eq!(video.packets_received, counted.packets);
    assert_eq!(relay.router.statistics().plis_out, 1);
    assert!(relay.router.statistics().withheld_key_frame > 0);
}

// From here on, the packets are made by hand.

const AUDIO: TrackId = TrackId(1);
const VIDEO: TrackId = TrackId(2);
const SUBSCRIPTION: SubscriptionId = SubscriptionId(1);
const OUT_SSRC: u32 = 0x2000_0001;
const OUT_RTX_SSRC: u32 = 0x2000_0002;
const RIDS: [&[u8]; 3] = [b"q", b"h", b"f"];

fn all_extensions() -> ExtensionIds {
    [
        (Extension::AudioLevel, AUDIO_LEVEL_ID),
        (Extension::Mid, MID_ID),
        (Extension::Rid, RID_ID),
        (Extension::RepairedRid, REPAIRED_RID_ID),
        (Extension::TransportCc, TRANSPORT_CC_ID),
    ]
    .into_iter()
    .collect()
}

fn add_track(hands: &mut Hands, track: TrackId, kind: Kind, encodings: Encodings) {
    hands.command(MediaCommand::AddTrack {
        transport: TransportId(0),
        track,
        parameters: Box::new(TrackParameters {
            payloads: PayloadTypes::of(Codec::default_of(kind), 96),
            mid: "0".into(),
            rtx_payload_type: (kind == Kind::Video).then_some(97),
            extensions: all_extensions(),
            nack: true,
            transport_cc: true,
            encodings,
        }),
    });
}

fn simulcast() -> Encodings {
    Encodings::Rids(["q", "h", "f"].map(Into::into).to_vec())
}

fn subscribe(hands: &mut Hands, track: TrackId, rtx: bool, selection: Selection) {
    subscribe_as(hands, SUBSCRIPTION, track, rtx, selection);
}

fn subscribe_as(
    hands: &mut Hands,
    subscription: SubscriptionId,
    track: TrackId,
    rtx: bool,
    selection: Selection,
) {
    hands.command(MediaCommand::Subscribe {
        subscription,
        transport: TransportId(1),
        track,
        parameters: Box::new(SubscriptionParameters {
            ssrc: Ssrc(OUT_SSRC),
            rtx_ssrc: rtx.then_some(Ssrc(OUT_RTX_SSRC)),
            payloads: PayloadTypes::of(if rtx { Codec::Vp8 } else { Codec::Opus }, 110),
            rtx_payload_type: rtx.then_some(111),
            extensions: [(Extension::AudioLevel, 7)].into_iter().collect(),
            selection,
        }),
    });
}

const fn wants(layer: u8) -> Selection {
    Selection {
        enabled: true,
        layer,
    }
}

/// A publisher of simulcast whose packets are made by hand: 30 frames a second, `packets` a frame
/// on each layer, and key frames when told.
struct Camera {
    frame: u32,
    seqs: [u16; 3],
    rtp_offsets: [u32; 3],
    picture_ids: [u16; 3],
    packets: usize,
    /// Layers that are sent.
    on: [bool; 3],
    key: [bool; 3],
    /// Packets `(layer, seq)` that are to be lost. `lost` has those that were.
    lose: BTreeSet<(usize, u16)>,
    lost: Vec<(usize, u16, u32, bool, Vec<u8>)>,
}

fn camera_ssrc(layer: usize) -> Ssrc {
    Ssrc(0x1000 + layer as u32 * 16)
}

impl Camera {
    fn new() -> Camera {
        Camera {
            frame: 0,
            seqs: [65_500, 100, 30_000],
            rtp_offsets: [0xFFFF_F000, 77, 1 << 31],
            picture_ids: [32_760, 5, 1_000],
            packets: 3,
            on: [true; 3],
            key: [true; 3],
            lose: BTreeSet::new(),
            lost: Vec::new(),
        }
    }

    fn rtp_time(&self, layer: usize) -> u32 {
        self.rtp_offsets[layer].wrapping_add(self.frame * 3_000)
    }

    /// Sends a frame on each layer that is on. The bytes behind the descriptor say whether it is a
    /// key frame, and name layer, packet and frame.
    fn shoot(&mut self, hands: &mut Hands) {
        for (layer, rid) in RIDS.into_iter().enumerate() {
            if !self.on[layer] {
                continue;
            }
            let key = std::mem::take(&mut self.key[layer]);
            for packet in 0..self.packets {
                let descriptor = Vp8Descriptor {
                    start_of_partition: packet == 0,
                    picture_id: Some(PictureId::Long(self.picture_ids[layer])),
                    tl0_pic_idx: Some(self.frame as u8),
                    tid: Some(0),
                    key_idx: Some(3),
                    ..Vp8Descriptor::default()
                };
                let mut payload = vec![0; 6];
                let len = descriptor.write(&mut payload).unwrap();
                payload.truncate(len);
                payload.push(u8::from(!(key && packet == 0)));
                payload.extend([layer as u8, packet as u8]);
                payload.extend(self.frame.to_be_bytes());
                let (seq, rtp_time, marker) = (
                    self.seqs[layer],
                    self.rtp_time(layer),
                    packet + 1 == self.packets,
                );
                self.seqs[layer] = seq.wrapping_add(1);
                if self.lose.remove(&(layer, seq)) {
                    self.lost.push((layer, seq, rtp_time, marker, payload));
                    continue;
                }
                let out = Out {
                    ssrc: camera_ssrc(layer),
                    payload_type: 96,
                    seq,
                    rtp_time,
                    marker,
                    extensions: &[(MID_ID, b"0"), (RID_ID, rid)],
                    padding: 0,
                };
                hands.send(0, &out, &payload);
            }
            self.picture_ids[layer] = (self.picture_ids[layer] + 1) & 0x7FFF;
            hands.flush();
        }
        self.frame += 1;
        hands.run_for(Duration::from_millis(33));
    }

    fn report(&self, hands: &mut Hands) {
        let ntp = hands.epoch.ntp(hands.now) + (1_000 << 32);
        for layer in 0..3 {
            let rtp_time = self.rtp_time(layer);
            hands.say(0, |writer| {
                let info = SenderInfo {
                    ssrc: camera_ssrc(layer),
                    ntp,
                    rtp_time,
                    ..SenderInfo::default()
                };
                writer.sender_report(&info, []).unwrap();
            });
        }
    }

    fn resend_lost(&mut self, hands: &mut Hands, rtx_seqs: &mut [u16; 3]) {
        for (layer, seq, rtp_time, marker, payload) in std::mem::take(&mut self.lost) {
            let out = Out {
                ssrc: Ssrc(camera_ssrc(layer).0 + 1),
                payload_type: 97,
                seq: rtx_seqs[layer],
                rtp_time,
                marker,
                extensions: &[(MID_ID, b"0"), (REPAIRED_RID_ID, RIDS[layer])],
                padding: 0,
            };
            rtx_seqs[layer] += 1;
            hands.send(0, &out, &[&seq.to_be_bytes()[..], &payload].concat());
        }
        hands.flush();
    }
}

fn layer_frame_packet(got: &Got) -> (u8, u32, u8) {
    let (_, vp8) = got.vp8();
    (
        vp8[1],
        u32::from_be_bytes(vp8[3..7].try_into().unwrap()),
        vp8[2],
    )
}

/// Asserts that sequence numbers have no hole, that picture ids and TL0PICIDX advance by one a
/// picture, and that timestamps advance by whole frames, or by 1 where a switch brings one frame
/// from two layers.
fn assert_continuous(got: &[Got]) {
    for pair in got.windows(2) {
        let [before, after] = pair else {
            unreachable!()
        };
        assert_eq!(after.index, before.index + 1);
        let new_picture = before.marker;
        assert_eq!(
            (after.picture_id().wrapping_sub(before.picture_id())) & 0x7FFF,
            u16::from(new_picture)
        );
        let tl0 = |got: &Got| got.vp8().0.tl0_pic_idx.unwrap();
        assert_eq!(tl0(after).wrapping_sub(tl0(before)), u8::from(new_picture));
        let step = match (
            new_picture,
            layer_frame_packet(before),
            layer_frame_packet(after),
        ) {
            (false, ..) => 0,
            (true, (old, frame, _), (new, same, _)) if frame == same && old != new => 1,
            (true, ..) => 3_000,
        };
        assert_eq!(
            after.rtp_time.wrapping_sub(before.rtp_time),
            step,
            "{:?}",
            layer_frame_packet(after)
        );
        assert_eq!((after.ssrc, after.payload_type), (Ssrc(OUT_SSRC), 110));
        assert!(
            after.extensions.is_empty(),
            "mid and rid are the publisher's own"
        );
    }
}

#[test]
fn a_stream_goes_on_without_a_seam_over_switches_between_simulcast_layers() {
    let mut hands = Hands::connected(2, SendMode::Plain);
    add_track(&mut hands, VIDEO, Kind::Video, simulcast());
    subscribe(&mut hands, VIDEO, true, wants(0));
    let mut camera = Camera::new();
    camera.shoot(&mut hands);
    camera.report(&mut hands);
    for _ in 0..30 {
        camera.shoot(&mut hands);
    }
    let layers_of = |got: &[Got]| {
        got.iter()
            .map(|got| layer_frame_packet(got).0)
            .collect::<BTreeSet<u8>>()
    };
    assert_eq!(hands.hands[1].got.len(), 31 * 3);
    assert_eq!(layers_of(&hands.hands[1].got), [0].into());
    let set = |hands: &mut Hands, layer| {
        hands.command(MediaCommand::SetSelection {
            subscription: SUBSCRIPTION,
            selection: wants(layer),
        });
    };
    let plis = |hands: &Hands, layer| {
        hands.hands[0]
            .heard(|said| {
                *said
                    == Said::Pli {
                        media_ssrc: camera_ssrc(layer),
                    }
            })
            .len()
    };
    for layer in [2, 1, 0, 1] {
        let (before, plis_before) = (hands.hands[1].got.len(), plis(&hands, layer));
        set(&mut hands, layer as u8);
        for _ in 0..4 {
            camera.shoot(&mut hands);
        }
        assert!(
            plis(&hands, layer) > plis_before || layer == 1,
            "the publisher is asked for a key frame of the new layer"
        );
        let old = layers_of(&hands.hands[1].got[before..]);
        assert_eq!(
            old.len(),
            1,
            "the old layer goes on until the new one's key frame"
        );
        camera.key[layer] = true;
        for _ in 0..35 {
            camera.shoot(&mut hands);
        }
        let got = &hands.hands[1].got[before..];
        let switched = got
            .iter()
            .position(|got| layer_frame_packet(got).0 == layer as u8)
            .unwrap();
        assert!((4 * 3..=5 * 3).contains(&switched));
        assert_eq!(layers_of(&got[switched..]), [layer as u8].into());
    }
    let got = &hands.hands[1].got;
    assert_continuous(got);
    // Each frame arrived whole. If a frame brought a higher layer's key frame, it arrived from the
    // lower layer first.
    assert!(
        got.iter()
            .enumerate()
            .all(|(at, got)| layer_frame_packet(got).2 as usize == at % 3)
    );
    let mut frames: Vec<u32> = got
        .chunks(3)
        .map(|frame| layer_frame_packet(&frame[0]).1)
        .collect();
    frames.dedup();
    assert!(frames.iter().copied().eq(0..camera.frame));
    assert_eq!(
        hands
            .router
            .subscription_statistics(SUBSCRIPTION)
            .unwrap()
            .layer_switches,
        4
    );
}

#[test]
fn a_layer_that_stops_is_replaced_and_taken_again_when_it_is_back() {
    let mut hands = Hands::connected(2, SendMode::Plain);
    add_track(&mut hands, VIDEO, Kind::Video, simulcast());
    subscribe(&mut hands, VIDEO, true, wants(2));
    let mut camera = Camera::new();
    let layer_now = |hands: &Hands| {
        hands
            .router
            .subscription_statistics(SUBSCRIPTION)
            .unwrap()
            .layer
    };
    let run = |hands: &mut Hands, camera: &mut Camera, frames| {
        for _ in 0..frames {
            let asked: Vec<usize> = (0..3)
                .filter(|layer| {
                    let wanted = Said::Pli {
                        media_ssrc: camera_ssrc(*layer),
                    };
                    hands.hands[0].said.iter().any(|(_, said)| *said == wanted)
                })
                .collect();
            asked.into_iter().for_each(|layer| camera.key[layer] = true);
            hands.hands[0].said.clear();
            camera.shoot(hands);
        }
    };
    run(&mut hands, &mut camera, 30);
    assert_eq!(layer_now(&hands), Some(2));
    camera.on[2] = false;
    run(&mut hands, &mut camera, 60);
    assert_eq!(layer_now(&hands), Some(1));
    camera.on = [false, false, true];
    run(&mut hands, &mut camera, 60);
    assert_eq!(layer_now(&hands), Some(2), "better a higher one than none");
    camera.on = [true, true, true];
    hands.command(MediaCommand::SetSelection {
        subscription: SUBSCRIPTION,
        selection: wants(0),
    });
    run(&mut hands, &mut camera, 60);
    assert_eq!(layer_now(&hands), Some(0));
    for pair in hands.hands[1].got.windows(2) {
        assert_eq!(pair[1].index, pair[0].index + 1);
        assert!(
            pair[1].rtp_time.wrapping_sub(pair[0].rtp_time) < 90_000,
            "no sender report said how the layers' clocks lie: arrival times do"
        );
    }
}

#[test]
fn what_is_lost_between_publisher_and_router_keeps_its_place_until_it_is_repaired() {
    let mut hands = Hands::connected(2, SendMode::Plain);
    add_track(&mut hands, VIDEO, Kind::Video, simulcast());
    subscribe(&mut hands, VIDEO, true, wants(1));
    let mut camera = Camera::new();
    let mut rtx_seqs = [9, 8, 7];
    for _ in 0..10 {
        camera.shoot(&mut hands);
    }
    hands.hands[1].got.clear();
    camera.key[1] = true;
    camera.shoot(&mut hands);
    let before = hands.hands[1].got.last().unwrap().clone();
    // The middle of one frame, the end of the next, and the start of the one after.
    camera.lose = [
        (1, camera.seqs[1] + 1),
        (1, camera.seqs[1] + 5),
        (1, camera.seqs[1] + 6),
    ]
    .into();
    for _ in 0..3 {
        camera.shoot(&mut hands);
    }
    let lost: Vec<u16> = camera.lost.iter().map(|(_, seq, ..)| *seq).collect();
    let asked: BTreeSet<u16> = hands.hands[0]
        .said
        .iter()
        .filter_map(|(_, said)| match said {
            Said::Nack { media_ssrc, seqs } if *media_ssrc == camera_ssrc(1) => Some(seqs.clone()),
            _ => None,
        })
        .flatten()
        .collect();
    assert_eq!(asked, lost.iter().copied().collect());
    camera.resend_lost(&mut hands, &mut rtx_seqs);
    camera.shoot(&mut hands);
    let mut got = hands.hands[1].got.clone();
    got.retain(|got| got.index > before.index);
    assert!(!got.is_sorted_by_key(|got| got.index), "repairs came late");
    got.sort_by_key(|got| got.index);
    assert_eq!(got.len(), 12);
    assert_continuous(&got);
    assert_eq!(hands.router.statistics().repairs_in, 3);
}

#[test]
fn a_key_frame_whose_first_packet_was_lost_begins_when_it_is_repaired() {
    let mut hands = Hands::connected(2, SendMode::Gso);
    add_track(&mut hands, VIDEO, Kind::Video, simulcast());
    let mut camera = Camera::new();
    let mut rtx_seqs = [9, 8, 7];
    for _ in 0..10 {
        camera.shoot(&mut hands);
    }
    subscribe(&mut hands, VIDEO, true, wants(0));
    camera.key[0] = true;
    camera.lose = [(0, camera.seqs[0])].into();
    camera.shoot(&mut hands);
    camera.shoot(&mut hands);
    assert!(hands.hands[1].got.is_empty());
    camera.resend_lost(&mut hands, &mut rtx_seqs);
    assert_eq!(
        hands.hands[1].got.len(),
        6,
        "with all that had come behind it"
    );
    camera.shoot(&mut hands);
    assert_eq!(hands.hands[1].got.len(), 9);
    assert_continuous(&hands.hands[1].got);
}

#[test]
fn a_frame_is_known_to_be_whole_by_its_marker_and_leaves_with_one_send_however_many_reads_it_took()
{
    let mut hands = Hands::connected(2, SendMode::Gso);
    add_track(&mut hands, VIDEO, Kind::Video, plain(Ssrc(0x55), false));
    subscribe(&mut hands, VIDEO, false, wants(0));
    assert!(!hands.router.is_mid_frame(), "there is nothing yet");
    const PACKETS: u16 = 20;
    for frame in 0..3 {
        for packet in 0..PACKETS {
            let start_of_partition = packet == 0;
            let descriptor = Vp8Descriptor {
                start_of_partition,
                picture_id: Some(PictureId::Long(frame)),
                ..Vp8Descriptor::default()
            };
            let mut payload = [0; 100];
            let len = descriptor.write(&mut payload).unwrap();
            payload[len] = u8::from(frame > 0);
            let out = Out {
                ssrc: Ssrc(0x55),
                payload_type: 96,
                seq: frame * PACKETS + packet,
                rtp_time: u32::from(frame) * 3_000,
                marker: packet + 1 == PACKETS,
                extensions: &[],
                padding: 0,
            };
            hands.send(0, &out, &payload);
            assert_eq!(hands.router.is_mid_frame(), !out.marker);
        }
        hands.flush();
        assert!(!hands.router.is_mid_frame(), "nothing is held back");
    }
    let statistics = hands.router.statistics();
    assert_eq!(
        (statistics.media_out, statistics.media_sends_out),
        (3 * u64::from(PACKETS), 3)
    );
    assert!(
        hands.hands[1]
            .got
            .windows(2)
            .all(|pair| pair[1].index == pair[0].index + 1)
    );
    // Audio has no frame to wait for.
    add_track(&mut hands, AUDIO, Kind::Audio, plain(Ssrc(0x66), false));
    hands.send(
        0,
        &Out {
            ssrc: Ssrc(0x66),
            ..audio_packet(1)
        },
        b"opus",
    );
    assert!(!hands.router.is_mid_frame());
}

fn plain(track_ssrc: Ssrc, rtx: bool) -> Encodings {
    Encodings::Ssrc {
        ssrc: track_ssrc,
        rtx_ssrc: rtx.then_some(Ssrc(track_ssrc.0 + 1)),
    }
}

fn audio_packet(seq: u16) -> Out<'static> {
    Out {
        ssrc: Ssrc(0x55),
        payload_type: 96,
        seq,
        rtp_time: u32::from(seq) * 960,
        marker: false,
        extensions: &[(AUDIO_LEVEL_ID, &[0x85])],
        padding: 0,
    }
}

#[test]
fn padding_leaves_no_hole_and_padding_that_comes_late_fills_its_own() {
    let mut hands = Hands::connected(2, SendMode::Plain);
    add_track(&mut hands, AUDIO, Kind::Audio, plain(Ssrc(0x55), false));
    subscribe(&mut hands, AUDIO, false, wants(0));
    let send = |hands: &mut Hands, seq: u16, padding: u8| {
        let payload: &[u8] = if padding > 0 { &[] } else { b"opus" };
        hands.send(
            0,
            &Out {
                padding,
                ..audio_packet(seq)
            },
            payload,
        );
        hands.flush();
    };
    for seq in [65_533, 65_534] {
        send(&mut hands, seq, 0);
    }
    for seq in [65_535, 0, 1] {
        send(&mut hands, seq, 9);
    }
    send(&mut hands, 2, 0);
    send(&mut hands, 4, 0);
    send(&mut hands, 3, 9);
    send(&mut hands, 6, 9);
    send(&mut hands, 5, 0);
    send(&mut hands, 7, 0);
    let got = &hands.hands[1].got;
    let first = got[0].index;
    let seen: Vec<(u64, usize)> = got
        .iter()
        .map(|got| (got.index - first, got.payload.len()))
        .collect();
    // The packets are 65533, 65534, 2, 4, 3 (late padding), 5, 7. Padding that came in order was
    // dropped, and its numbers with it.
    assert_eq!(
        seen,
        [(0, 4), (1, 4), (2, 4), (4, 4), (3, 0), (5, 4), (6, 4)]
    );
    assert!(
        got.iter()
            .all(|got| got.payload.is_empty() || got.extensions == [(7, vec![0x85])]),
        "the audio level passes through"
    );
    assert_eq!(hands.router.statistics().withheld_empty, 4);
    assert_eq!(hands.router.statistics().media_in_empty, 5);
}

#[test]
fn a_nack_is_answered_three_times_never_in_haste_and_always_with_the_same_packet() {
    for rtx in [false, true] {
        let mut hands = Hands::connected(2, SendMode::Plain);
        let kind = if rtx { Kind::Video } else { Kind::Audio };
        let track = if rtx { VIDEO } else { AUDIO };
        add_track(&mut hands, track, kind, plain(Ssrc(0x55), rtx));
        subscribe(&mut hands, track, rtx, wants(0));
        let key_frame = [0x90, 0x80, 0x85, 0x55, 0, 1, 2, 3];
        for seq in 0..20 {
            hands.send(
                0,
                &Out {
                    extensions: &[],
                    ..audio_packet(seq)
                },
                &key_frame,
            );
            hands.flush();
            hands.run_for(Duration::from_millis(20));
        }
        let originals = hands.hands[1].got.clone();
        assert_eq!(originals.len(), 20);
        let lost = &originals[19];
        let ask = |hands: &mut Hands, seq: u16| {
            hands.hands[1].got.clear();
            hands.say(1, |writer| {
                writer.nack(Ssrc(9), Ssrc(OUT_SSRC), [Seq(seq)]).unwrap()
            });
            hands.hands[1].got.clone()
        };
        assert!(
            ask(&mut hands, lost.index as u16).is_empty(),
            "it has just left"
        );
        let mut answers = Vec::new();
        for round in 0..6 {
            // Until a round trip is measured, it counts as 70 ms. Two of them are longer than 100
            // ms, which is enough between two retransmissions.
            hands.run_for(Duration::from_millis(99));
            let answer = ask(&mut hands, lost.index as u16);
            assert_eq!(
                answer.len(),
                usize::from(round == 0 || (round < 5 && round % 2 == 0)),
                "round {round}"
            );
            answers.extend(answer);
        }
        assert_eq!(answers.len(), 3);
        for answer in &answers {
            if rtx {
                assert_eq!(
                    (answer.ssrc, answer.payload_type),
                    (Ssrc(OUT_RTX_SSRC), 111)
                );
                assert_eq!(
                    (answer.rtp_time, answer.marker),
                    (lost.rtp_time, lost.marker)
                );
                assert_eq!(
                    answer.payload,
                    [&(lost.index as u16).to_be_bytes()[..], &lost.payload].concat()
                );
            } else {
                assert_eq!(
                    answer.sealed, lost.sealed,
                    "one number, one packet, one ciphertext"
                );
            }
        }
        assert!(
            !rtx || answers
                .windows(2)
                .all(|pair| pair[1].index == pair[0].index + 1)
        );
        assert!(
            ask(&mut hands, originals[0].index.wrapping_sub(1) as u16).is_empty(),
            "before the first"
        );
        assert!(
            ask(&mut hands, lost.index as u16 + 1).is_empty(),
            "behind the last"
        );
        hands.run_for(Duration::from_millis(200));
        assert!(
            ask(&mut hands, lost.index as u16).is_empty(),
            "enough is enough"
        );
        let statistics = hands.router.statistics();
        assert_eq!((statistics.nacks_in, statistics.resends_out), (10, 3));
        let refused = (
            statistics.resends_too_soon,
            statistics.resends_unknown,
            statistics.resends_exhausted,
        );
        assert_eq!(refused, (4, 2, 1));
    }
}

#[test]
fn a_stream_that_takes_its_ssrc_again_goes_on_and_never_repeats_a_number() {
    let mut hands = Hands::connected(2, SendMode::Plain);
    add_track(&mut hands, AUDIO, Kind::Audio, plain(Ssrc(0x55), false));
    let mut seq = 0;
    for round in 0..4 {
        subscribe_as(&mut hands, SubscriptionId(round), AUDIO, false, wants(0));
        for _ in 0..5 {
            hands.send(0, &audio_packet(seq), b"opus");
            seq += 1;
        }
        hands.flush();
        hands.command(MediaCommand::Unsubscribe {
            subscription: SubscriptionId(round),
        });
    }
    assert!(
        hands.hands[1]
            .got
            .windows(2)
            .all(|pair| pair[1].index == pair[0].index + 1)
    );
    assert_eq!(hands.hands[1].got.len(), 20);
    subscribe_as(&mut hands, SubscriptionId(10), AUDIO, false, wants(0));
    subscribe_as(&mut hands, SubscriptionId(11), AUDIO, false, wants(0));
    assert_eq!(
        hands.router.statistics().commands_refused,
        1,
        "two streams may not share an SSRC"
    );
}

#[test]
fn a_pause_leaves_no_seam_and_a_restart_of_the_publisher_no_leap() {
    let mut hands = Hands::connected(2, SendMode::Plain);
    add_track(&mut hands, AUDIO, Kind::Audio, plain(Ssrc(0x55), false));
    subscribe(&mut hands, AUDIO, false, wants(0));
    let mut seq = 0u16;
    let mut talk = |hands: &mut Hands, offset: u16| {
        for _ in 0..10 {
            hands.send(0, &audio_packet(seq.wrapping_add(offset)), b"opus");
            hands.flush();
            hands.run_for(Duration::from_millis(20));
            seq += 1;
        }
    };
    talk(&mut hands, 0);
    let set = |hands: &mut Hands, enabled| {
        hands.command(MediaCommand::SetSelection {
            subscription: SUBSCRIPTION,
            selection: Selection { enabled, layer: 0 },
        });
    };
    set(&mut hands, false);
    talk(&mut hands, 0);
    set(&mut hands, true);
    talk(&mut hands, 0);
    // The publisher starts over with other sequence numbers and another clock.
    talk(&mut hands, 30_000);
    let got = &hands.hands[1].got;
    assert_eq!(
        got.len(),
        29,
        "the first packet of a jump is not believed before the second"
    );
    assert!(
        got.windows(2)
            .all(|pair| pair[1].index == pair[0].index + 1)
    );
    let steps: Vec<u32> = got
        .windows(2)
        .map(|pair| pair[1].rtp_time.wrapping_sub(pair[0].rtp_time))
        .collect();
    for (at, step) in steps.iter().enumerate() {
        let expected = match at {
            9 => 11 * 960,
            19 => 2 * 960,
            _ => 960,
        };
        assert_eq!(*step, expected, "{at}");
    }
    assert_eq!(hands.router.statistics().withheld_disabled, 10);
}

#[test]
fn key_frames_are_asked_for_at_once_then_at_most_twice_a_second_until_one_comes() {
    let mut hands = Hands::connected(2, SendMode::Plain);
    add_track(&mut hands, VIDEO, Kind::Video, plain(Ssrc(0x55), true));
    let inter_frame = [0x90, 0x80, 0x85, 0x55, 1, 2, 3];
    let key_frame = [0x90, 0x80, 0x85, 0x55, 0, 2, 3];
    let mut seq = 0;
    let mut send = |hands: &mut Hands, payload: &[u8]| {
        hands.send(
            0,
            &Out {
                extensions: &[],
                ..audio_packet(seq)
            },
            payload,
        );
        hands.flush();
        seq += 1;
    };
    send(&mut hands, &inter_frame);
    hands.run_for(Duration::from_millis(100));
    let plis = |hands: &Hands| {
        hands.hands[0].heard(|said| {
            *said
                == Said::Pli {
                    media_ssrc: Ssrc(0x55),
                }
        })
    };
    assert!(plis(&hands).is_empty(), "nobody waits for one");
    let bound_at = hands.now;
    subscribe(&mut hands, VIDEO, true, wants(0));
    hands.run_for(Duration::from_millis(2_200));
    let asked = plis(&hands);
    assert_eq!(asked.len(), 5);
    assert!(asked[0].since(bound_at) <= Duration::from_millis(1));
    assert!(
        asked
            .windows(2)
            .all(|pair| (500..=502).contains(&pair[1].since(pair[0]).as_millis()))
    );
    send(&mut hands, &key_frame);
    hands.run_for(Duration::from_secs(1));
    assert_eq!(plis(&hands).len(), 5);
    // A subscriber's own requests are passed on, both PLI and FIR, but no more often than that.
    for round in 0..100 {
        if round % 2 == 0 {
            hands.say(1, |writer| writer.pli(Ssrc(9), Ssrc(OUT_SSRC)).unwrap());
        } else {
            hands.say(1, |writer| {
                writer.fir(Ssrc(9), &[(Ssrc(OUT_SSRC), round)]).unwrap()
            });
        }
        hands.run_for(Duration::from_millis(10));
        send(&mut hands, &key_frame);
    }
    assert_eq!(plis(&hands).len(), 7);
    let statistics = hands.router.statistics();
    assert_eq!(
        (statistics.plis_in, statistics.firs_in, statistics.plis_out),
        (50, 50, 7)
    );
}

#[test]
fn sender_reports_tell_the_publishers_clock_in_ours() {
    let mut hands = Hands::connected(2, SendMode::Plain);
    add_track(&mut hands, AUDIO, Kind::Audio, plain(Ssrc(0x55), false));
    subscribe(&mut hands, AUDIO, false, wants(0));
    // The publisher's wall clock is 1,000 s ahead of ours. Its sender reports pair that clock with
    // the RTP time of the same moment.
    let start = hands.now;
    let rtp_time_at = |at: Time| (at.since(start).as_micros() as u64 * 48 / 1_000) as u32 + 7;
    for seq in 0..400u16 {
        let out = Out {
            rtp_time: rtp_time_at(hands.now),
            ..audio_packet(seq)
        };
        hands.send(0, &out, b"opus");
        hands.flush();
        if seq % 50 == 10 {
            let (ntp, rtp_time) = (
                hands.epoch.ntp(hands.now) + (1_000 << 32),
                rtp_time_at(hands.now),
            );
            hands.say(0, |writer| {
                let info = SenderInfo {
                    ssrc: Ssrc(0x55),
                    ntp,
                    rtp_time,
                    ..SenderInfo::default()
                };
                writer.sender_report(&info, []).unwrap();
            });
        }
        hands.run_for(Duration::from_millis(20));
    }
    let offset = hands.hands[1].got[0]
        .rtp_time
        .wrapping_sub(rtp_time_at(hands.hands[1].got[0].at));
    let mut reports = 0;
    for (at, said) in hands.hands[1].said.clone() {
        let Said::SenderReport {
            ssrc,
            ntp,
            rtp_time,
        } = said
        else {
            continue;
        };
        assert_eq!((ssrc, ntp), (Ssrc(OUT_SSRC), hands.epoch.ntp(at)));
        let expected = rtp_time_at(at).wrapping_add(offset);
        assert!(rtp_time.abs_diff(expected) <= 1, "{rtp_time} {expected}");
        reports += 1;
    }
    assert_eq!(reports, 3, "8 seconds, one each 3");
    let rounds = hands.hands[0]
        .heard(|said| {
            matches!(
                said,
                Said::ReceiverReport {
                    ssrc: Ssrc(0x55),
                    lost: 0
                }
            )
        })
        .len();
    assert!((7..=9).contains(&rounds), "{rounds}");
}

#[test]
fn round_trips_are_learnt_from_reports_and_told_to_receivers_that_ask() {
    let mut hands = Hands::connected(2, SendMode::Plain);
    add_track(&mut hands, AUDIO, Kind::Audio, plain(Ssrc(0x55), false));
    subscribe(&mut hands, AUDIO, false, wants(0));
    hands.say(1, |writer| {
        writer
            .xr(Ssrc(42), Some(0x1234_5678_9ABC_DEF0), [])
            .unwrap()
    });
    assert_eq!(
        hands.hands[1]
            .heard(|said| *said == Said::Dlrr { ssrc: Ssrc(42) })
            .len(),
        1
    );
    let lsr = ntp_middle(hands.epoch.ntp(hands.now));
    hands.run_for(Duration::from_millis(50));
    let block = ReportBlock {
        ssrc: Ssrc(OUT_SSRC),
        cumulative_lost: 12,
        lsr,
        dlsr: 65_536 / 50,
        ..ReportBlock::default()
    };
    hands.say(1, |writer| {
        writer.receiver_report(Ssrc(42), [block]).unwrap()
    });
    let counted = hands.router.subscription_statistics(SUBSCRIPTION).unwrap();
    assert_eq!(counted.reported_lost, 12);
    // The round trip is 50 ms less the 20 ms of DLSR, which is in units of 1/65,536 s.
    let rtt = counted.rtt.unwrap();
    assert!(
        rtt.abs_diff(Duration::from_millis(30)) < Duration::from_micros(50),
        "{rtt:?}"
    );
    // An answer to a question that we did not ask gives no round trip.
    let stray = DlrrBlock {
        ssrc: Ssrc(1),
        last_rr: lsr,
        delay_since_last_rr: 0,
    };
    hands.say(0, |writer| writer.xr(Ssrc(42), None, [stray]).unwrap());
}

#[test]
fn transport_wide_feedback_tells_when_each_packet_came() {
    let mut hands = Hands::connected(2, SendMode::Plain);
    add_track(&mut hands, VIDEO, Kind::Video, simulcast());
    let mut sent = 0u16;
    for seq in 0..200u16 {
        if seq % 10 != 3 {
            let number = seq.to_be_bytes();
            let out = Out {
                ssrc: camera_ssrc(0),
                payload_type: 96,
                seq: sent,
                rtp_time: 0,
                marker: false,
                extensions: &[(MID_ID, b"0"), (RID_ID, b"q"), (TRANSPORT_CC_ID, &number)],
                padding: 0,
            };
            hands.send(0, &out, &[0x90, 0x80, 0x85, 0x55, 1, 2]);
            sent += 1;
        }
        hands.flush();
        hands.run_for(Duration::from_millis(10));
    }
    hands.run_for(Duration::from_millis(200));
    let bodies: Vec<Vec<u8>> = hands.hands[0]
        .said
        .iter()
        .filter_map(|(_, said)| match said {
            Said::TransportCc { body } => Some(body.clone()),
            _ => None,
        })
        .collect();
    assert!((20..=22).contains(&bodies.len()), "{}", bodies.len());
    let (mut told, mut messages) = (0, 0);
    for body in bodies {
        let (base, count) = (
            u16::from_be_bytes([body[0], body[1]]),
            u16::from_be_bytes([body[2], body[3]]),
        );
        assert_eq!(body[7], messages);
        assert!(
            base >= told && base - told <= 1,
            "{base} {told}: a message begins with a packet that came"
        );
        (told, messages) = (base + count, messages + 1);
    }
    assert_eq!(told, 200);
}

#[test]
fn loudness_is_told_while_somebody_speaks_and_silence_once() {
    let mut hands = Hands::connected(2, SendMode::Plain);
    add_track(&mut hands, AUDIO, Kind::Audio, plain(Ssrc(0x55), false));
    let mut seq = 0;
    let mut say = |hands: &mut Hands, levels: [u8; 2], packets| {
        for packet in 0..packets {
            let level = [0x80 | levels[packet % 2]];
            hands.send(
                0,
                &Out {
                    extensions: &[(AUDIO_LEVEL_ID, &level)],
                    ..audio_packet(seq)
                },
                b"opus",
            );
            hands.flush();
            hands.run_for(Duration::from_millis(20));
            seq += 1;
        }
    };
    say(&mut hands, [20, 30], 100);
    say(&mut hands, [127, 127], 100);
    let told: Vec<Vec<(TrackId, u8)>> = hands
        .events
        .iter()
        .filter_map(|event| match event {
            MediaEvent::AudioLevels { levels } => Some(levels.clone()),
            _ => None,
        })
        .collect();
    assert!((4..=6).contains(&told.len()), "{told:?}");
    assert!(
        told[..told.len() - 2]
            .iter()
            .all(|levels| *levels == [(AUDIO, 25)]),
        "{told:?}"
    );
    assert_eq!(told.last(), Some(&vec![]));
}

#[test]
fn a_restart_of_ice_keeps_the_keys_and_silence_ends_a_connection() {
    let mut hands = Hands::connected(2, SendMode::Plain);
    add_track(&mut hands, AUDIO, Kind::Audio, plain(Ssrc(0x55), false));
    subscribe(&mut hands, AUDIO, false, wants(0));
    hands.send(0, &audio_packet(1), b"opus");
    hands.flush();
    let (ours, theirs) = (IceCredentials::random(), IceCredentials::random());
    hands.hands[1].peer.restart_ice(&theirs, &ours, hands.now);
    hands.hands[1].address = "203.0.113.77:777".parse().unwrap();
    hands.command(MediaCommand::RestartIce {
        transport: TransportId(1),
        local: ours,
        remote: theirs,
    });
    let now = hands.now;
    hands.hands[1]
        .peer
        .add_remote_candidate(relay::router_address(), now);
    hands.run_for(Duration::from_millis(500));
    hands.send(0, &audio_packet(2), b"opus");
    hands.flush();
    assert_eq!(
        hands.hands[1].got.len(),
        2,
        "at the new address, under the old keys"
    );
    // The subscriber falls silent.
    let silent = hands.hands.pop().unwrap();
    let since = hands.now;
    let failed = MediaEvent::Failed {
        transport: TransportId(1),
        failure: PeerFailure::IceDisconnected,
    };
    while !hands.events.contains(&failed) {
        hands.run_for(Duration::from_millis(100));
        assert!(
            hands.now.since(since) < Duration::from_secs(21),
            "still waiting"
        );
    }
    assert!(
        hands.now.since(since) > Duration::from_secs(12),
        "{:?}",
        hands.now.since(since)
    );
    assert_eq!(silent.got.len(), 2);
    let statistics = hands.router.statistics();
    assert_eq!(
        (
            statistics.transports,
            statistics.subscriptions,
            statistics.tracks
        ),
        (1, 0, 1)
    );
    hands.command(MediaCommand::RemoveTransport {
        transport: TransportId(0),
    });
    let statistics = hands.router.statistics();
    assert_eq!(
        (
            statistics.transports,
            statistics.tracks,
            statistics.commands_refused
        ),
        (0, 0, 0)
    );
}

#[test]
fn hostile_datagrams_are_counted_and_do_no_harm() {
    let mut hands = Hands::connected(2, SendMode::Plain);
    add_track(&mut hands, VIDEO, Kind::Video, simulcast());
    add_track(&mut hands, AUDIO, Kind::Audio, plain(Ssrc(0x55), false));
    subscribe(&mut hands, AUDIO, false, wants(0));
    let mut random = Random(11);
    let known = hands.hands[0].address;
    let good: Vec<Vec<u8>> = (0..40)
        .map(|seq| hands.seal(0, &audio_packet(seq), b"opus"))
        .collect();
    for round in 0..60_000u64 {
        let from = if round % 2 == 0 {
            known
        } else {
            format!("192.0.2.7:{}", 1 + random.next() % 60_000)
                .parse()
                .unwrap()
        };
        let mut bytes: Vec<u8> = match round % 3 {
            // Random bytes, of every kind that a first byte can announce.
            0 => (0..random.next() % 300)
                .map(|_| random.next() as u8)
                .collect(),
            // A good packet, damaged or cut short.
            1 => {
                let mut bytes = good[(random.next() % 40) as usize].clone();
                let at = (random.next() % bytes.len() as u64) as usize;
                bytes[at] ^= 1 << (random.next() % 8);
                bytes.truncate(
                    (random.next() % (bytes.len() as u64 + 1)) as usize
                        + usize::from(round % 2 == 1) * bytes.len(),
                );
                bytes
            }
            // A STUN check for an unknown user name.
            _ => binding_request(&format!("{:08x}:abcd", random.next() as u32)),
        };
        if let (Some(first), 0) = (bytes.first_mut(), round % 5) {
            *first = [0, 22, 0x80, 0x90][(round % 4) as usize];
        }
        let now = hands.now;
        hands
            .router
            .handle_datagram(&mut bytes, from, now, now, &mut hands.outlet);
    }
    hands.flush();
    let statistics = hands.router.statistics();
    assert_all_accounted_for(&statistics);
    for refused in [
        statistics.refused_unknown_address,
        statistics.refused_unknown_ufrag,
        statistics.refused_unknown_kind,
        statistics.refused_unauthentic,
        statistics.refused_malformed,
        statistics.refused_unknown_ssrc,
    ] {
        assert!(refused > 100, "{statistics:?}");
    }
    assert_eq!(statistics.media_in, 0);
    // The publisher's packets arrive as if nothing had happened.
    for mut bytes in good {
        let now = hands.now;
        hands
            .router
            .handle_datagram(&mut bytes, known, now, now, &mut hands.outlet);
    }
    hands.flush();
    assert!(
        hands.hands[1].got.len() >= 39,
        "{}",
        hands.hands[1].got.len()
    );
}

/// Returns a STUN check as any stranger can make it: well formed, for a user name of its choice,
/// with an invented integrity attribute.
fn binding_request(username: &str) -> Vec<u8> {
    let mut bytes = vec![0, 1, 0, 0, 0x21, 0x12, 0xA4, 0x42];
    bytes.extend([7; 12]);
    let mut attribute = |kind: u16, value: &[u8]| {
        bytes.extend(kind.to_be_bytes());
        bytes.extend((value.len() as u16).to_be_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    };
    attribute(0x0006, username.as_bytes());
    attribute(0x0024, &[0, 0, 1, 0]);
    attribute(0x0008, &[9; 20]);
    let len = (bytes.len() - 20) as u16;
    bytes[2..4].copy_from_slice(&len.to_be_bytes());
    bytes
}

#[test]
fn a_burst_leaves_in_segments_of_one_size_and_plain_sends_are_single() {
    struct Sizes(Vec<u8>, Vec<(usize, usize)>);
    impl throng::sfu::Outgoing for Sizes {
        fn lend(&mut self) -> &mut [u8] {
            &mut self.0
        }
        fn send(&mut self, _: throng::sfu::ClientEnd, len: usize, segment: usize) {
            self.1.push((len, segment));
        }
    }
    for send in [SendMode::Plain, SendMode::Gso] {
        let mut hands = Hands::connected(2, send);
        add_track(&mut hands, AUDIO, Kind::Audio, plain(Ssrc(0x55), false));
        subscribe(&mut hands, AUDIO, false, wants(0));
        let mut sizes = Sizes(vec![0; throng::net::SEND_BYTES_MAX], Vec::new());
        for (seq, len) in [100, 100, 60, 100, 120, 120].into_iter().enumerate() {
            let mut bytes = hands.seal(
                0,
                &Out {
                    extensions: &[],
                    ..audio_packet(seq as u16)
                },
                &vec![1; len],
            );
            let (from, now) = (hands.hands[0].address, hands.now);
            hands
                .router
                .handle_datagram(&mut bytes, from, now, now, &mut sizes);
        }
        assert!(sizes.1.is_empty(), "the batch has not ended");
        hands.router.end_batch(hands.now, &mut sizes);
        let sealed = |len: usize| 12 + len + 16;
        let expected = match send {
            SendMode::Plain => [100, 100, 60, 100, 120, 120]
                .map(|len| (sealed(len), sealed(len)))
                .to_vec(),
            SendMode::Gso => vec![
                (2 * sealed(100) + sealed(60), sealed(100)),
                (sealed(100), sealed(100)),
                (2 * sealed(120), sealed(120)),
            ],
        };
        assert_eq!(sizes.1, expected);
    }
}

#[test]
fn a_check_that_overtakes_the_description_is_answered_when_that_comes() {
    let mut hands = Hands::connected(1, SendMode::Plain);
    let (ours, theirs) = (IceCredentials::random(), IceCredentials::random());
    let fingerprint = hands.identity.fingerprint();
    let address = "203.0.113.50:5000".parse().unwrap();
    let parameters = PeerParameters {
        local_address: address,
        local: theirs.clone(),
        remote: ours.clone(),
        remote_fingerprint: fingerprint,
        remote_candidates: vec![relay::router_address()],
        ice_controlling: true,
        dtls_active: true,
    };
    let mut early = Peer::new(&hands.identity, &parameters, hands.epoch, hands.now);
    early.handle_timeout(hands.now);
    let mut checks = Vec::new();
    early.poll(hands.now, |bytes, _| checks.push(bytes.to_vec()), |_| {});
    assert!(!checks.is_empty());
    let now = hands.now;
    for mut bytes in checks {
        hands
            .router
            .handle_datagram(&mut bytes, address, now, now, &mut hands.outlet);
    }
    assert!(hands.outlet.sent.is_empty(), "strangers get no answer");
    hands.command(MediaCommand::AddTransport {
        transport: TransportId(9),
        parameters: Box::new(TransportParameters {
            local: ours,
            remote: theirs,
            remote_fingerprint: fingerprint,
            dtls_active: false,
        }),
    });
    assert!(
        hands
            .outlet
            .sent
            .iter()
            .any(|datagram| datagram.to == address)
    );
}

/// Under SRTP's keys, one SSRC and index may seal only one packet, whatever the publisher, the
/// network and the subscriber do.
#[test]
fn no_number_is_ever_given_to_two_packets() {
    let mut all = RouterStatistics::default();
    for seed in 0..40 {
        let mut random = Random(seed);
        let mut hands = Hands::connected(
            2,
            if seed % 2 == 0 {
                SendMode::Plain
            } else {
                SendMode::Gso
            },
        );
        let video = seed % 4 != 3;
        if video {
            add_track(&mut hands, VIDEO, Kind::Video, simulcast());
        } else {
            add_track(&mut hands, AUDIO, Kind::Audio, Encodings::Mid);
        }
        let track = if video { VIDEO } else { AUDIO };
        let rtx = seed % 3 == 0 && video;
        subscribe(&mut hands, track, rtx, wants(2));
        let mut ssrcs = [100, 200, 300];
        let mut seqs = [random.next() as u16, 65_000, 3];
        let mut late: Vec<(usize, Vec<u8>)> = Vec::new();
        let mut sealed = std::collections::HashMap::new();
        let mut newest = 0u64;
        let mut subscriptions = 1;
        for step in 0..3_000u32 {
            let layer = if video {
                (random.next() % 3) as usize
            } else {
                0
            };
            match random.next() % 200 {
                0 => {
                    // A new stream with the same mid and rid.
                    ssrcs[layer] += 1;
                    seqs[layer] = random.next() as u16 & 0x7FFF;
                }
                // The same stream goes on with other sequence numbers.
                1 => seqs[layer] = seqs[layer].wrapping_add(random.next() as u16 % 20_000),
                2 => seqs[layer] = seqs[layer].wrapping_add(random.next() as u16 % 200),
                3..8 => hands.command(MediaCommand::SetSelection {
                    subscription: SubscriptionId(subscriptions),
                    selection: Selection {
                        enabled: !random.next().is_multiple_of(4),
                        layer: (random.next() % 3) as u8,
                    },
                }),
                8 => {
                    hands.command(MediaCommand::Unsubscribe {
                        subscription: SubscriptionId(subscriptions),
                    });
                    subscriptions += 1;
                    subscribe_as(
                        &mut hands,
                        SubscriptionId(subscriptions),
                        track,
                        rtx,
                        wants(1),
                    );
                }
                9..30 => {
                    let asked: Vec<Seq> = (0..5)
                        .map(|_| Seq((newest as u16).wrapping_sub(random.next() as u16 % 300)))
                        .collect();
                    hands.say(1, |writer| {
                        writer.nack(Ssrc(9), Ssrc(OUT_SSRC), asked).unwrap()
                    });
                }
                30..50 => hands.run_for(Duration::from_millis(30)),
                50..90 if !late.is_empty() => {
                    let (_, mut bytes) =
                        late.swap_remove((random.next() % late.len() as u64) as usize);
                    let (from, now) = (hands.hands[0].address, hands.now);
                    hands
                        .router
                        .handle_datagram(&mut bytes, from, now, now, &mut hands.outlet);
                }
                _ => {}
            }
            let key = random.next().is_multiple_of(12);
            let padding = if random.next().is_multiple_of(10) {
                20
            } else {
                0
            };
            let mut payload = vec![
                0x90,
                0x80,
                0x80 | (step >> 8) as u8,
                step as u8,
                u8::from(!key),
                layer as u8,
            ];
            payload.extend(step.to_be_bytes());
            let out = Out {
                ssrc: Ssrc(ssrcs[layer]),
                payload_type: 96,
                seq: seqs[layer],
                rtp_time: step * 90,
                marker: false,
                extensions: &[(MID_ID, b"0"), (RID_ID, RIDS[layer])],
                padding,
            };
            seqs[layer] = seqs[layer].wrapping_add(1);
            let mut bytes = hands.seal(0, &out, if padding > 0 { &[] } else { &payload });
            match random.next() % 10 {
                0 => {}
                1 | 2 => late.push((layer, bytes)),
                _ => {
                    let (from, now) = (hands.hands[0].address, hands.now);
                    hands
                        .router
                        .handle_datagram(&mut bytes, from, now, now, &mut hands.outlet);
                }
            }
            if random.next().is_multiple_of(4) {
                hands.flush();
            }
            for got in hands.hands[1].got.drain(..) {
                if got.ssrc == Ssrc(OUT_SSRC) {
                    newest = newest.max(got.index);
                }
                let before = sealed.insert((got.ssrc, got.index), got.sealed.clone());
                assert!(
                    before.is_none_or(|before| before == got.sealed),
                    "seed {seed}, step {step}: {:?}",
                    got
                );
            }
        }
        let statistics = hands.router.statistics();
        assert_all_accounted_for(&statistics);
        all.merge(&statistics);
        assert!(
            newest < 50_000 + 3_000 * 40,
            "seed {seed}: numbers go up by packets, not by leaps"
        );
    }
    assert!(
        all.media_out > 10_000 && all.resends_out > 1_000 && all.withheld_late > 100,
        "{all:?}"
    );
}
