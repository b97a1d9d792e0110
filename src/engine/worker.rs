//! A worker thread: sockets, the clock and the tick around one shard.
//!
//! Each millisecond it drains the sockets, sends what is due, and then spends a bounded part of the
//! tick on connection set-up, so that a storm of joins never delays the media of participants that
//! have joined. The thread sleeps until the next tick only, because waking on readiness costs twice
//! the CPU time per packet.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

use super::peer_key::PeerSlots;
use super::shard::Shard;
use super::{Io, IoCounts, PeerKey, PeerOutcome, ShardCommand, ShardConfig, ShardEvent, TICK};
use crate::measure::Record;
use crate::measure::presence::Marks;
use crate::measure::stalls::{STALL_MIN, StillSpan};
use crate::net;
use crate::path::{FarEnd, Lane, Path, Unsent};
use crate::transport::peer::NearEnd;
use crate::transport::rtp::{Datagram, classify};
use crate::units::{Epoch, Time, arrival};

/// Part of a tick that set-up work (STUN, DTLS, signalling's commands) may take after media is
/// served.
const SETUP_SHARE: Duration = Duration::from_micros(500);
/// Maximum number of set-up datagrams that wait: at 2 KiB each, 4 MiB per worker. Both protocols
/// repeat what is lost.
const SETUP_QUEUE_MAX: usize = 2_048;
/// Maximum number of datagrams taken from one socket before the next one's turn. The rest waits for
/// the next tick.
const SOCKET_DATAGRAMS_MAX: usize = 256;
/// Maximum number of datagrams in one tick, some 5 ms of work. A key frame for thousands of
/// subscribers arrives at once and must not delay what is to be sent.
const TICK_DATAGRAMS_MAX: usize = 4_096;
/// Maximum number of sockets reported by one poll of the kernel.
const POLLED_MAX: usize = 4_096;

/// Report that a worker hands out once a second, and once more when it ends.
pub struct WorkerReport {
    pub worker: usize,
    pub occasion: Occasion,
    /// Counts since the previous report.
    pub record: Box<Record>,
    pub cpu: Duration,
    pub activity: WorkerActivity,
    /// Outcomes of connections whose participants have returned on other connections. Each is
    /// reported once.
    pub former: Vec<PeerOutcome>,
    /// Outcomes of each participant's streams. Set in the last report, and if a survey was
    /// requested.
    pub outcomes: Option<Vec<PeerOutcome>>,
}

/// When a worker's sockets and its thread were active, since the previous report. It shows who
/// stood still.
#[derive(Default)]
pub struct WorkerActivity {
    /// Arrivals of datagrams of any kind, by the kernel's stamps, as [`Marks::take`] returns them.
    pub arrivals: Vec<(u64, u64)>,
    /// Times at which media was sent.
    pub sends: Vec<(u64, u64)>,
    /// Beats that were late by [`STALL_MIN`] or more, and times in which arrived datagrams waited
    /// that long: at most 50 a second.
    pub gaps: Vec<StillSpan>,
}

/// Reason for a worker's report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occasion {
    /// A whole second of the run's clock has passed, so that the figures of a second belong to that
    /// second.
    Second,
    /// [`ShardCommand::Report`] or [`ShardCommand::Survey`].
    Asked,
    Last,
}

pub struct ShardWorkerConfig {
    pub index: usize,
    pub cpu: Option<usize>,
    pub capacity: usize,
    pub shard: ShardConfig,
    pub commands: Receiver<ShardCommand>,
    pub reports: tokio::sync::mpsc::UnboundedSender<WorkerReport>,
    /// Emptied records that are returned for reuse.
    pub spare_records: Receiver<Box<Record>>,
}

/// Runs until [`ShardCommand::Stop`], or until all command senders are gone.
pub fn run(config: ShardWorkerConfig) -> io::Result<()> {
    if let Some(cpu) = config.cpu {
        // Without permission to pin, the thread still works. Its lateness is measured either way.
        let _ = net::pin_to(cpu);
    }
    let mut worker = ShardWorker::new(config)?;
    let mut beat = TickGrid::start(worker.epoch);
    loop {
        // A tick costs as much as a dozen packets. If no media is due at the next tick and nobody
        // is joining, arrivals can wait for the tick after it, because the kernel stamps them.
        let ticks = if worker.shard.is_waited_for_by(beat.planned + TICK) {
            1
        } else {
            2
        };
        let (now, late, missed) = beat.wait(ticks);
        worker.shard.record_tick(late, missed);
        worker.note_gap(now - late, now);
        if !worker.turn(now)? {
            worker.report_last();
            return Ok(());
        }
    }
}

/// The ticks, aligned with the whole milliseconds of the run's clock, where send slots lie too.
/// Times are absolute, so one late tick does not shift the following ones.
pub struct TickGrid {
    epoch: Epoch,
    /// Nanoseconds by which the kernel's monotonic clock is ahead of the run's.
    ahead: u64,
    planned: Time,
}

/// Delay of the beat behind the whole millisecond, so that the slots of that millisecond are
/// certainly due.
const BEAT_OFFSET: Duration = Duration::from_micros(20);

impl TickGrid {
    pub fn start(epoch: Epoch) -> TickGrid {
        // Without permission for it, beats come up to 50 us late, and that is measured.
        let _ = net::wake_precisely();
        let now = epoch.now();
        TickGrid {
            epoch,
            ahead: net::monotonic_nanos() - now.as_nanos(),
            planned: now.next_whole(TICK) + BEAT_OFFSET,
        }
    }

    /// Sleeps for `ticks` beats, or until the next one if those have passed. Returns the time then,
    /// how late it is, and how many beats were missed.
    pub fn wait(&mut self, ticks: u32) -> (Time, Duration, u64) {
        self.planned += TICK * ticks;
        net::sleep_until(self.planned.as_nanos() + self.ahead);
        let now = self.epoch.now();
        let late = now.since(self.planned);
        let missed = (late.as_nanos() / TICK.as_nanos()) as u32;
        self.planned += TICK * missed;
        (now, late, missed.into())
    }
}

struct ShardWorker {
    index: usize,
    epoch: Epoch,
    shard: Shard,
    io: ShardSocketIo,
    poll: Poll,
    mio_events: Events,
    ready: VecDeque<PeerKey>,
    setup: VecDeque<SetupDatagram>,
    setup_spare: Vec<Vec<u8>>,
    subscribers: PeerSlots<tokio::sync::mpsc::UnboundedSender<ShardEvent>>,
    commands: Receiver<ShardCommand>,
    reports: tokio::sync::mpsc::UnboundedSender<WorkerReport>,
    spare_records: Receiver<Box<Record>>,
    next_report_at: Time,
    batch: net::ReceiveBatch,
    arrivals: Marks,
    sends: Marks,
    gaps: Vec<StillSpan>,
    /// Arrival time of the datagram of this tick that has waited longest.
    oldest: Time,
}

struct SetupDatagram {
    key: PeerKey,
    from: FarEnd,
    arrival: Time,
    bytes: Vec<u8>,
}

impl ShardWorker {
    fn new(config: ShardWorkerConfig) -> io::Result<ShardWorker> {
        let epoch = config.shard.epoch;
        let now = epoch.now();
        Ok(ShardWorker {
            index: config.index,
            epoch,
            shard: Shard::new(config.shard, config.capacity, now),
            io: ShardSocketIo::new(config.capacity),
            poll: Poll::new()?,
            mio_events: Events::with_capacity(POLLED_MAX),
            ready: VecDeque::with_capacity(config.capacity),
            setup: VecDeque::new(),
            setup_spare: Vec::new(),
            subscribers: PeerSlots::new(config.capacity),
            commands: config.commands,
            reports: config.reports,
            spare_records: config.spare_records,
            next_report_at: now.next_second(),
            batch: net::ReceiveBatch::default(),
            arrivals: Marks::default(),
            sends: Marks::default(),
            gaps: Vec::new(),
            oldest: now,
        })
    }

    /// Runs one tick. Returns false when the worker is told to stop.
    fn turn(&mut self, now: Time) -> io::Result<bool> {
        self.drain(now)?;
        let media_turn = self.epoch.now();
        self.io.has_sent = false;
        self.shard.handle_media_timers(media_turn, &mut self.io);
        if self.io.has_sent {
            self.sends.mark(media_turn);
        }
        // Control packets carry their own time stamps: they get the time at which they are written.
        self.shard
            .handle_control_timers(self.epoch.now(), &mut self.io);
        let alive = self.spend_setup_share()?;
        self.forward_events();
        self.shard.take_io_counts(&mut self.io.counts);
        if now >= self.next_report_at {
            self.next_report_at = now.next_second();
            self.report(Occasion::Second, None);
        }
        Ok(alive)
    }

    /// Takes what has arrived, up to a limit. The rest waits for the next tick, behind the media
    /// that is due.
    fn drain(&mut self, now: Time) -> io::Result<()> {
        // Kernel stamps are on the wall clock. It is read once a tick; the difference places the
        // stamps on the run's clock.
        let unix_now = net::unix_nanos();
        self.poll.poll(&mut self.mio_events, Some(Duration::ZERO))?;
        for event in &self.mio_events {
            let key = PeerKey(event.token().0);
            if let Some(slot) = self.io.slots[key].as_mut().filter(|slot| !slot.ready) {
                slot.ready = true;
                self.ready.push_back(key);
            }
        }
        self.oldest = now;
        let mut left = TICK_DATAGRAMS_MAX;
        for _ in 0..self.ready.len() {
            if left == 0 {
                break;
            }
            let Some(key) = self.ready.pop_front() else {
                break;
            };
            // The participants that come next are not in the cache. If they are prefetched now,
            // they are there when this one's datagrams are done.
            self.ready
                .get(2)
                .iter()
                .for_each(|next| self.shard.prefetch(**next));
            self.ready
                .get(1)
                .iter()
                .for_each(|next| self.shard.prefetch_streams(**next));
            self.ready
                .front()
                .iter()
                .for_each(|next| self.shard.prefetch_next(**next));
            let taken = self.drain_socket(key, now, unix_now);
            left = left.saturating_sub(taken);
            if self.io.slots[key].as_ref().is_some_and(|slot| slot.ready) {
                self.ready.push_back(key);
            }
        }
        // Datagrams that waited this long were not served, however punctual the tick was.
        self.note_gap(self.oldest, now);
        Ok(())
    }

    /// Takes what a socket holds, up to a limit. Returns the number of datagrams. The slot stays
    /// ready if there may be more.
    fn drain_socket(&mut self, key: PeerKey, now: Time, unix_now: u64) -> usize {
        let taken = self.drain_lane(key, Lane::Main, now, unix_now);
        let Some(slot) = &self.io.slots[key] else {
            return taken;
        };
        match slot.path.spare_count() {
            0 => taken,
            spare => taken + self.drain_spare(key, spare, now, unix_now),
        }
    }

    /// Drains the spare lanes while the path is not settled. Only set-up arrives here. It begins
    /// with the last lane, because a lane that has ended is removed from the list.
    fn drain_spare(&mut self, key: PeerKey, spare: usize, now: Time, unix_now: u64) -> usize {
        let mut taken = 0;
        for index in (0..spare).rev() {
            let is_ready = self.io.slots[key].as_ref().is_some_and(|slot| slot.ready);
            taken += self.drain_lane(key, Lane::Spare(index), now, unix_now);
            if let Some(slot) = &mut self.io.slots[key] {
                slot.ready |= is_ready;
            }
        }
        taken
    }

    fn drain_lane(&mut self, key: PeerKey, lane: Lane, now: Time, unix_now: u64) -> usize {
        let mut taken = 0;
        while taken < SOCKET_DATAGRAMS_MAX {
            let Some(slot) = self.io.slots[key].as_mut() else {
                break;
            };
            slot.ready = false;
            let received = slot.path.receive(lane, &mut self.batch);
            self.io.counts.receive_errors += self.batch.take_errors();
            self.io.counts.unsent.refused += self.batch.take_refused();
            let count = match received {
                Ok(count) => count,
                Err(error) => {
                    // A socket that keeps failing is read again in the next tick.
                    slot.ready = error.kind() != io::ErrorKind::WouldBlock;
                    if slot.ready {
                        self.end_lane(key, lane, &error, now);
                    }
                    break;
                }
            };
            slot.ready = !self.batch.is_drained();
            if slot.path.wants_sources() {
                note_source(&mut slot.path, lane, &mut self.batch, count);
            }
            for index in 0..count {
                self.take(key, lane, index, now, unix_now);
            }
            // A relay's own messages come in place of datagrams, and count here too.
            taken += count.max(1);
            if self.batch.is_drained() {
                break;
            }
        }
        taken
    }

    /// Tells the peer if a connection has ended, and not only run out of data.
    #[cold]
    fn end_lane(&mut self, key: PeerKey, lane: Lane, error: &io::Error, now: Time) {
        let Some(slot) = self.io.slots[key].as_mut() else {
            return;
        };
        let Some(via) = slot.path.remove_ended(lane) else {
            return;
        };
        let is_last = slot.path.is_closed();
        slot.ready &= !is_last;
        if error.kind() == io::ErrorKind::InvalidData {
            self.shard.reject();
        }
        self.shard
            .handle_path_end(key, via, is_last, now, &mut self.io);
    }

    /// Notes a time in which this thread ought to have worked and did not. Overlapping times are
    /// merged.
    fn note_gap(&mut self, from: Time, to: Time) {
        if to.since(from) < STALL_MIN {
            return;
        }
        match self.gaps.last_mut() {
            Some(last) if from <= last.to => {
                *last = StillSpan {
                    from: from.min(last.from),
                    to,
                }
            }
            _ => self.gaps.push(StillSpan { from, to }),
        }
    }

    fn take(&mut self, key: PeerKey, lane: Lane, index: usize, now: Time, unix_now: u64) {
        let Some((datagram, received)) = self.batch.datagram(index) else {
            return self.shard.reject();
        };
        if let (Some(drops), Some(slot)) = (received.drops, self.io.slots[key].as_mut()) {
            self.io.counts.socket_drops += slot.path.dropped_datagrams(lane, drops, received.burst);
        }
        let arrival = arrival(now, unix_now, received.stamp_unix_nanos);
        self.arrivals.mark(arrival);
        self.oldest = self.oldest.min(arrival);
        match classify(datagram) {
            Datagram::Rtp => self.shard.handle_rtp(key, datagram, arrival),
            Datagram::Rtcp => self
                .shard
                .handle_rtcp(key, datagram, arrival, now, &mut self.io),
            Datagram::Stun | Datagram::Dtls => {
                if self.setup.len() == SETUP_QUEUE_MAX {
                    self.io.counts.setup_dropped += 1;
                    return;
                }
                let Some(slot) = self.io.slots[key].as_ref() else {
                    return;
                };
                let from = FarEnd {
                    via: slot.path.via(lane),
                    address: received.from,
                };
                let mut bytes = self.setup_spare.pop().unwrap_or_default();
                bytes.clear();
                bytes.extend_from_slice(datagram);
                self.setup.push_back(SetupDatagram {
                    key,
                    from,
                    arrival,
                    bytes,
                });
            }
            Datagram::Unknown => self.shard.reject(),
        }
    }

    /// Takes datagrams and commands in turn, so that a flood of one kind does not delay the other.
    fn spend_setup_share(&mut self) -> io::Result<bool> {
        let mut now = self.epoch.now();
        let end = now + SETUP_SHARE;
        loop {
            let datagram = self.setup.pop_front();
            let idle = datagram.is_none();
            if let Some(SetupDatagram {
                key,
                from,
                arrival,
                bytes,
            }) = datagram
            {
                self.shard
                    .handle_setup_datagram(key, &bytes, from, arrival, now, &mut self.io);
                self.setup_spare.push(bytes);
            }
            match self.commands.try_recv() {
                Ok(ShardCommand::Stop) | Err(TryRecvError::Disconnected) => return Ok(false),
                Ok(command) => self.handle_command(command, now)?,
                Err(TryRecvError::Empty) if idle => return Ok(true),
                Err(TryRecvError::Empty) => {}
            }
            now = self.epoch.now();
            if now >= end {
                return Ok(true);
            }
        }
    }

    fn handle_command(&mut self, command: ShardCommand, now: Time) -> io::Result<()> {
        match command {
            ShardCommand::AddPeer {
                key,
                path,
                peer,
                events,
            } => {
                if let Some(path) = path {
                    self.watch_path(key, &path)?;
                    self.io.slots[key] = Some(SocketSlot { path, ready: false });
                }
                self.subscribers[key] = Some(events);
                self.shard.add_peer(key, *peer, now, &mut self.io);
            }
            ShardCommand::AddPath { key, path, end } => self.add_path(key, path, end, now)?,
            ShardCommand::BindChannel {
                key,
                relayed,
                peer,
                number,
            } => self.at_path(key, |path, _| path.bind_channel(relayed, peer, number)),
            ShardCommand::TellRelay {
                key,
                relayed,
                message,
            } => self.at_path(key, |path, unsent| {
                path.send_control(relayed, &message, unsent);
            }),
            ShardCommand::RemovePeer { key } => {
                self.shard.remove_peer(key);
                self.subscribers[key] = None;
                if let Some(slot) = self.io.slots[key].take() {
                    self.io.counts.socket_drops += slot.path.untold_drops();
                    for descriptor in slot.path.descriptors() {
                        self.poll
                            .registry()
                            .deregister(&mut SourceFd(&descriptor))?;
                    }
                }
            }
            ShardCommand::Report => {
                self.shard.account();
                self.report(Occasion::Asked, None);
            }
            ShardCommand::Survey => {
                let outcomes = self.shard.survey();
                self.report(Occasion::Asked, Some(outcomes));
            }
            other => self.shard.handle_command(other, now, &mut self.io),
        }
        Ok(())
    }

    /// Adds a path. All sockets of a peer wake it alike.
    fn add_path(&mut self, key: PeerKey, path: Path, end: NearEnd, now: Time) -> io::Result<()> {
        if self.io.slots[key].is_some() {
            self.watch_path(key, &path)?;
        }
        if let Some(slot) = self.io.slots[key].as_mut() {
            slot.path.add(path);
        }
        self.shard.add_near_end(key, end, now, &mut self.io);
        Ok(())
    }

    fn at_path(&mut self, key: PeerKey, work: impl FnOnce(&mut Path, &mut Unsent)) {
        if let Some(slot) = self.io.slots[key].as_mut() {
            work(&mut slot.path, &mut self.io.counts.unsent);
        }
    }

    fn watch_path(&self, key: PeerKey, path: &Path) -> io::Result<()> {
        let registry = self.poll.registry();
        // Data that waited for room in a stream is sent when the peer has its turn.
        let interest = if path.is_stream() {
            Interest::READABLE | Interest::WRITABLE
        } else {
            Interest::READABLE
        };
        path.descriptors().try_for_each(|descriptor| {
            registry.register(&mut SourceFd(&descriptor), Token(key.0), interest)
        })
    }

    fn forward_events(&mut self) {
        while let Some((key, event)) = self.shard.poll_event() {
            if let Some(subscriber) = &self.subscribers[key] {
                // If the task has ended, nobody needs the event.
                let _ = subscriber.send(event);
            }
        }
    }

    fn report_last(&mut self) {
        self.io.counts.socket_drops += self
            .io
            .slots
            .iter()
            .map(|slot| slot.path.untold_drops())
            .sum::<u64>();
        self.shard.take_io_counts(&mut self.io.counts);
        let outcomes = self.shard.finish();
        self.report(Occasion::Last, Some(outcomes));
    }

    fn report(&mut self, occasion: Occasion, outcomes: Option<Vec<PeerOutcome>>) {
        let fresh = self.spare_records.try_recv().unwrap_or_default();
        let record = self.shard.swap_record(fresh);
        let report = WorkerReport {
            worker: self.index,
            occasion,
            record,
            cpu: net::thread_cpu(),
            activity: WorkerActivity {
                arrivals: self.arrivals.take(),
                sends: self.sends.take(),
                gaps: std::mem::take(&mut self.gaps),
            },
            former: self.shard.take_former(),
            outcomes,
        };
        // Sending fails only when the run itself is gone.
        let _ = self.reports.send(report);
    }
}

struct ShardSocketIo {
    slots: PeerSlots<SocketSlot>,
    buffer: Box<[u8]>,
    /// Cleared at the first path that does not support segmentation.
    segmentation: bool,
    counts: IoCounts,
    /// Whether something was sent since this was last cleared.
    has_sent: bool,
}

struct SocketSlot {
    path: Path,
    /// Whether it may hold datagrams, and so is in the queue of ready slots.
    ready: bool,
}

impl ShardSocketIo {
    fn new(capacity: usize) -> ShardSocketIo {
        ShardSocketIo {
            slots: PeerSlots::new(capacity),
            buffer: vec![0; net::SEND_BYTES_MAX].into_boxed_slice(),
            segmentation: true,
            counts: IoCounts::default(),
            has_sent: false,
        }
    }
}

/// Notes where the other side sends from. Once a path is settled, this is not needed any more.
#[cold]
fn note_source(path: &mut Path, lane: Lane, batch: &mut net::ReceiveBatch, count: usize) {
    for index in 0..count {
        if let Some((datagram, received)) = batch.datagram(index)
            && matches!(
                classify(datagram),
                Datagram::Dtls | Datagram::Rtp | Datagram::Rtcp
            )
        {
            path.note_source(lane, received.from);
        }
    }
}

impl Io for ShardSocketIo {
    fn lend(&mut self) -> &mut [u8] {
        &mut self.buffer
    }

    fn send(&mut self, key: PeerKey, to: SocketAddr, len: usize, segment: usize) {
        let Some(slot) = self.slots[key].as_mut() else {
            return;
        };
        self.has_sent = true;
        slot.path.send(
            to,
            &self.buffer[..len],
            segment,
            &mut self.segmentation,
            &mut self.counts.unsent,
        );
    }

    fn send_setup(&mut self, key: PeerKey, to: FarEnd, len: usize) {
        if let Some(slot) = self.slots[key].as_mut() {
            self.has_sent = true;
            let unsent = &mut self.counts.unsent;
            slot.path.send_setup(to, &self.buffer[..len], unsent);
        }
    }

    fn nominate(&mut self, key: PeerKey, to: FarEnd) {
        if let Some(slot) = self.slots[key].as_mut() {
            slot.path.nominate(to);
        }
    }

    fn settle(&mut self, key: PeerKey) {
        if let Some(slot) = self.slots[key].as_mut() {
            self.counts.socket_drops += slot.path.settle();
        }
    }

    fn disconnect(&mut self, key: PeerKey) {
        if let Some(slot) = self.slots[key].as_mut() {
            slot.path.disconnect();
        }
    }
}
