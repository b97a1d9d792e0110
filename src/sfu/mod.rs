//! The embedded SFU: the default target of a run, what a host is calibrated against, and the test
//! bed. It speaks LiveKit's signalling, so that real clients can join it; it is not a product SFU.
//!
//! Two halves, both sans-IO. The *lobby* (signalling) keeps rooms, participants, tokens and
//! descriptions: requests and media events go in, responses and media commands come out. The
//! *router* (media) keeps the connections of its rooms: datagrams, time and commands go in,
//! datagrams and events come out. Around them stand the edges: an axum server with the WebSockets
//! and the room service, and a thread a router with its one UDP socket.
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
mod track;
mod wire;
pub mod worker;

use crate::transport::rtp::Ssrc;
use std::net::SocketAddr;

use crate::codec::PayloadTypes;
pub use crate::net::SendMode;
use crate::transport::peer::{IceCredentials, PeerFailure};
use crate::transport::sdp::{ExtensionIds, Fingerprint};
use crate::units::Time;

/// What the names of the embedded SFU's threads start with.
pub const THREAD_PREFIX: &str = "sfu-";

/// One peer connection. Given out by the lobby, never twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransportId(pub u32);

/// One published track. Given out by the lobby, never twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrackId(pub u32);

/// One track on its way to one subscriber. Given out by the lobby, never twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SubscriptionId(pub u32);

/// Where a router's datagrams go. The backend lends the buffer that a packet is written into, so
/// nothing is copied on the way to the kernel.
pub trait Outgoing {
    /// The buffer for what is sent next: at least [`crate::net::SEND_BYTES_MAX`] bytes. Between two
    /// sends it is the same one, with what was written into it.
    fn lend(&mut self) -> &mut [u8];

    /// Sends the first `len` bytes of the lent buffer as datagrams of `segment` bytes (the last may
    /// be shorter).
    fn send(&mut self, to: SocketAddr, len: usize, segment: usize);
}

/// What the lobby asks of a router.
#[derive(Clone, Debug)]
pub enum MediaCommand {
    /// Both descriptions are known. The router is `ice-lite`: it answers checks and sends none.
    AddTransport {
        transport: TransportId,
        parameters: Box<TransportParameters>,
    },
    /// The connection has data channels: what comes on them goes to the others of its room.
    ServeData {
        transport: TransportId,
        parameters: Box<DataParameters>,
    },
    /// New ICE credentials on both sides; the DTLS session stays.
    RestartIce {
        transport: TransportId,
        local: IceCredentials,
        remote: IceCredentials,
    },
    /// Closes the connection, its tracks and the subscriptions that it carries.
    RemoveTransport {
        transport: TransportId,
    },
    /// A track that this connection will send us, once its description is agreed.
    AddTrack {
        transport: TransportId,
        track: TrackId,
        parameters: Box<TrackParameters>,
    },
    RemoveTrack {
        track: TrackId,
    },
    /// From now on `track` goes to `transport` as well.
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
    /// For good: neither the subscription nor its SSRCs come again. Under SRTP's keys an SSRC that
    /// began anew would seal two packets under one number.
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

/// Whose data it is, and where it goes.
#[derive(Clone, Debug)]
pub struct DataParameters {
    /// Connections of one room have the same.
    pub room: u32,
    /// The participant's.
    pub sid: Box<str>,
    /// As others address it.
    pub identity: Box<str>,
    /// Others are not told whose it is.
    pub hidden: bool,
    /// What the participant sends is for the others. Without: dropped, and counted.
    pub may_publish: bool,
    /// What others send goes this way.
    pub receives: bool,
    /// We open the channels, as on a connection whose offers are ours.
    pub opens: bool,
}

/// What a publisher's description and its AddTrack say of one track.
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

/// How a track's packets are told from others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Encodings {
    /// One encoding, by the SSRCs of its description.
    Ssrc { ssrc: Ssrc, rtx_ssrc: Option<Ssrc> },
    /// Simulcast layers from low to high, by their rid until the SSRC is known.
    Rids(Vec<Box<str>>),
    /// One encoding without `a=ssrc`: by mid.
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

/// What our description says of one track to its subscriber.
#[derive(Clone, Debug)]
pub struct SubscriptionParameters {
    pub ssrc: Ssrc,
    pub rtx_ssrc: Option<Ssrc>,
    pub payloads: PayloadTypes,
    pub rtx_payload_type: Option<u8>,
    pub extensions: ExtensionIds,
    pub selection: Selection,
}

/// Which of a track's layers a subscriber is to get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selection {
    /// `false`: nothing (the subscriber disabled the track, or its publisher muted it).
    pub enabled: bool,
    /// The highest layer wanted, 0 the smallest. A track with fewer layers gives its highest.
    pub layer: u8,
}

/// What a router tells the lobby.
#[derive(Clone, Debug, PartialEq)]
pub enum MediaEvent {
    /// DTLS is done: media may flow.
    Connected { transport: TransportId, at: Time },
    /// The connection is gone; the router has dropped it.
    Failed {
        transport: TransportId,
        failure: PeerFailure,
    },
    /// The first packet of a track came.
    TrackStarted { track: TrackId, at: Time },
    /// Loudness of the tracks that spoke in the last interval: dBov below full scale as the
    /// audio-level extension has it (0 the loudest), averaged.
    AudioLevels { levels: Vec<(TrackId, u8)> },
}
