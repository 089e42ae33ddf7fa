//! Error values on the wire (section "Error values").

open_enum! {
    /// An error number in a reply. The numbers are Linux's, on every system.
    Errno(u32) {
        /// Operation not permitted: a write to a read-only export.
        EPERM = 1;
        /// Input/output error.
        EIO = 5;
        /// Cannot allocate memory.
        ENOMEM = 12;
        /// Invalid argument.
        EINVAL = 22;
        /// No space left on device; also a write past the end of the export.
        ENOSPC = 28;
        /// Value too large.
        EOVERFLOW = 75;
        /// Operation not supported: also a fast zero that cannot be fast.
        ENOTSUP = 95;
        /// The server is shutting down.
        ESHUTDOWN = 108;
    }
}

impl Errno {
    /// Returns the value that a client acts on: unknown numbers count as [`Errno::EINVAL`] (section
    /// "Error values").
    #[must_use]
    pub const fn normalised(self) -> Self {
        if self.name().is_some() { self } else { Self::EINVAL }
    }

    /// Returns a short plain-language description.
    #[must_use]
    pub const fn description(self) -> &'static str {
        match self {
            Self::EPERM => "operation not permitted",
            Self::EIO => "input/output error",
            Self::ENOMEM => "out of memory",
            Self::EINVAL => "invalid argument",
            Self::ENOSPC => "no space left",
            Self::EOVERFLOW => "value too large",
            Self::ENOTSUP => "operation not supported",
            Self::ESHUTDOWN => "server is shutting down",
            _ => "unknown error",
        }
    }
}
