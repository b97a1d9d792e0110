//! A front before a server: a proxy or gateway whose answer to each request is up to the test.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

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
