//! A run over many hosts as a state machine: without sockets, files or clocks.
//!
//! What probers say is looked at first ([`State::register`], [`State::beat`], ..), which changes nothing and says what is to be remembered: an [`Entry`]. The caller writes it to the
//! journal and only then lets it come true ([`State::apply`]). So does it with what time brings about ([`State::due`]). A state is therefore what its entries make it, and the same
//! entries make the same state: that is how a coordinator that was killed goes on. What need not outlive the process (who was heard when, the last second's figures) takes the shorter
//! way of [`State::hear`].
//!
//! Times are microseconds since 1970 by the coordinator's clock, which never steps while it lives.
//!
//! Time-outs count silence. How long a run takes is nobody's business but the user's.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::clock::{ClockEstimate, Offset};
use super::place::{Load, Placed};
use super::protocol::{
    self, Beat, BeatReply, Exchange, FrameCount, Job, JobReply, Live, Order, ProverId, Register, Registered, Report, Reported, Stage, StageKind,
    Start, TierSoFar, VantageClock, WireJudging,
};
use crate::plan::Vantage;

/// A stage is ordered so much ahead, that everybody hears of it in time: waiting probers ask five times a second.
const LEAD_US: u64 = 2_000_000;
/// What `voicegw`'s probers get, who ask once a second.
const LEGACY_LEAD_US: u64 = 3_000_000;
/// `voicegw`'s probers say nothing while they work: they have twice as long as their tiers take, and this.
const LEGACY_SLACK_US: u64 = 300_000_000;
/// A round-trip time that nobody judges: `voicegw`'s own default, for probers that want a number.
const LEGACY_TARGET_RTT_MS: f64 = 50.0;
/// An order that lies further ahead than this was given by a clock that has been set back since.
const AHEAD_US_MAX: u64 = 60_000_000;
/// Whoever keeps the state looks at it so often, or was kept from it: what nobody could hear then is no silence.
pub const LOOK_US_MAX: u64 = 2_000_000;

/// What becomes of a run that loses a prober.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnMissing {
    Continue,
    Stop,
}

/// All that is fixed before the first prober comes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Setup {
    pub run_tag: u32,
    pub seed: u64,
    pub expect: u32,
    pub on_missing: OnMissing,
    pub load: Load,
    pub judging: WireJudging,
    /// The server under test, where probers need not know it by themselves.
    pub url: Option<String>,
    /// The coordinator can make room tokens.
    pub tokens: bool,
    /// The coordinator makes the rooms, and deletes them.
    pub rooms_made: bool,
    /// Who says nothing for so long is missing.
    pub silence_us: u64,
    /// So long after the last one that came, the next prober is waited for.
    pub gather_us: u64,
}

impl Setup {
    /// A prober that hears nothing of its coordinator for so long ends its load. Longer than [`Setup::silence_us`]: a coordinator has to be started again by somebody.
    pub fn patience_us(&self) -> u64 {
        self.silence_us.saturating_mul(4)
    }
}

/// What is remembered: a line of the journal.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "entry", rename_all = "snake_case")]
pub enum Entry {
    Registered {
        at_us: u64,
        prover_id: ProverId,
        vantage: String,
        register: Register,
    },
    /// Before everybody was in. Its place is free.
    Left {
        at_us: u64,
        prover_id: ProverId,
    },
    /// Everybody is in.
    Armed {
        at_us: u64,
    },
    Ordered {
        at_us: u64,
        stage: u32,
        start_us: u64,
    },
    /// What a beat brought that is not to be lost.
    Beat {
        at_us: u64,
        prover_id: ProverId,
        seq: u64,
        tiers: Vec<TierSoFar>,
        frames: Vec<FrameCount>,
        starts: Vec<Start>,
        invalid: Vec<String>,
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
        report: Box<Report>,
    },
    /// Nothing more is to come.
    Over {
        at_us: u64,
    },
}

/// Why something is refused, by what the asker can do about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It cannot be understood, or contradicts itself.
    #[error("{0}")]
    Malformed(String),
    /// Nobody of that name.
    #[error("{0}")]
    Unknown(String),
    /// Not as things stand.
    #[error("{0}")]
    Conflict(String),
}

/// Where a run is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Probers are being waited for.
    Gathering,
    Running,
    /// Everybody is told to stop, and reports are being waited for.
    Stopping,
    Over,
}

impl Phase {
    pub const fn name(&self) -> &'static str {
        match self {
            Phase::Gathering => "gathering",
            Phase::Running => "running",
            Phase::Stopping => "stopping",
            Phase::Over => "over",
        }
    }
}

/// A stage that was ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Underway {
    pub stage: u32,
    pub start_us: u64,
}

/// A prober, and all that it has said.
#[derive(Clone, Debug)]
pub struct Prober {
    pub id: ProverId,
    pub vantage: String,
    pub register: Register,
    /// Its index among those who play the plan ([`Job::vantages`]); `None` before everybody is in, and for `voicegw`'s.
    pub player: Option<u32>,
    pub seq: u64,
    pub stage: Option<u32>,
    pub ready_for: Option<u32>,
    /// By stage.
    pub tiers: BTreeMap<u32, TierSoFar>,
    /// By origin, track and layer.
    pub frames: BTreeMap<(u32, u8, u8), u64>,
    /// By how much it began each stage late, in microseconds.
    pub starts: BTreeMap<u32, i64>,
    pub invalid: Vec<String>,
    pub live: Live,
    pub clock: ClockEstimate,
    /// Its last sign of life.
    pub heard_us: u64,
    /// What silence counts from: its last sign of life, or later, where there was a time in which nobody listened.
    silent_since_us: u64,
    pub gone: Option<Gone>,
    pub report: Option<Report>,
    /// It reported before the others had finished.
    pub left_early: bool,
}

/// Why the run goes on without a prober.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gone {
    pub at_us: u64,
    pub last_heard_us: u64,
    pub why: String,
}

impl Prober {
    /// `voicegw`'s: it is told where and when, and reports.
    pub fn is_legacy(&self) -> bool {
        self.register.protocol.is_none()
    }

    /// Has a part in what is to come.
    pub fn is_live(&self) -> bool {
        self.gone.is_none() && self.report.is_none()
    }

    pub fn offset(&self) -> Option<Offset> {
        self.clock.offset()
    }
}

/// A run over many hosts.
pub struct State {
    setup: Setup,
    /// Of this process.
    life: u64,
    probers: Vec<Prober>,
    phase: Phase,
    placed: Option<Placed>,
    underway: Option<Underway>,
    stop_reason: Option<String>,
    /// When everybody was in.
    armed_us: Option<u64>,
    /// When `voicegw`'s probers begin.
    legacy_start_us: Option<u64>,
    /// When the last prober came, or the coordinator began to listen.
    quiet_since_us: u64,
    looked_us: u64,
}

impl State {
    pub fn new(setup: Setup, life: u64, now_us: u64) -> State {
        State {
            setup,
            life,
            probers: Vec::new(),
            phase: Phase::Gathering,
            placed: None,
            underway: None,
            stop_reason: None,
            armed_us: None,
            legacy_start_us: None,
            quiet_since_us: now_us,
            looked_us: now_us,
        }
    }

    /// After the journal of an earlier life was applied: silence counts from now, and so does what was ordered by another clock.
    pub fn resume(&mut self, now_us: u64) {
        self.quiet_since_us = now_us;
        self.looked_us = now_us;
        self.probers.iter_mut().for_each(|prober| prober.silent_since_us = now_us);
        if self.legacy_start_us.is_some_and(|start_us| start_us > now_us + AHEAD_US_MAX) {
            self.legacy_start_us = Some(now_us + LEGACY_LEAD_US);
        }
        if let Some(underway) = &mut self.underway
            && underway.start_us > now_us + AHEAD_US_MAX
        {
            underway.start_us = now_us + LEAD_US;
        }
    }

    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    /// In the order of their registration.
    pub fn probers(&self) -> &[Prober] {
        &self.probers
    }

    /// Once everybody is in.
    pub fn placed(&self) -> Option<&Placed> {
        self.placed.as_ref()
    }

    pub fn underway(&self) -> Option<Underway> {
        self.underway
    }

    /// Why the run ends before its time; `None` while it does not.
    pub fn stop_reason(&self) -> Option<&str> {
        self.stop_reason.as_deref()
    }

    /// The stages, with the subscribers of the first player.
    pub fn stages(&self) -> &[Stage] {
        self.placed.as_ref().and_then(|placed| placed.stages.first()).map_or(&[], Vec::as_slice)
    }

    /// Whoever keeps the state is awake, and hears. To be called at least once a second; time in which it was not is added to everybody's patience.
    pub fn look(&mut self, now_us: u64) {
        let away_us = now_us.saturating_sub(self.looked_us);
        self.looked_us = now_us;
        if away_us > LOOK_US_MAX {
            self.quiet_since_us += away_us;
            self.probers.iter_mut().for_each(|prober| prober.silent_since_us += away_us);
        }
    }

    /// Everybody who came has reported.
    pub fn all_reported(&self) -> bool {
        self.armed_us.is_some() && self.probers.iter().all(|prober| prober.report.is_some())
    }

    pub fn find(&self, id: &str) -> Result<usize, Refused> {
        let found = self.probers.iter().position(|prober| prober.id.as_str() == id);
        found.ok_or_else(|| Refused::Unknown("no prober of this run has this id: register first".to_owned()))
    }

    /// Somebody wants to take part. `fresh` is the id that a new prober gets.
    ///
    /// # Errors
    /// Which leave everything as it is.
    pub fn register(&self, now_us: u64, register: &Register, fresh: ProverId) -> Result<(Registered, Vec<Entry>), Refused> {
        if let Some(version) = register.protocol.filter(|version| *version != protocol::VERSION) {
            return Err(Refused::Conflict(protocol::other_version("prober", version, "coordinator").to_string()));
        }
        let answer = |id: &ProverId| Registered {
            prover_id: id.clone(),
            expected: self.setup.expect,
            protocol: Some(protocol::VERSION),
        };
        let same_process = |prober: &&Prober| register.instance.is_some() && prober.register.instance == register.instance;
        if let Some(known) = self.probers.iter().find(same_process) {
            return Ok((answer(&known.id), Vec::new()));
        }
        let vantage = register.vantage.clone().unwrap_or_else(|| format!("vantage-{}", self.probers.len() + 1));
        let namesake = self.probers.iter().find(|prober| prober.vantage == vantage);
        if let Some(namesake) = namesake.filter(|prober| prober.is_legacy() && register.protocol.is_none()) {
            // It names no process: who comes with its label is taken for it.
            return Ok((answer(&namesake.id), Vec::new()));
        }
        self.must_be_open(&vantage, namesake)?;
        let mut entries = Vec::new();
        if let Some(namesake) = namesake {
            if now_us.saturating_sub(namesake.silent_since_us) < self.setup.silence_us {
                return Err(Refused::Conflict(format!(
                    "another prober calls itself '{vantage}': give each host a --vantage of its own (or, if that one has died, try again in {} s)",
                    self.setup.silence_us / 1_000_000
                )));
            }
            entries.push(Entry::Left {
                at_us: now_us,
                prover_id: namesake.id.clone(),
            });
        } else if self.probers.len() >= self.setup.expect as usize {
            return Err(Refused::Conflict(self.full()));
        }
        self.must_be_playable(register, namesake)?;
        entries.push(Entry::Registered {
            at_us: now_us,
            prover_id: fresh.clone(),
            vantage,
            register: register.clone(),
        });
        Ok((answer(&fresh), entries))
    }

    fn full(&self) -> String {
        let names: Vec<&str> = self.probers.iter().take(10).map(|prober| prober.vantage.as_str()).collect();
        format!(
            "{} probers were expected and are in ({}{}): start the coordinator with a higher --expect",
            self.setup.expect,
            names.join(", "),
            if self.probers.len() > names.len() { ", .." } else { "" }
        )
    }

    fn must_be_open(&self, vantage: &str, namesake: Option<&Prober>) -> Result<(), Refused> {
        match (&self.phase, namesake) {
            (Phase::Gathering, _) => Ok(()),
            (Phase::Over | Phase::Stopping, _) => Err(Refused::Conflict("the run is over: start another one".to_owned())),
            (Phase::Running, Some(_)) => Err(Refused::Conflict(format!(
                "the run is under way, and '{vantage}' was in it: a prober that is started again cannot go on, the run goes on without it"
            ))),
            (Phase::Running, None) => Err(Refused::Conflict(self.full())),
        }
    }

    /// The last one who comes decides whether there are publishers and subscribers: nobody is let in who would leave a run that cannot be.
    fn must_be_playable(&self, register: &Register, replaced: Option<&Prober>) -> Result<(), Refused> {
        let others = self
            .probers
            .iter()
            .filter(|prober| replaced.is_none_or(|replaced| replaced.id != prober.id));
        let registers: Vec<&Register> = others.map(|prober| &prober.register).chain([register]).collect();
        if registers.len() < self.setup.expect as usize {
            return Ok(());
        }
        let vantages = vantages(registers.into_iter());
        match vantages.is_empty() {
            true => Ok(()),
            false => self.setup.load.place(vantages).map(drop).map_err(Refused::Conflict),
        }
    }

    /// What a beat brings that is not to be lost; nothing if it brings nothing new.
    ///
    /// # Errors
    /// Which leave everything as it is.
    pub fn beat(&self, now_us: u64, who: usize, beat: &Beat) -> Result<Option<Entry>, Refused> {
        let prober = &self.probers[who];
        let (Some(player), Some(placed)) = (prober.player, &self.placed) else {
            return Err(Refused::Conflict("not everybody is in yet: ask for the job until it is ready".to_owned()));
        };
        if beat.seq <= prober.seq {
            return Ok(None);
        }
        self.must_make_sense(beat, placed, player)?;
        let has_news = !beat.tiers.is_empty() || !beat.frames.is_empty() || !beat.starts.is_empty() || beat.invalid != prober.invalid;
        Ok(has_news.then(|| Entry::Beat {
            at_us: now_us,
            prover_id: prober.id.clone(),
            seq: beat.seq,
            tiers: beat.tiers.clone(),
            frames: beat.frames.clone(),
            starts: beat.starts.clone(),
            invalid: beat.invalid.clone(),
        }))
    }

    fn must_make_sense(&self, beat: &Beat, placed: &Placed, player: u32) -> Result<(), Refused> {
        let malformed = |why: &str| Err(Refused::Malformed(why.to_owned()));
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
        let is_own =
            |count: &FrameCount| placed.part.owner(count.0) == Some(player as usize) && count.1 <= 1 && count.2 < 8 && count.3 <= protocol::WHOLE_MAX;
        if !beat.frames.iter().all(is_own) {
            return malformed("frames: of a publisher that another prober plays, or of a track that there is not");
        }
        Ok(())
    }

    /// A sign of life, and what is known from it for as long as this process lives. Comes after the beat's entry was applied.
    pub fn hear(&mut self, now_us: u64, who: usize, beat: &Beat) {
        let life = self.life;
        let prober = &mut self.probers[who];
        (prober.heard_us, prober.silent_since_us) = (now_us, now_us);
        // Of an older life's clock nothing follows.
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

    /// A sign of life without a beat.
    pub fn hear_of(&mut self, now_us: u64, who: usize) {
        let prober = &mut self.probers[who];
        (prober.heard_us, prober.silent_since_us) = (now_us, now_us);
    }

    /// A final report; nothing if it has come before.
    ///
    /// # Errors
    /// Which leave everything as it is.
    pub fn report(&self, now_us: u64, who: usize, report: &Report) -> Result<Option<Entry>, Refused> {
        let prober = &self.probers[who];
        if self.armed_us.is_none() {
            return Err(Refused::Conflict("nothing has begun that could be reported".to_owned()));
        }
        if prober.report.is_some() {
            return Ok(None);
        }
        if let (Some(player), Some(placed), Some(full)) = (prober.player, &self.placed, &report.throng) {
            let stages = &placed.stages[player as usize];
            let is_held = |stage: u32| {
                stages
                    .get(stage as usize)
                    .is_some_and(|stage| matches!(stage.kind, StageKind::Baseline | StageKind::Tier))
            };
            if !full.tiers.iter().all(|tier| is_held(tier.measured.stage)) {
                return Err(Refused::Malformed("throng.tiers: a stage that is no tier of this run".to_owned()));
            }
        }
        Ok(Some(Entry::Reported {
            at_us: now_us,
            prover_id: prober.id.clone(),
            report: Box::new(report.clone()),
        }))
    }

    pub fn reported(&self) -> Reported {
        Reported {
            ok: true,
            all_reported: self.all_reported(),
        }
    }

    /// Somebody wants the run to end; nothing if it is ending already.
    pub fn cancel(&self, now_us: u64, reason: &str) -> Option<Entry> {
        matches!(self.phase, Phase::Gathering | Phase::Running).then(|| Entry::Stopping {
            at_us: now_us,
            reason: reason.to_owned(),
        })
    }

    /// What is to happen by now. To be asked again after it has been applied, until nothing is left.
    pub fn due(&self, now_us: u64) -> Option<Entry> {
        match self.phase {
            Phase::Gathering => self.gather(now_us),
            Phase::Running => self.lose(now_us).or_else(|| self.go_on(now_us)),
            Phase::Stopping => self.lose(now_us).or_else(|| self.finish(now_us)),
            Phase::Over => None,
        }
    }

    fn gather(&self, now_us: u64) -> Option<Entry> {
        let silent = |prober: &&Prober| now_us.saturating_sub(prober.silent_since_us) >= self.setup.silence_us;
        if let Some(silent) = self.probers.iter().find(silent) {
            return Some(Entry::Left {
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
                Ok(()) => Entry::Armed { at_us: now_us },
                Err(reason) => Entry::Stopping { at_us: now_us, reason },
            });
        }
        (now_us.saturating_sub(self.quiet_since_us) >= self.setup.gather_us).then(|| Entry::Stopping {
            at_us: now_us,
            reason: format!(
                "{} of {} probers came, and no other for {} s",
                self.probers.len(),
                self.setup.expect,
                self.setup.gather_us / 1_000_000
            ),
        })
    }

    /// Who has been silent for too long.
    fn lose(&self, now_us: u64) -> Option<Entry> {
        let lost = self.probers.iter().filter(|prober| prober.is_live()).find_map(|prober| {
            let (silent_since, patience) = match prober.is_legacy() {
                true => (self.legacy_start_us.unwrap_or(0).max(prober.silent_since_us), self.legacy_patience_us()),
                false => (prober.silent_since_us, self.setup.silence_us),
            };
            let silent_us = now_us.saturating_sub(silent_since);
            let stopped = prober.is_legacy() && self.phase == Phase::Stopping;
            (silent_us >= patience || stopped).then(|| match stopped {
                true => (prober, "nothing tells voicegw's probers to stop".to_owned()),
                false => (prober, format!("silent for {} s", silent_us / 1_000_000)),
            })
        });
        lost.map(|(prober, why)| Entry::Missing {
            at_us: now_us,
            prover_id: prober.id.clone(),
            last_heard_us: prober.heard_us,
            why,
        })
    }

    fn legacy_patience_us(&self) -> u64 {
        let planned = self.setup.load.plan.duration_us.saturating_mul(self.setup.load.tiers.len() as u64);
        planned.saturating_mul(2).saturating_add(LEGACY_SLACK_US)
    }

    fn go_on(&self, now_us: u64) -> Option<Entry> {
        let missed = || self.probers.iter().find(|prober| prober.gone.is_some() || prober.left_early);
        if let (OnMissing::Stop, Some(missed)) = (self.setup.on_missing, missed()) {
            return Some(Entry::Stopping {
                at_us: now_us,
                reason: format!("'{}' is missing, and the run was not to go on without it", missed.vantage),
            });
        }
        if let Some(over) = self.finish(now_us) {
            return Some(over);
        }
        let stage = self.underway.map_or(0, |underway| underway.stage + 1);
        let kind = self.stages().get(stage as usize)?.kind;
        let mut players = self.probers.iter().filter(|prober| prober.is_live() && !prober.is_legacy()).peekable();
        players.peek()?;
        players
            .all(|prober| prober.ready_for.is_some_and(|ready_for| ready_for >= stage))
            .then(|| Entry::Ordered {
                at_us: now_us,
                stage,
                start_us: match kind {
                    // Nobody need begin at the same moment: all are ready.
                    StageKind::Stop | StageKind::Leave => now_us,
                    StageKind::Publish | StageKind::Baseline | StageKind::Tier => now_us + LEAD_US,
                },
            })
    }

    fn finish(&self, now_us: u64) -> Option<Entry> {
        let nobody_left = !self.probers.iter().any(Prober::is_live);
        nobody_left.then_some(Entry::Over { at_us: now_us })
    }

    /// Lets an entry come true. Takes those of a journal as well as those that were just written.
    pub fn apply(&mut self, entry: Entry) {
        match entry {
            Entry::Registered {
                at_us,
                prover_id,
                vantage,
                register,
            } => self.admit(at_us, prover_id, vantage, register),
            Entry::Left { prover_id, .. } => self.probers.retain(|prober| prober.id != prover_id),
            Entry::Armed { at_us } => self.arm(at_us),
            Entry::Ordered { stage, start_us, .. } => {
                self.underway = Some(Underway { stage, start_us });
                if self.stages().get(stage as usize).is_some_and(|stage| stage.kind == StageKind::Tier) {
                    self.legacy_start_us.get_or_insert(start_us);
                }
            }
            Entry::Beat {
                at_us,
                prover_id,
                seq,
                tiers,
                frames,
                starts,
                invalid,
            } => {
                let Some(prober) = self.prober(&prover_id).filter(|prober| seq > prober.seq) else {
                    return;
                };
                prober.seq = seq;
                (prober.heard_us, prober.silent_since_us) = (at_us, at_us);
                prober.tiers.extend(tiers.into_iter().map(|tier| (tier.stage, tier)));
                prober.frames.extend(
                    frames
                        .into_iter()
                        .map(|FrameCount(origin, track, layer, count)| ((origin, track, layer), count)),
                );
                prober.starts.extend(starts.into_iter().map(|start| (start.stage, start.skew_us)));
                prober.invalid = invalid;
            }
            Entry::Missing {
                at_us,
                prover_id,
                last_heard_us,
                why,
            } => {
                if let Some(prober) = self.prober(&prover_id) {
                    prober.gone = Some(Gone { at_us, last_heard_us, why });
                }
            }
            Entry::Stopping { reason, .. } => {
                self.stop_reason.get_or_insert(reason);
                // Who waits for others has nothing to stop, and nothing to report.
                self.phase = if self.phase == Phase::Gathering { Phase::Over } else { Phase::Stopping };
            }
            Entry::Reported { at_us, prover_id, report } => {
                let is_early = self.phase == Phase::Running && !self.is_leaving();
                if let Some(prober) = self.prober(&prover_id).filter(|prober| prober.report.is_none()) {
                    prober.left_early = is_early && !prober.is_legacy() && prober.gone.is_none();
                    (prober.heard_us, prober.silent_since_us) = (at_us, at_us);
                    prober.report = Some(*report);
                }
            }
            Entry::Over { .. } => self.phase = Phase::Over,
        }
    }

    fn prober(&mut self, id: &ProverId) -> Option<&mut Prober> {
        self.probers.iter_mut().find(|prober| prober.id == *id)
    }

    /// All tiers are over for everybody.
    fn is_leaving(&self) -> bool {
        let stage = self.underway.and_then(|underway| self.stages().get(underway.stage as usize));
        stage.is_some_and(|stage| stage.kind == StageKind::Leave)
    }

    fn admit(&mut self, at_us: u64, id: ProverId, vantage: String, register: Register) {
        self.quiet_since_us = at_us;
        self.probers.push(Prober {
            id,
            vantage,
            register,
            player: None,
            seq: 0,
            stage: None,
            ready_for: None,
            tiers: BTreeMap::new(),
            frames: BTreeMap::new(),
            starts: BTreeMap::new(),
            invalid: Vec::new(),
            live: Live::default(),
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
        players.enumerate().for_each(|(player, prober)| prober.player = Some(player as u32));
        (self.phase, self.armed_us) = (Phase::Running, Some(at_us));
        match vantages.is_empty() {
            true => self.legacy_start_us = Some(at_us + LEGACY_LEAD_US),
            false => self.placed = self.setup.load.place(vantages).ok(),
        }
    }

    /// What a prober has to do, as far as it is known yet.
    pub fn job(&self, who: usize) -> JobReply {
        let (prober, plan) = (&self.probers[who], &self.setup.load.plan);
        let start_us = self.legacy_start_us.filter(|_| prober.is_legacy());
        JobReply {
            room: plan.room_name.clone().unwrap_or_else(|| format!("throng-{:08x}", self.setup.run_tag)),
            ramp: self.setup.load.tiers.clone(),
            duration: plan.duration_us as f64 / 1e6,
            target_rtt_ms: self.setup.judging.target_rtt_us.map_or(LEGACY_TARGET_RTT_MS, |us| us as f64 / 1e3),
            max_loss: self.setup.judging.max_loss_pct,
            start_at: start_us.map(|us| us as f64 / 1e6),
            ready: if prober.is_legacy() {
                start_us.is_some()
            } else {
                self.armed_us.is_some()
            },
            throng: prober.player.zip(self.placed.as_ref()).map(|(player, placed)| Job {
                protocol: protocol::VERSION,
                run_tag: self.setup.run_tag,
                seed: self.setup.seed,
                vantages: self.players().map(|prober| prober.vantage.clone()).collect(),
                me: player,
                plan: placed.plan.clone(),
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

    /// In the order of [`Job::vantages`].
    fn players(&self) -> impl Iterator<Item = &Prober> {
        self.probers.iter().filter(|prober| prober.player.is_some())
    }

    /// The answer to a beat that has been journaled and heard.
    pub fn reply(&self, who: usize, seq: u64, received_at_us: u64, replied_at_us: u64) -> BeatReply {
        let others = || {
            self.probers
                .iter()
                .enumerate()
                .filter(|(index, _)| *index != who)
                .map(|(_, prober)| prober)
        };
        let clock = |prober: &Prober| {
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
                .map(|((origin, track, layer), count)| FrameCount(*origin, *track, *layer, *count))
                .collect(),
            clocks: self.probers.iter().filter_map(clock).collect(),
            missing: others()
                .filter(|prober| prober.gone.is_some() || prober.left_early)
                .filter_map(|prober| prober.player)
                .collect(),
        }
    }

    fn order(&self, prober: &Prober) -> Order {
        if prober.report.is_some() {
            return Order::Wait;
        }
        if let Some(gone) = &prober.gone {
            return Order::Stop {
                reason: format!("{}, and the run went on without this prober", gone.why),
            };
        }
        match (&self.phase, &self.stop_reason, self.underway) {
            (Phase::Stopping | Phase::Over, Some(reason), _) => Order::Stop { reason: reason.clone() },
            (Phase::Running, _, Some(Underway { stage, start_us })) if prober.stage.is_none_or(|reached| reached < stage) => {
                Order::Start { stage, at_us: start_us }
            }
            _ => Order::Wait,
        }
    }
}

/// Of those who play the plan.
fn vantages<'a>(registers: impl Iterator<Item = &'a Register>) -> Vec<Vantage> {
    registers
        .filter(|register| register.protocol.is_some())
        .map(|register| Vantage {
            role: register.role,
            weight: register.weight,
        })
        .collect()
}
