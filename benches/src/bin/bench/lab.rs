//! The environment in which a group is measured.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};

use super::data::DataFile;
use super::options::Options;
use super::page_caches::{Files, Kept};
use super::process::Watch;
use super::running::RunningServer;
use super::sample::Sample;
use super::workload::ClientResult;

/// The options, and the directories that a group works with.
#[derive(Debug)]
pub(crate) struct Lab<'a> {
    pub(crate) options: &'a Options,
    /// The group's own directory, removed at the end.
    pub(crate) directory: &'a Path,
    pub(crate) target_directory: &'a Path,
    /// The files of the present block.
    pub(crate) files: Files,
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
        self.serve_and_run_after(server, |_| Ok(()), client)
    }

    /// As [`Lab::serve_and_run`], but does not measure what the server does for `before`.
    ///
    /// # Errors
    ///
    /// As there, or `before` fails.
    pub(crate) fn serve_and_run_after(
        &self,
        server: Command,
        before: impl FnOnce(&str) -> Result<()>,
        client: impl FnOnce(&str) -> Result<ClientResult>,
    ) -> Result<Sample> {
        let running = RunningServer::start(server, &self.socket(), "", None)?;
        before(running.uri())?;
        let watch = Watch::start(running.root_process())?;
        let result = client(running.uri())?;
        Ok(Sample::new(result, watch.finish()?))
    }

    /// Establishes the state of the page cache in which a block begins: no dirty pages, so that no
    /// block pays for another, and the whole file cached.
    ///
    /// # Errors
    ///
    /// The file cannot be read or written, or does not fit into the page cache.
    pub(crate) fn settle(&self, name: &str) -> Result<()> {
        let file = DataFile::existing(self.file(name), self.options.page_cache);
        file.settle_and_warm()?;
        self.files.expect_whole(file.path(), Kept::Yes)
    }

    /// Establishes the state in which nothing of a file is in the page cache. The block may change
    /// it, because a server may read tables through the page cache.
    ///
    /// # Errors
    ///
    /// The file cannot be dropped from the page cache.
    pub(crate) fn settle_uncached(&self, name: &str) -> Result<()> {
        let file = DataFile::existing(self.file(name), self.options.page_cache);
        file.drop_from_page_cache()?;
        let state = self.files.add(file.path(), Kept::No)?;
        ensure!(state.cached < 0.01, "the page cache still has {} of {name}", state.describe());
        Ok(())
    }

    /// As [`Lab::settle`], for a block that changes how the file is cached, for example by
    /// extending it.
    ///
    /// # Errors
    ///
    /// As there.
    pub(crate) fn settle_before_change(&self, name: &str) -> Result<()> {
        let file = DataFile::existing(self.file(name), self.options.page_cache);
        file.settle_and_warm()?;
        self.files.expect_whole(file.path(), Kept::No)
    }
}
