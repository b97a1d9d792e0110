//! The engine: one worker thread per core drives its shard of participants with a 1 ms tick.
//!
//! A [`shard::Shard`] is sans-IO: time, datagrams and commands go in; datagrams, events and counts
//! come out. A [`worker`] owns the sockets and the clock around it.

mod attribution;
pub mod blame;
mod connection;
mod emodel;
mod feedback;
pub mod health;
mod ledger;
mod peer_key;
pub mod playout;
pub mod publisher;
mod sending;
pub mod shard;
pub mod subscriber;
mod timers;
mod uplink;
pub mod worker;

use crate::transport::rtp::Ssrc;
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::codec::PayloadTypes;
use crate::measure::Kind;
use crate::media::identity::{FrameIdentity, Origin};
use crate::path::{FarEnd, Path, Unsent, Via};
use crate::plan::{Member, Plan};
use crate::recording::Tap;
use crate::transport::data::DataRole;
use crate::transport::peer::{IceCredentials, Identity, NearEnd, PeerFailure, PeerParameters};
use crate::units::{Epoch, Time};
pub use peer_key::PeerKey;
use publisher::SendParameters;
use subscriber::StreamOutcome;
use uplink::{Asked, Lacking, Lacks};

/// Interval of the engine's beat.
pub const TICK: Duration = Duration::from_millis(1);

/// Destination of a shard's datagrams. The backend lends the buffer that a packet is written into,
/// so nothing is copied on the way to the kernel.
pub trait Io {
    /// Lends the buffer for the next datagrams: at least [`crate::net::SEND_BYTES_MAX`] bytes.
    fn lend(&mut self) -> &mut [u8];

    /// Sends the first `len` bytes of the lent buffer from peer `key`'s socket, as datagrams of
    /// `segment` bytes (the last may be shorter).
    fn send(&mut self, key: PeerKey, to: SocketAddr, len: usize, segment: usize);

    /// Sends the first `len` bytes of the lent buffer as one set-up datagram of peer `key`, for any
    /// of its candidate pairs.
    fn send_setup(&mut self, key: PeerKey, to: FarEnd, len: usize) {
        self.send(key, to.address, len, len);
    }

    /// Sends the datagrams of peer `key` to `to` from now on, because ICE has nominated it.
    fn nominate(&mut self, key: PeerKey, to: FarEnd);

    /// Notes that peer `key` is up and that its path has been the same for a while. The backend may
    /// restrict the peer to that path, and close what the path does not need. It comes again and
    /// again, as long as the peer is up.
    fn settle(&mut self, _key: PeerKey) {}

    /// Lets peer `key` hear from other addresses again. A backend whose [`Io::settle`] shuts
    /// nothing out has nothing to do.
    fn disconnect(&mut self, _key: PeerKey) {}
}

/// Commands of signalling to a shard. Peers are named by their keys.
pub enum ShardCommand {
    /// Adds a peer. It may have the key of a peer that was removed; the account of the removed peer
    /// is then closed.
    AddPeer {
        key: PeerKey,
        /// `None` in simulations, where the [`Io`] knows where the key's datagrams go.
        path: Option<Path>,
        peer: Box<NewPeer>,
        /// Receiver of this peer's events.
        events: tokio::sync::mpsc::UnboundedSender<ShardEvent>,
    },
    /// Adds another socket or connection, which candidates of the server need. It is kept until the
    /// peer is up. `end` is our end of it.
    AddPath {
        key: PeerKey,
        path: Path,
        end: NearEnd,
    },
    /// Binds a channel at the relay that gave us an address. The channel leads to a candidate of
    /// the server.
    BindChannel {
        key: PeerKey,
        relayed: SocketAddr,
        peer: SocketAddr,
        number: u16,
    },
    /// A message to that relay from the task that keeps the allocation there.
    TellRelay {
        key: PeerKey,
        relayed: SocketAddr,
        message: Vec<u8>,
    },
    AddRemoteCandidate {
        key: PeerKey,
        address: SocketAddr,
    },
    /// Sets new ICE credentials on both sides, and the server's new candidates. The DTLS session
    /// and all media stay.
    RestartIce {
        key: PeerKey,
        local: IceCredentials,
        remote: IceCredentials,
        remote_candidates: Vec<SocketAddr>,
        /// By nothing else from now on, of which there is one.
        by_relays: bool,
    },
    /// Adds tracks to send, after their description is agreed.
    Publish {
        key: PeerKey,
        tracks: Vec<SendParameters>,
    },
    /// Adds streams that the server announced for this peer.
    Subscribe {
        key: PeerKey,
        streams: Vec<StreamParameters>,
    },
    /// Removes streams that the server withdrew, by media SSRC. What their sources make from then
    /// on stays owed. For a participant that is meant to leave, see [`ShardCommand::Leave`].
    Unsubscribe {
        key: PeerKey,
        ssrcs: Vec<Ssrc>,
    },
    /// Stops one of our tracks that the server took out of the room. What the plan means it to send
    /// stays owed.
    LoseTrack {
        key: PeerKey,
        track: u8,
    },
    /// Sets the layers of a track that somebody watches, one bit each, the lowest layer first. The
    /// other layers pause, and start again with a key frame.
    SetLayers {
        key: PeerKey,
        track: u8,
        layers: u8,
    },
    /// Mutes or unmutes a track. A muted track sends nothing, whoever watches.
    SetMuted {
        key: PeerKey,
        track: u8,
        muted: bool,
    },
    /// Notes which layer the server was asked for at `at`, by media SSRC. `None` means no layer for
    /// now.
    Watch {
        key: PeerKey,
        ssrc: Ssrc,
        layer: Option<u8>,
        at: Time,
    },
    /// Notes that the server said at `at` that it pauses a stream for lack of bandwidth, or sends
    /// it again; by media SSRC.
    SetPaused {
        key: PeerKey,
        ssrc: Ssrc,
        paused: bool,
        at: Time,
    },
    /// Copies what this participant receives to the tap, from its first subscription on.
    Record {
        participant: u32,
        tap: Box<Tap>,
    },
    /// Notes that the plan has the participant leave. What is sent to this peer from now on is not
    /// expected, and what is under way may still arrive. What its tracks do not send from now on is
    /// owed to nobody. [`ShardCommand::RemovePeer`] follows if the peer is still there.
    Leave {
        key: PeerKey,
    },
    /// Stops every track of every peer at its next frame. Repair goes on.
    StopPublishing,
    /// Closes one peer for good. Without an earlier [`ShardCommand::Leave`] the peer is lost: what
    /// the plan means it to send and to receive stays owed.
    RemovePeer {
        key: PeerKey,
    },
    /// Asks for a [`worker::WorkerReport`] now.
    Report,
    /// Asks for the same report with the outcome of every peer so far. Then every stream is marked
    /// ([`subscriber::StreamOutcome::frames_overdue`]).
    Survey,
    /// Ends the worker.
    Stop,
}

/// A peer connection with everything that both descriptions say.
pub struct NewPeer {
    /// Index of the participant over the whole run (`participant`), and its room.
    pub participant: u32,
    pub room: u32,
    pub parameters: PeerParameters,
    /// Our SSRC in RTCP if the peer sends no media.
    pub rtcp_ssrc: Ssrc,
    pub cname: String,
    /// Whether it sends no more than its path carries, as measured by transport-wide feedback and
    /// REMB.
    pub obeys_bandwidth: bool,
    /// Whether it serves data channels, and who opens them. Messages on them are dropped.
    pub data: Option<DataRole>,
    /// Time at which this participant ought to have joined. Latencies of its subscriptions count
    /// from here.
    pub intended_at: Time,
}

/// One stream that the server will send.
#[derive(Clone, Debug)]
pub struct StreamParameters {
    pub payloads: PayloadTypes,
    pub ssrc: Ssrc,
    pub rtx_ssrc: Option<Ssrc>,
    /// Whether NACKs were agreed on.
    pub nack: bool,
    /// Extension id of the transport-wide sequence number, if feedback about it was agreed on.
    pub transport_cc_extension: Option<u8>,
    /// Extension id of abs-send-time, if REMB was agreed on.
    pub abs_send_time_extension: Option<u8>,
    /// Time at which the description that names it was applied.
    pub announced_at: Time,
}

/// Events of a shard for signalling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShardEvent {
    /// [`ShardCommand::RestartIce`] is done: from now on the other side's checks are understood.
    IceRestarted {
        key: PeerKey,
    },
    /// ICE has a path, and DTLS has not followed at once. If it never does, this is all that is
    /// known of the join.
    IceConnected {
        key: PeerKey,
        at: Time,
    },
    /// DTLS is done: media may flow.
    Connected {
        key: PeerKey,
        /// Time at which ICE had a path.
        ice_at: Option<Time>,
        at: Time,
        /// Which of our transports carries the connection.
        via: Via,
    },
    /// A connection that is up has another path, after a restart of ICE.
    Moved {
        key: PeerKey,
        /// By what of ours it goes.
        via: Via,
    },
    Failed {
        key: PeerKey,
        failure: PeerFailure,
    },
    /// The first media packet arrived.
    FirstMedia {
        key: PeerKey,
        at: Time,
    },
}

/// Configuration that all shards of a run share.
#[derive(Clone)]
pub struct ShardConfig {
    pub identity: Identity,
    pub roster: Arc<Roster>,
    pub epoch: Epoch,
}

/// Outcome of one peer connection, for the report's lines per participant.
#[derive(Clone, Debug, Default)]
pub struct PeerOutcome {
    pub participant: u32,
    /// Time at which the participant ought to have joined, or was lost. It is later than everything
    /// that an earlier visit of this participant has left behind.
    pub intended_at: Time,
    /// The last round-trip time measured by RTCP.
    pub rtt_rtcp: Option<Duration>,
    pub streams: Vec<StreamOutcome>,
}

impl PeerOutcome {
    /// Merges the outcomes of both connections of one participant. Streams of the same track are
    /// added together.
    pub fn plus(mut self, later: PeerOutcome) -> PeerOutcome {
        self.participant = later.participant;
        self.intended_at = self.intended_at.max(later.intended_at);
        self.rtt_rtcp = later.rtt_rtcp.or(self.rtt_rtcp);
        for stream in later.streams {
            let same = |known: &&mut StreamOutcome| {
                (known.kind, known.origin) == (stream.kind, stream.origin)
            };
            match self.streams.iter_mut().find(same) {
                Some(known) => known.add(&stream),
                None => self.streams.push(stream),
            }
        }
        self
    }
}

/// Counts of the sockets since the shard last took them.
#[derive(Default)]
pub struct IoCounts {
    pub socket_drops: u64,
    pub unsent: Unsent,
    pub receive_errors: u64,
    pub setup_dropped: u64,
}

/// Knowledge that all participants of a run share about one another: who publishes what, since
/// when, and how many frames each has made.
///
/// Written by the publisher's shard and read by subscribers' shards: plain relaxed atomics, one
/// cell for each layer of each track.
///
/// If another host plays the publisher, nobody here writes its cells. Its frame counts then come
/// from that host now and then ([`Roster::set_frames_elsewhere`]), and are never less than what was
/// received here. What no host reports (when it began, whether it is muted, what the server lacks
/// of it) is unknown. Its frames carry the other host's time, which can be converted to ours only
/// as far as that clock is known ([`Roster::set_clock`]).
pub struct Roster {
    cells: Vec<LayerCell>,
    /// Offset to add to each host's time to get ours, in microseconds; or [`CLOCK_UNKNOWN`].
    clocks: Vec<AtomicI64>,
    pub run: u32,
}

#[derive(Default)]
struct LayerCell {
    room: u32,
    /// Number of the host that plays the publisher, from 1 on; 0 if it is this host.
    elsewhere: u32,
    frames: AtomicU32,
    /// Time from one frame to the next.
    interval_us: AtomicU32,
    /// Number of times the track was muted or unmuted: odd while it is muted. Kept for the lowest
    /// layer.
    mute_changes: AtomicU32,
    /// For a publisher on another host: how many more frames it may have made than we know of.
    frames_unheard_max: u32,
    /// Nanoseconds on the run's clock; 0 while it is not published. Kept for the lowest layer.
    published_at: AtomicU64,
    /// Allocated when the layer is first published, because most participants publish nothing.
    lacking: OnceLock<Box<Lacking>>,
    /// Number of frames that the plan meant the layer to send while its source was gone. They were
    /// never made.
    unsent: AtomicU32,
    /// Number of packets that the server has named in NACKs, each counted once.
    asked: AtomicU32,
    /// Number of times the layer began: once, and once more each time its source came back.
    publications: AtomicU32,
    /// Frames made, and frames left unsent, when it last began.
    began_with: [AtomicU32; 2],
}

/// State of a layer, now or at an earlier time: the frames that it has sent, and those that it owes
/// and never sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Owed {
    frames: u32,
    unsent: u32,
    /// Number of packets that the server has named in NACKs, each counted once.
    asked: u32,
}

/// Number of frames that one layer of one track has sent since it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameCount {
    pub origin: Origin,
    pub layer: u8,
    pub frames: u32,
    /// Number of frames that it owes and never sent, because its source is gone.
    pub unsent: u32,
}

const CLOCK_UNKNOWN: i64 = i64::MIN;

/// Maximum time without any news of, or frames from, a publisher on another host. It is longer than
/// any outage after which the run goes on. The publisher cannot have made a frame with a higher
/// number than this time allows.
const UNHEARD_MAX: Duration = Duration::from_secs(120);

/// Number of a participant's audio track in frame identities. Its video track has the next number.
pub const AUDIO_TRACK: u8 = 0;
pub const VIDEO_TRACK: u8 = 1;
/// Maximum number of simulcast layers of a video track.
pub const LAYERS_MAX: usize = 3;
pub const CELLS_PER_PARTICIPANT: usize = 1 + LAYERS_MAX;

/// Returns the number of a participant's track of one kind.
pub const fn track_number(kind: Kind) -> u8 {
    match kind {
        Kind::Audio => AUDIO_TRACK,
        Kind::Video => VIDEO_TRACK,
    }
}

impl Roster {
    /// Makes a roster with all publishers on this host. `rooms` gives each participant's room.
    pub fn new(run: u32, rooms: impl Iterator<Item = u32>) -> Roster {
        let here = rooms.map(|room| Member {
            room,
            group: 0,
            publishes_audio: true,
            publishes_video: true,
            elsewhere: None,
        });
        Roster::of_hosts(run, here, &[[Duration::ZERO; CELLS_PER_PARTICIPANT]])
    }

    /// Makes the roster of a plan, with publishers on this host and on others.
    pub fn of(plan: &Plan) -> Roster {
        let groups = plan.scenario.groups.iter();
        let intervals: Vec<_> = groups
            .map(|group| {
                let media = plan.scenario.media_of(group);
                let mut intervals = [Duration::ZERO; CELLS_PER_PARTICIPANT];
                intervals[0] = media.audio.frame;
                for (interval, layer) in intervals[1..].iter_mut().zip(media.video_layers()) {
                    *interval = Duration::from_secs(1) / layer.frames_per_second;
                }
                intervals
            })
            .collect();
        Roster::of_hosts(plan.run_tag, plan.everybody(), &intervals)
    }

    /// Makes a roster of `members`. For each group, `intervals` has the time from one frame to the
    /// next: of audio, then of each layer of video, the lowest first; zero for a layer that is not
    /// there. They are used for publishers on other hosts. Publishers on this host set their own
    /// ([`Roster::set_published`]).
    pub fn of_hosts(
        run: u32,
        members: impl Iterator<Item = Member>,
        intervals: &[[Duration; CELLS_PER_PARTICIPANT]],
    ) -> Roster {
        const NONE: [Duration; CELLS_PER_PARTICIPANT] = [Duration::ZERO; CELLS_PER_PARTICIPANT];
        let mut hosts = 0;
        let mut cells = Vec::new();
        for member in members {
            let elsewhere = member.elsewhere.map_or(0, |host| host as u32 + 1);
            hosts = hosts.max(elsewhere);
            let intervals = intervals.get(member.group).unwrap_or(&NONE);
            for (place, interval) in intervals.iter().enumerate() {
                let publishes = if place == 0 {
                    member.publishes_audio
                } else {
                    member.publishes_video
                };
                let interval = if elsewhere > 0 && publishes {
                    *interval
                } else {
                    Duration::ZERO
                };
                cells.push(LayerCell {
                    room: member.room,
                    elsewhere,
                    interval_us: AtomicU32::new(micros(interval)),
                    frames_unheard_max: frames_in(UNHEARD_MAX, interval),
                    ..LayerCell::default()
                });
            }
        }
        Roster {
            cells,
            clocks: (0..hosts).map(|_| AtomicI64::new(CLOCK_UNKNOWN)).collect(),
            run,
        }
    }

    /// Returns the frame counts of this host's publishers, for every layer that has sent anything.
    pub fn frame_counts(&self) -> impl Iterator<Item = FrameCount> + '_ {
        let counts = self
            .cells
            .iter()
            .enumerate()
            .filter(|(_, cell)| cell.elsewhere == 0);
        let counts = counts.map(|(at, cell)| {
            let (publisher, place) = (at / CELLS_PER_PARTICIPANT, at % CELLS_PER_PARTICIPANT);
            FrameCount {
                origin: Origin {
                    publisher: publisher as u32,
                    track: if place == 0 { AUDIO_TRACK } else { VIDEO_TRACK },
                },
                layer: place.saturating_sub(1) as u8,
                frames: cell.frames.load(Relaxed),
                unsent: cell.unsent.load(Relaxed),
            }
        });
        counts.filter(|count| count.frames > 0)
    }

    /// Takes the frame count that another host reports for one of its publishers. A count for a
    /// publisher on this host is ignored, and a count never goes down.
    pub fn set_frames_elsewhere(&self, count: FrameCount) {
        let cell = self
            .cell(count.origin, count.layer)
            .filter(|cell| cell.elsewhere > 0);
        if let Some(cell) = cell {
            cell.frames.fetch_max(count.frames, Relaxed);
            cell.unsent.fetch_max(count.unsent, Relaxed);
        }
    }

    /// Sets the offset to add to another host's time to get ours, in microseconds. `None` means
    /// that it is not known, or not known any more.
    pub fn set_clock(&self, host: usize, offset_us: Option<i64>) {
        if let Some(clock) = self.clocks.get(host) {
            clock.store(offset_us.unwrap_or(CLOCK_UNKNOWN), Relaxed);
        }
    }

    /// Converts a time that a publisher's host wrote into a frame (microseconds since 1970) to our
    /// clock. Returns `None` if that host's clock is not known.
    fn unix_us_here(&self, origin: Origin, unix_us: u64) -> Option<u64> {
        let Some(host) = self.cell(origin, 0)?.elsewhere.checked_sub(1) else {
            return Some(unix_us);
        };
        let offset_us = self.clocks.get(host as usize)?.load(Relaxed);
        Some(offset_us)
            .filter(|offset_us| *offset_us != CLOCK_UNKNOWN)
            .and_then(|offset_us| unix_us.checked_add_signed(offset_us))
    }

    /// Whether the publisher has made this frame. For a publisher on another host: whether it can
    /// have made it.
    fn is_made(&self, identity: &FrameIdentity) -> bool {
        let Some(cell) = self.cell(identity.origin, identity.layer) else {
            return false;
        };
        identity.frame
            < cell
                .frames
                .load(Relaxed)
                .saturating_add(cell.frames_unheard_max)
    }

    /// Notes that a layer begins at `at`, with a frame every `interval`.
    pub fn set_published(&self, identity: &FrameIdentity, at: Time, interval: Duration) {
        if let Some(cell) = self.cell(identity.origin, identity.layer) {
            cell.published_at.store(at.as_nanos().max(1), Relaxed);
            cell.interval_us.store(micros(interval), Relaxed);
            cell.lacking.get_or_init(Box::default);
            let now = cell.owed();
            cell.began_with[0].store(now.frames, Relaxed);
            cell.began_with[1].store(now.unsent, Relaxed);
            cell.publications.fetch_add(1, Relaxed);
        }
    }

    /// Adds frames that the plan meant a layer to send while its source was gone.
    fn add_unsent(&self, identity: &FrameIdentity, frames: u32) {
        if let Some(cell) = self.cell(identity.origin, identity.layer) {
            cell.unsent.fetch_add(frames, Relaxed);
        }
    }

    /// Returns how often the source of a layer has begun to send it.
    fn publications(&self, origin: Origin, layer: u8) -> u32 {
        self.cell(origin, layer)
            .map_or(0, |cell| cell.publications.load(Relaxed))
    }

    /// Returns what a layer has sent and owes.
    fn owed(&self, origin: Origin, layer: u8) -> Owed {
        self.cell(origin, layer)
            .map_or(Owed::default(), LayerCell::owed)
    }

    /// Returns what a layer had sent and owed before its source last began again: what the source
    /// sends since then is for another subscription. Returns `None` if it has not begun again.
    fn owed_before_return(&self, origin: Origin, layer: u8, publications: u32) -> Option<Owed> {
        let cell = self.cell(origin, layer)?;
        (cell.publications.load(Relaxed) > publications).then(|| Owed {
            frames: cell.began_with[0].load(Relaxed),
            unsent: cell.began_with[1].load(Relaxed),
            asked: cell.asked.load(Relaxed),
        })
    }

    fn set_frames(&self, identity: &FrameIdentity, frames: u32) {
        if let Some(cell) = self.cell(identity.origin, identity.layer) {
            if let (Some(lacking), Some(newest)) = (cell.lacking.get(), frames.checked_sub(1)) {
                lacking.begin(newest);
            }
            cell.frames.store(frames, Relaxed);
        }
    }

    /// Notes that the server has requested a packet of this frame in a NACK.
    fn set_asked(&self, identity: &FrameIdentity, frame: u32, asked: Asked) {
        let cell = self.cell(identity.origin, identity.layer);
        if let Some((cell, lacking)) = cell.and_then(|cell| Some((cell, cell.lacking.get()?))) {
            lacking.set_asked(frame, asked, cell.frames.load(Relaxed));
        }
    }

    /// Counts a packet that the server has requested in a NACK for the first time.
    fn add_asked_packet(&self, identity: &FrameIdentity) {
        if let Some(cell) = self.cell(identity.origin, identity.layer) {
            cell.asked.fetch_add(1, Relaxed);
        }
    }

    /// Counts one more stream on which the layer of this frame arrives.
    fn add_listener(&self, identity: &FrameIdentity) {
        let cell = self.cell(identity.origin, identity.layer);
        if let Some(lacking) = cell.and_then(|cell| cell.lacking.get()) {
            lacking.add_listener();
        }
    }

    /// Notes that somebody has received this frame, so the server had it.
    fn set_received(&self, identity: &FrameIdentity) {
        let Some(cell) = self.cell(identity.origin, identity.layer) else {
            return;
        };
        if let Some(lacking) = cell.lacking.get() {
            lacking.set_received(identity.frame);
        } else if cell.elsewhere > 0 && cell.frames.load(Relaxed) <= identity.frame {
            // The first subscriber on this host to receive it. The frame was made, whatever we have
            // been told so far.
            cell.frames.fetch_max(identity.frame + 1, Relaxed);
        }
    }

    /// Returns whether the server never had a frame, judged by its NACKs; `None` if that is not
    /// known any more.
    fn lacks(&self, origin: Origin, layer: u8, frame: u32) -> Option<Lacks> {
        let cell = self.cell(origin, layer)?;
        cell.lacking.get()?.lacks(frame, cell.frames.load(Relaxed))
    }

    fn set_muted(&self, origin: Origin, muted: bool) {
        if let Some(cell) = self
            .cell(origin, 0)
            .filter(|cell| is_muted(cell.mute_changes.load(Relaxed)) != muted)
        {
            cell.mute_changes.fetch_add(1, Relaxed);
        }
    }

    /// Returns how many frames a layer has sent so far; for a publisher on another host, as far as
    /// that is known here.
    pub fn frames(&self, origin: Origin, layer: u8) -> u32 {
        self.cell(origin, layer)
            .map_or(0, |cell| cell.frames.load(Relaxed))
    }

    /// Returns the time from one frame of a layer to the next; zero while it is not published.
    pub fn frame_interval(&self, origin: Origin, layer: u8) -> Duration {
        let micros = self
            .cell(origin, layer)
            .map_or(0, |cell| cell.interval_us.load(Relaxed));
        Duration::from_micros(micros.into())
    }

    pub fn published_at(&self, origin: Origin) -> Option<Time> {
        let at = self.cell(origin, 0)?.published_at.load(Relaxed);
        (at > 0).then(|| Time::from_nanos(at))
    }

    /// Returns a count that grows by one whenever the track is muted or unmuted; see [`is_muted`].
    fn mute_changes(&self, origin: Origin) -> u32 {
        self.cell(origin, 0)
            .map_or(0, |cell| cell.mute_changes.load(Relaxed))
    }

    /// Returns the room that a track belongs to, or `None` if the identity names no participant of
    /// this run.
    pub fn room(&self, origin: Origin) -> Option<u32> {
        self.cell(origin, 0).map(|cell| cell.room)
    }

    fn cell(&self, origin: Origin, layer: u8) -> Option<&LayerCell> {
        let place = match origin.track {
            AUDIO_TRACK if layer == 0 => 0,
            VIDEO_TRACK if usize::from(layer) < LAYERS_MAX => 1 + usize::from(layer),
            _ => return None,
        };
        self.cells
            .get(origin.publisher as usize * CELLS_PER_PARTICIPANT + place)
    }
}

impl LayerCell {
    fn owed(&self) -> Owed {
        Owed {
            frames: self.frames.load(Relaxed),
            unsent: self.unsent.load(Relaxed),
            asked: self.asked.load(Relaxed),
        }
    }
}

fn micros(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}

/// Returns the number of frames in `time`; zero for a layer that does not exist.
fn frames_in(time: Duration, interval: Duration) -> u32 {
    time.as_micros()
        .checked_div(interval.as_micros())
        .map_or(0, |frames| u32::try_from(frames).unwrap_or(u32::MAX))
}

/// Whether a track is muted after this many changes.
const fn is_muted(mute_changes: u32) -> bool {
    mute_changes % 2 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    const AUDIO_EVERY: Duration = Duration::from_millis(20);
    const INTERVALS: [Duration; CELLS_PER_PARTICIPANT] = [
        AUDIO_EVERY,
        Duration::from_millis(50),
        Duration::ZERO,
        Duration::ZERO,
    ];

    /// Participant 0 is on this host, 1 and 2 are on host 4; 2 publishes nothing.
    fn roster() -> Roster {
        let members =
            [(None, true), (Some(4), true), (Some(4), false)].map(|(elsewhere, publishes)| {
                Member {
                    room: 3,
                    group: 0,
                    publishes_audio: publishes,
                    publishes_video: publishes,
                    elsewhere,
                }
            });
        Roster::of_hosts(7, members.into_iter(), &[INTERVALS])
    }

    const fn of(publisher: u32, track: u8) -> Origin {
        Origin { publisher, track }
    }

    const fn audio(publisher: u32) -> Origin {
        of(publisher, AUDIO_TRACK)
    }

    fn frame(origin: Origin, frame: u32) -> FrameIdentity {
        FrameIdentity {
            run: 7,
            origin,
            frame,
            ..FrameIdentity::default()
        }
    }

    fn count(publisher: u32, frames: u32) -> FrameCount {
        FrameCount {
            origin: audio(publisher),
            layer: 0,
            frames,
            unsent: 0,
        }
    }

    #[test]
    fn a_publisher_elsewhere_is_as_far_as_was_told_or_as_what_came_and_never_back() {
        let roster = roster();
        let known = |frames: u32| assert_eq!(roster.frames(audio(1), 0), frames);
        assert!(
            roster.is_made(&frame(audio(1), 0)),
            "nothing has been told yet"
        );
        roster.set_received(&frame(audio(1), 9));
        known(10);
        for (told, then) in [(8, 10), (50, 50), (20, 50), (50, 50)] {
            roster.set_frames_elsewhere(count(1, told));
            known(then);
        }
        roster.set_received(&frame(audio(1), 30));
        known(50);
        assert_eq!(roster.published_at(audio(1)), None);
        assert_eq!(roster.lacks(audio(1), 0, 3), None);
        assert_eq!(roster.frame_interval(audio(1), 0), AUDIO_EVERY);
    }

    #[test]
    fn frames_that_nobody_can_have_made_are_none() {
        let roster = roster();
        let ahead = (UNHEARD_MAX.as_millis() / AUDIO_EVERY.as_millis()) as u32;
        for (known, number, made) in [
            (0, ahead - 1, true),
            (0, ahead, false),
            (100, 100 + ahead - 1, true),
            (100, 100 + ahead, false),
            (100, u32::MAX, false),
        ] {
            roster.set_frames_elsewhere(count(1, known));
            assert_eq!(
                roster.is_made(&frame(audio(1), number)),
                made,
                "{number} after {known}"
            );
        }
        assert!(
            !roster.is_made(&frame(audio(2), 0)),
            "who publishes nothing"
        );
        let layer_that_is_not = FrameIdentity {
            layer: 2,
            ..frame(of(1, VIDEO_TRACK), 0)
        };
        assert!(!roster.is_made(&layer_that_is_not));
        assert!(
            !roster.is_made(&frame(audio(0), 0)),
            "whose log is here is not told of"
        );
    }

    #[test]
    fn a_host_speaks_for_its_own_publishers_only() {
        let roster = roster();
        let own = frame(audio(0), 0);
        roster.set_published(&own, Time::from_millis(1), AUDIO_EVERY);
        roster.set_frames(&own, 5);
        roster.set_received(&frame(audio(0), 4));
        roster.set_frames_elsewhere(count(0, 1_000));
        roster.set_frames_elsewhere(count(99, 1_000));
        roster.set_frames_elsewhere(count(1, 70));
        assert_eq!(roster.frames(audio(0), 0), 5);
        assert!(
            roster.frame_counts().eq([count(0, 5)]),
            "what others told is not passed on"
        );
    }

    #[test]
    fn moments_of_another_host_are_ours_as_far_as_its_clock_is_known() {
        let roster = roster();
        let here = |publisher| roster.unix_us_here(audio(publisher), 1_000);
        assert_eq!((here(0), here(1), here(99)), (Some(1_000), None, None));
        roster.set_clock(4, Some(-300));
        assert_eq!((here(0), here(1)), (Some(1_000), Some(700)));
        roster.set_clock(4, Some(-1_001));
        assert_eq!(here(1), None, "before 1970");
        roster.set_clock(4, None);
        roster.set_clock(5, Some(1));
        assert_eq!(here(1), None);
    }
}
