//! A kernel network namespace with a loopback device and a TUN device. Programs started in it have
//! no other network.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;

use rustix::net::netdevice::name_to_index;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, recv, sendto, socket};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

pub const DEVICE: &str = "throng0";
const PREFIX_LEN: u8 = 24;
/// Length of the transmit queue, 20 s of 500 packets per second. The kernel then drops nothing
/// before the test has read it.
const TX_QUEUE_PACKETS: u32 = 10_000;

pub struct Namespace {
    handle: File,
    pub address: Ipv4Addr,
}

/// The kernel's counters of a device, from the namespace's side: it transmits what the test reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceCounts {
    pub rx_packets: u64,
    pub rx_dropped: u64,
    pub tx_packets: u64,
    pub tx_dropped: u64,
}

impl Namespace {
    /// Makes a namespace. Returns it with the test's end of its device, where each read or write is
    /// one IP packet.
    pub fn new(address: Ipv4Addr) -> io::Result<(Namespace, File)> {
        // A thread's namespace ends with the thread unless something holds it. `handle` does.
        let made = std::thread::scope(|scope| scope.spawn(|| make(address)).join());
        let (handle, device) = made.expect("it does not panic")?;
        Ok((Namespace { handle, address }, device))
    }

    /// Runs `work` on a thread in this namespace, so its sockets and those of the programs that it
    /// starts belong to the namespace.
    pub fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        let entered = || {
            move_into_link_name_space(self.handle.as_fd(), Some(LinkNameSpaceType::Network))
                .expect("a namespace of our own can be entered");
            work()
        };
        match std::thread::scope(|scope| scope.spawn(entered).join()) {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Returns another handle to the same namespace.
    pub fn try_clone(&self) -> io::Result<Namespace> {
        Ok(Namespace {
            handle: self.handle.try_clone()?,
            address: self.address,
        })
    }

    pub fn device_counts(&self) -> DeviceCounts {
        let page = self
            .run(|| fs::read_to_string("/proc/thread-self/net/dev"))
            .expect("the kernel's page");
        let line = page
            .lines()
            .find_map(|line| line.trim().strip_prefix(&format!("{DEVICE}:")));
        let columns: Vec<u64> = line
            .expect("our device")
            .split_whitespace()
            .filter_map(|value| value.parse().ok())
            .collect();
        DeviceCounts {
            rx_packets: columns[1],
            rx_dropped: columns[3],
            tx_packets: columns[9],
            tx_dropped: columns[11],
        }
    }
}

fn make(address: Ipv4Addr) -> io::Result<(File, File)> {
    unshare_network()?;
    let handle = File::open("/proc/thread-self/ns/net")?;
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    become_tun(&device)?;
    // Without a protocol number the socket is NETLINK_ROUTE, which is number 0.
    let netlink = socket(AddressFamily::NETLINK, SocketType::RAW, None)?;
    for name in ["lo", DEVICE] {
        let index = name_to_index(&netlink, name)?;
        if name == DEVICE {
            ask(&netlink, &new_address(index, address))?;
        }
        ask(&netlink, &up(index))?;
    }
    Ok((handle, device))
}

#[allow(unsafe_code)]
fn unshare_network() -> io::Result<()> {
    // SAFETY: only flags that unshare file descriptors make this call unsafe, and NEWNET does not
    // touch them.
    Ok(unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?)
}

/// TUNSETIFF: turns the open file into the other end of a device in this thread's namespace.
#[allow(unsafe_code)]
fn become_tun(device: &File) -> io::Result<()> {
    const IFF_TUN: i16 = 0x0001;
    const IFF_NO_PI: i16 = 0x1000;
    /// `struct ifreq`: a name and a union of 24 bytes, which holds the flags here.
    #[repr(C)]
    struct Ifreq {
        name: [u8; 16],
        flags: i16,
        rest: [u8; 22],
    }
    const TUNSETIFF: rustix::ioctl::Opcode = rustix::ioctl::opcode::write::<i32>(b'T', 202);
    let mut request = Ifreq {
        name: [0; 16],
        flags: IFF_TUN | IFF_NO_PI,
        rest: [0; 22],
    };
    request.name[..DEVICE.len()].copy_from_slice(DEVICE.as_bytes());
    // SAFETY: TUNSETIFF reads and writes a `struct ifreq`, whose layout `Ifreq` has, and keeps no
    // pointer to it.
    Ok(unsafe {
        rustix::ioctl::ioctl(
            device,
            rustix::ioctl::Updater::<TUNSETIFF, Ifreq>::new(&mut request),
        )
    }?)
}

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;

/// Returns an `ifinfomsg` with IFF_UP and the length of the transmit queue.
fn up(index: u32) -> Vec<u8> {
    const IFF_UP: u32 = 1;
    const IFLA_TXQLEN: u16 = 13;
    let mut body = vec![0; 4];
    for word in [index, IFF_UP, IFF_UP] {
        body.extend(word.to_ne_bytes());
    }
    attribute(&mut body, IFLA_TXQLEN, &TX_QUEUE_PACKETS.to_ne_bytes());
    message(RTM_NEWLINK, &body)
}

/// Returns an `ifaddrmsg` with the address. Its prefix becomes a route to the other namespace.
fn new_address(index: u32, address: Ipv4Addr) -> Vec<u8> {
    const AF_INET: u8 = 2;
    const IFA_ADDRESS: u16 = 1;
    const IFA_LOCAL: u16 = 2;
    let mut body = vec![AF_INET, PREFIX_LEN, 0, 0];
    body.extend(index.to_ne_bytes());
    attribute(&mut body, IFA_LOCAL, &address.octets());
    attribute(&mut body, IFA_ADDRESS, &address.octets());
    message(RTM_NEWADDR, &body)
}

/// Appends an attribute. All values here have four bytes, so none needs padding.
fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8; 4]) {
    body.extend(8u16.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
}

/// Returns an `nlmsghdr` followed by the body.
fn message(kind: u16, body: &[u8]) -> Vec<u8> {
    const REQUEST_ACK_CREATE: u16 = 0x1 | 0x4 | 0x400;
    let mut message = (16 + body.len() as u32).to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(REQUEST_ACK_CREATE.to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    message
}

fn ask(netlink: &OwnedFd, message: &[u8]) -> io::Result<()> {
    sendto(
        netlink,
        message,
        SendFlags::empty(),
        &SocketAddrNetlink::new(0, 0),
    )?;
    let mut answer = [0; 1_024];
    let (_, len) = recv(netlink, &mut answer, RecvFlags::empty())?;
    // NLMSG_ERROR has the negative error number after the header; 0 means success.
    let code = answer
        .get(16..20)
        .filter(|_| len >= 20)
        .map(|bytes| i32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
    match code {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(-code)),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Whether `unshare` can give an ordinary user a user namespace in which this test would be root.
pub fn user_namespaces_work() -> bool {
    let tried = Command::new("unshare")
        .args(["--user", "--map-root-user", "true"])
        .output();
    tried.is_ok_and(|output| output.status.success())
}
