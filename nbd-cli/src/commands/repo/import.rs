//! `repo import`: images and chains of backups into a repository.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;
use nbd_jobs::Verify;
use nbd_jobs::repository::{ImportOptions, Imported, import_to_repository, repository_error};
use nbd_jobs::size::rounded;
use nbd_objects::repo::BackupName;
use serde::Serialize;

use super::store::StoreArgs;
use super::text::Teller;
use crate::commands::image::open::OpenArgs;
use crate::error::{CommandError, Outcome};
use crate::file_path::FilePathParser;
use crate::output::printable;
use crate::progress::{RateArgs, SummaryArgs};

/// Arguments of `nbd-cli repo import`.
#[derive(Debug, Args)]
pub struct ImportArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub store: StoreArgs,

    /// The images: of a chain the newest file is enough. What is below it is imported first, and
    /// what was imported before is left out.
    #[arg(value_name = "FILE", required = true, value_parser = FilePathParser)]
    pub files: Vec<PathBuf>,

    /// The name of the disk in the repository.
    #[arg(long, value_name = "NAME")]
    pub name: String,

    /// Read the backups back at the end, and compare them with what was read.
    #[arg(long)]
    pub verify: bool,

    /// Reads in flight.
    #[arg(short = 'R', long, value_name = "N", default_value = "8")]
    pub requests: NonZeroUsize,

    /// The options for opening the images.
    #[command(flatten)]
    pub open: OpenArgs,

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
struct ImportedFile {
    file: String,
    id: String,
    /// Whether it is new; if not, the repository had it.
    new: bool,
    size: u64,
    read: u64,
    added: u64,
}

pub(super) async fn run(args: &ImportArgs) -> Result<Outcome, CommandError> {
    let name = BackupName::parse(&args.name).map_err(repository_error)?;
    let repository = args.store.open().await?;
    let mut options = ImportOptions::new(name);
    options.image = args.open.options();
    options.requests = args.requests;
    options.verify = if args.verify { Verify::Copied } else { Verify::Nothing };
    let mut teller = Teller::new(args.summary);
    let context = teller.context(&args.rate);
    let told = |imported: &Imported| {
        teller.tell(ImportedFile::of(imported), || described(&args.name, imported));
    };
    let result = import_to_repository(&args.files, &repository, &options, &context, told).await;
    teller.finish(result)?;
    Ok(Outcome::Success)
}

fn described(name: &str, imported: &Imported) -> String {
    let (path, name) = (imported.path.to_string_lossy(), printable(name));
    let (path, id) = (printable(&path), imported.id);
    match imported.is_new {
        false => format!("{path}: {name}@{id} is there already"),
        true => format!(
            "{path}: {name}@{id}, {}, {} read, {} added",
            rounded(imported.size),
            rounded(imported.read),
            rounded(imported.added)
        ),
    }
}

impl ImportedFile {
    fn of(imported: &Imported) -> Self {
        Self {
            file: imported.path.to_string_lossy().into_owned(),
            id: imported.id.to_string(),
            new: imported.is_new,
            size: imported.size,
            read: imported.read,
            added: imported.added,
        }
    }
}
