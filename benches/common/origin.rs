//! One publisher of ours, whose packets are handed out decrypted: real frames with real identities,
//! packetised and paced as in a run.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use throng::engine::publisher::{MediaSource, Pacing, SendParameters};
use throng::engine::shard::Shard;
use throng::engine::{Io, NewPeer, PeerKey, Roster, ShardCommand, ShardConfig, track_number};
use throng::measure::Kind;
use throng::media::identity::{self, FrameIdentity};
use throng::media::opus::{AudioClip, AudioContent, OpusSpec};
use throng::media::vp8::{VideoClip, Vp8Spec};
use throng::net;
use throng::transport::peer::{IceCredentials, Identity, PeerParameters};
use throng::transport::rtp::{Datagram, Header, classify};
use throng::transport::sequence::SeqExtender;
use throng::transport::srtp::Profile;
use throng::units::{Bitrate, Epoch, Time};

use super::remote::{Remote, Side, address};
use super::{SSRC, is_full, payload_type};

const RUN: u32 = 77;
const TICK: Duration = Duration::from_millis(1);

/// Returns the configuration that all participants of a bench share. The publisher is the
/// participant after the `receivers`.
pub fn shard_config(receivers: usize) -> ShardConfig {
    ShardConfig {
        identity: Identity::generate().expect("a certificate"),
        roster: Arc::new(Roster::new(RUN, (0..=receivers).map(|_| 0))),
        epoch: Epoch::read(),
    }
}

/// Returns the media: video in packets of about 1,100 bytes on the wire, or audio in packets of
/// about 100. A frame is cut into equal packets, so packets are full only if a frame has many of
/// them. Therefore the video has few frames, and large ones. In the small size the frames are small
/// too: one packet each.
pub fn source(kind: Kind) -> MediaSource {
    static VIDEO: OnceLock<Arc<VideoClip>> = OnceLock::new();
    static AUDIO: OnceLock<Arc<AudioClip>> = OnceLock::new();
    let video = || {
        let (width, height, fps, bps) = if is_full() {
            (640, 360, 10, 900_000)
        } else {
            (96, 54, 30, 60_000)
        };
        let spec = Vp8Spec {
            width,
            height,
            fps,
            bitrate: Bitrate::from_bps(bps),
            seed: 1,
        };
        Arc::new(VideoClip::generate(&spec, 2).expect("a spec that can be"))
    };
    let audio = || {
        let spec = OpusSpec {
            bitrate: Bitrate::from_bps(32_000),
            frame: Duration::from_millis(20),
            content: AudioContent::Speech,
            dtx: false,
            seed: 1,
        };
        Arc::new(AudioClip::generate(&spec).expect("a spec that can be"))
    };
    match kind {
        Kind::Video => MediaSource::Video(VIDEO.get_or_init(video).clone()),
        Kind::Audio => MediaSource::Audio(AUDIO.get_or_init(audio).clone()),
    }
}

/// Returns the negotiated parameters of a track of participant `publisher`.
pub fn track(
    kind: Kind,
    transport_cc_extension: Option<u8>,
    publisher: u32,
    first_frame_at: Time,
) -> SendParameters {
    SendParameters {
        source: source(kind),
        ssrc: Ssrc(SSRC),
        rtx_ssrc: None,
        payload_type: payload_type(kind),
        rtx_payload_type: None,
        redundancy: None,
        audio_level_extension: None,
        transport_cc_extension,
        simulcast: None,
        talk: None,
        pacing: Pacing::Paced,
        identity: FrameIdentity {
            run: RUN,
            origin: identity::Origin {
                publisher,
                track: track_number(kind),
            },
            ..FrameIdentity::default()
        },
        seed: 5,
        first_frame_at,
    }
}

/// An RTP packet before it is sealed.
#[derive(Clone)]
pub struct Plain {
    pub bytes: Vec<u8>,
    pub header_len: usize,
    /// ROC << 16 | SEQ.
    pub index: u64,
    /// Time at which the publisher sent it.
    pub at: Time,
}

pub struct Origin {
    shard: Shard,
    remote: Remote,
    extender: SeqExtender,
    io: Capture,
    pub now: Time,
    packets: VecDeque<Plain>,
}

impl Origin {
    /// Makes a publisher that publishes from `now` on.
    pub fn publishing(
        kind: Kind,
        transport_cc_extension: Option<u8>,
        participant: usize,
        config: &ShardConfig,
        now: Time,
    ) -> Origin {
        let ours = Side {
            address: address(3, 0),
            credentials: IceCredentials::random(),
            fingerprint: config.identity.fingerprint(),
        };
        let theirs = Remote::side(0, config);
        let mut shard = Shard::new(config.clone(), 1, now);
        let mut io = Capture::default();
        shard.add_peer(
            PeerKey(0),
            new_peer(participant, &ours, &theirs),
            now,
            &mut io,
        );
        let mut origin = Origin {
            shard,
            remote: Remote::new(theirs, &ours, config, now),
            extender: SeqExtender::default(),
            io,
            now,
            packets: VecDeque::new(),
        };
        while !origin.remote.connected {
            origin.connect(ours.address);
        }
        // The last DTLS flight still has to be delivered.
        origin.connect(ours.address);
        let tracks = vec![track(
            kind,
            transport_cc_extension,
            participant as u32,
            origin.now + TICK,
        )];
        origin.shard.handle_command(
            ShardCommand::Publish {
                key: PeerKey(0),
                tracks,
            },
            origin.now,
            &mut origin.io,
        );
        origin
    }

    /// Returns the next packet, however long it takes in virtual time.
    pub fn next(&mut self) -> Plain {
        loop {
            if let Some(packet) = self.packets.pop_front() {
                return packet;
            }
            self.send_until(self.now + TICK);
        }
    }

    /// Hands each packet that is due by `now` to `take`.
    pub fn send(&mut self, now: Time, mut take: impl FnMut(&Plain)) {
        self.send_until(now);
        self.packets.drain(..).for_each(|packet| take(&packet));
    }

    /// Returns the SRTP profile that its connection has agreed on, and so has every connection to
    /// an end of ours.
    pub fn profile(&self) -> Profile {
        self.remote.peer.sealer().expect("connected").profile()
    }

    fn send_until(&mut self, now: Time) {
        self.now = now;
        self.shard.handle_media_timers(now, &mut self.io);
        for mut bytes in self.io.sent.drain(..) {
            let header = Header::parse(&bytes).expect("RTP");
            let index = self.extender.guess(header.seq.0);
            let opener = self.remote.peer.opener().expect("connected");
            let len = opener
                .open_rtp(&mut bytes, header.header_len, index)
                .expect("our own packet");
            self.extender.commit(index);
            bytes.truncate(len);
            self.packets.push_back(Plain {
                bytes,
                header_len: header.header_len,
                index,
                at: now,
            });
        }
    }

    fn connect(&mut self, ours: SocketAddr) {
        self.now += TICK;
        let now = self.now;
        for datagram in std::mem::take(&mut self.io.sent) {
            assert!(matches!(
                classify(&datagram),
                Datagram::Stun | Datagram::Dtls
            ));
            self.remote.handle_setup(&datagram, ours, now);
        }
        let mut back = Vec::new();
        self.remote
            .turn(now, |datagram| back.push(datagram.to_vec()));
        let from = self.remote.side.address;
        for datagram in back {
            self.shard
                .handle_setup_datagram(PeerKey(0), &datagram, from, now, now, &mut self.io);
        }
        self.shard.handle_control_timers(now, &mut self.io);
    }
}

/// Returns a participant of ours, as signalling describes it to a shard.
pub fn new_peer(participant: usize, ours: &Side, theirs: &Side) -> NewPeer {
    NewPeer {
        participant: participant as u32,
        room: 0,
        parameters: PeerParameters {
            local_address: ours.address,
            local: ours.credentials.clone(),
            remote: theirs.credentials.clone(),
            remote_fingerprint: theirs.fingerprint,
            remote_candidates: vec![theirs.address],
            ice_controlling: true,
            dtls_active: true,
        },
        rtcp_ssrc: Ssrc(9),
        cname: format!("participant-{participant}"),
        intended_at: Time::ZERO,
        obeys_bandwidth: false,
        data: None,
    }
}

/// [`Io`] that keeps every datagram.
struct Capture {
    buffer: Vec<u8>,
    sent: Vec<Vec<u8>>,
}

impl Default for Capture {
    fn default() -> Capture {
        Capture {
            buffer: vec![0; net::SEND_BYTES_MAX],
            sent: Vec::new(),
        }
    }
}

impl Io for Capture {
    fn lend(&mut self) -> &mut [u8] {
        &mut self.buffer
    }

    fn send(&mut self, _key: PeerKey, _to: SocketAddr, len: usize, segment: usize) {
        self.sent
            .extend(self.buffer[..len].chunks(segment).map(<[u8]>::to_vec));
    }

    fn nominate(&mut self, _key: PeerKey, _to: throng::path::FarEnd) {}
}
