//! `rtc`, the sans-IO core of webrtc-rs, as the stack under test. It runs bare, or with its default
//! interceptors (NACK, reports, transport-wide feedback). The answer determines which of these are
//! active.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use rtc::crypto::{SignatureScheme, default_provider};
use rtc::interceptor::Registry;
use rtc::media_stream::MediaStreamTrack;
use rtc::peer_connection::certificate::{CertificateParams, RTCCertificate};
use rtc::peer_connection::configuration::RTCConfigurationBuilder;
use rtc::peer_connection::configuration::interceptor_registry::register_default_interceptors;
use rtc::peer_connection::configuration::media_engine::{
    MIME_TYPE_OPUS, MIME_TYPE_VP8, MediaEngine,
};
use rtc::peer_connection::configuration::setting_engine::SettingEngineBuilder;
use rtc::peer_connection::event::RTCPeerConnectionEvent;
use rtc::peer_connection::message::{RTCMessage, TaggedRTCMessage};
use rtc::peer_connection::sdp::RTCSessionDescription;
use rtc::peer_connection::state::RTCPeerConnectionState;
use rtc::peer_connection::transport::{CandidateConfig, CandidateHostConfig, RTCIceCandidate};
use rtc::peer_connection::{RTCPeerConnection, RTCPeerConnectionBuilder};
use rtc::rtp_transceiver::rtp_sender::{
    RTCPFeedback, RTCRtpCodec, RTCRtpCodecParameters, RTCRtpCodingParameters,
    RTCRtpEncodingParameters, RtpCodecKind,
};
use rtc::rtp_transceiver::{RTCRtpSenderId, RTCRtpTransceiverDirection, RTCRtpTransceiverInit};
use rtc::sansio::Protocol;
use rtc::shared::{TaggedBytesMut, TransportContext, TransportProtocol};
use throng::engine::ShardConfig;
use throng::measure::Kind;
use throng::transport::peer::IceCredentials;
use throng::transport::rtp::{Datagram, Header, classify};
use throng::units::{Epoch, Time};

use super::fixture::{BATCH, Role, Sealed, Setting, Stack};
use super::origin::Origin;
use super::remote::{Side, address};
use super::{SSRC, cpu_clock, media, payload_type};
use crate::link::under_test;

pub struct Rtc<const INTERCEPTORS: bool> {
    peers: Vec<One>,
    setting: Setting,
    epoch: Epoch,
    certificate: RTCCertificate,
    setup: Vec<(usize, Vec<u8>)>,
    received: u64,
    rtcp: u64,
    sent: u64,
    next: usize,
    packet: Option<(rtc::rtp::Packet, Time)>,
}

struct One {
    pc: RTCPeerConnection,
    sender: Option<RTCRtpSenderId>,
    transport: TransportContext,
    connected: bool,
    next_timeout: Option<Instant>,
    seq: u16,
}

impl<const INTERCEPTORS: bool> Stack for Rtc<INTERCEPTORS> {
    const NAME: &'static str = if INTERCEPTORS {
        "rtc, default interceptors"
    } else {
        "rtc, bare"
    };

    fn new(_: usize, setting: Setting, config: &ShardConfig) -> Self {
        let provider = default_provider().expect("cryptography");
        let parameters = CertificateParams::new(vec!["localhost".to_owned()]).expect("a name");
        let certificate = RTCCertificate::generate(
            provider.crypto(),
            SignatureScheme::EcdsaP256Sha256,
            parameters,
        );
        Rtc {
            peers: Vec::new(),
            setting,
            epoch: config.epoch,
            certificate: certificate.expect("a certificate"),
            setup: Vec::new(),
            received: 0,
            rtcp: 0,
            sent: 0,
            next: 0,
            packet: None,
        }
    }

    fn add(&mut self, key: usize, remote: &Side, now: Time) -> Side {
        let now = self.epoch.instant(now);
        let (mut pc, sender, offer) = self.offering(key, now);
        let answer = answer(self.setting, remote, &offer);
        pc.set_remote_description(
            now,
            RTCSessionDescription::answer(answer).expect("a description"),
        )
        .expect("a good answer");
        let transport = TransportContext {
            local_addr: address(1, key),
            peer_addr: remote.address,
            transport_protocol: TransportProtocol::UDP,
            ecn: None,
        };
        self.peers.push(One {
            pc,
            sender,
            transport,
            connected: false,
            next_timeout: Some(now),
            seq: 0,
        });
        self.poll(key);
        Side {
            address: address(1, key),
            credentials: IceCredentials {
                ufrag: attribute(&offer, "ice-ufrag").to_owned(),
                password: attribute(&offer, "ice-pwd").to_owned(),
            },
            fingerprint: attribute(&offer, "fingerprint").parse().expect("SHA-256"),
        }
    }

    fn handle_setup(&mut self, key: usize, datagram: &[u8], _: &Side, now: Time) {
        self.read(key, datagram, self.epoch.instant(now));
    }

    fn turn(&mut self, now: Time) {
        let now = self.epoch.instant(now);
        for key in 0..self.peers.len() {
            if self.peers[key].next_timeout.is_some_and(|at| at <= now) {
                self.peers[key].pc.handle_timeout(now).expect("alive");
                self.poll(key);
            }
        }
    }

    fn is_connected(&self, key: usize) -> bool {
        self.peers[key].connected
    }

    fn take_sent(&mut self) -> Vec<(usize, Vec<u8>)> {
        std::mem::take(&mut self.setup)
    }

    fn receive(&mut self, batch: &mut [Sealed], now: Time) {
        let now = self.epoch.instant(now);
        for Sealed { key, bytes } in batch {
            self.read(*key, bytes, now);
        }
    }

    fn received(&self) -> u64 {
        self.received
    }

    fn rtcp_sent(&self) -> u64 {
        self.rtcp
    }

    fn start_sending(&mut self, _: Time) {}

    fn send(&mut self, origin: &mut Origin) -> Duration {
        let kind = self.setting.kind;
        let (packet, at) = self.packet.get_or_insert_with(|| next_packet(kind, origin));
        let (packet, now) = (packet.clone(), self.epoch.instant(*at));
        let end = (self.next + BATCH).min(self.peers.len());
        let started = cpu_clock();
        under_test(true, || {
            for key in self.next..end {
                let (one, mut packet) = (&mut self.peers[key], packet.clone());
                one.seq = one.seq.wrapping_add(1);
                packet.header.sequence_number = one.seq;
                let sender = one.sender.expect("a track");
                one.pc
                    .rtp_sender(sender)
                    .expect("a track")
                    .write_rtp(now, packet)
                    .expect("connected");
                self.poll(key);
            }
        });
        let spent = cpu_clock() - started;
        self.next = end % self.peers.len();
        if self.next == 0 {
            self.packet = None;
        }
        spent
    }

    fn sent(&self) -> u64 {
        self.sent
    }
}

impl<const INTERCEPTORS: bool> Rtc<INTERCEPTORS> {
    fn offering(
        &self,
        key: usize,
        now: Instant,
    ) -> (RTCPeerConnection, Option<RTCRtpSenderId>, String) {
        let mut engine = media_engine(self.setting.kind);
        let mut interceptors = Registry::new();
        if INTERCEPTORS {
            interceptors = register_default_interceptors(interceptors, &mut engine)
                .expect("extensions that can be");
        }
        // All connections share one certificate. This saves every stack most of the cost of a key
        // pair.
        let configuration = RTCConfigurationBuilder::new()
            .with_certificates(vec![self.certificate.clone()])
            .build();
        let mut pc = RTCPeerConnectionBuilder::new()
            .with_configuration(configuration)
            .with_setting_engine(SettingEngineBuilder::new().build())
            .with_media_engine(engine)
            .with_interceptor_registry(interceptors)
            .build(now)
            .expect("a configuration that can be");
        let candidate = RTCIceCandidate::from(&host_candidate(key));
        pc.add_local_candidate(candidate.to_json().expect("a candidate"))
            .expect("a candidate");
        let sender = match self.setting.role {
            Role::Sends => {
                pc.add_transceiver_from_track(
                    sent_track(self.setting.kind),
                    Some(direction(RTCRtpTransceiverDirection::Sendonly)),
                )
                .expect("a track");
                pc.get_senders().next()
            }
            Role::Receives => {
                pc.add_transceiver_from_kind(
                    codec_kind(self.setting.kind),
                    Some(direction(RTCRtpTransceiverDirection::Recvonly)),
                )
                .expect("a track");
                None
            }
        };
        let offer = pc.create_offer(None).expect("an offer");
        pc.set_local_description(now, offer).expect("its own offer");
        let offer = pc.local_description().expect("just set").sdp;
        (pc, sender, offer)
    }

    fn read(&mut self, key: usize, datagram: &[u8], now: Instant) {
        let one = &mut self.peers[key];
        let message = TaggedBytesMut {
            now,
            transport: one.transport,
            message: BytesMut::from(datagram),
        };
        one.pc.handle_read(message).expect("a good datagram");
        self.poll(key);
    }

    /// Polls until the connection has no more output.
    fn poll(&mut self, key: usize) {
        let one = &mut self.peers[key];
        while let Some(message) = one.pc.poll_write() {
            match classify(&message.message) {
                Datagram::Rtp => self.sent += 1,
                Datagram::Rtcp => self.rtcp += 1,
                _ => under_test(false, || self.setup.push((key, message.message.to_vec()))),
            }
        }
        while let Some(event) = one.pc.poll_event() {
            if let RTCPeerConnectionEvent::OnConnectionStateChangeEvent(state) = event {
                one.connected = state == RTCPeerConnectionState::Connected;
            }
        }
        while let Some(TaggedRTCMessage { message, .. }) = one.pc.poll_read() {
            if let RTCMessage::RtpPacket(_, packet) = message {
                std::hint::black_box(&packet.payload);
                self.received += 1;
            }
        }
        one.next_timeout = one.pc.poll_timeout();
    }
}

fn next_packet(kind: Kind, origin: &mut Origin) -> (rtc::rtp::Packet, Time) {
    let plain = origin.next();
    let header = Header::parse(&plain.bytes).expect("RTP");
    let payload = Bytes::copy_from_slice(header.payload(&plain.bytes).expect("a payload"));
    let header = rtc::rtp::Header {
        version: 2,
        ssrc: SSRC,
        payload_type: payload_type(kind),
        marker: header.marker,
        timestamp: header.rtp_time,
        ..rtc::rtp::Header::default()
    };
    (rtc::rtp::Packet { header, payload }, plain.at)
}

const TRANSPORT_CC_URI: &str =
    "http://www.ietf.org/id/draft-holmer-rmcat-transport-wide-cc-extensions-01";

/// Returns the answer that an SFU would give to the one section that is offered.
fn answer(setting: Setting, remote: &Side, offer: &str) -> String {
    let agreed = match setting.transport_cc_extension() {
        Some(id) => {
            let extension = format!("extmap:{id} {TRANSPORT_CC_URI}");
            assert!(
                offer.contains(&extension),
                "{extension} is not in its offer:\n{offer}"
            );
            format!(
                "a={extension}\r\na=rtcp-fb:{} transport-cc\r\n",
                payload_type(setting.kind)
            )
        }
        None => String::new(),
    };
    let (kind, number) = (media(setting.kind), payload_type(setting.kind));
    let codec = match setting.kind {
        Kind::Audio => "opus/48000/2",
        Kind::Video => "VP8/90000",
    };
    let media = match setting.role {
        Role::Sends => "a=recvonly\r\n".to_owned(),
        Role::Receives => format!(
            "a=sendonly\r\na=msid:stream track\r\na=ssrc:{SSRC} cname:origin\r\na=ssrc:{SSRC} msid:stream track\r\n"
        ),
    };
    let IceCredentials { ufrag, password } = &remote.credentials;
    let (fingerprint, ip, port) = (
        remote.fingerprint,
        remote.address.ip(),
        remote.address.port(),
    );
    format!(
        "v=0\r\no=- 1 1 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\na=ice-lite\r\na=group:BUNDLE 0\r\na=fingerprint:{fingerprint}\r\n\
         m={kind} 9 UDP/TLS/RTP/SAVPF {number}\r\nc=IN IP4 0.0.0.0\r\na=mid:0\r\na=ice-ufrag:{ufrag}\r\na=ice-pwd:{password}\r\na=setup:passive\r\n\
         a=rtcp-mux\r\na=rtcp-rsize\r\na=rtpmap:{number} {codec}\r\na=rtcp-fb:{number} nack\r\n{agreed}{media}\
         a=candidate:1 1 udp 2130706431 {ip} {port} typ host\r\n"
    )
}

fn attribute<'a>(description: &'a str, name: &str) -> &'a str {
    let of_line = |line: &'a str| {
        line.strip_prefix("a=")?
            .strip_prefix(name)?
            .strip_prefix(':')
    };
    description
        .lines()
        .find_map(of_line)
        .expect("every offer has it")
        .trim()
}

fn host_candidate(key: usize) -> rtc::ice::candidate::Candidate {
    let address = address(1, key);
    let config = CandidateHostConfig {
        base_config: CandidateConfig {
            network: "udp".into(),
            address: address.ip().to_string(),
            port: address.port(),
            component: 1,
            ..CandidateConfig::default()
        },
        ..CandidateHostConfig::default()
    };
    config.new_candidate_host().expect("an address")
}

fn codec_kind(kind: Kind) -> RtpCodecKind {
    match kind {
        Kind::Audio => RtpCodecKind::Audio,
        Kind::Video => RtpCodecKind::Video,
    }
}

fn codec(kind: Kind) -> RTCRtpCodec {
    let nack = RTCPFeedback {
        typ: "nack".into(),
        parameter: String::new(),
    };
    let (mime_type, clock_rate, channels) = match kind {
        Kind::Audio => (MIME_TYPE_OPUS, 48_000, 2),
        Kind::Video => (MIME_TYPE_VP8, 90_000, 0),
    };
    RTCRtpCodec {
        mime_type: mime_type.into(),
        clock_rate,
        channels,
        rtcp_feedback: vec![nack],
        ..RTCRtpCodec::default()
    }
}

fn media_engine(kind: Kind) -> MediaEngine {
    let mut engine = MediaEngine::default();
    let parameters = RTCRtpCodecParameters {
        rtp_codec: codec(kind),
        payload_type: payload_type(kind),
    };
    engine
        .register_codec(parameters, codec_kind(kind))
        .expect("a codec");
    engine
}

fn sent_track(kind: Kind) -> MediaStreamTrack {
    let coding = RTCRtpEncodingParameters {
        rtp_coding_parameters: RTCRtpCodingParameters {
            ssrc: Some(SSRC),
            ..RTCRtpCodingParameters::default()
        },
        active: true,
        codec: codec(kind),
        ..RTCRtpEncodingParameters::default()
    };
    MediaStreamTrack::new(
        "stream".into(),
        "track".into(),
        "track".into(),
        codec_kind(kind),
        vec![coding],
    )
}

fn direction(direction: RTCRtpTransceiverDirection) -> RTCRtpTransceiverInit {
    RTCRtpTransceiverInit {
        direction,
        streams: Vec::new(),
        send_encodings: Vec::new(),
    }
}
