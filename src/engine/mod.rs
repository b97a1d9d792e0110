//! The engine: one worker thread a core drives its shard of participants by a 1 ms tick.
//!
//! A [`shard::Shard`] is sans-IO: time, datagrams and commands go in; datagrams, events and counts come out. A [`worker`] owns the sockets and the clock around it.

mod attribution;
pub mod blame;
mod connection;
mod emodel;
mod feedback;
pub mod health;
mod ledger;
pub mod playout;
pub mod publisher;
mod sending;
pub mod shard;
pub mod subscriber;
mod timers;
mod uplink;
pub mod worker;

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::measure::Kind;
use crate::media::identity::FrameIdentity;
use crate::recording::Tap;
use crate::transport::peer::{IceCredentials, Identity, PeerFailure, PeerParameters};
use crate::units::{Epoch, Time};
use publisher::SendParameters;
use subscriber::StreamOutcome;
use uplink::{Asked, Lacking, Lacks};

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
    /// Which layers of a track somebody watches, one bit each, the lowest layer first. The others rest, and start again with a key frame.
    SetLayers {
        key: usize,
        track: u8,
        layers: u8,
    },
    /// A muted track sends nothing, whoever watches.
    SetMuted {
        key: usize,
        track: u8,
        muted: bool,
    },
    /// Which layer the server was asked for at `at`, by media SSRC; `None`: none at all for now.
    Watch {
        key: usize,
        ssrc: u32,
        layer: Option<u8>,
        at: Time,
    },
    /// The server said at `at` that it pauses a stream for want of bandwidth, or sends it again; by media SSRC.
    SetPaused {
        key: usize,
        ssrc: u32,
        paused: bool,
        at: Time,
    },
    /// What this participant receives, from its first subscription on, is copied to the tap.
    Record {
        participant: u32,
        tap: Box<Tap>,
    },
    /// The participant leaves soon: what is sent to this peer from now on is not expected, and what is under way may still come. [`Command::RemovePeer`] follows.
    Leave {
        key: usize,
    },
    /// Every track of every peer stops at its next frame; repair goes on.
    StopPublishing,
    /// Closes one peer for good.
    RemovePeer {
        key: usize,
    },
    /// Asks for a [`worker::Report`] now.
    Report,
    /// The same, with what has become of every peer so far; then every stream is marked ([`subscriber::StreamOutcome::frames_overdue`]).
    Survey,
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
    /// It sends no more than its path carries, as transport-wide feedback and REMB show it.
    pub obeys_bandwidth: bool,
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
    /// Whether NACKs were agreed on.
    pub nack: bool,
    /// The id of the transport-wide sequence number, where feedback about it was agreed on.
    pub transport_cc_extension: Option<u8>,
    /// The id of abs-send-time, where REMB was agreed on.
    pub abs_send_time_extension: Option<u8>,
    /// When the description that names it was applied.
    pub announced_at: Time,
}

/// What a shard tells signalling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// [`Command::RestartIce`] is done: the other side's checks will be understood.
    IceRestarted {
        key: usize,
    },
    /// ICE has a path, and DTLS has not followed at once: where it never does, this is all that is known of the join.
    IceConnected {
        key: usize,
        at: Time,
    },
    /// DTLS is done: media may flow.
    Connected {
        key: usize,
        /// When ICE had a path.
        ice_at: Option<Time>,
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
    /// When the participant ought to have joined, or was lost: later than all that an earlier visit of its has left behind.
    pub intended_at: Time,
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
/// Written by the publisher's shard, read by subscribers' shards: plain relaxed atomics, one cell for each layer of each track.
pub struct Roster {
    cells: Vec<LayerCell>,
    pub run: u32,
}

#[derive(Default)]
struct LayerCell {
    room: u32,
    frames: AtomicU32,
    /// From one frame to the next.
    interval_us: AtomicU32,
    /// How often the track was muted and unmuted: odd while it is muted. Kept for the lowest layer.
    mute_changes: AtomicU32,
    /// Nanoseconds on the run's clock; 0 while not published. Kept for the lowest layer.
    published_at: AtomicU64,
    /// Made when the layer is first published: most participants publish nothing.
    lacking: OnceLock<Box<Lacking>>,
}

/// The number of a participant's audio track in frame identities; its video track has the next one.
pub const AUDIO_TRACK: u8 = 0;
pub const VIDEO_TRACK: u8 = 1;
/// Simulcast layers of a video track, at most.
pub const LAYERS_MAX: usize = 3;
const CELLS_PER_PARTICIPANT: usize = 1 + LAYERS_MAX;

/// The number of a participant's track of one kind.
pub const fn track_number(kind: Kind) -> u8 {
    match kind {
        Kind::Audio => AUDIO_TRACK,
        Kind::Video => VIDEO_TRACK,
    }
}

impl Roster {
    /// `rooms` gives each participant's room.
    pub fn new(run: u32, rooms: impl Iterator<Item = u32>) -> Roster {
        let cells = rooms
            .flat_map(|room| [room; CELLS_PER_PARTICIPANT])
            .map(|room| LayerCell {
                room,
                ..LayerCell::default()
            })
            .collect();
        Roster { cells, run }
    }

    /// A layer begins at `at`, with a frame every `interval`.
    pub fn set_published(&self, identity: &FrameIdentity, at: Time, interval: Duration) {
        if let Some(cell) = self.cell(identity.origin, identity.track, identity.layer) {
            cell.published_at.store(at.as_nanos().max(1), Relaxed);
            cell.interval_us.store(u32::try_from(interval.as_micros()).unwrap_or(u32::MAX), Relaxed);
            cell.lacking.get_or_init(Box::default);
        }
    }

    fn set_frames(&self, identity: &FrameIdentity, frames: u32) {
        if let Some(cell) = self.cell(identity.origin, identity.track, identity.layer) {
            if let (Some(lacking), Some(newest)) = (cell.lacking.get(), frames.checked_sub(1)) {
                lacking.begin(newest);
            }
            cell.frames.store(frames, Relaxed);
        }
    }

    /// The server has asked for a packet of this frame.
    fn set_asked(&self, identity: &FrameIdentity, frame: u32, asked: Asked) {
        let cell = self.cell(identity.origin, identity.track, identity.layer);
        if let Some((cell, lacking)) = cell.and_then(|cell| Some((cell, cell.lacking.get()?))) {
            lacking.set_asked(frame, asked, cell.frames.load(Relaxed));
        }
    }

    /// The layer of this frame comes on one stream more.
    fn add_listener(&self, identity: &FrameIdentity) {
        let cell = self.cell(identity.origin, identity.track, identity.layer);
        if let Some(lacking) = cell.and_then(|cell| cell.lacking.get()) {
            lacking.add_listener();
        }
    }

    /// Somebody has received this frame, so the server had it.
    fn set_received(&self, identity: &FrameIdentity) {
        let cell = self.cell(identity.origin, identity.track, identity.layer);
        if let Some(lacking) = cell.and_then(|cell| cell.lacking.get()) {
            lacking.set_received(identity.frame);
        }
    }

    /// Whether the server never had a frame, by its NACKs; `None` where that cannot be told any more.
    fn lacks(&self, origin: u32, track: u8, layer: u8, frame: u32) -> Option<Lacks> {
        let cell = self.cell(origin, track, layer)?;
        cell.lacking.get()?.lacks(frame, cell.frames.load(Relaxed))
    }

    fn set_muted(&self, origin: u32, track: u8, muted: bool) {
        if let Some(cell) = self
            .cell(origin, track, 0)
            .filter(|cell| is_muted(cell.mute_changes.load(Relaxed)) != muted)
        {
            cell.mute_changes.fetch_add(1, Relaxed);
        }
    }

    /// How many frames a layer has sent so far.
    pub fn frames(&self, origin: u32, track: u8, layer: u8) -> u32 {
        self.cell(origin, track, layer).map_or(0, |cell| cell.frames.load(Relaxed))
    }

    /// From one frame of a layer to the next; zero while it is not published.
    pub fn frame_interval(&self, origin: u32, track: u8, layer: u8) -> Duration {
        let micros = self.cell(origin, track, layer).map_or(0, |cell| cell.interval_us.load(Relaxed));
        Duration::from_micros(micros.into())
    }

    pub fn published_at(&self, origin: u32, track: u8) -> Option<Time> {
        let at = self.cell(origin, track, 0)?.published_at.load(Relaxed);
        (at > 0).then(|| Time::from_nanos(at))
    }

    /// Grows by one whenever the track is muted or unmuted; see [`is_muted`].
    fn mute_changes(&self, origin: u32, track: u8) -> u32 {
        self.cell(origin, track, 0).map_or(0, |cell| cell.mute_changes.load(Relaxed))
    }

    /// The room that a track belongs to; `None` where the identity names nobody of this run.
    pub fn room(&self, origin: u32, track: u8) -> Option<u32> {
        self.cell(origin, track, 0).map(|cell| cell.room)
    }

    fn cell(&self, origin: u32, track: u8, layer: u8) -> Option<&LayerCell> {
        let place = match track {
            AUDIO_TRACK if layer == 0 => 0,
            VIDEO_TRACK if usize::from(layer) < LAYERS_MAX => 1 + usize::from(layer),
            _ => return None,
        };
        self.cells.get(origin as usize * CELLS_PER_PARTICIPANT + place)
    }
}

/// Whether a track that was muted and unmuted so often is muted.
const fn is_muted(mute_changes: u32) -> bool {
    mute_changes % 2 == 1
}
