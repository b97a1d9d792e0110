//! Connection to a relay while an allocation is made, before it becomes part of a path.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::{ALLOCATION_PATIENCE, MESSAGE_BYTES_MAX, RTO, STUN_HEAD_BYTES, TurnLink, TurnUrl};
use crate::net;
use crate::path::{RelayLink, RelayStream};
use crate::signal::link::{causes, plain};
use crate::signal::trust::{self, TlsFault, UnusableTrust};

/// Why a relay is not reached, as it goes on from its address.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoTurnWire {
    #[error("has a name that cannot be resolved ({0}): check its spelling and this host's DNS")]
    Name(String),
    #[error("has a name that was not resolved within {} s: check this host's DNS", ALLOCATION_PATIENCE.as_secs())]
    SlowName,
    #[error("refuses TCP connections at {0}: is it running, and is this its port?")]
    Refused(SocketAddr),
    #[error(
        "cannot be reached at {remote} ({cause}): check the address, the route and the firewall"
    )]
    Unreachable { remote: SocketAddr, cause: String },
    #[error("at {remote} did not {stage} within {} s: does a firewall let it through, and is it stuck?", ALLOCATION_PATIENCE.as_secs())]
    Slow {
        remote: SocketAddr,
        stage: &'static str,
    },
    #[error("at {0} does not speak TLS: write turn:..?transport=tcp, or use its port for TLS")]
    NoTls(SocketAddr),
    #[error("at {remote}: TLS failed: {fault}")]
    Tls { remote: SocketAddr, fault: TlsFault },
    #[error("{0}")]
    Trust(#[from] UnusableTrust),
    #[error("needs a socket that this host does not give ({0})")]
    NoSocket(String),
}

pub(super) struct TurnWire {
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    end: WireEnd,
}

enum WireEnd {
    Udp {
        socket: UdpSocket,
        /// Present until the path takes it.
        media: Option<std::net::UdpSocket>,
    },
    Stream {
        stream: OpenStream,
        /// Bytes of an incomplete message.
        read: Vec<u8>,
    },
    /// The path has the connection.
    HandedOver,
}

enum OpenStream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl TurnWire {
    pub(super) async fn open(
        url: &TurnUrl,
        receive_buffer_bytes: usize,
        deadline: Instant,
    ) -> Result<TurnWire, NoTurnWire> {
        let resolving = tokio::time::timeout_at(deadline, resolve(url)).await;
        let remote = resolving.map_err(|_| NoTurnWire::SlowName)??;
        if url.link == TurnLink::Udp {
            let no_socket = |error: io::Error| match error.kind() {
                io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable => {
                    NoTurnWire::Unreachable {
                        remote,
                        cause: plain(&error),
                    }
                }
                _ => NoTurnWire::NoSocket(plain(&error)),
            };
            return TurnWire::datagrams(remote, receive_buffer_bytes).map_err(no_socket);
        }
        let slow = |stage| move |_| NoTurnWire::Slow { remote, stage };
        let stream = tokio::time::timeout_at(deadline, TcpStream::connect(remote)).await;
        let stream = stream.map_err(slow("take a TCP connection"))?;
        let stream = stream.map_err(|error| match error.kind() {
            io::ErrorKind::ConnectionRefused => NoTurnWire::Refused(remote),
            _ => NoTurnWire::Unreachable {
                remote,
                cause: plain(&error),
            },
        })?;
        let local = stream
            .local_addr()
            .map_err(|error| NoTurnWire::NoSocket(plain(&error)))?;
        let stream = match url.link {
            TurnLink::Tls => {
                let sealing = tokio::time::timeout_at(deadline, seal(url, remote, stream)).await;
                OpenStream::Tls(Box::new(sealing.map_err(slow("agree on TLS"))??))
            }
            _ => OpenStream::Plain(stream),
        };
        let read = Vec::new();
        Ok(TurnWire {
            local,
            remote,
            end: WireEnd::Stream { stream, read },
        })
    }

    fn datagrams(remote: SocketAddr, receive_buffer_bytes: usize) -> io::Result<TurnWire> {
        let any: IpAddr = if remote.is_ipv6() {
            Ipv6Addr::UNSPECIFIED.into()
        } else {
            Ipv4Addr::UNSPECIFIED.into()
        };
        let media = net::open_relay_socket(any, receive_buffer_bytes)?;
        media.connect(remote)?;
        Ok(TurnWire {
            local: media.local_addr()?,
            remote,
            end: WireEnd::Udp {
                socket: UdpSocket::from_std(media.try_clone()?)?,
                media: Some(media),
            },
        })
    }

    /// Sends a message. Returns false if the path has to send it.
    pub(super) async fn send(&mut self, message: &[u8]) -> io::Result<bool> {
        match &mut self.end {
            WireEnd::Udp { socket, .. } => drop(socket.send(message).await?),
            WireEnd::Stream { stream, .. } => match stream {
                OpenStream::Plain(stream) => stream.write_all(message).await?,
                OpenStream::Tls(stream) => {
                    stream.write_all(message).await?;
                    stream.flush().await?;
                }
            },
            WireEnd::HandedOver => return Ok(false),
        }
        Ok(true)
    }

    /// Returns the relay's next message. Cancel-safe.
    pub(super) async fn receive(&mut self) -> io::Result<Vec<u8>> {
        match &mut self.end {
            WireEnd::Udp { socket, .. } => {
                let mut buffer = [0; MESSAGE_BYTES_MAX];
                let len = socket.recv(&mut buffer).await?;
                Ok(buffer[..len].to_vec())
            }
            WireEnd::Stream { stream, read } => match stream {
                OpenStream::Plain(stream) => next_message(stream, read).await,
                OpenStream::Tls(stream) => next_message(stream, read).await,
            },
            WireEnd::HandedOver => std::future::pending().await,
        }
    }

    /// Hands the connection over to the path. A UDP socket can still be used from here; a stream
    /// cannot.
    pub(super) fn hand_over(&mut self) -> io::Result<RelayLink> {
        if let WireEnd::Udp { media, .. } = &mut self.end {
            let media = media.take().ok_or(io::ErrorKind::NotConnected)?;
            return Ok(RelayLink::Udp(media));
        }
        let end = std::mem::replace(&mut self.end, WireEnd::HandedOver);
        let WireEnd::Stream { stream, read } = end else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let (stream, tls) = match stream {
            OpenStream::Plain(stream) => (stream, None),
            OpenStream::Tls(stream) => {
                let (stream, connection) = stream.into_inner();
                (stream, Some(Box::new(connection)))
            }
        };
        let stream = RelayStream::new(stream.into_std()?, tls, &read)?;
        Ok(RelayLink::Stream(Box::new(stream)))
    }
}

async fn resolve(url: &TurnUrl) -> Result<SocketAddr, NoTurnWire> {
    let found = tokio::net::lookup_host((url.host.as_str(), url.port)).await;
    let mut found = found.map_err(|error| NoTurnWire::Name(plain(&error)))?;
    found
        .next()
        .ok_or_else(|| NoTurnWire::Name("it has no address".to_owned()))
}

/// Agrees on TLS, with the same trusted certificates as elsewhere.
async fn seal(
    url: &TurnUrl,
    remote: SocketAddr,
    stream: TcpStream,
) -> Result<TlsStream<TcpStream>, NoTurnWire> {
    let name = ServerName::try_from(url.host.clone())
        .map_err(|_| NoTurnWire::Name("it is no name of a host".to_owned()))?;
    let connector = TlsConnector::from(trust::tls_config()?);
    connector.connect(name, stream).await.map_err(|error| {
        let by_rustls = error.get_ref().and_then(|inner| inner.downcast_ref());
        let below = causes(&error).find_map(|cause| cause.downcast_ref::<rustls::Error>());
        match by_rustls.or(below) {
            Some(rustls::Error::InvalidMessage(_)) => NoTurnWire::NoTls(remote),
            Some(fault) => NoTurnWire::Tls {
                remote,
                fault: TlsFault::of(fault),
            },
            None => NoTurnWire::Unreachable {
                remote,
                cause: format!("it hung up while TLS was agreed on: {}", plain(&error)),
            },
        }
    })
}

async fn next_message(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    read: &mut Vec<u8>,
) -> io::Result<Vec<u8>> {
    loop {
        if let Some([first, _, high, low]) = read.first_chunk() {
            let len = STUN_HEAD_BYTES + usize::from(u16::from_be_bytes([*high, *low]));
            if first >> 6 != 0 || len > MESSAGE_BYTES_MAX {
                return Err(io::ErrorKind::InvalidData.into());
            }
            if read.len() >= len {
                let rest = read.split_off(len);
                return Ok(std::mem::replace(read, rest));
            }
        }
        if stream.read_buf(read).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// Longest wait for a sign of life from a relay that has carried media.
const SIGN_OF_LIFE_WAIT: Duration = Duration::from_secs(1);

/// Asks whether a silent relay is still running: a relay answers anybody who asks for their own
/// address (RFC 8489, section 12).
pub async fn sign_of_life(url: &TurnUrl) -> &'static str {
    const NONE: &str = "does not answer either: is it still running?";
    const SOME: &str = "still answers: look at what is between it and the server";
    match tokio::time::timeout(SIGN_OF_LIFE_WAIT, ask_for_address(url)).await {
        Ok(Ok(())) => SOME,
        _ => NONE,
    }
}

async fn ask_for_address(url: &TurnUrl) -> Result<(), NoTurnWire> {
    const MAGIC: [u8; 4] = [0x21, 0x12, 0xA4, 0x42];
    let deadline = Instant::now() + SIGN_OF_LIFE_WAIT;
    let mut wire = TurnWire::open(url, MESSAGE_BYTES_MAX, deadline).await?;
    let failed = |error: io::Error| NoTurnWire::NoSocket(plain(&error));
    let mut request = [0; STUN_HEAD_BYTES];
    request[1] = 1;
    request[4..8].copy_from_slice(&MAGIC);
    let id = u128::from(super::TransactionId::generate()).to_be_bytes();
    request[8..].copy_from_slice(&id[4..]);
    loop {
        wire.send(&request).await.map_err(failed)?;
        if let Ok(answer) = tokio::time::timeout(RTO, wire.receive()).await
            && answer.map_err(failed)?.get(4..STUN_HEAD_BYTES) == request.get(4..)
        {
            return Ok(());
        }
    }
}
