//! What one subscriber of each room received, as files: VP8 in IVF, Opus in Ogg.
//!
//! The packet path pays a copy for the one participant that is recorded and a branch for everybody
//! else: a [`Tap`] copies opened packets into pages that were allocated before the run, and hands
//! them over when they are full or 100 ms old. A thread of its own (`recorder`) puts packets in
//! order, frames together and bytes into files. Where it falls behind, the tap drops and counts;
//! the run goes on.
//!
//! Nothing is invented. A video frame that never came, or that a decoder would lack a reference
//! for, is a gap in the timestamps; audio that never came is marked as missing in the way that Ogg
//! Opus has for it (RFC 7845, section 4.1). Frames are written as they came, the identity at their
//! end included: ffmpeg's own decoders, libvpx and libopus all take it without a word.

mod book;
mod ivf;
mod ogg;
mod output;
mod stream;
mod tap;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

pub use tap::{Tap, TappedPacket};

use book::Book;
use tap::{PAGES, TapPage};

use crate::measure::Kind;
use crate::plan::{ParticipantPlan, Plan};

/// How often the recorder looks for pages. It asks, instead of being woken, so that no packet costs
/// the engine's thread a system call.
const POLL: Duration = Duration::from_millis(20);

/// The recorded participants: the first subscriber of each room, of those whom this host plays.
pub fn recorded(plan: &Plan) -> impl Iterator<Item = ParticipantPlan> + '_ {
    let rooms = plan.scenario.rooms.count as usize;
    let mut is_recorded = vec![false; rooms];
    plan.participants()
        .filter(move |participant| {
            participant.subscribes
                && !std::mem::replace(&mut is_recorded[participant.room as usize], true)
        })
        .take(rooms)
}

/// The files that a recording keeps open: one for each track that a recorded participant gets.
pub fn files(plan: &Plan) -> u64 {
    let tracks =
        |participant: &ParticipantPlan, kind| u64::from(plan.planned_tracks(participant, kind));
    recorded(plan)
        .map(|participant| tracks(&participant, Kind::Audio) + tracks(&participant, Kind::Video))
        .sum()
}

/// A recording without a thread: whoever holds it calls [`Recording::drain`].
pub struct Recording {
    pages: Receiver<TapPage>,
    book: Book,
}

impl Recording {
    /// A recording below `dir`, and a tap for each recorded participant. Files appear as streams
    /// turn out to have something in them.
    pub fn new(dir: PathBuf, plan: &Plan) -> (Recording, Vec<(ParticipantPlan, Box<Tap>)>) {
        let participants: Vec<ParticipantPlan> = recorded(plan).collect();
        let (full, pages) = sync_channel(participants.len() * PAGES);
        let mut book = Book::new(dir, plan.clone());
        let taps = participants
            .into_iter()
            .map(|participant| {
                let (give_back, returned) = sync_channel(PAGES);
                let tap = Tap::new(participant.room, full.clone(), returned);
                book.expect_room(participant.room, give_back, tap.dropped());
                (participant, Box::new(tap))
            })
            .collect();
        (Recording { pages, book }, taps)
    }

    /// Writes what the taps have handed over; false when they are all gone.
    pub fn drain(&mut self) -> bool {
        loop {
            match self.pages.try_recv() {
                Ok(page) => self.book.take(page),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Writes the rest and ends the files. Returns what the reader of the report should know.
    pub fn finish(mut self) -> Vec<String> {
        self.drain();
        self.book.finish()
    }
}

/// A [`Recording`] on a thread of its own.
pub struct Recorder {
    thread: JoinHandle<Vec<String>>,
    stop: Arc<AtomicBool>,
}

impl Recorder {
    /// # Errors
    /// If there is no thread to be had.
    pub fn start(mut recording: Recording) -> io::Result<Recorder> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::Builder::new()
            .name("recorder".into())
            .spawn(move || {
                while recording.drain() && !stopped.load(Ordering::Acquire) {
                    std::thread::sleep(POLL);
                }
                recording.finish()
            })?;
        Ok(Recorder { thread, stop })
    }

    /// Ends the files, once what the taps have handed over is in them. Returns what the reader of
    /// the report should know.
    pub fn finish(self) -> Vec<String> {
        self.stop.store(true, Ordering::Release);
        self.thread
            .join()
            .unwrap_or_else(|_| vec!["the recorder panicked: recordings may lack their end".into()])
    }
}
