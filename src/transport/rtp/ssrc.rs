use std::fmt;
use std::num::ParseIntError;
use std::str::FromStr;

/// Synchronization source (RFC 3550, section 3): identifies the stream of a connection that a
/// packet belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Ssrc(pub u32);

impl Ssrc {
    #[inline]
    pub const fn from_be_bytes(bytes: [u8; 4]) -> Ssrc {
        Ssrc(u32::from_be_bytes(bytes))
    }

    #[inline]
    pub const fn to_be_bytes(self) -> [u8; 4] {
        self.0.to_be_bytes()
    }
}

impl FromStr for Ssrc {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Ssrc, ParseIntError> {
        text.parse().map(Ssrc)
    }
}

impl fmt::Display for Ssrc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
