//! A disk of which every state is remembered: what reads must show, and what a crash may leave.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::print_stdout)]

pub mod joint;
pub mod promises;
pub mod streams;
pub mod subjects;

use std::ops::Range;

use imgfmt::{Durability, ErrorKind, Image, Result, Speed, TryWrite, ZeroMode};

use crate::common::{Random, at, range};

/// What a disk writes at once or not at all, in bytes.
pub const SECTOR: u64 = 512;

/// The content of a sector from some operation on.
#[derive(Clone)]
struct Version {
    operation: u32,
    content: Box<[u8]>,
    certainty: Certainty,
}

/// What is known about a version when its operation has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Certainty {
    /// It may or may not have come to be.
    Possible,
    /// Reads show it.
    Visible,
    /// A crash does not take it away.
    Durable,
}

impl Certainty {
    fn of(durability: Durability) -> Self {
        match durability {
            Durability::Cached => Self::Visible,
            Durability::Fua => Self::Durable,
        }
    }
}

/// One random operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Write(Durability),
    Zero(ZeroMode, Speed, Durability),
    Discard(Durability),
    Flush,
    Read,
}

/// The disk as it must be.
#[derive(Clone)]
pub struct Model {
    /// What reads must show, except in uncertain sectors.
    pub current: Vec<u8>,
    versions: Vec<Vec<Version>>,
    /// An operation on these sectors failed: they hold the old content or the new.
    uncertain: Vec<bool>,
    /// Numbers of the operations that flushed everything before them.
    flushes: Vec<u32>,
    operation: u32,
}

impl Model {
    /// A disk that holds `content`, all of it durable.
    pub fn new(content: Vec<u8>) -> Self {
        assert_eq!(content.len() as u64 % SECTOR, 0);
        let version = |sector: &[u8]| Version {
            operation: 0,
            content: sector.into(),
            certainty: Certainty::Durable,
        };
        let versions: Vec<_> =
            content.chunks(SECTOR as usize).map(|sector| vec![version(sector)]).collect();
        let uncertain = vec![false; versions.len()];
        Self { current: content, versions, uncertain, flushes: Vec::new(), operation: 0 }
    }

    pub fn size(&self) -> u64 {
        self.current.len() as u64
    }

    /// The number of the last operation.
    pub fn operation(&self) -> u32 {
        self.operation
    }

    fn is_settled(&self) -> bool {
        !self.uncertain.contains(&true)
    }

    /// One random operation on the image and on the model. If it fails, its sectors are uncertain
    /// until [`settle`](Self::settle) is called.
    pub fn step(&mut self, image: &Image, random: &mut Random, what: &str) -> Result<()> {
        let (offset, length) = self.random_place(random);
        let durability = match random.below(25) {
            0 => Durability::Fua,
            _ => Durability::Cached,
        };
        let mode = [ZeroMode::MayUnmap, ZeroMode::KeepAllocated][random.below(2) as usize];
        let operation = match random.below(16) {
            0..=7 => Operation::Write(durability),
            8 | 9 => Operation::Zero(mode, Speed::Any, durability),
            10 => Operation::Zero(mode, Speed::FastOnly, durability),
            11 | 12 => Operation::Discard(durability),
            13 => Operation::Flush,
            _ => Operation::Read,
        };
        self.run(image, operation, offset, length, what)
    }

    fn random_place(&self, random: &mut Random) -> (u64, u64) {
        // What is uncertain must be overwritten in whole sectors or not at all.
        let alignments =
            if self.is_settled() { [1, 512, 4096, 65536] } else { [512, 512, 4096, 65536] };
        let alignment = alignments[random.below(4) as usize];
        let longest = [2_000, 40_000, 300_000][random.below(3) as usize];
        let offset = random.below(self.size()) / alignment * alignment;
        let length = random.below(longest) / alignment * alignment + alignment;
        let length = length.min(self.size() - offset);
        (offset, length)
    }

    /// Runs one operation on both.
    pub fn run(
        &mut self,
        image: &Image,
        operation: Operation,
        offset: u64,
        length: u64,
        what: &str,
    ) -> Result<()> {
        self.operation += 1;
        let place = range(offset, length);
        let certain = |durability| match image.cache_mode().is_writethrough() {
            true => Durability::Fua,
            false => durability,
        };
        match operation {
            Operation::Write(durability) => {
                let data = self.new_data(offset, length);
                let result = self.write(image, offset, &data, durability);
                self.note(offset, &data, certain(durability), result)
            }
            Operation::Zero(mode, speed, durability) => {
                let result = image.write_zeroes(place, mode, speed, durability);
                if let Err(error) = &result
                    && error.kind() == ErrorKind::NotFast
                {
                    assert_eq!(speed, Speed::FastOnly, "{what}: {error}");
                    return Ok(());
                }
                self.note(offset, &vec![0; length as usize], certain(durability), result)
            }
            Operation::Discard(durability) => {
                let result = image.discard(place, durability);
                self.note_discard(image, offset, length, certain(durability), result, what)
            }
            Operation::Flush => {
                image.flush()?;
                self.flushes.push(self.operation);
                Ok(())
            }
            Operation::Read => {
                let mut found = vec![0xee; length as usize];
                image.read_at(at(offset), &mut found)?;
                self.compare(offset, &found, what);
                Ok(())
            }
        }
    }

    /// Every third write tries first not to block.
    fn write(&self, image: &Image, offset: u64, data: &[u8], durability: Durability) -> Result<()> {
        if self.operation.is_multiple_of(3)
            && durability == Durability::Cached
            && image.try_write_at(at(offset), data)? == TryWrite::Complete
        {
            return Ok(());
        }
        let is_durable = durability == Durability::Fua || image.cache_mode().is_writethrough();
        if self.operation % 3 == 1
            && let Some(achieved) = self.write_by_map(image, offset, data, is_durable)?
        {
            let is_done = achieved == Durability::Fua || !is_durable;
            return if is_done { Ok(()) } else { image.flush() };
        }
        image.write_at(at(offset), data, durability)
    }

    /// Writes as a server does that carries writes out by itself, if the image allows it and it
    /// succeeds: to stable storage if that is wanted and makes the write durable. What failed is
    /// then repeated.
    fn write_by_map(
        &self,
        image: &Image,
        offset: u64,
        data: &[u8],
        is_durable: bool,
    ) -> Result<Option<Durability>> {
        let Some(map) = image.map_write(at(offset), data.len() as u64)? else { return Ok(None) };
        let is_alone = is_durable && map.is_durable_alone();
        let durability = if is_alone { Durability::Fua } else { Durability::Cached };
        match map.storage().write_at(map.offset(), data, durability) {
            Ok(()) => {
                map.written();
                Ok(Some(durability))
            }
            Err(error) => {
                if is_alone {
                    map.failed(&error);
                }
                Ok(None)
            }
        }
    }

    /// Bytes that tell by which operation and for which place they were written, and are not zero.
    fn new_data(&self, offset: u64, length: u64) -> Vec<u8> {
        let stamp = u64::from(self.operation) * 0x9e37_79b9 + 1;
        let mut data = Vec::with_capacity(length as usize);
        let mut position = offset;
        while position < offset + length {
            let stop = (position / SECTOR * SECTOR + SECTOR).min(offset + length);
            let byte = ((stamp ^ (position / SECTOR * 0x85eb)) % 255) as u8 + 1;
            data.resize((stop - offset) as usize, byte);
            position = stop;
        }
        data
    }

    fn sectors(offset: u64, length: u64) -> Range<usize> {
        (offset / SECTOR) as usize..(offset + length).div_ceil(SECTOR) as usize
    }

    fn sector(&self, sector: usize) -> &[u8] {
        &self.current[sector * SECTOR as usize..][..SECTOR as usize]
    }

    fn add_versions(&mut self, sectors: Range<usize>, certainty: Certainty) {
        for sector in sectors {
            let content = self.sector(sector).into();
            let version = Version { operation: self.operation, content, certainty };
            self.versions[sector].push(version);
        }
    }

    /// Notes what a range was to become, and whether that succeeded.
    fn note(
        &mut self,
        offset: u64,
        data: &[u8],
        durability: Durability,
        result: Result<()>,
    ) -> Result<()> {
        let length = data.len() as u64;
        self.current[offset as usize..(offset + length) as usize].copy_from_slice(data);
        let sectors = Self::sectors(offset, length);
        self.uncertain[sectors.clone()].fill(result.is_err());
        let certainty = match result {
            Ok(()) => Certainty::of(durability),
            Err(_) => Certainty::Possible,
        };
        self.add_versions(sectors, certainty);
        result
    }

    /// A discarded sector holds what it held, or zeroes.
    fn note_discard(
        &mut self,
        image: &Image,
        offset: u64,
        length: u64,
        durability: Durability,
        result: Result<()>,
        what: &str,
    ) -> Result<()> {
        let sectors = Self::sectors(offset, length);
        let part = offset as usize..(offset + length) as usize;
        let before = self.current[part.clone()].to_vec();
        self.current[part.clone()].fill(0);
        self.add_versions(sectors.clone(), Certainty::Possible);
        self.current[part.clone()].copy_from_slice(&before);
        let was_uncertain = self.uncertain[sectors.clone()].contains(&true);
        let mut found = vec![0xee; length as usize];
        let read = image.read_at(at(offset), &mut found);
        if result.is_err() || read.is_err() || was_uncertain {
            self.add_versions(sectors.clone(), Certainty::Possible);
            self.uncertain[sectors].fill(true);
            return result.and(read);
        }
        for (index, (new, old)) in found.chunks(64).zip(before.chunks(64)).enumerate() {
            let is_fine =
                new == old || new.iter().zip(old).all(|(new, old)| *new == 0 || new == old);
            let place = offset + index as u64 * 64;
            assert!(is_fine, "{what}: a discard left {new:?} at {place}, not {old:?}");
        }
        self.current[part].copy_from_slice(&found);
        self.add_versions(sectors, Certainty::of(durability));
        Ok(())
    }

    /// Reads uncertain sectors, now that nothing fails any more: each must hold the content it had
    /// or one that it was to get.
    pub fn settle(&mut self, image: &Image, what: &str) {
        self.operation += 1;
        for sector in 0..self.uncertain.len() {
            if !self.uncertain[sector] {
                continue;
            }
            let start = sector * SECTOR as usize;
            let mut found = vec![0xee; SECTOR as usize];
            image.read_at(at(start as u64), &mut found).unwrap();
            let versions = &self.versions[sector];
            let is_known = versions.iter().any(|version| *version.content == *found);
            assert!(is_known, "{what}: sector {sector} holds what was never written to it");
            self.current[start..start + SECTOR as usize].copy_from_slice(&found);
            self.uncertain[sector] = false;
            self.add_versions(sector..sector + 1, Certainty::Visible);
        }
    }

    fn compare(&self, offset: u64, found: &[u8], what: &str) {
        let expected = &self.current[offset as usize..offset as usize + found.len()];
        if found == expected {
            return;
        }
        for (place, (new, old)) in (offset..).zip(found.iter().zip(expected)) {
            let is_certain = !self.uncertain[(place / SECTOR) as usize];
            assert!(!is_certain || new == old, "{what}: {new} at {place}, not {old}");
        }
    }

    /// Fails unless the whole disk reads as it must.
    pub fn check(&self, image: &Image, what: &str) {
        let mut found = vec![0xee; self.current.len()];
        image.read_at(at(0), &mut found).unwrap();
        self.compare(0, &found, what);
    }

    /// Fails unless every sector holds what a crash may leave that came while operation number
    /// `operation` ran and all before it had ended.
    pub fn check_after_crash(&self, image: &Image, operation: u32, what: &str) {
        let mut found = vec![0xee; self.current.len()];
        image.read_at(at(0), &mut found).unwrap();
        self.check_bytes_after_crash(&found, operation, what);
    }

    /// As [`check_after_crash`](Self::check_after_crash), for bytes.
    pub fn check_bytes_after_crash(&self, found: &[u8], operation: u32, what: &str) {
        let flushed = self.flushes.iter().rev().find(|flush| **flush < operation).copied();
        for (sector, content) in found.chunks(SECTOR as usize).enumerate() {
            let versions = &self.versions[sector];
            let oldest = versions
                .iter()
                .rposition(|version| match version.certainty {
                    Certainty::Possible => false,
                    Certainty::Visible => version.operation <= flushed.unwrap_or(0),
                    Certainty::Durable => version.operation < operation.max(1),
                })
                .unwrap_or(0);
            let mut allowed =
                versions[oldest..].iter().filter(|version| version.operation <= operation);
            assert!(
                allowed.any(|version| *version.content == *content),
                "{what}: sector {sector} holds {:?}..., and flushed was {:?}... (flush {flushed:?})",
                &content[..4],
                &versions[oldest].content[..4],
            );
        }
    }
}
