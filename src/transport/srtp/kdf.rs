//! Derives session keys from master keys (RFC 3711, section 4.3; RFC 6188 for 256-bit keys). The
//! key derivation rate is zero, as in DTLS-SRTP.

use aes::cipher::{KeyIvInit, StreamCipher};
use aes::{Aes128, Aes256};
use ctr::Ctr128BE;

/// One direction's part of the exported keying material.
pub(super) struct MasterKey<'a> {
    /// Key of 16 or 32 bytes.
    pub(super) key: &'a [u8],
    /// Salt of 12 or 14 bytes.
    pub(super) salt: &'a [u8],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Label {
    RtpKey = 0,
    RtpAuth = 1,
    RtpSalt = 2,
    RtcpKey = 3,
    RtcpAuth = 4,
    RtcpSalt = 5,
}

impl MasterKey<'_> {
    pub(super) fn derive<const N: usize>(&self, label: Label) -> [u8; N] {
        // A 96-bit salt is extended with zeros to 112 bits (RFC 7714, section 11). The last two
        // bytes of the block count blocks.
        let mut block = [0; 16];
        block[..self.salt.len()].copy_from_slice(self.salt);
        block[7] ^= label as u8;
        let mut out = [0; N];
        match self.key.len() {
            16 => keystream::<Ctr128BE<Aes128>>(self.key, &block, &mut out),
            32 => keystream::<Ctr128BE<Aes256>>(self.key, &block, &mut out),
            other => unreachable!("no profile has a master key of {other} bytes"),
        }
        out
    }
}

fn keystream<C: KeyIvInit + StreamCipher>(key: &[u8], iv: &[u8; 16], out: &mut [u8]) {
    C::new_from_slices(key, iv)
        .expect("lengths match the cipher")
        .apply_keystream(out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::srtp::tests::hex;

    #[test]
    fn rfc_3711_appendix_b_3() {
        let (key, salt) = (
            hex("E1F97A0D3E018BE0D64FA32C06DE4139"),
            hex("0EC675AD498AFEEBB6960B3AABE6"),
        );
        let master = MasterKey {
            key: &key,
            salt: &salt,
        };
        assert_eq!(
            master.derive::<16>(Label::RtpKey)[..],
            hex("C61E7A93744F39EE10734AFE3FF7A087")
        );
        assert_eq!(
            master.derive::<14>(Label::RtpSalt)[..],
            hex("30CBBC08863D8C85D49DB34A9AE1")
        );
        assert_eq!(
            master.derive::<20>(Label::RtpAuth)[..],
            hex("CEBE321F6FF7716B6FD4AB49AF256A156D38BAA4")
        );
    }

    #[test]
    fn rfc_6188_section_7_2() {
        let key = hex("f0f04914b513f2763a1b1fa130f10e2998f6f6e43e4309d1e622a0e332b9f1b6");
        let salt = hex("3b04803de51ee7c96423ab5b78d2");
        let master = MasterKey {
            key: &key,
            salt: &salt,
        };
        assert_eq!(
            master.derive::<32>(Label::RtpKey)[..],
            hex("5ba1064e30ec51613cad926c5a28ef731ec7fb397f70a960653caf06554cd8c4")
        );
        assert_eq!(
            master.derive::<14>(Label::RtpSalt)[..],
            hex("fa31791685ca444a9e07c6c64e93")
        );
        assert_eq!(
            master.derive::<20>(Label::RtpAuth)[..],
            hex("fd9c32d39ed5fbb5a9dc96b30818454d1313dc05")
        );
    }
}
