//! Reads URIs.

use core::net::Ipv6Addr;
use std::str::FromStr;

use percent_encoding::percent_decode_str;

use super::{NbdUri, Security, TlsKind, TlsParameters, Transport, UriError};
use crate::limits::{DEFAULT_PORT, MAX_STRING_LEN};

impl FromStr for NbdUri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err(UriError::NoScheme(text.to_owned()));
        };
        let (security, is_unix) = match scheme.to_ascii_lowercase().as_str() {
            "nbd" | "nbd+tcp" => (Security::Plain, false),
            "nbds" | "nbds+tcp" => (Security::Tls, false),
            "nbd+unix" => (Security::Plain, true),
            "nbds+unix" => (Security::Tls, true),
            _ => return Err(UriError::UnknownScheme(scheme.to_owned())),
        };
        if rest.contains('#') {
            return Err(UriError::Fragment);
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (user, host) = match authority.rsplit_once('@') {
            Some(("", host)) => (None, host),
            Some((user, host)) => (Some(decode("user name", user)?), host),
            None => (None, authority),
        };
        let parameters = Parameters::parse(query)?;
        let export_name = decode("export name", path)?;
        if export_name.len() > MAX_STRING_LEN {
            return Err(UriError::BadText {
                what: "export name",
                why: "is longer than 4096 bytes",
            });
        }
        let transport = match (is_unix, parameters.socket) {
            (true, Some(path)) if host.is_empty() => Transport::Unix { path: path.into() },
            (true, Some(_)) => return Err(UriError::HostWithSocket),
            (true, None) => return Err(UriError::NoSocket),
            (false, Some(_)) => return Err(UriError::SocketWithTcp),
            (false, None) => tcp(host)?,
        };
        Ok(Self { transport, security, export_name, user, tls: parameters.tls })
    }
}

/// Reads `HOST[:PORT]`; no host means this machine.
fn tcp(authority: &str) -> Result<Transport, UriError> {
    let bad_address = || UriError::BadAddress(authority.to_owned());
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (address, behind) = rest.split_once(']').ok_or_else(bad_address)?;
        let address = decode("host", address)?;
        let (number, zone) = address.split_once('%').unwrap_or((&address, "zone"));
        if number.parse::<Ipv6Addr>().is_err() || zone.is_empty() || zone.contains(is_no_host) {
            return Err(bad_address());
        }
        match behind.strip_prefix(':') {
            Some(port) => (address, port),
            None if behind.is_empty() => (address, ""),
            None => return Err(bad_address()),
        }
    } else {
        let (host, port) = authority.split_once(':').unwrap_or((authority, ""));
        if port.contains(':') {
            return Err(bad_address());
        }
        let host = if host.is_empty() { "localhost" } else { host };
        let host = decode("host", host)?;
        if host.contains(is_no_host) {
            return Err(bad_address());
        }
        (host, port)
    };
    let port = match port {
        "" => DEFAULT_PORT,
        digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => match digits.parse() {
            Ok(port @ 1..) => port,
            _ => return Err(UriError::BadPort(digits.to_owned())),
        },
        other => return Err(UriError::BadPort(other.to_owned())),
    };
    Ok(Transport::Tcp { host, port })
}

/// Whether a character is legal neither in a host name nor in the zone of an IPv6 address.
fn is_no_host(character: char) -> bool {
    character.is_control() || character.is_whitespace() || "/[]:@".contains(character)
}

#[derive(Default)]
struct Parameters {
    socket: Option<String>,
    tls: TlsParameters,
}

impl Parameters {
    fn parse(query: &str) -> Result<Self, UriError> {
        let mut parameters = Self::default();
        for pair in query.split(['&', ';']) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let tls = &mut parameters.tls;
            match decode("parameter name", key)?.as_str() {
                "socket" if value.is_empty() => return Err(UriError::NoSocket),
                "socket" => parameters.socket = Some(decode("parameter socket", value)?),
                "tls-type" => tls.kind = Some(tls_kind(&decode("parameter tls-type", value)?)?),
                key @ ("tls-certificates" | "tls-psk-file" | "tls-hostname")
                    if value.is_empty() =>
                {
                    return Err(UriError::EmptyParameter { key: key.to_owned() });
                }
                "tls-certificates" => {
                    tls.certificates = Some(decode("parameter tls-certificates", value)?.into());
                }
                "tls-psk-file" => {
                    tls.psk_file = Some(decode("parameter tls-psk-file", value)?.into());
                }
                "tls-hostname" => {
                    tls.hostname = Some(decode("parameter tls-hostname", value)?);
                }
                "tls-verify-peer" => {
                    let value = decode("parameter tls-verify-peer", value)?;
                    tls.verify_peer = Some(boolean("tls-verify-peer", &value)?);
                }
                _ => {}
            }
        }
        Ok(parameters)
    }
}

fn tls_kind(value: &str) -> Result<TlsKind, UriError> {
    [TlsKind::Anonymous, TlsKind::X509, TlsKind::PreSharedKey]
        .into_iter()
        .find(|kind| kind.as_str() == value)
        .ok_or_else(|| UriError::BadParameter {
            key: "tls-type",
            value: value.to_owned(),
            legal: "anon, x509 or psk",
        })
}

fn boolean(key: &'static str, value: &str) -> Result<bool, UriError> {
    match value.to_ascii_lowercase().as_str() {
        "1" | "true" | "t" | "yes" | "y" | "on" => Ok(true),
        "0" | "false" | "f" | "no" | "n" | "off" => Ok(false),
        _ => Err(UriError::BadParameter { key, value: value.to_owned(), legal: "true or false" }),
    }
}

/// Percent-decodes one part. A `+` stays a `+`: it means a space only in HTML forms.
fn decode(what: &'static str, text: &str) -> Result<String, UriError> {
    let mut rest = text.as_bytes();
    while let Some((&byte, behind)) = rest.split_first() {
        rest = behind;
        if byte == b'%' && !behind.get(..2).is_some_and(|two| two.iter().all(u8::is_ascii_hexdigit))
        {
            return Err(UriError::BadPercent(text.to_owned()));
        }
    }
    let decoded = percent_decode_str(text)
        .decode_utf8()
        .map_err(|_| UriError::BadText { what, why: "is not UTF-8" })?;
    if decoded.contains('\0') {
        return Err(UriError::BadText { what, why: "contains a NUL byte" });
    }
    Ok(decoded.into_owned())
}
