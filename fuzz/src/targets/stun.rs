//! STUN to both kinds of agent. The server knows the credentials, so a script may have its messages
//! signed like the true ones.

use std::net::SocketAddr;
use std::sync::OnceLock;
use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use sha1::Sha1;
use throng::transport::peer::{
    IceCredentials, Identity, Peer, PeerEvent, PeerParameters, local_ufrag_of_check,
};
use throng::units::{Epoch, Time};

use super::{Script, Target, chunk, ours};

pub const TARGET: Target = Target {
    name: "stun",
    run,
    seeds,
    mutations: 400,
    memory: Some((512 << 10, 64)),
};

const SIGNED: u8 = 1;
/// If set, messages are signed with the password for requests to us; otherwise with the one for
/// answers to our requests.
const AS_REQUEST: u8 = 2;
const TRANSACTION_OF_OURS: u8 = 4;
const LATER: u8 = 8;

pub fn identity() -> Identity {
    static IDENTITY: OnceLock<Identity> = OnceLock::new();
    IDENTITY
        .get_or_init(|| Identity::generate().expect("a key pair"))
        .clone()
}

fn credentials(name: &str) -> IceCredentials {
    IceCredentials {
        ufrag: name.to_owned(),
        password: format!("{name}-password-of-24-characters"),
    }
}

fn address(of: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, of], 5_000 + u16::from(of)))
}

pub fn parameters(
    identity: &Identity,
    me: &str,
    other: &str,
    at: [u8; 2],
    controlling: bool,
) -> PeerParameters {
    PeerParameters {
        local_address: address(at[0]),
        local: credentials(me),
        remote: credentials(other),
        remote_fingerprint: identity.fingerprint(),
        remote_candidates: vec![address(at[1])],
        ice_controlling: controlling,
        dtls_active: controlling,
    }
}

fn run(input: &[u8]) {
    let _ = ours(|| local_ufrag_of_check(input).map(str::len));
    let mut script = Script::new(input);
    let (kind, identity, epoch) = (script.u8(), identity(), Epoch::read());
    let mut now = Time::ZERO;
    let parameters = parameters(&identity, "ours", "them", [1, 2], kind & 1 == 0);
    let mut peer = match kind & 2 {
        0 => Peer::new(&identity, &parameters, epoch, now),
        _ => Peer::lite(&identity, &parameters, epoch, now),
    };
    let (mut last_transaction, mut came, mut went, mut timeouts) = ([0; 12], 0, 0, 0);
    while !script.is_over() {
        let (flags, from) = (script.u8(), address(script.u8()));
        let mut message = script.chunk().to_vec();
        if flags & TRANSACTION_OF_OURS != 0 && message.len() >= 20 {
            message[8..20].copy_from_slice(&last_transaction);
        }
        if flags & SIGNED != 0 {
            sign(
                &mut message,
                &credentials(if flags & AS_REQUEST != 0 {
                    "ours"
                } else {
                    "them"
                })
                .password,
            );
        }
        came += 1;
        ours(|| peer.handle_setup_datagram(&message, from, now));
        if flags & LATER != 0 {
            now += Duration::from_millis(500);
        }
        timeouts += 1;
        ours(|| peer.handle_timeout(now));
        let mut connected = false;
        peer.poll(
            now,
            |datagram, _| {
                went += 1;
                assert!(datagram.len() <= 2_048);
                if let Some(transaction) = datagram.get(8..20) {
                    last_transaction.copy_from_slice(transaction);
                }
            },
            |event| connected |= event == PeerEvent::Connected,
        );
        assert!(
            !connected && !peer.is_connected(),
            "STUN alone makes no keys"
        );
        assert!(peer.next_timeout() > now);
        // Each message may cause an answer and a triggered check. Each timeout may send the checks
        // of 100 pairs and what DTLS repeats.
        assert!(
            went <= 16 + 2 * came + 100 * timeouts,
            "{went} datagrams for {came}"
        );
    }
}

/// Appends MESSAGE-INTEGRITY and FINGERPRINT (RFC 8489, sections 14.5 and 14.7).
fn sign(message: &mut Vec<u8>, password: &str) {
    if message.len() < 20 || message.len() > 1_000 {
        return;
    }
    set_length(message, 24);
    let mut hmac = Hmac::<Sha1>::new_from_slice(password.as_bytes()).expect("any length");
    hmac.update(message);
    message.extend([0, 8, 0, 20]);
    message.extend(hmac.finalize().into_bytes());
    set_length(message, 8);
    let crc = crc32(message) ^ 0x5354_554E;
    message.extend([0x80, 0x28, 0, 4]);
    message.extend(crc.to_be_bytes());
}

/// Sets the length field to its value with `more` bytes appended.
fn set_length(message: &mut [u8], more: usize) {
    let length = (message.len() - 20 + more) as u16;
    message[2..4].copy_from_slice(&length.to_be_bytes());
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

/// Returns the first check of an agent of ours, without the parts that are signed anew.
fn check(controlling: bool) -> Vec<u8> {
    let (identity, now) = (identity(), Time::from_millis(1));
    let mut other = Peer::new(
        &identity,
        &parameters(&identity, "them", "ours", [2, 1], controlling),
        Epoch::read(),
        Time::ZERO,
    );
    let mut sent = Vec::new();
    for millis in 1..200 {
        other.handle_timeout(now + Duration::from_millis(millis));
        other.poll(
            now + Duration::from_millis(millis),
            |datagram, _| sent.push(datagram.to_vec()),
            |_| {},
        );
    }
    let mut check = sent.swap_remove(0);
    check.truncate(check.len() - 32);
    check
}

fn seeds() -> Vec<Vec<u8>> {
    let step = |flags: u8, from: u8, message: &[u8]| [&[flags, from][..], &chunk(message)].concat();
    let success = [
        &[1, 1, 0, 12, 0x21, 0x12, 0xA4, 0x42][..],
        &[0; 12],
        &[0, 0x20, 0, 8, 0, 1, 0x32, 0x9B, 0xE1, 0x12, 0xA6, 0x43],
    ]
    .concat();
    let conflict = [
        &[1, 0x11, 0, 8, 0x21, 0x12, 0xA4, 0x42][..],
        &[0; 12],
        &[0, 9, 0, 4, 0, 0, 4, 87],
    ]
    .concat();
    [0u8, 1, 2, 3]
        .into_iter()
        .map(|kind| {
            let check = check(kind & 1 == 1);
            let steps = [
                step(SIGNED | AS_REQUEST | LATER, 2, &check),
                step(SIGNED | TRANSACTION_OF_OURS | LATER, 2, &success),
                step(SIGNED | TRANSACTION_OF_OURS, 2, &conflict),
                step(SIGNED | AS_REQUEST | LATER, 3, &check),
                step(0, 9, &check),
                step(0, 2, &[22, 254, 253, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]),
            ];
            [vec![kind], steps.concat()].concat()
        })
        .collect()
}
