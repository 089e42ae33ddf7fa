//! One request over HTTP.

use std::io::{self, Read, Write};

/// Longest reply, in bytes: enough for the numbers of very many exports and clients.
const MAX_REPLY_LEN: u64 = 64 << 20;

/// Sends a GET request and returns the body of the reply. HTTP/1.0, so that the body ends with the
/// connection.
pub(super) fn get(mut stream: impl Read + Write, path: &str, host: &str) -> io::Result<Vec<u8>> {
    let request = format!("GET {path} HTTP/1.0\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut reply = Vec::new();
    stream.take(MAX_REPLY_LEN).read_to_end(&mut reply)?;
    body(&reply)
}

fn body(reply: &[u8]) -> io::Result<Vec<u8>> {
    const END: &[u8] = b"\r\n\r\n";
    let not_http = || io::Error::other("its answer is not one of HTTP");
    let end = reply.windows(END.len()).position(|part| part == END).ok_or_else(not_http)?;
    let head = std::str::from_utf8(&reply[..end]).map_err(|_| not_http())?;
    let (status, headers) = head.split_once("\r\n").unwrap_or((head, ""));
    let mut words = status.split(' ');
    let is_http = words.next().is_some_and(|version| version.starts_with("HTTP/1."));
    // A number: other text of the server could control the terminal that shows the error.
    let status = words.next().filter(|_| is_http).and_then(|status| status.parse::<u16>().ok());
    let status = status.ok_or_else(not_http)?;
    if status != 200 {
        return Err(io::Error::other(format!("it refuses the request (HTTP status {status})")));
    }
    let body = &reply[end + END.len()..];
    let length = headers.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    if length.is_some_and(|length| length != body.len()) {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "its answer is incomplete"));
    }
    Ok(body.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_complete_answer_has_a_body() {
        let good = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX: y\r\n\r\nok";
        assert_eq!(body(good).expect("a body"), b"ok");
        assert_eq!(body(b"HTTP/1.0 200 OK\r\n\r\n").expect("a body"), b"");
        for length in 0..good.len() {
            assert!(body(&good[..length]).is_err(), "{length}");
        }
        for reply in [
            "HTTP/1.1 404 Not Found\r\n\r\n",
            "NBDMAGIC\r\n\r\n",
            "HTTP/1.1\r\n\r\n",
            "\u{ff}\r\n\r\n",
        ] {
            assert!(body(reply.as_bytes()).is_err(), "{reply}");
        }
    }

    #[test]
    fn an_error_has_no_text_of_the_server() {
        for status in ["\u{1b}]52;c;AAAA\u{7}", "404\u{1b}[2J", "99999", ""] {
            let error =
                body(format!("HTTP/1.0 {status}\r\n\r\n").as_bytes()).expect_err("no number");
            assert_eq!(error.to_string(), "its answer is not one of HTTP");
        }
        let error = body(b"HTTP/1.0 404 \x1b[2J\r\n\r\n").expect_err("a refusal");
        assert_eq!(error.to_string(), "it refuses the request (HTTP status 404)");
    }
}
