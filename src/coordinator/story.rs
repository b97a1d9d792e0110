//! Messages about a run over several hosts while it goes on: who comes, what begins, who is lost,
//! and from time to time how it goes.

use std::collections::BTreeMap;

use super::desk::Standstill;
use super::protocol::{ProverId, StageKind};
use super::state::{ProberState, RunPhase, RunState};
use crate::words;

/// Interval between status messages if there was no other message.
const QUIET_US: u64 = 5_000_000;
/// The same interval while hosts are waited for, which may take long.
const QUIET_GATHERING_US: u64 = 30_000_000;

/// Remembers what has been told.
#[derive(Default)]
pub struct Story {
    told: BTreeMap<ProverId, Told>,
    stages: usize,
    all_in: bool,
    stopping: bool,
    problem: Option<String>,
    standstill: Option<Standstill>,
    last_us: u64,
}

#[derive(Default)]
struct Told {
    gone: bool,
    reported: bool,
    invalid: bool,
}

impl Story {
    /// Returns what is new since the last call. Lines fit 80 columns if labels are short enough.
    pub fn lines(
        &mut self,
        state: &RunState,
        problem: Option<&str>,
        standstill: Option<Standstill>,
        now_us: u64,
    ) -> Vec<String> {
        let mut lines = Vec::new();
        self.who_came(state, &mut lines);
        self.what_begins(state, now_us, &mut lines);
        for prober in state.probers() {
            self.of_one(prober, &mut lines);
        }
        if let (Some(reason), false) = (state.stop_reason(), self.stopping) {
            self.stopping = true;
            lines.push(format!("Stopping: {reason}."));
        }
        if self.problem.as_deref() != problem {
            self.problem = problem.map(str::to_owned);
            lines.push(match problem {
                Some(problem) => format!("{problem}.\n  Probers keep what they measure and try again: make room, and the run goes on."),
                None => "The journal takes entries again.".to_owned(),
            });
        }
        if self.standstill != standstill {
            self.standstill = standstill;
            lines.extend(standstill.map(|standstill| {
                words::wrapped(&format!("warning: {standstill}."), 2)
                    .trim()
                    .to_owned()
            }));
        }
        let quiet_us = match state.phase() {
            RunPhase::Gathering => QUIET_GATHERING_US,
            _ => QUIET_US,
        };
        if lines.is_empty() && now_us.saturating_sub(self.last_us) >= quiet_us {
            lines.extend(status(state));
        }
        if !lines.is_empty() {
            self.last_us = now_us;
        }
        lines
    }

    fn who_came(&mut self, state: &RunState, lines: &mut Vec<String>) {
        let there: Vec<&ProverId> = state.probers().iter().map(|prober| &prober.id).collect();
        let left: Vec<ProverId> = self
            .told
            .keys()
            .filter(|id| !there.contains(id))
            .cloned()
            .collect();
        for id in left {
            self.told.remove(&id);
            lines.push(
                "A host left, or fell silent, before all were in: its place is free again."
                    .to_owned(),
            );
        }
        let expect = state.setup().expect;
        for (index, prober) in state.probers().iter().enumerate() {
            if self.told.contains_key(&prober.id) {
                continue;
            }
            self.told.insert(prober.id.clone(), Told::default());
            let kind = if prober.is_legacy() {
                " (a prober of voicegw)"
            } else {
                ""
            };
            lines.push(format!(
                "{} is in{kind}: {} of {expect}.",
                prober.vantage,
                index + 1
            ));
        }
        if *state.phase() != RunPhase::Gathering
            && state.probers().len() == expect as usize
            && !self.all_in
        {
            self.all_in = true;
            lines.push("All are in.".to_owned());
        }
    }

    fn what_begins(&mut self, state: &RunState, now_us: u64, lines: &mut Vec<String>) {
        for order in state.orders().iter().skip(self.stages) {
            let Some(stage) = state.stages().get(order.stage as usize) else {
                continue;
            };
            let of_all = |index: u32| {
                let hosts = state.placed().map_or(&[][..], |placed| &placed.stages);
                hosts
                    .iter()
                    .filter_map(|stages| stages.get(index as usize))
                    .map(|stage| u64::from(stage.subscribers))
                    .sum()
            };
            let what = match stage.kind {
                StageKind::Publish => "publishers join".to_owned(),
                StageKind::Baseline => "baseline: one subscriber on each host".to_owned(),
                StageKind::Tier => format!(
                    "{}: {} subscribers on all hosts",
                    stage.name,
                    words::number(of_all(order.stage))
                ),
                StageKind::Stop => "publishers stop".to_owned(),
                StageKind::Leave => "everybody leaves".to_owned(),
            };
            let ahead_us = order.start_us.saturating_sub(now_us);
            let when = if ahead_us > 0 {
                format!(" in {:.1} s", ahead_us as f64 / 1e6)
            } else {
                String::new()
            };
            lines.push(format!("Next{when}: {what}."));
        }
        self.stages = state.orders().len();
    }

    fn of_one(&mut self, prober: &ProberState, lines: &mut Vec<String>) {
        let Some(told) = self.told.get_mut(&prober.id) else {
            return;
        };
        if let (Some(gone), false) = (&prober.gone, told.gone) {
            told.gone = true;
            lines.push(format!(
                "{} is missing: {}. What it sent is kept.",
                prober.vantage, gone.why
            ));
        }
        if let (Some(why), false) = (prober.invalid.first(), told.invalid) {
            told.invalid = true;
            lines.push(format!("{} is no valid generator: {why}.", prober.vantage));
        }
        if prober.report.is_some() && !told.reported {
            told.reported = true;
            lines.push(format!(
                "{} has reported{}.",
                prober.vantage,
                if prober.left_early {
                    ", before the others had finished"
                } else {
                    ""
                }
            ));
        }
    }
}

/// Returns a status line such as `tier 2: 3 of 3 hosts, 75 participants, in 12,000/s, out 800/s,
/// loss 0.01%`.
fn status(state: &RunState) -> Option<String> {
    let live = || state.probers().iter().filter(|prober| prober.is_live());
    if *state.phase() == RunPhase::Gathering {
        let (there, expect) = (state.probers().len(), state.setup().expect as usize);
        let names: Vec<&str> = state
            .probers()
            .iter()
            .map(|prober| prober.vantage.as_str())
            .collect();
        let who = if names.is_empty() {
            String::new()
        } else {
            format!(" ({})", names.join(", "))
        };
        return Some(format!(
            "{there} of {expect} hosts are in{who}; {} missing.",
            expect - there.min(expect)
        ));
    }
    let name = state
        .stage_underway()
        .map_or("preparing", |stage| stage.name.as_str());
    let of =
        |rate: fn(&ProberState) -> Option<f64>| live().filter_map(rate).sum::<f64>().round() as u64;
    let losses = live().filter_map(|prober| prober.live.loss);
    Some(format!(
        "{name}: {} of {} hosts, {} participants, in {}/s, out {}/s, worst loss {}",
        live().count(),
        state.probers().len(),
        words::number(
            live()
                .map(|prober| u64::from(prober.live.participants))
                .sum()
        ),
        words::number(of(|prober| prober.live.packets_received_per_second)),
        words::number(of(|prober| prober.live.packets_sent_per_second)),
        words::maybe(losses.reduce(f64::max), words::percent),
    ))
}
