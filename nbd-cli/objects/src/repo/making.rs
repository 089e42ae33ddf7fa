//! Makes a backup.

mod blocks;
mod known;
mod new_backup;
mod packs;
mod puts;
mod renewal;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::task::JoinHandle;

use self::blocks::{Prepared, prepare};
use self::known::Known;
use self::new_backup::check;
pub use self::new_backup::{Made, NewBackup};
use self::packs::Packs;
use self::puts::Puts;
use self::renewal::Renewal;
use super::error::{RepositoryError, RepositoryErrorKind, Result};
use super::id::{Id, Key, PackId};
use super::map::Map;
use super::objects::Creates;
use super::pack::{FrameKind, PACK_SIZE, PackBuilder};
use super::page::{BLOCK_SIZE, PAGE_BLOCKS, PAGE_SPAN, Page};
use super::protocol::{Answer, Backup, Committed, Request, Rules, Step, Writer};
use super::repository::Repository;
use super::root::{self, Head, RootBuilder};
use super::seal::{Hash, PACKS_MAX, Sealer};
use super::session_record::SessionRecord;
use super::stored::Stored;
use super::tries::Tries;

/// Pieces of data that are compressed at a time.
const PIECES: usize = 8;
/// Interval at which the record of the session is renewed.
const RENEWAL: Duration = Duration::from_secs(60);

/// A backup that is being made. Give it the whole disk in order, by [`data`](Self::data),
/// [`zero`](Self::zero) and [`unchanged`](Self::unchanged), and commit it.
///
/// # Cancel safety
///
/// Dropping it at any time leaves an interrupted session: no backup, and packs that the next backup
/// of this name uses again.
#[derive(Debug)]
pub struct Session {
    repository: Repository,
    id: Id,
    new: NewBackup,
    time: u64,
    writer: Writer,
    /// The last backup of this name, when this one began.
    last: Option<Id>,
    base: Option<Map>,
    known: Arc<Known>,
    packs: Packs,
    /// Blocks that were given.
    given: u64,
    /// What was given and is not yet in the map.
    queue: VecDeque<Piece>,
    /// The page that is being filled.
    page: Page,
    root: RootBuilder,
    /// Compressed pages that are in no pack yet: number, frame, hash.
    pages: Vec<(usize, Vec<u8>, Hash)>,
    pages_len: usize,
    pack: PackBuilder,
    next_pack: u32,
    puts: Puts,
    renewal: Renewal,
    data: u64,
    added: u64,
    found: u64,
    /// Whether something that was given did not get into the map or the store.
    has_failed: bool,
}

#[derive(Debug)]
enum Piece {
    Zero(u64),
    Stored(Vec<Option<Stored>>),
    /// A whole page of the base.
    Page(usize),
    Data(JoinHandle<Vec<Prepared>>),
}

impl Repository {
    /// Begins a backup. Needs a tokio runtime, with time.
    ///
    /// # Errors
    ///
    /// If the name or the size is refused, if the base was forgotten or is damaged, and as for all requests to the store.
    pub async fn begin(&self, new: NewBackup) -> Result<Session> {
        check(&new)?;
        let id = Id::random()?;
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        let record = SessionRecord { name: new.name.clone(), host: new.host.clone(), time };
        let objects = &self.objects;
        let mut writer = Writer::new(id, record.encode(&objects.sealer, id, 0)?, Rules::ALL);
        if let Step::Request(register) = writer.step() {
            writer.answer(objects.carry_out(register).await?);
        }
        // What follows may take longer than a gc has patience.
        let mut renewal = Renewal::start(Arc::clone(objects), id, record, RENEWAL);
        self.drive(&mut writer, &mut renewal).await?;
        // Only now: what was condemned before is known.
        let base = match new.base {
            Some(base) => Some(Map::open(self, base).await?),
            None => None,
        };
        let last = self.last(&new.name).await?;
        let packs = Packs::list(self, &writer).await?;
        let known = Known::find(self, &writer, &packs, (id, &new.name), &new.like).await?;
        Ok(Session {
            repository: self.clone(),
            id,
            time,
            writer,
            last,
            base,
            known: Arc::new(known),
            packs,
            given: 0,
            queue: VecDeque::new(),
            page: Page::default(),
            root: RootBuilder::default(),
            pages: Vec::new(),
            pages_len: 0,
            pack: PackBuilder::new(PackId { session: id, number: 0 }),
            next_pack: 1,
            puts: Puts::default(),
            renewal,
            data: 0,
            added: 0,
            found: 0,
            has_failed: false,
            new,
        })
    }

    /// Carries the requests of a writer out, until it is ready or has ended.
    async fn drive(&self, writer: &mut Writer, renewal: &mut Renewal) -> Result<Committed> {
        let mut tries = Tries::default();
        loop {
            let answer = match writer.step() {
                Step::Reached(reached) => return Ok(reached),
                Step::Request(request @ Request::Create(..)) => {
                    if self.creates() == Creates::Overwriting {
                        // There, only the record tells that the session was not ended.
                        renewal.stop().await;
                    }
                    tries.create(&self.objects, request).await?
                }
                Step::Request(request @ Request::Delete(_)) => {
                    renewal.stop().await;
                    // The backup is there, or is not: the record is the next gc's to remove.
                    let _ = self.objects.carry_out(request).await;
                    Answer::Done
                }
                Step::Request(request) => self.objects.carry_out(request).await?,
            };
            writer.answer(answer);
        }
    }
}

impl Session {
    /// The identity of the session and of the backup.
    pub fn id(&self) -> Id {
        self.id
    }

    /// Blocks of the disk.
    fn blocks(&self) -> u64 {
        self.new.size.div_ceil(BLOCK_SIZE)
    }

    /// Bytes of the disk that were given.
    pub fn position(&self) -> u64 {
        (self.given * BLOCK_SIZE).min(self.new.size)
    }

    /// Gives the next bytes of the disk: whole blocks, unless the disk ends.
    ///
    /// # Errors
    ///
    /// If the bytes are not whole blocks or too many, and as for all requests to the store.
    pub async fn data(&mut self, bytes: Bytes) -> Result<()> {
        let (position, length) = (self.position(), bytes.len() as u64);
        let end = position.checked_add(length).filter(|&end| end <= self.new.size);
        let is_whole = length.is_multiple_of(BLOCK_SIZE);
        if !end.is_some_and(|end| is_whole || end == self.new.size) {
            return Err(RepositoryError::invalid("a backup takes whole blocks of the disk"));
        }
        let first = self.given;
        let count = length.div_ceil(BLOCK_SIZE);
        let expected = self.expected(first..first + count).await?;
        let (sealer, known) = (self.repository.objects.sealer.clone(), Arc::clone(&self.known));
        let work = move || prepare(&sealer, &known, &bytes, &expected);
        self.given += count;
        self.give(Piece::Data(tokio::task::spawn_blocking(work))).await
    }

    /// Gives so many blocks that read as zero.
    ///
    /// # Errors
    ///
    /// As [`data`](Self::data).
    pub async fn zero(&mut self, blocks: u64) -> Result<()> {
        if blocks > self.blocks() - self.given {
            return Err(RepositoryError::invalid("the disk has not so many blocks"));
        }
        self.given += blocks;
        self.give(Piece::Zero(blocks)).await
    }

    /// Gives at most so many blocks that are as in the base, and returns how many were taken. The
    /// next one, if there is one, has to be read and given as data: the repository does not have it
    /// any more, or the base is of a smaller disk. If the sizes differ, that is so for the block in
    /// which the smaller disk ends, too: its length is another one.
    ///
    /// # Errors
    ///
    /// If there is no base, and as for all requests to the store.
    pub async fn unchanged(&mut self, blocks: u64) -> Result<u64> {
        let base = self.base.as_ref().ok_or_else(no_base)?.size();
        let same = match base == self.new.size {
            true => self.blocks(),
            false => base.min(self.new.size) / BLOCK_SIZE,
        };
        let (begin, end) = (self.given, self.given.saturating_add(blocks).min(same));
        while self.given < end {
            let number = (self.given / PAGE_BLOCKS) as usize;
            let page_end = ((number as u64 + 1) * PAGE_BLOCKS).min(self.blocks());
            if self.given.is_multiple_of(PAGE_BLOCKS)
                && end >= page_end
                && self.is_shared(number)?
            {
                self.given = page_end;
                self.give(Piece::Page(number)).await?;
                continue;
            }
            let first = self.given;
            let Some(found) = self.in_base(first..end.min(page_end)).await? else { break };
            let length = found.len() as u64;
            let taken: Vec<_> = found.into_iter().map_while(|it| self.may_take(it)).collect();
            let count = taken.len() as u64;
            self.given += count;
            self.give(Piece::Stored(taken)).await?;
            if count < length {
                break;
            }
        }
        Ok(self.given - begin)
    }

    fn may_take(&self, block: Option<Stored>) -> Option<Option<Stored>> {
        block.is_none_or(|stored| self.packs.holds(&stored)).then_some(block)
    }

    /// Returns whether a page of the base is taken as it is.
    fn is_shared(&self, number: usize) -> Result<bool> {
        let base = self.base.as_ref().ok_or_else(no_base)?;
        // Its last page has another number of blocks, if the disk was resized.
        let Some(page) = base.root().pages().get(number).filter(|_| base.size() == self.new.size)
        else {
            return Ok(false);
        };
        Ok(page.as_ref().is_none_or(|page| {
            self.packs.holds(&page.stored)
                && base.root().packs_of(page).all(|pack| self.packs.has(pack))
        }))
    }

    /// Returns where the base has these blocks, which are of one page; `None` if that is lost.
    async fn in_base(&self, blocks: std::ops::Range<u64>) -> Result<Option<Vec<Option<Stored>>>> {
        let base = self.base.as_ref().ok_or_else(no_base)?;
        let number = (blocks.start / PAGE_BLOCKS) as usize;
        let page = match base.page(number).await {
            Ok(page) => page,
            // What is lost is read from the disk again.
            Err(error) if error.kind() == RepositoryErrorKind::Damaged => return Ok(None),
            Err(error) => return Err(error),
        };
        let first = blocks.start - number as u64 * PAGE_BLOCKS;
        let range = first as usize..(first + blocks.end - blocks.start) as usize;
        let found = page.blocks.get(range).map(<[_]>::to_vec);
        let smaller = || RepositoryError::invalid("the base is of a smaller disk");
        found.ok_or_else(smaller).map(Some)
    }

    /// Returns for each block what it may be equal to.
    async fn expected(&self, blocks: std::ops::Range<u64>) -> Result<Vec<Option<Stored>>> {
        let mut expected = Vec::new();
        let base_blocks = self.base.as_ref().map_or(0, |base| base.size().div_ceil(BLOCK_SIZE));
        let mut at = blocks.start;
        while at < blocks.end.min(base_blocks) {
            let page_end = (at / PAGE_BLOCKS + 1) * PAGE_BLOCKS;
            let end = page_end.min(blocks.end).min(base_blocks);
            let found = self.in_base(at..end).await?;
            let found = found.unwrap_or_else(|| vec![None; (end - at) as usize]);
            let holds = |stored: &Stored| self.packs.holds(stored);
            expected.extend(found.into_iter().map(|block| block.filter(holds)));
            at = end;
        }
        expected.resize((blocks.end - blocks.start) as usize, None);
        Ok(expected)
    }

    async fn give(&mut self, piece: Piece) -> Result<()> {
        if self.renewal.is_ended() {
            return Err(self.ended());
        }
        self.check_sound()?;
        // Until all went well; and for good if this is dropped at an await.
        self.has_failed = true;
        self.queue.push_back(piece);
        while self.queue.len() > PIECES {
            self.take().await?;
        }
        self.has_failed = false;
        Ok(())
    }

    /// Refuses to go on after a failure: what was given then is nowhere.
    fn check_sound(&self) -> Result<()> {
        match self.has_failed {
            true => Err(RepositoryError::new(
                RepositoryErrorKind::Store,
                "a part of the backup could not be sent, so there is no backup; make it again",
            )),
            false => Ok(()),
        }
    }

    /// Moves the first of the queue into the map.
    async fn take(&mut self) -> Result<()> {
        match self.queue.pop_front() {
            None => {}
            Some(Piece::Zero(blocks)) => {
                for _ in 0..blocks {
                    self.push(None).await?;
                }
            }
            Some(Piece::Stored(blocks)) => {
                for block in blocks {
                    self.found += block.map_or(0, |_| BLOCK_SIZE);
                    self.push(block).await?;
                }
            }
            Some(Piece::Page(number)) => self.share(number)?,
            Some(Piece::Data(work)) => {
                let prepared = work.await.map_err(|error| {
                    RepositoryError::invalid(format!("a block could not be compressed: {error}"))
                })?;
                let first = self.root.len() as u64 * PAGE_BLOCKS + self.page.blocks.len() as u64;
                for (index, block) in (first..).zip(prepared) {
                    let stored = match block {
                        Prepared::Zero => None,
                        Prepared::Found(stored) => {
                            self.found += BLOCK_SIZE;
                            Some(stored)
                        }
                        Prepared::New(packed, hash) => {
                            Some(self.store((FrameKind::Block, index), packed, hash).await?)
                        }
                    };
                    self.push(stored).await?;
                }
            }
        }
        Ok(())
    }

    /// Takes a page of the base as it is.
    fn share(&mut self, number: usize) -> Result<()> {
        let base = self.base.as_ref().ok_or_else(no_base)?;
        let Some(Some(page)) = base.root().pages().get(number) else {
            self.root.zero();
            return Ok(());
        };
        let packs: Vec<_> = base.root().packs_of(page).collect();
        self.root.page(page.content, page.data_blocks, &packs)?;
        self.root.place(number, page.stored)?;
        let bytes = u64::from(page.data_blocks) * BLOCK_SIZE;
        self.data += bytes;
        self.found += bytes;
        Ok(())
    }

    /// Adds a block to the page, and ends the page if it is full.
    async fn push(&mut self, block: Option<Stored>) -> Result<()> {
        self.data += block.map_or(0, |_| BLOCK_SIZE);
        self.page.blocks.push(block);
        let first = self.root.len() as u64 * PAGE_BLOCKS;
        let count = (self.blocks() - first).min(PAGE_BLOCKS);
        if self.page.blocks.len() as u64 == count {
            self.end_page().await?;
        }
        Ok(())
    }

    async fn end_page(&mut self) -> Result<()> {
        let page = std::mem::take(&mut self.page);
        if page.is_zero() {
            self.root.zero();
            return Ok(());
        }
        let number = self.root.len();
        let content = page.encode();
        let hash = self.repository.objects.sealer.hash(&content);
        let data_blocks = page.blocks.iter().flatten().count() as u16;
        self.root.page(content.len() as u32, data_blocks, &page.packs())?;
        if let Some(stored) = self.same_page(number, hash) {
            return self.root.place(number, stored);
        }
        let packed = Sealer::compress(&content);
        self.pages_len += packed.len();
        self.pages.push((number, packed, hash));
        if self.pages_len >= PACK_SIZE {
            self.send_pages().await?;
        }
        Ok(())
    }

    /// Returns where the same page is, if the base or an interrupted session has it.
    fn same_page(&self, number: usize, hash: Hash) -> Option<Stored> {
        let in_base = || {
            let page = self.base.as_ref()?.root().pages().get(number)?.as_ref()?;
            let is_same = page.stored.hash == hash && self.packs.holds(&page.stored);
            is_same.then_some(page.stored)
        };
        in_base().or_else(|| self.known.page(hash))
    }

    /// Adds a frame to the pack, and sends the pack if it is full.
    async fn store(
        &mut self,
        what: (FrameKind, u64),
        packed: Vec<u8>,
        hash: Hash,
    ) -> Result<Stored> {
        let stored = self.pack.add(&self.repository.objects.sealer, what, packed, hash)?;
        if self.pack.len() >= PACK_SIZE {
            self.send_pack().await?;
        }
        Ok(stored)
    }

    /// Puts all pages into packs. They are together there, so that a reader gets many by one request.
    async fn send_pages(&mut self) -> Result<()> {
        if self.pack.len() + self.pages_len > PACK_SIZE {
            self.send_pack().await?;
        }
        self.pages_len = 0;
        for (number, packed, hash) in std::mem::take(&mut self.pages) {
            let stored = self.store((FrameKind::Page, number as u64), packed, hash).await?;
            self.root.place(number, stored)?;
        }
        Ok(())
    }

    async fn send_pack(&mut self) -> Result<()> {
        if self.pack.len() == 0 {
            return Ok(());
        }
        if self.next_pack > PACKS_MAX {
            return Err(RepositoryError::invalid("the backup has too many packs"));
        }
        let next = PackId { session: self.id, number: self.next_pack };
        let full = std::mem::replace(&mut self.pack, PackBuilder::new(next));
        self.next_pack += 1;
        let name = Key::Pack(full.id()).to_string();
        let content = full.finish(&self.repository.objects.sealer)?;
        self.added += content.len() as u64;
        self.puts.send(&self.repository.objects, name, content).await
    }

    /// Waits for what is being sent. Returns whether nothing is left to send but the open pack.
    #[cfg(test)]
    pub(super) async fn puts_are_done(&mut self) -> bool {
        while !self.queue.is_empty() {
            self.take().await.unwrap();
        }
        self.puts.sent().await.unwrap();
        self.puts.is_empty()
    }

    /// Makes what was given a backup. When it returns, the backup is durable.
    ///
    /// # Errors
    ///
    /// [`RepositoryErrorKind::Fenced`] if somebody else ended the session: there is no backup. If a
    /// request fails, there may be one.
    pub async fn commit(mut self) -> Result<Made> {
        self.check_sound()?;
        if self.given != self.blocks() {
            return Err(RepositoryError::invalid("a part of the disk was not given"));
        }
        while !self.queue.is_empty() {
            self.take().await?;
        }
        self.send_pages().await?;
        self.send_pack().await?;
        self.puts.finish().await?;
        let root = std::mem::take(&mut self.root).finish();
        if root.pages().len() as u64 != self.new.size.div_ceil(PAGE_SPAN) {
            return Err(RepositoryError::invalid(
                "the map of the backup has another length than its disk; this is a fault of the \
                 program",
            ));
        }
        let head = self.head();
        let object = root::encode(&self.repository.objects.sealer, self.id, &head, &root)?;
        let added = self.added + object.len() as u64;
        self.writer.commit(Backup { packs: root.packs().into(), object });
        let repository = self.repository.clone();
        let last = self.begin_to_be_last().await?;
        match repository.drive(&mut self.writer, &mut self.renewal).await? {
            Committed::Yes => {
                // The backup is complete, whatever becomes of this.
                let _ = self.stay_last(last).await;
                Ok(Made {
                    id: self.id,
                    data: self.data,
                    added,
                    found: self.found,
                    packs: self.next_pack - 1,
                })
            }
            Committed::Fenced | Committed::Ready => Err(self.ended()),
        }
    }

    /// Makes this the last backup of its name, or none, if another one was committed meanwhile: with
    /// which of them a bitmap started is not known.
    async fn begin_to_be_last(&self) -> Result<Id> {
        let is_alone = self.repository.last(&self.new.name).await? == self.last;
        let last = if is_alone { self.id } else { Id::random()? };
        self.repository.set_last(&self.new.name, last).await?;
        Ok(last)
    }

    /// Looks whether another backup of this name was committed at the same moment.
    async fn stay_last(&self, last: Id) -> Result<()> {
        match self.repository.last(&self.new.name).await? == Some(last) {
            true => Ok(()),
            false => self.repository.set_last(&self.new.name, Id::random()?).await,
        }
    }

    fn ended(&self) -> RepositoryError {
        RepositoryError::new(
            RepositoryErrorKind::Fenced,
            format!(
                "somebody ended the session {} of this backup ('repo gc' or 'repo forget-session'), \
                 so there is no backup; make it again",
                self.id
            ),
        )
    }

    fn head(&self) -> Head {
        Head {
            name: self.new.name.clone(),
            size: self.new.size,
            time: self.time,
            identity: self.new.identity.clone(),
            disk: self.new.disk.clone(),
            export: self.new.export.clone(),
            bitmap: self.new.bitmap.clone(),
            data: self.data,
            added: self.added,
            body_length: 0,
            body_hash: String::new(),
        }
    }
}

fn no_base() -> RepositoryError {
    RepositoryError::invalid("there is no backup to build on")
}
