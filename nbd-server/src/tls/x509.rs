//! Certificates.

use std::path::{Path, PathBuf};

use openssl::asn1::Asn1Time;
use openssl::pkey::{PKey, Private};
use openssl::ssl::{SslFiletype, SslVerifyMode};
use openssl::stack::Stack;
use openssl::x509::store::X509Lookup;
use openssl::x509::verify::X509VerifyFlags;
use openssl::x509::{X509, X509Ref, X509StoreContext, X509StoreContextRef, X509VerifyResult};

use super::builder::{self, Builder, Loaded};
use super::distinguished_name::DistinguishedName;
use super::notes::{Notes, printable};
use super::pem::{AUTHORITY, CERTIFICATE, KEY, Pem, REVOCATIONS, Source};
use super::{Authorization, ClientCertificates, KeyPassword, TlsError};

/// Reads all files of a source.
pub(super) fn load(
    source: &dyn Source,
    client_certificates: ClientCertificates,
    authorization: &Authorization,
) -> Result<Loaded, TlsError> {
    let mut builder = builder::builder()?;
    let certificate = use_certificate(&mut builder, source)?;
    match client_certificates {
        ClientCertificates::Required => {
            trust_authorities(&mut builder, source)?;
            verify_clients(&mut builder, authorization);
        }
        ClientCertificates::NotAsked => {
            if !matches!(authorization, Authorization::Everyone) {
                return Err(TlsError::Contradiction(
                    "a list of clients needs their certificates: require client certificates",
                ));
            }
            builder.set_verify(SslVerifyMode::NONE);
        }
    }
    let host_names = host_names(&certificate);
    Ok(Loaded { context: builder.build(), host_names, users: Vec::new() })
}

/// Loads the server's own certificate and key.
fn use_certificate(builder: &mut Builder, source: &dyn Source) -> Result<X509, TlsError> {
    let pem = source.certificate()?;
    let mut chain = certificates(CERTIFICATE, &pem)?.into_iter();
    let path = pem.path;
    let Some(certificate) = chain.next() else {
        return Err(unusable(CERTIFICATE, path, "there is no certificate in it"));
    };
    check_validity(&certificate, &path)?;
    let pem = source.key()?;
    let key = private_key(&pem, source.key_password())?;
    builder.set_certificate(&certificate)?;
    for intermediate in chain {
        builder.add_extra_chain_cert(intermediate)?;
    }
    if !certificate.public_key()?.public_eq(&key) {
        return Err(TlsError::KeyMismatch { certificate: path, key: pem.path });
    }
    builder.set_private_key(&key)?;
    Ok(certificate)
}

fn private_key(pem: &Pem, password: Option<&KeyPassword>) -> Result<PKey<Private>, TlsError> {
    let mut is_encrypted = false;
    // Without the callback the library would ask on the terminal.
    let key = PKey::private_key_from_pem_callback(&pem.text, |buffer| {
        is_encrypted = true;
        Ok(password.map_or(0, |password| password.copy_to(buffer)))
    });
    key.map_err(|_| {
        let why = match (is_encrypted, password) {
            (false, _) => "there is no private key in PEM form in it",
            (true, None) => {
                "it is encrypted; give its password, or decrypt it with 'openssl pkey', and protect it \
                 by permissions"
            }
            (true, Some(_)) => "it is encrypted, and the password does not open it: give the right one",
        };
        unusable(KEY, pem.path.clone(), why)
    })
}

/// Trusts the clients' authorities, but not the certificates that these have revoked.
fn trust_authorities(builder: &mut Builder, source: &dyn Source) -> Result<(), TlsError> {
    let pem = source.authorities()?;
    let authorities = certificates(AUTHORITY, &pem)?;
    let path = pem.path;
    let Some(first) = authorities.first() else {
        return Err(unusable(AUTHORITY, path, "there is no certificate in it"));
    };
    if authorities.iter().all(|authority| check_validity(authority, &path).is_err()) {
        check_validity(first, &path)?;
    }
    let mut names = Stack::new()?;
    for authority in authorities {
        names.push(authority.subject_name().to_owned()?)?;
        builder.cert_store_mut().add_cert(authority)?;
    }
    builder.set_client_ca_list(names);
    // All certificates in the file are trusted, even if they are not self-signed.
    let mut flags = X509VerifyFlags::PARTIAL_CHAIN;
    if let Some(path) = source.revocations()? {
        let lookup = builder.cert_store_mut().add_lookup(X509Lookup::file())?;
        if lookup.load_crl_file(&path, SslFiletype::PEM).unwrap_or(0) == 0 {
            return Err(unusable(REVOCATIONS, path, "there is no list in PEM form in it"));
        }
        flags |= X509VerifyFlags::CRL_CHECK;
    }
    builder.cert_store_mut().set_flags(flags)?;
    Ok(())
}

/// Requires a valid certificate with an authorized name from every client.
fn verify_clients(builder: &mut Builder, authorization: &Authorization) {
    let authorization = authorization.clone();
    let mode = SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT;
    builder.set_verify_callback(mode, move |valid, chain| {
        match judge(valid, chain, &authorization) {
            Ok(name) => {
                if let (Some(name), Some(notes)) = (name, notes(chain)) {
                    notes.set_name(name);
                }
                true
            }
            Err(refusal) => {
                if let Some(notes) = notes(chain) {
                    notes.set_refusal(refusal);
                }
                // A refusal needs an error code, or the alert would report success.
                if chain.error() == X509VerifyResult::OK {
                    chain.set_error(X509VerifyResult::APPLICATION_VERIFICATION);
                }
                false
            }
        }
    });
}

fn notes(chain: &X509StoreContextRef) -> Option<&Notes> {
    Notes::of(chain.ex_data(X509StoreContext::ssl_idx().ok()?)?)
}

/// Examines one certificate of the client's chain; the client's own comes last, and its name is
/// checked.
fn judge(
    valid: bool,
    chain: &X509StoreContextRef,
    authorization: &Authorization,
) -> Result<Option<String>, String> {
    let name = chain.current_cert().map(|cert| DistinguishedName::new(cert.subject_name()));
    if !valid {
        let subject = name.map_or_else(|| "?".to_owned(), |name| name.specific_first);
        return Err(refusal(&subject, chain));
    }
    if chain.error_depth() > 0 {
        return Ok(None);
    }
    let name = name.ok_or("the client's certificate cannot be read")?;
    authorization.check(&name)?;
    Ok(Some(name.specific_first))
}

/// The certificate, the failed check, and the remedy.
fn refusal(subject: &str, chain: &X509StoreContextRef) -> String {
    let result = chain.error();
    let subject = printable(subject);
    let whose = if chain.error_depth() == 0 { "the client's certificate" } else { "the authority" };
    let advice = match result.error_string() {
        text if text.contains("expired") => "have a new one issued",
        text if text.contains("not yet valid") => "set the clocks of both sides",
        text if text.contains("revoked") => "the authority has revoked it",
        text if text.contains("CRL") => "have the authority issue a current ca-crl.pem",
        text if text.contains("issuer") || text.contains("self") => {
            "it was not signed by an authority in the server's ca-cert.pem"
        }
        text if text.contains("purpose") => "have one issued for TLS clients",
        _ => "it cannot be used here",
    };
    format!("{whose} {subject} was refused: {}; {advice}", result.error_string())
}

fn certificates(what: &'static str, pem: &Pem) -> Result<Vec<X509>, TlsError> {
    X509::stack_from_pem(&pem.text).map_err(|_| {
        unusable(what, pem.path.clone(), "it does not consist of certificates in PEM form")
    })
}

fn unusable(what: &'static str, path: PathBuf, why: &str) -> TlsError {
    TlsError::Unusable { what, path, why: why.to_owned() }
}

fn check_validity(certificate: &X509Ref, path: &Path) -> Result<(), TlsError> {
    let now = Asn1Time::days_from_now(0)?;
    let (from, until) = (certificate.not_before(), certificate.not_after());
    let problem = if until < now {
        format!("has expired on {until}")
    } else if from > now {
        format!("is not valid before {from}")
    } else {
        return Ok(());
    };
    let subject = DistinguishedName::new(certificate.subject_name()).specific_first;
    Err(TlsError::OutsideValidity { path: path.to_path_buf(), subject, problem })
}

/// Names and addresses under which clients may know the owner of a certificate.
fn host_names(certificate: &X509Ref) -> Vec<String> {
    let mut names = Vec::new();
    for name in certificate.subject_alt_names().iter().flatten() {
        if let Some(host) = name.dnsname() {
            names.push(host.to_owned());
        } else if let Some(address) = name.ipaddress().and_then(address) {
            names.push(address);
        }
    }
    if names.is_empty() {
        let common =
            certificate.subject_name().entries_by_nid(openssl::nid::Nid::COMMONNAME).next();
        names.extend(common.and_then(|entry| entry.data().to_string().ok()));
    }
    names
}

fn address(bytes: &[u8]) -> Option<String> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Some(std::net::Ipv4Addr::from(four).to_string());
    }
    Some(std::net::Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).to_string())
}
