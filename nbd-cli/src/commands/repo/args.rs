//! The arguments.

use std::time::Duration;

use clap::{Args, Subcommand};
use nbd_jobs::size::parse_duration;
use nbd_objects::repo::Id;

use super::export::ExportArgs;
use super::import::ImportArgs;
use super::keys::KeyArgs;
use super::store::StoreArgs;
use super::text::{id, percent};
use crate::progress::SummaryArgs;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli repo init /srv/backups
  nbd-cli backup nbd://vmhost/disk /srv/backups --name vm1
  nbd-cli repo list /srv/backups
  nbd-cli serve --read-only backup:/srv/backups/vm1@latest
  nbd-cli restore backup:/srv/backups/vm1@2026-11-20 disk.img
  nbd-cli repo prune /srv/backups --keep-daily 7 --keep-weekly 4
  nbd-cli repo gc /srv/backups
  nbd-cli repo compact /srv/backups
  nbd-cli repo check /srv/backups --read-data=10%
  nbd-cli repo export /srv/backups vm1 /srv/files
  nbd-cli repo import /srv/backups --name vm1 /srv/files/monday.qcow2

A repository is a folder, or a prefix of an S3 store (s3://bucket/prefix). Every backup in it is
complete: none needs another one, and each can be forgotten. Any number of backups, readers and one or
more gc may use a repository at once. Versions of objects, locks on objects, and moving objects to
slower storage contradict gc and reading: leave them off for a repository.";

/// Arguments of `nbd-cli repo`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct RepoArgs {
    /// The subcommand.
    #[command(subcommand)]
    pub command: RepoCommand,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum RepoCommand {
    /// Make a repository
    Init(InitArgs),
    /// List the backups, and who makes or reads one
    List(ListArgs),
    /// Check that every backup can be read
    Check(CheckArgs),
    /// Forget backups; gc frees their space
    Forget(ForgetArgs),
    /// Forget all backups but those that rules keep; gc frees their space
    Prune(PruneArgs),
    /// Delete what no backup needs
    Gc(GcArgs),
    /// Rewrite packs that are mostly unneeded; gc frees their space
    Compact(CompactArgs),
    /// Show how much space is used
    Stats(StatsArgs),
    /// End an interrupted backup, or the reading of one
    ForgetSession(ForgetSessionArgs),
    /// Write backups to qcow2 files that QEMU reads
    Export(ExportArgs),
    /// Make backups of images, and of chains that 'nbd-cli backup' or QEMU made
    Import(Box<ImportArgs>),
    /// Add, list and remove the passphrases of an encrypted repository
    Key(KeyArgs),
}

impl RepoCommand {
    /// Returns whether it creates disks or backups: a signal then ends it between two steps.
    pub(crate) fn writes(&self) -> bool {
        matches!(self, Self::Export(_) | Self::Import(_))
    }
}

/// Arguments of `nbd-cli repo init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub store: StoreArgs,

    /// Encrypt everything with AES-256-GCM. Needs --passphrase-file. Without its passphrase nothing
    /// can be read.
    #[arg(long, requires = "passphrase_file")]
    pub encrypt: bool,
}

/// Arguments of `nbd-cli repo list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub store: StoreArgs,

    /// Only the backups of this disk.
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,

    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `nbd-cli repo check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub store: StoreArgs,

    /// Read this part of the packs as well, chosen at random, and compare all that is in them with
    /// its hashes.
    #[arg(long, value_name = "PERCENT", value_parser = percent, num_args = 0..=1,
          require_equals = true, default_missing_value = "100%")]
    pub read_data: Option<f64>,

    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `nbd-cli repo forget`.
#[derive(Debug, Args)]
pub struct ForgetArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub store: StoreArgs,

    /// The backups: NAME@DAY, NAME@ID or NAME@latest, or the whole identity alone.
    #[arg(required = true, value_name = "BACKUP")]
    pub backups: Vec<String>,

    /// Also forget a backup whose object is damaged. Give its identity.
    #[arg(long)]
    pub damaged: bool,
}

/// Arguments of `nbd-cli repo prune`.
#[derive(Debug, Args)]
pub struct PruneArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub store: StoreArgs,

    /// Only the backups of this disk.
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,

    /// Keep the newest N of each disk.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_last: u32,

    /// Keep the newest of each of the last N hours that have one.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_hourly: u32,

    /// Keep the newest of each of the last N days that have one. Days, weeks, months and years are
    /// those of UTC.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_daily: u32,

    /// Keep the newest of each of the last N weeks, from Monday.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_weekly: u32,

    /// Keep the newest of each of the last N months.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_monthly: u32,

    /// Keep the newest of each of the last N years.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_yearly: u32,

    /// Only say what would be forgotten.
    #[arg(short = 'n', long)]
    pub dry_run: bool,
}

/// Arguments of `nbd-cli repo gc`.
#[derive(Debug, Args)]
pub struct GcArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub store: StoreArgs,

    /// End backups that have not renewed their record for this long: they were killed, or will
    /// fail. A running backup renews it every minute.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = parse_duration)]
    pub idle: Duration,

    /// Wait this long for running backups; after that nothing is deleted.
    #[arg(long, value_name = "TIME", default_value = "60m", value_parser = parse_duration)]
    pub wait: Duration,

    /// Only say what would be deleted.
    #[arg(short = 'n', long)]
    pub dry_run: bool,

    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `nbd-cli repo compact`.
#[derive(Debug, Args)]
pub struct CompactArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub store: StoreArgs,

    /// The part of the repository that may stay unneeded. Packs with the least needed data are
    /// rewritten first, until no more than this is left; 0% rewrites all packs with unneeded data.
    #[arg(long, value_name = "PERCENT", default_value = "5%", value_parser = percent)]
    pub max_unused: f64,

    /// Only say what would be done.
    #[arg(short = 'n', long)]
    pub dry_run: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub summary: SummaryArgs,
}

/// Arguments of `nbd-cli repo stats`.
#[derive(Debug, Args)]
pub struct StatsArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub store: StoreArgs,

    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `nbd-cli repo forget-session`.
#[derive(Debug, Args)]
pub struct ForgetSessionArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub store: StoreArgs,

    /// The identity that 'repo list' shows: of a backup that is being made, which then fails at its
    /// end; of a reader, which then may lose its backup; or of the list of a gc that was killed.
    #[arg(value_name = "ID", value_parser = id)]
    pub id: Id,
}
