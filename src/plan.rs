//! What a run is going to do, as plain data: who joins which room when, what they send, and what that adds up to.
//!
//! Everything here is a pure function of the [`Plan`]: no clock, no chance, no I/O. The same plan enumerates the same participants on every host.
//! Counts are those of one room, as the flags are; [`Plan::total_participants`] and its kin multiply by the rooms.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use crate::measure::Kind;
use crate::media::packetize::PAYLOAD_BYTES_MAX;
use crate::seeded::scatter;
use crate::units::Bitrate;

/// The most participants that one run takes; keeps every count and index within 32 bits, with room for arithmetic.
pub const PARTICIPANTS_MAX: u64 = 1_000_000;

/// IPv4 and UDP headers, RTP header, header extensions, AEAD tag.
const WIRE_OVERHEAD_BYTES: f64 = 20.0 + 8.0 + 12.0 + 8.0 + 16.0;
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

/// One run, completely described. Secrets are not part of it.
#[derive(Clone, Debug)]
pub struct Plan {
    pub target: Target,
    pub connection: Connection,
    pub shape: Shape,
    pub audio: AudioSpec,
    pub video: VideoSpec,
    pub pacing: Pacing,
    /// Joins are started at this rate whatever becomes of earlier ones (open loop).
    pub joins_per_second: f64,
    /// From the end of joining to the end of measuring.
    pub duration: Duration,
    /// Everything that is random below the plan comes from here.
    pub seed: u64,
    /// Tells runs apart in identities and room names. Not derived from `seed`: a repeated run must not evict the first one's participants.
    pub run_tag: u32,
}

/// The server under test.
#[derive(Clone, Debug)]
pub struct Target {
    pub url: ServerUrl,
    pub origin: Origin,
}

/// Where the target came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    Flag,
    Environment,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Origin::Flag => "from --url",
            Origin::Environment => "from LIVEKIT_URL",
        })
    }
}

/// How many peer connections a participant that publishes and subscribes has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connection {
    /// One where the server can do that well, two where not: not known before it is asked.
    Auto,
    /// LiveKit's `/rtc/v1`: one for everything.
    Single,
    /// LiveKit's `/rtc`: one to publish, one to subscribe.
    Dual,
}

impl Connection {
    /// `single`, as the report names it.
    pub const fn name(self) -> &'static str {
        match self {
            Connection::Auto => "auto",
            Connection::Single => "single",
            Connection::Dual => "dual",
        }
    }
}

/// Who is in a room, and how many rooms there are.
#[derive(Clone, Debug)]
pub struct Shape {
    /// `None`: a name is made from the run's tag.
    pub room_name: Option<String>,
    pub room_count: u32,
    /// Publishers of audio per room.
    pub audio_publishers: u32,
    /// Publishers of video per room. They are the same people as far as the numbers allow.
    pub video_publishers: u32,
    /// Participants per room who only subscribe.
    pub subscribers: u32,
    /// Publishers subscribe to each other, too.
    pub meeting: bool,
    pub identity_prefix: String,
}

/// Opus as it is sent.
#[derive(Clone, Copy, Debug)]
pub struct AudioSpec {
    pub bitrate: Bitrate,
    /// The time that one packet holds.
    pub frame: Duration,
}

/// VP8 as it is sent: one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VideoSpec {
    pub width: u16,
    pub height: u16,
    pub frames_per_second: u32,
    pub bitrate: Bitrate,
}

/// When the packets of a video frame leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// One participant of the plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParticipantPlan {
    /// Position in joining order, over all rooms.
    pub index: u32,
    /// Index of the room, from 0; its name is [`Plan::room_name`].
    pub room: u32,
    pub identity: String,
    pub publishes_audio: bool,
    pub publishes_video: bool,
    pub subscribes: bool,
    /// When the join is to start, counted from the start of joining: intended, whatever the generator manages.
    pub join_offset: Duration,
    pub seed: u64,
}

impl ParticipantPlan {
    pub const fn publishes(&self, kind: Kind) -> bool {
        match kind {
            Kind::Audio => self.publishes_audio,
            Kind::Video => self.publishes_video,
        }
    }

    /// UDP sockets that this participant needs at most: one per peer connection.
    pub const fn sockets(&self, connection: Connection) -> u64 {
        match connection {
            Connection::Single => 1,
            Connection::Auto | Connection::Dual => (self.publishes_audio || self.publishes_video) as u64 + self.subscribes as u64,
        }
    }
}

/// Media per second, as predicted, on the wire (IP, UDP and SRTP included; retransmissions and RTCP not).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    pub packets_sent_per_second: f64,
    pub packets_received_per_second: f64,
    pub bits_sent_per_second: f64,
    pub bits_received_per_second: f64,
}

/// What the generator will need, roughly; from measurements on one host, so good for a warning and no more.
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
    /// CPUs that the process may use, affinity and quota considered.
    pub cpus: usize,
    /// UDP sockets.
    pub sockets: u64,
    /// File descriptors, all in all.
    pub files: u64,
}

impl AudioSpec {
    pub fn packets_per_second(&self) -> f64 {
        1.0 / self.frame.as_secs_f64()
    }
}

impl VideoSpec {
    /// Mean packets a second: every frame starts a packet of its own.
    pub fn packets_per_second(&self) -> f64 {
        let frames = f64::from(self.frames_per_second);
        let frame_bytes = self.bitrate.bps() as f64 / 8.0 / frames;
        frames * (frame_bytes / PAYLOAD_BYTES_MAX as f64).ceil().max(1.0)
    }
}

impl Shape {
    /// Publishers per room: audio and video publishers overlap.
    pub fn publishers(&self) -> u32 {
        self.audio_publishers.max(self.video_publishers)
    }

    pub fn publishers_of(&self, kind: Kind) -> u32 {
        match kind {
            Kind::Audio => self.audio_publishers,
            Kind::Video => self.video_publishers,
        }
    }

    /// Participants per room.
    pub fn participants(&self) -> u64 {
        u64::from(self.publishers()) + u64::from(self.subscribers)
    }

    fn total(&self) -> u64 {
        self.participants() * u64::from(self.room_count)
    }
}

impl Plan {
    /// The name of room `room` (index from 0): the given name as it is for one room, `NAME-1`.. for several; made from the run's tag when none was given.
    pub fn room_name(&self, room: u32) -> String {
        let name = self.shape.room_name.clone().unwrap_or_else(|| format!("throng-{:08x}", self.run_tag));
        if self.shape.room_count == 1 {
            name
        } else {
            format!("{name}-{}", room + 1)
        }
    }

    /// Participants of all rooms.
    pub fn total_participants(&self) -> u32 {
        u32::try_from(self.shape.total()).unwrap_or(u32::MAX)
    }

    /// All participants, in joining order.
    pub fn participants(&self) -> impl ExactSizeIterator<Item = ParticipantPlan> + '_ {
        (0..self.total_participants()).map(|index| self.participant(index))
    }

    /// Participant `index` in joining order: rooms take turns, and in each room publishers come before subscribers.
    pub fn participant(&self, index: u32) -> ParticipantPlan {
        let (room, place) = self.place(index);
        let is_publisher = place < self.shape.publishers();
        ParticipantPlan {
            index,
            room,
            identity: format!("{}{index}", self.identity_stem()),
            publishes_audio: place < self.shape.audio_publishers,
            publishes_video: place < self.shape.video_publishers,
            subscribes: !is_publisher || self.shape.meeting,
            join_offset: Duration::from_secs_f64(f64::from(index) / self.joins_per_second),
            seed: mixed(self.seed, index),
        }
    }

    /// Whether an identity belongs to this run.
    pub fn is_ours(&self, identity: &str) -> bool {
        identity.starts_with(&self.identity_stem())
    }

    fn identity_stem(&self) -> String {
        format!("{}-{:08x}-", self.shape.identity_prefix, self.run_tag)
    }

    /// When the last join is to start, counted from the first.
    pub fn joining(&self) -> Duration {
        Duration::from_secs_f64(f64::from(self.total_participants().saturating_sub(1)) / self.joins_per_second)
    }

    /// Room of a participant, and its place in that room.
    fn place(&self, index: u32) -> (u32, u32) {
        (index % self.shape.room_count, index / self.shape.room_count)
    }

    /// The shard (of `shards`, at least 1) that participant `index` runs on. A room's participants, and its publishers among them, are spread evenly.
    pub fn shard_of(&self, index: u32, shards: usize) -> usize {
        let (room, place) = self.place(index);
        (place as usize + room as usize) % shards.max(1)
    }

    /// Indices of the participants of each shard, in joining order.
    pub fn split(&self, shards: usize) -> Vec<Vec<u32>> {
        let mut parts = vec![Vec::new(); shards.max(1)];
        for index in 0..self.total_participants() {
            parts[self.shard_of(index, shards)].push(index);
        }
        parts
    }

    /// Tracks that `participant` ought to receive: those of its room without its own; none for one who does not subscribe.
    pub fn expected_tracks(&self, participant: &ParticipantPlan, kind: Kind) -> u32 {
        if !participant.subscribes {
            return 0;
        }
        self.shape.publishers_of(kind) - u32::from(participant.publishes(kind))
    }

    /// Of those, the tracks whose publishers come before `participant`: they ought to be there when it joins.
    pub fn tracks_ahead(&self, participant: &ParticipantPlan, kind: Kind) -> u32 {
        let (_, place) = self.place(participant.index);
        self.expected_tracks(participant, kind).min(place)
    }

    /// Subscriptions of one kind that ought to go live, over all rooms.
    pub fn total_expected_tracks(&self, kind: Kind) -> u64 {
        let shape = &self.shape;
        let tracks = u64::from(shape.publishers_of(kind));
        let among_publishers = if shape.meeting {
            u64::from(shape.publishers()) * tracks - tracks
        } else {
            0
        };
        u64::from(shape.room_count) * (u64::from(shape.subscribers) * tracks + among_publishers)
    }

    /// Tracks of one kind that are published, over all rooms.
    pub fn total_published_tracks(&self, kind: Kind) -> u64 {
        u64::from(self.shape.room_count) * u64::from(self.shape.publishers_of(kind))
    }

    /// UDP sockets over all participants, at most: one per peer connection.
    pub fn total_sockets(&self) -> u64 {
        let shape = &self.shape;
        let per_publisher = match self.connection {
            Connection::Single => 1,
            Connection::Auto | Connection::Dual => 1 + u64::from(shape.meeting),
        };
        u64::from(shape.room_count) * (u64::from(shape.publishers()) * per_publisher + u64::from(shape.subscribers))
    }

    pub fn load(&self) -> Load {
        let mut load = Load::default();
        for kind in [Kind::Audio, Kind::Video] {
            let (packets, bits) = self.track_rates(kind);
            let (published, subscribed) = (self.total_published_tracks(kind) as f64, self.total_expected_tracks(kind) as f64);
            load.packets_sent_per_second += published * packets;
            load.packets_received_per_second += subscribed * packets;
            load.bits_sent_per_second += published * bits;
            load.bits_received_per_second += subscribed * bits;
        }
        load
    }

    /// Packets and wire bits per second of one track.
    pub fn track_rates(&self, kind: Kind) -> (f64, f64) {
        let (packets, bitrate) = match kind {
            Kind::Audio => (self.audio.packets_per_second(), self.audio.bitrate),
            Kind::Video => (self.video.packets_per_second(), self.video.bitrate),
        };
        (packets, bitrate.bps() as f64 + packets * WIRE_OVERHEAD_BYTES * 8.0)
    }

    pub fn estimate(&self) -> Estimate {
        let participants = u64::from(self.total_participants());
        let load = self.load();
        let packets = load.packets_sent_per_second + load.packets_received_per_second;
        let steady = packets * CPU_SECONDS_PER_PACKET + participants as f64 * CPU_SECONDS_PER_IDLE_SECOND;
        let joining = self.joins_per_second.min(participants as f64) * CPU_SECONDS_PER_JOIN;
        Estimate {
            memory_bytes: MEMORY_BASE_BYTES + self.total_sockets() * MEMORY_PER_CONNECTION_BYTES + participants * MEMORY_PER_SIGNAL_BYTES,
            cores: steady.max(joining),
        }
    }
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
    /// For signalling: `ws://` or `wss://`, with no slash at the end.
    pub fn websocket(&self) -> String {
        format!("{}://{}{}", if self.secure { "wss" } else { "ws" }, self.authority, self.path)
    }

    /// For the room service: `http://` or `https://`, with no slash at the end.
    pub fn http(&self) -> String {
        format!("{}://{}{}", if self.secure { "https" } else { "http" }, self.authority, self.path)
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
        let host = self.host();
        let by_name = host.eq_ignore_ascii_case("localhost") || host.to_ascii_lowercase().ends_with(".localhost");
        by_name || host.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
    }
}

impl fmt::Display for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.websocket())
    }
}

impl FromStr for ServerUrl {
    type Err = String;

    /// Messages never repeat the text: it may hold a password or a token.
    fn from_str(text: &str) -> Result<ServerUrl, String> {
        let uri: http::Uri = text.parse().map_err(|_| "is no URL: write ws://HOST:PORT or wss://HOST".to_owned())?;
        let secure = match uri.scheme_str() {
            Some("ws" | "http") => false,
            Some("wss" | "https") => true,
            _ => return Err("needs a scheme: ws://, wss://, http:// or https://".to_owned()),
        };
        let authority = uri.authority().ok_or("names no host")?;
        if authority.as_str().contains('@') {
            return Err("holds a user name or password: give --api-key and --api-secret instead".to_owned());
        }
        if uri.query().is_some() || text.contains('#') {
            return Err("must end with the path: no query, no fragment".to_owned());
        }
        if authority.host().is_empty() || authority.port().is_none() && authority.as_str() != authority.host() {
            return Err("has no proper host and port".to_owned());
        }
        // Some write the whole address of the signalling endpoint.
        let path = uri.path().trim_end_matches('/').trim_end_matches("/rtc").to_owned();
        Ok(ServerUrl {
            secure,
            authority: authority.as_str().to_owned(),
            host: authority.host().to_owned(),
            port: authority.port_u16().unwrap_or(if secure { 443 } else { 80 }),
            path,
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Two rooms of three audio and two video publishers and four subscribers.
    pub(crate) fn plan() -> Plan {
        Plan {
            target: Target {
                url: "ws://127.0.0.1:7880".parse().unwrap(),
                origin: Origin::Flag,
            },
            connection: Connection::Dual,
            shape: Shape {
                room_name: None,
                room_count: 2,
                audio_publishers: 3,
                video_publishers: 2,
                subscribers: 4,
                meeting: false,
                identity_prefix: "throng".into(),
            },
            audio: AudioSpec {
                bitrate: Bitrate::from_bps(24_000),
                frame: Duration::from_millis(20),
            },
            video: VideoSpec {
                width: 1280,
                height: 720,
                frames_per_second: 30,
                bitrate: Bitrate::from_bps(2_000_000),
            },
            pacing: Pacing::Paced,
            joins_per_second: 50.0,
            duration: Duration::from_secs(15),
            seed: 7,
            run_tag: 0xC0FF_EE01,
        }
    }

    #[test]
    fn rooms_take_turns_and_publishers_join_before_their_subscribers() {
        let plan = plan();
        let all: Vec<_> = plan.participants().collect();
        assert_eq!(all.len(), 14);
        assert!(all.iter().enumerate().all(|(at, p)| p.index as usize == at && p.room as usize == at % 2));
        let roles: Vec<_> = all
            .iter()
            .filter(|p| p.room == 1)
            .map(|p| (p.publishes_audio, p.publishes_video, p.subscribes))
            .collect();
        let both = (true, true, false);
        let listener = (false, false, true);
        assert_eq!(roles, [both, both, (true, false, false), listener, listener, listener, listener]);
        assert_eq!(all[5].join_offset, Duration::from_millis(100));
        assert_eq!(plan.joining(), Duration::from_millis(260));
    }

    #[test]
    fn audio_and_video_publishers_are_the_same_people_as_in_lk() {
        let mut plan = plan();
        plan.shape = Shape {
            room_count: 1,
            audio_publishers: 10,
            video_publishers: 5,
            subscribers: 90,
            ..plan.shape
        };
        assert_eq!(plan.total_participants(), 100);
        plan.shape = Shape {
            audio_publishers: 0,
            video_publishers: 5,
            ..plan.shape
        };
        assert_eq!(plan.total_participants(), 95);
    }

    #[test]
    fn totals_agree_with_the_sum_over_participants() {
        for meeting in [false, true] {
            for (audio, video, subscribers, rooms) in [(3, 2, 4, 2), (0, 2, 4, 3), (5, 0, 0, 1), (1, 1, 0, 4), (2, 7, 1, 5)] {
                let mut plan = plan();
                plan.shape = Shape {
                    room_count: rooms,
                    audio_publishers: audio,
                    video_publishers: video,
                    subscribers,
                    meeting,
                    ..plan.shape
                };
                for kind in [Kind::Audio, Kind::Video] {
                    let expected: u64 = plan.participants().map(|p| u64::from(plan.expected_tracks(&p, kind))).sum();
                    assert_eq!(plan.total_expected_tracks(kind), expected);
                    assert_eq!(
                        plan.total_published_tracks(kind),
                        plan.participants().filter(|p| p.publishes(kind)).count() as u64
                    );
                }
                let sockets: u64 = plan.participants().map(|p| p.sockets(plan.connection)).sum();
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
        plan.shape.room_name = Some("hall".into());
        assert_eq!(plan.room_name(0), "hall-1");
        plan.shape.room_count = 1;
        assert_eq!(plan.room_name(0), "hall");
    }

    #[test]
    fn shards_share_every_room_and_the_whole_evenly() {
        let mut plan = plan();
        plan.shape = Shape {
            room_count: 5,
            audio_publishers: 3,
            video_publishers: 3,
            subscribers: 8,
            ..plan.shape
        };
        let parts = plan.split(3);
        assert_eq!(parts.iter().map(Vec::len).sum::<usize>(), 55);
        for part in &parts {
            assert!((17..=20).contains(&part.len()), "{}", part.len());
            let mut in_room = [0; 5];
            part.iter().for_each(|index| in_room[plan.participant(*index).room as usize] += 1);
            assert!(in_room.iter().all(|n| (3..=4).contains(n)), "{in_room:?}");
            assert_eq!(part.iter().filter(|index| plan.participant(**index).publishes_video).count(), 5);
        }
        plan.shape = Shape {
            room_count: 9,
            subscribers: 0,
            audio_publishers: 1,
            video_publishers: 0,
            ..plan.shape
        };
        assert!(plan.split(3).iter().all(|part| part.len() == 3));
    }

    #[test]
    fn the_predicted_load_is_rates_times_tracks() {
        let plan = plan();
        let load = plan.load();
        // 2,000,000 / 8 / 30 = 8,334 bytes a frame: 8 packets.
        assert!((plan.video.packets_per_second() - 240.0).abs() < 1e-9);
        assert!((load.packets_sent_per_second - (6.0 * 50.0 + 4.0 * 240.0)).abs() < 1e-6);
        assert!((load.packets_received_per_second - (24.0 * 50.0 + 16.0 * 240.0)).abs() < 1e-6);
        assert!(load.bits_received_per_second > 24.0 * 24e3 + 16.0 * 2e6);
    }

    #[test]
    fn urls_of_servers_are_read_and_refused() {
        let url: ServerUrl = "https://sfu.example.com/base/".parse().unwrap();
        assert_eq!(
            (url.websocket(), url.http()),
            ("wss://sfu.example.com/base".into(), "https://sfu.example.com/base".into())
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
            assert_eq!(text.parse::<ServerUrl>().unwrap().is_loopback(), loopback, "{text}");
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
            let message = text.parse::<ServerUrl>().unwrap_err();
            assert!(!message.contains("hunter2"), "{message}");
        }
    }
}
