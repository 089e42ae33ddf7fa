//! The command line of QEMU's disk server, without its output (feature `server`): options, objects,
//! TLS, and the image that they describe.
//!
//! The options are parsed like getopt_long and have the same meaning; unsupported ones are refused
//! by name.
//!
//! ```
//! use nbd_jobs::JobContext;
//! use nbd_jobs::qemu_nbd::{Activation, Wanted, parse};
//! use nbd_jobs::remote::Remotes;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("disk.img");
//! std::fs::write(&path, vec![7; 8192])?;
//! let arguments = ["-r".into(), "-f".into(), "raw".into(), path.into()];
//! let Wanted::Work(options) = parse(arguments.to_vec())? else { unreachable!("no --help") };
//! options.check(Activation::None)?;
//! let opened = options.open(&JobContext::default(), None, &Remotes::default())?;
//! assert_eq!(opened.export.info().size, 8192);
//! # Ok(())
//! # }
//! ```

mod check;
mod error;
mod objects;
mod options;
mod source;
mod tls;

pub use self::check::Activation;
pub use self::error::CommandLineError;
pub use self::objects::Objects;
pub use self::options::{Options, Wanted, parse};
pub use self::source::OpenedSource;
pub use crate::qemu_name::AioMode;
