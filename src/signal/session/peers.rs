//! One peer connection's part of a session: its path, its credentials, and how far its set-up is.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::{SessionContext, SessionFailure};
use crate::path::{Family, Path};
use crate::transport::peer::{IceCredentials, PeerParameters};
use crate::transport::sdp::{
    Candidate, CandidateTransport, DtlsSetup, LocalTransport, RemoteTransport, ice_ufrag,
};
use crate::units::Time;

/// Candidates that may come before the description they belong to.
const EARLY_CANDIDATES_MAX: usize = 32;
/// Addresses of ours that the server is told: a host has a few.
const LOCAL_CANDIDATES_MAX: usize = 8;
/// Addresses of the server that are named where none of them helps.
const NAMED_MAX: usize = 4;
/// How long to wait for candidates after a description without a usable one.
const CANDIDATES_WAIT: Duration = Duration::from_millis(1_500);

/// The connections of a participant. With one connection for everything, that is the publisher's:
/// LiveKit's signalling calls it so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PeerRole {
    Publisher,
    Subscriber,
}

impl PeerRole {
    pub(super) const BOTH: [PeerRole; 2] = [PeerRole::Publisher, PeerRole::Subscriber];
}

/// One peer connection's part of the session.
pub(super) struct PeerHalf {
    /// The participant is not in before this connection is up.
    pub(super) wanted: bool,
    pub(super) local: Option<LocalTransport>,
    /// Until the shard has it.
    path: Option<Path>,
    /// The families that have a socket, with its port.
    ports: Vec<(Family, u16)>,
    /// Sockets that the shard is to be given, with our address on them.
    more_paths: Vec<(Path, SocketAddr)>,
    /// Addresses of ours that no description has told the server.
    untold: Vec<SocketAddr>,
    offered: OfferedCandidates,
    /// When the server's description came.
    described_at: Option<Time>,
    /// The shard knows this connection.
    pub(super) added: bool,
    pub(super) ice_at: Option<Time>,
    pub(super) connected_at: Option<Time>,
    early_candidates: Vec<Candidate>,
    /// Candidates that came on their own since the description.
    pub(super) trickled: u32,
    remote_ufrag: Option<String>,
}

/// What a description changes for the shard.
pub(super) enum DescriptionChange {
    New {
        path: Path,
        parameters: PeerParameters,
    },
    /// The connection stays, its ICE credentials do not.
    Restart {
        local: IceCredentials,
        remote: IceCredentials,
        remote_candidates: Vec<SocketAddr>,
    },
}

impl PeerHalf {
    pub(super) fn new(wanted: bool) -> PeerHalf {
        PeerHalf {
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
            early_candidates: Vec::new(),
            trickled: 0,
            remote_ufrag: None,
        }
    }

    pub(super) fn is_missing(&self) -> bool {
        self.wanted && self.connected_at.is_none()
    }

    /// Opens a path and draws the credentials, where that has not been done: our end, as
    /// descriptions give it.
    ///
    /// The server has named no candidate yet. Its media is usually where that of others of this run
    /// was, and for the first one where its signalling is.
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
                let opened = open_path(Family::of(ip), context)
                    .map_err(|error| SessionFailure::lasting(format!("no UDP socket: {error}")))?;
                let (path, port) = opened;
                let address = SocketAddr::new(ip, port);
                let IceCredentials { ufrag, password } = IceCredentials::random();
                self.path = Some(path);
                self.ports.push((Family::of(ip), port));
                LocalTransport {
                    ufrag,
                    pwd: password,
                    fingerprint: context.fingerprint,
                    setup: DtlsSetup::Active,
                    candidates: vec![Candidate::host(address)],
                    session_id,
                }
            }
        };
        Ok(self.local.insert(local))
    }

    /// For an ICE restart (RFC 8839, section 4.4.1.1.1): our next description has new credentials.
    /// Our address stays.
    pub(super) fn draw_credentials(&mut self) {
        if let Some(local) = self.local.as_mut() {
            let IceCredentials { ufrag, password } = IceCredentials::random();
            (local.ufrag, local.pwd) = (ufrag, password);
        }
    }

    /// Whether a description of the server restarts ICE.
    pub(super) fn is_restarted_by(&self, description: &str) -> bool {
        let known = self.remote_ufrag.as_deref();
        known.is_some_and(|known| ice_ufrag(description).is_some_and(|ufrag| ufrag != known))
    }

    /// Takes the other end from a description, and says what that changes for the shard.
    pub(super) fn take_remote(
        &mut self,
        remote: &RemoteTransport,
        ice_controlling: bool,
        setup: DtlsSetup,
        (context, now): (&SessionContext, Time),
    ) -> Option<DescriptionChange> {
        self.described_at.get_or_insert(now);
        let mut remote_candidates = self.reach_all(&remote.candidates, context);
        let early = std::mem::take(&mut self.early_candidates);
        remote_candidates.extend(self.reach_all(&early, context));
        let local = self.local.as_ref()?;
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
            return is_other.then_some(DescriptionChange::Restart {
                local: local_credentials,
                remote: remote_credentials,
                remote_candidates,
            });
        };
        self.added = true;
        let parameters = PeerParameters {
            local_address: local.candidates.first()?.address,
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

    /// Sees to it that there is a socket for a candidate of the server: its address, where there is
    /// one.
    pub(super) fn reach(
        &mut self,
        candidate: &Candidate,
        context: &SessionContext,
    ) -> Option<SocketAddr> {
        let address = candidate.address;
        if candidate.transport != CandidateTransport::Udp {
            self.offered.tcp.push(address);
            return None;
        }
        let reached = context
            .routes
            .source(address)
            .and_then(|source| self.open_towards(source, context).map(|()| source));
        match reached {
            Ok(source) => {
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

    /// A socket for the route on which `source` is our address, and what the server is to be told
    /// of it.
    fn open_towards(&mut self, source: IpAddr, context: &SessionContext) -> std::io::Result<()> {
        let family = Family::of(source);
        let known = self.ports.iter().find(|(known, _)| *known == family);
        let port = match known {
            Some((_, port)) => *port,
            // The sockets of an established connection are settled.
            None if self.connected_at.is_some() => {
                return Err(std::io::ErrorKind::NotConnected.into());
            }
            None => {
                let (path, port) = open_path(family, context)?;
                self.ports.push((family, port));
                self.more_paths.push((path, SocketAddr::new(source, port)));
                port
            }
        };
        let candidate = Candidate::host(SocketAddr::new(source, port));
        if let Some(local) = &mut self.local
            && local.candidates.len() < LOCAL_CANDIDATES_MAX
            && !local.candidates.contains(&candidate)
        {
            self.untold.push(candidate.address);
            local.candidates.push(candidate);
        }
        Ok(())
    }

    /// Sockets that the shard does not know.
    pub(super) fn take_paths(&mut self) -> Vec<(Path, SocketAddr)> {
        std::mem::take(&mut self.more_paths)
    }

    /// Candidates of ours that the server does not know, as a trickle message has them.
    pub(super) fn take_untold(&mut self) -> Vec<String> {
        let untold = std::mem::take(&mut self.untold).into_iter();
        untold
            .map(|address| Candidate::host(address).to_init())
            .collect()
    }

    pub(super) fn has_all_candidates(&mut self) {
        self.offered.is_whole = true;
    }

    /// When it is settled that no candidate of the server can be used, unless one comes; `None`
    /// where one can, or nothing is known yet.
    pub(super) fn without_path_at(&self) -> Option<Time> {
        if self.connected_at.is_some() || !self.offered.reached.is_empty() {
            return None;
        }
        let wait = if self.offered.is_whole {
            Duration::ZERO
        } else {
            CANDIDATES_WAIT
        };
        self.described_at.map(|at| at + wait)
    }

    /// Why no candidate of the server can be used: what it offers, and what we have.
    pub(super) fn without_path(&self) -> String {
        let OfferedCandidates { tcp, unreached, .. } = &self.offered;
        let ours = self.our_addresses();
        let tcp = named(tcp);
        if unreached.is_empty() && tcp.is_empty() {
            return format!(
                "no path for media: the server offers no address for it (no ICE candidate), and this host is ready for UDP at {ours}"
            );
        }
        if unreached.is_empty() {
            return format!(
                "no path for media: the server offers only TCP candidates ({tcp}), and this version sends media over UDP (ours: {ours})"
            );
        }
        let and_tcp = if tcp.is_empty() {
            String::new()
        } else {
            format!(", and TCP at {tcp}")
        };
        format!(
            "no path for media: the server offers UDP at {}{and_tcp}, to which this host has no route (ours: {ours})",
            named(unreached)
        )
    }

    /// The two ends of a path that does not work, without ports: those differ between participants.
    pub(super) fn ends(&self) -> String {
        let mut ends: Vec<String> = Vec::new();
        for (ours, theirs) in &self.offered.reached {
            let pair = format!("{ours} to {theirs}");
            if !ends.contains(&pair) {
                ends.push(pair);
            }
        }
        match named(&ends) {
            none if none.is_empty() => String::new(),
            ends => format!(" over UDP from {ends}"),
        }
    }

    fn our_addresses(&self) -> String {
        let candidates = self.local.iter().flat_map(|local| &local.candidates);
        let addresses: Vec<IpAddr> = candidates.map(|candidate| candidate.address.ip()).collect();
        named(&addresses)
    }
}

/// What the server has offered for media so far.
#[derive(Default)]
struct OfferedCandidates {
    /// Our address and the server's, of candidates that can be tried.
    reached: Vec<(IpAddr, IpAddr)>,
    /// Addresses to which there is no route or no socket, with the reason.
    unreached: Vec<String>,
    tcp: Vec<SocketAddr>,
    /// The server said that no more follow.
    is_whole: bool,
}

fn open_path(family: Family, context: &SessionContext) -> std::io::Result<(Path, u16)> {
    let path = Path::open_udp(family, context.receive_buffer_bytes)?;
    let port = path.port()?;
    Ok((path, port))
}

/// The first few, and how many more.
fn named<T: std::fmt::Display>(all: &[T]) -> String {
    let mut names: Vec<String> = all.iter().take(NAMED_MAX).map(T::to_string).collect();
    if all.len() > NAMED_MAX {
        names.push(format!("{} more", all.len() - NAMED_MAX));
    }
    names.join(", ")
}
