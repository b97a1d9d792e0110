//! What carries a peer connection's datagrams.
//!
//! A path is chosen by the candidates that the server offers: [`Routes`] says from which address
//! of this host each of them is reached, and [`Path`] is what is opened for them. UDP is the only
//! kind so far. Another kind is another variant of [`Path`]; signalling opens it, and the engine's
//! worker uses it through the methods here, statically dispatched.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, PoisonError};

use crate::measure::Session;
use crate::net::{self, ReceiveBatch};

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

/// What carries one peer's datagrams.
pub enum Path {
    Udp(UdpPath),
}

/// One UDP socket, and until ICE has settled a second one where the candidates are of both
/// families.
///
/// The sockets are bound to no address of this host: the kernel chooses the source by the route
/// to each candidate. So one socket serves all routes of its family. Connecting it to the
/// nominated candidate fixes the source.
pub struct UdpPath {
    main: MediaSocket,
    other: Option<MediaSocket>,
    is_connected: bool,
}

/// A socket, and how many datagrams it is known to have dropped.
struct MediaSocket {
    socket: UdpSocket,
    family: Family,
    /// Buffers that the kernel has dropped so far.
    drops: u32,
    /// Datagrams in the buffer that came last.
    burst: u32,
}

/// Which socket of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    Main,
    /// The one of the other family, until the path is settled.
    Other,
}

impl Path {
    /// Opens a UDP socket of this family on a free port.
    ///
    /// # Errors
    /// Where this host has no such family, or no more ports, files or memory.
    pub fn open_udp(family: Family, receive_buffer_bytes: usize) -> io::Result<Path> {
        net::open_media_socket(family.any_address(), receive_buffer_bytes).map(Path::from)
    }

    /// The port of the socket that datagrams leave by first.
    ///
    /// # Errors
    /// Where the kernel does not say.
    pub fn port(&self) -> io::Result<u16> {
        let Path::Udp(path) = self;
        Ok(path.main.socket.local_addr()?.port())
    }

    /// Takes over another path's socket, for candidates of its family. One of a family that is
    /// there already is closed.
    pub fn add(&mut self, other: Path) {
        let (Path::Udp(path), Path::Udp(other)) = (self, other);
        if path.main.family != other.main.family {
            path.other.get_or_insert(other.main);
        }
    }

    /// What to look at for datagrams.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        let Path::Udp(path) = self;
        path.sockets().map(|socket| socket.socket.as_raw_fd())
    }

    /// Whether there is a second socket.
    pub fn has_other(&self) -> bool {
        let Path::Udp(path) = self;
        path.other.is_some()
    }

    /// Takes what a socket holds, as [`ReceiveBatch::receive`]. `WouldBlock` where there is no such
    /// one.
    ///
    /// # Errors
    /// As [`ReceiveBatch::receive`].
    #[inline]
    pub fn receive(&self, lane: Lane, batch: &mut ReceiveBatch) -> io::Result<usize> {
        let Path::Udp(path) = self;
        match (lane, &path.other) {
            (Lane::Main, _) => batch.receive(&path.main.socket),
            (Lane::Other, Some(other)) => batch.receive(&other.socket),
            (Lane::Other, None) => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    /// Datagrams that a socket says it dropped since it said so last: `drops` buffers in all, each
    /// as full as the one that tells of it, which held `burst` datagrams.
    #[inline]
    pub fn dropped_datagrams(&mut self, lane: Lane, drops: u32, burst: u32) -> u64 {
        let Path::Udp(path) = self;
        let socket = match lane {
            Lane::Main => Some(&mut path.main),
            Lane::Other => path.other.as_mut(),
        };
        socket.map_or(0, |socket| socket.dropped_datagrams(drops, burst))
    }

    /// Drops that no datagram has told of, because none came after them. Where the kernel does not
    /// say, there are none that we know of.
    pub fn untold_drops(&self) -> u64 {
        let Path::Udp(path) = self;
        path.sockets().map(MediaSocket::untold_drops).sum()
    }

    /// Sends `bytes` as datagrams of `segment` bytes (the last may be shorter). `segmentation` is
    /// cleared at the first path that cannot segment.
    #[inline]
    pub fn send(
        &self,
        to: SocketAddr,
        bytes: &[u8],
        segment: usize,
        segmentation: &mut bool,
        unsent: &mut Unsent,
    ) {
        let Path::Udp(path) = self;
        path.send(to, bytes, segment, segmentation, unsent);
    }

    /// ICE has nominated `to`: from now on datagrams go there only, and come from there only.
    pub fn connect(&mut self, to: SocketAddr) {
        let Path::Udp(path) = self;
        path.connect(to);
    }

    /// The peer is up: a socket that it does not use is closed. Returns the datagrams that this one
    /// had dropped and not told of.
    pub fn settle(&mut self) -> u64 {
        let Path::Udp(path) = self;
        let closed = path.other.take_if(|_| path.is_connected);
        closed.map_or(0, |socket| socket.untold_drops())
    }

    /// Datagrams may come from everywhere again, on the same port.
    pub fn disconnect(&mut self) {
        let Path::Udp(path) = self;
        path.disconnect();
    }
}

impl From<UdpSocket> for Path {
    /// A socket that [`net::open_media_socket`] opened, on any address.
    fn from(socket: UdpSocket) -> Path {
        let is_v6 = socket.local_addr().is_ok_and(|address| address.is_ipv6());
        Path::Udp(UdpPath {
            main: MediaSocket {
                socket,
                family: if is_v6 { Family::V6 } else { Family::V4 },
                drops: 0,
                burst: 1,
            },
            other: None,
            is_connected: false,
        })
    }
}

impl UdpPath {
    fn sockets(&self) -> impl Iterator<Item = &MediaSocket> {
        std::iter::once(&self.main).chain(&self.other)
    }

    fn send(
        &self,
        to: SocketAddr,
        bytes: &[u8],
        segment: usize,
        segmentation: &mut bool,
        unsent: &mut Unsent,
    ) {
        let (socket, to) = match &self.other {
            None if self.is_connected => (&self.main.socket, None),
            Some(other) if other.family == Family::of(to.ip()) => (&other.socket, Some(to)),
            Some(_) if self.is_connected => (&self.main.socket, None),
            _ => (&self.main.socket, Some(to)),
        };
        if bytes.len() > segment && *segmentation {
            match net::send_segmented(socket, to, bytes, segment) {
                Ok(()) => return,
                Err(error) if net::is_without_segmentation(&error) => *segmentation = false,
                Err(error) => return unsent.count(&error, bytes.len().div_ceil(segment) as u64),
            }
        }
        for datagram in bytes.chunks(segment.max(1)) {
            if let Err(error) = net::send(socket, to, datagram) {
                unsent.count(&error, 1);
            }
        }
    }

    fn connect(&mut self, to: SocketAddr) {
        let family = Family::of(to.ip());
        if self.main.family != family {
            // Not there any more: what flows goes on where it is.
            let Some(other) = self.other.as_mut().filter(|other| other.family == family) else {
                return;
            };
            if self.is_connected {
                self.main.disconnect();
            }
            std::mem::swap(&mut self.main, other);
        }
        self.is_connected = self.main.socket.connect(to).is_ok();
    }

    fn disconnect(&mut self) {
        if self.is_connected {
            self.is_connected = !self.main.disconnect();
        }
    }
}

impl MediaSocket {
    /// The kernel counts buffers. How many datagrams those held that it dropped, nobody knows: they
    /// are taken to have been like the one that tells of it.
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

    /// The kernel takes the port away with the connection, unless somebody asked for that very
    /// port: it is asked for again, because the other side sends there.
    fn disconnect(&self) -> bool {
        let Ok(local) = self.socket.local_addr() else {
            return false;
        };
        if rustix::net::connect_unspec(&self.socket).is_err() {
            return false;
        }
        let any = SocketAddr::new(self.family.any_address(), local.port());
        // Where somebody else has got the port in between, the next send draws another one, and
        // the other side learns it from our checks.
        let _ = rustix::net::bind(&self.socket, &any);
        true
    }
}

/// Datagrams that the kernel did not send, by why.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unsent {
    /// This host had no room for them: the generator's fault.
    pub no_room: u64,
    /// Nothing listens at the other end: told by a send that failed, or by an answer to one that
    /// left.
    pub refused: u64,
    /// There is no route, or a host on it cannot be reached.
    pub unreachable: u64,
    /// A firewall of this host does not let them out.
    pub blocked: u64,
    /// Longer than the route carries.
    pub too_long: u64,
    /// The route does not go from our address to the other end's, or anything else.
    pub mismatched: u64,
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

/// What a run's datagrams met that were not sent, in words; `None` where all were sent. Those that
/// this host had no room for are left out: they make a run INVALID.
pub fn unsent_note(session: &Session) -> Option<String> {
    let kinds = [
        (
            session.sends_refused,
            "nothing listens any more where the server's media was (ECONNREFUSED)",
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

/// From which address of this host the server's candidates are reached. One for a run: the kernel
/// is asked once for each address.
#[derive(Default)]
pub struct Routes(Mutex<KnownRoutes>);

#[derive(Default)]
struct KnownRoutes {
    sources: HashMap<IpAddr, IpAddr>,
    /// Our address towards the candidates that were offered last.
    usual: Option<IpAddr>,
}

/// A cluster has some dozens of addresses. What a server invents beyond that is looked up anew.
const ROUTES_MAX: usize = 1_024;

impl Routes {
    /// Our address on the route to `remote`.
    ///
    /// # Errors
    /// The kernel has no route.
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

    /// What to offer before the server has offered anything: our address towards its media, as far
    /// as somebody has learnt it; else the one towards its signalling.
    pub fn usual(&self, signalling: IpAddr) -> IpAddr {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.usual.unwrap_or(signalling)
    }

    pub fn set_usual(&self, source: IpAddr) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.usual = Some(source);
    }
}

/// Connecting a UDP socket sends nothing: the kernel looks the route up.
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

    fn send(path: &Path, to: SocketAddr) -> Unsent {
        let mut unsent = Unsent::default();
        path.send(to, b"hello", 5, &mut true, &mut unsent);
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
            assert_eq!(send(&path, at), Unsent::default());
            assert_eq!(heard(socket).port(), port);
        }
        path.connect(two_at);
        assert_eq!(send(&path, one_at), Unsent::default());
        assert_eq!(
            heard(&two).port(),
            port,
            "connected: there and nowhere else"
        );
        path.disconnect();
        assert_eq!(send(&path, one_at), Unsent::default());
        assert_eq!(heard(&one).port(), port, "the port outlives the connection");
    }

    #[test]
    fn a_path_of_both_families_keeps_the_socket_that_is_nominated() {
        let ((four, four_at), (six, six_at)) = (listener("127.0.0.1:0"), listener("[::1]:0"));
        let mut path = Path::open_udp(Family::V6, BUFFER).unwrap();
        path.add(Path::open_udp(Family::V4, BUFFER).unwrap());
        assert_eq!(path.descriptors().count(), 2);
        for (socket, at) in [(&four, four_at), (&six, six_at)] {
            assert_eq!(send(&path, at), Unsent::default());
            heard(socket);
        }
        path.connect(four_at);
        // A check of the other family's pair still finds its way.
        send(&path, six_at);
        heard(&six);
        assert_eq!(path.settle(), 0);
        assert_eq!(path.descriptors().count(), 1);
        send(&path, four_at);
        heard(&four);
        // A later nomination that has no socket changes nothing.
        path.connect(six_at);
        send(&path, four_at);
        heard(&four);
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
        };
        assert_eq!(unsent, expected);
    }

    #[test]
    fn the_kernel_says_that_nobody_listens_and_that_a_family_has_no_socket() {
        let (gone, at) = listener("127.0.0.1:0");
        let mut path = Path::open_udp(Family::V4, BUFFER).unwrap();
        path.connect(at);
        drop(gone);
        let unsent = send(&path, at);
        assert_eq!(unsent, Unsent::default(), "the first one leaves");
        let mut refused = 0;
        for _ in 0..20 {
            let unsent = send(&path, at);
            refused += unsent.refused;
            assert_eq!(unsent.no_room + unsent.mismatched, 0);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(refused > 0);
        let path = Path::open_udp(Family::V4, BUFFER).unwrap();
        let unsent = send(&path, "[::1]:9".parse().unwrap());
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
