//! One publisher and some subscribers of a router on its own thread, each with a socket of its own on loopback.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use throng::measure::Kind;
use throng::sfu::worker::{Worker, WorkerConfig};
use throng::sfu::{
    Encodings, MediaCommand, MediaEvent, Selection, SendMode, SubscriptionId, SubscriptionParameters, TrackId, TrackParameters, TransportId,
    TransportParameters,
};
use throng::transport::peer::{IceCredentials, Identity, Peer, PeerParameters};
use throng::transport::rtp::{Datagram, Header, HeaderTemplate, classify};
use throng::transport::sdp::ExtensionIds;
use throng::transport::sequence::Seq;
use throng::units::Epoch;

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Far beyond what anything here takes: it ends a test that hangs.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct End {
    pub socket: UdpSocket,
    peer: Peer,
    pub got: Vec<(u16, Vec<u8>)>,
}

impl End {
    /// A connection of its own socket to the router.
    fn add(worker: &Worker, identity: &Identity, epoch: Epoch, index: u32) -> End {
        let socket = UdpSocket::bind((LOOPBACK, 0)).unwrap();
        socket.set_nonblocking(true).unwrap();
        let (ours, theirs) = (IceCredentials::random(), IceCredentials::random());
        let parameters = PeerParameters {
            local_address: socket.local_addr().unwrap(),
            local: theirs.clone(),
            remote: ours.clone(),
            remote_fingerprint: identity.fingerprint(),
            remote_candidates: vec![worker.address()],
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

    fn turn(&mut self, epoch: Epoch, router: SocketAddr) {
        let mut bytes = [0; 2_048];
        while let Ok((len, from)) = self.socket.recv_from(&mut bytes) {
            assert_eq!(from, router);
            match classify(&bytes[..len]) {
                Datagram::Rtp => {
                    let header = Header::parse(&bytes[..len]).unwrap();
                    let plain = self
                        .peer
                        .opener()
                        .unwrap()
                        .open_rtp(&mut bytes[..len], header.header_len, header.seq.0.into())
                        .unwrap();
                    self.got.push((header.seq.0, bytes[header.header_len..plain].to_vec()));
                }
                Datagram::Stun | Datagram::Dtls => {
                    self.peer.handle_setup_datagram(&bytes[..len], from, epoch.now());
                }
                _ => {}
            }
        }
        let now = epoch.now();
        if self.peer.next_timeout() <= now {
            self.peer.handle_timeout(now);
        }
        let socket = &self.socket;
        self.peer.poll(now, |datagram, to| drop(socket.send_to(datagram, to)), |_| {});
    }
}

pub struct Loopback {
    pub worker: Worker,
    /// The publisher first.
    pub ends: Vec<End>,
    epoch: Epoch,
    template: HeaderTemplate,
    next_index: u64,
}

impl Loopback {
    /// All connections up, one track published and subscribed to.
    pub fn connected(subscribers: u32, kind: Kind, send: SendMode) -> Loopback {
        let (identity, epoch) = (Identity::generate().unwrap(), Epoch::read());
        let (events, mut told) = tokio::sync::mpsc::unbounded_channel();
        let config = WorkerConfig {
            ip: LOOPBACK,
            identity: identity.clone(),
            epoch,
            send,
            seed: 1,
            name: "sfu-0".into(),
        };
        let worker = Worker::start(config, events).unwrap();
        let ends = (0..=subscribers).map(|index| End::add(&worker, &identity, epoch, index)).collect();
        worker.command(MediaCommand::AddTrack {
            transport: TransportId(0),
            track: TrackId(0),
            parameters: Box::new(TrackParameters {
                kind,
                mid: "0".into(),
                payload_type: 96,
                rtx_payload_type: None,
                clock_rate: 48_000,
                extensions: ExtensionIds::default(),
                nack: true,
                transport_cc: false,
                encodings: Encodings::Ssrc { ssrc: 1, rtx_ssrc: None },
            }),
        });
        for subscriber in 1..=subscribers {
            worker.command(MediaCommand::Subscribe {
                subscription: SubscriptionId(subscriber),
                transport: TransportId(subscriber),
                track: TrackId(0),
                parameters: Box::new(SubscriptionParameters {
                    ssrc: 100 + subscriber,
                    rtx_ssrc: None,
                    payload_type: 110,
                    rtx_payload_type: None,
                    extensions: ExtensionIds::default(),
                    selection: Selection { enabled: true, layer: 0 },
                }),
            });
        }
        let mut loopback = Loopback {
            worker,
            ends,
            epoch,
            template: HeaderTemplate::new(96, 1).unwrap(),
            next_index: 0,
        };
        loopback.turn_until("connected", |ends| ends.iter().all(|end| end.peer.is_connected()));
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
        let mut bytes = [0; 2_000];
        let header_len = self.template.write(&mut bytes, false, Seq(seq), u32::from(seq) * 960).unwrap();
        let len = header_len + payload.len();
        bytes[header_len..len].copy_from_slice(payload);
        self.next_index += u64::from(seq.wrapping_sub(self.next_index as u16));
        let publisher = &self.ends[0];
        let sealed = publisher
            .peer
            .sealer()
            .unwrap()
            .seal_rtp(&mut bytes, header_len, len, self.next_index)
            .unwrap();
        publisher.socket.send_to(&bytes[..sealed], self.worker.address()).unwrap();
    }

    /// Takes what has come, and keeps the connections up.
    pub fn turn(&mut self) {
        let (epoch, router) = (self.epoch, self.worker.address());
        self.ends.iter_mut().for_each(|end| end.turn(epoch, router));
        std::thread::sleep(Duration::from_millis(1));
    }

    pub fn turn_until(&mut self, what: &str, mut done: impl FnMut(&[End]) -> bool) {
        let started = Instant::now();
        while !done(&self.ends) {
            assert!(started.elapsed() < PATIENCE, "waited in vain for: {what}; {:?}", self.worker.statistics());
            self.turn();
        }
    }
}
