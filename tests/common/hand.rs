//! A connection to a router that the test drives by hand: it can send any RTP packet at any time,
//! and look at every packet that comes back.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use throng::codec::vp8::{PictureId, Vp8Descriptor};
use throng::sfu::router::{Router, RouterConfig};
use throng::sfu::{MediaCommand, MediaEvent, SendMode, TransportId, TransportParameters};
use throng::transport::peer::{IceCredentials, Identity, Peer, PeerEvent, PeerParameters};
use throng::transport::rtcp::{RtcpWriter, packets};
use throng::transport::rtp::{Datagram as Class, Header, HeaderTemplate, classify};
use throng::transport::sequence::{Seq, SeqExtender};
use throng::units::{Epoch, Time};

use super::relay::{RouterOutlet, router_address};

pub const MID_ID: u8 = 2;
pub const RID_ID: u8 = 3;
pub const REPAIRED_RID_ID: u8 = 4;
pub const TRANSPORT_CC_ID: u8 = 5;

/// One RTP packet from the router.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Got {
    pub at: Time,
    pub sealed: Vec<u8>,
    pub ssrc: Ssrc,
    pub index: u64,
    pub payload_type: u8,
    pub rtp_time: u32,
    pub marker: bool,
    pub extensions: Vec<(u8, Vec<u8>)>,
    pub payload: Vec<u8>,
}

impl Got {
    pub fn vp8(&self) -> (Vp8Descriptor, &[u8]) {
        let (descriptor, len) = Vp8Descriptor::parse(&self.payload).unwrap();
        (descriptor, &self.payload[len..])
    }

    pub fn picture_id(&self) -> u16 {
        self.vp8().0.picture_id.map(PictureId::value).unwrap()
    }
}

/// One RTCP packet from the router, as far as tests look at it.
#[derive(Clone, Debug, PartialEq)]
pub enum Said {
    Nack { media_ssrc: Ssrc, seqs: Vec<u16> },
    Pli { media_ssrc: Ssrc },
    SenderReport { ssrc: Ssrc, ntp: u64, rtp_time: u32 },
    ReceiverReport { ssrc: Ssrc, lost: i32 },
    TransportCc { body: Vec<u8> },
    Dlrr { ssrc: Ssrc },
}

pub struct Hand {
    pub peer: Peer,
    pub address: SocketAddr,
    pub connected: bool,
    pub got: Vec<Got>,
    pub said: Vec<(Time, Said)>,
    sending: BTreeMap<Ssrc, u64>,
    receiving: BTreeMap<Ssrc, SeqExtender>,
}

pub struct Hands {
    pub router: Router,
    pub outlet: RouterOutlet,
    pub hands: Vec<Hand>,
    pub now: Time,
    pub epoch: Epoch,
    pub events: Vec<MediaEvent>,
    pub identity: Identity,
    /// ICE credentials of each connection: the router's, then those of the test's end.
    pub credentials: Vec<[IceCredentials; 2]>,
}

/// A packet to send. Its payload is passed separately.
#[derive(Clone, Debug)]
pub struct Out<'a> {
    pub ssrc: Ssrc,
    pub payload_type: u8,
    pub seq: u16,
    pub rtp_time: u32,
    pub marker: bool,
    pub extensions: &'a [(u8, &'a [u8])],
    /// Number of padding bytes after the payload.
    pub padding: u8,
}

impl Hands {
    pub fn connected(count: usize, send: SendMode) -> Hands {
        let (identity, epoch) = (Identity::generate().unwrap(), Epoch::read());
        let config = RouterConfig {
            identity: identity.clone(),
            epoch,
            local: router_address().into(),
            send,
            seed: 3,
        };
        let mut hands = Hands {
            router: Router::new(config, Time::ZERO),
            outlet: RouterOutlet::new(),
            hands: Vec::new(),
            now: Time::ZERO,
            epoch,
            events: Vec::new(),
            identity,
            credentials: Vec::new(),
        };
        (0..count).for_each(|_| hands.add());
        let mut rounds = 0;
        while hands.hands.iter().any(|hand| !hand.connected) {
            rounds += 1;
            assert!(rounds < 5_000, "not connected");
            hands.step();
        }
        hands
    }

    /// Adds one more connection. It is up some steps later.
    pub fn add(&mut self) {
        let index = self.hands.len();
        let address = format!("203.0.113.{}:{}", index + 1, 3_000 + index)
            .parse()
            .unwrap();
        let (ours, theirs) = (IceCredentials::random(), IceCredentials::random());
        let fingerprint = self.identity.fingerprint();
        let parameters = PeerParameters {
            local_address: address,
            local: theirs.clone(),
            remote: ours.clone(),
            remote_fingerprint: fingerprint,
            remote_candidates: vec![router_address()],
            ice_controlling: true,
            dtls_active: true,
        };
        let mut peer = Peer::new(&self.identity, &parameters, self.epoch, self.now);
        peer.handle_timeout(self.now);
        self.hands.push(Hand {
            peer,
            address,
            connected: false,
            got: Vec::new(),
            said: Vec::new(),
            sending: BTreeMap::new(),
            receiving: BTreeMap::new(),
        });
        self.credentials.push([ours.clone(), theirs.clone()]);
        self.command(MediaCommand::AddTransport {
            transport: TransportId(index as u32),
            parameters: Box::new(TransportParameters {
                local: ours,
                remote: theirs,
                remote_fingerprint: fingerprint,
                dtls_active: false,
            }),
        });
    }

    pub fn command(&mut self, command: MediaCommand) {
        self.router
            .handle_command(command, self.now, &mut self.outlet);
    }

    pub fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.step();
        }
    }

    /// Advances time by one millisecond: keeps the connections up, runs timers, and takes what the
    /// router has sent.
    pub fn step(&mut self) {
        self.now += Duration::from_millis(1);
        let now = self.now;
        for index in 0..self.hands.len() {
            let hand = &mut self.hands[index];
            if hand.peer.next_timeout() <= now {
                hand.peer.handle_timeout(now);
            }
            let mut out = Vec::new();
            let connected = &mut hand.connected;
            hand.peer.poll(
                now,
                |bytes, _| out.push(bytes.to_vec()),
                |event| *connected |= event == PeerEvent::Connected,
            );
            let from = hand.address;
            for mut bytes in out {
                self.router
                    .handle_datagram(&mut bytes, from, now, now, &mut self.outlet);
            }
        }
        self.flush();
        self.router.handle_timeout(now, &mut self.outlet);
        self.flush();
        while let Some(event) = self.router.poll_event() {
            self.events.push(event);
        }
    }

    /// Ends the batch, and hands the datagrams that the router has sent to their connections.
    pub fn flush(&mut self) {
        self.router.end_batch(self.now, &mut self.outlet);
        for datagram in std::mem::take(&mut self.outlet.sent) {
            let Some(hand) = self
                .hands
                .iter_mut()
                .find(|hand| hand.address == datagram.to)
            else {
                continue;
            };
            match classify(&datagram.bytes) {
                Class::Rtp => hand.take_rtp(datagram.bytes, self.now),
                Class::Rtcp => hand.take_rtcp(datagram.bytes, self.now),
                _ => {
                    hand.peer
                        .handle_setup_datagram(&datagram.bytes, router_address(), self.now);
                }
            }
        }
    }

    /// Gives the router one RTP packet, in the batch that the next [`Hands::flush`] ends.
    pub fn send(&mut self, index: usize, out: &Out<'_>, payload: &[u8]) {
        let mut bytes = self.seal(index, out, payload);
        let from = self.hands[index].address;
        self.router
            .handle_datagram(&mut bytes, from, self.now, self.now, &mut self.outlet);
    }

    pub fn seal(&mut self, index: usize, out: &Out<'_>, payload: &[u8]) -> Vec<u8> {
        let hand = &mut self.hands[index];
        let mut template = HeaderTemplate::new(out.payload_type, out.ssrc).unwrap();
        for (id, value) in out.extensions {
            template.push_extension(*id, value).unwrap();
        }
        let mut bytes = vec![0; 2_000];
        let header_len = template
            .write(&mut bytes, out.marker, Seq(out.seq), out.rtp_time)
            .unwrap();
        bytes[header_len..header_len + payload.len()].copy_from_slice(payload);
        let mut len = header_len + payload.len();
        if out.padding > 0 {
            bytes[0] |= 0x20;
            len += usize::from(out.padding);
            bytes[len - 1] = out.padding;
        }
        let last = hand.sending.entry(out.ssrc).or_insert(u64::from(out.seq));
        let sent = last.wrapping_add_signed(i64::from(Seq(out.seq).diff(Seq(*last as u16))));
        *last = sent.max(*last);
        let sealed = hand
            .peer
            .sealer()
            .unwrap()
            .seal_rtp(&mut bytes, header_len, len, sent)
            .unwrap();
        bytes.truncate(sealed);
        bytes
    }

    pub fn say(&mut self, index: usize, write: impl FnOnce(&mut RtcpWriter<'_>)) {
        let mut bytes = vec![0; 1_500];
        let mut writer = RtcpWriter::new(&mut bytes[..1_200]);
        write(&mut writer);
        let len = writer.len();
        let sealed = self.hands[index]
            .peer
            .sealer_mut()
            .unwrap()
            .seal_rtcp(&mut bytes, len)
            .unwrap();
        let from = self.hands[index].address;
        self.router.handle_datagram(
            &mut bytes[..sealed],
            from,
            self.now,
            self.now,
            &mut self.outlet,
        );
        self.flush();
    }
}

impl Hand {
    fn take_rtp(&mut self, sealed: Vec<u8>, at: Time) {
        let mut bytes = sealed.clone();
        let header = Header::parse(&bytes).unwrap();
        let extender = self.receiving.entry(header.ssrc).or_default();
        let index = extender.guess(header.seq.0);
        let len = self
            .peer
            .opener()
            .unwrap()
            .open_rtp(&mut bytes, header.header_len, index)
            .unwrap();
        extender.commit(index);
        let packet = &bytes[..len];
        self.got.push(Got {
            at,
            ssrc: header.ssrc,
            index,
            payload_type: header.payload_type,
            rtp_time: header.rtp_time,
            marker: header.marker,
            extensions: header
                .extensions(packet)
                .map(|(id, value)| (id, value.to_vec()))
                .collect(),
            payload: header.payload(packet).unwrap().to_vec(),
            sealed,
        });
    }

    fn take_rtcp(&mut self, mut bytes: Vec<u8>, at: Time) {
        use throng::transport::rtcp::RtcpPacket;
        let len = self.peer.opener().unwrap().open_rtcp(&mut bytes).unwrap();
        for packet in packets(&bytes[..len]) {
            let mut say = |said| self.said.push((at, said));
            match packet.unwrap() {
                RtcpPacket::Nack {
                    media_ssrc, seqs, ..
                } => say(Said::Nack {
                    media_ssrc,
                    seqs: seqs.map(|seq| seq.0).collect(),
                }),
                RtcpPacket::Pli { media_ssrc, .. } => say(Said::Pli { media_ssrc }),
                RtcpPacket::SenderReport { sender, .. } => say(Said::SenderReport {
                    ssrc: sender.ssrc,
                    ntp: sender.ntp,
                    rtp_time: sender.rtp_time,
                }),
                RtcpPacket::ReceiverReport { reports, .. } => reports.for_each(|block| {
                    say(Said::ReceiverReport {
                        ssrc: block.ssrc,
                        lost: block.cumulative_lost,
                    })
                }),
                RtcpPacket::TransportCc { body, .. } => say(Said::TransportCc {
                    body: body.to_vec(),
                }),
                RtcpPacket::Xr { dlrr, .. } => {
                    dlrr.for_each(|block| say(Said::Dlrr { ssrc: block.ssrc }))
                }
                _ => {}
            }
        }
    }

    pub fn heard(&self, wanted: impl Fn(&Said) -> bool) -> Vec<Time> {
        self.said
            .iter()
            .filter(|(_, said)| wanted(said))
            .map(|(at, _)| *at)
            .collect()
    }
}
