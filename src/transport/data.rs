//! Data channels of one connection, on the side that accepts the association: SCTP over DTLS (RFC
//! 8831) with channels opened in band (RFC 8832). Only LiveKit's two channels are served.
//!
//! Sans-IO. `handle_*` takes the packets that DTLS has opened, and the time; `poll_*` gives the
//! packets that DTLS is to seal, and messages. The client begins the association. It may wait for
//! the association before it processes anything else in a description with data channels, so
//! whoever accepts them in a description must serve them.
//!
//! SCTP tags and initial sequence numbers come from the library's own generator.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use bytes::Bytes;
use sctp_proto::{
    Association, AssociationHandle, DatagramEvent, Endpoint, EndpointConfig, Event, Payload,
    PayloadProtocolIdentifier, ReliabilityType, ServerConfig, Stream, StreamEvent, StreamId,
    TransportConfig,
};

/// Maximum size of a message in either direction: the limit that holds for a description without
/// `a=max-message-size` (RFC 8841, section 6.1).
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;
/// Maximum of received bytes that wait for the rest of their message, over all channels.
const RECEIVED_BYTES_MAX: u32 = 256 << 10;
/// Maximum of bytes that wait to be sent on a channel. A message that would exceed it is refused.
const UNSENT_BYTES_MAX: usize = 256 << 10;
/// Maximum number of channels. Clients open two or three. A client that opens more than this gets
/// no data at all.
const CHANNELS_MAX: usize = 16;
/// Size of SCTP's chunks. With the headers of SCTP and DTLS a datagram stays below what any path
/// carries.
const CHUNK_BYTES_MAX: u32 = 1000;

/// DATA_CHANNEL_OPEN, DATA_CHANNEL_ACK, and the bit for "unordered" (RFC 8832, sections 5.1, 8.2).
const DCEP_OPEN: u8 = 3;
const DCEP_ACK: u8 = 2;
const DCEP_UNORDERED: u8 = 0x80;
/// Length of a DATA_CHANNEL_OPEN up to its label.
const DCEP_OPEN_BYTES: usize = 12;

static SERVER: LazyLock<Arc<ServerConfig>> = LazyLock::new(|| {
    let transport = TransportConfig::default()
        .with_max_receive_message_size(MESSAGE_BYTES_MAX as u32)
        .with_max_send_message_size(MESSAGE_BYTES_MAX as u32)
        .with_max_receive_buffer_size(RECEIVED_BYTES_MAX)
        // SCTP never gives up by itself, because ICE decides whether the other side is alive.
        .with_max_init_retransmits(None)
        .with_max_data_retransmits(None);
    let mut config = ServerConfig::new();
    config.transport = Arc::new(transport);
    Arc::new(config)
});

static ENDPOINT: LazyLock<Arc<EndpointConfig>> = LazyLock::new(|| {
    let mut config = EndpointConfig::new();
    config.max_payload_size(CHUNK_BYTES_MAX);
    Arc::new(config)
});

/// Which side opens the channels once there is an association.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataRole {
    /// The other side opens channels.
    Accepts,
    /// We open LiveKit's two.
    Opens,
}

/// LiveKit's channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataChannelKind {
    Reliable,
    Lossy,
}

impl DataChannelKind {
    pub const ALL: [DataChannelKind; 2] = [DataChannelKind::Reliable, DataChannelKind::Lossy];

    pub fn label(self) -> &'static str {
        match self {
            DataChannelKind::Reliable => "_reliable",
            DataChannelKind::Lossy => "_lossy",
        }
    }

    fn of(label: &[u8]) -> Option<DataChannelKind> {
        let mut kinds = DataChannelKind::ALL.into_iter();
        kinds.find(|kind| kind.label().as_bytes() == label)
    }

    /// How LiveKit opens the channel: lossy data is unordered and never retransmitted.
    fn delivery(self) -> ChannelDelivery {
        match self {
            DataChannelKind::Reliable => ChannelDelivery {
                unordered: false,
                reliability: ReliabilityType::Reliable,
                value: 0,
            },
            DataChannelKind::Lossy => ChannelDelivery {
                unordered: true,
                reliability: ReliabilityType::Rexmit,
                value: 0,
            },
        }
    }
}

/// One received message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataMessage {
    pub channel: DataChannelKind,
    pub payload: Bytes,
}

/// How messages of a channel are delivered.
#[derive(Clone, Copy)]
struct ChannelDelivery {
    unordered: bool,
    reliability: ReliabilityType,
    /// Number of retransmissions, or milliseconds.
    value: u32,
}

impl ChannelDelivery {
    fn set(self, stream: &mut Stream<'_>) {
        // This fails for a stream that has just been closed. Then there is nothing to set.
        let _ = stream.set_reliability_params(self.unordered, self.reliability, self.value);
    }
}

struct DataChannel {
    stream: StreamId,
    /// `None` if the channel is not one of LiveKit's, or not opened yet. Messages on it are
    /// dropped.
    kind: Option<DataChannelKind>,
}

/// SCTP association of one connection, with its channels.
pub struct DataTransport {
    endpoint: Endpoint,
    association: Option<(AssociationHandle, Association)>,
    channels: Vec<DataChannel>,
    /// First stream to open LiveKit's channels on once the association is up; `None` if the client
    /// opens them.
    opens_from: Option<StreamId>,
    received: VecDeque<DataMessage>,
    outgoing: VecDeque<Bytes>,
    over: bool,
}

impl DataTransport {
    /// `dtls_active` decides which stream numbers are ours (RFC 8832, section 6).
    pub fn new(role: DataRole, dtls_active: bool) -> DataTransport {
        DataTransport {
            endpoint: Endpoint::new(ENDPOINT.clone(), Some(SERVER.clone())),
            association: None,
            channels: Vec::new(),
            opens_from: (role == DataRole::Opens).then_some(u16::from(!dtls_active)),
            received: VecDeque::new(),
            outgoing: VecDeque::new(),
            over: false,
        }
    }

    /// Takes one SCTP packet. Invalid packets are dropped.
    pub fn handle_packet(&mut self, packet: &[u8], now: Instant) {
        if self.over {
            return;
        }
        // The library also distinguishes associations by address. Here there is only one.
        let peer = SocketAddr::from((Ipv4Addr::LOCALHOST, sctp_proto::DEFAULT_SCTP_PORT));
        let packet = Bytes::copy_from_slice(packet);
        let event = self.endpoint.handle(now, peer, None, None, packet);
        match (event, &mut self.association) {
            (Some((handle, DatagramEvent::NewAssociation(association))), None) => {
                self.association = Some((handle, association));
                // A connection has only one association.
                self.endpoint.reject_new_associations();
            }
            (
                Some((handle, DatagramEvent::AssociationEvent(event))),
                Some((known, association)),
            ) if handle == *known => association.handle_event(event),
            _ => {}
        }
        self.handle_events();
    }

    pub fn handle_timeout(&mut self, now: Instant) {
        let Some((handle, association)) = &mut self.association else {
            return;
        };
        association.handle_timeout(now);
        while let Some(event) = association.poll_endpoint_event() {
            if let Some(event) = self.endpoint.handle_event(*handle, event) {
                association.handle_event(event);
            }
        }
        self.handle_events();
    }

    pub fn poll_timeout(&self) -> Option<Instant> {
        let (_, association) = self.association.as_ref()?;
        association.poll_timeout()
    }

    /// Returns the next packet for DTLS to seal.
    pub fn poll_transmit(&mut self, now: Instant) -> Option<Bytes> {
        while self.outgoing.is_empty() {
            let of_endpoint = self.endpoint.poll_transmit();
            let transmit = match (of_endpoint, &mut self.association) {
                (Some(transmit), _) => transmit,
                (None, Some((_, association))) => association.poll_transmit(now)?,
                (None, None) => return None,
            };
            if let Payload::RawEncode(packets) = transmit.payload {
                self.outgoing.extend(packets);
            }
        }
        self.outgoing.pop_front()
    }

    pub fn poll_message(&mut self) -> Option<DataMessage> {
        self.received.pop_front()
    }

    /// Sends a message. Returns `false` if there is no such channel, or too much waits on it
    /// already.
    pub fn send(&mut self, channel: DataChannelKind, payload: &[u8]) -> bool {
        let Some((_, association)) = &mut self.association else {
            return false;
        };
        let mut channels = self.channels.iter();
        let Some(found) = channels.find(|known| known.kind == Some(channel)) else {
            return false;
        };
        let Ok(mut stream) = association.stream(found.stream) else {
            return false;
        };
        let waiting = stream.buffered_amount().unwrap_or(usize::MAX);
        waiting.saturating_add(payload.len()) <= UNSENT_BYTES_MAX
            && stream
                .write_with_ppi(payload, PayloadProtocolIdentifier::Binary)
                .is_ok()
    }

    fn handle_events(&mut self) {
        while let Some((_, association)) = &mut self.association {
            let Some(event) = association.poll() else {
                return;
            };
            match event {
                Event::Connected => self.open_channels(),
                Event::HandshakeFailed { .. } | Event::AssociationLost { .. } => self.end(),
                Event::Stream(StreamEvent::Opened { id } | StreamEvent::Readable { id }) => {
                    self.read(id)
                }
                Event::Stream(StreamEvent::Finished { id } | StreamEvent::Stopped { id, .. }) => {
                    self.channels.retain(|channel| channel.stream != id)
                }
                _ => {}
            }
        }
    }

    fn open_channels(&mut self) {
        let (Some(first), Some((_, association))) = (self.opens_from.take(), &mut self.association)
        else {
            return;
        };
        for (kind, id) in DataChannelKind::ALL.into_iter().zip((first..).step_by(2)) {
            let opened = association.open_stream(id, PayloadProtocolIdentifier::Binary);
            let Ok(mut stream) = opened else { continue };
            // All messages are ordered until the other side has acknowledged the channel (RFC 8832,
            // section 6).
            let asked = stream.write_with_ppi(&dcep_open(kind), PayloadProtocolIdentifier::Dcep);
            if asked.is_ok() {
                let kind = Some(kind);
                self.channels.push(DataChannel { stream: id, kind });
            }
        }
    }

    fn read(&mut self, id: StreamId) {
        let known = self.channels.iter().position(|known| known.stream == id);
        let at = known.unwrap_or(self.channels.len());
        if at == CHANNELS_MAX {
            return self.end();
        }
        if known.is_none() {
            let stream = id;
            self.channels.push(DataChannel { stream, kind: None });
        }
        let (Some(channel), Some((_, association))) =
            (self.channels.get_mut(at), &mut self.association)
        else {
            return;
        };
        let Ok(mut stream) = association.stream(id) else {
            return;
        };
        while let Ok(Some(message)) = stream.read_sctp() {
            let mut payload = vec![0; message.len()];
            if message.read(&mut payload).is_err() {
                continue;
            }
            match (message.ppi, channel.kind) {
                (PayloadProtocolIdentifier::Dcep, _) => channel.agree(&mut stream, &payload),
                (PayloadProtocolIdentifier::Binary, Some(kind)) => {
                    self.received.push_back(DataMessage {
                        channel: kind,
                        payload: payload.into(),
                    })
                }
                _ => {}
            }
        }
    }

    fn end(&mut self) {
        self.over = true;
        self.association = None;
        self.channels.clear();
    }
}

impl DataChannel {
    fn agree(&mut self, stream: &mut Stream<'_>, message: &[u8]) {
        if message.first() == Some(&DCEP_ACK) {
            if let Some(kind) = self.kind {
                kind.delivery().set(stream);
            }
        } else if let Some((delivery, label)) = parse_dcep_open(message)
            && stream
                .write_with_ppi(&[DCEP_ACK], PayloadProtocolIdentifier::Dcep)
                .is_ok()
        {
            delivery.set(stream);
            self.kind = DataChannelKind::of(label);
        }
    }
}

/// DATA_CHANNEL_OPEN message (RFC 8832, section 5.1).
fn dcep_open(kind: DataChannelKind) -> Vec<u8> {
    let delivery = kind.delivery();
    let unordered = if delivery.unordered {
        DCEP_UNORDERED
    } else {
        0
    };
    let label = kind.label();
    let mut message = vec![DCEP_OPEN, delivery.reliability as u8 | unordered, 0, 0];
    message.extend(delivery.value.to_be_bytes());
    message.extend((label.len() as u16).to_be_bytes());
    message.extend([0, 0]);
    message.extend(label.as_bytes());
    message
}

/// Reads a DATA_CHANNEL_OPEN message: the channel's delivery and its label.
fn parse_dcep_open(message: &[u8]) -> Option<(ChannelDelivery, &[u8])> {
    let (head, rest) = message.split_first_chunk::<DCEP_OPEN_BYTES>()?;
    let [DCEP_OPEN, channel_type, _, _, v0, v1, v2, v3, l0, l1, _, _] = *head else {
        return None;
    };
    let reliability = match channel_type & !DCEP_UNORDERED {
        0 => ReliabilityType::Reliable,
        1 => ReliabilityType::Rexmit,
        2 => ReliabilityType::Timed,
        _ => return None,
    };
    let delivery = ChannelDelivery {
        unordered: channel_type & DCEP_UNORDERED != 0,
        reliability,
        value: u32::from_be_bytes([v0, v1, v2, v3]),
    };
    let label = rest.get(..usize::from(u16::from_be_bytes([l0, l1])))?;
    Some((delivery, label))
}
