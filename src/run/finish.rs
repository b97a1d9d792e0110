//! Makes the final account of a run.

use std::collections::BTreeMap;
use std::time::Duration;

use super::account::{
    by_participant, expect_frames, expect_joins, expected_tracks, foreign_tracks, quality,
    state_of_all, state_tracks,
};
use super::books::Books;
use super::dues::Dues;
use super::presence::NamedParticipant;
use super::stages::TierHold;
use super::{RunSpec, Test, lead, unix_now};
use crate::engine::health;
use crate::measure::second::HostDrops;
use crate::measure::{JoinTimeline, Kind, Record};
use crate::net;
use crate::plan::{ParticipantPlan, Spans};
use crate::report::worst::is_healthy;
use crate::report::{
    EngineHealth, Outcome, ParticipantOutcome, Side, Stall, Step, TargetInfo, TargetKind,
    Unmeasured,
};
use crate::server_metrics::Account;
use crate::signal::session::StrangerChange;
use crate::units::Time;
use crate::words;

/// Number of changes and of tracks of others that are named. The others are only counted.
const STRANGERS_NAMED_MAX: usize = 5;
/// Time without a frame of a track of others from which it counts as dead. Pauses in speech (DTX)
/// and still pictures bring a frame more often.
const STRANGER_SILENCE: Duration = Duration::from_secs(3);

impl Test<'_> {
    pub(super) fn finish(mut self, run: &RunSpec, server: Option<Account>) -> Outcome {
        let stopped_at = self.stages.media_stopped_at;
        let end = stopped_at.unwrap_or_else(|| self.epoch.now());
        self.books.sessions.join_visits();
        let (silent_strangers, outage) = (self.silent_strangers(end), self.outage(end));
        let has_outage = outage.is_some();
        self.books.join_former();
        let participants = self.participant_outcomes(end);
        self.state_people(&participants, end);
        let mut steps: Vec<Step> = self.books.tiers.drain(..).map(|tier| tier.step).collect();
        let unmeasured = self.unmeasured(steps.len());
        let abandoned = self.stages.abandoned.take().into_iter();
        let mut complaints: Vec<String> = abandoned.chain(outage).collect();
        if let Some(hold) = self.take_whole_hold() {
            let (step, more) = self.close_whole_hold(hold, end);
            steps.push(step);
            complaints.extend(more);
        }
        self.expect_frames_and_joins();
        if steps.is_empty() {
            self.stages.busiest = self.busiest_until(end.since(Time::ZERO));
        }
        let (engine, target) = (self.engine_health(end), self.target());
        let silence = final_silence(&engine.stalls, end).filter(|_| !has_outage);
        let notes = self.notes(&engine.stalls, silence.is_some(), (end, run));
        complaints.extend(silence.into_iter().chain(silent_strangers));
        let nobody_came = self.books.sessions.why_nobody_came();
        let Books {
            record,
            series,
            sessions,
            presence,
            ..
        } = self.books;
        let totals = total(record, presence.ever_count(), end);
        if steps.is_empty() {
            steps.push(totals.clone());
        }
        Outcome {
            started: Duration::from_micros(self.epoch.unix_micros(Time::ZERO)),
            finished: unix_now(),
            plan: self.plan.clone(),
            judging: run.judging.clone(),
            target,
            steps,
            unmeasured,
            capacity: None,
            totals,
            series,
            engine,
            nearness: None,
            sfu: None,
            complaints,
            server,
            partial: self.stages.partial.or(nobody_came),
            notes,
            failures: sessions.failures.into_iter().collect(),
            participants,
        }
    }

    /// Remarks for the report that are no reason to fail.
    fn notes(
        &mut self,
        stalls: &[Stall],
        is_end_told: bool,
        (end, run): (Time, &RunSpec),
    ) -> Vec<String> {
        let mut notes = std::mem::take(&mut self.books.notes);
        notes.extend(self.plan.client_notes());
        notes.extend(silence_note(stalls, is_end_told));
        notes.extend(self.books.sessions.notes(&self.books.record.session));
        let presence = &self.books.presence;
        notes.extend(presence.mute_notes(|index| self.named(index)));
        notes.extend(presence.restored_notes(|index| self.named(index)));
        notes.extend(self.stranger_notes(end));
        notes.extend(run.warnings.iter().cloned());
        notes
    }

    /// Notes about what others did whose media is judged.
    fn stranger_notes(&self, end: Time) -> Vec<String> {
        let changes = self.crew.strangers.changes().into_iter();
        let changes: Vec<_> = changes.filter(|change| change.at < end).collect();
        let told = changes.iter().take(STRANGERS_NAMED_MAX);
        let mut notes: Vec<String> = told.map(StrangerChange::note).collect();
        let others = changes.len() - notes.len();
        if others > 0 {
            notes.push(format!(
                "of others: {} more",
                words::count(others as u64, "change")
            ));
        }
        notes
    }

    /// Returns why a run fails that judges the media of others: tracks that are still published and
    /// subscribed to, and of which nothing came any more. Called before former connections are
    /// added to the outcomes.
    fn silent_strangers(&self, end: Time) -> Vec<String> {
        let strangers = &self.crew.strangers;
        if !strangers.is_wanted() {
            return Vec::new();
        }
        let rooms: BTreeMap<u32, u32> = self
            .plan
            .participants()
            .map(|one| (one.index, one.room))
            .collect();
        let mut silent: BTreeMap<(String, Kind), (u64, Time)> = BTreeMap::new();
        for outcome in &self.books.outcomes {
            let room = rooms.get(&outcome.participant).copied().unwrap_or_default();
            for stream in &outcome.streams {
                let last = stream
                    .last_frame_at
                    .filter(|last| end.since(*last) >= STRANGER_SILENCE);
                let track = strangers.track_of((room, outcome.participant), stream.ssrc);
                if let (Some(last), Some(track)) = (last, track.filter(|track| !track.muted)) {
                    let of_one = silent.entry((track.identity, track.kind));
                    let (count, at) = of_one.or_insert((0, last));
                    (*count, *at) = (*count + 1, last.min(*at));
                }
            }
        }
        let mut complaints: Vec<String> = silent
            .into_iter()
            .map(|((identity, kind), (count, at))| {
                format!(
                    "{} of {identity}, who is not of this run, stopped {:.1} s into the run and did not come again, {:.1} s before the end: the track is still published and not muted, and {} waited for it",
                    kind.name(),
                    at.since(Time::ZERO).as_secs_f64(),
                    end.since(at).as_secs_f64(),
                    words::count(count, "subscriber")
                )
            })
            .collect();
        let others = complaints.len().saturating_sub(STRANGERS_NAMED_MAX);
        if others > 0 {
            complaints.truncate(STRANGERS_NAMED_MAX);
            complaints.push(format!(
                "{} of others more stopped, too",
                words::count(others as u64, "track")
            ));
        }
        complaints
    }

    fn target(&self) -> TargetInfo {
        let sessions = &self.books.sessions;
        TargetInfo {
            kind: if self.plan.target.is_embedded() || sessions.embedded_sfu {
                TargetKind::Embedded
            } else {
                TargetKind::LiveKit
            },
            server_version: sessions.server_version.clone(),
            addresses: Vec::new(),
        }
    }

    /// Counts participants, healthy participants, and the tracks that they should have had.
    fn state_people(&mut self, participants: &[ParticipantOutcome], end: Time) {
        let admitted = self.admitted();
        let max_loss_pct = self.judging.max_loss_pct;
        let healthy = participants
            .iter()
            .filter(|participant| is_healthy(participant, max_loss_pct));
        let session = &mut self.books.record.session;
        session.participants_total = admitted.len() as u64;
        session.joins_planned = self.books.joins_all.count.into();
        session.participants_healthy = healthy.count() as u64;
        let dues = Dues::until(self.plan, &self.books.presence.book, end);
        state_tracks(
            &mut self.books.record,
            &dues,
            &admitted,
            &self.books.outcomes,
            &self.books.sessions.ended,
        );
        let mut peers = by_participant(&self.books.outcomes);
        let subscribers = admitted.iter().filter(|of| of.subscribes);
        let people = subscribers.map(|of| (of.room, peers.remove(&of.index).unwrap_or_default()));
        let [audio, video] = foreign_tracks(people);
        audio.state(&mut self.books.record.audio);
        video.state(&mut self.books.record.video);
    }

    /// Participants that were due at one time or another. A ramp that ended early never scheduled
    /// the others.
    fn admitted(&self) -> Vec<ParticipantPlan> {
        let book = &self.books.presence.book;
        let all = self.plan.participants();
        all.filter(|of| book.schedule(of.index).is_some()).collect()
    }

    /// Tiers of the plan that the run did not reach.
    fn unmeasured(&self, measured: usize) -> Vec<Unmeasured> {
        let planned = if self.plan.scenario.search.is_some() {
            Vec::new()
        } else {
            lead::tiers(self.plan)
        };
        let tiers = planned.into_iter().skip(measured);
        tiers
            .filter(|tier| !tier.is_whole)
            .map(|tier| Unmeasured {
                subscribers: tier.per_room(),
                name: tier.name,
            })
            .collect()
    }

    /// Returns the step of a hold that was the whole run, and the reasons for which it fails.
    fn close_whole_hold(&mut self, hold: TierHold, end: Time) -> (Step, Vec<String>) {
        let plan_end = end.max(hold.since + hold.planned);
        let mut complaints = self.gone_people(end, plan_end, "the plan");
        complaints.extend(self.stages.broken.take());
        complaints.extend(hold.watch.complaints());
        let mut record = self.books.record.since(&hold.before);
        state_of_all(&mut record, &self.books.record);
        expect_frames(&mut record);
        let length = end.since(hold.since);
        self.stages.busiest = self.busiest_until(length);
        let step = Step {
            name: "hold".into(),
            participants: self.books.sessions.joined,
            seconds: length.as_secs_f64(),
            record,
            tier: None,
        };
        (step, complaints)
    }

    /// Returns reasons to fail for participants that are gone at the end of a stretch of the run.
    pub(super) fn gone_people(&self, until: Time, end: Time, what: &str) -> Vec<String> {
        let named = |index| self.named(index);
        self.books.presence.complaints(until, end, what, named)
    }

    /// Returns the names of a participant. Given tokens decide them, not the plan.
    fn named(&self, index: u32) -> NamedParticipant {
        if let Some(ended) = self.books.sessions.ended.get(&index) {
            return NamedParticipant {
                identity: ended.identity.clone(),
                room: ended.room.clone(),
            };
        }
        // Tokens are given to a host that runs alone, where index and position are the same.
        if let Some((identity, room)) = self.crew.seat(index) {
            return NamedParticipant { identity, room };
        }
        let room = self.plan.everybody().nth(index as usize);
        NamedParticipant {
            identity: self.plan.identity_at(index).unwrap_or_default(),
            room: room.map_or_else(String::new, |member| self.plan.room_name(member.room)),
        }
    }

    /// Returns why the run fails if most participants lost the server at once.
    fn outage(&mut self, end: Time) -> Option<String> {
        let observer = &self.observer;
        let outages = &mut self.books.sessions.outages;
        outages.complaint(end, |before| observer.last_arrival(before))
    }

    /// Returns when anybody was to receive something.
    fn owed_times(&self, end: Time) -> Spans {
        let presence = &self.books.presence;
        let ever = presence.ever_kept_away();
        Dues::until(self.plan, &presence.book, end).times(|index| {
            if ever.contains(&index) {
                presence.kept_away(index)
            } else {
                Spans::default()
            }
        })
    }

    /// The busiest engine thread's share of its core, in a hold of this length that ended when
    /// publishers stopped.
    fn busiest_until(&self, hold: Duration) -> f64 {
        self.threads.busiest_of_hold().as_secs_f64() / hold.as_secs_f64().max(0.001)
    }

    /// Sets the expected frames and joins. Subscriptions that a layout had room for only later are
    /// expected, too.
    fn expect_frames_and_joins(&mut self) {
        expect_frames(&mut self.books.record);
        let mut joins = self.books.joins_all;
        for (kind, media) in [&self.books.record.audio, &self.books.record.video]
            .into_iter()
            .enumerate()
        {
            joins.tracks[kind] = joins.tracks[kind].max(media.tracks_expected);
        }
        expect_joins(&mut self.books.record, &joins);
    }

    fn engine_health(&mut self, end: Time) -> EngineHealth {
        let owed = self.owed_times(end);
        let seen = self.observer.finish(end, &owed);
        let socket_drops = self.books.record.session.host_drops;
        let reasons = health::reasons(&health::Evidence {
            record: &self.books.record,
            floor: &seen.floor,
            host_drops: socket_drops,
            busiest_worker: self.stages.busiest,
            server_is_here: self.plan.target.url.is_loopback(),
            seconds: &seen.seconds,
            gaps: &seen.gaps,
            stalls: &seen.stalls,
        });
        let packets = self.books.record.engine.packets_processed;
        let engine_cpu: Duration = self.threads.cpu();
        // The embedded SFU's state for each participant is in the same process, so memory cannot be
        // attributed.
        let grown = seen.grown.filter(|_| !self.plan.target.is_embedded());
        EngineHealth {
            threads: self.threads.count(),
            cpu_seconds: seen.cpu.map(|cpu| cpu.as_secs_f64()),
            us_per_packet: (packets > 0).then(|| engine_cpu.as_secs_f64() * 1e6 / packets as f64),
            bytes_per_participant: grown
                .zip(u64::from(self.books.sessions.joined).checked_sub(1))
                .and_then(|(grown, rest)| grown.checked_div(rest + 1)),
            rss_peak_bytes: net::resident_bytes().map(|(_, peak)| peak),
            floor_tick_late: Some(seen.floor),
            host_drops: HostDrops {
                sockets: Some(socket_drops),
                ..seen.drops
            },
            softnet_squeezed: seen.softnet_squeezed,
            stolen_seconds: seen.stolen.map(|time| time.as_secs_f64()),
            throttled_times: seen.throttled.map(|(times, _)| times),
            throttled_seconds: seen.throttled.map(|(_, time)| time.as_secs_f64()),
            thread_times: seen.threads,
            stalls: seen.stalls,
            valid: reasons.is_empty(),
            reasons,
        }
    }

    fn participant_outcomes(&self, end: Time) -> Vec<ParticipantOutcome> {
        let by_participant = by_participant(&self.books.outcomes);
        let dues = Dues::until(self.plan, &self.books.presence.book, end);
        let admitted = self.admitted().into_iter();
        admitted
            .map(|plan| {
                let ended = self.books.sessions.ended.get(&plan.index);
                let peers = by_participant
                    .get(&plan.index)
                    .map_or(&[][..], Vec::as_slice);
                let fared = |kind| {
                    let owed = dues.of(&plan, kind, Time::ZERO);
                    let expected = expected_tracks(&owed, kind, ended);
                    quality(peers, kind, expected, |publisher| owed.has(publisher))
                };
                ParticipantOutcome {
                    index: plan.index,
                    room: ended.map_or_else(
                        || self.plan.room_name(plan.room),
                        |ended| ended.room.clone(),
                    ),
                    timeline: ended.map_or_else(JoinTimeline::default, |ended| ended.timeline),
                    failure: ended.map_or_else(
                        || Some("did not start".to_owned()),
                        |ended| {
                            let story = || {
                                self.books
                                    .presence
                                    .story(plan.index, end)
                                    .map(str::to_owned)
                            };
                            ended.failure.clone().or_else(story)
                        },
                    ),
                    transport: ended.and_then(|ended| ended.transport),
                    disconnects: ended.map_or(0, |ended| ended.disconnects),
                    rtt_us: peers
                        .iter()
                        .find_map(|peer| peer.rtt_rtcp)
                        .map(|rtt| rtt.as_micros() as u64),
                    audio: fared(Kind::Audio),
                    video: fared(Kind::Video),
                    publishes_audio: plan.publishes_audio,
                    publishes_video: plan.publishes_video,
                    subscribes: plan.subscribes,
                    identity: ended.map_or(plan.identity, |ended| ended.identity.clone()),
                }
            })
            .collect()
    }
}

/// Returns the report of a run that ended before anybody joined.
pub(super) fn not_run(run: &RunSpec, why: String) -> Outcome {
    let totals = total(Record::default(), 0, Time::ZERO);
    Outcome {
        started: unix_now(),
        finished: unix_now(),
        plan: run.plan.clone(),
        judging: run.judging.clone(),
        target: TargetInfo {
            kind: TargetKind::LiveKit,
            server_version: None,
            addresses: Vec::new(),
        },
        steps: vec![totals.clone()],
        unmeasured: Vec::new(),
        capacity: None,
        totals,
        series: Vec::new(),
        engine: EngineHealth {
            valid: true,
            ..EngineHealth::default()
        },
        nearness: None,
        sfu: None,
        complaints: Vec::new(),
        server: None,
        partial: Some(format!("could not run: {why}")),
        notes: run.warnings.clone(),
        failures: Vec::new(),
        participants: Vec::new(),
    }
}

fn total(record: Record, participants: u32, end: Time) -> Step {
    Step {
        name: "total".into(),
        participants,
        seconds: end.since(Time::ZERO).as_secs_f64(),
        record,
        tier: None,
    }
}

/// Silence up to the end of the run from which it is a reason to fail.
const FINAL_SILENCE_MIN: f64 = 1.0;
/// Distance between the end of a silence and the end of the run within which they are the same.
const FINAL_GAP: f64 = 0.25;

/// Whether a silence lasted until the end of the run, in seconds.
fn is_final(stall: &Stall, end: f64) -> bool {
    stall.side == Side::Server
        && stall.until >= end - FINAL_GAP
        && stall.until - stall.at >= FINAL_SILENCE_MIN
}

/// Returns why a run fails in which the server fell silent for good.
fn final_silence(stalls: &[Stall], end: Time) -> Option<String> {
    let end = end.as_micros() as f64 / 1e6;
    let silence = stalls.iter().rev().find(|stall| is_final(stall, end))?;
    Some(format!(
        "the server fell silent {:.1} s into the run, and stayed so to the end, for {:.1} s: nothing came while the generator was awake and sent; look at the server, or at the way to it",
        silence.at,
        end - silence.at
    ))
}

/// Returns for example `the server was silent for 1.20 s at second 7`. The generator was awake
/// then, so latencies and losses of that time are the server's. `is_end_told`: the silence at the
/// end of the run is a reason of its own.
fn silence_note(stalls: &[Stall], is_end_told: bool) -> Option<String> {
    let mut silences: Vec<&Stall> = stalls
        .iter()
        .filter(|stall| stall.side == Side::Server)
        .collect();
    if is_end_told {
        silences.pop();
    }
    let worst = silences
        .iter()
        .max_by(|a, b| a.seconds.total_cmp(&b.seconds))?;
    let all: f64 = silences.iter().map(|stall| stall.seconds).sum();
    let others = match silences.len() {
        1 => String::new(),
        count => format!(" ({count} times, {all:.2} s in all)"),
    };
    Some(format!(
        "the server was silent for {:.2} s at second {}{others}: nothing came while the generator was awake and sent; look at the server, or at the way to it",
        worst.seconds, worst.at as u64
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Cause;

    fn silence(at: f64, until: f64) -> Stall {
        Stall {
            side: Side::Server,
            cause: Cause::Silence,
            at,
            until,
            seconds: until - at,
            evidence: String::new(),
        }
    }

    #[test]
    fn a_silence_that_lasts_to_the_end_is_a_reason_and_no_note() {
        let end = Time::from_millis(14_000);
        let stalls = [silence(2.0, 2.5), silence(3.9, 13.9)];
        let told = final_silence(&stalls, end).unwrap();
        assert!(
            told.starts_with(
                "the server fell silent 3.9 s into the run, and stayed so to the end, for 10.1 s"
            ),
            "{told}"
        );
        let note = silence_note(&stalls, true).unwrap();
        assert!(
            note.starts_with("the server was silent for 0.50 s at second 2: "),
            "{note}"
        );
        assert_eq!(silence_note(&stalls[1..], true), None);
        for passing in [silence(3.9, 9.0), silence(13.5, 14.0)] {
            assert_eq!(final_silence(&[passing], end), None);
        }
    }
}
