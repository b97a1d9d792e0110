//! Clients that lie to the embedded SFU, over real sockets. Each costs the server a bounded share,
//! and an honest client is served throughout.

use std::sync::Arc;
use std::time::Duration;

use crate::common::server::Server as Process;
use futures_util::SinkExt;
use livekit_protocol as proto;
use livekit_protocol::signal_request::Message as Request;
use prost::Message as _;
use throng::measure::Kind;
use throng::sfu::server::{DEV_KEY, DEV_SECRET, ServerConfig, SfuServer};
use throng::signal::client::{
    JoinOptions, SignalError, SignalEvent, SignalReceiver, SignalSender, connect,
};
use throng::signal::{ApiKey, Endpoint, Permissions, Secret};
use throng::transport::sdp::{Candidate, DtlsSetup, Fingerprint, LocalTransport, Offerer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::{HeaderValue, header};
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

/// Time limit for a test that hangs. Everything here takes seconds.
const PATIENCE: Duration = Duration::from_secs(60);
/// Limit on the server's peak memory. An idle server uses some 20 MB.
const RSS_MAX: u64 = 400 << 20;

fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        tokio::time::timeout(PATIENCE, test)
            .await
            .expect("the test hangs")
    })
}

/// A server, from the point of view of its clients.
struct Target {
    endpoint: Endpoint,
    key: ApiKey,
}

impl Target {
    fn token(&self, identity: &str) -> Secret {
        self.key
            .join_token(
                "hall",
                identity,
                identity,
                Permissions::BOTH,
                Duration::from_secs(60),
            )
            .unwrap()
    }

    async fn join(&self, identity: &str) -> Result<(SignalSender, SignalReceiver), SignalError> {
        let (sender, receiver, _) = connect(
            &self.endpoint,
            &self.token(identity),
            &JoinOptions::default(),
        )
        .await?;
        Ok((sender, receiver))
    }

    /// Asserts that an honest client is served: it joins, and its ping is answered.
    async fn serves(&self, identity: &str) {
        let (mut sender, mut receiver) = self.join(identity).await.unwrap();
        assert!(matches!(
            receiver.next().await.unwrap(),
            SignalEvent::Join(_)
        ));
        sender.ping(7, Duration::ZERO).await.unwrap();
        while !matches!(
            receiver.next().await.unwrap(),
            SignalEvent::Pong { timestamp_us: 7 }
        ) {}
        sender.leave().await.unwrap();
    }

    async fn tcp(&self) -> TcpStream {
        let address = self.endpoint.http_url("/");
        let address = address
            .as_str()
            .trim_start_matches("http://")
            .trim_end_matches('/')
            .to_owned();
        TcpStream::connect(address).await.unwrap()
    }

    /// Opens a WebSocket on which the client has sent nothing.
    async fn raw(&self, identity: &str) -> WebSocketStream<TcpStream> {
        let url = self.endpoint.websocket_url(&JoinOptions::default().path());
        let mut request = url.as_str().into_client_request().unwrap();
        let bearer = format!("Bearer {}", self.token(identity).expose());
        request.headers_mut().insert(
            header::AUTHORIZATION,
            HeaderValue::from_str(&bearer).unwrap(),
        );
        client_async(request, self.tcp().await).await.unwrap().0
    }
}

#[test]
fn connections_beyond_the_bound_are_closed_and_others_are_served() {
    const MOST: usize = 20;
    let server = SfuServer::start(ServerConfig {
        connections: MOST,
        ..ServerConfig::loopback(7)
    })
    .unwrap();
    let target = Target {
        endpoint: server.url().parse().unwrap(),
        key: ApiKey::new(DEV_KEY, DEV_SECRET),
    };
    run(async {
        let mut flood = Vec::new();
        for _ in 0..5 * MOST {
            flood.push(target.tcp().await);
        }
        // Clients of one address that have sent no request yet may take a quarter of the places.
        // The other connections are closed.
        let mut closed = 0;
        for stream in &mut flood {
            let mut byte = [0];
            if let Ok(Ok(0) | Err(_)) =
                tokio::time::timeout(Duration::from_millis(20), stream.read(&mut byte)).await
            {
                closed += 1;
            }
        }
        assert_eq!(closed, flood.len() - MOST / 4);
        // A client that sends a request finds a place, however many silent connections wait there.
        let mut joined = Vec::new();
        for at in 0..MOST {
            let name = format!("in time {at}");
            joined.push(target.join(&name).await.expect("strangers go first"));
        }
        assert!(target.join("late").await.is_err(), "there is no place");
        drop((flood, joined.pop()));
        while target.join("honest").await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    assert!(server.stop().refused_connections > 5 * MOST as u64);
}

#[test]
fn a_request_that_drips_is_not_waited_for_without_end() {
    let server = Process::embedded();
    let target = Target {
        endpoint: server.endpoint(),
        key: server.api_key(),
    };
    run(async {
        let mut stream = target.tcp().await;
        stream.write_all(b"GET /rtc HTTP/1.1\r\n").await.unwrap();
        // [`run`] limits how long this may take.
        while stream.write_all(b"x-drip: 1\r\n").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        target.serves("honest").await;
    });
}

#[test]
fn whatever_clients_say_an_honest_one_is_served_and_memory_is_bounded() {
    let server = Process::embedded();
    let target = Arc::new(Target {
        endpoint: server.endpoint(),
        key: server.api_key(),
    });
    run(async {
        let lies = [
            tokio::spawn(frames_that_never_end(target.clone())),
            tokio::spawn(lists_of_nothing(target.clone())),
            tokio::spawn(tracks_and_subscriptions(target.clone())),
            tokio::spawn(attributes_without_end(target.clone())),
            tokio::spawn(descriptions(target.clone())),
            tokio::spawn(requests_and_no_reading(target.clone())),
            tokio::spawn(bad_tokens(target.clone())),
            tokio::spawn(oversize_http(target.clone())),
        ];
        for round in 0..10 {
            target.serves(&format!("honest-{round}")).await;
        }
        for lie in lies {
            lie.await.expect("the liar itself does not fail");
        }
        target.serves("at the end").await;
    });
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let peak = status.lines().find_map(|line| {
        line.strip_prefix("VmHWM:")?
            .trim()
            .strip_suffix(" kB")?
            .parse::<u64>()
            .ok()
    });
    let peak = peak.expect("the kernel counts it") << 10;
    assert!(peak < RSS_MAX, "{peak} bytes at the peak");
    assert!(!server.log().contains("panicked"), "{}", server.log());
}

/// Announces a gigabyte, sends fragments without end, or stops in the middle of a masked frame.
async fn frames_that_never_end(target: Arc<Target>) {
    for number in 0..10 {
        let mut socket = target.raw(&format!("frames-{number}")).await;
        let stream = socket.get_mut();
        let head =
            |opcode: u8, len: u64| [&[opcode, 0xFF][..], &len.to_be_bytes(), &[0; 4]].concat();
        match number % 3 {
            0 => {
                let _ = stream.write_all(&head(0x82, 1 << 30)).await;
            }
            1 => {
                let mut opcode = 2;
                // Until the server closes the connection.
                for _ in 0..64 {
                    let fragment = [head(opcode, 1 << 20), vec![0; 1 << 20]].concat();
                    if stream.write_all(&fragment).await.is_err() {
                        break;
                    }
                    opcode = 0;
                }
            }
            _ => {
                let _ = stream
                    .write_all(&[head(0x82, 6 << 20), vec![0; 1 << 20]].concat())
                    .await;
            }
        }
    }
}

/// Sends lists of empty entries: each has two bytes in the message, and takes hundreds in memory.
async fn lists_of_nothing(target: Arc<Target>) {
    let field = |number: u64, body: &[u8]| {
        let mut message = Vec::new();
        prost::encoding::encode_varint(number << 3 | 2, &mut message);
        prost::encoding::encode_varint(body.len() as u64, &mut message);
        [message, body.to_vec()].concat()
    };
    // SyncState's tracks, AddTrack's codecs, UpdateSubscription's sids, and an offer's mids.
    for (number, entry) in [
        (12u64, [0x1Au8, 0]),
        (4, [0x52, 0]),
        (6, [0x0A, 0]),
        (1, [0x22, 0]),
    ] {
        let request = field(number, &entry.repeat(3 << 20));
        let mut socket = target.raw(&format!("lists-{number}")).await;
        let _ = socket.send(Message::Binary(request.into())).await;
    }
    let mut socket = target.raw("lists-json").await;
    let entries = "{},".repeat(2 << 20);
    let _ = socket
        .send(Message::Text(
            format!("{{\"syncState\":{{\"publishTracks\":[{entries}{{}}]}}}}").into(),
        ))
        .await;
}

async fn tracks_and_subscriptions(target: Arc<Target>) {
    // In its own room, and without an offer to answer, so that it reads only the answers to its
    // requests.
    let permissions = Permissions {
        subscribe: false,
        ..Permissions::BOTH
    };
    let token = target
        .key
        .join_token(
            "storm",
            "storm",
            "storm",
            permissions,
            Duration::from_secs(60),
        )
        .unwrap();
    let (mut sender, mut receiver, _) = connect(&target.endpoint, &token, &JoinOptions::default())
        .await
        .unwrap();
    let (mut published, mut refused) = (0, 0);
    for number in 0..10_000u32 {
        let track = proto::AddTrackRequest {
            cid: format!("cid-{number}"),
            r#type: (number % 2) as i32,
            layers: vec![proto::VideoLayer::default(); 50],
            ..Default::default()
        };
        sender.send(Request::AddTrack(track)).await.unwrap();
        match receiver.next().await.unwrap() {
            SignalEvent::TrackPublished { .. } => published += 1,
            _ => refused += 1,
        }
    }
    assert!(
        published <= 70 && refused > 9_000,
        "{published} published, {refused} refused"
    );
    for number in 0..200 {
        let storm = proto::UpdateSubscription {
            track_sids: (0..2_000).map(|sid| format!("TR_{sid}")).collect(),
            subscribe: number % 2 == 0,
            ..Default::default()
        };
        // Each unknown sid is answered, and nothing reads the answers, so the server may close the
        // connection.
        if sender.send(Request::Subscription(storm)).await.is_err() {
            return;
        }
    }
}

/// Sends small attributes without end. Without a limit, all of them together would be in every
/// update to every participant.
async fn attributes_without_end(target: Arc<Target>) {
    let permissions = Permissions::BOTH;
    let lifetime = Duration::from_secs(60);
    let token = target
        .key
        .join_token("hall", "attributes", "attributes", permissions, lifetime)
        .unwrap();
    let (mut sender, _receiver, _) = connect(&target.endpoint, &token, &JoinOptions::default())
        .await
        .unwrap();
    for number in 0..2_000u32 {
        let update = proto::UpdateParticipantMetadata {
            attributes: (0..4)
                .map(|key| (format!("{number}-{key}"), "v".repeat(900)))
                .collect(),
            ..Default::default()
        };
        if sender.send(Request::UpdateMetadata(update)).await.is_err() {
            return;
        }
    }
}

async fn descriptions(target: Arc<Target>) {
    let local = LocalTransport {
        ufrag: "client".into(),
        pwd: "0123456789abcdefghijklmn".into(),
        fingerprint: Fingerprint([9; 32]),
        setup: DtlsSetup::ActPass,
        candidates: vec![Candidate::host("127.0.0.1:9".parse().unwrap())],
        session_id: 1,
    };
    let mut offerer = Offerer::default();
    offerer.receive(Kind::Audio, 10_000).unwrap();
    let large = offerer.offer(&local);
    let too_many = format!("{large}m=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:x\r\n");
    let section = large.split("m=audio").nth(1).unwrap().len();
    assert!(large.len() > 10_000 * section / 2);
    for (number, sdp) in [
        large,
        too_many,
        "v=0".into(),
        "m=".repeat(100_000),
        String::new(),
    ]
    .into_iter()
    .enumerate()
    {
        let (mut sender, mut receiver) = target
            .join(&format!("descriptions-{number}"))
            .await
            .unwrap();
        let _ = sender.offer(sdp, 1).await;
        // Waits for an answer, or for the end of the connection.
        while !matches!(
            receiver.next().await,
            Ok(SignalEvent::Answer(_) | SignalEvent::Leave(_)) | Err(_)
        ) {}
    }
}

/// Sends requests and reads no answers. The server closes the connection once too many answers
/// wait.
async fn requests_and_no_reading(target: Arc<Target>) {
    let mut socket = target.raw("deaf").await;
    let ping = proto::SignalRequest {
        message: Some(Request::PingReq(proto::Ping::default())),
    };
    let ping = ping.encode_to_vec();
    for _ in 0..200_000 {
        let sent = tokio::time::timeout(
            Duration::from_secs(5),
            socket.send(Message::Binary(ping.clone().into())),
        )
        .await;
        match sent {
            Ok(Ok(())) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}

async fn bad_tokens(target: Arc<Target>) {
    let mut stream = target.tcp().await;
    let mut answer = vec![0; 4 << 10];
    for number in 0..3_000 {
        let token = ["eyJhbGciOiJIUzI1NiJ9.e30.AAAA", "x", "", "a.b.c"][number % 4];
        let request = format!(
            "GET /rtc/validate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let len = stream.read(&mut answer).await.unwrap();
        assert!(
            answer[..len].starts_with(b"HTTP/1.1 401"),
            "{}",
            String::from_utf8_lossy(&answer[..len])
        );
    }
}

/// Sends HTTP heads and bodies that exceed the limits.
async fn oversize_http(target: Arc<Target>) {
    let bearer = target.key.service_token(None).unwrap();
    for number in 0..10 {
        let mut stream = target.tcp().await;
        let head = match number % 2 {
            0 => format!(
                "GET /rtc?{} HTTP/1.1\r\nHost: x\r\n\r\n",
                "q".repeat(4 << 20)
            ),
            _ => format!(
                "POST /twirp/livekit.RoomService/ListRooms HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer {}\r\nContent-Length: 100000000\r\n\r\n{}",
                bearer.expose(),
                "x".repeat(1 << 20)
            ),
        };
        let _ = stream.write_all(head.as_bytes()).await;
        let mut answer = vec![0; 64];
        if let Ok(len) = stream.read(&mut answer).await {
            let text = String::from_utf8_lossy(&answer[..len]);
            assert!(len == 0 || text.starts_with("HTTP/1.1 4"), "{text}");
        }
    }
    let refused: Result<_, tungstenite::Error> =
        client_async("ws://x/rtc", target.tcp().await).await;
    assert!(refused.is_err(), "there is no token");
}
