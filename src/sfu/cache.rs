//! The latest packets of one published encoding, decrypted. Packets for subscribers are written
//! from here, and so are retransmissions.
//!
//! All memory is allocated once. Payloads lie one after the other in a ring of bytes. A packet is
//! found by its number.

use crate::codec::vp8::Vp8Descriptor;
use crate::units::Time;

/// Content of a packet, beyond its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PacketContent {
    Audio {
        /// Value of the RFC 6464 extension, V bit included.
        level: Option<u8>,
        /// Offset of the Opus packet, after RED's headers and redundant blocks. 0 without RED.
        primary_at: u16,
    },
    Vp8 {
        /// Payload descriptor. Its picture id, if it has one, is unwrapped to 15 bits.
        descriptor: Vp8Descriptor,
        /// Length of the descriptor at the front of the payload, in bytes.
        descriptor_len: u8,
        starts_key_frame: bool,
    },
    /// Nothing to forward: padding only, or a payload type that was not agreed on.
    Empty,
}

/// One packet in the cache.
#[derive(Clone, Copy, Debug)]
pub struct CacheEntry {
    /// Unwrapped sequence number; [`u64::MAX`] if the entry is vacant.
    pub ext: u64,
    pub arrival: Time,
    pub rtp_time: u32,
    pub marker: bool,
    pub content: PacketContent,
    len: u16,
    /// Number of bytes written to the ring before this packet's own.
    position: u64,
}

const VACANT: CacheEntry = CacheEntry {
    ext: u64::MAX,
    arrival: Time::ZERO,
    rtp_time: 0,
    marker: false,
    content: PacketContent::Empty,
    len: 0,
    position: 0,
};

/// A packet to insert.
#[derive(Clone, Copy, Debug)]
pub struct CachedPacket<'a> {
    pub ext: u64,
    pub arrival: Time,
    pub rtp_time: u32,
    pub marker: bool,
    pub content: PacketContent,
    pub payload: &'a [u8],
}

pub struct Cache {
    entries: Box<[CacheEntry]>,
    bytes: Box<[u8]>,
    /// Bytes written so far, including those skipped at the end of the ring.
    written: u64,
}

impl Cache {
    /// Makes a cache for a number of packets, and a number of bytes of their payloads.
    pub fn new(packets: usize, bytes: usize) -> Cache {
        assert!(packets > 0 && bytes > 0, "a cache holds something");
        Cache {
            entries: vec![VACANT; packets].into_boxed_slice(),
            bytes: vec![0; bytes].into_boxed_slice(),
            written: 0,
        }
    }

    /// Stores a packet in place of the oldest. Returns false if the packet is older than all that
    /// are kept, or longer than the cache.
    pub fn insert(&mut self, packet: &CachedPacket<'_>) -> bool {
        let place = self.place(packet.ext);
        let older = self.entries[place].ext;
        let Some(len) = u16::try_from(packet.payload.len())
            .ok()
            .filter(|len| usize::from(*len) <= self.bytes.len())
        else {
            return false;
        };
        if older != u64::MAX && older >= packet.ext {
            return false;
        }
        let room = self.bytes.len() as u64;
        let left = room - self.written % room;
        if left < u64::from(len) {
            self.written += left;
        }
        let start = (self.written % room) as usize;
        self.bytes[start..start + usize::from(len)].copy_from_slice(packet.payload);
        self.entries[place] = CacheEntry {
            ext: packet.ext,
            arrival: packet.arrival,
            rtp_time: packet.rtp_time,
            marker: packet.marker,
            content: packet.content,
            len,
            position: self.written,
        };
        self.written += u64::from(len);
        true
    }

    /// Finds a packet by its unwrapped sequence number, with its payload.
    pub fn find(&self, ext: u64) -> Option<(&CacheEntry, &[u8])> {
        let entry = &self.entries[self.place(ext)];
        let room = self.bytes.len() as u64;
        if entry.ext != ext || self.written - entry.position > room {
            return None;
        }
        let start = (entry.position % room) as usize;
        Some((entry, &self.bytes[start..start + usize::from(entry.len)]))
    }

    fn place(&self, ext: u64) -> usize {
        (ext % self.entries.len() as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seeded::Seeded;

    fn packet(ext: u64, payload: &[u8]) -> CachedPacket<'_> {
        CachedPacket {
            ext,
            arrival: Time::from_millis(ext),
            rtp_time: ext as u32,
            marker: ext.is_multiple_of(2),
            content: PacketContent::Audio {
                level: Some(ext as u8),
                primary_at: 0,
            },
            payload,
        }
    }

    #[test]
    fn what_is_found_is_what_was_put_in_and_the_latest_are_always_found() {
        let (mut cache, mut random) = (Cache::new(64, 70_000), Seeded::new(1));
        let payload_of = |ext: u64| vec![ext as u8; (ext * 7_919 % 1_300) as usize];
        let mut newest = 0;
        let mut known = std::collections::BTreeSet::new();
        for _ in 0..20_000 {
            // Mostly the next number, sometimes one after a gap, sometimes a late one.
            let ext = match random.below(10) {
                0 => newest + 1 + random.below(5),
                1 => newest.saturating_sub(random.below(100)),
                _ => newest + 1,
            };
            let payload = payload_of(ext);
            let taken = !known.contains(&ext) && cache.insert(&packet(ext, &payload));
            assert!(
                taken || known.contains(&ext) || ext + 64 <= newest,
                "{ext} {newest}"
            );
            if taken {
                known.insert(ext);
                newest = newest.max(ext);
                assert_eq!(cache.find(ext).unwrap().1, payload);
            }
            for back in 0..80u64 {
                let Some(ext) = newest.checked_sub(back) else {
                    break;
                };
                match cache.find(ext) {
                    Some((entry, found)) => {
                        assert!(known.contains(&ext));
                        assert_eq!((found, entry.rtp_time), (&payload_of(ext)[..], ext as u32));
                    }
                    None => assert!(
                        !known.contains(&ext) || back > 30,
                        "{ext} of {newest} is gone"
                    ),
                }
            }
        }
    }
}
