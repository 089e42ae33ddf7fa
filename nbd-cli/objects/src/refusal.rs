//! Requests that a store refuses.

use std::error::Error;
use std::fmt;

use hyper::StatusCode;

/// The refusal of a request, for a reason for which the client of the store has no error of its
/// own. It is among the causes of the client's error.
#[derive(Debug)]
pub(crate) struct Refusal {
    status: StatusCode,
    /// The code and the message of the store, if it gave any.
    said: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the store answered {}", self.status)?;
        match self.said.is_empty() {
            true => Ok(()),
            false => write!(f, ": {}", self.said),
        }
    }
}

impl Error for Refusal {}

impl Refusal {
    pub(crate) fn new(status: StatusCode, said: impl Into<String>) -> Self {
        Self { status, said: said.into() }
    }

    /// Finds the refusal that led to an error.
    pub(crate) fn of<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a Self> {
        std::iter::successors(Some(error), |&error| error.source())
            .find_map(|error| error.downcast_ref())
    }

    /// Whether the client of the store tells this status by an error of its own, or repeats the
    /// request.
    pub(crate) fn is_told(status: StatusCode) -> bool {
        match status {
            StatusCode::UNAUTHORIZED
            | StatusCode::FORBIDDEN
            | StatusCode::NOT_FOUND
            | StatusCode::REQUEST_TIMEOUT
            | StatusCode::PRECONDITION_FAILED
            | StatusCode::TOO_MANY_REQUESTS => true,
            // It would be repeated, and refused each time.
            StatusCode::NOT_IMPLEMENTED => false,
            status => !status.is_client_error(),
        }
    }

    /// Whether the request had no effect because of another one at the same time.
    pub(crate) fn is_conflict(&self) -> bool {
        self.status == StatusCode::CONFLICT
    }

    /// Whether the object ends before the range that was asked for.
    pub(crate) fn is_of_range(&self) -> bool {
        self.status == StatusCode::RANGE_NOT_SATISFIABLE
    }

    /// Whether the store does not know a part of the request.
    pub(crate) fn is_not_implemented(&self) -> bool {
        let code = self.said.split(':').next();
        self.status == StatusCode::NOT_IMPLEMENTED
            || (self.status == StatusCode::BAD_REQUEST && code == Some("NotImplemented"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] Refusal);

    #[test]
    fn refusal_is_found_among_the_causes() {
        let conflict = Outer(Refusal::new(StatusCode::CONFLICT, ""));
        let found = Refusal::of(&conflict).unwrap();
        assert!(found.is_conflict() && !found.is_of_range());
        assert_eq!(found.to_string(), "the store answered 409 Conflict");
        assert!(Refusal::of(&fmt::Error).is_none());
    }

    #[test]
    fn what_a_store_does_not_know_is_told_by_status_or_code() {
        let of = |status, said: &str| {
            let status = StatusCode::from_u16(status).unwrap();
            Refusal::new(status, said).is_not_implemented()
        };
        assert!(of(501, "") && of(501, "Other: text") && of(400, "NotImplemented: A header"));
        assert!(
            !of(400, "InvalidPart: NotImplemented") && !of(400, "") && !of(409, "NotImplemented")
        );
    }
}
