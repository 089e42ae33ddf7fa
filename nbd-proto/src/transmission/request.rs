//! A request in both roles: after validation in the server, before encoding in the client.

use crate::wire::{CommandType, Cookie, MetaContextId};

/// The moment at which the effect of a request has to be on stable storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Durability {
    /// At the next FLUSH.
    #[default]
    Cached,
    /// Before the reply (FUA).
    Fua,
}

/// The permitted treatment of the space of a WRITE_ZEROES range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ZeroMode {
    /// The range may become a hole.
    #[default]
    MayUnmap,
    /// The range stays allocated (NO_HOLE).
    KeepAllocated,
}

/// The permitted duration of a WRITE_ZEROES.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Speed {
    /// Any duration.
    #[default]
    Any,
    /// Fail at once with ENOTSUP unless the operation is faster than writing zeroes (FAST_ZERO).
    FastOnly,
}

/// The permitted number of content chunks in the answer to a READ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Fragmentation {
    /// Any number of chunks.
    #[default]
    Allowed,
    /// One chunk (DF).
    Forbidden,
}

/// The permitted number of extents per context in the answer to a BLOCK_STATUS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ExtentLimit {
    /// As many as fit.
    #[default]
    Many,
    /// One (REQ_ONE).
    One,
}

/// A command, with the flags that are defined for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Read the range.
    Read(Fragmentation),
    /// Write the range; the payload has the range's length.
    Write(Durability),
    /// End the connection. Has no reply.
    Disconnect,
    /// Make completed writes durable. Has no range.
    Flush,
    /// Discard the range.
    Trim(Durability),
    /// Prefetch the range.
    Cache,
    /// Make the range read as zeroes.
    WriteZeroes(ZeroMode, Speed, Durability),
    /// Report the status of the range in these contexts; `None` means all selected ones.
    BlockStatus(ExtentLimit, Option<Box<[MetaContextId]>>),
}

impl Command {
    /// Returns the number of the command on the wire.
    #[must_use]
    pub const fn command_type(&self) -> CommandType {
        match self {
            Self::Read(_) => CommandType::READ,
            Self::Write(_) => CommandType::WRITE,
            Self::Disconnect => CommandType::DISC,
            Self::Flush => CommandType::FLUSH,
            Self::Trim(_) => CommandType::TRIM,
            Self::Cache => CommandType::CACHE,
            Self::WriteZeroes(..) => CommandType::WRITE_ZEROES,
            Self::BlockStatus(..) => CommandType::BLOCK_STATUS,
        }
    }
}

/// A request with its range.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Request {
    /// Identifies the request while it is in flight.
    pub cookie: Cookie,
    /// Start of the range, in bytes.
    pub offset: u64,
    /// Length of the range, in bytes.
    pub length: u64,
    /// The command.
    pub command: Command,
}

impl Request {
    /// Creates a request for `length` bytes at `offset`.
    #[must_use]
    pub const fn new(cookie: Cookie, command: Command, offset: u64, length: u64) -> Self {
        Self { cookie, offset, length, command }
    }

    /// Returns the length of the data of a READ or WRITE, in bytes; 0 for other commands.
    #[must_use]
    pub fn data_len(&self) -> usize {
        match self.command {
            Command::Read(_) | Command::Write(_) => {
                usize::try_from(self.length).unwrap_or(usize::MAX)
            }
            _ => 0,
        }
    }

    /// Returns the fields that a reply repeats.
    #[must_use]
    pub const fn tag(&self) -> RequestTag {
        RequestTag::new(self.cookie, self.command.command_type(), self.offset)
    }
}

/// The part of a request that its replies need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct RequestTag {
    /// The request's cookie.
    pub cookie: Cookie,
    /// The request's offset, in bytes; extended replies repeat it.
    pub offset: u64,
    /// The request's command.
    pub command: CommandType,
}

impl RequestTag {
    /// Creates the tag of a request of this type at `offset`, in bytes.
    #[must_use]
    pub const fn new(cookie: Cookie, command: CommandType, offset: u64) -> Self {
        Self { cookie, offset, command }
    }
}
