//! Connections to servers, and messages about their failures.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use nbd_client::{Client, Connector, Error, LocalFiles, TlsError, TlsMode, TlsOptions, VerifyPeer};
use nbd_proto::NbdUri;
use nbd_proto::tls::KeyPassword;
use nbd_proto::uri::{Security, Transport};
use nbd_proto::wire::OptionReplyType;

use crate::cancellation::Cancellation;
use crate::error::{JobError, JobErrorKind};
use crate::lanes::Lanes;
use crate::object::ObjectOpener;
use crate::text::printable;

/// Most names listed in an error.
const MAX_NAMES: usize = 8;

/// Connection options of a job.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ConnectOptions {
    /// Connections to each server, if it allows several: 1 to 256. By default 4.
    pub connections: NonZeroUsize,
    /// Whether a job that copies makes at most one connection to a unix socket for each of its
    /// threads: one for each core, up to four. More of them cost the server threads and memory, and
    /// gain nothing. By default true.
    pub few_to_unix_sockets: bool,
    /// Time limit for connecting and for each request. By default 30 seconds for connecting, and
    /// none for requests.
    pub timeout: Option<Duration>,
    /// Time limit for restoring a lost connection. By default 30 seconds.
    pub reconnect: Duration,
    /// TLS for servers.
    pub tls: TlsSettings,
    /// Whether a URI may name files of this machine (`tls-certificates=…`, `tls-psk-file=…`). Not
    /// allowed by default: allow it only if the author of the URI may read these files.
    pub local_files: LocalFiles,
    /// Opens objects of stores. By default they are refused.
    pub objects: ObjectOpener,
    /// The threads that drive the connections, if it is not the caller's runtime.
    pub(crate) lanes: Lanes,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            connections: NonZeroUsize::new(4).unwrap_or(NonZeroUsize::MIN),
            few_to_unix_sockets: true,
            timeout: None,
            reconnect: Duration::from_secs(30),
            tls: TlsSettings::default(),
            local_files: LocalFiles::Refused,
            objects: ObjectOpener::default(),
            lanes: Lanes::default(),
        }
    }
}

impl ConnectOptions {
    /// Returns the settings of a connection.
    pub fn connector(&self, uri: &NbdUri) -> Connector {
        let connector = Connector::new(uri.clone()).local_files(self.local_files);
        let connector = self.tls.apply(connector).connections(self.connections_to(uri));
        let connector = match self.timeout {
            Some(limit) => connector.request_timeout(limit).handshake_timeout(limit),
            None => connector,
        };
        connector.reconnect(self.reconnect).runtimes(self.lanes.runtimes().iter().cloned())
    }

    fn connections_to(&self, uri: &NbdUri) -> NonZeroUsize {
        let is_few = self.few_to_unix_sockets && matches!(uri.transport, Transport::Unix { .. });
        let threads = NonZeroUsize::new(self.lanes.runtimes().len()).filter(|_| is_few);
        threads.map_or(self.connections, |threads| threads.min(self.connections))
    }

    /// The same options, with threads of its own for the connections of a job.
    ///
    /// Not with a time limit for requests: a thread that waits for a disk receives nothing
    /// meanwhile, and a good server would seem to be late.
    pub(crate) fn on_lanes(&self) -> Self {
        let lanes = if self.timeout.is_some() { Lanes::default() } else { Lanes::start() };
        Self { lanes, ..self.clone() }
    }
}

/// TLS options; they apply where the URI is silent.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct TlsSettings {
    /// The TLS policy. By default determined by the URI's scheme.
    pub mode: Option<TlsMode>,
    /// Directory with `ca-cert.pem`, and `client-cert.pem` and `client-key.pem` if the server
    /// requires them.
    pub certificates: Option<PathBuf>,
    /// The password of `client-key.pem`, if that is encrypted.
    pub key_password: Option<KeyPassword>,
    /// Default for [`certificates`](Self::certificates), if neither the caller nor the URI
    /// specifies credentials.
    pub default_certificates: Option<PathBuf>,
    /// File with pre-shared keys, as psktool writes it; the URI names the user. Takes precedence
    /// over certificates.
    pub pre_shared_keys: Option<PathBuf>,
    /// Name that the server's certificate must contain. By default the host of the URI.
    pub hostname: Option<String>,
    /// Whether the server's certificate is verified.
    pub verify_peer: Option<VerifyPeer>,
}

impl TlsSettings {
    /// Refuses unused credentials: a mistake that would leave a connection unprotected.
    ///
    /// # Errors
    ///
    /// If there are TLS options, and neither the mode nor one of the URIs requests TLS.
    pub fn check<'a>(&self, uris: impl IntoIterator<Item = &'a NbdUri>) -> Result<(), JobError> {
        let option = match self {
            Self { mode: Some(_), .. } => return Ok(()),
            Self { certificates: Some(_), .. } => "--tls-certificates",
            Self { key_password: Some(_), .. } => "--tls-key-password-file",
            Self { pre_shared_keys: Some(_), .. } => "--tls-psk",
            Self { hostname: Some(_), .. } => "--tls-hostname",
            Self { verify_peer: Some(_), .. } => "--tls-verify-peer",
            _ => return Ok(()),
        };
        if uris.into_iter().any(|uri| uri.security == Security::Tls) {
            return Ok(());
        }
        Err(JobError::invalid(format!(
            "{option} is given and no URI asks for TLS: write nbds instead of nbd, or add --tls \
             require"
        )))
    }

    /// Adds TLS to the settings of a connection, if it is requested.
    pub fn apply(&self, connector: Connector) -> Connector {
        let uri = connector.uri().clone();
        let mode = match (self.mode, uri.security) {
            (Some(mode), _) => mode,
            (None, Security::Plain) => return connector,
            (None, _) => TlsMode::Require,
        };
        let mut options = TlsOptions::new(mode);
        if let Some(file) = &self.pre_shared_keys {
            options = options.pre_shared_keys(file);
        } else if let Some(directory) = &self.certificates {
            options = options.certificates(directory);
        } else if uri.tls.file_parameter().is_none()
            && uri.tls.kind.is_none()
            && let Some(directory) = &self.default_certificates
        {
            options = options.certificates(directory);
        }
        if let Some(password) = &self.key_password {
            options = options.key_password(password.clone());
        }
        if let Some(name) = &self.hostname {
            options = options.hostname(name);
        }
        if let Some(verify) = self.verify_peer {
            options = options.verify_peer(verify);
        }
        connector.tls(options)
    }
}

/// Refuses to copy an export to itself, as far as the URIs show.
///
/// # Errors
///
/// If both name the same export of the same server.
pub(crate) fn refuse_same_export(
    source: Option<&NbdUri>,
    destination: Option<&NbdUri>,
) -> Result<(), JobError> {
    match (source, destination) {
        (Some(source), Some(destination))
            if source.transport == destination.transport
                && source.export_name == destination.export_name =>
        {
            Err(JobError::invalid(format!(
                "{source} is the source and the destination; give another destination"
            )))
        }
        _ => Ok(()),
    }
}

/// Connects; if the export does not exist, the error lists the existing ones. `kind` is that of
/// the error.
///
/// # Errors
///
/// If the server cannot be reached or refuses, or if the job is cancelled.
///
/// # Cancel safety
///
/// Safe: the connection is closed.
pub async fn connect(
    connector: &Connector,
    uri: &NbdUri,
    kind: JobErrorKind,
    cancellation: &Cancellation,
) -> Result<Client, JobError> {
    cancellation
        .unless_cancelled(async {
            match connector.connect().await {
                Ok(client) => Ok(client),
                Err(error) => {
                    let why = explain_unknown_export(connector, uri, &error).await;
                    Err(JobError::new(kind, why))
                }
            }
        })
        .await
}

/// Describes an error of the handshake. If the export does not exist, lists those of the server.
///
/// # Cancel safety
///
/// Safe: the connection is closed.
pub async fn explain_unknown_export(connector: &Connector, uri: &NbdUri, error: &Error) -> String {
    if error.option_reply() != Some(OptionReplyType::ERR_UNKNOWN) {
        return with_advice(error);
    }
    let wanted = match uri.export_name.as_str() {
        "" => "no default export; name one".to_owned(),
        name => format!("no export named '{}'", printable(name)),
    };
    let offered = match connector.list().await {
        Ok(exports) if exports.is_empty() => "it lists none".to_owned(),
        Ok(exports) => {
            let names = exports.iter().take(MAX_NAMES);
            let names: Vec<_> =
                names.map(|export| format!("'{}'", printable(&export.name))).collect();
            let more = if exports.len() > MAX_NAMES { " and more" } else { "" };
            format!("it has {}{more}", names.join(", "))
        }
        Err(_) => "it does not list what it has; ask its operator".to_owned(),
    };
    format!("{uri}: the server has {wanted} ({offered})")
}

/// Describes a refusal or failure after the handshake.
pub fn failed(uri: &NbdUri, operation: &str, error: &Error) -> String {
    match error {
        // These name the server themselves.
        Error::Connect { .. } | Error::Tls { .. } => with_advice(error),
        Error::Request { .. } | Error::Misuse(_) | Error::Closed => {
            format!("cannot {operation} {uri}: {}", printable(&error.to_string()))
        }
        _ => printable(&error.to_string()),
    }
}

fn with_advice(error: &Error) -> String {
    let text = printable(&error.to_string());
    let advice = match error {
        Error::Connect { source, .. } => match source.kind() {
            std::io::ErrorKind::ConnectionRefused => "; is the server running there?",
            std::io::ErrorKind::NotFound => "; there is no such socket, is the server running?",
            std::io::ErrorKind::PermissionDenied => {
                "; use it as its owner, or let its owner give you the right to write to it"
            }
            std::io::ErrorKind::TimedOut | std::io::ErrorKind::HostUnreachable => {
                "; check the address and the firewall"
            }
            _ => "",
        },
        Error::Tls { source: TlsError::RequiredByServer, .. } => {
            " (--tls-certificates or --tls-psk)"
        }
        _ => "",
    };
    text + advice
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_makes_a_connection_to_a_unix_socket_for_each_of_its_threads() {
        let uri = |uri: &str| uri.parse::<NbdUri>().expect("a URI");
        let (unix, tcp) = (uri("nbd+unix:///?socket=/run/s"), uri("nbd://host/"));
        let number = |number| NonZeroUsize::new(number).expect("not zero");
        let mut options = ConnectOptions { connections: number(300), ..ConnectOptions::default() };
        assert_eq!(options.connections_to(&unix), number(300), "it has no threads");
        options = options.on_lanes();
        let threads = number(options.lanes.runtimes().len());
        assert_eq!(options.connections_to(&unix), threads);
        assert_eq!(options.connections_to(&tcp), number(300));
        options.few_to_unix_sockets = false;
        assert_eq!(options.connections_to(&unix), number(300));
    }
}
