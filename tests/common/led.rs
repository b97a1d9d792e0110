//! A run over several hosts whose coordinator is a process that a test can start in any place. Also
//! reads the account of a record and adds accounts up, independently of the code under test.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hdrhistogram::serialization::Deserializer;
use serde_json::Value;

/// Token with which probers register.
pub const TOKEN: &str = "sesame-sesame-sesame-sesame";
/// Longest wait. No run here is planned to take half as long.
const PATIENCE: Duration = Duration::from_secs(180);

/// A running coordinator; dropping it ends it.
pub struct Coordinator {
    child: Child,
    said: Arc<Said>,
    readers: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Said {
    text: Mutex<String>,
    more: Condvar,
}

impl Said {
    fn lock(&self) -> MutexGuard<'_, String> {
        self.text.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(self: Arc<Said>, from: impl Read) {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            let mut text = self.lock();
            text.push_str(&line);
            text.push('\n');
            self.more.notify_all();
        }
    }
}

impl Coordinator {
    /// Starts a coordinator. `command` is a shell or the program; the flags are added to it.
    pub fn start(command: &mut Command, flags: &[&str]) -> Coordinator {
        command
            .args([
                "--coordinator",
                "--coordinator-port=0",
                "--coordinator-token",
                TOKEN,
            ])
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program can be run");
        let said = Arc::new(Said::default());
        let (out, err) = (
            child.stdout.take().expect("piped"),
            child.stderr.take().expect("piped"),
        );
        let readers = vec![
            std::thread::spawn({
                let said = said.clone();
                move || said.read(out)
            }),
            std::thread::spawn({
                let said = said.clone();
                move || said.read(err)
            }),
        ];
        Coordinator {
            child,
            said,
            readers,
        }
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a process's number")
    }

    /// Returns the URL that it listens on, such as `http://127.0.0.1:8787`, once it does. Returns
    /// `None` if it ends without listening, because its run was over.
    pub fn url(&mut self) -> Option<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let has_ended = self.child.try_wait().expect("our own child").is_some();
            let text = self.said.lock();
            if let Some((url, _)) = text
                .split_once("Coordinator at ")
                .and_then(|(_, rest)| rest.split_once(": "))
            {
                return Some(url.to_owned());
            }
            if has_ended {
                return None;
            }
            assert!(
                Instant::now() < deadline,
                "it does not say where it listens: {text}"
            );
            drop(
                self.said
                    .more
                    .wait_timeout(text, Duration::from_millis(100)),
            );
        }
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("our own child").is_some()
    }

    /// Kills the process with SIGKILL (`kill -9`).
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits until it ends by itself. Returns its exit code and all of its output.
    pub fn finish(mut self) -> (Option<i32>, String) {
        let deadline = Instant::now() + PATIENCE;
        while !self.has_ended() {
            assert!(
                Instant::now() < deadline,
                "it does not end: {}",
                self.said.lock()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        for reader in self.readers.drain(..) {
            reader.join().expect("a reader");
        }
        let code = self.child.wait().expect("our own child").code();
        let said = self.said.lock().clone();
        assert!(
            !said.contains("panicked") && !said.contains(TOKEN),
            "{said}"
        );
        (code, said)
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.kill();
    }
}

/// All values of one record, by section and name: counters, and histograms as the expected count
/// and the count of each value. Values of 0 are left out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Account {
    pub counters: BTreeMap<String, u64>,
    pub histograms: BTreeMap<String, Values>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Values {
    pub expected: u64,
    /// Count of each value. Values are in microseconds.
    pub counts: BTreeMap<u64, u64>,
}

impl Account {
    /// Reads a step of a report, or a record in its wire format: both have the same names.
    pub fn read(sections: &Value) -> Account {
        let mut account = Account::default();
        for section in ["session", "audio", "video", "bandwidth", "engine"] {
            let Some(entries) = sections[section].as_object() else {
                continue;
            };
            for (name, value) in entries {
                let name = format!("{section}.{name}");
                if let Some(counter) = value.as_u64().filter(|counter| *counter > 0) {
                    account.counters.insert(name, counter);
                } else if let Some(hdr) = value["hdr"].as_str() {
                    let values = Values {
                        expected: value["expected"].as_u64().expect("a number"),
                        counts: counts(hdr),
                    };
                    if values.total() > 0 || values.expected > 0 {
                        account.histograms.insert(name, values);
                    }
                }
            }
        }
        account
    }

    pub fn add(&mut self, other: &Account) {
        for (name, counter) in &other.counters {
            *self.counters.entry(name.clone()).or_default() += counter;
        }
        for (name, values) in &other.histograms {
            self.histograms.entry(name.clone()).or_default().add(values);
        }
    }

    /// Raises each expected count to the number of values that came, because a record in its wire
    /// format has only the number that was announced.
    pub fn settle(&mut self) {
        for values in self.histograms.values_mut() {
            values.expected = values.expected.max(values.total());
        }
    }

    pub fn counter(&self, name: &str) -> u64 {
        self.counters.get(name).copied().unwrap_or(0)
    }

    /// Returns one line for each difference between two accounts.
    pub fn differences(&self, other: &Account) -> Vec<String> {
        let counters = self.counters.keys().chain(other.counters.keys());
        let counters = counters
            .filter(|name| self.counters.get(*name) != other.counters.get(*name))
            .map(|name| format!("{name}: {} and {}", self.counter(name), other.counter(name)));
        let brief = |account: &Account, name: &str| {
            account
                .histograms
                .get(name)
                .map(|values| (values.expected, values.total()))
        };
        let histograms = self.histograms.keys().chain(other.histograms.keys());
        let histograms = histograms
            .filter(|name| self.histograms.get(*name) != other.histograms.get(*name))
            .map(|name| {
                format!(
                    "{name}: {:?} and {:?}",
                    brief(self, name),
                    brief(other, name)
                )
            });
        counters.chain(histograms).collect()
    }
}

impl Values {
    fn add(&mut self, other: &Values) {
        self.expected += other.expected;
        for (value, count) in &other.counts {
            *self.counts.entry(*value).or_default() += count;
        }
    }

    pub fn total(&self) -> u64 {
        self.counts.values().sum()
    }

    /// Value that `share` of the expected values are at or below; `None` if that rank falls among
    /// the values that never came.
    pub fn percentile(&self, share: f64) -> Option<u64> {
        let rank = (share * self.expected as f64).ceil().max(1.0) as u64;
        let mut below = 0;
        self.counts.iter().find_map(|(value, count)| {
            below += count;
            (below >= rank).then_some(*value)
        })
    }
}

fn counts(hdr: &str) -> BTreeMap<u64, u64> {
    let bytes = STANDARD.decode(hdr).expect("base64");
    let histogram: hdrhistogram::Histogram<u64> = Deserializer::new()
        .deserialize(&mut bytes.as_slice())
        .expect("a histogram");
    histogram
        .iter_recorded()
        .map(|entry| (entry.value_iterated_to(), entry.count_at_value()))
        .collect()
}
