//! The thread around a router: its UDP socket, the TCP connections of its clients, its clock, and
//! the channel that commands come by.

use std::io;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Registry, Token, Waker};

use super::bottleneck::{Bottleneck, BottleneckLimit};
use super::router::{Router, RouterConfig};
use super::statistics::RouterStatistics;
use super::streams::ClientStreams;
use super::{ClientEnd, MediaCommand, MediaEvent, Outgoing, RouterAddress, SendMode};
use crate::net;
use crate::path::is_passing;
use crate::transport::peer::Identity;
use crate::units::{Epoch, Time, arrival};

/// Size of the socket's buffer for the time that the thread is busy: 3,000 video packets, if the
/// host grants it.
const RECEIVE_BUFFER_BYTES: usize = 8 << 20;
/// Largest number of batches received and forwarded together in a turn. Then timers, commands and
/// events are handled.
const DRAIN_BATCHES: usize = 8;
/// Least time between two wakes when datagrams come close together. Then a wake for each datagram
/// costs sender and receiver more than the datagram itself, so the thread polls at this interval.
const WAKE_INTERVAL_MIN: Duration = Duration::from_micros(250);
/// Largest number of commands handled in a turn: a join causes several, and media must not wait for
/// many joins.
const COMMANDS_MAX: usize = 16;

const SOCKET: Token = Token(0);
const WAKER: Token = Token(1);
/// The TCP listener; the connections' tokens follow.
const STREAMS: Token = Token(2);
/// Reads of one stream at a turn, 16 KiB each.
const STREAM_READS_MAX: usize = 4;

/// Configuration of a worker.
#[derive(Clone)]
pub struct RouterWorkerConfig {
    /// Where it listens, over UDP and over TCP, on a free port.
    pub ip: IpAddr,
    pub identity: Identity,
    pub epoch: Epoch,
    pub send: SendMode,
    /// Seed of values that need not be secret: first sequence numbers, timestamps, picture ids.
    pub seed: u64,
    /// Limit for tests that search for it.
    pub limit: Option<BottleneckLimit>,
    /// Name of the thread: `sfu-N`.
    pub name: String,
}

/// A router's thread. It ends with this handle.
pub struct RouterWorker {
    address: RouterAddress,
    requests: Sender<RouterRequest>,
    waker: Arc<Waker>,
    thread: Option<JoinHandle<()>>,
}

enum RouterRequest {
    Command(MediaCommand),
    Inspect(Box<dyn FnOnce(&Router) + Send>),
    Stop,
}

impl RouterWorker {
    /// Binds the socket and starts the thread. The router's events go to `events`.
    pub fn start(
        config: RouterWorkerConfig,
        events: tokio::sync::mpsc::UnboundedSender<MediaEvent>,
    ) -> io::Result<RouterWorker> {
        let poll = Poll::new()?;
        let sockets = RouterSockets::open(config.ip, poll.registry())?;
        let address = sockets.address;
        let waker = Arc::new(Waker::new(poll.registry(), WAKER)?);
        let (requests, inbox) = channel();
        let epoch = config.epoch;
        let router_config = RouterConfig {
            identity: config.identity,
            epoch,
            local: address,
            send: config.send,
            seed: config.seed,
        };
        let thread = std::thread::Builder::new()
            .name(config.name)
            .spawn(move || {
                // Without the permission for this, timers come up to 50 us late.
                let _ = net::wake_precisely();
                let mut worker = Loop {
                    router: Router::new(router_config, epoch.now()),
                    epoch,
                    io: RouterSocketIo {
                        socket: sockets.udp,
                        streams: sockets.streams,
                        batch: net::SendBatch::default(),
                        bottleneck: config
                            .limit
                            .map(|limit| Bottleneck::new(limit, epoch.now())),
                    },
                    received: net::ReceiveBatch::default(),
                    poll,
                    happened: Events::with_capacity(256),
                    requests: inbox,
                    events,
                    socket_drops: 0,
                    readable: true,
                    more_requests: false,
                    woken_at: Time::ZERO,
                    wakes_are_dense: false,
                };
                // The poll fails only if the process is out of resources. Then the router ends, and
                // its handle shows that.
                while let Ok(true) = worker.turn() {}
            })?;
        Ok(RouterWorker {
            address,
            requests,
            waker,
            thread: Some(thread),
        })
    }

    /// The candidates that descriptions name.
    pub fn address(&self) -> RouterAddress {
        self.address
    }

    pub fn command(&self, command: MediaCommand) {
        self.request(RouterRequest::Command(command));
    }

    /// Current cumulative counts; `None` if the thread has ended.
    pub fn statistics(&self) -> Option<RouterStatistics> {
        self.inspect(Router::statistics)
    }

    /// CPU time of the thread so far.
    pub fn cpu(&self) -> Option<Duration> {
        self.inspect(|_| net::thread_cpu())
    }

    /// Runs a function on the router between two turns, and waits for its result. For tests, and
    /// for pages that are requested now and then.
    pub fn inspect<R: Send + 'static>(
        &self,
        look: impl FnOnce(&Router) -> R + Send + 'static,
    ) -> Option<R> {
        let (answer, seen): (SyncSender<R>, Receiver<R>) = sync_channel(1);
        self.request(RouterRequest::Inspect(Box::new(move |router| {
            // Sending fails only if the asking thread is gone.
            let _ = answer.send(look(router));
        })));
        seen.recv().ok()
    }

    /// Ends the thread. Its connections fall silent.
    pub fn stop(&mut self) {
        self.request(RouterRequest::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has already been printed.
            let _ = thread.join();
        }
    }

    fn request(&self, request: RouterRequest) {
        // A thread that has ended accepts no requests. Whoever waits for an answer sees that the
        // channel is closed.
        if self.requests.send(request).is_ok() {
            let _ = self.waker.wake();
        }
    }
}

impl Drop for RouterWorker {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Loop {
    router: Router,
    epoch: Epoch,
    io: RouterSocketIo,
    received: net::ReceiveBatch,
    poll: Poll,
    happened: Events,
    requests: Receiver<RouterRequest>,
    events: tokio::sync::mpsc::UnboundedSender<MediaEvent>,
    /// The socket's drop count when last read.
    socket_drops: u32,
    /// The socket may hold more datagrams: readiness is reported only once.
    readable: bool,
    /// More requests may be waiting.
    more_requests: bool,
    woken_at: Time,
    /// The last wait was short.
    wakes_are_dense: bool,
}

impl Loop {
    /// Runs one turn: waits for work, and does it. Returns false when told to stop.
    fn turn(&mut self) -> io::Result<bool> {
        self.wait()?;
        if self.readable {
            self.readable = !self.drain();
        }
        if self.io.streams.has_work() {
            self.drain_streams();
        }
        let alive = self.take_requests();
        let now = self.epoch.now();
        self.io.refill(now);
        if self.router.next_timeout() <= now {
            self.router.handle_timeout(now, &mut self.io);
        }
        if self.io.streams.next_timeout() <= now {
            let router = &self.router;
            let ended = self.io.streams.sweep(now, |end| router.knows(end));
            ended
                .into_iter()
                .for_each(|end| self.router.handle_stream_end(end));
        }
        self.io.batch.flush(&self.io.socket);
        self.router
            .count_outlet(self.io.batch.take_errors(), 0, self.io.take_dropped());
        self.router
            .count_stream_drops(self.io.streams.take_dropped());
        while let Some(event) = self.router.poll_event() {
            // The lobby is gone only when the process ends.
            let _ = self.events.send(event);
        }
        Ok(alive)
    }

    fn wait(&mut self) -> io::Result<()> {
        let mut now = self.epoch.now();
        let has_work = self.readable || self.more_requests || self.io.streams.has_work();
        if !has_work && self.wakes_are_dense && now.since(self.woken_at) < WAKE_INTERVAL_MIN {
            std::thread::sleep(WAKE_INTERVAL_MIN - now.since(self.woken_at));
            now = self.epoch.now();
        }
        let timeout = if has_work {
            Duration::ZERO
        } else {
            let due = self.router.next_timeout();
            due.min(self.io.streams.next_timeout()).since(now)
        };
        match self.poll.poll(&mut self.happened, Some(timeout)) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        self.woken_at = self.epoch.now();
        self.wakes_are_dense = self.woken_at.since(now) < WAKE_INTERVAL_MIN;
        for event in &self.happened {
            match event.token() {
                SOCKET => self.readable = true,
                WAKER => {}
                token => self.io.streams.handle_ready(token),
            }
        }
        Ok(())
    }

    /// Receives what the socket holds, up to a bound, and forwards it. Returns false if there may
    /// be more.
    fn drain(&mut self) -> bool {
        let mut now = self.epoch.now();
        let mut is_empty = false;
        for _ in 0..DRAIN_BATCHES {
            // Kernel stamps are on the wall clock. The two clocks are read together, so their
            // difference converts the stamps to our clock.
            let unix_now;
            (now, unix_now) = (self.epoch.now(), net::unix_nanos());
            let received = self.received.receive(&self.io.socket);
            self.router
                .count_receive_errors(self.received.take_errors());
            let count = match received {
                Ok(count) => count,
                Err(error) => {
                    // A socket that keeps failing is tried again in the next turn.
                    is_empty = error.kind() == io::ErrorKind::WouldBlock;
                    break;
                }
            };
            for index in 0..count {
                self.take(index, now, unix_now);
            }
            // The packets of a frame come one after the other, and the first of them wakes the
            // thread. Sending a part of the frame costs each subscriber an extra call, which is
            // more than looking again.
            is_empty = self.received.is_drained() && !self.router.is_mid_frame();
            if is_empty {
                break;
            }
        }
        self.io.refill(now);
        self.router.end_batch(now, &mut self.io);
        is_empty
    }

    /// Takes what came by TCP, up to a bound a stream, and forwards it.
    fn drain_streams(&mut self) {
        let now = self.epoch.now();
        self.io.streams.accept(now);
        for _ in 0..self.io.streams.readable_count() {
            let Some(slot) = self.io.streams.poll_readable() else {
                break;
            };
            self.drain_stream(slot, now);
        }
        self.io.refill(now);
        self.router.end_batch(now, &mut self.io);
    }

    fn drain_stream(&mut self, slot: usize, now: Time) {
        for _ in 0..STREAM_READS_MAX {
            match self.io.streams.receive(slot, &mut self.received) {
                Ok((from, count)) => {
                    for index in 0..count {
                        // The kernel stamps no bytes of a stream.
                        if let Some((datagram, _)) = self.received.datagram(index) {
                            self.router
                                .handle_datagram(datagram, from, now, now, &mut self.io);
                        }
                    }
                    if self.received.is_drained() {
                        return;
                    }
                }
                Err(error) if is_passing(&error) => return,
                Err(_) => {
                    if let Some(end) = self.io.streams.close(slot) {
                        self.router.handle_stream_end(end);
                    }
                    return;
                }
            }
        }
        self.io.streams.queue(slot);
    }

    fn take(&mut self, index: usize, now: Time, unix_now: u64) {
        let Some((datagram, received)) = self.received.datagram(index) else {
            return self.router.refuse();
        };
        if let Some(drops) = received.drops {
            // The kernel counts buffers. Each dropped buffer is assumed to have held as many
            // datagrams as this one.
            let dropped =
                u64::from(drops.wrapping_sub(self.socket_drops)) * u64::from(received.burst);
            self.router.count_outlet(0, dropped, 0);
            self.socket_drops = drops;
        }
        let arrival = arrival(now, unix_now, received.stamp_unix_nanos);
        self.router
            .handle_datagram(datagram, received.from, arrival, now, &mut self.io);
    }

    fn take_requests(&mut self) -> bool {
        self.more_requests = false;
        for _ in 0..COMMANDS_MAX {
            match self.requests.try_recv() {
                Ok(RouterRequest::Command(command)) => {
                    self.router
                        .handle_command(command, self.epoch.now(), &mut self.io)
                }
                Ok(RouterRequest::Inspect(look)) => look(&self.router),
                Ok(RouterRequest::Stop) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => return true,
            }
        }
        // There may be more requests, but the waker reports only once.
        self.more_requests = true;
        true
    }
}

/// What a router's thread is started with.
struct RouterSockets {
    udp: UdpSocket,
    streams: ClientStreams,
    address: RouterAddress,
}

impl RouterSockets {
    /// Opens the socket and the listener, and has `registry` tell what comes in by them.
    fn open(ip: IpAddr, registry: &Registry) -> io::Result<RouterSockets> {
        let socket = net::open_media_socket(ip, RECEIVE_BUFFER_BYTES)?;
        let udp = socket.local_addr()?;
        registry.register(
            &mut SourceFd(&socket.as_raw_fd()),
            SOCKET,
            Interest::READABLE,
        )?;
        let streams = ClientStreams::listen(udp, registry.try_clone()?, STREAMS)?;
        let tcp = Some(streams.address()?);
        Ok(RouterSockets {
            udp: socket,
            streams,
            address: RouterAddress { udp, tcp },
        })
    }
}

struct RouterSocketIo {
    socket: UdpSocket,
    batch: net::SendBatch,
    streams: ClientStreams,
    bottleneck: Option<Bottleneck>,
}

impl RouterSocketIo {
    fn refill(&mut self, now: Time) {
        if let Some(bottleneck) = &mut self.bottleneck {
            bottleneck.refill(now);
        }
    }

    fn take_dropped(&mut self) -> u64 {
        self.bottleneck.as_mut().map_or(0, Bottleneck::take_dropped)
    }
}

impl Outgoing for RouterSocketIo {
    fn lend(&mut self) -> &mut [u8] {
        self.batch.lend()
    }

    fn send(&mut self, to: ClientEnd, len: usize, segment: usize) {
        if let Some(bottleneck) = &mut self.bottleneck
            && !bottleneck.admits(
                &self.batch.lend()[..len.min(segment)],
                len.div_ceil(segment),
            )
        {
            return;
        }
        if to.is_stream {
            let bytes = &self.batch.lend()[..len];
            self.streams.send(to.address, bytes, segment);
        } else {
            self.batch.push(&self.socket, to.address, len, segment);
        }
    }
}
