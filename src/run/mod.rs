//! Runs one load test from start to finish: media, rooms, workers, joins, tiers, drain, and the
//! final account.
//!
//! Every measurement goes into one cumulative [`Record`]. If something ends the run early, the
//! report covers what was measured until then.

pub mod account;
mod books;
mod clips;
mod crew;
mod driver;
mod dues;
mod embedded;
mod finish;
mod former;
mod interrupts;
pub mod lead;
mod observer;
mod outage;
mod presence;
pub(crate) mod rooms;
mod search;
mod series;
mod server;
mod spec;
mod stages;
mod tally;
mod threads;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow};

pub use clips::Clips;
pub use embedded::Embedded;
pub use interrupts::Interrupts;
pub use spec::{Credentials, RunSpec};

use books::Books;
use crew::Crew;
use driver::Driver;
use dues::Dues;
use lead::{Alone, Lead};
use observer::Observer;
use rooms::RoomsNotMade;
use search::RunSearch;
use stages::{Around, Stages, UnderWay};
use tally::Survey;
use threads::EngineThreads;

use crate::engine::worker::WorkerReport;
use crate::engine::{Roster, ShardCommand, ShardConfig};
use crate::plan::{ConnectionMode, Plan, Resources, Span};
use crate::recording::{Recorder, Recording};
use crate::report::progress::ProgressSnapshot;
use crate::report::{Judging, Outcome};
use crate::server_metrics::PageWatch;
use crate::signal::probe::{self, ServedPath};
use crate::signal::session::Notice;
use crate::signal::{Endpoint, Gateway, JoinAccess, Permissions};
use crate::transport::peer::Identity;
use crate::units::Epoch;

/// Time to wait after the last frame was sent. LiveKit resends at most three times, about 100 ms
/// apart.
const DRAIN: Duration = Duration::from_millis(1_500);
/// Longest time that participants may take to leave.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Interval at which the run reads reports and notices.
const BEAT: Duration = Duration::from_millis(20);
/// Longest wait for the engine threads' answers to a question, and below it, the longest wait for
/// them to end.
const ANSWERS_TAKE: Duration = Duration::from_secs(2);
const LAST_ACCOUNTS_TAKE: Duration = Duration::from_secs(5);
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);
const PEERS_PER_PARTICIPANT: usize = 2;

/// Runs the plan on this host alone: see [`run_led`].
///
/// # Errors
/// The same as [`run_led`].
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

/// Runs the plan against its LiveKit server. `lead` decides the stages, and `clips` is the media
/// that [`Clips::generate`] made for the plan. `progress` is called twice a second.
///
/// # Errors
/// Returns what kept the run from starting. Once it has started there is an outcome.
pub async fn run_led(
    run: &RunSpec,
    resources: &Resources,
    clips: Clips,
    lead: &mut impl Lead,
    progress: impl FnMut(&ProgressSnapshot),
) -> Result<Outcome> {
    let mut interrupts = Interrupts::listen();
    let mut driver = Driver::open(run).await?;
    // Refuse unreadable pages here, before anybody is waited for or joins.
    let server = match &run.server_metrics[..] {
        [] => None,
        pages => Some(PageWatch::start(pages).await?),
    };
    if let Err(why) = driver.prepare(&run.plan, &mut interrupts).await {
        // Rooms that were made and deleted again are reported. For all other errors the run had not
        // begun.
        return match why.downcast::<RoomsNotMade>() {
            Ok(why) => Ok(finish::not_run(run, why.to_string())),
            Err(why) => Err(why),
        };
    }
    let mut around = Around {
        lead,
        interrupts: &mut interrupts,
        progress,
    };
    let way_in = driver.way_in();
    let endpoint = way_in.0.clone();
    let outcome = test(run, resources, clips, way_in, server, &mut around).await;
    let (notes, left_behind) = driver.tidy_up(&run.plan).await;
    interrupts.set_left_behind(Vec::new());
    outcome.map(|mut outcome| {
        outcome.notes = [notes, outcome.notes, left_behind].concat();
        driver::tell_way(&endpoint, run, &mut outcome);
        outcome.finished = unix_now();
        outcome
    })
}

/// Runs like [`run_led`], but in rooms that another host makes and deletes, and with signals that
/// the caller already listens for. The server's pages are not read here: the host that leads the
/// run reads them.
///
/// # Errors
/// The same as [`run_led`].
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
        .through(&run.gateway)
        .resolve()
        .await?;
    let mut around = Around {
        lead,
        interrupts,
        progress,
    };
    let way_in = (endpoint.clone(), access);
    let outcome = test(run, resources, clips, way_in, None, &mut around).await;
    outcome.map(|mut outcome| {
        driver::tell_way(&endpoint, run, &mut outcome);
        outcome
    })
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

/// Replaces [`ConnectionMode::Auto`] by what the server supports. The server is asked once, so that
/// all participants do the same.
pub async fn settle_connection(plan: &mut Plan, gateway: &Gateway) {
    if plan.connection != ConnectionMode::Auto {
        return;
    }
    let endpoint = Endpoint::from(plan.target.url.clone()).through(gateway);
    let presence = match endpoint.resolve().await {
        Ok(endpoint) => probe::has_single_connection(&endpoint).await,
        Err(_) => ServedPath::Unasked("it cannot be reached"),
    };
    let (connection, reason) = match presence {
        ServedPath::There => (ConnectionMode::Single, "the server has /rtc/v1".to_owned()),
        ServedPath::Missing => (ConnectionMode::Dual, "the server has no /rtc/v1".to_owned()),
        ServedPath::Unknown(why) => (
            ConnectionMode::Dual,
            format!("the server did not say whether it has /rtc/v1: {why}"),
        ),
        ServedPath::Unasked(why) => (
            ConnectionMode::Dual,
            format!("the server was not asked whether it has /rtc/v1: {why}"),
        ),
    };
    plan.settle_connection(connection, reason);
}

/// Falls back to two connections where the server is too old for a single one. Applies only if
/// nobody asked for a single connection. Only a join tells a server's version, so this joins once.
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
        // With one identity, hosts that share a room would throw each other out.
        Some(key) => probe::visitor_token(
            key,
            &room,
            &plan.identity(&format!("probe-{}", first.index)),
        ),
        // The participant that owns this token joins for the test itself later.
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

/// A test in progress.
struct Test<'a> {
    plan: &'a Plan,
    judging: &'a Judging,
    epoch: Epoch,
    roster: Arc<Roster>,
    threads: EngineThreads,
    crew: Crew,
    books: Books,
    stages: Stages,
    observer: Observer,
    recorder: Option<Recorder>,
    /// The server's own pages, if they were asked for.
    server: Option<PageWatch>,
    /// Hosts that went missing.
    missing: Vec<u32>,
}

impl<'a> Test<'a> {
    fn start(
        plan: &'a Plan,
        run: &'a RunSpec,
        epoch: Epoch,
        resources: &Resources,
        way_in: (Endpoint, JoinAccess),
        clips: Clips,
    ) -> Result<Test<'a>> {
        let identity = Identity::generate()
            .map_err(|error| anyhow!("cannot make a DTLS certificate: {error}"))?;
        let observer = Observer::start(epoch, plan.target.url.is_loopback())?;
        let shard = ShardConfig {
            roster: Arc::new(Roster::of(plan)),
            identity,
            epoch,
        };
        let threads = EngineThreads::start(&plan.split(resources.threads), &shard)?;
        let crew = Crew::muster(
            plan,
            &shard,
            threads.senders(),
            way_in,
            (clips, run.turn.clone()),
        );
        let record_to = run.destinations.record.clone();
        let recorder = record_to
            .map(|dir| start_recorder(dir, plan, &threads))
            .transpose()?;
        let now = epoch.now();
        Ok(Test {
            plan,
            judging: &run.judging,
            epoch,
            roster: shard.roster,
            threads,
            crew,
            books: Books::open(now),
            stages: Stages::begin(now),
            observer,
            recorder,
            server: None,
            missing: Vec::new(),
        })
    }

    fn take_what_came(&mut self) {
        while let Some(report) = self.threads.poll_report() {
            self.take_report(report);
        }
        while let Ok(notice) = self.crew.notices.try_recv() {
            self.take_notice(notice);
        }
    }

    fn take_report(&mut self, mut report: WorkerReport) {
        self.observer
            .take_activity(std::mem::take(&mut report.activity));
        let worker = report.worker;
        let record = self.books.take_report(report);
        self.threads.give_back(worker, record);
    }

    fn take_notice(&mut self, notice: Notice) {
        let lost = self.books.take_notice(notice, self.epoch.now());
        if let (Some(index), Some(tier)) = (lost, &mut self.stages.tier) {
            tier.lost.insert(index);
        }
    }

    /// Asks every thread for what it has counted so far, and adds it to the books.
    async fn flush(&mut self) {
        self.question(|| ShardCommand::Report).await;
    }

    /// Flushes as well, and returns how each participant fares.
    async fn survey(&mut self) -> Survey {
        self.books.surveyed.clear();
        self.question(|| ShardCommand::Survey).await;
        let mut outcomes = std::mem::take(&mut self.books.surveyed);
        outcomes.extend(self.books.former.outcomes().cloned());
        let book = &self.books.presence.book;
        // Nothing that ended before the tier is owed in it.
        let began = self.stages.tier.as_ref().map(UnderWay::began_at);
        let window = Span {
            from: began.unwrap_or_default(),
            to: self.epoch.now(),
        };
        let dues = Dues::within(self.plan, book, window);
        Survey::new(self.plan, &dues, &outcomes, book)
    }

    async fn question(&mut self, command: impl Fn() -> ShardCommand) {
        let asked = self.threads.ask(command);
        let deadline = tokio::time::Instant::now() + ANSWERS_TAKE;
        while self.threads.owe_answers(&asked) {
            let Some(report) = self.threads.next_report(deadline).await else {
                return;
            };
            self.take_report(report);
        }
    }

    /// Ends the engine's threads and adds their last reports to the books.
    async fn stop_threads(&mut self) {
        self.observer.look_at_threads();
        self.threads.command_all(|| ShardCommand::Stop);
        let deadline = tokio::time::Instant::now() + LAST_ACCOUNTS_TAKE;
        while !self.threads.have_ended() {
            let Some(report) = self.threads.next_report(deadline).await else {
                let note = "an engine thread did not answer: its last second is missing";
                self.books.notes.push(note.into());
                break;
            };
            self.take_report(report);
        }
        let faults = self.threads.join();
        self.books.notes.extend(faults);
    }

    /// Finishes the recording. The threads and their taps are gone, so everything they copied is in
    /// files or on its way there.
    fn finish_recording(&mut self) {
        if let Some(recorder) = self.recorder.take() {
            self.books.notes.extend(recorder.finish());
        }
    }

    async fn say_goodbye(&mut self) {
        self.crew.dismiss_all();
        let deadline = tokio::time::Instant::now() + LEAVE_TIMEOUT;
        // The channel closes when the last session ends, including sessions that were still
        // joining.
        while let Ok(Some(notice)) =
            tokio::time::timeout_at(deadline, self.crew.notices.recv()).await
        {
            // A participant that was still reconnecting reports its end now. Other notices from
            // participants that are leaving do not matter.
            if matches!(notice, Notice::Ended(_) | Notice::Disconnected { .. }) {
                self.take_notice(notice);
            }
        }
    }
}

/// Records below `dir`. Each tap goes to the thread that runs its participant.
fn start_recorder(dir: PathBuf, plan: &Plan, threads: &EngineThreads) -> Result<Recorder> {
    let (recording, taps) = Recording::new(dir, plan);
    for (participant, tap) in taps {
        let record = ShardCommand::Record {
            participant: participant.index,
            tap,
        };
        threads.command_of(participant.position, record);
    }
    Recorder::start(recording).context("no thread for recording")
}
