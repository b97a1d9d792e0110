//! A Prometheus page. It has the SFU's cost, LiveKit's metrics as far as we know and count the same
//! things, and all counters of the routers under their own names.

use axum::extract;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::{ServerState, ServerStatistics};
use crate::metrics_page::{self, FigureKind, FiguresPage};
use crate::net;
use crate::sfu::THREAD_PREFIX;
use crate::sfu::lobby::LobbyStatistics;
use crate::sfu::statistics::RouterStatistics;

pub(super) async fn serve(extract::State(state): extract::State<ServerState>) -> Response {
    match state.call(|desk, _| desk.statistics()).await {
        Some(statistics) => {
            let mut page = FiguresPage::default();
            add_costs(&mut page);
            add_counts(&mut page, &statistics);
            let content_type = [(header::CONTENT_TYPE, metrics_page::CONTENT_TYPE)];
            (content_type, page.into_text()).into_response()
        }
        None => StatusCode::SERVICE_UNAVAILABLE.into_response(),
    }
}

fn add_counts(page: &mut FiguresPage, statistics: &ServerStatistics) {
    add_lobby(page, &statistics.lobby);
    add_media(page, &statistics.media);
    for (name, value) in statistics.media.counters() {
        let name = format!("throng_sfu_{name}");
        page.add(FigureKind::Untyped, &name, "", [([], value as f64)]);
    }
}

/// Adds the cost, under the names that Prometheus' client libraries use. CPU time is that of the
/// SFU's threads only, because a run with an embedded SFU has other threads, too. Memory is that of
/// the whole process, as its name says.
fn add_costs(page: &mut FiguresPage) {
    let cpu = net::threads_cpu(THREAD_PREFIX).map(|cpu| ([], cpu.as_secs_f64()));
    page.add(FigureKind::Counter, "process_cpu_seconds_total", "", cpu);
    let resident = net::resident_bytes().map(|(resident, _)| ([], resident as f64));
    page.add(
        FigureKind::Gauge,
        "process_resident_memory_bytes",
        "",
        resident,
    );
}

/// Adds the rooms and participants that there are, and totals since the start.
fn add_lobby(page: &mut FiguresPage, lobby: &LobbyStatistics) {
    let count = |value: usize| [([], value as f64)];
    let gauge = FigureKind::Gauge;
    page.add(gauge, "livekit_room_total", "", count(lobby.rooms));
    let participants = count(lobby.participants);
    page.add(gauge, "livekit_participant_total", "", participants);
    let totals = &lobby.since_start;
    let mut of_state = |name: &str, samples: &[(&str, u64)]| {
        let samples = (samples.iter()).map(|(state, value)| ([("state", *state)], *value as f64));
        page.add(FigureKind::Counter, name, "", samples);
    };
    let joins = [
        ("signal_connected", totals.joins),
        ("rtc_active", totals.active),
    ];
    of_state("livekit_participant_join_total", &joins);
    let published = [("success", totals.published)];
    of_state("livekit_track_publish_counter", &published);
    let subscribed = [("success", totals.subscribed)];
    of_state("livekit_track_subscribe_counter", &subscribed);
    let kinds = |audio: usize, video: usize| {
        [("AUDIO", audio), ("VIDEO", video)].map(|(kind, value)| ([("kind", kind)], value as f64))
    };
    let published = kinds(lobby.published_audio, lobby.published_video);
    page.add(gauge, "livekit_track_published_total", "", published);
    let subscribed = kinds(lobby.subscribed_audio, lobby.subscribed_video);
    page.add(gauge, "livekit_track_subscribed_total", "", subscribed);
}

/// Adds LiveKit's packet counts. Its packets are RTP, and a retransmission counts as a transmission
/// of its own.
fn add_media(page: &mut FiguresPage, media: &RouterStatistics) {
    const WAYS: [[(&str, &str); 2]; 4] = [
        [("direction", "incoming"), ("transmission", "initial")],
        [("direction", "incoming"), ("transmission", "retransmit")],
        [("direction", "outgoing"), ("transmission", "initial")],
        [("direction", "outgoing"), ("transmission", "retransmit")],
    ];
    let packets = [
        media.media_in,
        media.repairs_in,
        media.media_out,
        media.resends_out,
    ];
    let bytes = [
        media.media_bytes_in,
        media.repair_bytes_in,
        media.media_bytes_out,
        media.resend_bytes_out,
    ];
    for (name, values) in [
        ("livekit_packet_total", packets),
        ("livekit_packet_bytes", bytes),
    ] {
        let samples = WAYS.into_iter().zip(values.map(|value| value as f64));
        page.add(FigureKind::Counter, name, "", samples);
    }
    // LiveKit's direction is that of the media: requests sent to publishers concern incoming media.
    for (name, incoming, outgoing) in [
        ("livekit_nack_total", media.nacks_out, media.nacks_in),
        ("livekit_pli_total", media.plis_out, media.plis_in),
    ] {
        let samples = [("incoming", incoming), ("outgoing", outgoing)]
            .map(|(direction, value)| ([("direction", direction)], value as f64));
        page.add(FigureKind::Counter, name, "", samples);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server_metrics::exposition;

    fn counts(statistics: &ServerStatistics) -> String {
        let mut page = FiguresPage::default();
        add_counts(&mut page, statistics);
        page.into_text()
    }

    /// Dashboards and `--server-metrics` rely on these names.
    #[test]
    fn our_own_reader_finds_livekit_s_names_with_its_labels_and_types() {
        let mut statistics = ServerStatistics::default();
        statistics.lobby.since_start.active = 5;
        statistics.media.resend_bytes_out = 1 << 40;
        let page = counts(&statistics);
        let families: Vec<&str> = (page.lines())
            .filter_map(|line| line.strip_prefix("# TYPE livekit_"))
            .collect();
        let expected = [
            "room_total gauge",
            "participant_total gauge",
            "participant_join_total counter",
            "track_publish_counter counter",
            "track_subscribe_counter counter",
            "track_published_total gauge",
            "track_subscribed_total gauge",
            "packet_total counter",
            "packet_bytes counter",
            "nack_total counter",
            "pli_total counter",
        ];
        assert_eq!(families, expected);
        let samples: Vec<_> = exposition::samples(&page).map(Result::unwrap).collect();
        for (name, labels, value) in [
            (
                "livekit_participant_join_total",
                &[("state", "rtc_active")][..],
                5.0,
            ),
            (
                "livekit_packet_bytes",
                &[("direction", "outgoing"), ("transmission", "retransmit")],
                1_099_511_627_776.0,
            ),
            ("livekit_track_published_total", &[("kind", "VIDEO")], 0.0),
        ] {
            let mut of_name = samples.iter().filter(|sample| sample.name == name);
            let sample = of_name.find(|sample| sample.labels.have(labels));
            assert_eq!(sample.map(|sample| sample.value), Some(value), "{name}");
        }
        for (name, value) in statistics.media.counters() {
            let name = format!("throng_sfu_{name}");
            let line = format!("# TYPE {name} untyped\n{name} {value}\n");
            assert!(page.contains(&line), "{line}");
        }
    }

    #[test]
    fn every_sample_follows_its_type() {
        let mut statistics = ServerStatistics::default();
        statistics.lobby.participants = 3;
        statistics.media.media_out = 70;
        let page = counts(&statistics);
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
        let mut costs = FiguresPage::default();
        add_costs(&mut costs);
        let costs = costs.into_text();
        assert!(
            costs.contains("\nprocess_resident_memory_bytes "),
            "{costs}"
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
