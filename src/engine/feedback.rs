//! Feedback of one connection to the server about its path: transport-wide feedback or REMB,
//! depending on what its packets carry.
//!
//! As in libwebrtc, a packet with a transport-wide sequence number goes to transport-wide feedback,
//! and any other packet with abs-send-time goes to REMB. Both cover the whole connection, whatever
//! stream a packet belongs to: media, retransmissions and padding alike. LiveKit agrees on both if
//! there is one connection, and stamps packets with the one that it uses.

use crate::transport::rtp::Ssrc;
use std::time::Duration;

use super::StreamParameters;
use crate::net;
use crate::transport::bandwidth::remb::ReceiveEstimator;
use crate::transport::feedback::{ArrivalLog, FEEDBACK_INTERVAL};
use crate::transport::rtcp::{RtcpWriter, WriteError};
use crate::transport::rtp::{Header, be16, be24};
use crate::units::{Bitrate, Time};

/// Maximum number of sources named in a REMB: the limit of its length field.
const REMB_SOURCES_MAX: usize = 255;

/// The feedback of one connection. It is made when the first stream that wants feedback is
/// announced. Fields that every packet needs come first.
#[repr(C)]
pub struct Feedback {
    /// Time at which the connection's timer is due.
    pub timer_at: Time,
    transport_cc: Option<TransportCc>,
    remb: Option<Remb>,
}

#[repr(C)]
struct TransportCc {
    extension: u8,
    /// SSRC of the stream that received a packet last. A server finds the connection by it.
    media_ssrc: Ssrc,
    sent_at: Option<Time>,
    interval: Duration,
    log: ArrivalLog,
}

struct Remb {
    extension: u8,
    estimator: ReceiveEstimator,
    /// Streams whose packets carry abs-send-time, in their order of appearance.
    sources: Vec<Ssrc>,
    /// Number of streams whose packets may carry it.
    streams: usize,
}

impl Feedback {
    /// Adds what a stream needs. Extension ids are the same in all sections of a bundle (RFC 8843,
    /// section 9.2), so those of the first stream hold for all.
    pub fn add_stream(feedback: &mut Option<Box<Feedback>>, stream: &StreamParameters) {
        if stream.transport_cc_extension.is_none() && stream.abs_send_time_extension.is_none() {
            return;
        }
        let feedback = feedback.get_or_insert_with(|| {
            Box::new(Feedback {
                transport_cc: None,
                remb: None,
                timer_at: Time::MAX,
            })
        });
        if let (None, Some(extension)) = (&feedback.transport_cc, stream.transport_cc_extension) {
            feedback.transport_cc = Some(TransportCc {
                extension,
                log: ArrivalLog::default(),
                media_ssrc: stream.ssrc,
                sent_at: None,
                interval: FEEDBACK_INTERVAL,
            });
        }
        if let Some(extension) = stream.abs_send_time_extension {
            let remb = feedback.remb.get_or_insert_with(|| Remb {
                extension,
                estimator: ReceiveEstimator::default(),
                sources: Vec::new(),
                streams: 0,
            });
            // Reserve now, so that no packet has to allocate.
            remb.streams = (remb.streams + 1).min(REMB_SOURCES_MAX);
            remb.sources.reserve(remb.streams - remb.sources.len());
        }
    }

    /// Prefetches what every packet needs.
    pub fn prefetch(&self) {
        let to_log =
            std::mem::offset_of!(Feedback, transport_cc) + std::mem::offset_of!(TransportCc, log);
        net::prefetch(self, to_log + ArrivalLog::HEAD_BYTES);
        net::prefetch(&self.remb, usize::MAX);
    }

    /// Prefetches what the next packet will need, once the data of [`Feedback::prefetch`] has
    /// arrived.
    pub fn prefetch_next(&self) {
        if let Some(cc) = &self.transport_cc {
            cc.log.prefetch_next();
        }
    }

    /// Sets the send rate of this connection, which decides how often feedback may be sent.
    pub fn set_send_rate(&mut self, bps: u64) {
        if let Some(transport_cc) = &mut self.transport_cc {
            transport_cc.interval = feedback_interval(bps);
        }
    }

    /// Takes an authentic packet of the stream with `media_ssrc`; `packet` is the whole packet.
    /// Returns the time at which [`Feedback::write`] should be called.
    pub fn handle_packet(
        &mut self,
        header: &Header,
        packet: &[u8],
        media_ssrc: Ssrc,
        arrival: Time,
    ) -> Time {
        let transport_seq = |cc: &TransportCc| {
            header
                .extension(packet, cc.extension)
                .and_then(|value| be16(value, 0))
        };
        if let Some(cc) = &mut self.transport_cc
            && let Some(seq) = transport_seq(cc)
        {
            cc.media_ssrc = media_ssrc;
            cc.log.record(seq, arrival);
        } else if let Some(remb) = &mut self.remb
            && let Some(sent) = header
                .extension(packet, remb.extension)
                .and_then(|value| be24(value, 0))
        {
            remb.note_source(media_ssrc);
            remb.estimator
                .handle_packet(sent, arrival, packet.len() - header.header_len);
        }
        self.next_at(arrival)
    }

    /// Notes the arrival of a packet that cannot be read yet, so that it is not reported as lost.
    /// The packet is handled again when it can be read.
    pub fn handle_early_packet(&mut self, header: &Header, packet: &[u8], arrival: Time) {
        if let Some(cc) = &mut self.transport_cc
            && let Some(seq) = header
                .extension(packet, cc.extension)
                .and_then(|value| be16(value, 0))
        {
            cc.log.record(seq, arrival);
        }
    }

    /// Returns the time at which [`Feedback::write`] should be called, or [`Time::MAX`] while there
    /// is nothing to tell.
    fn next_at(&self, now: Time) -> Time {
        let transport_cc = self.transport_cc.as_ref().filter(|cc| cc.log.has_news());
        let transport_cc = transport_cc.map_or(Time::MAX, |cc| {
            cc.sent_at.map_or(now + cc.interval, |at| at + cc.interval)
        });
        let remb = self
            .remb
            .as_ref()
            .map_or(Time::MAX, |remb| remb.estimator.next_at());
        transport_cc.min(remb)
    }

    /// Writes one message of what is due, if anything is. Returns what was written. There may be
    /// more to write unless it returns `None`.
    pub fn write(
        &mut self,
        writer: &mut RtcpWriter<'_>,
        sender_ssrc: Ssrc,
        now: Time,
        rtt: Duration,
    ) -> Result<Option<Sent>, WriteError> {
        if let Some(cc) = &mut self.transport_cc
            && cc.log.has_news()
            && cc
                .sent_at
                .is_none_or(|at| now == at || now.since(at) >= cc.interval)
        {
            cc.log.write(writer, sender_ssrc, cc.media_ssrc)?;
            cc.sent_at = Some(now);
            return Ok(Some(Sent::TransportCc));
        }
        if let Some(remb) = &mut self.remb
            && let Some(bitrate) = remb.estimator.poll(now, rtt)
        {
            writer.remb(sender_ssrc, bitrate, &remb.sources)?;
            return Ok(Some(Sent::Remb(bitrate)));
        }
        Ok(None)
    }

    /// Sets the timer after a round of [`Feedback::write`], and returns when the next round is due.
    pub fn settle(&mut self, now: Time) -> Time {
        self.timer_at = self.next_at(now);
        self.timer_at
    }
}

/// Kind of feedback that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    TransportCc,
    Remb(Bitrate),
}

impl Remb {
    fn note_source(&mut self, ssrc: Ssrc) {
        if self.sources.len() < self.streams && !self.sources.contains(&ssrc) {
            self.sources.push(ssrc);
        }
    }
}

/// Returns the interval between feedback messages. libwebrtc spends 5 % of what a connection sends
/// on feedback: one message with its headers every 50 to 250 ms. A connection that sends nothing
/// keeps the default.
fn feedback_interval(send_bps: u64) -> Duration {
    const MESSAGE_BITS: u64 = (20 + 8 + 10 + 30) * 8;
    const SHARES: u64 = 20;
    let share = (MESSAGE_BITS * SHARES * 1_000_000)
        .checked_div(send_bps)
        .map(Duration::from_micros);
    share.map_or(FEEDBACK_INTERVAL, |share| {
        share.clamp(Duration::from_millis(50), Duration::from_millis(250))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{Codec, PayloadTypes};
    use crate::transport::rtcp::{RtcpPacket, packets};
    use crate::transport::rtp::{HeaderTemplate, abs_send_time};
    use crate::transport::sequence::Seq;

    const TRANSPORT_CC: u8 = 5;
    const ABS_SEND_TIME: u8 = 6;
    const RTT: Duration = Duration::from_millis(20);

    fn stream(ssrc: Ssrc, transport_cc: bool, remb: bool) -> StreamParameters {
        StreamParameters {
            payloads: PayloadTypes::of(Codec::Vp8, 96),
            ssrc,
            rtx_ssrc: None,
            nack: true,
            transport_cc_extension: transport_cc.then_some(TRANSPORT_CC),
            abs_send_time_extension: remb.then_some(ABS_SEND_TIME),
            announced_at: Time::ZERO,
        }
    }

    fn feedback(streams: &[StreamParameters]) -> Option<Box<Feedback>> {
        let mut feedback = None;
        streams
            .iter()
            .for_each(|stream| Feedback::add_stream(&mut feedback, stream));
        feedback
    }

    /// Takes a packet of 1,000 bytes with these extensions. Returns the time at which feedback is
    /// due.
    fn take(
        feedback: &mut Feedback,
        ssrc: Ssrc,
        seq: Option<u16>,
        sent: Option<Time>,
        arrival: Time,
    ) -> Time {
        let mut template = HeaderTemplate::new(96, ssrc).unwrap();
        if let Some(seq) = seq {
            template
                .push_extension(TRANSPORT_CC, &seq.to_be_bytes())
                .unwrap();
        }
        if let Some(sent) = sent {
            let ntp = ((u128::from(sent.as_nanos()) << 32) / 1_000_000_000) as u64;
            template
                .push_extension(ABS_SEND_TIME, &abs_send_time(ntp))
                .unwrap();
        }
        let mut packet = [0; 1_000];
        template.write(&mut packet, false, Seq(1), 0).unwrap();
        let header = Header::parse(&packet).unwrap();
        feedback.handle_packet(&header, &packet, ssrc, arrival)
    }

    /// Returns everything that is written at one time.
    fn turn(feedback: &mut Feedback, now: Time) -> (Vec<Sent>, Vec<u8>) {
        let (mut sent, mut bytes) = (Vec::new(), Vec::new());
        loop {
            let mut buffer = [0; 1_200];
            let mut writer = RtcpWriter::new(&mut buffer);
            let Some(what) = feedback.write(&mut writer, Ssrc(9), now, RTT).unwrap() else {
                break;
            };
            let len = writer.len();
            bytes.extend_from_slice(&buffer[..len]);
            sent.push(what);
        }
        feedback.settle(now);
        (sent, bytes)
    }

    #[test]
    fn nothing_is_made_where_nothing_was_agreed_on() {
        assert!(feedback(&[stream(Ssrc(1), false, false)]).is_none());
    }

    #[test]
    fn transport_wide_feedback_goes_out_ten_times_a_second_about_all_streams_at_once() {
        let mut feedback =
            feedback(&[stream(Ssrc(1), true, false), stream(Ssrc(2), true, false)]).unwrap();
        let mut messages = 0;
        for ms in 0..1_000u64 {
            let now = Time::from_millis(ms);
            let wanted = take(
                &mut feedback,
                Ssrc(1 + ms as u32 % 2),
                Some(ms as u16),
                None,
                now,
            );
            if now >= feedback.timer_at.min(wanted) {
                let (sent, bytes) = turn(&mut feedback, now);
                assert_eq!(sent, [Sent::TransportCc]);
                let Some(Ok(RtcpPacket::TransportCc {
                    sender_ssrc,
                    media_ssrc,
                    body,
                })) = packets(&bytes).next()
                else {
                    panic!("{bytes:?}")
                };
                assert_eq!(
                    (sender_ssrc, media_ssrc),
                    (Ssrc(9), Ssrc(1 + ms as u32 % 2)),
                    "the stream that spoke last"
                );
                let reported = u16::from_be_bytes([body[2], body[3]]);
                assert!((99..=101).contains(&reported), "{reported} packets");
                messages += 1;
            }
            feedback.timer_at = feedback.next_at(now).min(feedback.timer_at);
        }
        assert!((9..=10).contains(&messages), "{messages}");
    }

    #[test]
    fn a_packet_with_a_transport_wide_number_is_not_for_the_remb() {
        let mut feedback = feedback(&[stream(Ssrc(1), true, true)]).unwrap();
        for ms in (0..10_000).step_by(5) {
            let now = Time::from_millis(ms);
            take(&mut feedback, Ssrc(1), Some(ms as u16 / 5), Some(now), now);
        }
        let (sent, _) = turn(&mut feedback, Time::from_millis(10_000));
        assert!(
            !sent.is_empty() && sent.iter().all(|sent| *sent == Sent::TransportCc),
            "{sent:?}"
        );
    }

    #[test]
    fn remb_names_the_streams_that_carry_send_times_and_stops_with_them() {
        let mut feedback = feedback(&[
            stream(Ssrc(1), true, true),
            stream(Ssrc(2), true, true),
            stream(Ssrc(3), false, false),
        ])
        .unwrap();
        let mut told = Vec::new();
        for ms in (0..10_000).step_by(5) {
            let now = Time::from_millis(ms);
            let wanted = take(
                &mut feedback,
                Ssrc(1 + ms as u32 / 5 % 2),
                None,
                Some(now),
                now,
            );
            if wanted <= now {
                told.push((ms, turn(&mut feedback, now)));
            }
        }
        let (at, (sent, bytes)) = told
            .iter()
            .find(|(_, (sent, _))| !sent.is_empty())
            .expect("a REMB");
        assert!(
            (5_000..5_500).contains(at),
            "what arrives is watched for 5 s first: {at}"
        );
        let [Sent::Remb(bitrate)] = sent[..] else {
            panic!("{sent:?}")
        };
        assert!(
            (1_500_000..1_700_000).contains(&bitrate.bps()),
            "{bitrate}: 200 packets a second"
        );
        let Some(Ok(RtcpPacket::Remb { sources, .. })) = packets(bytes).next() else {
            panic!()
        };
        assert_eq!(sources.collect::<Vec<_>>(), [Ssrc(1), Ssrc(2)]);
        turn(&mut feedback, Time::from_millis(20_000));
        assert_eq!(
            feedback.timer_at,
            Time::MAX,
            "nothing comes, nothing is told"
        );
    }

    #[test]
    fn what_is_sent_decides_how_often_feedback_may_be() {
        for (bps, ms) in [(0, 100), (24_000, 250), (100_000, 108), (2_000_000, 50)] {
            assert_eq!(feedback_interval(bps).as_millis(), ms, "{bps}");
        }
    }
}
