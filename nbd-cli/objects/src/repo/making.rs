//! Makes a backup.

mod base;
mod blocks;
mod commit;
mod compacting;
mod known;
mod new_backup;
mod packs;
mod pages;
mod puts;
mod renewal;
mod sender;
mod usage;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use self::blocks::{Prepared, prepare};
pub use self::compacting::{CompactOptions, Compacted, OnCopied};
use self::known::Known;
pub use self::new_backup::{Made, NewBackup};
use self::new_backup::{check, first_look};
use self::packs::Packs;
use self::renewal::{Left, Renewal};
use self::sender::Sender;
use super::error::{RepositoryError, RepositoryErrorKind, Result};
use super::id::Id;
use super::map::Map;
use super::objects::Creates;
use super::page::{BLOCK_SIZE, Page};
use super::protocol::{Answer, Committed, Moves, Request, Rules, Step, Writer};
use super::repository::Repository;
use super::root::RootBuilder;
use super::seal::Hash;
use super::session_record::SessionRecord;
use super::stored::Stored;
use super::succession::Line;
use super::tries::Tries;
use crate::runtime::boxed;

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
/// of this name uses again. A gc waits for it until it seems dead, unless
/// [`give_up`](Session::give_up) was called.
#[derive(Debug)]
pub struct Session {
    repository: Repository,
    id: Id,
    new: NewBackup,
    time: u64,
    writer: Writer,
    /// The backups of this name, when this one began.
    line: Line,
    base: Option<Map>,
    /// The first of the pages of the base that are looked at.
    first_look: usize,
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
    sender: Sender,
    renewal: Renewal,
    /// Pieces of data that may be compressed at this moment.
    cores: Arc<Semaphore>,
    /// What is left of pieces of data.
    spent: Vec<Bytes>,
    data: u64,
    found: u64,
    /// Whether something that was given did not get into the map or the store.
    has_failed: bool,
    /// Whether the backup may be there, or may still come.
    may_be_committed: bool,
}

#[derive(Debug)]
enum Piece {
    Zero(u64),
    Stored(Vec<Option<Stored>>),
    /// A whole page of the base.
    Page(usize),
    Data(JoinHandle<Option<(Vec<Prepared>, Bytes)>>),
}

impl Repository {
    /// Begins a backup. Needs a tokio runtime, with time.
    ///
    /// # Errors
    ///
    /// If the name or the size is refused, if the base was forgotten or is damaged, and as for all
    /// requests to the store.
    pub async fn begin(&self, new: NewBackup) -> Result<Session> {
        check(&new)?;
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        let time = new.time.unwrap_or(now);
        // When it was begun must be known even if its object cannot be read.
        let id = Id::random_at(time)?;
        let record = SessionRecord {
            name: new.name.to_string(),
            host: new.host.clone(),
            time: now,
            failed: false,
        };
        let objects = &self.objects;
        let mut writer = Writer::new(id, record.encode(&objects.sealer, id, 0)?, Rules::ALL);
        if let Step::Request(register) = writer.step() {
            writer.answer(objects.carry_out(register).await?);
        }
        // What follows may take longer than a gc has patience.
        let mut renewal = Renewal::start(Arc::clone(objects), id, record, RENEWAL);
        match self.registered(new, (id, time), writer, &mut renewal).await {
            Ok(session) => Ok(Session { renewal, ..session }),
            Err(error) => {
                self.give_up(id, &mut renewal, Left::Nothing).await;
                Err(error)
            }
        }
    }

    /// Finds what a backup may refer to, whose session is registered.
    async fn registered(
        &self,
        new: NewBackup,
        (id, time): (Id, u64),
        mut writer: Writer,
        renewal: &mut Renewal,
    ) -> Result<Session> {
        self.drive(&mut writer, renewal).await?;
        // Only now: what was condemned before is known.
        let moves = match new.base.is_some() || !new.like.is_empty() {
            true => self.moves().await?,
            false => Moves::default(),
        };
        let base = match new.base {
            Some(base) => Some(Map::open(self, &moves, base).await?),
            None => None,
        };
        let line = self.line(&new.name).await?;
        let packs = Packs::list(self, &writer).await?;
        let mut known =
            Known::find(self, &writer, id, &|record: &SessionRecord| record.name == *new.name)
                .await?;
        known.add_backups(self, &packs, &moves, &new.like).await?;
        Ok(Session {
            repository: self.clone(),
            id,
            time,
            writer,
            line,
            first_look: first_look(base.as_ref().map_or(0, |base| base.root().pages().len()))?,
            base,
            known: Arc::new(known),
            packs,
            given: 0,
            queue: VecDeque::new(),
            page: Page::default(),
            root: RootBuilder::default(),
            pages: Vec::new(),
            pages_len: 0,
            sender: Sender::new(Arc::clone(&self.objects), id),
            renewal: Renewal::none(),
            cores: Arc::new(Semaphore::new(cores())),
            spent: Vec::new(),
            data: 0,
            found: 0,
            has_failed: false,
            may_be_committed: false,
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

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(PIECES)
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
        let work = move || (prepare(&sealer, &known, &bytes, &expected), bytes);
        let cores = Arc::clone(&self.cores);
        let work = async move {
            // More threads than cores would take no less time, and more memory.
            let _core = cores.acquire().await;
            tokio::task::spawn_blocking(work).await.ok()
        };
        self.given += count;
        self.give(Piece::Data(tokio::spawn(boxed(work)))).await
    }

    /// Returns the memory of data that was given, which is not needed any more.
    pub fn take_spent(&mut self) -> Option<Bytes> {
        self.spent.pop()
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

    async fn give(&mut self, piece: Piece) -> Result<()> {
        if self.renewal.is_ended() {
            return Err(ended("backup", self.id));
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

    /// Waits for what is being sent. Returns whether nothing is left to send but the open pack.
    #[cfg(test)]
    pub(super) async fn puts_are_done(&mut self) -> bool {
        while !self.queue.is_empty() {
            self.take().await.unwrap();
        }
        self.sender.puts.sent().await.unwrap();
        self.sender.puts.is_empty()
    }
}

/// The error of a session that another program ended.
fn ended(what: &str, session: Id) -> RepositoryError {
    RepositoryError::new(
        RepositoryErrorKind::Fenced,
        format!(
            "somebody ended the session {session} of this {what} ('repo gc' or 'repo \
             forget-session'), so there is no {what}; make it again"
        ),
    )
}
