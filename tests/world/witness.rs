//! A receiver of the test's own, independent of the engine. It keeps every packet that it opens,
//! asks for what is missing, and shows in the end what a decoder would have made of it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use throng::codec::red::RedPayload;
use throng::codec::vp8::Vp8Descriptor;
use throng::codec::{Codec, PayloadTypes};
use throng::measure::Kind;
use throng::transport::peer::{IceCredentials, Identity, Peer, PeerEvent, PeerParameters};
use throng::transport::rtcp::RtcpWriter;
use throng::transport::rtp::{Datagram as Class, Header, classify, split_rtx};
use throng::transport::sdp::RemoteTrack;
use throng::transport::sequence::{Seq, SeqExtender};
use throng::units::{Epoch, Time};

use crate::client::Half;
use crate::common::link::Datagram;

/// Time before a missing packet is requested, because a packet that only comes out of order is not
/// requested.
const PATIENCE: Duration = Duration::from_millis(20);
/// Time between two requests for a packet. The router does not answer a second request sooner.
const ASK_AGAIN: Duration = Duration::from_millis(130);
const TRIES_MAX: u32 = 8;
const KEY_FRAME_RETRY: Duration = Duration::from_millis(500);

/// What became of the RTP datagrams that reached a witness. Each datagram is counted once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fates {
    pub taken: u64,
    pub repeated: u64,
    /// Datagrams of streams that were never announced.
    pub unread: u64,
    pub broken: u64,
}

/// Defects that a stream may have although every packet of it is authentic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tampering {
    /// One byte of one frame is different.
    Byte,
    /// A frame is left out without a hole in the sequence numbers.
    Frame,
    /// From one frame on, timestamps are a second ahead.
    Time,
    /// From one frame on, picture ids are one ahead.
    Picture,
}

/// An opened packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    pub rtp_time: u32,
    pub marker: bool,
    pub payload: Vec<u8>,
}

/// A stream that a witness gets.
pub struct Stream {
    pub kind: Kind,
    payloads: PayloadTypes,
    pub ssrc: Ssrc,
    pub track_sid: String,
    pub packets: BTreeMap<u64, Kept>,
    pub ended: bool,
    /// Number of contradictions: two packets with one number that differ, redundancy that differs
    /// from the packet it repeats, and packets that cannot be read.
    pub contradictions: u64,
    media: SeqExtender,
    rtx: SeqExtender,
    seen: BTreeSet<(bool, u64)>,
    missing: BTreeMap<u64, Missing>,
    /// Number above which a key frame must begin.
    key_frame_above: Option<u64>,
    key_frame_asked_at: Option<Time>,
}

struct Missing {
    noticed_at: Time,
    asked_at: Option<Time>,
    tries: u32,
}

struct Connection {
    peer: Peer,
    address: SocketAddr,
    connected: bool,
    streams: BTreeMap<Ssrc, Stream>,
    /// Streams that ended.
    former: Vec<Stream>,
    /// SSRC of the media for each retransmission SSRC.
    rtx: BTreeMap<Ssrc, Ssrc>,
    /// Packets that came before their SSRC was announced, or before the keys.
    early: Vec<(Vec<u8>, Time)>,
}

#[derive(Default)]
pub struct Witness {
    connections: BTreeMap<Half, Connection>,
    fates: Fates,
    pub failed: bool,
}

impl Witness {
    pub fn add_peer(
        &mut self,
        half: Half,
        parameters: &PeerParameters,
        identity: &Identity,
        epoch: Epoch,
        now: Time,
    ) {
        let connection = Connection {
            peer: Peer::new(identity, parameters, epoch, now),
            address: parameters.local_address,
            connected: false,
            streams: BTreeMap::new(),
            former: Vec::new(),
            rtx: BTreeMap::new(),
            early: Vec::new(),
        };
        self.connections.insert(half, connection);
    }

    pub fn restart_ice(
        &mut self,
        half: Half,
        local: &IceCredentials,
        remote: &IceCredentials,
        candidates: &[SocketAddr],
        now: Time,
    ) {
        let Some(connection) = self.connections.get_mut(&half) else {
            return;
        };
        connection.peer.restart_ice(local, remote, now);
        candidates
            .iter()
            .for_each(|address| connection.peer.add_remote_candidate(*address, now));
    }

    pub fn handle_streams(&mut self, half: Half, removed: &[RemoteTrack], added: &[RemoteTrack]) {
        let Some(connection) = self.connections.get_mut(&half) else {
            return;
        };
        for track in removed {
            connection.end(track.ssrc);
        }
        for track in added {
            connection
                .rtx
                .extend(track.rtx_ssrc.map(|rtx| (rtx, track.ssrc)));
            connection
                .streams
                .entry(track.ssrc)
                .or_insert_with(|| Stream::new(track));
        }
        connection.take_early(&mut self.fates);
    }

    pub fn is_connected(&self, half: Half) -> bool {
        self.connections
            .get(&half)
            .is_some_and(|connection| connection.connected)
    }

    pub fn fates(&self) -> Fates {
        let early = self
            .connections
            .values()
            .map(|connection| connection.early.len() as u64);
        Fates {
            unread: early.sum(),
            ..self.fates
        }
    }

    /// Spoils the video that it has kept. Returns the number of streams that it has spoiled.
    pub fn tamper(&mut self, tampering: Tampering) -> u64 {
        let connections = self.connections.values_mut();
        let streams = connections.flat_map(|connection| {
            connection
                .former
                .iter_mut()
                .chain(connection.streams.values_mut())
        });
        streams
            .filter_map(|stream| stream.tamper(tampering))
            .count() as u64
    }

    /// Returns every stream that there was.
    pub fn streams(&self) -> impl Iterator<Item = &Stream> {
        let connections = self.connections.values();
        connections
            .flat_map(|connection| connection.former.iter().chain(connection.streams.values()))
    }

    pub fn handle_datagram(
        &mut self,
        half: Half,
        datagram: &mut Datagram,
        now: Time,
        out: &mut Vec<Datagram>,
    ) {
        let Some(connection) = self.connections.get_mut(&half) else {
            return;
        };
        match classify(&datagram.bytes) {
            Class::Rtp => connection.handle_rtp(&mut datagram.bytes, now, &mut self.fates),
            // A witness does nothing with reports.
            Class::Rtcp => {}
            _ => {
                connection
                    .peer
                    .handle_setup_datagram(&datagram.bytes, datagram.from, now);
                self.failed |= connection.advance(now, out);
                connection.take_early(&mut self.fates);
            }
        }
    }

    /// Does what is due, and puts the datagrams to send into `out`.
    pub fn handle_time(&mut self, now: Time, out: &mut Vec<Datagram>) {
        for connection in self.connections.values_mut() {
            if connection.peer.next_timeout() <= now {
                self.failed |= connection.advance(now, out);
            }
            connection.ask(now, out);
        }
    }
}

impl Connection {
    fn end(&mut self, ssrc: Ssrc) {
        if let Some(mut stream) = self.streams.remove(&ssrc) {
            stream.ended = true;
            self.former.push(stream);
            self.rtx.retain(|_, media| *media != ssrc);
        }
    }

    /// Returns whether the connection has failed.
    fn advance(&mut self, now: Time, out: &mut Vec<Datagram>) -> bool {
        let from = self.address;
        let (mut connected, mut failed) = (false, false);
        self.peer.handle_timeout(now);
        let send = |bytes: &[u8], to| {
            out.push(Datagram {
                from,
                to,
                bytes: bytes.to_vec(),
            });
        };
        self.peer.poll(now, send, |event| match event {
            PeerEvent::Nominated(_) => {}
            PeerEvent::Connected => connected = true,
            PeerEvent::Failed(_) => failed = true,
        });
        self.connected |= connected;
        failed
    }

    fn take_early(&mut self, fates: &mut Fates) {
        for (mut bytes, arrival) in std::mem::take(&mut self.early) {
            self.handle_rtp(&mut bytes, arrival, fates);
        }
    }

    fn handle_rtp(&mut self, bytes: &mut [u8], now: Time, fates: &mut Fates) {
        let Some(header) = Header::parse(bytes) else {
            fates.broken += 1;
            return;
        };
        let media = self.rtx.get(&header.ssrc).copied();
        let stream = self.streams.get_mut(&media.unwrap_or(header.ssrc));
        let (Some(stream), Some(opener)) = (stream, self.peer.opener()) else {
            self.early.push((bytes.to_vec(), now));
            return;
        };
        let is_rtx = media.is_some();
        let extender = if is_rtx {
            &mut stream.rtx
        } else {
            &mut stream.media
        };
        let index = extender.guess(header.seq.0);
        let Ok(len) = opener.open_rtp(bytes, header.header_len, index) else {
            fates.broken += 1;
            return;
        };
        extender.commit(index);
        // A link may repeat a datagram. A retransmission without RTX is the same datagram again,
        // too.
        if !stream.seen.insert((is_rtx, index)) {
            fates.repeated += 1;
            return;
        }
        fates.taken += 1;
        let Some(payload) = header.payload(&bytes[..len]) else {
            stream.contradictions += 1;
            return;
        };
        let (number, payload) = match (is_rtx, split_rtx(payload)) {
            (false, _) => (index, payload),
            (true, Some((original, payload))) => (stream.media.guess(original.0), payload),
            (true, None) => return,
        };
        let codec = stream.payloads.codec_of(header.payload_type);
        let payload = if codec == Codec::Red && !payload.is_empty() {
            let Some(payload) = stream.primary(number, header.rtp_time, payload) else {
                stream.contradictions += 1;
                return;
            };
            payload
        } else {
            payload
        };
        let kept = Kept {
            rtp_time: header.rtp_time,
            marker: header.marker,
            payload: payload.to_vec(),
        };
        stream.keep(number, kept, now);
    }

    fn ask(&mut self, now: Time, out: &mut Vec<Datagram>) {
        let (Some(to), from) = (self.peer.remote(), self.address) else {
            return;
        };
        for stream in self.streams.values_mut() {
            let seqs = stream.poll_missing(now);
            let wants_key_frame = stream.poll_key_frame(now);
            if seqs.is_empty() && !wants_key_frame {
                continue;
            }
            let Some(sealer) = self.peer.sealer_mut() else {
                return;
            };
            let mut buffer = vec![0; 1_400];
            let mut writer = RtcpWriter::new(&mut buffer[..1_200]);
            if !seqs.is_empty() {
                writer.nack(Ssrc(1), stream.ssrc, seqs).unwrap();
            }
            if wants_key_frame {
                writer.pli(Ssrc(1), stream.ssrc).unwrap();
            }
            let len = writer.len();
            let sealed = sealer.seal_rtcp(&mut buffer, len).unwrap();
            buffer.truncate(sealed);
            out.push(Datagram {
                from,
                to,
                bytes: buffer,
            });
        }
    }
}

impl Stream {
    fn new(track: &RemoteTrack) -> Stream {
        Stream {
            kind: track.kind(),
            payloads: track.payloads,
            ssrc: track.ssrc,
            track_sid: track.track_id.to_string(),
            packets: BTreeMap::new(),
            ended: false,
            contradictions: 0,
            media: SeqExtender::default(),
            rtx: SeqExtender::default(),
            seen: BTreeSet::new(),
            missing: BTreeMap::new(),
            key_frame_above: None,
            key_frame_asked_at: None,
        }
    }

    /// Returns the Opus packet of a RED payload. Its redundancy must repeat the packets before it,
    /// under the payload type that was agreed on.
    fn primary<'a>(&mut self, number: u64, rtp_time: u32, payload: &'a [u8]) -> Option<&'a [u8]> {
        let red = RedPayload::parse(payload)?;
        let is_opus = |payload_type| self.payloads.wrapped == Some(payload_type);
        for block in red.redundant() {
            let earlier = number
                .checked_sub(block.distance.into())
                .and_then(|number| self.packets.get(&number));
            // An earlier packet that was withheld has no number of its own, so another one may be
            // in its place.
            let is_same = earlier.is_none_or(|earlier| {
                earlier.payload == block.payload
                    || earlier.rtp_time != rtp_time.wrapping_sub(block.rtp_offset)
            });
            self.contradictions += u64::from(!is_same || !is_opus(block.payload_type));
        }
        is_opus(red.payload_type).then_some(red.primary)
    }

    fn keep(&mut self, number: u64, kept: Kept, now: Time) {
        self.missing.remove(&number);
        if let Some((highest, _)) = self.packets.last_key_value() {
            for gap in highest + 1..number {
                let missing = Missing {
                    noticed_at: now,
                    asked_at: None,
                    tries: 0,
                };
                self.missing.insert(gap, missing);
            }
        }
        if starts_key_frame(&kept.payload)
            && self.kind == Kind::Video
            && self.key_frame_above.is_some_and(|above| number > above)
        {
            self.key_frame_above = None;
        }
        // One outgoing number stands for one packet for ever: a retransmission equals the original.
        match self.packets.get(&number) {
            Some(known) => self.contradictions += u64::from(*known != kept),
            None => {
                self.packets.insert(number, kept);
            }
        }
    }

    /// Spoils the stream from the third frame on that is no key frame, so that the reader has
    /// earlier frames to go on from.
    fn tamper(&mut self, tampering: Tampering) -> Option<()> {
        let starts = |kept: &Kept| {
            Vp8Descriptor::parse(&kept.payload)
                .is_some_and(|(descriptor, _)| descriptor.starts_frame())
        };
        let inter_frames = self
            .packets
            .iter()
            .filter(|(_, kept)| starts(kept) && !starts_key_frame(&kept.payload));
        let (from, rtp_time) = inter_frames
            .map(|(number, kept)| (*number, kept.rtp_time))
            .nth(2)?;
        let later = self.packets.split_off(&from);
        let in_frame = later
            .values()
            .take_while(|kept| kept.rtp_time == rtp_time)
            .count() as u64;
        for (number, mut kept) in later {
            match tampering {
                Tampering::Byte if number == from => *kept.payload.get_mut(20)? ^= 1,
                Tampering::Frame if kept.rtp_time == rtp_time => continue,
                Tampering::Time => kept.rtp_time = kept.rtp_time.wrapping_add(90_000),
                Tampering::Picture => kept.payload[3] = kept.payload[3].wrapping_add(1),
                Tampering::Byte | Tampering::Frame => {}
            }
            let number = if tampering == Tampering::Frame {
                number - in_frame
            } else {
                number
            };
            self.packets.insert(number, kept);
        }
        Some(())
    }

    fn poll_missing(&mut self, now: Time) -> Vec<Seq> {
        let mut due = Vec::new();
        let mut given_up = None;
        self.missing.retain(|number, missing| {
            let waits = missing
                .asked_at
                .map_or(missing.noticed_at + PATIENCE, |at| at + ASK_AGAIN);
            if now < waits {
                return true;
            }
            if missing.tries == TRIES_MAX {
                given_up = Some(*number);
                return false;
            }
            if due.len() < 64 {
                missing.tries += 1;
                missing.asked_at = Some(now);
                due.push(Seq(*number as u16));
            }
            true
        });
        if self.kind == Kind::Video {
            self.key_frame_above = self.key_frame_above.max(given_up);
        }
        due
    }

    fn poll_key_frame(&mut self, now: Time) -> bool {
        let due = self
            .key_frame_asked_at
            .is_none_or(|at| at + KEY_FRAME_RETRY <= now);
        let asks = self.key_frame_above.is_some() && due;
        if asks {
            self.key_frame_asked_at = Some(now);
        }
        asks
    }
}

fn starts_key_frame(payload: &[u8]) -> bool {
    Vp8Descriptor::parse(payload).is_some_and(|(descriptor, len)| {
        payload.len() > len && descriptor.starts_key_frame(&payload[len..])
    })
}
