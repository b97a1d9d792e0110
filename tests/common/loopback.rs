//! A router on its own thread with one publisher and some subscribers, each with its own socket on
//! loopback.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};
use throng::transport::rtp::Ssrc;

use throng::codec::{Codec, PayloadTypes};
use throng::measure::Kind;
use throng::net;
use throng::sfu::bottleneck::BottleneckLimit;
use throng::sfu::worker::{RouterWorker, RouterWorkerConfig};
use throng::sfu::{
    Encodings, MediaCommand, MediaEvent, Selection, SendMode, SubscriptionId,
    SubscriptionParameters, TrackId, TrackParameters, TransportId, TransportParameters,
};
use throng::transport::peer::{IceCredentials, Identity, Peer, PeerParameters};
use throng::transport::rtp::{Datagram, Header, HeaderTemplate, classify};
use throng::transport::sdp::ExtensionIds;
use throng::transport::sequence::Seq;
use throng::units::Epoch;

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Receive buffer of a socket, as the engine's sockets request it.
const RECEIVE_BUFFER_BYTES: usize = 1 << 20;
/// Number of connections that are set up at a time.
const WAVE: u32 = 200;
/// Time limit for a test that hangs, far beyond what anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct End {
    pub socket: UdpSocket,
    peer: Peer,
    pub got: Vec<(u16, Vec<u8>)>,
}

impl End {
    /// Adds a connection to the router, on a socket of its own.
    fn add(worker: &RouterWorker, identity: &Identity, epoch: Epoch, index: u32) -> End {
        let socket = net::open_media_socket(LOOPBACK, RECEIVE_BUFFER_BYTES).unwrap();
        let (ours, theirs) = (IceCredentials::random(), IceCredentials::random());
        let parameters = PeerParameters {
            local_address: socket.local_addr().unwrap(),
            local: theirs.clone(),
            remote: ours.clone(),
            remote_fingerprint: identity.fingerprint(),
            remote_candidates: vec![worker.address().udp],
            ice_controlling: true,
            dtls_active: true,
        };
        worker.command(MediaCommand::AddTransport {
            transport: TransportId(index),
            parameters: Box::new(TransportParameters {
                local: ours,
                remote: theirs,
                remote_fingerprint: identity.fingerprint(),
                dtls_active: false,
            }),
        });
        let mut peer = Peer::new(identity, &parameters, epoch, epoch.now());
        peer.handle_timeout(epoch.now());
        End {
            socket,
            peer,
            got: Vec::new(),
        }
    }

    /// Takes the received datagrams and keeps the connection up. With `keep`, media is opened and
    /// kept, otherwise only counted. Returns the number of media packets.
    fn turn(
        &mut self,
        epoch: Epoch,
        router: SocketAddr,
        batch: &mut net::ReceiveBatch,
        keep: bool,
    ) -> u64 {
        let mut packets = 0;
        while let Ok(count) = batch.receive(&self.socket) {
            for index in 0..count {
                let (datagram, received) = batch.datagram(index).unwrap();
                if received.from == router {
                    packets += u64::from(self.take(datagram, router, epoch, keep));
                }
            }
        }
        let now = epoch.now();
        if self.peer.next_timeout() <= now {
            self.peer.handle_timeout(now);
        }
        let socket = &self.socket;
        self.peer.poll(
            now,
            |datagram, to| drop(socket.send_to(datagram, to)),
            |_| {},
        );
        packets
    }

    /// Takes one datagram. Returns whether it was media.
    fn take(&mut self, datagram: &mut [u8], router: SocketAddr, epoch: Epoch, keep: bool) -> bool {
        match classify(datagram) {
            Datagram::Rtp => {
                if keep {
                    let header = Header::parse(datagram).unwrap();
                    let opener = self.peer.opener().unwrap();
                    let plain = opener
                        .open_rtp(datagram, header.header_len, header.seq.0.into())
                        .unwrap();
                    self.got
                        .push((header.seq.0, datagram[header.header_len..plain].to_vec()));
                }
                true
            }
            Datagram::Stun | Datagram::Dtls => {
                self.peer
                    .handle_setup_datagram(datagram, router, epoch.now());
                false
            }
            _ => false,
        }
    }
}

pub struct Loopback {
    pub worker: RouterWorker,
    /// All ends, the publisher first.
    pub ends: Vec<End>,
    epoch: Epoch,
    batch: net::ReceiveBatch,
    template: HeaderTemplate,
    next_index: u64,
}

impl Loopback {
    /// Sets up all connections, publishes one track, and subscribes every other end to it.
    pub fn connected(subscribers: u32, kind: Kind, send: SendMode) -> Loopback {
        Loopback::limited(subscribers, kind, send, None)
    }

    /// The same, with a limit on what the SFU sends.
    pub fn limited(
        subscribers: u32,
        kind: Kind,
        send: SendMode,
        limit: Option<BottleneckLimit>,
    ) -> Loopback {
        let (identity, epoch) = (Identity::generate().unwrap(), Epoch::read());
        let (events, mut told) = tokio::sync::mpsc::unbounded_channel();
        let config = RouterWorkerConfig {
            ip: LOOPBACK,
            identity: identity.clone(),
            epoch,
            send,
            seed: 1,
            limit,
            name: "sfu-0".into(),
        };
        let worker = RouterWorker::start(config, events).unwrap();
        let mut loopback = Loopback {
            worker,
            ends: Vec::new(),
            epoch,
            batch: net::ReceiveBatch::default(),
            template: HeaderTemplate::new(96, Ssrc(1)).unwrap(),
            next_index: 0,
        };
        // In waves, because with all at once set-up would be so slow that some ends would
        // retransmit datagrams that were not lost.
        while loopback.ends.len() <= subscribers as usize {
            let first = loopback.ends.len() as u32;
            for index in first..=subscribers.min(first + WAVE) {
                loopback
                    .ends
                    .push(End::add(&loopback.worker, &identity, epoch, index));
            }
            loopback.turn_until("connected", |ends| {
                ends.iter().all(|end| end.peer.is_connected())
            });
        }
        let worker = &loopback.worker;
        worker.command(MediaCommand::AddTrack {
            transport: TransportId(0),
            track: TrackId(0),
            parameters: Box::new(TrackParameters {
                payloads: PayloadTypes::of(Codec::default_of(kind), 96),
                mid: "0".into(),
                rtx_payload_type: None,
                extensions: ExtensionIds::default(),
                nack: true,
                transport_cc: false,
                encodings: Encodings::Ssrc {
                    ssrc: Ssrc(1),
                    rtx_ssrc: None,
                },
            }),
        });
        for subscriber in 1..=subscribers {
            worker.command(MediaCommand::Subscribe {
                subscription: SubscriptionId(subscriber),
                transport: TransportId(subscriber),
                track: TrackId(0),
                parameters: Box::new(SubscriptionParameters {
                    ssrc: Ssrc(100 + subscriber),
                    rtx_ssrc: None,
                    payloads: PayloadTypes::of(Codec::default_of(kind), 110),
                    rtx_payload_type: None,
                    extensions: ExtensionIds::default(),
                    selection: Selection {
                        enabled: true,
                        layer: 0,
                    },
                }),
            });
        }
        // Requests are handled in order, so all earlier ones are done when the answer is here.
        assert_eq!(
            worker.statistics().unwrap().subscriptions,
            u64::from(subscribers)
        );
        let mut up = 0;
        loopback.turn_until("the router's own word", |_| {
            while let Ok(event) = told.try_recv() {
                up += u32::from(matches!(event, MediaEvent::Connected { .. }));
            }
            up > subscribers
        });
        loopback
    }

    /// Sends one packet to the router.
    pub fn publish(&mut self, seq: u16, payload: &[u8]) {
        self.publish_burst(seq, u32::from(seq) * 960, &[payload]);
    }

    /// Sends the packets of a frame to the router with one call. All have the length of the first;
    /// only the last may be shorter.
    pub fn publish_burst(&mut self, first_seq: u16, rtp_time: u32, payloads: &[&[u8]]) {
        let mut bytes = vec![0; 2_000 * payloads.len()];
        let (mut len, mut segment) = (0, 0);
        for (at, payload) in payloads.iter().enumerate() {
            let (seq, packet) = (first_seq.wrapping_add(at as u16), &mut bytes[len..]);
            let marker = payloads.len() > 1 && at + 1 == payloads.len();
            let header_len = self
                .template
                .write(packet, marker, Seq(seq), rtp_time)
                .unwrap();
            let plain = header_len + payload.len();
            packet[header_len..plain].copy_from_slice(payload);
            self.next_index += u64::from(seq.wrapping_sub(self.next_index as u16));
            let sealer = self.ends[0].peer.sealer().unwrap();
            let sealed = sealer
                .seal_rtp(packet, header_len, plain, self.next_index)
                .unwrap();
            segment = segment.max(sealed);
            len += sealed;
        }
        net::send_segmented(
            &self.ends[0].socket,
            Some(self.worker.address().udp),
            &bytes[..len],
            segment,
        )
        .unwrap();
    }

    /// Takes the received datagrams, and keeps the connections up.
    pub fn turn(&mut self) {
        let router = self.worker.address().udp;
        for end in &mut self.ends {
            end.turn(self.epoch, router, &mut self.batch, true);
        }
        std::thread::sleep(Duration::from_millis(1));
    }

    /// Takes the datagrams that some of the ends have received, without opening media. Returns the
    /// number of media packets.
    pub fn skim(&mut self, ends: std::ops::Range<usize>) -> u64 {
        let router = self.worker.address().udp;
        let skimmed = self.ends[ends]
            .iter_mut()
            .map(|end| end.turn(self.epoch, router, &mut self.batch, false));
        skimmed.sum()
    }

    pub fn turn_until(&mut self, what: &str, mut done: impl FnMut(&[End]) -> bool) {
        let started = Instant::now();
        while !done(&self.ends) {
            assert!(
                started.elapsed() < PATIENCE,
                "waited in vain for: {what}; {:?}",
                self.worker.statistics()
            );
            self.turn();
        }
    }
}
