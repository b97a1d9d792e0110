//! An independent WebRTC stack (`rtc`, the sans-IO core of webrtc-rs) as the server of our
//! participants, in memory and in virtual time.
//!
//! A [`World`] holds one shard. Each of its peers talks to its own peer connection of `rtc`. We
//! publish on leg 0. `rtc` forwards to us on leg 1 what it receives there, with new SSRCs and
//! sequence numbers, and it relays our key frame requests. So it is a small SFU that uses none of
//! our stack.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};
use throng::transport::rtp::Ssrc;

use bytes::BytesMut;
use rtc::dtls::extension::extension_use_srtp::SrtpProtectionProfile;
use rtc::interceptor::{
    Interceptor, NackGeneratorBuilder, NackResponderBuilder, Packet, ReceiverReportBuilder,
    Registry, SenderReportBuilder, Slot, StreamInfo, TaggedPacket,
};
use rtc::media_stream::MediaStreamTrack;
use rtc::peer_connection::configuration::media_engine::{
    MIME_TYPE_OPUS, MIME_TYPE_RTX, MIME_TYPE_VP8, MediaEngine,
};
use rtc::peer_connection::configuration::setting_engine::SettingEngineBuilder;
use rtc::peer_connection::event::RTCPeerConnectionEvent;
use rtc::peer_connection::message::{RTCMessage, TaggedRTCMessage};
use rtc::peer_connection::sdp::RTCSessionDescription;
use rtc::peer_connection::state::RTCPeerConnectionState;
use rtc::peer_connection::transport::{
    CandidateConfig, CandidateHostConfig, RTCDtlsRole, RTCIceCandidate,
};
use rtc::peer_connection::{RTCPeerConnection, RTCPeerConnectionBuilder};
use rtc::rtcp;
use rtc::rtcp::payload_feedbacks::picture_loss_indication::PictureLossIndication;
use rtc::rtp;
use rtc::rtp_transceiver::rtp_sender::{
    RTCPFeedback, RTCRtpCodec, RTCRtpCodecParameters, RTCRtpCodingParameters,
    RTCRtpEncodingParameters, RTCRtpHeaderExtensionCapability, RTCRtpRtxParameters, RtpCodecKind,
};
use rtc::rtp_transceiver::{RTCRtpSenderId, RTCRtpTransceiverDirection, RTCRtpTransceiverInit};
use rtc::sansio::Protocol;
use rtc::shared::error::Error;
use rtc::shared::{TaggedBytesMut, TransportContext, TransportProtocol};

use throng::codec::Codec;
use throng::engine::ShardConfig;
use throng::engine::publisher::{MediaSource, Pacing, SendParameters};
use throng::engine::shard::Shard;
use throng::engine::{NewPeer, PeerKey, Roster, ShardCommand, ShardEvent, StreamParameters};
use throng::measure::{Kind, Record};
use throng::media::identity::{FrameIdentity, Origin};
use throng::transport::peer::{IceCredentials, Identity, PeerFailure, PeerParameters};
use throng::transport::rtp::{Datagram as Class, classify};
use throng::transport::sdp::{
    Answerer, Candidate, Capabilities, DtlsSetup, Extension, LocalTrack, LocalTransport,
    NegotiatedMedia, Offerer, RemoteTransport,
};
use throng::units::{Epoch, Time};

use super::link::{Conditions, Datagram, Link, Outlet};
use super::pair::{AUDIO_SSRC, VIDEO_RTX_SSRC, VIDEO_SSRC, audio, ssrc_and_seq, video};

/// SSRCs of the streams that `rtc` forwards.
pub const SENT_AUDIO_SSRC: u32 = 0x2000_0001;
pub const SENT_VIDEO_SSRC: u32 = 0x2000_0002;
pub const SENT_VIDEO_RTX_SSRC: u32 = 0x2000_0003;
/// First sequence number of the forwarded streams, chosen so that they soon wrap.
pub const SENT_FIRST_SEQ: u16 = 65_500;
pub const RUN: u32 = 77;
/// One-way delay. It is whole milliseconds, so that the times of the two ends can be told apart.
pub const DELAY: Duration = Duration::from_millis(10);
const TICK: Duration = Duration::from_millis(1);
static SOURCES: LazyLock<[MediaSource; 2]> = LazyLock::new(|| [audio(), video()]);
const CONNECT_TIMEOUT: Time = Time::from_millis(5_000);

/// False statement in a description.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Forged {
    Nothing,
    OurFingerprint,
    TheirFingerprint,
}

/// One connection between us and `rtc`.
#[derive(Clone)]
pub struct Leg {
    /// Whether we offer and send. Otherwise `rtc` does.
    pub publish: bool,
    /// Whether we send the ClientHello.
    pub dtls_active: bool,
    /// Whether `rtc` is an ICE-lite agent.
    pub ice_lite: bool,
    /// Whether video is retransmitted on a separate SSRC.
    pub rtx: bool,
    /// SRTP profiles that `rtc` supports. If empty, it uses its default.
    pub profiles: Vec<SrtpProtectionProfile>,
    pub forged: Forged,
}

impl Leg {
    pub fn publisher() -> Leg {
        Leg {
            publish: true,
            dtls_active: true,
            ice_lite: false,
            rtx: true,
            profiles: Vec::new(),
            forged: Forged::Nothing,
        }
    }

    pub fn subscriber() -> Leg {
        Leg {
            publish: false,
            ..Leg::publisher()
        }
    }
}

/// A packet that `rtc` received and decrypted, or sent.
#[derive(Clone)]
pub struct Seen<T> {
    /// Position among all packets of its end.
    pub order: usize,
    pub at: Time,
    pub packet: T,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    ToRtc,
    FromRtc,
}

/// Interceptor between the wire and all others. It sees every packet, and can hide received ones
/// from the others.
#[derive(Clone, Default)]
struct Tap(Arc<Mutex<Tape>>);

type Loses = Box<dyn FnMut(&rtp::Packet) -> bool + Send + Sync>;

#[derive(Default)]
struct Tape {
    seen: Vec<(Way, Instant, Packet)>,
    lost: Vec<rtp::Packet>,
    loses: Option<Loses>,
    reads: VecDeque<TaggedPacket>,
    writes: VecDeque<TaggedPacket>,
}

impl Protocol<TaggedPacket, TaggedPacket, ()> for Tap {
    type Rout = TaggedPacket;
    type Wout = TaggedPacket;
    type Eout = ();
    type Error = Error;
    type Time = Instant;

    fn handle_read(&mut self, packet: TaggedPacket) -> Result<(), Error> {
        let tape = &mut *self.0.lock().unwrap();
        if let (Packet::Rtp(rtp), Some(loses)) = (&packet.message.packet, &mut tape.loses)
            && loses(rtp)
        {
            tape.lost.push(rtp.clone());
            return Ok(());
        }
        tape.seen
            .push((Way::ToRtc, packet.now, packet.message.packet.clone()));
        tape.reads.push_back(packet);
        Ok(())
    }

    fn poll_read(&mut self) -> Option<TaggedPacket> {
        self.0.lock().unwrap().reads.pop_front()
    }

    fn handle_write(&mut self, packet: TaggedPacket) -> Result<(), Error> {
        let tape = &mut *self.0.lock().unwrap();
        tape.seen
            .push((Way::FromRtc, packet.now, packet.message.packet.clone()));
        tape.writes.push_back(packet);
        Ok(())
    }

    fn poll_write(&mut self) -> Option<TaggedPacket> {
        self.0.lock().unwrap().writes.pop_front()
    }
}

impl Interceptor for Tap {
    fn bind_local_stream(&mut self, _info: &StreamInfo) {}
    fn unbind_local_stream(&mut self, _info: &StreamInfo) {}
    fn bind_remote_stream(&mut self, _info: &StreamInfo) {}
    fn unbind_remote_stream(&mut self, _info: &StreamInfo) {}
}

/// One peer connection of `rtc`.
pub struct RtcEnd {
    pub pc: RTCPeerConnection,
    pub state: RTCPeerConnectionState,
    /// Packets that its application was given.
    pub delivered: Vec<rtp::Packet>,
    tap: Tap,
    senders: Vec<RTCRtpSenderId>,
    first_seqs: [Option<u16>; 2],
    forwarded: usize,
    relayed: usize,
    epoch: Epoch,
    address: SocketAddr,
}

impl RtcEnd {
    fn new(leg: &Leg, address: SocketAddr, epoch: Epoch) -> RtcEnd {
        let role = if leg.dtls_active {
            RTCDtlsRole::Server
        } else {
            RTCDtlsRole::Client
        };
        let mut settings = SettingEngineBuilder::new()
            .with_answering_dtls_role(role)
            .with_lite(leg.ice_lite);
        if !leg.profiles.is_empty() {
            settings = settings.with_srtp_protection_profiles(leg.profiles.clone());
        }
        let tap = Tap::default();
        let interceptors = Registry::new()
            .with(Slot::Custom(1), tap.clone())
            .with(Slot::NackResponder, NackResponderBuilder::new().build())
            // One NACK a packet: the generator does not see packets that come over RTX, and would
            // request them for ever.
            .with(
                Slot::NackGenerator,
                NackGeneratorBuilder::new()
                    .with_max_nacks_per_packet(1)
                    .build(),
            )
            .with(Slot::ReceiverReport, ReceiverReportBuilder::new().build())
            .with(Slot::SenderReport, SenderReportBuilder::new().build());
        let mut pc = RTCPeerConnectionBuilder::new()
            .with_setting_engine(settings.build())
            .with_media_engine(media_engine(leg.rtx))
            .with_interceptor_registry(interceptors)
            .build(epoch.instant(Time::ZERO))
            .unwrap();
        pc.add_local_candidate(
            RTCIceCandidate::from(&host_candidate(address))
                .to_json()
                .unwrap(),
        )
        .unwrap();
        RtcEnd {
            pc,
            state: RTCPeerConnectionState::New,
            delivered: Vec::new(),
            tap,
            senders: Vec::new(),
            first_seqs: [None; 2],
            forwarded: 0,
            relayed: 0,
            epoch,
            address,
        }
    }

    /// Takes our offer and returns its answer.
    fn answer(&mut self, offer: String) -> String {
        let now = self.epoch.instant(Time::ZERO);
        self.pc
            .set_remote_description(now, RTCSessionDescription::offer(offer).unwrap())
            .unwrap();
        let answer = self.pc.create_answer(None).unwrap();
        self.pc.set_local_description(now, answer).unwrap();
        self.pc.local_description().unwrap().sdp
    }

    /// Returns an offer with an audio and a video track.
    fn offer(&mut self, rtx: bool) -> String {
        for kind in [Kind::Audio, Kind::Video] {
            self.pc
                .add_transceiver_from_track(sent_track(kind, rtx), Some(send_only()))
                .unwrap();
        }
        self.senders = self.pc.get_senders().collect();
        let offer = self.pc.create_offer(None).unwrap();
        self.pc
            .set_local_description(self.epoch.instant(Time::ZERO), offer)
            .unwrap();
        self.pc.local_description().unwrap().sdp
    }

    fn take_answer(&mut self, answer: String) {
        let now = self.epoch.instant(Time::ZERO);
        self.pc
            .set_remote_description(now, RTCSessionDescription::answer(answer).unwrap())
            .unwrap();
    }

    fn handle_datagram(&mut self, datagram: &Datagram, at: Time) {
        let transport = TransportContext {
            local_addr: self.address,
            peer_addr: datagram.from,
            transport_protocol: TransportProtocol::UDP,
            ecn: None,
        };
        // Packets that it refuses are ignored, because the tests look at what came through.
        let _ = self.pc.handle_read(TaggedBytesMut {
            now: self.epoch.instant(at),
            transport,
            message: BytesMut::from(&datagram.bytes[..]),
        });
    }

    fn poll(&mut self, now: Time, mut send: impl FnMut(Datagram)) {
        let instant = self.epoch.instant(now);
        if self.pc.poll_timeout().is_some_and(|at| at <= instant) {
            let _ = self.pc.handle_timeout(instant);
        }
        while let Some(event) = self.pc.poll_event() {
            if let RTCPeerConnectionEvent::OnConnectionStateChangeEvent(state) = event {
                self.state = state;
            }
        }
        while let Some(TaggedRTCMessage { message, .. }) = self.pc.poll_read() {
            if let RTCMessage::RtpPacket(_, packet) = message {
                self.delivered.push(packet);
            }
        }
        while let Some(message) = self.pc.poll_write() {
            send(Datagram {
                from: self.address,
                to: message.transport.peer_addr,
                bytes: message.message.to_vec(),
            });
        }
    }

    /// Forwards a packet of the publisher.
    fn forward(&mut self, packet: &rtp::Packet, now: Time) {
        let is_video = packet.header.ssrc == VIDEO_SSRC;
        let track = usize::from(is_video);
        let seq = packet.header.sequence_number;
        let first_seq = *self.first_seqs[track].get_or_insert(seq);
        let header = rtp::Header {
            version: 2,
            ssrc: [SENT_AUDIO_SSRC, SENT_VIDEO_SSRC][track],
            sequence_number: SENT_FIRST_SEQ.wrapping_add(seq.wrapping_sub(first_seq)),
            payload_type: [111, 96][track],
            marker: packet.header.marker,
            timestamp: packet.header.timestamp,
            ..rtp::Header::default()
        };
        let payload = packet.payload.clone();
        let mut sender = self.pc.rtp_sender(self.senders[track]).unwrap();
        sender
            .write_rtp(self.epoch.instant(now), rtp::Packet { header, payload })
            .unwrap();
    }

    pub fn send_rtcp(&mut self, packet: Box<dyn rtcp::Packet>, now: Time) {
        let id = self.pc.get_receivers().next().unwrap();
        let instant = self.epoch.instant(now);
        self.pc
            .rtp_receiver(id)
            .unwrap()
            .write_rtcp(instant, vec![packet])
            .unwrap();
    }

    /// Makes `rtc` behave from now on as if it had not received the packets for which `loses`
    /// returns true.
    pub fn pretend_to_lose(
        &mut self,
        loses: impl FnMut(&rtp::Packet) -> bool + Send + Sync + 'static,
    ) {
        self.tap.0.lock().unwrap().loses = Some(Box::new(loses));
    }

    pub fn pretended_lost(&self) -> Vec<rtp::Packet> {
        self.tap.0.lock().unwrap().lost.clone()
    }

    pub fn rtp(&self, way: Way, ssrc: u32) -> Vec<Seen<rtp::Packet>> {
        self.select(way, |packet| match packet {
            Packet::Rtp(rtp) if rtp.header.ssrc == ssrc => vec![rtp.clone()],
            _ => Vec::new(),
        })
    }

    /// Returns all RTCP packets of one type.
    pub fn rtcp<T: rtcp::Packet + Clone + 'static>(&self, way: Way) -> Vec<Seen<T>> {
        self.select(way, |packet| match packet {
            Packet::Rtcp(packets) => packets
                .iter()
                .filter_map(|packet| packet.as_any().downcast_ref::<T>().cloned())
                .collect(),
            _ => Vec::new(),
        })
    }

    fn select<T>(&self, way: Way, pick: impl Fn(&Packet) -> Vec<T>) -> Vec<Seen<T>> {
        let tape = self.tap.0.lock().unwrap();
        let seen = tape
            .seen
            .iter()
            .enumerate()
            .filter(|(_, (went, ..))| *went == way);
        seen.flat_map(|(order, (_, at, packet))| {
            let at = self.epoch.time(*at);
            pick(packet)
                .into_iter()
                .map(move |packet| Seen { order, at, packet })
        })
        .collect()
    }
}

fn host_candidate(address: SocketAddr) -> rtc::ice::candidate::Candidate {
    CandidateHostConfig {
        base_config: CandidateConfig {
            network: "udp".into(),
            address: address.ip().to_string(),
            port: address.port(),
            component: 1,
            ..CandidateConfig::default()
        },
        ..CandidateHostConfig::default()
    }
    .new_candidate_host()
    .unwrap()
}

fn codec(kind: Kind) -> RTCRtpCodec {
    let feedback = |typ: &str, parameter: &str| RTCPFeedback {
        typ: typ.into(),
        parameter: parameter.into(),
    };
    match kind {
        Kind::Audio => RTCRtpCodec {
            mime_type: MIME_TYPE_OPUS.into(),
            clock_rate: 48_000,
            channels: 2,
            sdp_fmtp_line: "minptime=10;useinbandfec=1".into(),
            rtcp_feedback: vec![feedback("nack", "")],
        },
        Kind::Video => RTCRtpCodec {
            mime_type: MIME_TYPE_VP8.into(),
            clock_rate: 90_000,
            rtcp_feedback: vec![
                feedback("nack", ""),
                feedback("nack", "pli"),
                feedback("ccm", "fir"),
            ],
            ..RTCRtpCodec::default()
        },
    }
}

fn media_engine(rtx: bool) -> MediaEngine {
    let mut engine = MediaEngine::default();
    let mut register = |rtp_codec, payload_type, kind| {
        engine
            .register_codec(
                RTCRtpCodecParameters {
                    rtp_codec,
                    payload_type,
                },
                kind,
            )
            .unwrap();
    };
    register(codec(Kind::Audio), 111, RtpCodecKind::Audio);
    register(codec(Kind::Video), 96, RtpCodecKind::Video);
    if rtx {
        let rtx_codec = RTCRtpCodec {
            mime_type: MIME_TYPE_RTX.into(),
            clock_rate: 90_000,
            sdp_fmtp_line: "apt=96".into(),
            ..RTCRtpCodec::default()
        };
        register(rtx_codec, 97, RtpCodecKind::Video);
    }
    let uri = Extension::AudioLevel.uri().into();
    engine
        .register_header_extension(
            RTCRtpHeaderExtensionCapability { uri },
            RtpCodecKind::Audio,
            None,
        )
        .unwrap();
    engine
}

fn sent_track(kind: Kind, rtx: bool) -> MediaStreamTrack {
    let (name, ssrc, codec_kind) = match kind {
        Kind::Audio => ("audio", SENT_AUDIO_SSRC, RtpCodecKind::Audio),
        Kind::Video => ("video", SENT_VIDEO_SSRC, RtpCodecKind::Video),
    };
    let repair = (rtx && kind == Kind::Video).then_some(RTCRtpRtxParameters {
        ssrc: SENT_VIDEO_RTX_SSRC,
    });
    let coding = RTCRtpEncodingParameters {
        rtp_coding_parameters: RTCRtpCodingParameters {
            ssrc: Some(ssrc),
            rtx: repair,
            ..RTCRtpCodingParameters::default()
        },
        active: true,
        codec: codec(kind),
        ..RTCRtpEncodingParameters::default()
    };
    MediaStreamTrack::new(
        "stream".into(),
        name.into(),
        name.into(),
        codec_kind,
        vec![coding],
    )
}

fn send_only() -> RTCRtpTransceiverInit {
    RTCRtpTransceiverInit {
        direction: RTCRtpTransceiverDirection::Sendonly,
        streams: Vec::new(),
        send_encodings: Vec::new(),
    }
}

/// Result of the negotiation of one leg.
pub struct Agreed {
    pub dtls_active: bool,
    /// Our tracks, audio first.
    pub media: Vec<NegotiatedMedia>,
    streams: Vec<StreamParameters>,
    remote: RemoteTransport,
}

/// Decides whether a datagram that is sent now is lost.
pub type LinkLoses = Box<dyn FnMut(&Datagram, Time) -> bool>;
pub type OnArrived = Box<dyn FnMut(&Datagram, Time)>;

pub struct World {
    pub shard: Shard,
    pub ends: Vec<RtcEnd>,
    pub agreed: Vec<Agreed>,
    pub now: Time,
    pub epoch: Epoch,
    pub sources: [MediaSource; 2],
    /// Jitter of RTP from `rtc`. Everything else takes exactly [`DELAY`].
    pub jitter: Duration,
    /// Called for every datagram of both ends.
    pub loses: LinkLoses,
    /// Called for every RTP datagram as it reaches us.
    pub on_arrived: OnArrived,
    pub connected: Vec<bool>,
    pub failure: Option<PeerFailure>,
    outlet: Outlet,
    link: Link,
}

impl World {
    /// Returns a world with every leg connected.
    pub fn connected(legs: &[Leg]) -> World {
        let mut world = World::agreed(legs);
        while world.connected.contains(&false)
            || world
                .ends
                .iter()
                .any(|end| end.state != RTCPeerConnectionState::Connected)
        {
            assert!(
                world.now < CONNECT_TIMEOUT && world.failure.is_none(),
                "not connected: {:?}",
                world.failure
            );
            world.tick();
        }
        world
    }

    /// Returns a world in which the descriptions have been exchanged and nothing has been sent yet.
    pub fn agreed(legs: &[Leg]) -> World {
        let (identity, epoch) = (Identity::generate().unwrap(), Epoch::read());
        let roster = Arc::new(Roster::new(RUN, legs.iter().map(|_| 0)));
        let config = ShardConfig {
            identity: identity.clone(),
            roster,
            epoch,
        };
        let addresses = (0..legs.len()).map(our_address).collect();
        let conditions = Conditions {
            delay: DELAY,
            ..Conditions::default()
        };
        let mut world = World {
            shard: Shard::new(config, legs.len(), Time::ZERO),
            ends: Vec::new(),
            agreed: Vec::new(),
            now: Time::ZERO,
            epoch,
            sources: SOURCES.clone(),
            jitter: Duration::ZERO,
            loses: Box::new(|_, _| false),
            on_arrived: Box::new(|_, _| {}),
            connected: vec![false; legs.len()],
            failure: None,
            outlet: Outlet::new(addresses),
            link: Link::new(conditions, 1),
        };
        legs.iter()
            .enumerate()
            .for_each(|(key, leg)| world.add_leg(key, leg, &identity));
        world
    }

    fn add_leg(&mut self, key: usize, leg: &Leg, identity: &Identity) {
        let credentials = IceCredentials::random();
        let mut fingerprint = identity.fingerprint();
        fingerprint.0[0] ^= u8::from(leg.forged == Forged::OurFingerprint);
        let local = LocalTransport {
            ufrag: credentials.ufrag.clone(),
            pwd: credentials.password.clone(),
            fingerprint,
            setup: match (leg.publish, leg.dtls_active) {
                (true, _) => DtlsSetup::ActPass,
                (false, true) => DtlsSetup::Active,
                (false, false) => DtlsSetup::Passive,
            },
            candidates: vec![Candidate::host(our_address(key))],
            session_id: 1,
        };
        let mut end = RtcEnd::new(leg, rtc_address(key), self.epoch);
        let mut agreed = if leg.publish {
            publish_leg(&mut end, &local)
        } else {
            subscribe_leg(&mut end, &local, leg.rtx)
        };
        agreed.remote.fingerprint.0[0] ^= u8::from(leg.forged == Forged::TheirFingerprint);
        assert_eq!(agreed.remote.ice_lite, leg.ice_lite);
        let parameters = PeerParameters {
            local_address: our_address(key),
            local: credentials,
            remote: IceCredentials {
                ufrag: agreed.remote.ufrag.clone(),
                password: agreed.remote.pwd.clone(),
            },
            remote_fingerprint: agreed.remote.fingerprint,
            remote_candidates: agreed
                .remote
                .candidates
                .iter()
                .map(|candidate| candidate.address)
                .collect(),
            ice_controlling: leg.publish || leg.ice_lite,
            dtls_active: agreed.dtls_active,
        };
        let peer = NewPeer {
            participant: key as u32,
            room: 0,
            parameters,
            rtcp_ssrc: Ssrc(9 + key as u32),
            cname: format!("end-{key}"),
            obeys_bandwidth: false,
            data: None,
            intended_at: Time::ZERO,
        };
        let key = PeerKey(key);
        self.shard.add_peer(key, peer, Time::ZERO, &mut self.outlet);
        let streams = agreed.streams.clone();
        self.shard.handle_command(
            ShardCommand::Subscribe { key, streams },
            self.now,
            &mut self.outlet,
        );
        self.ends.push(end);
        self.agreed.push(agreed);
    }

    /// Publishes on leg 0 from the next whole second on.
    pub fn publish(&mut self, pacing: Pacing) {
        let first_frame_at = Time::from_millis((self.now.as_millis() + 1).next_multiple_of(1_000));
        let tracks = self
            .sources
            .iter()
            .zip(&self.agreed[0].media)
            .enumerate()
            .map(|(track, (source, media))| {
                assert!(media.accepted);
                SendParameters {
                    source: source.clone(),
                    ssrc: Ssrc([AUDIO_SSRC, VIDEO_SSRC][track]),
                    rtx_ssrc: (track == 1).then_some(Ssrc(VIDEO_RTX_SSRC)),
                    payload_type: media.payloads.unwrap().plain_payload_type(),
                    redundancy: None,
                    rtx_payload_type: media.rtx_payload_type,
                    transport_cc_extension: None,
                    audio_level_extension: media
                        .extensions
                        .id(Extension::AudioLevel)
                        .filter(|_| track == 0),
                    simulcast: None,
                    talk: None,
                    pacing,
                    identity: FrameIdentity {
                        run: RUN,
                        origin: Origin {
                            publisher: 0,
                            track: track as u8,
                        },
                        ..FrameIdentity::default()
                    },
                    seed: 5,
                    first_frame_at,
                }
            });
        let tracks = tracks.collect();
        self.shard.handle_command(
            ShardCommand::Publish {
                key: PeerKey(0),
                tracks,
            },
            self.now,
            &mut self.outlet,
        );
    }

    pub fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.tick();
        }
    }

    /// Stops the media, waits until what is on its way has arrived, and returns our record.
    pub fn finish(&mut self) -> Record {
        self.shard
            .handle_command(ShardCommand::StopPublishing, self.now, &mut self.outlet);
        self.run_for(Duration::from_millis(2_500));
        self.shard.finish();
        *self.shard.swap_record(Box::default())
    }

    /// Advances time by one millisecond.
    pub fn tick(&mut self) {
        self.now += TICK;
        let now = self.now;
        while let Some((at, datagram)) = self.link.poll(now) {
            match self.ends.iter().position(|end| end.address == datagram.to) {
                Some(key) => self.ends[key].handle_datagram(&datagram, at),
                None => self.take(datagram, at),
            }
        }
        self.shard.handle_media_timers(now, &mut self.outlet);
        self.shard.handle_control_timers(now, &mut self.outlet);
        while let Some((key, event)) = self.shard.poll_event() {
            match event {
                ShardEvent::Connected { .. } => self.connected[key.0] = true,
                ShardEvent::Failed { failure, .. } => self.failure = Some(failure),
                _ => {}
            }
        }
        self.forward();
        let mut sent = std::mem::take(&mut self.outlet.sent);
        self.ends
            .iter_mut()
            .for_each(|end| end.poll(now, |datagram| sent.push(datagram)));
        sent.into_iter().for_each(|datagram| self.send(datagram));
    }

    fn send(&mut self, datagram: Datagram) {
        if (self.loses)(&datagram, self.now) {
            return;
        }
        let is_media = ssrc_and_seq(&datagram.bytes).is_some()
            && self.ends.iter().any(|end| end.address == datagram.from);
        self.link.conditions.jitter = if is_media {
            self.jitter
        } else {
            Duration::ZERO
        };
        self.link.send(datagram, self.now);
    }

    fn take(&mut self, mut datagram: Datagram, at: Time) {
        let key = self
            .outlet
            .addresses
            .iter()
            .position(|address| *address == datagram.to)
            .map(PeerKey)
            .unwrap();
        match classify(&datagram.bytes) {
            Class::Rtp => {
                (self.on_arrived)(&datagram, at);
                self.shard.handle_rtp(key, &mut datagram.bytes, at);
            }
            Class::Rtcp => {
                self.shard
                    .handle_rtcp(key, &mut datagram.bytes, at, self.now, &mut self.outlet)
            }
            _ => self.shard.handle_setup_datagram(
                key,
                &datagram.bytes,
                datagram.from,
                at,
                self.now,
                &mut self.outlet,
            ),
        }
    }

    /// Acts as an SFU: forwards media from leg 0 to leg 1, and key frame requests back.
    fn forward(&mut self) {
        let [publisher, subscriber] = &mut self.ends[..] else {
            return;
        };
        for packet in &publisher.delivered[publisher.forwarded..] {
            subscriber.forward(packet, self.now);
        }
        publisher.forwarded = publisher.delivered.len();
        let requests = subscriber.rtcp::<PictureLossIndication>(Way::ToRtc).len();
        if requests > subscriber.relayed {
            subscriber.relayed = requests;
            let request = PictureLossIndication {
                sender_ssrc: 1,
                media_ssrc: VIDEO_SSRC,
            };
            publisher.send_rtcp(Box::new(request), self.now);
        }
    }
}

pub fn our_address(key: usize) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, 1], 1_000 + key as u16))
}

pub fn rtc_address(key: usize) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, 2], 2_000 + key as u16))
}

fn publish_leg(end: &mut RtcEnd, local: &LocalTransport) -> Agreed {
    let track = |kind, ssrc, rtx_ssrc| LocalTrack {
        codec: Codec::default_of(kind),
        cid: format!("track-{ssrc}"),
        stream_id: "stream".into(),
        ssrc,
        rtx_ssrc,
        rids: Vec::new(),
    };
    let tracks = [
        track(Kind::Audio, Ssrc(AUDIO_SSRC), None),
        track(Kind::Video, Ssrc(VIDEO_SSRC), Some(Ssrc(VIDEO_RTX_SSRC))),
    ];
    let mut offerer = Offerer::default();
    tracks.into_iter().for_each(|track| offerer.send(track));
    let answer = end.answer(offerer.offer(local));
    let answer = offerer.handle_answer(&answer).unwrap();
    Agreed {
        dtls_active: answer.remote.setup == DtlsSetup::Passive,
        media: answer.media,
        streams: Vec::new(),
        remote: answer.remote,
    }
}

fn subscribe_leg(end: &mut RtcEnd, local: &LocalTransport, rtx: bool) -> Agreed {
    let offer = end.offer(rtx);
    let answered = Answerer::new(Capabilities::SUBSCRIBER)
        .answer(&offer, local)
        .unwrap();
    end.take_answer(answered.sdp);
    let streams = answered.added.iter().map(|track| StreamParameters {
        payloads: track.payloads,
        ssrc: track.ssrc,
        rtx_ssrc: track.rtx_ssrc,
        nack: true,
        transport_cc_extension: None,
        abs_send_time_extension: None,
        announced_at: Time::ZERO,
    });
    Agreed {
        dtls_active: answered.setup == DtlsSetup::Active,
        media: Vec::new(),
        streams: streams.collect(),
        remote: answered.remote,
    }
}
