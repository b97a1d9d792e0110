//! A server on loopback, or in a network namespace, started for one test and stopped with it: a
//! real LiveKit server, or the embedded SFU in its own process.
//!
//! LiveKit's binary is `THRONG_LIVEKIT_SERVER`, or `livekit-server` on the PATH or in `~/go/bin`
//! (`go install github.com/livekit/livekit-server/cmd/server@latest` names it `server`). Without a
//! binary a test prints that it was skipped and passes, except under `CI`.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use throng::signal::{ApiKey, Endpoint};

const KEY: &str = "devkey";
const SECRET: &str = "a-secret-for-tests-of-thirty-two-or-more-characters";
/// Longest wait for a server to start. A start takes 0.2 s, more on a busy host.
const START_WAIT: Duration = Duration::from_secs(20);
/// Time in which an empty server ends. One with participants waits for them, and a second SIGTERM
/// stops it at once.
const GRACE: Duration = Duration::from_millis(300);
const STOP_WAIT: Duration = Duration::from_secs(5);
/// Number of UDP ports of a server in port-range mode, two per participant.
const PORT_RANGE: u16 = 1_000;

/// UDP ports on which the server takes media.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UdpPorts {
    /// A port for each connection, from a range of 1,000.
    Range,
    /// One port for all.
    Mux,
}

#[derive(Clone, Debug)]
pub struct Options {
    /// Whether rooms are made when somebody joins.
    pub auto_create: bool,
    pub ice_lite: bool,
    pub udp: UdpPorts,
    pub log_level: &'static str,
    pub site: Site,
    /// Address for signalling, if it differs from the site's.
    pub signalling: Option<IpAddr>,
    /// Whether media uses TCP only.
    pub force_tcp: bool,
    /// Codecs that rooms accept, as named in the server's configuration. Empty means all.
    pub codecs: &'static [&'static str],
    /// Number of participants that a room takes; 0 means any.
    pub seats: u32,
    /// Longest name of a room, and longest identity; 0 means the server's default.
    pub name_length: u32,
    /// Whether the server runs its own relay, over UDP.
    pub turn: bool,
    /// If set, the server allocates by bandwidth and may pause tracks.
    pub congestion: Option<Congestion>,
    /// Whether the server measures how long packets stay in it.
    pub forward_stats: bool,
}

/// Source of the server's estimate of a subscriber's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Congestion {
    /// The subscriber's REMB, which is LiveKit's default.
    Remote,
    /// The server's own estimate, from transport-wide feedback.
    SendSide,
}

/// Address and network device of a server.
#[derive(Clone, Copy, Debug)]
pub struct Site {
    pub address: Ipv4Addr,
    pub device: &'static str,
}

impl Site {
    pub const LOOPBACK: Site = Site {
        address: Ipv4Addr::LOCALHOST,
        device: "lo",
    };
}

impl Default for Options {
    fn default() -> Options {
        Options {
            auto_create: true,
            ice_lite: false,
            udp: UdpPorts::Range,
            log_level: "warn",
            site: Site::LOOPBACK,
            signalling: None,
            force_tcp: false,
            codecs: &[],
            seats: 0,
            name_length: 0,
            turn: false,
            congestion: None,
            forward_stats: false,
        }
    }
}

/// A running server; dropping it stops the process and removes its directory.
pub struct Server {
    pub url: String,
    pub key: String,
    pub secret: String,
    pub prometheus_url: String,
    pub log_path: PathBuf,
    directory: PathBuf,
    process: Child,
}

impl Server {
    /// Starts a LiveKit server with default options; `None` if there is no binary.
    pub fn livekit() -> Option<Server> {
        Server::livekit_with(&Options::default())
    }

    /// Sends the room service a request that no run sends, and asserts that it is accepted.
    pub fn ask(&self, room: &str, method: &str, mut request: serde_json::Value) {
        request["room"] = room.into();
        let authority = self.url.strip_prefix("ws://").unwrap();
        let token = self.api_key().service_token(Some(room)).unwrap();
        let body = request.to_string();
        let mut stream = TcpStream::connect(authority).unwrap();
        write!(
            stream,
            "POST /twirp/livekit.RoomService/{method} HTTP/1.0\r\nHost: {authority}\r\nAuthorization: Bearer {}\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            token.expose(),
            body.len()
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains(" 200 "), "{answer}");
    }

    /// Starts the embedded SFU.
    pub fn embedded() -> Server {
        Server::embedded_at(Site::LOOPBACK)
    }

    pub fn embedded_at(site: Site) -> Server {
        Server::embedded_on(site.address.into())
    }

    pub fn embedded_on(address: IpAddr) -> Server {
        (0..3)
            .find_map(|_| launch_embedded(address))
            .unwrap_or_else(|| panic!("throng sfu did not start three times"))
    }

    pub fn livekit_with(options: &Options) -> Option<Server> {
        let Some(binary) = find_binary() else {
            assert!(
                std::env::var_os("CI").is_none(),
                "no livekit-server under CI: install it or set THRONG_LIVEKIT_SERVER"
            );
            eprintln!(
                "SKIPPED: no livekit-server (set THRONG_LIVEKIT_SERVER, or put it on the PATH)"
            );
            return None;
        };
        Some(Server::livekit_of(&binary, options))
    }

    /// A LiveKit server that another binary runs.
    pub fn livekit_of(binary: &Path, options: &Options) -> Server {
        // Three attempts, because another process may take a port between our search for free ones
        // and the server's use of them.
        (0..3)
            .find_map(|_| launch_livekit(binary, options))
            .unwrap_or_else(|| panic!("{} did not start three times", binary.display()))
    }

    pub fn endpoint(&self) -> Endpoint {
        self.url.parse().expect("our own URL")
    }

    pub fn api_key(&self) -> ApiKey {
        ApiKey::new(&self.key, &self.secret)
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log_path).unwrap_or_default()
    }

    /// Reads the server's Prometheus page. Every sample is under `name{labels}`; the sum over all
    /// labels is under the bare `name`.
    pub fn metrics(&self) -> HashMap<String, f64> {
        let page = http_ok(&self.prometheus_url).expect("the server's metrics page");
        let mut metrics = HashMap::new();
        for line in page.lines().filter(|line| !line.starts_with('#')) {
            let Some((sample, value)) = line
                .rsplit_once(' ')
                .and_then(|(sample, value)| Some((sample, value.parse::<f64>().ok()?)))
            else {
                continue;
            };
            if let Some((name, _)) = sample.split_once('{') {
                *metrics.entry(name.to_owned()).or_default() += value;
            }
            *metrics.entry(sample.to_owned()).or_default() += value;
        }
        metrics
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        stop(&mut self.process);
        if std::thread::panicking() {
            eprintln!("the server's log: {}", self.log());
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn find_binary() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("THRONG_LIVEKIT_SERVER") {
        let path = PathBuf::from(path);
        assert!(
            path.is_file(),
            "THRONG_LIVEKIT_SERVER is {}, which is no file",
            path.display()
        );
        return Some(path);
    }
    let on_path = std::env::var_os("PATH")
        .map(|path| std::env::split_paths(&path).collect::<Vec<_>>())
        .unwrap_or_default();
    let go_bin = std::env::var_os("HOME")
        .map(|home| PathBuf::from(home).join("go/bin"))
        .unwrap_or_default();
    let in_path = on_path
        .into_iter()
        .map(|directory| directory.join("livekit-server"));
    in_path
        .chain([go_bin.join("livekit-server"), go_bin.join("server")])
        .find(|path| path.is_file())
}

/// Makes one attempt to start it; `None` if the process ended at once.
fn launch_embedded(address: IpAddr) -> Option<Server> {
    let port = Ports::find(UdpPorts::Mux).signal;
    let mut command = Command::new(env!("CARGO_BIN_EXE_throng"));
    command
        .args(["sfu", "--listen"])
        .arg(SocketAddr::new(address, port).to_string());
    command.args(["--api-key", KEY, "--api-secret", SECRET]);
    spawn(command, make_directory(), address, port, port)
}

/// Makes one attempt to start it; `None` if the process ended at once.
fn launch_livekit(binary: &Path, options: &Options) -> Option<Server> {
    let directory = make_directory();
    let ports = Ports::find(options.udp);
    let config_path = directory.join("livekit.yaml");
    fs::write(&config_path, config(&ports, options)).expect("a temporary file can be written");
    let mut command = Command::new(binary);
    command.arg("--config").arg(&config_path);
    spawn(
        command,
        directory,
        options
            .signalling
            .unwrap_or_else(|| options.site.address.into()),
        ports.signal,
        ports.prometheus,
    )
}

fn spawn(
    mut command: Command,
    directory: PathBuf,
    address: IpAddr,
    signal: u16,
    prometheus: u16,
) -> Option<Server> {
    let log_path = directory.join("server.log");
    let log = File::create(&log_path).expect("a temporary file can be written");
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a file can be cloned"))
        .stderr(log);
    let process = command
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?} cannot be run: {error}"));
    let mut server = Server {
        url: format!("ws://{}", SocketAddr::new(address, signal)),
        key: KEY.into(),
        secret: SECRET.into(),
        prometheus_url: format!("http://{}/metrics", SocketAddr::new(address, prometheus)),
        log_path,
        directory,
        process,
    };
    wait_until_ready(&mut server).then_some(server)
}

fn make_directory() -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = format!(
        "throng-server-{}-{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    );
    let directory = std::env::temp_dir().join(name);
    fs::create_dir_all(&directory).expect("a temporary directory can be made");
    directory
}

fn wait_until_ready(server: &mut Server) -> bool {
    let front = server.url.replacen("ws", "http", 1) + "/";
    let deadline = Instant::now() + START_WAIT;
    while Instant::now() < deadline {
        if let Ok(Some(status)) = server.process.try_wait() {
            eprintln!("the server ended with {status}: {}", server.log());
            return false;
        }
        if http_ok(&front).is_ok() && http_ok(&server.prometheus_url).is_ok() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!(
        "the server is not ready after {START_WAIT:?}: {}",
        server.log()
    );
}

/// Stops a process: sends SIGTERM, a second SIGTERM in case the server waits for its participants
/// to leave, and SIGKILL if neither helps.
fn stop(process: &mut Child) {
    for patience in [GRACE, STOP_WAIT] {
        let _ = Command::new("kill")
            .arg("-TERM")
            .arg(process.id().to_string())
            .stderr(Stdio::null())
            .status();
        if ends_within(process, patience) {
            return;
        }
    }
    let _ = process.kill();
    let _ = process.wait();
}

fn free_udp_port() -> u16 {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    socket.local_addr().expect("a bound socket").port()
}

fn ends_within(process: &mut Child, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        if let Ok(Some(_)) = process.try_wait() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

fn config(ports: &Ports, options: &Options) -> String {
    let udp = match options.udp {
        UdpPorts::Range => format!(
            "port_range_start: {}\n  port_range_end: {}",
            ports.udp,
            ports.udp + PORT_RANGE - 1
        ),
        UdpPorts::Mux => format!("udp_port: {}", ports.udp),
    };
    let congestion = options.congestion.map_or(String::new(), |congestion| {
        let send_side = congestion == Congestion::SendSide;
        format!("  congestion_control: {{enabled: true, allow_pause: true, use_send_side_bwe: {send_side}}}\n")
    });
    let forward_stats = if options.forward_stats {
        "  forward_stats: {summary_interval: 10ms, report_interval: 1s, report_window: 1s}\n"
    } else {
        ""
    };
    let Site { address, device } = options.site;
    let signalling = options.signalling.unwrap_or(address.into());
    let force_tcp = if options.force_tcp {
        "  force_tcp: true\n"
    } else {
        ""
    };
    let codecs = if options.codecs.is_empty() {
        String::new()
    } else {
        let mimes: Vec<String> = options
            .codecs
            .iter()
            .map(|mime| format!("{{mime: {mime}}}"))
            .collect();
        format!(", enabled_codecs: [{}]", mimes.join(", "))
    };
    let seats = match options.seats {
        0 => String::new(),
        seats => format!(", max_participants: {seats}"),
    };
    let limit = match options.name_length {
        0 => String::new(),
        length => format!(
            "limit: {{max_room_name_length: {length}, max_participant_identity_length: {length}}}\n"
        ),
    };
    let turn = if options.turn {
        // A relay refuses peers on its own host unless the configuration allows them.
        format!(
            "turn: {{enabled: true, udp_port: {}, bind_addresses: [\"{address}\"], allow_restricted_peer_cidrs: [\"{address}/32\"]}}\n",
            free_udp_port()
        )
    } else {
        String::new()
    };
    format!(
        "port: {}\nbind_addresses: [\"{signalling}\"]\nkeys: {{{KEY}: {SECRET}}}\n\
         rtc:\n  node_ip: {address}\n  enable_loopback_candidate: {}\n  interfaces: {{includes: [{device}]}}\n  tcp_port: {}\n  {udp}\n  use_ice_lite: {}\n{congestion}{forward_stats}{force_tcp}\
         {turn}{limit}room: {{auto_create: {}{codecs}{seats}}}\nprometheus_port: {}\nlogging: {{level: {}, pion_level: error}}\n",
        ports.signal,
        address.is_loopback(),
        ports.tcp,
        options.ice_lite,
        options.auto_create,
        ports.prometheus,
        options.log_level
    )
}

/// Ports that were free a moment ago.
struct Ports {
    signal: u16,
    tcp: u16,
    prometheus: u16,
    udp: u16,
}

impl Ports {
    fn find(udp: UdpPorts) -> Ports {
        // All three listeners are held until the last port is known, so that the ports differ.
        let held: Vec<TcpListener> = (0..3)
            .map(|_| TcpListener::bind("127.0.0.1:0").expect("a free port"))
            .collect();
        let mut ports = held.iter().map(|listener| {
            listener
                .local_addr()
                .expect("a bound socket has an address")
                .port()
        });
        let mut next = || ports.next().expect("three listeners");
        let udp = match udp {
            UdpPorts::Mux => UdpSocket::bind("127.0.0.1:0")
                .and_then(|socket| socket.local_addr())
                .expect("a free port")
                .port(),
            UdpPorts::Range => free_range(),
        };
        Ports {
            signal: next(),
            tcp: next(),
            prometheus: next(),
            udp,
        }
    }
}

/// Returns the start of a range below the ephemeral ports. Each server of a process gets another
/// one, and processes start at different ones.
fn free_range() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let ranges = (32_000 - 10_000) / u32::from(PORT_RANGE);
    let index = (std::process::id() + NEXT.fetch_add(1, Ordering::Relaxed)) % ranges;
    10_000 + u16::try_from(index).expect("a small number") * PORT_RANGE
}

/// Returns the body of a page that is served with status 200.
pub fn http_ok(url: &str) -> io::Result<String> {
    let (authority, path) = url
        .strip_prefix("http://")
        .and_then(|rest| rest.split_once('/'))
        .ok_or(io::ErrorKind::InvalidInput)?;
    let mut stream = TcpStream::connect(authority)?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    write!(stream, "GET /{path} HTTP/1.0\r\nHost: {authority}\r\n\r\n")?;
    let mut response = String::new();
    stream.read_to_string(&mut response)?;
    let (head, body) = response
        .split_once("\r\n\r\n")
        .ok_or(io::ErrorKind::InvalidData)?;
    match head.split(' ').nth(1) {
        Some("200") => Ok(body.to_owned()),
        _ => Err(io::Error::other(head.to_owned())),
    }
}
