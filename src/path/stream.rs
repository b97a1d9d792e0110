//! Datagrams over a byte stream: ICE over TCP (RFC 6544), with a two-byte length before each
//! datagram (RFC 4571).
//!
//! The connection is open before it becomes part of a path. What the kernel does not take at once
//! waits in a bounded backlog; beyond it whole datagrams are dropped and counted. A stream that has
//! ended, or that holds something other than datagrams, is over. The next read or send notices it.

use std::io::{self, IoSlice, Write};
use std::net::{SocketAddr, TcpStream};

use super::Unsent;
use crate::net::{FramePlace, ReceiveBatch, SEGMENTS_MAX, StreamRest};

/// Maximum number of bytes that wait for the kernel: the largest burst of a frame, or a quarter of
/// a second at 2 Mbit/s. Older data is of no use.
const BACKLOG_BYTES: usize = 1 << 16;
/// Size of the length before each datagram.
const HEAD_BYTES: usize = 2;

/// One TCP connection to a candidate of the server.
pub struct TcpCarrier {
    stream: TcpStream,
    local: SocketAddr,
    remote: SocketAddr,
    /// The beginning of an incomplete datagram.
    rest: StreamRest,
    backlog: Backlog,
    is_over: bool,
}

impl TcpCarrier {
    /// Takes an open connection.
    ///
    /// # Errors
    /// If it is not open any more.
    pub fn new(stream: TcpStream) -> io::Result<TcpCarrier> {
        stream.set_nonblocking(true)?;
        // A datagram must not wait for the next one, because it would be late.
        stream.set_nodelay(true)?;
        Ok(TcpCarrier {
            local: stream.local_addr()?,
            remote: stream.peer_addr()?,
            stream,
            rest: StreamRest::default(),
            backlog: Backlog::default(),
            is_over: false,
        })
    }

    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    pub fn local(&self) -> SocketAddr {
        self.local
    }

    pub fn remote(&self) -> SocketAddr {
        self.remote
    }

    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// Receives what has arrived, as [`ReceiveBatch::receive_framed`], and sends on what has
    /// waited.
    pub fn receive(&mut self, batch: &mut ReceiveBatch) -> io::Result<usize> {
        self.flush();
        let received = batch.receive_framed(
            &mut &self.stream,
            self.remote,
            &mut self.rest,
            FramePlace::behind_length,
        );
        if let Err(error) = &received {
            self.is_over |= !is_passing(error);
        }
        received
    }

    /// Sends `bytes` as datagrams of `segment` bytes.
    pub fn send(&mut self, bytes: &[u8], segment: usize, unsent: &mut Unsent) {
        if !self.backlog.is_empty() {
            self.flush();
        }
        // The end of the stream is reported once, not for each datagram after it.
        if self.is_over {
            return;
        }
        let segment = segment.max(1);
        let bounded = segment * SEGMENTS_MAX;
        for burst in bytes.chunks(bounded) {
            self.send_burst(burst, segment, unsent);
        }
    }

    fn send_burst(&mut self, bytes: &[u8], segment: usize, unsent: &mut Unsent) {
        let mut taken = 0;
        if self.backlog.is_empty() {
            match write_framed(&self.stream, bytes, segment) {
                Ok(count) => taken = count,
                Err(error) if is_passing(&error) => {}
                Err(_) => {
                    self.is_over = true;
                    return;
                }
            }
        }
        // If the kernel took a part of a datagram, the rest must follow.
        for datagram in bytes.chunks(segment) {
            let framed = HEAD_BYTES + datagram.len();
            if taken >= framed {
                taken -= framed;
            } else if !self.backlog.push(datagram, std::mem::take(&mut taken)) {
                unsent.backlogged += 1;
            }
        }
    }

    fn flush(&mut self) {
        while !self.backlog.is_empty() && !self.is_over {
            match (&self.stream).write(self.backlog.waiting()) {
                Ok(count) => self.backlog.consume(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => self.is_over |= !is_passing(&error),
            }
        }
    }
}

/// Writes a burst with one call. Returns how many bytes of the frames the kernel took.
fn write_framed(mut stream: &TcpStream, bytes: &[u8], segment: usize) -> io::Result<usize> {
    if bytes.len() <= segment {
        let head = (bytes.len() as u16).to_be_bytes();
        return stream.write_vectored(&[IoSlice::new(&head), IoSlice::new(bytes)]);
    }
    let whole = (segment as u16).to_be_bytes();
    let last_len = match bytes.len() % segment {
        0 => segment,
        len => len,
    };
    let last = (last_len as u16).to_be_bytes();
    let mut slices = [IoSlice::new(&[]); 2 * SEGMENTS_MAX];
    let mut used = 0;
    for datagram in bytes.chunks(segment) {
        let head = if datagram.len() == segment {
            &whole
        } else {
            &last
        };
        slices[used] = IoSlice::new(head);
        slices[used + 1] = IoSlice::new(datagram);
        used += 2;
    }
    stream.write_vectored(&slices[..used])
}

/// Whether an error says nothing about the connection.
pub fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// Bytes that wait until the kernel has room.
pub(super) struct Backlog {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Default for Backlog {
    fn default() -> Backlog {
        Backlog {
            bytes: vec![0; BACKLOG_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
        }
    }
}

impl Backlog {
    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    pub(super) fn waiting(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(super) fn consume(&mut self, count: usize) {
        self.start += count;
        if self.is_empty() {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Takes a datagram and its length, without the first `sent` bytes of both. Returns false if
    /// there is no room. A datagram that has been sent in part always has room, because nothing
    /// waits before it.
    fn push(&mut self, datagram: &[u8], sent: usize) -> bool {
        let head = (datagram.len() as u16).to_be_bytes();
        self.push_parts(&[
            &head[sent.min(HEAD_BYTES)..],
            &datagram[sent.saturating_sub(HEAD_BYTES)..],
        ])
    }

    /// Takes these parts one after the other. Returns false if there is no room.
    pub(super) fn push_parts(&mut self, parts: &[&[u8]]) -> bool {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        if self.end + len > self.bytes.len() {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.end + len > self.bytes.len() {
            return false;
        }
        for part in parts {
            self.bytes[self.end..][..part.len()].copy_from_slice(part);
            self.end += part.len();
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpListener;
    use std::time::{Duration, Instant};

    use super::*;

    /// Returns our end of a connection, and the other end.
    fn connected() -> (TcpCarrier, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (theirs, _) = listener.accept().unwrap();
        theirs
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        (TcpCarrier::new(ours).unwrap(), theirs)
    }

    /// Reads until something arrives or the stream is over.
    fn received(carrier: &mut TcpCarrier, batch: &mut ReceiveBatch) -> io::Result<Vec<Vec<u8>>> {
        let started = Instant::now();
        loop {
            match carrier.receive(batch) {
                Err(error) if is_passing(&error) && started.elapsed() < Duration::from_secs(5) => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Ok(count) => {
                    let taken = (0..count).map(|index| batch.datagram(index).unwrap().0.to_vec());
                    return Ok(taken.collect());
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn framed(datagrams: &[&[u8]]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for datagram in datagrams {
            bytes.extend((datagram.len() as u16).to_be_bytes());
            bytes.extend(*datagram);
        }
        bytes
    }

    #[test]
    fn a_burst_leaves_as_frames_one_behind_the_other() {
        let (mut carrier, mut theirs) = connected();
        let mut unsent = Unsent::default();
        carrier.send(b"hello", 5, &mut unsent);
        carrier.send(b"onetwothr", 3, &mut unsent);
        carrier.send(b"oneto", 3, &mut unsent);
        let expected = framed(&[b"hello", b"one", b"two", b"thr", b"one", b"to"]);
        let mut bytes = vec![0; expected.len()];
        theirs.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, expected);
        assert_eq!(unsent, Unsent::default());
    }

    #[test]
    fn datagrams_are_cut_out_of_the_stream_wherever_it_was_cut() {
        let (mut carrier, mut theirs) = connected();
        let mut batch = ReceiveBatch::default();
        let long = [7; 1_200];
        // An empty frame is legal and has no meaning.
        let bytes = framed(&[b"one", b"", &long, b"three"]);
        for cut in [1, 2, 4, 5, 6, 7, 8, 100, bytes.len() - 1] {
            let mut all = Vec::new();
            for part in [&bytes[..cut], &bytes[cut..]] {
                theirs.write_all(part).unwrap();
                while all.is_empty() || part.len() + cut == bytes.len() && all.len() < 3 {
                    all.extend(received(&mut carrier, &mut batch).unwrap());
                    if cut < 5 || cut == 1 {
                        break;
                    }
                }
            }
            while all.len() < 3 {
                all.extend(received(&mut carrier, &mut batch).unwrap());
            }
            assert_eq!(all, [&b"one"[..], &long, b"three"], "cut at {cut}");
        }
    }

    #[test]
    fn a_length_of_nonsense_and_an_end_are_the_end_of_the_stream() {
        let mut batch = ReceiveBatch::default();
        let (mut carrier, mut theirs) = connected();
        theirs
            .write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            .unwrap();
        let error = received(&mut carrier, &mut batch).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(carrier.is_over());
        carrier.send(b"goes nowhere", 12, &mut Unsent::default());
        let (mut carrier, theirs) = connected();
        drop(theirs);
        let error = received(&mut carrier, &mut batch).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(carrier.is_over());
    }

    #[test]
    fn what_nobody_reads_waits_up_to_a_bound_and_whole_datagrams_are_dropped_beyond_it() {
        let (mut carrier, mut theirs) = connected();
        let mut unsent = Unsent::default();
        let mut sent = 0u64;
        while unsent.backlogged < 100 && sent < 1_000_000 {
            let mut datagram = [0; 1_000];
            datagram[..8].copy_from_slice(&sent.to_be_bytes());
            carrier.send(&datagram, 1_000, &mut unsent);
            sent += 1;
        }
        assert_eq!(unsent.backlogged, 100, "of {sent}");
        assert_eq!(unsent.no_room, 0, "that is not this host's fault");
        // Datagrams that were taken arrive complete and in order, however little the kernel took at
        // a time.
        let expected = sent - unsent.backlogged;
        let reader = std::thread::spawn(move || {
            let (mut numbers, mut frame) = (Vec::new(), [0; 1_002]);
            while (numbers.len() as u64) < expected {
                theirs.read_exact(&mut frame).unwrap();
                assert_eq!(frame[..2], 1_000u16.to_be_bytes());
                numbers.push(u64::from_be_bytes(frame[2..10].try_into().unwrap()));
            }
            numbers
        });
        let mut batch = ReceiveBatch::default();
        let started = Instant::now();
        while !reader.is_finished() && started.elapsed() < Duration::from_secs(20) {
            assert!(is_passing(&carrier.receive(&mut batch).unwrap_err()));
            std::thread::sleep(Duration::from_millis(1));
        }
        let numbers = reader.join().unwrap();
        assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(numbers[..100], (0..100).collect::<Vec<_>>());
    }
}
