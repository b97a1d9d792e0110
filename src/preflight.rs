//! Problems that would spoil the run, found before it starts. Each message contains the fix.
//!
//! [`check`] is a pure function of the plan and a [`Host`]. The host is read once from the kernel,
//! or made up by tests. A *refusal* would make participants fail; a *warning* may make the figures
//! worse.

use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::measure::Kind;
use crate::plan::{Plan, Resources};
use crate::words::{count, number, scaled};

/// Files besides sockets: libraries, terminals and reports of the process, and files that the
/// runtime opens.
const FILES_SLACK: u64 = 64;
/// Descriptors of an engine thread: poll, timer and wake-up.
const FILES_PER_THREAD: u64 = 4;
/// Ports that other programs on the host may use.
const PORTS_SLACK: u64 = 64;
/// Seconds of a subscriber's traffic that a receive buffer must hold, because a stalled host may
/// leave that much unread.
const BUFFERED_SECONDS: f64 = 0.25;
/// Bytes of the requested SO_RCVBUF value that one packet takes. Measured: 4 MiB hold 3,640 video
/// packets.
const BUFFER_BYTES_PER_PACKET: f64 = 1_152.0;
/// Smallest buffer that a socket asks for. It covers connection set-up and key frames.
const BUFFER_BYTES_MIN: u64 = 128 << 10;
/// Share of the threads' time above which ticks begin to be late.
const BUSY_SHARE_MAX: f64 = 0.7;
/// Share of the free memory above which the estimate is too close to the limit.
const MEMORY_SHARE_MAX: f64 = 0.8;

/// Limits of this host. `None` means that the kernel does not say; nothing is judged by it then.
#[derive(Clone, Debug)]
pub struct Host {
    /// Soft file limit, after it was raised as far as possible.
    pub files_max: Option<u64>,
    /// Hard file limit, which only an administrator can raise.
    pub files_hard_max: Option<u64>,
    /// Range of local ports for sockets bound to port 0.
    pub source_ports: Option<RangeInclusive<u16>>,
    /// Value of `net.core.rmem_max`.
    pub receive_buffer_max: Option<u64>,
    /// Number of CPUs in the affinity mask.
    pub cpus: usize,
    /// CPU time that the cgroup grants, in CPUs.
    pub cpu_quota: Option<f64>,
    /// Memory that can be allocated without swapping: the host's or the cgroup's, whichever is
    /// less.
    pub memory_available_bytes: Option<u64>,
}

/// Findings of the check: texts for the user that include the fix.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    pub refusals: Vec<String>,
    pub warnings: Vec<String>,
}

impl Host {
    /// Reads this host. It also raises the soft file limit to the hard one.
    pub fn read() -> Host {
        let limit = raised_file_limit();
        Host {
            files_max: limit.current,
            files_hard_max: limit.maximum,
            cpus: cpus_by_affinity(),
            ..Host::read_below(Path::new("/"))
        }
    }

    /// Reads everything that the kernel shows in files below `root`.
    fn read_below(root: &Path) -> Host {
        let number = |path: &str| read_number(&root.join(path));
        let cgroup = Cgroup::read(root);
        let free = meminfo_available(&root.join("proc/meminfo"));
        Host {
            files_max: None,
            files_hard_max: None,
            source_ports: port_range(&root.join("proc/sys/net/ipv4/ip_local_port_range")),
            receive_buffer_max: number("proc/sys/net/core/rmem_max"),
            cpus: 1,
            cpu_quota: cgroup.cpu_quota(),
            memory_available_bytes: [free, cgroup.memory_available()]
                .into_iter()
                .flatten()
                .min(),
        }
    }

    /// Returns the number of whole CPUs that the process may keep busy; at least one.
    pub fn usable_cpus(&self) -> usize {
        let quota = self
            .cpu_quota
            .map_or(usize::MAX, |quota| quota.floor() as usize);
        self.cpus.min(quota).max(1)
    }
}

/// Returns what `plan` needs on this host. `threads` is the number asked for; the default is one
/// per CPU, or half of the CPUs if the server shares this host.
pub fn resources(plan: &Plan, host: &Host, threads: Option<usize>) -> Resources {
    let cpus = host.usable_cpus();
    let share = if plan.target.url.is_loopback() {
        cpus / 2
    } else {
        cpus
    };
    let threads = threads.unwrap_or(share).max(1);
    let sockets = plan.total_sockets();
    let websockets = u64::from(plan.total_participants());
    let embedded = plan.target.is_embedded();
    // A room lives on one router.
    let rooms = plan.scenario.rooms.count as usize;
    let sfu_routers = if embedded {
        (cpus / 4).clamp(1, rooms.max(1))
    } else {
        0
    };
    // Both ends of the embedded SFU's WebSockets are in this process.
    let ends = if embedded { 2 } else { 1 };
    Resources {
        threads,
        sfu_routers,
        cpus,
        sockets,
        files: sockets
            + ends * websockets
            + FILES_SLACK
            + FILES_PER_THREAD * (threads + sfu_routers) as u64,
    }
}

/// Compares what the plan needs with what the host has.
pub fn check(plan: &Plan, host: &Host, resources: &Resources) -> Findings {
    let mut findings = Findings::default();
    findings.refusals.extend(files(host, resources));
    findings.refusals.extend(ports(plan, host, resources));
    memory(plan, host, &mut findings);
    findings.warnings.extend(receive_buffer(plan, host));
    findings.warnings.extend(threads(host, resources));
    findings.warnings.extend(cpu(plan, resources));
    findings
}

/// Returns the SO_RCVBUF that each socket should ask for: a quarter of a second of the busiest
/// subscriber's packets.
pub fn receive_buffer_bytes(plan: &Plan) -> u64 {
    let packets: f64 = [Kind::Audio, Kind::Video]
        .into_iter()
        .map(|kind| plan.room_rates(kind).0)
        .sum();
    ((packets * BUFFERED_SECONDS * BUFFER_BYTES_PER_PACKET) as u64).max(BUFFER_BYTES_MIN)
}

fn files(host: &Host, resources: &Resources) -> Option<String> {
    let (needed, limit) = (resources.files, host.files_max?);
    if needed <= limit {
        return None;
    }
    let fix = match host.files_hard_max {
        Some(hard) if hard < needed => {
            format!(
                "as root: ulimit -n {needed} (or LimitNOFILE={needed}, docker run --ulimit nofile={needed}); or use more hosts"
            )
        }
        _ => format!("ulimit -n {needed}"),
    };
    Some(format!(
        "the run needs {} open files and the limit is {}: {fix}",
        number(needed),
        number(limit)
    ))
}

/// Returns a warning if the file limit is low. A server does not know how many participants will
/// come, and each takes one file for its WebSocket.
pub fn server_files(host: &Host) -> Option<String> {
    const PARTICIPANTS_EXPECTED: u64 = 4_000;
    let limit = host.files_max?;
    let participants = limit.saturating_sub(FILES_SLACK);
    (participants < PARTICIPANTS_EXPECTED).then(|| {
        format!(
            "the limit of {} open files lets in {}: as root, ulimit -n 65536 (or LimitNOFILE=65536, docker run --ulimit nofile=65536)",
            number(limit),
            count(participants, "participant")
        )
    })
}

fn ports(plan: &Plan, host: &Host, resources: &Resources) -> Option<String> {
    let range = host.source_ports.clone()?;
    let available = (u64::from(*range.end()) + 1).saturating_sub(u64::from(*range.start()));
    let needed = resources.sockets.max(u64::from(plan.total_participants())) + PORTS_SLACK;
    if needed <= available {
        return None;
    }
    let fix = if needed <= 64_000 {
        "sysctl -w net.ipv4.ip_local_port_range='1024 65535'"
    } else {
        "one address has no more than 64,512: use more hosts"
    };
    Some(format!(
        "the run needs {} source ports and this host offers {}: {fix}",
        number(needed),
        number(available)
    ))
}

fn memory(plan: &Plan, host: &Host, findings: &mut Findings) {
    let Some(available) = host.memory_available_bytes else {
        return;
    };
    let needed = plan.estimate().memory_bytes;
    let text = || {
        format!(
            "the run takes about {} of memory and {} is free",
            scaled(needed as f64, "B"),
            scaled(available as f64, "B")
        )
    };
    if needed > available {
        findings.refusals.push(format!(
            "{}: run fewer participants here, or raise the container's memory limit",
            text()
        ));
    } else if needed as f64 > available as f64 * MEMORY_SHARE_MAX {
        findings.warnings.push(text());
    }
}

fn receive_buffer(plan: &Plan, host: &Host) -> Option<String> {
    let (wanted, granted) = (receive_buffer_bytes(plan), host.receive_buffer_max?);
    (granted < wanted).then(|| {
        format!(
            "receive buffers hold {} of the {} wanted, so a stall of this host may drop packets: sysctl -w net.core.rmem_max={wanted}",
            scaled(granted as f64, "B"),
            scaled(wanted as f64, "B"),
        )
    })
}

fn threads(host: &Host, resources: &Resources) -> Option<String> {
    if let Some(quota) = host.cpu_quota.filter(|quota| *quota < 1.0) {
        return Some(format!(
            "the cgroup grants {quota:.2} CPUs: ticks will be late whenever the quota is used up; grant at least 1"
        ));
    }
    (resources.threads > resources.cpus).then(|| {
        format!(
            "{} for {}: threads will wait for each other; use --threads {}",
            count(resources.threads as u64, "engine thread"),
            count(resources.cpus as u64, "CPU"),
            resources.cpus
        )
    })
}

fn cpu(plan: &Plan, resources: &Resources) -> Option<String> {
    let (busy, threads) = (plan.estimate().cores, resources.threads);
    (busy > threads as f64 * BUSY_SHARE_MAX).then(|| {
        format!(
            "the plan keeps about {busy:.1} cores busy and {} will run: the run may become INVALID; use more CPUs or more hosts",
            count(threads as u64, "engine thread")
        )
    })
}

/// Raises the soft limit to the hard one. If that fails, the limit stays as it is, and the check
/// reports it.
fn raised_file_limit() -> Rlimit {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if setrlimit(Resource::Nofile, raised).is_ok() {
        getrlimit(Resource::Nofile)
    } else {
        limit
    }
}

fn cpus_by_affinity() -> usize {
    rustix::thread::sched_getaffinity(None)
        .map_or(1, |set| set.count() as usize)
        .max(1)
}

fn read_number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn port_range(path: &Path) -> Option<RangeInclusive<u16>> {
    let text = fs::read_to_string(path).ok()?;
    let mut bounds = text.split_whitespace().map(str::parse);
    Some(bounds.next()?.ok()?..=bounds.next()?.ok()?)
}

fn meminfo_available(path: &Path) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Control groups of this process, from its own up to the root. Each of them limits it.
struct Cgroup {
    unified: Vec<PathBuf>,
    cpu: Vec<PathBuf>,
    memory: Vec<PathBuf>,
}

impl Cgroup {
    fn read(root: &Path) -> Cgroup {
        let text = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
        let mount = root.join("sys/fs/cgroup");
        let mut cgroup = Cgroup {
            unified: Vec::new(),
            cpu: Vec::new(),
            memory: Vec::new(),
        };
        for line in text.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
                continue;
            };
            for controller in controllers.split(',') {
                match controller {
                    "" => cgroup.unified = lineage(&mount, path),
                    "cpu" => cgroup.cpu = lineage(&mount.join("cpu"), path),
                    "memory" => cgroup.memory = lineage(&mount.join("memory"), path),
                    _ => {}
                }
            }
        }
        cgroup
    }

    fn cpu_quota(&self) -> Option<f64> {
        let unified = self
            .unified
            .iter()
            .filter_map(|dir| cpu_max(&fs::read_to_string(dir.join("cpu.max")).ok()?));
        let legacy = self.cpu.iter().filter_map(|dir| {
            let (quota, period) = (
                read_number(&dir.join("cpu.cfs_quota_us"))?,
                read_number(&dir.join("cpu.cfs_period_us"))?,
            );
            (period > 0).then(|| quota as f64 / period as f64)
        });
        unified.chain(legacy).min_by(f64::total_cmp)
    }

    fn memory_available(&self) -> Option<u64> {
        let free = |dir: &PathBuf, limit: &str, used: &str| {
            Some(read_number(&dir.join(limit))?.saturating_sub(read_number(&dir.join(used))?))
        };
        let unified = self
            .unified
            .iter()
            .filter_map(|dir| free(dir, "memory.max", "memory.current"));
        let legacy = self
            .memory
            .iter()
            .filter_map(|dir| free(dir, "memory.limit_in_bytes", "memory.usage_in_bytes"));
        unified.chain(legacy).min()
    }
}

/// Returns the group's directory and its ancestors, down to the mount point.
fn lineage(mount: &Path, group: &str) -> Vec<PathBuf> {
    let own = mount.join(group.trim_start_matches('/'));
    own.ancestors()
        .take_while(|dir| dir.starts_with(mount))
        .map(Path::to_owned)
        .collect()
}

/// Parses `cpu.max`: `max 100000` is no limit; `150000 100000` is one and a half CPUs.
fn cpu_max(text: &str) -> Option<f64> {
    let mut fields = text.split_whitespace();
    let (quota, period): (f64, f64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    (period > 0.0).then(|| quota / period)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::scenario::RoomPeople;
    use crate::plan::tests::plan;

    fn host() -> Host {
        Host {
            files_max: Some(20_000),
            files_hard_max: Some(20_000),
            source_ports: Some(32_768..=60_999),
            receive_buffer_max: Some(4 << 20),
            cpus: 4,
            cpu_quota: None,
            memory_available_bytes: Some(8 << 30),
        }
    }

    fn check_with(subscribers: u32, host: &Host) -> Findings {
        let mut plan = plan();
        let people = RoomPeople {
            subscribers,
            video_publishers: 0,
            ..plan.scenario.people()
        };
        plan.scenario.set_people(people);
        check(&plan, host, &resources(&plan, host, Some(4)))
    }

    #[test]
    fn a_host_that_suffices_is_not_talked_about() {
        assert_eq!(check_with(100, &host()), Findings::default());
    }

    #[test]
    fn too_few_files_are_refused_with_the_command_that_helps() {
        let findings = check_with(5_000, &host());
        assert!(
            findings.refusals[0].contains(
                "needs 20,092 open files and the limit is 20,000: as root: ulimit -n 20092"
            ),
            "{findings:?}"
        );
        let liftable = Host {
            files_hard_max: Some(1 << 20),
            ..host()
        };
        assert!(check_with(5_000, &liftable).refusals[0].ends_with(": ulimit -n 20092"));
    }

    #[test]
    fn too_few_ports_are_refused() {
        let host = Host {
            files_max: None,
            ..host()
        };
        assert!(
            check_with(14_200, &host).refusals[0]
                .contains("source ports and this host offers 28,232: sysctl -w")
        );
        assert!(
            check_with(40_000, &host)
                .refusals
                .iter()
                .any(|text| text.contains("use more hosts"))
        );
    }

    #[test]
    fn memory_is_refused_or_warned_about() {
        assert!(
            check_with(
                100,
                &Host {
                    memory_available_bytes: Some(64 << 20),
                    ..host()
                }
            )
            .refusals[0]
                .contains("of memory and 67.1 MB is free")
        );
        assert!(
            check_with(
                100,
                &Host {
                    memory_available_bytes: Some(128 << 20),
                    ..host()
                }
            )
            .warnings[0]
                .contains("of memory")
        );
    }

    #[test]
    fn small_receive_buffers_and_scarce_cpus_are_warned_about_and_not_refused() {
        let mut plan = plan();
        let people = RoomPeople {
            subscribers: 200,
            video_publishers: 20,
            ..plan.scenario.people()
        };
        plan.scenario.set_people(people);
        let host = Host {
            receive_buffer_max: Some(212_992),
            cpus: 1,
            ..host()
        };
        let findings = check(&plan, &host, &resources(&plan, &host, Some(2)));
        assert_eq!(findings.refusals, Vec::<String>::new());
        for part in [
            "sysctl -w net.core.rmem_max=",
            "use --threads 1",
            "may become INVALID",
        ] {
            assert!(
                findings.warnings.iter().any(|text| text.contains(part)),
                "{part}: {findings:?}"
            );
        }
    }

    #[test]
    fn threads_follow_affinity_quota_and_where_the_server_is() {
        let threads = |host: &Host, url: &str| {
            let mut plan = plan();
            plan.target.url = url.parse().unwrap();
            resources(&plan, host, None).threads
        };
        assert_eq!(threads(&host(), "wss://sfu.example.com"), 4);
        assert_eq!(threads(&host(), "ws://127.0.0.1:7880"), 2);
        assert_eq!(
            threads(
                &Host {
                    cpu_quota: Some(2.5),
                    ..host()
                },
                "wss://sfu.example.com"
            ),
            2
        );
        assert_eq!(
            threads(
                &Host {
                    cpu_quota: Some(0.5),
                    ..host()
                },
                "ws://localhost"
            ),
            1
        );
        assert!(
            check_with(
                1,
                &Host {
                    cpu_quota: Some(0.5),
                    ..host()
                }
            )
            .warnings[0]
                .contains("grants 0.50 CPUs")
        );
    }

    #[test]
    fn the_tightest_group_of_the_lineage_limits_in_either_version_of_cgroups() {
        let root = std::env::temp_dir().join(format!("throng-preflight-{}", std::process::id()));
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write(
            "proc/self/cgroup",
            "5:cpu,cpuacct:/pod\n4:memory:/pod\n0::/pod/box\n",
        );
        write(
            "proc/meminfo",
            "MemTotal: 16 kB\nMemAvailable:    9000 kB\n",
        );
        write("proc/sys/net/ipv4/ip_local_port_range", "32768\t60999\n");
        write("proc/sys/net/core/rmem_max", "212992\n");
        write("sys/fs/cgroup/pod/box/cpu.max", "max 100000\n");
        write("sys/fs/cgroup/pod/cpu.max", "300000 100000\n");
        write("sys/fs/cgroup/pod/memory.max", "max\n");
        write("sys/fs/cgroup/cpu/pod/cpu.cfs_quota_us", "150000\n");
        write("sys/fs/cgroup/cpu/pod/cpu.cfs_period_us", "100000\n");
        write(
            "sys/fs/cgroup/memory/pod/memory.limit_in_bytes",
            "5000000\n",
        );
        write(
            "sys/fs/cgroup/memory/pod/memory.usage_in_bytes",
            "1000000\n",
        );
        let host = Host::read_below(&root);
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(host.cpu_quota, Some(1.5));
        assert_eq!(host.memory_available_bytes, Some(4_000_000));
        assert_eq!(
            (host.source_ports, host.receive_buffer_max),
            (Some(32_768..=60_999), Some(212_992))
        );
    }

    #[test]
    fn this_very_host_can_be_read() {
        let host = Host::read();
        assert!(host.cpus >= 1 && host.files_max.is_none_or(|max| max > 0));
    }
}
