//! Every count and time as it ought to be, computed from the log of the wire by the definitions in
//! docs/metrics.md. No computation of the product is used.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use throng::units::Time;

use crate::common::tapped::{Content, Control, Direction, Entry, Rtp};

/// One stream on one client's leg.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    pub client: usize,
    /// Direction of its media. Requests and reports go the other way.
    pub direction: Direction,
    pub ssrc: Ssrc,
    pub rtx_ssrc: Option<Ssrc>,
    pub clock_rate: u32,
}

/// A frame as its publisher sent it.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Last bytes of each payload, by packet index. No server changes them.
    pub packets: BTreeMap<u64, Vec<u8>>,
    pub key: bool,
}

/// What a publisher put on the wire for one stream.
#[derive(Clone, Debug, Default)]
pub struct Sent {
    pub packets: u64,
    pub bytes: u64,
    pub resent: u64,
    /// Frames in the order of sending.
    pub frames: Vec<Frame>,
}

/// What a receiver (a subscriber or the server) got of one stream, by the definitions.
#[derive(Clone, Debug, Default)]
pub struct Received {
    pub packets: u64,
    pub bytes: u64,
    pub rtx: u64,
    pub lost_network: u64,
    pub repaired: u64,
    pub lost: u64,
    pub duplicate: u64,
    pub reordered: u64,
    /// Times from a loss to its repair, for packets that came within a second and before they were
    /// given up after their tenth request.
    pub loss_to_repair: Vec<Duration>,
    /// Jitter at each report of the subscriber, and at the end.
    pub jitter: Vec<Duration>,
    /// When each packet came first, and its place among all arrivals, by packet index.
    came: BTreeMap<u64, (Time, usize)>,
}

/// What a subscriber got of a publisher's frames.
#[derive(Clone, Debug, Default)]
pub struct Delivered {
    pub expected: u64,
    /// Place of each frame among the publisher's frames, and the time at which it was whole.
    pub frames: Vec<(usize, Time)>,
}

const TICK: Duration = Duration::from_millis(1);
/// Maximum number of requests for a packet. [`REPAIR_MAX`] is the time for which it is waited for.
const REQUESTS_MAX: usize = 10;
const REPAIR_MAX: Duration = Duration::from_secs(1);
/// Maximum number of video frames that are kept until they are whole or can be decoded.
const FRAMES_WAITING_MAX: usize = 16;

/// Number of bytes at the end of a payload that identify it: the frame's trailer, or the whole
/// payload if that is shorter.
const TAIL: usize = 24;

fn tail(payload: &[u8]) -> Vec<u8> {
    payload[payload.len().saturating_sub(TAIL)..].to_vec()
}

fn rtp_of(
    log: &[Entry],
    client: usize,
    direction: Direction,
    ssrc: Ssrc,
) -> impl Iterator<Item = (&Entry, &Rtp)> {
    log.iter()
        .filter(move |entry| entry.client == client && entry.direction == direction)
        .filter_map(move |entry| {
            entry
                .rtp()
                .filter(|rtp| rtp.ssrc == ssrc)
                .map(|rtp| (entry, rtp))
        })
}

pub fn sent(log: &[Entry], stream: Stream) -> Sent {
    let mut sent = Sent::default();
    let mut seen = BTreeSet::new();
    let mut last_time = None;
    for (_, rtp) in rtp_of(log, stream.client, Direction::Up, stream.ssrc) {
        if !seen.insert(rtp.index) {
            // Without an RTX stream, a retransmission has the same number.
            sent.resent += 1;
            continue;
        }
        sent.packets += 1;
        sent.bytes += rtp.bytes;
        if last_time.replace(rtp.rtp_time) != Some(rtp.rtp_time) {
            sent.frames.push(Frame {
                packets: BTreeMap::new(),
                key: stream.rtx_ssrc.is_some() && starts_key_frame(&rtp.payload),
            });
        }
        let frame = sent
            .frames
            .last_mut()
            .expect("pushed with its first packet");
        frame.packets.insert(rtp.index, tail(&rtp.payload));
    }
    if let Some(rtx_ssrc) = stream.rtx_ssrc {
        sent.resent = rtp_of(log, stream.client, Direction::Up, rtx_ssrc).count() as u64;
    }
    sent
}

/// Returns whether a payload starts a key frame: by the descriptor's S bit in partition 0 (RFC
/// 7741), and by the inverse key frame bit of the frame's first byte (RFC 6386).
fn starts_key_frame(payload: &[u8]) -> bool {
    let first = payload[0];
    let mut at = 1;
    if first & 0x80 != 0 {
        let extension = payload[1];
        at = 2;
        if extension & 0x80 != 0 {
            at += if payload[at] & 0x80 != 0 { 2 } else { 1 };
        }
        at += usize::from(extension & 0x40 != 0) + usize::from(extension & 0x30 != 0);
    }
    first & 0x17 == 0x10 && payload[at] & 1 == 0
}

/// One copy of a packet that reached its receiver.
struct Came<'a> {
    at: Time,
    entry: &'a Entry,
    rtp: &'a Rtp,
    /// Whether it is a second copy of the same datagram.
    copy: bool,
    is_rtx: bool,
}

impl Came<'_> {
    /// Returns the time at which the receiver looked at it. Each millisecond the ends have their
    /// turn, first for what has come, then for what they send. What they send is under way for at
    /// least one tick, however short the wire.
    fn taken_at(&self) -> Time {
        self.at.next_whole(TICK).max(self.entry.at + TICK)
    }
}

fn arrivals(log: &[Entry], stream: Stream) -> Vec<Came<'_>> {
    let mut came = Vec::new();
    for ssrc in [Some(stream.ssrc), stream.rtx_ssrc].into_iter().flatten() {
        for (entry, rtp) in rtp_of(log, stream.client, stream.direction, ssrc) {
            let of = |(copy, at): (usize, &Time)| Came {
                at: *at,
                entry,
                rtp,
                copy: copy > 0,
                is_rtx: ssrc != stream.ssrc,
            };
            came.extend(entry.arrived.iter().enumerate().map(of));
        }
    }
    // Packets of one moment arrive in the order of sending, which is the order of the log.
    came.sort_by_key(|came| (came.at, std::ptr::from_ref(came.entry) as usize, came.copy));
    came
}

pub fn received(log: &[Entry], stream: Stream) -> Received {
    received_until(log, stream, Time::MAX)
}

/// Returns the number of packets that the receiver knew to be lost when it wrote the last report
/// that the sender got.
pub fn reported_lost(log: &[Entry], stream: Stream) -> u64 {
    let is_about =
        |control: &Control| matches!(control, Control::Block(block) if block.ssrc == stream.ssrc);
    let mut reports = log
        .iter()
        .filter(|entry| is_from_receiver(entry, stream) && entry.control().iter().any(is_about));
    let last = reports.rfind(|entry| !entry.arrived.is_empty());
    last.map_or(0, |report| {
        received_until(log, stream, report.at).lost_network
    })
}

fn received_until(log: &[Entry], stream: Stream, end: Time) -> Received {
    let mut came = arrivals(log, stream);
    came.retain(|came| came.taken_at() <= end);
    let mut account = Received::default();
    let asked = asked_for(log, stream);
    // How each packet came: as an original (false), or only as a retransmission (true).
    let mut first_came: BTreeMap<u64, bool> = BTreeMap::new();
    let mut rtx_seen = BTreeSet::new();
    let mut jitter = Jitter::new(stream.clock_rate);
    let Some(lowest) = came
        .iter()
        .filter(|came| !came.is_rtx)
        .map(|came| came.rtp.index)
        .min()
    else {
        return account;
    };
    let mut noticed: BTreeMap<u64, Time> = BTreeMap::new();
    let mut highest = None;
    let mut reports = reports_about(log, stream).into_iter().peekable();
    for (ordinal, packet) in came.into_iter().enumerate() {
        let taken_at = packet.taken_at();
        let Came {
            at, rtp, is_rtx, ..
        } = packet;
        while reports.next_if(|report| *report < taken_at).is_some() {
            account.jitter.push(jitter.value());
        }
        let index = if is_rtx {
            if !rtx_seen.insert(rtp.index) {
                account.duplicate += 1;
                continue;
            }
            account.rtx += 1;
            // RFC 4588: the original number comes first. All numbers of a test lie within less than
            // one wrap.
            let Some(osn) = rtp.payload.get(..2) else {
                continue;
            };
            let near = highest.unwrap_or(lowest) as i64;
            (near
                + i64::from(u16::from_be_bytes([osn[0], osn[1]]).wrapping_sub(near as u16) as i16))
                as u64
        } else {
            rtp.index
        };
        if index < lowest || highest.is_none() && is_rtx {
            continue;
        }
        let after_a_higher = highest.is_some_and(|highest| index < highest);
        // The packets between the highest number so far and this one are found missing now.
        if let Some(highest) = highest {
            noticed.extend((highest + 1..index).map(|missing| (missing, at)));
        }
        highest = highest.max(Some(index));
        match first_came.get_mut(&index) {
            // The original comes after its retransmission. The network did not lose it, and the
            // retransmission was not needed.
            Some(repaired @ true) if stream.rtx_ssrc.is_some() && !is_rtx => {
                *repaired = false;
                account.duplicate += 1;
                account.packets += 1;
                account.bytes += rtp.bytes;
                account.reordered += 1;
            }
            Some(_) => account.duplicate += 1,
            None => {
                let requests = asked.get(&(index as u16)).map_or(&[][..], |asked| {
                    &asked[..asked.partition_point(|asked| *asked < taken_at)]
                });
                let was_asked_for = !requests.is_empty();
                let repaired =
                    is_rtx || after_a_higher && stream.rtx_ssrc.is_none() && was_asked_for;
                first_came.insert(index, repaired);
                account.came.insert(index, (at, ordinal));
                if repaired {
                    account.rtx += u64::from(!is_rtx);
                    let took = noticed.get(&index).map(|noticed| at.since(*noticed));
                    account.loss_to_repair.extend(
                        took.filter(|took| *took < REPAIR_MAX && !is_given_up(requests, taken_at)),
                    );
                } else {
                    account.packets += 1;
                    account.bytes += rtp.bytes;
                    account.reordered += u64::from(after_a_higher);
                    if !after_a_higher {
                        jitter.take(rtp.rtp_time, at);
                    }
                }
            }
        }
    }
    let reports_left = reports.count();
    account
        .jitter
        .extend(std::iter::repeat_n(jitter.value(), reports_left + 1));
    account.repaired = first_came.values().filter(|repaired| **repaired).count() as u64;
    account.lost_network = highest.map_or(0, |highest| highest - lowest + 1) - account.packets;
    account.lost = account.lost_network - account.repaired;
    account
}

/// Returns whether a packet has been given up. After its last request it is waited for as long as
/// between the last two requests.
fn is_given_up(requests: &[Time], now: Time) -> bool {
    match requests {
        [.., before, last] if requests.len() == REQUESTS_MAX => now > *last + last.since(*before),
        _ => false,
    }
}

fn is_from_receiver(entry: &Entry, stream: Stream) -> bool {
    entry.client == stream.client && entry.direction != stream.direction
}

/// Returns the times at which each sequence number was requested.
fn asked_for(log: &[Entry], stream: Stream) -> BTreeMap<u16, Vec<Time>> {
    let mut asked: BTreeMap<u16, Vec<Time>> = BTreeMap::new();
    for entry in log.iter().filter(|entry| is_from_receiver(entry, stream)) {
        for control in entry.control() {
            if let Control::Nack { media_ssrc, seqs } = control
                && *media_ssrc == stream.ssrc
            {
                seqs.iter()
                    .for_each(|seq| asked.entry(*seq).or_default().push(entry.at));
            }
        }
    }
    asked
}

/// Returns the times at which the subscriber reported on a stream. A report includes what arrived
/// at the same moment.
fn reports_about(log: &[Entry], stream: Stream) -> Vec<Time> {
    let is_about =
        |control: &Control| matches!(control, Control::Block(block) if block.ssrc == stream.ssrc);
    log.iter()
        .filter(|entry| is_from_receiver(entry, stream) && entry.control().iter().any(is_about))
        .map(|entry| entry.at)
        .collect()
}

/// Returns which of the publisher's frames came whole. The server renumbers packets by one constant
/// as long as it drops none.
pub fn delivered(
    log: &[Entry],
    stream: Stream,
    published: &Sent,
    received: &Received,
) -> Delivered {
    let mut account = Delivered::default();
    let packets = || published.frames.iter().flat_map(|frame| &frame.packets);
    let of_server = || rtp_of(log, stream.client, stream.direction, stream.ssrc);
    // The last bytes of a frame's last packet are like no other's.
    let Some((_, last)) = of_server().find(|(_, rtp)| rtp.marker || stream.rtx_ssrc.is_none())
    else {
        return account;
    };
    let (index, _) = packets()
        .find(|(_, end)| **end == tail(&last.payload))
        .expect("a packet of the publisher's");
    let offset = last.index.wrapping_sub(*index);
    let by_index: BTreeMap<u64, &Vec<u8>> = packets().map(|(index, end)| (*index, end)).collect();
    for (_, rtp) in of_server() {
        assert_eq!(
            by_index[&rtp.index.wrapping_sub(offset)],
            &tail(&rtp.payload),
            "the server keeps order, gaps and payload"
        );
    }
    let came: Vec<Vec<Option<(Time, usize)>>> = published
        .frames
        .iter()
        .map(|frame| {
            frame
                .packets
                .keys()
                .map(|index| received.came.get(&index.wrapping_add(offset)).copied())
                .collect()
        })
        .collect();
    let whole_at = |place: usize| {
        came[place]
            .iter()
            .copied()
            .collect::<Option<Vec<_>>>()?
            .into_iter()
            .max()
    };
    for place in 0..came.len() {
        let Some(at) = whole_at(place) else { continue };
        let newer = || place + 1..came.len();
        let begun = newer()
            .filter(|newer| came[*newer].iter().flatten().any(|came| *came < at))
            .count();
        let replaced = newer().any(|newer| {
            published.frames[newer].key && whole_at(newer).is_some_and(|key_at| key_at < at)
        });
        if stream.rtx_ssrc.is_none() || begun < FRAMES_WAITING_MAX && !replaced {
            account.frames.push((place, at.0));
        }
    }
    let first = account.frames.iter().map(|(place, _)| *place).min();
    account.expected = first.map_or(0, |first| (published.frames.len() - first) as u64);
    account
}

/// Jitter by RFC 3550, section 6.4.1, in floating point.
struct Jitter {
    clock_rate: f64,
    last: Option<(u32, Time)>,
    value: f64,
}

impl Jitter {
    fn new(clock_rate: u32) -> Jitter {
        Jitter {
            clock_rate: clock_rate.into(),
            last: None,
            value: 0.0,
        }
    }

    fn take(&mut self, rtp_time: u32, at: Time) {
        let Some((last_time, last_at)) = self.last else {
            self.last = Some((rtp_time, at));
            return;
        };
        // The packets of one frame leave at different times on purpose, so only one packet of each
        // timestamp counts.
        if rtp_time == last_time {
            return;
        }
        let apart = (at.as_nanos() as f64 - last_at.as_nanos() as f64) / 1e9
            - f64::from(rtp_time.wrapping_sub(last_time) as i32) / self.clock_rate;
        self.value += (apart.abs() - self.value) / 16.0;
        self.last = Some((rtp_time, at));
    }

    fn value(&self) -> Duration {
        Duration::from_secs_f64(self.value)
    }
}

/// What a client's control traffic says.
#[derive(Clone, Debug, Default)]
pub struct Feedback {
    pub nacks_sent: u64,
    pub nacks_received: u64,
    pub plis_sent: u64,
    pub plis_received: u64,
    /// Number of second copies of control packets. They are replays.
    pub replayed: u64,
    /// Round trips that follow from reports: the time under way in both directions, without the
    /// time that the other end kept the report.
    pub round_trips: Vec<Duration>,
    /// Times from STUN checks to their answers. Each copy of an answer counts.
    pub checks: Vec<Duration>,
    pub wire_bytes_sent: u64,
    pub wire_bytes_received: u64,
}

pub fn feedback(log: &[Entry], client: usize) -> Feedback {
    let mut account = Feedback::default();
    // How long each of our reports was under way, by the middle of its NTP time, which the other
    // end's answer repeats.
    let mut stamped: BTreeMap<u32, Duration> = BTreeMap::new();
    let mut asked: BTreeMap<[u8; 12], Time> = BTreeMap::new();
    for entry in log
        .iter()
        .filter(|entry| entry.client == client && entry.direction == Direction::Up)
    {
        account.wire_bytes_sent += entry.wire_bytes;
        if let Content::Stun {
            answers: false,
            transaction,
        } = entry.content
        {
            asked.insert(transaction, entry.at);
        }
        for control in entry.control() {
            match control {
                Control::Nack { .. } => account.nacks_sent += 1,
                Control::Pli { .. } => account.plis_sent += 1,
                Control::SenderReport { ntp } | Control::ReferenceTime { ntp } => {
                    stamped.extend(
                        entry
                            .arrived
                            .first()
                            .map(|at| ((ntp >> 16) as u32, at.since(entry.at))),
                    );
                }
                _ => {}
            }
        }
    }
    let mut down: Vec<(&Entry, Time)> = log
        .iter()
        .filter(|entry| entry.client == client && entry.direction == Direction::Down)
        .inspect(|entry| {
            account.wire_bytes_received += entry.wire_bytes * entry.arrived.len() as u64
        })
        .filter_map(|entry| Some((entry, *entry.arrived.first()?)))
        .collect();
    down.sort_by_key(|(_, at)| *at);
    for (entry, at) in down {
        if let Content::Stun {
            answers: true,
            transaction,
        } = entry.content
            && let Some(asked) = asked.get(&transaction)
        {
            account
                .checks
                .extend(entry.arrived.iter().map(|at| at.since(*asked)));
        }
        if matches!(entry.content, Content::Rtcp(_)) {
            account.replayed += entry.arrived.len() as u64 - 1;
        }
        for control in entry.control() {
            let answers = match control {
                Control::Nack { .. } => {
                    account.nacks_received += 1;
                    continue;
                }
                Control::Pli { .. } => {
                    account.plis_received += 1;
                    continue;
                }
                Control::Block(block) => block.lsr,
                Control::Dlrr { last_rr, .. } => *last_rr,
                _ => continue,
            };
            account.round_trips.extend(
                stamped
                    .get(&answers)
                    .map(|there| *there + at.since(entry.at)),
            );
        }
    }
    account
}
