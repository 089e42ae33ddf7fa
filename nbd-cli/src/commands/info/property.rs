//! The properties that `--can`, `--is` and `--has` check.

use clap::ValueEnum;
use nbd_client::{ExportInfo, ServerInfo};
use nbd_proto::wire::{ReplyMode, TransmissionFlags};

/// A property of a server or an export; the names are those of nbdinfo.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Property {
    /// Requests can select the contexts of a block status.
    BlockStatusPayload,
    /// CACHE is supported.
    Cache,
    /// The server accepts connections.
    Connect,
    /// Reads can request a single chunk.
    Df,
    /// 64-bit requests are supported.
    ExtendedHeaders,
    /// WRITE_ZEROES can be requested to be fast or fail.
    FastZero,
    /// FLUSH is supported.
    Flush,
    /// Single writes can be durable.
    Fua,
    /// Several connections see one coherent disk.
    MultiConn,
    /// The export can be read.
    Read,
    /// The export cannot be written.
    ReadOnly,
    /// The medium is a rotating disk.
    Rotational,
    /// Structured replies are supported.
    StructuredReply,
    /// The connection is encrypted.
    Tls,
    /// TRIM is supported.
    Trim,
    /// The export can be written.
    Write,
    /// WRITE_ZEROES is supported.
    Zero,
}

impl Property {
    /// Returns whether the property holds.
    pub(crate) fn holds(self, server: &ServerInfo, export: &ExportInfo) -> bool {
        let has = |flag| export.flags.contains(flag);
        match self {
            Self::BlockStatusPayload => has(TransmissionFlags::BLOCK_STATUS_PAYLOAD),
            Self::Cache => has(TransmissionFlags::SEND_CACHE),
            Self::Connect | Self::Read => true,
            Self::Df => has(TransmissionFlags::SEND_DF),
            Self::ExtendedHeaders => server.reply_mode == ReplyMode::Extended,
            Self::FastZero => has(TransmissionFlags::SEND_FAST_ZERO),
            Self::Flush => has(TransmissionFlags::SEND_FLUSH),
            Self::Fua => has(TransmissionFlags::SEND_FUA),
            Self::MultiConn => has(TransmissionFlags::CAN_MULTI_CONN),
            Self::ReadOnly => has(TransmissionFlags::READ_ONLY),
            Self::Rotational => has(TransmissionFlags::ROTATIONAL),
            Self::StructuredReply => server.reply_mode != ReplyMode::Simple,
            Self::Tls => server.tls,
            Self::Trim => has(TransmissionFlags::SEND_TRIM),
            Self::Write => !has(TransmissionFlags::READ_ONLY),
            Self::Zero => has(TransmissionFlags::SEND_WRITE_ZEROES),
        }
    }
}
