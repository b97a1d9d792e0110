//! A server's Prometheus page, read twice: the first page, and the difference between two pages.

use std::time::{Duration, Instant};

use throng::server_metrics::book::NodeBook;
use throng::server_metrics::page::{Counter, MetricsPage};

use super::{Script, Target, chunk, ours};

pub const TARGET: Target = Target {
    name: "server_page",
    run,
    seeds,
    mutations: 2_000,
    memory: Some((64 << 10, 64)),
};

fn run(input: &[u8]) {
    let (mut script, mut book, start) = (Script::new(input), NodeBook::default(), Instant::now());
    let mut at = start;
    while !script.is_over() {
        let Ok(text) = str::from_utf8(script.chunk()) else {
            continue;
        };
        at += Duration::from_secs(1);
        match ours(|| MetricsPage::read(text)) {
            Ok(page) => ours(|| book.note(at, page)),
            Err(error) => {
                let why = error.to_string();
                assert!(why.len() < 200 + text.len(), "{why}");
                ours(|| book.note_failure(at, why));
            }
        }
        ours(|| book.row());
    }
    for cost in ours(|| [book.whole(), book.between(start, at)])
        .into_iter()
        .flatten()
    {
        for counter in Counter::ALL {
            assert!(
                cost.counted[counter].is_none_or(|count| count >= 0.0),
                "{counter:?}: {:?}",
                cost.counted
            );
        }
        let figures = [
            cost.cpu_cores(),
            cost.cpu_seconds_per_gbit(),
            cost.participants_mean(),
            cost.bytes_per_participant(),
        ];
        assert!(
            figures.into_iter().flatten().all(|figure| figure >= 0.0),
            "{figures:?}"
        );
        assert!(
            cost.forward_latency_us(0.5)
                .is_none_or(|bracket| bracket.at_most.is_none_or(|at_most| at_most > bracket.over))
        );
    }
}

fn page(cpu: f64, packets: u64) -> Vec<u8> {
    let text = format!(
        "# TYPE process_cpu_seconds_total counter\nprocess_cpu_seconds_total {cpu}\nprocess_start_time_seconds 1.7e+09\n\
         process_resident_memory_bytes 6.4e+07\nlivekit_participant_total{{node_id=\"ND_a\",node_type=\"SERVER\"}} 12\n\
         livekit_packet_total{{country=\"\",direction=\"outgoing\",node_id=\"ND_a\",transmission=\"initial\"}} {packets}\n\
         livekit_packet_bytes{{country=\"\",direction=\"outgoing\",node_id=\"ND_a\",transmission=\"initial\"}} {packets}e3\n\
         livekit_forward_latency_ns_bucket{{le=\"50000\"}} {packets}\nlivekit_forward_latency_ns_bucket{{le=\"+Inf\"}} {packets}\n\
         livekit_forward_latency_ns_sum{{}} 4e+06\nlivekit_nack_total{{direction=\"incoming\",path=\"C:\\\\a\\n\"}} 3 1395066363000\n"
    );
    text.into_bytes()
}

fn seeds() -> Vec<Vec<u8>> {
    let script = |pages: &[Vec<u8>]| {
        pages
            .iter()
            .map(|page| chunk(page))
            .collect::<Vec<_>>()
            .concat()
    };
    vec![
        script(&[page(1.0, 100)]),
        script(&[page(1.0, 100), page(1.5, 250), page(2.25, 400)]),
        script(&[
            page(9.0, 5_000),
            page(0.5, 20),
            b"<html>".to_vec(),
            page(0.75, 60),
        ]),
    ]
}
