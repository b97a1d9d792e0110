//! Frames of a publisher that the server lacks, as far as its NACKs tell.
//!
//! A server names every packet that it misses, and names it again while a retransmission has not
//! arrived. A frame that anybody of the run has received completely did reach the server. A frame
//! that was requested again, a round trip after the retransmission, and that nobody received, was
//! lost on its way to the server. A frame that was requested once was probably lost there, if
//! several listen and nobody received it. The publisher's shard writes what was requested, and
//! subscribers' shards write what arrived: a ring of bits for each layer, with relaxed atomics and
//! no locks.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Duration;

use crate::units::Time;

/// Number of frames that a ring remembers: 20 s of audio, or 34 s of video at 30 frames a second.
const FRAMES: u32 = 1024;
const WORDS: usize = FRAMES as usize / 64;

/// Number of the newest frames whose bits cannot belong to other frames. A word is cleared when its
/// first frame is sent.
const FRAMES_KNOWN: u32 = FRAMES - 64;

/// Minimum time after which a request counts as a second one. Packets of one frame may be missed
/// one after the other while it is paced, so only a request this much later is a repeated one.
const ASKED_AGAIN_AFTER: Duration = Duration::from_millis(30);

/// One bit per frame: which of the last frames of a layer the server has requested, which of them
/// repeatedly, and which somebody received.
#[derive(Default)]
pub struct Lacking {
    asked: [AtomicU64; WORDS],
    asked_again: [AtomicU64; WORDS],
    received: [AtomicU64; WORDS],
    /// Number of streams on which the layer ever arrived.
    listeners: AtomicU32,
}

/// Whether the server lacks a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lacks {
    No,
    Probably,
    Yes,
}

/// How often the server has requested a frame, as far as the publisher knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    Once,
    Again,
}

impl Lacking {
    /// Clears the bits for a frame that the publisher is about to send.
    pub fn begin(&self, frame: u32) {
        let (word, bit) = place(frame);
        if bit == 1 {
            self.asked[word].store(0, Relaxed);
            self.asked_again[word].store(0, Relaxed);
            self.received[word].store(0, Relaxed);
        }
    }

    /// Notes that the server requests a packet of the frame. `frames` is the number of frames sent.
    pub fn set_asked(&self, frame: u32, asked: Asked, frames: u32) {
        let (word, bit) = place(frame);
        if frames.wrapping_sub(frame) > FRAMES_KNOWN {
            return;
        }
        self.asked[word].fetch_or(bit, Relaxed);
        if asked == Asked::Again {
            self.asked_again[word].fetch_or(bit, Relaxed);
        }
    }

    /// Counts one more stream on which the layer arrives.
    pub fn add_listener(&self) {
        self.listeners.fetch_add(1, Relaxed);
    }

    /// Notes that somebody has received the complete frame. This matters only if the server has
    /// requested it; any other frame costs one read.
    pub fn set_received(&self, frame: u32) {
        let (word, bit) = place(frame);
        if self.asked[word].load(Relaxed) & bit != 0 {
            self.received[word].fetch_or(bit, Relaxed);
        }
    }

    /// Returns whether the server never had the frame; `None` if it was sent too long ago. `frames`
    /// is the number of frames sent.
    pub fn lacks(&self, frame: u32, frames: u32) -> Option<Lacks> {
        let (word, bit) = place(frame);
        let is_set = |bits: &[AtomicU64; WORDS]| bits[word].load(Relaxed) & bit != 0;
        let lacks = if is_set(&self.received) {
            Lacks::No
        } else if is_set(&self.asked_again) {
            Lacks::Yes
        } else if is_set(&self.asked) && self.listeners.load(Relaxed) > 1 {
            Lacks::Probably
        } else {
            Lacks::No
        };
        (frames.wrapping_sub(frame) <= FRAMES_KNOWN).then_some(lacks)
    }
}

fn place(frame: u32) -> (usize, u64) {
    ((frame % FRAMES / 64) as usize, 1 << (frame % 64))
}

/// Number of frames whose first request is remembered: as many as may still be retransmitted.
const REQUESTS: usize = 64;

/// Time at which each of the last frames was first requested.
pub struct FrameRequests([FrameRequest; REQUESTS]);

#[derive(Clone, Copy, Default)]
struct FrameRequest {
    frame: u32,
    /// Milliseconds of the run, plus one; 0 means none.
    at: u32,
}

impl Default for FrameRequests {
    fn default() -> FrameRequests {
        FrameRequests([FrameRequest::default(); REQUESTS])
    }
}

impl FrameRequests {
    /// Notes that the server requests a packet of this frame. Returns [`Asked::Again`] if the
    /// request shows that a retransmission was lost as well.
    pub fn note(&mut self, frame: u32, now: Time, rtt: Duration) -> Asked {
        let request = &mut self.0[frame as usize % REQUESTS];
        let millis = (now.as_millis() as u32).wrapping_add(1).max(1);
        if request.at == 0 || request.frame != frame {
            *request = FrameRequest { frame, at: millis };
            return Asked::Once;
        }
        if Duration::from_millis(millis.wrapping_sub(request.at).into())
            >= rtt.max(ASKED_AGAIN_AFTER)
        {
            Asked::Again
        } else {
            Asked::Once
        }
    }
}

/// Sequence numbers that the server has requested, so that each counts once. A number that comes
/// again after the wrap is another packet: by then many others have been requested, or one packet
/// missing from this count does not matter.
pub struct AskedPackets([u32; ASKED_KNOWN]);

/// Number of entries: the packets of one burst of loss.
const ASKED_KNOWN: usize = 256;

impl Default for AskedPackets {
    fn default() -> AskedPackets {
        AskedPackets([0; ASKED_KNOWN])
    }
}

impl AskedPackets {
    pub fn is_first(&mut self, seq: u16) -> bool {
        let number = u32::from(seq) + 1;
        let known = &mut self.0[usize::from(seq) % ASKED_KNOWN];
        std::mem::replace(known, number) != number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RTT: Duration = Duration::from_millis(50);

    fn ask(lacking: &Lacking, requests: &mut FrameRequests, frame: u32, millis: u64) -> Lacks {
        lacking.set_asked(
            frame,
            requests.note(frame, Time::from_millis(millis), RTT),
            100,
        );
        lacking.lacks(frame, 100).unwrap()
    }

    #[test]
    fn a_packet_that_is_asked_for_often_counts_once() {
        let mut asked = AskedPackets::default();
        let first = [7, 7, 8, 7, 65_535, 0, 8, 65_535].map(|seq| asked.is_first(seq));
        assert_eq!(first, [true, false, true, false, true, true, false, false]);
    }

    #[test]
    fn a_frame_is_lacking_once_it_was_asked_for_again_and_while_nobody_got_it() {
        let (lacking, mut requests) = (Lacking::default(), FrameRequests::default());
        (0..100).for_each(|frame| lacking.begin(frame));
        lacking.add_listener();
        let mut ask = |frame, millis| ask(&lacking, &mut requests, frame, millis);
        assert_eq!(
            [ask(7, 1_000), ask(7, 1_030), ask(8, 1_030)],
            [Lacks::No; 3],
            "still on its way"
        );
        assert_eq!([ask(7, 1_051), ask(8, 1_200)], [Lacks::Yes; 2]);
        lacking.set_received(9);
        lacking.set_received(8);
        assert_eq!(
            [7, 8, 9].map(|frame| lacking.lacks(frame, 100).unwrap()),
            [Lacks::Yes, Lacks::No, Lacks::No]
        );
    }

    #[test]
    fn with_several_listeners_one_request_makes_it_probable_unless_one_of_them_got_the_frame() {
        let (lacking, mut requests) = (Lacking::default(), FrameRequests::default());
        (0..100).for_each(|frame| lacking.begin(frame));
        (0..2).for_each(|_| lacking.add_listener());
        assert_eq!(
            [7, 8].map(|frame| ask(&lacking, &mut requests, frame, 1_000)),
            [Lacks::Probably; 2]
        );
        lacking.set_received(8);
        assert_eq!(
            [7, 8, 9].map(|frame| lacking.lacks(frame, 100).unwrap()),
            [Lacks::Probably, Lacks::No, Lacks::No]
        );
    }

    #[test]
    fn what_was_sent_too_long_ago_cannot_be_told_and_is_no_newer_frame() {
        let lacking = Lacking::default();
        for frame in 0..5_000 {
            lacking.begin(frame);
            if frame % 3 == 0 {
                lacking.set_asked(frame, Asked::Again, frame + 1);
            }
        }
        lacking.set_asked(3, Asked::Again, 5_000);
        for frame in 0..5_000u32 {
            let lacks = if frame % 3 == 0 {
                Lacks::Yes
            } else {
                Lacks::No
            };
            assert_eq!(
                lacking.lacks(frame, 5_000),
                (5_000 - frame <= FRAMES_KNOWN).then_some(lacks),
                "{frame}"
            );
        }
    }
}
