//! DTLS records, handled by a peer of ours. The other end is an honest peer. A script loses,
//! repeats, changes and adds datagrams of it, so that the damage is deep inside a handshake.

use std::net::SocketAddr;
use std::time::Duration;

use throng::transport::peer::{Peer, PeerEvent};
use throng::transport::rtp::{Datagram, classify};
use throng::units::{Epoch, Time};

use super::stun::{identity, parameters};
use super::{Script, Target, chunk, ours};

pub const TARGET: Target = Target {
    name: "dtls",
    run,
    seeds,
    mutations: 40,
    memory: Some((2 << 20, 64)),
};

const PASSED: u8 = 0;
const LOST: u8 = 1;
const REPEATED: u8 = 2;
const CHANGED: u8 = 3;
const CUT: u8 = 4;
const REPLACED: u8 = 5;
const JOINED: u8 = 6;
const KEPT_BACK: u8 = 7;

const STEP: Duration = Duration::from_millis(5);
/// Number of steps in a run. The whole handshake takes some 40 ms; a lost flight is retransmitted
/// after 200.
const STEPS: usize = 120;

fn run(input: &[u8]) {
    let mut script = Script::new(input);
    let (identity, epoch) = (identity(), Epoch::read());
    let active = script.u8() & 1 == 0;
    let mut now = Time::ZERO;
    let mut ends = [
        ("ours", "them", [1, 2], active),
        ("them", "ours", [2, 1], !active),
    ]
    .map(|(me, other, at, controlling)| {
        let parameters = parameters(&identity, me, other, at, controlling);
        Peer::new(&identity, &parameters, epoch, now)
    });
    let (mut connected, mut failed, mut sent, mut taken) = (0, 0, 0, 0);
    let mut kept = Vec::new();
    for _ in 0..STEPS {
        now += STEP;
        let mut to_them: Vec<Vec<u8>> = Vec::new();
        let mut to_us: Vec<Vec<u8>> = Vec::new();
        ours(|| ends[0].handle_timeout(now));
        ours(|| {
            ends[0].poll(
                now,
                |bytes, _| to_them.push(bytes.to_vec()),
                |event| match event {
                    PeerEvent::Connected => connected += 1,
                    PeerEvent::Failed(_) => failed += 1,
                    PeerEvent::Nominated(_) => {}
                },
            );
        });
        ends[1].handle_timeout(now);
        ends[1].poll(now, |bytes, _| to_us.push(bytes.to_vec()), |_| {});
        let from: [SocketAddr; 2] =
            [1, 2].map(|of: u8| SocketAddr::from(([192, 0, 2, of], 5_000 + u16::from(of))));
        sent += to_them.len();
        for datagram in to_them {
            ends[1].handle_setup_datagram(&datagram, from[0], now);
        }
        for datagram in to_us {
            let arriving = match classify(&datagram) {
                Datagram::Dtls => harmed(&mut script, datagram, &mut kept),
                _ => vec![datagram],
            };
            for datagram in arriving {
                taken += 1;
                ours(|| ends[0].handle_setup_datagram(&datagram, from[1], now));
            }
        }
        if script.is_over() && (connected > 0 || failed > 0) {
            break;
        }
    }
    assert!(connected <= 1 && failed <= 1, "each is told once");
    assert_eq!(ends[0].is_connected(), connected == 1 && failed == 0);
    // A flight is some ten datagrams. A timer, or a flight of the other end, causes it to be
    // repeated.
    assert!(sent <= 64 + 8 * taken, "{sent} datagrams for {taken}");
}

fn harmed(script: &mut Script<'_>, datagram: Vec<u8>, kept: &mut Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    let mut datagram = datagram;
    match script.u8() % 8 {
        LOST => Vec::new(),
        REPEATED => vec![datagram; 1 + usize::from(script.u8() % 8)],
        CHANGED => {
            let at = usize::from(script.u16()) % datagram.len();
            datagram[at] ^= script.u8();
            vec![datagram]
        }
        CUT => {
            datagram.truncate(usize::from(script.u16()) % datagram.len());
            vec![datagram]
        }
        REPLACED => vec![script.chunk().to_vec()],
        JOINED => {
            let at = usize::from(script.u16()) % datagram.len();
            let more = script.chunk();
            datagram.splice(at..at, more.iter().copied());
            vec![datagram]
        }
        KEPT_BACK => {
            kept.push(datagram);
            Vec::new()
        }
        _ => [vec![datagram], std::mem::take(kept)].concat(),
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let alert = [21, 254, 253, 0, 0, 0, 0, 0, 0, 0, 9, 0, 2, 2, 40];
    let mut seeds = Vec::new();
    for role in [0u8, 1] {
        seeds.push(vec![role, PASSED]);
        seeds.push(vec![role, PASSED, LOST, PASSED, REPEATED, 3, PASSED]);
        seeds.push(vec![
            role, KEPT_BACK, KEPT_BACK, PASSED, CHANGED, 0, 14, 0xFF,
        ]);
        seeds.push([&[role, PASSED, REPLACED][..], &chunk(&alert), &[CUT, 0, 40]].concat());
        seeds.push(
            [
                &[role, JOINED, 0, 0][..],
                &chunk(&alert),
                &[CHANGED, 0, 25, 1],
            ]
            .concat(),
        );
    }
    seeds
}
