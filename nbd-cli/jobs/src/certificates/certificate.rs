//! Certificates: their keys, usages, times and signatures.
//!
//! Keys are on the curve P-256: they are made at once, and every peer can use them.

use std::time::{SystemTime, UNIX_EPOCH};

use openssl::asn1::{Asn1Integer, Asn1Time, Asn1TimeRef};
use openssl::bn::{BigNum, MsbOption};
use openssl::ec::{EcGroup, EcKey};
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, PKeyRef, Private, Public};
use openssl::x509::extension::{
    AuthorityKeyIdentifier, BasicConstraints, ExtendedKeyUsage, KeyUsage, SubjectAlternativeName,
    SubjectKeyIdentifier,
};
use openssl::x509::{X509, X509Builder, X509Name, X509NameRef, X509Ref};

use super::names::HostName;

/// Seconds of a day.
pub(super) const SECONDS_PER_DAY: u64 = 86_400;

/// Certificates are valid this much earlier than now, in seconds: clocks differ.
const EARLIER: u64 = 3600;

/// Random bits of a serial number: the most that is positive and has the 20 bytes of RFC 5280.
const SERIAL_BITS: i32 = 159;

/// The owner of a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A server.
    Server,
    /// A client.
    Client,
}

/// The contents of a certificate.
#[derive(Clone, Copy)]
pub(super) struct Request<'a> {
    pub(super) role: Role,
    pub(super) subject: &'a X509NameRef,
    pub(super) names: &'a [HostName],
    pub(super) key: &'a PKeyRef<Public>,
    pub(super) days: u32,
}

/// Creates a private key.
pub(super) fn new_key() -> Result<PKey<Private>, ErrorStack> {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
    PKey::from_ec_key(EcKey::generate(&group)?)
}

/// Returns the public half of a key.
pub(super) fn public_half(key: &PKeyRef<Private>) -> Result<PKey<Public>, ErrorStack> {
    PKey::public_key_from_der(&key.public_key_to_der()?)
}

/// Builds a distinguished name; the most general part comes first.
pub(super) fn subject(organization: Option<&str>, name: &str) -> Result<X509Name, ErrorStack> {
    let mut subject = X509Name::builder()?;
    if let Some(organization) = organization {
        subject.append_entry_by_nid(Nid::ORGANIZATIONNAME, organization)?;
    }
    subject.append_entry_by_nid(Nid::COMMONNAME, name)?;
    Ok(subject.build())
}

/// Returns a name that no other authority has.
pub(super) fn authority_name(key: &PKeyRef<Private>) -> Result<String, ErrorStack> {
    let digest = openssl::sha::sha256(&key.public_key_to_der()?);
    let digits: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("NBD authority {digits}"))
}

/// Creates the certificate of an authority, signed by itself.
pub(super) fn self_signed(
    subject: &X509NameRef,
    key: &PKeyRef<Private>,
    days: u32,
) -> Result<X509, ErrorStack> {
    let end = Asn1Time::from_unix(in_days(days))?;
    let mut builder = begin(subject, subject, &end)?;
    builder.set_pubkey(key)?;
    // It signs servers and clients, and no further authorities.
    builder.append_extension(BasicConstraints::new().critical().ca().pathlen(0).build()?)?;
    builder.append_extension(KeyUsage::new().critical().key_cert_sign().crl_sign().build()?)?;
    let identifier = SubjectKeyIdentifier::new().build(&builder.x509v3_context(None, None))?;
    builder.append_extension(identifier)?;
    builder.sign(key, MessageDigest::sha256())?;
    Ok(builder.build())
}

/// Issues a certificate. It ends with that of the authority, or earlier.
pub(super) fn issue(
    authority: &X509Ref,
    authority_key: &PKeyRef<Private>,
    request: &Request<'_>,
) -> Result<X509, ErrorStack> {
    let wanted = Asn1Time::from_unix(in_days(request.days))?;
    let end = if authority.not_after() < wanted { authority.not_after() } else { &*wanted };
    let mut builder = begin(request.subject, authority.subject_name(), end)?;
    builder.set_pubkey(request.key)?;
    builder.append_extension(BasicConstraints::new().critical().build()?)?;
    // QEMU before 10.1 wants keyEncipherment too, which such keys must not have (RFC 8813), unless
    // the usage is not critical.
    builder.append_extension(KeyUsage::new().digital_signature().build()?)?;
    let purpose = match request.role {
        Role::Server => ExtendedKeyUsage::new().server_auth().build()?,
        Role::Client => ExtendedKeyUsage::new().client_auth().build()?,
    };
    builder.append_extension(purpose)?;
    if !request.names.is_empty() {
        let mut names = SubjectAlternativeName::new();
        for name in request.names {
            match name {
                HostName::Dns(name) => names.dns(name),
                HostName::Address(address) => names.ip(&address.to_string()),
            };
        }
        let names = names.build(&builder.x509v3_context(Some(authority), None))?;
        builder.append_extension(names)?;
    }
    let context = builder.x509v3_context(Some(authority), None);
    let own = SubjectKeyIdentifier::new().build(&context)?;
    let issuer = AuthorityKeyIdentifier::new().keyid(false).build(&context)?;
    builder.append_extension(own)?;
    builder.append_extension(issuer)?;
    builder.sign(authority_key, MessageDigest::sha256())?;
    Ok(builder.build())
}

fn begin(
    subject: &X509NameRef,
    issuer: &X509NameRef,
    end: &Asn1TimeRef,
) -> Result<X509Builder, ErrorStack> {
    let mut builder = X509::builder()?;
    // Numbered from 0: version 3.
    builder.set_version(2)?;
    let mut serial = BigNum::new()?;
    serial.rand(SERIAL_BITS, MsbOption::ONE, false)?;
    builder.set_serial_number(&*Asn1Integer::from_bn(&serial)?)?;
    builder.set_subject_name(subject)?;
    builder.set_issuer_name(issuer)?;
    let start = i64::try_from(now().saturating_sub(EARLIER)).unwrap_or(i64::MAX);
    builder.set_not_before(&*Asn1Time::from_unix(start)?)?;
    builder.set_not_after(end)?;
    Ok(builder)
}

/// Returns the time, in seconds since 1970.
#[must_use]
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn in_days(days: u32) -> i64 {
    i64::try_from(now() + u64::from(days) * SECONDS_PER_DAY).unwrap_or(i64::MAX)
}

/// Returns a time as seconds since 1970; 0 for earlier ones.
#[must_use]
pub(super) fn seconds(time: &Asn1TimeRef) -> u64 {
    let since = Asn1Time::from_unix(0).and_then(|epoch| epoch.diff(time));
    since.map_or(0, |since| {
        let days = u64::try_from(since.days).unwrap_or(0);
        days * SECONDS_PER_DAY + u64::try_from(since.secs).unwrap_or(0)
    })
}

/// Returns how many days a certificate is valid in all, at least 1.
pub(super) fn lifetime_days(certificate: &X509Ref) -> u32 {
    let difference = certificate.not_before().diff(certificate.not_after());
    difference.ok().and_then(|time| u32::try_from(time.days).ok()).unwrap_or(1).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_never_outlives_its_authority() {
        let key = new_key().unwrap();
        let name = subject(None, "test").unwrap();
        let authority = self_signed(&name, &key, 10).unwrap();
        let request = Request {
            role: Role::Client,
            subject: &name,
            names: &[],
            key: &public_half(&key).unwrap(),
            days: 100,
        };
        let long = issue(&authority, &key, &request).unwrap();
        assert_eq!(seconds(long.not_after()), seconds(authority.not_after()));
        let short = issue(&authority, &key, &Request { days: 5, ..request }).unwrap();
        assert_eq!(lifetime_days(&short), 5);
        assert!(short.verify(&key).unwrap() && short.not_after() < authority.not_after());
    }
}
