//! The last calibration, kept in the user's cache so that later runs can compare themselves with
//! it.

use std::path::{Path, PathBuf};
use std::{fs, io};

use serde::{Deserialize, Serialize};

use super::Calibration;
#[cfg(test)]
use super::Ceiling;

/// Host that a calibration is valid for. Another processor, kernel or number of CPUs makes it void.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostId {
    /// Processor name as the kernel gives it; empty if the kernel gives none. The same holds for
    /// `kernel`.
    pub processor: String,
    pub kernel: String,
    pub cpus: usize,
}

impl HostId {
    pub fn read(cpus: usize) -> HostId {
        let told = |path: &str| fs::read_to_string(path).unwrap_or_default();
        HostId {
            processor: processor(&told("/proc/cpuinfo")),
            kernel: told("/proc/sys/kernel/osrelease").trim().to_owned(),
            cpus,
        }
    }
}

fn processor(cpuinfo: &str) -> String {
    let named = |line: &str| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == "model name").then(|| value.trim().to_owned())
    };
    cpuinfo.lines().find_map(named).unwrap_or_default()
}

/// Returns `$XDG_CACHE_HOME/throng/calibration.json`, by default below `~/.cache`; `None` for a
/// user without a home.
pub fn path(env: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let absolute = |name: &str| {
        env(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let base =
        absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")))?;
    Some(base.join("throng").join("calibration.json"))
}

/// Replaces the file in one step, so that a reader never sees half of it.
pub fn write(path: &Path, calibration: &Calibration) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder)?;
    let draft = folder.join(format!("calibration.{}.draft", std::process::id()));
    fs::write(&draft, super::json(calibration))?;
    fs::rename(&draft, path)
}

/// Returns the calibration of this host; `None` if there is none, if it is of another host, or if
/// it cannot be read.
pub fn read(path: &Path, host: &HostId) -> Option<Calibration> {
    let calibration: Calibration = serde_json::from_str(&fs::read_to_string(path).ok()?).ok()?;
    let is_ours = calibration.schema == super::SCHEMA && calibration.host == *host;
    (is_ours && is_possible(&calibration)).then_some(calibration)
}

/// Checks the figures, because the file may contain anything. A figure that no host can have makes
/// it void.
fn is_possible(calibration: &Calibration) -> bool {
    const FIGURE_MAX: f64 = 1e12;
    let figures = [
        calibration.us_per_packet,
        calibration.packets_per_second_per_thread,
        calibration.packets.held,
        calibration.joins.held,
        calibration.participants.held,
    ];
    let mut known = figures.into_iter().flatten();
    known.all(|figure| (0.0..=FIGURE_MAX).contains(&figure))
        && calibration.calibrated_at_unix <= FIGURE_MAX as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_lies_where_the_user_has_his() {
        let home = |name: &str| (name == "HOME").then(|| "/home/ada".to_owned());
        assert_eq!(
            path(&home),
            Some("/home/ada/.cache/throng/calibration.json".into())
        );
        let xdg = |name: &str| {
            Some(
                if name == "XDG_CACHE_HOME" {
                    "/var/c"
                } else {
                    "/home/ada"
                }
                .to_owned(),
            )
        };
        assert_eq!(path(&xdg), Some("/var/c/throng/calibration.json".into()));
        // By the specification a relative path is ignored.
        let relative = |name: &str| {
            Some(
                if name == "XDG_CACHE_HOME" {
                    "c"
                } else {
                    "/home/ada"
                }
                .to_owned(),
            )
        };
        assert_eq!(
            path(&relative),
            Some("/home/ada/.cache/throng/calibration.json".into())
        );
        assert_eq!(path(&|_| None), None);
    }

    #[test]
    fn a_file_with_figures_that_no_host_has_is_void() {
        let host = HostId {
            processor: "cpu".to_owned(),
            kernel: "6".to_owned(),
            cpus: 2,
        };
        let calibration = Calibration {
            schema: super::super::SCHEMA.to_owned(),
            version: String::new(),
            calibrated_at_unix: 1,
            host: host.clone(),
            engine_threads: 1,
            sfu_routers: 1,
            us_per_packet: Some(12_345.0),
            packets_per_second_per_thread: Some(54_321.0),
            packets: Ceiling::default(),
            joins: Ceiling::default(),
            participants: Ceiling::default(),
        };
        let sound = super::super::json(&calibration);
        let path = std::env::temp_dir().join(format!("throng-cache-{}", std::process::id()));
        let is_read = |text: &str| {
            fs::write(&path, text).unwrap();
            read(&path, &host).is_some()
        };
        assert!(is_read(&sound));
        for odd in ["NaN", "inf", "-1", "1e300", "1e400", "\"12\""] {
            for known in ["12345.0", "54321.0"] {
                assert!(!is_read(&sound.replace(known, odd)), "{known}: {odd}");
            }
        }
        let late = format!("\"calibrated_at_unix\": {}", u64::MAX);
        assert!(!is_read(&sound.replace("\"calibrated_at_unix\": 1", &late)));
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn the_processor_is_read_as_the_kernel_names_it() {
        assert_eq!(
            processor("processor\t: 0\nmodel name\t: AMD EPYC 7B13\n"),
            "AMD EPYC 7B13"
        );
        assert_eq!(processor("processor\t: 0\n"), "");
    }
}
