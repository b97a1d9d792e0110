//! What the server lacks of what a publisher sent, as far as its NACKs tell.
//!
//! A server names every packet that it misses, and names it again while a resend has not come. So a frame that was asked for once has most likely arrived
//! since; one that was asked for again, a round trip after the resend, was lost twice at least. And a frame that anybody of the run has received whole was
//! there. The publisher's shard writes the first, subscribers' shards the second: a ring of bits for each layer, relaxed atomics, no locks.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use crate::units::Time;

/// Frames that a ring remembers: 20 s of audio, 34 s of video at 30 frames a second.
const FRAMES: u32 = 1024;
const WORDS: usize = FRAMES as usize / 64;

/// Frames whose bits are sure not to be those of newer ones: a word is emptied when its first frame is sent.
const FRAMES_KNOWN: u32 = FRAMES - 64;

/// Packets of one frame may be missed one after the other, while it is paced: only what is asked for so much later is asked for again.
const ASKED_AGAIN_AFTER: Duration = Duration::from_millis(30);

/// One bit a frame: which of the last frames of a layer the server has asked for in vain, and which of those somebody received.
#[derive(Default)]
pub struct Lacking {
    asked: [AtomicU64; WORDS],
    received: [AtomicU64; WORDS],
}

impl Lacking {
    /// The publisher is about to send this frame.
    pub fn begin(&self, frame: u32) {
        let (word, bit) = place(frame);
        if bit == 1 {
            self.asked[word].store(0, Relaxed);
            self.received[word].store(0, Relaxed);
        }
    }

    /// The server lacks the frame, by all that the publisher has heard. `frames` have been sent.
    pub fn set_asked(&self, frame: u32, frames: u32) {
        let (word, bit) = place(frame);
        if frames.wrapping_sub(frame) <= FRAMES_KNOWN {
            self.asked[word].fetch_or(bit, Relaxed);
        }
    }

    /// Somebody has received the whole frame. Only of interest where the server has asked for it: the others cost one read.
    pub fn set_received(&self, frame: u32) {
        let (word, bit) = place(frame);
        if self.asked[word].load(Relaxed) & bit != 0 {
            self.received[word].fetch_or(bit, Relaxed);
        }
    }

    /// Whether the server never had the frame; `None` where it was sent too long ago to tell. `frames` have been sent.
    pub fn is_lacking(&self, frame: u32, frames: u32) -> Option<bool> {
        let (word, bit) = place(frame);
        let lacking = self.asked[word].load(Relaxed) & bit != 0 && self.received[word].load(Relaxed) & bit == 0;
        (frames.wrapping_sub(frame) <= FRAMES_KNOWN).then_some(lacking)
    }
}

fn place(frame: u32) -> (usize, u64) {
    ((frame % FRAMES / 64) as usize, 1 << (frame % 64))
}

/// Frames whose first request is remembered: as many as may still be resent.
const REQUESTS: usize = 64;

/// When each of the last frames was first asked for.
pub struct Requests([Request; REQUESTS]);

#[derive(Clone, Copy, Default)]
struct Request {
    frame: u32,
    /// Milliseconds of the run, plus one; 0 is none.
    at: u32,
}

impl Default for Requests {
    fn default() -> Requests {
        Requests([Request::default(); REQUESTS])
    }
}

impl Requests {
    /// The server asks for a packet of this frame. Whether that shows that a resend was lost as well.
    pub fn is_again(&mut self, frame: u32, now: Time, rtt: Duration) -> bool {
        let request = &mut self.0[frame as usize % REQUESTS];
        let millis = (now.as_millis() as u32).wrapping_add(1).max(1);
        if request.at == 0 || request.frame != frame {
            *request = Request { frame, at: millis };
            return false;
        }
        Duration::from_millis(millis.wrapping_sub(request.at).into()) >= rtt.max(ASKED_AGAIN_AFTER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_lacking_once_it_was_asked_for_again_and_while_nobody_got_it() {
        let (lacking, mut requests) = (Lacking::default(), Requests::default());
        let rtt = Duration::from_millis(50);
        (0..100).for_each(|frame| lacking.begin(frame));
        let mut ask = |frame, millis| {
            if requests.is_again(frame, Time::from_millis(millis), rtt) {
                lacking.set_asked(frame, 100);
            }
            lacking.is_lacking(frame, 100)
        };
        assert_eq!([ask(7, 1_000), ask(7, 1_030), ask(8, 1_030)], [Some(false); 3], "still on its way");
        assert_eq!([ask(7, 1_051), ask(8, 1_200)], [Some(true); 2]);
        lacking.set_received(9);
        lacking.set_received(8);
        assert_eq!(
            [7, 8, 9].map(|frame| lacking.is_lacking(frame, 100)),
            [Some(true), Some(false), Some(false)]
        );
    }

    #[test]
    fn what_was_sent_too_long_ago_cannot_be_told_and_is_no_newer_frame() {
        let lacking = Lacking::default();
        for frame in 0..5_000 {
            lacking.begin(frame);
            if frame % 3 == 0 {
                lacking.set_asked(frame, frame + 1);
            }
        }
        lacking.set_asked(3, 5_000);
        for frame in 0..5_000u32 {
            let known = (5_000 - frame <= FRAMES_KNOWN).then_some(frame % 3 == 0);
            assert_eq!(lacking.is_lacking(frame, 5_000), known, "{frame}");
        }
    }
}
