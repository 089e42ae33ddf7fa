//! Days and times of the Gregorian calendar.

/// Seconds of a day.
const DAY: u64 = 86_400;
/// The months, as dates of HTTP name them.
const MONTHS: [&str; 12] =
    ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// Parses decimal digits, exactly as many.
fn digits(text: &str, count: usize) -> Option<u64> {
    let is_number = text.len() == count && text.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| text.parse().ok()).flatten()
}

/// The days from 1970 to a day, such as 2026-11-20.
pub(crate) fn day(text: &str) -> Option<u64> {
    let mut parts = text.splitn(3, '-');
    let year = digits(parts.next()?, 4)?;
    let month = digits(parts.next()?, 2)?;
    let day = digits(parts.next()?, 2)?;
    days(year, month, day)
}

fn days(year: u64, month: u64, day: u64) -> Option<u64> {
    if year < 1970 || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // Years are counted from March, so that the day of a leap year comes last.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * year + year / 4 - year / 100 + year / 400;
    (days + (153 * month + 2) / 5 + day - 1).checked_sub(719_468)
}

/// The seconds from midnight to a time, such as 18:30 or 18:30:15.
pub(crate) fn seconds(text: &str) -> Option<u64> {
    let mut parts = text.splitn(3, ':');
    let hour = digits(parts.next()?, 2).filter(|hour| *hour < 24)?;
    let minute = digits(parts.next()?, 2).filter(|minute| *minute < 60)?;
    let second = parts.next().map_or(Some(0), |text| digits(text, 2)).filter(|it| *it < 60)?;
    Some((hour * 60 + minute) * 60 + second)
}

/// The seconds from 1970 to a time in UTC, as in lists of S3: 2026-11-28T10:51:55.123Z.
pub(crate) fn of_s3(text: &str) -> Option<u64> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let time = time.split_once('.').map_or(time, |(time, _)| time);
    Some(day(date)? * DAY + seconds(time)?)
}

/// A time in UTC, as in lists of S3.
#[cfg(any(test, feature = "test-util"))]
pub(crate) fn to_s3(time: u64) -> String {
    // Years are counted from March, as above, and groups of 400 years.
    let days = time / DAY + 719_468;
    let day = days % 146_097;
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, year) = (day - (153 * month + 2) / 5 + 1, year + days / 146_097 * 400);
    let (month, year) = if month < 10 { (month + 3, year) } else { (month - 9, year + 1) };
    let (hour, minute, second) = (time % DAY / 3600, time / 60 % 60, time % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.000Z")
}

/// The seconds from 1970 to a date of HTTP (RFC 9110, section 5.6.7): Sat, 28 Nov 2026 10:51:55 GMT.
pub(crate) fn of_http(text: &str) -> Option<u64> {
    let mut parts = text.split_once(", ")?.1.split(' ');
    let day = digits(parts.next()?, 2)?;
    let month = parts.next()?;
    let month = MONTHS.iter().position(|name| *name == month)? as u64 + 1;
    let year = digits(parts.next()?, 4)?;
    let time = seconds(parts.next()?)?;
    (parts.next()? == "GMT").then_some(days(year, month, day)? * DAY + time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_they_are_read() {
        for time in (0..200_000_000_000).step_by(86_399 * 1013) {
            assert_eq!(of_s3(&to_s3(time)), Some(time).filter(|_| to_s3(time).len() == 24));
        }
        assert_eq!(to_s3(951_782_400), "2000-02-29T00:00:00.000Z");
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
