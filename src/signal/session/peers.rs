//! One peer connection's part of a session: its path, its credentials, and the state of its set-up.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use tokio::sync::mpsc;

use super::{SessionContext, SessionFailure};
use crate::path::{Family, Path, Via};
use crate::plan::TransportChoice;
use crate::signal::turn::{TurnLink, TurnServer, TurnUrl};
use crate::transport::peer::{IceCredentials, NearEnd, PeerFailure, PeerParameters};
use crate::transport::sdp::{
    Candidate, CandidateTransport, DtlsSetup, LocalTransport, RemoteTransport, ice_ufrag,
};
use crate::units::Time;

/// Number of candidates that may come before their description.
const EARLY_CANDIDATES_MAX: usize = 32;
/// Number of our addresses that the server is told. A host has a few.
const LOCAL_CANDIDATES_MAX: usize = 8;
/// Number of the server's addresses that a message names where none of them helps.
const NAMED_MAX: usize = 4;
/// How long to wait for candidates after a description without a usable one.
const CANDIDATES_WAIT: Duration = Duration::from_millis(1_500);
/// How long UDP is tried alone: twice the round trip of a bad path, and hardly noticeable to a
/// person.
const UDP_HEAD_START: Duration = Duration::from_millis(1_000);
/// Longest wait for a UDP candidate after the description. A server names its UDP addresses and its
/// TCP address at the same time, but one may come after the other.
const UDP_WAIT: Duration = Duration::from_millis(200);
/// Number of the server's candidates that a relay is to reach.
const RELAYED_MAX: usize = 16;
/// Number of TCP connections of one peer connection. A server has one or two addresses of each
/// family.
const STREAMS_MAX: usize = 4;
/// Time limit for opening a connection. A slower one is of no use to a conversation.
const STREAM_TIMEOUT: Duration = Duration::from_secs(5);

/// The two connections of a participant. A single connection is the publisher's, as in LiveKit's
/// signalling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PeerRole {
    Publisher,
    Subscriber,
}

impl PeerRole {
    pub(super) const BOTH: [PeerRole; 2] = [PeerRole::Publisher, PeerRole::Subscriber];
}

/// Whether a LiveKit server of this version gives a participant tracks only after the data channels
/// of its connection are open. Later servers wait for channels only if an offer has them.
pub(super) fn needs_data_channels(version: &str) -> bool {
    let mut numbers = version.split('.').map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) < (1, 7),
        _ => false,
    }
}

/// One peer connection's part of the session.
pub(super) struct PeerHalf {
    choice: TransportChoice,
    /// Relays that were asked for an allocation.
    relays: Vec<RelayEnd>,
    /// Relays that may still be asked, the next one first.
    more_relays: VecDeque<TurnServer>,
    /// Whether only a relay may carry the connection.
    only_relays: bool,
    /// It is connected by something else so far.
    moves: bool,
    /// The participant is not in before this connection is up.
    pub(super) wanted: bool,
    pub(super) local: Option<LocalTransport>,
    /// Path of the connection, until the shard takes it.
    path: Option<Path>,
    /// Families that have a socket, with its port.
    ports: Vec<(Family, u16)>,
    /// Sockets that the shard is still to be given, each with our address on it.
    more_paths: Vec<(Path, NearEnd)>,
    /// Our candidates that no description has told the server.
    untold: Vec<Candidate>,
    offered: OfferedCandidates,
    /// When the server's first description came.
    described_at: Option<Time>,
    /// Whether the shard knows this connection.
    pub(super) added: bool,
    pub(super) ice_at: Option<Time>,
    pub(super) connected_at: Option<Time>,
    /// Transport that the connection used when it came up.
    pub(super) via: Via,
    /// It is connected, and ICE restarts.
    restart: Option<IceRestart>,
    early_candidates: Vec<Candidate>,
    /// Number of candidates that were trickled since the description.
    pub(super) trickled: u32,
    remote_ufrag: Option<String>,
    /// Our address towards the server's media, as first assumed.
    usual_ip: Option<IpAddr>,
}

/// Change that a description makes for the shard.
pub(super) enum DescriptionChange {
    New {
        path: Path,
        parameters: PeerParameters,
    },
    /// The connection stays, with other ICE credentials.
    Restart {
        local: IceCredentials,
        remote: IceCredentials,
        remote_candidates: Vec<SocketAddr>,
        /// By nothing else from now on.
        by_relays: bool,
    },
}

impl PeerHalf {
    pub(super) fn new(wanted: bool, choice: TransportChoice) -> PeerHalf {
        PeerHalf {
            choice,
            relays: Vec::new(),
            more_relays: VecDeque::new(),
            only_relays: choice.is_relay(),
            moves: false,
            wanted,
            local: None,
            path: None,
            ports: Vec::new(),
            more_paths: Vec::new(),
            untold: Vec::new(),
            offered: OfferedCandidates::default(),
            described_at: None,
            added: false,
            ice_at: None,
            connected_at: None,
            via: Via::Udp,
            restart: None,
            early_candidates: Vec::new(),
            trickled: 0,
            remote_ufrag: None,
            usual_ip: None,
        }
    }

    pub(super) fn is_missing(&self) -> bool {
        self.wanted && self.connected_at.is_none()
    }

    /// Opens a path and draws credentials, unless that is done. Returns our end, as descriptions
    /// state it.
    ///
    /// The server has named no candidate yet. Its media is usually where this run's other
    /// participants found it, and for the first participant where its signalling is.
    pub(super) fn open(
        &mut self,
        signalling_ip: IpAddr,
        context: &SessionContext,
        session_id: u64,
    ) -> Result<&LocalTransport, SessionFailure> {
        let local = match self.local.take() {
            Some(local) => local,
            None => {
                let ip = context.routes.usual(signalling_ip);
                let candidates = self.open_first(ip, context)?;
                self.usual_ip = Some(ip);
                let IceCredentials { ufrag, password } = IceCredentials::random();
                LocalTransport {
                    ufrag,
                    pwd: password,
                    fingerprint: context.fingerprint,
                    setup: DtlsSetup::Active,
                    candidates,
                    session_id,
                }
            }
        };
        Ok(self.local.insert(local))
    }

    /// Opens what can be opened before the server has named candidates, and returns our candidates.
    /// TCP connections are opened later, to the server's candidates.
    fn open_first(
        &mut self,
        ip: IpAddr,
        context: &SessionContext,
    ) -> Result<Vec<Candidate>, SessionFailure> {
        if !self.choice.allows_udp() {
            self.path = Some(Path::closed());
            let relayed = self.relays.iter().filter_map(|relay| relay.relayed);
            return Ok(if self.choice.is_relay() {
                relayed.map(Candidate::relayed).collect()
            } else {
                vec![Candidate::tcp_active(ip)]
            });
        }
        let (path, port) = open_path(Family::of(ip), context)
            .map_err(|error| SessionFailure::lasting(format!("no UDP socket: {error}")))?;
        self.path = Some(path);
        self.ports.push((Family::of(ip), port));
        Ok(vec![Candidate::host(SocketAddr::new(ip, port))])
    }

    /// Draws new credentials for an ICE restart (RFC 8839, section 4.4.1.1.1); our next description
    /// has them. Our address stays.
    pub(super) fn draw_credentials(&mut self) {
        if let Some(local) = self.local.as_mut() {
            let IceCredentials { ufrag, password } = IceCredentials::random();
            (local.ufrag, local.pwd) = (ufrag, password);
        }
    }

    /// Whether a description from the server restarts ICE.
    pub(super) fn is_restarted_by(&self, description: &str) -> bool {
        let known = self.remote_ufrag.as_deref();
        known.is_some_and(|known| ice_ufrag(description).is_some_and(|ufrag| ufrag != known))
    }

    /// Takes the other end from a description, and returns what that changes for the shard.
    pub(super) fn take_remote(
        &mut self,
        remote: &RemoteTransport,
        ice_controlling: bool,
        setup: DtlsSetup,
        (context, now): (&SessionContext, Time),
    ) -> Option<DescriptionChange> {
        self.described_at.get_or_insert(now);
        let mut remote_candidates = self.reach_all(&remote.candidates, context);
        remote_candidates.extend(self.reach_all(&remote.tcp_candidates, context));
        let early = std::mem::take(&mut self.early_candidates);
        remote_candidates.extend(self.reach_all(&early, context));
        let local = self.local.as_ref()?;
        let first = local.candidates.first().map(|candidate| candidate.address);
        // Without a socket of our own, nothing is sent from this address.
        let unused = self.usual_ip.map(|ip| Candidate::tcp_active(ip).address);
        let local_address = if self.only_relays { unused } else { first };
        let credentials = |ufrag: &str, password: &str| IceCredentials {
            ufrag: ufrag.to_owned(),
            password: password.to_owned(),
        };
        let local_credentials = credentials(&local.ufrag, &local.pwd);
        let remote_credentials = credentials(&remote.ufrag, &remote.pwd);
        self.trickled = 0;
        let is_other =
            self.remote_ufrag.replace(remote.ufrag.clone()).as_ref() != Some(&remote.ufrag);
        let Some(path) = self.path.take() else {
            if is_other {
                self.restart = Some(IceRestart {
                    at: now,
                    reaches_udp: !remote_candidates.is_empty(),
                });
                self.offered.streams.iter_mut().for_each(StreamOffer::reset);
            }
            return is_other.then_some(DescriptionChange::Restart {
                local: local_credentials,
                remote: remote_credentials,
                remote_candidates,
                by_relays: self.only_relays,
            });
        };
        // The path was opened before the server said that it wants a relay.
        let path = if self.only_relays {
            Path::closed()
        } else {
            path
        };
        self.added = true;
        let parameters = PeerParameters {
            local_address: local_address?,
            local: local_credentials,
            remote: remote_credentials,
            remote_fingerprint: remote.fingerprint,
            remote_candidates,
            ice_controlling,
            dtls_active: setup == DtlsSetup::Active,
        };
        Some(DescriptionChange::New { path, parameters })
    }

    /// Keeps a candidate that came before the shard knows the connection.
    pub(super) fn keep_candidate(&mut self, candidate: Candidate) {
        if self.early_candidates.len() < EARLY_CANDIDATES_MAX {
            self.early_candidates.push(candidate);
        }
    }

    fn reach_all(&mut self, candidates: &[Candidate], context: &SessionContext) -> Vec<SocketAddr> {
        candidates
            .iter()
            .filter_map(|candidate| self.reach(candidate, context))
            .collect()
    }

    /// Ensures that there is a socket for a candidate of the server. Returns its address if it can
    /// be tried now.
    pub(super) fn reach(
        &mut self,
        candidate: &Candidate,
        context: &SessionContext,
    ) -> Option<SocketAddr> {
        let address = candidate.address;
        match candidate.transport {
            CandidateTransport::Udp if self.choice.allows_relay() => {
                self.offered.add_udp(address);
                let reaching = self.relays.iter_mut().map(|relay| relay.reach(address));
                let is_reached = reaching.fold(false, |any, reached| any | reached);
                if self.only_relays {
                    return Some(address).filter(|_| is_reached);
                }
            }
            CandidateTransport::Udp if self.choice.allows_udp() => {}
            CandidateTransport::Udp => {
                self.offered.unwanted.push(address);
                return None;
            }
            CandidateTransport::TcpPassive if self.only_relays => return None,
            CandidateTransport::TcpPassive => {
                self.offered.add_stream(address);
                return None;
            }
            // We open connections, so a side that only opens them cannot be reached; and nobody
            // supports simultaneous open.
            CandidateTransport::TcpActive | CandidateTransport::TcpSimultaneous => return None,
        }
        let reached = context
            .routes
            .source(address)
            .and_then(|source| self.open_towards(source, context).map(|()| source));
        match reached {
            Ok(source) => {
                if let Some(restart) = &mut self.restart {
                    restart.reaches_udp = true;
                }
                if self.offered.reached.is_empty() {
                    context.routes.set_usual(source);
                }
                self.offered.reached.push((source, address.ip()));
                Some(address)
            }
            Err(error) => {
                let why = format!("{} ({error})", address.ip());
                self.offered.unreached.push(why);
                None
            }
        }
    }

    /// Opens a socket for the route on which `source` is our address, and notes the candidate to
    /// tell the server.
    fn open_towards(&mut self, source: IpAddr, context: &SessionContext) -> std::io::Result<()> {
        let family = Family::of(source);
        let known = self.ports.iter().find(|(known, _)| *known == family);
        let port = match known {
            Some((_, port)) => *port,
            // An established connection gets no further sockets.
            None if self.connected_at.is_some() => {
                return Err(std::io::ErrorKind::NotConnected.into());
            }
            None => {
                let (path, port) = open_path(family, context)?;
                self.ports.push((family, port));
                let end = NearEnd::Udp(SocketAddr::new(source, port));
                self.more_paths.push((path, end));
                port
            }
        };
        self.tell(Candidate::host(SocketAddr::new(source, port)));
        Ok(())
    }

    /// Notes a candidate of ours to tell the server.
    fn tell(&mut self, candidate: Candidate) {
        if let Some(local) = &mut self.local
            && local.candidates.len() < LOCAL_CANDIDATES_MAX
            && !local.candidates.contains(&candidate)
        {
            self.untold.push(candidate.clone());
            local.candidates.push(candidate);
        }
    }

    /// Sets the relays that may carry the connection, in their order. `only`: nothing else may.
    pub(super) fn set_relays(&mut self, relays: Vec<TurnServer>, only: bool) {
        self.more_relays = relays.into();
        self.only_relays = only;
    }

    /// It is connected, and is to go on by a relay alone.
    pub(super) fn begin_move(&mut self) {
        self.moves = self.connected_at.is_some();
        self.relays.clear();
        if let (true, Some(local)) = (self.moves, &mut self.local) {
            local.candidates.clear();
            self.untold.clear();
        }
    }

    /// It is to go on by a relay, and none has given it an address.
    pub(super) fn awaits_relay(&self) -> bool {
        self.moves && self.relays.iter().all(|relay| relay.relayed.is_none())
    }

    /// Why there is no relay for it to go on by.
    pub(super) fn failed_move(&self) -> Option<String> {
        let is_over = self.more_relays.is_empty() && self.relays.iter().all(RelayEnd::is_hopeless);
        (self.moves && is_over).then(|| {
            let told = named(self.relays.iter().map(RelayEnd::without_path));
            format!("the server wants media to go through a TURN server from now on: {told}")
        })
    }

    /// Whether ICE was restarted and has no path yet.
    pub(super) fn is_restarting(&self) -> bool {
        self.restart.is_some()
    }

    /// When the next relay is to be asked; `None` where there is none, or something else does.
    pub(super) fn relay_due_at(&self) -> Option<Time> {
        let is_up = self.connected_at.is_some() || self.ice_at.is_some();
        if self.more_relays.is_empty() || is_up && !self.moves {
            return None;
        }
        if self.only_relays {
            return self.wanted.then_some(Time::ZERO);
        }
        let described_at = self.described_at.filter(|_| self.added)?;
        let by_stream = self.offered.streams.iter().any(StreamOffer::may_come);
        let head_start = match () {
            () if !self.offered.reached.is_empty() && by_stream => 2 * UDP_HEAD_START,
            () if !self.offered.reached.is_empty() || by_stream => UDP_HEAD_START,
            () if self.offered.is_whole => Duration::ZERO,
            () => UDP_WAIT,
        };
        Some(described_at + head_start + UDP_HEAD_START * self.relays.len() as u32)
    }

    /// Takes the next relay to ask for an allocation. Returns it, and the channel of the peers that
    /// it is to reach.
    pub(super) fn begin_relay(
        &mut self,
    ) -> Option<(TurnServer, mpsc::UnboundedReceiver<SocketAddr>)> {
        let server = self.more_relays.pop_front()?;
        let (asked, peers) = mpsc::unbounded_channel();
        let mut relay = RelayEnd {
            url: server.url.clone(),
            asked,
            relayed: None,
            wanted: Vec::new(),
            bound: Vec::new(),
            refused: Vec::new(),
            failure: None,
        };
        for address in &self.offered.udp {
            relay.reach(*address);
        }
        self.relays.push(relay);
        Some((server, peers))
    }

    /// Returns the relay that carries media, if one does.
    pub(super) fn relay_in_use(&self) -> Option<&TurnUrl> {
        let Via::Relay(used) = self.via else {
            return None;
        };
        let mut relays = self.relays.iter();
        let relay = relays.find(|relay| relay.relayed == Some(used));
        relay.map(|relay| &relay.url)
    }

    pub(super) fn uses_relay(&self, link: TurnLink) -> bool {
        self.relay_in_use().is_some_and(|url| url.link == link)
    }

    /// Drops the relays that the connection does not use. They end, because nobody can ask them for
    /// peers any more.
    pub(super) fn settle_relays(&mut self) {
        let via = self.via;
        self.more_relays.clear();
        self.relays
            .retain(|relay| relay.relayed.is_some_and(|ours| via == Via::Relay(ours)));
    }

    fn relay_mut(&mut self, link: TurnLink) -> Option<&mut RelayEnd> {
        self.relays.iter_mut().find(|relay| relay.url.link == link)
    }

    /// Takes the path of an allocation.
    pub(super) fn take_relay(&mut self, link: TurnLink, path: Path, relayed: SocketAddr) {
        let Some(relay) = self.relay_mut(link) else {
            return;
        };
        relay.relayed = Some(relayed);
        self.more_paths.push((path, NearEnd::Relay(relayed)));
        self.tell(Candidate::relayed(relayed));
    }

    /// Notes that a channel reaches a peer. Returns our address at the relay.
    pub(super) fn bind_relay(&mut self, link: TurnLink, peer: SocketAddr) -> Option<SocketAddr> {
        let relay = self.relay_mut(link)?;
        relay.bound.push(peer);
        relay.relayed
    }

    pub(super) fn refuse_relay(&mut self, link: TurnLink, why: String) {
        if let Some(relay) = self.relay_mut(link) {
            relay.refused.push(why);
        }
    }

    pub(super) fn fail_relay(&mut self, link: TurnLink, why: String, at: Time) {
        if let Some(relay) = self.relay_mut(link) {
            relay.failure = Some((at, why));
        }
    }

    /// Returns when TCP connections are to be opened; `None` if there are none to open, or the
    /// connection is up without them.
    pub(super) fn streams_due_at(&self) -> Option<Time> {
        let described_at = self.described_at.filter(|_| self.added)?;
        let waits = |offer: &StreamOffer| offer.state == StreamState::Waiting;
        let may_open = self.choice.allows_tcp() && !self.only_relays;
        if !may_open || !self.offered.streams.iter().any(waits) {
            return None;
        }
        if let Some(restart) = &self.restart {
            return restart.streams_due_at(self.via);
        }
        if self.connected_at.is_some() || self.ice_at.is_some() {
            return None;
        }
        let head_start = match () {
            () if !self.choice.allows_udp() => Duration::ZERO,
            () if !self.offered.reached.is_empty() => UDP_HEAD_START,
            () if self.offered.is_whole => Duration::ZERO,
            () => UDP_WAIT,
        };
        Some(described_at + head_start)
    }

    /// Returns the addresses to which connections are to be opened now.
    pub(super) fn begin_streams(&mut self, context: &SessionContext) -> Vec<SocketAddr> {
        let mut begun = Vec::new();
        for offer in &mut self.offered.streams {
            if offer.state == StreamState::Waiting {
                offer.state = StreamState::Opening;
                begun.push(offer.address);
            }
        }
        for address in &begun {
            if let Ok(source) = context.routes.source(*address) {
                self.tell(Candidate::tcp_active(source));
            }
        }
        begun
    }

    /// Takes the result of opening a connection.
    pub(super) fn take_stream(&mut self, address: SocketAddr, opened: io::Result<TcpStream>) {
        let path = opened.and_then(|stream| {
            let (path, local) = Path::of_stream(stream)?;
            let remote = address;
            self.more_paths.push((path, NearEnd::Tcp { local, remote }));
            Ok(local)
        });
        let streams = &mut self.offered.streams;
        if let Some(offer) = streams.iter_mut().find(|offer| offer.address == address) {
            offer.state = match path {
                Ok(local) => StreamState::Open(local.ip()),
                Err(error) => StreamState::Failed(error.to_string()),
            };
        }
    }

    /// Takes the sockets and connections that the shard does not know yet.
    pub(super) fn take_paths(&mut self) -> Vec<(Path, NearEnd)> {
        std::mem::take(&mut self.more_paths)
    }

    /// Takes our candidates that the server does not know yet, in the form of trickle messages.
    pub(super) fn take_untold(&mut self) -> Vec<String> {
        let untold = std::mem::take(&mut self.untold).into_iter();
        untold.map(|candidate| candidate.to_init()).collect()
    }

    pub(super) fn has_all_candidates(&mut self) {
        self.offered.is_whole = true;
    }

    /// Returns from when on it is certain that no candidate of the server can be used, unless
    /// another one comes; `None` if one can, or nothing is known yet.
    pub(super) fn without_path_at(&self) -> Option<Time> {
        let by_stream =
            self.choice.allows_tcp() && self.offered.streams.iter().any(StreamOffer::may_come);
        let by_relay =
            !self.more_relays.is_empty() || self.relays.iter().any(RelayEnd::is_reaching);
        if self.connected_at.is_some() || !self.offered.reached.is_empty() || by_stream || by_relay
        {
            return None;
        }
        let wait = if self.offered.is_whole {
            Duration::ZERO
        } else {
            CANDIDATES_WAIT
        };
        let described_at = self.described_at.map(|at| at + wait);
        if self.relays.iter().any(|relay| !relay.is_hopeless()) {
            return described_at;
        }
        let given_up = |relay: &RelayEnd| relay.failure.as_ref().map(|(at, _)| *at);
        let failed_at = self.relays.iter().filter_map(given_up).max();
        failed_at.or(described_at)
    }

    /// Says why no candidate of the server can be used: what it offers, and what we have.
    pub(super) fn without_path(&self) -> String {
        let OfferedCandidates {
            streams,
            unreached,
            unwanted,
            ..
        } = &self.offered;
        if self.only_relays {
            let told = self.relays.iter().map(RelayEnd::without_path);
            return format!("no path for media: {}", named(told));
        }
        let ours = self.our_addresses();
        let tcp = named(streams.iter().map(|offer| offer.address));
        let mut offers = Vec::new();
        if !unreached.is_empty() {
            let udp = named(unreached);
            offers.push(format!("UDP at {udp}, to which this host has no route"));
        }
        if !unwanted.is_empty() {
            let (udp, choice) = (named(unwanted), self.choice.name());
            offers.push(format!(
                "only UDP candidates ({udp}), and --transport {choice} was asked for (is rtc.tcp_port set at the server?)"
            ));
        }
        match tcp {
            tcp if tcp.is_empty() => {}
            tcp if !self.choice.allows_tcp() && unreached.is_empty() => offers.push(format!(
                "only TCP candidates ({tcp}), and --transport udp was asked for"
            )),
            tcp if !self.choice.allows_tcp() => offers.push(format!("TCP at {tcp}")),
            _ => offers.push(format!("TCP at {}", self.failed_streams())),
        }
        if offers.is_empty() {
            let protocol = if self.choice.allows_udp() {
                "UDP"
            } else {
                "TCP"
            };
            return format!(
                "no path for media: the server offers no address for it (no ICE candidate), and this host is ready for {protocol} at {ours}"
            );
        }
        let offers = offers.join("; and ");
        let relays = self.story_of_relays();
        format!("no path for media: the server offers {offers} (ours: {ours}){relays}")
    }

    fn failed_streams(&self) -> String {
        let told = self.offered.streams.iter().map(|offer| {
            let address = offer.address;
            match &offer.state {
                StreamState::Failed(why) => format!("{address}, which did not open ({why})"),
                StreamState::Open(ours) => format!("{address} (open from {ours})"),
                StreamState::Waiting | StreamState::Opening => address.to_string(),
            }
        });
        named(told)
    }

    fn story_of_relays(&self) -> String {
        let told = self.relays.iter().map(|relay| match &relay.bound[..] {
            peers if peers.is_empty() || relay.failure.is_some() => relay.without_path(),
            peers => {
                let (url, peers) = (&relay.url, named(peers.iter().map(SocketAddr::ip)));
                format!("through the TURN server {url} to {peers}")
            }
        });
        told.map(|story| format!("; {story}")).collect()
    }

    /// Names the two ends of a path that does not work. UDP ports are left out, because they differ
    /// between participants.
    pub(super) fn ends(&self) -> String {
        let ends = self.offered.pairs();
        let is_tried = |offer: &StreamOffer| offer.state != StreamState::Waiting;
        let udp = match named(&ends) {
            none if none.is_empty() => String::new(),
            ends => format!(" over UDP from {ends}"),
        };
        let relays = self.story_of_relays();
        if !self.offered.streams.iter().any(is_tried) {
            return udp + &relays;
        }
        let and = if udp.is_empty() { "" } else { ", and" };
        format!("{udp}{and} over TCP to {}{relays}", self.failed_streams())
    }

    /// Describes why media ended.
    pub(super) fn end_of_media(&self, failure: PeerFailure) -> String {
        match (failure, self.relay_in_use()) {
            (PeerFailure::IceDisconnected, _) => {
                let (question, ends) = (self.port_question(), self.ends());
                format!("{} ({question}){ends}", failure.describe())
            }
            (PeerFailure::PathEnded, Some(url)) => format!(
                "the connection to the TURN server {url}, which carried media, was closed by it, or by something on the way"
            ),
            _ => failure.describe().to_owned(),
        }
    }

    /// Returns the question whether the server's media port, or the relay's way to it, can be
    /// reached.
    pub(super) fn port_question(&self) -> &'static str {
        if self.only_relays {
            "does the TURN server reach it?"
        } else if self.offered.reached.is_empty() && !self.offered.streams.is_empty() {
            "is the server's TCP port for media reachable?"
        } else {
            "is the server's UDP port reachable?"
        }
    }

    /// It goes on by this. In words, where the server moved it off what carried it.
    pub(super) fn take_move(&mut self, via: Via) -> Option<String> {
        let was = std::mem::replace(&mut self.via, via);
        let is_restarted = self.restart.take().is_some();
        match (was, via) {
            (Via::Udp | Via::Relay(_), Via::Tcp(_)) if is_restarted => Some(
                "over TCP in the end: the server restarted ICE with TCP candidates alone"
                    .to_owned(),
            ),
            (Via::Udp | Via::Tcp(_), Via::Relay(_)) if self.moves => {
                self.moves = false;
                self.settle_relays();
                let url = self.relay_in_use()?;
                Some(format!(
                    "through the TURN server {url} in the end: the server wanted it when the session was resumed"
                ))
            }
            _ => None,
        }
    }

    /// Over what it goes where UDP was to carry it, and why; `None` where that was asked for, or
    /// UDP does.
    pub(super) fn why_not_udp(&self) -> Option<String> {
        if !self.choice.is_auto() || self.via == Via::Udp {
            return None;
        }
        let over = match self.relay_in_use() {
            Some(url) => format!("through the TURN server {url}"),
            None => "over TCP".to_owned(),
        };
        Some(format!("{over}: {}", self.why_not_straight()))
    }

    fn why_not_straight(&self) -> String {
        if self.only_relays {
            return "the server wants media to go through one".to_owned();
        }
        let offered = &self.offered;
        let ends = offered.pairs();
        let udp = if !ends.is_empty() {
            let patience = UDP_HEAD_START.as_secs();
            let ends = named(&ends);
            format!("UDP from {ends} did not come up within {patience} s")
        } else if !offered.unreached.is_empty() {
            let unreached = named(&offered.unreached);
            format!("this host has no route for UDP to {unreached}")
        } else {
            "the server offers no UDP candidate".to_owned()
        };
        let by_tcp = offered.streams.is_empty() || self.relay_in_use().is_none();
        if by_tcp {
            return udp;
        }
        format!("{udp}, nor did TCP to {}", self.failed_streams())
    }

    fn our_addresses(&self) -> String {
        let candidates = self.local.iter().flat_map(|local| &local.candidates);
        let mut addresses: Vec<IpAddr> = Vec::new();
        for candidate in candidates {
            if !addresses.contains(&candidate.address.ip()) {
                addresses.push(candidate.address.ip());
            }
        }
        named(addresses)
    }
}

/// A relay that carries the connection, or is to carry it.
struct RelayEnd {
    url: TurnUrl,
    asked: mpsc::UnboundedSender<SocketAddr>,
    /// Our address at the relay.
    relayed: Option<SocketAddr>,
    /// Candidates of the server that the relay was asked to reach.
    wanted: Vec<SocketAddr>,
    bound: Vec<SocketAddr>,
    /// Reasons why the relay does not reach other candidates.
    refused: Vec<String>,
    failure: Option<(Time, String)>,
}

impl RelayEnd {
    /// Asks the relay to reach a candidate. Returns whether it already does.
    fn reach(&mut self, peer: SocketAddr) -> bool {
        if !self.wanted.contains(&peer) && self.wanted.len() < RELAYED_MAX {
            self.wanted.push(peer);
            // A relay that has failed reports that elsewhere.
            let _ = self.asked.send(peer);
        }
        self.bound.contains(&peer)
    }

    /// Whether the relay reaches candidates, or still may.
    fn is_reaching(&self) -> bool {
        !self.wanted.is_empty() && !self.is_hopeless()
    }

    /// Whether the relay can no longer reach any candidate.
    fn is_hopeless(&self) -> bool {
        self.failure.is_some() || !self.wanted.is_empty() && self.refused.len() >= self.wanted.len()
    }

    fn without_path(&self) -> String {
        match &self.failure {
            Some((_, why)) => why.clone(),
            None if self.refused.is_empty() => format!(
                "the server offers no UDP candidate for the TURN server {} to reach",
                self.url
            ),
            None => named(&self.refused),
        }
    }
}

/// Candidates that the server has offered for media so far.
#[derive(Default)]
struct OfferedCandidates {
    /// Our address and the server's, for candidates that can be tried.
    reached: Vec<(IpAddr, IpAddr)>,
    /// Addresses without a route or a socket, with the reason.
    unreached: Vec<String>,
    /// UDP addresses that may not be used.
    unwanted: Vec<SocketAddr>,
    /// UDP addresses that a relay may reach.
    udp: Vec<SocketAddr>,
    streams: Vec<StreamOffer>,
    /// Whether the server has said that no more candidates follow.
    is_whole: bool,
}

impl OfferedCandidates {
    /// Returns our address and the server's for UDP, each pair once.
    fn pairs(&self) -> Vec<String> {
        let mut pairs: Vec<String> = Vec::new();
        for (ours, theirs) in &self.reached {
            let pair = format!("{ours} to {theirs}");
            if !pairs.contains(&pair) {
                pairs.push(pair);
            }
        }
        pairs
    }

    fn add_udp(&mut self, address: SocketAddr) {
        if !self.udp.contains(&address) && self.udp.len() < RELAYED_MAX {
            self.udp.push(address);
        }
    }

    fn add_stream(&mut self, address: SocketAddr) {
        let is_known = self.streams.iter().any(|offer| offer.address == address);
        if !is_known && self.streams.len() < STREAMS_MAX {
            self.streams.push(StreamOffer {
                address,
                state: StreamState::Waiting,
            });
        }
    }
}

/// ICE restarts on a connection: the server ends its TCP connections then, and where it names no
/// UDP candidate any more, it wants media to go by TCP.
struct IceRestart {
    at: Time,
    reaches_udp: bool,
}

impl IceRestart {
    fn streams_due_at(&self, via: Via) -> Option<Time> {
        match via {
            Via::Tcp(_) => Some(self.at),
            Via::Udp | Via::Relay(_) if self.reaches_udp => None,
            Via::Udp | Via::Relay(_) => Some(self.at + UDP_WAIT),
        }
    }
}

/// A passive TCP candidate of the server.
struct StreamOffer {
    address: SocketAddr,
    state: StreamState,
}

#[derive(PartialEq, Eq)]
enum StreamState {
    /// Not opened yet, because UDP is tried first.
    Waiting,
    Opening,
    /// Open, from this address of ours.
    Open(IpAddr),
    Failed(String),
}

impl StreamOffer {
    /// Whether the candidate may still be of use.
    fn may_come(&self) -> bool {
        !matches!(self.state, StreamState::Failed(_))
    }

    fn reset(&mut self) {
        self.state = StreamState::Waiting;
    }
}

/// Opens a connection to a passive candidate.
pub(super) async fn open_stream(address: SocketAddr) -> io::Result<TcpStream> {
    let opening = tokio::net::TcpStream::connect(address);
    match tokio::time::timeout(STREAM_TIMEOUT, opening).await {
        Ok(stream) => stream?.into_std(),
        Err(_) => Err(io::Error::other(format!(
            "no answer within {} s",
            STREAM_TIMEOUT.as_secs()
        ))),
    }
}

fn open_path(family: Family, context: &SessionContext) -> std::io::Result<(Path, u16)> {
    let path = Path::open_udp(family, context.receive_buffer_bytes)?;
    let port = path.port()?;
    Ok((path, port))
}

/// Names the first few, and how many more there are.
fn named<T: std::fmt::Display>(all: impl IntoIterator<Item = T>) -> String {
    let mut all = all.into_iter();
    let taken = all.by_ref().take(NAMED_MAX);
    let mut names: Vec<String> = taken.map(|name| name.to_string()).collect();
    let more = all.count();
    if more > 0 {
        names.push(format!("{more} more"));
    }
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_old_servers_demand_data_channels() {
        let demanding = ["1.5.3", "1.6.0", "0.15.7"];
        let content = ["1.7.2", "1.13.5", "2.0.0", "", "throng", "1", "1.x"];
        assert!(demanding.iter().all(|version| needs_data_channels(version)));
        assert!(!content.iter().any(|version| needs_data_channels(version)));
    }
}
