//! Quantities that carry their unit: points in time, wall-clock anchors, bitrates.
//!
//! Below the worker thread nothing reads a clock: a [`Time`] is passed in as an argument.

use std::fmt;
use std::ops::{Add, AddAssign, Sub};
use std::str::FromStr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A point on the run's monotonic clock: nanoseconds since the run's [`Epoch`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(u64);

impl Time {
    pub const ZERO: Time = Time(0);
    /// Later than every point that a run can reach. It means "no deadline".
    pub const MAX: Time = Time(u64::MAX);

    pub const fn from_nanos(nanos: u64) -> Time {
        Time(nanos)
    }

    pub const fn from_micros(micros: u64) -> Time {
        Time(micros * 1_000)
    }

    pub const fn from_millis(millis: u64) -> Time {
        Time(millis * 1_000_000)
    }

    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    pub const fn as_micros(self) -> u64 {
        self.0 / 1_000
    }

    pub const fn as_millis(self) -> u64 {
        self.0 / 1_000_000
    }

    /// Returns this time if it is a whole multiple of `step`, else the next one.
    #[must_use]
    pub const fn next_whole(self, step: Duration) -> Time {
        Time(self.0.next_multiple_of(step.as_nanos() as u64))
    }

    /// Returns the first whole second after this time.
    #[must_use]
    pub const fn next_second(self) -> Time {
        Time(self.0 + 1).next_whole(Duration::from_secs(1))
    }

    /// Returns the time that has passed since `earlier`; zero if `earlier` is in the future.
    pub const fn since(self, earlier: Time) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// Returns the whole microseconds since `earlier`; zero if `earlier` is in the future.
    pub const fn micros_since(self, earlier: Time) -> u64 {
        self.0.saturating_sub(earlier.0) / 1_000
    }
}

impl Add<Duration> for Time {
    type Output = Time;

    fn add(self, rhs: Duration) -> Time {
        Time(
            self.0
                .saturating_add(u64::try_from(rhs.as_nanos()).unwrap_or(u64::MAX)),
        )
    }
}

impl AddAssign<Duration> for Time {
    fn add_assign(&mut self, rhs: Duration) {
        *self = *self + rhs;
    }
}

impl Sub<Duration> for Time {
    type Output = Time;

    fn sub(self, rhs: Duration) -> Time {
        Time(
            self.0
                .saturating_sub(u64::try_from(rhs.as_nanos()).unwrap_or(u64::MAX)),
        )
    }
}

/// Start of a run's clock: one reading of the monotonic clock and of the wall clock, taken
/// together.
///
/// Wall-clock times that leave the process (frame identity, NTP stamps) are derived from it, so
/// they never step during a run.
#[derive(Clone, Copy, Debug)]
pub struct Epoch {
    instant: Instant,
    unix: Duration,
}

impl Epoch {
    /// Reads both clocks. Only the edge (`main`, tests) calls this.
    pub fn read() -> Epoch {
        let unix = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Epoch {
            instant: Instant::now(),
            unix,
        }
    }

    /// Returns the same clock, counted from `zero` on. A moment has the same microseconds since
    /// 1970 on both, whatever has happened to the wall clock meanwhile.
    #[must_use]
    pub fn counted_from(&self, zero: Time) -> Epoch {
        Epoch {
            instant: self.instant(zero),
            unix: self.unix + zero.since(Time::ZERO),
        }
    }

    /// Makes a simulation's epoch. Its clock starts at `unix` (since 1970), whatever the host's
    /// clocks say, so that everything derived from it is the same every time.
    pub fn simulated(unix: Duration) -> Epoch {
        Epoch {
            instant: Instant::now(),
            unix,
        }
    }

    /// Reads the monotonic clock. Only the edge (worker loop, signalling tasks) calls this.
    pub fn now(&self) -> Time {
        self.time(Instant::now())
    }

    pub fn time(&self, instant: Instant) -> Time {
        Time::ZERO + instant.saturating_duration_since(self.instant)
    }

    pub fn instant(&self, time: Time) -> Instant {
        self.instant + Duration::from_nanos(time.as_nanos())
    }

    /// Returns the microseconds since 1970 at `time`, by the wall clock as read at the epoch.
    pub fn unix_micros(&self, time: Time) -> u64 {
        self.unix.as_micros() as u64 + time.as_micros()
    }

    /// Converts a wall-clock stamp to run time. Returns `None` if it lies before the epoch, or
    /// later than a run can last.
    pub fn time_of_unix_micros(&self, unix_micros: u64) -> Option<Time> {
        let micros = unix_micros.checked_sub(self.unix.as_micros() as u64)?;
        micros.checked_mul(1_000).map(Time::from_nanos)
    }

    /// Returns the NTP timestamp at `time` (RFC 3550, section 4): 32.32 fixed point, seconds since
    /// 1900.
    pub fn ntp(&self, time: Time) -> u64 {
        const UNIX_TO_NTP_SECONDS: u64 = 2_208_988_800;
        let unix = self.unix + Duration::from_nanos(time.as_nanos());
        let fraction = (u64::from(unix.subsec_nanos()) << 32) / 1_000_000_000;
        ((unix.as_secs() + UNIX_TO_NTP_SECONDS) << 32) | fraction
    }
}

/// Returns the middle 32 bits of an NTP timestamp, as LSR and DLSR use them (RFC 3550, section
/// 6.4.1): units of 1/65,536 s.
pub const fn ntp_middle(ntp: u64) -> u32 {
    (ntp >> 16) as u32
}

/// A rate in bits per second. Written `24k`, `1.5M` or bare `48000`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bitrate(u64);

impl Bitrate {
    pub const fn from_bps(bps: u64) -> Bitrate {
        Bitrate(bps)
    }

    pub const fn bps(self) -> u64 {
        self.0
    }
}

impl Bitrate {
    /// Returns the text that parses to the same bitrate: `24k`, `1.5M`, `48001`.
    pub fn written(self) -> String {
        match self.0 {
            bps if bps >= 1_000_000 && bps % 10_000 == 0 => {
                format!("{}M", trimmed(bps as f64 / 1e6))
            }
            bps if bps >= 1_000 && bps % 1_000 == 0 => format!("{}k", bps / 1_000),
            bps => bps.to_string(),
        }
    }
}

impl Serialize for Bitrate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.written())
    }
}

impl<'de> Deserialize<'de> for Bitrate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Bitrate, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(D::Error::custom)
    }
}

/// Error for a text that is not a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write 20, 20s, 30m or 1h")]
pub struct NoDuration;

/// Reads a time as people write it: `20` (seconds), `20s`, `2.5ms`, `1h 30m`.
///
/// # Errors
/// If the text is not a time.
pub fn read_duration(text: &str) -> Result<Duration, NoDuration> {
    let seconds = text.parse::<u64>().ok().map(Duration::from_secs);
    let millis = || {
        let digits = text.strip_suffix("ms")?;
        let plain = digits.bytes().all(|b| b.is_ascii_digit() || b == b'.');
        let millis = digits.parse::<f64>().ok().filter(|_| plain)?;
        Duration::try_from_secs_f64(millis / 1e3).ok()
    };
    let duration = seconds
        .or_else(|| humantime::parse_duration(text).ok())
        .or_else(millis);
    duration.ok_or(NoDuration)
}

/// Returns the text that [`read_duration`] reads, to the nanosecond.
pub fn written_duration(duration: Duration) -> String {
    humantime::format_duration(duration).to_string()
}

/// Serde format: a time as text.
pub mod duration_text {
    use serde::de::Error as _;

    use super::{Deserialize, Deserializer, Duration, Serializer, read_duration};

    pub fn serialize<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&super::written_duration(*time))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(from)?;
        read_duration(&text).map_err(D::Error::custom)
    }
}

/// Serde format: a time as text that may be absent.
pub mod optional_duration_text {
    use serde::de::Error as _;

    use super::{Deserialize, Deserializer, Duration, Serializer, read_duration};

    pub fn serialize<S: Serializer>(
        time: &Option<Duration>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match time {
            Some(time) => super::duration_text::serialize(time, serializer),
            None => serializer.serialize_none(),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
        let text = Option::<String>::deserialize(from)?;
        let read = |text: String| read_duration(&text);
        text.map(read).transpose().map_err(D::Error::custom)
    }
}

/// Error for a text that is not a bitrate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no bitrate: write 24k, 1.5M or bare bits per second (48000)")]
pub struct NoBitrate(String);

impl FromStr for Bitrate {
    type Err = NoBitrate;

    fn from_str(text: &str) -> Result<Bitrate, NoBitrate> {
        let wrong = || NoBitrate(text.to_owned());
        let (digits, scale) = match text.char_indices().last() {
            Some((at, 'k' | 'K')) => (&text[..at], 1e3),
            Some((at, 'm' | 'M')) => (&text[..at], 1e6),
            Some((at, 'g' | 'G')) => (&text[..at], 1e9),
            _ => (text, 1.0),
        };
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit() || b == b'.');
        let bps = digits
            .parse::<f64>()
            .ok()
            .filter(|_| plain)
            .ok_or_else(wrong)?
            * scale;
        if !(1.0..=1e12).contains(&bps) {
            return Err(wrong());
        }
        Ok(Bitrate(bps.round() as u64))
    }
}

impl fmt::Display for Bitrate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bps if bps >= 1_000_000 => write!(f, "{} Mbps", trimmed(bps as f64 / 1e6)),
            bps if bps >= 1_000 => write!(f, "{} kbps", trimmed(bps as f64 / 1e3)),
            bps => write!(f, "{bps} bps"),
        }
    }
}

fn trimmed(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Returns when a datagram reached this host, on the run's clock: by the kernel's stamp, or `now`
/// if there is none.
///
/// `now` and `unix_now` are the same moment on both clocks. A datagram that arrived while others
/// were being received is later than that.
pub fn arrival(now: Time, unix_now: u64, stamp: Option<u64>) -> Time {
    const ABSURD: Duration = Duration::from_secs(10);
    let Some(stamp) = stamp else { return now };
    let apart = Duration::from_nanos(unix_now.abs_diff(stamp));
    if apart > ABSURD {
        // The wall clock was stepped.
        now
    } else if stamp <= unix_now {
        now - apart
    } else {
        now + apart
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitrates_are_read_and_refused() {
        for (text, bps) in [
            ("24k", 24_000),
            ("1.5M", 1_500_000),
            ("48000", 48_000),
            ("2m", 2_000_000),
        ] {
            assert_eq!(text.parse::<Bitrate>().unwrap().bps(), bps);
        }
        for text in ["", "k", "-1", "0", "1e3", "nan", "fast", "1.2.3", "é", "5é"] {
            assert!(text.parse::<Bitrate>().is_err(), "{text}");
        }
        assert_eq!(Bitrate::from_bps(1_500_000).to_string(), "1.5 Mbps");
    }

    #[test]
    fn what_is_written_is_read_again() {
        for bps in [
            1, 999, 24_000, 48_001, 600_000, 1_500_000, 1_234_567, 2_000_000, 4_507_500,
        ] {
            let bitrate = Bitrate::from_bps(bps);
            assert_eq!(bitrate.written().parse(), Ok(bitrate), "{bps}");
        }
        assert_eq!(Bitrate::from_bps(1_500_000).written(), "1.5M");
        for nanos in [
            0,
            1,
            2_500_000,
            15_000_000_000,
            5_400_000_000_000,
            86_400_000_000_007,
        ] {
            let time = Duration::from_nanos(nanos);
            assert_eq!(read_duration(&written_duration(time)), Ok(time), "{nanos}");
        }
        for (text, millis) in [("20", 20_000), ("2.5ms", 2), ("1h30m", 5_400_000)] {
            assert_eq!(read_duration(text).unwrap().as_millis(), millis);
        }
        for text in ["", "x", "1e3", "-5", "1w2", "nanms", ".ms"] {
            assert_eq!(read_duration(text), Err(NoDuration), "{text}");
        }
    }

    #[test]
    fn ntp_stamps_count_from_1900_in_32_32_fixed_point() {
        let epoch = Epoch {
            instant: Instant::now(),
            unix: Duration::new(1, 500_000_000),
        };
        let ntp = epoch.ntp(Time::from_millis(250));
        assert_eq!(ntp >> 32, 2_208_988_801);
        assert_eq!(ntp as u32, 0xC000_0000);
        assert_eq!(ntp_middle(ntp), ((2_208_988_801u64 as u32) << 16) | 0xC000);
    }
}
