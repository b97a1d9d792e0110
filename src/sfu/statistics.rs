//! What a router has counted: plain cumulative numbers that merge over routers. Tests take them as
//! the other side's truth; a metrics page shows them.

use crate::transport::rtp::Ssrc;
use std::time::Duration;

use super::SubscriptionId;
use crate::transport::receive::ReceiveCounts;

/// Declares the counters with their sum and their names.
macro_rules! counters {
    ($(#[$doc:meta])* $name:ident { $($(#[$cdoc:meta])* $counter:ident),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name {
            $($(#[$cdoc])* pub $counter: u64,)*
        }

        impl $name {
            /// Adds what `other` counted.
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
    /// Every datagram that came is counted once more by what became of it: `datagrams_in` is the
    /// sum of `setup_in`, `rtcp_in`, `media_in`, `repairs_in`,
    /// `probes_in` and all `refused_*`.
    RouterStatistics {
        datagrams_in,
        bytes_in,
        datagrams_out,
        bytes_out,
        /// STUN and DTLS that a connection took.
        setup_in,
        setup_out,
        rtcp_in,
        rtcp_out,
        /// RTP on a media SSRC, resends without RTX and padding included, taken for the first time.
        media_in,
        media_bytes_in,
        /// Of `media_in`: padding alone, or a payload type that nobody agreed on. Nothing to
        /// forward.
        media_in_empty,
        /// Retransmissions (RFC 4588) that filled a hole.
        repairs_in,
        repair_bytes_in,
        /// Retransmission packets without a payload: bandwidth probes.
        probes_in,
        /// RTP sent to subscribers for the first time.
        media_out,
        media_bytes_out,
        /// Sends that carried `media_out`: as many, or with segmentation one for a burst.
        media_sends_out,
        /// Of `media_out`: withheld at first, and sent once the key frame that they belong to had
        /// begun.
        media_out_recalled,
        /// Packets sent again, over RTX or on the media's own SSRC.
        resends_out,
        resend_bytes_out,
        /// Messages that came on data channels.
        data_in,
        /// .. sent on, once for each who gets it.
        data_out,
        /// .. not sent on: they cannot be read, or their sender may not publish data.
        data_refused,
        /// Copies that a participant did not get, as it has no such channel or does not read it.
        data_dropped,

        /// From an address that no authentic check has come from.
        refused_unknown_address,
        /// Neither STUN, DTLS, RTP nor RTCP.
        refused_unknown_kind,
        /// STUN for a user name that no connection has. The latest are kept for a moment, for a
        /// connection that is about to be added.
        refused_unknown_ufrag,
        /// STUN or DTLS that its connection did not take: a wrong password, a broken record, a
        /// session that has ended.
        refused_setup,
        /// Media or RTCP before the keys are there.
        refused_unkeyed,
        /// A header, padding count or RTX payload that contradicts itself.
        refused_malformed,
        /// An SSRC that no description names, and no mid or rid that says whose it is.
        refused_unknown_ssrc,
        refused_unauthentic,
        /// Seen before, by SRTP's own index.
        refused_replayed,
        /// New to SRTP, but its payload was here before: a retransmission that was not needed, or
        /// an original after its repair.
        refused_duplicate,
        /// Too far behind the newest, or a jump that no second packet has confirmed.
        refused_too_old,

        /// Packets that a subscriber did not get because it, or the publisher, has the track off.
        withheld_disabled,
        /// .. because its connection is not up.
        withheld_unconnected,
        /// .. because it gets, or waits for, another layer.
        withheld_layer,
        /// .. because no key frame has come yet.
        withheld_key_frame,
        /// .. because there is nothing in it: padding alone, or a payload type that nobody agreed
        /// on. It leaves no hole.
        withheld_empty,
        /// .. because it came too late to have a place in what the subscriber got.
        withheld_late,

        /// NACK messages, and the sequence numbers that they named.
        nacks_in,
        nacked_in,
        nacks_out,
        nacked_out,
        /// Numbers of NACKs that were not answered: never sent, or no longer kept.
        resends_unknown,
        /// .. sent so recently that the last copy may still be under way.
        resends_too_soon,
        /// .. sent as often as a packet may be.
        resends_exhausted,
        plis_in,
        firs_in,
        plis_out,
        transport_feedbacks_out,
        receiver_reports_out,
        sender_reports_out,
        /// RTCP packets that contradict themselves.
        rtcp_malformed,

        /// Commands about what is gone or cannot be; races between the halves make some.
        commands_refused,
        /// Datagrams that the kernel did not take.
        send_errors,
        /// Errors that the socket gave in place of datagrams: what ICMP said of something that we
        /// sent, but for closed ports.
        receive_errors,
        /// Datagrams that the socket dropped for want of buffer space.
        socket_drops,
        /// Media packets above the limit that a test gave.
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
    /// Media alone, headers included.
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
    /// The layer that goes out now.
    pub layer: Option<u8>,
    pub layer_switches: u64,
    /// By the subscriber's latest receiver report.
    pub reported_lost: i32,
    pub rtt: Option<Duration>,
}
