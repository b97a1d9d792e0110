//! Due times of many slots. A binary heap that knows the position of each slot, so setting or
//! removing one takes time logarithmic in the number of slots that are set, however many others
//! exist. It allocates only when it grows.

use crate::units::Time;

/// Position of a slot that is not in the heap.
const NOWHERE: u32 = u32::MAX;

/// Due times by slot. Among equal times the lower slot comes first.
#[derive(Default)]
pub struct DueQueue {
    heap: Vec<(Time, u32)>,
    /// Position of each slot in the heap.
    places: Vec<u32>,
    /// Number of entries compared, for tests of what a call costs.
    #[cfg(test)]
    looked_at: u64,
}

impl DueQueue {
    /// Sets or changes the due time of a slot. [`Time::MAX`] clears it.
    pub fn set(&mut self, slot: u32, at: Time) {
        if self.places.len() <= slot as usize {
            self.places.resize(slot as usize + 1, NOWHERE);
            let count = self.places.len();
            self.heap.reserve(count.saturating_sub(self.heap.len()));
        }
        match (self.places[slot as usize], at) {
            (NOWHERE, Time::MAX) => {}
            (NOWHERE, _) => {
                self.heap.push((at, slot));
                self.rise(self.heap.len() - 1);
            }
            (place, Time::MAX) => self.remove(place as usize),
            (place, _) => {
                self.heap[place as usize].0 = at;
                self.rise(place as usize);
                self.sink(self.places[slot as usize] as usize);
            }
        }
    }

    /// Returns the earliest due time; [`Time::MAX`] if none is set.
    pub fn next_at(&self) -> Time {
        self.heap.first().map_or(Time::MAX, |(at, _)| *at)
    }

    /// Removes and returns the next slot that is due.
    pub fn pop_due(&mut self, now: Time) -> Option<u32> {
        let (_, slot) = *self.heap.first().filter(|(at, _)| *at <= now)?;
        self.remove(0);
        Some(slot)
    }

    fn remove(&mut self, place: usize) {
        let (_, slot) = self.heap.swap_remove(place);
        self.places[slot as usize] = NOWHERE;
        if let Some((_, moved)) = self.heap.get(place).copied() {
            self.places[moved as usize] = place as u32;
            self.rise(place);
            self.sink(self.places[moved as usize] as usize);
        }
    }

    fn rise(&mut self, mut place: usize) {
        while place > 0 && self.is_before(place, (place - 1) / 2) {
            self.swap(place, (place - 1) / 2);
            place = (place - 1) / 2;
        }
        self.note(place);
    }

    fn sink(&mut self, mut place: usize) {
        loop {
            let (left, right) = (2 * place + 1, 2 * place + 2);
            let mut first = place;
            if left < self.heap.len() && self.is_before(left, first) {
                first = left;
            }
            if right < self.heap.len() && self.is_before(right, first) {
                first = right;
            }
            if first == place {
                break;
            }
            self.swap(place, first);
            place = first;
        }
        self.note(place);
    }

    fn is_before(&mut self, one: usize, other: usize) -> bool {
        #[cfg(test)]
        {
            self.looked_at += 1;
        }
        self.heap[one] < self.heap[other]
    }

    fn swap(&mut self, one: usize, other: usize) {
        self.heap.swap(one, other);
        self.note(one);
        self.note(other);
    }

    fn note(&mut self, place: usize) {
        let (_, slot) = self.heap[place];
        self.places[slot as usize] = place as u32;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::seeded::scatter;

    #[test]
    fn one_that_is_due_among_ten_thousand_costs_no_look_at_the_others() {
        let mut due = DueQueue::default();
        let later = Time::from_millis(60_000);
        for slot in 0..10_000 {
            due.set(
                slot,
                later + Duration::from_micros(scatter(u64::from(slot)) % 1_000),
            );
        }
        due.looked_at = 0;
        for round in 1..=1_000 {
            let now = Time::from_millis(round);
            due.set(7_777, now);
            assert_eq!(due.next_at(), now);
            assert_eq!(due.pop_due(now), Some(7_777));
            assert_eq!(due.pop_due(now), None);
        }
        // Raise, lower and remove: a few comparisons for each of 14 levels.
        assert!(due.looked_at < 1_000 * 14 * 4, "{}", due.looked_at);
    }

    #[test]
    fn a_seeded_mix_of_sets_clears_and_takes_agrees_with_a_plain_list() {
        const SLOTS: u64 = 50;
        let (mut due, mut plain) = (DueQueue::default(), [Time::MAX; SLOTS as usize]);
        let mut now = Time::ZERO;
        for step in 0..20_000u64 {
            let draw = scatter(step);
            let (slot, clears) = (draw % SLOTS, draw >> 60 == 0);
            let at = if clears {
                Time::MAX
            } else {
                now + Duration::from_micros(draw >> 32 & 0xFFF)
            };
            due.set(slot as u32, at);
            plain[slot as usize] = at;
            let first = plain.iter().copied().min().unwrap_or(Time::MAX);
            assert_eq!(due.next_at(), first, "step {step}");
            now += Duration::from_micros(draw >> 20 & 0xFF);
            while let Some(taken) = due.pop_due(now) {
                let (at, slot) = (0..).zip(plain).map(|(slot, at)| (at, slot)).min().unwrap();
                assert_eq!((taken, at <= now), (slot, true), "step {step}");
                plain[slot as usize] = Time::MAX;
            }
            assert!(plain.iter().all(|at| *at > now), "step {step}");
        }
    }
}
