//! The connections of the store, and what becomes of the requests on them.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use openssl::ssl::{Ssl, SslAcceptor};
use tokio::net::TcpListener;
use tokio_openssl::SslStream;

use super::held::Held;
use super::objects::{Answer, Objects, Parsed};

/// What happens to a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// It is answered.
    #[default]
    None,
    /// It is refused with this status, and has no effect.
    Status(u16),
    /// It has no effect, and the connection breaks.
    Dropped,
    /// It has its effect, and the connection breaks before the reply.
    ReplyLost,
    /// It has no effect, and the reply is a page for people that says that all is well.
    Nonsense,
    /// It has its effect, and nothing answers.
    Hang,
    /// The reply has this many bytes of its body, then the connection breaks.
    Cut(usize),
    /// The reply has this many bytes of its body, then nothing happens.
    Stall(usize),
    /// The range is ignored.
    WholeObject,
    /// The reply has another range than the one that was asked for.
    WrongRange,
    /// The reply has no ETag.
    NoTag,
    /// The conditions `If-Match` and `If-None-Match` are ignored.
    NoCondition,
    /// Requests with a condition are refused with this status, as not implemented; all others are
    /// answered.
    RefusesConditions(u16),
    /// The reply comes after this many milliseconds.
    Late(u64),
    /// The reply comes when [`TestStore::release`] is called.
    Held,
}

/// A request that the store has seen.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The number of the request, from 0.
    pub number: usize,
    /// `GET`, for example.
    pub method: String,
    /// `/bucket/key`.
    pub key: String,
    /// The query, unparsed.
    pub query: String,
    /// The header `Range`.
    pub range: Option<String>,
    /// The length of its body, in bytes.
    pub length: usize,
    /// Whether it was signed.
    pub is_signed: bool,
}

pub(super) type Faults = Box<dyn FnMut(&Seen) -> Fault + Send>;

/// What the store and its thread have in common.
pub(super) struct Shared {
    pub(super) objects: Mutex<Objects>,
    pub(super) seen: Mutex<Vec<Seen>>,
    pub(super) connections: AtomicUsize,
    pub(super) faults: Mutex<Faults>,
    pub(super) held: Held,
}

pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Answers requests on all connections.
pub(super) async fn accept(
    listener: std::net::TcpListener,
    tls: Option<SslAcceptor>,
    shared: Arc<Shared>,
) {
    let Ok(listener) = TcpListener::from_std(listener) else { return };
    while let Ok((stream, _)) = listener.accept().await {
        shared.connections.fetch_add(1, Ordering::SeqCst);
        let (shared, tls) = (Arc::clone(&shared), tls.clone());
        tokio::spawn(async move {
            let _ = stream.set_nodelay(true);
            let service = service_fn(move |request| serve(Arc::clone(&shared), request));
            let http = http1::Builder::new();
            let Some(tls) = tls else {
                let _ = http.serve_connection(TokioIo::new(stream), service).await;
                return;
            };
            let Ok(ssl) = Ssl::new(tls.context()) else { return };
            let Ok(mut stream) = SslStream::new(ssl, stream) else { return };
            if Pin::new(&mut stream).accept().await.is_ok() {
                let _ = http.serve_connection(TokioIo::new(stream), service).await;
            }
        });
    }
}

/// Answers a request. An error breaks the connection.
async fn serve(
    shared: Arc<Shared>,
    request: Request<Incoming>,
) -> Result<Response<Broken>, std::io::Error> {
    let (head, body) = request.into_parts();
    let header = |name: &str| head.headers.get(name)?.to_str().ok().map(str::to_owned);
    let query = head.uri.query().unwrap_or_default().to_owned();
    let body = body.collect().await.map_err(std::io::Error::other)?.to_bytes();
    let mut parsed = Parsed {
        method: head.method.clone(),
        key: decoded(head.uri.path()),
        query: query
            .split('&')
            .map(|part| part.split_once('=').unwrap_or((part, "")))
            .map(|(name, value)| (decoded(name), decoded(value)))
            .collect::<BTreeMap<_, _>>(),
        range: header("range"),
        if_match: header("if-match"),
        creates: header("if-none-match").is_some(),
        body,
    };
    let fault = {
        let mut log = lock(&shared.seen);
        let seen = Seen {
            number: log.len(),
            method: head.method.to_string(),
            key: parsed.key.clone(),
            query,
            range: parsed.range.clone(),
            length: parsed.body.len(),
            is_signed: header("authorization").is_some(),
        };
        log.push(seen.clone());
        drop(log);
        lock(&shared.faults)(&seen)
    };
    match fault {
        Fault::Status(status) => {
            return Ok(reply(Answer::error(status, "AsWanted"), false, &fault));
        }
        Fault::Dropped => return Err(std::io::Error::other("the request is lost")),
        Fault::Nonsense => return Ok(reply(Answer::page(), false, &fault)),
        Fault::WholeObject => parsed.range = None,
        Fault::RefusesConditions(status) if parsed.creates || parsed.if_match.is_some() => {
            return Ok(reply(Answer::error(status, "NotImplemented"), false, &fault));
        }
        Fault::NoCondition => (parsed.if_match, parsed.creates) = (None, false),
        Fault::WrongRange => parsed.range = Some("bytes=1-2".to_owned()),
        Fault::Late(milliseconds) => tokio::time::sleep(Duration::from_millis(milliseconds)).await,
        Fault::Held => shared.held.wait().await,
        _ => {}
    }
    let answer = lock(&shared.objects).answer(&parsed);
    let is_head = parsed.method == hyper::Method::HEAD;
    match fault {
        Fault::ReplyLost => Err(std::io::Error::other("the reply is lost")),
        Fault::Hang => std::future::pending().await,
        _ => Ok(reply(answer, is_head, &fault)),
    }
}

fn reply(answer: Answer, is_head: bool, fault: &Fault) -> Response<Broken> {
    let length = answer.body.len();
    let (whole, end) = match fault {
        Fault::Cut(kept) => (answer.body.slice(..length.min(*kept)), End::Break),
        Fault::Stall(kept) => (answer.body.slice(..length.min(*kept)), End::Stall),
        _ => (answer.body, End::Regular),
    };
    let body = Broken { data: (!is_head).then_some(whole), end };
    let mut response = Response::new(body);
    *response.status_mut() = answer.status;
    for (name, value) in answer.headers {
        if *fault == Fault::NoTag && name == "etag" {
            continue;
        }
        if let Ok(value) = value.parse() {
            response.headers_mut().insert(name, value);
        }
    }
    if answer.status != StatusCode::NO_CONTENT {
        response.headers_mut().insert("content-length", length.into());
    }
    response
}

/// A body that may end too early.
struct Broken {
    data: Option<Bytes>,
    end: End,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Regular,
    Break,
    Stall,
}

impl Body for Broken {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        match (self.data.take().filter(|data| !data.is_empty()), self.end) {
            (Some(data), _) => Poll::Ready(Some(Ok(Frame::data(data)))),
            (None, End::Regular) => Poll::Ready(None),
            (None, End::Break) => Poll::Ready(Some(Err(std::io::Error::other("cut")))),
            (None, End::Stall) => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.end == End::Regular && self.data.as_ref().is_none_or(Bytes::is_empty)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

/// Decodes `%XX`.
fn decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let hex = bytes.get(at + 1..at + 3).and_then(|hex| std::str::from_utf8(hex).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) if bytes[at] == b'%' => {
                decoded.push(byte);
                at += 3;
            }
            _ => {
                decoded.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}
