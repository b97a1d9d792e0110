//! Search for the largest number that holds: it doubles until something breaks, then halves the
//! gap.

/// Result of one point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PointHeld {
    Yes,
    No,
}

/// Knowledge of the limit so far, and the choice of the next point to try.
///
/// A point that broke is tried a second time before it counts, because on a shared host a single
/// failure may be caused by a neighbour.
#[derive(Debug)]
pub struct CalibrationSearch {
    start: u32,
    held: Option<u32>,
    broke: Option<u32>,
    suspect: Option<u32>,
}

/// Precision of the search: the gap between what held and what broke is at most this fraction (one
/// eighth) of what held.
const GAP_PARTS: u32 = 8;

impl CalibrationSearch {
    pub fn from(start: u32) -> CalibrationSearch {
        CalibrationSearch {
            start: start.max(1),
            held: None,
            broke: None,
            suspect: None,
        }
    }

    /// Returns the point to try. `None` if the limit is known closely enough, or if even less than
    /// the start breaks.
    pub fn next(&self) -> Option<u32> {
        match (self.suspect, self.held, self.broke) {
            (Some(suspect), ..) => Some(suspect),
            (None, None, None) => Some(self.start),
            (None, Some(held), None) => held.checked_mul(2),
            (None, None, Some(broke)) => Some(broke / 2).filter(|next| *next > self.start / 8),
            (None, Some(held), Some(broke)) => (broke - held > held / GAP_PARTS
                && broke - held > 1)
                .then(|| held + (broke - held) / 2),
        }
    }

    /// Returns whether a point has broken twice.
    pub fn has_broken(&self) -> bool {
        self.broke.is_some()
    }

    /// Takes the result of the point that [`CalibrationSearch::next`] returned.
    pub fn take(&mut self, point: u32, held: PointHeld) {
        match held {
            PointHeld::Yes => {
                self.suspect = None;
                self.held = Some(point);
            }
            PointHeld::No if self.suspect == Some(point) => {
                self.suspect = None;
                self.broke = Some(point);
            }
            PointHeld::No => self.suspect = Some(point),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tries points until the search is done. Returns the last point that held and the number of
    /// tries.
    fn searched(start: u32, held: impl Fn(u32, usize) -> bool) -> (Option<u32>, usize) {
        let mut search = CalibrationSearch::from(start);
        for tries in 0..100 {
            let Some(point) = search.next() else {
                return (search.held, tries);
            };
            search.take(
                point,
                if held(point, tries) {
                    PointHeld::Yes
                } else {
                    PointHeld::No
                },
            );
        }
        panic!("no end");
    }

    #[test]
    fn a_limit_is_found_to_an_eighth_from_below() {
        for limit in [60, 99, 100, 101, 777, 5_000, 123_456] {
            let (held, tries) = searched(100, |point, _| point <= limit);
            let held = held.unwrap();
            assert!(
                held <= limit && limit - held <= held / GAP_PARTS + 1,
                "{held} of {limit}"
            );
            assert!(tries < 24, "{tries} tries for {limit}");
        }
    }

    #[test]
    fn a_single_failure_is_not_believed() {
        // Every point breaks the first time, as on a host with a noisy neighbour.
        let seen = std::cell::RefCell::new(std::collections::HashSet::new());
        let (held, _) = searched(100, |point, _| {
            !seen.borrow_mut().insert(point) && point <= 1_000
        });
        assert!((800..=1_000).contains(&held.unwrap()));
    }

    #[test]
    fn where_nothing_holds_the_search_ends() {
        assert_eq!(searched(100, |_, _| false).0, None);
    }
}
