//! Counters and histograms of a run: one cumulative, mergeable [`Record`], filled per shard and
//! merged afterwards.
//!
//! Names are those of the report (`throng-report/1`). Intervals are differences of cumulative
//! values.

mod histogram;
pub mod presence;
pub mod second;
pub mod serial;
pub mod stalls;
pub mod wire;

pub use histogram::Histogram;

/// Declares a struct of named counters and histograms with merge, difference and iteration by name.
macro_rules! stats {
    ($(#[$doc:meta])* $name:ident {
        counters { $($(#[$cdoc:meta])* $counter:ident),* $(,)? }
        histograms { $($(#[$hdoc:meta])* $histogram:ident),* $(,)? }
        $(scores { $($(#[$sdoc:meta])* $score:ident),* $(,)? })?
    }) => {
        $(#[$doc])*
        #[derive(Clone, Default)]
        pub struct $name {
            $($(#[$cdoc])* pub $counter: u64,)*
            $($(#[$hdoc])* pub $histogram: Histogram,)*
            $($($(#[$sdoc])* pub $score: Histogram,)*)?
        }

        impl $name {
            pub const COUNTERS: &'static [&'static str] = &[$(stringify!($counter)),*];
            pub const HISTOGRAMS: &'static [&'static str] = &[$(stringify!($histogram)),*];
            /// Histograms in thousandths of a score; a lower score is worse.
            pub const SCORES: &'static [&'static str] = &[$($(stringify!($score)),*)?];

            /// Adds the counts of `other`.
            pub fn merge(&mut self, other: &$name) {
                // A delta can be negative (a packet thought lost arrives), so sums wrap until they
                // are complete.
                $(self.$counter = self.$counter.wrapping_add(other.$counter);)*
                $(self.$histogram.merge(&other.$histogram);)*
                $($(self.$score.merge(&other.$score);)*)?
            }

            /// Makes the record empty again and keeps its memory.
            pub fn clear(&mut self) {
                $(self.$counter = 0;)*
                $(self.$histogram.clear();)*
                $($(self.$score.clear();)*)?
            }

            /// Returns what was counted since `earlier`, an older state of the same cumulative
            /// record.
            pub fn since(&self, earlier: &$name) -> $name {
                $name {
                    $($counter: self.$counter.saturating_sub(earlier.$counter),)*
                    $($histogram: self.$histogram.since(&earlier.$histogram),)*
                    $($($score: self.$score.since(&earlier.$score),)*)?
                }
            }

            pub fn counters(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($counter), self.$counter)),*].into_iter()
            }

            pub fn histograms(&self) -> impl Iterator<Item = (&'static str, &Histogram)> {
                [$((stringify!($histogram), &self.$histogram)),*].into_iter()
            }

            pub fn scores(&self) -> impl Iterator<Item = (&'static str, &Histogram)> {
                [$($((stringify!($score), &self.$score)),*)?].into_iter()
            }
        }

        impl wire::Named for $name {
            fn counter_mut(&mut self, name: &str) -> Option<&mut u64> {
                $(if name == stringify!($counter) {
                    return Some(&mut self.$counter);
                })*
                None
            }

            fn histogram_mut(&mut self, name: &str) -> Option<&mut Histogram> {
                $(if name == stringify!($histogram) {
                    return Some(&mut self.$histogram);
                })*
                $($(if name == stringify!($score) {
                    return Some(&mut self.$score);
                })*)?
                None
            }
        }
    };
}

stats! {
    /// Counters and histograms of participants and connections.
    Session {
        counters {
            joins_planned, joins_ok, joins_failed, joins_retried, participants_healthy, participants_total,
            disconnects, reconnects_ok, reconnects_failed,
            nacks_sent, nacks_received, plis_sent, plis_received,
            wire_bytes_sent, wire_bytes_received, host_drops, frames_misrouted,
            /// Speaker updates received from the server.
            speaker_updates,
            /// Datagrams that no parser accepted: unknown SSRC, broken header, failed
            /// authentication, replay.
            packets_rejected,
            /// Signalling messages from the server that cannot be read. They are skipped.
            signal_malformed,
            /// Datagrams that the network or the server did not take, by the error that the kernel
            /// gives (`path::Unsent`).
            sends_refused, sends_unreachable, sends_blocked, sends_too_long, sends_mismatched,
            sends_backlogged,
            /// Joins by the transport that carried their media.
            joins_by_udp, joins_by_tcp, joins_by_turn_udp, joins_by_turn_tcp, joins_by_turn_tls,
        }
        histograms {
            join, signal_connect, signal_join, ice, dtls, first_media, rtt_stun, rtt_rtcp, rtt_signal, reconnect,
        }
    }
}

stats! {
    /// Counters and histograms of one kind of media. Packets and bytes count RTP media without
    /// retransmissions.
    Media {
        counters {
            tracks_published, tracks_expected, tracks_live,
            packets_sent, packets_received, bytes_sent, bytes_received, rtx_sent, rtx_received,
            packets_lost_network, packets_repaired, packets_lost, packets_duplicate, packets_reordered, uplink_packets_lost,
            uplink_packets_asked, packets_missing_uplink,
            frames_sent, frames_expected, frames_delivered, frames_late, frames_duplicate,
            /// Delivered frames whose latency is unknown: another host sent them, and its clock is
            /// not known here.
            frames_untimed,
            /// Audio with redundancy (RED): packets that contained it; lost packets whose payload
            /// came in another packet; frames that were delivered only by such packets.
            packets_received_red, packets_recovered_red, frames_recovered,
            /// Frames that were expected and not delivered, by the place where they were lost.
            frames_lost_source, frames_lost_uplink, frames_lost_sfu, frames_lost_downlink, frames_lost_unattributed,
            /// Media that no participant of this run sends: tracks that were expected and tracks
            /// that came, their packets (the counters above include them), and whole frames.
            foreign_tracks_expected, foreign_tracks_live,
            foreign_packets_received, foreign_packets_lost_network, foreign_packets_lost, foreign_frames,
            key_frames_sent, freezes,
            /// Counters of the playout model.
            frames_late_for_playout, played_us, concealed_us,
        }
        histograms {
            track_subscribe, first_packet, first_frame, one_way_latency, jitter, frame_interval, freeze, loss_to_repair,
            pli_received_to_key_sent, pli_sent_to_key_received, layer_switch,
            /// From the intended join to the first whole frame of a foreign track.
            foreign_first_frame,
            /// From the time in a foreign frame's trailer (`LKTS`) to the arrival of its last
            /// packet.
            foreign_one_way_latency,
            /// Delay by the playout model.
            playout_delay,
        }
        scores {
            /// Score by the E-model, one value for each stream.
            mos,
        }
    }
}

stats! {
    /// Reports and actions of congestion control, for the media that we receive and the media that
    /// we send.
    Bandwidth {
        counters {
            transport_cc_sent, transport_cc_received, remb_sent, remb_received,
            /// Sum of the estimates in `remb_sent`, in kbit/s.
            remb_sent_kbps,
            /// Server's changes to the tracks that we receive.
            tracks_paused, tracks_resumed, layers_stepped_down, layers_stepped_up,
            /// Packets that we sent and that did not arrive, according to transport-wide feedback.
            uplink_packets_missing,
            /// Number of estimates that publishers made, one for each connection and second, and
            /// their sum in kbit/s.
            uplink_estimates, uplink_estimate_kbps,
            /// Actions of publishers that obey their estimate.
            layers_dropped, layers_returned, layer_limited_ms, probes_sent, probe_packets_sent,
        }
        histograms { track_pause }
    }
}

stats! {
    /// Generator's observations of itself.
    Engine {
        counters {
            packets_processed, send_slots_skipped, send_errors, receive_errors, setup_datagrams_dropped,
            ticks_missed,
        }
        histograms {
            tick_late, send_lag,
        }
    }
}

/// Everything that one shard, one host or one run has counted so far.
#[derive(Clone, Default)]
pub struct Record {
    pub session: Session,
    pub audio: Media,
    pub video: Media,
    pub bandwidth: Bandwidth,
    pub engine: Engine,
}

impl Record {
    pub fn merge(&mut self, other: &Record) {
        self.session.merge(&other.session);
        self.audio.merge(&other.audio);
        self.video.merge(&other.video);
        self.bandwidth.merge(&other.bandwidth);
        self.engine.merge(&other.engine);
    }

    /// Makes the record empty again and keeps its memory.
    pub fn clear(&mut self) {
        self.session.clear();
        self.audio.clear();
        self.video.clear();
        self.bandwidth.clear();
        self.engine.clear();
    }

    pub fn since(&self, earlier: &Record) -> Record {
        Record {
            session: self.session.since(&earlier.session),
            audio: self.audio.since(&earlier.audio),
            video: self.video.since(&earlier.video),
            bandwidth: self.bandwidth.since(&earlier.bandwidth),
            engine: self.engine.since(&earlier.engine),
        }
    }

    pub fn media(&mut self, kind: Kind) -> &mut Media {
        match kind {
            Kind::Audio => &mut self.audio,
            Kind::Video => &mut self.video,
        }
    }
}

/// Returns whether this version fills a counter of the session (`None`) or of one kind of media. A
/// counter that is not filled is unknown, which is not 0.
pub fn is_measured(kind: Option<Kind>, counter: &str) -> bool {
    match kind {
        // A late picture is shown late, so nothing is concealed. No video codec has redundancy.
        Some(Kind::Video) => !matches!(
            counter,
            "played_us"
                | "concealed_us"
                | "packets_received_red"
                | "packets_recovered_red"
                | "frames_recovered"
        ),
        None | Some(Kind::Audio) => true,
    }
}

/// The two kinds of media, as SDP's m-lines name them.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Audio,
    Video,
}

impl Kind {
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Audio => "audio",
            Kind::Video => "video",
        }
    }
}

/// Moments of one participant's join, on the run's clock. `None` means that it never happened, or
/// does not apply.
#[derive(Clone, Copy, Debug, Default)]
pub struct JoinTimeline {
    pub intended: crate::units::Time,
    pub started: Option<crate::units::Time>,
    pub signal_connected: Option<crate::units::Time>,
    pub signal_joined: Option<crate::units::Time>,
    pub ice_connected: Option<crate::units::Time>,
    pub dtls_connected: Option<crate::units::Time>,
    pub joined: Option<crate::units::Time>,
    pub first_media: Option<crate::units::Time>,
}
