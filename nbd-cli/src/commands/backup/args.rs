//! The arguments of `nbd-cli backup`.

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use imgfmt::NewKey;
use nbd_proto::NbdUri;

use crate::commands::image::open::TrustArgs;
#[cfg(feature = "object-storage")]
use crate::commands::repo::PassphraseArgs;
use crate::connect::{ConnectionArgs, TlsArgs};
use crate::error::CommandError;
use crate::file_path::FilePathParser;
use crate::key_file::KeyArgs;
use crate::locking::{LockArgs, ShareArgs};
use crate::new_key::NewKeyArgs;
use crate::progress::{RateArgs, SummaryArgs};

const AFTER_HELP: &str = "\
Examples:
  nbd-cli backup nbd://vmhost/disk sunday.qcow2
  nbd-cli backup --bitmap daily --base sunday.qcow2 nbd://vmhost/disk monday.qcow2
  nbd-cli backup --control /run/nbd.control --export vm --bitmap daily sunday.qcow2
  nbd-cli backup --control /run/nbd.control --export vm -B daily --base sunday.qcow2 monday.qcow2
  nbd-cli backup --encrypt --new-key-file disk.key nbd://vmhost/disk secret.qcow2
  nbd-cli restore monday.qcow2 disk.img
  nbd-cli backup --name vm1 nbd://vmhost/disk /srv/backups
  nbd-cli backup --name vm1 --control /run/nbd.control system=vm data=vm-data /srv/backups

A full backup is a qcow2 file that stands alone. An incremental backup contains the ranges that are
dirty in a bitmap of the server (context qemu:dirty-bitmap:NAME), and its backing file is the
previous backup. The operator of the server starts the bitmap when a backup is taken and clears it
when the next one is complete; the disk should not change during the copy. All files of a chain may
be moved together.

Every backup records its identity in its file. A base that is not, or may not be, the backup after
which the bitmap started is refused: one that was changed, cut off or converted, is of another disk,
or is already the base of a later backup. With --control the image of the disk provides this
information; without it, only the files do.

With --control all of this is automatic: the disk is copied in its state at one moment while clients
continue to write, the bitmap restarts empty at that moment, and if the backup fails no dirty bits are
lost. Such a backup cannot be resumed, because that state no longer exists. However the backup ends,
even by SIGKILL, its checkpoint ends with it.

A running backup is TARGET.partial, with its progress in TARGET.partial.json; when complete it is
renamed in one step. After an interruption --resume continues it, which is valid only if the disk
has not changed since. On a block device the previous data is lost at once; the device is marked as
incomplete until the backup is complete, and a backup there cannot be resumed. Other programs can
change a device without a trace: as the base of another backup it needs --trust-base.

With --encrypt the new file is encrypted. The files below it are opened with --key-file, or with the
passphrase of the new one. Opening a chain takes the --iter-time of each of its files.

With --name the backup is made in a repository ('nbd-cli repo'), and SOURCE may also be an image that
does not change. Every backup there is complete: what the last backup of this name has is not sent
again, and no backup needs another one. With --bitmap, or --control and --bitmap, only what is dirty
is read, if the last backup is the one after which the bitmap started. There is nothing to resume: a
backup after an interrupted one sends what is missing. The bitmap restarts when the backup is
durable.";

/// Arguments of `nbd-cli backup`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
#[command(override_usage = "nbd-cli backup [OPTIONS] <SOURCE> <TARGET>\n       \
                            nbd-cli backup [OPTIONS] --control <PATH> --export <NAME> [SOURCE] <TARGET>\n       \
                            nbd-cli backup [OPTIONS] --name <NAME> <DISK=SOURCE>... <TARGET>")]
pub struct BackupArgs {
    /// The disk, as an NBD URI. Optional with --control: the server reports its address.
    // Clap accepts no options between an optional argument and a required one after it: a single
    // argument is the target.
    #[arg(value_name = "SOURCE")]
    pub first_operand: OsString,

    /// The new qcow2 file, or a block device to overwrite; with --name the repository.
    #[arg(value_name = "TARGET")]
    pub second_operand: Option<OsString>,

    /// More disks, with --name: all are given as DISK=SOURCE, each with a name of its own, and the
    /// repository is the last argument. With --control, SOURCE is the name of an export, and all
    /// are backed up at the same moment.
    #[cfg(feature = "object-storage")]
    #[arg(value_name = "DISK=SOURCE")]
    pub more_operands: Vec<OsString>,

    #[cfg(feature = "object-storage")]
    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub repository: RepositoryArgs,

    #[arg(skip)]
    pub(super) source: Option<NbdUri>,

    #[arg(skip)]
    pub(super) target: PathBuf,

    /// Copy only the ranges that are dirty in this bitmap of the server. With --control and without
    /// --base a full backup is made, and the bitmap starts there.
    #[arg(short = 'B', long, value_name = "NAME")]
    pub bitmap: Option<String>,

    /// The previous backup: it provides everything that is not dirty.
    #[arg(short, long, value_name = "FILE", requires = "bitmap", value_parser = FilePathParser)]
    pub base: Option<PathBuf>,

    /// Accept a base whose correctness cannot be determined: it has no identity (an older version
    /// made it, or it was converted), it was changed since, or the server does not know after which
    /// backup the bitmap started. A base that is known to be wrong is still refused.
    #[arg(long, requires = "base")]
    pub trust_base: bool,

    /// Create a checkpoint of a disk in use, through the control socket of its server, and copy
    /// from that.
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// Name of the disk's export, with --control.
    #[arg(long, value_name = "NAME", requires = "control")]
    pub export: Option<String>,

    /// Continue an interrupted backup. The disk must be unchanged since then.
    #[arg(long, conflicts_with = "control")]
    pub resume: bool,

    /// Discard an interrupted backup and start again.
    #[arg(long, conflicts_with = "resume")]
    pub restart: bool,

    /// Encrypt the new backup with LUKS (AES-256, XTS) and the passphrase in --new-key-file. A
    /// backup on an encrypted base has to be encrypted.
    #[arg(long, requires = "new_key_file")]
    pub encrypt: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub new_key: NewKeyArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub keys: KeyArgs,

    /// Read both sides again at the end and compare checksums: of the copied data, or of the
    /// complete disk.
    #[arg(long, value_enum, value_name = "WHAT", num_args = 0..=1, require_equals = true,
          default_missing_value = "copied")]
    pub verify: Option<Verify>,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub connection: ConnectionArgs,

    /// Requests in flight [default: 32; 8 with --name].
    #[arg(short = 'R', long, value_name = "N")]
    pub requests: Option<NonZeroUsize>,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub share: ShareArgs,

    /// Trust the images: follow the names of backing and data files in them to any directory and to
    /// servers (nbd://…), and detect the format of a backing file if the image does not record it.
    /// Without this, only files in the image's directory and below it are opened.
    #[arg(long)]
    pub trust_image: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub locks: LockArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub rate: RateArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub summary: SummaryArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub tls: TlsArgs,
}

/// The heading of these options in the help.
#[cfg(feature = "object-storage")]
const HEADING: &str = "Backups in a repository";

/// Options of backups in a repository.
#[cfg(feature = "object-storage")]
#[derive(Debug, Args)]
pub struct RepositoryArgs {
    /// Make the backup in a repository, the TARGET, under this name.
    #[arg(long, value_name = "NAME", help_heading = HEADING,
          conflicts_with_all = ["base", "resume", "restart", "encrypt", "new_key_file"])]
    pub name: Option<String>,

    /// Read the whole disk, whatever the bitmap says; only what changed is sent.
    #[arg(long, requires = "name", help_heading = HEADING)]
    pub full: bool,

    /// Do not send blocks that this backup has either, anywhere on its disk: NAME@WHICH, for
    /// example that of a template. May be repeated.
    #[arg(long, requires = "name", value_name = "BACKUP", help_heading = HEADING)]
    pub like: Vec<String>,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub passphrase: PassphraseArgs,
}

/// The data to compare at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Verify {
    /// The data that this backup has copied.
    Copied,
    /// The complete disk, which also shows whether the base and the bitmap belong together.
    All,
}

impl BackupArgs {
    /// The data to compare at the end.
    pub(super) fn verified(&self) -> nbd_jobs::Verify {
        match self.verify {
            None => nbd_jobs::Verify::Nothing,
            Some(Verify::Copied) => nbd_jobs::Verify::Copied,
            Some(Verify::All) => nbd_jobs::Verify::All,
        }
    }

    /// The files that images may name, and the keys of encrypted ones.
    pub(super) fn trust(&self) -> TrustArgs {
        let (trust_image, locks, keys) = (self.trust_image, self.locks, self.keys.clone());
        TrustArgs { trust_image, locks, keys }
    }

    /// The key of the new backup.
    pub(super) fn new_key(&self) -> Result<Option<NewKey>, CommandError> {
        match &self.new_key.new_key_file {
            Some(file) if self.encrypt => self.new_key.iter_time.key(file).map(Some),
            Some(_) => Err(CommandError::new(
                "--new-key-file is for a new encrypted backup; add --encrypt, or leave it out",
            )),
            None => Ok(None),
        }
    }
}
