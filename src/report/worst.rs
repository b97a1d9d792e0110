//! The participants that fared worst, and the faults of each, because percentiles over all of them
//! hide a single bad case.
//!
//! The order is defined in docs/metrics.md. Shares are compared in whole per cents, so that a
//! single frame of one participant does not outweigh a minute of another.

use std::cmp::Reverse;

use super::{MediaQuality, ParticipantOutcome, judge};
use crate::measure::Kind;
use crate::words::{count, micros, percent};

/// ITU-T G.114: delay up to this value does not bother most people.
const UNNOTICED_LATENCY_US: u64 = 150_000;

/// Whether it joined, never disconnected, has every expected track live, and for each kind of media
/// has no more frames missing or late than `--max-loss` allows.
pub fn is_healthy(participant: &ParticipantOutcome, max_loss_pct: f64) -> bool {
    let kept = is_in(participant) && participant.disconnects == 0;
    kept && kinds(participant).into_iter().all(|(_, quality)| {
        let bad = undelivered(quality) + quality.frames_late;
        tracks_missing(quality) == 0
            && bad as f64 <= quality.frames_expected as f64 * max_loss_pct / 1e2
    })
}

/// One of the participants that fared worst.
pub struct Ranked<'a> {
    pub participant: &'a ParticipantOutcome,
    pub healthy: bool,
    /// Faults in the order in which they were judged. Empty if there is none.
    pub wrong: Vec<String>,
}

/// Returns one per cent of all participants, at least one of them, the worst first.
pub fn worst(participants: &[ParticipantOutcome], max_loss_pct: f64) -> Vec<Ranked<'_>> {
    let mut ranked: Vec<&ParticipantOutcome> = participants.iter().collect();
    ranked.sort_by_key(|participant| Reverse(severity(participant)));
    ranked.truncate(participants.len().div_ceil(100));
    let ranked = ranked.into_iter().map(|participant| Ranked {
        participant,
        healthy: is_healthy(participant, max_loss_pct),
        wrong: wrong(participant),
    });
    ranked.collect()
}

/// Number of frames of one kind that were expected and never came.
pub fn undelivered(quality: &MediaQuality) -> u64 {
    quality
        .frames_expected
        .saturating_sub(quality.frames_delivered)
}

pub fn tracks_missing(quality: &MediaQuality) -> u64 {
    quality.tracks_expected.saturating_sub(quality.tracks_live)
}

/// Concealed time as a share of the time to be played.
pub fn concealed_share(quality: &MediaQuality) -> Option<f64> {
    let (played, concealed) = (quality.played_us?, quality.concealed_us?);
    (played + concealed > 0).then(|| concealed as f64 / (played + concealed) as f64)
}

fn is_in(participant: &ParticipantOutcome) -> bool {
    participant.timeline.joined.is_some() && participant.failure.is_none()
}

fn kinds(participant: &ParticipantOutcome) -> [(Kind, &MediaQuality); 2] {
    [
        (Kind::Audio, &participant.audio),
        (Kind::Video, &participant.video),
    ]
}

fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// Key by which participants are ranked. The first difference decides.
fn severity(participant: &ParticipantOutcome) -> (bool, u32, u64, u64, u64, u64, u64) {
    let both = kinds(participant).map(|(_, quality)| quality);
    let whole_percent = |share: Option<f64>| (share.unwrap_or(0.0) * 100.0) as u64;
    let most = |of: fn(&MediaQuality) -> Option<f64>| {
        both.into_iter()
            .map(|quality| whole_percent(of(quality)))
            .max()
            .unwrap_or(0)
    };
    (
        !is_in(participant),
        participant.disconnects,
        both.into_iter().map(tracks_missing).sum(),
        most(|quality| share(undelivered(quality), quality.frames_expected)),
        most(concealed_share),
        most(|quality| share(quality.frames_late, quality.frames_expected)),
        both.into_iter()
            .filter_map(|quality| quality.one_way_us_mean)
            .max()
            .unwrap_or(0),
    )
}

/// The faults of a participant in words.
fn wrong(participant: &ParticipantOutcome) -> Vec<String> {
    let mut said = Vec::new();
    if let Some(failure) = &participant.failure {
        said.push(format!("failed: {failure}"));
    } else if participant.timeline.joined.is_none() {
        said.push("never got in".to_owned());
    }
    if participant.disconnects > 0 {
        said.push(format!(
            "disconnected {}",
            count(participant.disconnects.into(), "time")
        ));
    }
    let both = kinds(participant);
    for (kind, quality) in both
        .iter()
        .filter(|(_, quality)| tracks_missing(quality) > 0)
    {
        let (missing, expected) = (tracks_missing(quality), quality.tracks_expected);
        said.push(format!(
            "{missing} of {} never came",
            count(expected, &format!("{} track", judge::name(*kind)))
        ));
    }
    for (kind, quality) in both {
        let shares = [
            (
                share(undelivered(quality), quality.frames_expected),
                format!("undelivered{}", places(quality)),
            ),
            (concealed_share(quality), "concealed (model)".to_owned()),
            (
                share(quality.frames_late, quality.frames_expected),
                "late".to_owned(),
            ),
        ];
        let noticeable = shares
            .into_iter()
            .filter_map(|(share, what)| Some((share.filter(|share| *share > 0.0)?, what)));
        said.extend(
            noticeable
                .map(|(share, what)| format!("{} {} {what}", judge::name(kind), percent(share))),
        );
    }
    let latency = both
        .iter()
        .filter_map(|(_, quality)| quality.one_way_us_mean)
        .max();
    if let Some(us) = latency.filter(|us| *us > UNNOTICED_LATENCY_US) {
        said.push(format!("{} late on average", micros(us as f64)));
    }
    said
}

/// Formats the places of losses, for example ` (uplink 3, downlink 310)`.
fn places(quality: &MediaQuality) -> String {
    let places = [
        ("source", quality.frames_lost_source),
        ("uplink", quality.frames_lost_uplink),
        ("SFU", quality.frames_lost_sfu),
        ("downlink", quality.frames_lost_downlink),
    ];
    let places: Vec<String> = places
        .into_iter()
        .filter(|(_, frames)| *frames > 0)
        .map(|(place, frames)| format!("{place} {frames}"))
        .collect();
    if places.is_empty() {
        String::new()
    } else {
        format!(" ({})", places.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::JoinTimeline;
    use crate::units::Time;

    /// A participant that got everything in time.
    fn happy(index: u32) -> ParticipantOutcome {
        let quality = MediaQuality {
            tracks_expected: 1,
            tracks_live: 1,
            frames_expected: 1_000,
            frames_delivered: 1_000,
            played_us: Some(20_000_000),
            concealed_us: Some(0),
            one_way_us_mean: Some(2_000),
            ..MediaQuality::default()
        };
        ParticipantOutcome {
            index,
            identity: format!("person-{index}"),
            timeline: JoinTimeline {
                joined: Some(Time::from_millis(5)),
                ..JoinTimeline::default()
            },
            audio: quality,
            video: quality,
            ..ParticipantOutcome::default()
        }
    }

    type Hurt = fn(&mut ParticipantOutcome);

    /// Faults that a participant can have, the worst first.
    fn sorrows() -> Vec<(&'static str, Hurt)> {
        vec![
            ("failed: refused", |who| {
                who.failure = Some("refused".into())
            }),
            ("disconnected 2 times", |who| who.disconnects = 2),
            ("1 of 1 video track never came", |who| {
                who.video.tracks_live = 0
            }),
            ("video 30.00% undelivered (SFU 300)", |who| {
                (who.video.frames_delivered, who.video.frames_lost_sfu) = (700, 300);
            }),
            ("audio 25.00% concealed (model)", |who| {
                (who.audio.played_us, who.audio.concealed_us) = (Some(15_000_000), Some(5_000_000));
            }),
            ("audio 40.00% late", |who| who.audio.frames_late = 400),
            ("300 ms late on average", |who| {
                who.audio.one_way_us_mean = Some(300_000)
            }),
        ]
    }

    #[test]
    fn the_order_is_the_stated_one_and_each_says_what_was_wrong() {
        let mut participants: Vec<_> = (0..700).map(happy).collect();
        for (index, (_, hurt)) in sorrows().into_iter().enumerate() {
            hurt(&mut participants[690 - 100 * index]);
        }
        let ranked = worst(&participants, 1.0);
        assert_eq!(ranked.len(), 7);
        for (at, (ranked, (said, _))) in ranked.iter().zip(sorrows()).enumerate() {
            assert_eq!(
                (ranked.participant.index as usize, ranked.wrong.as_slice()),
                (690 - 100 * at, &[said.to_owned()][..])
            );
        }
        // Concealment is a model's estimate and latency has no limit of its own, so neither makes a
        // participant unhealthy.
        assert_eq!(
            ranked
                .iter()
                .map(|ranked| ranked.healthy)
                .collect::<Vec<_>>(),
            [false, false, false, false, true, false, true]
        );
    }

    #[test]
    fn there_is_always_a_worst_one_and_nothing_need_be_wrong_with_him() {
        let participants: Vec<_> = (0..3).map(happy).collect();
        let ranked = worst(&participants, 1.0);
        assert!(ranked.len() == 1 && ranked[0].healthy && ranked[0].wrong.is_empty());
        assert!(worst(&[], 1.0).is_empty());
        assert_eq!(
            worst(&(0..101).map(happy).collect::<Vec<_>>(), 1.0).len(),
            2
        );
    }

    #[test]
    fn a_frame_of_one_does_not_outweigh_a_minute_of_another() {
        let mut participants: Vec<_> = (0..2).map(happy).collect();
        participants[0].audio.frames_delivered -= 1;
        participants[1].audio.concealed_us = Some(5_000_000);
        assert_eq!(worst(&participants, 1.0)[0].participant.index, 1);
    }

    #[test]
    fn lateness_counts_with_loss_against_the_same_limit() {
        let mut who = happy(0);
        (who.audio.frames_delivered, who.audio.frames_late) = (995, 5);
        assert!(is_healthy(&who, 1.0));
        who.audio.frames_late = 6;
        assert!(!is_healthy(&who, 1.0) && is_healthy(&who, 2.0));
    }
}
