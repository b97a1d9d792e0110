//! Rate control: how much of the landscape changes, how detailed it is, and what each frame's new
//! textures may cost.

use super::scene::Scene;
use super::texture::{Class, Palette, Quantizers};
use crate::seeded::Seeded;

/// Approximate cost of a textured macroblock besides its luma blocks: modes, Y2, chroma. The real
/// cost is measured by coding.
pub const USUAL_OVERHEAD_BITS: f64 = 22.0;
/// Cost below which textures would be hard to see, so fewer macroblocks are textured instead.
const CALM_BITS: f64 = 90.0;
/// Usual number of frames between new textures of a macroblock. A key frame codes all textures and
/// an inter frame one in this many, so it sets the ratio of their sizes. libvpx in real-time mode
/// has a ratio of 5.7 to 7.2.
const USUAL_PERIOD: usize = 6;
/// Costs of the classes relative to the wanted mean. They leave room for frames that have to be
/// larger or smaller.
const CLASS_SPREAD: [f64; 7] = [0.66, 0.76, 0.87, 1.0, 1.15, 1.32, 1.52];
/// For each quantizer, the greatest mean cost at which the most expensive class still fits the
/// residual's bounds.
const QUANTIZERS: [(Quantizers, f64); 3] = [
    (Quantizers::COARSE, 500.0),
    (Quantizers::FINE, 850.0),
    (Quantizers::FINEST, 1_150.0),
];
/// Variation of frame sizes around the mean, like an encoder's.
const JITTER: f64 = 0.15;
/// Minimum and maximum cost of one frame's textures, relative to their mean. Both are within the
/// range of the classes.
const TEXTURE_SWING: (f64, f64) = (0.75, 1.35);

/// Plan of the textures: how many, how often they change, and their mean cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Design {
    pub quantizers: Quantizers,
    /// Number of macroblocks that are textured.
    pub count: usize,
    /// Number of frames after which each of them takes a new texture.
    pub period: usize,
    /// Wanted mean cost of a texture's luma.
    pub bits: f64,
}

impl Design {
    /// Spends `spare_bits` per frame on up to `landscape` macroblocks in a loop of `frames` frames,
    /// where each new texture costs `overhead_bits` besides its luma. Returns `None` if they cannot
    /// carry that much.
    pub fn new(
        spare_bits: f64,
        overhead_bits: f64,
        landscape: usize,
        frames: usize,
    ) -> Option<Design> {
        // A macroblock that changes once per loop would never change, because it needs two textures
        // to alternate between.
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

    /// Returns the maximum spare bits per frame that [`Design::new`] accepts.
    pub fn most_spare_bits(landscape: usize) -> f64 {
        let [.., (_, most)] = QUANTIZERS;
        landscape as f64 * most
    }

    /// Returns the texture classes, cheapest first.
    pub fn classes(&self, palette: &mut Palette, random: &mut Seeded) -> Vec<Class> {
        CLASS_SPREAD
            .iter()
            .map_while(|spread| palette.add_class(self.bits * spread, random))
            .collect()
    }
}

/// Decides what each frame spends, and corrects itself by the resulting sizes.
pub struct EncoderRateControl {
    /// Target of each frame, in bits.
    targets: Vec<f64>,
    /// Mean costs of the classes.
    costs: Vec<f64>,
    steps: Vec<u32>,
}

impl EncoderRateControl {
    /// Creates a control for `mean_bits` per frame, of which `fixed_bits[i]` are used at frame `i`
    /// before any texture.
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

    /// Moves every frame towards its target, given its bits with the present steps.
    pub fn correct(&mut self, actual_bits: &[f64], scene: &mut Scene) {
        let (_, left_over) = self.plan(actual_bits, 0.0, scene);
        // Bits that the end of the loop cannot take go to its beginning.
        (self.steps, _) = self.plan(actual_bits, left_over, scene);
        self.steps
            .iter()
            .enumerate()
            .for_each(|(index, &steps)| scene.spend(index, steps));
    }

    /// Returns new steps, and the bits that remain. Bits that one frame cannot take go to the next,
    /// starting with `carried`.
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

    /// Returns the share of the target by which the loop is too large.
    pub fn error(&self, actual_bits: &[f64]) -> f64 {
        mean(actual_bits) / mean(&self.targets) - 1.0
    }

    /// Returns the mean cost of a new texture besides its luma, over the loop.
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

    /// Returns the luma bits of `refreshed` textures after `steps` steps up from the cheapest
    /// class.
    fn cost(&self, refreshed: u32, steps: u32) -> f64 {
        if refreshed == 0 {
            return 0.0;
        }
        let (class, more) = ((steps / refreshed) as usize, f64::from(steps % refreshed));
        let next = *self.costs.get(class + 1).unwrap_or(&self.costs[class]);
        self.costs[class] * (f64::from(refreshed) - more) + next * more
    }

    /// Returns the number of steps whose cost is closest to `bits`.
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

/// Returns the bits of each frame: the mean with some jitter, as far as the textures can compensate
/// for the counter and the bar.
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
