//! Connections to servers, and messages about their failures.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use nbd_client::{Client, Connector, Error, LocalFiles, TlsMode, VerifyPeer};
use nbd_jobs::JobErrorKind;
use nbd_jobs::connect::{self, ConnectOptions, TlsSettings};
use nbd_jobs::remote::Remotes;
use nbd_jobs::size::parse_duration;
use nbd_proto::NbdUri;
use nbd_proto::tls::{CA_CERTIFICATE_FILE, KeyPassword};

use crate::error::CommandError;
use crate::key_file::key_password_parser;
use crate::objects::ObjectArgs;
use crate::signals;

/// The TLS options of the client commands.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "TLS (for nbds URIs, or with --tls)")]
pub struct TlsArgs {
    /// Directory with ca-cert.pem, and client-cert.pem and client-key.pem if the server requires
    /// them.
    ///
    /// By default the directories of libnbd are tried (~/.pki/libnbd, /etc/pki/libnbd), then the
    /// authorities that this machine trusts.
    #[arg(long, value_name = "DIR", conflicts_with = "tls_psk")]
    pub tls_certificates: Option<PathBuf>,

    /// File with the password of client-key.pem, in its first line, if the key is encrypted.
    #[arg(long, value_name = "FILE", value_parser = key_password_parser())]
    pub tls_key_password_file: Option<KeyPassword>,

    /// File with pre-shared keys, as 'nbd-cli tls psk' and psktool write it; the URI names the
    /// user.
    #[arg(long, value_name = "FILE")]
    pub tls_psk: Option<PathBuf>,

    /// Name that the server's certificate must contain, if it differs from the host of the URI.
    #[arg(long, value_name = "NAME")]
    pub tls_hostname: Option<String>,

    /// Whether the server's certificate is verified.
    #[arg(long, value_name = "on|off", value_enum)]
    pub tls_verify_peer: Option<OnOff>,

    /// TLS for nbd:// URIs; nbds:// URIs always use it.
    #[arg(long, value_name = "MODE", value_enum)]
    pub tls: Option<TlsChoice>,
}

/// Connection options of the commands that inspect servers.
#[derive(Clone, Debug, Default, Args)]
pub struct ServerArgs {
    /// Time limit for connecting and for each request: seconds, or 500ms, 2m [default: 30s for
    /// connecting, none for requests].
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub timeout: Option<Duration>,

    /// Time limit for restoring a lost connection, for commands that can do so safely.
    #[arg(skip)]
    pub reconnect: Option<Duration>,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub tls: TlsArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub objects: Box<ObjectArgs>,
}

impl ServerArgs {
    /// Returns the settings of a connection.
    pub(crate) fn connector(&self, uri: &NbdUri) -> Connector {
        let connector = limited(self.tls.connector(uri), self.timeout);
        match self.reconnect {
            Some(patience) => connector.reconnect(patience),
            None => connector,
        }
    }

    /// Returns the connections to servers and stores that sources and images name. A signal
    /// interrupts them.
    pub(crate) fn remotes(&self) -> Remotes {
        let server = self.clone();
        let objects = self.objects.opener();
        let remotes = Remotes::new(move |uri| server.connector(uri)).objects(objects);
        remotes.interrupter(signals::interrupter().clone())
    }

    /// Refuses unused options, which are a mistake.
    pub(crate) fn check<'a>(
        &self,
        uris: impl IntoIterator<Item = &'a NbdUri, IntoIter: Clone>,
    ) -> Result<(), CommandError> {
        let uris = uris.into_iter();
        if self.timeout.is_some() && uris.clone().next().is_none() {
            return Err(CommandError::new(
                "--timeout is given without an NBD URI: it has no effect on files",
            ));
        }
        self.tls.check(uris)
    }
}

/// Connection options of the commands that copy disks.
#[derive(Clone, Copy, Debug, Args)]
pub struct ConnectionArgs {
    /// Connections to each server, if it allows several [default: 4; to a unix socket one for each
    /// core, at most 4].
    #[arg(short = 'C', long, value_name = "N")]
    pub connections: Option<NonZeroUsize>,

    /// Time limit for connecting and for each request: seconds, or 500ms, 2m [default: 30s for
    /// connecting, none for requests].
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub timeout: Option<Duration>,

    /// Time limit for restoring a lost connection: seconds, or 500ms, 2m.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    pub reconnect: Duration,
}

impl ConnectionArgs {
    /// Refuses more connections, or `requests` in flight, than a job may have.
    pub(crate) fn check(&self, requests: NonZeroUsize) -> Result<(), CommandError> {
        if requests.get() > 4096 || self.connections.is_some_and(|it| it.get() > 256) {
            return Err(CommandError::new(
                "--requests is limited to 4096 and --connections to 256; give smaller numbers",
            ));
        }
        Ok(())
    }

    /// Returns the options for jobs.
    pub(crate) fn options(&self, tls: &TlsArgs) -> ConnectOptions {
        let mut options = ConnectOptions::default();
        if let Some(connections) = self.connections {
            options.connections = connections;
            options.few_to_unix_sockets = false;
        }
        options.timeout = self.timeout;
        options.reconnect = self.reconnect;
        options.tls = tls.settings();
        options.local_files = LocalFiles::Allowed;
        options
    }
}

/// Applies `--timeout`, in the same way for all commands.
fn limited(connector: Connector, limit: Option<Duration>) -> Connector {
    match limit {
        Some(limit) => connector.request_timeout(limit).handshake_timeout(limit),
        None => connector,
    }
}

/// The TLS policy of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TlsChoice {
    /// Never.
    Off,
    /// If the server offers it: no protection from an active attacker.
    Prefer,
    /// Always.
    Require,
}

/// A switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnOff {
    /// Yes.
    On,
    /// No.
    Off,
}

impl TlsArgs {
    /// Refuses unused credentials, a mistake that would leave a connection unprotected.
    pub(crate) fn check<'a>(
        &self,
        uris: impl IntoIterator<Item = &'a NbdUri>,
    ) -> Result<(), CommandError> {
        Ok(self.settings().check(uris)?)
    }

    /// Returns the options for jobs.
    pub(crate) fn settings(&self) -> TlsSettings {
        let mut settings = TlsSettings::default();
        settings.mode = self.tls.map(|choice| match choice {
            TlsChoice::Off => TlsMode::Off,
            TlsChoice::Prefer => TlsMode::Prefer,
            TlsChoice::Require => TlsMode::Require,
        });
        settings.certificates.clone_from(&self.tls_certificates);
        settings.key_password.clone_from(&self.tls_key_password_file);
        settings.default_certificates = usual_directory();
        settings.pre_shared_keys.clone_from(&self.tls_psk);
        settings.hostname.clone_from(&self.tls_hostname);
        settings.verify_peer = self.tls_verify_peer.map(|choice| match choice {
            OnOff::On => VerifyPeer::Required,
            OnOff::Off => VerifyPeer::Off,
        });
        settings
    }

    /// Returns the settings of a connection. The user wrote the URI, so it may name files.
    pub(crate) fn connector(&self, uri: &NbdUri) -> Connector {
        self.settings().apply(Connector::new(uri.clone()).local_files(LocalFiles::Allowed))
    }
}

/// The directories in which libnbd looks for certificates.
fn usual_directory() -> Option<PathBuf> {
    let home = std::env::var_os("HOME").map(|home| Path::new(&home).join(".pki/libnbd"));
    home.into_iter()
        .chain(["/etc/pki/libnbd".into()])
        .find(|directory| directory.join(CA_CERTIFICATE_FILE).is_file())
}

/// Connects, unless a signal interrupts that. If the export does not exist, the error lists the
/// existing ones.
pub(crate) async fn connect(connector: &Connector, uri: &NbdUri) -> Result<Client, CommandError> {
    let cancellation = signals::cancellation();
    Ok(connect::connect(connector, uri, JobErrorKind::Source, &cancellation).await?)
}

/// Converts an error of the handshake into one of the program.
pub(crate) async fn explain_unknown_export(
    connector: &Connector,
    uri: &NbdUri,
    error: Error,
) -> CommandError {
    CommandError::new(connect::explain_unknown_export(connector, uri, &error).await)
}

/// Describes an operation that a server refused or failed to carry out.
pub(crate) fn failed(uri: &NbdUri, operation: &str, error: &Error) -> CommandError {
    CommandError::new(connect::failed(uri, operation, error))
}
