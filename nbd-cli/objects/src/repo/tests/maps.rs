//! Maps that are damaged, or say something else than what is there.

use super::super::head::Head;
use super::super::id::{Key, PackId};
use super::super::map::Map;
use super::super::pack::{FrameKind, PackBuilder};
use super::super::page::Page;
use super::super::protocol::Moves;
use super::super::root::{self, RootBuilder};
use super::super::seal::Sealer;
use super::super::stored::Stored;
use super::*;

/// Overwrites some bytes of an object.
async fn change(repository: &Repository, key: Key, at: u64) {
    let name = key.to_string();
    let mut object = repository.objects.read(&name, 64 << 20).await.unwrap().unwrap().to_vec();
    object[at as usize..][..40].iter_mut().for_each(|byte| *byte ^= 0x55);
    repository.objects.write(&name, object.into()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn page_that_is_damaged_in_the_last_backup_is_not_shared_with_the_next() {
    for passphrase in [None, Some(&b"secret"[..])] {
        let repository = Repository::init(place(), passphrase).await.unwrap();
        let disk = disk(1600, 37);
        let full = back_up(&repository, "vm1", &disk, None).await;
        let map = Map::open(&repository, &Moves::default(), full.id).await.unwrap();
        let page = map.root().pages()[1].unwrap().stored;
        change(&repository, Key::Pack(page.pack), page.range().start + 20).await;
        assert!(content(&repository, full.id).await.is_err());
        let dirty = back_up_dirty(&repository, &disk, full.id, &[3]).await;
        assert!(content(&repository, dirty.id).await.unwrap() == disk);
        // Only that page was read from the disk again.
        assert!(dirty.found > 1000 * BLOCK_SIZE / 2, "{dirty:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn page_whose_pack_was_cut_is_not_shared_with_the_next_backup() {
    let repository = repository().await;
    let disk = disk(1600, 41);
    let full = back_up(&repository, "vm1", &disk, None).await;
    let map = Map::open(&repository, &Moves::default(), full.id).await.unwrap();
    let blocks = map.page(1).await.unwrap();
    let last = *blocks.blocks.iter().flatten().last().unwrap();
    let name = Key::Pack(last.pack).to_string();
    let pack = repository.objects.read(&name, 64 << 20).await.unwrap().unwrap();
    let cut = pack.slice(..last.range().end as usize - 1);
    repository.objects.write(&name, cut).await.unwrap();
    assert!(content(&repository, full.id).await.is_err());
    let dirty = back_up_dirty(&repository, &disk, full.id, &[3]).await;
    assert!(content(&repository, dirty.id).await.unwrap() == disk);
}

/// Writes a backup with the pages of another one, as `change` has them.
async fn forge(
    repository: &Repository,
    like: Id,
    size: Option<u64>,
    change: impl Fn(u16, Vec<PackId>) -> (u16, Vec<PackId>),
) -> Id {
    let map = Map::open(repository, &Moves::default(), like).await.unwrap();
    let mut builder = RootBuilder::default();
    for (number, page) in map.root().pages().iter().enumerate() {
        let Some(page) = page else {
            builder.zero();
            continue;
        };
        let (blocks, packs) = change(page.data_blocks, map.root().packs_of(page).collect());
        builder.page(page.content, blocks, &packs).unwrap();
        builder.place(number, page.stored).unwrap();
    }
    let id = Id::random().unwrap();
    let mut head = map.head().clone();
    head.size = size.unwrap_or(head.size);
    write(repository, id, &head, builder).await;
    id
}

async fn write(repository: &Repository, id: Id, head: &Head, builder: RootBuilder) {
    let sealer = &repository.objects.sealer;
    let object = root::encode(sealer, id, head, &builder.finish()).unwrap();
    repository.objects.write(&Key::Backup(id).to_string(), object).await.unwrap();
}

/// The backups that a check names.
async fn named(repository: &Repository, percent: f64) -> Vec<Id> {
    let problems = repository.check(percent).await.unwrap().problems;
    let mut named: Vec<_> =
        problems.into_iter().flat_map(|it| it.backups).map(|(id, _)| id).collect();
    named.sort_unstable();
    named.dedup();
    named
}

#[tokio::test(flavor = "multi_thread")]
async fn check_compares_what_each_backup_says_of_a_page_that_it_shares() {
    let repository = repository().await;
    let disk = disk(700, 43);
    let good = back_up(&repository, "vm1", &disk, None).await;
    let same = forge(&repository, good.id, None, |blocks, packs| (blocks, packs)).await;
    assert_eq!(named(&repository, 0.0).await, []);
    // A gc would delete what the first one needs, and lists tell a wrong size of the other.
    let lacking = forge(&repository, good.id, None, |blocks, mut packs| {
        packs.truncate(1);
        (blocks, packs)
    });
    let lacking = lacking.await;
    assert_eq!(named(&repository, 0.0).await, [lacking]);
    let lying = forge(&repository, good.id, None, |blocks, packs| (blocks - 1, packs)).await;
    assert_eq!(named(&repository, 0.0).await, [lacking, lying]);
    assert!(content(&repository, same).await.unwrap() == disk);
}

#[tokio::test(flavor = "multi_thread")]
async fn check_compares_the_lengths_of_maps_with_the_size_of_the_disk() {
    let repository = repository().await;
    let disk = disk(700, 47);
    let good = back_up(&repository, "vm1", &disk, None).await;
    let same = |blocks: u16, packs: Vec<PackId>| (blocks, packs);
    for percent in [0.0, 100.0] {
        assert_eq!(named(&repository, percent).await, []);
    }
    // The page has one block more, one less, or its last block is another part of the disk.
    let mut forged = Vec::new();
    for size in [699 * BLOCK_SIZE + 5, 702 * BLOCK_SIZE, 701 * BLOCK_SIZE, 700 * BLOCK_SIZE + 1] {
        forged.push(forge(&repository, good.id, Some(size), same).await);
        forged.sort_unstable();
        for percent in [0.0, 100.0] {
            assert_eq!(named(&repository, percent).await, forged, "{size}");
        }
    }
    assert!(content(&repository, good.id).await.unwrap() == disk);
}

#[tokio::test(flavor = "multi_thread")]
async fn check_that_reads_packs_compares_them_with_the_maps() {
    for passphrase in [None, Some(&b"secret"[..])] {
        let repository = Repository::init(place(), passphrase).await.unwrap();
        let disk = disk(300, 53);
        let good = back_up(&repository, "vm1", &disk, None).await;
        let map = Map::open(&repository, &Moves::default(), good.id).await.unwrap();
        let page = map.page(0).await.unwrap();
        let first = page.blocks.iter().position(Option::is_some).unwrap();
        let pack = page.blocks[first].unwrap().pack;
        let in_pack = |stored: &Option<Stored>| stored.is_some_and(|it| it.pack == pack);
        let second = page.blocks.iter().skip(first + 1).position(in_pack).unwrap() + first + 1;
        for change in 0..3 {
            let mut blocks = page.blocks.clone();
            let mut block = blocks[first].unwrap();
            match change {
                0 => block.hash = blocks[second].unwrap().hash,
                1 => block.length -= 1,
                _ => block.offset += 1,
            }
            blocks[first] = Some(block);
            // The hashes of the page and of its pack are right.
            let forged = Page { blocks };
            let id = Id::random().unwrap();
            let sealer = &repository.objects.sealer;
            let mut pack = PackBuilder::new(PackId { session: id, number: 0 });
            let encoded = forged.encode();
            let hash = sealer.hash(&encoded);
            let frame = Sealer::compress(&encoded);
            let stored = pack.add(sealer, (FrameKind::Page, 0), frame, hash).unwrap();
            let name = Key::Pack(pack.id()).to_string();
            repository.objects.write(&name, pack.finish(sealer).unwrap()).await.unwrap();
            let mut builder = RootBuilder::default();
            let count = forged.blocks.iter().flatten().count() as u16;
            builder.page(encoded.len() as u32, count, &forged.packs()).unwrap();
            builder.place(0, stored).unwrap();
            write(&repository, id, map.head(), builder).await;
            assert!(content(&repository, id).await.is_err());
            assert_eq!(named(&repository, 100.0).await, [id]);
            assert!(repository.forget(id, false).await.unwrap());
        }
        assert_eq!(named(&repository, 100.0).await, []);
    }
}
