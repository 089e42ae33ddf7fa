//! Block status descriptors and the flag bits of known contexts.

use bitflags::bitflags;

/// One extent of a block status reply. The compact form on the wire has 32-bit fields, the
/// extended one 64-bit fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockDescriptor {
    /// Length of the extent, in bytes; never zero.
    pub length: u64,
    /// Status flags; the context defines their meaning.
    pub flags: u64,
}

impl BlockDescriptor {
    /// Size of a descriptor in a BLOCK_STATUS chunk, in bytes.
    pub const COMPACT_LEN: usize = 8;
    /// Size of a descriptor in a BLOCK_STATUS_EXT chunk, in bytes.
    pub const EXTENDED_LEN: usize = 16;
}

bitflags! {
    /// Status bits of `base:allocation`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct AllocationFlags: u64 {
        /// The extent is a hole: it occupies no space.
        const STATE_HOLE = 1 << 0;
        /// The extent reads as zeroes.
        const STATE_ZERO = 1 << 1;
    }

    /// Status bits of `qemu:dirty-bitmap:NAME`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct DirtyFlags: u64 {
        /// The extent was written since the bitmap was cleared.
        const STATE_DIRTY = 1 << 0;
    }
}
