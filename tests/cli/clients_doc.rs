//! Keeps docs/clients.md true: every client has its table there, and the tables say what the
//! program does.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use throng::plan::{ClientKind, VideoSpec};

/// Rows that a client's table must have, with what the program does.
fn figures(client: ClientKind) -> Vec<(&'static str, String)> {
    let defaults = client.defaults();
    let on = |on: bool| if on { "on" } else { "off" }.to_owned();
    let layers: Vec<String> = layers(client, 1280, 720).iter().map(layer).collect();
    let audio = defaults.audio;
    vec![
        ("codec", VideoSpec::default().codec().name().to_lowercase()),
        ("layers", layers.join(", ")),
        ("audio", format!("{}k", audio.bitrate.bps() / 1_000)),
        ("DTX", on(audio.dtx)),
        ("RED", on(audio.redundancy > 0)),
        ("dynacast", on(defaults.dynacast)),
        ("adaptive stream", on(defaults.adaptive_stream)),
        ("connection", defaults.connection.name().to_owned()),
        ("protocol", defaults.identity.protocol.to_string()),
        ("sdk", defaults.identity.sdk.to_owned()),
        (
            "version",
            defaults.identity.version.unwrap_or("").to_owned(),
        ),
        ("os", defaults.identity.os.to_owned()),
        ("browser", defaults.identity.browser.to_owned()),
    ]
}

/// The layers of a picture of this size, the lowest first.
fn layers(client: ClientKind, width: u16, height: u16) -> Vec<VideoSpec> {
    let defaults = client.defaults();
    let top = defaults.top_layer(width, height);
    let lower = top.and_then(|top| defaults.lower_layers(top));
    match (top, lower) {
        (Some(top), Some(lower)) => lower.into_iter().chain([top]).collect(),
        _ => VideoSpec::default().layers(true),
    }
}

fn layer(spec: &VideoSpec) -> String {
    format!(
        "{}x{} {}k/{}",
        spec.width,
        spec.height,
        spec.bitrate.bps() / 1_000,
        spec.frames_per_second
    )
}

fn document() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/clients.md");
    fs::read_to_string(path).expect("docs/clients.md")
}

/// Returns the cells of a table's row, without those of the head and of the line below it.
fn cells(line: &str) -> Option<Vec<&str>> {
    let line = line.strip_prefix("| ")?.strip_suffix(" |")?;
    Some(line.split(" | ").map(str::trim).collect())
}

/// Returns the first text in code, or nothing.
fn code(cell: &str) -> &str {
    cell.split('`').nth(1).unwrap_or("")
}

#[test]
fn every_client_s_table_says_what_the_program_does() {
    let document = document();
    for client in ClientKind::ALL {
        let title = format!("\n## {}\n", client.full_name());
        let section = document.split(&title).nth(1).expect(&title);
        let section = section.split("\n## ").next().unwrap();
        let rows: BTreeMap<&str, Vec<&str>> = section
            .lines()
            .filter_map(cells)
            .map(|cells| {
                assert_eq!(cells.len(), 4, "{}: {cells:?}", client.name());
                (cells[0], cells)
            })
            .collect();
        for (part, done) in figures(client) {
            let row = rows
                .get(part)
                .unwrap_or_else(|| panic!("{part} of {title}"));
            let (default, ours) = (row[1], row[3]);
            assert_eq!(code(ours), done, "{}, {part}: {row:?}", client.name());
            // What differs from the client's own default says so.
            let differs = !code(default).is_empty() && code(default) != done;
            assert!(
                !differs || ours.contains("instead"),
                "{}, {part}: {row:?}",
                client.name()
            );
        }
        // Every figure has its source.
        for (part, row) in rows.iter().filter(|(part, _)| **part != "part") {
            let is_source = row[2].contains('`') || row[2] == "the tag";
            assert!(is_source, "{}, {part}: no source", client.name());
        }
    }
}

#[test]
fn the_table_of_sizes_is_that_of_the_program() {
    const WIDE: [(u16, u16); 9] = [
        (160, 90),
        (320, 180),
        (384, 216),
        (640, 360),
        (960, 540),
        (1280, 720),
        (1920, 1080),
        (2560, 1440),
        (3840, 2160),
    ];
    const NARROW: [(u16, u16); 9] = [
        (160, 120),
        (240, 180),
        (320, 240),
        (480, 360),
        (640, 480),
        (720, 540),
        (960, 720),
        (1440, 1080),
        (1920, 1440),
    ];
    let document = document();
    let section = document
        .split("\n## Sizes other than 720p\n")
        .nth(1)
        .unwrap();
    let section = section.split("\n## ").next().unwrap();
    for client in [
        ClientKind::Js,
        ClientKind::Rust,
        ClientKind::Swift,
        ClientKind::Android,
    ] {
        let row = section
            .lines()
            .filter_map(cells)
            .find(|row| row[0] == client.name())
            .unwrap();
        for (cell, sizes) in [(row[1], WIDE), (row[2], NARROW)] {
            let rates = sizes.map(|(width, height)| {
                // A picture one pixel smaller than a size has that size's rates with each client.
                let top = client.defaults().top_layer(width - 1, height - 1).unwrap();
                let kbps = top.bitrate.bps() / 1_000;
                format!("{kbps}/{}", top.frames_per_second)
            });
            assert_eq!(cell, rates.join(", "), "{}", client.name());
        }
    }
}

#[test]
fn layers_of_other_sizes_are_those_of_the_sdks() {
    let of = |client, width, height| -> Vec<String> {
        layers(client, width, height).iter().map(layer).collect()
    };
    assert_eq!(
        of(ClientKind::Js, 640, 360),
        ["320x180 160k/20", "640x360 450k/20"]
    );
    assert_eq!(of(ClientKind::Js, 320, 180), ["320x180 160k/20"]);
    // As LiveKit's API lists a track of the Python SDK, which is the Rust SDK.
    assert_eq!(
        of(ClientKind::Rust, 640, 360),
        ["640x360 450k/20", "640x360 800k/25"]
    );
    assert_eq!(
        of(ClientKind::Android, 1920, 1080),
        ["320x180 160k/15", "640x360 450k/30", "1920x1080 3000k/30"]
    );
    // Portrait, and 4:3.
    assert_eq!(
        of(ClientKind::Swift, 720, 1280),
        ["180x320 160k/15", "360x640 450k/20", "720x1280 1700k/30"]
    );
    assert_eq!(
        of(ClientKind::Js, 640, 480),
        ["240x180 125k/20", "640x480 500k/20"]
    );
    assert_eq!(
        of(ClientKind::Rust, 960, 720),
        ["240x180 100k/15", "480x360 225k/20", "960x720 2500k/30"]
    );
    // Larger than any size of the table.
    assert_eq!(of(ClientKind::Js, 4096, 2304)[2], "4096x2304 8000k/30");
}

#[test]
fn lk_is_what_nobody_need_ask_for() {
    let lk = ClientKind::default().defaults();
    assert!(ClientKind::default().is_lk());
    assert_eq!(lk.audio, throng::plan::AudioSpec::default());
    let media = throng::plan::scenario::MediaSpec::default();
    assert_eq!(lk.dynacast, media.dynacast);
    assert_eq!(lk.adaptive_stream, media.adaptive_stream);
    assert!(lk.top_layer(1280, 720).is_none());
}
