//! SRTP and SRTCP in place: a [`Sealer`] for sending and an [`Opener`] for receiving, keyed by DTLS
//! (RFC 5764).
//!
//! Nothing here allocates for a packet. The rollover counter and the RTP replay window belong to a
//! stream and are kept with it (see [`super::sequence`]). The SRTCP index and its replay state are
//! kept here.

mod aead;
mod counter_mode;
mod kdf;
mod rtcp_replay;

use std::fmt;

use aead::Gcm;
use counter_mode::CounterMode;
use kdf::MasterKey;
use rtcp_replay::RtcpReplay;

use super::rtp::{Ssrc, be16, be32};

/// Protection profiles that we offer and accept (RFC 5764, section 4.1.2; RFC 7714, section 14.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    AeadAes128Gcm,
    AeadAes256Gcm,
    Aes128CmHmacSha1_80,
}

impl Profile {
    /// Returns the number of bytes that protection adds to an RTP packet.
    pub const fn rtp_overhead(self) -> usize {
        match self {
            Profile::AeadAes128Gcm | Profile::AeadAes256Gcm => aead::TAG_LEN,
            Profile::Aes128CmHmacSha1_80 => counter_mode::TAG_LEN,
        }
    }

    /// Returns the number of bytes that protection adds to a compound RTCP packet.
    pub const fn rtcp_overhead(self) -> usize {
        self.rtp_overhead() + INDEX_WORD_LEN
    }

    /// Returns the number of bytes to export from DTLS: two keys and two salts.
    pub const fn keying_material_len(self) -> usize {
        2 * (self.key_len() + self.salt_len())
    }

    const fn key_len(self) -> usize {
        match self {
            Profile::AeadAes128Gcm | Profile::Aes128CmHmacSha1_80 => 16,
            Profile::AeadAes256Gcm => 32,
        }
    }

    const fn salt_len(self) -> usize {
        match self {
            Profile::AeadAes128Gcm | Profile::AeadAes256Gcm => aead::SALT_LEN,
            Profile::Aes128CmHmacSha1_80 => counter_mode::SALT_LEN,
        }
    }
}

/// Our role in the DTLS handshake. It decides which of the exported keys is ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DtlsRole {
    Client,
    Server,
}

/// Error returned when the exported keying material does not fit the profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyingMaterialLength {
    pub expected: usize,
    pub actual: usize,
}

impl fmt::Display for KeyingMaterialLength {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "DTLS exported {} bytes of SRTP keying material, the profile needs {}",
            self.actual, self.expected
        )
    }
}

impl std::error::Error for KeyingMaterialLength {}

/// Error returned when an outgoing packet was not sealed. Each one is a mistake of the caller,
/// except `KeyExhausted`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SealError {
    /// The lengths contradict each other, or the buffer has no room for the overhead.
    Length,
    /// The index does not end in the packet's sequence number, or exceeds 48 bits.
    Index,
    /// 2^31 SRTCP packets have been sent under one key (RFC 3711, section 9.2). The connection must
    /// end.
    KeyExhausted,
}

impl fmt::Display for SealError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SealError::Length => "packet and buffer lengths do not leave room to seal",
            SealError::Index => "packet index and sequence number disagree",
            SealError::KeyExhausted => "the SRTCP key has protected 2^31 packets",
        })
    }
}

impl std::error::Error for SealError {}

/// Reason why a received packet was not opened. The buffer's contents are invalid then; drop the
/// packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejected {
    /// The packet is too short for header, tag and index.
    TooShort,
    /// SRTCP with the E flag clear. WebRTC always encrypts, so this is not from our peer.
    NotEncrypted,
    /// The tag is wrong: forged, damaged, or sealed with another key or rollover counter.
    Authentication,
    /// The SRTCP index was seen before, or is too old to tell.
    Replay,
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Rejected::TooShort => "too short for SRTP",
            Rejected::NotEncrypted => "SRTCP without encryption",
            Rejected::Authentication => "SRTP authentication failed",
            Rejected::Replay => "SRTCP replay",
        })
    }
}

impl std::error::Error for Rejected {}

/// Derives the keys of both directions from the keying material that DTLS exported under
/// `EXTRACTOR-dtls_srtp`: client key, server key, client salt, server salt (RFC 5764, section 4.2).
/// `role` is our role.
pub fn session(
    profile: Profile,
    keying_material: &[u8],
    role: DtlsRole,
) -> Result<(Sealer, Opener), KeyingMaterialLength> {
    let expected = profile.keying_material_len();
    if keying_material.len() != expected {
        return Err(KeyingMaterialLength {
            expected,
            actual: keying_material.len(),
        });
    }
    let (keys, salts) = keying_material.split_at(2 * profile.key_len());
    let (client_key, server_key) = keys.split_at(profile.key_len());
    let (client_salt, server_salt) = salts.split_at(profile.salt_len());
    let client = Suite::new(
        profile,
        &MasterKey {
            key: client_key,
            salt: client_salt,
        },
    );
    let server = Suite::new(
        profile,
        &MasterKey {
            key: server_key,
            salt: server_salt,
        },
    );
    let (ours, theirs) = match role {
        DtlsRole::Client => (client, server),
        DtlsRole::Server => (server, client),
    };
    Ok((
        Sealer {
            suite: ours,
            next_rtcp_index: 0,
        },
        Opener {
            suite: theirs,
            rtcp_replay: RtcpReplay::default(),
        },
    ))
}

/// Protects outgoing packets.
pub struct Sealer {
    suite: Suite,
    next_rtcp_index: u32,
}

impl Sealer {
    pub const fn profile(&self) -> Profile {
        self.suite.profile()
    }

    /// Seals `buf[..len]`, header and payload, in place and returns the protected length.
    ///
    /// `index` is ROC << 16 | SEQ and must never repeat for an SSRC, because with GCM a repetition
    /// reveals the key.
    pub fn seal_rtp(
        &self,
        buf: &mut [u8],
        header_len: usize,
        len: usize,
        index: u64,
    ) -> Result<usize, SealError> {
        let sealed_len = len
            .checked_add(self.profile().rtp_overhead())
            .ok_or(SealError::Length)?;
        let packet = buf.get_mut(..sealed_len).ok_or(SealError::Length)?;
        if header_len < RTP_HEADER_LEN {
            return Err(SealError::Length);
        }
        let (plain, tag) = packet.split_at_mut(len);
        let (header, payload) = plain
            .split_at_mut_checked(header_len)
            .ok_or(SealError::Length)?;
        let (Some(seq), Some(ssrc)) = (be16(header, 2), ssrc_at(header, 8)) else {
            return Err(SealError::Length);
        };
        if index >> 48 != 0 || index as u16 != seq {
            return Err(SealError::Index);
        }
        match &self.suite {
            Suite::Gcm(gcm) => gcm.seal_rtp(header, payload, tag, ssrc, index),
            Suite::CounterMode(cm) => cm.seal_rtp(header, payload, tag, ssrc, index),
        }
        Ok(sealed_len)
    }

    /// Seals the compound packet `buf[..len]` in place under the next SRTCP index and returns the
    /// protected length.
    ///
    /// One index serves all our SSRCs. It only has to be unique for each of them, and receivers
    /// accept gaps.
    pub fn seal_rtcp(&mut self, buf: &mut [u8], len: usize) -> Result<usize, SealError> {
        let sealed_len = len
            .checked_add(self.profile().rtcp_overhead())
            .ok_or(SealError::Length)?;
        let packet = buf.get_mut(..sealed_len).ok_or(SealError::Length)?;
        let index = self.next_rtcp_index;
        if index > MAX_RTCP_INDEX {
            return Err(SealError::KeyExhausted);
        }
        let (plain, trailer) = packet.split_at_mut(len);
        let (header, payload) = plain
            .split_at_mut_checked(RTCP_HEADER_LEN)
            .ok_or(SealError::Length)?;
        let ssrc = ssrc_at(header, 4).ok_or(SealError::Length)?;
        match &self.suite {
            Suite::Gcm(gcm) => gcm.seal_rtcp(header, payload, trailer, ssrc, index),
            Suite::CounterMode(cm) => cm.seal_rtcp(header, payload, trailer, ssrc, index),
        }
        self.next_rtcp_index += 1;
        Ok(sealed_len)
    }
}

/// Unprotects incoming packets.
pub struct Opener {
    suite: Suite,
    rtcp_replay: RtcpReplay,
}

impl Opener {
    pub const fn profile(&self) -> Profile {
        self.suite.profile()
    }

    /// Opens the packet `buf` in place and returns the plain length with the header.
    ///
    /// The caller guesses `index` ([`super::sequence::SeqExtender`]) and checks it against the
    /// stream's replay window before the call. After success it commits the index to both.
    pub fn open_rtp(
        &self,
        buf: &mut [u8],
        header_len: usize,
        index: u64,
    ) -> Result<usize, Rejected> {
        let plain_len = buf
            .len()
            .checked_sub(self.profile().rtp_overhead())
            .ok_or(Rejected::TooShort)?;
        if header_len < RTP_HEADER_LEN {
            return Err(Rejected::TooShort);
        }
        let (plain, tag) = buf.split_at_mut(plain_len);
        let (header, payload) = plain
            .split_at_mut_checked(header_len)
            .ok_or(Rejected::TooShort)?;
        let ssrc = ssrc_at(header, 8).ok_or(Rejected::TooShort)?;
        match &self.suite {
            Suite::Gcm(gcm) => gcm.open_rtp(header, payload, tag, ssrc, index)?,
            Suite::CounterMode(cm) => cm.open_rtp(header, payload, tag, ssrc, index)?,
        }
        Ok(plain_len)
    }

    /// Opens the SRTCP packet `buf` in place and returns the length of the compound packet. Replays
    /// are refused here.
    pub fn open_rtcp(&mut self, buf: &mut [u8]) -> Result<usize, Rejected> {
        let plain_len = buf
            .len()
            .checked_sub(self.profile().rtcp_overhead())
            .ok_or(Rejected::TooShort)?;
        let (plain, trailer) = buf.split_at_mut(plain_len);
        let (header, payload) = plain
            .split_at_mut_checked(RTCP_HEADER_LEN)
            .ok_or(Rejected::TooShort)?;
        let ssrc = ssrc_at(header, 4).ok_or(Rejected::TooShort)?;
        let word_at = match self.suite {
            Suite::Gcm(_) => aead::TAG_LEN,
            Suite::CounterMode(_) => 0,
        };
        let word = be32(trailer, word_at).ok_or(Rejected::TooShort)?;
        if word & E_FLAG == 0 {
            return Err(Rejected::NotEncrypted);
        }
        let index = word & MAX_RTCP_INDEX;
        if !self.rtcp_replay.check(ssrc, index) {
            return Err(Rejected::Replay);
        }
        match &self.suite {
            Suite::Gcm(gcm) => gcm.open_rtcp(header, payload, trailer, ssrc, index)?,
            Suite::CounterMode(cm) => cm.open_rtcp(header, payload, trailer, ssrc, index)?,
        }
        self.rtcp_replay.commit(ssrc, index);
        Ok(plain_len)
    }
}

const RTP_HEADER_LEN: usize = 12;
/// Length of the part that SRTCP leaves in the clear: the first packet's header and the sender's
/// SSRC.
const RTCP_HEADER_LEN: usize = 8;
/// Length of the E flag and the 31-bit SRTCP index after every compound packet (RFC 3711, section
/// 3.4).
const INDEX_WORD_LEN: usize = 4;
const E_FLAG: u32 = 1 << 31;
const MAX_RTCP_INDEX: u32 = E_FLAG - 1;

/// Cipher suite. Counter mode is boxed, because only browsers use it and it must not enlarge every
/// connection.
#[expect(
    clippy::large_enum_variant,
    reason = "the large variant is the usual one"
)]
enum Suite {
    Gcm(Gcm),
    CounterMode(Box<CounterMode>),
}

impl Suite {
    fn new(profile: Profile, master: &MasterKey<'_>) -> Suite {
        match profile {
            Profile::AeadAes128Gcm => Suite::Gcm(Gcm::aes_128(master)),
            Profile::AeadAes256Gcm => Suite::Gcm(Gcm::aes_256(master)),
            Profile::Aes128CmHmacSha1_80 => Suite::CounterMode(Box::new(CounterMode::new(master))),
        }
    }

    const fn profile(&self) -> Profile {
        match self {
            Suite::Gcm(gcm) => gcm.profile(),
            Suite::CounterMode(_) => Profile::Aes128CmHmacSha1_80,
        }
    }
}

fn ssrc_at(header: &[u8], at: usize) -> Option<Ssrc> {
    be32(header, at).map(Ssrc)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text
            .chars()
            .map(|c| c.to_digit(16).unwrap() as u8)
            .collect();
        digits
            .chunks_exact(2)
            .map(|pair| pair[0] << 4 | pair[1])
            .collect()
    }

    const PROFILES: [Profile; 3] = [
        Profile::AeadAes128Gcm,
        Profile::AeadAes256Gcm,
        Profile::Aes128CmHmacSha1_80,
    ];

    fn pair(profile: Profile) -> (Sealer, Opener) {
        let material: Vec<u8> = (0..profile.keying_material_len() as u8).collect();
        let (client, _) = session(profile, &material, DtlsRole::Client).unwrap();
        let (_, server) = session(profile, &material, DtlsRole::Server).unwrap();
        (client, server)
    }

    fn rtp(seq: u16, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![
            0x80,
            96,
            (seq >> 8) as u8,
            seq as u8,
            0,
            0,
            0,
            9,
            0xCA,
            0xFE,
            0xBA,
            0xBE,
        ];
        packet.extend_from_slice(payload);
        packet
    }

    fn sealed_rtp(sealer: &Sealer, index: u64) -> Vec<u8> {
        let plain = rtp(index as u16, b"a payload");
        let mut packet = plain.clone();
        packet.resize(plain.len() + sealer.profile().rtp_overhead(), 0);
        assert_eq!(
            sealer.seal_rtp(&mut packet, 12, plain.len(), index),
            Ok(packet.len())
        );
        packet
    }

    fn sealed_rtcp(sealer: &mut Sealer, plain: &[u8]) -> Vec<u8> {
        let mut packet = plain.to_vec();
        packet.resize(plain.len() + sealer.profile().rtcp_overhead(), 0);
        assert_eq!(sealer.seal_rtcp(&mut packet, plain.len()), Ok(packet.len()));
        packet
    }

    #[test]
    fn what_the_client_seals_the_server_opens_and_not_the_client() {
        for profile in PROFILES {
            let material: Vec<u8> = (0..profile.keying_material_len() as u8).collect();
            let (sealer, _) = session(profile, &material, DtlsRole::Client).unwrap();
            for (role, expected) in [
                (DtlsRole::Server, Ok(21)),
                (DtlsRole::Client, Err(Rejected::Authentication)),
            ] {
                let (_, opener) = session(profile, &material, role).unwrap();
                assert_eq!(
                    opener.open_rtp(&mut sealed_rtp(&sealer, 0x3_0001), 12, 0x3_0001),
                    expected,
                    "{profile:?} {role:?}"
                );
            }
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        for profile in PROFILES {
            let (mut sealer, mut opener) = pair(profile);
            let packet = sealed_rtp(&sealer, 77);
            let control = sealed_rtcp(&mut sealer, &rtp(1, b"more"));
            for bit in 0..packet.len() * 8 {
                let mut damaged = packet.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(
                    opener.open_rtp(&mut damaged, 12, 77),
                    Err(Rejected::Authentication),
                    "{profile:?} bit {bit}"
                );
            }
            for bit in 0..control.len() * 8 {
                let mut damaged = control.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                assert!(
                    opener.open_rtcp(&mut damaged).is_err(),
                    "{profile:?} bit {bit}"
                );
            }
            assert_eq!(
                opener.open_rtp(&mut sealed_rtp(&sealer, 77), 12, 77 | 1 << 16),
                Err(Rejected::Authentication),
                "wrong rollover counter"
            );
            assert_eq!(
                opener.open_rtcp(&mut control.clone()),
                Ok(16),
                "refused packets leave no trace"
            );
        }
    }

    #[test]
    fn an_srtcp_packet_is_opened_once() {
        for profile in PROFILES {
            let (mut sealer, mut opener) = pair(profile);
            let packets: Vec<Vec<u8>> = (0..70)
                .map(|_| sealed_rtcp(&mut sealer, &rtp(1, b"more")))
                .collect();
            assert_eq!(opener.open_rtcp(&mut packets[69].clone()), Ok(16));
            assert_eq!(
                opener.open_rtcp(&mut packets[69].clone()),
                Err(Rejected::Replay)
            );
            assert_eq!(opener.open_rtcp(&mut packets[6].clone()), Ok(16));
            assert_eq!(
                opener.open_rtcp(&mut packets[5].clone()),
                Err(Rejected::Replay),
                "older than the window"
            );
        }
    }

    #[test]
    fn unencrypted_srtcp_is_refused_even_with_a_good_tag() {
        // RFC 7714, section 17.3.
        let packet = "81c8000d4d6172734e5450314e545032525450200000042a0000e9304c756e61deadbeefdeadbeefdeadbeefdeadbeefdeadbeef\
                      841dd9683dd78ec92ae58790125f62b3000005d4";
        let (_, mut opener) = pair(Profile::AeadAes128Gcm);
        assert_eq!(
            opener.open_rtcp(&mut hex(packet)),
            Err(Rejected::NotEncrypted)
        );
    }

    #[test]
    fn short_packets_are_refused_at_every_length() {
        for profile in PROFILES {
            let (sealer, mut opener) = pair(profile);
            let packet = sealed_rtp(&sealer, 5);
            for len in 0..packet.len() {
                for header_len in [0, 11, 12, 13, len, usize::MAX] {
                    assert!(
                        opener
                            .open_rtp(&mut packet[..len].to_vec(), header_len, 5)
                            .is_err()
                    );
                }
                assert!(opener.open_rtcp(&mut packet[..len].to_vec()).is_err());
            }
        }
    }

    #[test]
    fn sealing_refuses_what_it_cannot_do() {
        for profile in PROFILES {
            let (mut sealer, _) = pair(profile);
            let mut buf = rtp(5, &[0; 50]);
            for (header_len, len, index, error) in [
                (12, 62, 5, SealError::Length),
                (12, usize::MAX, 5, SealError::Length),
                (11, 40, 5, SealError::Length),
                (41, 40, 5, SealError::Length),
                (12, 40, 6, SealError::Index),
                (12, 40, 1 << 48 | 5, SealError::Index),
            ] {
                assert_eq!(
                    sealer.seal_rtp(&mut buf, header_len, len, index),
                    Err(error),
                    "{header_len} {len} {index}"
                );
            }
            assert_eq!(sealer.seal_rtcp(&mut buf, 7), Err(SealError::Length));
            assert_eq!(sealer.seal_rtcp(&mut buf, 60), Err(SealError::Length));
            sealer.next_rtcp_index = MAX_RTCP_INDEX;
            assert!(sealer.seal_rtcp(&mut buf, 20).is_ok());
            assert_eq!(sealer.seal_rtcp(&mut buf, 20), Err(SealError::KeyExhausted));
        }
    }

    #[test]
    fn keying_material_of_the_wrong_length_is_refused() {
        for profile in PROFILES {
            let expected = profile.keying_material_len();
            for actual in [0, expected - 1, expected + 1] {
                assert_eq!(
                    session(profile, &vec![0; actual], DtlsRole::Client).err(),
                    Some(KeyingMaterialLength { expected, actual })
                );
            }
        }
    }

    #[test]
    fn both_directions_may_move_between_threads_and_stay_small() {
        fn send<T: Send>() -> usize {
            size_of::<T>()
        }
        assert!(
            send::<Sealer>() <= 1_200 && send::<Opener>() <= 1_232,
            "{} {}",
            send::<Sealer>(),
            send::<Opener>()
        );
    }
}
