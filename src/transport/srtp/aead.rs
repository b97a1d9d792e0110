//! AEAD_AES_128_GCM and AEAD_AES_256_GCM (RFC 7714).

use crate::transport::rtp::Ssrc;
use ring::aead::{AES_128_GCM, AES_256_GCM, Aad, Algorithm, LessSafeKey, Nonce, Tag, UnboundKey};

use super::kdf::{Label, MasterKey};
use super::{E_FLAG, INDEX_WORD_LEN, Profile, RTCP_HEADER_LEN, Rejected};

pub(super) const TAG_LEN: usize = 16;
pub(super) const SALT_LEN: usize = 12;

/// Keys for media and reports. What media needs is stored together, so that it is fetched as a
/// whole. Reports come once a second, and their half is stored elsewhere.
pub(super) struct Gcm {
    profile: Profile,
    rtp: AeadHalf,
    rtcp: Box<AeadHalf>,
}

struct AeadHalf {
    key: LessSafeKey,
    salt: [u8; SALT_LEN],
}

impl Gcm {
    pub(super) fn aes_128(master: &MasterKey<'_>) -> Gcm {
        Gcm {
            profile: Profile::AeadAes128Gcm,
            rtp: AeadHalf::new(
                &AES_128_GCM,
                &master.derive::<16>(Label::RtpKey),
                master.derive(Label::RtpSalt),
            ),
            rtcp: Box::new(AeadHalf::new(
                &AES_128_GCM,
                &master.derive::<16>(Label::RtcpKey),
                master.derive(Label::RtcpSalt),
            )),
        }
    }

    pub(super) fn aes_256(master: &MasterKey<'_>) -> Gcm {
        Gcm {
            profile: Profile::AeadAes256Gcm,
            rtp: AeadHalf::new(
                &AES_256_GCM,
                &master.derive::<32>(Label::RtpKey),
                master.derive(Label::RtpSalt),
            ),
            rtcp: Box::new(AeadHalf::new(
                &AES_256_GCM,
                &master.derive::<32>(Label::RtcpKey),
                master.derive(Label::RtcpSalt),
            )),
        }
    }

    pub(super) const fn profile(&self) -> Profile {
        self.profile
    }

    pub(super) fn seal_rtp(
        &self,
        header: &[u8],
        payload: &mut [u8],
        tag: &mut [u8],
        ssrc: Ssrc,
        index: u64,
    ) {
        self.rtp.seal(header, payload, tag, ssrc, index);
    }

    pub(super) fn open_rtp(
        &self,
        header: &[u8],
        payload: &mut [u8],
        tag: &[u8],
        ssrc: Ssrc,
        index: u64,
    ) -> Result<(), Rejected> {
        self.rtp.open(header, payload, tag, ssrc, index)
    }

    /// Seals a compound packet. `trailer` receives the tag, then the index word.
    pub(super) fn seal_rtcp(
        &self,
        header: &[u8],
        payload: &mut [u8],
        trailer: &mut [u8],
        ssrc: Ssrc,
        index: u32,
    ) {
        let (tag, word) = trailer.split_at_mut(TAG_LEN);
        word.copy_from_slice(&(E_FLAG | index).to_be_bytes());
        self.rtcp.seal(
            &rtcp_associated_data(header, word),
            payload,
            tag,
            ssrc,
            u64::from(index),
        );
    }

    pub(super) fn open_rtcp(
        &self,
        header: &[u8],
        payload: &mut [u8],
        trailer: &[u8],
        ssrc: Ssrc,
        index: u32,
    ) -> Result<(), Rejected> {
        let (tag, word) = trailer
            .split_at_checked(TAG_LEN)
            .ok_or(Rejected::TooShort)?;
        self.rtcp.open(
            &rtcp_associated_data(header, word),
            payload,
            tag,
            ssrc,
            u64::from(index),
        )
    }
}

impl AeadHalf {
    fn new(algorithm: &'static Algorithm, key: &[u8], salt: [u8; SALT_LEN]) -> AeadHalf {
        let key = UnboundKey::new(algorithm, key).expect("the key has the algorithm's length");
        AeadHalf {
            key: LessSafeKey::new(key),
            salt,
        }
    }

    fn seal(
        &self,
        associated: &[u8],
        payload: &mut [u8],
        tag_out: &mut [u8],
        ssrc: Ssrc,
        index: u64,
    ) {
        let nonce = self.nonce(ssrc, index);
        let tag = self
            .key
            .seal_in_place_separate_tag(nonce, Aad::from(associated), payload)
            .expect("a datagram is far below GCM's limit");
        tag_out.copy_from_slice(tag.as_ref());
    }

    fn open(
        &self,
        associated: &[u8],
        payload: &mut [u8],
        tag: &[u8],
        ssrc: Ssrc,
        index: u64,
    ) -> Result<(), Rejected> {
        let tag = Tag::try_from(tag).map_err(|_| Rejected::TooShort)?;
        let nonce = self.nonce(ssrc, index);
        match self
            .key
            .open_in_place_separate_tag(nonce, Aad::from(associated), tag, payload, 0..)
        {
            Ok(_) => Ok(()),
            Err(ring::error::Unspecified) => Err(Rejected::Authentication),
        }
    }

    /// Returns the nonce: two zero bytes, SSRC and 48-bit index, XOR salt (RFC 7714, sections 8.1
    /// and 9.1; the SRTCP index is padded with zeros to 48 bits).
    fn nonce(&self, ssrc: Ssrc, index: u64) -> Nonce {
        let counter = u128::from(ssrc.0) << 48 | u128::from(index);
        let mut nonce = self.salt;
        for (byte, mask) in nonce.iter_mut().zip(&counter.to_be_bytes()[4..]) {
            *byte ^= mask;
        }
        Nonce::assume_unique_for_key(nonce)
    }
}

/// Returns the associated data: the clear header and the index word (RFC 7714, section 9.2).
fn rtcp_associated_data(header: &[u8], word: &[u8]) -> [u8; RTCP_HEADER_LEN + INDEX_WORD_LEN] {
    let mut associated = [0; RTCP_HEADER_LEN + INDEX_WORD_LEN];
    associated[..RTCP_HEADER_LEN].copy_from_slice(header);
    associated[RTCP_HEADER_LEN..].copy_from_slice(word);
    associated
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::srtp::tests::hex;

    const RTP: &str = "8040f17b8041f8d35501a0b247616c6c696120657374206f6d6e69732064697669736120696e207061727465732074726573";
    const RTCP: &str = "81c8000d4d6172734e5450314e545032525450200000042a0000e9304c756e61deadbeefdeadbeefdeadbeefdeadbeefdeadbeef";
    const INDEX: u32 = 0x5d4;

    /// Uses session keys, because RFC 7714 gives no master keys.
    fn with_session_key(profile: Profile) -> Gcm {
        let key: Vec<u8> = (0..32).collect();
        let salt = *b"Quid pro quo";
        let half = || match profile {
            Profile::AeadAes256Gcm => AeadHalf::new(&AES_256_GCM, &key, salt),
            _ => AeadHalf::new(&AES_128_GCM, &key[..16], salt),
        };
        Gcm {
            profile,
            rtp: half(),
            rtcp: Box::new(half()),
        }
    }

    #[test]
    fn rfc_7714_sections_16_1_and_16_2() {
        let table = [
            (
                Profile::AeadAes128Gcm,
                "8040f17b8041f8d35501a0b2f24de3a3fb34de6cacba861c9d7e4bcabe633bd50d294e6f42a5f47a51c7d19b36de3adf8833899d7f27beb16a9152cf765ee4390cce",
            ),
            (
                Profile::AeadAes256Gcm,
                "8040f17b8041f8d35501a0b232b1de78a822fe12ef9f78fa332e33aab18012389a58e2f3b50b2a0276ffae0f1ba63799b87b7aa3db36dfffd6b0f9bb7878d7a76c13",
            ),
        ];
        for (profile, expected) in table {
            let gcm = with_session_key(profile);
            let mut packet = hex(RTP);
            let mut tag = [0; TAG_LEN];
            let (header, payload) = packet.split_at_mut(12);
            gcm.seal_rtp(header, payload, &mut tag, Ssrc(0x5501_a0b2), 0xf17b);
            assert_eq!(
                [&*header, payload, &tag].concat(),
                hex(expected),
                "{profile:?}"
            );
            assert_eq!(
                gcm.open_rtp(header, payload, &tag, Ssrc(0x5501_a0b2), 0xf17b),
                Ok(())
            );
            assert_eq!(packet, hex(RTP));
        }
    }

    #[test]
    fn rfc_7714_sections_17_1_and_17_2() {
        let table = [
            (
                Profile::AeadAes128Gcm,
                "81c8000d4d61727363e94885dcdab67ca727d7662f6b7e997ff5c0f76c06f32dc676a5f1730d6fda4ce09b4686303ded0bb9275bc84aa45896cf4d2fc5abf87245d9eade800005d4",
            ),
            (
                Profile::AeadAes256Gcm,
                "81c8000d4d617273d50ae4d1f5ce5d304ba297e47d470c282c3ece5dbffe0a50a2eaa5c1110555be8415f658c61de0476f1b6fad1d1eb30c4446839f57ff6f6cb26ac3be800005d4",
            ),
        ];
        for (profile, expected) in table {
            let gcm = with_session_key(profile);
            let mut packet = hex(RTCP);
            let mut trailer = [0; TAG_LEN + INDEX_WORD_LEN];
            let (header, payload) = packet.split_at_mut(RTCP_HEADER_LEN);
            gcm.seal_rtcp(header, payload, &mut trailer, Ssrc(0x4d61_7273), INDEX);
            assert_eq!(
                [&*header, payload, &trailer].concat(),
                hex(expected),
                "{profile:?}"
            );
            assert_eq!(
                gcm.open_rtcp(header, payload, &trailer, Ssrc(0x4d61_7273), INDEX),
                Ok(())
            );
            assert_eq!(packet, hex(RTCP));
        }
    }
}
