//! What a [`RequestFilter`](super::RequestFilter) changes.

/// What TRIM and WRITE_ZEROES do with space that is not needed any more.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Discard {
    /// They give it back.
    #[default]
    Unmap,
    /// They keep it: TRIM does nothing, and WRITE_ZEROES makes no holes.
    Ignore,
}

/// What becomes of written data that is all zero.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DetectZeroes {
    /// It is written like other data; nothing is examined.
    #[default]
    Off,
    /// It is written by [`Export::write_zeroes`](crate::export::Export::write_zeroes), without holes.
    On,
    /// It is written by [`Export::write_zeroes`](crate::export::Export::write_zeroes), with holes unless [`Discard::Ignore`] forbids
    /// them.
    Unmap,
}

/// Which part of a write is examined for zeroes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ZeroUnit {
    /// All bytes.
    #[default]
    Byte,
    /// Whole pages of 4096 bytes, as direct I/O needs them; the edges are written as data.
    Page,
}

/// When a change of the disk is answered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WriteCache {
    /// When the export has it; FLUSH makes it durable.
    #[default]
    Writeback,
    /// When it is durable. For exports of the caller's own: an image has a cache mode for that.
    Writethrough,
}

/// What clients are told about several connections at a time (`CAN_MULTI_CONN`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MultiConn {
    /// What the export says.
    #[default]
    Inherit,
    /// That they are not supported.
    Hidden,
}

/// Which calls of the export may block.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Blocking {
    /// Those of which it says so.
    #[default]
    Inherit,
    /// All: they are made on threads that may wait, as for a disk on the network.
    Always,
}

/// What clients are told about the medium (`ROTATIONAL`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Medium {
    /// What the export says.
    #[default]
    Inherit,
    /// It is a spinning disk.
    Rotational,
}

/// The preferred block size that clients are told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PreferredSize {
    /// That of the export.
    #[default]
    Inherit,
    /// 4096 bytes, or the minimum block size if that is larger.
    Page,
}

/// The minimum block size that clients are told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AdvisedMinimum {
    /// That of the export.
    #[default]
    Inherit,
    /// 512 bytes for clients that request block sizes, where the export has no minimum. Requests of
    /// any alignment are served.
    Sector,
}

/// What a [`RequestFilter`](super::RequestFilter) changes. The default changes nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct FilterOptions {
    /// What TRIM and WRITE_ZEROES do with space.
    pub discard: Discard,
    /// What becomes of written data that is all zero.
    pub detect_zeroes: DetectZeroes,
    /// Which part of a write is examined for zeroes.
    pub zero_unit: ZeroUnit,
    /// When a change is answered.
    pub write_cache: WriteCache,
    /// What clients are told about several connections.
    pub multi_conn: MultiConn,
    /// Which calls may block.
    pub blocking: Blocking,
    /// What clients are told about the medium.
    pub medium: Medium,
    /// The preferred block size that clients are told.
    pub preferred_size: PreferredSize,
    /// The minimum block size that clients are told.
    pub advised_minimum: AdvisedMinimum,
}
