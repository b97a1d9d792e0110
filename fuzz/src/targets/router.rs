//! The router of the embedded SFU, with clients that lie. It has three connections. A script drives
//! two of them with their true keys.

use std::collections::BTreeMap;
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use throng::codec::{Codec, PayloadTypes};
use throng::measure::Kind;
use throng::sfu::{
    Encodings, MediaCommand, Selection, SendMode, SubscriptionId, SubscriptionParameters, TrackId,
    TrackParameters, TransportId,
};
use throng::transport::rtcp::{ReportBlock, RtcpWriter};
use throng::transport::rtp::{Header, classify};
use throng::transport::sdp::{Extension, ExtensionIds};
use throng::transport::sequence::{Seq, SeqExtender};

use super::shard::compound;
use super::{Script, Target, chunk, ours};
use crate::common::hand::{Hands, MID_ID, REPAIRED_RID_ID, RID_ID};

pub const TARGET: Target = Target {
    name: "router",
    run,
    seeds,
    mutations: 60,
    memory: None,
};

const RTP: u8 = 0;
const RTCP: u8 = 1;
const TIME: u8 = 2;
const DATAGRAM: u8 = 3;
const SELECT: u8 = 4;

const AUDIO_SSRC: u32 = 100;
const SENT_SSRC: u32 = 900;
/// Limit of retransmissions of one packet, as in LiveKit and in our code.
const RESENDS_MAX: u64 = 3;

fn room() -> Hands {
    let mut hands = Hands::connected(3, SendMode::Plain);
    let extensions: ExtensionIds = [
        (Extension::Mid, MID_ID),
        (Extension::Rid, RID_ID),
        (Extension::RepairedRid, REPAIRED_RID_ID),
    ]
    .into_iter()
    .collect();
    for (track, kind) in [(1, Kind::Audio), (2, Kind::Video)] {
        let video = kind == Kind::Video;
        hands.command(MediaCommand::AddTrack {
            transport: TransportId(0),
            track: TrackId(track),
            parameters: Box::new(TrackParameters {
                payloads: PayloadTypes::of(Codec::default_of(kind), if video { 96 } else { 111 }),
                mid: track.to_string().into(),
                rtx_payload_type: video.then_some(97),
                extensions,
                nack: true,
                transport_cc: false,
                encodings: match kind {
                    Kind::Audio => Encodings::Ssrc {
                        ssrc: Ssrc(AUDIO_SSRC),
                        rtx_ssrc: None,
                    },
                    Kind::Video => Encodings::Rids(["q", "h", "f"].map(Into::into).into()),
                },
            }),
        });
        for subscriber in [1, 2] {
            let ssrc = SENT_SSRC + track * 10 + subscriber;
            hands.command(MediaCommand::Subscribe {
                subscription: SubscriptionId(track * 10 + subscriber),
                transport: TransportId(subscriber),
                track: TrackId(track),
                parameters: Box::new(SubscriptionParameters {
                    ssrc: Ssrc(ssrc),
                    rtx_ssrc: video.then_some(Ssrc(ssrc + 1_000)),
                    payloads: PayloadTypes::of(Codec::default_of(kind), 110),
                    rtx_payload_type: video.then_some(112),
                    extensions: ExtensionIds::default(),
                    selection: Selection {
                        enabled: true,
                        layer: 2,
                    },
                }),
            });
        }
    }
    hands
}

fn run(input: &[u8]) {
    let mut script = Script::new(input);
    let mut hands = room();
    let (mut sending, mut seqs): (BTreeMap<Ssrc, SeqExtender>, BTreeMap<u32, u16>) =
        Default::default();
    while !script.is_over() {
        let op = script.u8();
        let from = usize::from(op >> 7);
        match op & 0x7F {
            RTP => {
                let packet = rtp(&mut script, &mut seqs);
                say_rtp(&mut hands, from, &packet, &mut sending);
            }
            RTCP => say_rtcp(&mut hands, from, script.chunk()),
            TIME => hands.run_for(Duration::from_millis(u64::from(script.u8() % 64))),
            DATAGRAM => deliver(&mut hands, from, &mut script.chunk().to_vec()),
            SELECT => {
                let (which, wish) = (script.u8(), script.u8());
                hands.command(MediaCommand::SetSelection {
                    subscription: SubscriptionId(u32::from(which % 32)),
                    selection: Selection {
                        enabled: wish & 4 != 0,
                        layer: wish & 3,
                    },
                });
            }
            _ => hands.flush(),
        }
    }
    hands.run_for(Duration::from_millis(20));
    let statistics = hands.router.statistics();
    // Each subscriber gets a packet once, and retransmissions of it three times at most. Fillers
    // take the places of packets before a layer's start, so they too are bounded by what arrived.
    let may_go = 2 * statistics.media_in * (1 + RESENDS_MAX);
    assert!(
        statistics.media_out <= 2 * statistics.media_in + 64,
        "{statistics:?}"
    );
    assert!(
        statistics.media_out + statistics.resends_out <= may_go + 64,
        "{statistics:?}"
    );
    for subscription in [11, 12, 21, 22] {
        assert!(
            hands
                .router
                .subscription_statistics(SubscriptionId(subscription))
                .is_some()
        );
    }
}

fn rtp(script: &mut Script<'_>, seqs: &mut BTreeMap<u32, u16>) -> Vec<u8> {
    let (which, step, flags, marker_and_type) =
        (script.u8(), script.u8() as i8, script.u8(), script.u8());
    let ssrc = AUDIO_SSRC + u32::from(which);
    let seq = seqs.entry(ssrc).or_insert(65_530);
    *seq = seq.wrapping_add(step as u16);
    let mut packet = vec![0x80 | flags & 0x3F, marker_and_type];
    packet.extend(seq.to_be_bytes());
    packet.extend(script.u32().to_be_bytes());
    packet.extend(ssrc.to_be_bytes());
    packet.extend(script.chunk());
    packet
}

fn say_rtp(
    hands: &mut Hands,
    from: usize,
    plain: &[u8],
    sending: &mut BTreeMap<Ssrc, SeqExtender>,
) {
    let Some(header) = Header::parse(plain) else {
        return;
    };
    let extender = sending.entry(header.ssrc).or_default();
    let index = extender.guess(header.seq.0);
    extender.commit(index);
    let mut bytes = [plain, &[0; 32]].concat();
    let sealer = hands.hands[from].peer.sealer().expect("it is connected");
    if let Ok(sealed) = sealer.seal_rtp(&mut bytes, header.header_len, plain.len(), index) {
        bytes.truncate(sealed);
        deliver(hands, from, &mut bytes);
    }
}

fn say_rtcp(hands: &mut Hands, from: usize, plain: &[u8]) {
    let mut bytes = [plain, &[0; 32]].concat();
    let sealer = hands.hands[from]
        .peer
        .sealer_mut()
        .expect("it is connected");
    if let Ok(sealed) = sealer.seal_rtcp(&mut bytes, plain.len()) {
        bytes.truncate(sealed);
        deliver(hands, from, &mut bytes);
    }
}

fn deliver(hands: &mut Hands, from: usize, bytes: &mut [u8]) {
    // The last connection is honest. It must get its media whatever the others do.
    let _ = classify(bytes);
    let (address, now) = (hands.hands[from].address, hands.now);
    let Hands { router, outlet, .. } = hands;
    ours(|| router.handle_datagram(bytes, address, now, now, outlet));
}

fn seeds() -> Vec<Vec<u8>> {
    let say = |which: u8, step: i8, flags: u8, marker: bool, rtp_time: u32, payload: &[u8]| {
        let payload_type = if which == 0 { 111 } else { 96 };
        let head = [
            RTP,
            which,
            step as u8,
            flags,
            u8::from(marker) << 7 | payload_type,
        ];
        [&head[..], &rtp_time.to_be_bytes(), &chunk(payload)].concat()
    };
    // A packet with the extensions mid 2 and rid, then a key frame or an inter frame.
    let layer = |rid: u8, picture: u8, key: bool| {
        let extensions = [0xBE, 0xDE, 0, 1, MID_ID << 4, b'2', RID_ID << 4, rid];
        let frame = [
            0x90,
            0x80,
            0x80,
            picture,
            if key { 0x10 } else { 0x11 },
            0,
            0,
            0x9D,
            1,
            0x2A,
            96,
            0,
            54,
            0,
        ];
        [&extensions[..], &frame].concat()
    };
    let rtcp = |from: u8, write: &dyn Fn(&mut RtcpWriter<'_>)| {
        [&[from << 7 | RTCP][..], &chunk(&compound(write))].concat()
    };
    let pictures = |which: u8, rid: u8| -> Vec<u8> {
        (0..6u8)
            .flat_map(|n| {
                [
                    say(
                        which,
                        1,
                        0x10,
                        true,
                        u32::from(n) * 3_000,
                        &layer(rid, n, n == 0),
                    ),
                    vec![TIME, 30],
                ]
                .concat()
            })
            .collect()
    };
    let nack = |ssrc: u32| {
        rtcp(1, &|writer: &mut RtcpWriter<'_>| {
            writer
                .nack(Ssrc(1), Ssrc(ssrc), (0..250).map(|n| Seq(n * 65)))
                .expect("it fits")
        })
    };
    let block = ReportBlock {
        ssrc: Ssrc(SENT_SSRC + 21),
        fraction_lost: 255,
        cumulative_lost: -1,
        extended_highest_seq: u32::MAX,
        jitter: 0,
        lsr: u32::MAX,
        dlsr: u32::MAX,
    };
    vec![
        [
            say(0, 1, 0, true, 960, b"opus"),
            vec![TIME, 5],
            say(0, 3, 0, true, 1_920, b"opus"),
            vec![TIME, 30],
        ]
        .concat(),
        [
            pictures(1, b'q'),
            nack(SENT_SSRC + 21),
            vec![TIME, 50],
            nack(SENT_SSRC + 21),
        ]
        .concat(),
        [
            pictures(1, b'q'),
            pictures(2, b'f'),
            vec![SELECT, 21, 4, SELECT, 21, 6, SELECT, 22, 0],
            pictures(2, b'f'),
        ]
        .concat(),
        [
            rtcp(1, &|writer| {
                (0..60).for_each(|_| writer.pli(Ssrc(1), Ssrc(SENT_SSRC + 21)).expect("it fits"))
            }),
            rtcp(1, &|writer| {
                writer
                    .receiver_report(Ssrc(1), [block; 31])
                    .expect("it fits")
            }),
            rtcp(0, &|writer| {
                writer.xr(Ssrc(1), Some(u64::MAX), []).expect("it fits")
            }),
            [&[DATAGRAM][..], &chunk(&[0; 60])].concat(),
            say(0, 1, 0x20, true, 960, &[0, 0, 3]),
        ]
        .concat(),
    ]
}
