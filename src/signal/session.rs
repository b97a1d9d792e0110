//! One participant's life: join, publish, answer the server's offers, stay, leave. A task each; the media runs in the engine's shards.
//!
//! The task hands shards finished parameters and never waits for them. Every moment of the join is counted from when it was intended.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use livekit_protocol as proto;
use tokio::sync::{mpsc, watch};

use super::Endpoint;
use super::client::{Description, Event as SignalEvent, Join, JoinOptions, Leave, SignalError, SignalReceiver, SignalSender, Trickle, connect};
use super::token::{ApiKey, Permissions};
use crate::engine::publisher::{SendParameters, Source};
use crate::engine::{Command, Event as EngineEvent, NewPeer, Roster, StreamParameters};
use crate::measure::{Kind, Timeline};
use crate::media::identity::FrameIdentity;
use crate::net;
use crate::plan::{Pacing, ParticipantPlan};
use crate::transport::peer::{IceCredentials, PeerFailure, PeerParameters};
use crate::transport::sdp::{
    Answerer, Candidate, Capabilities, Extension, Fingerprint, LocalTrack, LocalTransport, NegotiatedMedia, RemoteAnswer, RemoteTrack,
    RemoteTransport, Setup, Trickled, publisher_offer,
};
use crate::units::{Epoch, Time};

/// A join that takes longer than this has failed: LiveKit itself gives a primary connection 60 s, a person far less.
pub const JOIN_TIMEOUT: Duration = Duration::from_secs(30);
/// Tokens outlive any run.
const TOKEN_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// Until the server names its own interval.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// Candidates that may come before the description they belong to.
const EARLY_CANDIDATES_MAX: usize = 32;
/// Where the server ends the DTLS session, its reason may still be on its way over the signalling connection: so long it is waited for.
const LEAVE_WAIT: Duration = Duration::from_millis(500);
/// Between the connection's first moment and the first frame: at least this, so that the slot lies ahead.
const FIRST_FRAME_DELAY: Duration = Duration::from_millis(2);

/// What all participants of a run share.
pub struct SessionContext {
    pub endpoint: Endpoint,
    pub api_key: ApiKey,
    pub epoch: Epoch,
    pub roster: Arc<Roster>,
    pub fingerprint: Fingerprint,
    pub audio: Option<Source>,
    pub video: Option<Source>,
    pub pacing: Pacing,
    pub receive_buffer_bytes: usize,
    pub shards: Vec<Sender<Command>>,
    pub notices: mpsc::UnboundedSender<Notice>,
    /// Turns true when everybody is to leave.
    pub leave: watch::Receiver<bool>,
}

/// Where a participant's connections live.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub shard: usize,
    /// The key of its publisher connection; the subscriber connection has the next one.
    pub key: usize,
}

/// What a participant tells the run.
#[derive(Debug)]
pub enum Notice {
    /// A phase of the join is done, so long after the join was intended.
    Phase(Phase, Duration),
    Joined {
        index: u32,
    },
    JoinFailed {
        index: u32,
        reason: String,
    },
    /// Was in, and was thrown out or lost its connection.
    Disconnected {
        index: u32,
        reason: String,
    },
    SignalRtt(Duration),
    Server {
        version: String,
    },
    /// The last one.
    Ended(Box<Ended>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    SignalConnect,
    SignalJoin,
    Ice,
    Dtls,
    Join,
    FirstMedia,
}

/// What became of one participant, as signalling saw it.
#[derive(Debug)]
pub struct Ended {
    pub index: u32,
    pub timeline: Timeline,
    pub failure: Option<String>,
    pub disconnects: u32,
}

/// Runs one participant from its intended moment until the run tells everybody to leave, or the server does.
pub async fn run(context: Arc<SessionContext>, plan: ParticipantPlan, room: String, place: Place, intended: Time) {
    let mut session = Session::new(context, plan, room, place, intended);
    let failure = session.live().await.err();
    session.end(failure);
}

/// One of the two peer connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Publisher,
    Subscriber,
}

struct Session {
    context: Arc<SessionContext>,
    plan: ParticipantPlan,
    room: String,
    place: Place,
    timeline: Timeline,
    joined: bool,
    disconnects: u32,
    publisher: Half,
    subscriber: Half,
    answerer: Answerer,
    tracks: Vec<Track>,
    local_ip: Option<IpAddr>,
}

/// One peer connection's part of the session.
struct Half {
    wanted: bool,
    local: Option<LocalTransport>,
    socket: Option<std::net::UdpSocket>,
    /// The shard knows this connection.
    added: bool,
    ice_at: Option<Time>,
    connected_at: Option<Time>,
    early_candidates: Vec<SocketAddr>,
}

/// A track to publish, until its description is agreed.
struct Track {
    local: LocalTrack,
    source: Source,
    negotiated: Option<NegotiatedMedia>,
    added: bool,
}

/// Why a session ended before the run did.
#[derive(Debug)]
struct Failure(String);

impl From<&Leave> for Failure {
    fn from(leave: &Leave) -> Failure {
        Failure(format!("the server ended the session: {}", leave.reason.as_str_name().to_lowercase()))
    }
}

impl From<SignalError> for Failure {
    fn from(error: SignalError) -> Failure {
        Failure(error.to_string())
    }
}

impl Half {
    fn new(wanted: bool) -> Half {
        Half {
            wanted,
            local: None,
            socket: None,
            added: false,
            ice_at: None,
            connected_at: None,
            early_candidates: Vec::new(),
        }
    }

    fn is_missing(&self) -> bool {
        self.wanted && self.connected_at.is_none()
    }
}

impl Session {
    fn new(context: Arc<SessionContext>, plan: ParticipantPlan, room: String, place: Place, intended: Time) -> Session {
        let mut tracks = Vec::new();
        for source in [
            context.audio.as_ref().filter(|_| plan.publishes_audio),
            context.video.as_ref().filter(|_| plan.publishes_video),
        ]
        .into_iter()
        .flatten()
        {
            tracks.push(Track {
                local: local_track(&plan, source.kind()),
                source: source.clone(),
                negotiated: None,
                added: false,
            });
        }
        Session {
            timeline: Timeline {
                intended,
                ..Timeline::default()
            },
            joined: false,
            disconnects: 0,
            publisher: Half::new(!tracks.is_empty()),
            subscriber: Half::new(plan.subscribes),
            answerer: Answerer::new(Capabilities::SUBSCRIBER),
            tracks,
            local_ip: None,
            context,
            plan,
            room,
            place,
        }
    }

    /// Joins and stays. `Ok` when the run tells everybody to leave.
    async fn live(&mut self) -> Result<(), Failure> {
        self.timeline.started = Some(self.context.epoch.now());
        let (mut sender, mut receiver) = self.open_signal().await?;
        let (engine, mut engine_events) = mpsc::unbounded_channel();
        let deadline = tokio::time::sleep_until(tokio::time::Instant::from_std(
            self.context.epoch.instant(self.timeline.intended + JOIN_TIMEOUT),
        ));
        tokio::pin!(deadline);
        let mut ping = tokio::time::interval(PING_INTERVAL);
        ping.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut leave = self.context.leave.clone();
        let mut signal_rtt = Duration::ZERO;
        loop {
            tokio::select! {
                biased;
                Some(event) = engine_events.recv() => {
                    if let Err(failure) = self.handle_engine(event) {
                        let closed = matches!(event, EngineEvent::Failed { failure: PeerFailure::ClosedByRemote, .. });
                        let reason = if closed { leave_reason(&mut receiver).await } else { None };
                        return Err(reason.unwrap_or(failure));
                    }
                }
                event = receiver.next() => match event? {
                    SignalEvent::Pong { timestamp_us } => signal_rtt = self.handle_pong(timestamp_us),
                    event => self.handle_signal(event, &mut sender, &engine, &mut ping).await?,
                },
                () = leaving(&mut leave) => {
                    // The server sees a participant who says goodbye at once; one who is silent it keeps for 20 s.
                    let _ = tokio::time::timeout(Duration::from_secs(2), sender.leave()).await;
                    return Ok(());
                }
                _ = ping.tick() => sender.ping(self.context.epoch.now().as_micros() as i64, signal_rtt).await?,
                () = &mut deadline, if !self.joined => return Err(Failure(self.timeout_reason())),
            }
        }
    }

    async fn open_signal(&mut self) -> Result<(SignalSender, SignalReceiver), Failure> {
        let permissions = Permissions {
            publish: !self.tracks.is_empty(),
            subscribe: self.plan.subscribes,
            publish_data: false,
            hidden: false,
        };
        let identity = &self.plan.identity;
        let token = self
            .context
            .api_key
            .join_token(&self.room, identity, identity, permissions, TOKEN_LIFETIME)
            .map_err(|error| Failure(error.to_string()))?;
        let options = JoinOptions {
            auto_subscribe: self.plan.subscribes,
            timeout: JOIN_TIMEOUT,
            ..JoinOptions::default()
        };
        let (sender, receiver, times) = connect(&self.context.endpoint, &token, &options).await?;
        self.local_ip = Some(times.local_ip);
        self.timeline.signal_connected = Some(self.phase(Phase::SignalConnect));
        Ok((sender, receiver))
    }

    async fn handle_signal(
        &mut self,
        event: SignalEvent,
        sender: &mut SignalSender,
        engine: &mpsc::UnboundedSender<EngineEvent>,
        ping: &mut tokio::time::Interval,
    ) -> Result<(), Failure> {
        match event {
            SignalEvent::Join(join) => self.handle_join(&join, sender, ping).await,
            SignalEvent::TrackPublished { cid, .. } => self.handle_track_published(&cid, sender).await,
            SignalEvent::Offer(offer) => self.handle_offer(&offer, sender, engine).await,
            SignalEvent::Answer(answer) => self.handle_answer(&answer, engine),
            SignalEvent::Trickle(trickle) => {
                self.handle_trickle(&trickle);
                Ok(())
            }
            SignalEvent::Leave(leave) => Err(Failure::from(&leave)),
            SignalEvent::Closed { reason, .. } if reason.is_empty() => Err(Failure("the server closed the signalling connection".into())),
            SignalEvent::Closed { reason, .. } => Err(Failure(format!("the server closed the signalling connection: {reason}"))),
            _ => Ok(()),
        }
    }

    async fn handle_join(&mut self, join: &Join, sender: &mut SignalSender, ping: &mut tokio::time::Interval) -> Result<(), Failure> {
        self.timeline.signal_joined = Some(self.phase(Phase::SignalJoin));
        self.notify(Notice::Server {
            version: join.server_version.clone(),
        });
        if !join.ping_interval.is_zero() {
            *ping = tokio::time::interval_at(tokio::time::Instant::now() + join.ping_interval, join.ping_interval);
        }
        for track in &self.tracks {
            sender.add_track(add_track_request(track)).await?;
        }
        self.check_joined()
    }

    /// When the server knows every track, our offer follows.
    async fn handle_track_published(&mut self, cid: &str, sender: &mut SignalSender) -> Result<(), Failure> {
        if let Some(track) = self.tracks.iter_mut().find(|track| track.local.cid == cid) {
            track.added = true;
        }
        if !self.tracks.iter().all(|track| track.added) || self.publisher.local.is_some() {
            return Ok(());
        }
        let local = self.open_half(Role::Publisher)?;
        let tracks: Vec<LocalTrack> = self.tracks.iter().map(|track| track.local.clone()).collect();
        let offer = publisher_offer(&local, &tracks, false, 1, &Capabilities::PUBLISHER);
        self.publisher.local = Some(local);
        Ok(sender.offer(offer, 1).await?)
    }

    fn handle_answer(&mut self, answer: &Description, engine: &mpsc::UnboundedSender<EngineEvent>) -> Result<(), Failure> {
        let answer = RemoteAnswer::parse(&answer.sdp, &Capabilities::PUBLISHER).map_err(|error| Failure(format!("the server's answer: {error}")))?;
        for (track, media) in self.tracks.iter_mut().zip(&answer.media) {
            track.negotiated = Some(media.clone()).filter(|media| media.accepted);
        }
        if self.tracks.iter().any(|track| track.negotiated.is_none()) {
            return Err(Failure(
                "the server did not accept a track that we publish (is its codec enabled?)".into(),
            ));
        }
        self.add_peer(Role::Publisher, &answer.remote, true, Setup::Active, engine)
    }

    async fn handle_offer(
        &mut self,
        offer: &Description,
        sender: &mut SignalSender,
        engine: &mpsc::UnboundedSender<EngineEvent>,
    ) -> Result<(), Failure> {
        if self.subscriber.local.is_none() {
            self.subscriber.local = Some(self.open_half(Role::Subscriber)?);
        }
        let Some(local) = self.subscriber.local.as_ref() else { return Ok(()) };
        let answered = self
            .answerer
            .answer(&offer.sdp, local)
            .map_err(|error| Failure(format!("the server's offer: {error}")))?;
        // The shard first: the server's checks may come as soon as it has the answer.
        if !self.subscriber.added {
            let controlling = answered.remote.ice_lite;
            self.add_peer(Role::Subscriber, &answered.remote, controlling, answered.setup, engine)?;
        }
        let key = self.key(Role::Subscriber);
        if !answered.removed.is_empty() {
            self.command(Command::Unsubscribe {
                key,
                ssrcs: answered.removed.iter().map(|track| track.ssrc).collect(),
            });
        }
        let announced_at = self.context.epoch.now();
        // An updated track is the same stream with other details: the shard adds what is new to it.
        let streams: Vec<StreamParameters> = answered
            .added
            .iter()
            .chain(&answered.updated)
            .map(|track| stream_parameters(track, announced_at))
            .collect();
        if !streams.is_empty() {
            self.command(Command::Subscribe { key, streams });
        }
        Ok(sender.answer(answered.sdp, offer.id).await?)
    }

    fn handle_trickle(&mut self, trickle: &Trickle) {
        let role = if trickle.target == proto::SignalTarget::Publisher {
            Role::Publisher
        } else {
            Role::Subscriber
        };
        // A candidate that cannot be read is one path less, not the end.
        let Ok(Trickled {
            candidate: Some(candidate), ..
        }) = trickle.candidate_init.parse()
        else {
            return;
        };
        let Some(address) = udp_address(&candidate) else { return };
        let half = self.half_mut(role);
        if !half.added {
            if half.early_candidates.len() < EARLY_CANDIDATES_MAX {
                half.early_candidates.push(address);
            }
            return;
        }
        let key = self.key(role);
        self.command(Command::AddRemoteCandidate { key, address });
    }

    fn handle_pong(&self, timestamp_us: i64) -> Duration {
        let sent = Time::from_micros(u64::try_from(timestamp_us).unwrap_or(0));
        let rtt = self.context.epoch.now().since(sent);
        self.notify(Notice::SignalRtt(rtt));
        rtt
    }

    fn handle_engine(&mut self, event: EngineEvent) -> Result<(), Failure> {
        match event {
            EngineEvent::IceConnected { key, at } => self.half_of(key).ice_at = Some(at),
            EngineEvent::Connected { key, at } => {
                self.half_of(key).connected_at = Some(at);
                if key == self.place.key {
                    self.publish();
                }
                return self.check_joined();
            }
            EngineEvent::FirstMedia { at, .. } => {
                if self.timeline.first_media.is_none() {
                    self.timeline.first_media = Some(at);
                    self.notify(Notice::Phase(Phase::FirstMedia, at.since(self.timeline.intended)));
                }
            }
            EngineEvent::Failed { failure, .. } => return Err(Failure(failure.describe().into())),
        }
        Ok(())
    }

    /// Media may flow: each track gets a slot of its own, spread over the frame interval by the participant's index.
    fn publish(&mut self) {
        let start = self.context.epoch.now() + FIRST_FRAME_DELAY;
        let mut parameters = Vec::new();
        for track in &self.tracks {
            let Some(negotiated) = &track.negotiated else { continue };
            let kind = track.source.kind();
            let number = track_number(kind);
            let first_frame_at = start + slot_offset(self.plan.index, number, track.source.frame_interval());
            self.context.roster.set_published(self.plan.index, number, first_frame_at);
            parameters.push(SendParameters {
                source: track.source.clone(),
                ssrc: track.local.ssrc,
                rtx_ssrc: track.local.rtx_ssrc,
                payload_type: negotiated.payload_type,
                rtx_payload_type: negotiated.rtx_payload_type,
                audio_level_extension: negotiated.extensions.id(Extension::AudioLevel).filter(|_| kind == Kind::Audio),
                pacing: self.context.pacing,
                identity: FrameIdentity {
                    run: self.context.roster.run,
                    origin: self.plan.index,
                    track: number,
                    ..FrameIdentity::default()
                },
                seed: self.plan.seed ^ u64::from(number),
                first_frame_at,
            });
        }
        self.command(Command::Publish {
            key: self.place.key,
            tracks: parameters,
        });
    }

    fn check_joined(&mut self) -> Result<(), Failure> {
        let waiting = self.timeline.signal_joined.is_none() || self.publisher.is_missing() || self.subscriber.is_missing();
        if self.joined || waiting {
            return Ok(());
        }
        self.joined = true;
        let latest = |moment: fn(&Half) -> Option<Time>| moment(&self.publisher).max(moment(&self.subscriber));
        (self.timeline.ice_connected, self.timeline.dtls_connected) = (latest(|half| half.ice_at), latest(|half| half.connected_at));
        self.timeline.joined = self.timeline.dtls_connected.max(self.timeline.signal_joined);
        for (phase, at) in [
            (Phase::Ice, self.timeline.ice_connected),
            (Phase::Dtls, self.timeline.dtls_connected),
            (Phase::Join, self.timeline.joined),
        ] {
            if let Some(at) = at {
                self.notify(Notice::Phase(phase, at.since(self.timeline.intended)));
            }
        }
        self.notify(Notice::Joined { index: self.plan.index });
        Ok(())
    }

    /// Opens the socket of one connection and draws its credentials.
    fn open_half(&mut self, role: Role) -> Result<LocalTransport, Failure> {
        let ip = self.local_ip.ok_or_else(|| Failure("no local address".into()))?;
        let socket =
            net::open_media_socket(ip, self.context.receive_buffer_bytes).map_err(|error| Failure(format!("no UDP socket on {ip}: {error}")))?;
        let address = socket.local_addr().map_err(|error| Failure(error.to_string()))?;
        let IceCredentials { ufrag, password } = IceCredentials::random();
        self.half_mut(role).socket = Some(socket);
        Ok(LocalTransport {
            ufrag,
            pwd: password,
            fingerprint: self.context.fingerprint,
            setup: Setup::Active,
            candidates: vec![Candidate::host(address)],
            session_id: self.plan.seed >> 1,
        })
    }

    fn add_peer(
        &mut self,
        role: Role,
        remote: &RemoteTransport,
        ice_controlling: bool,
        setup: Setup,
        engine: &mpsc::UnboundedSender<EngineEvent>,
    ) -> Result<(), Failure> {
        let (key, participant, room, intended_at, seed) = (self.key(role), self.plan.index, self.plan.room, self.timeline.intended, self.plan.seed);
        let cname = self.plan.identity.clone();
        let half = self.half_mut(role);
        let (Some(local), Some(socket)) = (&half.local, half.socket.take()) else {
            return Ok(());
        };
        let local_address = socket.local_addr().map_err(|error| Failure(error.to_string()))?;
        let mut remote_candidates: Vec<SocketAddr> = remote.candidates.iter().filter_map(udp_address).collect();
        remote_candidates.append(&mut half.early_candidates);
        let parameters = PeerParameters {
            local_address,
            local: IceCredentials {
                ufrag: local.ufrag.clone(),
                password: local.pwd.clone(),
            },
            remote: IceCredentials {
                ufrag: remote.ufrag.clone(),
                password: remote.pwd.clone(),
            },
            remote_fingerprint: remote.fingerprint,
            remote_candidates,
            ice_controlling,
            dtls_active: setup == Setup::Active,
        };
        half.added = true;
        let peer = NewPeer {
            participant,
            room,
            parameters,
            rtcp_ssrc: seed as u32 | 1,
            cname,
            intended_at,
        };
        self.command(Command::AddPeer {
            key,
            socket: Some(socket),
            peer: Box::new(peer),
            events: engine.clone(),
        });
        Ok(())
    }

    fn end(self, failure: Option<Failure>) {
        let index = self.plan.index;
        if failure.is_some() {
            // The server no longer knows this participant: its media must not go on.
            for role in [Role::Publisher, Role::Subscriber] {
                self.command(Command::RemovePeer { key: self.key(role) });
            }
        }
        let mut disconnects = self.disconnects;
        let failure = failure.map(|Failure(reason)| reason);
        match (&failure, self.joined) {
            (Some(reason), true) => {
                disconnects += 1;
                self.notify(Notice::Disconnected {
                    index,
                    reason: reason.clone(),
                });
            }
            (Some(reason), false) => self.notify(Notice::JoinFailed {
                index,
                reason: reason.clone(),
            }),
            // Told to leave before it was in: neither a success nor a failure of the server's.
            (None, _) => {}
        }
        self.notify(Notice::Ended(Box::new(Ended {
            index,
            timeline: self.timeline,
            failure,
            disconnects,
        })));
    }

    fn timeout_reason(&self) -> String {
        let waiting_for = match () {
            () if self.timeline.signal_joined.is_none() => "the server's Join",
            () if self.publisher.wanted && !self.publisher.added => "the server's answer to our offer",
            () if self.subscriber.wanted && !self.subscriber.added => "the server's offer",
            () if self.publisher.is_missing() => "ICE and DTLS of the publisher connection (is the server's UDP port reachable?)",
            () => "ICE and DTLS of the subscriber connection (is the server's UDP port reachable?)",
        };
        format!("no join within {} s: waiting for {waiting_for}", JOIN_TIMEOUT.as_secs())
    }

    fn phase(&self, phase: Phase) -> Time {
        let now = self.context.epoch.now();
        self.notify(Notice::Phase(phase, now.since(self.timeline.intended)));
        now
    }

    fn notify(&self, notice: Notice) {
        // The run stops listening only when it is over.
        let _ = self.context.notices.send(notice);
    }

    fn command(&self, command: Command) {
        // A shard is gone only when the run is over.
        let _ = self.context.shards[self.place.shard].send(command);
    }

    fn key(&self, role: Role) -> usize {
        self.place.key + usize::from(role == Role::Subscriber)
    }

    fn half_mut(&mut self, role: Role) -> &mut Half {
        match role {
            Role::Publisher => &mut self.publisher,
            Role::Subscriber => &mut self.subscriber,
        }
    }

    fn half_of(&mut self, key: usize) -> &mut Half {
        self.half_mut(if key == self.place.key { Role::Publisher } else { Role::Subscriber })
    }
}

/// What the server says of the end, where it says so soon.
async fn leave_reason(receiver: &mut SignalReceiver) -> Option<Failure> {
    let leave = async {
        loop {
            match receiver.next().await {
                Ok(SignalEvent::Leave(leave)) => return Some(Failure::from(&leave)),
                Ok(SignalEvent::Closed { .. }) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    };
    tokio::time::timeout(LEAVE_WAIT, leave).await.ok().flatten()
}

/// Ends when everybody is to leave, or the run is gone.
pub async fn leaving(leave: &mut watch::Receiver<bool>) {
    let _ = leave.wait_for(|leave| *leave).await;
}

/// The number of a track in frame identities and in the [`Roster`].
pub fn track_number(kind: Kind) -> u8 {
    match kind {
        Kind::Audio => 0,
        Kind::Video => 1,
    }
}

/// Where in the frame interval a track's slots lie: multiples of the golden ratio, so that any number of tracks is spread evenly.
fn slot_offset(index: u32, track: u8, interval: Duration) -> Duration {
    let turn = index.wrapping_mul(2).wrapping_add(u32::from(track)).wrapping_mul(0x9E37_79B9);
    Duration::from_nanos(((interval.as_nanos() * u128::from(turn)) >> 32) as u64)
}

fn local_track(plan: &ParticipantPlan, kind: Kind) -> LocalTrack {
    let name = match kind {
        Kind::Audio => "audio",
        Kind::Video => "video",
    };
    // Distinct for the participant's few SSRCs by the low bits, and unguessable enough to be distinct in a room.
    let base = (plan.seed >> 16) as u32 & !0xF;
    let number = u32::from(track_number(kind)) * 4;
    LocalTrack {
        kind,
        cid: format!("{}-{name}", plan.identity),
        stream_id: plan.identity.clone(),
        ssrc: base | number | 2,
        rtx_ssrc: (kind == Kind::Video).then_some(base | number | 3),
        rids: Vec::new(),
    }
}

fn add_track_request(track: &Track) -> proto::AddTrackRequest {
    let mut request = proto::AddTrackRequest {
        cid: track.local.cid.clone(),
        name: track.local.cid.clone(),
        ..Default::default()
    };
    match &track.source {
        Source::Audio(_) => {
            request.r#type = proto::TrackType::Audio.into();
            request.source = proto::TrackSource::Microphone.into();
            request.disable_red = true;
        }
        Source::Video(clip) => {
            let spec = clip.spec();
            request.r#type = proto::TrackType::Video.into();
            request.source = proto::TrackSource::Camera.into();
            (request.width, request.height) = (spec.width, spec.height);
            let layer = proto::VideoLayer {
                quality: proto::VideoQuality::High.into(),
                width: spec.width,
                height: spec.height,
                bitrate: u32::try_from(spec.bitrate.bps()).unwrap_or(u32::MAX),
                ssrc: track.local.ssrc,
                ..Default::default()
            };
            request.layers = vec![layer];
            let features = [
                proto::PacketTrailerFeature::PtfUserTimestamp,
                proto::PacketTrailerFeature::PtfFrameId,
                proto::PacketTrailerFeature::PtfUserData,
            ];
            request.packet_trailer_features = features.into_iter().map(Into::into).collect();
        }
    }
    request
}

fn stream_parameters(track: &RemoteTrack, announced_at: Time) -> StreamParameters {
    StreamParameters {
        kind: track.kind,
        ssrc: track.ssrc,
        rtx_ssrc: track.rtx_ssrc,
        clock_rate: track.clock_rate,
        announced_at,
    }
}

fn udp_address(candidate: &Candidate) -> Option<SocketAddr> {
    (candidate.transport == crate::transport::sdp::CandidateTransport::Udp).then_some(candidate.address)
}
