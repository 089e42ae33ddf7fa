//! An incomplete backup: the growing file and the record of its progress; or the block device.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use crate::target::device;
use imgfmt::storage::{FileLock, FileStorage};
use imgfmt::{
    Access, BackingFile, BackupIdentity, CreateOptions, Format, Image, Locking, NewOnDevice,
    OpenOptions, OpenPolicy, Repair,
};
use nbd_proto::NbdUri;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde::{Deserialize, Serialize};

use super::chain::Base;
use super::options::{BackupJob, CLUSTER_SIZE, Leftover, Sharing};
use crate::error::{JobError, JobErrorKind};
use crate::files::directory_of;

/// Largest record that is read, in bytes.
const MAX_STATE_LEN: u64 = 64 << 10;

/// The record: the source of the backup, and the position up to which it is complete. Unknown
/// fields are an error, because they carry information that this version would ignore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct State {
    version: u32,
    source: String,
    size: u64,
    bitmap: Option<String>,
    /// The base as the user named it; escaped as by Rust's `Debug` if it is not UTF-8.
    base: Option<String>,
    /// The UUID of the base, if it has one.
    #[serde(default)]
    base_identity: Option<String>,
    /// Whether the file is encrypted. Absent if it is not, as older versions know it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    is_encrypted: bool,
    /// Every byte below is durably in the file.
    done: u64,
}

impl State {
    pub(super) fn new(work: BackupJob<'_>, uri: &NbdUri, size: u64, base: Option<&Base>) -> Self {
        Self {
            version: 1,
            source: uri.to_string(),
            size,
            bitmap: work.options.bitmap.clone(),
            base: work.options.base.as_deref().map(written),
            base_identity: base.and_then(Base::id).map(|id| id.to_string()),
            is_encrypted: work.options.encryption.is_some(),
            done: 0,
        }
    }

    /// Describes the difference from an earlier attempt.
    fn difference(&self, former: &Self) -> Option<String> {
        let on = |is_on: bool| if is_on { "LUKS" } else { "none" }.to_owned();
        let name = |name: &Option<String>| name.clone().unwrap_or_else(|| "none".to_owned());
        let pairs = [
            ("version", self.version.to_string(), former.version.to_string()),
            ("source", self.source.clone(), former.source.clone()),
            ("size", self.size.to_string(), former.size.to_string()),
            ("bitmap", name(&self.bitmap), name(&former.bitmap)),
            ("base", name(&self.base), name(&former.base)),
            ("encryption", on(self.is_encrypted), on(former.is_encrypted)),
            ("base's identity", name(&self.base_identity), name(&former.base_identity)),
        ];
        let found = pairs.into_iter().find(|(_, now, then)| now != then);
        found.map(|(what, now, then)| format!("its {what} was {then} and is now {now}"))
    }
}

/// The storage of a growing backup.
enum PartialKind {
    /// In `TARGET.partial`, with a record of its progress beside it.
    File { record: PathBuf },
    /// On a block device, marked as incomplete; it cannot be resumed.
    Device(NewOnDevice),
}

/// The growing backup.
pub(super) struct Partial {
    path: PathBuf,
    kind: PartialKind,
    target: PathBuf,
    /// The base, and the backups below it.
    base: Vec<PathBuf>,
    /// Held from the creation of the file until it has its final name.
    lock: Option<FileLock>,
    state: State,
}

impl Partial {
    /// Creates the file, or opens that of an earlier attempt.
    pub(super) fn begin(
        work: BackupJob<'_>,
        state: State,
        base: Option<&Base>,
    ) -> Result<Self, JobError> {
        if work.is_on_device() {
            return Self::begin_on_device(work, state, base);
        }
        let with = |suffix: &str| {
            let mut name = work.target.to_owned().into_os_string();
            name.push(suffix);
            PathBuf::from(name)
        };
        let (path, record) = (with(".partial"), with(".partial.json"));
        let target = work.target.to_owned();
        let files = base.map(|base| base.files.clone()).unwrap_or_default();
        let kind = PartialKind::File { record };
        let mut partial = Self { path, kind, target, base: files, lock: None, state };
        if partial.path.symlink_metadata().is_ok() {
            if work.options.leftover == Leftover::Resume {
                partial.lock = partial.lock(work)?;
                partial.resume(work)?;
                return Ok(partial);
            }
            if work.options.leftover == Leftover::Refuse {
                return Err(JobError::destination(format!(
                    "'{}' is left over from an interrupted backup; add --resume to go on with it, \
                     if the disk has not changed since, or --restart to begin again",
                    partial.path.display()
                )));
            }
            partial.remove(work)?;
        } else if work.options.leftover == Leftover::Resume {
            return Err(JobError::destination(format!(
                "there is nothing to resume: '{}' does not exist",
                partial.path.display()
            )));
        }
        // A base that may not be opened is detected before anything is copied.
        let created = Image::create(&partial.path, &partial.new_image(base, work));
        drop(created.map_err(destination_error)?);
        partial.lock = partial.lock(work)?;
        partial.save(0).inspect_err(|_| {
            // It is still empty; the first error is reported.
            let _ = fs::remove_file(&partial.path);
        })?;
        Ok(partial)
    }

    fn begin_on_device(
        work: BackupJob<'_>,
        state: State,
        base: Option<&Base>,
    ) -> Result<Self, JobError> {
        let mut options = options_of(state.size, base, work);
        options.open.locking = work.read_locking();
        options.open.passphrases = work.open_options().passphrases;
        let device = device::begin_image(work.target, &options, &*work.context.observer)?;
        let partial = Self {
            path: work.target.to_owned(),
            kind: PartialKind::Device(device),
            target: work.target.to_owned(),
            base: base.map(|base| base.files.clone()).unwrap_or_default(),
            lock: None,
            state,
        };
        let opened = partial.open(work, Access::ReadWrite);
        opened.map_err(|error| lost(&partial.path, &error))?;
        Ok(partial)
    }

    /// Returns the error of an incomplete backup with the files it leaves; `advice` says how to
    /// continue with a file.
    pub(super) fn failed(&self, error: &JobError, advice: &str) -> JobError {
        match self.kind {
            PartialKind::Device(_) => lost(&self.path, error),
            PartialKind::File { .. } => error.in_words(format!(
                "{error}; what there is of it is in '{}' ({advice})",
                self.path.display()
            )),
        }
    }

    /// Returns the position up to which it is complete, in bytes.
    pub(super) fn done(&self) -> u64 {
        self.state.done
    }

    /// Returns the files it may name: the base named by the user, and the backups below it,
    /// wherever they are.
    fn policy(&self, work: BackupJob<'_>) -> OpenPolicy {
        self.base.iter().fold(work.options.policy.clone(), OpenPolicy::allow_file)
    }

    /// Opens it.
    pub(super) fn open(&self, work: BackupJob<'_>, access: Access) -> Result<Image, JobError> {
        let options = self.options(work).access(access);
        match &self.kind {
            PartialKind::File { .. } => Image::open(&self.path, &options),
            PartialKind::Device(new) => new.open(&options),
        }
        .map_err(destination_error)
    }

    /// Opens it without its base, for reading.
    pub(super) fn open_alone(&self, work: BackupJob<'_>) -> Result<Image, JobError> {
        let options = self.options(work).access(Access::ReadOnly).backing(BackingFile::Ignored);
        match &self.kind {
            PartialKind::File { .. } => Image::open(&self.path, &options),
            PartialKind::Device(new) => new.open(&options),
        }
        .map_err(destination_error)
    }

    /// Returns the options for creating the file.
    fn new_image(&self, base: Option<&Base>, work: BackupJob<'_>) -> CreateOptions {
        let mut options = options_of(self.state.size, base, work);
        options.open = self.options(work);
        options
    }

    /// Returns the options for opening it. If other programs may write to the files below it,
    /// neither these nor the backup are locked: [`lock`](Self::lock) locks a file, and a device is
    /// locked all the time.
    fn options(&self, work: BackupJob<'_>) -> OpenOptions {
        let options = work.open_options().format(Format::Qcow2).policy(self.policy(work));
        let options = options.written_once();
        match work.options.sharing {
            Sharing::Exclusive => options,
            Sharing::Shared => options.locking(Locking::Off),
        }
    }

    /// Locks the file, if it is not locked together with those below it.
    fn lock(&self, work: BackupJob<'_>) -> Result<Option<FileLock>, JobError> {
        match work.options.sharing {
            Sharing::Shared => work.open_file(&self.path).map(FileStorage::into_lock).map(Some),
            Sharing::Exclusive => Ok(None),
        }
    }

    /// Records the position up to which it is complete.
    pub(super) fn save(&mut self, done: u64) -> Result<(), JobError> {
        self.state.done = done;
        let PartialKind::File { record } = &self.kind else { return Ok(()) };
        let text = serde_json::to_vec(&self.state)
            .map_err(|error| JobError::destination(format!("cannot write the record: {error}")))?;
        // A new file replaces the old one, so that a complete record exists at any time.
        let mut new = record.clone().into_os_string();
        new.push(".new");
        let write = || -> io::Result<()> {
            let mut file = File::create(&new)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&new, record)?;
            sync_directory(record)
        };
        write().map_err(|error| {
            JobError::destination(format!("cannot write '{}': {error}", record.display()))
        })
    }

    /// Writes the identity of the backup into the file, and renames it.
    pub(super) fn complete(
        self,
        identity: &BackupIdentity,
        work: BackupJob<'_>,
    ) -> Result<(), JobError> {
        let options = self.options(work);
        let record = match self.kind {
            PartialKind::File { record } => record,
            PartialKind::Device(new) => {
                let completed = new.seal_backup(identity).and_then(|()| new.complete());
                return completed.map_err(|error| lost(&self.path, &image_error(error)));
            }
        };
        Image::seal_backup(&self.path, &options, identity).map_err(image_error)?;
        let rename = || -> io::Result<()> {
            File::open(&self.path)?.sync_all()?;
            renameat_with(CWD, &self.path, CWD, &self.target, RenameFlags::NOREPLACE)?;
            sync_directory(&self.target)
        };
        rename().map_err(|error| {
            JobError::destination(format!(
                "the backup is complete but '{}' cannot be renamed to '{}': {error}",
                self.path.display(),
                self.target.display()
            ))
        })?;
        // The backup has its final name: a remaining record does no harm.
        let _ = fs::remove_file(&record);
        Ok(())
    }

    /// Reads the record of an earlier attempt and checks that it belongs to the same backup.
    fn resume(&mut self, work: BackupJob<'_>) -> Result<(), JobError> {
        let PartialKind::File { record } = &self.kind else { return Ok(()) };
        let former = read_record(record).map_err(|error| {
            JobError::destination(format!(
                "cannot resume: '{}' {error}; begin again with --restart",
                record.display()
            ))
        })?;
        if let Some(difference) = self.state.difference(&former) {
            return Err(JobError::destination(format!(
                "cannot resume: '{}' is of another backup: {difference}; begin again with --restart",
                self.path.display()
            )));
        }
        // A killed process may have left clusters without references.
        let options = self.options(work).access(Access::ReadWrite);
        let report = Image::check_file(&self.path, &options, Repair::Leaks).map_err(image_error)?;
        if report.corruptions > 0 {
            return Err(JobError::destination(format!(
                "cannot resume: '{}' is damaged; begin again with --restart",
                self.path.display()
            )));
        }
        self.state = former;
        Ok(())
    }

    fn remove(&self, work: BackupJob<'_>) -> Result<(), JobError> {
        // A running command holds a lock.
        let storage = work.open_file(&self.path)?;
        drop(storage);
        fs::remove_file(&self.path).map_err(|error| {
            JobError::destination(format!("cannot remove '{}': {error}", self.path.display()))
        })
    }
}

fn read_record(record: &Path) -> Result<State, String> {
    let text = File::open(record)
        .and_then(|file| io::read_to_string(io::Read::take(file, MAX_STATE_LEN)))
        .map_err(|error| format!("cannot be read: {error}"))?;
    let state: State = serde_json::from_str(&text).map_err(|_| "is damaged".to_owned())?;
    if state.done > state.size
        || !state.done.is_multiple_of(CLUSTER_SIZE) && state.done != state.size
    {
        return Err("is damaged".to_owned());
    }
    Ok(state)
}

pub(super) fn image_error(error: imgfmt::Error) -> JobError {
    JobError::image(JobErrorKind::Destination, error)
}

/// Returns the error with the state it leaves on a device.
pub(super) fn lost(device: &Path, error: &JobError) -> JobError {
    error.in_words(format!("{error}; {}", device::left_behind(device)))
}

/// Returns the error of a backup that cannot be opened, with advice.
fn destination_error(error: imgfmt::Error) -> JobError {
    JobError::opening(JobErrorKind::Destination, error).advise_sharing()
}

/// Returns the properties of the new image.
fn options_of(size: u64, base: Option<&Base>, work: BackupJob<'_>) -> CreateOptions {
    let mut options = CreateOptions::new(Format::Qcow2, size);
    options.encryption.clone_from(&work.options.encryption);
    options.cluster_size = CLUSTER_SIZE;
    options.backing = base.map(|base| (base.name.clone(), base.format));
    options
}

/// Converts a path to text; different paths give different texts.
fn written(path: &Path) -> String {
    path.to_str().map_or_else(|| format!("{path:?}"), str::to_owned)
}

fn sync_directory(file: &Path) -> io::Result<()> {
    File::open(directory_of(file))?.sync_all()
}
