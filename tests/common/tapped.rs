//! A bad wire between clients and a router, in virtual time, that can read what it carries. It
//! terminates each connection's ICE and DTLS, once towards the client and once towards the router.
//! It decrypts every packet of media and control where it enters, logs it and its fate, and
//! encrypts it again for the other side.
//!
//! Its log therefore shows more than a capture: which packet a retransmission repeats, which
//! packets a NACK requests, what a report says. Control packets are read by `rtc-rtcp`, which is
//! independent of our code.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use rtc_rtcp::extended_report::ExtendedReport;
use rtc_rtcp::extended_report::dlrr::DLRRReportBlock;
use rtc_rtcp::extended_report::rrt::ReceiverReferenceTimeReportBlock;
use rtc_rtcp::payload_feedbacks::picture_loss_indication::PictureLossIndication;
use rtc_rtcp::receiver_report::ReceiverReport;
use rtc_rtcp::reception_report::ReceptionReport;
use rtc_rtcp::sender_report::SenderReport;
use rtc_rtcp::transport_feedbacks::transport_layer_nack::TransportLayerNack;
use throng::transport::peer::{Peer, PeerParameters};
use throng::transport::rtp::{Datagram as Class, Header, classify};
use throng::transport::sequence::SeqExtender;
use throng::units::Time;

use super::link::Datagram;
use super::path::{Conditions, Fate, Path};
use super::relay::{Wire, WireEnd, router_address};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// To the router.
    Up,
    Down,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    Rtp(Rtp),
    Rtcp(Vec<Control>),
    /// A STUN message: whether it is a response, and its transaction id.
    Stun {
        answers: bool,
        transaction: [u8; 12],
    },
    Dtls,
}

impl Content {
    fn is_setup(&self) -> bool {
        matches!(self, Content::Stun { .. } | Content::Dtls)
    }

    fn of_setup(bytes: &[u8]) -> Content {
        match (classify(bytes), bytes.get(8..20)) {
            (Class::Stun, Some(transaction)) => Content::Stun {
                // RFC 8489, section 5: the class has two bits, and the upper one is set in every
                // response.
                answers: bytes[0] & 1 != 0,
                transaction: transaction.try_into().expect("12 bytes"),
            },
            _ => Content::Dtls,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Rtp {
    pub ssrc: Ssrc,
    /// Sequence number extended over all wraps.
    pub index: u64,
    pub rtp_time: u32,
    pub marker: bool,
    /// Number of bytes of the header with extensions and of the payload, without padding.
    pub bytes: u64,
    pub payload: Vec<u8>,
}

/// One packet of a compound packet, as far as tests look at it.
#[derive(Clone, Debug, PartialEq)]
pub enum Control {
    Nack { media_ssrc: Ssrc, seqs: Vec<u16> },
    Pli { media_ssrc: Ssrc },
    SenderReport { ntp: u64 },
    Block(Block),
    ReferenceTime { ntp: u64 },
    Dlrr { last_rr: u32, dlrr: u32 },
    Other,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    pub ssrc: Ssrc,
    pub total_lost: i32,
    pub highest: u32,
    pub lsr: u32,
    pub dlsr: u32,
}

/// One datagram.
#[derive(Clone, Debug)]
pub struct Entry {
    pub client: usize,
    pub direction: Direction,
    pub at: Time,
    /// Arrival time of each copy; empty if it was lost.
    pub arrived: Vec<Time>,
    /// Size on the wire: the UDP payload.
    pub wire_bytes: u64,
    pub content: Content,
}

impl Entry {
    pub fn rtp(&self) -> Option<&Rtp> {
        match &self.content {
            Content::Rtp(rtp) => Some(rtp),
            _ => None,
        }
    }

    pub fn control(&self) -> &[Control] {
        match &self.content {
            Content::Rtcp(control) => control,
            _ => &[],
        }
    }
}

pub struct Tapped {
    pub log: Vec<Entry>,
    ends: Vec<End>,
    /// Datagrams by arrival time, then in order of sending: index in the log, and the datagram as
    /// its receiver gets it.
    under_way: BTreeMap<(Duration, u64), (usize, Datagram)>,
    /// Datagrams that reach the router at once, from our own half of its connections.
    to_router: VecDeque<Datagram>,
    count: u64,
    seed: u64,
}

/// Our two halves of one connection.
struct End {
    client: SocketAddr,
    /// Halves by [`Direction`], each towards that side: it decrypts what comes from there and
    /// encrypts what goes there.
    halves: [Half; 2],
    paths: [Path; 2],
}

struct Half {
    peer: Peer,
    remote: SocketAddr,
    extenders: HashMap<Ssrc, SeqExtender>,
}

impl Tapped {
    pub fn new(seed: u64) -> Tapped {
        Tapped {
            log: Vec::new(),
            ends: Vec::new(),
            under_way: BTreeMap::new(),
            to_router: VecDeque::new(),
            count: 0,
            seed,
        }
    }

    /// Sets the conditions for one client's packets of one direction, from now on.
    pub fn set(&mut self, client: usize, direction: Direction, conditions: Conditions) {
        self.ends[client].paths[direction as usize].conditions = conditions;
    }

    fn enqueue(
        &mut self,
        (client, direction): (usize, Direction),
        content: Content,
        datagram: Datagram,
        now: Time,
    ) {
        let since_start = now.since(Time::ZERO);
        let path = &mut self.ends[client].paths[direction as usize];
        let (first, second) = path.take(datagram.bytes.len(), since_start);
        for fate in [Some(first), second].into_iter().flatten() {
            if let Fate::Leaves(at) = fate {
                self.count += 1;
                self.under_way
                    .insert((at, self.count), (self.log.len(), datagram.clone()));
            }
        }
        self.log.push(Entry {
            client,
            direction,
            at: now,
            arrived: Vec::new(),
            wire_bytes: datagram.bytes.len() as u64,
            content,
        });
    }

    /// Sends what our half towards one side has to send.
    fn speak(&mut self, client: usize, towards: Direction, now: Time) {
        let end = &mut self.ends[client];
        let half = &mut end.halves[towards as usize];
        if half.peer.next_timeout() <= now {
            half.peer.handle_timeout(now);
        }
        let (mut said, to_client) = (Vec::new(), end.client);
        half.peer
            .poll(now, |bytes, _| said.push(bytes.to_vec()), |_| {});
        for bytes in said {
            let (from, to) = match towards {
                Direction::Up => (to_client, router_address()),
                Direction::Down => (router_address(), to_client),
            };
            let datagram = Datagram { from, to, bytes };
            match towards {
                Direction::Up => self.to_router.push_back(datagram),
                Direction::Down => self.enqueue(
                    (client, Direction::Down),
                    Content::of_setup(&datagram.bytes),
                    datagram,
                    now,
                ),
            }
        }
    }

    /// Decrypts a packet that came in this direction, and encrypts it for its destination.
    fn pass(&mut self, (client, direction): (usize, Direction), mut datagram: Datagram, now: Time) {
        let [up, down] = &mut self.ends[client].halves;
        let (from, to) = match direction {
            Direction::Up => (down, up),
            Direction::Down => (up, down),
        };
        let opened = match classify(&datagram.bytes) {
            Class::Rtp => from.open_rtp(&mut datagram.bytes, to),
            Class::Rtcp => from.open_rtcp(&mut datagram.bytes, to),
            _ => unreachable!("set-up has been taken"),
        };
        let content = opened.expect("both sides are connected, and nobody forges anything");
        self.enqueue((client, direction), content, datagram, now);
    }
}

impl Half {
    fn open_rtp(&mut self, bytes: &mut [u8], to: &mut Half) -> Option<Content> {
        let sealed_len = bytes.len();
        let header = Header::parse(bytes)?;
        let extender = self.extenders.entry(header.ssrc).or_default();
        let index = extender.guess(header.seq.0);
        let len = self
            .peer
            .opener()?
            .open_rtp(bytes, header.header_len, index)
            .ok()?;
        extender.commit(index);
        let payload = header.payload(&bytes[..len])?.to_vec();
        let content = Content::Rtp(Rtp {
            ssrc: header.ssrc,
            index,
            rtp_time: header.rtp_time,
            marker: header.marker,
            bytes: (header.header_len + payload.len()) as u64,
            payload,
        });
        let sealed = to
            .peer
            .sealer()?
            .seal_rtp(bytes, header.header_len, len, index)
            .ok()?;
        assert_eq!(
            sealed, sealed_len,
            "both connections have agreed on the same profile"
        );
        Some(content)
    }

    fn open_rtcp(&mut self, bytes: &mut [u8], to: &mut Half) -> Option<Content> {
        let len = self.peer.opener()?.open_rtcp(bytes).ok()?;
        let content = Content::Rtcp(read(&bytes[..len]));
        let sealed = to.peer.sealer_mut()?.seal_rtcp(bytes, len).ok()?;
        assert_eq!(
            sealed,
            bytes.len(),
            "both connections have agreed on the same profile"
        );
        Some(content)
    }
}

fn read(compound: &[u8]) -> Vec<Control> {
    let mut said = Vec::new();
    for packet in
        rtc_rtcp::packet::unmarshal(&mut &compound[..]).expect("well-formed control packets")
    {
        let block = |report: &ReceptionReport| {
            // The field is a signed number of 24 bits (RFC 3550, section 6.4.1), which rtc-rtcp
            // returns as unsigned.
            let total_lost = ((report.total_lost << 8) as i32) >> 8;
            Control::Block(Block {
                ssrc: Ssrc(report.ssrc),
                total_lost,
                highest: report.last_sequence_number,
                lsr: report.last_sender_report,
                dlsr: report.delay,
            })
        };
        let packet = packet.as_any();
        if let Some(nack) = packet.downcast_ref::<TransportLayerNack>() {
            said.push(Control::Nack {
                media_ssrc: Ssrc(nack.media_ssrc),
                seqs: nack
                    .nacks
                    .iter()
                    .flat_map(|pair| pair.packet_list())
                    .collect(),
            });
        } else if let Some(pli) = packet.downcast_ref::<PictureLossIndication>() {
            said.push(Control::Pli {
                media_ssrc: Ssrc(pli.media_ssrc),
            });
        } else if let Some(report) = packet.downcast_ref::<SenderReport>() {
            said.push(Control::SenderReport {
                ntp: report.ntp_time,
            });
            said.extend(report.reports.iter().map(block));
        } else if let Some(report) = packet.downcast_ref::<ReceiverReport>() {
            said.extend(report.reports.iter().map(block));
        } else if let Some(report) = packet.downcast_ref::<ExtendedReport>() {
            for block in &report.reports {
                let block = block.as_any();
                if let Some(time) = block.downcast_ref::<ReceiverReferenceTimeReportBlock>() {
                    said.push(Control::ReferenceTime {
                        ntp: time.ntp_timestamp,
                    });
                }
                if let Some(dlrr) = block.downcast_ref::<DLRRReportBlock>() {
                    said.extend(dlrr.reports.iter().map(|report| Control::Dlrr {
                        last_rr: report.last_rr,
                        dlrr: report.dlrr,
                    }));
                }
            }
        } else {
            said.push(Control::Other);
        }
    }
    said
}

impl Wire for Tapped {
    fn add(&mut self, end: &WireEnd<'_>, now: Time) {
        let half = |local_address, remote, towards| {
            let (local, theirs) = match towards {
                Direction::Up => (end.client_credentials, end.router_credentials),
                Direction::Down => (end.router_credentials, end.client_credentials),
            };
            let parameters = PeerParameters {
                local_address,
                local: local.clone(),
                remote: theirs.clone(),
                remote_fingerprint: end.identity.fingerprint(),
                remote_candidates: vec![remote],
                ice_controlling: towards == Direction::Up,
                dtls_active: (towards == Direction::Down) == end.router_active,
            };
            let peer = match towards {
                Direction::Up => Peer::new(end.identity, &parameters, end.epoch, now),
                Direction::Down => Peer::lite(end.identity, &parameters, end.epoch, now),
            };
            Half {
                peer,
                remote,
                extenders: HashMap::new(),
            }
        };
        let seed = self.seed.wrapping_mul(1_000) + 2 * self.ends.len() as u64;
        self.ends.push(End {
            client: end.client,
            halves: [
                half(end.client, router_address(), Direction::Up),
                half(router_address(), end.client, Direction::Down),
            ],
            paths: [
                Path::new(Conditions::default(), seed),
                Path::new(Conditions::default(), seed + 1),
            ],
        });
    }

    fn send(&mut self, datagram: Datagram, now: Time) {
        let from_router = datagram.from == router_address();
        let other = if from_router {
            datagram.to
        } else {
            datagram.from
        };
        let client = self
            .ends
            .iter()
            .position(|end| end.client == other)
            .expect("a client of ours");
        let is_setup = matches!(classify(&datagram.bytes), Class::Stun | Class::Dtls);
        match (from_router, is_setup) {
            // Nothing is ever lost between the router and our half of its connection.
            (true, true) => {
                let half = &mut self.ends[client].halves[Direction::Up as usize];
                half.peer
                    .handle_setup_datagram(&datagram.bytes, half.remote, now);
                self.speak(client, Direction::Up, now);
            }
            (true, false) => self.pass((client, Direction::Down), datagram, now),
            (false, true) => self.enqueue(
                (client, Direction::Up),
                Content::of_setup(&datagram.bytes),
                datagram,
                now,
            ),
            (false, false) => self.pass((client, Direction::Up), datagram, now),
        }
    }

    fn poll(&mut self, now: Time) -> Option<(Time, Datagram)> {
        for client in 0..self.ends.len() {
            for towards in [Direction::Up, Direction::Down] {
                if self.ends[client].halves[towards as usize]
                    .peer
                    .next_timeout()
                    <= now
                {
                    self.speak(client, towards, now);
                }
            }
        }
        loop {
            if let Some(datagram) = self.to_router.pop_front() {
                return Some((now, datagram));
            }
            let entry = self
                .under_way
                .first_entry()
                .filter(|entry| entry.key().0 <= now.since(Time::ZERO))?;
            let ((at, _), (place, datagram)) = entry.remove_entry();
            let at = Time::ZERO + at;
            self.log[place].arrived.push(at);
            let (client, direction) = (self.log[place].client, self.log[place].direction);
            if direction == Direction::Down || !self.log[place].content.is_setup() {
                return Some((at, datagram));
            }
            let half = &mut self.ends[client].halves[Direction::Down as usize];
            half.peer
                .handle_setup_datagram(&datagram.bytes, half.remote, at);
            self.speak(client, Direction::Down, at);
        }
    }
}
