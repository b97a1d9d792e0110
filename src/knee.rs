//! Search for a capacity: the largest number of participants with which a run passes.
//!
//! The search doubles the load until a point does not pass. From then on it weighs every possible
//! capacity by how well it explains all verdicts so far. The next point is the load at which a PASS
//! and a FAIL are equally likely. Far from the edge this halves the remaining range, as bisection
//! does. Near the edge verdicts contradict each other, and points are repeated until 95 % of the
//! weight lies within [`RESOLUTION`] of the middle. That middle is the capacity: at this load every
//! other run passes.
//!
//! The model is that a verdict depends on the logarithm of the load by a logistic curve. Its
//! steepness is unknown, so several are weighed. One verdict in a hundred may be chance, so one
//! wrong verdict far from the edge costs some more points and does not change the answer. The model
//! assumes that more load makes a PASS less likely.
//!
//! This module measures nothing and does not wait: it gives points and takes verdicts.

/// Precision at which the search ends: the interval reaches this share of the capacity to either
/// side, or is a single number.
pub const RESOLUTION: f64 = 0.025;
/// Share of the weight that lies within the interval.
pub const CONFIDENCE: f64 = 0.95;
/// Largest number of points. A search that has not settled by then reports the interval that it
/// reached.
pub const POINTS_MAX: usize = 60;

/// The first point is the maximum divided by this. Four doublings lead from there to the maximum.
const FIRST_PART: u32 = 16;
/// Relative distance between neighbouring capacities that are weighed.
const STEP: f64 = 0.01;
/// Steepness of the curve: the relative increase of load that lowers the probability of a PASS from
/// one half to 1 / (1 + e), one in 3.7.
const SOFTNESS: [f64; 5] = [0.002, 0.005, 0.01, 0.02, 0.04];
/// Share of verdicts that do not depend on the load.
const CHANCE: f64 = 0.01;
/// Exponent from which an exponential is negligible beside one.
const NEGLIGIBLE: f64 = 40.0;

/// The number of participants to try next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SearchPoint {
    pub participants: u32,
    pub phase: SearchPhase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SearchPhase {
    /// Everything has passed so far.
    Grow,
    /// Between a load that passed and one that did not.
    Bisect,
    /// At the edge, or a repeat because the generator may have been the limit by chance.
    Repeat,
}

impl SearchPhase {
    pub const fn name(self) -> &'static str {
        match self {
            SearchPhase::Grow => "growing",
            SearchPhase::Bisect => "bisecting",
            SearchPhase::Repeat => "repeating",
        }
    }
}

/// Result of a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PointVerdict {
    Pass,
    Fail,
    /// The generator was the limit, so nothing is known about the server.
    Invalid,
    /// Held for the longest time allowed without a decision. It counts as half a PASS and half a
    /// FAIL.
    Unsettled,
}

/// A point that was tried.
#[derive(Clone, Debug, PartialEq)]
pub struct Tried {
    pub participants: u32,
    pub verdict: PointVerdict,
    pub reasons: Vec<String>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum SearchStep {
    Try(SearchPoint),
    Done(KneeAnswer),
}

#[derive(Clone, Debug, PartialEq)]
pub enum KneeAnswer {
    /// Load at which every other run passes. With 95 % confidence it lies in `low..=high`.
    Capacity {
        participants: u32,
        low: u32,
        high: u32,
        /// Whether the interval is as narrow as required. If not, the points ran out.
        settled: bool,
    },
    /// This many pass. More was not allowed, or not possible.
    AtLeast { participants: u32, limit: KneeLimit },
    /// One participant already fails.
    None,
    /// The generator was the limit even with one participant.
    NotMeasured { reasons: Vec<String> },
}

/// Reason why the search did not go higher.
#[derive(Clone, Debug, PartialEq)]
pub enum KneeLimit {
    /// The largest number that was to be tried.
    Max,
    /// The generator was the limit twice with `at` participants.
    Generator { at: u32, reasons: Vec<String> },
}

pub struct KneeSearch {
    max: u32,
    tried: Vec<Tried>,
    /// Logarithms of the capacities that are weighed.
    capacities: Vec<f64>,
    /// Logarithm of the probability of all verdicts, for each capacity and softness.
    likelihood: Vec<[f64; SOFTNESS.len()]>,
}

impl KneeSearch {
    /// Creates a search between one participant and `max`, which is at least one.
    pub fn new(max: u32) -> KneeSearch {
        assert!(max > 0, "a search needs something to try");
        // From half of the least to twice the most, which is one step of growth beyond either end.
        let (from, to) = (0.5f64.ln(), (2.0 * f64::from(max)).ln());
        let cells = ((to - from) / STEP).ceil() as usize;
        let capacities: Vec<f64> = (0..cells).map(|cell| from + STEP * cell as f64).collect();
        KneeSearch {
            max,
            tried: Vec::new(),
            likelihood: vec![[0.0; SOFTNESS.len()]; cells],
            capacities,
        }
    }

    /// Returns all points so far, in order.
    pub fn tried(&self) -> &[Tried] {
        &self.tried
    }

    /// Returns the next step. It stays the same until a verdict is taken.
    pub fn next(&self) -> SearchStep {
        if let Some(participants) = self.doubtful() {
            return SearchStep::Try(SearchPoint {
                participants,
                phase: SearchPhase::Repeat,
            });
        }
        let limit = self.generator_limit();
        let highest = self.highest_pass();
        if self.lowest_not_passed().is_none()
            && let Some(next) = self.growth(highest, limit)
        {
            return next;
        }
        self.weighed(highest, limit)
    }

    /// Takes the verdict of a point with `participants`. `reasons` say why it did not pass.
    pub fn take(&mut self, participants: u32, verdict: PointVerdict, reasons: Vec<String>) {
        let weights = match verdict {
            PointVerdict::Pass => Some((1.0, 0.0)),
            PointVerdict::Fail => Some((0.0, 1.0)),
            PointVerdict::Unsettled => Some((0.5, 0.5)),
            PointVerdict::Invalid => None,
        };
        if let Some((pass, fail)) = weights {
            let load = f64::from(participants).ln();
            let logarithm =
                |probability: f64| pass * probability.ln() + fail * (1.0 - probability).ln();
            let [surely, hardly] =
                [NEGLIGIBLE, -NEGLIGIBLE].map(|reserve| logarithm(probability(reserve, 1.0)));
            for (capacity, row) in self.capacities.iter().zip(&mut self.likelihood) {
                for (softness, cell) in SOFTNESS.iter().zip(row) {
                    *cell += match (capacity - load) / softness {
                        reserve if reserve >= NEGLIGIBLE => surely,
                        reserve if reserve <= -NEGLIGIBLE => hardly,
                        reserve => logarithm(probability(reserve, 1.0)),
                    };
                }
            }
        }
        self.tried.push(Tried {
            participants,
            verdict,
            reasons,
        });
    }

    /// Returns the failed point that shows what broke first: the lowest one at or above the lower
    /// end of the interval, or else the highest one. `None` if no point failed.
    pub fn broke_first(&self) -> Option<&Tried> {
        let low = self.weights().quantile((1.0 - CONFIDENCE) / 2.0);
        let failed = || {
            self.tried
                .iter()
                .filter(|tried| tried.verdict == PointVerdict::Fail)
        };
        failed()
            .filter(|tried| tried.participants >= low)
            .min_by_key(|tried| tried.participants)
            .or_else(|| failed().max_by_key(|tried| tried.participants))
    }

    /// Returns the last point if the generator was the limit there for the first time, because once
    /// may be chance.
    fn doubtful(&self) -> Option<u32> {
        let last = self
            .tried
            .last()
            .filter(|last| last.verdict == PointVerdict::Invalid)?;
        (self.times_invalid(last.participants) == 1).then_some(last.participants)
    }

    fn times_invalid(&self, participants: u32) -> usize {
        let invalid = |tried: &&Tried| {
            tried.verdict == PointVerdict::Invalid && tried.participants == participants
        };
        self.tried.iter().filter(invalid).count()
    }

    /// Returns the lowest point at which the generator was the limit twice.
    fn generator_limit(&self) -> Option<&Tried> {
        let invalid = self
            .tried
            .iter()
            .filter(|tried| tried.verdict == PointVerdict::Invalid);
        invalid
            .filter(|tried| self.times_invalid(tried.participants) > 1)
            .min_by_key(|tried| tried.participants)
    }

    fn highest_pass(&self) -> Option<u32> {
        let passed = self
            .tried
            .iter()
            .filter(|tried| tried.verdict == PointVerdict::Pass);
        passed.map(|tried| tried.participants).max()
    }

    fn lowest_not_passed(&self) -> Option<u32> {
        let other =
            |tried: &&Tried| matches!(tried.verdict, PointVerdict::Fail | PointVerdict::Unsettled);
        self.tried
            .iter()
            .filter(other)
            .map(|tried| tried.participants)
            .min()
    }

    /// Returns the next step while nothing has failed: twice as many, or halfway to where the
    /// generator was the limit. `None` if there is nothing higher to try.
    fn growth(&self, highest: Option<u32>, limit: Option<&Tried>) -> Option<SearchStep> {
        let participants = match (highest, limit) {
            (None, None) => (self.max / FIRST_PART).max(1),
            (None, Some(limit)) if limit.participants == 1 => {
                let reasons = limit.reasons.clone();
                return Some(SearchStep::Done(KneeAnswer::NotMeasured { reasons }));
            }
            (None, Some(limit)) => limit.participants / 2,
            (Some(highest), None) if highest < self.max => highest.saturating_mul(2).min(self.max),
            (Some(highest), Some(limit)) if !close(highest, limit.participants) => {
                between(highest, limit.participants)
            }
            (Some(_), _) => return None,
        };
        let phase = SearchPhase::Grow;
        Some(SearchStep::Try(SearchPoint {
            participants,
            phase,
        }))
    }

    /// Returns the answer if the verdicts give one, else the most informative point.
    fn weighed(&self, highest: Option<u32>, limit: Option<&Tried>) -> SearchStep {
        let weights = self.weights();
        let outside = (1.0 - CONFIDENCE) / 2.0;
        // Just below a point where the generator was the limit, it may be the limit too.
        let top = match limit {
            None => self.max,
            Some(limit) => ((f64::from(limit.participants) / (1.0 + RESOLUTION)) as u32)
                .max(highest.unwrap_or(1)),
        };
        if weights.below(top) <= outside {
            let limit = limit.map_or(KneeLimit::Max, |limit| KneeLimit::Generator {
                at: limit.participants,
                reasons: limit.reasons.clone(),
            });
            return SearchStep::Done(KneeAnswer::AtLeast {
                participants: top,
                limit,
            });
        }
        if weights.below(1) >= 1.0 - outside {
            return SearchStep::Done(KneeAnswer::None);
        }
        let [low, middle, high] =
            [outside, 0.5, 1.0 - outside].map(|share| weights.quantile(share));
        let settled = f64::from(high - low) <= 2.0 * RESOLUTION * f64::from(middle);
        if settled || self.tried.len() >= POINTS_MAX {
            return SearchStep::Done(KneeAnswer::Capacity {
                participants: middle,
                low,
                high,
                settled,
            });
        }
        let even = |participants: &u32| (weights.pass(*participants) - 0.5).abs();
        let candidates = [middle, middle + 1].map(|participants| participants.clamp(1, top));
        let participants = candidates
            .into_iter()
            .min_by(|left, right| even(left).total_cmp(&even(right)))
            .expect("there are two");
        let apart = self
            .lowest_not_passed()
            .is_some_and(|lowest| !close(highest.unwrap_or(0), lowest));
        let phase = if apart
            && !self
                .tried
                .iter()
                .any(|tried| tried.participants == participants)
        {
            SearchPhase::Bisect
        } else {
            SearchPhase::Repeat
        };
        SearchStep::Try(SearchPoint {
            participants,
            phase,
        })
    }

    fn weights(&self) -> Weights<'_> {
        let weight = |less: f64| if less < -NEGLIGIBLE { 0.0 } else { less.exp() };
        let most = self
            .likelihood
            .iter()
            .flatten()
            .copied()
            .fold(f64::NEG_INFINITY, f64::max);
        let mut cells: Vec<[f64; SOFTNESS.len()]> = self
            .likelihood
            .iter()
            .map(|row| row.map(|cell| weight(cell - most)))
            .collect();
        let sum: f64 = cells.iter().flatten().sum();
        cells.iter_mut().flatten().for_each(|cell| *cell /= sum);
        Weights {
            capacities: &self.capacities,
            cells,
        }
    }
}

/// Weight of each capacity, by softness: how well it explains the verdicts. The weights sum to 1.
struct Weights<'a> {
    capacities: &'a [f64],
    cells: Vec<[f64; SOFTNESS.len()]>,
}

impl Weights<'_> {
    /// Returns the capacity at `share` of the weight, as a whole number of participants.
    fn quantile(&self, share: f64) -> u32 {
        let mut sum = 0.0;
        let found = self.capacities.iter().zip(&self.cells).find(|(_, row)| {
            sum += row.iter().sum::<f64>();
            sum >= share
        });
        let capacity = found.map_or_else(|| self.capacities.last(), |(capacity, _)| Some(capacity));
        capacity.expect("there are cells").exp() as u32
    }

    /// Returns the weight of all capacities below `participants`.
    fn below(&self, participants: u32) -> f64 {
        let load = f64::from(participants).ln();
        let rows = self
            .capacities
            .iter()
            .zip(&self.cells)
            .filter(|(capacity, _)| **capacity < load);
        rows.flat_map(|(_, row)| row).sum()
    }

    /// Returns the probability that a run with `participants` passes.
    fn pass(&self, participants: u32) -> f64 {
        let load = f64::from(participants).ln();
        let row = |(capacity, row): (&f64, &[f64; SOFTNESS.len()])| -> f64 {
            let each = SOFTNESS.iter().zip(row);
            let heavy = each.filter(|(_, weight)| **weight > 0.0);
            heavy
                .map(|(softness, weight)| weight * probability(capacity - load, *softness))
                .sum()
        };
        self.capacities.iter().zip(&self.cells).map(row).sum()
    }
}

/// Returns the probability that a point passes whose load is `reserve` (the difference of
/// logarithms) below the capacity.
fn probability(reserve: f64, softness: f64) -> f64 {
    CHANCE / 2.0 + (1.0 - CHANCE) / (1.0 + (-reserve / softness).exp())
}

fn close(low: u32, high: u32) -> bool {
    f64::from(high) <= f64::from(low) * (1.0 + RESOLUTION) || high <= low + 1
}

/// Returns the middle on a logarithmic scale, which is neither of the two. There must be a number
/// between them.
fn between(low: u32, high: u32) -> u32 {
    let middle = (f64::from(low) * f64::from(high)).sqrt() as u32;
    middle.clamp(low + 1, high - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seeded::Seeded;

    /// Model of a server that passes half of the runs with `capacity` participants, and of a
    /// generator that is the limit above `generator`.
    struct ModelServer {
        capacity: f64,
        softness: f64,
        /// Percentage of verdicts that are decided by chance.
        coin_percent: u64,
        generator: u32,
        seeded: Seeded,
    }

    impl ModelServer {
        fn hard(capacity: f64) -> ModelServer {
            ModelServer {
                capacity,
                softness: 1e-6,
                coin_percent: 0,
                generator: u32::MAX,
                seeded: Seeded::new(0),
            }
        }

        fn verdict(&mut self, participants: u32) -> PointVerdict {
            if participants > self.generator {
                return PointVerdict::Invalid;
            }
            let reserve = self.capacity.ln() - f64::from(participants).ln();
            let passes = if self.seeded.chance(self.coin_percent) {
                self.seeded.chance(50)
            } else {
                self.seeded.unit() < 1.0 / (1.0 + (-reserve / self.softness).exp())
            };
            if passes {
                PointVerdict::Pass
            } else {
                PointVerdict::Fail
            }
        }
    }

    fn run(max: u32, server: &mut ModelServer) -> (KneeAnswer, KneeSearch) {
        let mut search = KneeSearch::new(max);
        loop {
            match search.next() {
                SearchStep::Done(answer) => return (answer, search),
                SearchStep::Try(point) => {
                    assert!((1..=max).contains(&point.participants), "{point:?}");
                    let verdict = server.verdict(point.participants);
                    let reasons = match verdict {
                        PointVerdict::Pass => Vec::new(),
                        _ => vec![format!("{verdict:?} at {}", point.participants)],
                    };
                    search.take(point.participants, verdict, reasons);
                    assert!(search.tried().len() <= POINTS_MAX, "it ends");
                }
            }
        }
    }

    #[test]
    fn a_thousand_noisy_servers_are_found_within_five_per_cent_and_the_intervals_hold() {
        let (mut near, mut held, mut points) = (0, 0, Vec::new());
        for seed in 0..1_000 {
            let mut seeded = Seeded::new(seed);
            let capacity = 20.0 * 250f64.powf(seeded.unit());
            let max = (capacity * 1.2 * 10f64.powf(seeded.unit())) as u32;
            let mut server = ModelServer {
                capacity,
                softness: [1e-6, 0.005, 0.01, 0.02][seeded.below(4) as usize],
                coin_percent: [0, 0, 2][seeded.below(3) as usize],
                generator: u32::MAX,
                seeded,
            };
            let (answer, search) = run(max, &mut server);
            let KneeAnswer::Capacity {
                participants,
                low,
                high,
                ..
            } = answer
            else {
                panic!("seed {seed}: {answer:?} for {capacity} of {max}");
            };
            near += usize::from((f64::from(participants) / capacity - 1.0).abs() <= 0.05);
            held += usize::from((f64::from(low)..f64::from(high + 1)).contains(&capacity));
            points.push(search.tried().len());
        }
        points.sort_unstable();
        assert!(near >= 990, "{near} of 1,000 within 5 %");
        assert!(held >= 950, "{held} of 1,000 intervals hold the capacity");
        assert!(points[500] <= 20, "{} points in the middle", points[500]);
    }

    #[test]
    fn a_hard_edge_is_found_to_the_resolution() {
        for capacity in [1, 2, 3, 7, 31, 40, 63, 64, 65, 1_000, 4_321] {
            let (answer, search) = run(5_000, &mut ModelServer::hard(f64::from(capacity) + 0.5));
            let KneeAnswer::Capacity {
                participants,
                low,
                high,
                settled,
            } = answer
            else {
                panic!("{answer:?}");
            };
            assert!(
                settled && (low..=high).contains(&capacity),
                "{capacity}: {answer:?}"
            );
            let error = f64::from(participants.abs_diff(capacity));
            assert!(
                error <= RESOLUTION * f64::from(capacity),
                "{capacity}: {answer:?}"
            );
            let broke = search.broke_first().unwrap();
            assert!(
                broke.participants > capacity
                    && f64::from(broke.participants) <= 1.0 + 1.05 * f64::from(capacity),
                "{broke:?}"
            );
        }
    }

    #[test]
    fn it_grows_by_doubling_and_then_halves_what_is_left() {
        let (_, search) = run(1_600, &mut ModelServer::hard(1_000.5));
        let first: Vec<u32> = search
            .tried()
            .iter()
            .map(|tried| tried.participants)
            .take(5)
            .collect();
        assert_eq!(first, [100, 200, 400, 800, 1_600]);
        let next = search.tried()[5].participants;
        assert!((1_000..1_300).contains(&next), "{next}");
    }

    #[test]
    fn where_the_most_passes_the_answer_is_at_least_that() {
        for max in [1, 2, 15, 1_000] {
            let (answer, search) = run(max, &mut ModelServer::hard(5_000.0));
            let expected = KneeAnswer::AtLeast {
                participants: max,
                limit: KneeLimit::Max,
            };
            assert_eq!(answer, expected);
            assert_eq!(search.broke_first(), None);
        }
    }

    #[test]
    fn where_one_participant_fails_there_is_no_capacity() {
        for max in [1, 20, 1_000] {
            let (answer, search) = run(max, &mut ModelServer::hard(0.3));
            assert_eq!(answer, KneeAnswer::None, "{max}");
            assert_eq!(search.broke_first().unwrap().reasons.len(), 1);
        }
    }

    #[test]
    fn where_the_generator_is_the_limit_the_answer_says_so_and_what_was_seen_below() {
        let mut server = ModelServer {
            generator: 700,
            ..ModelServer::hard(5_000.0)
        };
        let (answer, _) = run(1_600, &mut server);
        let KneeAnswer::AtLeast {
            participants,
            limit: KneeLimit::Generator { at, reasons },
        } = answer
        else {
            panic!("{answer:?}");
        };
        assert!(
            (683..=700).contains(&participants) && (701..=718).contains(&at),
            "{participants} {at}"
        );
        assert_eq!(reasons, [format!("Invalid at {at}")]);
    }

    #[test]
    fn a_server_that_gives_out_before_the_generator_is_found_all_the_same() {
        let mut server = ModelServer {
            generator: 700,
            ..ModelServer::hard(500.5)
        };
        let (answer, _) = run(1_600, &mut server);
        assert!(
            matches!(
                answer,
                KneeAnswer::Capacity {
                    participants: 488..=512,
                    settled: true,
                    ..
                }
            ),
            "{answer:?}"
        );
    }

    #[test]
    fn a_generator_that_is_always_the_limit_measures_nothing() {
        let mut server = ModelServer {
            generator: 0,
            ..ModelServer::hard(500.5)
        };
        let (answer, _) = run(1_600, &mut server);
        let reasons = vec!["Invalid at 1".to_owned()];
        assert_eq!(answer, KneeAnswer::NotMeasured { reasons });
    }

    #[test]
    fn once_invalid_may_be_chance_and_is_tried_again() {
        let mut search = KneeSearch::new(100);
        let SearchStep::Try(first) = search.next() else {
            panic!()
        };
        search.take(first.participants, PointVerdict::Invalid, Vec::new());
        let again = SearchPoint {
            phase: SearchPhase::Repeat,
            ..first
        };
        assert_eq!(search.next(), SearchStep::Try(again));
        assert_eq!(
            search.next(),
            SearchStep::Try(again),
            "the same until a verdict is taken"
        );
        search.take(first.participants, PointVerdict::Pass, Vec::new());
        let SearchStep::Try(second) = search.next() else {
            panic!()
        };
        assert_eq!(second.participants, 2 * first.participants);
    }

    #[test]
    fn points_that_do_not_settle_end_the_search_at_them() {
        let mut search = KneeSearch::new(1_000);
        let answer = loop {
            match search.next() {
                SearchStep::Done(answer) => break answer,
                SearchStep::Try(point) => {
                    let verdict = match point.participants {
                        ..300 => PointVerdict::Pass,
                        300..320 => PointVerdict::Unsettled,
                        320.. => PointVerdict::Fail,
                    };
                    search.take(point.participants, verdict, Vec::new());
                }
            }
        };
        assert!(
            matches!(
                answer,
                KneeAnswer::Capacity {
                    participants: 298..=322,
                    settled: true,
                    ..
                }
            ),
            "{answer:?}"
        );
    }
}
