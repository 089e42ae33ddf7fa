//! A storage that remembers what was written and synced, can fail, and can rebuild what a crash
//! would have left; and a disk model that knows what may be found afterwards.

use std::io;
use std::sync::Mutex;

use imgfmt::storage::MemoryStorage;
use imgfmt::{Durability, HostOffset, Image, Speed, Storage, ZeroMode};

use super::{Random, at, range};

/// What a disk writes at once or not at all.
const SECTOR: usize = 512;

#[derive(Clone, Debug)]
enum Operation {
    Write(u64, Vec<u8>),
    SetLength(u64),
    Sync,
}

/// Records every change.
#[derive(Debug)]
pub struct FaultStorage {
    inner: MemoryStorage,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    start: Vec<u8>,
    log: Vec<Operation>,
    calls: u64,
    failing: Option<(u64, u64, i32)>,
}

impl FaultStorage {
    pub fn new(bytes: &[u8]) -> Self {
        let state = State { start: bytes.to_vec(), ..State::default() };
        Self { inner: MemoryStorage::from_bytes(bytes), state: Mutex::new(state) }
    }

    /// Lets the calls from number `first` to `end` (excluded) fail with an error code.
    pub fn fail(&self, first: u64, end: u64, code: i32) {
        self.state.lock().unwrap().failing = Some((first, end, code));
    }

    pub fn calls(&self) -> u64 {
        self.state.lock().unwrap().calls
    }

    /// How many operations have been recorded.
    pub fn position(&self) -> usize {
        self.state.lock().unwrap().log.len()
    }

    pub fn content(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.inner.len().unwrap() as usize];
        self.inner.read_exact_at(HostOffset::new(0), &mut bytes).unwrap();
        bytes
    }

    /// The bytes that a loss of power after `position` operations could leave: everything up to the
    /// last sync, and of the rest any part of any operation.
    pub fn crash(&self, position: usize, random: &mut Random) -> Vec<u8> {
        let state = self.state.lock().unwrap();
        let log = &state.log[..position];
        let durable = log.iter().rposition(|op| matches!(op, Operation::Sync)).unwrap_or(0);
        let mut bytes = state.start.clone();
        // A length change is metadata of the file system, which keeps it in order.
        let loss = random.below(4);
        for (index, operation) in log.iter().enumerate() {
            match operation {
                Operation::Sync => {}
                Operation::SetLength(length) => bytes.resize(*length as usize, 0),
                Operation::Write(offset, data) => {
                    let end = *offset as usize + data.len();
                    if bytes.len() < end {
                        bytes.resize(end, 0);
                    }
                    for (i, sector) in data.chunks(SECTOR).enumerate() {
                        let lost = match loss {
                            _ if index < durable => false,
                            0 => false,
                            1 => true,
                            2 => random.below(2) == 0,
                            _ => random.below(8) == 0,
                        };
                        if !lost {
                            let start = *offset as usize + i * SECTOR;
                            bytes[start..start + sector.len()].copy_from_slice(sector);
                        }
                    }
                }
            }
        }
        bytes
    }

    fn call(&self, operation: Option<Operation>) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        let number = state.calls;
        state.calls += 1;
        if let Some((first, end, code)) = state.failing
            && (first..end).contains(&number)
        {
            return Err(io::Error::from_raw_os_error(code));
        }
        state.log.extend(operation);
        Ok(())
    }
}

impl Storage for FaultStorage {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        self.call(None)?;
        self.inner.read_at(offset, buffer)
    }

    fn write_at(&self, offset: HostOffset, data: &[u8], durability: Durability) -> io::Result<()> {
        assert_eq!(durability, Durability::Cached, "the engine syncs by itself");
        self.call(Some(Operation::Write(offset.bytes(), data.to_vec())))?;
        self.inner.write_at(offset, data, durability)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.call(Some(Operation::SetLength(length)))?;
        self.inner.set_len(length)
    }

    fn punch_hole(&self, offset: HostOffset, length: u64) -> io::Result<()> {
        self.call(Some(Operation::Write(offset.bytes(), vec![0; length as usize])))?;
        self.inner.punch_hole(offset, length)
    }

    fn sync(&self) -> io::Result<()> {
        self.call(Some(Operation::Sync))
    }
}

/// What each sector of a disk may hold: a number for every write, 0 for zeroes.
#[derive(Clone)]
pub struct SectorModel {
    /// The first is what the last flush made durable, the others came later.
    pub allowed: Vec<Vec<u32>>,
    /// Sectors of which a failed operation left it open what they hold.
    uncertain: Vec<bool>,
    next: u32,
}

impl SectorModel {
    pub fn new(size: u64) -> Self {
        let sectors = size as usize / SECTOR;
        Self { allowed: vec![vec![0]; sectors], uncertain: vec![false; sectors], next: 1 }
    }

    fn add(&mut self, first: u64, count: u64, value: u32) {
        for sector in first..first + count {
            self.allowed[sector as usize].push(value);
        }
    }

    /// Everything written before is durable.
    pub fn flushed(&mut self) {
        for (allowed, uncertain) in self.allowed.iter_mut().zip(&self.uncertain) {
            if !uncertain {
                allowed.drain(..allowed.len() - 1);
            }
        }
    }

    /// One random operation on the image; whether it succeeded. A failed one may have done its work
    /// or not, in any part.
    pub fn step(&mut self, image: &Image, random: &mut Random) -> imgfmt::Result<()> {
        let sectors = self.allowed.len() as u64;
        let first = random.below(sectors);
        let count = (random.below(80) + 1).min(sectors - first);
        let place = range(first * SECTOR as u64, count * SECTOR as u64);
        let cached = Durability::Cached;
        match random.below(10) {
            0..=5 => {
                let value = self.next;
                self.next += 1;
                let data = value.to_be_bytes().repeat(count as usize * SECTOR / 4);
                let result = image.write_at(at(first * SECTOR as u64), &data, cached);
                self.settle(first, count, value, result)
            }
            6 | 7 => {
                let mode = [ZeroMode::MayUnmap, ZeroMode::KeepAllocated][random.below(2) as usize];
                let result = image.write_zeroes(place, mode, Speed::Any, cached);
                self.settle(first, count, 0, result)
            }
            8 => {
                // A discard may do nothing for some sectors.
                self.uncertain[first as usize..(first + count) as usize].fill(true);
                self.add(first, count, 0);
                image.discard(place, cached)?;
                self.look(image, first, count)
            }
            _ => {
                image.flush()?;
                self.flushed();
                Ok(())
            }
        }
    }

    fn settle(
        &mut self,
        first: u64,
        count: u64,
        value: u32,
        result: imgfmt::Result<()>,
    ) -> imgfmt::Result<()> {
        self.add(first, count, value);
        self.uncertain[first as usize..(first + count) as usize].fill(result.is_err());
        result
    }

    /// Learns what sectors hold now, where more than one value is possible.
    fn look(&mut self, image: &Image, first: u64, count: u64) -> imgfmt::Result<()> {
        let mut bytes = vec![0; count as usize * SECTOR];
        image.read_at(at(first * SECTOR as u64), &mut bytes)?;
        for (sector, bytes) in (first as usize..).zip(bytes.chunks(SECTOR)) {
            let value = u32::from_be_bytes(bytes[..4].try_into().unwrap());
            assert!(self.allowed[sector].contains(&value), "sector {sector} holds {value}");
            self.allowed[sector].push(value);
            self.uncertain[sector] = false;
        }
        Ok(())
    }

    /// Takes what every sector holds now for the truth.
    pub fn pin(&mut self, image: &Image) {
        self.look(image, 0, self.allowed.len() as u64).unwrap();
        self.flushed();
    }

    /// Fails unless every sector holds something that it may hold.
    pub fn check(&self, image: &Image, what: &str) {
        let mut bytes = vec![0; self.allowed.len() * SECTOR];
        image.read_at(at(0), &mut bytes).unwrap();
        for (sector, bytes) in bytes.chunks(SECTOR).enumerate() {
            let value = u32::from_be_bytes(bytes[..4].try_into().unwrap());
            assert!(
                bytes.chunks(4).all(|word| word == &bytes[..4]),
                "{what}: sector {sector} is torn"
            );
            let allowed = &self.allowed[sector];
            assert!(
                allowed.contains(&value),
                "{what}: sector {sector} holds {value}, allowed are {allowed:?}"
            );
        }
    }
}
