//! One received stream, with any sequence of packets, polls and reports. The account adds up after
//! every step, and requests are bounded.

use std::collections::HashMap;
use std::time::Duration;

use throng::transport::receive::{Arrival, MISSING_MAX, NackRule, ReceiveStream, RoundTrip};
use throng::units::Time;

use super::{Script, Target, ours};

pub const TARGET: Target = Target {
    name: "receive",
    run,
    seeds,
    mutations: 600,
    memory: Some((0, 0)),
};

const RETRANSMITTED: u8 = 1;
const FAR: u8 = 2;
const POLL: u8 = 4;
const REPORT: u8 = 8;
const SENDER_REPORT: u8 = 16;
const LATER: u8 = 32;

/// Limit of requests for one packet, as in libwebrtc and in our code.
const TRIES_MAX: u32 = 10;

fn run(input: &[u8]) {
    let mut script = Script::new(input);
    let setup = script.u8();
    let mut stream = ours(|| ReceiveStream::new(if setup & 1 == 0 { 48_000 } else { 90_000 }));
    stream.set_rtx(setup & 2 != 0);
    if setup & 1 == 0 {
        stream.set_nack(NackRule::Audio);
    }
    let last = Duration::from_millis(u64::from(setup >> 2) * 8);
    let rtt = RoundTrip {
        last,
        least: (setup & 4 != 0).then_some(last / 2),
    };
    let (mut now, mut seq, mut last_ext) =
        (Time::from_micros(u64::from(script.u32())), script.u16(), 0);
    let mut asked: HashMap<u64, u32> = HashMap::new();
    let (mut noticed, mut requests) = (0u64, 0u64);
    while !script.is_over() {
        let (flags, step) = (script.u8(), script.u8() as i8);
        let elapsed = if flags & LATER != 0 { 60_000 } else { 500 };
        now += Duration::from_micros(elapsed);
        let step = i32::from(step) * if flags & FAR != 0 { 257 } else { 1 };
        seq = seq.wrapping_add(step as u16);
        let before = stream.counts();
        let arrival = ours(|| {
            stream.handle_packet(
                seq,
                u32::from(seq).wrapping_mul(960),
                now,
                flags & RETRANSMITTED != 0,
            )
        });
        check(&stream, arrival, before);
        if let Arrival::New { gap } = arrival {
            noticed += u64::from(gap);
            assert!(stream.ext_seq() > last_ext, "numbers never repeat");
        }
        if !matches!(arrival, Arrival::TooOld) {
            assert_eq!(stream.ext_seq() as u16, seq);
            last_ext = last_ext.max(stream.ext_seq());
        }
        if matches!(arrival, Arrival::Repaired { .. }) {
            // A repaired packet that was ahead of its stream also leaves a gap.
            noticed += 3_000;
        }
        if flags & POLL != 0 {
            let mut out = [0; MISSING_MAX];
            let polled = ours(|| stream.poll_nack(now, rtt, &mut out));
            assert!(polled.count <= MISSING_MAX);
            requests += polled.count as u64;
            for wanted in &out[..polled.count] {
                let behind = (last_ext as u16).wrapping_sub(*wanted);
                let tries = asked.entry(last_ext - u64::from(behind)).or_default();
                *tries += 1;
                assert!(*tries <= TRIES_MAX, "{wanted} asked for {tries} times");
            }
        }
        if flags & SENDER_REPORT != 0 {
            stream.handle_sender_report(u64::from(script.u32()) << 16, now);
        }
        if flags & REPORT != 0 {
            let numbers = ours(|| stream.report_block(now)).filter(|numbers| numbers.lsr == 0);
            assert!(numbers.is_none_or(|numbers| numbers.dlsr == 0));
        }
        assert!(requests <= noticed * u64::from(TRIES_MAX));
    }
}

fn check(
    stream: &ReceiveStream,
    arrival: Arrival,
    before: throng::transport::receive::ReceiveCounts,
) {
    let counts = stream.counts();
    assert_eq!(
        counts.expected,
        counts.received + counts.lost_network,
        "{counts:?}"
    );
    assert_eq!(
        counts.lost_network,
        counts.repaired + counts.lost,
        "{counts:?}"
    );
    let grew = |after: u64, before: u64| after == before + 1;
    match arrival {
        Arrival::New { .. } | Arrival::Reordered => assert!(grew(counts.received, before.received)),
        Arrival::Repaired { .. } => assert!(grew(counts.repaired, before.repaired)),
        Arrival::Duplicate => assert!(grew(counts.duplicate, before.duplicate)),
        Arrival::TooOld => assert!(grew(counts.too_old, before.too_old)),
    }
    assert!(stream.jitter() <= Duration::from_secs(1 << 18));
}

fn seeds() -> Vec<Vec<u8>> {
    let start = |setup: u8, micros: u32, seq: u16| {
        [&[setup][..], &micros.to_be_bytes(), &seq.to_be_bytes()].concat()
    };
    let steps = |steps: &[(u8, i8)]| {
        steps
            .iter()
            .flat_map(|(flags, step)| [*flags, *step as u8])
            .collect::<Vec<u8>>()
    };
    vec![
        [
            start(0, 0, 65_533),
            steps(&[
                (0, 1),
                (0, 1),
                (POLL, 3),
                (LATER | POLL, 1),
                (RETRANSMITTED, -2),
                (REPORT, 3),
            ]),
        ]
        .concat(),
        // The clock's 32 bits of microseconds wrap between the gap and its repair.
        [
            start(7, u32::MAX - 900, 10),
            steps(&[
                (0, 1),
                (POLL, 5),
                (LATER | POLL, 1),
                (LATER | POLL, 1),
                (RETRANSMITTED, -4),
            ]),
        ]
        .concat(),
        [
            start(2, 0, 0),
            steps(&[
                (0, 0),
                (FAR, 40),
                (FAR, 0),
                (0, 1),
                (FAR | REPORT, -40),
                (FAR, 100),
                (0, 1),
            ]),
        ]
        .concat(),
        [
            start(1, 5, 9),
            [SENDER_REPORT, 1, 1, 2, 3, 4, REPORT, 1].to_vec(),
        ]
        .concat(),
    ]
}
