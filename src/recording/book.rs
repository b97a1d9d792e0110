//! All streams of a recording with their files, and the final account of the recording.

use crate::transport::rtp::Ssrc;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;

use super::ivf;
use super::ogg::OpusFile;
use super::output::{RecordingFile, safe_name};
use super::stream::{AudioStream, StreamFrame, VideoStream};
use super::tap::{TapPage, TappedPacket};
use crate::codec::{Codec, Container};
use crate::measure::Kind;
use crate::media::identity::FrameIdentity;
use crate::plan::Plan;
use crate::words;

pub struct Book {
    dir: PathBuf,
    plan: Plan,
    rooms: BTreeMap<u32, RecordedRoom>,
    /// Streams by room, the participant's connection, and the stream's number in it.
    streams: BTreeMap<(u32, u32, u32), RecordedStream>,
}

struct RecordedRoom {
    give_back: SyncSender<TapPage>,
    dropped: Arc<AtomicU64>,
}

struct RecordedStream {
    source: FrameStream,
    track: RecordedTrack,
}

enum FrameStream {
    Audio(AudioStream),
    Video(Box<VideoStream>),
}

/// State of one stream that is written to a file.
struct RecordedTrack {
    codec: Codec,
    ssrc: Ssrc,
    dir: PathBuf,
    file: File,
    is_named: bool,
    frames: u64,
    unreadable: u64,
}

enum File {
    /// No file until there is something to write.
    None,
    Ivf(RecordingFile),
    Ogg(RecordingFile, Box<OpusFile>),
    /// Path of the file, and the error that ended it early.
    Failed(PathBuf, io::Error),
}

impl Book {
    pub fn new(dir: PathBuf, plan: Plan) -> Book {
        Book {
            dir,
            plan,
            rooms: BTreeMap::new(),
            streams: BTreeMap::new(),
        }
    }

    /// Registers a recorded room: the channel that takes back its emptied pages, and its tap's
    /// counter of dropped packets.
    pub fn expect_room(
        &mut self,
        room: u32,
        give_back: SyncSender<TapPage>,
        dropped: Arc<AtomicU64>,
    ) {
        self.rooms.insert(room, RecordedRoom { give_back, dropped });
    }

    pub fn take(&mut self, mut page: TapPage) {
        for (packet, payload) in page.packets() {
            self.handle_packet(page.room, page.connection, packet, payload);
        }
        page.clear();
        if let Some(room) = self.rooms.get(&page.room) {
            // A tap that no longer exists needs no page.
            let _ = room.give_back.try_send(page);
        }
    }

    fn handle_packet(&mut self, room: u32, connection: u32, packet: &TappedPacket, payload: &[u8]) {
        let (dir, plan) = (&self.dir, &self.plan);
        let stream = self
            .streams
            .entry((room, connection, packet.stream))
            .or_insert_with(|| {
                RecordedStream::new(packet, dir.join(safe_name(&plan.room_name(room))))
            });
        stream.handle_packet(packet, payload, plan);
    }

    /// Ends all files and returns the account.
    pub fn finish(mut self) -> Vec<String> {
        for stream in self.streams.values_mut() {
            stream.finish(&self.plan);
        }
        self.account()
    }

    fn account(&self) -> Vec<String> {
        let tracks = || self.streams.values().map(|stream| &stream.track);
        let frames = |kind| {
            tracks()
                .filter(|track| track.codec.kind() == kind)
                .map(|track| track.frames)
                .sum::<u64>()
        };
        let files = tracks()
            .filter(|track| !matches!(track.file, File::None))
            .count();
        let mut notes = vec![format!(
            "recorded {} frames of video and {} packets of audio in {} below {}",
            frames(Kind::Video),
            frames(Kind::Audio),
            words::count(files as u64, "file"),
            self.dir.display()
        )];
        let dropped = self
            .rooms
            .values()
            .map(|room| room.dropped.load(Ordering::Relaxed))
            .sum();
        let sum = |of: fn(&RecordedStream) -> u64| self.streams.values().map(of).sum::<u64>();
        for (count, what) in [
            (
                dropped,
                "packets: they could not be written as fast as they came",
            ),
            (
                sum(RecordedStream::undecodable),
                "whole frames of video: what they build on never came",
            ),
            (
                sum(RecordedStream::late),
                "packets of audio that came after those that follow them",
            ),
            (
                sum(|stream| stream.track.unreadable),
                "frames that are no Opus, or no VP8",
            ),
        ] {
            if count > 0 {
                notes.push(format!("recording dropped {count} {what}"));
            }
        }
        notes.extend(self.failures());
        notes
    }

    /// Returns one note for each reason, because a full disk ends all files at once.
    fn failures(&self) -> Vec<String> {
        let mut reasons: BTreeMap<String, Vec<&Path>> = BTreeMap::new();
        for stream in self.streams.values() {
            if let File::Failed(path, error) = &stream.track.file {
                reasons.entry(error.to_string()).or_default().push(path);
            }
        }
        let note = |(reason, paths): (String, Vec<&Path>)| {
            let others = match paths.len() {
                1 => String::new(),
                count => format!(" and {} more files", count - 1),
            };
            format!(
                "recording of {}{others} ended early: {reason}",
                paths[0].display()
            )
        };
        reasons.into_iter().map(note).collect()
    }
}

impl RecordedStream {
    fn new(packet: &TappedPacket, dir: PathBuf) -> RecordedStream {
        RecordedStream {
            source: match packet.codec.container() {
                Container::Ogg => FrameStream::Audio(AudioStream::new()),
                Container::Ivf => FrameStream::Video(Box::new(VideoStream::new(packet.codec))),
            },
            track: RecordedTrack {
                codec: packet.codec,
                ssrc: packet.ssrc,
                dir,
                file: File::None,
                is_named: false,
                frames: 0,
                unreadable: 0,
            },
        }
    }

    fn handle_packet(&mut self, packet: &TappedPacket, payload: &[u8], plan: &Plan) {
        let track = &mut self.track;
        match &mut self.source {
            FrameStream::Audio(audio) => {
                audio.handle_packet(packet, payload, |frame| track.write(&frame, plan))
            }
            FrameStream::Video(video) => {
                video.handle_packet(packet, payload, |frame| track.write(&frame, plan))
            }
        }
    }

    fn finish(&mut self, plan: &Plan) {
        let track = &mut self.track;
        if let FrameStream::Audio(audio) = &mut self.source {
            audio.finish(|frame| track.write(&frame, plan));
        }
        track.finish();
    }

    fn undecodable(&self) -> u64 {
        match &self.source {
            FrameStream::Audio(_) => 0,
            FrameStream::Video(video) => video.undecodable(),
        }
    }

    fn late(&self) -> u64 {
        match &self.source {
            FrameStream::Audio(audio) => audio.late(),
            FrameStream::Video(_) => 0,
        }
    }
}

impl RecordedTrack {
    fn write(&mut self, frame: &StreamFrame<'_>, plan: &Plan) {
        let publisher = frame
            .identity
            .and_then(|identity| publisher(&identity, plan));
        if let File::None = self.file {
            self.file = match self.open(frame, publisher.as_deref()) {
                Ok(Some(file)) => file,
                Ok(None) => {
                    self.unreadable += 1;
                    return;
                }
                Err(error) => File::Failed(self.dir.clone(), error),
            };
            self.is_named = publisher.is_some();
        } else if let Some(publisher) = publisher.filter(|_| !self.is_named) {
            self.rename(&publisher);
        }
        match self.file.append(frame) {
            Ok(true) => self.frames += 1,
            Ok(false) => self.unreadable += u64::from(!matches!(self.file, File::Failed(..))),
            Err(error) => self.fail(error),
        }
    }

    /// Opens the file; `None` if a file cannot start with this frame.
    fn open(&self, frame: &StreamFrame<'_>, publisher: Option<&str>) -> io::Result<Option<File>> {
        let name = self.name(publisher);
        match self.codec.container() {
            Container::Ivf => {
                let Some(size) = ivf::key_frame_size(frame.bytes) else {
                    return Ok(None);
                };
                let mut output = RecordingFile::create(&self.dir, &name, self.extension())?;
                output.append(&ivf::header(size))?;
                Ok(Some(File::Ivf(output)))
            }
            Container::Ogg => {
                let output = RecordingFile::create(&self.dir, &name, self.extension())?;
                Ok(Some(File::Ogg(
                    output,
                    Box::new(OpusFile::new(self.ssrc.0)),
                )))
            }
        }
    }

    /// Returns the file name. A publisher that is not of this run has no known name, so the file is
    /// named after the SSRC.
    fn name(&self, publisher: Option<&str>) -> String {
        let kind = match self.codec.kind() {
            Kind::Audio => "audio",
            Kind::Video => "video",
        };
        match publisher {
            Some(publisher) => format!("{}-{kind}", safe_name(publisher)),
            None => format!("ssrc-{}-{kind}", self.ssrc),
        }
    }

    const fn extension(&self) -> &'static str {
        self.codec.container().extension()
    }

    fn rename(&mut self, publisher: &str) {
        let (name, extension) = (self.name(Some(publisher)), self.extension());
        if let File::Ivf(output) | File::Ogg(output, _) = &mut self.file {
            output.rename(&name, extension);
        }
        self.is_named = true;
    }

    fn finish(&mut self) {
        let done = match &mut self.file {
            File::Ivf(output) => state_frame_count(output, self.frames),
            File::Ogg(output, opus) => {
                opus.finish();
                output.append(&opus.take_pages())
            }
            File::None | File::Failed(..) => Ok(()),
        };
        if let Err(error) = done {
            self.fail(error);
        }
    }

    /// Ends the file because of an error. It keeps the whole records up to here.
    fn fail(&mut self, error: io::Error) {
        if let File::Ivf(output) = &mut self.file {
            // Only the first error is reported.
            let _ = state_frame_count(output, self.frames);
        }
        if let File::Ivf(output) | File::Ogg(output, _) = &self.file {
            self.file = File::Failed(output.path().to_owned(), error);
        }
    }
}

impl File {
    /// Appends a frame; returns false if it was not accepted.
    fn append(&mut self, frame: &StreamFrame<'_>) -> io::Result<bool> {
        match self {
            File::Ivf(output) => {
                let mut record = Vec::with_capacity(frame.bytes.len() + ivf::HEADER_LEN);
                ivf::write_frame(frame.at, frame.bytes, &mut record);
                output.append(&record)?;
                Ok(true)
            }
            File::Ogg(output, opus) => {
                let taken = opus.push(frame.at, frame.bytes).is_ok();
                let pages = opus.take_pages();
                if !pages.is_empty() {
                    output.append(&pages)?;
                }
                Ok(taken)
            }
            File::None | File::Failed(..) => Ok(false),
        }
    }
}

fn state_frame_count(output: &mut RecordingFile, frames: u64) -> io::Result<()> {
    output.replace(ivf::FRAME_COUNT_AT, &(frames as u32).to_le_bytes())
}

/// Returns the publisher of a frame, if it is of this run.
fn publisher(identity: &FrameIdentity, plan: &Plan) -> Option<String> {
    plan.identity_at(identity.origin.publisher)
        .filter(|_| identity.run == plan.run_tag)
}
