//! New images of formats that divide the disk into blocks, while they are filled.
//!
//! Blocks are added to the end of the file in the order in which they are first written to; several
//! threads may write at once. The table of blocks stays in the file, whatever the size of the disk:
//! a few pages of it are kept. No program opens such a file before it is complete, so the order in
//! which data and tables are written does not matter, and [`finish`](NewImage::finish) writes what
//! is left.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::block_table::{BlockTable, TableShape};
use super::new::{InOrder, Planned};
use crate::error::{Error, ErrorKind, Result};
use crate::layer::{Backing, Layer, Walk, WritableLayer};
use crate::mapping::{Content, FileSpan, Mapped};
use crate::ordered_lock::{OrderedMutex, rank};
use crate::read;
use crate::storage::{Capabilities, Durability, Speed, Storage, TryWrite, ZeroMode};
use crate::units::{GuestOffset, GuestRange, HostOffset, span};

/// Bytes of a file, and where they are.
pub(super) type Part = (u64, Vec<u8>);

/// What a format says of a new image.
pub(super) trait NewBlocks: Send + Sync + fmt::Debug + 'static {
    /// Which entry of the table is that of a block of the disk.
    fn index(&self, block: u64) -> u64 {
        block
    }

    /// The block of the disk whose entry has an index; `None` if it has another purpose.
    fn block(&self, index: u64) -> Option<u64> {
        Some(index)
    }

    /// Whether all entries are 0 if nothing is stored, as in a new file.
    const IS_FREE_ZERO: bool = false;

    /// The entry with an index, if nothing is stored.
    fn free(&self, _index: u64) -> u64 {
        0
    }

    /// The entry of the block that is the `number`th in the file, at `offset` there.
    fn stored(&self, number: u64, offset: u64) -> u64;

    /// The number in the file of the block that an entry stands for; `None` if nothing is stored.
    fn number(&self, entry: u64) -> Option<u64>;

    /// What remains to be written once there are `count` blocks, which end at `end`.
    fn ending(&self, _count: u64, _end: u64) -> Vec<Part> {
        Vec::new()
    }
}

/// The numbers of a new image, in bytes.
#[derive(Debug)]
pub(super) struct Shape {
    /// Of the disk.
    pub(super) size: u64,
    pub(super) block_size: u64,
    /// What is before each block in the file.
    pub(super) before: Vec<u8>,
    /// Where the first block is, with what is before it.
    pub(super) data: u64,
    /// Most blocks that the file can have.
    pub(super) blocks_max: u64,
    /// The table of blocks; `None` if blocks are where they are on the disk.
    pub(super) table: Option<TableShape>,
    /// Whether every block has its place from the start.
    pub(super) is_fixed: bool,
    /// What is written first, besides the table.
    pub(super) parts: Vec<Part>,
    /// Where on the disk it begins, if it is one of several files.
    pub(super) start: u64,
    /// What shows where it has nothing; zeroes without it.
    pub(super) backing: Option<Backing>,
}

impl Shape {
    /// The distance of blocks in the file.
    fn stride(&self) -> u64 {
        self.block_size + self.before.len() as u64
    }

    /// The number of blocks of the disk.
    fn blocks(&self) -> u64 {
        self.size.div_ceil(self.block_size)
    }

    /// Where the blocks end if there are `count`.
    fn end(&self, count: u64) -> u64 {
        match self.table {
            Some(_) => self.data + count * self.stride(),
            None => self.data + self.size,
        }
    }
}

/// A new image that is being filled.
#[derive(Debug)]
pub(super) struct NewImage<B: NewBlocks> {
    storage: Arc<dyn Storage>,
    blocks: B,
    shape: Shape,
    filling: OrderedMutex<{ rank::NEW_IMAGE }, Filling>,
    /// Whether an operation has failed: data is then missing that its user wanted to write.
    has_failed: AtomicBool,
}

/// What changes while it is filled.
#[derive(Debug)]
struct Filling {
    table: Option<BlockTable>,
    /// How many blocks the file has.
    count: u64,
    /// Whether the file has all of this.
    is_finished: bool,
}

impl<B: NewBlocks> NewImage<B> {
    /// The image, before anything is written of it; after the blocks come `behind` more bytes.
    pub(super) fn plan(blocks: B, shape: Shape, behind: u64, in_order: InOrder) -> Planned {
        let (size, block_size) = (shape.size, shape.block_size);
        let (fixed, of_none, stride) =
            (shape.is_fixed.then_some(shape.blocks()), shape.end(0), shape.stride());
        let has_table = shape.table.is_some();
        let length = move |count| match has_table {
            true => of_none + fixed.unwrap_or(count) * stride + behind,
            false => of_none + behind,
        };
        let begin =
            move |storage, _, give_up| Ok(Self::begin(storage, blocks, shape, give_up)? as _);
        let (length, begin) = (Box::new(length), Box::new(begin));
        Planned { size, block_size, length, in_order, extents: Vec::new(), begin }
    }

    /// Begins an image in an empty storage.
    fn begin(
        storage: Arc<dyn Storage>,
        blocks: B,
        shape: Shape,
        give_up: fn() -> bool,
    ) -> Result<Box<Self>> {
        let count = if shape.is_fixed { shape.blocks() } else { 0 };
        let table = shape.table.map(|table| BlockTable::new(Arc::clone(&storage), table));
        let filling = Filling { table, count, is_finished: false };
        let filling = OrderedMutex::new(filling);
        let new = Self { storage, blocks, shape, filling, has_failed: AtomicBool::new(false) };
        new.noted(new.write_start(give_up).map_err(io("write to")))?;
        Ok(Box::new(new))
    }

    fn write_start(&self, give_up: fn() -> bool) -> io::Result<()> {
        let Shape { is_fixed, .. } = self.shape;
        for (offset, bytes) in &self.shape.parts {
            self.storage.write_at(HostOffset::new(*offset), bytes, Durability::Cached)?;
        }
        let mut filling = self.filling.lock();
        let count = filling.count;
        if let Some(table) = &mut filling.table
            && (is_fixed || !B::IS_FREE_ZERO)
        {
            let entry = |index| match self.blocks.block(index) {
                Some(block) if block < count => self.blocks.stored(block, self.shape.end(block)),
                _ => self.blocks.free(index),
            };
            table.fill(entry, give_up)?;
        }
        match is_fixed {
            true => self.storage.set_len(self.shape.end(filling.count)),
            false => Ok(()),
        }
    }

    /// Notes an error: without a flush, the file then remains incomplete.
    fn noted<T>(&self, result: Result<T>) -> Result<T> {
        if result.is_err() {
            self.has_failed.store(true, Ordering::Relaxed);
        }
        result
    }

    /// Where the bytes of a part of the disk are or come to be: pieces of the file in order, joined
    /// where they follow each other.
    fn place(&self, start: u64, length: u64) -> Result<Vec<(u64, u64)>> {
        let shape = &self.shape;
        let start = start - shape.start;
        if shape.is_fixed {
            return Ok(vec![(shape.data + start, length)]);
        }
        let mut filling = self.filling.lock();
        filling.is_finished = false;
        let mut pieces = Vec::new();
        let (mut position, end) = (start, start + length);
        while position < end {
            let (block, inside) = (position / shape.block_size, position % shape.block_size);
            let rest = (shape.block_size - inside).min(end - position);
            let offset = match self.find(&mut filling, block)? {
                Some(offset) => offset,
                None => {
                    let is_whole = rest == shape.block_size.min(shape.size - (position - inside));
                    self.add(&mut filling, block, is_whole)?
                }
            };
            join(&mut pieces, offset + inside, rest);
            position += rest;
        }
        Ok(pieces)
    }

    /// Where a part of the disk is in the file, if it is stored there, and where on the disk the
    /// block of it ends.
    fn stored_at(&self, position: u64) -> Result<(Option<u64>, u64)> {
        let shape = &self.shape;
        let offset = position - shape.start;
        let (block, inside) = (offset / shape.block_size, offset % shape.block_size);
        let place = match shape.is_fixed {
            true => Some(shape.data + offset),
            false => self.find(&mut self.filling.lock(), block)?.map(|data| data + inside),
        };
        Ok((place, position - inside + shape.block_size))
    }

    /// Where the data of a block is.
    fn find(&self, filling: &mut Filling, block: u64) -> Result<Option<u64>> {
        let Some(table) = &mut filling.table else { return Ok(None) };
        let entry = table.get(self.blocks.index(block)).map_err(io("read"))?;
        let number = self.blocks.number(entry);
        Ok(number.map(|number| self.shape.end(number) + self.shape.before.len() as u64))
    }

    /// Adds a block to the file, of which all is written next, or a part.
    fn add(&self, filling: &mut Filling, block: u64, is_whole: bool) -> Result<u64> {
        let (number, offset) = (filling.count, self.shape.end(filling.count));
        if number >= self.shape.blocks_max {
            let detail = "the file would become larger than its format allows";
            return Err(Error::new(ErrorKind::NoSpace, "write to", detail));
        }
        let before = &self.shape.before;
        if !before.is_empty() {
            let written =
                self.storage.write_at(HostOffset::new(offset), before, Durability::Cached);
            written.map_err(io("write to"))?;
        }
        if let (Some(backing), false) = (&self.shape.backing, is_whole) {
            self.copy_up(backing, block, offset + before.len() as u64)?;
        }
        if let Some(table) = &mut filling.table {
            let entry = self.blocks.stored(number, offset);
            table.set(self.blocks.index(block), entry).map_err(io("write to"))?;
        }
        filling.count += 1;
        Ok(offset + before.len() as u64)
    }

    /// Copies what the layer below has of a block to its place in the file.
    fn copy_up(&self, backing: &Backing, block: u64, place: u64) -> Result<()> {
        let shape = &self.shape;
        let start = shape.start + block * shape.block_size;
        let end = (start + shape.block_size).min(shape.start + shape.size).min(backing.size);
        if start >= end {
            return Ok(());
        }
        let mut bytes = vec![0; (end - start) as usize];
        read::read_at(&*backing.layer, GuestOffset::new(start), &mut bytes)?;
        let written = self.storage.write_at(HostOffset::new(place), &bytes, Durability::Cached);
        written.map_err(io("write to"))
    }

    /// Makes the file complete, with what is stored so far.
    fn finish(&self) -> io::Result<()> {
        let mut filling = self.filling.lock();
        if filling.is_finished {
            return Ok(());
        }
        if let Some(table) = &mut filling.table {
            table.write_back()?;
        }
        let end = self.shape.end(filling.count);
        if self.storage.len()? != end {
            self.storage.set_len(end)?;
        }
        for (offset, bytes) in self.blocks.ending(filling.count, end) {
            self.storage.write_at(HostOffset::new(offset), &bytes, Durability::Cached)?;
        }
        filling.is_finished = true;
        Ok(())
    }
}

/// Appends a piece to others.
fn join(pieces: &mut Vec<(u64, u64)>, offset: u64, length: u64) {
    match pieces.last_mut() {
        Some((start, before)) if *start + *before == offset => *before += length,
        _ => pieces.push((offset, length)),
    }
}

impl<B: NewBlocks> Layer for NewImage<B> {
    fn size(&self) -> u64 {
        self.shape.size
    }

    fn map(&self, range: GuestRange, walk: &mut Walk<'_>) -> Result<Mapped> {
        let (mut position, end) = (range.offset().bytes(), range.end().bytes());
        while position < end {
            let (offset, block_end) = self.stored_at(position)?;
            let stop = block_end.min(end);
            walk.spend(1);
            let range = span(position, stop);
            let mapped = match (offset.map(HostOffset::new), &self.shape.backing) {
                (None, None) => walk.push(self, range, Content::Zero)?,
                (None, backing) => Backing::map(backing.as_ref(), self, range, walk)?,
                (Some(offset), _) => {
                    let storage = &self.storage;
                    // A block may end behind what was written of it.
                    let file = FileSpan {
                        storage,
                        offset,
                        may_pass_end: true,
                        may_have_holes: false,
                        is_file_content: true,
                    };
                    walk.push_file(self, range, file, Content::Zero)?
                }
            };
            position = stop;
            if mapped != Mapped::Complete || walk.is_tired() && position < end {
                return Ok(if mapped == Mapped::Complete { Mapped::Partial } else { mapped });
            }
        }
        Ok(Mapped::Complete)
    }
}

impl<B: NewBlocks> WritableLayer for NewImage<B> {
    fn capabilities(&self) -> Capabilities {
        Capabilities { fast_zero: false, discard: false, ..self.storage.capabilities() }
    }

    fn write_at(&self, offset: GuestOffset, data: &[u8], durability: Durability) -> Result<()> {
        self.noted(self.write_data(offset, data))?;
        self.flush_if(durability)
    }

    fn try_write_at(&self, _: GuestOffset, _: &[u8]) -> Result<TryWrite> {
        Ok(TryWrite::WouldBlock)
    }

    fn write_zeroes(&self, range: GuestRange, mode: ZeroMode, speed: Speed) -> Result<()> {
        if speed == Speed::FastOnly {
            let detail = "a new image of this format has no fast way to do so; allow the slow one";
            return Err(Error::new(ErrorKind::NotFast, "write zeroes to", detail));
        }
        self.noted(self.zero(range, mode))
    }

    fn discard(&self, _: GuestRange) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.noted(self.finish().map_err(io("write to")))?;
        self.noted(self.storage.sync().map_err(io("flush")))
    }

    fn resize(&mut self, _: u64) -> Result<()> {
        let detail = "the size of a new image of this format cannot be changed";
        Err(Error::new(ErrorKind::Unsupported, "resize", detail))
    }
}

impl<B: NewBlocks> NewImage<B> {
    fn write_data(&self, offset: GuestOffset, data: &[u8]) -> Result<()> {
        let mut rest = data;
        let written = |error| io("write to")(error).at(offset.bytes());
        for (place, length) in self.place(offset.bytes(), data.len() as u64)? {
            let (piece, behind) = rest.split_at(length as usize);
            self.storage
                .write_at(HostOffset::new(place), piece, Durability::Cached)
                .map_err(written)?;
            rest = behind;
        }
        Ok(())
    }

    fn zero(&self, range: GuestRange, mode: ZeroMode) -> Result<()> {
        let (mut position, end) = (range.offset().bytes(), range.end().bytes());
        while position < end {
            let (place, block_end) = self.stored_at(position)?;
            let stop = block_end.min(end);
            let pieces = match place {
                Some(place) => vec![(place, stop - position)],
                None if self.shape.backing.is_some() => self.place(position, stop - position)?,
                None => Vec::new(),
            };
            for (place, length) in pieces {
                self.write_zeroes_in_file(place, length, mode).map_err(io("write to"))?;
            }
            position = stop;
        }
        Ok(())
    }

    fn write_zeroes_in_file(&self, place: u64, length: u64, mode: ZeroMode) -> io::Result<()> {
        // What is beyond the end is zero.
        let length = length.min(self.storage.len()?.saturating_sub(place));
        match length {
            0 => Ok(()),
            _ => self.storage.write_zeroes(HostOffset::new(place), length, mode, Speed::Any),
        }
    }
}

impl<B: NewBlocks> Drop for NewImage<B> {
    fn drop(&mut self) {
        // A caller that has to know whether this works closes the image. One that lacks data must
        // not look complete.
        if !*self.has_failed.get_mut() {
            let _ = self.finish();
        }
    }
}

fn io(operation: &'static str) -> impl Fn(io::Error) -> Error {
    move |error| Error::from_io(operation, error)
}
