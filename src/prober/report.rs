//! The final report of a prober. Throng's own coordinator gets everything; `voicegw`'s gets a step
//! for each tier.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::outbox;
use crate::coordinator::protocol::{
    ClientStep, EngineShort, FinalReport, LABEL_BYTES_MAX, ProberReport, SharedStage, StageKind,
    TEXT_BYTES_MAX, TEXTS_MAX, TierReport, TierSoFar, WireVerdict,
};
use crate::measure::Record;
use crate::report::judge::{self, LossShares};
use crate::report::{Outcome, Step, Verdict};

/// Largest shares of lost media for which `voicegw` is told `Excellent` and `Good`: the default of
/// `--max-loss`, and what libwebrtc conceals without much harm.
const EXCELLENT_LOSS_MAX: f64 = 0.01;
const GOOD_LOSS_MAX: f64 = 0.05;

/// Makes the report of a run that throng's own coordinator led. `stages` are those of its job.
pub(super) fn of_stages(vantage: &str, outcome: &Outcome, stages: &[SharedStage]) -> ProberReport {
    let stage = |step: &Step| stages.iter().position(|stage| stage.name == step.name);
    let of_kind = |kind: StageKind| {
        let steps = outcome
            .steps
            .iter()
            .filter(move |step| stage(step).is_some_and(|at| stages[at].kind == kind));
        steps.map(client_step)
    };
    let tiers = outcome.steps.iter().filter_map(|step| {
        let judgement = judge::judge_step(outcome, step);
        Some(TierReport {
            measured: so_far(stage(step)? as u32, step),
            verdict: WireVerdict(judgement.verdict),
            reasons: texts(judgement.reasons),
        })
    });
    ProberReport {
        vantage: Some(vantage.to_owned()),
        steps: of_kind(StageKind::Tier).collect(),
        baseline: of_kind(StageKind::Baseline).next(),
        throng: Some(FinalReport {
            tiers: tiers.collect(),
            ..whole(outcome)
        }),
    }
}

/// Makes the report of a run that followed `voicegw`'s job. Each step is a tier.
pub(super) fn of_tiers(vantage: &str, outcome: &Outcome) -> ProberReport {
    ProberReport {
        vantage: Some(vantage.to_owned()),
        steps: outcome.steps.iter().map(client_step).collect(),
        baseline: None,
        throng: None,
    }
}

/// Makes the report of a run that never began on this host.
pub(super) fn of_nothing(vantage: &str, why: &str) -> ProberReport {
    let nothing = outbox::MeasuredTier {
        participants: 0,
        seconds: 0.0,
        complete: false,
        record: Arc::new(Record::default()),
    };
    ProberReport {
        vantage: Some(vantage.to_owned()),
        steps: Vec::new(),
        baseline: None,
        throng: Some(FinalReport {
            verdict: WireVerdict(Verdict::Partial),
            reasons: texts([why]),
            partial: texts([why]).pop(),
            valid: true,
            invalid: Vec::new(),
            tiers: Vec::new(),
            totals: nothing.so_far(0),
            engine: EngineShort::default(),
            notes: Vec::new(),
            failures: Vec::new(),
        }),
    }
}

fn whole(outcome: &Outcome) -> FinalReport {
    let (judgement, engine) = (judge::judge(outcome), &outcome.engine);
    let failures = outcome.failures.iter().take(TEXTS_MAX);
    FinalReport {
        verdict: WireVerdict(judgement.verdict),
        reasons: texts(judgement.reasons),
        partial: texts(&outcome.partial).pop(),
        valid: engine.valid,
        invalid: texts(&engine.reasons),
        tiers: Vec::new(),
        totals: so_far(0, &outcome.totals),
        engine: EngineShort {
            threads: engine.threads as u32,
            cpu_seconds: engine.cpu_seconds,
            us_per_packet: engine.us_per_packet,
            bytes_per_participant: engine.bytes_per_participant,
            rss_peak_bytes: engine.rss_peak_bytes,
        },
        notes: texts(&outcome.notes),
        failures: failures
            .map(|(why, count)| (clipped(why, TEXT_BYTES_MAX), *count))
            .collect(),
    }
}

fn so_far(stage: u32, step: &Step) -> TierSoFar {
    TierSoFar {
        stage,
        participants: step.participants,
        seconds: step.seconds,
        complete: step
            .tier
            .as_ref()
            .is_none_or(|tier| tier.cut_short.is_none()),
        record: (&step.record).into(),
    }
}

/// Describes a tier in `voicegw`'s terms. Its loss is that of the worse kind of media.
fn client_step(step: &Step) -> ClientStep {
    let session = &step.record.session;
    let media = [&step.record.audio, &step.record.video];
    let expected =
        |of: fn(&crate::measure::Media) -> u64| media.iter().map(|media| of(media)).sum::<u64>();
    let is_lost = session.joins_planned > 0 && session.joins_ok == 0
        || expected(|m| m.tracks_expected) > 0 && expected(|m| m.tracks_live) == 0;
    let heard = media
        .iter()
        .filter(|media| media.tracks_expected > 0 || media.frames_expected > 0);
    // If the loss of one kind is unknown, the worst loss is unknown.
    let loss = heard
        .map(|media| LossShares::of(media).worse())
        .try_fold(None, |worst: Option<f64>, loss| {
            loss.map(|loss| Some(worst.map_or(loss, |worst| worst.max(loss))))
        })
        .flatten();
    let quality = match loss {
        _ if is_lost => "Lost",
        None => "Unknown",
        Some(loss) if loss <= EXCELLENT_LOSS_MAX => "Excellent",
        Some(loss) if loss <= GOOD_LOSS_MAX => "Good",
        Some(_) => "Poor",
    };
    ClientStep {
        clients: step.participants,
        rtt_ms: session.rtt_rtcp.quantile(0.95).map(|us| us as f64 / 1e3),
        loss_pct: loss.map(|loss| loss * 100.0),
        quality: Some(quality.to_owned()),
        samples: Some(session.rtt_rtcp.count()),
        rtt_stat: Some("p95".to_owned()),
    }
}

/// Clips the list and each text to the limits of the protocol.
fn texts(of: impl IntoIterator<Item = impl AsRef<str>>) -> Vec<String> {
    of.into_iter()
        .take(TEXTS_MAX)
        .map(|text| clipped(text.as_ref(), TEXT_BYTES_MAX))
        .collect()
}

fn clipped(text: &str, bytes_max: usize) -> String {
    text[..text.floor_char_boundary(bytes_max)].to_owned()
}

/// Writes a report that the coordinator has not taken to `throng-prober-VANTAGE-RUN.json`, and
/// returns the path. Existing files are not overwritten.
///
/// # Errors
/// Returns why the file could not be written.
pub(super) fn keep(
    report: &ProberReport,
    dir: &Path,
    vantage: &str,
    run: &str,
) -> std::io::Result<PathBuf> {
    let plain = |text: &str| -> String {
        text.chars()
            .map(|c| {
                if c.is_ascii_alphanumeric() || ".-_".contains(c) {
                    c
                } else {
                    '_'
                }
            })
            .collect()
    };
    let stem = format!(
        "throng-prober-{}-{}",
        clipped(&plain(vantage), LABEL_BYTES_MAX),
        plain(run)
    );
    let body = serde_json::to_vec_pretty(report)?;
    for number in 1.. {
        let path = dir.join(match number {
            1 => format!("{stem}.json"),
            _ => format!("{stem}-{number}.json"),
        });
        match std::fs::File::create_new(&path) {
            Ok(mut file) => return std::io::Write::write_all(&mut file, &body).map(|()| path),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    unreachable!("some number is free")
}
