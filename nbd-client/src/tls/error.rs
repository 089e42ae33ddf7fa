//! What can go wrong with TLS: whose credentials, which check, what to do.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use nbd_proto::handshake::OptionError;
use nbd_proto::tls::KeyFileError;

use crate::system_words::system_words;

/// Why there is no TLS, or no connection without it.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The crate was built without its feature `tls`.
    #[error("this program was built without TLS: build it with the feature 'tls'")]
    NotBuiltIn,
    /// The server requires TLS and the client was not to use it.
    #[error("the server requires TLS: use nbds instead of nbd, and say which credentials to use")]
    RequiredByServer,
    /// TLS was switched off for a URI that requires it.
    #[error("the URI requires TLS and TLS is off: use nbd instead of nbds to do without it")]
    Contradiction,
    /// TLS is required and the server refused it. It has none, or somebody between it and the
    /// client wants to listen.
    #[error(
        "the server refused TLS ({0}), and TLS is required: use nbd instead of nbds only on a \
         network that you trust"
    )]
    Refused(OptionError),
    /// TLS is required and the server speaks a protocol without it.
    #[error(
        "the server is too old for TLS, and TLS is required: do without it only on a network that you trust"
    )]
    TooOld,
    /// The URI names a file of this machine, which was not allowed.
    #[error(
        "the URI names a local file with {0}, which this program does not follow: give the \
         credentials to the program itself"
    )]
    LocalFile(&'static str),
    /// The URI asks for `tls-type=anon`.
    #[error(
        "anonymous TLS proves nothing and is not supported: use certificates or a pre-shared key"
    )]
    Anonymous,
    /// Pre-shared keys without a file.
    #[error("TLS with a pre-shared key needs the file with the key: add tls-psk-file=FILE")]
    NoKeyFile,
    /// No name to look for in the server's certificate.
    #[error(
        "over a unix socket there is no host name to compare with the server's certificate: say \
         which name it has to have, as in tls-hostname=localhost"
    )]
    NoHostName,
    /// A file with credentials cannot be read.
    #[error("cannot read {what} '{}': {}", path.display(), system_words(source))]
    File {
        /// What it should hold.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// A file with credentials does not hold what it should.
    #[error("'{}' is not usable as {what}: {why}", path.display())]
    BadFile {
        /// What it should hold.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A file with pre-shared keys has a mistake.
    #[error("'{}' is not usable as pre-shared keys: {source}", path.display())]
    BadKeyFile {
        /// The file.
        path: PathBuf,
        /// The mistake.
        source: KeyFileError,
    },
    /// A file with keys of several users, and nobody said which.
    #[error(
        "'{}' has the keys of {users}: say whose to use, as in nbds://USER@HOST/",
        path.display()
    )]
    NoUser {
        /// The file.
        path: PathBuf,
        /// The users in words.
        users: String,
    },
    /// A user who is not in the file with the keys.
    #[error(
        "'{}' has no key for the user '{user}': it has {users}; add one with 'psktool -u {user}'",
        path.display()
    )]
    UnknownUser {
        /// The file.
        path: PathBuf,
        /// The user.
        user: String,
        /// The users in words.
        users: String,
    },
    /// The server's certificate, or one between it and the authority, failed a check.
    #[error("{certificate} {check}")]
    Certificate {
        /// Which certificate, in words.
        certificate: String,
        /// The check.
        check: CertificateCheck,
    },
    /// The server proved itself with a certificate although a pre-shared key was to be used.
    #[error(
        "the server does not use the pre-shared key but a certificate: give the client certificates \
         instead (tls-certificates=DIR), or have the server use the key"
    )]
    NotPreSharedKey,
    /// The server refused the client, and said why in the terms of TLS.
    #[error("the server refused TLS with this client (alert: {alert}): {advice}")]
    Alert {
        /// The server's reason, as RFC 8446 names it.
        alert: &'static str,
        /// What it may mean.
        advice: String,
    },
    /// The server closed the connection during the TLS handshake or right behind it.
    #[error("the server closed the connection {when}: {advice}")]
    Closed {
        /// At which point.
        when: &'static str,
        /// What it may mean.
        advice: String,
    },
    /// The TLS library failed for another reason: the peers have nothing in common, or what the
    /// server sent is not TLS.
    #[error("TLS failed: {0}")]
    Failed(String),
}

/// The check of a certificate that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CertificateCheck {
    /// Its time is over.
    #[error("expired on {0}: the operator of the server has to renew it")]
    Expired(String),
    /// Its time has not begun.
    #[error("is valid only from {0}: check the clocks of both machines")]
    NotYetValid(String),
    /// Signed by nobody who is trusted.
    #[error(
        "is signed by '{issuer}', which is not in {trusted}: use the ca-cert.pem of that server"
    )]
    UnknownAuthority {
        /// Who signed it.
        issuer: String,
        /// Where the trusted authorities come from.
        trusted: String,
    },
    /// Made out to somebody else.
    #[error(
        "is for {names} and not for '{wanted}': connect by one of these names, or say which to \
         expect with tls-hostname"
    )]
    WrongName {
        /// The names in it.
        names: String,
        /// The name that was looked for.
        wanted: String,
    },
    /// On the list of revoked certificates.
    #[error("was revoked by its authority: the server needs a new one")]
    Revoked,
    /// Another check, in the words of the TLS library.
    #[error("failed a check: {0}")]
    Other(String),
}
