//! The merged result as text for a terminal of 80 columns: tiers, vantages side by side, the
//! baseline of one participant alone, missing hosts, the knee, the verdict.

use std::cmp::Ordering;
use std::fmt::Write as _;
use std::time::Duration;

use super::document::About;
use super::lead::Rehearsal;
use super::protocol::{SharedStage, StageKind};
use super::result::{Cell, Merged, Standing, TierResult, Times, VantageResult};
use crate::measure::Histogram;
use crate::report::server_cost::{self, Ours};
use crate::report::{Style, Verdict};
use crate::words::{self, count, maybe, micros, number, percent};

/// Largest number of vantages in a table. The worst come first, so the vantages left out are the
/// better ones.
const VANTAGES_MAX: usize = 12;
const REASONS_MAX: usize = 8;
const NOTES_MAX: usize = 4;
/// Width of a label, in columns.
const LABEL_WIDTH: usize = 16;
/// Longest word in a sentence. A label may be any text, and words are not broken.
const WORD_WIDTH: usize = 60;

/// Formats the result in lines of at most 80 columns.
pub fn render(merged: &Merged, about: &About<'_>, style: Style) -> String {
    let mut text = head(merged, about, style);
    text.push_str(&tiers(merged, style));
    if let Some(tier) = tier_to_show(merged) {
        text.push_str(&vantages(tier, merged, style));
    }
    text.push_str(&baselines(merged, style));
    text.push_str(&server(merged, about, style));
    text.push_str(&missing(merged, style));
    text.push_str(&notes(about, style));
    if let Some(knee) = merged.knee() {
        let sentence = wrapped(&knee.sentence(&merged.unmeasured), 11);
        let _ = writeln!(
            text,
            "{} {}",
            style.bold("Knee      "),
            sentence.trim_start()
        );
    }
    text.push_str(&verdict(merged, style));
    text
}

/// Formats what a run would be, in lines of at most 80 columns: its stages, with the subscribers of
/// all hosts and of each.
pub fn rehearsal(rehearsal: &Rehearsal) -> String {
    let hosts = &rehearsal.placed.stages;
    let mut text = format!(
        "{} of weight 1 and any role; their --weight and --role say otherwise\n  {:<10}{:>12}{:>14}{:>9}\n",
        count(hosts.len() as u64, "host"),
        "stage",
        "subscribers",
        "on each host",
        "held"
    );
    let held = |stage: &SharedStage| matches!(stage.kind, StageKind::Baseline | StageKind::Tier);
    for (index, stage) in hosts[0].iter().enumerate().filter(|(_, stage)| held(stage)) {
        let each = hosts
            .iter()
            .filter_map(|stages| stages.get(index))
            .map(|stage| u64::from(stage.subscribers));
        let (least, most) = (
            each.clone().min().unwrap_or(0),
            each.clone().max().unwrap_or(0),
        );
        let range = if least == most {
            number(most)
        } else {
            format!("{}-{}", number(least), number(most))
        };
        let hold = words::duration(Duration::from_micros(stage.hold_us));
        let _ = writeln!(
            text,
            "  {:<10}{:>12}{range:>14}{hold:>9}",
            stage.name,
            number(each.sum())
        );
    }
    text.push_str("The first of them:\n");
    text
}

fn head(merged: &Merged, about: &About<'_>, style: Style) -> String {
    let labels: Vec<&str> = merged
        .vantages
        .iter()
        .map(|vantage| vantage.label.as_str())
        .collect();
    let title = format!(
        "{}, {}",
        about.plan.target,
        count(labels.len() as u64, "vantage")
    );
    let labels = if labels.is_empty() {
        String::new()
    } else {
        wrapped(&labels.join(", "), 2)
    };
    format!("{}\n{labels}\n", style.bold(&title))
}

fn tiers(merged: &Merged, style: Style) -> String {
    let row = |[participants, measured, loss, rtt, audio, video]: [String; 6]| {
        format!("{participants:>12}{measured:>10}{loss:>8}{rtt:>10}{audio:>11}{video:>11}")
    };
    let heads = [
        "participants",
        "measured",
        "loss",
        "RTT p95",
        "audio p95",
        "video p95",
    ];
    let mut text = format!(
        "{}{}\n",
        style.bold("Tiers   "),
        row(heads.map(str::to_owned))
    );
    for tier in &merged.tiers {
        let name = &tier.step.name;
        if !tier.begun {
            let _ = writeln!(text, "{name:<8}{:>12}  not measured", "");
            continue;
        }
        let record = &tier.step.record;
        let cells = [
            number(tier.step.participants.into()),
            format!("{} of {}", tier.measured().count(), tier.cells.len()),
            maybe(tier.worst_loss(), percent),
            maybe(tier.worst_rtt_us(), micros),
            p95(&record.audio.one_way_latency),
            p95(&record.video.one_way_latency),
        ];
        let verdict = tier.judgement.verdict;
        let _ = writeln!(
            text,
            "{name:<8}{}  {}",
            row(cells),
            style.verdict(verdict, verdict.name())
        );
    }
    text.push_str("  loss and RTT: of the worst vantage; latency: of all together\n\n");
    text
}

/// Returns the tier that tells most: the first that did not pass, else the last.
fn tier_to_show(merged: &Merged) -> Option<&TierResult> {
    let failed = merged
        .begun()
        .find(|tier| tier.judgement.verdict != Verdict::Pass);
    failed.or_else(|| merged.begun().last())
}

fn vantages(tier: &TierResult, merged: &Merged, style: Style) -> String {
    let row = |[participants, packets, loss, rtt, latency, late]: [String; 6]| {
        format!("{participants:>7}{packets:>12}{loss:>8}{rtt:>9}{latency:>9}{late:>9}")
    };
    let heads = [
        "people",
        "packets in",
        "loss",
        "RTT p95",
        "lat. p99",
        "start",
    ];
    let title = format!(
        "{:<LABEL_WIDTH$}",
        shortened(&format!("In {}", tier.step.name))
    );
    let mut text = format!("{}{}\n", style.bold(&title), row(heads.map(str::to_owned)));
    let mut ranked: Vec<(&VantageResult, &Cell)> =
        merged.vantages.iter().zip(&tier.cells).collect();
    ranked.sort_by(|(_, a), (_, b)| by_badness(b, a));
    for (vantage, cell) in ranked.iter().take(VANTAGES_MAX) {
        let cells = vantage_cells(vantage, cell);
        let _ = writeln!(
            text,
            "{:<LABEL_WIDTH$}{}  {}",
            shortened(&vantage.label),
            row(cells),
            standing(cell, style)
        );
    }
    if ranked.len() > VANTAGES_MAX {
        let _ = writeln!(
            text,
            "  and {} more in the JSON report",
            number((ranked.len() - VANTAGES_MAX) as u64)
        );
    }
    text.push_str(&comparison(tier, merged));
    text.push('\n');
    text
}

fn vantage_cells(vantage: &VantageResult, cell: &Cell) -> [String; 6] {
    let is_there = !matches!(cell.standing, Standing::Absent);
    [
        maybe(is_there.then_some(cell.participants), |people| {
            number(people.into())
        }),
        maybe(
            (is_there && !vantage.is_legacy).then_some(cell.packets_received),
            number,
        ),
        maybe(cell.loss, percent),
        maybe(cell.rtt_us, micros),
        time(cell.latency(), |times| times.p99),
        maybe(cell.start_skew_us, signed),
    ]
}

/// Compares the hosts that measured a tier. Empty for a single one.
fn comparison(tier: &TierResult, merged: &Merged) -> String {
    let mut text = String::new();
    if tier.measured().count() <= 1 {
        return text;
    }
    if let Some(loss) = tier.loss_by_host(&merged.vantages) {
        let line = format!(
            "loss by host: average {}, highest {} ({}), lowest {} ({})",
            percent(loss.average),
            percent(loss.maximum.0),
            loss.maximum.1,
            percent(loss.minimum.0),
            loss.minimum.1
        );
        text.push_str(&wrapped(&line, 2));
    }
    if let Some((at, in_what)) = tier.worst_vantage() {
        text.push_str(&wrapped(
            &format!("worst vantage: {}: {in_what}", merged.vantages[at].label),
            2,
        ));
    }
    text
}

/// Orders two cells by badness. Other hosts' figures can be any number, and still have an order.
pub(super) fn by_badness(a: &Cell, b: &Cell) -> Ordering {
    let ((rank, loss, rtt), (other_rank, other_loss, other_rtt)) = (badness(a), badness(b));
    rank.cmp(&other_rank)
        .then(loss.total_cmp(&other_loss))
        .then(rtt.total_cmp(&other_rtt))
}

/// Returns the sort key of a cell: its standing (absent is worst, then incomplete, invalid,
/// awaited, measured), then whether it failed, then loss, then round trips.
fn badness(cell: &Cell) -> ((u8, bool), f64, f64) {
    let rank = match cell.standing {
        Standing::Absent => 4,
        Standing::Incomplete => 3,
        Standing::Invalid => 2,
        Standing::Awaited => 1,
        Standing::Measured => 0,
    };
    let failed = cell.judgement.verdict == Verdict::Fail;
    (
        (rank, failed),
        cell.loss.unwrap_or(0.0),
        cell.rtt_us.unwrap_or(0.0),
    )
}

fn standing(cell: &Cell, style: Style) -> String {
    match cell.standing {
        Standing::Measured => style.verdict(cell.judgement.verdict, cell.judgement.verdict.name()),
        Standing::Invalid => style.verdict(Verdict::Invalid, Verdict::Invalid.name()),
        Standing::Incomplete => style.verdict(Verdict::Partial, "broke off"),
        Standing::Absent => style.verdict(Verdict::Partial, "absent"),
        Standing::Awaited => "under way".to_owned(),
    }
}

/// Formats the baselines of one participant alone, and how well each clock is known.
fn baselines(merged: &Merged, style: Style) -> String {
    let alone = |vantage: &'_ VantageResult| {
        vantage
            .baseline
            .clone()
            .filter(|cell| cell.standing != Standing::Absent)
    };
    let with_either: Vec<&VantageResult> = (merged.vantages.iter())
        .filter(|vantage| alone(vantage).is_some() || vantage.clock.is_some())
        .collect();
    if with_either.is_empty() {
        return String::new();
    }
    let row = |[loss, rtt, latency, clock]: [String; 4]| {
        format!("{loss:>8}{rtt:>10}{latency:>10}{clock:>26}")
    };
    let heads = ["loss", "RTT p95", "lat. p99", "clock off by"];
    let title = format!("{:<LABEL_WIDTH$}", "Alone");
    let mut text = format!("{}{}\n", style.bold(&title), row(heads.map(str::to_owned)));
    for vantage in with_either.iter().take(VANTAGES_MAX) {
        let cell = alone(vantage);
        let cell = cell.as_ref();
        let clock = |offset: super::clock::Offset| {
            format!(
                "{} +-{}",
                signed(offset.offset_us),
                micros(offset.uncertainty_us as f64)
            )
        };
        let cells = [
            maybe(cell.and_then(|cell| cell.loss), percent),
            maybe(cell.and_then(|cell| cell.rtt_us), micros),
            maybe(cell, |cell| time(cell.latency(), |times| times.p99)),
            maybe(vantage.clock, clock),
        ];
        let _ = writeln!(
            text,
            "{:<LABEL_WIDTH$}{}",
            shortened(&vantage.label),
            row(cells)
        );
    }
    if with_either.len() > VANTAGES_MAX {
        let _ = writeln!(
            text,
            "  and {} more in the JSON report",
            number((with_either.len() - VANTAGES_MAX) as u64)
        );
    }
    text.push('\n');
    text
}

/// Formats the figures from the server's own pages.
fn server(merged: &Merged, about: &About<'_>, style: Style) -> String {
    let Some(account) = about.server else {
        return String::new();
    };
    let record = &merged.totals.record;
    let ours = Ours {
        packets_received: record.audio.packets_received + record.video.packets_received,
        drops: format!(
            "{} at our hosts' sockets",
            number(record.session.host_drops)
        ),
    };
    server_cost::block(account, &ours, style)
}

fn missing(merged: &Merged, style: Style) -> String {
    if merged.missing.is_empty() {
        return String::new();
    }
    let mut text = format!("{}\n", style.bold("Missing"));
    for missing in merged.missing.iter().take(VANTAGES_MAX) {
        let who = missing.vantage.as_deref().unwrap_or("unnamed");
        let stage = missing
            .stage
            .as_ref()
            .map(|stage| format!(", in {stage}"))
            .unwrap_or_default();
        let heard = missing
            .last_heard
            .map(|at| format!(" (last heard {}{stage})", crate::report::json::rfc_3339(at)))
            .unwrap_or_default();
        text.push_str(&wrapped(&format!("{who}: {}{heard}", missing.why), 2));
    }
    if merged.missing.len() > VANTAGES_MAX {
        let _ = writeln!(text, "  and {} more", merged.missing.len() - VANTAGES_MAX);
    }
    text.push('\n');
    text
}

fn notes(about: &About<'_>, style: Style) -> String {
    if about.notes.is_empty() {
        return String::new();
    }
    let mut text = format!("{}\n", style.bold("Notes"));
    about
        .notes
        .iter()
        .take(NOTES_MAX)
        .for_each(|note| text.push_str(&wrapped(note, 2)));
    if about.notes.len() > NOTES_MAX {
        let _ = writeln!(
            text,
            "  and {} more in the JSON report",
            about.notes.len() - NOTES_MAX
        );
    }
    text.push('\n');
    text
}

fn verdict(merged: &Merged, style: Style) -> String {
    let judgement = &merged.judgement;
    let mut text = format!(
        "{}\n",
        style.verdict(
            judgement.verdict,
            &format!("RESULT: {}", judgement.verdict.name())
        )
    );
    judgement
        .reasons
        .iter()
        .take(REASONS_MAX)
        .for_each(|reason| text.push_str(&wrapped(reason, 2)));
    if judgement.reasons.len() > REASONS_MAX {
        let _ = writeln!(text, "  and {} more", judgement.reasons.len() - REASONS_MAX);
    }
    text
}

fn p95(histogram: &Histogram) -> String {
    match histogram.quantile(0.95) {
        Some(us) => micros(us as f64),
        None if histogram.expected() == 0 => "n/a".to_owned(),
        None => "never".to_owned(),
    }
}

fn time(times: Times, of: impl Fn(Times) -> Option<u64>) -> String {
    match of(times) {
        Some(us) => micros(us as f64),
        None if times.expected == 0 => "n/a".to_owned(),
        None => "never".to_owned(),
    }
}

fn signed(us: i64) -> String {
    let sign = if us < 0 { '-' } else { '+' };
    format!("{sign}{}", micros(us.unsigned_abs() as f64))
}

/// Shortens a label to its column, with a space behind it.
fn shortened(label: &str) -> String {
    cut(label, LABEL_WIDTH - 1)
}

fn cut(word: &str, most: usize) -> String {
    if word.chars().count() > most {
        word.chars().take(most - 2).chain("..".chars()).collect()
    } else {
        word.to_owned()
    }
}

/// Breaks a sentence into lines of at most 80 columns.
fn wrapped(sentence: &str, indent: usize) -> String {
    let words: Vec<String> = sentence
        .split_whitespace()
        .map(|word| cut(word, WORD_WIDTH))
        .collect();
    words::wrapped(&words.join(" "), indent)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::coordinator::canned::{self, Canned, Saw, TIER, WELL};
    use crate::coordinator::protocol::LiveSecond;
    use crate::plan::HostRole;
    use crate::report::{TargetInfo, TargetKind};

    fn text(canned: &Canned) -> String {
        let judging = canned::judging();
        let about = About {
            plan: &crate::plan::tests::plan(),
            judging: &judging,
            target: &TargetInfo {
                kind: TargetKind::LiveKit,
                server_version: None,
                addresses: Vec::new(),
            },
            started: Duration::ZERO,
            finished: Duration::ZERO,
            series: &[],
            server: None,
            notes: &[],
        };
        let text = render(
            &Merged::new(&canned.state, &judging),
            &about,
            Style::default(),
        );
        println!("{text}");
        text
    }

    fn assert_fits(text: &str) {
        for line in text.lines() {
            assert!(
                line.chars().count() <= 80 && line == line.trim_end(),
                "{line:?}"
            );
        }
    }

    /// Returns the words of the line that starts with `start`.
    fn line<'a>(text: &'a str, start: &str) -> Vec<&'a str> {
        let found = text.lines().find(|line| line.starts_with(start));
        found
            .unwrap_or_else(|| panic!("no line {start}"))
            .split_whitespace()
            .collect()
    }

    #[test]
    fn a_run_that_found_its_knee_reads_well() {
        let text = text(&canned::over());
        assert_fits(&text);
        assert_eq!(
            line(&text, "tier 2"),
            [
                "tier", "2", "78", "3", "of", "3", "3.10%", "259", "ms", "282", "ms", "n/a", "FAIL"
            ]
        );
        assert_eq!(
            line(&text, "sin")[..4],
            ["sin", "25", "24,225", "3.10%"],
            "the worst comes first"
        );
        assert!(
            text.contains(
                "  loss by host: average 1.23%, highest 3.10% (sin), lowest 0.20% (fra)\n"
            )
        );
        assert!(text.contains("  worst vantage: sin: audio loss 3.10%"));
        assert!(text.contains(
            "Knee       33 participants; 78 participants did not pass: together: audio loss"
        ));
        assert!(text.contains("\nRESULT: FAIL\n  tier 2: together: audio loss"));
    }

    #[test]
    fn who_is_missing_is_named_with_the_last_moment_and_nothing_unknown_prints_as_zero() {
        let long = "a-label-that-is-far-too-long-for-any-table-and-was-typed-by-a-machine-that-does-not-care";
        let mut canned = Canned::armed(
            &[10, 25, 50],
            &[
                ("fra", Some(HostRole::Both)),
                (long, Some(HostRole::Both)),
                ("vg", None),
            ],
        );
        for who in 0..2 {
            canned.beat(who, vec![WELL.so_far(TIER, true)], LiveSecond::default());
        }
        canned.beat(
            1,
            vec![Saw { lost: 100, ..WELL }.so_far(TIER + 1, false)],
            LiveSecond::default(),
        );
        canned.loses(1);
        canned.loses(2);
        canned.ends();
        canned.reports(0, &[WELL, WELL], &[]);
        canned.is_over();
        let text = text(&canned);
        assert_fits(&text);
        assert!(text.contains("tier 3                not measured\n"));
        assert!(text.contains("(last heard 2026-"));
        assert_eq!(
            line(&text, "vg ")[1..],
            ["n/a", "n/a", "n/a", "n/a", "n/a", "n/a", "absent"]
        );
        assert!(text.contains("a-label-that-"));
        assert!(text.contains("RESULT: PARTIAL\n"));
    }

    #[test]
    fn a_run_that_nobody_came_to_says_so() {
        let mut canned = Canned::gathering(&[10], 2);
        canned.is_over();
        let text = text(&canned);
        assert_fits(&text);
        assert!(text.contains("Missing\n  unnamed: 2 expected probers never came\n"));
        assert!(text.contains("RESULT: PARTIAL\n"));
    }
}
