//! Plan of a run, as plain data: who joins which room when, what they send, and what that adds up
//! to.
//!
//! Everything here is a pure function of the [`Plan`]: no clock, no chance, no I/O. The same plan
//! lists the same participants on every host. Counts are for one room, as in the flags;
//! [`Plan::total_participants`] and similar functions are for all rooms. If several hosts run the
//! plan, the [`Scenario`] covers all of them together, and sums cover this host's [`Part`].

mod client;
mod part;
pub mod scenario;
mod schedule;
mod transport;

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::codec::Codec;
use crate::measure::Kind;
use crate::media::packetize::PAYLOAD_BYTES_MAX;
use crate::media::vp8::MIN_SIZE;
use crate::net::SendMode;
use crate::seeded::scatter;
use crate::units::{Bitrate, Time, duration_text};

/// Name that the embedded SFU gives clients (`server_info.node_id`), so that nobody takes its
/// version for one of LiveKit's.
pub const EMBEDDED_NODE_ID: &str = "throng";

pub use client::{ClientDefaults, ClientIdentity, ClientKind};
pub use part::{HostRole, Part, Placement, UndealtPlan, VANTAGES_MAX, VantagePlan, WEIGHT_MAX};
use scenario::{MediaSpec, ParticipantGroup, Scenario};
pub use schedule::{Intent, Schedule, ScheduleBook, Span, Spans};
pub use transport::{MediaTransport, NoTransportMix, TransportChoice, TransportMix};

/// Most participants in one run. Keeps every count and index within 32 bits, with room for
/// arithmetic.
pub const PARTICIPANTS_MAX: u64 = 1_000_000;

/// Bytes on the wire beside the payload: IPv4, UDP and RTP headers, header extensions, AEAD tag.
const WIRE_OVERHEAD_BYTES: f64 = 20.0 + 8.0 + 12.0 + 8.0 + 16.0;
/// Packets of a silent DTX track: libopus refreshes its comfort noise every 400 ms.
const DTX_PACKETS_PER_SECOND: f64 = 2.5;
/// A 20 ms frame of digital silence, with the identity.
const SILENCE_PACKET_BYTES: f64 = 30.0;
/// Cost of a packet in the engine, kernel included, at a 1 ms tick: 2.3 us measured, rounded up.
const CPU_SECONDS_PER_PACKET: f64 = 3e-6;
/// Cost per second of a connected participant without media.
const CPU_SECONDS_PER_IDLE_SECOND: f64 = 4e-6;
/// Cost of one join: WebSocket, ICE, DTLS.
const CPU_SECONDS_PER_JOIN: f64 = 1.6e-3;
/// Memory of the shared media, the histograms and the process itself.
const MEMORY_BASE_BYTES: u64 = 96 << 20;
/// Memory of a peer connection: ICE, DTLS, SRTP and RTP state, and its kernel socket.
const MEMORY_PER_CONNECTION_BYTES: u64 = 32 << 10;
/// Memory of a signalling task with its WebSocket and TLS buffers.
const MEMORY_PER_SIGNAL_BYTES: u64 = 96 << 10;

/// This host's task in a run: the [`Scenario`], and what distinguishes this run, this host and its
/// server from others. All participants and their times follow from it. It contains no secrets.
#[derive(Clone, Debug)]
pub struct Plan {
    pub scenario: Scenario,
    pub target: Target,
    /// The scenario's mode, until the server has been asked.
    pub connection: ConnectionMode,
    /// Why the mode is this one, if the server decided that.
    pub connection_reason: Option<String>,
    /// Part of the scenario that this host runs. `None`: all of it.
    pub part: Option<Part>,
    /// Distinguishes runs in identities and room names. Not derived from the seed, because a
    /// repeated run must not evict the first one's participants.
    pub run_tag: u32,
}

/// The server under test.
#[derive(Clone, Debug)]
pub struct Target {
    pub url: ServerUrl,
    pub origin: TargetOrigin,
}

impl Target {
    /// The SFU that the run starts itself. Its address is known once it listens.
    pub fn embedded(send: SendMode) -> Target {
        Target {
            url: ServerUrl::loopback(0),
            origin: TargetOrigin::Embedded(send),
        }
    }

    /// The target of a run over many hosts, where each host knows its own server.
    pub fn of_hosts() -> Target {
        Target {
            url: ServerUrl::loopback(0),
            origin: TargetOrigin::Hosts,
        }
    }

    pub fn is_embedded(&self) -> bool {
        matches!(self.origin, TargetOrigin::Embedded(_))
    }

    /// Address of the server, unless only the other hosts know it.
    pub fn known_url(&self) -> Option<&ServerUrl> {
        (self.origin != TargetOrigin::Hosts).then_some(&self.url)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.origin {
            TargetOrigin::Embedded(_) if self.url.port() == 0 => f.write_str("embedded SFU"),
            TargetOrigin::Embedded(_) => write!(f, "embedded SFU at {}", self.url),
            TargetOrigin::Hosts => f.write_str("the hosts' own server"),
            TargetOrigin::Flag | TargetOrigin::Environment | TargetOrigin::Coordinator => {
                write!(f, "{}", self.url)
            }
        }
    }
}

/// Origin of the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetOrigin {
    Flag,
    Environment,
    /// The coordinator of the run that this host takes part in.
    Coordinator,
    /// This host leads a run, and the servers are configured on the hosts that take part.
    Hosts,
    /// No server was named.
    Embedded(SendMode),
}

impl fmt::Display for TargetOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TargetOrigin::Flag => "from --url",
            TargetOrigin::Environment => "from LIVEKIT_URL",
            TargetOrigin::Coordinator => "from the coordinator",
            TargetOrigin::Hosts => "no --url, no LIVEKIT_URL here",
            TargetOrigin::Embedded(SendMode::Plain) => "no --url, no LIVEKIT_URL",
            TargetOrigin::Embedded(SendMode::Gso) => "no --url, no LIVEKIT_URL; segmented sends",
        })
    }
}

/// Number of peer connections of a participant that publishes and subscribes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConnectionMode {
    /// One if the server supports that well, otherwise two. Not known before the server is asked.
    Auto,
    /// LiveKit's `/rtc/v1`: one connection for everything.
    Single,
    /// LiveKit's `/rtc`: one connection to publish, one to subscribe.
    Dual,
}

impl ConnectionMode {
    /// Name in the report, for example `single`.
    pub const fn name(self) -> &'static str {
        match self {
            ConnectionMode::Auto => "auto",
            ConnectionMode::Single => "single",
            ConnectionMode::Dual => "dual",
        }
    }
}

/// Number of subscribers that are present. They are the first ones in joining order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subscribers {
    /// Number in each room, summed over all hosts of the run.
    PerRoom(u32),
    /// Number over all rooms, on this host.
    Total(u32),
}

/// Opus settings of published audio.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AudioSpec {
    pub bitrate: Bitrate,
    /// Duration of the audio in one packet.
    #[serde(with = "duration_text")]
    pub frame: Duration,
    /// Discontinuous transmission: pauses are not sent.
    pub dtx: bool,
    /// Number of earlier packets that each packet repeats (RED). 0: plain Opus.
    pub redundancy: u8,
}

impl Default for AudioSpec {
    fn default() -> AudioSpec {
        AudioSpec {
            bitrate: Bitrate::from_bps(24_000),
            frame: Duration::from_millis(20),
            dtx: false,
            redundancy: 0,
        }
    }
}

/// VP8 settings of published video: of the only layer, or of the highest of several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VideoSpec {
    pub width: u16,
    pub height: u16,
    pub frames_per_second: u32,
    pub bitrate: Bitrate,
}

/// The same as `high` in lk.
impl Default for VideoSpec {
    fn default() -> VideoSpec {
        VideoSpec {
            width: 1280,
            height: 720,
            frames_per_second: 30,
            bitrate: Bitrate::from_bps(2_000_000),
        }
    }
}

/// Layout in which a subscriber sees a room, as in `lk`. Tracks beyond it are switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ViewLayout {
    /// One large picture of the speaker, and five small ones.
    Speaker,
    #[serde(rename = "3x3")]
    Grid3x3,
    #[serde(rename = "4x4")]
    Grid4x4,
    #[serde(rename = "5x5")]
    Grid5x5,
}

impl ViewLayout {
    pub const ALL: [ViewLayout; 4] = [
        ViewLayout::Speaker,
        ViewLayout::Grid3x3,
        ViewLayout::Grid4x4,
        ViewLayout::Grid5x5,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            ViewLayout::Speaker => "speaker",
            ViewLayout::Grid3x3 => "3x3",
            ViewLayout::Grid4x4 => "4x4",
            ViewLayout::Grid5x5 => "5x5",
        }
    }

    /// Number of pictures shown at once.
    pub const fn tiles(self) -> u32 {
        match self {
            ViewLayout::Speaker => 6,
            ViewLayout::Grid3x3 => 9,
            ViewLayout::Grid4x4 => 16,
            ViewLayout::Grid5x5 => 25,
        }
    }

    /// Size of one picture in pixels. `large`: the speaker's picture, if the layout has one.
    pub const fn tile_size(self, large: bool) -> (u32, u32) {
        match self {
            ViewLayout::Speaker if large => (1280, 720),
            ViewLayout::Grid3x3 => (640, 360),
            ViewLayout::Speaker | ViewLayout::Grid4x4 | ViewLayout::Grid5x5 => (320, 180),
        }
    }
}

/// How the packets of a video frame are spread in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pacing {
    /// Spread, as by libwebrtc's pacer.
    Paced,
    /// All at once.
    Burst,
}

impl Pacing {
    pub const fn name(self) -> &'static str {
        match self {
            Pacing::Paced => "paced",
            Pacing::Burst => "burst",
        }
    }
}

/// Order in which participants of a room speak: one after the other, with order and start chosen by
/// a seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpeakerTurns {
    speakers: u32,
    first: u32,
    /// Step from one speaker to the next. It has no factor in common with their number, so that
    /// everybody gets a turn.
    stride: u32,
}

impl SpeakerTurns {
    /// Length of a turn: two or three sentences.
    pub const TURN: Duration = Duration::from_secs(3);
    /// Silence at the end of each turn. It is long enough for an SFU to notice: LiveKit checks
    /// every 400 ms.
    pub const PAUSE: Duration = Duration::from_millis(500);

    /// The turns of room `room`, with this number of speakers.
    pub fn new(seed: u64, room: u32, speakers: u32) -> SpeakerTurns {
        let speakers = speakers.max(1);
        let drawn = mixed(seed, room);
        let stride = (1..=speakers)
            .map(|add| ((drawn >> 32) as u32 % speakers + add) % speakers)
            .find(|stride| greatest_common_divisor(*stride, speakers) == 1);
        SpeakerTurns {
            speakers,
            first: drawn as u32 % speakers,
            stride: stride.unwrap_or(1),
        }
    }

    /// Share of time for which one of this number of speakers speaks.
    fn share(speakers: u32) -> f64 {
        (1.0 - Self::PAUSE.as_secs_f64() / Self::TURN.as_secs_f64()) / f64::from(speakers.max(1))
    }

    /// Place in the room of the participant that speaks at `time` of the run.
    pub fn speaker_at(&self, time: Time) -> Option<u32> {
        let (turn, pause, nanos) = (
            Self::TURN.as_nanos() as u64,
            Self::PAUSE.as_nanos() as u64,
            time.as_nanos(),
        );
        let speaker = (u64::from(self.first) + nanos / turn * u64::from(self.stride))
            % u64::from(self.speakers);
        (nanos % turn < turn - pause).then_some(speaker as u32)
    }
}

fn greatest_common_divisor(a: u32, b: u32) -> u32 {
    if b == 0 {
        a
    } else {
        greatest_common_divisor(b, a % b)
    }
}

/// One participant of the plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParticipantPlan {
    /// Index among the participants of all hosts, over all rooms. Identity and frames are derived
    /// from it.
    pub index: u32,
    /// Place in this host's joining order, over all rooms. The same as `index` if one host runs
    /// all.
    pub position: u32,
    /// Index of the room, from 0; its name is [`Plan::room_name`].
    pub room: u32,
    /// Place in joining order within its room. Publishers of audio are the first, so this is also
    /// their number.
    pub place: u32,
    pub identity: String,
    /// Index of its group.
    pub group: usize,
    pub publishes_audio: bool,
    pub publishes_video: bool,
    pub subscribes: bool,
    /// Transport of its media.
    pub transport: TransportChoice,
    /// Intended start of the join, counted from the start of joining. It does not depend on what
    /// the generator manages.
    pub join_offset: Duration,
    pub seed: u64,
}

/// A participant as every host knows it, whichever host runs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    pub room: u32,
    /// Index of its group.
    pub group: usize,
    pub publishes_audio: bool,
    pub publishes_video: bool,
    /// The host that runs it if that is another one, as an index among the hosts.
    pub elsewhere: Option<usize>,
}

impl ParticipantPlan {
    pub const fn publishes(&self, kind: Kind) -> bool {
        match kind {
            Kind::Audio => self.publishes_audio,
            Kind::Video => self.publishes_video,
        }
    }

    /// Most UDP sockets that this participant needs: one per peer connection.
    pub const fn sockets(&self, connection: ConnectionMode) -> u64 {
        match connection {
            ConnectionMode::Single => 1,
            ConnectionMode::Auto | ConnectionMode::Dual => {
                (self.publishes_audio || self.publishes_video) as u64 + self.subscribes as u64
            }
        }
    }
}

/// Predicted media per second on the wire. IP, UDP and SRTP are included, retransmissions and RTCP
/// are not.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MediaLoad {
    pub packets_sent_per_second: f64,
    pub packets_received_per_second: f64,
    pub bits_sent_per_second: f64,
    pub bits_received_per_second: f64,
}

/// Rough estimate of the generator's needs. It comes from measurements on one host, so it is good
/// only for a warning.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    pub memory_bytes: u64,
    /// Cores kept busy by joining or by steady media, whichever needs more.
    pub cores: f64,
}

/// Resources of the host that the run uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Engine threads.
    pub threads: usize,
    /// Media threads of the embedded SFU; 0 without it.
    pub sfu_routers: usize,
    /// CPUs that the process may use, affinity and quota considered.
    pub cpus: usize,
    /// UDP sockets.
    pub sockets: u64,
    /// File descriptors in all.
    pub files: u64,
}

impl Resources {
    /// Number of signalling threads. One thread serves some thousand WebSockets; more are used if
    /// cores allow.
    pub fn signalling_threads(&self) -> usize {
        (self.cpus / 4).clamp(1, 4)
    }
}

impl AudioSpec {
    /// Codec in which tracks are published.
    pub fn codec(&self) -> Codec {
        if self.redundancy > 0 {
            Codec::Red
        } else {
            Codec::Opus
        }
    }

    /// Bitrate of the RTP payload, repeated packets included.
    fn sent_bitrate(&self) -> Bitrate {
        Bitrate::from_bps(self.bitrate.bps() * (1 + u64::from(self.redundancy)))
    }

    pub fn packets_per_second(&self) -> f64 {
        1.0 / self.frame.as_secs_f64()
    }

    /// Packets and wire bits per second of a silent participant. With DTX these are its refreshes,
    /// otherwise packets that hold little but the frame's identity.
    fn silence_rates(&self) -> (f64, f64) {
        let (packets, bytes) = if self.dtx {
            (DTX_PACKETS_PER_SECOND, 2.0)
        } else {
            (self.packets_per_second(), SILENCE_PACKET_BYTES)
        };
        let copies = 1.0 + f64::from(self.redundancy);
        (
            packets,
            packets * (copies * bytes + WIRE_OVERHEAD_BYTES) * 8.0,
        )
    }
}

impl VideoSpec {
    pub fn codec(&self) -> Codec {
        Codec::Vp8
    }

    /// Mean packets a second. Every frame starts in a packet of its own.
    pub fn packets_per_second(&self) -> f64 {
        let frames = f64::from(self.frames_per_second);
        let frame_bytes = self.bitrate.bps() as f64 / 8.0 / frames;
        frames * (frame_bytes / PAYLOAD_BYTES_MAX as f64).ceil().max(1.0)
    }
}

/// The ladder that lk and LiveKit's clients publish, as bits and frames a second of 180p, 360p and
/// 720p.
const LADDER: [(u64, u32); 3] = [(150_000, 15), (600_000, 20), (2_000_000, 30)];

impl VideoSpec {
    fn rates(&self) -> (f64, f64) {
        with_overhead(self.packets_per_second(), self.bitrate)
    }

    /// Layers that are sent, the lowest first: three layers from 960 pixels on, two from 480, as in
    /// livekit-client.
    ///
    /// Each layer has half the width and height of the one above it, no more frames than its rung
    /// of the ladder, and that rung's share of the bits.
    pub fn layers(self, simulcast: bool) -> Vec<VideoSpec> {
        let count = match self.width.max(self.height) {
            _ if !simulcast => 1,
            960.. => 3,
            480.. => 2,
            _ => 1,
        };
        let (top_bps, _) = LADDER[count - 1];
        let layer = |index: usize| {
            let below = count - 1 - index;
            let halved = |side: u16| {
                if below == 0 {
                    side
                } else {
                    even(side >> below)
                }
            };
            let (bps, frames_per_second) = LADDER[index];
            VideoSpec {
                width: halved(self.width),
                height: halved(self.height),
                frames_per_second: if below == 0 {
                    self.frames_per_second
                } else {
                    self.frames_per_second.min(frames_per_second)
                },
                bitrate: if below == 0 {
                    self.bitrate
                } else {
                    Bitrate::from_bps(self.bitrate.bps() * bps / top_bps)
                },
            }
        };
        let large_enough = |spec: &VideoSpec| {
            u32::from(spec.width) >= MIN_SIZE.0 && u32::from(spec.height) >= MIN_SIZE.1
        };
        (0..count)
            .map(layer)
            .filter(|spec| *spec == self || large_enough(spec))
            .collect()
    }
}

/// Encoders take even sides.
const fn even(side: u16) -> u16 {
    side & !1
}

/// Layer for a picture of `size` pixels: the lowest that has at least 9/10 of its height, or the
/// highest of all. Of several layers with that height it is the highest. LiveKit chooses in the
/// same way.
pub fn layer_for(layers: &[VideoSpec], size: (u32, u32)) -> usize {
    let high_enough = |layer: &&VideoSpec| u32::from(layer.height) * 10 >= size.1 * 9;
    let Some(chosen) = layers.iter().find(high_enough).or(layers.last()) else {
        return 0;
    };
    let same_height = |layer: &VideoSpec| layer.height == chosen.height;
    layers.iter().rposition(same_height).unwrap_or(0)
}

impl Plan {
    /// A plan in which this host runs the whole scenario.
    pub fn new(scenario: Scenario, target: Target, run_tag: u32) -> Plan {
        Plan {
            connection: scenario.connection,
            connection_reason: None,
            scenario,
            target,
            part: None,
            run_tag,
        }
    }

    /// Replaces the plan by what a coordinator says: its scenario against this host's server.
    pub fn follow(&mut self, scenario: Scenario, run_tag: u32) {
        let target = self.target.clone();
        *self = Plan::new(scenario, target, run_tag);
        self.connection_reason =
            (self.connection != ConnectionMode::Auto).then(|| "the coordinator says so".to_owned());
    }

    /// Whether subscribers join and leave tier by tier, instead of all at once.
    pub fn has_tiers(&self) -> bool {
        self.scenario.has_tiers()
    }

    /// Sets the mode that [`ConnectionMode::Auto`] resolves to, and the reason.
    pub fn settle_connection(&mut self, connection: ConnectionMode, reason: impl Into<String>) {
        self.connection = connection;
        self.connection_reason = Some(reason.into());
    }

    /// Name of room `room` (index from 0). For one room it is the given name, for several `NAME-1`
    /// and so on. Without a given name it is derived from the run's tag.
    pub fn room_name(&self, room: u32) -> String {
        let rooms = &self.scenario.rooms;
        let name = rooms
            .name
            .clone()
            .unwrap_or_else(|| format!("throng-{:08x}", self.run_tag));
        if rooms.count == 1 {
            name
        } else {
            format!("{name}-{}", room + 1)
        }
    }

    /// Number of participants that this host runs, over all rooms.
    pub fn total_participants(&self) -> u32 {
        u32::try_from(self.headcount().iter().sum::<u64>()).unwrap_or(u32::MAX)
    }

    /// Number of participants with all publishers and this number of subscribers. They are the
    /// first ones in joining order.
    pub fn participants_with(&self, subscribers: Subscribers) -> u32 {
        let scenario = &self.scenario;
        let participants = match (subscribers, &self.part) {
            (Subscribers::Total(count), _) => {
                self.total_of(ParticipantGroup::is_publisher)
                    + u64::from(count).min(self.total_of(|group| !group.is_publisher()))
            }
            (Subscribers::PerRoom(count), part) => {
                let places =
                    u64::from(scenario.publishers()) + u64::from(count.min(scenario.subscribers()));
                let of_all_hosts = places * u64::from(scenario.rooms.count);
                part.as_ref()
                    .map_or(of_all_hosts, |part| part.before(of_all_hosts).into())
            }
        };
        u32::try_from(participants).unwrap_or(u32::MAX)
    }

    /// Participants that this host runs, in joining order.
    pub fn participants(&self) -> impl ExactSizeIterator<Item = ParticipantPlan> + '_ {
        (0..self.total_participants()).map(|position| self.participant(position))
    }

    /// Participant `position` in this host's joining order. Rooms take turns, and in each room
    /// publishers come before subscribers.
    pub fn participant(&self, position: u32) -> ParticipantPlan {
        let index = self
            .part
            .as_ref()
            .map_or(position, |part| part.index(position));
        let (room, place) = self.place(index);
        let group_index = self.scenario.group_index(place);
        let group = self.scenario.groups.get(group_index);
        let nth = u64::from(self.scenario.place_in_group(place))
            * u64::from(self.scenario.rooms.count)
            + u64::from(room);
        let does = |what: fn(&ParticipantGroup) -> bool| group.is_some_and(what);
        ParticipantPlan {
            index,
            position,
            room,
            place,
            identity: self.identity_of(index),
            group: group_index,
            publishes_audio: does(|group| group.publishes_audio),
            publishes_video: does(|group| group.publishes_video),
            subscribes: does(|group| group.subscribes),
            transport: group.map_or_else(TransportChoice::default, |group| group.transport.at(nth)),
            join_offset: Duration::from_secs_f64(
                f64::from(position) / self.scenario.joins_per_second,
            ),
            seed: mixed(self.scenario.seed, index),
        }
    }

    /// Participants of all hosts, by global index.
    pub fn everybody(&self) -> impl Iterator<Item = Member> + '_ {
        (0..self.everybody_count()).map(|index| {
            let (room, place) = self.place(index);
            let group_index = self.scenario.group_index(place);
            let group = self.scenario.groups.get(group_index);
            Member {
                room,
                group: group_index,
                publishes_audio: group.is_some_and(|group| group.publishes_audio),
                publishes_video: group.is_some_and(|group| group.publishes_video),
                elsewhere: self
                    .part
                    .as_ref()
                    .and_then(|part| part.owner(index).filter(|owner| *owner != part.me())),
            }
        })
    }

    fn everybody_count(&self) -> u32 {
        u32::try_from(self.scenario.total()).unwrap_or(u32::MAX)
    }

    /// Whether nobody of this run publishes anything, so that it judges what others send.
    pub fn is_audience(&self) -> bool {
        [Kind::Audio, Kind::Video]
            .iter()
            .all(|kind| self.scenario.publishers_of(*kind) == 0)
    }

    /// Identity of the participant with this global index, on whichever host. `None` if the plan
    /// has no such index.
    pub fn identity_at(&self, index: u32) -> Option<String> {
        (index < self.everybody_count()).then(|| self.identity_of(index))
    }

    fn identity_of(&self, index: u32) -> String {
        self.identity(&index.to_string())
    }

    /// Number of participants of each group that this host runs, over all rooms.
    fn headcount(&self) -> Vec<u64> {
        if let Some(part) = &self.part {
            return part.headcount.to_vec();
        }
        let rooms = u64::from(self.scenario.rooms.count);
        let groups = self.scenario.groups.iter();
        groups.map(|group| u64::from(group.count) * rooms).collect()
    }

    /// Number of participants that this host runs in matching groups, over all rooms.
    fn total_of(&self, is_one: impl Fn(&ParticipantGroup) -> bool) -> u64 {
        let groups = self.scenario.groups.iter().zip(self.headcount());
        groups
            .filter(|(group, _)| is_one(group))
            .map(|(_, count)| count)
            .sum()
    }

    /// Whether an identity belongs to this run.
    pub fn is_ours(&self, identity: &str) -> bool {
        identity.starts_with(&self.identity_stem())
    }

    /// An identity of this run that ends in `end`.
    pub fn identity(&self, end: &str) -> String {
        format!("{}{end}", self.identity_stem())
    }

    fn identity_stem(&self) -> String {
        format!("{}-{:08x}-", self.scenario.identity_prefix, self.run_tag)
    }

    /// Intended start of the last join, counted from the first.
    pub fn joining(&self) -> Duration {
        Duration::from_secs_f64(
            f64::from(self.total_participants().saturating_sub(1)) / self.scenario.joins_per_second,
        )
    }

    /// Planned time for joining, settling and measuring, with a pause of `between` after each tier.
    /// `None` if it cannot be known.
    pub fn length(&self, between: Duration) -> Option<Duration> {
        let scenario = &self.scenario;
        if scenario.search.is_some() {
            return None;
        }
        if scenario.is_whole() {
            let times = scenario.times();
            return Some(self.joining() + times.warmup + times.hold);
        }
        let mut before = 0;
        let phases = scenario.phases.iter().map(|phase| {
            let subscribers = phase.subscribers.unwrap_or(scenario.subscribers());
            let participants = self.participants_with(Subscribers::PerRoom(subscribers));
            let moves = participants.abs_diff(std::mem::replace(&mut before, participants));
            let moving = phase.spread.unwrap_or(Duration::from_secs_f64(
                f64::from(moves) / scenario.joins_per_second,
            ));
            moving + phase.warmup + phase.hold + between
        });
        Some(phases.sum())
    }

    /// Room of a participant with this global index, and its place in that room.
    fn place(&self, index: u32) -> (u32, u32) {
        (
            index % self.scenario.rooms.count,
            index / self.scenario.rooms.count,
        )
    }

    /// Shard (of `shards`, at least 1) that participant `position` runs on. A room's participants
    /// are spread evenly, and so are its publishers.
    pub fn shard_of(&self, position: u32, shards: usize) -> usize {
        let (room, place) = match &self.part {
            Some(part) => (self.place(part.index(position)).0, part.rank(position)),
            None => self.place(position),
        };
        (place as usize + room as usize) % shards.max(1)
    }

    /// Positions of the participants of each shard, in joining order.
    pub fn split(&self, shards: usize) -> Vec<Vec<u32>> {
        let mut parts = vec![Vec::new(); shards.max(1)];
        for position in 0..self.total_participants() {
            parts[self.shard_of(position, shards)].push(position);
        }
        parts
    }

    /// Number of tracks that `participant` subscribes to: those of its room without its own. Zero
    /// for a participant that does not subscribe.
    fn subscribed_tracks(&self, participant: &ParticipantPlan, kind: Kind) -> u32 {
        if participant.subscribes {
            self.scenario.publishers_of(kind) - u32::from(participant.publishes(kind))
        } else {
            0
        }
    }

    /// Number of tracks that `participant` receives if all goes as planned: those that it
    /// subscribes to and that its layout has room for.
    pub fn planned_tracks(&self, participant: &ParticipantPlan, kind: Kind) -> u32 {
        self.seen(
            participant.group,
            kind,
            self.subscribed_tracks(participant, kind),
        )
    }

    /// Number of these tracks that the layout of a group has room for.
    pub fn seen(&self, group: usize, kind: Kind, tracks: u32) -> u32 {
        match (kind, self.scenario.media_at(group).layout) {
            (Kind::Video, Some(layout)) => tracks.min(layout.tiles()),
            _ => tracks,
        }
    }

    /// Number of tracks that `participant` subscribes to and whose publishers join before it. They
    /// should exist when it joins.
    pub fn tracks_ahead(&self, participant: &ParticipantPlan, kind: Kind) -> u32 {
        self.subscribed_tracks(participant, kind)
            .min(self.scenario.publishers_before(participant.place, kind))
    }

    /// Number of subscriptions of one kind that should go live, over all rooms.
    pub fn total_planned_tracks(&self, kind: Kind) -> u64 {
        self.audience(kind)
            .into_iter()
            .map(|(_, participants, tracks)| participants * u64::from(tracks))
            .sum()
    }

    /// For each group that watches, over all rooms: its index, its number of participants, and the
    /// number of tracks of one kind that each sees.
    fn audience(&self, kind: Kind) -> Vec<(usize, u64, u32)> {
        let tracks = self.scenario.publishers_of(kind);
        let groups = self
            .scenario
            .groups
            .iter()
            .zip(self.headcount())
            .enumerate();
        let those_who_watch = groups.filter(|(_, (group, _))| group.subscribes);
        those_who_watch
            .map(|(at, (group, count))| {
                let others = tracks - u32::from(group.publishes(kind) && count > 0);
                (at, count, self.seen(at, kind, others))
            })
            .collect()
    }

    /// Number of published tracks of one kind, over all rooms.
    pub fn total_published_tracks(&self, kind: Kind) -> u64 {
        self.total_of(|group| group.publishes(kind))
    }

    /// Most UDP sockets of all participants: one per peer connection.
    pub fn total_sockets(&self) -> u64 {
        let of_one = |group: &ParticipantGroup| match self.connection {
            ConnectionMode::Single => 1,
            ConnectionMode::Auto | ConnectionMode::Dual => {
                u64::from(group.is_publisher()) + u64::from(group.subscribes)
            }
        };
        let groups = self.scenario.groups.iter().zip(self.headcount());
        groups.map(|(group, count)| count * of_one(group)).sum()
    }

    pub fn load(&self) -> MediaLoad {
        let mut load = MediaLoad::default();
        for kind in [Kind::Audio, Kind::Video] {
            let groups = self.scenario.groups.iter().zip(self.headcount());
            for (group, count) in groups.filter(|(group, _)| group.publishes(kind)) {
                for (packets, bits) in self.published_rates(self.scenario.media_of(group), kind) {
                    load.packets_sent_per_second += count as f64 * packets;
                    load.bits_sent_per_second += count as f64 * bits;
                }
            }
            for (group, participants, tracks) in self.audience(kind) {
                let (packets, bits) = self.received_rates(group, kind, tracks);
                load.packets_received_per_second += participants as f64 * packets;
                load.bits_received_per_second += participants as f64 * bits;
            }
        }
        load
    }

    /// The media of the first group that publishes this kind, or of the run.
    pub fn media_of(&self, kind: Kind) -> &MediaSpec {
        let mut groups = self.scenario.groups.iter();
        let first = groups.find(|group| group.publishes(kind));
        first.map_or(&self.scenario.media, |group| self.scenario.media_of(group))
    }

    /// The media, and the view, of the first group that subscribes, or of the run.
    pub fn viewers(&self) -> &MediaSpec {
        let mut groups = self.scenario.groups.iter();
        let first = groups.find(|group| group.subscribes);
        first.map_or(&self.scenario.media, |group| self.scenario.media_of(group))
    }

    /// The layout in which the first subscribers watch.
    pub fn layout(&self) -> Option<ViewLayout> {
        self.viewers().layout
    }

    /// Packets and wire bits per second of all tracks of a room that are received whole, in their
    /// highest layer.
    pub fn room_rates(&self, kind: Kind) -> (f64, f64) {
        let groups = self.scenario.groups.iter();
        let publishers = groups.filter(|group| group.publishes(kind));
        publishers.fold((0.0, 0.0), |sum, group| {
            let rates = self.track_rates(self.scenario.media_of(group), kind);
            let count = f64::from(group.count);
            (sum.0 + count * rates.0, sum.1 + count * rates.1)
        })
    }

    /// Remarks on what of the clients is not imitated.
    pub fn client_notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        for group in &self.scenario.groups {
            let client = self.scenario.media_of(group).client;
            notes.extend(client.shortfalls(self.scenario.publishers_of(Kind::Video) > 0));
        }
        notes.sort();
        notes.dedup();
        notes
    }

    /// Packets and wire bits per second of one track that is received whole, in its highest layer.
    /// For a participant that does not always speak, this is the mean.
    pub fn track_rates(&self, media: &MediaSpec, kind: Kind) -> (f64, f64) {
        let speech = with_overhead(media.audio.packets_per_second(), media.audio.sent_bitrate());
        match kind {
            Kind::Audio if self.scenario.rooms.simulate_speakers => {
                let (share, silence) = (
                    SpeakerTurns::share(self.scenario.publishers_of(Kind::Audio)),
                    media.audio.silence_rates(),
                );
                let mean = |speech: f64, silence: f64| speech * share + silence * (1.0 - share);
                (mean(speech.0, silence.0), mean(speech.1, silence.1))
            }
            Kind::Audio => speech,
            Kind::Video => media.video.rates(),
        }
    }

    /// Packets and wire bits per second that one track sends, layer by layer.
    fn published_rates(&self, media: &MediaSpec, kind: Kind) -> Vec<(f64, f64)> {
        match kind {
            Kind::Audio => vec![self.track_rates(media, kind)],
            Kind::Video => media.video_layers().iter().map(VideoSpec::rates).collect(),
        }
    }

    /// Packets and wire bits per second of `tracks` tracks as one participant of a group sees them:
    /// those of the publishers that join first.
    fn received_rates(&self, group: usize, kind: Kind, tracks: u32) -> (f64, f64) {
        let layout = self.scenario.media_at(group).layout;
        let of_track = |media: &MediaSpec, index: u32| match (kind, layout) {
            (Kind::Video, Some(layout)) => {
                let layers = media.video_layers();
                layers[layer_for(&layers, layout.tile_size(index == 0))].rates()
            }
            _ => self.track_rates(media, kind),
        };
        let groups = self.scenario.groups.iter();
        let publishers = groups.filter(|group| group.publishes(kind));
        let mut index = 0;
        let mut sum = (0.0, 0.0);
        for group in publishers {
            let media = self.scenario.media_of(group);
            let count = group.count.min(tracks - index);
            // The first tile may be larger than the others, which are all the same.
            for (number, at) in [(1, index), (count.saturating_sub(1), index + 1)] {
                let number = f64::from(number.min(count));
                let rates = of_track(media, at);
                sum = (sum.0 + number * rates.0, sum.1 + number * rates.1);
            }
            index += count;
        }
        sum
    }

    pub fn estimate(&self) -> Estimate {
        let participants = u64::from(self.total_participants());
        let load = self.load();
        let packets = load.packets_sent_per_second + load.packets_received_per_second;
        let steady =
            packets * CPU_SECONDS_PER_PACKET + participants as f64 * CPU_SECONDS_PER_IDLE_SECOND;
        let joining =
            self.scenario.joins_per_second.min(participants as f64) * CPU_SECONDS_PER_JOIN;
        Estimate {
            memory_bytes: MEMORY_BASE_BYTES
                + self.total_sockets() * MEMORY_PER_CONNECTION_BYTES
                + participants * MEMORY_PER_SIGNAL_BYTES,
            cores: steady.max(joining),
        }
    }
}

fn with_overhead(packets_per_second: f64, bitrate: Bitrate) -> (f64, f64) {
    (
        packets_per_second,
        bitrate.bps() as f64 + packets_per_second * WIRE_OVERHEAD_BYTES * 8.0,
    )
}

/// A separate seed for every participant.
fn mixed(seed: u64, index: u32) -> u64 {
    scatter(seed.wrapping_add(u64::from(index).wrapping_mul(0x9E37_79B9_7F4A_7C15)))
}

/// Address of a LiveKit server, without user name, password or query. Nothing in it is secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerUrl {
    secure: bool,
    /// Host, and the port if one was given.
    authority: String,
    host: String,
    port: u16,
    /// Empty, or a path that starts with `/` and does not end with one.
    path: String,
}

impl ServerUrl {
    /// A server on this host.
    pub fn loopback(port: u16) -> ServerUrl {
        ServerUrl {
            secure: false,
            authority: format!("127.0.0.1:{port}"),
            host: "127.0.0.1".to_owned(),
            port,
            path: String::new(),
        }
    }

    /// URL for signalling: `ws://` or `wss://`, without a slash at the end.
    pub fn websocket(&self) -> String {
        format!(
            "{}://{}{}",
            if self.secure { "wss" } else { "ws" },
            self.authority,
            self.path
        )
    }

    /// URL for the room service: `http://` or `https://`, without a slash at the end.
    pub fn http(&self) -> String {
        format!(
            "{}://{}{}",
            if self.secure { "https" } else { "http" },
            self.authority,
            self.path
        )
    }

    /// Whether the scheme is `https` or `wss`.
    pub fn is_secure(&self) -> bool {
        self.secure
    }

    /// Host name or address, IPv6 without its brackets.
    pub fn host(&self) -> &str {
        self.host.trim_start_matches('[').trim_end_matches(']')
    }

    /// Port as given, or the default port of the scheme.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Whether the host is this host, by name or address. Names are not resolved.
    pub fn is_loopback(&self) -> bool {
        is_loopback_host(self.host())
    }
}

/// Whether `host` is this host, by name or address, IPv6 with or without its brackets.
pub fn is_loopback_host(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let by_name =
        host.eq_ignore_ascii_case("localhost") || host.to_ascii_lowercase().ends_with(".localhost");
    by_name
        || host
            .parse::<IpAddr>()
            .is_ok_and(|address| address.to_canonical().is_loopback())
}

impl fmt::Display for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.websocket())
    }
}

/// Why a text is not a server address. The message continues a sentence that starts with the text's
/// name. It never repeats the text, which may hold a password or a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnusableUrl {
    #[error("is no URL: write ws://HOST:PORT or wss://HOST")]
    Malformed,
    #[error("needs a scheme: ws://, wss://, http:// or https://")]
    Scheme,
    #[error("names no host")]
    NoHost,
    #[error(
        "holds a user name or password: give LiveKit's as --api-key and --api-secret, and the login of a gateway in front of it as --header 'Authorization: Basic ..' with --token-in query"
    )]
    Credentials,
    #[error("must end with the path: no query, no fragment")]
    BeyondPath,
    #[error("has no proper host and port")]
    Authority,
}

impl FromStr for ServerUrl {
    type Err = UnusableUrl;

    fn from_str(text: &str) -> Result<ServerUrl, UnusableUrl> {
        let uri: http::Uri = text.parse().map_err(|_| UnusableUrl::Malformed)?;
        let scheme = uri.scheme_str().map(str::to_ascii_lowercase);
        let secure = match scheme.as_deref() {
            Some("ws" | "http") => false,
            Some("wss" | "https") => true,
            _ => return Err(UnusableUrl::Scheme),
        };
        let authority = uri.authority().ok_or(UnusableUrl::NoHost)?;
        if authority.as_str().contains('@') {
            return Err(UnusableUrl::Credentials);
        }
        if uri.query().is_some() || text.contains('#') {
            return Err(UnusableUrl::BeyondPath);
        }
        if authority.host().is_empty()
            || authority.port().is_none() && authority.as_str() != authority.host()
        {
            return Err(UnusableUrl::Authority);
        }
        let path = prefix_of(uri.path()).to_owned();
        Ok(ServerUrl {
            secure,
            authority: authority.as_str().to_owned(),
            host: authority.host().to_owned(),
            port: authority
                .port_u16()
                .unwrap_or(if secure { 443 } else { 80 }),
            path,
        })
    }
}

/// Returns the path of a server before those that it serves itself. Some users give the whole
/// address of the signalling endpoint, or of the room service.
fn prefix_of(path: &str) -> &str {
    const OF_SERVERS: [&str; 6] = [
        "/rtc/v1/validate",
        "/rtc/v1",
        "/rtc/validate",
        "/rtc",
        "/twirp/livekit.RoomService",
        "/twirp",
    ];
    let path = path.trim_end_matches('/');
    let prefix = OF_SERVERS
        .iter()
        .find_map(|served| path.strip_suffix(served));
    prefix.unwrap_or(path).trim_end_matches('/')
}

#[cfg(test)]
pub(crate) mod tests {
    use super::scenario::{PhaseTimes, RoomPeople, RoomSet};
    use super::*;

    const HIGH: VideoSpec = VideoSpec {
        width: 1280,
        height: 720,
        frames_per_second: 30,
        bitrate: Bitrate::from_bps(2_000_000),
    };

    /// Two rooms of three audio and two video publishers and four subscribers.
    pub(crate) fn plan() -> Plan {
        let people = RoomPeople {
            audio_publishers: 3,
            video_publishers: 2,
            subscribers: 4,
            meeting: false,
        };
        let mut scenario = Scenario {
            seed: 7,
            connection: ConnectionMode::Dual,
            rooms: RoomSet {
                name: None,
                count: 2,
                ..RoomSet::default()
            },
            ..Scenario::of_people(people)
        };
        scenario.media.simulcast = false;
        let scenario = scenario.single(PhaseTimes {
            hold: Duration::from_secs(15),
            ..PhaseTimes::default()
        });
        let target = Target {
            url: "ws://127.0.0.1:7880".parse().unwrap(),
            origin: TargetOrigin::Flag,
        };
        Plan::new(scenario, target, 0xC0FF_EE01)
    }

    /// Replaces the participants of its rooms.
    pub(crate) fn set_people(plan: &mut Plan, rooms: u32, people: RoomPeople) {
        plan.scenario.rooms.count = rooms;
        plan.scenario.set_people(people);
    }

    fn people(audio_publishers: u32, video_publishers: u32, subscribers: u32) -> RoomPeople {
        RoomPeople {
            audio_publishers,
            video_publishers,
            subscribers,
            meeting: false,
        }
    }

    #[test]
    fn rooms_take_turns_and_publishers_join_before_their_subscribers() {
        let plan = plan();
        let all: Vec<_> = plan.participants().collect();
        assert_eq!(all.len(), 14);
        assert!(
            all.iter()
                .enumerate()
                .all(|(at, p)| p.index as usize == at && p.room as usize == at % 2)
        );
        let roles: Vec<_> = all
            .iter()
            .filter(|p| p.room == 1)
            .map(|p| (p.publishes_audio, p.publishes_video, p.subscribes))
            .collect();
        let both = (true, true, false);
        let listener = (false, false, true);
        assert_eq!(
            roles,
            [
                both,
                both,
                (true, false, false),
                listener,
                listener,
                listener,
                listener
            ]
        );
        assert_eq!(all[5].join_offset, Duration::from_millis(100));
        assert_eq!(plan.joining(), Duration::from_millis(260));
    }

    #[test]
    fn audio_and_video_publishers_are_the_same_people_as_in_lk() {
        let mut plan = plan();
        set_people(&mut plan, 1, people(10, 5, 90));
        assert_eq!(plan.total_participants(), 100);
        set_people(&mut plan, 1, people(0, 5, 90));
        assert_eq!(plan.total_participants(), 95);
    }

    #[test]
    fn totals_agree_with_the_sum_over_participants() {
        for (meeting, layout) in [
            (false, None),
            (true, None),
            (false, Some(ViewLayout::Speaker)),
            (true, Some(ViewLayout::Speaker)),
        ] {
            for (audio, video, subscribers, rooms) in [
                (3, 2, 4, 2),
                (0, 2, 4, 3),
                (5, 0, 0, 1),
                (1, 1, 0, 4),
                (2, 8, 1, 5),
            ] {
                let mut plan = plan();
                plan.scenario.media.layout = layout;
                let people = RoomPeople {
                    meeting,
                    ..people(audio, video, subscribers)
                };
                set_people(&mut plan, rooms, people);
                for kind in [Kind::Audio, Kind::Video] {
                    let expected: u64 = plan
                        .participants()
                        .map(|p| u64::from(plan.planned_tracks(&p, kind)))
                        .sum();
                    assert_eq!(plan.total_planned_tracks(kind), expected);
                    assert_eq!(
                        plan.total_published_tracks(kind),
                        plan.participants().filter(|p| p.publishes(kind)).count() as u64
                    );
                }
                let sockets: u64 = plan
                    .participants()
                    .map(|p| p.sockets(plan.connection))
                    .sum();
                assert_eq!(plan.total_sockets(), sockets);
            }
        }
    }

    #[test]
    fn every_identity_and_seed_is_unique_and_the_same_again() {
        let plan = plan();
        let once: Vec<_> = plan.participants().collect();
        assert_eq!(once, plan.participants().collect::<Vec<_>>());
        let mut identities: Vec<_> = once.iter().map(|p| &p.identity).collect();
        let mut seeds: Vec<_> = once.iter().map(|p| p.seed).collect();
        identities.sort();
        identities.dedup();
        seeds.sort_unstable();
        seeds.dedup();
        assert_eq!((identities.len(), seeds.len()), (once.len(), once.len()));
        assert_eq!(once[3].identity, "throng-c0ffee01-3");
    }

    #[test]
    fn rooms_are_named_as_asked_or_after_the_run() {
        let mut plan = plan();
        assert_eq!(plan.room_name(1), "throng-c0ffee01-2");
        plan.scenario.rooms.name = Some("hall".into());
        assert_eq!(plan.room_name(0), "hall-1");
        plan.scenario.rooms.count = 1;
        assert_eq!(plan.room_name(0), "hall");
    }

    #[test]
    fn shards_share_every_room_and_the_whole_evenly() {
        let mut plan = plan();
        set_people(&mut plan, 5, people(3, 3, 8));
        let parts = plan.split(3);
        assert_eq!(parts.iter().map(Vec::len).sum::<usize>(), 55);
        for part in &parts {
            assert!((17..=20).contains(&part.len()), "{}", part.len());
            let mut in_room = [0; 5];
            part.iter()
                .for_each(|index| in_room[plan.participant(*index).room as usize] += 1);
            assert!(in_room.iter().all(|n| (3..=4).contains(n)), "{in_room:?}");
            assert_eq!(
                part.iter()
                    .filter(|index| plan.participant(**index).publishes_video)
                    .count(),
                5
            );
        }
        set_people(&mut plan, 9, people(1, 0, 0));
        assert!(plan.split(3).iter().all(|part| part.len() == 3));
    }

    #[test]
    fn the_predicted_load_is_rates_times_tracks() {
        let plan = plan();
        let load = plan.load();
        // 2,000,000 / 8 / 30 = 8,334 bytes a frame: 8 packets.
        assert!((plan.scenario.media.video.packets_per_second() - 240.0).abs() < 1e-9);
        assert!((load.packets_sent_per_second - (6.0 * 50.0 + 4.0 * 240.0)).abs() < 1e-6);
        assert!((load.packets_received_per_second - (24.0 * 50.0 + 16.0 * 240.0)).abs() < 1e-6);
        assert!(load.bits_received_per_second > 24.0 * 24e3 + 16.0 * 2e6);
    }

    #[test]
    fn layers_are_those_of_livekit_s_clients() {
        let layers = |width, height, fps, bps, simulcast| -> Vec<_> {
            let spec = VideoSpec {
                width,
                height,
                frames_per_second: fps,
                bitrate: Bitrate::from_bps(bps),
            };
            let layers = spec.layers(simulcast).into_iter();
            layers
                .map(|layer| {
                    (
                        layer.width,
                        layer.height,
                        layer.frames_per_second,
                        layer.bitrate.bps(),
                    )
                })
                .collect()
        };
        assert_eq!(
            layers(1280, 720, 30, 2_000_000, true),
            [
                (320, 180, 15, 150_000),
                (640, 360, 20, 600_000),
                (1280, 720, 30, 2_000_000)
            ]
        );
        assert_eq!(
            layers(640, 360, 20, 600_000, true),
            [(320, 180, 15, 150_000), (640, 360, 20, 600_000)]
        );
        assert_eq!(
            layers(320, 180, 15, 150_000, true),
            [(320, 180, 15, 150_000)]
        );
        assert_eq!(
            layers(1280, 720, 30, 2_000_000, false),
            [(1280, 720, 30, 2_000_000)]
        );
        // Half the bits, a slow camera, odd sides. Portrait video counts by its longer side.
        assert_eq!(
            layers(541, 961, 10, 1_000_000, true),
            [
                (134, 240, 10, 75_000),
                (270, 480, 10, 300_000),
                (541, 961, 10, 1_000_000)
            ]
        );
        // A quarter of 150 lines has no room for the frame counter. The requested layer itself is
        // never left out.
        assert_eq!(layers(1000, 150, 30, 1_000_000, true).len(), 2);
        assert_eq!(
            layers(32, 32, 30, 1_000_000, true),
            [(32, 32, 30, 1_000_000)]
        );
    }

    #[test]
    fn a_picture_asks_for_the_lowest_layer_that_is_large_enough() {
        let layers = HIGH.layers(true);
        for (height, layer) in [
            (1, 0),
            (180, 0),
            (200, 0),
            (201, 1),
            (360, 1),
            (720, 2),
            (2160, 2),
        ] {
            assert_eq!(
                layer_for(&layers, (height * 16 / 9, height)),
                layer,
                "{height}"
            );
        }
    }

    #[test]
    fn of_layers_with_one_height_the_highest_is_chosen() {
        let layer = |height, bps| VideoSpec {
            width: height * 16 / 9,
            height,
            bitrate: Bitrate::from_bps(bps),
            ..HIGH
        };
        let layers = [
            layer(360, 450_000),
            layer(360, 800_000),
            layer(720, 2_000_000),
        ];
        let chosen = [180, 360, 720].map(|height| layer_for(&layers, (height * 16 / 9, height)));
        assert_eq!(chosen, [1, 1, 2]);
        assert_eq!(layer_for(&[], (640, 360)), 0);
    }

    #[test]
    fn a_layout_lessens_what_is_received_and_simulcast_adds_to_what_is_sent() {
        let mut plan = plan();
        let plain = plan.load();
        plan.scenario.media.simulcast = true;
        // 240 packets a second of 720p, 80 of 360p, 30 of 180p; 4 video tracks.
        let sent = plan.load().packets_sent_per_second - plain.packets_sent_per_second;
        assert!((sent - 4.0 * 110.0).abs() < 1e-6, "{sent}");
        assert_eq!(
            plan.load().packets_received_per_second,
            plain.packets_received_per_second
        );
        plan.scenario.media.layout = Some(ViewLayout::Speaker);
        // Eight subscribers see two tracks each: the second one is small.
        let saved = plain.packets_received_per_second - plan.load().packets_received_per_second;
        assert!((saved - 8.0 * (240.0 - 30.0)).abs() < 1e-6, "{saved}");
    }

    #[test]
    fn those_who_are_silent_send_little() {
        let mut plan = plan();
        set_people(&mut plan, 1, people(10, 0, 0));
        assert_eq!(plan.load().packets_sent_per_second, 500.0);
        plan.scenario.rooms.simulate_speakers = true;
        assert!(
            (plan.load().packets_sent_per_second - 500.0).abs() < 1e-6,
            "silence is sent"
        );
        plan.scenario.media.audio.dtx = true;
        let (speech, silence) = (50.0 * 5.0 / 6.0, 2.5 * (10.0 - 5.0 / 6.0));
        assert!((plan.load().packets_sent_per_second - speech - silence).abs() < 1e-6);
    }

    #[test]
    fn everybody_s_turn_to_speak_comes_and_nobody_s_twice_in_a_row() {
        for (room, speakers) in [(0, 1), (0, 2), (1, 6), (2, 7), (3, 150)] {
            let turns = SpeakerTurns::new(7, room, speakers);
            let at = |turn: u32| turns.speaker_at(Time::ZERO + SpeakerTurns::TURN * turn);
            let mut round: Vec<u32> = (0..speakers).filter_map(at).collect();
            assert!(round.windows(2).all(|pair| pair[0] != pair[1]));
            round.sort_unstable();
            assert_eq!(round, (0..speakers).collect::<Vec<_>>(), "{speakers}");
            let end = Time::ZERO + SpeakerTurns::TURN;
            assert_eq!(turns.speaker_at(end - SpeakerTurns::PAUSE), None);
            assert_eq!(
                turns.speaker_at(end - SpeakerTurns::PAUSE - Duration::from_millis(1)),
                at(0)
            );
        }
        assert!((0..50).any(|room| SpeakerTurns::new(7, room, 9) != SpeakerTurns::new(8, room, 9)));
    }

    #[test]
    fn urls_of_servers_are_read_and_refused() {
        let url: ServerUrl = "https://sfu.example.com/base/".parse().unwrap();
        assert_eq!(
            (url.websocket(), url.http()),
            (
                "wss://sfu.example.com/base".into(),
                "https://sfu.example.com/base".into()
            )
        );
        for (text, base) in [
            ("WS://sfu:7880", "ws://sfu:7880"),
            ("WSS://sfu/", "wss://sfu"),
            ("Https://sfu/live", "wss://sfu/live"),
            ("ws://sfu/rtc", "ws://sfu"),
            ("ws://sfu/rtc/v1", "ws://sfu"),
            ("ws://sfu/rtc/v1/validate/", "ws://sfu"),
            ("ws://sfu/live/rtc/v1/", "ws://sfu/live"),
            ("ws://sfu/twirp", "ws://sfu"),
            ("http://sfu/live/twirp/livekit.RoomService", "ws://sfu/live"),
            ("ws://sfu/artc", "ws://sfu/artc"),
        ] {
            assert_eq!(text.parse::<ServerUrl>().unwrap().websocket(), base);
        }
        for (text, loopback) in [
            ("ws://127.0.0.1:7880", true),
            ("http://localhost:7880/", true),
            ("ws://[::1]:7880", true),
            ("ws://[::ffff:127.0.0.1]:7880", true),
            ("ws://sfu.localhost", true),
            ("ws://127.0.0.2:7880/rtc", true),
            ("wss://127.example.com", false),
            ("ws://10.0.0.1:7880", false),
        ] {
            assert_eq!(
                text.parse::<ServerUrl>().unwrap().is_loopback(),
                loopback,
                "{text}"
            );
        }
        for text in [
            "",
            "localhost:7880",
            "ftp://host",
            "ws://",
            "wss://a:hunter2@host",
            "wss://host?access_token=hunter2",
            "ws://host/#hunter2",
            "ws://h:99999",
            "ws://h:x",
        ] {
            let message = text.parse::<ServerUrl>().unwrap_err().to_string();
            assert!(!message.contains("hunter2"), "{message}");
        }
    }
}
