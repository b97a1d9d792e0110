//! Connection to a relay over TCP or TLS. Messages that carry their own length follow each other in
//! the stream (RFC 8656, section 12.5).
//!
//! The connection is open, and the allocation made, before it becomes part of a path. TLS is by
//! rustls, which allocates a buffer for each record: the one exception on the packet path.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};

use rustls::ClientConnection;

use super::stream::{Backlog, is_passing};
use crate::net::{FramePlace, ReceiveBatch, StreamRest};

/// Size of the head before channel data: channel number and length.
pub const CHANNEL_HEAD_BYTES: usize = 4;
/// Size of the head before the attributes of a STUN message. Its bytes 2 and 3 hold the length of
/// the attributes.
const STUN_HEAD_BYTES: usize = 20;
/// Maximum size of a frame: a datagram with its head and padding.
const FRAME_BYTES_MAX: usize = 2_048;
/// Maximum number of bytes that wait for the kernel, as in `stream`.
const SEALED_BYTES_MAX: usize = 1 << 16;
/// Overhead of a record: its head, its type, and the tag of the cipher (RFC 8446, section 5.2).
const RECORD_BYTES: usize = 5 + 1 + 16;

/// An open stream to a relay.
pub struct RelayStream {
    stream: TcpStream,
    remote: SocketAddr,
    /// An incomplete frame.
    rest: StreamRest,
    seal: RelaySeal,
    is_over: bool,
}

enum RelaySeal {
    Plain(Backlog),
    Tls {
        connection: Box<ClientConnection>,
        /// Approximate number of bytes of records that wait in the connection.
        waiting: usize,
    },
}

impl RelayStream {
    /// Takes an open connection, with TLS if it has any, and what has already been read from it.
    ///
    /// # Errors
    /// If the connection is not open any more, or if more than one frame has been read.
    pub fn new(
        stream: TcpStream,
        tls: Option<Box<ClientConnection>>,
        read: &[u8],
    ) -> io::Result<RelayStream> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let seal = match tls {
            None => RelaySeal::Plain(Backlog::default()),
            Some(mut connection) => {
                // The limit is enforced here, in whole frames.
                connection.set_buffer_limit(None);
                RelaySeal::Tls {
                    connection,
                    waiting: 0,
                }
            }
        };
        Ok(RelayStream {
            remote: stream.peer_addr()?,
            stream,
            rest: StreamRest::holding(read).ok_or(io::ErrorKind::InvalidData)?,
            seal,
            is_over: false,
        })
    }

    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// Receives what has arrived as whole frames, heads included, and sends on what has waited.
    pub fn receive(&mut self, batch: &mut ReceiveBatch) -> io::Result<usize> {
        self.flush();
        let (remote, rest) = (self.remote, &mut self.rest);
        let received = match &mut self.seal {
            RelaySeal::Plain(_) => {
                batch.receive_framed(&mut &self.stream, remote, rest, next_frame)
            }
            RelaySeal::Tls { connection, .. } => {
                let mut opened = OpenedRecords {
                    stream: &self.stream,
                    connection,
                };
                batch.receive_framed(&mut opened, remote, rest, next_frame)
            }
        };
        if let Err(error) = &received {
            self.is_over |= !is_passing(error);
        }
        received
    }

    /// Adds a frame, which is sent with the next [`RelayStream::flush`]. Returns false if too much
    /// waits already. The frame is `head` and `body`, padded to a multiple of four bytes.
    pub fn push(&mut self, head: &[u8], body: &[u8]) -> bool {
        let len = head.len() + body.len();
        let pad = len.next_multiple_of(4) - len;
        let padded = len + pad;
        if padded > FRAME_BYTES_MAX {
            return false;
        }
        match &mut self.seal {
            RelaySeal::Plain(backlog) => backlog.push_parts(&[head, body, &[0; 3][..pad]]),
            RelaySeal::Tls {
                connection,
                waiting,
            } => {
                if *waiting + padded + RECORD_BYTES > SEALED_BYTES_MAX {
                    return false;
                }
                // One frame is one record, as with clients.
                let mut frame = [0; FRAME_BYTES_MAX];
                frame[..head.len()].copy_from_slice(head);
                frame[head.len()..len].copy_from_slice(body);
                *waiting += padded + RECORD_BYTES;
                connection.writer().write_all(&frame[..padded]).is_ok()
            }
        }
    }

    /// Writes to the kernel as much as it takes.
    pub fn flush(&mut self) {
        while !self.is_over {
            let written = match &mut self.seal {
                RelaySeal::Plain(backlog) if backlog.is_empty() => return,
                RelaySeal::Plain(backlog) => (&self.stream)
                    .write(backlog.waiting())
                    .map(|count| backlog.consume(count)),
                RelaySeal::Tls {
                    connection,
                    waiting,
                } => {
                    if !connection.wants_write() {
                        *waiting = 0;
                        return;
                    }
                    connection
                        .write_tls(&mut &self.stream)
                        .map(|count| *waiting = waiting.saturating_sub(count))
                }
            };
            match written {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => self.is_over |= !is_passing(&error),
            }
        }
    }
}

/// Returns the position of the next frame in the stream: a channel's data or a STUN message, with
/// its head. Returns `None` if its length has not arrived.
fn next_frame(stream: &[u8]) -> Option<FramePlace> {
    let [first, _, high, low] = *stream.first_chunk::<CHANNEL_HEAD_BYTES>()?;
    let len = usize::from(u16::from_be_bytes([high, low]));
    let whole = match first >> 6 {
        0 => STUN_HEAD_BYTES + len,
        _ => CHANNEL_HEAD_BYTES + len,
    };
    Some(FramePlace {
        head: 0,
        len: whole,
        pad: whole.next_multiple_of(4) - whole,
    })
}

/// Reads as much as TLS has decrypted.
struct OpenedRecords<'a> {
    stream: &'a TcpStream,
    connection: &'a mut ClientConnection,
}

impl Read for OpenedRecords<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let mut taken = 0;
        while taken < room.len() {
            let read = match self.connection.reader().read(&mut room[taken..]) {
                // Nothing decrypted is left.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.open_more(),
                read => read.map(|count| (count, count == 0)),
            };
            match read {
                Ok((_, true)) => break,
                Ok((count, false)) => taken += count,
                // The error is returned by the next read, after the data before it has been taken.
                Err(_) if taken > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(taken)
    }
}

impl OpenedRecords<'_> {
    /// Reads and decrypts more records. Returns no bytes yet, and whether the stream has ended.
    fn open_more(&mut self) -> io::Result<(usize, bool)> {
        let came = self.connection.read_tls(&mut &*self.stream)?;
        self.connection
            .process_new_packets()
            .map_err(|_| io::ErrorKind::InvalidData)?;
        Ok((0, came == 0))
    }
}
