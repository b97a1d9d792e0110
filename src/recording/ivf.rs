//! IVF, the simple container of libvpx: a header of 32 bytes, then frames with their length and
//! timestamp, all little endian.

/// Position of the number of frames. It is 0 until the file is ended, which readers take for
/// unknown.
///
/// ffmpeg 5 reads this field as a duration and prints a wrong one, but it always plays all frames.
pub const FRAME_COUNT_AT: u64 = 24;

pub const HEADER_LEN: usize = 32;

/// Returns the header of a VP8 file with RTP's timestamps: 90,000 a second.
pub fn header((width, height): (u16, u16)) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    header[..8].copy_from_slice(b"DKIF\0\0\x20\0");
    header[8..12].copy_from_slice(b"VP80");
    header[12..14].copy_from_slice(&width.to_le_bytes());
    header[14..16].copy_from_slice(&height.to_le_bytes());
    header[16..20].copy_from_slice(&90_000u32.to_le_bytes());
    header[20..24].copy_from_slice(&1u32.to_le_bytes());
    header
}

/// Appends one frame.
pub fn write_frame(timestamp: u64, frame: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&(frame.len() as u32).to_le_bytes());
    out.extend_from_slice(&timestamp.to_le_bytes());
    out.extend_from_slice(frame);
}

/// Returns width and height of a VP8 key frame (RFC 6386, section 9.1); `None` for anything else.
pub fn key_frame_size(frame: &[u8]) -> Option<(u16, u16)> {
    const INTER_FRAME: u8 = 1;
    let &[tag, _, _, 0x9D, 0x01, 0x2A, w0, w1, h0, h1, ..] = frame else {
        return None;
    };
    // The upper two bits request scaling.
    let side = |bytes| u16::from_le_bytes(bytes) & 0x3FFF;
    (tag & INTER_FRAME == 0).then_some((side([w0, w1]), side([h0, h1])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_reads_back_by_the_formats_own_layout() {
        let mut file = header((1280, 720)).to_vec();
        write_frame(0, b"first", &mut file);
        write_frame(6_000, b"", &mut file);
        assert_eq!(
            file,
            [
                &b"DKIF\0\0\x20\0VP80\x00\x05\xD0\x02\x90\x5F\x01\0\x01\0\0\0\0\0\0\0\0\0\0\0"[..],
                b"\x05\0\0\0\0\0\0\0\0\0\0\0first",
                b"\0\0\0\0\x70\x17\0\0\0\0\0\0",
            ]
            .concat()
        );
    }

    #[test]
    fn the_size_of_a_picture_comes_from_a_key_frame_only() {
        let key = [0x50, 0, 0, 0x9D, 0x01, 0x2A, 0x40, 0x41, 0xB4, 0xC0, 9];
        assert_eq!(key_frame_size(&key), Some((320, 180)));
        let mut inter = key;
        inter[0] |= 1;
        let mut no_start_code = key;
        no_start_code[4] = 0;
        for other in [&inter[..], &no_start_code, &key[..9], b""] {
            assert_eq!(key_frame_size(other), None);
        }
    }
}
