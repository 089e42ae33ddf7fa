//! Errors of credentials and TLS handshakes.

use std::io;
use std::path::PathBuf;

use nbd_proto::tls::KeyFileError;
use openssl::error::ErrorStack;
use openssl::ssl;
use thiserror::Error;

use super::notes::{Notes, printable};
use crate::error::system_words;

/// The reason why credentials cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {what} {}: {}", path.display(), advice(source))]
    Read {
        /// The expected contents.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A file does not have the expected contents.
    #[error("{what} {} cannot be used: {why}", path.display())]
    Unusable {
        /// The expected contents.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The defect.
        why: String,
    },
    /// A certificate outside its period of validity.
    #[error(
        "the certificate {subject} in {} {problem}; have the authority issue a new one, or set the \
         clock", path.display()
    )]
    OutsideValidity {
        /// The file.
        path: PathBuf,
        /// The subject of the certificate.
        subject: String,
        /// The end of the validity that is violated, with its time.
        problem: String,
    },
    /// A key that belongs to another certificate.
    #[error(
        "the key in {} does not belong to the certificate in {}; take the pair that was made \
         together", key.display(), certificate.display()
    )]
    KeyMismatch {
        /// The file with the certificate.
        certificate: PathBuf,
        /// The file with the key.
        key: PathBuf,
    },
    /// A file of pre-shared keys is malformed.
    #[error("the key file {} cannot be used: {source}", path.display())]
    KeyFile {
        /// The file.
        path: PathBuf,
        /// The defect.
        source: KeyFileError,
    },
    /// Names are to be checked, but clients present no certificates.
    #[error("{0}")]
    Contradiction(&'static str),
    /// The TLS library refused.
    #[error("the TLS library failed: {0}")]
    Library(#[from] ErrorStack),
}

fn advice(source: &io::Error) -> String {
    match source.kind() {
        io::ErrorKind::NotFound => {
            "there is no such file; create it, or name another place".to_owned()
        }
        io::ErrorKind::PermissionDenied => {
            "permission denied; let the user this server runs as read it".to_owned()
        }
        _ => system_words(source),
    }
}

/// The reason why a TLS handshake failed, for the server's log: the notes of the callbacks come
/// first, because the library only knows that something was refused.
pub(crate) fn explain_handshake(error: &ssl::Error, notes: Option<&Notes>) -> String {
    if let Some(refusal) = notes.and_then(Notes::refusal) {
        return refusal;
    }
    let Some(stack) = error.ssl_error() else {
        return error.io_error().map_or_else(|| error.to_string(), system_words);
    };
    let reasons: Vec<&str> = stack.errors().iter().filter_map(|error| error.reason()).collect();
    let user = notes.and_then(Notes::user);
    let has = |words: &str| reasons.iter().any(|reason| reason.contains(words));
    match user {
        Some(user) if has("binder") || has("decryption failed") || has("digest check") => {
            return format!("wrong key for the user \"{}\"", printable(user));
        }
        _ => {}
    }
    if has("peer did not return a certificate") {
        // Clients do not present certificates of authorities that the server does not name.
        return "the client presented no certificate; give it client-cert.pem and client-key.pem signed \
                by an authority in the server's ca-cert.pem"
            .to_owned();
    }
    if has("wrong version number") || has("http request") || has("unsupported record") {
        return "the bytes after STARTTLS are not TLS".to_owned();
    }
    if has("unsupported protocol") || has("version too low") {
        return "the client offers neither TLS 1.2 nor TLS 1.3".to_owned();
    }
    if has("no shared cipher") || has("no suitable") {
        return "client and server have no cipher in common; the client may want certificates where \
                the server has pre-shared keys, or the other way round"
            .to_owned();
    }
    if reasons.is_empty() { error.to_string() } else { reasons.join(", ") }
}
