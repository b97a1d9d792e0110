//! The description of a run.
//!
//! A [`Scenario`] says who takes part (groups of participants), what they send, and what happens in
//! time (phases, or the search for a capacity). The command line makes one. A coordinator sends it
//! to its hosts, its journal keeps it, and the report contains it. All of them serialise this type,
//! and all of them rely on [`Scenario::validate`]: every bound is defined here and nowhere else.
//! [`super::Plan`] is what one host makes of it. Secrets and the server's address are never part of
//! it.
//!
//! A missing field has its default. An unknown field is refused, because a host that ignored a
//! field would run a different run.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{
    AudioSpec, ClientKind, ConnectionMode, PARTICIPANTS_MAX, Pacing, TransportMix, VideoSpec,
    ViewLayout,
};
use crate::codec::red;
use crate::measure::Kind;
use crate::media::vp8;
use crate::units::{Bitrate, duration_text, optional_duration_text, written_duration};
use crate::words;

/// Greatest seed. Readers of JSON keep whole numbers exact up to here.
pub const SEED_MAX: u64 = (1 << 53) - 1;
/// Most phases of a run. Each one has its record, and its line in the report.
pub const PHASES_MAX: usize = 200;
/// Longest phase, and longest duration of anything else in a scenario.
pub const PHASE_MAX: Duration = Duration::from_secs(30 * 24 * 3600);
/// Most groups. This is more than the kinds of participants that a room has.
pub const GROUPS_MAX: usize = 64;
/// Longest name or label, in bytes.
pub const NAME_BYTES_MAX: usize = 128;
/// Longest name of a room, and longest identity, that a LiveKit server takes unless it is set up
/// otherwise.
pub const SERVER_NAME_BYTES_MAX: usize = 256;
/// Longest prefix of identities. What follows it is a tag of eight digits, at most "probe-" and a
/// number, with a hyphen before each.
const IDENTITY_PREFIX_BYTES_MAX: usize = SERVER_NAME_BYTES_MAX - "-01234567-probe-1000000".len();
/// Possible durations of an Opus packet in microseconds (RFC 6716, section 2.1.4, and several
/// frames in one packet).
const AUDIO_FRAMES_US: [u64; 9] = [
    2_500, 5_000, 10_000, 20_000, 40_000, 60_000, 80_000, 100_000, 120_000,
];
/// Bitrates of Opus (RFC 6716, section 2.1.1).
const AUDIO_BPS: std::ops::RangeInclusive<u64> = 6_000..=510_000;
const VIDEO_BPS: std::ops::RangeInclusive<u64> = 10_000..=100_000_000;
const VIDEO_SIDES: std::ops::RangeInclusive<u16> = 16..=4096;
/// Most layers below the top one: LiveKit knows three qualities.
const LOWER_LAYERS_MAX: usize = 2;
const JOINS_PER_SECOND: std::ops::RangeInclusive<f64> = 0.001..=1e6;

/// A complete description of a run, without the server, the secrets and the run's tag.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Scenario {
    /// Source of all randomness below the plan.
    pub seed: u64,
    /// Number of peer connections of a participant. `auto`: each host asks its server.
    pub connection: ConnectionMode,
    /// Start of every identity.
    pub identity_prefix: String,
    /// Rate at which joins are started, whatever becomes of earlier ones (open loop). With several
    /// hosts, this is the rate of each of them.
    pub joins_per_second: f64,
    /// Number of times that a failed join is tried again.
    pub join_retries: u32,
    pub rooms: RoomSet,
    /// Media of the groups that have none of their own.
    pub media: MediaSpec,
    /// Participants of a room, in joining order.
    pub groups: Vec<ParticipantGroup>,
    /// Phases of the run, in order. Empty only if a search chooses them.
    pub phases: Vec<ScenarioPhase>,
    /// Set if the phases are chosen during the run, to find out with how many subscribers per room
    /// it passes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub search: Option<CapacitySearch>,
}

/// The rooms of a run. All are the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RoomSet {
    /// Name of the room if there is one; several are named `NAME-1`, `NAME-2` and so on. `None`:
    /// derived from the run's tag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub count: u32,
    /// Whether the audio publishers of a room take turns in speaking.
    pub simulate_speakers: bool,
}

/// Media that publishers send, and how subscribers view it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MediaSpec {
    /// Client that participants say they are. What it sends is in the other fields.
    #[serde(skip_serializing_if = "ClientKind::is_lk")]
    pub client: ClientKind,
    /// Whether video is also sent in smaller sizes if it is large enough.
    pub simulcast: bool,
    pub pacing: Pacing,
    /// Whether publishers limit their layers to what their path carries.
    pub obey_bandwidth: bool,
    /// Whether publishers rest the layers that nobody watches.
    #[serde(skip_serializing_if = "is_on")]
    pub dynacast: bool,
    /// Layout in which subscribers view a room. `None`: each track as large as it comes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layout: Option<ViewLayout>,
    /// Whether subscribers announce that they will say which sizes they show, so that the server
    /// starts with the smallest.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub adaptive_stream: bool,
    pub audio: AudioSpec,
    pub video: VideoSpec,
    /// Layers below [`MediaSpec::video`], the lowest first. `None`: they follow from it
    /// ([`VideoSpec::layers`]).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lower_layers: Option<Vec<VideoSpec>>,
}

/// Whether a setting that is usually on is on. It is not written then.
fn is_on(on: &bool) -> bool {
    *on
}

/// Participants of a room that do the same.
///
/// A new property of participants is added here, with its default, and with its bound in
/// [`ParticipantGroup::validate`]. [`super::Plan::participant`] hands it to each of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ParticipantGroup {
    /// Name of the group for human readers.
    pub label: String,
    /// Number of participants in each room.
    pub count: u32,
    pub publishes_audio: bool,
    pub publishes_video: bool,
    /// Whether they subscribe to everybody else in the room.
    pub subscribes: bool,
    /// Transport of their media. A mix is dealt in their order over all rooms together.
    #[serde(skip_serializing_if = "TransportMix::is_auto")]
    pub transport: TransportMix,
    /// What they send, and how they view others. `None`: as [`Scenario::media`] says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub media: Option<MediaSpec>,
}

/// A stretch of the run: participants join until their number is reached, settle, and are held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScenarioPhase {
    /// Name in the report.
    pub name: String,
    /// Number of participants in each room that only subscribe: the first ones in joining order
    /// stay, the others leave. `None`: all. With several hosts: the number for each host of weight
    /// 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subscribers: Option<u32>,
    /// Time over which joins or leaves are spread, instead of [`Scenario::joins_per_second`].
    #[serde(
        with = "optional_duration_text",
        skip_serializing_if = "Option::is_none"
    )]
    pub spread: Option<Duration>,
    /// Time between the end of joining and the start of measuring.
    #[serde(with = "duration_text")]
    pub warmup: Duration,
    /// Length of the measurement.
    #[serde(with = "duration_text")]
    pub hold: Duration,
}

/// A search for the largest number of subscribers with which the run passes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CapacitySearch {
    /// Most subscribers that are tried, in each room.
    pub max_subscribers: u32,
    /// [`ScenarioPhase::spread`] of each point.
    #[serde(
        default,
        with = "optional_duration_text",
        skip_serializing_if = "Option::is_none"
    )]
    pub spread: Option<Duration>,
    /// [`ScenarioPhase::warmup`] of each point.
    #[serde(default, with = "duration_text")]
    pub warmup: Duration,
    /// Shortest hold of a point. A point in doubt is held longer.
    #[serde(with = "duration_text")]
    pub hold: Duration,
}

/// Times of a phase, whoever is in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PhaseTimes {
    pub spread: Option<Duration>,
    pub warmup: Duration,
    pub hold: Duration,
}

/// Numbers of participants of a plain room, as in flags and reports. Audio and video publishers are
/// the same participants as far as the numbers allow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoomPeople {
    pub audio_publishers: u32,
    pub video_publishers: u32,
    /// Number of participants that only subscribe.
    pub subscribers: u32,
    /// Whether publishers subscribe to each other, too.
    pub meeting: bool,
}

impl Default for Scenario {
    fn default() -> Scenario {
        Scenario {
            seed: 0,
            connection: ConnectionMode::Auto,
            identity_prefix: "throng".to_owned(),
            joins_per_second: 50.0,
            join_retries: 0,
            rooms: RoomSet::default(),
            media: MediaSpec::default(),
            groups: Vec::new(),
            phases: Vec::new(),
            search: None,
        }
    }
}

impl Default for RoomSet {
    fn default() -> RoomSet {
        RoomSet {
            name: None,
            count: 1,
            simulate_speakers: false,
        }
    }
}

impl Default for MediaSpec {
    fn default() -> MediaSpec {
        MediaSpec {
            client: ClientKind::Lk,
            simulcast: true,
            pacing: Pacing::Paced,
            obey_bandwidth: false,
            dynacast: true,
            layout: None,
            adaptive_stream: false,
            audio: AudioSpec::default(),
            video: VideoSpec::default(),
            lower_layers: None,
        }
    }
}

impl Default for ScenarioPhase {
    fn default() -> ScenarioPhase {
        ScenarioPhase {
            name: "hold".to_owned(),
            subscribers: None,
            spread: None,
            warmup: Duration::ZERO,
            hold: Duration::from_secs(15),
        }
    }
}

/// Participants in a room.
impl RoomPeople {
    /// Number of publishers per room. Audio and video publishers overlap.
    pub fn publishers(&self) -> u32 {
        self.audio_publishers.max(self.video_publishers)
    }

    /// Number of all participants in a room.
    pub fn participants(&self) -> u64 {
        u64::from(self.publishers()) + u64::from(self.subscribers)
    }

    /// Groups in joining order. Empty groups are left out.
    fn groups(&self) -> Vec<ParticipantGroup> {
        let both = self.audio_publishers.min(self.video_publishers);
        let publishers = |label: &str, count, publishes_audio, publishes_video| ParticipantGroup {
            label: label.to_owned(),
            count,
            publishes_audio,
            publishes_video,
            subscribes: self.meeting,
            ..ParticipantGroup::default()
        };
        let groups = [
            publishers("audio and video", both, true, true),
            publishers("audio", self.audio_publishers - both, true, false),
            publishers("video", self.video_publishers - both, false, true),
            ParticipantGroup::subscribers(self.subscribers),
        ];
        groups.into_iter().filter(|group| group.count > 0).collect()
    }
}

impl ParticipantGroup {
    /// A group that only subscribes.
    fn subscribers(count: u32) -> ParticipantGroup {
        ParticipantGroup {
            label: "subscribers".to_owned(),
            count,
            subscribes: true,
            ..ParticipantGroup::default()
        }
    }

    pub const fn publishes(&self, kind: Kind) -> bool {
        match kind {
            Kind::Audio => self.publishes_audio,
            Kind::Video => self.publishes_video,
        }
    }

    pub const fn is_publisher(&self) -> bool {
        self.publishes_audio || self.publishes_video
    }

    fn validate(&self, part: &str) -> Result<(), ScenarioError> {
        if let Some(media) = &self.media {
            media.validate(&format!("{part}.media"))?;
        }
        self.validate_alone().map_err(|misfit| misfit.within(part))
    }

    fn validate_alone(&self) -> Result<(), FieldFault> {
        if !is_label(&self.label) {
            return Err(FieldFault::new("label", ScenarioFault::Label));
        }
        if self.is_publisher() || self.subscribes {
            Ok(())
        } else {
            Err(FieldFault::new("subscribes", ScenarioFault::IdleGroup))
        }
    }
}

/// The kinds of runs that the command line makes.
impl Scenario {
    /// A scenario with these people in its rooms. Its phases are still missing.
    pub fn of_people(people: RoomPeople) -> Scenario {
        Scenario {
            groups: people.groups(),
            ..Scenario::default()
        }
    }

    /// Sets the transport of all participants' media.
    #[must_use]
    pub fn over(mut self, transport: &TransportMix) -> Scenario {
        for group in &mut self.groups {
            group.transport = transport.clone();
        }
        self
    }

    /// Makes it a run in which all join, and are held.
    #[must_use]
    pub fn single(self, times: PhaseTimes) -> Scenario {
        let phases = vec![ScenarioPhase::all("hold", times)];
        Scenario {
            phases,
            search: None,
            ..self
        }
    }

    /// Makes it a ramp, with one tier for each of these numbers of subscribers in each room.
    #[must_use]
    pub fn ramp(self, tiers: &[u32], times: PhaseTimes) -> Scenario {
        let numbered = (1..).zip(tiers);
        let phases = numbered
            .map(|(number, subscribers)| ScenarioPhase {
                subscribers: Some(*subscribers),
                ..ScenarioPhase::all(&format!("tier {number}"), times)
            })
            .collect();
        Scenario {
            phases,
            search: None,
            ..self
        }
    }

    /// Makes it a search for the most subscribers in each room, up to those in
    /// [`Scenario::groups`].
    #[must_use]
    pub fn capacity_search(self, times: PhaseTimes) -> Scenario {
        let search = CapacitySearch {
            max_subscribers: self.subscribers(),
            spread: times.spread,
            warmup: times.warmup,
            hold: times.hold,
        };
        Scenario {
            phases: Vec::new(),
            search: Some(search),
            ..self
        }
    }

    /// The same run on several hosts together, with this number of rooms in all, and in each of
    /// them this number of participants that only subscribe. Phases keep the numbers that each
    /// host, or all hosts, were asked for.
    #[must_use]
    pub fn over_hosts(&self, rooms: u32, subscribers: u32) -> Scenario {
        let mut scenario = self.clone();
        scenario.rooms.count = rooms;
        let is_listener = |group: &ParticipantGroup| !group.is_publisher();
        if !scenario.groups.iter().any(is_listener) {
            let first = scenario.groups.first();
            let transport = first.map(|group| group.transport.clone());
            scenario.groups.push(ParticipantGroup {
                transport: transport.unwrap_or_default(),
                ..ParticipantGroup::subscribers(0)
            });
        }
        // The last of several groups takes those beyond the original counts.
        let mut left = subscribers;
        let listeners = scenario
            .groups
            .iter_mut()
            .filter(|group| is_listener(group));
        for group in listeners {
            group.count = group.count.min(left);
            left -= group.count;
        }
        if let Some(last) = scenario.groups.iter_mut().rfind(|group| is_listener(group)) {
            last.count += left;
        }
        scenario.groups.retain(|group| group.count > 0);
        scenario
    }
}

impl ScenarioPhase {
    fn all(name: &str, times: PhaseTimes) -> ScenarioPhase {
        ScenarioPhase {
            name: name.to_owned(),
            subscribers: None,
            spread: times.spread,
            warmup: times.warmup,
            hold: times.hold,
        }
    }
}

/// Sums over the scenario. Counts are for one room unless they say otherwise.
impl Scenario {
    /// Number of participants that publish anything. They come first in the joining order.
    pub fn publishers(&self) -> u32 {
        self.count(ParticipantGroup::is_publisher)
    }

    pub fn publishers_of(&self, kind: Kind) -> u32 {
        self.count(|group| group.publishes(kind))
    }

    /// Number of participants that only subscribe.
    pub fn subscribers(&self) -> u32 {
        self.count(|group| !group.is_publisher())
    }

    pub fn participants(&self) -> u64 {
        let counts = self.groups.iter().map(|group| u64::from(group.count));
        counts.sum()
    }

    /// Number of participants over all rooms.
    pub fn total(&self) -> u64 {
        self.participants().saturating_mul(self.rooms.count.into())
    }

    fn count(&self, is_one: impl Fn(&ParticipantGroup) -> bool) -> u32 {
        let groups = self.groups.iter().filter(|group| is_one(group));
        groups.fold(0, |sum: u32, group| sum.saturating_add(group.count))
    }

    /// Index of the group of the participant at this place in a room's joining order. The number
    /// of groups, if there is no such place.
    pub fn group_index(&self, place: u32) -> usize {
        let mut before = place;
        let at = self.groups.iter().position(|group| {
            let is_in = before < group.count;
            before = before.saturating_sub(group.count);
            is_in
        });
        at.unwrap_or(self.groups.len())
    }

    /// Number of participants of the same group before this place in a room's joining order.
    pub fn place_in_group(&self, place: u32) -> u32 {
        let mut before = place;
        for group in &self.groups {
            if before < group.count {
                break;
            }
            before -= group.count;
        }
        before
    }

    /// Number of publishers of a kind before this place.
    pub fn publishers_before(&self, place: u32, kind: Kind) -> u32 {
        let mut left = place;
        let mut publishers = 0;
        for group in &self.groups {
            let before = left.min(group.count);
            left -= before;
            publishers += if group.publishes(kind) { before } else { 0 };
        }
        publishers
    }

    /// What a group sends, and how it views others.
    pub fn media_of<'a>(&'a self, group: &'a ParticipantGroup) -> &'a MediaSpec {
        group.media.as_ref().unwrap_or(&self.media)
    }

    /// The group at this index. Beyond the groups: nobody, with the run's media.
    pub fn media_at(&self, group: usize) -> &MediaSpec {
        let group = self.groups.get(group);
        group.map_or(&self.media, |group| self.media_of(group))
    }

    /// Whether publishers subscribe to each other, too.
    pub fn is_meeting(&self) -> bool {
        let mut publishers = self.groups.iter().filter(|group| group.is_publisher());
        publishers.any(|group| group.subscribes)
    }

    /// Numbers of participants, as the report shows them.
    pub fn people(&self) -> RoomPeople {
        RoomPeople {
            audio_publishers: self.publishers_of(Kind::Audio),
            video_publishers: self.publishers_of(Kind::Video),
            subscribers: self.subscribers(),
            meeting: self.is_meeting(),
        }
    }

    /// Replaces the participants in the rooms.
    pub fn set_people(&mut self, people: RoomPeople) {
        let first = self.groups.first();
        let transport = first.map(|group| group.transport.clone());
        self.groups = people.groups();
        if let Some(transport) = transport {
            for group in &mut self.groups {
                group.transport = transport.clone();
            }
        }
    }

    /// Whether the run is one phase with everybody, and nothing else.
    pub fn is_whole(&self) -> bool {
        self.search.is_none() && matches!(&self.phases[..], [phase] if phase.subscribers.is_none())
    }

    /// Whether subscribers join and leave phase by phase, instead of all at once.
    pub fn has_tiers(&self) -> bool {
        !self.is_whole()
    }

    /// Subscribers in each room, phase by phase. Empty if all join at once, and in a search.
    pub fn ramp_tiers(&self) -> Vec<u32> {
        if self.is_whole() {
            return Vec::new();
        }
        let all = self.subscribers();
        let phases = self.phases.iter();
        phases
            .map(|phase| phase.subscribers.unwrap_or(all))
            .collect()
    }

    /// Times of the first phase, or of a search's points.
    pub fn times(&self) -> PhaseTimes {
        let of_search = self.search.as_ref().map(|search| PhaseTimes {
            spread: search.spread,
            warmup: search.warmup,
            hold: search.hold,
        });
        let of_phase = self.phases.first().map(|phase| PhaseTimes {
            spread: phase.spread,
            warmup: phase.warmup,
            hold: phase.hold,
        });
        of_search.or(of_phase).unwrap_or_default()
    }
}

/// Why a scenario was refused: the field at fault, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} {fault}")]
pub struct ScenarioError {
    /// Path of the field, for example `media.video.frames_per_second` or `phases[2].hold`.
    pub field: String,
    pub fault: ScenarioFault,
}

/// Fault of a field. Each text continues after the field's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScenarioFault {
    #[error("{found} is out of range: write {allowed}")]
    OutOfRange {
        found: String,
        allowed: &'static str,
    },
    #[error("takes 1 to {NAME_BYTES_MAX} bytes without spaces")]
    Name,
    #[error("is empty: write a name, or leave it out")]
    NameEmpty,
    #[error("is {bytes} bytes long, and at most {bytes_max} fit: a server takes {SERVER_NAME_BYTES_MAX}{}", added(*.bytes_max))]
    NameLong { bytes: usize, bytes_max: usize },
    #[error(
        "holds the character U+{code:04X}, which moves a terminal's cursor or turns its text: leave it out"
    )]
    NameCharacter { code: u32 },
    #[error("takes 1 to {NAME_BYTES_MAX} bytes without control characters")]
    Label,
    #[error("{found} is no length of an Opus packet: write {AUDIO_FRAMES_TEXT}")]
    AudioFrame { found: String },
    #[error("add up to 0 participants: nobody would join")]
    Nobody,
    #[error("add up to more than {PARTICIPANTS_MAX} participants: spread them over several runs")]
    TooManyParticipants,
    #[error("has {found} tiers: at most {PHASES_MAX} tiers")]
    TooManyPhases { found: usize },
    #[error("are too many with {found}: at most {GROUPS_MAX}")]
    TooManyGroups { found: usize },
    #[error("is empty: write at least one phase, or a search")]
    NoPhase,
    #[error("has phases, but the search chooses them: leave out one of the two")]
    SearchAndPhases,
    #[error("0 is a tier without subscribers, which measures nothing: write 1 or more")]
    EmptyTier,
    #[error("{found} is more than the groups have: they have {most} who only subscribe")]
    TooManySubscribers { found: u32, most: u32 },
    #[error("are too many with {found}: at most {LOWER_LAYERS_MAX} below the top one")]
    TooManyLayers { found: usize },
    #[error("{found} is larger than the layer above it: sort them by size, the smallest first")]
    LayerOrder { found: String },
    #[error("needs a layout, which says what sizes are shown: add --layout, or leave it out")]
    NothingShown,
    #[error("leaves the group nothing to do: have it publish audio or video, or subscribe")]
    IdleGroup,
    #[error(
        "comes too late: groups that publish audio are first, then those that publish video, then subscribers"
    )]
    GroupOrder,
    #[error(
        "has other sizes than the video of the groups before it, and a layout chooses by size: give them the same size, or leave out the layout"
    )]
    MixedSizes,
}

const AUDIO_FRAMES_TEXT: &str = "2.5ms, 5ms, 10ms, 20ms, 40ms, 60ms, 80ms, 100ms or 120ms";
const FPS_TEXT: &str = "1 to 60 frames a second";
/// The encoder takes exactly what [`FPS_TEXT`] says.
const _: () = assert!(*vp8::FPS_RANGE.start() == 1 && *vp8::FPS_RANGE.end() == 60);

/// A fault and the name of its field, before the field's path is known.
struct FieldFault {
    field: &'static str,
    fault: ScenarioFault,
}

impl FieldFault {
    fn new(field: &'static str, fault: ScenarioFault) -> FieldFault {
        FieldFault { field, fault }
    }

    /// Adds the path of the part of the scenario that holds the field.
    fn within(self, part: &str) -> ScenarioError {
        ScenarioError {
            field: format!("{part}.{}", self.field),
            fault: self.fault,
        }
    }
}

impl From<FieldFault> for ScenarioError {
    fn from(misfit: FieldFault) -> ScenarioError {
        ScenarioError {
            field: misfit.field.to_owned(),
            fault: misfit.fault,
        }
    }
}

/// Every bound of a run. Flags, a coordinator's job, a journal and JSON are all checked here.
impl Scenario {
    /// # Errors
    /// Returns the first field that is invalid.
    pub fn validate(&self) -> Result<(), ScenarioError> {
        if self.seed > SEED_MAX {
            return Err(FieldFault::new("seed", out(self.seed, "0 to 9007199254740991")).into());
        }
        must_fit_a_server(&self.identity_prefix, IDENTITY_PREFIX_BYTES_MAX)
            .map_err(|fault| ScenarioError::from(FieldFault::new("identity_prefix", fault)))?;
        self.rooms
            .validate()
            .map_err(|misfit| misfit.within("rooms"))?;
        self.media.validate("media")?;
        self.validate_groups()?;
        self.validate_layouts()?;
        // No range contains NaN.
        if !JOINS_PER_SECOND.contains(&self.joins_per_second) {
            let fault = out(self.joins_per_second, JOIN_RATE_TEXT);
            return Err(FieldFault::new("joins_per_second", fault).into());
        }
        self.validate_phases()
    }

    fn validate_groups(&self) -> Result<(), ScenarioError> {
        let groups = |fault| Err(FieldFault::new("groups", fault).into());
        if self.groups.len() > GROUPS_MAX {
            let found = self.groups.len();
            return groups(ScenarioFault::TooManyGroups { found });
        }
        if self.participants() == 0 {
            return groups(ScenarioFault::Nobody);
        }
        if self.total() > PARTICIPANTS_MAX {
            return groups(ScenarioFault::TooManyParticipants);
        }
        let mut last = 0;
        for (at, group) in self.groups.iter().enumerate() {
            let part = format!("groups[{at}]");
            group.validate(&part)?;
            // A publisher of audio is identified by its place in the room, and phases count
            // subscribers from the end of the publishers.
            let rank = match (group.publishes_audio, group.publishes_video) {
                (true, _) => 0,
                (false, true) => 1,
                (false, false) => 2,
            };
            if rank < last {
                let fault = ScenarioFault::GroupOrder;
                return Err(ScenarioError { field: part, fault });
            }
            last = rank;
        }
        Ok(())
    }

    /// A layout chooses layers by their size, so all video has the same sizes where one is used.
    fn validate_layouts(&self) -> Result<(), ScenarioError> {
        if self
            .groups
            .iter()
            .all(|group| self.media_of(group).layout.is_none())
        {
            return Ok(());
        }
        let sizes = |media: &MediaSpec| -> Vec<(u16, u16)> {
            let layers = media.video_layers().into_iter();
            layers.map(|layer| (layer.width, layer.height)).collect()
        };
        let groups = self.groups.iter().enumerate();
        let mut video = groups.filter(|(_, group)| group.publishes_video);
        let Some((_, first)) = video.next() else {
            return Ok(());
        };
        let first = sizes(self.media_of(first));
        match video.find(|(_, group)| sizes(self.media_of(group)) != first) {
            Some((at, _)) => Err(ScenarioError {
                field: format!("groups[{at}].media.video"),
                fault: ScenarioFault::MixedSizes,
            }),
            None => Ok(()),
        }
    }

    fn validate_phases(&self) -> Result<(), ScenarioError> {
        if let Some(search) = &self.search {
            if !self.phases.is_empty() {
                return Err(FieldFault::new("phases", ScenarioFault::SearchAndPhases).into());
            }
            let in_search = |misfit: FieldFault| misfit.within("search");
            self.check_subscribers("max_subscribers", search.max_subscribers, true)
                .map_err(in_search)?;
            return self.times().validate().map_err(in_search);
        }
        match self.phases.len() {
            0 => return Err(FieldFault::new("phases", ScenarioFault::NoPhase).into()),
            1..=PHASES_MAX => {}
            found => {
                let fault = ScenarioFault::TooManyPhases { found };
                return Err(FieldFault::new("phases", fault).into());
            }
        }
        for (at, phase) in self.phases.iter().enumerate() {
            let in_phase = |misfit: FieldFault| misfit.within(&format!("phases[{at}]"));
            let times = PhaseTimes {
                spread: phase.spread,
                warmup: phase.warmup,
                hold: phase.hold,
            };
            if !is_label(&phase.name) {
                return Err(in_phase(FieldFault::new("name", ScenarioFault::Label)));
            }
            if let Some(subscribers) = phase.subscribers {
                self.check_subscribers("subscribers", subscribers, false)
                    .map_err(in_phase)?;
            }
            times.validate().map_err(in_phase)?;
        }
        Ok(())
    }

    /// Refuses an empty tier, which measures nothing unless publishers subscribe to each other.
    fn check_subscribers(
        &self,
        field: &'static str,
        found: u32,
        is_search: bool,
    ) -> Result<(), FieldFault> {
        let most = self.subscribers();
        if found == 0 && (is_search || !self.is_meeting()) {
            return Err(FieldFault::new(field, ScenarioFault::EmptyTier));
        }
        if found > most {
            return Err(FieldFault::new(
                field,
                ScenarioFault::TooManySubscribers { found, most },
            ));
        }
        Ok(())
    }
}

const JOIN_RATE_TEXT: &str = "a rate of 0.001 to 1000000";

impl RoomSet {
    fn validate(&self) -> Result<(), FieldFault> {
        if self.count == 0 {
            return Err(FieldFault::new("count", out(0, "1 or more")));
        }
        // Several rooms are numbered: `NAME-12`.
        let added = match self.count {
            1 => 0,
            count => 1 + count.to_string().len(),
        };
        let bytes_max = SERVER_NAME_BYTES_MAX - added;
        let name = self.name.as_deref();
        let name = name.map_or(Ok(()), |name| must_fit_a_server(name, bytes_max));
        name.map_err(|fault| FieldFault::new("name", fault))
    }
}

impl MediaSpec {
    fn validate(&self, part: &str) -> Result<(), ScenarioError> {
        let audio = self.audio.validate();
        audio.map_err(|misfit| misfit.within(&format!("{part}.audio")))?;
        let video = self.video.validate();
        video.map_err(|misfit| misfit.within(&format!("{part}.video")))?;
        self.validate_layers(part)?;
        if self.adaptive_stream && self.layout.is_none() {
            let misfit = FieldFault::new("adaptive_stream", ScenarioFault::NothingShown);
            return Err(misfit.within(part));
        }
        Ok(())
    }

    fn validate_layers(&self, part: &str) -> Result<(), ScenarioError> {
        let lower = self.lower_layers.as_deref().unwrap_or_default();
        if lower.len() > LOWER_LAYERS_MAX {
            let found = lower.len();
            let misfit = FieldFault::new("lower_layers", ScenarioFault::TooManyLayers { found });
            return Err(misfit.within(part));
        }
        let above = lower.iter().skip(1).chain([&self.video]);
        for (at, (layer, above)) in lower.iter().zip(above).enumerate() {
            let in_layer =
                |misfit: FieldFault| misfit.within(&format!("{part}.lower_layers[{at}]"));
            layer.validate().map_err(in_layer)?;
            if layer.width > above.width || layer.height > above.height {
                let found = format!("{}x{}", layer.width, layer.height);
                let misfit = FieldFault::new("size", ScenarioFault::LayerOrder { found });
                return Err(in_layer(misfit));
            }
        }
        Ok(())
    }

    /// The layers of a video track, the lowest first.
    pub fn video_layers(&self) -> Vec<VideoSpec> {
        match &self.lower_layers {
            Some(lower) if self.simulcast => lower.iter().copied().chain([self.video]).collect(),
            _ => self.video.layers(self.simulcast),
        }
    }
}

impl AudioSpec {
    fn validate(&self) -> Result<(), FieldFault> {
        if !AUDIO_BPS.contains(&self.bitrate.bps()) {
            return Err(bitrate_out(self.bitrate, "6k to 510k"));
        }
        let frame_us = self.frame.as_micros();
        if AUDIO_FRAMES_US.iter().all(|us| u128::from(*us) != frame_us) {
            let found = written_duration(self.frame);
            return Err(FieldFault::new(
                "frame",
                ScenarioFault::AudioFrame { found },
            ));
        }
        if usize::from(self.redundancy) > red::DISTANCE_MAX {
            return Err(FieldFault::new(
                "redundancy",
                out(self.redundancy, "0 to 2"),
            ));
        }
        Ok(())
    }
}

impl VideoSpec {
    fn validate(&self) -> Result<(), FieldFault> {
        if !VIDEO_SIDES.contains(&self.width) || !VIDEO_SIDES.contains(&self.height) {
            let found = format!("{}x{}", self.width, self.height);
            let allowed = "high, medium, low or WIDTHxHEIGHT with sides of 16 to 4096";
            return Err(FieldFault::new(
                "size",
                ScenarioFault::OutOfRange { found, allowed },
            ));
        }
        if !vp8::FPS_RANGE.contains(&self.frames_per_second) {
            let fault = out(self.frames_per_second, FPS_TEXT);
            return Err(FieldFault::new("frames_per_second", fault));
        }
        if !VIDEO_BPS.contains(&self.bitrate.bps()) {
            return Err(bitrate_out(self.bitrate, "10k to 100M"));
        }
        Ok(())
    }
}

impl PhaseTimes {
    fn validate(&self) -> Result<(), FieldFault> {
        if let Some(spread) = self.spread {
            spread_must_fit(spread).map_err(|fault| FieldFault::new("spread", fault))?;
        }
        if self.warmup > PHASE_MAX {
            return Err(FieldFault::new("warmup", time_out(self.warmup, "0 to 30d")));
        }
        if self.hold.is_zero() || self.hold > PHASE_MAX {
            return Err(FieldFault::new("hold", time_out(self.hold, "1s to 30d")));
        }
        Ok(())
    }
}

/// Checks the time over which joins are spread.
///
/// # Errors
/// Returned if it is zero, or longer than any run.
pub fn spread_must_fit(spread: Duration) -> Result<(), ScenarioFault> {
    if spread.is_zero() || spread > PHASE_MAX {
        let allowed = "1s to 30d; to have all join at once, write a high rate of joins instead";
        return Err(time_out(spread, allowed));
    }
    Ok(())
}

/// Returns what a run adds to a name, in words.
fn added(bytes_max: usize) -> String {
    match SERVER_NAME_BYTES_MAX - bytes_max {
        0 => String::new(),
        added => format!(", and up to {added} are added to it"),
    }
}

/// Checks the name of a host.
///
/// # Errors
/// Returned if it is empty or too long, or has spaces or control characters.
pub fn must_be_a_name(name: &str) -> Result<(), ScenarioFault> {
    let plain = !name.chars().any(|c| c.is_control() || c.is_whitespace());
    if plain && (1..=NAME_BYTES_MAX).contains(&name.len()) {
        Ok(())
    } else {
        Err(ScenarioFault::Name)
    }
}

/// Checks the name of a room, or a prefix of identities. Whatever a server takes is taken, unless a
/// terminal could not show it.
fn must_fit_a_server(name: &str, bytes_max: usize) -> Result<(), ScenarioFault> {
    if name.is_empty() {
        return Err(ScenarioFault::NameEmpty);
    }
    if let Some(c) = name.chars().find(|c| !words::is_shown(*c)) {
        return Err(ScenarioFault::NameCharacter { code: c.into() });
    }
    match name.len() {
        bytes if bytes > bytes_max => Err(ScenarioFault::NameLong { bytes, bytes_max }),
        _ => Ok(()),
    }
}

fn is_label(label: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&label.len()) && !label.chars().any(char::is_control)
}

fn out(found: impl ToString, allowed: &'static str) -> ScenarioFault {
    ScenarioFault::OutOfRange {
        found: found.to_string(),
        allowed,
    }
}

fn time_out(found: Duration, allowed: &'static str) -> ScenarioFault {
    out(written_duration(found), allowed)
}

fn bitrate_out(found: Bitrate, allowed: &'static str) -> FieldFault {
    FieldFault::new("bitrate", out(found.written(), allowed))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const TIMES: PhaseTimes = PhaseTimes {
        spread: Some(Duration::from_secs(90)),
        warmup: Duration::from_millis(2_500),
        hold: Duration::from_secs(20),
    };

    fn base() -> Scenario {
        let people = RoomPeople {
            audio_publishers: 3,
            video_publishers: 2,
            subscribers: 25,
            meeting: false,
        };
        let mut scenario = Scenario::of_people(people);
        scenario.seed = 7;
        scenario.rooms.name = Some("hall".to_owned());
        scenario
    }

    /// One scenario of each kind that the command line makes.
    pub(crate) fn kinds() -> BTreeMap<&'static str, Scenario> {
        let meeting = Scenario::of_people(RoomPeople {
            meeting: true,
            subscribers: 0,
            ..base().people()
        });
        let plain = PhaseTimes {
            hold: Duration::from_secs(15),
            ..PhaseTimes::default()
        };
        let mut as_js = base().single(plain);
        let defaults = ClientKind::Js.defaults();
        as_js.media.client = ClientKind::Js;
        as_js.media.video = defaults.top_layer(1280, 720).unwrap();
        as_js.media.lower_layers = defaults.lower_layers(as_js.media.video);
        as_js.media.audio = defaults.audio;
        as_js.media.dynacast = defaults.dynacast;
        as_js.media.layout = Some(ViewLayout::Grid3x3);
        as_js.media.adaptive_stream = true;
        BTreeMap::from([
            ("js", as_js),
            ("plain", base().single(plain)),
            ("ramp", base().ramp(&[2, 25, 10], TIMES)),
            ("knee", base().capacity_search(TIMES)),
            ("meeting", meeting.single(plain)),
            ("hosts", base().ramp(&[2, 25], TIMES).over_hosts(4, 75)),
        ])
    }

    #[test]
    fn every_kind_of_run_survives_the_trip_and_is_what_it_was() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/golden/scenarios.json")).unwrap();
        for (name, scenario) in kinds() {
            assert_eq!(scenario.validate(), Ok(()), "{name}");
            let json = serde_json::to_value(&scenario).unwrap();
            assert_eq!(json, golden[name], "{name}");
            let text = serde_json::to_string(&scenario).unwrap();
            assert_eq!(serde_json::from_str::<Scenario>(&text).unwrap(), scenario);
        }
    }

    /// Replaces number `number`, counted through the whole value, and returns its path.
    fn replace_number(
        value: &mut serde_json::Value,
        number: &mut usize,
        by: &serde_json::Value,
        path: &str,
    ) -> Option<String> {
        match value {
            serde_json::Value::Number(_) if *number == 0 => {
                *value = by.clone();
                Some(path.to_owned())
            }
            serde_json::Value::Number(_) => {
                *number -= 1;
                None
            }
            serde_json::Value::Array(items) => items
                .iter_mut()
                .find_map(|item| replace_number(item, number, by, path)),
            serde_json::Value::Object(fields) => fields.iter_mut().find_map(|(name, item)| {
                replace_number(item, number, by, &format!("{path}.{name}"))
            }),
            _ => None,
        }
    }

    #[test]
    fn no_number_of_a_scenario_is_taken_where_no_run_has_it() {
        let odd = ["-1", "1e300", "-1e300", "18446744073709551615"];
        let odd = odd.map(|text| serde_json::from_str::<serde_json::Value>(text).unwrap());
        let mut numbers = 0;
        for (kind, scenario) in kinds() {
            let sound = serde_json::to_value(&scenario).unwrap();
            for at in 0.. {
                let mut faults = Vec::new();
                for by in &odd {
                    let mut changed = sound.clone();
                    let Some(path) = replace_number(&mut changed, &mut at.clone(), by, "") else {
                        break;
                    };
                    let read = serde_json::from_value::<Scenario>(changed);
                    let is_taken = read.is_ok_and(|read| read.validate().is_ok());
                    faults.push((path, is_taken));
                }
                if faults.is_empty() {
                    break;
                }
                numbers += 1;
                let taken = faults.iter().filter(|(_, is_taken)| *is_taken);
                assert_eq!(taken.count(), 0, "{kind}: {faults:?}");
            }
        }
        assert!(numbers > 50, "only {numbers} numbers were tried");
    }

    #[test]
    fn what_is_left_out_has_its_default_and_what_is_not_known_is_refused() {
        let text = r#"{"groups": [{"label": "all", "count": 4, "subscribes": true}],
            "phases": [{"hold": "1m"}]}"#;
        let scenario: Scenario = serde_json::from_str(text).unwrap();
        assert_eq!(scenario.validate(), Ok(()));
        assert!(scenario.is_whole() && scenario.rooms.count == 1);
        assert_eq!(scenario.times().hold, Duration::from_secs(60));
        for (text, says) in [
            (r#"{"sede": 1}"#, "sede"),
            (r#"{"rooms": {"counts": 1}}"#, "counts"),
            (r#"{"groups": [{"amount": 1}]}"#, "amount"),
            (
                r#"{"phases": [{"hold": "soon"}]}"#,
                "write 20, 20s, 30m or 1h",
            ),
            (
                r#"{"media": {"audio": {"bitrate": "fast"}}}"#,
                "write 24k, 1.5M",
            ),
            (r#"{"media": {"layout": "9x9"}}"#, "speaker"),
            (r#"{"media": {"pacing": "wild"}}"#, "burst"),
            (r#"{"connection": "triple"}"#, "single"),
        ] {
            let why = serde_json::from_str::<Scenario>(text).unwrap_err();
            assert!(why.to_string().contains(says), "{text}: {why}");
        }
    }

    #[test]
    fn names_that_a_server_takes_are_taken_and_what_is_wrong_with_others_is_named() {
        let with = |room: &str, count, prefix: &str| {
            let mut scenario = kinds().remove("ramp").unwrap();
            scenario.rooms.name = Some(room.to_owned());
            scenario.rooms.count = count;
            scenario.identity_prefix = prefix.to_owned();
            scenario.validate().map_err(|why| why.to_string())
        };
        let x = |count| "x".repeat(count);
        for (room, count, prefix) in [
            ("a b", 1, "ünïcode 😀"),
            (" ", 1, " "),
            ("../etc/x?y#z%20\"'", 1, "a/b"),
            (&x(256), 1, &x(233)),
            (&x(253), 12, "throng"),
        ] {
            assert_eq!(with(room, count, prefix), Ok(()), "{room} {prefix}");
        }
        for (room, count, prefix, says) in [
            (
                &*x(257),
                1,
                "p",
                "rooms.name is 257 bytes long, and at most 256 fit",
            ),
            (
                &x(254),
                12,
                "p",
                "at most 253 fit: a server takes 256, and up to 3 are added",
            ),
            (
                "r",
                1,
                &x(234),
                "identity_prefix is 234 bytes long, and at most 233",
            ),
            ("", 1, "p", "rooms.name is empty"),
            (
                "r",
                1,
                "\u{1b}[31m",
                "identity_prefix holds the character U+001B",
            ),
            ("a\nb", 1, "p", "rooms.name holds the character U+000A"),
            (
                "a\u{202e}b",
                1,
                "p",
                "rooms.name holds the character U+202E",
            ),
        ] {
            let why = with(room, count, prefix).unwrap_err();
            assert!(why.contains(says), "{why}");
        }
    }

    /// Each entry is a change that breaks a bound, and the message with the field's name.
    #[test]
    fn every_bound_is_refused_with_its_field_and_what_to_write() {
        type Break = fn(&mut Scenario);
        let broken: [(Break, &str); 31] = [
            (|of| of.seed = u64::MAX, "seed 18446744073709551615 is out"),
            (|of| of.identity_prefix.clear(), "identity_prefix is empty"),
            (|of| of.joins_per_second = f64::NAN, "joins_per_second NaN"),
            (|of| of.joins_per_second = 0.0, "write a rate of 0.001"),
            (|of| of.rooms.count = 0, "rooms.count 0 is out of range"),
            (
                |of| of.rooms.name = Some("a\nb".into()),
                "rooms.name holds the character U+000A",
            ),
            (|of| of.rooms.count = u32::MAX, "more than 1000000 partic"),
            (|of| of.groups.clear(), "nobody would join"),
            (|of| of.groups[2].count = u32::MAX, "groups add up to more"),
            (|of| of.groups[0].label.clear(), "groups[0].label takes 1"),
            (|of| of.groups[2].subscribes = false, "groups[2].subscribes"),
            (|of| of.groups.swap(1, 2), "groups[2] comes too late"),
            (
                |of| of.groups = vec![of.groups[0].clone(); 65],
                "at most 64",
            ),
            (|of| of.phases.clear(), "phases is empty"),
            (
                |of| of.phases = vec![of.phases[0].clone(); 201],
                "at most 200",
            ),
            (|of| of.phases[1].subscribers = Some(0), "tier without"),
            (|of| of.phases[1].subscribers = Some(26), "they have 25"),
            (|of| of.phases[0].hold = Duration::ZERO, "phases[0].hold 0s"),
            (|of| of.phases[2].hold = PHASE_MAX * 2, "write 1s to 30d"),
            (|of| of.phases[0].warmup = PHASE_MAX * 2, "write 0 to 30d"),
            (
                |of| of.phases[0].spread = Some(PHASE_MAX * 2),
                "phases[0].spread",
            ),
            (|of| of.phases[0].name.clear(), "phases[0].name"),
            (
                |of| of.media.audio.frame = Duration::from_millis(15),
                "media.audio.frame 15ms is no length",
            ),
            (
                |of| of.media.audio.bitrate = Bitrate::from_bps(1),
                "6k to 510k",
            ),
            (|of| of.media.video.width = 8, "media.video.size 8x720"),
            (|of| of.media.video.frames_per_second = 61, "1 to 60 frames"),
            (
                |of| of.media.video.bitrate = Bitrate::from_bps(1),
                "10k to 100M",
            ),
            (
                |of| of.media.lower_layers = Some(vec![VideoSpec::default(); 3]),
                "media.lower_layers are too many with 3",
            ),
            (
                |of| {
                    let odd = VideoSpec {
                        frames_per_second: 0,
                        ..VideoSpec::default()
                    };
                    of.media.lower_layers = Some(vec![odd]);
                },
                "media.lower_layers[0].frames_per_second 0",
            ),
            (
                |of| {
                    let large = VideoSpec {
                        height: 1080,
                        ..VideoSpec::default()
                    };
                    of.media.lower_layers = Some(vec![VideoSpec::default(), large]);
                },
                "media.lower_layers[1].size 1280x1080 is larger than the layer above",
            ),
            (
                |of| of.media.adaptive_stream = true,
                "media.adaptive_stream needs a layout",
            ),
        ];
        for (break_it, says) in broken {
            let mut scenario = kinds().remove("ramp").unwrap();
            break_it(&mut scenario);
            let why = scenario.validate().unwrap_err().to_string();
            assert!(why.contains(says), "{says}: {why}");
        }
        let mut search = kinds().remove("knee").unwrap();
        search.search.as_mut().unwrap().max_subscribers = 0;
        let why = search.validate().unwrap_err().to_string();
        assert!(why.contains("search.max_subscribers 0"), "{why}");
        search.phases = vec![ScenarioPhase::default()];
        let why = search.validate().unwrap_err().to_string();
        assert!(why.contains("leave out one of the two"), "{why}");
    }

    #[test]
    fn places_lead_to_groups_and_groups_to_numbers() {
        let scenario = base();
        assert_eq!(scenario.people().publishers(), scenario.publishers());
        assert_eq!((scenario.participants(), scenario.total()), (28, 28));
        let labels = [0, 1, 2, 3, 27]
            .map(|place| scenario.groups[scenario.group_index(place)].label.as_str());
        assert_eq!(
            labels,
            [
                "audio and video",
                "audio and video",
                "audio",
                "subscribers",
                "subscribers"
            ]
        );
        assert_eq!(scenario.group_index(28), scenario.groups.len());
        let before = |kind| [0, 1, 3, 20].map(|place| scenario.publishers_before(place, kind));
        assert_eq!(before(Kind::Audio), [0, 1, 3, 3]);
        assert_eq!(before(Kind::Video), [0, 1, 2, 2]);
    }

    #[test]
    fn more_hosts_change_how_many_there_are_and_nothing_else() {
        let mut scenario = base();
        scenario.groups.push(ParticipantGroup {
            label: "late".to_owned(),
            ..ParticipantGroup::subscribers(5)
        });
        let counts = |subscribers| {
            let groups = scenario.over_hosts(4, subscribers).groups;
            groups.iter().map(|group| group.count).collect::<Vec<_>>()
        };
        assert_eq!(counts(40), [2, 1, 25, 15]);
        assert_eq!(counts(7), [2, 1, 7]);
        assert_eq!(scenario.over_hosts(4, 40).rooms.count, 4);
    }
}
