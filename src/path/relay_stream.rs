//! The connection to a relay that is reached over TCP, or over TLS: what has a length of its own
//! lies in it one behind the other (RFC 8656, section 12.5).
//!
//! The connection is open, and the allocation made, before it becomes part of a path. TLS is
//! rustls's, which allocates a buffer for each record: the one exception on the packet path.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};

use rustls::ClientConnection;

use super::stream::{Backlog, is_passing};
use crate::net::{FramePlace, ReceiveBatch, StreamRest};

/// Before the data of a channel: its number, and a length.
pub const CHANNEL_HEAD_BYTES: usize = 4;
/// Before the attributes of a STUN message, which have their length in bytes 2 and 3.
const STUN_HEAD_BYTES: usize = 20;
/// The longest frame: what a datagram is, and its head and filling.
const FRAME_BYTES_MAX: usize = 2_048;
/// What waits for the kernel, as in `stream`.
const SEALED_BYTES_MAX: usize = 1 << 16;
/// A record's head, its type, and the tag of the cipher (RFC 8446, section 5.2).
const RECORD_BYTES: usize = 5 + 1 + 16;

/// What a relay's stream is opened as.
pub struct RelayStream {
    stream: TcpStream,
    remote: SocketAddr,
    /// What of a frame has not come whole.
    rest: StreamRest,
    seal: RelaySeal,
    is_over: bool,
}

enum RelaySeal {
    Plain(Backlog),
    Tls {
        connection: Box<ClientConnection>,
        /// About so many bytes of records wait in it.
        waiting: usize,
    },
}

impl RelayStream {
    /// Takes a connection that is open, with TLS where there is some, and what has been read of it
    /// already.
    ///
    /// # Errors
    /// Where it is not open any more, or more has been read than one frame.
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
                // Bounded here, by whole frames.
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

    /// Takes what has come as whole frames, heads included, and sends on what has waited.
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

    /// A frame leaves with the next [`RelayStream::flush`]; false where too much waits already.
    /// `parts` are its head and its body; it is filled up to a multiple of four bytes.
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
                // A frame is a record, as with clients.
                let mut frame = [0; FRAME_BYTES_MAX];
                frame[..head.len()].copy_from_slice(head);
                frame[head.len()..len].copy_from_slice(body);
                *waiting += padded + RECORD_BYTES;
                connection.writer().write_all(&frame[..padded]).is_ok()
            }
        }
    }

    /// Gives the kernel what it takes.
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

/// How the next frame lies in the stream: a channel's data or a STUN message, whole with its head.
/// `None` where its length has not come.
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

/// What comes out of TLS, as much as there is.
struct OpenedRecords<'a> {
    stream: &'a TcpStream,
    connection: &'a mut ClientConnection,
}

impl Read for OpenedRecords<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let mut taken = 0;
        while taken < room.len() {
            let read = match self.connection.reader().read(&mut room[taken..]) {
                // Nothing is left in it.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.open_more(),
                read => read.map(|count| (count, count == 0)),
            };
            match read {
                Ok((_, true)) => break,
                Ok((count, false)) => taken += count,
                // Told by the next look, when what came before it has been taken.
                Err(_) if taken > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(taken)
    }
}

impl OpenedRecords<'_> {
    /// Nothing yet, and whether that was the end.
    fn open_more(&mut self) -> io::Result<(usize, bool)> {
        let came = self.connection.read_tls(&mut &*self.stream)?;
        self.connection
            .process_new_packets()
            .map_err(|_| io::ErrorKind::InvalidData)?;
        Ok((0, came == 0))
    }
}
