//! One peer connection's part of a session: its socket, its credentials, and how far its set-up is.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use super::{Failure, SessionContext};
use crate::net;
use crate::transport::peer::{IceCredentials, PeerParameters};
use crate::transport::sdp::{Candidate, CandidateTransport, LocalTransport, RemoteTransport, Setup};
use crate::units::Time;

/// Candidates that may come before the description they belong to.
const EARLY_CANDIDATES_MAX: usize = 32;

/// The connections of a participant. With one connection for everything, that is the publisher's: LiveKit's signalling calls it so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Publisher,
    Subscriber,
}

impl Role {
    pub(super) const BOTH: [Role; 2] = [Role::Publisher, Role::Subscriber];
}

/// One peer connection's part of the session.
pub(super) struct Half {
    /// The participant is not in before this connection is up.
    pub(super) wanted: bool,
    pub(super) local: Option<LocalTransport>,
    socket: Option<UdpSocket>,
    /// The shard knows this connection.
    pub(super) added: bool,
    pub(super) ice_at: Option<Time>,
    pub(super) connected_at: Option<Time>,
    early_candidates: Vec<SocketAddr>,
}

impl Half {
    pub(super) fn new(wanted: bool) -> Half {
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

    pub(super) fn is_missing(&self) -> bool {
        self.wanted && self.connected_at.is_none()
    }

    /// Opens the socket and draws the credentials, where that has not been done: our end, as descriptions give it.
    pub(super) fn open(&mut self, local_ip: IpAddr, context: &SessionContext, session_id: u64) -> Result<&LocalTransport, Failure> {
        let local = match self.local.take() {
            Some(local) => local,
            None => {
                let failed = |error: &dyn std::fmt::Display| Failure::of(format!("no UDP socket on {local_ip}: {error}"));
                let socket = net::open_media_socket(local_ip, context.receive_buffer_bytes).map_err(|error| failed(&error))?;
                let address = socket.local_addr().map_err(|error| failed(&error))?;
                let IceCredentials { ufrag, password } = IceCredentials::random();
                self.socket = Some(socket);
                LocalTransport {
                    ufrag,
                    pwd: password,
                    fingerprint: context.fingerprint,
                    setup: Setup::Active,
                    candidates: vec![Candidate::host(address)],
                    session_id,
                }
            }
        };
        Ok(self.local.insert(local))
    }

    /// What the shard needs of this connection, with its socket; `None` if that was taken before or there is no socket yet.
    pub(super) fn take_parameters(&mut self, remote: &RemoteTransport, ice_controlling: bool, setup: Setup) -> Option<(UdpSocket, PeerParameters)> {
        let (local, socket) = (self.local.as_ref()?, self.socket.take()?);
        let local_address = local.candidates.first()?.address;
        let mut remote_candidates: Vec<SocketAddr> = remote.candidates.iter().filter_map(udp_address).collect();
        remote_candidates.append(&mut self.early_candidates);
        self.added = true;
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
        Some((socket, parameters))
    }

    /// Keeps a candidate that came before the shard knows the connection.
    pub(super) fn keep_candidate(&mut self, address: SocketAddr) {
        if self.early_candidates.len() < EARLY_CANDIDATES_MAX {
            self.early_candidates.push(address);
        }
    }
}

pub(super) fn udp_address(candidate: &Candidate) -> Option<SocketAddr> {
    (candidate.transport == CandidateTransport::Udp).then_some(candidate.address)
}
