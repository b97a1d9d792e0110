//! The journal of a run. Every [`JournalEntry`] is written before anybody is told that it was
//! accepted, so a coordinator that was killed continues where it was.
//!
//! Each entry is one line: the CRC-32 of the JSON in eight hexadecimal digits, a space, the JSON, a
//! newline. The first line is the [`Head`]. A truncated line at the end is what a crash leaves. It
//! is dropped, because nobody was told that it had been accepted. An invalid line in the middle is
//! damage, and the journal is refused.
//!
//! **What it survives.** The end of the process for any reason, because an entry has been given to
//! the kernel before it is acknowledged. The loss of the host, except for the beats of the last
//! second: beats are made durable once a second, and everything else at once.
//!
//! **What it contains.** The run and what it measured, but nothing that gives access: of the token
//! only a salted hash, and nothing of LiveKit's key. Only the user can read the file (mode 0600).
//!
//! Beats contain cumulative records, so most of a long journal is obsolete. It is rewritten when it
//! has grown to several times the size of its content.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use flate2::Crc;
use serde::{Deserialize, Serialize};

use super::access::Seal;
use super::protocol::REPORT_BYTES_MAX;
use super::state::{JournalEntry, RunSetup, RunState};

/// Version of the journal format. 2: the run is a scenario.
const VERSION: u32 = 2;
/// Longest line: the longest report, with a margin.
const LINE_BYTES_MAX: usize = REPORT_BYTES_MAX + (1 << 20);
/// Smallest size at which a journal is rewritten.
const REWRITE_BYTES_MIN: u64 = 64 << 20;
/// Growth since the last rewrite, as a factor, at which a journal is rewritten.
const REWRITE_FACTOR: u64 = 4;
/// Longest time until a beat is made durable.
const SYNC_US: u64 = 1_000_000;

/// First line of the journal: what the run is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Head {
    pub journal: u32,
    pub created_us: u64,
    pub setup: RunSetup,
    /// Seal of the token that admits probers; `None`: everybody is admitted.
    pub seal: Option<Seal>,
}

/// The part of a head that every version has.
#[derive(Deserialize)]
struct JournalFormat {
    journal: u32,
}

impl Head {
    pub fn new(setup: RunSetup, seal: Option<Seal>, created_us: u64) -> Head {
        Head {
            journal: VERSION,
            created_us,
            setup,
            seal,
        }
    }
}

/// Reason why there is no journal. Each message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error(
        "the journal {path} is in use by another coordinator: wait until that one has ended, or give another --journal"
    )]
    InUse { path: String },
    #[error(
        "the journal {path} is damaged at byte {at}, and sound entries follow: give another --journal, or cut it there to lose what follows (truncate -s {at} {path})"
    )]
    Damaged { path: String, at: u64 },
    #[error("{path} is not a journal of throng: give another --journal")]
    NotOurs { path: String },
    #[error(
        "the journal {path} has version {found}, and this throng writes version {VERSION}: go on with the throng that wrote it, or give another --journal"
    )]
    OtherVersion { path: String, found: u32 },
    #[error("cannot write the journal {path}: {cause}")]
    Io { path: String, cause: io::Error },
}

/// An open journal. Its file is locked while this value exists.
pub struct Journal {
    path: PathBuf,
    file: File,
    /// Length up to which entries are complete.
    bytes: u64,
    /// Length of the journal when it was last rewritten.
    bytes_rewritten: u64,
    /// Time of the first entry that is not durable yet.
    unsynced_since_us: Option<u64>,
}

/// Content of an old journal.
pub struct Replay {
    pub journal: Journal,
    pub head: Head,
    /// Length of a truncated last line.
    pub dropped_bytes: u64,
}

impl Journal {
    /// Creates a journal. The file must not exist yet.
    pub fn create(path: &Path, head: &Head) -> Result<Journal, JournalError> {
        let made = || {
            let file = options().create_new(true).open(path)?;
            let mut line = Vec::new();
            frame(head, &mut line)?;
            file.write_all_at(&line, 0)?;
            file.sync_all()?;
            sync_directory(path);
            Ok((file, line.len() as u64))
        };
        let (file, bytes) = made().map_err(|cause| io_error(path, cause))?;
        lock(&file, path)?;
        Ok(Journal::new(path, file, bytes))
    }

    /// Opens an existing journal. `begin` gets its head, and `entry` gets its entries in order.
    pub fn open(
        path: &Path,
        mut begin: impl FnMut(&Head),
        mut entry: impl FnMut(JournalEntry),
    ) -> Result<Replay, JournalError> {
        let file = options()
            .open(path)
            .map_err(|cause| io_error(path, cause))?;
        lock(&file, path)?;
        let mut lines = Lines::new(&file);
        let not_ours = || JournalError::NotOurs { path: shown(path) };
        let first = lines.next().map_err(|cause| io_error(path, cause))?;
        let first = first.as_deref().ok_or_else(not_ours)?;
        let format: JournalFormat = serde_json::from_slice(first).map_err(|_| not_ours())?;
        if format.journal != VERSION {
            return Err(JournalError::OtherVersion {
                path: shown(path),
                found: format.journal,
            });
        }
        let head: Head = serde_json::from_slice(first).map_err(|_| not_ours())?;
        if head.setup.load.scenario.validate().is_err() {
            return Err(not_ours());
        }
        begin(&head);
        while let Some(json) = lines.next().map_err(|cause| io_error(path, cause))? {
            entry(serde_json::from_slice(&json).map_err(|_| not_ours())?);
        }
        let bytes = lines.sound_bytes;
        if lines
            .is_sound_again()
            .map_err(|cause| io_error(path, cause))?
        {
            return Err(JournalError::Damaged {
                path: shown(path),
                at: bytes,
            });
        }
        let length = file
            .metadata()
            .and_then(|metadata| file.set_len(bytes).map(|()| metadata.len()));
        let dropped_bytes = length.map_err(|cause| io_error(path, cause))? - bytes;
        Ok(Replay {
            journal: Journal::new(path, file, bytes),
            head,
            dropped_bytes,
        })
    }

    fn new(path: &Path, file: File, bytes: u64) -> Journal {
        Journal {
            path: path.to_owned(),
            file,
            bytes,
            bytes_rewritten: bytes,
            unsynced_since_us: None,
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes one entry. After an error nothing of it is left, and the caller may try again.
    pub fn append(&mut self, entry: &JournalEntry, now_us: u64) -> io::Result<()> {
        let mut line = Vec::new();
        frame(entry, &mut line)?;
        let written = self
            .file
            .write_all_at(&line, self.bytes)
            .and_then(|()| match entry {
                JournalEntry::Beat { .. } => Ok(()),
                _ => self.file.sync_data(),
            });
        if let Err(error) = written {
            // Half a line would be taken for damage once others follow it. If it stays, the next
            // entry overwrites it.
            let _ = self.file.set_len(self.bytes);
            return Err(error);
        }
        self.bytes += line.len() as u64;
        match entry {
            JournalEntry::Beat { .. } => {
                self.unsynced_since_us.get_or_insert(now_us);
            }
            _ => self.unsynced_since_us = None,
        }
        Ok(())
    }

    /// Makes entries durable that are due, and rewrites the journal if it has grown long. To be
    /// called about once a second.
    pub fn keep(&mut self, state: &RunState, head: &Head, now_us: u64) -> io::Result<()> {
        if self
            .unsynced_since_us
            .is_some_and(|since| now_us.saturating_sub(since) >= SYNC_US)
        {
            self.file.sync_data()?;
            self.unsynced_since_us = None;
        }
        if self.bytes >= REWRITE_BYTES_MIN.max(self.bytes_rewritten * REWRITE_FACTOR) {
            self.rewrite(state, head)
        } else {
            Ok(())
        }
    }

    /// Replaces this journal by a shorter one with the same state. On an error the old one stays in
    /// use.
    fn rewrite(&mut self, state: &RunState, head: &Head) -> io::Result<()> {
        let mut name = self.path.clone().into_os_string();
        name.push(".new");
        let beside = PathBuf::from(name);
        let written = || {
            let file = options().create(true).truncate(true).open(&beside)?;
            file.try_lock().map_err(|_| io::ErrorKind::ResourceBusy)?;
            let mut bytes = 0;
            let mut line = Vec::new();
            let mut write = |line: &mut Vec<u8>| {
                file.write_all_at(line, bytes)?;
                bytes += line.len() as u64;
                line.clear();
                io::Result::Ok(())
            };
            frame(head, &mut line)?;
            write(&mut line)?;
            for entry in state.entries() {
                frame(&entry, &mut line)?;
                write(&mut line)?;
            }
            file.sync_all()?;
            std::fs::rename(&beside, &self.path)?;
            sync_directory(&self.path);
            Ok((file, bytes))
        };
        match written() {
            Ok((file, bytes)) => {
                *self = Journal::new(&self.path, file, bytes);
                Ok(())
            }
            Err(error) => {
                let _ = std::fs::remove_file(&beside);
                // The next attempt is made when the journal has grown by the same factor again.
                self.bytes_rewritten = self.bytes;
                Err(error)
            }
        }
    }

    /// Removes the journal. To be called when the run is over and its result has been shown.
    pub fn remove(self) -> io::Result<()> {
        std::fs::remove_file(&self.path)
    }
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    options
}

fn lock(file: &File, path: &Path) -> Result<(), JournalError> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(JournalError::InUse { path: shown(path) }),
        Err(TryLockError::Error(cause)) => Err(io_error(path, cause)),
    }
}

/// Makes a new name in the directory durable. Some file systems do not support this, and do not
/// need it.
fn sync_directory(path: &Path) {
    let directory = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let _ = File::open(directory).and_then(|directory| directory.sync_all());
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

fn io_error(path: &Path, cause: io::Error) -> JournalError {
    JournalError::Io {
        path: shown(path),
        cause,
    }
}

/// Appends `message` to `line` in the journal's format.
fn frame(message: &impl Serialize, line: &mut Vec<u8>) -> io::Result<()> {
    let start = line.len();
    line.extend_from_slice(b"00000000 ");
    serde_json::to_writer(&mut *line, message)?;
    let crc = format!("{:08x}", crc(&line[start + 9..]));
    line[start..start + 8].copy_from_slice(crc.as_bytes());
    line.push(b'\n');
    Ok(())
}

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// Returns the JSON of a complete line.
fn unframe(line: &[u8]) -> Option<&[u8]> {
    let (sum, json) = line.strip_suffix(b"\n")?.split_at_checked(9)?;
    let sum = u32::from_str_radix(std::str::from_utf8(sum.strip_suffix(b" ")?).ok()?, 16).ok()?;
    (sum == crc(json)).then_some(json)
}

/// Reads line by line, and remembers up to where the lines were valid.
struct Lines<'a> {
    reader: BufReader<&'a File>,
    line: Vec<u8>,
    sound_bytes: u64,
}

impl<'a> Lines<'a> {
    fn new(file: &'a File) -> Lines<'a> {
        Lines {
            reader: BufReader::new(file),
            line: Vec::new(),
            sound_bytes: 0,
        }
    }

    /// Returns the next line's JSON; `None` at the end, or if the line is not complete.
    fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        self.read()?;
        let json = unframe(&self.line).map(<[u8]>::to_vec);
        if json.is_some() {
            self.sound_bytes += self.line.len() as u64;
        }
        Ok(json)
    }

    fn read(&mut self) -> io::Result<()> {
        self.line.clear();
        self.reader
            .by_ref()
            .take(LINE_BYTES_MAX as u64)
            .read_until(b'\n', &mut self.line)
            .map(drop)
    }

    /// Returns whether a valid line follows after an invalid one.
    fn is_sound_again(&mut self) -> io::Result<bool> {
        while !self.line.is_empty() {
            self.read()?;
            if unframe(&self.line).is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Returns whether other users may access the file, which should be the user's alone.
pub fn is_open_to_others(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o077 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coordinator::state::tests::{entries_of_a_run, setup};

    /// Test directory of its own, which is removed on drop.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let path =
                std::env::temp_dir().join(format!("throng-journal-{}-{name}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Scratch(path)
        }

        fn file(&self) -> PathBuf {
            self.0.join("run.journal")
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn head() -> Head {
        Head::new(setup(2), None, 7)
    }

    fn written(path: &Path) -> Vec<JournalEntry> {
        let entries = entries_of_a_run();
        let mut journal = Journal::create(path, &head()).unwrap();
        entries
            .iter()
            .for_each(|entry| journal.append(entry, 0).unwrap());
        entries
    }

    fn read(path: &Path) -> Result<(Vec<String>, u64), JournalError> {
        let mut entries = Vec::new();
        let replay = Journal::open(path, |_| {}, |entry| entries.push(json(&entry)))?;
        assert_eq!(replay.head.setup, setup(2));
        Ok((entries, replay.dropped_bytes))
    }

    fn json(entry: &JournalEntry) -> String {
        serde_json::to_string(entry).unwrap()
    }

    #[test]
    fn what_was_written_is_read_again() {
        let scratch = Scratch::new("again");
        let entries = written(&scratch.file());
        let (read, dropped) = read(&scratch.file()).unwrap();
        assert_eq!((read, dropped), (entries.iter().map(json).collect(), 0));
        assert!(!is_open_to_others(&scratch.file()));
        assert!(
            matches!(Journal::create(&scratch.file(), &head()), Err(JournalError::Io { cause, .. }) if cause.kind() == io::ErrorKind::AlreadyExists)
        );
    }

    #[test]
    fn a_line_cut_short_at_the_end_is_dropped_wherever_it_was_cut() {
        let scratch = Scratch::new("torn");
        let entries: Vec<String> = written(&scratch.file()).iter().map(json).collect();
        let whole = std::fs::read(scratch.file()).unwrap();
        let last = whole[..whole.len() - 1]
            .iter()
            .rposition(|b| *b == b'\n')
            .unwrap()
            + 1;
        for length in (last..whole.len())
            .step_by(211)
            .chain([last + 1, whole.len() - 1])
        {
            std::fs::write(scratch.file(), &whole[..length]).unwrap();
            let (read, dropped) = read(&scratch.file()).unwrap();
            assert_eq!(
                (read.len(), dropped),
                (entries.len() - 1, (length - last) as u64)
            );
            // The next entry is written where the complete lines end.
            let mut replay = Journal::open(&scratch.file(), |_| {}, |_| {}).unwrap();
            replay
                .journal
                .append(&JournalEntry::Over { at_us: 1 }, 0)
                .unwrap();
            drop(replay);
            let (again, _) = super::tests::read(&scratch.file()).unwrap();
            assert_eq!(
                again.last().unwrap(),
                &json(&JournalEntry::Over { at_us: 1 })
            );
        }
    }

    #[test]
    fn damage_in_the_middle_is_refused_and_says_where() {
        let scratch = Scratch::new("damaged");
        written(&scratch.file());
        let mut bytes = std::fs::read(scratch.file()).unwrap();
        let second = bytes.iter().position(|b| *b == b'\n').unwrap() + 1;
        bytes[second + 30] ^= 1;
        std::fs::write(scratch.file(), &bytes).unwrap();
        let why = read(&scratch.file()).unwrap_err().to_string();
        assert!(why.contains(&format!("damaged at byte {second}")), "{why}");
    }

    #[test]
    fn other_files_are_refused_and_left_as_they_are() {
        let scratch = Scratch::new("others");
        for text in ["", "hello\n", "00000000 {}\n"] {
            std::fs::write(scratch.file(), text).unwrap();
            assert!(
                matches!(read(&scratch.file()), Err(JournalError::NotOurs { .. })),
                "{text:?}"
            );
            assert_eq!(std::fs::read_to_string(scratch.file()).unwrap(), text);
        }
    }

    #[test]
    fn a_journal_of_another_version_is_refused_by_its_number() {
        let scratch = Scratch::new("version");
        let mut line = Vec::new();
        let old = serde_json::json!({"journal": 1, "created_us": 7, "setup": {"seed": 7}});
        frame(&old, &mut line).unwrap();
        std::fs::write(scratch.file(), &line).unwrap();
        let why = read(&scratch.file()).unwrap_err().to_string();
        assert!(why.contains("has version 1"), "{why}");
        assert!(why.contains("writes version 2"), "{why}");
        assert_eq!(std::fs::read(scratch.file()).unwrap(), line);
    }

    #[test]
    fn a_journal_whose_run_is_out_of_bounds_is_refused() {
        let scratch = Scratch::new("bounds");
        let mut head = head();
        head.setup.load.scenario.media.video.frames_per_second = 61;
        drop(Journal::create(&scratch.file(), &head).unwrap());
        assert!(matches!(
            read(&scratch.file()),
            Err(JournalError::NotOurs { .. })
        ));
    }

    #[test]
    fn two_coordinators_do_not_share_a_journal() {
        let scratch = Scratch::new("shared");
        let _first = Journal::create(&scratch.file(), &head()).unwrap();
        assert!(matches!(
            read(&scratch.file()),
            Err(JournalError::InUse { .. })
        ));
    }

    #[test]
    fn a_journal_written_anew_says_the_same_in_less() {
        let scratch = Scratch::new("anew");
        let entries = written(&scratch.file());
        let mut replay = Journal::open(&scratch.file(), |_| {}, |_| {}).unwrap();
        let mut state = RunState::new(setup(2), 1, 0);
        for entry in entries.iter().chain(&entries) {
            state.apply(entry.clone());
            replay.journal.append(entry, 0).unwrap();
        }
        let long = replay.journal.bytes;
        replay.journal.rewrite(&state, &head()).unwrap();
        assert!(replay.journal.bytes < long);
        replay
            .journal
            .append(&JournalEntry::Over { at_us: 1 }, 0)
            .unwrap();
        drop(replay);
        let mut again = RunState::new(setup(2), 1, 0);
        Journal::open(&scratch.file(), |_| {}, |entry| again.apply(entry)).unwrap();
        state.apply(JournalEntry::Over { at_us: 1 });
        let all = |state: &RunState| state.entries().iter().map(json).collect::<Vec<_>>();
        assert_eq!(all(&again), all(&state));
    }
}
