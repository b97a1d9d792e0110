//! Puts the packets of one received stream in order and makes the frames for its file.
//!
//! It takes packets in any order, each once. It returns video frames as a decoder would get them,
//! and Opus packets in sequence, with timestamps that count from the first. Its memory is bounded,
//! and its clock is the packets' arrival.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::tap::TappedPacket;
use crate::codec::Codec;
use crate::codec::red::RedPayload;
use crate::media::assemble::{Assembler, FrameEvent, PacketInfo};
use crate::media::identity::FrameIdentity;
use crate::units::Time;

/// Time to wait for a missing packet. Repair goes on for a second after a loss was found; packets
/// that have not come by then will not come.
const REORDER_WAIT: Duration = Duration::from_millis(1_500);
/// Maximum number of packets kept of a stream. The engine itself distinguishes late packets from
/// duplicates this far back.
const KEPT_MAX: u64 = 1_024;
/// Limit of the difference between RTP time and arrival. Beyond it, the sender has restarted its
/// clock.
const STEP_MAX: Duration = Duration::from_secs(5);

/// Frame for the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamFrame<'a> {
    /// Time since the first frame, in units of the RTP clock.
    pub at: u64,
    pub bytes: &'a [u8],
    pub identity: Option<FrameIdentity>,
}

/// RTP time without wraps and restarts.
struct RtpTimeline {
    clock_rate: u32,
    last: Option<(u32, Time)>,
    at: u64,
}

impl RtpTimeline {
    fn new(clock_rate: u32) -> RtpTimeline {
        RtpTimeline {
            clock_rate,
            last: None,
            at: 0,
        }
    }

    fn place(&mut self, rtp_time: u32, arrival: Time) -> u64 {
        if let Some((last, last_arrival)) = self.last.replace((rtp_time, arrival)) {
            let step = rtp_time.wrapping_sub(last).cast_signed();
            let elapsed = self.ticks(arrival.since(last_arrival));
            let plausible = u64::try_from(step)
                .ok()
                .filter(|step| *step > 0 && step.abs_diff(elapsed) <= self.ticks(STEP_MAX));
            // Two frames never have the same time.
            self.at += plausible.unwrap_or(elapsed.max(1));
        }
        self.at
    }

    fn ticks(&self, time: Duration) -> u64 {
        (time.as_nanos() * u128::from(self.clock_rate) / 1_000_000_000) as u64
    }
}

/// Frames that a decoder would get, by the same rule by which the report counts them.
pub struct VideoStream {
    assembler: Assembler,
    newest: u64,
    codec: Codec,
    /// Packets by sequence number: RTP time, and the codec's data without the payload descriptor.
    packets: BTreeMap<u64, (u32, Box<[u8]>)>,
    /// Complete frames by the number of their last packet, until they can be decoded.
    whole: BTreeMap<u64, (u32, Vec<u8>)>,
    timeline: RtpTimeline,
}

impl VideoStream {
    pub fn new(codec: Codec) -> VideoStream {
        VideoStream {
            codec,
            assembler: Assembler::new(),
            newest: 0,
            packets: BTreeMap::new(),
            whole: BTreeMap::new(),
            timeline: RtpTimeline::new(codec.clock_rate()),
        }
    }

    pub fn handle_packet(
        &mut self,
        packet: &TappedPacket,
        payload: &[u8],
        mut on_frame: impl FnMut(StreamFrame<'_>),
    ) {
        self.newest = self.newest.max(packet.ext_seq);
        let mut events = Vec::new();
        match self.codec.depacketize(payload, packet.marker) {
            Some(read) => {
                let body = payload.get(usize::from(read.body_at)..).unwrap_or_default();
                let info = PacketInfo {
                    ext_seq: packet.ext_seq,
                    rtp_time: packet.rtp_time,
                    start: read.start,
                    end: read.end,
                    key: read.key,
                    identity: None,
                };
                self.packets
                    .insert(packet.ext_seq, (packet.rtp_time, body.into()));
                self.assembler
                    .handle_packet(&info, packet.arrival, |event| events.push(event));
            }
            None => self
                .assembler
                .handle_padding(packet.ext_seq, packet.arrival, |event| events.push(event)),
        }
        for event in events {
            match event {
                FrameEvent::Complete(frame) => self.gather(frame.rtp_time),
                FrameEvent::Decoded(frame) => {
                    self.give(frame.rtp_time, frame.decoded_at, &mut on_frame)
                }
            }
        }
        self.forget(self.newest.saturating_sub(KEPT_MAX));
    }

    /// Returns the number of complete frames that no decoder could have shown.
    pub fn undecodable(&self) -> u64 {
        let counts = self.assembler.counts();
        counts.complete - counts.decoded
    }

    fn gather(&mut self, rtp_time: u32) {
        let (mut last, mut bytes) = (0, Vec::new());
        for (seq, (_, body)) in self
            .packets
            .extract_if(.., |_, (time, _)| *time == rtp_time)
        {
            last = seq;
            bytes.extend_from_slice(&body);
        }
        self.whole.insert(last, (rtp_time, bytes));
    }

    fn give(
        &mut self,
        rtp_time: u32,
        decoded_at: Time,
        on_frame: &mut impl FnMut(StreamFrame<'_>),
    ) {
        let Some((&last, _)) = self.whole.iter().find(|(_, (time, _))| *time == rtp_time) else {
            return;
        };
        let (_, bytes) = self.whole.remove(&last).unwrap_or_default();
        on_frame(StreamFrame {
            at: self.timeline.place(rtp_time, decoded_at),
            identity: FrameIdentity::parse_video(&bytes),
            bytes: &bytes,
        });
        self.forget(last);
    }

    /// Drops packets and frames up to `seq`, which come too late to be used.
    fn forget(&mut self, seq: u64) {
        drop_up_to(&mut self.packets, seq);
        drop_up_to(&mut self.whole, seq);
    }
}

fn drop_up_to<T>(map: &mut BTreeMap<u64, T>, key: u64) {
    while map
        .first_key_value()
        .is_some_and(|(first, _)| *first <= key)
    {
        map.pop_first();
    }
}

/// Opus packets in sequence.
pub struct AudioStream {
    /// Sequence number that the next packet should have.
    next: Option<u64>,
    newest_arrival: Time,
    waiting: BTreeMap<u64, WaitingPacket>,
    /// Last packets that were recovered from another packet. The packets themselves may still come.
    recovered: BTreeSet<u64>,
    timeline: RtpTimeline,
    late: u64,
}

struct WaitingPacket {
    rtp_time: u32,
    arrival: Time,
    payload: Box<[u8]>,
    /// Whether the payload came with another packet.
    is_recovered: bool,
}

impl AudioStream {
    pub fn new() -> AudioStream {
        AudioStream {
            next: None,
            newest_arrival: Time::ZERO,
            waiting: BTreeMap::new(),
            recovered: BTreeSet::new(),
            timeline: RtpTimeline::new(Codec::Opus.clock_rate()),
            late: 0,
        }
    }

    pub fn handle_packet(
        &mut self,
        packet: &TappedPacket,
        payload: &[u8],
        mut on_frame: impl FnMut(StreamFrame<'_>),
    ) {
        if self.next.is_some_and(|next| packet.ext_seq < next) {
            self.late += u64::from(!self.recovered.remove(&packet.ext_seq));
            return;
        }
        self.newest_arrival = self.newest_arrival.max(packet.arrival);
        self.put(packet, payload);
        while let Some((&seq, first)) = self.waiting.first_key_value() {
            let follows = self.next.is_none_or(|next| next == seq);
            let waited = self.newest_arrival.since(first.arrival) >= REORDER_WAIT;
            if !follows && !waited && (self.waiting.len() as u64) < KEPT_MAX {
                return;
            }
            self.give_first(&mut on_frame);
        }
    }

    /// Queues the packet, and the packets that it repeats if they have not come.
    fn put(&mut self, packet: &TappedPacket, payload: &[u8]) {
        let red = RedPayload::parse(payload).filter(|_| packet.codec == Codec::Red);
        let waiting = |rtp_time, payload: &[u8], is_recovered| WaitingPacket {
            rtp_time,
            arrival: packet.arrival,
            payload: payload.into(),
            is_recovered,
        };
        let own = match (packet.codec, red) {
            (Codec::Red, Some(red)) => red.primary,
            // The packet is padding, or broken. It only occupies its sequence number.
            (Codec::Red, None) => &[],
            _ => payload,
        };
        self.waiting
            .insert(packet.ext_seq, waiting(packet.rtp_time, own, false));
        let Some(next) = self.next else {
            return;
        };
        for block in red.iter().flat_map(RedPayload::redundant) {
            let seq = packet.ext_seq.saturating_sub(block.distance.into());
            if seq >= next {
                let rtp_time = packet.rtp_time.wrapping_sub(block.rtp_offset);
                self.waiting
                    .entry(seq)
                    .or_insert_with(|| waiting(rtp_time, block.payload, true));
            }
        }
    }

    /// Returns the packets that still wait for an earlier one.
    pub fn finish(&mut self, mut on_frame: impl FnMut(StreamFrame<'_>)) {
        while !self.waiting.is_empty() {
            self.give_first(&mut on_frame);
        }
    }

    /// Returns the number of packets that came after a later one had been written.
    pub fn late(&self) -> u64 {
        self.late
    }

    fn give_first(&mut self, on_frame: &mut impl FnMut(StreamFrame<'_>)) {
        let Some((
            seq,
            WaitingPacket {
                rtp_time,
                arrival,
                payload,
                is_recovered,
            },
        )) = self.waiting.pop_first()
        else {
            return;
        };
        self.next = Some(seq + 1);
        if is_recovered {
            self.recovered.insert(seq);
            if self.recovered.len() as u64 > KEPT_MAX {
                self.recovered.pop_first();
            }
        }
        // A packet without payload only occupies its sequence number.
        if !payload.is_empty() {
            let at = self.timeline.place(rtp_time, arrival);
            on_frame(StreamFrame {
                at,
                bytes: &payload,
                identity: FrameIdentity::parse_audio(&payload),
            });
        }
    }
}
