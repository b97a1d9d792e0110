//! Reads the server's own pages during a run, if they were asked for.

use std::time::Duration;

use super::Test;
use crate::server_metrics::{Account, NamedStretch, PageWatch};
use crate::units::Time;

/// Offset after each second's start at which the page is read, so that it is there when the
/// second's row is closed.
const READ_AT: Duration = Duration::from_millis(500);

impl Test<'_> {
    pub(super) fn watch_server(&mut self, server: Option<PageWatch>) {
        self.server = server;
        if let Some(server) = &mut self.server {
            self.books.notes.extend(server.warnings());
            server.go_on(self.epoch.instant(self.epoch.now().next_second() + READ_AT));
        }
    }

    /// Makes the server's account after everybody has left. Waits for a server whose counters lag.
    pub(super) async fn account_of_server(&mut self) -> Option<Account> {
        let server = self.server.take()?;
        let instant = |time: Time| self.epoch.instant(time);
        let holds: Vec<NamedStretch> = self
            .holds()
            .into_iter()
            .map(|(name, from, to)| NamedStretch {
                name,
                from: instant(from),
                to: instant(to),
            })
            .collect();
        let account = server.finish(instant(Time::ZERO), &holds).await;
        self.books.notes.extend(account.notes());
        Some(account)
    }
}
