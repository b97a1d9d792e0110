//! Sending side of one connection with transport-wide sequence numbers: what it sends, what the
//! server's feedback says about it, and, if the connection obeys the estimate, which layers its
//! path has bandwidth for.
//!
//! A layer consists of media that was generated before. Its bitrate cannot be lowered, so it is
//! sent completely or not at all. libwebrtc would first lower the highest layer's bitrate and drop
//! the layer at its minimum; here the layer is dropped as soon as its own bitrate does not fit. The
//! lowest layer that somebody watches is never held back, nor is a track with one layer, nor audio:
//! libwebrtc does not suspend video below its minimum bitrate either.

use std::time::Duration;

use super::LAYERS_MAX;
use crate::measure::Bandwidth;
use crate::transport::bandwidth::send::{Acknowledged, ProbePlan, SendEstimator};
use crate::transport::rtcp::Arrivals;
use crate::transport::sent::{PacketFate, SentKind, SentLog};
use crate::units::{Bitrate, Time};

/// Bandwidth at which a layer that was held back returns, as a percentage of its bitrate plus what
/// is sent (libwebrtc's hysteresis for cameras).
const RETURN_PERCENT: u64 = 120;

/// The sending side of one connection. It is made with the first track that has transport-wide
/// sequence numbers.
pub struct Sending {
    pub log: SentLog,
    clock: ReferenceClock,
    obedience: Option<Box<Obedience>>,
}

/// State that is kept if the estimate is obeyed.
struct Obedience {
    estimator: SendEstimator,
    probing: Option<Probing>,
    /// `limited`: less is sent than somebody watches, or more than the path carries.
    /// `counted_until`: time up to which that has been counted.
    limited: bool,
    counted_until: Time,
}

/// A probe in progress.
#[derive(Clone, Copy)]
struct Probing {
    plan: ProbePlan,
    sent: u32,
    next_at: Time,
}

impl Sending {
    pub fn new(obeys: bool, now: Time) -> Sending {
        let obedience = obeys.then(|| {
            Box::new(Obedience {
                estimator: SendEstimator::default(),
                probing: None,
                limited: false,
                counted_until: now,
            })
        });
        Sending {
            log: SentLog::default(),
            clock: ReferenceClock::default(),
            obedience,
        }
    }

    /// Returns the estimate of what the path carries, if the connection obeys one.
    pub fn estimate(&self) -> Option<Bitrate> {
        self.obedience
            .as_ref()
            .map(|obedience| obedience.estimator.estimate())
    }

    pub fn handle_remb(&mut self, bitrate: Bitrate) {
        if let Some(obedience) = &mut self.obedience {
            obedience.estimator.handle_remb(bitrate);
        }
    }

    /// Takes one feedback message. Returns false if it contradicts itself.
    pub fn handle_feedback(
        &mut self,
        body: &[u8],
        rtt: Option<Duration>,
        now: Time,
        counted: &mut Bandwidth,
    ) -> bool {
        let Some(arrivals) = Arrivals::new(body) else {
            return false;
        };
        let base = self.clock.base_us(arrivals.reference());
        let (mut packets, mut lost) = (0, 0);
        for (number, arrival) in arrivals {
            let Some(packet) = self.log.find(number.0) else {
                continue;
            };
            let before = packet.fate;
            packet.fate = if arrival.is_some() {
                PacketFate::Arrived
            } else {
                PacketFate::Missing
            };
            let is_media = u64::from(packet.kind == SentKind::Media);
            match (before, arrival) {
                // A packet reported as missing may only have been overtaken. A packet that arrived
                // cannot become lost.
                (PacketFate::Arrived, _) => packet.fate = PacketFate::Arrived,
                (PacketFate::Missing, None) => {}
                (PacketFate::Unknown, None) => {
                    (packets, lost) = (packets + 1, lost + 1);
                    counted.uplink_packets_missing += is_media;
                }
                (PacketFate::Unknown | PacketFate::Missing, Some(at)) => {
                    packets += u32::from(before == PacketFate::Unknown);
                    if before == PacketFate::Missing {
                        counted.uplink_packets_missing =
                            counted.uplink_packets_missing.wrapping_sub(is_media);
                    }
                    if let Some(obedience) = &mut self.obedience {
                        obedience.estimator.handle_acknowledged(&Acknowledged {
                            sent_at: packet.sent_at,
                            arrival: Time::from_micros((base + at).unsigned_abs()),
                            bytes: packet.bytes.into(),
                            cluster: match packet.kind {
                                SentKind::Probe { cluster } => cluster,
                                SentKind::Media | SentKind::Resend => 0,
                            },
                        });
                    }
                }
            }
        }
        if let Some(obedience) = self.obedience.as_mut().filter(|_| packets > 0) {
            rtt.into_iter()
                .for_each(|rtt| obedience.estimator.set_rtt(rtt));
            obedience.estimator.handle_feedback(packets, lost, now);
        }
        true
    }

    /// Begins a probe if one is needed to find bandwidth for `wants`.
    pub fn plan_probe(&mut self, wants: Bitrate, now: Time, counted: &mut Bandwidth) {
        let Some(obedience) = self
            .obedience
            .as_mut()
            .filter(|obedience| obedience.probing.is_none())
        else {
            return;
        };
        if let Some(plan) = obedience.estimator.poll_probe(wants, now) {
            counted.probes_sent += 1;
            obedience.probing = Some(Probing {
                plan,
                sent: 0,
                next_at: now,
            });
        }
    }

    /// Returns the time at which the next probe packet is due.
    pub fn probe_at(&self) -> Time {
        let probing = self
            .obedience
            .as_ref()
            .and_then(|obedience| obedience.probing);
        probing.map_or(Time::MAX, |probing| probing.next_at)
    }

    /// Returns the cluster of the probe if a packet of it is due.
    pub fn due_probe(&self, now: Time) -> Option<u8> {
        let probing = self.obedience.as_ref()?.probing?;
        (probing.next_at <= now).then_some(probing.plan.cluster)
    }

    /// Notes that a packet of the probe was sent. `None` means that none could be sent: the probe
    /// is then over.
    pub fn handle_probe_sent(&mut self, bytes: Option<usize>) {
        let Some(obedience) = &mut self.obedience else {
            return;
        };
        obedience.probing = obedience.probing.and_then(|probing| {
            let bits = bytes? as u64 * 8;
            let pause =
                Duration::from_nanos(bits * 1_000_000_000 / probing.plan.bitrate.bps().max(1));
            let next = Probing {
                sent: probing.sent + 1,
                next_at: probing.next_at + pause,
                ..probing
            };
            (next.sent < next.plan.packets).then_some(next)
        });
    }

    /// Counts how long less was sent than is watched, up to now, and sets whether that goes on.
    pub fn count_limited(&mut self, limited: bool, now: Time, counted: &mut Bandwidth) {
        let Some(obedience) = &mut self.obedience else {
            return;
        };
        let elapsed = now.since(obedience.counted_until).as_millis() as u64;
        obedience.counted_until += Duration::from_millis(elapsed);
        counted.layer_limited_ms += if obedience.limited { elapsed } else { 0 };
        obedience.limited = limited;
    }

    pub fn is_limited(&self) -> bool {
        self.obedience
            .as_ref()
            .is_some_and(|obedience| obedience.limited)
    }
}

/// The receiver's clock, with the wrap of its reference time removed and an arbitrary start: only
/// differences count.
#[derive(Default)]
struct ReferenceClock {
    last: Option<(u32, i64)>,
}

impl ReferenceClock {
    const CYCLE: i64 = 1 << 24;
    const UNIT_US: i64 = 64_000;
    /// Range of the clock. The times of a message lie less than a day from its reference. A
    /// receiver that drives the clock to either end of this year starts over.
    const BEGIN_US: i64 = 86_400_000_000;
    const END_US: i64 = 365 * ReferenceClock::BEGIN_US;

    /// Returns the base of a message's times, in microseconds.
    fn base_us(&mut self, reference: u32) -> i64 {
        let (before, base) = self.last.unwrap_or((reference, ReferenceClock::BEGIN_US));
        let ahead = (i64::from(reference) - i64::from(before)).rem_euclid(ReferenceClock::CYCLE);
        let step = if ahead < ReferenceClock::CYCLE / 2 {
            ahead
        } else {
            ahead - ReferenceClock::CYCLE
        };
        let base = base + step * ReferenceClock::UNIT_US;
        let is_usual = (ReferenceClock::BEGIN_US..ReferenceClock::END_US).contains(&base);
        let base = if is_usual {
            base
        } else {
            ReferenceClock::BEGIN_US
        };
        self.last = Some((reference, base));
        base
    }
}

/// One layer of a simulcast track. Layers are listed from the lowest up.
#[derive(Clone, Copy, Debug)]
pub struct LayerState {
    pub bps: u64,
    /// Whether somebody watches it and it is not muted.
    pub wanted: bool,
    pub held_back: bool,
}

/// Returns which layers are held back. `budget_bps` is what the path carries besides everything
/// else.
pub fn layers_to_hold_back(layers: &[LayerState], budget_bps: u64) -> [bool; LAYERS_MAX] {
    let mut hold_back = [false; LAYERS_MAX];
    let (mut sum, mut is_lowest, mut full) = (0, true, false);
    for (layer, hold_back) in layers.iter().zip(&mut hold_back) {
        let with_it = sum + layer.bps;
        let needed = if layer.held_back {
            with_it * RETURN_PERCENT / 100
        } else {
            with_it
        };
        full = full || (!is_lowest && needed > budget_bps);
        *hold_back = full;
        if layer.wanted && !full {
            sum = with_it;
            is_lowest = false;
        }
    }
    hold_back
}

/// Returns the bitrate that a connection needs: everything that is wanted, and the extra that a
/// layer needs to return.
pub fn wanted_bps(others_bps: u64, layers: &[LayerState]) -> u64 {
    let wanted: u64 = layers
        .iter()
        .filter(|layer| layer.wanted)
        .map(|layer| layer.bps)
        .sum();
    others_bps + wanted * RETURN_PERCENT / 100
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::rtcp::{RtcpPacket, RtcpWriter, packets};
    use crate::transport::rtp::Ssrc;
    use crate::transport::sent::SentPacket;
    use crate::transport::sequence::Seq;

    fn layers(held_back: [bool; 3]) -> [LayerState; 3] {
        [150_000, 500_000, 1_700_000]
            .map(|bps| bps)
            .iter()
            .zip(held_back)
            .map(|(bps, held_back)| LayerState {
                bps: *bps,
                wanted: true,
                held_back,
            })
            .collect::<Vec<_>>()
            .try_into()
            .unwrap()
    }

    #[test]
    fn the_highest_layer_goes_first_and_the_lowest_never() {
        for (budget, expected) in [
            (2_350_000, [false, false, false]),
            (2_349_999, [false, false, true]),
            (650_000, [false, false, true]),
            (649_999, [false, true, true]),
            (10_000, [false, true, true]),
        ] {
            assert_eq!(
                layers_to_hold_back(&layers([false; 3]), budget),
                expected,
                "{budget}"
            );
        }
    }

    #[test]
    fn what_was_held_back_needs_a_fifth_more_room_to_return() {
        let held = layers([false, true, true]);
        for (budget, expected) in [
            (779_999, [false, true, true]),
            (780_000, [false, false, true]),
            (2_819_999, [false, false, true]),
            (2_820_000, [false, false, false]),
        ] {
            assert_eq!(layers_to_hold_back(&held, budget), expected, "{budget}");
        }
        assert_eq!(wanted_bps(24_000, &held), 24_000 + 2_820_000);
    }

    #[test]
    fn what_nobody_watches_takes_no_room_and_the_lowest_that_is_watched_stays() {
        let mut layers = layers([false; 3]);
        layers[0].wanted = false;
        assert_eq!(layers_to_hold_back(&layers, 10_000), [false, false, true]);
        assert_eq!(
            layers_to_hold_back(&layers, 2_200_000),
            [false, false, false]
        );
    }

    /// Returns a feedback message about the numbers from 1 on: which of them arrived.
    fn feedback(came: &[bool]) -> Vec<u8> {
        let arrivals: Vec<_> = (1..)
            .zip(came)
            .map(|(n, came)| came.then(|| Time::from_millis(1_000 + 10 * n)))
            .collect();
        let mut buffer = [0; 1_200];
        let mut writer = RtcpWriter::new(&mut buffer);
        writer
            .transport_cc(Ssrc(1), Ssrc(2), Seq(1), 0, arrivals.iter().copied())
            .unwrap();
        let len = writer.len();
        match packets(&buffer[..len]).next() {
            Some(Ok(RtcpPacket::TransportCc { body, .. })) => body.to_vec(),
            other => panic!("{other:?}"),
        }
    }

    fn sending(obeys: bool, count: u64) -> Sending {
        let mut sending = Sending::new(obeys, Time::ZERO);
        for n in 0..count {
            let kind = if n % 5 == 4 {
                SentKind::Resend
            } else {
                SentKind::Media
            };
            sending.log.push(SentPacket::new(
                Time::from_millis(n * 10),
                0,
                n as u16,
                1_000,
                kind,
            ));
        }
        sending
    }

    #[test]
    fn packets_that_are_missing_are_counted_until_they_are_said_to_have_come() {
        let (mut sending, mut counted) = (sending(false, 10), Bandwidth::default());
        assert!(sending.handle_feedback(
            &feedback(&[
                true, false, false, true, false, true, true, true, true, false
            ]),
            None,
            Time::ZERO,
            &mut counted
        ));
        assert_eq!(counted.uplink_packets_missing, 2, "resends are not counted");
        assert!(sending.handle_feedback(
            &feedback(&[false, true, false]),
            None,
            Time::ZERO,
            &mut counted
        ));
        assert_eq!(
            counted.uplink_packets_missing, 1,
            "one was overtaken, and one that came cannot be lost"
        );
        assert!(sending.handle_feedback(&feedback(&[true; 300]), None, Time::ZERO, &mut counted));
        assert_eq!(
            (counted.uplink_packets_missing, sending.estimate()),
            (0, None)
        );
        assert!(!sending.handle_feedback(
            &[0, 1, 0xFF, 0xFF, 0, 0, 0, 0],
            None,
            Time::ZERO,
            &mut counted
        ));
    }

    #[test]
    fn the_receivers_clock_wraps_and_lies_and_stays_in_bounds() {
        let mut clock = ReferenceClock::default();
        let first = clock.base_us(0xFF_FFFE);
        assert_eq!(clock.base_us(2) - first, 4 * 64_000, "over the wrap");
        assert_eq!(clock.base_us(1) - first, 3 * 64_000);
        let mut random = crate::seeded::Seeded::new(3);
        for round in 0..200_000u32 {
            let reference = if round % 2 == 0 {
                random.draw() as u32 >> 8
            } else {
                round.wrapping_mul(0x7F_FFFF) & 0xFF_FFFF
            };
            let base = clock.base_us(reference);
            assert!((ReferenceClock::BEGIN_US..ReferenceClock::END_US).contains(&base));
        }
    }

    #[test]
    fn time_is_counted_while_less_is_sent_than_wanted() {
        let (mut sending, mut counted) = (sending(true, 0), Bandwidth::default());
        for (ms, limited) in [
            (100, true),
            (350, true),
            (600, false),
            (900, true),
            (1_000, true),
        ] {
            sending.count_limited(limited, Time::from_millis(ms), &mut counted);
        }
        assert_eq!(counted.layer_limited_ms, 250 + 250 + 100);
    }
}
