//! Options for the servers whose exports are re-exported.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use nbd_jobs::size::{parse_duration, parse_limit};
use nbd_proto::NbdUri;
use nbd_proto::tls::KeyPassword;
use nbd_proto::uri::Security;

use crate::connect::{OnOff, ServerArgs, TlsArgs, TlsChoice};
use crate::error::CommandError;
use crate::key_file::key_password_parser;
use crate::objects::ObjectArgs;

/// The use of servers whose NBD URIs are sources.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Sources on servers")]
pub struct UpstreamArgs {
    /// Time limit for reconnecting to a source's server, while requests wait: seconds, or 500ms,
    /// 2m; 0 disables reconnecting.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_limit)]
    pub source_reconnect: Duration,

    /// Give up on a source's server that takes longer than this to connect or answer. By default
    /// there is no limit for requests.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub source_timeout: Option<Duration>,

    /// TLS for nbd:// sources. An nbds:// source always uses it.
    #[arg(long, value_name = "MODE", value_enum)]
    pub source_tls: Option<TlsChoice>,

    /// Directory with ca-cert.pem, and client-cert.pem and client-key.pem if the source's server
    /// requires them.
    #[arg(long, value_name = "DIR", conflicts_with = "source_tls_psk")]
    pub source_tls_certificates: Option<PathBuf>,

    /// File with the password of client-key.pem, in its first line, if the key is encrypted.
    #[arg(long, value_name = "FILE", value_parser = key_password_parser())]
    pub source_tls_key_password_file: Option<KeyPassword>,

    /// File with pre-shared keys for the source's server; the URI names the user.
    #[arg(long, value_name = "FILE")]
    pub source_tls_psk: Option<PathBuf>,

    /// Name in the certificate of the source's server, if it differs from the host of the URI.
    #[arg(long, value_name = "NAME")]
    pub source_tls_hostname: Option<String>,

    /// Whether the certificate of the source's server is verified.
    #[arg(long, value_name = "on|off", value_enum)]
    pub source_tls_verify_peer: Option<OnOff>,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub objects: Box<ObjectArgs>,
}

impl UpstreamArgs {
    /// Returns the options.
    pub(super) fn choices(&self) -> ServerArgs {
        let tls = TlsArgs {
            tls_certificates: self.source_tls_certificates.clone(),
            tls_key_password_file: self.source_tls_key_password_file.clone(),
            tls_psk: self.source_tls_psk.clone(),
            tls_hostname: self.source_tls_hostname.clone(),
            tls_verify_peer: self.source_tls_verify_peer,
            tls: self.source_tls,
        };
        let reconnect = (!self.source_reconnect.is_zero()).then_some(self.source_reconnect);
        let objects = self.objects.clone();
        ServerArgs { timeout: self.source_timeout, reconnect, tls, objects }
    }

    /// Refuses unused options, which are a mistake. With a control socket, sources can be added
    /// later.
    ///
    /// # Errors
    ///
    /// An error that names the option.
    pub(super) fn check(
        &self,
        sources: &[NbdUri],
        more_may_come: bool,
    ) -> Result<(), CommandError> {
        let credentials = match self {
            Self { source_tls_certificates: Some(_), .. } => Some("--source-tls-certificates"),
            Self { source_tls_key_password_file: Some(_), .. } => {
                Some("--source-tls-key-password-file")
            }
            Self { source_tls_psk: Some(_), .. } => Some("--source-tls-psk"),
            Self { source_tls_hostname: Some(_), .. } => Some("--source-tls-hostname"),
            Self { source_tls_verify_peer: Some(_), .. } => Some("--source-tls-verify-peer"),
            _ => None,
        };
        let any = match self {
            Self { source_tls: Some(_), .. } => Some("--source-tls"),
            Self { source_timeout: Some(_), .. } => Some("--source-timeout"),
            _ => credentials,
        };
        match (any, credentials) {
            _ if more_may_come => Ok(()),
            (Some(option), _) if sources.is_empty() => {
                Err(CommandError::new(format!("{option} is given and no source is an NBD URI")))
            }
            (_, Some(option))
                if self.source_tls.is_none()
                    && sources.iter().all(|uri| uri.security == Security::Plain) =>
            {
                Err(CommandError::new(format!(
                    "{option} is given and no source requests TLS: write nbds instead of nbd, or \
                     add --source-tls require"
                )))
            }
            _ => Ok(()),
        }
    }
}
