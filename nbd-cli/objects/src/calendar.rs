//! Days and times, in UTC.

use std::str::FromStr;

use chrono::{DateTime, NaiveDate, NaiveTime, Timelike as _};

/// Parses decimal digits, exactly as many.
fn digits<T: FromStr>(text: &str, count: usize) -> Option<T> {
    let is_number = text.len() == count && text.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| text.parse().ok()).flatten()
}

/// The days from 1970 to a day, such as 2026-11-20.
pub(crate) fn day(text: &str) -> Option<u64> {
    let (year, date) = text.split_once('-')?;
    let (month, day) = date.split_once('-')?;
    let date = NaiveDate::from_ymd_opt(digits(year, 4)?, digits(month, 2)?, digits(day, 2)?)?;
    u64::try_from(date.to_epoch_days()).ok()
}

/// The seconds from midnight to a time, such as 18:30 or 18:30:15.
pub(crate) fn seconds(text: &str) -> Option<u64> {
    let (hour, rest) = text.split_once(':')?;
    let (minute, second) = rest.split_once(':').unwrap_or((rest, "00"));
    let time = NaiveTime::from_hms_opt(digits(hour, 2)?, digits(minute, 2)?, digits(second, 2)?)?;
    Some(u64::from(time.num_seconds_from_midnight()))
}

/// The seconds from 1970 to a time in a list of S3: 2026-11-28T10:51:55.123Z.
pub(crate) fn of_s3(text: &str) -> Option<u64> {
    u64::try_from(DateTime::parse_from_rfc3339(text).ok()?.timestamp()).ok()
}

/// The seconds from 1970 to a date of HTTP (RFC 9110, section 5.6.7): Sat, 28 Nov 2026 10:51:55
/// GMT.
pub(crate) fn of_http(text: &str) -> Option<u64> {
    u64::try_from(DateTime::parse_from_rfc2822(text).ok()?.timestamp()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_and_times_of_users_are_complete_ones() {
        assert_eq!(day("1970-01-02"), Some(1));
        assert_eq!(day("2026-11-20"), Some(20_777));
        for bad in
            ["", "2026-11", "2026-1-2", "2026-02-30", "1969-12-31", "2026-11-20T", "+2026-11-20"]
        {
            assert_eq!(day(bad), None, "{bad}");
        }
        assert_eq!(seconds("18:30"), Some(66_600));
        assert_eq!(seconds("18:30:15"), Some(66_615));
        for bad in ["", "18", "8:30", "24:00", "18:60", "18:30:60", "18:30:1", "18:30Z"] {
            assert_eq!(seconds(bad), None, "{bad}");
        }
    }

    #[test]
    fn dates_of_http_and_of_lists_are_the_same_seconds() {
        assert_eq!(of_http("Sat, 28 Nov 2026 10:51:55 GMT"), Some(1_795_863_115));
        assert_eq!(of_s3("2026-11-28T10:51:55.123Z"), Some(1_795_863_115));
        assert_eq!(of_s3("2026-11-28T10:51:55Z"), Some(1_795_863_115));
        assert_eq!(of_http("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        for bad in ["", "Sat, 28 Nov 2026 10:51:55", "Sat, 28 Foo 2026 10:51:55 GMT", "28 Nov 2026"]
        {
            assert_eq!(of_http(bad), None, "{bad}");
        }
        for bad in ["", "2026-11-28", "2026-11-28T10:51:55", "2026-11-28T24:00:00Z", "TZ"] {
            assert_eq!(of_s3(bad), None, "{bad}");
        }
    }
}
