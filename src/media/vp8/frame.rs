//! Codes one frame (RFC 6386, sections 9, 16 and 19).
//!
//! Every frame leaves the decoder in the same state: the pixels of its picture and the default
//! probabilities. There is no loop filter and no probability update that outlives its frame, and
//! golden and altref are never read. So a key frame and an inter frame of one picture are
//! interchangeable.

use super::bool_coder::{BoolEncoder, BoolSink};
use super::scene::Descriptor;
use super::tables::{
    COEFF_UPDATE_PROBS, INTER_UV_DC_PRED, INTER_Y_DC_PRED, KEY_UV_DC_PRED, KEY_Y_DC_PRED,
    MV_UPDATE_PROBS, ZERO_MV_PROBS,
};
use super::texture::{Palette, Quantizers};
use super::tokens::{Plane, put_block, put_dc_block};

/// Picture that the frame may refer to.
#[derive(Clone, Copy)]
pub enum FrameReference<'a> {
    /// A key frame: it refers to no picture.
    None,
    /// An inter frame: it refers to the picture that the decoder shows.
    Last(&'a [Descriptor]),
}

/// Coding of a macroblock.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Action {
    /// The last frame's pixels stay: inter, zero motion vector, no coefficients.
    Copy,
    /// DC_PRED without coefficients, because the prediction is already right.
    Predict,
    /// DC_PRED, a DC level for each plane, and the texture.
    Code { y2: i16, u: i16, v: i16 },
}

impl Action {
    fn skips_coefficients(self) -> bool {
        !matches!(self, Action::Code { .. })
    }
}

/// Which blocks at a macroblock's edge hold a coefficient (0 or 1). They are the contexts of the
/// blocks beyond that edge.
#[derive(Clone, Copy, Default)]
struct Edge {
    y: [u8; 4],
    u: [u8; 2],
    v: [u8; 2],
    y2: u8,
}

/// Codes frames of one size and holds the reused buffers.
pub struct FrameCoder<'a> {
    palette: &'a Palette,
    width: usize,
    height: usize,
    /// Number of macroblocks per row.
    columns: usize,
    actions: Vec<Action>,
    above: Vec<Edge>,
    modes: Vec<u8>,
    tokens: Vec<u8>,
}

impl<'a> FrameCoder<'a> {
    /// Creates a coder for pictures of `width` x `height` pixels.
    pub fn new(palette: &'a Palette, width: usize, height: usize) -> FrameCoder<'a> {
        let columns = width.div_ceil(16);
        FrameCoder {
            palette,
            width,
            height,
            columns,
            actions: Vec::new(),
            above: vec![Edge::default(); columns],
            modes: Vec::new(),
            tokens: Vec::new(),
        }
    }

    /// Appends the frame that shows `picture`.
    pub fn code(&mut self, picture: &[Descriptor], reference: FrameReference, out: &mut Vec<u8>) {
        self.decide(picture, reference);
        self.code_tokens(picture);
        let is_key = matches!(reference, FrameReference::None);
        self.code_modes(is_key);
        let tag = u32::from(!is_key) | 1 << 4 | (self.modes.len() as u32) << 5;
        out.extend_from_slice(&tag.to_le_bytes()[..3]);
        if is_key {
            out.extend_from_slice(&[0x9D, 0x01, 0x2A]);
            out.extend_from_slice(&(self.width as u16).to_le_bytes());
            out.extend_from_slice(&(self.height as u16).to_le_bytes());
        }
        out.extend_from_slice(&self.modes);
        out.extend_from_slice(&self.tokens);
    }

    fn decide(&mut self, picture: &[Descriptor], reference: FrameReference) {
        self.actions.clear();
        for (at, &shown) in picture.iter().enumerate() {
            let action = match reference {
                FrameReference::Last(last) if last[at] == shown => Action::Copy,
                _ => self.intra(picture, at),
            };
            self.actions.push(action);
        }
    }

    fn intra(&self, picture: &[Descriptor], at: usize) -> Action {
        let shown = picture[at];
        let above = at.checked_sub(self.columns).map(|above| picture[above]);
        let left = (!at.is_multiple_of(self.columns)).then(|| picture[at - 1]);
        let [y, u, v] = self.prediction(above, left);
        let Quantizers {
            y2_levels_per_step,
            uv_levels_per_step,
            ..
        } = self.palette.quantizers;
        let action = Action::Code {
            y2: (i16::from(shown.luma) - y) * y2_levels_per_step,
            u: (i16::from(shown.u) - u) * uv_levels_per_step,
            v: (i16::from(shown.v) - v) * uv_levels_per_step,
        };
        let texture = self.palette.texture(shown.texture);
        let bare = texture.plain_y2 && texture.coded_blocks == 0;
        if bare && action == (Action::Code { y2: 0, u: 0, v: 0 }) {
            Action::Predict
        } else {
            action
        }
    }

    /// Returns the DC_PRED of luma and chroma (section 12): the mean of the adjoining pixels, or
    /// 128 if there are none.
    fn prediction(&self, above: Option<Descriptor>, left: Option<Descriptor>) -> [i16; 3] {
        let bottom = |shown: Descriptor| {
            16 * i32::from(shown.luma) + self.palette.texture(shown.texture).bottom
        };
        let right = |shown: Descriptor| {
            16 * i32::from(shown.luma) + self.palette.texture(shown.texture).right
        };
        match (above, left) {
            (None, None) => [128; 3],
            (Some(above), None) => [
                ((bottom(above) + 8) >> 4) as i16,
                above.u.into(),
                above.v.into(),
            ],
            (None, Some(left)) => [
                ((right(left) + 8) >> 4) as i16,
                left.u.into(),
                left.v.into(),
            ],
            (Some(above), Some(left)) => {
                let half = |a: u8, b: u8| (i16::from(a) + i16::from(b) + 1) >> 1;
                [
                    ((bottom(above) + right(left) + 16) >> 5) as i16,
                    half(above.u, left.u),
                    half(above.v, left.v),
                ]
            }
        }
    }

    fn code_tokens(&mut self, picture: &[Descriptor]) {
        self.tokens.clear();
        self.above.fill(Edge::default());
        let mut encoder = BoolEncoder::new(&mut self.tokens);
        for (actions, shown) in self
            .actions
            .chunks(self.columns)
            .zip(picture.chunks(self.columns))
        {
            let mut left = Edge::default();
            for ((&action, shown), above) in actions.iter().zip(shown).zip(&mut self.above) {
                if let Action::Code { y2, u, v } = action {
                    put_y2(&mut encoder, self.palette, shown, y2, above, &mut left);
                    put_luma(&mut encoder, self.palette, shown, above, &mut left);
                    put_chroma(&mut encoder, u, &mut above.u, &mut left.u);
                    put_chroma(&mut encoder, v, &mut above.v, &mut left.v);
                } else {
                    (*above, left) = (Edge::default(), Edge::default());
                }
            }
        }
        encoder.finish();
    }

    fn code_modes(&mut self, is_key: bool) {
        self.modes.clear();
        let mut encoder = BoolEncoder::new(&mut self.modes);
        let prob_of = |count: usize| (256 * count / self.actions.len()).clamp(1, 255) as u8;
        let prob_skip_false = prob_of(
            self.actions
                .iter()
                .filter(|action| !action.skips_coefficients())
                .count(),
        );
        let prob_intra = prob_of(
            self.actions
                .iter()
                .filter(|action| **action != Action::Copy)
                .count(),
        );
        put_header(&mut encoder, is_key, &self.palette.quantizers);
        encoder.put(true, 128); // mb_no_coeff_skip: macroblocks may be without coefficients.
        encoder.literal(prob_skip_false.into(), 8);
        if !is_key {
            encoder.literal(prob_intra.into(), 8);
            put_inter_probs(&mut encoder);
        }
        for (at, &action) in self.actions.iter().enumerate() {
            encoder.put(action.skips_coefficients(), prob_skip_false);
            if is_key {
                KEY_Y_DC_PRED
                    .iter()
                    .chain([&KEY_UV_DC_PRED])
                    .for_each(|&(bit, prob)| encoder.put(bit, prob));
            } else if action == Action::Copy {
                encoder.put(true, prob_intra);
                encoder.put(false, PROB_LAST);
                encoder.put(
                    false,
                    ZERO_MV_PROBS[inter_weight(&self.actions, self.columns, at)],
                );
            } else {
                encoder.put(false, prob_intra);
                encoder.put(INTER_Y_DC_PRED.0, INTER_Y_DC_PRED.1);
                encoder.put(INTER_UV_DC_PRED.0, INTER_UV_DC_PRED.1);
            }
        }
        encoder.finish();
    }
}

/// Probability that an inter macroblock refers to the last frame, as ours always do.
const PROB_LAST: u8 = 255;

/// Writes the frame header up to the token probabilities (section 19.2).
fn put_header(encoder: &mut BoolEncoder, is_key: bool, quantizers: &Quantizers) {
    if is_key {
        encoder.literal(0, 2); // Color space; the decoder has to clamp (it never will).
    }
    encoder.literal(0, 1); // No segments.
    encoder.literal(0, 1 + 6 + 3); // Normal loop filter, at level 0: off.
    encoder.literal(0, 1); // No loop filter adjustments.
    encoder.literal(0, 2); // One token partition.
    encoder.literal(quantizers.index.into(), 7);
    for delta in [0, quantizers.y2_dc_delta, 0, quantizers.uv_dc_delta, 0] {
        encoder.put(delta != 0, 128);
        if delta != 0 {
            encoder.literal(delta.unsigned_abs().into(), 4);
            encoder.put(delta < 0, 128);
        }
    }
    if !is_key {
        encoder.literal(0, 2 + 2 + 2 + 2); // Golden, altref: no refresh, no copy; sign biases 0.
    }
    encoder.literal(0, 1); // refresh_entropy_probs: what this frame sets is forgotten after it.
    if !is_key {
        encoder.literal(1, 1); // Refresh the last frame.
    }
    COEFF_UPDATE_PROBS
        .as_flattened()
        .as_flattened()
        .as_flattened()
        .iter()
        .for_each(|&prob| encoder.put(false, prob));
}

/// Writes the rest of an inter frame's header: reference probabilities, and no updates of the intra
/// mode and motion vector probabilities.
fn put_inter_probs(encoder: &mut BoolEncoder) {
    encoder.literal(PROB_LAST.into(), 8);
    encoder.literal(128, 8); // Golden against altref: never asked.
    encoder.literal(0, 2);
    MV_UPDATE_PROBS
        .as_flattened()
        .iter()
        .for_each(|&prob| encoder.put(false, prob));
}

/// Returns the weight of the neighbours with a zero motion vector, which all inter macroblocks
/// have.
fn inter_weight(actions: &[Action], columns: usize, at: usize) -> usize {
    let is_inter = |at: usize| usize::from(actions[at] == Action::Copy);
    let (has_above, has_left) = (at >= columns, !at.is_multiple_of(columns));
    let above = if has_above {
        2 * is_inter(at - columns)
    } else {
        0
    };
    let left = if has_left { 2 * is_inter(at - 1) } else { 0 };
    let above_left = if has_above && has_left {
        is_inter(at - columns - 1)
    } else {
        0
    };
    above + left + above_left
}

fn put_y2(
    encoder: &mut BoolEncoder,
    palette: &Palette,
    shown: &Descriptor,
    dc: i16,
    above: &mut Edge,
    left: &mut Edge,
) {
    let texture = palette.texture(shown.texture);
    let context = usize::from(above.y2 + left.y2);
    let coded = if texture.plain_y2 {
        put_dc_block(encoder, Plane::Y2, context, dc)
    } else {
        put_block(
            encoder,
            Plane::Y2,
            context,
            &std::array::from_fn(|at| if at == 0 { dc } else { texture.y2[at] }),
        )
    };
    (above.y2, left.y2) = (coded.into(), coded.into());
}

fn put_luma(
    encoder: &mut BoolEncoder,
    palette: &Palette,
    shown: &Descriptor,
    above: &mut Edge,
    left: &mut Edge,
) {
    let texture = palette.texture(shown.texture);
    for (row, left) in left.y.iter_mut().enumerate() {
        for (column, above) in above.y.iter_mut().enumerate() {
            let block = 4 * row + column;
            encoder.replay(palette.luma_decisions(texture, block, usize::from(*above + *left)));
            let coded = (texture.coded_blocks >> block & 1) as u8;
            (*above, *left) = (coded, coded);
        }
    }
}

/// Codes the four blocks of a chroma plane, all with the same DC and no other coefficient.
fn put_chroma(encoder: &mut BoolEncoder, dc: i16, above: &mut [u8; 2], left: &mut [u8; 2]) {
    for left in left {
        for above in &mut *above {
            let coded = put_dc_block(encoder, Plane::Chroma, usize::from(*above + *left), dc);
            (*above, *left) = (coded.into(), coded.into());
        }
    }
}
