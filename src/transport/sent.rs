//! What was sent under each transport-wide number, so that feedback about it can be understood.

use crate::units::Time;

/// Packets remembered: more than a second at 10 Mbit/s, where feedback comes each 100 ms.
const LOG_LEN: u64 = 1_024;

/// What kind of packet had a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SentKind {
    /// Sent for the first time.
    Media,
    /// Sent again because it was asked for.
    Resend,
    /// Sent again so that the path is busy, as part of a probe.
    Probe { cluster: u8 },
}

/// What feedback has said of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PacketFate {
    Unknown,
    Arrived,
    Missing,
}

/// One packet as it was sent.
#[derive(Clone, Copy, Debug)]
pub struct SentPacket {
    pub sent_at: Time,
    /// The connection's track.
    pub track: u8,
    /// The RTP sequence number; of a resend that of the original.
    pub seq: u16,
    /// The whole RTP packet.
    pub bytes: u16,
    pub kind: SentKind,
    pub fate: PacketFate,
}

impl SentPacket {
    pub fn new(sent_at: Time, track: u8, seq: u16, bytes: usize, kind: SentKind) -> SentPacket {
        SentPacket {
            sent_at,
            track,
            seq,
            // A datagram has fewer than 2^16.
            bytes: bytes as u16,
            kind,
            fate: PacketFate::Unknown,
        }
    }
}

/// The packets of one connection. Numbers begin with 1, as libwebrtc's do.
pub struct SentLog {
    packets: Box<[SentPacket]>,
    next: u64,
}

impl Default for SentLog {
    fn default() -> SentLog {
        let none = SentPacket::new(Time::ZERO, 0, 0, 0, SentKind::Media);
        SentLog {
            packets: vec![none; LOG_LEN as usize].into_boxed_slice(),
            next: 1,
        }
    }
}

impl SentLog {
    /// The number of the packet that is written next.
    pub fn next(&self) -> u16 {
        self.next as u16
    }

    /// It was sent.
    pub fn push(&mut self, packet: SentPacket) {
        self.packets[(self.next % LOG_LEN) as usize] = packet;
        self.next += 1;
    }

    /// The packet that was sent under a number; `None` where that is too long ago, or yet to come.
    pub fn find(&mut self, number: u16) -> Option<&mut SentPacket> {
        let back = u64::from((self.next as u16).wrapping_sub(number));
        let known = (1..=LOG_LEN).contains(&back) && back < self.next;
        known.then(|| &mut self.packets[((self.next - back) % LOG_LEN) as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_thousand_packets_are_found_by_their_numbers_over_the_wrap() {
        let mut log = SentLog::default();
        assert!(log.find(0).is_none() && log.find(1).is_none());
        for n in 1..=70_000u64 {
            assert_eq!(log.next(), n as u16);
            log.push(SentPacket::new(
                Time::from_micros(n),
                1,
                n as u16 ^ 0x55,
                1_000,
                SentKind::Media,
            ));
        }
        for n in 70_001 - 1_024..=70_000u64 {
            assert_eq!(log.find(n as u16).unwrap().sent_at, Time::from_micros(n));
        }
        assert!(
            log.find(70_001u64 as u16).is_none() && log.find((70_000u64 - 1_024) as u16).is_none()
        );
    }
}
