//! Health of this host: who waited for a CPU, who was throttled, and where datagrams were dropped.
//!
//! The text of `/proc` and of control groups is parsed by pure functions; [`HostSnapshot::read`]
//! does the reading. It is called once a second, never by a thread that carries media. A figure
//! that the kernel does not provide is `None`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::measure::second::HostDrops;
use crate::net;

/// Cumulative readings at one moment.
#[derive(Clone, Debug, Default)]
pub struct HostSnapshot {
    /// By thread id.
    pub threads: BTreeMap<u32, Thread>,
    /// Time that the hypervisor gave to others while one of our CPUs had work, summed over all
    /// CPUs.
    pub stolen: Option<Duration>,
    pub throttling: Option<Throttling>,
    /// The kernel does not provide `sockets`: it is `None` here.
    pub drops: HostDrops,
    /// Number of times that a CPU left received packets for later, because its turn was over.
    pub softnet_squeezed: Option<u64>,
}

/// One thread of this process, with its times so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Thread {
    pub name: String,
    pub cpu: Duration,
    /// Time ready to run and waiting for a CPU.
    pub run_queue: Duration,
}

/// How often and how long the control group of this process, with everything in it, was throttled.
/// Throttling of its ancestors is included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Throttling {
    group: PathBuf,
    pub times: u64,
    pub time: Duration,
}

impl HostSnapshot {
    pub fn read() -> HostSnapshot {
        let text = |path: &str| fs::read_to_string(path).ok();
        let softnet = text("/proc/net/softnet_stat").and_then(|text| softnet(&text));
        let udp =
            text("/proc/net/snmp").and_then(|snmp| udp(&snmp, text("/proc/net/snmp6").as_deref()));
        let interfaces = text("/proc/net/dev").and_then(|text| interfaces(&text));
        HostSnapshot {
            threads: threads(Path::new("/proc/self/task")),
            stolen: text("/proc/stat")
                .and_then(|text| stolen(&text, net::clock_ticks_per_second())),
            throttling: text("/proc/self/cgroup")
                .and_then(|text| throttling(&text, Path::new("/sys/fs/cgroup"))),
            drops: HostDrops {
                sockets: None,
                udp_receive_buffer: udp.map(|udp| udp.receive_buffer_errors),
                udp_send_buffer: udp.map(|udp| udp.send_buffer_errors),
                udp_receive_other: udp
                    .and_then(|udp| udp.receive_errors.checked_sub(udp.receive_buffer_errors)),
                softnet: softnet.map(|softnet| softnet.dropped),
                interfaces_receive: interfaces.map(|interfaces| interfaces.receive),
                interfaces_send: interfaces.map(|interfaces| interfaces.send),
                queueing: queueing_drops(),
            },
            softnet_squeezed: softnet.map(|softnet| softnet.squeezed),
        }
    }

    pub fn stolen_since(&self, earlier: &HostSnapshot) -> Option<Duration> {
        Some(self.stolen?.saturating_sub(earlier.stolen?))
    }

    /// Returns the throttling since `earlier`; `None` also if the process was moved to another
    /// control group meanwhile.
    pub fn throttled_since(&self, earlier: &HostSnapshot) -> Option<Throttling> {
        let (now, before) = (self.throttling.as_ref()?, earlier.throttling.as_ref()?);
        (now.group == before.group).then(|| Throttling {
            group: now.group.clone(),
            times: now.times.saturating_sub(before.times),
            time: now.time.saturating_sub(before.time),
        })
    }

    /// Returns each thread's times since `earlier`. A thread that did not exist then has all of its
    /// time. A thread that has ended meanwhile is not included.
    pub fn threads_since(&self, earlier: &HostSnapshot) -> Vec<Thread> {
        let since = |(id, thread): (&u32, &Thread)| {
            let before = earlier.threads.get(id);
            Thread {
                name: thread.name.clone(),
                cpu: thread
                    .cpu
                    .saturating_sub(before.map_or(Duration::ZERO, |before| before.cpu)),
                run_queue: thread
                    .run_queue
                    .saturating_sub(before.map_or(Duration::ZERO, |before| before.run_queue)),
            }
        };
        self.threads.iter().map(since).collect()
    }
}

/// Returns the threads below a `task` directory; none if the kernel has no `schedstat`.
fn threads(tasks: &Path) -> BTreeMap<u32, Thread> {
    let entries = fs::read_dir(tasks).into_iter().flatten().flatten();
    // A thread may end while it is read.
    let read = |path: PathBuf| {
        let id = path.file_name()?.to_str()?.parse().ok()?;
        let name = fs::read_to_string(path.join("comm")).ok()?;
        let (cpu, run_queue) = schedstat(&fs::read_to_string(path.join("schedstat")).ok()?)?;
        Some((
            id,
            Thread {
                name: name.trim_end().to_owned(),
                cpu,
                run_queue,
            },
        ))
    };
    entries.filter_map(|entry| read(entry.path())).collect()
}

/// Reads `/proc/PID/task/TID/schedstat`: the time on a CPU, and the time waiting for one.
fn schedstat(text: &str) -> Option<(Duration, Duration)> {
    let mut nanos = text
        .split_whitespace()
        .map(|field| field.parse().ok().map(Duration::from_nanos));
    Some((nanos.next()??, nanos.next()??))
}

/// Reads the eighth figure of the first line of `/proc/stat`, in clock ticks.
fn stolen(text: &str, ticks_per_second: u64) -> Option<Duration> {
    let line = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let ticks: u64 = line.split_whitespace().nth(7)?.parse().ok()?;
    Some(Duration::from_nanos(
        ticks * (1_000_000_000 / ticks_per_second.max(1)),
    ))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Softnet {
    dropped: u64,
    squeezed: u64,
}

/// Reads `/proc/net/softnet_stat`: one line per CPU, in hexadecimal. The second column counts
/// drops, the third squeezes.
fn softnet(text: &str) -> Option<Softnet> {
    let mut sum = Softnet {
        dropped: 0,
        squeezed: 0,
    };
    let mut lines = 0;
    for line in text.lines() {
        let mut columns = line
            .split_whitespace()
            .map(|column| u64::from_str_radix(column, 16).ok());
        let (_processed, dropped, squeezed) =
            (columns.next()??, columns.next()??, columns.next()??);
        sum.dropped += dropped;
        sum.squeezed += squeezed;
        lines += 1;
    }
    (lines > 0).then_some(sum)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Udp {
    /// `InErrors`, which includes `receive_buffer_errors`.
    receive_errors: u64,
    receive_buffer_errors: u64,
    send_buffer_errors: u64,
}

/// Reads `/proc/net/snmp` and `/proc/net/snmp6` (if it exists): all UDP sockets of this network
/// namespace.
fn udp(snmp: &str, snmp6: Option<&str>) -> Option<Udp> {
    let mut rows = snmp.lines().filter(|line| line.starts_with("Udp:"));
    let (names, values) = (rows.next()?, rows.next()?);
    let v4 = |name: &str| -> Option<u64> {
        let column = names.split_whitespace().position(|found| found == name)?;
        values.split_whitespace().nth(column)?.parse().ok()
    };
    let v6 = |name: &str| {
        let mut rows = snmp6.unwrap_or_default().lines();
        let row = rows.find_map(|line| {
            line.strip_prefix("Udp6")?
                .strip_prefix(name)?
                .trim()
                .parse::<u64>()
                .ok()
        });
        row.unwrap_or(0)
    };
    let both = |name: &str| v4(name).map(|v4| v4 + v6(name));
    Some(Udp {
        receive_errors: both("InErrors")?,
        receive_buffer_errors: both("RcvbufErrors")?,
        send_buffer_errors: both("SndbufErrors")?,
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Interfaces {
    receive: u64,
    send: u64,
}

/// Reads `/proc/net/dev`: the drop columns of all interfaces of this network namespace.
fn interfaces(text: &str) -> Option<Interfaces> {
    let mut sum = Interfaces {
        receive: 0,
        send: 0,
    };
    for line in text.lines().skip(2) {
        let (_, columns) = line.split_once(':')?;
        let columns: Vec<u64> = columns
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()
            .ok()?;
        sum.receive += columns.get(3)?;
        sum.send += columns.get(11)?;
    }
    Some(sum)
}

/// Returns the drops of the root queueing disciplines of all interfaces of this network namespace.
/// They include the drops of the disciplines below them. `/proc` has no such table.
fn queueing_drops() -> Option<u64> {
    // An nlmsghdr and an empty tcmsg: RTM_GETQDISC, NLM_F_REQUEST | NLM_F_DUMP.
    let mut request = [0u8; 36];
    request[..4].copy_from_slice(&36u32.to_ne_bytes());
    request[4..6].copy_from_slice(&RTM_GETQDISC.to_ne_bytes());
    request[6..8].copy_from_slice(&0x301u16.to_ne_bytes());
    let mut drops = Some(0);
    net::dump_routing(&request, |answer| {
        let mut done = false;
        for message in messages(answer) {
            match message {
                NetlinkMessage::Discipline(more) => drops = drops.map(|drops: u64| drops + more),
                NetlinkMessage::Done => done = true,
                NetlinkMessage::Refused => (drops, done) = (None, true),
            }
        }
        done
    })
    .ok()?;
    drops
}

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const RTM_NEWQDISC: u16 = 36;
const RTM_GETQDISC: u16 = 38;
const TCA_STATS2: u16 = 7;
const TCA_STATS_QUEUE: u16 = 3;
/// `tcm_parent` of a discipline that is attached directly to its interface.
const TC_H_ROOT: u32 = 0xFFFF_FFFF;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NetlinkMessage {
    /// Number of packets that one discipline dropped; 0 for a discipline below another.
    Discipline(u64),
    Done,
    Refused,
}

/// Parses one datagram of a dump's answer (netlink(7), rtnetlink(7), linux/rtnetlink.h,
/// linux/gen_stats.h).
fn messages(mut answer: &[u8]) -> Vec<NetlinkMessage> {
    let mut found = Vec::new();
    while let (Some(len), Some(kind)) = (u32_at(answer, 0), u16_at(answer, 4)) {
        let len = len as usize;
        let Some(body) = answer.get(16..len) else {
            break;
        };
        match kind {
            NLMSG_DONE => found.push(NetlinkMessage::Done),
            NLMSG_ERROR => found.push(NetlinkMessage::Refused),
            RTM_NEWQDISC => found.push(NetlinkMessage::Discipline(
                discipline_drops(body).unwrap_or(0),
            )),
            _ => {}
        }
        answer = answer.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// Returns the drops of a discipline; `None` if it is not at the root, or keeps no statistics.
fn discipline_drops(body: &[u8]) -> Option<u64> {
    let is_root = u32_at(body, 12)? == TC_H_ROOT;
    let statistics = attribute(body.get(20..)?, TCA_STATS2).filter(|_| is_root)?;
    // gnet_stats_queue: qlen, backlog, drops.
    u32_at(attribute(statistics, TCA_STATS_QUEUE)?, 8).map(u64::from)
}

/// Returns the payload of the first attribute of a kind.
fn attribute(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    loop {
        let len = usize::from(u16_at(attributes, 0)?);
        let payload = attributes.get(4..len)?;
        // The two highest bits are flags.
        if u16_at(attributes, 2)? & 0x3FFF == kind {
            return Some(payload);
        }
        attributes = attributes.get(len.next_multiple_of(4)..)?;
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Reads the throttling of the groups that `/proc/self/cgroup` names: the `cpu` controller's group
/// of version 1, or the one group of version 2, and the groups above it.
fn throttling(membership: &str, mount: &Path) -> Option<Throttling> {
    let v1 = membership.lines().find_map(|line| {
        let (controllers, group) = line.split_once(':')?.1.split_once(':')?;
        controllers
            .split(',')
            .any(|name| name == "cpu")
            .then_some((controllers, group))
    });
    let v2 = membership.lines().find_map(|line| line.strip_prefix("0::"));
    let (root, group) = match (v1, v2) {
        // Some hosts mount all controllers of one hierarchy under their joint name, with a link for
        // each.
        (Some((controllers, group)), _) => (
            [controllers, "cpu"]
                .map(|name| mount.join(name))
                .into_iter()
                .find(|root| root.is_dir())?,
            group,
        ),
        (None, Some(group)) => (mount.to_owned(), group),
        (None, None) => return None,
    };
    let mut total: Option<Throttling> = None;
    let mut path = root.join(group.trim_start_matches('/'));
    // In a container the path may be the host's, which is not visible here. The container's own
    // group is then at the mount.
    if !path.is_dir() {
        path.clone_from(&root);
    }
    let leaf = path.clone();
    while path.starts_with(&root) {
        let here = fs::read_to_string(path.join("cpu.stat"))
            .ok()
            .and_then(|text| cpu_stat(&text));
        if let Some((times, time)) = here {
            let sum = total.get_or_insert_with(|| Throttling {
                group: leaf.clone(),
                times: 0,
                time: Duration::ZERO,
            });
            sum.times += times;
            sum.time += time;
        }
        if !path.pop() {
            break;
        }
    }
    total
}

/// Reads `cpu.stat` of a control group: `throttled_usec` in version 2, `throttled_time` in
/// nanoseconds in version 1.
fn cpu_stat(text: &str) -> Option<(u64, Duration)> {
    let value = |name: &str| -> Option<u64> {
        let line = text
            .lines()
            .find(|line| line.split_whitespace().next() == Some(name))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    let time = value("throttled_usec")
        .map(Duration::from_micros)
        .or_else(|| value("throttled_time").map(Duration::from_nanos))?;
    Some((value("nr_throttled")?, time))
}

/// Returns the host name, or `unnamed`.
pub fn name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    Some(name.trim())
        .filter(|name| !name.is_empty())
        .unwrap_or("unnamed")
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_tables_are_read_by_their_names_and_columns() {
        assert_eq!(
            schedstat("353187322 326678 63\n"),
            Some((
                Duration::from_nanos(353_187_322),
                Duration::from_nanos(326_678)
            ))
        );
        let stat = "cpu  2079447 1101325 255761 1470028 23396 0 15704 6039 0 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n";
        assert_eq!(stolen(stat, 100), Some(Duration::from_millis(60_390)));
        let packets = "02cb448e 00000002 00000010 00000000\n02bc2514 0000000a 00000010 00000000\n";
        assert_eq!(
            softnet(packets),
            Some(Softnet {
                dropped: 12,
                squeezed: 32
            })
        );
        let snmp = "Tcp: A B\nTcp: 1 2\n\
            Udp: InDatagrams NoPorts InErrors OutDatagrams RcvbufErrors SndbufErrors InCsumErrors\nUdp: 85 11 53 89 50 4 3\n\
            UdpLite: InDatagrams\nUdpLite: 7\n";
        let snmp6 =
            "Udp6InDatagrams \t0\nUdp6InErrors \t4\nUdp6RcvbufErrors \t2\nUdp6SndbufErrors \t1\n";
        let expected = |receive_errors, receive_buffer_errors, send_buffer_errors| {
            Some(Udp {
                receive_errors,
                receive_buffer_errors,
                send_buffer_errors,
            })
        };
        assert_eq!(udp(snmp, Some(snmp6)), expected(57, 52, 5));
        assert_eq!(udp(snmp, None), expected(53, 50, 4));
        let dev = "Inter-|   Receive   |  Transmit\n face |bytes packets errs drop fifo frame compressed multicast|bytes ...\n\
                lo: 589 927 0    3 0 0 0 0 589 927 0 0 0 0 0 0\n  eth0: 794 37 0 1 0 0 0 0 272 27 0 6 0 0 0 0\n";
        assert_eq!(
            interfaces(dev),
            Some(Interfaces {
                receive: 4,
                send: 6
            })
        );
    }

    #[test]
    fn what_the_kernel_does_not_tell_is_unknown() {
        for text in [
            "",
            "\n",
            "nonsense",
            "Udp: InErrors\nUdp: x",
            "cpu  1 2 3",
            "cpu.stat",
        ] {
            assert_eq!(udp(text, None), None, "{text:?}");
            assert_eq!(stolen(text, 100), None, "{text:?}");
            assert_eq!(softnet(text), None, "{text:?}");
            assert_eq!(schedstat(text), None, "{text:?}");
            assert_eq!(cpu_stat(text), None, "{text:?}");
            assert_eq!(throttling(text, Path::new("/nowhere")), None, "{text:?}");
        }
        assert_eq!(interfaces("a\nb\n lo: 1 2 3\n"), None);
        // The root group of version 2 has a `cpu.stat`, but no throttling in it.
        assert_eq!(cpu_stat("usage_usec 5\nuser_usec 3\nsystem_usec 2\n"), None);
    }

    /// Returns an attribute, padded to four bytes.
    fn attribute_of(kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = (payload.len() as u16 + 4).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn discipline(parent: u32, drops: u32) -> Vec<u8> {
        let queue: Vec<u8> = [5, 6, drops, 8, 9]
            .iter()
            .flat_map(|value: &u32| value.to_ne_bytes())
            .collect();
        let statistics = [
            attribute_of(1, &[0; 16]),
            attribute_of(TCA_STATS_QUEUE, &queue),
        ]
        .concat();
        let mut body = [0u32, 2, 0, parent, 0]
            .iter()
            .flat_map(|value| value.to_ne_bytes())
            .collect::<Vec<_>>();
        body.extend(attribute_of(1, b"netem\0"));
        body.extend(attribute_of(TCA_STATS2, &statistics));
        message(RTM_NEWQDISC, &body)
    }

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = (body.len() as u32 + 16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn drops_of_queueing_disciplines_are_those_at_the_root() {
        let answer = [
            discipline(TC_H_ROOT, 17),
            discipline(0x8001_0000, 17),
            discipline(TC_H_ROOT, 4),
            message(NLMSG_DONE, &[0; 4]),
        ]
        .concat();
        assert_eq!(
            messages(&answer),
            [
                NetlinkMessage::Discipline(17),
                NetlinkMessage::Discipline(0),
                NetlinkMessage::Discipline(4),
                NetlinkMessage::Done
            ]
        );
        assert_eq!(
            messages(&message(NLMSG_ERROR, &[0; 20])),
            [NetlinkMessage::Refused]
        );
        // Wherever the answer is cut off, nothing is invented.
        for len in 0..answer.len() {
            assert!(
                messages(&answer[..len])
                    .iter()
                    .all(|found| messages(&answer).contains(found)),
                "{len}"
            );
        }
        assert!(queueing_drops().is_some(), "this kernel answers");
    }

    #[test]
    fn throttling_is_found_in_both_versions_of_control_groups_with_that_of_the_groups_above() {
        let mount = std::env::temp_dir().join(format!("throng-cgroup-{}", std::process::id()));
        let write = |group: &str, text: &str| {
            fs::create_dir_all(mount.join(group)).unwrap();
            fs::write(mount.join(group).join("cpu.stat"), text).unwrap();
        };
        write(
            "cpu/a/b",
            "nr_periods 9\nnr_throttled 3\nthrottled_time 2000000000\n",
        );
        write(
            "cpu/a",
            "nr_periods 9\nnr_throttled 1\nthrottled_time 500000000\n",
        );
        write(
            "c",
            "usage_usec 1\nnr_periods 2\nnr_throttled 2\nthrottled_usec 70000\n",
        );
        let found = |membership: &str| {
            throttling(membership, &mount).map(|found| (found.times, found.time.as_millis()))
        };
        assert_eq!(
            found("3:cpuset:/\n1:cpu:/a/b\n0::/c\n"),
            Some((4, 2_500)),
            "version 1 has the controller"
        );
        assert_eq!(found("7:cpu,cpuacct:/a\n"), Some((1, 500)));
        assert_eq!(found("0::/c\n"), Some((2, 70)));
        assert_eq!(found("0::/\n"), None);
        fs::remove_dir_all(&mount).unwrap();
    }

    #[test]
    fn this_process_is_seen_at_work_and_waiting() {
        let before = HostSnapshot::read();
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        loop {
            let _ = (0..100_000u64).map(std::hint::black_box).sum::<u64>();
            let busy: Duration = HostSnapshot::read()
                .threads_since(&before)
                .iter()
                .map(|thread| thread.cpu)
                .sum();
            if busy > Duration::from_millis(20) {
                return;
            }
            assert!(
                std::time::Instant::now() < deadline,
                "20 ms of work in 20 s: {busy:?}"
            );
        }
    }

    #[test]
    fn another_group_is_no_difference() {
        let reading = |group: &str, times| HostSnapshot {
            throttling: Some(Throttling {
                group: group.into(),
                times,
                time: Duration::from_millis(times),
            }),
            ..HostSnapshot::default()
        };
        let moved = reading("/b", 900).throttled_since(&reading("/a", 3));
        assert_eq!(moved, None);
        assert_eq!(
            reading("/a", 9)
                .throttled_since(&reading("/a", 3))
                .unwrap()
                .times,
            6
        );
    }
}
