//! Compacts: writes what is needed of packs of which little is needed anew, so that the next gc
//! deletes them.

mod copying;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use futures_util::future::join_all;

use super::super::compaction::{self, MOVED_MAX, NewMap};
use super::super::error::{RepositoryError, RepositoryErrorKind, Result};
use super::super::id::{Folder, Id, Key, PackId};
use super::super::listing::BackupInfo;
use super::super::map::Map;
use super::super::page::Page;
use super::super::protocol::{Committed, Moves, Object, Request, Rules, Step, Writer};
use super::super::recent::Recent;
use super::super::repository::Repository;
use super::super::root::{PageRoot, Root};
use super::super::seal::{Hash, Sealer};
use super::super::session_record::SessionRecord;
use super::super::stored::Stored;
use super::known::Known;
use super::packs::Packs;
use super::renewal::{Left, Renewal};
use super::sender::Sender;
use super::usage::{Choice, Usage};
use super::{RENEWAL, ended};

/// Pages that are read at a time.
const PAGES: usize = 128;
/// Pages that are known to be counted, at least: those of 27 TiB, in at most 54 MiB. Others are
/// read and counted once more, to the same end.
const PAGES_SEEN: usize = 900_000;
/// Most frames that are moved by one compaction, and most of the latest ones that are known: a
/// little less than tables of 2^20 places hold, which take 72 and 61 MiB.
const FRAMES_MAX: usize = 900_000;
/// Bytes of maps after which a compaction is committed, and another one begun.
const MAPS_LEN: usize = 64 << 20;
/// Latest compactions whose frames are used again.
const LATEST: usize = 8;

/// Told how much was copied, and how much there is to copy, in bytes.
pub type OnCopied = Arc<dyn Fn(u64, u64) + Send + Sync>;

/// How packs are compacted.
#[derive(Clone, Default)]
#[non_exhaustive]
pub struct CompactOptions {
    /// The part of the repository that may be unneeded afterwards, from 0 to 1.
    pub max_unused: f64,
    /// Whether only to say what would be done.
    pub dry_run: bool,
    /// The machine, for those who list sessions.
    pub host: String,
    /// Told of the progress.
    pub on_copied: Option<OnCopied>,
    /// Most backups of one compaction, if it is not [`MOVED_MAX`].
    pub(crate) moved_max: Option<usize>,
}

impl fmt::Debug for CompactOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompactOptions")
            .field("max_unused", &self.max_unused)
            .finish_non_exhaustive()
    }
}

/// The result of a compaction. Sizes are in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Compacted {
    /// Packs that were compacted, or would be.
    pub packs: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes of them that are needed.
    pub needed: u64,
    /// Backups that have another map now.
    pub backups: u64,
    /// Bytes that were written.
    pub written: u64,
    /// What the next gc deletes, in packs: without this, and with it.
    pub garbage_before: u64,
    /// See `garbage_before`.
    pub garbage: u64,
    /// Backups that stay as they are, because packs that they need are missing or condemned.
    pub left: Vec<Id>,
    /// Packs of which something needed cannot be read: that stays where it is.
    pub damaged: Vec<String>,
}

impl Repository {
    /// Writes what is needed of packs of which little is needed into packs of its own, and the maps
    /// of the backups with them. No backup changes; the next gc deletes the packs.
    ///
    /// # Errors
    ///
    /// If the object of a backup is damaged, and as for all requests to the store.
    ///
    /// # Cancel safety
    ///
    /// It may be killed at any time: what was committed stays, and of the rest the next compaction
    /// uses what was sent.
    pub async fn compact(&self, options: &CompactOptions) -> Result<Compacted> {
        let mut compacted = Compacted::default();
        while !Compactor::run(self, options, &mut compacted).await? {}
        Ok(compacted)
    }
}

/// Where a frame is: its pack, and its offset there.
type Place = (PackId, u32);

fn place_of(stored: &Stored) -> Place {
    (stored.pack, stored.offset)
}

/// One session, of one compaction.
struct Compactor<'a> {
    repository: &'a Repository,
    options: &'a CompactOptions,
    id: Id,
    packs: Packs,
    moves: Moves,
    choice: Choice,
    known: Known,
    /// Of the latest compactions, by their hashes.
    latest: HashMap<Hash, Stored>,
    sender: Sender,
    /// Where frames of the chosen packs are now.
    moved: HashMap<Place, Stored>,
    /// Pages that were written.
    pages: HashMap<Hash, Stored>,
    copied: u64,
    damaged: BTreeSet<PackId>,
    /// Whether frames were left for another compaction, because too many were moved.
    is_full: bool,
}

impl<'a> Compactor<'a> {
    /// Returns whether there is nothing left to compact.
    async fn run(
        repository: &'a Repository,
        options: &'a CompactOptions,
        compacted: &mut Compacted,
    ) -> Result<bool> {
        let id = next_id(repository).await?;
        let (writer, mut renewal) = register(repository, options, id).await?;
        let mut left = Left::Packs;
        let session = (id, writer, &mut renewal, &mut left);
        let done = Self::registered(repository, options, session, compacted).await;
        if done.is_err() {
            repository.give_up(id, &mut renewal, left).await;
        }
        done
    }

    /// Runs in a session that is registered; says what it leaves if it fails.
    async fn registered(
        repository: &'a Repository,
        options: &'a CompactOptions,
        (id, mut writer, renewal, left): (Id, Writer, &mut Renewal, &mut Left),
        compacted: &mut Compacted,
    ) -> Result<bool> {
        let objects = &repository.objects;
        let moves = repository.moves().await?;
        let backups = list(repository, &moves).await?;
        // Behind these, so that it has their packs.
        let packs = Packs::list(repository, &writer).await?;
        let running = running(repository, id).await?;
        let mut compactor = Self {
            repository,
            options,
            id,
            packs,
            moves,
            choice: Choice::default(),
            known: Known::default(),
            latest: HashMap::new(),
            sender: Sender::new(Arc::clone(objects), id),
            moved: HashMap::new(),
            pages: HashMap::new(),
            copied: 0,
            damaged: BTreeSet::new(),
            is_full: false,
        };
        let usage = compactor.usage(&backups).await?;
        let is_over = |pack: PackId| !running.contains(&pack.session);
        let garbage = usage.garbage(is_over);
        compactor.choice = usage.choose();
        drop(usage);
        let choice = &compactor.choice;
        if compacted.packs == 0 {
            (compacted.packs, compacted.bytes) = (choice.packs.len() as u64, choice.bytes);
            (compacted.needed, compacted.garbage_before) = (choice.needed, garbage);
            compacted.garbage = garbage + if options.dry_run { choice.bytes } else { 0 };
        }
        if options.dry_run {
            return Ok(true);
        }
        let mut maps = Vec::new();
        let mut is_last = true;
        if !choice.packs.is_empty() {
            compactor.known = Known::find(repository, &writer, id, &|record: &SessionRecord| {
                record.is_compaction()
            })
            .await?;
            is_last = compactor.maps(&backups, renewal, &mut maps, compacted).await?;
        }
        if maps.is_empty() {
            renewal.stop().await;
            // Nothing more comes from this session. If its record stays, the next gc removes it.
            let _ = objects.delete(&Key::Session(id).to_string()).await;
            return Ok(true);
        }
        compactor.sender.finish().await?;
        compacted.backups += maps.len() as u64;
        let object = compaction::encode(&objects.sealer, id, maps)?;
        compacted.written += compactor.sender.added + object.object.len() as u64;
        *left = Left::Create;
        writer.commit(Object::Compaction(object));
        match repository.drive(&mut writer, renewal).await? {
            Committed::Yes => Ok(is_last),
            Committed::Fenced | Committed::Ready => Err(ended("compaction", id)),
        }
    }

    /// Opens a map; `None` if the backup was forgotten meanwhile.
    async fn map(&self, id: Id) -> Result<Option<Map>> {
        match Map::open(self.repository, &self.moves, id).await {
            Err(error) if error.kind() == RepositoryErrorKind::NotFound => Ok(None),
            map => map.map(Some),
        }
    }

    /// Reads which frames the backups need: each page once.
    async fn usage(&mut self, backups: &[(Id, String)]) -> Result<Usage> {
        let mut usage = Usage::new(&self.packs, self.options.max_unused);
        let latest: HashSet<_> = self.moves.ids().rev().take(LATEST).collect();
        let mut seen = Recent::new(PAGES_SEEN);
        for (id, _) in backups {
            let Some(map) = self.map(*id).await? else { continue };
            let mut pages = Vec::new();
            for (number, page) in map.root().pages().iter().enumerate() {
                if let Some(page) = page
                    && seen.insert(place_of(&page.stored))
                {
                    usage.add(&page.stored);
                    pages.push((number, page));
                }
            }
            for pages in pages.chunks(PAGES) {
                let reads = join_all(pages.iter().map(|(number, _)| page(&map, *number))).await;
                for ((_, root), content) in pages.iter().zip(reads) {
                    let Some(content) = content? else {
                        map.root().packs_of(root).for_each(|pack| usage.keep(pack));
                        usage.keep(root.stored.pack);
                        continue;
                    };
                    for stored in content.blocks.iter().flatten() {
                        usage.add(stored);
                        if latest.contains(&stored.pack.session) && self.latest.len() < FRAMES_MAX {
                            self.latest.insert(stored.hash, *stored);
                        }
                    }
                }
            }
        }
        Ok(usage)
    }

    /// Makes the maps of backups that need something of the chosen packs. Returns whether these are
    /// all.
    async fn maps(
        &mut self,
        backups: &[(Id, String)],
        renewal: &Renewal,
        maps: &mut Vec<NewMap>,
        compacted: &mut Compacted,
    ) -> Result<bool> {
        let mut needed: BTreeSet<PackId> = BTreeSet::new();
        let mut length = 0;
        let mut last: Option<(Map, Root)> = None;
        compacted.left.clear();
        for (id, _) in backups {
            if renewal.is_ended() {
                return Err(ended("compaction", self.id));
            }
            let moved_max = self.options.moved_max.unwrap_or(MOVED_MAX);
            if self.is_full || maps.len() >= moved_max || length >= MAPS_LEN {
                return Ok(false);
            }
            let Some(map) = self.map(*id).await? else { continue };
            if !map.root().packs().iter().any(|pack| self.choice.packs.contains(pack)) {
                needed.extend(map.root().packs());
                continue;
            }
            let root = self.rewrite(&map, last.as_ref()).await?;
            let may_refer = |pack: &PackId| pack.session == self.id || self.packs.has(*pack);
            let is_whole = root.packs().iter().all(may_refer);
            if !is_whole {
                compacted.left.push(*id);
            }
            if !is_whole || root == *map.root() {
                needed.extend(map.root().packs());
                continue;
            }
            needed.extend(root.packs());
            let content = root.encode()?;
            let hash = self.repository.objects.sealer.hash(&content);
            let packed = Sealer::compress(&content);
            length += packed.len();
            maps.push(NewMap { backup: *id, packed, content: content.len() as u32, hash });
            last = Some((map, root));
        }
        let running = running(self.repository, self.id).await?;
        let is_garbage = |pack: &PackId| !needed.contains(pack) && !running.contains(&pack.session);
        let garbage = self.packs.iter().filter(|(pack, _)| is_garbage(pack));
        compacted.garbage = garbage.map(|(_, size)| u64::from(size)).sum();
        compacted.damaged = self.damaged.iter().map(|pack| Key::Pack(*pack).to_string()).collect();
        Ok(!self.is_full)
    }

    /// Returns whether a page has to be written anew.
    fn is_affected(&self, root: &Root, page: &PageRoot) -> bool {
        let is_chosen = |pack: PackId| self.choice.packs.contains(&pack);
        is_chosen(page.stored.pack) || root.packs_of(page).any(is_chosen)
    }
}

/// Begins a session, unless nothing is to be changed.
async fn register(
    repository: &Repository,
    options: &CompactOptions,
    id: Id,
) -> Result<(Writer, Renewal)> {
    let objects = &repository.objects;
    let record = SessionRecord::of_compaction(options.host.clone(), now());
    let mut writer = Writer::new(id, record.encode(&objects.sealer, id, 0)?, Rules::ALL);
    if options.dry_run {
        return Ok((writer, Renewal::none()));
    }
    if let Step::Request(register) = writer.step() {
        writer.answer(objects.carry_out(register).await?);
    }
    let mut renewal = Renewal::start(Arc::clone(objects), id, record, RENEWAL);
    repository.drive(&mut writer, &mut renewal).await?;
    Ok((writer, renewal))
}

/// Milliseconds since 1970.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Lists the backups and their names, those of a disk next to each other, oldest first.
async fn list(repository: &Repository, moves: &Moves) -> Result<Vec<(Id, String)>> {
    let mut backups = Vec::new();
    let (listed, compactions) = repository.list_all().await?;
    for compaction in compactions.into_iter().filter(|id| !moves.has(*id)) {
        // If it is damaged, a gc deletes nothing.
        repository.objects.carry_out(Request::Get(Key::Backup(compaction))).await?;
    }
    for BackupInfo { id, head, is_forgotten, .. } in listed {
        if !is_forgotten {
            backups.push((id, head?.name));
        }
    }
    backups.sort_by(|one, other| one.1.cmp(&other.1));
    Ok(backups)
}

/// Reads a page; `None` if it is damaged or missing.
async fn page(map: &Map, number: usize) -> Result<Option<Arc<Page>>> {
    match map.page(number).await {
        Err(error) if error.kind() == RepositoryErrorKind::Damaged => Ok(None),
        page => page.map(Some),
    }
}

/// The sessions that run, or were interrupted, without the own one.
async fn running(repository: &Repository, own: Id) -> Result<HashSet<Id>> {
    let listed = repository.objects.list(Folder::Sessions).await?;
    let sessions = listed.iter().filter_map(|listed| match listed.key {
        Key::Session(id) if id != own => Some(id),
        _ => None,
    });
    Ok(sessions.collect())
}

/// Chooses an identity that is greater than those of all compactions, whatever the clocks of their
/// machines said: the greatest one counts.
async fn next_id(repository: &Repository) -> Result<Id> {
    let listed = repository.objects.list(Folder::Moved).await?;
    let after = listed.iter().filter_map(|listed| match listed.key {
        Key::Moved(id) => Some(id.milliseconds() + 1),
        _ => None,
    });
    let time = after.fold(now(), u64::max);
    match time >> 48 {
        0 => Id::random_at(time),
        _ => Err(RepositoryError::invalid(format!(
            "{} has a compaction of a time that cannot be, so no other one can come after it",
            repository.name()
        ))),
    }
}
