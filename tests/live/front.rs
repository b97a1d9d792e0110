//! A front before a server: a proxy or gateway whose answer to each request is up to the test, or a
//! real nginx.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::common::server::Server;

/// Action that a front takes on a request.
pub enum Verdict {
    /// Forwards the request to the server, with this head.
    Forward(String),
    Answer(String),
    /// Sends this answer, then passes the rest of the connection to the server unchanged.
    Tunnel(&'static str),
}

type Rule = Arc<dyn Fn(&str) -> Verdict + Send + Sync>;

/// Starts a front before a server, on a free port, until the test's process ends. Returns its
/// authority.
pub fn front(
    server: &Server,
    rule: impl Fn(&str) -> Verdict + Send + Sync + 'static,
) -> SocketAddr {
    let backend = backend(server);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("a bound socket");
    let rule: Rule = Arc::new(rule);
    std::thread::spawn(move || {
        while let Ok((client, _)) = listener.accept() {
            let rule = rule.clone();
            std::thread::spawn(move || serve(client, backend, &rule));
        }
    });
    address
}

pub fn backend(server: &Server) -> SocketAddr {
    let authority = server.url.strip_prefix("ws://").expect("our own URL");
    authority.parse().expect("an address")
}

fn serve(mut client: TcpStream, backend: SocketAddr, rule: &Rule) -> io::Result<()> {
    let mut bytes = Vec::new();
    let end = loop {
        let mut part = [0; 4096];
        let len = client.read(&mut part)?;
        if len == 0 {
            return Ok(());
        }
        bytes.extend_from_slice(&part[..len]);
        if let Some(at) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break at + 4;
        }
    };
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let mut server = match rule(&head) {
        Verdict::Answer(answer) => {
            client.write_all(answer.as_bytes())?;
            client.shutdown(Shutdown::Write)?;
            // Unread bytes would reset the connection.
            let _ = client.set_read_timeout(Some(Duration::from_millis(500)));
            let _ = client.read(&mut [0; 8 << 10]);
            return Ok(());
        }
        Verdict::Tunnel(answer) => {
            client.write_all(answer.as_bytes())?;
            TcpStream::connect(backend)?
        }
        Verdict::Forward(mut head) => {
            // Each connection carries one request, so that the rule sees every request.
            if !head.to_lowercase().contains("upgrade: websocket") {
                head = head.replacen("\r\n", "\r\nConnection: close\r\n", 1);
            }
            let mut server = TcpStream::connect(backend)?;
            server.write_all(head.as_bytes())?;
            server
        }
    };
    server.write_all(&bytes[end..])?;
    let (mut from, mut to) = (client.try_clone()?, server.try_clone()?);
    std::thread::spawn(move || {
        let _ = io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
    let _ = io::copy(&mut server, &mut client);
    client.shutdown(Shutdown::Write)
}

pub fn forward(head: &str) -> Verdict {
    Verdict::Forward(head.to_owned())
}

pub fn answer(status: &str, headers: &str, body: &str) -> Verdict {
    Verdict::Answer(format!(
        "HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    ))
}

/// Returns the head without this header.
pub fn without(head: &str, header: &str) -> String {
    let lines = head.split_inclusive("\r\n");
    lines
        .filter(|line| !line.to_lowercase().starts_with(header))
        .collect()
}

pub const PAGE: &str = "Server: nginx\r\nContent-Type: text/html\r\n";

/// Longest wait for nginx to listen.
const NGINX_START_WAIT: Duration = Duration::from_secs(20);

/// What nginx needs to pass requests and WebSockets on.
const PASS: &str = "proxy_pass http://BACKEND; proxy_http_version 1.1; \
    proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection $connection_upgrade;";

/// A running nginx before a server; dropping it stops the process and removes its files.
pub struct Nginx {
    ports: Vec<u16>,
    folder: PathBuf,
    process: Child,
}

impl Nginx {
    /// Starts nginx with a site for each of these texts, on a port of its own. In a text `PASS;`
    /// passes everything on to the server, and `BACKEND` is the server's authority. Without `nginx`
    /// it returns `None`, but panics under `CI`.
    pub fn before(server: &Server, sites: &[&str]) -> Option<Nginx> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("throng-nginx-{}-{number}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        fs::create_dir_all(&folder).expect("a temporary folder can be made");
        let held: Vec<TcpListener> = (0..sites.len())
            .map(|_| TcpListener::bind("127.0.0.1:0").expect("a free port"))
            .collect();
        let ports = held.iter().map(|held| held.local_addr().unwrap().port());
        let ports: Vec<u16> = ports.collect();
        drop(held);
        let backend = backend(server).to_string();
        let sites = sites.iter().zip(&ports).map(|(site, port)| {
            let site = site.replace("PASS;", PASS).replace("BACKEND", &backend);
            format!("server {{ listen 127.0.0.1:{port}; {site} }}\n")
        });
        let folders = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|what| format!("{what}_temp_path {}/{what};\n", folder.display()));
        let config = format!(
            "daemon off; master_process off; worker_processes 1; pid {folder}/pid;\n\
             events {{ worker_connections 256; }}\n\
             http {{ access_log off;\n{}map $http_upgrade $connection_upgrade {{ default upgrade; '' close; }}\n\
             limit_conn_zone $server_port zone=all:1m;\n{} }}\n",
            folders.concat(),
            sites.collect::<String>(),
            folder = folder.display()
        );
        fs::write(folder.join("conf"), config).expect("a temporary file can be written");
        let log = File::create(folder.join("log")).expect("a temporary file can be written");
        let started = Command::new("nginx")
            .arg("-c")
            .arg(folder.join("conf"))
            .arg("-e")
            .arg(folder.join("error"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        let process = match started {
            Ok(process) => process,
            Err(error) => {
                assert!(
                    std::env::var_os("CI").is_none(),
                    "no nginx under CI ({error}): apt-get install nginx-light"
                );
                eprintln!("SKIPPED: no nginx ({error}): apt-get install nginx-light");
                return None;
            }
        };
        let mut nginx = Nginx {
            ports,
            folder,
            process,
        };
        nginx.wait_until_ready();
        Some(nginx)
    }

    pub fn url(&self, site: usize) -> String {
        format!("ws://127.0.0.1:{}", self.ports[site])
    }

    fn wait_until_ready(&mut self) {
        let deadline = Instant::now() + NGINX_START_WAIT;
        while Instant::now() < deadline {
            if TcpStream::connect(("127.0.0.1", self.ports[0])).is_ok() {
                return;
            }
            assert!(
                matches!(self.process.try_wait(), Ok(None)),
                "nginx ended: {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("nginx is not ready: {}", self.log());
    }

    fn log(&self) -> String {
        let read = |name| fs::read_to_string(self.folder.join(name)).unwrap_or_default();
        read("log") + &read("error")
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("nginx's log: {}", self.log());
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}
