//! The embedded SFU's signalling over real sockets: our own client, plain HTTP, and input that no
//! client should send.

use std::time::Duration;

use axum::http::StatusCode;
use base64::Engine as _;
use futures_util::{SinkExt, StreamExt};
use livekit_protocol as proto;
use livekit_protocol::signal_request::Message as Request;
use prost::Message as _;
use serde_json::{Value, json};
use throng::cli::{self, CliCommand};
use throng::sfu::server::{DEV_KEY, DEV_SECRET, ServerConfig, SfuServer, StartError};
use throng::signal::client::{
    JoinOptions, SignalError, SignalEvent, SignalReceiver, SignalSender, connect,
};
use throng::signal::refused::{RefusedToken, TokenRefusal};
use throng::signal::rooms::{RoomError, RoomService};
use throng::signal::{ApiKey, Endpoint, Permissions, Secret};
use throng::transport::sdp::{
    Answerer, Candidate, Capabilities, DtlsSetup, Fingerprint, LocalTransport,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::tungstenite;
use tungstenite::client::IntoClientRequest;

/// Limit for a test. Everything here takes milliseconds, so a test that reaches it hangs.
const PATIENCE: Duration = Duration::from_secs(20);

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

fn start() -> SfuServer {
    SfuServer::start(ServerConfig::loopback(7)).unwrap()
}

fn key() -> ApiKey {
    ApiKey::new(DEV_KEY, DEV_SECRET)
}

fn token(room: &str, identity: &str) -> Secret {
    let lifetime = Duration::from_secs(60);
    key()
        .join_token(room, identity, identity, Permissions::BOTH, lifetime)
        .unwrap()
}

fn endpoint(server: &SfuServer) -> Endpoint {
    server.url().parse().unwrap()
}

async fn open(
    server: &SfuServer,
    token: &Secret,
    options: &JoinOptions,
) -> Result<(SignalSender, SignalReceiver), SignalError> {
    connect(&endpoint(server), token, options)
        .await
        .map(|(sender, receiver, _)| (sender, receiver))
}

async fn join(
    server: &SfuServer,
    room: &str,
    identity: &str,
) -> (SignalSender, SignalReceiver, String) {
    let (sender, mut receiver) = open(server, &token(room, identity), &JoinOptions::default())
        .await
        .unwrap();
    match receiver.next().await.unwrap() {
        SignalEvent::Join(join) => (sender, receiver, join.participant_sid),
        other => panic!("the first message is {other:?}"),
    }
}

async fn wait<T>(
    receiver: &mut SignalReceiver,
    mut pick: impl FnMut(SignalEvent) -> Option<T>,
) -> T {
    loop {
        if let Some(found) = pick(receiver.next().await.unwrap()) {
            return found;
        }
    }
}

async fn leave(
    receiver: &mut SignalReceiver,
) -> (proto::DisconnectReason, proto::leave_request::Action) {
    wait(receiver, |event| match event {
        SignalEvent::Leave(leave) => Some((leave.reason, leave.action)),
        _ => None,
    })
    .await
}

/// Sends one HTTP request on a connection of its own. Returns status, head and body.
async fn http(
    server: &SfuServer,
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> (StatusCode, String, String) {
    let mut stream = tokio::net::TcpStream::connect(server.address())
        .await
        .unwrap();
    let mut request = format!(
        "{method} {target} HTTP/1.1\r\nhost: sfu\r\nconnection: close\r\ncontent-length: {}\r\n",
        body.len()
    );
    headers
        .iter()
        .for_each(|(name, value)| request.push_str(&format!("{name}: {value}\r\n")));
    request.push_str("\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    stream.write_all(body).await.unwrap();
    let mut response = Vec::new();
    stream.read_to_end(&mut response).await.unwrap();
    let text = String::from_utf8_lossy(&response).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (
        StatusCode::from_u16(status).unwrap(),
        head.to_lowercase(),
        body.to_owned(),
    )
}

#[test]
fn the_server_says_what_it_is_and_counts() {
    run(async {
        let server = start();
        let (status, _, body) = http(&server, "GET", "/", &[], b"").await;
        assert!(
            status == StatusCode::OK && body.contains("not a product SFU"),
            "{body}"
        );
        let _ann = join(&server, "hall", "ann").await;
        let (status, _, body) = http(&server, "GET", "/metrics", &[], b"").await;
        assert!(
            status == StatusCode::OK
                && body.contains("livekit_participant_total 1\n")
                && body.contains("livekit_room_total 1\n"),
            "{body}"
        );
        assert_eq!(server.statistics().lobby.participants, 1);
        assert_eq!(server.stop().lobby.since_start.joins, 1);
    });
}

#[test]
fn a_bad_token_is_refused_with_the_words_that_livekit_has() {
    run(async {
        let server = start();
        let forged = ApiKey::new(DEV_KEY, "another-secret-of-thirty-two-letters");
        let stranger = ApiKey::new("stranger", DEV_SECRET);
        let made = |key: &ApiKey, seconds| {
            key.join_token(
                "hall",
                "ann",
                "",
                Permissions::BOTH,
                Duration::from_secs(seconds),
            )
            .unwrap()
        };
        let service = key().service_token(None).unwrap();
        for (token, text) in [
            (made(&forged, 60), "invalid token, error: InvalidSignature"),
            (made(&stranger, 60), "invalid API key: stranger"),
            (
                Secret::new("no.token.at-all"),
                "invalid authorization token",
            ),
            (service, "permissions denied"),
        ] {
            match open(&server, &token, &JoinOptions::default()).await.err() {
                Some(
                    SignalError::Unauthorized(RefusedToken::ByServer(TokenRefusal {
                        text: said,
                        ..
                    }))
                    | SignalError::TokenUnseen { text: said, .. },
                ) => assert_eq!(said, text),
                other => panic!("{text}: {other:?}"),
            }
            let query = format!("/rtc/validate?access_token={}", token.expose());
            let (status, head, body) = http(&server, "GET", &query, &[], b"").await;
            assert_eq!((status, body.as_str()), (StatusCode::UNAUTHORIZED, text));
            assert!(
                head.contains("access-control-allow-origin: *"),
                "a browser must be able to read it: {head}"
            );
        }
        for (target, header, expected) in [
            (
                "/rtc/validate",
                ("x-none", ""),
                (StatusCode::UNAUTHORIZED, "permissions denied"),
            ),
            (
                "/rtc/validate",
                ("authorization", "Basic abc"),
                (
                    StatusCode::UNAUTHORIZED,
                    "invalid authorization header. Must start with Bearer ",
                ),
            ),
        ] {
            let (status, _, body) = http(&server, "GET", target, &[header], b"").await;
            assert_eq!((status, body.as_str()), expected);
        }
    });
}

#[test]
fn who_may_join_is_told_so_and_only_websockets_join() {
    run(async {
        let server = start();
        let bearer = format!("Bearer {}", token("hall", "ann").expose());
        let authorized = [("authorization", bearer.as_str())];
        for (target, expected) in [
            ("/rtc/validate", (StatusCode::OK, "success")),
            (
                "/rtc/v1/validate",
                (StatusCode::BAD_REQUEST, "join_request is required"),
            ),
            (
                "/rtc/v1/validate?join_request=%25%25",
                (
                    StatusCode::BAD_REQUEST,
                    "cannot base64 decode wrapped join request",
                ),
            ),
            (
                "/rtc/v1/validate?join_request=AAAA",
                (
                    StatusCode::BAD_REQUEST,
                    "cannot unmarshal wrapped join request",
                ),
            ),
            ("/rtc", (StatusCode::NOT_FOUND, "")),
            ("/rtc/v2", (StatusCode::NOT_FOUND, "")),
        ] {
            let (status, _, body) = http(&server, "GET", target, &authorized, b"").await;
            assert_eq!((status, body.as_str()), expected, "{target}");
        }
        assert_eq!(server.statistics().lobby.since_start.joins, 0);
    });
}

#[test]
fn a_participant_joins_answers_pings_and_leaves() {
    run(async {
        let server = start();
        let (mut sender, mut receiver, _) = join(&server, "hall", "ann").await;
        let offer = wait(&mut receiver, |event| match event {
            SignalEvent::Offer(offer) => Some(offer),
            _ => None,
        })
        .await;
        let local = LocalTransport {
            ufrag: "abcd".into(),
            pwd: "0123456789abcdefghijklmn".into(),
            fingerprint: Fingerprint([0xA5; 32]),
            setup: DtlsSetup::Active,
            candidates: vec![Candidate::host("127.0.0.1:9".parse().unwrap())],
            session_id: 1,
        };
        let answered = Answerer::new(Capabilities::SUBSCRIBER)
            .answer(&offer.sdp, &local)
            .unwrap();
        assert!(
            answered.remote.ice_lite && answered.remote.candidates[0].address.ip().is_loopback()
        );
        sender.answer(answered.sdp, offer.id).await.unwrap();
        sender.ping(42, Duration::ZERO).await.unwrap();
        let pong = wait(&mut receiver, |event| match event {
            SignalEvent::Pong { timestamp_us } => Some(timestamp_us),
            _ => None,
        });
        assert_eq!(pong.await, 42);
        sender.leave().await.unwrap();
        wait(&mut receiver, |event| {
            matches!(
                event,
                SignalEvent::Closed {
                    code: Some(1000),
                    ..
                }
            )
            .then_some(())
        })
        .await;
        assert_eq!(server.statistics().lobby.participants, 0);
    });
}

#[test]
fn a_newer_session_and_the_room_service_send_people_away() {
    run(async {
        use proto::leave_request::Action::Disconnect;
        let server = start();
        let service = RoomService::new(endpoint(&server), key());
        let (_first_sender, mut first, _) = join(&server, "hall", "ann").await;
        let (_second_sender, mut second, sid) = join(&server, "hall", "ann").await;
        assert_eq!(
            leave(&mut first).await,
            (proto::DisconnectReason::DuplicateIdentity, Disconnect)
        );
        let participants = service.list_participants("hall").await.unwrap();
        assert_eq!(
            participants
                .iter()
                .map(|info| info.sid.as_str())
                .collect::<Vec<_>>(),
            [sid]
        );

        let bearer = format!(
            "Bearer {}",
            key().service_token(Some("hall")).unwrap().expose()
        );
        let headers = [
            ("authorization", bearer.as_str()),
            ("content-type", "application/json"),
        ];
        let remove = "/twirp/livekit.RoomService/RemoveParticipant";
        let body = br#"{"room": "hall", "identity": "ann"}"#;
        assert_eq!(
            http(&server, "POST", remove, &headers, body).await.0,
            StatusCode::OK
        );
        assert_eq!(
            leave(&mut second).await,
            (proto::DisconnectReason::ParticipantRemoved, Disconnect)
        );
        let (status, _, said) = http(&server, "POST", remove, &headers, body).await;
        assert_eq!(
            (
                status,
                serde_json::from_str::<Value>(&said).unwrap()["code"].clone()
            ),
            (StatusCode::NOT_FOUND, json!("not_found"))
        );

        let (_sender, mut third, _) = join(&server, "hall", "carl").await;
        service.delete_room("hall").await.unwrap();
        assert_eq!(
            leave(&mut third).await,
            (proto::DisconnectReason::RoomDeleted, Disconnect)
        );
        assert!(
            service
                .delete_room("hall")
                .await
                .unwrap_err()
                .is_not_found()
        );
    });
}

#[test]
fn the_room_service_speaks_protobuf_and_json_and_keeps_to_grants() {
    run(async {
        let server = start();
        let service = RoomService::new(endpoint(&server), key());
        let room = service
            .create_room("hall", Duration::from_secs(60))
            .await
            .unwrap();
        assert_eq!((room.name.as_str(), room.empty_timeout), ("hall", 60));
        assert_eq!(service.list_rooms().await.unwrap(), [room]);
        assert!(matches!(
            RoomService::new(endpoint(&server), ApiKey::new(DEV_KEY, "wrong"))
                .list_rooms()
                .await,
            Err(RoomError::Unauthorized { .. })
        ));
        let admin = format!(
            "Bearer {}",
            key().service_token(Some("hall")).unwrap().expose()
        );
        let guest = format!("Bearer {}", token("hall", "ann").expose());
        let json = "application/json";
        for (bearer, content_type, method, body, expected) in [
            (
                &admin,
                json,
                "ListRooms",
                "{}",
                (200, r#"{"rooms":[{"sid":"#),
            ),
            (
                &admin,
                json,
                "CreateRoom",
                r#"{"name": ""}"#,
                (400, "invalid_argument"),
            ),
            (&admin, json, "CreateRoom", "{", (400, "malformed")),
            (&admin, json, "MutePublishedTrack", "{}", (404, "bad_route")),
            (&admin, "text/plain", "ListRooms", "{}", (404, "bad_route")),
            (
                &admin,
                json,
                "ListParticipants",
                r#"{"room": "another"}"#,
                (401, "unauthenticated"),
            ),
            (&guest, json, "ListRooms", "{}", (401, "unauthenticated")),
            (
                &guest,
                json,
                "DeleteRoom",
                r#"{"room": "hall"}"#,
                (401, "unauthenticated"),
            ),
        ] {
            let target = format!("/twirp/livekit.RoomService/{method}");
            let headers = [
                ("authorization", bearer.as_str()),
                ("content-type", content_type),
            ];
            let (status, _, said) = http(&server, "POST", &target, &headers, body.as_bytes()).await;
            assert!(
                status.as_u16() == expected.0 && said.contains(expected.1),
                "{method} {body}: {status} {said}"
            );
        }
        let large = vec![b' '; 100 << 10];
        let headers = [("authorization", admin.as_str()), ("content-type", json)];
        let (status, ..) = http(
            &server,
            "POST",
            "/twirp/livekit.RoomService/ListRooms",
            &headers,
            &large,
        )
        .await;
        assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    });
}

#[test]
fn a_session_is_resumed_by_its_sid_alone() {
    run(async {
        use proto::leave_request::Action;
        let server = start();
        let (sender, receiver, sid) = join(&server, "hall", "ann").await;
        drop((sender, receiver));
        let resume = |sid: &str| JoinOptions {
            resume: Some(sid.to_owned()),
            ..JoinOptions::default()
        };
        let (_, mut unknown) = open(&server, &token("hall", "ann"), &resume("PA_unknown"))
            .await
            .unwrap();
        assert_eq!(
            leave(&mut unknown).await,
            (proto::DisconnectReason::StateMismatch, Action::Reconnect)
        );
        let (_sender, mut resumed) = open(&server, &token("hall", "ann"), &resume(&sid))
            .await
            .unwrap();
        assert!(matches!(
            resumed.next().await.unwrap(),
            SignalEvent::Reconnect { .. }
        ));
        wait(&mut resumed, |event| {
            matches!(event, SignalEvent::Offer(_)).then_some(())
        })
        .await;
        let lobby = server.statistics().lobby;
        assert_eq!(
            (lobby.rooms, lobby.participants, lobby.since_start.joins),
            (1, 1, 1)
        );
    });
}

type RawSocket = tokio_tungstenite::WebSocketStream<tokio::net::TcpStream>;

/// Opens a WebSocket without our client around it.
async fn raw(server: &SfuServer, identity: &str) -> RawSocket {
    raw_at(server, identity, "/rtc?auto_subscribe=1&protocol=16").await
}

async fn raw_at(server: &SfuServer, identity: &str, path: &str) -> RawSocket {
    let mut request = format!("{}{path}", server.url())
        .into_client_request()
        .unwrap();
    let bearer = format!("Bearer {}", token("hall", identity).expose());
    request
        .headers_mut()
        .insert("authorization", bearer.parse().unwrap());
    let stream = tokio::net::TcpStream::connect(server.address())
        .await
        .unwrap();
    tokio_tungstenite::client_async(request, stream)
        .await
        .unwrap()
        .0
}

/// Returns the next text message, or `None` at the end.
async fn next_text(socket: &mut RawSocket) -> Option<Value> {
    loop {
        match socket.next().await?.ok()? {
            tungstenite::Message::Text(text) => return Some(serde_json::from_str(&text).unwrap()),
            tungstenite::Message::Close(_) => return None,
            _ => {}
        }
    }
}

/// An offer that has only data channels.
const DATA_OFFER: &str = "v=0\r\no=- 1 1 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\na=group:BUNDLE 0\r\n\
    m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\nc=IN IP4 0.0.0.0\r\na=ice-ufrag:abcd\r\n\
    a=ice-pwd:abcdefghijklmnopqrstuvwx\r\na=fingerprint:sha-256 \
    00:11:22:33:44:55:66:77:88:99:AA:BB:CC:DD:EE:FF:00:11:22:33:44:55:66:77:88:99:AA:BB:CC:DD:EE:FF\r\n\
    a=setup:actpass\r\na=mid:0\r\na=sctp-port:5000\r\n";

/// Joins with one connection, as this SDK does: the offer is sent with the join request.
async fn raw_single(server: &SfuServer, identity: &str, sdk: proto::client_info::Sdk) -> RawSocket {
    let request = proto::JoinRequest {
        client_info: Some(proto::ClientInfo {
            sdk: sdk.into(),
            protocol: 16,
            ..Default::default()
        }),
        publisher_offer: Some(proto::SessionDescription {
            r#type: "offer".into(),
            sdp: DATA_OFFER.into(),
            id: 1,
            ..Default::default()
        }),
        ..Default::default()
    };
    let wrapped = proto::WrappedJoinRequest {
        join_request: request.encode_to_vec(),
        ..Default::default()
    };
    let encoded = base64::engine::general_purpose::URL_SAFE.encode(wrapped.encode_to_vec());
    let path = format!("/rtc/v1?join_request={encoded}");
    raw_at(server, identity, &path).await
}

/// Reads messages until the server's answer.
async fn until_answer(socket: &mut RawSocket) {
    loop {
        let message = socket.next().await.unwrap().unwrap();
        let tungstenite::Message::Binary(bytes) = message else {
            continue;
        };
        let response = proto::SignalResponse::decode(bytes).unwrap();
        if let Some(proto::signal_response::Message::Answer(_)) = response.message {
            return;
        }
    }
}

/// The Go SDK applies the offer of its join only after the server's Join has arrived.
#[test]
fn the_answer_to_a_join_of_the_go_sdk_waits_for_its_first_candidate() {
    run(async {
        let server = start();
        let mut browser = raw_single(&server, "ann", proto::client_info::Sdk::Js).await;
        until_answer(&mut browser).await;
        let mut gopher = raw_single(&server, "bob", proto::client_info::Sdk::Go).await;
        let soon = Duration::from_millis(200);
        let early = tokio::time::timeout(soon, until_answer(&mut gopher)).await;
        assert!(early.is_err(), "an answer to an offer that is not set");
        let trickle = proto::SignalRequest {
            message: Some(Request::Trickle(proto::TrickleRequest {
                candidate_init: "{}".into(),
                ..Default::default()
            })),
        };
        gopher
            .send(tungstenite::Message::Binary(trickle.encode_to_vec().into()))
            .await
            .unwrap();
        until_answer(&mut gopher).await;
        // A client that sends no candidate gets its answer all the same.
        let mut silent = raw_single(&server, "eve", proto::client_info::Sdk::Go).await;
        until_answer(&mut silent).await;
    });
}

#[test]
fn a_client_that_writes_json_reads_json() {
    run(async {
        let server = start();
        let mut socket = raw(&server, "ann").await;
        let text = json!({"pingReq": {"timestamp": "12345", "rtt": "3"}}).to_string();
        socket
            .send(tungstenite::Message::Text(text.into()))
            .await
            .unwrap();
        let pong = next_text(&mut socket).await.unwrap();
        assert_eq!(pong["pongResp"]["lastPingTimestamp"], "12345", "{pong}");
        let add = json!({"addTrack": {"cid": "mine", "type": "VIDEO", "name": "cam"}}).to_string();
        socket
            .send(tungstenite::Message::Text(add.into()))
            .await
            .unwrap();
        let published = next_text(&mut socket).await.unwrap();
        assert_eq!(
            (
                &published["trackPublished"]["cid"],
                &published["trackPublished"]["track"]["type"]
            ),
            (&json!("mine"), &json!("VIDEO")),
            "{published}"
        );

        // Once it writes protobuf, it reads protobuf again.
        let ping = proto::SignalRequest {
            message: Some(Request::PingReq(proto::Ping {
                timestamp: 7,
                rtt: 0,
            })),
        };
        socket
            .send(tungstenite::Message::Binary(ping.encode_to_vec().into()))
            .await
            .unwrap();
        loop {
            let message = socket.next().await.unwrap().unwrap();
            let tungstenite::Message::Binary(bytes) = message else {
                continue;
            };
            let response = proto::SignalResponse::decode(bytes).unwrap();
            if let Some(proto::signal_response::Message::PongResp(pong)) = response.message {
                assert_eq!(pong.last_ping_timestamp, 7);
                break;
            }
        }
    });
}

#[test]
fn garbage_ends_its_own_connection_and_no_other() {
    run(async {
        let server = start();
        let (mut sender, mut receiver, _) = join(&server, "hall", "bystander").await;
        let garbage = [
            tungstenite::Message::Binary(vec![0xFF; 1000].into()),
            tungstenite::Message::Text("[[[[[[".into()),
        ];
        for (index, message) in garbage.into_iter().enumerate() {
            let mut socket = raw(&server, &format!("mallory-{index}")).await;
            socket.send(message).await.unwrap();
            let mut code = None;
            while let Some(Ok(message)) = socket.next().await {
                if let tungstenite::Message::Close(frame) = message {
                    code = frame.map(|frame| u16::from(frame.code));
                }
            }
            assert_eq!(code, Some(1007));
        }
        // Known requests whose content makes no sense, and descriptions that are not valid.
        let mut socket = raw(&server, "mallory").await;
        for request in [
            Request::Trickle(proto::TrickleRequest::default()),
            Request::Answer(proto::SessionDescription::default()),
            Request::TrackSetting(proto::UpdateTrackSettings {
                track_sids: vec![String::new(); 1000],
                ..Default::default()
            }),
            Request::Offer(proto::SessionDescription {
                sdp: "m=".repeat(100_000),
                ..Default::default()
            }),
        ] {
            let request = proto::SignalRequest {
                message: Some(request),
            };
            // The server may have closed the connection before the last one.
            let _ = socket
                .send(tungstenite::Message::Binary(request.encode_to_vec().into()))
                .await;
        }
        while let Some(Ok(_)) = socket.next().await {}
        sender.ping(1, Duration::ZERO).await.unwrap();
        wait(&mut receiver, |event| {
            matches!(event, SignalEvent::Pong { .. }).then_some(())
        })
        .await;
    });
}

#[test]
fn a_server_that_cannot_start_says_what_to_do() {
    let server = start();
    let config = |change: &dyn Fn(&mut ServerConfig)| {
        let mut config = ServerConfig::loopback(1);
        change(&mut config);
        SfuServer::start(config)
            .err()
            .map(|error: StartError| error.to_string())
            .unwrap_or_default()
    };
    let taken = config(&|config| config.listen = server.address());
    assert!(
        taken.contains("is in use") && taken.contains("--listen"),
        "{taken}"
    );
    let foreign = config(&|config| config.listen = "192.0.2.1:0".parse().unwrap());
    assert!(foreign.contains("no address of this host"), "{foreign}");
    assert!(config(&|config| config.api_secret = Secret::new("")).contains("must not be empty"));
    assert!(config(&|config| config.routers = 0).contains("1 to 256"));
}

#[test]
fn a_server_lives_and_ends_within_another_runtime() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let (first, second) = (start(), start());
        assert_ne!(first.address(), second.address());
        let _ann = join(&first, "hall", "ann").await;
        assert_eq!(
            (
                first.stop().lobby.participants,
                second.statistics().lobby.participants
            ),
            (1, 0)
        );
        drop(second);
    });
}

fn parsed(args: &[&str]) -> Result<cli::Sfu, String> {
    parsed_in(&[], args)
}

fn parsed_in(environment: &[(&str, &str)], args: &[&str]) -> Result<cli::Sfu, String> {
    let args = ["throng", "sfu"].iter().chain(args).map(Into::into);
    let env = |name: &str| {
        let mut found = environment.iter().filter(|(known, _)| *known == name);
        found.next().map(|(_, value)| (*value).to_owned())
    };
    match cli::parse_with(args, &env, 1, 0x0123_4567_89AB_CDEF) {
        Ok(CliCommand::Sfu(sfu)) => Ok(*sfu),
        Ok(_) => panic!("not the SFU"),
        Err(error) => Err(error.to_string()),
    }
}

#[test]
fn the_command_refuses_what_would_be_unsafe_or_senseless() {
    let sfu = parsed(&[]).unwrap();
    assert_eq!(
        (
            sfu.listen.to_string().as_str(),
            sfu.credentials.is_none(),
            sfu.seed
        ),
        ("127.0.0.1:7880", true, 0x0123_4567_89AB_CDEF)
    );
    let own = [
        "--listen",
        "0.0.0.0:1",
        "--api-key",
        "k",
        "--api-secret",
        DEV_SECRET,
        "--send",
        "gso",
        "--threads",
        "2",
    ];
    let sfu = parsed(&own).unwrap();
    assert!(
        sfu.credentials.is_some()
            && sfu.threads == Some(2)
            && sfu.send == throng::sfu::SendMode::Gso
    );
    for (args, reason) in [
        (
            &["--listen", "0.0.0.0:7880"][..],
            "everybody knows the default key",
        ),
        (&["--listen", "7880"], "invalid"),
        (&["--api-key", "mine"], "belong together"),
        (
            &["--api-key", "mine", "--api-secret", "short"],
            "32 characters",
        ),
        (
            &["--api-key", " ", "--api-secret", DEV_SECRET],
            "without spaces",
        ),
        (&["--send", "fast"], "plain"),
        (&["--threads", "0"], "--threads"),
        (
            &[&own[..], &["--seed", "1"][..]].concat(),
            "--seed is for tests on this host",
        ),
    ] {
        let refused = parsed(args).unwrap_err();
        assert!(refused.contains(reason), "{args:?}: {refused}");
    }
    assert_eq!(parsed(&["--seed", "1"]).unwrap().seed, 1);
}

#[test]
fn the_command_takes_its_key_pair_from_the_environment_as_the_others_do() {
    const KEY: (&str, &str) = ("LIVEKIT_API_KEY", "theirs");
    const SECRET: (&str, &str) = ("LIVEKIT_API_SECRET", "12345678901234567890123456789012");
    let pair = |sfu: cli::Sfu| sfu.credentials.map(|own| (own.api_key, own.api_secret));
    let owned = |key: &str, secret: &str| Some((key.to_owned(), secret.to_owned()));
    let open = ["--listen", "0.0.0.0:7880"];
    for args in [&[][..], &open] {
        let sfu = parsed_in(&[KEY, SECRET], args).unwrap();
        assert_eq!(pair(sfu), owned(KEY.1, SECRET.1));
    }
    let sfu = parsed_in(&[KEY, SECRET], &["--api-key", "mine"]).unwrap();
    assert_eq!(pair(sfu), owned("mine", SECRET.1));
    let flags = ["--api-key", "mine", "--api-secret", DEV_SECRET];
    let sfu = parsed_in(&[KEY, SECRET], &flags).unwrap();
    assert_eq!(pair(sfu), owned("mine", DEV_SECRET));
    let unset = [(KEY.0, ""), (SECRET.0, "")];
    assert_eq!(pair(parsed_in(&unset, &[]).unwrap()), None);

    for (environment, reason) in [
        (
            &[KEY][..],
            "only LIVEKIT_API_KEY is given: add --api-secret or set LIVEKIT_API_SECRET",
        ),
        (
            &[SECRET],
            "only LIVEKIT_API_SECRET is given: add --api-key or set LIVEKIT_API_KEY",
        ),
        (
            &[KEY, (SECRET.0, "short")],
            "LIVEKIT_API_SECRET takes 32 characters",
        ),
        (
            &[(KEY.0, "a key"), SECRET],
            "LIVEKIT_API_KEY takes a name without spaces",
        ),
    ] {
        let refused = parsed_in(environment, &[]).unwrap_err();
        assert!(refused.contains(reason), "{environment:?}: {refused}");
    }
}
