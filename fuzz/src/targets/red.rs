//! Redundant audio (RFC 2198): headers, blocks, and the payload that our writer makes of them.

use throng::codec::Codec;
use throng::codec::red::{RedPayload, set_payload_types, write_headers};

use super::{Target, ours};

pub const TARGET: Target = Target {
    name: "red",
    run,
    seeds,
    mutations: 6_000,
    memory: Some((0, 0)),
};

fn run(input: &[u8]) {
    let Some(red) = ours(|| RedPayload::parse(input)) else {
        assert_eq!(ours(|| Codec::Red.depacketize(input, false)), None);
        return;
    };
    let info = ours(|| Codec::Red.depacketize(input, false)).expect("it was read");
    assert_eq!(&input[usize::from(info.body_at)..], red.primary);
    assert_eq!(red.primary_at() + red.primary.len(), input.len());
    let blocks: Vec<_> = red.redundant().collect();
    let repeated: Vec<u8> = blocks
        .iter()
        .flat_map(|block| block.payload)
        .copied()
        .collect();
    let before = &input[..input.len() - red.primary.len()];
    assert!(
        before.ends_with(&repeated),
        "blocks lie one behind the other"
    );
    assert!(blocks.is_sorted_by(|older, newer| older.distance > newer.distance));
    // Written again without the empty blocks, it must read the same.
    let mut written = vec![0; 4 * 32];
    let sizes = blocks
        .iter()
        .map(|block| (block.rtp_offset, block.payload.len()));
    let len = write_headers(
        &mut written,
        red.payload_type,
        sizes.collect::<Vec<_>>().into_iter(),
    )
    .expect("what was read fits");
    written.truncate(len);
    written.extend_from_slice(&repeated);
    written.extend_from_slice(red.primary);
    let mut copy = written.clone();
    set_payload_types(&mut copy, red.payload_type);
    assert_eq!(copy, written);
    let again = RedPayload::parse(&written).expect("what was written is read");
    assert_eq!(
        (again.payload_type, again.primary),
        (red.payload_type, red.primary)
    );
    let facts =
        |block: throng::codec::red::RedundantBlock<'_>| (block.rtp_offset, block.payload.to_vec());
    assert!(
        again
            .redundant()
            .map(facts)
            .eq(blocks.into_iter().map(facts))
    );
}

fn seeds() -> Vec<Vec<u8>> {
    let payload = |redundant: &[(u32, usize)], primary: usize| {
        let mut out = vec![0; 64];
        let len = write_headers(&mut out, 111, redundant.iter().copied()).expect("there is room");
        let bytes: usize = redundant.iter().map(|(_, len)| len).sum();
        out.truncate(len);
        out.extend((0..bytes + primary).map(|byte| byte as u8));
        out
    };
    vec![
        payload(&[], 60),
        payload(&[(960, 60)], 60),
        payload(&[(1_920, 60), (960, 61)], 62),
        payload(&[(16_383, 1_023), (960, 0)], 3),
        vec![0x80; 140],
    ]
}
