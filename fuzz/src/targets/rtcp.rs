//! RTCP: compounds with any content. What is read is written again and must read the same.
//! `rtc-rtcp` must see the same in every compound that both accept.

use std::time::Duration;
use throng::transport::rtp::Ssrc;

use rtc_rtcp::payload_feedbacks::full_intra_request::FullIntraRequest;
use rtc_rtcp::payload_feedbacks::picture_loss_indication::PictureLossIndication;
use rtc_rtcp::receiver_report::ReceiverReport;
use rtc_rtcp::reception_report::ReceptionReport;
use rtc_rtcp::sender_report::SenderReport;
use rtc_rtcp::transport_feedbacks::transport_layer_nack::TransportLayerNack;
use throng::transport::rtcp::{
    DlrrBlock, MalformedRtcp, ReportBlock, RtcpPacket, RtcpWriter, SenderInfo, WriteError, packets,
    rtt_from_report,
};
use throng::transport::sequence::Seq;
use throng::units::{Bitrate, Time};

use super::{Target, ours};

pub const TARGET: Target = Target {
    name: "rtcp",
    run,
    seeds,
    mutations: 3_000,
    memory: Some((0, 0)),
};

fn run(input: &[u8]) {
    let mut walked = 0;
    for packet in ours(|| packets(input)) {
        walked += 1;
        assert!(
            walked <= 1 + input.len() / 4,
            "each packet takes four bytes at least"
        );
        match packet {
            Ok(packet) => {
                let items = ours(|| items(&packet));
                assert!(
                    items <= 17 * input.len() / 4,
                    "{items} items in {} bytes",
                    input.len()
                );
                read_again(&packet, input.len());
            }
            Err(MalformedRtcp::Framing) => {
                assert_eq!(ours(|| packets(input)).count(), walked, "the walk ends")
            }
            Err(MalformedRtcp::Contents) => {}
        }
    }
    agree(input);
}

/// Walks all items that a packet lists, and counts them.
fn items(packet: &RtcpPacket<'_>) -> usize {
    let nothing_wrong =
        |rtt: Option<Duration>| assert!(rtt.is_none_or(|rtt| rtt <= Duration::from_secs(1 << 15)));
    match packet {
        RtcpPacket::SenderReport { reports, .. } | RtcpPacket::ReceiverReport { reports, .. } => {
            for block in reports.clone() {
                assert!((-(1 << 23)..1 << 23).contains(&block.cumulative_lost));
                nothing_wrong(rtt_from_report(0x8000_0000, block.lsr, block.dlsr));
            }
            reports.len()
        }
        RtcpPacket::Sdes { chunks } => chunks
            .clone()
            .inspect(|chunk| assert!(chunk.cname.is_none_or(|name| name.len() <= 255)))
            .count(),
        RtcpPacket::Bye { sources, .. } | RtcpPacket::Remb { sources, .. } => {
            sources.clone().count()
        }
        RtcpPacket::Nack { seqs, .. } => seqs.clone().count(),
        RtcpPacket::Fir { entries, .. } => entries.clone().count(),
        RtcpPacket::Xr { dlrr, .. } => dlrr
            .clone()
            .inspect(|block| {
                nothing_wrong(rtt_from_report(
                    0x8000_0000,
                    block.last_rr,
                    block.delay_since_last_rr,
                ))
            })
            .count(),
        RtcpPacket::Pli { .. } | RtcpPacket::TransportCc { .. } | RtcpPacket::Unknown { .. } => 0,
    }
}

/// Checks that a packet, written by our writer, reads the same.
fn read_again(packet: &RtcpPacket<'_>, input_len: usize) {
    // A NACK whose sequence numbers are not ascending may need more pairs than it had.
    let mut buffer = vec![0; 64 + 6 * input_len];
    let mut writer = RtcpWriter::new(&mut buffer);
    match ours(|| write(&mut writer, packet)) {
        Some(Ok(())) => {}
        Some(Err(WriteError::TooLong)) | None => return,
        Some(Err(WriteError::Full)) => panic!("{packet:?} grew beyond all measure"),
    }
    let len = writer.len();
    let mut again = packets(&buffer[..len]);
    let same = again
        .next()
        .expect("something was written")
        .expect("ours is well-formed");
    assert_eq!(facts(&same), facts(packet));
    assert!(again.next().is_none());
}

fn write(writer: &mut RtcpWriter<'_>, packet: &RtcpPacket<'_>) -> Option<Result<(), WriteError>> {
    Some(match packet {
        RtcpPacket::SenderReport { sender, reports } => {
            writer.sender_report(sender, reports.clone())
        }
        RtcpPacket::ReceiverReport { ssrc, reports } => {
            writer.receiver_report(*ssrc, reports.clone())
        }
        RtcpPacket::Nack {
            sender_ssrc,
            media_ssrc,
            seqs,
        } if seqs.clone().next().is_some() => writer.nack(*sender_ssrc, *media_ssrc, seqs.clone()),
        RtcpPacket::Pli {
            sender_ssrc,
            media_ssrc,
        } => writer.pli(*sender_ssrc, *media_ssrc),
        RtcpPacket::Xr { ssrc, rrtr, dlrr } if rrtr.is_some() || dlrr.clone().next().is_some() => {
            writer.xr(*ssrc, *rrtr, dlrr.clone())
        }
        _ => return None,
    })
}

#[derive(Debug, PartialEq)]
enum Facts {
    Sender(SenderInfo, Vec<ReportBlock>),
    Receiver(Ssrc, Vec<ReportBlock>),
    Nack(Ssrc, Ssrc, Vec<u16>),
    Pli(Ssrc, Ssrc),
    Xr(Ssrc, Option<u64>, Vec<DlrrBlock>),
    Other,
}

fn facts(packet: &RtcpPacket<'_>) -> Facts {
    match packet {
        RtcpPacket::SenderReport { sender, reports } => {
            Facts::Sender(*sender, reports.clone().collect())
        }
        RtcpPacket::ReceiverReport { ssrc, reports } => {
            Facts::Receiver(*ssrc, reports.clone().collect())
        }
        RtcpPacket::Nack {
            sender_ssrc,
            media_ssrc,
            seqs,
        } => {
            // The writer decides which pair a sequence number goes into. It may also drop
            // duplicates.
            let mut seqs: Vec<u16> = seqs.clone().map(|seq| seq.0).collect();
            seqs.sort_unstable();
            seqs.dedup();
            Facts::Nack(*sender_ssrc, *media_ssrc, seqs)
        }
        RtcpPacket::Pli {
            sender_ssrc,
            media_ssrc,
        } => Facts::Pli(*sender_ssrc, *media_ssrc),
        RtcpPacket::Xr { ssrc, rrtr, dlrr } => Facts::Xr(*ssrc, *rrtr, dlrr.clone().collect()),
        _ => Facts::Other,
    }
}

fn agree(input: &[u8]) {
    let Ok(theirs) = rtc_rtcp::packet::unmarshal(&mut &input[..]) else {
        return;
    };
    let ours: Vec<_> = packets(input).collect();
    if ours.len() != theirs.len() {
        return;
    }
    for (ours, theirs) in ours.into_iter().zip(&theirs) {
        let (Ok(ours), theirs) = (ours, theirs.as_any()) else {
            continue;
        };
        match ours {
            RtcpPacket::SenderReport { sender, reports } => {
                if let Some(theirs) = theirs.downcast_ref::<SenderReport>() {
                    assert_eq!(
                        (
                            sender.ssrc,
                            sender.ntp,
                            sender.rtp_time,
                            sender.packets,
                            sender.octets
                        ),
                        (
                            Ssrc(theirs.ssrc),
                            theirs.ntp_time,
                            theirs.rtp_time,
                            theirs.packet_count,
                            theirs.octet_count
                        )
                    );
                    same_reports(reports, &theirs.reports);
                }
            }
            RtcpPacket::ReceiverReport { ssrc, reports } => {
                if let Some(theirs) = theirs.downcast_ref::<ReceiverReport>() {
                    assert_eq!(ssrc, Ssrc(theirs.ssrc));
                    same_reports(reports, &theirs.reports);
                }
            }
            RtcpPacket::Nack {
                media_ssrc, seqs, ..
            } => {
                if let Some(theirs) = theirs.downcast_ref::<TransportLayerNack>() {
                    assert_eq!(media_ssrc, Ssrc(theirs.media_ssrc));
                    let expected: Vec<u16> = theirs
                        .nacks
                        .iter()
                        .flat_map(|pair| pair.packet_list())
                        .collect();
                    assert_eq!(seqs.map(|seq| seq.0).collect::<Vec<_>>(), expected);
                }
            }
            RtcpPacket::Pli { media_ssrc, .. } => {
                if let Some(theirs) = theirs.downcast_ref::<PictureLossIndication>() {
                    assert_eq!(media_ssrc, Ssrc(theirs.media_ssrc));
                }
            }
            RtcpPacket::Fir { entries, .. } => {
                if let Some(theirs) = theirs.downcast_ref::<FullIntraRequest>() {
                    let expected: Vec<_> = theirs
                        .fir
                        .iter()
                        .map(|entry| (Ssrc(entry.ssrc), entry.sequence_number))
                        .collect();
                    assert_eq!(entries.collect::<Vec<_>>(), expected);
                }
            }
            _ => {}
        }
    }
}

fn same_reports(ours: impl Iterator<Item = ReportBlock>, theirs: &[ReceptionReport]) {
    let ours: Vec<_> = ours
        .map(|block| {
            (
                block.ssrc,
                block.fraction_lost,
                block.cumulative_lost as u32 & 0xFF_FFFF,
                block.jitter,
            )
        })
        .collect();
    let theirs: Vec<_> = theirs
        .iter()
        .map(|block| {
            (
                Ssrc(block.ssrc),
                block.fraction_lost,
                block.total_lost,
                block.jitter,
            )
        })
        .collect();
    assert_eq!(ours, theirs);
}

fn seeds() -> Vec<Vec<u8>> {
    let block = ReportBlock {
        ssrc: Ssrc(7),
        fraction_lost: 12,
        cumulative_lost: -3,
        extended_highest_seq: 0x2_0001,
        jitter: 90,
        lsr: 0x8000_0000,
        dlsr: 65_536,
    };
    let sender = SenderInfo {
        ssrc: Ssrc(1),
        ntp: 0x1234_5678_9ABC_DEF0,
        rtp_time: 90_000,
        packets: 10,
        octets: 1_000,
    };
    let dlrr = DlrrBlock {
        ssrc: Ssrc(9),
        last_rr: 0x7FFF_0000,
        delay_since_last_rr: 100,
    };
    let written = |write: &dyn Fn(&mut RtcpWriter<'_>) -> Result<(), WriteError>| {
        let mut buffer = vec![0; 1_500];
        let mut writer = RtcpWriter::new(&mut buffer);
        write(&mut writer).expect("a seed fits");
        let len = writer.len();
        buffer.truncate(len);
        buffer
    };
    let arrivals: Vec<Option<Time>> = (0..40)
        .map(|n| (n % 5 != 0).then(|| Time::from_micros(1_000_000 + n * 700)))
        .collect();
    vec![
        written(&|writer| {
            writer.sender_report(&sender, [block; 3])?;
            writer.sdes_cname(Ssrc(1), "end-1")?;
            writer.xr(Ssrc(1), Some(77), [dlrr, dlrr])
        }),
        written(&|writer| {
            writer.receiver_report(Ssrc(2), [block; 33])?;
            writer.bye(&[Ssrc(1), Ssrc(2), Ssrc(3)])
        }),
        written(&|writer| {
            writer.nack(Ssrc(1), Ssrc(2), [65_530, 65_535, 0, 3, 40].map(Seq))?;
            writer.pli(Ssrc(1), Ssrc(2))?;
            writer.fir(Ssrc(1), &[(Ssrc(2), 3), (Ssrc(4), 5)])
        }),
        written(&|writer| {
            writer.remb(
                Ssrc(1),
                Bitrate::from_bps(1_500_000),
                &[Ssrc(1), Ssrc(2), Ssrc(3)],
            )
        }),
        written(&|writer| {
            writer.transport_cc(Ssrc(1), Ssrc(2), Seq(65_520), 3, arrivals.iter().copied())
        }),
        vec![
            0x81, 204, 0, 3, 0, 0, 0, 1, b'n', b'a', b'm', b'e', 0, 0, 0, 0,
        ],
    ]
}
