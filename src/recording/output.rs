//! Files of a recording. They never replace an older file and never end with half a frame.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Maximum number of files with one name. A track that is published anew, or resubscribed, is
/// another stream.
const NAMES_MAX: u32 = 10_000;

/// Open file that always ends with whole records.
pub struct RecordingFile {
    path: PathBuf,
    file: File,
    len: u64,
}

impl RecordingFile {
    /// Creates DIR/NAME.EXT, or DIR/NAME-2.EXT if that exists, and so on. The directory is created
    /// if it does not exist.
    pub fn create(dir: &Path, name: &str, extension: &str) -> io::Result<RecordingFile> {
        fs::create_dir_all(dir)?;
        let (path, file) = create_new(dir, name, extension)?;
        Ok(RecordingFile { path, file, len: 0 })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Renames the file within its directory. The old name stays if that fails.
    pub fn rename(&mut self, name: &str, extension: &str) {
        let dir = self.path.parent().unwrap_or(Path::new("."));
        // An empty file of ours reserves the new name, so that no other file is replaced.
        let Ok((path, _)) = create_new(dir, name, extension) else {
            return;
        };
        match fs::rename(&self.path, &path) {
            Ok(()) => self.path = path,
            Err(_) => drop(fs::remove_file(&path)),
        }
    }

    /// Appends one record in one write. If it does not fit, the file keeps the records before it.
    pub fn append(&mut self, record: &[u8]) -> io::Result<()> {
        match self.file.write_all(record) {
            Ok(()) => {
                self.len += record.len() as u64;
                Ok(())
            }
            Err(error) => {
                // Only the first error is reported.
                let _ = self.file.set_len(self.len);
                Err(error)
            }
        }
    }

    /// Overwrites existing bytes.
    pub fn replace(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(at))?;
        self.file.write_all(bytes)?;
        self.file.seek(SeekFrom::Start(self.len)).map(drop)
    }
}

fn create_new(dir: &Path, name: &str, extension: &str) -> io::Result<(PathBuf, File)> {
    for number in 1..=NAMES_MAX {
        let suffix = if number == 1 {
            String::new()
        } else {
            format!("-{number}")
        };
        let path = dir.join(format!("{name}{suffix}.{extension}"));
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            other => return other.map(|file| (path, file)),
        }
    }
    Err(ErrorKind::AlreadyExists.into())
}

/// Longest file name that is made of a name, in bytes. File systems take 255, and a number and an
/// extension follow.
const SAFE_NAME_BYTES_MAX: usize = 200;

/// Turns a room's name or an identity into a file name. Letters, digits and `-_.` stay, other
/// characters become `_`, and no name begins with a dot. A long one loses its middle, because what
/// tells names of a run apart is at their end.
pub fn safe_name(name: &str) -> String {
    let safe = |c: char| {
        if c.is_alphanumeric() || matches!(c, '-' | '_' | '.') {
            c
        } else {
            '_'
        }
    };
    let name = shortened(name.chars().map(safe).collect());
    match name.strip_prefix('.') {
        Some(rest) => format!("_{rest}"),
        None => name,
    }
}

fn shortened(name: String) -> String {
    const MARK: &str = "__";
    if name.len() <= SAFE_NAME_BYTES_MAX {
        return name;
    }
    let half = (SAFE_NAME_BYTES_MAX - MARK.len()) / 2;
    let begin = name.get(..name.floor_char_boundary(half));
    let end = name.get(name.ceil_char_boundary(name.len() - half)..);
    begin.unwrap_or_default().to_owned() + MARK + end.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_fit_a_file_system_and_stay_apart() {
        for letter in ["x", "ü", "😀"] {
            let name =
                |end: u32| safe_name(&format!("{}-{end}", letter.repeat(256 / letter.len())));
            assert!(name(1).len() <= SAFE_NAME_BYTES_MAX, "{}", name(1));
            assert!(name(11).ends_with("-11") && name(11) != name(12));
        }
    }

    fn scratch(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("throng-output-{}-{name}", std::process::id()))
    }

    #[test]
    fn any_name_stays_inside_its_directory() {
        for (name, safe) in [
            ("room-1", "room-1"),
            ("../../etc/passwd", "_._.._etc_passwd"),
            ("..", "_."),
            ("a/b\\c:d*\"<>|\0", "a_b_c_d______"),
            ("Zürich", "Zürich"),
        ] {
            assert_eq!(safe_name(name), safe);
        }
    }

    #[test]
    fn nothing_is_written_over_neither_when_made_nor_when_renamed() {
        let dir = scratch("names");
        let mut first = RecordingFile::create(&dir.join("deep"), "a", "ivf").unwrap();
        first.append(b"first").unwrap();
        let mut second = RecordingFile::create(&dir.join("deep"), "a", "ivf").unwrap();
        second.append(b"second").unwrap();
        assert_eq!(second.path(), dir.join("deep/a-2.ivf"));
        let mut third = RecordingFile::create(&dir.join("deep"), "unknown", "ivf").unwrap();
        third.rename("a", "ivf");
        third.append(b"third").unwrap();
        for (name, text) in [("a", "first"), ("a-2", "second"), ("a-3", "third")] {
            assert_eq!(
                fs::read_to_string(dir.join(format!("deep/{name}.ivf"))).unwrap(),
                text
            );
        }
        assert!(!dir.join("deep/unknown.ivf").exists());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_replaced_field_leaves_the_rest_and_the_end_where_they_were() {
        let dir = scratch("replace");
        let mut output = RecordingFile::create(&dir, "a", "ivf").unwrap();
        output.append(b"0000 body").unwrap();
        output.replace(0, b"1234").unwrap();
        output.append(b", more").unwrap();
        assert_eq!(
            fs::read_to_string(output.path()).unwrap(),
            "1234 body, more"
        );
        fs::remove_dir_all(dir).unwrap();
    }
}
