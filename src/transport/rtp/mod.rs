//! RTP packets as they are in a datagram: demultiplexing, header and extensions, payload, RTX (RFC
//! 3550, 8285, 7983, 4588).
//!
//! Views hold offsets and do not borrow. A [`Header`] is parsed from the sealed packet and stays
//! valid when the packet is opened in place. It then finds extensions and payload in the plain
//! bytes.

mod ssrc;
mod template;

pub use template::{
    ExtensionSlot, HeaderTemplate, TemplateError, abs_send_time, audio_level, check_payload_type,
    set_payload_type,
};

pub use ssrc::Ssrc;

use super::sequence::Seq;

/// Kind of a datagram on a peer connection's socket (RFC 7983, section 7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Datagram {
    Stun,
    Dtls,
    Rtp,
    Rtcp,
    /// Too short for its kind, or a protocol that we do not use (ZRTP, TURN channels).
    Unknown,
}

/// Classifies a datagram by its first two bytes and its length. The rest of the contents is not
/// checked.
pub fn classify(datagram: &[u8]) -> Datagram {
    match (datagram.first(), datagram.len()) {
        (Some(0..=3), 20..) => Datagram::Stun,
        (Some(20..=63), 13..) => Datagram::Dtls,
        (Some(128..=191), 8..) if is_rtcp(datagram) => Datagram::Rtcp,
        (Some(128..=191), FIXED_LEN..) if !is_rtcp(datagram) => Datagram::Rtp,
        _ => Datagram::Unknown,
    }
}

/// Returns whether a packet known to be RTP or RTCP is RTCP: its second byte is in 192..=223 (RFC
/// 5761, section 4).
pub fn is_rtcp(packet: &[u8]) -> bool {
    matches!(packet.get(1), Some(192..=223))
}

/// Fields of the RTP header, and the positions of extensions and payload. SRTP leaves the header in
/// the clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub marker: bool,
    /// Payload type, 7 bits.
    pub payload_type: u8,
    pub seq: Seq,
    /// Timestamp in units of the payload's clock rate.
    pub rtp_time: u32,
    pub ssrc: Ssrc,
    /// Length in bytes with CSRCs and extension; the payload starts there.
    pub header_len: usize,
    padding: bool,
    extension_form: ExtensionForm,
    extensions_at: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ExtensionForm {
    None,
    OneByte,
    TwoByte,
}

impl Header {
    /// Parses the header; `None` if the packet is shorter than a header, the version is not 2 or a
    /// length runs past the end.
    pub fn parse(packet: &[u8]) -> Option<Header> {
        let (fixed, _) = packet.split_first_chunk::<FIXED_LEN>()?;
        let [flags, marker_and_type, s0, s1, t0, t1, t2, t3, ssrc @ ..] = *fixed;
        if flags >> 6 != 2 {
            return None;
        }
        let csrcs_end = FIXED_LEN + 4 * usize::from(flags & 0x0F);
        let (extension_form, extensions_at, header_len) = if flags & EXTENSION_FLAG != 0 {
            let words = usize::from(be16(packet, csrcs_end + 2)?);
            (
                ExtensionForm::of(be16(packet, csrcs_end)?),
                csrcs_end + 4,
                csrcs_end + 4 + 4 * words,
            )
        } else {
            (ExtensionForm::None, csrcs_end, csrcs_end)
        };
        if packet.len() < header_len {
            return None;
        }
        Some(Header {
            marker: marker_and_type & MARKER_FLAG != 0,
            payload_type: marker_and_type & !MARKER_FLAG,
            seq: Seq(u16::from_be_bytes([s0, s1])),
            rtp_time: u32::from_be_bytes([t0, t1, t2, t3]),
            ssrc: Ssrc::from_be_bytes(ssrc),
            header_len,
            padding: flags & PADDING_FLAG != 0,
            extension_form,
            extensions_at,
        })
    }

    /// Returns the first extension element of `packet` under `id`, as negotiated in SDP.
    pub fn extension<'a>(&self, packet: &'a [u8], id: u8) -> Option<&'a [u8]> {
        self.extensions(packet)
            .find(|(found, _)| *found == id)
            .map(|(_, value)| value)
    }

    /// Returns all extension elements of `packet` in order, as (id, value), up to the first
    /// malformed one (RFC 8285, section 4).
    pub fn extensions<'a>(&self, packet: &'a [u8]) -> Extensions<'a> {
        let rest = packet
            .get(self.extensions_at..self.header_len)
            .unwrap_or_default();
        Extensions {
            rest,
            form: self.extension_form,
        }
    }

    /// Returns the payload of the plain `packet` without its padding. It is empty for a packet of
    /// padding alone, and `None` if the padding count is wrong.
    pub fn payload<'a>(&self, packet: &'a [u8]) -> Option<&'a [u8]> {
        let padded = packet.get(self.header_len..)?;
        if !self.padding {
            return Some(padded);
        }
        let count = usize::from(*padded.last()?);
        if count == 0 {
            return None;
        }
        padded.get(..padded.len().checked_sub(count)?)
    }
}

impl ExtensionForm {
    const fn of(profile: u16) -> ExtensionForm {
        match profile {
            ONE_BYTE_PROFILE => ExtensionForm::OneByte,
            0x1000..=0x100F => ExtensionForm::TwoByte,
            _ => ExtensionForm::None,
        }
    }
}

/// Iterates over extension elements; see [`Header::extensions`].
#[derive(Clone, Debug)]
pub struct Extensions<'a> {
    rest: &'a [u8],
    form: ExtensionForm,
}

impl<'a> Iterator for Extensions<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<(u8, &'a [u8])> {
        let element = match self.form {
            ExtensionForm::None => None,
            ExtensionForm::OneByte => self.one_byte_element(),
            ExtensionForm::TwoByte => self.two_byte_element(),
        };
        if element.is_none() {
            self.rest = &[];
        }
        element
    }
}

impl<'a> Extensions<'a> {
    fn one_byte_element(&mut self) -> Option<(u8, &'a [u8])> {
        let (&first, rest) = self.skip_padding()?;
        let (id, len) = (first >> 4, usize::from(first & 0x0F) + 1);
        // An id of 0 with a length ends the iteration, and so does the reserved id 15 (RFC 8285,
        // section 4.2).
        if id == 0 || id == 15 {
            return None;
        }
        self.take(id, len, rest)
    }

    fn two_byte_element(&mut self) -> Option<(u8, &'a [u8])> {
        let (&id, rest) = self.skip_padding()?;
        let (&len, rest) = rest.split_first()?;
        self.take(id, usize::from(len), rest)
    }

    /// Returns the next byte that is not padding, and the bytes after it.
    fn skip_padding(&self) -> Option<(&'a u8, &'a [u8])> {
        let start = self.rest.iter().position(|byte| *byte != 0)?;
        self.rest.get(start..)?.split_first()
    }

    fn take(&mut self, id: u8, len: usize, rest: &'a [u8]) -> Option<(u8, &'a [u8])> {
        let (value, rest) = rest.split_at_checked(len)?;
        self.rest = rest;
        Some((id, value))
    }
}

/// Splits a retransmission's payload into the original sequence number and the original payload
/// (RFC 4588, section 4).
///
/// `None` for an RTX packet that carries nothing, as bandwidth probes do.
pub fn split_rtx(payload: &[u8]) -> Option<(Seq, &[u8])> {
    let (osn, original) = payload.split_first_chunk()?;
    Some((Seq(u16::from_be_bytes(*osn)), original))
}

/// Writes the original sequence number, which follows a retransmission's header, and returns its
/// length. The original payload follows it. Payload type, SSRC and sequence number of the header
/// are the RTX stream's own.
pub fn write_rtx_osn(out: &mut [u8], original: Seq) -> Option<usize> {
    *out.first_chunk_mut()? = original.0.to_be_bytes();
    Some(2)
}

/// Length of the fixed part of an RTP header.
pub(crate) const FIXED_LEN: usize = 12;

const PADDING_FLAG: u8 = 0x20;
const EXTENSION_FLAG: u8 = 0x10;
const MARKER_FLAG: u8 = 0x80;
const ONE_BYTE_PROFILE: u16 = 0xBEDE;

pub(crate) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(crate) fn be24(bytes: &[u8], at: usize) -> Option<u32> {
    let [a, b, c] = *bytes.get(at..)?.first_chunk()?;
    Some(u32::from_be_bytes([0, a, b, c]))
}

pub(crate) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagrams_are_sorted_by_their_first_bytes_and_length() {
        let long = |first, second| {
            let mut datagram = [0; 32];
            (datagram[0], datagram[1]) = (first, second);
            datagram
        };
        for (first, second, expected) in [
            (0, 1, Datagram::Stun),
            (1, 1, Datagram::Stun),
            (4, 0, Datagram::Unknown),
            (19, 0, Datagram::Unknown),
            (20, 254, Datagram::Dtls),
            (63, 254, Datagram::Dtls),
            (64, 0, Datagram::Unknown),
            (127, 200, Datagram::Unknown),
            (128, 191, Datagram::Rtp),
            (128, 192, Datagram::Rtcp),
            (191, 223, Datagram::Rtcp),
            (144, 224, Datagram::Rtp),
            (192, 200, Datagram::Unknown),
        ] {
            assert_eq!(classify(&long(first, second)), expected, "{first} {second}");
        }
        for (first, second, shortest) in [(0, 1, 20), (22, 254, 13), (128, 96, 12), (128, 200, 8)] {
            assert_eq!(
                classify(&long(first, second)[..shortest - 1]),
                Datagram::Unknown
            );
            assert_ne!(
                classify(&long(first, second)[..shortest]),
                Datagram::Unknown
            );
        }
        assert_eq!(classify(&[]), Datagram::Unknown);
    }

    fn packet(first: u8, words: &[u32], tail: &[u8]) -> Vec<u8> {
        let mut packet = vec![first, 0xE0, 0x12, 0x34, 0, 0, 0, 1, 0xCA, 0xFE, 0xBA, 0xBE];
        packet.extend(words.iter().flat_map(|word| word.to_be_bytes()));
        packet.extend_from_slice(tail);
        packet
    }

    #[test]
    fn one_byte_elements_are_found_around_padding_and_until_a_reserved_id() {
        let bytes = packet(
            0x90,
            &[
                0xBEDE_0004,
                0x10AA_0000,
                0x31BB_BB22,
                0xCCCC_CCF0,
                0x50DD_0000,
            ],
            b"payload",
        );
        let header = Header::parse(&bytes).unwrap();
        let elements: Vec<_> = header.extensions(&bytes).collect();
        assert_eq!(
            elements,
            [
                (1, &[0xAA][..]),
                (3, &[0xBB, 0xBB][..]),
                (2, &[0xCC, 0xCC, 0xCC][..])
            ]
        );
        assert_eq!(header.extension(&bytes, 2), Some(&[0xCC; 3][..]));
        assert_eq!(
            header.extension(&bytes, 5),
            None,
            "behind id 15 nothing counts"
        );
        assert_eq!(header.payload(&bytes), Some(&b"payload"[..]));
        let zero_with_length = packet(0x90, &[0xBEDE_0002, 0x10AA_01BB, 0xBB20_CC00], b"");
        assert_eq!(
            Header::parse(&zero_with_length)
                .unwrap()
                .extensions(&zero_with_length)
                .count(),
            1
        );
    }

    #[test]
    fn two_byte_elements_may_be_empty_and_have_any_id() {
        let bytes = packet(
            0x91,
            &[
                0x1111_1111,
                0x1005_0003,
                0x0100_00FF,
                0x02BB_BB07,
                0x0900_0000,
            ],
            b"p",
        );
        let header = Header::parse(&bytes).unwrap();
        let elements: Vec<_> = header.extensions(&bytes).collect();
        assert_eq!(
            elements,
            [(1, &[][..]), (255, &[0xBB, 0xBB][..])],
            "the last one runs past the end"
        );
        assert_eq!(
            (header.header_len, header.payload(&bytes)),
            (32, Some(&b"p"[..]))
        );
    }

    #[test]
    fn an_unknown_extension_profile_is_skipped_whole() {
        let bytes = packet(0x90, &[0xABCD_0001, 0x10AA_0000], b"p");
        let header = Header::parse(&bytes).unwrap();
        assert_eq!(
            (header.extensions(&bytes).count(), header.payload(&bytes)),
            (0, Some(&b"p"[..]))
        );
    }

    #[test]
    fn lengths_that_run_past_the_end_are_no_header() {
        let good = packet(0x92, &[1, 2, 0xBEDE_0001, 0x1011_0000], b"");
        assert!(Header::parse(&good).is_some());
        for len in 0..good.len() {
            assert_eq!(Header::parse(&good[..len]), None, "{len}");
        }
        for version in [0x12, 0x52, 0xD2] {
            assert_eq!(
                Header::parse(&packet(version, &[1, 2, 0xBEDE_0001, 0x1011_0000], b"")),
                None
            );
        }
    }

    #[test]
    fn a_padding_count_is_believed_only_if_it_fits() {
        for (tail, expected) in [
            (&b"ab\0\x02"[..], Some(&b"ab"[..])),
            (b"\0\0\x03", Some(b"")),
            (b"ab\x01", Some(b"ab")),
            (b"ab\0\x05", None),
            (b"ab\0", None),
            (b"", None),
        ] {
            let bytes = packet(0xA0, &[], tail);
            assert_eq!(
                Header::parse(&bytes).unwrap().payload(&bytes),
                expected,
                "{tail:?}"
            );
        }
    }

    #[test]
    fn a_header_asked_about_another_packet_answers_without_panic() {
        let bytes = packet(0xB0, &[0xBEDE_0001, 0x1011_0000], b"ab\x01");
        let header = Header::parse(&bytes).unwrap();
        for len in 0..bytes.len() {
            header.extensions(&bytes[..len]).for_each(drop);
            let _ = header.payload(&bytes[..len]);
        }
    }

    #[test]
    fn a_retransmission_carries_the_original_number() {
        let mut payload = *b"..payload";
        assert_eq!(write_rtx_osn(&mut payload, Seq(0xABCD)), Some(2));
        assert_eq!(split_rtx(&payload), Some((Seq(0xABCD), &b"payload"[..])));
        assert_eq!(
            (split_rtx(&[1]), write_rtx_osn(&mut [0], Seq(1))),
            (None, None)
        );
    }
}
