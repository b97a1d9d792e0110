//! Other processes: the bench starts them, watches them by `/proc`, and ends them when it ends.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::process::{Pid, Signal, kill_process};

/// A child process that ends with the bench, and the samples that were taken of it.
pub struct Process {
    pub child: Child,
    samples: Vec<Sample>,
}

/// One sample of a process.
#[derive(Clone, Default)]
pub struct Sample {
    /// Time since 1970, as in reports.
    at: Duration,
    /// Threads by their id. A thread that has ended keeps its last values.
    threads: BTreeMap<u32, Thread>,
    pub resident_bytes: u64,
}

#[derive(Clone, Default)]
struct Thread {
    name: String,
    /// CPU time by the scheduler's account, in nanoseconds.
    cpu: Duration,
    /// User and system time in ticks of a hundredth of a second. Ticks are coarse, so they are used
    /// only to divide `cpu`.
    ticks: (u64, u64),
}

/// CPU time in user and in system mode.
#[derive(Clone, Copy, Default)]
pub struct Cpu {
    pub user: Duration,
    pub system: Duration,
}

impl Cpu {
    pub fn total(self) -> Duration {
        self.user + self.system
    }
}

impl Process {
    pub fn start(command: &mut Command) -> Process {
        let child = command.stdin(Stdio::null()).spawn();
        Process {
            child: child
                .unwrap_or_else(|error| panic!("{}: {error}", command.get_program().display())),
            samples: Vec::new(),
        }
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("our own child").is_some()
    }

    pub fn watch(&mut self) {
        let mut sample = self.samples.last().cloned().unwrap_or_default();
        sample.at = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .expect("a clock that is set");
        if sample.look(self.child.id()).is_some() {
            self.samples.push(sample);
        }
    }

    pub fn first(&self) -> &Sample {
        self.samples.first().expect("looked at while it ran")
    }

    /// Returns the sample that is closest to a moment since 1970.
    pub fn at(&self, moment: Duration) -> &Sample {
        let nearest = self
            .samples
            .iter()
            .min_by_key(|sample| sample.at.abs_diff(moment));
        nearest.expect("looked at while it ran")
    }

    pub fn last(&self) -> &Sample {
        self.samples.last().expect("looked at while it ran")
    }

    /// Asks the process to end, and waits until it has.
    pub fn stop(&mut self) {
        self.watch();
        // It may have ended by itself.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Sample {
    /// Takes a sample. Returns `None` if the process is gone.
    fn look(&mut self, pid: u32) -> Option<()> {
        for task in fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
            let read = |file: &str| fs::read_to_string(task.path().join(file)).ok();
            // A thread may end meanwhile. Then its last values stay.
            let (Some(stat), Some(schedstat)) = (read("stat"), read("schedstat")) else {
                continue;
            };
            if let Some((tid, thread)) = Thread::read(&stat, &schedstat) {
                self.threads.insert(tid, thread);
            }
        }
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let resident = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))?;
        self.resident_bytes = resident.split_whitespace().next()?.parse::<u64>().ok()? * 1_024;
        Some(())
    }

    pub fn seconds_since(&self, before: &Sample) -> f64 {
        self.at.saturating_sub(before.at).as_secs_f64()
    }

    /// Returns the CPU time since `before` of the threads whose names start with `prefix`.
    pub fn cpu_since(&self, before: &Sample, prefix: &str) -> Cpu {
        let by_name = self.by_name_since(before);
        let threads = by_name.iter().filter(|(name, _)| name.starts_with(prefix));
        threads.fold(Cpu::default(), |sum, (_, (cpu, _))| Cpu {
            user: sum.user + cpu.user,
            system: sum.system + cpu.system,
        })
    }

    /// Returns the CPU time since `before` and the number of threads, by thread name.
    pub fn by_name_since(&self, before: &Sample) -> BTreeMap<&str, (Cpu, u32)> {
        let mut by_name: BTreeMap<&str, (Cpu, u32)> = BTreeMap::new();
        for (tid, thread) in &self.threads {
            let cpu = thread.since(before.threads.get(tid));
            let (sum, count) = by_name.entry(&thread.name).or_default();
            sum.user += cpu.user;
            sum.system += cpu.system;
            *count += 1;
        }
        by_name
    }
}

impl Thread {
    /// Reads `/proc/PID/task/TID/stat` and `schedstat` (proc(5)). The thread's name may contain
    /// spaces and brackets.
    fn read(stat: &str, schedstat: &str) -> Option<(u32, Thread)> {
        let (tid, rest) = stat.split_once(" (")?;
        let (name, fields) = rest.rsplit_once(") ")?;
        let mut fields = fields.split_whitespace().skip(11);
        let mut ticks = || fields.next()?.parse::<u64>().ok();
        let thread = Thread {
            name: name.to_owned(),
            cpu: Duration::from_nanos(schedstat.split_whitespace().next()?.parse().ok()?),
            ticks: (ticks()?, ticks()?),
        };
        Some((tid.parse().ok()?, thread))
    }

    fn since(&self, before: Option<&Thread>) -> Cpu {
        let none = Thread::default();
        let before = before.unwrap_or(&none);
        let cpu = self.cpu.saturating_sub(before.cpu);
        let (user, system) = (self.ticks.0 - before.ticks.0, self.ticks.1 - before.ticks.1);
        // Without a tick the division is unknown. A thread that ran for so short counts as user
        // time.
        let share = if user + system == 0 {
            1.0
        } else {
            user as f64 / (user + system) as f64
        };
        let user = cpu.mul_f64(share);
        Cpu {
            user,
            system: cpu.saturating_sub(user),
        }
    }
}

/// Returns the load average of the last minute, by which a figure has to be judged.
pub fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().unwrap_or("?").to_owned()
}
