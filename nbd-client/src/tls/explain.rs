//! Translates errors of the TLS library into messages that name the certificate, the check and the
//! remedy.

use std::net::IpAddr;
use std::path::PathBuf;

use nbd_proto::tls::{CLIENT_CERTIFICATE_FILE, CLIENT_KEY_FILE};
use openssl::error::ErrorStack;
use openssl::nid::Nid;
use openssl::ssl;
use openssl::x509::{X509NameRef, X509Ref, X509StoreContextRef};

use super::{CertificateCheck, TlsError};

/// Longest text of a certificate in a message, in characters: it comes from the server.
const MAX_TEXT: usize = 200;

/// The identity that the client presents.
#[derive(Debug)]
pub(super) enum Identity {
    /// Without a certificate.
    Nobody {
        directory: Option<PathBuf>,
    },
    Certificate {
        path: PathBuf,
        expired: Option<String>,
    },
    PreSharedKey {
        user: String,
    },
}

/// OpenSSL's certificate verification errors (`x509_vfy.h`).
mod code {
    pub(super) const UNABLE_TO_GET_ISSUER: i32 = 2;
    pub(super) const UNABLE_TO_GET_CRL: i32 = 3;
    pub(super) const BAD_SIGNATURE: i32 = 7;
    pub(super) const NOT_YET_VALID: i32 = 9;
    pub(super) const EXPIRED: i32 = 10;
    pub(super) const SELF_SIGNED: i32 = 18;
    pub(super) const UNABLE_TO_VERIFY_LEAF: i32 = 21;
    pub(super) const REVOKED: i32 = 23;
    pub(super) const HOSTNAME_MISMATCH: i32 = 62;
    pub(super) const IP_ADDRESS_MISMATCH: i32 = 64;
}

/// Returns true if only the revocation list of this authority is missing: like GnuTLS, the client
/// applies the lists that exist.
pub(super) fn is_missing_revocation_list(store: &X509StoreContextRef) -> bool {
    store.error().as_raw() == code::UNABLE_TO_GET_CRL
}

/// Describes a certificate that failed a check.
pub(super) fn certificate(store: &X509StoreContextRef, wanted: &str, trusted: &str) -> TlsError {
    let error = store.error();
    let subject = store.current_cert().map_or_else(String::new, |cert| name(cert.subject_name()));
    let certificate = match store.error_depth() {
        0 => format!("the server's certificate '{subject}'"),
        _ => format!("the certificate '{subject}' of the server's authority"),
    };
    let check = match (error.as_raw(), store.current_cert()) {
        (code::EXPIRED, Some(cert)) => CertificateCheck::Expired(cert.not_after().to_string()),
        (code::NOT_YET_VALID, Some(cert)) => {
            CertificateCheck::NotYetValid(cert.not_before().to_string())
        }
        (
            code::UNABLE_TO_GET_ISSUER
            | code::BAD_SIGNATURE
            | code::SELF_SIGNED..=code::UNABLE_TO_VERIFY_LEAF,
            Some(cert),
        ) => CertificateCheck::UnknownAuthority {
            issuer: name(cert.issuer_name()),
            trusted: trusted.to_owned(),
        },
        (code::HOSTNAME_MISMATCH | code::IP_ADDRESS_MISMATCH, Some(cert)) => {
            CertificateCheck::WrongName { names: names(cert), wanted: wanted.to_owned() }
        }
        (code::REVOKED, _) => CertificateCheck::Revoked,
        _ => CertificateCheck::Other(error.error_string().to_owned()),
    };
    TlsError::Certificate { certificate, check }
}

/// Describes a failed handshake or record.
pub(super) fn failure(error: &ssl::Error, identity: &Identity) -> TlsError {
    const END_OF_FILE: i32 = 294;
    let first = error.ssl_error().and_then(|stack| stack.errors().first());
    let Some(first) = first else {
        return closed("during the TLS handshake", identity);
    };
    if let Some(alert) = alert_name(first.reason_code()) {
        return TlsError::Alert { alert, advice: advice(alert, identity) };
    }
    if first.reason_code() == END_OF_FILE {
        return closed("during the TLS handshake", identity);
    }
    TlsError::Failed(match first.reason() {
        Some("wrong version number" | "packet length too long" | "http request") => {
            "the server's answer is not TLS".to_owned()
        }
        Some("unsupported protocol") => {
            "the server has no TLS 1.2 or newer: it has to be updated".to_owned()
        }
        Some(reason) => reason.to_owned(),
        None => "for an unknown reason".to_owned(),
    })
}

/// Describes the possible cause if the server closes the connection without an alert.
pub(super) fn closed(when: &'static str, identity: &Identity) -> TlsError {
    TlsError::Closed { when, advice: advice("", identity) }
}

/// Returns OpenSSL's text for its first error.
pub(super) fn reason(stack: &ErrorStack) -> String {
    let first = stack.errors().first().and_then(openssl::error::Error::reason);
    first.unwrap_or("unknown reason").to_owned()
}

/// Returns RFC 8446's name of a received fatal alert, from OpenSSL's number for it.
fn alert_name(reason: i32) -> Option<&'static str> {
    const OFFSET: i32 = 1000;
    let number = reason.checked_sub(OFFSET).filter(|number| (0..=255).contains(number))?;
    Some(match number {
        40 => "handshake_failure",
        41 => "no_certificate",
        42 => "bad_certificate",
        43 => "unsupported_certificate",
        44 => "certificate_revoked",
        45 => "certificate_expired",
        46 => "certificate_unknown",
        47 => "illegal_parameter",
        48 => "unknown_ca",
        49 => "access_denied",
        50 => "decode_error",
        51 => "decrypt_error",
        70 => "protocol_version",
        71 => "insufficient_security",
        80 => "internal_error",
        86 => "inappropriate_fallback",
        112 => "unrecognized_name",
        115 => "unknown_psk_identity",
        116 => "certificate_required",
        _ => "another one",
    })
}

/// Describes the possible cause of an alert, or of a close without an alert.
fn advice(alert: &str, identity: &Identity) -> String {
    match (alert, identity) {
        ("protocol_version", _) => "it supports neither TLS 1.2 nor TLS 1.3".into(),
        ("unrecognized_name", _) => "it does not serve the name that the client sent".into(),
        ("access_denied", _) => "its access list has no entry for this client".into(),
        (_, Identity::PreSharedKey { user }) => format!(
            "it may have another key for the user '{user}' or not know the user, or use \
             certificates instead of pre-shared keys"
        ),
        (_, Identity::Certificate { path, expired: Some(date) }) => {
            format!("the client's certificate '{}' expired on {date}: renew it", path.display())
        }
        ("certificate_revoked", Identity::Certificate { path, .. }) => {
            format!("the client's certificate '{}' was revoked", path.display())
        }
        (_, Identity::Certificate { path, .. }) => format!(
            "the client's certificate '{}' has to be signed by an authority that the server knows, \
             and be allowed by its access list; or the server uses pre-shared keys",
            path.display()
        ),
        (_, Identity::Nobody { directory: Some(directory) }) => format!(
            "it may want a certificate of the client: put {CLIENT_CERTIFICATE_FILE} and \
             {CLIENT_KEY_FILE} into '{}'; or it uses pre-shared keys",
            directory.display()
        ),
        (_, Identity::Nobody { directory: None }) => {
            "it may want a certificate of the client (tls-certificates=DIR) or a pre-shared key \
             (tls-psk-file=FILE)"
                .to_owned()
        }
    }
}

/// Formats a distinguished name as `CN=…,O=…`.
fn name(name: &X509NameRef) -> String {
    let mut text = String::new();
    for entry in name.entries() {
        let key = entry.object().nid().short_name().unwrap_or("?");
        let value = String::from_utf8_lossy(entry.data().as_slice());
        let separator = if text.is_empty() { "" } else { "," };
        text.push_str(&format!("{separator}{key}={value}"));
    }
    printable(&text)
}

/// Returns the names for which a certificate was issued.
fn names(certificate: &X509Ref) -> String {
    let alternative = certificate.subject_alt_names();
    let mut names: Vec<String> = alternative
        .iter()
        .flatten()
        .filter_map(|name| match (name.dnsname(), name.ipaddress()) {
            (Some(name), _) => Some(name.to_owned()),
            (None, Some(bytes)) => address(bytes).map(|address| address.to_string()),
            (None, None) => None,
        })
        .collect();
    if names.is_empty() {
        let common = certificate.subject_name().entries_by_nid(Nid::COMMONNAME);
        names.extend(
            common.map(|entry| String::from_utf8_lossy(entry.data().as_slice()).into_owned()),
        );
    }
    if names.is_empty() { "nobody".to_owned() } else { printable(&names.join(", ")) }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

/// Makes text of the server safe to print.
fn printable(text: &str) -> String {
    let mut safe: String = text.chars().take(MAX_TEXT).flat_map(char::escape_debug).collect();
    if text.chars().nth(MAX_TEXT).is_some() {
        safe.push('…');
    }
    safe
}
