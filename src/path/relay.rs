//! Datagrams through a relay (TURN, RFC 8656). Only ChannelData (section 12.4) is used, which puts
//! four bytes before each datagram.
//!
//! The TURN protocol itself is not implemented here. Signalling makes the allocation and keeps it
//! (`signal::turn`). The relay's messages about it arrive on the same socket and are handed over.

use std::io::{self, IoSlice};
use std::net::{SocketAddr, UdpSocket};
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};

use tokio::sync::mpsc;

use super::Unsent;
use super::relay_stream::{CHANNEL_HEAD_BYTES, RelayStream};
use crate::net::{self, ReceiveBatch};

/// Maximum number of peers of one allocation: the server's candidates.
const CHANNELS_MAX: usize = 16;

/// Connection to a relay.
pub enum RelayLink {
    /// A socket made by [`net::open_relay_socket`] and connected to the relay.
    Udp(UdpSocket),
    Stream(Box<RelayStream>),
}

/// One allocation at a relay.
pub struct RelayCarrier {
    link: RelayLink,
    /// Our address at the relay.
    relayed: SocketAddr,
    channels: Vec<RelayChannel>,
    /// Number of buffers that the kernel has dropped so far.
    drops: u32,
    /// Receiver of the relay's STUN messages: the task that keeps the allocation.
    control: mpsc::Sender<Vec<u8>>,
}

struct RelayChannel {
    peer: SocketAddr,
    number: u16,
}

impl RelayCarrier {
    pub fn new(
        link: RelayLink,
        relayed: SocketAddr,
        control: mpsc::Sender<Vec<u8>>,
    ) -> RelayCarrier {
        RelayCarrier {
            link,
            relayed,
            channels: Vec::with_capacity(CHANNELS_MAX),
            drops: 0,
            control,
        }
    }

    /// Returns the descriptor to poll for datagrams.
    pub fn descriptor(&self) -> RawFd {
        match &self.link {
            RelayLink::Udp(socket) => socket.as_raw_fd(),
            RelayLink::Stream(stream) => stream.stream().as_raw_fd(),
        }
    }

    /// Returns our address on the connection to the relay.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        match &self.link {
            RelayLink::Udp(socket) => socket.local_addr(),
            RelayLink::Stream(stream) => stream.stream().local_addr(),
        }
    }

    pub fn is_stream(&self) -> bool {
        matches!(self.link, RelayLink::Stream(_))
    }

    /// Whether the connection to the relay has ended. A UDP socket does not end.
    pub fn is_over(&self) -> bool {
        matches!(&self.link, RelayLink::Stream(stream) if stream.is_over())
    }

    pub fn relayed(&self) -> SocketAddr {
        self.relayed
    }

    /// Binds a channel: datagrams to and from `peer` use it.
    pub fn bind(&mut self, peer: SocketAddr, number: u16) {
        self.channels.retain(|channel| channel.peer != peer);
        if self.channels.len() < CHANNELS_MAX {
            self.channels.push(RelayChannel { peer, number });
        }
    }

    /// Returns the number of datagrams that the kernel has dropped since its last report.
    pub fn dropped_datagrams(&mut self, drops: u32) -> u64 {
        u64::from(drops.wrapping_sub(std::mem::replace(&mut self.drops, drops)))
    }

    /// Returns the drops that no datagram has reported.
    pub fn untold_drops(&self) -> u64 {
        let RelayLink::Udp(socket) = &self.link else {
            return 0;
        };
        net::socket_drops(socket).map_or(0, |drops| u64::from(drops.wrapping_sub(self.drops)))
    }

    /// Receives what has arrived, as [`ReceiveBatch::receive`]: datagrams of the peers, without the
    /// head.
    pub fn receive(&mut self, batch: &mut ReceiveBatch) -> io::Result<usize> {
        match &mut self.link {
            RelayLink::Udp(socket) => batch.receive(socket)?,
            RelayLink::Stream(stream) => stream.receive(batch)?,
        };
        Ok(batch.unwrap_each(|bytes| self.unwrap(bytes)))
    }

    /// Returns the range of a peer's datagram in `bytes`, and the peer's address.
    fn unwrap(&self, bytes: &[u8]) -> Option<(Range<usize>, SocketAddr)> {
        let [first, second, high, low] = *bytes.first_chunk::<CHANNEL_HEAD_BYTES>()?;
        if first >> 6 == 0 {
            // If there is no room, the message is dropped: the relay repeats it.
            let _ = self.control.try_send(bytes.to_vec());
            return None;
        }
        let number = u16::from_be_bytes([first, second]);
        let channel = self
            .channels
            .iter()
            .find(|channel| channel.number == number)?;
        let end = CHANNEL_HEAD_BYTES + usize::from(u16::from_be_bytes([high, low]));
        (end <= bytes.len()).then_some((CHANNEL_HEAD_BYTES..end, channel.peer))
    }

    /// Sends `bytes` to a peer as datagrams of `segment` bytes. If the peer has no channel, nothing
    /// is sent.
    pub fn send(&mut self, to: SocketAddr, bytes: &[u8], segment: usize, unsent: &mut Unsent) {
        let Some(channel) = self.channels.iter().find(|channel| channel.peer == to) else {
            return;
        };
        let [first, second] = channel.number.to_be_bytes();
        for datagram in bytes.chunks(segment.max(1)) {
            let [high, low] = (datagram.len() as u16).to_be_bytes();
            let head = [first, second, high, low];
            match &mut self.link {
                RelayLink::Udp(socket) => {
                    let parts = [IoSlice::new(&head), IoSlice::new(datagram)];
                    if let Err(error) = net::send_parts(socket, &parts) {
                        unsent.count(&error, 1);
                    }
                }
                // The end of the stream is reported once, not for each datagram after it.
                RelayLink::Stream(stream) => {
                    unsent.backlogged +=
                        u64::from(!stream.is_over() && !stream.push(&head, datagram));
                }
            }
        }
        if let RelayLink::Stream(stream) = &mut self.link {
            stream.flush();
        }
    }

    /// Sends a message of the task that keeps the allocation.
    pub fn send_control(&mut self, message: &[u8], unsent: &mut Unsent) {
        match &mut self.link {
            RelayLink::Udp(socket) => {
                if let Err(error) = net::send(socket, None, message) {
                    unsent.count(&error, 1);
                }
            }
            RelayLink::Stream(stream) => {
                stream.push(message, &[]);
                stream.flush();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn datagrams_go_by_the_channel_of_their_peer_and_what_the_relay_says_is_handed_over() {
        let relay = UdpSocket::bind("127.0.0.1:0").unwrap();
        relay
            .set_read_timeout(Some(Duration::from_secs(2)))
            .unwrap();
        let socket = net::open_relay_socket("127.0.0.1".parse().unwrap(), 1 << 20).unwrap();
        socket.connect(relay.local_addr().unwrap()).unwrap();
        let ours = socket.local_addr().unwrap();
        let (control, mut said) = mpsc::channel(4);
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        let mut carrier = RelayCarrier::new(
            RelayLink::Udp(socket),
            address("203.0.113.1:49152"),
            control,
        );
        let (peer, stranger) = (address("198.51.100.7:5000"), address("198.51.100.8:5000"));
        carrier.bind(peer, 0x4001);
        let mut unsent = Unsent::default();
        carrier.send(peer, b"onetwothr", 3, &mut unsent);
        carrier.send(stranger, b"nowhere", 7, &mut unsent);
        let mut bytes = [0; 64];
        for expected in [b"one", b"two", b"thr"] {
            let len = relay.recv(&mut bytes).unwrap();
            assert_eq!(bytes[..len], [&[0x40, 1, 0, 3], &expected[..]].concat());
        }
        // Cases: padded to four bytes, as over TCP; an unknown channel; too short; cut off; STUN.
        let stun = [&[1, 1, 0, 0][..], &[7; 16]].concat();
        for datagram in [
            &b"\x40\x01\x00\x05hello\0\0\0"[..],
            b"\x40\x02\x00\x05other",
            b"\x40\x01",
            b"\x40\x01\x00\x09short",
            &stun,
        ] {
            relay.send_to(datagram, ours).unwrap();
        }
        let (mut batch, started) = (ReceiveBatch::default(), Instant::now());
        let mut heard = Vec::new();
        while said.is_empty() && started.elapsed() < Duration::from_secs(5) {
            let count = carrier.receive(&mut batch).unwrap_or(0);
            for index in 0..count {
                let (bytes, received) = batch.datagram(index).unwrap();
                heard.push((bytes.to_vec(), received.from));
            }
        }
        assert_eq!(heard, [(b"hello".to_vec(), peer)]);
        assert_eq!(said.try_recv().unwrap(), stun);
        assert_eq!(unsent, Unsent::default());
    }
}
