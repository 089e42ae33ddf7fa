//! The target for whole images that are damaged: images of several kinds, made by this crate, whose
//! metadata is changed word by word at the places where there is any.
//!
//! With random bytes alone no fuzzer gets behind the first table. Here every input opens a
//! structure, and a few words of it are wrong.

use std::path::PathBuf;
use std::sync::OnceLock;

use imgfmt::{
    Access, Content, CreateOptions, Durability, ErrorKind, Format, GuestOffset, Image, L2Entries,
    OpenOptions, OpenPolicy, Qcow2Version, Repair, Shrink, Speed, Storage, ZeroMode,
};

use super::handmade::{COPIED, field};
use super::{check, content, look, open, range, try_to_operate};

/// An image with the places of its words of metadata.
struct Base {
    bytes: Vec<u8>,
    cluster: u64,
    places: Vec<usize>,
}

const KINDS: usize = 5;
const DIRTY: u8 = 1;
const CORRUPT: u8 = 2;
/// Offsets in tables, without the flags of their entries.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// A file of this thread: tests of one process run side by side.
fn file(what: &str) -> PathBuf {
    let (process, thread) = (std::process::id(), std::thread::current().id());
    std::env::temp_dir().join(format!("imgfmt-fuzz-{process}-{thread:?}-{what}.qcow2"))
}

fn base(kind: usize) -> &'static Base {
    static BASES: [OnceLock<Base>; KINDS] = [const { OnceLock::new() }; KINDS];
    BASES[kind].get_or_init(|| make(kind))
}

/// A disk of two L2 tables and more, with data, zeroes, holes, a compressed cluster and a snapshot.
fn make(kind: usize) -> Base {
    let mut options = CreateOptions::new(Format::Qcow2, 96 * 1024);
    options.cluster_size = 512;
    match kind {
        1 => options.version = Qcow2Version::V2,
        2 => {
            options.l2_entries = L2Entries::Extended;
            options.cluster_size = 16_384;
            options.size = Some(40 * 16_384);
        }
        3 => options.refcount_bits = 1,
        4 => options.refcount_bits = 64,
        _ => {}
    }
    let cluster = options.cluster_size;
    let path = file(&format!("base{kind}"));
    let _ = std::fs::remove_file(&path);
    Image::create(&path, &options).expect("sound options");
    let options = OpenOptions::new().format(Format::Qcow2).access(Access::ReadWrite);
    let mut disk = Image::open(&path, &options).expect("a new image");
    let write = |disk: &Image, number: u64, fill: u8| {
        let data = vec![fill; cluster as usize];
        let place = GuestOffset::new(number * cluster);
        disk.write_at(place, &data, Durability::Cached).expect("a sound image");
    };
    for number in [0, 1, 2, 5, 37] {
        write(&disk, number, 0x51);
    }
    if kind != 2 {
        write(&disk, 100, 0x52);
        disk.write_compressed(GuestOffset::new(8 * cluster), &vec![0x53; cluster as usize])
            .expect("a sound image");
    }
    if kind != 3 {
        disk.create_snapshot("s").expect("a sound image");
        write(&disk, 1, 0x54);
        write(&disk, 6, 0x55);
    }
    let zeroes = range(2 * cluster, cluster);
    let mode = ZeroMode::MayUnmap;
    disk.write_zeroes(zeroes, mode, Speed::Any, Durability::Cached).expect("a sound image");
    disk.close().expect("there is room for it");
    let bytes = std::fs::read(&path).expect("it was made just now");
    std::fs::remove_file(&path).expect("it was made just now");
    let places = bytes.chunks(cluster as usize).enumerate().flat_map(|(number, content)| {
        let is_data =
            (0x51..=0x55).contains(&content[0]) && content.iter().min() == content.iter().max();
        let words =
            content.chunks_exact(8).enumerate().map(move |(word, bytes)| (number, word, bytes));
        words.filter(move |(_, word, bytes)| !is_data && (*word < 16 || **bytes != [0; 8]))
    });
    let places = places.map(|(number, word, _)| number * cluster as usize + word * 8).collect();
    Base { bytes, cluster, places }
}

fn word(bytes: &[u8], place: usize) -> u64 {
    let bytes = bytes.get(place..place + 8).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u64::from_be_bytes)
}

/// Four bytes are a change: which word, how it changes, and by what.
fn damage(base: &Base, changes: &[u8]) -> Vec<u8> {
    let mut bytes = base.bytes.clone();
    for change in changes.as_chunks::<4>().0 {
        let [high, low, how, value] = *change;
        let place = |number: usize| base.places[number % base.places.len()];
        let at = place(usize::from(u16::from_be_bytes([high, low])));
        let old = word(&bytes, at);
        let cluster = u64::from(value) * base.cluster;
        let new = match how % 8 {
            0 => old ^ 1 << (value % 64),
            1 => cluster | COPIED,
            2 => cluster,
            3 => old.wrapping_add(i64::from(value as i8) as u64),
            4 => old & !(0xff << (how & 0x38)) | u64::from(value) << (how & 0x38),
            5 => word(&bytes, place(usize::from(value))),
            6 => old.wrapping_add((i64::from(value as i8) as u64).wrapping_mul(base.cluster)),
            _ => u64::from(value) << 56 | old >> 8,
        };
        bytes[at..at + 8].copy_from_slice(&new.to_be_bytes());
    }
    bytes
}

/// The first byte chooses the kind of image and whether it says itself that it needs repair, the
/// second how many changes there are of four bytes each; then five bytes are an operation.
pub(crate) fn damaged(data: &[u8]) {
    let [choice, count, rest @ ..] = data else { return };
    let kind = usize::from(choice & 0x7f) % KINDS;
    let changes = usize::from(count % 8) * 4;
    let (changes, operations) = rest.split_at(rest.len().min(changes));
    let mut bytes = damage(base(kind), changes);
    if choice & 0x80 == 0 {
        use_damaged(&bytes, operations);
        repair(&bytes);
    } else if bytes[field::VERSION + 3] == 3 {
        let features = &mut bytes[field::INCOMPATIBLE + 7];
        *features = *features & !CORRUPT | DIRTY;
        use_repaired(&bytes, operations);
    }
}

/// Whatever the image says, it does no harm, and what is said about it is one line.
fn use_damaged(bytes: &[u8], operations: &[u8]) {
    let (storage, opened) = open(bytes, Access::ReadOnly);
    if let Ok(disk) = opened {
        look(&disk);
        let _ = disk.info();
    }
    assert!(content(&storage) == bytes, "reading changed the image");
    let (storage, opened) = open(bytes, Access::ReadWrite);
    let Ok(mut disk) = opened else { return };
    for operation in operations.as_chunks::<5>().0.iter().take(60) {
        if let Err(error) = change(&mut disk, operation) {
            assert!(!error.to_string().contains(char::is_control), "{error:?}");
        }
    }
    let _ = disk.close();
    let length = storage.len().expect("memory has a length");
    assert!(length < 1 << 26, "the file has become {length} bytes long");
}

fn change(disk: &mut Image, operation: &[u8; 5]) -> imgfmt::Result<()> {
    let [what, place @ .., length, fill] = *operation;
    let size = disk.size();
    if size == 0 {
        return disk.resize(1 << 14, Shrink::Allow);
    }
    // Damaged headers make disks of any size.
    let offset = u64::from(u16::from_be_bytes(place)) * 5 % size.min(1 << 20);
    let place = range(offset, (u64::from(length) * 64).min(size - offset));
    let cached = Durability::Cached;
    match what % 16 {
        0..=2 => disk.write_at(place.offset(), &vec![fill; place.length() as usize], cached),
        3 => disk.try_write_at(place.offset(), &vec![fill; place.length() as usize]).map(drop),
        4 => {
            // In most of these images that is a cluster.
            let cluster = vec![fill; 512];
            disk.write_compressed(GuestOffset::new(offset / 512 * 512), &cluster)
        }
        5 | 6 => disk.write_zeroes(place, ZeroMode::MayUnmap, Speed::Any, cached),
        7 => disk.write_zeroes(place, ZeroMode::KeepAllocated, Speed::Any, cached),
        8 | 9 => disk.discard(place, cached),
        10 => disk.flush(),
        11 => disk.create_snapshot(if fill % 2 == 0 { "t" } else { "u" }),
        12 => disk.apply_snapshot("s"),
        13 => disk.delete_snapshot(if fill % 2 == 0 { "s" } else { "t" }),
        14 => disk.resize(u64::from(length) * 1024, Shrink::Allow),
        _ => disk.clear(),
    }
}

/// A repair that says that it was complete was complete.
fn repair(bytes: &[u8]) {
    let path = file("repaired");
    std::fs::write(&path, bytes).expect("there is room for a few clusters");
    let options = OpenOptions::new().format(Format::Qcow2).policy(OpenPolicy::deny());
    let first = Image::check_file(&path, &options, Repair::All);
    let second = Image::check_file(&path, &options, Repair::None);
    let length = std::fs::metadata(&path).expect("it was made just now").len();
    std::fs::remove_file(&path).expect("it was made just now");
    assert!(length < 1 << 26, "the file has become {length} bytes long");
    if let Ok(first) = first.as_ref()
        && first.corruptions == 0
    {
        let second = second.as_ref().expect("it was repaired");
        assert_eq!((second.corruptions, second.leaks), (0, 0), "{first:?}, then {second:?}");
    }
}

/// An image that was repaired when it was opened is as sound as a new one: what is written is read,
/// and nothing else changes.
fn use_repaired(bytes: &[u8], operations: &[u8]) {
    let (storage, opened) = open(bytes, Access::ReadWrite);
    let Ok(disk) = opened else { return };
    if disk.size() == 0 || disk.size() > 1 << 20 || shows_its_metadata(&disk, &content(&storage)) {
        return;
    }
    let mut model = vec![0; disk.size() as usize];
    if disk.read_at(GuestOffset::new(0), &mut model).is_err() {
        // Something compressed is no more.
        return;
    }
    for operation in operations.as_chunks::<5>().0.iter().take(60) {
        let (part, done) = try_to_operate(&disk, &mut model, operation);
        if let Err(error) = done {
            // Some references to metadata are met only when something is written through them.
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
            let mut found = vec![0; model.len()];
            disk.read_at(GuestOffset::new(0), &mut found).expect("memory does not fail");
            model[part.clone()].copy_from_slice(&found[part]);
            assert!(found == model, "what failed has changed something else");
            return;
        }
    }
    check(&disk, &model);
    disk.close().expect("memory does not fail");
    let (_, opened) = open(&content(&storage), Access::ReadWrite);
    check(&opened.expect("it was sound"), &model);
}

/// Whether the disk shows, or keeps its tables in, what changes with every write. Only comparing
/// all references with each other would find that, which no check does.
fn shows_its_metadata(disk: &Image, bytes: &[u8]) -> bool {
    let cluster = 1u64 << (word(bytes, field::CLUSTER_BITS - 4) as u32).min(21);
    let l1_offset = word(bytes, field::L1_OFFSET);
    let l1_bytes = (word(bytes, field::L1_SIZE - 4) & 0xffff_ffff) * 8;
    let table_offset = word(bytes, field::REFCOUNT_TABLE_OFFSET);
    let table_bytes = (word(bytes, field::REFCOUNT_TABLE_CLUSTERS - 4) & 0xffff_ffff) * cluster;
    let words = |offset: u64, length: u64| {
        let places = (offset..offset + length).step_by(8);
        places.map(|place| word(bytes, place as usize) & OFFSET_MASK).filter(|word| *word != 0)
    };
    let blocks = words(table_offset, table_bytes).map(|block| (block, block + cluster));
    let mut fixed: Vec<(u64, u64)> = blocks.collect();
    fixed.extend([(0, cluster), (l1_offset, l1_offset + l1_bytes)]);
    fixed.push((table_offset, table_offset + table_bytes));
    let is_fixed = |offset: u64, length: u64| {
        fixed.iter().any(|(start, end)| offset < *end && offset + length > *start)
    };
    let whole = range(0, disk.size());
    words(l1_offset, l1_bytes).any(|table| is_fixed(table, cluster))
        || disk.map_read(whole).is_ok_and(|map| {
            map.mappings().any(|mapping| match mapping.content {
                Content::File(span) => is_fixed(span.offset.bytes(), mapping.range.length()),
                _ => false,
            })
        })
}
