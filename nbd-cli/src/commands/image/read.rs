//! Options for reading an image, or one in an export.

use std::ffi::OsStr;

use clap::Args;
use imgfmt::OpenOptions;
use nbd_jobs::image_location::ImageLocation;
use nbd_jobs::remote::Remotes;

use super::location;
use super::open::OpenArgs;
use crate::connect::ServerArgs;
use crate::error::CommandError;
use crate::locking::ShareArgs;

#[derive(Clone, Debug, Args)]
#[allow(missing_docs, reason = "the help would take it for its own text")]
pub struct ReadArgs {
    #[command(flatten)]
    pub share: ShareArgs,

    #[command(flatten)]
    pub open: OpenArgs,

    #[command(flatten)]
    pub server: ServerArgs,
}

impl ReadArgs {
    /// Parses the name of the image.
    pub(in crate::commands) fn location(
        &self,
        word: &OsStr,
    ) -> Result<ImageLocation, CommandError> {
        location::parse_one(word, &self.server, &self.open.trust)
    }

    /// How the image is opened.
    pub(in crate::commands) fn options(&self) -> OpenOptions {
        self.options_with(&self.server)
    }

    /// Like [`options`](Self::options), with other options for servers.
    pub(in crate::commands) fn options_with(&self, server: &ServerArgs) -> OpenOptions {
        self.share.apply(self.open.options_with(server))
    }

    /// The servers that the image may be on, or may name.
    pub(in crate::commands) fn remotes(&self) -> Remotes {
        self.server.remotes()
    }
}
