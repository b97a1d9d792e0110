//! Log of the packets sent under each transport-wide number, needed to interpret the feedback about
//! them.

use crate::units::Time;

/// Number of packets remembered: more than a second at 10 Mbit/s, where feedback comes every 100
/// ms.
const LOG_LEN: u64 = 1_024;

/// Kind of a sent packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SentKind {
    /// Sent for the first time.
    Media,
    /// Retransmitted on request.
    Resend,
    /// Sent again as filler, as part of a probe.
    Probe { cluster: u8 },
}

/// Fate of a packet, according to feedback.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PacketFate {
    Unknown,
    Arrived,
    Missing,
}

/// One sent packet.
#[derive(Clone, Copy, Debug)]
pub struct SentPacket {
    pub sent_at: Time,
    /// Track of the connection.
    pub track: u8,
    /// RTP sequence number; for a retransmission that of the original.
    pub seq: u16,
    /// Size of the whole RTP packet.
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
            // A datagram has fewer than 2^16 bytes.
            bytes: bytes as u16,
            kind,
            fate: PacketFate::Unknown,
        }
    }
}

/// Sent packets of one connection. Numbers begin with 1, as in libwebrtc.
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
    /// Returns the number of the next packet.
    pub fn next(&self) -> u16 {
        self.next as u16
    }

    /// Records a sent packet.
    pub fn push(&mut self, packet: SentPacket) {
        self.packets[(self.next % LOG_LEN) as usize] = packet;
        self.next += 1;
    }

    /// Returns the packet sent under a number; `None` if that is too long ago, or not sent yet.
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
