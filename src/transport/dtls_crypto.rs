//! Cryptography for DTLS by `ring`, which TLS and SRTP use too. `dimpl` would otherwise bring a
//! library of its own, whose C code takes longer to compile than all of our code.
//!
//! Nothing is computed here. This module only maps `dimpl`'s requests to functions of `ring` (and,
//! for certificates, of `webpki`). `dimpl` checks all of it against known values whenever a
//! configuration is built.

use std::fmt;

use dimpl::crypto::{
    Aad, ActiveKeyExchange, Buf, Cipher, CryptoProvider, Dtls12CipherSuite, Dtls13CipherSuite,
    HashAlgorithm, HashContext, HashProvider, HmacProvider, KeyProvider, NamedGroup, Nonce,
    SecureRandom, SignatureAlgorithm, SignatureVerifier, SupportedDtls12CipherSuite,
    SupportedDtls13CipherSuite, SupportedKxGroup, TmpBuf,
};
use dimpl::{CryptoError, CryptoOperation};
use ring::aead::quic;
use ring::rand::{SecureRandom as _, SystemRandom};
use ring::{aead, agreement, digest, hmac};
use rustls::pki_types::{CertificateDer, SignatureVerificationAlgorithm};

/// Returns a provider for all of DTLS 1.2 with ECDSA and AEAD. `key` is the only private key.
pub(super) fn provider(key: &'static dyn KeyProvider) -> CryptoProvider {
    CryptoProvider {
        kx_groups: &[
            &DtlsGroup(NamedGroup::X25519),
            &DtlsGroup(NamedGroup::Secp256r1),
            &DtlsGroup(NamedGroup::Secp384r1),
        ],
        signature_verification: &Verifier,
        key_provider: key,
        secure_random: &DtlsRandom,
        hash_provider: &Hashes,
        hmac_provider: &Hmacs,
        cipher_suites: &[
            &DtlsSuite::Aes128Gcm,
            &DtlsSuite::Aes256Gcm,
            &DtlsSuite::ChaCha20Poly1305,
        ],
        // DTLS 1.3 is never used here, but `dimpl` requires one suite of it.
        dtls13_cipher_suites: &[&Suite13],
    }
}

fn failed(operation: CryptoOperation) -> CryptoError {
    CryptoError::OperationFailed(operation)
}

/// Group for the key exchange.
#[derive(Debug)]
struct DtlsGroup(NamedGroup);

impl SupportedKxGroup for DtlsGroup {
    fn name(&self) -> NamedGroup {
        self.0
    }

    fn start_exchange(&self, mut public: Buf) -> Result<Box<dyn ActiveKeyExchange>, CryptoError> {
        let algorithm = match self.0 {
            NamedGroup::X25519 => &agreement::X25519,
            NamedGroup::Secp256r1 => &agreement::ECDH_P256,
            NamedGroup::Secp384r1 => &agreement::ECDH_P384,
            other => return Err(CryptoError::UnsupportedKeyExchangeGroup(other)),
        };
        let key = agreement::EphemeralPrivateKey::generate(algorithm, &SystemRandom::new())
            .map_err(|_| failed(CryptoOperation::GenerateEphemeralKey))?;
        let computed = key
            .compute_public_key()
            .map_err(|_| failed(CryptoOperation::ComputePublicKey))?;
        public.clear();
        public.extend_from_slice(computed.as_ref());
        Ok(Box::new(DtlsKeyExchange {
            group: self.0,
            key,
            public,
        }))
    }
}

/// One side of a key exchange in progress.
struct DtlsKeyExchange {
    group: NamedGroup,
    key: agreement::EphemeralPrivateKey,
    public: Buf,
}

impl fmt::Debug for DtlsKeyExchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DtlsKeyExchange({:?}, ..)", self.group)
    }
}

impl ActiveKeyExchange for DtlsKeyExchange {
    fn pub_key(&self) -> &[u8] {
        &self.public
    }

    fn complete(self: Box<Self>, theirs: &[u8], out: &mut Buf) -> Result<(), CryptoError> {
        let theirs = agreement::UnparsedPublicKey::new(self.key.algorithm(), theirs);
        // This refuses points that are not on the curve, and an all-zero X25519 secret (RFC 7748,
        // section 6.1).
        let agreed = agreement::agree_ephemeral(self.key, &theirs, |secret| {
            out.clear();
            out.extend_from_slice(secret);
        });
        agreed.map_err(|_| CryptoError::InvalidPublicKey(self.group))
    }

    fn group(&self) -> NamedGroup {
        self.group
    }
}

/// Verifies the other side's signatures with the key of its certificate. The fingerprint in the
/// description authenticates the certificate, not this check.
#[derive(Debug)]
struct Verifier;

impl SignatureVerifier for Verifier {
    fn verify_signature(
        &self,
        certificate: &[u8],
        data: &[u8],
        signature: &[u8],
        hash: HashAlgorithm,
        kind: SignatureAlgorithm,
    ) -> Result<(), CryptoError> {
        if kind != SignatureAlgorithm::ECDSA {
            return Err(CryptoError::UnsupportedSignatureAlgorithm(kind));
        }
        // In DTLS 1.2 the hash does not determine the curve, so both are tried. A certificate has
        // one curve, and the algorithm for the other curve refuses it.
        let algorithms: [(NamedGroup, &dyn SignatureVerificationAlgorithm); 2] = match hash {
            HashAlgorithm::SHA256 => [
                (NamedGroup::Secp256r1, webpki::ring::ECDSA_P256_SHA256),
                (NamedGroup::Secp384r1, webpki::ring::ECDSA_P384_SHA256),
            ],
            HashAlgorithm::SHA384 => [
                (NamedGroup::Secp256r1, webpki::ring::ECDSA_P256_SHA384),
                (NamedGroup::Secp384r1, webpki::ring::ECDSA_P384_SHA384),
            ],
            _ => return Err(CryptoError::UnsupportedSignatureAlgorithm(kind)),
        };
        let certificate = CertificateDer::from(certificate);
        let certificate = webpki::EndEntityCert::try_from(&certificate)
            .map_err(|_| CryptoError::CertificateParseFailed)?;
        for (group, algorithm) in algorithms {
            match certificate.verify_signature(algorithm, data, signature) {
                Ok(()) => return Ok(()),
                Err(webpki::Error::UnsupportedSignatureAlgorithmForPublicKeyContext(_)) => {}
                Err(_) => {
                    return Err(CryptoError::SignatureVerificationFailed {
                        signature: kind,
                        hash,
                        group,
                    });
                }
            }
        }
        Err(CryptoError::UnsupportedPublicKeyAlgorithm)
    }
}

#[derive(Debug)]
struct DtlsRandom;

impl SecureRandom for DtlsRandom {
    fn fill(&self, bytes: &mut [u8]) -> Result<(), CryptoError> {
        let filled = SystemRandom::new().fill(bytes);
        filled.map_err(|_| failed(CryptoOperation::FillRandom))
    }
}

#[derive(Debug)]
struct Hashes;

impl HashProvider for Hashes {
    /// # Panics
    /// Panics for a hash that none of the suites above uses.
    fn create_hash(&self, hash: HashAlgorithm) -> Box<dyn HashContext> {
        let algorithm = match hash {
            HashAlgorithm::SHA256 => &digest::SHA256,
            HashAlgorithm::SHA384 => &digest::SHA384,
            other => panic!("no suite of ours has {other:?}"),
        };
        Box::new(Transcript(digest::Context::new(algorithm)))
    }
}

/// Running hash of a handshake.
struct Transcript(digest::Context);

impl fmt::Debug for Transcript {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Transcript(..)")
    }
}

impl HashContext for Transcript {
    fn update(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    fn clone_and_finalize(&self, out: &mut Buf) {
        out.clear();
        out.extend_from_slice(self.0.clone().finish().as_ref());
    }
}

#[derive(Debug)]
struct Hmacs;

impl HmacProvider for Hmacs {
    fn hmac(
        &self,
        hash: HashAlgorithm,
        key: &[u8],
        data: &[u8],
        out: &mut [u8],
    ) -> Result<usize, CryptoError> {
        let algorithm = match hash {
            HashAlgorithm::SHA256 => hmac::HMAC_SHA256,
            HashAlgorithm::SHA384 => hmac::HMAC_SHA384,
            other => return Err(CryptoError::UnsupportedHmacHash(other)),
        };
        let tag = hmac::sign(&hmac::Key::new(algorithm, key), data);
        let tag = tag.as_ref();
        out[..tag.len()].copy_from_slice(tag);
        Ok(tag.len())
    }
}

/// A cipher suite of DTLS 1.2.
#[derive(Clone, Copy, Debug)]
enum DtlsSuite {
    Aes128Gcm,
    Aes256Gcm,
    ChaCha20Poly1305,
}

impl DtlsSuite {
    fn algorithm(self) -> &'static aead::Algorithm {
        match self {
            DtlsSuite::Aes128Gcm => &aead::AES_128_GCM,
            DtlsSuite::Aes256Gcm => &aead::AES_256_GCM,
            DtlsSuite::ChaCha20Poly1305 => &aead::CHACHA20_POLY1305,
        }
    }
}

impl SupportedDtls12CipherSuite for DtlsSuite {
    fn suite(&self) -> Dtls12CipherSuite {
        match self {
            DtlsSuite::Aes128Gcm => Dtls12CipherSuite::ECDHE_ECDSA_AES128_GCM_SHA256,
            DtlsSuite::Aes256Gcm => Dtls12CipherSuite::ECDHE_ECDSA_AES256_GCM_SHA384,
            DtlsSuite::ChaCha20Poly1305 => Dtls12CipherSuite::ECDHE_ECDSA_CHACHA20_POLY1305_SHA256,
        }
    }

    fn hash_algorithm(&self) -> HashAlgorithm {
        match self {
            DtlsSuite::Aes128Gcm | DtlsSuite::ChaCha20Poly1305 => HashAlgorithm::SHA256,
            DtlsSuite::Aes256Gcm => HashAlgorithm::SHA384,
        }
    }

    /// Returns the lengths of the MAC, the key and the fixed part of the nonce (RFC 5288, section
    /// 3; RFC 7905, section 2).
    fn key_lengths(&self) -> (usize, usize, usize) {
        (
            0,
            self.algorithm().key_len(),
            12 - self.explicit_nonce_len(),
        )
    }

    fn explicit_nonce_len(&self) -> usize {
        match self {
            DtlsSuite::Aes128Gcm | DtlsSuite::Aes256Gcm => 8,
            DtlsSuite::ChaCha20Poly1305 => 0,
        }
    }

    fn tag_len(&self) -> usize {
        self.algorithm().tag_len()
    }

    fn create_cipher(&self, key: &[u8]) -> Result<Box<dyn Cipher>, CryptoError> {
        Sealing::boxed(self.algorithm(), key)
    }
}

/// The one DTLS 1.3 suite that `dimpl` requires.
#[derive(Debug)]
struct Suite13;

impl SupportedDtls13CipherSuite for Suite13 {
    fn suite(&self) -> Dtls13CipherSuite {
        Dtls13CipherSuite::CHACHA20_POLY1305_SHA256
    }

    fn hash_algorithm(&self) -> HashAlgorithm {
        HashAlgorithm::SHA256
    }

    fn key_len(&self) -> usize {
        aead::CHACHA20_POLY1305.key_len()
    }

    fn iv_len(&self) -> usize {
        aead::CHACHA20_POLY1305.nonce_len()
    }

    fn tag_len(&self) -> usize {
        aead::CHACHA20_POLY1305.tag_len()
    }

    fn create_cipher(&self, key: &[u8]) -> Result<Box<dyn Cipher>, CryptoError> {
        Sealing::boxed(&aead::CHACHA20_POLY1305, key)
    }

    /// Computes the mask of a record number (RFC 9147, section 4.2.3). QUIC has the same function
    /// (RFC 9001, section 5.4.4) and uses five bytes of it, which are enough.
    fn encrypt_sn(&self, key: &[u8], sample: &[u8; 16]) -> [u8; 16] {
        let key = quic::HeaderProtectionKey::new(&quic::CHACHA20, key);
        let five = key.and_then(|key| key.new_mask(sample));
        let mut mask = [0; 16];
        if let Ok(five) = five {
            mask[..five.len()].copy_from_slice(&five);
        }
        mask
    }
}

/// Cipher of one direction.
struct Sealing(aead::LessSafeKey);

impl fmt::Debug for Sealing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sealing(..)")
    }
}

impl Sealing {
    fn boxed(
        algorithm: &'static aead::Algorithm,
        key: &[u8],
    ) -> Result<Box<dyn Cipher>, CryptoError> {
        let key = aead::UnboundKey::new(algorithm, key)
            .map_err(|_| failed(CryptoOperation::CreateCipher))?;
        Ok(Box::new(Sealing(aead::LessSafeKey::new(key))))
    }

    fn nonce(nonce: &Nonce) -> Result<aead::Nonce, CryptoError> {
        aead::Nonce::try_assume_unique_for_key(nonce).map_err(|_| CryptoError::InvalidNonce)
    }
}

impl Cipher for Sealing {
    fn encrypt(&mut self, text: &mut Buf, aad: Aad, nonce: Nonce) -> Result<(), CryptoError> {
        let aad = aead::Aad::from(&aad[..]);
        let sealed = self
            .0
            .seal_in_place_append_tag(Sealing::nonce(&nonce)?, aad, text);
        sealed.map_err(|_| failed(CryptoOperation::Encrypt))
    }

    fn decrypt(&mut self, text: &mut TmpBuf, aad: Aad, nonce: Nonce) -> Result<(), CryptoError> {
        let aad = aead::Aad::from(&aad[..]);
        let opened = self
            .0
            .open_in_place(Sealing::nonce(&nonce)?, aad, text.as_mut());
        let length = opened.map_err(|_| failed(CryptoOperation::Decrypt))?.len();
        text.truncate(length);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_that_makes_no_secret_is_refused() {
        for (group, public) in [
            (NamedGroup::X25519, vec![0; 32]),
            (NamedGroup::Secp256r1, vec![4; 65]),
            (NamedGroup::Secp384r1, vec![]),
        ] {
            let exchange = DtlsGroup(group).start_exchange(Buf::new()).unwrap();
            let refused = exchange.complete(&public, &mut Buf::new());
            assert_eq!(refused, Err(CryptoError::InvalidPublicKey(group)));
        }
    }

    #[test]
    fn hostile_certificates_are_refused() {
        for certificate in [&[][..], &[0x30, 0x03, 0x02, 0x01, 0x00], &[0xFF; 600]] {
            let verified = Verifier.verify_signature(
                certificate,
                b"data",
                b"signature",
                HashAlgorithm::SHA256,
                SignatureAlgorithm::ECDSA,
            );
            assert_eq!(verified, Err(CryptoError::CertificateParseFailed));
        }
    }
}
