//! The authorities that certificates of stores come from.

use std::path::Path;

use object_store::client::HttpErrorKind;
use openssl::ssl::{SslConnector, SslConnectorBuilder, SslMethod, SslRef, SslVersion};
use openssl::x509::X509VerifyResult;

use crate::error::{Result, StoreError};
use crate::settings::StoreSettings;
use crate::shown::shown;

/// Where distributions keep the authorities. An OpenSSL that the program brings along does not
/// know.
const BUNDLES: [&str; 5] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

// The results of a verification that need an answer of their own (OpenSSL's `x509_vfy.h`).
const CERT_NOT_YET_VALID: i32 = 9;
const CERT_HAS_EXPIRED: i32 = 10;
const HOSTNAME_MISMATCH: i32 = 62;
const IP_ADDRESS_MISMATCH: i32 = 64;

/// Returns the settings of TLS: version 1.2 or 1.3, certificates and names are verified.
///
/// # Errors
///
/// The file of authorities cannot be read.
pub(super) fn connector(settings: &StoreSettings) -> Result<SslConnector> {
    let failed = |error: openssl::error::ErrorStack| {
        StoreError::invalid(format!("cannot prepare TLS: {error}"))
    };
    let mut builder = SslConnector::builder(SslMethod::tls_client()).map_err(failed)?;
    builder.set_min_proto_version(Some(SslVersion::TLS1_2)).map_err(failed)?;
    if let Some(file) = named(settings) {
        let mut store = openssl::x509::store::X509StoreBuilder::new().map_err(failed)?;
        let pem = std::fs::read(file).map_err(|error| unreadable(file, &error.to_string()))?;
        let certificates = openssl::x509::X509::stack_from_pem(&pem).unwrap_or_default();
        if certificates.is_empty() {
            return Err(unreadable(file, "it has no certificates in the form PEM"));
        }
        for certificate in certificates {
            store.add_cert(certificate).map_err(failed)?;
        }
        builder.set_cert_store(store.build());
    } else {
        trust_this_machine(&mut builder, settings.environment.get("SSL_CERT_FILE"));
    }
    Ok(builder.build())
}

/// The file of authorities that the user names.
pub(super) fn named(settings: &StoreSettings) -> Option<&Path> {
    let variable = || settings.environment.get("AWS_CA_BUNDLE").map(Path::new);
    settings.authorities.as_deref().or_else(variable)
}

/// Trusts what this machine trusts. If that cannot be found, no certificate is valid.
fn trust_this_machine(builder: &mut SslConnectorBuilder, named: Option<&str>) {
    // The builder has the paths of OpenSSL, and its variables, already.
    let bundles = named.into_iter().chain(BUNDLES);
    for bundle in bundles {
        if Path::new(bundle).is_file() && builder.set_ca_file(bundle).is_ok() {
            return;
        }
    }
}

fn unreadable(file: &Path, why: &str) -> StoreError {
    let why = shown(why);
    StoreError::invalid(format!("cannot use the authorities in '{}': {why}", file.display()))
}

/// Describes a failed handshake, and says whether it may succeed the next time.
pub(super) fn explain(
    error: &openssl::ssl::Error,
    ssl: &SslRef,
    host: &str,
) -> (HttpErrorKind, String) {
    let result = ssl.verify_result();
    if result == X509VerifyResult::OK {
        let why = match error.io_error() {
            Some(_) => "it has closed the connection in the handshake of TLS",
            None => "the handshake of TLS failed; is it a server with TLS?",
        };
        return (HttpErrorKind::Connect, why.to_owned());
    }
    let why = result.error_string();
    let what_to_do = match result.as_raw() {
        CERT_NOT_YET_VALID => "check the clock of this machine".to_owned(),
        CERT_HAS_EXPIRED => {
            "the operator of the store has to renew it, unless the clock of this machine is wrong"
                .to_owned()
        }
        HOSTNAME_MISMATCH | IP_ADDRESS_MISMATCH => {
            format!("it is not for '{host}': use a name that it has")
        }
        _ => "if you trust its authority, name the file of that (--store-authorities)".to_owned(),
    };
    (HttpErrorKind::Unknown, format!("its certificate is not valid: {why}; {what_to_do}"))
}
