//! TLS errors: the credentials at fault, the failed check, and the remedy.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use nbd_proto::handshake::OptionError;
use nbd_proto::system_words::system_words;
use nbd_proto::tls::KeyFileError;
use nbd_proto::uri::TlsKind;

/// The reason why TLS failed, or why a connection without TLS was refused.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The crate was built without its feature `tls`.
    #[error("this program was built without TLS: build it with the feature 'tls'")]
    NotBuiltIn,
    /// The server requires TLS and the client disables it.
    #[error("the server requires TLS: use nbds instead of nbd, and say which credentials to use")]
    RequiredByServer,
    /// TLS was switched off for a URI that requires it.
    #[error("the URI requires TLS and TLS is off: use nbd instead of nbds to do without it")]
    Contradiction,
    /// TLS is required and the server refused it: the server does not support TLS, or an active
    /// attacker suppresses it.
    #[error(
        "the server refused TLS ({0}), and TLS is required: use nbd instead of nbds only on a \
         network that you trust"
    )]
    Refused(OptionError),
    /// TLS is required and the server uses a protocol without it.
    #[error(
        "the server is too old for TLS, and TLS is required: do without it only on a network that you trust"
    )]
    TooOld,
    /// The URI names a file of this machine, which is not allowed.
    #[error(
        "the URI names a local file with {0}, which this program does not follow: give the \
         credentials to the program itself"
    )]
    LocalFile(&'static str),
    /// The URI requests `tls-type=anon`.
    #[error(
        "anonymous TLS proves nothing and is not supported: use certificates or a pre-shared key"
    )]
    Anonymous,
    /// The URI requests a kind of TLS that this version does not know.
    #[error(
        "this program does not support the kind of TLS that the URI requests ({0:?}): use \
         certificates or a pre-shared key"
    )]
    UnsupportedKind(TlsKind),
    /// Pre-shared keys are requested without a file.
    #[error("TLS with a pre-shared key needs the file with the key: add tls-psk-file=FILE")]
    NoKeyFile,
    /// There is no name to check the server's certificate against.
    #[error(
        "over a unix socket there is no host name to compare with the server's certificate: say \
         which name it has to have, as in tls-hostname=localhost; or, for a pre-shared key, give its \
         file, as in tls-psk-file=FILE"
    )]
    NoHostName,
    /// A file with credentials cannot be read.
    #[error("cannot read {what} '{}': {}", path.display(), system_words(source))]
    File {
        /// The expected contents.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: Arc<io::Error>,
    },
    /// A file with credentials does not have the expected contents.
    #[error("'{}' is not usable as {what}: {why}", path.display())]
    BadFile {
        /// The expected contents.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The defect.
        why: String,
    },
    /// A file with pre-shared keys is malformed.
    #[error("'{}' is not usable as pre-shared keys: {source}", path.display())]
    BadKeyFile {
        /// The file.
        path: PathBuf,
        /// The defect.
        source: KeyFileError,
    },
    /// A file has keys of several users, and none was selected.
    #[error(
        "'{}' has the keys of {users}: say whose to use, as in nbds://USER@HOST/",
        path.display()
    )]
    NoUser {
        /// The file.
        path: PathBuf,
        /// The users, as text.
        users: String,
    },
    /// The selected user is not in the file of keys.
    #[error(
        "'{}' has no key for the user '{user}': it has {users}; add one with 'nbd-cli tls psk'",
        path.display()
    )]
    UnknownUser {
        /// The file.
        path: PathBuf,
        /// The user.
        user: String,
        /// The users, as text.
        users: String,
    },
    /// The server's certificate, or an intermediate one, failed a check.
    #[error("{certificate} {check}")]
    Certificate {
        /// A description of the certificate.
        certificate: String,
        /// The check.
        check: CertificateCheck,
    },
    /// The server authenticated itself with a certificate although a pre-shared key was requested.
    #[error(
        "the server does not use the pre-shared key but a certificate: give the client certificates \
         instead (tls-certificates=DIR), or have the server use the key"
    )]
    NotPreSharedKey,
    /// The server refused the client with a TLS alert.
    #[error("the server refused TLS with this client (alert: {alert}): {advice}")]
    Alert {
        /// The name of the alert in RFC 8446.
        alert: &'static str,
        /// The possible cause.
        advice: String,
    },
    /// The server closed the connection during the TLS handshake or right after it.
    #[error("the server closed the connection {when}: {advice}")]
    Closed {
        /// The moment.
        when: &'static str,
        /// The possible cause.
        advice: String,
    },
    /// The TLS library failed for another reason: the peers have no common algorithm, or the server
    /// did not send TLS.
    #[error("TLS failed: {0}")]
    Failed(String),
}

/// The failed check of a certificate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CertificateCheck {
    /// The certificate has expired.
    #[error("expired on {0}: the operator of the server has to renew it")]
    Expired(String),
    /// The certificate is not valid yet.
    #[error("is valid only from {0}: check the clocks of both machines")]
    NotYetValid(String),
    /// The issuer is not trusted.
    #[error(
        "is signed by '{issuer}', which is not in {trusted}: use the ca-cert.pem of that server"
    )]
    UnknownAuthority {
        /// The issuer.
        issuer: String,
        /// The source of the trusted authorities.
        trusted: String,
    },
    /// The certificate is for another name.
    #[error(
        "is for {names} and not for '{wanted}': connect by one of these names, or say which to \
         expect with tls-hostname"
    )]
    WrongName {
        /// The names in the certificate.
        names: String,
        /// The expected name.
        wanted: String,
    },
    /// The certificate is revoked.
    #[error("was revoked by its authority: the server needs a new one")]
    Revoked,
    /// Another check, in the words of the TLS library.
    #[error("failed a check: {0}")]
    Other(String),
}
