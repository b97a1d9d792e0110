//! The engine: one worker thread a core drives its shard of participants by a 1 ms tick.
//!
//! A [`shard::Shard`] is sans-IO: time, datagrams and commands go in; datagrams, events and counts come out. A [`worker`] owns the sockets and the clock around it.

mod connection;
pub mod health;
pub mod publisher;
pub mod shard;
pub mod subscriber;
mod timers;
pub mod worker;

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use crate::measure::Kind;
use crate::media::identity::FrameIdentity;
use crate::transport::peer::{IceCredentials, Identity, PeerFailure, PeerParameters};
use crate::units::{Epoch, Time};
use publisher::SendParameters;
use subscriber::StreamOutcome;

/// The engine's heartbeat.
pub const TICK: Duration = Duration::from_millis(1);

/// Where a shard's datagrams go. The backend lends the buffer that a packet is written into, so nothing is copied on the way to the kernel.
pub trait Io {
    /// The buffer for what is sent next: at least [`crate::net::SEND_BYTES_MAX`] bytes.
    fn lend(&mut self) -> &mut [u8];

    /// Sends the first `len` bytes of the lent buffer from peer `key`'s socket, as datagrams of `segment` bytes (the last may be shorter).
    fn send(&mut self, key: usize, to: SocketAddr, len: usize, segment: usize);

    /// From now on peer `key` talks to `to` only.
    fn connect(&mut self, key: usize, to: SocketAddr);

    /// Peer `key` may hear from other addresses again. Where nothing else is shut out by [`Io::connect`], there is nothing to do.
    fn disconnect(&mut self, _key: usize) {}
}

/// What signalling asks of a shard. Peers are named by a key below the shard's capacity.
pub enum Command {
    /// A peer that was removed may be followed by another with its key: that one's account is then closed.
    AddPeer {
        key: usize,
        /// `None` in simulations: the [`Io`] then knows where the key's datagrams go.
        socket: Option<UdpSocket>,
        peer: Box<NewPeer>,
        /// Where this peer's events go.
        events: tokio::sync::mpsc::UnboundedSender<Event>,
    },
    AddRemoteCandidate {
        key: usize,
        address: SocketAddr,
    },
    /// New ICE credentials on both sides, and the other side's new candidates. The DTLS session and all media stay.
    RestartIce {
        key: usize,
        local: IceCredentials,
        remote: IceCredentials,
        remote_candidates: Vec<SocketAddr>,
    },
    /// Tracks to send, once their description is agreed.
    Publish {
        key: usize,
        tracks: Vec<SendParameters>,
    },
    /// Streams that the server announced for this peer.
    Subscribe {
        key: usize,
        streams: Vec<StreamParameters>,
    },
    /// Streams that the server withdrew, by media SSRC.
    Unsubscribe {
        key: usize,
        ssrcs: Vec<u32>,
    },
    /// Every track of every peer stops at its next frame; repair goes on.
    StopPublishing,
    /// Closes one peer for good.
    RemovePeer {
        key: usize,
    },
    /// Asks for a [`worker::Report`] now.
    Report,
    /// Ends the worker.
    Stop,
}

/// A peer connection with all that both descriptions say.
pub struct NewPeer {
    /// The participant's index over the whole run, and its room.
    pub participant: u32,
    pub room: u32,
    pub parameters: PeerParameters,
    /// Our SSRC in RTCP where the peer sends no media.
    pub rtcp_ssrc: u32,
    pub cname: String,
    /// When this participant ought to have joined: latencies of its subscriptions count from here.
    pub intended_at: Time,
}

/// One stream that the server will send.
#[derive(Clone, Debug)]
pub struct StreamParameters {
    pub kind: Kind,
    pub ssrc: u32,
    pub rtx_ssrc: Option<u32>,
    pub clock_rate: u32,
    /// When the description that names it was applied.
    pub announced_at: Time,
}

/// What a shard tells signalling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// ICE has a path.
    IceConnected {
        key: usize,
        at: Time,
    },
    /// DTLS is done: media may flow.
    Connected {
        key: usize,
        at: Time,
    },
    Failed {
        key: usize,
        failure: PeerFailure,
    },
    /// The first media packet came.
    FirstMedia {
        key: usize,
        at: Time,
    },
}

/// What every shard of a run shares.
#[derive(Clone)]
pub struct ShardConfig {
    pub identity: Identity,
    pub roster: Arc<Roster>,
    pub epoch: Epoch,
}

/// What became of one peer connection, for the report's lines per participant.
#[derive(Clone, Debug)]
pub struct PeerOutcome {
    pub participant: u32,
    /// The last one measured.
    pub rtt_rtcp: Option<Duration>,
    pub streams: Vec<StreamOutcome>,
}

/// What the sockets saw since the shard last took the counts.
#[derive(Default)]
pub struct IoCounts {
    pub socket_drops: u64,
    pub send_errors: u64,
    pub setup_dropped: u64,
}

/// What all participants of a run know of one another: who publishes what, since when, and how far they are.
///
/// Written by the publisher's shard, read by subscribers' shards: plain relaxed atomics, one cell a track.
pub struct Roster {
    cells: Vec<TrackCell>,
    pub run: u32,
}

#[derive(Default)]
struct TrackCell {
    room: u32,
    frames: std::sync::atomic::AtomicU32,
    /// Nanoseconds on the run's clock; 0 while not published.
    published_at: std::sync::atomic::AtomicU64,
}

/// Tracks of one participant: 0 is audio, 1 is video.
pub const TRACKS_PER_PARTICIPANT: usize = 2;

impl Roster {
    /// `rooms` gives each participant's room.
    pub fn new(run: u32, rooms: impl Iterator<Item = u32>) -> Roster {
        let cells = rooms
            .flat_map(|room| [room; TRACKS_PER_PARTICIPANT])
            .map(|room| TrackCell {
                room,
                ..TrackCell::default()
            })
            .collect();
        Roster { cells, run }
    }

    pub fn set_published(&self, origin: u32, track: u8, at: Time) {
        if let Some(cell) = self.cell(origin, track) {
            cell.published_at.store(at.as_nanos().max(1), std::sync::atomic::Ordering::Relaxed);
        }
    }

    fn set_frames(&self, identity: &FrameIdentity, frames: u32) {
        if let Some(cell) = self.cell(identity.origin, identity.track) {
            cell.frames.store(frames, std::sync::atomic::Ordering::Relaxed);
        }
    }

    /// How many frames the track has sent so far.
    pub fn frames(&self, origin: u32, track: u8) -> u32 {
        self.cell(origin, track)
            .map_or(0, |cell| cell.frames.load(std::sync::atomic::Ordering::Relaxed))
    }

    pub fn published_at(&self, origin: u32, track: u8) -> Option<Time> {
        let at = self.cell(origin, track)?.published_at.load(std::sync::atomic::Ordering::Relaxed);
        (at > 0).then(|| Time::from_nanos(at))
    }

    /// The room that a track belongs to; `None` where the identity names nobody of this run.
    pub fn room(&self, origin: u32, track: u8) -> Option<u32> {
        self.cell(origin, track).map(|cell| cell.room)
    }

    fn cell(&self, origin: u32, track: u8) -> Option<&TrackCell> {
        if usize::from(track) >= TRACKS_PER_PARTICIPANT {
            return None;
        }
        self.cells.get(origin as usize * TRACKS_PER_PARTICIPANT + usize::from(track))
    }
}
