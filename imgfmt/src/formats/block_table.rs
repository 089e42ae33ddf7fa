//! The table of blocks of a new image. It stays in the file, and a few pages of it in memory.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;

use crate::storage::{Durability, Storage};
use crate::units::HostOffset;

/// The length of a page in bytes.
const PAGE: usize = 4096;

/// Most pages in memory: 256 KiB. Neighbouring parts of a disk are written at about the same time.
const PAGES_MAX: usize = 64;

/// The table as the format has it.
#[derive(Clone, Copy, Debug)]
pub(super) struct TableShape {
    /// Where it is, and where a copy of it is if there is one; in bytes.
    pub(super) place: u64,
    pub(super) copy: Option<u64>,
    pub(super) entries: u64,
    pub(super) numbers: Numbers,
}

/// How an entry is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Numbers {
    Little32,
    Big32,
    Little64,
}

impl Numbers {
    /// The length of an entry in bytes.
    fn length(self) -> usize {
        match self {
            Self::Little32 | Self::Big32 => 4,
            Self::Little64 => 8,
        }
    }

    fn read(self, bytes: &[u8]) -> u64 {
        let (half, all) = (bytes.first_chunk::<4>(), bytes.first_chunk::<8>());
        match self {
            Self::Little32 => half.map_or(0, |bytes| u32::from_le_bytes(*bytes).into()),
            Self::Big32 => half.map_or(0, |bytes| u32::from_be_bytes(*bytes).into()),
            Self::Little64 => all.map_or(0, |bytes| u64::from_le_bytes(*bytes)),
        }
    }

    fn write(self, value: u64, bytes: &mut [u8]) {
        let bytes = &mut bytes[..self.length()];
        match self {
            Self::Little32 => bytes.copy_from_slice(&(value as u32).to_le_bytes()),
            Self::Big32 => bytes.copy_from_slice(&(value as u32).to_be_bytes()),
            Self::Little64 => bytes.copy_from_slice(&value.to_le_bytes()),
        }
    }
}

/// A table of a file that only this program uses.
#[derive(Debug)]
pub(super) struct BlockTable {
    storage: Arc<dyn Storage>,
    shape: TableShape,
    pages: BTreeMap<u64, Page>,
    /// The numbers of the pages, the oldest one first.
    ages: VecDeque<u64>,
}

#[derive(Debug)]
struct Page {
    bytes: Vec<u8>,
    is_changed: bool,
}

impl BlockTable {
    pub(super) fn new(storage: Arc<dyn Storage>, shape: TableShape) -> Self {
        Self { storage, shape, pages: BTreeMap::new(), ages: VecDeque::new() }
    }

    /// Writes all of it, unless it is given up.
    pub(super) fn fill(
        &mut self,
        entry: impl Fn(u64) -> u64,
        give_up: fn() -> bool,
    ) -> io::Result<()> {
        const FILLED: u64 = 1 << 20;
        let TableShape { entries, numbers, .. } = self.shape;
        let per_piece = FILLED / numbers.length() as u64;
        let mut bytes = Vec::new();
        for first in (0..entries).step_by(per_piece as usize) {
            if give_up() {
                return Err(io::Error::other("it was given up"));
            }
            let count = per_piece.min(entries - first) as usize;
            bytes.resize(count * numbers.length(), 0);
            for (index, bytes) in (first..).zip(bytes.chunks_exact_mut(numbers.length())) {
                numbers.write(entry(index), bytes);
            }
            self.write(first * numbers.length() as u64, &bytes)?;
        }
        Ok(())
    }

    pub(super) fn get(&mut self, index: u64) -> io::Result<u64> {
        let numbers = self.shape.numbers;
        let (page, start) = self.page(index)?;
        Ok(numbers.read(&page.bytes[start..]))
    }

    pub(super) fn set(&mut self, index: u64, value: u64) -> io::Result<()> {
        let numbers = self.shape.numbers;
        let (page, start) = self.page(index)?;
        numbers.write(value, &mut page.bytes[start..]);
        page.is_changed = true;
        Ok(())
    }

    /// Writes what was changed.
    pub(super) fn write_back(&mut self) -> io::Result<()> {
        let changed: Vec<u64> = self
            .pages
            .iter()
            .filter(|(_, page)| page.is_changed)
            .map(|(number, _)| *number)
            .collect();
        changed.into_iter().try_for_each(|number| self.write_page(number))
    }

    /// The page with an entry, and where in it that is.
    fn page(&mut self, index: u64) -> io::Result<(&mut Page, usize)> {
        let place = index * self.shape.numbers.length() as u64;
        let (number, start) = (place / PAGE as u64, (place % PAGE as u64) as usize);
        if !self.pages.contains_key(&number) {
            if self.ages.len() >= PAGES_MAX
                && let Some(oldest) = self.ages.front().copied()
            {
                self.write_page(oldest)?;
                self.pages.remove(&oldest);
                self.ages.pop_front();
            }
            let length = self.shape.entries * self.shape.numbers.length() as u64;
            let mut bytes = vec![0; PAGE.min((length - number * PAGE as u64) as usize)];
            let offset = HostOffset::new(self.shape.place + number * PAGE as u64);
            // The file may end before a table whose entries are zero.
            self.storage.read_at(offset, &mut bytes)?;
            self.pages.insert(number, Page { bytes, is_changed: false });
            self.ages.push_back(number);
        }
        match self.pages.get_mut(&number) {
            Some(page) => Ok((page, start)),
            None => Err(io::Error::other("a page of the table is missing")),
        }
    }

    fn write_page(&mut self, number: u64) -> io::Result<()> {
        let Some(page) = self.pages.get(&number).filter(|page| page.is_changed) else {
            return Ok(());
        };
        self.write(number * PAGE as u64, &page.bytes)?;
        if let Some(page) = self.pages.get_mut(&number) {
            page.is_changed = false;
        }
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        for place in [Some(self.shape.place), self.shape.copy].into_iter().flatten() {
            self.storage.write_at(HostOffset::new(place + offset), bytes, Durability::Cached)?;
        }
        Ok(())
    }
}
