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
//!   ============== Negotiated: both sides begin transmission ==============
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
    /// Creates the result of a handshake that took place elsewhere, with the default block sizes
    /// and no contexts. Complete it field by field.
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
    /// Checks that an export with this description keeps the promises made to the client: size,
    /// commands, alignment, and metadata contexts by name.
    ///
    /// # Errors
    ///
    /// The broken promise, as a clause.
    pub fn check_kept_by(&self, export: &ExportDescription) -> Result<(), &'static str> {
        // These do not restrict requests that were legal before.
        let harmless = TransmissionFlags::ROTATIONAL | TransmissionFlags::READ_ONLY;
        let offered = export.flags_in(self.reply_mode);
        let block_sizes = export.enforced_block_sizes();
        let was_writable = !self.flags.contains(TransmissionFlags::READ_ONLY);
        let is_offered = |name| export.meta_contexts.iter().any(|offered| offered == name);
        if export.size != self.size {
            Err("its size has changed")
        } else if was_writable && offered.contains(TransmissionFlags::READ_ONLY) {
            Err("it is read-only now")
        } else if !(offered | harmless).contains(self.flags) {
            Err("a command is not offered any more")
        } else if block_sizes.minimum() > self.block_sizes.minimum() {
            Err("its minimum block size has grown")
        } else if block_sizes.maximum_payload() < self.block_sizes.maximum_payload() {
            Err("its maximum payload has shrunk")
        } else if !self.meta_contexts.iter().all(|(_, name)| is_offered(name)) {
            Err("a metadata context is not offered any more")
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_promise_is_kept_by_an_export_that_offers_as_much() {
        let mut export = ExportDescription::new("disk", 4096);
        export.flags |= TransmissionFlags::SEND_FLUSH | TransmissionFlags::ROTATIONAL;
        export.meta_contexts.push(MetaContextName::base_allocation());
        let flags = export.flags_in(ReplyMode::Structured);
        let mut promised = Negotiated::new("", 4096, flags, ReplyMode::Structured);
        promised.meta_contexts.push((MetaContextId(0), MetaContextName::base_allocation()));
        assert_eq!(promised.check_kept_by(&export), Ok(()));
        let broken = |change: &dyn Fn(&mut ExportDescription)| {
            let mut export = export.clone();
            change(&mut export);
            promised.check_kept_by(&export).err().unwrap_or("nothing")
        };
        assert_eq!(broken(&|export| export.flags |= TransmissionFlags::SEND_TRIM), "nothing");
        assert_eq!(broken(&|export| export.flags -= TransmissionFlags::ROTATIONAL), "nothing");
        assert!(broken(&|export| export.size = 8192).contains("size has changed"));
        assert!(
            broken(&|export| export.flags |= TransmissionFlags::READ_ONLY).contains("read-only")
        );
        let lost = broken(&|export| export.flags -= TransmissionFlags::SEND_FLUSH);
        assert!(lost.contains("a command"));
        assert!(broken(&|export| export.meta_contexts.clear()).contains("metadata context"));
        let coarse = BlockSizes::new(512, 4096, 1 << 25).unwrap();
        assert!(broken(&|export| export.block_sizes = coarse).contains("minimum block size"));
        let short = BlockSizes::new(1, 4096, 1 << 20).unwrap();
        assert!(broken(&|export| export.block_sizes = short).contains("maximum payload"));
    }
}
