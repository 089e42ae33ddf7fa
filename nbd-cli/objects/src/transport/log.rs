//! The log line of a request, at the level debug. Of the headers it has the range, and of the query
//! the parts that are not secrets.

use std::time::Instant;

use hyper::header::RANGE;
use object_store::client::{HttpError, HttpRequest, HttpResponse};

/// Parts of a query that are not secrets, with their values.
const SHOWN: [&str; 5] = ["list-type", "prefix", "partNumber", "uploads", "delete"];

/// A request that has begun.
pub(super) struct RequestLine {
    begun: Instant,
    /// What is logged, if anything is.
    shown: Option<Shown>,
}

struct Shown {
    method: String,
    host: String,
    key: String,
    range: String,
}

impl RequestLine {
    pub(super) fn of(request: &HttpRequest) -> Self {
        let shown = tracing::enabled!(tracing::Level::DEBUG).then(|| Shown::of(request));
        Self { begun: Instant::now(), shown }
    }

    pub(super) fn log(self, reply: &Result<HttpResponse, HttpError>) {
        let Some(Shown { method, host, key, range }) = self.shown else { return };
        let milliseconds = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        match reply {
            Ok(reply) => {
                let status = reply.status().as_u16();
                tracing::debug!(method, host, key, range, status, milliseconds, "store request");
            }
            Err(error) => {
                let error = error.to_string();
                tracing::debug!(method, host, key, range, error, milliseconds, "store request");
            }
        }
    }
}

impl Shown {
    fn of(request: &HttpRequest) -> Self {
        let uri = request.uri();
        let range = request.headers().get(RANGE).and_then(|range| range.to_str().ok());
        let key = match uri.query().map(shown_query) {
            Some(query) if !query.is_empty() => format!("{}?{query}", uri.path()),
            _ => uri.path().to_owned(),
        };
        // Without a user and password, which could stand before an @.
        let host = uri.authority().map_or("", |authority| authority.as_str());
        Self {
            method: request.method().to_string(),
            host: host.rsplit('@').next().unwrap_or_default().to_owned(),
            key,
            range: range.unwrap_or_default().to_owned(),
        }
    }
}

fn shown_query(query: &str) -> String {
    let is_shown = |part: &&str| SHOWN.contains(&part.split('=').next().unwrap_or_default());
    query.split('&').filter(is_shown).collect::<Vec<_>>().join("&")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_of_a_query_are_not_shown() {
        let query = "list-type=2&X-Amz-Signature=abc&WebIdentityToken=t&prefix=a%2F&uploadId=9";
        assert_eq!(shown_query(query), "list-type=2&prefix=a%2F");
    }
}
