//! The next action of a server's driver.

use super::machine::Handshake;
use super::pending::{
    PendingExportName, PendingGo, PendingInfo, PendingList, PendingMetaContext, PendingTls,
};

/// The next action of the driver.
#[derive(Debug)]
#[must_use]
pub enum HandshakeStep {
    /// Send the output buffer, then receive more bytes of the client.
    NeedsInput(Handshake),
    /// Answer GO.
    Go(PendingGo),
    /// Answer INFO.
    Info(PendingInfo),
    /// Answer EXPORT_NAME.
    ExportName(PendingExportName),
    /// Answer LIST.
    List(PendingList),
    /// Answer LIST_META_CONTEXT or SET_META_CONTEXT.
    MetaContext(PendingMetaContext),
    /// Answer STARTTLS, before reading more bytes of the socket.
    StartTls(PendingTls),
    /// The client ended the handshake and was acknowledged: send the output buffer and close.
    Aborted,
}
