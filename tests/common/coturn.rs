//! Starts a coturn of the test's own (Debian's `coturn`) on free ports.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

pub const USER: &str = "alice";
pub const PASSWORD: &str = "a relay's secret";
const START_WAIT: Duration = Duration::from_secs(20);

/// A running relay; dropping it stops the process and removes its log.
pub struct Coturn {
    pub port: u16,
    pub tls_port: u16,
    address: Ipv4Addr,
    folder: PathBuf,
    process: Child,
}

impl Coturn {
    /// Starts a relay at this address, with additional options. Without `turnserver` it returns
    /// `None`, but panics under `CI`.
    pub fn start(address: Ipv4Addr, more: &[&str]) -> Option<Coturn> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("throng-coturn-{}-{number}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        fs::create_dir_all(&folder).expect("a temporary folder can be made");
        let (port, tls_port) = (free_port(address), free_port(address));
        let (cert, key) = certificate(&folder, address);
        let log = File::create(folder.join("log")).expect("a temporary file can be written");
        let mut command = Command::new("turnserver");
        command
            .args(["-n", "--lt-cred-mech", "--realm", "throng", "--no-cli"])
            .args(["--no-dtls", "--log-file", "stdout", "--verbose"])
            .args(["--tls-listening-port", &tls_port.to_string()])
            .arg("--cert")
            .arg(cert)
            .arg("--pkey")
            .arg(key)
            .args(["--pidfile", "/dev/null", "--userdb", "/dev/null"])
            .args(["--listening-ip", &address.to_string()])
            .args(["--relay-ip", &address.to_string()])
            .args(["--listening-port", &port.to_string()])
            .args(["--user", &format!("{USER}:{PASSWORD}")])
            .args(more)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file can be cloned"))
            .stderr(log);
        let process = match command.spawn() {
            Ok(process) => process,
            Err(error) => {
                assert!(
                    std::env::var_os("CI").is_none(),
                    "no coturn under CI ({error}): apt-get install coturn"
                );
                eprintln!("SKIPPED: no turnserver ({error}): apt-get install coturn");
                return None;
            }
        };
        let mut relay = Coturn {
            port,
            tls_port,
            address,
            folder,
            process,
        };
        relay.wait_until_ready();
        Some(relay)
    }

    pub fn url(&self) -> String {
        self.url_for("turn-udp")
    }

    /// URL of the relay for this `--transport`.
    pub fn url_for(&self, transport: &str) -> String {
        let (address, port, tls_port) = (self.address, self.port, self.tls_port);
        match transport {
            "turn-tls" | "auto" => format!("turns:{address}:{tls_port}?transport=tcp"),
            "turn-tcp" => format!("turn:{address}:{port}?transport=tcp"),
            _ => format!("turn:{address}:{port}?transport=udp"),
        }
    }

    /// Path of the relay's self-signed certificate.
    pub fn certificate(&self) -> PathBuf {
        self.folder.join("cert.pem")
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    /// Waits until the relay answers a STUN binding request.
    fn wait_until_ready(&mut self) {
        let socket = UdpSocket::bind((self.address, 0)).expect("a free port");
        socket
            .set_read_timeout(Some(Duration::from_millis(100)))
            .expect("a time-out");
        let request = [&[0, 1, 0, 0, 0x21, 0x12, 0xA4, 0x42][..], &[7; 12]].concat();
        let deadline = Instant::now() + START_WAIT;
        while Instant::now() < deadline {
            let _ = socket.send_to(&request, (self.address, self.port));
            if socket.recv(&mut [0; 512]).is_ok() {
                return;
            }
            assert!(
                matches!(self.process.try_wait(), Ok(None)),
                "coturn ended: {}",
                self.log()
            );
        }
        panic!("coturn is not ready after {START_WAIT:?}: {}", self.log());
    }
}

impl Drop for Coturn {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("coturn's log: {}", self.log());
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Returns a port that is free for UDP and for TCP.
fn free_port(address: Ipv4Addr) -> u16 {
    (0..100)
        .find_map(|_| {
            let socket = UdpSocket::bind((address, 0)).ok()?;
            let port = socket.local_addr().ok()?.port();
            TcpListener::bind((address, port)).ok().map(|_| port)
        })
        .expect("a free port")
}

/// Writes a certificate for this address and its key to files, and returns their paths.
pub fn certificate(folder: &Path, address: Ipv4Addr) -> (PathBuf, PathBuf) {
    let made = rcgen::generate_simple_self_signed([address.to_string()]).expect("a certificate");
    let (cert, key) = (folder.join("cert.pem"), folder.join("key.pem"));
    fs::write(&cert, made.cert.pem()).expect("a temporary file can be written");
    fs::write(&key, made.signing_key.serialize_pem()).expect("a temporary file can be written");
    (cert, key)
}
