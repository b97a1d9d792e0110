//! Prepared runs over many hosts, for tests of how they are shown.

use super::place::tests::load;
use super::protocol::{
    BeatMessage, ClientStep, EngineShort, FinalReport, LiveSecond, ProberReport, ProverId,
    Register, Start, TierReport, TierSoFar, WireJudging, WireVerdict,
};
use super::state::{JournalEntry, RunPhase, RunState, tests::setup};
use crate::measure::Record;
use crate::measure::wire::RecordWire;
use crate::plan::HostRole;
use crate::report::{Judging, Verdict};

pub const START_US: u64 = 1_790_000_000_000_000;
/// Index of the baseline stage. The stages `publish` and `baseline` come before the first tier.
pub const BASELINE: u32 = 1;
pub const TIER: u32 = 2;

/// Figures of a tier as one host measured them.
#[derive(Clone, Copy)]
pub struct Saw {
    pub subscribers: u64,
    /// Lost frames and packets out of 1,000.
    pub lost: u64,
    pub rtt_us: u64,
    pub latency_us: u64,
    pub publishes: bool,
}

pub const WELL: Saw = Saw {
    subscribers: 10,
    lost: 0,
    rtt_us: 20_000,
    latency_us: 30_000,
    publishes: true,
};

impl Saw {
    pub fn record(self) -> Record {
        let mut record = Record::default();
        let session = &mut record.session;
        (session.joins_planned, session.joins_ok) = (self.subscribers, self.subscribers);
        (session.participants_total, session.participants_healthy) =
            (self.subscribers, self.subscribers);
        let audio = &mut record.audio;
        (audio.tracks_expected, audio.tracks_live) = (3 * self.subscribers, 3 * self.subscribers);
        let packets = 1_000 * self.subscribers;
        audio.packets_received = packets - self.lost * self.subscribers;
        audio.packets_lost = self.lost * self.subscribers;
        audio.packets_lost_network = audio.packets_lost;
        (audio.frames_expected, audio.frames_delivered) = (packets, audio.packets_received);
        audio.packets_sent = if self.publishes { 3_000 } else { 0 };
        for sample in 0..100 {
            session.join.record_micros(40_000 + sample * 500);
            session
                .rtt_rtcp
                .record_micros(self.rtt_us * (50 + sample) / 100);
            audio
                .one_way_latency
                .record_micros(self.latency_us * (50 + sample) / 100);
        }
        record
    }

    pub fn so_far(self, stage: u32, complete: bool) -> TierSoFar {
        TierSoFar {
            stage,
            participants: self.subscribers as u32 + 3 * u32::from(self.publishes),
            seconds: if complete { 20.0 } else { 7.0 },
            complete,
            record: RecordWire::from(&self.record()),
        }
    }
}

/// Run state that a test feeds with events.
pub struct Canned {
    pub state: RunState,
    pub now_us: u64,
}

impl Canned {
    /// Returns a run in which everybody is in. A role of `None` is a `voicegw` prober.
    pub fn armed(tiers: &[u32], vantages: &[(&str, Option<HostRole>)]) -> Canned {
        let mut canned = Canned::gathering(tiers, vantages.len() as u32);
        for (vantage, role) in vantages {
            canned.comes(vantage, *role);
        }
        canned.apply(JournalEntry::Armed { at_us: START_US });
        canned
    }

    pub fn gathering(tiers: &[u32], expect: u32) -> Canned {
        let mut setup = setup(expect);
        setup.load = load(tiers);
        Canned {
            state: RunState::new(setup, 1, START_US),
            now_us: START_US,
        }
    }

    pub fn comes(&mut self, vantage: &str, role: Option<HostRole>) {
        let register = Register {
            vantage: Some(vantage.to_owned()),
            protocol: role.map(|_| super::protocol::VERSION),
            version: role.map(|_| "0.1.0".to_owned()),
            instance: Some(format!("instance of {vantage}")),
            role: role.unwrap_or_default(),
            weight: 1,
            wants_tokens: false,
        };
        self.apply(JournalEntry::Registered {
            at_us: START_US,
            prover_id: id(self.state.probers().len()),
            vantage: vantage.to_owned(),
            register,
        });
    }

    pub fn apply(&mut self, entry: JournalEntry) {
        self.state.apply(entry);
    }

    /// Applies a beat with these tiers and one second's figures.
    pub fn beat(&mut self, who: usize, tiers: Vec<TierSoFar>, live: LiveSecond) {
        let stage = tiers.last().map(|tier| tier.stage);
        let prober = &self.state.probers()[who];
        let (prover_id, seq) = (prober.id.clone(), prober.seq + 1);
        self.now_us += 1_000_000;
        let starts: Vec<Start> = (stage.into_iter())
            .map(|stage| Start {
                stage,
                skew_us: 1_200 * (who as i64 + 1),
            })
            .collect();
        self.apply(JournalEntry::Beat {
            at_us: self.now_us,
            prover_id,
            seq,
            tiers: tiers.clone(),
            frames: Vec::new(),
            starts: starts.clone(),
            invalid: Vec::new(),
            broken: None,
        });
        let beat = BeatMessage {
            seq,
            sent_at_us: self.now_us,
            exchange: None,
            stage,
            ready_for: None,
            tiers,
            live,
            frames: Vec::new(),
            starts,
            invalid: Vec::new(),
            broken: None,
        };
        self.state.hear(self.now_us, who, &beat);
    }

    /// Applies a beat in which a threshold failed that ends the run.
    pub fn breaks(&mut self, who: usize, stage: u32, threshold: &str) {
        let prober = &self.state.probers()[who];
        self.apply(JournalEntry::Beat {
            at_us: self.now_us,
            prover_id: prober.id.clone(),
            seq: prober.seq + 1,
            tiers: vec![WELL.so_far(stage, false)],
            frames: Vec::new(),
            starts: Vec::new(),
            invalid: Vec::new(),
            broken: Some(threshold.to_owned()),
        });
    }

    /// Applies a prober's final report: what it measured of each tier, and in which tiers its
    /// generator was the limit.
    pub fn reports(&mut self, who: usize, saw: &[Saw], invalid: &[usize]) {
        let tiers = saw.iter().enumerate().map(|(at, saw)| TierReport {
            measured: saw.so_far(TIER + at as u32, true),
            verdict: WireVerdict(if invalid.contains(&at) {
                Verdict::Invalid
            } else {
                Verdict::Pass
            }),
            reasons: invalid
                .iter()
                .filter(|tier| **tier == at)
                .map(|_| "ticks were 40 ms late".to_owned())
                .collect(),
        });
        let report = FinalReport {
            verdict: WireVerdict(if invalid.is_empty() {
                Verdict::Pass
            } else {
                Verdict::Invalid
            }),
            reasons: Vec::new(),
            partial: None,
            valid: invalid.is_empty(),
            invalid: invalid
                .iter()
                .map(|_| "ticks were 40 ms late".to_owned())
                .collect(),
            tiers: tiers.collect(),
            totals: saw.last().copied().unwrap_or(WELL).so_far(0, true),
            engine: EngineShort {
                threads: 2,
                cpu_seconds: Some(12.5),
                ..EngineShort::default()
            },
            notes: Vec::new(),
            failures: Vec::new(),
        };
        self.says(who, Vec::new(), Some(report));
    }

    /// Applies a report as `voicegw` sends it.
    pub fn reports_steps(&mut self, who: usize, steps: Vec<ClientStep>) {
        self.says(who, steps, None);
    }

    fn says(&mut self, who: usize, steps: Vec<ClientStep>, throng: Option<FinalReport>) {
        let prober = &self.state.probers()[who];
        let (prover_id, vantage) = (prober.id.clone(), Some(prober.vantage.clone()));
        let report = ProberReport {
            vantage,
            steps,
            baseline: None,
            throng,
        };
        self.now_us += 1_000_000;
        self.apply(JournalEntry::Reported {
            at_us: self.now_us,
            prover_id,
            report: Box::new(report),
        });
    }

    pub fn loses(&mut self, who: usize) {
        let prover_id = self.state.probers()[who].id.clone();
        self.apply(JournalEntry::Missing {
            at_us: self.now_us,
            prover_id,
            last_heard_us: self.now_us - 30_000_000,
            why: "silent for 30 s".to_owned(),
        });
    }

    pub fn ends(&mut self) {
        // The order of the last stage means that all tiers are over for the hosts that report from
        // now on.
        let leave = self.state.stages().len().saturating_sub(1) as u32;
        self.apply(JournalEntry::Ordered {
            at_us: self.now_us,
            stage: leave,
            start_us: self.now_us,
        });
    }

    pub fn is_over(&mut self) {
        self.apply(JournalEntry::Over { at_us: self.now_us });
        assert_eq!(*self.state.phase(), RunPhase::Over);
    }
}

pub fn judging() -> Judging {
    WireJudging::of(&Judging::default())
        .to_judging()
        .expect("our own")
}

fn id(number: usize) -> ProverId {
    ProverId::new(format!("p{number}")).expect("plain")
}

/// Returns a finished run of three hosts; in the second tier one of them loses too much.
pub fn over() -> Canned {
    let mut canned = Canned::armed(
        &[10, 25],
        &[
            ("fra", Some(HostRole::Both)),
            ("ams", Some(HostRole::Subscribe)),
            ("sin", Some(HostRole::Subscribe)),
        ],
    );
    let far = Saw {
        rtt_us: 180_000,
        latency_us: 210_000,
        publishes: false,
        ..WELL
    };
    let near = Saw {
        publishes: false,
        ..WELL
    };
    for (who, saw) in [WELL, near, far].into_iter().enumerate() {
        canned.beat(
            who,
            vec![
                Saw {
                    subscribers: 1,
                    ..saw
                }
                .so_far(BASELINE, true),
            ],
            LiveSecond::default(),
        );
    }
    canned.ends();
    let second = |saw: Saw, lost| Saw {
        subscribers: 25,
        lost,
        ..saw
    };
    canned.reports(0, &[WELL, second(WELL, 2)], &[]);
    canned.reports(1, &[near, second(near, 4)], &[]);
    canned.reports(2, &[far, second(far, 31)], &[]);
    canned.is_over();
    canned
}
