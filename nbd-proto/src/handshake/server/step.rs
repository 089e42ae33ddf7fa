//! The next step of a server.

use super::machine::Handshake;
use super::pending::{
    PendingExportName, PendingGo, PendingInfo, PendingList, PendingMetaContext, PendingTls,
};

/// What a handshake needs next.
#[derive(Debug)]
#[must_use]
pub enum HandshakeStep {
    /// More bytes of the client. Send what is in the output buffer first.
    NeedsInput(Handshake),
    /// An answer to GO.
    Go(PendingGo),
    /// An answer to INFO.
    Info(PendingInfo),
    /// An answer to EXPORT_NAME.
    ExportName(PendingExportName),
    /// An answer to LIST.
    List(PendingList),
    /// An answer to LIST_META_CONTEXT or SET_META_CONTEXT.
    MetaContext(PendingMetaContext),
    /// An answer to STARTTLS, given in time and without reading more of the socket.
    StartTls(PendingTls),
    /// The client ended the handshake and was told that this was seen: send what is in the output
    /// buffer and close.
    Aborted,
}
