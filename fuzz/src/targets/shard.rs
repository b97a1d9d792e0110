//! A whole engine shard, connected to a server that lies: all its packets are sealed with the true
//! keys.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use throng::codec::{Codec, PayloadTypes};
use throng::engine::publisher::{MediaSource, Pacing, SendParameters};
use throng::engine::shard::Shard;
use throng::engine::{
    NewPeer, PeerKey, Roster, ShardCommand, ShardConfig, ShardEvent, StreamParameters,
};
use throng::measure::{Kind, Record};
use throng::media::identity::{FrameIdentity, Origin, VIDEO_TRAILER_LEN};
use throng::media::vp8::{VideoClip, Vp8Spec};
use throng::transport::peer::{Peer, PeerEvent};
use throng::transport::rtcp::{DlrrBlock, ReportBlock, RtcpWriter, SenderInfo};
use throng::transport::rtp::{Datagram, Header, classify};
use throng::transport::sequence::{Seq, SeqExtender};
use throng::units::{Bitrate, Epoch, Time};

use super::stun::{identity, parameters};
use super::{Script, Target, chunk, ours};
use crate::common::link::Outlet;
use crate::common::pair;

pub const TARGET: Target = Target {
    name: "shard",
    run,
    seeds,
    mutations: 60,
    memory: None,
};

/// Commands of a script.
const RTP: u8 = 0;
const RTCP: u8 = 1;
const TIME: u8 = 2;
const DATAGRAM: u8 = 3;

const TICK: Duration = Duration::from_millis(1);
/// Number of retransmissions that a track may send at once. After this burst it may retransmit as
/// much as it sends (`ResendLimiter`). Each retransmission counts as 1,200 bytes.
const RESEND_BURST: u64 = 256 * 1024 / 1_200;

/// SSRCs that a script names by their index. Ours come first.
const SSRCS: [u32; 6] = [
    pair::AUDIO_SSRC,
    pair::VIDEO_SSRC,
    pair::VIDEO_RTX_SSRC,
    0x2000_0001,
    0x2000_0002,
    0x2000_0003,
];

pub struct Liar {
    pub shard: Shard,
    pub outlet: Outlet,
    pub now: Time,
    peer: Peer,
    address: SocketAddr,
    sending: BTreeMap<Ssrc, SeqExtender>,
    sent: u64,
}

/// Returns the media, which is made only once, because making it takes longer than all that is done
/// with it here.
fn sources() -> [MediaSource; 2] {
    static SOURCES: OnceLock<[MediaSource; 2]> = OnceLock::new();
    SOURCES
        .get_or_init(|| {
            let spec = Vp8Spec {
                width: 96,
                height: 54,
                fps: 15,
                bitrate: Bitrate::from_bps(60_000),
                seed: 1,
            };
            let clip = VideoClip::generate(&spec, 2).expect("it can be made");
            [pair::audio(), MediaSource::Video(Arc::new(clip))]
        })
        .clone()
}

impl Liar {
    /// Returns a connected shard. The participant publishes audio and video, and expects one stream
    /// of each.
    pub fn connected() -> Liar {
        let (identity, epoch) = (identity(), Epoch::read());
        let config = ShardConfig {
            identity: identity.clone(),
            roster: Arc::new(Roster::new(pair::RUN, [0, 0].into_iter())),
            epoch,
        };
        let addresses =
            [1, 2].map(|of: u8| SocketAddr::from(([192, 0, 2, of], 5_000 + u16::from(of))));
        let mut liar = Liar {
            shard: Shard::new(config, 1, Time::ZERO),
            outlet: Outlet::new(vec![addresses[0]]),
            now: Time::ZERO,
            peer: Peer::new(
                &identity,
                &parameters(&identity, "them", "ours", [2, 1], false),
                epoch,
                Time::ZERO,
            ),
            address: addresses[1],
            sending: BTreeMap::new(),
            sent: 0,
        };
        let peer = NewPeer {
            participant: 0,
            room: 0,
            parameters: parameters(&identity, "ours", "them", [1, 2], true),
            rtcp_ssrc: Ssrc(9),
            cname: "ours".into(),
            intended_at: Time::ZERO,
            obeys_bandwidth: true,
            data: None,
        };
        liar.shard
            .add_peer(PeerKey(0), peer, Time::ZERO, &mut liar.outlet);
        let mut connected = [false; 2];
        while connected != [true; 2] {
            assert!(liar.now < Time::from_millis(5_000), "not connected");
            let up = liar.tick();
            connected = [connected[0] | up[0], connected[1] | up[1]];
        }
        liar.begin_media();
        liar
    }

    fn begin_media(&mut self) {
        let tracks = sources().map(|source| {
            let video = source.kind() == Kind::Video;
            SendParameters {
                ssrc: if video {
                    Ssrc(pair::VIDEO_SSRC)
                } else {
                    Ssrc(pair::AUDIO_SSRC)
                },
                rtx_ssrc: video.then_some(Ssrc(pair::VIDEO_RTX_SSRC)),
                payload_type: if video { 96 } else { 111 },
                rtx_payload_type: video.then_some(97),
                redundancy: None,
                audio_level_extension: (!video).then_some(1),
                transport_cc_extension: Some(5),
                simulcast: None,
                talk: None,
                pacing: Pacing::Paced,
                identity: FrameIdentity {
                    run: pair::RUN,
                    origin: Origin {
                        publisher: 0,
                        track: u8::from(video),
                    },
                    ..FrameIdentity::default()
                },
                seed: 5,
                first_frame_at: self.now + TICK,
                source,
            }
        });
        let stream = |kind, ssrc, rtx_ssrc| StreamParameters {
            payloads: PayloadTypes::of(Codec::default_of(kind), 96),
            ssrc,
            rtx_ssrc,
            announced_at: self.now,
            transport_cc_extension: Some(3),
            abs_send_time_extension: Some(4),
            nack: true,
        };
        let streams = vec![
            stream(Kind::Audio, Ssrc(SSRCS[3]), None),
            stream(Kind::Video, Ssrc(SSRCS[4]), Some(Ssrc(SSRCS[5]))),
        ];
        self.command(ShardCommand::Publish {
            key: PeerKey(0),
            tracks: tracks.into(),
        });
        self.command(ShardCommand::Subscribe {
            key: PeerKey(0),
            streams,
        });
    }

    fn command(&mut self, command: ShardCommand) {
        self.shard
            .handle_command(command, self.now, &mut self.outlet);
    }

    /// Advances both ends by a millisecond. Returns which of them connected in it.
    pub fn tick(&mut self) -> [bool; 2] {
        self.now += TICK;
        let (now, mut connected, mut to_shard) = (self.now, [false; 2], Vec::new());
        self.peer.handle_timeout(now);
        self.peer.poll(
            now,
            |bytes, _| to_shard.push(bytes.to_vec()),
            |event| connected[1] |= event == PeerEvent::Connected,
        );
        for mut bytes in to_shard {
            self.deliver(&mut bytes);
        }
        ours(|| self.shard.handle_media_timers(now, &mut self.outlet));
        ours(|| self.shard.handle_control_timers(now, &mut self.outlet));
        while let Some((_, event)) = self.shard.poll_event() {
            connected[0] |= matches!(event, ShardEvent::Connected { .. });
        }
        for datagram in std::mem::take(&mut self.outlet.sent) {
            self.sent += 1;
            if matches!(classify(&datagram.bytes), Datagram::Stun | Datagram::Dtls) {
                self.peer
                    .handle_setup_datagram(&datagram.bytes, datagram.from, now);
            }
        }
        connected
    }

    /// Passes a packet to the shard, sorted as a worker sorts it.
    pub fn deliver(&mut self, bytes: &mut [u8]) {
        let (shard, outlet, now) = (&mut self.shard, &mut self.outlet, self.now);
        ours(|| match classify(bytes) {
            Datagram::Rtp => shard.handle_rtp(PeerKey(0), bytes, now),
            Datagram::Rtcp => shard.handle_rtcp(PeerKey(0), bytes, now, now, outlet),
            Datagram::Stun | Datagram::Dtls => {
                shard.handle_setup_datagram(PeerKey(0), bytes, self.address, now, now, outlet)
            }
            Datagram::Unknown => shard.reject(),
        });
    }

    pub fn say_rtp(&mut self, plain: &[u8]) {
        let Some(header) = Header::parse(plain) else {
            return;
        };
        let Some(sealer) = self.peer.sealer() else {
            return;
        };
        let extender = self.sending.entry(header.ssrc).or_default();
        let index = extender.guess(header.seq.0);
        extender.commit(index);
        let mut bytes = [plain, &[0; 32]].concat();
        if let Ok(sealed) = sealer.seal_rtp(&mut bytes, header.header_len, plain.len(), index) {
            self.deliver(&mut bytes[..sealed]);
        }
    }

    pub fn say_rtcp(&mut self, plain: &[u8]) {
        let mut bytes = [plain, &[0; 32]].concat();
        let Some(sealer) = self.peer.sealer_mut() else {
            return;
        };
        if let Ok(sealed) = sealer.seal_rtcp(&mut bytes, plain.len()) {
            self.deliver(&mut bytes[..sealed]);
        }
    }

    /// Returns the account at the end, and checks what must hold for it whatever was said.
    pub fn finish(mut self) -> Record {
        self.shard.finish();
        let record = *self.shard.swap_record(Box::default());
        let elapsed = self.now.as_millis();
        for (source, media) in sources().iter().zip([&record.audio, &record.video]) {
            let again = RESEND_BURST + source.bitrate().bps() * elapsed / 8 / 1_000 / 1_200 + 1;
            assert!(
                media.rtx_sent <= again,
                "{} resent in {elapsed} ms, where {again} are allowed",
                media.rtx_sent
            );
            assert_eq!(
                media.packets_lost_network,
                media.packets_repaired + media.packets_lost
            );
        }
        // A stream requests a key frame at most each 200 ms, and a round of packets at most each 10
        // ms.
        assert!(
            record.session.plis_sent <= 2 * (1 + elapsed / 200),
            "{} in {elapsed} ms",
            record.session.plis_sent
        );
        assert!(
            record.session.nacks_sent <= 2 * (1 + elapsed),
            "{} in {elapsed} ms",
            record.session.nacks_sent
        );
        record
    }
}

fn run(input: &[u8]) {
    let mut script = Script::new(input);
    let mut liar = Liar::connected();
    let mut seqs = BTreeMap::new();
    while !script.is_over() {
        match script.u8() % 4 {
            RTP => {
                let packet = rtp(&mut script, &mut seqs);
                liar.say_rtp(&packet);
            }
            RTCP => liar.say_rtcp(script.chunk()),
            TIME => {
                for _ in 0..=script.u8() % 64 {
                    liar.tick();
                }
            }
            _ => liar.deliver(&mut script.chunk().to_vec()),
        }
    }
    for _ in 0..20 {
        liar.tick();
    }
    liar.finish();
}

/// Returns a packet of one of the known SSRCs, near the last one of that SSRC, with any bytes after
/// the fixed header.
pub fn rtp(script: &mut Script<'_>, seqs: &mut BTreeMap<u32, u16>) -> Vec<u8> {
    let (which, step, flags, marker_and_type) =
        (script.u8(), script.u8() as i8, script.u8(), script.u8());
    let ssrc = SSRCS
        .get(usize::from(which))
        .copied()
        .unwrap_or(u32::from(which));
    let seq = seqs.entry(ssrc).or_insert(65_530);
    *seq = seq.wrapping_add(step as u16);
    let mut packet = vec![0x80 | flags & 0x3F, marker_and_type];
    packet.extend(seq.to_be_bytes());
    packet.extend(script.u32().to_be_bytes());
    packet.extend(ssrc.to_be_bytes());
    packet.extend(script.chunk());
    packet
}

fn say(which: u8, step: i8, marker: bool, rtp_time: u32, payload: &[u8]) -> Vec<u8> {
    let head = [RTP, which, step as u8, 0, u8::from(marker) << 7 | 96];
    [&head[..], &rtp_time.to_be_bytes(), &chunk(payload)].concat()
}

pub fn compound(write: impl FnOnce(&mut RtcpWriter<'_>)) -> Vec<u8> {
    let mut buffer = vec![0; 1_200];
    let mut writer = RtcpWriter::new(&mut buffer);
    write(&mut writer);
    let len = writer.len();
    buffer.truncate(len);
    buffer
}

fn seeds() -> Vec<Vec<u8>> {
    let rtcp =
        |write: &dyn Fn(&mut RtcpWriter<'_>)| [&[RTCP][..], &chunk(&compound(write))].concat();
    let wait = |millis: u8| vec![TIME, millis - 1];
    let mut trailer = [0; VIDEO_TRAILER_LEN];
    FrameIdentity {
        run: pair::RUN,
        origin: Origin {
            publisher: 1,
            track: 1,
        },
        intended_unix_us: u64::MAX,
        ..FrameIdentity::default()
    }
    .write_video(&mut trailer);
    let key: Vec<u8> = [
        &[0x90, 0x80, 0x80, 1, 0x10, 0, 0, 0x9D, 1, 0x2A, 96, 0, 54, 0][..],
        &trailer,
    ]
    .concat();
    let inter: Vec<u8> = [&[0x90, 0x80, 0x80, 2, 0x11, 0, 0][..], &trailer].concat();
    let block = |ssrc| ReportBlock {
        ssrc,
        fraction_lost: 255,
        cumulative_lost: 0x7F_FFFF,
        extended_highest_seq: u32::MAX,
        jitter: u32::MAX,
        lsr: 1,
        dlsr: u32::MAX,
    };
    let sender = SenderInfo {
        ssrc: Ssrc(SSRCS[4]),
        ntp: u64::MAX,
        rtp_time: u32::MAX,
        packets: u32::MAX,
        octets: u32::MAX,
    };
    let nack_all = rtcp(&|writer| {
        writer
            .nack(
                Ssrc(1),
                Ssrc(pair::VIDEO_SSRC),
                (0..250).map(|n| Seq(n * 17)),
            )
            .expect("it fits")
    });
    vec![
        [
            say(4, 1, true, 3_000, &key),
            say(4, 1, true, 6_000, &inter),
            wait(40),
            say(4, 3, true, 9_000, &inter),
            wait(30),
            say(3, 1, false, 960, b"opus"),
            say(5, 1, true, 9_000, &[&[0xFF, 0xFD][..], &inter].concat()),
        ]
        .concat(),
        [
            wait(60),
            nack_all.clone(),
            wait(10),
            nack_all.clone(),
            nack_all,
        ]
        .concat(),
        [
            wait(50),
            rtcp(&|writer| {
                writer
                    .sender_report(
                        &sender,
                        [block(Ssrc(pair::AUDIO_SSRC)), block(Ssrc(pair::VIDEO_SSRC))],
                    )
                    .expect("it fits")
            }),
            rtcp(&|writer| {
                let dlrr = DlrrBlock {
                    ssrc: Ssrc(9),
                    last_rr: 1,
                    delay_since_last_rr: 0,
                };
                writer
                    .xr(Ssrc(5), Some(u64::MAX), [dlrr; 4])
                    .expect("it fits");
            }),
            rtcp(&|writer| {
                (0..40).for_each(|_| {
                    writer
                        .pli(Ssrc(1), Ssrc(pair::VIDEO_SSRC))
                        .expect("it fits")
                })
            }),
            rtcp(&|writer| {
                writer
                    .fir(Ssrc(1), &[(Ssrc(pair::VIDEO_SSRC), 1); 30])
                    .expect("it fits")
            }),
            wait(60),
        ]
        .concat(),
        [
            rtcp(&|writer| {
                writer
                    .remb(Ssrc(1), Bitrate::from_bps(1), &[Ssrc(pair::VIDEO_SSRC)])
                    .expect("it fits")
            }),
            rtcp(&|writer| {
                writer
                    .bye(&[Ssrc(SSRCS[3]), Ssrc(SSRCS[4])])
                    .expect("it fits")
            }),
            rtcp(&|writer| {
                let arrivals: Vec<_> = (0..30).map(|n| Some(Time::from_millis(n))).collect();
                writer
                    .transport_cc(
                        Ssrc(1),
                        Ssrc(pair::VIDEO_SSRC),
                        Seq(65_530),
                        1,
                        arrivals.iter().copied(),
                    )
                    .expect("it fits");
            }),
            [
                &[DATAGRAM][..],
                &chunk(&[0; 40]),
                &[DATAGRAM],
                &chunk(&[22, 254, 253, 0, 1, 0, 0, 0, 0, 0, 1, 0, 1, 0]),
            ]
            .concat(),
            say(77, 1, true, 0, &key),
        ]
        .concat(),
    ]
}
