//! The heads of requests and replies (RFC 9112).

use std::io::Write as _;

use hyper::header::{
    CONNECTION, CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue, TRANSFER_ENCODING,
};
use hyper::http::response::Parts;
use hyper::{Method, StatusCode, Version};
use object_store::client::{HttpError, HttpErrorKind, HttpRequest};

use super::failure::failed;

/// Most lines of a head.
const LINES_MAX: usize = 100;

/// Where the body of a reply ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    /// After so many bytes.
    Length(u64),
    /// After the last chunk.
    Chunked,
    /// With the connection.
    Close,
}

/// The head of a reply.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) parts: Parts,
    pub(super) framing: Framing,
    /// Whether the connection can be used again.
    pub(super) is_kept: bool,
}

/// Returns the head of a request, as it is sent.
pub(super) fn of_request(request: &HttpRequest) -> Vec<u8> {
    let mut head = Vec::with_capacity(1024);
    // Writing to memory does not fail.
    let _ = write!(head, "{} {} HTTP/1.1\r\n", request.method(), request.uri());
    for (name, value) in request.headers() {
        head.extend_from_slice(name.as_str().as_bytes());
        head.extend_from_slice(b": ");
        head.extend_from_slice(value.as_bytes());
        head.extend_from_slice(b"\r\n");
    }
    let length = request.body().content_length();
    let has_body = length > 0 || [Method::PUT, Method::POST].contains(request.method());
    if has_body && !request.headers().contains_key(CONTENT_LENGTH) {
        let _ = write!(head, "{CONTENT_LENGTH}: {length}\r\n");
    }
    head.extend_from_slice(b"\r\n");
    head
}

/// Reads the head at the start of `bytes`, and returns its length as well; nothing if it is not
/// complete. `is_bare` says that the reply has no body, whatever its head says.
pub(super) fn of_reply(bytes: &[u8], is_bare: bool) -> Result<Option<(Head, usize)>, HttpError> {
    let mut headers = [httparse::EMPTY_HEADER; LINES_MAX];
    let mut reply = httparse::Response::new(&mut headers);
    let length = match reply.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err(not_http()),
    };
    let (mut parts, ()) = hyper::Response::new(()).into_parts();
    parts.status =
        reply.code.and_then(|code| StatusCode::from_u16(code).ok()).ok_or_else(not_http)?;
    parts.version = if reply.version == Some(0) { Version::HTTP_10 } else { Version::HTTP_11 };
    for header in reply.headers.iter() {
        let name = HeaderName::from_bytes(header.name.as_bytes()).map_err(|_| not_http())?;
        let value = HeaderValue::from_bytes(header.value).map_err(|_| not_http())?;
        parts.headers.append(name, value);
    }
    let framing = match is_bare || is_bodiless(parts.status) {
        true => Framing::Length(0),
        false => framing(&parts)?,
    };
    let has_option = |option| has_element(&parts.headers, &CONNECTION, option);
    let is_kept = match parts.version {
        Version::HTTP_10 => has_option("keep-alive"),
        _ => !has_option("close"),
    };
    // Both may be an attack on the next reply (section 6.3).
    let has_both = framing == Framing::Chunked && parts.headers.contains_key(CONTENT_LENGTH);
    let is_kept = is_kept && !has_both && framing != Framing::Close;
    Ok(Some((Head { parts, framing, is_kept }, length)))
}

pub(super) fn not_http() -> HttpError {
    failed(HttpErrorKind::Decode, "the answer is not of HTTP")
}

fn is_bodiless(status: StatusCode) -> bool {
    status.is_informational() || [204, 304].contains(&status.as_u16())
}

/// Where a body ends (section 6.3).
fn framing(parts: &Parts) -> Result<Framing, HttpError> {
    let codings: Vec<_> = elements(&parts.headers, &TRANSFER_ENCODING).collect();
    if !codings.is_empty() {
        let is_known = matches!(&codings[..], [one] if one.eq_ignore_ascii_case("chunked"));
        return match is_known && parts.version == Version::HTTP_11 {
            true => Ok(Framing::Chunked),
            false => Err(failed(
                HttpErrorKind::Decode,
                "the answer has a transfer coding that nobody asked for",
            )),
        };
    }
    if parts.headers.contains_key(TRANSFER_ENCODING) {
        return Err(not_http());
    }
    if !parts.headers.contains_key(CONTENT_LENGTH) {
        return Ok(Framing::Close);
    }
    let mut lengths = elements(&parts.headers, &CONTENT_LENGTH);
    let first = lengths.next().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    // Some say it twice.
    let is_one = lengths.all(|next| Some(next) == first);
    let length = first.and_then(|text| text.parse().ok()).filter(|_| is_one);
    length.map(Framing::Length).ok_or_else(not_http)
}

/// The elements of a list in headers of one name.
fn elements<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let values = headers.get_all(name).into_iter().map(|value| value.to_str().unwrap_or("?"));
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|element| !element.is_empty())
}

fn has_element(headers: &HeaderMap, name: &HeaderName, wanted: &str) -> bool {
    elements(headers, name).any(|element| element.eq_ignore_ascii_case(wanted))
}

#[cfg(test)]
mod tests {
    use object_store::client::HttpRequestBody;

    use super::*;

    fn parse(head: &str) -> Result<(Framing, bool), String> {
        let (head, length) = of_reply(head.as_bytes(), false)
            .map_err(|error| error.to_string())?
            .ok_or("not complete")?;
        assert!(length > 0);
        Ok((head.framing, head.is_kept))
    }

    #[test]
    fn end_of_a_body_follows_from_the_head() {
        for (lines, expected) in [
            ("HTTP/1.1 206 Partial Content\r\nContent-Length: 5", (Framing::Length(5), true)),
            ("HTTP/1.1 200\r\ncontent-length: 5, 5", (Framing::Length(5), true)),
            (
                "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 5",
                (Framing::Length(5), true),
            ),
            (
                "HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: a, Close",
                (Framing::Length(5), false),
            ),
            ("HTTP/1.0 200 OK\r\ncontent-length: 5", (Framing::Length(5), false)),
            (
                "HTTP/1.0 200 OK\r\ncontent-length: 5\r\nconnection: keep-alive",
                (Framing::Length(5), true),
            ),
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked", (Framing::Chunked, true)),
            (
                "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked",
                (Framing::Chunked, false),
            ),
            ("HTTP/1.1 200 OK\r\nserver: x", (Framing::Close, false)),
            ("HTTP/1.1 204 No Content\r\ncontent-length: 5", (Framing::Length(0), true)),
            ("HTTP/1.1 304 Not Modified\r\nserver: x", (Framing::Length(0), true)),
        ] {
            assert_eq!(parse(&format!("{lines}\r\n\r\n")), Ok(expected), "{lines}");
        }
        let (head, _) =
            of_reply(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", true).unwrap().unwrap();
        assert_eq!(head.framing, Framing::Length(0), "the reply to HEAD");
    }

    #[test]
    fn heads_that_can_be_read_in_two_ways_are_refused() {
        for lines in [
            "HTTP/1.1 200 OK\r\ncontent-length: 5, 6",
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6",
            "HTTP/1.1 200 OK\r\ncontent-length: +5",
            "HTTP/1.1 200 OK\r\ncontent-length: -5",
            "HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999",
            "HTTP/1.1 200 OK\r\ncontent-length: ",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: ",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked, chunked",
            "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked",
            "HTTP/2 200 OK",
            "HTTP/1.1 99999 OK",
            "ICY 200 OK",
            "HTTP/1.1 200 OK\r\nname : value",
            "HTTP/1.1 200 OK\r\nname: a\r\n folded",
        ] {
            assert!(parse(&format!("{lines}\r\n\r\n")).is_err(), "{lines}");
        }
        assert!(of_reply(b"HTTP/1.1 200 OK\r\ncontent-len", false).unwrap().is_none());
    }

    #[test]
    fn request_with_a_body_says_how_long_it_is() {
        let head = |method: Method, body: &'static str| {
            let body = HttpRequestBody::from(body.to_owned());
            let mut request = HttpRequest::new(body);
            (*request.method_mut(), *request.uri_mut()) = (method, "/a?b".parse().unwrap());
            request.headers_mut().insert("host", HeaderValue::from_static("h"));
            String::from_utf8(of_request(&request)).unwrap()
        };
        assert_eq!(head(Method::GET, ""), "GET /a?b HTTP/1.1\r\nhost: h\r\n\r\n");
        let put = "PUT /a?b HTTP/1.1\r\nhost: h\r\ncontent-length: 3\r\n\r\n";
        assert_eq!(head(Method::PUT, "abc"), put);
        assert!(head(Method::POST, "").contains("content-length: 0\r\n"));
    }
}
