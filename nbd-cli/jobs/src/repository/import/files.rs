//! The files of a chain of images.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use imgfmt::storage::FileIdentity;
use imgfmt::{Backup, Format, Image, OpenOptions};
use openssl::sha::Sha256;

use crate::backup::chain_problem;
use crate::error::{JobError, JobErrorKind};
use crate::layers::check_layer;
use crate::observer::JobContext;
use crate::text::printable;

/// Bytes of a file that are part of what it is: the header of an image, and often more.
const HEADER_LEN: u64 = 64 << 10;

/// A chain of images that is open, and therefore locked.
pub(super) struct Chain {
    image: Image,
    options: OpenOptions,
    /// The files, from the top to the bottom.
    files: Vec<(PathBuf, Format)>,
    /// What the files say of the backups that they are, in the same order.
    backups: Vec<(Option<PathBuf>, Option<Backup>)>,
}

/// One file of a chain, with what is below it.
pub(super) struct Layer {
    pub(super) image: Arc<Image>,
    pub(super) path: PathBuf,
    /// What it is: another text if anything of it was written since.
    pub(super) what: String,
    /// The backup that it is, if it is as that left it, and so is what is below.
    pub(super) backup: Option<Backup>,
    /// The names of its internal snapshots.
    pub(super) snapshots: Vec<String>,
}

impl Chain {
    /// Opens a chain by its newest file. Blocks.
    pub(super) fn open(path: &Path, options: &OpenOptions) -> Result<Self, JobError> {
        let image = Image::open(path, options);
        let image = image.map_err(|error| JobError::opening(JobErrorKind::Source, error))?;
        let mut files = vec![None; image.layer_sizes().len()];
        files[0] = Some((path.to_owned(), image.format()));
        for (path, _) in image.files() {
            let Some((depth, format)) = image.layer_in(&path) else { continue };
            if let Some(file) = files.get_mut(depth as usize - 1) {
                *file = Some((path, format));
            }
        }
        let files: Option<Vec<_>> = files.into_iter().collect();
        let is_of_files = image.other_layers().is_empty();
        let files = files.filter(|_| is_of_files).ok_or_else(|| {
            JobError::source(
                "what is below it is not a file, and may change; convert it to a file, or back it up \
                 with 'nbd-cli backup --name'",
            )
        })?;
        let backups = image.backups_of_chain();
        Ok(Self { image, options: options.clone(), files, backups })
    }

    /// Returns when each file was written last, in milliseconds since 1970, from the bottom to the
    /// top. What copies and clocks have made of these times is put in the order of the chain: no
    /// file has changed since there is one above it.
    pub(super) fn times(&self) -> Result<Vec<u64>, JobError> {
        let mut times = Vec::new();
        let mut latest = milliseconds(SystemTime::now());
        for (path, _) in &self.files {
            let written = fs::metadata(path).and_then(|metadata| metadata.modified());
            let written = written.map_err(|error| unreadable(path, &error.to_string()))?;
            times.push(milliseconds(written).min(latest));
            latest = times[times.len() - 1].saturating_sub(1);
        }
        times.reverse();
        Ok(times)
    }

    /// Opens a file, counted from the bottom, and all below it. Blocks.
    pub(super) fn layer(&self, number: usize) -> Result<Layer, JobError> {
        let depth = self.files.len() - 1 - number;
        let (path, format) = &self.files[depth];
        let options = self.options.clone().format(*format);
        let image = Image::open(path, &options);
        let image = image.map_err(|error| JobError::opening(JobErrorKind::Source, error))?;
        let backup = self.backups.get(depth).and_then(|(_, backup)| backup.clone());
        // Upon another file than it was made upon it is another disk.
        let backup = backup.filter(|_| chain_problem(&self.backups[depth..]).is_none());
        let info = image.info().map_err(|error| JobError::opening(JobErrorKind::Source, error))?;
        let snapshots = info.qcow2.map(|info| info.snapshots).unwrap_or_default();
        let snapshots = snapshots.into_iter().map(|snapshot| snapshot.name).collect();
        let (what, path) = (what_it_is(&image)?, path.clone());
        Ok(Layer { image: Arc::new(image), path, what, backup, snapshots })
    }

    /// Checks that a file, counted from the bottom, has what the backup that it is put into it, and
    /// is upon the right one. Reads all of it. Blocks.
    pub(super) fn check(&self, number: usize, context: &JobContext) -> Result<(), JobError> {
        let depth = self.files.len() - 1 - number;
        let layers = (&*self.backups, depth);
        check_layer(&self.image, layers, None, &self.options, context).map(drop)
    }
}

/// Most names of snapshots in a warning.
const NAMED_MAX: usize = 8;

impl Layer {
    /// Returns a warning if it has internal snapshots: no backup holds them.
    pub(super) fn left_out(&self) -> Option<String> {
        let named = self.snapshots.iter().take(NAMED_MAX);
        let mut names: Vec<_> = named.map(|name| format!("'{}'", printable(name))).collect();
        let count = self.snapshots.len();
        if count > NAMED_MAX {
            names.push(format!("{} more", count - NAMED_MAX));
        }
        (count > 0).then(|| {
            let (path, names) = (self.path.to_string_lossy(), names.join(", "));
            let path = printable(&path);
            format!(
                "the internal snapshots of '{path}' are not imported ({names}): keep the file, or \
                 import what 'nbd-cli image convert --snapshot NAME {path} FILE' makes of each"
            )
        })
    }

    /// Checks that it is what it was when it was opened. Blocks.
    pub(super) fn check_unchanged(&self) -> Result<(), JobError> {
        match what_it_is(&self.image)? == self.what {
            true => Ok(()),
            false => Err(unreadable(&self.path, "it, or what is below it, was changed meanwhile")),
        }
    }
}

/// Returns a hash of what tells a chain of files from all others: the length, the time and the
/// header of each.
fn what_it_is(image: &Image) -> Result<String, JobError> {
    let mut hash = Sha256::new();
    hash.update(&image.size().to_le_bytes());
    for (path, identity) in image.files() {
        if FileIdentity::of(&path) != Some(identity) {
            return Err(unreadable(&path, "it was replaced"));
        }
        let failed = |error: std::io::Error| unreadable(&path, &error.to_string());
        let file = File::open(&path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            let why = "it is not a file, and it cannot be known whether it was imported before; back \
                       it up with 'nbd-cli backup --name'";
            return Err(unreadable(&path, why));
        }
        let written = metadata.modified().map_err(failed)?;
        let since = written.duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut header = Vec::new();
        file.take(HEADER_LEN).read_to_end(&mut header).map_err(failed)?;
        hash.update(&metadata.len().to_le_bytes());
        hash.update(&since.as_nanos().to_le_bytes());
        hash.update(&(header.len() as u64).to_le_bytes());
        hash.update(&header);
    }
    Ok(hash.finish().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn milliseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn unreadable(path: &Path, why: &str) -> JobError {
    JobError::source(format!("'{}' cannot be imported: {why}", path.display()))
}
