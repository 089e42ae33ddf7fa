//! Sizes and durations in human notation.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;
use std::time::Duration;

const SUFFIXES: [&str; 7] = ["", "K", "M", "G", "T", "P", "E"];

/// In nanoseconds.
const MILLISECOND: u64 = 1_000_000;
const SECOND: u64 = 1000 * MILLISECOND;
/// No limit needs more than a day; the bound keeps the clock arithmetic safe.
const DURATION_MAX: u64 = 86_400 * SECOND;

/// A number of bytes, written as `4096`, `64K`, `1G` or `2GiB`; suffixes are powers of 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

impl ByteSize {
    /// Returns the size in bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, suffix) = text.split_at(digits);
        if number.is_empty() {
            return Err(format!("'{text}' is not a size; give a number such as 4096, 64K or 1G"));
        }
        let Some(shift) = shift_of(suffix) else {
            return Err(format!(
                "'{text}' has the unknown size suffix '{suffix}'; use K, M, G, T, P or E (powers \
                 of 1024), as in 64K or 1G"
            ));
        };
        let too_large = || format!("'{text}' is too large for a size; the limit is below 8E");
        let number: u64 = number.parse().map_err(|_| too_large())?;
        let bytes = number.checked_mul(1 << shift).ok_or_else(too_large)?;
        // NBD sizes and offsets are signed in many peers.
        i64::try_from(bytes).map_err(|_| too_large())?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for ByteSize {
    /// The text of `exact`: `64K`, `1G`, or all digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&exact(self.0))
    }
}

fn shift_of(suffix: &str) -> Option<u32> {
    let unit = suffix.strip_suffix("iB").unwrap_or(suffix);
    match unit.to_ascii_lowercase().as_str() {
        "" | "b" if suffix.len() < 2 => Some(0),
        "k" => Some(10),
        "m" => Some(20),
        "g" => Some(30),
        "t" => Some(40),
        "p" => Some(50),
        "e" => Some(60),
        _ => None,
    }
}

/// Parses a rate in bytes per second, which is not 0.
///
/// # Errors
///
/// A sentence with what is possible.
pub fn parse_rate(text: &str) -> Result<NonZeroU64, String> {
    let rate: ByteSize = text.parse()?;
    NonZeroU64::new(rate.bytes()).ok_or_else(|| {
        "a rate is at least one byte per second; omit the option for no limit".to_owned()
    })
}

/// Parses a polling time: `0`, or a duration such as `33us` or `1ms`, which is the most.
///
/// # Errors
///
/// A sentence with what is possible.
pub fn parse_busy_poll(text: &str) -> Result<Duration, String> {
    match nanoseconds(text, 0) {
        // A number alone might be meant as nanoseconds, microseconds or seconds.
        Some(found @ 0..=MILLISECOND) if text == "0" || !text.ends_with(is_digit) => {
            Ok(Duration::from_nanos(found))
        }
        _ => Err(format!(
            "'{text}' is not a time from 0 to 1ms; give microseconds such as 33us, or 0"
        )),
    }
}

/// Parses a duration, written as `10` (seconds), `10s`, `500ms`, `2m` or `1h`: from a millisecond
/// to a day.
///
/// # Errors
///
/// A sentence with what is possible.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    match nanoseconds(text, SECOND) {
        Some(found @ MILLISECOND..=DURATION_MAX) => Ok(Duration::from_nanos(found)),
        _ => Err(format!(
            "'{text}' is not a time from 1ms to 24h; give seconds such as 10, or 500ms, 2m, 1h"
        )),
    }
}

/// Like [`parse_duration`], or `0` (with or without a unit) for no limit, which is returned as
/// zero.
///
/// # Errors
///
/// As [`parse_duration`].
pub fn parse_limit(text: &str) -> Result<Duration, String> {
    match nanoseconds(text, SECOND) {
        Some(0) => Ok(Duration::ZERO),
        _ => parse_duration(text),
    }
}

/// Parses a number with a unit of time; one without has the unit `alone`, in nanoseconds.
fn nanoseconds(text: &str, alone: u64) -> Option<u64> {
    let (number, unit) = text.split_at(text.find(|it| !is_digit(it)).unwrap_or(text.len()));
    let unit = match unit {
        "" => alone,
        "ns" => 1,
        "us" | "\u{b5}s" | "\u{3bc}s" => 1000,
        "ms" => MILLISECOND,
        "s" => SECOND,
        "m" => 60 * SECOND,
        "h" => 3600 * SECOND,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(unit)
}

fn is_digit(character: char) -> bool {
    character.is_ascii_digit()
}

/// A size with the largest suffix that keeps it exact: `8M`, `1025`, `3K`.
pub fn exact(bytes: u64) -> String {
    let mut number = bytes;
    let mut suffix = 0;
    while number != 0 && number.is_multiple_of(1024) && suffix + 1 < SUFFIXES.len() {
        number /= 1024;
        suffix += 1;
    }
    format!("{number}{}", SUFFIXES[suffix])
}

/// A size rounded for reading: `8.0 MiB`, `1.5 GiB`, `17 bytes`.
pub fn rounded(bytes: u64) -> String {
    if bytes < 1024 {
        return format!("{bytes} bytes");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut suffix = 1;
    while value >= 1024.0 && suffix + 1 < SUFFIXES.len() {
        value /= 1024.0;
        suffix += 1;
    }
    format!("{value:.1} {}iB", SUFFIXES[suffix])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("17b", 17),
            ("64k", 65536),
            ("64K", 65536),
            ("3MiB", 3 << 20),
            ("1G", 1 << 30),
            ("7E", 7 << 60),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused_with_the_reason() {
        for (text, reason) in [
            ("1Q", "unknown size suffix 'Q'"),
            ("1KB", "unknown size suffix 'KB'"),
            ("1iB", "unknown size suffix 'iB'"),
            ("1.5G", "unknown size suffix '.5G'"),
            ("", "not a size"),
            ("-1", "not a size"),
            ("G", "not a size"),
            ("8E", "too large"),
            ("99999999999999999999", "too large"),
        ] {
            let error = text.parse::<ByteSize>().unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn exact_sizes_parse_back() {
        for bytes in [0, 1, 1023, 1024, 1025, 8 << 20, 1 << 62, (1 << 40) + 512] {
            assert_eq!(exact(bytes).parse(), Ok(ByteSize(bytes)));
        }
        assert_eq!(exact(8 << 20), "8M");
    }

    #[test]
    fn no_limit_is_zero() {
        for text in ["0", "0s", "0h", "0ms"] {
            assert_eq!(parse_limit(text), Ok(Duration::ZERO), "{text}");
            assert!(parse_duration(text).is_err(), "{text}");
        }
        assert_eq!(parse_limit("5m"), Ok(Duration::from_secs(300)));
        for text in ["never", "", "0x", "ms"] {
            assert!(parse_limit(text).is_err(), "{text}");
        }
    }

    #[test]
    fn rates_are_not_zero() {
        assert_eq!(parse_rate("50M").map(NonZeroU64::get), Ok(50 << 20));
        assert!(parse_rate("0").unwrap_err().contains("omit the option"));
        assert!(parse_rate("fast").unwrap_err().contains("not a size"));
    }

    #[test]
    fn polling_takes_at_most_a_millisecond() {
        assert_eq!(parse_busy_poll("0"), Ok(Duration::ZERO));
        assert_eq!(parse_busy_poll("33us"), Ok(Duration::from_micros(33)));
        assert_eq!(parse_busy_poll("32768ns"), Ok(Duration::from_nanos(32_768)));
        assert_eq!(parse_busy_poll("1ms"), Ok(Duration::from_millis(1)));
        for text in ["", "33", "2ms", "1000001ns", "1s", "18446744073709551615ms"] {
            assert!(parse_busy_poll(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_have_all_units_up_to_a_day() {
        for (text, milliseconds) in [
            ("10", 10_000),
            ("10s", 10_000),
            ("500ms", 500),
            ("2m", 120_000),
            ("1h", 3_600_000),
            ("24h", 86_400_000),
            ("1000us", 1),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
        for text in
            ["", "0", "s", "1d", "1H", "25h", "999us", "1.5h", "-1s", "18446744073709551615m"]
        {
            let error = parse_duration(text).unwrap_err();
            assert!(error.contains("500ms, 2m, 1h"), "{text}: {error}");
        }
    }

    #[test]
    fn exact_sizes_have_the_largest_suffix() {
        let texts = [0, 1, 1023, 1024, 1025, 8 << 20, 1 << 62].map(exact);
        assert_eq!(texts, ["0", "1", "1023", "1K", "1025", "8M", "4E"]);
    }

    #[test]
    fn rounded_sizes_have_one_decimal() {
        assert_eq!(rounded(17), "17 bytes");
        assert_eq!(rounded(1536), "1.5 KiB");
        assert_eq!(rounded(u64::MAX), "16.0 EiB");
    }
}
