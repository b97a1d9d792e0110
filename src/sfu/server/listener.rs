//! The server's TCP port: how many connections may be open at a time, and how long one may say nothing.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::process::{Resource, getrlimit};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};

/// More participants than one signalling thread serves.
pub const CONNECTIONS_MAX: usize = 32_768;
/// Files that are not for connections: media sockets, logs, and what a runtime needs for itself. Without one to spare nobody could even be refused.
const FILES_KEPT: u64 = 64;
/// A client has our ping to answer every ten seconds, and a request to send at once: one that says nothing for so long is gone, or never meant to speak.
const SILENCE_MAX: Duration = Duration::from_secs(60);

pub(super) struct Listener {
    listener: TcpListener,
    places: Arc<Semaphore>,
    refused: Arc<AtomicU64>,
}

impl Listener {
    /// Connections beyond the bound are closed at once, and counted in `refused`.
    ///
    /// The bound is `most`, or what this process may open of files where that is less.
    pub(super) fn new(listener: TcpListener, most: usize, refused: Arc<AtomicU64>) -> Listener {
        let files = getrlimit(Resource::Nofile)
            .current
            .unwrap_or(u64::MAX)
            .saturating_sub(FILES_KEPT);
        let most = usize::try_from(files).map_or(most, |files| most.min(files));
        Listener {
            listener,
            places: Arc::new(Semaphore::new(most)),
            refused,
        }
    }
}

impl axum::serve::Listener for Listener {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        loop {
            let (stream, address) = axum::serve::Listener::accept(&mut self.listener).await;
            let Ok(place) = self.places.clone().try_acquire_owned() else {
                self.refused.fetch_add(1, Relaxed);
                continue;
            };
            // A kernel that cannot switch Nagle off is slower, not wrong.
            let _ = stream.set_nodelay(true);
            let connection = Connection {
                stream,
                silent_until: Box::pin(tokio::time::sleep(SILENCE_MAX)),
                _place: place,
            };
            return (connection, address);
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A client's connection, which ends when it has been silent for too long.
pub(super) struct Connection {
    stream: TcpStream,
    silent_until: Pin<Box<Sleep>>,
    _place: OwnedSemaphorePermit,
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Poll::Ready(read) = Pin::new(&mut this.stream).poll_read(cx, buf) {
            this.silent_until
                .as_mut()
                .reset(Instant::now() + SILENCE_MAX);
            return Poll::Ready(read);
        }
        ready!(this.silent_until.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
