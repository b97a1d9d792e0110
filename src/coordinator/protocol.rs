//! What coordinator and probers say to each other: JSON over HTTP, the paths and names of `voicegw
//! livekit sfu` with ours beside them.
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
//! What is refused is answered with a status of 4xx or 5xx and a [`RefusalMessage`].
//!
//! **Versions.** A prober of ours names the version of the protocol that it speaks
//! ([`Register::protocol`]); the coordinator refuses every other than [`VERSION`] with a text that
//! names both, before it has handed out anything. So does a prober with the version in
//! [`Job::protocol`]. A prober that names none is `voicegw`'s own: it is asked for nothing but its
//! steps. Within one version fields are only added: readers leave out what they do not know, and
//! what is absent has the meaning that its documentation states.
//!
//! **Clocks.** A time is in microseconds since 1970, a duration in microseconds, unless its name
//! says otherwise. Whose clock it is stands with each: nobody's is trusted, and none is read here.
//! A process derives all its times from one reading of the wall clock and the monotonic clock, so
//! that they never step while it lives; the coordinator's next life ([`BeatReply::life`]) may tell
//! other times.
//!
//! **Hostile input.** [`read`] is the only way in: what it returns lies within the bounds of this
//! module. JSON knows no NaN and no infinity.

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

/// Where a prober finds its coordinator, and what lets it in, if no flag says so.
pub const URL_VARIABLE: &str = "COORDINATOR_URL";
pub const TOKEN_VARIABLE: &str = "COORDINATOR_TOKEN";

/// As many hosts as one plan is dealt to.
pub const PROBERS_MAX: usize = VANTAGES_MAX;
/// A ramp of more tiers than these is no ramp.
pub const TIERS_MAX: usize = 100;
pub const STAGES_MAX: usize = TIERS_MAX + 4;
/// Tokens in one request.
pub const TOKENS_MAX: u32 = 1_000;
/// A prober bears so many times the silence after which a coordinator calls a prober missing.
pub const PATIENCE_SILENCES: u32 = 4;
/// Frame counts in one message: origins, tracks and layers.
pub const FRAME_COUNTS_MAX: usize = 200_000;
/// Longest name, label or other short text, in bytes.
pub const LABEL_BYTES_MAX: usize = 128;
/// Longest reason, note or other sentence, in bytes; and how many of them a message may have.
pub const TEXT_BYTES_MAX: usize = 2_048;
pub const TEXTS_MAX: usize = 1_000;
/// Whole numbers that every reader of JSON keeps exactly.
pub const WHOLE_MAX: u64 = (1 << 53) - 1;
/// The longest run or part of it.
const SECONDS_MAX: f64 = 366.0 * 24.0 * 3600.0;

/// Bodies of requests, in bytes. Of a beat most is one [`RecordWire`], some 30 KiB.
pub const REGISTER_BYTES_MAX: usize = 4 << 10;
pub const BEAT_BYTES_MAX: usize = 8 << 20;
pub const REPORT_BYTES_MAX: usize = 64 << 20;

/// A message that comes from the other side.
pub trait ProtocolMessage: DeserializeOwned {
    /// What its fields mean together, and the bounds of each.
    fn check(&self) -> Result<(), MalformedMessage>;
}

/// Why a message was refused; says which field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct MalformedMessage(String);

impl MalformedMessage {
    pub fn new(why: impl fmt::Display) -> MalformedMessage {
        MalformedMessage(why.to_string())
    }
}

/// Reads a message, and refuses what no prober or coordinator of this version says.
pub fn read<M: ProtocolMessage>(body: &[u8]) -> Result<M, MalformedMessage> {
    let mut message: M = serde_json::from_slice(body).map_err(MalformedMessage::new)?;
    message.check()?;
    if may_move_a_cursor(body) {
        // Texts are shown to people. Read again, because only values can be gone through.
        let mut value = serde_json::from_slice(body).map_err(MalformedMessage::new)?;
        put_on_lines(&mut value);
        message = serde_json::from_value(value).map_err(MalformedMessage::new)?;
        message.check()?;
    }
    Ok(message)
}

/// Whether there is more in a message than plain ASCII: JSON writes control characters with a
/// backslash.
fn may_move_a_cursor(body: &[u8]) -> bool {
    body.iter().any(|byte| *byte == b'\\' || !byte.is_ascii())
}

/// Each text on one line, without what moves a terminal's cursor.
fn put_on_lines(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::String(text) => *text = words::one_line(text),
        serde_json::Value::Array(values) => values.iter_mut().for_each(put_on_lines),
        serde_json::Value::Object(fields) => fields.values_mut().for_each(put_on_lines),
        _ => {}
    }
}

/// The answer to what was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusalMessage {
    /// For people: what is wrong and what to do.
    pub error: String,
}

impl ProtocolMessage for RefusalMessage {
    fn check(&self) -> Result<(), MalformedMessage> {
        text("error", &self.error)
    }
}

/// How the coordinator calls a prober. Opaque: ours are random, `voicegw`'s coordinator counts from
/// 0.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct ProverId(String);

impl ProverId {
    /// `None`: longer than any that is given out, or not of letters, digits, `-` and `_`.
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

/// `POST /register`: a prober wants to take part.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Register {
    /// Where the prober stands, as the result names it; two must not share one. `voicegw` allows
    /// `null`: such a prober gets a label.
    pub vantage: Option<String>,
    /// [`VERSION`] of the prober; absent: it is `voicegw`'s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<u32>,
    /// The program's version, for people to read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Random, of this process: who registers again with it gets what it got before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    #[serde(default)]
    pub role: HostRole,
    /// This host counts as so many of weight 1.
    #[serde(default = "one")]
    pub weight: u32,
    /// The prober has no API key and wants its room tokens from the coordinator.
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

/// The answer to [`Register`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registered {
    pub prover_id: ProverId,
    /// Probers that the run waits for.
    pub expected: u32,
    /// [`VERSION`] of the coordinator; absent: it is `voicegw`'s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<u32>,
}

impl ProtocolMessage for Registered {
    fn check(&self) -> Result<(), MalformedMessage> {
        at_most("expected", self.expected.into(), PROBERS_MAX as u64)
    }
}

/// `GET /job/{prover_id}`: what there is to do, once everybody is in.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JobReply {
    pub room: String,
    /// Subscribers per room of this prober, tier by tier.
    pub ramp: Vec<u32>,
    /// Length of a tier, in seconds.
    pub duration: f64,
    /// `voicegw`'s probers want a number: its own default where round-trip times are not judged.
    pub target_rtt_ms: f64,
    /// Per cent.
    pub max_loss: f64,
    /// In seconds since 1970 by the coordinator's clock; `null` until everybody is in. Ours wait
    /// for [`Order::Start`] instead.
    pub start_at: Option<f64>,
    /// Everybody is in.
    pub ready: bool,
    /// For probers of ours, once everybody is in.
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

/// The run as a prober of ours plays its part in it. The same for all but `me` and `stages`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// [`VERSION`] of the coordinator.
    pub protocol: u32,
    /// Tells runs apart in identities and room names.
    pub run_tag: u32,
    /// The labels of all that play the plan; elsewhere a vantage is its index in here.
    pub vantages: Vec<String>,
    /// The index of this prober.
    pub me: u32,
    /// The run, with the participants of all vantages. Unlike elsewhere, a field of it that is not
    /// known is refused: who left it out would play another run.
    pub scenario: Scenario,
    /// Which of them are whose ([`crate::plan::Part::new`]): one entry each of `vantages`, in the
    /// same order.
    pub placement: Placement,
    /// From the first to the last, as this prober plays them.
    pub stages: Vec<SharedStage>,
    pub judging: WireJudging,
    /// The server under test; `null`: the prober's own. One that the prober was given itself goes
    /// before it.
    pub url: Option<String>,
    /// The coordinator can make room tokens.
    pub tokens: bool,
    /// The coordinator makes the rooms and deletes them; if not, the server makes them when the
    /// first one joins.
    pub rooms_made: bool,
    /// How long the load may go on without an answer of the coordinator, in microseconds.
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

/// What all hosts do at the same time, one after the other; before each there is a barrier.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedStage {
    pub kind: StageKind,
    /// As the result names it; of a tier its number from 1 and its subscribers.
    pub name: String,
    /// Of this host, over all rooms, in a baseline or a tier: the first so many in its joining
    /// order.
    pub subscribers: u32,
    /// From the end of this host's joining to its hold. A host with fewer joins than another has a
    /// longer one, so that all hold at the same time.
    pub warmup_us: u64,
    /// What is measured.
    pub hold_us: u64,
    /// Its joins, or leaves, are spread over this; `null`: they go at the scenario's rate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spread_us: Option<u64>,
}

/// In the order in which they come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StageKind {
    /// Publishers join and publish.
    Publish,
    /// One subscriber of each vantage besides the publishers. At most one such stage.
    Baseline,
    Tier,
    /// Publishers stop sending and stay connected; what is under way arrives.
    Stop,
    /// Publishers' final frame counts are known to all: accounts are closed, and everybody leaves.
    Leave,
}

/// What a run is held to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WireJudging {
    /// Per cent.
    pub max_loss_pct: f64,
    /// `null`: not judged.
    pub target_rtt_us: Option<u64>,
    /// As they are written on the command line.
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
    /// The position in its joining order ([`crate::plan::ParticipantPlan::position`]), from 0.
    pub from: u32,
    pub count: u32,
}

impl ProtocolMessage for TokensRequest {
    fn check(&self) -> Result<(), MalformedMessage> {
        at_most("count", self.count.into(), TOKENS_MAX.into())
    }
}

/// The answer to [`TokensRequest`], in the same order. Never printed.
#[derive(Clone, Serialize, Deserialize)]
pub struct TokensReply {
    pub tokens: Vec<String>,
    /// From now on, in seconds. Reaches past the next tier's joins; who joins later asks again.
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

/// `POST /beat/{prover_id}`: once a second, at each change of stage, and more often while the
/// prober waits at a barrier.
///
/// Everything in it is cumulative, so that it may be lost, or come twice, or late: the highest
/// `seq` holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BeatMessage {
    /// From 1, one more each time.
    pub seq: u64,
    /// By the prober's clock, when this left.
    pub sent_at_us: u64,
    /// The exchange before this one, as far as there was one. With it the coordinator knows the
    /// prober's clock.
    #[serde(default)]
    pub exchange: Option<Exchange>,
    /// The stage under way, an index into [`Job::stages`]; `null` before the first.
    pub stage: Option<u32>,
    /// Done with all stages before this one, and ready for it.
    pub ready_for: Option<u32>,
    /// Those of which there is more than in the last beat that was answered.
    #[serde(default)]
    pub tiers: Vec<TierSoFar>,
    pub live: LiveSecond,
    /// Frame counts of this prober's publishers: all that changed since the last answered beat.
    #[serde(default)]
    pub frames: Vec<FrameCountEntry>,
    /// By how much the stages began later than ordered, on this host and by its clock.
    #[serde(default)]
    pub starts: Vec<Start>,
    /// Why this generator is the limit, as far as it is known by now; empty while it keeps up.
    #[serde(default)]
    pub invalid: Vec<String>,
    /// The threshold that ends the run for all, and what it came to: on this host it did not hold.
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

/// Four time stamps of one beat and its answer, as NTP has them (RFC 5905, section 8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exchange {
    /// The coordinator's that answered.
    pub life: u64,
    /// By the prober's clock.
    pub sent_at_us: u64,
    /// By the coordinator's clock.
    pub received_at_us: u64,
    /// By the coordinator's clock.
    pub replied_at_us: u64,
    /// By the prober's clock.
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

/// What one host measured of a baseline or a tier so far.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TierSoFar {
    /// An index into [`Job::stages`].
    pub stage: u32,
    /// Participants of this host that the tier has.
    pub participants: u32,
    /// Length of the tier's hold; in totals, of the whole run.
    pub seconds: f64,
    /// The hold is over: this is all.
    #[serde(default)]
    pub complete: bool,
    /// Counted since the hold began.
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

/// The last second of one host. `null` is unknown, which is not zero.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LiveSecond {
    /// In their rooms now.
    pub participants: u32,
    pub packets_sent_per_second: Option<f64>,
    pub packets_received_per_second: Option<f64>,
    pub bits_sent_per_second: Option<f64>,
    pub bits_received_per_second: Option<f64>,
    /// Share of all media lost so far, 0 to 1.
    pub loss: Option<f64>,
    /// The median.
    pub rtt_us: Option<u64>,
    /// The 99th percentile of one-way latency.
    pub latency_us_p99: Option<u64>,
    /// How late the engine's beat came, the 99th percentile.
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

/// How many frames one layer of one track has sent since it began: origin
/// ([`crate::plan::ParticipantPlan::index`]), track (0: audio, 1: video), layer, frames, and those
/// that it owes and never sent, because its source is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrameCountEntry(pub u32, pub u8, pub u8, pub u64, #[serde(default)] pub u64);

/// When a stage began on one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    pub stage: u32,
    /// After the ordered time as the prober knew it; negative: before.
    pub skew_us: i64,
}

impl Start {
    fn check(&self) -> Result<(), MalformedMessage> {
        stage_index("starts.stage", Some(self.stage))?;
        at_most("starts.skew_us", self.skew_us.unsigned_abs(), WHOLE_MAX)
    }
}

/// The answer to [`BeatMessage`]: what it holds is in the journal.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BeatReply {
    /// Sequence number of the beat that is answered.
    pub seq: u64,
    /// Random, of this process of the coordinator. Times of different lives do not compare.
    pub life: u64,
    /// By the coordinator's clock.
    pub received_at_us: u64,
    /// By the coordinator's clock.
    pub replied_at_us: u64,
    pub order: Order,
    /// Frame counts of other vantages' publishers: all of them, or, once the prober has some, at
    /// least those that changed.
    #[serde(default)]
    pub frames: Vec<FrameCountEntry>,
    /// Clock offsets of the vantages whose clock is known.
    #[serde(default)]
    pub clocks: Vec<VantageClock>,
    /// Vantages without which the run goes on: their publishers' counts stay what they are.
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

/// What a prober is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "lowercase")]
pub enum Order {
    /// Go on with the stage under way; at its end keep what it reached, and wait.
    Wait,
    /// Begin this stage at this time by the coordinator's clock; at once if that has passed.
    /// Repeated until the prober says that it is in it.
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

/// A vantage's clock against the coordinator's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VantageClock {
    /// An index into [`Job::vantages`].
    pub vantage: u32,
    /// The coordinator's clock less the vantage's.
    pub offset_us: i64,
    /// The true offset lies within so much on either side.
    pub uncertainty_us: u64,
}

impl VantageClock {
    fn check(&self) -> Result<(), MalformedMessage> {
        at_most("clocks.vantage", self.vantage.into(), PROBERS_MAX as u64)?;
        at_most("clocks.offset_us", self.offset_us.unsigned_abs(), WHOLE_MAX)?;
        at_most("clocks.uncertainty_us", self.uncertainty_us, WHOLE_MAX)
    }
}

/// `POST /report/{prover_id}`: all that a prober has found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProberReport {
    pub vantage: Option<String>,
    /// As `voicegw` has them, one a tier.
    pub steps: Vec<ClientStep>,
    /// The same of one participant alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline: Option<ClientStep>,
    /// Only probers of ours send this.
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
    /// `voicegw` writes 0 where it measured nothing: then `samples` is 0.
    pub rtt_ms: Option<f64>,
    /// Per cent. Of `voicegw` always 0: it does not measure loss.
    pub loss_pct: Option<f64>,
    /// `Excellent`, `Good`, `Unknown`, `Poor` or `Lost`.
    #[serde(default)]
    pub quality: Option<String>,
    /// Round trips behind `rtt_ms`.
    #[serde(default)]
    pub samples: Option<u64>,
    /// Which statistic `rtt_ms` is.
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

/// A whole run on one host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FinalReport {
    pub verdict: WireVerdict,
    /// Empty for a PASS.
    pub reasons: Vec<String>,
    /// Why the run ended before its time on this host; `null` if it did not.
    pub partial: Option<String>,
    /// The generator kept up. If not, nothing that this host measured says anything about the
    /// server.
    pub valid: bool,
    pub invalid: Vec<String>,
    /// Baseline and tiers, as far as they came.
    pub tiers: Vec<TierReport>,
    /// The whole run.
    pub totals: TierSoFar,
    pub engine: EngineShort,
    pub notes: Vec<String>,
    /// Why joins failed, with counts.
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

/// One tier of one host, judged.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TierReport {
    pub measured: TierSoFar,
    pub verdict: WireVerdict,
    pub reasons: Vec<String>,
}

/// What a generator took. `null` is unknown.
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

/// [`Verdict`] by its name.
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

/// The answer to [`ProberReport`].
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

/// The answer to `POST /leave/{prover_id}`: the prober takes no part. Before all are in its place
/// is free again, after that it is missing from now on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Departed {
    pub ok: bool,
}

impl ProtocolMessage for Departed {
    fn check(&self) -> Result<(), MalformedMessage> {
        Ok(())
    }
}

/// The answer to `POST /cancel`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cancelled {
    /// Probers that are told to stop with their next beat.
    pub stopping: u32,
}

impl ProtocolMessage for Cancelled {
    fn check(&self) -> Result<(), MalformedMessage> {
        Ok(())
    }
}

/// The answer to `GET /health`, for whoever asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// Beats and reports are being journaled. If not, the answer's status is 503.
    pub ok: bool,
    pub version: String,
    pub protocol: u32,
    /// `gathering`, `running`, `stopping` or `over`.
    pub phase: String,
    pub registered: u32,
    pub expected: u32,
    /// What is wrong; `null` if nothing is.
    pub problem: Option<String>,
}

impl ProtocolMessage for Health {
    fn check(&self) -> Result<(), MalformedMessage> {
        label("version", &self.version)?;
        label("phase", &self.phase)
    }
}

/// Why two programs of different versions do not work together.
pub fn other_version(whose: &str, protocol: u32, other: &str) -> MalformedMessage {
    MalformedMessage::new(format!(
        "the {whose} speaks version {protocol} of the protocol, this {other} (throng {}) speaks version {VERSION}: run the same throng on all hosts",
        crate::report::VERSION
    ))
}

/// A short text without control characters.
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

/// NaN is within nothing.
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

    /// A job that a prober takes.
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
