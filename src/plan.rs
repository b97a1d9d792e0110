//! What a run is going to do, as plain data: who joins which room when, what they send, and what
//! that adds up to.
//!
//! Everything here is a pure function of the [`Plan`]: no clock, no chance, no I/O. The same plan
//! enumerates the same participants on every host. Counts are those of one room, as the flags are;
//! [`Plan::total_participants`] and its kin multiply by the rooms. Where several hosts play the
//! plan, the [`Scenario`] is that of all of them together, and what is added up is this host's
//! [`Part`].

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

/// What the embedded SFU calls itself towards clients (`server_info.node_id`), so that nobody takes
/// its version for one of LiveKit's.
pub const EMBEDDED_NODE_ID: &str = "throng";

pub use part::{HostRole, Part, Placement, UndealtPlan, VANTAGES_MAX, VantagePlan, WEIGHT_MAX};
use scenario::{ParticipantGroup, Scenario};
pub use schedule::{Intent, Schedule, ScheduleBook, Span, Spans};
pub use transport::{MediaTransport, NoTransportMix, TransportChoice, TransportMix};

/// The most participants that one run takes; keeps every count and index within 32 bits, with room
/// for arithmetic.
pub const PARTICIPANTS_MAX: u64 = 1_000_000;

/// IPv4 and UDP headers, RTP header, header extensions, AEAD tag.
const WIRE_OVERHEAD_BYTES: f64 = 20.0 + 8.0 + 12.0 + 8.0 + 16.0;
/// libopus refreshes its comfort noise every 400 ms.
const DTX_PACKETS_PER_SECOND: f64 = 2.5;
/// Digital silence in 20 ms frames, with the identity.
const SILENCE_PACKET_BYTES: f64 = 30.0;
/// Cost of a packet on the engine, kernel included, at a 1 ms tick: 2.3 us measured, rounded up.
const CPU_SECONDS_PER_PACKET: f64 = 3e-6;
/// Cost of a connected participant that moves no media.
const CPU_SECONDS_PER_IDLE_SECOND: f64 = 4e-6;
/// Cost of one join: WebSocket, ICE, DTLS.
const CPU_SECONDS_PER_JOIN: f64 = 1.6e-3;
/// The shared media, histograms and the process itself.
const MEMORY_BASE_BYTES: u64 = 96 << 20;
/// ICE, DTLS, SRTP and RTP state of a peer connection with its kernel socket.
const MEMORY_PER_CONNECTION_BYTES: u64 = 32 << 10;
/// A signalling task with its WebSocket and TLS buffers.
const MEMORY_PER_SIGNAL_BYTES: u64 = 96 << 10;

/// What this host does in a run: the [`Scenario`] and what tells this run, this host and its server
/// from others. Everybody who takes part, and when, follows from it. Secrets are not part of it.
#[derive(Clone, Debug)]
pub struct Plan {
    pub scenario: Scenario,
    pub target: Target,
    /// As the scenario has it, until the server has been asked.
    pub connection: ConnectionMode,
    /// Why it is this one, where the server decided that.
    pub connection_reason: Option<String>,
    /// What this host plays of it; `None`: all.
    pub part: Option<Part>,
    /// Tells runs apart in identities and room names. Not derived from the seed: a repeated run
    /// must not evict the first one's participants.
    pub run_tag: u32,
}

/// The server under test.
#[derive(Clone, Debug)]
pub struct Target {
    pub url: ServerUrl,
    pub origin: TargetOrigin,
}

impl Target {
    /// The SFU that the run starts itself; its address is known when it listens.
    pub fn embedded(send: SendMode) -> Target {
        Target {
            url: ServerUrl::loopback(0),
            origin: TargetOrigin::Embedded(send),
        }
    }

    /// Each host of a run knows its own.
    pub fn of_hosts() -> Target {
        Target {
            url: ServerUrl::loopback(0),
            origin: TargetOrigin::Hosts,
        }
    }

    pub fn is_embedded(&self) -> bool {
        matches!(self.origin, TargetOrigin::Embedded(_))
    }

    /// Where it listens, unless only others know.
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

/// Where the target came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetOrigin {
    Flag,
    Environment,
    /// The whole run that this host takes part in.
    Coordinator,
    /// This one leads a run, and the hosts that take part are told elsewhere.
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

/// How many peer connections a participant that publishes and subscribes has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConnectionMode {
    /// One where the server can do that well, two where not: not known before it is asked.
    Auto,
    /// LiveKit's `/rtc/v1`: one for everything.
    Single,
    /// LiveKit's `/rtc`: one to publish, one to subscribe.
    Dual,
}

impl ConnectionMode {
    /// `single`, as the report names it.
    pub const fn name(self) -> &'static str {
        match self {
            ConnectionMode::Auto => "auto",
            ConnectionMode::Single => "single",
            ConnectionMode::Dual => "dual",
        }
    }
}

/// How many subscribers are in. They are the first ones in joining order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subscribers {
    /// So many in each room; where several hosts play the plan, of all hosts together.
    PerRoom(u32),
    /// So many over all rooms, of this host.
    Total(u32),
}

/// Opus as it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AudioSpec {
    pub bitrate: Bitrate,
    /// The time that one packet holds.
    #[serde(with = "duration_text")]
    pub frame: Duration,
    /// Discontinuous transmission: pauses are not sent.
    pub dtx: bool,
    /// Earlier packets that each packet repeats (RED); 0: plain Opus.
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

/// VP8 as it is sent: one layer, or the highest of several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VideoSpec {
    pub width: u16,
    pub height: u16,
    pub frames_per_second: u32,
    pub bitrate: Bitrate,
}

/// lk's `high`.
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

/// What a subscriber sees of a room, as in `lk`. Tracks beyond it are switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ViewLayout {
    /// One large picture of the one who speaks, and five small ones.
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

    /// Pictures that are seen at once.
    pub const fn tiles(self) -> u32 {
        match self {
            ViewLayout::Speaker => 6,
            ViewLayout::Grid3x3 => 9,
            ViewLayout::Grid4x4 => 16,
            ViewLayout::Grid5x5 => 25,
        }
    }

    /// Pixels of one picture; `large`: of the one who speaks, where the layout tells him apart.
    pub const fn tile_size(self, large: bool) -> (u32, u32) {
        match self {
            ViewLayout::Speaker if large => (1280, 720),
            ViewLayout::Grid3x3 => (640, 360),
            ViewLayout::Speaker | ViewLayout::Grid4x4 | ViewLayout::Grid5x5 => (320, 180),
        }
    }
}

/// When the packets of a video frame leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pacing {
    /// Spread, as libwebrtc's pacer does.
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

/// Whose turn it is to speak in a room: one after the other, in an order and from a place that a
/// seed chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpeakerTurns {
    speakers: u32,
    first: u32,
    /// From one speaker to the next; has no factor in common with their number, so that
    /// everybody's turn comes.
    stride: u32,
}

impl SpeakerTurns {
    /// How long one speaks: two or three sentences.
    pub const TURN: Duration = Duration::from_secs(3);
    /// At the end of each turn nobody speaks, for long enough that an SFU notices: LiveKit looks
    /// every 400 ms.
    pub const PAUSE: Duration = Duration::from_millis(500);

    /// The turns of room `room`, with that many speakers.
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

    /// The share of time in which one of that many speaks.
    fn share(speakers: u32) -> f64 {
        (1.0 - Self::PAUSE.as_secs_f64() / Self::TURN.as_secs_f64()) / f64::from(speakers.max(1))
    }

    /// The place in the room of the one who speaks at `time` of the run.
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
    /// Names it among the participants of all hosts, over all rooms: identity and frames are made
    /// of it.
    pub index: u32,
    /// Its place in this host's joining order, over all rooms. Where one host plays all, the same
    /// as `index`.
    pub position: u32,
    /// Index of the room, from 0; its name is [`Plan::room_name`].
    pub room: u32,
    /// In joining order within its room: publishers of audio are the first, so that this is also
    /// their number.
    pub place: u32,
    pub identity: String,
    pub publishes_audio: bool,
    pub publishes_video: bool,
    pub subscribes: bool,
    /// What its media is to be carried by.
    pub transport: TransportChoice,
    /// When the join is to start, counted from the start of joining: intended, whatever the
    /// generator manages.
    pub join_offset: Duration,
    pub seed: u64,
}

/// What every host knows of a participant, whoever plays it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    pub room: u32,
    pub publishes_audio: bool,
    pub publishes_video: bool,
    /// The host that plays it, where that is another one, by its place among the hosts.
    pub elsewhere: Option<usize>,
}

impl ParticipantPlan {
    pub const fn publishes(&self, kind: Kind) -> bool {
        match kind {
            Kind::Audio => self.publishes_audio,
            Kind::Video => self.publishes_video,
        }
    }

    /// UDP sockets that this participant needs at most: one per peer connection.
    pub const fn sockets(&self, connection: ConnectionMode) -> u64 {
        match connection {
            ConnectionMode::Single => 1,
            ConnectionMode::Auto | ConnectionMode::Dual => {
                (self.publishes_audio || self.publishes_video) as u64 + self.subscribes as u64
            }
        }
    }
}

/// Media per second, as predicted, on the wire (IP, UDP and SRTP included; retransmissions and RTCP
/// not).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MediaLoad {
    pub packets_sent_per_second: f64,
    pub packets_received_per_second: f64,
    pub bits_sent_per_second: f64,
    pub bits_received_per_second: f64,
}

/// What the generator will need, roughly; from measurements on one host, so good for a warning and
/// no more.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    pub memory_bytes: u64,
    /// Whole cores kept busy by the busier of joining and steady media.
    pub cores: f64,
}

/// What the run takes of the host.
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
    /// File descriptors, all in all.
    pub files: u64,
}

impl Resources {
    /// One thread serves some thousand WebSockets; a second one where cores allow.
    pub fn signalling_threads(&self) -> usize {
        (self.cpus / 4).clamp(1, 4)
    }
}

impl AudioSpec {
    /// As tracks are published.
    pub fn codec(&self) -> Codec {
        if self.redundancy > 0 {
            Codec::Red
        } else {
            Codec::Opus
        }
    }

    /// Bitrate of the RTP payload, with what is repeated.
    fn sent_bitrate(&self) -> Bitrate {
        Bitrate::from_bps(self.bitrate.bps() * (1 + u64::from(self.redundancy)))
    }

    pub fn packets_per_second(&self) -> f64 {
        1.0 / self.frame.as_secs_f64()
    }

    /// Packets and wire bits per second of one who says nothing: of DTX its refreshes, else packets
    /// that hold little but the frame's identity.
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

    /// Mean packets a second: every frame starts a packet of its own.
    pub fn packets_per_second(&self) -> f64 {
        let frames = f64::from(self.frames_per_second);
        let frame_bytes = self.bitrate.bps() as f64 / 8.0 / frames;
        frames * (frame_bytes / PAYLOAD_BYTES_MAX as f64).ceil().max(1.0)
    }
}

/// The ladder that lk and LiveKit's clients publish: 180p, 360p and 720p at so many bits and frames
/// a second.
const LADDER: [(u64, u32); 3] = [(150_000, 15), (600_000, 20), (2_000_000, 30)];

impl VideoSpec {
    fn rates(&self) -> (f64, f64) {
        with_overhead(self.packets_per_second(), self.bitrate)
    }

    /// What is sent of it, the lowest layer first: three layers from 960 pixels on, two from 480,
    /// as livekit-client has it.
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
            let even = |side: u16| {
                if below == 0 {
                    side
                } else {
                    (side >> below) & !1
                }
            };
            let (bps, frames_per_second) = LADDER[index];
            VideoSpec {
                width: even(self.width),
                height: even(self.height),
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

/// The layer that a picture of `size` pixels asks for: the lowest that is at least 9/10 as high, or
/// the highest of all. As LiveKit chooses.
pub fn layer_for(layers: &[VideoSpec], size: (u32, u32)) -> usize {
    let high_enough = |layer: &VideoSpec| u32::from(layer.height) * 10 >= size.1 * 9;
    layers
        .iter()
        .position(high_enough)
        .unwrap_or(layers.len().saturating_sub(1))
}

impl Plan {
    /// All of a scenario, by one host.
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

    /// Makes it what a coordinator says: its scenario against this host's server.
    pub fn follow(&mut self, scenario: Scenario, run_tag: u32) {
        let target = self.target.clone();
        *self = Plan::new(scenario, target, run_tag);
        self.connection_reason =
            (self.connection != ConnectionMode::Auto).then(|| "the coordinator says so".to_owned());
    }

    /// Whether subscribers come and go tier by tier, instead of all at once.
    pub fn has_tiers(&self) -> bool {
        self.scenario.has_tiers()
    }

    /// What [`ConnectionMode::Auto`] comes to, and why.
    pub fn settle_connection(&mut self, connection: ConnectionMode, reason: impl Into<String>) {
        self.connection = connection;
        self.connection_reason = Some(reason.into());
    }

    /// The name of room `room` (index from 0): the given name as it is for one room, `NAME-1`.. for
    /// several; made from the run's tag when none was given.
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

    /// Participants of all rooms, as far as this host plays them.
    pub fn total_participants(&self) -> u32 {
        u32::try_from(self.headcount().iter().sum::<u64>()).unwrap_or(u32::MAX)
    }

    /// How many participants are in: all publishers, and so many subscribers. They are the first
    /// ones in joining order.
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

    /// The participants that this host plays, in joining order.
    pub fn participants(&self) -> impl ExactSizeIterator<Item = ParticipantPlan> + '_ {
        (0..self.total_participants()).map(|position| self.participant(position))
    }

    /// Participant `position` in this host's joining order: rooms take turns, and in each room
    /// publishers come before subscribers.
    pub fn participant(&self, position: u32) -> ParticipantPlan {
        let index = self
            .part
            .as_ref()
            .map_or(position, |part| part.index(position));
        let (room, place) = self.place(index);
        let group = self.scenario.group_at(place);
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

    /// Everybody whom this host or another one plays, by global index.
    pub fn everybody(&self) -> impl Iterator<Item = Member> + '_ {
        (0..self.everybody_count()).map(|index| {
            let (room, place) = self.place(index);
            let group = self.scenario.group_at(place);
            Member {
                room,
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

    /// The identity of whoever has this global index, on whichever host; `None` where the plan has
    /// nobody of that index.
    pub fn identity_at(&self, index: u32) -> Option<String> {
        (index < self.everybody_count()).then(|| self.identity_of(index))
    }

    fn identity_of(&self, index: u32) -> String {
        self.identity(&index.to_string())
    }

    /// How many of each group this host plays, over all rooms.
    fn headcount(&self) -> Vec<u64> {
        if let Some(part) = &self.part {
            return part.headcount.to_vec();
        }
        let rooms = u64::from(self.scenario.rooms.count);
        let groups = self.scenario.groups.iter();
        groups.map(|group| u64::from(group.count) * rooms).collect()
    }

    /// Whom this host plays, of such groups, over all rooms.
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

    /// An identity of this run.
    pub fn identity(&self, end: &str) -> String {
        format!("{}{end}", self.identity_stem())
    }

    fn identity_stem(&self) -> String {
        format!("{}-{:08x}-", self.scenario.identity_prefix, self.run_tag)
    }

    /// When the last join is to start, counted from the first.
    pub fn joining(&self) -> Duration {
        Duration::from_secs_f64(
            f64::from(self.total_participants().saturating_sub(1)) / self.scenario.joins_per_second,
        )
    }

    /// How long joining, settling and measuring take if all goes as intended. After each tier there
    /// is a pause of `between`. `None` where nobody knows.
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

    /// Room of a participant, by its global index, and its place in that room.
    fn place(&self, index: u32) -> (u32, u32) {
        (
            index % self.scenario.rooms.count,
            index / self.scenario.rooms.count,
        )
    }

    /// The shard (of `shards`, at least 1) that participant `position` runs on. A room's
    /// participants, and its publishers among them, are spread evenly.
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

    /// Tracks that `participant` subscribes to: those of its room without its own; none for one who
    /// does not subscribe.
    fn subscribed_tracks(&self, participant: &ParticipantPlan, kind: Kind) -> u32 {
        if participant.subscribes {
            self.scenario.publishers_of(kind) - u32::from(participant.publishes(kind))
        } else {
            0
        }
    }

    /// Tracks that `participant` receives if all goes as planned: those that it subscribes to and
    /// that its layout has room for.
    pub fn planned_tracks(&self, participant: &ParticipantPlan, kind: Kind) -> u32 {
        self.seen(kind, self.subscribed_tracks(participant, kind))
    }

    /// How many of so many tracks a layout has room for.
    pub fn seen(&self, kind: Kind, tracks: u32) -> u32 {
        match (kind, self.scenario.media.layout) {
            (Kind::Video, Some(layout)) => tracks.min(layout.tiles()),
            _ => tracks,
        }
    }

    /// Tracks that `participant` subscribes to and whose publishers join before it: they should be
    /// there when it joins.
    pub fn tracks_ahead(&self, participant: &ParticipantPlan, kind: Kind) -> u32 {
        self.subscribed_tracks(participant, kind)
            .min(self.scenario.publishers_before(participant.place, kind))
    }

    /// Subscriptions of one kind that ought to go live, over all rooms.
    pub fn total_planned_tracks(&self, kind: Kind) -> u64 {
        self.audience(kind)
            .into_iter()
            .map(|(participants, tracks)| participants * u64::from(tracks))
            .sum()
    }

    /// Group by group, over all rooms: how many participants see how many tracks of one kind.
    fn audience(&self, kind: Kind) -> Vec<(u64, u32)> {
        let tracks = self.scenario.publishers_of(kind);
        let groups = self.scenario.groups.iter().zip(self.headcount());
        let those_who_watch = groups.filter(|(group, _)| group.subscribes);
        those_who_watch
            .map(|(group, count)| {
                let others = tracks - u32::from(group.publishes(kind) && count > 0);
                (count, self.seen(kind, others))
            })
            .collect()
    }

    /// Tracks of one kind that are published, over all rooms.
    pub fn total_published_tracks(&self, kind: Kind) -> u64 {
        self.total_of(|group| group.publishes(kind))
    }

    /// UDP sockets over all participants, at most: one per peer connection.
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
            let published = self.total_published_tracks(kind) as f64;
            for (packets, bits) in self.published_rates(kind) {
                load.packets_sent_per_second += published * packets;
                load.bits_sent_per_second += published * bits;
            }
            for (participants, tracks) in self.audience(kind) {
                let (packets, bits) = self.received_rates(kind, tracks);
                load.packets_received_per_second += participants as f64 * packets;
                load.bits_received_per_second += participants as f64 * bits;
            }
        }
        load
    }

    /// The layers of video tracks, the lowest first.
    pub fn video_layers(&self) -> Vec<VideoSpec> {
        self.scenario
            .media
            .video
            .layers(self.scenario.media.simulcast)
    }

    /// Packets and wire bits per second of one track where it is received whole: of its highest
    /// layer; of one who does not always speak, the mean.
    pub fn track_rates(&self, kind: Kind) -> (f64, f64) {
        let media = &self.scenario.media;
        let speech = with_overhead(media.audio.packets_per_second(), media.audio.sent_bitrate());
        match kind {
            Kind::Audio if media.simulate_speakers => {
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

    /// The same of everything that one track sends, layer by layer.
    fn published_rates(&self, kind: Kind) -> Vec<(f64, f64)> {
        match kind {
            Kind::Audio => vec![self.track_rates(kind)],
            Kind::Video => self.video_layers().iter().map(VideoSpec::rates).collect(),
        }
    }

    /// The same of so many tracks as one participant sees them.
    fn received_rates(&self, kind: Kind, tracks: u32) -> (f64, f64) {
        let layers = self.video_layers();
        let of_track = |index: u32| match (kind, self.scenario.media.layout) {
            (Kind::Video, Some(layout)) => {
                layers[layer_for(&layers, layout.tile_size(index == 0))].rates()
            }
            _ => self.track_rates(kind),
        };
        (0..tracks)
            .map(of_track)
            .fold((0.0, 0.0), |sum, rates| (sum.0 + rates.0, sum.1 + rates.1))
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

/// A seed of its own for every participant.
fn mixed(seed: u64, index: u32) -> u64 {
    scatter(seed.wrapping_add(u64::from(index).wrapping_mul(0x9E37_79B9_7F4A_7C15)))
}

/// The address of a LiveKit server, without user name, password or query: nothing in it is secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerUrl {
    secure: bool,
    /// Host and, where given, port.
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

    /// For signalling: `ws://` or `wss://`, with no slash at the end.
    pub fn websocket(&self) -> String {
        format!(
            "{}://{}{}",
            if self.secure { "wss" } else { "ws" },
            self.authority,
            self.path
        )
    }

    /// For the room service: `http://` or `https://`, with no slash at the end.
    pub fn http(&self) -> String {
        format!(
            "{}://{}{}",
            if self.secure { "https" } else { "http" },
            self.authority,
            self.path
        )
    }

    /// `https` and `wss`.
    pub fn is_secure(&self) -> bool {
        self.secure
    }

    /// A name or an address, IPv6 without its brackets.
    pub fn host(&self) -> &str {
        self.host.trim_start_matches('[').trim_end_matches(']')
    }

    /// As given, or the scheme's own.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// True for this very host by name or address. Names are not resolved.
    pub fn is_loopback(&self) -> bool {
        is_loopback_host(self.host())
    }
}

/// Whether this is this very host by name or address, IPv6 with or without its brackets.
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

/// Why a text is no address of a server, as it goes on from the text's name. It never repeats the
/// text: that may hold a password or a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnusableUrl {
    #[error("is no URL: write ws://HOST:PORT or wss://HOST")]
    Malformed,
    #[error("needs a scheme: ws://, wss://, http:// or https://")]
    Scheme,
    #[error("names no host")]
    NoHost,
    #[error("holds a user name or password: give --api-key and --api-secret instead")]
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
        let secure = match uri.scheme_str() {
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
        // Some write the whole address of the signalling endpoint.
        let path = uri
            .path()
            .trim_end_matches('/')
            .trim_end_matches("/rtc")
            .to_owned();
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

    /// Fills its rooms anew.
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
        // Half the bits, a slow camera, odd sides; portrait counts by its longer side.
        assert_eq!(
            layers(541, 961, 10, 1_000_000, true),
            [
                (134, 240, 10, 75_000),
                (270, 480, 10, 300_000),
                (541, 961, 10, 1_000_000)
            ]
        );
        // A quarter of 150 lines has no room for the frame counter. What is asked for is never left
        // out.
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
        plan.scenario.media.simulate_speakers = true;
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
