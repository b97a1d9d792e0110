//! Two shards with one peer connection between them, over a seeded link in virtual time. One side
//! is the publisher, the other its subscriber.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use throng::codec::{Codec, PayloadTypes};
use throng::engine::ShardConfig;
use throng::engine::publisher::{MediaSource, Pacing, SendParameters, SimulcastLayer};
use throng::engine::shard::Shard;
use throng::engine::{
    NewPeer, PeerKey, Roster, ShardCommand, ShardEvent, StreamParameters, track_number,
};
use throng::measure::{Kind, Record};
use throng::media::identity::{FrameIdentity, Origin};
use throng::media::opus::{AudioClip, AudioContent, OpusSpec};
use throng::media::vp8::{VideoClip, Vp8Spec};
use throng::recording::Tap;
use throng::transport::peer::{IceCredentials, Identity, PeerParameters};
use throng::transport::rtp::{Datagram as Class, classify};
use throng::units::{Bitrate, Epoch, Time};

use super::link::{Conditions, Datagram, Link, Outlet, under_test};

pub const AUDIO_SSRC: u32 = 0x1000_0001;
pub const VIDEO_SSRC: u32 = 0x1000_0002;
pub const VIDEO_RTX_SSRC: u32 = 0x1000_0003;
pub const AUDIO_LEVEL_EXTENSION: u8 = 1;
pub const MID_EXTENSION: u8 = 2;
pub const RID_EXTENSION: u8 = 3;
pub const REPAIRED_RID_EXTENSION: u8 = 4;
pub const RIDS: [&str; 3] = ["q", "h", "f"];
/// Run tag in every frame's identity.
pub const RUN: u32 = 77;
const TICK: Duration = Duration::from_millis(1);

pub fn audio() -> MediaSource {
    let spec = OpusSpec {
        bitrate: Bitrate::from_bps(24_000),
        frame: Duration::from_millis(20),
        content: AudioContent::Speech,
        dtx: false,
        seed: 1,
    };
    MediaSource::Audio(Arc::new(AudioClip::generate(&spec).unwrap()))
}

pub fn video() -> MediaSource {
    let spec = Vp8Spec {
        width: 320,
        height: 180,
        fps: 15,
        bitrate: Bitrate::from_bps(400_000),
        seed: 1,
    };
    MediaSource::Video(Arc::new(VideoClip::generate(&spec, 2).unwrap()))
}

/// Returns three layers, as small as possible. They are generated only once.
pub fn layers() -> [MediaSource; 3] {
    static LAYERS: OnceLock<[Arc<VideoClip>; 3]> = OnceLock::new();
    let layer = |width, height, fps, bps| {
        let spec = Vp8Spec {
            width,
            height,
            fps,
            bitrate: Bitrate::from_bps(bps),
            seed: 1,
        };
        Arc::new(VideoClip::generate(&spec, 2).unwrap())
    };
    let layers = LAYERS.get_or_init(|| {
        [
            layer(96, 54, 15, 60_000),
            layer(160, 90, 20, 150_000),
            layer(320, 180, 30, 400_000),
        ]
    });
    layers.clone().map(MediaSource::Video)
}

/// SSRC of a layer. Its RTX stream has the next one.
pub const fn layer_ssrc(layer: u8) -> Ssrc {
    Ssrc(VIDEO_SSRC + 2 * layer as u32)
}

/// Returns the SSRC and sequence number of an RTP datagram on the link. They are not encrypted.
pub fn ssrc_and_seq(bytes: &[u8]) -> Option<(u32, u16)> {
    let is_rtp = classify(bytes) == Class::Rtp && bytes.len() >= 12;
    is_rtp.then(|| {
        (
            u32::from_be_bytes(bytes[8..12].try_into().unwrap()),
            u16::from_be_bytes([bytes[2], bytes[3]]),
        )
    })
}

pub struct Pair {
    pub shards: [Shard; 2],
    pub outlets: [Outlet; 2],
    pub link: Link,
    pub now: Time,
    /// The clock of end 0.
    pub epoch: Epoch,
    pub roster: Arc<Roster>,
    /// Number of STUN and DTLS datagrams sent so far.
    pub ice_datagrams: u64,
    addresses: [SocketAddr; 2],
    connected: [bool; 2],
    /// Id of the transport-wide sequence number extension in end 0's packets, for end 1's feedback.
    /// Set it before anything is published.
    pub transport_cc_extension: Option<u8>,
    /// Whether end 1 requests missing packets by NACK.
    pub nacks: bool,
    /// Called for every RTP datagram that is sent. `on_arrived` is called for every one that
    /// arrives.
    pub on_sent: Box<dyn FnMut(&Datagram)>,
    pub on_arrived: Box<dyn FnMut(&Datagram)>,
}

impl Pair {
    /// Returns two connected peers. The link is perfect until [`Pair::set_conditions`].
    pub fn connected(seed: u64) -> Pair {
        Pair::connected_where(seed, false)
    }

    /// The same; `obeys_bandwidth` says whether end 0 obeys its bandwidth estimate.
    pub fn connected_where(seed: u64, obeys_bandwidth: bool) -> Pair {
        let roster = Arc::new(Roster::new(RUN, [0, 0].into_iter()));
        let end = (roster, Epoch::read());
        Pair::between(seed, obeys_bandwidth, [end.clone(), end])
    }

    /// The same, where each end has a roster and a clock of its own, as on two hosts.
    pub fn between(seed: u64, obeys_bandwidth: bool, ends: [(Arc<Roster>, Epoch); 2]) -> Pair {
        let addresses: [SocketAddr; 2] = [
            "192.0.2.1:1000".parse().unwrap(),
            "192.0.2.2:2000".parse().unwrap(),
        ];
        let identity = Identity::generate().unwrap();
        let (roster, epoch) = ends[0].clone();
        let shards = ends.map(|(roster, epoch)| {
            let config = ShardConfig {
                identity: identity.clone(),
                roster,
                epoch,
            };
            Shard::new(config, 2, Time::ZERO)
        });
        let credentials = [IceCredentials::random(), IceCredentials::random()];
        let mut pair = Pair {
            shards,
            outlets: addresses.map(|address| Outlet::new(vec![address; 2])),
            link: Link::new(Conditions::default(), seed),
            now: Time::ZERO,
            epoch,
            roster,
            ice_datagrams: 0,
            addresses,
            connected: [false; 2],
            transport_cc_extension: None,
            nacks: true,
            on_sent: Box::new(|_| {}),
            on_arrived: Box::new(|_| {}),
        };
        for me in [0, 1] {
            let parameters = PeerParameters {
                local_address: addresses[me],
                local: credentials[me].clone(),
                remote: credentials[1 - me].clone(),
                remote_fingerprint: identity.fingerprint(),
                remote_candidates: vec![addresses[1 - me]],
                ice_controlling: me == 0,
                dtls_active: me == 0,
            };
            let peer = NewPeer {
                participant: me as u32,
                room: 0,
                parameters,
                rtcp_ssrc: Ssrc(9 + me as u32),
                cname: format!("end-{me}"),
                obeys_bandwidth: obeys_bandwidth && me == 0,
                data: None,
                intended_at: Time::ZERO,
            };
            pair.shards[me].add_peer(PeerKey(0), peer, Time::ZERO, &mut pair.outlets[me]);
        }
        while pair.connected != [true; 2] {
            assert!(pair.now < Time::from_millis(5_000), "not connected");
            pair.tick();
        }
        pair
    }

    pub fn set_conditions(&mut self, conditions: Conditions) {
        self.link.conditions = conditions;
    }

    /// Copies what end 1 receives to `tap`.
    pub fn record(&mut self, tap: Box<Tap>) {
        self.shards[1].handle_command(
            ShardCommand::Record {
                participant: 1,
                tap,
            },
            self.now,
            &mut self.outlets[1],
        );
    }

    /// Publishes these sources from end 0 to end 1, from the next tick on.
    pub fn publish(&mut self, sources: &[MediaSource], pacing: Pacing) {
        let tracks = sources
            .iter()
            .map(|source| self.track(source, 0, pacing))
            .collect();
        self.publish_tracks(tracks);
    }

    /// Publishes these layers of one video track from end 0, the lowest first. End 1 gets each as
    /// its own stream.
    pub fn publish_layers(&mut self, layers: &[MediaSource], pacing: Pacing) {
        let simulcast = |layer: usize| SimulcastLayer {
            mid: "1".into(),
            rid: RIDS[layer].into(),
            mid_extension: MID_EXTENSION,
            rid_extension: RID_EXTENSION,
            repaired_rid_extension: Some(REPAIRED_RID_EXTENSION),
            track_bitrate: Bitrate::from_bps(
                layers.iter().map(|layer| layer.bitrate().bps()).sum(),
            ),
        };
        let tracks = layers
            .iter()
            .enumerate()
            .map(|(layer, source)| SendParameters {
                simulcast: Some(simulcast(layer)),
                ..self.track(source, layer as u8, pacing)
            });
        let tracks = tracks.collect();
        self.publish_tracks(tracks);
    }

    pub fn publish_tracks(&mut self, tracks: Vec<SendParameters>) {
        let streams = tracks.iter().map(|track| StreamParameters {
            payloads: match track.redundancy {
                Some(redundancy) => PayloadTypes {
                    wrapped: Some(track.payload_type),
                    ..PayloadTypes::of(Codec::Red, redundancy.payload_type)
                },
                None => PayloadTypes::of(track.source.codec(), track.payload_type),
            },
            ssrc: track.ssrc,
            rtx_ssrc: track.rtx_ssrc,
            nack: self.nacks,
            transport_cc_extension: self.transport_cc_extension,
            abs_send_time_extension: None,
            announced_at: self.now,
        });
        let streams = streams.collect();
        self.shards[1].handle_command(
            ShardCommand::Subscribe {
                key: PeerKey(0),
                streams,
            },
            self.now,
            &mut self.outlets[1],
        );
        self.shards[0].handle_command(
            ShardCommand::Publish {
                key: PeerKey(0),
                tracks,
            },
            self.now,
            &mut self.outlets[0],
        );
    }

    /// Returns the parameters of a track that begins with the next tick.
    pub fn track(&self, source: &MediaSource, layer: u8, pacing: Pacing) -> SendParameters {
        let (ssrc, rtx_ssrc) = match source.kind() {
            Kind::Audio => (Ssrc(AUDIO_SSRC), None),
            Kind::Video => (layer_ssrc(layer), Some(Ssrc(layer_ssrc(layer).0 + 1))),
        };
        let track = track_number(source.kind());
        SendParameters {
            source: source.clone(),
            ssrc,
            rtx_ssrc,
            payload_type: 96 + track,
            rtx_payload_type: rtx_ssrc.map(|_| 100),
            redundancy: None,
            transport_cc_extension: self.transport_cc_extension,
            audio_level_extension: (source.kind() == Kind::Audio).then_some(AUDIO_LEVEL_EXTENSION),
            simulcast: None,
            talk: None,
            pacing,
            identity: FrameIdentity {
                run: RUN,
                origin: Origin {
                    publisher: 0,
                    track,
                },
                layer,
                ..FrameIdentity::default()
            },
            seed: 5 + u64::from(layer),
            first_frame_at: self.now + TICK,
        }
    }

    /// Gives the publishing end a command.
    pub fn command(&mut self, command: ShardCommand) {
        self.shards[0].handle_command(command, self.now, &mut self.outlets[0]);
    }

    pub fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.tick();
        }
    }

    /// Stops the media, waits until what is on its way has arrived, and returns the records of both
    /// ends.
    pub fn finish(mut self) -> [Record; 2] {
        self.shards[0].handle_command(ShardCommand::StopPublishing, self.now, &mut self.outlets[0]);
        self.run_for(Duration::from_millis(2_500));
        self.shards.each_mut().map(|shard| {
            shard.finish();
            *shard.swap_record(Box::default())
        })
    }

    /// Advances time by one millisecond, with the steps of a worker's tick.
    pub fn tick(&mut self) {
        self.now += TICK;
        while let Some((at, mut datagram)) = self.link.poll(self.now) {
            let me = usize::from(datagram.to == self.addresses[1]);
            self.take(me, &mut datagram, at);
        }
        for me in [0, 1] {
            let (shard, outlet) = (&mut self.shards[me], &mut self.outlets[me]);
            let now = self.now;
            under_test(true, || shard.handle_media_timers(now, outlet));
            under_test(true, || shard.handle_control_timers(now, outlet));
            while let Some((_, event)) = shard.poll_event() {
                self.connected[me] |= matches!(event, ShardEvent::Connected { .. });
            }
            for datagram in outlet.sent.drain(..) {
                self.ice_datagrams += u64::from(matches!(
                    classify(&datagram.bytes),
                    Class::Stun | Class::Dtls
                ));
                if ssrc_and_seq(&datagram.bytes).is_some() {
                    (self.on_sent)(&datagram);
                }
                self.link.send(datagram, self.now);
            }
        }
    }

    fn take(&mut self, me: usize, datagram: &mut Datagram, at: Time) {
        let (shard, outlet) = (&mut self.shards[me], &mut self.outlets[me]);
        match classify(&datagram.bytes) {
            Class::Rtp => {
                (self.on_arrived)(datagram);
                under_test(true, || {
                    shard.handle_rtp(PeerKey(0), &mut datagram.bytes, at)
                });
            }
            Class::Rtcp => under_test(true, || {
                shard.handle_rtcp(PeerKey(0), &mut datagram.bytes, at, self.now, outlet)
            }),
            _ => shard.handle_setup_datagram(
                PeerKey(0),
                &datagram.bytes,
                datagram.from,
                at,
                self.now,
                outlet,
            ),
        }
    }
}
