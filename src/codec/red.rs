//! Redundant audio (RFC 2198): the payload repeats earlier packets beside its own.
//!
//! A payload is a sequence of headers, then a sequence of blocks. The last block is the *primary*:
//! what the packet would hold without redundancy. The blocks before it are older packets, oldest
//! first.

/// Maximum number of redundant blocks that our publishers write. libwebrtc writes one by default;
/// LiveKit's server writes two when it converts plain Opus to RED.
pub const DISTANCE_MAX: usize = 2;

/// Maximum number of blocks in a payload. libwebrtc splits a payload into no more.
const BLOCKS_MAX: usize = 32;

/// Size of the header of a redundant block: F bit, payload type, 14 bits of timestamp offset, 10
/// bits of length.
const HEADER_LEN: usize = 4;
/// Size of the header of the primary: F bit (clear) and payload type.
const PRIMARY_HEADER_LEN: usize = 1;
const FOLLOWS: u8 = 0x80;
const PAYLOAD_TYPE: u8 = 0x7F;
const RTP_OFFSET_BITS: u32 = 14;
const LEN_BITS: u32 = 10;

/// One RED payload. All its lengths have been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RedPayload<'a> {
    headers: &'a [u8],
    redundant: &'a [u8],
    /// Payload type of the primary block.
    pub payload_type: u8,
    pub primary: &'a [u8],
}

/// The repeated payload of an earlier packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RedundantBlock<'a> {
    /// How many packets before the primary: 1 is the packet right before it.
    pub distance: u8,
    pub payload_type: u8,
    /// By how much its timestamp is lower than the packet's.
    pub rtp_offset: u32,
    /// Never empty.
    pub payload: &'a [u8],
}

impl<'a> RedPayload<'a> {
    /// Parses a payload. Returns `None` if a header or a block is cut short, or if there are more
    /// than 32 blocks.
    pub fn parse(payload: &'a [u8]) -> Option<RedPayload<'a>> {
        let (mut at, mut redundant_len) = (0, 0);
        while payload.get(at)? & FOLLOWS != 0 {
            let header = payload.get(at..)?.first_chunk()?;
            redundant_len += block_len(header);
            at += HEADER_LEN;
            if at >= BLOCKS_MAX * HEADER_LEN {
                return None;
            }
        }
        let (headers, rest) = payload.split_at_checked(at)?;
        let (payload_type, blocks) = rest.split_first()?;
        let (redundant, primary) = blocks.split_at_checked(redundant_len)?;
        Some(RedPayload {
            headers,
            redundant,
            payload_type: *payload_type,
            primary,
        })
    }

    /// Returns the repeated packets, oldest first. Empty blocks carry nothing and are left out.
    pub fn redundant(&self) -> impl Iterator<Item = RedundantBlock<'a>> + use<'a> {
        let (headers, _) = self.headers.as_chunks::<HEADER_LEN>();
        let mut rest = self.redundant;
        let distances = (1..=headers.len() as u8).rev();
        headers
            .iter()
            .zip(distances)
            .filter_map(move |(header, distance)| {
                let (payload, after) = rest.split_at_checked(block_len(header))?;
                rest = after;
                Some(RedundantBlock {
                    distance,
                    payload_type: header[0] & PAYLOAD_TYPE,
                    rtp_offset: rtp_offset(header),
                    payload,
                })
            })
            .filter(|block| !block.payload.is_empty())
    }

    /// Returns the number of bytes before the primary block.
    pub fn primary_at(&self) -> usize {
        self.headers.len() + PRIMARY_HEADER_LEN + self.redundant.len()
    }
}

fn block_len(header: &[u8; HEADER_LEN]) -> usize {
    usize::from(u16::from_be_bytes([header[2], header[3]]) & ((1 << LEN_BITS) - 1))
}

fn rtp_offset(header: &[u8; HEADER_LEN]) -> u32 {
    u32::from_be_bytes([0, header[1], header[2], header[3]]) >> LEN_BITS
}

/// Whether a header can describe a block of `len` bytes that is `rtp_offset` ticks older than its
/// packet.
pub const fn fits(rtp_offset: u32, len: usize) -> bool {
    rtp_offset < 1 << RTP_OFFSET_BITS && len < 1 << LEN_BITS
}

/// Returns the number of header bytes in front of `redundant` redundant blocks and the primary.
pub const fn headers_len(redundant: usize) -> usize {
    redundant * HEADER_LEN + PRIMARY_HEADER_LEN
}

/// Writes the headers for `redundant`, the RTP offset and length of each block, oldest first.
/// Returns their length, or `None` if there is no room or a block does not fit ([`fits`]).
pub fn write_headers(
    out: &mut [u8],
    payload_type: u8,
    redundant: impl ExactSizeIterator<Item = (u32, usize)>,
) -> Option<usize> {
    let len = headers_len(redundant.len());
    let (out, _) = out.split_at_mut_checked(len)?;
    let (primary, headers) = out.split_last_mut()?;
    let (headers, _) = headers.as_chunks_mut::<HEADER_LEN>();
    for (header, (rtp_offset, len)) in headers.iter_mut().zip(redundant) {
        if !fits(rtp_offset, len) {
            return None;
        }
        *header = (rtp_offset << LEN_BITS | len as u32).to_be_bytes();
        header[0] = FOLLOWS | (payload_type & PAYLOAD_TYPE);
    }
    *primary = payload_type & PAYLOAD_TYPE;
    Some(len)
}

/// Sets the payload type of every block in a payload that [`RedPayload::parse`] accepts.
pub fn set_payload_types(payload: &mut [u8], payload_type: u8) {
    let mut at = 0;
    while let Some(first) = payload.get_mut(at) {
        let follows = *first & FOLLOWS;
        *first = follows | (payload_type & PAYLOAD_TYPE);
        if follows == 0 {
            return;
        }
        at += HEADER_LEN;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seeded::Seeded;

    fn written(payload_type: u8, redundant: &[(u32, &[u8])], primary: &[u8]) -> Vec<u8> {
        let mut out = vec![0; 4_096];
        let sizes = redundant
            .iter()
            .map(|(rtp_offset, block)| (*rtp_offset, block.len()));
        let len = write_headers(&mut out, payload_type, sizes).unwrap();
        assert_eq!(len, headers_len(redundant.len()));
        out.truncate(len);
        redundant
            .iter()
            .for_each(|(_, block)| out.extend_from_slice(block));
        out.extend_from_slice(primary);
        out
    }

    #[test]
    fn what_is_written_is_read_back_oldest_first() {
        let (old, newer) = ([7; 1_023], [8; 1]);
        let payload = written(111, &[(16_383, &old), (960, &newer)], b"primary");
        let read = RedPayload::parse(&payload).unwrap();
        assert_eq!((read.payload_type, read.primary), (111, &b"primary"[..]));
        assert_eq!(read.primary_at(), payload.len() - b"primary".len());
        let block = |distance, rtp_offset, payload| RedundantBlock {
            distance,
            payload_type: 111,
            rtp_offset,
            payload,
        };
        assert_eq!(
            read.redundant().collect::<Vec<_>>(),
            [block(2, 16_383, &old[..]), block(1, 960, &newer)]
        );
    }

    #[test]
    fn the_bytes_are_those_of_libwebrtc() {
        // One redundant block of 2 bytes, 960 ticks older, payload type 111. Then the primary of 3
        // bytes.
        assert_eq!(
            written(111, &[(960, &[1, 2])], &[3, 4, 5]),
            [0xEF, 0x0F, 0x00, 0x02, 0x6F, 1, 2, 3, 4, 5]
        );
        assert_eq!(written(111, &[], &[3]), [0x6F, 3]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut out = [0; 16];
        for (rtp_offset, len) in [(1 << 14, 1), (0, 1 << 10)] {
            assert!(!fits(rtp_offset, len));
            assert_eq!(
                write_headers(&mut out, 111, [(rtp_offset, len)].into_iter()),
                None
            );
        }
        assert_eq!(
            write_headers(&mut out[..4], 111, [(1, 1)].into_iter()),
            None
        );
    }

    #[test]
    fn a_payload_that_is_cut_short_is_none_and_a_shorter_primary_is_one() {
        let payload = written(111, &[(1_920, &[1; 20]), (960, &[2; 30])], &[3; 40]);
        let before_primary = payload.len() - 40;
        for len in 0..payload.len() {
            let read = RedPayload::parse(&payload[..len]);
            assert_eq!(read.is_some(), len >= before_primary, "{len}");
        }
    }

    #[test]
    fn empty_blocks_are_left_out_and_keep_their_distance() {
        let payload = written(111, &[(1_920, &[1]), (960, &[])], &[3]);
        let distances: Vec<u8> = RedPayload::parse(&payload)
            .unwrap()
            .redundant()
            .map(|block| block.distance)
            .collect();
        assert_eq!(distances, [2]);
    }

    #[test]
    fn payload_types_are_replaced_in_headers_alone() {
        let mut payload = written(
            111,
            &[(1_920, &[0xFF; 20]), (960, &[0x80; 30])],
            &[0xEF; 40],
        );
        set_payload_types(&mut payload, 96);
        assert_eq!(
            payload,
            written(96, &[(1_920, &[0xFF; 20]), (960, &[0x80; 30])], &[0xEF; 40])
        );
    }

    #[test]
    fn hostile_bytes_never_panic_and_blocks_lie_in_the_payload() {
        let mut random = Seeded::new(63);
        for _ in 0..200_000 {
            let len = random.below(200) as usize;
            let mut payload: Vec<u8> = (0..len).map(|_| random.draw() as u8).collect();
            // Short lengths, so that many payloads are complete.
            for at in (0..len.saturating_sub(3)).step_by(4).take(3) {
                payload[at + 2] &= 0xFC;
                payload[at + 3] &= 0x0F;
            }
            if let Some(red) = RedPayload::parse(&payload) {
                let redundant: usize = red.redundant().map(|block| block.payload.len()).sum();
                assert_eq!(red.primary_at() + red.primary.len(), len);
                assert!(redundant < red.primary_at());
            }
            set_payload_types(&mut payload, 111);
        }
        assert_eq!(RedPayload::parse(&[0x80; 300]), None, "too many blocks");
    }
}
