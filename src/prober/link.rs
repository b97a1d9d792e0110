//! Connection to the coordinator: registration, beats in a task of their own, room tokens, and the
//! last report.
//!
//! It runs on a thread of its own, so that neither the run nor media generation delays a beat, and
//! no beat delays them. A [`BeatOutbox`] holds what the run has to tell, an [`Inbox`] what it has
//! to know. Orders come by a channel.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, watch};
use tracing::{debug, info, warn};

use super::client::{CoordinatorClient, NoAnswer};
use super::outbox::BeatOutbox;
use super::pulse::Pulse;
use crate::coordinator::clock::{ClockEstimate, Offset};
use crate::coordinator::protocol::{
    BeatReply, Departed, Exchange, FRAME_COUNTS_MAX, FrameCountEntry, JobReply, MalformedMessage,
    Order, ProberReport, ProverId, Register, Registered, Reported, TOKENS_MAX, TokensReply,
    TokensRequest, VERSION, VantageClock, other_version,
};
use crate::engine;
use crate::media::identity::Origin;
use crate::run::Interrupts;
use crate::signal::{NotIssued, Secret, TokenRequest};
use crate::units::{Epoch, Time};

/// Interval between two requests for the job, and the shortest pause before asking a coordinator
/// again that did not answer.
const POLL: Duration = Duration::from_secs(1);
const POLL_MAX: Duration = Duration::from_secs(10);
/// How long the same trouble is not told again.
const TELL_AGAIN: Duration = Duration::from_secs(30);
/// How long a prober waits for a silent coordinator before the run has begun. `voicegw`'s probers
/// wait as long.
const GATHER_PATIENCE: Duration = Duration::from_secs(300);
/// How long delivery of the last report is tried, where the coordinator does not answer and has not
/// said how long.
pub(super) const REPORT_PATIENCE: Duration = Duration::from_secs(60);
/// Largest number of tokens in one request. A token is used during the first half of its lifetime,
/// which leaves the other half for the join.
const TOKEN_BATCH: u32 = 200;
const TOKEN_TRIES: u32 = 4;
/// Longest wait when telling the coordinator that we leave.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(2);

/// Order of the coordinator to a prober.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Word {
    /// Continue with the current stage, and wait.
    #[default]
    Wait,
    /// Begin this stage at this time, in microseconds since 1970 by this host's clock.
    Start { stage: u32, at_us: u64 },
    /// End the load. The run was cancelled, the coordinator goes on without this prober, or it has
    /// been silent for too long.
    Stop { reason: String },
}

/// State of other hosts that the run has to know.
#[derive(Default)]
pub(super) struct Inbox {
    /// Frame counts of other hosts' publishers, by origin, track and layer: frames sent, and frames
    /// owed and never sent.
    pub frames: BTreeMap<(u32, u8, u8), (u32, u32)>,
    /// Offset to add to another vantage's time to get ours, and its uncertainty, both in
    /// microseconds.
    pub clocks: BTreeMap<u32, (i64, u64)>,
    /// Vantages that are missing; the run goes on without them.
    pub missing: Vec<u32>,
    /// Offset of this host's clock from the coordinator's.
    pub own_clock: Option<Offset>,
}

/// State that the run and the beats share.
pub(super) struct LinkShared {
    outbox: Mutex<BeatOutbox>,
    inbox: Mutex<Inbox>,
    news: Notify,
    word: watch::Sender<Word>,
}

impl LinkShared {
    pub fn new() -> Arc<LinkShared> {
        Arc::new(LinkShared {
            outbox: Mutex::default(),
            inbox: Mutex::default(),
            news: Notify::new(),
            word: watch::Sender::default(),
        })
    }

    /// Locks the outbox. The lock is held for moments only: no holder waits or works long.
    pub fn outbox(&self) -> MutexGuard<'_, BeatOutbox> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the next beat due at once.
    pub fn hurry(&self) {
        self.news.notify_one();
    }

    pub fn words(&self) -> watch::Receiver<Word> {
        self.word.subscribe()
    }

    pub fn say(&self, word: Word) {
        // A repeated order wakes nobody; after a stop no further order counts.
        self.word.send_if_modified(|said| {
            let is_news = *said != word && !matches!(said, Word::Stop { .. });
            if is_news {
                info!(?word, "has a new order");
                *said = word;
            }
            is_news
        });
    }
}

/// A prober that is registered and has its job.
#[derive(Debug)]
pub(super) struct Enlisted {
    pub id: ProverId,
    pub job: JobReply,
}

/// Why this host takes no part in the run.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotEnlisted {
    #[error(transparent)]
    NoReply(#[from] NoReply),
    #[error(transparent)]
    OtherVersion(#[from] MalformedMessage),
    /// The signal that interrupted the wait.
    #[error("{0} while the run was waited for")]
    Interrupted(&'static str),
}

/// Registers, and waits until there is a job. `told` is called with each line about what it waits
/// for. If interrupted, it gives up its place to other probers.
///
/// # Errors
/// Returns what to do, as text for people.
pub(super) async fn enlist(
    client: &CoordinatorClient,
    register: &Register,
    interrupts: &mut Interrupts,
    told: impl FnMut(String),
) -> Result<Enlisted, NotEnlisted> {
    let mut place = None;
    let signal = tokio::select! {
        enlisted = wait_for_job(client, register, &mut place, told) => return enlisted,
        signal = interrupts.next() => signal,
    };
    if let Some(id) = place {
        // If the coordinator does not answer, it frees the place itself after some silence.
        let _ = tokio::time::timeout(
            LEAVE_TIMEOUT,
            client.post::<Departed>(&format!("/leave/{id}"), &()),
        )
        .await;
    }
    Err(NotEnlisted::Interrupted(signal))
}

/// `place` is set to the id that the coordinator gave us, as soon as there is one.
async fn wait_for_job(
    client: &CoordinatorClient,
    register: &Register,
    place: &mut Option<ProverId>,
    mut told: impl FnMut(String),
) -> Result<Enlisted, NotEnlisted> {
    'register: loop {
        let registered: Registered = insist(GATHER_PATIENCE, &mut told, || {
            client.post("/register", register)
        })
        .await?;
        if let Some(version) = registered.protocol.filter(|version| *version != VERSION) {
            return Err(other_version("coordinator", version, "prober").into());
        }
        *place = Some(registered.prover_id.clone());
        info!(expected = registered.expected, "registered");
        told(format!(
            "in; the run begins when {} are",
            probers(registered.expected)
        ));
        loop {
            let path = format!("/job/{}", registered.prover_id);
            match insist(GATHER_PATIENCE, &mut told, || client.get::<JobReply>(&path)).await {
                Ok(job) if job.ready && (registered.protocol.is_none() || job.throng.is_some()) => {
                    info!(
                        room = job.room,
                        stages = job.throng.as_ref().map(|job| job.stages.len()),
                        "has its job"
                    );
                    return Ok(Enlisted {
                        id: registered.prover_id,
                        job,
                    });
                }
                Ok(_) => tokio::time::sleep(POLL).await,
                // The coordinator gives a silent prober's place to another one. Until all probers
                // are in, there may be a free place again.
                Err(NoReply::Unknown(why)) => {
                    warn!(why, "has lost its place, and registers again");
                    tokio::time::sleep(POLL).await;
                    continue 'register;
                }
                Err(gone) => return Err(gone.into()),
            }
        }
    }
}

fn probers(count: u32) -> String {
    if count == 1 {
        "1 prober is".to_owned()
    } else {
        format!("all {count} probers")
    }
}

/// Why there will be no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoReply {
    #[error("{0}")]
    Unknown(String),
    #[error("{0}")]
    Refused(String),
    #[error("{why}; given up after {} s", patience.as_secs())]
    GivenUp { why: String, patience: Duration },
}

/// Repeats a request until it is answered, with growing pauses, for at most `patience`.
async fn insist<A, F: Future<Output = Result<A, NoAnswer>>>(
    patience: Duration,
    told: &mut impl FnMut(String),
    ask: impl Fn() -> F,
) -> Result<A, NoReply> {
    let since = tokio::time::Instant::now();
    let mut pause = POLL;
    let mut last_told = None::<(String, tokio::time::Instant)>;
    loop {
        match ask().await {
            Ok(answer) => return Ok(answer),
            Err(NoAnswer::Unknown(why)) => return Err(NoReply::Unknown(why)),
            Err(NoAnswer::Refused(why)) => return Err(NoReply::Refused(why)),
            Err(NoAnswer::Away(why)) if since.elapsed() + pause > patience => {
                return Err(NoReply::GivenUp { why, patience });
            }
            Err(NoAnswer::Away(why)) => {
                warn!(why, ?pause, "has no answer, and asks again");
                let is_known = |(last, at): &(String, tokio::time::Instant)| {
                    *last == why && at.elapsed() < TELL_AGAIN
                };
                if !last_told.as_ref().is_some_and(is_known) {
                    told(format!(
                        "{why}; trying again for {} s",
                        patience.saturating_sub(since.elapsed()).as_secs()
                    ));
                    last_told = Some((why, tokio::time::Instant::now()));
                }
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(POLL_MAX);
    }
}

/// Everything that a prober needs to send beats.
pub(super) struct Beats {
    pub client: CoordinatorClient,
    pub id: ProverId,
    pub shared: Arc<LinkShared>,
    /// Clock that is compared with the coordinator's.
    pub epoch: Epoch,
    /// How long the load may go on without an answer.
    pub patience: Duration,
}

impl Beats {
    /// Sends beats for as long as the coordinator wants them.
    pub async fn run(self) {
        let mut pulse = Pulse::new(self.epoch.now(), self.patience);
        let (mut clock, mut exchange) = (ClockEstimate::default(), None);
        loop {
            let at = tokio::time::Instant::from_std(self.epoch.instant(pulse.next_at()));
            tokio::select! {
                () = self.shared.news.notified() => pulse.hurry(self.epoch.now()),
                () = tokio::time::sleep_until(at) => {
                    if !self.beat(&mut pulse, &mut clock, &mut exchange).await {
                        return;
                    }
                    let silence = pulse.silence(self.epoch.now());
                    if silence >= self.patience {
                        self.shared.say(Word::Stop { reason: format!("the coordinator has not answered for {} s", silence.as_secs()) });
                    }
                }
            }
        }
    }

    /// Sends one beat, and handles its answer. Returns false where the coordinator wants no more.
    async fn beat(
        &self,
        pulse: &mut Pulse,
        clock: &mut ClockEstimate,
        exchange: &mut Option<Exchange>,
    ) -> bool {
        let draft = self.shared.outbox().draft();
        let mut beat = draft.beat(0, *exchange);
        // Stamp as late as possible, because any delay after the stamp counts as network delay.
        let sent_at = self.epoch.now();
        beat.sent_at_us = self.epoch.unix_micros(sent_at);
        let answer = self
            .client
            .post::<BeatReply>(&format!("/beat/{}", self.id), &beat)
            .await;
        let now = self.epoch.now();
        match answer {
            Ok(reply)
                if reply.seq == draft.seq() && reply.replied_at_us >= reply.received_at_us =>
            {
                let waits = {
                    let mut outbox = self.shared.outbox();
                    outbox.settle(&draft);
                    outbox.waits()
                };
                if pulse.is_unanswered() {
                    let silence = pulse.silence(now);
                    info!(?silence, "the coordinator answers again");
                }
                pulse.handle_answer(sent_at, now, waits);
                *exchange = Some(self.exchange(sent_at, now, &reply));
                let is_first = clock.offset().is_none();
                exchange.iter().for_each(|exchange| clock.handle(exchange));
                if is_first && let Some(offset) = clock.offset() {
                    let (offset_us, uncertainty_us) = (offset.offset_us, offset.uncertainty_us);
                    info!(offset_us, uncertainty_us, "knows the coordinator's clock");
                }
                self.take(reply, clock.offset());
                true
            }
            Ok(_) => {
                debug!("an answer was to another beat");
                pulse.handle_silence(now);
                true
            }
            Err(NoAnswer::Away(why)) => {
                warn!(why, silence = ?pulse.silence(now), "a beat has no answer");
                pulse.handle_silence(now);
                true
            }
            Err(NoAnswer::Unknown(reason) | NoAnswer::Refused(reason)) => {
                self.shared.say(Word::Stop { reason });
                false
            }
        }
    }

    fn exchange(&self, sent_at: Time, heard_at: Time, reply: &BeatReply) -> Exchange {
        Exchange {
            life: reply.life,
            sent_at_us: self.epoch.unix_micros(sent_at),
            received_at_us: reply.received_at_us,
            replied_at_us: reply.replied_at_us,
            heard_at_us: self.epoch.unix_micros(heard_at),
        }
    }

    /// Takes over a reply. The order is passed on last, so that whoever it wakes finds what came
    /// with it.
    fn take(&self, reply: BeatReply, own_clock: Option<Offset>) {
        {
            let mut inbox = self.shared.inbox();
            for FrameCountEntry(origin, track, layer, frames, unsent) in reply.frames {
                inbox.take_frames((origin, track, layer), frames, unsent);
            }
            if let Some(own) = own_clock {
                let clocks = reply
                    .clocks
                    .iter()
                    .map(|clock| (clock.vantage, between(clock, &own)));
                inbox.clocks.extend(clocks);
            }
            (inbox.missing, inbox.own_clock) = (reply.missing, own_clock);
        }
        self.shared.say(match (reply.order, own_clock) {
            (Order::Start { stage, at_us }, Some(own)) => Word::Start {
                stage,
                at_us: at_us.saturating_add_signed(own.offset_us.saturating_neg()),
            },
            (Order::Stop { reason }, _) => Word::Stop { reason },
            (Order::Wait | Order::Start { .. }, _) => Word::Wait,
        });
    }
}

/// Delivers the last report to the coordinator, with as many attempts as fit into `patience`.
///
/// # Errors
/// Returns why the coordinator did not take the report.
pub(super) async fn deliver(
    client: &CoordinatorClient,
    id: &ProverId,
    report: &ProberReport,
    patience: Duration,
    told: &mut impl FnMut(String),
) -> Result<Reported, NoReply> {
    let path = format!("/report/{id}");
    let reported: Reported = insist(patience, told, || client.post(&path, report)).await?;
    let all_reported = reported.all_reported;
    info!(all_reported, "the coordinator has the report");
    Ok(reported)
}

/// Returns the offset to add to a vantage's time to get ours, and its uncertainty: the sum of both.
fn between(theirs: &VantageClock, own: &Offset) -> (i64, u64) {
    (
        theirs.offset_us.saturating_sub(own.offset_us),
        theirs.uncertainty_us.saturating_add(own.uncertainty_us),
    )
}

/// Why the coordinator gave no room token.
#[derive(Debug, thiserror::Error)]
enum NotFetched {
    #[error(transparent)]
    NoAnswer(#[from] NoAnswer),
    #[error("the coordinator gave none for this participant")]
    LeftOut,
}

/// Fetches room tokens from the coordinator in batches, and hands them out.
pub(super) struct Tokens {
    pub client: CoordinatorClient,
    pub id: ProverId,
    pub participants: u32,
    kept: BTreeMap<u32, (Secret, tokio::time::Instant)>,
}

impl Tokens {
    pub fn new(client: CoordinatorClient, id: ProverId, participants: u32) -> Tokens {
        Tokens {
            client,
            id,
            participants,
            kept: BTreeMap::new(),
        }
    }

    pub async fn run(mut self, mut requests: mpsc::UnboundedReceiver<TokenRequest>) {
        while let Some(TokenRequest { position, answer }) = requests.recv().await {
            let token = self.token(position).await;
            // The participant that asked may have left meanwhile.
            let _ = answer.send(token.map_err(|why| NotIssued::Refused(why.into())));
        }
    }

    async fn token(&mut self, position: u32) -> Result<Secret, NotFetched> {
        if let Some(token) = self.take(position) {
            return Ok(token);
        }
        self.fetch(position).await?;
        self.take(position).ok_or(NotFetched::LeftOut)
    }

    /// Takes a kept token. Each is used once, so that a participant that comes back later gets a
    /// fresh one.
    fn take(&mut self, position: u32) -> Option<Secret> {
        let (token, good_until) = self.kept.remove(&position)?;
        (tokio::time::Instant::now() < good_until).then_some(token)
    }

    async fn fetch(&mut self, from: u32) -> Result<(), NoAnswer> {
        let count = self
            .participants
            .saturating_sub(from)
            .min(TOKEN_BATCH)
            .min(TOKENS_MAX);
        let request = TokensRequest { from, count };
        let path = format!("/tokens/{}", self.id);
        let mut pause = POLL / 4;
        let mut tries = 1;
        let reply: TokensReply = loop {
            match self.client.post(&path, &request).await {
                Ok(reply) => break reply,
                Err(NoAnswer::Away(why)) if tries < TOKEN_TRIES => {
                    warn!(why, ?pause, "has no room tokens, and asks again");
                    tokio::time::sleep(pause).await;
                    (pause, tries) = (pause * 2, tries + 1);
                }
                Err(error) => return Err(error),
            }
        };
        debug!(from, count, "has room tokens");
        let good_until =
            tokio::time::Instant::now() + Duration::from_secs(reply.lifetime_seconds) / 2;
        let tokens = reply
            .tokens
            .into_iter()
            .take(count as usize)
            .map(Secret::new);
        self.kept
            .extend((from..).zip(tokens.map(|token| (token, good_until))));
        Ok(())
    }
}

impl Inbox {
    /// Takes a count. Counts that no publisher can reach are ignored, and so are publishers beyond
    /// the number that one message may name.
    fn take_frames(&mut self, layer: (u32, u8, u8), frames: u64, unsent: u64) {
        let (Ok(frames), Ok(unsent)) = (u32::try_from(frames), u32::try_from(unsent)) else {
            return;
        };
        if self.frames.len() < FRAME_COUNTS_MAX || self.frames.contains_key(&layer) {
            let known = self.frames.entry(layer).or_default();
            *known = (frames.max(known.0), unsent.max(known.1));
        }
    }

    /// Passes what is known of other hosts' publishers on to the roster.
    pub fn tell(&self, roster: &engine::Roster) {
        for ((publisher, track, layer), (frames, unsent)) in &self.frames {
            roster.set_frames_elsewhere(engine::FrameCount {
                origin: Origin {
                    publisher: *publisher,
                    track: *track,
                },
                layer: *layer,
                frames: *frames,
                unsent: *unsent,
            });
        }
        for (vantage, (offset_us, _)) in &self.clocks {
            roster.set_clock(*vantage as usize, Some(*offset_us));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::scripted::{Asked, Scripted};
    use super::*;
    use crate::coordinator::access::Denied;
    use crate::engine::FrameCount as Count;

    fn register() -> Register {
        serde_json::from_value(json!({"vantage": "fra", "protocol": VERSION, "instance": "abc"}))
            .unwrap()
    }

    fn registered(protocol: Value) -> (u16, Value) {
        (
            200,
            json!({"prover_id": "p1", "expected": 3, "protocol": protocol}),
        )
    }

    /// A job as `voicegw`'s coordinator gives it.
    fn job(ready: bool) -> (u16, Value) {
        (
            200,
            json!({"room": "r", "ramp": [2], "duration": 20, "target_rtt_ms": 50, "max_loss": 1.0, "start_at": null, "ready": ready}),
        )
    }

    fn refusal(status: u16) -> (u16, Value) {
        (status, json!({"error": "not today"}))
    }

    async fn enlisted(
        script: impl FnMut(&Asked) -> (u16, Value) + Send + 'static,
    ) -> (Result<Enlisted, NotEnlisted>, Scripted, Vec<String>) {
        let (scripted, url) = Scripted::start(script).await;
        let client = CoordinatorClient::new(url.parse().unwrap(), Some(Secret::new("sesame")));
        let mut told = Vec::new();
        let enlisted = enlist(&client, &register(), &mut Interrupts::listen(), |line| {
            told.push(line)
        })
        .await;
        (enlisted, scripted, told)
    }

    #[tokio::test]
    async fn a_prober_registers_with_its_token_and_waits_for_its_job() {
        let (enlisted, scripted, told) =
            enlisted(|asked| match (asked.what.as_str(), asked.before) {
                ("POST /register", 0) => refusal(503),
                ("POST /register", _) => registered(Value::Null),
                ("GET /job/p1", 0) => job(false),
                ("GET /job/p1", 1) => (200, json!("<html>who are you?</html>")),
                _ => job(true),
            })
            .await;
        assert_eq!(enlisted.unwrap().job.ramp, [2]);
        assert!(
            scripted
                .asked()
                .iter()
                .all(|asked| asked.token.as_deref() == Some("Bearer sesame"))
        );
        assert_eq!(scripted.asked()[0].body["vantage"], "fra");
        let [unwell, waits, garbage] = &told[..] else {
            panic!("{told:?}")
        };
        assert!(
            unwell.contains("not today") && unwell.contains("trying again"),
            "{unwell}"
        );
        assert!(waits.contains("all 3 probers"), "{waits}");
        assert!(garbage.contains("cannot be understood"), "{garbage}");
    }

    #[tokio::test]
    async fn who_was_forgotten_while_others_were_waited_for_registers_again() {
        let (enlisted, scripted, _) = enlisted(|asked| match (asked.what.as_str(), asked.before) {
            ("POST /register", _) => registered(Value::Null),
            (_, 0) => refusal(404),
            _ => job(true),
        })
        .await;
        assert!(enlisted.is_ok());
        assert_eq!(scripted.counts()["POST /register"], 2);
    }

    #[tokio::test]
    async fn a_coordinator_that_says_no_is_not_asked_again() {
        for (answer, says) in [
            (refusal(401), "COORDINATOR_TOKEN"),
            (refusal(409), "not today"),
            (refusal(400), "not today"),
            ((404, json!({"detail": "Not Found"})), "check the address"),
            // A LiveKit server's words, and those of a page.
            (
                (401, json!("invalid authorization token")),
                "is a LiveKit server's address, and no coordinator's",
            ),
            (
                (405, json!("<html><title>405 Not Allowed</title></html>")),
                "answers /register with a web page (405: 405 Not Allowed), which a coordinator does not",
            ),
            // What the coordinator says to who sent no token.
            (
                (401, json!({"error": Denied::NoToken.text()})),
                "takes the Authorization header away",
            ),
            (
                registered(json!(VERSION + 1)),
                "run the same throng on all hosts",
            ),
        ] {
            let (enlisted, scripted, _) = enlisted(move |_| answer.clone()).await;
            let why = enlisted.unwrap_err().to_string();
            assert!(why.contains(says) && !why.contains("sesame"), "{why}");
            assert_eq!(scripted.asked().len(), 1);
        }
    }

    fn beats(url: String, patience: Duration) -> Beats {
        Beats {
            client: CoordinatorClient::new(url.parse().unwrap(), None),
            id: ProverId::new("p1").unwrap(),
            shared: LinkShared::new(),
            epoch: Epoch::read(),
            patience,
        }
    }

    /// A reply from a clock that is `ahead_us` ahead of ours.
    fn reply(asked: &Asked, ahead_us: u64, order: Value) -> (u16, Value) {
        let at = asked.body["sent_at_us"].as_u64().unwrap() + ahead_us;
        (
            200,
            json!({
                "seq": asked.body["seq"], "life": 9, "received_at_us": at, "replied_at_us": at, "order": order,
                "frames": [[4, 0, 0, 50], [4, 0, 0, 40], [5, 1, 2, u64::from(u32::MAX) + 1]],
                "clocks": [{"vantage": 2, "offset_us": 1_000_000, "uncertainty_us": 300}],
                "missing": [1],
            }),
        )
    }

    const HOUR_US: u64 = 3_600_000_000;

    #[tokio::test]
    async fn orders_come_by_our_clock_with_what_is_known_of_the_others() {
        let (_, url) = Scripted::start(|asked| {
            let at_us = asked.body["sent_at_us"].as_u64().unwrap() + HOUR_US + 2_000_000;
            reply(
                asked,
                HOUR_US,
                json!({"do": "start", "stage": 3, "at_us": at_us}),
            )
        })
        .await;
        let beats = beats(url, Duration::from_secs(60));
        let (shared, epoch) = (beats.shared.clone(), beats.epoch);
        let mut words = shared.words();
        let task = tokio::spawn(beats.run());
        let word = words
            .wait_for(|word| *word != Word::Wait)
            .await
            .unwrap()
            .clone();
        let now_us = epoch.unix_micros(epoch.now());
        let Word::Start { stage: 3, at_us } = word else {
            panic!("{word:?}")
        };
        // The hour between the clocks is removed; network delay remains.
        assert!(
            at_us.abs_diff(now_us + 2_000_000) < 2_000_000,
            "{at_us} at {now_us}"
        );
        let inbox = shared.inbox();
        assert_eq!(
            inbox.frames,
            BTreeMap::from([((4, 0, 0), (50, 0))]),
            "the highest count, and none that cannot be"
        );
        let own = inbox.own_clock.unwrap();
        assert_eq!(
            inbox.clocks[&2],
            (1_000_000 - own.offset_us, 300 + own.uncertainty_us)
        );
        assert_eq!(inbox.missing, [1]);
        drop(inbox);
        task.abort();
    }

    #[tokio::test]
    async fn what_a_lost_beat_carried_comes_with_the_next_and_numbers_only_grow() {
        let (scripted, url) = Scripted::start(|asked| match asked.before {
            0 => refusal(503),
            1 => (200, json!({"seq": 77})),
            _ => reply(asked, 0, json!({"do": "wait"})),
        })
        .await;
        let beats = beats(url, Duration::from_secs(60));
        let shared = beats.shared.clone();
        shared.outbox().set_frames(
            [Count {
                origin: Origin {
                    publisher: 1,
                    track: 0,
                },
                layer: 0,
                frames: 9,
                unsent: 0,
            }]
            .into_iter(),
        );
        let task = tokio::spawn(beats.run());
        while scripted.asked().len() < 4 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        task.abort();
        let asked = scripted.asked();
        let seqs: Vec<_> = asked
            .iter()
            .map(|asked| asked.body["seq"].as_u64().unwrap())
            .collect();
        assert!(seqs.is_sorted_by(|a, b| a < b), "{seqs:?}");
        let frames: Vec<_> = asked[..4]
            .iter()
            .map(|asked| asked.body["frames"].as_array().unwrap().len())
            .collect();
        assert_eq!(frames, [1, 1, 1, 0]);
        assert_eq!(asked[2].body["exchange"], Value::Null);
        assert_eq!(asked[3].body["exchange"]["life"], 9);
    }

    #[tokio::test]
    async fn a_run_ends_where_the_coordinator_wants_no_more_or_is_silent_for_too_long() {
        for (patience, answer, says) in [
            (60_000, refusal(409), "not today"),
            (60_000, refusal(404), "does not know this prober"),
            (1_500, refusal(500), "has not answered for"),
        ] {
            let (scripted, url) = Scripted::start(move |_| answer.clone()).await;
            let beats = beats(url, Duration::from_millis(patience));
            let (mut words, shared) = (beats.shared.words(), beats.shared.clone());
            let task = tokio::spawn(beats.run());
            let word = words
                .wait_for(|word| *word != Word::Wait)
                .await
                .unwrap()
                .clone();
            assert!(
                matches!(&word, Word::Stop { reason } if reason.contains(says)),
                "{word:?}"
            );
            shared.say(Word::Wait);
            assert_eq!(*words.borrow(), word, "nothing comes after a stop");
            task.abort();
            assert!(!scripted.asked().is_empty());
        }
    }

    #[tokio::test]
    async fn a_report_is_delivered_once_somebody_takes_it() {
        let (scripted, url) = Scripted::start(|asked| match asked.before {
            0 => refusal(503),
            _ => (200, json!({"ok": true, "all_reported": false})),
        })
        .await;
        let (client, id) = (
            CoordinatorClient::new(url.parse().unwrap(), None),
            ProverId::new("p1").unwrap(),
        );
        let report = super::super::report::of_nothing("fra", "no media could be made");
        assert!(
            deliver(&client, &id, &report, REPORT_PATIENCE, &mut |_| {})
                .await
                .unwrap()
                .ok
        );
        let asked = scripted.asked();
        assert_eq!(
            (asked.len(), asked[1].what.as_str()),
            (2, "POST /report/p1")
        );
        assert_eq!(asked[1].body["throng"]["partial"], "no media could be made");
        assert_eq!(asked[1].token, None);
    }

    #[tokio::test]
    async fn tokens_are_fetched_many_at_a_time_used_once_and_not_when_old() {
        let (scripted, url) = Scripted::start(|asked| {
            let (from, count) = (
                asked.body["from"].as_u64().unwrap(),
                asked.body["count"].as_u64().unwrap(),
            );
            let tokens: Vec<_> = (from..from + count)
                .map(|position| format!("t{position}-{}", asked.before))
                .collect();
            let lifetime = if asked.before < 2 { 600 } else { 0 };
            (200, json!({"tokens": tokens, "lifetime_seconds": lifetime}))
        })
        .await;
        let mut tokens = Tokens::new(
            CoordinatorClient::new(url.parse().unwrap(), None),
            ProverId::new("p1").unwrap(),
            250,
        );
        for (position, token) in [
            (0, "t0-0"),
            (199, "t199-0"),
            (200, "t200-1"),
            (249, "t249-1"),
        ] {
            assert_eq!(tokens.token(position).await.unwrap().expose(), token);
        }
        assert_eq!(scripted.asked()[1].body, json!({"from": 200, "count": 50}));
        // The participant comes back. The second token has already expired.
        assert!(
            tokens
                .token(0)
                .await
                .unwrap_err()
                .to_string()
                .contains("none for this participant")
        );
        assert_eq!(scripted.asked().len(), 3);
    }
}
