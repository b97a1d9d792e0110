//! Assembles frames from packets: which video frames are complete, which of them a decoder could
//! decode, and where the picture would freeze.
//!
//! It works on unwrapped sequence numbers and the few facts that a VP8 packet shows (RFC 7741:
//! start, end, key). Nothing here allocates. The number of frames in progress is bounded, and the
//! oldest is given up for the newest.
//!
//! The decoding rule is that of a stream without temporal layers: a key frame can be decoded alone,
//! and an inter frame needs the frame right before it. If frames carry an identity, that is the
//! publisher's previous frame of the same layer, because an SFU that leaves out frames closes the
//! gap in the sequence numbers.

use std::time::Duration;

use crate::media::identity::{FrameIdentity, Origin};
use crate::net;
use crate::units::Time;

/// Maximum number of frames in progress, or complete and waiting for an earlier one: half a second
/// at 30 frames a second.
const SLOTS: usize = 16;
const ALL_USED: u16 = u16::MAX;

/// Number of packets that the assembler looks back. A larger frame cannot be completed.
const WINDOW: u64 = 1024;

/// Interval between key frame requests, as in libwebrtc. No request is sent for the same time after
/// a packet of a key frame arrived.
pub const PLI_RETRY: Duration = Duration::from_millis(200);

/// Time without a picture after which libwebrtc gives up repairing a frame.
const STALL_MAX: Duration = Duration::from_secs(3);

/// Facts about one packet with video payload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PacketInfo {
    /// Unwrapped sequence number, above zero.
    pub ext_seq: u64,
    pub rtp_time: u32,
    /// Whether the S bit is set and the partition index is 0.
    pub start: bool,
    /// Whether the marker bit is set.
    pub end: bool,
    /// Whether the packet starts a key frame; meaningful on the first packet only.
    pub key: bool,
    /// Identity in the last packet's trailer.
    pub identity: Option<FrameIdentity>,
}

/// Event caused by a packet. One packet completes at most one frame, and may let several waiting
/// frames be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameEvent {
    Complete(CompleteFrame),
    Decoded(DecodedFrame),
}

/// Frame whose packets have all arrived. [`FrameEvent::Decoded`] follows at once if it is
/// `decodable`, and later or never if not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompleteFrame {
    pub identity: Option<FrameIdentity>,
    pub rtp_time: u32,
    pub key: bool,
    pub packets: u16,
    /// Unwrapped sequence number of the last packet.
    pub last_seq: u64,
    pub first_arrival: Time,
    pub completed_at: Time,
    pub decodable: bool,
}

/// Frame that a decoder gets now, in decoding order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodedFrame {
    pub rtp_time: u32,
    pub key: bool,
    /// Layer, if the frame carries an identity.
    pub layer: Option<u8>,
    /// Intended send time, if the frame carries an identity.
    pub intended_unix_us: Option<u64>,
    pub decoded_at: Time,
    /// Time since the frame decoded before; `None` for the first, and after a pause.
    pub interval: Option<Duration>,
    /// The same interval, if it is a freeze.
    pub freeze: Option<Duration>,
}

/// Cumulative counts in frames, except `packets_late`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AssemblyCounts {
    pub complete: u64,
    pub decoded: u64,
    /// Number of complete frames that could not be decoded because an earlier frame is missing.
    pub undecodable: u64,
    /// Number of frames given up with packets missing.
    pub abandoned: u64,
    /// Number of packets of frames that had already been decoded or given up.
    pub packets_late: u64,
}

/// Frame in progress.
#[derive(Clone, Copy, Default)]
struct FrameSlot {
    rtp_time: u32,
    /// Low half of the unwrapped number of the first packet so far.
    low: u32,
    /// Arrival of the first packet, in microseconds of the run modulo 2^32.
    first_arrival: u32,
    /// Distance from the first packet so far to the last.
    span: u16,
    flags: u8,
}

/// Whether the packet at `low` starts the frame.
const START: u8 = 1;
/// Whether the packet at `low + span` ends it.
const END: u8 = 2;
const KEY: u8 = 4;
const COMPLETE: u8 = 8;
const IDENTIFIED: u8 = 16;

impl FrameSlot {
    fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }

    fn set(&mut self, flag: u8, on: bool) {
        self.flags = if on {
            self.flags | flag
        } else {
            self.flags & !flag
        };
    }
}

/// Place of a frame in the publisher's chain of frames. The fields of its origin are stored
/// separately, because the packed type compares slowly.
#[derive(Clone, Copy, PartialEq, Eq)]
struct ChainLink {
    publisher: u32,
    frame: u32,
    track: u8,
    layer: u8,
}

impl ChainLink {
    fn next(self) -> ChainLink {
        ChainLink {
            frame: self.frame.wrapping_add(1),
            ..self
        }
    }
}

/// Video frames of one received stream. The fields that every packet needs come first.
#[repr(C)]
pub struct Assembler {
    newest: u64,
    /// Sequence number of the last packet of the frame decoded last.
    tail: u64,
    /// Sequence number up to which packets are of no use any more.
    floor: u64,
    first_packet_at: Option<Time>,
    /// Whether inter frames after `tail` can be decoded.
    intact: bool,
    /// Whether repair has given up on a packet, so that only a key frame is safe.
    key_wanted: bool,
    /// Whether an inter frame has begun that cannot be decoded.
    inter_seen: bool,
    /// Slot used last.
    current: u8,
    /// Set of slots that hold a frame, one bit each.
    used: u16,
    slots: [FrameSlot; SLOTS],
    received: [u64; WINDOW as usize / 64],

    /// Chain link of the frame at `tail`, if it carried an identity.
    tail_link: Option<ChainLink>,
    complete: u32,
    decoded: u32,
    freezes: FreezeDetector,
    identities: [FrameIdentity; SLOTS],
    key_packet_at: Option<Time>,
    pli_at: Option<Time>,
    undecodable: u32,
    abandoned: u32,
    packets_late: u32,
}

impl Default for Assembler {
    fn default() -> Assembler {
        Assembler::new()
    }
}

impl Assembler {
    pub fn new() -> Assembler {
        Assembler {
            newest: 0,
            tail: 0,
            tail_link: None,
            floor: 0,
            intact: false,
            key_wanted: false,
            inter_seen: false,
            current: 0,
            used: 0,
            received: [0; WINDOW as usize / 64],
            slots: [FrameSlot::default(); SLOTS],
            identities: [FrameIdentity::default(); SLOTS],
            first_packet_at: None,
            key_packet_at: None,
            pli_at: None,
            freezes: FreezeDetector::default(),
            complete: 0,
            decoded: 0,
            undecodable: 0,
            abandoned: 0,
            packets_late: 0,
        }
    }

    /// Prefetches what every packet needs.
    pub fn prefetch(&self) {
        // With few frames in progress, they are in the first slots.
        net::prefetch(
            self,
            std::mem::offset_of!(Assembler, slots) + 3 * size_of::<FrameSlot>(),
        );
        net::prefetch(&self.received, usize::MAX);
        net::prefetch(&self.tail_link, usize::MAX);
        net::prefetch(&self.freezes, usize::MAX);
        net::prefetch(&self.identities[..2], usize::MAX);
        net::prefetch(&self.key_packet_at, usize::MAX);
    }

    /// Takes a packet with payload, in any order; duplicates do no harm. `on_event` receives the
    /// resulting events in order.
    pub fn handle_packet(
        &mut self,
        packet: &PacketInfo,
        now: Time,
        mut on_event: impl FnMut(FrameEvent),
    ) {
        self.first_packet_at.get_or_insert(now);
        if !self.receive(packet.ext_seq) {
            return;
        }
        let Some(at) = self.slot_for(packet, now) else {
            return;
        };
        self.add_to_slot(at, packet, now);
        if self.slots[at].has(START | END) && !self.slots[at].has(COMPLETE) && self.is_whole(at) {
            self.complete(at, now, &mut on_event);
        }
    }

    /// Takes a packet without payload. It occupies a sequence number between frames.
    pub fn handle_padding(
        &mut self,
        ext_seq: u64,
        now: Time,
        mut on_event: impl FnMut(FrameEvent),
    ) {
        if self.receive(ext_seq) {
            self.decode_waiting(now, &mut on_event);
        }
    }

    /// Takes note that repair has given up on a packet. A key frame is requested then, as in
    /// libwebrtc.
    pub fn handle_gave_up(&mut self) {
        self.key_wanted = true;
    }

    /// Takes note that the stream is paused on purpose (muted, unsubscribed). The gap to the next
    /// frame is no freeze.
    pub fn handle_pause(&mut self) {
        self.freezes.handle_pause();
    }

    /// Returns whether nothing can be decoded before a key frame, or possibly nothing.
    pub fn needs_key_frame(&self) -> bool {
        self.newest > 0 && (!self.intact || self.key_wanted)
    }

    /// Returns whether a PLI should be sent now. True counts as sent: the next one comes at least
    /// [`PLI_RETRY`] later, and none while a key frame is arriving.
    pub fn poll_pli(&mut self, now: Time) -> bool {
        let waited = |since: Option<Time>| since.is_none_or(|since| now.since(since) >= PLI_RETRY);
        let never_decoded = self.decoded == 0;
        let too_early =
            never_decoded && !self.inter_seen && !self.key_wanted && !waited(self.first_packet_at);
        let wants = (self.needs_key_frame() && !too_early) || self.is_stalled(now);
        let due = wants && waited(self.key_packet_at) && waited(self.pli_at);
        if due {
            self.pli_at = Some(now);
        }
        due
    }

    /// Returns when the last frame was decoded; `None` before the first and during a pause.
    pub fn decoded_at(&self) -> Option<Time> {
        self.freezes.last
    }

    /// Returns the freeze in progress, as if the next frame came at `now`; for the end of a run.
    pub fn open_freeze(&self, now: Time) -> Option<Duration> {
        self.freezes.clone().handle_frame(now).1
    }

    pub fn counts(&self) -> AssemblyCounts {
        AssemblyCounts {
            complete: self.complete.into(),
            decoded: self.decoded.into(),
            undecodable: self.undecodable.into(),
            abandoned: self.abandoned.into(),
            packets_late: self.packets_late.into(),
        }
    }

    /// Records a packet. Returns false if it was received before or comes too late to matter.
    fn receive(&mut self, ext: u64) -> bool {
        if ext > self.newest {
            self.advance(ext);
        } else if ext <= self.floor || self.newest - ext >= WINDOW {
            self.packets_late += 1;
            return false;
        } else if self.is_received(ext) {
            return false;
        }
        let (word, bit) = place(ext);
        self.received[word] |= bit;
        true
    }

    fn is_received(&self, ext: u64) -> bool {
        let (word, bit) = place(ext);
        self.received[word] & bit != 0
    }

    fn advance(&mut self, ext: u64) {
        if ext - self.newest >= WINDOW {
            self.received = [0; WINDOW as usize / 64];
        } else {
            for passed in self.newest + 1..=ext {
                let (word, bit) = place(passed);
                self.received[word] &= !bit;
            }
        }
        self.newest = ext;
        // It is not known any more what was between the last decoded frame and the window's edge.
        if ext - self.tail >= WINDOW {
            self.intact = false;
        }
    }

    fn low(&self, at: usize) -> u64 {
        self.newest - u64::from((self.newest as u32).wrapping_sub(self.slots[at].low))
    }

    fn high(&self, at: usize) -> u64 {
        self.low(at) + u64::from(self.slots[at].span)
    }

    /// Iterates over the used slots in order. A slot that is freed meanwhile is still returned.
    fn used(&self) -> impl Iterator<Item = usize> + use<> {
        let mut left = self.used;
        std::iter::from_fn(move || {
            let at = (left != 0).then(|| left.trailing_zeros() as usize)?;
            left &= left - 1;
            Some(at)
        })
    }

    fn is_used(&self, at: usize) -> bool {
        self.used >> at & 1 != 0
    }

    /// Returns the slot of the packet's frame, or a new one; `None` if the packet is older than all
    /// frames and there is no room.
    fn slot_for(&mut self, packet: &PacketInfo, now: Time) -> Option<usize> {
        let belongs = |at: &usize| self.slots[*at].rtp_time == packet.rtp_time;
        let current = usize::from(self.current);
        if self.is_used(current) && belongs(&current) {
            return Some(current);
        }
        let known = self.used().find(belongs);
        let at = match known {
            Some(at) => at,
            None => self.open_slot(packet, now)?,
        };
        self.current = at as u8;
        Some(at)
    }

    fn open_slot(&mut self, packet: &PacketInfo, now: Time) -> Option<usize> {
        for at in self.used() {
            if self.newest - self.low(at) >= WINDOW {
                self.give_up(at);
            }
        }
        let free = (self.used != ALL_USED).then(|| self.used.trailing_ones() as usize);
        let at = match free {
            Some(at) => at,
            None => self.crowd_out(packet.ext_seq)?,
        };
        self.slots[at] = FrameSlot {
            rtp_time: packet.rtp_time,
            low: packet.ext_seq as u32,
            first_arrival: micros(now),
            span: 0,
            flags: 0,
        };
        self.used |= 1 << at;
        Some(at)
    }

    /// Frees the oldest slot for a newer packet. A packet older than all of them loses its own
    /// frame.
    fn crowd_out(&mut self, ext: u64) -> Option<usize> {
        let oldest = self.used().min_by_key(|&at| self.low(at))?;
        if ext < self.low(oldest) {
            self.packets_late += 1;
            self.break_chain(ext);
            return None;
        }
        self.give_up(oldest);
        Some(oldest)
    }

    fn add_to_slot(&mut self, at: usize, packet: &PacketInfo, now: Time) {
        let (low, high) = (self.low(at), self.high(at));
        let slot = &mut self.slots[at];
        // A complete frame takes no more packets, and no frame is wider than the window. Such
        // packets come from a broken sender.
        if slot.has(COMPLETE) || packet.ext_seq.abs_diff(low) >= WINDOW {
            return;
        }
        if packet.ext_seq <= low {
            slot.set(START, packet.start);
            slot.set(KEY, packet.start && packet.key);
        }
        if packet.ext_seq >= high {
            slot.set(END, packet.end);
        }
        let (low, high) = (low.min(packet.ext_seq), high.max(packet.ext_seq));
        slot.low = low as u32;
        slot.span = (high - low) as u16;
        if let Some(identity) = packet.identity {
            slot.set(IDENTIFIED, true);
            self.identities[at] = identity;
        }
        if slot.has(KEY) {
            self.key_packet_at = Some(now);
        } else if slot.has(START) && !self.intact {
            self.inter_seen = true;
        }
    }

    /// Returns whether all packets from the slot's first to its last have arrived.
    fn is_whole(&self, at: usize) -> bool {
        let (low, high) = (self.low(at), self.high(at));
        self.newest - low < WINDOW && (low..=high).all(|ext| self.is_received(ext))
    }

    fn complete(&mut self, at: usize, now: Time, on_event: &mut impl FnMut(FrameEvent)) {
        let decodable = self.is_decodable(at);
        let last_seq = self.high(at);
        let slot = &mut self.slots[at];
        slot.set(COMPLETE, true);
        let frame = CompleteFrame {
            identity: slot.has(IDENTIFIED).then_some(self.identities[at]),
            rtp_time: slot.rtp_time,
            key: slot.has(KEY),
            packets: slot.span.saturating_add(1),
            last_seq,
            first_arrival: now
                - Duration::from_micros(u64::from(micros(now).wrapping_sub(slot.first_arrival))),
            completed_at: now,
            decodable,
        };
        self.complete += 1;
        on_event(FrameEvent::Complete(frame));
        if decodable {
            self.decode(at, now, on_event);
            self.decode_waiting(now, on_event);
        } else if self.intact && self.follows_tail(self.low(at)) {
            // The frame is next in the sequence, but was coded against a frame that never came.
            // Nothing will fill that gap.
            self.intact = false;
            self.inter_seen = true;
        }
    }

    fn is_decodable(&self, at: usize) -> bool {
        self.slots[at].has(KEY)
            || (self.intact && self.follows_tail(self.low(at)) && self.continues_tail(at))
    }

    /// Returns whether the frame was coded against the frame decoded last. If either carries no
    /// identity, this is assumed.
    fn continues_tail(&self, at: usize) -> bool {
        match (self.tail_link, self.link(at)) {
            (Some(tail), Some(this)) => tail.next() == this,
            _ => true,
        }
    }

    fn link(&self, at: usize) -> Option<ChainLink> {
        let FrameIdentity {
            origin: Origin { publisher, track },
            frame,
            layer,
            ..
        } = self.identities[at];
        let link = ChainLink {
            publisher,
            frame,
            track,
            layer,
        };
        self.slots[at].has(IDENTIFIED).then_some(link)
    }

    /// Returns whether only padding is between the frame decoded last and `low`. A received packet
    /// that belongs to no frame is padding.
    fn follows_tail(&self, low: u64) -> bool {
        let next = self.tail + 1;
        if low <= next {
            return low == next;
        }
        let between = |at: usize| self.low(at) < low && self.high(at) >= next;
        (next..low).all(|ext| self.is_received(ext)) && !self.used().any(between)
    }

    fn decode_waiting(&mut self, now: Time, on_event: &mut impl FnMut(FrameEvent)) {
        while let Some(at) = self
            .used()
            .find(|&at| self.slots[at].has(COMPLETE) && self.is_decodable(at))
        {
            self.decode(at, now, on_event);
        }
    }

    fn decode(&mut self, at: usize, now: Time, on_event: &mut impl FnMut(FrameEvent)) {
        let FrameSlot { rtp_time, .. } = self.slots[at];
        let key = self.slots[at].has(KEY);
        self.tail_link = self.link(at);
        let intended_unix_us = self.slots[at]
            .has(IDENTIFIED)
            .then_some(self.identities[at].intended_unix_us);
        self.tail = self.high(at);
        self.floor = self.floor.max(self.tail);
        self.intact = true;
        self.inter_seen = false;
        if key {
            self.key_wanted = false;
            self.key_packet_at = None;
        }
        self.used &= !(1 << at);
        self.drop_passed();
        self.decoded += 1;
        let (interval, freeze) = self.freezes.handle_frame(now);
        on_event(FrameEvent::Decoded(DecodedFrame {
            rtp_time,
            key,
            layer: self.tail_link.map(|link| link.layer),
            intended_unix_us,
            decoded_at: now,
            interval,
            freeze,
        }));
    }

    /// Frees the slots of frames before the one decoded last.
    fn drop_passed(&mut self) {
        for at in self.used() {
            if self.low(at) <= self.tail {
                self.release(at);
            }
        }
    }

    /// Gives up a frame. Every frame after it needs a key frame.
    fn give_up(&mut self, at: usize) {
        let high = self.high(at);
        self.release(at);
        self.break_chain(high);
    }

    fn break_chain(&mut self, ext: u64) {
        self.floor = self.floor.max(ext);
        self.intact = false;
    }

    fn release(&mut self, at: usize) {
        if self.slots[at].has(COMPLETE) {
            self.undecodable += 1;
        } else {
            self.abandoned += 1;
        }
        self.used &= !(1 << at);
    }

    /// Returns whether a frame has been in progress for so long that its repair is hopeless.
    fn is_stalled(&self, now: Time) -> bool {
        let age = |at: usize| {
            Duration::from_micros(u64::from(
                micros(now).wrapping_sub(self.slots[at].first_arrival),
            ))
        };
        self.used().any(|at| age(at) >= STALL_MAX)
    }
}

fn place(ext: u64) -> (usize, u64) {
    ((ext % WINDOW / 64) as usize, 1 << (ext % 64))
}

fn micros(now: Time) -> u32 {
    now.as_micros() as u32
}

/// Number of intervals in the running average (libwebrtc; "Identifiers for WebRTC's Statistics API"
/// of the W3C, freezeCount).
const FREEZE_INTERVALS: usize = 30;
/// Minimum number of intervals before one is judged, as in libwebrtc.
const FREEZE_INTERVALS_MIN: usize = 5;
const FREEZE_EXCESS_MILLIS: u32 = 150;

/// Detects freezes by libwebrtc's rule. An interval between frames is a freeze from max(3 x
/// average, average + 150 ms) on. The interval itself counts in the average, and all values are
/// whole milliseconds.
#[derive(Clone)]
pub struct FreezeDetector {
    last: Option<Time>,
    sum_millis: u32,
    millis: [u16; FREEZE_INTERVALS],
    len: u8,
    at: u8,
}

impl Default for FreezeDetector {
    fn default() -> FreezeDetector {
        FreezeDetector {
            last: None,
            sum_millis: 0,
            millis: [0; FREEZE_INTERVALS],
            len: 0,
            at: 0,
        }
    }
}

impl FreezeDetector {
    /// Takes a decoded frame. Returns the interval since the previous one, and the same interval as
    /// a freeze if it was one.
    pub fn handle_frame(&mut self, now: Time) -> (Option<Duration>, Option<Duration>) {
        let Some(last) = self.last.replace(now) else {
            return (None, None);
        };
        let interval = now.since(last);
        let millis = u16::try_from(interval.as_millis()).unwrap_or(u16::MAX);
        self.add(millis);
        let average = self.sum_millis / u32::from(self.len);
        let limit = (3 * average).max(average + FREEZE_EXCESS_MILLIS);
        let frozen = usize::from(self.len) >= FREEZE_INTERVALS_MIN && u32::from(millis) >= limit;
        (Some(interval), frozen.then_some(interval))
    }

    /// Forgets the last frame, so that the gap to the next is not judged.
    pub fn handle_pause(&mut self) {
        self.last = None;
    }

    fn add(&mut self, millis: u16) {
        let at = usize::from(self.at);
        self.sum_millis = self.sum_millis - u32::from(self.millis[at]) + u32::from(millis);
        self.millis[at] = millis;
        self.at = ((at + 1) % FREEZE_INTERVALS) as u8;
        self.len = (self.len + 1).min(FREEZE_INTERVALS as u8);
    }
}

/// Number of frame numbers that [`DeliveredWindow`] looks back.
pub const DELIVERED_WINDOW: u32 = 512;

/// Result of [`DeliveredWindow::deliver`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    First,
    Duplicate,
    /// The frame is more than [`DELIVERED_WINDOW`] behind the newest, so it is not known whether it
    /// was delivered.
    TooOld,
}

/// Distinguishes a frame's first delivery from repeated ones, by the publisher's frame number.
///
/// Frame numbers only increase within one publication, so a new publication needs a new window.
/// Only pass identities that were checked, because a wrong number moves the window.
#[derive(Clone, Default)]
pub struct DeliveredWindow {
    seen: [u64; DELIVERED_WINDOW as usize / 64],
    range: Option<(u32, u32)>,
    first: u32,
    duplicate: u32,
    too_old: u32,
}

impl DeliveredWindow {
    pub fn deliver(&mut self, frame: u32) -> Delivery {
        let (oldest, newest) = *self.range.get_or_insert((frame, frame));
        let (word, bit) = (
            (frame % DELIVERED_WINDOW / 64) as usize,
            1u64 << (frame % 64),
        );
        if frame > newest {
            self.forget(newest, frame);
        } else if newest - frame >= DELIVERED_WINDOW {
            self.too_old += 1;
            return Delivery::TooOld;
        } else if self.seen[word] & bit != 0 {
            self.duplicate += 1;
            return Delivery::Duplicate;
        }
        self.range = Some((oldest.min(frame), newest.max(frame)));
        self.seen[word] |= bit;
        self.first += 1;
        Delivery::First
    }

    /// Returns whether a frame between delivered ones was not delivered.
    pub fn is_missing(&self, frame: u32) -> bool {
        let (word, bit) = (
            (frame % DELIVERED_WINDOW / 64) as usize,
            1u64 << (frame % 64),
        );
        self.range.is_some_and(|(oldest, newest)| {
            (oldest..newest).contains(&frame)
                && newest - frame < DELIVERED_WINDOW
                && self.seen[word] & bit == 0
        })
    }

    /// Returns the number of delivered frames, each counted once.
    pub fn delivered(&self) -> u64 {
        self.first.into()
    }

    pub fn duplicates(&self) -> u64 {
        self.duplicate.into()
    }

    pub fn too_old(&self) -> u64 {
        self.too_old.into()
    }

    /// Returns the lowest and the highest frame number that was delivered.
    pub fn range(&self) -> Option<(u32, u32)> {
        self.range
    }

    fn forget(&mut self, newest: u32, frame: u32) {
        if frame - newest >= DELIVERED_WINDOW {
            self.seen = [0; DELIVERED_WINDOW as usize / 64];
            return;
        }
        for passed in newest + 1..=frame {
            self.seen[(passed % DELIVERED_WINDOW / 64) as usize] &= !(1 << (passed % 64));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::seeded::Seeded;

    /// Packet on its way; `None` is padding.
    type Sent = (u64, Option<PacketInfo>);

    /// Makes frames of 1 to 12 packets, with some key frames and padding among them.
    fn stream(random: &mut Seeded, frames: u32, key_percent: u64) -> Vec<Sent> {
        let mut ext_seq = 70_000;
        let mut sent = Vec::new();
        for frame in 0..frames {
            let key = random.chance(key_percent) || frame == 0;
            let packets = 1 + random.below(12);
            for packet in 0..packets {
                let end = packet + 1 == packets;
                let identity = end.then(|| FrameIdentity {
                    frame,
                    ..FrameIdentity::default()
                });
                let rtp_time = frame.wrapping_mul(3_000).wrapping_sub(40_000);
                sent.push((
                    ext_seq,
                    Some(PacketInfo {
                        ext_seq,
                        rtp_time,
                        start: packet == 0,
                        end,
                        key: key && packet == 0,
                        identity,
                    }),
                ));
                ext_seq += 1;
            }
            for _ in 0..if random.chance(5) {
                1 + random.below(3)
            } else {
                0
            } {
                sent.push((ext_seq, None));
                ext_seq += 1;
            }
        }
        sent
    }

    /// Loses, duplicates and reorders packets. No packet comes more than `depth` late.
    fn link(random: &mut Seeded, sent: Vec<Sent>, loss_percent: u64, depth: u64) -> Vec<Sent> {
        let mut arriving = Vec::new();
        for (at, packet) in sent.into_iter().enumerate() {
            let copies = if random.chance(loss_percent) {
                0
            } else {
                1 + u64::from(random.chance(5))
            };
            for _ in 0..copies {
                arriving.push((at as u64 + random.below(depth), packet));
            }
        }
        arriving.sort_by_key(|(at, _)| *at);
        arriving.into_iter().map(|(_, packet)| packet).collect()
    }

    /// The same rules in a simple form, which forgets nothing that may still matter.
    #[derive(Default)]
    struct ReferenceAssembler {
        packets: BTreeMap<u64, Option<PacketInfo>>,
        complete: BTreeSet<u32>,
        tail: Option<u64>,
        events: Vec<(&'static str, u32)>,
    }

    impl ReferenceAssembler {
        fn handle(&mut self, (ext_seq, packet): Sent) {
            if self.packets.contains_key(&ext_seq) || self.tail.is_some_and(|tail| ext_seq <= tail)
            {
                return;
            }
            self.packets.insert(ext_seq, packet);
            if let Some(packet) = packet
                && self.whole(packet.rtp_time).is_some()
            {
                self.complete.insert(packet.rtp_time);
                self.events.push(("complete", packet.rtp_time));
            }
            while let Some(rtp_time) = self
                .complete
                .iter()
                .copied()
                .find(|&rtp_time| self.decodable(rtp_time))
            {
                self.tail = self.whole(rtp_time).map(|(_, high, _)| high);
                self.packets = self.packets.split_off(&(self.tail.unwrap() + 1));
                self.complete.remove(&rtp_time);
                self.events.push(("decoded", rtp_time));
            }
        }

        /// Returns the first and last packet and whether it is a key frame, if all packets are
        /// here.
        fn whole(&self, rtp_time: u32) -> Option<(u64, u64, bool)> {
            let frame: Vec<_> = self
                .packets
                .values()
                .flatten()
                .filter(|packet| packet.rtp_time == rtp_time)
                .collect();
            let (first, last) = (frame.first()?, frame.last()?);
            let whole =
                first.start && last.end && last.ext_seq - first.ext_seq + 1 == frame.len() as u64;
            whole.then_some((first.ext_seq, last.ext_seq, first.key))
        }

        fn decodable(&self, rtp_time: u32) -> bool {
            let Some((low, _, key)) = self.whole(rtp_time) else {
                return false;
            };
            let after_tail = self.tail.is_none_or(|tail| low > tail);
            let follows = self.tail.is_some_and(|tail| {
                (tail + 1..low).all(|ext| matches!(self.packets.get(&ext), Some(None)))
            });
            after_tail && (key || follows)
        }
    }

    fn feed(
        assembler: &mut Assembler,
        (ext_seq, packet): Sent,
        now: Time,
        mut on_event: impl FnMut(FrameEvent),
    ) {
        match packet {
            Some(packet) => assembler.handle_packet(&packet, now, &mut on_event),
            None => assembler.handle_padding(ext_seq, now, &mut on_event),
        }
    }

    #[test]
    fn a_shuffled_lossy_stream_gives_what_the_plain_model_gives() {
        for seed in 0..150 {
            let mut random = Seeded::new(seed);
            let (loss, depth, keys) =
                (random.below(12), 1 + random.below(25), 2 + random.below(20));
            let sent = stream(&mut random, 200, keys);
            let arriving = link(
                &mut random,
                sent,
                if seed % 5 == 0 { 0 } else { loss },
                depth,
            );
            let (mut assembler, mut reference, mut events) =
                (Assembler::new(), ReferenceAssembler::default(), Vec::new());
            for (at, packet) in arriving.into_iter().enumerate() {
                reference.handle(packet);
                feed(
                    &mut assembler,
                    packet,
                    Time::from_millis(at as u64),
                    |event| match event {
                        FrameEvent::Complete(frame) => {
                            assert_eq!(
                                frame.identity.map(|identity| identity
                                    .frame
                                    .wrapping_mul(3_000)
                                    .wrapping_sub(40_000)),
                                Some(frame.rtp_time)
                            );
                            assert!(frame.first_arrival <= frame.completed_at);
                            events.push(("complete", frame.rtp_time));
                        }
                        FrameEvent::Decoded(frame) => events.push(("decoded", frame.rtp_time)),
                    },
                );
            }
            assert_eq!(events, reference.events, "seed {seed}");
            let counts = assembler.counts();
            assert_eq!(
                counts.decoded,
                events.iter().filter(|event| event.0 == "decoded").count() as u64
            );
            if seed % 5 == 0 && depth == 1 {
                assert_eq!(counts.decoded, 200);
            }
        }
    }

    #[test]
    fn wild_packets_do_no_harm_and_the_counts_still_add_up() {
        for seed in 0..200 {
            let mut random = Seeded::new(seed);
            let mut assembler = Assembler::new();
            let (mut complete, mut decoded) = (0, 0);
            let mut ext_seq = 1 << 16;
            for step in 0..3_000 {
                ext_seq = match random.below(50) {
                    0 => random.draw(),
                    1 => ext_seq.saturating_add(random.below(3_000)),
                    2..10 => ext_seq.saturating_sub(random.below(40)),
                    _ => ext_seq.saturating_add(1),
                };
                let bits = random.draw();
                let packet = PacketInfo {
                    ext_seq,
                    rtp_time: random.below(30) as u32,
                    start: bits & 3 == 0,
                    end: bits & 12 == 0,
                    key: bits & 48 == 0,
                    identity: None,
                };
                let sent = (ext_seq, random.chance(95).then_some(packet));
                feed(
                    &mut assembler,
                    sent,
                    Time::from_millis(step * random.below(9)),
                    |event| match event {
                        FrameEvent::Complete(_) => complete += 1,
                        FrameEvent::Decoded(_) => decoded += 1,
                    },
                );
                assembler.poll_pli(Time::from_millis(step * 3));
            }
            let counts = assembler.counts();
            assert_eq!((counts.complete, counts.decoded), (complete, decoded));
            let waiting = assembler
                .used()
                .filter(|&at| assembler.slots[at].has(COMPLETE))
                .count() as u64;
            assert_eq!(complete, decoded + counts.undecodable + waiting);
        }
    }

    fn whole_frame(
        assembler: &mut Assembler,
        ext_seq: u64,
        key: bool,
        now: Time,
    ) -> Vec<FrameEvent> {
        let mut events = Vec::new();
        let packet = PacketInfo {
            ext_seq,
            rtp_time: ext_seq as u32 * 3_000,
            start: true,
            end: true,
            key,
            identity: None,
        };
        assembler.handle_packet(&packet, now, |event| events.push(event));
        events
    }

    #[test]
    fn a_repaired_frame_unlocks_the_row_that_waits_for_it() {
        let mut assembler = Assembler::new();
        whole_frame(&mut assembler, 100, true, Time::from_millis(0));
        for ext_seq in 102..110 {
            let events = whole_frame(&mut assembler, ext_seq, false, Time::from_millis(ext_seq));
            assert!(matches!(
                events[..],
                [FrameEvent::Complete(CompleteFrame {
                    decodable: false,
                    ..
                })]
            ));
        }
        assert!(!assembler.needs_key_frame(), "repair is under way");
        let events = whole_frame(&mut assembler, 101, false, Time::from_millis(200));
        assert!(matches!(
            events[0],
            FrameEvent::Complete(CompleteFrame {
                decodable: true,
                ..
            })
        ));
        assert_eq!(events.len(), 1 + 9);
    }

    #[test]
    fn an_inter_frame_whose_predecessor_an_sfu_left_out_is_not_decodable() {
        let identity = |layer, frame| FrameIdentity {
            layer,
            frame,
            ..FrameIdentity::default()
        };
        // The sequence numbers show none of these cases: the next frame of the same layer; layer 2
        // after layer 0 without a key frame; a frame left out; a frame without an identity.
        for (before, after, intact) in [
            (Some(identity(0, 4)), Some(identity(0, 5)), true),
            (Some(identity(0, 4)), Some(identity(2, 5)), false),
            (Some(identity(0, 4)), Some(identity(0, 6)), false),
            (Some(identity(0, 4)), None, true),
            (None, Some(identity(0, 6)), true),
        ] {
            let mut assembler = Assembler::new();
            let mut decoded = Vec::new();
            for (ext_seq, key, identity) in [
                (100, true, before),
                (101, false, after),
                (102, true, Some(identity(1, 9))),
            ] {
                let packet = PacketInfo {
                    ext_seq,
                    rtp_time: ext_seq as u32,
                    start: true,
                    end: true,
                    key,
                    identity,
                };
                assembler.handle_packet(&packet, Time::from_millis(ext_seq * 40), |event| {
                    decoded.extend(matches!(event, FrameEvent::Decoded(_)).then_some(ext_seq));
                });
                assert_eq!(
                    assembler.needs_key_frame(),
                    ext_seq == 101 && !intact,
                    "{before:?} {after:?}"
                );
            }
            let expected: &[u64] = if intact {
                &[100, 101, 102]
            } else {
                &[100, 102]
            };
            assert_eq!(decoded, expected, "{before:?} {after:?}");
        }
    }

    #[test]
    fn a_frame_that_never_comes_costs_a_pli_and_a_key_frame_mends_it() {
        let mut assembler = Assembler::new();
        whole_frame(&mut assembler, 100, true, Time::from_millis(0));
        let frames = 102..102 + SLOTS as u64 + 1;
        for ext_seq in frames.clone() {
            whole_frame(&mut assembler, ext_seq, false, Time::from_millis(ext_seq));
        }
        let now = Time::from_millis(frames.end);
        assert!(assembler.needs_key_frame());
        assert!(assembler.poll_pli(now));
        assert!(
            !assembler.poll_pli(now + PLI_RETRY / 2),
            "not again so soon"
        );
        assert!(assembler.poll_pli(now + PLI_RETRY));
        let events = whole_frame(&mut assembler, frames.end, true, now + PLI_RETRY);
        assert!(matches!(
            events[1],
            FrameEvent::Decoded(DecodedFrame { key: true, .. })
        ));
        assert!(!assembler.needs_key_frame());
        assert!(!assembler.poll_pli(now + PLI_RETRY * 3));
        assert_eq!(assembler.counts().undecodable, SLOTS as u64 + 1);
    }

    #[test]
    fn no_pli_is_sent_while_the_first_key_frame_comes_in() {
        let mut assembler = Assembler::new();
        let packet = |ext_seq, start| PacketInfo {
            ext_seq,
            rtp_time: 1,
            start,
            end: false,
            key: start,
            identity: None,
        };
        for at in 0..50 {
            let now = Time::from_millis(at * 20);
            assembler.handle_packet(&packet(100 + at, at == 0), now, |_| {});
            assert!(!assembler.poll_pli(now));
        }
        assert!(
            assembler.poll_pli(Time::from_millis(49 * 20) + PLI_RETRY),
            "it stopped half way"
        );
    }

    #[test]
    fn an_inter_frame_before_any_key_frame_asks_for_one_at_once() {
        let mut assembler = Assembler::new();
        assert!(
            !assembler.poll_pli(Time::from_millis(900)),
            "nothing came yet"
        );
        whole_frame(&mut assembler, 100, false, Time::from_millis(1_000));
        assert!(assembler.poll_pli(Time::from_millis(1_000)));
    }

    #[test]
    fn repair_that_gave_up_asks_for_a_key_frame_until_one_is_decoded() {
        let mut assembler = Assembler::new();
        whole_frame(&mut assembler, 100, true, Time::from_millis(0));
        assembler.handle_gave_up();
        assert!(assembler.poll_pli(Time::from_millis(10)));
        whole_frame(&mut assembler, 101, false, Time::from_millis(20));
        assert!(assembler.needs_key_frame());
        whole_frame(&mut assembler, 102, true, Time::from_millis(30));
        assert!(!assembler.needs_key_frame());
    }

    #[test]
    fn a_freeze_is_an_interval_far_above_the_running_average() {
        let mut freezes = FreezeDetector::default();
        let (mut now, mut plain) = (Time::ZERO, Vec::<u64>::new());
        let mut random = Seeded::new(5);
        assert_eq!(freezes.handle_frame(now), (None, None));
        let mut frozen = 0;
        for _ in 0..2_000 {
            let millis = if random.chance(3) {
                100 + random.below(400)
            } else {
                25 + random.below(20)
            };
            now += Duration::from_millis(millis);
            plain.push(millis);
            let window = &plain[plain.len().saturating_sub(30)..];
            let average = window.iter().sum::<u64>() / window.len() as u64;
            let expected = window.len() >= 5 && millis >= (3 * average).max(average + 150);
            let interval = Duration::from_millis(millis);
            assert_eq!(
                freezes.handle_frame(now),
                (Some(interval), expected.then_some(interval))
            );
            frozen += u32::from(expected);
        }
        assert!((20..80).contains(&frozen));
        freezes.handle_pause();
        assert_eq!(
            freezes.handle_frame(now + Duration::from_secs(60)),
            (None, None)
        );
    }

    #[test]
    fn a_second_delivery_is_told_from_the_first() {
        let mut random = Seeded::new(9);
        let mut window = DeliveredWindow::default();
        let (mut seen, mut newest, mut duplicates, mut too_old) = (BTreeSet::new(), 0, 0, 0);
        for step in 0..20_000u32 {
            let ahead = if random.chance(1) {
                random.below(2_000) as u32
            } else {
                0
            };
            let frame = (step + 1_000 + ahead)
                .max(newest)
                .saturating_sub(random.below(700) as u32);
            let expected = if newest.saturating_sub(frame) >= DELIVERED_WINDOW && !seen.is_empty() {
                too_old += 1;
                Delivery::TooOld
            } else if seen.insert(frame) {
                Delivery::First
            } else {
                duplicates += 1;
                Delivery::Duplicate
            };
            if expected == Delivery::First {
                newest = newest.max(frame);
            }
            assert_eq!(window.deliver(frame), expected, "frame {frame}");
        }
        assert_eq!(
            (window.delivered(), window.duplicates(), window.too_old()),
            (seen.len() as u64, duplicates, too_old)
        );
        assert_eq!(window.range(), Some((*seen.first().unwrap(), newest)));
        assert_eq!(
            DeliveredWindow::default().deliver(u32::MAX),
            Delivery::First
        );
    }

    #[test]
    fn the_state_stays_small() {
        assert!(size_of::<Assembler>() <= 976, "{}", size_of::<Assembler>());
        assert!(
            size_of::<DeliveredWindow>() <= 96,
            "{}",
            size_of::<DeliveredWindow>()
        );
    }
}
