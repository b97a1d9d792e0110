//! RTP: header, extensions, padding, RTX. `rtc-rtp` must read the same from every packet that both
//! accept.

use rtc_shared::marshal::Unmarshal;
use throng::transport::rtp::Ssrc;
use throng::transport::rtp::{self, Datagram, Header, HeaderTemplate};
use throng::transport::sequence::Seq;

use super::{Target, ours};

pub const TARGET: Target = Target {
    name: "rtp",
    run,
    seeds,
    mutations: 4_000,
    memory: Some((0, 0)),
};

fn run(input: &[u8]) {
    let class = ours(|| rtp::classify(input));
    let Some(header) = ours(|| Header::parse(input)) else {
        return;
    };
    assert!((12..=input.len()).contains(&header.header_len));
    if class == Datagram::Rtcp {
        assert!(rtp::is_rtcp(input));
    }
    let extensions = ours(|| {
        header
            .extensions(input)
            .map(|(_, value)| value.len() + 1)
            .sum::<usize>()
    });
    assert!(extensions <= header.header_len, "elements do not overlap");
    for id in 0..=255 {
        let first = header
            .extensions(input)
            .find(|(found, _)| *found == id)
            .map(|(_, value)| value);
        assert_eq!(ours(|| header.extension(input, id)), first);
    }
    let payload = ours(|| header.payload(input));
    assert!(payload.is_none_or(|payload| header.header_len + payload.len() <= input.len()));
    if let Some((_, original)) = payload.and_then(rtp::split_rtx) {
        assert_eq!(Some(original.len() + 2), payload.map(<[u8]>::len));
    }
    agree(input, &header, payload);
}

fn agree(input: &[u8], header: &Header, payload: Option<&[u8]>) {
    let Ok(theirs) = rtc_rtp::Packet::unmarshal(&mut &input[..]) else {
        return;
    };
    let facts = &theirs.header;
    assert_eq!(
        (
            header.marker,
            header.payload_type,
            header.seq.0,
            header.rtp_time,
            header.ssrc
        ),
        (
            facts.marker,
            facts.payload_type,
            facts.sequence_number,
            facts.timestamp,
            Ssrc(facts.ssrc)
        )
    );
    // After an element that is reserved, or that ends past the extension, `rtc-rtp` loses its
    // place.
    let region = header.header_len - 12 - 4 * facts.csrc.len();
    let elements: usize = header
        .extensions(input)
        .map(|(_, value)| {
            value.len()
                + if facts.extension_profile == 0xBEDE {
                    1
                } else {
                    2
                }
        })
        .sum();
    if let Some(payload) =
        payload.filter(|_| region == if facts.extension { 4 + elements } else { 0 })
    {
        // `rtc-rtp` knows only one of the two-byte form's sixteen profiles. It reads an extension
        // with an unknown profile as a single element.
        let same = || {
            header.extensions(input).eq(facts
                .extensions
                .iter()
                .map(|element| (element.id, &element.payload[..])))
        };
        assert!(!matches!(facts.extension_profile, 0xBEDE | 0x1000) || same());
        assert_eq!(payload, &theirs.payload[..]);
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (extensions, payload, padding) in [
        (&[][..], &b"opus"[..], 0u8),
        (&[(1, &[0x90][..])], b"with a level", 0),
        (&[(2, b"1"), (3, b"q"), (5, &[0, 9])], b"layer", 4),
        (&[(20, b"two-byte form"), (2, b"mid")], b"", 8),
        (&[(4, b"h")], &[0x12, 0x34, 0x90, 0x80, 0x80, 0x01], 0),
    ] {
        let mut template = HeaderTemplate::new(111, Ssrc(0xCAFE_F00D)).expect("a payload type");
        for (id, value) in extensions {
            // We may not write this two-byte form. Then the seed goes without the element.
            let _ = template.push_extension(*id, value);
        }
        let mut packet = vec![0; 128];
        let len = template
            .write(&mut packet, true, Seq(65_535), 0xFFFF_FF00)
            .expect("there is room");
        packet.truncate(len);
        packet.extend_from_slice(payload);
        if padding > 0 {
            packet[0] |= 0x20;
            packet.extend(std::iter::repeat_n(0, usize::from(padding) - 1).chain([padding]));
        }
        seeds.push(packet);
    }
    seeds.push(
        [
            &[0x92, 0xE0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1][..],
            &[7; 8],
            &[0x10, 0, 0, 2, 20, 0, 255, 3, 1, 2, 3, 0],
        ]
        .concat(),
    );
    seeds
}
