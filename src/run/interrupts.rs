//! SIGINT, SIGTERM and SIGHUP: the first one ends a run or a server in order, the second one ends
//! the process.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::report::Verdict;

/// Number of rooms that are named when the process ends at once.
const NAMED_MAX: usize = 3;

/// Listens for SIGINT, SIGTERM and SIGHUP. The first one ends the run. A second one ends the
/// process, whatever the run is waiting for. SIGHUP stays ignored where it was, as `nohup` wants.
pub struct Interrupts {
    first: watch::Receiver<&'static str>,
    /// Names of rooms that stay on the server if the process ends at once.
    left_behind: Arc<Mutex<Vec<String>>>,
}

impl Interrupts {
    /// Starts listening. Call this within a runtime.
    pub fn listen() -> Interrupts {
        let (sender, first) = watch::channel("");
        let mut heard = HeardSignals::open();
        let left_behind = Arc::new(Mutex::new(Vec::new()));
        let left = left_behind.clone();
        tokio::spawn(async move {
            sender.send_replace(heard.next().await);
            let again = heard.next().await;
            let rooms = left.lock().unwrap_or_else(PoisonError::into_inner).clone();
            eprintln!("{}", farewell(again, &rooms));
            std::process::exit(Verdict::Partial.exit_code().into());
        });
        Interrupts { first, left_behind }
    }

    /// Waits for the first signal, and returns it once.
    pub async fn next(&mut self) -> &'static str {
        match self.first.changed().await {
            Ok(()) => *self.first.borrow(),
            Err(_) => std::future::pending().await,
        }
    }

    /// Sets the names of the rooms that stay on the server if the process ends at once.
    pub fn set_left_behind(&self, rooms: Vec<String>) {
        let left = self.left_behind.lock();
        *left.unwrap_or_else(PoisonError::into_inner) = rooms;
    }
}

/// Handlers of the three signals. Without a handler the default action stays, and the process ends.
struct HeardSignals {
    interrupt: Option<Signal>,
    terminate: Option<Signal>,
    hang_up: Option<Signal>,
}

impl HeardSignals {
    fn open() -> HeardSignals {
        let of = |kind| signal(kind).ok();
        HeardSignals {
            hang_up: (!ignores_hang_up())
                .then(|| of(SignalKind::hangup()))
                .flatten(),
            interrupt: of(SignalKind::interrupt()),
            terminate: of(SignalKind::terminate()),
        }
    }

    async fn next(&mut self) -> &'static str {
        async fn one(signal: &mut Option<Signal>) -> bool {
            match signal {
                Some(signal) => signal.recv().await.is_some(),
                None => false,
            }
        }
        tokio::select! {
            true = one(&mut self.interrupt) => "SIGINT",
            true = one(&mut self.terminate) => "SIGTERM",
            true = one(&mut self.hang_up) => "SIGHUP",
            else => std::future::pending().await,
        }
    }
}

/// Whether this process has inherited that SIGHUP is ignored.
fn ignores_hang_up() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    is_first_signal_ignored(&status)
}

/// Reads the mask of ignored signals in `/proc/PID/status`. SIGHUP is number 1, its lowest bit.
fn is_first_signal_ignored(status: &str) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 == 1)
}

/// Last words of a process that ends at once.
fn farewell(signal: &str, rooms: &[String]) -> String {
    let mut names: Vec<String> = rooms
        .iter()
        .take(NAMED_MAX)
        .map(|room| format!("'{room}'"))
        .collect();
    if rooms.len() > NAMED_MAX {
        names.push(format!("{} more", rooms.len() - NAMED_MAX));
    }
    let (noun, stays) = match rooms.len() {
        1 => ("room", "stays"),
        _ => ("rooms", "stay"),
    };
    let left = if rooms.is_empty() {
        String::new()
    } else {
        format!(
            "; {noun} {} {stays} behind on the server, with participants that it takes for present some 20 s longer",
            names.join(", ")
        )
    };
    format!("\n{signal} again: ended at once, without a report{left}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ignored_hangup_is_read_from_the_kernels_mask() {
        let status = |mask: &str| format!("Name:\tx\nSigBlk:\t0000000000000001\nSigIgn:\t{mask}\n");
        assert!(is_first_signal_ignored(&status("0000000000001001")));
        assert!(!is_first_signal_ignored(&status("0000000000001000")));
        assert!(!is_first_signal_ignored(""));
    }

    #[test]
    fn who_ends_at_once_says_which_rooms_stay() {
        let rooms: Vec<String> = (0..5).map(|room| format!("r-{room}")).collect();
        assert_eq!(
            farewell("SIGINT", &[]),
            "\nSIGINT again: ended at once, without a report"
        );
        assert!(farewell("SIGINT", &rooms[..1]).contains("room 'r-0' stays behind on the server"));
        assert!(
            farewell("SIGTERM", &rooms).contains("rooms 'r-0', 'r-1', 'r-2', 2 more stay behind")
        );
    }
}
