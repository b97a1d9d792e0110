//! The coordinator's log of a run: the entries that were written to the journal.

use tracing::{debug, info, trace, warn};

use super::protocol::ProverId;
use super::state::{JournalEntry, RunState};

/// Logs an entry. `state` is the state before the entry is applied.
pub(super) fn log_entry(entry: &JournalEntry, state: &RunState) {
    match entry {
        JournalEntry::Registered {
            vantage, register, ..
        } => info!(
            vantage,
            role = ?register.role,
            weight = register.weight,
            version = register.version,
            came = state.probers().len() + 1,
            expected = state.setup().expect,
            "registered"
        ),
        JournalEntry::Left { prover_id, .. } => info!(
            vantage = vantage(state, prover_id),
            "left, or fell silent, before all were in"
        ),
        JournalEntry::Armed { .. } => info!("all probers are in"),
        JournalEntry::Prepared { rooms, .. } => info!(made = rooms.len(), "the rooms are there"),
        JournalEntry::Ordered {
            at_us,
            stage,
            start_us,
        } => log_order(state, *stage, start_us.saturating_sub(*at_us)),
        JournalEntry::Beat { .. } => log_beat(entry, state),
        JournalEntry::Missing { prover_id, why, .. } => {
            warn!(vantage = vantage(state, prover_id), why, "is missing");
        }
        JournalEntry::Stopping { reason, .. } => info!(reason, "stops everybody"),
        JournalEntry::Reported {
            prover_id, report, ..
        } => info!(
            vantage = vantage(state, prover_id),
            partial = (report.throng.as_ref()).and_then(|report| report.partial.as_deref()),
            "reported"
        ),
        JournalEntry::Over { .. } => info!("the run is over"),
    }
}

/// Logs the order of a stage, which ends the stage before it. The clock offsets are logged too,
/// because the start depends on them.
fn log_order(state: &RunState, stage: u32, starts_in_us: u64) {
    let ended = state.underway().map(|underway| underway.stage);
    info!(
        stage = name(state, stage),
        starts_in_us,
        ended = ended.and_then(|stage| name(state, stage)),
        "ordered a stage"
    );
    for prober in state.probers().iter().filter(|prober| prober.is_live()) {
        let offset = prober.offset();
        debug!(
            vantage = prober.vantage,
            offset_us = offset.map(|offset| offset.offset_us),
            uncertainty_us = offset.map(|offset| offset.uncertainty_us),
            "its clock"
        );
    }
}

fn log_beat(entry: &JournalEntry, state: &RunState) {
    let JournalEntry::Beat {
        prover_id,
        seq,
        tiers,
        starts,
        broken,
        ..
    } = entry
    else {
        return;
    };
    let prober = (state.probers().iter()).find(|prober| prober.id == *prover_id);
    let Some(prober) = prober else { return };
    let vantage = prober.vantage.as_str();
    trace!(vantage, seq, "said something new");
    // A beat that was not answered is repeated.
    let begun = |stage| prober.starts.contains_key(&stage);
    for start in starts.iter().filter(|start| !begun(start.stage)) {
        let (stage, late_us) = (name(state, start.stage), start.skew_us);
        info!(vantage, stage, late_us, "began a stage");
    }
    for tier in tiers.iter().filter(|tier| tier.complete) {
        let participants = tier.participants;
        let stage = name(state, tier.stage);
        info!(vantage, stage, participants, "measured a stage");
    }
    if let (Some(threshold), None) = (broken, &prober.broken) {
        warn!(vantage, threshold, "a threshold does not hold");
    }
}

fn vantage<'a>(state: &'a RunState, id: &ProverId) -> Option<&'a str> {
    let mut probers = state.probers().iter();
    let prober = probers.find(|prober| prober.id == *id);
    prober.map(|prober| prober.vantage.as_str())
}

fn name(state: &RunState, stage: u32) -> Option<&str> {
    let stage = state.stages().get(stage as usize);
    stage.map(|stage| stage.name.as_str())
}
