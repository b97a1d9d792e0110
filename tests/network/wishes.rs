//! What LiveKit wants of its clients in a run, brought about by what LiveKit has for its own tests:
//! a client may ask it to simulate a fault. Ours does not, so a front says it in its place.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use livekit_protocol as proto;
use prost::Message;
use proto::simulate_scenario::Scenario;

use crate::common::coturn::{Coturn, PASSWORD, USER};
use crate::common::program::beside_one_other;
use crate::common::server::Server;

use super::paths::{address_of, run_through, unwrapped};

/// Participants of a run of [`run_through`].
const PEOPLE: usize = 3;
/// When the wish is said, since the WebSocket was asked for.
const WISHED_AFTER: Duration = Duration::from_secs(2);
/// When signalling breaks then, where it does.
const BROKEN_AFTER: Duration = Duration::from_secs(1);

fn switch_to(protocol: proto::CandidateProtocol) -> Scenario {
    Scenario::SwitchCandidateProtocol(protocol.into())
}

#[test]
fn a_server_that_moves_a_client_to_tcp_is_obeyed_on_the_same_connection() {
    let Some(server) = Server::livekit() else {
        return;
    };
    let _turn = beside_one_other();
    let front = wishing_front(
        address_of(&server),
        switch_to(proto::CandidateProtocol::Tcp),
        None,
    );
    let (url, more) = (format!("ws://{front}"), ["--duration", "9"]);
    // LiveKit restarts ICE of its own accord only on the connection that it offers.
    let (finished, report) = run_through(&url, &server, "dual", &more);
    let said = unwrapped(&finished);
    assert_eq!(report.counter("session", "joins_by_udp"), 3, "{said}");
    assert_eq!(report.counter("session", "disconnects"), 0, "{said}");
    let told = "2 participants sent media over TCP in the end: the server restarted ICE with TCP candidates alone";
    assert!(said.contains(told), "{said}");
    let audio = |name| report.counter("audio", name) as f64;
    let delivered = audio("frames_delivered") / audio("frames_expected");
    // For 200 ms the server's UDP candidates were waited for, which is more than 1 %.
    assert!(delivered > 0.9, "{delivered}: {said}");
    assert_eq!(report.0["engine"]["send_errors"], 0, "{said}");
}

#[test]
fn a_server_that_moves_a_client_to_a_relay_is_obeyed_on_the_same_connections() {
    let (Some(server), Some(relay)) = (
        Server::livekit(),
        Coturn::start(Ipv4Addr::LOCALHOST, &["--allow-loopback-peers"]),
    ) else {
        return;
    };
    let _turn = beside_one_other();
    let turn = relay.url_for("turn-udp");
    for connection in ["single", "dual"] {
        // It says so when a client comes back.
        let wish = switch_to(proto::CandidateProtocol::Tls);
        let front = wishing_front(address_of(&server), wish, Some(BROKEN_AFTER));
        let more = ["--duration", "10", "--turn", &turn];
        let who = ["--turn-user", USER, "--turn-password", PASSWORD];
        let more = [&more[..], &who].concat();
        let url = format!("ws://{front}");
        let (finished, report) = run_through(&url, &server, connection, &more);
        let said = unwrapped(&finished);
        let session = |name| report.counter("session", name);
        assert_eq!(session("joins_by_udp"), 3, "{said}");
        assert_eq!(session("disconnects"), 0, "{said}");
        assert_eq!(session("reconnects_ok"), 3, "{said}");
        let told = format!(
            "3 participants sent media through the TURN server {turn} in the end: the server wanted it when the session was resumed"
        );
        assert!(said.contains(&told), "{connection}: {said}");
        let audio = |name| report.counter("audio", name) as f64;
        let delivered = audio("frames_delivered") / audio("frames_expected");
        assert!(delivered > 0.9, "{connection}, {delivered}: {said}");
        assert_eq!(report.0["engine"]["send_errors"], 0, "{said}");
    }
}

/// A client's request that LiveKit take such a fault for real, as a frame of its WebSocket.
fn frame_of(wish: Scenario) -> Vec<u8> {
    let scenario = Some(wish);
    let message = Some(proto::signal_request::Message::Simulate(
        proto::SimulateScenario { scenario },
    ));
    let payload = proto::SignalRequest { message }.encode_to_vec();
    let len = u8::try_from(payload.len()).expect("a short message");
    assert!(len < 126, "{len}");
    // RFC 6455, section 5.2: final and binary, masked, and with a mask of zeros.
    [&[0x82, 0x80 | len, 0, 0, 0, 0][..], &payload].concat()
}

/// What becomes of the first WebSockets.
#[derive(Clone)]
struct Plan {
    frame: Vec<u8>,
    breaks_after: Option<Duration>,
}

/// Forwards to `to`, and has the first WebSocket of each participant say so; that one may break
/// after it.
fn wishing_front(to: SocketAddr, wish: Scenario, breaks_after: Option<Duration>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("an address");
    let plan = Plan {
        frame: frame_of(wish),
        breaks_after,
    };
    let begun = Arc::new(AtomicUsize::new(0));
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let Ok(server) = TcpStream::connect(to) else {
                continue;
            };
            let (plan, begun) = (plan.clone(), begun.clone());
            let back = server.try_clone().expect("a socket");
            let mut answers = client.try_clone().expect("a socket");
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut &back, &mut answers);
                let _ = answers.shutdown(Shutdown::Write);
            });
            std::thread::spawn(move || pump(client, server, &plan, &begun));
        }
    });
    address
}

/// Hands on what the client says; of a WebSocket also the frame, where nothing else has come for a
/// while: so it lies between two frames.
fn pump(mut client: TcpStream, mut server: TcpStream, plan: &Plan, begun: &AtomicUsize) {
    let idle = Duration::from_millis(50);
    client.set_read_timeout(Some(idle)).expect("a time-out");
    let mut buffer = vec![0; 1 << 16];
    let mut wish_at: Option<Instant> = None;
    let mut break_at: Option<Instant> = None;
    let is_due = |at: &mut Instant| Instant::now() >= *at;
    loop {
        match client.read(&mut buffer) {
            Ok(0) => break,
            Ok(len) => {
                let text = String::from_utf8_lossy(&buffer[..len]).to_lowercase();
                if text.contains("upgrade: websocket")
                    && begun.fetch_add(1, Ordering::Relaxed) < PEOPLE
                {
                    wish_at = Some(Instant::now() + WISHED_AFTER);
                }
                if server.write_all(&buffer[..len]).is_err() {
                    break;
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if wish_at.take_if(is_due).is_some() {
                    let _ = server.write_all(&plan.frame);
                    break_at = plan.breaks_after.map(|after| Instant::now() + after);
                }
                if break_at.take_if(is_due).is_some() {
                    let _ = client.shutdown(Shutdown::Both);
                    break;
                }
            }
            Err(_) => break,
        }
    }
    let _ = server.shutdown(Shutdown::Both);
}
