//! Cuts a frame into packets of equal size, so that one segmented send carries all of them.

/// Maximum payload of one packet. LiveKit forwards up to about 1,200 bytes, and its own header
/// extensions must still fit.
pub const PAYLOAD_BYTES_MAX: usize = 1_120;

/// Frame of `total` bytes as `packets` chunks of `chunk` bytes each. The last one may be shorter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketLayout {
    pub total: usize,
    pub chunk: usize,
    pub packets: usize,
}

impl PacketLayout {
    /// Cuts `total` bytes so that the last chunk holds all of the last `tail` bytes, because the
    /// identity trailer must not be split.
    pub fn new(total: usize, tail: usize) -> PacketLayout {
        let mut packets = total.div_ceil(PAYLOAD_BYTES_MAX).max(1);
        loop {
            let chunk = total.div_ceil(packets).max(1);
            // Rounding up the chunk size may reduce the number of packets.
            let used = total.div_ceil(chunk).max(1);
            let last = total - (used - 1) * chunk;
            if used == 1 || last >= tail {
                return PacketLayout {
                    total,
                    chunk,
                    packets: used,
                };
            }
            packets += 1;
        }
    }

    /// Returns the bytes of packet `index` within the frame.
    pub fn range(&self, index: usize) -> std::ops::Range<usize> {
        let start = index * self.chunk;
        start..(start + self.chunk).min(self.total)
    }
}

/// Copies bytes `range` of the frame `head ++ tail` to `out`; returns how many.
pub fn copy_range(
    head: &[u8],
    tail: &[u8],
    range: std::ops::Range<usize>,
    out: &mut [u8],
) -> usize {
    let from_head = head.len().min(range.end).saturating_sub(range.start);
    out[..from_head].copy_from_slice(&head[range.start.min(head.len())..][..from_head]);
    let tail_start = range.start.max(head.len()) - head.len();
    let from_tail = range.len() - from_head;
    out[from_head..range.len()].copy_from_slice(&tail[tail_start..][..from_tail]);
    range.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_the_frame_are_equal_and_keep_the_tail_whole() {
        const TAIL: usize = 40;
        for total in (TAIL..200_000).step_by(7) {
            let layout = PacketLayout::new(total, TAIL);
            assert!(layout.chunk <= PAYLOAD_BYTES_MAX);
            let sizes: Vec<usize> = (0..layout.packets).map(|i| layout.range(i).len()).collect();
            assert_eq!(sizes.iter().sum::<usize>(), total);
            assert!(
                sizes[..sizes.len() - 1]
                    .iter()
                    .all(|size| *size == layout.chunk)
            );
            assert!(
                (TAIL..=layout.chunk).contains(sizes.last().unwrap()),
                "{total}: {sizes:?}"
            );
        }
    }

    #[test]
    fn a_range_is_copied_across_the_border_of_frame_and_trailer() {
        let (head, tail): (Vec<u8>, Vec<u8>) = ((0..100).collect(), (100..120).collect());
        for start in 0..120usize {
            for end in start..=120 {
                let mut out = [0; 120];
                assert_eq!(copy_range(&head, &tail, start..end, &mut out), end - start);
                assert!(
                    out[..end - start]
                        .iter()
                        .copied()
                        .eq(start as u8..end as u8)
                );
            }
        }
    }
}
