//! Code shared by the benches.
#![allow(dead_code, reason = "no bench uses all of it")]

use nbd_proto::handshake::{ExportDescription, Negotiated};
use nbd_proto::wire::{MetaContextId, MetaContextName, ReplyMode, TransmissionFlags};

/// Every form of replies, with the name it has in the results.
pub(crate) const MODES: [(&str, ReplyMode); 3] = [
    ("simple", ReplyMode::Simple),
    ("structured", ReplyMode::Structured),
    ("extended", ReplyMode::Extended),
];

/// Size of the disk, in bytes.
pub(crate) const DISK_SIZE: u64 = 1 << 30;

/// An export with every capability.
pub(crate) fn export() -> ExportDescription {
    let mut flags = TransmissionFlags::all();
    flags.remove(TransmissionFlags::READ_ONLY);
    let mut export = ExportDescription::new("disk", DISK_SIZE);
    export.description = Some("a disk for benches".to_owned());
    export.flags = flags;
    export.meta_contexts =
        vec![MetaContextName::base_allocation(), MetaContextName::qemu_allocation_depth()];
    export
}

/// A transmission phase on that export, with one context.
pub(crate) fn negotiated(reply_mode: ReplyMode) -> Negotiated {
    let ExportDescription { name, size, flags, block_sizes, .. } = export();
    let mut negotiated = Negotiated::new(name, size, flags, reply_mode);
    negotiated.block_sizes = block_sizes;
    negotiated.meta_contexts = vec![(MetaContextId(0), MetaContextName::base_allocation())];
    negotiated
}
