//! Code shared by the benches.
#![allow(dead_code, reason = "no bench uses all of it")]

use nbd_proto::handshake::{ExportDescription, MinimumBlockSize, Negotiated};
use nbd_proto::wire::{BlockSizes, MetaContextId, MetaContextName, ReplyMode, TransmissionFlags};

/// Every form of replies, with the name it has in the results.
pub(crate) const MODES: [(&str, ReplyMode); 3] = [
    ("simple", ReplyMode::Simple),
    ("structured", ReplyMode::Structured),
    ("extended", ReplyMode::Extended),
];

/// Size of the disk, in bytes.
pub(crate) const DISK_SIZE: u64 = 1 << 30;

/// An export that can do everything.
pub(crate) fn export() -> ExportDescription {
    let mut flags = TransmissionFlags::all();
    flags.remove(TransmissionFlags::READ_ONLY);
    ExportDescription {
        name: "disk".to_owned(),
        description: Some("a disk for benches".to_owned()),
        size: DISK_SIZE,
        flags,
        block_sizes: BlockSizes::default(),
        minimum_block_size: MinimumBlockSize::Enforced,
        meta_contexts: vec![
            MetaContextName::base_allocation(),
            MetaContextName::qemu_allocation_depth(),
        ],
    }
}

/// A transmission phase on that export, with one context.
pub(crate) fn negotiated(reply_mode: ReplyMode) -> Negotiated {
    let ExportDescription { name, size, flags, block_sizes, .. } = export();
    Negotiated {
        export_name: name,
        size,
        flags,
        block_sizes,
        reply_mode,
        meta_contexts: vec![(MetaContextId(0), MetaContextName::base_allocation())],
    }
}
