//! Cost of work that is done once or seldom: media made at the start, records merged each second,
//! descriptions answered.
//!
//! `cargo bench --bench parts`

#[allow(dead_code)]
#[path = "common/table.rs"]
mod table;

use std::hint::black_box;
use std::time::{Duration, Instant};
use throng::transport::rtp::Ssrc;

use criterion::{Criterion, SamplingMode};
use rtc_sdp::SessionDescription;
use table::Table;
use throng::codec::Codec;
use throng::measure::{Kind, Record};
use throng::media::opus::{AudioClip, AudioContent, OpusSpec};
use throng::media::vp8::{VideoClip, Vp8Spec};
use throng::transport::sdp::serve::{SentTrack, SubscriberOffer};
use throng::transport::sdp::{
    Answerer, Candidate, Capabilities, DtlsSetup, Fingerprint, LocalTransport,
};
use throng::units::Bitrate;

const SECTIONS: usize = 100;

fn main() {
    let is_full = std::env::args().any(|argument| argument == "--bench");
    let mut criterion = table::criterion();
    let mut table =
        Table::new("Done seldom (median, its 95 % interval, times the first of the group)");
    descriptions(&mut criterion, &mut table);
    records(&mut criterion, &mut table);
    histogram(&mut criterion, &mut table);
    audio(&mut criterion, &mut table);
    criterion.final_summary();
    table.print();
    video(is_full);
}

/// A subscriber's answer to offers in LiveKit's shape. The first row parses the same text with a
/// general parser and does nothing else.
fn descriptions(criterion: &mut Criterion, table: &mut Table) {
    let mut offers = SubscriberOffer::default();
    for index in 0..SECTIONS {
        offers.add(sent_track(index));
    }
    let before = offers.offer(&local());
    let mut answerer = Answerer::new(Capabilities::SUBSCRIBER);
    let answered = answerer
        .answer(&before, &local())
        .expect("an offer of ours");
    offers.answered(&answered.sdp).expect("an answer of ours");
    offers.add(sent_track(SECTIONS));
    let after = offers.offer(&local());

    let group = format!("an offer of {SECTIONS} sections");
    let mut benches = criterion.benchmark_group(&group);
    benches.bench_function("rtc-sdp, parsed only", |bencher| {
        bencher.iter(|| {
            SessionDescription::unmarshal(&mut std::io::Cursor::new(&before))
                .expect("a description")
        });
    });
    benches.bench_function("answered, all new", |bencher| {
        bencher.iter(|| {
            Answerer::new(Capabilities::SUBSCRIBER)
                .answer(&before, &local())
                .expect("an offer of ours")
        });
    });
    // Each iteration is two offers: one more section, and back.
    benches.bench_function("answered, one changed", |bencher| {
        bencher.iter(|| {
            answerer.answer(&after, &local()).expect("an offer of ours");
            answerer
                .answer(&before, &local())
                .expect("an offer of ours");
        });
    });
    benches.finish();
    table.add(&group, "rtc-sdp, parsed only");
    table.add(&group, "answered, all new");
    table.add_per(&group, "answered, one changed", 2.0);
}

/// The run's merging of the records that each worker hands out each second. An empty record costs
/// as much as its histograms' bounds; a full one has values in all of them.
fn records(criterion: &mut Criterion, table: &mut Table) {
    let group = "a record merged into another";
    let mut benches = criterion.benchmark_group(group);
    for (name, values) in [("empty", 0), ("full", 10_000)] {
        let (mut sum, record) = (Record::default(), filled(values));
        benches.bench_function(name, |bencher| bencher.iter(|| sum.merge(&record)));
        table.add(group, name);
    }
    benches.finish();
}

/// Cost of counting one latency: a value goes into one of a record's histograms, with the bounds of
/// a run.
fn histogram(criterion: &mut Criterion, table: &mut Table) {
    const VALUES: u64 = 1_000;
    let group = "a histogram takes a value";
    let mut benches = criterion.benchmark_group(group);
    let mut record = Record::default();
    // An iteration is many values, spread as latencies are.
    benches.bench_function("recorded", |bencher| {
        bencher.iter(|| {
            (0..VALUES).for_each(|value| {
                record
                    .video
                    .one_way_latency
                    .record_micros(black_box(value * 7_919 % 100_000))
            })
        });
    });
    benches.finish();
    table.add_per(group, "recorded", VALUES as f64);
}

fn filled(values: u64) -> Record {
    let mut record = Record::default();
    for value in 0..values {
        let micros = value * 7 % 100_000;
        for media in [&mut record.audio, &mut record.video] {
            for histogram in [
                &mut media.one_way_latency,
                &mut media.frame_interval,
                &mut media.jitter,
                &mut media.first_packet,
            ] {
                histogram.record_micros(micros);
            }
        }
        let (session, engine) = (&mut record.session, &mut record.engine);
        for histogram in [
            &mut session.join,
            &mut session.rtt_rtcp,
            &mut engine.tick_late,
            &mut engine.send_lag,
        ] {
            histogram.record_micros(micros);
        }
    }
    record
}

fn audio(criterion: &mut Criterion, table: &mut Table) {
    let group = "audio made at the start";
    let mut benches = criterion.benchmark_group(group);
    benches.sampling_mode(SamplingMode::Flat).sample_size(10);
    for (name, content) in [
        ("speech", AudioContent::Speech),
        ("silence", AudioContent::Silence),
    ] {
        let spec = OpusSpec {
            bitrate: Bitrate::from_bps(24_000),
            frame: Duration::from_millis(20),
            content,
            dtx: false,
            seed: 1,
        };
        benches.bench_function(name, |bencher| {
            bencher.iter(|| AudioClip::generate(&spec).expect("a spec that can be"))
        });
        table.add(group, name);
    }
    benches.finish();
}

/// Video takes seconds to make, so each size is made and timed only once.
fn video(is_full: bool) {
    let sizes: &[(u32, u32, u32, u64)] = if is_full {
        &[
            (320, 180, 15, 150_000),
            (640, 360, 20, 600_000),
            (1_280, 720, 30, 2_000_000),
        ]
    } else {
        &[(96, 54, 15, 60_000)]
    };
    println!("\nVideo made at the start, on one thread: both frames of each index of the loop");
    for (width, height, fps, bps) in sizes.iter().copied() {
        let spec = Vp8Spec {
            width,
            height,
            fps,
            bitrate: Bitrate::from_bps(bps),
            seed: 1,
        };
        let started = Instant::now();
        let clip = VideoClip::generate(&spec, 1).expect("a spec that can be");
        let spent = started.elapsed();
        println!(
            "  {width:>4} x {height:<4} {fps:>3} fps {:>9.2} s  {:>7.2} ms an index",
            spent.as_secs_f64(),
            spent.as_secs_f64() * 1e3 / clip.len() as f64
        );
    }
}

fn kind(index: usize) -> Kind {
    if index.is_multiple_of(2) {
        Kind::Audio
    } else {
        Kind::Video
    }
}

fn sent_track(index: usize) -> SentTrack {
    SentTrack {
        codec: Codec::default_of(kind(index)),
        stream_id: format!("PA_{index:08}|TR_{index:08}"),
        track_id: format!("TR_{index:08}"),
        ssrc: Ssrc(1_000 + 2 * index as u32),
        rtx_ssrc: (kind(index) == Kind::Video).then_some(Ssrc(1_001 + 2 * index as u32)),
    }
}

fn local() -> LocalTransport {
    LocalTransport {
        ufrag: "frag".into(),
        pwd: "apasswordoftwodozenchars".into(),
        fingerprint: Fingerprint([7; 32]),
        setup: DtlsSetup::ActPass,
        candidates: vec![Candidate::host(([127, 0, 0, 1], 5_000).into())],
        session_id: 1,
    }
}
