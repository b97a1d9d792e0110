//! Cost of a connection before any media: the CPU time of its set-up (ICE and DTLS, our side only),
//! and the memory that it then holds, without media and after media has flowed. Other stacks,
//! connected to the same ends, are measured beside it.
//!
//! `cargo bench --bench connect`

mod common;
#[path = "../tests/common/counting.rs"]
mod counting;
#[path = "../tests/common/link.rs"]
#[allow(dead_code)]
mod link;

use std::time::Duration;

use common::fixture::{Fixture, Role, Setting, Stack};
use common::rtc::Rtc;
use common::str0m::Str0m;
use common::table::{self, Table};
use common::throng::Throng;
use counting::{ALLOCATIONS, HELD};
use criterion::{Criterion, SamplingMode};
use throng::measure::Kind;

#[global_allocator]
static ALLOCATOR: counting::Counting = counting::Counting;

/// Number of connections that are set up side by side. One second of joins would have no more in
/// progress.
const AT_ONCE: u64 = 32;
const SET_UP: &str = "set-up of a connection";
const IDLE: &str = "a second of a connection without media";
/// Number of connections that are idle side by side. They share the cost of code that looks at all
/// connections each millisecond.
const IDLE_CONNECTIONS: usize = 250;
const SUBSCRIBER: Setting = Setting::media_only(Role::Receives, Kind::Video);

fn main() {
    let mut criterion = table::criterion();
    let mut table = Table::new(
        "A connection, one side of it, CPU time (median, its 95 % interval, times throng)",
    );
    set_up::<Throng>(&mut criterion, &mut table);
    set_up::<Str0m>(&mut criterion, &mut table);
    set_up::<Rtc<false>>(&mut criterion, &mut table);
    idle::<Throng>(&mut criterion, &mut table);
    idle::<Str0m>(&mut criterion, &mut table);
    idle::<Rtc<false>>(&mut criterion, &mut table);
    idle::<Rtc<true>>(&mut criterion, &mut table);
    criterion.final_summary();
    table.print();
    let connections = if common::is_full() { 1_000 } else { 8 };
    println!(
        "\nMemory of a connection, of {connections}: bytes on the heap once it is up, and after a second of video"
    );
    memory::<Throng>(connections);
    memory::<Str0m>(connections);
    memory::<Rtc<false>>(connections);
    memory::<Rtc<true>>(connections);
}

fn set_up<S: Stack>(criterion: &mut Criterion, table: &mut Table) {
    let mut benches = criterion.benchmark_group(SET_UP);
    // An iteration is a connection. Sampling is flat, because one connection costs much.
    benches.sampling_mode(SamplingMode::Flat);
    benches.bench_function(S::NAME, |bencher| bencher.iter_custom(connect::<S>));
    benches.finish();
    table.add(SET_UP, S::NAME);
}

fn idle<S: Stack>(criterion: &mut Criterion, table: &mut Table) {
    let connections = if common::is_full() {
        IDLE_CONNECTIONS
    } else {
        2
    };
    let mut fixture: Option<Fixture<S>> = None;
    let mut benches = criterion.benchmark_group(IDLE);
    benches.sampling_mode(SamplingMode::Flat).sample_size(10);
    // An iteration is a second of all connections.
    benches.bench_function(S::NAME, |bencher| {
        let fixture = fixture.get_or_insert_with(|| Fixture::connected(connections, SUBSCRIBER));
        bencher.iter_custom(|seconds| fixture.idle(seconds * 1_000));
    });
    benches.finish();
    table.add_per(IDLE, S::NAME, connections as f64);
}

fn connect<S: Stack>(count: u64) -> Duration {
    let (mut left, mut spent) = (count, Duration::ZERO);
    while left > 0 {
        let now = left.min(AT_ONCE);
        spent += Fixture::<S>::connected(now as usize, SUBSCRIBER)
            .setup
            .spent;
        left -= now;
    }
    spent
}

fn memory<S: Stack>(connections: usize) {
    const PACKETS: u64 = 187;
    // The first connection pays for everything that a stack allocates only once.
    drop(Fixture::<S>::connected(1, SUBSCRIBER));
    let one = held(|| Fixture::<S>::connected(1, SUBSCRIBER), |_| {});
    let all = held(
        || Fixture::<S>::connected(connections, SUBSCRIBER),
        |fixture| {
            fixture.receive(PACKETS * connections as u64);
        },
    );
    let each = |all: i64, one: i64| (all - one) as f64 / (connections - 1) as f64 / 1_024.0;
    println!(
        "  {:<28} {:>7.1} KiB {:>7.1} KiB   {:.1} allocations a packet",
        S::NAME,
        each(all.connected, one.connected),
        each(all.with_media, one.connected),
        all.allocations as f64 / (PACKETS * connections as u64) as f64
    );
}

struct Held {
    connected: i64,
    with_media: i64,
    allocations: u64,
}

fn held<S: Stack>(
    connect: impl FnOnce() -> Fixture<S>,
    use_it: impl FnOnce(&mut Fixture<S>),
) -> Held {
    let before = HELD.get();
    let mut fixture = connect();
    let connected = HELD.get() - before;
    let allocations = ALLOCATIONS.get();
    use_it(&mut fixture);
    Held {
        connected,
        with_media: HELD.get() - before,
        allocations: ALLOCATIONS.get() - allocations,
    }
}
