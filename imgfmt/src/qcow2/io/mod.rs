//! Reading, writing, zeroing and compressing guest data.

pub(super) mod compress;
pub(super) mod cow;
pub(super) mod erase;
pub(super) mod plan;
pub(crate) mod populate;
pub(super) mod preallocate;
pub(super) mod read;
pub(super) mod write;
pub(super) mod write_compressed;
pub(super) mod zero;
