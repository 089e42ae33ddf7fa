//! BLOCK_STATUS, from the contexts a client selects to the chunks it gets.

use std::fs::File;
use std::os::unix::fs::FileExt;

use nbd_proto::transmission::{Command, ExtentLimit};
use nbd_proto::wire::{BlockDescriptor, MetaContextId, MetaContextName, ReplyMode};
use tempfile::NamedTempFile;

use crate::support::{Client, Script, Scripted, TestServer, allocated_bytes, image_export, skip};

const GIB: u64 = 1 << 30;
const SIZE: u64 = 5 * GIB;
const HOLE: u64 = 3;

/// 5 GiB with 1 MiB of data at the start, at 2 GiB and at the end. `None` if the file system has no
/// holes.
fn sparse_file() -> Option<NamedTempFile> {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(SIZE).unwrap();
    let opened = File::options().write(true).open(file.path()).unwrap();
    for offset in [0, 2 * GIB, SIZE - (1 << 20)] {
        opened.write_all_at(&vec![1; 1 << 20], offset).unwrap();
    }
    opened.sync_all().unwrap();
    if allocated_bytes(file.path()) > GIB {
        skip("the file system of the temporary directory has no holes");
        return None;
    }
    Some(file)
}

const fn status(limit: ExtentLimit) -> Command {
    Command::BlockStatus(limit, None)
}

fn pairs(descriptors: &[BlockDescriptor]) -> Vec<(u64, u64)> {
    descriptors.iter().map(|descriptor| (descriptor.length, descriptor.flags)).collect()
}

const MIB: u64 = 1 << 20;

#[test]
fn a_large_sparse_disk_is_told_whole_in_extended_mode_and_piece_by_piece_in_structured() {
    let Some(file) = sparse_file() else { return };
    let server = TestServer::of(image_export(file.path()));
    let contexts = [MetaContextName::base_allocation(), MetaContextName::qemu_allocation_depth()];

    let mut client = Client::open(&server, ReplyMode::Extended, "", &contexts);
    let outcome = client.request(0, SIZE, &status(ExtentLimit::Many));
    assert_eq!(outcome.result, Ok(()));
    let [(_, allocation), (_, depth)] = &outcome.statuses[..] else {
        panic!("two contexts: {:?}", outcome.statuses)
    };
    let expected = [(MIB, 0), (2 * GIB - MIB, HOLE), (MIB, 0), (3 * GIB - 2 * MIB, HOLE), (MIB, 0)];
    assert_eq!(pairs(allocation), expected);
    // A raw disk is allocated everywhere.
    assert_eq!(pairs(depth), [(SIZE, 1)]);

    let mut client = Client::open(&server, ReplyMode::Structured, "", &contexts);
    let mut offset = 0;
    let mut joined: Vec<(u64, u64)> = Vec::new();
    while offset < SIZE {
        let length = (SIZE - offset).min(u64::from(u32::MAX));
        let outcome = client.request(offset, length, &status(ExtentLimit::Many));
        assert_eq!(outcome.result, Ok(()));
        let (_, allocation) = &outcome.statuses[0];
        for (length, flags) in pairs(allocation) {
            offset += length;
            match joined.last_mut() {
                Some(last) if last.1 == flags => last.0 += length,
                _ => joined.push((length, flags)),
            }
        }
    }
    assert_eq!(joined, expected);
}

#[test]
fn what_is_told_ends_with_the_request() {
    let Some(file) = sparse_file() else { return };
    let server = TestServer::of(image_export(file.path()));
    for mode in [ReplyMode::Structured, ReplyMode::Extended] {
        let contexts = [MetaContextName::base_allocation()];
        let mut client = Client::open(&server, mode, "", &contexts);
        for (offset, length, expected) in [
            (0, 100, vec![(100, 0)]),
            (MIB - 10, 20, vec![(10, 0), (10, HOLE)]),
            (MIB, 1, vec![(1, HOLE)]),
            (2 * GIB - 5, 10, vec![(5, HOLE), (5, 0)]),
            (SIZE - 7, 7, vec![(7, 0)]),
        ] {
            let outcome = client.request(offset, length, &status(ExtentLimit::Many));
            assert_eq!(pairs(&outcome.statuses[0].1), expected, "{length} at {offset}");
        }
    }
}

#[test]
fn with_req_one_there_is_one_extent_inside_the_request() {
    let Some(file) = sparse_file() else { return };
    let server = TestServer::of(image_export(file.path()));
    for mode in [ReplyMode::Structured, ReplyMode::Extended] {
        let contexts =
            [MetaContextName::base_allocation(), MetaContextName::qemu_allocation_depth()];
        let mut client = Client::open(&server, mode, "", &contexts);
        let outcome = client.request(MIB - 10, 3 * GIB, &status(ExtentLimit::One));
        assert_eq!(pairs(&outcome.statuses[0].1), [(10, 0)]);
        assert_eq!(pairs(&outcome.statuses[1].1), [(3 * GIB, 1)]);
        let outcome = client.request(MIB, 20, &status(ExtentLimit::One));
        assert_eq!(pairs(&outcome.statuses[0].1), [(20, HOLE)]);
    }
}

fn bitmaps() -> Vec<MetaContextName> {
    ["b0", "b1"].map(|name| MetaContextName::qemu_dirty_bitmap(name).unwrap()).to_vec()
}

#[test]
fn each_context_selected_is_answered_once_and_no_other() {
    let script = Script { contexts: bitmaps(), ..Script::default() };
    let server = TestServer::with(Default::default(), Scripted::new(1 << 20, script));
    let all = [vec![MetaContextName::base_allocation()], bitmaps()].concat();
    for mode in [ReplyMode::Structured, ReplyMode::Extended] {
        for chosen in [&all[..], &all[..1], &all[1..], &all[2..]] {
            let mut client = Client::open(&server, mode, "", chosen);
            let names = client.negotiated.meta_contexts.clone();
            assert_eq!(
                names.iter().map(|(_, name)| name).collect::<Vec<_>>(),
                chosen.iter().collect::<Vec<_>>()
            );
            let outcome = client.request(0, 1 << 20, &status(ExtentLimit::Many));
            assert_eq!(outcome.result, Ok(()));
            assert_eq!(outcome.statuses.len(), chosen.len());
            for (id, descriptors) in &outcome.statuses {
                let name = &names.iter().find(|(known, _)| known == id).unwrap().1;
                let flags = all.iter().position(|known| known == name).unwrap() as u64;
                let flags = if flags == 0 { HOLE } else { 99 + flags };
                assert_eq!(pairs(descriptors), [(1 << 20, flags)], "{name}");
            }
        }
    }
}

#[test]
fn a_payload_names_the_contexts_that_are_wanted_this_time() {
    let script = Script { contexts: bitmaps(), ..Script::default() };
    let server = TestServer::with(Default::default(), Scripted::new(1 << 20, script));
    let all = [vec![MetaContextName::base_allocation()], bitmaps()].concat();
    let mut client = Client::open(&server, ReplyMode::Extended, "", &all);
    let ids: Vec<MetaContextId> =
        client.negotiated.meta_contexts.iter().map(|(id, _)| *id).collect();
    for wanted in [vec![ids[2]], vec![ids[1], ids[0]], ids.clone()] {
        let command = Command::BlockStatus(ExtentLimit::Many, Some(wanted.clone().into()));
        let outcome = client.request(4096, 1000, &command);
        assert_eq!(outcome.result, Ok(()));
        let mut answered: Vec<u32> = outcome.statuses.iter().map(|(id, _)| id.0).collect();
        let mut wanted: Vec<u32> = wanted.iter().map(|id| id.0).collect();
        answered.sort_unstable();
        wanted.sort_unstable();
        assert_eq!(answered, wanted);
        assert!(outcome.statuses.iter().all(|(_, extents)| extents[0].length == 1000));
    }
}

#[test]
fn an_export_that_fails_gives_an_error_and_no_chunk_of_another_context() {
    let script = Script { contexts: bitmaps(), bad: Some(0..512), ..Script::default() };
    let server = TestServer::with(Default::default(), Scripted::new(1 << 20, script));
    let all = [vec![MetaContextName::base_allocation()], bitmaps()].concat();
    for mode in [ReplyMode::Structured, ReplyMode::Extended] {
        let mut client = Client::open(&server, mode, "", &all);
        let outcome = client.request(0, 4096, &status(ExtentLimit::Many));
        assert_eq!(outcome.result.unwrap_err().errno, nbd_proto::wire::Errno::EIO);
        assert!(outcome.statuses.is_empty());
        assert_eq!(client.request(4096, 4096, &status(ExtentLimit::Many)).result, Ok(()));
    }
}
