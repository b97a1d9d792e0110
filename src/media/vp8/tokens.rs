//! Coefficient tokens (RFC 6386, section 13).

use super::bool_coder::BoolSink;
use super::tables::{CATEGORIES, COEFF_BANDS, DEFAULT_COEFF_PROBS};

/// First index of the token probabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plane {
    /// Luma after Y2, which starts at coefficient 1.
    Luma = 0,
    Y2 = 1,
    Chroma = 2,
}

/// Quantized coefficients of one block, in coding (zigzag) order.
pub type Levels = [i16; 16];

/// Codes one block and returns whether it holds a coefficient, which is the context of its
/// neighbours.
///
/// `context` is the number of neighbours (above, left) that hold a coefficient: 0..=2.
#[inline]
pub fn put_block(sink: &mut impl BoolSink, plane: Plane, context: usize, levels: &Levels) -> bool {
    let first = usize::from(plane == Plane::Luma);
    let end = levels
        .iter()
        .rposition(|&level| level != 0)
        .map_or(first, |last| last + 1);
    put_coefficients(sink, plane, context, &levels[..end]);
    end > first
}

/// Does the same for a block whose only coefficient is its DC; not for luma.
#[inline]
pub fn put_dc_block(sink: &mut impl BoolSink, plane: Plane, context: usize, dc: i16) -> bool {
    let coded = dc != 0;
    put_coefficients(sink, plane, context, &[dc][..usize::from(coded)]);
    coded
}

/// Codes `levels`, which end with the last coefficient that is not zero.
fn put_coefficients(sink: &mut impl BoolSink, plane: Plane, context: usize, levels: &[i16]) {
    let first = usize::from(plane == Plane::Luma);
    let tables = &DEFAULT_COEFF_PROBS[plane as usize];
    let mut probs = &tables[COEFF_BANDS[first]][context];
    let mut after_zero = false;
    for (at, &level) in levels.iter().enumerate().skip(first) {
        // The end of block cannot follow a zero, so that branch is left out there.
        if !after_zero {
            sink.put(true, probs[0]);
        }
        put_level(sink, level, probs);
        after_zero = level == 0;
        if at < 15 {
            probs = &tables[COEFF_BANDS[at + 1]][usize::from(level.unsigned_abs().min(2))];
        }
    }
    if levels.len() < 16 {
        sink.put(false, probs[0]);
    }
}

/// Codes one coefficient: the token, its extra bits, its sign.
fn put_level(sink: &mut impl BoolSink, level: i16, probs: &[u8; 11]) {
    let size = level.unsigned_abs();
    sink.put(size > 0, probs[1]);
    if size == 0 {
        return;
    }
    sink.put(size > 1, probs[2]);
    if size > 1 {
        sink.put(size > 4, probs[3]);
        if size > 4 {
            put_category(sink, size, probs);
        } else {
            sink.put(size > 2, probs[4]);
            if size > 2 {
                sink.put(size > 3, probs[5]);
            }
        }
    }
    sink.put(level < 0, 128);
}

fn put_category(sink: &mut impl BoolSink, size: u16, probs: &[u8; 11]) {
    let category = CATEGORIES
        .iter()
        .rposition(|&(base, _)| size >= base)
        .expect("a size above 4 has a category");
    sink.put(category > 1, probs[6]);
    match category {
        0 | 1 => sink.put(category == 1, probs[7]),
        _ => {
            sink.put(category > 3, probs[8]);
            sink.put(category % 2 == 1, probs[if category > 3 { 10 } else { 9 }]);
        }
    }
    let (base, extra) = CATEGORIES[category];
    let offset = size - base;
    for (at, &prob) in extra.iter().enumerate() {
        sink.put((offset >> (extra.len() - 1 - at)) & 1 == 1, prob);
    }
}
