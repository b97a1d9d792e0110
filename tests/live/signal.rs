//! The signalling client and the room service against a real LiveKit server.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use throng::transport::rtp::Ssrc;

use crate::common::server::{Options, Server};
use crate::common::{in_a_process_of_its_own, test_name};
use livekit_protocol as proto;
use throng::codec::{Codec, RtcpFeedback};
use throng::signal::client::{
    self, JoinMode, JoinOptions, SignalError, SignalEvent, SignalReceiver, SignalSender, connect,
};
use throng::signal::fetch::FetchFault;
use throng::signal::link::{LinkFault, LinkStage};
use throng::signal::rooms::{RoomError, RoomService};
use throng::signal::{ApiKey, Endpoint, Permissions, Secret};
use throng::transport::sdp::{
    self, Answerer, Capabilities, DtlsSetup, Fingerprint, LocalTrack, LocalTransport, Negotiated,
    Offerer,
};

/// Limit for every wait. Everything here takes milliseconds, so what reaches it hangs.
const PATIENCE: Duration = Duration::from_secs(10);

fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(test)
}

fn token(api_key: &ApiKey, room: &str, identity: &str, permissions: Permissions) -> Secret {
    api_key
        .join_token(
            room,
            identity,
            identity,
            permissions,
            Duration::from_secs(600),
        )
        .unwrap()
}

struct Session {
    sender: SignalSender,
    receiver: SignalReceiver,
    join: client::Join,
}

impl Session {
    async fn open(
        server: &Server,
        room: &str,
        identity: &str,
        permissions: Permissions,
    ) -> Session {
        let token = token(&server.api_key(), room, identity, permissions);
        let (sender, receiver, _) = connect(&server.endpoint(), &token, &JoinOptions::default())
            .await
            .unwrap();
        Session::from_parts(sender, receiver).await
    }

    async fn from_parts(sender: SignalSender, mut receiver: SignalReceiver) -> Session {
        match tokio::time::timeout(PATIENCE, receiver.next())
            .await
            .unwrap()
            .unwrap()
        {
            SignalEvent::Join(join) => Session {
                sender,
                receiver,
                join: *join,
            },
            other => panic!("the first message is {other:?}"),
        }
    }

    /// Returns the first event that `pick` accepts. Earlier events are dropped.
    async fn wait<T>(&mut self, what: &str, mut pick: impl FnMut(SignalEvent) -> Option<T>) -> T {
        let waiting = async {
            loop {
                let event = self
                    .receiver
                    .next()
                    .await
                    .unwrap_or_else(|error| panic!("waiting for {what}: {error}"));
                assert!(!matches!(event, SignalEvent::Malformed { .. }), "{event:?}");
                if let Some(found) = pick(event) {
                    return found;
                }
            }
        };
        tokio::time::timeout(PATIENCE, waiting)
            .await
            .unwrap_or_else(|_| panic!("no {what} in {PATIENCE:?}"))
    }
}

fn local_transport() -> LocalTransport {
    LocalTransport {
        ufrag: "abcd".into(),
        pwd: "0123456789abcdefghijklmn".into(),
        fingerprint: Fingerprint([0xA5; 32]),
        setup: DtlsSetup::Active,
        candidates: vec![sdp::Candidate::host("127.0.0.1:40000".parse().unwrap())],
        session_id: 1,
    }
}

#[test]
fn a_token_signed_with_the_wrong_secret_is_refused_in_the_servers_words_but_without_the_token() {
    let Some(server) = Server::livekit() else {
        return;
    };
    run(async {
        let forger = ApiKey::new(&server.key, "another-secret-of-thirty-two-or-more-chars");
        let token = token(&forger, "hall", "p", Permissions::BOTH);
        let error = connect(&server.endpoint(), &token, &JoinOptions::default())
            .await
            .err()
            .unwrap();
        assert!(
            matches!(error, SignalError::Unauthorized { .. }),
            "{error:?}"
        );
        let shown = format!("{error} {error:?}");
        assert!(
            shown.contains("check API key and secret") && shown.contains("invalid token"),
            "{shown}"
        );
        assert!(!shown.contains(token.expose()), "{shown}");

        let stranger = ApiKey::new("nobody", &server.secret);
        let error = connect(
            &server.endpoint(),
            &self::token(&stranger, "hall", "p", Permissions::BOTH),
            &JoinOptions::default(),
        )
        .await
        .err()
        .unwrap();
        assert!(
            error.to_string().contains("invalid API key: nobody"),
            "{error}"
        );
    });
}

#[test]
fn what_is_no_livekit_server_is_told_apart() {
    run(async {
        let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let closed = held.local_addr().unwrap();
        drop(held);
        let any = Secret::new("x");
        let fails = async |url: String| {
            connect(
                &url.parse::<Endpoint>().unwrap(),
                &any,
                &JoinOptions::default(),
            )
            .await
            .err()
            .unwrap()
        };

        assert!(matches!(
            fails(format!("ws://{closed}")).await,
            SignalError::Link(LinkFault::Refused { .. })
        ));
        assert!(matches!(
            fails("ws://no-such-host.invalid:1".into()).await,
            SignalError::Link(LinkFault::Resolve { .. })
        ));
        for (reply, tls, status) in [
            (
                "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
                false,
                404,
            ),
            (
                "HTTP/1.1 503 Unavailable\r\nContent-Length: 4\r\n\r\nbusy",
                false,
                503,
            ),
            (
                "HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
                false,
                302,
            ),
            (
                "HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n",
                true,
                0,
            ),
            (
                "HTTP/1.1 400 Bad Request\r\n\r\nThe plain HTTP request was sent to HTTPS port\n",
                true,
                0,
            ),
            ("\x15\x03\x01\x00\x02\x02\x46", true, 0),
            // HTTP version 1.0 alone is no sign of TLS.
            (
                "HTTP/1.0 404 Not Found\r\n\r\n404 page not found\n",
                false,
                404,
            ),
        ] {
            let error = fails(format!("ws://{}", serve_once(reply).await)).await;
            match error {
                SignalError::Link(LinkFault::TlsMismatch {
                    server_speaks_tls, ..
                }) => assert!(server_speaks_tls && tls, "{reply}"),
                SignalError::NotFound { .. } => assert_eq!(status, 404),
                SignalError::Server {
                    status: seen,
                    ref text,
                } => assert_eq!((seen, text.as_str()), (status, "busy")),
                SignalError::Http { status: seen, .. } => assert_eq!(seen, status),
                other => panic!("{reply}: {other:?}"),
            }
        }
        for reply in ["HHHH", "220 mail.test ESMTP\r\n"] {
            let error = fails(format!("ws://{}", serve_once(reply).await)).await;
            assert!(
                matches!(error, SignalError::Link(LinkFault::NotHttp { .. }))
                    && error.to_string().contains(&format!("'{}'", reply.trim())),
                "{error:?}"
            );
        }
        let error = fails(format!(
            "wss://{}",
            serve_once("HTTP/1.1 400 Bad Request\r\n\r\n").await
        ))
        .await;
        assert!(
            matches!(
                error,
                SignalError::Link(LinkFault::TlsMismatch {
                    server_speaks_tls: false,
                    ..
                })
            ),
            "{error:?}"
        );
        assert!(
            error.to_string().contains("use ws:// or http://"),
            "{error}"
        );
        let error = RoomService::new(
            format!(
                "https://{}",
                serve_once("HTTP/1.1 400 Bad Request\r\n\r\n").await
            )
            .parse()
            .unwrap(),
            ApiKey::new("k", "s"),
        );
        let error = error.list_rooms().await.unwrap_err();
        assert!(
            matches!(
                error,
                RoomError::FetchFault(FetchFault::Link(LinkFault::TlsMismatch {
                    server_speaks_tls: false,
                    ..
                }))
            ),
            "{error:?}"
        );
    });
}

/// Starts a server that sends `reply` to the first client, whatever the client asks for.
async fn serve_once(reply: &'static str) -> std::net::SocketAddr {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = [0; 4096];
        let _ = stream.read(&mut request).await;
        let _ = stream.write_all(reply.as_bytes()).await;
    });
    address
}

#[test]
fn a_server_that_never_answers_is_given_up_in_time() {
    run(async {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint: Endpoint = format!("ws://{}", silent.local_addr().unwrap())
            .parse()
            .unwrap();
        let options = JoinOptions {
            timeout: Duration::from_millis(50),
            ..Default::default()
        };
        let error = connect(&endpoint, &Secret::new("x"), &options)
            .await
            .err()
            .unwrap();
        let SignalError::Link(LinkFault::Slow { stage, .. }) = &error else {
            panic!("{error:?}");
        };
        assert_eq!(*stage, LinkStage::UpgradeAnswer);
        assert!(
            error
                .to_string()
                .contains("TCP was open), and the WebSocket's answer did not come within 0.05 s"),
            "{error}"
        );
    });
}

/// The trusted certificates are read once per process, so a child process runs this test with its
/// own.
#[test]
fn tls_is_spoken_with_who_is_trusted_and_with_nobody_else() {
    const CHILD: &str = "THRONG_TEST_TLS_DIRECTORY";
    if let Some(directory) = std::env::var_os(CHILD) {
        let (_, _, times) = run(connect_to_tls_server(Path::new(&directory))).unwrap();
        assert!(times.tls.unwrap() > Duration::ZERO && times.total() > times.tls.unwrap());
        return;
    }
    let directory = std::env::temp_dir().join(format!("throng-tls-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(directory.join("certificate.pem"), made.cert.pem()).unwrap();
    std::fs::write(directory.join("key.pem"), made.signing_key.serialize_pem()).unwrap();

    let error = run(connect_to_tls_server(&directory)).err().unwrap();
    assert!(
        matches!(error, SignalError::Link(LinkFault::Tls { .. }))
            && error.to_string().contains("SSL_CERT_FILE"),
        "{error:?}"
    );
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    let name = "tls_is_spoken_with_who_is_trusted_and_with_nobody_else";
    child.args([&test_name(module_path!(), name), "--exact"]);
    let output = child
        .env(CHILD, &directory)
        .env("SSL_CERT_FILE", directory.join("certificate.pem"))
        .output()
        .unwrap();
    std::fs::remove_dir_all(&directory).unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
}

/// Connects to a WebSocket server of our own that uses the certificate in `directory`.
async fn connect_to_tls_server(
    directory: &Path,
) -> Result<(SignalSender, SignalReceiver, client::ConnectTimes), SignalError> {
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
    let certificate = CertificateDer::from_pem_file(directory.join("certificate.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_file(directory.join("key.pem")).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(
        rustls::crypto::ring::default_provider(),
    ));
    let config = config
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint: Endpoint = format!("wss://localhost:{}", listener.local_addr().unwrap().port())
        .parse()
        .unwrap();
    tokio::spawn(async move {
        if let Ok(stream) = acceptor.accept(listener.accept().await.unwrap().0).await {
            let _websocket = tokio_tungstenite::accept_async(stream).await;
        }
    });
    connect(&endpoint, &Secret::new("token"), &JoinOptions::default()).await
}

#[test]
fn rooms_are_made_listed_and_deleted() {
    let Some(server) = Server::livekit() else {
        return;
    };
    run(async {
        let rooms = RoomService::new(server.endpoint(), server.api_key());
        let room = rooms
            .create_room("hall", Duration::from_secs(60))
            .await
            .unwrap();
        assert!(
            room.sid.starts_with("RM_") && room.name == "hall" && room.empty_timeout == 60,
            "{room:?}"
        );
        rooms
            .create_room("attic", Duration::from_secs(60))
            .await
            .unwrap();
        let mut names: Vec<String> = rooms
            .list_rooms()
            .await
            .unwrap()
            .into_iter()
            .map(|room| room.name)
            .collect();
        names.sort();
        assert_eq!(names, ["attic", "hall"]);
        assert!(rooms.list_participants("hall").await.unwrap().is_empty());
        rooms.delete_room("attic").await.unwrap();
        assert_eq!(rooms.list_rooms().await.unwrap().len(), 1);

        let error = rooms.delete_room("cellar").await.unwrap_err();
        assert!(
            matches!(error, RoomError::Other { status: 404, .. }),
            "{error:?}"
        );
        let forger = RoomService::new(
            server.endpoint(),
            ApiKey::new(&server.key, "another-secret-of-thirty-two-or-more-chars"),
        );
        let error = forger.list_rooms().await.unwrap_err();
        assert!(
            matches!(&error, RoomError::Unauthorized { text } if text.contains("invalid token: ***")),
            "{error:?}"
        );
    });
}

#[test]
fn a_room_service_that_is_not_there_is_unreachable() {
    run(async {
        let rooms = RoomService::new("ws://127.0.0.1:1".parse().unwrap(), ApiKey::new("k", "s"));
        let error = rooms.list_rooms().await.unwrap_err();
        assert!(
            matches!(
                error,
                RoomError::FetchFault(FetchFault::Link(LinkFault::Refused { .. }))
            ),
            "{error:?}"
        );
    });
}

#[test]
fn a_server_that_makes_no_rooms_says_that_there_is_none() {
    let Some(server) = Server::livekit_with(&Options {
        auto_create: false,
        ..Options::default()
    }) else {
        return;
    };
    run(async {
        let token = token(&server.api_key(), "nowhere", "p", Permissions::SUBSCRIBER);
        let error = connect(&server.endpoint(), &token, &JoinOptions::default())
            .await
            .err()
            .unwrap();
        assert!(matches!(error, SignalError::NotFound { .. }), "{error:?}");
        let said = error.to_string();
        assert!(
            said.contains("requested room does not exist") && said.contains("room.auto_create"),
            "{said}"
        );
    });
}

#[test]
fn a_subscriber_gets_join_and_an_offer_that_we_can_answer() {
    let Some(server) = Server::livekit() else {
        return;
    };
    run(async {
        let mut session = Session::open(&server, "hall", "listener", Permissions::SUBSCRIBER).await;
        let join = session.join.clone();
        assert!(
            join.participant_sid.starts_with("PA_") && join.room_sid.starts_with("RM_"),
            "{join:?}"
        );
        assert_eq!(
            (join.identity.as_str(), join.room_name.as_str()),
            ("listener", "hall")
        );
        assert!(
            join.subscriber_primary && join.others.is_empty() && !join.server_version.is_empty(),
            "{join:?}"
        );
        assert!(join.ping_interval > Duration::ZERO && join.ping_timeout > join.ping_interval);

        let offer = session
            .wait("offer", |event| {
                if let SignalEvent::Offer(offer) = event {
                    Some(offer)
                } else {
                    None
                }
            })
            .await;
        let answered = Answerer::new(Capabilities::SUBSCRIBER)
            .answer(&offer.sdp, &local_transport())
            .unwrap();
        assert_eq!(
            (answered.setup, answered.remote.setup),
            (DtlsSetup::Active, DtlsSetup::ActPass)
        );
        assert!(
            answered.added.is_empty() && answered.sections_read == 1,
            "{}",
            offer.sdp
        );
        session.sender.answer(answered.sdp, offer.id).await.unwrap();
        // Candidates are trickled, for UDP and TCP.
        let ufrag = answered.remote.ufrag;
        let candidate = session.wait("candidate", |event| match event {
            SignalEvent::Trickle(trickle) if !trickle.candidate_init.is_empty() => Some(trickle),
            SignalEvent::Leave(leave) => panic!("{leave:?}"),
            _ => None,
        });
        let candidate = candidate.await;
        assert_eq!(candidate.target, proto::SignalTarget::Subscriber);
        let trickled: sdp::Trickled = candidate.candidate_init.parse().unwrap();
        assert!(trickled.candidate.unwrap().address.ip().is_loopback());
        assert!(trickled.ufrag.is_none_or(|of| of == ufrag));
    });
}

fn audio_track(cid: &str) -> (proto::AddTrackRequest, LocalTrack) {
    let request = proto::AddTrackRequest {
        cid: cid.into(),
        r#type: proto::TrackType::Audio.into(),
        source: proto::TrackSource::Microphone.into(),
        ..Default::default()
    };
    (
        request,
        LocalTrack {
            codec: Codec::Opus,
            cid: cid.into(),
            stream_id: "stream".into(),
            ssrc: Ssrc(1001),
            rtx_ssrc: None,
            rids: Vec::new(),
        },
    )
}

fn video_track(cid: &str, rids: &[&str]) -> (proto::AddTrackRequest, LocalTrack) {
    let layer = |quality: proto::VideoQuality, scale: u32| proto::VideoLayer {
        quality: quality.into(),
        width: 1280 / scale,
        height: 720 / scale,
        bitrate: 1_500_000 / scale,
        ..Default::default()
    };
    let layers = vec![
        layer(proto::VideoQuality::Low, 4),
        layer(proto::VideoQuality::Medium, 2),
        layer(proto::VideoQuality::High, 1),
    ];
    let request = proto::AddTrackRequest {
        cid: cid.into(),
        r#type: proto::TrackType::Video.into(),
        source: proto::TrackSource::Camera.into(),
        width: 1280,
        height: 720,
        layers: if rids.is_empty() {
            layers[2..].to_vec()
        } else {
            layers
        },
        ..Default::default()
    };
    let rids = rids.iter().map(|rid| (*rid).to_owned()).collect();
    (
        request,
        LocalTrack {
            codec: Codec::Vp8,
            cid: cid.into(),
            stream_id: "stream".into(),
            ssrc: Ssrc(2001),
            rtx_ssrc: Some(Ssrc(2002)),
            rids,
        },
    )
}

/// Announces the tracks, offers them and reads the answer.
async fn publish(
    session: &mut Session,
    tracks: Vec<(proto::AddTrackRequest, LocalTrack)>,
    application: bool,
) -> (client::Description, Negotiated) {
    for (request, _) in &tracks {
        session.sender.add_track(request.clone()).await.unwrap();
        let published = session.wait("TrackPublished", |event| {
            if let SignalEvent::TrackPublished { cid, track } = event {
                Some((cid, track))
            } else {
                None
            }
        });
        let (cid, track) = published.await;
        assert_eq!(cid, request.cid);
        assert!(track.sid.starts_with("TR_"), "{track:?}");
    }
    let mut offerer = Offerer::default();
    if application {
        offerer.open_data();
    }
    tracks
        .into_iter()
        .for_each(|(_, local)| offerer.send(local));
    session
        .sender
        .offer(offerer.offer(&local_transport()), 1)
        .await
        .unwrap();
    let answer = session
        .wait("answer", |event| {
            if let SignalEvent::Answer(answer) = event {
                Some(answer)
            } else {
                None
            }
        })
        .await;
    let parsed = offerer
        .handle_answer(&answer.sdp)
        .unwrap_or_else(|error| panic!("{error}: {}", answer.sdp));
    (answer, parsed)
}

#[test]
fn a_publishers_offer_is_answered_with_the_codecs_extensions_and_feedback_that_it_asked_for() {
    let Some(server) = Server::livekit() else {
        return;
    };
    run(async {
        let rids = ["q", "h", "f"];
        for (identity, rids, application) in
            [("plain", &rids[..0], true), ("simulcast", &rids[..], false)]
        {
            let mut session =
                Session::open(&server, "hall", identity, Permissions::PUBLISHER).await;
            let (answer, parsed) = publish(
                &mut session,
                vec![audio_track("mic"), video_track("cam", rids)],
                application,
            )
            .await;
            assert_eq!((answer.id, parsed.remote.setup), (1, DtlsSetup::Passive));
            let [audio, video] = parsed.media.as_slice() else {
                panic!("{}", answer.sdp)
            };
            assert!(audio.accepted && video.accepted, "{}", answer.sdp);
            assert_eq!(
                (
                    audio.payloads.unwrap().payload_type,
                    video.payloads.unwrap().payload_type,
                    video.rtx_payload_type
                ),
                (111, 96, Some(97)),
                "{}",
                answer.sdp
            );
            assert_eq!(
                video.extensions.id(sdp::Extension::Mid),
                Some(sdp::Extension::Mid.offered_id())
            );
            assert_eq!(
                video.extensions.id(sdp::Extension::Rid).is_some(),
                !rids.is_empty(),
                "{}",
                answer.sdp
            );
            assert_eq!(
                audio.extensions.id(sdp::Extension::AudioLevel),
                Some(sdp::Extension::AudioLevel.offered_id())
            );
            assert!(
                audio.feedback.contains(RtcpFeedback::Nack),
                "{}",
                answer.sdp
            );
            assert!(
                video.feedback.contains(RtcpFeedback::Nack)
                    && video.feedback.contains(RtcpFeedback::NackPli),
                "{}",
                answer.sdp
            );
        }
    });
}

#[test]
fn a_ping_comes_back_with_its_own_time() {
    let Some(server) = Server::livekit() else {
        return;
    };
    run(async {
        let mut session = Session::open(&server, "hall", "p", Permissions::SUBSCRIBER).await;
        let started = Instant::now();
        let mut rtts = Vec::new();
        for _ in 0..20 {
            let sent_us = started.elapsed().as_micros() as i64;
            session.sender.ping(sent_us, Duration::ZERO).await.unwrap();
            let echoed = session
                .wait("pong", |event| {
                    if let SignalEvent::Pong { timestamp_us } = event {
                        Some(timestamp_us)
                    } else {
                        None
                    }
                })
                .await;
            assert_eq!(echoed, sent_us);
            rtts.push(started.elapsed().as_micros() as i64 - echoed);
        }
        rtts.sort_unstable();
        eprintln!(
            "signalling round trip on loopback: p50 {} us, max {} us",
            rtts[10], rtts[19]
        );
        assert!(rtts[10] < 100_000, "{rtts:?}");
    });
}

#[test]
fn leaving_is_seen_at_once() {
    let Some(server) = Server::livekit() else {
        return;
    };
    run(async {
        let rooms = RoomService::new(server.endpoint(), server.api_key());
        let mut session = Session::open(&server, "hall", "p", Permissions::SUBSCRIBER).await;
        assert_eq!(rooms.list_participants("hall").await.unwrap().len(), 1);
        let left = Instant::now();
        session.sender.leave().await.unwrap();
        while !rooms.list_participants("hall").await.unwrap().is_empty() {
            assert!(left.elapsed() < Duration::from_secs(2), "still there");
        }
        eprintln!("gone {:?} after leave", left.elapsed());
        let end = session.wait("end", |event| {
            if let SignalEvent::Closed { .. } = event {
                Some(())
            } else {
                None
            }
        });
        end.await;
        assert!(matches!(
            session.receiver.next().await,
            Err(SignalError::Closed)
        ));
    });
}

#[test]
fn a_second_participant_of_the_same_identity_evicts_the_first() {
    let Some(server) = Server::livekit() else {
        return;
    };
    run(async {
        let mut first = Session::open(&server, "hall", "twin", Permissions::SUBSCRIBER).await;
        let _second = Session::open(&server, "hall", "twin", Permissions::SUBSCRIBER).await;
        let leave = first
            .wait("leave", |event| {
                if let SignalEvent::Leave(leave) = event {
                    Some(leave)
                } else {
                    None
                }
            })
            .await;
        assert_eq!(leave.reason, proto::DisconnectReason::DuplicateIdentity);
        assert_eq!(leave.action, proto::leave_request::Action::Disconnect);
    });
}

#[test]
fn deleting_a_room_sends_everybody_away() {
    let Some(server) = Server::livekit() else {
        return;
    };
    run(async {
        let rooms = RoomService::new(server.endpoint(), server.api_key());
        let mut session = Session::open(&server, "hall", "p", Permissions::SUBSCRIBER).await;
        rooms.delete_room("hall").await.unwrap();
        let leave = session
            .wait("leave", |event| {
                if let SignalEvent::Leave(leave) = event {
                    Some(leave)
                } else {
                    None
                }
            })
            .await;
        assert_eq!(leave.reason, proto::DisconnectReason::RoomDeleted);
    });
}

#[test]
fn one_connection_takes_tracks_and_offer_with_the_join() {
    let Some(server) = Server::livekit() else {
        return;
    };
    run(async {
        let (request, local) = audio_track("mic");
        let mut offerer = Offerer::default();
        offerer.send(local);
        let connection = JoinMode::Single {
            add_tracks: vec![request],
            publisher_offer: Some((offerer.offer(&local_transport()), 1)),
        };
        let token = token(&server.api_key(), "hall", "p", Permissions::BOTH);
        let (sender, receiver, _) = connect(
            &server.endpoint(),
            &token,
            &JoinOptions {
                connection,
                ..Default::default()
            },
        )
        .await
        .unwrap();
        let mut session = Session::from_parts(sender, receiver).await;
        let (mut published, mut answered) = (false, false);
        session
            .wait("track and answer", |event| {
                published |=
                    matches!(&event, SignalEvent::TrackPublished { cid, .. } if cid == "mic");
                answered |= matches!(&event, SignalEvent::Answer(answer) if answer.id == 1);
                (published && answered).then_some(())
            })
            .await;
    });
}

#[test]
fn a_hundred_participants_join_at_once_and_cost_little_memory() {
    let name = "a_hundred_participants_join_at_once_and_cost_little_memory";
    if !in_a_process_of_its_own(module_path!(), name) {
        return;
    }
    let Some(server) = Server::livekit() else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let (endpoint, api_key) = (server.endpoint(), server.api_key());
    // The first connection loads what is needed only once. That is not part of the cost of each.
    let first = token(&api_key, "hall", "p-first", Permissions::SUBSCRIBER);
    let first = runtime.block_on(async {
        let (sender, receiver, _) = connect(&endpoint, &first, &JoinOptions::default())
            .await
            .unwrap();
        Session::from_parts(sender, receiver).await
    });
    let before = resident_bytes();
    let sessions = runtime.block_on(async {
        let joins: Vec<_> = (0..100)
            .map(|index| {
                let (endpoint, token) = (
                    endpoint.clone(),
                    token(
                        &api_key,
                        "hall",
                        &format!("p-{index}"),
                        Permissions::SUBSCRIBER,
                    ),
                );
                tokio::spawn(async move {
                    let (sender, receiver, times) =
                        connect(&endpoint, &token, &JoinOptions::default())
                            .await
                            .unwrap();
                    (Session::from_parts(sender, receiver).await, times)
                })
            })
            .collect();
        let mut sessions = Vec::new();
        for join in joins {
            sessions.push(tokio::time::timeout(PATIENCE, join).await.unwrap().unwrap());
        }
        sessions
    });
    let after = resident_bytes();
    let mut websocket: Vec<Duration> = sessions.iter().map(|(_, times)| times.websocket).collect();
    websocket.sort();
    let per_connection = after.saturating_sub(before) / 100;
    eprintln!(
        "100 joins at once: WebSocket p50 {:?}, max {:?}; {per_connection} bytes resident each",
        websocket[50], websocket[99]
    );
    drop(first);
    assert!(per_connection < 32 << 10, "{per_connection} bytes");
    let most = sessions
        .iter()
        .map(|(session, _)| session.join.others.len())
        .max()
        .unwrap();
    let fullest = sessions
        .iter()
        .find(|(session, _)| session.join.others.len() == most)
        .unwrap();
    assert_eq!(
        fullest
            .0
            .join
            .others
            .identities()
            .filter(|identity| identity.starts_with("p-"))
            .count(),
        most
    );
}

/// Returns this process's resident memory.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}
