//! Exports that can tell what they consist of, cannot, lie about it, or take time to find out.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nbd_proto::transmission::{Command, Fragmentation};
use nbd_proto::wire::{Errno, ReplyMode};
use nbd_server::export::{
    Export, ExportError, ExportInfo, FastExport, Holes, Lookup, Mapped, ReadMap, TryRead,
};

use crate::support::{Client, TestServer};

const READ: Command = Command::Read(Fragmentation::Allowed);
const WHOLE: Command = Command::Read(Fragmentation::Forbidden);
const CHUNKED: [ReplyMode; 2] = [ReplyMode::Structured, ReplyMode::Extended];
const KIB: u64 = 1024;
const MIB: u64 = 1 << 20;

/// Holes and data by turns of 64 KiB, with a bad sector. What can be told where it stands is.
struct Striped {
    bad: u64,
    /// What it knows without waiting.
    known: Mapped,
}

impl Export for Striped {
    fn info(&self) -> ExportInfo {
        ExportInfo::new(4 * MIB)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        if (offset..offset + buffer.len() as u64).contains(&self.bad) {
            return Err(ExportError::new(Errno::EIO, "a bad sector"));
        }
        for (at, byte) in (offset..).zip(buffer) {
            *byte = (at / (64 * KIB) % 2) as u8;
        }
        Ok(())
    }

    fn fast(&self) -> Option<&dyn FastExport> {
        Some(self)
    }
}

impl FastExport for Striped {
    fn try_read_at(
        &self,
        at: u64,
        buffer: &mut [u8],
        holes: Holes,
    ) -> Result<TryRead, ExportError> {
        match holes {
            Holes::Told => Ok(TryRead::Sparse),
            Holes::AsData => self.read_at(at, buffer).map(|()| TryRead::Complete),
        }
    }

    fn map_read(
        &self,
        offset: u64,
        length: usize,
        _: Holes,
        lookup: Lookup,
        map: &mut ReadMap,
    ) -> Result<Mapped, ExportError> {
        if lookup == Lookup::CachedOnly && self.known != Mapped::Complete {
            return Ok(self.known);
        }
        let end = offset + length as u64;
        let mut at = offset;
        while at < end {
            let stop = end.min((at / (64 * KIB) + 1) * 64 * KIB);
            match at / (64 * KIB) % 2 {
                0 => map.push_zero((stop - at) as usize),
                _ => map.push_export((stop - at) as usize),
            }
            at = stop;
        }
        Ok(Mapped::Complete)
    }
}

#[test]
fn a_bad_sector_behind_holes_costs_what_follows_and_nothing_in_front() {
    let bad = 7 * 64 * KIB + 8192;
    let known = [Mapped::Complete, Mapped::WouldBlock, Mapped::HolesUnknown];
    for (mode, known) in CHUNKED.into_iter().flat_map(|mode| known.map(|known| (mode, known))) {
        let server = TestServer::of(Striped { bad, known });
        let mut client = Client::connect(&server, mode);
        let outcome = client.request(512, MIB, &READ);
        let error = outcome.result.unwrap_err();
        assert_eq!((error.errno, error.offset), (Errno::EIO, Some(bad)));
        assert_eq!(outcome.holes.len(), 4, "{mode:?} {known:?}");
        let end: usize = outcome.parts.iter().map(|(_, length)| length).sum();
        assert_eq!(end as u64 + 512, bad, "everything in front of it is answered");
        for (at, byte) in outcome.data[..end].iter().enumerate() {
            assert_eq!(u64::from(*byte), (at as u64 + 512) / (64 * KIB) % 2, "{at}");
        }
        assert_eq!(client.request(512, MIB, &WHOLE).result.unwrap_err().errno, Errno::EIO);
        assert_eq!(client.read(64 * KIB, 3), [1; 3], "the connection lives");
    }
}

/// Tells nothing but lies about what it consists of.
struct Liar;

impl Export for Liar {
    fn info(&self) -> ExportInfo {
        ExportInfo::new(MIB)
    }

    fn read_at(&self, _: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        buffer.fill(b'r');
        Ok(())
    }

    fn fast(&self) -> Option<&dyn FastExport> {
        Some(self)
    }
}

impl FastExport for Liar {
    fn map_read(
        &self,
        offset: u64,
        length: usize,
        _: Holes,
        _: Lookup,
        map: &mut ReadMap,
    ) -> Result<Mapped, ExportError> {
        match offset {
            0 => map.push_zero(length + 1),
            1 => map.push_zero(length - 1),
            2 => {}
            3 => panic!("an export that panics"),
            _ => return Err(ExportError::new(Errno::EIO, "it cannot be told")),
        }
        Ok(Mapped::Complete)
    }
}

#[test]
fn an_export_that_cannot_tell_what_it_consists_of_is_read() {
    let server = TestServer::with(Default::default(), Arc::new(Liar));
    let mut client = Client::connect(&server, CHUNKED[0]);
    for offset in [0, 1, 2, 4] {
        for length in [100_usize, 100_000] {
            assert!(client.read(offset, length as u64) == vec![b'r'; length], "{offset}");
        }
    }
    assert_eq!(client.request(3, 100_000, &READ).result.unwrap_err().errno, Errno::EIO);
    assert_eq!(client.read(0, 1), [b'r']);
}

/// All hole, which takes a little work to find out.
#[derive(Default)]
struct SlowlyFoundHole {
    lookups: AtomicUsize,
    most: AtomicUsize,
}

impl Export for SlowlyFoundHole {
    fn info(&self) -> ExportInfo {
        ExportInfo::new(64 * MIB)
    }

    fn read_at(&self, _: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        buffer.fill(0);
        Ok(())
    }

    fn fast(&self) -> Option<&dyn FastExport> {
        Some(self)
    }
}

impl FastExport for SlowlyFoundHole {
    fn map_read(
        &self,
        _: u64,
        length: usize,
        _: Holes,
        lookup: Lookup,
        map: &mut ReadMap,
    ) -> Result<Mapped, ExportError> {
        if lookup == Lookup::CachedOnly {
            return Ok(Mapped::HolesUnknown);
        }
        let lookups = self.lookups.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(lookups, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(2));
        self.lookups.fetch_sub(1, Ordering::SeqCst);
        map.push_zero(length);
        Ok(Mapped::Complete)
    }
}

/// A flood of such reads had 32 threads look for holes at a time, and the clients of two processors
/// waited for all of them.
#[test]
fn a_flood_of_reads_of_a_sparse_file_looks_for_holes_on_few_threads() {
    let cores = std::thread::available_parallelism().unwrap().get();
    let export = Arc::new(SlowlyFoundHole::default());
    let server = TestServer::with(Default::default(), Arc::clone(&export) as _);
    std::thread::scope(|scope| {
        for number in 0..cores + 14 {
            let server = &server;
            scope.spawn(move || {
                let mut client = Client::connect(server, CHUNKED[number % 2]);
                for length in [4 * KIB, 64 * KIB, MIB, 8 * MIB] {
                    let outcome = client.request(number as u64 % 16 * MIB, length, &READ);
                    assert_eq!(outcome.holes, [(0, length as usize)]);
                }
            });
        }
    });
    let most = export.most.load(Ordering::SeqCst);
    assert!((1..=cores).contains(&most), "{most} threads at a time");
}
