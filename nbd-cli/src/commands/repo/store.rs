//! Which repository, and its passphrase.

use std::ffi::OsString;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;

use clap::Args;
use nbd_jobs::date::date_and_time;
use nbd_jobs::repository::repository_error;
use nbd_jobs::secret::SecretBytes;
use nbd_jobs::size::rounded;
use nbd_objects::repo::{Head, Id, Repository};
use nbd_objects::{Place, StoreUrl};

use crate::error::CommandError;
use crate::file_path::FilePathParser;
use crate::objects::ObjectArgs;
use crate::output::printable;
use crate::passphrase::read_passphrase;

/// A repository.
#[derive(Debug, Args)]
pub struct StoreArgs {
    /// The repository: a folder, or s3://bucket/prefix.
    #[arg(value_name = "REPOSITORY")]
    pub repository: OsString,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub passphrase: PassphraseArgs,
}

/// The passphrase of an encrypted repository.
#[derive(Clone, Debug, Default, Args)]
pub struct PassphraseArgs {
    /// File with the passphrase of an encrypted repository: its first line.
    #[arg(long, value_name = "FILE", env = "NBD_PASSPHRASE_FILE", value_parser = FilePathParser)]
    pub passphrase_file: Option<PathBuf>,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub objects: Box<ObjectArgs>,
}

impl StoreArgs {
    /// Reads the passphrase, if its file is given.
    pub(crate) fn passphrase(&self) -> Result<Option<SecretBytes>, CommandError> {
        self.passphrase.read()
    }

    /// Returns the place of a new repository. A folder is made.
    pub(super) fn new_place(&self) -> Result<Place, CommandError> {
        if let StoreUrl::Directory(path) = url(&self.repository)? {
            let mut builder = std::fs::DirBuilder::new();
            // Other users must not read the backups.
            builder.recursive(true).mode(0o700).create(&path).map_err(|error| {
                CommandError::new(format!("cannot make the folder '{}': {error}", path.display()))
            })?;
        }
        place(&self.repository, &self.passphrase.objects)
    }

    /// Opens the repository.
    pub(super) async fn open(&self) -> Result<Repository, CommandError> {
        open(&self.repository, &self.passphrase).await
    }
}

impl PassphraseArgs {
    /// Reads the passphrase, if its file is given.
    pub(crate) fn read(&self) -> Result<Option<SecretBytes>, CommandError> {
        self.passphrase_file.as_deref().map(read_passphrase).transpose()
    }
}

fn url(repository: &OsString) -> Result<StoreUrl, CommandError> {
    let text = repository.to_str().ok_or_else(|| {
        CommandError::new(format!("'{}' is not UTF-8", repository.to_string_lossy()))
    })?;
    let url: StoreUrl = text.parse().map_err(|why: String| CommandError::new(why))?;
    match url {
        StoreUrl::Http(_) => Err(CommandError::new(format!(
            "{url} cannot be a repository: it is only read; give a folder or s3://bucket/prefix"
        ))),
        url => Ok(url),
    }
}

fn place(repository: &OsString, objects: &ObjectArgs) -> Result<Place, CommandError> {
    let url = url(repository)?;
    if let StoreUrl::Directory(path) = &url
        && !path.is_dir()
    {
        let path = path.display().to_string();
        return Err(CommandError::new(match path.strip_prefix("backup:") {
            Some(repository) => format!(
                "'{path}' is an address of backups; give the repository alone, such as '{repository}'"
            ),
            None => {
                format!(
                    "the directory '{path}' does not exist; make a repository with 'nbd-cli repo init'"
                )
            }
        }));
    }
    Place::open(&url, &objects.settings()).map_err(|error| CommandError::new(error.to_string()))
}

/// Opens a repository.
pub(crate) async fn open(
    repository: &OsString,
    passphrase: &PassphraseArgs,
) -> Result<Repository, CommandError> {
    let (place, passphrase) = (place(repository, &passphrase.objects)?, passphrase.read()?);
    let opened = Repository::open(place, passphrase.as_deref().map(Vec::as_slice)).await;
    Ok(opened.map_err(|error| match passphrase {
        None => {
            let text = error.to_string();
            let wanted = text.replace("give its passphrase", "give --passphrase-file");
            nbd_jobs::JobError::new(repository_error(error).kind(), wanted)
        }
        Some(_) => repository_error(error),
    })?)
}

/// Describes a backup in one line.
pub(crate) fn described(id: Id, head: &Head) -> String {
    let names: Vec<_> = head.disks.iter().map(|disk| &*disk.name).collect();
    let disks = if names.is_empty() { String::new() } else { format!(" ({})", names.join(", ")) };
    format!(
        "{id}  {}  {:>8}  {}{}",
        date_and_time(head.time / 1000),
        rounded(head.bytes()),
        printable(&head.name),
        printable(&disks)
    )
}
