//! Data that a run collects: counts from the engine, notices from sessions, who is due when, and
//! finished tiers.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::account::Joins;
use super::former::Former;
use super::lead::FinishedTier;
use super::outage::Outages;
use super::presence::Presence;
use super::series::SecondBook;
use crate::engine::PeerOutcome;
use crate::engine::worker::{Occasion, WorkerReport};
use crate::measure::{Record, Session};
use crate::path::unsent_note;
use crate::plan::MediaTransport;
use crate::report::RunSample;
use crate::signal::session::{Ended, JoinPhase, Notice};
use crate::units::Time;
use crate::words;

pub(super) struct Books {
    /// All counts since the start.
    pub record: Record,
    pub series: Vec<RunSample>,
    pub second: SecondBook,
    pub sessions: SessionBook,
    /// When each participant is due, and which publishers are gone.
    pub presence: Presence,
    /// Outcomes of connections: those that existed at the end, those that the threads have reported
    /// since the last request for a survey, and former ones.
    pub outcomes: Vec<PeerOutcome>,
    pub surveyed: Vec<PeerOutcome>,
    pub former: Former,
    /// Wanted joins, over the whole run, and below it, since the tier before.
    pub joins_all: Joins,
    pub joins_new: Joins,
    pub tiers: Vec<FinishedTier>,
    pub notes: Vec<String>,
}

/// Reports of the sessions.
#[derive(Default)]
pub(super) struct SessionBook {
    /// Number of joins that succeeded, and below it, that failed.
    pub joined: u32,
    pub failed: u32,
    /// Number of failed joins whose cause lay on the path to the server, and not in the server or
    /// its load.
    pub kept_out: u32,
    /// Number of joins that were told to come back later, by the reason given.
    pub held_back: BTreeMap<String, u64>,
    /// Participants that are present.
    pub present: BTreeSet<u32>,
    /// Participants that were told to leave and are still present.
    pub leaving: BTreeSet<u32>,
    pub server_version: Option<String>,
    pub embedded_sfu: bool,
    pub failures: BTreeMap<String, u64>,
    pub outages: Outages,
    /// Why joins were tried again, and below it, what else the server refused.
    retried: BTreeMap<String, u64>,
    refused: BTreeMap<String, u64>,
    /// Participants that lost their connection and came back, by whether they resumed their
    /// session, and by the reason for the loss.
    back: BTreeMap<(bool, String), CameBack>,
    /// Reasons why media did not use UDP, each with its number of participants.
    fallbacks: BTreeMap<String, u64>,
    pub ended: BTreeMap<u32, Ended>,
    /// Earlier visits of participants that have come again.
    pub earlier: BTreeMap<u32, Ended>,
}

#[derive(Default)]
struct CameBack {
    count: u64,
    longest: Duration,
}

impl Books {
    pub fn open(now: Time) -> Books {
        Books {
            record: Record::default(),
            series: Vec::new(),
            second: SecondBook::begin(now),
            sessions: SessionBook::default(),
            presence: Presence::default(),
            outcomes: Vec::new(),
            surveyed: Vec::new(),
            former: Former::default(),
            joins_all: Joins::default(),
            joins_new: Joins::default(),
            tiers: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Adds the outcomes of former connections to those of the last ones.
    pub fn join_former(&mut self) {
        let former = self.former.outcomes().cloned();
        self.outcomes.extend(former);
    }

    /// Takes a report, and returns its record for the thread to fill again.
    pub fn take_report(&mut self, report: WorkerReport) -> Box<Record> {
        self.second.record.merge(&report.record);
        self.record.merge(&report.record);
        for outcome in report.former {
            let visit = self.presence.book.last_join(outcome.participant);
            self.former.add(outcome, visit.unwrap_or_default());
        }
        let outcomes = report.outcomes.unwrap_or_default();
        if report.occasion == Occasion::Last {
            self.outcomes.extend(outcomes);
        } else {
            self.surveyed.extend(outcomes);
        }
        report.record
    }

    fn note_joined(&mut self, index: u32, transport: MediaTransport) {
        self.sessions.joined += 1;
        self.sessions.present.insert(index);
        self.record.session.joins_ok += 1;
        *joins_by_mut(&mut self.record.session, transport) += 1;
    }

    /// Returns the participant that lost its session or one of its own tracks, or was harmed by the
    /// server.
    pub fn take_notice(&mut self, notice: Notice, now: Time) -> Option<u32> {
        let session = &mut self.record.session;
        match notice {
            Notice::Phase(phase, after) => self.note_phase(phase, after),
            Notice::Joined { index, transport } => self.note_joined(index, transport),
            Notice::FellBack { why } => self.sessions.note_fallback(why),
            Notice::JoinFailed {
                reason, kept_out, ..
            } => self.note_join_failed(&reason, kept_out),
            Notice::HeldBack { reason } => self.sessions.note_held_back(reason),
            Notice::JoinRetried { reason } => {
                session.joins_retried += 1;
                self.sessions.note_retry(reason);
            }
            Notice::Reconnected {
                index,
                after,
                resumed,
                why,
            } => {
                if !resumed {
                    self.presence.note_back(index, now);
                }
                self.sessions.note_back(index, resumed, why, after);
                session.reconnects_ok += 1;
                session.reconnect.record(after);
            }
            Notice::ReconnectFailed { .. } => session.reconnects_failed += 1,
            Notice::Disconnected {
                index,
                at,
                reason,
                server_reason,
            } => {
                session.disconnects += 1;
                self.presence.note_lost(index, at, &reason, server_reason);
                self.sessions.note_lost(index, at, reason, server_reason);
                return Some(index);
            }
            Notice::SignalMalformed => session.signal_malformed += 1,
            moderation @ (Notice::TrackLost { .. }
            | Notice::MutedByServer { .. }
            | Notice::Harmed { .. }
            | Notice::Restored { .. }
            | Notice::Refused { .. }) => return self.take_moderation(moderation),
            Notice::SignalRtt(rtt) => session.rtt_signal.record(rtt),
            Notice::SpeakersChanged => session.speaker_updates += 1,
            Notice::Server {
                version,
                embedded_sfu,
            } => {
                self.sessions.server_version = Some(version).filter(|version| !version.is_empty());
                self.sessions.embedded_sfu = embedded_sfu;
            }
            Notice::Ended(ended) => self.sessions.note_end(*ended),
        }
        None
    }

    /// Takes notices of what the server did to a participant. Returns the participant if it no
    /// longer is as planned.
    fn take_moderation(&mut self, notice: Notice) -> Option<u32> {
        match notice {
            Notice::TrackLost {
                index,
                kind,
                at,
                story,
            } => {
                self.presence.note_track_lost(index, kind, at, story);
                return Some(index);
            }
            Notice::MutedByServer {
                index,
                kind,
                muted,
                at,
            } => self.presence.note_muted(index, kind, muted, at),
            Notice::Harmed { index, at, story } => {
                self.presence.note_harmed(index, at, story);
                return Some(index);
            }
            Notice::Restored { index, at, story } => {
                self.presence.note_restored(index, at, story);
            }
            Notice::Refused { reason } => {
                *self.sessions.refused.entry(reason).or_default() += 1;
            }
            _ => {}
        }
        None
    }

    fn note_join_failed(&mut self, reason: &str, kept_out: bool) {
        self.sessions.failed += 1;
        self.sessions.kept_out += u32::from(kept_out);
        self.record.session.joins_failed += 1;
        self.sessions.note_failure(format!("join: {reason}"));
    }

    fn note_phase(&mut self, phase: JoinPhase, after: Duration) {
        let session = &mut self.record.session;
        let histogram = match phase {
            JoinPhase::SignalConnect => &mut session.signal_connect,
            JoinPhase::SignalJoin => &mut session.signal_join,
            JoinPhase::Ice => &mut session.ice,
            JoinPhase::Dtls => &mut session.dtls,
            JoinPhase::Join => &mut session.join,
            JoinPhase::FirstMedia => &mut session.first_media,
        };
        histogram.record(after);
    }
}

fn joins_by_mut(session: &mut Session, transport: MediaTransport) -> &mut u64 {
    match transport {
        MediaTransport::Udp => &mut session.joins_by_udp,
        MediaTransport::Tcp => &mut session.joins_by_tcp,
        MediaTransport::TurnUdp => &mut session.joins_by_turn_udp,
        MediaTransport::TurnTcp => &mut session.joins_by_turn_tcp,
        MediaTransport::TurnTls => &mut session.joins_by_turn_tls,
    }
}

impl SessionBook {
    /// Notes that a participant will join. An earlier visit of it is kept.
    pub fn come(&mut self, index: u32) {
        if let Some(ended) = self.ended.remove(&index) {
            let all = self.whole_of(ended);
            self.earlier.insert(index, all);
        }
    }

    /// Returns the most frequent reason why participants have gone, for example `: the server ended
    /// the session: room_deleted (5 participants)`.
    pub fn why_gone(&self) -> String {
        let gone = self
            .failures
            .iter()
            .filter_map(|(reason, count)| Some((*count, reason.strip_prefix("disconnected: ")?)));
        gone.max().map_or_else(String::new, |(count, reason)| {
            format!(": {reason} ({})", words::count(count, "participant"))
        })
    }

    /// Returns why nothing of the server was measured, if something on the path kept everybody out.
    pub fn why_nobody_came(&self) -> Option<String> {
        if self.joined > 0 || self.failed == 0 || self.kept_out < self.failed {
            return None;
        }
        let most = self.failures.iter().max_by_key(|(_, count)| **count);
        let why = most.and_then(|(reason, _)| reason.strip_prefix("join: "));
        Some(format!(
            "could not run: nobody got as far as the server, and nothing of it was measured: {}",
            why.unwrap_or_default()
        ))
    }

    /// Remarks for the report that are no reason to fail.
    pub fn notes(&self, session: &Session) -> Vec<String> {
        let path = self.path_notes(session);
        let trouble = self.trouble_notes().into_iter();
        path.chain(trouble).chain(self.limit_notes()).collect()
    }

    /// Troubles that were overcome.
    fn trouble_notes(&self) -> Vec<String> {
        let retried = self.retried.iter().map(|(why, count)| {
            let joins = if *count == 1 {
                "1 join was".to_owned()
            } else {
                format!("{} joins were", words::number(*count))
            };
            format!("{joins} tried again: {why}")
        });
        let back = self.back.iter().map(|((resumed, why), back)| {
            let how = if *resumed {
                "resumed the session"
            } else {
                "joined anew"
            };
            format!(
                "{}: connection lost ({why}), then {how}, after {:.1} s at most",
                words::count(back.count, "time"),
                back.longest.as_secs_f64()
            )
        });
        let refused = self
            .refused
            .iter()
            .map(|(why, count)| format!("{}: {why}", words::count(*count, "time")));
        retried.chain(back).chain(refused).collect()
    }

    /// Limits of the server that held joins back.
    fn limit_notes(&self) -> impl Iterator<Item = String> {
        self.held_back.iter().map(|(why, count)| {
            format!(
                "{} told to come back later, and did (each join counts from when it was intended): {why}",
                if *count == 1 { "1 join was".to_owned() } else { format!("{} joins were", words::number(*count)) }
            )
        })
    }

    /// Joins each participant's visits into one. Called when nobody joins any more.
    pub fn join_visits(&mut self) {
        let ended = std::mem::take(&mut self.ended);
        self.ended = ended
            .into_values()
            .map(|ended| (ended.index, self.whole_of(ended)))
            .collect();
    }

    /// Joins a visit with those before it.
    fn whole_of(&mut self, visit: Ended) -> Ended {
        match self.earlier.remove(&visit.index) {
            None => visit,
            Some(earlier) => Ended {
                failure: visit.failure.or(earlier.failure),
                transport: visit.transport.or(earlier.transport),
                disconnects: visit.disconnects + earlier.disconnects,
                video_shown: visit.video_shown.max(earlier.video_shown),
                ..visit
            },
        }
    }

    fn note_back(&mut self, index: u32, resumed: bool, why: String, after: Duration) {
        self.present.insert(index);
        let back = self.back.entry((resumed, why)).or_default();
        back.count += 1;
        back.longest = back.longest.max(after);
    }

    /// `server_reason` is set if the server ended the session itself and said why.
    fn note_lost(
        &mut self,
        index: u32,
        at: Time,
        reason: String,
        server_reason: Option<&'static str>,
    ) {
        if server_reason.is_none() {
            self.outages.note(at, &reason, self.present.len() as u32);
        }
        self.present.remove(&index);
        self.note_failure(format!("disconnected: {reason}"));
    }

    fn note_held_back(&mut self, reason: String) {
        *self.held_back.entry(reason).or_default() += 1;
    }

    fn note_retry(&mut self, reason: String) {
        *self.retried.entry(reason).or_default() += 1;
    }

    fn note_failure(&mut self, why: String) {
        *self.failures.entry(why).or_default() += 1;
    }

    /// There are as many different reasons as the server has addresses.
    fn note_fallback(&mut self, why: String) {
        *self.fallbacks.entry(why).or_default() += 1;
    }

    /// Notes about the media path: datagrams that were not sent, and participants that did not use
    /// UDP.
    fn path_notes(&self, session: &Session) -> impl Iterator<Item = String> + '_ {
        let fallbacks = self.fallbacks.iter().map(|(why, count)| {
            let people = if *count == 1 {
                "participant"
            } else {
                "participants"
            };
            format!("{count} {people} sent media {why}")
        });
        unsent_note(session).into_iter().chain(fallbacks)
    }

    fn note_end(&mut self, ended: Ended) {
        self.present.remove(&ended.index);
        self.leaving.remove(&ended.index);
        self.ended.insert(ended.index, ended);
    }
}
