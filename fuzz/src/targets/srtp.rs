//! SRTP and SRTCP with valid keys: a packet that was changed on the way is refused, one that was
//! not is opened, and none is opened twice.

use throng::transport::rtp::Header;
use throng::transport::srtp::{DtlsRole, Opener, Profile, Rejected, Sealer, session};

use super::{Script, Target, chunk, ours};

pub const TARGET: Target = Target {
    name: "srtp",
    run,
    seeds,
    mutations: 1_500,
    // The replay state of as many senders as the input can name.
    memory: Some((64 << 10, 24)),
};

const PROFILES: [Profile; 3] = [
    Profile::AeadAes128Gcm,
    Profile::AeadAes256Gcm,
    Profile::Aes128CmHmacSha1_80,
];

/// Changes to a packet on its way.
const AS_IT_IS: u8 = 0;
const CHANGED: u8 = 1;
const CUT: u8 = 2;
const LONGER: u8 = 3;
const RAW: u8 = 4;

fn ends(profile: Profile) -> (Sealer, Opener) {
    let material: Vec<u8> = (0..profile.keying_material_len() as u8).collect();
    let (sealer, _) = session(profile, &material, DtlsRole::Server).expect("the length is right");
    let (_, opener) = session(profile, &material, DtlsRole::Client).expect("the length is right");
    (sealer, opener)
}

fn run(input: &[u8]) {
    let mut script = Script::new(input);
    let profile = PROFILES[usize::from(script.u8()) % PROFILES.len()];
    let (mut sealer, mut opener) = ends(profile);
    while !script.is_over() {
        let (way, place, bits) = (script.u8() % 5, script.u16(), script.u8());
        let plain = script.chunk();
        if way == RAW {
            let mut bytes = plain.to_vec();
            let header_len = ours(|| Header::parse(plain)).map_or(12, |header| header.header_len);
            let opened = ours(|| opener.open_rtp(&mut bytes, header_len, u64::from(place)));
            assert!(opened.is_err(), "nobody sealed this");
            assert!(
                ours(|| opener.open_rtcp(&mut plain.to_vec())).is_err(),
                "nor this"
            );
            continue;
        }
        rtp(&sealer, &opener, plain, (way, place, bits));
        rtcp(&mut sealer, &mut opener, plain, (way, place, bits));
    }
}

fn rtp(sealer: &Sealer, opener: &Opener, plain: &[u8], harm: (u8, u16, u8)) {
    let Some(header) = ours(|| Header::parse(plain)) else {
        return;
    };
    let index = 5 << 16 | u64::from(header.seq.0);
    let mut bytes = [plain, &[0; 32]].concat();
    let sealed = ours(|| sealer.seal_rtp(&mut bytes, header.header_len, plain.len(), index))
        .expect("header and index fit");
    bytes.truncate(sealed);
    let harmed = spoil(&mut bytes, harm);
    let opened = ours(|| opener.open_rtp(&mut bytes, header.header_len, index));
    match opened {
        Ok(len) => assert!(!harmed && bytes[..len] == *plain),
        Err(_) => assert!(harmed, "{:?} refused its own packet", opener.profile()),
    }
}

fn rtcp(sealer: &mut Sealer, opener: &mut Opener, plain: &[u8], harm: (u8, u16, u8)) {
    let mut bytes = [plain, &[0; 32]].concat();
    let Ok(sealed) = ours(|| sealer.seal_rtcp(&mut bytes, plain.len())) else {
        assert!(plain.len() < 8);
        return;
    };
    bytes.truncate(sealed);
    let unharmed = bytes.clone();
    let harmed = spoil(&mut bytes, harm);
    match ours(|| opener.open_rtcp(&mut bytes)) {
        Ok(len) => assert!(!harmed && bytes[..len] == *plain),
        Err(_) => assert!(harmed, "{:?} refused its own compound", opener.profile()),
    }
    let again = ours(|| opener.open_rtcp(&mut unharmed.clone()));
    if harmed {
        // The forged packet must not have used up the true packet's place.
        assert_eq!(again, Ok(plain.len()));
    } else {
        assert_eq!(again, Err(Rejected::Replay));
    }
}

/// Changes a packet. Returns whether anything is different now.
fn spoil(bytes: &mut Vec<u8>, (way, place, bits): (u8, u16, u8)) -> bool {
    match way {
        AS_IT_IS => false,
        CHANGED => {
            let at = usize::from(place) % bytes.len();
            bytes[at] ^= bits;
            bits != 0
        }
        CUT => {
            bytes.truncate(usize::from(place) % bytes.len());
            true
        }
        LONGER => {
            bytes.extend(std::iter::repeat_n(bits, 1 + usize::from(place) % 64));
            true
        }
        way => unreachable!("{way}"),
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let rtp = [
        &[0x80, 111, 0xFF, 0xFF, 0, 0, 0, 1, 0, 0, 0, 2][..],
        b"a payload",
    ]
    .concat();
    let rtcp = [0x80, 201, 0, 1, 0, 0, 0, 9];
    let mut seeds = Vec::new();
    for profile in 0..PROFILES.len() as u8 {
        let mut seed = vec![profile];
        for (way, place, bits) in [
            (AS_IT_IS, 0u16, 0u8),
            (CHANGED, 14, 1),
            (CUT, 20, 0),
            (LONGER, 3, 9),
            (RAW, 7, 0),
        ] {
            for plain in [&rtp[..], &rtcp[..]] {
                seed.extend([way, (place >> 8) as u8, place as u8, bits]);
                seed.extend(chunk(plain));
            }
        }
        seeds.push(seed);
    }
    seeds
}
