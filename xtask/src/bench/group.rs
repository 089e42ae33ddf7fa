//! Groups of rows, of which `--only` chooses.
//!
//! The group `raw` has its own tables ([`super::rows`], [`super::servers`], [`super::bars`]). Every
//! other group is a file that gives its rows and bars as [`super::contest`] has them, and one entry
//! in [`GROUPS`].

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::contest::{self, Contest, ContestBar, GroupReport};
use super::options::Options;
use super::process::Watch;
use super::rows::ClientResult;
use super::running::RunningServer;
use super::sample::Sample;
use super::{bitmaps, checkpoints, image_tools, note, qcow2, tls};

/// The group of the rows that serve a raw file.
pub(crate) const RAW: &str = "raw";

/// Every other group, in the order of the report.
pub(crate) const GROUPS: &[Group] =
    &[qcow2::GROUP, image_tools::GROUP, bitmaps::GROUP, checkpoints::GROUP, tls::GROUP];

/// Rows that belong together.
pub(crate) struct Group {
    /// The name for `--only`.
    pub(crate) name: &'static str,
    /// Says what the rows are, without touching the disk. Contenders whose programs may be missing
    /// fail when they are measured, which is a note in the report.
    pub(crate) contests: fn(&Options) -> Vec<Contest>,
    pub(crate) bars: fn() -> Vec<ContestBar>,
    /// Makes the files that the rows need in the lab's folder.
    pub(crate) prepare: fn(&Lab<'_>) -> Result<()>,
}

/// Where a group is measured.
#[derive(Debug)]
pub(crate) struct Lab<'a> {
    pub(crate) options: &'a Options,
    /// A folder of the group's own, removed at the end.
    pub(crate) folder: &'a Path,
    pub(crate) target_folder: &'a Path,
}

impl Lab<'_> {
    /// A file in the group's folder.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The program of this workspace.
    pub(crate) fn nbd_cli(&self) -> Command {
        Command::new(self.target_folder.join("release").join("nbd-cli"))
    }

    /// The socket that servers have to listen on, one at a time.
    pub(crate) fn socket(&self) -> PathBuf {
        self.file("nbd.sock")
    }

    /// Starts `server`, which listens on [`Lab::socket`], runs `client` with the URI of its default
    /// export, and says what both showed.
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

    /// Waits until nothing of the file has to be written back, so that no block pays for another.
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

/// Whether every group of `--only` exists.
///
/// # Errors
///
/// One does not.
pub(crate) fn check_names(options: &Options) -> Result<()> {
    let names: Vec<&str> =
        std::iter::once(RAW).chain(GROUPS.iter().map(|group| group.name)).collect();
    match options.groups().and_then(|mut wanted| wanted.find(|name| !names.contains(name))) {
        Some(unknown) => bail!("--only {unknown}: the groups are {}", names.join(", ")),
        None => Ok(()),
    }
}

/// Measures a group, or nothing if none of its rows was asked for.
///
/// # Errors
///
/// Its folder cannot be made.
pub(crate) fn run(
    group: &Group,
    options: &Options,
    folder: &Path,
    target_folder: &Path,
    notes: &mut Vec<String>,
) -> Result<Option<GroupReport>> {
    let mut contests = (group.contests)(options);
    contests.retain(|contest| options.wants_row(&contest.name));
    if !options.wants_group(group.name) || contests.is_empty() {
        return Ok(None);
    }
    let folder = folder.join(group.name);
    fs::create_dir(&folder).with_context(|| folder.display().to_string())?;
    let lab = Lab { options, folder: &folder, target_folder };
    eprintln!("bench: preparing {}", group.name);
    if let Err(error) = (group.prepare)(&lab) {
        note(notes, format!("{} is left out: {error:#}", group.name));
        return Ok(None);
    }
    let rows = contest::run(&contests, &lab, notes);
    let bars = contest::judge(&(group.bars)(), &rows);
    // Its files are large, and the next group needs the page cache.
    fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
    Ok(Some(GroupReport { name: group.name.to_owned(), rows, bars }))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn options(words: &[&str]) -> Options {
        Line::parse_from(std::iter::once(&"bench").chain(words)).options
    }

    #[test]
    fn every_bar_names_a_row_and_a_contender_of_its_group() {
        for group in GROUPS {
            let contests = (group.contests)(&options(&[]));
            let find = |name: &str| contests.iter().find(|contest| contest.name == name);
            for bar in (group.bars)() {
                let row = find(&bar.row).unwrap_or_else(|| panic!("{} is no row", bar.row));
                match bar.against {
                    contest::Against::Contender(name) => {
                        assert!(row.contenders.iter().any(|other| other.name == name), "{name}");
                    }
                    contest::Against::OursInRow(name) => assert!(find(&name).is_some(), "{name}"),
                    contest::Against::Nothing
                    | contest::Against::BestPeer
                    | contest::Against::BestPeerPerCore => {}
                }
            }
        }
    }

    #[test]
    fn names_of_rows_are_unique_among_all_groups() {
        let mut names: Vec<String> = GROUPS
            .iter()
            .flat_map(|group| (group.contests)(&options(&[])))
            .map(|contest| contest.name)
            .collect();
        names.sort();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn unknown_group_is_refused_with_the_names_of_all() {
        assert!(check_names(&options(&["--only", "raw,qcow2"])).is_ok());
        let error = check_names(&options(&["--only", "raw,cow"])).expect_err("no such group");
        assert!(error.to_string().contains("raw, qcow2"), "{error}");
    }
}
