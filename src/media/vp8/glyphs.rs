//! 5x7 font: the digits, and the multiplication sign for a picture's size.

pub const WIDTH: usize = 5;
pub const HEIGHT: usize = 7;
/// Distance from one glyph's left edge to the next one's.
pub const PITCH: usize = 6;

const DIGITS: [[u8; HEIGHT]; 10] = [
    [
        0b01110, 0b10001, 0b10011, 0b10101, 0b11001, 0b10001, 0b01110,
    ],
    [
        0b00100, 0b01100, 0b00100, 0b00100, 0b00100, 0b00100, 0b01110,
    ],
    [
        0b01110, 0b10001, 0b00001, 0b00110, 0b01000, 0b10000, 0b11111,
    ],
    [
        0b01110, 0b10001, 0b00001, 0b00110, 0b00001, 0b10001, 0b01110,
    ],
    [
        0b00010, 0b00110, 0b01010, 0b10010, 0b11111, 0b00010, 0b00010,
    ],
    [
        0b11111, 0b10000, 0b11110, 0b00001, 0b00001, 0b10001, 0b01110,
    ],
    [
        0b00110, 0b01000, 0b10000, 0b11110, 0b10001, 0b10001, 0b01110,
    ],
    [
        0b11111, 0b00001, 0b00010, 0b00100, 0b01000, 0b01000, 0b01000,
    ],
    [
        0b01110, 0b10001, 0b10001, 0b01110, 0b10001, 0b10001, 0b01110,
    ],
    [
        0b01110, 0b10001, 0b10001, 0b01111, 0b00001, 0b00010, 0b01100,
    ],
];
const TIMES: [u8; HEIGHT] = [
    0b00000, 0b00000, 0b10001, 0b01010, 0b00100, 0b01010, 0b10001,
];

/// Returns whether `text` (digits and 'x'), drawn with its top left corner at 0, 0, has ink at `x`,
/// `y`.
pub fn ink(text: &[u8], x: usize, y: usize) -> bool {
    let glyph = match text.get(x / PITCH) {
        Some(b'x') => &TIMES,
        Some(digit @ b'0'..=b'9') => &DIGITS[usize::from(digit - b'0')],
        _ => return false,
    };
    let column = x % PITCH;
    column < WIDTH && y < HEIGHT && glyph[y] >> (WIDTH - 1 - column) & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn glyphs_differ_and_stay_in_their_cells() {
        let drawn = |text: &[u8]| {
            (0..8)
                .flat_map(|y| (0..6).map(move |x| (x, y)))
                .map(|(x, y)| ink(text, x, y))
                .collect::<Vec<_>>()
        };
        let all: std::collections::BTreeSet<_> = (b'0'..=b'9')
            .chain([b'x'])
            .map(|glyph| drawn(&[glyph]))
            .collect();
        assert_eq!(all.len(), 11);
        assert!((0..8).all(|y| !ink(b"8", 5, y)) && (0..6).all(|x| !ink(b"8", x, 7)));
        assert_eq!(ink(b"18", 6, 1), ink(b"8", 0, 1));
    }
}
