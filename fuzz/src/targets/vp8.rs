//! VP8: the payload descriptor against that of `rtc-rtp`, and the assembler with sequences of
//! packets with any content.

use std::time::Duration;

use bytes::Bytes;
use rtc_rtp::codec::vp8::Vp8Packet;
use rtc_rtp::packetizer::Depacketizer;
use throng::codec::vp8::{PictureId, Vp8Descriptor};
use throng::media::assemble::{Assembler, FrameEvent, PacketInfo};
use throng::media::identity::FrameIdentity;
use throng::units::Time;

use super::{Script, Target, ours};

pub const DESCRIPTOR: Target = Target {
    name: "vp8",
    run: descriptor,
    seeds: descriptor_seeds,
    mutations: 6_000,
    memory: Some((0, 0)),
};

pub const ASSEMBLER: Target = Target {
    name: "assembler",
    run: assembler,
    seeds: assembler_seeds,
    mutations: 600,
    memory: Some((0, 0)),
};

fn descriptor(input: &[u8]) {
    let ours = ours(|| Vp8Descriptor::parse(input));
    if let Some((read, len)) = ours {
        assert!((1..=Vp8Descriptor::MAX_LEN).contains(&len) && len <= input.len());
        let mut written = [0; Vp8Descriptor::MAX_LEN];
        let again = read
            .write(&mut written)
            .expect("there is room for the longest");
        assert_eq!(
            Vp8Descriptor::parse(&written[..again]),
            Some((read, again)),
            "{read:?}"
        );
    }
    let mut theirs = Vp8Packet::default();
    let Ok(rest) = theirs.depacketize(&Bytes::copy_from_slice(input)) else {
        return;
    };
    let Some((ours, len)) = ours else {
        panic!("refused what another took: {theirs:?}");
    };
    assert_eq!(rest, &input[len..]);
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
}

fn descriptor_seeds() -> Vec<Vec<u8>> {
    vec![
        vec![0x10, 0, 1, 2],
        vec![0x90, 0x80, 0x81, 0x23, 9, 9],
        vec![0x90, 0x80, 0x23, 9, 9],
        vec![0x90, 0xF0, 0x81, 0x23, 7, 0xE5, 9],
        vec![0xB5, 0x20, 0x60, 1],
    ]
}

/// Flags of a step in the script.
const PADDING: u8 = 1 << 5;
const GAVE_UP: u8 = 1 << 6;
const PAUSE: u8 = 1 << 7;

fn assembler(input: &[u8]) {
    let mut script = Script::new(input);
    let mut assembler = ours(Assembler::new);
    let (mut now, mut newest, mut packets) = (Time::from_millis(1), 70_000u64, 0u64);
    let (mut complete, mut decoded) = (0, 0);
    while !script.is_over() {
        let (flags, step, media) = (script.u8(), script.u8(), script.u8());
        now += Duration::from_millis(u64::from(step >> 6) * 40);
        let step = i64::from(step & 0x3F) - 16;
        let ext_seq = newest
            .saturating_add_signed(if flags & 16 != 0 { step * 700 } else { step })
            .max(1);
        newest = newest.max(ext_seq);
        packets += 1;
        let mut on_event = |event| match event {
            FrameEvent::Complete(frame) => {
                complete += 1;
                assert!(frame.packets >= 1 && frame.first_arrival <= frame.completed_at);
            }
            FrameEvent::Decoded(frame) => {
                decoded += 1;
                assert!(
                    frame
                        .freeze
                        .is_none_or(|freeze| Some(freeze) == frame.interval)
                );
            }
        };
        match flags {
            flags if flags & PAUSE != 0 => ours(|| assembler.handle_pause()),
            flags if flags & GAVE_UP != 0 => ours(|| assembler.handle_gave_up()),
            flags if flags & PADDING != 0 => {
                ours(|| assembler.handle_padding(ext_seq, now, &mut on_event))
            }
            flags => {
                let identity = (flags & 8 != 0).then(|| FrameIdentity {
                    frame: u32::from(media),
                    layer: media & 3,
                    ..FrameIdentity::default()
                });
                let packet = PacketInfo {
                    ext_seq,
                    rtp_time: u32::from(media).wrapping_mul(if media & 1 == 0 {
                        3_000
                    } else {
                        0x4000_0001
                    }),
                    start: flags & 1 != 0,
                    end: flags & 2 != 0,
                    key: flags & 4 != 0,
                    identity,
                };
                ours(|| assembler.handle_packet(&packet, now, &mut on_event));
            }
        }
        let _ = ours(|| {
            (
                assembler.poll_pli(now),
                assembler.needs_key_frame(),
                assembler.open_freeze(now),
                assembler.decoded_at(),
            )
        });
    }
    let counts = assembler.counts();
    assert_eq!((counts.complete, counts.decoded), (complete, decoded));
    assert!(
        counts.decoded <= counts.complete && counts.complete <= packets,
        "{counts:?} of {packets}"
    );
    assert!(
        counts.decoded + counts.undecodable <= counts.complete,
        "{counts:?}"
    );
}

fn assembler_seeds() -> Vec<Vec<u8>> {
    const NEXT: u8 = 17;
    let key = [5, NEXT, 2, 0, NEXT, 2, 2, NEXT, 2];
    let inter = |frame: u8| [1, NEXT | 0x40, frame, 2 | 8, NEXT, frame];
    let lost = [3, NEXT + 3, 8];
    vec![
        [&key[..], &inter(4), &inter(6), &inter(8)].concat(),
        [&key[..], &lost, &[GAVE_UP, NEXT, 0], &inter(10), &key].concat(),
        [
            &key[..],
            &[PADDING, NEXT, 0],
            &inter(4),
            &[PAUSE, NEXT, 0],
            &key,
            &[7, 60, 9],
        ]
        .concat(),
    ]
}
