//! The reasons for which URIs are refused.

use thiserror::Error;

/// The reasons for which a URI is refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum UriError {
    /// There is no scheme followed by `://`.
    #[error("{0:?} is not an NBD URI: it has to begin like nbd://localhost/disk")]
    NoScheme(String),
    /// The scheme is unknown or not supported.
    #[error(
        "the URI scheme {0:?} is not supported: use nbd, nbds, nbd+unix or nbds+unix, as in nbd://localhost/disk"
    )]
    UnknownScheme(String),
    /// The URI has a fragment (`#`).
    #[error("an NBD URI has no fragment: write a '#' as %23, as in nbd://localhost/disk%231")]
    Fragment,
    /// A `%` is not followed by two hexadecimal digits.
    #[error("{0:?} has a '%' without two hexadecimal digits: write a '%' as %25, as in 100%25")]
    BadPercent(String),
    /// A percent-decoded part contains bytes that the protocol cannot express.
    #[error("the {what} in the URI {why}; an example is nbd://localhost/disk")]
    BadText {
        /// The part of the URI.
        what: &'static str,
        /// The rule that it violates.
        why: &'static str,
    },
    /// The port is not a number between 1 and 65535.
    #[error("{0:?} is not a port between 1 and 65535, as in nbd://localhost:10809/disk")]
    BadPort(String),
    /// An IPv6 address is malformed or has no brackets.
    #[error("{0:?} is not an address: write an IPv6 address in brackets, as in nbd://[::1]:10809/")]
    BadAddress(String),
    /// A unix URI has no `socket`.
    #[error(
        "the URI does not say which socket: add ?socket=, as in nbd+unix:///disk?socket=/run/nbd.sock"
    )]
    NoSocket,
    /// A unix URI has a host.
    #[error(
        "a unix URI has no host, so it has three slashes, as in nbd+unix:///disk?socket=/run/nbd.sock"
    )]
    HostWithSocket,
    /// A TCP URI with `socket`.
    #[error(
        "the parameter socket belongs to unix URIs, as in nbd+unix:///disk?socket=/run/nbd.sock"
    )]
    SocketWithTcp,
    /// A parameter of TLS without a value.
    #[error("the parameter {key} has no value: say which, or leave it out")]
    EmptyParameter {
        /// The parameter.
        key: String,
    },
    /// A parameter whose value is not legal.
    #[error("the parameter {key} cannot be {value:?}: use {legal}")]
    BadParameter {
        /// The parameter.
        key: &'static str,
        /// Its value.
        value: String,
        /// The legal values.
        legal: &'static str,
    },
}
