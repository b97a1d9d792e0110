//! Every system call of the engine: datagrams with time stamps and drop counts, segmented sends,
//! the tick, threads and their clocks.
//!
//! This is the only module that may contain `unsafe`, because the socket calls have no safe wrapper
//! that neither allocates nor hides control messages.
#![allow(unsafe_code)]

use std::io::{self, IoSlice, Read};
use std::mem::size_of;
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::time::Duration;

use rustix::time::Timespec;

/// Limits of one segmented send: the kernel's own `UDP_MAX_SEGMENTS`, and a size that fits into the
/// largest UDP payload.
pub const SEGMENTS_MAX: usize = 64;
pub const SEND_BYTES_MAX: usize = 65_000;

/// How a router sends its datagrams: with one call each, as a real SFU does, or with one call for a
/// burst to one receiver, segmented by the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SendMode {
    #[default]
    Plain,
    Gso,
}

impl SendMode {
    pub const fn name(self) -> &'static str {
        match self {
            SendMode::Plain => "plain",
            SendMode::Gso => "gso",
        }
    }
}

/// Opens a UDP socket for one peer connection. It is bound to `local` (which may be any address of
/// its family) on a free port, and is non-blocking. The kernel stamps arrivals and counts drops.
///
/// The kernel grants at most `net.core.rmem_max` of `receive_buffer_bytes`. Its default holds 92
/// video packets: one late tick in a large room.
pub fn open_media_socket(local: IpAddr, receive_buffer_bytes: usize) -> io::Result<UdpSocket> {
    let address = SocketAddr::new(local, 0);
    let socket = socket2::Socket::new(
        socket2::Domain::for_address(address),
        socket2::Type::DGRAM,
        None,
    )?;
    if address.is_ipv6() {
        // IPv4 has its own sockets.
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    let socket = UdpSocket::from(socket);
    socket.set_nonblocking(true)?;
    rustix::net::sockopt::set_socket_recv_buffer_size(&socket, receive_buffer_bytes)?;
    set_flag(&socket, libc::SOL_SOCKET, libc::SO_TIMESTAMPNS)?;
    set_flag(&socket, libc::SOL_SOCKET, libc::SO_RXQ_OVFL)?;
    // A burst that the sender's kernel or the network card kept together arrives as one buffer.
    // Kernels before 5.0 do not support this and deliver the datagrams one by one.
    let _ = set_flag(&socket, libc::SOL_UDP, libc::UDP_GRO);
    Ok(socket)
}

/// Opens a socket as [`open_media_socket`] does, for the datagrams that a relay forwards. They
/// arrive one by one, because each may come from another peer.
pub fn open_relay_socket(local: IpAddr, receive_buffer_bytes: usize) -> io::Result<UdpSocket> {
    let socket = open_media_socket(local, receive_buffer_bytes)?;
    let _ = set_option(&socket, libc::SOL_UDP, libc::UDP_GRO, 0);
    Ok(socket)
}

fn set_flag(socket: &UdpSocket, level: libc::c_int, option: libc::c_int) -> io::Result<()> {
    set_option(socket, level, option, 1)
}

fn set_option(
    socket: &UdpSocket,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the pointer and length describe `value`, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as u32,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Metadata of one datagram.
#[derive(Clone, Copy, Debug)]
pub struct ReceivedDatagram {
    pub from: SocketAddr,
    /// Time at which the kernel received it from the network, in nanoseconds since 1970 by the wall
    /// clock.
    pub stamp_unix_nanos: Option<u64>,
    /// Number of buffers that this socket has dropped so far for lack of space. Each held one
    /// datagram or a burst.
    pub drops: Option<u32>,
    /// Number of datagrams in the kernel's buffer, this one included.
    pub burst: u32,
}

/// Maximum number of buffers that one call takes: more than a burst that was sent datagram by
/// datagram, so that a drained socket is noticed without another call.
pub const BATCH: usize = 8;
/// Maximum size of a datagram. It is longer than any datagram of a peer connection; longer ones are
/// refused.
const DATAGRAM_BYTES_MAX: usize = 2_048;
/// Maximum number of bytes that the kernel keeps in one buffer.
const BURST_BYTES_MAX: usize = 1 << 16;

/// Maximum number of bytes that one read takes from a stream: a burst of video.
const STREAM_BYTES_MAX: usize = BURST_BYTES_MAX;
/// Maximum number of bytes around a datagram in a stream: a length of two bytes (RFC 4571, section
/// 2), or a head of four bytes and padding to a multiple of four (RFC 8656, section 12.5).
const FRAME_OVERHEAD_MAX: usize = 8;
/// Maximum size of a datagram in a stream, with the bytes around it.
const FRAME_BYTES_MAX: usize = FRAME_OVERHEAD_MAX + DATAGRAM_BYTES_MAX;

/// Position of the next datagram in a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FramePlace {
    /// Number of bytes before it.
    pub head: usize,
    pub len: usize,
    /// Number of bytes behind it.
    pub pad: usize,
}

impl FramePlace {
    /// Returns the position of a datagram behind its two-byte length (RFC 4571), or `None` if the
    /// length has not arrived.
    pub fn behind_length(stream: &[u8]) -> Option<FramePlace> {
        let head = stream.first_chunk()?;
        Some(FramePlace {
            head: head.len(),
            len: usize::from(u16::from_be_bytes(*head)),
            pad: 0,
        })
    }
}

/// The beginning of a datagram whose end has not been read from its stream yet.
pub struct StreamRest {
    bytes: Box<[u8; FRAME_BYTES_MAX]>,
    len: usize,
}

impl StreamRest {
    /// Holds what has already been read from a stream. Returns `None` if it does not fit.
    pub fn holding(bytes: &[u8]) -> Option<StreamRest> {
        let mut rest = StreamRest::default();
        rest.bytes.get_mut(..bytes.len())?.copy_from_slice(bytes);
        rest.len = bytes.len();
        Some(rest)
    }
}

impl Default for StreamRest {
    fn default() -> StreamRest {
        StreamRest {
            bytes: Box::new([0; FRAME_BYTES_MAX]),
            len: 0,
        }
    }
}

/// Maximum number of errors that one call removes from a socket. A socket keeps one at a time.
const PENDING_ERRORS_MAX: usize = 8;

/// Buffers for the datagrams of one call, allocated once.
pub struct ReceiveBatch {
    bytes: Box<[u8]>,
    rooms: Box<[MessageBuffers; BATCH]>,
    headers: Box<[libc::mmsghdr; BATCH]>,
    vectors: Box<[libc::iovec; BATCH]>,
    /// Buffers of the last call; `datagrams` are the datagrams in them.
    buffers: [Option<ReceivedDatagram>; BATCH],
    taken: usize,
    datagrams: Vec<DatagramPlace>,
    /// Senders of these, if they are others than those of their buffers: behind a relay.
    senders: Vec<SocketAddr>,
    errors: u64,
    refused: u64,
}

struct MessageBuffers {
    name: libc::sockaddr_storage,
    control: ControlBuffer,
}

/// Position of a datagram.
struct DatagramPlace {
    buffer: usize,
    start: usize,
    end: usize,
}

impl Default for ReceiveBatch {
    fn default() -> ReceiveBatch {
        // SAFETY: all of these are plain C structures and arrays of bytes, for which zeros are
        // valid.
        unsafe {
            ReceiveBatch {
                bytes: vec![0; BATCH * BURST_BYTES_MAX].into_boxed_slice(),
                rooms: Box::new(std::mem::zeroed()),
                headers: Box::new(std::mem::zeroed()),
                vectors: Box::new(std::mem::zeroed()),
                buffers: [None; BATCH],
                taken: 0,
                datagrams: Vec::with_capacity(BATCH * SEGMENTS_MAX),
                senders: Vec::with_capacity(BATCH * SEGMENTS_MAX),
                errors: 0,
                refused: 0,
            }
        }
    }
}

impl ReceiveBatch {
    /// Receives what a socket holds, up to [`BATCH`] buffers. Returns the number of datagrams.
    ///
    /// An ICMP answer to something that was sent waits in the socket as an error, before all
    /// datagrams. It is counted ([`ReceiveBatch::take_errors`]) and skipped.
    ///
    /// # Errors
    /// `WouldBlock` when there is nothing. Any other error means that the socket keeps failing:
    /// there may be more to read.
    pub fn receive(&mut self, socket: &UdpSocket) -> io::Result<usize> {
        self.datagrams.clear();
        self.senders.clear();
        self.taken = 0;
        for _ in 1..PENDING_ERRORS_MAX {
            match self.receive_once(socket) {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => self.count_error(&error),
                taken => return taken,
            }
        }
        self.receive_once(socket)
    }

    /// Receives what a stream holds, up to a limit, and cuts it into datagrams with `cut`. An
    /// incomplete datagram is kept in `rest`.
    ///
    /// # Errors
    /// `WouldBlock` when there is nothing; `UnexpectedEof` at the stream's end; `InvalidData` if
    /// the stream holds a length that no datagram has.
    pub fn receive_framed(
        &mut self,
        stream: &mut impl Read,
        from: SocketAddr,
        rest: &mut StreamRest,
        cut: impl Fn(&[u8]) -> Option<FramePlace>,
    ) -> io::Result<usize> {
        self.datagrams.clear();
        self.senders.clear();
        self.taken = 0;
        self.buffers[0] = Some(ReceivedDatagram {
            from,
            stamp_unix_nanos: None,
            drops: None,
            burst: 1,
        });
        let room = &mut self.bytes[..STREAM_BYTES_MAX];
        let kept = std::mem::take(&mut rest.len);
        room[..kept].copy_from_slice(&rest.bytes[..kept]);
        let taken = stream
            .read(&mut room[kept..])
            .inspect_err(|_| rest.len = kept)?;
        if taken == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (mut at, end) = (0, kept + taken);
        while let Some(FramePlace { head, len, pad }) = cut(&room[at..end]) {
            if len > DATAGRAM_BYTES_MAX || head + pad > FRAME_OVERHEAD_MAX {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let (start, next) = (at + head, at + head + len + pad);
            if next > end {
                break;
            }
            // An empty datagram is allowed, and has no meaning.
            if len > 0 {
                self.datagrams.push(DatagramPlace {
                    buffer: 0,
                    start,
                    end: next - pad,
                });
            }
            at = next;
        }
        rest.len = end - at;
        rest.bytes[..rest.len].copy_from_slice(&room[at..end]);
        // A read that fills the buffer may have left something.
        self.taken = if end == room.len() { BATCH } else { 1 };
        Ok(self.datagrams.len())
    }

    fn receive_once(&mut self, socket: &UdpSocket) -> io::Result<usize> {
        self.prepare();
        // SAFETY: every header points to buffers of this batch, with their true lengths; the borrow
        // keeps them alive and unshared during the call.
        let taken = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                BATCH as u32,
                0,
                std::ptr::null_mut(),
            )
        };
        if taken < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(self.take(taken as usize))
    }

    /// Counts an error. A server that is gone refuses every datagram. That is no fault of the path,
    /// so it is counted separately.
    fn count_error(&mut self, error: &io::Error) {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => self.refused += 1,
            io::ErrorKind::Interrupted => {}
            _ => self.errors += 1,
        }
    }

    /// Returns the number of answers that nothing listens at the other end, since the last call.
    pub fn take_refused(&mut self) -> u64 {
        std::mem::take(&mut self.refused)
    }

    /// Returns the number of errors, other than refused connections, that came in place of
    /// datagrams since the last call.
    pub fn take_errors(&mut self) -> u64 {
        std::mem::take(&mut self.errors)
    }

    /// Points the headers at this batch's buffers. This is done before each call, because the
    /// memory that holds them may have been lent or moved since the last one.
    fn prepare(&mut self) {
        let bytes = self.bytes.chunks_exact_mut(BURST_BYTES_MAX);
        let rooms = self.rooms.iter_mut().zip(bytes);
        let headers = self.headers.iter_mut().zip(self.vectors.iter_mut());
        for ((room, bytes), (header, vector)) in rooms.zip(headers) {
            vector.iov_base = bytes.as_mut_ptr().cast();
            vector.iov_len = bytes.len();
            let header = &mut header.msg_hdr;
            header.msg_name = (&raw mut room.name).cast();
            header.msg_namelen = size_of::<libc::sockaddr_storage>() as u32;
            header.msg_iov = vector;
            header.msg_iovlen = 1;
            header.msg_control = room.control.0.as_mut_ptr().cast();
            header.msg_controllen = size_of::<ControlBuffer>() as _;
        }
    }

    /// Takes the first `taken` buffers, which the kernel has filled. Returns the number of
    /// datagrams.
    fn take(&mut self, taken: usize) -> usize {
        self.taken = taken;
        for buffer in 0..taken {
            self.cut(buffer);
        }
        self.datagrams.len()
    }

    /// Whether the socket held no more than the last call took.
    pub fn is_drained(&self) -> bool {
        self.taken < BATCH
    }

    /// Finds the datagrams in a buffer.
    fn cut(&mut self, buffer: usize) {
        let (header, room) = (&self.headers[buffer], &self.rooms[buffer]);
        let len = (header.msg_len as usize).min(BURST_BYTES_MAX);
        let control_len = header
            .msg_hdr
            .msg_controllen
            .min(size_of::<ControlBuffer>());
        let control = read_control(&room.control.0[..control_len]);
        let segment = control
            .segment
            .filter(|segment| (1..len).contains(segment))
            .unwrap_or(len.max(1));
        let is_whole = header.msg_hdr.msg_flags & libc::MSG_TRUNC == 0;
        self.buffers[buffer] =
            socket_address(&room.name)
                .filter(|_| is_whole)
                .map(|from| ReceivedDatagram {
                    from,
                    stamp_unix_nanos: control.stamp_unix_nanos,
                    drops: control.drops,
                    burst: len.div_ceil(segment).max(1) as u32,
                });
        let base = buffer * BURST_BYTES_MAX;
        // An empty datagram is a datagram, too.
        for start in (0..len.max(1)).step_by(segment) {
            self.datagrams.push(DatagramPlace {
                buffer,
                start: base + start,
                end: base + (start + segment).min(len),
            });
        }
    }

    /// Unwraps each datagram of the last call. `unwrap` returns the range of the inner datagram and
    /// its sender, or `None` if there is none. Returns the number of datagrams that remain.
    pub fn unwrap_each(
        &mut self,
        mut unwrap: impl FnMut(&[u8]) -> Option<(Range<usize>, SocketAddr)>,
    ) -> usize {
        let (bytes, senders) = (&self.bytes, &mut self.senders);
        self.datagrams.retain_mut(|place| {
            let Some((range, from)) = unwrap(&bytes[place.start..place.end]) else {
                return false;
            };
            place.end = place.start + range.end;
            place.start += range.start;
            senders.push(from);
            true
        });
        self.datagrams.len()
    }

    /// Returns datagram `index` of the last call; `None` if it did not come from an IP address or
    /// was too long.
    pub fn datagram(&mut self, index: usize) -> Option<(&mut [u8], ReceivedDatagram)> {
        let place = self.datagrams.get(index)?;
        let mut received = self.buffers[place.buffer]?;
        if let Some(sender) = self.senders.get(index) {
            received.from = *sender;
        }
        let bytes = &mut self.bytes[place.start..place.end];
        (bytes.len() <= DATAGRAM_BYTES_MAX).then_some((bytes, received))
    }
}

#[repr(align(8))]
struct ControlBuffer([u8; 128]);

/// Alignment of control messages and of their data (`CMSG_ALIGN`).
const CONTROL_ALIGN: usize = size_of::<usize>();
const CONTROL_HEADER_LEN: usize = size_of::<libc::cmsghdr>().next_multiple_of(CONTROL_ALIGN);

/// Contents of the control messages of a buffer.
#[derive(Debug, Default, PartialEq)]
struct ControlData {
    stamp_unix_nanos: Option<u64>,
    drops: Option<u32>,
    /// Size of each datagram but the last, if there are several.
    segment: Option<usize>,
}

/// Reads a plain C structure from the start of `bytes`; `None` if there are too few.
fn read_plain<T: Plain>(bytes: &[u8]) -> Option<T> {
    // SAFETY: there are enough bytes, the read needs no alignment, and any bytes are a valid value.
    (bytes.len() >= size_of::<T>()).then(|| unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// Integers, and C structures of integers only: any bytes are a valid value.
trait Plain {}
impl Plain for libc::cmsghdr {}
impl Plain for libc::timespec {}
impl Plain for u32 {}
impl Plain for libc::c_int {}

fn read_control(mut bytes: &[u8]) -> ControlData {
    let mut control = ControlData::default();
    while let Some(header) = read_plain::<libc::cmsghdr>(bytes) {
        let len = header.cmsg_len;
        let Some(data) = bytes.get(CONTROL_HEADER_LEN..len) else {
            break;
        };
        match (header.cmsg_level, header.cmsg_type) {
            (libc::SOL_SOCKET, libc::SO_TIMESTAMPNS) => {
                control.stamp_unix_nanos = read_plain::<libc::timespec>(data)
                    .map(|stamp| stamp.tv_sec as u64 * 1_000_000_000 + stamp.tv_nsec as u64);
            }
            (libc::SOL_SOCKET, libc::SO_RXQ_OVFL) => control.drops = read_plain(data),
            (libc::SOL_UDP, libc::UDP_GRO) => {
                control.segment = read_plain::<libc::c_int>(data)
                    .and_then(|segment| usize::try_from(segment).ok());
            }
            _ => {}
        }
        let Some(rest) = bytes.get(len.next_multiple_of(CONTROL_ALIGN)..) else {
            break;
        };
        bytes = rest;
    }
    control
}

fn socket_address(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match i32::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says that the storage holds a sockaddr_in.
            let v4 = unsafe { &*(&raw const *storage).cast::<libc::sockaddr_in>() };
            Some(
                SocketAddrV4::new(
                    u32::from_be(v4.sin_addr.s_addr).into(),
                    u16::from_be(v4.sin_port),
                )
                .into(),
            )
        }
        libc::AF_INET6 => {
            // SAFETY: the family says that the storage holds a sockaddr_in6.
            let v6 = unsafe { &*(&raw const *storage).cast::<libc::sockaddr_in6>() };
            Some(
                SocketAddrV6::new(
                    v6.sin6_addr.s6_addr.into(),
                    u16::from_be(v6.sin6_port),
                    v6.sin6_flowinfo,
                    v6.sin6_scope_id,
                )
                .into(),
            )
        }
        _ => None,
    }
}

/// Asks the processor to prefetch the first `bytes` of a value into its cache, while other work
/// goes on.
#[inline]
pub fn prefetch<T: ?Sized>(value: &T, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        let start = std::ptr::from_ref(value).cast::<i8>();
        for offset in (0..bytes.min(size_of_val(value))).step_by(64) {
            // SAFETY: a prefetch reads nothing and cannot fault; the address lies within the value.
            unsafe {
                std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(
                    start.add(offset),
                )
            };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (value, bytes);
}

/// Sends `bytes` as datagrams of `segment` bytes each (the last may be shorter) with one call.
///
/// `to` is `None` on a connected socket. `EIO` and `EINVAL` mean that this path does not support
/// segmentation: send the datagrams one by one.
pub fn send_segmented(
    socket: &UdpSocket,
    to: Option<SocketAddr>,
    bytes: &[u8],
    segment: usize,
) -> io::Result<()> {
    let mut control = ControlBuffer([0; 128]);
    let mut vector = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: a zeroed msghdr is valid; the pointers set below outlive the call.
    let sent = unsafe {
        let mut header: libc::msghdr = std::mem::zeroed();
        let name = to.map(socket2::SockAddr::from);
        if let Some(name) = &name {
            header.msg_name = name.as_ptr().cast_mut().cast();
            header.msg_namelen = name.len();
        }
        header.msg_iov = &raw mut vector;
        header.msg_iovlen = 1;
        write_segment_size(&mut header, &mut control, segment);
        libc::sendmsg(socket.as_raw_fd(), &raw const header, 0)
    };
    if sent < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Maximum number of messages that one call sends. More would not cost less, but would be sent
/// later.
const SEND_BATCH: usize = 64;

/// Datagrams to many receivers, sent with few calls. Waiting datagrams are sent when there is no
/// room for more, or by [`SendBatch::flush`].
pub struct SendBatch {
    bytes: Box<[u8]>,
    used: usize,
    waiting: Vec<WaitingSend>,
    headers: Box<[libc::mmsghdr; SEND_BATCH]>,
    vectors: Box<[libc::iovec; SEND_BATCH]>,
    controls: Box<[ControlBuffer; SEND_BATCH]>,
    /// Cleared at the first path that does not support segmentation.
    segmentation: bool,
    errors: u64,
}

struct WaitingSend {
    to: socket2::SockAddr,
    start: usize,
    len: usize,
    segment: usize,
}

impl Default for SendBatch {
    fn default() -> SendBatch {
        // SAFETY: all of these are plain C structures and arrays of bytes, for which zeros are
        // valid.
        let (headers, vectors, controls) = unsafe {
            (
                Box::new(std::mem::zeroed()),
                Box::new(std::mem::zeroed()),
                Box::new(std::mem::zeroed()),
            )
        };
        SendBatch {
            bytes: vec![0; 2 * SEND_BYTES_MAX].into_boxed_slice(),
            used: 0,
            waiting: Vec::with_capacity(SEND_BATCH),
            headers,
            vectors,
            controls,
            segmentation: true,
            errors: 0,
        }
    }
}

impl SendBatch {
    /// Lends a buffer of at least [`SEND_BYTES_MAX`] bytes. It is the same buffer until the next
    /// [`SendBatch::push`].
    pub fn lend(&mut self) -> &mut [u8] {
        &mut self.bytes[self.used..]
    }

    /// Takes the first `len` bytes of the lent buffer as datagrams of `segment` bytes each; the
    /// last may be shorter.
    pub fn push(&mut self, socket: &UdpSocket, to: SocketAddr, len: usize, segment: usize) {
        self.waiting.push(WaitingSend {
            to: to.into(),
            start: self.used,
            len,
            segment,
        });
        self.used += len;
        if self.waiting.len() == SEND_BATCH || self.bytes.len() - self.used < SEND_BYTES_MAX {
            self.flush(socket);
        }
    }

    pub fn flush(&mut self, socket: &UdpSocket) {
        let mut sent = 0;
        while sent < self.waiting.len() {
            match self.send_from(socket, sent) {
                Ok(count) => sent += count,
                Err(error) => {
                    self.send_one_by_one(socket, sent, &error);
                    sent += 1;
                }
            }
        }
        self.waiting.clear();
        self.used = 0;
    }

    /// Returns the number of datagrams that the kernel did not take since the last call.
    pub fn take_errors(&mut self) -> u64 {
        std::mem::take(&mut self.errors)
    }

    /// Sends waiting entries from `first` on, until one cannot be sent. Returns how many were sent,
    /// or the error if not even the first was.
    fn send_from(&mut self, socket: &UdpSocket, first: usize) -> io::Result<usize> {
        match self.prepare(first) {
            // Everything before an entry that cannot be segmented is sent with this call. That
            // entry is sent by itself with the next one.
            0 => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
            count => self.send_headers(socket, count),
        }
    }

    /// Points headers at the waiting entries from `first` on, up to an entry that cannot be sent as
    /// it is. Returns the number of headers.
    fn prepare(&mut self, first: usize) -> usize {
        let waiting = &self.waiting[first..];
        let slots = self.vectors.iter_mut().zip(self.controls.iter_mut());
        let slots = self.headers.iter_mut().zip(slots);
        let mut count = 0;
        for (entry, (header, (vector, control))) in waiting.iter().zip(slots) {
            if entry.len > entry.segment && !self.segmentation {
                break;
            }
            let header = &mut header.msg_hdr;
            let bytes = &self.bytes[entry.start..entry.start + entry.len];
            vector.iov_base = bytes.as_ptr().cast_mut().cast();
            vector.iov_len = bytes.len();
            header.msg_name = entry.to.as_ptr().cast_mut().cast();
            header.msg_namelen = entry.to.len();
            header.msg_iov = vector;
            header.msg_iovlen = 1;
            header.msg_control = std::ptr::null_mut();
            header.msg_controllen = 0;
            if entry.len > entry.segment {
                write_segment_size(header, control, entry.segment);
            }
            count += 1;
        }
        count
    }

    fn send_headers(&mut self, socket: &UdpSocket, count: usize) -> io::Result<usize> {
        // SAFETY: the first `count` headers were filled with pointers into buffers of this batch,
        // with their true lengths; the borrow keeps them alive. The kernel reads what they point to
        // and writes none of it.
        let sent = unsafe {
            libc::sendmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                count as u32,
                0,
            )
        };
        if sent < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(sent as usize)
        }
    }

    /// Handles an entry that could not be sent. If the path does not support segmentation, the
    /// datagrams are sent one by one.
    fn send_one_by_one(&mut self, socket: &UdpSocket, index: usize, error: &io::Error) {
        let entry = &self.waiting[index];
        let bytes = &self.bytes[entry.start..entry.start + entry.len];
        if entry.len <= entry.segment || !is_without_segmentation(error) {
            self.errors += entry.len.div_ceil(entry.segment) as u64;
            return;
        }
        self.segmentation = false;
        let to = entry.to.as_socket();
        for datagram in bytes.chunks(entry.segment) {
            self.errors += u64::from(send(socket, to, datagram).is_err());
        }
    }
}

/// Adds the control message that makes the kernel cut a send into datagrams of `segment` bytes.
fn write_segment_size(header: &mut libc::msghdr, control: &mut ControlBuffer, segment: usize) {
    const LEN: usize = CONTROL_HEADER_LEN + size_of::<u16>();
    // SAFETY: zeros are a valid header. On some systems it has padding, which cannot be named.
    let mut message: libc::cmsghdr = unsafe { std::mem::zeroed() };
    message.cmsg_level = libc::SOL_UDP;
    message.cmsg_type = libc::UDP_SEGMENT;
    message.cmsg_len = LEN as _;
    let (head, data) = control.0.split_at_mut(CONTROL_HEADER_LEN);
    // SAFETY: the head is as long as the header, and the write needs no alignment.
    unsafe {
        head.as_mut_ptr()
            .cast::<libc::cmsghdr>()
            .write_unaligned(message)
    };
    data[..size_of::<u16>()].copy_from_slice(&(segment as u16).to_ne_bytes());
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = LEN.next_multiple_of(CONTROL_ALIGN) as _;
}

/// Whether a segmented send failed because this path does not support segmentation.
pub fn is_without_segmentation(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EIO | libc::EINVAL | libc::EOPNOTSUPP)
    )
}

/// Sends the parts as one datagram on a connected socket.
pub fn send_parts(socket: &UdpSocket, parts: &[IoSlice<'_>]) -> io::Result<()> {
    let mut control = rustix::net::SendAncillaryBuffer::default();
    let flags = rustix::net::SendFlags::empty();
    rustix::net::sendmsg(socket, parts, &mut control, flags)?;
    Ok(())
}

/// Sends one datagram. `to` is `None` on a connected socket.
pub fn send(socket: &UdpSocket, to: Option<SocketAddr>, bytes: &[u8]) -> io::Result<()> {
    match to {
        Some(to) => socket.send_to(bytes, to).map(drop),
        None => socket.send(bytes).map(drop),
    }
}

/// Returns the monotonic clock, in nanoseconds since a time chosen by the kernel.
pub fn monotonic_nanos() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Sleeps until an absolute time on the monotonic clock. Returns at once if that time has passed.
pub fn sleep_until(monotonic_nanos: u64) {
    let until = Timespec {
        tv_sec: (monotonic_nanos / 1_000_000_000) as i64,
        tv_nsec: (monotonic_nanos % 1_000_000_000) as i64,
    };
    // If a signal interrupts the sleep, sleep for the rest.
    while rustix::thread::clock_nanosleep_absolute(rustix::thread::ClockId::Monotonic, &until)
        == Err(rustix::io::Errno::INTR)
    {}
}

/// Asks the kernel not to group this thread's wake-ups with later ones. By default it may delay a
/// wake-up by 50 us on purpose.
pub fn wake_precisely() -> io::Result<()> {
    Ok(rustix::thread::set_current_timer_slack(NonZeroU64::new(1))?)
}

/// Pins the calling thread to one processor.
pub fn pin_to(cpu: usize) -> io::Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    Ok(rustix::thread::sched_setaffinity(None, &set)?)
}

/// Returns the processors that this process may run on.
pub fn allowed_cpus() -> Vec<usize> {
    rustix::thread::sched_getaffinity(None).map_or_else(
        |_| vec![0],
        |set| {
            (0..rustix::thread::CpuSet::MAX_CPU)
                .filter(|cpu| set.is_set(*cpu))
                .collect()
        },
    )
}

/// Returns the wall clock, in nanoseconds since 1970. Kernel stamps use this clock.
pub fn unix_nanos() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Returns the CPU time of the calling thread so far, user and system together.
pub fn thread_cpu() -> Duration {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(used.tv_sec as u64, used.tv_nsec as u32)
}

/// Returns the CPU time of the whole process so far.
pub fn process_cpu() -> Duration {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(used.tv_sec as u64, used.tv_nsec as u32)
}

/// Returns the CPU time of this process's threads whose names start with `prefix`; `None` if the
/// kernel does not report it.
pub fn threads_cpu(prefix: &str) -> Option<Duration> {
    let mut total = Duration::ZERO;
    for task in std::fs::read_dir("/proc/self/task").ok()? {
        let path = task.ok()?.path();
        // A thread may have ended meanwhile.
        let Ok(name) = std::fs::read_to_string(path.join("comm")) else {
            continue;
        };
        if !name.starts_with(prefix) {
            continue;
        }
        let text = std::fs::read_to_string(path.join("schedstat")).ok()?;
        total += Duration::from_nanos(text.split_whitespace().next()?.parse().ok()?);
    }
    Some(total)
}

/// Returns the resident memory now and at its highest, in bytes.
pub fn resident_bytes() -> Option<(u64, u64)> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kilobytes = |key: &str| {
        status.lines().find_map(|line| {
            line.strip_prefix(key)?
                .split_whitespace()
                .next()?
                .parse::<u64>()
                .ok()
        })
    };
    Some((kilobytes("VmRSS:")? * 1024, kilobytes("VmHWM:")? * 1024))
}

/// Returns the number of datagrams that a socket has dropped so far, without waiting for the next
/// datagram to report it (`SO_MEMINFO`).
pub fn socket_drops(socket: &UdpSocket) -> io::Result<u32> {
    // `SK_MEMINFO_VARS` and `SK_MEMINFO_DROPS` of linux/sock_diag.h.
    const VARS: usize = 9;
    const DROPS: usize = 8;
    let mut values = [0u32; VARS];
    let mut len = size_of_val(&values) as libc::socklen_t;
    // SAFETY: the pointer and length describe `values`, and the kernel writes no more than that.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            values.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    match (result, len as usize > DROPS * size_of::<u32>()) {
        (0, true) => Ok(values[DROPS]),
        (0, false) => Err(io::ErrorKind::Unsupported.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Returns the number of ticks per second, the unit of `/proc/stat`.
pub fn clock_ticks_per_second() -> u64 {
    // SAFETY: sysconf takes no pointer.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    u64::try_from(ticks)
        .ok()
        .filter(|ticks| *ticks > 0)
        .unwrap_or(100)
}

/// Sends one dump request to the kernel's routing socket and hands each datagram of the answer to
/// `take`, until `take` returns that it was the last.
///
/// # Errors
/// If the kernel has no such socket, or does not answer in time.
pub fn dump_routing(request: &[u8], mut take: impl FnMut(&[u8]) -> bool) -> io::Result<()> {
    use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};
    // Protocol 0 is NETLINK_ROUTE.
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        None,
    )?;
    sockopt::set_socket_timeout(
        &socket,
        sockopt::Timeout::Recv,
        Some(Duration::from_millis(100)),
    )?;
    rustix::net::send(&socket, request, SendFlags::empty())?;
    // Maximum size of the kernel's answers (netlink(7)).
    let mut answer = vec![0; 32 << 10];
    loop {
        let (len, _) = rustix::net::recv(&socket, &mut answer[..], RecvFlags::empty())?;
        if len == 0 || take(&answer[..len]) {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (UdpSocket, UdpSocket) {
        let local = IpAddr::from([127, 0, 0, 1]);
        (
            open_media_socket(local, 1 << 20).unwrap(),
            open_media_socket(local, 1 << 20).unwrap(),
        )
    }

    /// Does what `recvmmsg` does with a prepared header, using only its pointers.
    fn fill(header: &mut libc::mmsghdr, from: SocketAddrV4, bytes: &[u8], control: &[u8]) {
        let message = &mut header.msg_hdr;
        // SAFETY: a prepared header points to buffers of at least this size.
        unsafe {
            let mut name: libc::sockaddr_in = std::mem::zeroed();
            name.sin_family = libc::AF_INET as u16;
            name.sin_port = from.port().to_be();
            name.sin_addr.s_addr = u32::from(*from.ip()).to_be();
            message.msg_name.cast::<libc::sockaddr_in>().write(name);
            assert!(bytes.len() <= (*message.msg_iov).iov_len);
            let room = (*message.msg_iov).iov_base.cast::<u8>();
            room.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            let room = message.msg_control.cast::<u8>();
            room.copy_from_nonoverlapping(control.as_ptr(), control.len());
        }
        message.msg_controllen = control.len() as _;
        message.msg_flags = 0;
        header.msg_len = bytes.len() as u32;
    }

    /// A control message as the kernel writes it, with the gap to the next one.
    fn control_message(level: i32, kind: i32, data: &[u8]) -> Vec<u8> {
        let len = CONTROL_HEADER_LEN + data.len();
        let mut bytes = len.to_ne_bytes().to_vec();
        bytes.extend(level.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(data);
        bytes.resize(len.next_multiple_of(CONTROL_ALIGN), 0);
        bytes
    }

    /// Makes no system call, so Miri runs this test (`cargo miri test net::`).
    #[test]
    fn what_the_kernel_writes_by_the_headers_is_cut_into_datagrams_wherever_the_batch_has_moved() {
        let from = SocketAddrV4::new([10, 0, 0, 1].into(), 4_000);
        let stamp = [3u64.to_ne_bytes(), 7u64.to_ne_bytes()].concat();
        let mut control = control_message(libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, &stamp);
        control.extend(control_message(
            libc::SOL_SOCKET,
            libc::SO_RXQ_OVFL,
            &9u32.to_ne_bytes(),
        ));
        control.extend(control_message(
            libc::SOL_UDP,
            libc::UDP_GRO,
            &100i32.to_ne_bytes(),
        ));
        let mut batch = ReceiveBatch::default();
        for round in 0..3u8 {
            batch.prepare();
            let burst = [round; 250];
            fill(&mut batch.headers[0], from, &burst, &control);
            fill(&mut batch.headers[1], from, &[round; 40], &[]);
            batch.datagrams.clear();
            assert_eq!(batch.take(2), 4);
            assert!(batch.is_drained());
            for (index, len) in [100, 100, 50, 40].into_iter().enumerate() {
                let (datagram, received) = batch.datagram(index).unwrap();
                assert_eq!(
                    (&*datagram, received.from),
                    (&vec![round; len][..], from.into())
                );
                let facts = (received.burst, received.drops, received.stamp_unix_nanos);
                if index < 3 {
                    assert_eq!(facts, (3, Some(9), Some(3_000_000_007)));
                } else {
                    assert_eq!(facts, (1, None, None));
                }
                datagram.fill(0xEE);
            }
            // The batch moves as a value: its boxes stay where they are, their owner does not.
            batch = std::hint::black_box(Box::new(batch)).take_out();
        }
    }

    trait TakeOut<T> {
        fn take_out(self) -> T;
    }

    impl<T> TakeOut<T> for Box<T> {
        fn take_out(self) -> T {
            *self
        }
    }

    #[test]
    fn broken_control_messages_end_the_list_and_no_more() {
        let whole = control_message(libc::SOL_SOCKET, libc::SO_RXQ_OVFL, &9u32.to_ne_bytes());
        for len in [
            0,
            1,
            CONTROL_HEADER_LEN - 1,
            CONTROL_HEADER_LEN,
            usize::MAX,
            usize::MAX - 6,
        ] {
            let mut broken = whole.clone();
            broken.extend(len.to_ne_bytes());
            broken.extend([0xFF; 8]);
            assert_eq!(read_control(&broken).drops, Some(9), "{len}");
        }
        assert_eq!(
            read_control(&whole[..whole.len() - 5]),
            ControlData::default()
        );
    }

    /// Makes no system call, so Miri runs this test, too.
    #[test]
    fn prepared_headers_show_what_waits_and_stop_before_what_cannot_be_segmented() {
        let to: SocketAddr = "10.0.0.1:4000".parse().unwrap();
        let mut batch = SendBatch::default();
        for (len, segment) in [(300, 300), (250, 100), (40, 40)] {
            batch.lend()[..len].fill(segment as u8);
            let (start, to) = (batch.used, to.into());
            let entry = WaitingSend {
                to,
                start,
                len,
                segment,
            };
            batch.waiting.push(entry);
            batch.used += len;
        }
        for (segmentation, first, count) in
            [(true, 0, 3), (false, 0, 1), (false, 1, 0), (true, 1, 2)]
        {
            batch.segmentation = segmentation;
            assert_eq!(batch.prepare(first), count);
            for index in 0..count {
                let header = &batch.headers[index].msg_hdr;
                let entry = &batch.waiting[first + index];
                // SAFETY: prepared headers point to the waiting entries.
                let (bytes, control) = unsafe {
                    let vector = &*header.msg_iov;
                    let control = match header.msg_controllen {
                        0 => &[][..],
                        len => std::slice::from_raw_parts(header.msg_control.cast::<u8>(), len),
                    };
                    let base = vector.iov_base.cast::<u8>();
                    (std::slice::from_raw_parts(base, vector.iov_len), control)
                };
                assert_eq!(bytes, vec![entry.segment as u8; entry.len]);
                let expected = if entry.len > entry.segment {
                    let segment = (entry.segment as u16).to_ne_bytes();
                    control_message(libc::SOL_UDP, libc::UDP_SEGMENT, &segment)
                } else {
                    Vec::new()
                };
                assert_eq!(control, expected);
            }
        }
    }

    #[test]
    fn one_segmented_send_arrives_as_several_stamped_datagrams() {
        let (a, b) = pair();
        let bytes: Vec<u8> = (0..2_500u16).map(|i| i as u8).collect();
        send_segmented(&a, Some(b.local_addr().unwrap()), &bytes, 1_000).unwrap();
        let mut batch = ReceiveBatch::default();
        assert_eq!(batch.receive(&b).unwrap(), 3);
        assert!(batch.is_drained());
        for (index, expected) in bytes.chunks(1_000).enumerate() {
            let (datagram, received) = batch.datagram(index).unwrap();
            assert_eq!(datagram, expected);
            assert_eq!(
                (received.from, received.burst),
                (a.local_addr().unwrap(), 3)
            );
            let age = unix_nanos().abs_diff(received.stamp_unix_nanos.expect("a stamp"));
            assert!(
                age < 5_000_000_000,
                "the stamp is on the wall clock: {age} ns"
            );
        }
        assert!(batch.datagram(3).is_none());
        assert_eq!(
            batch.receive(&b).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
    }

    #[test]
    fn a_batch_sends_plain_and_segmented_datagrams_in_order_and_more_than_it_holds() {
        for segmentation in [true, false] {
            let (a, b) = pair();
            let (to, from) = (b.local_addr().unwrap(), a.local_addr().unwrap());
            let mut batch = SendBatch {
                segmentation,
                ..SendBatch::default()
            };
            let mut received = Vec::new();
            let mut receiver = ReceiveBatch::default();
            let mut drain = |received: &mut Vec<Vec<u8>>| {
                while let Ok(count) = receiver.receive(&b) {
                    for index in 0..count {
                        let (datagram, facts) = receiver.datagram(index).unwrap();
                        assert_eq!(facts.from, from);
                        received.push(datagram.to_vec());
                    }
                }
            };
            let mut expected = Vec::new();
            for round in 0..200u8 {
                let (len, segment) = if round % 3 == 0 {
                    (2_500, 1_000)
                } else {
                    (300, 300)
                };
                let bytes: Vec<u8> = (0..len)
                    .map(|at| (at as u8).wrapping_mul(3) ^ round)
                    .collect();
                batch.lend()[..len].copy_from_slice(&bytes);
                batch.push(&a, to, len, segment);
                expected.extend(bytes.chunks(segment).map(<[u8]>::to_vec));
                drain(&mut received);
            }
            batch.flush(&a);
            drain(&mut received);
            assert_eq!(batch.take_errors(), 0);
            assert!(
                received == expected,
                "{} of {}",
                received.len(),
                expected.len()
            );
        }
    }

    #[test]
    fn a_socket_counts_what_it_drops() {
        let (a, b) = pair();
        rustix::net::sockopt::set_socket_recv_buffer_size(&b, 1).unwrap();
        for _ in 0..100 {
            send(&a, Some(b.local_addr().unwrap()), &[0; 1_000]).unwrap();
        }
        let (mut batch, mut taken, mut drops) = (ReceiveBatch::default(), 0, 0);
        while let Ok(count) = batch.receive(&b) {
            taken += count as u32;
            drops = batch
                .datagram(count - 1)
                .and_then(|(_, received)| received.drops)
                .unwrap_or(drops);
        }
        // The drop count comes with datagrams that arrive: one more datagram carries the final
        // count.
        send(&a, Some(b.local_addr().unwrap()), &[0]).unwrap();
        assert_eq!(batch.receive(&b).unwrap(), 1);
        let (_, last) = batch.datagram(0).unwrap();
        assert_eq!(taken + last.drops.unwrap_or(drops), 100);
        // Drops after the last datagram are reported without another datagram.
        for _ in 0..100 {
            send(&a, Some(b.local_addr().unwrap()), &[0; 1_000]).unwrap();
        }
        let known = socket_drops(&b).unwrap();
        let mut more = 0;
        while let Ok(count) = batch.receive(&b) {
            more += count as u32;
        }
        assert_eq!(known + taken + more, 200, "all but the one of a byte");
    }
}
