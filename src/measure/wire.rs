//! Format of records that are sent between hosts: JSON with counters and histograms by name, so
//! that the measurements of several hosts merge exactly.
//!
//! A section is `{"joins_ok": 3, .., "join": {"expected": 3, "hdr": ".."}, ..}`. It has every
//! counter, because a missing counter is unknown and not 0. A histogram without expected and
//! without recorded values is left out. `expected` is the announced count ([`Histogram::expect`]),
//! which can be less than the number of values that came.
//!
//! The input is untrusted. Every length is bounded before memory is allocated by it, and a refusal
//! names what is wrong. A [`RecordWire`] is always valid. Names that this version does not know are
//! skipped.

use std::fmt;
use std::io::Read;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use flate2::read::ZlibDecoder;
use hdrhistogram::serialization::Deserializer as HdrDeserializer;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use serde::ser::{SerializeMap, Serializer};
use serde::{Deserialize, Serialize};

use super::histogram::{MICROS_MAX, SIGNIFICANT_DIGITS};
use super::{Bandwidth, Engine, Histogram, Media, Record, Session, serial};

/// Largest count of one counter or one histogram of one host. A run of days stays far below it, and
/// the sum of a thousand hosts still fits.
pub const COUNT_MAX: u64 = 1 << 54;

/// Length of a V2 histogram's header, which precedes the counts.
const HDR_HEADER_BYTES: usize = 40;
/// Largest length of the counts: one for each value that three digits distinguish up to a minute,
/// at most nine bytes each.
const HDR_COUNTS_BYTES_MAX: usize = 17 * 1024 * 9;
/// Largest length of a histogram's base64, for data that does not deflate at all.
const HDR_TEXT_BYTES_MAX: usize = (HDR_HEADER_BYTES + HDR_COUNTS_BYTES_MAX + 1_024) / 3 * 4;
const HDR_V2_DEFLATE_COOKIE: u32 = 0x1c84_9314;

/// Compact form of a [`Record`]: histograms stay text until they are needed.
#[derive(Clone, Debug, PartialEq)]
pub struct RecordWire {
    /// Sections in the order of [`SECTIONS`].
    sections: [SectionWire; SECTIONS.len()],
}

#[derive(Clone, Debug, Default, PartialEq)]
struct SectionWire {
    /// All counters of the section.
    counters: Vec<(&'static str, u64)>,
    histograms: Vec<(&'static str, HistogramWire)>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct HistogramWire {
    expected: u64,
    /// HdrHistogram V2 format, deflated, in base64.
    hdr: String,
}

/// Names of one section of a record. Scores are histograms here.
struct RecordSection {
    name: &'static str,
    counters: &'static [&'static str],
    histograms: &'static [&'static str],
    scores: &'static [&'static str],
}

const SECTIONS: [RecordSection; 5] = [
    RecordSection {
        name: "session",
        counters: Session::COUNTERS,
        histograms: Session::HISTOGRAMS,
        scores: Session::SCORES,
    },
    RecordSection {
        name: "audio",
        counters: Media::COUNTERS,
        histograms: Media::HISTOGRAMS,
        scores: Media::SCORES,
    },
    RecordSection {
        name: "video",
        counters: Media::COUNTERS,
        histograms: Media::HISTOGRAMS,
        scores: Media::SCORES,
    },
    RecordSection {
        name: "bandwidth",
        counters: Bandwidth::COUNTERS,
        histograms: Bandwidth::HISTOGRAMS,
        scores: Bandwidth::SCORES,
    },
    RecordSection {
        name: "engine",
        counters: Engine::COUNTERS,
        histograms: Engine::HISTOGRAMS,
        scores: Engine::SCORES,
    },
];

/// Section of a [`Record`] whose counters and histograms are found by name.
pub(super) trait Named {
    fn counter_mut(&mut self, name: &str) -> Option<&mut u64>;
    /// Returns a histogram or a score.
    fn histogram_mut(&mut self, name: &str) -> Option<&mut Histogram>;
}

impl From<&Record> for RecordWire {
    fn from(record: &Record) -> RecordWire {
        macro_rules! section {
            ($name:ident) => {
                SectionWire::new(
                    record.$name.counters(),
                    record.$name.histograms().chain(record.$name.scores()),
                )
            };
        }
        RecordWire {
            sections: [
                section!(session),
                section!(audio),
                section!(video),
                section!(bandwidth),
                section!(engine),
            ],
        }
    }
}

impl From<&RecordWire> for Record {
    fn from(wire: &RecordWire) -> Record {
        let mut record = Record::default();
        wire.merge_into(&mut record);
        record
    }
}

impl RecordWire {
    /// Adds the counts of this host.
    pub fn merge_into(&self, record: &mut Record) {
        let [session, audio, video, bandwidth, engine] = &self.sections;
        session.merge_into(&mut record.session);
        audio.merge_into(&mut record.audio);
        video.merge_into(&mut record.video);
        bandwidth.merge_into(&mut record.bandwidth);
        engine.merge_into(&mut record.engine);
    }
}

impl SectionWire {
    fn new<'a>(
        counters: impl Iterator<Item = (&'static str, u64)>,
        histograms: impl Iterator<Item = (&'static str, &'a Histogram)>,
    ) -> SectionWire {
        SectionWire {
            counters: counters.collect(),
            histograms: histograms
                .filter(|(_, histogram)| histogram.expected() > 0)
                .map(|(name, histogram)| (name, HistogramWire::new(histogram)))
                .collect(),
        }
    }

    fn merge_into(&self, section: &mut impl Named) {
        for (name, value) in &self.counters {
            let counter = section
                .counter_mut(name)
                .expect("names were looked up when they were read");
            *counter = counter.wrapping_add(*value);
        }
        for (name, wire) in &self.histograms {
            let histogram = section
                .histogram_mut(name)
                .expect("names were looked up when they were read");
            histogram.merge(&wire.histogram().expect("the text was read once before"));
        }
    }
}

impl HistogramWire {
    fn new(histogram: &Histogram) -> HistogramWire {
        HistogramWire {
            expected: histogram.announced(),
            hdr: serial::to_base64(histogram),
        }
    }

    fn histogram(&self) -> Result<Histogram, HdrError> {
        if self.expected > COUNT_MAX {
            return Err(HdrError::TooMany);
        }
        Ok(Histogram::from_parts(read_hdr(&self.hdr)?, self.expected))
    }
}

/// Error returned when a text is not a histogram that merges with ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum HdrError {
    #[error("longer than a histogram can be")]
    TooLong,
    #[error("not base64")]
    NotBase64,
    #[error("not an HdrHistogram in V2 deflate format")]
    NotHdr,
    #[error("inflates to more than a histogram can be")]
    InflatesTooLong,
    #[error("not from 1 us to 60 s with three digits")]
    OtherBounds,
    #[error("counts more than {} values", COUNT_MAX)]
    TooMany,
    #[error("holds a value above 60 s")]
    TooLarge,
}

/// Reads a histogram with our own bounds. Other bounds are refused, because putting such values
/// into ours would silently move percentiles.
fn read_hdr(text: &str) -> Result<hdrhistogram::Histogram<u64>, HdrError> {
    if text.len() > HDR_TEXT_BYTES_MAX {
        return Err(HdrError::TooLong);
    }
    let bytes = STANDARD.decode(text).map_err(|_| HdrError::NotBase64)?;
    let inflated = inflate(&bytes)?;
    let (header, counts) = inflated
        .split_at_checked(HDR_HEADER_BYTES)
        .ok_or(HdrError::NotHdr)?;
    if header[8..] != own_parameters() {
        return Err(HdrError::OtherBounds);
    }
    // The library allocates by this length before it checks how many bytes there are.
    if header[4..8] != (counts.len() as u32).to_be_bytes() {
        return Err(HdrError::NotHdr);
    }
    // The library also negates what it reads, and the least integer has no negation. In a number
    // within `COUNT_MAX` the eighth byte has no continuation bit.
    if counts
        .windows(8)
        .any(|bytes| bytes.iter().all(|byte| byte & 0x80 != 0))
    {
        return Err(HdrError::TooMany);
    }
    let hdr = HdrDeserializer::new()
        .deserialize::<u64, _>(&mut inflated.as_slice())
        .map_err(|_| HdrError::NotHdr)?;
    if hdr.len() > COUNT_MAX {
        return Err(HdrError::TooMany);
    }
    if hdr.max() > hdr.highest_equivalent(MICROS_MAX) {
        return Err(HdrError::TooLarge);
    }
    Ok(hdr)
}

fn inflate(bytes: &[u8]) -> Result<Vec<u8>, HdrError> {
    let (cookie, rest) = bytes.split_first_chunk::<4>().ok_or(HdrError::NotHdr)?;
    let (length, deflated) = rest.split_first_chunk::<4>().ok_or(HdrError::NotHdr)?;
    if u32::from_be_bytes(*cookie) != HDR_V2_DEFLATE_COOKIE
        || u32::from_be_bytes(*length) as usize != deflated.len()
    {
        return Err(HdrError::NotHdr);
    }
    let limit = HDR_HEADER_BYTES + HDR_COUNTS_BYTES_MAX;
    let mut inflated = Vec::new();
    ZlibDecoder::new(deflated)
        .take(limit as u64 + 1)
        .read_to_end(&mut inflated)
        .map_err(|_| HdrError::NotHdr)?;
    if inflated.len() > limit {
        return Err(HdrError::InflatesTooLong);
    }
    Ok(inflated)
}

/// Returns our own V2 header from byte 8 on: offset, digits, lowest and highest value, ratio.
fn own_parameters() -> [u8; HDR_HEADER_BYTES - 8] {
    let mut bytes = [0; HDR_HEADER_BYTES - 8];
    bytes[4..8].copy_from_slice(&u32::from(SIGNIFICANT_DIGITS).to_be_bytes());
    bytes[8..16].copy_from_slice(&1u64.to_be_bytes());
    bytes[16..24].copy_from_slice(&MICROS_MAX.to_be_bytes());
    bytes[24..].copy_from_slice(&1f64.to_be_bytes());
    bytes
}

impl Serialize for RecordWire {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(SECTIONS.len()))?;
        for (section, wire) in SECTIONS.iter().zip(&self.sections) {
            map.serialize_entry(section.name, wire)?;
        }
        map.end()
    }
}

impl Serialize for SectionWire {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map =
            serializer.serialize_map(Some(self.counters.len() + self.histograms.len()))?;
        for (name, value) in &self.counters {
            map.serialize_entry(name, value)?;
        }
        for (name, histogram) in &self.histograms {
            map.serialize_entry(name, histogram)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for RecordWire {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RecordWire, D::Error> {
        deserializer.deserialize_map(RecordVisitor)
    }
}

struct RecordVisitor;

impl<'de> Visitor<'de> for RecordVisitor {
    type Value = RecordWire;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a record: an object of sections")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RecordWire, A::Error> {
        let mut found: [Option<SectionWire>; SECTIONS.len()] = [const { None }; SECTIONS.len()];
        while let Some(key) = map.next_key::<String>()? {
            let Some(at) = SECTIONS.iter().position(|section| section.name == key) else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            if found[at].is_some() {
                return Err(A::Error::custom(format_args!("{key} is there twice")));
            }
            found[at] = Some(map.next_value_seed(&SECTIONS[at])?);
        }
        let mut sections: [SectionWire; SECTIONS.len()] = Default::default();
        for ((section, found), wire) in SECTIONS.iter().zip(found).zip(&mut sections) {
            *wire = found
                .ok_or_else(|| A::Error::custom(format_args!("{} is missing", section.name)))?;
        }
        Ok(RecordWire { sections })
    }
}

impl<'de> DeserializeSeed<'de> for &RecordSection {
    type Value = SectionWire;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<SectionWire, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &RecordSection {
    type Value = SectionWire;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} as an object of counters and histograms", self.name)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<SectionWire, A::Error> {
        let mut counters: Vec<(&'static str, Option<u64>)> =
            self.counters.iter().map(|name| (*name, None)).collect();
        let mut histograms: Vec<(&'static str, HistogramWire)> = Vec::new();
        let wrong = |name: &str, what: &dyn fmt::Display| {
            A::Error::custom(format_args!("{}.{name}: {what}", self.name))
        };
        while let Some(key) = map.next_key::<String>()? {
            if let Some((name, counter)) = counters.iter_mut().find(|(name, _)| *name == key) {
                let value: u64 = map.next_value().map_err(|error| wrong(name, &error))?;
                if value > COUNT_MAX {
                    return Err(wrong(
                        name,
                        &format_args!("{value} is more than {COUNT_MAX}"),
                    ));
                }
                if counter.replace(value).is_some() {
                    return Err(wrong(name, &"is there twice"));
                }
            } else if let Some(name) = self
                .histograms
                .iter()
                .chain(self.scores)
                .find(|name| **name == key)
            {
                let wire: HistogramWire = map.next_value().map_err(|error| wrong(name, &error))?;
                wire.histogram().map_err(|error| wrong(name, &error))?;
                if histograms.iter().any(|(other, _)| other == name) {
                    return Err(wrong(name, &"is there twice"));
                }
                histograms.push((*name, wire));
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        let counters = counters
            .into_iter()
            .map(|(name, value)| {
                value
                    .map(|value| (name, value))
                    .ok_or_else(|| wrong(name, &"is missing"))
            })
            .collect::<Result<_, _>>()?;
        Ok(SectionWire {
            counters,
            histograms,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::ZlibEncoder;
    use serde_json::{Value, json};

    use super::*;
    use crate::seeded::Seeded;

    /// Makes the record of one host, and adds its samples to `everything`.
    fn record(seeded: &mut Seeded, everything: &mut Record) -> Record {
        let mut own = Record::default();
        own.audio.one_way_latency.expect(900);
        everything.audio.one_way_latency.expect(900);
        for _ in 0..800 {
            let latency = 200 + seeded.below(90_000) * seeded.below(90_000) / 1_000;
            let rtt = seeded.below(70_000_000);
            let mos = 1_000 + seeded.below(3_500);
            for record in [&mut own, &mut *everything] {
                record.audio.one_way_latency.record_micros(latency);
                record.session.rtt_rtcp.record_micros(rtt);
                record.audio.mos.record_micros(mos);
                record.video.packets_received += latency;
                record.engine.ticks_missed += 1;
            }
        }
        own
    }

    fn trip(record: &Record) -> RecordWire {
        let text = serde_json::to_string(&RecordWire::from(record)).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    fn assert_equal(left: &Record, right: &Record) {
        macro_rules! section {
            ($($name:ident)*) => {$(
                assert!(left.$name.counters().eq(right.$name.counters()), stringify!($name));
                let (ours, theirs) = (left.$name.histograms().chain(left.$name.scores()), right.$name.histograms().chain(right.$name.scores()));
                for ((name, ours), (_, theirs)) in ours.zip(theirs) {
                    assert_eq!(ours.hdr(), theirs.hdr(), "{name}");
                    assert_eq!((ours.announced(), ours.expected()), (theirs.announced(), theirs.expected()), "{name}");
                    for share in [0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 1.0] {
                        assert_eq!((ours.quantile(share), ours.low_quantile(share)), (theirs.quantile(share), theirs.low_quantile(share)), "{name} {share}");
                    }
                    assert_eq!((ours.min(), ours.mean(), ours.max()), (theirs.min(), theirs.mean(), theirs.max()), "{name}");
                }
            )*};
        }
        section!(session audio video bandwidth engine);
    }

    #[test]
    fn what_several_hosts_sent_merges_to_what_one_histogram_of_all_samples_says() {
        for seed in 0..5 {
            let mut seeded = Seeded::new(seed);
            let (mut everything, mut merged) = (Record::default(), Record::default());
            for _ in 0..7 {
                let own = record(&mut seeded, &mut everything);
                let wire = trip(&own);
                assert_equal(&Record::from(&wire), &own);
                wire.merge_into(&mut merged);
            }
            assert_eq!(
                merged.audio.one_way_latency.quantile(0.9),
                None,
                "what never came is still missing"
            );
            assert_equal(&merged, &everything);
        }
    }

    #[test]
    fn histograms_that_do_not_apply_are_left_out_and_counters_never() {
        let json = serde_json::to_value(RecordWire::from(&Record::default())).unwrap();
        assert_eq!(json["audio"]["packets_sent"], json!(0));
        for section in SECTIONS {
            assert_eq!(
                json[section.name].as_object().unwrap().len(),
                section.counters.len()
            );
        }
        let mut record = Record::default();
        record.session.join.expect(3);
        let json = serde_json::to_value(RecordWire::from(&record)).unwrap();
        assert_eq!(
            json["session"]["join"]["expected"],
            json!(3),
            "none of three came: that is known"
        );
        assert_equal(&Record::from(&trip(&record)), &record);
    }

    #[test]
    fn names_that_this_version_does_not_know_are_skipped() {
        let mut json = serde_json::to_value(RecordWire::from(&Record::default())).unwrap();
        json["data"] = json!({"messages": -1});
        json["audio"]["packets_dreamt"] = json!("many");
        assert_equal(
            &Record::from(&serde_json::from_value::<RecordWire>(json).unwrap()),
            &Record::default(),
        );
    }

    /// Makes any histogram in the V2 format, valid or not.
    fn hdr(parameters: &[u8], length: Option<u32>, counts: &[u8]) -> String {
        let mut inner = 0x1c84_9313u32.to_be_bytes().to_vec();
        inner.extend(length.unwrap_or(counts.len() as u32).to_be_bytes());
        inner.extend(parameters);
        inner.extend(counts);
        let mut deflate = ZlibEncoder::new(Vec::new(), Compression::best());
        deflate.write_all(&inner).unwrap();
        let deflated = deflate.finish().unwrap();
        let mut outer = HDR_V2_DEFLATE_COOKIE.to_be_bytes().to_vec();
        outer.extend((deflated.len() as u32).to_be_bytes());
        outer.extend(deflated);
        STANDARD.encode(outer)
    }

    fn refusal(change: impl FnOnce(&mut Value)) -> String {
        let mut json = serde_json::to_value(RecordWire::from(&Record::default())).unwrap();
        change(&mut json);
        serde_json::from_str::<RecordWire>(&json.to_string())
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn a_hostile_histogram_is_refused_by_its_name() {
        let own = own_parameters();
        let other = |at: usize, byte: u8| {
            let mut parameters = own;
            parameters[at] = byte;
            hdr(&parameters, None, &[2])
        };
        let ours = hdr(&own, None, &[2, 4]);
        assert_eq!(
            read_hdr(&ours).unwrap().len(),
            3,
            "the writer of this test writes what is read"
        );
        // Negative numbers are runs of zeros. Index 17,191 is a minute; the next one is above the
        // bound.
        let at_index = |index: u32| {
            let zeros = 2 * index - 1;
            hdr(
                &own,
                None,
                &[
                    zeros as u8 | 0x80,
                    (zeros >> 7) as u8 | 0x80,
                    (zeros >> 14) as u8,
                    2,
                ],
            )
        };
        assert_eq!(read_hdr(&at_index(17_191)).unwrap().len(), 1);
        let table = [
            ("A".repeat(HDR_TEXT_BYTES_MAX + 1), HdrError::TooLong),
            ("§".to_owned(), HdrError::NotBase64),
            (String::new(), HdrError::NotHdr),
            ("HISTFAAAAHic".to_owned(), HdrError::NotHdr),
            (
                STANDARD.encode(&STANDARD.decode(&ours).unwrap()[..20]),
                HdrError::NotHdr,
            ),
            (hdr(&own, Some(u32::MAX), &[2]), HdrError::NotHdr),
            (hdr(&own, None, &[0x80]), HdrError::NotHdr),
            // A decompression bomb: two hundred bytes that inflate to more than any histogram of
            // ours.
            (
                hdr(&own, None, &vec![0; HDR_COUNTS_BYTES_MAX + 1]),
                HdrError::InflatesTooLong,
            ),
            (hdr(&own, None, &vec![2; 17_409]), HdrError::NotHdr),
            (other(7, 5), HdrError::OtherBounds),
            (other(15, 2), HdrError::OtherBounds),
            (other(16, 1), HdrError::OtherBounds),
            (other(24, 0x40), HdrError::OtherBounds),
            // The least integer, and the greatest.
            (hdr(&own, None, &[0xff; 9]), HdrError::TooMany),
            (
                hdr(
                    &own,
                    None,
                    &[0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
                ),
                HdrError::TooMany,
            ),
            (
                hdr(
                    &own,
                    None,
                    &[0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x40, 2],
                ),
                HdrError::TooMany,
            ),
            (at_index(17_192), HdrError::TooLarge),
        ];
        for (text, error) in table {
            assert_eq!(
                read_hdr(&text).unwrap_err(),
                error,
                "{}",
                &text[..text.len().min(60)]
            );
            let message = refusal(|json| {
                json["audio"]["one_way_latency"] = json!({"expected": 1, "hdr": text})
            });
            assert!(
                message.starts_with(&format!("audio.one_way_latency: {error}")),
                "{message}"
            );
        }
    }

    #[test]
    fn hostile_counts_are_refused_by_their_name() {
        let empty = serial::to_base64(&Histogram::default());
        for value in [
            json!(-1),
            json!(1.5),
            json!(null),
            json!("7"),
            json!([1]),
            json!(COUNT_MAX + 1),
            json!(u64::MAX),
        ] {
            let message = refusal(|json| json["video"]["packets_sent"] = value.clone());
            assert!(message.starts_with("video.packets_sent: "), "{message}");
            let message =
                refusal(|json| json["session"]["join"] = json!({"expected": value, "hdr": empty}));
            assert!(message.starts_with("session.join: "), "{message}");
        }
        for (text, expected) in [
            (
                r#"{"session": 5}"#,
                "invalid type: integer `5`, expected session as",
            ),
            (r#"{"session": {}}"#, "session.joins_planned: is missing"),
            ("{}", "session is missing"),
            (
                r#"{"session": {"joins_ok": 1, "joins_ok": 1}}"#,
                "session.joins_ok: is there twice",
            ),
            (
                r#"{"session": {"joins_ok": NaN}}"#,
                "session.joins_ok: expected value",
            ),
            (r#"{"session": {"joins_ok": 1e400}}"#, "session.joins_ok: "),
            ("[]", "invalid type: sequence, expected a record"),
        ] {
            let message = serde_json::from_str::<RecordWire>(text)
                .unwrap_err()
                .to_string();
            assert!(message.starts_with(expected), "{message}");
        }
    }

    #[test]
    fn a_thousand_hosts_that_each_count_the_most_do_not_overflow() {
        let mut most = Record::default();
        most.audio.packets_sent = COUNT_MAX;
        most.audio.one_way_latency.expect(COUNT_MAX);
        let wire = trip(&most);
        let mut merged = Record::default();
        (0..1_000).for_each(|_| wire.merge_into(&mut merged));
        assert_eq!(merged.audio.packets_sent, 1_000 * COUNT_MAX);
        assert_eq!(merged.audio.one_way_latency.expected(), 1_000 * COUNT_MAX);
        assert_eq!(merged.audio.one_way_latency.quantile(0.5), None);
    }
}
