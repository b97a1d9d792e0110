//! The other end of a connection under test. It is ours for every stack, so that all of them get
//! the same datagrams.

use std::net::SocketAddr;

use throng::engine::ShardConfig;
use throng::transport::peer::{IceCredentials, Peer, PeerEvent, PeerParameters};
use throng::transport::sdp::Fingerprint;
use throng::units::Time;

use super::origin::Plain;

/// Transport parameters of one end, as its description gives them.
#[derive(Clone)]
pub struct Side {
    pub address: SocketAddr,
    pub credentials: IceCredentials,
    pub fingerprint: Fingerprint,
}

/// An ICE-lite end and DTLS server, as an SFU is. It has no media of its own: it seals the packets
/// of an [`super::origin::Origin`].
pub struct Remote {
    pub side: Side,
    pub peer: Peer,
    pub connected: bool,
    next_turn: Time,
}

impl Remote {
    /// Returns what the stack under test must know of this end. This is known before this end knows
    /// of the stack.
    pub fn side(key: usize, config: &ShardConfig) -> Side {
        Side {
            address: address(2, key),
            credentials: IceCredentials::random(),
            fingerprint: config.identity.fingerprint(),
        }
    }

    pub fn new(side: Side, theirs: &Side, config: &ShardConfig, now: Time) -> Remote {
        let parameters = PeerParameters {
            local_address: side.address,
            local: side.credentials.clone(),
            remote: theirs.credentials.clone(),
            remote_fingerprint: theirs.fingerprint,
            remote_candidates: Vec::new(),
            ice_controlling: false,
            dtls_active: false,
        };
        let mut peer = Peer::lite(&config.identity, &parameters, config.epoch, now);
        peer.handle_timeout(now);
        Remote {
            side,
            peer,
            connected: false,
            next_turn: now,
        }
    }

    pub fn handle_setup(&mut self, datagram: &[u8], from: SocketAddr, now: Time) {
        self.peer.handle_setup_datagram(datagram, from, now);
        self.next_turn = now;
    }

    /// Handles timers that are due, and passes outgoing datagrams to `send`.
    pub fn turn(&mut self, now: Time, send: impl FnMut(&[u8])) {
        // This runs each millisecond and should touch little memory: what it touches evicts the
        // state of the stack under test from the cache.
        if self.next_turn > now {
            return;
        }
        if self.peer.next_timeout() <= now {
            self.peer.handle_timeout(now);
        }
        let (mut send, connected) = (send, &mut self.connected);
        self.peer.poll(
            now,
            |datagram, _| send(datagram),
            |event| *connected |= event == PeerEvent::Connected,
        );
        self.next_turn = self.peer.next_timeout();
    }

    /// Seals a packet for this connection into `out`.
    pub fn seal(&self, plain: &Plain, out: &mut Vec<u8>) {
        let sealer = self.peer.sealer().expect("connected");
        out.clear();
        out.extend_from_slice(&plain.bytes);
        out.resize(plain.bytes.len() + sealer.profile().rtp_overhead(), 0);
        let sealed = sealer.seal_rtp(out, plain.header_len, plain.bytes.len(), plain.index);
        assert_eq!(sealed, Ok(out.len()));
    }
}

/// Returns the address of end `host` of connection `key`, in a network that exists in memory only.
pub fn address(host: u8, key: usize) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, host], 10_000 + key as u16))
}
