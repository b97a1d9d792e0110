//! What a packet costs the embedded SFU's thread: from the CPU time of the thread and the packets that it sent, on loopback, to subscribers that read nothing
//! (their sockets overflow, so the kernel's part ends at their doors). Beside it the floor: the same bytes, only sent.
//!
//! `cargo bench --bench sfu`

#[path = "../tests/common/loopback.rs"]
#[allow(dead_code)]
mod loopback;

use std::net::UdpSocket;
use std::time::Duration;

use loopback::Loopback;
use throng::measure::Kind;
use throng::net;
use throng::sfu::SendMode;

const SUBSCRIBERS: u32 = 100;
/// Rounds among the tests, where only whether it works counts.
const ROUNDS_TINY: u32 = 5;
/// Packets of one burst, as they come from a publisher that sends frames at once.
const BURST: u16 = 8;

fn main() {
    let rounds = if std::env::args().any(|argument| argument == "--bench") {
        2_000
    } else {
        ROUNDS_TINY
    };
    for (name, kind, payload) in [("audio", Kind::Audio, vec![1; 120]), ("video", Kind::Video, video_payload())] {
        for send in [SendMode::Plain, SendMode::Gso] {
            let burst = if kind == Kind::Audio { 1 } else { BURST };
            let per_packet = forward(kind, &payload, burst, send, rounds);
            let floor = floor(payload.len() + 28, usize::from(burst), send, rounds);
            println!(
                "{name}, {send:?}, bursts of {burst}: {per_packet:.0} ns a packet sent, {:.2} times the floor of {floor:.0} ns",
                per_packet / floor
            );
        }
    }
}

/// A key frame's first packet every time: the bench is of bytes, not of pictures.
fn video_payload() -> Vec<u8> {
    let mut payload = vec![0; 1_100];
    payload[..4].copy_from_slice(&[0x90, 0x80, 0x80, 1]);
    payload
}

fn forward(kind: Kind, payload: &[u8], burst: u16, send: SendMode, rounds: u32) -> f64 {
    let mut loopback = Loopback::connected(SUBSCRIBERS, kind, send);
    let before = (loopback.worker.cpu().unwrap(), loopback.worker.statistics().unwrap());
    let mut seq = 0u16;
    for _ in 0..rounds {
        for _ in 0..burst {
            loopback.publish(seq, payload);
            seq = seq.wrapping_add(1);
        }
        let sent = u64::from(SUBSCRIBERS) * u64::from(seq);
        while loopback.worker.statistics().unwrap().media_out < sent {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
    let after = (loopback.worker.cpu().unwrap(), loopback.worker.statistics().unwrap());
    let sent = after.1.media_out - before.1.media_out;
    (after.0 - before.0).as_nanos() as f64 / sent as f64
}

/// Only the sends, to as many sockets that read nothing.
fn floor(len: usize, burst: usize, send: SendMode, rounds: u32) -> f64 {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let receivers: Vec<UdpSocket> = (0..SUBSCRIBERS).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
    let addresses: Vec<_> = receivers.iter().map(|receiver| receiver.local_addr().unwrap()).collect();
    let mut batch = net::SendBatch::default();
    let before = net::thread_cpu();
    for _ in 0..rounds {
        for to in &addresses {
            match send {
                SendMode::Plain => (0..burst).for_each(|_| batch.push(&socket, *to, len, len)),
                SendMode::Gso => batch.push(&socket, *to, len * burst, len),
            }
        }
        batch.flush(&socket);
    }
    (net::thread_cpu() - before).as_nanos() as f64 / (rounds as usize * burst * addresses.len()) as f64
}
