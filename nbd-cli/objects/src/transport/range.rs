//! Requests for a range of an object, and their replies (RFC 9110, section 14).

use chrono::DateTime;
use hyper::StatusCode;
use hyper::header::{
    CONTENT_LENGTH, CONTENT_RANGE, HeaderMap, HeaderName, HeaderValue, LAST_MODIFIED, RANGE,
};
use hyper::http::response::Parts;
use object_store::client::{HttpError, HttpErrorKind};

use super::failure::failed;

/// The first and the last byte of a range.
pub(super) type Bounds = (u64, u64);

/// The range that a request asks for, if it has both ends.
pub(super) fn asked(headers: &HeaderMap) -> Option<Bounds> {
    bounds(text(headers, &RANGE)?.strip_prefix("bytes=")?)
}

/// The number of bytes.
pub(super) fn length((first, last): Bounds) -> Option<u64> {
    last.checked_sub(first)?.checked_add(1)
}

/// Adds to a reply what the client of the store wants to be told, where it follows from the rest.
/// The length of its body, in bytes, is known if it does not come in chunks or until the connection
/// ends.
///
/// # Errors
///
/// If the reply has another length than its range.
pub(super) fn complete(
    reply: &mut Parts,
    length_sent: Option<u64>,
    asked: Option<Bounds>,
) -> Result<(), HttpError> {
    // Nobody looks at it, but the client refuses dates in other forms.
    let date = text(&reply.headers, &LAST_MODIFIED);
    if date.is_none_or(|date| DateTime::parse_from_rfc2822(date).is_err()) {
        reply.headers.remove(LAST_MODIFIED);
    }
    let Some(asked) = asked else { return Ok(()) };
    if let (StatusCode::OK, (0, last), Some(size @ 1..)) = (reply.status, asked, length_sent)
        && size - 1 <= last
    {
        // The whole object is what was asked for: servers may ignore such a range (section 14.2).
        reply.status = StatusCode::PARTIAL_CONTENT;
        set(&mut reply.headers, CONTENT_RANGE, &format!("bytes 0-{}/{size}", size - 1));
    }
    if reply.status != StatusCode::PARTIAL_CONTENT {
        return Ok(());
    }
    let sent = text(&reply.headers, &CONTENT_RANGE).and_then(|text| {
        let (range, _) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
        length(bounds(range)?)
    });
    if let (Some(sent), Some(length)) = (sent, length_sent)
        && sent != length
    {
        let why = "the length of the answer is not that of the range that it names";
        return Err(failed(HttpErrorKind::Decode, why));
    }
    match sent {
        // In chunks, or until the connection ends.
        Some(length) if !reply.headers.contains_key(CONTENT_LENGTH) => {
            set(&mut reply.headers, CONTENT_LENGTH, &length.to_string());
        }
        Some(_) => {}
        // The client would count beyond the largest number.
        None => drop(reply.headers.remove(CONTENT_RANGE)),
    }
    Ok(())
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

fn bounds(text: &str) -> Option<Bounds> {
    let (first, last) = text.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn length_of_a_range_is_known_if_both_ends_are() {
        let length_of = |range: &str| {
            let mut headers = HeaderMap::new();
            set(&mut headers, RANGE, range);
            asked(&headers).and_then(length)
        };
        assert_eq!(length_of("bytes=0-4095"), Some(4096));
        assert_eq!(length_of("bytes=5-5"), Some(1));
        for unknown in ["bytes=5-", "bytes=-5", "bytes=5-4", "bytes=0-18446744073709551615"] {
            assert_eq!(length_of(unknown), None, "{unknown}");
        }
    }

    fn completed(status: u16, lines: &[(&'static str, &str)], length: Option<u64>) -> Parts {
        let (mut parts, ()) = hyper::Response::new(()).into_parts();
        parts.status = StatusCode::from_u16(status).unwrap();
        for (name, value) in lines {
            set(&mut parts.headers, HeaderName::from_static(name), value);
        }
        complete(&mut parts, length, Some((0, 9))).unwrap();
        parts
    }

    #[test]
    fn whole_object_is_the_range_that_was_asked_for_if_it_is_not_longer() {
        let parts = completed(200, &[("content-length", "10")], Some(10));
        assert_eq!(
            (parts.status.as_u16(), &parts.headers[CONTENT_RANGE]),
            (206, &"bytes 0-9/10".parse().unwrap())
        );
        assert_eq!(completed(200, &[], Some(3)).headers[CONTENT_RANGE], "bytes 0-2/3");
        assert_eq!(completed(200, &[], Some(11)).status, 200);
        assert_eq!(completed(200, &[], Some(0)).status, 200);
        assert_eq!(completed(200, &[], None).status, 200);
    }

    #[test]
    fn length_follows_from_the_range_and_impossible_ones_are_dropped() {
        let parts = completed(206, &[("content-range", "bytes 0-9/100")], None);
        assert_eq!(parts.headers[CONTENT_LENGTH], "10");
        for range in ["bytes 0-18446744073709551615/9", "bytes 9-0/100", "bytes */100", "0-9/100"] {
            let parts = completed(206, &[("content-range", range)], None);
            assert!(!parts.headers.contains_key(CONTENT_RANGE), "{range}");
        }
        let date = |text| completed(206, &[("last-modified", text)], None).headers;
        assert!(date("Fri, 27 Nov 2026 10:00:00 GMT").contains_key(LAST_MODIFIED));
        assert!(!date("Friday, 27-Nov-26 10:00:00 GMT").contains_key(LAST_MODIFIED));
    }
}
