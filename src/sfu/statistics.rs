//! Counts of a router: plain cumulative numbers that can be merged over routers. Tests check the
//! other side against them, and a metrics page shows them.

use crate::transport::rtp::Ssrc;
use std::time::Duration;

use super::SubscriptionId;
use crate::transport::receive::ReceiveCounts;

/// Declares the counters, their sum and their names.
macro_rules! counters {
    ($(#[$doc:meta])* $name:ident { $($(#[$cdoc:meta])* $counter:ident),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name {
            $($(#[$cdoc])* pub $counter: u64,)*
        }

        impl $name {
            /// Adds the counts of `other`.
            pub fn merge(&mut self, other: &$name) {
                $(self.$counter += other.$counter;)*
            }

            /// All counters by name.
            pub fn counters(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($counter), self.$counter)),*].into_iter()
            }
        }
    };
}

counters! {
    /// Cumulative counts of one router, or of several merged. Bytes are those of UDP payloads.
    ///
    /// Every received datagram is counted once more by its outcome: `datagrams_in` is the sum of
    /// `setup_in`, `rtcp_in`, `media_in`, `repairs_in`, `probes_in` and all `refused_*`.
    RouterStatistics {
        datagrams_in,
        bytes_in,
        datagrams_out,
        bytes_out,
        /// STUN and DTLS datagrams that a connection accepted.
        setup_in,
        setup_out,
        rtcp_in,
        rtcp_out,
        /// RTP on a media SSRC that was accepted for the first time, including retransmissions
        /// without RTX and padding.
        media_in,
        media_bytes_in,
        /// Part of `media_in` with nothing to forward: padding only, or a payload type that was not
        /// agreed on.
        media_in_empty,
        /// Retransmissions (RFC 4588) that filled a gap.
        repairs_in,
        repair_bytes_in,
        /// Retransmission packets without a payload: bandwidth probes.
        probes_in,
        /// RTP sent to subscribers for the first time.
        media_out,
        media_bytes_out,
        /// Sends that carried `media_out`: one for each packet, or with segmentation one for each
        /// burst.
        media_sends_out,
        /// Part of `media_out` that was withheld at first, and sent once its key frame had begun.
        media_out_recalled,
        /// Retransmissions sent, over RTX or on the media's own SSRC.
        resends_out,
        resend_bytes_out,
        /// Messages received on data channels.
        data_in,
        /// Messages forwarded, counted once for each receiver.
        data_out,
        /// Messages refused, because they cannot be read or their sender may not publish data.
        data_refused,
        /// Copies that a participant did not get, because it has no such channel or does not read
        /// it.
        data_dropped,

        /// Datagrams from an address that no authentic check has come from.
        refused_unknown_address,
        /// Datagrams that are neither STUN, DTLS, RTP nor RTCP.
        refused_unknown_kind,
        /// STUN for an unknown user name. The latest are kept for a moment, for a connection that
        /// is about to be added.
        refused_unknown_ufrag,
        /// STUN or DTLS that its connection did not accept: a wrong password, a broken record, a
        /// session that has ended.
        refused_setup,
        /// Media or RTCP that came before the keys.
        refused_unkeyed,
        /// Packets with an inconsistent header, padding count or RTX payload.
        refused_malformed,
        /// Packets with an SSRC that no description names, and no mid or rid that identifies it.
        refused_unknown_ssrc,
        refused_unauthentic,
        /// Packets seen before, by SRTP's own index.
        refused_replayed,
        /// Packets that are new to SRTP, with a payload that was received before: a needless
        /// retransmission, or an original after its repair.
        refused_duplicate,
        /// Packets too far behind the newest, or after a jump that no second packet has confirmed.
        refused_too_old,

        /// Packets that a subscriber did not get because it disabled the track, or the publisher
        /// muted it.
        withheld_disabled,
        /// Packets withheld because the subscriber's connection is not up.
        withheld_unconnected,
        /// Packets withheld because the subscriber gets, or waits for, another layer.
        withheld_layer,
        /// Packets withheld because no key frame has come yet.
        withheld_key_frame,
        /// Packets withheld because they are empty: padding only, or a payload type that was not
        /// agreed on. They leave no gap in the numbers.
        withheld_empty,
        /// Packets withheld because they came too late to have a number in the subscriber's stream.
        withheld_late,

        /// NACK messages, and the sequence numbers in them.
        nacks_in,
        nacked_in,
        nacks_out,
        nacked_out,
        /// Requested numbers that were not answered because they were never sent, or are no longer
        /// kept.
        resends_unknown,
        /// Requested numbers sent so recently that the last copy may still be on its way.
        resends_too_soon,
        /// Requested numbers that were already sent as often as allowed.
        resends_exhausted,
        plis_in,
        firs_in,
        plis_out,
        transport_feedbacks_out,
        receiver_reports_out,
        sender_reports_out,
        /// Inconsistent RTCP packets.
        rtcp_malformed,

        /// Commands about something that is gone or impossible. Races between the halves cause
        /// some.
        commands_refused,
        /// Datagrams that the kernel did not accept.
        send_errors,
        /// Errors that the socket returned in place of datagrams: ICMP errors about datagrams that
        /// we sent, except those for closed ports.
        receive_errors,
        /// Datagrams that the socket dropped because its buffer was full.
        socket_drops,
        /// Datagrams for TCP connections that their client does not read, or that are gone.
        stream_drops,
        /// Media packets above the limit that a test set.
        limit_drops,

        transports,
        transports_connected,
        tracks,
        subscriptions,
    }
}

/// One published encoding, as its receiver (the router) saw it.
#[derive(Clone, Copy, Debug)]
pub struct EncodingStatistics {
    /// `None` until its first packet.
    pub ssrc: Option<Ssrc>,
    pub counts: ReceiveCounts,
    pub jitter: Duration,
    /// Bytes of media only, headers included.
    pub bytes: u64,
    /// Packets are arriving.
    pub active: bool,
    pub key_frames: u64,
    pub nacks_sent: u64,
    pub plis_sent: u64,
}

/// One subscription, as its sender (the router) saw it.
#[derive(Clone, Copy, Debug)]
pub struct SubscriptionStatistics {
    pub subscription: SubscriptionId,
    pub packets: u64,
    pub bytes: u64,
    pub resends: u64,
    /// NACK messages received.
    pub nacks: u64,
    pub plis: u64,
    /// The layer that is being sent.
    pub layer: Option<u8>,
    pub layer_switches: u64,
    /// Packets lost according to the subscriber's latest receiver report.
    pub reported_lost: i32,
    pub rtt: Option<Duration>,
}
