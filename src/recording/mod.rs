//! Recording of what one subscriber of each room received, as files: VP8 in IVF, Opus in Ogg.
//!
//! The packet path pays a copy for the recorded participant and a branch for all others. A [`Tap`]
//! copies opened packets into pages that were allocated before the run, and hands them over when
//! they are full or 100 ms old. A separate thread (`recorder`) orders packets, assembles frames and
//! writes files. If it falls behind, the tap drops packets and counts them; the run continues.
//!
//! Nothing is invented. A video frame that never came, or that a decoder would lack a reference
//! for, is a gap in the timestamps. Audio that never came is marked as missing by Ogg Opus's own
//! method (RFC 7845, section 4.1). Frames are written as they came, with the identity at their end.
//! ffmpeg's own decoders, libvpx and libopus all accept it silently.

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

/// Interval at which the recorder looks for pages. It polls instead of being woken, so that no
/// packet costs the engine's thread a system call.
const POLL: Duration = Duration::from_millis(20);

/// Returns the recorded participants: the first subscriber of each room among those whom this host
/// plays.
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

/// Returns the number of files that a recording keeps open: one for each track that a recorded
/// participant gets.
pub fn files(plan: &Plan) -> u64 {
    let tracks =
        |participant: &ParticipantPlan, kind| u64::from(plan.planned_tracks(participant, kind));
    recorded(plan)
        .map(|participant| tracks(&participant, Kind::Audio) + tracks(&participant, Kind::Video))
        .sum()
}

/// Recording without a thread. Its owner calls [`Recording::drain`].
pub struct Recording {
    pages: Receiver<TapPage>,
    book: Book,
}

impl Recording {
    /// Creates a recording below `dir`, and a tap for each recorded participant. A file is created
    /// once its stream has something to write.
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

    /// Writes what the taps have handed over. Returns false when all taps are gone.
    pub fn drain(&mut self) -> bool {
        loop {
            match self.pages.try_recv() {
                Ok(page) => self.book.take(page),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Writes the rest and ends the files. Returns notes for the reader of the report.
    pub fn finish(mut self) -> Vec<String> {
        self.drain();
        self.book.finish()
    }
}

/// [`Recording`] on its own thread.
pub struct Recorder {
    thread: JoinHandle<Vec<String>>,
    stop: Arc<AtomicBool>,
}

impl Recorder {
    /// # Errors
    /// Fails if the thread cannot be started.
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

    /// Writes what the taps have handed over, then ends the files. Returns notes for the reader of
    /// the report.
    pub fn finish(self) -> Vec<String> {
        self.stop.store(true, Ordering::Release);
        self.thread
            .join()
            .unwrap_or_else(|_| vec!["the recorder panicked: recordings may lack their end".into()])
    }
}
