//! HTTP/1 requests by hyper, over TLS by OpenSSL.
//!
//! Proxies are not used: the variables `HTTPS_PROXY` and so on have no effect, and the error of a
//! failed connection says so.

mod body;
mod completion;
mod connection;
mod failure;
mod limiter;
mod listing;
mod log;
mod pool;
mod range;
mod redirect;
mod refusal;
mod trust;

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hyper::body::{Body as _, Incoming};
use hyper::header::{HOST, HeaderValue, LOCATION, USER_AGENT};
use hyper::{Method, StatusCode, Uri};
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
    HttpResponseBody,
};
use tokio::time::{Instant, timeout_at};

use crate::error::Result;
use crate::settings::{StoreSettings, Timeouts};

pub(crate) use body::WHOLE_MAX;
pub(crate) use completion::Completion;

use body::{BodyLimits, ReplyBody};
use connection::{Connection, Dialer, Origin};
use failure::failed;
use limiter::Limiter;
use log::RequestLine;
use pool::Pool;

/// Addresses that a reply may lead to before the object itself.
const REDIRECTS_MAX: usize = 5;

/// Requests that met a conflict are made this often.
const CONFLICTS_MAX: u32 = 6;
/// The pause after the first conflict; it doubles with each.
const CONFLICT_PAUSE: Duration = Duration::from_millis(50);

/// The transport of a store: connections, time limits and the limit of requests.
///
/// Clones share connections and limits.
#[derive(Clone, Debug)]
pub(crate) struct Transport {
    shared: Arc<Shared>,
    redirects: Redirects,
    completion: Completion,
}

/// Whether redirects of GET and HEAD are followed. Signed requests are valid for one host only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Redirects {
    Followed,
    Returned,
}

#[derive(Debug)]
struct Shared {
    dialer: Dialer,
    pool: Pool,
    limiter: Limiter,
    timeouts: Timeouts,
}

impl Transport {
    /// Prepares TLS; connects to nothing.
    ///
    /// # Errors
    ///
    /// The file of authorities cannot be read.
    pub(crate) fn new(settings: &StoreSettings, redirects: Redirects) -> Result<Self> {
        let dialer = Dialer::new(settings)?;
        let limit = settings.requests_per_second.map(NonZeroU32::get);
        let limiter = Limiter::new(limit);
        let shared = Shared { dialer, pool: Pool::default(), limiter, timeouts: settings.timeouts };
        Ok(Self { shared: Arc::new(shared), redirects, completion: Completion::default() })
    }

    /// The condition for the end of an upload; none at first.
    pub(crate) fn completion(&self) -> Completion {
        self.completion.clone()
    }
}

impl HttpConnector for Transport {
    fn connect(&self, _options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

#[async_trait]
impl object_store::client::HttpService for Transport {
    async fn call(&self, mut request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let mut redirects = 0;
        loop {
            let follows = self.redirects == Redirects::Followed && is_safe(request.method());
            let next = follows.then(|| request.clone());
            let reply = refusal::typed(self.repeated(request).await?).await?;
            let Some(mut next) = next.filter(|_| redirect::is_redirect(reply.status())) else {
                return Ok(reply);
            };
            redirects += 1;
            if redirects > REDIRECTS_MAX {
                return Err(failed(HttpErrorKind::Decode, "the server redirects without an end"));
            }
            redirect::follow(&mut next, reply.headers().get(LOCATION))?;
            request = next;
        }
    }
}

impl Transport {
    /// Makes a request, again if it had no effect because of another one at the same time: the
    /// client of the store does not repeat those.
    async fn repeated(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let mut pause = CONFLICT_PAUSE;
        for _ in 1..CONFLICTS_MAX {
            let reply = self.request(request.clone()).await?;
            if reply.status() != StatusCode::CONFLICT {
                return Ok(reply);
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        self.request(request).await
    }

    /// Makes one request, and logs it.
    async fn request(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        self.shared.limiter.wait().await;
        let line = RequestLine::of(&request);
        let deadline = Instant::now() + self.shared.timeouts.request;
        let reply = timeout_at(deadline, self.exchange(request, deadline)).await;
        let reply = reply.unwrap_or_else(|_| Err(too_slow(self.shared.timeouts.request)));
        line.log(&reply);
        reply
    }

    async fn exchange(
        &self,
        mut request: HttpRequest,
        deadline: Instant,
    ) -> Result<HttpResponse, HttpError> {
        let shared = &self.shared;
        let origin = Origin::of(request.uri())?;
        let asked = range::asked(request.headers());
        let length = asked.and_then(range::length).unwrap_or(WHOLE_MAX);
        let mut limits = BodyLimits { idle: shared.timeouts.idle, deadline, length };
        let is_list = listing::is_wanted(request.uri());
        if is_list || listing::is_of_uploads(&request) {
            limits.length = listing::LIST_MAX;
        }
        self.completion.add_to(&mut request);
        prepare(&mut request)?;
        loop {
            let (mut connection, is_used) = match shared.pool.take(&origin) {
                Some(connection) => (connection, true),
                None => (shared.dialer.dial(&origin, shared.timeouts).await?, false),
            };
            // The server may have closed a connection that was used before.
            let again = (is_used && is_safe(request.method())).then(|| request.clone());
            match connection.send(request, shared.timeouts.idle).await {
                Ok(reply) => {
                    let (mut head, incoming) = reply.into_parts();
                    range::complete(&mut head, incoming.size_hint().exact(), asked)?;
                    let body = self.receive(incoming, connection, origin, limits);
                    let body = match head.status {
                        // What it says of signatures and keys stays here.
                        status if status.is_client_error() || status.is_server_error() => {
                            refusal::summarised(body).await.into()
                        }
                        StatusCode::OK if is_list => listing::checked(body).await?.into(),
                        _ => HttpResponseBody::new(body),
                    };
                    return Ok(HttpResponse::from_parts(head, body));
                }
                Err(refused) => match (refused.unsent.map(|unsent| *unsent).or(again), is_used) {
                    (Some(unsent), true) => request = unsent,
                    _ => return Err(refused.error),
                },
            }
        }
    }

    fn receive(
        &self,
        incoming: Incoming,
        connection: Connection,
        origin: Origin,
        limits: BodyLimits,
    ) -> ReplyBody {
        let shared = Arc::clone(&self.shared);
        let back = Box::new(move |connection| shared.pool.put(origin, connection));
        ReplyBody::new(incoming, connection, limits, back)
    }
}

/// Completes the headers, and reduces the address to its path and query (RFC 9112, section 3.2.1).
fn prepare(request: &mut HttpRequest) -> Result<(), HttpError> {
    if !request.headers().contains_key(HOST) {
        let host = request.uri().authority().map_or("", |authority| authority.as_str());
        let host = HeaderValue::from_str(host)
            .map_err(|_| failed(HttpErrorKind::Unknown, "the name of the host is malformed"))?;
        request.headers_mut().insert(HOST, host);
    }
    // Some servers refuse requests without it.
    let agent = HeaderValue::from_static(concat!("nbd-cli/", env!("CARGO_PKG_VERSION")));
    request.headers_mut().entry(USER_AGENT).or_insert(agent);
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    let path = path.parse::<Uri>();
    *request.uri_mut() =
        path.map_err(|_| failed(HttpErrorKind::Unknown, "the path of the address is malformed"))?;
    Ok(())
}

fn is_safe(method: &Method) -> bool {
    method == Method::GET || method == Method::HEAD
}

fn too_slow(limit: Duration) -> HttpError {
    let why = format!("the store has not answered completely within {} s", limit.as_secs_f32());
    failed(HttpErrorKind::Timeout, why)
}
