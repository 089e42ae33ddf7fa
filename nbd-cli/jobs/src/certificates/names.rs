//! The names in certificates: hosts, clients and distinguished names.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use openssl::nid::Nid;
use openssl::x509::{X509NameRef, X509Ref};

/// Longest common name and organization, in characters (RFC 5280, appendix A).
const MAX_TEXT: usize = 64;

/// A name under which clients connect to a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostName {
    /// A DNS name, possibly with the wildcard `*` as its first label.
    Dns(String),
    /// An address.
    Address(IpAddr),
}

impl FromStr for HostName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        let no_name = |why: &str| Err(format!("it is not the name of a host: {why}"));
        if text.starts_with('[') || text.contains(['/', ':', '%']) {
            return no_name("give a name or an address alone, without scheme, port, zone and []");
        }
        if !text.is_ascii() {
            return no_name("give an international name in its ASCII form, which begins with xn--");
        }
        let labels: Vec<&str> = text.split('.').collect();
        let is_label = |(position, label): (usize, &&str)| {
            let is_wildcard = position == 0 && *label == "*" && labels.len() > 2;
            let is_word = (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
            is_wildcard || is_word
        };
        if text.len() > 253 || !labels.iter().enumerate().all(is_label) {
            return no_name(
                "a name has labels of up to 63 letters, digits and '-', separated by '.'",
            );
        }
        if labels.last().is_some_and(|label| label.bytes().all(|byte| byte.is_ascii_digit())) {
            return no_name("the last label of a name is not a number");
        }
        Ok(Self::Dns(text.to_owned()))
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dns(name) => f.write_str(name),
            Self::Address(address) => address.fmt(f),
        }
    }
}

/// The names of a certificate that are neither DNS names nor addresses cannot be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OtherNames;

/// Returns the host names of a certificate.
///
/// # Errors
///
/// [`OtherNames`], if it has names of other kinds.
pub(super) fn host_names(certificate: &X509Ref) -> Result<Vec<HostName>, OtherNames> {
    let names = certificate.subject_alt_names();
    let name = |name: &openssl::x509::GeneralNameRef| match (name.dnsname(), name.ipaddress()) {
        // The text of a foreign certificate need not be a name.
        (Some(text), _) => match text.parse() {
            Ok(HostName::Dns(name)) => Ok(HostName::Dns(name)),
            _ => Err(OtherNames),
        },
        (None, Some(bytes)) => address(bytes).map(HostName::Address).ok_or(OtherNames),
        (None, None) => Err(OtherNames),
    };
    names.iter().flatten().map(name).collect()
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Some(bytes.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

/// Parses a common name or an organization: up to 64 characters of text.
///
/// # Errors
///
/// A phrase with the reason.
pub fn parse_text(text: &str) -> Result<String, String> {
    let length = text.chars().count();
    match text {
        "" => Err("it is empty".to_owned()),
        _ if length > MAX_TEXT => {
            Err(format!("it has {length} characters; a certificate holds {MAX_TEXT}"))
        }
        _ if text.contains(char::is_control) => Err("it has a control character".to_owned()),
        _ => Ok(text.to_owned()),
    }
}

/// Returns the common name for a server with these names.
#[must_use]
pub fn common_name(names: &[HostName]) -> String {
    let names = names.iter().map(ToString::to_string);
    let fitting = names.into_iter().find(|name| name.len() <= MAX_TEXT);
    // Clients look at the list of names, not here.
    fitting.unwrap_or_else(|| "NBD server".to_owned())
}

/// Formats a distinguished name as `--tls-authz` expects it, the most specific part first.
#[must_use]
pub(super) fn distinguished_name(name: &X509NameRef) -> String {
    let attribute_of = |entry: &openssl::x509::X509NameEntryRef| {
        let object = entry.object();
        let attribute = match object.nid() {
            Nid::PKCS9_EMAILADDRESS => "EMAIL".to_owned(),
            Nid::UNDEF => object.to_string(),
            nid => nid.short_name().map_or_else(|_| object.to_string(), str::to_owned),
        };
        let value = entry.data().to_string().unwrap_or_default();
        let mut escaped = String::with_capacity(value.len());
        for character in value.chars() {
            if matches!(character, ',' | '+' | '"' | '\\' | '<' | '>' | ';') {
                escaped.push('\\');
            }
            escaped.push(character);
        }
        format!("{attribute}={escaped}")
    };
    let mut parts: Vec<_> = name.entries().map(attribute_of).collect();
    parts.reverse();
    parts.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses_are_told_apart() {
        for (text, address) in [
            ("vmhost", false),
            ("a_b.example.com", false),
            ("*.example.com", false),
            ("4.example", false),
            ("192.0.2.7", true),
            ("::1", true),
        ] {
            let name: HostName = text.parse().unwrap();
            assert_eq!(matches!(name, HostName::Address(_)), address, "{text}");
            assert_eq!(name.to_string(), text);
        }
    }

    #[test]
    fn what_no_client_can_ask_for_is_refused() {
        let long = ["a"; 200].join(".");
        for text in [
            "",
            ".",
            "a..b",
            "a.",
            "-a",
            "a b",
            "a,IP:10.0.0.1",
            "10.0.0.300",
            "[::1]",
            "fe80::1%eth0",
            "nbd://host",
            "host:10809",
            "h\u{f6}st",
            "*",
            "*.com",
            "a.*.example.com",
            &"x".repeat(64),
            &long,
        ] {
            assert!(text.parse::<HostName>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_common_name_fits_into_a_certificate() {
        let long: HostName = format!("{0}.{0}", "x".repeat(40)).parse().unwrap();
        assert_eq!(common_name(&[long.clone(), "short".parse().unwrap()]), "short");
        assert_eq!(common_name(&[long]), "NBD server");
        assert!(parse_text(&"\u{fc}".repeat(64)).is_ok() && parse_text(&"x".repeat(65)).is_err());
        assert!(parse_text("").is_err() && parse_text("a\nb").is_err());
    }
}
