//! NBD URIs: their meaning, and one clear sentence for each invalid one.

use nbd_proto::NbdUri;
use nbd_proto::limits::DEFAULT_PORT;
use nbd_proto::uri::{Security, TlsKind, Transport, UriError};

fn parse(text: &str) -> NbdUri {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn error(text: &str) -> UriError {
    match text.parse::<NbdUri>() {
        Ok(uri) => panic!("{text} was read as {uri:?}"),
        Err(error) => error,
    }
}

fn tcp(host: &str, port: u16) -> Transport {
    Transport::Tcp { host: host.into(), port }
}

#[test]
fn tcp_uris_name_host_port_and_export() {
    for (text, host, port, name) in [
        ("nbd://example.org", "example.org", DEFAULT_PORT, ""),
        ("nbd://example.org/", "example.org", DEFAULT_PORT, ""),
        ("nbd://example.org:1234/disk", "example.org", 1234, "disk"),
        ("nbd://example.org:/disk", "example.org", DEFAULT_PORT, "disk"),
        ("nbd+tcp://127.0.0.1/disk", "127.0.0.1", DEFAULT_PORT, "disk"),
        ("NBD://h/Disk", "h", DEFAULT_PORT, "Disk"),
        ("nbd://", "localhost", DEFAULT_PORT, ""),
        ("nbd:///disk", "localhost", DEFAULT_PORT, "disk"),
        ("nbd://:77/disk", "localhost", 77, "disk"),
        ("nbd://[::1]/disk", "::1", DEFAULT_PORT, "disk"),
        ("nbd://[2001:db8::1]:77", "2001:db8::1", 77, ""),
        ("nbd://[fe80::1%25eth0]:77/x", "fe80::1%eth0", 77, "x"),
        ("nbd://[fe80::1%25a%3fb%23%25]/", "fe80::1%a?b#%", DEFAULT_PORT, ""),
    ] {
        let uri = parse(text);
        assert_eq!(uri.transport, tcp(host, port), "{text}");
        assert_eq!(uri.export_name, name, "{text}");
        assert_eq!(uri.security, Security::Plain);
        assert_eq!(parse(&uri.to_string()), uri, "{text}");
    }
}

#[test]
fn export_names_are_decoded_and_never_normalised() {
    for (path, name) in [
        ("/disk", "/disk"),
        ("//", "//"),
        ("a/../b", "a/../b"),
        (".", "."),
        ("..", ".."),
        ("./a//b/", "./a//b/"),
        ("a%2fb", "a/b"),
        ("%25", "%"),
        ("a+b", "a+b"),
        ("vm%201", "vm 1"),
        ("gr%C3%BCn", "grün"),
        ("a%3Fb%23c", "a?b#c"),
    ] {
        let uri = parse(&format!("nbd://host/{path}"));
        assert_eq!(uri.export_name, name, "{path}");
        assert_eq!(parse(&uri.to_string()), uri, "{path}");
    }
}

#[test]
fn unix_uris_name_a_socket() {
    let uri = parse("nbd+unix:///vm?socket=/run/my%20nbd.sock");
    assert_eq!(uri.transport, Transport::Unix { path: "/run/my nbd.sock".into() });
    assert_eq!(uri.export_name, "vm");
    assert_eq!(uri.to_string(), "nbd+unix:///vm?socket=/run/my%20nbd.sock");
    let uri = parse("nbds+unix://me@/?socket=relative&ignored=1");
    assert_eq!(uri.security, Security::Tls);
    assert_eq!(uri.user.as_deref(), Some("me"));
    assert_eq!(parse("nbd+unix://?socket=s").export_name, "");
}

#[test]
fn tls_parameters_are_understood() {
    let uri = parse(
        "nbds://me%40here@host/x?tls-type=psk&tls-psk-file=/etc/keys.psk&tls-verify-peer=false\
         &tls-hostname=other&tls-certificates=/etc/pki",
    );
    assert_eq!(uri.security, Security::Tls);
    assert_eq!(uri.user.as_deref(), Some("me@here"));
    assert_eq!(uri.tls.kind, Some(TlsKind::PreSharedKey));
    assert_eq!(uri.tls.psk_file, Some("/etc/keys.psk".into()));
    assert_eq!(uri.tls.certificates, Some("/etc/pki".into()));
    assert_eq!(uri.tls.hostname.as_deref(), Some("other"));
    assert_eq!(uri.tls.verify_peer, Some(false));
    assert_eq!(parse(&uri.to_string()), uri);
    assert_eq!(uri.user.as_deref(), Some("me@here"));
    assert_eq!(uri.tls.file_parameter(), Some("tls-certificates"));
    assert_eq!(parse("nbds://h/?tls-psk-file=k").tls.file_parameter(), Some("tls-psk-file"));
    assert_eq!(parse("nbds://h/?tls-hostname=k").tls.file_parameter(), None);
    assert_eq!(parse("nbds://@h/").user, None, "an empty name is not a user");
    assert_eq!(parse("nbds://h/?tls-type=x509").tls.kind, Some(TlsKind::X509));
    assert_eq!(parse("nbds://h/?tls-type=anon").tls.kind, Some(TlsKind::Anonymous));
}

#[test]
fn unknown_parameters_are_ignored_and_the_last_of_several_counts() {
    let uri = parse("nbd+unix:///?novel=1&socket=a&socket=b&flag;other=2");
    assert_eq!(uri.transport, Transport::Unix { path: "b".into() });
}

#[test]
fn every_malformed_uri_gives_its_own_error() {
    let texts = |error: UriError| error.to_string();
    assert!(matches!(error(""), UriError::NoScheme(_)));
    assert!(matches!(error("disk.img"), UriError::NoScheme(_)));
    assert!(matches!(error("nbd:localhost:10809"), UriError::NoScheme(_)));
    assert!(matches!(error("nbd:disk"), UriError::NoScheme(_)));
    assert!(matches!(error("http://host/"), UriError::UnknownScheme(_)));
    assert!(matches!(error("nbd+vsock://2/"), UriError::UnknownScheme(_)));
    assert!(matches!(error("nbd+ssh://-oProxyCommand=x/"), UriError::UnknownScheme(_)));
    assert_eq!(error("nbd://host/a#b"), UriError::Fragment);
    for bad in ["%", "%1", "%zz", "a%2", "%+1"] {
        assert!(matches!(error(&format!("nbd://host/{bad}")), UriError::BadPercent(_)), "{bad}");
    }
    assert!(texts(error("nbd://host/%00")).contains("NUL"));
    assert!(texts(error("nbd://host/%ff")).contains("UTF-8"));
    let long = "a".repeat(4097);
    assert!(texts(error(&format!("nbd://host/{long}"))).contains("4096"));
    for bad in ["0", "65536", "http", "-1", "+1", "99999999999"] {
        assert!(matches!(error(&format!("nbd://host:{bad}/")), UriError::BadPort(_)), "{bad}");
    }
    for bad in [
        "::1",
        "[::1",
        "[::1]x",
        "[host]",
        "[]",
        "a b",
        "[::1%25]",
        "[::1%25a%20b]",
        "[::1%25a%2fb]",
    ] {
        assert!(matches!(error(&format!("nbd://{bad}/")), UriError::BadAddress(_)), "{bad}");
    }
    assert_eq!(error("nbd+unix:///disk"), UriError::NoSocket);
    assert_eq!(error("nbd+unix:///disk?socket="), UriError::NoSocket);
    assert_eq!(error("nbd+unix://host/disk?socket=/s"), UriError::HostWithSocket);
    assert_eq!(error("nbd://host/disk?socket=/s"), UriError::SocketWithTcp);
    assert!(texts(error("nbds://h/?tls-type=none")).contains("anon, x509 or psk"));
    assert!(texts(error("nbds://h/?tls-psk-file=")).contains("tls-psk-file has no value"));
    assert!(texts(error("nbds://h/?tls-verify-peer=maybe")).contains("true or false"));
}

#[test]
fn every_error_is_one_sentence_with_an_example() {
    for text in
        ["disk", "http://h/", "nbd://h/#", "nbd://h/%", "nbd://h/%00", "nbd://h:x/", "nbd+unix:///"]
    {
        let message = error(text).to_string();
        assert!(!message.contains('\n') && message.len() < 200, "{message}");
        assert!(message.contains("nbd") || message.contains("%25"), "no example: {message}");
    }
}
