//! Cost of a received packet in a whole engine worker, kernel included, as a multiple of the floor
//! program (`common::floor`). Both get the same trace from the same kind of sender, in turns, in
//! one run. A third program is the floor on sockets without the kernel's time stamps and drop
//! counts. It shows what those cost.
//!
//! `cargo bench --bench floor`

mod common;
#[path = "../tests/common/link.rs"]
#[allow(dead_code)]
mod link;

use std::fmt::{Display, Formatter};
use std::sync::mpsc::{Sender as Commands, channel};
use std::thread::JoinHandle;
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use common::floor::{
    BareEnd, Floor, Keys, LOOPBACK, Notes, RECEIVE_BUFFER_BYTES, Sender, Taken, Target, bare_end,
};
use common::origin::{new_peer, shard_config};
use common::remote::{Remote, Side};
use common::{SSRC, is_full};
use throng::codec::{Codec, PayloadTypes};
use throng::engine::worker::{self, Occasion, ShardWorkerConfig, WorkerReport};
use throng::engine::{PeerKey, ShardCommand, ShardConfig, StreamParameters};
use throng::measure::Record;
use throng::net;
use throng::transport::peer::IceCredentials;
use throng::units::Epoch;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// Limit for connecting. Some thousands of connections come up a second, so beyond this something
/// hangs.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pause after sending, in which all packets under way arrive.
const SETTLE: Duration = Duration::from_millis(60);

fn main() {
    let (connections, window, rounds) = if is_full() {
        (1_000, Duration::from_secs(3), 5)
    } else {
        (8, Duration::from_millis(200), 1)
    };
    let mut engine = Engine::connected(connections);
    let mut floor = Bare::new(connections, &engine, Notes::Kept);
    let mut no_notes = Bare::new(connections, &engine, Notes::Nothing);
    let mut turns = Vec::new();
    for _ in 0..rounds {
        turns.push([
            engine.window(window),
            floor.window(window),
            no_notes.window(window),
        ]);
    }
    engine.stop();
    print(connections, &floor.sender, &turns);
}

/// The floor program with its own sender, so that packets which one program misses are not counted
/// as another's.
struct Bare {
    ends: Vec<BareEnd>,
    sender: Sender,
    epoch: Epoch,
}

impl Bare {
    fn new(connections: usize, engine: &Engine, notes: Notes) -> Bare {
        let socket = net::open_media_socket(LOOPBACK, RECEIVE_BUFFER_BYTES).expect("a socket");
        let address = socket.local_addr().expect("bound");
        let profile = engine.profile();
        let end = |index| bare_end(index, address, profile, notes);
        let (ends, targets) = (0..connections).map(end).unzip();
        let epoch = engine.config.epoch;
        let config = ShardConfig {
            epoch,
            ..shard_config(connections)
        };
        Bare {
            ends,
            sender: Sender::new(socket, targets, &config, connections),
            epoch,
        }
    }

    /// Runs one turn, as [`Engine::window`] does.
    fn window(&mut self, time: Duration) -> Row {
        let floor = Floor::start(std::mem::take(&mut self.ends), self.epoch);
        let before = self.sender.sent;
        self.sender.run_for(time);
        std::thread::sleep(SETTLE);
        let (ends, taken) = floor.stop();
        self.ends = ends;
        Row::new(taken, self.sender.sent - before)
    }
}

struct Row {
    taken: Taken,
    sent: u64,
}

impl Row {
    fn new(taken: Taken, sent: u64) -> Row {
        assert!(taken.packets > 0, "nothing has arrived");
        Row { taken, sent }
    }
}

fn print(connections: usize, sender: &Sender, turns: &[[Row; 3]]) {
    let bytes = sender.sent_bytes / sender.sent.max(1);
    println!(
        "\nA received packet of {bytes} bytes, kernel included, {connections} connections on one thread; in brackets what arrived of those sent"
    );
    println!(
        "  {:>20} {:>20} {:>22} {:>7}",
        "engine worker", "floor program", "same without stamps", "ratio"
    );
    for [engine, floor, no_notes] in turns {
        println!(
            "  {engine:>20} {floor:>20} {no_notes:>22} {:>6.2}x",
            ratio(engine, floor)
        );
    }
    let median = |one: usize, other: usize| {
        let mut ratios: Vec<f64> = turns
            .iter()
            .map(|turn| ratio(&turn[one], &turn[other]))
            .collect();
        ratios.sort_by(f64::total_cmp);
        ratios[ratios.len() / 2]
    };
    println!(
        "  generator CPU / floor CPU a received packet: {:.2}x (median)",
        median(0, 1)
    );
    println!(
        "  floor with stamps and drop counts / without: {:.2}x (median)",
        median(1, 2)
    );
}

fn ratio(one: &Row, other: &Row) -> f64 {
    one.taken.nanos_a_packet() / other.taken.nanos_a_packet()
}

impl Display for Row {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let arrived = 100.0 * self.taken.packets as f64 / self.sent.max(1) as f64;
        f.pad(&format!(
            "{:.0} ns ({arrived:.2} %)",
            self.taken.nanos_a_packet()
        ))
    }
}

/// A real worker on its thread, and the sender of the packets that it receives.
struct Engine {
    config: ShardConfig,
    sender: Sender,
    commands: Commands<ShardCommand>,
    reports: UnboundedReceiver<WorkerReport>,
    thread: JoinHandle<std::io::Result<()>>,
}

impl Engine {
    fn connected(connections: usize) -> Engine {
        let config = shard_config(connections);
        let socket = net::open_media_socket(LOOPBACK, RECEIVE_BUFFER_BYTES).expect("a socket");
        let (commands, receiver) = channel();
        let (report_sender, reports) = unbounded_channel();
        let worker = ShardWorkerConfig {
            index: 0,
            cpu: None,
            capacity: connections,
            shard: config.clone(),
            commands: receiver,
            reports: report_sender,
            spare_records: channel().1,
        };
        let thread = std::thread::Builder::new().name("engine-0".into());
        let thread = thread.spawn(move || worker::run(worker)).expect("a thread");
        let address = socket.local_addr().expect("bound");
        let targets = (0..connections)
            .map(|key| add(key, address, &config, &commands))
            .collect();
        let mut sender = Sender::new(socket, targets, &config, connections);
        sender.connect(PATIENCE);
        Engine {
            config,
            sender,
            commands,
            reports,
            thread,
        }
    }

    fn profile(&self) -> throng::transport::srtp::Profile {
        match &self.sender.targets[0].keys {
            Keys::Peer(remote) => remote.peer.sealer().expect("connected").profile(),
            Keys::Bare(sealer) => sealer.profile(),
        }
    }

    /// Runs one turn. Returns the worker's CPU time, the packets that it received, and the number
    /// that were sent to it.
    fn window(&mut self, time: Duration) -> Row {
        let (cpu_before, _) = self.report();
        let sent_before = self.sender.sent;
        self.sender.run_for(time);
        std::thread::sleep(SETTLE);
        let (cpu, record) = self.report();
        let taken = Taken {
            packets: record.video.packets_received,
            cpu: cpu - cpu_before,
        };
        Row::new(taken, self.sender.sent - sent_before)
    }

    /// Returns the thread's CPU time so far, and what was counted since the last call.
    fn report(&mut self) -> (Duration, Record) {
        self.commands
            .send(ShardCommand::Report)
            .expect("a worker that lives");
        let mut record = Record::default();
        loop {
            let report = self.reports.blocking_recv().expect("a worker that lives");
            record.merge(&report.record);
            if report.occasion == Occasion::Asked {
                return (report.cpu, record);
            }
        }
    }

    fn stop(self) {
        self.commands
            .send(ShardCommand::Stop)
            .expect("a worker that lives");
        self.thread.join().expect("no panic").expect("no failure");
    }
}

/// Adds a subscriber to the worker. Returns the target that the sender needs.
fn add(
    key: usize,
    sender: std::net::SocketAddr,
    config: &ShardConfig,
    commands: &Commands<ShardCommand>,
) -> Target {
    let socket = net::open_media_socket(LOOPBACK, RECEIVE_BUFFER_BYTES).expect("a socket");
    let side = |address| Side {
        address,
        credentials: IceCredentials::random(),
        fingerprint: config.identity.fingerprint(),
    };
    let to = socket.local_addr().expect("bound");
    let (ours, theirs) = (side(to), side(sender));
    let now = config.epoch.now();
    let remote = Remote::new(theirs.clone(), &ours, config, now);
    let peer = Box::new(new_peer(key, &ours, &theirs));
    let key = PeerKey(key);
    let streams = vec![StreamParameters {
        payloads: PayloadTypes::of(Codec::Vp8, 96),
        ssrc: Ssrc(SSRC),
        rtx_ssrc: None,
        announced_at: now,
        transport_cc_extension: None,
        abs_send_time_extension: None,
        nack: true,
    }];
    // Nobody reads the peer's events, because the other end knows when it is connected.
    let events = unbounded_channel().0;
    let add = ShardCommand::AddPeer {
        key,
        path: Some(socket.into()),
        peer,
        events,
    };
    for command in [add, ShardCommand::Subscribe { key, streams }] {
        commands.send(command).expect("a worker that lives");
    }
    Target {
        to,
        keys: Keys::Peer(Box::new(remote)),
    }
}
