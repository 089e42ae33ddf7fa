//! The options of a [`RequestFilter`](super::RequestFilter).

/// The effect of TRIM and WRITE_ZEROES on space that is no longer needed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Discard {
    /// They free it.
    #[default]
    Unmap,
    /// They keep it: TRIM does nothing, and WRITE_ZEROES makes no holes.
    Ignore,
}

/// The treatment of written data that is all zero.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DetectZeroes {
    /// It is written like other data; nothing is examined.
    #[default]
    Off,
    /// It is written by [`Export::write_zeroes`](crate::export::Export::write_zeroes), without
    /// holes.
    On,
    /// It is written by [`Export::write_zeroes`](crate::export::Export::write_zeroes), with holes
    /// unless [`Discard::Ignore`] forbids them.
    Unmap,
}

/// The part of a write that is examined for zeroes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ZeroUnit {
    /// All bytes.
    #[default]
    Byte,
    /// Complete pages of 4096 bytes, as direct I/O needs them; the edges are written as data.
    Page,
}

/// The moment at which a change of the disk is answered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WriteCache {
    /// When the export has carried it out; FLUSH makes it durable.
    #[default]
    Writeback,
    /// When it is durable. This is for custom exports: an image has a cache mode for that.
    Writethrough,
}

/// Whether clients are told that they may use several connections (`CAN_MULTI_CONN`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MultiConn {
    /// What the export says.
    #[default]
    Inherit,
    /// They are not.
    Hidden,
}

/// The calls of the export that may block.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Blocking {
    /// Those that the export reports as such.
    #[default]
    Inherit,
    /// All: they are made on threads that may wait, for example for a disk on the network.
    Always,
}

/// The kind of medium that clients are told (`ROTATIONAL`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Medium {
    /// What the export says.
    #[default]
    Inherit,
    /// A rotating disk.
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
    /// 512 bytes for clients that request block sizes, if the export has no minimum. Requests of
    /// any alignment are served.
    Sector,
}

/// The options of a [`RequestFilter`](super::RequestFilter). The default changes nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct FilterOptions {
    /// The effect of TRIM and WRITE_ZEROES on space.
    pub discard: Discard,
    /// The treatment of written data that is all zero.
    pub detect_zeroes: DetectZeroes,
    /// The part of a write that is examined for zeroes.
    pub zero_unit: ZeroUnit,
    /// The moment at which a change is answered.
    pub write_cache: WriteCache,
    /// Whether clients are told that they may use several connections.
    pub multi_conn: MultiConn,
    /// The calls that may block.
    pub blocking: Blocking,
    /// The kind of medium that clients are told.
    pub medium: Medium,
    /// The preferred block size that clients are told.
    pub preferred_size: PreferredSize,
    /// The minimum block size that clients are told.
    pub advised_minimum: AdvisedMinimum,
}
