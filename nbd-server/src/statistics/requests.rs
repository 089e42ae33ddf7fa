//! Requests, bytes and errors by command.

use nbd_proto::wire::CommandType;

use super::latency::LatencyHistogram;

/// The commands that are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum RequestKind {
    /// NBD_CMD_READ.
    Read,
    /// NBD_CMD_WRITE.
    Write,
    /// NBD_CMD_FLUSH.
    Flush,
    /// NBD_CMD_TRIM.
    Trim,
    /// NBD_CMD_CACHE.
    Cache,
    /// NBD_CMD_WRITE_ZEROES.
    WriteZeroes,
    /// NBD_CMD_BLOCK_STATUS.
    BlockStatus,
    /// A command that the server does not know; it was refused.
    Other,
}

impl RequestKind {
    /// Every kind.
    pub const ALL: [Self; 8] = [
        Self::Read,
        Self::Write,
        Self::Flush,
        Self::Trim,
        Self::Cache,
        Self::WriteZeroes,
        Self::BlockStatus,
        Self::Other,
    ];

    /// Returns the name, in lower case: that of the protocol without `NBD_CMD_`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Trim => "trim",
            Self::Cache => "cache",
            Self::WriteZeroes => "write_zeroes",
            Self::BlockStatus => "block_status",
            Self::Other => "other",
        }
    }

    /// Returns whether the command changes the content of the disk.
    #[must_use]
    pub const fn is_change(self) -> bool {
        matches!(self, Self::Write | Self::Trim | Self::WriteZeroes)
    }

    pub(super) const fn index(self) -> usize {
        self as usize
    }
}

impl From<CommandType> for RequestKind {
    fn from(command: CommandType) -> Self {
        match command {
            CommandType::READ => Self::Read,
            CommandType::WRITE => Self::Write,
            CommandType::FLUSH => Self::Flush,
            CommandType::TRIM => Self::Trim,
            CommandType::CACHE => Self::Cache,
            CommandType::WRITE_ZEROES => Self::WriteZeroes,
            CommandType::BLOCK_STATUS => Self::BlockStatus,
            _ => Self::Other,
        }
    }
}

/// The answered requests of one command.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CommandStatistics {
    /// Bytes of the ranges of successful requests.
    pub bytes: u64,
    /// Number of requests that were answered with an error, refused ones included.
    pub errors: u64,
    /// The latencies of all requests, failed ones included.
    pub latency: LatencyHistogram,
}

impl CommandStatistics {
    /// Returns the number of requests, failed ones included.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.latency.count()
    }
}

/// Answered requests by command.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RequestStatistics {
    pub(super) commands: [CommandStatistics; RequestKind::ALL.len()],
}

impl RequestStatistics {
    /// Returns the requests of one command.
    #[must_use]
    pub const fn get(&self, kind: RequestKind) -> &CommandStatistics {
        &self.commands[kind.index()]
    }

    /// Returns all commands.
    pub fn iter(&self) -> impl Iterator<Item = (RequestKind, &CommandStatistics)> {
        RequestKind::ALL.into_iter().zip(&self.commands)
    }

    /// Returns the number of requests of all commands.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.commands.iter().map(CommandStatistics::requests).sum()
    }

    /// Returns the number of requests of all commands that were answered with an error.
    #[must_use]
    pub fn errors(&self) -> u64 {
        self.commands.iter().map(|command| command.errors).sum()
    }

    /// Adds other requests.
    pub fn add(&mut self, other: &Self) {
        for (command, more) in self.commands.iter_mut().zip(&other.commands) {
            command.bytes = command.bytes.wrapping_add(more.bytes);
            command.errors = command.errors.wrapping_add(more.errors);
            command.latency.add(&more.latency);
        }
    }
}
