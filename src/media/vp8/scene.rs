//! Pictures of a loop: the contents of every macroblock at every index.
//!
//! A picture is computed from the index, never stored. Most of it is a calm landscape whose
//! macroblocks take a new texture every few frames. Most bits are spent on these textures.

use super::I420;
use super::layout::{Area, INDEX_BITS, PictureLayout, label_text};
use super::texture::{CLASS_SIZE, Class, FLAT, MEAN_RANGE, Palette, Quantizers, TextureId};
use crate::seeded::{Seeded, mixed};

/// Complete description of a macroblock's pixels. Equal descriptors mean equal pixels, wherever
/// they are and however they are coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    pub texture: TextureId,
    pub luma: u8,
    pub u: u8,
    pub v: u8,
}

impl Descriptor {
    const fn grey(luma: u8) -> Descriptor {
        Descriptor {
            texture: FLAT,
            luma,
            u: 128,
            v: 128,
        }
    }
}

const INK: u8 = 212;
const PAPER: u8 = 44;
const SQUARE_OFF: u8 = 80;
const BAR_ON: u8 = 150;
const BAR_OFF: u8 = 62;

/// Chroma (u, v) of sky, hills and meadow.
const HUES: [[(u8, u8); 3]; 4] = [
    [(140, 118), (130, 118), (118, 122)],
    [(136, 126), (134, 132), (122, 134)],
    [(142, 122), (138, 116), (130, 116)],
    [(124, 138), (132, 134), (120, 126)],
];
/// Mean luma of sky, hills and meadow.
const BRIGHTNESS: [f64; 3] = [158.0, 122.0, 96.0];

#[derive(Clone, Copy)]
enum BlockRole {
    Still(Descriptor),
    /// The `rank`-th of the macroblocks that take a new texture at the indices that are `phase`
    /// modulo the period.
    Textured {
        phase: u8,
        rank: u32,
        colour: Descriptor,
    },
    /// Macroblock `cell` of digit `place` of the counter.
    Digit {
        place: u8,
        cell: u16,
    },
    IndexBit(u8),
    Bar {
        column: u16,
    },
}

/// Change of the textured macroblocks over time.
struct Motion {
    classes: Vec<Class>,
    /// Number of macroblocks that take a new texture at each phase. Its length is the period.
    groups: Vec<u32>,
    levels: Vec<Level>,
}

/// Cost classes of one frame's new textures: `class` + 1 for `more` of them, `class` for the
/// others.
#[derive(Clone, Copy)]
struct Level {
    class: u8,
    more: u32,
    /// Offset that rotates which macroblocks get the more expensive class.
    turn: u32,
}

pub struct Scene {
    pub layout: PictureLayout,
    pub palette: Palette,
    /// Number of frames in the loop.
    pub frames: usize,
    width: usize,
    height: usize,
    salt: u64,
    roles: Vec<BlockRole>,
    /// Macroblocks of the landscape with their colours, in the order in which they are textured.
    landscape: Vec<(u32, Descriptor)>,
    /// Macroblocks of a digit's area, for each digit 0..=9.
    digits: [Vec<Descriptor>; 10],
    motion: Motion,
}

impl Scene {
    /// Creates a scene without any texture yet.
    pub fn still(
        width: usize,
        height: usize,
        frames: usize,
        seed: u64,
        layout: PictureLayout,
        quantizers: Quantizers,
    ) -> Scene {
        let mut palette = Palette::new(quantizers);
        let area = layout.digits[0];
        let digit_cells = |digit: u8, palette: &mut Palette| {
            (0..area.rows * area.columns)
                .map(|cell| {
                    mosaic(
                        palette,
                        layout.digit_pattern(digit, cell % area.columns, cell / area.columns),
                    )
                })
                .collect()
        };
        let digits = std::array::from_fn(|digit| digit_cells(digit as u8, &mut palette));
        let mut random = Seeded::new(seed);
        let salt = random.draw();
        let mut landscape = landscape(&layout, &mut random);
        let mut roles = vec![None; layout.columns * layout.rows];
        overlay(
            &mut roles,
            &layout,
            &mut palette,
            &label_text(width, height),
        );
        landscape.retain(|&(at, _)| roles[at as usize].is_none());
        landscape
            .iter()
            .for_each(|&(at, colour)| roles[at as usize] = Some(BlockRole::Still(colour)));
        let roles = roles
            .into_iter()
            .map(|role| role.expect("landscape and overlay cover the picture"))
            .collect();
        let motion = Motion {
            classes: Vec::new(),
            groups: vec![0],
            levels: Vec::new(),
        };
        Scene {
            layout,
            palette,
            frames,
            width,
            height,
            salt,
            roles,
            landscape,
            digits,
            motion,
        }
    }

    /// Returns the number of macroblocks that can be textured.
    pub fn landscape_size(&self) -> usize {
        self.landscape.len()
    }

    /// Lets the first `count` macroblocks of the landscape take a new texture every `period`
    /// frames. The others do not change.
    pub fn animate(&mut self, count: usize, period: usize, classes: Vec<Class>) {
        let mut order = self.landscape[..count].to_vec();
        let mut random = Seeded::new(self.salt);
        for at in (1..order.len()).rev() {
            order.swap(at, random.below(at as u64 + 1) as usize);
        }
        self.landscape
            .iter()
            .for_each(|&(at, colour)| self.roles[at as usize] = BlockRole::Still(colour));
        let mut groups = vec![0; period];
        for (turn, &(at, colour)) in order.iter().enumerate() {
            let phase = turn % period;
            self.roles[at as usize] = BlockRole::Textured {
                phase: phase as u8,
                rank: groups[phase],
                colour,
            };
            groups[phase] += 1;
        }
        self.motion = Motion {
            classes,
            groups,
            levels: vec![
                Level {
                    class: 0,
                    more: 0,
                    turn: 0
                };
                self.frames
            ],
        };
    }

    /// Returns the number of macroblocks that take a new texture at `index`.
    pub fn refreshed(&self, index: usize) -> u32 {
        self.motion.groups[index % self.motion.groups.len()]
    }

    /// Spends `steps` steps on the new textures of frame `index`. Each step raises one macroblock
    /// by one class.
    pub fn spend(&mut self, index: usize, steps: u32) {
        let group = self.refreshed(index).max(1);
        self.motion.levels[index] = Level {
            class: (steps / group) as u8,
            more: steps % group,
            turn: (mixed(self.salt ^ index as u64) % u64::from(group)) as u32,
        };
    }

    /// Computes the picture at `index`, in raster order.
    pub fn picture(&self, index: usize, picture: &mut Vec<Descriptor>) {
        let refreshed: Vec<usize> = (0..self.motion.groups.len())
            .map(|phase| self.last_refresh(index, phase))
            .collect();
        let values = [index / 100, index / 10 % 10, index % 10];
        let lit_columns = (index + 1) * self.layout.columns / self.frames;
        picture.clear();
        picture.extend(self.roles.iter().enumerate().map(|(at, role)| match *role {
            BlockRole::Still(descriptor) => descriptor,
            BlockRole::Textured {
                phase,
                rank,
                colour,
            } => Descriptor {
                texture: self.texture(at, rank, refreshed[usize::from(phase)]),
                ..colour
            },
            BlockRole::Digit { place, cell } => {
                self.digits[values[usize::from(place)]][usize::from(cell)]
            }
            BlockRole::IndexBit(bit) => Descriptor::grey(if index >> bit & 1 == 1 {
                INK
            } else {
                SQUARE_OFF
            }),
            BlockRole::Bar { column } => Descriptor::grey(if usize::from(column) < lit_columns {
                BAR_ON
            } else {
                BAR_OFF
            }),
        }));
    }

    /// Returns the latest frame up to `index`, wrapping around the loop, at which `phase` took new
    /// textures.
    fn last_refresh(&self, index: usize, phase: usize) -> usize {
        let period = self.motion.groups.len();
        let last_until = |end: usize| (end >= phase).then(|| end - (end - phase) % period);
        last_until(index)
            .or_else(|| last_until(self.frames - 1))
            .unwrap_or(0)
    }

    fn texture(&self, at: usize, rank: u32, refreshed: usize) -> TextureId {
        let level = self.motion.levels[refreshed];
        let group = self.refreshed(refreshed);
        let turned = rank + level.turn;
        let place = if turned >= group {
            turned - group
        } else {
            turned
        };
        let class = usize::from(level.class) + usize::from(place < level.more);
        let chosen = mixed(self.salt ^ (at as u64) << 20 ^ refreshed as u64);
        self.motion.classes[class].first + (chosen % u64::from(CLASS_SIZE)) as u16
    }

    /// Returns the pixels that a decoder shows at `index`.
    pub fn pixels(&self, index: usize) -> I420 {
        let mut picture = Vec::new();
        self.picture(index, &mut picture);
        let (chroma_width, chroma_height) = (self.width.div_ceil(2), self.height.div_ceil(2));
        let mut data =
            Vec::with_capacity(self.width * self.height + 2 * chroma_width * chroma_height);
        let luma = |shown: &Descriptor, y: usize| {
            let residual = &self.palette.texture(shown.texture).residual[y % 16 * 16..][..16];
            std::array::from_fn::<u8, 16, _>(|x| (i16::from(shown.luma) + residual[x]) as u8)
        };
        self.push_plane(&picture, (self.width, self.height), luma, &mut data);
        self.push_plane(
            &picture,
            (chroma_width, chroma_height),
            |shown, _| [shown.u; 8],
            &mut data,
        );
        self.push_plane(
            &picture,
            (chroma_width, chroma_height),
            |shown, _| [shown.v; 8],
            &mut data,
        );
        I420 {
            width: self.width,
            height: self.height,
            data,
        }
    }

    /// Appends a plane in which each macroblock has `SIDE` pixels per side. `row_of` gives one row
    /// of one macroblock.
    fn push_plane<const SIDE: usize>(
        &self,
        picture: &[Descriptor],
        (width, height): (usize, usize),
        row_of: impl Fn(&Descriptor, usize) -> [u8; SIDE],
        data: &mut Vec<u8>,
    ) {
        for y in 0..height {
            let row = &picture[y / SIDE * self.layout.columns..][..self.layout.columns];
            let end = data.len() + width;
            row.iter()
                .for_each(|shown| data.extend_from_slice(&row_of(shown, y)));
            data.truncate(end);
        }
    }

    /// Reads the index row; `None` if the layout has none or a square is neither on nor off.
    pub fn read_index(&self, frame: &I420) -> Option<usize> {
        let strip = self.layout.strip?;
        let mut index = 0;
        for bit in (0..INDEX_BITS).rev() {
            let Area {
                left,
                top,
                columns,
                rows,
            } = strip.square(bit);
            let (x, y) = (16 * left + 8 * columns, 16 * top + 8 * rows);
            let luma = *frame.data.get(y * frame.width + x)?;
            // The threshold is half way between off and on. A third of the distance around it is
            // undecided.
            match luma {
                0..=123 => index *= 2,
                168.. => index = 2 * index + 1,
                _ => return None,
            }
        }
        Some(index)
    }
}

fn mosaic(palette: &mut Palette, pattern: u16) -> Descriptor {
    let (texture, luma) = palette.mosaic(pattern, INK, PAPER);
    Descriptor {
        texture,
        luma,
        u: 128,
        v: 128,
    }
}

/// Returns the colours of the background's macroblocks, in the order in which they are textured if
/// there are bits for some only. The order makes clouds instead of scattered spots.
fn landscape(layout: &PictureLayout, random: &mut Seeded) -> Vec<(u32, Descriptor)> {
    let hues = HUES[random.below(HUES.len() as u64) as usize];
    let (horizon, shade, activity) = (Noise::new(random), Noise::new(random), Noise::new(random));
    let mut order = Vec::with_capacity(layout.columns * layout.rows);
    let unit = layout.rows.max(layout.columns) as f64 / 6.0;
    for row in 0..layout.rows {
        for column in 0..layout.columns {
            let (x, y) = (column as f64 / unit, row as f64 / unit);
            let height = row as f64 / layout.rows as f64;
            let band = usize::from(height > 0.36 + 0.12 * horizon.at(x, 0.0))
                + usize::from(height > 0.62 + 0.10 * horizon.at(x, 3.0));
            // The luma has few steps, because each step costs bits. Most neighbours share a shade.
            let luma = BRIGHTNESS[band] + 6.0 * (2.5 * shade.at(x, y)).round();
            let (u, v) = hues[band];
            let colour = Descriptor {
                texture: FLAT,
                luma: luma as u8,
                u,
                v,
            };
            assert!(MEAN_RANGE.contains(&colour.luma), "a shade would saturate");
            order.push((
                activity.at(x, y),
                (row * layout.columns + column) as u32,
                colour,
            ));
        }
    }
    order.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    order
        .into_iter()
        .map(|(_, at, colour)| (at, colour))
        .collect()
}

/// Draws counter, label, index row and bar over the landscape.
fn overlay(
    roles: &mut [Option<BlockRole>],
    layout: &PictureLayout,
    palette: &mut Palette,
    text: &str,
) {
    let mut set = |column: usize, row: usize, role: BlockRole| {
        roles[row * layout.columns + column] = Some(role)
    };
    let paper = BlockRole::Still(Descriptor::grey(PAPER));
    layout
        .panel
        .cells()
        .chain(layout.strip.iter().flat_map(|strip| strip.area.cells()))
        .for_each(|(column, row)| set(column, row, paper));
    for (place, digit) in layout.digits.iter().enumerate() {
        for (cell, (column, row)) in digit.cells().enumerate() {
            set(
                column,
                row,
                BlockRole::Digit {
                    place: place as u8,
                    cell: cell as u16,
                },
            );
        }
    }
    for (column, row) in layout.label.iter().flat_map(Area::cells) {
        set(
            column,
            row,
            BlockRole::Still(mosaic(palette, layout.label_pattern(text, column, row))),
        );
    }
    if let Some(strip) = layout.strip {
        strip.bar().cells().for_each(|(column, row)| {
            set(
                column,
                row,
                BlockRole::Bar {
                    column: column as u16,
                },
            )
        });
        for bit in 0..INDEX_BITS {
            strip
                .square(bit)
                .cells()
                .for_each(|(column, row)| set(column, row, BlockRole::IndexBit(bit as u8)));
        }
    }
}

/// Smooth noise over the plane, about -1..1. It repeats every 16 units.
struct Noise([f64; 256]);

impl Noise {
    fn new(random: &mut Seeded) -> Noise {
        Noise(std::array::from_fn(|_| random.signed()))
    }

    fn at(&self, x: f64, y: f64) -> f64 {
        let knot = |column: f64, row: f64| self.0[(row as usize % 16) * 16 + column as usize % 16];
        let ease = |t: f64| t * t * (3.0 - 2.0 * t);
        let (column, row) = (x.floor(), y.floor());
        let (along, down) = (ease(x - column), ease(y - row));
        let upper = knot(column, row) * (1.0 - along) + knot(column + 1.0, row) * along;
        let lower = knot(column, row + 1.0) * (1.0 - along) + knot(column + 1.0, row + 1.0) * along;
        upper * (1.0 - down) + lower * down
    }
}
