//! One load test from start to finish: media, rooms, workers, joins, tiers, drain, and the account of it.
//!
//! Everything measured flows into one cumulative [`Record`]; whatever ends the run early, what was measured until then is reported.

pub mod account;
mod clips;
mod driver;
mod embedded;
mod former;
mod interrupts;
pub mod lead;
mod observer;
mod presence;
pub(crate) mod rooms;
mod search;
mod server;
mod spec;
mod stages;
mod tally;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow};
use tokio::sync::{mpsc, watch};

pub use clips::Clips;
pub use embedded::Embedded;
pub use interrupts::Interrupts;
pub use spec::{Credentials, RunSpec};

use account::{
    Joins, expect_frames, expect_joins, expected_tracks, quality, state_of_all, state_tracks,
};
use driver::Driver;
use former::Former;
use lead::{Alone, FinishedTier, Lead, RunStage};
use observer::Observer;
use presence::Presence;
use search::RunSearch;
use stages::{Around, LastHold, TierHold, UnderWay};
use tally::{GRACE, Survey};

use crate::engine::health::{self, FloorThread};
use crate::engine::worker::{self, Occasion, ShardWorkerConfig, WorkerReport};
use crate::engine::{PeerOutcome, Roster, ShardCommand, ShardConfig};
use crate::measure::second::HostDrops;
use crate::measure::{self, JoinTimeline, Kind, Record};
use crate::net;
use crate::path::{Routes, unsent_note};
use crate::plan::{ConnectionMode, LostPublishers, Plan, Resources};
use crate::preflight;
use crate::recording::{Recorder, Recording};
use crate::report::progress::ProgressSnapshot;
use crate::report::worst::is_healthy;
use crate::report::{
    EngineHealth, Judging, Outcome, ParticipantOutcome, RunSample, Side, Stall, Step, TargetInfo,
    TargetKind, Unmeasured,
};
use crate::server_metrics::{self, PageWatch};
use crate::sfu;
use crate::signal::session::{
    Ended, JoinPhase, Media, Notice, Request, SessionContext, ShardPlace, TakingTurns,
};
use crate::signal::{Endpoint, JoinAccess, Permissions, probe};
use crate::transport::peer::Identity;
use crate::units::{Epoch, Time};
use crate::words;

/// After the last frame has left: LiveKit resends at most three times, some 100 ms apart.
const DRAIN: Duration = Duration::from_millis(1_500);
/// How long the participants may take to say goodbye.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);
/// How often what has happened is looked at.
const BEAT: Duration = Duration::from_millis(20);
/// Engine threads report at whole seconds; so long a row waits for them.
const REPORTS_TAKE: Duration = Duration::from_millis(50);
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);
const PEERS_PER_PARTICIPANT: usize = 2;

/// Runs the plan by itself: see [`run_led`].
///
/// # Errors
/// As [`run_led`].
pub async fn run(
    run: &RunSpec,
    resources: &Resources,
    clips: Clips,
    progress: impl FnMut(&ProgressSnapshot),
) -> Result<Outcome> {
    if run.plan.scenario.search.is_none() {
        return run_led(run, resources, clips, &mut Alone::new(&run.plan), progress).await;
    }
    let mut search = RunSearch::new(&run.plan, &run.judging);
    let mut outcome = run_led(run, resources, clips, &mut search, progress).await?;
    outcome.capacity = search.capacity();
    Ok(outcome)
}

/// Runs the plan against its LiveKit server as `lead` wants it, with the media that [`Clips::generate`] made of it. `progress` hears how it goes, twice a
/// second.
///
/// # Errors
/// What kept the run from starting; once it has started there is an outcome.
pub async fn run_led(
    run: &RunSpec,
    resources: &Resources,
    clips: Clips,
    lead: &mut impl Lead,
    progress: impl FnMut(&ProgressSnapshot),
) -> Result<Outcome> {
    let mut interrupts = Interrupts::listen();
    let mut driver = Driver::open(run).await?;
    // Before anybody is waited for or joins: what cannot be read is refused here.
    let server = match &run.server_metrics[..] {
        [] => None,
        pages => Some(PageWatch::start(pages).await?),
    };
    driver.prepare(&run.plan, &mut interrupts).await?;
    let mut around = Around {
        lead,
        interrupts: &mut interrupts,
        progress,
    };
    let outcome = test(run, resources, clips, driver.way_in(), server, &mut around).await;
    let (notes, left_behind) = driver.tidy_up(&run.plan).await;
    outcome.map(|mut outcome| {
        outcome.notes = [notes, outcome.notes, left_behind].concat();
        outcome.finished = unix_now();
        outcome
    })
}

/// As [`run_led`], in rooms that others make and delete, and with signals that somebody heard before. Who leads the hosts reads the server's pages.
///
/// # Errors
/// As [`run_led`].
pub async fn run_as_guest(
    run: &RunSpec,
    access: JoinAccess,
    resources: &Resources,
    clips: Clips,
    lead: &mut impl Lead,
    interrupts: &mut Interrupts,
    progress: impl FnMut(&ProgressSnapshot),
) -> Result<Outcome> {
    let endpoint = Endpoint::from(run.plan.target.url.clone())
        .resolve()
        .await?;
    let mut around = Around {
        lead,
        interrupts,
        progress,
    };
    test(run, resources, clips, (endpoint, access), None, &mut around).await
}

async fn test<L: Lead, P: FnMut(&ProgressSnapshot)>(
    run: &RunSpec,
    resources: &Resources,
    clips: Clips,
    (endpoint, access): (Endpoint, JoinAccess),
    server: Option<PageWatch>,
    around: &mut Around<'_, L, P>,
) -> Result<Outcome> {
    let mut plan = run.plan.clone();
    distrust_old_servers(&mut plan, &endpoint, &access).await;
    let mut test = Test::start(
        &plan,
        run,
        around.lead.epoch(),
        resources,
        (endpoint, access),
        clips,
    )?;
    test.watch_server(server);
    test.go(around).await;
    let server = test.account_of_server().await;
    Ok(test.finish(run, server))
}

/// Settles [`ConnectionMode::Auto`] by what the server has. Asked once, so that all participants do the same.
pub async fn settle_connection(plan: &mut Plan) {
    if plan.connection != ConnectionMode::Auto {
        return;
    }
    let (connection, reason) =
        match probe::has_single_connection(&Endpoint::from(plan.target.url.clone())).await {
            Some(true) => (ConnectionMode::Single, "the server has /rtc/v1"),
            Some(false) => (ConnectionMode::Dual, "the server has no /rtc/v1"),
            None => (
                ConnectionMode::Dual,
                "the server did not say whether it has /rtc/v1",
            ),
        };
    plan.settle_connection(connection, reason);
}

/// Only a join tells a server's version. A single connection that nobody asked for is given up where the server is too old for it.
async fn distrust_old_servers(plan: &mut Plan, endpoint: &Endpoint, access: &JoinAccess) {
    if plan.connection != ConnectionMode::Single
        || plan.connection_reason.is_none()
        || plan.target.is_embedded()
    {
        return;
    }
    let first = plan.participant(0);
    let room = plan.room_name(first.room);
    let token = match access.key() {
        // Hosts that share a room throw each other out under one identity.
        Some(key) => probe::visitor_token(
            key,
            &room,
            &plan.identity(&format!("probe-{}", first.index)),
        ),
        // Whoever it is for joins in earnest later.
        None => access
            .join_token(&first, &room, Permissions::SUBSCRIBER)
            .await
            .ok(),
    };
    let Some(token) = token else { return };
    let version = probe::server_version(endpoint, &token).await;
    if let Some(version) = version.filter(|version| probe::is_unsolid(version)) {
        plan.settle_connection(
            ConnectionMode::Dual,
            format!("the single one of LiveKit {version} is not solid, from 1.13.2 on it is"),
        );
    }
}

fn unix_now() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

/// A test under way.
struct Test<'a> {
    plan: &'a Plan,
    judging: &'a Judging,
    epoch: Epoch,
    roster: Arc<Roster>,
    /// Until nobody joins any more; then the sessions share it among themselves.
    context: Option<Arc<SessionContext>>,
    places: Vec<ShardPlace>,
    /// Of hosts that went missing.
    lost: LostPublishers,
    workers: Vec<WorkerHandle>,
    recorder: Option<Recorder>,
    observer: Observer,
    reports: mpsc::UnboundedReceiver<WorkerReport>,
    notices: mpsc::UnboundedReceiver<Notice>,
    leave: watch::Sender<bool>,
    record: Record,
    series: Vec<RunSample>,
    second: SecondBook,
    sessions: SessionBook,
    outcomes: Vec<PeerOutcome>,
    cpu_before: Option<Duration>,
    resident_before: Option<u64>,
    resident_hold: Option<u64>,
    stage: RunStage,
    /// Who ought to be in when, and which sources are gone.
    presence: Presence,
    /// When the first subscribers may be intended to join at the earliest: behind the publishers.
    next_join_at: Time,
    /// Joins that were wanted, over the run, and since the tier before.
    joins_all: Joins,
    joins_new: Joins,
    requests: BTreeMap<u32, mpsc::UnboundedSender<Request>>,
    /// What workers have told since they were asked for a survey.
    surveyed: Vec<PeerOutcome>,
    former: Former,
    tier: Option<UnderWay>,
    held: Option<LastHold>,
    tiers: Vec<FinishedTier>,
    /// The busiest worker's share of its core, of all tiers.
    busiest: f64,
    media_stopped_at: Option<Time>,
    /// The server's own pages, where they were asked for.
    server: Option<PageWatch>,
    partial: Option<String>,
    /// Nobody was left, and neither the user nor this host had ended it.
    abandoned: Option<String>,
    /// A threshold that ended the run.
    broken: Option<String>,
    was_interrupted: bool,
    shown_at: Time,
    notes: Vec<String>,
}

struct WorkerHandle {
    commands: Sender<ShardCommand>,
    spare_records: Sender<Box<Record>>,
    thread: Option<JoinHandle<std::io::Result<()>>>,
    cpu: Duration,
    cpu_at_hold: Duration,
    /// When publishers stopped: what the threads do in the drain is not the load that they are judged by.
    cpu_at_stop: Duration,
    /// Reports that we asked for.
    answers: u64,
    ended: bool,
}

/// What sessions have reported.
#[derive(Default)]
struct SessionBook {
    /// Joins that succeeded, and those that failed.
    joined: u32,
    failed: u32,
    /// Who is in.
    present: BTreeSet<u32>,
    /// Who was told to leave, and is still here.
    leaving: BTreeSet<u32>,
    server_version: Option<String>,
    embedded_sfu: bool,
    failures: BTreeMap<String, u64>,
    ended: BTreeMap<u32, Ended>,
    /// Earlier visits of those who have come again.
    earlier: BTreeMap<u32, Ended>,
}

impl SessionBook {
    /// A participant is to join; if it was here before, that is kept.
    fn come(&mut self, index: u32) {
        if let Some(ended) = self.ended.remove(&index) {
            let all = self.whole_of(ended);
            self.earlier.insert(index, all);
        }
    }

    /// Why most of those have gone who are: `: the server ended the session: room_deleted (5 participants)`.
    fn why_gone(&self) -> String {
        let gone = self
            .failures
            .iter()
            .filter_map(|(reason, count)| Some((*count, reason.strip_prefix("disconnected: ")?)));
        gone.max().map_or_else(String::new, |(count, reason)| {
            format!(": {reason} ({})", words::count(count, "participant"))
        })
    }

    /// Nobody comes any more: what is known of everybody is of all visits.
    fn join_visits(&mut self) {
        let ended = std::mem::take(&mut self.ended);
        self.ended = ended
            .into_values()
            .map(|ended| (ended.index, self.whole_of(ended)))
            .collect();
    }

    /// A visit together with those before it.
    fn whole_of(&mut self, visit: Ended) -> Ended {
        match self.earlier.remove(&visit.index) {
            None => visit,
            Some(earlier) => Ended {
                failure: visit.failure.or(earlier.failure),
                disconnects: visit.disconnects + earlier.disconnects,
                video_shown: visit.video_shown.max(earlier.video_shown),
                ..visit
            },
        }
    }
}

/// What the rows of the series are differences of.
struct SecondBook {
    at: Time,
    /// Just after a whole second of the run's clock. A row that a stall makes late is longer.
    due: Time,
    cpu: Option<Duration>,
    joined: u32,
    /// What was reported since the last row.
    record: Record,
    last: RunSample,
}

impl<'a> Test<'a> {
    fn start(
        plan: &'a Plan,
        run: &'a RunSpec,
        epoch: Epoch,
        resources: &Resources,
        (endpoint, access): (Endpoint, JoinAccess),
        clips: Clips,
    ) -> Result<Test<'a>> {
        let identity = Identity::generate()
            .map_err(|error| anyhow!("cannot make a DTLS certificate: {error}"))?;
        let roster = Arc::new(Roster::of(plan));
        let (report_sender, reports) = mpsc::unbounded_channel();
        let (notice_sender, notices) = mpsc::unbounded_channel();
        let (leave, leaving) = watch::channel(false);
        let parts = plan.split(resources.threads);
        let shard = ShardConfig {
            identity: identity.clone(),
            roster: roster.clone(),
            epoch,
        };
        let resident_before = net::resident_bytes().map(|(now, _)| now);
        let workers = start_workers(&parts, &shard, &report_sender)?;
        let context = SessionContext {
            endpoint,
            access,
            epoch,
            roster: roster.clone(),
            fingerprint: identity.fingerprint(),
            media: Media {
                audio: clips.audio,
                audio_redundancy: plan.scenario.media.audio.redundancy,
                video: clips.video,
                taking_turns: clips.silence.map(|silence| TakingTurns {
                    seed: plan.scenario.seed,
                    speakers: plan.scenario.publishers_of(Kind::Audio),
                    silence,
                }),
                pacing: plan.scenario.media.pacing,
            },
            layout: plan.scenario.media.layout,
            video_layers: plan.video_layers(),
            obey_bandwidth: plan.scenario.media.obey_bandwidth,
            single_connection: plan.connection == ConnectionMode::Single,
            join_retries: plan.scenario.join_retries,
            routes: Routes::default(),
            receive_buffer_bytes: preflight::receive_buffer_bytes(plan) as usize,
            shards: workers
                .iter()
                .map(|worker| worker.commands.clone())
                .collect(),
            notices: notice_sender,
            leave: leaving,
        };
        let places = places(&parts);
        let record_to = run.destinations.record.clone();
        let recorder = record_to
            .map(|dir| start_recorder(dir, plan, &workers, &places))
            .transpose()?;
        let now = epoch.now();
        Ok(Test {
            plan,
            judging: &run.judging,
            epoch,
            roster,
            context: Some(Arc::new(context)),
            places,
            lost: LostPublishers::default(),
            workers,
            recorder,
            observer: Observer::start(
                FloorThread::start(epoch).context("no thread for the timer floor")?,
            ),
            reports,
            notices,
            leave,
            record: Record::default(),
            series: Vec::new(),
            second: SecondBook {
                at: now,
                due: now.next_second() + REPORTS_TAKE,
                cpu: generator_cpu(),
                joined: 0,
                record: Record::default(),
                last: RunSample::default(),
            },
            sessions: SessionBook::default(),
            outcomes: Vec::new(),
            cpu_before: generator_cpu(),
            resident_before,
            resident_hold: None,
            stage: RunStage::Publish,
            presence: Presence::default(),
            next_join_at: now,
            joins_all: Joins::default(),
            joins_new: Joins::default(),
            requests: BTreeMap::new(),
            surveyed: Vec::new(),
            former: Former::default(),
            tier: None,
            held: None,
            tiers: Vec::new(),
            busiest: 0.0,
            media_stopped_at: None,
            server: None,
            partial: None,
            abandoned: None,
            broken: None,
            was_interrupted: false,
            shown_at: Time::ZERO,
            notes: Vec::new(),
        })
    }

    fn take_what_came(&mut self) {
        while let Ok(report) = self.reports.try_recv() {
            self.take_report(report);
        }
        while let Ok(notice) = self.notices.try_recv() {
            self.take_notice(notice);
        }
    }

    fn take_report(&mut self, report: WorkerReport) {
        let worker = &mut self.workers[report.worker];
        worker.cpu = report.cpu;
        self.observer.take_activity(report.activity);
        self.second.record.merge(&report.record);
        worker.answers += u64::from(report.occasion == Occasion::Asked);
        let mut record = report.record;
        self.record.merge(&record);
        record.clear();
        for outcome in report.former {
            let visit = self.presence.book.last_join(outcome.participant);
            self.former.add(outcome, visit.unwrap_or_default());
        }
        // A worker that has ended needs no record any more.
        let _ = worker.spare_records.send(record);
        match (report.occasion, report.outcomes) {
            (Occasion::Last, outcomes) => {
                worker.ended = true;
                self.outcomes.extend(outcomes.unwrap_or_default());
            }
            (_, outcomes) => self.surveyed.extend(outcomes.unwrap_or_default()),
        }
    }

    fn take_notice(&mut self, notice: Notice) {
        let session = &mut self.record.session;
        match notice {
            Notice::Phase(phase, after) => match phase {
                JoinPhase::SignalConnect => session.signal_connect.record(after),
                JoinPhase::SignalJoin => session.signal_join.record(after),
                JoinPhase::Ice => session.ice.record(after),
                JoinPhase::Dtls => session.dtls.record(after),
                JoinPhase::Join => session.join.record(after),
                JoinPhase::FirstMedia => session.first_media.record(after),
            },
            Notice::Joined { index } => {
                self.sessions.joined += 1;
                self.sessions.present.insert(index);
                session.joins_ok += 1;
            }
            Notice::JoinFailed { reason, .. } => {
                self.sessions.failed += 1;
                session.joins_failed += 1;
                *self
                    .sessions
                    .failures
                    .entry(format!("join: {reason}"))
                    .or_default() += 1;
            }
            Notice::JoinRetried => session.joins_retried += 1,
            Notice::Reconnected {
                index,
                after,
                resumed,
            } => {
                self.sessions.present.insert(index);
                if !resumed {
                    self.presence.note_back(index, self.epoch.now());
                }
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
                self.presence.note_lost(index, at, &reason, server_reason);
                self.sessions.present.remove(&index);
                if let Some(tier) = &mut self.tier {
                    tier.lost.insert(index);
                }
                session.disconnects += 1;
                *self
                    .sessions
                    .failures
                    .entry(format!("disconnected: {reason}"))
                    .or_default() += 1;
            }
            Notice::SignalMalformed => session.signal_malformed += 1,
            Notice::TrackLost { index, kind, at } => {
                self.presence.note_track_lost(index, kind, at);
                if let Some(tier) = &mut self.tier {
                    tier.lost.insert(index);
                }
            }
            Notice::SignalRtt(rtt) => session.rtt_signal.record(rtt),
            Notice::SpeakersChanged => session.speaker_updates += 1,
            Notice::Server {
                version,
                embedded_sfu,
            } => {
                self.sessions.server_version = Some(version).filter(|version| !version.is_empty());
                self.sessions.embedded_sfu = embedded_sfu;
            }
            Notice::Ended(ended) => {
                self.sessions.present.remove(&ended.index);
                self.sessions.leaving.remove(&ended.index);
                self.sessions.ended.insert(ended.index, *ended);
            }
        }
    }

    /// Asks every worker for what it has counted up to now, and takes it.
    async fn flush(&mut self) {
        self.question(|| ShardCommand::Report).await;
    }

    /// The same, and how everybody fares.
    async fn survey(&mut self) -> Survey {
        self.surveyed.clear();
        self.question(|| ShardCommand::Survey).await;
        self.surveyed.extend(self.former.outcomes().cloned());
        Survey::new(
            self.plan,
            &self.lost,
            &std::mem::take(&mut self.surveyed),
            &self.presence.book,
        )
    }

    async fn question(&mut self, command: impl Fn() -> ShardCommand) {
        let wanted: Vec<u64> = self
            .workers
            .iter()
            .map(|worker| worker.answers + 1)
            .collect();
        self.command_all(command);
        let deadline = tokio::time::Instant::now() + Duration::from_secs(2);
        while self
            .workers
            .iter()
            .zip(&wanted)
            .any(|(worker, wanted)| worker.answers < *wanted && !worker.ended)
        {
            match tokio::time::timeout_at(deadline, self.reports.recv()).await {
                Ok(Some(report)) => self.take_report(report),
                _ => return,
            }
        }
    }

    /// Ends the workers and takes their last accounts.
    async fn stop_workers(&mut self) {
        self.observer.look_at_threads();
        self.command_all(|| ShardCommand::Stop);
        let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
        while self.workers.iter().any(|worker| !worker.ended) {
            match tokio::time::timeout_at(deadline, self.reports.recv()).await {
                Ok(Some(report)) => self.take_report(report),
                _ => {
                    self.notes
                        .push("an engine thread did not answer: its last second is missing".into());
                    return;
                }
            }
        }
    }

    /// Those that have given their last account are gone or about to be; one that has not is left behind.
    fn join_workers(&mut self) {
        for (index, worker) in self
            .workers
            .iter_mut()
            .enumerate()
            .filter(|(_, worker)| worker.ended)
        {
            match worker.thread.take().map(JoinHandle::join) {
                Some(Ok(Err(error))) => self.notes.push(format!(
                    "engine thread {index} ended with an error: {error}"
                )),
                Some(Err(_)) => self.notes.push(format!("engine thread {index} panicked")),
                Some(Ok(Ok(()))) | None => {}
            }
        }
    }

    /// The workers are gone, and with them the taps: what they copied is in files now or on its way.
    fn finish_recording(&mut self) {
        if let Some(recorder) = self.recorder.take() {
            self.notes.extend(recorder.finish());
        }
    }

    async fn say_goodbye(&mut self) {
        self.context = None;
        // Nobody listens where every session has ended already.
        let _ = self.leave.send(true);
        let deadline = tokio::time::Instant::now() + LEAVE_TIMEOUT;
        // The channel closes with the last session, those that were still joining included.
        while let Ok(Some(notice)) = tokio::time::timeout_at(deadline, self.notices.recv()).await {
            // Who was still on its way back says so now; what else happens to those who are leaving is no news.
            if matches!(notice, Notice::Ended(_) | Notice::Disconnected { .. }) {
                self.take_notice(notice);
            }
        }
    }

    fn command_all(&self, command: impl Fn() -> ShardCommand) {
        for worker in &self.workers {
            // A worker that is gone is missed when its account is.
            let _ = worker.commands.send(command());
        }
    }

    fn close_second(&mut self, now: Time) {
        let cpu = generator_cpu();
        let seconds = now.since(self.second.at).as_secs_f64();
        let counted = &self.second.record;
        let per_second = |count: u64| count as f64 / seconds;
        let (audio, video) = (&counted.audio, &counted.video);
        let mut latency = audio.one_way_latency.clone();
        latency.merge(&video.one_way_latency);
        let sample = RunSample {
            t: now.as_micros() as f64 / 1e6,
            step: self.held_since(self.second.at).map(str::to_owned),
            participants: self.present(),
            joins_per_second: per_second(u64::from(self.sessions.joined - self.second.joined)),
            packets_sent_per_second: per_second(audio.packets_sent + video.packets_sent),
            packets_received_per_second: per_second(
                audio.packets_received + video.packets_received,
            ),
            bytes_sent_per_second: per_second(audio.bytes_sent + video.bytes_sent),
            bytes_received_per_second: per_second(audio.bytes_received + video.bytes_received),
            packets_lost: lost_more(audio) + lost_more(video),
            rtt_us_p50: counted.session.rtt_rtcp.quantile(0.5),
            one_way_us_p50: latency.quantile(0.5),
            one_way_us_p99: latency.quantile(0.99),
            tick_late_us_p99: counted.engine.tick_late.quantile(0.99),
            cpu_cores: cpu_between(self.second.cpu, cpu).map(|used| used.as_secs_f64() / seconds),
            uplink_estimate_bps: mean_bps(
                counted.bandwidth.uplink_estimate_kbps,
                counted.bandwidth.uplink_estimates,
            ),
            downlink_estimate_bps: mean_bps(
                counted.bandwidth.remb_sent_kbps,
                counted.bandwidth.remb_sent,
            ),
            generator: self.observer.close_second(self.second.at, now, counted),
            server: self.server.as_mut().map(PageWatch::rows),
        };
        self.series.push(sample.clone());
        let second = &mut self.second;
        second.record.clear();
        (second.at, second.due) = (now, now.next_second() + REPORTS_TAKE);
        (second.cpu, second.joined, second.last) = (cpu, self.sessions.joined, sample);
    }

    fn present(&self) -> u32 {
        self.sessions.present.len() as u32
    }

    fn snapshot(&self, now: Time) -> ProgressSnapshot {
        let expected = [&self.record.audio, &self.record.video]
            .map(|media| media.packets_received + media.packets_repaired + media.packets_lost)
            .iter()
            .sum::<u64>();
        let lost = self.record.audio.packets_lost + self.record.video.packets_lost;
        ProgressSnapshot {
            elapsed: now.since(Time::ZERO),
            // How long a part takes is for its leader to say.
            total: self
                .plan
                .length(GRACE)
                .filter(|_| self.plan.part.is_none())
                .map(|length| length + DRAIN),
            tier: self
                .tier
                .as_ref()
                .filter(|tier| !tier.plan.is_whole)
                .map(|tier| tier.plan.name.clone()),
            joined: if self.plan.has_tiers() {
                self.present()
            } else {
                self.sessions.joined
            },
            planned: if self.plan.has_tiers() {
                self.presence.due_count()
            } else {
                self.plan.total_participants()
            },
            failed: self.sessions.failed,
            loss: (expected > 0).then(|| lost as f64 / expected as f64),
            sample: self.second.last.clone(),
        }
    }

    fn finish(mut self, run: &RunSpec, server: Option<server_metrics::Account>) -> Outcome {
        let end = self.media_stopped_at.unwrap_or_else(|| self.epoch.now());
        self.sessions.join_visits();
        self.outcomes.extend(self.former.outcomes().cloned());
        let participants = self.participant_outcomes(end);
        // A ramp that ended early never came to the others.
        let admitted = self.presence.ever_count();
        self.record.session.participants_total = admitted.into();
        self.record.session.joins_planned = self.joins_all.count.into();
        self.record.session.participants_healthy = participants
            .iter()
            .filter(|participant| is_healthy(participant, run.judging.max_loss_pct))
            .count() as u64;
        state_tracks(
            &mut self.record,
            self.plan,
            &self.lost,
            admitted,
            &self.outcomes,
            &self.sessions.ended,
        );
        let mut steps: Vec<Step> = self.tiers.drain(..).map(|tier| tier.step).collect();
        let planned = if self.plan.scenario.search.is_some() {
            Vec::new()
        } else {
            lead::tiers(self.plan)
        };
        let unmeasured = planned
            .into_iter()
            .skip(steps.len())
            .filter(|tier| !tier.is_whole);
        let unmeasured = unmeasured
            .map(|tier| Unmeasured {
                subscribers: tier.per_room(),
                name: tier.name,
            })
            .collect();
        let mut complaints: Vec<String> = self.abandoned.take().into_iter().collect();
        if let Some(TierHold {
            since,
            before,
            watch,
            planned,
            ..
        }) = self.take_whole_hold()
        {
            let plan_end = end.max(since + planned);
            complaints.extend(self.gone_sources(end, plan_end, "the plan"));
            complaints.extend(self.broken.take());
            complaints.extend(watch.complaints());
            let mut record = self.record.since(&before);
            state_of_all(&mut record, &self.record);
            expect_frames(&mut record);
            self.busiest = self.busiest_until(end.since(since));
            steps.push(Step {
                name: "hold".into(),
                participants: self.sessions.joined,
                seconds: end.since(since).as_secs_f64(),
                record,
                tier: None,
            });
        }
        expect_frames(&mut self.record);
        self.expect_joins();
        if steps.is_empty() {
            self.busiest = self.busiest_until(end.since(Time::ZERO));
        }
        let engine = self.engine_health(end);
        self.notes.extend(silence_note(&engine.stalls));
        self.notes.extend(unsent_note(&self.record.session));
        let totals = Step {
            name: "total".into(),
            participants: admitted,
            seconds: end.since(Time::ZERO).as_secs_f64(),
            record: self.record,
            tier: None,
        };
        if steps.is_empty() {
            steps.push(totals.clone());
        }
        self.notes.extend(run.warnings.iter().cloned());
        Outcome {
            started: Duration::from_micros(self.epoch.unix_micros(Time::ZERO)),
            finished: unix_now(),
            plan: self.plan.clone(),
            judging: run.judging.clone(),
            target: TargetInfo {
                kind: if run.plan.target.is_embedded() || self.sessions.embedded_sfu {
                    TargetKind::Embedded
                } else {
                    TargetKind::LiveKit
                },
                server_version: self.sessions.server_version.clone(),
            },
            steps,
            unmeasured,
            capacity: None,
            totals,
            series: self.series,
            engine,
            nearness: None,
            sfu: None,
            complaints,
            server,
            partial: self.partial,
            notes: self.notes,
            failures: self.sessions.failures.into_iter().collect(),
            participants,
        }
    }

    /// Why sources that are gone at the end of a stretch of the run are a reason to fail.
    fn gone_sources(&self, until: Time, end: Time, what: &str) -> Vec<String> {
        self.presence.complaints(until, end, what, |index| {
            self.plan.identity_at(index).unwrap_or_default()
        })
    }

    /// The busiest worker's share of its core, in a hold of that length that ended when publishers stopped.
    fn busiest_until(&self, hold: Duration) -> f64 {
        let busy = |worker: &WorkerHandle| {
            worker
                .cpu_at_stop
                .saturating_sub(worker.cpu_at_hold)
                .as_secs_f64()
                / hold.as_secs_f64().max(0.001)
        };
        self.workers.iter().map(busy).fold(0.0, f64::max)
    }

    /// Of subscriptions, those that a layout had room for later are expected, too.
    fn expect_joins(&mut self) {
        let mut joins = self.joins_all;
        for (kind, media) in [&self.record.audio, &self.record.video]
            .into_iter()
            .enumerate()
        {
            joins.tracks[kind] = joins.tracks[kind].max(media.tracks_expected);
        }
        expect_joins(&mut self.record, &joins);
    }

    fn engine_health(&mut self, end: Time) -> EngineHealth {
        let seen = self.observer.finish(end);
        let socket_drops = self.record.session.host_drops;
        let reasons = health::reasons(&health::Evidence {
            record: &self.record,
            floor: &seen.floor,
            host_drops: socket_drops,
            busiest_worker: self.busiest,
            seconds: &seen.seconds,
            gaps: &seen.gaps,
            stalls: &seen.stalls,
        });
        let packets = self.record.engine.packets_processed;
        let engine_cpu: Duration = self.workers.iter().map(|worker| worker.cpu).sum();
        // What the embedded SFU keeps of every participant lies in the same memory.
        let grown = self
            .resident_hold
            .zip(self.resident_before)
            .filter(|_| !self.plan.target.is_embedded())
            .map(|(hold, before)| hold.saturating_sub(before));
        EngineHealth {
            threads: self.workers.len(),
            cpu_seconds: cpu_between(self.cpu_before, generator_cpu()).map(|cpu| cpu.as_secs_f64()),
            us_per_packet: (packets > 0).then(|| engine_cpu.as_secs_f64() * 1e6 / packets as f64),
            bytes_per_participant: grown
                .zip(u64::from(self.sessions.joined).checked_sub(1))
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
        let mut by_participant: BTreeMap<u32, Vec<&PeerOutcome>> = BTreeMap::new();
        self.outcomes.iter().for_each(|outcome| {
            by_participant
                .entry(outcome.participant)
                .or_default()
                .push(outcome)
        });
        let admitted = self.presence.ever_count();
        (0..admitted)
            .map(|position| {
                let plan = self.plan.participant(position);
                let ended = self.sessions.ended.get(&plan.index);
                let peers = by_participant
                    .get(&plan.index)
                    .map_or(&[][..], Vec::as_slice);
                let fared = |kind| {
                    let expected = expected_tracks(self.plan, &self.lost, &plan, kind, ended);
                    quality(peers, kind, expected, |origin| {
                        self.lost.has(self.plan, origin)
                    })
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
                            let story = || self.presence.story(plan.index, end).map(str::to_owned);
                            ended.failure.clone().or_else(story)
                        },
                    ),
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

/// `the server was silent for 1.20 s at second 7`: the generator was awake, so its latencies and losses of that time are the server's.
fn silence_note(stalls: &[Stall]) -> Option<String> {
    let silences: Vec<&Stall> = stalls
        .iter()
        .filter(|stall| stall.side == Side::Server)
        .collect();
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

/// CPU time of this process without the embedded SFU's threads. The floor thread and `main` are part of what a run costs.
fn generator_cpu() -> Option<Duration> {
    let sfu = net::threads_cpu(sfu::THREAD_PREFIX)?;
    Some(net::process_cpu().saturating_sub(sfu))
}

/// Packets that were lost since the row before. Where more of those that were thought lost have come after all, none.
fn lost_more(counted: &measure::Media) -> u64 {
    // Sums of differences wrap: see `Record::merge`.
    u64::try_from(counted.packets_lost as i64).unwrap_or(0)
}

/// The mean of estimates of which the sum is known, in kbit/s.
fn mean_bps(sum_kbps: u64, count: u64) -> Option<u64> {
    (sum_kbps * 1_000).checked_div(count)
}

fn cpu_between(before: Option<Duration>, after: Option<Duration>) -> Option<Duration> {
    Some(after?.saturating_sub(before?))
}

fn start_workers(
    parts: &[Vec<u32>],
    shard: &ShardConfig,
    reports: &mpsc::UnboundedSender<WorkerReport>,
) -> Result<Vec<WorkerHandle>> {
    let cpus = net::allowed_cpus();
    let mut workers = Vec::new();
    for (index, part) in parts.iter().enumerate() {
        let (commands, command_receiver) = channel();
        let (spare_records, spare_receiver) = channel();
        let config = ShardWorkerConfig {
            index,
            // Pinned only where there are cores to spare: beside a server on the same few cores the scheduler knows better.
            cpu: (cpus.len() > 2 * parts.len()).then(|| cpus[index % cpus.len()]),
            capacity: part.len() * PEERS_PER_PARTICIPANT,
            shard: shard.clone(),
            commands: command_receiver,
            reports: reports.clone(),
            spare_records: spare_receiver,
        };
        let thread = std::thread::Builder::new()
            .name(format!("engine-{index}"))
            .spawn(move || worker::run(config))
            .context("no engine thread")?;
        workers.push(WorkerHandle {
            commands,
            spare_records,
            thread: Some(thread),
            cpu: Duration::ZERO,
            cpu_at_hold: Duration::ZERO,
            cpu_at_stop: Duration::ZERO,
            answers: 0,
            ended: false,
        });
    }
    Ok(workers)
}

/// Records below `dir`: each tap goes to the worker that its participant lives on.
fn start_recorder(
    dir: PathBuf,
    plan: &Plan,
    workers: &[WorkerHandle],
    places: &[ShardPlace],
) -> Result<Recorder> {
    let (recording, taps) = Recording::new(dir, plan);
    for (participant, tap) in taps {
        // A worker that is gone is missed when its account is.
        let _ = workers[places[participant.position as usize].shard]
            .commands
            .send(ShardCommand::Record {
                participant: participant.index,
                tap,
            });
    }
    Recorder::start(recording).context("no thread for recording")
}

/// Which shard and which keys each participant has, by its position.
fn places(parts: &[Vec<u32>]) -> Vec<ShardPlace> {
    let mut places = vec![ShardPlace { shard: 0, key: 0 }; parts.iter().map(Vec::len).sum()];
    for (shard, part) in parts.iter().enumerate() {
        for (at, position) in part.iter().enumerate() {
            places[*position as usize] = ShardPlace {
                shard,
                key: at * PEERS_PER_PARTICIPANT,
            };
        }
    }
    places
}
