//! The handshake phase (sections "Oldstyle negotiation", "Fixed newstyle negotiation").
//!
//! ```text
//!   server                                            client
//!   NBDMAGIC IHAVEOPT flags   ------------------->
//!                             <-------------------    client flags
//!                             <-------------------    option      \  any number of times,
//!   option replies            ------------------->                /  STARTTLS resets everything
//!                             <-------------------    GO (or EXPORT_NAME)
//!   information, ACK          ------------------->
//!   ============== Negotiated: both sides go over to transmission ==============
//! ```
//!
//! Both machines are owned values: a step consumes the machine and returns the next one, so an
//! option cannot be answered twice and no transmission byte can be sent before GO.

pub mod client;
mod meta_context;
mod options;
pub mod server;

use crate::wire::{BlockSizes, MetaContextId, MetaContextName, ReplyMode, TransmissionFlags};

pub use options::{ExportDescription, ListedExport, MinimumBlockSize, OptionError, RefusalReason};

/// The result of the handshake: everything that the transmission phase needs.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Negotiated {
    /// Name of the export, as the client requested it.
    pub export_name: String,
    /// Size of the export, in bytes; at most 2^63-1.
    pub size: u64,
    /// Transmission flags: the commands and flags that the export supports.
    pub flags: TransmissionFlags,
    /// Block size constraints in force.
    pub block_sizes: BlockSizes,
    /// Form of requests and replies.
    pub reply_mode: ReplyMode,
    /// The selected metadata contexts in the server's order. Empty unless they were selected for
    /// this export.
    pub meta_contexts: Vec<(MetaContextId, MetaContextName)>,
}

impl Negotiated {
    /// The result of a handshake that took place elsewhere, to be completed field by field: the
    /// default block sizes and no contexts.
    #[must_use]
    pub fn new(
        export_name: impl Into<String>,
        size: u64,
        flags: TransmissionFlags,
        reply_mode: ReplyMode,
    ) -> Self {
        Self {
            export_name: export_name.into(),
            size,
            flags,
            block_sizes: BlockSizes::default(),
            reply_mode,
            meta_contexts: Vec::new(),
        }
    }
}
