//! Positions of the picture's elements, in macroblocks and in 4x4 pixel blocks.
//!
//! From top to bottom: the picture's size as a label, the frame counter on its panel, and at the
//! bottom a strip with the index in binary (most significant bit first) above a progress bar.
//! Elements that do not fit are left out. The counter always fits.

use super::glyphs;

/// Number of digits of the frame counter. It also limits a loop to fewer than 1,000 frames.
pub const COUNTER_DIGITS: usize = 3;
/// Number of squares in the index row, enough for [`COUNTER_DIGITS`] decimal digits.
pub const INDEX_BITS: usize = 10;

/// Rectangle of macroblocks.
#[derive(Clone, Copy, Debug)]
pub struct Area {
    pub left: usize,
    pub top: usize,
    pub columns: usize,
    pub rows: usize,
}

impl Area {
    pub fn cells(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let area = *self;
        (area.top..area.top + area.rows).flat_map(move |row| {
            (area.left..area.left + area.columns).map(move |column| (column, row))
        })
    }
}

#[derive(Clone)]
pub struct PictureLayout {
    /// Number of macroblocks per row, including those that the picture's edge cuts.
    pub columns: usize,
    pub rows: usize,
    /// Size of the counter's font pixels, in blocks per side.
    pub scale: usize,
    /// Panel of the counter, with its margin.
    pub panel: Area,
    /// Macroblocks of each digit, most significant first.
    pub digits: [Area; COUNTER_DIGITS],
    pub label: Option<Area>,
    pub strip: Option<Strip>,
}

/// Index row and progress bar.
#[derive(Clone, Copy, Debug)]
pub struct Strip {
    pub area: Area,
    /// Size of a square of the index row, in macroblocks per side; also the bar's height.
    pub cell: usize,
    /// Distance from one square's left edge to the next one's.
    pub pitch: usize,
}

impl Strip {
    /// Returns the square of `bit`, 0 for the least significant.
    pub fn square(&self, bit: usize) -> Area {
        Area {
            left: (INDEX_BITS - 1 - bit) * self.pitch,
            top: self.area.top,
            columns: self.cell,
            rows: self.cell,
        }
    }

    pub fn bar(&self) -> Area {
        Area {
            top: self.area.top + self.cell,
            rows: self.cell,
            ..self.area
        }
    }
}

impl PictureLayout {
    /// Returns the layouts for a picture of this many pixels, the largest counter first; empty if
    /// none fits.
    pub fn all(width: usize, height: usize) -> Vec<PictureLayout> {
        // From 4 on the scales are multiples of 4, so that a font pixel consists of whole
        // macroblocks, which are crisp and cheap.
        let scales = (1..=height / 90)
            .rev()
            .filter(|scale| *scale < 4 || scale.is_multiple_of(4))
            .chain((height < 90).then_some(1));
        scales
            .filter_map(|scale| PictureLayout::new(width, height, scale))
            .collect()
    }

    fn new(width: usize, height: usize, scale: usize) -> Option<PictureLayout> {
        let (full_columns, full_rows) = (width / 16, height / 16);
        let (columns, rows) = (width.div_ceil(16), height.div_ceil(16));
        let strip = strip(full_columns, full_rows, columns, rows, (scale / 4).max(1));
        let free_rows = strip.map_or(full_rows, |strip| strip.area.top);
        let margin = scale / 4;
        let digit = Area {
            left: 0,
            top: 0,
            columns: (glyphs::PITCH * scale).div_ceil(4),
            rows: 2 * scale,
        };
        let (panel_columns, panel_rows) = (
            COUNTER_DIGITS * digit.columns + 2 * margin,
            digit.rows + 2 * margin,
        );
        if panel_columns > full_columns || panel_rows > free_rows {
            return None;
        }
        let label = Some(label(width, height, (scale / 4).max(1)))
            .filter(|label| label.columns <= full_columns && label.rows + panel_rows <= free_rows);
        let above = label.map_or(0, |label| label.rows);
        let panel = Area {
            left: (full_columns - panel_columns) / 2,
            top: above + (free_rows - above - panel_rows) / 2,
            columns: panel_columns,
            rows: panel_rows,
        };
        let digits = std::array::from_fn(|place| Area {
            left: panel.left + margin + place * digit.columns,
            top: panel.top + margin,
            ..digit
        });
        Some(PictureLayout {
            columns,
            rows,
            scale,
            panel,
            digits,
            label,
            strip,
        })
    }

    /// Returns which blocks of macroblock `column`, `row` of a digit's area have ink, bit 0 for the
    /// top left.
    pub fn digit_pattern(&self, digit: u8, column: usize, row: usize) -> u16 {
        let area = self.digits[0];
        let offset = |room: usize, glyph: usize| {
            let margin = (4 * room - glyph * self.scale) / 2;
            if self.scale.is_multiple_of(4) {
                margin / 4 * 4
            } else {
                margin
            }
        };
        let corner = (
            offset(area.columns, glyphs::WIDTH),
            offset(area.rows, glyphs::HEIGHT),
        );
        text_pattern(&[b'0' + digit], self.scale, corner, column, row)
    }

    /// Returns the same for the label; `text` is [`label_text`].
    pub fn label_pattern(&self, text: &str, column: usize, row: usize) -> u16 {
        text_pattern(
            text.as_bytes(),
            (self.scale / 4).max(1),
            (2, 1),
            column,
            row,
        )
    }
}

pub fn label_text(width: usize, height: usize) -> String {
    format!("{width}x{height}")
}

fn label(width: usize, height: usize, scale: usize) -> Area {
    let blocks = 3 + label_text(width, height).len() * glyphs::PITCH * scale;
    Area {
        left: 0,
        top: 0,
        columns: blocks.div_ceil(4),
        rows: 2 * scale,
    }
}

fn strip(
    full_columns: usize,
    full_rows: usize,
    columns: usize,
    rows: usize,
    cell: usize,
) -> Option<Strip> {
    let top = full_rows.checked_sub(2 * cell).filter(|top| *top >= 3)?;
    let pitch = [2 * cell, cell]
        .into_iter()
        .find(|pitch| pitch * INDEX_BITS <= full_columns)?;
    Some(Strip {
        area: Area {
            left: 0,
            top,
            columns,
            rows: rows - top,
        },
        cell,
        pitch,
    })
}

/// Returns which blocks of macroblock `column`, `row` have ink if `text` starts at block `corner`
/// and each font pixel is `scale` blocks per side.
fn text_pattern(
    text: &[u8],
    scale: usize,
    corner: (usize, usize),
    column: usize,
    row: usize,
) -> u16 {
    let inked = |block: usize| {
        let x = (4 * column + block % 4).checked_sub(corner.0);
        let y = (4 * row + block / 4).checked_sub(corner.1);
        x.zip(y)
            .is_some_and(|(x, y)| glyphs::ink(text, x / scale, y / scale))
    };
    (0..16).map(|block| u16::from(inked(block)) << block).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_lies_inside_the_visible_picture() {
        for (width, height) in [
            (96, 32),
            (160, 90),
            (320, 180),
            (640, 360),
            (855, 481),
            (1280, 720),
            (1920, 1080),
            (360, 640),
            (4096, 4096),
            (4096, 48),
        ] {
            let layouts = PictureLayout::all(width, height);
            assert!(!layouts.is_empty(), "{width}x{height}");
            for layout in layouts {
                let inside = |area: &Area| {
                    16 * (area.left + area.columns) <= width
                        && 16 * (area.top + area.rows) <= height
                };
                assert!(inside(&layout.panel) && layout.digits.iter().all(inside));
                assert!(layout.label.as_ref().is_none_or(
                    |label| inside(label) && label.top + label.rows <= layout.panel.top
                ));
                if let Some(strip) = layout.strip {
                    assert!(
                        (0..INDEX_BITS).all(|bit| inside(&strip.square(bit)))
                            && layout.panel.top + layout.panel.rows <= strip.area.top
                    );
                }
            }
        }
        assert!(PictureLayout::all(95, 180).is_empty() && PictureLayout::all(320, 31).is_empty());
    }
}
