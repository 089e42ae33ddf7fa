//! A condition for the end of an upload, which the client of the store has no means to ask for.

use std::sync::{Arc, Mutex, PoisonError};

use hyper::Method;
use hyper::header::{HeaderName, HeaderValue, IF_MATCH, IF_NONE_MATCH};
use object_store::client::HttpRequest;

use crate::refusal::Refusal;

/// What has to be there when an upload is completed. Clones are one condition.
#[derive(Clone, Debug, Default)]
pub(crate) struct Completion(Arc<Mutex<Option<(HeaderName, HeaderValue)>>>);

impl Completion {
    /// The object has to be the one with this ETag; without one, there must be none.
    pub(crate) fn expect(&self, etag: Option<&str>) {
        let condition = match etag {
            Some(etag) => HeaderValue::from_str(etag).ok().map(|etag| (IF_MATCH, etag)),
            None => Some((IF_NONE_MATCH, HeaderValue::from_static("*"))),
        };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = condition;
    }

    /// Adds no condition any more.
    pub(crate) fn clear(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Returns whether an error may only say that the store does not understand the condition. Look
    /// at the object before it is completed without one.
    pub(crate) fn is_unusable(&self, error: &object_store::Error) -> bool {
        let condition = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*condition {
            None => false,
            // Some stores compare ETags with and without quotation marks, and find them different.
            Some((name, _)) if matches!(error, object_store::Error::Precondition { .. }) => {
                name == IF_MATCH
            }
            Some(_) => Refusal::of(error).is_some_and(Refusal::is_not_implemented),
        }
    }

    /// Adds the condition to the request that completes an upload.
    pub(super) fn add_to(&self, request: &mut HttpRequest) {
        let query = request.uri().query().unwrap_or_default();
        if request.method() != Method::POST || !query.contains("uploadId=") {
            return;
        }
        let condition = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((name, value)) = condition {
            request.headers_mut().insert(name, value);
        }
    }
}
