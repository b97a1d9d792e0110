//! str0m as the stack under test, in RTP mode by its direct API. All connections share one
//! certificate and one crypto provider.

use std::sync::Arc;
use std::time::{Duration, Instant};

use str0m::config::{DtlsCert, DtlsVersion, Fingerprint as Str0mFingerprint};
use str0m::crypto::{CryptoProvider, from_feature_flags};
use str0m::media::{MediaKind, Mid};
use str0m::net::{Protocol, Receive};
use str0m::rtp::{Extension, RtpWrite, Ssrc};
use str0m::{Candidate, Event, IceCreds, Input, Output, Rtc, RtcConfig};
use throng::engine::ShardConfig;
use throng::measure::Kind;
use throng::transport::peer::IceCredentials;
use throng::transport::rtp::{Datagram, Header, classify};
use throng::transport::sdp::Fingerprint;
use throng::units::{Epoch, Time};

use super::fixture::{BATCH, Role, Sealed, Setting, Stack};
use super::origin::Origin;
use super::remote::{Side, address};
use super::{SSRC, cpu_clock, payload_type};
use crate::link::under_test;

pub struct Str0m {
    peers: Vec<One>,
    setting: Setting,
    epoch: Epoch,
    provider: Arc<CryptoProvider>,
    certificate: DtlsCert,
    setup: Vec<(usize, Vec<u8>)>,
    received: u64,
    rtcp: u64,
    sent: u64,
    next: usize,
    payload: Option<Payload>,
}

struct One {
    rtc: Rtc,
    remote: Side,
    connected: bool,
    next_timeout: Instant,
    seq: u64,
}

/// Payload that all connections share. str0m takes it as a reference-counted slice.
struct Payload {
    bytes: Arc<[u8]>,
    rtp_time: u32,
    marker: bool,
    at: Time,
}

impl Stack for Str0m {
    const NAME: &'static str = "str0m";

    fn new(_: usize, setting: Setting, config: &ShardConfig) -> Str0m {
        let provider = from_feature_flags();
        let certificate = provider
            .dtls_provider
            .generate_certificate()
            .expect("a certificate");
        Str0m {
            peers: Vec::new(),
            setting,
            epoch: config.epoch,
            provider: Arc::new(provider),
            certificate,
            setup: Vec::new(),
            received: 0,
            rtcp: 0,
            sent: 0,
            next: 0,
            payload: None,
        }
    }

    fn add(&mut self, key: usize, remote: &Side, now: Time) -> Side {
        let now = self.epoch.instant(now);
        let mut rtc = self
            .config()
            .set_crypto_provider(self.provider.clone())
            .set_dtls_cert(self.certificate.clone())
            .set_dtls_version(DtlsVersion::Dtls12)
            .set_rtp_mode(true)
            .build(now);
        rtc.add_local_candidate(
            Candidate::host(address(1, key), Protocol::Udp).expect("an address"),
        );
        rtc.add_remote_candidate(
            Candidate::host(remote.address, Protocol::Udp).expect("an address"),
        );
        let ours = self.agree(&mut rtc, key, remote);
        self.peers.push(One {
            rtc,
            remote: remote.clone(),
            connected: false,
            next_timeout: now,
            seq: 1,
        });
        self.poll(key);
        ours
    }

    fn handle_setup(&mut self, key: usize, datagram: &[u8], from: &Side, now: Time) {
        let input = Receive::new(Protocol::Udp, from.address, address(1, key), datagram)
            .expect("a set-up datagram");
        let input = Input::Receive(self.epoch.instant(now), input);
        self.peers[key].rtc.handle_input(input).expect("alive");
        self.poll(key);
    }

    fn turn(&mut self, now: Time) {
        let now = self.epoch.instant(now);
        for key in 0..self.peers.len() {
            if self.peers[key].next_timeout <= now {
                self.peers[key]
                    .rtc
                    .handle_input(Input::Timeout(now))
                    .expect("alive");
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
            let from = self.peers[*key].remote.address;
            let input = Receive::new(Protocol::Udp, from, address(1, *key), bytes).expect("RTP");
            self.peers[*key]
                .rtc
                .handle_input(Input::Receive(now, input))
                .expect("alive");
            self.poll(*key);
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
        let payload = self.payload.get_or_insert_with(|| Payload::next(origin));
        let (bytes, rtp_time, marker) = (payload.bytes.clone(), payload.rtp_time, payload.marker);
        let now = self.epoch.instant(payload.at);
        let pt = payload_type(self.setting.kind).into();
        let end = (self.next + BATCH).min(self.peers.len());
        let started = cpu_clock();
        under_test(true, || {
            for key in self.next..end {
                let one = &mut self.peers[key];
                one.seq += 1;
                let write = RtpWrite::new(pt, one.seq.into(), rtp_time, now, bytes.clone())
                    .marker(marker)
                    .nackable(true);
                one.rtc
                    .direct_api()
                    .stream_tx(&Ssrc::from(SSRC))
                    .expect("declared")
                    .write_rtp(write);
                one.rtc.handle_input(Input::Timeout(now)).expect("alive");
                self.poll(key);
            }
        });
        let spent = cpu_clock() - started;
        self.next = end % self.peers.len();
        if self.next == 0 {
            self.payload = None;
        }
        spent
    }

    fn sent(&self) -> u64 {
        self.sent
    }
}

impl Str0m {
    fn agree(&self, rtc: &mut Rtc, key: usize, remote: &Side) -> Side {
        let mut api = rtc.direct_api();
        api.set_ice_controlling(true);
        api.set_remote_ice_credentials(IceCreds {
            ufrag: remote.credentials.ufrag.clone(),
            pass: remote.credentials.password.clone(),
        });
        api.set_remote_fingerprint(Str0mFingerprint {
            hash_func: "sha-256".into(),
            bytes: remote.fingerprint.0.to_vec(),
        });
        api.start_dtls(true).expect("a first start");
        let mid = Mid::from("0");
        let kind = match self.setting.kind {
            Kind::Audio => MediaKind::Audio,
            Kind::Video => MediaKind::Video,
        };
        api.declare_media(mid, kind);
        if self.setting.transport_cc_extension().is_some() {
            api.enable_twcc_feedback();
        }
        match self.setting.role {
            Role::Receives => drop(api.expect_stream_rx(SSRC.into(), None, mid, None)),
            Role::Sends => drop(api.declare_stream_tx(SSRC.into(), None, mid, None)),
        }
        let creds = api.local_ice_credentials();
        let mut fingerprint = [0; 32];
        fingerprint.copy_from_slice(&api.local_dtls_fingerprint().bytes);
        Side {
            address: address(1, key),
            credentials: IceCredentials {
                ufrag: creds.ufrag,
                password: creds.pass,
            },
            fingerprint: Fingerprint(fingerprint),
        }
    }

    /// Polls until the connection has no more output.
    fn poll(&mut self, key: usize) {
        let one = &mut self.peers[key];
        loop {
            match one.rtc.poll_output().expect("alive") {
                Output::Timeout(at) => {
                    one.next_timeout = at;
                    return;
                }
                Output::Transmit(transmit) => match classify(&transmit.contents) {
                    Datagram::Rtp => self.sent += 1,
                    Datagram::Rtcp => self.rtcp += 1,
                    _ => under_test(false, || self.setup.push((key, transmit.contents.to_vec()))),
                },
                Output::Event(Event::Connected) => one.connected = true,
                Output::Event(Event::RtpPacket(packet)) => {
                    std::hint::black_box(&packet.payload);
                    self.received += 1;
                }
                Output::Event(_) => {}
            }
        }
    }
}

impl Str0m {
    /// Returns the configuration. Transport-wide feedback is enabled only if it is agreed on.
    fn config(&self) -> RtcConfig {
        let config = RtcConfig::new().clear_extension_map();
        match self.setting.transport_cc_extension() {
            Some(id) => config.set_extension(id, Extension::TransportSequenceNumber),
            None => config,
        }
    }
}

impl Payload {
    fn next(origin: &mut Origin) -> Payload {
        let plain = origin.next();
        let header = Header::parse(&plain.bytes).expect("RTP");
        Payload {
            bytes: header.payload(&plain.bytes).expect("a payload").into(),
            rtp_time: header.rtp_time,
            marker: header.marker,
            at: plain.at,
        }
    }
}
