//! Figures of the generator and its host in one second. They explain stalls and show which runs are
//! invalid.

use crate::units::Time;

/// One row of figures. `None` is unknown, which is not zero.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Second {
    /// Start of the row on the run's clock; `to` is its end.
    #[serde(skip)]
    pub from: Time,
    #[serde(skip)]
    pub to: Time,
    /// Number of media packets received, over all subscriptions.
    #[serde(skip)]
    pub media_packets: u64,
    /// Largest lateness of a tick on any engine thread.
    pub tick_late_us_max: Option<u64>,
    /// Largest delay of a frame behind its slot.
    pub send_lag_us_max: Option<u64>,
    /// Largest lateness of a tick on the bare timer thread.
    pub floor_late_us_max: Option<u64>,
    pub frames_skipped: u64,
    /// Share of a core that the busiest engine thread used.
    pub engine_busy: Option<f64>,
    /// Time that one engine thread waited for a CPU, in total; the largest of all engine threads.
    pub run_queue_us_max: Option<u64>,
    /// Cores that the embedded SFU's threads in this process kept busy; `None` if there are none.
    pub embedded_sfu_cores: Option<f64>,
    /// CPU time that the hypervisor took, over all CPUs.
    pub steal_us: Option<u64>,
    /// Time for which this process's control group was throttled.
    pub throttled_us: Option<u64>,
    pub drops: HostDrops,
    pub softnet_squeezed: Option<u64>,
}

impl Second {
    /// Returns the seconds of the run, counted from 0, that this row covers. Engine threads report
    /// each second at its end; the row has the seconds that ended while it was open.
    pub fn whole_seconds(&self) -> impl Iterator<Item = u64> + use<> {
        let ended_by = |time: Time| time.as_millis() / 1_000;
        let before = self.from.as_millis().div_ceil(1_000).saturating_sub(1);
        before..ended_by(self.to)
    }

    pub fn covers(&self, second: u64) -> bool {
        self.whole_seconds().any(|covered| covered == second)
    }
}

/// Datagrams that this host dropped, by place. All counters except `sockets` also include drops of
/// other programs on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct HostDrops {
    /// Receive buffers of our own media sockets (`SO_RXQ_OVFL`, at the end `SO_MEMINFO`).
    pub sockets: Option<u64>,
    /// Receive buffers of all UDP sockets (`RcvbufErrors`), including ours.
    pub udp_receive_buffer: Option<u64>,
    /// Send buffers of all UDP sockets (`SndbufErrors`).
    pub udp_send_buffer: Option<u64>,
    /// Other datagrams that UDP refused on arrival (`InErrors` without `RcvbufErrors`), mostly
    /// because of bad checksums.
    pub udp_receive_other: Option<u64>,
    /// Queue in front of the protocols (`softnet_stat`).
    pub softnet: Option<u64>,
    pub interfaces_receive: Option<u64>,
    pub interfaces_send: Option<u64>,
    /// Queueing disciplines of all interfaces, including `netem`.
    pub queueing: Option<u64>,
}

impl HostDrops {
    /// Returns the drops with the name of each place, in the order of the receive path.
    pub fn places(&self) -> [(&'static str, Option<u64>); 8] {
        [
            ("our sockets", self.sockets),
            (
                "all UDP sockets of this host (RcvbufErrors)",
                self.udp_receive_buffer,
            ),
            (
                "UDP send buffers of this host (SndbufErrors)",
                self.udp_send_buffer,
            ),
            (
                "UDP, for bad checksums and the like (InErrors)",
                self.udp_receive_other,
            ),
            ("the softnet queues of this host", self.softnet),
            (
                "interfaces of this host, on receiving",
                self.interfaces_receive,
            ),
            ("interfaces of this host, on sending", self.interfaces_send),
            ("queueing disciplines of this host", self.queueing),
        ]
    }

    /// Returns what was dropped since `earlier`. The difference is unknown if either value is
    /// unknown.
    #[must_use]
    pub fn since(&self, earlier: &HostDrops) -> HostDrops {
        // An interface's or a discipline's counters disappear with it. A smaller sum than before
        // means that one is gone.
        let grown = |now: Option<u64>, before: Option<u64>| now?.checked_sub(before?);
        HostDrops {
            sockets: grown(self.sockets, earlier.sockets),
            udp_receive_buffer: grown(self.udp_receive_buffer, earlier.udp_receive_buffer),
            udp_send_buffer: grown(self.udp_send_buffer, earlier.udp_send_buffer),
            udp_receive_other: grown(self.udp_receive_other, earlier.udp_receive_other),
            softnet: grown(self.softnet, earlier.softnet),
            interfaces_receive: grown(self.interfaces_receive, earlier.interfaces_receive),
            interfaces_send: grown(self.interfaces_send, earlier.interfaces_send),
            queueing: grown(self.queueing, earlier.queueing),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_about_the_seconds_that_ended_while_it_was_open() {
        for (from_ms, to_ms, expected) in [
            (0, 1_050, &[0][..]),
            (12_050, 13_051, &[12]),
            // A stall of two seconds, and the row after it.
            (12_050, 14_990, &[12, 13]),
            (14_990, 16_050, &[14, 15]),
            (3_050, 3_700, &[]),
        ] {
            let row = Second {
                from: Time::from_millis(from_ms),
                to: Time::from_millis(to_ms),
                ..Second::default()
            };
            assert_eq!(
                row.whole_seconds().collect::<Vec<_>>(),
                expected,
                "{from_ms}-{to_ms}"
            );
            assert!(expected.iter().all(|second| row.covers(*second)) && !row.covers(99));
        }
    }

    #[test]
    fn a_difference_of_the_unknown_is_unknown_and_so_is_one_that_runs_backwards() {
        let reading = |softnet, queueing| HostDrops {
            softnet,
            queueing,
            ..HostDrops::default()
        };
        let grown = reading(Some(9), Some(2)).since(&reading(Some(4), Some(3)));
        assert_eq!(
            (grown.softnet, grown.queueing, grown.sockets),
            (Some(5), None, None)
        );
    }
}
