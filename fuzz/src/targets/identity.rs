//! Frame identities: the trailer of video (`LKTS`) and the padding of Opus.

use throng::media::identity::{
    AUDIO_EXTENSION, AUDIO_IDENTITY_LEN, FrameIdentity, Origin, VIDEO_TRAILER_LEN, parse_foreign,
    video_trailer_len,
};

use super::{Target, ours};

pub const TARGET: Target = Target {
    name: "identity",
    run,
    seeds,
    mutations: 6_000,
    memory: Some((0, 0)),
};

fn run(input: &[u8]) {
    let len = ours(|| video_trailer_len(input));
    assert!(len.is_none_or(|len| (5..=255).contains(&len) && len <= input.len()));
    let foreign = ours(|| parse_foreign(input));
    assert_eq!(foreign.is_some(), len.is_some());
    if let Some(identity) = ours(|| FrameIdentity::parse_video(input)) {
        let facts = foreign.expect("ours is a trailer like any other");
        assert_eq!(
            (facts.user_timestamp, facts.frame_id),
            (Some(identity.intended_unix_us), Some(identity.frame))
        );
        let mut trailer = [0; VIDEO_TRAILER_LEN];
        identity.write_video(&mut trailer);
        assert_eq!(FrameIdentity::parse_video(&trailer), Some(identity));
    }
    if let Some(identity) = ours(|| FrameIdentity::parse_audio(input)) {
        let mut slot = [0; AUDIO_IDENTITY_LEN];
        identity.write_audio(&mut slot);
        assert!(input.ends_with(&slot), "there is one way to write it");
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let identity = FrameIdentity {
        intended_unix_us: 1_790_000_000_123_456,
        run: 0xDEAD_BEEF,
        origin: Origin {
            publisher: 70_000,
            track: 1,
        },
        frame: 0x0102_0304,
        layer: 2,
    };
    let mut trailer = [0; VIDEO_TRAILER_LEN];
    identity.write_video(&mut trailer);
    let mut slot = [0; AUDIO_IDENTITY_LEN];
    identity.write_audio(&mut slot);
    let foreign: Vec<u8> = [200, 2, 1, 1, 2, 4, 0, 0, 0, 9, 15]
        .iter()
        .map(|byte| byte ^ 0xFF)
        .collect();
    vec![
        [&[0x90, 0x80, 1, 2, 3], &trailer[..]].concat(),
        [&[0x7B, 0x41, 25, 9, 9, 9, 9, AUDIO_EXTENSION][..], &slot].concat(),
        [
            &[0x7B, 0x41, 255, 25, 9, 9][..],
            &[0; 254],
            &[AUDIO_EXTENSION],
            &slot,
        ]
        .concat(),
        [&[1, 2, 3][..], &foreign, b"LKTS"].concat(),
        b"no trailer at all".to_vec(),
    ]
}
