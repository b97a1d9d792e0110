//! Attributes the missing frames of a subscription: where each frame that it ought to have received
//! was lost.
//!
//! There are two witnesses. The subscriber sees whether sequence numbers are missing at the place
//! of the missing frames: if none is, the SFU never sent them. The publisher knows which frames the
//! server never received ([`super::uplink`]): these count for the uplink, whether or not the SFU
//! leaves the gap visible. A frame that neither witness can place stays unattributed. The state is
//! flat and bounded; nothing here allocates.

use std::time::Duration;

use super::Roster;
use super::uplink::Lacks;
use crate::media::identity::{FrameIdentity, Origin};
use crate::net;
use crate::transport::receive::{ReceiveStream, WINDOW};
use crate::units::Time;

/// Maximum number of gaps that wait for repair at the same time. With heavier loss the oldest gap
/// is settled early, and the count is corrected if its frames still arrive.
const GAPS_MAX: usize = 12;

/// Age at which a gap is settled. Nothing is repaired after this time: NACKs end a second after the
/// loss was noticed, and retransmissions take a round trip.
const SETTLE_AFTER: Duration = Duration::from_secs(2);

/// Margin before the end of the remembered sequence numbers at which a gap is settled. A frame has
/// fewer packets than this.
const WINDOW_MARGIN: u64 = 256;

/// Numbers of lost frames, by the place where they were lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Losses {
    /// Frames that were never made: the source was gone although the plan meant it to send.
    pub source: u64,
    pub uplink: u64,
    pub sfu: u64,
    pub downlink: u64,
    /// Known only at the end.
    pub unattributed: u64,
}

impl Losses {
    pub fn add(&mut self, others: &Losses) {
        self.uplink += others.uplink;
        self.sfu += others.sfu;
        self.downlink += others.downlink;
        self.unattributed += others.unattributed;
    }
}

/// Position of a delivered frame among the publisher's frames and among the stream's packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlacedFrame {
    pub layer: u8,
    pub frame: u32,
    /// Unwrapped sequence number.
    pub first_seq: u64,
    pub last_seq: u64,
}

/// Publisher of the frames, and the roster that knows it.
#[derive(Clone, Copy)]
pub struct FrameOrigin<'a> {
    pub roster: &'a Roster,
    pub origin: Origin,
}

/// Missing frames between two delivered frames.
#[derive(Clone, Copy, Default)]
struct FrameGap {
    first_frame: u32,
    missing: u32,
    /// Low halves of two unwrapped sequence numbers: the last packet before the gap and the first
    /// packet after it.
    before: u32,
    after: u32,
    noticed_ms: u32,
    layer: u8,
}

impl FrameGap {
    fn age(&self, now: Time) -> Duration {
        Duration::from_millis(
            (now.as_millis() as u32)
                .wrapping_sub(self.noticed_ms)
                .into(),
        )
    }

    /// Returns the unwrapped sequence numbers of the two packets next to the gap. `newest` is an
    /// unwrapped number that is newer than both.
    fn between(&self, newest: u64) -> (u64, u64) {
        let unwrap = |low: u32| newest - u64::from((newest as u32).wrapping_sub(low));
        (unwrap(self.before), unwrap(self.after))
    }

    fn holds(&self, frame: &PlacedFrame, newest: u64) -> bool {
        let (before, after) = self.between(newest);
        let number = frame.frame.wrapping_sub(self.first_frame);
        frame.layer == self.layer
            && number < self.missing
            && frame.first_seq > before
            && frame.last_seq < after
    }
}

/// The missing frames of one received stream. Fields that every frame needs come first.
#[derive(Default)]
#[repr(C)]
pub struct Attribution {
    /// The delivered frame with the highest sequence number. This order is also the order in time.
    newest: Option<PlacedFrame>,
    len: u8,
    /// Sequence number of the first packet of the first delivered frame.
    oldest_seq: u64,
    uplink: u32,
    sfu: u32,
    downlink: u32,
    /// Oldest first.
    gaps: [FrameGap; GAPS_MAX],
}

impl Attribution {
    /// Prefetches what the next frame will need.
    pub fn prefetch(&self) {
        net::prefetch(self, std::mem::offset_of!(Attribution, gaps));
    }

    /// Takes a frame that was delivered for the first time. If the frame is of another layer than
    /// the one before, `withheld` returns how many frames of the earlier layer are missing.
    pub fn deliver(
        &mut self,
        frame: PlacedFrame,
        withheld: impl FnOnce() -> u64,
        stream: &ReceiveStream,
        origin: FrameOrigin<'_>,
        now: Time,
    ) {
        self.settle_due(stream, origin, now);
        let Some(newest) = self.newest else {
            (self.oldest_seq, self.newest) = (frame.first_seq, Some(frame));
            return;
        };
        if frame.first_seq <= newest.last_seq {
            self.deliver_late(&frame, newest.last_seq, stream, origin);
            return;
        }
        let missing = if frame.layer == newest.layer {
            u64::from(frame.frame.saturating_sub(newest.frame + 1))
        } else {
            withheld()
        };
        self.newest = Some(frame);
        if missing > 0 {
            let gap = FrameGap {
                first_frame: newest.frame + 1,
                missing: u32::try_from(missing).unwrap_or(u32::MAX),
                before: newest.last_seq as u32,
                after: frame.first_seq as u32,
                noticed_ms: now.as_millis() as u32,
                layer: newest.layer,
            };
            if usize::from(self.len) == GAPS_MAX {
                self.settle_oldest(stream, origin);
            }
            self.open(usize::from(self.len), gap);
        }
    }

    /// Continues the stream after a pause that was requested. Frames that were not sent during the
    /// pause are not missing.
    pub fn resume_with(
        &mut self,
        frame: PlacedFrame,
        stream: &ReceiveStream,
        origin: FrameOrigin<'_>,
        now: Time,
    ) {
        self.settle_due(stream, origin, now);
        self.newest = Some(frame);
    }

    /// Settles the gaps that have waited long enough.
    pub fn settle_due(&mut self, stream: &ReceiveStream, origin: FrameOrigin<'_>, now: Time) {
        while self.len > 0 {
            let gap = self.gaps[0];
            let (before, _) = gap.between(self.newest_seq());
            if gap.age(now) < SETTLE_AFTER && self.newest_seq() - before < WINDOW - WINDOW_MARGIN {
                return;
            }
            self.settle_oldest(stream, origin);
        }
    }

    /// Settles every gap at the end. `missing` is the number of all missing frames.
    pub fn finish(
        &mut self,
        missing: u64,
        stream: &ReceiveStream,
        origin: FrameOrigin<'_>,
    ) -> Losses {
        while self.len > 0 {
            self.settle_oldest(stream, origin);
        }
        let losses = self.losses();
        let attributed = losses.uplink + losses.sfu + losses.downlink;
        // A frame that comes late can still lower the number of expected frames around a layer
        // switch. Causes must never outnumber losses.
        let mut excess = attributed.saturating_sub(missing);
        for count in [&mut self.downlink, &mut self.sfu, &mut self.uplink] {
            let taken = excess.min(u64::from(*count));
            *count -= taken as u32;
            excess -= taken;
        }
        Losses {
            unattributed: missing.saturating_sub(attributed),
            ..self.losses()
        }
    }

    /// Returns the losses attributed so far.
    pub fn losses(&self) -> Losses {
        Losses {
            source: 0,
            uplink: self.uplink.into(),
            sfu: self.sfu.into(),
            downlink: self.downlink.into(),
            unattributed: 0,
        }
    }

    fn newest_seq(&self) -> u64 {
        self.newest.map_or(0, |newest| newest.last_seq)
    }

    /// Handles a frame that lies between two frames delivered before.
    fn deliver_late(
        &mut self,
        frame: &PlacedFrame,
        newest: u64,
        stream: &ReceiveStream,
        origin: FrameOrigin<'_>,
    ) {
        if frame.first_seq < self.oldest_seq {
            self.oldest_seq = frame.first_seq;
            return;
        }
        let Some(at) = (0..usize::from(self.len)).find(|at| self.gaps[*at].holds(frame, newest))
        else {
            self.take_back();
            return;
        };
        let place = (frame.first_seq as u32, frame.last_seq as u32);
        self.fill(at, frame.frame, place, stream, origin);
    }

    /// Takes a missing frame that arrived in another packet. `seq` is the sequence number that its
    /// own packet would have had.
    pub fn recover(
        &mut self,
        identity: &FrameIdentity,
        seq: u64,
        stream: &ReceiveStream,
        origin: FrameOrigin<'_>,
    ) {
        let holds = |gap: &FrameGap| {
            gap.layer == identity.layer
                && identity.frame.wrapping_sub(gap.first_frame) < gap.missing
        };
        let gaps = &self.gaps[..usize::from(self.len)];
        let Some(at) = gaps.iter().position(holds) else {
            self.take_back();
            return;
        };
        let gap = gaps[at];
        let (before, after) = gap.between(self.newest_seq());
        // If the SFU closes gaps in the numbering, the frame has no number of its own.
        let place = if (before + 1..after).contains(&seq) {
            (seq as u32, seq as u32)
        } else {
            (gap.after, gap.before)
        };
        self.fill(at, identity.frame, place, stream, origin);
    }

    /// Removes a frame from a gap. The frame arrived in packets `first..=last`.
    fn fill(
        &mut self,
        at: usize,
        frame: u32,
        (first, last): (u32, u32),
        stream: &ReceiveStream,
        origin: FrameOrigin<'_>,
    ) {
        let gap = self.gaps[at];
        let before = frame.wrapping_sub(gap.first_frame);
        let (left, right) = (
            FrameGap {
                missing: before,
                after: first,
                ..gap
            },
            FrameGap {
                first_frame: frame.wrapping_add(1),
                missing: gap.missing - before - 1,
                before: last,
                ..gap
            },
        );
        match (left.missing > 0, right.missing > 0) {
            (true, true) => self.split(at, left, right, stream, origin),
            (true, false) => self.gaps[at] = left,
            (false, true) => self.gaps[at] = right,
            (false, false) => self.remove(at),
        }
    }

    /// Replaces one gap by two. If the table is full, the oldest gap of all is settled first.
    fn split(
        &mut self,
        at: usize,
        left: FrameGap,
        right: FrameGap,
        stream: &ReceiveStream,
        origin: FrameOrigin<'_>,
    ) {
        self.gaps[at] = left;
        let mut at = at + 1;
        if usize::from(self.len) == GAPS_MAX {
            self.settle_oldest(stream, origin);
            at -= 1;
        }
        self.open(at, right);
    }

    /// Corrects the counts when a frame arrives that was already counted as lost. It was sent, so a
    /// link delayed it: the downlink, if any loss was counted there.
    fn take_back(&mut self) {
        for count in [&mut self.downlink, &mut self.uplink, &mut self.sfu] {
            if *count > 0 {
                *count -= 1;
                return;
            }
        }
    }

    fn open(&mut self, at: usize, gap: FrameGap) {
        self.gaps.copy_within(at..usize::from(self.len), at + 1);
        self.gaps[at] = gap;
        self.len += 1;
    }

    fn remove(&mut self, at: usize) {
        self.gaps.copy_within(at + 1..usize::from(self.len), at);
        self.len -= 1;
    }

    fn settle_oldest(
        &mut self,
        stream: &ReceiveStream,
        FrameOrigin { roster, origin }: FrameOrigin<'_>,
    ) {
        let gap = self.gaps[0];
        self.remove(0);
        let sent = roster.frames(origin, gap.layer);
        let (mut lacking, mut probable, mut unknown) = (0, 0, 0);
        for frame in gap.first_frame..gap.first_frame.saturating_add(gap.missing).min(sent) {
            match roster.lacks(origin, gap.layer, frame) {
                Some(Lacks::Yes) => lacking += 1,
                Some(Lacks::Probably) => probable += 1,
                Some(Lacks::No) => {}
                None => unknown += 1,
            }
        }
        self.uplink += lacking;
        let (before, after) = gap.between(self.newest_seq());
        let Some(holes) = stream.holes_between(before, after) else {
            return;
        };
        // A packet lost on the uplink leaves a gap here too, unless the SFU closes it. So a
        // probable loss without a visible gap does not count as uplink loss. Every other frame that
        // was sent and lost has left at least one gap.
        let holes = u32::try_from(holes)
            .unwrap_or(u32::MAX)
            .saturating_sub(lacking);
        let probable = probable.min(holes);
        let rest = gap.missing - lacking - probable - unknown;
        let downlink = rest.min(holes - probable);
        self.uplink += probable;
        self.downlink += downlink;
        self.sfu += rest - downlink;
    }
}
