//! Protocol between coordinator and probers: JSON over HTTP, with the paths and names of `voicegw
//! livekit sfu`, and ours beside them.
//!
//! | request | body | answer |
//! |---|---|---|
//! | `POST /register` | [`Register`] | [`Registered`] |
//! | `GET /job/{prover_id}` | | [`JobReply`] |
//! | `POST /tokens/{prover_id}` | [`TokensRequest`] | [`TokensReply`] |
//! | `POST /beat/{prover_id}` | [`BeatMessage`] | [`BeatReply`] |
//! | `POST /report/{prover_id}` | [`ProberReport`] | [`Reported`] |
//! | `POST /leave/{prover_id}` | | [`Departed`] |
//! | `POST /cancel` | | [`Cancelled`] |
//! | `GET /health` | | [`Health`] |
//!
//! A refused request gets a status of 4xx or 5xx and a [`RefusalMessage`].
//!
//! **Versions.** One of our probers names the version of the protocol that it speaks
//! ([`Register::protocol`]). The coordinator refuses every version except [`VERSION`], with a text
//! that names both, before it hands out anything. A prober does the same with the version in
//! [`Job::protocol`]. A prober without a version is `voicegw`'s own, and is asked only for its
//! steps. Within one version fields are only added. Readers skip fields that they do not know, and
//! an absent field has the meaning that its documentation states.
//!
//! **Clocks.** A time is in microseconds since 1970, a duration in microseconds, unless its name
//! says otherwise. The documentation of each time says whose clock it is by. No clock is trusted,
//! and none is read here. A process derives all its times from one reading of the wall clock and
//! the monotonic clock, so they never step while it lives. The coordinator's next process
//! ([`BeatReply::life`]) may have other times.
//!
//! **Hostile input.** [`read`] is the only way in. What it returns lies within the bounds of this
//! module. JSON has no NaN and no infinity.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};

use crate::measure::wire::RecordWire;
use crate::plan::scenario::Scenario;
use crate::plan::{HostRole, PARTICIPANTS_MAX, Placement, ServerUrl, VANTAGES_MAX, WEIGHT_MAX};
use crate::report::{Judging, Threshold, Verdict};
use crate::words;

/// Version of the protocol that this program speaks.
pub const VERSION: u32 = 2;

/// Environment variables with the coordinator's address and token, used if no flag gives them.
pub const URL_VARIABLE: &str = "COORDINATOR_URL";
pub const TOKEN_VARIABLE: &str = "COORDINATOR_TOKEN";

/// Largest number of probers, which is the number of hosts that a plan can be dealt to.
pub const PROBERS_MAX: usize = VANTAGES_MAX;
/// Largest number of tiers in a ramp.
pub const TIERS_MAX: usize = 100;
pub const STAGES_MAX: usize = TIERS_MAX + 4;
/// Largest number of tokens in one request.
pub const TOKENS_MAX: u32 = 1_000;
/// Factor between the silence after which the coordinator calls a prober missing and the time that
/// a prober waits for a silent coordinator.
pub const PATIENCE_SILENCES: u32 = 4;
/// Largest number of frame counts in one message, over origins, tracks and layers.
pub const FRAME_COUNTS_MAX: usize = 200_000;
/// Longest name, label or other short text, in bytes.
pub const LABEL_BYTES_MAX: usize = 128;
/// Longest reason, note or other sentence, in bytes, and the largest number of them in a message.
pub const TEXT_BYTES_MAX: usize = 2_048;
pub const TEXTS_MAX: usize = 1_000;
/// Largest whole number that every JSON reader keeps exactly.
pub const WHOLE_MAX: u64 = (1 << 53) - 1;
/// Longest run, or part of a run.
const SECONDS_MAX: f64 = 366.0 * 24.0 * 3600.0;

/// Longest bodies of requests, in bytes. Most of a beat is one [`RecordWire`] of about 30 KiB.
pub const REGISTER_BYTES_MAX: usize = 4 << 10;
pub const BEAT_BYTES_MAX: usize = 8 << 20;
pub const REPORT_BYTES_MAX: usize = 64 << 20;

/// Message that is received from the other side.
pub trait ProtocolMessage: DeserializeOwned {
    /// Checks the bounds of each field, and what the fields mean together.
    fn check(&self) -> Result<(), MalformedMessage>;
}

/// Error returned when a message is refused. It names the field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct MalformedMessage(String);

impl MalformedMessage {
    pub fn new(why: impl fmt::Display) -> MalformedMessage {
        MalformedMessage(why.to_string())
    }
}

/// Reads a message. Refuses what no prober or coordinator of this version would send.
pub fn read<M: ProtocolMessage>(body: &[u8]) -> Result<M, MalformedMessage> {
    let mut message: M = serde_json::from_slice(body).map_err(MalformedMessage::new)?;
    message.check()?;
    if may_move_a_cursor(body) {
        // Texts are shown to people. The message is read again, because only JSON values can be
        // iterated.
        let mut value = serde_json::from_slice(body).map_err(MalformedMessage::new)?;
        put_on_lines(&mut value);
        message = serde_json::from_value(value).map_err(MalformedMessage::new)?;
        message.check()?;
    }
    Ok(message)
}

/// Returns whether a message contains more than plain ASCII. JSON writes control characters with a
/// backslash.
fn may_move_a_cursor(body: &[u8]) -> bool {
    body.iter().any(|byte| *byte == b'\\' || !byte.is_ascii())
}

/// Puts each text on one line, without characters that move a terminal's cursor.
fn put_on_lines(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::String(text) => *text = words::one_line(text),
        serde_json::Value::Array(values) => values.iter_mut().for_each(put_on_lines),
        serde_json::Value::Object(fields) => fields.values_mut().for_each(put_on_lines),
        _ => {}
    }
}

/// Answer to a refused request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusalMessage {
    /// Text for people: what is wrong, and what to do.
    pub error: String,
}

impl ProtocolMessage for RefusalMessage {
    fn check(&self) -> Result<(), MalformedMessage> {
        text("error", &self.error)
    }
}

/// Id that the coordinator gives a prober. It is opaque: ours are random, `voicegw`'s coordinator
/// counts from 0.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct ProverId(String);

impl ProverId {
    /// Returns `None` if the text is longer than any id that is given out, or has characters other
    /// than letters, digits, `-` and `_`.
    pub fn new(text: impl Into<String>) -> Option<ProverId> {
        let text = text.into();
        let plain = text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        (plain && (1..=64).contains(&text.len())).then_some(ProverId(text))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ProverId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for ProverId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ProverId, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Number(u64),
            Text(String),
        }
        let text = match Either::deserialize(deserializer)? {
            Either::Number(number) => number.to_string(),
            Either::Text(text) => text,
        };
        ProverId::new(text)
            .ok_or_else(|| D::Error::custom("prover_id: not one that a coordinator gives out"))
    }
}

/// `POST /register`: a prober asks to take part.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Register {
    /// Label of the prober's location in the result. Two probers must not share one. `voicegw`
    /// allows `null`; such a prober is given a label.
    pub vantage: Option<String>,
    /// [`VERSION`] of the prober. Absent in `voicegw`'s probers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<u32>,
    /// Version of the program, for people to read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Random id of this process. A process that registers again with it gets what it got before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    #[serde(default)]
    pub role: HostRole,
    /// Weight of this host: it counts as this many hosts of weight 1.
    #[serde(default = "one")]
    pub weight: u32,
    /// Whether the prober has no API key and needs room tokens from the coordinator.
    #[serde(default)]
    pub wants_tokens: bool,
}

fn one() -> u32 {
    1
}

impl ProtocolMessage for Register {
    fn check(&self) -> Result<(), MalformedMessage> {
        self.vantage
            .as_ref()
            .map_or(Ok(()), |vantage| label("vantage", vantage))?;
        self.version
            .as_ref()
            .map_or(Ok(()), |version| label("version", version))?;
        self.instance
            .as_ref()
            .map_or(Ok(()), |instance| label("instance", instance))?;
        if !(1..=WEIGHT_MAX).contains(&self.weight) {
            return Err(MalformedMessage::new(format!("weight: 1 to {WEIGHT_MAX}")));
        }
        if self.protocol.is_some() && (self.instance.is_none() || self.vantage.is_none()) {
            return Err(MalformedMessage::new(
                "a prober that names its protocol names its vantage and its instance too",
            ));
        }
        Ok(())
    }
}

/// Answer to [`Register`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registered {
    pub prover_id: ProverId,
    /// Number of probers that the run waits for.
    pub expected: u32,
    /// [`VERSION`] of the coordinator. Absent in `voicegw`'s coordinators.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<u32>,
}

impl ProtocolMessage for Registered {
    fn check(&self) -> Result<(), MalformedMessage> {
        at_most("expected", self.expected.into(), PROBERS_MAX as u64)
    }
}

/// `GET /job/{prover_id}`: the prober's job, once everybody is in.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JobReply {
    pub room: String,
    /// Subscribers per room of this prober, tier by tier.
    pub ramp: Vec<u32>,
    /// Length of a tier, in seconds.
    pub duration: f64,
    /// Target round-trip time. `voicegw`'s probers need a number; it is `voicegw`'s own default if
    /// round-trip times are not judged.
    pub target_rtt_ms: f64,
    /// Largest permitted loss, in per cent.
    pub max_loss: f64,
    /// Start time in seconds since 1970 by the coordinator's clock; `null` until everybody is in.
    /// Our probers wait for [`Order::Start`] instead.
    pub start_at: Option<f64>,
    /// Whether everybody is in.
    pub ready: bool,
    /// Job for our own probers, once everybody is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throng: Option<Job>,
}

impl ProtocolMessage for JobReply {
    fn check(&self) -> Result<(), MalformedMessage> {
        label("room", &self.room)?;
        few("ramp", self.ramp.len(), TIERS_MAX)?;
        self.ramp
            .iter()
            .try_for_each(|tier| at_most("ramp", (*tier).into(), PARTICIPANTS_MAX))?;
        within("duration", self.duration, &(0.0..=SECONDS_MAX))?;
        within("target_rtt_ms", self.target_rtt_ms, &(0.0..=1e6))?;
        within("max_loss", self.max_loss, &(0.0..=100.0))?;
        self.start_at.map_or(Ok(()), |at| {
            within("start_at", at, &(0.0..=WHOLE_MAX as f64))
        })?;
        self.throng.as_ref().map_or(Ok(()), Job::check)
    }
}

/// The run with the prober's part in it. All fields except `me` and `stages` are the same for all
/// probers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// [`VERSION`] of the coordinator.
    pub protocol: u32,
    /// Tag that distinguishes runs in identities and room names.
    pub run_tag: u32,
    /// Labels of all vantages that play the plan. Elsewhere a vantage is an index into this list.
    pub vantages: Vec<String>,
    /// Index of this prober.
    pub me: u32,
    /// The run with the participants of all vantages. Unlike in other messages, an unknown field in
    /// it is refused, because a prober that skipped the field would play another run.
    pub scenario: Scenario,
    /// Which participants belong to which vantage ([`crate::plan::Part::new`]): one entry for each
    /// of `vantages`, in the same order.
    pub placement: Placement,
    /// Stages in order, as this prober plays them.
    pub stages: Vec<SharedStage>,
    pub judging: WireJudging,
    /// Server under test; `null`: the prober's own. A server that was given to the prober itself
    /// takes precedence.
    pub url: Option<String>,
    /// Whether the coordinator can make room tokens.
    pub tokens: bool,
    /// Whether the coordinator makes and deletes the rooms. If not, the server makes a room when
    /// the first participant joins.
    pub rooms_made: bool,
    /// How long the load may go on without an answer from the coordinator, in microseconds.
    pub patience_us: u64,
}

impl Job {
    fn check(&self) -> Result<(), MalformedMessage> {
        if self.protocol != VERSION {
            return Err(other_version("coordinator", self.protocol, "prober"));
        }
        few("vantages", self.vantages.len(), PROBERS_MAX)?;
        self.vantages
            .iter()
            .try_for_each(|vantage| label("vantages", vantage))?;
        if self.me as usize >= self.vantages.len()
            || self.placement.vantages.len() != self.vantages.len()
        {
            return Err(MalformedMessage::new(
                "vantages: not those of me and of placement",
            ));
        }
        self.scenario
            .validate()
            .map_err(|why| MalformedMessage::new(format!("scenario.{why}")))?;
        self.check_stages()?;
        self.judging.to_judging()?;
        self.url.as_ref().map_or(Ok(()), |url| {
            url.parse::<ServerUrl>()
                .map(drop)
                .map_err(|why| MalformedMessage::new(format!("url {why}")))
        })?;
        at_most("patience_us", self.patience_us, WHOLE_MAX)
    }

    fn check_stages(&self) -> Result<(), MalformedMessage> {
        few("stages", self.stages.len(), STAGES_MAX)?;
        for stage in &self.stages {
            label("stages.name", &stage.name)?;
            at_most(
                "stages.subscribers",
                stage.subscribers.into(),
                PARTICIPANTS_MAX,
            )?;
            at_most("stages.warmup_us", stage.warmup_us, WHOLE_MAX)?;
            at_most("stages.hold_us", stage.hold_us, WHOLE_MAX)?;
            at_most("stages.spread_us", stage.spread_us.unwrap_or(0), WHOLE_MAX)?;
        }
        let in_order = self.stages.is_sorted_by_key(|stage| stage.kind);
        let ends = [StageKind::Publish, StageKind::Stop, StageKind::Leave];
        let once = ends.iter().all(|kind| {
            self.stages
                .iter()
                .filter(|stage| stage.kind == *kind)
                .count()
                == 1
        });
        if in_order && once {
            Ok(())
        } else {
            Err(MalformedMessage::new(
                "stages: publish, baseline, tiers, stop and leave come in this order",
            ))
        }
    }
}

/// One step of the run, which all hosts do at the same time. Before each stage there is a barrier.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedStage {
    pub kind: StageKind,
    /// Name in the result. For a tier it consists of its number, from 1, and its subscribers.
    pub name: String,
    /// Subscribers of this host in a baseline or a tier, over all rooms. They are the first ones in
    /// its joining order.
    pub subscribers: u32,
    /// Time from the end of this host's joining to its hold. A host with fewer joins than another
    /// has a longer one, so that all hosts hold at the same time.
    pub warmup_us: u64,
    /// Time that is measured.
    pub hold_us: u64,
    /// Time over which its joins or leaves are spread; `null`: they go at the scenario's rate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spread_us: Option<u64>,
}

/// Kinds of stages, in the order in which they occur.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StageKind {
    /// Publishers join and publish.
    Publish,
    /// One subscriber of each vantage joins, besides the publishers. There is at most one such
    /// stage.
    Baseline,
    Tier,
    /// Publishers stop sending and stay connected, so that packets under way arrive.
    Stop,
    /// Everybody knows the publishers' final frame counts. Accounts are closed, and everybody
    /// leaves.
    Leave,
}

/// Limits that a run is judged by.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WireJudging {
    /// Largest permitted loss, in per cent.
    pub max_loss_pct: f64,
    /// Target round-trip time; `null`: not judged.
    pub target_rtt_us: Option<u64>,
    /// Thresholds as they are written on the command line.
    pub thresholds: Vec<String>,
    #[serde(default)]
    pub allow_unjudged: bool,
}

impl WireJudging {
    pub fn of(judging: &Judging) -> WireJudging {
        WireJudging {
            max_loss_pct: judging.max_loss_pct,
            target_rtt_us: judging.target_rtt.map(|target| target.as_micros() as u64),
            thresholds: judging
                .thresholds
                .iter()
                .map(Threshold::to_string)
                .collect(),
            allow_unjudged: judging.allow_unjudged,
        }
    }

    pub fn to_judging(&self) -> Result<Judging, MalformedMessage> {
        within("judging.max_loss_pct", self.max_loss_pct, &(0.0..=100.0))?;
        self.target_rtt_us.map_or(Ok(()), |us| {
            at_most("judging.target_rtt_us", us, 60_000_000)
        })?;
        few("judging.thresholds", self.thresholds.len(), TEXTS_MAX)?;
        let threshold = |text: &String| {
            Threshold::from_str(text)
                .map_err(|why| MalformedMessage::new(format!("judging.thresholds: {why}")))
        };
        Ok(Judging {
            max_loss_pct: self.max_loss_pct,
            target_rtt: self.target_rtt_us.map(Duration::from_micros),
            thresholds: self
                .thresholds
                .iter()
                .map(threshold)
                .collect::<Result<_, _>>()?,
            allow_unjudged: self.allow_unjudged,
        })
    }
}

/// `POST /tokens/{prover_id}`: room tokens for the prober's own participants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokensRequest {
    /// Position of the first participant in the joining order
    /// ([`crate::plan::ParticipantPlan::position`]), from 0.
    pub from: u32,
    pub count: u32,
}

impl ProtocolMessage for TokensRequest {
    fn check(&self) -> Result<(), MalformedMessage> {
        at_most("count", self.count.into(), TOKENS_MAX.into())
    }
}

/// Answer to [`TokensRequest`], in the same order. Never printed.
#[derive(Clone, Serialize, Deserialize)]
pub struct TokensReply {
    pub tokens: Vec<String>,
    /// Lifetime from now on, in seconds. It is long enough for the next tier's joins; for later
    /// joins the prober asks again.
    pub lifetime_seconds: u64,
}

impl fmt::Debug for TokensReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokensReply({} tokens)", self.tokens.len())
    }
}

impl ProtocolMessage for TokensReply {
    fn check(&self) -> Result<(), MalformedMessage> {
        few("tokens", self.tokens.len(), TOKENS_MAX as usize)?;
        self.tokens
            .iter()
            .try_for_each(|token| text("tokens", token))
    }
}

/// `POST /beat/{prover_id}`: sent once a second, at each change of stage, and more often while the
/// prober waits at a barrier.
///
/// All its content is cumulative, so a beat may be lost, repeated or late. The beat with the
/// highest `seq` holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BeatMessage {
    /// Sequence number, starting at 1.
    pub seq: u64,
    /// When this beat was sent, by the prober's clock.
    pub sent_at_us: u64,
    /// The previous exchange, if there was one. It tells the coordinator the prober's clock.
    #[serde(default)]
    pub exchange: Option<Exchange>,
    /// Stage under way, as an index into [`Job::stages`]; `null` before the first.
    pub stage: Option<u32>,
    /// Stage that the prober is ready for, having finished all stages before it.
    pub ready_for: Option<u32>,
    /// Tiers with more data than in the last beat that was answered.
    #[serde(default)]
    pub tiers: Vec<TierSoFar>,
    pub live: LiveSecond,
    /// All frame counts of this prober's publishers that changed since the last answered beat.
    #[serde(default)]
    pub frames: Vec<FrameCountEntry>,
    /// Delay of each stage's start behind the ordered time, on this host and by its clock.
    #[serde(default)]
    pub starts: Vec<Start>,
    /// Reasons why this generator is the limit, as far as they are known; empty while it keeps up.
    #[serde(default)]
    pub invalid: Vec<String>,
    /// Threshold that failed on this host and ends the run for all, with the value that was
    /// measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broken: Option<String>,
}

impl ProtocolMessage for BeatMessage {
    fn check(&self) -> Result<(), MalformedMessage> {
        at_most("seq", self.seq, WHOLE_MAX)?;
        at_most("sent_at_us", self.sent_at_us, WHOLE_MAX)?;
        self.exchange.as_ref().map_or(Ok(()), Exchange::check)?;
        stage_index("stage", self.stage)?;
        stage_index("ready_for", self.ready_for)?;
        few("tiers", self.tiers.len(), STAGES_MAX)?;
        self.tiers.iter().try_for_each(TierSoFar::check)?;
        self.live.check()?;
        few("frames", self.frames.len(), FRAME_COUNTS_MAX)?;
        few("starts", self.starts.len(), STAGES_MAX)?;
        self.starts.iter().try_for_each(Start::check)?;
        texts("invalid", &self.invalid)?;
        self.broken
            .as_ref()
            .map_or(Ok(()), |broken| text("broken", broken))
    }
}

/// Four time stamps of one beat and its answer, as in NTP (RFC 5905, section 8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exchange {
    /// [`BeatReply::life`] of the coordinator that answered.
    pub life: u64,
    /// When the beat was sent, by the prober's clock.
    pub sent_at_us: u64,
    /// When the beat was received, by the coordinator's clock.
    pub received_at_us: u64,
    /// When the answer was sent, by the coordinator's clock.
    pub replied_at_us: u64,
    /// When the answer was received, by the prober's clock.
    pub heard_at_us: u64,
}

impl Exchange {
    fn check(&self) -> Result<(), MalformedMessage> {
        let stamps = [
            self.life,
            self.sent_at_us,
            self.received_at_us,
            self.replied_at_us,
            self.heard_at_us,
        ];
        stamps
            .into_iter()
            .try_for_each(|stamp| at_most("exchange", stamp, WHOLE_MAX))?;
        if self.heard_at_us < self.sent_at_us || self.replied_at_us < self.received_at_us {
            Err(MalformedMessage::new(
                "exchange: an answer before its question",
            ))
        } else {
            Ok(())
        }
    }
}

/// Measurements of one host so far, for a baseline or a tier.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TierSoFar {
    /// Index into [`Job::stages`].
    pub stage: u32,
    /// Number of this host's participants in the tier.
    pub participants: u32,
    /// Length of the tier's hold; in totals, length of the whole run.
    pub seconds: f64,
    /// Whether the hold is over, so that no more data follows.
    #[serde(default)]
    pub complete: bool,
    /// Counts since the hold began.
    pub record: RecordWire,
}

impl TierSoFar {
    fn check(&self) -> Result<(), MalformedMessage> {
        stage_index("tiers.stage", Some(self.stage))?;
        at_most(
            "tiers.participants",
            self.participants.into(),
            PARTICIPANTS_MAX,
        )?;
        within("tiers.seconds", self.seconds, &(0.0..=SECONDS_MAX))
    }
}

/// Last second of one host. `null` is unknown, which is not zero.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LiveSecond {
    /// Number of participants that are in their rooms now.
    pub participants: u32,
    pub packets_sent_per_second: Option<f64>,
    pub packets_received_per_second: Option<f64>,
    pub bits_sent_per_second: Option<f64>,
    pub bits_received_per_second: Option<f64>,
    /// Share of all media lost so far, 0 to 1.
    pub loss: Option<f64>,
    /// Median round-trip time.
    pub rtt_us: Option<u64>,
    /// 99th percentile of one-way latency.
    pub latency_us_p99: Option<u64>,
    /// 99th percentile of the lateness of the engine's ticks.
    pub tick_late_us_p99: Option<u64>,
}

impl LiveSecond {
    fn check(&self) -> Result<(), MalformedMessage> {
        at_most(
            "live.participants",
            self.participants.into(),
            PARTICIPANTS_MAX,
        )?;
        let rates = [
            self.packets_sent_per_second,
            self.packets_received_per_second,
            self.bits_sent_per_second,
            self.bits_received_per_second,
        ];
        rates
            .into_iter()
            .flatten()
            .try_for_each(|rate| within("live: a rate", rate, &(0.0..=1e15)))?;
        self.loss
            .map_or(Ok(()), |loss| within("live.loss", loss, &(0.0..=1.0)))?;
        let micros = [self.rtt_us, self.latency_us_p99, self.tick_late_us_p99];
        micros
            .into_iter()
            .flatten()
            .try_for_each(|us| at_most("live: a time", us, WHOLE_MAX))
    }
}

/// Frame count of one layer of one track since it began. The fields are: origin
/// ([`crate::plan::ParticipantPlan::index`]), track (0: audio, 1: video), layer, frames sent, and
/// frames that it owes and never sent because its source is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrameCountEntry(pub u32, pub u8, pub u8, pub u64, #[serde(default)] pub u64);

/// When a stage began on one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    pub stage: u32,
    /// Time from the ordered start, as the prober knew it, to the actual start. Negative: it began
    /// early.
    pub skew_us: i64,
}

impl Start {
    fn check(&self) -> Result<(), MalformedMessage> {
        stage_index("starts.stage", Some(self.stage))?;
        at_most("starts.skew_us", self.skew_us.unsigned_abs(), WHOLE_MAX)
    }
}

/// Answer to [`BeatMessage`]. The beat's content is in the journal.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BeatReply {
    /// Sequence number of the beat that is answered.
    pub seq: u64,
    /// Random id of this coordinator process. Times of different lives cannot be compared.
    pub life: u64,
    /// When the beat was received, by the coordinator's clock.
    pub received_at_us: u64,
    /// When this answer was sent, by the coordinator's clock.
    pub replied_at_us: u64,
    pub order: Order,
    /// Frame counts of other vantages' publishers: all of them, or, once the prober has some, at
    /// least those that changed.
    #[serde(default)]
    pub frames: Vec<FrameCountEntry>,
    /// Clock offsets of the vantages whose clock is known.
    #[serde(default)]
    pub clocks: Vec<VantageClock>,
    /// Vantages that the run goes on without. The counts of their publishers no longer change.
    #[serde(default)]
    pub missing: Vec<u32>,
}

impl ProtocolMessage for BeatReply {
    fn check(&self) -> Result<(), MalformedMessage> {
        for (name, value) in [
            ("seq", self.seq),
            ("life", self.life),
            ("received_at_us", self.received_at_us),
            ("replied_at_us", self.replied_at_us),
        ] {
            at_most(name, value, WHOLE_MAX)?;
        }
        self.order.check()?;
        few("frames", self.frames.len(), FRAME_COUNTS_MAX)?;
        few("clocks", self.clocks.len(), PROBERS_MAX)?;
        few("missing", self.missing.len(), PROBERS_MAX)?;
        self.clocks.iter().try_for_each(VantageClock::check)
    }
}

/// Instruction to a prober.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "lowercase")]
pub enum Order {
    /// Go on with the stage under way. At its end keep the state that it reached, and wait.
    Wait,
    /// Begin this stage at this time by the coordinator's clock, or at once if the time has passed.
    /// The order is repeated until the prober says that it is in the stage.
    Start { stage: u32, at_us: u64 },
    /// End the load now, and report.
    Stop { reason: String },
}

impl Order {
    fn check(&self) -> Result<(), MalformedMessage> {
        match self {
            Order::Wait => Ok(()),
            Order::Start { stage, at_us } => stage_index("order.stage", Some(*stage))
                .and_then(|()| at_most("order.at_us", *at_us, WHOLE_MAX)),
            Order::Stop { reason } => text("order.reason", reason),
        }
    }
}

/// Offset of a vantage's clock from the coordinator's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VantageClock {
    /// Index into [`Job::vantages`].
    pub vantage: u32,
    /// The coordinator's clock minus the vantage's.
    pub offset_us: i64,
    /// Largest distance of the true offset from `offset_us`, on either side.
    pub uncertainty_us: u64,
}

impl VantageClock {
    fn check(&self) -> Result<(), MalformedMessage> {
        at_most("clocks.vantage", self.vantage.into(), PROBERS_MAX as u64)?;
        at_most("clocks.offset_us", self.offset_us.unsigned_abs(), WHOLE_MAX)?;
        at_most("clocks.uncertainty_us", self.uncertainty_us, WHOLE_MAX)
    }
}

/// `POST /report/{prover_id}`: everything that a prober has found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProberReport {
    pub vantage: Option<String>,
    /// One step for each tier, as `voicegw` has them.
    pub steps: Vec<ClientStep>,
    /// The same for one participant alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline: Option<ClientStep>,
    /// Report of our own probers; absent in others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throng: Option<FinalReport>,
}

impl ProtocolMessage for ProberReport {
    fn check(&self) -> Result<(), MalformedMessage> {
        self.vantage
            .as_ref()
            .map_or(Ok(()), |vantage| label("vantage", vantage))?;
        few("steps", self.steps.len(), TIERS_MAX)?;
        self.steps
            .iter()
            .chain(&self.baseline)
            .try_for_each(ClientStep::check)?;
        self.throng.as_ref().map_or(Ok(()), FinalReport::check)
    }
}

/// One tier as `voicegw` reports it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClientStep {
    pub clients: u32,
    /// Round-trip time. `voicegw` writes 0 if it measured none; then `samples` is 0.
    pub rtt_ms: Option<f64>,
    /// Loss in per cent. `voicegw` always sends 0, because it does not measure loss.
    pub loss_pct: Option<f64>,
    /// `Excellent`, `Good`, `Unknown`, `Poor` or `Lost`.
    #[serde(default)]
    pub quality: Option<String>,
    /// Number of round trips that `rtt_ms` is based on.
    #[serde(default)]
    pub samples: Option<u64>,
    /// Statistic that `rtt_ms` is.
    #[serde(default)]
    pub rtt_stat: Option<String>,
}

impl ClientStep {
    fn check(&self) -> Result<(), MalformedMessage> {
        at_most("steps.clients", self.clients.into(), PARTICIPANTS_MAX)?;
        self.rtt_ms
            .map_or(Ok(()), |rtt| within("steps.rtt_ms", rtt, &(0.0..=1e9)))?;
        self.loss_pct.map_or(Ok(()), |loss| {
            within("steps.loss_pct", loss, &(0.0..=100.0))
        })?;
        self.samples.map_or(Ok(()), |samples| {
            at_most("steps.samples", samples, WHOLE_MAX)
        })?;
        self.quality
            .as_ref()
            .map_or(Ok(()), |quality| label("steps.quality", quality))?;
        self.rtt_stat
            .as_ref()
            .map_or(Ok(()), |stat| label("steps.rtt_stat", stat))
    }
}

/// Result of a whole run on one host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FinalReport {
    pub verdict: WireVerdict,
    /// Reasons for the verdict; empty for a PASS.
    pub reasons: Vec<String>,
    /// Why the run ended before its time on this host; `null` if it did not.
    pub partial: Option<String>,
    /// Whether the generator kept up. If not, nothing that this host measured says anything about
    /// the server.
    pub valid: bool,
    pub invalid: Vec<String>,
    /// Baseline and tiers, as far as they took place.
    pub tiers: Vec<TierReport>,
    /// Totals of the whole run.
    pub totals: TierSoFar,
    pub engine: EngineShort,
    pub notes: Vec<String>,
    /// Reasons why joins failed, with counts.
    pub failures: Vec<(String, u64)>,
}

impl FinalReport {
    fn check(&self) -> Result<(), MalformedMessage> {
        texts("throng.reasons", &self.reasons)?;
        texts("throng.invalid", &self.invalid)?;
        texts("throng.notes", &self.notes)?;
        self.partial
            .as_ref()
            .map_or(Ok(()), |why| text("throng.partial", why))?;
        few("throng.tiers", self.tiers.len(), STAGES_MAX)?;
        for tier in &self.tiers {
            tier.measured.check()?;
            texts("throng.tiers.reasons", &tier.reasons)?;
        }
        self.totals.check()?;
        few("throng.failures", self.failures.len(), TEXTS_MAX)?;
        for (why, count) in &self.failures {
            text("throng.failures", why)?;
            at_most("throng.failures", *count, WHOLE_MAX)?;
        }
        self.engine.check()
    }
}

/// One tier of one host with its verdict.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TierReport {
    pub measured: TierSoFar,
    pub verdict: WireVerdict,
    pub reasons: Vec<String>,
}

/// Load of a generator. `null` is unknown.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EngineShort {
    pub threads: u32,
    pub cpu_seconds: Option<f64>,
    pub us_per_packet: Option<f64>,
    pub bytes_per_participant: Option<u64>,
    pub rss_peak_bytes: Option<u64>,
}

impl EngineShort {
    fn check(&self) -> Result<(), MalformedMessage> {
        let floats = [self.cpu_seconds, self.us_per_packet];
        floats
            .into_iter()
            .flatten()
            .try_for_each(|value| within("throng.engine", value, &(0.0..=1e12)))?;
        let wholes = [self.bytes_per_participant, self.rss_peak_bytes];
        wholes
            .into_iter()
            .flatten()
            .try_for_each(|value| at_most("throng.engine", value, WHOLE_MAX))
    }
}

/// A [`Verdict`] that is sent by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WireVerdict(pub Verdict);

impl Serialize for WireVerdict {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.0.name())
    }
}

impl<'de> Deserialize<'de> for WireVerdict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<WireVerdict, D::Error> {
        let name = String::deserialize(deserializer)?;
        let all = [
            Verdict::Pass,
            Verdict::Fail,
            Verdict::Invalid,
            Verdict::Partial,
        ];
        let known = all.into_iter().find(|verdict| verdict.name() == name);
        known
            .map(WireVerdict)
            .ok_or_else(|| D::Error::custom("verdict: PASS, FAIL, INVALID or PARTIAL"))
    }
}

/// Answer to [`ProberReport`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reported {
    pub ok: bool,
    pub all_reported: bool,
}

impl ProtocolMessage for Reported {
    fn check(&self) -> Result<(), MalformedMessage> {
        Ok(())
    }
}

/// Answer to `POST /leave/{prover_id}`: the prober no longer takes part. If not everybody is in
/// yet, its place is free again. Otherwise it counts as missing from now on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Departed {
    pub ok: bool,
}

impl ProtocolMessage for Departed {
    fn check(&self) -> Result<(), MalformedMessage> {
        Ok(())
    }
}

/// Answer to `POST /cancel`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cancelled {
    /// Number of probers that are told to stop with their next beat.
    pub stopping: u32,
}

impl ProtocolMessage for Cancelled {
    fn check(&self) -> Result<(), MalformedMessage> {
        Ok(())
    }
}

/// Answer to `GET /health`, for anybody who asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// Whether beats and reports are being journaled. If not, the answer's status is 503.
    pub ok: bool,
    pub version: String,
    pub protocol: u32,
    /// `gathering`, `running`, `stopping` or `over`.
    pub phase: String,
    pub registered: u32,
    pub expected: u32,
    /// Description of the problem; `null` if there is none.
    pub problem: Option<String>,
}

impl ProtocolMessage for Health {
    fn check(&self) -> Result<(), MalformedMessage> {
        label("version", &self.version)?;
        label("phase", &self.phase)
    }
}

/// Returns the error that says why two programs of different versions do not work together.
pub fn other_version(whose: &str, protocol: u32, other: &str) -> MalformedMessage {
    MalformedMessage::new(format!(
        "the {whose} speaks version {protocol} of the protocol, this {other} (throng {}) speaks version {VERSION}: run the same throng on all hosts",
        crate::report::VERSION
    ))
}

/// Checks a short text, which must not contain control characters.
fn label(name: &str, text: &str) -> Result<(), MalformedMessage> {
    let fits = (1..=LABEL_BYTES_MAX).contains(&text.len()) && !text.chars().any(char::is_control);
    if fits {
        Ok(())
    } else {
        Err(MalformedMessage::new(format!(
            "{name}: 1 to {LABEL_BYTES_MAX} bytes without control characters"
        )))
    }
}

fn text(name: &str, text: &str) -> Result<(), MalformedMessage> {
    few(name, text.len(), TEXT_BYTES_MAX)
}

fn texts(name: &str, texts: &[String]) -> Result<(), MalformedMessage> {
    few(name, texts.len(), TEXTS_MAX)?;
    texts.iter().try_for_each(|one| text(name, one))
}

fn few(name: &str, count: usize, most: usize) -> Result<(), MalformedMessage> {
    at_most(name, count as u64, most as u64)
}

fn at_most(name: &str, value: u64, most: u64) -> Result<(), MalformedMessage> {
    if value <= most {
        Ok(())
    } else {
        Err(MalformedMessage::new(format!("{name}: at most {most}")))
    }
}

/// Checks that a value lies in a range. NaN lies in none.
fn within(
    name: &str,
    value: f64,
    range: &std::ops::RangeInclusive<f64>,
) -> Result<(), MalformedMessage> {
    if range.contains(&value) {
        Ok(())
    } else {
        Err(MalformedMessage::new(format!(
            "{name}: {} to {}",
            range.start(),
            range.end()
        )))
    }
}

fn stage_index(name: &str, stage: Option<u32>) -> Result<(), MalformedMessage> {
    stage.map_or(Ok(()), |stage| {
        at_most(name, stage.into(), STAGES_MAX as u64)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_the_other_side_stay_on_their_line() {
        let body = br#"{"error": "no\u001b[2J\r\nRESULT: PASS\n\u202e"}"#;
        let refusal: RefusalMessage = read(body).unwrap();
        assert_eq!(refusal.error, "no [2J  RESULT: PASS");
        let plain: RefusalMessage = read(br#"{"error": "no"}"#).unwrap();
        assert_eq!(plain.error, "no");
    }

    #[test]
    fn a_job_with_a_figure_that_is_none_is_refused() {
        let job = |name: &str, value: &str| {
            let mut text = r#"{"ready":true,"room":"r","ramp":[3],"duration":5.0,"target_rtt_ms":50.0,"max_loss":1.0,"start_at":7.0}"#.to_owned();
            let from = text.find(&format!("\"{name}\":")).unwrap() + name.len() + 3;
            let to = from + text[from..].find([',', '}']).unwrap();
            text.replace_range(from..to, value);
            read::<JobReply>(text.as_bytes())
        };
        for name in ["duration", "target_rtt_ms", "max_loss", "start_at"] {
            assert!(job(name, "1.0").is_ok(), "{name}");
            for odd in ["NaN", "Infinity", "-1", "1e300", "1e400"] {
                assert!(job(name, odd).is_err(), "{name}: {odd}");
            }
        }
    }

    #[test]
    fn judging_survives_the_trip_and_thresholds_are_read_where_they_arrive() {
        let wire = WireJudging {
            allow_unjudged: false,
            max_loss_pct: 2.5,
            target_rtt_us: Some(50_000),
            thresholds: vec!["audio.one_way_latency.p95<150ms".to_owned()],
        };
        assert_eq!(WireJudging::of(&wire.to_judging().unwrap()), wire);
        for (thresholds, max_loss_pct) in [
            (vec!["audio.nothing<1ms".to_owned()], 1.0),
            (Vec::new(), f64::NAN),
            (Vec::new(), -1.0),
        ] {
            let wire = WireJudging {
                allow_unjudged: false,
                max_loss_pct,
                target_rtt_us: None,
                thresholds,
            };
            assert!(wire.to_judging().is_err());
        }
    }

    /// Returns a job that a prober accepts.
    fn job() -> Job {
        let placed = crate::coordinator::place::tests::load(&[2]);
        let placed = placed.place(vec![Default::default()]).unwrap();
        Job {
            protocol: VERSION,
            run_tag: 1,
            vantages: vec!["fra".to_owned()],
            me: 0,
            scenario: placed.scenario,
            placement: placed.placement,
            stages: placed.stages[0].clone(),
            judging: WireJudging::of(&Judging::default()),
            url: None,
            tokens: false,
            rooms_made: false,
            patience_us: 1,
        }
    }

    #[test]
    fn a_job_carries_the_scenario_and_refuses_what_no_command_line_makes() {
        let whole = job();
        let text = serde_json::to_string(&whole).unwrap();
        let read: Job = serde_json::from_str(&text).unwrap();
        assert_eq!(read.scenario, whole.scenario);
        assert_eq!(read.check(), Ok(()));
        let mut broken = whole;
        broken.scenario.media.video.frames_per_second = 61;
        let why = broken.check().unwrap_err().to_string();
        assert_eq!(
            why,
            "scenario.media.video.frames_per_second 61 is out of range: write 1 to 60 frames a second"
        );
        let unknown = text.replacen("\"scenario\":{", "\"scenario\":{\"sede\":1,", 1);
        let why = serde_json::from_str::<Job>(&unknown).unwrap_err();
        assert!(why.to_string().contains("sede"), "{why}");
    }

    #[test]
    fn ids_are_opaque_and_harmless() {
        assert_eq!(serde_json::from_str::<ProverId>("7").unwrap().as_str(), "7");
        assert_eq!(
            serde_json::from_str::<ProverId>("\"a-B_9\"")
                .unwrap()
                .as_str(),
            "a-B_9"
        );
        for text in ["\"\"", "\"a/b\"", "\"a b\"", "-1", "1.5", "null", "[]"] {
            assert!(serde_json::from_str::<ProverId>(text).is_err(), "{text}");
        }
        assert!(ProverId::new("x".repeat(65)).is_none());
    }

    #[test]
    fn what_is_not_known_is_left_out_and_what_is_missing_is_said() {
        let voicegw = read::<Register>(br#"{"vantage": null, "later": {"x": 1}}"#).unwrap();
        assert_eq!(
            (
                voicegw.vantage,
                voicegw.protocol,
                voicegw.role,
                voicegw.weight
            ),
            (None, None, HostRole::Both, 1)
        );
        let why = read::<BeatMessage>(br#"{"seq": 1}"#)
            .unwrap_err()
            .to_string();
        assert!(why.contains("sent_at_us"), "{why}");
        let exchange = r#"{"life": 1, "sent_at_us": 5, "received_at_us": 1, "replied_at_us": 2, "heard_at_us": 4}"#;
        let beat = format!(
            r#"{{"seq": 1, "sent_at_us": 1, "stage": null, "ready_for": null, "live": {{}}, "exchange": {exchange}}}"#
        );
        let why = read::<BeatMessage>(beat.as_bytes())
            .unwrap_err()
            .to_string();
        assert!(why.contains("an answer before its question"), "{why}");
    }

    #[test]
    fn a_verdict_goes_by_its_name() {
        for verdict in [
            Verdict::Pass,
            Verdict::Fail,
            Verdict::Invalid,
            Verdict::Partial,
        ] {
            let text = serde_json::to_string(&WireVerdict(verdict)).unwrap();
            assert_eq!(
                serde_json::from_str::<WireVerdict>(&text).unwrap(),
                WireVerdict(verdict)
            );
        }
        assert!(serde_json::from_str::<WireVerdict>("\"pass\"").is_err());
    }
}
