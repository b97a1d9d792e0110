//! Cost of a packet in user space alone, received and sent. With few connections their state stays
//! in the cache. With many, each connection has gone cold by its next packet. Beside it are the
//! floor, which is AES-GCM with as many keys and nothing else, and other stacks that do the same
//! work.
//!
//! `cargo bench --bench packet`

mod common;
#[path = "../tests/common/link.rs"]
#[allow(dead_code)]
mod link;

use std::time::Duration;

use common::fixture::{BATCH, Control, Fixture, Role, Setting, Stack};
use common::origin::{Origin, shard_config};
use common::rtc::Rtc;
use common::str0m::Str0m;
use common::table::{self, Table};
use common::throng::Throng;
use criterion::{Criterion, SamplingMode};
use ring::aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use throng::measure::Kind;
use throng::transport::srtp::Profile;
use throng::units::Time;

const TAG_LEN: usize = 16;
/// Number of samples, each of some thousand packets. This is enough for a median, without taking
/// more time than needed.
const SAMPLES: usize = 15;

fn main() {
    let mut criterion = table::criterion();
    let mut table = Table::new(
        "A packet in user space (median, its 95 % interval, times the floor: AES-GCM alone)",
    );
    let (cold, packets) = if common::is_full() {
        (1_000, 8_000)
    } else {
        (24, 48)
    };
    for role in [Role::Receives, Role::Sends] {
        for kind in [Kind::Video, Kind::Audio] {
            for connections in [16, cold] {
                compare(
                    &mut criterion,
                    &mut table,
                    Setting::media_only(role, kind),
                    connections,
                    packets,
                );
            }
        }
    }
    feedback(&mut criterion, &mut table, cold, packets);
    criterion.final_summary();
    table.print();
}

/// Cost of telling the server about the path: the same packets with running timers, without and
/// with transport-wide feedback.
fn feedback(criterion: &mut Criterion, table: &mut Table, connections: usize, packets: u64) {
    let of = |control| Setting {
        control,
        ..Setting::media_only(Role::Receives, Kind::Video)
    };
    let facts = Facts::of(of(Control::TransportCc));
    let group = format!(
        "receive video with timers, {} bytes, {connections} connections",
        facts.len
    );
    {
        let mut floor = Floor::new(&facts, connections);
        row(criterion, table, &group, "floor", packets, |packets| {
            floor.run(Role::Receives, packets)
        });
    }
    let size = (connections, packets);
    stack::<Throng>(
        criterion,
        table,
        &group,
        "throng, no feedback",
        of(Control::Timers),
        size,
    );
    stack::<Throng>(
        criterion,
        table,
        &group,
        "throng, transport-cc",
        of(Control::TransportCc),
        size,
    );
    stack::<Str0m>(
        criterion,
        table,
        &group,
        "str0m, transport-cc",
        of(Control::TransportCc),
        size,
    );
    stack::<Rtc<true>>(
        criterion,
        table,
        &group,
        "rtc, default, transport-cc",
        of(Control::TransportCc),
        size,
    );
}

fn compare(
    criterion: &mut Criterion,
    table: &mut Table,
    setting: Setting,
    connections: usize,
    packets: u64,
) {
    let facts = Facts::of(setting);
    let verb = match setting.role {
        Role::Receives => "receive",
        Role::Sends => "send",
    };
    let group = format!(
        "{verb} {}, {} bytes, {connections} connections",
        common::media(setting.kind),
        facts.len
    );
    // State that is built for one row would fill the cache of the next. So each is dropped before
    // the next one is made.
    {
        let mut floor = Floor::new(&facts, connections);
        row(criterion, table, &group, "floor", packets, |packets| {
            floor.run(setting.role, packets)
        });
    }
    let size = (connections, packets);
    stack::<Throng>(criterion, table, &group, Throng::NAME, setting, size);
    stack::<Str0m>(criterion, table, &group, Str0m::NAME, setting, size);
    stack::<Rtc<false>>(criterion, table, &group, Rtc::<false>::NAME, setting, size);
    stack::<Rtc<true>>(criterion, table, &group, Rtc::<true>::NAME, setting, size);
}

fn stack<S: Stack>(
    criterion: &mut Criterion,
    table: &mut Table,
    group: &str,
    name: &'static str,
    setting: Setting,
    (connections, packets): (usize, u64),
) {
    // It is connected when the row runs, so not at all if a filter leaves the row out.
    let mut fixture: Option<Fixture<S>> = None;
    row(criterion, table, group, name, packets, |packets| {
        let fixture = fixture.get_or_insert_with(|| Fixture::connected(connections, setting));
        match setting.role {
            Role::Receives => fixture.receive(packets),
            Role::Sends => fixture.send(packets),
        }
    });
    if let (Some(fixture), Control::TransportCc, true) =
        (fixture, setting.control, common::is_full())
    {
        assert!(
            fixture.stack.rtcp_sent() > 0,
            "{name} tells nobody of its path"
        );
    }
}

/// Times `work`, which takes a number of packets. An iteration is `packets` packets, several for
/// each connection. The first iteration connects and touches new memory: it falls into criterion's
/// warm-up. No sample is just a handful of packets.
fn row(
    criterion: &mut Criterion,
    table: &mut Table,
    group: &str,
    name: &'static str,
    packets: u64,
    mut work: impl FnMut(u64) -> Duration,
) {
    let mut benches = criterion.benchmark_group(group);
    benches
        .sampling_mode(SamplingMode::Flat)
        .sample_size(SAMPLES);
    benches.bench_function(name, |bencher| {
        bencher.iter_custom(|iterations| work(iterations * packets))
    });
    benches.finish();
    table.add_per(group, name, packets as f64);
}

/// Properties of the stacks' packets that the floor must know.
struct Facts {
    /// Mean length on the wire.
    len: usize,
    header_len: usize,
    profile: Profile,
}

impl Facts {
    fn of(setting: Setting) -> Facts {
        const SAMPLE: usize = 600;
        let config = shard_config(1);
        let mut origin = Origin::publishing(
            setting.kind,
            setting.transport_cc_extension(),
            1,
            &config,
            Time::ZERO,
        );
        let packets: Vec<_> = (0..SAMPLE).map(|_| origin.next()).collect();
        let bytes: usize = packets.iter().map(|packet| packet.bytes.len()).sum();
        Facts {
            len: bytes / SAMPLE + TAG_LEN,
            header_len: packets[0].header_len,
            profile: origin.profile(),
        }
    }
}

/// Keys of so many connections, each used for one packet in turn. No receiver has less state than
/// these 544 bytes a connection. The keys of 1,000 connections fit a second-level cache of 1 MB, so
/// the cold floor is hardly colder than the hot one. This is not a flaw of the row: it is the least
/// that a stack's state could come to.
struct Floor {
    keys: Vec<LessSafeKey>,
    packets: Vec<Vec<u8>>,
    header_len: usize,
    next: usize,
    count: u64,
}

impl Floor {
    fn new(facts: &Facts, connections: usize) -> Floor {
        let algorithm = match facts.profile {
            Profile::AeadAes256Gcm => &AES_256_GCM,
            _ => &AES_128_GCM,
        };
        let key = |index: usize| {
            let bytes = vec![index as u8; algorithm.key_len()];
            LessSafeKey::new(UnboundKey::new(algorithm, &bytes).expect("its length"))
        };
        Floor {
            keys: (0..connections).map(key).collect(),
            packets: vec![vec![0x5a; facts.len]; BATCH],
            header_len: facts.header_len,
            next: 0,
            count: 0,
        }
    }

    fn run(&mut self, role: Role, packets: u64) -> Duration {
        let (mut left, mut spent) = (packets, Duration::ZERO);
        while left > 0 {
            let count = left.min(BATCH as u64) as usize;
            let (first, keys) = (self.next, self.keys.len());
            if role == Role::Receives {
                (0..count).for_each(|place| self.seal((first + place) % keys, place));
            }
            let started = common::cpu_clock();
            for place in 0..count {
                let key = (first + place) % keys;
                match role {
                    Role::Receives => self.open(key, place),
                    Role::Sends => self.seal(key, place),
                }
            }
            spent += common::cpu_clock() - started;
            self.next = (first + count) % keys;
            self.count += BATCH as u64;
            left -= count as u64;
        }
        spent
    }

    fn seal(&mut self, key: usize, place: usize) {
        let (nonce, packet) = (nonce(self.count + place as u64), &mut self.packets[place]);
        let (header, payload) = packet.split_at_mut(self.header_len);
        let (payload, tag) = payload.split_at_mut(payload.len() - TAG_LEN);
        let sealed = self.keys[key].seal_in_place_separate_tag(nonce, Aad::from(header), payload);
        tag.copy_from_slice(sealed.expect("a short packet").as_ref());
    }

    fn open(&mut self, key: usize, place: usize) {
        let (nonce, packet) = (nonce(self.count + place as u64), &mut self.packets[place]);
        let (header, sealed) = packet.split_at_mut(self.header_len);
        self.keys[key]
            .open_in_place(nonce, Aad::from(header), sealed)
            .expect("just sealed");
    }
}

fn nonce(count: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&count.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}
