//! Tests of the bad network that the other tests use. Its log must agree with what its sockets and
//! the kernel's own counters saw.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use crate::common::namespace::Namespace;
use crate::common::network::{CLIENTS, Direction, Fate, Network, Packet, Places, SERVER, place};
use crate::common::path::{Conditions, Fate as PathFate, Loss, Path, Rate};
use crate::common::program::beside_one_other;

const MEDIA_PORT: u16 = 5_000;
/// Limit for every wait, far beyond what anything here takes.
const PATIENCE: Duration = Duration::from_secs(10);

/// Returns a datagram with an RTP header that has this sequence number.
fn rtp(seq: u16) -> Vec<u8> {
    let mut bytes = vec![0x80, 0x80 | 111];
    bytes.extend(seq.to_be_bytes());
    bytes.extend((u32::from(seq) * 960).to_be_bytes());
    bytes.extend(7u32.to_be_bytes());
    bytes.resize(100, 0xAB);
    bytes
}

/// Sends `packets` packets up. Returns the sequence numbers that arrived, in order of arrival.
fn send_up(network: &Network, packets: u16) -> Vec<u16> {
    let socket = network
        .server
        .run(|| UdpSocket::bind((SERVER, MEDIA_PORT)))
        .unwrap();
    socket.set_nonblocking(true).unwrap();
    let sender = network
        .clients
        .run(|| UdpSocket::bind((CLIENTS, MEDIA_PORT)))
        .unwrap();
    let (mut came, mut bytes) = (Vec::new(), [0; 2_000]);
    let mut take = || {
        while let Ok((len, from)) = socket.recv_from(&mut bytes) {
            assert_eq!(
                (len, from),
                (100, SocketAddrV4::new(CLIENTS, MEDIA_PORT).into())
            );
            came.push(u16::from_be_bytes([bytes[2], bytes[3]]));
        }
    };
    let deadline = network.now() + PATIENCE;
    for seq in 0..packets {
        sender.send_to(&rtp(seq), (SERVER, MEDIA_PORT)).unwrap();
        // Packets go out in portions that fit into the socket's buffer, whichever thread has to
        // wait for a CPU.
        if seq % 100 == 99 {
            while network.under_way() > 0 || originals(&network.log()).len() <= usize::from(seq) {
                assert!(network.now() < deadline, "packets are missing from the log");
                std::thread::sleep(Duration::from_micros(500));
            }
            take();
        }
    }
    came
}

fn originals(log: &[Packet]) -> Vec<u16> {
    let originals = log
        .iter()
        .filter(|packet| !packet.duplicate)
        .filter_map(Packet::rtp);
    originals.map(|rtp| rtp.seq).collect()
}

fn delivered(log: &[Packet]) -> Vec<u16> {
    let mut delivered: Vec<_> = log
        .iter()
        .filter_map(|packet| Some((packet.delivered_at()?, packet.rtp()?.seq)))
        .collect();
    delivered.sort_by_key(|(at, _)| *at);
    delivered.into_iter().map(|(_, seq)| seq).collect()
}

#[test]
fn the_log_says_of_every_packet_what_became_of_it() {
    let _turn = beside_one_other();
    let Some(network) = Network::for_test(
        module_path!(),
        "the_log_says_of_every_packet_what_became_of_it",
        1,
    ) else {
        return;
    };
    let before = [
        network.clients.device_counts(),
        network.server.device_counts(),
    ];
    network.set(
        Direction::Up,
        Conditions {
            loss: Loss::Random(0.2),
            duplication: 0.1,
            delay: Duration::from_millis(3),
            jitter: Duration::from_millis(5),
            reorder: true,
            ..Conditions::default()
        },
    );
    let mut came = send_up(&network, 2_000);
    let log = network.log();
    let mut logged = delivered(&log);
    assert!(
        came.windows(2).any(|pair| pair[1] < pair[0]),
        "jitter reorders where it may"
    );
    came.sort_unstable();
    logged.sort_unstable();
    assert!(
        came == logged,
        "{} came, {} did by the log",
        came.len(),
        logged.len()
    );

    let rtp: Vec<&Packet> = log.iter().filter(|packet| packet.rtp().is_some()).collect();
    assert_eq!(
        originals(&log),
        (0..2_000).collect::<Vec<u16>>(),
        "each was seen once, in the order of sending"
    );
    let count =
        |wanted: &dyn Fn(&Packet) -> bool| rtp.iter().filter(|packet| wanted(packet)).count();
    let (lost, twice) = (
        count(&|packet| packet.fate == Fate::Lost),
        count(&|packet| packet.duplicate),
    );
    assert!(
        (340..460).contains(&lost) && (110..210).contains(&twice),
        "{lost} of 2,000 lost and {twice} sent twice"
    );
    assert_eq!(came.len(), 2_000 - lost + twice);
    for packet in &rtp {
        let fields = packet.rtp().unwrap();
        assert_eq!(
            (
                fields.ssrc,
                fields.payload_type,
                fields.marker,
                fields.padded
            ),
            (Ssrc(7), 111, true, false)
        );
        assert_eq!(
            (fields.rtp_time, packet.bytes),
            (u32::from(fields.seq) * 960, 100)
        );
        assert_eq!(
            (packet.from, packet.to),
            (
                SocketAddrV4::new(CLIENTS, MEDIA_PORT),
                SocketAddrV4::new(SERVER, MEDIA_PORT)
            )
        );
        assert!(
            packet
                .delay()
                .is_none_or(|delay| delay >= Duration::from_millis(3)),
            "{packet:?}"
        );
    }

    // The kernel's own counters of both devices must agree. The kernel may have sent packets of its
    // own, which are in the log too unless they are not IPv4.
    let after = [
        network.clients.device_counts(),
        network.server.device_counts(),
    ];
    assert_eq!(
        (after[0].tx_dropped, after[1].rx_dropped),
        (before[0].tx_dropped, before[1].rx_dropped)
    );
    let received = after[1].rx_packets - before[1].rx_packets;
    let written = log
        .iter()
        .filter(|packet| packet.direction == Direction::Up && packet.delivered_at().is_some())
        .count();
    assert_eq!(received, written as u64);
    assert!(after[0].tx_packets - before[0].tx_packets >= 2_000);
}

#[test]
fn without_reordering_jitter_keeps_the_order_and_a_cut_lets_nothing_pass_but_signalling() {
    let _turn = beside_one_other();
    let name =
        "without_reordering_jitter_keeps_the_order_and_a_cut_lets_nothing_pass_but_signalling";
    let Some(network) = Network::for_test(module_path!(), name, 2) else {
        return;
    };
    network.set_both(Conditions {
        jitter: Duration::from_millis(4),
        ..Conditions::default()
    });
    assert_eq!(send_up(&network, 500), (0..500).collect::<Vec<u16>>());

    network.set_both(Conditions {
        cut: true,
        ..Conditions::default()
    });
    let listener = network
        .server
        .run(|| TcpListener::bind((SERVER, 80)))
        .unwrap();
    let mut stream = network
        .clients
        .run(|| TcpStream::connect((SERVER, 80)))
        .unwrap();
    stream.write_all(b"through").unwrap();
    let mut said = [0; 7];
    listener.accept().unwrap().0.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"through");
    assert!(
        network
            .log()
            .iter()
            .filter(|packet| packet.is_tcp())
            .all(|packet| packet.fate != Fate::Cut)
    );

    let socket = network
        .clients
        .run(|| UdpSocket::bind((CLIENTS, 0)))
        .unwrap();
    socket.send_to(&rtp(9), (SERVER, MEDIA_PORT)).unwrap();
    let deadline = network.now() + PATIENCE;
    while !network.log().iter().any(|packet| packet.fate == Fate::Cut) {
        assert!(network.now() < deadline, "{:?}", network.log().last());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Returns what a path does with `packets` packets, one each millisecond.
fn fates(conditions: Conditions, packets: u32) -> Vec<(Duration, PathFate)> {
    let mut path = Path::new(conditions, 7);
    let at = |index| Duration::from_millis(index);
    (0..u64::from(packets))
        .map(|index| (at(index), path.take(1_000, at(index)).0))
        .collect()
}

#[test]
fn losses_have_the_share_and_the_bursts_that_were_asked_for() {
    for (loss, share, mean) in [
        (Loss::Random(0.05), 0.05, 1.0 / 0.95),
        (
            Loss::Bursts {
                share: 0.05,
                mean: 4.0,
            },
            0.05,
            4.0,
        ),
        (
            Loss::Bursts {
                share: 0.3,
                mean: 10.0,
            },
            0.3,
            10.0,
        ),
    ] {
        let conditions = Conditions {
            loss,
            ..Conditions::default()
        };
        let lost: Vec<bool> = fates(conditions, 200_000)
            .iter()
            .map(|(_, fate)| *fate == PathFate::Lost)
            .collect();
        let count = lost.iter().filter(|lost| **lost).count() as f64;
        let bursts = lost.windows(2).filter(|pair| !pair[0] && pair[1]).count() as f64;
        assert!(
            (count / 200_000.0 - share).abs() < 0.05 * share,
            "{loss:?}: {count}"
        );
        assert!(
            (count / bursts - mean).abs() < 0.05 * mean,
            "{loss:?}: {} a burst",
            count / bursts
        );
    }
}

#[test]
fn a_bottleneck_spaces_packets_queues_some_and_drops_the_rest() {
    // Packets arrive at 8 Mbit/s and leave at 4 Mbit/s, 2 ms each. At first two pass at once. The
    // queue holds 10.
    let conditions = Conditions {
        rate: Some(Rate {
            bits_per_second: 4_000_000,
            burst_bytes: 2_000,
            queue_bytes: 10_000,
        }),
        ..Conditions::default()
    };
    let fates = fates(conditions, 1_000);
    let mut leaves = BTreeMap::new();
    for (at, fate) in &fates {
        if let PathFate::Leaves(out) = fate {
            assert!(
                (*at..=*at + Duration::from_millis(18)).contains(out),
                "{at:?} {out:?}"
            );
            leaves.insert(*out, at);
        }
    }
    let overflowed = fates
        .iter()
        .filter(|(_, fate)| *fate == PathFate::Overflowed)
        .count();
    assert_eq!(
        leaves.len() + overflowed,
        1_000,
        "no two leave at once once the burst is over"
    );
    assert!((485..=495).contains(&overflowed), "{overflowed}");
    let times: Vec<_> = leaves.into_keys().collect();
    assert!(
        times[20..]
            .windows(2)
            .all(|pair| pair[1] - pair[0] == Duration::from_millis(2))
    );
}

#[test]
fn a_seed_repeats_a_network_and_another_does_not() {
    let conditions = Conditions {
        loss: Loss::Random(0.5),
        jitter: Duration::from_millis(10),
        reorder: true,
        ..Conditions::default()
    };
    let run = |seed| {
        let mut path = Path::new(conditions, seed);
        (0..100)
            .map(|index| path.take(100, Duration::from_millis(index)))
            .collect::<Vec<_>>()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

#[test]
fn each_place_has_the_delay_and_the_loss_that_were_planted_there() {
    let _turn = beside_one_other();
    const PACKETS: u16 = 400;
    let Some(network) = Places::for_test(
        module_path!(),
        "each_place_has_the_delay_and_the_loss_that_were_planted_there",
        4,
        3,
    ) else {
        return;
    };
    let planted = [(0, 0.0), (5, 0.02), (20, 0.1), (60, 0.3)]
        .map(|(millis, share)| (Duration::from_millis(millis), share));
    for (at, (delay, share)) in planted.into_iter().enumerate() {
        let loss = Loss::Random(share);
        network.wires.set_both(
            at,
            Conditions {
                delay,
                loss,
                ..Conditions::default()
            },
        );
    }
    let open = |socket: std::io::Result<UdpSocket>| {
        let socket = socket.unwrap();
        socket.set_nonblocking(true).unwrap();
        socket
    };
    let echo = open(network.server.run(|| UdpSocket::bind((SERVER, MEDIA_PORT))));
    let sockets: Vec<UdpSocket> = network
        .places
        .iter()
        .map(|at| open(at.run(|| UdpSocket::bind((at.address, MEDIA_PORT)))))
        .collect();

    // Packets go up, and the server sends them down again.
    let (mut arrived, mut returned) = ([0; 4], [0; 4]);
    let mut bytes = [0; 2_000];
    for seq in 0..PACKETS {
        for socket in &sockets {
            socket.send_to(&rtp(seq), (SERVER, MEDIA_PORT)).unwrap();
        }
        // Packets go out in portions that fit into the sockets' buffers.
        while seq % 25 == 24
            && !all_came(
                &network.wires.log(),
                4 * (usize::from(seq) + 1),
                returned.iter().sum(),
            )
        {
            assert!(
                network.wires.now() < PATIENCE,
                "packets are missing from the log"
            );
            while let Ok((len, from)) = echo.recv_from(&mut bytes) {
                let from = (0..4)
                    .find(|index| from.ip() == place(*index))
                    .expect("one of the places");
                arrived[from] += 1;
                echo.send_to(&bytes[..len], (place(from), MEDIA_PORT))
                    .unwrap();
            }
            for (socket, returned) in sockets.iter().zip(&mut returned) {
                while let Ok((_, from)) = socket.recv_from(&mut bytes) {
                    assert_eq!(from.ip(), SERVER);
                    *returned += 1;
                }
            }
            std::thread::sleep(Duration::from_micros(500));
        }
    }

    let log = network.wires.log();
    for (at, (delay, share)) in planted.into_iter().enumerate() {
        let mut sent = usize::from(PACKETS);
        for (direction, ends, came) in [
            (Direction::Up, (place(at), SERVER), arrived[at]),
            (Direction::Down, (SERVER, place(at)), returned[at]),
        ] {
            let packets: Vec<&Packet> = log
                .iter()
                .filter(|packet| {
                    packet.rtp().is_some() && (packet.place, packet.direction) == (at, direction)
                })
                .collect();
            assert!(
                packets
                    .iter()
                    .all(|packet| (*packet.from.ip(), *packet.to.ip()) == ends),
                "{ends:?}"
            );
            let lost = packets
                .iter()
                .filter(|packet| packet.fate == Fate::Lost)
                .count();
            assert_eq!(
                (packets.len(), came),
                (sent, sent - lost),
                "place {at}, {direction:?}"
            );
            let expected = share * sent as f64;
            let chance = 4.0 * (expected * (1.0 - share)).sqrt();
            assert!(
                (lost as f64 - expected).abs() <= chance,
                "place {at}, {direction:?}: {lost} lost, not about {expected}"
            );
            assert!(
                packets
                    .iter()
                    .all(|packet| packet.delay().is_none_or(|taken| taken >= delay)),
                "place {at}, {direction:?}"
            );
            sent = came;
        }
    }
}

/// Returns whether `sent` packets went up, all that arrived was sent back, and all that came back
/// was read.
fn all_came(log: &[Packet], sent: usize, returned: usize) -> bool {
    let in_direction = |direction| {
        log.iter()
            .filter(move |packet| packet.rtp().is_some() && packet.direction == direction)
    };
    let delivered = |direction| {
        in_direction(direction)
            .filter(|packet| packet.delivered_at().is_some())
            .count()
    };
    let is_over = log.iter().all(|packet| packet.fate != Fate::UnderWay);
    let sent_back = in_direction(Direction::Down).count() == delivered(Direction::Up);
    is_over
        && in_direction(Direction::Up).count() == sent
        && sent_back
        && delivered(Direction::Down) == returned
}

/// Returns an ICMP error (RFC 792) about a datagram, from the address that the datagram was sent
/// to.
fn icmp_error(datagram: &[u8], kind: u8, code: u8, rest: [u8; 4]) -> Vec<u8> {
    let checksum = |bytes: &[u8]| {
        let words = bytes
            .chunks(2)
            .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
        let sum: u32 = words.sum();
        !((sum & 0xFFFF) + (sum >> 16)) as u16
    };
    let mut icmp = vec![kind, code, 0, 0];
    icmp.extend(rest);
    icmp.extend(&datagram[..28]);
    let sum = checksum(&icmp).to_be_bytes();
    icmp[2..4].copy_from_slice(&sum);
    let mut packet = vec![0x45, 0, 0, 20 + icmp.len() as u8, 0, 0, 0, 0, 64, 1, 0, 0];
    packet.extend(&datagram[16..20]);
    packet.extend(&datagram[12..16]);
    let sum = checksum(&packet).to_be_bytes();
    packet[10..12].copy_from_slice(&sum);
    packet.extend(icmp);
    packet
}

/// Returns an answer from the connected peer: the datagram's addresses and ports swapped, with one
/// byte of payload.
fn answer_to(datagram: &[u8], payload: u8) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 29, 0, 0, 0, 0, 64, 17, 0, 0];
    packet.extend(&datagram[16..20]);
    packet.extend(&datagram[12..16]);
    let words = packet
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let sum: u32 = words.sum();
    let sum = !((sum & 0xFFFF) + (sum >> 16)) as u16;
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(&datagram[22..24]);
    packet.extend(&datagram[20..22]);
    packet.extend([0, 9, 0, 0, payload]);
    packet
}

#[test]
fn what_icmp_says_hides_no_datagram() {
    let (namespace, mut wire) = Namespace::new(CLIENTS).expect("a namespace of our own");
    let remote = std::net::Ipv4Addr::from(u32::from(CLIENTS) ^ 3);
    let socket = namespace.run(|| {
        let socket = throng::net::open_media_socket(CLIENTS.into(), 1 << 20).unwrap();
        socket.connect((remote, 4_000)).unwrap();
        socket
    });
    let mut packet = [0; 2_000];
    socket.send(b"a check").unwrap();
    // The device may first send something of its own, such as IPv6.
    let asked = loop {
        let len = wire.read(&mut packet).unwrap();
        if packet[0] == 0x45 && packet[9] == 17 {
            break packet[..len].to_vec();
        }
    };
    let mut batch = throng::net::ReceiveBatch::default();
    for (name, counted, kind, code, rest) in [
        (
            "host administratively unreachable: EHOSTUNREACH",
            1,
            3,
            13,
            [0; 4],
        ),
        ("too big: EMSGSIZE", 1, 3, 4, [0, 0, 0x04, 0xB0]),
        ("a parameter problem: EPROTO", 1, 12, 0, [0; 4]),
        ("a closed port: ECONNREFUSED", 0, 3, 3, [0; 4]),
    ] {
        for payload in 0..3 {
            wire.write_all(&answer_to(&asked, payload)).unwrap();
        }
        wire.write_all(&icmp_error(&asked, kind, code, rest))
            .unwrap();
        assert_eq!(batch.receive(&socket).ok(), Some(3), "{name}");
        for index in 0..3 {
            assert_eq!(batch.datagram(index).unwrap().0, [index as u8], "{name}");
        }
        // The errors that the batch counts are added by a worker to the report's `receive_errors`.
        assert_eq!(batch.take_errors(), counted, "{name}");
    }
    let nothing = batch.receive(&socket).unwrap_err();
    assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock);
}
