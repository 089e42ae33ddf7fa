//! Configuration of a server's negotiation.

use crate::wire::ReplyMode;

/// The TLS policy (section "Server-side requirements": the modes NOTLS, SELECTIVETLS and
/// FORCEDTLS).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TlsPolicy {
    /// STARTTLS is refused.
    #[default]
    Off,
    /// STARTTLS is accepted; the caller decides which exports are served without it.
    Allow,
    /// In the clear, only STARTTLS and ABORT are accepted.
    Require,
}

/// The configuration of a server's negotiation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServerConfig {
    /// The TLS policy.
    pub tls: TlsPolicy,
    /// The most capable form of replies that is granted; requests for a better one are answered
    /// with ERR_UNSUP. The default is [`ReplyMode::Extended`]; a lower one imitates an older
    /// server.
    pub best_reply_mode: ReplyMode,
}

impl ServerConfig {
    /// Creates a configuration without TLS and with all forms of replies.
    #[must_use]
    pub const fn new() -> Self {
        Self { tls: TlsPolicy::Off, best_reply_mode: ReplyMode::Extended }
    }

    /// Sets the TLS policy.
    #[must_use]
    pub const fn tls(mut self, tls: TlsPolicy) -> Self {
        self.tls = tls;
        self
    }

    /// Sets the most capable form of replies.
    #[must_use]
    pub const fn best_reply_mode(mut self, mode: ReplyMode) -> Self {
        self.best_reply_mode = mode;
        self
    }
}

impl Default for ServerConfig {
    /// Returns the same as [`ServerConfig::new`].
    fn default() -> Self {
        Self::new()
    }
}
