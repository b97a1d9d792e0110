//! A Prometheus page: what it costs and LiveKit's names, as far as we know and count what they stand for, then all that the routers count under their own.

use std::fmt::Write;

use axum::extract;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::{ServerState, ServerStatistics};
use crate::net;
use crate::sfu::THREAD_PREFIX;

pub(super) async fn serve(extract::State(state): extract::State<ServerState>) -> Response {
    match state.call(|desk, _| desk.statistics()).await {
        Some(statistics) => {
            let page = costs() + &page(&statistics);
            ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], page).into_response()
        }
        None => StatusCode::SERVICE_UNAVAILABLE.into_response(),
    }
}

/// As Prometheus' client libraries name them. CPU time is that of the SFU's threads, which are not alone where a run has it inside; memory is the process's, as it says.
fn costs() -> String {
    let mut costs = String::new();
    if let Some(cpu) = net::threads_cpu(THREAD_PREFIX) {
        let _ = writeln!(
            costs,
            "# TYPE process_cpu_seconds_total counter\nprocess_cpu_seconds_total {}",
            cpu.as_secs_f64()
        );
    }
    if let Some((resident, _)) = net::resident_bytes() {
        let _ = writeln!(
            costs,
            "# TYPE process_resident_memory_bytes gauge\nprocess_resident_memory_bytes {resident}"
        );
    }
    costs
}

/// LiveKit's packets are RTP; what is sent again counts as a transmission of its own.
fn page(statistics: &ServerStatistics) -> String {
    let (lobby, media) = (&statistics.lobby, &statistics.media);
    let mut page = String::new();
    let mut family = |kind: &str, name: &str, samples: &[(&str, u64)]| {
        let _ = writeln!(page, "# TYPE livekit_{name} {kind}");
        for (labels, value) in samples {
            let _ = writeln!(page, "livekit_{name}{labels} {value}");
        }
    };
    family("gauge", "room_total", &[("", lobby.rooms as u64)]);
    family(
        "gauge",
        "participant_total",
        &[("", lobby.participants as u64)],
    );
    let totals = &lobby.since_start;
    let states = [
        (r#"{state="signal_connected"}"#, totals.joins),
        (r#"{state="rtc_active"}"#, totals.active),
    ];
    family("counter", "participant_join_total", &states);
    family(
        "counter",
        "track_publish_counter",
        &[(r#"{state="success"}"#, totals.published)],
    );
    family(
        "counter",
        "track_subscribe_counter",
        &[(r#"{state="success"}"#, totals.subscribed)],
    );
    let kinds = |audio: usize, video: usize| {
        [
            (r#"{kind="AUDIO"}"#, audio as u64),
            (r#"{kind="VIDEO"}"#, video as u64),
        ]
    };
    family(
        "gauge",
        "track_published_total",
        &kinds(lobby.published_audio, lobby.published_video),
    );
    family(
        "gauge",
        "track_subscribed_total",
        &kinds(lobby.subscribed_audio, lobby.subscribed_video),
    );
    const IN: &str = r#"{direction="incoming",transmission="initial"}"#;
    const IN_AGAIN: &str = r#"{direction="incoming",transmission="retransmit"}"#;
    const OUT: &str = r#"{direction="outgoing",transmission="initial"}"#;
    const OUT_AGAIN: &str = r#"{direction="outgoing",transmission="retransmit"}"#;
    let packets = [
        (IN, media.media_in),
        (IN_AGAIN, media.repairs_in),
        (OUT, media.media_out),
        (OUT_AGAIN, media.resends_out),
    ];
    let bytes = [
        (IN, media.media_bytes_in),
        (IN_AGAIN, media.repair_bytes_in),
        (OUT, media.media_bytes_out),
        (OUT_AGAIN, media.resend_bytes_out),
    ];
    family("counter", "packet_total", &packets);
    family("counter", "packet_bytes", &bytes);
    let directions = |incoming: u64, outgoing: u64| {
        [
            (r#"{direction="incoming"}"#, incoming),
            (r#"{direction="outgoing"}"#, outgoing),
        ]
    };
    // LiveKit's direction is that of the media: what is asked of publishers concerns what comes in.
    family(
        "counter",
        "nack_total",
        &directions(media.nacks_out, media.nacks_in),
    );
    family(
        "counter",
        "pli_total",
        &directions(media.plis_out, media.plis_in),
    );
    for (name, value) in media.counters() {
        let _ = writeln!(
            page,
            "# TYPE throng_sfu_{name} untyped\nthrong_sfu_{name} {value}"
        );
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sample_follows_its_type() {
        let mut statistics = ServerStatistics::default();
        statistics.lobby.participants = 3;
        statistics.media.media_out = 70;
        let page = page(&statistics);
        assert!(
            page.contains("# TYPE livekit_participant_total gauge\nlivekit_participant_total 3\n"),
            "{page}"
        );
        assert!(
            page.contains(
                "livekit_packet_total{direction=\"outgoing\",transmission=\"initial\"} 70\n"
            ),
            "{page}"
        );
        let samples = page.lines().filter(|line| !line.starts_with('#'));
        assert!(samples.clone().all(|line| {
            line.rsplit(' ')
                .next()
                .is_some_and(|value| value.parse::<u64>().is_ok())
        }));
        assert!(
            costs().contains("\nprocess_resident_memory_bytes "),
            "{}",
            costs()
        );
        let own = samples
            .clone()
            .filter(|line| line.starts_with("throng_sfu_"));
        assert_eq!(
            (samples.count() - own.clone().count(), own.count()),
            (22, statistics.media.counters().count())
        );
    }
}
