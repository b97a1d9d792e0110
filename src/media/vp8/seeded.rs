//! Deterministic randomness: the same seed gives the same video on every machine.

/// SplitMix64 (Steele, Lea, Flood 2014).
pub struct Seeded(u64);

impl Seeded {
    pub fn new(seed: u64) -> Seeded {
        Seeded(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mixed(self.0)
    }

    /// Evenly from 0..`bound` (up to a bias of `bound` / 2^64).
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// Evenly from -1.0..1.0.
    pub fn signed(&mut self) -> f64 {
        self.below(1 << 32) as f64 / (1u64 << 31) as f64 - 1.0
    }
}

/// A number that looks random for each input: randomness by place instead of by turn.
pub fn mixed(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}
