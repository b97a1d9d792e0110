//! A router with engine shards around it, over a seeded link in virtual time.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use throng::codec::{Codec, PayloadTypes};
use throng::engine::publisher::{MediaSource, Pacing, Redundancy, SendParameters};
use throng::engine::shard::Shard;
use throng::engine::{
    NewPeer, PeerKey, PeerOutcome, Roster, ShardCommand, ShardConfig, ShardEvent, StreamParameters,
};
use throng::measure::{Kind, Record};
use throng::media::identity::{FrameIdentity, Origin};
use throng::sfu::router::{Router, RouterConfig};
use throng::sfu::{
    ClientEnd, Encodings, MediaCommand, MediaEvent, Outgoing, Selection, SendMode, SubscriptionId,
    SubscriptionParameters, TrackId, TrackParameters, TransportId, TransportParameters,
};
use throng::transport::peer::{IceCredentials, Identity, PeerParameters};
use throng::transport::rtp::{Datagram as Class, classify};
use throng::transport::sdp::{Extension, ExtensionIds};
use throng::units::{Epoch, Time};

use super::link::{Conditions, Datagram, Link, Outlet, under_test};

pub const TICK: Duration = Duration::from_millis(1);
pub const ALL: Selection = Selection {
    enabled: true,
    layer: 2,
};
pub const AUDIO_LEVEL_ID: u8 = 1;

pub fn router_address() -> SocketAddr {
    "192.0.2.100:7882".parse().unwrap()
}

pub fn client_address(client: usize) -> SocketAddr {
    format!("198.51.100.{}:{}", client + 1, 1_000 + client)
        .parse()
        .unwrap()
}

pub fn level_extension(kind: Kind) -> ExtensionIds {
    (kind == Kind::Audio)
        .then_some((Extension::AudioLevel, AUDIO_LEVEL_ID))
        .into_iter()
        .collect()
}

/// A router's outlet. It collects the datagrams that the router sends.
pub struct RouterOutlet {
    pub sent: Vec<Datagram>,
    buffer: Vec<u8>,
}

impl RouterOutlet {
    pub fn new() -> RouterOutlet {
        RouterOutlet {
            sent: Vec::new(),
            buffer: vec![0; throng::net::SEND_BYTES_MAX],
        }
    }
}

impl Outgoing for RouterOutlet {
    fn lend(&mut self) -> &mut [u8] {
        &mut self.buffer
    }

    fn send(&mut self, to: ClientEnd, len: usize, segment: usize) {
        under_test(false, || {
            for bytes in self.buffer[..len].chunks(segment) {
                self.sent.push(Datagram {
                    from: router_address(),
                    to: to.address,
                    bytes: bytes.to_vec(),
                });
            }
        });
    }
}

/// A carrier of datagrams between the clients and the router.
pub trait Wire {
    /// Tells the wire that a client's connection is about to be made.
    fn add(&mut self, _end: &WireEnd<'_>, _now: Time) {}

    fn send(&mut self, datagram: Datagram, now: Time);

    /// Returns the next datagram that has arrived by `now`.
    fn poll(&mut self, now: Time) -> Option<(Time, Datagram)>;
}

/// Parameters by which the two ends of a connection reach and identify each other.
pub struct WireEnd<'a> {
    pub identity: &'a Identity,
    pub epoch: Epoch,
    pub client: SocketAddr,
    pub client_credentials: &'a IceCredentials,
    pub router_credentials: &'a IceCredentials,
    /// Whether the router opens DTLS.
    pub router_active: bool,
}

impl Wire for Link {
    fn send(&mut self, datagram: Datagram, now: Time) {
        Link::send(self, datagram, now);
    }

    fn poll(&mut self, now: Time) -> Option<(Time, Datagram)> {
        Link::poll(self, now)
    }
}

pub struct Client {
    pub shard: Shard,
    pub outlet: Outlet,
    pub connected: bool,
    pub failed: bool,
}

/// Number of RTP datagrams of one SSRC that were sent over one client's leg of the link, and of
/// those that arrived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LegCount {
    pub sent: u64,
    pub arrived: u64,
}

/// Direction of an RTP datagram: up from this client, or down to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leg {
    Up(usize),
    Down(usize),
}

/// Decides whether an RTP datagram with this SSRC and sequence number is lost on a leg.
pub type Loss = Box<dyn FnMut(Leg, u32, u16) -> bool>;

pub struct Relay<W = Link> {
    pub router: Router,
    pub outlet: RouterOutlet,
    pub clients: Vec<Client>,
    pub link: W,
    pub now: Time,
    pub roster: Arc<Roster>,
    pub events: Vec<MediaEvent>,
    /// Counts by `(client, up, ssrc)`.
    pub legs: HashMap<(usize, bool, u32), LegCount>,
    /// Number of datagrams that reached the router. `router_out` counts those that it sent.
    pub router_in: u64,
    pub router_out: u64,
    /// Number of set-up datagrams in either direction. They matter because the ICE and DTLS
    /// libraries allocate.
    pub setup_datagrams: u64,
    /// Outcomes of all clients, after [`Relay::finish`].
    pub outcomes: Vec<PeerOutcome>,
    /// Loss in addition to that of the link.
    pub loss: Loss,
    pub keep: bool,
    /// Datagrams that reached clients while `keep` was set.
    pub kept: Vec<(Time, usize, Vec<u8>)>,
}

impl Relay {
    /// Returns `clients` clients, each with one connection that is up. The link is perfect until
    /// its conditions are changed. With `active` the router opens DTLS.
    pub fn connected(clients: usize, send: SendMode, active: bool, seed: u64) -> Relay {
        Relay::over(
            Link::new(Conditions::default(), seed),
            clients,
            send,
            active,
            seed,
        )
    }
}

impl<W: Wire> Relay<W> {
    /// The same over any wire.
    pub fn over(wire: W, clients: usize, send: SendMode, active: bool, seed: u64) -> Relay<W> {
        let (identity, epoch) = (Identity::generate().unwrap(), Epoch::read());
        let roster = Arc::new(Roster::new(77, (0..clients).map(|_| 0)));
        let config = ShardConfig {
            identity: identity.clone(),
            roster: roster.clone(),
            epoch,
        };
        let router = Router::new(
            RouterConfig {
                identity: identity.clone(),
                epoch,
                local: router_address().into(),
                send,
                seed,
            },
            Time::ZERO,
        );
        let mut relay = Relay {
            router,
            outlet: RouterOutlet::new(),
            clients: Vec::new(),
            link: wire,
            now: Time::ZERO,
            roster,
            events: Vec::new(),
            legs: HashMap::new(),
            router_in: 0,
            router_out: 0,
            setup_datagrams: 0,
            outcomes: Vec::new(),
            loss: Box::new(|_, _, _| false),
            keep: false,
            kept: Vec::new(),
        };
        for client in 0..clients {
            let (ours, theirs) = (IceCredentials::random(), IceCredentials::random());
            let end = WireEnd {
                identity: &identity,
                epoch,
                client: client_address(client),
                client_credentials: &theirs,
                router_credentials: &ours,
                router_active: active,
            };
            relay.link.add(&end, Time::ZERO);
            let mut outlet = Outlet::new(vec![client_address(client)]);
            let mut shard = Shard::new(config.clone(), 1, Time::ZERO);
            let peer = NewPeer {
                participant: client as u32,
                room: 0,
                parameters: PeerParameters {
                    local_address: client_address(client),
                    local: theirs.clone(),
                    remote: ours.clone(),
                    remote_fingerprint: identity.fingerprint(),
                    remote_candidates: vec![router_address()],
                    ice_controlling: true,
                    dtls_active: !active,
                },
                rtcp_ssrc: Ssrc(9 + client as u32),
                cname: format!("client-{client}"),
                obeys_bandwidth: false,
                data: None,
                intended_at: Time::ZERO,
            };
            // The client may be first. The router then keeps its connectivity check until it is
            // told of the connection.
            shard.add_peer(PeerKey(0), peer, Time::ZERO, &mut outlet);
            relay.clients.push(Client {
                shard,
                outlet,
                connected: false,
                failed: false,
            });
            relay.command(MediaCommand::AddTransport {
                transport: TransportId(client as u32),
                parameters: Box::new(TransportParameters {
                    local: ours,
                    remote: theirs,
                    remote_fingerprint: identity.fingerprint(),
                    dtls_active: active,
                }),
            });
        }
        while relay.clients.iter().any(|client| !client.connected) {
            assert!(relay.now < Time::from_millis(5_000), "not connected");
            relay.tick();
        }
        relay
    }

    pub fn command(&mut self, command: MediaCommand) {
        self.router
            .handle_command(command, self.now, &mut self.outlet);
    }

    /// Publishes one source from `client`. Returns its track.
    pub fn publish(&mut self, client: usize, source: &MediaSource, pacing: Pacing) -> TrackId {
        self.publish_with(client, source, pacing, None)
    }

    /// The same, with redundancy.
    pub fn publish_with(
        &mut self,
        client: usize,
        source: &MediaSource,
        pacing: Pacing,
        redundancy: Option<Redundancy>,
    ) -> TrackId {
        let index = match source.kind() {
            Kind::Audio => 0,
            Kind::Video => 1,
        };
        let payload_type = 96 + index as u8;
        let payloads = match redundancy {
            Some(redundancy) => PayloadTypes {
                wrapped: Some(payload_type),
                ..PayloadTypes::of(Codec::Red, redundancy.payload_type)
            },
            None => PayloadTypes::of(source.codec(), payload_type),
        };
        let track = TrackId(client as u32 * 10 + index);
        let ssrc = Ssrc(0x1000_0000 + track.0 * 16);
        let rtx_ssrc = (source.kind() == Kind::Video).then_some(Ssrc(ssrc.0 + 1));
        self.command(MediaCommand::AddTrack {
            transport: TransportId(client as u32),
            track,
            parameters: Box::new(TrackParameters {
                payloads,
                mid: index.to_string().into(),
                rtx_payload_type: rtx_ssrc.map(|_| 100),
                extensions: level_extension(source.kind()),
                nack: true,
                transport_cc: false,
                encodings: Encodings::Ssrc { ssrc, rtx_ssrc },
            }),
        });
        let first_frame_at = self.now + TICK;
        let identity = FrameIdentity {
            run: 77,
            origin: Origin {
                publisher: client as u32,
                track: index as u8,
            },
            ..FrameIdentity::default()
        };
        self.roster
            .set_published(&identity, first_frame_at, source.frame_interval());
        let tracks = vec![SendParameters {
            source: source.clone(),
            ssrc,
            rtx_ssrc,
            payload_type,
            rtx_payload_type: rtx_ssrc.map(|_| 100),
            redundancy,
            transport_cc_extension: None,
            audio_level_extension: (index == 0).then_some(AUDIO_LEVEL_ID),
            simulcast: None,
            talk: None,
            pacing,
            identity,
            seed: 5 + u64::from(track.0),
            first_frame_at,
        }];
        let publisher = &mut self.clients[client];
        publisher.shard.handle_command(
            ShardCommand::Publish {
                key: PeerKey(0),
                tracks,
            },
            self.now,
            &mut publisher.outlet,
        );
        track
    }

    /// Subscribes a client to a track. Returns the subscription and its SSRCs.
    pub fn subscribe(
        &mut self,
        client: usize,
        track: TrackId,
        kind: Kind,
    ) -> (SubscriptionId, Ssrc, Option<Ssrc>) {
        let payloads = PayloadTypes::of(Codec::default_of(kind), 110);
        self.subscribe_with(client, track, payloads)
    }

    /// The same, for a client that accepts these payload types.
    pub fn subscribe_with(
        &mut self,
        client: usize,
        track: TrackId,
        payloads: PayloadTypes,
    ) -> (SubscriptionId, Ssrc, Option<Ssrc>) {
        let kind = payloads.codec.kind();
        let subscription = SubscriptionId(client as u32 * 1_000 + track.0);
        let ssrc = Ssrc(0x2000_0000 + subscription.0 * 16);
        let rtx_ssrc = (kind == Kind::Video).then_some(Ssrc(ssrc.0 + 1));
        self.command(MediaCommand::Subscribe {
            subscription,
            transport: TransportId(client as u32),
            track,
            parameters: Box::new(SubscriptionParameters {
                ssrc,
                rtx_ssrc,
                payloads,
                rtx_payload_type: rtx_ssrc.map(|_| 111),
                extensions: level_extension(kind),
                selection: ALL,
            }),
        });
        let streams = vec![StreamParameters {
            payloads,
            ssrc,
            rtx_ssrc,
            nack: true,
            transport_cc_extension: None,
            abs_send_time_extension: None,
            announced_at: self.now,
        }];
        let subscriber = &mut self.clients[client];
        subscriber.shard.handle_command(
            ShardCommand::Subscribe {
                key: PeerKey(0),
                streams,
            },
            self.now,
            &mut subscriber.outlet,
        );
        (subscription, ssrc, rtx_ssrc)
    }

    pub fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.tick();
        }
    }

    /// Stops the media, waits until what is on its way has arrived, and returns each client's
    /// record.
    pub fn finish(&mut self) -> Vec<Record> {
        for client in &mut self.clients {
            client
                .shard
                .handle_command(ShardCommand::StopPublishing, self.now, &mut client.outlet);
        }
        self.run_for(Duration::from_millis(2_500));
        let outcomes = &mut self.outcomes;
        let settle = |client: &mut Client| {
            outcomes.extend(client.shard.finish());
            *client.shard.swap_record(Box::default())
        };
        self.clients.iter_mut().map(settle).collect()
    }

    /// Advances time by one millisecond: takes what has arrived, runs timers, then sends what was
    /// queued.
    pub fn tick(&mut self) {
        self.now += TICK;
        let now = self.now;
        while let Some((at, datagram)) = self.link.poll(now) {
            self.deliver(datagram, at);
        }
        let (router, outlet) = (&mut self.router, &mut self.outlet);
        under_test(true, || router.end_batch(now, outlet));
        if router.next_timeout() <= now {
            under_test(true, || router.handle_timeout(now, outlet));
        }
        while let Some(event) = router.poll_event() {
            self.events.push(event);
        }
        for index in 0..self.clients.len() {
            let client = &mut self.clients[index];
            client.shard.handle_media_timers(now, &mut client.outlet);
            client.shard.handle_control_timers(now, &mut client.outlet);
            while let Some((_, event)) = client.shard.poll_event() {
                client.connected |= matches!(event, ShardEvent::Connected { .. });
                client.failed |= matches!(event, ShardEvent::Failed { .. });
            }
            for datagram in std::mem::take(&mut client.outlet.sent) {
                self.count(index, true, &datagram.bytes, false);
                if !self.is_lost(Leg::Up(index), &datagram.bytes) {
                    self.link.send(datagram, now);
                }
            }
        }
        for datagram in std::mem::take(&mut self.outlet.sent) {
            self.router_out += 1;
            self.count_setup(&datagram.bytes);
            let client = self.client_at(datagram.to);
            if let Some(client) = client {
                self.count(client, false, &datagram.bytes, false);
            }
            if !client.is_some_and(|client| self.is_lost(Leg::Down(client), &datagram.bytes)) {
                self.link.send(datagram, now);
            }
        }
    }

    fn is_lost(&mut self, leg: Leg, bytes: &[u8]) -> bool {
        super::pair::ssrc_and_seq(bytes).is_some_and(|(ssrc, seq)| (self.loss)(leg, ssrc, seq))
    }

    fn client_at(&self, address: SocketAddr) -> Option<usize> {
        (0..self.clients.len()).find(|client| client_address(*client) == address)
    }

    fn count_setup(&mut self, bytes: &[u8]) {
        self.setup_datagrams += u64::from(matches!(classify(bytes), Class::Stun | Class::Dtls));
    }

    fn count(&mut self, client: usize, up: bool, bytes: &[u8], arrived: bool) {
        if let Some((ssrc, _)) = super::pair::ssrc_and_seq(bytes) {
            let leg = self.legs.entry((client, up, ssrc)).or_default();
            *(if arrived {
                &mut leg.arrived
            } else {
                &mut leg.sent
            }) += 1;
        }
    }

    fn deliver(&mut self, mut datagram: Datagram, at: Time) {
        let now = self.now;
        if datagram.to == router_address() {
            self.router_in += 1;
            self.count_setup(&datagram.bytes);
            if let Some(client) = self.client_at(datagram.from) {
                self.count(client, true, &datagram.bytes, true);
            }
            let (router, outlet) = (&mut self.router, &mut self.outlet);
            under_test(true, || {
                router.handle_datagram(&mut datagram.bytes, datagram.from, at, now, outlet)
            });
            return;
        }
        let Some(index) = self.client_at(datagram.to) else {
            return;
        };
        self.count(index, false, &datagram.bytes, true);
        if self.keep {
            self.kept.push((at, index, datagram.bytes.clone()));
        }
        let client = &mut self.clients[index];
        match classify(&datagram.bytes) {
            Class::Rtp => client.shard.handle_rtp(PeerKey(0), &mut datagram.bytes, at),
            Class::Rtcp => client.shard.handle_rtcp(
                PeerKey(0),
                &mut datagram.bytes,
                at,
                now,
                &mut client.outlet,
            ),
            _ => client.shard.handle_setup_datagram(
                PeerKey(0),
                &datagram.bytes,
                datagram.from,
                at,
                now,
                &mut client.outlet,
            ),
        }
    }

    pub fn leg(&self, client: usize, up: bool, ssrc: Ssrc) -> LegCount {
        self.legs
            .get(&(client, up, ssrc.0))
            .copied()
            .unwrap_or_default()
    }
}
