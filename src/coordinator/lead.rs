//! The coordinator's side of a run over several hosts, from start to finish: port, journal, rooms,
//! progress messages, and the final state.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tracing::info;

use super::access::{self, CoordinatorAccess, Seal};
use super::desk::{Desk, DeskFailure, DeskHandle, DeskThread};
use super::journal::{self, Head, Journal};
use super::place::{HostsLoad, PlacedHosts};
use super::protocol::{TOKEN_VARIABLE, URL_VARIABLE, WireJudging};
use super::seconds::{self, SecondRow, Seconds, Series};
use super::server::{self, Exhibit, Site};
use super::spec::Coordinate;
use super::state::{JournalEntry, RunPhase, RunSetup, RunState};
use super::story::Story;
use super::tokens::Mint;
use crate::plan::scenario::{PhaseTimes, Scenario};
use crate::plan::{Part, Plan, ServerUrl, UndealtPlan, VantagePlan};
use crate::report::{TargetInfo, TargetKind};
use crate::run::Interrupts;
use crate::run::rooms::Rooms;
use crate::server_metrics::{Account, NamedStretch, PageWatch};
use crate::signal::{ApiKey, Endpoint, Secret};
use crate::units::{Epoch, Time};

/// Interval at which the run is checked for news and for work to do.
const LOOK: Duration = Duration::from_millis(250);

/// A run that is over.
pub struct Finished {
    pub state: RunState,
    pub exhibit: Exhibit,
    /// End of the run, in microseconds since 1970.
    pub at_us: u64,
    /// Notes for the reader that the state does not contain.
    pub notes: Vec<String>,
    /// Seconds of the run, as far as this process saw them.
    pub series: Vec<SecondRow>,
    /// Figures from the server's own pages, if they were read.
    pub server: Option<Account>,
    journal: Option<Journal>,
    /// Whether the journal was made without being asked for by name.
    journal_is_ours: bool,
}

impl Finished {
    /// Call this after the result has been shown. It removes the journal if every prober reported
    /// and the journal was not asked for by name.
    pub fn told(self) {
        let begun = self.state.all_reported();
        if let Some(journal) = self.journal.filter(|_| self.journal_is_ours && begun) {
            // A file that stays behind is litter, and does no harm.
            let _ = journal.remove();
        }
    }
}

/// The run as hosts of one kind would play it: each takes any role and has weight 1.
pub struct Rehearsal {
    pub placed: PlacedHosts,
    /// Plan of the first host.
    pub first: Plan,
}

/// Works out what a run comes to, without leading it.
///
/// # Errors
/// This number of hosts cannot play the run.
pub fn rehearse(asked: &Coordinate) -> Result<Rehearsal, UndealtPlan> {
    let placed = setup(asked)
        .load
        .place(vec![VantagePlan::default(); asked.expect as usize])?;
    let mut first = asked.run.plan.clone();
    let run_tag = first.run_tag;
    let times = PhaseTimes {
        spread: None,
        ..placed.scenario.times()
    };
    first.follow(placed.scenario.clone().single(times), run_tag);
    first.part = Some(Part::new(placed.placement.clone(), 0, &first.scenario)?);
    Ok(Rehearsal { placed, first })
}

/// Leads the run to its end. `tell` gets messages for people as things happen. `must_tell` gets the
/// messages that people need to be able to take part.
///
/// # Errors
/// Whatever kept the run from beginning. Once it has begun, there is always a state.
pub fn lead(
    asked: &Coordinate,
    must_tell: &mut dyn FnMut(&str),
    tell: &mut dyn FnMut(&str),
) -> Result<Finished> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let interrupts = Interrupts::listen();
        let epoch = Epoch::read();
        let door = Door::open(asked)?;
        let opened = open(asked, epoch.unix_micros(epoch.now()))?;
        if *opened.state.phase() != RunPhase::Over {
            return lead_opened(asked, opened, door, interrupts, epoch, must_tell, tell).await;
        }
        if !opened.state.has_begun() {
            return Err(never_begun(&opened.state));
        }
        tell(&format!(
            "The run in {} is over: this is its result.",
            opened.journal.path().display()
        ));
        Ok(opened.finished(asked, epoch))
    })
}

/// Listener that probers connect to.
struct Door {
    tls: Option<TlsAcceptor>,
    listener: std::net::TcpListener,
    address: SocketAddr,
}

impl Door {
    fn open(asked: &Coordinate) -> Result<Door> {
        let tls = asked
            .tls
            .as_ref()
            .map(|(certificate, key)| server::tls(certificate, key))
            .transpose();
        let tls = tls?;
        let listener = server::listen(asked.bind)?;
        let address = listener.local_addr()?;
        info!(%address, tls = tls.is_some(), "the coordinator listens");
        Ok(Door {
            tls,
            address,
            listener,
        })
    }
}

/// Leads a run that is not over yet.
async fn lead_opened(
    asked: &Coordinate,
    mut opened: Opened,
    door: Door,
    mut interrupts: Interrupts,
    epoch: Epoch,
    must_tell: &mut dyn FnMut(&str),
    tell: &mut dyn FnMut(&str),
) -> Result<Finished> {
    let pages = match server_pages(asked, opened.resumed).await {
        Ok((pages, notes)) => {
            opened.notes.extend(notes);
            pages
        }
        Err(why) => {
            // The journal was just made, and is empty.
            let _ = opened.journal.remove();
            return Err(why);
        }
    };
    must_tell(&Invitation::new(&opened, &door).text(&opened, asked.journal.is_none()));
    warnings(asked, &opened.journal)
        .iter()
        .for_each(|warning| must_tell(warning));
    let notes = std::mem::take(&mut opened.notes);
    let led = LedRun::start(asked, opened, door, epoch)?;
    let mut watcher = Watcher::new(asked, led.desk.clone(), notes, epoch, pages);
    watcher.watch(&mut interrupts, tell).await;
    watcher.delete_rooms().await;
    let server = watcher.account_of_server().await;
    let (notes, series) = watcher.leave();
    let (state, journal, head) = led.close().await?;
    if !state.has_begun() {
        if asked.journal.is_none() {
            // The journal contains nothing that anybody would miss.
            let _ = journal.remove();
        }
        return Err(never_begun(&state));
    }
    Ok(Finished {
        exhibit: exhibit(asked, &head),
        at_us: epoch.unix_micros(epoch.now()),
        state,
        notes,
        series,
        server,
        journal: Some(journal),
        journal_is_ours: asked.journal.is_none(),
    })
}

/// A run whose state has its thread, and whose port is served.
struct LedRun {
    head: Head,
    desk: DeskHandle,
    thread: DeskThread,
    stop: watch::Sender<bool>,
    serving: tokio::task::JoinHandle<()>,
}

impl LedRun {
    fn start(asked: &Coordinate, opened: Opened, door: Door, epoch: Epoch) -> Result<LedRun> {
        let mint = api_key(asked).map(|api_key| Mint::new(api_key, asked.run.plan.clone()));
        let head = opened.head.clone();
        let (desk, thread) = Desk::start(opened.state, opened.journal, opened.head, epoch)
            .context("no thread for the coordinator")?;
        let (stop, stopped) = watch::channel(false);
        let site = Site::new(desk.clone(), opened.access, mint, exhibit(asked, &head));
        let serving = tokio::spawn(server::serve(
            TcpListener::from_std(door.listener)?,
            door.tls,
            site,
            stopped,
        ));
        Ok(LedRun {
            head,
            desk,
            thread,
            stop,
            serving,
        })
    }

    /// Ends the run's thread and port, and returns what is left of the run.
    async fn close(self) -> Result<(RunState, Journal, Head)> {
        drop(self.desk);
        // The last answers are sent before the port is closed.
        let _ = self.stop.send(true);
        let _ = self.serving.await;
        let (state, journal) = self
            .thread
            .join()
            .map_err(|_| anyhow!("the coordinator's thread has panicked"))?;
        Ok((state, journal, self.head))
    }
}

/// Returns the error that says why nothing was measured, and what to do.
fn never_begun(state: &RunState) -> anyhow::Error {
    let why = state.stop_reason().unwrap_or("ended before it began");
    let came: Vec<&str> = state
        .probers()
        .iter()
        .map(|prober| prober.vantage.as_str())
        .collect();
    let came = if came.is_empty() {
        "nobody was in".to_owned()
    } else {
        format!("in were {}", came.join(", "))
    };
    anyhow!(
        "the run did not begin: {why}; {came}.\nLook whether the hosts reach this one (curl URL/health), what their probers say, and whether --expect is their number; \
         --wait-for-probers sets how long the next one is waited for"
    )
}

/// A run to begin, or to resume.
struct Opened {
    journal: Journal,
    head: Head,
    state: RunState,
    access: CoordinatorAccess,
    /// Token that was just made, or given.
    token: Option<ShownToken>,
    resumed: bool,
    notes: Vec<String>,
}

/// How the token appears in the line to paste.
#[derive(Clone)]
enum ShownToken {
    /// The token was made here. Nobody else has it.
    Made(Secret),
    /// The user has given it.
    Given,
}

impl Opened {
    /// Returns the result of a run that was already over.
    fn finished(self, asked: &Coordinate, epoch: Epoch) -> Finished {
        Finished {
            exhibit: exhibit(asked, &self.head),
            at_us: epoch.unix_micros(epoch.now()),
            state: self.state,
            notes: self.notes,
            series: Vec::new(),
            server: None,
            journal: Some(self.journal),
            journal_is_ours: false,
        }
    }
}

fn open(asked: &Coordinate, now_us: u64) -> Result<Opened> {
    let life = access::random_number();
    let path = asked
        .journal
        .clone()
        .unwrap_or_else(|| PathBuf::from(format!("throng-{:08x}.journal", asked.run.plan.run_tag)));
    if path.exists() {
        return reopen(asked, &path, life, now_us);
    }
    let (token, seal) = match (&asked.token, asked.no_auth) {
        (_, true) => (None, None),
        (Some(given), false) => (Some(ShownToken::Given), Some(access::seal(given))),
        (None, false) => {
            let made = access::fresh_token();
            let seal = access::seal(&made);
            (Some(ShownToken::Made(made)), Some(seal))
        }
    };
    let head = Head::new(setup(asked), seal, now_us);
    let journal = Journal::create(&path, &head)?;
    Ok(Opened {
        access: access_of(head.seal.as_ref(), asked)?,
        state: RunState::new(head.setup.clone(), life, now_us),
        journal,
        head,
        token,
        resumed: false,
        notes: Vec::new(),
    })
}

fn reopen(asked: &Coordinate, path: &Path, life: u64, now_us: u64) -> Result<Opened> {
    let state = std::cell::RefCell::new(None::<RunState>);
    let mut entries = 0_u64;
    let replay = Journal::open(
        path,
        |head| *state.borrow_mut() = Some(RunState::new(head.setup.clone(), life, now_us)),
        |entry| {
            entries += 1;
            if let Some(state) = state.borrow_mut().as_mut() {
                state.apply(entry);
            }
        },
    )?;
    let mut state = state.into_inner().context("the journal has no beginning")?;
    let head = replay.head;
    let shown = path.display();
    let mut same = RunSetup {
        run_tag: head.setup.run_tag,
        ..setup(asked)
    };
    same.load.scenario.seed = head.setup.load.scenario.seed;
    if same != head.setup {
        return Err(anyhow!(
            "the journal {shown} is of a run with other flags, or another LIVEKIT_URL or API key: give the same ones, or another --journal"
        ));
    }
    let access = access_of(head.seal.as_ref(), asked)?;
    must_be_asked_for(&access, asked, path)?;
    state.resume(now_us);
    info!(
        journal = %shown,
        entries,
        dropped_bytes = replay.dropped_bytes,
        phase = state.phase().name(),
        probers = state.probers().len(),
        "replayed the journal"
    );
    let torn = (replay.dropped_bytes > 0).then(|| {
        format!(
            "the journal ended in {} bytes that were cut short: nobody had been told that they were taken",
            replay.dropped_bytes
        )
    });
    Ok(Opened {
        journal: replay.journal,
        head,
        state,
        token: (!access.is_open()).then_some(ShownToken::Given),
        access,
        resumed: true,
        notes: torn.into_iter().collect(),
    })
}

/// Checks that flags and journal agree on who is admitted. The journal decides; flags that differ
/// are refused.
fn must_be_asked_for(access: &CoordinatorAccess, asked: &Coordinate, path: &Path) -> Result<()> {
    let shown = path.display();
    match (&asked.token, access.is_open()) {
        (_, true) if !asked.no_auth => Err(anyhow!(
            "the journal {shown} is of a run that lets everybody in: add --no-auth, or give another --journal"
        )),
        (_, false) if asked.no_auth => Err(anyhow!(
            "the journal {shown} is of a run with a token: leave out --no-auth, or give another --journal"
        )),
        (Some(given), false) if !access.knows(given) => Err(anyhow!(
            "the journal {shown} is of a run with another token: give that one or none, or another --journal"
        )),
        _ => Ok(()),
    }
}

fn access_of(seal: Option<&Seal>, asked: &Coordinate) -> Result<CoordinatorAccess> {
    match seal {
        None => Ok(CoordinatorAccess::open(asked.names.clone())),
        Some(seal) => CoordinatorAccess::sealed(seal)
            .context("the journal's token cannot be read: give another --journal"),
    }
}

fn setup(asked: &Coordinate) -> RunSetup {
    let plan = &asked.run.plan;
    let has_key = asked.run.credentials.is_some();
    RunSetup {
        run_tag: plan.run_tag,
        expect: asked.expect,
        on_missing: asked.on_missing,
        load: HostsLoad {
            scenario: plan.scenario.clone(),
            rooms_apart: asked.rooms_per_vantage,
            total: asked.total,
        },
        judging: WireJudging::of(&asked.run.judging),
        url: plan.target.known_url().map(ServerUrl::websocket),
        tokens: has_key,
        rooms_made: has_key,
        silence_us: asked.missing_after.as_micros() as u64,
        gather_us: asked.wait_for_probers.as_micros() as u64,
    }
}

fn exhibit(asked: &Coordinate, head: &Head) -> Exhibit {
    let mut plan = asked.run.plan.clone();
    plan.run_tag = head.setup.run_tag;
    plan.scenario = head.setup.load.scenario.clone();
    Exhibit {
        plan,
        judging: asked.run.judging.clone(),
        target: TargetInfo {
            kind: TargetKind::LiveKit,
            server_version: None,
            addresses: Vec::new(),
        },
        started: Duration::from_micros(head.created_us),
    }
}

/// Starts to read the server's own pages, and returns warnings about them. If a resumed run cannot
/// read them, it goes on without them.
async fn server_pages(
    asked: &Coordinate,
    resumed: bool,
) -> Result<(Option<PageWatch>, Vec<String>)> {
    if asked.run.server_metrics.is_empty() {
        return Ok((None, Vec::new()));
    }
    match PageWatch::start(&asked.run.server_metrics).await {
        Ok(mut pages) => {
            pages.go_on(Instant::now() + LOOK);
            let warnings = pages.warnings();
            Ok((Some(pages), warnings))
        }
        Err(refusal) if resumed => Ok((None, vec![format!("{refusal}; the run goes on without")])),
        Err(refusal) => Err(refusal.into()),
    }
}

fn api_key(asked: &Coordinate) -> Option<ApiKey> {
    let credentials = asked.run.credentials.as_ref()?;
    Some(ApiKey::new(&credentials.api_key, &credentials.api_secret))
}

/// How other hosts find the coordinator.
struct Invitation {
    url: String,
    token: Option<ShownToken>,
    is_open: bool,
}

impl Invitation {
    fn new(opened: &Opened, door: &Door) -> Invitation {
        Invitation {
            url: url(door.address, door.tls.is_some()),
            token: opened.token.clone(),
            is_open: opened.access.is_open(),
        }
    }

    fn text(&self, opened: &Opened, journal_is_ours: bool) -> String {
        let url = &self.url;
        let (in_env, as_flag) = match &self.token {
            Some(ShownToken::Made(token)) => (
                format!(" \\\n  {TOKEN_VARIABLE}={}", token.expose()),
                format!(" \\\n  --coordinator-token {}", token.expose()),
            ),
            Some(ShownToken::Given) => (
                format!(" \\\n  {TOKEN_VARIABLE}=(the token that you have)"),
                " \\\n  --coordinator-token (the token that you have)".to_owned(),
            ),
            None => (String::new(), String::new()),
        };
        let expect = opened.head.setup.expect;
        let hosts = if expect == 1 {
            "1 host".to_owned()
        } else {
            format!("{expect} hosts")
        };
        let head = if opened.resumed {
            format!("Coordinator at {url}: goes on with a run of {hosts}.")
        } else {
            format!("Coordinator at {url}: waits for {hosts}.")
        };
        let journal = opened.journal.path().display();
        let again = if journal_is_ours {
            "after a crash, the same again with"
        } else {
            "after a crash, the same again; it is in"
        };
        format!(
            "{head} On each of them:\n\n  {URL_VARIABLE}={url}{in_env} throng\n\nor\n\n  throng --report-to {url}{as_flag} \\\n  --vantage NAME\n\nJournal: {again}\n  --journal {journal}{}",
            if self.is_open {
                "\nEverybody is let in (--no-auth)."
            } else {
                ""
            }
        )
    }
}

fn warnings(asked: &Coordinate, journal: &Journal) -> Vec<String> {
    let is_local = asked.bind.ip().is_loopback();
    let mut warnings = Vec::new();
    if asked.no_auth && !is_local {
        warnings.push(format!(
            "warning: whoever reaches {} may take part, see the result and end the run:\n  leave out --no-auth, or add --coordinator-bind 127.0.0.1",
            asked.bind
        ));
    } else if asked.tls.is_none() && !is_local {
        warnings.push(
            "note: without --tls-cert and --tls-key the token can be read on the way".to_owned(),
        );
    }
    if journal::is_open_to_others(journal.path()) {
        warnings.push(format!(
            "warning: others may read {}: chmod 600 it",
            journal.path().display()
        ));
    }
    if asked.run.credentials.is_none() {
        warnings.push(
            "note: no API key here, so probers need their own, and rooms are made by the\n  server when the first participant joins, and go when they are empty".to_owned(),
        );
    }
    warnings
}

/// Returns the URL by which other hosts reach this one: the address on which it listens, or, if it
/// listens on all addresses, the one that it uses towards others.
fn url(address: SocketAddr, tls: bool) -> String {
    let ip = match address.ip() {
        ip if !ip.is_unspecified() => ip,
        any => outward_address(any).unwrap_or(match any {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        }),
    };
    format!(
        "{}://{}",
        if tls { "https" } else { "http" },
        SocketAddr::new(ip, address.port())
    )
}

/// Returns the address that this host uses towards others. Connecting a UDP socket sends nothing,
/// and the addresses are reserved for documentation (RFC 5737, RFC 3849).
fn outward_address(any: IpAddr) -> Option<IpAddr> {
    let far: SocketAddr = match any {
        IpAddr::V4(_) => (Ipv4Addr::new(192, 0, 2, 1), 9).into(),
        IpAddr::V6(_) => (Ipv6Addr::new(0x2001, 0xDB8, 0, 0, 0, 0, 0, 1), 9).into(),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(far).ok()?;
    socket.local_addr().ok().map(|address| address.ip())
}

/// Follows a run, and does the work outside of the state machine.
struct Watcher<'a> {
    asked: &'a Coordinate,
    desk: DeskHandle,
    api_key: Option<ApiKey>,
    rooms: Option<Rooms>,
    story: Story,
    notes: Vec<String>,
    epoch: Epoch,
    seconds: Seconds,
    series: Series,
    /// The server's own pages, if they were asked for.
    pages: Option<PageWatch>,
}

impl<'a> Watcher<'a> {
    fn new(
        asked: &'a Coordinate,
        desk: DeskHandle,
        notes: Vec<String>,
        epoch: Epoch,
        pages: Option<PageWatch>,
    ) -> Watcher<'a> {
        Watcher {
            asked,
            desk,
            api_key: api_key(asked),
            rooms: None,
            story: Story::default(),
            notes,
            epoch,
            seconds: Seconds::default(),
            series: Series::default(),
            pages,
        }
    }

    /// Follows the run until it is over.
    async fn watch(&mut self, interrupts: &mut Interrupts, tell: &mut dyn FnMut(&str)) {
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut desk = self.desk.clone();
        loop {
            tokio::select! {
                () = desk.over() => break,
                signal = interrupts.next() => self.cancel(&format!("{signal} at the coordinator")).await,
                _ = look.tick() => {}
            }
            self.tell(tell).await;
            self.note_second().await;
            self.make_rooms(interrupts).await;
        }
        self.tell(tell).await;
        if let Ok(Some(standstill)) = self.desk.call(|desk| desk.standstill()).await {
            self.notes.push(standstill.to_string());
        }
    }

    async fn tell(&mut self, tell: &mut dyn FnMut(&str)) {
        let mut story = std::mem::take(&mut self.story);
        let told = self.desk.call(move |desk| {
            let lines = story.lines(
                &desk.state,
                desk.problem(),
                desk.standstill(),
                desk.now_us(),
            );
            (story, lines)
        });
        // A desk that is gone has no more news.
        let Ok((story, lines)) = told.await else {
            return;
        };
        self.story = story;
        lines.iter().for_each(|line| tell(line));
    }

    async fn note_second(&mut self) {
        let mut seconds = std::mem::take(&mut self.seconds);
        let looked = self.desk.call(move |desk| {
            let row = seconds.look(&desk.state, desk.now_us());
            (seconds, row)
        });
        let Ok((seconds, row)) = looked.await else {
            return;
        };
        self.seconds = seconds;
        if let Some(row) = row {
            let server = self.pages.as_mut().map(PageWatch::rows);
            self.series.offer(SecondRow { server, ..row });
        }
    }

    /// Returns the server's account when everybody has left. Waits for a server whose counters lag.
    async fn account_of_server(&mut self) -> Option<Account> {
        let pages = self.pages.take()?;
        let seconds = std::mem::take(&mut self.seconds);
        let held = self
            .desk
            .call(move |desk| (seconds::began_us(&desk.state), seconds.held(&desk.state)))
            .await;
        let (began_us, held) = held.unwrap_or_default();
        // A time before this process started, or an unknown one, was not read. A stretch without
        // length has no figures.
        let start = self.epoch.instant(Time::ZERO);
        let instant = |us: u64| {
            self.epoch
                .time_of_unix_micros(us)
                .map(|time| self.epoch.instant(time))
        };
        let stretches: Vec<NamedStretch> = held
            .into_iter()
            .map(|held| {
                let between = held
                    .between_us
                    .and_then(|(from_us, to_us)| instant(from_us).zip(instant(to_us)));
                let (from, to) = between.unwrap_or((start, start));
                NamedStretch {
                    name: held.name,
                    from,
                    to,
                }
            })
            .collect();
        let account = pages
            .finish(began_us.and_then(instant).unwrap_or(start), &stretches)
            .await;
        self.notes.extend(account.notes());
        Some(account)
    }

    /// Cancels the run. If this cannot be journaled, the run goes on, and the user's second signal
    /// ends the process.
    async fn cancel(&mut self, why: &str) {
        let why = why.to_owned();
        let cancelled = self.desk.call(move |desk| desk.cancel(&why)).await;
        if let Ok(Err(DeskFailure::NotJournaled(problem))) = cancelled {
            self.notes.push(problem);
        }
    }

    /// Makes the rooms when everybody is in and there is an API key.
    async fn make_rooms(&mut self, interrupts: &mut Interrupts) {
        let Some(api_key) = self.api_key.clone() else {
            return;
        };
        let wanted = self.desk.call(|desk| {
            desk.state
                .placed()
                .filter(|_| desk.state.wants_rooms())
                .map(|placed| placed.scenario.clone())
        });
        let Ok(Some(scenario)) = wanted.await else {
            return;
        };
        let made = async {
            let plan = self.plan(scenario).await?;
            let endpoint = self.endpoint(&plan).resolve().await?;
            Rooms::create(&plan, &endpoint, &api_key, interrupts).await
        };
        match made.await {
            Ok(rooms) => {
                self.notes.extend(rooms.notes().iter().cloned());
                let names = rooms.made();
                self.rooms = Some(rooms);
                let _ = self
                    .desk
                    .call(move |desk| {
                        let at_us = desk.now_us();
                        desk.remember(JournalEntry::Prepared {
                            at_us,
                            rooms: names,
                        })
                    })
                    .await;
            }
            Err(error) => {
                self.cancel(&format!("the rooms cannot be made: {error:#}"))
                    .await
            }
        }
    }

    fn endpoint(&self, plan: &Plan) -> Endpoint {
        Endpoint::from(plan.target.url.clone()).through(&self.asked.run.gateway)
    }

    /// Returns the plan of all hosts.
    async fn plan(&self, scenario: Scenario) -> Result<Plan> {
        let mut plan = self.asked.run.plan.clone();
        let run_tag = self.desk.call(|desk| desk.state.setup().run_tag).await;
        plan.follow(
            scenario,
            run_tag.map_err(|_| anyhow!("the coordinator is going"))?,
        );
        Ok(plan)
    }

    /// Deletes the rooms that this run made, in this process or in an earlier one.
    async fn delete_rooms(&mut self) {
        let Some(api_key) = self.api_key.clone() else {
            return;
        };
        let of_state = self.desk.call(|desk| {
            (
                desk.state.placed().map(|placed| placed.scenario.clone()),
                desk.state.rooms().to_vec(),
            )
        });
        let Ok((Some(scenario), made)) = of_state.await else {
            return;
        };
        let Ok(plan) = self.plan(scenario).await else {
            return;
        };
        let rooms = match self.rooms.take() {
            Some(rooms) => rooms,
            None if made.is_empty() => return,
            None => Rooms::left_by(self.endpoint(&plan), api_key, made),
        };
        self.notes.extend(rooms.delete(&plan).await);
    }

    fn leave(self) -> (Vec<String>, Vec<SecondRow>) {
        (self.notes, self.series.into_rows())
    }
}
