//! Histograms as text: HdrHistogram's own V2 format, deflated, in base64. Every HdrHistogram
//! library reads it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hdrhistogram::serialization::{Deserializer, Serializer, V2DeflateSerializer};

use super::Histogram;

/// Error returned when a text is not a valid histogram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SerialError {
    NotBase64,
    NotHdr,
}

impl std::fmt::Display for SerialError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            SerialError::NotBase64 => "not base64",
            SerialError::NotHdr => "not an HdrHistogram in V2 deflate format",
        })
    }
}

impl std::error::Error for SerialError {}

/// Encodes the recorded values, in microseconds. The format does not contain the expected count.
pub fn to_base64(histogram: &Histogram) -> String {
    let mut bytes = Vec::new();
    V2DeflateSerializer::new()
        .serialize(histogram.hdr(), &mut bytes)
        .expect("a vector takes every byte, and our bounds fit the format");
    STANDARD.encode(bytes)
}

/// Reads what [`to_base64`] or another HdrHistogram library wrote.
pub fn from_base64(text: &str) -> Result<hdrhistogram::Histogram<u64>, SerialError> {
    let bytes = STANDARD.decode(text).map_err(|_| SerialError::NotBase64)?;
    Deserializer::new()
        .deserialize(&mut bytes.as_slice())
        .map_err(|_| SerialError::NotHdr)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_survives_the_trip_as_text() {
        let mut histogram = Histogram::default();
        for micros in 1..10_000u64 {
            histogram.record_micros(micros * micros % 59_999_999);
        }
        let back = from_base64(&to_base64(&histogram)).unwrap();
        assert_eq!(&back, histogram.hdr());
        assert_eq!(
            from_base64(&to_base64(&Histogram::default()))
                .unwrap()
                .len(),
            0
        );
    }

    #[test]
    fn other_text_is_refused() {
        assert_eq!(from_base64("§").unwrap_err(), SerialError::NotBase64);
        for text in ["", "AAAA", "HISTFAAAAHic"] {
            assert_eq!(
                from_base64(text).unwrap_err(),
                SerialError::NotHdr,
                "{text}"
            );
        }
    }
}
