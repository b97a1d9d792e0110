//! One participant's session: join, publish, negotiate what is sent and received, stay, leave. Each
//! participant is a task; its media runs in the engine's shards.
//!
//! The task hands shards finished parameters and never waits for them. Every phase of a join is
//! timed from the intended start.
//!
//! With *two* connections (`/rtc`), the participant offers its tracks on one, and the server offers
//! everybody else's on the other. With *one* (`/rtc/v1`), all offers are ours. The first offer
//! travels with the join and has sections for the tracks that are known to exist; the server says
//! when it needs more.

mod failure;
mod moderation;
mod pace;
mod peers;
mod reconnect;
mod requests;
mod strangers;
mod tracks;
mod viewer;

use crate::transport::rtp::Ssrc;
use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use livekit_protocol::{self as proto, signal_request::Message as SignalRequest};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tracing::{Instrument, debug, field, info, info_span, trace, warn};

use super::Endpoint;
use super::access::JoinAccess;
use super::client::{
    self, Description, IceServer, Join, JoinMode, JoinOptions, SignalError, SignalEvent,
    SignalReceiver, SignalSender, Trickle,
};
use super::dial::{DialDeadline, Dialled};
use super::token::Permissions;
use super::turn::{self, RelayNews, TurnLink, TurnServer};
use crate::engine::{
    NewPeer, PeerKey, Roster, ShardCommand, ShardEvent, StreamParameters, track_number,
};
use crate::measure::{JoinTimeline, Kind};
use crate::path::{Routes, Via};
use crate::plan::{ClientIdentity, MediaTransport, ParticipantPlan, VideoSpec, ViewLayout};
use crate::secrets::Secret;
use crate::transport::data::DataRole;
use crate::transport::peer::PeerFailure;
use crate::transport::sdp::{
    Answerer, Capabilities, DtlsSetup, Fingerprint, Offerer, RemoteTrack, RemoteTransport, Trickled,
};
use crate::units::{Epoch, Time};
use failure::{Cure, SessionFailure};
use pace::SignalPace;
use peers::{DescriptionChange, PeerHalf, PeerRole, needs_data_channels, open_stream};
use reconnect::{Lost, RESUME_TIMEOUT};
use requests::RequestQueue;
pub use strangers::{StrangerChange, Strangers};
pub use tracks::{Media, TakingTurns};
use tracks::{SessionTrack, add_track_request, stream_parameters};
pub use viewer::Size;
use viewer::Viewer;

/// Time limit of a join. LiveKit itself gives a primary connection 60 s; a person waits far less.
pub const JOIN_TIMEOUT: Duration = Duration::from_secs(30);
/// Interval of pings until the server names its own.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// Longest silence of the server before it counts as gone, until it names its own limit.
const PING_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest wait for the server's reason after it has ended the DTLS session. The reason may still
/// be on its way over the signalling connection.
const LEAVE_WAIT: Duration = Duration::from_millis(500);
/// Number of tracks that a server may announce to one participant in one session: a room of three
/// thousand, where everybody comes and goes several times. Each track is accounted for until the
/// end.
const TRACKS_EVER_MAX: usize = 20_000;
/// Number of unanswered pings that are remembered.
const PINGS_MAX: usize = 8;
/// Number of candidates that a server may trickle for one connection. It has a few per interface.
const TRICKLED_MAX: u32 = 64;
/// How long a participant that is to leave stays, so that what was already sent still arrives. At
/// the end of a run everybody stays as long after media has stopped.
const LEAVE_DRAIN: Duration = Duration::from_millis(1_500);
/// Shortest time between a connection's first moment and the first frame, so that the slot lies
/// ahead.
const FIRST_FRAME_DELAY: Duration = Duration::from_millis(2);

/// Configuration and channels that all participants of a run share.
pub struct SessionContext {
    pub endpoint: Endpoint,
    pub access: JoinAccess,
    pub epoch: Epoch,
    pub roster: Arc<Roster>,
    pub fingerprint: Fingerprint,
    /// One for each group of participants.
    pub groups: Vec<GroupContext>,
    /// Layers of video tracks, the lowest first. With a layout, all tracks have layers of the same
    /// sizes.
    pub video_layers: Vec<VideoSpec>,
    pub receive_buffer_bytes: usize,
    /// Relays that the user named. They replace those that the server names.
    pub turn: Vec<TurnServer>,
    /// Addresses from which this host reaches the server's candidates.
    pub routes: Routes,
    /// Whether each participant has one peer connection (`/rtc/v1`) instead of two.
    pub single_connection: bool,
    /// Number of retries after a failed join.
    pub join_retries: u32,
    pub shards: Vec<Sender<ShardCommand>>,
    pub notices: mpsc::UnboundedSender<Notice>,
    /// Publishers that are not of this run.
    pub strangers: Arc<Strangers>,
    /// Becomes true when everybody is to leave.
    pub leave: watch::Receiver<bool>,
}

/// What all participants of a group share.
pub struct GroupContext {
    pub media: Media,
    /// Client that they say they are.
    pub client: &'static ClientIdentity,
    /// Whether they rest the layers that nobody watches.
    pub dynacast: bool,
    /// Layout that they watch.
    pub layout: Option<ViewLayout>,
    /// Whether they announce that they will say which sizes they show.
    pub adaptive_stream: bool,
    /// Whether they send no more than their path carries.
    pub obey_bandwidth: bool,
}

/// The shard and keys of a participant's connections.
#[derive(Clone, Copy, Debug)]
pub struct ShardPlace {
    pub shard: usize,
    /// Key of the publisher connection, or of the only one. The subscriber connection has the next
    /// key.
    pub key: PeerKey,
}

/// Numbers of media sections in which the server may send us tracks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sections {
    pub audio: u32,
    pub video: u32,
}

impl Sections {
    fn add(&mut self, other: Sections) {
        self.audio = self.audio.saturating_add(other.audio);
        self.video = self.video.saturating_add(other.video);
    }
}

/// A participant's report to the run.
#[derive(Debug)]
pub enum Notice {
    /// A phase of the join is complete, this long after the intended start.
    Phase(JoinPhase, Duration),
    Joined {
        index: u32,
        /// Transport of its media; with two connections, the one further from UDP.
        transport: MediaTransport,
    },
    /// Media was to use UDP, and uses something else.
    FellBack {
        /// For example `over TCP: the server offers no UDP candidate`.
        why: String,
    },
    JoinFailed {
        index: u32,
        reason: String,
        /// Whether neither the server nor the load is the cause, but an address, a proxy, a
        /// certificate or a token.
        kept_out: bool,
    },
    /// A join was answered with a rate limit, and waits as asked. `reason` says who set the limit.
    HeldBack {
        reason: String,
    },
    /// A failed join is retried.
    JoinRetried {
        reason: String,
    },
    /// The participant was in the room, and was thrown out or lost its connection for good. It may
    /// join anew.
    Disconnected {
        index: u32,
        at: Time,
        reason: String,
        /// The server's own name for the reason, where the server ended the session:
        /// `PARTICIPANT_REMOVED`.
        server_reason: Option<&'static str>,
    },
    /// The server removed one of the participant's tracks from the room, or never accepted it. The
    /// participant is still in the room.
    TrackLost {
        index: u32,
        kind: Kind,
        at: Time,
        /// Text for the report, for example `lost its audio track: the server unpublished it`.
        story: String,
    },
    /// The server muted or unmuted one of the participant's tracks.
    MutedByServer {
        index: u32,
        kind: Kind,
        muted: bool,
        at: Time,
    },
    /// The server made the participant differ from the plan, for example `lost its right to
    /// subscribe: ..`.
    Harmed {
        index: u32,
        at: Time,
        story: String,
    },
    /// The server gave back what it had taken. The story is that of the [`Notice::Harmed`] before.
    Restored {
        index: u32,
        at: Time,
        story: &'static str,
    },
    /// The server refused something that does not end the participant.
    Refused {
        reason: String,
    },
    /// The participant lost its connection and has it back after this time: in the old session, or
    /// in a new one after [`Notice::Disconnected`].
    Reconnected {
        index: u32,
        after: Duration,
        resumed: bool,
        /// Why the connection was lost.
        why: String,
    },
    /// The participant has tried to come back, and given up.
    ReconnectFailed {
        index: u32,
    },
    SignalRtt(Duration),
    /// A message of the server cannot be decoded, and is skipped.
    SignalMalformed,
    /// The server reported speakers.
    SpeakersChanged,
    Server {
        version: String,
        embedded_sfu: bool,
    },
    /// The participant's last notice.
    Ended(Box<Ended>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JoinPhase {
    SignalConnect,
    SignalJoin,
    Ice,
    Dtls,
    Join,
    FirstMedia,
}

/// Final account of one participant, as signalling saw it.
#[derive(Debug)]
pub struct Ended {
    pub index: u32,
    /// Identity and room. Given tokens decide them, not the plan.
    pub identity: String,
    pub room: String,
    pub timeline: JoinTimeline,
    pub failure: Option<String>,
    /// Transport of its media when it was last in the room; `None` if it never was.
    pub transport: Option<MediaTransport>,
    pub disconnects: u32,
    /// Number of video tracks that have ever had a place in its layout; 0 without a layout.
    pub video_shown: u32,
}

/// Request to a participant while it is in the room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Mute or unmute one of its tracks.
    SetMuted { kind: Kind, muted: bool },
    /// From now on, watch every video track in this size, whatever the layout; `None`: watch none.
    Show(Option<Size>),
    /// Leave before the run ends. What was already sent to the participant still has time to
    /// arrive; from now on nothing is owed.
    Leave,
}

/// Runs one participant from its intended start until the run tells everybody to leave, or the
/// server ends it. `tracks_ahead` are the tracks that should exist when it joins: with one
/// connection it offers sections for them.
///
/// Requests are carried out in their order. If there are never any, their sender may be dropped
/// from the start.
pub async fn run(
    context: Arc<SessionContext>,
    mut plan: ParticipantPlan,
    mut room: String,
    place: ShardPlace,
    intended: Time,
    tracks_ahead: Sections,
    requests: mpsc::UnboundedReceiver<Request>,
) {
    if let Some((identity, named)) = context.access.seat(plan.position) {
        (plan.identity, room) = (identity.to_owned(), named.to_owned());
    }
    let span = info_span!("participant", room, identity = plan.identity);
    let mut session = Session::new(context, plan, room, place, intended, tracks_ahead);
    let mut requests = RequestQueue::new(requests);
    let life = async {
        let failure = session.live(&mut requests).await.err();
        session.end(failure);
    };
    life.instrument(span).await;
}

struct Session {
    context: Arc<SessionContext>,
    plan: ParticipantPlan,
    room: String,
    place: ShardPlace,
    /// Timeline of this attempt to join.
    timeline: JoinTimeline,
    /// Timeline of the first attempt that succeeded.
    first_timeline: Option<JoinTimeline>,
    /// Whether this attempt has succeeded.
    joined: bool,
    /// The server's sid of this session, for a resume.
    sid: String,
    join_retries: u32,
    /// Why the first attempt to join failed.
    first_failure: Option<String>,
    lost: Option<Lost>,
    /// When the participant leaves, if it was asked to.
    leaves_at: Option<Time>,
    /// When it last came back, and the number of tries that took.
    back: Option<(Time, u32)>,
    disconnects: u32,
    /// Set while a resume has restarted ICE and media is not back yet: when it ought to be.
    media_back_by: Option<Time>,
    /// Whether the server counts nobody as present without data channels.
    needs_data: bool,
    publisher: PeerHalf,
    subscriber: PeerHalf,
    /// State of our offers, for the publisher connection or the only one.
    offering: Offering,
    /// Answers the server's offers for the subscriber connection.
    answerer: Answerer,
    /// An answer and its number, held until the shard has restarted ICE.
    held_answer: Option<(String, u32)>,
    /// An offer that restarts ICE, until a relay has given an address to answer with.
    held_offer: Option<Description>,
    tracks: Vec<SessionTrack>,
    /// Whether the server has withdrawn the right to subscribe.
    may_not_subscribe: bool,
    /// The last token that the server gave, for a resume or a new join.
    fresh_token: Option<Secret>,
    /// Number of tracks that the server has announced in this session.
    tracks_ever: usize,
    viewer: Viewer,
    local_ip: Option<IpAddr>,
    /// TCP connections for media that are being opened.
    streams: JoinSet<OpenedStream>,
    relays: Relays,
    /// Whether the server wants media to go through a relay.
    force_relay: bool,
}

/// Channel on which allocations at relays report.
struct Relays {
    sender: mpsc::UnboundedSender<(PeerRole, TurnLink, RelayNews)>,
    news: mpsc::UnboundedReceiver<(PeerRole, TurnLink, RelayNews)>,
}

impl Relays {
    fn new() -> Relays {
        let (sender, news) = mpsc::unbounded_channel();
        Relays { sender, news }
    }
}

type OpenedStream = (PeerRole, SocketAddr, io::Result<TcpStream>);

/// State of our offers: one is open at a time, and what the next one must contain.
#[derive(Default)]
struct Offering {
    offerer: Offerer,
    /// Number of the last offer.
    id: u32,
    /// Whether the last offer has no answer yet.
    is_open: bool,
    /// Additional sections for the next offer, if the server asked for one.
    wanted: Option<Sections>,
    /// Receiving sections offered so far.
    sections: Sections,
}

/// The signalling connection, and its state.
struct Signal {
    sender: SignalSender,
    receiver: SignalReceiver,
    ping: tokio::time::Interval,
    /// Longest silence of the server that is tolerated.
    ping_timeout: Duration,
    heard_at: Time,
    rtt: Duration,
    /// Send times of the unanswered pings.
    pings: VecDeque<Time>,
    pace: SignalPace,
}

/// Channel of the shard's events about this participant's connections.
struct EngineEvents {
    sender: mpsc::UnboundedSender<ShardEvent>,
    receiver: mpsc::UnboundedReceiver<ShardEvent>,
}

impl Signal {
    fn new(sender: SignalSender, receiver: SignalReceiver, now: Time) -> Signal {
        let mut signal = Signal {
            sender,
            receiver,
            ping: tokio::time::interval(PING_INTERVAL),
            ping_timeout: PING_TIMEOUT,
            heard_at: now,
            rtt: Duration::ZERO,
            pings: VecDeque::new(),
            pace: SignalPace::new(now),
        };
        signal.set_ping(PING_INTERVAL, PING_TIMEOUT);
        signal
    }

    fn set_ping(&mut self, interval: Duration, timeout: Duration) {
        if !interval.is_zero() && !timeout.is_zero() {
            self.ping_timeout = timeout;
            self.ping = tokio::time::interval_at(tokio::time::Instant::now() + interval, interval);
            self.ping
                .set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        }
    }

    /// Sends a ping, or fails if the server has been silent for too long.
    async fn ping(&mut self, now: Time) -> Result<(), SessionFailure> {
        if now.since(self.heard_at) > self.ping_timeout {
            return Err(SessionFailure::lost(format!(
                "the server was silent for {:?}",
                self.ping_timeout
            )));
        }
        if self.pings.len() == PINGS_MAX {
            self.pings.pop_front();
        }
        // Round as the answer will return it: to microseconds.
        self.pings.push_back(Time::from_micros(now.as_micros()));
        Ok(self.sender.ping(now.as_micros() as i64, self.rtt).await?)
    }

    /// Returns the round trip that an answer shows; `None` if it answers no ping of ours.
    fn handle_pong(&mut self, timestamp_us: i64, now: Time) -> Option<Duration> {
        let sent = Time::from_micros(u64::try_from(timestamp_us).ok()?);
        let at = self.pings.iter().position(|ping| *ping == sent)?;
        // Answers come in the order of the pings.
        self.pings.drain(..=at);
        self.rtt = now.since(sent);
        Some(self.rtt)
    }
}

impl EngineEvents {
    fn new() -> EngineEvents {
        let (sender, receiver) = mpsc::unbounded_channel();
        EngineEvents { sender, receiver }
    }
}

impl Session {
    fn new(
        context: Arc<SessionContext>,
        plan: ParticipantPlan,
        room: String,
        place: ShardPlace,
        intended: Time,
        tracks_ahead: Sections,
    ) -> Session {
        let group = &context.groups[plan.group];
        let tracks = SessionTrack::of(&plan, &group.media);
        Session {
            timeline: JoinTimeline {
                intended,
                ..JoinTimeline::default()
            },
            first_timeline: None,
            joined: false,
            sid: String::new(),
            join_retries: 0,
            first_failure: None,
            lost: None,
            leaves_at: None,
            back: None,
            disconnects: 0,
            media_back_by: None,
            needs_data: false,
            publisher: PeerHalf::new(
                context.single_connection || !tracks.is_empty(),
                plan.transport,
            ),
            subscriber: PeerHalf::new(
                !context.single_connection && plan.subscribes,
                plan.transport,
            ),
            offering: Offering {
                wanted: Some(tracks_ahead),
                ..Offering::default()
            },
            answerer: Answerer::new(Capabilities::SUBSCRIBER),
            held_answer: None,
            held_offer: None,
            tracks,
            may_not_subscribe: false,
            fresh_token: None,
            tracks_ever: 0,
            viewer: Viewer::new(group.layout, context.video_layers.clone()),
            local_ip: None,
            streams: JoinSet::new(),
            relays: Relays::new(),
            force_relay: false,
            context,
            plan,
            room,
            place,
        }
    }

    /// Joins and stays, with as many sessions as that takes. Returns `Ok` when the run tells this
    /// participant, or everybody, to leave.
    async fn live(&mut self, requests: &mut RequestQueue) -> Result<(), SessionFailure> {
        let mut leave = self.context.leave.clone();
        loop {
            let Err(failure) = self.visit(requests).await else {
                return Ok(());
            };
            let Some(pause) = self.pause_after(&failure) else {
                return Err(failure);
            };
            info!(why = failure.reason, ?pause, "joins again");
            self.start_over();
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = leaving(&mut leave) => return Ok(()),
                () = requests.leave() => {
                    self.leave_at(self.context.epoch.now());
                    return Ok(());
                }
            }
        }
    }

    /// Runs one session, from the join until it is lost or the participant is to leave. If only
    /// signalling is lost, the session is resumed.
    async fn visit(&mut self, requests: &mut RequestQueue) -> Result<(), SessionFailure> {
        self.timeline.started = Some(self.context.epoch.now());
        let mut leave = self.context.leave.clone();
        let mut engine = EngineEvents::new();
        let mut signal = self.open_signal(false).await?;
        loop {
            let Err(failure) = self.attend(&mut signal, &mut engine, requests).await else {
                return Ok(());
            };
            if self.leaves_at.is_some() {
                // A participant that is leaving does not come back.
                return Ok(());
            }
            let (Cure::Resume { restart_ice }, true) = (failure.cure, self.joined) else {
                return Err(failure);
            };
            let awaits_media = self.media_back_by.is_some();
            if restart_ice && awaits_media {
                // As clients do: what a resume did not help, a new session may.
                return Err(SessionFailure {
                    cure: Cure::Rejoin,
                    ..failure
                });
            }
            let restart_ice = restart_ice || awaits_media;
            info!(
                why = failure.reason,
                restart_ice, "lost its signalling connection, and resumes"
            );
            let (now, back) = (self.context.epoch.now(), self.back);
            self.lost
                .get_or_insert_with(|| Lost::at(now, back, &failure.reason));
            signal = tokio::select! {
                resumed = self.resume(failure, restart_ice) => resumed?,
                () = leaving(&mut leave) => return Ok(()),
                () = requests.leave() => {
                    self.leave_at(self.context.epoch.now());
                    return Ok(());
                }
            };
        }
    }

    /// Schedules the participant to leave at this time. From now on it owes nothing, and nothing is
    /// owed to it.
    fn leave_at(&mut self, at: Time) {
        self.leaves_at = Some(at);
        for role in PeerRole::BOTH {
            self.command(ShardCommand::Leave {
                key: self.key(role),
            });
        }
    }

    /// Completes at this time; never, if there is none.
    fn reached(&self, at: Option<Time>) -> impl Future<Output = ()> + use<> {
        let at = at.map(|at| tokio::time::Instant::from_std(self.context.epoch.instant(at)));
        async move {
            match at {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        }
    }

    /// Completes when it is time to leave; never, if nobody has asked for that.
    fn time_to_leave(&self) -> impl Future<Output = ()> + use<> {
        self.reached(self.leaves_at)
    }

    /// Completes when it is certain that no candidate of the server can be used.
    fn time_without_path(&self) -> impl Future<Output = ()> + use<> {
        let halves = [&self.publisher, &self.subscriber];
        let at = halves
            .iter()
            .filter_map(|half| half.without_path_at())
            .min();
        self.reached(at)
    }

    /// Completes when media ought to be back after a resume.
    fn time_without_media(&self) -> impl Future<Output = ()> + use<> {
        self.reached(self.media_back_by)
    }

    /// Completes when TCP connections are to be opened.
    fn time_of_streams(&self) -> impl Future<Output = ()> + use<> {
        let halves = [&self.publisher, &self.subscriber];
        let at = halves.iter().filter_map(|half| half.streams_due_at()).min();
        self.reached(at)
    }

    /// Starts opening the TCP connections that are due.
    async fn open_streams(&mut self, sender: &mut SignalSender) -> Result<(), SessionFailure> {
        let (context, now) = (self.context.clone(), self.context.epoch.now());
        for role in PeerRole::BOTH {
            let half = self.half_mut(role);
            if half.streams_due_at().is_none_or(|at| at > now) {
                continue;
            }
            for address in half.begin_streams(&context) {
                self.streams
                    .spawn(async move { (role, address, open_stream(address).await) });
            }
            self.tell_addresses(role, sender).await?;
        }
        Ok(())
    }

    fn handle_stream(&mut self, (role, address, opened): OpenedStream) {
        debug!(connection = ?role, %address, open = opened.is_ok(), "a TCP connection for media");
        self.half_mut(role).take_stream(address, opened);
        self.hand_over_paths(role);
    }

    /// Determines the relays that may carry the connections, now or later.
    fn take_relays(
        &mut self,
        offered: &[IceServer],
        force_relay: bool,
    ) -> Result<(), SessionFailure> {
        let choice = self.plan.transport;
        self.force_relay = force_relay && choice.is_auto();
        let relays = turn::relays(&self.context.turn, offered, choice);
        if relays.is_empty() && (choice.is_relay() || self.force_relay) {
            let who = if self.force_relay {
                "the server wants media to go through a TURN server, and none is usable".to_owned()
            } else {
                let name = choice.name();
                format!("--transport {name} needs a TURN server that is reached so")
            };
            let named = turn::what_is_named(offered);
            return Err(SessionFailure::lasting(format!(
                "{who}: {named}. Name one with --turn"
            )));
        }
        for role in PeerRole::BOTH {
            let relays = relays.clone();
            let only = choice.is_relay() || self.force_relay;
            self.half_mut(role).set_relays(relays, only);
        }
        Ok(())
    }

    /// Completes when another relay is to be tried.
    fn time_of_relays(&self) -> impl Future<Output = ()> + use<> {
        let halves = [&self.publisher, &self.subscriber];
        let at = halves.iter().filter_map(|half| half.relay_due_at()).min();
        self.reached(at)
    }

    /// Starts the allocations that are due.
    fn open_relays(&mut self) {
        let (epoch, buffer) = (self.context.epoch, self.context.receive_buffer_bytes);
        for role in PeerRole::BOTH {
            let half = self.half_mut(role);
            if half.relay_due_at().is_none_or(|at| at > epoch.now()) {
                continue;
            }
            let Some((server, peers)) = half.begin_relay() else {
                continue;
            };
            let (link, sender) = (server.url.link, self.relays.sender.clone());
            debug!(connection = ?role, relay = %server.url, "asks a relay for an allocation");
            // A session that has ended no longer needs it.
            let tell = move |news| drop(sender.send((role, link, news)));
            tokio::spawn(turn::keep_allocation(server, buffer, epoch, peers, tell));
        }
    }

    async fn handle_relay(
        &mut self,
        (role, link): (PeerRole, TurnLink),
        news: RelayNews,
        sender: &mut SignalSender,
        engine: &mpsc::UnboundedSender<ShardEvent>,
    ) -> Result<(), SessionFailure> {
        let (key, now, is_in) = (self.key(role), self.context.epoch.now(), self.joined);
        let half = self.half_mut(role);
        match news {
            RelayNews::Open { path, relayed } => {
                debug!(connection = ?role, %relayed, "a relay carries it");
                let is_first = half.awaits_relay();
                half.take_relay(link, path, relayed);
                self.hand_over_paths(role);
                if is_first {
                    self.restart_at_relay(role, sender, engine).await?;
                }
                self.tell_addresses(role, sender).await?;
            }
            RelayNews::Bound { peer, number } => {
                if let Some(relayed) = half.bind_relay(link, peer) {
                    self.command(ShardCommand::BindChannel {
                        key,
                        relayed,
                        peer,
                        number,
                    });
                    let address = peer;
                    self.command(ShardCommand::AddRemoteCandidate { key, address });
                }
            }
            RelayNews::Say { relayed, message } => self.command(ShardCommand::TellRelay {
                key,
                relayed,
                message,
            }),
            RelayNews::Refused { peer, why } => {
                debug!(connection = ?role, %peer, why, "a relay does not reach it");
                half.refuse_relay(link, why);
            }
            RelayNews::Failed(why) if is_in && half.uses_relay(link) => {
                return Err(SessionFailure::of(why, Cure::Rejoin));
            }
            RelayNews::Failed(why) => {
                half.fail_relay(link, why, now);
                if let Some(why) = half.failed_move() {
                    return Err(SessionFailure::of(why, Cure::Rejoin));
                }
            }
        }
        Ok(())
    }

    /// Adds the relay's state to a failure for which the server gave no reason, or a timeout,
    /// because the relay that carried the media may be the cause.
    async fn with_relay(&self, mut failure: SessionFailure) -> SessionFailure {
        let halves = [&self.publisher, &self.subscriber];
        let relay = halves.into_iter().find_map(PeerHalf::relay_in_use);
        let is_silence = matches!(failure.server_reason, None | Some("CONNECTION_TIMEOUT"));
        if let Some(url) = relay.filter(|_| self.joined && is_silence) {
            let life = turn::sign_of_life(url).await;
            failure.reason += &format!("; media went through the TURN server {url}, which {life}");
        }
        failure
    }

    fn transport(&self) -> MediaTransport {
        let halves = [&self.publisher, &self.subscriber];
        let by = halves.iter().map(|half| match half.via {
            Via::Udp => MediaTransport::Udp,
            Via::Tcp(_) => MediaTransport::Tcp,
            Via::Relay(_) => match half.relay_in_use().map(|url| url.link) {
                Some(TurnLink::Tls) => MediaTransport::TurnTls,
                Some(TurnLink::Tcp) => MediaTransport::TurnTcp,
                Some(TurnLink::Udp) | None => MediaTransport::TurnUdp,
            },
        });
        by.max().unwrap_or(MediaTransport::Udp)
    }

    fn without_path(&self) -> String {
        let halves = [&self.publisher, &self.subscriber];
        let first = halves
            .into_iter()
            .filter(|half| half.without_path_at().is_some())
            .min_by_key(|half| half.without_path_at());
        first.map_or_else(String::new, PeerHalf::without_path)
    }

    /// Serves the server, the shard and requests, until it is time to leave.
    async fn attend(
        &mut self,
        signal: &mut Signal,
        engine: &mut EngineEvents,
        requests: &mut RequestQueue,
    ) -> Result<(), SessionFailure> {
        let deadline = tokio::time::sleep_until(tokio::time::Instant::from_std(
            self.context.epoch.instant(self.join_deadline()),
        ));
        tokio::pin!(deadline);
        let mut leave = self.context.leave.clone();
        loop {
            tokio::select! {
                biased;
                // The events that end the session come first: a server that never stops talking
                // must not keep a participant in the room.
                () = leaving(&mut leave) => break,
                () = self.time_to_leave() => break,
                () = self.time_without_path(), if !self.joined => return Err(SessionFailure::lasting(self.without_path())),
                () = self.time_without_media() => self.end_wait_for_media()?,
                () = self.time_of_relays() => self.open_relays(),
                () = self.time_of_streams() => self.open_streams(&mut signal.sender).await?,
                Some(Ok(opened)) = self.streams.join_next() => self.handle_stream(opened),
                Some((role, link, news)) = self.relays.news.recv() => {
                    self.handle_relay((role, link), news, &mut signal.sender, &engine.sender).await?;
                }
                () = &mut deadline, if !self.joined => return Err(SessionFailure::lost(self.timeout_reason())),
                Some(event) = engine.receiver.recv() => {
                    if let Err(failure) = self.handle_engine(event, &mut signal.sender).await {
                        let closed = matches!(event, ShardEvent::Failed { failure: PeerFailure::ClosedByRemote, .. });
                        let reason = if closed { leave_reason(&mut signal.receiver).await } else { None };
                        return Err(self.with_relay(reason.unwrap_or(failure)).await);
                    }
                }
                event = signal.receiver.next() => {
                    let (now, event) = (self.context.epoch.now(), event?);
                    signal.heard_at = now;
                    if let Some(pause) = signal.pace.pause_before(&event, now) {
                        tokio::time::sleep(pause).await;
                    }
                    self.handle_signal(event, signal, &engine.sender).await?;
                }
                request = requests.next() => self.handle_request(request, &mut signal.sender).await?,
                _ = signal.ping.tick() => signal.ping(self.context.epoch.now()).await?,
            }
        }
        // The server sees a Leave at once; a silent participant it keeps for 20 s.
        let _ = tokio::time::timeout(Duration::from_secs(2), signal.sender.leave()).await;
        Ok(())
    }

    /// Returns the deadline of a join. The first attempt counts from its intended start, a later
    /// one from its actual start.
    fn join_deadline(&self) -> Time {
        let is_first = self.join_retries == 0 && self.first_timeline.is_none();
        let began = self.timeline.started.filter(|_| !is_first);
        began.unwrap_or(self.timeline.intended) + JOIN_TIMEOUT
    }

    /// What the participant's group shares.
    fn group(&self) -> &GroupContext {
        &self.context.groups[self.plan.group]
    }

    async fn open_signal(&mut self, resume: bool) -> Result<Signal, SessionFailure> {
        let permissions = Permissions {
            publish: !self.tracks.is_empty(),
            subscribe: self.plan.subscribes,
            publish_data: false,
            hidden: false,
        };
        let timeout = if resume { RESUME_TIMEOUT } else { JOIN_TIMEOUT };
        let mut options = JoinOptions {
            auto_subscribe: self.plan.subscribes,
            adaptive_stream: self.plan.subscribes && self.group().adaptive_stream,
            resume: resume.then(|| self.sid.clone()),
            token_from: self.context.access.origin(),
            timeout,
            ..JoinOptions::of_client(self.group().client)
        };
        let context = self.context.clone();
        let deadline = DialDeadline::after(timeout);
        let token = self.token(permissions, timeout).await?;
        let dialled = Box::pin(Dialled::dial(&context.endpoint, deadline)).await?;
        if !resume {
            self.local_ip = Some(dialled.local_ip);
        }
        options.connection = match (context.single_connection, resume) {
            (true, true) => JoinMode::SINGLE,
            (true, false) => self.first_offer()?,
            (false, _) => JoinMode::Dual,
        };
        let (sender, receiver, times) = dialled.join(&token, &options).await?;
        let client::ConnectTimes {
            tcp,
            tls,
            websocket,
        } = times;
        debug!(
            resume,
            ?tcp,
            tls = tls.map(field::debug),
            ?websocket,
            "signalling is connected"
        );
        let now = self.context.epoch.now();
        if !resume {
            self.timeline.signal_connected = Some(now);
        }
        Ok(Signal::new(sender, receiver, now))
    }

    /// Returns the token to join with: the last one that the server gave, or the run's.
    async fn token(
        &self,
        permissions: Permissions,
        timeout: Duration,
    ) -> Result<Secret, SessionFailure> {
        if let Some(token) = &self.fresh_token {
            return Ok(token.clone());
        }
        let access = &self.context.access;
        let asking = access.join_token(&self.plan, &self.room, permissions);
        let token = tokio::time::timeout(timeout, asking).await;
        Ok(token.map_err(|_| SignalError::NoTokenInTime { after: timeout })??)
    }

    async fn handle_signal(
        &mut self,
        event: SignalEvent,
        signal: &mut Signal,
        engine: &mpsc::UnboundedSender<ShardEvent>,
    ) -> Result<(), SessionFailure> {
        match event {
            SignalEvent::Join(join) => self.handle_join(&join, signal).await,
            SignalEvent::TrackPublished { cid, track } => {
                self.handle_track_published(&cid, track, &mut signal.sender)
                    .await
            }
            SignalEvent::Offer(offer) => {
                trace!(bytes = offer.sdp.len(), "the server's offer");
                self.handle_offer(&offer, &mut signal.sender, engine).await
            }
            SignalEvent::Answer(answer) => {
                trace!(bytes = answer.sdp.len(), "the server's answer");
                self.handle_answer(&answer, &mut signal.sender, engine)
                    .await
            }
            SignalEvent::MediaSections { audio, video } => {
                self.offering
                    .wanted
                    .get_or_insert_default()
                    .add(Sections { audio, video });
                self.offer_if_wanted(&mut signal.sender).await
            }
            SignalEvent::Trickle(trickle) => {
                self.handle_trickle(&trickle, &mut signal.sender).await
            }
            SignalEvent::SubscribedQuality(update) => {
                self.handle_subscribed_quality(&update);
                Ok(())
            }
            SignalEvent::StreamStates(states) => {
                self.handle_stream_states(&states);
                Ok(())
            }
            SignalEvent::SpeakersChanged(speakers) => {
                self.notify(Notice::SpeakersChanged);
                self.viewer.handle_speakers(&speakers);
                self.tell_what_is_watched(&mut signal.sender).await
            }
            SignalEvent::Pong { timestamp_us } => {
                let rtt = signal.handle_pong(timestamp_us, self.context.epoch.now());
                rtt.into_iter()
                    .for_each(|rtt| self.notify(Notice::SignalRtt(rtt)));
                Ok(())
            }
            SignalEvent::Leave(leave) => Err(self.with_relay(self.ended_by_server(&leave)).await),
            SignalEvent::Malformed { kind, .. } => self.handle_malformed(kind),
            SignalEvent::Closed { reason, .. } => Err(closed_by_server(&reason)),
            other => self.handle_moderation(other, &mut signal.sender).await,
        }
    }

    /// Combines the server's reason with what the join still lacked: the server ends a join whose
    /// media does not come up.
    fn ended_by_server(&self, leave: &client::Leave) -> SessionFailure {
        let mut failure = SessionFailure::from(leave);
        let halves = [&self.publisher, &self.subscriber];
        let missing = halves
            .into_iter()
            .find(|half| half.is_missing() && half.added);
        let Some(half) = missing.filter(|_| !self.joined) else {
            return failure;
        };
        let ends = half.ends();
        failure.reason += &if half.ice_at.is_none() {
            format!("; ICE had no answer{ends} ({})", half.port_question())
        } else {
            format!(
                "; ICE was connected{ends}, and DTLS did not come up: are long datagrams dropped on the way (MTU)?"
            )
        };
        failure
    }

    /// Fails if the message is a Join, an offer or an answer, because nothing works without those.
    /// Others are counted and skipped.
    fn handle_malformed(&self, kind: u32) -> Result<(), SessionFailure> {
        warn!(kind, "a message of the server cannot be read");
        self.notify(Notice::SignalMalformed);
        match client::essential_name(kind) {
            Some(name) => Err(SessionFailure::lasting(format!(
                "the server's {name} cannot be read: is it a LiveKit server, and is something between it and us that changes messages?"
            ))),
            None => Ok(()),
        }
    }

    async fn handle_join(
        &mut self,
        join: &Join,
        signal: &mut Signal,
    ) -> Result<(), SessionFailure> {
        self.timeline.signal_joined = Some(self.context.epoch.now());
        self.sid.clone_from(&join.participant_sid);
        debug!(
            server = join.server_version,
            sid = self.sid,
            "the server let it in"
        );
        self.notify(Notice::Server {
            version: join.server_version.clone(),
            embedded_sfu: join.embedded_sfu,
        });
        self.needs_data = needs_data_channels(&join.server_version);
        let here = (self.plan.room, self.plan.index);
        let strangers = &self.context.strangers;
        strangers.take_join(here, join.others.decoded(), self.context.epoch.now());
        signal.set_ping(join.ping_interval, join.ping_timeout);
        self.take_relays(&join.ice_servers, join.force_relay)?;
        if !self.context.single_connection {
            for track in &self.tracks {
                signal.sender.add_track(add_track_request(track)).await?;
            }
        }
        self.check_joined()
    }

    /// Takes the server's answer to AddTrack. With two connections, our offer follows when the
    /// server knows every track.
    async fn handle_track_published(
        &mut self,
        cid: &str,
        info: Box<proto::TrackInfo>,
        sender: &mut SignalSender,
    ) -> Result<(), SessionFailure> {
        if let Some(track) = self.tracks.iter_mut().find(|track| track.local.cid == cid) {
            track.info = Some(info);
        }
        self.offer_tracks(sender).await
    }

    /// Sends the first offer, unless it was sent before or a track is neither accepted nor refused
    /// yet.
    async fn offer_tracks(&mut self, sender: &mut SignalSender) -> Result<(), SessionFailure> {
        let is_settled = |track: &SessionTrack| track.info.is_some() || track.is_refused;
        if self.offering.id > 0 || !self.tracks.iter().all(is_settled) {
            return Ok(());
        }
        if self.tracks.iter().all(|track| track.is_refused) {
            // Nothing is left to send.
            self.publisher.wanted = false;
            return self.check_joined();
        }
        let (offer, id) = self.next_offer()?;
        Ok(sender.offer(offer, id).await?)
    }

    /// Returns what the join itself carries with one connection: all our tracks, and an offer.
    fn first_offer(&mut self) -> Result<JoinMode, SessionFailure> {
        Ok(JoinMode::Single {
            add_tracks: self.tracks.iter().map(add_track_request).collect(),
            publisher_offer: Some(self.next_offer()?),
        })
    }

    /// Returns our next offer and its number. It adds the wanted sections; the first offer also
    /// adds our tracks after them.
    fn next_offer(&mut self) -> Result<(String, u32), SessionFailure> {
        let Offering {
            offerer,
            id,
            is_open,
            wanted,
            sections,
        } = &mut self.offering;
        let refused = |error| SessionFailure::lasting(format!("our offer: {error}"));
        let wanted = wanted.take().unwrap_or_default();
        if self.context.single_connection {
            sections.add(wanted);
            // A connection needs a section to come up with, even if nothing is to be sent or
            // received yet.
            let nothing =
                wanted == Sections::default() && offerer.is_empty() && self.tracks.is_empty();
            offerer
                .receive(Kind::Audio, wanted.audio as usize + usize::from(nothing))
                .map_err(refused)?;
            offerer
                .receive(Kind::Video, wanted.video as usize)
                .map_err(refused)?;
        }
        if *id == 0 {
            for track in self.tracks.iter_mut().filter(|track| !track.is_refused) {
                track.is_offered = true;
                offerer.send(track.local.clone());
            }
            if self.needs_data {
                offerer.open_data();
            }
        }
        *id += 1;
        *is_open = true;
        let ip = self
            .local_ip
            .ok_or_else(|| SessionFailure::lasting("no local address"))?;
        let local = self
            .publisher
            .open(ip, &self.context, self.plan.seed >> 1)?;
        Ok((offerer.offer(local), *id))
    }

    /// Sends the next offer, if one is wanted. Only one is open at a time; others wait for its
    /// answer.
    async fn offer_if_wanted(&mut self, sender: &mut SignalSender) -> Result<(), SessionFailure> {
        if self.offering.is_open || self.offering.wanted.is_none() {
            return Ok(());
        }
        let (offer, id) = self.next_offer()?;
        Ok(sender.offer(offer, id).await?)
    }

    async fn handle_answer(
        &mut self,
        answer: &Description,
        sender: &mut SignalSender,
        engine: &mpsc::UnboundedSender<ShardEvent>,
    ) -> Result<(), SessionFailure> {
        // Skip answers to an offer that a later one has replaced. A server that does not number its
        // answers sends 0.
        if ![0, self.offering.id].contains(&answer.id) {
            return Ok(());
        }
        let negotiated = self
            .offering
            .offerer
            .handle_answer(&answer.sdp)
            .map_err(|error| SessionFailure::lasting(format!("the server's answer: {error}")))?;
        let offered = self.tracks.iter_mut().filter(|track| track.is_offered);
        for (track, media) in offered.zip(&negotiated.media) {
            track.negotiated = Some(media.clone()).filter(|media| media.accepted);
        }
        self.handle_left_out();
        self.take_remote(
            PeerRole::Publisher,
            &negotiated.remote,
            true,
            DtlsSetup::Active,
            engine,
        );
        self.tell_addresses(PeerRole::Publisher, sender).await?;
        self.count_tracks(negotiated.added.len())?;
        self.take_streams(
            PeerRole::Publisher,
            &negotiated.removed,
            negotiated.added.iter().chain(&negotiated.updated),
        );
        self.tell_what_is_watched(sender).await?;
        self.offering.is_open = false;
        self.offer_if_wanted(sender).await
    }

    async fn handle_offer(
        &mut self,
        offer: &Description,
        sender: &mut SignalSender,
        engine: &mpsc::UnboundedSender<ShardEvent>,
    ) -> Result<(), SessionFailure> {
        let ip = self
            .local_ip
            .ok_or_else(|| SessionFailure::lasting("no local address"))?;
        let restarts = self.subscriber.is_restarted_by(&offer.sdp);
        if restarts && self.subscriber.awaits_relay() {
            self.held_offer = Some(offer.clone());
            return Ok(());
        }
        if restarts {
            self.subscriber.draw_credentials();
        }
        let local = self
            .subscriber
            .open(ip, &self.context, self.plan.seed >> 1)?;
        let answered = self
            .answerer
            .answer(&offer.sdp, local)
            .map_err(|error| SessionFailure::lasting(format!("the server's offer: {error}")))?;
        // The shard comes first, because the server's checks may arrive as soon as it has the
        // answer.
        self.take_remote(
            PeerRole::Subscriber,
            &answered.remote,
            answered.remote.ice_lite,
            answered.setup,
            engine,
        );
        self.count_tracks(answered.added.len())?;
        self.take_streams(
            PeerRole::Subscriber,
            &answered.removed,
            answered.added.iter().chain(&answered.updated),
        );
        // Do this before the answer, so that nothing arrives that nobody watches.
        self.tell_what_is_watched(sender).await?;
        self.tell_addresses(PeerRole::Subscriber, sender).await?;
        if restarts {
            // The server repeats a check that was not understood only after 200 ms, and sends no
            // media until then. So the shard must be ready for the first check.
            self.held_answer = Some((answered.sdp, offer.id));
            return Ok(());
        }
        Ok(sender.answer(answered.sdp, offer.id).await?)
    }

    fn count_tracks(&mut self, added: usize) -> Result<(), SessionFailure> {
        self.tracks_ever += added;
        match self.tracks_ever {
            0..=TRACKS_EVER_MAX => Ok(()),
            _ => Err(SessionFailure::lasting(format!(
                "the server has announced more than {TRACKS_EVER_MAX} tracks to one participant"
            ))),
        }
    }

    /// Tells the shard which streams came and went. An updated track is the same stream with other
    /// details; the shard adds what is new.
    fn take_streams<'a>(
        &mut self,
        role: PeerRole,
        removed: &[RemoteTrack],
        added: impl Iterator<Item = &'a RemoteTrack>,
    ) {
        let key = self.key(role);
        removed
            .iter()
            .for_each(|track| self.viewer.remove(track.ssrc));
        if !removed.is_empty() {
            self.command(ShardCommand::Unsubscribe {
                key,
                ssrcs: removed.iter().map(|track| track.ssrc).collect(),
            });
        }
        let announced_at = self.context.epoch.now();
        let mut streams: Vec<StreamParameters> = Vec::new();
        for track in added {
            if track.kind() == Kind::Video {
                self.viewer.add(track);
            }
            let here = (self.plan.room, self.plan.index);
            let strangers = &self.context.strangers;
            strangers.note_stream(here, track.ssrc, &track.track_id);
            streams.push(stream_parameters(track, announced_at));
        }
        if !streams.is_empty() {
            self.command(ShardCommand::Subscribe { key, streams });
        }
    }

    /// Tells the server what is watched, as far as it does not know.
    async fn tell_what_is_watched(
        &mut self,
        sender: &mut SignalSender,
    ) -> Result<(), SessionFailure> {
        let key = self.receiving_key();
        for change in self.viewer.poll_changes() {
            let at = self.context.epoch.now();
            self.command(ShardCommand::Watch {
                key,
                ssrc: change.ssrc,
                layer: change.layer,
                at,
            });
            sender
                .send(SignalRequest::TrackSetting(change.settings()))
                .await?;
        }
        Ok(())
    }

    /// Handles tracks that the server paused for want of bandwidth, or resumed.
    fn handle_stream_states(&self, states: &[proto::StreamStateInfo]) {
        let at = self.context.epoch.now();
        for state in states {
            if let Some(ssrc) = self.viewer.ssrc(&state.track_sid) {
                self.command(ShardCommand::SetPaused {
                    key: self.receiving_key(),
                    ssrc,
                    paused: state.state() == proto::StreamState::Paused,
                    at,
                });
            }
        }
    }

    /// Returns the key of the connection on which the server's tracks come.
    fn receiving_key(&self) -> PeerKey {
        self.key(if self.context.single_connection {
            PeerRole::Publisher
        } else {
            PeerRole::Subscriber
        })
    }

    /// Tells the shard which layers are watched; the others rest (dynacast). A client without
    /// dynacast sends them all the same.
    fn handle_subscribed_quality(&self, update: &proto::SubscribedQualityUpdate) {
        if !self.group().dynacast {
            return;
        }
        let track = self
            .tracks
            .iter()
            .find(|track| track.sid() == Some(&update.track_sid));
        if let Some((track, layers)) =
            track.and_then(|track| Some((track, track.watched_layers(update)?)))
        {
            self.command(ShardCommand::SetLayers {
                key: self.place.key,
                track: track_number(track.kind()),
                layers,
            });
        }
    }

    async fn handle_request(
        &mut self,
        request: Request,
        sender: &mut SignalSender,
    ) -> Result<(), SessionFailure> {
        match request {
            Request::SetMuted { kind, muted } => self.set_muted(kind, muted, sender).await,
            Request::Show(size) => {
                self.viewer.show_all(size);
                self.tell_what_is_watched(sender).await
            }
            Request::Leave => {
                let drain = if self.joined {
                    LEAVE_DRAIN
                } else {
                    Duration::ZERO
                };
                self.leave_at(self.context.epoch.now() + drain);
                Ok(())
            }
        }
    }

    async fn handle_trickle(
        &mut self,
        trickle: &Trickle,
        sender: &mut SignalSender,
    ) -> Result<(), SessionFailure> {
        let role = if trickle.target == proto::SignalTarget::Publisher {
            PeerRole::Publisher
        } else {
            PeerRole::Subscriber
        };
        let half = self.half_mut(role);
        if trickle.last {
            half.has_all_candidates();
        }
        // A candidate that cannot be read only costs a path.
        let Ok(Trickled {
            candidate: Some(candidate),
            ..
        }) = trickle.candidate_init.parse()
        else {
            return Ok(());
        };
        if !half.added {
            half.keep_candidate(candidate);
            return Ok(());
        }
        half.trickled += 1;
        if half.trickled > TRICKLED_MAX {
            return Ok(());
        }
        let context = self.context.clone();
        let Some(address) = self.half_mut(role).reach(&candidate, &context) else {
            return Ok(());
        };
        self.hand_over_paths(role);
        let key = self.key(role);
        self.command(ShardCommand::AddRemoteCandidate { key, address });
        self.tell_addresses(role, sender).await
    }

    /// Gives the shard the sockets that were opened for candidates.
    fn hand_over_paths(&mut self, role: PeerRole) {
        let key = self.key(role);
        if !self.half_mut(role).added {
            return;
        }
        for (path, end) in self.half_mut(role).take_paths() {
            self.command(ShardCommand::AddPath { key, path, end });
        }
    }

    /// Tells the server our addresses that no description has named.
    async fn tell_addresses(
        &mut self,
        role: PeerRole,
        sender: &mut SignalSender,
    ) -> Result<(), SessionFailure> {
        let target = match role {
            PeerRole::Publisher => proto::SignalTarget::Publisher,
            PeerRole::Subscriber => proto::SignalTarget::Subscriber,
        };
        for candidate_init in self.half_mut(role).take_untold() {
            sender.trickle(target, candidate_init).await?;
        }
        Ok(())
    }

    async fn handle_engine(
        &mut self,
        event: ShardEvent,
        sender: &mut SignalSender,
    ) -> Result<(), SessionFailure> {
        match event {
            ShardEvent::IceRestarted { .. } => {
                if let Some((answer, id)) = self.held_answer.take() {
                    sender.answer(answer, id).await?;
                }
            }
            ShardEvent::IceConnected { key, at } => {
                debug!(connection = ?self.role_of(key), "ICE is connected");
                self.half_of(key).ice_at = Some(at);
                self.note_phases();
            }
            ShardEvent::Connected {
                key,
                ice_at,
                at,
                via,
            } => {
                let ice = ice_at.map(|at| at.since(self.timeline.intended));
                debug!(
                    connection = ?self.role_of(key),
                    ice = ice.map(field::debug),
                    dtls = ?at.since(self.timeline.intended),
                    "ICE and DTLS are done"
                );
                let half = self.half_of(key);
                (half.ice_at, half.connected_at, half.via) = (ice_at, Some(at), via);
                half.settle_relays();
                if key == self.place.key {
                    self.publish();
                }
                return self.check_joined();
            }
            ShardEvent::Moved { key, via } => self.handle_move(key, via),
            ShardEvent::FirstMedia { at, .. } => {
                let timeline = self.first_timeline.as_mut().unwrap_or(&mut self.timeline);
                if timeline.first_media.is_none() {
                    timeline.first_media = Some(at);
                    let after = at.since(timeline.intended);
                    debug!(?after, "the first media came");
                    self.notify(Notice::Phase(JoinPhase::FirstMedia, after));
                }
            }
            ShardEvent::Failed { key, failure } => {
                debug!(connection = ?self.role_of(key), ?failure, "a media connection ended");
                let reason = self.half_of(key).end_of_media(failure);
                return Err(SessionFailure::of(reason, Cure::Rejoin));
            }
        }
        Ok(())
    }

    /// ICE has another path after a restart.
    fn handle_move(&mut self, key: PeerKey, via: Via) {
        debug!(connection = ?self.role_of(key), ?via, "ICE has another path");
        if let Some(why) = self.half_of(key).take_move(via) {
            self.notify(Notice::FellBack { why });
        }
        self.note_media_back();
    }

    /// Starts publishing. Each track gets a slot of its own, spread over the frame interval by the
    /// participant's index.
    fn publish(&mut self) {
        let ready = self.context.epoch.now() + FIRST_FRAME_DELAY;
        let mut parameters = Vec::new();
        for track in &self.tracks {
            let first_frame_at = track.first_slot(&self.plan, ready);
            parameters.extend(track.send_parameters(
                &self.plan,
                self.context.roster.run,
                first_frame_at,
            ));
        }
        if !parameters.is_empty() {
            self.command(ShardCommand::Publish {
                key: self.place.key,
                tracks: parameters,
            });
        }
    }

    /// Notes the phases reached. A phase is reached when every wanted connection has reached it.
    fn note_phases(&mut self) {
        let wanted = || {
            [&self.publisher, &self.subscriber]
                .into_iter()
                .filter(|half| half.wanted)
        };
        let all = |moment: fn(&PeerHalf) -> Option<Time>| {
            if wanted().all(|half| moment(half).is_some()) {
                wanted().filter_map(moment).max()
            } else {
                None
            }
        };
        (self.timeline.ice_connected, self.timeline.dtls_connected) =
            (all(|half| half.ice_at), all(|half| half.connected_at));
    }

    fn check_joined(&mut self) -> Result<(), SessionFailure> {
        let waiting = self.timeline.signal_joined.is_none()
            || self.publisher.is_missing()
            || self.subscriber.is_missing();
        if self.joined || waiting {
            return Ok(());
        }
        self.joined = true;
        self.note_phases();
        self.timeline.joined = self
            .timeline
            .dtls_connected
            .max(self.timeline.signal_joined);
        if self.first_timeline.is_some() {
            self.tell_reconnected();
        } else {
            self.first_timeline = Some(self.timeline);
            let after = self
                .timeline
                .joined
                .map(|at| at.since(self.timeline.intended));
            info!(after = after.map(field::debug), "joined");
            self.tell_phases();
            self.notify(Notice::Joined {
                index: self.plan.index,
                transport: self.transport(),
            });
            let halves = [&self.publisher, &self.subscriber];
            let why = halves.into_iter().find_map(PeerHalf::why_not_udp);
            if let Some(why) = why {
                self.notify(Notice::FellBack { why });
            }
        }
        Ok(())
    }

    /// Reports the phases of the join in the attempt that counts: the one that succeeded, or the
    /// last one.
    fn tell_phases(&self) {
        let timeline = &self.timeline;
        for (phase, at) in [
            (JoinPhase::SignalConnect, timeline.signal_connected),
            (JoinPhase::SignalJoin, timeline.signal_joined),
            (JoinPhase::Ice, timeline.ice_connected),
            (JoinPhase::Dtls, timeline.dtls_connected),
            (JoinPhase::Join, timeline.joined),
        ] {
            if let Some(at) = at {
                self.notify(Notice::Phase(phase, at.since(timeline.intended)));
            }
        }
    }

    /// Takes the other end of a connection from a description. The shard gets a new connection, or
    /// restarts ICE on an existing one.
    fn take_remote(
        &mut self,
        role: PeerRole,
        remote: &RemoteTransport,
        ice_controlling: bool,
        setup: DtlsSetup,
        engine: &mpsc::UnboundedSender<ShardEvent>,
    ) {
        let key = self.key(role);
        let (context, now) = (self.context.clone(), self.context.epoch.now());
        let change =
            self.half_mut(role)
                .take_remote(remote, ice_controlling, setup, (&context, now));
        let command = match change {
            None => return,
            Some(DescriptionChange::Restart {
                local,
                remote,
                remote_candidates,
                by_relays,
            }) => ShardCommand::RestartIce {
                key,
                local,
                remote,
                remote_candidates,
                by_relays,
            },
            Some(DescriptionChange::New { path, parameters }) => {
                let peer = NewPeer {
                    participant: self.plan.index,
                    room: self.plan.room,
                    parameters,
                    rtcp_ssrc: Ssrc(self.plan.seed as u32 | 1),
                    obeys_bandwidth: self.group().obey_bandwidth,
                    data: self.data_role(role),
                    cname: self.plan.identity.clone(),
                    // Media is expected from when the participant should have joined, or was lost.
                    intended_at: self
                        .lost
                        .as_ref()
                        .map_or(self.timeline.intended, |lost| lost.at),
                };
                ShardCommand::AddPeer {
                    key,
                    path: Some(path),
                    peer: Box::new(peer),
                    events: engine.clone(),
                }
            }
        };
        self.command(command);
        self.hand_over_paths(role);
    }

    /// Returns how a connection serves data channels, for a server that demands them.
    fn data_role(&self, role: PeerRole) -> Option<DataRole> {
        self.needs_data.then_some(match role {
            PeerRole::Publisher => DataRole::Opens,
            PeerRole::Subscriber => DataRole::Accepts,
        })
    }

    fn remove_peers(&self) {
        for role in PeerRole::BOTH {
            self.command(ShardCommand::RemovePeer {
                key: self.key(role),
            });
        }
    }

    fn end(mut self, failure: Option<SessionFailure>) {
        let index = self.plan.index;
        self.context.strangers.release((self.plan.room, index));
        if failure.is_some() || self.leaves_at.is_some() {
            self.remove_peers();
        }
        let failure = failure.map(|failure| SessionFailure {
            reason: self.whole_story(&failure.reason),
            ..failure
        });
        match (&failure, &self.lost) {
            (Some(failure), _) if self.first_timeline.is_none() => {
                warn!(why = failure.reason, "could not join");
                self.tell_phases();
                self.notify(Notice::JoinFailed {
                    index,
                    reason: failure.reason.clone(),
                    kept_out: failure.kept_out,
                });
            }
            (None, Some(lost)) if !lost.is_gone => {
                self.disconnects += 1;
                let end = match self.leaves_at {
                    Some(_) => "not resumed before it was to leave",
                    None => "not resumed before the end of the run",
                };
                self.notify(Notice::Disconnected {
                    index,
                    at: lost.at,
                    server_reason: None,
                    reason: format!("{}; {end}", lost.story()),
                });
            }
            (Some(failure), _) => warn!(why = failure.reason, "is gone for good"),
            // The participant was told to leave, in the room or on its way in.
            (None, _) => info!("left"),
        }
        self.notify(Notice::Ended(Box::new(Ended {
            index,
            identity: self.plan.identity.clone(),
            room: self.room.clone(),
            timeline: self.first_timeline.unwrap_or(self.timeline),
            failure: failure.map(|failure| failure.reason),
            transport: self.first_timeline.map(|_| self.transport()),
            disconnects: self.disconnects,
            video_shown: self.viewer.shown_ever(),
        })));
    }

    /// Returns the last failure, together with the first cause.
    fn whole_story(&self, last: &str) -> String {
        match (&self.first_failure, &self.lost) {
            (Some(first), _) if self.first_timeline.is_none() && first != last => format!(
                "{last} (attempt {}; the first one: {first})",
                self.join_retries + 1
            ),
            (_, Some(lost)) => lost.chain(last),
            (_, None) => last.to_owned(),
        }
    }

    fn timeout_reason(&self) -> String {
        let half = if self.publisher.is_missing() {
            &self.publisher
        } else {
            &self.subscriber
        };
        let ice = |of: &str| format!("ICE and DTLS{of} ({})", half.port_question());
        let waiting_for = match () {
            () if self.timeline.signal_joined.is_none() => "the server's Join".to_owned(),
            () if self.publisher.wanted && !self.publisher.added => {
                "the server's answer to our offer".to_owned()
            }
            () if self.subscriber.wanted && !self.subscriber.added => {
                "the server's offer".to_owned()
            }
            () if self.publisher.is_missing() && self.context.single_connection => ice(""),
            () if self.publisher.is_missing() => ice(" of the publisher connection"),
            () => ice(" of the subscriber connection"),
        };
        let ends = half.ends();
        format!(
            "no join within {} s: waiting for {waiting_for}{ends}",
            JOIN_TIMEOUT.as_secs()
        )
    }

    fn notify(&self, notice: Notice) {
        // The run stops listening only when it is over.
        let _ = self.context.notices.send(notice);
    }

    fn command(&self, command: ShardCommand) {
        // A shard ends only when the run is over.
        let _ = self.context.shards[self.place.shard].send(command);
    }

    fn key(&self, role: PeerRole) -> PeerKey {
        PeerKey(self.place.key.0 + usize::from(role == PeerRole::Subscriber))
    }

    fn half_mut(&mut self, role: PeerRole) -> &mut PeerHalf {
        match role {
            PeerRole::Publisher => &mut self.publisher,
            PeerRole::Subscriber => &mut self.subscriber,
        }
    }

    fn half_of(&mut self, key: PeerKey) -> &mut PeerHalf {
        self.half_mut(self.role_of(key))
    }

    fn role_of(&self, key: PeerKey) -> PeerRole {
        if key == self.place.key {
            PeerRole::Publisher
        } else {
            PeerRole::Subscriber
        }
    }
}

fn closed_by_server(reason: &str) -> SessionFailure {
    let closed = "the server closed the signalling connection";
    SessionFailure::lost(if reason.is_empty() {
        closed.to_owned()
    } else {
        format!("{closed}: {reason}")
    })
}

/// Returns the server's reason for the end, if it arrives soon.
async fn leave_reason(receiver: &mut SignalReceiver) -> Option<SessionFailure> {
    let leave = async {
        loop {
            match receiver.next().await {
                Ok(SignalEvent::Leave(leave)) => return Some(SessionFailure::from(&leave)),
                Ok(SignalEvent::Closed { .. }) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    };
    tokio::time::timeout(LEAVE_WAIT, leave).await.ok().flatten()
}

/// Completes when everybody is to leave, or the run is gone.
pub async fn leaving(leave: &mut watch::Receiver<bool>) {
    let _ = leave.wait_for(|leave| *leave).await;
}
