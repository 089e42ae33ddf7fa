//! How the commands open images, and what they say when that fails.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use clap::Args;
use imgfmt::{Access, Error, Image, OpenOptions, OpenPolicy};
use nbd_jobs::{JobError, JobErrorKind};

use crate::connect::ServerArgs;
use crate::error::CommandError;
use crate::image_format::ImageFormat;
use crate::locking::{LockArgs, ShareArgs};
use crate::remote::{allow_exports, allow_json_files};

/// How an image that exists is opened.
#[derive(Clone, Debug, Args)]
pub struct OpenArgs {
    /// Format of the image; detected unless given.
    #[arg(short, long)]
    pub format: Option<ImageFormat>,

    #[command(flatten)]
    pub trust: TrustArgs,
}

/// Which other files an image may make us open.
#[derive(Clone, Debug, Args)]
pub struct TrustArgs {
    /// Trust the image: follow the names of backing and data files that it contains wherever they
    /// lead, to servers (nbd://…) too, and find out the format of a backing file where the image
    /// does not say it. Without this only files in the image's folder and below are opened.
    #[arg(long)]
    pub trust_image: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub locks: LockArgs,
}

impl TrustArgs {
    pub(in crate::commands) fn policy(&self) -> OpenPolicy {
        self.policy_with(&ServerArgs::default())
    }

    /// `server` is for the servers that the image names.
    pub(in crate::commands) fn policy_with(&self, server: &ServerArgs) -> OpenPolicy {
        match self.trust_image {
            true => allow_exports(OpenPolicy::any_file().allow_format_probe(), server),
            false => allow_json_files(OpenPolicy::new()),
        }
    }

    /// For an image whose format is to be looked at or set later.
    pub(in crate::commands) fn options(&self) -> OpenOptions {
        self.locks.options().policy(self.policy())
    }
}

impl OpenArgs {
    pub(in crate::commands) fn options(&self) -> OpenOptions {
        options(self.format, &self.trust)
    }

    /// `server` is for the servers that the image names.
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

/// The error with the option that would allow what was refused.
pub(in crate::commands) fn explained(error: Error) -> CommandError {
    explained_with(error, "--format raw")
}

/// As [`explained`], where another option gives the format.
pub(in crate::commands) fn explained_with(error: Error, raw_option: &str) -> CommandError {
    JobError::opening_with(JobErrorKind::Source, error, raw_option).into()
}

/// The path of a file that an image names: relative names start at the image's folder.
pub(in crate::commands) fn beside(image: &Path, name: &OsStr) -> PathBuf {
    match image.parent() {
        Some(folder) => folder.join(name),
        None => PathBuf::from(name),
    }
}
