//! The TCP connections of a router's clients: ICE over TCP (RFC 6544) with a passive candidate of
//! ours, as LiveKit serves it.
//!
//! Whoever reaches the port can open connections. One that carried no authentic check within
//! [`UNPROVEN_AGE_MAX`] is closed, and where too many are open, the oldest of those gives way.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};

use super::ClientEnd;
use crate::net::ReceiveBatch;
use crate::path::{TcpCarrier, Unsent};
use crate::units::Time;

/// Each may hold a backlog of 64 KiB: 512 MiB at the worst.
const STREAMS_MAX: usize = 8_192;
/// Connections accepted at a turn: media must not wait for a wave of them.
const ACCEPTS_MAX: usize = 64;
/// A client checks as soon as it is connected. Two round trips of a bad network fit.
const UNPROVEN_AGE_MAX: Duration = Duration::from_secs(5);
/// Streams are looked through, and a failed accept is tried again, this often.
const SWEEP_INTERVAL: Duration = Duration::from_millis(500);

/// A listener and the connections that came in by it.
pub(super) struct ClientStreams {
    listener: TcpListener,
    registry: Registry,
    /// The token of the listener; those of the connections follow it.
    token: usize,
    slots: Vec<Option<ClientStream>>,
    free: Vec<usize>,
    by_address: HashMap<SocketAddr, usize>,
    /// The listener may hold more connections: readiness is told once.
    acceptable: bool,
    /// Slots that may hold more datagrams.
    readable: Vec<usize>,
    sweep_at: Time,
    dropped: u64,
}

struct ClientStream {
    carrier: TcpCarrier,
    /// When it was opened, or last seen to belong to a peer connection.
    proven_at: Time,
    /// As of the last sweep.
    is_proven: bool,
    is_queued: bool,
}

impl ClientStreams {
    /// Listens at `udp`'s address, on the port of the same number where that is free: then a
    /// firewall has one number to open.
    pub fn listen(udp: SocketAddr, registry: Registry, token: Token) -> io::Result<ClientStreams> {
        let any_port = SocketAddr::new(udp.ip(), 0);
        let listener = TcpListener::bind(udp).or_else(|_| TcpListener::bind(any_port))?;
        listener.set_nonblocking(true)?;
        registry.register(
            &mut SourceFd(&listener.as_raw_fd()),
            token,
            Interest::READABLE,
        )?;
        Ok(ClientStreams {
            listener,
            registry,
            token: token.0,
            slots: Vec::new(),
            free: Vec::new(),
            by_address: HashMap::new(),
            acceptable: false,
            readable: Vec::new(),
            sweep_at: Time::MAX,
            dropped: 0,
        })
    }

    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Notes that the kernel has something for this token, if it is one of ours.
    pub fn handle_ready(&mut self, token: Token) {
        let Some(offset) = token.0.checked_sub(self.token) else {
            return;
        };
        match offset.checked_sub(1) {
            None => self.acceptable = true,
            Some(slot) => self.queue(slot),
        }
    }

    /// Whether the next turn has something to do.
    pub fn has_work(&self) -> bool {
        self.acceptable || !self.readable.is_empty()
    }

    /// When [`ClientStreams::sweep`] is due.
    pub fn next_timeout(&self) -> Time {
        self.sweep_at
    }

    pub fn accept(&mut self, now: Time) {
        if !self.acceptable {
            return;
        }
        for _ in 0..ACCEPTS_MAX {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    // A client that is gone already opens another one.
                    let _ = self.add(stream, now);
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    self.acceptable = false;
                    if error.kind() != io::ErrorKind::WouldBlock {
                        // The process has no more files, for the moment.
                        self.sweep_at = self.sweep_at.min(now + SWEEP_INTERVAL);
                    }
                    return;
                }
            }
        }
    }

    fn add(&mut self, stream: TcpStream, now: Time) -> io::Result<()> {
        if self.by_address.len() == STREAMS_MAX {
            let unproven = self.oldest_unproven();
            let slot = unproven.ok_or(io::ErrorKind::QuotaExceeded)?;
            self.close(slot);
        }
        let carrier = TcpCarrier::new(stream)?;
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        let registered = self.registry.register(
            &mut SourceFd(&carrier.stream().as_raw_fd()),
            Token(self.token + 1 + slot),
            Interest::READABLE | Interest::WRITABLE,
        );
        if let Err(error) = registered {
            self.free.push(slot);
            return Err(error);
        }
        self.by_address.insert(carrier.remote(), slot);
        self.slots[slot] = Some(ClientStream {
            carrier,
            proven_at: now,
            is_proven: false,
            is_queued: false,
        });
        self.sweep_at = self.sweep_at.min(now + SWEEP_INTERVAL);
        Ok(())
    }

    fn oldest_unproven(&self) -> Option<usize> {
        let streams = self.slots.iter().enumerate();
        let unproven = streams.filter_map(|(slot, stream)| {
            let stream = stream.as_ref().filter(|stream| !stream.is_proven)?;
            Some((stream.proven_at, slot))
        });
        unproven.min().map(|(_, slot)| slot)
    }

    /// The next stream that may hold datagrams.
    pub fn poll_readable(&mut self) -> Option<usize> {
        let slot = self.readable.pop()?;
        if let Some(stream) = self.slots[slot].as_mut() {
            stream.is_queued = false;
        }
        Some(slot)
    }

    /// How many streams may hold datagrams.
    pub fn readable_count(&self) -> usize {
        self.readable.len()
    }

    /// Takes what a stream holds. `WouldBlock` where that is nothing.
    pub fn receive(
        &mut self,
        slot: usize,
        batch: &mut ReceiveBatch,
    ) -> io::Result<(ClientEnd, usize)> {
        let stream = self.slots.get_mut(slot).and_then(Option::as_mut);
        let stream = stream.ok_or(io::ErrorKind::WouldBlock)?;
        let count = stream.carrier.receive(batch)?;
        Ok((ClientEnd::stream(stream.carrier.remote()), count))
    }

    /// The stream is looked at again with the next turn.
    pub fn queue(&mut self, slot: usize) {
        let stream = self.slots.get_mut(slot).and_then(Option::as_mut);
        if let Some(stream) = stream.filter(|stream| !stream.is_queued) {
            stream.is_queued = true;
            self.readable.push(slot);
        }
    }

    /// Closes a stream, and says whose it was.
    pub fn close(&mut self, slot: usize) -> Option<ClientEnd> {
        let stream = self.slots.get_mut(slot)?.take()?;
        let remote = stream.carrier.remote();
        if self.by_address.get(&remote) == Some(&slot) {
            self.by_address.remove(&remote);
        }
        self.readable.retain(|readable| *readable != slot);
        self.free.push(slot);
        Some(ClientEnd::stream(remote))
    }

    /// Sends `bytes` as datagrams of `segment` bytes.
    pub fn send(&mut self, to: SocketAddr, bytes: &[u8], segment: usize) {
        let stream = self.by_address.get(&to).copied();
        let Some(stream) = stream.and_then(|slot| self.slots[slot].as_mut()) else {
            self.dropped += bytes.len().div_ceil(segment) as u64;
            return;
        };
        let mut unsent = Unsent::default();
        stream.carrier.send(bytes, segment, &mut unsent);
        self.dropped += unsent.backlogged;
    }

    /// Datagrams that found no connection, or no room in it, since this was asked last.
    pub fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }

    /// Closes what has ended, and what belongs to no peer connection any more. Returns whose they
    /// were.
    pub fn sweep(&mut self, now: Time, is_known: impl Fn(ClientEnd) -> bool) -> Vec<ClientEnd> {
        let mut ended = Vec::new();
        for (slot, stream) in self.slots.iter_mut().enumerate() {
            let Some(stream) = stream else { continue };
            stream.is_proven = is_known(ClientEnd::stream(stream.carrier.remote()));
            if stream.is_proven {
                stream.proven_at = now;
            }
            let is_stale = now.since(stream.proven_at) >= UNPROVEN_AGE_MAX;
            if is_stale || stream.carrier.is_over() {
                ended.push(slot);
            }
        }
        let closed = ended.into_iter().filter_map(|slot| self.close(slot));
        let closed = closed.collect();
        let is_empty = self.by_address.is_empty();
        self.acceptable = true;
        self.sweep_at = if is_empty {
            Time::MAX
        } else {
            now + SWEEP_INTERVAL
        };
        closed
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use mio::{Events, Poll};

    use super::*;

    const LISTENER: Token = Token(2);

    struct StreamDoor {
        poll: Poll,
        streams: ClientStreams,
        batch: ReceiveBatch,
    }

    impl StreamDoor {
        fn open() -> StreamDoor {
            let poll = Poll::new().unwrap();
            let registry = poll.registry().try_clone().unwrap();
            let any = SocketAddr::from(([127, 0, 0, 1], 0));
            StreamDoor {
                streams: ClientStreams::listen(any, registry, LISTENER).unwrap(),
                batch: ReceiveBatch::default(),
                poll,
            }
        }

        fn connect(&self) -> TcpStream {
            let stream = TcpStream::connect(self.streams.address().unwrap()).unwrap();
            let patience = Some(Duration::from_secs(5));
            stream.set_read_timeout(patience).unwrap();
            stream
        }

        /// Waits for the kernel once, accepts, and returns what came. What has ended is closed.
        fn turn(&mut self, now: Time) -> Vec<(ClientEnd, Vec<u8>)> {
            let mut events = Events::with_capacity(64);
            let patience = Some(Duration::from_millis(50));
            self.poll.poll(&mut events, patience).unwrap();
            for event in &events {
                self.streams.handle_ready(event.token());
            }
            self.streams.accept(now);
            let mut came = Vec::new();
            while let Some(slot) = self.streams.poll_readable() {
                match self.streams.receive(slot, &mut self.batch) {
                    Ok((from, count)) => came.extend(
                        (0..count)
                            .map(|index| (from, self.batch.datagram(index).unwrap().0.to_vec())),
                    ),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => drop(self.streams.close(slot)),
                }
            }
            came
        }

        fn turn_until(&mut self, now: Time, done: impl Fn(&ClientStreams) -> bool) {
            for _ in 0..100 {
                self.turn(now);
                if done(&self.streams) {
                    return;
                }
            }
            panic!("never done");
        }

        fn open_count(&self) -> usize {
            self.streams.by_address.len()
        }
    }

    fn is_closed(mut stream: &TcpStream) -> bool {
        !matches!(stream.read(&mut [0; 16]), Ok(1..))
    }

    #[test]
    fn datagrams_come_and_go_by_the_connection_that_has_their_address() {
        let mut door = StreamDoor::open();
        let clients = [door.connect(), door.connect()];
        door.turn_until(Time::ZERO, |streams| streams.by_address.len() == 2);
        for (number, mut client) in clients.iter().enumerate() {
            client.write_all(&[0, 3, number as u8, 7, 7]).unwrap();
            let came = (0..100).find_map(|_| door.turn(Time::ZERO).pop());
            let end = ClientEnd::stream(client.local_addr().unwrap());
            assert_eq!(came, Some((end, vec![number as u8, 7, 7])));
            door.streams.send(end.address, &[number as u8; 4], 2);
            let mut sent = [0; 8];
            client.read_exact(&mut sent).unwrap();
            assert_eq!(sent, [0, 2, number as u8, number as u8].repeat(2)[..]);
        }
        let nobody = SocketAddr::from(([127, 0, 0, 1], 9));
        door.streams.send(nobody, &[1; 25], 10);
        assert_eq!(door.streams.take_dropped(), 3);
        assert_eq!(door.streams.take_dropped(), 0);
    }

    #[test]
    fn who_speaks_something_else_or_hangs_up_is_closed_at_once() {
        let mut door = StreamDoor::open();
        let (mut browser, gone) = (door.connect(), door.connect());
        door.turn_until(Time::ZERO, |streams| streams.by_address.len() == 2);
        browser.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        drop(gone);
        door.turn_until(Time::ZERO, |streams| streams.by_address.is_empty());
        assert!(is_closed(&browser));
        assert!(!door.streams.has_work());
    }

    #[test]
    fn who_says_nothing_is_closed_in_time_and_who_is_known_stays() {
        let mut door = StreamDoor::open();
        let (silent, known) = (door.connect(), door.connect());
        door.turn_until(Time::ZERO, |streams| streams.by_address.len() == 2);
        let end = ClientEnd::stream(known.local_addr().unwrap());
        let mut now = Time::ZERO;
        while now < Time::ZERO + UNPROVEN_AGE_MAX * 3 {
            assert!(door.streams.next_timeout() <= now + SWEEP_INTERVAL);
            now = door.streams.next_timeout();
            let is_early = now < Time::ZERO + UNPROVEN_AGE_MAX;
            door.streams.sweep(now, |other| other == end);
            assert_eq!(door.open_count(), if is_early { 2 } else { 1 });
        }
        assert!(is_closed(&silent));
        // Its peer connection has ended.
        let ended = door.streams.sweep(now + UNPROVEN_AGE_MAX, |_| false);
        assert_eq!((ended, door.open_count()), (vec![end], 0));
        assert_eq!(door.streams.next_timeout(), Time::MAX);
        assert!(is_closed(&known));
    }

    #[test]
    fn a_crowd_that_says_nothing_keeps_nobody_out() {
        let mut door = StreamDoor::open();
        let known = door.connect();
        door.turn_until(Time::ZERO, |streams| streams.by_address.len() == 1);
        let end = ClientEnd::stream(known.local_addr().unwrap());
        door.streams.sweep(Time::ZERO, |other| other == end);
        let crowd: Vec<TcpStream> = (0..4).map(|_| door.connect()).collect();
        door.turn_until(Time::from_millis(1), |streams| {
            streams.by_address.len() == 5
        });
        assert_eq!(door.streams.oldest_unproven(), Some(1), "not the known one");
        drop(crowd);
    }
}
