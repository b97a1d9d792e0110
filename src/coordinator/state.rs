//! A run over many hosts as a state machine, without sockets, files or clocks.
//!
//! A prober's message is first checked ([`RunState::register`], [`RunState::beat`], ..). The check
//! changes nothing and returns what is to be remembered: a [`JournalEntry`]. The caller writes it
//! to the journal, and only then applies it ([`RunState::apply`]). Entries that become due with
//! time ([`RunState::due`]) are handled in the same way. The state is therefore a result of its
//! entries alone, and the same entries make the same state. That is how a coordinator that was
//! killed continues. What need not outlive the process (when each prober was heard, the last
//! second's figures) goes directly through [`RunState::hear`].
//!
//! Times are microseconds since 1970 by the coordinator's clock, which never steps while it lives.
//!
//! Time-outs only count silence. The duration of a run is not limited: it is the user's decision.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::clock::{ClockEstimate, Offset};
use super::place::{HostsLoad, PlacedHosts};
use super::protocol::{
    self, BeatMessage, BeatReply, Exchange, FrameCountEntry, Job, JobReply, LiveSecond, Order,
    ProberReport, ProverId, Register, Registered, Reported, SharedStage, StageKind, Start,
    TierSoFar, VantageClock, WireJudging,
};
use crate::plan::VantagePlan;

/// Time between the order of a stage and its start, so that everybody hears of it in time: waiting
/// probers ask five times a second.
const LEAD_US: u64 = 2_000_000;
/// The same for `voicegw`'s probers, which ask once a second.
const LEGACY_LEAD_US: u64 = 3_000_000;
/// `voicegw`'s probers send nothing while they work. They may be silent for twice the length of
/// their tiers, and this time in addition.
const LEGACY_SLACK_US: u64 = 300_000_000;
/// Target round-trip time if none is judged, for `voicegw`'s probers, which need a number. It is
/// `voicegw`'s own default.
const LEGACY_TARGET_RTT_MS: f64 = 50.0;
/// An order further ahead than this was given by a clock that has been set back since.
const AHEAD_US_MAX: u64 = 60_000_000;
/// Longest time between two calls of [`RunState::look`] by a healthy caller. A longer one means
/// that the caller was held up, and that silence in it does not count.
pub const LOOK_US_MAX: u64 = 2_000_000;

/// Behaviour of a run that loses a prober.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnMissing {
    Continue,
    Stop,
}

/// Everything that is fixed before the first prober comes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunSetup {
    pub run_tag: u32,
    pub expect: u32,
    pub on_missing: OnMissing,
    pub load: HostsLoad,
    pub judging: WireJudging,
    /// Server under test, if probers need not know it by themselves.
    pub url: Option<String>,
    /// Whether the coordinator can make room tokens.
    pub tokens: bool,
    /// Whether the coordinator makes and deletes the rooms.
    pub rooms_made: bool,
    /// Silence after which a prober is missing.
    pub silence_us: u64,
    /// Time since the last prober came for which the next one is waited for.
    pub gather_us: u64,
}

impl RunSetup {
    /// Returns the time without a message from the coordinator after which a prober ends its load.
    /// It is longer than [`RunSetup::silence_us`], because somebody has to restart the coordinator.
    pub fn patience_us(&self) -> u64 {
        self.silence_us
            .saturating_mul(protocol::PATIENCE_SILENCES.into())
    }
}

/// Event that is remembered as a line of the journal.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "entry", rename_all = "snake_case")]
pub enum JournalEntry {
    Registered {
        at_us: u64,
        prover_id: ProverId,
        vantage: String,
        register: Register,
    },
    /// A prober left before everybody was in. Its place is free again.
    Left {
        at_us: u64,
        prover_id: ProverId,
    },
    /// Everybody is in.
    Armed {
        at_us: u64,
    },
    /// The rooms exist. `rooms` are those that the coordinator made, and will delete.
    Prepared {
        at_us: u64,
        rooms: Vec<String>,
    },
    Ordered {
        at_us: u64,
        stage: u32,
        start_us: u64,
    },
    /// The part of a beat that must not be lost.
    Beat {
        at_us: u64,
        prover_id: ProverId,
        seq: u64,
        tiers: Vec<TierSoFar>,
        frames: Vec<FrameCountEntry>,
        starts: Vec<Start>,
        invalid: Vec<String>,
        #[serde(default)]
        broken: Option<String>,
    },
    Missing {
        at_us: u64,
        prover_id: ProverId,
        last_heard_us: u64,
        why: String,
    },
    Stopping {
        at_us: u64,
        reason: String,
    },
    Reported {
        at_us: u64,
        prover_id: ProverId,
        report: Box<ProberReport>,
    },
    /// Nothing more will come.
    Over {
        at_us: u64,
    },
}

/// Reason why a request is refused, by what the sender can do about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RefusedRequest {
    /// The request cannot be understood, or contradicts itself.
    #[error("{0}")]
    Malformed(String),
    /// There is no prober of that id.
    #[error("{0}")]
    Unknown(String),
    /// The request does not fit the present state.
    #[error("{0}")]
    Conflict(String),
}

/// Phase of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunPhase {
    /// Waiting for probers.
    Gathering,
    Running,
    /// Everybody is told to stop. Waiting for reports.
    Stopping,
    Over,
}

impl RunPhase {
    pub const fn name(&self) -> &'static str {
        match self {
            RunPhase::Gathering => "gathering",
            RunPhase::Running => "running",
            RunPhase::Stopping => "stopping",
            RunPhase::Over => "over",
        }
    }
}

/// A stage that was ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Underway {
    pub stage: u32,
    pub start_us: u64,
}

/// A prober, and everything that it has reported.
#[derive(Clone, Debug)]
pub struct ProberState {
    pub id: ProverId,
    pub vantage: String,
    pub register: Register,
    pub registered_us: u64,
    /// Its index among the probers that play the plan ([`Job::vantages`]). `None` before everybody
    /// is in, and for `voicegw`'s probers.
    pub player: Option<u32>,
    pub seq: u64,
    pub stage: Option<u32>,
    pub ready_for: Option<u32>,
    /// Measurements by stage.
    pub tiers: BTreeMap<u32, TierSoFar>,
    /// Frame counts by origin, track and layer.
    pub frames: BTreeMap<(u32, u8, u8), Counted>,
    /// Answers that it may still confirm to have heard, the latest last.
    answers: VecDeque<BeatAnswer>,
    /// Version of all frame counts that it is known to have heard.
    frames_heard: u64,
    /// How late it began each stage, in microseconds.
    pub starts: BTreeMap<u32, i64>,
    pub invalid: Vec<String>,
    /// Threshold that failed on this host and ends the run.
    pub broken: Option<String>,
    pub live: LiveSecond,
    pub clock: ClockEstimate,
    /// Time of its last sign of life.
    pub heard_us: u64,
    /// Start of its silence: its last sign of life, or later if nobody listened for some time.
    silent_since_us: u64,
    pub gone: Option<GoneProber>,
    pub report: Option<ProberReport>,
    /// Whether it reported before the others had finished.
    pub left_early: bool,
}

/// Reason why the run goes on without a prober.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GoneProber {
    pub at_us: u64,
    pub last_heard_us: u64,
    pub why: String,
}

/// Frames that a layer has sent, frames that it owes and never sent, and the version of all counts
/// since which this is known.
#[derive(Clone, Copy, Debug)]
pub struct Counted {
    pub count: u64,
    pub unsent: u64,
    version: u64,
}

/// An answer to a beat. The prober identifies it by its time, in the next beat's exchange.
#[derive(Clone, Copy, Debug)]
struct BeatAnswer {
    replied_at_us: u64,
    frames_version: u64,
}

/// Largest number of unconfirmed answers to one prober. A prober waits for an answer before it asks
/// again, so one would be enough if no answer was ever lost.
const ANSWERS_MAX: usize = 8;

fn frame_count((origin, track, layer): &(u32, u8, u8), counted: &Counted) -> FrameCountEntry {
    FrameCountEntry(*origin, *track, *layer, counted.count, counted.unsent)
}

impl ProberState {
    /// Returns whether this is a `voicegw` prober. It is told where and when to begin, and only
    /// reports.
    pub fn is_legacy(&self) -> bool {
        self.register.protocol.is_none()
    }

    /// Returns whether the prober takes part in what is still to come.
    pub fn is_live(&self) -> bool {
        self.gone.is_none() && self.report.is_none()
    }

    pub fn offset(&self) -> Option<Offset> {
        self.clock.offset()
    }

    /// Notes which answer the beat confirms. If the answer was lost, or was sent by another life,
    /// none is confirmed, and the prober gets again what that answer may have contained.
    fn take_heard(&mut self, life: u64, exchange: Option<&Exchange>) {
        let heard = exchange
            .filter(|exchange| exchange.life == life)
            .and_then(|exchange| {
                let mut answers = self.answers.iter();
                answers.find(|answer| answer.replied_at_us == exchange.replied_at_us)
            });
        self.frames_heard = heard.map_or(0, |answer| answer.frames_version);
    }

    fn note_answer(&mut self, answer: BeatAnswer) {
        if self.answers.len() == ANSWERS_MAX {
            self.answers.pop_front();
        }
        self.answers.push_back(answer);
    }

    /// Notes a sign of life. Silence counts from here.
    fn note_life(&mut self, at_us: u64) {
        (self.heard_us, self.silent_since_us) = (at_us, at_us);
    }

    fn keep_tiers(&mut self, tiers: Vec<TierSoFar>) {
        self.tiers
            .extend(tiers.into_iter().map(|tier| (tier.stage, tier)));
    }

    /// Stores frame counts. `version` is the version of all counts that a changed count belongs to.
    fn keep_frames(&mut self, frames: Vec<FrameCountEntry>, version: u64) {
        for FrameCountEntry(origin, track, layer, count, unsent) in frames {
            let key = (origin, track, layer);
            let is_known = |known: &Counted| (known.count, known.unsent) == (count, unsent);
            if !self.frames.get(&key).is_some_and(is_known) {
                let counted = Counted {
                    count,
                    unsent,
                    version,
                };
                self.frames.insert(key, counted);
            }
        }
    }

    fn keep_starts(&mut self, starts: Vec<Start>) {
        self.starts
            .extend(starts.into_iter().map(|start| (start.stage, start.skew_us)));
    }

    /// Returns one entry with the content of all its beats.
    fn said(&self) -> JournalEntry {
        let frames = self.frames.iter();
        JournalEntry::Beat {
            at_us: self.heard_us,
            prover_id: self.id.clone(),
            seq: self.seq,
            tiers: self.tiers.values().cloned().collect(),
            frames: frames
                .map(|(key, counted)| frame_count(key, counted))
                .collect(),
            starts: self
                .starts
                .iter()
                .map(|(stage, skew_us)| Start {
                    stage: *stage,
                    skew_us: *skew_us,
                })
                .collect(),
            invalid: self.invalid.clone(),
            broken: self.broken.clone(),
        }
    }

    fn went(&self) -> Option<JournalEntry> {
        self.gone.as_ref().map(|gone| JournalEntry::Missing {
            at_us: gone.at_us,
            prover_id: self.id.clone(),
            last_heard_us: gone.last_heard_us,
            why: gone.why.clone(),
        })
    }

    fn reported(&self) -> Option<JournalEntry> {
        self.report.as_ref().map(|report| JournalEntry::Reported {
            at_us: self.heard_us,
            prover_id: self.id.clone(),
            report: Box::new(report.clone()),
        })
    }
}

/// A run over many hosts.
#[derive(Clone)]
pub struct RunState {
    setup: RunSetup,
    /// Id of this process.
    life: u64,
    /// Increases with every change of any frame count in this process.
    frames_version: u64,
    probers: Vec<ProberState>,
    phase: RunPhase,
    placed: Option<PlacedHosts>,
    rooms: Option<Vec<String>>,
    /// Stages ordered so far. The last one is under way.
    orders: Vec<Underway>,
    stop_reason: Option<String>,
    /// When everybody was in.
    armed_us: Option<u64>,
    /// When `voicegw`'s probers begin.
    legacy_start_us: Option<u64>,
    /// When the last prober came, or the coordinator began to listen.
    quiet_since_us: u64,
    looked_us: u64,
}

impl RunState {
    pub fn new(setup: RunSetup, life: u64, now_us: u64) -> RunState {
        RunState {
            setup,
            life,
            frames_version: 0,
            probers: Vec::new(),
            phase: RunPhase::Gathering,
            placed: None,
            rooms: None,
            orders: Vec::new(),
            stop_reason: None,
            armed_us: None,
            legacy_start_us: None,
            quiet_since_us: now_us,
            looked_us: now_us,
        }
    }

    /// Resumes after the journal of an earlier life was applied. Silence counts from now. An order
    /// whose start is too far ahead was given by another clock, and is moved to shortly after now.
    pub fn resume(&mut self, now_us: u64) {
        self.quiet_since_us = now_us;
        self.looked_us = now_us;
        self.probers
            .iter_mut()
            .for_each(|prober| prober.silent_since_us = now_us);
        if self
            .legacy_start_us
            .is_some_and(|start_us| start_us > now_us + AHEAD_US_MAX)
        {
            self.legacy_start_us = Some(now_us + LEGACY_LEAD_US);
        }
        if let Some(underway) = self.orders.last_mut()
            && underway.start_us > now_us + AHEAD_US_MAX
        {
            underway.start_us = now_us + LEAD_US;
        }
    }

    pub fn setup(&self) -> &RunSetup {
        &self.setup
    }

    pub fn phase(&self) -> &RunPhase {
        &self.phase
    }

    /// Returns the probers in the order of their registration.
    pub fn probers(&self) -> &[ProberState] {
        &self.probers
    }

    /// Returns the placement once everybody is in.
    pub fn placed(&self) -> Option<&PlacedHosts> {
        self.placed.as_ref()
    }

    pub fn underway(&self) -> Option<Underway> {
        self.orders.last().copied()
    }

    /// Returns the stage that was ordered last, with the subscribers of the first player.
    pub fn stage_underway(&self) -> Option<&SharedStage> {
        self.stages().get(self.underway()?.stage as usize)
    }

    /// Returns the stages that were ordered, with their start times.
    pub fn orders(&self) -> &[Underway] {
        &self.orders
    }

    /// Returns whether everybody is in and the rooms do not exist yet.
    pub fn wants_rooms(&self) -> bool {
        self.setup.rooms_made
            && self.phase == RunPhase::Running
            && self.placed.is_some()
            && self.rooms.is_none()
    }

    /// Returns the rooms that the coordinator made.
    pub fn rooms(&self) -> &[String] {
        self.rooms.as_deref().unwrap_or_default()
    }

    /// Returns the vantage on which a threshold failed that ends the run, and the threshold with
    /// the value that was measured. `None` if the run was already ended for another reason.
    pub fn broken(&self) -> Option<(&str, &str)> {
        let mut broken = self
            .probers
            .iter()
            .filter_map(|prober| Some((prober.vantage.as_str(), prober.broken.as_deref()?)));
        match &self.stop_reason {
            None => broken.next(),
            Some(reason) => {
                broken.find(|(vantage, threshold)| *reason == ended_by(vantage, threshold))
            }
        }
    }

    /// Returns why the run ends early; `None` if it does not.
    pub fn stop_reason(&self) -> Option<&str> {
        self.stop_reason.as_deref()
    }

    /// Returns the stages, with the subscribers of the first player.
    pub fn stages(&self) -> &[SharedStage] {
        self.placed
            .as_ref()
            .and_then(|placed| placed.stages.first())
            .map_or(&[], Vec::as_slice)
    }

    /// Notes that the caller is awake and can hear probers. To be called at least once a second.
    /// After a longer gap than [`LOOK_US_MAX`] the gap is added to everybody's patience and
    /// returned.
    pub fn look(&mut self, now_us: u64) -> Option<u64> {
        let away_us = now_us.saturating_sub(self.looked_us);
        self.looked_us = now_us;
        if away_us <= LOOK_US_MAX {
            return None;
        }
        self.quiet_since_us += away_us;
        self.probers
            .iter_mut()
            .for_each(|prober| prober.silent_since_us += away_us);
        Some(away_us)
    }

    /// Returns whether everybody was in, so that there is a run, whatever happened to it
    /// afterwards.
    pub fn has_begun(&self) -> bool {
        self.armed_us.is_some()
    }

    /// Returns whether everybody who came has reported.
    pub fn all_reported(&self) -> bool {
        self.armed_us.is_some() && self.probers.iter().all(|prober| prober.report.is_some())
    }

    pub fn find(&self, id: &str) -> Result<usize, RefusedRequest> {
        let found = self
            .probers
            .iter()
            .position(|prober| prober.id.as_str() == id);
        found.ok_or_else(|| {
            RefusedRequest::Unknown("no prober of this run has this id: register first".to_owned())
        })
    }

    /// Handles a prober's request to take part. `fresh` is the id that a new prober gets.
    ///
    /// # Errors
    /// The request is refused, and the state is unchanged.
    pub fn register(
        &self,
        now_us: u64,
        register: &Register,
        fresh: ProverId,
    ) -> Result<(Registered, Vec<JournalEntry>), RefusedRequest> {
        must_speak_ours(register)?;
        let answer = |id: &ProverId| Registered {
            prover_id: id.clone(),
            expected: self.setup.expect,
            protocol: Some(protocol::VERSION),
        };
        let vantage = register
            .vantage
            .clone()
            .unwrap_or_else(|| format!("vantage-{}", self.probers.len() + 1));
        let namesake = self.probers.iter().find(|prober| prober.vantage == vantage);
        if let Some(known) = self.same_process(register, namesake) {
            return Ok((answer(&known.id), Vec::new()));
        }
        self.must_be_open(&vantage, namesake)?;
        let mut entries = Vec::new();
        if let Some(namesake) = namesake {
            self.must_be_silent(now_us, namesake)?;
            entries.push(JournalEntry::Left {
                at_us: now_us,
                prover_id: namesake.id.clone(),
            });
        } else if self.probers.len() >= self.setup.expect as usize {
            return Err(RefusedRequest::Conflict(self.full()));
        }
        self.must_be_playable(register, namesake)?;
        entries.push(JournalEntry::Registered {
            at_us: now_us,
            prover_id: fresh.clone(),
            vantage,
            register: register.clone(),
        });
        Ok((answer(&fresh), entries))
    }

    /// Returns the prober if the same process registers again.
    fn same_process<'a>(
        &'a self,
        register: &Register,
        namesake: Option<&'a ProberState>,
    ) -> Option<&'a ProberState> {
        let is_known = |prober: &&ProberState| {
            register.instance.is_some() && prober.register.instance == register.instance
        };
        let known = self.probers.iter().find(is_known);
        // `voicegw`'s probers have no process id. One with the same label is taken for the same
        // process.
        known
            .or_else(|| namesake.filter(|prober| prober.is_legacy() && register.protocol.is_none()))
    }

    /// Refuses to let a prober take over the label of one that is alive.
    fn must_be_silent(&self, now_us: u64, namesake: &ProberState) -> Result<(), RefusedRequest> {
        if now_us.saturating_sub(namesake.silent_since_us) < self.setup.silence_us {
            return Err(RefusedRequest::Conflict(format!(
                "another prober calls itself '{}': give each host a --vantage of its own (or, if that one has died, try again in {} s)",
                namesake.vantage,
                self.setup.silence_us / 1_000_000
            )));
        }
        Ok(())
    }

    fn full(&self) -> String {
        let names: Vec<&str> = self
            .probers
            .iter()
            .take(10)
            .map(|prober| prober.vantage.as_str())
            .collect();
        format!(
            "{} probers were expected and are in ({}{}): start the coordinator with a higher --expect",
            self.setup.expect,
            names.join(", "),
            if self.probers.len() > names.len() {
                ", .."
            } else {
                ""
            }
        )
    }

    fn must_be_open(
        &self,
        vantage: &str,
        namesake: Option<&ProberState>,
    ) -> Result<(), RefusedRequest> {
        match (&self.phase, namesake) {
            (RunPhase::Gathering, _) => Ok(()),
            (RunPhase::Over | RunPhase::Stopping, _) => Err(RefusedRequest::Conflict(
                "the run is over: start another one".to_owned(),
            )),
            (RunPhase::Running, Some(_)) => Err(RefusedRequest::Conflict(format!(
                "the run is under way, and '{vantage}' was in it: a prober that is started again cannot go on, the run goes on without it"
            ))),
            (RunPhase::Running, None) => Err(RefusedRequest::Conflict(self.full())),
        }
    }

    /// Checks with the last prober to come that there are publishers and subscribers. A prober that
    /// would make the run impossible is not admitted.
    fn must_be_playable(
        &self,
        register: &Register,
        replaced: Option<&ProberState>,
    ) -> Result<(), RefusedRequest> {
        let others = self
            .probers
            .iter()
            .filter(|prober| replaced.is_none_or(|replaced| replaced.id != prober.id));
        let registers: Vec<&Register> = others
            .map(|prober| &prober.register)
            .chain([register])
            .collect();
        if registers.len() < self.setup.expect as usize {
            return Ok(());
        }
        let vantages = vantages(registers.into_iter());
        if vantages.is_empty() {
            Ok(())
        } else {
            self.setup
                .load
                .place(vantages)
                .map(drop)
                .map_err(|why| RefusedRequest::Conflict(why.to_string()))
        }
    }

    /// Returns the part of a beat that must not be lost; `None` if there is nothing new.
    ///
    /// # Errors
    /// The beat is refused, and the state is unchanged.
    pub fn beat(
        &self,
        now_us: u64,
        who: usize,
        beat: &BeatMessage,
    ) -> Result<Option<JournalEntry>, RefusedRequest> {
        let prober = &self.probers[who];
        let (Some(player), Some(placed)) = (prober.player, &self.placed) else {
            return Err(RefusedRequest::Conflict(
                "not everybody is in yet: ask for the job until it is ready".to_owned(),
            ));
        };
        if beat.seq <= prober.seq {
            return Ok(None);
        }
        self.must_make_sense(beat, placed, player)?;
        let has_counts =
            !beat.tiers.is_empty() || !beat.frames.is_empty() || !beat.starts.is_empty();
        let has_news = has_counts || beat.invalid != prober.invalid || beat.broken != prober.broken;
        Ok(has_news.then(|| JournalEntry::Beat {
            at_us: now_us,
            prover_id: prober.id.clone(),
            seq: beat.seq,
            tiers: beat.tiers.clone(),
            frames: beat.frames.clone(),
            starts: beat.starts.clone(),
            invalid: beat.invalid.clone(),
            broken: beat.broken.clone(),
        }))
    }

    fn must_make_sense(
        &self,
        beat: &BeatMessage,
        placed: &PlacedHosts,
        player: u32,
    ) -> Result<(), RefusedRequest> {
        let malformed = |why: &str| Err(RefusedRequest::Malformed(why.to_owned()));
        let stages = &placed.stages[player as usize];
        let is_stage = |stage: u32| (stage as usize) < stages.len();
        let is_held = |stage: u32| {
            stages
                .get(stage as usize)
                .is_some_and(|stage| matches!(stage.kind, StageKind::Baseline | StageKind::Tier))
        };
        if !beat.tiers.iter().all(|tier| is_held(tier.stage)) {
            return malformed("tiers: a stage that is no tier of this run");
        }
        let named = beat
            .stage
            .iter()
            .chain(&beat.ready_for)
            .copied()
            .chain(beat.starts.iter().map(|start| start.stage));
        if !named.into_iter().all(is_stage) {
            return malformed("a stage that this run does not have");
        }
        let is_own = |count: &FrameCountEntry| {
            placed.part.owner(count.0) == Some(player as usize)
                && count.1 <= 1
                && count.2 < 8
                && count.3.max(count.4) <= protocol::WHOLE_MAX
        };
        if !beat.frames.iter().all(is_own) {
            return malformed(
                "frames: of a publisher that another prober plays, or of a track that there is not",
            );
        }
        Ok(())
    }

    /// Notes a sign of life, and what is known from the beat as long as this process lives. To be
    /// called after the beat's entry was applied.
    pub fn hear(&mut self, now_us: u64, who: usize, beat: &BeatMessage) {
        let life = self.life;
        let prober = &mut self.probers[who];
        prober.note_life(now_us);
        prober.take_heard(life, beat.exchange.as_ref());
        // The clock of an earlier process says nothing about this one.
        if let Some(exchange) = beat
            .exchange
            .filter(|exchange: &Exchange| exchange.life == life && beat.seq >= prober.seq)
        {
            prober.clock.handle(&exchange);
        }
        if beat.seq >= prober.seq {
            prober.seq = beat.seq;
            prober.stage = beat.stage;
            prober.ready_for = beat.ready_for;
            prober.live = beat.live.clone();
        }
    }

    /// Notes a sign of life without a beat.
    pub fn hear_of(&mut self, now_us: u64, who: usize) {
        let prober = &mut self.probers[who];
        prober.note_life(now_us);
    }

    /// Returns the entry of a final report; `None` if it has come before.
    ///
    /// # Errors
    /// The report is refused, and the state is unchanged.
    pub fn report(
        &self,
        now_us: u64,
        who: usize,
        report: &ProberReport,
    ) -> Result<Option<JournalEntry>, RefusedRequest> {
        let prober = &self.probers[who];
        if self.armed_us.is_none() {
            return Err(RefusedRequest::Conflict(
                "nothing has begun that could be reported".to_owned(),
            ));
        }
        if prober.report.is_some() {
            return Ok(None);
        }
        if let (Some(player), Some(placed), Some(full)) =
            (prober.player, &self.placed, &report.throng)
        {
            let stages = &placed.stages[player as usize];
            let is_held = |stage: u32| {
                stages.get(stage as usize).is_some_and(|stage| {
                    matches!(stage.kind, StageKind::Baseline | StageKind::Tier)
                })
            };
            if !full.tiers.iter().all(|tier| is_held(tier.measured.stage)) {
                return Err(RefusedRequest::Malformed(
                    "throng.tiers: a stage that is no tier of this run".to_owned(),
                ));
            }
        }
        Ok(Some(JournalEntry::Reported {
            at_us: now_us,
            prover_id: prober.id.clone(),
            report: Box::new(report.clone()),
        }))
    }

    /// Handles a prober that was ended before it had anything to report. Returns `None` if this
    /// makes no difference any more.
    pub fn leave(&self, now_us: u64, who: usize) -> Option<JournalEntry> {
        let prober = &self.probers[who];
        match self.phase {
            RunPhase::Gathering => Some(JournalEntry::Left {
                at_us: now_us,
                prover_id: prober.id.clone(),
            }),
            RunPhase::Running | RunPhase::Stopping if prober.is_live() => {
                Some(JournalEntry::Missing {
                    at_us: now_us,
                    prover_id: prober.id.clone(),
                    last_heard_us: now_us,
                    why: "it was ended there".to_owned(),
                })
            }
            RunPhase::Running | RunPhase::Stopping | RunPhase::Over => None,
        }
    }

    pub fn reported(&self) -> Reported {
        Reported {
            ok: true,
            all_reported: self.all_reported(),
        }
    }

    /// Handles a request to end the run. Returns `None` if it is already ending.
    pub fn cancel(&self, now_us: u64, reason: &str) -> Option<JournalEntry> {
        matches!(self.phase, RunPhase::Gathering | RunPhase::Running).then(|| {
            JournalEntry::Stopping {
                at_us: now_us,
                reason: reason.to_owned(),
            }
        })
    }

    /// Returns the next entry that is due by now. The caller applies it and calls again, until
    /// there is none.
    pub fn due(&self, now_us: u64) -> Option<JournalEntry> {
        match self.phase {
            RunPhase::Gathering => self.gather(now_us),
            RunPhase::Running => self.lose(now_us).or_else(|| self.go_on(now_us)),
            RunPhase::Stopping => self.lose(now_us).or_else(|| self.finish(now_us)),
            RunPhase::Over => None,
        }
    }

    fn gather(&self, now_us: u64) -> Option<JournalEntry> {
        let silent = |prober: &&ProberState| {
            now_us.saturating_sub(prober.silent_since_us) >= self.setup.silence_us
        };
        if let Some(silent) = self.probers.iter().find(silent) {
            return Some(JournalEntry::Left {
                at_us: now_us,
                prover_id: silent.id.clone(),
            });
        }
        if self.probers.len() == self.setup.expect as usize {
            let vantages = vantages(self.probers.iter().map(|prober| &prober.register));
            let playable = if vantages.is_empty() {
                Ok(())
            } else {
                self.setup.load.place(vantages).map(drop)
            };
            return Some(match playable {
                Ok(()) => JournalEntry::Armed { at_us: now_us },
                Err(why) => JournalEntry::Stopping {
                    at_us: now_us,
                    reason: why.to_string(),
                },
            });
        }
        (now_us.saturating_sub(self.quiet_since_us) >= self.setup.gather_us).then(|| {
            JournalEntry::Stopping {
                at_us: now_us,
                reason: format!(
                    "{} of {} probers came, and no other for {} s",
                    self.probers.len(),
                    self.setup.expect,
                    self.setup.gather_us / 1_000_000
                ),
            }
        })
    }

    /// Returns the entry for a prober that has been silent for too long.
    fn lose(&self, now_us: u64) -> Option<JournalEntry> {
        let lost = self
            .probers
            .iter()
            .filter(|prober| prober.is_live())
            .find_map(|prober| {
                let (silent_since, patience) = if prober.is_legacy() {
                    (
                        self.legacy_start_us
                            .unwrap_or(0)
                            .max(prober.silent_since_us),
                        self.legacy_patience_us(),
                    )
                } else {
                    (prober.silent_since_us, self.setup.silence_us)
                };
                let silent_us = now_us.saturating_sub(silent_since);
                let stopped = prober.is_legacy() && self.phase == RunPhase::Stopping;
                (silent_us >= patience || stopped).then(|| {
                    if stopped {
                        (prober, "nothing tells voicegw's probers to stop".to_owned())
                    } else {
                        (prober, format!("silent for {} s", silent_us / 1_000_000))
                    }
                })
            });
        lost.map(|(prober, why)| JournalEntry::Missing {
            at_us: now_us,
            prover_id: prober.id.clone(),
            last_heard_us: prober.heard_us,
            why,
        })
    }

    fn legacy_patience_us(&self) -> u64 {
        let phases = self.setup.load.scenario.phases.iter();
        let planned = phases
            .map(|phase| phase.hold.as_micros() as u64)
            .sum::<u64>();
        planned.saturating_mul(2).saturating_add(LEGACY_SLACK_US)
    }

    fn go_on(&self, now_us: u64) -> Option<JournalEntry> {
        if let Some((vantage, threshold)) = self.broken() {
            return Some(JournalEntry::Stopping {
                at_us: now_us,
                reason: ended_by(vantage, threshold),
            });
        }
        let missed = || {
            self.probers
                .iter()
                .find(|prober| prober.gone.is_some() || prober.left_early)
        };
        if let (OnMissing::Stop, Some(missed)) = (self.setup.on_missing, missed()) {
            return Some(JournalEntry::Stopping {
                at_us: now_us,
                reason: format!(
                    "'{}' is missing, and the run was not to go on without it",
                    missed.vantage
                ),
            });
        }
        if let Some(over) = self.finish(now_us) {
            return Some(over);
        }
        if self.wants_rooms() {
            return None;
        }
        let stage = self.underway().map_or(0, |underway| underway.stage + 1);
        let kind = self.stages().get(stage as usize)?.kind;
        let mut players = self
            .probers
            .iter()
            .filter(|prober| prober.is_live() && !prober.is_legacy())
            .peekable();
        players.peek()?;
        players
            .all(|prober| prober.ready_for.is_some_and(|ready_for| ready_for >= stage))
            .then(|| JournalEntry::Ordered {
                at_us: now_us,
                stage,
                start_us: match kind {
                    // A common start is not needed, because all are ready.
                    StageKind::Stop | StageKind::Leave => now_us,
                    StageKind::Publish | StageKind::Baseline | StageKind::Tier => now_us + LEAD_US,
                },
            })
    }

    fn finish(&self, now_us: u64) -> Option<JournalEntry> {
        let nobody_left = !self.probers.iter().any(ProberState::is_live);
        nobody_left.then_some(JournalEntry::Over { at_us: now_us })
    }

    /// Applies an entry that was just written, or that was read from a journal.
    pub fn apply(&mut self, entry: JournalEntry) {
        match entry {
            JournalEntry::Registered {
                at_us,
                prover_id,
                vantage,
                register,
            } => self.admit(at_us, prover_id, vantage, register),
            JournalEntry::Left { prover_id, .. } => self.free_place_of(&prover_id),
            JournalEntry::Armed { at_us } => self.arm(at_us),
            JournalEntry::Prepared { rooms, .. } => self.rooms = Some(rooms),
            JournalEntry::Ordered {
                stage, start_us, ..
            } => self.begin(stage, start_us),
            JournalEntry::Beat {
                at_us,
                prover_id,
                seq,
                tiers,
                frames,
                starts,
                invalid,
                broken,
            } => {
                let version = self.frames_version + 1;
                let Some(prober) = self.prober(&prover_id).filter(|prober| seq > prober.seq) else {
                    return;
                };
                prober.seq = seq;
                prober.note_life(at_us);
                prober.keep_tiers(tiers);
                prober.keep_frames(frames, version);
                prober.keep_starts(starts);
                prober.invalid = invalid;
                prober.broken = prober.broken.take().or(broken);
                self.frames_version = version;
            }
            JournalEntry::Missing {
                at_us,
                prover_id,
                last_heard_us,
                why,
            } => {
                let gone = GoneProber {
                    at_us,
                    last_heard_us,
                    why,
                };
                self.give_up(&prover_id, gone);
            }
            JournalEntry::Stopping { reason, .. } => self.stop(reason),
            JournalEntry::Reported {
                at_us,
                prover_id,
                report,
            } => self.take_report(at_us, &prover_id, *report),
            JournalEntry::Over { .. } => self.phase = RunPhase::Over,
        }
    }

    fn free_place_of(&mut self, id: &ProverId) {
        self.probers.retain(|prober| prober.id != *id);
    }

    fn give_up(&mut self, id: &ProverId, gone: GoneProber) {
        if let Some(prober) = self.prober(id) {
            prober.gone = Some(gone);
        }
    }

    fn begin(&mut self, stage: u32, start_us: u64) {
        self.orders.push(Underway { stage, start_us });
        if self
            .stages()
            .get(stage as usize)
            .is_some_and(|stage| stage.kind == StageKind::Tier)
        {
            self.legacy_start_us.get_or_insert(start_us);
        }
    }

    fn stop(&mut self, reason: String) {
        self.stop_reason.get_or_insert(reason);
        // While probers are being waited for, there is nothing to stop and nothing to report.
        self.phase = if self.phase == RunPhase::Gathering {
            RunPhase::Over
        } else {
            RunPhase::Stopping
        };
    }

    fn take_report(&mut self, at_us: u64, id: &ProverId, report: ProberReport) {
        let is_early = self.phase == RunPhase::Running && !self.is_leaving();
        if let Some(prober) = self.prober(id).filter(|prober| prober.report.is_none()) {
            prober.left_early = is_early && !prober.is_legacy() && prober.gone.is_none();
            prober.note_life(at_us);
            prober.report = Some(report);
        }
    }

    fn prober(&mut self, id: &ProverId) -> Option<&mut ProberState> {
        self.probers.iter_mut().find(|prober| prober.id == *id)
    }

    /// Returns whether all tiers are over for everybody.
    fn is_leaving(&self) -> bool {
        self.stage_underway()
            .is_some_and(|stage| stage.kind == StageKind::Leave)
    }

    fn admit(&mut self, at_us: u64, id: ProverId, vantage: String, register: Register) {
        self.quiet_since_us = at_us;
        self.probers.push(ProberState {
            id,
            vantage,
            register,
            registered_us: at_us,
            player: None,
            seq: 0,
            stage: None,
            ready_for: None,
            tiers: BTreeMap::new(),
            frames: BTreeMap::new(),
            answers: VecDeque::new(),
            frames_heard: 0,
            starts: BTreeMap::new(),
            invalid: Vec::new(),
            broken: None,
            live: LiveSecond::default(),
            clock: ClockEstimate::default(),
            heard_us: at_us,
            silent_since_us: at_us,
            gone: None,
            report: None,
            left_early: false,
        });
    }

    fn arm(&mut self, at_us: u64) {
        let vantages = vantages(self.probers.iter().map(|prober| &prober.register));
        let players = self.probers.iter_mut().filter(|prober| !prober.is_legacy());
        players
            .enumerate()
            .for_each(|(player, prober)| prober.player = Some(player as u32));
        (self.phase, self.armed_us) = (RunPhase::Running, Some(at_us));
        if vantages.is_empty() {
            self.legacy_start_us = Some(at_us + LEGACY_LEAD_US)
        } else {
            self.placed = self.setup.load.place(vantages).ok()
        }
    }

    /// Returns entries that make the same state, except for what does not outlive a process. They
    /// replace the entries that made the state.
    pub fn entries(&self) -> Vec<JournalEntry> {
        let registered = self.probers.iter().map(|prober| JournalEntry::Registered {
            at_us: prober.registered_us,
            prover_id: prober.id.clone(),
            vantage: prober.vantage.clone(),
            register: prober.register.clone(),
        });
        let mut entries: Vec<JournalEntry> = registered.collect();
        entries.extend(self.armed_us.map(|at_us| JournalEntry::Armed { at_us }));
        entries.extend(self.rooms.iter().map(|rooms| JournalEntry::Prepared {
            at_us: self.armed_us.unwrap_or(0),
            rooms: rooms.clone(),
        }));
        // These reports are early because they precede the remaining entries.
        entries.extend(
            self.probers
                .iter()
                .filter(|prober| prober.left_early)
                .filter_map(ProberState::reported),
        );
        entries.extend(self.orders.iter().map(|order| JournalEntry::Ordered {
            at_us: order.start_us,
            stage: order.stage,
            start_us: order.start_us,
        }));
        entries.extend(
            self.probers
                .iter()
                .filter(|prober| prober.seq > 0)
                .map(ProberState::said),
        );
        entries.extend(self.probers.iter().filter_map(ProberState::went));
        entries.extend(
            self.stop_reason
                .iter()
                .map(|reason| JournalEntry::Stopping {
                    at_us: self.looked_us,
                    reason: reason.clone(),
                }),
        );
        entries.extend(
            self.probers
                .iter()
                .filter(|prober| !prober.left_early)
                .filter_map(ProberState::reported),
        );
        entries.extend(
            (self.phase == RunPhase::Over).then_some(JournalEntry::Over {
                at_us: self.looked_us,
            }),
        );
        entries
    }

    /// Returns a prober's job, as far as it is known.
    pub fn job(&self, who: usize) -> JobReply {
        let (prober, scenario) = (&self.probers[who], &self.setup.load.scenario);
        let start_us = self.legacy_start_us.filter(|_| prober.is_legacy());
        JobReply {
            room: scenario
                .rooms
                .name
                .clone()
                .unwrap_or_else(|| format!("throng-{:08x}", self.setup.run_tag)),
            ramp: self.setup.load.tiers(),
            duration: scenario.times().hold.as_secs_f64(),
            target_rtt_ms: self
                .setup
                .judging
                .target_rtt_us
                .map_or(LEGACY_TARGET_RTT_MS, |us| us as f64 / 1e3),
            max_loss: self.setup.judging.max_loss_pct,
            start_at: start_us.map(|us| us as f64 / 1e6),
            ready: if prober.is_legacy() {
                start_us.is_some()
            } else {
                self.armed_us.is_some()
            },
            throng: prober
                .player
                .zip(self.placed.as_ref())
                .map(|(player, placed)| Job {
                    protocol: protocol::VERSION,
                    run_tag: self.setup.run_tag,
                    vantages: self
                        .players()
                        .map(|prober| prober.vantage.clone())
                        .collect(),
                    me: player,
                    scenario: placed.scenario.clone(),
                    placement: placed.placement.clone(),
                    stages: placed.stages[player as usize].clone(),
                    judging: self.setup.judging.clone(),
                    url: self.setup.url.clone(),
                    tokens: self.setup.tokens,
                    rooms_made: self.setup.rooms_made,
                    patience_us: self.setup.patience_us(),
                }),
        }
    }

    /// Returns the players in the order of [`Job::vantages`].
    fn players(&self) -> impl Iterator<Item = &ProberState> {
        self.probers.iter().filter(|prober| prober.player.is_some())
    }

    /// Returns the answer to a beat that has been journaled and heard.
    pub fn reply(
        &mut self,
        who: usize,
        seq: u64,
        received_at_us: u64,
        replied_at_us: u64,
    ) -> BeatReply {
        let heard = self.probers[who].frames_heard;
        self.probers[who].note_answer(BeatAnswer {
            replied_at_us,
            frames_version: self.frames_version,
        });
        let others = || {
            self.probers
                .iter()
                .enumerate()
                .filter(|(index, _)| *index != who)
                .map(|(_, prober)| prober)
        };
        let clock = |prober: &ProberState| {
            let (vantage, offset) = (prober.player?, prober.offset()?);
            Some(VantageClock {
                vantage,
                offset_us: offset.offset_us,
                uncertainty_us: offset.uncertainty_us,
            })
        };
        let frames = others().flat_map(|prober| &prober.frames);
        BeatReply {
            seq,
            life: self.life,
            received_at_us,
            replied_at_us,
            order: self.order(&self.probers[who]),
            frames: frames
                .filter(|(_, counted)| counted.version > heard)
                .map(|(key, counted)| frame_count(key, counted))
                .collect(),
            clocks: self.probers.iter().filter_map(clock).collect(),
            missing: others()
                .filter(|prober| prober.gone.is_some() || prober.left_early)
                .filter_map(|prober| prober.player)
                .collect(),
        }
    }

    fn order(&self, prober: &ProberState) -> Order {
        if prober.report.is_some() {
            return Order::Wait;
        }
        if let Some(gone) = &prober.gone {
            return Order::Stop {
                reason: format!("{}, and the run went on without this prober", gone.why),
            };
        }
        match (&self.phase, &self.stop_reason, self.underway()) {
            (RunPhase::Stopping | RunPhase::Over, Some(reason), _) => Order::Stop {
                reason: reason.clone(),
            },
            (RunPhase::Running, _, Some(Underway { stage, start_us }))
                if prober.stage.is_none_or(|reached| reached < stage) =>
            {
                Order::Start {
                    stage,
                    at_us: start_us,
                }
            }
            _ => Order::Wait,
        }
    }
}

/// Returns the stop reason of a run that a threshold on this vantage ends.
fn ended_by(vantage: &str, threshold: &str) -> String {
    format!("'{vantage}': {threshold}")
}

fn must_speak_ours(register: &Register) -> Result<(), RefusedRequest> {
    let other = register
        .protocol
        .filter(|version| *version != protocol::VERSION);
    other.map_or(Ok(()), |version| {
        let why = protocol::other_version("prober", version, "coordinator");
        Err(RefusedRequest::Conflict(why.to_string()))
    })
}

/// Returns the vantages that play the plan.
fn vantages<'a>(registers: impl Iterator<Item = &'a Register>) -> Vec<VantagePlan> {
    registers
        .filter(|register| register.protocol.is_some())
        .map(|register| VantagePlan {
            role: register.role,
            weight: register.weight,
        })
        .collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::LazyLock;

    use super::*;
    use crate::coordinator::place::tests::load;
    use crate::coordinator::protocol::{EngineShort, FinalReport, WireVerdict};
    use crate::measure::Record;
    use crate::measure::wire::RecordWire;
    use crate::plan::HostRole;
    use crate::report::{Judging, Verdict};
    use crate::seeded::Seeded;

    const SECOND: u64 = 1_000_000;
    const START: u64 = 1_700_000_000 * SECOND;

    pub(crate) fn setup(expect: u32) -> RunSetup {
        RunSetup {
            run_tag: 0xC0FF_EE01,
            expect,
            on_missing: OnMissing::Continue,
            load: load(&[2, 5, 3]),
            judging: WireJudging::of(&Judging::default()),
            url: None,
            tokens: false,
            rooms_made: false,
            silence_us: 30 * SECOND,
            gather_us: 600 * SECOND,
        }
    }

    fn prober(vantage: &str) -> Register {
        Register {
            vantage: Some(vantage.to_owned()),
            protocol: Some(protocol::VERSION),
            version: None,
            instance: Some(format!("instance of {vantage}")),
            role: HostRole::Both,
            weight: 1,
            wants_tokens: false,
        }
    }

    fn legacy(vantage: &str) -> Register {
        Register {
            protocol: None,
            instance: None,
            ..prober(vantage)
        }
    }

    fn id(number: u64) -> ProverId {
        ProverId::new(format!("p{number}")).unwrap()
    }

    /// Returns a record of that many joins (up to 99), with one round trip each.
    fn record(joins: u64) -> RecordWire {
        static RECORDS: LazyLock<Vec<RecordWire>> = LazyLock::new(|| {
            let mut record = Record::default();
            let one_more = |joins| {
                record.session.joins_ok = joins;
                record.session.rtt_rtcp.record_micros(joins);
                RecordWire::from(&record)
            };
            (0..100).map(one_more).collect()
        });
        RECORDS[joins as usize].clone()
    }

    fn tier(stage: u32, joins: u64) -> TierSoFar {
        TierSoFar {
            stage,
            participants: 5,
            seconds: joins as f64,
            complete: false,
            record: record(joins),
        }
    }

    fn quiet(seq: u64) -> BeatMessage {
        BeatMessage {
            seq,
            sent_at_us: START,
            exchange: None,
            stage: None,
            ready_for: None,
            tiers: Vec::new(),
            live: LiveSecond::default(),
            frames: Vec::new(),
            starts: Vec::new(),
            invalid: Vec::new(),
            broken: None,
        }
    }

    fn report(partial: Option<&str>) -> ProberReport {
        ProberReport {
            vantage: None,
            steps: Vec::new(),
            baseline: None,
            throng: Some(FinalReport {
                verdict: WireVerdict(Verdict::Pass),
                reasons: Vec::new(),
                partial: partial.map(str::to_owned),
                valid: true,
                invalid: Vec::new(),
                tiers: Vec::new(),
                totals: tier(0, 1),
                engine: EngineShort::default(),
                notes: Vec::new(),
                failures: Vec::new(),
            }),
        }
    }

    /// A state whose owner does what is due and keeps the journal.
    struct Kept {
        state: RunState,
        journal: Vec<JournalEntry>,
        now_us: u64,
        life: u64,
    }

    impl Kept {
        fn new(setup: RunSetup) -> Kept {
            Kept {
                state: RunState::new(setup, 1, START),
                journal: Vec::new(),
                now_us: START,
                life: 1,
            }
        }

        fn remember(&mut self, entry: JournalEntry) {
            // Entries pass through the journal's text form.
            let entry: JournalEntry =
                serde_json::from_str(&serde_json::to_string(&entry).unwrap()).unwrap();
            self.journal.push(entry.clone());
            self.state.apply(entry);
        }

        fn settle(&mut self) {
            self.state.look(self.now_us);
            while let Some(entry) = self.state.due(self.now_us) {
                self.remember(entry);
            }
        }

        fn wait(&mut self, seconds: u64) {
            for _ in 0..seconds {
                self.now_us += SECOND;
                self.settle();
            }
        }

        fn register(&mut self, register: &Register) -> Result<ProverId, RefusedRequest> {
            let fresh = id(self.journal.len() as u64 + 100);
            let (answer, entries) = self.state.register(self.now_us, register, fresh)?;
            entries.into_iter().for_each(|entry| self.remember(entry));
            self.settle();
            Ok(answer.prover_id)
        }

        fn beat(&mut self, id: &ProverId, beat: &BeatMessage) -> Result<BeatReply, RefusedRequest> {
            let who = self.state.find(id.as_str())?;
            if let Some(entry) = self.state.beat(self.now_us, who, beat)? {
                self.remember(entry);
            }
            self.state.hear(self.now_us, who, beat);
            self.settle();
            Ok(self.state.reply(who, beat.seq, self.now_us, self.now_us))
        }

        fn report(&mut self, id: &ProverId, report: &ProberReport) -> Result<(), RefusedRequest> {
            let who = self.state.find(id.as_str())?;
            if let Some(entry) = self.state.report(self.now_us, who, report)? {
                self.remember(entry);
            }
            self.settle();
            Ok(())
        }

        /// Simulates a coordinator that is killed and restarted on its journal.
        fn restart(&mut self) {
            self.life += 1;
            let mut state = RunState::new(self.state.setup.clone(), self.life, self.now_us);
            self.journal
                .iter()
                .for_each(|entry| state.apply(entry.clone()));
            state.resume(self.now_us);
            self.state = state;
        }

        fn prober(&self, id: &ProverId) -> &ProberState {
            &self.state.probers[self.state.find(id.as_str()).unwrap()]
        }
    }

    /// Returns the entries that a run of two probers leaves in its journal.
    pub(crate) fn entries_of_a_run() -> Vec<JournalEntry> {
        let mut kept = Kept::new(setup(2));
        let ids = ["ams", "fra"].map(|vantage| kept.register(&prober(vantage)).unwrap());
        for seq in 1..20 {
            for (player, id) in ids.iter().enumerate() {
                let beat = BeatMessage {
                    ready_for: Some(0),
                    tiers: vec![tier(2, seq)],
                    frames: vec![FrameCountEntry(player as u32, 0, 0, seq, 0)],
                    ..quiet(seq)
                };
                // The deal decides who plays the first two publishers.
                let _ = kept.beat(id, &beat);
            }
        }
        kept.report(&ids[0], &report(Some("left"))).unwrap();
        kept.wait(31);
        kept.report(&ids[1], &report(None)).unwrap();
        kept.journal
    }

    #[test]
    fn an_answer_brings_the_frame_counts_that_changed_since_the_last_one_that_was_heard() {
        let mut kept = Kept::new(setup(2));
        let [ams, fra] = ["ams", "fra"].map(|vantage| kept.register(&prober(vantage)).unwrap());
        let part = &kept.state.placed.as_ref().unwrap().part;
        let ours: Vec<u32> = (0..1_000)
            .filter(|origin| part.owner(*origin) == Some(0))
            .collect();
        let (first, second) = (ours[0], ours[1]);
        let mut seq = 0;
        let mut publish = |kept: &mut Kept, counts: &[(u32, u64)]| {
            seq += 1;
            let frames = counts
                .iter()
                .map(|(origin, count)| FrameCountEntry(*origin, 0, 0, *count, 0));
            let beat = BeatMessage {
                frames: frames.collect(),
                ..quiet(seq)
            };
            kept.wait(1);
            kept.beat(&ams, &beat).unwrap();
        };
        // Returns the answer that fra gets, given the last answer that reached it.
        let mut asked = 0;
        let mut ask = |kept: &mut Kept, heard: Option<&BeatReply>| {
            asked += 1;
            kept.wait(1);
            let exchange = heard.map(|reply| Exchange {
                life: reply.life,
                sent_at_us: 0,
                received_at_us: reply.received_at_us,
                replied_at_us: reply.replied_at_us,
                heard_at_us: 0,
            });
            let beat = BeatMessage {
                exchange,
                ..quiet(asked)
            };
            kept.beat(&fra, &beat).unwrap()
        };
        let all: Vec<(u32, u64)> = ours.iter().map(|origin| (*origin, 5)).collect();
        publish(&mut kept, &all);
        let heard = ask(&mut kept, None);
        assert_eq!(heard.frames.len(), ours.len());
        assert_eq!(ask(&mut kept, Some(&heard)).frames, [], "nothing is new");
        publish(&mut kept, &[(first, 6)]);
        let lost = ask(&mut kept, Some(&heard));
        assert_eq!(lost.frames, [FrameCountEntry(first, 0, 0, 6, 0)]);
        publish(&mut kept, &[(second, 7)]);
        let heard = ask(&mut kept, Some(&heard));
        assert_eq!(
            heard.frames,
            [
                FrameCountEntry(first, 0, 0, 6, 0),
                FrameCountEntry(second, 0, 0, 7, 0)
            ],
            "what a lost answer brought comes again"
        );
        publish(&mut kept, &[(second, 7)]);
        let mut heard = ask(&mut kept, Some(&heard));
        assert_eq!(heard.frames, [], "the same count again is no news");
        for count in 8..40 {
            publish(&mut kept, &[(first, count)]);
            heard = ask(&mut kept, Some(&heard));
            assert_eq!(heard.frames, [FrameCountEntry(first, 0, 0, count, 0)]);
        }
        assert_eq!(kept.prober(&fra).answers.len(), ANSWERS_MAX);
        // After a restart of the prober or of the coordinator, nothing counts as heard.
        assert_eq!(ask(&mut kept, None).frames.len(), ours.len());
        kept.restart();
        assert_eq!(ask(&mut kept, Some(&heard)).frames.len(), ours.len());
    }

    #[test]
    fn nobody_begins_before_all_are_in_and_ready_and_then_all_at_once() {
        let mut kept = Kept::new(setup(2));
        let ams = kept.register(&prober("ams")).unwrap();
        assert!(!kept.state.job(0).ready && kept.state.job(0).throng.is_none());
        assert!(matches!(
            kept.beat(&ams, &quiet(1)),
            Err(RefusedRequest::Conflict(_))
        ));
        let fra = kept.register(&prober("fra")).unwrap();
        let jobs: Vec<Job> = (0..2)
            .map(|who| kept.state.job(who).throng.unwrap())
            .collect();
        assert_eq!(
            (jobs[0].me, jobs[1].me, &jobs[0].vantages),
            (0, 1, &jobs[1].vantages)
        );
        assert_eq!(jobs[0].vantages, ["ams", "fra"]);
        for stage in 0..jobs[0].stages.len() as u32 {
            let ready = |seq: u64| BeatMessage {
                stage: stage.checked_sub(1),
                ready_for: Some(stage),
                ..quiet(seq)
            };
            let seq = u64::from(stage) * 10;
            assert_eq!(
                kept.beat(&ams, &ready(seq + 1)).unwrap().order,
                Order::Wait,
                "{stage}"
            );
            kept.wait(5);
            assert_eq!(
                kept.beat(&ams, &ready(seq + 2)).unwrap().order,
                Order::Wait,
                "{stage}"
            );
            let begin = kept.beat(&fra, &ready(seq + 1)).unwrap().order;
            assert_eq!(kept.beat(&ams, &ready(seq + 3)).unwrap().order, begin);
            let Order::Start {
                stage: ordered,
                at_us,
            } = begin
            else {
                panic!("{begin:?}")
            };
            assert_eq!(ordered, stage);
            let is_hurried = matches!(
                jobs[0].stages[stage as usize].kind,
                StageKind::Stop | StageKind::Leave
            );
            assert_eq!(at_us > kept.now_us, !is_hurried, "{stage}");
        }
        assert!(!kept.state.all_reported());
        kept.report(&ams, &report(None)).unwrap();
        kept.report(&fra, &report(None)).unwrap();
        assert!(kept.state.all_reported() && *kept.state.phase() == RunPhase::Over);
        assert!(
            kept.state
                .probers
                .iter()
                .all(|prober| !prober.left_early && prober.gone.is_none())
        );
    }

    #[test]
    fn a_hold_may_last_for_as_long_as_it_likes() {
        let mut kept = Kept::new(setup(2));
        let ids = ["ams", "fra"].map(|vantage| kept.register(&prober(vantage)).unwrap());
        for seq in 1..20_000 {
            ids.iter()
                .for_each(|id| drop(kept.beat(id, &quiet(seq)).unwrap()));
            kept.wait(1);
        }
        assert_eq!(*kept.state.phase(), RunPhase::Running);
        assert!(kept.state.probers.iter().all(ProberState::is_live));
    }

    #[test]
    fn who_falls_silent_is_missing_and_leaves_what_it_sent() {
        for on_missing in [OnMissing::Continue, OnMissing::Stop] {
            let mut kept = Kept::new(RunSetup {
                on_missing,
                ..setup(2)
            });
            let [ams, fra] = ["ams", "fra"].map(|vantage| kept.register(&prober(vantage)).unwrap());
            let measured = BeatMessage {
                tiers: vec![tier(2, 41)],
                ..quiet(1)
            };
            kept.beat(&fra, &measured).unwrap();
            let last_heard_us = kept.now_us;
            let mut order = Order::Wait;
            for seq in 1..=31 {
                kept.wait(1);
                order = kept
                    .beat(
                        &ams,
                        &BeatMessage {
                            ready_for: Some(0),
                            ..quiet(seq)
                        },
                    )
                    .unwrap()
                    .order;
            }
            let gone = kept.prober(&fra).gone.clone().unwrap();
            assert_eq!(
                (gone.last_heard_us, gone.why.as_str()),
                (last_heard_us, "silent for 30 s")
            );
            assert_eq!(kept.prober(&fra).tiers[&2].record, record(41));
            match on_missing {
                OnMissing::Continue => {
                    assert!(matches!(order, Order::Start { stage: 0, .. }), "{order:?}")
                }
                OnMissing::Stop => assert!(
                    matches!(&order, Order::Stop { reason } if reason.contains("'fra' is missing")),
                    "{order:?}"
                ),
            }
            // The lost prober returns. Its data is kept, and it is told that it is too late.
            let late = BeatMessage {
                tiers: vec![tier(2, 55)],
                ..quiet(2)
            };
            let told = kept.beat(&fra, &late).unwrap().order;
            assert!(matches!(&told, Order::Stop { .. }), "{told:?}");
            assert_eq!(kept.prober(&fra).tiers[&2].record, record(55));
            kept.report(&ams, &report(None)).unwrap();
            assert_eq!(*kept.state.phase(), RunPhase::Over);
        }
    }

    #[test]
    fn time_in_which_the_coordinator_did_not_listen_is_no_silence() {
        let mut kept = Kept::new(setup(2));
        let ids = ["ams", "fra"].map(|vantage| kept.register(&prober(vantage)).unwrap());
        ids.iter()
            .for_each(|id| drop(kept.beat(id, &quiet(1)).unwrap()));
        // The coordinator was stopped for ten minutes, and its first action is to look.
        kept.now_us += 600 * SECOND;
        kept.settle();
        assert!(kept.state.probers.iter().all(ProberState::is_live));
        kept.wait(31);
        assert!(!kept.state.probers.iter().any(ProberState::is_live));
    }

    #[test]
    fn a_prober_of_another_version_is_told_both() {
        let mut kept = Kept::new(setup(2));
        let mut newer = prober("ams");
        newer.protocol = Some(protocol::VERSION + 1);
        let Err(RefusedRequest::Conflict(why)) = kept.register(&newer) else {
            panic!()
        };
        let [theirs, ours] = [protocol::VERSION + 1, protocol::VERSION];
        for part in [
            format!("version {theirs} "),
            format!("version {ours}:"),
            "same throng".to_owned(),
        ] {
            assert!(why.contains(&part), "{why}");
        }
        assert!(kept.state.probers.is_empty());
    }

    #[test]
    fn a_prober_that_registers_again_is_the_same_one() {
        let mut kept = Kept::new(setup(2));
        let ams = kept.register(&prober("ams")).unwrap();
        assert_eq!(kept.register(&prober("ams")).unwrap(), ams);
        let mut other = prober("ams");
        other.instance = Some("another process".to_owned());
        let Err(RefusedRequest::Conflict(why)) = kept.register(&other) else {
            panic!()
        };
        assert!(
            why.contains("calls itself 'ams'") && why.contains("--vantage"),
            "{why}"
        );
        // The first one has died.
        kept.wait(29);
        assert!(kept.register(&other).is_err());
        kept.wait(1);
        let new = kept.register(&other).unwrap();
        assert_ne!(new, ams);
        assert!(matches!(
            kept.state.find(ams.as_str()),
            Err(RefusedRequest::Unknown(_))
        ));
        kept.register(&prober("fra")).unwrap();
        assert_eq!(*kept.state.phase(), RunPhase::Running);
        // During the run neither a new prober nor a restarted one is admitted.
        for late in [prober("ams"), prober("sin")] {
            assert!(matches!(
                kept.register(&late),
                Err(RefusedRequest::Conflict(_))
            ));
        }
        assert_eq!(kept.register(&other).unwrap(), new);
    }

    #[test]
    fn a_million_registrations_take_no_more_room_than_those_that_are_expected() {
        let mut kept = Kept::new(setup(3));
        (0..2).for_each(|number| drop(kept.register(&prober(&format!("v{number}"))).unwrap()));
        for number in 0..1_000_000 {
            let mut stranger = prober("v0");
            stranger.instance = Some(format!("stranger {number}"));
            assert!(
                kept.state
                    .register(kept.now_us, &stranger, id(number))
                    .is_err()
            );
        }
        assert_eq!((kept.state.probers.len(), kept.journal.len()), (2, 2));
    }

    #[test]
    fn the_last_one_in_must_leave_a_run_that_can_be() {
        let mut kept = Kept::new(setup(2));
        let viewer = |vantage: &str| Register {
            role: HostRole::Subscribe,
            ..prober(vantage)
        };
        kept.register(&viewer("ams")).unwrap();
        let Err(RefusedRequest::Conflict(why)) = kept.register(&viewer("fra")) else {
            panic!()
        };
        assert!(why.contains("no host publishes"), "{why}");
        kept.register(&prober("fra")).unwrap();
        assert_eq!(*kept.state.phase(), RunPhase::Running);
    }

    #[test]
    fn nobody_is_waited_for_without_end() {
        let mut kept = Kept::new(setup(2));
        kept.wait(500);
        let ams = kept.register(&prober("ams")).unwrap();
        for _ in 0..599 {
            kept.wait(1);
            let who = kept.state.find(ams.as_str()).unwrap();
            kept.state.hear_of(kept.now_us, who);
        }
        assert_eq!(*kept.state.phase(), RunPhase::Gathering);
        kept.wait(1);
        assert_eq!(*kept.state.phase(), RunPhase::Over);
        assert_eq!(
            kept.state.stop_reason(),
            Some("1 of 2 probers came, and no other for 600 s")
        );
    }

    #[test]
    fn voicegw_s_probers_get_along() {
        let mut kept = Kept::new(setup(2));
        let ids = ["ams", "fra"].map(|vantage| kept.register(&legacy(vantage)).unwrap());
        assert_eq!(kept.register(&legacy("ams")).unwrap(), ids[0]);
        let job = kept.state.job(0);
        assert_eq!(
            (job.ready, job.throng.is_none(), job.ramp.as_slice()),
            (true, true, &[2, 5, 3][..])
        );
        assert_eq!(job.start_at, Some((kept.now_us + 3 * SECOND) as f64 / 1e6));
        // They send nothing while they work.
        kept.wait(120);
        let report = ProberReport {
            throng: None,
            ..report(None)
        };
        kept.report(&ids[0], &report).unwrap();
        assert!(kept.prober(&ids[1]).is_live());
        kept.report(&ids[1], &report).unwrap();
        assert_eq!(*kept.state.phase(), RunPhase::Over);
    }

    #[test]
    fn a_prober_of_voicegw_that_never_reports_ends_up_missing() {
        let mut kept = Kept::new(setup(1));
        let id = kept.register(&legacy("ams")).unwrap();
        kept.wait(3 + 2 * 15 + 299);
        assert!(kept.prober(&id).is_live());
        kept.wait(1);
        assert!(!kept.prober(&id).is_live() && *kept.state.phase() == RunPhase::Over);
    }

    #[test]
    fn mixed_runs_begin_together_at_the_first_tier() {
        let mut kept = Kept::new(setup(2));
        let ours = kept.register(&prober("ams")).unwrap();
        kept.register(&legacy("fra")).unwrap();
        assert!(!kept.state.job(1).ready);
        for stage in 0..=2 {
            let ready = BeatMessage {
                ready_for: Some(stage),
                ..quiet(u64::from(stage) + 1)
            };
            let order = kept.beat(&ours, &ready).unwrap().order;
            let Order::Start { at_us, .. } = order else {
                panic!("{order:?}")
            };
            let tier = stage == 2;
            assert_eq!(
                kept.state.job(1).start_at,
                tier.then_some(at_us as f64 / 1e6)
            );
        }
    }

    #[test]
    fn cancelling_stops_everybody_and_takes_their_reports() {
        let mut kept = Kept::new(setup(2));
        let ids = ["ams", "fra"].map(|vantage| kept.register(&prober(vantage)).unwrap());
        let entry = kept.state.cancel(kept.now_us, "cancelled").unwrap();
        kept.remember(entry);
        assert!(kept.state.cancel(kept.now_us, "again").is_none());
        for id in &ids {
            let order = kept.beat(id, &quiet(1)).unwrap().order;
            assert_eq!(
                order,
                Order::Stop {
                    reason: "cancelled".to_owned()
                }
            );
            kept.report(id, &report(Some("cancelled"))).unwrap();
        }
        assert_eq!(*kept.state.phase(), RunPhase::Over);
        assert!(
            kept.state
                .probers
                .iter()
                .all(|prober| prober.report.is_some() && !prober.left_early)
        );
    }

    #[test]
    fn nonsense_is_refused_and_changes_nothing() {
        let mut kept = Kept::new(setup(2));
        let ids = ["ams", "fra"].map(|vantage| kept.register(&prober(vantage)).unwrap());
        let owner = kept.state.placed().unwrap().part.owner(0).unwrap();
        let lines = kept.journal.len();
        for nonsense in [
            BeatMessage {
                tiers: vec![tier(0, 1)],
                ..quiet(1)
            },
            BeatMessage {
                tiers: vec![tier(99, 1)],
                ..quiet(1)
            },
            BeatMessage {
                ready_for: Some(7),
                ..quiet(1)
            },
            BeatMessage {
                starts: vec![Start {
                    stage: 80,
                    skew_us: 0,
                }],
                ..quiet(1)
            },
            BeatMessage {
                frames: vec![FrameCountEntry(0, 0, 0, 1, 0)],
                ..quiet(1)
            },
            BeatMessage {
                frames: vec![FrameCountEntry(u32::MAX, 0, 0, 1, 0)],
                ..quiet(1)
            },
        ] {
            let refused = kept.beat(&ids[1 - owner], &nonsense);
            assert!(
                matches!(refused, Err(RefusedRequest::Malformed(_))),
                "{nonsense:?}"
            );
        }
        assert_eq!(kept.journal.len(), lines);
        assert!(
            kept.beat(
                &ids[owner],
                &BeatMessage {
                    frames: vec![FrameCountEntry(0, 0, 0, 1, 0)],
                    ..quiet(1)
                }
            )
            .is_ok()
        );
    }

    /// A simulated prober. It follows its orders, over a network that loses, delays, duplicates and
    /// reorders messages.
    struct Simulated {
        register: Register,
        id: Option<ProverId>,
        seq: u64,
        /// `None`: it waits for stage `next`.
        stage: Option<u32>,
        next: u32,
        stage_ends_us: u64,
        begin: Option<(u32, u64)>,
        measured: BTreeMap<u32, u64>,
        /// By stage, what the coordinator has acknowledged.
        acknowledged: BTreeMap<u32, u64>,
        sent: BTreeMap<u64, Vec<(u32, u64)>>,
        exchange: Option<Exchange>,
        clock_ahead_us: i64,
        /// Exchanges before its clock was set say nothing about it, because no process has two
        /// clocks.
        set_at_seq: u64,
        /// The first beat since then that contained an exchange.
        told_at_seq: Option<u64>,
        stopped: bool,
        reported: bool,
        died: bool,
        asleep_until_us: u64,
        cut_until_us: u64,
    }

    impl Simulated {
        fn new(vantage: &str, clock_ahead_us: i64) -> Simulated {
            Simulated {
                register: prober(vantage),
                id: None,
                seq: 0,
                stage: None,
                next: 0,
                stage_ends_us: 0,
                begin: None,
                measured: BTreeMap::new(),
                acknowledged: BTreeMap::new(),
                sent: BTreeMap::new(),
                exchange: None,
                clock_ahead_us,
                set_at_seq: 0,
                told_at_seq: None,
                stopped: false,
                reported: false,
                died: false,
                asleep_until_us: 0,
                cut_until_us: 0,
            }
        }

        /// Sets the clock forward by `ahead_us`.
        fn set_clock(&mut self, ahead_us: i64) {
            self.clock_ahead_us += ahead_us;
            (self.exchange, self.told_at_seq) = (None, None);
            self.set_at_seq = self.seq;
        }

        fn clock(&self, now_us: u64) -> u64 {
            now_us.checked_add_signed(self.clock_ahead_us).unwrap()
        }

        /// Goes on with its stages, and returns the next beat.
        fn beat(&mut self, now_us: u64, stages: usize) -> BeatMessage {
            if let Some((stage, at_us)) = self
                .begin
                .filter(|(stage, at_us)| *stage == self.next && now_us >= *at_us)
            {
                (self.stage, self.next, self.begin) = (Some(stage), stage + 1, None);
                self.stage_ends_us = at_us.max(now_us) + 5 * SECOND;
            }
            let is_held = |stage: u32| (1..stages as u32 - 2).contains(&stage);
            if let Some(stage) = self
                .stage
                .filter(|stage| is_held(*stage) && now_us < self.stage_ends_us)
            {
                *self.measured.entry(stage).or_default() += 1;
            }
            self.seq += 1;
            let tiers: Vec<(u32, u64)> = self
                .measured
                .iter()
                .map(|(stage, count)| (*stage, *count))
                .collect();
            let news = tiers
                .into_iter()
                .filter(|(stage, count)| self.acknowledged.get(stage) != Some(count))
                .collect::<Vec<_>>();
            self.sent.insert(self.seq, news.clone());
            if self.exchange.is_some() {
                self.told_at_seq.get_or_insert(self.seq);
            }
            BeatMessage {
                sent_at_us: self.clock(now_us),
                exchange: self.exchange,
                stage: self.stage,
                ready_for: (self.next < stages as u32 && now_us >= self.stage_ends_us)
                    .then_some(self.next),
                tiers: news
                    .into_iter()
                    .map(|(stage, count)| tier(stage, count))
                    .collect(),
                ..quiet(self.seq)
            }
        }

        fn hear(&mut self, now_us: u64, beat: &BeatMessage, reply: &BeatReply) {
            for (stage, count) in self.sent.remove(&reply.seq).unwrap_or_default() {
                let best = self.acknowledged.entry(stage).or_default();
                *best = count.max(*best);
            }
            if beat.seq == self.seq && beat.seq > self.set_at_seq {
                self.exchange = Some(Exchange {
                    life: reply.life,
                    sent_at_us: beat.sent_at_us,
                    received_at_us: reply.received_at_us,
                    replied_at_us: reply.replied_at_us,
                    heard_at_us: self.clock(now_us).max(beat.sent_at_us),
                });
            }
            match &reply.order {
                Order::Wait => {}
                Order::Start { stage, at_us } => self.begin = Some((*stage, *at_us)),
                Order::Stop { .. } => self.stopped = true,
            }
        }
    }

    /// Simulates one run with every failure that a seed brings. Checks that every acknowledged
    /// record is in the state and that the run ends. Returns whether all reported, and whether
    /// somebody was missed.
    fn simulate(seed: u64) -> (bool, bool) {
        let mut chance = Seeded::new(seed);
        let expect = 1 + chance.below(4) as u32;
        let on_missing = if chance.chance(70) {
            OnMissing::Continue
        } else {
            OnMissing::Stop
        };
        let mut kept = Kept::new(RunSetup {
            on_missing,
            ..setup(expect)
        });
        let mut probers: Vec<Simulated> = (0..expect)
            .map(|number| {
                Simulated::new(
                    &format!("v{number}"),
                    chance.below(7_200 * SECOND).cast_signed() - 3_600 * SECOND.cast_signed(),
                )
            })
            .collect();
        let (loss, doubling, delay) =
            (chance.below(40), chance.below(30), chance.below(4) * SECOND);
        let calamities = chance.below(16);
        let stages = kept.setup_stages();
        // Messages under way: arrival time, sender and content.
        let mut under_way: Vec<(u64, usize, BeatMessage)> = Vec::new();
        let mut ended = false;
        for step in 0..6_000 {
            kept.now_us += SECOND / 5;
            let now_us = kept.now_us;
            if chance.below(1_000) < calamities {
                let who = chance.below(u64::from(expect)) as usize;
                match chance.below(6) {
                    0 => probers[who].died = true,
                    1 => probers[who].asleep_until_us = now_us + 10 * SECOND,
                    2 => probers[who].cut_until_us = now_us + 15 * SECOND,
                    3 => kept.restart(),
                    4 => {
                        // Its clock is set, as on a host that slept.
                        probers[who].set_clock(-3_600 * SECOND.cast_signed());
                    }
                    _ => {
                        // The coordinator's clock is set while the coordinator is down. No message
                        // under way survives that.
                        let back = chance.chance(50);
                        kept.now_us = if back {
                            now_us - 3_600 * SECOND
                        } else {
                            now_us + 3_600 * SECOND
                        };
                        kept.restart();
                        under_way.clear();
                        for prober in &mut probers {
                            let moved = kept.now_us.cast_signed() - now_us.cast_signed();
                            prober.set_clock(-moved);
                            let shift = |at_us: u64| {
                                if at_us == 0 {
                                    0
                                } else {
                                    at_us.checked_add_signed(moved).unwrap()
                                }
                            };
                            prober.stage_ends_us = shift(prober.stage_ends_us);
                            (prober.asleep_until_us, prober.cut_until_us) =
                                (shift(prober.asleep_until_us), shift(prober.cut_until_us));
                        }
                    }
                }
            }
            let now_us = kept.now_us;
            for (who, prober) in probers.iter_mut().enumerate() {
                if prober.died || now_us < prober.asleep_until_us || prober.reported {
                    continue;
                }
                let reachable = now_us >= prober.cut_until_us;
                let Some(id) = prober.id.clone() else {
                    if reachable && step % 5 == 0 && !chance.chance(loss) {
                        prober.id = kept.register(&prober.register).ok();
                    }
                    continue;
                };
                if kept.state.find(id.as_str()).is_err() {
                    prober.id = None;
                    continue;
                }
                if !kept.state.job(kept.state.find(id.as_str()).unwrap()).ready {
                    let who = kept.state.find(id.as_str()).unwrap();
                    kept.state.hear_of(now_us, who);
                    continue;
                }
                let over = prober.stopped
                    || prober.next as usize >= stages && now_us >= prober.stage_ends_us;
                if over && reachable && !chance.chance(loss) {
                    kept.report(&id, &report(None)).unwrap();
                    // The answer may be lost. Then the report is sent again.
                    prober.reported = !chance.chance(loss);
                    continue;
                }
                let beat = prober.beat(now_us, stages);
                if reachable && !chance.chance(loss) {
                    under_way.push((now_us + chance.below(delay + 1), who, beat.clone()));
                    if chance.chance(doubling) {
                        under_way.push((now_us + chance.below(30 * SECOND), who, beat));
                    }
                }
            }
            let mut arrived: Vec<(u64, usize, BeatMessage)> = under_way
                .extract_if(.., |(at_us, ..)| *at_us <= now_us)
                .collect();
            arrived.sort_by_key(|(at_us, ..)| *at_us);
            for (_, who, beat) in arrived {
                let id = probers[who].id.clone().unwrap();
                let Ok(reply) = kept.beat(&id, &beat) else {
                    continue;
                };
                let hears = !probers[who].died
                    && now_us >= probers[who].asleep_until_us
                    && now_us >= probers[who].cut_until_us;
                if hears && !chance.chance(loss) {
                    probers[who].hear(now_us, &beat, &reply);
                }
            }
            kept.settle();
            for prober in &probers {
                let Some(known) = prober
                    .id
                    .as_ref()
                    .and_then(|id| kept.state.find(id.as_str()).ok())
                else {
                    continue;
                };
                for (stage, count) in &prober.acknowledged {
                    let in_state = kept.state.probers[known]
                        .tiers
                        .get(stage)
                        .map_or(0.0, |tier| tier.seconds);
                    assert!(
                        in_state >= *count as f64,
                        "seed {seed}, step {step}: {stage} {count} {in_state}"
                    );
                }
                let known = &kept.state.probers[known];
                if let Some(offset) = known
                    .offset()
                    .filter(|_| prober.told_at_seq.is_some_and(|told| known.seq >= told))
                {
                    let off_us = offset.offset_us.abs_diff(-prober.clock_ahead_us);
                    assert!(
                        off_us <= offset.uncertainty_us,
                        "seed {seed}, step {step}: {off_us} {offset:?}"
                    );
                }
            }
            if *kept.state.phase() == RunPhase::Over {
                ended = true;
                break;
            }
        }
        let alive = probers.iter().filter(|prober| !prober.died).count();
        assert!(
            ended || *kept.state.phase() == RunPhase::Gathering,
            "seed {seed} does not end: {alive} of {expect} are alive"
        );
        let before = essence(&kept.state);
        kept.restart();
        assert!(
            before == essence(&kept.state),
            "seed {seed}: the journal does not make the same state"
        );
        (
            kept.state.all_reported(),
            kept.state
                .probers
                .iter()
                .any(|prober| prober.gone.is_some()),
        )
    }

    /// Returns the part of the state that outlives a process.
    fn essence(state: &RunState) -> impl PartialEq + use<> {
        let of_prober = |prober: &ProberState| {
            let tiers: Vec<(u32, u64)> = prober
                .tiers
                .iter()
                .map(|(stage, tier)| (*stage, tier.seconds as u64))
                .collect();
            let ends = (
                prober.gone.clone(),
                prober.report.is_some(),
                prober.left_early,
            );
            (prober.id.clone(), prober.player, tiers, ends)
        };
        let probers: Vec<_> = state.probers.iter().map(of_prober).collect();
        let orders: Vec<u32> = state.orders.iter().map(|order| order.stage).collect();
        (
            state.phase.clone(),
            state.stop_reason.clone(),
            probers,
            orders,
        )
    }

    impl Kept {
        fn setup_stages(&self) -> usize {
            self.state.setup.load.tiers().len() + 4
        }
    }

    #[test]
    fn whatever_goes_wrong_every_acknowledged_record_is_kept_and_the_run_ends() {
        let ends: Vec<(bool, bool)> = (0..200).map(simulate).collect();
        let (whole, missing) = (
            ends.iter().filter(|end| end.0).count(),
            ends.iter().filter(|end| end.1).count(),
        );
        assert!(
            whole >= 50 && missing >= 30,
            "{whole} and {missing} of 200 are too few to show anything"
        );
    }
}
