//! The boolean entropy coder (RFC 6386, section 7).

/// Takes the decisions that make up a bitstream. One routine writes all of them; the sink decides
/// whether they are coded, counted or kept.
pub trait BoolSink {
    /// Codes `bit`, whose probability of being false is `prob` / 256 (1..=255).
    fn put(&mut self, bit: bool, prob: u8);

    /// Codes the `bits` low bits of `value`, most significant first, with even probabilities.
    fn literal(&mut self, value: u32, bits: u32) {
        for at in (0..bits).rev() {
            self.put((value >> at) & 1 == 1, 128);
        }
    }
}

/// Encoder that appends one partition to a buffer.
pub struct BoolEncoder<'a> {
    out: &'a mut Vec<u8>,
    start: usize,
    interval: Interval,
}

/// Coding interval. It is passed by value, so that a loop over decisions keeps it in registers,
/// because most of the time is spent here.
#[derive(Clone, Copy)]
struct Interval {
    /// Lower end of the interval: the bits that are not written yet.
    low: u64,
    /// Size of the interval, 128..=255, aligned with the lowest 8 bits of `low`.
    range: u32,
    /// Number of times that `low` was doubled since bits were last written. `low` holds `shifts` +
    /// 8 bits, and a carry above them.
    shifts: u32,
}

impl Interval {
    /// Number of shifts at which bits have to be written, before `low` overflows.
    const FULL: u32 = 40;

    #[inline]
    fn narrowed(self, bit: bool, prob: u8) -> Interval {
        let split = 1 + (((self.range - 1) * u32::from(prob)) >> 8);
        let (skipped, range) = if bit {
            (split, self.range - split)
        } else {
            (0, split)
        };
        // The range is never zero. Setting its lowest bit tells the compiler so and does not move
        // the highest bit.
        let shift = (range | 1).leading_zeros() - 24;
        Interval {
            low: (self.low + u64::from(skipped)) << shift,
            range: range << shift,
            shifts: self.shifts + shift,
        }
    }
}

impl<'a> BoolEncoder<'a> {
    pub fn new(out: &'a mut Vec<u8>) -> BoolEncoder<'a> {
        let start = out.len();
        BoolEncoder {
            out,
            start,
            interval: Interval {
                low: 0,
                range: 255,
                shifts: 0,
            },
        }
    }

    /// Codes decisions kept by a [`DecisionRecorder`].
    #[inline]
    pub fn replay(&mut self, decisions: &[u16]) {
        let Interval {
            mut low,
            mut range,
            mut shifts,
        } = self.interval;
        for &decision in decisions {
            Interval { low, range, shifts } =
                Interval { low, range, shifts }.narrowed(decision & 1 == 1, (decision >> 1) as u8);
            if shifts >= Interval::FULL {
                low = self.write_top(low, shifts + 8, Interval::FULL / 8);
                shifts -= Interval::FULL;
            }
        }
        self.interval = Interval { low, range, shifts };
    }

    /// Ends the partition and returns its size in bytes.
    ///
    /// All of `low` is written, so any following bytes are inside the last interval and change
    /// nothing. Two more bytes are appended, because decoders read ahead: when the reader has
    /// touched the end, libvpx calls a frame corrupt, and ffmpeg silently drops rows.
    pub fn finish(mut self) -> usize {
        let bits = self.interval.shifts + 8;
        let spare = (8 - bits % 8) % 8;
        self.write_top(self.interval.low << spare, bits + spare, (bits + spare) / 8);
        self.out.extend_from_slice(&[0, 0]);
        self.out.len() - self.start
    }

    /// Writes the first `bytes` bytes of the `bits` bits in `low` and returns the remaining bits.
    #[inline(never)]
    fn write_top(&mut self, low: u64, bits: u32, bytes: u32) -> u64 {
        let kept = bits - 8 * bytes;
        let top = low >> kept;
        if top >> (8 * bytes) != 0 {
            self.carry();
        }
        let big_endian = top.to_be_bytes();
        self.out
            .extend_from_slice(&big_endian[8 - bytes as usize..]);
        low & ((1 << kept) - 1)
    }

    /// Propagates a carry. The coded number is always below one, so the carry stops inside the
    /// partition.
    fn carry(&mut self) {
        for byte in self.out[self.start..].iter_mut().rev() {
            *byte = byte.wrapping_add(1);
            if *byte != 0 {
                break;
            }
        }
    }
}

impl BoolSink for BoolEncoder<'_> {
    #[inline]
    fn put(&mut self, bit: bool, prob: u8) {
        self.interval = self.interval.narrowed(bit, prob);
        let Interval { low, shifts, .. } = self.interval;
        if shifts >= Interval::FULL {
            self.interval.low = self.write_top(low, shifts + 8, Interval::FULL / 8);
            self.interval.shifts -= Interval::FULL;
        }
    }
}

/// Keeps decisions for later, as twice the probability plus the bit.
#[derive(Default)]
pub struct DecisionRecorder(pub Vec<u16>);

impl BoolSink for DecisionRecorder {
    fn put(&mut self, bit: bool, prob: u8) {
        self.0.push(u16::from(prob) << 1 | u16::from(bit));
    }
}

/// Adds up the cost of decisions, without coding them.
pub struct CostMeter {
    /// Cost of a false bit by its probability, in 1/256 bit.
    table: [u32; 256],
    total: u64,
}

impl CostMeter {
    pub fn new() -> CostMeter {
        let cost = |prob: usize| (-(prob.max(1) as f64 / 256.0).log2() * 256.0).round() as u32;
        CostMeter {
            table: std::array::from_fn(cost),
            total: 0,
        }
    }

    /// Returns the cost in bits since the last call.
    pub fn take_bits(&mut self) -> f64 {
        std::mem::take(&mut self.total) as f64 / 256.0
    }
}

impl BoolSink for CostMeter {
    fn put(&mut self, bit: bool, prob: u8) {
        let chance = if bit {
            256 - usize::from(prob)
        } else {
            usize::from(prob)
        };
        self.total += u64::from(self.table[chance]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The RFC's decoder, one bit at a time. Past the end it reads `beyond`.
    struct Decoder<'a> {
        input: &'a [u8],
        beyond: u8,
        at: usize,
        value: u32,
        range: u32,
        bit_count: u32,
    }

    impl<'a> Decoder<'a> {
        fn new(input: &'a [u8], beyond: u8) -> Decoder<'a> {
            let mut decoder = Decoder {
                input,
                beyond,
                at: 0,
                value: 0,
                range: 255,
                bit_count: 0,
            };
            decoder.value = u32::from(decoder.byte()) << 8;
            decoder.value |= u32::from(decoder.byte());
            decoder
        }

        fn byte(&mut self) -> u8 {
            self.at += 1;
            self.input.get(self.at - 1).copied().unwrap_or(self.beyond)
        }

        fn bool(&mut self, prob: u8) -> bool {
            let split = 1 + (((self.range - 1) * u32::from(prob)) >> 8);
            let bit = self.value >= split << 8;
            if bit {
                self.range -= split;
                self.value -= split << 8;
            } else {
                self.range = split;
            }
            while self.range < 128 {
                self.value <<= 1;
                self.range <<= 1;
                self.bit_count += 1;
                if self.bit_count == 8 {
                    self.bit_count = 0;
                    self.value |= u32::from(self.byte());
                }
            }
            bit
        }
    }

    fn decisions(seed: u32, count: usize) -> Vec<(bool, u8)> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 16
        };
        (0..count)
            .map(|_| {
                let prob = (next() % 255 + 1) as u8;
                (next() % 256 >= u32::from(prob), prob)
            })
            .collect()
    }

    #[test]
    fn what_is_coded_is_decoded_whatever_follows_the_partition() {
        for count in (0..300).chain([5_000]) {
            let put = decisions(count as u32, count);
            let mut bytes = vec![0xAA];
            let mut encoder = BoolEncoder::new(&mut bytes);
            put.iter().for_each(|&(bit, prob)| encoder.put(bit, prob));
            let size = encoder.finish();
            assert_eq!(size, bytes.len() - 1);
            for beyond in [0, 0xFF, 0x5A] {
                // The two spare bytes are for decoders that read ahead. Nothing may depend on them.
                let mut decoder = Decoder::new(&bytes[1..bytes.len() - 2], beyond);
                assert!(
                    put.iter().all(|&(bit, prob)| decoder.bool(prob) == bit),
                    "{count} decisions, then {beyond}"
                );
            }
        }
    }

    #[test]
    fn unlikely_decisions_carry_into_bytes_already_written() {
        let mut bytes = Vec::new();
        let mut encoder = BoolEncoder::new(&mut bytes);
        let put: Vec<(bool, u8)> = (0..4_000)
            .map(|at| (at % 97 != 0, if at % 97 == 0 { 1 } else { 255 }))
            .collect();
        put.iter().for_each(|&(bit, prob)| encoder.put(bit, prob));
        encoder.finish();
        let mut decoder = Decoder::new(&bytes, 0);
        assert!(put.iter().all(|&(bit, prob)| decoder.bool(prob) == bit));
    }

    #[test]
    fn the_meter_agrees_with_the_coded_size() {
        let put = decisions(7, 20_000);
        let (mut meter, mut bytes) = (CostMeter::new(), Vec::new());
        let mut encoder = BoolEncoder::new(&mut bytes);
        for &(bit, prob) in &put {
            encoder.put(bit, prob);
            meter.put(bit, prob);
        }
        let coded_bits = 8.0 * encoder.finish() as f64;
        assert!((meter.take_bits() / coded_bits - 1.0).abs() < 0.01);
        assert_eq!(meter.take_bits(), 0.0);
    }
}
