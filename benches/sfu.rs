//! Cost of a packet in the embedded SFU's thread, on loopback, with few and with many subscribers,
//! whose sockets are the engine's. It is the CPU time of the thread over the packets that it sent.
//! The floor beside it sends as many bytes to the same sockets and does nothing else, also on a
//! thread of its own. The two take turns, so that what else the host does affects both. A third
//! thread empties the sockets in between. So the kernel's part always ends with a datagram in its
//! socket, and never with one that finds no room.
//!
//! `cargo bench --bench sfu`, or `cargo bench --bench sfu -- gso` for the rows whose names contain
//! that.

#[path = "../tests/common/loopback.rs"]
#[allow(dead_code)]
mod loopback;

use std::net::{SocketAddr, UdpSocket};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use loopback::Loopback;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use throng::measure::Kind;
use throng::net;
use throng::sfu::SendMode;

/// Number of packets in a frame of 720p.
const FRAME: u16 = 6;
const AUDIO_BYTES: usize = 120;
/// Payload size. With header and tag, a packet has about 1,100 bytes on the wire.
const VIDEO_BYTES: usize = 1_072;
/// Bytes of the fixed header and the tag.
const OVERHEAD: usize = 28;
/// Number of rounds in one turn: as many as a socket's buffer holds.
const ROUNDS: u32 = 8;
/// Number of packets that a setting sends, about.
const PACKETS: u32 = 800_000;

fn main() {
    // Many hosts do not allow thousands of sockets unless the limit is raised. If the host refuses,
    // the sockets do not open, and the error says so.
    let files = getrlimit(Resource::Nofile);
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: files.maximum,
            ..files
        },
    );
    // Among the tests it runs once in a small size, so that it does not rot.
    let is_full = std::env::args().any(|argument| argument == "--bench");
    let (sizes, packets): (&[u32], _) = if is_full {
        (&[100, 1_000, 3_000], PACKETS)
    } else {
        (&[2], 100)
    };
    let wanted = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with('-'))
        .unwrap_or_default();
    for subscribers in sizes {
        for (kind, send) in [
            (Kind::Video, SendMode::Gso),
            (Kind::Video, SendMode::Plain),
            (Kind::Audio, SendMode::Plain),
        ] {
            let name = format!("{kind:?}, {}, {subscribers} subscribers", send.name());
            if name.contains(&wanted) {
                measure(&name, &mut Bench::new(*subscribers, kind, send), packets);
            }
        }
    }
}

/// Forwards about `packets` packets through the SFU, and sends as many without it, in turns.
fn measure(name: &str, bench: &mut Bench, packets: u32) {
    let (subscribers, burst) = (
        bench.loopback.ends.len() as u32 - 1,
        bench.payloads.len() as u32,
    );
    let turns = packets / (subscribers * burst * ROUNDS) + 1;
    let (mut forwarded, mut floor) = (Duration::ZERO, Duration::ZERO);
    // The first turn meets memory that was never touched, so it is not counted.
    bench.forward();
    bench.floor();
    for _ in 0..turns {
        forwarded += bench.forward();
        floor += bench.floor();
    }
    let nanos =
        |time: Duration| time.as_nanos() as f64 / f64::from(turns * ROUNDS * burst * subscribers);
    println!(
        "{name}, bursts of {burst}: {:.0} ns a packet sent, {:.2} times the floor of {:.0} ns",
        nanos(forwarded),
        nanos(forwarded) / nanos(floor),
        nanos(floor)
    );
}

struct Bench {
    loopback: Loopback,
    payloads: Vec<Vec<u8>>,
    frame: u16,
    floor: FloorThread,
}

impl Bench {
    fn new(subscribers: u32, kind: Kind, send: SendMode) -> Bench {
        let loopback = Loopback::connected(subscribers, kind, send);
        let receivers = loopback.ends[1..]
            .iter()
            .map(|end| end.socket.local_addr().expect("bound"));
        let payloads = match kind {
            Kind::Audio => vec![vec![1; AUDIO_BYTES]],
            Kind::Video => vec![vec![0; VIDEO_BYTES]; usize::from(FRAME)],
        };
        Bench {
            floor: FloorThread::start(Floor {
                receivers: receivers.collect(),
                len: payloads[0].len() + OVERHEAD,
                burst: payloads.len(),
                send,
            }),
            loopback,
            payloads,
            frame: 0,
        }
    }

    /// Publishes frames, each as soon as the last subscriber has the one before. Returns the CPU
    /// time of the thread that forwards them.
    fn forward(&mut self) -> Duration {
        let before = self.loopback.worker.cpu().expect("it runs");
        let ends = self.loopback.ends.len();
        for _ in 0..ROUNDS {
            self.write_descriptors();
            let payloads: Vec<&[u8]> = self.payloads.iter().map(Vec::as_slice).collect();
            let first_seq = self.frame.wrapping_mul(payloads.len() as u16);
            self.loopback
                .publish_burst(first_seq, u32::from(self.frame) * 3_000, &payloads);
            self.frame = self.frame.wrapping_add(1);
            let mut arrived = 0;
            while arrived < payloads.len() as u64 {
                std::thread::sleep(Duration::from_micros(100));
                arrived += self.loopback.skim(ends - 1..ends);
            }
        }
        let after = self.loopback.worker.cpu().expect("it runs");
        self.loopback.skim(0..ends);
        after - before
    }

    /// Writes VP8 descriptors with a long picture id, which goes up by one a frame. The first frame
    /// of all is a key frame.
    fn write_descriptors(&mut self) {
        if self.payloads.len() == 1 {
            return;
        }
        for (at, payload) in self.payloads.iter_mut().enumerate() {
            let [high, low] = (self.frame & 0x7FFF | 0x8000).to_be_bytes();
            let start_of_partition = if at == 0 { 0x10 } else { 0 };
            payload[..5].copy_from_slice(&[
                0x80 | start_of_partition,
                0x80,
                high,
                low,
                u8::from(self.frame > 0),
            ]);
        }
    }

    fn floor(&mut self) -> Duration {
        let time = self.floor.take_turn();
        self.loopback.skim(0..self.loopback.ends.len());
        time
    }
}

/// The floor: the sends, and nothing else.
struct Floor {
    receivers: Vec<SocketAddr>,
    len: usize,
    burst: usize,
    send: SendMode,
}

impl Floor {
    /// Sends the packets of one turn. Returns the CPU time.
    fn send(&self, socket: &UdpSocket, batch: &mut net::SendBatch) -> Duration {
        let before = net::thread_cpu();
        for _ in 0..ROUNDS {
            for to in &self.receivers {
                match self.send {
                    SendMode::Plain => {
                        (0..self.burst).for_each(|_| batch.push(socket, *to, self.len, self.len))
                    }
                    SendMode::Gso => batch.push(socket, *to, self.len * self.burst, self.len),
                }
            }
            batch.flush(socket);
        }
        net::thread_cpu() - before
    }
}

/// Thread that sends the floor's packets, while another thread frees them. A packet that another
/// thread frees costs the sender more than one that it receives itself.
struct FloorThread {
    turns: Sender<()>,
    times: Receiver<Duration>,
}

impl FloorThread {
    /// Starts the thread, which ends when the handle is dropped.
    fn start(floor: Floor) -> FloorThread {
        let ((turns, asked), (answer, times)) = (channel(), channel());
        std::thread::spawn(move || {
            let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
            let mut batch = net::SendBatch::default();
            // Memory that was never written is a single page of zeros, which every cache holds.
            batch.lend().fill(1);
            while asked.recv().is_ok() && answer.send(floor.send(&socket, &mut batch)).is_ok() {}
        });
        FloorThread { turns, times }
    }

    fn take_turn(&self) -> Duration {
        self.turns.send(()).expect("the thread waits");
        self.times.recv().expect("the thread answers")
    }
}
