//! One world: sessions with their links, the lobby and its routers, all in one process and in
//! virtual time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use livekit_protocol as proto;
use prost::Message as _;
use proto::signal_request::Message as Request;
use throng::codec::Codec;
use throng::engine::publisher::{Redundancy, SendParameters, SimulcastLayer};
use throng::engine::shard::Shard;
use throng::engine::{
    NewPeer, PeerKey, Roster, ShardCommand, ShardConfig, ShardEvent, StreamParameters, track_number,
};
use throng::measure::Kind;
use throng::media::identity::{FrameIdentity, Origin};
use throng::secrets::Secrets;
use throng::sfu::lobby::{ConnectionId, Entrant, Lobby, LobbyConfig, LobbyOutput};
use throng::sfu::router::{Router, RouterConfig};
use throng::sfu::statistics::RouterStatistics;
use throng::sfu::{
    ClientEnd, MediaCommand, MediaEvent, Outgoing, SubscriptionId, TrackId, TransportId,
};
use throng::transport::peer::{IceCredentials, Identity, PeerParameters};
use throng::transport::rtp::{Datagram as Class, Header, classify};
use throng::transport::sdp::{Extension, RemoteTrack};
use throng::units::{Bitrate, Epoch, Time};

use crate::client::{Client, Half, Todo};
use crate::common::link::{Datagram, Link, Outlet};
use crate::media::clips;
use crate::plan::{ACTIVE, DRAIN, Parting, Person, Plan, Role};
use crate::witness::{Tampering, Witness};

pub const TICK: Duration = Duration::from_millis(1);
pub const RUN: u32 = 77;
/// Time after the last goodbye in which packets that are under way still arrive.
const GOODBYE: Duration = Duration::from_millis(500);
/// Time after which rooms and silent participants are gone by the lobby's own limits (20 s each,
/// and 15 s for a silent connection).
const FORGOTTEN: Duration = Duration::from_secs(60);

/// Something that is wrong on purpose. The invariants must notice it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defect {
    /// A link drops datagrams and does not log it.
    LinkSwallows,
    /// A byte changes on a link.
    LinkCorrupts,
    /// The lobby's command to end a subscription or a connection never reaches its router.
    RemovalForgotten,
    SubscribeForgotten,
    /// A router gives a subscriber a track of another room.
    RoomsMixed,
    /// A router is not told that time has passed.
    TimerForgotten,
    /// Something that a router might do to the media that a witness gets.
    Media(Tampering),
}

/// Rule that must hold in every world.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// What enters a link comes out, is logged as lost, or is under way.
    LinksConserve,
    /// Each datagram that reaches a router has one fate, and the fate fits its kind.
    RoutersAccount,
    /// Each packet that a router takes is sent to each subscriber of its track, or withheld for a
    /// stated reason.
    RoutersForwardAll,
    /// What publishers and subscribers count is what the links carried.
    EnginesAccount,
    WitnessesAccount,
    NobodyForges,
    CommandsAreTaken,
    /// Routers have what the lobby asked for, and everybody is connected.
    AllArePresent,
    /// The server ends no session, and no connection fails, without a reason.
    SessionsLast,
    RoomsAreApart,
    /// A source that was thrown out owes each frame that it does not make, slot by slot.
    SourcesOwe,
    /// Every stream that a description announces arrives.
    StreamsFlow,
    /// If nothing is lost, every frame arrives.
    PerfectLinksDeliver,
    /// The bytes of frames are those that were published, and everything that a frame needs is
    /// there before it. Numbers, picture ids and timestamps go on.
    FramesDecode,
    HistogramsCount,
    NothingIsOverdue,
    /// Nothing is left of those who have gone.
    AllIsForgotten,
}

/// A reliable connection that keeps order, as a WebSocket does.
pub struct Pipe<T> {
    queue: VecDeque<(Time, T)>,
    last: Time,
}

impl<T> Pipe<T> {
    fn new() -> Pipe<T> {
        Pipe {
            queue: VecDeque::new(),
            last: Time::ZERO,
        }
    }

    fn push(&mut self, at: Time, item: T) {
        self.last = self.last.max(at);
        self.queue.push_back((self.last, item));
    }

    fn pop(&mut self, now: Time) -> Option<T> {
        self.queue.front().filter(|(at, _)| *at <= now)?;
        self.queue.pop_front().map(|(_, item)| item)
    }
}

pub enum ToServer {
    Entry(Box<Entrant>),
    Request(Box<Request>),
    Lost,
}

pub enum ToClient {
    Message(Vec<u8>),
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    NotYet,
    In,
    Gone,
}

pub enum Receiver {
    /// Shard, and key of the publisher connection. The subscriber connection has the next key.
    Engine {
        shard: usize,
        key: PeerKey,
    },
    Witness(Box<Witness>),
}

/// What became of the RTP datagrams that reached an engine participant, as far as the world knows.
#[derive(Clone, Copy, Debug, Default)]
pub struct EngineArrivals {
    /// Datagrams of a stream that it expects, on a connection that is up.
    pub expected: u64,
    /// Datagrams that came before the stream was expected or the connection up, or after that.
    pub early: u64,
}

/// What a description said about a stream.
pub struct Announced {
    pub track_sid: String,
    pub at: Time,
    pub half: Half,
}

pub struct Session {
    pub person: Person,
    pub client: Client,
    pub stage: Stage,
    pub left_at: Option<Time>,
    pub receiver: Receiver,
    pub up: Link,
    pub down: Link,
    pub to_server: Pipe<ToServer>,
    pub to_client: Pipe<ToClient>,
    connection: Option<ConnectionId>,
    pub addresses: [SocketAddr; 2],
    /// Whether each socket is open.
    open: [bool; 2],
    pub connected: [Option<Time>; 2],
    /// SSRCs that each connection expects now.
    expects: [BTreeSet<Ssrc>; 2],
    /// Every stream that was ever announced, by media SSRC.
    pub announced: BTreeMap<Ssrc, Announced>,
    pub arrivals: EngineArrivals,
    acts_done: usize,
    pub is_thrown_out: bool,
    signal_chance: throng::seeded::Seeded,
}

/// The world's own counts, for comparison with those of everybody else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Datagrams that came out of uplinks at a router, and their bytes.
    pub at_routers: u64,
    pub at_routers_bytes: u64,
    /// Datagrams that routers sent, and their bytes.
    pub by_routers: u64,
    pub by_routers_bytes: u64,
    /// Datagrams that came out of a downlink when nobody had their socket open any more.
    pub to_closed: u64,
    pub to_engines: u64,
    pub to_engines_bytes: u64,
    pub rtp_to_engines: u64,
    pub to_witnesses: u64,
    pub rtp_to_witnesses: u64,
    /// Bytes that engine participants sent, and the RTP packets among their datagrams.
    pub by_engines_bytes: u64,
    pub rtp_by_engines: u64,
    /// Packets that routers took, each times the number of subscribers of its track.
    pub fan_out: u64,
    pub sessions_resumed: u64,
    pub sessions_replaced: u64,
    pub thrown_out: u64,
    pub ice_restarts: u64,
}

/// Origin and subscribers of a track, by the lobby's commands.
pub struct KnownTrack {
    pub session: usize,
    pub transport: TransportId,
    pub router: usize,
    pub subscribers: BTreeSet<SubscriptionId>,
}

pub struct World {
    pub plan: Plan,
    pub now: Time,
    pub epoch: Epoch,
    pub roster: Arc<Roster>,
    pub sessions: Vec<Session>,
    pub shards: Vec<Shard>,
    outlets: Vec<Outlet>,
    pub lobby: Lobby,
    pub routers: Vec<Router>,
    router_outlets: Vec<RouterOutlet>,
    identity: Identity,
    connections: BTreeMap<ConnectionId, usize>,
    /// Router and session of each connection, by the lobby's commands.
    transports: BTreeMap<TransportId, (usize, usize)>,
    pub tracks: BTreeMap<TrackId, KnownTrack>,
    pub subscriptions: BTreeMap<SubscriptionId, (TrackId, TransportId)>,
    pub tally: Tally,
    pub violations: BTreeMap<Rule, String>,
    /// Digest of everything that happened, except keys and their lengths.
    pub digest: u64,
    defect: Option<Defect>,
    draining: bool,
    defect_chance: throng::seeded::Seeded,
    pub defects_done: u64,
}

struct RouterOutlet {
    address: SocketAddr,
    sent: Vec<Datagram>,
    buffer: Vec<u8>,
}

impl Outgoing for RouterOutlet {
    fn lend(&mut self) -> &mut [u8] {
        &mut self.buffer
    }

    fn send(&mut self, to: ClientEnd, len: usize, segment: usize) {
        let datagrams = self.buffer[..len].chunks(segment).map(|bytes| Datagram {
            from: self.address,
            to: to.address,
            bytes: bytes.to_vec(),
        });
        self.sent.extend(datagrams);
    }
}

fn router_address(router: usize) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::new(192, 0, 2, 1 + router as u8), 7_882))
}

fn addresses(person: &Person) -> [SocketAddr; 2] {
    [0, 1].map(|half| {
        SocketAddr::from((
            Ipv4Addr::new(198, 51, 100, 1 + person.index as u8),
            1_000 + half,
        ))
    })
}

impl World {
    pub fn new(plan: Plan, defect: Option<Defect>) -> World {
        let identity = &Identity::simulated(plan.seed).unwrap();
        let epoch = Epoch::simulated(Duration::from_secs(1_700_000_000));
        let roster = Arc::new(Roster::new(
            RUN,
            plan.people.iter().map(|person| person.room),
        ));
        let config = ShardConfig {
            identity: identity.clone(),
            roster: roster.clone(),
            epoch,
        };
        let mut keys = vec![Vec::new(); plan.shards];
        let sessions = plan
            .people
            .iter()
            .map(|person| new_session(person, plan.seed, identity, &mut keys))
            .collect();
        let router = |index: usize| {
            let config = RouterConfig {
                identity: identity.clone(),
                epoch,
                local: router_address(index).into(),
                send: plan.send,
                seed: plan.seed + index as u64,
            };
            Router::new(config, Time::ZERO)
        };
        World {
            now: Time::ZERO,
            epoch,
            roster,
            sessions,
            shards: keys
                .iter()
                .map(|keys| Shard::new(config.clone(), keys.len(), Time::ZERO))
                .collect(),
            outlets: keys.into_iter().map(Outlet::new).collect(),
            lobby: Lobby::new(LobbyConfig {
                seed: plan.seed,
                secrets: Secrets::keyed_for_tests(plan.seed),
                epoch,
                fingerprint: identity.fingerprint(),
                routers: (0..plan.routers)
                    .map(|router| router_address(router).into())
                    .collect(),
            }),
            routers: (0..plan.routers).map(router).collect(),
            router_outlets: (0..plan.routers)
                .map(|index| RouterOutlet {
                    address: router_address(index),
                    sent: Vec::new(),
                    buffer: vec![0; throng::net::SEND_BYTES_MAX],
                })
                .collect(),
            identity: identity.clone(),
            connections: BTreeMap::new(),
            transports: BTreeMap::new(),
            tracks: BTreeMap::new(),
            subscriptions: BTreeMap::new(),
            tally: Tally::default(),
            violations: BTreeMap::new(),
            digest: 0,
            defect,
            draining: false,
            defect_chance: throng::seeded::Seeded::new(plan.seed),
            defects_done: 0,
            plan,
        }
    }

    /// Runs the world until everything that could arrive has arrived. Everybody is still there.
    pub fn run(&mut self) {
        self.run_until(Time::ZERO + ACTIVE);
        self.draining = true;
        for (shard, outlet) in self.shards.iter_mut().zip(&mut self.outlets) {
            shard.handle_command(ShardCommand::StopPublishing, self.now, outlet);
        }
        self.run_until(Time::ZERO + ACTIVE + DRAIN);
    }

    /// Lets everybody leave, and the server forget them.
    pub fn empty(&mut self) {
        for index in 0..self.sessions.len() {
            if self.sessions[index].stage == Stage::In {
                self.leave(index, Parting::Goodbye);
            }
        }
        self.run_until(self.now + GOODBYE);
        let end = self.now + FORGOTTEN;
        loop {
            let next = self
                .routers
                .iter()
                .map(Router::next_timeout)
                .fold(self.lobby.next_timeout(), Time::min);
            if next.max(self.now) > end {
                break;
            }
            // Time advances by at least one tick, so that a timer that stays due does not stop the
            // loop.
            self.now = next.max(self.now + TICK);
            self.server_turn();
        }
    }

    /// Applies a defect of the media, if one is planted.
    pub fn tamper(&mut self) {
        let Some(Defect::Media(tampering)) = self.defect else {
            return;
        };
        for session in &mut self.sessions {
            if let Receiver::Witness(witness) = &mut session.receiver {
                self.defects_done += witness.tamper(tampering);
            }
        }
    }

    fn run_until(&mut self, end: Time) {
        while self.now < end {
            self.tick();
        }
    }

    /// Checks something that must hold. The first violation of each rule is kept.
    pub fn check(&mut self, rule: Rule, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            let now = self.now;
            self.violations
                .entry(rule)
                .or_insert_with(|| format!("at {} ms: {}", now.as_millis(), what()));
        }
    }

    fn note(&mut self, word: u64) {
        self.digest =
            throng::seeded::mixed(self.digest.rotate_left(7) ^ word.wrapping_add(0x9E37_79B9));
    }

    /// Advances the world by one millisecond.
    fn tick(&mut self) {
        self.now += TICK;
        self.set_weather();
        self.play_scripts();
        self.carry_signals();
        self.deliver_to_routers();
        self.server_turn();
        self.deliver_to_clients();
        self.clients_turn();
        self.send_off();
        self.check_timers();
    }

    fn set_weather(&mut self) {
        for session in &mut self.sessions {
            let person = &session.person;
            (session.up.conditions, session.down.conditions) = if self.draining {
                (person.up.calm(), person.down.calm())
            } else {
                (person.up.at(self.now), person.down.at(self.now))
            };
        }
    }

    // What participants do by themselves.

    fn play_scripts(&mut self) {
        for index in 0..self.sessions.len() {
            let session = &mut self.sessions[index];
            if session.stage == Stage::NotYet && session.person.joins_at <= self.now {
                session.stage = Stage::In;
                let entry = session.client.entry();
                self.send_signal(index, ToServer::Entry(Box::new(entry)));
            }
            let session = &mut self.sessions[index];
            if session.stage != Stage::In || self.draining {
                continue;
            }
            if let Some(leave) = session.person.leaves.filter(|leave| leave.at <= self.now) {
                self.leave(index, leave.how);
                continue;
            }
            let mut todo = Vec::new();
            while let Some((_, act)) = session
                .person
                .acts
                .get(session.acts_done)
                .filter(|(at, _)| *at <= self.now)
            {
                session.acts_done += 1;
                session.client.act(*act, &mut todo);
            }
            self.carry_out(index, todo);
        }
    }

    fn leave(&mut self, index: usize, how: Parting) {
        let word = match how {
            Parting::Goodbye => {
                ToServer::Request(Box::new(Request::Leave(proto::LeaveRequest::default())))
            }
            Parting::Silence => ToServer::Lost,
            Parting::ThrownOut => {
                // The server's message is on its way. The participant goes when it has come.
                let person = &self.sessions[index].person;
                let room = format!("room-{}", person.room);
                let identity = person.identity.clone();
                self.tally.thrown_out +=
                    u64::from(self.lobby.remove_participant(&room, &identity, self.now));
                self.sessions[index].person.leaves = None;
                self.sessions[index].is_thrown_out = true;
                self.server_outputs();
                return;
            }
        };
        self.send_signal(index, word);
        self.close(index, true);
    }

    /// Closes the participant's sockets.
    fn close(&mut self, index: usize, by_plan: bool) {
        let session = &mut self.sessions[index];
        session.stage = Stage::Gone;
        session.left_at = Some(self.now);
        let was_open = std::mem::take(&mut session.open);
        if let Receiver::Engine { shard, key } = session.receiver {
            for half in Half::BOTH
                .into_iter()
                .filter(|half| was_open[*half as usize])
            {
                let key = key_of(key, half);
                if by_plan {
                    self.shards[shard].handle_command(
                        ShardCommand::Leave { key },
                        self.now,
                        &mut self.outlets[shard],
                    );
                }
                self.shards[shard].remove_peer(key);
            }
        }
    }

    // Signalling.

    fn send_signal(&mut self, index: usize, word: ToServer) {
        let now = self.now;
        let session = &mut self.sessions[index];
        let at = now + session.signal_delay();
        session.to_server.push(at, word);
    }

    fn carry_signals(&mut self) {
        for index in 0..self.sessions.len() {
            while let Some(word) = self.sessions[index].to_server.pop(self.now) {
                self.handle_at_server(index, word);
            }
            while let Some(word) = self.sessions[index].to_client.pop(self.now) {
                self.handle_at_client(index, word);
            }
        }
    }

    fn handle_at_server(&mut self, index: usize, word: ToServer) {
        let connection = self.sessions[index].connection;
        match (word, connection) {
            (ToServer::Entry(entry), _) => {
                self.tally.sessions_resumed += u64::from(entry.resume.is_some());
                let connection = self.lobby.handle_entry(*entry, self.now);
                self.sessions[index].connection = Some(connection);
                self.connections.insert(connection, index);
            }
            (ToServer::Request(request), Some(connection)) => {
                self.note(request.encoded_len() as u64);
                let request = proto::SignalRequest {
                    message: Some(*request),
                };
                self.lobby.handle_request(connection, request, self.now);
            }
            (ToServer::Lost, Some(connection)) => {
                self.sessions[index].connection = None;
                self.lobby.handle_disconnect(connection, self.now);
            }
            (_, None) => {}
        }
        self.server_outputs();
    }

    fn handle_at_client(&mut self, index: usize, word: ToClient) {
        if self.sessions[index].stage != Stage::In {
            return;
        }
        let mut todo = Vec::new();
        match word {
            ToClient::Message(bytes) => {
                self.note(bytes.len() as u64);
                let message = proto::SignalResponse::decode(bytes.as_slice())
                    .expect("a message of the lobby")
                    .message;
                let client = &mut self.sessions[index].client;
                message
                    .into_iter()
                    .for_each(|message| client.handle(message, &mut todo));
            }
            ToClient::Closed => todo.push(Todo::Gone("closed".into())),
        }
        self.carry_out(index, todo);
    }

    fn carry_out(&mut self, index: usize, todo: Vec<Todo>) {
        for step in todo {
            if self.sessions[index].stage != Stage::In {
                return;
            }
            match step {
                Todo::Send(request) => self.send_signal(index, ToServer::Request(request)),
                Todo::AddPeer { half, parameters } => self.add_peer(index, half, parameters),
                Todo::Streams {
                    half,
                    removed,
                    added,
                } => self.take_streams(index, half, &removed, &added),
                Todo::RestartIce {
                    half,
                    local,
                    remote,
                    remote_candidates,
                } => self.restart_ice(index, half, local, remote, remote_candidates),
                Todo::SetLayers { kind, layers } => {
                    let track = track_number(kind);
                    self.command(index, Half::Publisher, |key| ShardCommand::SetLayers {
                        key,
                        track,
                        layers,
                    });
                }
                Todo::SetMuted { kind, muted } => {
                    let track = track_number(kind);
                    self.command(index, Half::Publisher, |key| ShardCommand::SetMuted {
                        key,
                        track,
                        muted,
                    });
                }
                Todo::Watch { track_sid, layer } => self.watch(index, &track_sid, layer),
                Todo::LoseSignal(away) => self.lose_signal(index, away),
                Todo::Gone(reason) => self.handle_end(index, &reason),
            }
        }
    }

    /// Gives a command to the shard of an engine participant.
    fn command(&mut self, index: usize, half: Half, command: impl FnOnce(PeerKey) -> ShardCommand) {
        if let Receiver::Engine { shard, key } = self.sessions[index].receiver {
            let command = command(key_of(key, half));
            self.shards[shard].handle_command(command, self.now, &mut self.outlets[shard]);
        }
    }

    fn restart_ice(
        &mut self,
        index: usize,
        half: Half,
        local: IceCredentials,
        remote: IceCredentials,
        remote_candidates: Vec<SocketAddr>,
    ) {
        self.tally.ice_restarts += 1;
        if let Receiver::Witness(witness) = &mut self.sessions[index].receiver {
            return witness.restart_ice(half, &local, &remote, &remote_candidates, self.now);
        }
        self.command(index, half, |key| ShardCommand::RestartIce {
            key,
            local,
            remote,
            remote_candidates,
            by_relays: false,
        });
    }

    fn watch(&mut self, index: usize, track_sid: &str, layer: Option<u8>) {
        let announced = self.sessions[index].announced.iter();
        // A track that was given up and asked for again has come on more than one SSRC. The latest
        // counts.
        let latest = announced
            .filter(|(_, stream)| stream.track_sid == track_sid)
            .max_by_key(|(_, stream)| stream.at);
        let Some((ssrc, half)) = latest.map(|(ssrc, stream)| (*ssrc, stream.half)) else {
            return;
        };
        let at = self.now;
        self.command(index, half, |key| ShardCommand::Watch {
            key,
            ssrc,
            layer,
            at,
        });
    }

    /// Breaks the signalling connection. What is under way in either direction is lost.
    fn lose_signal(&mut self, index: usize, away: Duration) {
        let session = &mut self.sessions[index];
        session.to_server.queue.clear();
        session.to_client.queue.clear();
        let resume = session.client.resume();
        let at = self.now + session.signal_delay();
        session.to_server.push(at, ToServer::Lost);
        session
            .to_server
            .push(at + away, ToServer::Entry(Box::new(resume)));
    }

    /// Handles the end of a session by the server. The server may only end a session that it has
    /// thrown out, or that another one of the same identity replaces.
    fn handle_end(&mut self, index: usize, reason: &str) {
        if self.sessions[index].is_thrown_out {
            return self.close(index, false);
        }
        self.close(index, true);
        let identity = &self.sessions[index].person.identity;
        let is_replaced = self.sessions[index + 1..]
            .iter()
            .any(|later| later.stage == Stage::In && later.person.identity == *identity);
        self.tally.sessions_replaced += u64::from(is_replaced);
        self.check(Rule::SessionsLast, is_replaced, || {
            format!("the server ended session {index}: {reason}")
        });
    }

    fn add_peer(&mut self, index: usize, half: Half, parameters: PeerParameters) {
        let session = &mut self.sessions[index];
        session.open[half as usize] = true;
        match &mut session.receiver {
            Receiver::Witness(witness) => {
                witness.add_peer(half, &parameters, &self.identity, self.epoch, self.now)
            }
            Receiver::Engine { shard, key } => {
                let peer = NewPeer {
                    participant: session.person.index,
                    room: session.person.room,
                    parameters,
                    rtcp_ssrc: Ssrc(1_000 + session.person.index * 2 + half as u32),
                    cname: session.person.identity.clone(),
                    obeys_bandwidth: false,
                    data: None,
                    intended_at: session.person.joins_at,
                };
                let (shard, key) = (*shard, key_of(*key, half));
                self.shards[shard].add_peer(key, peer, self.now, &mut self.outlets[shard]);
            }
        }
    }

    fn take_streams(
        &mut self,
        index: usize,
        half: Half,
        removed: &[RemoteTrack],
        added: &[RemoteTrack],
    ) {
        let session = &mut self.sessions[index];
        let expects = &mut session.expects[half as usize];
        for track in removed {
            expects.remove(&track.ssrc);
            track.rtx_ssrc.iter().for_each(|rtx| {
                expects.remove(rtx);
            });
        }
        for track in added {
            expects.extend([Some(track.ssrc), track.rtx_ssrc].into_iter().flatten());
            session
                .announced
                .entry(track.ssrc)
                .or_insert_with(|| Announced {
                    track_sid: track.track_id.to_string(),
                    at: self.now,
                    half,
                });
        }
        match &mut session.receiver {
            Receiver::Witness(witness) => witness.handle_streams(half, removed, added),
            Receiver::Engine { shard, key } => {
                let (shard, key) = (*shard, key_of(*key, half));
                let ssrcs = removed.iter().map(|track| track.ssrc).collect();
                let streams = added.iter().map(|track| StreamParameters {
                    payloads: track.payloads,
                    ssrc: track.ssrc,
                    rtx_ssrc: track.rtx_ssrc,
                    nack: true,
                    transport_cc_extension: None,
                    abs_send_time_extension: None,
                    announced_at: self.now,
                });
                let (io, now) = (&mut self.outlets[shard], self.now);
                self.shards[shard].handle_command(
                    ShardCommand::Unsubscribe { key, ssrcs },
                    now,
                    io,
                );
                self.shards[shard].handle_command(
                    ShardCommand::Subscribe {
                        key,
                        streams: streams.collect(),
                    },
                    now,
                    io,
                );
            }
        }
    }

    // The server.

    /// Advances the routers and the lobby, and carries what they have to say to each other.
    fn server_turn(&mut self) {
        for index in 0..self.routers.len() {
            let (router, outlet) = (&mut self.routers[index], &mut self.router_outlets[index]);
            if router.next_timeout() <= self.now {
                match self.defect {
                    Some(Defect::TimerForgotten) => self.defects_done += 1,
                    _ => router.handle_timeout(self.now, outlet),
                }
            }
        }
        self.server_outputs();
        if self.lobby.next_timeout() <= self.now {
            self.lobby.handle_timeout(self.now);
            self.server_outputs();
        }
    }

    fn server_outputs(&mut self) {
        loop {
            let mut happened = false;
            for index in 0..self.routers.len() {
                while let Some(event) = self.routers[index].poll_event() {
                    happened = true;
                    self.take_event(index, event);
                }
            }
            while let Some(output) = self.lobby.poll_output() {
                happened = true;
                self.take_output(output);
            }
            if !happened {
                return;
            }
        }
    }

    fn take_event(&mut self, router: usize, event: MediaEvent) {
        match &event {
            MediaEvent::Connected { transport, at } => {
                self.note(u64::from(transport.0) ^ at.as_nanos())
            }
            MediaEvent::Failed { transport, .. } => {
                self.note(u64::from(transport.0) << 32);
                self.forget_transport(*transport);
            }
            MediaEvent::TrackStarted { track, at } => {
                self.note(u64::from(track.0) << 16 ^ at.as_nanos())
            }
            MediaEvent::AudioLevels { levels } => levels
                .iter()
                .for_each(|(track, level)| self.note(u64::from(track.0) << 8 | u64::from(*level))),
        }
        self.lobby.handle_media(router, event, self.now);
    }

    fn take_output(&mut self, output: LobbyOutput) {
        match output {
            LobbyOutput::Send {
                connection,
                message,
            } => self.tell(connection, ToClient::Message(message.to_vec())),
            LobbyOutput::Close { connection } => self.tell(connection, ToClient::Closed),
            LobbyOutput::Media { router, command } => self.take_command(router, command),
        }
    }

    fn tell(&mut self, connection: ConnectionId, word: ToClient) {
        let index = self.connections[&connection];
        let now = self.now;
        let session = &mut self.sessions[index];
        if session.connection != Some(connection) {
            // The client knows nothing of this connection any more.
            return;
        }
        let at = now + session.signal_delay();
        session.to_client.push(at, word);
    }

    fn take_command(&mut self, router: usize, mut command: MediaCommand) {
        // A connection that has failed is gone with all that it carried. Commands of the lobby
        // about it come too late, and are refused.
        let expected = u64::from(!self.is_about_something(&command));
        self.learn(router, &command);
        if let (Some(Defect::RoomsMixed), MediaCommand::Subscribe { track, .. }) =
            (self.defect, &mut command)
        {
            let room = |known: &KnownTrack| self.sessions[known.session].person.room;
            let here = room(&self.tracks[track]);
            let elsewhere = self
                .tracks
                .iter()
                .find(|(_, known)| known.router == router && room(known) != here);
            if let Some((other, _)) = elsewhere {
                *track = *other;
                self.defects_done += 1;
            }
        }
        let forgotten = match command {
            MediaCommand::Unsubscribe { .. } | MediaCommand::RemoveTransport { .. } => {
                self.defect == Some(Defect::RemovalForgotten)
            }
            MediaCommand::Subscribe { .. } => self.defect == Some(Defect::SubscribeForgotten),
            _ => false,
        };
        if forgotten {
            self.defects_done += 1;
            return;
        }
        let refused = self.routers[router].statistics().commands_refused;
        let what = format!("{command:?}");
        self.routers[router].handle_command(command, self.now, &mut self.router_outlets[router]);
        let refused = self.routers[router].statistics().commands_refused - refused;
        self.check(Rule::CommandsAreTaken, refused == expected, || {
            format!("router {router} refused {refused}: {what}")
        });
    }

    fn is_about_something(&self, command: &MediaCommand) -> bool {
        match command {
            MediaCommand::AddTransport { .. } => true,
            MediaCommand::RestartIce { transport, .. }
            | MediaCommand::ServeData { transport, .. }
            | MediaCommand::RemoveTransport { transport }
            | MediaCommand::AddTrack { transport, .. } => self.transports.contains_key(transport),
            MediaCommand::RemoveTrack { track } => self.tracks.contains_key(track),
            MediaCommand::Subscribe {
                transport, track, ..
            } => self.transports.contains_key(transport) && self.tracks.contains_key(track),
            MediaCommand::SetSelection { subscription, .. }
            | MediaCommand::Unsubscribe { subscription } => {
                self.subscriptions.contains_key(subscription)
            }
        }
    }

    /// Keeps account of what the lobby has asked for, and checks that it asks for nothing across
    /// rooms.
    fn learn(&mut self, router: usize, command: &MediaCommand) {
        match command {
            MediaCommand::AddTransport {
                transport,
                parameters,
            } => {
                let ufrag = parameters
                    .remote
                    .ufrag
                    .strip_prefix("client")
                    .and_then(|rest| rest.split_once("half"));
                let session = ufrag
                    .and_then(|(index, _)| index.parse().ok())
                    .expect("a client's own user name");
                self.transports.insert(*transport, (router, session));
            }
            MediaCommand::RestartIce { .. } | MediaCommand::ServeData { .. } => {}
            MediaCommand::RemoveTransport { transport } => self.forget_transport(*transport),
            MediaCommand::AddTrack {
                transport, track, ..
            } => {
                let (at, session) = self.transports[transport];
                self.check(Rule::RoomsAreApart, at == router, || {
                    format!("{track:?} is not where its connection is")
                });
                let known = KnownTrack {
                    session,
                    transport: *transport,
                    router,
                    subscribers: BTreeSet::new(),
                };
                self.tracks.insert(*track, known);
            }
            MediaCommand::RemoveTrack { track } => self.forget_track(*track),
            MediaCommand::Subscribe {
                subscription,
                transport,
                track,
                ..
            } => {
                let (at, session) = self.transports[transport];
                let known = self
                    .tracks
                    .get_mut(track)
                    .expect("a track that the router was told of");
                let publisher = known.session;
                known.subscribers.insert(*subscription);
                let here = (known.router, self.sessions[publisher].person.room)
                    == (router, self.sessions[session].person.room)
                    && at == router;
                self.subscriptions
                    .insert(*subscription, (*track, *transport));
                self.check(Rule::RoomsAreApart, here && publisher != session, || {
                    format!("session {session} is given a track of session {publisher}")
                });
            }
            MediaCommand::SetSelection { .. } => {}
            MediaCommand::Unsubscribe { subscription } => self.forget_subscription(*subscription),
        }
    }

    fn forget_transport(&mut self, transport: TransportId) {
        let tracks: Vec<TrackId> = self
            .tracks
            .iter()
            .filter(|(_, track)| track.transport == transport)
            .map(|(id, _)| *id)
            .collect();
        tracks
            .into_iter()
            .for_each(|track| self.forget_track(track));
        let carried: Vec<SubscriptionId> = self
            .subscriptions
            .iter()
            .filter(|(_, (_, over))| *over == transport)
            .map(|(id, _)| *id)
            .collect();
        carried
            .into_iter()
            .for_each(|subscription| self.forget_subscription(subscription));
        self.transports.remove(&transport);
    }

    fn forget_track(&mut self, track: TrackId) {
        let subscribers = self
            .tracks
            .get(&track)
            .map(|known| known.subscribers.clone());
        subscribers
            .into_iter()
            .flatten()
            .for_each(|subscription| self.forget_subscription(subscription));
        self.tracks.remove(&track);
    }

    fn forget_subscription(&mut self, subscription: SubscriptionId) {
        if let Some((track, _)) = self.subscriptions.remove(&subscription)
            && let Some(known) = self.tracks.get_mut(&track)
        {
            known.subscribers.remove(&subscription);
        }
    }

    /// Returns how many connections, tracks and subscriptions the routers ought to have, by the
    /// lobby's commands and the failures that the routers reported.
    pub fn expected_in_routers(&self) -> (u64, u64, u64) {
        (
            self.transports.len() as u64,
            self.tracks.len() as u64,
            self.subscriptions.len() as u64,
        )
    }

    fn deliver_to_routers(&mut self) {
        let mut arrived = Vec::new();
        for (index, session) in self.sessions.iter_mut().enumerate() {
            while let Some((at, datagram)) = session.up.poll(self.now) {
                arrived.push((at, index, datagram));
            }
        }
        arrived.sort_by_key(|(at, index, _)| (*at, *index));
        let before: Vec<RouterStatistics> = self.routers.iter().map(Router::statistics).collect();
        let mut fan_out = vec![0; self.routers.len()];
        for (at, index, mut datagram) in arrived {
            if self.is_struck(&mut datagram) {
                continue;
            }
            let router = (0..self.routers.len())
                .find(|router| router_address(*router) == datagram.to)
                .expect("a router's address");
            fan_out[router] += self.hand_to_router(router, index, datagram, at);
        }
        for (index, before) in before.into_iter().enumerate() {
            self.routers[index].end_batch(self.now, &mut self.router_outlets[index]);
            let after = self.routers[index].statistics();
            self.tally.fan_out += fan_out[index];
            // A connection that fails meanwhile takes subscribers away from packets that wait.
            if after.subscriptions == before.subscriptions {
                let (done, expected) = (forwarded(&after) - forwarded(&before), fan_out[index]);
                self.check(Rule::RoutersForwardAll, done == expected, || {
                    format!("router {index} took packets for {expected} subscribers, and did something with {done}: {before:?} {after:?}")
                });
            }
        }
    }

    /// Applies the link's defect, if one is planted. Returns whether the datagram is gone.
    fn is_struck(&mut self, datagram: &mut Datagram) -> bool {
        let is_media = classify(&datagram.bytes) == Class::Rtp;
        match self.defect {
            Some(Defect::LinkSwallows) if is_media && self.defect_chance.below(200) == 0 => {
                self.defects_done += 1;
                true
            }
            Some(Defect::LinkCorrupts) if is_media && self.defect_chance.below(200) == 0 => {
                self.defects_done += 1;
                let middle = datagram.bytes.len() / 2;
                datagram.bytes[middle] ^= 1;
                false
            }
            _ => false,
        }
    }

    /// Hands a datagram to a router. Returns the number of subscribers that are to get something of
    /// it.
    fn hand_to_router(
        &mut self,
        router: usize,
        index: usize,
        mut datagram: Datagram,
        at: Time,
    ) -> u64 {
        self.tally.at_routers += 1;
        self.tally.at_routers_bytes += datagram.bytes.len() as u64;
        let class = classify(&datagram.bytes);
        let ssrc = Header::parse(&datagram.bytes).map_or(Ssrc(0), |header| header.ssrc);
        self.note_datagram(&datagram, class, at);
        let before = self.routers[router].statistics();
        self.routers[router].handle_datagram(
            &mut datagram.bytes,
            datagram.from,
            at,
            self.now,
            &mut self.router_outlets[router],
        );
        let after = self.routers[router].statistics();
        let fate = fate(&before, &after);
        let fits = matches!(
            (class, fate),
            (
                Class::Stun,
                Some("setup_in" | "refused_setup" | "refused_unknown_ufrag")
            ) | (
                Class::Dtls,
                Some("setup_in" | "refused_setup" | "refused_unknown_address")
            ) | (
                Class::Rtcp,
                Some(
                    "rtcp_in" | "refused_unknown_address" | "refused_unkeyed" | "refused_replayed"
                )
            ) | (
                Class::Rtp,
                Some(
                    "media_in"
                        | "repairs_in"
                        | "probes_in"
                        | "refused_unknown_address"
                        | "refused_unknown_ssrc"
                        | "refused_unkeyed"
                        | "refused_replayed"
                        | "refused_duplicate"
                        | "refused_too_old"
                )
            )
        );
        self.check(Rule::RoutersAccount, fits, || {
            format!(
                "{class:?} from session {index}, SSRC {:#x}, became {fate:?}",
                ssrc.0
            )
        });
        if !matches!(fate, Some("media_in" | "repairs_in")) {
            return 0;
        }
        let track = self.track_of(index, ssrc);
        self.check(Rule::RoutersAccount, track.is_some(), || {
            format!("router {router} took SSRC {ssrc} of session {index}, which has no such track")
        });
        track.map_or(0, |track| self.tracks[&track].subscribers.len() as u64)
    }

    /// Returns the track that a session sends under an SSRC.
    fn track_of(&self, index: usize, ssrc: Ssrc) -> Option<TrackId> {
        let tracks = &self.sessions[index].client.tracks;
        let place = tracks.iter().position(|track| {
            track
                .ssrcs
                .iter()
                .any(|(media, rtx)| *media == ssrc || *rtx == Some(ssrc))
        })?;
        // The lobby numbers a participant's tracks in the order of its offer.
        self.tracks
            .iter()
            .filter(|(_, known)| known.session == index)
            .map(|(id, _)| *id)
            .nth(place)
    }

    fn note_datagram(&mut self, datagram: &Datagram, class: Class, at: Time) {
        let facts = match (class, Header::parse(&datagram.bytes)) {
            (Class::Rtp, Some(header)) => {
                let length = datagram.bytes.len() as u64;
                u64::from(header.ssrc.0) << 32 | u64::from(header.seq.0) << 16 | length
            }
            // The length of a set-up datagram varies by a byte with the keys, so it is left out.
            (Class::Rtcp, _) => datagram.bytes.len() as u64,
            _ => 0,
        };
        self.note(facts ^ at.as_nanos());
    }

    // Participants.

    fn deliver_to_clients(&mut self) {
        for index in 0..self.sessions.len() {
            while let Some((at, datagram)) = self.sessions[index].down.poll(self.now) {
                self.hand_to_client(index, datagram, at);
            }
        }
    }

    fn hand_to_client(&mut self, index: usize, mut datagram: Datagram, at: Time) {
        let session = &mut self.sessions[index];
        let half = if datagram.to == session.addresses[0] {
            Half::Publisher
        } else {
            Half::Subscriber
        };
        let class = classify(&datagram.bytes);
        if !session.open[half as usize] {
            self.tally.to_closed += 1;
            return;
        }
        if self.is_struck(&mut datagram) {
            return;
        }
        let session = &mut self.sessions[index];
        let is_rtp = u64::from(class == Class::Rtp);
        let (shard, key) = match &mut session.receiver {
            Receiver::Witness(_) => {
                self.tally.to_witnesses += 1;
                self.tally.rtp_to_witnesses += is_rtp;
                self.note_datagram(&datagram, class, at);
                let mut sent = Vec::new();
                let session = &mut self.sessions[index];
                let Receiver::Witness(witness) = &mut session.receiver else {
                    return;
                };
                witness.handle_datagram(half, &mut datagram, at, &mut sent);
                sent.into_iter()
                    .for_each(|datagram| session.up.send(datagram, self.now));
                return;
            }
            Receiver::Engine { shard, key } => (*shard, key_of(*key, half)),
        };
        self.tally.to_engines += 1;
        self.tally.to_engines_bytes += datagram.bytes.len() as u64;
        self.tally.rtp_to_engines += is_rtp;
        if let (Class::Rtp, Some(header)) = (class, Header::parse(&datagram.bytes)) {
            let is_expected = session.expects[half as usize].contains(&header.ssrc)
                && session.connected[half as usize].is_some();
            let fate = if is_expected {
                &mut session.arrivals.expected
            } else {
                &mut session.arrivals.early
            };
            *fate += 1;
        }
        self.note_datagram(&datagram, class, at);
        let (shard, io) = (&mut self.shards[shard], &mut self.outlets[shard]);
        match class {
            Class::Rtp => shard.handle_rtp(key, &mut datagram.bytes, at),
            Class::Rtcp => shard.handle_rtcp(key, &mut datagram.bytes, at, self.now, io),
            _ => shard.handle_setup_datagram(key, &datagram.bytes, datagram.from, at, self.now, io),
        }
        self.take_engine_events();
    }

    fn clients_turn(&mut self) {
        for (shard, outlet) in self.shards.iter_mut().zip(&mut self.outlets) {
            shard.handle_media_timers(self.now, outlet);
            shard.handle_control_timers(self.now, outlet);
        }
        self.take_engine_events();
        let now = self.now;
        for session in &mut self.sessions {
            if let (Receiver::Witness(witness), Stage::In) = (&mut session.receiver, session.stage)
            {
                let mut sent = Vec::new();
                witness.handle_time(now, &mut sent);
                for half in Half::BOTH
                    .into_iter()
                    .filter(|half| witness.is_connected(*half))
                {
                    session.connected[half as usize].get_or_insert(now);
                }
                sent.into_iter()
                    .for_each(|datagram| session.up.send(datagram, now));
            }
        }
    }

    fn take_engine_events(&mut self) {
        for shard in 0..self.shards.len() {
            while let Some((key, event)) = self.shards[shard].poll_event() {
                let place = |session: &Session| matches!(session.receiver, Receiver::Engine { shard: at, key: first } if at == shard && first.0 == key.0 & !1);
                let index = self
                    .sessions
                    .iter()
                    .position(place)
                    .expect("a key that was given out");
                let half = if key.0 & 1 == 0 {
                    Half::Publisher
                } else {
                    Half::Subscriber
                };
                match event {
                    ShardEvent::Connected { at, .. } => {
                        self.note(at.as_nanos());
                        self.sessions[index].connected[half as usize] = Some(at);
                        if half == Half::Publisher && !self.draining {
                            self.publish(index);
                        }
                    }
                    ShardEvent::Failed { failure, .. } => {
                        let left = self.sessions[index].stage == Stage::Gone;
                        self.check(Rule::SessionsLast, left, || {
                            format!("session {index} lost its {half:?} connection: {failure:?}")
                        });
                    }
                    ShardEvent::IceConnected { .. }
                    | ShardEvent::IceRestarted { .. }
                    | ShardEvent::Moved { .. }
                    | ShardEvent::FirstMedia { .. } => {}
                }
            }
        }
    }

    fn publish(&mut self, index: usize) {
        let session = &self.sessions[index];
        let Receiver::Engine { shard, key } = session.receiver else {
            return;
        };
        let mut parameters = Vec::new();
        for track in &session.client.tracks {
            let Some(negotiated) = &track.negotiated else {
                continue;
            };
            let kind = track.local.codec.kind();
            let payloads = negotiated.payloads.unwrap();
            let first_frame_at =
                self.now + Duration::from_millis(2 + u64::from(session.person.index * 7 % 20));
            let source = |layer| clips().source(kind, track.ssrcs.len() > 1, layer);
            let bitrate = (0..track.ssrcs.len())
                .map(|layer| source(layer).bitrate().bps())
                .sum();
            let id = |extension| negotiated.extensions.id(extension);
            for (layer, (ssrc, rtx_ssrc)) in track.ssrcs.iter().enumerate() {
                parameters.push(SendParameters {
                    source: source(layer),
                    ssrc: *ssrc,
                    rtx_ssrc: *rtx_ssrc,
                    payload_type: payloads.plain_payload_type(),
                    redundancy: (payloads.codec == Codec::Red).then_some(Redundancy {
                        payload_type: payloads.payload_type,
                        distance: 1 + (session.person.index / 2 % 2) as u8,
                    }),
                    rtx_payload_type: negotiated.rtx_payload_type,
                    transport_cc_extension: None,
                    audio_level_extension: id(Extension::AudioLevel)
                        .filter(|_| kind == Kind::Audio),
                    simulcast: track.local.rids.get(layer).map(|rid| SimulcastLayer {
                        mid: negotiated.mid.clone(),
                        rid: rid.as_str().into(),
                        mid_extension: id(Extension::Mid).expect("mid"),
                        rid_extension: id(Extension::Rid).expect("rid"),
                        repaired_rid_extension: id(Extension::RepairedRid),
                        track_bitrate: Bitrate::from_bps(bitrate),
                    }),
                    talk: None,
                    pacing: session.person.pacing,
                    identity: FrameIdentity {
                        run: RUN,
                        origin: Origin {
                            publisher: session.person.index,
                            track: track_number(kind),
                        },
                        layer: layer as u8,
                        ..FrameIdentity::default()
                    },
                    seed: self.plan.seed ^ u64::from(ssrc.0),
                    first_frame_at,
                });
            }
        }
        let command = ShardCommand::Publish {
            key,
            tracks: parameters,
        };
        self.shards[shard].handle_command(command, self.now, &mut self.outlets[shard]);
    }

    /// Puts what was sent in this turn on its way.
    fn send_off(&mut self) {
        let now = self.now;
        for shard in 0..self.outlets.len() {
            for datagram in std::mem::take(&mut self.outlets[shard].sent) {
                self.tally.by_engines_bytes += datagram.bytes.len() as u64;
                self.tally.rtp_by_engines += u64::from(classify(&datagram.bytes) == Class::Rtp);
                let session = self
                    .sessions
                    .iter_mut()
                    .find(|session| session.addresses.contains(&datagram.from));
                session
                    .expect("a participant's address")
                    .up
                    .send(datagram, now);
            }
        }
        for router in 0..self.router_outlets.len() {
            for datagram in std::mem::take(&mut self.router_outlets[router].sent) {
                self.tally.by_routers += 1;
                self.tally.by_routers_bytes += datagram.bytes.len() as u64;
                let session = self
                    .sessions
                    .iter_mut()
                    .find(|session| session.addresses.contains(&datagram.to));
                session
                    .expect("a participant's address")
                    .down
                    .send(datagram, now);
            }
        }
    }

    /// Checks that nothing that was due is still due after a turn.
    fn check_timers(&mut self) {
        let now = self.now;
        for index in 0..self.routers.len() {
            let next = self.routers[index].next_timeout();
            self.check(Rule::NothingIsOverdue, next > now, || {
                format!("router {index} is overdue: {next:?}")
            });
        }
        let next = self.lobby.next_timeout();
        self.check(Rule::NothingIsOverdue, next > now, || {
            format!("the lobby is overdue: {next:?}")
        });
        let in_setup = |session: &Session| {
            (0..2).any(|half| session.open[half] && session.connected[half].is_none())
        };
        if !self.sessions.iter().any(in_setup) {
            for index in 0..self.shards.len() {
                let overdue = self.shards[index].is_waited_for_by(now);
                self.check(Rule::NothingIsOverdue, !overdue, || {
                    format!("media of shard {index} is overdue")
                });
            }
        }
    }
}

impl Session {
    fn signal_delay(&mut self) -> Duration {
        let jitter = self
            .signal_chance
            .below(self.person.signal_jitter.as_nanos() as u64 + 1);
        self.person.signal_delay + Duration::from_nanos(jitter)
    }
}

/// Returns the key of one of a participant's connections. `first` is the key of the publisher
/// connection.
fn key_of(first: PeerKey, half: Half) -> PeerKey {
    PeerKey(first.0 + half as usize)
}

fn new_session(
    person: &Person,
    seed: u64,
    identity: &Identity,
    keys: &mut [Vec<SocketAddr>],
) -> Session {
    let addresses = addresses(person);
    let shard = person.index as usize % keys.len();
    let receiver = match person.role {
        Role::Witness => Receiver::Witness(Box::default()),
        Role::Engine => {
            let key = PeerKey(keys[shard].len());
            keys[shard].extend(addresses);
            Receiver::Engine { shard, key }
        }
    };
    let seed = throng::seeded::scatter(seed ^ u64::from(person.index) << 32);
    Session {
        client: Client::new(person, addresses, identity.fingerprint()),
        stage: Stage::NotYet,
        left_at: None,
        receiver,
        up: Link::new(person.up.usual, seed),
        down: Link::new(person.down.usual, seed + 1),
        to_server: Pipe::new(),
        to_client: Pipe::new(),
        connection: None,
        addresses,
        open: [false; 2],
        connected: [None; 2],
        expects: [BTreeSet::new(), BTreeSet::new()],
        announced: BTreeMap::new(),
        arrivals: EngineArrivals::default(),
        acts_done: 0,
        is_thrown_out: false,
        signal_chance: throng::seeded::Seeded::new(seed + 2),
        person: person.clone(),
    }
}

/// Returns what became of a datagram: the name of the one counter of fates that has grown by one.
/// Returns `None` if the counters have grown in any other way.
fn fate(before: &RouterStatistics, after: &RouterStatistics) -> Option<&'static str> {
    let is_fate = |name: &str| {
        matches!(
            name,
            "setup_in" | "rtcp_in" | "media_in" | "repairs_in" | "probes_in"
        ) || name.starts_with("refused_")
    };
    let grown = before
        .counters()
        .zip(after.counters())
        .filter(|((name, before), (_, after))| is_fate(name) && before != after);
    let mut grown = grown.map(|((name, before), (_, after))| (name, after - before));
    match (grown.next(), grown.next()) {
        (Some((name, 1)), None) => Some(name),
        _ => None,
    }
}

/// Returns the number of packets for subscribers that were sent, or withheld for a stated reason,
/// when they came.
fn forwarded(statistics: &RouterStatistics) -> u64 {
    let withheld = statistics
        .counters()
        .filter(|(name, _)| name.starts_with("withheld_"));
    statistics.media_out - statistics.media_out_recalled
        + withheld.map(|(_, count)| count).sum::<u64>()
}
