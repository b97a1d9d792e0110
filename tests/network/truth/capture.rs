//! Packets of a namespace as the kernel shows them to a packet socket (AF_PACKET, which tcpdump
//! also uses): a witness beside the relay.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::{AddressFamily, RecvFlags, SocketType, eth, recv, socket, sockopt};

use crate::common::network::{Direction, Namespace, Packet, describe};

/// Socket buffer, larger than a test's whole traffic.
const BUFFER_BYTES: usize = 32 * 1024 * 1024;

pub struct Capture {
    ended: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Packet>>,
}

impl Capture {
    /// Captures everything that enters or leaves the namespace's devices from now on.
    pub fn start(namespace: &Namespace) -> Capture {
        let taken = namespace
            .run(|| socket(AddressFamily::PACKET, SocketType::DGRAM, Some(eth::ALL)))
            .expect("root may capture");
        sockopt::set_socket_recv_buffer_size_force(&taken, BUFFER_BYTES)
            .expect("root may have a large buffer");
        sockopt::set_socket_timeout(
            &taken,
            sockopt::Timeout::Recv,
            Some(Duration::from_millis(20)),
        )
        .expect("a time-out");
        let ended = Arc::new(AtomicBool::new(false));
        let (end, from) = (ended.clone(), namespace.address);
        Capture {
            ended,
            thread: std::thread::spawn(move || take(&taken, &end, from)),
        }
    }

    /// Ends the capture. Returns all packets that were seen, sent and received.
    pub fn finish(self) -> Vec<Packet> {
        self.ended.store(true, Ordering::Relaxed);
        self.thread.join().expect("the capture does not panic")
    }
}

fn take(socket: &OwnedFd, ended: &AtomicBool, clients: std::net::Ipv4Addr) -> Vec<Packet> {
    let mut packets = Vec::new();
    let mut bytes = [0; 65_536];
    loop {
        match recv(socket, &mut bytes, RecvFlags::empty()) {
            Ok((_, len)) => packets.extend(
                describe(&bytes[..len], Direction::Up, Duration::ZERO).map(|packet| Packet {
                    direction: if *packet.from.ip() == clients {
                        Direction::Up
                    } else {
                        Direction::Down
                    },
                    ..packet
                }),
            ),
            Err(_) if ended.load(Ordering::Relaxed) => return packets,
            Err(_) => {}
        }
    }
}
