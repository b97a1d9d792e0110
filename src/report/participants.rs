//! One JSON object per line for every participant: its timeline and its quality.
//!
//! Times are microseconds since the start of the run, on the run's own clock. `null` means that it
//! never happened or does not apply.

use serde::Serialize;

use super::{MediaQuality, Outcome, ParticipantOutcome};
use crate::plan::MediaTransport;
use crate::units::Time;

#[derive(Serialize)]
struct ParticipantLine<'a> {
    index: u32,
    room: &'a str,
    identity: &'a str,
    publishes_audio: bool,
    publishes_video: bool,
    subscribes: bool,
    failure: Option<&'a str>,
    transport: Option<MediaTransport>,
    disconnects: u32,
    intended_us: u64,
    started_us: Option<u64>,
    signal_connected_us: Option<u64>,
    signal_joined_us: Option<u64>,
    ice_connected_us: Option<u64>,
    dtls_connected_us: Option<u64>,
    joined_us: Option<u64>,
    first_media_us: Option<u64>,
    rtt_us: Option<u64>,
    audio: &'a MediaQuality,
    video: &'a MediaQuality,
}

/// Renders NDJSON, in the order of `outcome.participants`.
pub fn render(outcome: &Outcome) -> String {
    let mut text = String::new();
    for participant in &outcome.participants {
        text.push_str(&serde_json::to_string(&line(participant)).expect("plain data serialises"));
        text.push('\n');
    }
    text
}

fn line(participant: &ParticipantOutcome) -> ParticipantLine<'_> {
    let timeline = &participant.timeline;
    ParticipantLine {
        index: participant.index,
        room: &participant.room,
        identity: &participant.identity,
        publishes_audio: participant.publishes_audio,
        publishes_video: participant.publishes_video,
        subscribes: participant.subscribes,
        failure: participant.failure.as_deref(),
        transport: participant.transport,
        disconnects: participant.disconnects,
        intended_us: timeline.intended.as_micros(),
        started_us: timeline.started.map(Time::as_micros),
        signal_connected_us: timeline.signal_connected.map(Time::as_micros),
        signal_joined_us: timeline.signal_joined.map(Time::as_micros),
        ice_connected_us: timeline.ice_connected.map(Time::as_micros),
        dtls_connected_us: timeline.dtls_connected.map(Time::as_micros),
        joined_us: timeline.joined.map(Time::as_micros),
        first_media_us: timeline.first_media.map(Time::as_micros),
        rtt_us: participant.rtt_us,
        audio: &participant.audio,
        video: &participant.video,
    }
}
