//! Texts of `throng sfu`: where it listens and how to use it, and at the end what it did.

use std::fmt::Write;
use std::time::Duration;

use super::VERSION;
use crate::sfu::server::ServerStatistics;
use crate::words::{count, number, scaled};

/// `public_secret`: the well-known secret, which may be printed. The user's own secret is never
/// printed.
pub fn greeting(url: &str, api_key: &str, public_secret: Option<&str>) -> String {
    let secret = public_secret.unwrap_or("...");
    format!(
        "throng {VERSION}: the embedded SFU, a test bed and no product SFU, at {url}\n\
         API key {api_key}, secret {}\n\n  \
         throng run --url {url} --api-key {api_key} --api-secret {secret} --publishers 2 --subscribers 50\n\n\
         Ctrl-C ends it.\n",
        public_secret.unwrap_or("as given"),
    )
}

pub fn summary(statistics: &ServerStatistics, lived: Duration) -> String {
    let (lobby, media) = (&statistics.lobby, &statistics.media);
    let mut text = format!(
        "\nServed {} in {} s, {} of them to the end.\n",
        count(lobby.since_start.active, "participant"),
        number(lived.as_secs()),
        number(lobby.participants as u64)
    );
    let row = |text: &mut String, name: &str, packets: u64, bytes: u64| {
        let _ = writeln!(
            text,
            "  {name:<12} {:>13} packets {:>10}",
            number(packets),
            scaled(bytes as f64, "B")
        );
    };
    row(&mut text, "received", media.media_in, media.media_bytes_in);
    row(
        &mut text,
        "forwarded",
        media.media_out,
        media.media_bytes_out,
    );
    row(
        &mut text,
        "sent again",
        media.resends_out,
        media.resend_bytes_out,
    );
    let _ = writeln!(
        text,
        "  {} received and {} sent, {} received and {} sent",
        count(media.nacks_in, "NACK"),
        number(media.nacks_out),
        count(media.plis_in, "PLI"),
        number(media.plis_out)
    );
    for (lost, what) in [
        (
            media.socket_drops,
            "datagrams dropped by the socket: this host was too busy to read them",
        ),
        (media.send_errors, "datagrams that the kernel did not take"),
        (
            statistics.slow_readers,
            "WebSockets closed because their client did not read",
        ),
        (
            statistics.refused_connections,
            "connections refused because as many as may be were open",
        ),
    ] {
        if lost > 0 {
            let _ = writeln!(text, "  {} {what}", number(lost));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_well_known_secret_is_shown() {
        let own = greeting("ws://10.0.0.1:7880", "mine", None);
        assert!(
            own.contains("--url ws://10.0.0.1:7880 --api-key mine --api-secret ... "),
            "{own}"
        );
        let known = greeting("ws://127.0.0.1:7880", "devkey", Some("well-known"));
        assert!(
            known.contains("secret well-known\n") && known.contains("--api-secret well-known "),
            "{known}"
        );
    }

    #[test]
    fn the_summary_mentions_trouble_only_where_there_was_some() {
        let mut statistics = ServerStatistics::default();
        statistics.lobby.since_start.active = 1;
        statistics.media.media_out = 1_234_567;
        let quiet = summary(&statistics, Duration::from_secs(60));
        assert!(
            quiet.contains("Served 1 participant in 60 s") && quiet.contains("1,234,567 packets"),
            "{quiet}"
        );
        assert!(!quiet.contains("dropped"), "{quiet}");
        statistics.media.socket_drops = 5;
        assert!(summary(&statistics, Duration::ZERO).contains("\n  5 datagrams dropped"));
    }
}
