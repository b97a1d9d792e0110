//! SIGINT and SIGTERM: the first one ends a run or a server in order, the second one ends the
//! process.

use tokio::sync::watch;

use crate::report::Verdict;

/// Listens for SIGINT and SIGTERM. The first one ends the run. A second one ends the process,
/// whatever the run is waiting for.
pub struct Interrupts {
    first: watch::Receiver<&'static str>,
}

impl Interrupts {
    /// Starts listening. Call this within a runtime.
    pub fn listen() -> Interrupts {
        use tokio::signal::unix::{SignalKind, signal};
        let (sender, first) = watch::channel("");
        // Without a handler the default action stays, and the process ends.
        let mut interrupt = signal(SignalKind::interrupt()).ok();
        let mut terminate = signal(SignalKind::terminate()).ok();
        tokio::spawn(async move {
            sender.send_replace(received(&mut interrupt, &mut terminate).await);
            received(&mut interrupt, &mut terminate).await;
            std::process::exit(Verdict::Partial.exit_code().into());
        });
        Interrupts { first }
    }

    /// Waits for the first signal, and returns it once.
    pub async fn next(&mut self) -> &'static str {
        match self.first.changed().await {
            Ok(()) => *self.first.borrow(),
            Err(_) => std::future::pending().await,
        }
    }
}

type UnixSignal = Option<tokio::signal::unix::Signal>;

async fn received(interrupt: &mut UnixSignal, terminate: &mut UnixSignal) -> &'static str {
    async fn one(signal: &mut UnixSignal) -> bool {
        match signal {
            Some(signal) => signal.recv().await.is_some(),
            None => false,
        }
    }
    tokio::select! {
        true = one(interrupt) => "SIGINT",
        true = one(terminate) => "SIGTERM",
        else => std::future::pending().await,
    }
}
