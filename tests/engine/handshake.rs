//! Two of our own peers connect over a bad network, in virtual time. ICE and DTLS must always
//! succeed.

use crate::common::link;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use crate::common::link::{Conditions, Datagram, Link};
use throng::engine::shard::Shard;
use throng::engine::{Io, NewPeer, PeerKey, Roster, ShardConfig, ShardEvent};
use throng::transport::peer::{IceCredentials, Identity, Peer, PeerEvent, PeerParameters};
use throng::units::{Epoch, Time};

const TIMEOUT: Time = Time::from_millis(20_000);

struct End {
    address: SocketAddr,
    peer: Peer,
    connected_at: Option<Time>,
    failed: bool,
}

fn ends(identities: [&Identity; 2], epoch: Epoch) -> [End; 2] {
    let addresses: [SocketAddr; 2] = [
        "192.0.2.1:1000".parse().unwrap(),
        "192.0.2.2:2000".parse().unwrap(),
    ];
    let credentials = [IceCredentials::random(), IceCredentials::random()];
    [0, 1].map(|me| {
        let parameters = PeerParameters {
            local_address: addresses[me],
            local: credentials[me].clone(),
            remote: credentials[1 - me].clone(),
            remote_fingerprint: identities[1 - me].fingerprint(),
            remote_candidates: vec![addresses[1 - me]],
            ice_controlling: me == 0,
            dtls_active: me == 0,
        };
        End {
            address: addresses[me],
            peer: Peer::new(identities[me], &parameters, epoch, Time::ZERO),
            connected_at: None,
            failed: false,
        }
    })
}

fn poll(end: &mut End, link: &mut Link, now: Time) {
    let End {
        address,
        peer,
        connected_at,
        failed,
    } = end;
    peer.poll(
        now,
        |bytes, to| {
            link.send(
                Datagram {
                    from: *address,
                    to,
                    bytes: bytes.to_vec(),
                },
                now,
            )
        },
        |event| match event {
            PeerEvent::Connected => *connected_at = Some(now),
            PeerEvent::Failed(_) => *failed = true,
            PeerEvent::Nominated(_) => {}
        },
    );
}

/// Runs both ends until both are connected, one has failed, or time is up. Returns when the later
/// one was connected.
fn connect(ends: &mut [End; 2], link: &mut Link) -> Result<Time, String> {
    let mut now = Time::ZERO;
    ends.iter_mut().for_each(|end| end.peer.handle_timeout(now));
    while now < TIMEOUT {
        ends.iter_mut().for_each(|end| poll(end, link, now));
        if let [Some(a), Some(b)] = [ends[0].connected_at, ends[1].connected_at] {
            return Ok(a.max(b));
        }
        if ends.iter().any(|end| end.failed) {
            return Err(format!("failed at {} ms", now.as_millis()));
        }
        now = ends
            .iter()
            .map(|end| end.peer.next_timeout())
            .min()
            .unwrap()
            .min(link.next_at())
            .max(now + Duration::from_micros(10));
        while let Some((_, datagram)) = link.poll(now) {
            let end = ends
                .iter_mut()
                .find(|end| end.address == datagram.to)
                .unwrap();
            end.peer
                .handle_setup_datagram(&datagram.bytes, datagram.from, now);
        }
        for end in ends.iter_mut().filter(|end| end.peer.next_timeout() <= now) {
            end.peer.handle_timeout(now);
        }
    }
    Err(format!(
        "not connected after {} ms: {:?}",
        TIMEOUT.as_millis(),
        [ends[0].connected_at, ends[1].connected_at]
    ))
}

#[test]
fn a_thousand_seeds_of_a_handshake_at_5_percent_loss_all_connect() {
    let (identities, epoch) = (
        [Identity::generate().unwrap(), Identity::generate().unwrap()],
        Epoch::read(),
    );
    let conditions = Conditions {
        loss: 0.05,
        duplication: 0.02,
        delay: Duration::from_millis(10),
        jitter: Duration::from_millis(10),
    };
    let mut took: Vec<Time> = Vec::new();
    let mut failed = Vec::new();
    for seed in 0..1_000 {
        let mut ends = ends([&identities[0], &identities[1]], epoch);
        match connect(&mut ends, &mut Link::new(conditions, seed)) {
            Ok(at) => took.push(at),
            Err(why) => failed.push((seed, why)),
        }
    }
    assert!(failed.is_empty(), "failed seeds: {failed:?}");
    took.sort_unstable();
    println!(
        "connected: p50 {} ms, p99 {} ms, max {} ms",
        took[500].as_millis(),
        took[990].as_millis(),
        took[999].as_millis()
    );
}

#[test]
fn a_handshake_survives_15_percent_loss() {
    let (identities, epoch) = (
        [Identity::generate().unwrap(), Identity::generate().unwrap()],
        Epoch::read(),
    );
    let conditions = Conditions {
        loss: 0.15,
        delay: Duration::from_millis(10),
        ..Conditions::default()
    };
    for seed in 0..50 {
        connect(
            &mut ends([&identities[0], &identities[1]], epoch),
            &mut Link::new(conditions, seed),
        )
        .unwrap_or_else(|why| panic!("seed {seed}: {why}"));
    }
}

#[test]
fn a_certificate_that_was_not_promised_is_refused() {
    let (identity, other, epoch) = (
        Identity::generate().unwrap(),
        Identity::generate().unwrap(),
        Epoch::read(),
    );
    // The first end expects the certificate of `identity`, and the other end presents that of
    // `other`.
    let mut ends = ends([&identity, &identity], epoch);
    let mut impostors = {
        let credentials = [IceCredentials::random(), IceCredentials::random()];
        let parameters = |me: usize, fingerprint| PeerParameters {
            local_address: ends[me].address,
            local: credentials[me].clone(),
            remote: credentials[1 - me].clone(),
            remote_fingerprint: fingerprint,
            remote_candidates: vec![ends[1 - me].address],
            ice_controlling: me == 0,
            dtls_active: me == 0,
        };
        [
            Peer::new(
                &identity,
                &parameters(0, identity.fingerprint()),
                epoch,
                Time::ZERO,
            ),
            Peer::new(
                &other,
                &parameters(1, identity.fingerprint()),
                epoch,
                Time::ZERO,
            ),
        ]
    };
    ends.iter_mut()
        .zip(&mut impostors)
        .for_each(|(end, impostor)| std::mem::swap(&mut end.peer, impostor));
    assert!(
        connect(&mut ends, &mut Link::new(Conditions::default(), 1))
            .unwrap_err()
            .contains("failed")
    );
    assert!(!ends[0].peer.is_connected());
}

#[test]
fn garbage_and_foreign_datagrams_do_no_harm_to_a_peer() {
    let (identity, epoch) = (Identity::generate().unwrap(), Epoch::read());
    let mut ends = ends([&identity, &identity], epoch);
    let mut random = link::Random(7);
    for round in 0..20_000u64 {
        let len = (random.next() % 300) as usize;
        let mut bytes: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
        if let Some(first) = bytes.first_mut() {
            // Half of the datagrams look like STUN, the other half like DTLS.
            *first = if round % 2 == 0 { 0 } else { 22 };
        }
        ends[0].peer.handle_setup_datagram(
            &bytes,
            "198.51.100.9:9".parse::<SocketAddr>().unwrap(),
            Time::from_micros(round),
        );
    }
    connect(&mut ends, &mut Link::new(Conditions::default(), 1)).unwrap();
}

/// Collects the datagrams that a shard sends.
struct Outbox {
    buffer: Vec<u8>,
    sent: Vec<Vec<u8>>,
}

impl Io for Outbox {
    fn lend(&mut self) -> &mut [u8] {
        &mut self.buffer
    }

    fn send(&mut self, _: PeerKey, _: SocketAddr, len: usize, segment: usize) {
        self.sent
            .extend(self.buffer[..len].chunks(segment).map(<[u8]>::to_vec));
    }

    fn nominate(&mut self, _: PeerKey, _: throng::path::FarEnd) {}

    fn disconnect(&mut self, _: PeerKey) {}
}

/// Returns the events of a shard's peer that connects to another peer. The other peer reads DTLS
/// only if `reads_dtls` is set. `certificate` is the one that the shard is told to expect.
fn events_of(
    shard_identity: &Identity,
    other: &Identity,
    certificate: &Identity,
    reads_dtls: bool,
) -> Vec<ShardEvent> {
    let epoch = Epoch::read();
    let addresses: [SocketAddr; 2] = [
        "192.0.2.1:1000".parse().unwrap(),
        "192.0.2.2:2000".parse().unwrap(),
    ];
    let credentials = [IceCredentials::random(), IceCredentials::random()];
    let parameters = |me: usize, remote_fingerprint| PeerParameters {
        local_address: addresses[me],
        local: credentials[me].clone(),
        remote: credentials[1 - me].clone(),
        remote_fingerprint,
        remote_candidates: vec![addresses[1 - me]],
        ice_controlling: me == 0,
        dtls_active: me == 0,
    };
    let config = ShardConfig {
        identity: shard_identity.clone(),
        roster: Arc::new(Roster::new(0, [0].into_iter())),
        epoch,
    };
    let mut shard = Shard::new(config, 1, Time::ZERO);
    let mut outbox = Outbox {
        buffer: vec![0; 65_536],
        sent: Vec::new(),
    };
    let peer = NewPeer {
        participant: 0,
        room: 0,
        parameters: parameters(0, certificate.fingerprint()),
        rtcp_ssrc: Ssrc(1),
        cname: "client".into(),
        obeys_bandwidth: false,
        data: None,
        intended_at: Time::ZERO,
    };
    shard.add_peer(PeerKey(0), peer, Time::ZERO, &mut outbox);
    let mut server = Peer::new(
        other,
        &parameters(1, shard_identity.fingerprint()),
        epoch,
        Time::ZERO,
    );
    let mut events = Vec::new();
    for now in (0..8_000).map(Time::from_millis) {
        for datagram in std::mem::take(&mut outbox.sent) {
            // STUN begins with two zero bits, DTLS with its content types (RFC 7983).
            if reads_dtls || datagram[0] < 4 {
                server.handle_setup_datagram(&datagram, addresses[0], now);
            }
        }
        server.handle_timeout(now);
        let mut answers = Vec::new();
        server.poll(now, |bytes, _| answers.push(bytes.to_vec()), |_| {});
        for answer in answers {
            shard.handle_setup_datagram(PeerKey(0), &answer, addresses[1], now, now, &mut outbox);
        }
        shard.handle_media_timers(now, &mut outbox);
        shard.handle_control_timers(now, &mut outbox);
        while let Some((_, event)) = shard.poll_event() {
            events.push(event);
        }
    }
    events
}

#[test]
fn where_dtls_fails_the_moment_of_ice_is_told_all_the_same() {
    let [client, server, promised] = [(); 3].map(|()| Identity::generate().unwrap());
    let prompt = events_of(&client, &server, &server, true);
    assert!(
        matches!(
            prompt[..],
            [ShardEvent::Connected {
                ice_at: Some(_),
                ..
            }]
        ),
        "{prompt:?}"
    );
    let refused = events_of(&client, &server, &promised, true);
    assert!(
        matches!(
            refused[..],
            [ShardEvent::IceConnected { .. }, ShardEvent::Failed { .. }]
        ),
        "{refused:?}"
    );
    let silent = events_of(&client, &server, &server, false);
    assert!(
        matches!(silent[..], [ShardEvent::IceConnected { .. }, ..]),
        "{silent:?}"
    );
    assert!(
        !silent
            .iter()
            .any(|event| matches!(event, ShardEvent::Connected { .. })),
        "{silent:?}"
    );
}
