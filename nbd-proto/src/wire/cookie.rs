//! The cookie of a request.

/// Identifies a request while it is in flight. The client chooses it; the server repeats it in
/// every reply and does not interpret it (section "Request message"; older texts call it handle).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Cookie(pub u64);
