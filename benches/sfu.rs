//! What a packet costs the embedded SFU's thread: from the CPU time of the thread and the packets that it sent, on loopback, to few and to many subscribers,
//! whose sockets are the engine's. Beside it the floor: the same bytes to the same sockets, only sent. Both in turn, so that what else the host does meets both.
//! The sockets are emptied in between, so the kernel's part ends with a datagram in its socket, and never with one that finds no room.
//!
//! `cargo bench --bench sfu`

#[path = "../tests/common/loopback.rs"]
#[allow(dead_code)]
mod loopback;

use std::net::SocketAddr;
use std::time::Duration;

use loopback::Loopback;
use throng::measure::Kind;
use throng::net;
use throng::sfu::SendMode;

/// Packets of a frame of 720p.
const FRAME: u16 = 6;
const AUDIO_BYTES: usize = 120;
/// With header and tag, about 1,100 bytes on the wire.
const VIDEO_BYTES: usize = 1_072;
/// Of the fixed header and the tag.
const OVERHEAD: usize = 28;
/// Turns of either, and rounds of one turn: what a socket's buffer holds.
const ROUNDS: u32 = 8;
/// Packets that a setting sends, about.
const PACKETS: u32 = 800_000;

fn main() {
    // Among the tests it runs once, in small, so that it does not rot.
    let is_full = std::env::args().any(|argument| argument == "--bench");
    let (sizes, packets): (&[u32], _) = if is_full { (&[100, 1_000], PACKETS) } else { (&[2], 100) };
    for subscribers in sizes {
        for (kind, send) in [
            (Kind::Video, SendMode::Gso),
            (Kind::Video, SendMode::Plain),
            (Kind::Audio, SendMode::Plain),
        ] {
            let mut bench = Bench::new(*subscribers, kind, send);
            let burst = bench.payloads.len() as u32;
            let turns = packets / (subscribers * burst * ROUNDS) + 1;
            let (mut forwarded, mut floor) = (Duration::ZERO, Duration::ZERO);
            // The first one meets what was never touched.
            bench.forward();
            bench.floor();
            for _ in 0..turns {
                forwarded += bench.forward();
                floor += bench.floor();
            }
            let nanos = |time: Duration| time.as_nanos() as f64 / f64::from(turns * ROUNDS * burst * subscribers);
            println!(
                "{kind:?}, {}, {subscribers} subscribers, bursts of {burst}: {:.0} ns a packet sent, {:.2} times the floor of {:.0} ns",
                send.name(),
                nanos(forwarded),
                nanos(forwarded) / nanos(floor),
                nanos(floor)
            );
        }
    }
}

struct Bench {
    loopback: Loopback,
    send: SendMode,
    payloads: Vec<Vec<u8>>,
    frame: u16,
    floor: std::net::UdpSocket,
    batch: net::SendBatch,
    receivers: Vec<SocketAddr>,
}

impl Bench {
    fn new(subscribers: u32, kind: Kind, send: SendMode) -> Bench {
        let loopback = Loopback::connected(subscribers, kind, send);
        let addresses = loopback.ends[1..].iter().map(|end| end.socket.local_addr().expect("bound"));
        let payloads = match kind {
            Kind::Audio => vec![vec![1; AUDIO_BYTES]],
            Kind::Video => vec![vec![0; VIDEO_BYTES]; usize::from(FRAME)],
        };
        Bench {
            receivers: addresses.collect(),
            loopback,
            send,
            payloads,
            frame: 0,
            floor: std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket"),
            batch: net::SendBatch::default(),
        }
    }

    /// Publishes frames, each once the last subscriber has the one before: the CPU time of the thread that forwards them.
    fn forward(&mut self) -> Duration {
        let before = self.loopback.worker.cpu().expect("it runs");
        let ends = self.loopback.ends.len();
        for _ in 0..ROUNDS {
            self.write_descriptors();
            let payloads: Vec<&[u8]> = self.payloads.iter().map(Vec::as_slice).collect();
            let first_seq = self.frame.wrapping_mul(payloads.len() as u16);
            self.loopback.publish_burst(first_seq, u32::from(self.frame) * 3_000, &payloads);
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

    /// A long picture id, and one frame after the other: the first of all is a key frame.
    fn write_descriptors(&mut self) {
        if self.payloads.len() == 1 {
            return;
        }
        for (at, payload) in self.payloads.iter_mut().enumerate() {
            let [high, low] = (self.frame & 0x7FFF | 0x8000).to_be_bytes();
            let start_of_partition = if at == 0 { 0x10 } else { 0 };
            payload[..5].copy_from_slice(&[0x80 | start_of_partition, 0x80, high, low, u8::from(self.frame > 0)]);
        }
    }

    /// Only the sends, to the same sockets.
    fn floor(&mut self) -> Duration {
        let (len, burst) = (self.payloads[0].len() + OVERHEAD, self.payloads.len());
        let before = net::thread_cpu();
        for _ in 0..ROUNDS {
            for to in &self.receivers {
                match self.send {
                    SendMode::Plain => (0..burst).for_each(|_| self.batch.push(&self.floor, *to, len, len)),
                    SendMode::Gso => self.batch.push(&self.floor, *to, len * burst, len),
                }
            }
            self.batch.flush(&self.floor);
        }
        let after = net::thread_cpu();
        self.loopback.skim(0..self.loopback.ends.len());
        after - before
    }
}
