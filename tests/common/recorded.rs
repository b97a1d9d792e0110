//! Reads recordings back: by the layout of their formats, and with ffmpeg.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ogg::PacketReader;
use throng::media::identity::FrameIdentity;

/// One frame of an IVF file.
pub struct Picture {
    pub timestamp: u64,
    pub bytes: Vec<u8>,
}

impl Picture {
    pub fn is_key(&self) -> bool {
        self.bytes[0] & 1 == 0
    }

    pub fn identity(&self) -> FrameIdentity {
        FrameIdentity::parse_video(&self.bytes).expect("our own frame")
    }
}

/// Returns the frame count of the header, and the frames.
pub fn read_ivf(path: &Path) -> (usize, Vec<Picture>) {
    let file = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let (header, mut rest) = file.split_at(32);
    assert_eq!(
        (&header[..8], &header[8..12]),
        (&b"DKIF\0\0\x20\0"[..], &b"VP80"[..])
    );
    let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
    assert_eq!(
        (number(&header[16..20]), number(&header[20..24])),
        (90_000, 1)
    );
    let mut pictures = Vec::new();
    while !rest.is_empty() {
        let (len, timestamp) = (
            number(&rest[..4]) as usize,
            u64::from_le_bytes(rest[4..12].try_into().unwrap()),
        );
        let bytes = rest[12..12 + len].to_vec();
        pictures.push(Picture { timestamp, bytes });
        rest = &rest[12 + len..];
    }
    (number(&header[24..28]) as usize, pictures)
}

/// One Opus packet with sound of an Ogg file, with its start in samples.
pub struct Sound {
    pub position: u64,
    pub identity: Option<FrameIdentity>,
}

/// Returns the packets with sound, and the length of the stream in samples: by the contents of its
/// packets, and by its last granule position.
pub fn read_opus(path: &Path) -> (Vec<Sound>, u64, u64) {
    let mut reader = PacketReader::new(
        File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())),
    );
    assert!(
        reader
            .read_packet_expected()
            .unwrap()
            .data
            .starts_with(b"OpusHead\x01\x02")
    );
    assert!(
        reader
            .read_packet_expected()
            .unwrap()
            .data
            .starts_with(b"OpusTags")
    );
    let (mut sounds, mut position, mut granule) = (Vec::new(), 0, 0);
    while let Some(packet) = reader
        .read_packet()
        .expect("whole pages with right checksums")
    {
        let parsed = opus::packet::parse(&packet.data).expect("an Opus packet");
        if parsed.frames.iter().any(|frame| !frame.is_empty()) {
            sounds.push(Sound {
                position,
                identity: FrameIdentity::parse_audio(&packet.data),
            });
        }
        position += opus::packet::get_nb_samples(&packet.data, 48_000).unwrap() as u64;
        granule = packet.absgp_page();
        assert!(
            !packet.last_in_page() || granule == position,
            "a page says {granule} and holds {position}"
        );
    }
    (sounds, position, granule)
}

/// Returns the only file in `dir` whose name has this ending.
pub fn only_file(dir: &Path, ending: &str) -> PathBuf {
    let files = fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let paths = files.map(|file| file.unwrap().path());
    let mut found: Vec<PathBuf> = paths
        .filter(|path| path.to_string_lossy().ends_with(ending))
        .collect();
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

/// Whether ffmpeg is there to play recordings. Prints a line if not, and panics under `CI`.
pub fn has_ffmpeg() -> bool {
    let version = Command::new("ffmpeg")
        .arg("-version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    assert!(
        version.is_ok() || std::env::var_os("CI").is_none(),
        "recordings need a player: install ffmpeg"
    );
    if version.is_err() {
        println!("skipped: install ffmpeg to play recordings");
    }
    version.is_ok()
}

/// Plays a file with ffmpeg's own decoder and with the codec's, neither of which may print
/// anything. Returns the number of decoded bytes of each.
pub fn play(path: &Path) -> [usize; 2] {
    let (kind, decoders, output): (_, _, &[&str]) =
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("ivf") => (
                "-c:v",
                ["vp8", "libvpx"],
                &[
                    "-fps_mode",
                    "passthrough",
                    "-f",
                    "rawvideo",
                    "-pix_fmt",
                    "yuv420p",
                ],
            ),
            _ => ("-c:a", ["opus", "libopus"], &["-f", "s16le"]),
        };
    decoders.map(|decoder| {
        let mut command = Command::new("ffmpeg");
        command
            .args(["-nostdin", "-v", "warning", kind, decoder, "-i"])
            .arg(path)
            .args(output)
            .arg("pipe:1");
        let played = command.output().expect("ffmpeg runs");
        let said = String::from_utf8_lossy(&played.stderr);
        assert!(
            played.status.success() && said.is_empty(),
            "{decoder}, {}: {said}",
            path.display()
        );
        played.stdout.len()
    })
}
