//! Checks a repository.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use futures_util::StreamExt as _;

use super::error::{RepositoryError, RepositoryErrorKind, Result};
use super::id::{Folder, Id, Key, PackId};
use super::listing::{BackupInfo, bytes_of};
use super::map::Map;
use super::pack::{Footer, FrameKind};
use super::page::{BLOCK_SIZE, PAGE_LEN_MAX};
use super::repository::Repository;
use super::stored::PACK_BYTES_MAX;

/// Packs read at a time.
const READS: usize = 4;

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// One sentence.
    pub message: String,
    /// The backups that cannot be read whole because of it: their identities and disks.
    pub backups: Vec<(Id, String)>,
}

/// The result of a check. Sizes are in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Checked {
    /// What is wrong.
    pub problems: Vec<Problem>,
    /// Backups that were checked.
    pub backups: u64,
    /// Packs of the repository.
    pub packs: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Packs that were read and compared with their hashes.
    pub read: u64,
    /// Packs that no backup needs: of sessions that run or were interrupted, or the next gc's.
    pub unneeded: u64,
}

/// What the backups say about the packs.
#[derive(Default)]
struct Needs {
    /// For each pack the end of its last frame that is needed.
    packs: BTreeMap<PackId, u64>,
    /// What is wrong with packs. Which backups need them is looked up afterwards: it would be too
    /// much to keep for each pack.
    bad_packs: BTreeMap<PackId, Vec<String>>,
    names: Vec<(Id, String)>,
    /// Pages that were read: they are shared by many backups.
    pages: HashSet<(PackId, u32)>,
    problems: BTreeMap<String, BTreeSet<usize>>,
    /// The problems that are packs which are not there.
    missing: HashSet<String>,
}

impl Repository {
    /// Checks that every backup can be read: its objects, its map, that its packs are there and
    /// long enough; and reads `percent` of the packs, chosen at random, and compares everything in
    /// them with its hash.
    ///
    /// # Errors
    ///
    /// As for all requests to the store. Damage is not an error.
    pub async fn check(&self, percent: f64) -> Result<Checked> {
        let mut needs = Needs::default();
        let listed = self.list().await?;
        for info in listed.iter().filter(|info| !info.is_forgotten) {
            self.check_backup(info, &mut needs).await?;
        }
        let packs = self.objects.list(Folder::Packs).await?;
        let sizes: BTreeMap<_, _> = packs
            .iter()
            .filter_map(|listed| match listed.key {
                Key::Pack(pack) => Some((pack, listed.size)),
                _ => None,
            })
            .collect();
        let mut checked = Checked {
            backups: needs.names.len() as u64,
            packs: sizes.len() as u64,
            bytes: bytes_of(sizes.values()),
            unneeded: sizes.keys().filter(|pack| !needs.packs.contains_key(pack)).count() as u64,
            ..Checked::default()
        };
        for (pack, end) in &needs.packs {
            let key = Key::Pack(*pack);
            let problem = match sizes.get(pack) {
                None => {
                    let problem = format!("the pack {key} is missing");
                    needs.missing.insert(problem.clone());
                    problem
                }
                Some(size) if size < end => format!("the pack {key} is too short"),
                Some(_) => continue,
            };
            needs.bad_packs.entry(*pack).or_default().push(problem);
        }
        let chosen = sizes.keys().filter(|_| is_chosen(percent)).copied();
        let reads = chosen.map(|pack| async move { (pack, self.check_pack(pack).await) });
        let mut reads = futures_util::stream::iter(reads).buffer_unordered(READS);
        while let Some((pack, found)) = reads.next().await {
            checked.read += 1;
            let found = found?;
            if !found.is_empty() {
                needs.bad_packs.entry(pack).or_default().extend(found);
            }
        }
        self.name_backups(&mut needs).await?;
        let names = &needs.names;
        let named = |backups: BTreeSet<usize>| {
            backups.into_iter().filter_map(|number| names.get(number).cloned()).collect()
        };
        checked.problems = needs
            .problems
            .into_iter()
            .map(|(message, backups)| Problem { message, backups: named(backups) })
            .collect();
        Ok(checked)
    }

    async fn check_backup(&self, info: &BackupInfo, needs: &mut Needs) -> Result<()> {
        let number = needs.names.len();
        let name = info.head.as_ref().map_or_else(|_| "?".to_owned(), |head| head.name.clone());
        needs.names.push((info.id, name));
        let map = match Map::open(self, info.id).await {
            Ok(map) => map,
            Err(error) if error.kind() == RepositoryErrorKind::Damaged => {
                needs.problems.entry(error.to_string()).or_default().insert(number);
                return Ok(());
            }
            // It was forgotten meanwhile.
            Err(error) if error.kind() == RepositoryErrorKind::NotFound => {
                needs.names.pop();
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        for pack in map.root().packs() {
            needs.packs.entry(*pack).or_default();
        }
        for (page_number, page) in map.root().pages().iter().enumerate() {
            let Some(page) = page else { continue };
            let end = needs.packs.entry(page.stored.pack).or_default();
            *end = page.stored.range().end.max(*end);
            if !needs.pages.insert((page.stored.pack, page.stored.offset)) {
                continue;
            }
            let content = match map.page(page_number).await {
                Ok(content) => content,
                Err(error) if error.kind() == RepositoryErrorKind::Damaged => {
                    needs.problems.entry(error.to_string()).or_default().insert(number);
                    // Other backups with this page are named as well.
                    needs.pages.remove(&(page.stored.pack, page.stored.offset));
                    continue;
                }
                Err(error) => return Err(error),
            };
            let listed: BTreeSet<_> = map.root().packs_of(page).collect();
            if content.packs().iter().any(|pack| !listed.contains(pack)) {
                let message = format!(
                    "the backup {} does not list a pack that its page {page_number} needs",
                    info.id
                );
                needs.problems.entry(message).or_default().insert(number);
            }
            for stored in content.blocks.iter().flatten() {
                let end = needs.packs.entry(stored.pack).or_default();
                *end = stored.range().end.max(*end);
            }
        }
        Ok(())
    }

    /// Makes problems of packs those of the backups that need them. A backup that was forgotten
    /// meanwhile has none: a gc may have deleted its packs.
    async fn name_backups(&self, needs: &mut Needs) -> Result<()> {
        let bad = std::mem::take(&mut needs.bad_packs);
        for problem in bad.values().flatten() {
            needs.problems.entry(problem.clone()).or_default();
        }
        if needs.problems.is_empty() {
            return Ok(());
        }
        let mut gone = BTreeSet::new();
        for number in 0..needs.names.len() {
            let map = match Map::open(self, needs.names[number].0).await {
                Ok(map) => map,
                Err(error) if error.kind() == RepositoryErrorKind::NotFound => {
                    gone.insert(number);
                    continue;
                }
                // That is known already.
                Err(error) if error.kind() != RepositoryErrorKind::Store => continue,
                Err(error) => return Err(error),
            };
            let packs = map.root().packs().iter().filter_map(|pack| bad.get(pack));
            for problem in packs.flatten() {
                needs.problems.entry(problem.clone()).or_default().insert(number);
            }
        }
        if gone.is_empty() {
            return Ok(());
        }
        let missing = &needs.missing;
        needs.problems.retain(|problem, backups| {
            let is_of_none = backups.is_empty() && !missing.contains(problem);
            backups.retain(|number| !gone.contains(number));
            is_of_none || !backups.is_empty()
        });
        Ok(())
    }

    /// Reads a pack whole; returns what is wrong with it.
    async fn check_pack(&self, pack: PackId) -> Result<Vec<String>> {
        let key = Key::Pack(pack);
        let read = self.objects.read(&key.to_string(), u64::from(PACK_BYTES_MAX)).await;
        let content = match read {
            Ok(Some(content)) => content,
            // A gc deleted it meanwhile. If it is needed, that is noticed elsewhere.
            Ok(None) => return Ok(Vec::new()),
            Err(error) if error.kind() == RepositoryErrorKind::Damaged => {
                return Ok(vec![error.to_string()]);
            }
            Err(error) => return Err(error),
        };
        let sealer = self.objects.sealer.clone();
        let look = move || {
            let damaged = |why: &str| vec![format!("the pack {key} is damaged: {why}")];
            let Some(footer) = Footer::read(&content, content.len() as u64) else {
                return damaged("its end is missing or changed");
            };
            let part = |range: std::ops::Range<u64>| {
                content.get(range.start as usize..range.end as usize).unwrap_or_default()
            };
            let entries = match footer.entries(&sealer, pack, part(footer.range())) {
                Ok(entries) => entries,
                Err(why) => return damaged(&why),
            };
            let mut problems = Vec::new();
            for entry in entries {
                let stored = entry.stored;
                let longest = match entry.kind {
                    FrameKind::Block => BLOCK_SIZE as usize,
                    FrameKind::Page => PAGE_LEN_MAX,
                };
                let opened = sealer.open_unknown(stored.place(), part(stored.range()), longest);
                let why = match opened {
                    Ok(content) if sealer.hash(&content) == stored.hash => continue,
                    Ok(_) => "holds something else than was written".to_owned(),
                    Err(broken) => broken.to_string(),
                };
                problems.push(format!(
                    "the pack {key} is damaged: its frame at byte {} {why}",
                    stored.offset
                ));
            }
            // One line for a pack that is damaged throughout.
            let count = problems.len();
            problems.truncate(3);
            if count > problems.len() {
                problems.push(format!("the pack {key} has {count} damaged frames"));
            }
            problems
        };
        tokio::task::spawn_blocking(look).await.map_err(|error| {
            RepositoryError::invalid(format!("a pack could not be checked: {error}"))
        })
    }
}

/// Returns true so often, in percent. Which packs a check reads must not depend on the packs, or it
/// would be always the same.
fn is_chosen(percent: f64) -> bool {
    let mut bytes = [0; 4];
    let random = openssl::rand::rand_bytes(&mut bytes).map(|()| u32::from_le_bytes(bytes));
    random.map_or(true, |random| {
        f64::from(random) / f64::from(u32::MAX) * 100.0 < percent || percent >= 100.0
    })
}
