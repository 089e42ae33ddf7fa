//! TLS options of `serve`.

use std::path::{Path, PathBuf};

use clap::{ArgAction, Args, ValueEnum};
use nbd_jobs::tasks;
use nbd_jobs::text::without_error_numbers;
use nbd_proto::tls::{
    CA_CERTIFICATE_FILE, CLIENT_CERTIFICATE_FILE, CLIENT_KEY_FILE, KeyPassword, PSK_FILE,
};
use nbd_proto::uri::{NbdUri, Security, Transport};
use nbd_server::BoundAddress;
use nbd_server::tls::{
    Authorization, ClientCertificates, CredentialSource, TlsCredentials, TlsMode,
};
use tokio::signal::unix::{SignalKind, signal};

use crate::error::CommandError;
use crate::key_file::key_password_parser;
use crate::serving::service_manager;

/// The options.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "TLS")]
pub struct TlsArgs {
    /// Whether clients may or must use TLS; required once there are credentials.
    #[arg(long, value_enum, value_name = "MODE")]
    pub tls: Option<TlsChoice>,

    /// Directory with server-cert.pem and server-key.pem, the ca-cert.pem that signed the clients'
    /// certificates, and optionally ca-crl.pem. Read again on SIGHUP.
    #[arg(long, value_name = "DIR", conflicts_with = "tls_psk")]
    pub tls_certificates: Option<PathBuf>,

    /// File with the password of server-key.pem, in its first line, if the key is encrypted.
    #[arg(long, value_name = "FILE", requires = "tls_certificates",
          value_parser = key_password_parser())]
    pub tls_key_password_file: Option<KeyPassword>,

    /// File with users and their keys, as 'nbd-cli tls psk' and psktool write it. Read again on
    /// SIGHUP.
    #[arg(long, value_name = "FILE")]
    pub tls_psk: Option<PathBuf>,

    /// Whether clients must present a certificate.
    #[arg(long, value_name = "on|off", default_value = "on", action = ArgAction::Set,
          value_parser = on_or_off)]
    pub tls_verify_peer: bool,

    /// Admit only clients whose certificate has such a distinguished name: a pattern like
    /// 'CN=laptop-*,O=Example', or a file with one pattern per line, read for each client. Patterns
    /// may be repeated.
    #[arg(long, value_name = "FILE|PATTERN")]
    pub tls_authz: Vec<String>,

    /// With --tls=allow: serve and list this export over TLS only. May be repeated.
    #[arg(long, value_name = "NAME")]
    pub tls_only: Vec<String>,
}

/// The values of `--tls`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TlsChoice {
    /// No TLS.
    Off,
    /// Clients may use TLS.
    Allow,
    /// Clients must use TLS.
    Require,
}

fn on_or_off(text: &str) -> Result<bool, String> {
    match text {
        "on" | "yes" | "true" => Ok(true),
        "off" | "no" | "false" => Ok(false),
        _ => Err("use on or off".to_owned()),
    }
}

impl TlsArgs {
    /// Loads the credentials.
    pub(super) fn load(&self) -> Result<TlsMode, CommandError> {
        let source = self.source()?;
        let choice = match (self.tls, &source) {
            (Some(choice), _) => choice,
            (None, Some(_)) => TlsChoice::Require,
            (None, None) => TlsChoice::Off,
        };
        if !self.tls_only.is_empty() && choice != TlsChoice::Allow {
            return Err(CommandError::new(
                "--tls-only is for servers where TLS is optional; add --tls=allow",
            ));
        }
        let source = match (choice, source) {
            (TlsChoice::Off, _) => return Ok(TlsMode::Off),
            (_, Some(source)) => source,
            (_, None) => {
                return Err(CommandError::new(
                    "TLS needs credentials: give --tls-certificates or --tls-psk",
                ));
            }
        };
        let credentials = TlsCredentials::load(source)
            .map_err(|error| CommandError::new(format!("cannot use TLS: {error}")))?;
        Ok(match choice {
            TlsChoice::Allow => TlsMode::Allow(credentials),
            _ => TlsMode::Require(credentials),
        })
    }

    /// Returns whether there are credentials, so that clients can be authenticated.
    pub(super) const fn has_credentials(&self) -> bool {
        self.tls_certificates.is_some() || self.tls_psk.is_some()
    }

    fn source(&self) -> Result<Option<CredentialSource>, CommandError> {
        let absolute = |path: &Path| {
            std::path::absolute(path).map_err(|error| {
                CommandError::new(format!("cannot use '{}': {error}", path.display()))
            })
        };
        let Some(directory) = &self.tls_certificates else {
            if !self.tls_authz.is_empty() || !self.tls_verify_peer {
                return Err(CommandError::new(
                    "--tls-authz and --tls-verify-peer are about certificates; they need \
                     --tls-certificates",
                ));
            }
            let file = self.tls_psk.as_deref().map(absolute).transpose()?;
            return Ok(file.map(|file| CredentialSource::Psk {
                file: if file.is_dir() { file.join(PSK_FILE) } else { file },
            }));
        };
        let client_certificates = if self.tls_verify_peer {
            ClientCertificates::Required
        } else {
            ClientCertificates::NotAsked
        };
        if !self.tls_verify_peer && !self.tls_authz.is_empty() {
            return Err(CommandError::new(
                "--tls-authz checks the clients' certificates; omit --tls-verify-peer=off",
            ));
        }
        Ok(Some(CredentialSource::X509 {
            directory: absolute(directory)?,
            key_password: self.tls_key_password_file.clone(),
            client_certificates,
            authorization: self.authorization()?,
        }))
    }

    /// A distinguished name always contains a `=`; other values are files.
    fn authorization(&self) -> Result<Authorization, CommandError> {
        let (patterns, files): (Vec<_>, Vec<_>) = self.tls_authz.iter().partition(|text| {
            (text.contains('=') || *text == "*") && !text.starts_with(['/', '.'])
        });
        match (patterns.is_empty(), files.as_slice()) {
            (true, []) => Ok(Authorization::Everyone),
            (false, []) => Ok(Authorization::Patterns(patterns.into_iter().cloned().collect())),
            (true, [file]) => Ok(Authorization::File(file.into())),
            _ => Err(CommandError::new(
                "--tls-authz takes either patterns or one file; put the patterns into the file",
            )),
        }
    }
}

/// Reloads the credentials on every SIGHUP. Does nothing without credentials.
pub(super) fn reload_on_hangup(tls: &TlsMode) -> Result<(), CommandError> {
    let Some(credentials) = tls.credentials().cloned() else { return Ok(()) };
    let mut hangups = signal(SignalKind::hangup())
        .map_err(|error| CommandError::new(format!("cannot catch SIGHUP: {error}")))?;
    tasks::spawn(async move {
        while hangups.recv().await.is_some() {
            service_manager::reloading();
            let reloaded = credentials.reload();
            service_manager::reloaded();
            match reloaded {
                Ok(()) => tracing::info!("TLS credentials were reloaded"),
                Err(error) => {
                    let error = without_error_numbers(error.to_string());
                    tracing::warn!(
                        "cannot reload the TLS credentials: {error}; the previous ones stay in use"
                    );
                }
            }
        }
    });
    Ok(())
}

/// Describes what unauthenticated clients can do; `None` if nothing.
pub(super) fn exposure(tls: &TlsMode) -> Option<&'static str> {
    let asks_for_certificate = |credentials: &TlsCredentials| {
        !matches!(
            credentials.source(),
            CredentialSource::X509 { client_certificates: ClientCertificates::NotAsked, .. }
        )
    };
    match tls {
        TlsMode::Off => Some("there is no encryption and no password"),
        TlsMode::Allow(_) => Some("--tls=allow admits clients without TLS"),
        TlsMode::Require(credentials) if asks_for_certificate(credentials) => None,
        TlsMode::Require(_) => Some("--tls-verify-peer=off admits clients without a certificate"),
    }
}

/// Returns the URI of an export, with the parameters that a client on this machine needs.
pub(super) fn uri(address: &BoundAddress, name: &str, tls: &TlsMode) -> NbdUri {
    let mut uri = address.uri(name);
    let Some(credentials) = tls.credentials() else { return uri };
    uri.security = Security::Tls;
    match credentials.source() {
        CredentialSource::X509 { directory, client_certificates, .. } => {
            let has = |file| directory.join(file).is_file();
            let is_certified = has(CLIENT_CERTIFICATE_FILE) && has(CLIENT_KEY_FILE);
            let needs_none = *client_certificates == ClientCertificates::NotAsked;
            if has(CA_CERTIFICATE_FILE) && (is_certified || needs_none) {
                uri.tls.certificates = Some(directory.clone());
            }
            let known = credentials.host_names();
            let fits = match &uri.transport {
                Transport::Tcp { host, .. } => known.contains(host),
                _ => false,
            };
            if !fits {
                uri.tls.hostname = known.into_iter().find(|name| !name.starts_with('*'));
            }
        }
        CredentialSource::Psk { file } => {
            uri.user = credentials.users().into_iter().next();
            uri.tls.psk_file = Some(file.clone());
        }
        _ => {}
    }
    uri
}
