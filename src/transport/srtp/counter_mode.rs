//! AES128_CM_HMAC_SHA1_80 (RFC 3711, sections 4.1.1 and 4.2.1), the profile that Chromium
//! negotiates.

use crate::transport::rtp::Ssrc;
use aes::Aes128Enc;
use aes::cipher::{InnerIvInit, KeyInit, StreamCipher, StreamCipherCoreWrapper};
use ctr::{CtrCore, flavors};
use hmac::{Hmac, Mac};
use sha1::Sha1;

use super::kdf::{Label, MasterKey};
use super::{E_FLAG, INDEX_WORD_LEN, Rejected};

pub(super) const TAG_LEN: usize = 10;
pub(super) const SALT_LEN: usize = 14;

pub(super) struct CounterMode {
    rtp: CounterHalf,
    rtcp: CounterHalf,
}

struct CounterHalf {
    cipher: Aes128Enc,
    /// MAC, keyed once. It is cloned for each packet, which copies two SHA-1 states instead of
    /// hashing the key again.
    mac: Hmac<Sha1>,
    salt: [u8; SALT_LEN],
}

impl CounterMode {
    pub(super) fn new(master: &MasterKey<'_>) -> CounterMode {
        CounterMode {
            rtp: CounterHalf::new(
                &master.derive(Label::RtpKey),
                &master.derive(Label::RtpAuth),
                master.derive(Label::RtpSalt),
            ),
            rtcp: CounterHalf::new(
                &master.derive(Label::RtcpKey),
                &master.derive(Label::RtcpAuth),
                master.derive(Label::RtcpSalt),
            ),
        }
    }

    pub(super) fn seal_rtp(
        &self,
        header: &[u8],
        payload: &mut [u8],
        tag: &mut [u8],
        ssrc: Ssrc,
        index: u64,
    ) {
        self.rtp.apply_keystream(payload, ssrc, index);
        let mac = self.rtp.authenticate([header, payload, &roc(index)]);
        tag.copy_from_slice(&mac.finalize().as_bytes()[..TAG_LEN]);
    }

    pub(super) fn open_rtp(
        &self,
        header: &[u8],
        payload: &mut [u8],
        tag: &[u8],
        ssrc: Ssrc,
        index: u64,
    ) -> Result<(), Rejected> {
        let mac = self.rtp.authenticate([header, payload, &roc(index)]);
        mac.verify_truncated_left(tag)
            .map_err(|_| Rejected::Authentication)?;
        self.rtp.apply_keystream(payload, ssrc, index);
        Ok(())
    }

    /// Seals a compound packet. `trailer` receives the index word, then the tag.
    pub(super) fn seal_rtcp(
        &self,
        header: &[u8],
        payload: &mut [u8],
        trailer: &mut [u8],
        ssrc: Ssrc,
        index: u32,
    ) {
        let (word, tag) = trailer.split_at_mut(INDEX_WORD_LEN);
        word.copy_from_slice(&(E_FLAG | index).to_be_bytes());
        self.rtcp.apply_keystream(payload, ssrc, u64::from(index));
        let mac = self.rtcp.authenticate([header, payload, word]);
        tag.copy_from_slice(&mac.finalize().as_bytes()[..TAG_LEN]);
    }

    pub(super) fn open_rtcp(
        &self,
        header: &[u8],
        payload: &mut [u8],
        trailer: &[u8],
        ssrc: Ssrc,
        index: u32,
    ) -> Result<(), Rejected> {
        let (word, tag) = trailer
            .split_at_checked(INDEX_WORD_LEN)
            .ok_or(Rejected::TooShort)?;
        let mac = self.rtcp.authenticate([header, payload, word]);
        mac.verify_truncated_left(tag)
            .map_err(|_| Rejected::Authentication)?;
        self.rtcp.apply_keystream(payload, ssrc, u64::from(index));
        Ok(())
    }
}

impl CounterHalf {
    fn new(key: &[u8; 16], auth: &[u8; 20], salt: [u8; SALT_LEN]) -> CounterHalf {
        let mac = Hmac::new_from_slice(auth).expect("HMAC takes keys of any length");
        CounterHalf {
            cipher: Aes128Enc::new(key.into()),
            mac,
            salt,
        }
    }

    fn authenticate(&self, parts: [&[u8]; 3]) -> Hmac<Sha1> {
        parts
            .iter()
            .fold(self.mac.clone(), |mac, part| mac.chain_update(part))
    }

    /// The counter starts at (salt << 16) XOR (SSRC << 64) XOR (index << 16).
    fn apply_keystream(&self, payload: &mut [u8], ssrc: Ssrc, index: u64) {
        let mut start = (u128::from(ssrc.0) << 64 | u128::from(index) << 16).to_be_bytes();
        for (byte, salt) in start.iter_mut().zip(&self.salt) {
            *byte ^= salt;
        }
        let counter: CtrCore<&Aes128Enc, flavors::Ctr128BE> =
            CtrCore::inner_iv_init(&self.cipher, &start.into());
        StreamCipherCoreWrapper::from_core(counter).apply_keystream(payload);
    }
}

const fn roc(index: u64) -> [u8; 4] {
    ((index >> 16) as u32).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::srtp::tests::hex;

    #[test]
    fn rfc_3711_appendix_b_2() {
        let key: [u8; 16] = hex("2B7E151628AED2A6ABF7158809CF4F3C").try_into().unwrap();
        let salt = hex("F0F1F2F3F4F5F6F7F8F9FAFBFCFD").try_into().unwrap();
        let mut stream = vec![0; 0xFF02 * 16];
        CounterHalf::new(&key, &[0; 20], salt).apply_keystream(&mut stream, Ssrc(0), 0);
        let table = [
            (0, "E03EAD0935C95E80E166B16DD92B4EB4"),
            (1, "D23513162B02D0F72A43A2FE4A5F97AB"),
            (2, "41E95B3BB0A2E8DD477901E4FCA894C0"),
            (0xFEFF, "EC8CDF7398607CB0F2D21675EA9EA1E4"),
            (0xFF00, "362B7C3C6773516318A077D7FC5073AE"),
            (0xFF01, "6A2CC3787889374FBEB4C81B17BA6C44"),
        ];
        for (block, expected) in table {
            assert_eq!(
                stream[block * 16..][..16],
                hex(expected),
                "block {block:#x}"
            );
        }
    }
}
