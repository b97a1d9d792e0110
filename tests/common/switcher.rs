//! A simulated SFU between the three layers of a publisher and one subscriber, in virtual time. It
//! logs exactly what it forwarded, and this log is the ground truth.

use std::net::SocketAddr;
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use throng::codec::vp8::Vp8Descriptor;
use throng::codec::{Codec, PayloadTypes};
use throng::engine::Roster;
use throng::engine::publisher::{Pacing, SendParameters, SendTrack, TrackWire};
use throng::engine::subscriber::{EVENTS_MAX, RecvStream, StreamContext};
use throng::engine::{PeerKey, StreamParameters, VIDEO_TRACK};
use throng::measure::Record;
use throng::media::assemble::FrameEvent;
use throng::media::identity::{FrameIdentity, Origin};
use throng::transport::rtp::Header;
use throng::transport::sequence::{Seq, SeqExtender};
use throng::transport::srtp::{DtlsRole, Opener, Profile, Sealer, session};
use throng::units::{Epoch, Time};

use super::link::{Outlet, Random, under_test};
use super::pair::{layer_ssrc, layers};

const TICK: Duration = Duration::from_millis(1);
const RUN: u32 = 77;
const DOWNLINK_SSRC: u32 = 0xD0_0001;
const NOWHERE: &str = "192.0.2.1:1";

/// Behaviour of the SFU towards its subscriber.
#[derive(Clone, Copy, Default)]
pub struct Downlink {
    pub loss: f64,
    /// Time for which it forwards nothing before it begins to switch.
    pub dark: Duration,
    /// Whether it never switches.
    pub stuck: bool,
}

/// Counts of the SFU's actions. `switches` and `plis` count events, the others frames.
#[derive(Clone, Copy, Debug, Default)]
pub struct Log {
    pub forwarded: u64,
    /// Number of forwarded frames that arrived with every packet.
    pub arrived: u64,
    /// Number of frames of the previous layer that fell due between its last forwarded frame and
    /// the first of the new layer.
    pub withheld: u64,
    pub switches: u64,
    pub plis: u64,
}

/// Returns the two ends of one direction of an SRTP session.
fn direction(material: u8) -> (Sealer, Opener) {
    let profile = Profile::AeadAes128Gcm;
    let material = vec![material; profile.keying_material_len()];
    let (sealer, _) = session(profile, &material, DtlsRole::Client).unwrap();
    let (_, opener) = session(profile, &material, DtlsRole::Server).unwrap();
    (sealer, opener)
}

pub struct World {
    downlink: Downlink,
    now: Time,
    epoch: Epoch,
    roster: Roster,
    tracks: Vec<SendTrack>,
    outlet: Outlet,
    uplink: (Sealer, Opener),
    sent: Record,
    /// Intended moment of every frame that was sent, by layer.
    frames: [Vec<u64>; 3],
    extenders: [SeqExtender; 3],
    current: Option<usize>,
    target: Option<usize>,
    /// Earliest time of the switch.
    dark_until: Time,
    /// Layer and intended moment of the last forwarded frame.
    last: Option<(usize, u64)>,
    next_index: u64,
    /// Whether a packet of the current frame was lost.
    damaged: bool,
    random: Random,
    to_subscriber: (Sealer, Opener),
    stream: RecvStream,
    record: Record,
    events: Vec<FrameEvent>,
    log: Log,
}

impl World {
    /// Returns a world whose publisher begins at once. The SFU forwards the lowest layer until it
    /// is asked for another.
    pub fn new(seed: u64, downlink: Downlink) -> World {
        let now = Time::from_millis(1_000);
        let roster = Roster::new(RUN, [0].into_iter());
        let tracks = layers().into_iter().zip(0..).map(|(source, layer)| {
            let identity = FrameIdentity {
                run: RUN,
                origin: Origin {
                    publisher: 0,
                    track: VIDEO_TRACK,
                },
                layer,
                ..FrameIdentity::default()
            };
            roster.set_published(&identity, now, source.frame_interval());
            let parameters = SendParameters {
                source,
                ssrc: layer_ssrc(layer),
                rtx_ssrc: None,
                payload_type: 96,
                rtx_payload_type: None,
                redundancy: None,
                transport_cc_extension: None,
                audio_level_extension: None,
                simulcast: None,
                talk: None,
                pacing: Pacing::Burst,
                identity,
                seed: seed + u64::from(layer),
                first_frame_at: now,
            };
            SendTrack::new(parameters).unwrap()
        });
        let tracks = tracks.collect();
        World {
            downlink,
            now,
            epoch: Epoch::read(),
            roster,
            tracks,
            outlet: Outlet::new(vec![NOWHERE.parse().unwrap()]),
            uplink: direction(1),
            sent: Record::default(),
            frames: Default::default(),
            extenders: Default::default(),
            current: None,
            target: Some(0),
            dark_until: now,
            last: None,
            next_index: 1_000,
            damaged: false,
            random: Random(seed),
            to_subscriber: direction(2),
            stream: RecvStream::new(StreamParameters {
                payloads: PayloadTypes::of(Codec::Vp8, 96),
                ssrc: Ssrc(DOWNLINK_SSRC),
                rtx_ssrc: None,
                nack: true,
                transport_cc_extension: None,
                abs_send_time_extension: None,
                announced_at: now,
            }),
            record: Record::default(),
            events: Vec::with_capacity(EVENTS_MAX),
            log: Log::default(),
        }
    }

    /// The subscriber requests a layer, and the SFU receives the request.
    pub fn ask(&mut self, layer: usize) {
        under_test(true, || {
            self.stream.watch(Some(layer as u8), self.now, &self.roster)
        });
        if self.downlink.stuck || self.current == Some(layer) {
            return;
        }
        self.target = Some(layer);
        self.dark_until = self.now + self.downlink.dark;
    }

    pub fn ask_for_nothing(&mut self) {
        self.stream.watch(None, self.now, &self.roster);
        (self.current, self.target, self.last) = (None, None, None);
    }

    pub fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.tick();
        }
    }

    /// Settles the subscriber's stream, and returns the SFU's log and the subscriber's record.
    pub fn finish(mut self) -> (Log, Record) {
        self.stream.settle(&self.roster, &mut self.record, self.now);
        self.stream.finish(&self.roster, &mut self.record);
        (self.log, self.record)
    }

    fn tick(&mut self) {
        let to: SocketAddr = NOWHERE.parse().unwrap();
        if let Some(target) = self
            .target
            .filter(|target| self.current != Some(*target) && self.now >= self.dark_until)
        {
            // The publisher accepts a request at most once in 300 ms, so it is repeated until the
            // key frame comes.
            self.tracks[target].request_key_frame(self.now);
        }
        for track in &mut self.tracks {
            let mut wire = TrackWire {
                io: &mut self.outlet,
                key: PeerKey(0),
                to,
                sealer: &self.uplink.0,
                epoch: self.epoch,
                roster: &self.roster,
                media: &mut self.sent.video,
                wire_bytes_sent: &mut self.sent.session.wire_bytes_sent,
                packets_processed: &mut self.sent.engine.packets_processed,
                now: self.now,
                sent: None,
                track: 0,
            };
            if track.next_at() <= self.now {
                track.handle_timeout(self.now, &mut wire);
            }
        }
        for datagram in std::mem::take(&mut self.outlet.sent) {
            self.receive(datagram.bytes);
        }
        if self.stream.poll_pli(self.now) {
            self.log.plis += 1;
            if let Some(current) = self.current {
                self.tracks[current].request_key_frame(self.now);
            }
        }
        self.now += TICK;
    }

    fn receive(&mut self, mut bytes: Vec<u8>) {
        let header = Header::parse(&bytes).unwrap();
        let layer = (0..3u8)
            .position(|layer| layer_ssrc(layer) == header.ssrc)
            .unwrap();
        let index = self.extenders[layer].guess(header.seq.0);
        let len = self
            .uplink
            .1
            .open_rtp(&mut bytes, header.header_len, index)
            .unwrap();
        self.extenders[layer].commit(index);
        let payload = header.payload(&bytes[..len]).unwrap();
        let (descriptor, at) = Vp8Descriptor::parse(payload).unwrap();
        let identity = header
            .marker
            .then(|| FrameIdentity::parse_video(payload).unwrap());
        self.frames[layer].extend(identity.map(|identity| identity.intended_unix_us));
        let may_switch = self.target == Some(layer)
            && self.current != self.target
            && self.now >= self.dark_until;
        if may_switch && descriptor.starts_key_frame(&payload[at..]) {
            self.log.switches += u64::from(self.current.is_some());
            self.current = self.target;
            self.damaged = false;
        }
        let is_dark = self.target != self.current && self.downlink.dark > Duration::ZERO;
        if self.current == Some(layer) && !is_dark {
            self.forward(bytes, len, &header, layer, identity);
        }
    }

    fn forward(
        &mut self,
        mut bytes: Vec<u8>,
        len: usize,
        header: &Header,
        layer: usize,
        identity: Option<FrameIdentity>,
    ) {
        let index = self.next_index;
        self.next_index += 1;
        let lost = self.random.chance(self.downlink.loss);
        self.damaged |= lost;
        if let Some(identity) = identity {
            self.note(layer, identity.intended_unix_us);
            self.log.arrived += u64::from(!std::mem::take(&mut self.damaged));
        }
        if lost {
            return;
        }
        bytes[2..4].copy_from_slice(&Seq(index as u16).0.to_be_bytes());
        bytes[8..12].copy_from_slice(&DOWNLINK_SSRC.to_be_bytes());
        bytes.resize(len + 64, 0);
        let sealed = self
            .to_subscriber
            .0
            .seal_rtp(&mut bytes, header.header_len, len, index)
            .unwrap();
        let header = Header::parse(&bytes[..sealed]).unwrap();
        let mut context = StreamContext {
            roster: &self.roster,
            epoch: self.epoch,
            record: &mut self.record,
            tap: None,
            room: 0,
            intended_at: Time::ZERO,
            events: &mut self.events,
        };
        let (stream, opener, now) = (&mut self.stream, &self.to_subscriber.1, self.now);
        let taken = under_test(true, || {
            stream.handle_rtp(
                &mut bytes[..sealed],
                &header,
                false,
                opener,
                now,
                &mut context,
            )
        });
        taken.unwrap();
    }

    /// Logs a forwarded frame. After a switch it counts the withheld frames: those of the previous
    /// layer that the subscriber should have received in between.
    fn note(&mut self, layer: usize, intended: u64) {
        self.log.forwarded += 1;
        if let Some((before, last)) = self.last.filter(|(before, _)| *before != layer) {
            let withheld = self.frames[before]
                .iter()
                .filter(|at| (last + 1..intended).contains(*at));
            self.log.withheld += withheld.count() as u64;
        }
        self.last = Some((layer, intended));
    }
}
