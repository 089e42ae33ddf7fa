//! Requests to a status page.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// A reply: its status and its body.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) body: String,
}

/// Sends `text` and returns all that comes back, as text.
pub(crate) fn exchange(socket: &Path, text: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).expect("it listens");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a socket");
    // The server may refuse to read all of it.
    let _ = stream.write_all(text);
    let mut reply = Vec::new();
    let _ = stream.read_to_end(&mut reply);
    String::from_utf8(reply).expect("text")
}

/// GET with the name of the host.
pub(crate) fn get_from(socket: &Path, path: &str, host: &str) -> Reply {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    let reply = exchange(socket, request.as_bytes());
    let (head, body) = reply.split_once("\r\n\r\n").expect("a head and a body");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.expect("a status");
    Reply { status, body: body.to_owned() }
}

/// The body of a page that must be there.
pub(crate) fn get(socket: &Path, path: &str) -> String {
    let reply = get_from(socket, path, "localhost");
    assert_eq!(reply.status, 200, "{path}: {reply:?}");
    reply.body
}
