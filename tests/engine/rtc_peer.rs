//! Tests of our transport and engine against an independent WebRTC stack, `rtc` (the sans-IO core
//! of webrtc-rs). What we send must mean the same to other implementations.
//!
//! Everything runs in memory and in virtual time. The keys and credentials are random, and no count
//! depends on them.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use rtc::dtls::extension::extension_use_srtp::SrtpProtectionProfile;
use rtc::peer_connection::state::RTCPeerConnectionState;
use rtc::peer_connection::transport::{RTCDtlsRole, RTCIceRole};
use rtc::rtcp::extended_report::{ExtendedReport, ReceiverReferenceTimeReportBlock};
use rtc::rtcp::payload_feedbacks::full_intra_request::{FirEntry, FullIntraRequest};
use rtc::rtcp::payload_feedbacks::picture_loss_indication::PictureLossIndication;
use rtc::rtcp::receiver_report::ReceiverReport;
use rtc::rtcp::reception_report::ReceptionReport;
use rtc::rtcp::sender_report::SenderReport;
use rtc::rtcp::source_description::{SdesType, SourceDescription};
use rtc::rtcp::transport_feedbacks::transport_layer_nack::TransportLayerNack;
use rtc::rtp;
use rtc::rtp::codec::vp8::Vp8Packet;
use rtc::rtp::packetizer::Depacketizer;
use rtc::shared::marshal::MarshalSize;
use rtc::statistics::StatsSelector;

use crate::common::pair::{AUDIO_SSRC, VIDEO_RTX_SSRC, VIDEO_SSRC, ssrc_and_seq};
use crate::common::rtc::{
    DELAY, Forged, Leg, RUN, SENT_AUDIO_SSRC, SENT_FIRST_SEQ, SENT_VIDEO_RTX_SSRC, SENT_VIDEO_SSRC,
    Seen, Way, World, our_address, rtc_address,
};
use throng::engine::publisher::{MediaSource, Pacing};
use throng::media::identity::{AUDIO_IDENTITY_LEN, FrameIdentity, Origin, video_trailer_len};
use throng::media::opus::AudioClip;
use throng::media::vp8::VideoClip;
use throng::transport::peer::PeerFailure;
use throng::transport::sdp::Extension;
use throng::units::Time;

const VIDEO_FRAME_TICKS: u32 = 90_000 / 15;
const AUDIO_FRAME_TICKS: u32 = 48_000 / 50;
/// Names that `rtc` has for our SRTP profiles. Without a restriction, either end chooses the last
/// one.
const OUR_CIPHERS: [&str; 3] = [
    "SRTP_AES128_CM_HMAC_SHA1_80",
    "SRTP_AEAD_AES_128_GCM",
    "SRTP_AEAD_AES_256_GCM",
];
/// Seconds from 1900 to 1970 (RFC 5905).
const NTP_TO_UNIX_SECONDS: u64 = 2_208_988_800;

/// Returns what `rtc` says about a connection: its ICE role, its DTLS role and its SRTP profile.
fn transport(world: &mut World, key: usize) -> (RTCIceRole, RTCDtlsRole, String) {
    let now = world.epoch.instant(world.now);
    let stats = world.ends[key].pc.get_stats(now, StatsSelector::None);
    let transport = stats.transport().unwrap();
    (
        transport.ice_role,
        transport.dtls_role,
        transport.srtp_cipher.clone(),
    )
}

#[test]
fn ice_and_dtls_connect_in_every_combination_of_roles() {
    for (publish, ice_lite, dtls_active) in [
        (true, false, true),
        (true, false, false),
        (false, false, true),
        (false, false, false),
        (true, true, true),
        (true, true, false),
        (false, true, true),
        (false, true, false),
    ] {
        let leg = Leg {
            publish,
            ice_lite,
            dtls_active,
            ..Leg::publisher()
        };
        let mut world = World::connected(&[leg]);
        let what = format!("publish {publish}, lite {ice_lite}, active {dtls_active}");
        assert_eq!(world.agreed[0].dtls_active, dtls_active, "{what}");
        let (ice_role, dtls_role, cipher) = transport(&mut world, 0);
        // RFC 8445, section 6.1.1: the offerer controls, unless it is lite and the other end is
        // not.
        let their_ice_role = if publish || ice_lite {
            RTCIceRole::Controlled
        } else {
            RTCIceRole::Controlling
        };
        let their_dtls_role = if dtls_active {
            RTCDtlsRole::Server
        } else {
            RTCDtlsRole::Client
        };
        assert_eq!(
            (ice_role, dtls_role),
            (their_ice_role, their_dtls_role),
            "{what}"
        );
        assert!(OUR_CIPHERS.contains(&&*cipher), "{what}: {cipher}");
        assert!(
            world.now < Time::from_millis(1_500),
            "{what}: {} ms",
            world.now.as_millis()
        );
    }
}

#[test]
fn a_certificate_that_was_not_promised_is_refused_by_either_end() {
    for publish in [true, false] {
        for dtls_active in [true, false] {
            let leg = |forged| Leg {
                publish,
                dtls_active,
                forged,
                ..Leg::publisher()
            };
            let mut world = World::agreed(&[leg(Forged::TheirFingerprint)]);
            world.run_for(Duration::from_secs(5));
            assert_eq!(
                (world.failure, world.connected[0]),
                (Some(PeerFailure::FingerprintMismatch), false)
            );

            let mut world = World::agreed(&[leg(Forged::OurFingerprint)]);
            world.run_for(Duration::from_secs(5));
            assert_ne!(
                world.ends[0].state,
                RTCPeerConnectionState::Connected,
                "publish {publish}, active {dtls_active}"
            );
        }
    }
}

fn clips(world: &World) -> (&AudioClip, &VideoClip) {
    match &world.sources {
        [MediaSource::Audio(audio), MediaSource::Video(video)] => (audio, video),
        _ => unreachable!("audio first"),
    }
}

/// Asserts that the sequence numbers of the packets have no gap.
fn assert_contiguous<'a>(packets: impl IntoIterator<Item = &'a rtp::Packet>) {
    let seqs: Vec<u16> = packets
        .into_iter()
        .map(|packet| packet.header.sequence_number)
        .collect();
    assert!(
        seqs.windows(2)
            .all(|pair| pair[1] == pair[0].wrapping_add(1)),
        "{seqs:?}"
    );
}

struct VideoFrame {
    identity: FrameIdentity,
    key: bool,
    rtp_time: u32,
}

/// Reassembles a stream's frames by RFC 7741 and compares each with the clip's frame. The packets
/// are complete and in order.
fn read_video(clip: &VideoClip, packets: &[rtp::Packet]) -> Vec<VideoFrame> {
    assert_contiguous(packets);
    let mut at = None;
    let mut last_picture = None;
    let mut frames: Vec<VideoFrame> = Vec::new();
    for chunk in packets.chunk_by(|a, b| a.header.timestamp == b.header.timestamp) {
        let mut bytes = Vec::new();
        for (index, packet) in chunk.iter().enumerate() {
            let mut descriptor = Vp8Packet::default();
            bytes.extend_from_slice(&descriptor.depacketize(&packet.payload).unwrap());
            assert_eq!(
                packet.header.marker,
                index + 1 == chunk.len(),
                "the marker ends the frame"
            );
            assert_eq!((descriptor.s == 1, descriptor.pid), (index == 0, 0));
            assert_eq!(descriptor.i, 1);
            if index == 0 {
                let follows = last_picture
                    .is_none_or(|last: u16| descriptor.picture_id == (last + 1) & 0x7FFF);
                assert!(follows, "{last_picture:?} {}", descriptor.picture_id);
            }
            last_picture = Some(descriptor.picture_id);
        }
        let identity = FrameIdentity::parse_video(&bytes).expect("a trailer");
        assert_eq!((identity.run, identity.origin), (RUN, origin(1)));
        let body = &bytes[..bytes.len() - video_trailer_len(&bytes).unwrap()];
        let position = at.unwrap_or_else(|| {
            (0..clip.len())
                .find(|at| clip.key_frame(*at) == body)
                .expect("the first is a key frame")
        });
        let key = body[0] & 1 == 0;
        assert!(
            body == if key {
                clip.key_frame(position)
            } else {
                clip.inter_frame(position)
            },
            "frame {}",
            identity.frame
        );
        at = Some((position + 1) % clip.len());
        frames.push(VideoFrame {
            identity,
            key,
            rtp_time: chunk[0].header.timestamp,
        });
    }
    assert!(frames[0].key);
    for pair in frames.windows(2) {
        assert_eq!(pair[1].identity.frame, pair[0].identity.frame + 1);
        assert_eq!(
            pair[1].rtp_time.wrapping_sub(pair[0].rtp_time),
            VIDEO_FRAME_TICKS
        );
    }
    frames
}

/// Does the same as [`read_video`] for audio, where each packet is a frame.
fn read_audio(clip: &AudioClip, packets: &[rtp::Packet], level_extension: Option<u8>) {
    let body = |bytes: &[u8]| bytes[..bytes.len() - AUDIO_IDENTITY_LEN].to_vec();
    assert_contiguous(packets);
    // Packets of silence are alike, so only the whole sequence shows where in the loop it began.
    let clip_packets: Vec<Vec<u8>> = (0..clip.len())
        .map(|at| body(clip.packet(at).unwrap()))
        .collect();
    let is_at = |start: usize| {
        let expected = clip_packets.iter().cycle().skip(start);
        packets
            .iter()
            .zip(expected)
            .all(|(packet, expected)| body(&packet.payload) == *expected)
    };
    let start = (0..clip.len())
        .find(|start| is_at(*start))
        .expect("the clip's packets, in its order");
    for (index, packet) in packets.iter().enumerate() {
        let position = (start + index) % clip.len();
        let identity = FrameIdentity::parse_audio(&packet.payload).expect("an identity");
        assert_eq!(
            (identity.run, identity.origin, identity.frame),
            (RUN, origin(0), index as u32)
        );
        assert_eq!(
            packet.header.timestamp,
            packets[0]
                .header
                .timestamp
                .wrapping_add(index as u32 * AUDIO_FRAME_TICKS)
        );
        assert_eq!(
            packet.header.marker,
            index == 0,
            "RFC 3551: the marker begins a talkspurt"
        );
        if let Some(id) = level_extension {
            let level = packet.header.get_extension(id).expect("an audio level");
            assert_eq!(level[0] & 0x7F, clip.level_dbov(position), "RFC 6464");
        }
    }
}

fn packets(seen: Vec<Seen<rtp::Packet>>) -> Vec<rtp::Packet> {
    seen.into_iter().map(|seen| seen.packet).collect()
}

#[test]
fn our_media_is_to_rtc_what_we_meant() {
    for pacing in [Pacing::Paced, Pacing::Burst] {
        let mut world = World::connected(&[Leg::publisher()]);
        world.publish(pacing);
        world.run_for(Duration::from_secs(6));
        let record = world.finish();
        let (audio, video) = clips(&world);
        let media = &world.agreed[0].media;
        let level = media[0].extensions.id(Extension::AudioLevel);
        assert!(
            level.is_some() && media[1].rtx_payload_type == Some(97),
            "rtc agreed to both"
        );

        let end = &world.ends[0];
        let (heard_audio, heard_video) = (
            packets(end.rtp(Way::ToRtc, AUDIO_SSRC)),
            packets(end.rtp(Way::ToRtc, VIDEO_SSRC)),
        );
        read_audio(audio, &heard_audio, level);
        let frames = read_video(video, &heard_video);
        assert_eq!(
            frames.iter().filter(|frame| frame.key).count(),
            1,
            "nobody asked for another"
        );
        assert!(heard_audio.len() >= 250 && frames.len() >= 75);
        assert_eq!(
            (
                record.audio.packets_sent,
                record.video.packets_sent,
                record.video.frames_sent
            ),
            (
                heard_audio.len() as u64,
                heard_video.len() as u64,
                frames.len() as u64
            )
        );
        // The application of `rtc` got the same number of packets.
        assert_eq!(end.delivered.len(), heard_audio.len() + heard_video.len());

        check_sender_reports(&world, AUDIO_SSRC, 48_000, 0..=1);
        // A slot begins on a whole millisecond, up to 90 ticks after the moment that its RTP time
        // names.
        check_sender_reports(&world, VIDEO_SSRC, 90_000, 0..=91);
        // The receiver reports of rtc answer our sender reports, so the round trip is twice the
        // delay.
        let rtt = &record.session.rtt_rtcp;
        assert!(
            rtt.count() >= 5 && rtt.min().unwrap() >= 19_900 && rtt.max().unwrap() <= 20_200,
            "{:?} {:?}",
            rtt.min(),
            rtt.max()
        );
        assert_eq!(
            (
                record.audio.uplink_packets_lost,
                record.video.uplink_packets_lost
            ),
            (0, 0)
        );
        assert_eq!(
            (
                record.session.nacks_received,
                record.session.packets_rejected
            ),
            (0, 0)
        );
    }
}

/// Checks that each sender report counts the packets before it, and pairs an NTP time with the RTP
/// time of the same moment.
fn check_sender_reports(
    world: &World,
    ssrc: u32,
    clock_rate: i64,
    early_ticks: std::ops::RangeInclusive<i64>,
) {
    let end = &world.ends[0];
    let heard = end.rtp(Way::ToRtc, ssrc);
    let mut reports = end.rtcp::<SenderReport>(Way::ToRtc);
    reports.retain(|report| report.packet.ssrc == ssrc);
    assert!(reports.len() >= 5);
    for report in &reports {
        let (said_at, order, report) = (sent_at(report.at), report.order, &report.packet);
        let before: Vec<_> = heard.iter().filter(|seen| seen.order < order).collect();
        let octets: usize = before.iter().map(|seen| seen.packet.payload.len()).sum();
        assert_eq!(
            (report.packet_count as usize, report.octet_count as usize),
            (before.len(), octets)
        );

        let unix_us = |ntp: u64| {
            ((ntp >> 32) - NTP_TO_UNIX_SECONDS) * 1_000_000
                + (((ntp & 0xFFFF_FFFF) * 1_000_000) >> 32)
        };
        assert!(unix_us(report.ntp_time).abs_diff(world.epoch.unix_micros(said_at)) <= 1);
        let (rtp_time, identity) = before
            .iter()
            .rev()
            .find_map(|seen| {
                let payload = &seen.packet.payload;
                let identity = FrameIdentity::parse_video(payload)
                    .or_else(|| FrameIdentity::parse_audio(payload))?;
                Some((seen.packet.header.timestamp, identity))
            })
            .unwrap();
        let elapsed_us = unix_us(report.ntp_time) as i64 - identity.intended_unix_us as i64;
        let ticks = i64::from(report.rtp_time.wrapping_sub(rtp_time) as i32);
        let early = ticks - elapsed_us * clock_rate / 1_000_000;
        assert!(early_ticks.contains(&early), "{ssrc:x}: {early} ticks");
    }
    let names = end.rtcp::<SourceDescription>(Way::ToRtc);
    let chunks: Vec<_> = names
        .iter()
        .flat_map(|seen| &seen.packet.chunks)
        .filter(|chunk| chunk.source == ssrc)
        .collect();
    assert_eq!(chunks.len(), reports.len());
    let is_cname = |chunk: &rtc::rtcp::source_description::SourceDescriptionChunk| {
        chunk.items.len() == 1
            && chunk.items[0].sdes_type == SdesType::SdesCname
            && &chunk.items[0].text[..] == b"end-0"
    };
    assert!(chunks.into_iter().all(is_cname));
}

/// Returns the origin of a track of the only publisher.
fn origin(track: u8) -> Origin {
    Origin {
        publisher: 0,
        track,
    }
}

fn nacked(world: &World, key: usize, way: Way, ssrc: u32) -> BTreeSet<u16> {
    let nacks = world.ends[key].rtcp::<TransportLayerNack>(way);
    let of_ssrc = nacks.iter().filter(|seen| seen.packet.media_ssrc == ssrc);
    of_ssrc
        .flat_map(|seen| seen.packet.nacks.iter().flat_map(|pair| pair.packet_list()))
        .collect()
}

#[test]
fn what_rtc_did_not_get_comes_again_over_rtx() {
    let mut world = World::connected(&[Leg::publisher()]);
    world.publish(Pacing::Paced);
    let mut count = 0;
    world.ends[0].pretend_to_lose(move |packet| {
        count += u32::from(packet.header.ssrc == VIDEO_SSRC);
        // Single packets are lost, and now and then two in a row.
        packet.header.ssrc == VIDEO_SSRC
            && count < 200
            && (count.is_multiple_of(9) || count % 36 == 1 && count > 1)
    });
    world.run_for(Duration::from_secs(5));
    let record = world.finish();
    let end = &world.ends[0];
    let lost = end.pretended_lost();
    let by_seq: BTreeMap<u16, &rtp::Packet> = lost
        .iter()
        .map(|packet| (packet.header.sequence_number, packet))
        .collect();
    assert!(lost.len() > 20 && by_seq.len() == lost.len());
    assert!(
        nacked(&world, 0, Way::FromRtc, VIDEO_SSRC)
            .into_iter()
            .eq(by_seq.keys().copied())
    );

    let resends = packets(end.rtp(Way::ToRtc, VIDEO_RTX_SSRC));
    assert_contiguous(&resends);
    assert_eq!(
        (resends.len(), record.video.rtx_sent as usize),
        (lost.len(), lost.len())
    );
    let mut asked = BTreeSet::new();
    for resend in &resends {
        // RFC 4588, section 4: the payload has the original's sequence number, then the original's
        // payload. Timestamp and marker stay the same.
        let original_seq = u16::from_be_bytes([resend.payload[0], resend.payload[1]]);
        let original = by_seq[&original_seq];
        assert!(
            resend.payload[2..] == original.payload[..],
            "{original_seq}"
        );
        let facts = |packet: &rtp::Packet| (packet.header.timestamp, packet.header.marker);
        assert_eq!(
            (resend.header.payload_type, facts(resend)),
            (97, facts(original))
        );
        assert!(asked.insert(original_seq), "{original_seq} came twice");
    }
    // After rtc has merged both streams, no packet is missing.
    let mut delivered: Vec<_> = end
        .delivered
        .iter()
        .filter(|packet| packet.header.ssrc == VIDEO_SSRC)
        .cloned()
        .collect();
    delivered.sort_by_key(|packet| packet.header.sequence_number);
    assert_eq!(
        read_video(clips(&world).1, &delivered).len() as u64,
        record.video.frames_sent
    );
    assert_eq!(
        record.video.uplink_packets_lost,
        lost.len() as u64,
        "as rtc reports it"
    );
}

#[test]
fn without_rtx_a_resend_is_the_same_datagram_again() {
    let leg = Leg {
        rtx: false,
        ..Leg::publisher()
    };
    let mut world = World::connected(&[leg]);
    assert_eq!(
        world.agreed[0].media[1].rtx_payload_type, None,
        "rtc knows no RTX"
    );
    world.publish(Pacing::Paced);
    let lost = Rc::new(RefCell::new(BTreeMap::<(u32, u16), Vec<u8>>::new()));
    let resent = Rc::new(RefCell::new(BTreeSet::new()));
    let (losing, resending) = (lost.clone(), resent.clone());
    let mut seen = BTreeMap::new();
    world.loses = Box::new(move |datagram, _| {
        let Some(name) = ssrc_and_seq(&datagram.bytes) else {
            return false;
        };
        if let Some(bytes) = losing.borrow().get(&name) {
            // Under one key, a sequence number may only ever stand for the same bytes. Otherwise
            // GCM's keystream is given away (RFC 7714, section 8.2).
            assert!(*bytes == datagram.bytes, "{name:?}");
            assert!(resending.borrow_mut().insert(name), "{name:?} came twice");
            return false;
        }
        let count: &mut u32 = seen.entry(name.0).or_default();
        *count += 1;
        let loses = count.is_multiple_of(10) && *count <= 200;
        if loses {
            losing.borrow_mut().insert(name, datagram.bytes.clone());
        }
        loses
    });
    world.run_for(Duration::from_secs(6));
    let record = world.finish();
    let lost: BTreeSet<(u32, u16)> = lost.borrow().keys().copied().collect();
    assert_eq!((lost.len(), &lost), (40, &*resent.borrow()));
    for ssrc in [AUDIO_SSRC, VIDEO_SSRC] {
        let of_ssrc: BTreeSet<u16> = lost
            .iter()
            .filter(|name| name.0 == ssrc)
            .map(|name| name.1)
            .collect();
        assert_eq!(nacked(&world, 0, Way::FromRtc, ssrc), of_ssrc);
    }
    assert_eq!((record.audio.rtx_sent, record.video.rtx_sent), (20, 20));
    let whole = |ssrc| {
        let mut packets = packets(world.ends[0].rtp(Way::ToRtc, ssrc));
        packets.sort_by_key(|packet| packet.header.sequence_number);
        packets
    };
    let (audio, video) = clips(&world);
    read_audio(audio, &whole(AUDIO_SSRC), None);
    assert_eq!(
        read_video(video, &whole(VIDEO_SSRC)).len() as u64,
        record.video.frames_sent
    );
}

#[test]
fn pli_and_fir_bring_a_key_frame_at_the_next_frame_and_only_then() {
    let mut world = World::connected(&[Leg::publisher()]);
    world.publish(Pacing::Burst);
    let pli = PictureLossIndication {
        sender_ssrc: 1,
        media_ssrc: VIDEO_SSRC,
    };
    let fir = |sequence_number| FullIntraRequest {
        sender_ssrc: 1,
        media_ssrc: 0,
        fir: vec![FirEntry {
            ssrc: VIDEO_SSRC,
            sequence_number,
        }],
    };
    let mut asked_at = Vec::new();
    for request in 0..6u8 {
        // The interval keeps the requests out of step with the frames.
        world.run_for(Duration::from_millis(1_717));
        asked_at.push(world.now + DELAY);
        let now = world.now;
        match request % 2 {
            0 => world.ends[0].send_rtcp(Box::new(pli.clone()), now),
            _ => world.ends[0].send_rtcp(Box::new(fir(request)), now),
        }
    }
    world.run_for(Duration::from_secs(1));
    let record = world.finish();
    let frames = read_video(
        clips(&world).1,
        &packets(world.ends[0].rtp(Way::ToRtc, VIDEO_SSRC)),
    );
    let intended = |frame: &VideoFrame| {
        world
            .epoch
            .time_of_unix_micros(frame.identity.intended_unix_us)
            .unwrap()
    };
    let after = |at: &Time| {
        frames
            .iter()
            .find(|frame| intended(frame) + Duration::from_micros(1) >= *at)
            .unwrap()
    };
    let wanted: Vec<u32> = [0]
        .into_iter()
        .chain(asked_at.iter().map(|at| after(at).identity.frame))
        .collect();
    let keys: Vec<u32> = frames
        .iter()
        .filter(|frame| frame.key)
        .map(|frame| frame.identity.frame)
        .collect();
    assert_eq!(keys, wanted);
    assert_eq!(
        (record.session.plis_received, record.video.key_frames_sent),
        (6, 7)
    );
}

/// The link's log of media from `rtc`: first transmissions that were lost, the number of packets
/// sent on each SSRC, and the packets that reached us with their times.
#[derive(Default)]
struct Truth {
    lost: BTreeSet<(u32, u16)>,
    sent: BTreeMap<u32, u64>,
    arrived: Vec<(Time, u32, u16)>,
}

/// Loses the first transmission of every `one_in`th packet from `rtc`, up to the 200th of each
/// stream.
fn lose_from_rtc(world: &mut World, one_in: u64) -> Rc<RefCell<Truth>> {
    let truth: Rc<RefCell<Truth>> = Rc::default();
    let (losing, arriving) = (truth.clone(), truth.clone());
    let mut known = BTreeSet::new();
    world.loses = Box::new(move |datagram, _| {
        let Some(name) = ssrc_and_seq(&datagram.bytes).filter(|_| datagram.from == rtc_address(1))
        else {
            return false;
        };
        let truth = &mut *losing.borrow_mut();
        let sent = truth.sent.entry(name.0).or_default();
        *sent += 1;
        let is_first = known.insert(name);
        let loses = name.0 != SENT_VIDEO_RTX_SSRC
            && is_first
            && sent.is_multiple_of(one_in)
            && *sent <= 200;
        if loses {
            truth.lost.insert(name);
        }
        loses
    });
    world.on_arrived = Box::new(move |datagram, at| {
        let (ssrc, seq) = ssrc_and_seq(&datagram.bytes).unwrap();
        arriving.borrow_mut().arrived.push((at, ssrc, seq));
    });
    truth
}

impl Truth {
    fn lost(&self, ssrc: u32) -> BTreeSet<u16> {
        self.lost
            .iter()
            .filter(|name| name.0 == ssrc)
            .map(|name| name.1)
            .collect()
    }

    /// Returns how many originals had arrived by `at`, and the highest sequence number among them,
    /// extended by its cycle (RFC 3550, A.1).
    fn received(&self, ssrc: u32, at: Time) -> (u32, u32) {
        let mine = self.arrived.iter().filter(|(when, of, seq)| {
            *when <= at && *of == ssrc && !self.lost.contains(&(ssrc, *seq))
        });
        let offsets: Vec<u32> = mine
            .map(|(.., seq)| u32::from(seq.wrapping_sub(SENT_FIRST_SEQ)))
            .collect();
        (
            offsets.len() as u32,
            u32::from(SENT_FIRST_SEQ) + offsets.iter().max().unwrap(),
        )
    }
}

#[test]
fn what_we_did_not_get_we_ask_for_and_rtc_sends_it_again() {
    for rtx in [true, false] {
        let subscriber = Leg {
            rtx,
            ..Leg::subscriber()
        };
        let mut world = World::connected(&[Leg::publisher(), subscriber]);
        let truth = lose_from_rtc(&mut world, 10);
        world.publish(Pacing::Paced);
        world.run_for(Duration::from_secs(6));
        let record = world.finish();
        let truth = truth.borrow();
        for (ssrc, media) in [
            (SENT_AUDIO_SSRC, &record.audio),
            (SENT_VIDEO_SSRC, &record.video),
        ] {
            let lost = truth.lost(ssrc);
            let counted = (
                media.packets_lost_network,
                media.packets_repaired,
                media.packets_lost,
                media.packets_duplicate,
            );
            assert_eq!((lost.len(), counted), (20, (20, 20, 0, 0)), "rtx {rtx}");
            assert_eq!(
                nacked(&world, 1, Way::ToRtc, ssrc),
                lost,
                "as rtc reads our NACKs"
            );
            assert_eq!(
                (media.rtx_received, media.packets_received),
                (20, media.packets_sent - 20)
            );
            assert_eq!(
                (media.frames_delivered, media.frames_expected),
                (media.frames_sent, media.frames_sent)
            );
            assert_eq!(media.loss_to_repair.count(), 20);
            // A gap is requested at once. The request and the retransmission take 20 ms together.
            assert!(
                media.loss_to_repair.min().unwrap() >= 19_900
                    && media.loss_to_repair.max().unwrap() <= 45_000
            );
        }
        assert_eq!(
            truth.sent.get(&SENT_VIDEO_RTX_SSRC).copied().unwrap_or(0),
            if rtx { 20 } else { 0 }
        );
        assert_eq!(
            (
                record.session.frames_misrouted,
                record.session.packets_rejected,
                record.session.plis_sent
            ),
            (0, 0, 0)
        );
        assert!(
            world.ends[1]
                .rtp(Way::FromRtc, SENT_VIDEO_SSRC)
                .iter()
                .any(|seen| seen.packet.header.sequence_number < 100),
            "the numbers wrapped"
        );
    }
}

#[test]
fn our_receiver_reports_tell_rtc_what_the_link_did() {
    for jitter in [Duration::ZERO, Duration::from_millis(8)] {
        let mut world = World::connected(&[Leg::publisher(), Leg::subscriber()]);
        world.jitter = jitter;
        let truth = lose_from_rtc(&mut world, 7);
        world.publish(Pacing::Paced);
        world.run_for(Duration::from_secs(8));
        let (end, truth) = (&world.ends[1], truth.borrow());
        for (ssrc, clock_rate) in [(SENT_AUDIO_SSRC, 48_000), (SENT_VIDEO_SSRC, 90_000)] {
            let blocks = report_blocks(&world, ssrc);
            assert!(blocks.len() >= 6);
            let (mut expected_before, mut received_before) = (0, 0);
            for (at, block) in &blocks {
                let (received, highest) = truth.received(ssrc, *at);
                let expected = highest - u32::from(SENT_FIRST_SEQ) + 1;
                assert_eq!(
                    (block.last_sequence_number, block.total_lost),
                    (highest, expected - received)
                );
                let (expected_now, received_now) =
                    (expected - expected_before, received - received_before);
                let fraction = (expected_now.saturating_sub(received_now) << 8) / expected_now;
                assert_eq!(u32::from(block.fraction_lost), fraction);
                (expected_before, received_before) = (expected, received);
                check_last_sender_report(&world, *at, block);
            }
            assert!(blocks.iter().any(|(_, block)| block.fraction_lost > 0));
            let last = u64::from(blocks.last().unwrap().1.jitter) * 1_000_000 / clock_rate;
            // A frame leaves on a whole millisecond. The mean difference of two delays within 8 ms
            // is a third of that, and the estimate varies around it.
            let plausible = if jitter.is_zero() {
                0..1_000
            } else {
                1_300..4_500
            };
            assert!(plausible.contains(&last), "{last} us");
        }
        let questions = end.rtcp::<ExtendedReport>(Way::ToRtc);
        assert!(questions.len() >= 6);
        for seen in questions {
            let time = seen.packet.reports[0]
                .as_any()
                .downcast_ref::<ReceiverReferenceTimeReportBlock>()
                .unwrap();
            assert_eq!(time.ntp_timestamp, world.epoch.ntp(sent_at(seen.at)));
        }
    }
}

/// Returns the time at which we sent what `rtc` received at `at`.
fn sent_at(at: Time) -> Time {
    Time::from_nanos(at.as_nanos() - DELAY.as_nanos() as u64)
}

/// Returns the blocks of our receiver reports about a stream, each with the time at which it was
/// sent.
fn report_blocks(world: &World, ssrc: u32) -> Vec<(Time, ReceptionReport)> {
    let reports = world.ends[1].rtcp::<ReceiverReport>(Way::ToRtc);
    let of_ssrc = |seen: &Seen<ReceiverReport>| {
        seen.packet
            .reports
            .iter()
            .find(|block| block.ssrc == ssrc)
            .cloned()
    };
    reports
        .iter()
        .filter_map(|seen| Some((sent_at(seen.at), of_ssrc(seen)?)))
        .collect()
}

/// Checks that LSR and DLSR name the last sender report that had reached us, and the time since
/// then (RFC 3550, section 6.4.1).
fn check_last_sender_report(world: &World, at: Time, block: &ReceptionReport) {
    let reports = world.ends[1].rtcp::<SenderReport>(Way::FromRtc);
    let arrived = reports
        .iter()
        .rfind(|seen| seen.packet.ssrc == block.ssrc && seen.at + DELAY <= at);
    let (lsr, delay) = arrived.map_or((0, 0), |seen| {
        let delay = at.since(seen.at + DELAY);
        (
            (seen.packet.ntp_time >> 16) as u32,
            (delay.as_micros() * 65_536 / 1_000_000) as u32,
        )
    });
    assert_eq!(block.last_sender_report, lsr);
    assert!(block.delay.abs_diff(delay) <= 1, "{} {delay}", block.delay);
}

#[test]
fn what_cannot_be_decoded_is_asked_for_anew_and_rtc_is_told() {
    let mut world = World::connected(&[Leg::publisher(), Leg::subscriber()]);
    world.publish(Pacing::Paced);
    // One packet is lost for good, because none of its retransmissions arrives.
    let mut lost = None;
    world.loses = Box::new(move |datagram, now| match ssrc_and_seq(&datagram.bytes) {
        Some((SENT_VIDEO_RTX_SSRC, _)) => true,
        Some((SENT_VIDEO_SSRC, seq)) if now >= Time::from_millis(4_000) => {
            *lost.get_or_insert(seq) == seq
        }
        _ => false,
    });
    world.run_for(Duration::from_secs(8));
    let record = world.finish();
    let requests = world.ends[1].rtcp::<PictureLossIndication>(Way::ToRtc);
    assert!(
        !requests.is_empty()
            && requests
                .iter()
                .all(|seen| seen.packet.media_ssrc == SENT_VIDEO_SSRC)
    );
    assert_eq!(requests.len() as u64, record.session.plis_sent);
    let sent = world.ends[1].rtp(Way::FromRtc, SENT_VIDEO_SSRC);
    let is_key = |seen: &&Seen<rtp::Packet>| {
        let mut descriptor = Vp8Packet::default();
        let vp8 = descriptor.depacketize(&seen.packet.payload).unwrap();
        descriptor.s == 1 && vp8[0] & 1 == 0
    };
    let keys: Vec<Time> = sent.iter().filter(is_key).map(|seen| seen.at).collect();
    let [_, key_at] = keys[..] else {
        panic!("{} key frames", keys.len())
    };
    // The requests end when the key frame has arrived.
    let (first, last) = (requests[0].at, requests.last().unwrap().at);
    assert!(
        first < key_at && sent_at(last) <= key_at + DELAY + Duration::from_millis(50),
        "{first:?} {key_at:?} {last:?}"
    );
    assert_eq!(
        (
            record.video.packets_lost,
            record.video.frames_sent - record.video.frames_delivered
        ),
        (1, 1)
    );
    assert!(record.video.pli_sent_to_key_received.count() == 1 && record.video.freezes >= 1);
}

#[test]
fn media_is_repaired_and_reported_under_each_protection_profile() {
    for (profile, cipher, tag_len) in [
        (
            SrtpProtectionProfile::Srtp_Aes128_Cm_Hmac_Sha1_80,
            "SRTP_AES128_CM_HMAC_SHA1_80",
            10,
        ),
        (
            SrtpProtectionProfile::Srtp_Aead_Aes_128_Gcm,
            "SRTP_AEAD_AES_128_GCM",
            16,
        ),
        (
            SrtpProtectionProfile::Srtp_Aead_Aes_256_Gcm,
            "SRTP_AEAD_AES_256_GCM",
            16,
        ),
    ] {
        for dtls_active in [true, false] {
            let leg = |leg: Leg| Leg {
                dtls_active,
                profiles: vec![profile],
                ..leg
            };
            let mut world = World::connected(&[leg(Leg::publisher()), leg(Leg::subscriber())]);
            assert!(
                (0..2).all(|key| transport(&mut world, key).2 == cipher),
                "{cipher}"
            );
            let truth = lose_from_rtc(&mut world, 10);
            let wire_bytes = Rc::new(RefCell::new(0));
            let (counted, mut lose) = (
                wire_bytes.clone(),
                std::mem::replace(&mut world.loses, Box::new(|_, _| false)),
            );
            world.loses = Box::new(move |datagram, now| {
                let ours =
                    datagram.from == our_address(0) && ssrc_and_seq(&datagram.bytes).is_some();
                *counted.borrow_mut() += if ours { datagram.bytes.len() } else { 0 };
                lose(datagram, now)
            });
            world.publish(Pacing::Paced);
            world.run_for(Duration::from_secs(3));
            let record = world.finish();
            let heard: Vec<_> = [AUDIO_SSRC, VIDEO_SSRC]
                .iter()
                .flat_map(|ssrc| world.ends[0].rtp(Way::ToRtc, *ssrc))
                .collect();
            let plain_bytes: usize = heard.iter().map(|seen| seen.packet.marshal_size()).sum();
            assert_eq!(
                *wire_bytes.borrow(),
                plain_bytes + heard.len() * tag_len,
                "{cipher}"
            );
            for (ssrc, media) in [
                (SENT_AUDIO_SSRC, &record.audio),
                (SENT_VIDEO_SSRC, &record.video),
            ] {
                assert_eq!(
                    media.packets_repaired,
                    truth.borrow().lost(ssrc).len() as u64,
                    "{cipher}"
                );
                assert!(
                    media.packets_repaired > 5 && media.frames_delivered == media.frames_sent,
                    "{cipher}"
                );
                assert!(report_blocks(&world, ssrc).len() >= 2, "{cipher}");
            }
            assert_eq!(record.session.packets_rejected, 0, "{cipher}");
        }
    }
}
