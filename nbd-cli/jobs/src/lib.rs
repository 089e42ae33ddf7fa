//! Jobs on whole disks: the work of `nbd-cli` without its command line.
//!
//! [`copy()`] copies a disk between NBD servers, local files, block devices and pipes; holes stay
//! holes:
//!
//! ```
//! use nbd_jobs::{CopyOptions, JobContext, Location, copy};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let (disk, saved) = (directory.path().join("disk.img"), directory.path().join("saved.img"));
//! std::fs::write(&disk, vec![7; 1 << 20])?;
//!
//! let runtime = tokio::runtime::Runtime::new()?;
//! let (from, to) = (Location::File(disk), Location::File(saved.clone()));
//! let copied =
//!     runtime.block_on(copy(&from, &to, &CopyOptions::default(), &JobContext::default()))?;
//! assert_eq!(copied.size, 1 << 20);
//! assert_eq!(std::fs::read(&saved)?, vec![7; 1 << 20]);
//! # Ok(())
//! # }
//! ```
//!
//! A server is a [`Location`] as well: `"nbd://localhost/disk".parse()?`. [`backup()`] makes full
//! and incremental backups of served disks, also of a checkpoint, and [`restore()`] restores them.
//! [`bench`](mod@bench) generates load and measures it. [`control`] sends requests to a running
//! `nbd-cli serve`; with the feature `server`, [`control::server`] is the other side, for any
//! `nbd-server`, and [`serving`] makes exports of images. The feature `monitor` serves metrics and
//! a status page of any `nbd-server`, and has `watch`, which looks at one.
//!
//! # Jobs
//!
//! A job takes plain options and a [`JobContext`]: an [`Observer`], which receives progress and
//! warnings, and a [`Cancellation`], with which the caller cancels the job. Its error is a
//! [`JobError`]: one sentence, and the side at fault. A job prints nothing, catches no signals and
//! reads no environment variables.
//!
//! Jobs are asynchronous and need a tokio runtime with timers and I/O.
//!
//! # Features
//!
//! None is on by default.
//!
//! * `certificates`: `certificates`, which makes authorities, certificates and pre-shared keys.
//! * `devices`: `devices`, kernel devices (`/dev/nbdX`); includes `server`.
//! * `monitor`: `monitor` and `watch`; includes `server`.
//! * `mount`: `mount`, disks as files through FUSE.
//! * `object-storage`: `repository`, backups in repositories, and images on object stores.
//! * `server`: [`serving`], [`control::server`] and what else concerns servers.

pub mod chart;
pub mod graph;
pub mod status;
#[cfg(feature = "monitor")]
pub mod watch;

pub mod archive_check;
mod backup;
pub mod bench;
pub mod bitmaps;
#[cfg(feature = "server")]
pub mod blockdev;
mod cancellation;
#[cfg(feature = "certificates")]
pub mod certificates;
pub mod checksum;
pub mod connect;
pub mod control;
pub mod convert;
pub mod copy;
pub mod date;
#[cfg(feature = "devices")]
pub mod devices;
mod digest;
pub mod disk_options;
mod error;
pub mod files;
pub mod foreign_options;
pub mod frozen_bits;
pub mod getopt;
pub mod image_check;
pub mod image_location;
pub mod image_map;
pub mod image_report;
pub mod key_values;
pub mod known_names;
mod lanes;
mod layers;
mod limited;
mod location;
#[cfg(feature = "monitor")]
pub mod monitor;
#[cfg(feature = "mount")]
pub mod mount;
pub mod object;
mod observer;
#[cfg(feature = "server")]
pub mod opening;
pub mod overlay;
pub mod qemu_name;
#[cfg(feature = "server")]
pub mod qemu_nbd;
pub mod qemu_numbers;
pub mod remote;
#[cfg(feature = "object-storage")]
pub mod repository;
mod restore;
pub mod secret;
pub mod server_report;
#[cfg(feature = "server")]
pub mod serving;
pub mod size;
#[cfg(feature = "server")]
mod sys;
#[cfg(feature = "server")]
pub mod takeover;
pub mod target;
pub mod tasks;
pub mod text;
#[cfg(feature = "server")]
mod unix_socket;
#[cfg(feature = "server")]
pub mod users;
mod zeroes;

pub use self::backup::{
    BackedUp, BackupOptions, BackupSource, Leftover, Sharing, UnknownBase, backup,
};
pub use self::cancellation::Cancellation;
pub use self::connect::{ConnectOptions, TlsSettings};
pub use self::copy::{Copied, CopyOptions, Knowledge, Zeroes, copy};
pub use self::error::{JobError, JobErrorKind};
pub use self::location::{DescribedLocation, Location};
pub use self::observer::{JobContext, Observer, Phase, Progress, TemporaryFile};
pub use self::restore::{
    Check as RestoreCheck, RestoreOptions, Restored, Verify, restore, restore_image,
};
pub use self::target::Durable;

/// The Rust code of `docs/embed.md`, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/embed.md")]
struct Embedding;
