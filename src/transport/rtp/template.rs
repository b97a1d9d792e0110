//! Writes RTP headers: the fixed part of a stream's header is laid out once and copied, the rest is
//! patched in.

use super::{EXTENSION_FLAG, FIXED_LEN, MARKER_FLAG, ONE_BYTE_PROFILE};
use crate::transport::rtp::Ssrc;
use crate::transport::sequence::Seq;

/// Room for the fixed header and 80 bytes of extensions: mid, rid and repaired rid of usual length,
/// and the per-packet ones.
const CAPACITY: usize = 96;

/// RTP header of a stream with its extensions in the one-byte form of RFC 8285; see
/// [`HeaderTemplate::write`].
///
/// A stream that drops mid and rid once the receiver knows it has a second template. `ROOM` is the
/// longest header in bytes. Code that keeps thousands of templates and needs less room sets it
/// lower.
#[derive(Clone, Debug)]
pub struct HeaderTemplate<const ROOM: usize = CAPACITY> {
    bytes: [u8; ROOM],
    /// Length in bytes, a multiple of four.
    len: u8,
    /// Position of the next extension element: `len` without the alignment.
    end: u8,
}

/// Position of an extension's value in every packet of a template. Values that change are written
/// there after the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtensionSlot {
    at: u8,
    len: u8,
}

/// Error returned when a template is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TemplateError {
    /// The payload type is above 127, or in 64..=95, where the marker bit makes it look like RTCP
    /// (RFC 5761, section 4).
    PayloadType,
    /// The extension id is outside 1..=14.
    ExtensionId,
    /// The value is empty or longer than 16 bytes, or there is no room left.
    ExtensionLength,
}

impl std::fmt::Display for TemplateError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            TemplateError::PayloadType => "no RTP payload type: use 0..=63 or 96..=127",
            TemplateError::ExtensionId => "no one-byte extension id: use 1..=14",
            TemplateError::ExtensionLength => {
                "an extension value needs 1..=16 bytes, all of them together at most 76"
            }
        })
    }
}

impl std::error::Error for TemplateError {}

/// Returns the payload type if a header may have it.
pub fn check_payload_type(payload_type: u8) -> Result<u8, TemplateError> {
    match payload_type {
        0..=63 | 96..=127 => Ok(payload_type),
        _ => Err(TemplateError::PayloadType),
    }
}

/// Sets the payload type of a packet that was written from a template. It must have been checked.
pub fn set_payload_type(packet: &mut [u8], payload_type: u8) {
    if let Some(byte) = packet.get_mut(1) {
        *byte = *byte & MARKER_FLAG | payload_type;
    }
}

impl HeaderTemplate {
    pub fn new(payload_type: u8, ssrc: Ssrc) -> Result<HeaderTemplate, TemplateError> {
        HeaderTemplate::with_room(payload_type, ssrc)
    }
}

impl<const ROOM: usize> HeaderTemplate<ROOM> {
    pub fn with_room(payload_type: u8, ssrc: Ssrc) -> Result<HeaderTemplate<ROOM>, TemplateError> {
        const { assert!(ROOM >= FIXED_LEN, "a template holds a whole header") };
        let mut bytes = [0; ROOM];
        bytes[0] = 0x80;
        bytes[1] = check_payload_type(payload_type)?;
        bytes[8..FIXED_LEN].copy_from_slice(&ssrc.to_be_bytes());
        Ok(HeaderTemplate {
            bytes,
            len: FIXED_LEN as u8,
            end: FIXED_LEN as u8,
        })
    }

    /// Appends an extension element. A value that never changes (mid, rid) needs no further step.
    /// For others `value` is a placeholder, and the slot is patched in each packet.
    pub fn push_extension(&mut self, id: u8, value: &[u8]) -> Result<ExtensionSlot, TemplateError> {
        if !(1..=14).contains(&id) {
            return Err(TemplateError::ExtensionId);
        }
        let start = if self.len() == FIXED_LEN {
            FIXED_LEN + 4
        } else {
            usize::from(self.end)
        };
        let at = start + 1;
        let end = at + value.len();
        let len = end.next_multiple_of(4);
        if !(1..=16).contains(&value.len()) || len > ROOM {
            return Err(TemplateError::ExtensionLength);
        }
        self.bytes[0] |= EXTENSION_FLAG;
        self.bytes[FIXED_LEN..FIXED_LEN + 2].copy_from_slice(&ONE_BYTE_PROFILE.to_be_bytes());
        self.bytes[FIXED_LEN + 2..FIXED_LEN + 4]
            .copy_from_slice(&(((len - FIXED_LEN) / 4 - 1) as u16).to_be_bytes());
        self.bytes[start] = id << 4 | (value.len() - 1) as u8;
        self.bytes[at..end].copy_from_slice(value);
        (self.len, self.end) = (len as u8, end as u8);
        Ok(ExtensionSlot {
            at: at as u8,
            len: value.len() as u8,
        })
    }

    /// Returns the header's length in bytes, which is the same for every packet.
    pub const fn len(&self) -> usize {
        self.len as usize
    }

    /// Always returns false, because a header has at least 12 bytes.
    pub const fn is_empty(&self) -> bool {
        false
    }

    pub fn payload_type(&self) -> u8 {
        self.bytes[1]
    }

    pub fn ssrc(&self) -> Ssrc {
        let [.., a, b, c, d] = *self
            .bytes
            .first_chunk::<FIXED_LEN>()
            .expect("a template holds a whole header");
        Ssrc(u32::from_be_bytes([a, b, c, d]))
    }

    /// Writes the header to the front of `out` and returns its length; `None` if `out` has no room.
    pub fn write(&self, out: &mut [u8], marker: bool, seq: Seq, rtp_time: u32) -> Option<usize> {
        let header = out.get_mut(..self.len())?;
        header.copy_from_slice(&self.bytes[..self.len()]);
        let fixed = header.first_chunk_mut::<FIXED_LEN>()?;
        fixed[1] |= if marker { MARKER_FLAG } else { 0 };
        fixed[2..4].copy_from_slice(&seq.0.to_be_bytes());
        fixed[4..8].copy_from_slice(&rtp_time.to_be_bytes());
        Some(self.len())
    }
}

impl ExtensionSlot {
    /// Writes the value into a packet that starts with the slot's template.
    ///
    /// # Panics
    /// Panics if `value` does not have the length that the slot was made with, or if the packet is
    /// shorter than the header. Both are mistakes in our code, not errors of the network.
    pub fn patch(self, packet: &mut [u8], value: &[u8]) {
        packet[usize::from(self.at)..][..usize::from(self.len)].copy_from_slice(value);
    }
}

/// Encodes the abs-send-time extension: the send time's NTP timestamp in 6.18 fixed-point seconds,
/// modulo 64 s (<http://www.webrtc.org/experiments/rtp-hdrext/abs-send-time>).
pub const fn abs_send_time(ntp: u64) -> [u8; 3] {
    let [.., a, b, c] = ((ntp >> 14) as u32).to_be_bytes();
    [a, b, c]
}

/// Encodes the audio level extension (RFC 6464): the level in -dBov, 0 the loudest and 127 silence;
/// `None` above 127.
pub const fn audio_level(voice: bool, level_dbov: u8) -> Option<[u8; 1]> {
    if level_dbov > 127 {
        return None;
    }
    Some([(voice as u8) << 7 | level_dbov])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::rtp::Header;

    #[test]
    fn a_written_header_reads_back_with_its_extensions() {
        let mut template = HeaderTemplate::new(111, Ssrc(0xCAFE_BABE)).unwrap();
        let mid = template.push_extension(4, b"0").unwrap();
        let time = template.push_extension(2, &[0; 3]).unwrap();
        template.push_extension(10, b"rid-sixteen-long").unwrap();
        let mut packet = [0xFF; 64];
        let len = template.write(&mut packet, true, Seq(0xFFFE), 77).unwrap();
        time.patch(&mut packet, &[1, 2, 3]);
        mid.patch(&mut packet, b"7");
        let header = Header::parse(&packet).unwrap();
        assert_eq!((len, header.header_len, template.len()), (40, 40, 40));
        assert_eq!(
            (
                header.marker,
                header.payload_type,
                header.seq,
                header.rtp_time
            ),
            (true, 111, Seq(0xFFFE), 77)
        );
        assert_eq!(
            (header.ssrc, template.ssrc()),
            (Ssrc(0xCAFE_BABE), Ssrc(0xCAFE_BABE))
        );
        let elements: Vec<_> = header.extensions(&packet).collect();
        assert_eq!(
            elements,
            [
                (4, &b"7"[..]),
                (2, &[1, 2, 3][..]),
                (10, &b"rid-sixteen-long"[..])
            ]
        );
        assert_eq!(template.write(&mut packet[..39], true, Seq(0), 0), None);
    }

    #[test]
    fn a_header_without_extensions_has_twelve_bytes_and_no_marker_left_over() {
        let template = HeaderTemplate::new(0, Ssrc(1)).unwrap();
        let mut packet = [0; 12];
        assert_eq!(template.write(&mut packet, true, Seq(1), 2), Some(12));
        assert_eq!(template.write(&mut packet, false, Seq(3), 4), Some(12));
        assert_eq!(packet, [0x80, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0, 1]);
    }

    #[test]
    fn templates_refuse_what_the_one_byte_form_cannot_say() {
        for payload_type in [64, 95, 128, 255] {
            assert_eq!(
                HeaderTemplate::new(payload_type, Ssrc(1)).err(),
                Some(TemplateError::PayloadType)
            );
        }
        let mut template = HeaderTemplate::new(96, Ssrc(1)).unwrap();
        for (id, len, error) in [
            (0, 1, TemplateError::ExtensionId),
            (15, 1, TemplateError::ExtensionId),
            (1, 0, TemplateError::ExtensionLength),
            (1, 17, TemplateError::ExtensionLength),
        ] {
            assert_eq!(template.push_extension(id, &vec![0; len]), Err(error));
        }
        assert_eq!(template.len(), 12, "a refused extension leaves no trace");
        assert!((1..=4).all(|id| template.push_extension(id, &[0; 16]).is_ok()));
        assert_eq!(
            template.push_extension(5, &[0; 12]),
            Err(TemplateError::ExtensionLength)
        );
        assert!(template.push_extension(5, &[0; 11]).is_ok());
        assert_eq!(template.len(), CAPACITY);
    }

    #[test]
    fn per_packet_values_have_their_documented_form() {
        assert_eq!(
            abs_send_time(0x0000_0041_8000_0000),
            [0x06, 0x00, 0x00],
            "65.5 s is 1.5 s modulo 64 s"
        );
        assert_eq!(
            (
                audio_level(true, 30),
                audio_level(false, 127),
                audio_level(true, 128)
            ),
            (Some([0x9E]), Some([127]), None)
        );
    }
}
