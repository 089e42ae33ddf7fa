//! Checks a repository.

mod backups;
mod directories;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use futures_util::StreamExt as _;

use self::directories::Directories;
use super::error::{RepositoryError, RepositoryErrorKind, Result};
use super::id::{Folder, Id, Key, PackId};
use super::listing::bytes_of;
use super::map::Map;
use super::pack::{Footer, FrameKind};
use super::page::{BLOCK_SIZE, PAGE_LEN_MAX};
use super::protocol::Moves;
use super::recent::Recent;
use super::repository::Repository;
use super::seal::{Hash, Sealer};
use super::stored::PACK_BYTES_MAX;

/// Packs read at a time.
const READS: usize = 4;
/// Pages that are known to be checked, at least: those of 27 TiB, in at most 36 MiB. Others are
/// checked once more.
const PAGES_SEEN: usize = 900_000;

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
struct Needs {
    /// For each pack the end of its last frame that is needed.
    packs: BTreeMap<PackId, u64>,
    /// What is wrong with packs. Which backups need them is looked up afterwards: it would be too
    /// much to keep for each pack.
    bad_packs: BTreeMap<PackId, Vec<String>>,
    /// Packs that backups need and that are not there, or too short.
    lost_packs: BTreeMap<PackId, String>,
    names: Vec<(Id, String)>,
    /// Pages that were read, and what backups say of them: they are shared by many backups.
    pages: Recent<Hash>,
    /// Packs that were read whole and are as they were written: where their directories are, and
    /// the blocks that are shorter than others: offsets and lengths, in bytes.
    sound: HashMap<PackId, (Footer, Vec<(u32, u32)>)>,
    directories: Directories,
    /// Last blocks that were read: pack, offset, length in bytes.
    last: HashSet<(PackId, u32, usize)>,
    problems: BTreeMap<String, BTreeSet<usize>>,
}

impl Needs {
    fn new() -> Self {
        Self {
            packs: BTreeMap::new(),
            bad_packs: BTreeMap::new(),
            lost_packs: BTreeMap::new(),
            names: Vec::new(),
            pages: Recent::new(PAGES_SEEN),
            sound: HashMap::new(),
            directories: Directories::default(),
            last: HashSet::new(),
            problems: BTreeMap::new(),
        }
    }
}

impl Repository {
    /// Checks that every backup can be read: its objects, its map, that its packs are there and
    /// long enough, and the last block of its disk; and reads `percent` of the packs, chosen at
    /// random, compares everything in them with its hash, and what the maps say of it.
    ///
    /// # Errors
    ///
    /// As for all requests to the store. Damage is not an error.
    pub async fn check(&self, percent: f64) -> Result<Checked> {
        let mut moves = self.moves().await?;
        loop {
            let checked = self.check_once(percent, &moves).await?;
            let before = std::mem::replace(&mut moves, self.moves().await?);
            // What is missing may have been moved meanwhile.
            if checked.problems.is_empty() || moves == before {
                return Ok(checked);
            }
        }
    }

    async fn check_once(&self, percent: f64, moves: &Moves) -> Result<Checked> {
        let mut needs = Needs::new();
        let read = self.read_packs(percent, &mut needs).await?;
        let (listed, compactions) = self.list_all().await?;
        for compaction in compactions.iter().filter(|id| !moves.has(**id)) {
            let problem = format!(
                "the compaction backups/{compaction} is damaged, or there is no object \
                 moved/{compaction}: what it moved is looked for where it was before"
            );
            needs.problems.entry(problem).or_default();
        }
        for info in listed.iter().filter(|info| !info.is_forgotten) {
            self.check_backup(info, moves, &mut needs).await?;
        }
        // Those that backups need which were made meanwhile are there now.
        let sizes = self.pack_sizes().await?;
        let mut checked = Checked {
            backups: needs.names.len() as u64,
            packs: sizes.len() as u64,
            bytes: bytes_of(sizes.values()),
            read,
            unneeded: sizes.keys().filter(|pack| !needs.packs.contains_key(pack)).count() as u64,
            ..Checked::default()
        };
        for (pack, end) in &needs.packs {
            let key = Key::Pack(*pack);
            let problem = match sizes.get(pack) {
                None => format!("the pack {key} is missing"),
                Some(size) if size < end => format!("the pack {key} is too short"),
                Some(_) => continue,
            };
            needs.lost_packs.insert(*pack, problem);
        }
        self.name_backups(&mut needs, moves).await?;
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

    async fn pack_sizes(&self) -> Result<BTreeMap<PackId, u64>> {
        let packs = self.objects.list(Folder::Packs).await?;
        let sizes = packs.iter().filter_map(|listed| match listed.key {
            Key::Pack(pack) => Some((pack, listed.size)),
            _ => None,
        });
        Ok(sizes.collect())
    }

    /// Reads so many packs, in percent, and returns their number.
    async fn read_packs(&self, percent: f64, needs: &mut Needs) -> Result<u64> {
        if percent <= 0.0 {
            return Ok(0);
        }
        let sizes = self.pack_sizes().await?;
        let chosen = sizes.into_keys().filter(|_| is_chosen(percent));
        let reads = chosen.map(|pack| async move { (pack, self.check_pack(pack).await) });
        let mut reads = futures_util::stream::iter(reads).buffer_unordered(READS);
        let mut count = 0;
        while let Some((pack, found)) = reads.next().await {
            count += 1;
            match found? {
                None => {}
                Some(Found { problems, footer: Some(footer), short }) if problems.is_empty() => {
                    needs.sound.insert(pack, (footer, short));
                }
                Some(Found { problems, .. }) => {
                    needs.bad_packs.entry(pack).or_default().extend(problems);
                }
            }
        }
        Ok(count)
    }

    /// Makes problems of packs those of the backups that need them. A backup that was forgotten
    /// meanwhile has none: a gc may have deleted its packs.
    async fn name_backups(&self, needs: &mut Needs, moves: &Moves) -> Result<()> {
        let bad = std::mem::take(&mut needs.bad_packs);
        for problem in bad.values().flatten() {
            needs.problems.entry(problem.clone()).or_default();
        }
        // Without a backup that needs them they do no harm.
        let lost = std::mem::take(&mut needs.lost_packs);
        if needs.problems.is_empty() && lost.is_empty() {
            return Ok(());
        }
        let mut gone = BTreeSet::new();
        for number in 0..needs.names.len() {
            let map = match Map::open(self, moves, needs.names[number].0).await {
                Ok(map) => map,
                Err(error) if error.kind() == RepositoryErrorKind::Damaged => {
                    needs.problems.entry(error.to_string()).or_default().insert(number);
                    continue;
                }
                Err(error) if error.kind() == RepositoryErrorKind::NotFound => {
                    gone.insert(number);
                    continue;
                }
                Err(error) => return Err(error),
            };
            let packs = map.root().packs();
            let damaged = packs.iter().filter_map(|pack| bad.get(pack)).flatten();
            for problem in damaged.chain(packs.iter().filter_map(|pack| lost.get(pack))) {
                needs.problems.entry(problem.clone()).or_default().insert(number);
            }
        }
        needs.problems.retain(|_, backups| {
            let is_of_none = backups.is_empty();
            backups.retain(|number| !gone.contains(number));
            is_of_none || !backups.is_empty()
        });
        Ok(())
    }

    /// Reads a pack whole; returns what is wrong with it. `None` if it is not there any more.
    async fn check_pack(&self, pack: PackId) -> Result<Option<Found>> {
        let key = Key::Pack(pack);
        let read = self.objects.read(&key.to_string(), u64::from(PACK_BYTES_MAX)).await;
        let content = match read {
            Ok(Some(content)) => content,
            // A gc deleted it meanwhile. If it is needed, that is noticed elsewhere.
            Ok(None) => return Ok(None),
            Err(error) if error.kind() == RepositoryErrorKind::Damaged => {
                return Ok(Some(Found::bad(error.to_string())));
            }
            Err(error) => return Err(error),
        };
        let sealer = self.objects.sealer.clone();
        let look = move || look(&sealer, pack, &content);
        tokio::task::spawn_blocking(look).await.map(Some).map_err(|error| {
            RepositoryError::invalid(format!("a pack could not be checked: {error}"))
        })
    }
}

/// What was found in a pack.
struct Found {
    /// What is wrong.
    problems: Vec<String>,
    footer: Option<Footer>,
    /// Offsets and lengths, in bytes, of blocks that are shorter than others.
    short: Vec<(u32, u32)>,
}

impl Found {
    fn bad(problem: String) -> Self {
        Self { problems: vec![problem], footer: None, short: Vec::new() }
    }
}

/// Compares everything in a pack with its hash.
fn look(sealer: &Sealer, pack: PackId, content: &[u8]) -> Found {
    let key = Key::Pack(pack);
    let damaged = |why: &str| format!("the pack {key} is damaged: {why}");
    let Some(footer) = Footer::read(content, content.len() as u64) else {
        return Found::bad(damaged("its end is missing or changed"));
    };
    let part = |range: std::ops::Range<u64>| {
        content.get(range.start as usize..range.end as usize).unwrap_or_default()
    };
    let entries = match footer.entries(sealer, pack, part(footer.range())) {
        Ok(entries) => entries,
        Err(why) => return Found::bad(damaged(&why)),
    };
    let (mut problems, mut short) = (Vec::new(), Vec::new());
    for entry in entries {
        let stored = entry.stored;
        let (is_block, longest) = match entry.kind {
            FrameKind::Block => (true, BLOCK_SIZE as usize),
            FrameKind::Page => (false, PAGE_LEN_MAX),
        };
        let opened = sealer.open_unknown(stored.place(), part(stored.range()), longest);
        let why = match opened {
            Ok(content) if sealer.hash(&content) != stored.hash => {
                "holds something else than was written".to_owned()
            }
            Ok(content) => {
                // The last one of a disk.
                if is_block && content.len() < longest {
                    short.push((stored.offset, content.len() as u32));
                }
                continue;
            }
            Err(broken) => broken.to_string(),
        };
        problems.push(damaged(&format!("its frame at byte {} {why}", stored.offset)));
    }
    // One line for a pack that is damaged throughout.
    let count = problems.len();
    problems.truncate(3);
    if count > problems.len() {
        problems.push(format!("the pack {key} has {count} damaged frames"));
    }
    Found { problems, footer: Some(footer), short }
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
