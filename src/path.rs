//! Paths: what carries a peer connection's datagrams.
//!
//! The server's candidates decide what a path consists of. [`Routes`] returns the address of this
//! host from which each candidate is reached. A [`Path`] holds what is opened for the candidates: a
//! UDP socket per family, TCP connections, allocations at relays. Each is a variant of `Carrier`; a
//! new kind is a new variant. Signalling opens them. The engine's worker uses the one that ICE has
//! nominated through the methods here, which are statically dispatched.

mod relay;
mod relay_stream;
mod stream;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, PoisonError};

use tokio::sync::mpsc;

use crate::measure::Session;
use crate::net::{self, ReceiveBatch};
use relay::RelayCarrier;
pub use relay::RelayLink;
pub use relay_stream::RelayStream;
pub use stream::{TcpCarrier, is_passing};

/// Maximum number of carriers beside the one in use. A server offers a few candidates.
const SPARE_MAX: usize = 8;

/// The address families of IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const fn of(ip: IpAddr) -> Family {
        match ip {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(_) => Family::V6,
        }
    }

    const fn any_address(self) -> IpAddr {
        match self {
            Family::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            Family::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        }
    }
}

/// Transport of ours by which the other end is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    Udp,
    /// The TCP connection with this address of ours.
    Tcp(SocketAddr),
    /// The relay that gave us this address.
    Relay(SocketAddr),
}

/// The other end of a candidate pair, and the transport of ours by which it is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FarEnd {
    pub via: Via,
    pub address: SocketAddr,
}

/// An address alone means UDP.
impl From<SocketAddr> for FarEnd {
    fn from(address: SocketAddr) -> FarEnd {
        FarEnd {
            via: Via::Udp,
            address,
        }
    }
}

/// Carriers of one peer's datagrams: the one in use and, until ICE has settled, others that might
/// be used.
///
/// UDP sockets are not bound to an address of this host: the kernel chooses the source by the route
/// to each candidate. So one socket serves all routes of its family. Connecting it to the nominated
/// candidate fixes the source.
pub struct Path {
    main: Carrier,
    spare: Vec<Carrier>,
}

enum Carrier {
    /// Nothing is open yet, or nothing is left open.
    None,
    Udp(MediaSocket),
    /// Boxed because its state is larger than that of a socket, which most paths have.
    Tcp(Box<TcpCarrier>),
    Relay(Box<RelayCarrier>),
}

/// A UDP socket and its known drops.
struct MediaSocket {
    socket: UdpSocket,
    family: Family,
    /// Where datagrams go, once ICE has nominated it.
    nominated: Option<SocketAddr>,
    /// Where the last datagram of DTLS, RTP or RTCP came from.
    heard_from: Option<SocketAddr>,
    is_connected: bool,
    /// Number of buffers that the kernel has dropped so far.
    drops: u32,
    /// Number of datagrams in the buffer that arrived last.
    burst: u32,
}

/// One of a path's carriers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    Main,
    /// One of the carriers that exist until the path is settled.
    Spare(usize),
}

impl Path {
    /// Makes a path with nothing open.
    pub fn closed() -> Path {
        Path {
            main: Carrier::None,
            spare: Vec::new(),
        }
    }

    /// Opens a UDP socket of this family on a free port.
    ///
    /// # Errors
    /// If this host does not have the family, or has no more ports, files or memory.
    pub fn open_udp(family: Family, receive_buffer_bytes: usize) -> io::Result<Path> {
        net::open_media_socket(family.any_address(), receive_buffer_bytes).map(Path::from)
    }

    /// Makes a path of an open TCP connection, and returns our address on it.
    ///
    /// # Errors
    /// If the connection is not open any more.
    pub fn of_stream(stream: TcpStream) -> io::Result<(Path, SocketAddr)> {
        let carrier = TcpCarrier::new(stream)?;
        let local = carrier.local();
        let path = Path {
            main: Carrier::Tcp(Box::new(carrier)),
            spare: Vec::new(),
        };
        Ok((path, local))
    }

    /// Makes a path of an allocation at a relay. The relay's messages about the allocation go to
    /// `control`.
    pub fn of_relay(link: RelayLink, relayed: SocketAddr, control: mpsc::Sender<Vec<u8>>) -> Path {
        Path {
            main: Carrier::Relay(Box::new(RelayCarrier::new(link, relayed, control))),
            spare: Vec::new(),
        }
    }

    /// Binds a channel of the relay: datagrams to and from `peer` use it.
    pub fn bind_channel(&mut self, relayed: SocketAddr, peer: SocketAddr, number: u16) {
        for carrier in std::iter::once(&mut self.main).chain(&mut self.spare) {
            match carrier {
                Carrier::Relay(relay) if relay.relayed() == relayed => relay.bind(peer, number),
                _ => {}
            }
        }
    }

    /// Sends a relay a message of the task that keeps the allocation.
    pub fn send_control(&mut self, relayed: SocketAddr, message: &[u8], unsent: &mut Unsent) {
        for carrier in std::iter::once(&mut self.main).chain(&mut self.spare) {
            match carrier {
                Carrier::Relay(relay) if relay.relayed() == relayed => {
                    relay.send_control(message, unsent);
                }
                _ => {}
            }
        }
    }

    /// Returns the local port of the main carrier.
    ///
    /// # Errors
    /// If the kernel does not report it, or nothing is open.
    pub fn port(&self) -> io::Result<u16> {
        match &self.main {
            Carrier::None => Err(io::ErrorKind::NotConnected.into()),
            Carrier::Udp(socket) => Ok(socket.socket.local_addr()?.port()),
            Carrier::Tcp(connection) => Ok(connection.local().port()),
            Carrier::Relay(relay) => Ok(relay.local_addr()?.port()),
        }
    }

    /// Takes over another path's carrier. A UDP socket of a family that already has one is closed.
    pub fn add(&mut self, other: Path) {
        let is_known = match &other.main {
            Carrier::None => true,
            Carrier::Udp(new) => self.carriers().any(|carrier| carrier.is_udp(new.family)),
            Carrier::Tcp(_) | Carrier::Relay(_) => false,
        };
        if is_known || self.spare.len() == SPARE_MAX {
            return;
        }
        if matches!(self.main, Carrier::None) {
            self.main = other.main;
        } else {
            self.spare.push(other.main);
        }
    }

    /// Returns the descriptors to poll for datagrams.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        self.carriers().filter_map(Carrier::descriptor)
    }

    /// Whether to be told also when a descriptor can take more.
    pub fn is_stream(&self) -> bool {
        match &self.main {
            Carrier::Tcp(_) => true,
            Carrier::Relay(relay) => relay.is_stream(),
            Carrier::None | Carrier::Udp(_) => false,
        }
    }

    /// Returns the number of carriers beside the main one.
    #[inline]
    pub fn spare_count(&self) -> usize {
        self.spare.len()
    }

    /// Receives what a carrier holds, as [`ReceiveBatch::receive`]. Returns `WouldBlock` if there
    /// is no such carrier.
    ///
    /// # Errors
    /// As [`ReceiveBatch::receive`]. After any error but `WouldBlock`, [`Path::remove_ended`] tells
    /// whether the carrier is gone.
    #[inline]
    pub fn receive(&mut self, lane: Lane, batch: &mut ReceiveBatch) -> io::Result<usize> {
        match self.carrier_mut(lane) {
            Some(Carrier::Udp(socket)) => batch.receive(&socket.socket),
            Some(Carrier::Tcp(connection)) => connection.receive(batch),
            Some(Carrier::Relay(relay)) => relay.receive(batch),
            Some(Carrier::None) | None => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    /// Returns the transport by which a datagram of this lane arrived.
    pub fn via(&self, lane: Lane) -> Via {
        let carrier = match lane {
            Lane::Main => Some(&self.main),
            Lane::Spare(index) => self.spare.get(index),
        };
        carrier.map_or(Via::Udp, Carrier::via)
    }

    /// Closes a carrier that has ended, and returns which one it was. A UDP socket does not end.
    pub fn remove_ended(&mut self, lane: Lane) -> Option<Via> {
        let carrier = self.carrier_mut(lane)?;
        let is_over = match carrier {
            Carrier::Tcp(connection) => connection.is_over(),
            Carrier::Relay(relay) => relay.is_over(),
            Carrier::None | Carrier::Udp(_) => false,
        };
        if !is_over {
            return None;
        }
        let via = carrier.via();
        match lane {
            Lane::Main => self.main = self.spare.pop().unwrap_or(Carrier::None),
            Lane::Spare(index) => drop(self.spare.remove(index)),
        }
        Some(via)
    }

    /// Whether nothing is left that could carry a datagram.
    pub fn is_closed(&self) -> bool {
        matches!(self.main, Carrier::None) && self.spare.is_empty()
    }

    /// Returns the number of datagrams that a socket has dropped since its last report. It reports
    /// `drops` buffers in all. Each counts as many datagrams as the buffer that carries the report,
    /// which held `burst`.
    #[inline]
    pub fn dropped_datagrams(&mut self, lane: Lane, drops: u32, burst: u32) -> u64 {
        match self.carrier_mut(lane) {
            Some(Carrier::Udp(socket)) => socket.dropped_datagrams(drops, burst),
            Some(Carrier::Relay(relay)) => relay.dropped_datagrams(drops),
            _ => 0,
        }
    }

    /// Returns the drops that no datagram has reported, because none arrived after them. If the
    /// kernel does not report them, the result is zero.
    pub fn untold_drops(&self) -> u64 {
        self.carriers().map(Carrier::untold_drops).sum()
    }

    /// Sends `bytes` as datagrams of `segment` bytes (the last may be shorter) over the nominated
    /// carrier to `to`. `segmentation` is cleared at the first path that does not support it.
    #[inline]
    pub fn send(
        &mut self,
        to: SocketAddr,
        bytes: &[u8],
        segment: usize,
        segmentation: &mut bool,
        unsent: &mut Unsent,
    ) {
        self.main.send(to, bytes, segment, segmentation, unsent);
    }

    /// Sends one set-up datagram of the connection to any of its candidates.
    pub fn send_setup(&mut self, to: FarEnd, datagram: &[u8], unsent: &mut Unsent) {
        let address = to.address;
        let chosen = match to.via {
            Via::Udp => {
                let family = Family::of(address.ip());
                let is_fit = |carrier: &Carrier| carrier.is_udp(family);
                // Without a socket of this family, take any UDP socket: the kernel then reports the
                // error.
                self.carriers()
                    .position(is_fit)
                    .or_else(|| self.carriers().position(|carrier| carrier.via() == to.via))
            }
            Via::Relay(_) => self.carriers().position(|carrier| carrier.via() == to.via),
            // One connection's local end and another connection's remote end do not form a pair.
            Via::Tcp(_) => self.carriers().position(
                |carrier| matches!(carrier, Carrier::Tcp(tcp) if tcp.remote() == address && carrier.via() == to.via),
            ),
        };
        let lane = match chosen {
            None => return,
            Some(0) => Lane::Main,
            Some(index) => Lane::Spare(index - 1),
        };
        if let Some(carrier) = self.carrier_mut(lane) {
            carrier.send(address, datagram, datagram.len(), &mut false, unsent);
        }
    }

    /// Sends datagrams to `to` from now on, because ICE has nominated it. Until the path is settled
    /// they may come from anywhere: the other side changes to another pair some time after us, or
    /// not at all.
    pub fn nominate(&mut self, to: FarEnd) {
        let is_nominated = |carrier: &Carrier| match to.via {
            Via::Udp => carrier.is_udp(Family::of(to.address.ip())),
            Via::Tcp(_) | Via::Relay(_) => carrier.via() == to.via,
        };
        if !is_nominated(&self.main) {
            // If the nominated carrier is gone, media stays on the present one.
            let Some(other) = self.spare.iter_mut().find(|carrier| is_nominated(carrier)) else {
                return;
            };
            if let Carrier::Udp(socket) = &mut self.main {
                socket.disconnect();
            }
            std::mem::swap(&mut self.main, other);
        }
        if let Carrier::Udp(socket) = &mut self.main {
            socket.nominate(to.address);
        }
    }

    /// Whether [`Path::note_source`] is to be told where datagrams come from.
    #[inline]
    pub fn wants_sources(&self) -> bool {
        matches!(&self.main, Carrier::Udp(socket) if !socket.is_connected)
    }

    /// Notes where the other side sends from. Its checks do not count, because they come from all
    /// of its addresses.
    #[cold]
    pub fn note_source(&mut self, lane: Lane, from: SocketAddr) {
        if let (Lane::Main, Carrier::Udp(socket)) = (lane, &mut self.main) {
            socket.heard_from = Some(from);
        }
    }

    /// Connects the socket to the nominated address, if the other side sends from there, and closes
    /// the carriers that are not used. Returns the number of datagrams that they had dropped and
    /// not reported. Otherwise everything stays as it is.
    pub fn settle(&mut self) -> u64 {
        let is_settled = match &mut self.main {
            Carrier::None => false,
            Carrier::Udp(socket) => socket.settle(),
            Carrier::Tcp(_) | Carrier::Relay(_) => true,
        };
        if !is_settled {
            return 0;
        }
        let closed = std::mem::take(&mut self.spare);
        closed.iter().map(Carrier::untold_drops).sum()
    }

    /// Accepts datagrams from every address again, on the same port.
    pub fn disconnect(&mut self) {
        if let Carrier::Udp(socket) = &mut self.main {
            socket.disconnect();
        }
    }

    fn carriers(&self) -> impl Iterator<Item = &Carrier> {
        std::iter::once(&self.main).chain(&self.spare)
    }

    #[inline]
    fn carrier_mut(&mut self, lane: Lane) -> Option<&mut Carrier> {
        match lane {
            Lane::Main => Some(&mut self.main),
            Lane::Spare(index) => self.spare.get_mut(index),
        }
    }
}

impl From<UdpSocket> for Path {
    /// Makes a path of a socket that [`net::open_media_socket`] opened, on any address.
    fn from(socket: UdpSocket) -> Path {
        let is_v6 = socket.local_addr().is_ok_and(|address| address.is_ipv6());
        Path {
            main: Carrier::Udp(MediaSocket {
                socket,
                family: if is_v6 { Family::V6 } else { Family::V4 },
                nominated: None,
                heard_from: None,
                is_connected: false,
                drops: 0,
                burst: 1,
            }),
            spare: Vec::new(),
        }
    }
}

impl Carrier {
    #[inline]
    fn send(
        &mut self,
        to: SocketAddr,
        bytes: &[u8],
        segment: usize,
        segmentation: &mut bool,
        unsent: &mut Unsent,
    ) {
        match self {
            Carrier::Udp(socket) => socket.send(to, bytes, segment, segmentation, unsent),
            Carrier::Tcp(connection) => connection.send(bytes, segment, unsent),
            Carrier::Relay(relay) => relay.send(to, bytes, segment, unsent),
            // The end of the carrier has been reported.
            Carrier::None => {}
        }
    }

    fn is_udp(&self, family: Family) -> bool {
        matches!(self, Carrier::Udp(socket) if socket.family == family)
    }

    fn via(&self) -> Via {
        match self {
            Carrier::None | Carrier::Udp(_) => Via::Udp,
            Carrier::Tcp(connection) => Via::Tcp(connection.local()),
            Carrier::Relay(relay) => Via::Relay(relay.relayed()),
        }
    }

    fn descriptor(&self) -> Option<RawFd> {
        match self {
            Carrier::None => None,
            Carrier::Udp(socket) => Some(socket.socket.as_raw_fd()),
            Carrier::Tcp(connection) => Some(connection.stream().as_raw_fd()),
            Carrier::Relay(relay) => Some(relay.descriptor()),
        }
    }

    fn untold_drops(&self) -> u64 {
        match self {
            Carrier::Udp(socket) => socket.untold_drops(),
            Carrier::Relay(relay) => relay.untold_drops(),
            Carrier::None | Carrier::Tcp(_) => 0,
        }
    }
}

impl MediaSocket {
    #[inline]
    fn send(
        &self,
        to: SocketAddr,
        bytes: &[u8],
        segment: usize,
        segmentation: &mut bool,
        unsent: &mut Unsent,
    ) {
        let to = Some(to).filter(|_| !self.is_connected);
        if bytes.len() > segment && *segmentation {
            match net::send_segmented(&self.socket, to, bytes, segment) {
                Ok(()) => return,
                Err(error) if net::is_without_segmentation(&error) => *segmentation = false,
                Err(error) => return unsent.count(&error, bytes.len().div_ceil(segment) as u64),
            }
        }
        for datagram in bytes.chunks(segment.max(1)) {
            if let Err(error) = net::send(&self.socket, to, datagram) {
                unsent.count(&error, 1);
            }
        }
    }

    /// Returns the number of datagrams dropped since the last report. The kernel counts buffers,
    /// and it is not known how many datagrams the dropped ones held. They are assumed to be like
    /// the buffer that carries the report.
    fn dropped_datagrams(&mut self, drops: u32, burst: u32) -> u64 {
        self.burst = burst;
        let more = drops.wrapping_sub(std::mem::replace(&mut self.drops, drops));
        u64::from(more) * u64::from(burst)
    }

    fn untold_drops(&self) -> u64 {
        net::socket_drops(&self.socket).map_or(0, |drops| {
            u64::from(drops.wrapping_sub(self.drops)) * u64::from(self.burst)
        })
    }

    fn nominate(&mut self, to: SocketAddr) {
        self.nominated = Some(to);
        if self.is_connected {
            self.is_connected = self.socket.connect(to).is_ok();
        }
    }

    /// Returns whether the socket is connected, after an attempt if it can be made.
    fn settle(&mut self) -> bool {
        if !self.is_connected
            && let Some(to) = self.nominated.filter(|to| self.heard_from == Some(*to))
        {
            self.is_connected = self.socket.connect(to).is_ok();
        }
        self.is_connected
    }

    /// Disconnects the socket. The kernel releases the port together with the connection, unless
    /// the port was bound explicitly. So the port is bound again, because the other side sends
    /// there.
    fn disconnect(&mut self) {
        (self.nominated, self.heard_from) = (None, None);
        let Ok(local) = self.socket.local_addr() else {
            return;
        };
        if !self.is_connected || rustix::net::connect_unspec(&self.socket).is_err() {
            return;
        }
        let any = SocketAddr::new(self.family.any_address(), local.port());
        // If another process took the port in between, the next send gets a new one, and the other
        // side learns it from our checks.
        let _ = rustix::net::bind(&self.socket, &any);
        self.is_connected = false;
    }
}

/// Numbers of datagrams that the kernel did not send, by cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unsent {
    /// This host had no buffer space for them: the generator's fault.
    pub no_room: u64,
    /// Nothing listens at the other end, as reported by a failed send or by an answer to a sent
    /// datagram.
    pub refused: u64,
    /// There is no route, or a host on the route cannot be reached.
    pub unreachable: u64,
    /// A firewall of this host blocks them.
    pub blocked: u64,
    /// They are longer than the route can carry.
    pub too_long: u64,
    /// The route does not lead from our address to the other end's. Any other error counts here
    /// too.
    pub mismatched: u64,
    /// A TCP connection took them too slowly, so that too much was waiting already: the fault of
    /// the network or the server.
    pub backlogged: u64,
}

impl Unsent {
    #[cold]
    pub fn count(&mut self, error: &io::Error, datagrams: u64) {
        let counter = match error.raw_os_error() {
            Some(libc::ENOBUFS | libc::EAGAIN | libc::ENOMEM | libc::EINTR) => &mut self.no_room,
            Some(libc::ECONNREFUSED) => &mut self.refused,
            Some(
                libc::ENETUNREACH
                | libc::EHOSTUNREACH
                | libc::ENETDOWN
                | libc::EHOSTDOWN
                | libc::EADDRNOTAVAIL,
            ) => &mut self.unreachable,
            Some(libc::EPERM | libc::EACCES) => &mut self.blocked,
            Some(libc::EMSGSIZE) => &mut self.too_long,
            _ => &mut self.mismatched,
        };
        *counter += datagrams;
    }
}

/// Describes why datagrams of a run were not sent; `None` if all were sent. Datagrams that this
/// host had no buffer space for are left out, because they make a run INVALID.
pub fn unsent_note(session: &Session) -> Option<String> {
    let kinds = [
        (
            session.sends_refused,
            "nothing listens any more where media was sent, at the server or its relay (ECONNREFUSED)",
        ),
        (
            session.sends_unreachable,
            "no route to the server's media address, or a host on it cannot be reached \
             (ENETUNREACH, EHOSTUNREACH)",
        ),
        (
            session.sends_blocked,
            "a firewall of this host does not let them out (EPERM)",
        ),
        (
            session.sends_too_long,
            "longer than the route to the server carries (EMSGSIZE): its MTU is small",
        ),
        (
            session.sends_mismatched,
            "the route to the server's media address does not fit our own address (EINVAL)",
        ),
        (
            session.sends_backlogged,
            "the TCP connection to the server took them too slowly, and too much waited already",
        ),
    ];
    let told: Vec<String> = kinds
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, why)| format!("{count}: {why}"))
        .collect();
    if told.is_empty() {
        return None;
    }
    Some(format!(
        "datagrams that the network or the server did not take: {}",
        told.join("; ")
    ))
}

/// Addresses of this host from which the server's candidates are reached. There is one for a run:
/// the kernel is asked once for each address.
#[derive(Default)]
pub struct Routes(Mutex<KnownRoutes>);

#[derive(Default)]
struct KnownRoutes {
    sources: HashMap<IpAddr, IpAddr>,
    /// Our address towards the last offered candidates.
    usual: Option<IpAddr>,
}

/// Maximum number of known routes. A cluster has some dozens of addresses. Addresses that a server
/// invents beyond this limit are looked up each time.
const ROUTES_MAX: usize = 1_024;

impl Routes {
    /// Returns our address on the route to `remote`.
    ///
    /// # Errors
    /// If the kernel has no route.
    pub fn source(&self, remote: SocketAddr) -> io::Result<IpAddr> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(source) = known.sources.get(&remote.ip()) {
            return Ok(*source);
        }
        let source = source_towards(remote)?;
        if known.sources.len() < ROUTES_MAX {
            known.sources.insert(remote.ip(), source);
        }
        Ok(source)
    }

    /// Returns the address to offer before the server has offered anything: our address towards its
    /// media, if it is known already, else the one towards its signalling.
    pub fn usual(&self, signalling: IpAddr) -> IpAddr {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.usual.unwrap_or(signalling)
    }

    pub fn set_usual(&self, source: IpAddr) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.usual = Some(source);
    }
}

/// Returns our address on the route to `remote`. Connecting a UDP socket sends nothing; the kernel
/// only looks up the route.
fn source_towards(remote: SocketAddr) -> io::Result<IpAddr> {
    let socket = UdpSocket::bind((Family::of(remote.ip()).any_address(), 0))?;
    socket.connect(remote)?;
    Ok(socket.local_addr()?.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUFFER: usize = 1 << 20;

    fn listener(address: &str) -> (UdpSocket, SocketAddr) {
        let socket = UdpSocket::bind(address).unwrap();
        let address = socket.local_addr().unwrap();
        socket
            .set_read_timeout(Some(std::time::Duration::from_secs(2)))
            .unwrap();
        (socket, address)
    }

    fn send(path: &mut Path, to: SocketAddr) -> Unsent {
        let mut unsent = Unsent::default();
        path.send(to, b"hello", 5, &mut true, &mut unsent);
        unsent
    }

    fn check(path: &mut Path, to: impl Into<FarEnd>) -> Unsent {
        let mut unsent = Unsent::default();
        path.send_setup(to.into(), b"hello", &mut unsent);
        unsent
    }

    fn heard(socket: &UdpSocket) -> SocketAddr {
        socket.recv_from(&mut [0; 16]).expect("a datagram").1
    }

    #[test]
    fn one_socket_serves_all_routes_of_its_family_and_the_nominated_one_alone_afterwards() {
        let (one, one_at) = listener("127.0.0.1:0");
        let (two, two_at) = listener("127.0.0.2:0");
        let mut path = Path::open_udp(Family::V4, BUFFER).unwrap();
        let port = path.port().unwrap();
        for (socket, at) in [(&one, one_at), (&two, two_at)] {
            assert_eq!(check(&mut path, at), Unsent::default());
            assert_eq!(heard(socket).port(), port);
        }
        path.nominate(two_at.into());
        // The other side still sends from its first address: nothing of that is refused.
        path.note_source(Lane::Main, one_at);
        path.settle();
        assert!(path.wants_sources());
        one.send_to(b"hello", ("127.0.0.1", port)).unwrap();
        let mut batch = ReceiveBatch::default();
        let came = (0..100).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(1));
            path.receive(Lane::Main, &mut batch)
                .is_ok_and(|count| count == 1)
        });
        assert!(came);
        path.note_source(Lane::Main, two_at);
        path.settle();
        assert!(!path.wants_sources());
        assert_eq!(send(&mut path, one_at), Unsent::default());
        assert_eq!(
            heard(&two).port(),
            port,
            "connected: there and nowhere else"
        );
        path.disconnect();
        assert_eq!(send(&mut path, one_at), Unsent::default());
        assert_eq!(heard(&one).port(), port, "the port outlives the connection");
    }

    #[test]
    fn a_path_of_both_families_keeps_the_socket_that_is_nominated() {
        let ((four, four_at), (six, six_at)) = (listener("127.0.0.1:0"), listener("[::1]:0"));
        let mut path = Path::open_udp(Family::V6, BUFFER).unwrap();
        path.add(Path::open_udp(Family::V4, BUFFER).unwrap());
        assert_eq!(path.descriptors().count(), 2);
        for (socket, at) in [(&four, four_at), (&six, six_at)] {
            assert_eq!(check(&mut path, at), Unsent::default());
            heard(socket);
        }
        path.nominate(four_at.into());
        // A check of the other family's pair still arrives.
        check(&mut path, six_at);
        heard(&six);
        assert_eq!(path.settle(), 0);
        assert_eq!(path.descriptors().count(), 2, "nothing has come");
        path.note_source(Lane::Main, four_at);
        assert_eq!(path.settle(), 0);
        assert_eq!(path.descriptors().count(), 1);
        send(&mut path, four_at);
        heard(&four);
        // A later nomination without a socket changes nothing.
        path.nominate(six_at.into());
        send(&mut path, four_at);
        heard(&four);
    }

    /// Returns our end of a TCP connection as a path, its address, and the other end.
    fn tcp_path() -> (Path, FarEnd, TcpStream) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (path, local) = Path::of_stream(TcpStream::connect(address).unwrap()).unwrap();
        let far_end = FarEnd {
            via: Via::Tcp(local),
            address,
        };
        (path, far_end, listener.accept().unwrap().0)
    }

    fn heard_framed(stream: &mut TcpStream) {
        let mut bytes = [0; 7];
        std::io::Read::read_exact(stream, &mut bytes).expect("a frame");
        assert_eq!(bytes, *b"\0\x05hello");
    }

    #[test]
    fn udp_and_tcp_are_tried_side_by_side_and_the_nominated_one_stays() {
        // UDP and TCP may have the same port number.
        let (udp, udp_at) = listener("127.0.0.1:0");
        let (tcp, by_tcp, mut theirs) = tcp_path();
        let mut path = Path::open_udp(Family::V4, BUFFER).unwrap();
        path.add(tcp);
        assert_eq!((path.spare_count(), path.descriptors().count()), (1, 2));
        check(&mut path, udp_at);
        heard(&udp);
        check(&mut path, by_tcp);
        heard_framed(&mut theirs);
        let elsewhere = FarEnd {
            address: udp_at,
            ..by_tcp
        };
        check(&mut path, elsewhere);
        path.nominate(by_tcp);
        assert_eq!(path.via(Lane::Main), by_tcp.via);
        // A check of the other pair still arrives.
        check(&mut path, udp_at);
        heard(&udp);
        path.settle();
        assert_eq!((path.spare_count(), path.descriptors().count()), (0, 1));
        send(&mut path, udp_at);
        heard_framed(&mut theirs);
        assert!(!path.is_closed());
    }

    #[test]
    fn a_carrier_that_ends_leaves_the_others() {
        let (udp, udp_at) = listener("127.0.0.1:0");
        let (mut path, by_tcp, theirs) = tcp_path();
        path.add(Path::open_udp(Family::V4, BUFFER).unwrap());
        let mut batch = ReceiveBatch::default();
        let error = path.receive(Lane::Main, &mut batch).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert_eq!(path.remove_ended(Lane::Main), None);
        drop(theirs);
        while path
            .receive(Lane::Main, &mut batch)
            .is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
        {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert_eq!(path.remove_ended(Lane::Main), Some(by_tcp.via));
        assert!(!path.is_closed());
        check(&mut path, udp_at);
        heard(&udp);
        assert!(Path::closed().is_closed());
    }

    #[test]
    fn what_is_not_sent_is_counted_by_whose_fault_it_is() {
        let mut unsent = Unsent::default();
        for (errno, count) in [
            (libc::ENOBUFS, 1),
            (libc::EAGAIN, 1),
            (libc::ECONNREFUSED, 3),
            (libc::EHOSTUNREACH, 4),
            (libc::ENETUNREACH, 1),
            (libc::EPERM, 6),
            (libc::EMSGSIZE, 7),
            (libc::EINVAL, 8),
        ] {
            unsent.count(&io::Error::from_raw_os_error(errno), count);
        }
        let expected = Unsent {
            no_room: 2,
            refused: 3,
            unreachable: 5,
            blocked: 6,
            too_long: 7,
            mismatched: 8,
            backlogged: 0,
        };
        assert_eq!(unsent, expected);
    }

    #[test]
    fn the_kernel_says_that_nobody_listens_and_that_a_family_has_no_socket() {
        let (gone, at) = listener("127.0.0.1:0");
        let mut path = Path::open_udp(Family::V4, BUFFER).unwrap();
        path.nominate(at.into());
        path.note_source(Lane::Main, at);
        path.settle();
        drop(gone);
        let unsent = send(&mut path, at);
        assert_eq!(unsent, Unsent::default(), "the first one leaves");
        let mut refused = 0;
        for _ in 0..20 {
            let unsent = send(&mut path, at);
            refused += unsent.refused;
            assert_eq!(unsent.no_room + unsent.mismatched, 0);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(refused > 0);
        let mut path = Path::open_udp(Family::V4, BUFFER).unwrap();
        let unsent = send(&mut path, "[::1]:9".parse().unwrap());
        assert_eq!(unsent.no_room, 0);
        assert_ne!(unsent, Unsent::default());
    }

    #[test]
    fn routes_are_asked_for_once_and_say_where_there_is_none() {
        let routes = Routes::default();
        let loopback = |text: &str| text.parse::<IpAddr>().unwrap();
        for (remote, source) in [("127.0.0.1:9", "127.0.0.1"), ("[::1]:9", "::1")] {
            assert_eq!(
                routes.source(remote.parse().unwrap()).unwrap(),
                loopback(source)
            );
        }
        assert_eq!(routes.usual(loopback("::1")), loopback("::1"));
        routes.set_usual(loopback("127.0.0.1"));
        assert_eq!(routes.usual(loopback("::1")), loopback("127.0.0.1"));
    }
}
