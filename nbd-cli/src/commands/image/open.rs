//! Opens the images of the commands, and explains failures.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use clap::Args;
use imgfmt::{Access, Error, Image, OpenOptions, OpenPolicy};
use nbd_jobs::remote::{allow_exports, allow_json_files};
use nbd_jobs::{JobError, JobErrorKind};

use crate::connect::ServerArgs;
use crate::error::CommandError;
use crate::image_format::ImageFormat;
use crate::key_file::KeyArgs;
use crate::locking::{LockArgs, ShareArgs};
use crate::objects::ObjectArgs;

/// Options for opening an existing image.
#[derive(Clone, Debug, Default, Args)]
pub struct OpenArgs {
    /// Format of the image; detected unless given.
    #[arg(short, long)]
    pub format: Option<ImageFormat>,

    #[command(flatten)]
    pub trust: TrustArgs,
}

/// The other files that an image may name.
#[derive(Clone, Debug, Default, Args)]
pub struct TrustArgs {
    /// Trust the image: follow the names of backing and data files in it to any directory and to
    /// servers (nbd://…), and detect the format of a backing file if the image does not record it.
    /// Without this, only files in the image's directory and below it are opened.
    #[arg(long)]
    pub trust_image: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub locks: LockArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub keys: KeyArgs,
}

impl TrustArgs {
    pub(in crate::commands) fn policy(&self) -> OpenPolicy {
        self.policy_with(&ServerArgs::default())
    }

    /// `server` has the options for the servers that the image names.
    pub(in crate::commands) fn policy_with(&self, server: &ServerArgs) -> OpenPolicy {
        match self.trust_image {
            true => allow_exports(OpenPolicy::any_file().allow_format_probe(), &server.remotes()),
            false => allow_json_files(OpenPolicy::new()),
        }
    }

    /// For an image whose format is detected or set later.
    pub(in crate::commands) fn options(&self) -> OpenOptions {
        self.keys.apply(self.locks.options().policy(self.policy()))
    }
}

impl OpenArgs {
    pub(in crate::commands) fn options(&self) -> OpenOptions {
        options(self.format, &self.trust)
    }

    /// `server` has the options for the servers that the image names.
    pub(in crate::commands) fn options_with(&self, server: &ServerArgs) -> OpenOptions {
        self.options().policy(self.trust.policy_with(server))
    }

    /// Opens an image to read it.
    pub(in crate::commands) fn read(
        &self,
        path: &Path,
        share: ShareArgs,
    ) -> Result<Image, CommandError> {
        Image::open(path, &share.apply(self.options())).map_err(explained)
    }

    /// Opens an image to change it.
    pub(in crate::commands) fn change(&self, path: &Path) -> Result<Image, CommandError> {
        Image::open(path, &self.options().access(Access::ReadWrite)).map_err(explained)
    }
}

pub(in crate::commands) fn options(format: Option<ImageFormat>, trust: &TrustArgs) -> OpenOptions {
    let options = trust.options();
    match format {
        Some(format) => options.format(format.into()),
        None => options,
    }
}

/// Returns the name that an image may record for a backing file: that of a backup in a repository
/// has the ID of the backup.
pub(in crate::commands) fn pinned(name: &OsStr) -> Result<OsString, CommandError> {
    let pinned = ObjectArgs::default().pinned(name);
    pinned.map_err(|error| CommandError::new(error.to_string()))
}

/// Returns the error with the option that would allow the refused operation.
pub(in crate::commands) fn explained(error: Error) -> CommandError {
    explained_with(error, "--format raw")
}

/// Like [`explained`], where another option gives the format.
pub(in crate::commands) fn explained_with(error: Error, raw_option: &str) -> CommandError {
    JobError::opening_with(JobErrorKind::Source, error, raw_option).into()
}
