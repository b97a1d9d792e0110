//! Chooses the layer of a track that a subscriber gets: the highest layer that is sent and not
//! above the wanted one, otherwise the lowest that is sent.

use std::time::Duration;

use super::Selection;
use crate::units::Time;

/// Interval at which layers are checked for being sent (LiveKit's value).
pub const ACTIVITY_WINDOW: Duration = Duration::from_millis(500);
/// Least number of packets in a window for a layer above the lowest to count as sent (LiveKit's
/// value).
const PACKETS_MIN: u32 = 5;

/// Whether one layer is being sent.
#[derive(Clone, Copy, Debug, Default)]
pub struct LayerActivity {
    active: bool,
    packets: u32,
}

impl LayerActivity {
    pub fn is_active(&self) -> bool {
        self.active
    }

    /// Counts a packet. Returns whether the layer has become active with it.
    pub fn handle_packet(&mut self, layer: usize) -> bool {
        self.packets += 1;
        let starts = !self.active && self.packets >= needed(layer);
        self.active |= starts;
        starts
    }

    /// Ends a window. Returns whether the layer has become inactive.
    pub fn close_window(&mut self, layer: usize) -> bool {
        let stops = self.active && self.packets < needed(layer);
        self.active &= !stops;
        self.packets = 0;
        stops
    }
}

fn needed(layer: usize) -> u32 {
    if layer == 0 { 1 } else { PACKETS_MIN }
}

/// When a track's layers are checked first; never for a track with one layer, which has nothing to
/// choose.
pub fn first_window(layers: usize, now: Time) -> Time {
    if layers > 1 {
        now + ACTIVITY_WINDOW
    } else {
        Time::MAX
    }
}

/// The layer to send. `None` if none is wanted, or if there are several and none is being sent.
pub fn choose(
    selection: Selection,
    layers: usize,
    is_active: impl Fn(usize) -> bool,
) -> Option<u8> {
    if !selection.enabled {
        return None;
    }
    if layers == 1 {
        return Some(0);
    }
    let wanted = usize::from(selection.layer).min(layers - 1);
    let below = (0..=wanted).rev().find(|layer| is_active(*layer));
    below
        .or_else(|| (wanted + 1..layers).find(|layer| is_active(*layer)))
        .map(|layer| layer as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_layer_up_to_the_wanted_one_is_chosen_else_the_lowest_above_it() {
        let wants = |layer| Selection {
            enabled: true,
            layer,
        };
        for (wanted, active, expected) in [
            (2, [true, true, true], Some(2)),
            (2, [true, true, false], Some(1)),
            (1, [true, true, true], Some(1)),
            (0, [false, true, true], Some(1)),
            (0, [false, false, true], Some(2)),
            (9, [true, false, false], Some(0)),
            (1, [false, false, false], None),
        ] {
            assert_eq!(
                choose(wants(wanted), 3, |layer| active[layer]),
                expected,
                "{wanted} {active:?}"
            );
        }
        assert_eq!(
            choose(wants(2), 1, |_| false),
            Some(0),
            "one layer is no choice"
        );
        let disabled = Selection {
            enabled: false,
            layer: 2,
        };
        assert_eq!(choose(disabled, 3, |_| true), None);
        assert_eq!(choose(disabled, 1, |_| true), None);
    }

    #[test]
    fn a_layer_is_active_while_every_window_holds_enough_packets() {
        let mut high = LayerActivity::default();
        assert!(
            (0..4).all(|_| !high.handle_packet(2))
                && high.handle_packet(2)
                && !high.handle_packet(2)
        );
        assert!(high.is_active() && !high.close_window(2));
        (0..4).for_each(|_| assert!(!high.handle_packet(2)));
        assert!(high.close_window(2) && !high.is_active() && !high.close_window(2));
        let mut low = LayerActivity::default();
        assert!(low.handle_packet(0) && !low.close_window(0));
        assert!(low.close_window(0));
    }
}
