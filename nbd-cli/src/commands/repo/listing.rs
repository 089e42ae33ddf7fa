//! Lists what a repository holds: backups, sessions and readers, and what each disk takes.

use std::collections::BTreeMap;
use std::time::Duration;

use nbd_jobs::date::date_and_time;
use nbd_jobs::repository::repository_error;
use nbd_jobs::size::rounded;
use nbd_objects::repo::{
    BackupInfo, DiskHead, Head, PinInfo, Repository, SessionInfo, SessionRecord,
};
use serde::Serialize;

use super::args::{GcArgs, ListArgs, StatsArgs};
use super::store::described;
use super::text::counted;
use crate::error::{CommandError, Outcome};
use crate::output::{Output, ReportFormat, printable};

/// A backup. Sizes are in bytes.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Backup {
    id: String,
    name: Option<String>,
    time: Option<String>,
    size: Option<u64>,
    /// Bytes of the disk that are not zero.
    data: Option<u64>,
    /// Bytes that it added to the repository.
    added: Option<u64>,
    export: Option<String>,
    bitmap: Option<String>,
    /// The disks, if it has several.
    disks: Vec<DiskOfBackup>,
    forgotten: bool,
    /// What is wrong with its object.
    damage: Option<String>,
}

/// One of the disks of a backup.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct DiskOfBackup {
    name: String,
    size: u64,
    export: Option<String>,
    bitmap: Option<String>,
}

/// A backup or a compaction that is being made or was interrupted.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Session {
    id: String,
    /// `backup` or `compaction`, unless its object is damaged.
    kind: Option<&'static str>,
    /// The disk of a backup.
    name: Option<String>,
    host: Option<String>,
    since: Option<String>,
    /// Whether it will not be committed: gc does not wait for it.
    failed: bool,
    damaged: bool,
}

/// A reader.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Pin {
    id: String,
    /// Not known if its object is damaged.
    backup: Option<String>,
    /// The disk of which it is.
    name: Option<String>,
    /// Whether only this reader, or others, keep it from gc.
    forgotten: bool,
    host: Option<String>,
    process: Option<u32>,
    since: Option<String>,
}

impl Pin {
    fn of(info: &PinInfo, backups: &[BackupInfo]) -> Self {
        let backup = info.backup.and_then(|id| backups.iter().find(|backup| backup.id == id));
        let reader = info.reader.as_ref();
        Self {
            id: info.id.to_string(),
            backup: info.backup.map(|backup| backup.to_string()),
            name: backup.and_then(|it| Some(it.head.as_ref().ok()?.name.clone())),
            forgotten: backup.is_none_or(|it| it.is_forgotten),
            host: reader.map(|reader| reader.host.clone()),
            process: reader.map(|reader| reader.process),
            since: reader.map(|reader| date_and_time(reader.time / 1000)),
        }
    }

    fn line(&self) -> String {
        let Some(backup) = &self.backup else {
            return format!(
                "{}  damaged: a reader of a backup; gc deletes nothing before it is removed ('repo \
                 forget-session')",
                self.id
            );
        };
        let who = match (&self.host, self.process, &self.since) {
            (Some(host), Some(process), Some(since)) => {
                format!("process {process} on {} since {since}", printable(host))
            }
            _ => "an older program".to_owned(),
        };
        let name = printable(self.name.as_deref().unwrap_or("?")).to_string();
        let state = if self.forgotten { ", which is forgotten" } else { "" };
        format!("{}  read by {who}: {name}@{backup}{state}", self.id)
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct List {
    backups: Vec<Backup>,
    sessions: Vec<Session>,
    readers: Vec<Pin>,
}

impl Backup {
    fn of(info: &BackupInfo) -> Self {
        let head = info.head.as_ref().ok();
        Self {
            id: info.id.to_string(),
            name: head.map(|head| head.name.clone()),
            time: head.map(|head| date_and_time(head.time / 1000)),
            size: head.map(Head::bytes),
            data: head.map(|head| head.data),
            added: head.map(|head| head.added.saturating_add(info.bytes)),
            export: head.and_then(|head| head.origin.export.clone()),
            bitmap: head.and_then(|head| head.origin.bitmap.clone()),
            disks: head.map_or_else(Vec::new, |head| {
                let disk = |disk: &DiskHead| DiskOfBackup {
                    name: disk.name.clone(),
                    size: disk.size,
                    export: disk.origin.export.clone(),
                    bitmap: disk.origin.bitmap.clone(),
                };
                head.disks.iter().map(disk).collect()
            }),
            forgotten: info.is_forgotten,
            damage: info.head.as_ref().err().map(ToString::to_string),
        }
    }
}

impl Session {
    fn of(info: &SessionInfo) -> Self {
        let record = info.record.as_ref();
        let kind = |record: &SessionRecord| match record.is_compaction() {
            true => "compaction",
            false => "backup",
        };
        Self {
            id: info.id.to_string(),
            kind: record.map(kind),
            name: record.filter(|it| !it.is_compaction()).map(|record| record.name.clone()),
            host: record.map(|record| record.host.clone()),
            since: record.map(|record| date_and_time(record.time / 1000)),
            failed: record.is_some_and(|record| record.failed),
            damaged: record.is_none(),
        }
    }

    fn line(&self) -> String {
        if self.damaged {
            return format!(
                "{}  damaged: a backup or compaction that is being made or was interrupted",
                self.id
            );
        }
        let what = match (&self.name, self.failed) {
            (Some(name), false) => format!("being made or interrupted: {}", printable(name)),
            (Some(name), true) => format!("failed: {}", printable(name)),
            (None, false) => "a compaction that runs or was interrupted,".to_owned(),
            (None, true) => "a compaction that failed,".to_owned(),
        };
        format!(
            "{}  {what} on {} since {}",
            self.id,
            printable(self.host.as_deref().unwrap_or("?")),
            self.since.as_deref().unwrap_or("?")
        )
    }
}

/// Says that gc waits for a session, how long, and how to go on.
pub(super) fn waits(info: &SessionInfo, args: &GcArgs) -> String {
    let minutes = |time: Duration| match time.as_secs() {
        seconds @ 60.. if seconds.is_multiple_of(60) => format!("{} min", seconds / 60),
        _ => format!("{time:?}"),
    };
    format!(
        "waiting for {}: at most {} if it was killed, and {} if it runs; to go on at once, end it \
         with 'nbd-cli repo forget-session {} {}'",
        Session::of(info).line().replacen("  ", ", ", 1),
        minutes(args.idle.min(args.wait)),
        minutes(args.wait),
        printable(&args.store.repository.to_string_lossy()),
        info.id
    )
}

fn damaged(id: &str, error: impl std::fmt::Display) -> String {
    format!("{id}  damaged: {}", printable(&error.to_string()))
}

async fn pins(repository: &Repository, backups: &[BackupInfo]) -> Result<Vec<Pin>, CommandError> {
    let pins = repository.pins().await.map_err(repository_error)?;
    Ok(pins.iter().map(|pin| Pin::of(pin, backups)).collect())
}

pub(super) async fn list(args: &ListArgs) -> Result<Outcome, CommandError> {
    let repository = args.store.open().await?;
    let mut backups = repository.list().await.map_err(repository_error)?;
    let readers = pins(&repository, &backups).await?;
    if let Some(name) = &args.name {
        backups.retain(|info| info.head.as_ref().is_ok_and(|head| head.name == *name));
    }
    let sessions = repository.sessions().await.map_err(repository_error)?;
    let mut output = Output::new();
    match ReportFormat::from_json_flag(args.json) {
        ReportFormat::Json => output.json(&List {
            backups: backups.iter().map(Backup::of).collect(),
            sessions: sessions.iter().map(Session::of).collect(),
            readers,
        })?,
        ReportFormat::Text => {
            for info in &backups {
                let state = if info.is_forgotten { "  (forgotten)" } else { "" };
                match &info.head {
                    Ok(head) => output.line(&format!("{}{state}", described(info.id, head)))?,
                    Err(error) => output.line(&damaged(&info.id.to_string(), error))?,
                }
            }
            for session in sessions.iter().map(Session::of) {
                output.line(&session.line())?;
            }
            for reader in &readers {
                output.line(&reader.line())?;
            }
        }
    }
    output.finish()?;
    Ok(Outcome::Success)
}

/// The backups of one disk. Sizes are in bytes.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Disk {
    name: String,
    backups: u64,
    /// Size of the disk at the last backup.
    size: u64,
    /// Bytes of it that are not zero.
    data: u64,
    /// Bytes that all its backups added.
    added: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Damaged {
    id: String,
    damage: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Stats {
    id: String,
    encrypted: bool,
    packs: u64,
    /// Bytes of the packs and of the objects of the backups.
    bytes: u64,
    disks: Vec<Disk>,
    /// Backups that cannot be read.
    damaged: Vec<Damaged>,
    /// What keeps gc from freeing space.
    sessions: Vec<Session>,
    readers: Vec<Pin>,
}

pub(super) async fn stats(args: &StatsArgs) -> Result<Outcome, CommandError> {
    let repository = args.store.open().await?;
    let mut disks: BTreeMap<String, Disk> = BTreeMap::new();
    let backups = repository.list().await.map_err(repository_error)?;
    let readers = pins(&repository, &backups).await?;
    let sessions = repository.sessions().await.map_err(repository_error)?;
    let mut unreadable = Vec::new();
    for info in backups {
        let head = match info.head {
            Ok(head) => head,
            Err(error) => {
                unreadable.push(Damaged { id: info.id.to_string(), damage: error.to_string() });
                continue;
            }
        };
        if info.is_forgotten {
            continue;
        }
        let disk = disks.entry(head.name.clone()).or_default();
        disk.backups += 1;
        disk.added = disk.added.saturating_add(head.added).saturating_add(info.bytes);
        disk.size = head.bytes();
        (disk.name, disk.data) = (head.name, head.data);
    }
    let (packs, total) = repository.space().await.map_err(repository_error)?;
    let stats = Stats {
        id: repository.id().to_owned(),
        encrypted: repository.is_encrypted(),
        packs,
        bytes: total,
        disks: disks.into_values().collect(),
        damaged: unreadable,
        sessions: sessions.iter().map(Session::of).collect(),
        readers,
    };
    let mut output = Output::new();
    match ReportFormat::from_json_flag(args.json) {
        ReportFormat::Json => output.json(&stats)?,
        ReportFormat::Text => {
            for disk in &stats.disks {
                output.line(&format!(
                    "{}: {}, {} with {} of data, {} added",
                    printable(&disk.name),
                    counted(disk.backups, "backup"),
                    rounded(disk.size),
                    rounded(disk.data),
                    rounded(disk.added)
                ))?;
            }
            for backup in &stats.damaged {
                output.line(&damaged(&backup.id, &backup.damage))?;
            }
            let sessions = stats.sessions.iter().map(Session::line);
            for line in sessions.chain(stats.readers.iter().map(Pin::line)) {
                output.line(&line)?;
            }
            output.line(&format!(
                "{}: {}, {} with the objects of the backups, {}",
                printable(repository.name()),
                counted(stats.packs, "pack"),
                rounded(stats.bytes),
                if stats.encrypted { "encrypted" } else { "not encrypted" }
            ))?;
        }
    }
    output.finish()?;
    Ok(Outcome::Success)
}
