//! Jobs on whole disks, from image to image.
//!
//! [`convert`] copies a disk into another image, [`compare`] finds the first difference of two,
//! [`commit`] writes an overlay into its backing file, [`stream`] copies into one what is below it,
//! [`rebase`] prepares one for another backing file, and [`measure`] says how large a copy would
//! be. The images are opened by the caller, in any storage. Each function has an example.
//!
//! A job takes plain options and a [`JobContext`]: an [`Observer`], which receives progress, and a
//! [`Cancellation`], with which the caller cancels the job between two steps. Its error is a
//! [`JobError`]: one sentence, and the side at fault. Jobs run on the caller's thread and on
//! threads that end before they return; they need no runtime.

mod cancellation;
mod commit;
mod compare;
mod convert;
mod error;
mod flushes;
mod measure;
mod observer;
mod rate_limit;
mod rebase;
mod snapshots;
mod stream;
mod stream_order;

pub use self::cancellation::Cancellation;
pub use self::commit::{Committed, commit};
pub use self::compare::{CompareOptions, Compared, compare};
pub use self::convert::{
    Background, Clusters, ConvertOptions, Converted, SourceReader, Unreadable, Zeroes, convert,
    copy_bitmaps,
};
pub use self::error::{JobError, JobErrorKind};
pub use self::measure::{MeasuredDisk, Measurement, measure};
pub use self::observer::{JobContext, Observer, Progress};
pub use self::rate_limit::RateLimit;
pub use self::rebase::{Rebased, rebase};
pub use self::stream::{Streamed, ToStream, measure_stream, stream, stream_in_place};
