//! Statistics of one received RTP stream (one SSRC): arrivals, losses, NACKs, and the numbers of a
//! receiver report.
//!
//! Takes and returns plain numbers; parsing and sealing are elsewhere. Nothing here allocates. The
//! state is flat and bounded: a window of the last [`WINDOW`] sequence numbers with two bits each,
//! and a short list of loss batches that carries the NACK timing, which is libwebrtc's.

use std::mem;
use std::time::Duration;

use super::rtcp::dlsr_units;
use crate::net;
use crate::units::{Time, ntp_middle};

/// Window in packets. For packets further behind the newest, a late one cannot be distinguished
/// from a duplicate.
pub const WINDOW: u64 = 1024;

/// Maximum number of packets that are missing at a time, as in libwebrtc (`kMaxNackPackets`).
/// Beyond it all are given up, and a key frame is needed. [`ReceiveStream::poll_nack`] needs a
/// buffer of this size.
pub const MISSING_MAX: usize = 1_000;

/// Number of sequence numbers that fit into one NACK of 1,200 bytes, however far apart they are.
pub const NACK_SEQS_MAX: usize = 256;

/// Limit of a jump ahead (RFC 3550, A.1). A jump of this size or more is a restart of the sender
/// and not a loss, once a second packet confirms it.
const MAX_DROPOUT: u16 = 3000;

/// Maximum distance by which the start of the stream moves back, because a packet from before the
/// first received one may still arrive out of order.
const EARLY_MAX: u64 = 64;

/// Maximum number of loss batches at a time. In heavy loss neighbouring gaps share a batch, so this
/// covers a larger number of gaps.
const BATCHES_MAX: usize = 20;

/// Gaps found within this time of each other share a batch. If more than half of the batches are in
/// use, the time is [`REPEAT_GRID`]; if all are, the two oldest batches are merged. This bounds the
/// error of [`Arrival::Repaired`]'s time, and of the time of repeated requests. The first request
/// is never late.
const BATCH_SPREAD: Duration = Duration::from_millis(1);

/// Maximum number of requests for one packet, as in libwebrtc until 2025 (`kMaxNackRetries`). Then
/// libwebrtc raised it to 100, which the age limit below leaves no room for at any usual RTT.
const TRIES_MAX: u8 = 10;

/// Age after which a missing packet is given up. It is of no use to a live picture then, and a key
/// frame is the better cure. libwebrtc has no age limit. Instead it forgets packets before a frame
/// that it could decode, and asks for a key frame if it had none to decode for long.
const AGE_MAX: Duration = Duration::from_secs(1);

/// Interval at which libwebrtc checks whether to request packets again.
const REPEAT_GRID: Duration = Duration::from_millis(20);

/// Limit of a step between the RTP clock and the arrival clock. A larger step is a new timestamp
/// origin, not jitter.
const JITTER_STEP_MAX_SECONDS: u32 = 5;

/// Unwrapped number of sequence number 0 in the first cycle. It is above zero, so that an early
/// packet never underflows.
const FIRST_CYCLE: u64 = 1 << 16;

/// Classification of a received packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// Newer than all before; `gap` packets before it were newly found missing.
    New { gap: u16 },
    /// An original packet that came late.
    Reordered,
    /// A retransmission that filled a hole. `loss_to_repair` counts from the time when the hole was
    /// found. It is `None` if the packet was not, or no longer, waited for.
    Repaired { loss_to_repair: Option<Duration> },
    /// The payload was received before.
    Duplicate,
    /// Outside of the window, or part of a jump that no second packet has confirmed. It must not be
    /// delivered.
    TooOld,
}

/// Result of [`ReceiveStream::poll_nack`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NackPoll {
    /// Number of sequence numbers written.
    pub count: usize,
    /// Number of packets given up since the last poll: too old, requested too often, or too many at
    /// a time.
    pub gave_up: u32,
}

/// Numbers of a report block (RFC 3550, section 6.4.1), without the SSRC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReportNumbers {
    pub fraction_lost: u8,
    pub cumulative_lost: i32,
    pub extended_highest_seq: u32,
    /// Jitter in units of the RTP clock.
    pub jitter: u32,
    pub lsr: u32,
    /// Delay since the last sender report, in units of 1/65,536 s.
    pub dlsr: u32,
}

/// Cumulative counts in packets. `expected = received + lost_network` and `lost_network = repaired
/// + lost`, always.
///
/// `lost_network` and `lost` include packets that are still on their way; at the end of a run they
/// are exact. `repaired` decreases by one if the original of a repaired packet arrives after all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReceiveCounts {
    /// Number of sequence numbers from the lowest to the highest received.
    pub expected: u64,
    /// Number of originals, with reordered ones and without duplicates.
    pub received: u64,
    pub reordered: u64,
    pub repaired: u64,
    pub duplicate: u64,
    pub too_old: u64,
    /// Number of packets that never arrived as an original.
    pub lost_network: u64,
    /// Number of packets that never arrived at all.
    pub lost: u64,
}

impl ReceiveCounts {
    /// Adds the counts of another stream.
    pub fn add(&mut self, others: &ReceiveCounts) {
        self.expected += others.expected;
        self.received += others.received;
        self.reordered += others.reordered;
        self.repaired += others.repaired;
        self.duplicate += others.duplicate;
        self.too_old += others.too_old;
        self.lost_network += others.lost_network;
        self.lost += others.lost;
    }
}

/// Packets found missing at one time and requested together: those of `first..first + len` that are
/// missing by the window's bits.
#[derive(Clone, Copy, Default)]
struct NackBatch {
    /// Time when they were found missing, in microseconds of the run modulo 2^32.
    noticed: u32,
    /// Time of the last request, in microseconds after `noticed`. Meaningless before the first.
    asked_after: u32,
    /// Low half of the unwrapped number. The window is short enough to restore the rest.
    first: u16,
    len: u16,
    missing: u16,
    tries: u8,
    /// Whether some of its packets have not been requested at all.
    fresh: bool,
}

impl NackBatch {
    fn age(&self, now: Time) -> Duration {
        Duration::from_micros(u64::from(micros(now).wrapping_sub(self.noticed)))
    }

    fn asked_at(&self, now: Time) -> Time {
        now - self.age(now) + Duration::from_micros(self.asked_after.into())
    }
}

/// When missing packets are requested, as libwebrtc does it for each kind of media.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NackRule {
    /// At once, and again after a round trip.
    #[default]
    Video,
    /// At once, and again after one and a half round trips plus 5 ms.
    Audio,
    /// Never, because NACK was not negotiated.
    Never,
}

impl NackRule {
    fn repeat_after(self, rtt: Duration) -> Duration {
        match self {
            NackRule::Video | NackRule::Never => rtt,
            NackRule::Audio => rtt * 3 / 2 + Duration::from_millis(5),
        }
    }
}

/// Round trip to the sender.
#[derive(Clone, Copy, Debug)]
pub struct RoundTrip {
    /// Last measured round trip, or the assumed one before the first measurement.
    pub last: Duration,
    /// Shortest measured round trip.
    pub least: Option<Duration>,
}

/// State of a missing packet when it arrives.
#[derive(Clone, Copy)]
struct MissingPacket {
    /// Time since it was found missing.
    age: Duration,
    /// Whether it was requested so recently that it cannot be the answer.
    is_too_young_for_a_resend: bool,
}

/// Statistics of one received SSRC.
///
/// Fields are ordered by how often packets need them. A packet in sequence touches
/// [`ReceiveStream::HEAD_BYTES`] and one word of the window. With thousands of streams, every cache
/// line that it does not touch counts.
#[repr(C)]
pub struct ReceiveStream {
    /// Unwrapped number of the newest packet; 0 before the first.
    highest: u64,
    /// Unwrapped number of the oldest packet since the sender's last restart.
    base: u64,
    last_ext_seq: u64,
    next_nack_at: Time,
    clock_rate: u32,
    transit: u32,
    last_rtp_time: u32,
    /// Jitter, scaled by 16.
    jitter: u32,
    received: u32,
    /// Sequence number that would confirm a jump.
    confirms_jump: Option<u16>,
    missing: u16,
    batches_len: u8,
    rtx: bool,
    nack: NackRule,
    window: [SeenBlock; WINDOW as usize / 64],

    /// Phase of this stream's checks within [`REPEAT_GRID`], in microseconds.
    grid_phase: u16,
    /// Shortest round trip, in microseconds; 0 while none is known.
    rtt_least: u32,
    gave_up: u32,
    reordered: u32,
    repaired: u32,
    duplicate: u32,
    too_old: u32,
    lsr: u32,
    sender_report_at: Time,
    expected_before_restart: u64,
    expected_prior: u64,
    received_prior: u32,
    /// Loss batches, oldest first.
    batches: [NackBatch; BATCHES_MAX],
}

/// State of 64 packets, two bits each, `(filled, flagged)`: 00 missing; 01 missing and requested;
/// 10 arrived as an original; 11 filled by a retransmission.
#[derive(Clone, Copy, Default)]
struct SeenBlock {
    filled: u64,
    flagged: u64,
}

impl ReceiveStream {
    /// Size of the fields at the start that every packet needs.
    pub const HEAD_BYTES: usize = std::mem::offset_of!(ReceiveStream, window);

    /// Prefetches what the next packet needs beyond the head. The head must be in the cache by
    /// then.
    pub fn prefetch_next(&self) {
        let (word, _) = place(self.highest + 1);
        net::prefetch(&self.window[word], usize::MAX);
    }

    /// Creates the state. `clock_rate` is the payload's RTP clock in Hz, above zero.
    pub fn new(clock_rate: u32) -> ReceiveStream {
        assert!(clock_rate > 0, "an RTP clock has a rate");
        ReceiveStream {
            highest: 0,
            base: 0,
            last_ext_seq: 0,
            next_nack_at: Time::MAX,
            sender_report_at: Time::ZERO,
            window: [SeenBlock::default(); WINDOW as usize / 64],
            batches: [NackBatch::default(); BATCHES_MAX],
            batches_len: 0,
            rtx: false,
            nack: NackRule::Video,
            grid_phase: 0,
            rtt_least: 0,
            confirms_jump: None,
            missing: 0,
            gave_up: 0,
            clock_rate,
            transit: 0,
            last_rtp_time: 0,
            jitter: 0,
            lsr: 0,
            expected_before_restart: 0,
            received: 0,
            reordered: 0,
            repaired: 0,
            duplicate: 0,
            too_old: 0,
            expected_prior: 0,
            received_prior: 0,
        }
    }

    /// Sets whether retransmissions come over RTX (RFC 4588), so that every packet on the stream's
    /// own SSRC is an original. This is assumed from the first RTX packet on.
    ///
    /// Without RTX a requested packet counts as repaired when it comes, unless it comes sooner than
    /// any answer could: within half of the shortest round trip. Whether it was the original after
    /// all cannot be told.
    pub fn set_rtx(&mut self, negotiated: bool) {
        self.rtx = negotiated;
    }

    pub fn set_nack(&mut self, rule: NackRule) {
        self.nack = rule;
    }

    /// Takes one packet, even one of padding only. `retransmitted` means that it came over RTX and
    /// `seq` is its original number.
    pub fn handle_packet(
        &mut self,
        seq: u16,
        rtp_time: u32,
        now: Time,
        retransmitted: bool,
    ) -> Arrival {
        self.rtx |= retransmitted;
        if !self.has_started() {
            // Without an original there is no base to count losses from.
            if retransmitted {
                return self.reject();
            }
            return self.start(FIRST_CYCLE + u64::from(seq), rtp_time, now);
        }
        let ahead = seq.wrapping_sub(self.highest as u16);
        let behind = u64::from(ahead.wrapping_neg());
        if behind < WINDOW {
            self.handle_behind(self.highest - behind, now, retransmitted)
        } else if ahead < MAX_DROPOUT {
            self.handle_ahead(u64::from(ahead), rtp_time, now, retransmitted)
        } else {
            self.handle_jump(seq, rtp_time, now, retransmitted)
        }
    }

    /// Returns the unwrapped sequence number of the packet handled last. It never wraps, and never
    /// repeats across a sender's restart. Meaningless after [`Arrival::TooOld`].
    pub fn ext_seq(&self) -> u64 {
        self.last_ext_seq
    }

    /// Writes the sequence numbers to request now, oldest first, and returns the number of packets
    /// given up (a video receiver then needs a key frame).
    ///
    /// A gap is requested at once, even if the packet is only reordered. libwebrtc does the same,
    /// because its reordering statistics are never fed. Packets are requested again by the
    /// [`NackRule`], which libwebrtc checks every 20 ms; at most 10 times, within 1 s. `out` must
    /// hold at least [`MISSING_MAX`] numbers.
    pub fn poll_nack(&mut self, now: Time, rtt: RoundTrip, out: &mut [u16]) -> NackPoll {
        assert!(
            out.len() >= MISSING_MAX,
            "the buffer holds whatever may be missing"
        );
        self.rtt_least = rtt.least.map_or(0, |least| micros(Time::ZERO + least));
        let mut count = 0;
        if now >= self.next_nack_at {
            let mut at = 0;
            while at < usize::from(self.batches_len) {
                let batch = self.batches[at];
                let again = batch.tries > 0 && now >= self.repeat_at(&batch, now, rtt.last);
                if batch.age(now) >= AGE_MAX || (again && batch.tries >= TRIES_MAX) {
                    self.give_up_batch(at);
                    continue;
                }
                if again || batch.fresh {
                    count += self.write_missing(at, again, &mut out[count..]);
                    let batch = &mut self.batches[at];
                    batch.fresh = false;
                    if again || batch.tries == 0 {
                        batch.tries += 1;
                        batch.asked_after = batch.age(now).as_micros() as u32;
                    }
                }
                at += 1;
            }
            self.next_nack_at = self.earliest_due(now, rtt.last);
        }
        NackPoll {
            count,
            gave_up: mem::take(&mut self.gave_up),
        }
    }

    /// Returns when to poll; [`Time::MAX`] while nothing is missing. It may be earlier than needed,
    /// never later.
    pub fn next_nack_at(&self) -> Time {
        self.next_nack_at
    }

    /// Takes the NTP timestamp of a sender report about this stream.
    pub fn handle_sender_report(&mut self, ntp: u64, now: Time) {
        self.lsr = ntp_middle(ntp);
        self.sender_report_at = now;
    }

    /// Returns the numbers of a report block; `None` before the first packet. The fraction covers
    /// the time since the previous call (RFC 3550, A.3).
    ///
    /// Loss counts originals only: neither retransmissions nor duplicates reduce it.
    pub fn report_block(&mut self, now: Time) -> Option<ReportNumbers> {
        if !self.has_started() {
            return None;
        }
        let expected = self.expected();
        let expected_interval = expected - self.expected_prior;
        let received_interval = u64::from(self.received.wrapping_sub(self.received_prior));
        self.expected_prior = expected;
        self.received_prior = self.received;
        let lost_interval = expected_interval.saturating_sub(received_interval);
        let fraction_lost = (lost_interval << 8)
            .checked_div(expected_interval)
            .unwrap_or(0)
            .min(255) as u8;
        let lost = expected - u64::from(self.received);
        Some(ReportNumbers {
            fraction_lost,
            cumulative_lost: lost.min(0x7F_FFFF) as i32,
            extended_highest_seq: (self.highest - FIRST_CYCLE) as u32,
            jitter: self.jitter >> 4,
            lsr: self.lsr,
            dlsr: if self.lsr == 0 {
                0
            } else {
                dlsr_units(now.since(self.sender_report_at))
            },
        })
    }

    /// Returns the interarrival jitter (RFC 3550, A.8) of originals in order, one packet per
    /// timestamp, as libwebrtc and LiveKit measure it.
    pub fn jitter(&self) -> Duration {
        Duration::from_nanos(
            u64::from(self.jitter) * 1_000_000_000 / 16 / u64::from(self.clock_rate),
        )
    }

    pub fn counts(&self) -> ReceiveCounts {
        let expected = self.expected();
        let lost_network = expected - u64::from(self.received);
        ReceiveCounts {
            expected,
            received: self.received.into(),
            reordered: self.reordered.into(),
            repaired: self.repaired.into(),
            duplicate: self.duplicate.into(),
            too_old: self.too_old.into(),
            lost_network,
            lost: lost_network - u64::from(self.repaired),
        }
    }

    /// Returns whether the window still covers this packet and all after it. `ext_seq` is
    /// unwrapped.
    pub fn remembers(&self, ext_seq: u64) -> bool {
        ext_seq >= self.base && self.highest < ext_seq + WINDOW
    }

    /// Returns whether this packet is missing so far, between others that arrived: neither the
    /// original nor a retransmission is here. `ext_seq` is unwrapped.
    pub fn is_missing(&self, ext_seq: u64) -> bool {
        ext_seq < self.highest && self.remembers(ext_seq) && !self.state(ext_seq).0
    }

    /// Returns how many packets after `before` and ahead of `after`, both unwrapped, did not arrive
    /// as originals: they are missing, or only a retransmission came. `None` if it is not known any
    /// more.
    pub fn holes_between(&self, before: u64, after: u64) -> Option<u64> {
        let is_hole = |ext: &u64| self.state(*ext) != (true, false);
        self.remembers(before)
            .then(|| (before + 1..after).filter(is_hole).count() as u64)
    }

    fn has_started(&self) -> bool {
        self.highest != 0
    }

    fn expected(&self) -> u64 {
        let since_restart = if self.has_started() {
            self.highest - self.base + 1
        } else {
            0
        };
        self.expected_before_restart + since_restart
    }

    fn start(&mut self, ext: u64, rtp_time: u32, now: Time) -> Arrival {
        self.base = ext;
        self.highest = ext;
        self.last_ext_seq = ext;
        self.grid_phase = (now.as_micros() % REPEAT_GRID.as_micros() as u64) as u16;
        self.window = [SeenBlock::default(); WINDOW as usize / 64];
        self.set_state(ext, true, false);
        self.received += 1;
        self.transit = self.transit_of(rtp_time, now);
        self.last_rtp_time = rtp_time;
        Arrival::New { gap: 0 }
    }

    fn reject(&mut self) -> Arrival {
        self.too_old += 1;
        Arrival::TooOld
    }

    fn handle_ahead(
        &mut self,
        ahead: u64,
        rtp_time: u32,
        now: Time,
        retransmitted: bool,
    ) -> Arrival {
        let gap = ahead - 1;
        self.advance(ahead);
        self.confirms_jump = None;
        if gap > 0 {
            self.note_missing(gap, now);
        }
        self.last_ext_seq = self.highest;
        self.set_state(self.highest, true, retransmitted);
        if retransmitted {
            self.repaired += 1;
            return Arrival::Repaired {
                loss_to_repair: None,
            };
        }
        self.received += 1;
        self.update_jitter(rtp_time, now);
        Arrival::New { gap: gap as u16 }
    }

    fn handle_behind(&mut self, ext: u64, now: Time, retransmitted: bool) -> Arrival {
        if ext < self.base {
            if retransmitted || self.expected_before_restart > 0 || self.base - ext > EARLY_MAX {
                return self.reject();
            }
            self.base = ext;
        }
        self.last_ext_seq = ext;
        let (filled, flagged) = self.state(ext);
        if filled {
            self.handle_known(ext, flagged && self.rtx && !retransmitted)
        } else {
            let hole = self.settle(ext, now);
            let too_soon = hole.is_some_and(|hole| hole.is_too_young_for_a_resend);
            let repaired = retransmitted || (flagged && !self.rtx && !too_soon);
            self.set_state(ext, true, repaired);
            if repaired {
                self.repaired += 1;
                return Arrival::Repaired {
                    loss_to_repair: hole.map(|hole| hole.age),
                };
            }
            self.received += 1;
            self.reordered += 1;
            Arrival::Reordered
        }
    }

    /// Takes a second copy of a packet. If it is the original of a packet that a retransmission
    /// filled, the network did not lose it and the retransmission was superfluous.
    fn handle_known(&mut self, ext: u64, original_after_repair: bool) -> Arrival {
        if original_after_repair {
            self.set_state(ext, true, false);
            self.repaired -= 1;
            self.received += 1;
            self.reordered += 1;
        }
        self.duplicate += 1;
        Arrival::Duplicate
    }

    /// Takes a packet far ahead (RFC 3550, A.1). Two packets in sequence make a jump a restart; a
    /// single one is a stray.
    fn handle_jump(&mut self, seq: u16, rtp_time: u32, now: Time, retransmitted: bool) -> Arrival {
        if retransmitted {
            return self.reject();
        }
        if self.confirms_jump != Some(seq) {
            self.confirms_jump = Some(seq.wrapping_add(1));
            return self.reject();
        }
        self.confirms_jump = None;
        self.expected_before_restart = self.expected();
        while self.batches_len > 0 {
            self.give_up_batch(0);
        }
        if self.gave_up > 0 {
            self.next_nack_at = now;
        }
        let next_cycle = (self.highest >> 16) + 1;
        self.start((next_cycle << 16) | u64::from(seq), rtp_time, now)
    }

    /// Moves the window on, and gives up what falls out of it.
    fn advance(&mut self, ahead: u64) {
        if ahead >= WINDOW {
            self.window = [SeenBlock::default(); WINDOW as usize / 64];
        } else {
            for ext in self.highest + 1..=self.highest + ahead {
                self.set_state(ext, false, false);
            }
        }
        while self.batches_len > 0 && self.highest - self.first_of(0) + ahead >= WINDOW {
            self.give_up_batch(0);
        }
        self.highest += ahead;
    }

    fn state(&self, ext: u64) -> (bool, bool) {
        let (word, bit) = place(ext);
        let seen = self.window[word];
        (seen.filled & bit != 0, seen.flagged & bit != 0)
    }

    fn set_state(&mut self, ext: u64, filled: bool, flagged: bool) {
        let (word, bit) = place(ext);
        let seen = &mut self.window[word];
        seen.filled = if filled {
            seen.filled | bit
        } else {
            seen.filled & !bit
        };
        seen.flagged = if flagged {
            seen.flagged | bit
        } else {
            seen.flagged & !bit
        };
    }

    /// Returns the unwrapped number of a batch's first packet.
    fn first_of(&self, at: usize) -> u64 {
        self.highest - u64::from((self.highest as u16).wrapping_sub(self.batches[at].first))
    }

    /// Notes that the `gap` packets before the newest are missing. If that makes too many, all are
    /// given up.
    fn note_missing(&mut self, gap: u64, now: Time) {
        self.next_nack_at = self.next_nack_at.min(now);
        if self.nack == NackRule::Never || u64::from(self.missing) + gap > MISSING_MAX as u64 {
            self.gave_up += gap as u32;
            while self.batches_len > 0 {
                self.give_up_batch(0);
            }
            return;
        }
        if !self.extend_last_batch(gap, now) {
            if usize::from(self.batches_len) == BATCHES_MAX {
                self.join_oldest_batches();
            }
            self.batches[usize::from(self.batches_len)] = NackBatch {
                noticed: micros(now),
                asked_after: 0,
                first: (self.highest - gap) as u16,
                len: gap as u16,
                missing: gap as u16,
                tries: 0,
                fresh: true,
            };
            self.batches_len += 1;
        }
        self.missing += gap as u16;
    }

    /// Adds the `gap` packets before the newest to the last batch, if that is young enough. The
    /// batch then covers all packets up to the newest.
    fn extend_last_batch(&mut self, gap: u64, now: Time) -> bool {
        let Some(last) = usize::from(self.batches_len).checked_sub(1) else {
            return false;
        };
        let first = self.first_of(last);
        let highest = self.highest;
        let spread = if last >= BATCHES_MAX / 2 {
            REPEAT_GRID
        } else {
            BATCH_SPREAD
        };
        let batch = &mut self.batches[last];
        if batch.age(now) > spread || batch.tries > 1 {
            return false;
        }
        batch.fresh = true;
        batch.len = (highest - first) as u16;
        batch.missing += gap as u16;
        true
    }

    /// Merges the two oldest batches. The older one takes over the request count and time of the
    /// younger. So batches are still given up in their order, and nothing between two of them has
    /// been given up.
    fn join_oldest_batches(&mut self) {
        let [older, younger, ..] = self.batches;
        self.batches[1] = NackBatch {
            noticed: older.noticed,
            asked_after: younger.noticed.wrapping_sub(older.noticed) + younger.asked_after,
            first: older.first,
            len: younger.first.wrapping_sub(older.first) + younger.len,
            missing: older.missing + younger.missing,
            tries: younger.tries,
            fresh: older.fresh || younger.fresh,
        };
        self.batches
            .copy_within(1..usize::from(self.batches_len), 0);
        self.batches_len -= 1;
    }

    /// Removes an arrived packet from its batch.
    fn settle(&mut self, ext: u64, now: Time) -> Option<MissingPacket> {
        let at = (0..usize::from(self.batches_len)).find(|&at| {
            let first = self.first_of(at);
            (first..first + u64::from(self.batches[at].len)).contains(&ext)
        })?;
        let batch = self.batches[at];
        let since_asked = micros(now)
            .wrapping_sub(batch.noticed)
            .wrapping_sub(batch.asked_after);
        self.batches[at].missing -= 1;
        self.missing -= 1;
        if self.batches[at].missing == 0 {
            self.remove_batch(at);
        }
        Some(MissingPacket {
            age: batch.age(now),
            is_too_young_for_a_resend: batch.tries == 1 && since_asked < self.rtt_least / 2,
        })
    }

    fn give_up_batch(&mut self, at: usize) {
        let missing = self.batches[at].missing;
        self.missing -= missing;
        self.gave_up += u32::from(missing);
        self.remove_batch(at);
    }

    fn remove_batch(&mut self, at: usize) {
        let len = usize::from(self.batches_len);
        self.batches.copy_within(at + 1..len, at);
        self.batches_len -= 1;
        if self.batches_len == 0 && self.gave_up == 0 {
            self.next_nack_at = Time::MAX;
        }
    }

    /// Writes the packets that a batch still misses and marks them as requested. With `again`,
    /// packets that were requested before are included.
    fn write_missing(&mut self, at: usize, again: bool, out: &mut [u16]) -> usize {
        let first = self.first_of(at);
        let mut slots = out.iter_mut();
        let mut count = 0;
        for ext in first..first + u64::from(self.batches[at].len) {
            let (filled, asked) = self.state(ext);
            if filled || (asked && !again) {
                continue;
            }
            let Some(slot) = slots.next() else { break };
            *slot = ext as u16;
            self.set_state(ext, false, true);
            count += 1;
        }
        count
    }

    /// Returns when a requested batch is due again: the first time that libwebrtc would check after
    /// the rule's interval.
    fn repeat_at(&self, batch: &NackBatch, now: Time, rtt: Duration) -> Time {
        let phase = Duration::from_micros(self.grid_phase.into());
        let wanted = batch.asked_at(now) + self.nack.repeat_after(rtt);
        (wanted - phase).next_whole(REPEAT_GRID) + phase
    }

    fn earliest_due(&self, now: Time, rtt: Duration) -> Time {
        let batches = &self.batches[..usize::from(self.batches_len)];
        let due = |batch: &NackBatch| {
            self.repeat_at(batch, now, rtt)
                .min(now - batch.age(now) + AGE_MAX)
        };
        batches.iter().map(due).min().unwrap_or(Time::MAX)
    }

    fn update_jitter(&mut self, rtp_time: u32, now: Time) {
        if rtp_time == self.last_rtp_time {
            return;
        }
        let transit = self.transit_of(rtp_time, now);
        let step = (transit.wrapping_sub(self.transit) as i32).unsigned_abs();
        self.transit = transit;
        self.last_rtp_time = rtp_time;
        if u64::from(step) < u64::from(self.clock_rate) * u64::from(JITTER_STEP_MAX_SECONDS) {
            self.jitter = self
                .jitter
                .saturating_add(step)
                .saturating_sub(self.jitter.saturating_add(8) >> 4);
        }
    }

    /// Arrival minus RTP timestamp, in units of the RTP clock, modulo 2^32.
    fn transit_of(&self, rtp_time: u32, now: Time) -> u32 {
        let rate = u64::from(self.clock_rate);
        let (seconds, nanos) = (
            now.as_nanos() / 1_000_000_000,
            now.as_nanos() % 1_000_000_000,
        );
        let arrival = seconds
            .wrapping_mul(rate)
            .wrapping_add(nanos * rate / 1_000_000_000);
        (arrival as u32).wrapping_sub(rtp_time)
    }
}

fn place(ext: u64) -> (usize, u64) {
    ((ext % WINDOW / 64) as usize, 1 << (ext % 64))
}

fn micros(now: Time) -> u32 {
    now.as_micros() as u32
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;
    use std::collections::{BTreeMap, BinaryHeap};

    use super::*;
    use crate::seeded::Seeded;

    /// Properties of a link, drawn from the seed.
    struct LinkCharacter {
        loss_percent: u64,
        burst: u64,
        duplicate_percent: u64,
        late_percent: u64,
        /// Maximum delay of a late packet.
        late_micros: u64,
        rtx: bool,
    }

    const ONE_WAY_MICROS: u64 = 15_000;
    const PACKETS: u64 = 4_000;

    /// Fate of one sequence number, as seen by an observer who knows what the sender did.
    #[derive(Default)]
    struct NumberFate {
        originals: u64,
        resends: u64,
        /// Whether it arrived as an original by the stream's rules: with RTX this is the truth,
        /// without it "before it was requested".
        as_original: bool,
        reordered: bool,
        asked: Vec<u64>,
        noticed: Option<u64>,
    }

    #[derive(PartialEq, Eq, PartialOrd, Ord)]
    enum LinkEvent {
        Poll,
        Packet { index: u64, resend: bool },
        Nack { index: u64 },
    }

    struct Simulation {
        random: Seeded,
        link: LinkCharacter,
        first_seq: u16,
        agenda: BinaryHeap<Reverse<(u64, u64, LinkEvent)>>,
        scheduled: u64,
        fates: BTreeMap<u64, NumberFate>,
        newest: Option<u64>,
        oldest: u64,
        arrivals: u64,
        stream: ReceiveStream,
    }

    impl Simulation {
        fn new(seed: u64, rtx: bool) -> Simulation {
            let mut random = Seeded::new(seed);
            let link = LinkCharacter {
                loss_percent: [0, 1, 5, 15, 30][random.below(5) as usize],
                burst: [1, 1, 4, 40][random.below(4) as usize],
                duplicate_percent: random.below(4) * 3,
                late_percent: random.below(3) * 4,
                late_micros: [3_000, 8_000, 60_000][random.below(3) as usize],
                rtx,
            };
            let first_seq = random.draw() as u16;
            let mut stream = ReceiveStream::new(90_000);
            stream.set_rtx(rtx);
            let mut simulation = Simulation {
                random,
                link,
                first_seq,
                agenda: BinaryHeap::new(),
                scheduled: 0,
                fates: BTreeMap::new(),
                newest: None,
                oldest: u64::MAX,
                arrivals: 0,
                stream,
            };
            simulation.send_all();
            simulation
        }

        fn schedule(&mut self, at: u64, event: LinkEvent) {
            self.scheduled += 1;
            self.agenda.push(Reverse((at, self.scheduled, event)));
        }

        fn send_all(&mut self) {
            let mut burst_left = 0;
            for index in 0..PACKETS {
                let burst = self.link.burst;
                if burst_left == 0 && self.random.below(100 * burst) < self.link.loss_percent {
                    burst_left = burst;
                }
                if burst_left > 0 {
                    burst_left -= 1;
                } else {
                    self.deliver(index, 1_000 * index, false);
                }
            }
            for millis in 0..PACKETS + 3_000 {
                self.schedule(1_000 * millis, LinkEvent::Poll);
            }
        }

        fn deliver(&mut self, index: u64, sent_at: u64, resend: bool) {
            let copies = 1 + u64::from(self.random.chance(self.link.duplicate_percent));
            for _ in 0..copies {
                let late = if self.random.chance(self.link.late_percent) {
                    self.random.below(self.link.late_micros)
                } else {
                    0
                };
                self.schedule(
                    sent_at + ONE_WAY_MICROS + late,
                    LinkEvent::Packet { index, resend },
                );
            }
        }

        fn run(&mut self) {
            while let Some(Reverse((at, _, event))) = self.agenda.pop() {
                match event {
                    LinkEvent::Poll => self.poll(at),
                    LinkEvent::Packet { index, resend } => self.arrive(index, resend, at),
                    LinkEvent::Nack { index } => {
                        if !self.random.chance(self.link.loss_percent) {
                            self.deliver(index, at, true);
                        }
                    }
                }
                self.check_batches();
            }
        }

        fn poll(&mut self, at: u64) {
            let mut asked = [0; MISSING_MAX];
            let was_due = self.stream.next_nack_at() <= Time::from_micros(at);
            let poll = self.stream.poll_nack(
                Time::from_micros(at),
                round_trip(Duration::from_micros(2 * ONE_WAY_MICROS)),
                &mut asked,
            );
            assert!(
                was_due || poll == NackPoll::default(),
                "what was due was announced"
            );
            let newest = self.newest.unwrap_or(0);
            let mut before = None;
            for seq in &asked[..poll.count] {
                let index = newest
                    - u64::from((self.first_seq.wrapping_add(newest as u16)).wrapping_sub(*seq));
                assert!(before.is_none_or(|before| before < index), "sorted");
                before = Some(index);
                let fate = self.fates.entry(index).or_default();
                assert_eq!(
                    (fate.originals, fate.resends),
                    (0, 0),
                    "only what is missing is asked for"
                );
                let noticed = fate.noticed.expect("noticed before asked for");
                match fate.asked.last() {
                    None => assert!(at - noticed < 1_000, "at once: {noticed} {at}"),
                    // In heavy loss, packets found missing within 20 ms are requested again
                    // together.
                    Some(last) => assert!(
                        at - last >= 2 * ONE_WAY_MICROS - 20_000,
                        "never in haste: {last} {at}"
                    ),
                }
                assert!(at - noticed <= 1_000_000 && fate.asked.len() < usize::from(TRIES_MAX));
                fate.asked.push(at);
                if !self.random.chance(self.link.loss_percent) {
                    self.schedule(at + ONE_WAY_MICROS, LinkEvent::Nack { index });
                }
            }
        }

        fn arrive(&mut self, index: u64, resend: bool, at: u64) {
            let seq = self.first_seq.wrapping_add(index as u16);
            let arrival = self.stream.handle_packet(
                seq,
                (index * 90) as u32,
                Time::from_micros(at),
                resend && self.link.rtx,
            );
            if self.newest.is_none() {
                assert_eq!(arrival, Arrival::New { gap: 0 });
                self.oldest = index;
            }
            self.oldest = self.oldest.min(index);
            self.arrivals += 1;
            let newest = *self.newest.get_or_insert(index);
            for missing in newest + 1..index {
                self.fates.entry(missing).or_default().noticed = Some(at);
            }
            self.newest = Some(newest.max(index));
            let fate = self.fates.entry(index).or_default();
            let known = fate.originals + fate.resends > 0;
            // A packet that comes within half a round trip of its request is no answer. The stream
            // may not see that if gaps share a batch.
            let asked_just_now = fate.asked.len() == 1 && fate.asked[0] + ONE_WAY_MICROS > at;
            let counts_as_original = if self.link.rtx {
                !resend
            } else {
                fate.asked.is_empty() || (asked_just_now && arrival == Arrival::Reordered)
            };
            *(if resend {
                &mut fate.resends
            } else {
                &mut fate.originals
            }) += 1;
            match arrival {
                Arrival::New { .. } => assert!(index >= newest && !known),
                Arrival::Reordered => assert!(index < newest && !known && counts_as_original),
                Arrival::Duplicate => assert!(known),
                Arrival::TooOld => panic!("nothing is that late here"),
                Arrival::Repaired { loss_to_repair } => {
                    assert!(!known && !counts_as_original);
                    let slack = if self.link.loss_percent <= 5 && self.link.late_percent == 0 {
                        1_000
                    } else {
                        // Batches of 20 ms, with the two oldest of them merged again and again.
                        200_000
                    };
                    let truth = at - fate.noticed.expect("a hole was noticed");
                    let told = loss_to_repair.map_or(truth, |told| told.as_micros() as u64);
                    assert!(told.abs_diff(truth) <= slack, "{told} {truth}");
                }
            }
            if counts_as_original && !fate.as_original && (self.link.rtx || !known) {
                fate.as_original = true;
                fate.reordered = index < newest;
            }
        }

        /// Checks that the batches hold exactly what is missing inside them.
        fn check_batches(&self) {
            let stream = &self.stream;
            let mut total = 0;
            for at in 0..usize::from(stream.batches_len) {
                let first = stream.first_of(at);
                let missing = (first..first + u64::from(stream.batches[at].len))
                    .filter(|ext| !stream.state(*ext).0)
                    .count();
                assert_eq!(missing, usize::from(stream.batches[at].missing));
                assert!(missing > 0);
                total += missing;
            }
            assert_eq!(total, usize::from(stream.missing));
            assert!(total <= MISSING_MAX);
        }

        fn truth(&self) -> ReceiveCounts {
            let seen = || {
                self.fates
                    .values()
                    .filter(|fate| fate.originals + fate.resends > 0)
            };
            let expected = self.newest.unwrap() - self.oldest + 1;
            let received = seen().filter(|fate| fate.as_original).count() as u64;
            let repaired = seen().count() as u64 - received;
            ReceiveCounts {
                expected,
                received,
                reordered: seen()
                    .filter(|fate| fate.as_original && fate.reordered)
                    .count() as u64,
                repaired,
                duplicate: self.arrivals - seen().count() as u64,
                too_old: 0,
                lost_network: expected - received,
                lost: expected - received - repaired,
            }
        }
    }

    #[test]
    fn every_counter_agrees_with_the_log_of_a_seeded_link() {
        let mut repaired = [0, 0];
        for seed in 0..120 {
            for rtx in [false, true] {
                let mut simulation = Simulation::new(seed, rtx);
                simulation.run();
                let counts = simulation.stream.counts();
                assert_eq!(counts, simulation.truth(), "seed {seed}, rtx {rtx}");
                assert_eq!(simulation.stream.missing, 0, "all was repaired or given up");
                assert_eq!(simulation.stream.next_nack_at(), Time::MAX);
                repaired[usize::from(rtx)] += counts.repaired;
            }
        }
        assert!(
            repaired.iter().all(|repaired| *repaired > 10_000),
            "{repaired:?}"
        );
    }

    fn ms(millis: u64) -> Time {
        Time::from_millis(millis)
    }

    fn poll(stream: &mut ReceiveStream, now: Time) -> (Vec<u16>, u32) {
        let mut out = [0; MISSING_MAX];
        let poll = stream.poll_nack(now, round_trip(Duration::from_millis(10)), &mut out);
        (out[..poll.count].to_vec(), poll.gave_up)
    }

    fn round_trip(rtt: Duration) -> RoundTrip {
        RoundTrip {
            last: rtt,
            least: Some(rtt),
        }
    }

    /// Returns the times, in ms, at which missing packets are requested until they are given up.
    fn times_asked(stream: &mut ReceiveStream, rtt: Duration) -> (Vec<u64>, u32) {
        let (mut asked, mut gave_up) = (Vec::new(), 0);
        while stream.next_nack_at() != Time::MAX {
            let now = stream.next_nack_at();
            let mut out = [0; MISSING_MAX];
            let poll = stream.poll_nack(now, round_trip(rtt), &mut out);
            gave_up += poll.gave_up;
            if poll.count > 0 {
                asked.push(now.as_millis());
            }
        }
        (asked, gave_up)
    }

    #[test]
    fn a_gap_is_asked_for_at_once_and_ten_times_at_most() {
        let mut stream = ReceiveStream::new(48_000);
        stream.handle_packet(65_534, 0, ms(0), false);
        assert_eq!(stream.next_nack_at(), Time::MAX);
        assert_eq!(
            stream.handle_packet(1, 0, ms(107), false),
            Arrival::New { gap: 2 }
        );
        assert_eq!(stream.next_nack_at(), ms(107));
        assert_eq!(poll(&mut stream, ms(107)), (vec![65_535, 0], 0));
        assert_eq!(poll(&mut stream, ms(119)), (vec![], 0));
        let (asked, gave_up) = times_asked(&mut stream, Duration::from_millis(10));
        assert_eq!(
            asked,
            [120, 140, 160, 180, 200, 220, 240, 260, 280],
            "a round trip has passed at each look, 20 ms apart"
        );
        assert_eq!((gave_up, stream.counts().lost), (2, 2));
    }

    #[test]
    fn video_is_asked_for_again_after_a_round_trip_and_audio_after_one_and_a_half() {
        for (rule, rtt_ms, expected) in [
            // Checks are at 0, 20, 40 .. ms.
            (
                NackRule::Video,
                1,
                vec![20, 40, 60, 80, 100, 120, 140, 160, 180],
            ),
            (
                NackRule::Video,
                50,
                vec![60, 120, 180, 240, 300, 360, 420, 480, 540],
            ),
            (
                NackRule::Video,
                100,
                vec![100, 200, 300, 400, 500, 600, 700, 800, 900],
            ),
            (NackRule::Video, 300, vec![300, 600, 900]),
            (
                NackRule::Audio,
                1,
                vec![20, 40, 60, 80, 100, 120, 140, 160, 180],
            ),
            (
                NackRule::Audio,
                50,
                vec![80, 160, 240, 320, 400, 480, 560, 640, 720],
            ),
            (NackRule::Audio, 400, vec![620]),
        ] {
            let mut stream = ReceiveStream::new(90_000);
            stream.set_nack(rule);
            stream.handle_packet(1, 0, ms(0), false);
            stream.handle_packet(3, 0, ms(0), false);
            let (asked, gave_up) = times_asked(&mut stream, Duration::from_millis(rtt_ms));
            assert_eq!(
                (asked[0], &asked[1..]),
                (0, &expected[..]),
                "{rule:?} {rtt_ms}"
            );
            assert_eq!(gave_up, 1);
        }
    }

    #[test]
    fn what_nobody_agreed_on_is_never_asked_for_and_given_up_at_once() {
        let mut stream = ReceiveStream::new(90_000);
        stream.set_nack(NackRule::Never);
        stream.handle_packet(1, 0, ms(0), false);
        stream.handle_packet(3, 0, ms(5), false);
        assert_eq!(stream.next_nack_at(), ms(5));
        assert_eq!(poll(&mut stream, ms(5)), (vec![], 1));
        assert_eq!(stream.next_nack_at(), Time::MAX);
        assert_eq!(stream.handle_packet(2, 0, ms(6), false), Arrival::Reordered);
    }

    #[test]
    fn without_rtx_what_comes_sooner_than_any_answer_could_is_the_original() {
        for (after_ms, original) in [(1, true), (9, true), (10, false), (40, false)] {
            let mut stream = ReceiveStream::new(48_000);
            stream.handle_packet(1, 0, ms(0), false);
            stream.handle_packet(3, 0, ms(0), false);
            let mut out = [0; MISSING_MAX];
            assert_eq!(
                stream
                    .poll_nack(ms(0), round_trip(Duration::from_millis(20)), &mut out)
                    .count,
                1
            );
            let arrival = stream.handle_packet(2, 0, ms(after_ms), false);
            assert_eq!(
                arrival == Arrival::Reordered,
                original,
                "{after_ms} ms: {arrival:?}"
            );
            assert_eq!(stream.counts().lost_network, u64::from(!original));
        }
    }

    #[test]
    fn a_new_gap_is_asked_for_at_once_beside_an_older_one_that_waits() {
        let mut stream = ReceiveStream::new(90_000);
        stream.handle_packet(1, 0, ms(0), false);
        stream.handle_packet(3, 0, ms(0), false);
        assert_eq!(poll(&mut stream, ms(0)).0, [2]);
        stream.handle_packet(5, 0, ms(0), false);
        assert_eq!(
            poll(&mut stream, ms(0)).0,
            [4],
            "and not the older one again"
        );
        stream.handle_packet(8, 0, ms(12), false);
        assert_eq!(poll(&mut stream, ms(12)).0, [6, 7]);
        assert_eq!(poll(&mut stream, ms(20)).0, [2, 4]);
        assert_eq!(poll(&mut stream, ms(40)).0, [2, 4, 6, 7]);
    }

    #[test]
    fn more_gaps_than_there_are_batches_are_all_asked_for_at_once_and_again_in_time() {
        let mut stream = ReceiveStream::new(90_000);
        stream.handle_packet(0, 0, ms(0), false);
        let mut asked: BTreeMap<u16, Vec<u64>> = BTreeMap::new();
        for now in 1..1_500 {
            let n = now as u16 / 10;
            if now % 10 == 0 && n <= 60 {
                stream.handle_packet(2 * n, 0, ms(now), false);
            }
            let mut out = [0; MISSING_MAX];
            let poll = stream.poll_nack(ms(now), round_trip(Duration::from_millis(300)), &mut out);
            for seq in &out[..poll.count] {
                asked.entry(*seq).or_default().push(now);
            }
        }
        assert_eq!(asked.len(), 60);
        for (seq, times) in asked {
            assert_eq!(times[0], 10 * (u64::from(seq) / 2 + 1), "at once");
            assert!((2..=4).contains(&times.len()), "{seq}: {times:?}");
            assert!(
                times.windows(2).all(|pair| pair[1] - pair[0] >= 280),
                "{seq}: {times:?}"
            );
        }
    }

    #[test]
    fn a_hostile_jump_makes_no_entries_and_a_restart_is_followed() {
        let mut stream = ReceiveStream::new(90_000);
        for seq in 1_000..1_010 {
            stream.handle_packet(seq, 0, ms(0), false);
        }
        for seq in [31_000, 9_000, 60_000, 45_000] {
            assert_eq!(stream.handle_packet(seq, 0, ms(1), false), Arrival::TooOld);
        }
        assert_eq!(stream.next_nack_at(), Time::MAX);
        let before = stream.ext_seq();
        assert_eq!(
            stream.handle_packet(45_001, 0, ms(2), false),
            Arrival::New { gap: 0 }
        );
        assert!(stream.ext_seq() > before);
        assert_eq!(
            stream.handle_packet(45_003, 0, ms(2), false),
            Arrival::New { gap: 1 }
        );
        let counts = stream.counts();
        assert_eq!(
            (
                counts.expected,
                counts.received,
                counts.lost_network,
                counts.too_old
            ),
            (13, 12, 1, 4)
        );
    }

    #[test]
    fn more_than_a_thousand_missing_packets_are_all_given_up_for_a_key_frame() {
        let mut stream = ReceiveStream::new(90_000);
        stream.handle_packet(0, 0, ms(0), false);
        assert_eq!(
            stream.handle_packet(1_001, 0, ms(0), false),
            Arrival::New { gap: 1_000 }
        );
        let (seqs, gave_up) = poll(&mut stream, ms(0));
        assert_eq!((seqs.len(), gave_up), (1_000, 0));
        assert_eq!(
            stream.handle_packet(1_003, 0, ms(1), false),
            Arrival::New { gap: 1 }
        );
        assert_eq!(poll(&mut stream, ms(1)), (vec![], 1_001));
        assert_eq!(stream.next_nack_at(), Time::MAX);
        assert_eq!(
            stream.handle_packet(500, 0, ms(21), false),
            Arrival::Repaired {
                loss_to_repair: None
            }
        );
        let mut stream = ReceiveStream::new(90_000);
        stream.handle_packet(0, 0, ms(0), false);
        stream.handle_packet(2_001, 0, ms(0), false);
        assert_eq!(poll(&mut stream, ms(0)), (vec![], 2_000));
    }

    #[test]
    fn the_first_packet_may_be_overtaken() {
        let mut stream = ReceiveStream::new(90_000);
        assert_eq!(
            stream.handle_packet(77, 0, ms(0), true),
            Arrival::TooOld,
            "a resend alone starts nothing"
        );
        stream.handle_packet(1, 0, ms(0), false);
        assert_eq!(
            stream.handle_packet(65_535, 0, ms(1), false),
            Arrival::Reordered
        );
        assert_eq!(stream.handle_packet(0, 0, ms(1), false), Arrival::Reordered);
        assert_eq!(
            stream.handle_packet(65_400, 0, ms(1), false),
            Arrival::TooOld
        );
        assert_eq!(
            stream.handle_packet(65_534, 0, ms(1), true),
            Arrival::TooOld,
            "nor does it lengthen the past"
        );
        assert_eq!((stream.counts().expected, stream.counts().received), (3, 3));
    }

    #[test]
    fn an_original_after_its_resend_makes_the_resend_the_duplicate() {
        let mut stream = ReceiveStream::new(90_000);
        stream.handle_packet(5, 0, ms(0), false);
        stream.handle_packet(7, 0, ms(0), false);
        poll(&mut stream, ms(10));
        assert_eq!(
            stream.handle_packet(6, 0, ms(30), true),
            Arrival::Repaired {
                loss_to_repair: Some(Duration::from_millis(30))
            }
        );
        assert_eq!(
            (
                stream.counts().lost_network,
                stream.counts().repaired,
                stream.counts().lost
            ),
            (1, 1, 0)
        );
        assert_eq!(
            stream.handle_packet(6, 0, ms(40), false),
            Arrival::Duplicate
        );
        assert_eq!(
            (
                stream.counts().lost_network,
                stream.counts().repaired,
                stream.counts().lost
            ),
            (0, 0, 0)
        );
        assert_eq!(
            stream.handle_packet(8, 0, ms(41), true),
            Arrival::Repaired {
                loss_to_repair: None
            },
            "a resend may run ahead"
        );
        assert_eq!(
            stream.handle_packet(8, 0, ms(42), false),
            Arrival::Duplicate
        );
        assert_eq!(
            (stream.counts().received, stream.counts().reordered),
            (4, 2)
        );
    }

    #[test]
    fn report_blocks_count_originals_since_the_last_one() {
        let mut stream = ReceiveStream::new(48_000);
        assert_eq!(stream.report_block(ms(0)), None);
        let feed = |stream: &mut ReceiveStream, seqs: &[u16]| {
            for seq in seqs {
                stream.handle_packet(*seq, 0, ms(0), false);
            }
        };
        feed(&mut stream, &[65_533, 65_535, 0, 2]);
        stream.handle_sender_report(0x1234_5678_9ABC_DEF0, ms(1_000));
        let report = stream.report_block(ms(1_500)).unwrap();
        assert_eq!(
            (
                report.fraction_lost,
                report.cumulative_lost,
                report.extended_highest_seq
            ),
            (85, 2, 65_538)
        );
        assert_eq!((report.lsr, report.dlsr), (0x5678_9ABC, 32_768));
        feed(&mut stream, &[1, 3, 3, 4]);
        let report = stream.report_block(ms(2_000)).unwrap();
        assert_eq!(
            (report.fraction_lost, report.cumulative_lost),
            (0, 1),
            "a late original makes up for its loss"
        );
        feed(&mut stream, &[2_900]);
        assert_eq!(stream.report_block(ms(2_000)).unwrap().fraction_lost, 255);
    }

    #[test]
    fn jitter_follows_the_rfc_formula_over_one_packet_a_timestamp() {
        let mut stream = ReceiveStream::new(48_000);
        let (mut expected, mut random, mut late_before) = (0f64, Seeded::new(3), 0f64);
        for index in 0..2_000u64 {
            let late = random.below(5_000);
            let now = Time::from_micros(index * 20_000 + late);
            stream.handle_packet(index as u16, (index * 960) as u32, now, false);
            stream.handle_packet((index + 30_000) as u16, 7, now, false);
            if index > 0 {
                expected += ((late as f64 - late_before).abs() - expected) / 16.0;
            }
            late_before = late as f64;
        }
        let jitter = stream.jitter().as_micros() as f64;
        assert!((jitter - expected).abs() < 40.0, "{jitter} {expected}");
        let before = stream.jitter();
        stream.handle_packet(2_000, 0x8000_0000, ms(40_000), false);
        assert_eq!(
            stream.jitter(),
            before,
            "a new timestamp origin is no jitter"
        );
    }

    #[test]
    fn wild_sequence_numbers_do_no_harm() {
        for seed in 0..100 {
            let mut random = Seeded::new(seed);
            let mut stream = ReceiveStream::new(90_000);
            let (mut seq, mut now) = (random.draw() as u16, Time::ZERO);
            for step in 0..5_000u64 {
                now += Duration::from_micros(random.below(3_000));
                seq = match random.below(40) {
                    0 => random.draw() as u16,
                    1 => seq.wrapping_add(random.below(3_500) as u16),
                    2..8 => seq.wrapping_sub(random.below(1_300) as u16),
                    _ => seq.wrapping_add(1),
                };
                stream.handle_packet(seq, random.draw() as u32, now, random.chance(10));
                if step % 3 == 0 {
                    poll(&mut stream, now);
                }
                stream.report_block(now);
                let counts = stream.counts();
                assert_eq!(
                    counts.expected,
                    counts.received + counts.repaired + counts.lost
                );
                assert_eq!(
                    counts.received + counts.repaired + counts.duplicate + counts.too_old,
                    step + 1
                );
            }
        }
    }

    #[test]
    fn the_state_stays_small() {
        assert!(
            size_of::<ReceiveStream>() <= 800,
            "{}",
            size_of::<ReceiveStream>()
        );
    }
}
