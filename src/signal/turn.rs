//! A relay for a participant's media (TURN, RFC 8656): allocation, permissions and channels, by
//! `turn-client-proto`. It is off the packet path: media goes through `path` without it.

mod url;
mod wire;

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::mpsc;
use turn_client_proto::api::{TurnClientApi, TurnConfig, TurnEvent, TurnPollRet};
use turn_client_proto::client::TurnClient;
use turn_client_proto::stun::agent::Transmit;
use turn_client_proto::stun::types::attribute::ErrorCode;
use turn_client_proto::stun::types::message::{Message, TransactionId};
use turn_client_proto::tcp::TurnClientTcp;
use turn_client_proto::types::message::REFRESH;
use turn_client_proto::types::{TransportType, TurnCredentials};
use turn_client_proto::udp::TurnClientUdp;

use super::client::IceServer;
use super::link::plain;
use crate::path::Path;
use crate::plan::TransportChoice;
use crate::secrets::Secret;
use crate::units::Epoch;
use crate::words::one_line;
pub use url::{NoTurnUrl, TurnLink, TurnUrl};
use wire::TurnWire;
pub use wire::sign_of_life;

/// First and longest interval between retransmissions of a request, and their number.
const RTO: Duration = Duration::from_millis(200);
const RTO_MAX: Duration = Duration::from_secs(2);
const REPEATS: u32 = 5;
/// Number of messages from the relay that may wait: the answers to one request for each candidate.
const CONTROL_MAX: usize = 32;
/// Longest STUN message that is read.
const MESSAGE_BYTES_MAX: usize = 2_048;
/// Longest wait before the library's timers are looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// Number of addresses that a message names where none of them helps.
const NAMED_MAX: usize = 4;
/// Size of a STUN message's header (RFC 8489, section 5).
const STUN_HEAD_BYTES: usize = 20;

/// A relay, and the credentials for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TurnServer {
    pub url: TurnUrl,
    pub user: String,
    pub password: Secret,
}

/// Returns the first relay with this link that the server names.
fn named_by(offered: &[IceServer], link: TurnLink) -> Option<TurnServer> {
    offered.iter().find_map(|server| {
        let mut urls = server.urls.iter().filter_map(|url| url.parse().ok());
        Some(TurnServer {
            url: urls.find(|url: &TurnUrl| url.link == link)?,
            user: server.username.clone(),
            password: server.credential.clone(),
        })
    })
}

/// Returns the relays that may carry media, in the order in which they are tried: those that the
/// user named, or those that the server names, in the order in which ICE of clients ends up with
/// them.
pub fn relays(
    given: &[TurnServer],
    offered: &[IceServer],
    choice: TransportChoice,
) -> Vec<TurnServer> {
    const IN_ORDER: [TurnLink; 3] = [TurnLink::Udp, TurnLink::Tcp, TurnLink::Tls];
    if !choice.allows_relay() {
        return Vec::new();
    }
    if !given.is_empty() {
        let over = |server: &TurnServer| {
            let url = server.url.clone().over(choice).ok()?;
            Some(TurnServer {
                url,
                ..server.clone()
            })
        };
        let fits = given.iter().filter_map(over);
        let most = if choice.is_auto() { given.len() } else { 1 };
        return fits.take(most).collect();
    }
    let wanted = TurnLink::of(choice);
    let links = IN_ORDER
        .into_iter()
        .filter(|link| wanted.is_none_or(|wanted| wanted == *link));
    links.filter_map(|link| named_by(offered, link)).collect()
}

/// Says which relays a server names.
pub fn what_is_named(offered: &[IceServer]) -> String {
    let urls = offered.iter().flat_map(|server| &server.urls);
    let told: Vec<String> = urls.take(NAMED_MAX).map(|url| one_line(url)).collect();
    if told.is_empty() {
        return "the server names none".to_owned();
    }
    format!("the server names {}", told.join(", "))
}

/// Event of an allocation.
pub enum RelayNews {
    /// The allocation exists: its path, and our address at the relay.
    Open { path: Path, relayed: SocketAddr },
    /// A channel to a peer exists.
    Bound { peer: SocketAddr, number: u16 },
    /// A message that the path must send to the relay.
    Say {
        relayed: SocketAddr,
        message: Vec<u8>,
    },
    /// The relay refuses to reach a peer.
    Refused { peer: SocketAddr, why: String },
    /// There is no allocation, or none any more.
    Failed(String),
}

/// Makes an allocation, and keeps it with a channel to each peer that is asked for. When nobody can
/// ask for peers any more, it deletes the allocation.
pub async fn keep_allocation(
    server: TurnServer,
    receive_buffer_bytes: usize,
    epoch: Epoch,
    peers: mpsc::UnboundedReceiver<SocketAddr>,
    news: impl Fn(RelayNews),
) {
    let url = server.url.clone();
    match TurnWire::open(&url, receive_buffer_bytes).await {
        Ok(wire) => {
            let mut allocation = Allocation::new(server, wire, epoch);
            if let Err(AllocationOver(why)) = allocation.keep(peers, &news).await {
                news(RelayNews::Failed(why));
            }
        }
        Err(why) => news(RelayNews::Failed(format!("the TURN server {url} {why}"))),
    }
}

/// There is no allocation, or none any more. The text is what the relay said.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct AllocationOver(String);

struct Allocation {
    client: TurnClient,
    url: TurnUrl,
    epoch: Epoch,
    wire: TurnWire,
    /// Our address at the relay.
    relayed: Option<SocketAddr>,
    /// Messages from the relay, once the path receives them.
    control: Option<mpsc::Receiver<Vec<u8>>>,
    /// Peers that were asked for before the allocation existed.
    waiting: Vec<SocketAddr>,
    /// The first request that the relay answered with a challenge, as it answers every first
    /// request.
    challenged: Option<TransactionId>,
    /// Code and reason of the relay's last refusal.
    refusal: Option<(u16, String)>,
}

impl Allocation {
    fn new(server: TurnServer, wire: TurnWire, epoch: Epoch) -> Allocation {
        let TurnServer {
            url,
            user,
            password,
        } = server;
        let mut config = TurnConfig::new(TurnCredentials::new(&user, password.expose()));
        config.set_request_retransmits(RTO, RTO_MAX, REPEATS, RTO_MAX);
        let (ours, relay) = (wire.local, wire.remote);
        let client = if url.link == TurnLink::Udp {
            TurnClientUdp::allocate(ours, relay, config).into()
        } else {
            TurnClientTcp::allocate(ours, relay, config).into()
        };
        Allocation {
            client,
            url,
            epoch,
            wire,
            relayed: None,
            control: None,
            waiting: Vec::new(),
            challenged: None,
            refusal: None,
        }
    }

    fn now(&self) -> turn_client_proto::stun::Instant {
        turn_client_proto::stun::Instant::from_nanos(self.epoch.now().as_nanos() as i64)
    }

    /// Serves the allocation. Returns `Ok` when nobody can ask for peers any more.
    async fn keep(
        &mut self,
        mut peers: mpsc::UnboundedReceiver<SocketAddr>,
        news: &impl Fn(RelayNews),
    ) -> Result<(), AllocationOver> {
        loop {
            let wake = self.drive(news).await?;
            tokio::select! {
                peer = peers.recv() => match peer {
                    Some(peer) => self.reach(peer),
                    None => {
                        self.give_back().await;
                        return Ok(());
                    }
                },
                said = listen(&mut self.wire, &mut self.control) => {
                    match said {
                        Ok(message) => self.hear(&message)?,
                        Err(error) => self.hear_error(&error)?,
                    }
                }
                () = tokio::time::sleep_until(wake) => {}
            }
        }
    }

    /// Sends what is due and reports what happened. Returns when to look again.
    async fn drive(
        &mut self,
        news: &impl Fn(RelayNews),
    ) -> Result<tokio::time::Instant, AllocationOver> {
        let now = self.now();
        let polled = self.client.poll(now);
        while let Some(event) = self.client.poll_event() {
            self.handle_event(event, news)?;
        }
        self.send(news).await?;
        let at = match polled {
            TurnPollRet::WaitUntil(at) => at,
            TurnPollRet::Closed => return Err(AllocationOver(self.why("ended the allocation"))),
            _ => now,
        };
        let ahead = at.saturating_duration_since(now).min(LOOK_AGAIN);
        // A timer that is due at once, and stays due, must not spin.
        let ahead = ahead.max(Duration::from_millis(1));
        Ok(tokio::time::Instant::now() + ahead)
    }

    async fn send(&mut self, news: &impl Fn(RelayNews)) -> Result<(), AllocationOver> {
        let now = self.now();
        while let Some(transmit) = self.client.poll_transmit(now) {
            let message = transmit.data.as_ref();
            match (self.wire.send(message).await, self.relayed) {
                (Ok(false), Some(relayed)) => news(RelayNews::Say {
                    relayed,
                    message: message.to_vec(),
                }),
                (Ok(_), _) => {}
                (Err(error), _) => self.hear_error(&error)?,
            }
        }
        Ok(())
    }

    fn hear(&mut self, message: &[u8]) -> Result<(), AllocationOver> {
        if let Ok(parsed) = Message::from_bytes(message)
            && let Ok(code) = parsed.attribute::<ErrorCode>()
        {
            let is_challenge = match code.code() {
                ErrorCode::STALE_NONCE => true,
                ErrorCode::UNAUTHORIZED => {
                    let asked = parsed.transaction_id();
                    *self.challenged.get_or_insert(asked) == asked
                }
                _ => false,
            };
            if !is_challenge {
                self.refusal = Some((code.code(), one_line(code.reason())));
                // Another attempt would be refused again, and the library ignores a refusal without
                // a signature.
                if self.control.is_none() {
                    return Err(AllocationOver(self.why("gave no allocation")));
                }
                if parsed.method() == REFRESH {
                    return Err(AllocationOver(self.why("ended the allocation")));
                }
            }
        }
        let (from, to) = (self.client.remote_addr(), self.client.local_addr());
        let (now, transport) = (self.now(), self.client.transport());
        self.client
            .recv(Transmit::new(message, transport, from, to), now);
        Ok(())
    }

    /// Handles an error of the connection before there is an allocation. After that, the timeout of
    /// its requests shows it, or the path does.
    fn hear_error(&self, error: &io::Error) -> Result<(), AllocationOver> {
        let (url, ends) = (&self.url, self.ends());
        let why = match (self.url.link, error.kind()) {
            _ if self.relayed.is_some() => return Ok(()),
            (TurnLink::Udp, io::ErrorKind::ConnectionRefused) => format!(
                "is not there: its host refuses UDP at that port ({ends}): is it running, and is this its port?"
            ),
            // The error may pass. If it does not, the requests time out.
            (TurnLink::Udp, _) => return Ok(()),
            (_, io::ErrorKind::InvalidData) => {
                format!("answers with what is no TURN ({ends}): is this its port?")
            }
            _ => format!("hung up before it gave an allocation ({ends}): see its log"),
        };
        Err(AllocationOver(format!("the TURN server {url} {why}")))
    }

    fn handle_event(
        &mut self,
        event: TurnEvent,
        news: &impl Fn(RelayNews),
    ) -> Result<(), AllocationOver> {
        match event {
            TurnEvent::AllocationCreated(_, relayed) if self.relayed.is_none() => {
                self.refusal = None;
                let link = self.wire.hand_over().map_err(|error| {
                    let (url, cause) = (&self.url, plain(&error));
                    AllocationOver(format!(
                        "the connection to the TURN server {url} broke: {cause}"
                    ))
                })?;
                self.relayed = Some(relayed);
                let (sender, control) = mpsc::channel(CONTROL_MAX);
                self.control = Some(control);
                let path = Path::of_relay(link, relayed, sender);
                news(RelayNews::Open { path, relayed });
                for peer in std::mem::take(&mut self.waiting) {
                    self.reach(peer);
                }
            }
            TurnEvent::AllocationCreateFailed(_) => {
                return Err(AllocationOver(self.why("gave no allocation")));
            }
            TurnEvent::ChannelCreated(_, peer) => {
                self.refusal = None;
                if let Some(number) = self.channel_of(peer) {
                    news(RelayNews::Bound { peer, number });
                }
            }
            TurnEvent::ChannelCreateFailed(_, peer) => {
                let why = self.why(&format!("does not relay to {}", peer.ip()));
                news(RelayNews::Refused { peer, why });
            }
            _ => {}
        }
        Ok(())
    }

    fn reach(&mut self, peer: SocketAddr) {
        if self.control.is_none() {
            self.waiting.push(peer);
            return;
        }
        let now = self.now();
        // A channel that already exists stays as it is.
        let _ = self.client.bind_channel(TransportType::Udp, peer, now);
    }

    /// Returns the number of a peer's channel. The library hides it, so it is read from a message
    /// that the library would send.
    fn channel_of(&mut self, peer: SocketAddr) -> Option<u16> {
        let now = self.now();
        let sent = self.client.send_to(TransportType::Udp, peer, [0u8], now);
        let bytes = sent.ok()??.build().data;
        let number = u16::from_be_bytes(*bytes.first_chunk()?);
        (0x4000..=0x4FFF).contains(&number).then_some(number)
    }

    async fn give_back(&mut self) {
        let now = self.now();
        if self.client.delete(now).is_ok() {
            let _ = self.client.poll(now);
            // Closing a stream also ends its allocation.
            let _ = self.send(&|_| ()).await;
        }
    }

    /// Returns our address and the relay's, as text.
    fn ends(&self) -> String {
        let (ours, relay) = (self.client.local_addr(), self.client.remote_addr());
        format!("from {} to {relay}", ours.ip())
    }

    /// Returns what the relay did, and its reason, as far as it gave one.
    fn why(&mut self, did: &str) -> String {
        let (url, ends) = (&self.url, self.ends());
        let why = match self.refusal.take() {
            None => format!(
                "it did not answer ({ends}): is it running, and does a firewall let {} through to it and back?",
                if self.url.link == TurnLink::Udp { "UDP" } else { "TCP" }
            ),
            Some((401 | 441, _)) => {
                "it does not take the user name or the password (401): check both, and how long they hold".to_owned()
            }
            Some((403, _)) => "it is not allowed to (403): which peers it may reach is its own setting, as turn.allow_restricted_peer_cidrs of LiveKit and allowed-peer-ip of coturn".to_owned(),
            Some((437, _)) => "it does not know the allocation any more (437): was it started again, or did the allocation run out?".to_owned(),
            Some((486, _)) => "this user has as many as it may have (486): raise its quota (user-quota of coturn), or join with fewer".to_owned(),
            Some((508, _)) => "it has no room for another one (508): give it more ports for relaying (min-port and max-port of coturn, turn.relay_range_start and relay_range_end of LiveKit), or join with fewer".to_owned(),
            Some((code, reason)) => format!("{code} {reason}"),
        };
        format!("the TURN server {url} {did}: {why}")
    }
}

/// Returns the relay's next message: from the wire until the path has it, then from the path.
async fn listen(
    wire: &mut TurnWire,
    control: &mut Option<mpsc::Receiver<Vec<u8>>>,
) -> io::Result<Vec<u8>> {
    match control {
        None => wire.receive().await,
        Some(control) => match control.recv().await {
            Some(message) => Ok(message),
            // The path is closed, so the session ends soon.
            None => std::future::pending().await,
        },
    }
}

#[cfg(test)]
mod tests {
    use turn_client_proto::stun::types::attribute::{Nonce, Realm};
    use turn_client_proto::stun::types::message::{IntegrityAlgorithm, MessageWriteVec};
    use turn_client_proto::stun::types::prelude::*;
    use turn_client_proto::types::attribute::{Lifetime, XorRelayedAddress};
    use turn_client_proto::types::message::ALLOCATE;

    use super::*;

    const PASSWORD: &str = "a relay's secret";

    /// Starts a relay that grants an allocation for four seconds, and does not know it when it is
    /// refreshed.
    fn forgetful_relay() -> SocketAddr {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 2_048];
            while let Ok((len, from)) = socket.recv_from(&mut buffer) {
                let Ok(asked) = Message::from_bytes(&buffer[..len]) else {
                    continue;
                };
                let _ = socket.send_to(&forgetful_answer(&asked, from), from);
            }
        });
        address
    }

    fn forgetful_answer(asked: &Message<'_>, from: SocketAddr) -> Vec<u8> {
        let refused = |code: u16| {
            let mut answer = Message::builder_error(asked, MessageWriteVec::new());
            answer.add_attribute(&Realm::new("here").unwrap()).unwrap();
            answer.add_attribute(&Nonce::new("nonce").unwrap()).unwrap();
            let code = ErrorCode::builder(code).build().unwrap();
            answer.add_attribute(&code).unwrap();
            answer
        };
        let is_signed = asked.attribute::<Realm>().is_ok();
        let mut answer = match asked.method() {
            ALLOCATE if !is_signed => return refused(401).finish(),
            ALLOCATE => {
                let mut answer = Message::builder_success(asked, MessageWriteVec::new());
                let relayed = XorRelayedAddress::new(from, asked.transaction_id());
                answer.add_attribute(&relayed).unwrap();
                answer.add_attribute(&Lifetime::new(4)).unwrap();
                answer
            }
            _ => refused(437),
        };
        let user = TurnCredentials::new("alice", PASSWORD).into_long_term_credentials("here");
        answer
            .add_message_integrity(&user.into(), IntegrityAlgorithm::Sha1)
            .unwrap();
        answer.finish()
    }

    #[tokio::test]
    async fn an_allocation_that_the_relay_no_longer_knows_is_over_in_its_words() {
        let server = TurnServer {
            url: format!("turn:{}", forgetful_relay()).parse().unwrap(),
            user: "alice".into(),
            password: Secret::new(PASSWORD),
        };
        let (_asked, peers) = mpsc::unbounded_channel();
        let (sender, mut news) = mpsc::unbounded_channel();
        let tell = move |news| drop(sender.send(news));
        tokio::spawn(keep_allocation(server, 1 << 16, Epoch::read(), peers, tell));
        let mut next = async || {
            let heard = tokio::time::timeout(Duration::from_secs(15), news.recv()).await;
            heard.expect("it says something").expect("it is kept")
        };
        let RelayNews::Open { mut path, .. } = next().await else {
            panic!("there is an allocation at first");
        };
        // Messages from the relay come through the path.
        let looking = std::thread::spawn(move || {
            let mut batch = crate::net::ReceiveBatch::default();
            for _ in 0..1_000 {
                let _ = path.receive(crate::path::Lane::Main, &mut batch);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let RelayNews::Failed(why) = next().await else {
            panic!("it is over");
        };
        let said = "ended the allocation: it does not know the allocation any more (437)";
        assert!(why.contains(said), "{why}");
        drop(looking);
    }
}
