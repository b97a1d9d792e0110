//! Our own shard as the stack under test.

use std::net::SocketAddr;
use std::time::Duration;
use throng::transport::rtp::Ssrc;

use throng::codec::{Codec, PayloadTypes};
use throng::engine::shard::Shard;
use throng::engine::{Io, PeerKey, ShardCommand, ShardConfig, ShardEvent, StreamParameters};
use throng::net;
use throng::transport::peer::IceCredentials;
use throng::transport::rtp::{Datagram, classify};
use throng::units::Time;

use super::fixture::{Role, Sealed, Setting, Stack};
use super::origin::{Origin, new_peer, track};
use super::remote::{Side, address};
use super::{SSRC, cpu_clock};
use crate::link::under_test;

const TICK: Duration = Duration::from_millis(1);
/// Number of ticks between two readings of the clock. This makes a dozen packets even with few
/// connections.
const TICKS_AT_ONCE: usize = 16;

pub struct Throng {
    pub shard: Shard,
    pub io: Swallow,
    pub now: Time,
    setting: Setting,
    config: ShardConfig,
    connected: Vec<bool>,
}

impl Stack for Throng {
    const NAME: &'static str = "throng";

    fn new(connections: usize, setting: Setting, config: &ShardConfig) -> Throng {
        Throng {
            shard: Shard::new(config.clone(), connections, Time::ZERO),
            io: Swallow::default(),
            now: Time::ZERO,
            setting,
            config: config.clone(),
            connected: vec![false; connections],
        }
    }

    fn add(&mut self, number: usize, remote: &Side, now: Time) -> Side {
        let key = PeerKey(number);
        let ours = Side {
            address: address(1, number),
            credentials: IceCredentials::random(),
            fingerprint: self.config.identity.fingerprint(),
        };
        self.shard
            .add_peer(key, new_peer(number, &ours, remote), now, &mut self.io);
        if self.setting.role == Role::Receives {
            let stream = StreamParameters {
                payloads: PayloadTypes::of(
                    Codec::default_of(self.setting.kind),
                    Codec::default_of(self.setting.kind).payload_type(),
                ),
                ssrc: Ssrc(SSRC),
                rtx_ssrc: None,
                announced_at: now,
                transport_cc_extension: self.setting.transport_cc_extension(),
                abs_send_time_extension: None,
                nack: true,
            };
            let streams = vec![stream];
            self.shard
                .handle_command(ShardCommand::Subscribe { key, streams }, now, &mut self.io);
        }
        ours
    }

    fn handle_setup(&mut self, key: usize, datagram: &[u8], from: &Side, now: Time) {
        self.shard.handle_setup_datagram(
            PeerKey(key),
            datagram,
            from.address,
            now,
            now,
            &mut self.io,
        );
    }

    fn turn(&mut self, now: Time) {
        self.now = now;
        self.shard.handle_control_timers(now, &mut self.io);
        while let Some((key, event)) = self.shard.poll_event() {
            self.connected[key.0] |= matches!(event, ShardEvent::Connected { .. });
        }
    }

    fn is_connected(&self, key: usize) -> bool {
        self.connected[key]
    }

    fn take_sent(&mut self) -> Vec<(usize, Vec<u8>)> {
        self.io.setup.drain(..).collect()
    }

    /// Handles packets in the worker's order, with the same prefetches.
    fn receive(&mut self, batch: &mut [Sealed], now: Time) {
        for at in 0..batch.len() {
            batch
                .get(at + 3)
                .iter()
                .for_each(|next| self.shard.prefetch(PeerKey(next.key)));
            batch
                .get(at + 2)
                .iter()
                .for_each(|next| self.shard.prefetch_streams(PeerKey(next.key)));
            batch
                .get(at + 1)
                .iter()
                .for_each(|next| self.shard.prefetch_next(PeerKey(next.key)));
            let Sealed { key, bytes } = &mut batch[at];
            match classify(bytes) {
                Datagram::Rtp => self.shard.handle_rtp(PeerKey(*key), bytes, now),
                other => panic!("{other:?}"),
            }
        }
    }

    fn received(&self) -> u64 {
        let record = self.shard.record();
        record.audio.packets_received + record.video.packets_received
    }

    fn rtcp_sent(&self) -> u64 {
        self.io.rtcp
    }

    /// Publishers start spread over the milliseconds of a frame interval, as in a plan.
    fn start_sending(&mut self, now: Time) {
        self.now = now;
        for key in 0..self.connected.len() {
            let interval = super::origin::source(self.setting.kind)
                .frame_interval()
                .as_millis() as usize;
            let first_frame_at = now + TICK * (key % interval.max(1)) as u32;
            let tracks = vec![track(self.setting.kind, None, key as u32, first_frame_at)];
            let key = PeerKey(key);
            self.shard
                .handle_command(ShardCommand::Publish { key, tracks }, now, &mut self.io);
        }
    }

    fn send(&mut self, _: &mut Origin) -> Duration {
        let started = cpu_clock();
        under_test(true, || {
            for _ in 0..TICKS_AT_ONCE {
                self.now += TICK;
                self.shard.handle_media_timers(self.now, &mut self.io);
            }
        });
        cpu_clock() - started
    }

    fn sent(&self) -> u64 {
        self.io.media
    }
}

/// [`Io`] that sends nothing. It counts media and RTCP, and keeps set-up datagrams.
pub struct Swallow {
    buffer: Vec<u8>,
    setup: Vec<(usize, Vec<u8>)>,
    pub media: u64,
    pub media_bytes: u64,
    pub rtcp: u64,
}

impl Default for Swallow {
    fn default() -> Swallow {
        Swallow {
            buffer: vec![0; net::SEND_BYTES_MAX],
            setup: Vec::new(),
            media: 0,
            media_bytes: 0,
            rtcp: 0,
        }
    }
}

impl Io for Swallow {
    fn lend(&mut self) -> &mut [u8] {
        &mut self.buffer
    }

    fn send(&mut self, key: PeerKey, _to: SocketAddr, len: usize, segment: usize) {
        match classify(&self.buffer[..len]) {
            Datagram::Rtp => {
                self.media += len.div_ceil(segment) as u64;
                self.media_bytes += len as u64;
            }
            Datagram::Stun | Datagram::Dtls => under_test(false, || {
                self.setup.push((key.0, self.buffer[..len].to_vec()))
            }),
            Datagram::Rtcp => self.rtcp += 1,
            Datagram::Unknown => {}
        }
    }

    fn nominate(&mut self, _key: PeerKey, _to: throng::path::FarEnd) {}
}
