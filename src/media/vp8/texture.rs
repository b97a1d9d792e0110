//! Textures: the residual of a macroblock without its mean, ready to be coded at any mean.
//!
//! A texture has luma detail only. If a macroblock's prediction is flat (DC_PRED), the decoder adds
//! the prediction, a DC part that we choose, and the texture. The DC part passes both inverse
//! transforms exactly (see [`Quantizers`]), so a macroblock's pixels are `mean + residual` for any
//! prediction.

use std::collections::BTreeMap;

use super::bool_coder::{CostMeter, DecisionRecorder};
use super::tables::{AC_QLOOKUP, DC_QLOOKUP, ZIGZAG};
use super::tokens::{Levels, Plane, put_block};
use crate::seeded::Seeded;

/// Quantizer indices of a frame (RFC 6386, sections 9.6 and 14.1).
///
/// A mean of `d` above the prediction is a Y2 DC level of `64 d / y2_dc` and chroma DC levels of `8
/// d / uv_dc`. This is exact only if `y2_dc` divides 64 and `uv_dc` divides 8, which the
/// constructor asserts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantizers {
    pub index: u8,
    pub y2_dc_delta: i8,
    pub uv_dc_delta: i8,
    pub y_ac: i32,
    pub y2_ac: i32,
    /// Number of Y2 DC levels per unit of luma.
    pub y2_levels_per_step: i16,
    /// Number of chroma DC levels per unit of chroma.
    pub uv_levels_per_step: i16,
}

impl Quantizers {
    /// Quantizers for ordinary rates, for high ones, and for the highest.
    pub const COARSE: Quantizers = Quantizers::new(19, -6, -15);
    pub const FINE: Quantizers = Quantizers::new(4, 0, 0);
    pub const FINEST: Quantizers = Quantizers::new(0, 0, 0);

    const fn new(index: u8, y2_dc_delta: i8, uv_dc_delta: i8) -> Quantizers {
        let y2_dc = 2 * DC_QLOOKUP[(index as i8 + y2_dc_delta) as usize] as i16;
        let uv_dc = DC_QLOOKUP[(index as i8 + uv_dc_delta) as usize] as i16;
        assert!(
            64 % y2_dc == 0 && 8 % uv_dc == 0,
            "the DC levels would not be exact"
        );
        assert!(
            y2_dc_delta.unsigned_abs() < 16 && uv_dc_delta.unsigned_abs() < 16,
            "a delta has four bits"
        );
        let y_ac = AC_QLOOKUP[index as usize] as i32;
        let y2_ac = if y_ac * 155 / 100 < 8 {
            8
        } else {
            y_ac * 155 / 100
        };
        Quantizers {
            index,
            y2_dc_delta,
            uv_dc_delta,
            y_ac,
            y2_ac,
            y2_levels_per_step: 64 / y2_dc,
            uv_levels_per_step: 8 / uv_dc,
        }
    }
}

/// Identifies a texture of a [`Palette`].
pub type TextureId = u16;

/// Texture without any detail.
pub const FLAT: TextureId = 0;

/// Maximum distance of residuals from the mean. Means within [`MEAN_RANGE`] therefore never
/// saturate. A clamped pixel would break the sums that later predictions are based on.
pub const MAX_RESIDUAL: i16 = 60;
/// Range of means that any texture of [`Palette::add_class`] can take.
pub const MEAN_RANGE: std::ops::RangeInclusive<u8> = 60..=195;

pub struct Texture {
    /// Y2 levels. Entry 0 (DC) is zero here and set for each macroblock.
    pub y2: Levels,
    /// Whether `y2` has no coefficient.
    pub plain_y2: bool,
    /// Sums of the residual's bottom row and of its right column, which the neighbours' DC_PRED
    /// uses.
    pub bottom: i32,
    pub right: i32,
    /// Which of the sixteen luma blocks hold a coefficient, bit 0 for the top left.
    pub coded_blocks: u16,
    /// Minimum and maximum residual.
    pub extent: (i16, i16),
    /// Residual, 16 rows of 16.
    pub residual: Box<[i16; 256]>,
    /// Start of the decisions of luma block `b` in context `c`, at `3 b + c`. The last entry is the
    /// end of the last ones.
    starts: [u32; 49],
}

pub struct Palette {
    pub quantizers: Quantizers,
    textures: Vec<Texture>,
    decisions: Vec<u16>,
    mosaics: BTreeMap<u16, (TextureId, u8)>,
    meter: CostMeter,
}

/// Group of `CLASS_SIZE` textures of about the same cost, from `first` on.
#[derive(Clone, Copy, Debug)]
pub struct Class {
    pub first: TextureId,
    /// Mean cost of one texture's luma blocks.
    pub bits: f64,
}

pub const CLASS_SIZE: u16 = 64;

impl Palette {
    pub fn new(quantizers: Quantizers) -> Palette {
        let mut palette = Palette {
            quantizers,
            textures: Vec::new(),
            decisions: Vec::new(),
            mosaics: BTreeMap::new(),
            meter: CostMeter::new(),
        };
        palette.add([0; 16], &[[0; 16]; 16]);
        palette
    }

    #[inline]
    pub fn texture(&self, id: TextureId) -> &Texture {
        &self.textures[usize::from(id)]
    }

    /// Returns the decisions that code luma block `block` (0..16) if `context` (0..=2) neighbours
    /// hold a coefficient.
    #[inline]
    pub fn luma_decisions(&self, texture: &Texture, block: usize, context: usize) -> &[u16] {
        let at = 3 * block + context;
        &self.decisions[texture.starts[at] as usize..texture.starts[at + 1] as usize]
    }

    /// Returns a two-tone mosaic of 4x4 pixel blocks and its mean. Bit `b` of `pattern` gives block
    /// `b` the tone `ink` instead of `paper`.
    ///
    /// The tones are accurate to about two steps. `ink` and `paper` must be the same in every call.
    pub fn mosaic(&mut self, pattern: u16, ink: u8, paper: u8) -> (TextureId, u8) {
        if pattern == 0 || pattern == u16::MAX {
            return (FLAT, if pattern == 0 { paper } else { ink });
        }
        if let Some(&known) = self.mosaics.get(&pattern) {
            return known;
        }
        let tone = |block: usize| {
            f64::from(if pattern >> block & 1 == 1 {
                ink
            } else {
                paper
            })
        };
        let mean = (0..16).map(tone).sum::<f64>() / 16.0;
        let y2 = walsh_levels(
            &std::array::from_fn(|block| tone(block) - mean),
            self.quantizers.y2_ac,
        );
        let mean = mean.round() as u8;
        let id = self.add(y2, &[[0; 16]; 16]);
        let (least, greatest) = self.texture(id).extent;
        assert!(
            i16::from(mean) + least >= 0 && i16::from(mean) + greatest <= 255,
            "a mosaic's tones leave no room for rounding"
        );
        self.mosaics.insert(pattern, (id, mean));
        (id, mean)
    }

    /// Adds textures whose luma blocks cost about `bits` each. Returns `None` if detail of that
    /// cost does not fit [`MAX_RESIDUAL`].
    pub fn add_class(&mut self, bits: f64, random: &mut Seeded) -> Option<Class> {
        let first = TextureId::try_from(self.textures.len())
            .expect("a palette holds a few thousand textures");
        let mut total = 0.0;
        for _ in 0..CLASS_SIZE {
            let (blocks, cost) = detail(bits, self.quantizers.y_ac, random, &mut self.meter)?;
            self.add([0; 16], &blocks);
            total += cost;
        }
        Some(Class {
            first,
            bits: total / f64::from(CLASS_SIZE),
        })
    }

    fn add(&mut self, y2: Levels, luma: &[Levels; 16]) -> TextureId {
        let id = TextureId::try_from(self.textures.len())
            .expect("a palette holds a few thousand textures");
        let mut starts = [0; 49];
        let mut coded_blocks = 0;
        let mut recorder = DecisionRecorder(std::mem::take(&mut self.decisions));
        for (block, levels) in luma.iter().enumerate() {
            for context in 0..3 {
                starts[3 * block + context] = recorder.0.len() as u32;
                coded_blocks |=
                    u16::from(put_block(&mut recorder, Plane::Luma, context, levels)) << block;
            }
        }
        starts[48] = recorder.0.len() as u32;
        self.decisions = recorder.0;
        let residual = residual(&y2, luma, &self.quantizers);
        let texture = Texture {
            y2,
            plain_y2: y2 == [0; 16],
            bottom: residual[240..].iter().map(|&r| i32::from(r)).sum(),
            right: residual
                .iter()
                .skip(15)
                .step_by(16)
                .map(|&r| i32::from(r))
                .sum(),
            coded_blocks,
            extent: (
                *residual.iter().min().expect("256 pixels"),
                *residual.iter().max().expect("256 pixels"),
            ),
            residual: Box::new(residual),
            starts,
        };
        self.textures.push(texture);
        id
    }
}

/// Makes random detail that costs `bits` or slightly more. Most of it has low frequencies, so that
/// it looks like cloth and not like noise.
fn detail(
    bits: f64,
    y_ac: i32,
    random: &mut Seeded,
    meter: &mut CostMeter,
) -> Option<([Levels; 16], f64)> {
    // The more bits a block has to carry, the higher its frequencies are.
    let reach = (3.0 + bits / 16.0 / 4.0).min(15.0) as u64;
    let mut blocks = [[0; 16]; 16];
    let mut costs = [luma_cost(&blocks[0], meter); 16];
    let mut total: f64 = costs.iter().sum();
    let mut refused = 0;
    while total < bits {
        let block = random.below(16) as usize;
        let at = 1 + random.below(reach).min(random.below(reach)) as usize;
        let mut changed = blocks[block];
        changed[at] += match changed[at] {
            0 if random.below(2) == 0 => -1,
            level if level < 0 => -1,
            _ => 1,
        };
        let cost = luma_cost(&changed, meter);
        let overshoot = total - costs[block] + cost > bits + 8.0 + bits / 32.0;
        if overshoot || !within_bounds(&changed, y_ac) {
            refused += 1;
            if refused > 400 {
                return None;
            }
            continue;
        }
        total += cost - costs[block];
        (blocks[block], costs[block]) = (changed, cost);
    }
    Some((blocks, total))
}

fn luma_cost(levels: &Levels, meter: &mut CostMeter) -> f64 {
    put_block(meter, Plane::Luma, 1, levels);
    meter.take_bits()
}

fn within_bounds(levels: &Levels, y_ac: i32) -> bool {
    inverse_dct(&dequantized(levels, y_ac, 0))
        .iter()
        .all(|r| r.abs() <= i32::from(MAX_RESIDUAL))
}

/// Returns the dequantized coefficients of a block in raster order, with its DC. `levels` are in
/// coding order.
fn dequantized(levels: &Levels, ac: i32, dc: i32) -> [i32; 16] {
    let mut raster = [0; 16];
    for (at, &level) in levels.iter().enumerate().skip(1) {
        raster[ZIGZAG[at]] = i32::from(level) * ac;
    }
    raster[0] = dc;
    raster
}

/// Returns what a decoder adds to a flat prediction of the texture's mean.
fn residual(y2: &Levels, luma: &[Levels; 16], quantizers: &Quantizers) -> [i16; 256] {
    let block_dcs = inverse_walsh(&dequantized(y2, quantizers.y2_ac, 0));
    let mut pixels = [0; 256];
    for (block, levels) in luma.iter().enumerate() {
        let corner = block / 4 * 64 + block % 4 * 4;
        for (at, &r) in inverse_dct(&dequantized(levels, quantizers.y_ac, block_dcs[block]))
            .iter()
            .enumerate()
        {
            pixels[corner + at / 4 * 16 + at % 4] = r as i16;
        }
    }
    pixels
}

/// Returns the Y2 levels (all but DC) that give the sixteen blocks these offsets from their mean.
fn walsh_levels(offsets: &[f64; 16], y2_ac: i32) -> Levels {
    let mut levels = [0; 16];
    for (at, &raster) in ZIGZAG.iter().enumerate().skip(1) {
        let mut unit = [0; 16];
        unit[raster] = 8;
        let basis = inverse_walsh(&unit);
        // A pixel is an eighth of its block's DC, which is an eighth of the WHT's sum. The basis
        // has sixteen entries of +-1.
        let coefficient = offsets
            .iter()
            .zip(basis)
            .map(|(offset, sign)| offset * f64::from(sign))
            .sum::<f64>()
            * 64.0
            / 16.0;
        levels[at] = (coefficient / f64::from(y2_ac)).round() as i16;
    }
    levels
}

/// Inverse WHT (RFC 6386, section 14.3).
fn inverse_walsh(input: &[i32; 16]) -> [i32; 16] {
    let butterfly =
        |[a, b, c, d]: [i32; 4]| [a + d + b + c, b - c + a - d, a + d - b - c, a - d - b + c];
    let mut columns = [0; 16];
    for i in 0..4 {
        let out = butterfly([input[i], input[4 + i], input[8 + i], input[12 + i]]);
        (0..4).for_each(|row| columns[4 * row + i] = out[row]);
    }
    let mut output = [0; 16];
    for row in 0..4 {
        let out = butterfly([
            columns[4 * row],
            columns[4 * row + 1],
            columns[4 * row + 2],
            columns[4 * row + 3],
        ]);
        (0..4).for_each(|i| output[4 * row + i] = (out[i] + 3) >> 3);
    }
    output
}

/// Inverse DCT (RFC 6386, section 14.4).
fn inverse_dct(input: &[i32; 16]) -> [i32; 16] {
    let times_cos = |x: i32| x + ((x * 20_091) >> 16);
    let times_sin = |x: i32| (x * 35_468) >> 16;
    let butterfly = |[x0, x1, x2, x3]: [i32; 4]| {
        let (a, b) = (x0 + x2, x0 - x2);
        let (c, d) = (times_sin(x1) - times_cos(x3), times_cos(x1) + times_sin(x3));
        [a + d, b + c, b - c, a - d]
    };
    let mut columns = [0; 16];
    for i in 0..4 {
        let out = butterfly([input[i], input[4 + i], input[8 + i], input[12 + i]]);
        (0..4).for_each(|row| columns[4 * row + i] = out[row]);
    }
    let mut output = [0; 16];
    for row in 0..4 {
        let out = butterfly([
            columns[4 * row],
            columns[4 * row + 1],
            columns[4 * row + 2],
            columns[4 * row + 3],
        ]);
        (0..4).for_each(|i| output[4 * row + i] = (out[i] + 4) >> 3);
    }
    output
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_passes_both_transforms_exactly_whatever_the_texture() {
        let mut random = Seeded::new(3);
        for quantizers in [Quantizers::COARSE, Quantizers::FINE, Quantizers::FINEST] {
            let y2_dc = 64 / i32::from(quantizers.y2_levels_per_step);
            for mean in [-255, -77, -1, 0, 1, 32, 255] {
                let y2: Levels = std::array::from_fn(|at| {
                    if at == 0 {
                        0
                    } else {
                        random.below(9) as i16 - 4
                    }
                });
                let luma: Levels = std::array::from_fn(|at| {
                    if at == 0 {
                        0
                    } else {
                        random.below(7) as i16 - 3
                    }
                });
                let without = inverse_walsh(&dequantized(&y2, quantizers.y2_ac, 0));
                let with = inverse_walsh(&dequantized(
                    &y2,
                    quantizers.y2_ac,
                    mean * i32::from(quantizers.y2_levels_per_step) * y2_dc,
                ));
                for block in 0..16 {
                    let plain = inverse_dct(&dequantized(&luma, quantizers.y_ac, without[block]));
                    let lifted = inverse_dct(&dequantized(&luma, quantizers.y_ac, with[block]));
                    assert!((0..16).all(|at| lifted[at] == plain[at] + mean));
                }
            }
        }
    }

    #[test]
    fn mosaics_show_their_pattern() {
        for quantizers in [Quantizers::COARSE, Quantizers::FINE, Quantizers::FINEST] {
            let mut palette = Palette::new(quantizers);
            for pattern in [0x0001, 0x8000, 0x0FF0, 0x1234, 0xFFFE, 0x5A5A] {
                let (id, mean) = palette.mosaic(pattern, 215, 40);
                for (at, r) in palette.texture(id).residual.iter().enumerate() {
                    let block = at / 64 * 4 + at % 16 / 4;
                    let asked = if pattern >> block & 1 == 1 { 215 } else { 40 };
                    assert!(
                        (i16::from(mean) + r - asked).abs() <= 6,
                        "{pattern:x} {at}: {mean} + {r}"
                    );
                }
            }
        }
    }

    #[test]
    fn classes_cost_what_was_asked_or_are_refused() {
        let mut random = Seeded::new(1);
        let mut palette = Palette::new(Quantizers::COARSE);
        for bits in [24.0, 90.0, 140.0, 400.0, 700.0] {
            let class = palette.add_class(bits, &mut random).unwrap();
            assert!(
                (bits..bits * 1.05 + 8.0).contains(&class.bits),
                "{bits}: {}",
                class.bits
            );
            for id in class.first..class.first + CLASS_SIZE {
                let (least, greatest) = palette.texture(id).extent;
                assert!(least >= -MAX_RESIDUAL && greatest <= MAX_RESIDUAL);
            }
        }
        assert!(palette.add_class(9_000.0, &mut random).is_none());
    }
}
