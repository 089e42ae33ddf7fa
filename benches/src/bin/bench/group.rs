//! A group of rows: its definition and its measurement.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::contest::{self, Contest, ContestBar, GroupReport};
use super::lab::Lab;
use super::notes::note;
use super::options::Options;
use super::page_caches::Files;

/// Rows that belong together.
pub(crate) struct Group {
    /// The name for `--only`.
    pub(crate) name: &'static str,
    /// Describes the rows, without touching the disk. Contenders whose programs are missing fail
    /// when they are measured, which is a note in the report.
    pub(crate) contests: fn(&Options) -> Vec<Contest>,
    pub(crate) bars: fn() -> Vec<ContestBar>,
    /// Makes the files that the rows need in the lab's directory.
    pub(crate) prepare: fn(&Lab<'_>) -> Result<()>,
}

/// Measures a group, or nothing if none of its rows is selected.
///
/// # Errors
///
/// Its directory cannot be made.
pub(crate) fn run(
    group: &Group,
    options: &Options,
    directory: &Path,
    target_directory: &Path,
    notes: &mut Vec<String>,
) -> Result<Option<GroupReport>> {
    let mut contests = (group.contests)(options);
    contests.retain(|contest| options.wants_row(&contest.name));
    if !options.wants_group(group.name) || contests.is_empty() {
        return Ok(None);
    }
    let directory = directory.join(group.name);
    fs::create_dir(&directory).with_context(|| directory.display().to_string())?;
    let files = Files::default();
    let lab = Lab { options, directory: &directory, target_directory, files };
    eprintln!("bench: preparing {}", group.name);
    if let Err(error) = (group.prepare)(&lab) {
        note(notes, format!("{} is left out: {error:#}", group.name));
        return Ok(None);
    }
    let rows = contest::run(&contests, &lab, notes);
    let bars = contest::judge(&(group.bars)(), &rows);
    // Its files are large, and the next group needs the page cache.
    fs::remove_dir_all(&directory).with_context(|| directory.display().to_string())?;
    Ok(Some(GroupReport { name: group.name.to_owned(), rows, bars }))
}
