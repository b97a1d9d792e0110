//! Tests of data channels through the embedded SFU's router, with str0m as its clients. The clients
//! agree on a description, begin an SCTP association, and wait for it. A client may hold back
//! everything that follows until the association is up (the Go SDK takes no track of a later
//! description), so the router must serve it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use livekit_protocol as proto;
use livekit_protocol::data_packet::Value;
use prost::Message as _;
use sctp_proto::{
    Association, AssociationHandle, ClientConfig, DatagramEvent, Endpoint, EndpointConfig, Payload,
    PayloadProtocolIdentifier,
};
use str0m::change::{SdpAnswer, SdpOffer};
use str0m::channel::{ChannelConfig, ChannelId, Reliability};
use str0m::config::DtlsVersion;
use str0m::crypto::from_feature_flags;
use str0m::net::{Protocol, Receive};
use str0m::{Candidate, Event, Input, Output, Rtc, RtcConfig};
use throng::seeded::Seeded;
use throng::sfu::router::{Router, RouterConfig};
use throng::sfu::{DataParameters, MediaCommand, SendMode, TransportId, TransportParameters};
use throng::transport::data::{DataRole, DataTransport, MESSAGE_BYTES_MAX};
use throng::transport::peer::{IceCredentials, Identity};
use throng::transport::sdp::serve::{
    ClientDescriptions, SectionUse, SubscriberOffer, write_answer,
};
use throng::transport::sdp::{
    Candidate as SdpCandidate, DtlsSetup, LocalTransport, RemoteTransport,
};
use throng::units::{Epoch, Time};

use crate::common::relay::{RouterOutlet, router_address};

const ROOM: u32 = 7;

/// One connection of a client.
struct Caller {
    rtc: Rtc,
    address: SocketAddr,
    open: Vec<(ChannelId, String)>,
    got: Vec<(String, proto::DataPacket)>,
}

struct Exchange {
    router: Router,
    outlet: RouterOutlet,
    identity: Identity,
    epoch: Epoch,
    now: Time,
    callers: Vec<Caller>,
}

impl Exchange {
    fn new() -> Exchange {
        let (identity, epoch) = (Identity::generate().unwrap(), Epoch::read());
        let config = RouterConfig {
            identity: identity.clone(),
            epoch,
            local: router_address().into(),
            send: SendMode::Plain,
            seed: 5,
        };
        Exchange {
            router: Router::new(config, Time::ZERO),
            outlet: RouterOutlet::new(),
            identity,
            epoch,
            now: Time::ZERO,
            callers: Vec::new(),
        }
    }

    /// Adds a connection whose offer comes from the client and has LiveKit's two channels.
    fn add_calling(&mut self, data: DataParameters) -> usize {
        let (mut rtc, address) = self.client();
        let mut change = rtc.sdp_api();
        for (label, ordered, reliability) in [
            (
                "_lossy",
                false,
                Reliability::MaxRetransmits { retransmits: 0 },
            ),
            ("_reliable", true, Reliability::Reliable),
        ] {
            change.add_channel_with_config(ChannelConfig {
                label: label.to_owned(),
                ordered,
                reliability,
                ..ChannelConfig::default()
            });
        }
        let (offer, pending) = change.apply().unwrap();
        let mut descriptions = ClientDescriptions::default();
        let remote = descriptions.read(&offer.to_sdp_string()).unwrap().remote;
        let local = self.local(DtlsSetup::Passive);
        let answer = write_answer(&mut descriptions, &local, 1, |_, _| SectionUse::Idle);
        let answer = SdpAnswer::from_sdp_string(&answer).unwrap();
        rtc.sdp_api().accept_answer(pending, answer).unwrap();
        self.add(rtc, address, (local, remote), data)
    }

    /// Adds a connection whose offer comes from the server. The server opens the channels.
    fn add_called(&mut self, data: DataParameters) -> usize {
        let (mut rtc, address) = self.client();
        let local = self.local(DtlsSetup::ActPass);
        let mut offers = SubscriberOffer::default();
        // Where the offer allows it, str0m leaves the ClientHello and the association to us. No SDK
        // does that, so this offer does not allow it.
        let offer = offers
            .offer(&local)
            .replace("setup:actpass", "setup:passive");
        let offer = SdpOffer::from_sdp_string(&offer).unwrap();
        let answer = rtc.sdp_api().accept_offer(offer).unwrap();
        let (remote, _) = offers.answered(&answer.to_sdp_string()).unwrap();
        assert_eq!(remote.setup, DtlsSetup::Active);
        self.add(rtc, address, (local, remote), data)
    }

    fn client(&mut self) -> (Rtc, SocketAddr) {
        let index = self.callers.len();
        let address = format!("203.0.113.{}:{}", index + 1, 3_000 + index);
        let address = address.parse().unwrap();
        let mut rtc = RtcConfig::new()
            .set_crypto_provider(Arc::new(from_feature_flags()))
            .set_dtls_version(DtlsVersion::Dtls12)
            .build(self.epoch.instant(self.now));
        rtc.add_local_candidate(Candidate::host(address, Protocol::Udp).unwrap());
        (rtc, address)
    }

    fn local(&self, setup: DtlsSetup) -> LocalTransport {
        let IceCredentials { ufrag, password } = IceCredentials::random();
        LocalTransport {
            ufrag,
            pwd: password,
            fingerprint: self.identity.fingerprint(),
            setup,
            candidates: vec![SdpCandidate::host(router_address())],
            session_id: 1,
        }
    }

    fn add(
        &mut self,
        rtc: Rtc,
        address: SocketAddr,
        (local, remote): (LocalTransport, RemoteTransport),
        data: DataParameters,
    ) -> usize {
        let index = self.callers.len();
        let transport = TransportId(index as u32);
        let parameters = Box::new(TransportParameters {
            local: IceCredentials {
                ufrag: local.ufrag,
                password: local.pwd,
            },
            remote: IceCredentials {
                ufrag: remote.ufrag,
                password: remote.pwd,
            },
            remote_fingerprint: remote.fingerprint,
            dtls_active: false,
        });
        for command in [
            MediaCommand::AddTransport {
                transport,
                parameters,
            },
            MediaCommand::ServeData {
                transport,
                parameters: Box::new(data),
            },
        ] {
            let outlet = &mut self.outlet;
            self.router.handle_command(command, self.now, outlet);
        }
        self.callers.push(Caller {
            rtc,
            address,
            open: Vec::new(),
            got: Vec::new(),
        });
        index
    }

    /// Advances time by one millisecond. Datagrams arrive without delay.
    fn step(&mut self) {
        self.now += Duration::from_millis(1);
        let (now, instant) = (self.now, self.epoch.instant(self.now));
        for index in 0..self.callers.len() {
            let caller = &mut self.callers[index];
            caller.rtc.handle_input(Input::Timeout(instant)).unwrap();
            for mut bytes in caller.poll() {
                let from = self.callers[index].address;
                self.router
                    .handle_datagram(&mut bytes, from, now, now, &mut self.outlet);
            }
        }
        self.router.handle_timeout(now, &mut self.outlet);
        for datagram in std::mem::take(&mut self.outlet.sent) {
            let mut callers = self.callers.iter_mut();
            let caller = callers
                .find(|caller| caller.address == datagram.to)
                .unwrap();
            let received = Receive::new(Protocol::Udp, datagram.from, datagram.to, &datagram.bytes);
            let input = Input::Receive(instant, received.unwrap());
            caller.rtc.handle_input(input).unwrap();
        }
    }

    fn step_until(&mut self, what: &str, mut holds: impl FnMut(&Exchange) -> bool) {
        for _ in 0..10_000 {
            if holds(self) {
                return;
            }
            self.step();
        }
        panic!("{what}: not within ten seconds");
    }

    fn send(&mut self, from: usize, label: &str, payload: &[u8]) {
        let caller = &mut self.callers[from];
        let mut open = caller.open.iter();
        let (id, _) = open.find(|(_, open)| open == label).expect("it is open");
        assert!(
            caller
                .rtc
                .channel(*id)
                .unwrap()
                .write(true, payload)
                .unwrap()
        );
    }

    fn is_open(&self, caller: usize) -> bool {
        let mut labels: Vec<&str> = self.callers[caller]
            .open
            .iter()
            .map(|(_, label)| &**label)
            .collect();
        labels.sort_unstable();
        labels == ["_lossy", "_reliable"]
    }
}

impl Caller {
    fn poll(&mut self) -> Vec<Vec<u8>> {
        let mut sent = Vec::new();
        loop {
            match self.rtc.poll_output().unwrap() {
                Output::Timeout(_) => return sent,
                Output::Transmit(transmit) => sent.push(transmit.contents.to_vec()),
                Output::Event(Event::ChannelOpen(id, label)) => self.open.push((id, label)),
                Output::Event(Event::ChannelData(data)) => {
                    let mut open = self.open.iter();
                    let (_, label) = open.find(|(id, _)| *id == data.id).unwrap();
                    let packet = proto::DataPacket::decode(&*data.data).unwrap();
                    self.got.push((label.clone(), packet));
                }
                Output::Event(_) => {}
            }
        }
    }
}

fn of(identity: &str) -> DataParameters {
    DataParameters {
        room: ROOM,
        sid: format!("PA_{identity}").into(),
        identity: identity.into(),
        hidden: false,
        may_publish: true,
        receives: true,
        opens: false,
    }
}

/// Returns a data packet as clients write it. The sender that it names is wrong on purpose.
#[allow(deprecated)]
fn said(text: &str, destinations: &[&str]) -> Vec<u8> {
    let user = proto::UserPacket {
        participant_identity: "somebody else".to_owned(),
        payload: text.as_bytes().to_vec(),
        ..Default::default()
    };
    let packet = proto::DataPacket {
        participant_identity: "somebody else".to_owned(),
        destination_identities: destinations.iter().map(|&to| to.to_owned()).collect(),
        value: Some(Value::User(user)),
        ..Default::default()
    };
    packet.encode_to_vec()
}

/// Returns the channel, text and sender of each message that was received.
#[allow(deprecated)]
fn heard(caller: &Caller) -> Vec<(&str, &str, &str)> {
    let got = caller.got.iter().map(|(label, packet)| {
        let Some(Value::User(user)) = &packet.value else {
            panic!("no text: {packet:?}");
        };
        assert_eq!(user.participant_identity, packet.participant_identity);
        let text = std::str::from_utf8(&user.payload).unwrap();
        (&**label, text, &*packet.participant_identity)
    });
    got.collect()
}

#[test]
fn an_association_that_a_client_waits_for_comes_up_whoever_opens_the_channels() {
    let mut exchange = Exchange::new();
    let calling = exchange.add_calling(of("calls"));
    let called = exchange.add_called(DataParameters {
        opens: true,
        ..of("is called")
    });
    exchange.step_until("channels of both", |exchange| {
        exchange.is_open(calling) && exchange.is_open(called)
    });
}

#[test]
fn what_one_sends_the_others_of_its_room_get_once_and_it_says_who_sent_it() {
    let mut exchange = Exchange::new();
    let ann = exchange.add_calling(of("ann"));
    // Bob has two connections, like clients that do not use LiveKit's single connection.
    let bob_up = exchange.add_calling(DataParameters {
        receives: false,
        ..of("bob")
    });
    let bob_down = exchange.add_called(DataParameters {
        may_publish: false,
        opens: true,
        ..of("bob")
    });
    let eve = exchange.add_calling(DataParameters {
        room: ROOM + 1,
        ..of("eve")
    });
    let mute = exchange.add_calling(DataParameters {
        may_publish: false,
        ..of("mute")
    });
    let all = [ann, bob_up, bob_down, eve, mute];
    exchange.step_until("all channels", |exchange| {
        all.iter().all(|caller| exchange.is_open(*caller))
    });
    exchange.send(ann, "_reliable", &said("to all", &[]));
    exchange.send(bob_up, "_lossy", &said("quick", &[]));
    exchange.send(bob_up, "_reliable", &said("to ann", &["ann"]));
    exchange.send(mute, "_reliable", &said("unheard", &[]));
    exchange.send(eve, "_reliable", &said("elsewhere", &[]));
    exchange.send(ann, "_reliable", b"\xFFno packet");
    (0..300).for_each(|_| exchange.step());

    let callers = &exchange.callers;
    let mut of_ann = heard(&callers[ann]);
    of_ann.sort_unstable();
    assert_eq!(
        of_ann,
        [("_lossy", "quick", "bob"), ("_reliable", "to ann", "bob")]
    );
    assert_eq!(heard(&callers[bob_down]), [("_reliable", "to all", "ann")]);
    assert_eq!(heard(&callers[bob_up]), []);
    assert_eq!(heard(&callers[eve]), []);
    let mut of_mute = heard(&callers[mute]);
    of_mute.sort_unstable();
    assert_eq!(
        of_mute,
        [("_lossy", "quick", "bob"), ("_reliable", "to all", "ann")]
    );
    let statistics = exchange.router.statistics();
    assert_eq!(
        (
            statistics.data_in,
            statistics.data_out,
            statistics.data_refused,
            statistics.data_dropped
        ),
        (6, 5, 2, 0)
    );
}

#[test]
fn messages_of_many_chunks_arrive_whole_and_in_order() {
    let mut exchange = Exchange::new();
    let from = exchange.add_calling(of("from"));
    let to = exchange.add_called(DataParameters {
        opens: true,
        ..of("to")
    });
    exchange.step_until("channels", |exchange| {
        exchange.is_open(from) && exchange.is_open(to)
    });
    // LiveKit's limit for user packets is 15 KiB.
    let texts: Vec<String> = (0..20_usize)
        .map(|number| format!("{number} ").repeat(number * 300 + 1))
        .collect();
    for text in &texts {
        exchange.send(from, "_reliable", &said(text, &[]));
        (0..20).for_each(|_| exchange.step());
    }
    exchange.step_until("all of them", |exchange| {
        exchange.callers[to].got.len() == texts.len()
    });
    let heard = heard(&exchange.callers[to]);
    assert!(heard.iter().map(|(_, text, _)| *text).eq(&texts));
}

/// A client that speaks only SCTP and damages some of its packets.
struct Liar {
    endpoint: Endpoint,
    association: Option<(AssociationHandle, Association)>,
    chance: Seeded,
}

impl Liar {
    fn address() -> SocketAddr {
        "192.0.2.1:5000".parse().unwrap()
    }

    fn new(seed: u64) -> Liar {
        Liar {
            endpoint: Endpoint::new(Arc::new(EndpointConfig::new()), None),
            association: None,
            chance: Seeded::new(seed),
        }
    }

    fn act(&mut self, now: Instant) -> Vec<Vec<u8>> {
        if self
            .association
            .as_ref()
            .is_none_or(|(_, known)| known.is_closed())
        {
            let begun = self.endpoint.connect(ClientConfig::new(), Liar::address());
            self.association = Some(begun.unwrap());
        }
        let (_, association) = self.association.as_mut().unwrap();
        association.handle_timeout(now);
        while association.poll().is_some() {}
        // Now and then the client opens so many channels that the association is given up.
        let channels = if self.chance.chance(1) { 40 } else { 12 };
        let id = self.chance.below(channels) as u16;
        if !association.is_handshaking() {
            let _ = association.open_stream(id, PayloadProtocolIdentifier::Binary);
        }
        if let Ok(mut stream) = association.stream(id) {
            let len = self.chance.below(3_000) as usize;
            let open = [&[3, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0][..], b"_reliable"].concat();
            let (message, kind) = if self.chance.below(2) == 0 {
                (open, PayloadProtocolIdentifier::Dcep)
            } else {
                (vec![7; len], PayloadProtocolIdentifier::Binary)
            };
            let _ = stream.write_with_ppi(&message, kind);
            if self.chance.below(20) == 0 {
                let _ = stream.close();
            }
        }
        let mut packets = Vec::new();
        while let Some(transmit) = association.poll_transmit(now) {
            if let Payload::RawEncode(raw) = transmit.payload {
                packets.extend(raw.into_iter().map(|packet| packet.to_vec()));
            }
        }
        packets.iter_mut().for_each(|packet| self.spoil(packet));
        packets
    }

    /// Damages one packet in twenty. The checksum is that of the damaged packet.
    fn spoil(&mut self, packet: &mut Vec<u8>) {
        if self.chance.below(20) > 0 {
            return;
        }
        for _ in 0..=self.chance.below(3) {
            let at = self.chance.below(packet.len() as u64) as usize;
            packet[at] = self.chance.draw() as u8;
        }
        if self.chance.below(4) == 0 {
            packet.truncate(12 + self.chance.below(packet.len() as u64) as usize);
        }
        if packet.len() >= 12 {
            packet[8..12].fill(0);
            let checksum = crc32c(packet);
            packet[8..12].copy_from_slice(&checksum.to_le_bytes());
        }
    }

    fn hear(&mut self, packet: Bytes, now: Instant) {
        let event = self
            .endpoint
            .handle(now, Liar::address(), None, None, packet);
        if let (Some((handle, DatagramEvent::AssociationEvent(event))), Some((known, association))) =
            (event, &mut self.association)
            && handle == *known
        {
            association.handle_event(event);
        }
    }
}

/// Returns the checksum of SCTP packets (CRC32c, RFC 9260, appendix A).
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = !0_u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            let carry = crc & 1;
            crc >>= 1;
            crc ^= 0x82F6_3B78 * carry;
        }
    }
    !crc
}

#[test]
fn packets_of_any_content_do_no_harm() {
    let mut messages = 0;
    for seed in 0..60 {
        let mut liar = Liar::new(seed);
        let role = [DataRole::Opens, DataRole::Accepts][seed as usize % 2];
        let mut data = DataTransport::new(role, false);
        let mut now = Instant::now();
        for _ in 0..200 {
            now += Duration::from_millis(20);
            let packets = liar.act(now);
            let came = packets.len();
            for packet in packets {
                data.handle_packet(&packet, now);
            }
            data.handle_timeout(now);
            let mut went = 0;
            while let Some(packet) = data.poll_transmit(now) {
                went += 1;
                liar.hear(packet, now);
            }
            assert!(went <= 8 + 2 * came, "seed {seed}: {went} for {came}");
            while let Some(message) = data.poll_message() {
                assert!(message.payload.len() <= MESSAGE_BYTES_MAX);
                messages += 1;
            }
        }
    }
    assert!(messages > 100, "{messages} got through");
}
