//! A bad network of real kernel sockets. The server and each place with clients have a network
//! namespace with a TUN device. A relay between them loses, delays, duplicates and reorders packets
//! by a seed, and logs the fate of each packet. The log is the ground truth of the tests that use
//! it: RTP headers are readable although their payload is encrypted.
//!
//! [`Network`] has one place. [`Places`] has several, each with its own network to the server and
//! none to the others.
//!
//! It needs the right to make network namespaces: root, or an ordinary user to whom the kernel
//! gives user namespaces (the test then runs itself again in one). Without that right a test prints
//! that it was skipped and passes, except under `CI`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use throng::transport::rtp::Ssrc;

#[allow(unused_imports)]
pub use super::namespace::{DEVICE, DeviceCounts, Namespace};
use super::path::{Conditions, Fate as PathFate, Path};

pub const CLIENTS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
pub const SERVER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// Environment variable that is set for a test that was started again in a user namespace.
const IN_USER_NAMESPACE: &str = "THRONG_TEST_IN_USER_NAMESPACE";
const MTU: usize = 1_500;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// From the clients to the server.
    Up,
    Down,
}

/// Content of a packet, as far as it is readable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    Rtp(Rtp),
    /// Type of the first packet and the sender's SSRC. The rest is encrypted.
    Rtcp {
        packet_type: u8,
        ssrc: Ssrc,
    },
    /// Whether it is a response, and its transaction id.
    Stun {
        answers: bool,
        transaction: [u8; 12],
    },
    /// `keyed`: whether it holds a ChangeCipherSpec. The peer's Finished has then come too, so the
    /// peer's keys are in use.
    Dtls {
        keyed: bool,
    },
    OtherUdp,
    /// Signalling: whether it opens a connection, and its number of data bytes.
    Tcp {
        syn: bool,
        payload: usize,
    },
    Other,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rtp {
    pub ssrc: Ssrc,
    pub seq: u16,
    pub payload_type: u8,
    pub marker: bool,
    pub rtp_time: u32,
    /// Whether it has RTP padding, which servers send to probe or to fill.
    pub padded: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Given to the other namespace's kernel at this time.
    Delivered(Duration),
    UnderWay,
    Lost,
    Overflowed,
    Cut,
}

/// One copy of a packet. Times count from when the network was made.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    pub at: Duration,
    pub fate: Fate,
    /// Whether it is the second copy of a duplicated packet.
    pub duplicate: bool,
    pub direction: Direction,
    /// Index of the place that it came from or was for.
    pub place: usize,
    pub from: SocketAddrV4,
    pub to: SocketAddrV4,
    /// Length of the UDP payload, or of the whole packet for everything else.
    pub bytes: usize,
    pub content: Content,
}

impl Packet {
    pub fn rtp(&self) -> Option<Rtp> {
        match self.content {
            Content::Rtp(rtp) => Some(rtp),
            _ => None,
        }
    }

    pub fn delivered_at(&self) -> Option<Duration> {
        match self.fate {
            Fate::Delivered(at) => Some(at),
            _ => None,
        }
    }

    /// Time that it was on its way, if it arrived.
    pub fn delay(&self) -> Option<Duration> {
        self.delivered_at().map(|at| at - self.at)
    }

    pub fn is_udp(&self) -> bool {
        !matches!(self.content, Content::Tcp { .. } | Content::Other)
    }

    pub fn is_tcp(&self) -> bool {
        matches!(self.content, Content::Tcp { .. })
    }
}

/// A server, and all clients at one place.
pub struct Network {
    pub clients: Namespace,
    pub server: Namespace,
    wires: Wires,
}

impl Network {
    /// Makes a network without any faults. Random effects of later conditions come from `seed`.
    pub fn new(seed: u64) -> io::Result<Network> {
        let (server, mut places, wires) = Wires::lay(&[CLIENTS], seed)?;
        Ok(Network {
            clients: places.remove(0),
            server,
            wires,
        })
    }

    /// Returns the network for the test of this name in the caller's module (`module_path!()`).
    /// Returns `None` if the test has been run in a user namespace instead and has passed there, or
    /// if no network can be made; under `CI` the latter panics.
    pub fn for_test(module: &str, name: &str, seed: u64) -> Option<Network> {
        for_test(module, name, || Network::new(seed))
    }

    /// Sets the conditions from now on. They do not affect signalling (TCP), unless
    /// [`Network::touch_tcp`] says otherwise.
    pub fn set(&self, direction: Direction, conditions: Conditions) {
        self.wires.set(0, direction, conditions);
    }

    pub fn set_both(&self, conditions: Conditions) {
        self.wires.set_both(0, conditions);
    }

    /// Sets whether the conditions affect signalling, too.
    pub fn touch_tcp(&self, too: bool) {
        self.wires.touch_tcp(0, too);
    }

    /// Time since the network was made, as in the log.
    pub fn now(&self) -> Duration {
        self.wires.now()
    }

    /// All packets so far, in the order in which they came to the relay.
    pub fn log(&self) -> Vec<Packet> {
        self.wires.log()
    }

    /// Number of packets that have neither left nor been lost.
    pub fn under_way(&self) -> usize {
        self.wires.under_way()
    }
}

/// A server, and clients at several places, each with its own path to it.
pub struct Places {
    /// Namespaces of the places. Their indices are those that the methods of [`Wires`] take.
    pub places: Vec<Namespace>,
    pub server: Namespace,
    pub wires: Wires,
}

impl Places {
    /// Makes this many places, with paths without any faults. Random effects of later conditions
    /// come from `seed`.
    pub fn new(count: usize, seed: u64) -> io::Result<Places> {
        let addresses: Vec<Ipv4Addr> = (0..count).map(place).collect();
        let (server, places, wires) = Wires::lay(&addresses, seed)?;
        Ok(Places {
            places,
            server,
            wires,
        })
    }

    /// Like [`Network::for_test`].
    pub fn for_test(module: &str, name: &str, count: usize, seed: u64) -> Option<Places> {
        for_test(module, name, || Places::new(count, seed))
    }
}

/// Returns the address of a place of [`Places`].
pub fn place(index: usize) -> Ipv4Addr {
    Ipv4Addr::new(
        10,
        77,
        0,
        11 + u8::try_from(index).expect("a handful of places"),
    )
}

fn for_test<N>(module: &str, name: &str, make: impl FnOnce() -> io::Result<N>) -> Option<N> {
    let name = &super::test_name(module, name);
    let error = match make() {
        Ok(network) => return Some(network),
        Err(error) => error,
    };
    let again = std::env::var_os(IN_USER_NAMESPACE).is_none()
        && error.kind() == io::ErrorKind::PermissionDenied;
    if again && super::namespace::user_namespaces_work() {
        let mut command = Command::new("unshare");
        command
            .args(["--user", "--map-root-user", "--"])
            .arg(std::env::current_exe().expect("our own path"));
        command
            .args(["--exact", name, "--include-ignored", "--nocapture"])
            .env(IN_USER_NAMESPACE, "1");
        let output = command.output().expect("it ran a moment ago");
        let said = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && said.contains("1 passed"),
            "in a user namespace: {said}"
        );
        eprintln!("{said}");
        return None;
    }
    assert!(
        std::env::var_os("CI").is_none(),
        "no network namespaces under CI: {error}"
    );
    eprintln!("SKIPPED {name}: no network namespace can be made here ({error}); run it as root");
    None
}

/// The relay between the places and the server.
pub struct Wires {
    relay: Arc<Relay>,
    threads: Vec<JoinHandle<()>>,
    /// The server's end, then those of the places. They are used to wake the threads that read
    /// there.
    ends: Vec<Namespace>,
}

impl Wires {
    /// Makes the server's namespace, one for each of these addresses, and paths without faults
    /// between them.
    fn lay(addresses: &[Ipv4Addr], seed: u64) -> io::Result<(Namespace, Vec<Namespace>, Wires)> {
        let (server, from_server) = Namespace::new(SERVER)?;
        let (places, devices): (Vec<Namespace>, Vec<File>) = addresses
            .iter()
            .map(|address| Namespace::new(*address))
            .collect::<io::Result<Vec<_>>>()?
            .into_iter()
            .unzip();
        let one_way = |out: &File, seed: u64| -> io::Result<OneWay> {
            Ok(OneWay {
                out: out.try_clone()?,
                path: Path::new(Conditions::default(), seed),
                tcp_too: false,
            })
        };
        let way = |(index, (address, device)): (usize, (&Ipv4Addr, &File))| -> io::Result<Way> {
            let seed = seed.wrapping_add(2 * index as u64);
            Ok(Way {
                address: *address,
                directions: [
                    one_way(&from_server, seed)?,
                    one_way(device, seed.wrapping_add(1))?,
                ],
            })
        };
        let state = State {
            ways: addresses
                .iter()
                .zip(&devices)
                .enumerate()
                .map(way)
                .collect::<io::Result<_>>()?,
            under_way: BTreeMap::new(),
            log: Vec::new(),
            count: 0,
            ended: false,
        };
        let relay = Arc::new(Relay {
            began: Instant::now(),
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        let start = |work: Box<dyn FnOnce(&Relay) + Send>| {
            let relay = relay.clone();
            std::thread::spawn(move || work(&relay))
        };
        let mut threads = vec![
            start(Box::new(|relay| relay.read_from(from_server, None))),
            start(Box::new(Relay::release_in_time)),
        ];
        threads.extend(devices.into_iter().enumerate().map(|(index, device)| {
            start(Box::new(move |relay| relay.read_from(device, Some(index))))
        }));
        let mut ends = vec![server.try_clone()?];
        for place in &places {
            ends.push(place.try_clone()?);
        }
        Ok((
            server,
            places,
            Wires {
                relay,
                threads,
                ends,
            },
        ))
    }

    /// Sets the conditions from now on. They do not affect signalling (TCP), unless
    /// [`Wires::touch_tcp`] says otherwise.
    pub fn set(&self, place: usize, direction: Direction, conditions: Conditions) {
        self.relay.lock().ways[place].directions[direction as usize]
            .path
            .conditions = conditions;
    }

    pub fn set_both(&self, place: usize, conditions: Conditions) {
        for direction in [Direction::Up, Direction::Down] {
            self.set(place, direction, conditions);
        }
    }

    /// Sets whether the conditions affect signalling, too.
    pub fn touch_tcp(&self, place: usize, too: bool) {
        self.relay.lock().ways[place]
            .directions
            .iter_mut()
            .for_each(|way| way.tcp_too = too);
    }

    /// Time since the network was made, as in the log.
    pub fn now(&self) -> Duration {
        self.relay.began.elapsed()
    }

    /// All packets so far, in the order in which they came to the relay.
    pub fn log(&self) -> Vec<Packet> {
        self.relay.lock().log.clone()
    }

    /// Number of packets that have neither left nor been lost.
    pub fn under_way(&self) -> usize {
        self.relay.lock().under_way.len()
    }
}

impl Drop for Wires {
    fn drop(&mut self) {
        self.relay.lock().ended = true;
        self.relay.changed.notify_all();
        for end in &self.ends {
            // This wakes the thread that reads there. The packet itself goes nowhere.
            let to = if end.address == SERVER {
                CLIENTS
            } else {
                SERVER
            };
            let poke = || {
                UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))
                    .and_then(|socket| socket.send_to(&[0], (to, 9)))
            };
            end.run(poke)
                .expect("the network's own device takes a packet");
        }
        for thread in self.threads.drain(..) {
            let ended = thread.join();
            assert!(
                ended.is_ok() || std::thread::panicking(),
                "a thread of the relay panicked"
            );
        }
    }
}

struct Relay {
    began: Instant,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Paths by the index of the place.
    ways: Vec<Way>,
    /// Packets by the time at which they leave, then in order of arrival.
    under_way: BTreeMap<(Duration, u64), UnderWay>,
    log: Vec<Packet>,
    count: u64,
    ended: bool,
}

struct UnderWay {
    place: usize,
    direction: Direction,
    /// Index of the packet in the log.
    logged: usize,
    bytes: Vec<u8>,
}

/// The path between a place and the server.
struct Way {
    address: Ipv4Addr,
    /// The two directions, indexed by [`Direction`].
    directions: [OneWay; 2],
}

struct OneWay {
    out: File,
    path: Path,
    tcp_too: bool,
}

impl Relay {
    fn lock(&self) -> MutexGuard<'_, State> {
        // If a thread panics while it holds the lock, joining it reports the panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the device of `place`, or of the server for `None`, until the network ends.
    fn read_from(&self, mut device: File, place: Option<usize>) {
        let mut buffer = [0; MTU];
        loop {
            let len = device
                .read(&mut buffer)
                .expect("an open TUN device can be read");
            let now = self.began.elapsed();
            let mut state = self.lock();
            if state.ended {
                return;
            }
            state.take(&buffer[..len], place, now);
            // Packets that are due at once leave from here, so that no other thread must wake
            // first.
            state.release(self.began);
            self.changed.notify_one();
        }
    }

    fn release_in_time(&self) {
        let mut state = self.lock();
        while !state.ended {
            state.release(self.began);
            let wait = state
                .under_way
                .first_key_value()
                .map(|((leaves, _), _)| leaves.saturating_sub(self.began.elapsed()));
            state = match wait {
                Some(wait) => {
                    self.changed
                        .wait_timeout(state, wait)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
                None => self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

impl State {
    fn take(&mut self, bytes: &[u8], place: Option<usize>, now: Duration) {
        let direction = if place.is_some() {
            Direction::Up
        } else {
            Direction::Down
        };
        // The kernel's own IPv6 packets have no peer.
        let Some(mut packet) = describe(bytes, direction, now) else {
            return;
        };
        // A server's packet to no place, for instance to a multicast group, goes to the only place
        // if there is just one. Otherwise it is dropped.
        let only = (self.ways.len() == 1).then_some(0);
        let Some(place) = place.or_else(|| self.place_of(*packet.to.ip())).or(only) else {
            return;
        };
        packet.place = place;
        let way = &mut self.ways[place].directions[direction as usize];
        let (first, second) = if packet.is_tcp() && !way.tcp_too {
            (PathFate::Leaves(now), None)
        } else {
            way.path.take(bytes.len(), now)
        };
        for (fate, duplicate) in [(Some(first), false), (second, true)] {
            let Some(fate) = fate else { continue };
            (packet.fate, packet.duplicate) = (Fate::UnderWay, duplicate);
            match fate {
                PathFate::Leaves(at) => {
                    self.count += 1;
                    let under_way = UnderWay {
                        place,
                        direction,
                        logged: self.log.len(),
                        bytes: bytes.to_vec(),
                    };
                    self.under_way.insert((at, self.count), under_way);
                }
                PathFate::Lost => packet.fate = Fate::Lost,
                PathFate::Overflowed => packet.fate = Fate::Overflowed,
                PathFate::Cut => packet.fate = Fate::Cut,
            }
            self.log.push(packet);
        }
    }

    fn release(&mut self, began: Instant) {
        while let Some(entry) = self.under_way.first_entry() {
            let now = began.elapsed();
            if entry.key().0 > now {
                return;
            }
            let packet = entry.remove();
            self.ways[packet.place].directions[packet.direction as usize]
                .out
                .write_all(&packet.bytes)
                .expect("an open TUN device takes a packet");
            self.log[packet.logged].fate = Fate::Delivered(now);
        }
    }

    fn place_of(&self, address: Ipv4Addr) -> Option<usize> {
        self.ways.iter().position(|way| way.address == address)
    }
}

/// Describes a packet; `None` if it is not IPv4.
pub fn describe(bytes: &[u8], direction: Direction, at: Duration) -> Option<Packet> {
    const TCP: u8 = 6;
    const UDP: u8 = 17;
    let first = *bytes.first()?;
    if first >> 4 != 4 || bytes.len() < 20 {
        return None;
    }
    let body = bytes.get(usize::from(first & 0x0F) * 4..)?;
    let address = |at: usize| Ipv4Addr::new(bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]);
    let port = |at: usize| {
        body.get(at..at + 2)
            .map_or(0, |port| u16::from_be_bytes([port[0], port[1]]))
    };
    let (content, bytes_counted) = match (bytes[9], body.get(8..)) {
        (UDP, Some(payload)) => (describe_udp(payload), payload.len()),
        (TCP, _) => (describe_tcp(body), bytes.len()),
        _ => (Content::Other, bytes.len()),
    };
    Some(Packet {
        at,
        fate: Fate::UnderWay,
        duplicate: false,
        direction,
        place: 0,
        from: SocketAddrV4::new(address(12), port(0)),
        to: SocketAddrV4::new(address(16), port(2)),
        bytes: bytes_counted,
        content,
    })
}

/// Reads the flags and the data offset of a segment: RFC 9293, section 3.1.
fn describe_tcp(segment: &[u8]) -> Content {
    let (Some(offset), Some(flags)) = (segment.get(12), segment.get(13)) else {
        return Content::Other;
    };
    Content::Tcp {
        syn: flags & 0x02 != 0,
        payload: segment.len().saturating_sub(usize::from(offset >> 4) * 4),
    }
}

/// Whether the records of a datagram include a ChangeCipherSpec. RFC 6347, section 4.1: each record
/// is a header of 13 bytes and its content.
fn changes_cipher(mut records: &[u8]) -> bool {
    const CHANGE_CIPHER_SPEC: u8 = 20;
    while let [content_type, head @ ..] = records {
        if *content_type == CHANGE_CIPHER_SPEC {
            return true;
        }
        let Some(len) = head.get(10..12) else {
            break;
        };
        let len = usize::from(u16::from_be_bytes([len[0], len[1]]));
        records = head.get(12 + len..).unwrap_or_default();
    }
    false
}

/// Tells protocols apart by the first byte (RFC 7983), and RTP from RTCP by RFC 5761.
fn describe_udp(payload: &[u8]) -> Content {
    let word = |at: usize| {
        u32::from_be_bytes([
            payload[at],
            payload[at + 1],
            payload[at + 2],
            payload[at + 3],
        ])
    };
    match payload {
        [class @ 0..=3, ..] if payload.len() >= 20 => Content::Stun {
            // RFC 8489, section 5: the upper bit of the class is set in every response.
            answers: class & 1 != 0,
            transaction: payload[8..20].try_into().expect("12 bytes"),
        },
        [20..=63, ..] => Content::Dtls {
            keyed: changes_cipher(payload),
        },
        [128..=191, packet_type @ 192..=223, ..] if payload.len() >= 8 => Content::Rtcp {
            packet_type: *packet_type,
            ssrc: Ssrc(word(4)),
        },
        [128..=191, second, ..] if payload.len() >= 12 => Content::Rtp(Rtp {
            ssrc: Ssrc(word(8)),
            seq: u16::from_be_bytes([payload[2], payload[3]]),
            payload_type: second & 0x7F,
            marker: second & 0x80 != 0,
            rtp_time: word(4),
            padded: payload[0] & 0x20 != 0,
        }),
        // RFC 8656, section 12.4: a relay's channel, around what it carries.
        [64..=79, _, high, low, carried @ ..] => {
            let len = usize::from(u16::from_be_bytes([*high, *low]));
            carried.get(..len).map_or(Content::OtherUdp, describe_udp)
        }
        _ => Content::OtherUdp,
    }
}
