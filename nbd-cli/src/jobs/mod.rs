//! What long work on disks has in common: its errors, its progress, and how it is ended early.

mod cancellation;
pub(crate) mod connect;
mod error;
pub(crate) mod files;
mod observer;
pub(crate) mod text;

pub(crate) use self::cancellation::Cancellation;
pub(crate) use self::error::{JobError, JobErrorKind};
pub(crate) use self::observer::{JobContext, Meter, Observer, Phase, Progress, TemporaryFile};
