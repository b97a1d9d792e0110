//! Deterministic pseudorandom numbers: one seed gives the same run on every machine. Not for keys.

/// SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Clone, Debug)]
pub struct Seeded(u64);

const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

impl Seeded {
    pub fn new(seed: u64) -> Seeded {
        Seeded(seed)
    }

    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        mixed(self.0)
    }

    /// Draws evenly from 0..`bound` (up to a bias of `bound` / 2^64).
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.draw()) * u128::from(bound)) >> 64) as u64
    }

    /// Draws evenly from 0.0..1.0.
    pub fn unit(&mut self) -> f64 {
        (self.draw() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Draws evenly from -1.0..1.0.
    pub fn signed(&mut self) -> f64 {
        self.below(1 << 32) as f64 / (1u64 << 31) as f64 - 1.0
    }

    /// Returns true in `percent` of 100 calls.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// Returns a number that looks random for each input. The result depends on the input, not on the
/// order of calls.
pub const fn mixed(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// Returns the first number of a seed, for a single value where no sequence is needed.
pub const fn scatter(seed: u64) -> u64 {
    mixed(seed.wrapping_add(STEP))
}
