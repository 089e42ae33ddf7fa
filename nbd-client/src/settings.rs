//! The settings of a [`Connector`](crate::Connector).

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use nbd_proto::NbdUri;
use nbd_proto::wire::{MetaContextName, ReplyMode};
use tokio::runtime::Handle;

use crate::tls::{LocalFiles, TlsMode, TlsOptions};

/// Default time limit for connecting and the handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// All settings of a connection.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) uri: NbdUri,
    pub(crate) wanted: Wanted,
    pub(crate) connections: NonZeroUsize,
    pub(crate) reconnect: Option<Duration>,
    /// Whether a disk that was only read is tried again after the patience of `reconnect`.
    pub(crate) keeps_reading: bool,
    pub(crate) handshake_timeout: Duration,
    pub(crate) limits: Limits,
    pub(crate) tls: Option<TlsOptions>,
    pub(crate) local_files: LocalFiles,
    /// The runtimes that drive the connections, in turn; empty for the caller's own.
    pub(crate) runtimes: Arc<[Handle]>,
}

impl Settings {
    pub(crate) fn new(uri: NbdUri) -> Self {
        let wanted = Wanted {
            export_name: uri.export_name.clone(),
            reply_mode: ReplyMode::Extended,
            meta_contexts: Vec::new(),
        };
        Self {
            uri,
            wanted,
            connections: NonZeroUsize::MIN,
            reconnect: None,
            keeps_reading: false,
            handshake_timeout: HANDSHAKE_TIMEOUT,
            limits: Limits::default(),
            tls: None,
            local_files: LocalFiles::Refused,
            runtimes: Arc::new([]),
        }
    }

    /// The server's address, for messages.
    pub(crate) fn target(&self) -> Arc<str> {
        self.uri.to_string().into()
    }

    /// Returns the runtime that drives the connection of that number, if one was chosen.
    pub(crate) fn runtime(&self, connection: usize) -> Option<&Handle> {
        self.runtimes.get(connection.checked_rem(self.runtimes.len())?)
    }

    /// The same settings for another export.
    pub(crate) fn with_export(&self, name: &str) -> Self {
        let mut settings = self.clone();
        name.clone_into(&mut settings.wanted.export_name);
        name.clone_into(&mut settings.uri.export_name);
        settings
    }

    /// The same settings with TLS required: for connections that follow one with TLS.
    pub(crate) fn requiring_tls(&self) -> Self {
        let options = TlsOptions { mode: TlsMode::Require, ..self.tls.clone().unwrap_or_default() };
        Self { tls: Some(options), ..self.clone() }
    }
}

/// The aim of a handshake.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) export_name: String,
    pub(crate) reply_mode: ReplyMode,
    pub(crate) meta_contexts: Vec<MetaContextName>,
}

/// The limits of data and requests in flight on one connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) requests: NonZeroUsize,
    pub(crate) bytes: NonZeroUsize,
    /// The time limit of a request.
    pub(crate) request_timeout: Option<Duration>,
}

impl Default for Limits {
    fn default() -> Self {
        const REQUESTS: NonZeroUsize = NonZeroUsize::new(128).expect("128 is not zero");
        const BYTES: NonZeroUsize = NonZeroUsize::new(64 << 20).expect("64 MiB is not zero");
        Self { requests: REQUESTS, bytes: BYTES, request_timeout: None }
    }
}
