//! What the ways to create images share.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions as FileOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::chain;
use crate::create_options::{CreateOptions, Preallocation, invalid};
use crate::driver::Chain;
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::options::OpenOptions;

/// New files that are removed again unless everything succeeds.
pub(super) struct NewFiles {
    paths: Vec<PathBuf>,
    /// Whether the content of each is put on stable storage.
    syncs: bool,
}

impl NewFiles {
    pub(super) fn new(syncs: bool) -> Self {
        Self { paths: Vec::new(), syncs }
    }

    pub(super) fn create(
        &mut self,
        path: &Path,
        fill: impl FnOnce(&File) -> io::Result<()>,
    ) -> Result<()> {
        let io_error = |error: io::Error| match error.kind() {
            io::ErrorKind::AlreadyExists => Error::new(
                ErrorKind::AlreadyExists,
                "create",
                "there is a file of that name; remove it first or choose another name",
            )
            .with_path(path),
            _ => Error::from_io("create", error).with_path(path),
        };
        let mut new = FileOptions::new();
        let file = new.read(true).write(true).create_new(true).open(path).map_err(io_error)?;
        self.paths.push(path.to_owned());
        let sync = |()| if self.syncs { file.sync_all() } else { Ok(()) };
        fill(&file).and_then(sync).map_err(io_error)
    }

    /// Puts the names of the files on stable storage.
    pub(super) fn sync_names(&self) -> Result<()> {
        for path in &self.paths {
            let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            let directory = File::open(directory.unwrap_or(Path::new(".")));
            let synced = directory.and_then(|directory| directory.sync_all());
            synced.map_err(|error| Error::from_io("create", error).with_path(path))?;
        }
        Ok(())
    }

    pub(super) fn keep(mut self) {
        self.paths.clear();
    }
}

impl Drop for NewFiles {
    fn drop(&mut self) {
        for path in &self.paths {
            // An incomplete image is useless. The error that led here is reported, not this one.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Opens a file that was just made.
pub(super) fn open_to_write(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::open(path, flags, rustix::fs::Mode::empty())
}

/// Refuses encryption where it is not possible.
pub(super) fn refuse_contradicting_encryption(options: &CreateOptions) -> Result<()> {
    if options.encryption.is_none() {
        return match options.format {
            Format::Luks => {
                let detail = "an encrypted volume needs a passphrase";
                Err(Error::new(ErrorKind::KeyRequired, "create", detail))
            }
            _ => Ok(()),
        };
    }
    Err(invalid(match (options.format, options.preallocation) {
        (Format::Luks, Preallocation::Metadata) => {
            "an encrypted volume has no metadata to preallocate; set its space aside (falloc) or write \
             zeroes (full)"
        }
        (Format::Qcow2, _) if options.data_file.is_some() => "an encrypted image has no data file",
        (Format::Luks | Format::Qcow2, _) => return Ok(()),
        _ => "only qcow2 images and LUKS volumes are encrypted",
    }))
}

/// Refuses a backing file above which the new image could not be opened.
pub(super) fn check_below(
    path: &Path,
    name: &OsStr,
    format: Format,
    create: &CreateOptions,
) -> Result<()> {
    // It may replace a file, which has the name that it has in the end.
    let finally = match &create.foreign.final_name {
        Some(name) if !path.exists() => &*path.with_file_name(name),
        _ => path,
    };
    chain::check_new_backing(finally, &create.open, name, format)
        .map_err(|error| error.with_path(finally))
}

/// Opens the backing file of a new image.
pub(super) fn open_below(
    path: &Path,
    name: &OsStr,
    format: Format,
    create: &CreateOptions,
) -> Result<Chain> {
    check_below(path, name, format, create)?;
    let options = OpenOptions::new()
        .format(format)
        .locking(create.open.locking)
        .policy(create.open.policy.clone());
    let options = OpenOptions { passphrases: create.open.passphrases.clone(), ..options };
    chain::open_named(path, name, &options)
}
