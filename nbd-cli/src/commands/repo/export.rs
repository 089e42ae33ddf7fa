//! `repo export`: backups as a chain of qcow2 files.

use std::path::{Path, PathBuf};

use clap::Args;
use nbd_jobs::repository::{Exported, export_from_repository, repository_error};
use nbd_jobs::size::rounded;
use nbd_objects::repo::{Head, Id, Repository};
use serde::Serialize;

use super::store::StoreArgs;
use super::text::Teller;
use crate::error::{CommandError, Outcome};
use crate::file_path::FilePathParser;
use crate::output::{printable, warn};
use crate::progress::{RateArgs, SummaryArgs};

/// Arguments of `nbd-cli repo export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub store: StoreArgs,

    /// The backups: NAME for all of this disk, each in a file on top of that of the previous
    /// backup; NAME@DAY, NAME@ID or NAME@latest for one, whose file needs no other. Each disk of a
    /// backup of several gets files of its own; #DISK after the name selects one.
    #[arg(value_name = "BACKUP")]
    pub backup: String,

    /// The folder for the files, which are named by the disk, the time and the identity of the
    /// backup. Files of an earlier export are kept and built on. It is made if it does not exist.
    #[arg(value_name = "FOLDER", value_parser = FilePathParser)]
    pub folder: PathBuf,

    /// Write the backups of an encrypted repository to files that are not encrypted.
    #[arg(long)]
    pub decrypt: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub rate: RateArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub summary: SummaryArgs,
}

/// A file. Sizes are in bytes.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct ExportedFile {
    id: String,
    file: String,
    /// The file below a new one.
    base: Option<String>,
    size: u64,
    copied: u64,
    /// Whether it is new; if not, an earlier export made it.
    new: bool,
}

pub(super) async fn run(args: &ExportArgs) -> Result<Outcome, CommandError> {
    let repository = args.store.open().await?;
    if repository.is_encrypted() && !args.decrypt {
        return Err(CommandError::new(format!(
            "{} is encrypted, and the files of an export are not: add --decrypt if all who can read \
             '{}' may read the disk",
            printable(repository.name()),
            args.folder.display()
        )));
    }
    let (chains, unreadable) = selected(&repository, &args.backup).await?;
    let mut teller = Teller::new(args.summary);
    let context = teller.context(&args.rate);
    let mut told = |exported: &Exported| {
        teller.tell(ExportedFile::of(exported), || described(exported));
    };
    let mut result = Ok(());
    for backups in &chains {
        let folder = &args.folder;
        result = export_from_repository(&repository, backups, folder, &context, &mut told).await;
        if result.is_err() {
            break;
        }
    }
    teller.finish(result)?;
    match unreadable {
        0 => Ok(Outcome::Success),
        count => Err(CommandError::new(format!(
            "{count} backups cannot be read and were not exported, whichever disks they are of; \
             everything else was"
        ))),
    }
}

/// The backups of one disk, oldest first.
type Chain = Vec<(Id, Head)>;

/// Returns the backups that are meant, those of each disk by themselves, and how many cannot be
/// read.
async fn selected(
    repository: &Repository,
    text: &str,
) -> Result<(Vec<Chain>, usize), CommandError> {
    let (id, found, disk) = repository.find_disk(text).await.map_err(repository_error)?;
    if text.contains('@') {
        return Ok((by_disk(vec![(id, found)], disk.as_deref())?, 0));
    }
    let (mut own, mut unreadable) = (Vec::new(), 0);
    for info in repository.list().await.map_err(repository_error)? {
        match info.head {
            _ if info.is_forgotten => {}
            Ok(head) if head.name == found.name => own.push((info.id, head)),
            Ok(_) => {}
            Err(error) => {
                warn(&error.to_string());
                unreadable += 1;
            }
        }
    }
    Ok((by_disk(own, disk.as_deref())?, unreadable))
}

/// Returns the backups of each disk, or of only one.
fn by_disk(backups: Chain, only: Option<&str>) -> Result<Vec<Chain>, CommandError> {
    let mut chains: Vec<(Option<String>, Chain)> = Vec::new();
    let mut missing = Ok(());
    for (id, head) in backups {
        let mut names: Vec<_> = head.disks.iter().map(|disk| Some(disk.name.clone())).collect();
        if names.is_empty() {
            names.push(None);
        }
        names.retain(|name| only.is_none() || name.as_deref() == only);
        if names.is_empty() {
            missing = head.of_disk(only).map(drop);
        }
        for name in names {
            let of_disk = head.of_disk(name.as_deref()).map_err(repository_error)?;
            match chains.iter_mut().find(|(other, _)| *other == name) {
                Some((_, chain)) => chain.push((id, of_disk)),
                None => chains.push((name, vec![(id, of_disk)])),
            }
        }
    }
    if chains.is_empty() {
        missing.map_err(repository_error)?;
    }
    Ok(chains.into_iter().map(|(_, chain)| chain).collect())
}

fn described(exported: &Exported) -> String {
    let path = printable(&exported.path.to_string_lossy()).to_string();
    if !exported.is_new {
        return format!("{path}: is there already");
    }
    let base = exported.base.as_deref().and_then(Path::file_name);
    let kind = match base {
        Some(base) => format!("upon {}", printable(&base.to_string_lossy())),
        None => "full".to_owned(),
    };
    format!("{path}: {kind}, {}, {} written", rounded(exported.size), rounded(exported.copied))
}

impl ExportedFile {
    fn of(exported: &Exported) -> Self {
        Self {
            id: exported.id.to_string(),
            file: exported.path.to_string_lossy().into_owned(),
            base: exported.base.as_ref().map(|base| base.to_string_lossy().into_owned()),
            size: exported.size,
            copied: exported.copied,
            new: exported.is_new,
        }
    }
}
