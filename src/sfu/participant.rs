//! A participant in the lobby: its identity, its peer connections, the tracks that it publishes and
//! the tracks that it gets.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use livekit_protocol as proto;
use prost::Message as _;

use super::shared::{ConnectionId, RoomId, SessionId, SfuShared};
use super::track::Settings;
use super::{
    DataParameters, MediaCommand, Selection, SubscriptionId, SubscriptionParameters, TrackId,
    TransportId, TransportParameters,
};
use crate::measure::Kind;
use crate::transport::peer::IceCredentials;
use crate::transport::sdp::serve::{AgreedMedia, ClientDescriptions, SentTrack, SubscriberOffer};
use crate::transport::sdp::{DtlsSetup, Fingerprint, LocalTransport, RemoteTransport};
use crate::units::Time;

pub(super) struct Participant {
    pub id: SessionId,
    /// Information about it that other participants get.
    pub info: proto::ParticipantInfo,
    /// Encoded form of `info`; see [`Participant::encode`].
    pub encoded: Bytes,
    pub permission: proto::ParticipantPermission,
    pub auto_subscribe: bool,
    pub adaptive_stream: bool,
    /// The current WebSocket, if any.
    pub connection: Option<ConnectionId>,
    /// Time at which the WebSocket was lost.
    pub lost_at: Option<Time>,
    pub joined_at: Time,
    /// The connection whose offers come from the client: the publisher connection, or the single
    /// one.
    pub answering: AnsweringPeer,
    /// The connection whose offers come from us: in dual mode, if it may subscribe.
    pub offering: Option<OfferingPeer>,
    pub single: bool,
    /// Tracks that were announced and are not yet in an offer.
    pub pending: Vec<PendingTrack>,
    pub published: BTreeSet<TrackId>,
    pub subscriptions: BTreeMap<TrackId, ParticipantSubscription>,
    /// Earliest time for the next exchange of descriptions; `None` if none is needed.
    pub negotiate_at: Option<Time>,
    pub negotiated_at: Option<Time>,
}

pub(super) struct PendingTrack {
    pub cid: String,
    pub info: proto::TrackInfo,
}

/// One track on its way to this participant.
pub(super) struct ParticipantSubscription {
    pub id: SubscriptionId,
    pub sent: SentTrack,
    pub settings: Settings,
    /// Index of its section in our offers, or in the client's (single connection).
    pub section: Option<usize>,
    /// State at the router; `None` before the descriptions are agreed on.
    pub live: Option<LiveSelection>,
}

#[derive(Clone, Copy)]
pub(super) struct LiveSelection {
    pub selection: Selection,
    pub wish: u8,
}

impl Participant {
    pub fn is_hidden(&self) -> bool {
        self.permission.hidden
    }

    pub fn is_active(&self) -> bool {
        self.info.state() == proto::participant_info::State::Active
    }

    /// Encodes `info` again after a change, with a new version.
    pub fn encode(&mut self) {
        self.info.version += 1;
        self.encoded = self.info.encode_to_vec().into();
    }

    /// The connection that must be up for the participant to count as connected.
    pub fn primary(&self) -> TransportId {
        self.offering
            .as_ref()
            .map_or(self.answering.transport, |peer| peer.transport)
    }

    pub fn transports(&self) -> impl Iterator<Item = (TransportId, bool)> {
        let offering = self
            .offering
            .as_ref()
            .map(|peer| (peer.transport, peer.link.is_added()));
        [
            Some((self.answering.transport, self.answering.link.is_added())),
            offering,
        ]
        .into_iter()
        .flatten()
    }

    /// The connection that carries the tracks sent to this participant.
    pub fn downlink(&self) -> Option<TransportId> {
        match &self.offering {
            Some(peer) => Some(peer.transport),
            None => self.single.then_some(self.answering.transport),
        }
    }

    /// Parameters for the router's handling of data on one of its connections.
    pub fn data_service(&self, room: RoomId, transport: TransportId) -> DataParameters {
        let offered = self.offering.as_ref().map(|peer| peer.transport);
        DataParameters {
            room: room.0,
            sid: self.info.sid.as_str().into(),
            identity: self.info.identity.as_str().into(),
            hidden: self.permission.hidden,
            may_publish: self.permission.can_publish_data && transport == self.answering.transport,
            receives: self.permission.can_subscribe && self.downlink() == Some(transport),
            opens: offered == Some(transport),
        }
    }

    /// Numbers of audio and video sections that the client would have to add to the single
    /// connection.
    pub fn missing_sections(&self) -> (u32, u32) {
        let missing = |kind| {
            self.subscriptions
                .values()
                .filter(|subscription| {
                    subscription.section.is_none() && subscription.kind() == kind
                })
                .count()
        };
        let spare = |kind| self.answering.free_sections(kind).count();
        let of =
            |kind| u32::try_from(missing(kind).saturating_sub(spare(kind))).unwrap_or(u32::MAX);
        (of(Kind::Audio), of(Kind::Video))
    }
}

impl ParticipantSubscription {
    /// Gives the subscription another id and other SSRCs from now on, because the router
    /// forgets the earlier ones.
    pub fn renew(&mut self, id: SubscriptionId) {
        let (ssrc, rtx_ssrc) = id.ssrcs();
        self.id = id;
        self.sent.ssrc = ssrc;
        self.sent.rtx_ssrc = self.sent.rtx_ssrc.map(|_| rtx_ssrc);
    }

    pub fn kind(&self) -> Kind {
        self.sent.codec.kind()
    }

    pub fn parameters(&self, media: AgreedMedia, selection: Selection) -> SubscriptionParameters {
        let rtx = self.sent.rtx_ssrc.zip(media.rtx_payload_type);
        SubscriptionParameters {
            ssrc: self.sent.ssrc,
            rtx_ssrc: rtx.map(|(ssrc, _)| ssrc),
            payloads: media.payloads,
            rtx_payload_type: rtx.map(|(_, payload_type)| payload_type),
            extensions: media.extensions,
            selection,
        }
    }
}

/// Our end of one connection, and what the router knows of both ends.
pub(super) struct ConnectionEnds {
    pub local: LocalTransport,
    /// Credentials of both ends at the router; `None` if it does not know the connection yet.
    known: Option<(IceCredentials, IceCredentials)>,
    fingerprint: Option<Fingerprint>,
}

impl ConnectionEnds {
    pub fn new(local: LocalTransport) -> ConnectionEnds {
        ConnectionEnds {
            local,
            known: None,
            fingerprint: None,
        }
    }

    pub fn is_added(&self) -> bool {
        self.known.is_some()
    }

    /// Whether a description from the client restarts ICE.
    pub fn is_restarted_by(&self, remote: &RemoteTransport) -> bool {
        self.known
            .as_ref()
            .is_some_and(|(_, known)| *known != remote_credentials(remote))
    }

    /// Whether the description belongs to another connection. A DTLS session is kept, and never
    /// replaced.
    pub fn is_replaced_by(&self, remote: &RemoteTransport) -> bool {
        self.fingerprint
            .is_some_and(|known| known != remote.fingerprint)
    }

    pub fn restart(&mut self, shared: &mut SfuShared) {
        let IceCredentials { ufrag, password } = IceCredentials::draw(&mut shared.secrets);
        (self.local.ufrag, self.local.pwd) = (ufrag, password);
    }

    /// Takes the client's description. Returns the command for the router, now that both
    /// descriptions are known.
    pub fn handle_remote(
        &mut self,
        transport: TransportId,
        remote: &RemoteTransport,
        dtls_active: bool,
    ) -> Option<MediaCommand> {
        let local = IceCredentials {
            ufrag: self.local.ufrag.clone(),
            password: self.local.pwd.clone(),
        };
        let now = (local.clone(), remote_credentials(remote));
        let before = self.known.replace(now.clone());
        self.fingerprint = Some(remote.fingerprint);
        match before {
            None => Some(MediaCommand::AddTransport {
                transport,
                parameters: Box::new(TransportParameters {
                    local,
                    remote: now.1,
                    remote_fingerprint: remote.fingerprint,
                    dtls_active,
                }),
            }),
            Some(before) if before != now => Some(MediaCommand::RestartIce {
                transport,
                local,
                remote: now.1,
            }),
            Some(_) => None,
        }
    }
}

fn remote_credentials(remote: &RemoteTransport) -> IceCredentials {
    IceCredentials {
        ufrag: remote.ufrag.clone(),
        password: remote.pwd.clone(),
    }
}

/// The connection whose offers come from the client.
pub(super) struct AnsweringPeer {
    pub transport: TransportId,
    pub link: ConnectionEnds,
    pub descriptions: ClientDescriptions,
    pub version: u64,
    /// Sections on which the client sends a track.
    pub received: BTreeMap<usize, TrackId>,
    /// Sections that carry our tracks (single connection).
    pub sent: BTreeMap<usize, TrackId>,
    /// Sections that carried our tracks in the last answer. Another track may use them only after
    /// an answer in which they were idle, or the client would take it for the old track (RFC 9429,
    /// section 5.10).
    pub last_sent: BTreeSet<usize>,
    /// Numbers of audio and video sections that the client was asked for since its last offer.
    pub requested: (u32, u32),
}

impl AnsweringPeer {
    pub fn new(transport: TransportId, local: LocalTransport) -> AnsweringPeer {
        AnsweringPeer {
            transport,
            link: ConnectionEnds::new(local),
            descriptions: ClientDescriptions::default(),
            version: 0,
            received: BTreeMap::new(),
            sent: BTreeMap::new(),
            last_sent: BTreeSet::new(),
            requested: (0, 0),
        }
    }

    /// Sections of the client's last offer that can take a track of this kind.
    pub fn free_sections(&self, kind: Kind) -> impl Iterator<Item = usize> {
        let sections = self.descriptions.sections().enumerate();
        sections.filter_map(move |(index, section)| {
            let fits = section.kind == Some(kind)
                && section.is_usable()
                && section.receives
                && !section.sends;
            (fits && !self.sent.contains_key(&index) && !self.last_sent.contains(&index))
                .then_some(index)
        })
    }
}

/// The subscriber connection of dual mode.
pub(super) struct OfferingPeer {
    pub transport: TransportId,
    pub link: ConnectionEnds,
    pub offer: SubscriberOffer,
    /// The track in each section.
    pub tracks: BTreeMap<usize, TrackId>,
    pub offer_id: u32,
    pub offered_at: Time,
}

impl OfferingPeer {
    pub fn new(transport: TransportId, local: LocalTransport) -> OfferingPeer {
        OfferingPeer {
            transport,
            link: ConnectionEnds::new(local),
            offer: SubscriberOffer::default(),
            tracks: BTreeMap::new(),
            offer_id: 0,
            offered_at: Time::ZERO,
        }
    }

    /// Adds a track to the next offer, and returns its section.
    pub fn add(&mut self, track: TrackId, sent: SentTrack) -> usize {
        let section = self.offer.add(sent);
        self.tracks.insert(section, track);
        section
    }

    pub fn remove(&mut self, section: usize) {
        self.offer.remove(section);
        self.tracks.remove(&section);
    }

    /// Draws new ICE credentials for the next offer.
    pub fn restart(&mut self, shared: &mut SfuShared) {
        self.link.restart(shared);
        self.offer.rewrite();
    }
}

/// Whether we take the active DTLS role, after an answer in which the client chose its own.
pub(super) fn dtls_active_beside(remote: &RemoteTransport) -> bool {
    remote.setup == DtlsSetup::Passive
}
