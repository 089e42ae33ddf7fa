//! The backend of a device: another server, to which the kernel talks itself, or an export of this
//! process.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nbd_client::{Connector, ExportInfo, NegotiatedStream, PlainSocket, Reconnector, ReplyMode};
use nbd_server::export::{Export, ExportEntry};
use nbd_server::{ExportRegistry, RunningServer, Server, ServerConfig};

use crate::error::{JobError, JobErrorKind};
use crate::tasks;
use crate::text::printable;

/// The backend of a device: it serves the device's requests.
#[derive(Debug)]
pub struct Backend {
    info: ExportInfo,
    /// The first connection, until the device is attached.
    first: Option<NegotiatedStream>,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// The kernel gets sockets of that server.
    Server(Reconnector),
    /// The kernel gets sockets of this process.
    Export { server: RunningServer, connector: Connector },
}

impl Backend {
    /// Uses another server, which the kernel then talks to without this process. `None` if the
    /// kernel cannot do that, because the connection is encrypted: an export of this process that
    /// passes requests on can.
    ///
    /// The connection must have been made with [`ReplyMode::Simple`]: the kernel knows no other.
    pub fn of_server(stream: NegotiatedStream) -> Option<Self> {
        if stream.is_encrypted() || stream.negotiated().reply_mode != ReplyMode::Simple {
            return None;
        }
        let kind = Kind::Server(stream.reconnector());
        Some(Self { info: stream.info(), first: Some(stream), kind })
    }

    /// Serves an export, on threads of this process. Needs a runtime that lives as long as the
    /// backend.
    ///
    /// # Errors
    ///
    /// If no socket can be made.
    ///
    /// # Cancel safety
    ///
    /// Safe: the server is shut down.
    pub async fn of_export(
        export: Arc<dyn Export>,
        mut config: ServerConfig,
    ) -> Result<Self, JobError> {
        let exports = ExportRegistry::new();
        let added = exports.add("", ExportEntry::new(export));
        added.map_err(|error| JobError::new(JobErrorKind::Internal, error.to_string()))?;
        config.best_reply_mode = ReplyMode::Simple;
        let server = Server::new(config, exports).start();
        // For messages only.
        let uri = "nbd://localhost".parse();
        let uri = uri.map_err(|error| {
            JobError::new(JobErrorKind::Internal, format!("the name of this process: {error}"))
        })?;
        let connector = Connector::new(uri).reply_mode(ReplyMode::Simple);
        let stream = over_socket_pair(&server, &connector).await?;
        let kind = Kind::Export { server, connector };
        Ok(Self { info: stream.info(), first: Some(stream), kind })
    }

    /// Returns information about the export.
    pub fn info(&self) -> &ExportInfo {
        &self.info
    }

    /// Returns whether the device works only as long as this process runs.
    pub fn needs_process(&self) -> bool {
        matches!(self.kind, Kind::Export { .. })
    }

    /// Returns a connection for the kernel.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes what was opened.
    pub(super) async fn connection(&self) -> Result<OwnedFd, JobError> {
        let stream = match &self.kind {
            Kind::Server(reconnector) => reconnector
                .connect()
                .await
                .map_err(|error| JobError::source(printable(&error.to_string())))?,
            Kind::Export { server, connector } => over_socket_pair(server, connector).await?,
        };
        socket_of(stream)
    }

    /// Returns the first connection for the kernel.
    pub(super) async fn first_connection(&mut self) -> Result<OwnedFd, JobError> {
        match self.first.take() {
            Some(stream) => socket_of(stream),
            None => self.connection().await,
        }
    }

    /// Completes requests, flushes and closes the export.
    ///
    /// # Errors
    ///
    /// If data may not be durable.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future does not undo the shutdown; whether data is durable remains unknown.
    pub async fn close(self) -> Result<(), JobError> {
        drop(self.first);
        let Kind::Export { mut server, .. } = self.kind else { return Ok(()) };
        server.shutdown();
        let closed = server.wait().await;
        // Images are closed with their last owner, which may block.
        let dropped = tasks::spawn_blocking(move || drop(server)).await;
        dropped.map_err(|error| JobError::given_up("close of an image", &error))?;
        closed.map_err(|error| JobError::destination(error.to_string()))
    }
}

async fn over_socket_pair(
    server: &RunningServer,
    connector: &Connector,
) -> Result<NegotiatedStream, JobError> {
    let failed = |error: &dyn std::fmt::Display| {
        JobError::new(JobErrorKind::Internal, format!("cannot connect to this process: {error}"))
    };
    let (ours, kernels) = UnixStream::pair().map_err(|error| failed(&error))?;
    server.serve_connection(ours).await.map_err(|error| failed(&error))?;
    let connected = connector.connect_stream_over(PlainSocket::Unix(kernels)).await;
    connected.map_err(|error| failed(&error))
}

fn socket_of(stream: NegotiatedStream) -> Result<OwnedFd, JobError> {
    match stream.into_socket() {
        Ok(Ok(PlainSocket::Tcp(socket))) => Ok(socket.into()),
        Ok(Ok(PlainSocket::Unix(socket))) => Ok(socket.into()),
        Ok(Err(_)) => Err(JobError::source(
            "the server sends data that nothing has asked for, so the kernel cannot use it",
        )),
        Err(error) => Err(JobError::source(format!("cannot hand over a connection: {error}"))),
    }
}
