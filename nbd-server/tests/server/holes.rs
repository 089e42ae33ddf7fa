//! Reads of what is known to be zero: holes on the wire where they can be, zeroes elsewhere.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use imgfmt::{Access, CreateOptions, Format, Image, OpenOptions};
use nbd_proto::transmission::{Command, Durability, Fragmentation};
use nbd_proto::wire::{AllocationFlags, MetaContextName, ReplyMode};
use nbd_server::export::{Export, ImageExport, MemoryExport};
use tempfile::NamedTempFile;

use crate::support::{Client, MODES, Random, TestServer, disk_file, image_export, skip};

const READ: Command = Command::Read(Fragmentation::Allowed);
const WHOLE: Command = Command::Read(Fragmentation::Forbidden);
const CHUNKED: [ReplyMode; 2] = [ReplyMode::Structured, ReplyMode::Extended];
const KIB: u64 = 1024;
const MIB: u64 = 1 << 20;

/// A file of that size, all hole but for data at the given places, unless there are no holes here.
fn sparse_file(size: u64, data: &[(u64, Vec<u8>)]) -> Option<NamedTempFile> {
    let file = disk_file(&[]);
    file.as_file().set_len(size).unwrap();
    for (offset, bytes) in data {
        file.as_file().write_all_at(bytes, *offset).unwrap();
    }
    let hole = rustix::fs::seek(file.as_file(), rustix::fs::SeekFrom::Hole(0));
    if hole.is_ok_and(|hole| hole < size) {
        return Some(file);
    }
    skip("the file system of the temporary directory has no holes");
    None
}

#[test]
fn holes_of_a_disk_in_memory_are_sent_as_holes_and_with_df_as_data() {
    let disk = MemoryExport::new(64 * MIB);
    disk.write_at(64 * KIB, &[7; 64 << 10], Durability::Cached).unwrap();
    let server = TestServer::of(disk);
    for mode in CHUNKED {
        let mut client = Client::connect(&server, mode);
        let outcome = client.request(0, 256 * KIB, &READ);
        assert_eq!(outcome.result, Ok(()));
        assert_eq!(outcome.holes, [(0, 64 << 10), (128 << 10, 128 << 10)]);
        assert_eq!(outcome.parts.len(), 3);
        assert!(outcome.data[64 << 10..128 << 10].iter().all(|byte| *byte == 7));
        let whole = client.request(0, 256 * KIB, &WHOLE);
        assert_eq!((whole.parts, whole.holes), (vec![(0, 256 << 10)], vec![]));
        assert!(whole.data == outcome.data);
        // The longest read there is.
        assert_eq!(client.request(MIB, 32 * MIB, &READ).holes, [(0, 32 << 20)]);
    }
    let mut simple = Client::connect(&server, ReplyMode::Simple);
    let outcome = simple.request(0, 256 * KIB, &READ);
    assert_eq!((outcome.parts, outcome.holes), (vec![(0, 256 << 10)], vec![]));
    assert_eq!(outcome.data[(64 << 10) - 1..][..2], [0, 7]);
}

#[test]
fn small_reads_send_holes_of_any_length() {
    let disk = MemoryExport::new(MIB);
    disk.write_at(64 * KIB, &[7; 64 << 10], Durability::Cached).unwrap();
    let server = TestServer::of(disk);
    for mode in CHUNKED {
        let mut client = Client::connect(&server, mode);
        assert_eq!(client.request(512, 512, &READ).holes, [(0, 512)]);
        let edge = client.request(64 * KIB - 100, 200, &READ);
        assert_eq!((edge.parts, edge.holes), (vec![(0, 100), (100, 100)], vec![(0, 100)]));
        assert!(edge.data[..100] == [0; 100] && edge.data[100..] == [7; 100]);
        assert_eq!(client.request(64 * KIB, 4096, &READ).holes, []);
    }
}

#[test]
fn a_sparse_raw_file_shows_its_holes_and_what_changes_them() {
    let content = vec![(MIB, vec![7; 1 << 20]), (3 * MIB, vec![0; 64 << 10])];
    let Some(file) = sparse_file(8 * MIB, &content) else { return };
    let server = TestServer::of(image_export(file.path()));
    for mode in CHUNKED {
        let mut client = Client::connect(&server, mode);
        // Again and again: what is remembered must say the same as what is found.
        for _ in 0..3 {
            let outcome = client.request(0, 4 * MIB, &READ);
            // Zeroes that were written are data: nobody looks for them.
            let holes = [(0, 1 << 20), (2 << 20, 1 << 20), ((3 << 20) + (64 << 10), 960 << 10)];
            assert_eq!(outcome.holes, holes);
            assert!(outcome.data[1 << 20..2 << 20].iter().all(|byte| *byte == 7));
            assert_eq!(client.request(4096, 4096, &READ).holes, [(0, 4096)]);
            assert_eq!(client.request(3 * MIB, 4096, &READ).holes, []);
            assert_eq!(client.request(MIB, 4096, &READ).holes, []);
            assert_eq!(client.request(MIB, MIB, &READ).parts, [(0, 1 << 20)]);
            assert_eq!(client.request(0, 4 * MIB, &WHOLE).parts, [(0, 4 << 20)]);
        }
        client.write(5 * MIB, &[1; 64 << 10]).unwrap();
        assert_eq!(client.request(5 * MIB, 64 * KIB, &READ).holes, []);
        let trim = Command::Trim(Durability::Cached);
        assert_eq!(client.request(5 * MIB, 64 * KIB, &trim).result, Ok(()));
        assert_eq!(client.request(5 * MIB, 64 * KIB, &READ).holes, [(0, 64 << 10)]);
        assert_eq!(client.request(5 * MIB, 4096, &READ).holes, [(0, 4096)]);
    }
}

#[test]
fn a_hole_that_another_process_fills_is_not_a_hole_any_more() {
    let Some(file) = sparse_file(8 * MIB, &[]) else { return };
    let server = TestServer::of(image_export(file.path()));
    let mut client = Client::connect(&server, MODES[1]);
    for length in [4096, MIB] {
        assert_eq!(client.request(2 * MIB, length, &READ).holes, [(0, length as usize)]);
    }
    File::options()
        .write(true)
        .open(file.path())
        .unwrap()
        .write_all_at(&[7; 4096], 2 * MIB)
        .unwrap();
    assert_eq!(client.read(2 * MIB, 4096), [7; 4096]);
    let outcome = client.request(2 * MIB, MIB, &READ);
    assert_eq!(outcome.holes, [(4096, (1 << 20) - 4096)]);
    assert!(outcome.data[..4096] == [7; 4096]);
}

#[test]
fn a_full_raw_file_becomes_sparse_when_a_client_trims_it() {
    let file = disk_file(&vec![7; 4 << 20]);
    if sparse_file(MIB, &[]).is_none() {
        return;
    }
    let server = TestServer::of(image_export(file.path()));
    let mut client = Client::connect(&server, MODES[2]);
    let full = client.request(0, 4 * MIB, &READ);
    assert!(full.holes.is_empty() && full.data == vec![7; 4 << 20]);
    let trim = Command::Trim(Durability::Cached);
    assert_eq!(client.request(MIB, MIB, &trim).result, Ok(()));
    let outcome = client.request(0, 4 * MIB, &READ);
    assert_eq!(outcome.holes, [(1 << 20, 1 << 20)]);
    let sent: usize = outcome.parts.iter().map(|part| part.1).sum();
    assert_eq!(sent, 4 << 20);
}

/// A chain of qcow2 images over a sparse raw file, with a few random changes in each layer.
fn random_chain(directory: &Path, random: &mut Random) -> Image {
    let size = 4 * MIB + 512 * random.below(100);
    let base = directory.join("base.raw");
    let file = File::create(&base).unwrap();
    file.set_len(size - 512 * random.below(3000)).unwrap();
    for _ in 0..random.below(10) {
        let data = random.bytes(100_000);
        file.write_all_at(&data, random.below(2 * MIB)).unwrap();
    }
    let mut below = ("base.raw".to_owned(), Format::Raw);
    for number in 0..random.below(4) {
        let name = format!("layer{number}.qcow2");
        let mut create = CreateOptions::overlay(&below.0, below.1);
        create.size = Some(size);
        create.cluster_size = 1 << (9 + random.below(9));
        Image::create(directory.join(&name), &create).unwrap();
        below = (name, Format::Qcow2);
        let path = directory.join(&below.0);
        let options = OpenOptions::new().format(below.1).access(Access::ReadWrite);
        change(&Image::open(&path, &options).unwrap(), random);
    }
    let options = OpenOptions::new().format(below.1).access(Access::ReadWrite);
    Image::open(directory.join(&below.0), &options).unwrap()
}

fn change(image: &Image, random: &mut Random) {
    for _ in 0..random.below(20) {
        let length = 1 + random.below(200 * KIB);
        let offset = random.below(image.size() - length);
        let range = imgfmt::GuestRange::new(imgfmt::GuestOffset::new(offset), length).unwrap();
        let how = imgfmt::Durability::Cached;
        if random.below(3) > 0 {
            let data = random.bytes(length as usize);
            image.write_at(range.offset(), &data, how).unwrap();
        } else {
            let (mode, speed) = (imgfmt::ZeroMode::MayUnmap, imgfmt::Speed::Any);
            image.write_zeroes(range, mode, speed, how).unwrap();
        }
    }
}

#[test]
fn over_random_chains_those_pages_are_holes_that_block_status_calls_zero() {
    let mut random = Random::new();
    for round in 0..8 {
        let directory = tempfile::tempdir().unwrap();
        let image = random_chain(directory.path(), &mut random);
        let size = image.size();
        let server = TestServer::of(ImageExport::new(image));
        let allocation = MetaContextName::base_allocation();
        let mut client = Client::open(&server, CHUNKED[round % 2], "", &[allocation]);
        let mut whole = Client::connect(&server, ReplyMode::Simple);
        for _ in 0..40 {
            let longest = [100, 10_000, 300_000, 3_000_000][random.below(4) as usize];
            let length = 1 + random.below(longest).min(size / 2);
            let offset = random.below(size - length);
            let outcome = client.request(offset, length, &READ);
            assert_eq!(outcome.result, Ok(()));
            assert!(outcome.data == whole.read(offset, length), "{length} at {offset}");
            let zeroes = zeroes_by_status(&mut client, offset, length);
            let mut holes = vec![false; length as usize];
            for (start, length) in &outcome.holes {
                holes[*start as usize..][..*length].fill(true);
            }
            let wrong = holes.iter().zip(&zeroes).position(|(hole, zero)| *hole && !zero);
            assert_eq!(wrong, None, "{length} at {offset}, round {round}");
            // A part of a page may come as data.
            let missed = holes.iter().zip(&zeroes).map(|(hole, zero)| *zero && !hole);
            let missed: Vec<bool> = missed.collect();
            let longest = missed.split(|missed| !missed).map(<[bool]>::len).max();
            assert!(longest < Some(4096), "{longest:?} of {length} at {offset}, round {round}");
            assert_eq!(client.request(offset, length, &WHOLE).parts, [(0, length as usize)]);
        }
    }
}

/// For each byte of a range whether BLOCK_STATUS says that it reads as zero.
fn zeroes_by_status(client: &mut Client, offset: u64, length: u64) -> Vec<bool> {
    let mut zeroes = Vec::new();
    while (zeroes.len() as u64) < length {
        let (at, left) = (offset + zeroes.len() as u64, length - zeroes.len() as u64);
        let limit = nbd_proto::transmission::ExtentLimit::Many;
        let outcome = client.request(at, left, &Command::BlockStatus(limit, None));
        for extent in &outcome.statuses[0].1 {
            let is_zero = extent.flags & AllocationFlags::STATE_ZERO.bits() != 0;
            let end = (zeroes.len() as u64 + extent.length).min(length);
            zeroes.resize(end as usize, is_zero);
        }
    }
    zeroes
}
