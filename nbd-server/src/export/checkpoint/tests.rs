use std::sync::atomic::AtomicU64;
use std::sync::mpsc;
use std::time::Duration;

use nbd_proto::wire::{Errno, MetaContextName};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use super::*;
use crate::export::{
    Content, ExportInfo, FastExport, Holes, Lookup, Mapped, MemoryExport, ReadMap, TryRead,
};

const SIZE: u64 = 4 << 20;
const LIMIT: Duration = Duration::from_secs(60);

fn file() -> File {
    tempfile::tempfile().unwrap()
}

fn begin(disk: &Checkpointed) -> PointInTimeView {
    disk.begin(file(), LIMIT, || Ok::<_, String>(())).unwrap()
}

/// A disk in which every byte tells its place.
fn disk() -> (Checkpointed, Vec<u8>) {
    let disk = Checkpointed::new(Arc::new(MemoryExport::new(SIZE)));
    let content: Vec<u8> = (0..SIZE).map(|at| (at / 251 + at / 4096) as u8 | 1).collect();
    disk.write_at(0, &content, Durability::Cached).unwrap();
    (disk, content)
}

fn read(export: &dyn Export) -> Vec<u8> {
    let mut buffer = vec![0; SIZE as usize];
    export.read_at(0, &mut buffer).unwrap();
    buffer
}

#[test]
fn every_kind_of_change_leaves_the_view_as_it_was() {
    let (disk, content) = disk();
    let view = begin(&disk);
    disk.write_at(1000, &[0xee; 10_000], Durability::Cached).unwrap();
    disk.write_at(4095, &[0xdd; 2], Durability::Fua).unwrap();
    assert_eq!(disk.try_write_at(100_000, &[0xcc; 512]).unwrap(), TryWrite::Complete);
    disk.trim(1 << 20, 1 << 20, Durability::Cached).unwrap();
    let (mode, speed) = (ZeroMode::MayUnmap, Speed::Any);
    disk.write_zeroes((3 << 20) - 77, (1 << 20) + 77, mode, speed, Durability::Cached).unwrap();
    assert!(read(&view) == content);
    assert!(read(&disk)[100_000..100_512] == [0xcc; 512]);
    let mut part = vec![0; 5000];
    view.read_at(3000, &mut part).unwrap();
    assert!(part == content[3000..8000]);
}

#[test]
fn a_view_that_has_ended_fails_and_changes_cost_nothing_more() {
    let (disk, _) = disk();
    let view = begin(&disk);
    let second = disk.begin(file(), LIMIT, || Ok::<_, String>(()));
    assert!(matches!(second, Err(CheckpointError::InProgress)));
    assert!(disk.end());
    assert!(!disk.end(), "it has ended already");
    disk.write_at(0, &[9; 4096], Durability::Cached).unwrap();
    assert_eq!(view.read_at(0, &mut [0; 10]).unwrap_err().errno, Errno::EIO);
    assert_eq!(view.try_read_at(0, &mut [0; 10], Holes::Told).unwrap_err().errno, Errno::EIO);
    let write = Operation::Write(4096, Durability::Cached);
    assert_eq!(disk.may_block(write), disk.disk().may_block(write));
    let again = begin(&disk);
    assert_eq!(read(&again)[..4096], [9; 4096]);
}

#[test]
fn what_cannot_be_set_aside_costs_the_view_and_not_the_write() {
    let (disk, _) = disk();
    let sealed = memfd_create("sealed", MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&sealed, SIZE).unwrap();
    fcntl_add_seals(&sealed, SealFlags::WRITE).unwrap();
    let view = disk.begin(File::from(sealed), LIMIT, || Ok::<_, String>(())).unwrap();
    assert_eq!(disk.failure(), Some(None));
    // What is short is collected in memory before it is written.
    disk.write_at(0, &[9; 4096], Durability::Cached).unwrap();
    assert_eq!(disk.failure(), Some(None));
    disk.write_at(0, &[9; 65536], Durability::Cached).unwrap();
    assert_eq!(read(&disk)[..65536], [9; 65536]);
    assert_eq!(view.read_at(1 << 20, &mut [0; 10]).unwrap_err().errno, Errno::EIO);
    assert!(disk.failure().unwrap().unwrap().contains("cannot copy overwritten data"));
    disk.end();
    assert_eq!(disk.failure(), None);
}

#[test]
fn a_failure_at_the_moment_of_the_checkpoint_leaves_none() {
    let (disk, _) = disk();
    let failed = disk.begin(file(), LIMIT, || Err("no bitmap"));
    assert_eq!(failed.unwrap_err().to_string(), "no bitmap");
    assert_eq!(disk.failure(), None);
    begin(&disk);
}

#[test]
fn allocation_of_the_view_is_that_of_the_old_disk() {
    let disk = Checkpointed::new(Arc::new(MemoryExport::new(64 << 20)));
    disk.write_at(1 << 20, &[1; 65536], Durability::Cached).unwrap();
    let view = begin(&disk);
    let zero = |export: &dyn Export, offset: u64| {
        let context = MetaContextName::base_allocation();
        let found = export.block_status(&context, offset, (64 << 20) - offset, 100).unwrap();
        found.first().unwrap().flags & 2 != 0
    };
    assert!(zero(&view, 0) && !zero(&view, 1 << 20) && zero(&view, 2 << 20));
    disk.trim(1 << 20, 65536, Durability::Cached).unwrap();
    assert!(zero(&disk, 1 << 20) && !zero(&view, 1 << 20));
}

/// Lets a write begin, and finish when it is told to.
struct Slow {
    disk: MemoryExport,
    begun: Mutex<mpsc::Sender<()>>,
    finish: Mutex<mpsc::Receiver<()>>,
}

impl Export for Slow {
    fn info(&self) -> ExportInfo {
        self.disk.info()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        self.disk.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, data: &[u8], how: Durability) -> Result<(), ExportError> {
        let (first, second) = data.split_at(data.len() / 2);
        self.disk.write_at(offset, first, how)?;
        self.begun.lock().unwrap().send(()).unwrap();
        self.finish.lock().unwrap().recv().unwrap();
        self.disk.write_at(offset + first.len() as u64, second, how)
    }
}

/// A slow disk, what tells that a write has begun, and what lets one finish.
fn slow() -> (Checkpointed, mpsc::Receiver<()>, mpsc::Sender<()>) {
    let (begun_sender, begun) = mpsc::channel();
    let (finish, finish_receiver) = mpsc::channel();
    let disk = Checkpointed::new(Arc::new(Slow {
        disk: MemoryExport::new(SIZE),
        begun: begun_sender.into(),
        finish: finish_receiver.into(),
    }));
    (disk, begun, finish)
}

#[test]
fn the_moment_is_never_in_the_middle_of_a_write() {
    let (disk, begun, finish) = slow();
    std::thread::scope(|scope| {
        scope.spawn(|| disk.write_at(0, &[7; 8192], Durability::Cached).unwrap());
        begun.recv().unwrap();
        let (switched, moment) = mpsc::channel();
        let disk = &disk;
        let beginning = scope.spawn(move || {
            disk.begin(file(), LIMIT, || switched.send(()).map_err(|_| "nobody waits")).unwrap()
        });
        // That nothing happens can only be waited for; a moment too early would be seen here.
        assert!(moment.recv_timeout(Duration::from_millis(50)).is_err());
        finish.send(()).unwrap();
        let view = beginning.join().unwrap();
        moment.recv().unwrap();
        let mut found = vec![0; 8192];
        view.read_at(0, &mut found).unwrap();
        assert_eq!(found, [7; 8192]);
    });
}

#[test]
fn a_checkpoint_that_waits_too_long_for_a_write_is_given_up_and_writes_go_on() {
    let (disk, begun, finish) = slow();
    std::thread::scope(|scope| {
        scope.spawn(|| disk.write_at(0, &[7; 8192], Durability::Cached).unwrap());
        begun.recv().unwrap();
        let limit = Duration::from_millis(20);
        let failed = disk.begin(file(), limit, || Err("the moment has come"));
        assert!(matches!(failed, Err(CheckpointError::Busy(_))), "{failed:?}");
        assert_eq!((disk.failure(), disk.end()), (None, false));
        let write = Operation::Write(8192, Durability::Cached);
        assert_eq!(disk.may_block(write), disk.disk().may_block(write));
        // The other one still hangs.
        scope.spawn(|| disk.write_at(8192, &[8; 8192], Durability::Cached).unwrap());
        begun.recv().unwrap();
        finish.send(()).unwrap();
        finish.send(()).unwrap();
    });
    begin(&disk);
}

#[test]
fn a_checkpoint_is_looked_at_and_ended_while_a_write_hangs() {
    let (disk, begun, finish) = slow();
    let view = begin(&disk);
    std::thread::scope(|scope| {
        scope.spawn(|| disk.write_at(0, &[7; 8192], Durability::Cached).unwrap());
        begun.recv().unwrap();
        assert_eq!(disk.failure(), Some(None));
        assert!(disk.end());
        assert_eq!(view.read_at(0, &mut [0; 10]).unwrap_err().errno, Errno::EIO);
        finish.send(()).unwrap();
    });
}

/// What the map of a view calls zero was zero at the checkpoint.
fn check_map(view: &PointInTimeView, before: &[u8], offset: usize, length: usize) {
    let mut map = ReadMap::new();
    let mapped = view.map_read(offset as u64, length, Holes::Told, Lookup::CachedOnly, &mut map);
    assert_eq!((mapped.unwrap(), map.len()), (Mapped::Complete, length));
    let mut at = offset;
    for part in map.segments() {
        let was_zero = before[at..at + part.length].iter().all(|byte| *byte == 0);
        assert!(was_zero || !matches!(part.content, Content::Zero), "{at} {}", part.length);
        at += part.length;
    }
}

#[test]
fn readers_of_the_view_see_no_write_of_many_threads() {
    let (disk, content) = disk();
    let seed = std::process::id().into();
    println!("seed {seed}");
    for round in 0..5 {
        let before = if round == 0 { content.clone() } else { read(&disk) };
        let view = begin(&disk);
        let state = AtomicU64::new(seed);
        let random = |below: u64| {
            let mut next = state.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
            next = (next ^ next >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            next = (next ^ next >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            (next ^ next >> 31) % below
        };
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        // Short parts and long ones are kept in different ways.
                        let length = 1 + random([20_000, 100_000][random(2) as usize]);
                        let offset = random(SIZE - length);
                        let data = vec![random(256) as u8; length as usize];
                        match random(3) {
                            0 => disk.write_at(offset, &data, Durability::Cached).unwrap(),
                            1 => disk.trim(offset, length, Durability::Cached).unwrap(),
                            _ => {
                                if disk.try_write_at(offset, &data).unwrap() != TryWrite::Complete {
                                    disk.write_at(offset, &data, Durability::Cached).unwrap();
                                }
                            }
                        }
                    }
                });
            }
            scope.spawn(|| {
                for _ in 0..200 {
                    let length = 1 + random(50_000);
                    let offset = random(SIZE - length);
                    let mut found = vec![0; length as usize];
                    if random(2) == 0
                        || view.try_read_at(offset, &mut found, Holes::AsData).unwrap()
                            == TryRead::WouldBlock
                    {
                        view.read_at(offset, &mut found).unwrap();
                    }
                    let at = offset as usize;
                    assert!(found == before[at..at + found.len()], "{length} at {offset}");
                    check_map(&view, &before, at, found.len());
                }
            });
        });
        assert!(read(&view) == before);
        assert!(disk.end());
    }
}
