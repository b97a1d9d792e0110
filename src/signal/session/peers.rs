//! One peer connection's part of a session: its socket, its credentials, and how far its set-up is.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use super::{Failure, SessionContext};
use crate::net;
use crate::transport::peer::{IceCredentials, PeerParameters};
use crate::transport::sdp::{
    Candidate, CandidateTransport, LocalTransport, RemoteTransport, Setup, ice_ufrag,
};
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
    /// Candidates that came on their own since the description.
    pub(super) trickled: u32,
    remote_ufrag: Option<String>,
}

/// What a description changes for the shard.
pub(super) enum Change {
    New {
        socket: UdpSocket,
        parameters: PeerParameters,
    },
    /// The connection stays, its ICE credentials do not.
    Restart {
        local: IceCredentials,
        remote: IceCredentials,
        remote_candidates: Vec<SocketAddr>,
    },
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
            trickled: 0,
            remote_ufrag: None,
        }
    }

    pub(super) fn is_missing(&self) -> bool {
        self.wanted && self.connected_at.is_none()
    }

    /// Opens the socket and draws the credentials, where that has not been done: our end, as descriptions give it.
    pub(super) fn open(
        &mut self,
        local_ip: IpAddr,
        context: &SessionContext,
        session_id: u64,
    ) -> Result<&LocalTransport, Failure> {
        let local = match self.local.take() {
            Some(local) => local,
            None => {
                let failed = |error: &dyn std::fmt::Display| {
                    Failure::lasting(format!("no UDP socket on {local_ip}: {error}"))
                };
                let socket = net::open_media_socket(local_ip, context.receive_buffer_bytes)
                    .map_err(|error| failed(&error))?;
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

    /// For an ICE restart (RFC 8839, section 4.4.1.1.1): our next description has new credentials. Our address stays.
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
        setup: Setup,
    ) -> Option<Change> {
        let local = self.local.as_ref()?;
        let credentials = |ufrag: &str, password: &str| IceCredentials {
            ufrag: ufrag.to_owned(),
            password: password.to_owned(),
        };
        let local_credentials = credentials(&local.ufrag, &local.pwd);
        let remote_credentials = credentials(&remote.ufrag, &remote.pwd);
        let mut remote_candidates: Vec<SocketAddr> =
            remote.candidates.iter().filter_map(udp_address).collect();
        self.trickled = 0;
        let is_other =
            self.remote_ufrag.replace(remote.ufrag.clone()).as_ref() != Some(&remote.ufrag);
        let Some(socket) = self.socket.take() else {
            return is_other.then_some(Change::Restart {
                local: local_credentials,
                remote: remote_credentials,
                remote_candidates,
            });
        };
        remote_candidates.append(&mut self.early_candidates);
        self.added = true;
        let parameters = PeerParameters {
            local_address: local.candidates.first()?.address,
            local: local_credentials,
            remote: remote_credentials,
            remote_fingerprint: remote.fingerprint,
            remote_candidates,
            ice_controlling,
            dtls_active: setup == Setup::Active,
        };
        Some(Change::New { socket, parameters })
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
