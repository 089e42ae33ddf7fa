//! Errors of requests to object stores.

use std::error::Error;
use std::fmt;
use std::io;

use crate::refusal::Refusal;
use crate::shown::{printable, shown, summary};

/// The side at fault, and what may help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoreErrorKind {
    /// The object or the bucket does not exist.
    NotFound,
    /// The store refuses the credentials, or there are none.
    Denied,
    /// The object is not the one that was opened: another one has its name now.
    Replaced,
    /// An object of this name exists already.
    Exists,
    /// The store cannot be used for this: it ignores ranges, for example.
    Unsuitable,
    /// The store cannot be reached, fails, or answers nonsense.
    Unavailable,
    /// The caller's settings or addresses are wrong.
    InvalidArgument,
    /// A file of this machine cannot be read or written.
    Local,
    /// The caller has interrupted the request.
    Interrupted,
}

/// The failure of a request: one sentence that names the object, the cause and the remedy.
///
/// Its text never has keys, signatures or the query of a URL.
#[derive(Clone, Debug)]
pub struct StoreError {
    kind: StoreErrorKind,
    message: String,
}

/// The result of a request.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;

impl StoreError {
    /// Creates an error; `message` is the whole sentence.
    pub fn new(kind: StoreErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// Creates an error about the caller's settings or addresses.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StoreErrorKind::InvalidArgument, message)
    }

    /// Converts the failure of an operation, such as "read", on an object or a prefix.
    ///
    /// ```
    /// use nbd_objects::StoreError;
    ///
    /// let found = object_store::Error::NotFound { path: "a".into(), source: "404".into() };
    /// let error = StoreError::of("read", "s3://bucket/a", &found);
    /// assert_eq!(error.to_string(), "cannot read s3://bucket/a: it does not exist in the store");
    /// ```
    pub fn of(operation: &str, object: &str, error: &object_store::Error) -> Self {
        use object_store::Error as E;
        let message =
            |why: &str| printable(&format!("cannot {operation} {object}: {why}")).collect();
        let why = deepest(error);
        if let Some(why) = unsuitable(&why) {
            return Self { kind: StoreErrorKind::Unsuitable, message: message(why) };
        }
        let refusal = Refusal::of(error);
        let (kind, why) = match error {
            E::NotFound { .. } if !why.contains("NoSuchBucket") => {
                (StoreErrorKind::NotFound, "it does not exist in the store".to_owned())
            }
            E::NotFound { .. } => (StoreErrorKind::NotFound, why),
            E::PermissionDenied { .. } | E::Unauthenticated { .. } => (
                StoreErrorKind::Denied,
                format!("{why}; check the credentials, their profile and the region"),
            ),
            E::Precondition { .. } => (
                StoreErrorKind::Replaced,
                "the object was replaced by another one while it was in use; open it again".into(),
            ),
            _ if refusal.is_some_and(Refusal::is_conflict) => (
                StoreErrorKind::Unavailable,
                format!("{why}: other requests for it go on at the same time; repeat the command"),
            ),
            _ if refusal.is_some_and(Refusal::is_not_implemented) => {
                (StoreErrorKind::Unsuitable, why)
            }
            E::AlreadyExists { .. } => (StoreErrorKind::Exists, "it exists already".to_owned()),
            E::NotSupported { .. } | E::NotImplemented { .. } => (StoreErrorKind::Unsuitable, why),
            _ => (StoreErrorKind::Unavailable, why),
        };
        Self { kind, message: message(&why) }
    }

    /// Returns the side at fault.
    #[must_use]
    pub const fn kind(&self) -> StoreErrorKind {
        self.kind
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for StoreError {}

impl From<StoreError> for io::Error {
    fn from(error: StoreError) -> Self {
        Self::other(error)
    }
}

/// What makes a server unsuitable, in place of what the client of the store says.
fn unsuitable(why: &str) -> Option<&'static str> {
    if why.contains("non-partial") || why.starts_with("Range request not") {
        Some("the server ignores ranges and sends whole objects")
    } else if why.starts_with("Requested ") && why.contains(", got ") {
        Some("the server sends another range than it was asked for")
    } else if why.starts_with("Content-Range header not") {
        Some("the server does not say which range it sends")
    } else if why.contains("value for CONTENT_RANGE") || why.starts_with("Content-Length Header") {
        Some("the server does not say how long the object is")
    } else if why.starts_with("ETag Header missing") {
        Some("the server gives no ETag, so a replaced object could not be noticed")
    } else {
        None
    }
}

/// The innermost cause, made fit for messages. Those around it repeat the URL, with its query, and
/// count retries.
fn deepest(error: &dyn Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    let text = cause.to_string();
    if let Some(status) = text.strip_prefix("Server returned non-2xx status code: ") {
        let status = status.trim_end_matches([' ', ':']);
        let what_to_do = match status.starts_with('3') {
            true => "; it has the bucket elsewhere: check the region and the endpoint",
            false => "",
        };
        return shown(&format!("the store answered {status}{what_to_do}"));
    }
    // A reply that claims success, complete.
    if let Some(reply) = text.strip_prefix("Server returned error response: ") {
        return match summary(reply) {
            summary if summary.is_empty() => "the store answered an error".to_owned(),
            summary => format!("the store answered {summary}"),
        };
    }
    match text.starts_with("Received redirect without LOCATION") {
        true => "the store answered a redirect without an address; check the region".to_owned(),
        false => shown(&text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Outer(Inner);
    #[derive(Debug)]
    struct Inner;

    impl fmt::Display for Outer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Error performing GET http://host/a?X-Amz-Signature=secret")
        }
    }
    impl fmt::Display for Inner {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Server returned non-2xx status code: 503 Service Unavailable: SlowDown")
        }
    }
    impl Error for Outer {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            Some(&self.0)
        }
    }
    impl Error for Inner {}

    #[test]
    fn text_has_the_cause_and_no_query_of_the_address() {
        let error = object_store::Error::Generic { store: "S3", source: Box::new(Outer(Inner)) };
        let error = StoreError::of("read", "http://host/a", &error);
        assert_eq!(
            error.to_string(),
            "cannot read http://host/a: the store answered 503 Service Unavailable: SlowDown"
        );
        assert_eq!(error.kind(), StoreErrorKind::Unavailable);
    }
    #[test]
    fn text_of_a_store_is_summarised_cut_and_printable() {
        let of = |object: &str, text: String| {
            let error = object_store::Error::Generic { store: "S3", source: text.into() };
            StoreError::of("read", object, &error).to_string()
        };
        let reply = "Server returned error response: <Error><Code>SlowDown</Code><Message>Wait\n\
                     now.</Message><Secret>f00d</Secret></Error>";
        assert_eq!(of("a", reply.into()), "cannot read a: the store answered SlowDown: Wait now");
        let reply = "Server returned error response: InternalError f00d";
        assert_eq!(of("a", reply.into()), "cannot read a: the store answered an error");
        assert_eq!(of("a\x1bb", "c\x1b[2J".into()), "cannot read a b: c [2J");
        assert_eq!(of("a", "x".repeat(5000)).len(), "cannot read a: ".len() + 300);
        let error = io::Error::from_raw_os_error(20).to_string();
        assert_eq!(of("a", error), "cannot read a: Not a directory");
    }
}
