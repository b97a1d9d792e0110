//! `--client`: what a real LiveKit server says of participants that behave like a client is what
//! docs/clients.md says of that client.

// LiveKit calls some fields of a track deprecated, but fills them all the same.
#![allow(deprecated)]

use std::time::{Duration, Instant};

use livekit_protocol as proto;
use throng::plan::{ClientKind, VideoSpec};
use throng::signal::rooms::RoomService;

use crate::common::on_both_servers;
use crate::common::program::{Finished, PATIENCE, Report, beside_one_other};
use crate::common::server::{Options, Server};
use crate::rooms::{Run, active_with_tracks, everything_arrived, tracks};

on_both_servers!(
    every_client_gets_in_and_every_frame_arrives,
    subscribers_with_adaptive_streams_get_what_they_show,
);

/// What the server's API says of the publisher, and what the run says in the end.
struct Seen {
    audio: proto::TrackInfo,
    video: proto::TrackInfo,
    finished: Finished,
    report: Report,
}

/// Runs a publisher of audio and video and a subscriber, and asks the server about them meanwhile.
fn seen(server: &Server, args: &str) -> Seen {
    let shape = "--room seen --publishers 1 --video-publishers 1 --subscribers 1 --duration 5";
    let args: Vec<&str> = shape
        .split_whitespace()
        .chain(args.split_whitespace())
        .collect();
    let mut run = Run::start(server, &args);
    let rooms = RoomService::new(server.endpoint(), server.api_key());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    let inside = loop {
        let inside = runtime.block_on(rooms.list_participants("seen"));
        let inside = inside.unwrap_or_default();
        if active_with_tracks(&inside) == (2, 1, 1) {
            break inside;
        }
        assert!(
            Instant::now() < deadline && !run.running.has_ended(),
            "{args:?}: {inside:#?}"
        );
        std::thread::sleep(Duration::from_millis(50));
    };
    let (finished, report) = run.finish();
    let track = |kind: proto::TrackType| {
        let mut tracks = inside.iter().flat_map(|participant| &participant.tracks);
        let track = tracks.find(|track| track.r#type == i32::from(kind));
        track.expect("both kinds are published").clone()
    };
    Seen {
        audio: track(proto::TrackType::Audio),
        video: track(proto::TrackType::Video),
        finished,
        report,
    }
}

/// Width, height and bitrate of each layer that the server knows, the lowest first.
fn known_layers(track: &proto::TrackInfo) -> Vec<(u32, u32, u64)> {
    let mut layers: Vec<_> = track
        .layers
        .iter()
        .map(|layer| (layer.width, layer.height, u64::from(layer.bitrate)))
        .collect();
    layers.sort_unstable_by_key(|(.., bitrate)| *bitrate);
    layers
}

fn planned_layers(client: ClientKind, top: VideoSpec) -> Vec<VideoSpec> {
    let lower = client.defaults().lower_layers(top).unwrap();
    lower.into_iter().chain([top]).collect()
}

/// Returns what the server's log says of its clients when they leave: a JSON object each.
fn clients_by_the_log(server: &Server) -> Vec<serde_json::Value> {
    let log = server.log();
    let told = log.split("\"clientInfo\": ").skip(1);
    let objects = told.filter_map(|rest| {
        let mut values = serde_json::Deserializer::from_str(rest).into_iter();
        values.next()?.ok()
    });
    objects.collect()
}

#[test]
fn livekit_says_of_each_client_what_its_sdk_would_have_said() {
    let options = Options {
        log_level: "info",
        ..Options::default()
    };
    for client in ClientKind::ALL.into_iter().filter(|client| !client.is_lk()) {
        let _alone = beside_one_other();
        let Some(server) = Server::livekit_with(&options) else {
            return;
        };
        let name = client.name();
        let defaults = client.defaults();
        let seen = seen(&server, &format!("--client {name}"));
        let said = format!("{}{}", seen.finished.stderr, seen.finished.stdout);
        assert!(matches!(seen.finished.code, Some(0 | 98)), "{name}: {said}");

        // The tracks, as the server's API has them.
        let top = defaults.top_layer(1280, 720).unwrap();
        let planned = planned_layers(client, top);
        let sizes = |spec: &VideoSpec| {
            let (width, height) = (spec.width.into(), spec.height.into());
            (width, height, spec.bitrate.bps())
        };
        let asked: Vec<_> = planned.iter().map(sizes).collect();
        assert_eq!(known_layers(&seen.video), asked, "{name}");
        assert_eq!(seen.video.mime_type.to_lowercase(), "video/vp8", "{name}");
        assert_eq!(seen.audio.mime_type, "audio/red", "{name}");
        assert!(
            !seen.audio.disable_red && !seen.audio.disable_dtx,
            "{name}: {:?}",
            seen.audio
        );

        // The client, as the server's log has it.
        let told = clients_by_the_log(&server);
        let identity = &defaults.identity;
        let ours: Vec<_> = told
            .iter()
            .filter(|info| info["sdk"] == identity.sdk)
            // Whoever asks for the server's version joins as throng itself.
            .filter(|info| info["version"] == identity.version.unwrap())
            .collect();
        assert!(ours.len() >= 2, "{name}: {told:?}");
        for info in ours {
            assert_eq!(info["protocol"], identity.protocol, "{name}: {info}");
            assert_eq!(info["os"], identity.os, "{name}: {info}");
            let browser = info["browser"].as_str().unwrap_or("");
            assert_eq!(browser, identity.browser, "{name}: {info}");
        }

        // The run itself.
        assert!(
            said.contains(&format!("as {}", client.full_name())),
            "{said}"
        );
        let plan = &seen.report.0["plan"];
        assert_eq!(plan["client"], name);
        assert_eq!(plan["audio"]["bitrate"], 48_000, "{name}");
        let connection = match client {
            ClientKind::Swift | ClientKind::Android | ClientKind::Agent => "dual",
            _ => "single",
        };
        assert_eq!(seen.report.0["target"]["connection"], connection, "{name}");
        assert!(
            seen.report.notes().contains(&format!("as {name}, but ")),
            "{}",
            seen.report.notes()
        );
        sends_what_was_planned(&seen.report, &planned);
    }
}

/// Asserts that frames have the size that the planned rates give. Skipped slots change the number
/// of frames, and hardly the size of one.
fn sends_what_was_planned(report: &Report, planned: &[VideoSpec]) {
    let video = |name| report.counter("video", name) as f64;
    let mean = video("bytes_sent") / video("frames_sent");
    let bps: u64 = planned.iter().map(|layer| layer.bitrate.bps()).sum();
    let frames: u32 = planned.iter().map(|layer| layer.frames_per_second).sum();
    let asked = bps as f64 / 8.0 / f64::from(frames);
    assert!(
        (asked * 0.7..asked * 1.5).contains(&mean),
        "{mean} bytes a frame, and {asked} were planned"
    );
}

#[test]
fn a_flag_wins_over_the_client_s_default_at_the_server_too() {
    let Some(server) = Server::livekit() else {
        return;
    };
    let _alone = beside_one_other();
    let seen = seen(
        &server,
        "--client js --no-audio-dtx --no-audio-red --audio-bitrate 24k --video-resolution medium \
         --video-bitrate 900k --video-fps 15 --connection dual --dynacast on",
    );
    let said = &seen.finished.stdout;
    assert!(matches!(seen.finished.code, Some(0 | 98)), "{said}");
    assert_eq!(
        known_layers(&seen.video),
        [(320, 180, 160_000), (640, 360, 900_000)]
    );
    assert_eq!(seen.audio.mime_type, "audio/opus");
    assert!(seen.audio.disable_dtx && seen.audio.disable_red);
    let no_dtx = i32::from(proto::AudioTrackFeature::TfNoDtx);
    assert!(seen.audio.audio_features.contains(&no_dtx));
    let report = &seen.report.0;
    assert_eq!(report["target"]["connection"], "dual");
    assert_eq!(report["plan"]["audio"]["bitrate"], 24_000);
    let layers = report["plan"]["video"]["layers"].as_array().unwrap();
    assert!(layers.iter().all(|layer| layer["frames_per_second"] == 15));
    assert!(!said.contains("watched or not"), "{said}");
}

fn every_client_gets_in_and_every_frame_arrives(server: &Server) {
    let _alone = beside_one_other();
    for client in ClientKind::ALL {
        let name = client.name();
        // Rust sends a picture of this size twice in that size.
        let args = format!(
            "--client {name} --publishers 2 --video-publishers 1 --video-resolution medium \
             --subscribers 2 --layout 3x3 --duration 3"
        );
        let (finished, report) =
            Run::start(server, &args.split_whitespace().collect::<Vec<_>>()).finish();
        assert!(
            matches!(finished.code, Some(0 | 98)),
            "{name}: {}",
            finished.stdout
        );
        everything_arrived(&report, 4, tracks(2, 4), tracks(1, 2));
    }
}

fn subscribers_with_adaptive_streams_get_what_they_show(server: &Server) {
    let _alone = beside_one_other();
    let args = "--client js --publishers 1 --video-publishers 1 --subscribers 3 --layout 3x3 --adaptive-stream --duration 3";
    let (finished, report) =
        Run::start(server, &args.split_whitespace().collect::<Vec<_>>()).finish();
    assert!(matches!(finished.code, Some(0 | 98)), "{}", finished.stdout);
    everything_arrived(&report, 4, tracks(1, 3), tracks(1, 3));
}
