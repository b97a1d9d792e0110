//! One load test from start to finish: media, rooms, workers, joins, tiers, drain, and the account
//! of it.
//!
//! Everything measured flows into one cumulative [`Record`]; whatever ends the run early, what was
//! measured until then is reported.

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

/// After the last frame has left: LiveKit resends at most three times, some 100 ms apart.
const DRAIN: Duration = Duration::from_millis(1_500);
/// How long the participants may take to say goodbye.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);
/// How often what has happened is looked at.
const BEAT: Duration = Duration::from_millis(20);
/// So long a question to the engine's threads may go unanswered, and so long they may take to end.
const ANSWERS_TAKE: Duration = Duration::from_secs(2);
const LAST_ACCOUNTS_TAKE: Duration = Duration::from_secs(5);
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

/// Runs the plan against its LiveKit server as `lead` wants it, with the media that
/// [`Clips::generate`] made of it. `progress` hears how it goes, twice a second.
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
    if let Err(why) = driver.prepare(&run.plan, &mut interrupts).await {
        // What was made and deleted again is told in a report; all else was not even begun.
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
    outcome.map(|mut outcome| {
        outcome.notes = [notes, outcome.notes, left_behind].concat();
        driver::tell_way(&endpoint, run, &mut outcome);
        outcome.finished = unix_now();
        outcome
    })
}

/// As [`run_led`], in rooms that others make and delete, and with signals that somebody heard
/// before. Who leads the hosts reads the server's pages.
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

/// Settles [`ConnectionMode::Auto`] by what the server has. Asked once, so that all participants do
/// the same.
pub async fn settle_connection(plan: &mut Plan, gateway: &Gateway) {
    if plan.connection != ConnectionMode::Auto {
        return;
    }
    let endpoint = Endpoint::from(plan.target.url.clone()).through(gateway);
    let presence = match endpoint.resolve().await {
        Ok(endpoint) => probe::has_single_connection(&endpoint).await,
        Err(why) => ServedPath::Unknown(why.to_string()),
    };
    let (connection, reason) = match presence {
        ServedPath::There => (ConnectionMode::Single, "the server has /rtc/v1".to_owned()),
        ServedPath::Missing => (ConnectionMode::Dual, "the server has no /rtc/v1".to_owned()),
        ServedPath::Unknown(why) => (
            ConnectionMode::Dual,
            format!("the server did not say whether it has /rtc/v1: {why}"),
        ),
    };
    plan.settle_connection(connection, reason);
}

/// Only a join tells a server's version. A single connection that nobody asked for is given up
/// where the server is too old for it.
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
    threads: EngineThreads,
    crew: Crew,
    books: Books,
    stages: Stages,
    observer: Observer,
    recorder: Option<Recorder>,
    /// The server's own pages, where they were asked for.
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

    /// Asks every thread for what it has counted up to now, and takes it.
    async fn flush(&mut self) {
        self.question(|| ShardCommand::Report).await;
    }

    /// The same, and how everybody fares.
    async fn survey(&mut self) -> Survey {
        self.books.surveyed.clear();
        self.question(|| ShardCommand::Survey).await;
        let mut outcomes = std::mem::take(&mut self.books.surveyed);
        outcomes.extend(self.books.former.outcomes().cloned());
        let book = &self.books.presence.book;
        // What ended before the tier is not owed in it.
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

    /// Ends the engine's threads and takes their last accounts.
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

    /// The threads are gone, and with them the taps: what they copied is in files now or on its
    /// way.
    fn finish_recording(&mut self) {
        if let Some(recorder) = self.recorder.take() {
            self.books.notes.extend(recorder.finish());
        }
    }

    async fn say_goodbye(&mut self) {
        self.crew.dismiss_all();
        let deadline = tokio::time::Instant::now() + LEAVE_TIMEOUT;
        // The channel closes with the last session, those that were still joining included.
        while let Ok(Some(notice)) =
            tokio::time::timeout_at(deadline, self.crew.notices.recv()).await
        {
            // Who was still on its way back says so now; what else happens to those who are leaving
            // is no news.
            if matches!(notice, Notice::Ended(_) | Notice::Disconnected { .. }) {
                self.take_notice(notice);
            }
        }
    }
}

/// Records below `dir`: each tap goes to the thread that its participant lives on.
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
