//! One connection to a server.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use hyper::Uri;
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use object_store::client::{HttpError, HttpErrorKind, HttpRequest, HttpRequestBody};
use openssl::ssl::SslConnector;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{sleep, timeout};
use tokio_openssl::SslStream;

use crate::error::Result;
use crate::runtime::boxed;
use crate::settings::{StoreSettings, Timeouts};
use crate::shown::shown;

use super::failure::failed;
use super::trust;

/// How long an address has to itself before the next one is tried.
const NEXT_AFTER: Duration = Duration::from_millis(250);

/// A server: a scheme, a host and a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Origin {
    is_tls: bool,
    host: String,
    port: u16,
}

impl Origin {
    pub(super) fn of(uri: &Uri) -> Result<Self, HttpError> {
        let is_tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(failed(HttpErrorKind::Unknown, "an address is not of HTTP")),
        };
        let host = uri.host().filter(|host| !host.is_empty());
        let host = host.ok_or_else(|| failed(HttpErrorKind::Unknown, "an address has no host"))?;
        // Addresses of IPv6 have brackets in a URL and none elsewhere.
        let host = host.trim_matches(['[', ']']).to_owned();
        Ok(Self { is_tls, host, port: uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 }) })
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// Makes connections.
#[derive(Debug)]
pub(super) struct Dialer {
    /// Empty until a connection needs it, unless the user names the authorities: to read those of
    /// this machine takes longer than a small request.
    tls: OnceLock<Tls>,
    settings: StoreSettings,
    /// A variable that sets a proxy, which has no effect.
    proxy: Option<String>,
}

struct Tls(SslConnector);

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

impl Dialer {
    pub(super) fn new(settings: &StoreSettings) -> Result<Self> {
        let tls = OnceLock::new();
        if trust::named(settings).is_some() {
            let made = Tls(trust::connector(settings)?);
            tls.get_or_init(|| made);
        }
        let proxy = settings.environment.proxy().map(str::to_owned);
        Ok(Self { tls, settings: settings.clone(), proxy })
    }

    fn tls(&self) -> Result<&SslConnector> {
        if let Some(tls) = self.tls.get() {
            return Ok(&tls.0);
        }
        let tls = Tls(trust::connector(&self.settings)?);
        Ok(&self.tls.get_or_init(|| tls).0)
    }

    /// Connects, with TLS if the address wants it.
    pub(super) async fn dial(
        &self,
        origin: &Origin,
        timeouts: Timeouts,
    ) -> Result<Connection, HttpError> {
        let dialled = timeout(timeouts.connect, self.stream(origin)).await;
        let stream = dialled.unwrap_or_else(|_| {
            let why = format!("it has not answered within {} s", timeouts.connect.as_secs_f32());
            Err((HttpErrorKind::Connect, why))
        });
        let stream = stream.map_err(|(kind, why)| {
            failed(kind, format!("cannot connect to {origin}: {why}{}", self.note()))
        })?;
        let moved = Arc::new(AtomicU64::new(0));
        let stream = Counted { stream, moved: Arc::clone(&moved) };
        let (sender, driver) = handshake(TokioIo::new(stream))
            .await
            .map_err(|error| failed(HttpErrorKind::Connect, error.to_string()))?;
        // It ends when the sender and the body of the last reply are dropped.
        tokio::spawn(boxed(async move {
            if let Err(error) = driver.await {
                tracing::trace!(%error, "a connection to a store has ended");
            }
        }));
        Ok(Connection { sender, moved })
    }

    async fn stream(&self, origin: &Origin) -> Result<Stream, (HttpErrorKind, String)> {
        let failed = |error: io::Error| (HttpErrorKind::Connect, shown(&error.to_string()));
        let addresses = lookup_host((origin.host.as_str(), origin.port)).await.map_err(failed)?;
        let stream = first(addresses, TcpStream::connect).await.map_err(failed)?;
        // Small requests would wait for acknowledgements otherwise.
        stream.set_nodelay(true).map_err(failed)?;
        if !origin.is_tls {
            return Ok(Stream::Plain(stream));
        }
        let unusable = |why: String| (HttpErrorKind::Unknown, why);
        let tls = self.tls().map_err(|error| unusable(error.to_string()))?;
        let ssl = tls.configure().and_then(|tls| tls.into_ssl(&origin.host));
        let ssl = ssl.map_err(|error| unusable(error.to_string()))?;
        let stream = SslStream::new(ssl, stream).map_err(|error| unusable(error.to_string()));
        let mut stream = Box::new(stream?);
        match Pin::new(stream.as_mut()).connect().await {
            Ok(()) => Ok(Stream::Tls(stream)),
            Err(error) => Err(trust::explain(&error, stream.ssl(), &origin.host)),
        }
    }

    fn note(&self) -> String {
        match &self.proxy {
            Some(name) => format!(" (proxies are not used: {name} has no effect)"),
            None => String::new(),
        }
    }
}

/// Returns the first connection to one of several addresses. One that does not answer soon is
/// waited for while the next ones are tried (RFC 8305, section 5).
async fn first<A, S, F>(
    addresses: impl IntoIterator<Item = A>,
    connect: impl Fn(A) -> F,
) -> io::Result<S>
where
    F: Future<Output = io::Result<S>>,
{
    let mut addresses = addresses.into_iter().fuse().peekable();
    let mut attempts = FuturesUnordered::new();
    let mut why = io::Error::other("its name has no address");
    loop {
        if let Some(address) = addresses.next() {
            attempts.push(connect(address));
        }
        let has_next = addresses.peek().is_some();
        tokio::select! {
            attempt = attempts.next() => match attempt {
                Some(Ok(stream)) => return Ok(stream),
                Some(Err(error)) => why = error,
                None => return Err(why),
            },
            () = sleep(NEXT_AFTER), if has_next => {}
        }
    }
}

/// A connection that is between two requests, or whose reply is being read.
#[derive(Debug)]
pub(super) struct Connection {
    sender: SendRequest<HttpRequestBody>,
    /// Bytes in both directions.
    moved: Arc<AtomicU64>,
}

/// A request without a reply.
pub(super) struct Refused {
    /// The request, if nothing of it was sent.
    pub(super) unsent: Option<Box<HttpRequest>>,
    pub(super) error: HttpError,
}

impl Connection {
    /// Sends a request, and waits for the head of the reply.
    pub(super) async fn send(
        &mut self,
        request: HttpRequest,
        idle: Duration,
    ) -> Result<hyper::Response<Incoming>, Refused> {
        // A connection may not have noticed the end of its last reply yet, or that of its server.
        if timeout(idle, self.sender.ready()).await.is_ok_and(|ready| ready.is_ok()) {
            self.send_now(request, idle).await
        } else {
            let error = failed(HttpErrorKind::Request, "the store has closed the connection");
            Err(Refused { unsent: Some(Box::new(request)), error })
        }
    }

    async fn send_now(
        &mut self,
        request: HttpRequest,
        idle: Duration,
    ) -> Result<hyper::Response<Incoming>, Refused> {
        let mut sent = std::pin::pin!(self.sender.try_send_request(request));
        let mut before = self.moved.load(Ordering::Relaxed);
        loop {
            match timeout(idle, sent.as_mut()).await {
                Ok(Ok(reply)) => return Ok(reply),
                Ok(Err(mut refused)) => {
                    let unsent = refused.take_message().map(Box::new);
                    return Err(Refused { unsent, error: broken(refused.into_error()) });
                }
                Err(_) => {}
            }
            let now = self.moved.load(Ordering::Relaxed);
            if now == before {
                let why = format!("the store has not moved a byte for {} s", idle.as_secs_f32());
                return Err(Refused { unsent: None, error: failed(HttpErrorKind::Timeout, why) });
            }
            before = now;
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }
}

/// Converts an error of a connection that was established.
pub(super) fn broken(error: hyper::Error) -> HttpError {
    let (kind, why) = if error.is_timeout() {
        (HttpErrorKind::Timeout, "the store does not answer".to_owned())
    } else if error.is_parse() || error.is_parse_status() {
        (HttpErrorKind::Decode, "the answer is not of HTTP".to_owned())
    } else if error.is_canceled() {
        (HttpErrorKind::Request, "the store has closed the connection".to_owned())
    } else {
        (HttpErrorKind::Interrupted, "the connection to the store broke".to_owned())
    };
    failed(kind, why)
}

enum Stream {
    Plain(TcpStream),
    Tls(Box<SslStream<TcpStream>>),
}

/// A stream that counts its bytes.
struct Counted {
    stream: Stream,
    moved: Arc<AtomicU64>,
}

impl Counted {
    fn count(&self, bytes: usize) {
        self.moved.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_read(context, buffer),
        };
        self.count(buffer.filled().len() - before);
        read
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write(context, data),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_write(context, data),
        };
        if let Poll::Ready(Ok(written)) = written {
            self.count(written);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(context),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_shutdown(context),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn address_that_does_not_answer_hides_no_other() {
        let connect = async |address| match address {
            "dead" => std::future::pending().await,
            "closed" => Err(io::Error::from(io::ErrorKind::ConnectionRefused)),
            address => Ok(address),
        };
        assert_eq!(first(["dead", "alive"], connect).await.unwrap(), "alive");
        assert_eq!(first(["closed", "dead", "alive"], connect).await.unwrap(), "alive");
        let refused = first(["closed"], connect).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        assert!(first([], connect).await.is_err());
    }
}
