//! The last calibration, in the user's cache, for later runs to compare themselves with.

use std::path::{Path, PathBuf};
use std::{fs, io};

use serde::{Deserialize, Serialize};

use super::Calibration;

/// What a calibration holds for: another processor, kernel or number of CPUs makes it void.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostId {
    /// As the kernel names it; empty where it does not. So below.
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

/// `$XDG_CACHE_HOME/throng/calibration.json`, by default below `~/.cache`; `None` for a user without a home.
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

/// Replaces what is there in one step, so that a reader never sees half of it.
pub fn write(path: &Path, calibration: &Calibration) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder)?;
    let draft = folder.join(format!("calibration.{}.draft", std::process::id()));
    fs::write(&draft, super::json(calibration))?;
    fs::rename(&draft, path)
}

/// The calibration of this very host; `None` where there is none, where it is of another host, or cannot be read.
pub fn read(path: &Path, host: &HostId) -> Option<Calibration> {
    let calibration: Calibration = serde_json::from_str(&fs::read_to_string(path).ok()?).ok()?;
    (calibration.schema == super::SCHEMA && calibration.host == *host).then_some(calibration)
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
        // The specification: a relative path is to be ignored.
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
    fn the_processor_is_read_as_the_kernel_names_it() {
        assert_eq!(
            processor("processor\t: 0\nmodel name\t: AMD EPYC 7B13\n"),
            "AMD EPYC 7B13"
        );
        assert_eq!(processor("processor\t: 0\n"), "");
    }
}
