//! Tests of the wire code against an independent implementation (the crates `rtc-rtp`, `rtc-rtcp`
//! and `rtc-srtp` of the webrtc-rs family), and against hostile bytes.
//!
//! Every test draws from a seed, so that a failure replays.

use std::any::Any;
use throng::transport::rtp::Ssrc;

use bytes::Bytes;
use rtc_rtcp::extended_report::ExtendedReport;
use rtc_rtcp::extended_report::dlrr::{DLRRReport, DLRRReportBlock};
use rtc_rtcp::extended_report::rrt::ReceiverReferenceTimeReportBlock;
use rtc_rtcp::goodbye::Goodbye;
use rtc_rtcp::payload_feedbacks::full_intra_request::{FirEntry, FullIntraRequest};
use rtc_rtcp::payload_feedbacks::picture_loss_indication::PictureLossIndication;
use rtc_rtcp::payload_feedbacks::receiver_estimated_maximum_bitrate::ReceiverEstimatedMaximumBitrate;
use rtc_rtcp::receiver_report::ReceiverReport;
use rtc_rtcp::reception_report::ReceptionReport;
use rtc_rtcp::sender_report::SenderReport;
use rtc_rtcp::source_description::{
    SdesType, SourceDescription, SourceDescriptionChunk, SourceDescriptionItem,
};
use rtc_rtcp::transport_feedbacks::transport_layer_nack::{
    TransportLayerNack, nack_pairs_from_sequence_numbers,
};
use rtc_rtp::codec::vp8::Vp8Packet;
use rtc_rtp::packetizer::Depacketizer;
use rtc_shared::marshal::{Marshal, Unmarshal};
use rtc_srtp::context::Context;
use rtc_srtp::crypto;
use rtc_srtp::protection_profile::ProtectionProfile;

use throng::codec::vp8::{self, PictureId, Vp8Descriptor};
use throng::transport::rtcp::{
    DlrrBlock, ReportBlock, RtcpPacket, RtcpWriter, SenderInfo, WriteError, packets,
};
use throng::transport::rtp::{self, Header, HeaderTemplate};
use throng::transport::sequence::{Seq, SeqExtender};
use throng::transport::srtp::{DtlsRole, Opener, Profile, Sealer, session};
use throng::units::Bitrate;

type Peer = Box<dyn rtc_rtcp::Packet>;

/// Random numbers by xorshift64*. They are random enough for tests, and the same everywhere.
struct Chance(u64);

impl Chance {
    fn of(seed: u64) -> Chance {
        Chance(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn u32(&mut self) -> u32 {
        (self.u64() >> 32) as u32
    }

    fn below(&mut self, end: usize) -> usize {
        (self.u32() as usize) % end
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.u32() as u8).collect()
    }

    fn list<T>(&mut self, max: usize, mut item: impl FnMut(&mut Chance) -> T) -> Vec<T> {
        (0..self.below(max + 1)).map(|_| item(self)).collect()
    }
}

// ---- RTP ----

fn peer_rtp(chance: &mut Chance) -> rtc_rtp::Packet {
    let mut header = rtc_rtp::Header {
        version: 2,
        padding: chance.below(4) == 0,
        marker: chance.below(2) == 0,
        payload_type: chance.below(128) as u8,
        sequence_number: chance.u32() as u16,
        timestamp: chance.u32(),
        ssrc: chance.u32(),
        csrc: chance.list(15, Chance::u32),
        ..rtc_rtp::Header::default()
    };
    let (form, max_len) = [(None, 0), (Some(0xBEDE), 16), (Some(0x1000), 40)][chance.below(3)];
    if let Some(profile) = form {
        header.extension = true;
        header.extension_profile = profile;
        for id in 1..=1 + chance.below(6) as u8 {
            let len = 1 + chance.below(max_len);
            header
                .set_extension(id, Bytes::from(chance.bytes(len)))
                .unwrap();
        }
    }
    let len = chance.below(1_100);
    rtc_rtp::Packet {
        header,
        payload: Bytes::from(chance.bytes(len)),
    }
}

#[test]
fn rtp_packets_of_the_peer_read_the_same() {
    let mut chance = Chance::of(1);
    for round in 0..5_000 {
        let theirs = peer_rtp(&mut chance);
        let bytes = theirs.marshal().unwrap();
        let ours = Header::parse(&bytes).unwrap();
        let header = &theirs.header;
        assert_eq!(
            (ours.marker, ours.payload_type, ours.seq),
            (
                header.marker,
                header.payload_type,
                Seq(header.sequence_number)
            ),
            "{round}"
        );
        assert_eq!(
            (ours.rtp_time, ours.ssrc),
            (header.timestamp, Ssrc(header.ssrc))
        );
        let extensions: Vec<_> = ours.extensions(&bytes).collect();
        assert_eq!(
            extensions,
            header
                .extensions
                .iter()
                .map(|e| (e.id, &e.payload[..]))
                .collect::<Vec<_>>()
        );
        for extension in &header.extensions {
            assert_eq!(
                ours.extension(&bytes, extension.id),
                Some(&extension.payload[..])
            );
        }
        assert_eq!(ours.payload(&bytes), Some(&theirs.payload[..]));
    }
}

#[test]
fn rtp_headers_of_ours_read_the_same_at_the_peer() {
    let mut chance = Chance::of(2);
    for _ in 0..5_000 {
        let (payload_type, ssrc) = (96 + chance.below(32) as u8, chance.u32());
        let mut template = HeaderTemplate::new(payload_type, Ssrc(ssrc)).unwrap();
        let values = chance.list(4, |chance| {
            let len = 1 + chance.below(16);
            chance.bytes(len)
        });
        for (id, value) in (1..).zip(&values) {
            let slot = template
                .push_extension(id, &vec![0xEE; value.len()])
                .unwrap();
            let mut packet = [0; 128];
            template.write(&mut packet, false, Seq(0), 0).unwrap();
            slot.patch(&mut packet, value);
            assert_eq!(
                Header::parse(&packet).unwrap().extension(&packet, id),
                Some(&value[..])
            );
        }
        let (marker, seq, rtp_time) = (chance.below(2) == 0, chance.u32() as u16, chance.u32());
        let mut packet = [7; 128];
        let len = template
            .write(&mut packet, marker, Seq(seq), rtp_time)
            .unwrap();
        let theirs = rtc_rtp::Packet::unmarshal(&mut &packet[..]).unwrap();
        assert_eq!(
            (
                theirs.header.marker,
                theirs.header.payload_type,
                theirs.header.sequence_number
            ),
            (marker, payload_type, seq)
        );
        assert_eq!(
            (
                theirs.header.timestamp,
                theirs.header.ssrc,
                theirs.header.padding
            ),
            (rtp_time, ssrc, false)
        );
        assert_eq!(
            theirs
                .header
                .extensions
                .iter()
                .map(|e| e.payload.len())
                .collect::<Vec<_>>(),
            values.iter().map(Vec::len).collect::<Vec<_>>()
        );
        assert_eq!(theirs.payload, &packet[len..]);
    }
}

#[test]
fn vp8_descriptors_read_the_same_at_the_peer() {
    let mut chance = Chance::of(3);
    for _ in 0..50_000 {
        let len = 4 + chance.below(8);
        let payload = chance.bytes(len);
        let mut theirs = Vp8Packet::default();
        let rest = theirs.depacketize(&Bytes::from(payload.clone()));
        let ours = Vp8Descriptor::parse(&payload).filter(|(_, len)| *len < payload.len());
        assert_eq!(rest.is_ok(), ours.is_some(), "{payload:?}");
        let (Ok(rest), Some((ours, len))) = (rest, ours) else {
            continue;
        };
        assert_eq!(rest, &payload[len..]);
        assert_eq!(
            (
                ours.non_reference,
                ours.start_of_partition,
                ours.partition_id
            ),
            (theirs.n == 1, theirs.s == 1, theirs.pid)
        );
        assert_eq!(
            ours.picture_id.map(PictureId::value),
            (theirs.i == 1).then_some(theirs.picture_id)
        );
        assert_eq!(
            ours.tl0_pic_idx,
            (theirs.l == 1).then_some(theirs.tl0_pic_idx)
        );
        assert_eq!(
            (ours.tid, ours.layer_sync),
            ((theirs.t == 1).then_some(theirs.tid), theirs.y == 1)
        );
        assert_eq!(ours.key_idx, (theirs.k == 1).then_some(theirs.key_idx));
    }
}

// ---- RTCP ----

fn peer_report(chance: &mut Chance) -> ReceptionReport {
    ReceptionReport {
        ssrc: chance.u32(),
        fraction_lost: chance.u32() as u8,
        total_lost: chance.u32() & 0xFF_FFFF,
        last_sequence_number: chance.u32(),
        jitter: chance.u32(),
        last_sender_report: chance.u32(),
        delay: chance.u32(),
    }
}

fn peer_cname(chance: &mut Chance) -> SourceDescriptionChunk {
    let text = chance
        .list(20, |chance| b'a' + chance.below(26) as u8)
        .into();
    SourceDescriptionChunk {
        source: chance.u32(),
        items: vec![SourceDescriptionItem {
            sdes_type: SdesType::SdesCname,
            text,
        }],
    }
}

/// Returns a NACK whose numbers stay below the wrap, because at the wrap the peer begins a new pair
/// where it need not.
fn peer_nack(chance: &mut Chance) -> TransportLayerNack {
    let (mut seq, gap) = (chance.below(60_000) as u16, 1 + chance.below(40));
    let lost: Vec<u16> = (0..1 + chance.below(60))
        .map(|_| {
            seq += 1 + chance.below(gap) as u16;
            seq
        })
        .collect();
    TransportLayerNack {
        sender_ssrc: chance.u32(),
        media_ssrc: chance.u32(),
        nacks: nack_pairs_from_sequence_numbers(&lost),
    }
}

fn peer_xr(chance: &mut Chance) -> ExtendedReport {
    let mut reports: Vec<Peer> = Vec::new();
    if chance.below(2) == 0 {
        reports.push(Box::new(ReceiverReferenceTimeReportBlock {
            ntp_timestamp: chance.u64(),
        }));
    }
    let dlrr = chance.list(5, |chance| DLRRReport {
        ssrc: chance.u32(),
        last_rr: chance.u32(),
        dlrr: chance.u32(),
    });
    if !dlrr.is_empty() || reports.is_empty() {
        reports.push(Box::new(DLRRReportBlock {
            reports: if dlrr.is_empty() {
                vec![DLRRReport::default()]
            } else {
                dlrr
            },
        }));
    }
    ExtendedReport {
        sender_ssrc: chance.u32(),
        reports,
    }
}

/// Returns a random packet of this kind. There is a kind for every packet that we write.
fn peer_rtcp(chance: &mut Chance, kind: usize) -> Peer {
    let (sender_ssrc, media_ssrc) = (chance.u32(), chance.u32());
    match kind {
        0 => Box::new(SenderReport {
            ssrc: sender_ssrc,
            ntp_time: chance.u64(),
            rtp_time: chance.u32(),
            packet_count: chance.u32(),
            octet_count: chance.u32(),
            reports: chance.list(31, peer_report),
            ..SenderReport::default()
        }),
        1 => Box::new(ReceiverReport {
            ssrc: sender_ssrc,
            reports: chance.list(31, peer_report),
            ..ReceiverReport::default()
        }),
        2 => Box::new(SourceDescription {
            chunks: vec![peer_cname(chance)],
        }),
        3 => Box::new(Goodbye {
            sources: chance.list(31, Chance::u32),
            reason: Bytes::new(),
        }),
        4 => Box::new(peer_nack(chance)),
        5 => Box::new(PictureLossIndication {
            sender_ssrc,
            media_ssrc,
        }),
        6 => {
            let mut fir = chance.list(5, |chance| FirEntry {
                ssrc: chance.u32(),
                sequence_number: chance.u32() as u8,
            });
            fir.push(FirEntry {
                ssrc: media_ssrc,
                sequence_number: 1,
            });
            Box::new(FullIntraRequest {
                sender_ssrc,
                media_ssrc: 0,
                fir,
            })
        }
        7 => {
            let bitrate = ((chance.u32() & 0x3_FFFF) as f32) * 2f32.powi(chance.below(30) as i32);
            Box::new(ReceiverEstimatedMaximumBitrate {
                sender_ssrc,
                bitrate,
                ssrcs: chance.list(5, Chance::u32),
            })
        }
        _ => Box::new(peer_xr(chance)),
    }
}

const RTCP_KINDS: usize = 9;

fn ssrcs(numbers: &[u32]) -> Vec<Ssrc> {
    numbers.iter().copied().map(Ssrc).collect()
}

fn report_to_peer(report: ReportBlock) -> ReceptionReport {
    ReceptionReport {
        ssrc: report.ssrc.0,
        fraction_lost: report.fraction_lost,
        total_lost: report.cumulative_lost as u32 & 0xFF_FFFF,
        last_sequence_number: report.extended_highest_seq,
        jitter: report.jitter,
        last_sender_report: report.lsr,
        delay: report.dlsr,
    }
}

fn report_from_peer(report: &ReceptionReport) -> ReportBlock {
    ReportBlock {
        ssrc: Ssrc(report.ssrc),
        fraction_lost: report.fraction_lost,
        cumulative_lost: ((report.total_lost << 8) as i32) >> 8,
        extended_highest_seq: report.last_sequence_number,
        jitter: report.jitter,
        lsr: report.last_sender_report,
        dlsr: report.delay,
    }
}

/// Converts a packet that we read into the peer's types.
fn to_peer(packet: RtcpPacket<'_>) -> Peer {
    match packet {
        RtcpPacket::SenderReport { sender, reports } => Box::new(SenderReport {
            ssrc: sender.ssrc.0,
            ntp_time: sender.ntp,
            rtp_time: sender.rtp_time,
            packet_count: sender.packets,
            octet_count: sender.octets,
            reports: reports.map(report_to_peer).collect(),
            ..SenderReport::default()
        }),
        RtcpPacket::ReceiverReport { ssrc, reports } => Box::new(ReceiverReport {
            ssrc: ssrc.0,
            reports: reports.map(report_to_peer).collect(),
            ..ReceiverReport::default()
        }),
        RtcpPacket::Sdes { chunks } => {
            let item = |text: &[u8]| SourceDescriptionItem {
                sdes_type: SdesType::SdesCname,
                text: Bytes::copy_from_slice(text),
            };
            let chunks = chunks.map(|c| SourceDescriptionChunk {
                source: c.ssrc.0,
                items: c.cname.map(item).into_iter().collect(),
            });
            Box::new(SourceDescription {
                chunks: chunks.collect(),
            })
        }
        RtcpPacket::Bye { sources, reason } => Box::new(Goodbye {
            sources: sources.map(|source| source.0).collect(),
            reason: Bytes::copy_from_slice(reason.unwrap_or_default()),
        }),
        RtcpPacket::Nack {
            sender_ssrc,
            media_ssrc,
            seqs,
        } => {
            let seqs: Vec<u16> = seqs.map(|seq| seq.0).collect();
            Box::new(TransportLayerNack {
                sender_ssrc: sender_ssrc.0,
                media_ssrc: media_ssrc.0,
                nacks: nack_pairs_from_sequence_numbers(&seqs),
            })
        }
        RtcpPacket::Pli {
            sender_ssrc,
            media_ssrc,
        } => Box::new(PictureLossIndication {
            sender_ssrc: sender_ssrc.0,
            media_ssrc: media_ssrc.0,
        }),
        RtcpPacket::Fir {
            sender_ssrc,
            entries,
        } => {
            let fir = entries
                .map(|(ssrc, sequence_number)| FirEntry {
                    ssrc: ssrc.0,
                    sequence_number,
                })
                .collect();
            Box::new(FullIntraRequest {
                sender_ssrc: sender_ssrc.0,
                media_ssrc: 0,
                fir,
            })
        }
        RtcpPacket::Remb {
            sender_ssrc,
            bitrate,
            sources,
        } => Box::new(ReceiverEstimatedMaximumBitrate {
            sender_ssrc: sender_ssrc.0,
            bitrate: bitrate.bps() as f32,
            ssrcs: sources.map(|source| source.0).collect(),
        }),
        RtcpPacket::Xr { ssrc, rrtr, dlrr } => {
            let mut reports: Vec<Peer> = Vec::new();
            reports.extend(rrtr.map(|ntp_timestamp| {
                Box::new(ReceiverReferenceTimeReportBlock { ntp_timestamp }) as Peer
            }));
            let dlrr: Vec<_> = dlrr
                .map(|b| DLRRReport {
                    ssrc: b.ssrc.0,
                    last_rr: b.last_rr,
                    dlrr: b.delay_since_last_rr,
                })
                .collect();
            if !dlrr.is_empty() {
                reports.push(Box::new(DLRRReportBlock { reports: dlrr }));
            }
            Box::new(ExtendedReport {
                sender_ssrc: ssrc.0,
                reports,
            })
        }
        other => panic!("the peer wrote nothing like {other:?}"),
    }
}

/// Writes the content of the peer's packet with our writer.
fn write_like(writer: &mut RtcpWriter<'_>, packet: &Peer) -> Result<(), WriteError> {
    let any: &dyn Any = packet.as_any();
    if let Some(p) = any.downcast_ref::<SenderReport>() {
        let sender = SenderInfo {
            ssrc: Ssrc(p.ssrc),
            ntp: p.ntp_time,
            rtp_time: p.rtp_time,
            packets: p.packet_count,
            octets: p.octet_count,
        };
        writer.sender_report(&sender, p.reports.iter().map(report_from_peer))
    } else if let Some(p) = any.downcast_ref::<ReceiverReport>() {
        writer.receiver_report(Ssrc(p.ssrc), p.reports.iter().map(report_from_peer))
    } else if let Some(p) = any.downcast_ref::<SourceDescription>() {
        writer.sdes_cname(
            Ssrc(p.chunks[0].source),
            std::str::from_utf8(&p.chunks[0].items[0].text).unwrap(),
        )
    } else if let Some(p) = any.downcast_ref::<Goodbye>() {
        writer.bye(&ssrcs(&p.sources))
    } else if let Some(p) = any.downcast_ref::<TransportLayerNack>() {
        writer.nack(
            Ssrc(p.sender_ssrc),
            Ssrc(p.media_ssrc),
            p.nacks.iter().flat_map(|pair| pair.packet_list()).map(Seq),
        )
    } else if let Some(p) = any.downcast_ref::<PictureLossIndication>() {
        writer.pli(Ssrc(p.sender_ssrc), Ssrc(p.media_ssrc))
    } else if let Some(p) = any.downcast_ref::<FullIntraRequest>() {
        let entries: Vec<_> = p
            .fir
            .iter()
            .map(|entry| (Ssrc(entry.ssrc), entry.sequence_number))
            .collect();
        writer.fir(Ssrc(p.sender_ssrc), &entries)
    } else if let Some(p) = any.downcast_ref::<ReceiverEstimatedMaximumBitrate>() {
        writer.remb(
            Ssrc(p.sender_ssrc),
            Bitrate::from_bps(p.bitrate as u64),
            &ssrcs(&p.ssrcs),
        )
    } else {
        write_xr_like(writer, any.downcast_ref().unwrap())
    }
}

fn write_xr_like(writer: &mut RtcpWriter<'_>, packet: &ExtendedReport) -> Result<(), WriteError> {
    let block = |report: &DLRRReport| DlrrBlock {
        ssrc: Ssrc(report.ssrc),
        last_rr: report.last_rr,
        delay_since_last_rr: report.dlrr,
    };
    let find = |block: &Peer| {
        block
            .as_any()
            .downcast_ref::<ReceiverReferenceTimeReportBlock>()
            .map(|rrtr| rrtr.ntp_timestamp)
    };
    let dlrr = packet
        .reports
        .iter()
        .filter_map(|block| block.as_any().downcast_ref::<DLRRReportBlock>());
    writer.xr(
        Ssrc(packet.sender_ssrc),
        packet.reports.iter().find_map(find),
        dlrr.flat_map(|found| found.reports.iter().map(block)),
    )
}

#[test]
fn rtcp_compounds_read_and_written_agree_with_the_peer() {
    let mut chance = Chance::of(4);
    for round in 0..3_000 {
        let theirs: Vec<Peer> = (0..1 + chance.below(4))
            .map(|_| {
                let kind = chance.below(RTCP_KINDS);
                peer_rtcp(&mut chance, kind)
            })
            .collect();
        let bytes = rtc_rtcp::packet::marshal(&theirs).unwrap();

        let read: Vec<Peer> = packets(&bytes)
            .map(|packet| to_peer(packet.unwrap()))
            .collect();
        assert_eq!(read.len(), theirs.len());
        for (ours, theirs) in read.iter().zip(&theirs) {
            assert!(ours == theirs, "round {round}: {ours:?} is not {theirs:?}");
        }

        let mut out = [0xAA; 8_000];
        let mut writer = RtcpWriter::new(&mut out);
        theirs
            .iter()
            .for_each(|packet| write_like(&mut writer, packet).unwrap());
        let len = writer.len();
        // Behind CNAME and BYE, the peer pads with other bytes than the zeros that RFC 3550 asks
        // for.
        let own_padding = |packet: &Peer| {
            packet.as_any().is::<SourceDescription>() || packet.as_any().is::<Goodbye>()
        };
        assert!(
            out[..len] == bytes || theirs.iter().any(own_padding),
            "round {round}: {theirs:#?}"
        );
        assert!(
            rtc_rtcp::packet::unmarshal(&mut &out[..len]).unwrap() == theirs,
            "round {round}"
        );
    }
}

#[test]
fn a_remb_is_never_read_above_what_was_said() {
    let mut chance = Chance::of(5);
    for _ in 0..10_000 {
        let bps = chance.u64() >> chance.below(64);
        let mut out = [0; 64];
        let mut writer = RtcpWriter::new(&mut out);
        writer
            .remb(Ssrc(1), Bitrate::from_bps(bps), &[Ssrc(2)])
            .unwrap();
        let Some(Ok(RtcpPacket::Remb { bitrate, .. })) = packets(&out[..24]).next() else {
            panic!("{bps}")
        };
        assert!(
            bitrate.bps() <= bps && bps - bitrate.bps() <= bps >> 17,
            "{bps} became {}",
            bitrate.bps()
        );
    }
}

// ---- SRTP ----

const PROFILES: [(Profile, ProtectionProfile); 3] = [
    (Profile::AeadAes128Gcm, ProtectionProfile::AeadAes128Gcm),
    (Profile::AeadAes256Gcm, ProtectionProfile::AeadAes256Gcm),
    (
        Profile::Aes128CmHmacSha1_80,
        ProtectionProfile::Aes128CmHmacSha1_80,
    ),
];

/// Returns our two directions as DTLS client, and the peer's two as server, from the same keying
/// material.
fn facing_the_peer(
    chance: &mut Chance,
    ours: Profile,
    theirs: ProtectionProfile,
) -> (Sealer, Opener, Context, Context) {
    let material = chance.bytes(ours.keying_material_len());
    let (sealer, opener) = session(ours, &material, DtlsRole::Client).unwrap();
    let (key_len, salt_len) = (theirs.key_len(), theirs.salt_len());
    let provider = crypto::default_provider().unwrap();
    let context = |which: usize| {
        let key = &material[which * key_len..][..key_len];
        let salt = &material[2 * key_len + which * salt_len..][..salt_len];
        Context::new(key, salt, theirs, None, None, provider.crypto()).unwrap()
    };
    (sealer, opener, context(0), context(1))
}

#[test]
fn srtp_works_both_ways_with_the_peer_across_the_rollover() {
    let mut chance = Chance::of(6);
    for (ours, theirs) in PROFILES {
        let (sealer, opener, mut peer_opener, mut peer_sealer) =
            facing_the_peer(&mut chance, ours, theirs);
        let mut extender = SeqExtender::default();
        for index in 65_000..67_000u64 {
            let mut packet = peer_rtp(&mut chance);
            (packet.header.sequence_number, packet.header.ssrc) = (index as u16, 0xCAFE_BABE);
            let plain = packet.marshal().unwrap();
            let header_len = Header::parse(&plain).unwrap().header_len;

            let mut sealed = [&plain[..], &[0; 16][..ours.rtp_overhead()]].concat();
            assert_eq!(
                sealer.seal_rtp(&mut sealed, header_len, plain.len(), index),
                Ok(sealed.len())
            );
            assert_eq!(
                peer_opener.decrypt_rtp(&sealed).unwrap(),
                plain,
                "{ours:?} {index}"
            );

            let mut received = peer_sealer.encrypt_rtp(&plain).unwrap();
            let guess = extender.guess(index as u16);
            assert_eq!(
                opener.open_rtp(&mut received, header_len, guess),
                Ok(plain.len()),
                "{ours:?} {index}"
            );
            assert_eq!(received[..plain.len()], plain);
            extender.commit(guess);
        }
    }
}

#[test]
fn srtcp_works_both_ways_with_the_peer() {
    let mut chance = Chance::of(7);
    for (ours, theirs) in PROFILES {
        let (mut sealer, mut opener, mut peer_opener, mut peer_sealer) =
            facing_the_peer(&mut chance, ours, theirs);
        for round in 0..500 {
            let compound = [
                peer_rtcp(&mut chance, round % RTCP_KINDS),
                peer_rtcp(&mut chance, 5),
            ];
            let plain = rtc_rtcp::packet::marshal(&compound).unwrap();

            let mut sealed = [&plain[..], &[0; 20][..ours.rtcp_overhead()]].concat();
            assert_eq!(sealer.seal_rtcp(&mut sealed, plain.len()), Ok(sealed.len()));
            assert_eq!(
                peer_opener.decrypt_rtcp(&sealed).unwrap(),
                plain,
                "{ours:?} {round}"
            );

            let mut received = peer_sealer.encrypt_rtcp(&plain).unwrap();
            assert_eq!(
                opener.open_rtcp(&mut received),
                Ok(plain.len()),
                "{ours:?} {round}"
            );
            assert_eq!(received[..plain.len()], plain);
        }
    }
}

// ---- Hostile bytes ----

/// Runs every reader on bytes that anyone may have sent. Returns how much was found, so that
/// nothing is optimized away.
fn read_everything(bytes: &[u8]) -> usize {
    let mut found = rtp::classify(bytes) as usize;
    if let Some(header) = Header::parse(bytes) {
        found += header
            .extensions(bytes)
            .map(|(_, value)| value.len())
            .sum::<usize>();
        let payload = header.payload(bytes).unwrap_or_default();
        found += rtp::split_rtx(payload).map_or(0, |(_, original)| original.len());
        found += Vp8Descriptor::parse(payload).map_or(0, |(descriptor, len)| {
            len + usize::from(descriptor.starts_key_frame(&payload[len..]))
        });
    }
    found += vp8::key_frame_size(bytes).map_or(0, |(width, _)| usize::from(width));
    found
        + packets(bytes)
            .map(|packet| {
                packet.map_or(1, |packet| {
                    format!("{packet:?}").len() + count_lists(packet)
                })
            })
            .sum::<usize>()
}

fn count_lists(packet: RtcpPacket<'_>) -> usize {
    match packet {
        RtcpPacket::SenderReport { reports, .. } | RtcpPacket::ReceiverReport { reports, .. } => {
            reports.count()
        }
        RtcpPacket::Sdes { chunks } => chunks.count(),
        RtcpPacket::Bye { sources, .. } | RtcpPacket::Remb { sources, .. } => sources.count(),
        RtcpPacket::Nack { seqs, .. } => seqs.count(),
        RtcpPacket::Fir { entries, .. } => entries.count(),
        RtcpPacket::Xr { dlrr, .. } => dlrr.count(),
        RtcpPacket::TransportCc { body, .. } | RtcpPacket::Unknown { body, .. } => body.len(),
        RtcpPacket::Pli { .. } => 0,
    }
}

fn damage(chance: &mut Chance, packet: &mut Vec<u8>) {
    for _ in 0..=chance.below(4) {
        let at = chance.below(packet.len().max(1));
        match chance.below(5) {
            0 => packet.truncate(at),
            1 => packet.extend_from_slice(&chance.bytes(at % 9)),
            // Counts and lengths are in the first bytes.
            2 if packet.len() > 4 => packet[at % 4] = chance.u32() as u8,
            _ if at < packet.len() => {
                packet[at] = [0, 1, 0x7F, 0x80, 0xFF, chance.u32() as u8][chance.below(6)]
            }
            _ => {}
        }
    }
}

#[test]
fn no_bytes_make_a_reader_panic() {
    let mut chance = Chance::of(8);
    let mut found = 0;
    for round in 0..200_000 {
        let mut bytes = match round % 4 {
            0 => peer_rtp(&mut chance).marshal().unwrap().to_vec(),
            1 | 2 => {
                let kind = chance.below(RTCP_KINDS);
                peer_rtcp(&mut chance, kind).marshal().unwrap().to_vec()
            }
            _ => {
                let len = chance.below(200);
                let mut bytes = chance.bytes(len);
                if let [first, second, ..] = &mut bytes[..] {
                    (*first, *second) = (0x80 | *first & 0x3F, 200 + *second % 10);
                }
                bytes
            }
        };
        damage(&mut chance, &mut bytes);
        found += read_everything(&bytes);
    }
    assert!(found > 0);
}

#[test]
fn no_bytes_make_an_opener_panic_or_believe() {
    let mut chance = Chance::of(9);
    for (profile, _) in PROFILES {
        let material = chance.bytes(profile.keying_material_len());
        let (mut sealer, _) = session(profile, &material, DtlsRole::Client).unwrap();
        let (_, mut opener) = session(profile, &material, DtlsRole::Server).unwrap();
        for _ in 0..40_000 {
            let plain = peer_rtcp(&mut chance, 5).marshal().unwrap();
            let mut good = [&plain[..], &[0; 20][..profile.rtcp_overhead()]].concat();
            sealer.seal_rtcp(&mut good, plain.len()).unwrap();
            let mut bad = good.clone();
            damage(&mut chance, &mut bad);
            if bad != good {
                let (header_len, index) = (chance.below(bad.len() + 20), chance.u64() >> 16);
                assert!(
                    opener
                        .open_rtp(&mut bad.clone(), header_len, index)
                        .is_err()
                );
                assert!(opener.open_rtcp(&mut bad).is_err());
            }
            assert_eq!(opener.open_rtcp(&mut good), Ok(plain.len()));
        }
    }
}
