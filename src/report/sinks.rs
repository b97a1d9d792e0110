//! Destinations of reports. Files are opened before the run, so that an hour's figures are not lost
//! to a mistyped directory.

use std::error::Error;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, Write};
use std::path::{Path, PathBuf};

use super::{Outcome, emit, hgrm, json, participants};

/// Destinations that the user wants reports at, besides the text.
#[derive(Clone, Debug, Default)]
pub struct Destinations {
    /// `-` is standard output; the text then goes to standard error.
    pub json: Option<PathBuf>,
    pub participants: Option<PathBuf>,
    /// A directory, made if it does not exist.
    pub hgrm: Option<PathBuf>,
    /// Directory for recordings, made if it does not exist. They are written during the run, by
    /// [`crate::recording`].
    pub record: Option<PathBuf>,
}

impl Destinations {
    pub fn json_on_stdout(&self) -> bool {
        self.json.as_deref().is_some_and(is_stdout)
    }
}

/// A destination that cannot be written.
#[derive(Debug)]
pub struct UnwritableReport {
    path: PathBuf,
    cause: io::Error,
    /// The directory that must be made first.
    missing: Option<PathBuf>,
}

impl UnwritableReport {
    fn new(path: &Path, cause: io::Error) -> UnwritableReport {
        let missing = match cause.kind() {
            io::ErrorKind::NotFound => path
                .parent()
                .filter(|dir| !dir.as_os_str().is_empty() && !dir.exists()),
            _ => None,
        };
        UnwritableReport {
            path: path.to_owned(),
            missing: missing.map(Path::to_owned),
            cause,
        }
    }
}

impl fmt::Display for UnwritableReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot write {}: {}", self.path.display(), self.cause)?;
        match &self.missing {
            Some(dir) => write!(f, "; mkdir -p {}", dir.display()),
            None => Ok(()),
        }
    }
}

impl Error for UnwritableReport {}

/// Open destinations.
#[derive(Debug, Default)]
pub struct Sinks {
    json: Option<Sink>,
    participants: Option<Sink>,
    hgrm: Option<PathBuf>,
}

#[derive(Debug)]
enum Sink {
    Stdout,
    File(ReportFile),
}

/// An open file. If this run made it and never wrote to it, it is removed again, because an empty
/// file would look like a broken report.
#[derive(Debug)]
struct ReportFile {
    path: PathBuf,
    file: File,
    /// Whether this run made it, and it is still empty.
    is_blank: bool,
}

impl Drop for ReportFile {
    fn drop(&mut self) {
        if self.is_blank {
            // Only an attempt to tidy up, after another error that is being reported.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Sinks {
    /// Opens all requested destinations. The contents of the files stay until [`Sinks::write`].
    ///
    /// # Errors
    /// Returns one error for each destination that cannot be written.
    pub fn open(destinations: &Destinations) -> Result<Sinks, Vec<UnwritableReport>> {
        let mut refusals = Vec::new();
        let mut open = |path: &Option<PathBuf>| {
            path.as_deref()
                .and_then(|path| Sink::open(path).map_err(|why| refusals.push(why)).ok())
        };
        let sinks = Sinks {
            json: open(&destinations.json),
            participants: open(&destinations.participants),
            hgrm: destinations.hgrm.clone(),
        };
        let dirs = [&destinations.hgrm, &destinations.record];
        refusals.extend(
            dirs.into_iter()
                .flatten()
                .filter_map(|dir| writable_directory(dir).err()),
        );
        if refusals.is_empty() {
            Ok(sinks)
        } else {
            Err(refusals)
        }
    }

    /// Writes a JSON document that is not the report of a run.
    ///
    /// # Errors
    /// Returned if it cannot be written. Names the destination.
    pub fn write_json(self, text: &str) -> Result<(), UnwritableReport> {
        self.json.map_or(Ok(()), |sink| sink.write(text))
    }

    /// Writes every report.
    ///
    /// # Errors
    /// Returns the first destination that failed, by name. The others are written all the same.
    pub fn write(self, outcome: &Outcome) -> Result<(), UnwritableReport> {
        let mut first = Ok(());
        if let Some(sink) = self.json {
            first = first.and(sink.write(&json::render(outcome)));
        }
        if let Some(sink) = self.participants {
            first = first.and(sink.write(&participants::render(outcome)));
        }
        if let Some(dir) = self.hgrm {
            first = first.and(
                hgrm::write(&dir, &outcome.totals.record)
                    .map_err(|cause| UnwritableReport::new(&dir, cause)),
            );
        }
        first
    }
}

impl Sink {
    fn open(path: &Path) -> Result<Sink, UnwritableReport> {
        if is_stdout(path) {
            return Ok(Sink::Stdout);
        }
        let mut options = OpenOptions::new();
        options.write(true);
        let made = options.clone().create_new(true).open(path);
        let is_blank = made.is_ok();
        let file = made
            .or_else(|_| options.create(true).truncate(false).open(path))
            .map_err(|cause| UnwritableReport::new(path, cause))?;
        let path = path.to_owned();
        Ok(Sink::File(ReportFile {
            path,
            file,
            is_blank,
        }))
    }

    fn write(self, text: &str) -> Result<(), UnwritableReport> {
        match self {
            Sink::Stdout => emit(&mut io::stdout().lock(), text)
                .map_err(|cause| UnwritableReport::new(Path::new("standard output"), cause)),
            Sink::File(mut report) => {
                report.is_blank = false;
                replace(&mut report.file, text)
                    .map_err(|cause| UnwritableReport::new(&report.path, cause))
            }
        }
    }
}

fn is_stdout(path: &Path) -> bool {
    path == Path::new("-")
}

fn replace(file: &mut File, text: &str) -> io::Result<()> {
    if file.metadata()?.is_file() {
        file.set_len(0)?;
        file.rewind()?;
    }
    emit(file, text)
}

fn writable_directory(dir: &Path) -> Result<(), UnwritableReport> {
    let probe = dir.join(".throng-writable");
    fs::create_dir_all(dir)
        .and_then(|()| File::create(&probe)?.write_all(b""))
        .and_then(|()| fs::remove_file(&probe))
        .map_err(|cause| UnwritableReport::new(dir, cause))
}
