//! Servers and caches that answer as few do: as HTTP allows it, or as it does not.
#![allow(clippy::unwrap_used)] // A test may fail.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use imgfmt::{HostOffset, Storage as _};
use nbd_objects::testing::{Fault, TestStore};
use nbd_objects::{
    BLOCK_LEN, CacheSettings, Environment, ObjectCache, ObjectStorage, Reads, StoreSettings,
    StoreUrl, Timeouts,
};

const ETAG: &str = "etag: \"65f1-40000\"\r\n";

/// Bytes that differ in each block.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index / 7 + index / BLOCK_LEN * 31) as u8).collect()
}

/// A request.
struct Asked {
    /// The number of the request, from 0.
    number: usize,
    /// The bytes that it asks for.
    first: usize,
    last: usize,
    /// These bytes of the object.
    data: Vec<u8>,
    /// The length of the object.
    size: usize,
}

impl Asked {
    /// The header that says which bytes a reply has.
    fn range(&self) -> String {
        format!("content-range: bytes {}-{}/{}\r\n", self.first, self.last, self.size)
    }

    /// A reply of these lines and the data. Without an end of its own, `head` gets the usual lines.
    fn reply(&self, status: &str, lines: &str) -> Vec<u8> {
        let head = format!("{status}\r\n{}{ETAG}{lines}\r\n", self.range());
        [head.as_bytes(), &self.data].concat()
    }

    fn length(&self) -> String {
        format!("content-length: {}\r\n", self.data.len())
    }
}

const PARTIAL: &str = "HTTP/1.1 206 Partial Content";

#[derive(Clone, Copy, PartialEq, Eq)]
enum After {
    Close,
    Keep,
}

/// A server on loopback; it ends with the process.
struct Server {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    requests: Arc<AtomicUsize>,
}

type Answer = dyn Fn(&Asked) -> (Vec<u8>, After) + Send + Sync;

impl Server {
    /// Serves an object of this length.
    fn start(
        size: usize,
        answer: impl Fn(&Asked) -> (Vec<u8>, After) + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (connections, requests) = (Arc::default(), Arc::default());
        let server = Self { address, connections, requests };
        let (connections, requests) =
            (Arc::clone(&server.connections), Arc::clone(&server.requests));
        let answer: Arc<Answer> = Arc::new(answer);
        let object = Arc::new(pattern(size));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                connections.fetch_add(1, Ordering::SeqCst);
                let (answer, requests) = (Arc::clone(&answer), Arc::clone(&requests));
                let object = Arc::clone(&object);
                std::thread::spawn(move || {
                    answer_all(stream.unwrap(), &object, &*answer, &requests);
                });
            }
        });
        server
    }
}

fn answer_all(stream: TcpStream, object: &[u8], answer: &Answer, requests: &AtomicUsize) {
    let size = object.len();
    stream.set_nodelay(true).unwrap();
    let mut stream = BufReader::new(stream);
    loop {
        let mut range = None;
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            if stream.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            if let Some(text) = line.strip_prefix("range: bytes=") {
                let (first, last) = text.trim().split_once('-').unwrap();
                range = Some((first.parse::<usize>().unwrap(), last.parse::<usize>().unwrap()));
            }
        }
        let (first, last) = range.expect("only ranges are asked for");
        let last = last.min(size - 1);
        let data = object[first..=last].to_vec();
        let number = requests.fetch_add(1, Ordering::SeqCst);
        let (reply, after) = answer(&Asked { number, first, last, data, size });
        // The client may have seen enough.
        if stream.get_mut().write_all(&reply).is_err() || after == After::Close {
            return;
        }
    }
}

fn settings() -> StoreSettings {
    StoreSettings {
        timeouts: Timeouts {
            connect: Duration::from_secs(20),
            idle: Duration::from_secs(20),
            request: Duration::from_secs(20),
            total: Duration::from_millis(300),
        },
        ..StoreSettings::default()
    }
}

fn cache() -> ObjectCache {
    let settings = CacheSettings { reads: Reads::Once, ..CacheSettings::default() };
    ObjectCache::open(&settings).unwrap()
}

fn open(server: &Server) -> Result<ObjectStorage, String> {
    let url: StoreUrl = format!("http://{}/disk.img", server.address).parse().unwrap();
    ObjectStorage::open(&url, &settings(), &cache(), Arc::new(|| false))
        .map_err(|error| error.to_string())
}

/// Reads the object in order; an error is what is shown.
fn read(server: &Server, size: usize) -> Result<(), String> {
    let storage = open(server)?;
    assert_eq!(storage.len().unwrap(), size as u64);
    let expected = pattern(size);
    for offset in (0..size).step_by(100_000) {
        let mut buffer = vec![0; 100_000.min(size - offset)];
        let read = storage.read_at(HostOffset::new(offset as u64), &mut buffer);
        assert_eq!(read.map_err(|error| error.to_string())?, buffer.len());
        assert!(buffer == expected[offset..offset + buffer.len()], "other bytes at {offset}");
    }
    Ok(())
}

/// A body in chunks of these lengths in turn.
fn chunked(data: &[u8], lengths: &[usize], extension: &str, trailer: &str) -> Vec<u8> {
    let (mut body, mut left) = (Vec::new(), data);
    for length in lengths.iter().cycle() {
        let (chunk, rest) = left.split_at(left.len().min(*length));
        left = rest;
        if chunk.is_empty() {
            break;
        }
        body.extend_from_slice(format!("{:X}{extension}\r\n", chunk.len()).as_bytes());
        body.extend_from_slice(chunk);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(format!("0\r\n{trailer}\r\n").as_bytes());
    body
}

#[test]
fn body_is_read_in_each_form_that_http_has() {
    let in_chunks = |lengths: &'static [usize], extension: &'static str, trailer: &'static str| {
        move |asked: &Asked| {
            let head =
                format!("{PARTIAL}\r\n{}{ETAG}transfer-encoding: chunked\r\n\r\n", asked.range());
            (
                [head.as_bytes(), &chunked(&asked.data, lengths, extension, trailer)].concat(),
                After::Keep,
            )
        }
    };
    let forms: Vec<(&str, Box<Answer>)> = vec![
        ("as usual", Box::new(|it| (it.reply(PARTIAL, &it.length()), After::Keep))),
        (
            "HTTP/1.0 with a length",
            Box::new(|it| (it.reply("HTTP/1.0 206 Partial Content", &it.length()), After::Close)),
        ),
        (
            "HTTP/1.0 until the end of the connection",
            Box::new(|it| (it.reply("HTTP/1.0 206 Partial Content", ""), After::Close)),
        ),
        (
            "HTTP/1.0 with a connection that is kept",
            Box::new(|it| {
                let lines = it.length() + "connection: Keep-Alive\r\n";
                (it.reply("HTTP/1.0 206 Partial Content", &lines), After::Keep)
            }),
        ),
        (
            "connection: close after each reply",
            Box::new(|it| {
                (it.reply(PARTIAL, &(it.length() + "connection: close\r\n")), After::Close)
            }),
        ),
        (
            "the end of the connection after each reply, without a word",
            Box::new(|it| (it.reply(PARTIAL, &it.length()), After::Close)),
        ),
        ("until the end of the connection", Box::new(|it| (it.reply(PARTIAL, ""), After::Close))),
        ("chunks", Box::new(in_chunks(&[1000, 70_000, 7], "", ""))),
        ("one chunk", Box::new(in_chunks(&[1 << 30], "", ""))),
        (
            "chunks with extensions and trailers",
            Box::new(in_chunks(&[65_536], ";name=value", "x-sum: 1\r\nx-more: 2\r\n")),
        ),
        (
            "interim replies",
            Box::new(|it| {
                let interim =
                    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n";
                ([&interim[..], &it.reply(PARTIAL, &it.length())].concat(), After::Keep)
            }),
        ),
        (
            "lines that end with LF only",
            Box::new(|it| {
                let head =
                    format!("{PARTIAL}\n{}{ETAG}{}\n", it.range(), it.length()).replace('\r', "");
                ([head.as_bytes(), &it.data].concat(), After::Keep)
            }),
        ),
        (
            "upper case, and the length twice",
            Box::new(|it| {
                let head = format!("{PARTIAL}\r\n{}", (it.range() + &it.length()).to_uppercase());
                let head = head.replace(": BYTES", ": bytes");
                let head = format!("{head}ETAG: \"x\"\r\n{}\r\n", it.length());
                ([head.as_bytes(), &it.data].concat(), After::Keep)
            }),
        ),
        (
            "a date in another form",
            Box::new(|it| {
                let lines = it.length() + "last-modified: Friday, 27-Nov-26 10:00:00 GMT\r\n";
                (it.reply(PARTIAL, &lines), After::Keep)
            }),
        ),
        (
            "an encoding that is none",
            Box::new(|it| {
                let encoding = if it.number % 2 == 0 { "identity" } else { "aws-chunked" };
                let lines = format!("{}content-encoding: {encoding}\r\n", it.length());
                (it.reply(PARTIAL, &lines), After::Keep)
            }),
        ),
    ];
    let size = 9 * BLOCK_LEN + 4321;
    for (form, answer) in forms {
        let server = Server::start(size, answer);
        assert_eq!(read(&server, size), Ok(()), "{form}");
    }
}

#[test]
fn connections_that_are_kept_are_used_again() {
    let size = 5 * BLOCK_LEN;
    let server = Server::start(size, |it| (it.reply(PARTIAL, &it.length()), After::Keep));
    let storage = open(&server).unwrap();
    for block in [4, 2, 3] {
        storage.read_at(HostOffset::new((block * BLOCK_LEN) as u64), &mut [0; 512]).unwrap();
    }
    assert_eq!(server.requests.load(Ordering::SeqCst), 4);
    assert_eq!(server.connections.load(Ordering::SeqCst), 1);
}

fn refused(answer: impl Fn(&Asked) -> (Vec<u8>, After) + Send + Sync + 'static) -> String {
    let size = 4 * BLOCK_LEN;
    let server = Server::start(size, answer);
    read(&server, size).expect_err("it is refused")
}

/// A reply with these lines instead of the usual ones.
fn with(asked: &Asked, status: &str, lines: &str) -> (Vec<u8>, After) {
    let head = format!("{status}\r\n{lines}{}\r\n", asked.length());
    ([head.as_bytes(), &asked.data].concat(), After::Keep)
}

#[test]
fn server_that_does_not_say_which_contents_it_sends_is_refused() {
    let cases: Vec<(&str, Box<Answer>)> = vec![
        (
            "gives a weak ETag",
            Box::new(|it| with(it, PARTIAL, &format!("{}etag: W/\"1\"\r\n", it.range()))),
        ),
        (
            "gives no ETag",
            Box::new(|it| {
                let date = "last-modified: Fri, 27 Nov 2026 10:00:00 GMT\r\n";
                with(it, PARTIAL, &(it.range() + date))
            }),
        ),
        (
            "another range",
            Box::new(|it| {
                let (first, last) = (it.first + 1, it.last + 1);
                with(
                    it,
                    PARTIAL,
                    &format!("content-range: bytes {first}-{last}/{}\r\n{ETAG}", it.size),
                )
            }),
        ),
        // A cache that answers in pieces of its own.
        (
            "another range",
            Box::new(|it| {
                let data = it.data[..65_536].to_vec();
                let piece = Asked { data, last: it.first + 65_535, ..*it };
                with(&piece, PARTIAL, &format!("{}{ETAG}", piece.range()))
            }),
        ),
        ("does not say which range", Box::new(|it| with(it, PARTIAL, ETAG))),
        (
            "does not say which range",
            Box::new(|it| {
                let lines = "content-type: multipart/byteranges; boundary=x\r\n";
                with(it, PARTIAL, &format!("{lines}{ETAG}"))
            }),
        ),
        (
            "does not say which range",
            Box::new(|it| {
                with(it, PARTIAL, &format!("content-range: bytes 0-{}/9\r\n{ETAG}", u64::MAX))
            }),
        ),
        (
            "does not say how long",
            Box::new(|it| {
                with(
                    it,
                    PARTIAL,
                    &format!("content-range: bytes {}-{}/*\r\n{ETAG}", it.first, it.last),
                )
            }),
        ),
        (
            "ignores ranges",
            Box::new(|it| {
                let head = format!("HTTP/1.1 200 OK\r\n{ETAG}content-length: {}\r\n\r\n", it.size);
                ([head.as_bytes(), &pattern(it.size)].concat(), After::Keep)
            }),
        ),
        (
            "compressed (Content-Encoding: gzip)",
            Box::new(|it| {
                with(it, PARTIAL, &format!("{}{ETAG}content-encoding: gzip\r\n", it.range()))
            }),
        ),
    ];
    for (expected, answer) in cases {
        let error = refused(answer);
        assert!(error.contains(expected), "'{expected}' is not in: {error}");
    }
}

#[test]
fn answer_that_is_malformed_or_of_another_length_is_refused() {
    let coded = |coding: &'static str, body: Vec<u8>| {
        move |it: &Asked| {
            let head =
                format!("{PARTIAL}\r\n{}{ETAG}transfer-encoding: {coding}\r\n\r\n", it.range());
            ([head.as_bytes(), &body].concat(), After::Close)
        }
    };
    let endless = vec![b'x'; 1 << 20];
    let cases: Vec<(&str, Box<Answer>)> = vec![
        (
            "not that of the range",
            Box::new(|it| {
                let lines = format!("content-length: {}\r\n", it.data.len() - 1);
                (it.reply(PARTIAL, &lines), After::Close)
            }),
        ),
        (
            "not that of the range",
            Box::new(|it| {
                let lines = format!("content-length: {}\r\n", it.data.len() + 1);
                ([it.reply(PARTIAL, &lines), b"x".to_vec()].concat(), After::Close)
            }),
        ),
        (
            "not of HTTP",
            Box::new(|it| {
                (it.reply(PARTIAL, "content-length: 5\r\ncontent-length: 6\r\n"), After::Close)
            }),
        ),
        (
            "the connection to the store broke",
            Box::new(|it| {
                let mut reply = it.reply(PARTIAL, &it.length());
                reply.truncate(reply.len() - 1);
                (reply, After::Close)
            }),
        ),
        ("not of HTTP", Box::new(|_| (b"SSH-2.0-OpenSSH_9.2\r\n".to_vec(), After::Close))),
        (
            "101 Switching Protocols",
            Box::new(|_| (b"HTTP/1.1 101 Switching Protocols\r\n\r\n".to_vec(), After::Keep)),
        ),
        (
            "not of HTTP",
            Box::new({
                let head = [PARTIAL.as_bytes(), b"\r\nname: ", &endless].concat();
                move |_| (head.clone(), After::Keep)
            }),
        ),
        ("connection to the store broke", Box::new(coded("gzip, chunked", Vec::new()))),
        ("connection to the store broke", Box::new(coded("chunked", b"no size\r\n".to_vec()))),
        ("connection to the store broke", Box::new(coded("chunked", b"2\r\nabc\r\n".to_vec()))),
        ("connection to the store broke", Box::new(coded("chunked", endless.clone()))),
        ("connection to the store broke", Box::new(coded("chunked", b"5\r\nab".to_vec()))),
    ];
    for (expected, answer) in cases {
        let error = refused(answer);
        assert!(error.contains(expected), "'{expected}' is not in: {error}");
    }
}

/// Bytes behind a reply may be one that an attacker wrote into the object before it.
#[test]
fn bytes_behind_a_reply_are_not_the_next_one() {
    let size = 2 * BLOCK_LEN + 1000;
    let server = Server::start(size, move |it| {
        let mut reply = it.reply(PARTIAL, &it.length());
        if it.first == 2 * BLOCK_LEN {
            let (first, last) = (BLOCK_LEN, 2 * BLOCK_LEN - 1);
            let forged = Asked { number: 0, first, last, data: vec![0xee; BLOCK_LEN], size };
            reply.extend(forged.reply(PARTIAL, &forged.length()));
        }
        (reply, After::Keep)
    });
    let storage = open(&server).unwrap();
    let mut buffer = [0; 512];
    for block in [2, 1] {
        let offset = block * BLOCK_LEN;
        storage.read_at(HostOffset::new(offset as u64), &mut buffer).unwrap();
        assert_eq!(buffer[..], pattern(size)[offset..offset + 512]);
    }
    assert_eq!(server.connections.load(Ordering::SeqCst), 2);
}

#[test]
fn whole_object_is_taken_for_the_range_if_it_is_not_longer() {
    let whole = |it: &Asked| {
        let head = format!("HTTP/1.1 200 OK\r\n{ETAG}content-length: {}\r\n\r\n", it.size);
        ([head.as_bytes(), &pattern(it.size)].concat(), After::Keep)
    };
    for size in [1, 1000, BLOCK_LEN] {
        assert_eq!(read(&Server::start(size, whole), size), Ok(()), "{size}");
    }
}

#[test]
fn interim_replies_without_an_end_are_not_waited_for() {
    let server = Server::start(1000, |_| {
        let interim = b"HTTP/1.1 100 Continue\r\n\r\n";
        (interim.repeat(100), After::Keep)
    });
    let url: StoreUrl = format!("http://{}/disk.img", server.address).parse().unwrap();
    let mut settings = settings();
    settings.timeouts.request = Duration::from_millis(200);
    let error = ObjectStorage::open(&url, &settings, &cache(), Arc::new(|| false)).unwrap_err();
    assert!(error.to_string().contains("within 0.2 s"), "{error}");
}

#[test]
fn redirect_of_a_store_is_not_followed_with_its_signature() {
    let other = TestStore::start().unwrap();
    let redirect = format!(
        "HTTP/1.1 307 Temporary Redirect\r\nlocation: {}/bucket/disk.img\r\ncontent-length: 0\r\n\r\n",
        other.endpoint()
    );
    let server = Server::start(1000, move |_| (redirect.clone().into_bytes(), After::Keep));
    let keys = [("AWS_ACCESS_KEY_ID", "AKIAKEY"), ("AWS_SECRET_ACCESS_KEY", "s3cr3t")];
    let keys = keys.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let settings = StoreSettings {
        endpoint: Some(format!("http://{}", server.address)),
        environment: Environment::new(keys),
        ..settings()
    };
    let url: StoreUrl = "s3://bucket/disk.img".parse().unwrap();
    let error = ObjectStorage::open(&url, &settings, &cache(), Arc::new(|| false)).unwrap_err();
    let expected = "307 Temporary Redirect; it has the bucket elsewhere: check the region";
    assert!(error.to_string().contains(expected), "{error}");
    assert_eq!(other.connections(), 0);
}

#[test]
fn another_server_that_a_redirect_names_gets_the_range_and_nothing_else() {
    let size = 3 * BLOCK_LEN;
    let other = TestStore::start().unwrap();
    other.put("/bucket/disk.img", pattern(size));
    other.fail(|_| Fault::None);
    let redirect = format!(
        "HTTP/1.1 307 Temporary Redirect\r\nlocation: {}/bucket/disk.img\r\ncontent-length: 0\r\n\r\n",
        other.endpoint()
    );
    let server = Server::start(size, move |_| (redirect.clone().into_bytes(), After::Keep));
    let url: StoreUrl = format!("http://{}/x?signature=f00d", server.address).parse().unwrap();
    let storage = ObjectStorage::open(&url, &settings(), &cache(), Arc::new(|| false)).unwrap();
    let mut buffer = vec![0; size];
    storage.read_at(HostOffset::new(0), &mut buffer).unwrap();
    assert!(buffer == pattern(size));
    let seen = other.take_seen();
    assert!(!seen.is_empty());
    assert!(seen.iter().all(|it| it.query.is_empty() && !it.is_signed && it.range.is_some()));
}

/// A few bytes do not wake the reader while more have to come, but they are not nothing.
#[test]
fn bytes_that_come_slowly_are_not_taken_for_silence() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let size = 8000;
    let server = std::thread::spawn(move || {
        let mut stream = BufReader::new(listener.accept().unwrap().0);
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            assert!(stream.read_line(&mut line).unwrap() > 0);
        }
        let data = pattern(size);
        let asked = Asked { number: 0, first: 0, last: size - 1, data, size };
        let reply = asked.reply(PARTIAL, &asked.length());
        let (head, body) = reply.split_at(reply.len() - size);
        stream.get_mut().write_all(head).unwrap();
        for part in body.chunks(size / 8) {
            std::thread::sleep(Duration::from_millis(400));
            stream.get_mut().write_all(part).unwrap();
        }
    });
    let url: StoreUrl = format!("http://{address}/disk.img").parse().unwrap();
    let mut settings = settings();
    settings.timeouts.idle = Duration::from_secs(2);
    let storage = ObjectStorage::open(&url, &settings, &cache(), Arc::new(|| false)).unwrap();
    let mut buffer = vec![0; size];
    storage.read_at(HostOffset::new(0), &mut buffer).unwrap();
    assert!(buffer == pattern(size));
    server.join().unwrap();
}
