//! A relay for a participant's media (TURN, RFC 8656): allocation, permissions and channels, by
//! `turn-client-proto`. It is off the packet path: media goes through `path` without it.

mod lease;
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
use lease::{Challenge, Lessee, ShortLease};
pub use url::{NoTurnUrl, TurnLink, TurnUrl};
use wire::TurnWire;
pub use wire::sign_of_life;

/// First and longest interval between retransmissions of a request, and their number.
const RTO: Duration = Duration::from_millis(200);
const RTO_MAX: Duration = Duration::from_secs(2);
const REPEATS: u32 = 5;
/// Who has no allocation by then looks elsewhere, or says so: no person waits for longer.
const ALLOCATION_PATIENCE: Duration = Duration::from_secs(4);
/// Messages of the relay that wait: the answers to a request for each candidate.
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
    let deadline = tokio::time::Instant::now() + ALLOCATION_PATIENCE;
    match TurnWire::open(&url, receive_buffer_bytes, deadline).await {
        Ok(wire) => {
            let mut allocation = Allocation::new(server, wire, epoch, deadline);
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
    lessee: Lessee,
    epoch: Epoch,
    /// There is an allocation by then, or none.
    deadline: tokio::time::Instant,
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
    challenge: Option<Challenge>,
    /// Where the library does not renew it.
    lease: Option<ShortLease>,
    /// The relay's last refusal, by its number and its words.
    refusal: Option<(u16, String)>,
    /// What this host or the network answered to a request.
    obstacle: Option<io::Error>,
}

fn client_of(wire: &TurnWire, link: TurnLink, lessee: &Lessee) -> TurnClient {
    let who = TurnCredentials::new(&lessee.user, lessee.password.expose());
    let mut config = TurnConfig::new(who);
    config.set_request_retransmits(RTO, RTO_MAX, REPEATS, RTO_MAX);
    match link {
        TurnLink::Udp => TurnClientUdp::allocate(wire.local, wire.remote, config).into(),
        TurnLink::Tcp | TurnLink::Tls => {
            TurnClientTcp::allocate(wire.local, wire.remote, config).into()
        }
    }
}

impl Allocation {
    fn new(
        server: TurnServer,
        wire: TurnWire,
        epoch: Epoch,
        deadline: tokio::time::Instant,
    ) -> Allocation {
        let TurnServer {
            url,
            user,
            password,
        } = server;
        let lessee = Lessee { user, password };
        Allocation {
            client: client_of(&wire, url.link, &lessee),
            url,
            lessee,
            epoch,
            deadline,
            wire,
            relayed: None,
            control: None,
            waiting: Vec::new(),
            challenged: None,
            challenge: None,
            lease: None,
            refusal: None,
            obstacle: None,
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
                        Err(error) => self.hear_error(error)?,
                    }
                }
                () = tokio::time::sleep_until(self.deadline), if self.relayed.is_none() => {
                    return Err(AllocationOver(self.why("gave no allocation")));
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
        let renewal = self.renew(news).await?;
        let at = match polled {
            TurnPollRet::WaitUntil(at) => at,
            TurnPollRet::Closed if self.relayed.is_none() => {
                return Err(AllocationOver(self.why("gave no allocation")));
            }
            TurnPollRet::Closed => return Err(AllocationOver(self.why("ended the allocation"))),
            _ => now,
        };
        let ahead = at.saturating_duration_since(now).min(LOOK_AGAIN);
        // A timer that is due at once, and stays due, must not spin.
        let ahead = ahead.min(renewal).max(Duration::from_millis(1));
        Ok(tokio::time::Instant::now() + ahead)
    }

    async fn send(&mut self, news: &impl Fn(RelayNews)) -> Result<(), AllocationOver> {
        let now = self.now();
        while let Some(transmit) = self.client.poll_transmit(now) {
            self.say(transmit.data.as_ref(), news).await?;
        }
        Ok(())
    }

    async fn say(
        &mut self,
        message: &[u8],
        news: &impl Fn(RelayNews),
    ) -> Result<(), AllocationOver> {
        match (self.wire.send(message).await, self.relayed) {
            (Ok(false), Some(relayed)) => news(RelayNews::Say {
                relayed,
                message: message.to_vec(),
            }),
            (Ok(_), _) => {}
            (Err(error), _) => self.hear_error(error)?,
        }
        Ok(())
    }

    /// Renews what the library does not. Says how long there is nothing to do.
    async fn renew(&mut self, news: &impl Fn(RelayNews)) -> Result<Duration, AllocationOver> {
        let now = self.epoch.now();
        let (Some(lease), Some(challenge)) = (&mut self.lease, &self.challenge) else {
            return Ok(LOOK_AGAIN);
        };
        if lease.is_over(now) {
            return Err(AllocationOver(self.why("let the allocation run out")));
        }
        let request = lease.ask(&self.lessee, challenge, now);
        let wake_at = lease.wake_at();
        if let Some(request) = request {
            self.say(&request, news).await?;
        }
        Ok(wake_at.since(now))
    }

    fn hear(&mut self, message: &[u8]) -> Result<(), AllocationOver> {
        let mut as_told = None;
        if let Ok(parsed) = Message::from_bytes(message) {
            self.hear_refusal(&parsed)?;
            if self.hear_of_lease(&parsed, &mut as_told) {
                return Ok(());
            }
        }
        let message = as_told.as_deref().unwrap_or(message);
        let (from, to) = (self.client.remote_addr(), self.client.local_addr());
        let (now, transport) = (self.now(), self.client.transport());
        self.client
            .recv(Transmit::new(message, transport, from, to), now);
        Ok(())
    }

    fn hear_refusal(&mut self, message: &Message<'_>) -> Result<(), AllocationOver> {
        if let Some(challenge) = Challenge::of(message) {
            self.challenge = Some(challenge);
        }
        let Ok(code) = message.attribute::<ErrorCode>() else {
            return Ok(());
        };
        let asked = message.transaction_id();
        if code.code() == ErrorCode::UNAUTHORIZED && *self.challenged.get_or_insert(asked) == asked
        {
            return Ok(());
        }
        self.refusal = Some((code.code(), one_line(code.reason())));
        // Asked again, with what it has just given.
        if code.code() == ErrorCode::STALE_NONCE {
            return Ok(());
        }
        // It would be refused again, and a refusal without a signature is not believed by the
        // library.
        if self.control.is_none() {
            return Err(AllocationOver(self.why("gave no allocation")));
        }
        if message.method() == REFRESH {
            return Err(AllocationOver(self.why("ended the allocation")));
        }
        Ok(())
    }

    /// Whether a message is about a lease that is renewed here, and not for the library; or how
    /// the library is to have it.
    fn hear_of_lease(&mut self, message: &Message<'_>, as_told: &mut Option<Vec<u8>>) -> bool {
        let now = self.epoch.now();
        let Some(challenge) = &self.challenge else {
            return false;
        };
        if let Some(lease) = &mut self.lease {
            return lease.hear(message, &self.lessee, challenge, now);
        }
        if let Some((lease, told)) = ShortLease::begin(message, &self.lessee, challenge, now) {
            (self.lease, *as_told) = (Some(lease), Some(told));
        }
        false
    }

    /// What becomes of the connection before there is an allocation; after that its requests'
    /// time-out says it, or the path.
    fn hear_error(&mut self, error: io::Error) -> Result<(), AllocationOver> {
        let (url, ends) = (&self.url, self.ends());
        let why = match (self.url.link, error.kind()) {
            _ if self.relayed.is_some() => return Ok(()),
            (TurnLink::Udp, io::ErrorKind::ConnectionRefused) => format!(
                "is not there: its host refuses UDP at that port ({ends}): is it running, and is this its port?"
            ),
            // It may pass; where it does not, it is told when patience is over.
            (TurnLink::Udp, _) => {
                self.obstacle = Some(error);
                return Ok(());
            }
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

    /// Nothing came from the relay, and what came instead.
    fn silence(&self) -> String {
        let ends = self.ends();
        let by = match self.url.link {
            TurnLink::Udp => "UDP",
            TurnLink::Tcp | TurnLink::Tls => "TCP",
        };
        match &self.obstacle {
            Some(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                format!("a firewall of this host does not let {by} out to it ({ends}): open it")
            }
            Some(error) => format!(
                "something on the way says that it cannot be reached ({ends}: {}): check the address, the route and the firewall",
                plain(error)
            ),
            None if self.relayed.is_none() && self.challenged.is_some() => {
                format!("it asked who wants one, and did not answer to that ({ends}): see its log")
            }
            None => format!(
                "it did not answer ({ends}): is it running, and does a firewall let {by} through to it and back?"
            ),
        }
    }

    /// What the relay did, and its reason, as far as it gave one.
    fn why(&mut self, did: &str) -> String {
        let url = &self.url;
        let why = match self.refusal.take() {
            None => self.silence(),
            Some((401 | 441, _)) => {
                "it does not take the user name or the password (401): check both, and how long they hold".to_owned()
            }
            Some((403, _)) => "it is not allowed to (403): which peers it may reach is its own setting, as turn.allow_restricted_peer_cidrs of LiveKit and allowed-peer-ip of coturn".to_owned(),
            Some((438, _)) => "it takes none of the nonces that it gave itself (438): look at its log, and whether several servers answer at this address".to_owned(),
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

    /// A relay that answers each request so; `None`: not at all.
    fn relay_that(
        answers: impl Fn(&Message<'_>, SocketAddr, usize) -> Option<Vec<u8>> + Send + 'static,
    ) -> SocketAddr {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        std::thread::spawn(move || {
            let (mut buffer, mut count) = ([0; 2_048], 0);
            while let Ok((len, from)) = socket.recv_from(&mut buffer) {
                let Ok(asked) = Message::from_bytes(&buffer[..len]) else {
                    continue;
                };
                if let Some(answer) = answers(&asked, from, count) {
                    let _ = socket.send_to(&answer, from);
                }
                count += 1;
            }
        });
        address
    }

    fn refused(asked: &Message<'_>, code: u16, realm: &str, nonce: &str) -> MessageWriteVec {
        let mut answer = Message::builder_error(asked, MessageWriteVec::new());
        answer.add_attribute(&Realm::new(realm).unwrap()).unwrap();
        answer.add_attribute(&Nonce::new(nonce).unwrap()).unwrap();
        let code = ErrorCode::builder(code).build().unwrap();
        answer.add_attribute(&code).unwrap();
        answer
    }

    fn given(asked: &Message<'_>, from: SocketAddr, lifetime: u32) -> MessageWriteVec {
        let mut answer = Message::builder_success(asked, MessageWriteVec::new());
        let relayed = XorRelayedAddress::new(from, asked.transaction_id());
        answer.add_attribute(&relayed).unwrap();
        answer.add_attribute(&Lifetime::new(lifetime)).unwrap();
        answer
    }

    fn signed(mut answer: MessageWriteVec, realm: &str) -> Vec<u8> {
        let user = TurnCredentials::new("alice", PASSWORD).into_long_term_credentials(realm);
        answer
            .add_message_integrity(&user.into(), IntegrityAlgorithm::Sha1)
            .unwrap();
        answer.finish()
    }

    fn realm_of(asked: &Message<'_>) -> Option<String> {
        let realm = asked.attribute::<Realm>().ok()?;
        Some(realm.realm().to_owned())
    }

    /// Gives an allocation for four seconds, and does not know it when it is to be refreshed.
    fn forgetful_answer(asked: &Message<'_>, from: SocketAddr) -> Vec<u8> {
        match (asked.method(), realm_of(asked)) {
            (ALLOCATE, None) => refused(asked, 401, "here", "nonce").finish(),
            (ALLOCATE, _) => signed(given(asked, from, 4), "here"),
            _ => signed(refused(asked, 437, "here", "nonce"), "here"),
        }
    }

    fn asked_of(relay: SocketAddr) -> mpsc::UnboundedReceiver<RelayNews> {
        let server = TurnServer {
            url: format!("turn:{relay}").parse().unwrap(),
            user: "alice".into(),
            password: Secret::new(PASSWORD),
        };
        let (asked, peers) = mpsc::unbounded_channel();
        let (sender, news) = mpsc::unbounded_channel();
        let tell = move |news| drop(sender.send(news));
        tokio::spawn(async move {
            keep_allocation(server, 1 << 16, Epoch::read(), peers, tell).await;
            drop(asked);
        });
        news
    }

    async fn next(news: &mut mpsc::UnboundedReceiver<RelayNews>) -> RelayNews {
        let heard = tokio::time::timeout(Duration::from_secs(15), news.recv()).await;
        heard.expect("it says something").expect("it is kept")
    }

    /// What the relay says comes by the path, once there is one.
    fn look_at(mut path: Path) {
        std::thread::spawn(move || {
            let mut batch = crate::net::ReceiveBatch::default();
            for _ in 0..1_000 {
                let _ = path.receive(crate::path::Lane::Main, &mut batch);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
    }

    #[tokio::test]
    async fn an_allocation_that_the_relay_no_longer_knows_is_over_in_its_words() {
        let relay = relay_that(|asked, from, _| Some(forgetful_answer(asked, from)));
        let mut news = asked_of(relay);
        let RelayNews::Open { path, .. } = next(&mut news).await else {
            panic!("there is an allocation at first");
        };
        look_at(path);
        let RelayNews::Failed(why) = next(&mut news).await else {
            panic!("it is over");
        };
        let said = "ended the allocation: it does not know the allocation any more (437)";
        assert!(why.contains(said), "{why}");
    }

    #[tokio::test]
    async fn an_allocation_that_is_not_renewed_runs_out_at_its_time() {
        let began = std::time::Instant::now();
        let relay = relay_that(|asked, from, _| match (asked.method(), realm_of(asked)) {
            (ALLOCATE, None) => Some(refused(asked, 401, "here", "nonce").finish()),
            (ALLOCATE, _) => Some(signed(given(asked, from, 2), "here")),
            _ => None,
        });
        let mut news = asked_of(relay);
        let RelayNews::Open { path, .. } = next(&mut news).await else {
            panic!("there is an allocation at first");
        };
        look_at(path);
        let RelayNews::Failed(why) = next(&mut news).await else {
            panic!("it is over");
        };
        let said = "let the allocation run out: it did not answer (from 127.0.0.1 to";
        assert!(why.contains(said), "{why}");
        assert!(began.elapsed() >= Duration::from_secs(2), "{why}");
    }

    #[tokio::test]
    async fn a_relay_that_gives_no_allocation_is_given_up_in_time_and_told_by_what_it_said() {
        type Answers = fn(&Message<'_>, SocketAddr, usize) -> Option<Vec<u8>>;
        let silent: Answers = |_, _, _| None;
        let challenges_once: Answers =
            |asked, _, count| (count == 0).then(|| refused(asked, 401, "here", "nonce").finish());
        let never_content: Answers = |asked, _, count| {
            let code = if count == 0 { 401 } else { 438 };
            Some(refused(asked, code, "here", &format!("nonce {count}")).finish())
        };
        let no_stun: Answers = |_, _, _| Some(b"HTTP/1.1 400 Bad Request".to_vec());
        for (answers, said) in [
            (silent, "it did not answer"),
            (challenges_once, "it asked who wants one"),
            (never_content, "it takes none of the nonces"),
            (no_stun, "it did not answer"),
        ] {
            let began = std::time::Instant::now();
            let mut news = asked_of(relay_that(answers));
            let RelayNews::Failed(why) = next(&mut news).await else {
                panic!("there is no allocation");
            };
            assert!(
                why.contains(&format!("gave no allocation: {said}")),
                "{why}"
            );
            let took = began.elapsed();
            assert!(
                took < ALLOCATION_PATIENCE + Duration::from_secs(1),
                "{took:?}"
            );
        }
    }
}
