//! Property tests for counters that wrap and for packets out of order. What a stream makes of its
//! packets must not depend on the values of its clocks and counters at the start. Sequence numbers
//! wrap at 16 bits, RTP times at 32 bits, microseconds at 32 bits (after 71 minutes), and SRTP's
//! index at 48 bits.

use std::collections::BTreeSet;
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use throng::media::assemble::{Assembler, FrameEvent, PacketInfo};
use throng::seeded::Seeded;
use throng::transport::receive::{Arrival, MISSING_MAX, ReceiveCounts, ReceiveStream, RoundTrip};
use throng::transport::resend::{FrameRecord, Resend, ResendLimiter, ResendRing};
use throng::transport::rtcp::{dlsr_units, rtt_from_report};
use throng::transport::rtp::HeaderTemplate;
use throng::transport::sequence::{ReplayWindow, Seq, SeqExtender};
use throng::transport::srtp::{DtlsRole, Profile, session};
use throng::units::{Bitrate, Epoch, Time, ntp_middle};

/// Start time of a script that is about half over when 32 bits of microseconds wrap. It is a whole
/// number of seconds, which all RTP clocks count alike.
const BEFORE_MICROS_WRAP: Duration = Duration::from_secs(4_290);

const ROUND_TRIP: RoundTrip = RoundTrip {
    last: Duration::from_millis(40),
    least: Some(Duration::from_millis(30)),
};

/// Start values of the counters.
#[derive(Clone, Copy, Default)]
struct Origin {
    time: Duration,
    seq: u16,
    rtp_time: u32,
}

impl Origin {
    const PLAIN: Origin = Origin {
        time: Duration::from_secs(10),
        seq: 1_000,
        rtp_time: 0,
    };

    /// Draws start values. Each counter is either about to wrap or anywhere in its range.
    fn drawn(chance: &mut Seeded) -> Origin {
        let about = |chance: &mut Seeded, end: u64, before: u64| match chance.below(3) {
            0 => chance.below(end),
            _ => end - 1 - chance.below(before),
        };
        Origin {
            time: if chance.chance(70) {
                BEFORE_MICROS_WRAP
            } else {
                Duration::from_secs(chance.below(1 << 20))
            },
            seq: about(chance, 1 << 16, 400) as u16,
            rtp_time: about(chance, 1 << 32, 400 * 960) as u32,
        }
    }
}

/// A packet on its way: the time since the start of the script at which it arrives, its number
/// since the start, whether it arrives over RTX, and whether NACKs are polled after it.
#[derive(Clone, Copy)]
struct Step {
    micros: u64,
    number: i32,
    retransmitted: bool,
    poll: bool,
}

/// Returns 10 s of a stream with loss, reordering, duplicates and repairs.
fn script(chance: &mut Seeded) -> Vec<Step> {
    let mut steps = Vec::new();
    let (mut micros, mut lost) = (0, Vec::new());
    for number in 0..500 {
        micros += 18_000 + chance.below(4_000);
        let step = |micros, number, retransmitted, poll| Step {
            micros,
            number,
            retransmitted,
            poll,
        };
        match chance.below(20) {
            0 | 1 => lost.push(number),
            2 => steps.push(step(
                micros + 25_000 + chance.below(60_000),
                number,
                false,
                true,
            )),
            3 => steps.extend([
                step(micros, number, false, true),
                step(micros + 300, number, false, false),
            ]),
            _ => steps.push(step(micros, number, false, chance.chance(60))),
        }
        if let Some(repaired) = lost.pop_if(|_| chance.chance(40)) {
            steps.push(step(micros + 100, repaired, true, false));
        }
    }
    steps.sort_by_key(|step| step.micros);
    steps
}

type Story = (
    Vec<(Arrival, Option<u64>)>,
    Vec<(usize, u32, Vec<u16>)>,
    ReceiveCounts,
    Duration,
);

fn received(steps: &[Step], origin: Origin, rtx: bool) -> Story {
    let mut stream = ReceiveStream::new(48_000);
    stream.set_rtx(rtx);
    let (mut arrivals, mut polls, mut first): (Vec<_>, Vec<_>, Option<u64>) = Default::default();
    for step in steps {
        let now = Time::ZERO + origin.time + Duration::from_micros(step.micros);
        let seq = origin.seq.wrapping_add(step.number as u16);
        let rtp_time = origin
            .rtp_time
            .wrapping_add((step.number as u32).wrapping_mul(960));
        let arrival = stream.handle_packet(seq, rtp_time, now, step.retransmitted && rtx);
        let ext = (arrival != Arrival::TooOld).then(|| stream.ext_seq());
        first = first.or(ext);
        let base = first.unwrap_or_default();
        arrivals.push((arrival, ext.map(|ext| ext.wrapping_sub(base))));
        if step.poll {
            let mut out = [0; MISSING_MAX];
            let polled = stream.poll_nack(now, ROUND_TRIP, &mut out);
            let asked = out[..polled.count]
                .iter()
                .map(|seq| seq.wrapping_sub(origin.seq))
                .collect();
            polls.push((polled.count, polled.gave_up, asked));
        }
    }
    (arrivals, polls, stream.counts(), stream.jitter())
}

#[test]
fn a_received_stream_tells_the_same_wherever_its_counters_begin() {
    let mut chance = Seeded::new(11);
    let mut repaired = 0;
    for round in 0..60 {
        let (steps, rtx) = (script(&mut chance), round % 2 == 0);
        let plain = received(&steps, Origin::PLAIN, rtx);
        assert!(
            plain.2.lost_network > 0
                && plain.2.reordered + plain.2.repaired > 0
                && !plain.1.is_empty()
        );
        repaired += plain.2.repaired;
        for _ in 0..6 {
            let origin = Origin::drawn(&mut chance);
            let story = received(&steps, origin, rtx);
            let from = (round, origin.time, origin.seq, origin.rtp_time);
            assert_eq!((story.2, story.3), (plain.2, plain.3), "{from:?}");
            assert!(story == plain, "{from:?}");
        }
    }
    assert!(repaired > 100);
}

#[test]
fn frames_are_put_together_alike_wherever_numbers_and_clocks_begin() {
    let mut chance = Seeded::new(12);
    let assembled = |steps: &[Step], origin: Origin, first_seq: u64| {
        let mut assembler = Assembler::new();
        let mut events: Vec<(u64, bool, bool, Option<Duration>)> = Vec::new();
        for step in steps {
            let now = Time::ZERO + origin.time + Duration::from_micros(step.micros);
            // Each frame has three packets. Every fiftieth frame is a key frame.
            let (frame, place) = (step.number / 3, step.number % 3);
            let packet = PacketInfo {
                ext_seq: first_seq + step.number as u64,
                rtp_time: origin.rtp_time.wrapping_add(frame as u32 * 3_000),
                start: place == 0,
                end: place == 2,
                key: frame % 50 == 0,
                identity: None,
            };
            assembler.handle_packet(&packet, now, |event| {
                events.push(match event {
                    FrameEvent::Complete(frame) => (
                        0,
                        frame.key,
                        frame.decodable,
                        Some(frame.completed_at.since(frame.first_arrival)),
                    ),
                    FrameEvent::Decoded(frame) => {
                        (1, frame.key, frame.freeze.is_some(), frame.interval)
                    }
                });
            });
            if assembler.poll_pli(now) {
                events.push((2, false, false, None));
            }
        }
        (events, assembler.counts())
    };
    let (mut decoded, mut given_up) = (0, 0);
    for _ in 0..60 {
        let steps = script(&mut chance);
        let plain = assembled(&steps, Origin::PLAIN, 70_000);
        decoded += plain.1.decoded;
        given_up += plain.1.abandoned + plain.1.undecodable;
        for _ in 0..6 {
            let origin = Origin::drawn(&mut chance);
            let first_seq =
                [1 << 16, (1 << 32) - 200, u64::from(origin.seq) + 1][chance.below(3) as usize];
            assert!(
                assembled(&steps, origin, first_seq) == plain,
                "{:?} {} {first_seq}",
                origin.time,
                origin.rtp_time
            );
        }
    }
    assert!(
        decoded > 500 && given_up > 10,
        "{decoded} decoded, {given_up} given up"
    );
}

/// One end seals the packets, and the other opens them as a worker does, with only 16 bits of the
/// index on the wire.
#[test]
fn every_packet_is_opened_once_over_many_rollovers_and_whatever_its_order() {
    let mut chance = Seeded::new(13);
    for (round, profile) in [Profile::AeadAes128Gcm, Profile::Aes128CmHmacSha1_80]
        .into_iter()
        .cycle()
        .take(8)
        .enumerate()
    {
        let material: Vec<u8> = (0..profile.keying_material_len() as u8).collect();
        let (sealer, _) = session(profile, &material, DtlsRole::Server).unwrap();
        let (_, opener) = session(profile, &material, DtlsRole::Client).unwrap();
        let template = HeaderTemplate::new(111, Ssrc(7)).unwrap();
        let (mut extender, mut window) = (SeqExtender::default(), ReplayWindow::default());
        let (mut opened, mut newest, mut sent) =
            (BTreeSet::new(), None, 65_000 + chance.below(500));
        for _ in 0..6_000 {
            // The index leaps ahead, so that four rollovers pass. Some packets lie behind it,
            // mostly within the window.
            sent += 1 + chance.below(80);
            let index = if chance.chance(25) {
                sent.saturating_sub(chance.below(1_300)).max(65_000)
            } else {
                sent
            };
            let mut packet = [9; 64];
            let header_len = template
                .write(&mut packet, false, Seq(index as u16), 0)
                .unwrap();
            let len = sealer.seal_rtp(&mut packet, header_len, 40, index).unwrap();
            let guess = extender.guess(index as u16);
            let fresh = window.check(guess);
            let is_open = fresh
                && opener
                    .open_rtp(&mut packet[..len], header_len, guess)
                    .is_ok();
            if is_open {
                window.commit(guess);
                extender.commit(guess);
            }
            let behind = newest.map_or(0, |newest: u64| newest.saturating_sub(index));
            let expected = behind < ReplayWindow::WIDTH && !opened.contains(&index);
            assert_eq!(is_open, expected, "round {round}: {index}, {behind} behind");
            if is_open {
                opened.insert(index);
                newest = newest.max(Some(index));
            }
        }
        assert!(sent >> 16 >= 3, "{sent}");
    }
}

#[test]
fn round_trips_survive_the_wrap_of_short_ntp_stamps() {
    let mut chance = Seeded::new(14);
    for _ in 0..20_000 {
        let (rtt, held) = (
            Duration::from_micros(chance.below(5_000_000)),
            Duration::from_micros(chance.below(60_000_000)),
        );
        // Any moment. Half of them are moments at which 16 bits of seconds are about to wrap.
        let sent = (chance.draw() as u32) | if chance.chance(50) { 0xFFFF_0000 } else { 1 };
        let back =
            (u64::from(sent) + u64::from(dlsr_units(rtt)) + u64::from(dlsr_units(held))) as u32;
        let told = rtt_from_report(back, sent, dlsr_units(held)).unwrap();
        assert!(
            told.abs_diff(rtt) <= Duration::from_micros(31),
            "{told:?} of {rtt:?}"
        );
    }
    // Invented values give at most 2^15 s (about nine hours), or no round trip.
    for _ in 0..20_000 {
        let [now, lsr, dlsr] = [(); 3].map(|()| chance.draw() as u32);
        assert!(
            rtt_from_report(now, lsr, dlsr).is_none_or(|rtt| rtt <= Duration::from_secs(1 << 15))
        );
    }
    let epoch = Epoch::read();
    let stamp = ntp_middle(epoch.ntp(Time::from_millis(1_000)));
    assert_eq!(rtt_from_report(stamp, stamp, 0), Some(Duration::ZERO));
}

#[test]
fn what_may_be_resent_is_found_alike_wherever_sequence_numbers_begin() {
    let mut chance = Seeded::new(15);
    for _ in 0..200 {
        let frames: Vec<(u16, u16)> = (0..100)
            .map(|_| (1 + chance.below(30) as u16, chance.below(4) as u16))
            .collect();
        let asked: Vec<u16> = (0..300).map(|_| chance.below(3_000) as u16).collect();
        let found = |origin: u16| {
            let (mut ring, mut next) = (ResendRing::new(64), origin);
            for (number, (packets, hole)) in frames.iter().enumerate() {
                let first_seq = next.wrapping_add(*hole);
                ring.push(FrameRecord {
                    frame: number as u32,
                    first_seq,
                    packets: *packets,
                    ..FrameRecord::default()
                });
                next = first_seq.wrapping_add(*packets);
            }
            let find = |back: &u16| {
                ring.find(next.wrapping_sub(*back))
                    .map(|(record, packet)| (record.frame, packet))
            };
            asked.iter().map(find).collect::<Vec<_>>()
        };
        let plain = found(100);
        assert!(plain.iter().flatten().count() > 10);
        assert_eq!(found(65_535 - chance.below(2_000) as u16), plain);
    }
}

/// A 32-bit timestamp in units of 100 us wraps after five days.
#[test]
fn resends_keep_their_distance_over_five_days() {
    let mut limiter = ResendLimiter::new(Bitrate::from_bps(1_000_000_000), 1 << 20);
    let rtt = Duration::from_millis(30);
    let wrap = Duration::from_micros((1 << 32) * 100);
    for offset in [
        Duration::ZERO,
        wrap - Duration::from_millis(20),
        wrap - Duration::from_millis(1),
        wrap,
    ] {
        let at = Time::from_millis(1) + offset;
        let answers = [0, 20, 36, 60, 75]
            .map(|millis| limiter.allow(9, 100, at + Duration::from_millis(millis), rtt));
        let (yes, no) = (Resend::Allowed, Resend::TooSoon);
        assert_eq!(answers, [yes, no, yes, no, yes], "{offset:?}");
        limiter.allow(9 + 64, 100, at + Duration::from_millis(200), rtt);
    }
}
