//! What the generator and its host did in one second: the figures by which stalls are explained,
//! and runs are found invalid.

use crate::units::Time;

/// One row. `None` is unknown, which is not zero.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Second {
    /// From when to when, on the run's clock.
    #[serde(skip)]
    pub from: Time,
    #[serde(skip)]
    pub to: Time,
    /// Media packets that came, of all subscriptions.
    #[serde(skip)]
    pub media_packets: u64,
    /// The latest beat of any engine thread.
    pub tick_late_us_max: Option<u64>,
    /// The frame that left latest behind its slot.
    pub send_lag_us_max: Option<u64>,
    /// The latest beat of the bare timer thread.
    pub floor_late_us_max: Option<u64>,
    pub frames_skipped: u64,
    /// The busiest engine thread's share of a core.
    pub engine_busy: Option<f64>,
    /// The longest that an engine thread waited for a CPU, in sum.
    pub run_queue_us_max: Option<u64>,
    /// Cores that the embedded SFU's threads in this process kept busy; `None` where there are
    /// none.
    pub embedded_sfu_cores: Option<f64>,
    /// Taken by the hypervisor, over all CPUs.
    pub steal_us: Option<u64>,
    /// For which this process's control group was kept from running.
    pub throttled_us: Option<u64>,
    pub drops: HostDrops,
    pub softnet_squeezed: Option<u64>,
}

impl Second {
    /// The seconds of the run, counted from 0, that this row is about: engine threads report each
    /// at its end, and the row has those that came while it was open.
    pub fn whole_seconds(&self) -> impl Iterator<Item = u64> + use<> {
        let ended_by = |time: Time| time.as_millis() / 1_000;
        let before = self.from.as_millis().div_ceil(1_000).saturating_sub(1);
        before..ended_by(self.to)
    }

    pub fn covers(&self, second: u64) -> bool {
        self.whole_seconds().any(|covered| covered == second)
    }
}

/// Datagrams that this host dropped, by place. All but `sockets` count whatever else the host does,
/// too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct HostDrops {
    /// Our own media sockets' receive buffers (`SO_RXQ_OVFL`, at the end `SO_MEMINFO`).
    pub sockets: Option<u64>,
    /// All UDP sockets' receive buffers (`RcvbufErrors`): ours are in it.
    pub udp_receive_buffer: Option<u64>,
    /// All UDP sockets' send buffers (`SndbufErrors`).
    pub udp_send_buffer: Option<u64>,
    /// What else UDP refused on arrival (`InErrors` without `RcvbufErrors`): bad checksums,
    /// mostly.
    pub udp_receive_other: Option<u64>,
    /// The queue before the protocols (`softnet_stat`).
    pub softnet: Option<u64>,
    pub interfaces_receive: Option<u64>,
    pub interfaces_send: Option<u64>,
    /// Queueing disciplines of all interfaces, `netem` among them.
    pub queueing: Option<u64>,
}

impl HostDrops {
    /// By name, in the order of the way in.
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

    /// What was dropped since `earlier`; unknown where either is.
    #[must_use]
    pub fn since(&self, earlier: &HostDrops) -> HostDrops {
        // Counters of interfaces and disciplines go with them: fewer than before means that one is
        // gone.
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
            // A stall of two seconds, and what comes after it.
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
