//! Combines the TLS settings of the caller and of the URI.

use std::path::PathBuf;

use nbd_proto::NbdUri;
use nbd_proto::tls::KeyPassword;
use nbd_proto::uri::{Security, TlsKind, Transport};

use super::{KeySource, LocalFiles, TlsError, TlsMode, TlsOptions, VerifyPeer};

/// The TLS settings of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Setup {
    pub(crate) mode: TlsMode,
    pub(crate) credentials: Credentials,
}

/// The authentication of both sides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Credentials {
    X509 {
        /// Without a directory the machine's trusted authorities are used.
        directory: Option<PathBuf>,
        key_password: Option<KeyPassword>,
        /// The expected name in the server's certificate; present if the certificate is verified.
        server_name: Option<String>,
        verify: VerifyPeer,
    },
    PreSharedKey {
        keys: KeySource,
        user: Option<String>,
    },
}

/// Combines the settings of the caller and of the URI; returns `None` for a connection without TLS.
pub(crate) fn setup(
    uri: &NbdUri,
    options: Option<&TlsOptions>,
    files: LocalFiles,
) -> Result<Option<Setup>, TlsError> {
    let mode = match (uri.security, options.map(|options| options.mode)) {
        (Security::Plain, mode) => mode.unwrap_or(TlsMode::Off),
        // Any other security is at least as strict as TLS.
        (_, Some(TlsMode::Off)) => return Err(TlsError::Contradiction),
        (_, _) => TlsMode::Require,
    };
    if mode == TlsMode::Off {
        return Ok(None);
    }
    let default = TlsOptions::default();
    let credentials = credentials(uri, options.unwrap_or(&default), files)?;
    Ok(Some(Setup { mode, credentials }))
}

fn credentials(
    uri: &NbdUri,
    options: &TlsOptions,
    files: LocalFiles,
) -> Result<Credentials, TlsError> {
    let is_told = options.certificates.is_some() || options.pre_shared_keys.is_some();
    let (directory, keys, kind) = if is_told {
        (options.certificates.clone(), options.pre_shared_keys.clone(), None)
    } else {
        match uri.tls.file_parameter() {
            Some(parameter) if files == LocalFiles::Refused => {
                return Err(TlsError::LocalFile(parameter));
            }
            _ => {
                let keys = uri.tls.psk_file.clone().map(KeySource::File);
                (uri.tls.certificates.clone(), keys, uri.tls.kind)
            }
        }
    };
    let user = options.user.clone().or_else(|| uri.user.clone());
    match kind {
        Some(TlsKind::Anonymous) => return Err(TlsError::Anonymous),
        // A directory may hold both kinds.
        Some(TlsKind::PreSharedKey) => {
            let keys = keys.or(directory.map(KeySource::File)).ok_or(TlsError::NoKeyFile)?;
            return Ok(Credentials::PreSharedKey { keys, user });
        }
        Some(TlsKind::X509) => {}
        None => {
            if let Some(keys) = keys {
                return Ok(Credentials::PreSharedKey { keys, user });
            }
        }
        Some(kind) => return Err(TlsError::UnsupportedKind(kind)),
    }
    let verify = match (options.verify_peer, uri.tls.verify_peer) {
        (Some(verify), _) => verify,
        (None, Some(false)) => VerifyPeer::Off,
        (None, _) => VerifyPeer::Required,
    };
    let server_name =
        options.hostname.clone().or_else(|| uri.tls.hostname.clone()).or_else(|| host(uri));
    if server_name.is_none() && verify == VerifyPeer::Required {
        return Err(TlsError::NoHostName);
    }
    let key_password = match (&options.key_password, is_told) {
        (Some(password), _) => Some(password.clone()),
        // That of the URI is for the certificates of the URI.
        (None, false) => uri.tls.key_password.clone(),
        (None, true) => None,
    };
    Ok(Credentials::X509 { directory, key_password, server_name, verify })
}

/// The host of the URI, without the zone of an IPv6 address, which is meaningful on this machine
/// only.
fn host(uri: &NbdUri) -> Option<String> {
    match &uri.transport {
        Transport::Tcp { host, .. } => {
            Some(host.split_once('%').map_or(host.as_str(), |(host, _)| host).to_owned())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(uri: &str, options: Option<&TlsOptions>) -> Result<Option<Setup>, TlsError> {
        setup(&uri.parse().unwrap(), options, LocalFiles::Allowed)
    }

    fn x509(uri: &str, options: Option<&TlsOptions>) -> (Option<PathBuf>, Option<String>) {
        match of(uri, options).unwrap().unwrap().credentials {
            Credentials::X509 { directory, server_name, .. } => (directory, server_name),
            other => panic!("{other:?}"),
        }
    }

    fn key(uri: &str, options: Option<&TlsOptions>) -> (PathBuf, Option<String>) {
        match of(uri, options).unwrap().unwrap().credentials {
            Credentials::PreSharedKey { keys: KeySource::File(file), user } => (file, user),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn nbds_requires_tls_whatever_is_preferred_and_nbd_has_none_unless_asked() {
        let prefer = TlsOptions::new(TlsMode::Prefer);
        assert_eq!(of("nbds://h/", Some(&prefer)).unwrap().unwrap().mode, TlsMode::Require);
        assert_eq!(of("nbds://h/", None).unwrap().unwrap().mode, TlsMode::Require);
        assert_eq!(of("nbd://h/", Some(&prefer)).unwrap().unwrap().mode, TlsMode::Prefer);
        assert_eq!(of("nbd://h/?tls-psk-file=/k", None).unwrap(), None);
        let off = TlsOptions::new(TlsMode::Off);
        assert!(matches!(of("nbds://h/", Some(&off)), Err(TlsError::Contradiction)));
    }

    #[test]
    fn the_name_to_verify_is_the_host_unless_another_is_given() {
        assert_eq!(x509("nbds://h:1/", None), (None, Some("h".into())));
        assert_eq!(x509("nbds://[fe80::1%25eth0]/", None).1.unwrap(), "fe80::1");
        assert_eq!(x509("nbds://h/?tls-hostname=x", None).1.unwrap(), "x");
        let options = TlsOptions::new(TlsMode::Require).hostname("y");
        assert_eq!(x509("nbds://h/?tls-hostname=x", Some(&options)).1.unwrap(), "y");
        let unix = "nbds+unix:///?socket=/s";
        let error = of("nbds+unix://alice@/?socket=/s", None).unwrap_err();
        assert!(error.to_string().contains("tls-psk-file=FILE"), "{error}");
        assert!(matches!(of(unix, None), Err(TlsError::NoHostName)));
        assert_eq!(x509(unix, Some(&options)).1.unwrap(), "y");
        assert_eq!(x509(&format!("{unix}&tls-verify-peer=off"), None).1, None);
        assert_eq!(key(&format!("{unix}&tls-psk-file=/k"), None).0, PathBuf::from("/k"));
    }

    #[test]
    fn options_go_before_the_uri_and_the_type_decides_between_both_kinds() {
        let both = "nbds://me@h/?tls-certificates=/c&tls-psk-file=/k";
        assert_eq!(key(both, None), ("/k".into(), Some("me".into())));
        assert_eq!(x509(&format!("{both}&tls-type=x509"), None).0.unwrap(), PathBuf::from("/c"));
        let directory = "nbds://h/?tls-certificates=/c&tls-type=psk";
        assert_eq!(key(directory, None), ("/c".into(), None));
        let options = TlsOptions::new(TlsMode::Require).certificates("/d").user("you");
        assert_eq!(x509(both, Some(&options)).0.unwrap(), PathBuf::from("/d"));
        let options = options.pre_shared_keys("/e");
        assert_eq!(key(both, Some(&options)), ("/e".into(), Some("you".into())));
        assert!(matches!(of("nbds://h/?tls-type=psk", None), Err(TlsError::NoKeyFile)));
        assert!(matches!(of("nbds://h/?tls-type=anon", None), Err(TlsError::Anonymous)));
    }

    #[test]
    fn a_uri_names_local_files_only_if_the_caller_allows_it() {
        let uri: NbdUri = "nbds://h/?tls-psk-file=/k".parse().unwrap();
        let refused = setup(&uri, None, LocalFiles::Refused);
        assert!(matches!(refused, Err(TlsError::LocalFile("tls-psk-file"))), "{refused:?}");
        let options = TlsOptions::new(TlsMode::Require).certificates("/c");
        assert!(setup(&uri, Some(&options), LocalFiles::Refused).is_ok());
    }
}
