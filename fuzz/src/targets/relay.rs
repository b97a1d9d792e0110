//! What a TURN server sends on the way that carries media: ChannelData and STUN, in datagrams and
//! in a stream cut anywhere.

use std::io::{ErrorKind, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use throng::net::{self, ReceiveBatch};
use throng::path::{Lane, Path, RelayLink, RelayStream, Unsent, Via};
use tokio::sync::mpsc;

use super::{Script, Target, chunk, ours};

pub const TARGET: Target = Target {
    name: "relay",
    run,
    seeds,
    mutations: 250,
    memory: None,
};

/// Pieces of one script; what waits in the kernel stays small.
const PIECES_MAX: usize = 32;
const PIECE_BYTES_MAX: usize = 4_096;
/// The longest datagram that is taken.
const DATAGRAM_BYTES_MAX: usize = 2_048;
/// What the relay says to whoever keeps the allocation, as far as there is room for it.
const CONTROL_MAX: usize = 4;
const CHANNELS: [u16; 2] = [0x4000, 0x4FFF];
const STUN_HEAD_BYTES: usize = 20;

fn peer(index: usize) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, 1 + index as u8], 7_882))
}

fn relayed() -> SocketAddr {
    SocketAddr::from(([203, 0, 113, 1], 49_152))
}

/// The relay's end.
enum Speaker {
    Datagrams(UdpSocket),
    Stream(TcpStream),
}

impl Speaker {
    /// A stream ends.
    fn hang_up(&mut self) {
        if let Speaker::Stream(stream) = self {
            let _ = stream.shutdown(Shutdown::Write);
        }
    }

    fn say(&mut self, piece: &[u8]) {
        // Our end may have hung up on it.
        let _ = match self {
            Speaker::Datagrams(socket) => socket.send(piece).map(drop),
            Speaker::Stream(stream) => stream.write_all(piece),
        };
    }
}

fn link(by_stream: bool) -> (RelayLink, Speaker) {
    if by_stream {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("an address");
        let ours = TcpStream::connect(address).expect("a listener");
        let theirs = listener.accept().expect("a connection").0;
        theirs.set_nodelay(true).expect("an open connection");
        let stream = RelayStream::new(ours, None, &[]).expect("an open connection");
        return (RelayLink::Stream(Box::new(stream)), Speaker::Stream(theirs));
    }
    let theirs = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    let ours = net::open_relay_socket([127, 0, 0, 1].into(), 1 << 20).expect("a free port");
    ours.connect(theirs.local_addr().expect("an address"))
        .expect("a route");
    theirs
        .connect(ours.local_addr().expect("an address"))
        .expect("a route");
    (RelayLink::Udp(ours), Speaker::Datagrams(theirs))
}

/// What an independent reader finds.
#[derive(Default)]
struct Expected {
    media: Vec<(Vec<u8>, SocketAddr)>,
    control: Vec<Vec<u8>>,
    /// Of a stream: what has not come whole.
    rest: Vec<u8>,
    /// A stream that holds what no relay says.
    is_over: bool,
}

impl Expected {
    fn hear(&mut self, piece: &[u8], by_stream: bool) {
        if !by_stream {
            return self.take(piece);
        }
        self.rest.extend_from_slice(piece);
        while !self.is_over && self.rest.len() >= 4 {
            let len = usize::from(u16::from_be_bytes([self.rest[2], self.rest[3]]));
            let head = if self.rest[0] < 64 {
                STUN_HEAD_BYTES
            } else {
                4
            };
            let whole = head + len;
            if whole > DATAGRAM_BYTES_MAX {
                self.is_over = true;
            } else if self.rest.len() >= whole.next_multiple_of(4) {
                let frame: Vec<u8> = self.rest.drain(..whole.next_multiple_of(4)).collect();
                self.take(&frame[..whole]);
            } else {
                return;
            }
        }
    }

    fn take(&mut self, frame: &[u8]) {
        if frame.len() < 4 || frame.len() > DATAGRAM_BYTES_MAX {
            return;
        }
        if frame[0] < 64 {
            return self.control.push(frame.to_vec());
        }
        let number = u16::from_be_bytes([frame[0], frame[1]]);
        let len = usize::from(u16::from_be_bytes([frame[2], frame[3]]));
        let bound = CHANNELS.iter().position(|bound| *bound == number);
        if let (Some(index), Some(data)) = (bound, frame.get(4..4 + len)) {
            self.media.push((data.to_vec(), peer(index)));
        }
    }
}

fn run(input: &[u8]) {
    let mut script = Script::new(input);
    let by_stream = script.u8() & 1 == 1;
    let (link, mut speaker) = link(by_stream);
    let (sender, mut control) = mpsc::channel(CONTROL_MAX);
    let mut path = Path::of_relay(link, relayed(), sender);
    for (index, number) in CHANNELS.into_iter().enumerate() {
        path.bind_channel(relayed(), peer(index), number);
    }
    let (mut batch, mut expected) = (ReceiveBatch::default(), Expected::default());
    let (mut heard, mut said) = (Vec::new(), Vec::new());
    for _ in 0..PIECES_MAX {
        if script.is_over() {
            break;
        }
        let piece = script.chunk();
        let piece = &piece[..piece.len().min(PIECE_BYTES_MAX)];
        if piece.is_empty() || expected.is_over {
            continue;
        }
        speaker.say(piece);
        expected.hear(piece, by_stream);
        drain(&mut path, &mut batch, &mut heard);
        // Whoever keeps the allocation is slower than the relay at times.
        if script.u8() & 1 == 0 {
            said.extend(std::iter::from_fn(|| control.try_recv().ok()));
        }
        let mut unsent = Unsent::default();
        ours(|| path.send(peer(0), b"hello", 5, &mut true, &mut unsent));
        assert_eq!(unsent.no_room + unsent.mismatched, 0, "{unsent:?}");
    }
    if !expected.is_over {
        speaker.hang_up();
    }
    // Nothing on loopback takes this long, however busy the host is.
    let deadline = Instant::now() + Duration::from_secs(5);
    while !path.is_closed()
        && (by_stream || heard.len() < expected.media.len())
        && Instant::now() < deadline
    {
        std::thread::sleep(Duration::from_millis(1));
        drain(&mut path, &mut batch, &mut heard);
    }
    said.extend(std::iter::from_fn(|| control.try_recv().ok()));
    // What is read of a stream that breaks in the same piece goes with it.
    let is_cut = expected.is_over;
    assert!(heard == expected.media || is_cut && expected.media.starts_with(&heard));
    let mut in_order = expected.control.iter();
    assert!(
        said.iter()
            .all(|message| in_order.any(|sent| sent == message)),
        "what is handed over was said, in its order"
    );
    assert_eq!(by_stream, path.is_closed());
}

/// Takes all that has come; a stream that is over is closed.
fn drain(path: &mut Path, batch: &mut ReceiveBatch, heard: &mut Vec<(Vec<u8>, SocketAddr)>) {
    loop {
        match ours(|| path.receive(Lane::Main, batch)) {
            Ok(count) => {
                for index in 0..count {
                    if let Some((bytes, received)) = batch.datagram(index) {
                        heard.push((bytes.to_vec(), received.from));
                    }
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(_) => {
                let ended = path.remove_ended(Lane::Main);
                assert!(matches!(ended, Some(Via::Relay(_)) | None));
                return;
            }
        }
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let channel_data = |number: u16, data: &[u8], len: u16| {
        let head = [number.to_be_bytes(), len.to_be_bytes()].concat();
        let mut frame = [&head, data].concat();
        frame.resize(frame.len().next_multiple_of(4), 0);
        frame
    };
    let rtp = [&[0x80, 0x6F, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3][..], &[9; 60]].concat();
    let media = channel_data(CHANNELS[0], &rtp, rtp.len() as u16);
    // An answer to a request to refresh: its head, and a lifetime.
    let stun = [
        &[0x01, 0x04, 0, 8, 0x21, 0x12, 0xA4, 0x42][..],
        &[7; 12],
        &[0, 0x0D, 0, 4, 0, 0, 2, 0x58],
    ]
    .concat();
    let of_nobody = channel_data(0x4001, &rtp, rtp.len() as u16);
    let too_long = channel_data(CHANNELS[1], &rtp, 0xFFFF);
    let empty = channel_data(CHANNELS[1], &[], 0);
    let script = |by: u8, pieces: &[&[u8]]| {
        let told = pieces
            .iter()
            .flat_map(|piece| [chunk(piece), vec![0]].concat());
        std::iter::once(by).chain(told).collect::<Vec<u8>>()
    };
    let whole: [&[u8]; 5] = [&media, &stun, &of_nobody, &empty, &media];
    let all = whole.concat();
    vec![
        script(0, &whole),
        script(0, &[&media, &too_long, &media[..7], &stun[..3], &media]),
        script(1, &whole),
        script(1, &[&all[..3], &all[3..70], &all[70..150], &all[150..]]),
        script(1, &[&media, &too_long, &media]),
        script(1, &[&stun, &stun, &stun, &stun, &stun, &stun]),
    ]
}
