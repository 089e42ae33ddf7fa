//! The backups of a repository, and how one of them is named.

use futures_util::{StreamExt as _, TryStreamExt as _};

use super::error::{RepositoryError, RepositoryErrorKind, Result};
use super::head::Head;
use super::id::{Folder, Id, Key};
use super::repository::Repository;
use super::root::{self, Kind, PREFIX_LEN};
use crate::calendar::{day, seconds};

/// Heads read at a time.
const READS: usize = 16;
/// Milliseconds of a day.
const DAY: u64 = 86_400_000;

/// A backup in a list.
#[derive(Clone, Debug)]
pub struct BackupInfo {
    /// Its identity.
    pub id: Id,
    /// What it is, unless its object is damaged.
    pub head: Result<Head>,
    /// Whether it was forgotten, and its packs may be deleted.
    pub is_forgotten: bool,
    /// Bytes of its object, which are a part of what it added to the repository.
    pub bytes: u64,
}

/// What a name of a backup stands for.
enum Looked {
    Backup(Box<BackupInfo>),
    Compaction(Id),
    Nothing,
}

/// The sum of sizes, which are what the store says.
pub(crate) fn bytes_of<'a>(sizes: impl IntoIterator<Item = &'a u64>) -> u64 {
    sizes.into_iter().fold(0, |sum, size| sum.saturating_add(*size))
}

impl Repository {
    /// Lists the backups, oldest first, with those that were forgotten since the last gc.
    ///
    /// # Errors
    ///
    /// As for all requests to the store. A damaged backup is not an error.
    pub async fn list(&self) -> Result<Vec<BackupInfo>> {
        self.list_all().await.map(|(backups, _)| backups)
    }

    /// Lists the backups, and the compactions.
    pub(crate) async fn list_all(&self) -> Result<(Vec<BackupInfo>, Vec<Id>)> {
        let listed = self.objects.list(Folder::Backups).await?;
        // Nothing is behind the prefix of a tombstone that is left for its name alone.
        let listed = listed.into_iter().filter(|listed| listed.size != PREFIX_LEN as u64);
        let named = listed.filter_map(|listed| match listed.key {
            Key::Backup(id) => Some((id, listed.size)),
            _ => None,
        });
        let looks = futures_util::stream::iter(named).map(|(id, bytes)| self.look(id, bytes));
        let mut found = looks.buffered(READS);
        let (mut backups, mut compactions) = (Vec::new(), Vec::new());
        while let Some(looked) = found.try_next().await? {
            match looked {
                Looked::Backup(info) => backups.push(*info),
                Looked::Compaction(id) => compactions.push(id),
                Looked::Nothing => {}
            }
        }
        backups.sort_by_key(|info| (info.head.as_ref().map_or(0, |head| head.time), info.id));
        Ok((backups, compactions))
    }

    async fn look(&self, id: Id, bytes: u64) -> Result<Looked> {
        let front = match self.objects.read_front(id).await {
            Ok(Some((front, _))) => front,
            Ok(None) => return Ok(Looked::Nothing),
            // It is empty.
            Err(error) if error.kind() == RepositoryErrorKind::Damaged => {
                let info = BackupInfo { id, head: Err(error), is_forgotten: false, bytes };
                return Ok(Looked::Backup(Box::new(info)));
            }
            Err(error) => return Err(error),
        };
        let kind = root::kind(&front);
        let head = match kind {
            Some(Kind::Empty) => return Ok(Looked::Nothing),
            Some(Kind::Compaction) => return Ok(Looked::Compaction(id)),
            Some(_) => root::head(&self.objects.sealer, id, &front),
            None => Err(root::unknown(id)),
        };
        let is_forgotten = kind == Some(Kind::Forgotten);
        Ok(Looked::Backup(Box::new(BackupInfo { id, head, is_forgotten, bytes })))
    }

    /// Finds the backup that a text names: `NAME@latest` or `NAME`, `NAME@2026-11-20` (the newest
    /// of this day, in UTC), `NAME@2026-11-20T18:30` (the newest that was begun before), `NAME@ID`
    /// (the first digits of its identity are enough) or `@ID`.
    ///
    /// # Errors
    ///
    /// If no backup, or more than one, is meant; and if one that cannot be read may be meant: one
    /// that was begun later than the one that was found.
    pub async fn find(&self, text: &str) -> Result<(Id, Head)> {
        match self.find_disk(text).await? {
            (id, head, None) => Ok((id, head)),
            (_, _, Some(disk)) => Err(RepositoryError::invalid(format!(
                "'{text}' is one disk of a backup; give the whole backup, without '#{disk}'"
            ))),
        }
    }

    /// Finds the disk that a text names: a backup as for [`find`](Self::find), and `#DISK` behind
    /// it where a backup has several disks. Returns the name of the disk, too; whether there is one
    /// is not looked at.
    ///
    /// # Errors
    ///
    /// As for [`find`](Self::find).
    pub async fn find_disk(&self, text: &str) -> Result<(Id, Head, Option<String>)> {
        let all = self.list().await?;
        let (text, disk) = split_disk(text, &all);
        let (id, head) = self.find_in(&all, text)?;
        Ok((id, head, disk.map(ToOwned::to_owned)))
    }

    fn find_in(&self, all: &[BackupInfo], text: &str) -> Result<(Id, Head)> {
        let (name, which) = text.rsplit_once('@').unwrap_or((text, "latest"));
        let live = all.iter().filter(|info| !info.is_forgotten);
        let heads = live.filter_map(|info| Some((info.id, info.head.as_ref().ok()?)));
        let meant = Which::parse(which);
        // An identity needs no name: those of earlier versions may be of no address.
        let is_any = name.is_empty() && matches!(meant, Some(Which::Id(_)));
        let own: Vec<_> = heads.filter(|(_, head)| is_any || head.name == name).collect();
        // Of which disk they are is not known.
        let live = all.iter().filter(|info| !info.is_forgotten && info.head.is_err());
        let unreadable: Vec<_> = live.map(|info| info.id).collect();
        if let Some(id) = meant.as_ref().and_then(|which| which.hidden(&own, &unreadable)) {
            return Err(RepositoryError::damaged(format!(
                "the backup {id} in {} cannot be read, and may be '{text}'; name another one as \
                 '{name}@ID', or forget it ('repo forget --damaged {id}')",
                self.name()
            )));
        }
        if own.is_empty() && !is_any {
            let mut names: Vec<_> =
                all.iter().filter_map(|info| Some(&*info.head.as_ref().ok()?.name)).collect();
            names.sort_unstable();
            names.dedup();
            names.truncate(8);
            let has = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            return Err(RepositoryError::not_found(format!(
                "{} has no backup of '{name}' (it has backups of: {has})",
                self.name()
            )));
        }
        let found = match meant {
            Some(Which::Id(start)) => {
                let mut found = own.iter().filter(|(id, _)| id.to_string().starts_with(&start));
                let first = found.next();
                if found.next().is_some() {
                    return Err(RepositoryError::invalid(format!(
                        "more than one backup may be '{text}'; give more digits of its identity"
                    )));
                }
                first
            }
            Some(which) => own.iter().rfind(|(_, head)| which.is_at(head.time)),
            None => {
                return Err(RepositoryError::invalid(format!(
                    "'@{which}' is none of @latest, a day (@2026-11-20), a time \
                     (@2026-11-20T18:30) and the first digits of a backup's identity"
                )));
            }
        };
        let found = found.ok_or_else(|| {
            RepositoryError::not_found(format!("{} has no backup '{text}'", self.name()))
        });
        found.map(|(id, head)| (*id, (*head).clone()))
    }
}

/// Splits the name of a disk off. The name of a backup has no `@`, and that of a disk no `#`
/// either.
fn split_disk<'a>(text: &'a str, all: &[BackupInfo]) -> (&'a str, Option<&'a str>) {
    let is_whole = |text: &str| {
        !text.contains('@') && all.iter().any(|it| it.head.as_ref().is_ok_and(|it| it.name == text))
    };
    match text.rsplit_once('#') {
        Some((backup, disk)) if !disk.contains('@') && !is_whole(text) => (backup, Some(disk)),
        _ => (text, None),
    }
}

/// Which backup of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Which {
    Latest,
    /// Days since 1970.
    Day(u64),
    /// Milliseconds since 1970.
    AsOf(u64),
    Id(String),
}

impl Which {
    /// Returns whether a backup of this time can be meant.
    fn is_at(&self, begun: u64) -> bool {
        match self {
            Self::Latest => true,
            Self::Day(day) => begun / DAY == *day,
            Self::AsOf(time) => begun < *time,
            Self::Id(_) => false,
        }
    }

    /// Returns one of the unreadable backups, if it may be the one that is meant. When they were
    /// begun is known from their identities.
    fn hidden(&self, own: &[(Id, &Head)], unreadable: &[Id]) -> Option<Id> {
        let found = own.iter().rfind(|(_, head)| self.is_at(head.time)).map(|(_, head)| head.time);
        let mut meant = unreadable.iter().filter(|id| match self {
            Self::Id(start) => {
                let is_it = |id: &Id| id.to_string().starts_with(start);
                is_it(id) && !own.iter().any(|(id, _)| is_it(id))
            }
            _ => {
                self.is_at(id.milliseconds())
                    && found.is_none_or(|found| id.milliseconds() >= found)
            }
        });
        meant.next().copied()
    }

    fn parse(text: &str) -> Option<Self> {
        if text == "latest" {
            return Some(Self::Latest);
        }
        if text.contains('-') {
            let (date, time) = match text.split_once('T') {
                Some((date, time)) => (date, Some(time.strip_suffix('Z').unwrap_or(time))),
                None => (text, None),
            };
            let day = day(date)?;
            return match time {
                None => Some(Self::Day(day)),
                Some(time) => Some(Self::AsOf(day * DAY + seconds(time)? * 1000)),
            };
        }
        let is_id = text.len() >= 4 && text.len() <= 32;
        let is_hex = text.bytes().all(|it| it.is_ascii_digit() || (b'a'..=b'f').contains(&it));
        (is_id && is_hex).then(|| Self::Id(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_a_store_invents_are_added() {
        assert_eq!(bytes_of(&[u64::MAX, 1, u64::MAX]), u64::MAX);
        assert_eq!(bytes_of(&[2, 3]), 5);
    }

    #[test]
    fn backups_are_named_by_day_time_and_identity() {
        for (text, expected) in [
            ("latest", Some(Which::Latest)),
            ("1970-01-01", Some(Which::Day(0))),
            ("2000-02-29", Some(Which::Day(11_016))),
            ("2100-03-01", Some(Which::Day(47_541))),
            ("1970-01-02T01:02", Some(Which::AsOf(DAY + 62 * 60_000))),
            ("1970-01-02T01:02:03Z", Some(Which::AsOf(DAY + 62 * 60_000 + 3000))),
            ("0193abcd", Some(Which::Id("0193abcd".to_owned()))),
            ("yesterday", None),
            ("1970-13-01", None),
            ("1970-1-1", None),
            ("1970-01-01T24:00", None),
            ("+970-01-01", None),
            ("", None),
        ] {
            assert_eq!(Which::parse(text), expected, "{text}");
        }
    }
}
