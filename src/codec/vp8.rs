//! The VP8 payload descriptor (RFC 7741, section 4.2).

/// The descriptor in front of every VP8 payload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vp8Descriptor {
    /// N: the frame can be dropped without harm to others.
    pub non_reference: bool,
    /// S: this packet starts a VP8 partition.
    pub start_of_partition: bool,
    /// PID, 3 bits.
    pub partition_id: u8,
    pub picture_id: Option<PictureId>,
    pub tl0_pic_idx: Option<u8>,
    /// TID, 2 bits.
    pub tid: Option<u8>,
    /// Y: the frame depends on the base layer only. Meaningful only with a `tid`.
    pub layer_sync: bool,
    /// KEYIDX, 5 bits.
    pub key_idx: Option<u8>,
}

/// A picture ID and the width that it is sent in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PictureId {
    /// 7 bits.
    Short(u8),
    /// 15 bits.
    Long(u16),
}

impl PictureId {
    pub const fn value(self) -> u16 {
        match self {
            PictureId::Short(id) => id as u16,
            PictureId::Long(id) => id,
        }
    }
}

impl Vp8Descriptor {
    /// Length of the longest form.
    pub const MAX_LEN: usize = 6;

    /// Reads the descriptor at the front of an RTP payload. Returns it with its length, which is
    /// where the VP8 data starts.
    pub fn parse(payload: &[u8]) -> Option<(Vp8Descriptor, usize)> {
        let mut reader = Reader { payload, len: 0 };
        let required = reader.byte()?;
        let mut descriptor = Vp8Descriptor {
            non_reference: required & N != 0,
            start_of_partition: required & S != 0,
            partition_id: required & 0x07,
            ..Vp8Descriptor::default()
        };
        let present = if required & X != 0 { reader.byte()? } else { 0 };
        if present & I != 0 {
            descriptor.picture_id = Some(reader.picture_id()?);
        }
        if present & L != 0 {
            descriptor.tl0_pic_idx = Some(reader.byte()?);
        }
        if present & (T | K) != 0 {
            let layers = reader.byte()?;
            descriptor.tid = (present & T != 0).then_some(layers >> 6);
            descriptor.layer_sync = present & T != 0 && layers & Y != 0;
            descriptor.key_idx = (present & K != 0).then_some(layers & 0x1F);
        }
        Some((descriptor, reader.len))
    }

    /// Writes the shortest form that holds every field. Returns its length; `None` if there is no
    /// room or a field exceeds its width.
    pub fn write(&self, out: &mut [u8]) -> Option<usize> {
        let mut form = [0; Vp8Descriptor::MAX_LEN];
        let len = self.encode(&mut form)?;
        out.get_mut(..len)?.copy_from_slice(form.get(..len)?);
        Some(len)
    }

    /// Whether this packet holds the first bytes of a key frame. `vp8` is what follows the
    /// descriptor.
    pub fn starts_key_frame(&self, vp8: &[u8]) -> bool {
        self.starts_frame() && is_key_frame(vp8)
    }

    /// Whether this packet holds the first bytes of a frame.
    pub const fn starts_frame(&self) -> bool {
        self.start_of_partition && self.partition_id == 0
    }

    fn encode(&self, form: &mut [u8; Vp8Descriptor::MAX_LEN]) -> Option<usize> {
        let fits = self.partition_id < 8
            && self.tid.is_none_or(|tid| tid < 4)
            && self.key_idx.is_none_or(|idx| idx < 32);
        if !fits {
            return None;
        }
        form[0] =
            flag(self.non_reference, N) | flag(self.start_of_partition, S) | self.partition_id;
        form[1] = flag(self.picture_id.is_some(), I)
            | flag(self.tl0_pic_idx.is_some(), L)
            | flag(self.tid.is_some(), T)
            | flag(self.key_idx.is_some(), K);
        if form[1] == 0 {
            return Some(1);
        }
        form[0] |= X;
        let mut len = 2;
        match self.picture_id {
            None => {}
            Some(PictureId::Short(id)) if id < 1 << 7 => len = put(form, len, &[id]),
            Some(PictureId::Long(id)) if id < 1 << 15 => {
                len = put(form, len, &(id | 1 << 15).to_be_bytes())
            }
            Some(_) => return None,
        }
        if let Some(idx) = self.tl0_pic_idx {
            len = put(form, len, &[idx]);
        }
        if self.tid.is_some() || self.key_idx.is_some() {
            len = put(
                form,
                len,
                &[self.tid.unwrap_or(0) << 6
                    | flag(self.layer_sync, Y)
                    | self.key_idx.unwrap_or(0)],
            );
        }
        Some(len)
    }
}

/// Whether a VP8 frame that starts here is a key frame (RFC 6386, section 9.1: the inverse of the
/// first bit).
pub fn is_key_frame(vp8: &[u8]) -> bool {
    vp8.first().is_some_and(|first| first & 1 == 0)
}

/// Reads width and height in pixels from the start of a key frame (RFC 6386, section 9.1). Returns
/// `None` if it is not a key frame.
pub fn key_frame_size(vp8: &[u8]) -> Option<(u16, u16)> {
    let [first, _, _, 0x9D, 0x01, 0x2A, w0, w1, h0, h1] = *vp8.first_chunk()? else {
        return None;
    };
    // The upper two bits of each are a scaling hint.
    let size = |low, high| u16::from_le_bytes([low, high]) & 0x3FFF;
    (first & 1 == 0).then(|| (size(w0, w1), size(h0, h1)))
}

// First byte.
const X: u8 = 0x80;
const N: u8 = 0x20;
const S: u8 = 0x10;
// Second byte: which fields follow.
const I: u8 = 0x80;
const L: u8 = 0x40;
const T: u8 = 0x20;
const K: u8 = 0x10;
// The TID, Y and KEYIDX byte.
const Y: u8 = 0x20;

struct Reader<'a> {
    payload: &'a [u8],
    len: usize,
}

impl Reader<'_> {
    fn byte(&mut self) -> Option<u8> {
        let byte = *self.payload.get(self.len)?;
        self.len += 1;
        Some(byte)
    }

    fn picture_id(&mut self) -> Option<PictureId> {
        let high = self.byte()?;
        if high & 0x80 == 0 {
            return Some(PictureId::Short(high));
        }
        Some(PictureId::Long(u16::from_be_bytes([
            high & 0x7F,
            self.byte()?,
        ])))
    }
}

const fn flag(set: bool, bit: u8) -> u8 {
    if set { bit } else { 0 }
}

fn put(form: &mut [u8; Vp8Descriptor::MAX_LEN], at: usize, bytes: &[u8]) -> usize {
    form[at..at + bytes.len()].copy_from_slice(bytes);
    at + bytes.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_of_fields_reads_back() {
        let picture_ids = [
            None,
            Some(PictureId::Short(127)),
            Some(PictureId::Long(5)),
            Some(PictureId::Long(32_767)),
        ];
        for bits in 0..256u32 {
            for picture_id in picture_ids {
                let bit = |n: u32| bits >> n & 1 != 0;
                let descriptor = Vp8Descriptor {
                    non_reference: bit(0),
                    start_of_partition: bit(1),
                    partition_id: if bit(2) { 7 } else { 0 },
                    picture_id,
                    tl0_pic_idx: bit(3).then_some(255),
                    tid: bit(4).then_some(3),
                    layer_sync: bit(4) && bit(5),
                    key_idx: bit(6).then_some(31),
                };
                let mut out = [0xFF; 7];
                let len = descriptor.write(&mut out).unwrap();
                assert_eq!(Vp8Descriptor::parse(&out), Some((descriptor, len)));
                for short in 0..len {
                    assert_eq!(Vp8Descriptor::parse(&out[..short]), None);
                    assert_eq!(descriptor.write(&mut [0; 7][..short]), None);
                }
            }
        }
    }

    #[test]
    fn the_usual_descriptor_has_four_bytes() {
        let descriptor = Vp8Descriptor {
            start_of_partition: true,
            picture_id: Some(PictureId::Long(0x1234)),
            ..Vp8Descriptor::default()
        };
        let mut out = [0; 8];
        assert_eq!(descriptor.write(&mut out), Some(4));
        assert_eq!(out[..4], [0x90, 0x80, 0x92, 0x34]);
    }

    #[test]
    fn fields_beyond_their_width_are_refused() {
        let none = Vp8Descriptor::default();
        for wide in [
            Vp8Descriptor {
                partition_id: 8,
                ..none
            },
            Vp8Descriptor {
                tid: Some(4),
                ..none
            },
            Vp8Descriptor {
                key_idx: Some(32),
                ..none
            },
            Vp8Descriptor {
                picture_id: Some(PictureId::Short(128)),
                ..none
            },
            Vp8Descriptor {
                picture_id: Some(PictureId::Long(1 << 15)),
                ..none
            },
        ] {
            assert_eq!(wide.write(&mut [0; 8]), None, "{wide:?}");
        }
    }

    #[test]
    fn a_key_frame_is_told_by_its_first_packet_alone() {
        let frame = [0x10, 0, 0, 0x9D, 0x01, 0x2A, 0x80, 0x42, 0x68, 0x01];
        let first = Vp8Descriptor {
            start_of_partition: true,
            ..Vp8Descriptor::default()
        };
        assert!(first.starts_key_frame(&frame));
        assert!(!first.starts_key_frame(&[0x11]) && !first.starts_key_frame(&[]));
        assert!(
            !Vp8Descriptor {
                partition_id: 1,
                ..first
            }
            .starts_key_frame(&frame)
        );
        assert!(
            !Vp8Descriptor {
                start_of_partition: false,
                ..first
            }
            .starts_key_frame(&frame)
        );
        assert_eq!(key_frame_size(&frame), Some((640, 360)));
        assert_eq!(
            (key_frame_size(&frame[..9]), key_frame_size(&[0x11; 10])),
            (None, None)
        );
    }
}
