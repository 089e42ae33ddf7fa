//! The cookie of a request.

/// Names a request while it is in flight. The client chooses it, the server repeats it in every
/// reply and gives it no meaning (section "Request message"; older texts call it handle).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Cookie(pub u64);
