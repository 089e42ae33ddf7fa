//! Configuration of a server's negotiation.

use crate::wire::ReplyMode;

/// Whether clients may or have to use TLS (section "TLS versions" names the three modes NOTLS,
/// SELECTIVETLS and FORCEDTLS).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TlsPolicy {
    /// STARTTLS is refused.
    #[default]
    Off,
    /// STARTTLS is accepted; the owner of the exports decides what is served without it.
    Allow,
    /// Nothing but STARTTLS and ABORT is accepted in the clear.
    Require,
}

/// How a server negotiates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerConfig {
    /// Whether clients may or have to use TLS.
    pub tls: TlsPolicy,
    /// The best form of replies that is granted; what is above it is answered ERR_UNSUP.
    /// [`ReplyMode::Extended`] unless the behaviour of an older server is wanted.
    pub best_reply_mode: ReplyMode,
}

impl Default for ServerConfig {
    /// No TLS, every form of replies.
    fn default() -> Self {
        Self { tls: TlsPolicy::Off, best_reply_mode: ReplyMode::Extended }
    }
}
