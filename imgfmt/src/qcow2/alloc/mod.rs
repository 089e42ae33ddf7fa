//! Which clusters of the file are free, reserved, leased or waiting to be reused.

pub(super) mod allocator;
pub(super) mod lease;
pub(super) mod reserve;
