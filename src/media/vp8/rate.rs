//! Meeting the bitrate: how much of the landscape changes, how finely, and what each frame's new
//! textures may cost.

use super::scene::Scene;
use super::texture::{Class, Palette, Quantizers};
use crate::seeded::Seeded;

/// The cost of a textured macroblock beside its luma blocks, about: modes, Y2, chroma. The real
/// cost is measured by coding.
pub const USUAL_OVERHEAD_BITS: f64 = 22.0;
/// Below this the textures would be hard to see, so fewer macroblocks are textured instead.
const CALM_BITS: f64 = 90.0;
/// New textures every so many frames. A key frame codes them all, an inter frame one in so many: it
/// sets the ratio of their sizes, which libvpx in real-time mode has at 5.7 to 7.2.
const USUAL_PERIOD: usize = 6;
/// The classes' costs around the wanted mean: room for frames that have to be larger or smaller.
const CLASS_SPREAD: [f64; 7] = [0.66, 0.76, 0.87, 1.0, 1.15, 1.32, 1.52];
/// For each quantizer, the greatest mean cost whose dearest class still fits the residual's bounds.
const QUANTIZERS: [(Quantizers, f64); 3] = [
    (Quantizers::COARSE, 500.0),
    (Quantizers::FINE, 850.0),
    (Quantizers::FINEST, 1_150.0),
];
/// How far frame sizes stray from the mean, as an encoder's do.
const JITTER: f64 = 0.15;
/// The least and the most that one frame's textures take of their mean: inside what the classes
/// reach.
const TEXTURE_SWING: (f64, f64) = (0.75, 1.35);

/// What is textured, how often, and at what mean cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Design {
    pub quantizers: Quantizers,
    /// How many macroblocks are textured.
    pub count: usize,
    /// Each of them takes a new texture every `period` frames.
    pub period: usize,
    /// The wanted mean cost of a texture's luma.
    pub bits: f64,
}

impl Design {
    /// Spends `spare_bits` a frame on up to `landscape` macroblocks in a loop of `frames`, where
    /// each new texture costs `overhead_bits` beside its luma; `None` if they cannot carry so
    /// much.
    pub fn new(
        spare_bits: f64,
        overhead_bits: f64,
        landscape: usize,
        frames: usize,
    ) -> Option<Design> {
        // A macroblock that changes once a loop would never change: it needs two textures to
        // alternate between.
        let longest_period = USUAL_PERIOD.min(frames / 2);
        let wanted = spare_bits * longest_period as f64 / (CALM_BITS + overhead_bits);
        let count = (wanted.round() as usize)
            .clamp(1, landscape.max(1))
            .min(landscape);
        let bits_at = |period: usize| spare_bits * period as f64 / count as f64 - overhead_bits;
        let fits = |period: usize, bits: f64| {
            let (quantizers, _) = *QUANTIZERS.iter().find(|(_, most)| bits <= *most)?;
            Some(Design {
                quantizers,
                count,
                period,
                bits: bits.max(CALM_BITS / 2.0),
            })
        };
        (1..=longest_period)
            .rev()
            .find_map(|period| fits(period, bits_at(period)))
    }

    /// The most spare bits a frame that [`Design::new`] accepts.
    pub fn most_spare_bits(landscape: usize) -> f64 {
        let [.., (_, most)] = QUANTIZERS;
        landscape as f64 * most
    }

    /// The texture classes, cheapest first.
    pub fn classes(&self, palette: &mut Palette, random: &mut Seeded) -> Vec<Class> {
        CLASS_SPREAD
            .iter()
            .map_while(|spread| palette.add_class(self.bits * spread, random))
            .collect()
    }
}

/// Decides what each frame spends, and corrects itself by the sizes that came out.
pub struct EncoderRateControl {
    /// Bits, by frame.
    targets: Vec<f64>,
    /// The classes' mean costs.
    costs: Vec<f64>,
    steps: Vec<u32>,
}

impl EncoderRateControl {
    /// `mean_bits` a frame, of which `fixed_bits[i]` are taken at frame `i` before any texture.
    pub fn new(
        mean_bits: f64,
        fixed_bits: &[f64],
        classes: &[Class],
        overhead_bits: f64,
        scene: &mut Scene,
        random: &mut Seeded,
    ) -> EncoderRateControl {
        let targets = targets(mean_bits, fixed_bits, random);
        let middle = classes.len() as u32 / 2;
        let steps = (0..scene.frames)
            .map(|index| middle * scene.refreshed(index))
            .collect();
        let mut control = EncoderRateControl {
            targets,
            costs: classes.iter().map(|class| class.bits).collect(),
            steps,
        };
        let guess = |(index, fixed): (usize, &f64)| {
            let refreshed = scene.refreshed(index);
            fixed
                + f64::from(refreshed) * overhead_bits
                + control.cost(refreshed, control.steps[index])
        };
        let guessed: Vec<f64> = fixed_bits.iter().enumerate().map(guess).collect();
        control.correct(&guessed, scene);
        control
    }

    /// Moves every frame towards its target, given the bits that it has with the present steps.
    pub fn correct(&mut self, actual_bits: &[f64], scene: &mut Scene) {
        let (_, left_over) = self.plan(actual_bits, 0.0, scene);
        // What the end of the loop cannot take, its beginning gets.
        (self.steps, _) = self.plan(actual_bits, left_over, scene);
        self.steps
            .iter()
            .enumerate()
            .for_each(|(index, &steps)| scene.spend(index, steps));
    }

    /// New steps, and the bits that did not find a place. What one frame cannot take, the next one
    /// gets, starting with `carried`.
    fn plan(&self, actual_bits: &[f64], mut carried: f64, scene: &Scene) -> (Vec<u32>, f64) {
        let mut plan = Vec::with_capacity(self.steps.len());
        for (index, actual) in actual_bits.iter().enumerate() {
            let refreshed = scene.refreshed(index);
            let before = self.cost(refreshed, self.steps[index]);
            let missing = self.targets[index] + carried - actual;
            let steps = self.steps_for(refreshed, before + missing);
            carried = missing - (self.cost(refreshed, steps) - before);
            plan.push(steps);
        }
        (plan, carried)
    }

    /// By how much of the target the loop is too large.
    pub fn error(&self, actual_bits: &[f64]) -> f64 {
        mean(actual_bits) / mean(&self.targets) - 1.0
    }

    /// What a new texture cost beside its luma, in the mean over the loop.
    pub fn overhead_bits(&self, actual_bits: &[f64], fixed_bits: &[f64], scene: &Scene) -> f64 {
        let luma = |index: usize| self.cost(scene.refreshed(index), self.steps[index]);
        let luma_bits: f64 = (0..scene.frames).map(luma).sum();
        let refreshed: f64 = (0..scene.frames)
            .map(|index| f64::from(scene.refreshed(index)))
            .sum();
        ((actual_bits.iter().sum::<f64>() - fixed_bits.iter().sum::<f64>() - luma_bits)
            / refreshed.max(1.0))
        .max(0.0)
    }

    /// The luma bits of `refreshed` textures after `steps` steps up from the cheapest class.
    fn cost(&self, refreshed: u32, steps: u32) -> f64 {
        if refreshed == 0 {
            return 0.0;
        }
        let (class, more) = ((steps / refreshed) as usize, f64::from(steps % refreshed));
        let next = *self.costs.get(class + 1).unwrap_or(&self.costs[class]);
        self.costs[class] * (f64::from(refreshed) - more) + next * more
    }

    /// The steps whose cost comes closest to `bits`.
    fn steps_for(&self, refreshed: u32, bits: f64) -> u32 {
        let each = bits / f64::from(refreshed.max(1));
        let top = self.costs.len() - 1;
        let class = self.costs[..top]
            .iter()
            .rposition(|cost| *cost <= each)
            .unwrap_or(0);
        let share = (each - self.costs[class]) / (self.costs[class + 1] - self.costs[class]);
        class as u32 * refreshed + (share.clamp(0.0, 1.0) * f64::from(refreshed)).round() as u32
    }
}

/// Each frame's bits: the mean and some jitter, as far as the textures can even out what counter
/// and bar take.
fn targets(mean_bits: f64, fixed_bits: &[f64], random: &mut Seeded) -> Vec<f64> {
    let spare = mean_bits - mean(fixed_bits);
    let wanted = |fixed: &f64| {
        (mean_bits * (1.0 + JITTER * random.signed()) - fixed)
            .clamp(TEXTURE_SWING.0 * spare, TEXTURE_SWING.1 * spare)
    };
    let textures: Vec<f64> = fixed_bits.iter().map(wanted).collect();
    let scale = spare / mean(&textures);
    textures
        .iter()
        .zip(fixed_bits)
        .map(|(texture, fixed)| fixed + texture * scale)
        .collect()
}

pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_design_goes_from_few_calm_textures_to_all_at_every_frame() {
        let few = Design::new(1_000.0, 22.0, 2_000, 300).unwrap();
        assert_eq!(
            (few.quantizers, few.period),
            (Quantizers::COARSE, USUAL_PERIOD)
        );
        assert!(few.count < 100);
        let all = Design::new(100_000.0, 22.0, 2_000, 300).unwrap();
        assert_eq!((all.count, all.period), (2_000, USUAL_PERIOD));
        let most = Design::most_spare_bits(2_000);
        assert_eq!(Design::new(most, 22.0, 2_000, 300).unwrap().period, 1);
        assert_eq!(Design::new(most * 1.03, 22.0, 2_000, 300), None);
        assert_eq!(Design::new(100.0, 22.0, 0, 300), None);
        assert_eq!(Design::new(1_000.0, 22.0, 2_000, 10).unwrap().period, 5);
    }

    #[test]
    fn every_design_has_textures_dear_enough_for_its_mean() {
        for (quantizers, most) in QUANTIZERS {
            let mut palette = Palette::new(quantizers);
            let design = Design {
                quantizers,
                count: 100,
                period: 6,
                bits: most,
            };
            assert!(
                design.classes(&mut palette, &mut Seeded::new(5)).len() >= 6,
                "{quantizers:?}"
            );
        }
    }
}
