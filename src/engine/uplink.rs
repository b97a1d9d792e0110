//! What the server lacks of what a publisher sent, as far as its NACKs tell.
//!
//! A server names every packet that it misses, and names it again while a resend has not come; and
//! a frame that anybody of the run has received whole was there. A frame that was asked for again,
//! a round trip after the resend, and that nobody got, was lost on its way to the server; one that
//! was asked for once probably was, where several listen and nobody got it. The publisher's shard
//! writes what was asked for, subscribers' shards what came: a ring of bits for each layer, relaxed
//! atomics, no locks.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Duration;

use crate::units::Time;

/// Frames that a ring remembers: 20 s of audio, 34 s of video at 30 frames a second.
const FRAMES: u32 = 1024;
const WORDS: usize = FRAMES as usize / 64;

/// Frames whose bits are sure not to be those of newer ones: a word is emptied when its first frame
/// is sent.
const FRAMES_KNOWN: u32 = FRAMES - 64;

/// Packets of one frame may be missed one after the other, while it is paced: only what is asked
/// for so much later is asked for again.
const ASKED_AGAIN_AFTER: Duration = Duration::from_millis(30);

/// One bit a frame: which of the last frames of a layer the server has asked for, which of them
/// again, and which somebody received.
#[derive(Default)]
pub struct Lacking {
    asked: [AtomicU64; WORDS],
    asked_again: [AtomicU64; WORDS],
    received: [AtomicU64; WORDS],
    /// Streams on which the layer ever came.
    listeners: AtomicU32,
}

/// Whether the server lacks a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lacks {
    No,
    Probably,
    Yes,
}

/// What the server has asked for, as the publisher has heard it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    Once,
    Again,
}

impl Lacking {
    /// The publisher is about to send this frame.
    pub fn begin(&self, frame: u32) {
        let (word, bit) = place(frame);
        if bit == 1 {
            self.asked[word].store(0, Relaxed);
            self.asked_again[word].store(0, Relaxed);
            self.received[word].store(0, Relaxed);
        }
    }

    /// The server asks for a packet of the frame. `frames` have been sent.
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

    /// The layer comes on one stream more.
    pub fn add_listener(&self) {
        self.listeners.fetch_add(1, Relaxed);
    }

    /// Somebody has received the whole frame. Only of interest where the server has asked for it:
    /// the others cost one read.
    pub fn set_received(&self, frame: u32) {
        let (word, bit) = place(frame);
        if self.asked[word].load(Relaxed) & bit != 0 {
            self.received[word].fetch_or(bit, Relaxed);
        }
    }

    /// Whether the server never had the frame; `None` where it was sent too long ago to tell.
    /// `frames` have been sent.
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

/// Frames whose first request is remembered: as many as may still be resent.
const REQUESTS: usize = 64;

/// When each of the last frames was first asked for.
pub struct FrameRequests([FrameRequest; REQUESTS]);

#[derive(Clone, Copy, Default)]
struct FrameRequest {
    frame: u32,
    /// Milliseconds of the run, plus one; 0 is none.
    at: u32,
}

impl Default for FrameRequests {
    fn default() -> FrameRequests {
        FrameRequests([FrameRequest::default(); REQUESTS])
    }
}

impl FrameRequests {
    /// The server asks for a packet of this frame. Again, where that shows that a resend was lost
    /// as well.
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

/// Sequence numbers that the server has asked for, so that each counts once. A number that comes
/// again after the wrap is another packet: by then many others have been asked for, or nobody minds
/// one that is missing here.
pub struct AskedPackets([u32; ASKED_KNOWN]);

/// As many as one burst of loss has.
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
