//! A request in both roles: after validation in the server, before encoding in the client.

use crate::wire::{CommandType, Cookie, MetaContextId};

/// When the effect of a request has to be on stable storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Durability {
    /// With the next FLUSH.
    #[default]
    Cached,
    /// Before the reply (FUA).
    Fua,
}

/// What WRITE_ZEROES may do with the space of the range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ZeroMode {
    /// The range may become a hole.
    #[default]
    MayPunch,
    /// The range has to stay allocated (NO_HOLE).
    NoHole,
}

/// How long a WRITE_ZEROES may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Speed {
    /// As long as it takes.
    #[default]
    Any,
    /// Fail at once with ENOTSUP unless it is faster than writing zeroes (FAST_ZERO).
    FastOnly,
}

/// Whether the answer to a READ may come in several content chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Fragmentation {
    /// Any number of chunks.
    #[default]
    Allowed,
    /// One chunk (DF).
    Forbidden,
}

/// How many extents a BLOCK_STATUS answer may have per context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ExtentLimit {
    /// As many as fit.
    #[default]
    Many,
    /// One (REQ_ONE).
    One,
}

/// What a request wants, with the flags that have a meaning for it.
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
    /// The range is not needed any more.
    Trim(Durability),
    /// The range will be read soon.
    Cache,
    /// Make the range read as zeroes.
    WriteZeroes(ZeroMode, Speed, Durability),
    /// Report the status of the range in these contexts; `None` means all that were selected.
    BlockStatus(ExtentLimit, Option<Box<[MetaContextId]>>),
}

impl Command {
    /// The number of the command on the wire.
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
pub struct Request {
    /// Names the request while it is in flight.
    pub cookie: Cookie,
    /// Start of the range, in bytes.
    pub offset: u64,
    /// Length of the range, in bytes.
    pub length: u64,
    /// What to do with it.
    pub command: Command,
}

impl Request {
    /// Length of the data that a READ or WRITE moves, in bytes; 0 for every other command.
    #[must_use]
    pub fn data_len(&self) -> usize {
        match self.command {
            Command::Read(_) | Command::Write(_) => {
                usize::try_from(self.length).unwrap_or(usize::MAX)
            }
            _ => 0,
        }
    }

    /// What a reply has to repeat.
    #[must_use]
    pub const fn tag(&self) -> RequestTag {
        RequestTag {
            cookie: self.cookie,
            offset: self.offset,
            command: self.command.command_type(),
        }
    }
}

/// The part of a request that its replies need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestTag {
    /// The request's cookie.
    pub cookie: Cookie,
    /// The request's offset, in bytes; extended replies repeat it.
    pub offset: u64,
    /// The request's command.
    pub command: CommandType,
}
