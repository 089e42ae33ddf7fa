//! In place of object stores, in a program without them.

use std::ffi::{OsStr, OsString};
use std::io;

use clap::Args;
use nbd_jobs::object::ObjectOpener;

/// Options of object stores: there are none.
#[derive(Clone, Debug, Default, Args)]
pub struct ObjectArgs {}

/// Says that this process reads each part of an image once.
pub(crate) fn read_once() {}

impl ObjectArgs {
    /// Returns what refuses objects.
    #[allow(clippy::unused_self, reason = "as in the program with object stores")]
    pub(crate) fn opener(&self) -> ObjectOpener {
        ObjectOpener::default()
    }

    /// Returns the name itself: without object stores there are no backups in repositories.
    #[allow(clippy::unused_self, reason = "as in the program with object stores")]
    pub(crate) fn pinned(&self, name: &OsStr) -> io::Result<OsString> {
        Ok(name.to_owned())
    }
}
