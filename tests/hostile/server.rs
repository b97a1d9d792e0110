//! The real program run against a server that lies. A lie costs counters and one participant's
//! join; it never causes a panic, or unbounded use of memory or time.
//!
//! The server resembles LiveKit as far as a participant can tell: room service, WebSockets,
//! descriptions, and where a lie needs it a media side with true ICE, DTLS and keys.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};
use throng::transport::rtp::Ssrc;

use crate::common::program::{Finished, Report, Scratch, run, throng};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use livekit_protocol as proto;
use livekit_protocol::signal_request::Message as Request;
use livekit_protocol::signal_response::Message as Response;
use prost::Message as _;
use throng::codec::Codec;
use throng::transport::peer::{IceCredentials, Identity, Peer, PeerEvent, PeerParameters};
use throng::transport::rtcp::{DlrrBlock, ReportBlock, RtcpWriter, SenderInfo};
use throng::transport::rtp::{Datagram, Header, HeaderTemplate, classify};
use throng::transport::sdp::serve::{
    ClientDescriptions, SectionUse, SentTrack, SubscriberOffer, write_answer,
};
use throng::transport::sdp::{Candidate, DtlsSetup, LocalTransport, RemoteTransport};
use throng::transport::sequence::Seq;
use throng::units::{Bitrate, Epoch, Time};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

const KEY: &str = "devkey";
const SECRET: &str = "a-secret-for-tests-of-thirty-two-or-more-characters";
/// Limit on the peak memory of a run with so few participants, media included. A run against an
/// honest server uses some 60 MB.
const RSS_MAX: u64 = 400 << 20;
/// Longest time of a join.
const JOIN: Duration = Duration::from_secs(30);
/// Length of a lie without an end of its own. The run's own limits are shorter or equal, and this
/// host has other things to do.
const FLOOD: Duration = Duration::from_secs(4);

/// One lie to a participant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    /// The head of the HTTP answer comes one byte at a time, for ever.
    SlowHandshake,
    NoJoin,
    GarbageFrames,
    /// A frame announces a length of 1 GB.
    AnnouncedGigabyte,
    /// One message consists of fragments without end.
    EndlessMessage,
    TruncatedMessages,
    WrongDescription,
    TenThousandSections,
    TooManySections,
    OffersWithoutEnd,
    /// A hundred thousand updates about participants.
    Updates,
    Speakers,
    Candidates,
    /// Pongs without pings.
    Pongs,
    /// Lists of empty messages.
    EmptyLists,
    ResumeAgainAndAgain,
    RejoinAgainAndAgain,
    /// The server never reads, and sends pings.
    Deaf,
}

const LIES: [Lie; 18] = [
    Lie::SlowHandshake,
    Lie::NoJoin,
    Lie::GarbageFrames,
    Lie::AnnouncedGigabyte,
    Lie::EndlessMessage,
    Lie::TruncatedMessages,
    Lie::WrongDescription,
    Lie::TenThousandSections,
    Lie::TooManySections,
    Lie::OffersWithoutEnd,
    Lie::Updates,
    Lie::Speakers,
    Lie::Candidates,
    Lie::Pongs,
    Lie::EmptyLists,
    Lie::ResumeAgainAndAgain,
    Lie::RejoinAgainAndAgain,
    Lie::Deaf,
];

/// A server with its own runtime. It ends when it is dropped.
struct Liar {
    url: String,
    told: Arc<AtomicUsize>,
    _runtime: tokio::runtime::Runtime,
}

impl Liar {
    /// Starts a server. `treat` serves each WebSocket, and gets its index in order of arrival.
    fn start<F>(treat: impl Fn(usize, TcpStream) -> F + Send + Sync + 'static) -> Liar
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let told = Arc::new(AtomicUsize::new(0));
        let count = told.clone();
        runtime.spawn(async move {
            let treat = Arc::new(treat);
            while let Ok((stream, _)) = listener.accept().await {
                let (treat, count) = (treat.clone(), count.clone());
                tokio::spawn(async move {
                    let mut head = [0; 64];
                    let len = stream.peek(&mut head).await.unwrap_or_default();
                    if head[..len].starts_with(b"GET /rtc?") {
                        treat(count.fetch_add(1, Relaxed), stream).await;
                    } else {
                        room_service(stream).await;
                    }
                });
            }
        });
        Liar {
            url: format!("ws://{address}"),
            told,
            _runtime: runtime,
        }
    }

    /// Runs the program against the server. Returns how it ended, its report, and one line for each
    /// participant.
    fn run(&self, arguments: &[&str]) -> (Finished, Report, String) {
        let scratch = Scratch::new();
        let json = scratch.path("run.json");
        let mut command = throng();
        command
            .env("LIVEKIT_URL", &self.url)
            .env("LIVEKIT_API_KEY", KEY)
            .env("LIVEKIT_API_SECRET", SECRET)
            .args(["--connection", "dual", "--json"])
            .arg(&json)
            .arg("--participants")
            .arg(scratch.path("who.ndjson"))
            .args(arguments);
        let finished = run(&mut command, SECRET);
        let report = Report::read(&json, SECRET);
        let rss = report.0["engine"]["rss_peak_bytes"]
            .as_u64()
            .expect("a run knows its memory");
        assert!(rss < RSS_MAX, "{rss} bytes at the peak");
        let people = std::fs::read_to_string(scratch.path("who.ndjson")).unwrap();
        (finished, report, people)
    }
}

/// Answers every request with an empty message, which stands for an empty room, an empty list, and
/// everything else.
async fn room_service(mut stream: TcpStream) {
    let mut request = [0; 8 << 10];
    while stream.read(&mut request).await.is_ok_and(|len| len > 0) {
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
        if stream.write_all(answer).await.is_err() {
            return;
        }
    }
}

type Socket = WebSocketStream<TcpStream>;

async fn send(socket: &mut Socket, message: Response) -> bool {
    socket.send(Message::Binary(encoded(message))).await.is_ok()
}

fn encoded(message: Response) -> Bytes {
    proto::SignalResponse {
        message: Some(message),
    }
    .encode_to_vec()
    .into()
}

fn join_message() -> Response {
    Response::Join(proto::JoinResponse {
        room: Some(proto::Room::default()),
        participant: Some(proto::ParticipantInfo {
            sid: "PA_x".into(),
            ..Default::default()
        }),
        subscriber_primary: true,
        ping_interval: 1,
        ping_timeout: 3,
        ..Default::default()
    })
}

fn leave(action: proto::leave_request::Action) -> Response {
    Response::Leave(proto::LeaveRequest {
        action: action.into(),
        ..Default::default()
    })
}

fn offer(sdp: String, id: u32) -> Response {
    Response::Offer(proto::SessionDescription {
        r#type: "offer".into(),
        sdp,
        id,
        ..Default::default()
    })
}

fn local(port: u16, setup: DtlsSetup) -> LocalTransport {
    let IceCredentials { ufrag, password } = IceCredentials::random();
    LocalTransport {
        ufrag,
        pwd: password,
        fingerprint: identity().fingerprint(),
        setup,
        candidates: vec![Candidate::host(SocketAddr::from(([127, 0, 0, 1], port)))],
        session_id: 1,
    }
}

fn identity() -> Identity {
    static IDENTITY: std::sync::OnceLock<Identity> = std::sync::OnceLock::new();
    IDENTITY
        .get_or_init(|| Identity::generate().unwrap())
        .clone()
}

fn sent_track(number: u32) -> SentTrack {
    SentTrack {
        codec: Codec::Opus,
        stream_id: format!("PA_{number}|TR_{number}"),
        track_id: format!("TR_{number}"),
        ssrc: Ssrc(number * 2 + 1_000),
        rtx_ssrc: None,
    }
}

/// Sends the Join, then the messages of `say` until there are no more, the connection ends or
/// [`FLOOD`] has passed. Then waits for the end.
async fn flood(socket: Socket, say: impl FnMut(u32) -> Option<Bytes>) {
    flood_for(FLOOD, socket, say).await;
}

/// The same with another limit. It reads throughout, because a server that does not read is another
/// lie, [`Lie::Deaf`], and would be refused for that once our answers fill the socket.
async fn flood_for(limit: Duration, mut socket: Socket, mut say: impl FnMut(u32) -> Option<Bytes>) {
    let started = Instant::now();
    send(&mut socket, join_message()).await;
    let (mut sink, mut answers) = socket.split();
    let talk = async {
        for number in 0.. {
            let Some(message) = say(number).filter(|_| started.elapsed() < limit) else {
                break;
            };
            if sink.send(Message::Binary(message)).await.is_err() {
                break;
            }
            tokio::task::yield_now().await;
        }
    };
    let listen = async { while let Some(Ok(_)) = answers.next().await {} };
    tokio::join!(talk, listen);
}

async fn tell(lie: Lie, mut stream: TcpStream) {
    if lie == Lie::SlowHandshake {
        while stream.write_all(b"H").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        return;
    }
    let Ok(mut socket) = tokio_tungstenite::accept_async(stream).await else {
        return;
    };
    match lie {
        Lie::SlowHandshake => unreachable!("told above"),
        Lie::NoJoin => while let Some(Ok(_)) = socket.next().await {},
        Lie::GarbageFrames => {
            let _ = socket.get_mut().write_all(&[0xFF; 4_096]).await;
            while let Some(Ok(_)) = socket.next().await {}
        }
        Lie::AnnouncedGigabyte => {
            let head = [&[0x82, 127][..], &(1u64 << 30).to_be_bytes()].concat();
            let _ = socket.get_mut().write_all(&head).await;
            while let Some(Ok(_)) = socket.next().await {}
        }
        Lie::EndlessMessage => {
            let mut fragment =
                [&[0x02, 127][..], &(1u64 << 20).to_be_bytes(), &[0; 1 << 20]].concat();
            for _ in 0..64 {
                if socket.get_mut().write_all(&fragment).await.is_err() {
                    return;
                }
                fragment[0] = 0;
            }
        }
        Lie::TruncatedMessages => {
            let whole = proto::SignalResponse {
                message: Some(join_message()),
            }
            .encode_to_vec();
            for len in 0..whole.len() {
                let _ = socket
                    .send(Message::Binary(whole[..len].to_vec().into()))
                    .await;
            }
            flood(socket, |number| {
                (number < 100).then(|| {
                    encoded(Response::Trickle(proto::TrickleRequest {
                        candidate_init: "{\"candidate\":\"candidate:1 1 udp".into(),
                        ..Default::default()
                    }))
                })
            })
            .await;
        }
        Lie::WrongDescription => {
            flood(socket, |number| {
                (number == 0).then(|| encoded(offer("v=0\r\nm=audio\r\n".into(), 1)))
            })
            .await
        }
        Lie::TenThousandSections | Lie::TooManySections => {
            let mut offers = SubscriberOffer::default();
            let tracks = if lie == Lie::TooManySections {
                10_001
            } else {
                9_990
            };
            for number in 0..tracks {
                offers.add(sent_track(number));
            }
            let sdp = offers.offer(&local(9, DtlsSetup::ActPass));
            flood(socket, |number| {
                (number < 3).then(|| encoded(offer(sdp.clone(), number + 1)))
            })
            .await;
        }
        Lie::OffersWithoutEnd => {
            let local = local(9, DtlsSetup::ActPass);
            // The flood goes on until the server is refused, however slow the host is: a join has
            // 30 s.
            flood_for(2 * JOIN, socket, |number| {
                // Each offer restarts ICE and replaces all tracks.
                let mut offers = SubscriberOffer::default();
                for track in 0..500 {
                    offers.add(sent_track(number * 500 + track));
                }
                let local = LocalTransport {
                    ufrag: format!("again{number}"),
                    ..local.clone()
                };
                Some(encoded(offer(offers.offer(&local), number + 1)))
            })
            .await;
        }
        Lie::Updates => {
            let update = encoded(Response::Update(proto::ParticipantUpdate {
                participants: vec![proto::ParticipantInfo {
                    metadata: "m".repeat(1_000),
                    ..Default::default()
                }],
            }));
            flood(socket, |number| (number < 100_000).then(|| update.clone())).await;
        }
        Lie::Speakers => {
            let speakers = vec![proto::SpeakerInfo::default(); 1_000];
            let changed = encoded(Response::SpeakersChanged(proto::SpeakersChanged {
                speakers,
            }));
            flood(socket, |_| Some(changed.clone())).await;
        }
        Lie::Candidates => {
            flood(socket, |number| {
                let port = 1_024 + number % 60_000;
                Some(encoded(Response::Trickle(proto::TrickleRequest {
                    candidate_init: format!(
                        "{{\"candidate\":\"candidate:1 1 udp 1 127.0.0.1 {port} typ host\"}}"
                    ),
                    target: (number % 2) as i32,
                    ..Default::default()
                })))
            })
            .await;
        }
        Lie::Pongs => {
            let pong = encoded(Response::PongResp(proto::Pong {
                last_ping_timestamp: 1,
                timestamp: i64::MAX,
            }));
            flood(socket, |_| Some(pong.clone())).await;
        }
        Lie::EmptyLists => {
            // Field 19, `reconnect`, of 8 MiB: four million `ice_servers` of no bytes, each of
            // which takes 72 bytes in memory.
            let entries = [0x0A, 0].repeat(4 << 20);
            let reconnect =
                Bytes::from([&[0x9A, 0x01, 0x80, 0x80, 0x80, 0x04][..], &entries].concat());
            flood(socket, |number| (number < 5).then(|| reconnect.clone())).await;
        }
        Lie::ResumeAgainAndAgain => {
            // A resume is answered correctly, and ended at once.
            let resumed = Response::Reconnect(proto::ReconnectResponse::default());
            let _ = send(&mut socket, resumed).await
                && send(&mut socket, leave(proto::leave_request::Action::Resume)).await;
            while let Some(Ok(_)) = socket.next().await {}
        }
        Lie::RejoinAgainAndAgain => {
            let _ = send(&mut socket, join_message()).await
                && send(&mut socket, leave(proto::leave_request::Action::Reconnect)).await;
            while let Some(Ok(_)) = socket.next().await {}
        }
        Lie::Deaf => {
            send(&mut socket, join_message()).await;
            let _ = socket.get_mut().write_all(&[0x89, 0].repeat(10_000)).await;
            tokio::time::sleep(Duration::from_secs(60)).await;
        }
    }
}

#[test]
fn whatever_a_server_says_the_run_ends_on_time_and_reports() {
    let liar = Liar::start(|place, stream| tell(LIES[place % LIES.len()], stream));
    let subscribers = LIES.len().to_string();
    let (finished, report, people) = liar.run(&[
        "--publishers",
        "0",
        "--subscribers",
        &subscribers,
        "--duration",
        "2",
        "--layout",
        "3x3",
    ]);
    assert!(
        matches!(finished.code, Some(98 | 99)),
        "{}",
        finished.stdout
    );
    assert_eq!(
        report.counter("session", "joins_failed"),
        LIES.len() as u64,
        "{}",
        finished.stdout
    );

    assert!(liar.told.load(Relaxed) >= LIES.len());
    for said in [
        "no join within 30 s",
        "was silent for",
        "does not keep to the WebSocket protocol",
        "sent a message of 1073741824 bytes",
        "media section 0 is broken",
        "more than 10000 media sections",
        "announced more than 20000 tracks",
    ] {
        assert!(people.contains(said), "nobody says '{said}': {people}");
    }
    // Joins are given up after 30 s at most. The run then waits for nothing.
    assert!(
        finished.took < Duration::from_secs(60),
        "{:?}",
        finished.took
    );
}

/// Returns the first half of this message.
fn torn(message: Response) -> Message {
    let whole = encoded(message);
    Message::Binary(whole.slice(..whole.len() / 2))
}

/// Sends the first participant a truncated Join, the second a truncated Offer, and the third a
/// truncated Answer. Later ones get a truncated update about speakers, which nothing depends on.
async fn tear(place: usize, stream: TcpStream) {
    let Ok(mut socket) = tokio_tungstenite::accept_async(stream).await else {
        return;
    };
    let description = || proto::SessionDescription {
        sdp: "v=0".repeat(30),
        ..Default::default()
    };
    let speakers = proto::SpeakersChanged {
        speakers: vec![proto::SpeakerInfo::default(); 9],
    };
    let message = match place {
        0 => torn(join_message()),
        1 => torn(Response::Offer(description())),
        2 => torn(Response::Answer(description())),
        _ => torn(Response::SpeakersChanged(speakers)),
    };
    if place > 0 {
        send(&mut socket, join_message()).await;
    }
    for _ in 0..if place > 2 { 100 } else { 1 } {
        let _ = socket.send(message.clone()).await;
    }
    if place > 2 {
        send(&mut socket, leave(proto::leave_request::Action::Disconnect)).await;
    }
    while let Some(Ok(_)) = socket.next().await {}
}

#[test]
fn a_join_an_offer_or_an_answer_that_cannot_be_read_ends_the_attempt_at_once() {
    let liar = Liar::start(tear);
    let (finished, report, people) =
        liar.run(&["--publishers", "0", "--subscribers", "4", "--duration", "1"]);
    assert_eq!(report.counter("session", "joins_failed"), 4, "{people}");
    for name in ["Join", "Offer", "Answer"] {
        let said = format!("the server's {name} cannot be read");
        assert!(people.contains(&said), "nobody says '{said}': {people}");
    }
    assert_eq!(
        report.counter("session", "signal_malformed"),
        103,
        "{}",
        finished.stdout
    );
    assert!(
        finished.took < Duration::from_secs(10),
        "{:?}",
        finished.took
    );
}

/// Counters of what the media side sent and received.
#[derive(Default)]
struct MediaLog {
    connected: AtomicU64,
    sent: AtomicU64,
    /// RTP packets on the publisher's media SSRCs. `resent` counts those on other SSRCs, which are
    /// the publisher's retransmissions.
    media: AtomicU64,
    resent: AtomicU64,
    nacked: AtomicU64,
    stop: AtomicBool,
}

/// The media side of one connection: one of our peers as the server, on its own socket.
struct MediaEnd {
    socket: UdpSocket,
    peer: Peer,
    epoch: Epoch,
    publishing: bool,
}

impl MediaEnd {
    fn new(
        socket: UdpSocket,
        local: &LocalTransport,
        remote: &RemoteTransport,
        epoch: Epoch,
        publishing: bool,
    ) -> MediaEnd {
        socket.set_nonblocking(true).unwrap();
        let credentials = |ufrag: &str, password: &str| IceCredentials {
            ufrag: ufrag.to_owned(),
            password: password.to_owned(),
        };
        let parameters = PeerParameters {
            local_address: socket.local_addr().unwrap(),
            local: credentials(&local.ufrag, &local.pwd),
            remote: credentials(&remote.ufrag, &remote.pwd),
            remote_fingerprint: remote.fingerprint,
            remote_candidates: remote
                .candidates
                .iter()
                .map(|candidate| candidate.address)
                .collect(),
            // As a LiveKit server does: it controls ICE on the connection that it offers, and
            // answers `passive` on the other.
            ice_controlling: !publishing,
            dtls_active: remote.setup == DtlsSetup::Passive,
        };
        MediaEnd {
            peer: Peer::new(&identity(), &parameters, epoch, epoch.now()),
            socket,
            epoch,
            publishing,
        }
    }

    /// Connects, lies for some seconds, and then only keeps the connection up.
    fn run(mut self, ssrcs: &[Ssrc], log: &MediaLog) {
        let mut connected_at = None;
        let mut round = 0u32;
        while !log.stop.load(Relaxed) {
            let now = self.epoch.now();
            self.peer.handle_timeout(now);
            let (socket, mut up) = (&self.socket, false);
            self.peer.poll(
                now,
                |datagram, to| drop(socket.send_to(datagram, to)),
                |event| up |= event == PeerEvent::Connected,
            );
            if up {
                log.connected.fetch_add(1, Relaxed);
                connected_at = Some(now);
            }
            self.read(ssrcs, now, log);
            if connected_at.is_some_and(|at| now.since(at) < FLOOD) {
                round += 1;
                self.lie(ssrcs, round, log);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn read(&mut self, ssrcs: &[Ssrc], now: Time, log: &MediaLog) {
        let mut bytes = [0; 2_048];
        while let Ok((len, from)) = self.socket.recv_from(&mut bytes) {
            match classify(&bytes[..len]) {
                Datagram::Stun | Datagram::Dtls => {
                    self.peer.handle_setup_datagram(&bytes[..len], from, now);
                }
                Datagram::Rtp => {
                    let ssrc = Header::parse(&bytes[..len]).map(|header| header.ssrc);
                    let counter = if ssrc.is_some_and(|ssrc| ssrcs.contains(&ssrc)) {
                        &log.media
                    } else {
                        &log.resent
                    };
                    counter.fetch_add(1, Relaxed);
                }
                Datagram::Rtcp | Datagram::Unknown => {}
            }
        }
    }

    /// Sends all lies at once. Called every millisecond.
    fn lie(&mut self, ssrcs: &[Ssrc], round: u32, log: &MediaLog) {
        for number in 0..20 {
            // With `publishing` all SSRCs are unannounced. Otherwise some packets have an announced
            // SSRC, with nonsense after the header.
            let ssrc = if self.publishing || number > 2 {
                Ssrc(0x7000_0000 + round % 5_000)
            } else {
                sent_track(1).ssrc
            };
            let seq = Seq((round * 20 + number) as u16);
            let template = HeaderTemplate::new(111, ssrc).unwrap();
            let mut packet = [0xA5; 1_200];
            let header_len = template
                .write(&mut packet, true, seq, round.wrapping_mul(0x1234_5678))
                .unwrap();
            let index = u64::from(seq.0);
            let sealed = self
                .peer
                .sealer()
                .map(|sealer| sealer.seal_rtp(&mut packet, header_len, 1_100, index));
            self.send(&mut packet, sealed.and_then(Result::ok), log);
        }
        let absurd = |ssrc| ReportBlock {
            ssrc,
            fraction_lost: 255,
            cumulative_lost: -1,
            extended_highest_seq: u32::MAX,
            jitter: u32::MAX,
            lsr: round,
            dlsr: u32::MAX - round,
        };
        let clock = SenderInfo {
            ssrc: sent_track(1).ssrc,
            ntp: u64::from(round) << 40,
            rtp_time: round << 20,
            packets: 0,
            octets: u32::MAX,
        };
        let dlrr = DlrrBlock {
            ssrc: Ssrc(1),
            last_rr: round,
            delay_since_last_rr: 0,
        };
        for ssrc in ssrcs.iter().copied().chain([Ssrc(5)]) {
            self.say(log, |writer| {
                let all = (0..200).map(|number| Seq((round * 200 + number) as u16));
                log.nacked.fetch_add(200, Relaxed);
                writer.nack(Ssrc(1), ssrc, all)
            });
            self.say(log, |writer| {
                writer.sender_report(&clock, [absurd(ssrc); 3])?;
                (0..20).try_for_each(|_| writer.pli(Ssrc(1), ssrc))?;
                writer.xr(Ssrc(1), Some(u64::MAX), [dlrr; 5])?;
                writer.remb(
                    Ssrc(1),
                    Bitrate::from_bps(u64::from(round % 3)),
                    &[ssrc; 20],
                )?;
                let arrivals: Vec<Option<Time>> = (0..20)
                    .map(|number| Some(Time::from_millis(u64::from(round) * 50 + number)))
                    .collect();
                writer.transport_cc(
                    Ssrc(1),
                    ssrc,
                    Seq(round as u16),
                    round as u8,
                    arrivals.iter().copied(),
                )
            });
        }
        // Forged datagrams: STUN of no peer, DTLS of no session, RTP encrypted with no key.
        for mut forged in [[0; 64], [22; 64], [0x80; 64]] {
            forged[4..8].copy_from_slice(&[0x21, 0x12, 0xA4, 0x42]);
            forged[63] = round as u8;
            self.send(&mut forged, Some(64), log);
        }
    }

    fn say(
        &mut self,
        log: &MediaLog,
        write: impl FnOnce(&mut RtcpWriter<'_>) -> Result<(), throng::transport::rtcp::WriteError>,
    ) {
        let mut bytes = [0; 1_500];
        let mut writer = RtcpWriter::new(&mut bytes[..1_400]);
        write(&mut writer).expect("it fits");
        let len = writer.len();
        let sealed = self
            .peer
            .sealer_mut()
            .map(|sealer| sealer.seal_rtcp(&mut bytes, len));
        self.send(&mut bytes, sealed.and_then(Result::ok), log);
    }

    fn send(&self, bytes: &mut [u8], len: Option<usize>, log: &MediaLog) {
        if let (Some(len), Some(to)) = (len, self.peer.remote()) {
            // A failure means that the other's buffer is full, which is as much as a flood can do.
            let _ = self.socket.send_to(&bytes[..len], to);
            log.sent.fetch_add(1, Relaxed);
            if len == 64 && bytes[0] == 0x80 {
                // The same from an unknown port. The kernel keeps it away from a connected socket.
                let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
                let _ = stranger.send_to(&bytes[..len], to);
            }
        }
    }
}

/// Signals correctly, so that media flows, and hands the connections to the lying media side.
async fn serve(stream: TcpStream, log: Arc<MediaLog>) {
    let Ok(mut socket) = tokio_tungstenite::accept_async(stream).await else {
        return;
    };
    let epoch = Epoch::read();
    send(&mut socket, join_message()).await;
    let (udp, mut offers) = (
        UdpSocket::bind("127.0.0.1:0").unwrap(),
        SubscriberOffer::default(),
    );
    let sending = local(udp.local_addr().unwrap().port(), DtlsSetup::ActPass);
    let mut udp = Some(udp);
    offers.add(sent_track(1));
    send(&mut socket, offer(offers.offer(&sending), 1)).await;
    let mut descriptions = ClientDescriptions::default();
    while let Some(Ok(message)) = socket.next().await {
        let Message::Binary(bytes) = message else {
            continue;
        };
        match proto::SignalRequest::decode(bytes)
            .ok()
            .and_then(|request| request.message)
        {
            Some(Request::AddTrack(request)) => {
                let published = proto::TrackPublishedResponse {
                    cid: request.cid.clone(),
                    track: Some(proto::TrackInfo {
                        sid: format!("TR_{}", request.cid),
                        ..Default::default()
                    }),
                };
                send(&mut socket, Response::TrackPublished(published)).await;
            }
            Some(Request::Offer(client)) => {
                let update = descriptions.read(&client.sdp).unwrap();
                let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
                let receiving = local(udp.local_addr().unwrap().port(), DtlsSetup::Passive);
                let answer = write_answer(&mut descriptions, &receiving, 1, |_, _| {
                    SectionUse::Receive {
                        dtx: false,
                        red: false,
                    }
                });
                let sections = descriptions.sections();
                let ssrcs: Vec<Ssrc> = sections.filter_map(|section| section.ssrc).collect();
                let (log, remote) = (log.clone(), update.remote);
                // The answer says ice-lite, so the participant controls.
                std::thread::spawn(move || {
                    MediaEnd::new(udp, &receiving, &active(remote), epoch, true).run(&ssrcs, &log)
                });
                let answer = proto::SessionDescription {
                    r#type: "answer".into(),
                    sdp: answer,
                    id: client.id,
                    ..Default::default()
                };
                send(&mut socket, Response::Answer(answer)).await;
            }
            Some(Request::Answer(answer)) => {
                let (remote, _) = offers.answered(&answer.sdp).unwrap();
                if let Some(udp) = udp.take() {
                    let (log, sending) = (log.clone(), sending.clone());
                    std::thread::spawn(move || {
                        MediaEnd::new(udp, &sending, &remote, epoch, false).run(&[], &log)
                    });
                }
            }
            Some(Request::PingReq(ping)) => {
                let pong = proto::Pong {
                    last_ping_timestamp: ping.timestamp,
                    timestamp: 0,
                };
                send(&mut socket, Response::PongResp(pong)).await;
            }
            _ => {}
        }
    }
}

/// Sets the client's DTLS role to `active`: a client that offers `active` or `actpass` and is
/// answered `passive` opens DTLS.
fn active(remote: RemoteTransport) -> RemoteTransport {
    RemoteTransport {
        setup: DtlsSetup::Active,
        ..remote
    }
}

#[test]
fn media_and_feedback_of_any_content_cost_counters_and_resends_stay_within_their_rate() {
    let log = Arc::new(MediaLog::default());
    let shared = log.clone();
    let liar = Liar::start(move |_, stream| serve(stream, shared.clone()));
    let (finished, report, _) = liar.run(&[
        "--publishers",
        "1",
        "--video-publishers",
        "1",
        "--no-simulcast",
        "--video-resolution",
        "low",
        "--subscribers",
        "1",
        "--duration",
        "6",
    ]);
    log.stop.store(true, Relaxed);
    assert_eq!(
        report.counter("session", "joins_ok"),
        2,
        "{}\n{}",
        finished.stdout,
        finished.stderr
    );
    assert!(
        log.connected.load(Relaxed) >= 2 && log.sent.load(Relaxed) > 1_000,
        "the lies were told"
    );
    // FAIL, because nothing true arrived, or INVALID if this host was too busy to read all the
    // lies.
    assert!(
        matches!(finished.code, Some(98 | 99)),
        "{}",
        finished.stdout
    );
    assert!(
        finished.took < Duration::from_secs(60),
        "{:?}",
        finished.took
    );
    assert!(
        report.counter("session", "packets_rejected") > 1_000,
        "{}",
        finished.stdout
    );
    // The rate limit of retransmissions is 256 KiB at once, and then as much as the media itself,
    // with each counted as 1,200 bytes. The bound here is twice that. A hundred times as many were
    // requested.
    let (nacked, resent) = (
        log.nacked.load(Relaxed),
        report.counter("video", "rtx_sent") + report.counter("audio", "rtx_sent"),
    );
    let media = report.counter("video", "bytes_sent") + report.counter("audio", "bytes_sent");
    let allowed = 2 * (256 * 1024 / 1_200) + 2 * media / 1_200;
    assert!(
        resent > 0 && resent <= allowed,
        "{resent} resent of {nacked} asked for, {allowed} allowed"
    );
}
