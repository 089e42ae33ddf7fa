//! Exports of other servers as sources: the driver `nbd` and the names that stand for it.

use nbd_proto::limits::DEFAULT_PORT;
use nbd_proto::uri::{NbdUri, Security, TlsParameters, Transport};

use super::key_values::KeyValues;

/// Whether a file name is one of a server: `nbd:HOST:PORT`, `nbd:unix:PATH`, or a URI.
pub(super) fn is_name_of_server(text: &str) -> bool {
    let scheme = text.split_once(':').map(|(scheme, _)| scheme);
    matches!(scheme, Some("nbd" | "nbd+tcp" | "nbd+unix" | "nbds" | "nbds+tcp" | "nbds+unix"))
}

/// The server and export that such a name stands for.
///
/// # Errors
///
/// A sentence about what is wrong with it.
pub(super) fn from_name(text: &str) -> Result<NbdUri, String> {
    let Some(rest) = text.strip_prefix("nbd:").filter(|rest| !rest.starts_with("//")) else {
        return text.parse().map_err(|error: nbd_proto::uri::UriError| error.to_string());
    };
    let (address, export_name) = match rest.split_once(":exportname=") {
        Some((address, name)) => (address, name),
        None => (rest, ""),
    };
    let transport = match (address.strip_prefix("unix:"), address.rsplit_once(':')) {
        (Some(path), _) => Transport::Unix { path: path.into() },
        (None, Some((host, port))) => tcp(host, Some(port))?,
        (None, None) => return Err(format!("'{text}' has no port; write nbd://{rest}/ instead")),
    };
    Ok(uri(transport, export_name))
}

/// The server and export that the options of the driver describe, in the nested form or in the flat
/// one (`host`, `port`, `path`).
///
/// # Errors
///
/// A sentence that names the option.
pub(super) fn from_options(options: &mut KeyValues) -> Result<NbdUri, String> {
    let mut server = options.take_below("server");
    if server.is_empty() {
        for key in ["host", "port", "path"] {
            if let Some(value) = options.take(key) {
                server.set(key, value);
            }
        }
    }
    let kind = server.take("type");
    let transport = match (kind.as_deref(), server.take("path"), server.take("host")) {
        (None | Some("unix"), Some(path), None) => Transport::Unix { path: path.into() },
        (None | Some("inet"), None, Some(host)) => tcp(&host, server.take("port").as_deref())?,
        (Some(kind @ ("vsock" | "fd")), ..) => {
            return Err(format!("server.type={kind} is not supported; use inet or unix"));
        }
        _ => return Err("the driver 'nbd' needs either server.host or server.path".to_owned()),
    };
    if let Some(key) = server.left_over() {
        return Err(format!("the option 'server.{key}' is not supported"));
    }
    for key in ["tls-creds", "tls-hostname", "x-dirty-bitmap"] {
        if options.take(key).is_some() {
            return Err(format!("the option '{key}' of the driver 'nbd' is not supported"));
        }
    }
    for key in ["reconnect-delay", "open-timeout"] {
        if options.take(key).is_some_and(|value| value != "0") {
            return Err(format!("the option '{key}' of the driver 'nbd' can only be 0"));
        }
    }
    let export_name = options.take("export").unwrap_or_default();
    Ok(uri(transport, &export_name))
}

fn tcp(host: &str, port: Option<&str>) -> Result<Transport, String> {
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let port = match port {
        None => DEFAULT_PORT,
        Some(port) => port.parse().map_err(|_| format!("'{port}' is not a port"))?,
    };
    match host {
        "" => Err("the name of the server's host is empty".to_owned()),
        host => Ok(Transport::Tcp { host: host.to_owned(), port }),
    }
}

fn uri(transport: Transport, export_name: &str) -> NbdUri {
    NbdUri {
        transport,
        security: Security::Plain,
        export_name: export_name.to_owned(),
        user: None,
        tls: TlsParameters::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_forms_of_a_name_lead_to_the_same_server() {
        let unix = "nbd+unix:///disk?socket=/run/s";
        assert_eq!(from_name(unix).unwrap().to_string(), unix);
        assert_eq!(from_name("nbd:unix:/run/s:exportname=disk").unwrap().to_string(), unix);
        let tcp = "nbd://example.org:10810/disk";
        assert_eq!(from_name(tcp).unwrap().to_string(), tcp);
        assert_eq!(from_name("nbd:example.org:10810:exportname=disk").unwrap().to_string(), tcp);
        for (text, expected) in [
            ("server.type=unix,server.path=/run/s,export=disk", unix),
            ("path=/run/s,export=disk", unix),
            ("server.host=example.org,server.port=10810,export=disk,reconnect-delay=0", tcp),
        ] {
            let mut options = KeyValues::parse(text, None).unwrap();
            assert_eq!(from_options(&mut options).unwrap().to_string(), expected);
            assert!(options.is_empty(), "{options:?}");
        }
    }

    #[test]
    fn what_is_missing_or_not_supported_is_named() {
        for (text, part) in [
            ("export=disk", "server.host"),
            ("server.host=a,server.path=b", "server.host"),
            ("server.host=a,server.port=x", "'x'"),
            ("server.host=a,tls-creds=b", "tls-creds"),
            ("server.path=a,reconnect-delay=5", "reconnect-delay"),
            ("server.host=a,server.to=5", "server.to"),
        ] {
            let mut options = KeyValues::parse(text, None).unwrap();
            let error = from_options(&mut options).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
        assert!(from_name("nbd:host").is_err());
        assert!(is_name_of_server("nbd:host:1") && !is_name_of_server("./nbd:host"));
    }
}
