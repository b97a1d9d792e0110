//! The floor program: the work that no receiver of this traffic can do without. It has the same
//! sockets, options and tick as an engine worker. It takes each datagram by `recvmmsg` with the
//! kernel's time stamp and opens it with its connection's key. Nothing is parsed, counted, put in
//! order or answered.
//!
//! This module also has the sender, which drives the floor program and a real worker alike: one
//! socket that sends one burst after the other to everybody, as an SFU forwards one publisher.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use rustix::net::sockopt::set_socket_recv_buffer_size;
use throng::engine::worker::TickGrid;
use throng::engine::{ShardConfig, TICK};
use throng::measure::Kind;
use throng::net;
use throng::transport::rtp::{Datagram, classify};
use throng::transport::sequence::SeqExtender;
use throng::transport::srtp::{DtlsRole, Opener, Profile, Sealer, session};
use throng::units::{Epoch, Time};

use super::origin::{Origin, Plain};
use super::remote::Remote;

pub const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Size of the receive buffer. A run asks for the same, where the host grants it.
pub const RECEIVE_BUFFER_BYTES: usize = 1 << 20;
/// Length of an RTP header without extensions, which is what the sender's packets have.
const HEADER_LEN: usize = 12;
/// Maximum number of segments in one call, where the sender segments. A publisher's frame fits.
const SEGMENTS_MAX: usize = 32;
/// Interval at which the sender looks at the ends and their consent. This work is not part of what
/// is measured.
const UPKEEP: Duration = Duration::from_millis(20);

/// CPU time that one program took, and the packets that it received in that time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Taken {
    pub packets: u64,
    pub cpu: Duration,
}

impl Taken {
    pub fn nanos_a_packet(&self) -> f64 {
        self.cpu.as_nanos() as f64 / self.packets.max(1) as f64
    }
}

/// Receiving end of one connection, without anything around it.
pub struct BareEnd {
    pub socket: UdpSocket,
    pub opener: Opener,
    extender: SeqExtender,
}

/// Information that a bare end's socket gives with each datagram.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Notes {
    /// As on an engine's socket: when the datagram arrived, and what was dropped before it.
    Kept,
    Nothing,
}

/// Makes a receiving end, and the target that its sender needs.
pub fn bare_end(
    index: usize,
    sender: SocketAddr,
    profile: Profile,
    notes: Notes,
) -> (BareEnd, Target) {
    let mut material = vec![0x35; profile.keying_material_len()];
    material[..8].copy_from_slice(&(index as u64).to_be_bytes());
    let (sealer, _) = session(profile, &material, DtlsRole::Client).expect("its length");
    let (_, opener) = session(profile, &material, DtlsRole::Server).expect("its length");
    let socket = match notes {
        Notes::Kept => net::open_media_socket(LOOPBACK, RECEIVE_BUFFER_BYTES),
        Notes::Nothing => plain_socket(),
    };
    let socket = socket.expect("a socket");
    socket.connect(sender).expect("loopback");
    let to = socket.local_addr().expect("bound");
    let target = Target {
        to,
        keys: Keys::Bare(Box::new(sealer)),
    };
    let end = BareEnd {
        socket,
        opener,
        extender: SeqExtender::default(),
    };
    (end, target)
}

fn plain_socket() -> std::io::Result<UdpSocket> {
    let socket = UdpSocket::bind((LOOPBACK, 0))?;
    socket.set_nonblocking(true)?;
    set_socket_recv_buffer_size(&socket, RECEIVE_BUFFER_BYTES)?;
    Ok(socket)
}

/// The floor program on its own thread. It runs until it is stopped.
pub struct Floor {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(Vec<BareEnd>, Taken)>,
}

impl Floor {
    pub fn start(ends: Vec<BareEnd>, epoch: Epoch) -> Floor {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let run = move || receive_until(ends, epoch, &stopped);
        let thread = std::thread::Builder::new()
            .name("bare".into())
            .spawn(run)
            .expect("a thread");
        Floor { stop, thread }
    }

    pub fn stop(self) -> (Vec<BareEnd>, Taken) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the floor program does not fail")
    }
}

fn receive_until(mut ends: Vec<BareEnd>, epoch: Epoch, stop: &AtomicBool) -> (Vec<BareEnd>, Taken) {
    let mut poll = Poll::new().expect("epoll");
    for (key, end) in ends.iter().enumerate() {
        let fd = end.socket.as_raw_fd();
        poll.registry()
            .register(&mut SourceFd(&fd), Token(key), Interest::READABLE)
            .expect("a socket");
    }
    let (mut events, mut batch, mut packets) = (
        Events::with_capacity(4_096),
        net::ReceiveBatch::default(),
        0,
    );
    let mut beat = TickGrid::start(epoch);
    let started = net::thread_cpu();
    while !stop.load(Ordering::Relaxed) {
        // Waits as a worker does that sends no media and has nobody joining.
        beat.wait(2);
        poll.poll(&mut events, Some(Duration::ZERO)).expect("epoll");
        for event in &events {
            packets += drain(&mut ends[event.token().0], &mut batch);
        }
    }
    let cpu = net::thread_cpu() - started;
    for end in &ends {
        let fd = end.socket.as_raw_fd();
        poll.registry()
            .deregister(&mut SourceFd(&fd))
            .expect("registered");
    }
    (ends, Taken { packets, cpu })
}

fn drain(end: &mut BareEnd, batch: &mut net::ReceiveBatch) -> u64 {
    let mut opened = 0;
    while let Ok(count) = batch.receive(&end.socket) {
        for index in 0..count {
            let Some((datagram, received)) = batch.datagram(index) else {
                continue;
            };
            std::hint::black_box(received.stamp_unix_nanos);
            let index = end
                .extender
                .guess(u16::from_be_bytes([datagram[2], datagram[3]]));
            if end.opener.open_rtp(datagram, HEADER_LEN, index).is_ok() {
                end.extender.commit(index);
                opened += 1;
            }
        }
        if batch.is_drained() {
            break;
        }
    }
    opened
}

/// Destination of a sender, with its keys.
pub struct Target {
    pub to: SocketAddr,
    pub keys: Keys,
}

pub enum Keys {
    Bare(Box<Sealer>),
    /// Whole connection: it goes through ICE and DTLS, and consent is kept up.
    Peer(Box<Remote>),
}

impl Target {
    fn sealer(&self) -> &Sealer {
        match &self.keys {
            Keys::Bare(sealer) => sealer,
            Keys::Peer(remote) => remote.peer.sealer().expect("connected"),
        }
    }
}

pub struct Sender {
    pub socket: UdpSocket,
    pub targets: Vec<Target>,
    by_address: HashMap<SocketAddr, usize>,
    origin: Origin,
    epoch: Epoch,
    batch: net::SendBatch,
    burst: Vec<Plain>,
    /// Whether packets of one size that leave together are sent with one call.
    pub segmented: bool,
    next_upkeep: Time,
    pub sent: u64,
    pub sent_bytes: u64,
}

impl Sender {
    /// Makes a sender with its own publisher, which is participant `origin` of `config`.
    pub fn new(
        socket: UdpSocket,
        targets: Vec<Target>,
        config: &ShardConfig,
        origin: usize,
    ) -> Sender {
        let by_address = targets
            .iter()
            .enumerate()
            .map(|(index, target)| (target.to, index))
            .collect();
        Sender {
            socket,
            targets,
            by_address,
            origin: Origin::publishing(Kind::Video, None, origin, config, config.epoch.now()),
            epoch: config.epoch,
            batch: net::SendBatch::default(),
            burst: Vec::new(),
            segmented: false,
            next_upkeep: Time::ZERO,
            sent: 0,
            sent_bytes: 0,
        }
    }

    /// Sends the publisher's packets for the given time, in real time.
    pub fn run_for(&mut self, time: Duration) {
        let mut beat = TickGrid::start(self.epoch);
        let end = self.epoch.now() + time;
        loop {
            let (now, ..) = beat.wait(1);
            if now >= end {
                return;
            }
            self.forward(now);
            self.keep_up(now);
        }
    }

    /// Waits until every connection is up.
    pub fn connect(&mut self, patience: Duration) {
        let end = self.epoch.now() + patience;
        let is_up = |target: &Target| match &target.keys {
            Keys::Bare(_) => true,
            Keys::Peer(remote) => remote.connected,
        };
        while !self.targets.iter().all(is_up) {
            let now = self.epoch.now();
            assert!(now < end, "not connected within {patience:?}");
            self.next_upkeep = now;
            self.keep_up(now);
            std::thread::sleep(TICK);
        }
    }

    fn forward(&mut self, now: Time) {
        let burst = &mut self.burst;
        self.origin.send(now, |plain| burst.push(plain.clone()));
        for target in &self.targets {
            let sealer = target.sealer();
            let alike =
                |one: &Plain, next: &Plain| self.segmented && one.bytes.len() == next.bytes.len();
            for group in self
                .burst
                .chunk_by(alike)
                .flat_map(|group| group.chunks(SEGMENTS_MAX))
            {
                let (room, mut used) = (self.batch.lend(), 0);
                for plain in group {
                    assert_eq!(plain.header_len, HEADER_LEN);
                    let packet = &mut room[used..];
                    packet[..plain.bytes.len()].copy_from_slice(&plain.bytes);
                    let sealed =
                        sealer.seal_rtp(packet, plain.header_len, plain.bytes.len(), plain.index);
                    used += sealed.expect("a packet of ours");
                }
                self.batch
                    .push(&self.socket, target.to, used, used / group.len());
                self.sent += group.len() as u64;
                self.sent_bytes += used as u64;
            }
        }
        self.batch.flush(&self.socket);
        self.burst.clear();
    }

    /// Answers connectivity checks, and does the rest of the work that connections need.
    fn keep_up(&mut self, now: Time) {
        if now < self.next_upkeep {
            return;
        }
        self.next_upkeep = now + UPKEEP;
        let mut bytes = [0; 2_048];
        while let Ok((len, from)) = self.socket.recv_from(&mut bytes) {
            let target = self
                .by_address
                .get(&from)
                .map(|index| &mut self.targets[*index].keys);
            if let (Some(Keys::Peer(remote)), Datagram::Stun | Datagram::Dtls) =
                (target, classify(&bytes[..len]))
            {
                remote.handle_setup(&bytes[..len], from, now);
            }
        }
        for target in &mut self.targets {
            let (socket, to) = (&self.socket, target.to);
            if let Keys::Peer(remote) = &mut target.keys {
                // A datagram that is not sent now is retransmitted later.
                remote.turn(now, |datagram| drop(socket.send_to(datagram, to)));
            }
        }
    }
}
