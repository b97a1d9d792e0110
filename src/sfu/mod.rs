//! The embedded SFU: the default target of a run, what a host is calibrated against, and the test
//! bed. It speaks LiveKit's signalling, so that real clients can join it; it is not a product SFU.
//!
//! Two halves, both sans-IO. The *lobby* (signalling) keeps rooms, participants, tokens and
//! descriptions: requests and media events go in, responses and media commands come out. The
//! *router* (media) keeps the connections of its rooms: datagrams, time and commands go in,
//! datagrams and events come out. Around them stand the edges: an axum server with the WebSockets
//! and the room service, and a thread a router with its UDP socket and its TCP
//! connections.
//!
//! A room lives on one router, so a packet that came is forwarded without leaving its thread. The
//! types below are all that the halves know of each other.

pub mod bottleneck;
mod cache;
mod data;
mod due;
mod forward;
mod ingest;
pub mod lobby;
mod participant;
mod room;
pub mod router;
mod select;
pub mod server;
mod shared;
pub mod statistics;
mod streams;
mod track;
mod wire;
pub mod worker;

use crate::transport::rtp::Ssrc;
use std::net::SocketAddr;

use crate::codec::PayloadTypes;
pub use crate::net::SendMode;
use crate::path::{FarEnd, Via};
use crate::transport::peer::{IceCredentials, PeerFailure};
use crate::transport::sdp::{ExtensionIds, Fingerprint};
use crate::units::Time;

/// Prefix of the names of the embedded SFU's threads.
pub const THREAD_PREFIX: &str = "sfu-";

/// One peer connection. The lobby assigns the id, and never twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransportId(pub u32);

/// One published track. The lobby assigns the id, and never twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrackId(pub u32);

/// One track on its way to one subscriber. The lobby assigns the id, and never twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SubscriptionId(pub u32);

/// A client's end of what carries its datagrams. A UDP port and a TCP port of one number are two
/// ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClientEnd {
    pub address: SocketAddr,
    /// The datagrams are framed in a TCP connection (RFC 6544).
    pub is_stream: bool,
}

impl ClientEnd {
    /// The client's end of a TCP connection.
    pub fn stream(address: SocketAddr) -> ClientEnd {
        ClientEnd {
            address,
            is_stream: true,
        }
    }
}

/// Of UDP.
impl From<SocketAddr> for ClientEnd {
    fn from(address: SocketAddr) -> ClientEnd {
        ClientEnd {
            address,
            is_stream: false,
        }
    }
}

impl From<FarEnd> for ClientEnd {
    fn from(end: FarEnd) -> ClientEnd {
        ClientEnd {
            address: end.address,
            is_stream: matches!(end.via, Via::Tcp(_)),
        }
    }
}

/// The addresses at which a router takes media: the candidates that descriptions name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouterAddress {
    pub udp: SocketAddr,
    /// `None`: ICE over TCP is not served.
    pub tcp: Option<SocketAddr>,
}

/// UDP alone.
impl From<SocketAddr> for RouterAddress {
    fn from(udp: SocketAddr) -> RouterAddress {
        RouterAddress { udp, tcp: None }
    }
}

/// Destination of a router's datagrams. The backend lends the buffer that a packet is written into,
/// so nothing is copied on the way to the kernel.
pub trait Outgoing {
    /// Returns the buffer for the next send: at least [`crate::net::SEND_BYTES_MAX`] bytes. Between
    /// two sends it is the same buffer, with what was written into it.
    fn lend(&mut self) -> &mut [u8];

    /// Sends the first `len` bytes of the lent buffer as datagrams of `segment` bytes (the last may
    /// be shorter).
    fn send(&mut self, to: ClientEnd, len: usize, segment: usize);
}

/// Commands from the lobby to a router.
#[derive(Clone, Debug)]
pub enum MediaCommand {
    /// Adds a connection whose two descriptions are known. The router is `ice-lite`: it answers
    /// checks and sends none.
    AddTransport {
        transport: TransportId,
        parameters: Box<TransportParameters>,
    },
    /// The connection has data channels. Messages from them go to the other participants of its
    /// room.
    ServeData {
        transport: TransportId,
        parameters: Box<DataParameters>,
    },
    /// New ICE credentials on both sides. The DTLS session stays.
    RestartIce {
        transport: TransportId,
        local: IceCredentials,
        remote: IceCredentials,
    },
    /// Closes the connection, its tracks and the subscriptions that it carries.
    RemoveTransport {
        transport: TransportId,
    },
    /// Adds a track that this connection will send us once its description is agreed.
    AddTrack {
        transport: TransportId,
        track: TrackId,
        parameters: Box<TrackParameters>,
    },
    RemoveTrack {
        track: TrackId,
    },
    /// Starts sending `track` to `transport` as well.
    Subscribe {
        subscription: SubscriptionId,
        transport: TransportId,
        track: TrackId,
        parameters: Box<SubscriptionParameters>,
    },
    SetSelection {
        subscription: SubscriptionId,
        selection: Selection,
    },
    /// Ends the subscription for good: neither its id nor its SSRCs are used again. With unchanged
    /// SRTP keys, an SSRC that started again would seal two packets under one number.
    Unsubscribe {
        subscription: SubscriptionId,
    },
}

#[derive(Clone, Debug)]
pub struct TransportParameters {
    pub local: IceCredentials,
    pub remote: IceCredentials,
    pub remote_fingerprint: Fingerprint,
    /// We send the ClientHello.
    pub dtls_active: bool,
}

/// The participant of a connection with data channels, and where its data goes.
#[derive(Clone, Debug)]
pub struct DataParameters {
    /// Id of the room. All connections of one room have the same.
    pub room: u32,
    /// The participant's sid.
    pub sid: Box<str>,
    /// Identity by which other participants address it.
    pub identity: Box<str>,
    /// Other participants are not told who sent the data.
    pub hidden: bool,
    /// The participant may send data to others. Otherwise its data is dropped and counted.
    pub may_publish: bool,
    /// Data from other participants is sent over this connection.
    pub receives: bool,
    /// We open the channels, as on a connection whose offers are ours.
    pub opens: bool,
}

/// Parameters of one track, from its publisher's description and AddTrack.
#[derive(Clone, Debug)]
pub struct TrackParameters {
    pub payloads: PayloadTypes,
    pub mid: Box<str>,
    pub rtx_payload_type: Option<u8>,
    /// The extensions of its section that the answer accepts.
    pub extensions: ExtensionIds,
    /// `nack` was agreed.
    pub nack: bool,
    /// `transport-cc` was agreed: we send feedback.
    pub transport_cc: bool,
    pub encodings: Encodings,
}

impl TrackParameters {
    fn has_rtx(&self) -> bool {
        match self.encodings {
            Encodings::Ssrc { rtx_ssrc, .. } => rtx_ssrc.is_some(),
            Encodings::Rids(_) | Encodings::Mid => self.rtx_payload_type.is_some(),
        }
    }
}

/// How the packets of a track are recognised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Encodings {
    /// One encoding, recognised by the SSRCs of its description.
    Ssrc { ssrc: Ssrc, rtx_ssrc: Option<Ssrc> },
    /// Simulcast layers from low to high, recognised by their rid until the SSRC is known.
    Rids(Vec<Box<str>>),
    /// One encoding without `a=ssrc`, recognised by mid.
    Mid,
}

impl Encodings {
    fn count(&self) -> usize {
        match self {
            Encodings::Rids(rids) => rids.len(),
            Encodings::Ssrc { .. } | Encodings::Mid => 1,
        }
    }
}

/// Parameters of one track, from our description for its subscriber.
#[derive(Clone, Debug)]
pub struct SubscriptionParameters {
    pub ssrc: Ssrc,
    pub rtx_ssrc: Option<Ssrc>,
    pub payloads: PayloadTypes,
    pub rtx_payload_type: Option<u8>,
    pub extensions: ExtensionIds,
    pub selection: Selection,
}

/// The layers of a track that a subscriber is to get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selection {
    /// `false`: nothing is sent (the subscriber disabled the track, or its publisher muted it).
    pub enabled: bool,
    /// The highest layer wanted; 0 is the smallest. For a track with fewer layers, its highest is
    /// used.
    pub layer: u8,
}

/// Events from a router to the lobby.
#[derive(Clone, Debug, PartialEq)]
pub enum MediaEvent {
    /// DTLS is done: media may flow.
    Connected { transport: TransportId, at: Time },
    /// The connection has failed, and the router has dropped it.
    Failed {
        transport: TransportId,
        failure: PeerFailure,
    },
    /// The first packet of a track arrived.
    TrackStarted { track: TrackId, at: Time },
    /// Average loudness of the tracks that spoke in the last interval, as the audio-level
    /// extension gives it: dBov below full scale, 0 the loudest.
    AudioLevels { levels: Vec<(TrackId, u8)> },
}
