//! Clients whose defaults a run can take (`--client`), as data.
//!
//! `docs/clients.md` has the same figures with their sources, and a test compares the two. A preset
//! only replaces defaults: what it says goes into the scenario, where every part has its own field
//! and flag.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{AudioSpec, ConnectionMode, VideoSpec, even};
use crate::media::vp8::MIN_SIZE;
use crate::units::Bitrate;

/// Client that the participants of a run behave like, as far as no flag says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientKind {
    /// `lk perf load-test`, with this program's own signalling.
    #[default]
    Lk,
    /// LiveKit's SDK for browsers.
    Js,
    Rust,
    Swift,
    Android,
    /// A voice agent of LiveKit's framework for Python.
    Agent,
}

/// Defaults of one client.
#[derive(Debug)]
pub struct ClientDefaults {
    /// Product and version that the figures were read from, for example `livekit-client 2.21.0`.
    pub product: &'static str,
    pub identity: ClientIdentity,
    pub connection: ConnectionMode,
    pub audio: AudioSpec,
    /// Whether video publishers rest layers that nobody watches.
    pub dynacast: bool,
    /// Whether subscribers tell the server that they will say which sizes they show.
    pub adaptive_stream: bool,
    /// Whether it publishes video unless asked to.
    pub publishes_video: bool,
    /// Rates of video. `None`: those of lk, derived from the top layer.
    ladder: Option<VideoLadder>,
    /// What it does and this program cannot, yet.
    missing: &'static [Shortfall],
}

/// What a client tells the server about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientIdentity {
    /// Name in LiveKit's protocol (`ClientInfo.SDK`).
    pub sdk: &'static str,
    /// Version of the SDK. `None`: this program's version.
    pub version: Option<&'static str>,
    /// Version of LiveKit's client protocol.
    pub protocol: i32,
    /// Operating system. Empty: not told.
    pub os: &'static str,
    /// Empty: not told.
    pub browser: &'static str,
    /// Whether AddTrack says so if pauses are sent (no DTX).
    pub states_dtx: bool,
}

/// Something that a client does and this program does not.
#[derive(Debug)]
struct Shortfall {
    /// Matters only where video is published.
    of_video: bool,
    what: &'static str,
}

/// Rates that a client publishes a picture with, by the picture's size.
#[derive(Debug)]
struct VideoLadder {
    /// For 16:9.
    wide: &'static [VideoRung; RUNGS],
    /// For 4:3.
    narrow: &'static [VideoRung; RUNGS],
    /// Whether a picture as large as a rung gets the rates of the next one.
    takes_next_rung: bool,
    /// Rung of the lower one of two layers.
    lower_of_two: usize,
}

/// A size, and the rates for it.
#[derive(Debug)]
struct VideoRung {
    long_side: u16,
    short_side: u16,
    bps: u64,
    frames_per_second: u32,
}

const RUNGS: usize = 9;
/// Rungs of the layers below the top one: 180 and 360 lines.
const LOW: usize = 1;
const MIDDLE: usize = 3;

const fn rung((long_side, short_side): (u16, u16), bps: u64, frames_per_second: u32) -> VideoRung {
    VideoRung {
        long_side,
        short_side,
        bps,
        frames_per_second,
    }
}

/// Rungs of 16:9. All SDKs have the same bitrates, and differ in the frame rates of the first five.
const fn wide(fps: [u32; 5]) -> [VideoRung; RUNGS] {
    [
        rung((160, 90), 90_000, fps[0]),
        rung((320, 180), 160_000, fps[1]),
        rung((384, 216), 180_000, fps[2]),
        rung((640, 360), 450_000, fps[3]),
        rung((960, 540), 800_000, fps[4]),
        rung((1280, 720), 1_700_000, 30),
        rung((1920, 1080), 3_000_000, 30),
        rung((2560, 1440), 5_000_000, 30),
        rung((3840, 2160), 8_000_000, 30),
    ]
}

/// Rungs of 4:3. The frame rates are those of 120, 180 and 240 lines, of 360 and 480, and of 540.
const fn narrow(kbps: [u64; RUNGS], fps: [u32; 3]) -> [VideoRung; RUNGS] {
    [
        rung((160, 120), kbps[0] * 1_000, fps[0]),
        rung((240, 180), kbps[1] * 1_000, fps[0]),
        rung((320, 240), kbps[2] * 1_000, fps[0]),
        rung((480, 360), kbps[3] * 1_000, fps[1]),
        rung((640, 480), kbps[4] * 1_000, fps[1]),
        rung((720, 540), kbps[5] * 1_000, fps[2]),
        rung((960, 720), kbps[6] * 1_000, 30),
        rung((1440, 1080), kbps[7] * 1_000, 30),
        rung((1920, 1440), kbps[8] * 1_000, 30),
    ]
}

const NARROW_KBPS: [u64; RUNGS] = [70, 125, 140, 330, 500, 600, 1_300, 2_300, 3_800];
const NARROW_KBPS_RUST: [u64; RUNGS] = [80, 100, 150, 225, 300, 450, 1_500, 2_500, 3_500];

const JS_LADDER: VideoLadder = VideoLadder {
    wide: &wide([20, 20, 20, 20, 25]),
    narrow: &narrow(NARROW_KBPS, [20, 20, 25]),
    takes_next_rung: false,
    lower_of_two: LOW,
};
const RUST_LADDER: VideoLadder = VideoLadder {
    wide: &wide([15, 15, 15, 20, 25]),
    narrow: &narrow(NARROW_KBPS_RUST, [15, 20, 25]),
    takes_next_rung: true,
    lower_of_two: MIDDLE,
};
const SWIFT_LADDER: VideoLadder = VideoLadder {
    wide: &wide([15, 15, 15, 20, 25]),
    narrow: &narrow(NARROW_KBPS, [15, 20, 25]),
    takes_next_rung: false,
    lower_of_two: LOW,
};
const ANDROID_LADDER: VideoLadder = VideoLadder {
    wide: &wide([15, 15, 15, 30, 30]),
    narrow: &narrow(NARROW_KBPS, [15, 30, 30]),
    takes_next_rung: false,
    lower_of_two: LOW,
};

/// What every SDK sends of a microphone. Each packet repeats the one before, as in libwebrtc.
const MICROPHONE: AudioSpec = AudioSpec {
    bitrate: Bitrate::from_bps(48_000),
    frame: Duration::from_millis(20),
    dtx: true,
    redundancy: 1,
};

const NO_DATA_CHANNELS: Shortfall = Shortfall {
    of_video: false,
    what: "no data channels",
};
const NO_TEMPORAL_LAYERS: Shortfall = Shortfall {
    of_video: true,
    what: "VP8 without temporal layers",
};

static LK: ClientDefaults = ClientDefaults {
    product: "livekit-cli 2.18.2",
    identity: ClientIdentity {
        sdk: "RUST",
        version: None,
        protocol: 16,
        os: "",
        browser: "",
        states_dtx: false,
    },
    connection: ConnectionMode::Auto,
    audio: AudioSpec {
        bitrate: Bitrate::from_bps(24_000),
        frame: Duration::from_millis(20),
        dtx: false,
        redundancy: 0,
    },
    dynacast: true,
    adaptive_stream: false,
    publishes_video: true,
    ladder: None,
    missing: &[],
};

static JS: ClientDefaults = ClientDefaults {
    product: "livekit-client 2.21.0",
    identity: ClientIdentity {
        sdk: "JS",
        version: Some("2.21.0"),
        protocol: 17,
        os: "Linux",
        browser: "Chrome",
        states_dtx: true,
    },
    connection: ConnectionMode::Auto,
    audio: MICROPHONE,
    dynacast: false,
    adaptive_stream: false,
    publishes_video: true,
    ladder: Some(JS_LADDER),
    missing: &[NO_TEMPORAL_LAYERS, NO_DATA_CHANNELS],
};

static RUST: ClientDefaults = ClientDefaults {
    product: "rust-sdks livekit 0.8.2",
    identity: ClientIdentity {
        sdk: "RUST",
        version: Some("0.8.2"),
        protocol: 17,
        os: "Linux",
        browser: "",
        states_dtx: true,
    },
    connection: ConnectionMode::Auto,
    audio: MICROPHONE,
    dynacast: false,
    adaptive_stream: false,
    publishes_video: true,
    ladder: Some(RUST_LADDER),
    missing: &[NO_TEMPORAL_LAYERS, NO_DATA_CHANNELS],
};

static SWIFT: ClientDefaults = ClientDefaults {
    product: "client-sdk-swift 2.16.0",
    identity: ClientIdentity {
        sdk: "SWIFT",
        version: Some("2.16.0"),
        protocol: 16,
        os: "iOS",
        browser: "",
        states_dtx: true,
    },
    connection: ConnectionMode::Dual,
    audio: MICROPHONE,
    dynacast: false,
    adaptive_stream: false,
    publishes_video: true,
    ladder: Some(SWIFT_LADDER),
    missing: &[
        Shortfall {
            of_video: true,
            what: "VP8 where the device would choose H264",
        },
        NO_TEMPORAL_LAYERS,
        NO_DATA_CHANNELS,
    ],
};

static ANDROID: ClientDefaults = ClientDefaults {
    product: "client-sdk-android 2.27.0",
    identity: ClientIdentity {
        sdk: "ANDROID",
        version: Some("2.27.0"),
        protocol: 13,
        os: "android",
        browser: "",
        states_dtx: true,
    },
    connection: ConnectionMode::Dual,
    audio: MICROPHONE,
    dynacast: false,
    adaptive_stream: false,
    publishes_video: true,
    ladder: Some(ANDROID_LADDER),
    missing: &[NO_DATA_CHANNELS],
};

static AGENT: ClientDefaults = ClientDefaults {
    product: "livekit-agents 1.7.0",
    identity: ClientIdentity {
        sdk: "PYTHON",
        version: Some("1.1.14"),
        protocol: 17,
        os: "Linux",
        browser: "",
        states_dtx: true,
    },
    connection: ConnectionMode::Dual,
    audio: MICROPHONE,
    dynacast: false,
    adaptive_stream: false,
    publishes_video: false,
    ladder: Some(RUST_LADDER),
    missing: &[
        Shortfall {
            of_video: false,
            what: "no agent in the server's books (kind), and no answers to what it hears",
        },
        NO_TEMPORAL_LAYERS,
        NO_DATA_CHANNELS,
    ],
};

impl ClientKind {
    pub const ALL: [ClientKind; 6] = [
        ClientKind::Js,
        ClientKind::Rust,
        ClientKind::Swift,
        ClientKind::Android,
        ClientKind::Agent,
        ClientKind::Lk,
    ];

    /// Name in flags and reports.
    pub const fn name(self) -> &'static str {
        match self {
            ClientKind::Lk => "lk",
            ClientKind::Js => "js",
            ClientKind::Rust => "rust",
            ClientKind::Swift => "swift",
            ClientKind::Android => "android",
            ClientKind::Agent => "agent",
        }
    }

    pub fn defaults(self) -> &'static ClientDefaults {
        match self {
            ClientKind::Lk => &LK,
            ClientKind::Js => &JS,
            ClientKind::Rust => &RUST,
            ClientKind::Swift => &SWIFT,
            ClientKind::Android => &ANDROID,
            ClientKind::Agent => &AGENT,
        }
    }

    pub fn is_lk(&self) -> bool {
        *self == ClientKind::Lk
    }

    /// Name with product and version, for example `js (livekit-client 2.21.0)`.
    pub fn full_name(self) -> String {
        format!("{} ({})", self.name(), self.defaults().product)
    }

    /// Remark for the report on what of the client is not imitated. `None` if there is nothing.
    pub fn shortfalls(self, publishes_video: bool) -> Option<String> {
        let missing = self.defaults().missing.iter();
        let missing: Vec<&str> = missing
            .filter(|shortfall| publishes_video || !shortfall.of_video)
            .map(|shortfall| shortfall.what)
            .collect();
        (!missing.is_empty()).then(|| {
            format!(
                "as {}, but {}: docs/clients.md",
                self.name(),
                missing.join("; ")
            )
        })
    }
}

impl ClientDefaults {
    /// The highest layer that the client makes of a picture of this size. `None`: its rates follow
    /// those of lk.
    pub fn top_layer(&self, width: u16, height: u16) -> Option<VideoSpec> {
        let rung = self.ladder.as_ref()?.top(width, height);
        Some(VideoSpec {
            width,
            height,
            frames_per_second: rung.frames_per_second,
            bitrate: Bitrate::from_bps(rung.bps),
        })
    }

    /// The layers that the client sends below this one, the lowest first. `None`: they follow from
    /// the top one, as lk's do.
    pub fn lower_layers(&self, top: VideoSpec) -> Option<Vec<VideoSpec>> {
        let ladder = self.ladder.as_ref()?;
        let both = [LOW, MIDDLE];
        let rungs = match top.width.max(top.height) {
            960.. => &both[..],
            480.. => std::slice::from_ref(&ladder.lower_of_two),
            _ => &[],
        };
        let rungs = rungs
            .iter()
            .map(|at| &ladder.rungs(top.width, top.height)[*at]);
        let large_enough = |layer: &VideoSpec| {
            u32::from(layer.width) >= MIN_SIZE.0 && u32::from(layer.height) >= MIN_SIZE.1
        };
        let layers = rungs.map(|rung| rung.below(top)).filter(large_enough);
        Some(layers.collect())
    }
}

impl VideoLadder {
    fn rungs(&self, width: u16, height: u16) -> &'static [VideoRung; RUNGS] {
        let (long, short) = (width.max(height), width.min(height).max(1));
        let ratio = f64::from(long) / f64::from(short);
        if (ratio - 16.0 / 9.0).abs() < (ratio - 4.0 / 3.0).abs() {
            self.wide
        } else {
            self.narrow
        }
    }

    fn top(&self, width: u16, height: u16) -> &'static VideoRung {
        let rungs = self.rungs(width, height);
        let long = width.max(height);
        let is_enough = |rung: &&VideoRung| {
            rung.long_side > long || rung.long_side == long && !self.takes_next_rung
        };
        rungs.iter().find(is_enough).unwrap_or(&rungs[RUNGS - 1])
    }
}

impl VideoRung {
    /// The layer of this rung under a picture. It is never larger than the picture, and has no more
    /// frames.
    fn below(&self, top: VideoSpec) -> VideoSpec {
        let short = u32::from(top.width.min(top.height));
        let of_rung = u32::from(self.short_side).min(short);
        let scaled = |side: u16| {
            if of_rung == short {
                side
            } else {
                even((u32::from(side) * of_rung / short) as u16)
            }
        };
        VideoSpec {
            width: scaled(top.width),
            height: scaled(top.height),
            frames_per_second: self.frames_per_second.min(top.frames_per_second),
            bitrate: Bitrate::from_bps(self.bps),
        }
    }
}
