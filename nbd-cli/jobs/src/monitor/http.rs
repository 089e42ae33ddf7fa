//! The paths of the monitor.

use std::net::IpAddr;
use std::sync::{Arc, Weak};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{self, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use nbd_server::ServerHandle;
use nbd_server::export::Export;
use percent_encoding::percent_decode_str;
use serde_json::json;

use super::disk_map::DiskMaps;
use super::page::page;
use super::prometheus::{self, ExportSample};
use crate::status::Status;
use crate::text::readable_json;

/// The age up to which pictures of disks are shown, to scrapers and on the page.
const MAX_AGE_FOR_METRICS: Duration = Duration::from_secs(30);
const MAX_AGE_FOR_PAGE: Duration = Duration::from_secs(2);
/// Time for which a reply waits for new pictures; for metrics, for all of them together.
const PATIENCE: Duration = Duration::from_secs(1);
/// The page loads nothing from other origins, and no other page may embed it.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
                      connect-src 'self'; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'";

type Reply = Response<Full<Bytes>>;

/// The monitor of one server.
pub(super) struct Site {
    server: ServerHandle,
    maps: DiskMaps,
    /// Names under which a browser may ask; `None` for any.
    host: Option<String>,
}

impl Site {
    /// `host` is the only name, beside addresses and localhost, under which browsers may ask: a
    /// page of another site must not read the status by pointing its own name at this machine.
    /// `None` allows every name.
    pub(super) const fn new(server: ServerHandle, maps: DiskMaps, host: Option<String>) -> Self {
        Self { server, maps, host }
    }

    /// Answers a request; its body does not matter.
    pub(super) async fn answer<B>(&self, request: &Request<B>) -> Reply {
        if !self.is_for_us(request.headers().get(header::HOST)) {
            return refusal(
                StatusCode::MISDIRECTED_REQUEST,
                "this is not the server of that name\n",
            );
        }
        if request.method() != Method::GET && request.method() != Method::HEAD {
            let mut reply = refusal(StatusCode::METHOD_NOT_ALLOWED, "only GET is possible here\n");
            reply.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
            return reply;
        }
        match request.uri().path() {
            "/" => reply("text/html; charset=utf-8", page()),
            "/healthz" => reply("text/plain; charset=utf-8", "ok\n"),
            "/metrics" => reply(prometheus::CONTENT_TYPE, self.metrics().await),
            "/status.json" => self.status(),
            "/map.json" => self.map(request.uri().query().unwrap_or_default()).await,
            _ => refusal(
                StatusCode::NOT_FOUND,
                "there are /, /metrics, /healthz, /status.json and /map.json?export=NAME\n",
            ),
        }
    }

    fn is_for_us(&self, host: Option<&HeaderValue>) -> bool {
        let (Some(own), Some(host)) = (&self.host, host) else { return true };
        let Ok(host) = host.to_str() else { return false };
        let name = match host.strip_prefix('[').and_then(|host| host.split_once(']')) {
            Some((address, _)) => address,
            None => host.split_once(':').map_or(host, |(name, _)| name),
        };
        name.eq_ignore_ascii_case("localhost")
            || name.eq_ignore_ascii_case(own)
            || name.parse::<IpAddr>().is_ok()
    }

    fn exports(&self) -> Vec<(String, Arc<dyn Export>)> {
        let entries = self.server.exports().entries().into_iter();
        entries.map(|(name, entry)| (name, Arc::clone(entry.export()))).collect()
    }

    async fn metrics(&self) -> String {
        // Exports must not be held while waiting: a removed one has to be closed.
        let exports: Vec<_> = self.exports().iter().map(downgrade).collect();
        let until = tokio::time::Instant::now() + PATIENCE;
        let mut maps = Vec::new();
        for (_, export) in &exports {
            let patience = until.saturating_duration_since(tokio::time::Instant::now());
            maps.push(self.maps.get(export, MAX_AGE_FOR_METRICS, patience).await);
        }
        let server = self.server.statistics();
        let samples: Vec<_> = exports
            .iter()
            .zip(&maps)
            .filter_map(|((name, export), picture)| {
                let statistics = server.exports.get(name)?;
                let map = picture.as_ref().map(|picture| &picture.map);
                let size = export.upgrade()?.info().size;
                Some(ExportSample { name, size, statistics, map })
            })
            .collect();
        prometheus::text(&server, &samples)
    }

    fn status(&self) -> Reply {
        match serde_json::to_string(&Status::of(&self.server)) {
            Ok(text) => reply("application/json", readable_json(&text)),
            Err(_) => refusal(StatusCode::INTERNAL_SERVER_ERROR, "the numbers cannot be written\n"),
        }
    }

    async fn map(&self, query: &str) -> Reply {
        let wanted = query.split('&').find_map(|pair| pair.strip_prefix("export="));
        let name = percent_decode_str(wanted.unwrap_or_default()).decode_utf8_lossy();
        let Some((_, entry)) = self.server.exports().find(&name) else {
            return refusal(StatusCode::NOT_FOUND, "there is no export of that name\n");
        };
        let export = Arc::downgrade(entry.export());
        drop(entry);
        let picture = self.maps.get(&export, MAX_AGE_FOR_PAGE, PATIENCE).await;
        let value = match picture {
            Some(picture) => json!({
                "age": picture.at.elapsed().as_secs_f64(),
                "map": picture.map,
            }),
            // The walk takes longer, or has failed.
            None => json!({ "age": null, "map": null }),
        };
        reply("application/json", value.to_string())
    }
}

fn downgrade((name, export): &(String, Arc<dyn Export>)) -> (String, Weak<dyn Export>) {
    (name.clone(), Arc::downgrade(export))
}

fn reply(content_type: &'static str, body: impl Into<Bytes>) -> Reply {
    let mut reply = Response::new(Full::new(body.into()));
    let headers = reply.headers_mut();
    for (name, value) in [
        (header::CONTENT_TYPE, content_type),
        (header::CACHE_CONTROL, "no-store"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    reply
}

fn refusal(status: StatusCode, why: &'static str) -> Reply {
    let mut reply = reply("text/plain; charset=utf-8", why);
    *reply.status_mut() = status;
    reply
}
