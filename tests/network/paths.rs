//! Media goes to the server's candidates, even if signalling came through another address family or
//! a forwarded port. If media cannot get there, the run says so at once and names both ends.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

use crate::common::network::{DEVICE, Namespace, Network, SERVER};
use crate::common::program::{
    Finished, Report, Running, Scratch, against, alone, beside_one_other, run, throng,
};
use crate::common::server::{Options, Server, Site};
use rustix::process::{Pid, Signal, kill_process};

/// The server's, in a network of the test's own.
pub(super) const SITE: Site = Site {
    address: SERVER,
    device: DEVICE,
};
const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

/// Forwards TCP from a free port of `listen` to `to`, as `docker -p`, `kubectl port-forward` and
/// `ssh -L` do, until the test's process ends.
fn forward(listen: IpAddr, to: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind((listen, 0)).expect("a free port");
    let address = listener.local_addr().expect("a bound socket");
    std::thread::spawn(move || {
        while let Ok((client, _)) = listener.accept() {
            let Ok(server) = TcpStream::connect(to) else {
                continue;
            };
            for (mut from, mut to) in [
                (client.try_clone().unwrap(), server.try_clone().unwrap()),
                (server, client),
            ] {
                std::thread::spawn(move || {
                    let _ = io::copy(&mut from, &mut to);
                    let _ = to.shutdown(std::net::Shutdown::Write);
                });
            }
        }
    });
    address
}

/// `nft` in this network namespace.
pub(super) fn wall(rules: &[&str]) {
    for rule in rules {
        let done = Command::new("nft").arg(rule).status().expect("nft");
        assert!(done.success(), "{rule}");
    }
}

pub(super) fn address_of(server: &Server) -> SocketAddr {
    let authority = server.url.strip_prefix("ws://").expect("our own URL");
    authority.parse().expect("an address and a port")
}

/// LiveKit with default options.
pub(super) fn livekit_in(namespace: &Namespace) -> Option<Server> {
    let options = Options {
        site: SITE,
        ..Options::default()
    };
    namespace.run(|| Server::livekit_with(&options))
}

/// A run of one publisher and two subscribers through `url`; for 3 s, unless `more` says otherwise.
pub(super) fn run_through(
    url: &str,
    server: &Server,
    connection: &str,
    more: &[&str],
) -> (Finished, Report) {
    let scratch = Scratch::new();
    let json = scratch.path("run.json");
    let mut command = throng();
    command
        .env("LIVEKIT_URL", url)
        .env("LIVEKIT_API_KEY", &server.key)
        .env("LIVEKIT_API_SECRET", &server.secret)
        .args(["--publishers", "1", "--subscribers", "2"])
        .args(["--connection", connection, "--json"])
        .arg(&json)
        .args(more);
    if !more.contains(&"--duration") {
        command.args(["--duration", "3"]);
    }
    let finished = run(&mut command, &server.secret);
    let report = Report::read(&json, &server.secret);
    (finished, report)
}

/// Returns what the run printed, on one line.
pub(super) fn unwrapped(finished: &Finished) -> String {
    let words = finished.stdout.split_whitespace();
    words.collect::<Vec<_>>().join(" ")
}

pub(super) fn joins_and_flows(what: &str, finished: &Finished, report: &Report) {
    assert_eq!(
        report.counter("session", "joins_ok"),
        3,
        "{what}: {}\n{}",
        finished.stdout,
        finished.stderr
    );
    assert!(
        report.counter("audio", "frames_delivered") > 150,
        "{what}: {}",
        finished.stdout
    );
    for name in [
        "sends_refused",
        "sends_unreachable",
        "sends_blocked",
        "sends_too_long",
        "sends_mismatched",
    ] {
        assert_eq!(report.counter("session", name), 0, "{what}: {name}");
    }
    assert_eq!(report.0["engine"]["send_errors"], 0, "{what}");
    // On a busy host a run may be INVALID because the host was late.
    assert!(
        matches!(finished.code, Some(0 | 98)),
        "{what}: {}",
        finished.stdout
    );
}

#[test]
fn signalling_by_ipv6_and_media_by_ipv4() {
    let options = Options {
        signalling: Some(V6),
        ..Options::default()
    };
    let Some(server) = Server::livekit_with(&options) else {
        return;
    };
    let _turn = beside_one_other();
    for connection in ["single", "dual"] {
        let (finished, report) = run_through(&server.url, &server, connection, &[]);
        joins_and_flows(connection, &finished, &report);
    }
}

#[test]
fn signalling_by_ipv4_and_media_by_ipv6() {
    let server = Server::embedded_on(V6);
    let front = forward(V4, address_of(&server));
    let _turn = beside_one_other();
    for connection in ["single", "dual"] {
        let (finished, report) = run_through(&format!("ws://{front}"), &server, connection, &[]);
        joins_and_flows(connection, &finished, &report);
    }
}

#[test]
fn signalling_through_a_forwarded_port_and_media_by_the_servers_own_address() {
    let name = "signalling_through_a_forwarded_port_and_media_by_the_servers_own_address";
    let Some(network) = Network::for_test(module_path!(), name, 1) else {
        return;
    };
    let _turn = beside_one_other();
    for embedded in [false, true] {
        let server = if embedded {
            Some(network.server.run(|| Server::embedded_at(SITE)))
        } else {
            livekit_in(&network.server)
        };
        let Some(server) = server else { return };
        let to = address_of(&server);
        network.clients.run(|| {
            let front = forward(V4, to);
            for connection in ["single", "dual"] {
                let (finished, report) =
                    run_through(&format!("ws://{front}"), &server, connection, &[]);
                joins_and_flows(
                    &format!("{connection}, embedded {embedded}"),
                    &finished,
                    &report,
                );
            }
        });
    }
}

/// Each side may prefer another of the server's addresses. What comes from the one that we did not
/// choose counts, too.
#[test]
fn everybody_gets_in_at_a_server_with_several_addresses() {
    let name = "everybody_gets_in_at_a_server_with_several_addresses";
    let Some(network) = Network::for_test(module_path!(), name, 1) else {
        return;
    };
    let _turn = alone();
    network.server.run(|| {
        for address in ["10.9.9.9/32", "10.9.8.8/32"] {
            let added = Command::new("ip")
                .args(["address", "add", address, "dev", "lo"])
                .status();
            assert!(added.is_ok_and(|status| status.success()), "{address}");
        }
        let Some(server) = Server::livekit() else {
            return;
        };
        for connection in ["single", "dual", "dual"] {
            let more = ["--subscribers", "20"];
            let scratch = Scratch::new();
            let json = scratch.path("run.json");
            let mut command = throng();
            against(&server, &mut command)
                .args(["--publishers", "4", "--duration", "4", "--connection"])
                .args([connection, "--json"])
                .arg(&json)
                .args(more);
            let finished = run(&mut command, &server.secret);
            let report = Report::read(&json, &server.secret);
            let said = &finished.stdout;
            assert_eq!(report.counter("session", "joins_ok"), 24, "{said}");
            assert_eq!(report.counter("audio", "tracks_live"), 80, "{said}");
            assert_eq!(report.counter("audio", "packets_lost"), 0, "{said}");
        }
    });
}

/// A path whose MTU is smaller than it says: checks pass, and the certificates of DTLS do not.
#[test]
fn where_only_short_datagrams_pass_dtls_is_named() {
    let name = "where_only_short_datagrams_pass_dtls_is_named";
    let Some(network) = Network::for_test(module_path!(), name, 1) else {
        return;
    };
    let options = Options {
        site: Site {
            address: SERVER,
            device: DEVICE,
        },
        ..Options::default()
    };
    let Some(server) = network.server.run(|| Server::livekit_with(&options)) else {
        return;
    };
    let _turn = beside_one_other();
    network.clients.run(|| {
        wall(&[
            "add table ip mtu",
            "add chain ip mtu out { type filter hook output priority 0; }",
            "add rule ip mtu out meta l4proto udp meta length > 400 drop",
        ]);
        let only_udp = ["--transport", "udp"];
        let (finished, report) = run_through(&server.url, &server, "single", &only_udp);
        assert_eq!(report.counter("session", "joins_ok"), 0);
        let said = unwrapped(&finished);
        for words in ["ICE was connected", "DTLS did not come up", "MTU"] {
            assert!(said.contains(words), "{words}: {said}");
        }
    });
}

#[test]
fn a_server_that_is_killed_is_not_the_generators_fault() {
    let Some(server) = Server::livekit() else {
        return;
    };
    let _turn = beside_one_other();
    let scratch = Scratch::new();
    let json = scratch.path("run.json");
    let mut command = throng();
    command
        .env("LIVEKIT_URL", &server.url)
        .env("LIVEKIT_API_KEY", &server.key)
        .env("LIVEKIT_API_SECRET", &server.secret)
        .args(["--publishers", "3", "--subscribers", "4", "--duration", "6"])
        .arg("--json")
        .arg(&json);
    let running = Running::start(&mut command, &server.secret);
    std::thread::sleep(Duration::from_secs(4));
    kill_process(Pid::from_raw(server.pid() as i32).unwrap(), Signal::KILL).unwrap();
    let finished = running.finish();
    let report = Report::read(&json, &server.secret);
    assert_eq!(report.0["engine"]["send_errors"], 0, "{}", finished.stdout);
    assert!(
        report.counter("session", "sends_refused") > 0,
        "{}",
        finished.stdout
    );
    let said = unwrapped(&finished);
    assert!(
        said.contains("nothing listens any more") && !said.contains("no room to send"),
        "{}",
        finished.stdout
    );
}
