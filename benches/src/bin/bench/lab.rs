//! The environment in which a group is measured.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::options::Options;
use super::process::Watch;
use super::running::RunningServer;
use super::sample::Sample;
use super::workload::ClientResult;

/// The options, and the directories that a group works with.
#[derive(Debug)]
pub(crate) struct Lab<'a> {
    pub(crate) options: &'a Options,
    /// A directory of the group's own, removed at the end.
    pub(crate) directory: &'a Path,
    pub(crate) target_directory: &'a Path,
}

impl Lab<'_> {
    /// A file in the group's directory.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The program of this workspace.
    pub(crate) fn nbd_cli(&self) -> Command {
        Command::new(self.target_directory.join("dist").join("nbd-cli"))
    }

    /// The socket on which servers listen, one at a time.
    pub(crate) fn socket(&self) -> PathBuf {
        self.file("nbd.sock")
    }

    /// Starts `server`, which listens on [`Lab::socket`], runs `client` with the URI of its default
    /// export, and returns the measurements of both.
    ///
    /// # Errors
    ///
    /// The server does not start or ends early, or the client fails.
    pub(crate) fn serve_and_run(
        &self,
        server: Command,
        client: impl FnOnce(&str) -> Result<ClientResult>,
    ) -> Result<Sample> {
        let running = RunningServer::start(server, &self.socket(), "", None)?;
        let watch = Watch::start(running.root_process())?;
        let result = client(running.uri())?;
        Ok(Sample::new(result, watch.finish()?))
    }

    /// Waits until the file has no dirty pages, so that no block pays for another.
    ///
    /// # Errors
    ///
    /// The file cannot be opened or written.
    pub(crate) fn settle(&self, name: &str) -> Result<()> {
        let path = self.file(name);
        let file = File::open(&path).with_context(|| path.display().to_string())?;
        file.sync_all().with_context(|| path.display().to_string())
    }
}
